//! The exec-gateway daemon.

pub mod admin;
pub mod auth;
pub mod config;
pub mod store;
pub mod time;

pub use exec_gateway_protocol as protocol;
