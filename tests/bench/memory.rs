//! Resident memory of the daemon per idle executor link, against a bare hyper upgrade and a tokio-tungstenite task with
//! a 4 KiB read buffer, each a process of its own. `cargo bench --bench memory -- 10000` counts more links.
#![allow(missing_docs, clippy::unwrap_used)]

#[allow(dead_code, reason = "each bench uses a part")]
mod rig;
#[allow(unused_imports, reason = "each bench uses a part")]
#[path = "../support/mod.rs"]
mod support;

use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::process::Stdio;

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http_body_util::Empty;
use hyper::header::{CONNECTION, HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, UPGRADE};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode, body::Incoming, server::conn::http1};
use hyper_util::rt::TokioIo;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use support::{DaemonProcess, Scratch, eventually};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::Command;
use tokio::task::JoinSet;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};

/// Links made at once: few, so that the peak of making them does not stay behind in the allocator.
const AT_ONCE: usize = 16;

/// Makes this program the baseline.
const BARE: &str = "--bare-server";

#[tokio::main]
async fn main() {
    if std::env::args().any(|argument| argument == BARE) {
        return bare_server().await;
    }
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }).unwrap();
    let links = rig::argument(1000);

    let state = Scratch::new();
    let daemon = DaemonProcess::start(&state, "127.0.0.1:0".parse().unwrap(), &["--log-level", "warn"]).await;
    let address = daemon.address;
    let credentials: Vec<_> = stream::iter(0..links)
        .map(|number| {
            let path = state.path();
            async move { rig::create_executor(path, address, &format!("box-{number}")).await }
        })
        .buffered(AT_ONCE)
        .collect()
        .await;
    let (idle, ours) = bytes_per_link(daemon.pid(), links, |number| {
        let credentials = credentials[number].clone();
        async move { rig::idle_executor(address, &credentials).await }
    })
    .await;
    daemon.kill().await;

    let program = std::env::current_exe().unwrap();
    let mut bare = Command::new(program).arg(BARE).stdout(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(bare.stdout.take().unwrap()).read_line(&mut line).await.unwrap();
    let address: SocketAddr = line.trim().parse().unwrap();
    let url = format!("ws://{address}/");
    let (bare_idle, bares) =
        bytes_per_link(bare.id().unwrap(), links, |_| async { rig::dial(address, &url).await }).await;

    let kib = |bytes: f64| format!("{:.1} KiB", bytes / 1024.0);
    let mib = |bytes: f64| format!("{:.1} MiB", bytes / 1024.0 / 1024.0);
    rig::head(&format!("memory ({links} idle links)"));
    rig::line("resident before, the same", mib(idle), mib(bare_idle), idle / bare_idle, "");
    rig::line("per link, bare upgrade and task", kib(ours), kib(bares), ours / bares, "<= 12 KiB");
}

/// Resident bytes before any link, and what each link adds. The sockets live until this returns.
async fn bytes_per_link<F: Future<Output = WebSocketStream<TcpStream>>>(
    pid: u32,
    links: usize,
    dial: impl Fn(usize) -> F,
) -> (f64, f64) {
    let before = rig::resident_bytes(pid);
    let sockets: Vec<_> = stream::iter(0..links).map(&dial).buffer_unordered(AT_ONCE).collect().await;
    let mut tasks = JoinSet::new();
    for socket in sockets {
        tasks.spawn(rig::answer_pings(socket));
    }
    let after = eventually("the memory settles", settled(pid)).await;
    assert_eq!(tasks.len(), links, "every link lasts");
    (before, (after - before) / links as f64)
}

/// Gives the resident bytes once they were the same ten times in a row.
fn settled(pid: u32) -> impl AsyncFnMut() -> Option<f64> {
    let mut last = (0.0, 0);
    async move || {
        let now = rig::resident_bytes(pid);
        last = if now == last.0 { (now, last.1 + 1) } else { (now, 0) };
        (last.1 >= 10).then_some(now)
    }
}

/// Accepts every WebSocket and reads from it; prints its address first.
async fn bare_server() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    println!("{}", listener.local_addr().unwrap());
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let connection = http1::Builder::new().serve_connection(TokioIo::new(stream), service_fn(upgrade));
        tokio::spawn(connection.with_upgrades());
    }
}

async fn upgrade(mut request: Request<Incoming>) -> Result<Response<Empty<Bytes>>, Infallible> {
    let accept = derive_accept_key(request.headers()[SEC_WEBSOCKET_KEY].as_bytes());
    let upgraded = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let config = WebSocketConfig::default().read_buffer_size(4096);
        let stream = TokioIo::new(upgraded.await.unwrap());
        let mut socket = WebSocketStream::from_raw_socket(stream, Role::Server, Some(config)).await;
        while let Some(Ok(_)) = socket.next().await {}
    });
    let mut response = Response::new(Empty::new());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("upgrade"));
    response.headers_mut().insert(UPGRADE, HeaderValue::from_static("websocket"));
    response.headers_mut().insert(SEC_WEBSOCKET_ACCEPT, HeaderValue::from_str(&accept).unwrap());
    Ok(response)
}
