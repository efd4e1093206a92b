//! Executors of other makes, with the real one behind them: an adapter registers and dials as they do, and hands their
//! messages to a `codex exec-server` that listens.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use exec_gateway::protocol::endpoint::{Endpoint, EndpointLimits};
use exec_gateway::protocol::frame::{Body, Data, Frame, StreamId};
use futures_util::{SinkExt, StreamExt};
use serde_json::json;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::{WebSocketStream, client_async_with_config};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::codex::CodexExecutor;
use super::gateway::Credentials;
use super::{Answer, Caller};

type Socket = WebSocketStream<TcpStream>;

/// Payload of one plain relay frame: small, so that messages of some size take several.
const PAYLOAD_BYTES: usize = 60_000;

/// What the adapter looks like to the gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Make {
    /// agentx: one JSON message per WebSocket message, here binary ones; a connection of its own for each socket.
    Agentx,
    /// codex before the encrypted transport: relay frames in the clear, a connection of its own for each stream.
    Relay,
}

/// An executor of another make. Dropping it ends it.
pub struct Adapter {
    pub executor: CodexExecutor,
    _task: AbortOnDropHandle<()>,
}

impl Adapter {
    /// Registers at the gateway and dials until it is dropped, each time the same URL.
    pub async fn start(gateway: SocketAddr, credentials: &Credentials, make: Make) -> Self {
        let (executor, listener) = CodexExecutor::listening().await;
        let url = register(gateway, credentials, make).await;
        let task = tokio::spawn(async move {
            loop {
                if let Some(socket) = dial(gateway, &url).await {
                    match make {
                        Make::Agentx => bridge(socket, &listener).await,
                        Make::Relay => relay(socket, &listener).await,
                    }
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        });
        Self { executor, _task: AbortOnDropHandle::new(task) }
    }
}

async fn register(gateway: SocketAddr, credentials: &Credentials, make: Make) -> String {
    let http = Caller::new(gateway, Some(credentials.token.clone()));
    let id = &credentials.executor;
    let answer: Answer = match make {
        Make::Agentx => http.post(&format!("/agentx/environment/{id}/register"), json!({ "id": id })).await,
        Make::Relay => http.send("POST", &format!("/cloud/executor/{id}/register"), &[], "").await,
    };
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()["url"].as_str().unwrap().to_owned()
}

async fn dial(address: SocketAddr, url: &str) -> Option<Socket> {
    let stream = TcpStream::connect(address).await.ok()?;
    stream.set_nodelay(true).ok()?;
    let config = WebSocketConfig::default().max_frame_size(None).max_message_size(None);
    client_async_with_config(url, stream, Some(config)).await.ok().map(|(socket, _)| socket)
}

async fn dial_listener(url: &str) -> Socket {
    let address = url.strip_prefix("ws://").unwrap().trim_end_matches('/').parse().unwrap();
    // It tells its URL a moment before it listens.
    for _ in 0..100 {
        if let Some(socket) = dial(address, url).await {
            return socket;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("the executor does not listen")
}

async fn bridge(mut gateway: Socket, listener: &str) {
    let mut executor = dial_listener(listener).await;
    loop {
        let sent = tokio::select! {
            message = gateway.next() => match message {
                Some(Ok(message @ (Message::Text(_) | Message::Binary(_)))) => executor.send(message).await,
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => continue,
                _ => return,
            },
            message = executor.next() => match message {
                Some(Ok(Message::Text(text))) => gateway.send(Message::Binary(text.into())).await,
                Some(Ok(_)) => continue,
                _ => return,
            },
        };
        if sent.is_err() {
            return;
        }
    }
}

async fn relay(gateway: Socket, listener: &str) {
    let (mut sink, mut frames) = gateway.split();
    let (outbox, mut outgoing) = mpsc::channel::<Bytes>(64);
    let mut streams: HashMap<StreamId, mpsc::Sender<Data>> = HashMap::new();
    let ended = CancellationToken::new();
    let _end = ended.clone().drop_guard();
    loop {
        tokio::select! {
            frame = outgoing.recv() => {
                let Some(frame) = frame else { return };
                if sink.send(Message::Binary(frame)).await.is_err() {
                    return;
                }
            }
            message = frames.next() => {
                let frame = match message {
                    Some(Ok(Message::Binary(frame))) => Frame::decode(frame).unwrap(),
                    Some(Ok(_)) => continue,
                    _ => return,
                };
                match frame.body {
                    Body::Resume { .. } => {
                        let (inbox, data) = mpsc::channel(64);
                        let stream = frame.stream_id.detached();
                        let work = converse(stream.clone(), data, outbox.clone(), listener.to_owned());
                        let ended = ended.clone();
                        tokio::spawn(async move { ended.run_until_cancelled(work).await });
                        streams.insert(stream, inbox);
                    }
                    Body::Data(data) => {
                        if let Some(inbox) = streams.get(&frame.stream_id) {
                            let _ = inbox.send(data).await;
                        }
                    }
                    Body::Reset { .. } => drop(streams.remove(&frame.stream_id)),
                    Body::Ack | Body::Heartbeat | Body::Handshake { .. } => {}
                }
            }
        }
    }
}

/// One stream: a connection of its own.
async fn converse(id: StreamId, mut data: mpsc::Receiver<Data>, outbox: mpsc::Sender<Bytes>, listener: String) {
    let mut executor = dial_listener(&listener).await;
    let mut receiving = Endpoint::new(EndpointLimits::default());
    let mut sending = Endpoint::new(EndpointLimits::default());
    loop {
        tokio::select! {
            data = data.recv() => {
                let Some(data) = data else { return };
                receiving.receive(data).unwrap();
                while let Some(json) = receiving.next() {
                    let text = String::from_utf8(json.to_vec()).unwrap();
                    if executor.send(Message::text(text)).await.is_err() {
                        return;
                    }
                }
            }
            message = executor.next() => {
                let Some(Ok(message)) = message else { return };
                let Message::Text(text) = message else { continue };
                let json = Bytes::from(text);
                let segment_count = json.len().div_ceil(PAYLOAD_BYTES) as u32;
                for segment_index in 0..segment_count {
                    let start = segment_index as usize * PAYLOAD_BYTES;
                    let payload = json.slice(start..json.len().min(start + PAYLOAD_BYTES));
                    let body = Body::Data(Data { seq: sending.next_seq().unwrap(), segment_index, segment_count, payload });
                    if outbox.send(Frame { stream_id: id.clone(), body }.encode()).await.is_err() {
                        return;
                    }
                }
            }
        }
    }
}
