//! A harness of any kind on the gateway's bridge: plain JSON-RPC, plain relay frames, or encrypted ones.

use std::collections::{BTreeMap, VecDeque};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::{Bytes, BytesMut};
use exec_gateway::protocol::endpoint::{Endpoint, EndpointLimits};
use exec_gateway::protocol::frame::{Body, Data, Frame, StreamId, data_header};
use exec_gateway::protocol::ids::{ExecutorId, RegistrationId};
use exec_gateway::protocol::message::{MESSAGE_BYTES_MAX, MessageReader, RECORD_BYTES_MAX, write_message};
use exec_gateway::protocol::rest::{ConnectResponse, HarnessKey};
use exec_gateway::relay::noise::{Channel, Context, GatewayIdentity, Pending, TAG_BYTES};
use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::{Error as SocketError, Message};
use tokio_tungstenite::{WebSocketStream, client_async};

use super::{Caller, PATIENCE};

/// How a harness speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tongue {
    /// A JSON-RPC message in each text.
    Json,
    /// A JSON-RPC message in each relay frame.
    Frames,
    /// Encrypted records in relay frames.
    Encrypted,
}

/// What its executor said when the socket ended.
pub type Farewell = Option<CloseFrame>;

/// One harness's socket.
pub struct Harness {
    pub socket: WebSocketStream<TcpStream>,
    pub stream: StreamId,
    coding: Coding,
    sending: Endpoint,
    receiving: Endpoint,
    next_id: i64,
    heard: VecDeque<Value>,
    resumed: bool,
    /// Frames with data as they were sent; the first has number 0.
    sent: Vec<Bytes>,
    /// As whom and where it came in.
    pub way: Option<(Caller, String)>,
}

enum Coding {
    Json,
    Frames,
    Records(Box<Channel>, MessageReader),
}

/// Opens a WebSocket as the caller; the status and text of the refusal if there is one.
pub async fn dial(caller: &Caller, path: &str) -> Result<WebSocketStream<TcpStream>, (u16, String)> {
    let stream = TcpStream::connect(caller.address).await.unwrap();
    let mut request = format!("ws://{}{path}", caller.address).into_client_request().unwrap();
    if let Some(token) = &caller.token {
        request.headers_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    }
    match client_async(request, stream).await {
        Ok((socket, _)) => Ok(socket),
        Err(SocketError::Http(refusal)) => {
            let text = refusal.body().clone().unwrap_or_default();
            Err((refusal.status().as_u16(), String::from_utf8(text).unwrap()))
        }
        Err(error) => panic!("{error}"),
    }
}

fn stream_id() -> StreamId {
    StreamId::new(&uuid::Uuid::new_v4().to_string()).unwrap()
}

/// A harness's key pair; the gateway's own kind will do.
pub struct HarnessKeys(pub GatewayIdentity);

impl HarnessKeys {
    pub fn new() -> Self {
        Self(GatewayIdentity::generate().unwrap())
    }

    pub fn public(&self) -> HarnessKey {
        self.0.public_key().encode()
    }
}

/// Asks the gateway for the way to an encrypted executor.
pub async fn connect(caller: &Caller, executor: &str, keys: &HarnessKeys) -> ConnectResponse {
    let path = format!("/cloud/environment/{executor}/connect");
    let answer = caller.post(&path, json!({ "harness_public_key": keys.public() })).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    serde_json::from_value(answer.json()).unwrap()
}

impl Harness {
    /// Opens a socket of this kind; nobody was asked to initialize yet.
    pub async fn open(caller: &Caller, executor: &str, tongue: Tongue) -> Self {
        let mut caller = caller.clone();
        let mut path = format!("/bridge/{executor}");
        let mut harness = match tongue {
            Tongue::Json => Self::plain(dial(&caller, &path).await.unwrap(), tongue),
            Tongue::Frames => {
                let mut harness = Self::plain(dial(&caller, &path).await.unwrap(), tongue);
                harness.send_body(Body::Resume { next_seq: 0 }).await;
                harness
            }
            Tongue::Encrypted => {
                let keys = HarnessKeys::new();
                let way = connect(&caller, executor, &keys).await;
                path = format!("/bridge/{}", way.url.split_once("/bridge/").unwrap().1);
                caller.token = None;
                Self::shake_hands(dial(&caller, &path).await.unwrap(), &keys, &way).await.unwrap()
            }
        };
        harness.way = Some((caller, path));
        harness
    }

    /// Comes back for its stream on another socket.
    pub async fn come_back(&mut self) -> Result<(), Farewell> {
        let (caller, path) = self.way.clone().unwrap();
        self.come_back_as(&caller, &path).await
    }

