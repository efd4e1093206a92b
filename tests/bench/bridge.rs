//! One harness, the same work over five ways: (1) straight to `codex exec-server --listen`, (2) the same behind a plain
//! proxy, (3) as the end of the encryption on a real executor's own link, (4) through the gateway over such a link, and
//! (5) through the gateway over a link without encryption. The proxy is a process
//! that copies bytes between two TCP connections, which does less than nginx or haproxy.
#![allow(missing_docs, clippy::unwrap_used)]

#[allow(dead_code, reason = "each bench uses a part")]
mod rig;
#[allow(unused_imports, reason = "each bench uses a part")]
#[path = "../support/mod.rs"]
mod support;

use std::net::SocketAddr;
use std::process::Stdio;

use exec_gateway::protocol::rest::{ConnectResponse, HarnessKey, SECURITY_PROFILE};
use serde_json::{Value, json};
use support::gateway::workspace;
use support::harness::{HarnessKeys, Tongue};
use support::{CodexExecutor, Credentials, DaemonProcess, Harness, MIB, Scratch};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, Command};
use tokio_tungstenite::WebSocketStream;

/// The argument with which the bench is its own proxy.
const PROXY: &str = "proxy-to";

const ROUNDS: usize = 9;
const REQUESTS: usize = 300;
const PRINTS: usize = 3;

/// What a harness has in common on all ways.
struct Way {
    name: &'static str,
    harness: Harness,
    prints: usize,
    p50: Vec<f64>,
    requests: Vec<f64>,
    rates: Vec<f64>,
}

impl Way {
    async fn new(name: &'static str, mut harness: Harness) -> Self {
        harness.initialize(None).await.unwrap();
        Self { name, harness, prints: 0, p50: Vec::new(), requests: Vec::new(), rates: Vec::new() }
    }

    async fn ask(&mut self) {
        let mut round = Vec::with_capacity(REQUESTS);
        for _ in 0..REQUESTS {
            round.push(
                rig::seconds(async {
                    self.harness.call("environment/status", json!({})).await.unwrap();
                })
                .await,
            );
        }
        self.p50.push(rig::median(&round));
        self.requests.extend(round);
    }

    /// One process that prints so many MiB.
    async fn print(&mut self, mebibytes: usize) {
        self.prints += 1;
        let process = format!("p{}", self.prints);
        let seconds = rig::seconds(async {
            let command = format!("head -c {} /dev/zero | tr '\\0' x", mebibytes * MIB);
            self.harness.start(&process, &command).await;
            // Not parsed: the client should not be what limits any of the ways.
            while !contains(&self.harness.hear_bytes().await.unwrap(), b"process/closed") {}
        });
        let seconds = seconds.await;
        self.rates.push(mebibytes as f64 / seconds);
    }
}

fn contains(json: &[u8], text: &[u8]) -> bool {
    json[..json.len().min(64)].windows(text.len()).any(|window| window == text)
}

fn main() {
    let runtime = |mut builder: tokio::runtime::Builder| builder.enable_all().build().unwrap();
    match std::env::args().skip_while(|argument| argument != PROXY).nth(1) {
        // Like nginx with one worker.
        Some(target) => runtime(tokio::runtime::Builder::new_current_thread()).block_on(serve_proxy(&target)),
        None => runtime(tokio::runtime::Builder::new_multi_thread()).block_on(bench()),
    }
}

