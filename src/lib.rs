//! The exec-gateway daemon.

pub mod admin;
pub mod config;
pub mod store;

pub use exec_gateway_protocol as protocol;
