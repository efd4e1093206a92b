//! Feeds libFuzzer's inputs to the target function, which the crate's own tests share.
#![no_main]

#[path = "../targets/rpc.rs"]
mod target;

libfuzzer_sys::fuzz_target!(|input: &[u8]| target::run(input));
