//! Process sessions for minutes on the real executor: more output than memory and quota hold, then many sessions while
//! links are cut and gateways killed. Ends with a panic at the first byte that is lost or doubled.
//! `cargo bench --bench soak -- 512` takes so many MiB instead of 2 GiB for the first part, and 0 leaves it out.
//!
//! A quarter of an hour, nearly all of it spent waiting for the executor: it pauses up to 30 s before it dials again.
#![allow(missing_docs, clippy::unwrap_used)]

#[allow(dead_code, reason = "each bench uses a part")]
mod rig;
#[allow(unused_imports, reason = "each bench uses a part")]
#[path = "../support/mod.rs"]
mod support;

use std::cell::Cell;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use support::gateway::{free_address, workspace};
use support::{Caller, CodexExecutor, DaemonProcess, MIB, PATIENCE, Proxy, Scratch, eventually, noise};

/// The first part ends, and fails, after this.
const LARGE_OUTPUT_MAX: Duration = Duration::from_secs(230);

/// Blocks that the process may be ahead of its reader. The quota is 256 MiB and what is on its way counts, and nobody is
/// slowed down for a reader: on two cores, which executor, gateway and reader share with all else that runs there, the
/// reader now and then falls behind. So the process waits for it, before the oldest bytes have to go.
const BLOCKS_AHEAD: usize = 16;

/// Most memory that the daemon may take beyond what it had before: the tail (1 MiB), a page as records and as JSON
/// (10 MiB), batches on their way to the disk, and what the allocator keeps of all that in each thread that did it.
const GROWTH_BYTES_MAX: f64 = 128.0 * MIB as f64;

const SESSIONS: usize = 50;
const CUTS: usize = 20;
const KILLS: usize = 5;

/// Bytes that each session prints in a second. The executor keeps the newest MiB of each process, which is more than
/// two minutes of this, and the process itself for 80 s without a link. It dials again after at most 30 s: so whatever
/// is missing afterwards is the gateway's fault.
const PIECE: usize = 8 * 1024;

/// Pieces that a session has, should the disturbances not be over before.
const PIECES: usize = 1200;

/// The second part ends, and fails, after this: 25 disturbances with the longest pause after each.
const DISTURBED_MAX: Duration = Duration::from_secs(800);

