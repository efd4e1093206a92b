//! The wire of exec-gateway as values: relay frames, JSON-RPC, REST bodies, tokens.
//!
//! No tokio, no I/O, no clock: a client could use this crate alone, and the fuzzer does.

pub mod cap_token;
pub mod compat;
pub mod endpoint;
pub mod frame;
pub mod harness_token;
pub mod ids;
mod mac;
pub mod message;
pub mod path;
pub mod rest;
pub mod rpc;
pub mod ticket;
pub mod trace;

// The fuzz targets name the crate from outside, here as under cargo-fuzz.
#[cfg(test)]
extern crate self as exec_gateway_protocol;
#[cfg(test)]
mod fuzz;
