//! The wire of exec-gateway as values: relay frames, JSON-RPC, REST bodies, tokens.
//!
//! No tokio, no I/O, no clock: a client could use this crate alone, and the fuzzer does.

pub mod ids;
