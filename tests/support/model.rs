//! A stand-in for the model service that a stock harness asks what to do: it orders commands one after the other, and
//! keeps what the harness tells about each.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::CONTENT_TYPE;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

/// How long the harness waits for a command before it tells what there is so far: the longest that it accepts.
const YIELD_MS: u64 = 30_000;

/// A model of this test alone.
pub struct Model {
    pub address: SocketAddr,
    told: Arc<Mutex<Vec<String>>>,
    _server: JoinSet<()>,
}

impl Model {
    /// One that orders these commands in every turn.
    pub async fn ordering(commands: &[&str]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let told = Arc::<Mutex<Vec<_>>>::default();
        let commands: Arc<[String]> = commands.iter().map(|command| command.to_string()).collect();
        let mut server = JoinSet::new();
        server.spawn({
            let told = told.clone();
            async move {
                let mut connections = JoinSet::new();
                while let Ok((socket, _)) = listener.accept().await {
                    let (commands, told) = (commands.clone(), told.clone());
                    connections.spawn(async move {
                        let service = service_fn(move |request| answer(request, commands.clone(), told.clone()));
                        let connection = hyper::server::conn::http1::Builder::new();
                        let _ = connection.serve_connection(TokioIo::new(socket), service).await;
                    });
                }
            }
        });
        Self { address, told, _server: server }
    }

    /// What the harness told about the commands of its last turn, in their order.
    pub fn told(&self) -> Vec<String> {
        self.told.lock().unwrap().clone()
    }
}

/// One answer of the service, as a stream of events (codex-exec-server.md §8.4): the next command, or that all is done.
async fn answer(
    request: Request<Incoming>,
    commands: Arc<[String]>,
    told: Arc<Mutex<Vec<String>>>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let request: Value = serde_json::from_slice(&request.into_body().collect().await.unwrap().to_bytes()).unwrap();
    let outputs = request["input"].as_array().unwrap().iter().filter(|item| item["type"] == "function_call_output");
    let outputs: Vec<_> = outputs.map(|item| item["output"].as_str().unwrap().to_owned()).collect();
    let item = match commands.get(outputs.len()) {
        Some(command) => {
            let arguments = json!({ "cmd": command, "yield_time_ms": YIELD_MS }).to_string();
            let call = format!("call-{}", outputs.len());
            json!({ "type": "function_call", "id": call, "call_id": call, "name": "exec_command", "arguments": arguments })
        }
        None => {
            let text = json!({ "type": "output_text", "text": "done" });
            json!({ "type": "message", "id": "message", "role": "assistant", "content": [text] })
        }
    };
    *told.lock().unwrap() = outputs;
    let usage = json!({ "input_tokens": 1, "output_tokens": 1, "total_tokens": 2 });
    let events = [
        json!({ "type": "response.created", "response": { "id": "response" } }),
        json!({ "type": "response.output_item.done", "output_index": 0, "item": item }),
        json!({ "type": "response.completed", "response": { "id": "response", "usage": usage } }),
    ];
    let stream: String =
        events.iter().map(|event| format!("event: {}\ndata: {event}\n\n", event["type"].as_str().unwrap())).collect();
    let mut response = Response::new(Full::new(stream.into()));
    response.headers_mut().insert(CONTENT_TYPE, "text/event-stream".parse().unwrap());
    Ok(response)
}
