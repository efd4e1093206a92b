//! Process sessions for minutes on the real executor: more output than memory and quota hold, then many sessions while
//! links are cut and gateways killed. Ends with a panic at the first byte that is lost or doubled.
//! `cargo bench --bench soak -- 512` takes so many MiB instead of 2 GiB for the first part.
#![allow(missing_docs, clippy::unwrap_used)]

#[allow(dead_code, reason = "each bench uses a part")]
mod rig;
#[allow(unused_imports, reason = "each bench uses a part")]
#[path = "../support/mod.rs"]
mod support;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use support::{Caller, CodexExecutor, Credentials, DaemonProcess, MIB, Proxy, Scratch, eventually, noise};

const SESSIONS: usize = 50;
const CUTS: usize = 20;
const KILLS: usize = 5;
const PIECES: usize = 200;

/// Bytes printed each half second: the executor's ring of 1 MiB then bridges a minute without a link.
const PIECE: usize = 8 * 1024;

/// No part takes longer than this; together they stay below 8 minutes.
const PART_MAX: Duration = Duration::from_secs(230);

#[tokio::main]
async fn main() {
    let mebibytes = rig::argument(2048);
    tokio::time::timeout(PART_MAX, large_output(mebibytes)).await.expect("the output comes in time");
    tokio::time::timeout(PART_MAX, disturbed()).await.expect("the sessions end in time");
}

struct Bench {
    state: Scratch,
    address: SocketAddr,
    daemon: Option<DaemonProcess>,
    caller: Caller,
    proxy: Proxy,
    executor: CodexExecutor,
}

impl Bench {
    async fn start() -> Self {
        let (state, address) = (Scratch::new(), free_address());
        let daemon = DaemonProcess::start(&state, address, &["--log-level", "error"]).await;
        let token = DaemonProcess::operate(&state, &["token", "create", "--workspace", "w"]).await;
        let executor = ["executor", "create", "--workspace", "w", "--name", "box"];
        let executor = DaemonProcess::operate(&state, &executor).await;
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let credentials = Credentials { executor: text(&executor["exe_id"]), token: text(&executor["token"]) };
        let caller = Caller::new(address, Some(text(&token["token"])));
        let proxy = Proxy::to(address).await;
        let url = format!("http://{}", proxy.address);
        let executor = CodexExecutor::connected(&url, &credentials, &caller, "box").await;
        Self { state, address, daemon: Some(daemon), caller, proxy, executor }
    }

    async fn begin(&self, command: Value) -> String {
        let result = self.caller.result("box", "exec_command", json!({ "command": command, "stdin": "none" })).await;
        result["structuredContent"]["session_id"].as_str().unwrap_or_else(|| panic!("{result}")).to_owned()
    }

    fn resident_bytes(&self) -> f64 {
        rig::resident_bytes(self.daemon.as_ref().unwrap().pid())
    }

    async fn kill_and_restart(&mut self) {
        self.daemon.take().unwrap().kill().await;
        self.daemon = Some(DaemonProcess::start(&self.state, self.address, &["--log-level", "error"]).await);
    }
}

fn free_address() -> SocketAddr {
    loop {
        // Below the ports that the system hands out by itself.
        let port = 20_000 + (uuid::Uuid::new_v4().as_u128() % 10_000) as u16;
        if let Ok(listener) = std::net::TcpListener::bind(("127.0.0.1", port)) {
            return listener.local_addr().unwrap();
        }
    }
}

async fn get(caller: &Caller, session: &str, query: &str) -> Value {
    let path = format!("/api/connectors/processes/{session}{query}");
    eventually("an answer", async || {
        let answer = caller.try_send("GET", &path, &[], "").await.ok()?;
        assert!(matches!(answer.status.as_u16(), 200 | 503), "{answer:?}");
        (answer.status == 200).then(|| answer.json())
    })
    .await
}

/// Reads along to the end; gives the length and digest of what came, and the last page.
async fn read_along(caller: &Caller, session: &str) -> (usize, String, Value) {
    let (mut since, mut length, mut hasher) = (0, 0, Sha256::new());
    loop {
        let query = format!("/output?since={since}&wait_ms=5000&max_bytes={}", 4 * MIB);
        let page = get(caller, session, &query).await;
        assert!(page["lost"].is_null(), "{}", page["lost"]);
        for chunk in page["chunks"].as_array().unwrap() {
            assert!(chunk["gap"].is_null(), "{chunk}");
            assert_eq!(chunk["offset"], length);
            let bytes = STANDARD.decode(chunk["data_b64"].as_str().unwrap()).unwrap();
            length += bytes.len();
            hasher.update(bytes);
        }
        since = page["next_since"].as_u64().unwrap();
        if page["session_alive"] == false {
            return (length, hex(hasher), page);
        }
    }
}