#[tokio::main]
async fn main() {
    let mebibytes = rig::argument(2048);
    if mebibytes > 0 {
        tokio::time::timeout(LARGE_OUTPUT_MAX, large_output(mebibytes)).await.expect("the output comes in time");
    }
    tokio::time::timeout(DISTURBED_MAX, disturbed()).await.expect("the sessions end in time");
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
        let (caller, credentials) = workspace(&state, &daemon).await;
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

/// Asks until there is an answer: gateways are killed meanwhile.
async fn get(caller: Caller, path: String) -> Bytes {
    let until = Instant::now() + PATIENCE;
    while Instant::now() < until {
        if let Ok(answer) = caller.try_send("GET", &format!("/api/connectors/processes{path}"), &[], "").await {
            assert!(matches!(answer.status.as_u16(), 200 | 503), "{answer:?}");
            if answer.status == 200 {
                return answer.body;
            }
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("no answer: {path}");
}

/// An answer with output. Its text is not copied: the reader has to keep up with the process on the same machine.
#[derive(Deserialize)]
struct Page<'a> {
    #[serde(borrow)]
    chunks: Vec<Chunk<'a>>,
    lost: Option<Lost>,
    next_since: u64,
    session_alive: bool,
    exit: Option<Value>,
}

#[derive(Deserialize)]
struct Chunk<'a> {
    data_b64: &'a str,
    offset: usize,
    gap: Option<Value>,
}

#[derive(Deserialize)]
struct Lost {
    from_seq: u64,
    resume_offsets: Offsets,
}

#[derive(Deserialize)]
struct Offsets {
    stdout: usize,
}

/// What a reader has seen of a process.
struct Read {
    /// Where it began: 0, unless the oldest bytes are gone.
    from: usize,
    /// Length of the stream.
    to: usize,
    /// Digest of what lies between.
    sha256: String,
    /// What the last page says about the end.
    exit: Value,
}

/// Reads from the oldest byte to the end, and tells after each page how far it is. The next page is under way while one
/// is looked at.
async fn read(caller: &Caller, session: &str, mut at: impl FnMut(usize)) -> Read {
    let page = |since: u64| {
        let path = format!("/{session}/output?since={since}&wait_ms=5000&max_bytes={}", 4 * MIB);
        tokio::spawn(get(caller.clone(), path))
    };
    let mut next = page(0);
    let (mut from, mut to, mut hasher, mut bytes) = (0, 0, Sha256::new(), Vec::new());
    loop {
        let body = next.await.unwrap();
        let Page { chunks, lost, next_since, session_alive, exit } = serde_json::from_slice(&body).unwrap();
        next = page(next_since);
        if let Some(Lost { from_seq, resume_offsets }) = lost {
            assert_eq!((from_seq, to), (1, 0), "output of {session} was lost before it was read");
            (from, to) = (resume_offsets.stdout, resume_offsets.stdout);
        }
        for chunk in chunks {
            assert!(chunk.gap.is_none(), "{session} at {to}: {:?}", chunk.gap);
            assert_eq!(chunk.offset, to);
            bytes.clear();
            STANDARD.decode_vec(chunk.data_b64, &mut bytes).unwrap();
            to += bytes.len();
            hasher.update(&bytes);
        }
        at(to);
        if !session_alive {
            next.abort();
            return Read { from, to, sha256: hex(hasher), exit: exit.unwrap() };
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
    let length = count * (8 + block.len());
    let idle = bench.resident_bytes();
    let start = Instant::now();
    let command = format!(
        "i=0; while [ $i -lt {count} ]; do until [ -e go.$i ]; do sleep 0.05; done; printf %08d $i; cat block; \
         i=$((i+1)); done"
    );
    let session = bench.begin(json!(command)).await;
    let (seen, behind, highest) = (Cell::new(0), Cell::new(0), Cell::new(idle));
    let mut allowed = 0;
    let mut allow = |to: usize| {
        seen.set(to);
        while allowed < (to / (8 + block.len()) + BLOCKS_AHEAD).min(count) {
            std::fs::write(bench.executor.home().join(format!("go.{allowed}")), "").unwrap();
            allowed += 1;
        }
    };
    allow(0);
    let reads = async {
        let along = read(&bench.caller, &session, allow).await;
        (start.elapsed().as_secs_f64(), along, read(&bench.caller, &session, |_| {}).await)
    };
    let watch = async {
        let mut ticks = tokio::time::interval(Duration::from_millis(100));
        loop {
            ticks.tick().await;
            highest.set(bench.resident_bytes().max(highest.get()));
            let state: Value = serde_json::from_slice(&get(bench.caller.clone(), format!("/{session}")).await).unwrap();
            if state["state"] == "running" {
                let printed = state["stdout_bytes"].as_u64().unwrap() as usize;
                behind.set(printed.saturating_sub(seen.get()).max(behind.get()));
            }
        }
    };
    let (seconds, along, again) = tokio::select! {
        reads = reads => reads,
        () = watch => unreachable!("it watches until it is dropped"),
    };
    let printed = |from: usize| {
        let (mut hasher, mut at) = (Sha256::new(), 0);
        for number in 0..count {
            for part in [format!("{number:08}").as_bytes(), &block] {
                hasher.update(&part[from.saturating_sub(at).min(part.len())..]);
                at += part.len();
            }
        }
        hex(hasher)
    };
    let whole = printed(0);
    assert_eq!((along.from, along.to, &along.sha256), (0, length, &whole));
    assert_eq!((again.to, &again.sha256), (length, &printed(again.from)));
    for stdout in [&along, &again].map(|read| &read.exit["streams"]["stdout"]) {
        assert_eq!(
            (&stdout["sha256"], &stdout["bytes"], &stdout["exact"]),
            (&json!(whole), &json!(length), &json!(true))
        );
    }
    assert_eq!(again.exit["streams"]["stdout"]["lost_bytes"], again.from);
    // The journal lets go of whole files, of 32 MiB at most.
    assert!(again.to - again.from >= length.min(220 * MIB), "{} bytes kept", again.to - again.from);
    let mib = |bytes: f64| bytes / MIB as f64;
    println!(
        "{} MiB of one process, read along: exact, {:.0} MiB/s, the reader {:.0} MiB behind at most ({} allowed)",
        length / MIB,
        mib(length as f64) / seconds,
        mib(behind.get() as f64),
        BLOCKS_AHEAD * block.len() / MIB
    );
    println!(
        "    afterwards: newest {:.0} MiB exact, {:.0} MiB named as lost; daemon {:.0} MiB idle, {:.0} MiB at most (bound {:.0})",
        mib((again.to - again.from) as f64),
        mib(again.from as f64),
        mib(idle),
        mib(highest.get()),
        mib(idle + GROWTH_BYTES_MAX)
    );
    assert!(highest.get() <= idle + GROWTH_BYTES_MAX);
}

/// How long it took after one disturbance.
struct Pause {
    /// Seconds until the executor was connected again, which is its own choice.
    executor: f64,
    /// Seconds from then until the last session had all that its process had printed when the executor came.
    sessions: f64,
}

async fn disturbed() {
    let mut bench = Bench::start().await;
    let home = bench.executor.home().to_owned();
    // Ends with the number of its pieces, so that a missing end is seen. `at` grows by a byte with each piece.
    let command = format!(
        "i=0; while [ $i -lt {PIECES} ] && [ ! -e stop ]; do dd if=in.$1 bs={PIECE} skip=$i count=1 2>/dev/null; \
         i=$((i+1)); printf . >> at.$1; sleep 1; done; printf %08d $i"
    );
    let mut sessions = Vec::new();
    for number in 0..SESSIONS {
        std::fs::write(home.join(format!("in.{number}")), noise(number as u64, PIECES * PIECE)).unwrap();
        sessions.push(bench.begin(json!(["/bin/sh", "-c", command, "sh", number.to_string()])).await);
    }
    let caller = bench.caller.clone();
    let start = Instant::now();
    let disturb = async {
        let mut pauses = Vec::new();
        for event in 0..CUTS + KILLS {
            let kill = event % (CUTS / KILLS + 1) == CUTS / KILLS;
            let cut = Instant::now();
            if kill {
                bench.kill_and_restart().await;
            } else {
                bench.proxy.cut();
                until_connected(&caller, false).await;
            }
            until_connected(&caller, true).await;
            let back = Instant::now();
            let printed: Vec<usize> = (0..SESSIONS).map(|number| printed(&home, number)).collect();
            until_journalled(&caller, &sessions, &printed).await;
            let pause = Pause { executor: (back - cut).as_secs_f64(), sessions: back.elapsed().as_secs_f64() };
            println!(
                "{:2} {}: executor back after {:4.1} s, all sessions {:.2} s later",
                event + 1,
                if kill { "kill" } else { "cut " },
                pause.executor,
                pause.sessions
            );
            pauses.push(pause);
            // The next one comes when every session is live again, not while it reads the ring.
            let live: Vec<usize> = printed.iter().map(|bytes| bytes + 2 * PIECE).collect();
            until_journalled(&caller, &sessions, &live).await;
        }
        std::fs::write(home.join("stop"), "").unwrap();
        pauses
    };
    let reads = futures_util::future::join_all(sessions.iter().map(|session| read(&caller, session, |_| {})));
    let (reads, pauses) = tokio::join!(reads, disturb);
    let mut bytes = 0;
    for (number, read) in reads.iter().enumerate() {
        let pieces = printed(&home, number);
        let expected = [&noise(number as u64, pieces), format!("{:08}", pieces / PIECE).as_bytes()].concat();
        let sha256 = hex(Sha256::new_with_prefix(&expected));
        assert_eq!((read.from, read.to, &read.sha256), (0, expected.len(), &sha256), "session {number}");
        let stdout = &read.exit["streams"]["stdout"];
        assert_eq!((&stdout["sha256"], &stdout["lost_bytes"]), (&json!(sha256), &json!(0)), "session {number}");
        bytes += read.to;
    }
    let longest = |of: fn(&Pause) -> f64| pauses.iter().map(of).fold(0.0, f64::max);
    println!(
        "{SESSIONS} sessions, {CUTS} cuts, {KILLS} kills in {:.0} s: {bytes} bytes, 0 lost, 0 doubled; executor back after \
         {:.1} s at most, all sessions {:.2} s later at most; daemon {:.0} MiB",
        start.elapsed().as_secs_f64(),
        longest(|pause| pause.executor),
        longest(|pause| pause.sessions),
        bench.resident_bytes() / MIB as f64
    );
}

/// Bytes that a session's process has printed, as it tells itself.
fn printed(home: &Path, number: usize) -> usize {
    std::fs::metadata(home.join(format!("at.{number}"))).map_or(0, |file| file.len() as usize * PIECE)
}

async fn until_connected(caller: &Caller, connected: bool) {
    eventually(if connected { "the executor is back" } else { "the link is gone" }, async || {
        let answer = caller.try_send("POST", "/api/connectors/envs/list", &[], "{}").await.ok()?;
        let there = answer.json()["envs"].as_array()?.iter().any(|env| env["name"] == "box");
        (there == connected).then_some(())
    })
    .await;
}

/// Waits until the gateway has so many bytes of each session.
async fn until_journalled(caller: &Caller, sessions: &[String], bytes: &[usize]) {
    eventually("the output of every session", async || {
        let list: Value = serde_json::from_slice(&get(caller.clone(), String::new()).await).unwrap();
        let list = list["processes"].as_array()?;
        let has = |session: &String, bytes: &usize| {
            let found = list.iter().find(|process| process["session_id"] == session.as_str());
            found.and_then(|process| process["stdout_bytes"].as_u64()).is_some_and(|has| has as usize >= *bytes)
        };
        sessions.iter().zip(bytes).all(|(session, bytes)| has(session, bytes)).then_some(())
    })
    .await;
}