    /// The same with another credential, or elsewhere.
    pub async fn come_back_as(&mut self, caller: &Caller, path: &str) -> Result<(), Farewell> {
        self.socket = dial(caller, path).await.unwrap();
        self.send_body(Body::Resume { next_seq: self.receiving.acknowledgement().0 }).await;
        match self.frame().await? {
            Body::Resume { next_seq } => {
                for wire in &self.sent[next_seq as usize..] {
                    // It may be cut off again meanwhile.
                    let _ = self.socket.send(Message::Binary(wire.clone())).await;
                }
                Ok(())
            }
            Body::Reset { .. } => Err(self.farewell().await),
            other => panic!("{other:?}"),
        }
    }

    /// Shakes hands with the executor over a socket of the bridge.
    pub async fn shake_hands(
        socket: WebSocketStream<TcpStream>,
        keys: &HarnessKeys,
        way: &ConnectResponse,
    ) -> Result<Self, Farewell> {
        let mut harness = Self::on(socket, stream_id(), Coding::Frames);
        let public = way.executor_public_key.decode().unwrap();
        let public = [&public.x25519[..], public.mlkem768.as_slice()].concat();
        let executor = ExecutorId::new(&way.environment_id).unwrap();
        let registration = RegistrationId::new(&way.executor_registration_id).unwrap();
        let context = Context { executor: &executor, registration: &registration, stream: &harness.stream };
        let authorization = way.harness_key_authorization.as_bytes();
        let (pending, message) = Pending::initiate(&keys.0, &public, &context, authorization).unwrap();
        harness.send_body(Body::Resume { next_seq: 0 }).await;
        harness.send_body(Body::Handshake { payload: message }).await;
        loop {
            match harness.frame().await? {
                Body::Handshake { payload } => {
                    let channel = pending.finish(&payload).unwrap();
                    harness.coding = Coding::Records(Box::new(channel), MessageReader::new(MESSAGE_BYTES_MAX));
                    return Ok(harness);
                }
                Body::Reset { .. } => {}
                other => panic!("{other:?}"),
            }
        }
    }

    /// A harness that speaks in the clear on a socket of the bridge, and has said nothing yet.
    pub fn plain(socket: WebSocketStream<TcpStream>, tongue: Tongue) -> Self {
        let coding = if tongue == Tongue::Json { Coding::Json } else { Coding::Frames };
        Self::on(socket, stream_id(), coding)
    }

    fn on(socket: WebSocketStream<TcpStream>, stream: StreamId, coding: Coding) -> Self {
        let endpoint = || Endpoint::new(EndpointLimits::default());
        Self {
            socket,
            stream,
            coding,
            sending: endpoint(),
            receiving: endpoint(),
            next_id: 0,
            heard: VecDeque::new(),
            resumed: false,
            sent: Vec::new(),
            way: None,
        }
    }

    /// The same, initialized in a new executor session; gives the session's name.
    pub async fn initialized(caller: &Caller, executor: &str, tongue: Tongue) -> (Self, String) {
        let mut harness = Self::open(caller, executor, tongue).await;
        let session = harness.initialize(None).await.unwrap();
        (harness, session)
    }

    /// Initializes a session, or resumes one; gives its name.
    pub async fn initialize(&mut self, resume: Option<&str>) -> Result<String, Value> {
        self.resumed = resume.is_some();
        let result = self.call("initialize", json!({ "clientName": "test", "resumeSessionId": resume })).await?;
        self.say(&json!({ "method": "initialized", "params": {} })).await;
        Ok(result["sessionId"].as_str().unwrap_or_default().to_owned())
    }

    pub async fn send_body(&mut self, body: Body) {
        let frame = Frame { stream_id: self.stream.clone(), body };
        self.socket.send(Message::Binary(frame.encode())).await.unwrap();
    }

    /// Sends one message.
    pub async fn say(&mut self, message: &Value) {
        self.say_text(&message.to_string()).await;
    }

    /// Sends one message that may be none.
    pub async fn say_text(&mut self, json: &str) {
        match &mut self.coding {
            Coding::Json => self.socket.send(Message::text(json)).await.unwrap(),
            Coding::Frames => {
                let seq = self.sending.next_seq().unwrap();
                let data = Data { seq, segment_index: 0, segment_count: 1, payload: json.to_owned().into() };
                let wire = Frame { stream_id: self.stream.clone(), body: Body::Data(data) }.encode();
                self.sent.push(wire.clone());
                let _ = self.socket.send(Message::Binary(wire)).await;
            }
            Coding::Records(channel, _) => {
                let mut plain = BytesMut::new();
                write_message(&mut plain, json.as_bytes());
                for record in plain.chunks(RECORD_BYTES_MAX) {
                    let length = record.len() + TAG_BYTES;
                    let mut frame = data_header(&self.stream, self.sending.next_seq().unwrap(), length, length);
                    channel.seal(record, &mut frame).unwrap();
                    let wire = frame.freeze();
                    self.sent.push(wire.clone());
                    let _ = self.socket.feed(Message::Binary(wire)).await;
                }
                let _ = self.socket.flush().await;
            }
        }
    }