fn hex(hasher: Sha256) -> String {
    hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

async fn large_output(mebibytes: usize) {
    let bench = Bench::start().await;
    let block = noise(1, 8 * MIB);
    std::fs::write(bench.executor.home().join("block"), &block).unwrap();
    let count = mebibytes.div_ceil(8);
    let idle = bench.resident_bytes();
    let start = Instant::now();
    let command = format!("i=0; while [ $i -lt {count} ]; do printf %08d $i; cat block; i=$((i+1)); done");
    let session = bench.begin(json!(command)).await;
    let highest = async {
        let (mut highest, mut ticks) = (0f64, tokio::time::interval(Duration::from_millis(100)));
        while get(&bench.caller, &session, "").await["state"] == "running" {
            highest = highest.max(bench.resident_bytes());
            ticks.tick().await;
        }
        highest
    };
    let ((length, digest, last), highest) = tokio::join!(read_along(&bench.caller, &session), highest);
    let seconds = start.elapsed().as_secs_f64();
    let mut expected = Sha256::new();
    for number in 0..count {
        expected.update(format!("{number:08}"));
        expected.update(&block);
    }
    assert_eq!((length, &digest), (count * (8 * MIB + 8), &hex(expected)));
    let stdout = &last["exit"]["streams"]["stdout"];
    assert_eq!(stdout["sha256"], digest);
    let lost = stdout["lost_bytes"].as_u64().unwrap() as usize;
    println!(
        "{} MiB of one process, read along: exact, {:.0} MiB/s; {} MiB stay readable; daemon {:.0} MiB idle, {:.0} MiB at most",
        length / MIB,
        length as f64 / MIB as f64 / seconds,
        (length - lost) / MIB,
        idle / MIB as f64,
        highest / MIB as f64
    );
}

async fn disturbed() {
    let mut bench = Bench::start().await;
    let command = format!(
        "i=0; while [ $i -lt {PIECES} ]; do dd if=in.$1 bs={PIECE} skip=$i count=1 2>/dev/null; sleep 0.5; i=$((i+1)); done"
    );
    let mut sessions = Vec::new();
    for number in 0..SESSIONS {
        let bytes = noise(number as u64, PIECES * PIECE);
        std::fs::write(bench.executor.home().join(format!("in.{number}")), &bytes).unwrap();
        let session = bench.begin(json!(["/bin/sh", "-c", command, "sh", number.to_string()])).await;
        sessions.push((session, hex(Sha256::new_with_prefix(bytes))));
    }
    let caller = bench.caller.clone();
    let start = Instant::now();
    let disturb = async {
        for event in 0..CUTS + KILLS {
            // Each comes when output has come after the one before.
            let mark = (event + 1) * PIECES * PIECE / (CUTS + KILLS + 1);
            eventually("output goes on", async || {
                (get(&caller, &sessions[0].0, "").await["stdout_bytes"].as_u64()? >= mark as u64).then_some(())
            })
            .await;
            if event % (CUTS / KILLS + 1) == CUTS / KILLS {
                bench.kill_and_restart().await;
            } else {
                bench.proxy.cut();
            }
        }
    };
    let read = futures_util::future::join_all(sessions.iter().map(|(session, _)| read_along(&caller, session)));
    let (read, ()) = tokio::join!(read, disturb);
    let mut bytes = 0;
    for ((_, expected), (length, digest, last)) in sessions.iter().zip(&read) {
        assert_eq!((*length, digest), (PIECES * PIECE, expected));
        assert_eq!(last["exit"]["streams"]["stdout"]["sha256"], *expected);
        bytes += length;
    }
    println!(
        "{SESSIONS} sessions, {CUTS} cuts, {KILLS} kills in {:.0} s: {bytes} bytes, 0 lost, 0 doubled; daemon {:.0} MiB",
        start.elapsed().as_secs_f64(),
        bench.resident_bytes() / MIB as f64
    );
}
