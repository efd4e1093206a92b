//! A tiny file and much output of the real executor: REST through the gateway and over codex's encrypted link, against
//! the same methods straight to `codex exec-server --listen`, which neither encrypts nor asks for a token.
#![allow(missing_docs, clippy::unwrap_used)]

#[allow(dead_code, reason = "each bench uses a part")]
mod rig;
#[allow(unused_imports, reason = "each bench uses a part")]
#[path = "../support/mod.rs"]
mod support;

use exec_gateway::protocol::path::FileUri;
use exec_gateway::protocol::rpc::{
    EnvInherit, EnvPolicy, FsClose, FsGetMetadata, FsOpen, FsReadBlock, INITIALIZED, Incoming, Initialize, Method,
    OpenMode, ProcessClosed, ProcessOutput, ProcessStart, encode_notification, encode_request,
};
use futures_util::{SinkExt, StreamExt};
use serde_json::json;
use support::{CodexExecutor, MIB, TestGateway};
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;

const ROUNDS: usize = 9;
const READS: usize = 200;
const PRINTS: usize = 5;
const PRINTED: usize = 30 * MIB;

#[tokio::main]
async fn main() {
    let gateway = TestGateway::with(|config| config.workspace.calls_per_second_max = 0).await;
    let caller = gateway.caller("w").await;
    let credentials = gateway.executor("w", "box").await;
    let executor = CodexExecutor::connected(&gateway.url(), &credentials, &caller, "box").await;
    let mut raw = rig::RawCaller::new(&caller).await;
    let mut straight = Straight::start().await;

    let file = executor.home().join("small");
    std::fs::write(&file, "a tiny file").unwrap();
    let path = file.to_str().unwrap();
    let (mut ours, mut straights, mut rounds) = (Vec::new(), Vec::new(), (Vec::new(), Vec::new()));
    for round in 0..=ROUNDS {
        let (mut our_reads, mut straight_reads) = (Vec::new(), Vec::new());
        for _ in 0..READS {
            our_reads.push(
                rig::seconds(async {
                    raw.tool("box", "read_file", json!({ "path": path })).await;
                })
                .await,
            );
        }
        for number in 0..READS {
            straight_reads.push(rig::seconds(straight.read(path, number)).await);
        }
        // The first round opens the stream and warms everything up.
        if round > 0 {
            rounds.0.push(rig::median(&our_reads));
            rounds.1.push(rig::median(&straight_reads));
            ours.extend(our_reads);
            straights.extend(straight_reads);
        }
    }
    let microseconds = |seconds: f64| format!("{:.0} us", seconds * 1e6);
    rig::head("exec");
    let (our_p50, p50) = (rig::median(&ours), rig::median(&straights));
    rig::line("read_file p50", microseconds(our_p50), microseconds(p50), rig::ratio(&rounds.0, &rounds.1), "");
    let (our_p99, p99) = (rig::percentile(&ours, 0.99), rig::percentile(&straights, 0.99));
    rig::line("read_file p99", microseconds(our_p99), microseconds(p99), our_p99 / p99, "");

    let (mut ours, mut straights) = (Vec::new(), Vec::new());
    for _ in 0..PRINTS {
        ours.push(
            rig::seconds(async {
                let answer = raw.tool("box", "shell", json!({ "command": print() })).await;
                // Once as text for models, once in the structure.
                assert!(answer.len() > 2 * PRINTED);
            })
            .await,
        );
        straights.push(rig::seconds(straight.print()).await);
    }
    let rate = |seconds: &[f64]| format!("{:.0} MiB/s", (PRINTED / MIB) as f64 / rig::median(seconds));
    let times = rig::ratio(&straights, &ours);
    rig::line("stdout of one shell, 30 MiB", rate(&ours), rate(&straights), times, "");
}

/// A command that prints [`PRINTED`] bytes of text.
fn print() -> [String; 3] {
    ["/bin/sh".into(), "-c".into(), format!("head -c {PRINTED} /dev/zero | tr '\\0' x")]
}

/// A plain listener and the one client it has.
struct Straight {
    _listener: CodexExecutor,
    socket: WebSocketStream<TcpStream>,
    next: i64,
}

impl Straight {
    async fn start() -> Self {
        let (listener, url) = CodexExecutor::listening().await;
        let socket = rig::dial(url.trim_start_matches("ws://").parse().unwrap(), &url).await;
        let mut straight = Self { _listener: listener, socket, next: 0 };
        straight.call(&Initialize { client_name: "bench".into(), resume_session_id: None }).await;
        straight.send(encode_notification(INITIALIZED, &json!({}))).await;
        straight
    }

    async fn send(&mut self, message: Vec<u8>) {
        self.socket.send(Message::text(String::from_utf8(message).unwrap())).await.unwrap();
    }

    async fn next(&mut self) -> Message {
        self.socket.next().await.unwrap().unwrap()
    }

    async fn call<M: Method>(&mut self, params: &M) -> M::Result {
        self.next += 1;
        self.send(encode_request(self.next, M::NAME, params, None)).await;
        loop {
            let message = self.next().await.into_data();
            match Incoming::parse(&message).unwrap() {
                Incoming::Response { result, .. } => return serde_json::from_str(result.get()).unwrap(),
                Incoming::Error { error, .. } => panic!("{error}"),
                _ => {}
            }
        }
    }

    /// The methods that `read_file` calls.
    async fn read(&mut self, path: &str, number: usize) {
        let path = FileUri::parse(&format!("file://{path}")).unwrap();
        let handle_id = format!("h{number}");
        let size = self.call(&FsGetMetadata { path: path.clone() }).await.size;
        self.call(&FsOpen { handle_id: handle_id.clone(), path, mode: OpenMode::Read }).await;
        let block = self.call(&FsReadBlock { handle_id: handle_id.clone(), offset: 0, len: size }).await;
        assert_eq!(block.chunk.0.len() as u64, size);
        self.call(&FsClose { handle_id }).await;
    }

    /// Starts [`print()`] and takes all of it.
    async fn print(&mut self) {
        self.next += 1;
        let start = ProcessStart {
            process_id: format!("p{}", self.next),
            argv: print().into(),
            cwd: FileUri::parse("file:///").unwrap(),
            env: Default::default(),
            tty: false,
            pipe_stdin: false,
            arg0: None,
            env_policy: Some(EnvPolicy {
                inherit: EnvInherit::All,
                ignore_default_excludes: false,
                exclude: Vec::new(),
                set: Default::default(),
                include_only: Vec::new(),
            }),
            sandbox: None,
        };
        self.send(encode_request(self.next, ProcessStart::NAME, &start, None)).await;
        let mut printed = Vec::new();
        loop {
            let message = self.next().await.into_data();
            match Incoming::parse(&message).unwrap() {
                Incoming::Notification { method, params } if method == ProcessOutput::NAME => {
                    let output: ProcessOutput = serde_json::from_str(params.unwrap().get()).unwrap();
                    printed.extend_from_slice(&output.chunk.0);
                }
                Incoming::Notification { method, .. } if method == ProcessClosed::NAME => break,
                Incoming::Error { error, .. } => panic!("{error}"),
                _ => {}
            }
        }
        assert_eq!(printed.len(), PRINTED);
    }
}
