//! What the neighbours of a caller that stopped reading feel: small requests of fifteen callers on one real executor,
//! while the sixteenth is idle, asks like them and reads no answer, reads a process's output, has stopped reading it, or
//! has fallen behind for good. `cargo bench --bench fair -- 0` lets the process print without pauses instead of a MiB every
//! 20 ms; a second number is how many rounds there are.
//!
//! What executor and machine cost the fifteen is shown twice. A caller that reads has as much printed for it. And without
//! a gateway, where the bench is the end of the executor's link, the output of the sixteenth is thrown away as it comes,
//! which is the least that any gateway could do with it: what is more than that is the gateway's.
#![allow(missing_docs, clippy::unwrap_used)]

#[allow(dead_code, reason = "each bench uses a part")]
mod own_end;
#[allow(dead_code, reason = "each bench uses a part")]
mod rig;
#[allow(unused_imports, reason = "each bench uses a part")]
#[path = "../support/mod.rs"]
mod support;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use own_end::{OwnEnd, Port};
use serde_json::json;
use support::{Caller, CodexExecutor, DaemonProcess, Harness, MIB, Scratch, Tongue};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::{AbortHandle, JoinSet};

/// What the sixteenth harness does beside being idle and reading.
const HARNESS_MODES: [Sixteenth; 3] = [Sixteenth::Deaf, Sixteenth::Stopped, Sixteenth::Overflowing];

const NEIGHBOURS: usize = 15;

/// What a neighbour pauses between an answer and its next request: fifteen that never pause keep two cores busy by
/// themselves, and then whatever else runs shows as a longer wait.
const PAUSE: Duration = Duration::from_millis(8);

/// How long a piece of a round lasts in which the sixteenth is idle.
const IDLE: Duration = Duration::from_millis(1500);

/// MiB that the process prints: less than the 64 MiB that wait for a harness (`link.spill_bytes_max`), where they stand
/// in base64, and more.
const PRINTED: usize = 40;
const TOO_MUCH: usize = 96;

/// What the daemon may take for one reader that has stopped: what waits for it in memory
/// (`link.spill_memory_bytes_max`), and the inbox of its stream while the disk is busy (`link.stream_bytes_max`).
const GROWTH_MEBIBYTES_MAX: f64 = 1.0 + 16.0;

#[tokio::main]
async fn main() {
    let pause = Duration::from_millis(rig::argument(20) as u64);
    let bench = Bench::start(pause, rig::nth_argument(1, 9)).await;
    for door in [Door::None, Door::Harness(Tongue::Json), Door::Harness(Tongue::Encrypted), Door::Rest] {
        bench.compare(door).await;
    }
}

/// By which way all sixteen reach their executor.
#[derive(Clone, Copy)]
enum Door {
    Harness(Tongue),
    Rest,
    /// Without a gateway.
    None,
}

/// What the sixteenth does.
#[derive(Clone, Copy, PartialEq)]
enum Sixteenth {
    Idle,
    /// Asks what the others ask, and reads no answer.
    Deaf,
    Reading,
    Stopped,
    Overflowing,
}

/// One of the fifteen.
enum Neighbour {
    Harness(Box<Harness>),
    Rest(rig::RawCaller),
    None(Box<Harness<Port>>),
}

impl Neighbour {
    async fn ask(&mut self) {
        match self {
            Self::Harness(harness) => drop(harness.call("environment/status", json!({})).await.unwrap()),
            Self::None(harness) => drop(harness.call("environment/status", json!({})).await.unwrap()),
            Self::Rest(raw) => drop(raw.tool("box", "shell", json!({ "command": "echo quick" })).await),
        }
    }
}

/// What one piece of a round showed: seconds that requests took, and the daemon's resident bytes at their highest.
struct Piece {
    p50: f64,
    p99: f64,
    highest: f64,
    requests: usize,
}

struct Bench {
    _state: Scratch,
    daemon: DaemonProcess,
    caller: Caller,
    executor_id: String,
    executor: CodexExecutor,
    /// The executor without a gateway, and our end of its link.
    apart: (CodexExecutor, OwnEnd),
    rounds: usize,
    /// Between one MiB that the process prints and the next.
    pause: Duration,
}