async fn bench() {
    let mebibytes = rig::argument(256);
    let (_listener, url) = CodexExecutor::listening().await;
    let address = url.trim_start_matches("ws://").parse().unwrap();
    let straight = Harness::plain(rig::dial(address, &url).await, Tongue::Json);
    let (_proxy, proxy) = proxy(address).await;
    let url = format!("ws://{proxy}/");
    let proxied = Harness::plain(rig::dial(proxy, &url).await, Tongue::Json);

    let registry = Registry::start().await;
    // Codex refuses an answer in which its own credential occurs, be it as part of a name.
    let credentials = Credentials { executor: "exe_bench".into(), token: "a-credential".into() };
    let _executor = CodexExecutor::start(&registry.url(), &credentials).await;
    let own_end = registry.harness().await;

    let state = Scratch::new();
    let gateway = DaemonProcess::start(&state, "127.0.0.1:0".parse().unwrap(), &["--log-level", "error"]).await;
    let (caller, credentials) = workspace(&state, &gateway).await;
    let url = format!("http://{}", gateway.address);
    let _connected = CodexExecutor::connected(&url, &credentials, &caller, "box").await;
    let plain = rig::create_executor(state.path(), gateway.address, "plain").await;
    let _direct = CodexExecutor::start_direct(&url, &plain, |_| {});
    _direct.seen_by(&caller, "plain").await;
    let bridged = Harness::open(&caller, &credentials.executor, Tongue::Json).await;
    let kept = Harness::open(&caller, &credentials.executor, Tongue::Encrypted).await;

    let mut ways = vec![
        Way::new("(1) straight, plain", straight).await,
        Way::new("(2) plain proxy", proxied).await,
        Way::new("(3) straight, encrypted", own_end).await,
        Way::new("(4) gateway, encrypted link", bridged).await,
        Way::new("(5) gateway, plain link", Harness::open(&caller, &plain.executor, Tongue::Json).await).await,
        Way::new("(4b) as (4), encrypted up to the harness", kept).await,
    ];
    for round in 0..=ROUNDS {
        for way in &mut ways {
            way.ask().await;
            if round == 0 {
                // Warms everything up.
                way.p50.clear();
                way.requests.clear();
            }
        }
    }
    for _ in 0..PRINTS {
        for way in &mut ways {
            way.print(mebibytes).await;
        }
    }
    println!("{:<48} {:>8} {:>8} {:>10}", "bridge", "p50 us", "p99 us", "MiB/s");
    for way in &ways {
        let (p50, p99) = (rig::median(&way.requests) * 1e6, rig::percentile(&way.requests, 0.99) * 1e6);
        println!("{:<48} {p50:>8.0} {p99:>8.0} {:>10.0}", way.name, rig::median(&way.rates));
    }
    let added = |of: &Way, to: &Way| {
        let rounds: Vec<f64> = of.p50.iter().zip(&to.p50).map(|(of, to)| (of - to) * 1e6).collect();
        rig::median(&rounds)
    };
    let rate = |of: &Way, to: &Way| rig::ratio(&of.rates, &to.rates);
    println!(
        "the proxy adds {:.0} us to (1), throughput {:.2} of (1)",
        added(&ways[1], &ways[0]),
        rate(&ways[1], &ways[0])
    );
    println!(
        "the gateway adds {:.0} us to (3), throughput {:.2} of (3); encryption kept: {:.0} us, {:.2}",
        added(&ways[3], &ways[2]),
        rate(&ways[3], &ways[2]),
        added(&ways[5], &ways[2]),
        rate(&ways[5], &ways[2])
    );
    println!(
        "over a plain link p50 is {:.2} of (1), throughput {:.2} of (1)",
        rig::ratio(&ways[4].p50, &ways[0].p50),
        rate(&ways[4], &ways[0])
    );
}

/// A process of its own that copies bytes to an address and back.
async fn proxy(target: SocketAddr) -> (Child, SocketAddr) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([PROXY, &target.to_string()]).stdout(Stdio::piped()).kill_on_drop(true);
    let mut child = command.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).await.unwrap();
    (child, line.trim().parse().unwrap())
}

async fn serve_proxy(target: &str) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    println!("{}", listener.local_addr().unwrap());
    let (mut client, _) = listener.accept().await.unwrap();
    let mut server = TcpStream::connect(target).await.unwrap();
    client.set_nodelay(true).unwrap();
    server.set_nodelay(true).unwrap();
    let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
}

/// As much of a gateway as an executor needs to register and dial.
struct Registry {
    listener: TcpListener,
}

impl Registry {
    async fn start() -> Self {
        Self { listener: TcpListener::bind("127.0.0.1:0").await.unwrap() }
    }

    fn url(&self) -> String {
        format!("http://{}", self.listener.local_addr().unwrap())
    }

    /// Waits for the executor's socket, and shakes hands over it.
    async fn harness(self) -> Harness {
        let mut key = None;
        let socket = loop {
            let (stream, _) = self.listener.accept().await.unwrap();
            stream.set_nodelay(true).unwrap();
            let mut start = [0; 4];
            stream.peek(&mut start).await.unwrap();
            if &start == b"GET " {
                break tokio_tungstenite::accept_async(stream).await.unwrap();
            }
            let request = answer(stream, |_| {
                let url = format!("ws://{}/socket", self.listener.local_addr().unwrap());
                json!({ "environment_id": "exe_bench", "url": url, "security_profile": SECURITY_PROFILE,
                    "executor_registration_id": "exr_bench" })
            })
            .await;
            key = Some(serde_json::from_value::<HarnessKey>(request["executor_public_key"].clone()).unwrap());
        };
        let way = ConnectResponse {
            environment_id: "exe_bench".into(),
            url: String::new(),
            security_profile: SECURITY_PROFILE.into(),
            executor_registration_id: "exr_bench".into(),
            executor_public_key: key.expect("it has registered"),
            harness_key_authorization: "bench".into(),
        };
        // It asks whether to trust us while we wait for its answer.
        tokio::spawn(async move {
            while let Ok((stream, _)) = self.listener.accept().await {
                answer(stream, |_| json!({ "valid": true })).await;
            }
        });
        let socket: WebSocketStream<TcpStream> = socket;
        Harness::shake_hands(socket, &HarnessKeys::new(), &way).await.unwrap()
    }
}

/// Answers one request with JSON; gives the request's body.
async fn answer(stream: TcpStream, reply: impl Fn(&Value) -> Value) -> Value {
    let mut stream = BufReader::new(stream);
    let (mut line, mut length) = (String::new(), 0);
    loop {
        line.clear();
        stream.read_line(&mut line).await.unwrap();
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length: ") {
            length = value.trim().parse().unwrap();
        }
        if line == "\r\n" {
            break;
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.unwrap();
    let body: Value = serde_json::from_slice(&body).unwrap();
    let reply = reply(&body).to_string();
    let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", reply.len());
    stream.get_mut().write_all(format!("{head}{reply}").as_bytes()).await.unwrap();
    body
}
