//! A bench as the end of a real executor's link, in place of a gateway: what an executor costs by itself on the
//! transport that it dials. Owned by one bench; it knows one executor and no right of anybody.

use std::collections::HashMap;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use exec_gateway::protocol::frame::{Frame, StreamId};
use exec_gateway::protocol::rest::{ConnectResponse, DIRECT_TRANSPORT, SECURITY_PROFILE};
use futures_util::{Sink, SinkExt, Stream, StreamExt};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::{Error as SocketError, Message};

use crate::support::harness::HarnessKeys;
use crate::support::{CodexExecutor, Credentials, Harness, Tongue};

type Socket = WebSocketStream<TcpStream>;

/// Codex refuses an answer in which its own credential occurs, be it as part of a name.
fn credentials() -> Credentials {
    Credentials { executor: "exe_bench".into(), token: "a-credential".into() }
}

/// An executor without encryption, and a harness that is the end of its socket.
pub async fn direct() -> (CodexExecutor, Harness) {
    let registry = Registry::start().await;
    let executor = CodexExecutor::start_direct(&registry.url(), &credentials(), |_| {});
    let answered = json!({ "transport": DIRECT_TRANSPORT, "registration_id": "exr_bench" });
    (executor, Harness::plain(registry.socket(answered).await.0, Tongue::Json))
}

/// An executor with encryption, and its socket.
pub async fn encrypted() -> (CodexExecutor, Link) {
    let registry = Registry::start().await;
    let executor = CodexExecutor::start(&registry.url(), &credentials()).await;
    let answered = json!({ "security_profile": SECURITY_PROFILE, "executor_registration_id": "exr_bench" });
    let (socket, said) = registry.socket(answered).await;
    // It asks whether to trust us while we wait for its answer.
    tokio::spawn(async move {
        while let Ok((stream, _)) = registry.listener.accept().await {
            answer(stream, |_| json!({ "valid": true })).await;
        }
    });
    let way = ConnectResponse {
        environment_id: "exe_bench".into(),
        url: String::new(),
        security_profile: SECURITY_PROFILE.into(),
        executor_registration_id: "exr_bench".into(),
        executor_public_key: serde_json::from_value(said["executor_public_key"].clone()).unwrap(),
        harness_key_authorization: "bench".into(),
    };
    (executor, Link { socket, way })
}

/// An encrypted link on which nothing was said yet.
pub struct Link {
    socket: Socket,
    way: ConnectResponse,
}

impl Link {
    /// A harness that has the link for itself.
    pub async fn alone(self) -> Harness {
        Harness::shake_hands(self.socket, &HarnessKeys::new(), &self.way).await.unwrap()
    }

    /// For as many harnesses as are wanted.
    pub fn shared(self) -> OwnEnd {
        // Not split: a half that several tasks wait for remembers the last of them alone.
        let (socket, inboxes) = (Arc::new(Mutex::new(self.socket)), Inboxes::default());
        let end = OwnEnd { way: self.way, socket: socket.clone(), inboxes: inboxes.clone() };
        tokio::spawn(async move {
            let mut next = poll_fn(|context| socket.lock().unwrap().poll_next_unpin(context));
            while let Some(Ok(message)) = (&mut next).await {
                let Message::Binary(wire) = &message else { continue };
                let stream = Frame::decode(wire.clone()).unwrap().stream_id;
                // What is for nobody any more is thrown away.
                if let Some(inbox) = inboxes.lock().unwrap().get(&stream) {
                    let _ = inbox.send(message);
                }
            }
        });
        end
    }
}

type Inboxes = Arc<Mutex<HashMap<StreamId, mpsc::UnboundedSender<Message>>>>;

/// Our end of an encrypted link with many streams.
pub struct OwnEnd {
    way: ConnectResponse,
    socket: Arc<Mutex<Socket>>,
    inboxes: Inboxes,
}

impl OwnEnd {
    /// A harness on a stream of its own; nobody was asked to initialize yet.
    pub async fn harness(&self) -> Harness<Port> {
        let (sender, inbox) = mpsc::unbounded_channel();
        let port = Port { socket: self.socket.clone(), inboxes: self.inboxes.clone(), unheard: Some(sender), inbox };
        Harness::shake_hands(port, &HarnessKeys::new(), &self.way).await.unwrap()
    }
}

/// One stream's share of the socket. What comes for it after it was dropped is thrown away.
pub struct Port {
    socket: Arc<Mutex<Socket>>,
    inboxes: Inboxes,
    /// Until it has said under which id.
    unheard: Option<mpsc::UnboundedSender<Message>>,
    inbox: mpsc::UnboundedReceiver<Message>,
}

impl Stream for Port {
    type Item = Result<Message, SocketError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.inbox.poll_recv(context).map(|message| message.map(Ok))
    }
}

impl Sink<Message> for Port {
    type Error = SocketError;

    fn poll_ready(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<(), SocketError>> {
        self.socket.lock().unwrap().poll_ready_unpin(context)
    }

    fn start_send(mut self: Pin<&mut Self>, message: Message) -> Result<(), SocketError> {
        if let (Some(inbox), Message::Binary(wire)) = (self.unheard.take(), &message) {
            let stream = Frame::decode(wire.clone()).unwrap().stream_id;
            self.inboxes.lock().unwrap().insert(stream, inbox);
        }
        self.socket.lock().unwrap().start_send_unpin(message)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<(), SocketError>> {
        self.socket.lock().unwrap().poll_flush_unpin(context)
    }

    fn poll_close(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<(), SocketError>> {
        self.poll_flush(context)
    }
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

    /// Answers registers until the executor dials; gives its socket and what it said when it registered.
    async fn socket(&self, answered: Value) -> (Socket, Value) {
        let mut said = Value::Null;
        loop {
            let (stream, _) = self.listener.accept().await.unwrap();
            stream.set_nodelay(true).unwrap();
            let mut start = [0; 4];
            stream.peek(&mut start).await.unwrap();
            if &start == b"GET " {
                return (tokio_tungstenite::accept_async(stream).await.unwrap(), said);
            }
            said = answer(stream, |_| {
                let mut answered = answered.clone();
                answered["environment_id"] = "exe_bench".into();
                answered["url"] = format!("ws://{}/socket", self.listener.local_addr().unwrap()).into();
                answered
            })
            .await;
        }
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