impl Bench {
    async fn start(pause: Duration, rounds: usize) -> Self {
        let state = Scratch::new();
        let daemon = DaemonProcess::start(&state, "127.0.0.1:0".parse().unwrap(), &["--log-level", "error"]).await;
        let credentials = rig::create_executor(state.path(), daemon.address, "box").await;
        let token = DaemonProcess::operate(&state, &["token", "create", "--workspace", "w"]).await;
        let caller = Caller::new(daemon.address, Some(token["token"].as_str().unwrap().to_owned()));
        let url = format!("http://{}", daemon.address);
        let executor = CodexExecutor::connected(&url, &credentials, &caller, "box").await;
        let (other, link) = own_end::encrypted().await;
        for executor in [&executor, &other] {
            std::fs::write(executor.home().join("block"), vec![b'y'; MIB]).unwrap();
        }
        let apart = (other, link.shared());
        Self { _state: state, daemon, caller, executor_id: credentials.executor, executor, apart, rounds, pause }
    }

    /// Where the executor behind that door has its files.
    fn home(&self, door: Door) -> &Path {
        if matches!(door, Door::None) { self.apart.0.home() } else { self.executor.home() }
    }

    async fn compare(&self, door: Door) {
        let (name, modes): (_, &[Sixteenth]) = match door {
            Door::Harness(Tongue::Json) => ("plain harnesses", &HARNESS_MODES),
            Door::Harness(_) => ("encrypted harnesses", &HARNESS_MODES),
            Door::Rest => ("shell and events", &[Sixteenth::Stopped]),
            Door::None => ("no gateway", &[Sixteenth::Stopped]),
        };
        let mut neighbours = Vec::new();
        for _ in 0..NEIGHBOURS {
            neighbours.push(match door {
                Door::Rest => Neighbour::Rest(rig::RawCaller::new(&self.caller).await),
                Door::Harness(tongue) => Neighbour::Harness(Box::new(self.harness(tongue).await)),
                Door::None => Neighbour::None(Box::new(self.harness_apart().await)),
            });
        }
        let modes = [&[Sixteenth::Idle, Sixteenth::Reading], modes].concat();
        let mut pieces: Vec<Vec<Piece>> = modes.iter().map(|_| Vec::new()).collect();
        for round in 0..=self.rounds {
            // In turns, so that none always follows the same other.
            for index in 0..modes.len() {
                let index = (index + round) % modes.len();
                let piece;
                (neighbours, piece) = self.piece(neighbours, door, modes[index]).await;
                // The first round warms everything up.
                if round > 0 {
                    pieces[index].push(piece);
                }
            }
        }
        let [idle, reading, others @ ..] = &pieces[..] else { unreachable!("two are always there") };
        let requests = idle.iter().map(|piece| piece.requests).sum::<usize>() / self.rounds;
        rig::head(&format!("fair ({name}, {requests} requests)"));
        let gateway = !matches!(door, Door::None);
        line("sixteenth reads, idle", reading, idle, "");
        for (mode, stopped) in modes[2..].iter().zip(others) {
            let what = match mode {
                Sixteenth::Deaf => "is deaf",
                Sixteenth::Overflowing => "overflows",
                _ if matches!(door, Door::None) => "thrown away",
                _ => "stopped",
            };
            line(&format!("sixteenth {what}, idle"), stopped, idle, if gateway { "<= 1.2" } else { "" });
            if *mode != Sixteenth::Deaf {
                line(&format!("sixteenth {what}, reads"), stopped, reading, "");
            }
            if !gateway {
                continue;
            }
            let highest = |pieces: &[Piece]| pieces.iter().map(|piece| piece.highest).fold(0.0, f64::max) / MIB as f64;
            let (most, before) = (highest(stopped), highest(idle));
            let reach = format!("<= {GROWTH_MEBIBYTES_MAX} MiB more");
            let mib = |mebibytes: f64| format!("{mebibytes:.1} MiB");
            rig::line("  resident at most", mib(most), mib(before), most / before, &reach);
        }
    }

    async fn harness(&self, tongue: Tongue) -> Harness {
        Harness::initialized(&self.caller, &self.executor_id, tongue).await.0
    }

    async fn harness_apart(&self) -> Harness<Port> {
        let mut harness = self.apart.1.harness().await;
        harness.initialize(None).await.unwrap();
        harness
    }

