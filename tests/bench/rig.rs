//! What the benches share: medians, percentiles, the table, and stand-in executors. Every figure is a ratio against a
//! baseline of the same run, since the machine is shared; nothing here decides whether a figure is good enough.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use exec_gateway::admin::{AdminSettings, Request, Response, execute};
use exec_gateway::protocol::ids::{EnvironmentName, WorkspaceId};
use exec_gateway::protocol::rest::{HarnessKey, KEY_SUITE, RegisterRequest, RegisterResponse, SECURITY_PROFILE};
use futures_util::StreamExt;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;

use crate::support::{Caller, Credentials};

/// The middle value.
pub fn median(values: &[f64]) -> f64 {
    percentile(values, 0.5)
}

/// The value that this share of all values does not exceed.
pub fn percentile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[((sorted.len() - 1) as f64 * share).round() as usize]
}

/// The median of the ratios of the rounds: what slows a whole round down cancels out.
pub fn ratio(of: &[f64], to: &[f64]) -> f64 {
    median(&of.iter().zip(to).map(|(of, to)| of / to).collect::<Vec<_>>())
}

/// Seconds that the work takes.
pub async fn seconds(work: impl Future<Output = ()>) -> f64 {
    let start = Instant::now();
    work.await;
    start.elapsed().as_secs_f64()
}

/// Prints the head of a table.
pub fn head(bench: &str) {
    println!("{:<44} {:>12} {:>12} {:>8}   reach", bench, "gateway", "baseline", "ratio");
}

/// Prints a line of a table. `reach` is the bound of the ratio in words, empty where none is set.
pub fn line(what: &str, gateway: String, baseline: String, ratio: f64, reach: &str) {
    println!("{what:<44} {gateway:>12} {baseline:>12} {ratio:>8.2}   {reach}");
}

/// The number after the bench's name on the command line; cargo adds flags of its own.
pub fn argument(default: usize) -> usize {
    nth_argument(0, default)
}

/// The number behind so many others there.
pub fn nth_argument(nth: usize, default: usize) -> usize {
    std::env::args().skip(1).filter_map(|argument| argument.parse().ok()).nth(nth).unwrap_or(default)
}

/// Makes an executor through the admin socket of a running daemon.
pub async fn create_executor(state: &Path, listen: SocketAddr, name: &str) -> Credentials {
    let settings = AdminSettings { public_url: None, listen, revocations_max: 1, audit: Default::default() };
    let (workspace, name) = (WorkspaceId::new("w").unwrap(), EnvironmentName::new(name).unwrap());
    match execute(state, settings, Request::ExecutorCreate { workspace, name, default: false }).await.unwrap() {
        Response::ExecutorCreated { exe_id, token, .. } => {
            Credentials { executor: exe_id.to_string(), token: token.expose().to_owned() }
        }
        other => panic!("no executor: {other:?}"),
    }
}

/// A stand-in executor: registers, dials, answers pings and does nothing else until it is dropped.
pub async fn idle_executor(address: SocketAddr, credentials: &Credentials) -> WebSocketStream<TcpStream> {
    let key = HarnessKey {
        suite: KEY_SUITE.into(),
        x25519_public_key: STANDARD.encode([7; 32]),
        mlkem768_public_key: STANDARD.encode([7; 1184]),
    };
    let register = RegisterRequest {
        security_profile: Some(SECURITY_PROFILE.into()),
        executor_public_key: Some(key),
        transport: None,
    };
    let caller = Caller::new(address, Some(credentials.token.clone()));
    let path = format!("/cloud/environment/{}/register", credentials.executor);
    let answer = caller.post(&path, serde_json::to_value(register).unwrap()).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    let registered: RegisterResponse = serde_json::from_slice(&answer.body).unwrap();
    dial(address, &registered.url).await
}

/// One connection kept alive, with as little of a client around it as there can be.
pub struct RawCaller {
    stream: BufReader<TcpStream>,
    token: String,
}

impl RawCaller {
    pub async fn new(caller: &Caller) -> Self {
        let stream = TcpStream::connect(caller.address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        let stream = BufReader::with_capacity(64 * 1024, stream);
        Self { stream, token: caller.token.clone().unwrap() }
    }

    /// One tool call that is answered with 200; gives the bytes of the answer.
    pub async fn tool(&mut self, environment: &str, tool: &str, arguments: Value) -> Vec<u8> {
        let body = json!({ "tool": tool, "arguments": arguments }).to_string();
        let request = format!(
            "POST /api/connectors/envs/{environment}/tool/call HTTP/1.1\r\nhost: gateway\r\nauthorization: Bearer {}\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            self.token,
            body.len()
        );
        self.stream.get_mut().write_all(request.as_bytes()).await.unwrap();
        let (mut line, mut length) = (String::new(), None);
        while line != "\r\n" {
            line.clear();
            assert_ne!(self.stream.read_line(&mut line).await.unwrap(), 0, "the gateway closed the connection");
            assert!(!line.starts_with("HTTP/1.1") || line.starts_with("HTTP/1.1 200"), "{line}");
            if let Some(value) = line.strip_prefix("content-length: ") {
                length = Some(value.trim().parse().unwrap());
            }
        }
        let mut answer = vec![0; length.expect("the answer tells its length")];
        self.stream.read_exact(&mut answer).await.unwrap();
        answer
    }
}

/// Opens a WebSocket with small buffers.
pub async fn dial(address: SocketAddr, url: &str) -> WebSocketStream<TcpStream> {
    let config = WebSocketConfig::default().read_buffer_size(4096);
    let stream = TcpStream::connect(address).await.unwrap();
    stream.set_nodelay(true).unwrap();
    tokio_tungstenite::client_async_with_config(url, stream, Some(config)).await.unwrap().0
}

/// Reads, and so answers pings, until the other end closes or the task is aborted.
pub async fn answer_pings(mut socket: WebSocketStream<TcpStream>) {
    while let Some(Ok(_)) = socket.next().await {}
}

/// Resident bytes of a process.
pub fn resident_bytes(pid: u32) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<f64>().unwrap() * 1024.0
}

/// Time that a measured piece of a round takes.
pub const SLICE: Duration = Duration::from_millis(500);
