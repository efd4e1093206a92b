//! A gateway, real and stand-in executors, and a caller, each with its own ports, state and secrets, so that all tests
//! run at once.
// Tests and benches each use a part of this.
#![allow(dead_code)]

pub mod adapter;
pub mod app_server;
pub mod caller;
pub mod codex;
pub mod described;
pub mod fake_executor;
pub mod gateway;
pub mod harness;
pub mod mcp;
pub mod model;
pub mod pieces;
pub mod proxy;
pub mod sigv4;
pub mod upstream;
pub mod wire;

use std::path::PathBuf;
use std::time::Duration;

pub use adapter::Adapter;
pub use app_server::{AppServer, Route};
pub use caller::{Answer, Caller};
pub use codex::{CodexExecutor, Machine, Marker, Workbench};
pub use fake_executor::{FakeExecutor, FakeLink, Reply};
pub use gateway::{Credentials, DaemonProcess, TestGateway};
pub use harness::{Harness, Tongue};
pub use mcp::Mcp;
pub use model::Model;
pub use pieces::Pieces;
pub use proxy::Proxy;
pub use sigv4::Signer;
pub use upstream::{Upstream, Verdict};
pub use wire::Wire;

pub const MIB: usize = 1024 * 1024;

/// How long a test waits for something that happens in milliseconds, on a machine that is busy with other tests.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until the condition gives a value. The tests' one way to wait.
pub async fn eventually<T>(what: &str, mut condition: impl AsyncFnMut() -> Option<T>) -> T {
    let waited = tokio::time::timeout(PATIENCE, async {
        loop {
            if let Some(value) = condition().await {
                return value;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    waited.await.unwrap_or_else(|_| panic!("not within {PATIENCE:?}: {what}"))
}

/// Bytes of every kind that look like noise and are the same for the same seed (SplitMix64).
pub fn noise(mut seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = seed;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bytes.extend_from_slice(&(word ^ (word >> 31)).to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// The largest memory that a process has had, in MiB.
pub fn peak_mib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() / 1024
}

/// A directory of this test alone, removed with the value.
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new() -> Self {
        let path = std::env::temp_dir().join(format!("exec-gateway-test-{}", uuid::Uuid::new_v4().simple()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub fn path(&self) -> &std::path::Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