    /// Small requests for as long as the sixteenth's process prints.
    async fn piece(&self, neighbours: Vec<Neighbour>, door: Door, mode: Sixteenth) -> (Vec<Neighbour>, Piece) {
        let over = Arc::new(AtomicBool::new(false));
        let mut tasks = JoinSet::new();
        for mut neighbour in neighbours {
            let over = over.clone();
            tasks.spawn(async move {
                let mut took = Vec::new();
                while !over.load(Ordering::Relaxed) {
                    tokio::time::sleep(PAUSE).await;
                    took.push(rig::seconds(neighbour.ask()).await);
                }
                (neighbour, took)
            });
        }
        let printed = self.home(door).join("printed");
        let _ = std::fs::remove_file(&printed);
        let sixteenth = match mode {
            Sixteenth::Idle => None,
            _ => Some(self.begin(door, mode).await),
        };
        let (start, mut highest) = (Instant::now(), 0.0);
        let prints = !matches!(mode, Sixteenth::Idle | Sixteenth::Deaf);
        while if prints { !printed.exists() } else { start.elapsed() < IDLE } {
            tokio::time::sleep(Duration::from_millis(10)).await;
            highest = rig::resident_bytes(self.daemon.pid()).max(highest);
        }
        over.store(true, Ordering::Relaxed);
        let (mut neighbours, mut took) = (Vec::new(), Vec::new());
        while let Some(ended) = tasks.join_next().await {
            let (neighbour, its) = ended.unwrap();
            neighbours.push(neighbour);
            took.extend(its);
        }
        drop(sixteenth);
        // What is still under way must not cost the next piece anything.
        tokio::time::sleep(Duration::from_millis(300)).await;
        let (p50, p99) = (rig::percentile(&took, 0.5), rig::percentile(&took, 0.99));
        (neighbours, Piece { p50, p99, highest, requests: took.len() })
    }

    /// The sixteenth, with its process; it leaves when it is dropped.
    async fn begin(&self, door: Door, mode: Sixteenth) -> Leaves {
        let home = self.home(door).display();
        let count = if mode == Sixteenth::Overflowing { TOO_MUCH } else { PRINTED };
        let pause = self.pause.as_secs_f64();
        let command = format!(
            "i=0; while [ $i -lt {count} ]; do cat {home}/block; sleep {pause}; i=$((i+1)); done; touch {home}/printed"
        );
        let reads = mode == Sixteenth::Reading;
        let deaf = mode == Sixteenth::Deaf;
        let task = match door {
            Door::Rest => {
                let mut events = self.events(&command).await;
                tokio::spawn(async move {
                    let mut bytes = vec![0; MIB];
                    while reads && events.read(&mut bytes).await.unwrap() > 0 {}
                    std::future::pending::<()>().await;
                })
            }
            Door::Harness(tongue) => {
                let mut harness = self.harness(tongue).await;
                if !deaf {
                    harness.start("p", &command).await;
                }
                tokio::spawn(async move {
                    if deaf {
                        loop {
                            tokio::time::sleep(PAUSE).await;
                            harness.say(&json!({ "id": 1, "method": "environment/status", "params": {} })).await;
                        }
                    }
                    while reads && harness.word().await.is_ok() {}
                    std::future::pending::<()>().await;
                })
            }
            Door::None => {
                let mut harness = self.harness_apart().await;
                harness.start("p", &command).await;
                tokio::spawn(async move {
                    while reads && harness.word().await.is_ok() {}
                    drop(harness);
                    std::future::pending::<()>().await;
                })
            }
        };
        Leaves(task.abort_handle())
    }

    /// Starts a process session and asks for its events, of which nothing is read yet.
    async fn events(&self, command: &str) -> TcpStream {
        let start = json!({ "command": command, "stdin": "none" });
        let session = self.caller.result("box", "exec_command", start).await;
        let session = session["structuredContent"]["session_id"].as_str().unwrap().to_owned();
        let mut stream = TcpStream::connect(self.caller.address).await.unwrap();
        let request = format!(
            "GET /api/connectors/processes/{session}/output HTTP/1.1\r\nhost: gateway\r\nauthorization: Bearer {}\r\n\
             accept: text/event-stream\r\n\r\n",
            self.caller.token.as_deref().unwrap()
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        stream
    }
}

/// A task that ends with this, and closes its socket.
struct Leaves(AbortHandle);

impl Drop for Leaves {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A line for the median and one for the slowest of the requests.
fn line(what: &str, ours: &[Piece], base: &[Piece], reach: &str) {
    let millis = |seconds: &[f64]| format!("{:.2} ms", rig::median(seconds) * 1e3);
    for (which, reach, of) in [("p50", "", (|piece| piece.p50) as fn(&Piece) -> f64), ("p99", reach, |piece| piece.p99)]
    {
        let values = |pieces: &[Piece]| pieces.iter().map(of).collect::<Vec<_>>();
        let (ours, base) = (values(ours), values(base));
        rig::line(&format!("{what}: {which}"), millis(&ours), millis(&base), rig::ratio(&ours, &base), reach);
    }
}
