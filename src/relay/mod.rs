//! Moves frames between executors and those who call them.
//!
//! [`link`] owns an executor's socket, [`stream`] is the gateway's end of one conversation on it, [`noise`] the
//! encryption of that conversation, and [`client`] speaks the executor's JSON-RPC over it. [`process_events`] puts what a
//! client tells of a process in order.

pub mod client;
pub mod link;
pub mod noise;
pub mod process_events;
pub mod process_tree;
pub mod stream;
