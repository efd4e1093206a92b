#![doc = include_str!("ARCHITECTURE.md")]

pub mod admin;
pub mod api;
pub mod audit;
pub mod auth;
pub mod config;
pub mod edge;
pub mod gateway;
pub mod journal;
pub mod ops;
pub mod registry;
pub mod relay;
pub mod session;
pub mod store;
pub mod time;
pub mod timing;
pub mod tools;
pub mod trace;
pub mod transfer;
pub mod workspace;

pub use exec_gateway_protocol as protocol;

#[cfg(test)]
#[path = "../protocol/fuzz/feed.rs"]
mod feeding;