    /// The next message of the gateway's socket; the close frame when it ended.
    pub async fn word(&mut self) -> Result<Bytes, Farewell> {
        loop {
            let next = tokio::time::timeout(PATIENCE, self.socket.next()).await.expect("the gateway says something");
            match next {
                Some(Ok(Message::Binary(bytes))) => return Ok(bytes),
                Some(Ok(Message::Text(text))) => return Ok(text.into()),
                Some(Ok(Message::Close(frame))) => return Err(frame),
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return Err(None),
            }
        }
    }

    async fn frame(&mut self) -> Result<Body, Farewell> {
        let frame = Frame::decode(self.word().await?).unwrap();
        assert_eq!(frame.stream_id, self.stream);
        Ok(frame.body)
    }

    /// The next JSON-RPC message.
    pub async fn hear(&mut self) -> Result<Value, Farewell> {
        Ok(serde_json::from_slice(&self.hear_bytes().await?).unwrap())
    }

    /// The next JSON-RPC message as it stands on the wire.
    pub async fn hear_bytes(&mut self) -> Result<Bytes, Farewell> {
        loop {
            if let Coding::Records(_, reader) = &mut self.coding
                && let Some(message) = reader.next().unwrap()
            {
                return Ok(message);
            }
            if let Some(payload) = self.receiving.next() {
                match &mut self.coding {
                    Coding::Records(channel, reader) => reader.push(channel.open(&payload).unwrap()),
                    _ => return Ok(payload),
                }
                continue;
            }
            if let Coding::Json = self.coding {
                return self.word().await;
            }
            match self.frame().await? {
                Body::Data(data) => {
                    assert_eq!(data.seq, self.receiving.acknowledgement().0, "nothing comes twice");
                    self.receiving.receive(data).unwrap();
                }
                Body::Reset { .. } => {}
                other => panic!("{other:?}"),
            }
        }
    }

    /// Sends a request and waits for its answer; notifications that come before are kept.
    pub async fn call(&mut self, method: &str, params: Value) -> Result<Value, Value> {
        self.next_id += 1;
        let id = self.next_id;
        self.say(&json!({ "id": id, "method": method, "params": params })).await;
        loop {
            let message = self.hear().await.unwrap();
            match message.get("id") {
                Some(answered) if *answered == id => match message.get("error") {
                    Some(error) => return Err(error.clone()),
                    None => return Ok(message["result"].clone()),
                },
                _ => self.heard.push_back(message),
            }
        }
    }

    /// Starts a process under this name.
    pub async fn start(&mut self, process: &str, command: &str) {
        let policy = json!({ "inherit": "all", "ignoreDefaultExcludes": false, "exclude": [], "set": {},
            "includeOnly": [] });
        let start = json!({ "processId": process, "argv": ["/bin/sh", "-c", command], "cwd": "file:///", "env": {},
            "tty": false, "pipeStdin": true, "envPolicy": policy });
        self.call("process/start", start).await.unwrap();
    }

    /// Writes to the stdin of a process.
    pub async fn write(&mut self, process: &str, text: &str) {
        let write = json!({ "processId": process, "chunk": STANDARD.encode(text), "writeId": text });
        let written = self.call("process/write", write).await.unwrap();
        assert_eq!(written["status"], "accepted", "{written}");
    }

    /// What a process printed and its exit code, from its notifications; they come almost in the order of their numbers.
    /// In a resumed session those that come here, whatever came elsewhere.
    pub async fn finished(&mut self, process: &str) -> (Vec<u8>, i64) {
        let (mut events, mut last) = (BTreeMap::new(), None);
        let mut code = None;
        loop {
            let message = match self.heard.pop_front() {
                Some(message) => message,
                None => self.hear().await.unwrap(),
            };
            let params = &message["params"];
            assert_eq!(params["processId"], process, "of nobody else: {message}");
            let (seq, mut printed) = (params["seq"].as_u64().unwrap(), Vec::new());
            match message["method"].as_str().unwrap() {
                "process/output" => printed = STANDARD.decode(params["chunk"].as_str().unwrap()).unwrap(),
                "process/exited" => code = params["exitCode"].as_i64(),
                "process/closed" => last = Some(seq),
                other => panic!("{other}"),
            }
            events.insert(seq, printed);
            let first = if self.resumed { *events.keys().next().unwrap() } else { 1 };
            if let (Some(last), Some(code)) = (last, code)
                && events.len() as u64 == last - first + 1
            {
                return (events.into_values().flatten().collect(), code);
            }
        }
    }

    /// Runs a command to its end.
    pub async fn run(&mut self, process: &str, command: &str) -> (String, i64) {
        self.start(process, command).await;
        let (bytes, code) = self.finished(process).await;
        (String::from_utf8(bytes).unwrap(), code)
    }

    /// How the gateway ends the socket.
    pub async fn farewell(&mut self) -> Farewell {
        loop {
            if let Err(farewell) = self.word().await {
                return farewell;
            }
        }
    }
}
