//! What a user of the gateway can see, tested from outside: one file per capability, one binary.
#![allow(missing_docs, clippy::unwrap_used)]

mod support;

mod attach;
mod audit;
mod bridge_faults;
mod cli;
mod codex_harness;
mod compat;
mod copy;
mod endure;
mod file_tools;
mod files;
mod files_http;
mod flavours;
mod harness;
mod keys;
mod limits;
mod links;
mod matrix;
mod mcp;
mod mcp_clients;
mod ops;
mod patch;
mod registration;
mod relink;
mod rest;
mod restart;
mod service;
mod session_tools;
mod sessions;
mod shell;
mod tenancy;
mod tls;
mod tokens;
mod transfer;
