//! `envs/list` of the gateway against a bare hyper server that answers the same bytes: requests per second over
//! connections kept alive, callers and server on one runtime.
#![allow(missing_docs, clippy::unwrap_used)]

#[allow(dead_code, reason = "each bench uses a part")]
mod rig;
#[allow(unused_imports, reason = "each bench uses a part")]
#[path = "../support/mod.rs"]
mod support;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::time::Instant;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::CONTENT_TYPE;
use hyper::service::service_fn;
use hyper::{Response, server::conn::http1};
use hyper_util::rt::TokioIo;
use serde_json::json;
use support::{TestGateway, eventually};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const ROUNDS: usize = 15;
const CALLERS: usize = 16;

#[tokio::main]
async fn main() {
    let gateway = TestGateway::with(|config| config.workspace.calls_per_second_max = 0).await;
    let caller = gateway.caller("w").await;
    let credentials = gateway.executor("w", "box").await;
    let socket = rig::idle_executor(gateway.address(), &credentials).await;
    tokio::spawn(rig::answer_pings(socket));
    eventually("the executor connects", async || (!caller.environments().await.is_empty()).then_some(())).await;

    let answer = caller.post("/api/connectors/envs/list", json!({})).await;
    let bare = bare_server(answer.body.clone(), answer.header("x-request-id").unwrap().to_owned()).await;
    let token = caller.token.as_deref().unwrap();
    let request = format!(
        "POST /api/connectors/envs/list HTTP/1.1\r\nhost: gateway\r\nauthorization: Bearer {token}\r\n\
         content-type: application/json\r\ncontent-length: 2\r\n\r\n{{}}"
    );
    let mut to_gateway = callers(gateway.address(), &request, &answer.body).await;
    let mut to_bare = callers(bare, &request, &answer.body).await;
    assert_eq!(to_gateway[0].answer_bytes, to_bare[0].answer_bytes, "both answer the same bytes");

    let (mut ours, mut bares) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        ours.push(requests_per_second(&mut to_gateway).await);
        bares.push(requests_per_second(&mut to_bare).await);
    }
    let rate = |rates: &[f64]| format!("{:.0}/s", rig::median(rates));
    rig::head(&format!("envs ({} bytes, {CALLERS} connections)", answer.body.len()));
    rig::line("envs/list, bare hyper", rate(&ours), rate(&bares), rig::ratio(&ours, &bares), ">= 0.80");
}

/// Answers every request with these bytes.
async fn bare_server(body: Bytes, request_id: String) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            stream.set_nodelay(true).unwrap();
            let (body, request_id) = (body.clone(), request_id.clone());
            let service = service_fn(move |_| {
                let response = Response::builder()
                    .header(CONTENT_TYPE, "application/json")
                    .header("x-request-id", request_id.as_str())
                    .body(Full::new(body.clone()))
                    .unwrap();
                async move { Ok::<_, Infallible>(response) }
            });
            tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
        }
    });
    address
}

/// One connection that asks the same again and again. It knows the size of the answer, so that the caller's share of
/// the processor stays small.
struct Connection {
    stream: TcpStream,
    request: Bytes,
    answer_bytes: usize,
    buffer: Vec<u8>,
}

async fn callers(address: SocketAddr, request: &str, body: &[u8]) -> Vec<Connection> {
    let mut connections = Vec::new();
    for _ in 0..CALLERS {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(body) {
            assert_ne!(stream.read_buf(&mut answer).await.unwrap(), 0, "{}", String::from_utf8_lossy(&answer));
        }
        let request = Bytes::copy_from_slice(request.as_bytes());
        let answer_bytes = answer.len();
        connections.push(Connection { stream, request, answer_bytes, buffer: vec![0; answer_bytes] });
    }
    connections
}

async fn requests_per_second(connections: &mut Vec<Connection>) -> f64 {
    let start = Instant::now();
    let tasks: Vec<_> = connections
        .drain(..)
        .map(|mut connection| {
            tokio::spawn(async move {
                let mut requests = 0;
                while start.elapsed() < rig::SLICE {
                    connection.stream.write_all(&connection.request).await.unwrap();
                    connection.stream.read_exact(&mut connection.buffer).await.unwrap();
                    assert!(connection.buffer.starts_with(b"HTTP/1.1 200"));
                    requests += 1;
                }
                (requests, connection)
            })
        })
        .collect();
    let mut requests = 0;
    for task in tasks {
        let (done, connection) = task.await.unwrap();
        requests += done;
        connections.push(connection);
    }
    f64::from(requests) / start.elapsed().as_secs_f64()
}
