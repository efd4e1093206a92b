//! Moves frames between executors and those who call them.
//!
//! [`link`] owns an executor's socket, [`stream`] is the gateway's end of one stream on it, [`conversation`] the
//! messages on that stream, [`noise`] their encryption, and [`client`] speaks the executor's JSON-RPC with them.
//! [`process_events`] puts what a client tells of a process in order, [`spill`] holds what a harness has not read yet,
//! and [`comeback`] lets it find its stream again.

pub mod client;
pub mod comeback;
pub mod conversation;
mod gate;
pub mod greeting;
pub mod harness;
pub mod lane;
pub mod link;
pub mod noise;
pub mod process_events;
pub mod process_tree;
pub mod shared;
#[cfg(test)]
mod shared_tests;
pub mod spill;
pub mod stream;
