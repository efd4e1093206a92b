//! A large file from one real executor to another: MiB/s, and the most memory that the gateway takes for it. The baseline
//! is what the work cannot do without on this machine: the file written and summed there. `cargo bench --bench copy -- MIB`
//! copies another size.
#![allow(missing_docs, clippy::unwrap_used)]

#[allow(dead_code, reason = "each bench uses a part")]
mod rig;
#[allow(unused_imports, reason = "each bench uses a part")]
#[path = "../support/mod.rs"]
mod support;

use std::io::Write;
use std::path::Path;

use serde_json::json;

use support::gateway::workspace;
use support::{Credentials, DaemonProcess, MIB, Machine, Scratch, noise};

/// Writes so many MiB that differ from each other.
fn write(path: &Path, mib: usize) {
    let mut file = std::io::BufWriter::new(std::fs::File::create(path).unwrap());
    let mut block = noise(1, MIB);
    for nth in 0..mib as u64 {
        block[..8].copy_from_slice(&nth.to_le_bytes());
        file.write_all(&block).unwrap();
    }
    file.flush().unwrap();
}

async fn run() {
    let mib = rig::argument(2048);
    let state = Scratch::new();
    let daemon = DaemonProcess::start(&state, "127.0.0.1:0".parse().unwrap(), &["--log-level", "error"]).await;
    let (caller, first) = workspace(&state, &daemon).await;
    let second = rig::create_executor(state.path(), daemon.address, "to").await;
    let connect =
        async |credentials: &Credentials, name| Machine::connected(daemon.address, credentials, &caller, name).await;
    let (from, to) = (connect(&first, "box").await, connect(&second, "to").await);
    let (source, copy) = (from.file("file"), to.file("copy"));
    write(&source, mib);
    let sum = |path: &Path| {
        let output = std::process::Command::new("sha256sum").arg(path).output().unwrap();
        String::from_utf8(output.stdout).unwrap()[..64].to_owned()
    };
    let mut expected = String::new();
    let bare = rig::seconds(async {
        std::fs::copy(&source, &copy).unwrap();
        expected = sum(&copy);
    })
    .await;
    std::fs::remove_file(&copy).unwrap();

    let arguments = json!({
        "source_environment_id": "box", "source_path": "file",
        "destination_environment_id": "to", "destination_path": "copy",
    });
    let mut result = json!(null);
    let taken = rig::seconds(async { result = caller.result("box", "copy_path", arguments).await }).await;
    assert_eq!(result["structuredContent"]["sha256"], json!(expected), "{result}");
    assert_eq!(sum(&copy), expected);
    assert!(to.leftovers().is_empty());

    rig::head("copy_path between two executors");
    let rate = |seconds: f64| format!("{:.0} MiB/s", mib as f64 / seconds);
    rig::line(&format!("{mib} MiB, against a local copy and its sum"), rate(taken), rate(bare), taken / bare, "");
    println!("most memory of the gateway: {} MiB", support::peak_mib(daemon.pid()));
}

fn main() {
    tokio::runtime::Runtime::new().unwrap().block_on(run());
}
