//! What a user of the gateway can see, tested from outside: one file per capability, one binary.
#![allow(missing_docs, clippy::unwrap_used)]

mod support;

mod attach;
mod bridge_faults;
mod cli;
mod codex_harness;
mod compat;
mod endure;
mod files;
mod flavours;
mod harness;
mod keys;
mod limits;
mod links;
mod matrix;
mod ops;
mod proxies;
mod registration;
mod relink;
mod rest;
mod restart;
mod restart_load;
mod service;
mod sessions;
mod shell;
mod tenancy;
mod tls;
mod tokens;
