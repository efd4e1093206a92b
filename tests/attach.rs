//! Sessions followed live on the real executor: as events, attached, and by waiting; and what readers cost each other.

use std::collections::VecDeque;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use exec_gateway::admin::{Request as Order, Response};
use exec_gateway::protocol::ids::{TokenId, WorkspaceId};
use futures_util::{SinkExt, StreamExt};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::{Error as SocketError, Message};
use tokio_tungstenite::{WebSocketStream, client_async};

use crate::support::{Answer, Caller, MIB, PATIENCE, Workbench, eventually, noise};

/// Starts a process; gives its session's path.
async fn start(bench: &Workbench, arguments: Value) -> String {
    let result = bench.caller.result("box", "exec_command", arguments).await;
    assert_eq!(result["isError"], false, "{result}");
    format!("/api/connectors/processes/{}", result["structuredContent"]["session_id"].as_str().unwrap())
}

async fn output(caller: &Caller, session: &str, query: &str) -> Value {
    let answer = caller.send("GET", &format!("{session}/output?{query}"), &[], "").await;
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()
}

async fn write(caller: &Caller, session: &str, bytes: &[u8]) -> Answer {
    caller.post(&format!("{session}/stdin"), json!({ "data_b64": STANDARD.encode(bytes) })).await
}

fn bytes(chunk: &Value) -> Vec<u8> {
    STANDARD.decode(chunk["data_b64"].as_str().unwrap()).unwrap()
}

/// What the chunks of an answer say.
fn text(page: &Value) -> String {
    String::from_utf8(page["chunks"].as_array().unwrap().iter().flat_map(bytes).collect()).unwrap()
}

/// Waits until the session has printed that many bytes to stdout.
async fn printed(caller: &Caller, session: &str, length: usize) {
    eventually("the process prints", async || {
        let shown = caller.send("GET", session, &[], "").await.json();
        (shown["stdout_bytes"].as_u64()? as usize >= length).then_some(())
    })
    .await;
}

/// A session's events as a client of Server-Sent Events reads them.
struct Events {
    body: Incoming,
    unread: Vec<u8>,
    last_id: Option<String>,
}

#[derive(Debug)]
struct Event {
    name: String,
    data: Value,
    retry: Option<String>,
}

impl Events {
    async fn of(caller: &Caller, session: &str, last_id: Option<&str>) -> Self {
        let response = Self::ask(caller, session, last_id).await;
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        Self { body: response.into_body(), unread: Vec::new(), last_id: None }
    }

    async fn ask(caller: &Caller, session: &str, last_id: Option<&str>) -> hyper::Response<Incoming> {
        let mut headers = vec![("accept", "text/event-stream")];
        headers.extend(last_id.map(|id| ("last-event-id", id)));
        caller.request("GET", &format!("{session}/output"), &headers, "").await.unwrap()
    }

    /// The next event; `None` at the end.
    async fn next(&mut self) -> Option<Event> {
        // For the event, whatever comments come meanwhile.
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(end) = self.unread.windows(2).position(|pair| pair == b"\n\n") {
                let block = String::from_utf8(self.unread.drain(..end + 2).collect()).unwrap();
                let field = |name: &str| {
                    let found = block.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
                    found.map(str::to_owned)
                };
                let Some(name) = field("event") else { continue };
                self.last_id = field("id").or(self.last_id.take());
                let data = serde_json::from_str(&field("data").unwrap()).unwrap();
                return Some(Event { name, data, retry: field("retry") });
            }
            let frame = timeout_at(until, self.body.frame()).await.expect("no event came")?.unwrap();
            self.unread.extend_from_slice(frame.data_ref().unwrap());
        }
    }

    async fn expect(&mut self, name: &str) -> Value {
        let event = self.next().await.unwrap_or_else(|| panic!("the stream ended before {name}"));
        assert_eq!(event.name, name, "{event:?}");
        event.data
    }

    /// Reads chunks until that many bytes came.
    async fn read(&mut self, length: usize) -> Vec<u8> {
        let mut read = Vec::new();
        while read.len() < length {
            read.extend(bytes(&self.expect("chunk").await));
        }
        read
    }
}

/// A caller attached to a session.
struct Attached {
    socket: WebSocketStream<TcpStream>,
    /// Chunks that came while something else was waited for.
    output: VecDeque<u8>,
}

impl Attached {
    /// A process that has said "here" and repeats its stdin still does so.
    async fn goes_on(&mut self) {
        self.socket.send(Message::binary(&b"on"[..])).await.unwrap();
        self.expect("stdin").await;
        assert_eq!(self.read(7).await, b"here\non");
    }

    async fn to(caller: &Caller, session: &str, query: &str) -> Self {
        let request = format!("ws://{}{session}/attach?{query}", caller.address).into_client_request().unwrap();
        Self::open(caller, request).await.unwrap()
    }

    async fn open(
        caller: &Caller,
        mut request: tokio_tungstenite::tungstenite::handshake::client::Request,
    ) -> Result<Self, SocketError> {
        if let Some(token) = &caller.token {
            request.headers_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
        }
        let stream = TcpStream::connect(caller.address).await.unwrap();
        let (socket, _) = client_async(request, stream).await?;
        Ok(Self { socket, output: VecDeque::new() })
    }

    async fn say(&mut self, message: Value) {
        self.socket.send(Message::text(message.to_string())).await.unwrap();
    }

    async fn receive(&mut self) -> Message {
        let until = Instant::now() + PATIENCE;
        loop {
            match timeout_at(until, self.socket.next()).await.expect("no message came").unwrap().unwrap() {
                Message::Ping(_) => {}
                message => return message,
            }
        }
    }

    /// The next message of that type; output before it is kept.
    async fn expect(&mut self, name: &str) -> Value {
        loop {
            let message = self.receive().await;
            let Message::Text(message) = message else { panic!("{message:?} instead of {name}") };
            let message: Value = serde_json::from_str(&message).unwrap();
            if message["type"] == name {
                return message;
            }
            assert_eq!(message["type"], "chunk", "{message} instead of {name}");
            self.output.extend(bytes(&message));
        }
    }

    async fn read(&mut self, length: usize) -> Vec<u8> {
        while self.output.len() < length {
            let chunk = self.expect("chunk").await;
            self.output.extend(bytes(&chunk));
        }
        self.output.drain(..length).collect()
    }

    /// Reads up to the close frame; gives its code.
    async fn closed(&mut self) -> u16 {
        loop {
            match self.receive().await {
                Message::Close(frame) => return frame.unwrap().code.into(),
                Message::Text(_) => {}
                message => panic!("{message:?} instead of a close frame"),
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn events_follow_a_running_process_and_go_on_behind_the_last_one_seen() {
    let bench = Workbench::start().await;
    let session =
        start(&bench, json!({ "command": "echo one; read x; echo two >&2; read x; echo three; exit 3" })).await;
    let mut events = Events::of(&bench.caller, &session, None).await;
    let chunk = events.expect("chunk").await;
    assert_eq!((&chunk["seq"], &chunk["stream"], &chunk["offset"]), (&json!(1), &json!("stdout"), &json!(0)));
    assert_eq!(bytes(&chunk), b"one\n");
    write(&bench.caller, &session, b"\n").await;
    let chunk = events.expect("chunk").await;
    assert_eq!((bytes(&chunk), &chunk["stream"]), (b"two\n".to_vec(), &json!("stderr")));

    let last_id = events.last_id.take().unwrap();
    drop(events);
    write(&bench.caller, &session, b"\n").await;
    let mut events = Events::of(&bench.caller, &session, Some(&last_id)).await;
    assert_eq!(bytes(&events.expect("chunk").await), b"three\n");
    let exit = events.expect("exit").await;
    assert_eq!((&exit["exit_code"], &exit["streams"]["stdout"]["bytes"]), (&json!(3), &json!(10)));
    assert!(events.next().await.is_none(), "the exit is the end");

    let refused = Events::ask(&bench.caller, &session, Some("x")).await;
    assert_eq!(refused.status(), 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attached_caller_writes_reads_and_sees_the_end() {
    let bench = Workbench::start().await;
    let session = start(&bench, json!({ "command": ["cat"] })).await;
    let mut attached = Attached::to(&bench.caller, &session, "").await;
    attached.socket.send(Message::binary(&b"one "[..])).await.unwrap();
    assert_eq!(attached.expect("stdin").await, json!({ "type": "stdin", "accepted": 4, "eof": false }));
    assert_eq!(attached.read(4).await, b"one ");

    let sent = noise(1, 2 * MIB);
    for (index, piece) in sent.chunks(512 * 1024).enumerate() {
        let offset = 4 + index * 512 * 1024;
        attached.say(json!({ "type": "stdin", "data_b64": STANDARD.encode(piece), "offset": offset })).await;
        assert_eq!(attached.expect("stdin").await["accepted"], offset + piece.len());
    }
    attached.say(json!({ "type": "stdin", "eof": true })).await;
    assert_eq!(attached.expect("stdin").await["eof"], true);
    assert!(attached.read(sent.len()).await == sent);
    let exit = attached.expect("exit").await;
    assert_eq!((&exit["exit_code"], &exit["streams"]["stdout"]["bytes"]), (&json!(0), &json!(4 + sent.len())));
    assert_eq!(attached.closed().await, 1000);

    // Whoever attaches later reads the same.
    let mut late = Attached::to(&bench.caller, &session, "").await;
    assert!(late.read(4 + sent.len()).await[4..] == sent);
    late.expect("exit").await;
    assert_eq!(late.closed().await, 1000);
    let newest = output(&bench.caller, &session, "since=999999").await;
    let last =
        Attached::to(&bench.caller, &session, &format!("since={}", newest["next_since"])).await.expect("exit").await;
    assert_eq!(last["state"], "exited");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_attached_caller_says_wrong_is_answered_and_the_conversation_goes_on() {
    let bench = Workbench::start().await;
    let session = start(&bench, json!({ "command": ["cat"], "stdin": "open" })).await;
    let mut attached = Attached::to(&bench.caller, &session, "").await;
    for (said, code) in [
        (json!({ "type": "dance" }), "bad_request"),
        (json!("stdin"), "bad_request"),
        (json!(["terminate"]), "bad_request"),
        (json!({ "type": "stdin", "data_b64": "***" }), "bad_base64"),
        (json!({ "type": "stdin", "eof": true }), "eof_unsupported"),
        (json!({ "type": "resize", "rows": 24, "cols": 80 }), "resize_unsupported"),
        (json!({ "type": "terminate", "signal": "HUP" }), "bad_request"),
    ] {
        attached.say(said).await;
        assert_eq!(attached.expect("error").await["code"], code);
    }
    attached.say(json!({ "type": "stdin", "data_b64": "aGk=", "offset": 5 })).await;
    let refused = attached.expect("error").await;
    assert_eq!((&refused["code"], &refused["accepted"]), (&json!("stdin_offset"), &json!(0)));
    // Bytes sent behind refused ones must not take their place.
    attached.say(json!({ "type": "stdin", "data_b64": "aGk=" })).await;
    assert_eq!(attached.expect("error").await["code"], "stdin_offset");
    attached.say(json!({ "type": "stdin", "data_b64": "aGk=", "offset": 0 })).await;
    assert_eq!(attached.expect("stdin").await["accepted"], 2);
    assert_eq!(attached.read(2).await, b"hi");
    attached.say(json!({ "type": "terminate" })).await;
    assert_eq!(attached.expect("exit").await["exit_code"], 137);
    assert_eq!(attached.closed().await, 1000);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_is_too_large_ends_the_socket_and_not_the_session() {
    let bench = Workbench::start().await;
    let session = start(&bench, json!({ "command": ["cat"] })).await;
    let mut attached = Attached::to(&bench.caller, &session, "").await;
    attached.socket.send(Message::binary(vec![0; MIB + 1])).await.unwrap();
    assert_eq!(attached.closed().await, 1009);
    let shown = bench.caller.send("GET", &session, &[], "").await.json();
    assert_eq!((&shown["state"], &shown["stdin_accepted"]), (&json!("running"), &json!(0)));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_caller_wrote_before_it_left_still_arrives() {
    let bench = Workbench::start().await;
    let session = start(&bench, json!({ "command": "cat > copy" })).await;
    let sent = noise(2, 3 * MIB / 4);
    let mut attached = Attached::to(&bench.caller, &session, "").await;
    attached.socket.send(Message::binary(sent.clone())).await.unwrap();
    attached.say(json!({ "type": "stdin", "eof": true })).await;
    attached.socket.close(None).await.unwrap();
    drop(attached);
    let page = output(&bench.caller, &session, "wait_ms=25000").await;
    assert_eq!(page["exit_code"], 0);
    assert!(std::fs::read(bench.file("copy")).unwrap() == sent);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_is_attached_to_with_any_credential_of_its_workspace_and_no_other() {
    let bench = Workbench::start().await;
    let session = start(&bench, json!({ "command": ["cat"] })).await;
    let open = async |caller: &Caller, query: &str| {
        let request = format!("ws://{}{session}/attach{query}", caller.address).into_client_request().unwrap();
        match Attached::open(caller, request).await {
            Ok(_) => 101,
            Err(SocketError::Http(answer)) => answer.status().as_u16(),
            Err(error) => panic!("{error}"),
        }
    };
    let stranger = bench.gateway.stranger();
    let workspace = WorkspaceId::new("w").unwrap();
    let cap = bench.gateway.gateway.api().corridor.auth.cap_tokens().for_workspace(&workspace).unwrap();
    assert_eq!(open(&stranger, &format!("?token={}", bench.caller.token.as_ref().unwrap())).await, 101);
    assert_eq!(open(&stranger, &format!("?since=3&token={}", cap.expose())).await, 101);
    assert_eq!(open(&stranger, "").await, 401);
    assert_eq!(open(&stranger, "?token=egw_no").await, 401);
    assert_eq!(open(&bench.gateway.caller("other").await, "").await, 404);
    assert_eq!(open(&bench.caller, "?stream=stdall").await, 400);
    let offering = async |protocols: String| {
        let mut request = format!("ws://{}{session}/attach", stranger.address).into_client_request().unwrap();
        request.headers_mut().insert("sec-websocket-protocol", protocols.parse().unwrap());
        let stream = TcpStream::connect(stranger.address).await.unwrap();
        // The client itself gives up on a server that chooses none of what it offers.
        client_async(request, stream).await.map(|(_, answer)| answer.headers()["sec-websocket-protocol"].clone())
    };
    let named = format!("bearer.{}", cap.expose());
    assert_eq!(offering(format!("chat, {named}")).await.unwrap(), named);
    assert!(matches!(offering("bearer.egw_no".into()).await, Err(SocketError::Http(answer)) if answer.status() == 401));
    let plain = bench.caller.send("GET", &format!("{session}/attach"), &[], "").await;
    assert_eq!((plain.status.as_u16(), plain.code().as_str()), (426, "upgrade_required"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_only_token_follows_and_changes_nothing() {
    let bench = Workbench::start().await;
    let session = start(&bench, json!({ "command": "echo here; cat" })).await;
    let workspace = WorkspaceId::new("w").unwrap();
    let order = Order::TokenCreate { workspace, user: None, ttl: None, read_only: true };
    let Response::Token { token, .. } = bench.gateway.admin(order).await else { panic!("no token") };
    let reader = Caller::new(bench.gateway.address(), Some(token.expose().to_owned()));
    let refused = |answer: &Answer| assert_eq!((answer.status.as_u16(), answer.code().as_str()), (403, "forbidden"));
    refused(&write(&reader, &session, b"x").await);
    refused(&reader.post(&format!("{session}/terminate"), json!({})).await);
    refused(&reader.send("DELETE", &session, &[], "").await);
    let mut attached = Attached::to(&reader, &session, "").await;
    assert_eq!(attached.read(5).await, b"here\n");
    for said in [json!({ "type": "stdin", "data_b64": "eA==" }), json!({ "type": "terminate" })] {
        attached.say(said).await;
        assert_eq!(attached.expect("error").await["code"], "forbidden");
    }
    attached.socket.send(Message::binary(&b"x"[..])).await.unwrap();
    assert_eq!(attached.expect("error").await["code"], "forbidden");
    let shown = bench.caller.send("GET", &session, &[], "").await.json();
    assert_eq!((&shown["state"], &shown["stdin_accepted"]), (&json!("running"), &json!(0)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_waiting_reader_is_woken_by_output() {
    let bench = Workbench::start().await;
    let session = start(&bench, json!({ "command": "read x; echo woken; read x" })).await;
    let waiting = {
        let (caller, session) = (bench.caller.clone(), session.clone());
        tokio::spawn(async move { output(&caller, &session, "wait_ms=25000").await })
    };
    write(&bench.caller, &session, b"\n").await;
    let page = waiting.await.unwrap();
    assert_eq!(text(&page), "woken\n");
    assert_eq!((&page["session_alive"], &page["exit_code"]), (&json!(true), &Value::Null));
    let none = output(&bench.caller, &session, &format!("since={}", page["next_since"])).await;
    assert_eq!((&none["chunks"], &none["next_since"]), (&json!([]), &page["next_since"]), "without wait_ms at once");
}

#[tokio::test(flavor = "multi_thread")]
async fn head_and_tail_of_a_running_process_are_its_first_and_last_bytes() {
    let bench = Workbench::start().await;
    let session = start(&bench, json!({ "command": "seq 10000 19999; read x" })).await;
    printed(&bench.caller, &session, 60_000).await;
    let view = output(&bench.caller, &session, "view=head_tail&bytes=24").await;
    let side = |name: &str| String::from_utf8(view[name].as_array().unwrap().iter().flat_map(bytes).collect()).unwrap();
    assert_eq!((side("head").as_str(), side("tail").as_str()), ("10000\n10001\n", "19998\n19999\n"));
    assert_eq!((&view["session_alive"], &view["exit_code"], &view["exit"]), (&json!(true), &Value::Null, &Value::Null));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_stops_holds_up_neither_the_process_nor_another_reader() {
    let bench = Workbench::with(|config| config.session.memory_bytes_max = 64 * 1024).await;
    let sent = noise(3, 12 * MIB);
    std::fs::write(bench.file("noise"), &sent).unwrap();
    let session = start(&bench, json!({ "command": "read x; cat noise", "label": "loud" })).await;
    let other = start(&bench, json!({ "command": ["cat"] })).await;
    let mut stopped = Events::of(&bench.caller, &session, None).await;
    let mut neighbour = Attached::to(&bench.caller, &other, "").await;
    write(&bench.caller, &session, b"\n").await;
    // The process ends and another reader gets everything, while the first one has read nothing.
    let mut quick = Events::of(&bench.caller, &session, None).await;
    assert!(quick.read(sent.len()).await == sent);
    quick.expect("exit").await;
    neighbour.socket.send(Message::binary(&b"ping"[..])).await.unwrap();
    neighbour.expect("stdin").await;
    assert_eq!(neighbour.read(4).await, b"ping");
    // Then it goes on where it stopped, and misses nothing.
    assert!(stopped.read(sent.len()).await == sent);
    stopped.expect("exit").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_token_ends_its_streams_and_no_others() {
    let bench = Workbench::start().await;
    let session = start(&bench, json!({ "command": "echo here; cat" })).await;
    let (caller, id) = bench.gateway.caller_and_token("w").await;
    let mut events = Events::of(&caller, &session, None).await;
    let mut attached = Attached::to(&caller, &session, "").await;
    let mut kept = Attached::to(&bench.caller, &session, "").await;
    events.expect("chunk").await;
    assert_eq!(attached.read(5).await, b"here\n");
    bench.gateway.admin(Order::TokenRevoke { id }).await;
    assert_eq!(events.expect("revoked").await["code"], "invalid_token");
    assert!(events.next().await.is_none());
    assert_eq!(attached.closed().await, 1008);
    kept.goes_on().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_expires_ends_its_streams_and_no_others() {
    let bench = Workbench::start().await;
    let session = start(&bench, json!({ "command": "echo here; cat" })).await;
    let mut kept = Attached::to(&bench.caller, &session, "").await;
    let workspace = WorkspaceId::new("w").unwrap();
    let ttl = Some(Duration::from_secs(3));
    let order = Order::TokenCreate { workspace, user: None, ttl, read_only: false };
    let Response::Token { token, .. } = bench.gateway.admin(order).await else { panic!("no token") };
    let caller = Caller::new(bench.gateway.address(), Some(token.expose().to_owned()));
    let mut events = Events::of(&caller, &session, None).await;
    let mut attached = Attached::to(&caller, &session, "").await;
    events.expect("chunk").await;
    let told = events.expect("revoked").await;
    assert_eq!(told, json!({ "code": "invalid_token", "message": "the token has expired" }));
    assert!(events.next().await.is_none());
    assert_eq!(attached.closed().await, 1008);
    assert_eq!(caller.send("GET", &session, &[], "").await.status, 401);
    kept.goes_on().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_browser_follows_events_with_its_token_in_the_query() {
    let bench = Workbench::start().await;
    let session = start(&bench, json!({ "command": "echo here" })).await;
    let (stranger, token) = (bench.gateway.stranger(), bench.caller.token.as_ref().unwrap());
    let ask = async |query: &str| {
        let path = format!("{session}/output?{query}");
        stranger.send("GET", &path, &[("accept", "text/event-stream")], "").await
    };
    let answer = ask(&format!("token={token}&since=0")).await;
    assert_eq!(answer.status, 200);
    assert!(answer.body.starts_with(b"id: 1\nevent: chunk\n"), "{answer:?}");
    assert_eq!(ask("token=egw_no").await.status, 401);
    // Answers that anybody can ask for with headers are had with headers.
    assert_eq!(stranger.send("GET", &format!("{session}/output?token={token}"), &[], "").await.status, 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forgotten_session_ends_its_streams() {
    let bench = Workbench::start().await;
    let session = start(&bench, json!({ "command": "echo here; cat" })).await;
    let mut events = Events::of(&bench.caller, &session, None).await;
    let mut attached = Attached::to(&bench.caller, &session, "").await;
    events.expect("chunk").await;
    attached.read(5).await;
    assert_eq!(bench.caller.send("DELETE", &session, &[], "").await.status, 200);
    // The process is ended first; who is quick sees that.
    let last = events.next().await.unwrap();
    assert!(last.name == "exit" || last.name == "forgotten", "{last:?}");
    assert!(events.next().await.is_none());
    assert_eq!(attached.closed().await, 1000);
    assert_eq!(Events::ask(&bench.caller, &session, None).await.status(), 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_of_a_forgotten_session_is_told_so_and_not_that_output_was_lost() {
    let bench = Workbench::start().await;
    std::fs::write(bench.file("noise"), noise(4, 12 * MIB)).unwrap();
    let session = start(&bench, json!({ "command": ["cat", "noise"] })).await;
    printed(&bench.caller, &session, 12 * MIB).await;
    // More than the sockets between hold, so that the rest is still unread when it is forgotten.
    let mut events = Events::of(&bench.caller, &session, None).await;
    events.expect("chunk").await;
    assert_eq!(bench.caller.send("DELETE", &session, &[], "").await.status, 200);
    let last = loop {
        let event = events.next().await.unwrap();
        if event.name != "chunk" {
            break event.name;
        }
    };
    assert_eq!(last, "forgotten");
    assert!(events.next().await.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attached_caller_that_takes_nothing_or_is_silent_loses_its_socket() {
    let bench = Workbench::with(|config| {
        config.session.streams_max = 1;
        config.link.write_timeout_secs = 1;
        config.link.ping_secs = 1;
        config.link.dead_secs = 4;
    })
    .await;
    std::fs::write(bench.file("noise"), noise(5, 12 * MIB)).unwrap();
    for command in ["cat noise; cat", "cat"] {
        let session = start(&bench, json!({ "command": command })).await;
        // Nobody reads from it: neither output nor pings.
        let unread = Attached::to(&bench.caller, &session, "").await;
        assert_eq!(Events::ask(&bench.caller, &session, None).await.status(), 429);
        eventually("its place is free", async || {
            (Events::ask(&bench.caller, &session, None).await.status() == 200).then_some(())
        })
        .await;
        drop(unread);
        let shown = bench.caller.send("GET", &session, &[], "").await.json();
        assert_eq!(shown["state"], "running");
    }
}

/// A gateway whose only stream is taken by a reader of events who reads nothing while there is much to read.
async fn unread(write_timeout_secs: u64) -> (Workbench, String, TokenId, TcpStream) {
    let bench = Workbench::with(|config| {
        config.session.streams_max = 1;
        config.edge.write_timeout_secs = write_timeout_secs;
        config.drain.grace_secs = 50;
        // With little room in the connection's own buffer it asks the stream for nothing more.
        config.edge.header_bytes_max = 8192;
        // Nor does the system notice.
        config.edge.tcp_user_timeout_secs = 600;
    })
    .await;
    std::fs::write(bench.file("noise"), noise(6, 12 * MIB)).unwrap();
    let session = start(&bench, json!({ "command": "cat noise; cat" })).await;
    printed(&bench.caller, &session, 12 * MIB).await;
    let (caller, id) = bench.gateway.caller_and_token("w").await;
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(16 * 1024).unwrap();
    let mut unread = socket.connect(caller.address).await.unwrap();
    let headers = format!("accept: text/event-stream\r\nauthorization: Bearer {}\r\n", caller.token.unwrap());
    let request = format!("GET {session}/output HTTP/1.1\r\nhost: gateway\r\n{headers}\r\n");
    unread.write_all(request.as_bytes()).await.unwrap();
    let mut status = [0; 12];
    unread.read_exact(&mut status).await.unwrap();
    assert_eq!(&status, b"HTTP/1.1 200");
    assert_eq!(Events::ask(&bench.caller, &session, None).await.status(), 429);
    let (mut waiting, mut looks) = (None, 0);
    eventually("the gateway can send no more", async || {
        let now = unsent(caller.address.port(), unread.local_addr().unwrap().port());
        looks = if now > Some(0) && now == waiting { looks + 1 } else { 0 };
        waiting = now;
        (looks >= 50 || now.is_none()).then_some(())
    })
    .await;
    (bench, session, id, unread)
}

/// Bytes that the system holds for the other end of a connection; `None` when there is no such connection.
fn unsent(port: u16, peer: u16) -> Option<u64> {
    let connections = std::fs::read_to_string("/proc/net/tcp").unwrap();
    connections.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let of = |field: &str| u16::from_str_radix(field.split_once(':')?.1, 16).ok();
        let found = of(fields.get(1)?)? == port && of(fields.get(2)?)? == peer;
        found.then(|| u64::from_str_radix(fields[4].split_once(':').unwrap().0, 16).unwrap())
    })
}

async fn its_place_is_free(bench: &Workbench, session: &str) {
    eventually("its place is free", async || {
        (Events::ask(&bench.caller, session, None).await.status() == 200).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_token_ends_its_stream_though_nobody_reads_it() {
    let (bench, session, id, _unread) = unread(600).await;
    bench.gateway.admin(Order::TokenRevoke { id }).await;
    its_place_is_free(&bench, &session).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_nobody_reads_does_not_hold_up_the_drain() {
    let (Workbench { gateway, .. }, _, _, _unread) = unread(600).await;
    let drained = timeout(Duration::from_secs(40), gateway.gateway.run_until(async {})).await;
    drained.expect("the grace of 50 s was used up");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_not_taken_loses_its_connection() {
    let (bench, session, _, _unread) = unread(1).await;
    its_place_is_free(&bench, &session).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_that_restarts_says_so_to_its_streams() {
    let bench = Workbench::start().await;
    let session = start(&bench, json!({ "command": "echo here; cat" })).await;
    let mut events = Events::of(&bench.caller, &session, None).await;
    let mut attached = Attached::to(&bench.caller, &session, "").await;
    events.expect("chunk").await;
    attached.read(5).await;
    let Workbench { gateway, .. } = bench;
    let draining = tokio::spawn(gateway.gateway.run_until(async {}));
    let event = events.next().await.unwrap();
    assert_eq!((event.name.as_str(), event.retry.as_deref()), ("draining", Some("1000")));
    assert!(events.next().await.is_none());
    assert_eq!(attached.closed().await, 1012);
    draining.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_past_the_bound_are_refused_until_one_ends() {
    let bench = Workbench::with(|config| config.session.streams_max = 2).await;
    let session = start(&bench, json!({ "command": ["cat"] })).await;
    let events = Events::of(&bench.caller, &session, None).await;
    let attached = Attached::to(&bench.caller, &session, "").await;
    let past = bench.caller.send("GET", &format!("{session}/output"), &[("accept", "text/event-stream")], "").await;
    assert_eq!((past.status.as_u16(), past.code().as_str()), (429, "too_many_streams"));
    for leaving in [Box::new(events) as Box<dyn Send>, Box::new(attached)] {
        drop(leaving);
        eventually("the place is free", async || {
            (Events::ask(&bench.caller, &session, None).await.status() == 200).then_some(())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn questions_that_make_no_sense_are_refused_or_read_as_the_original_does() {
    let bench = Workbench::start().await;
    let session = start(&bench, json!({ "command": "echo here; cat" })).await;
    printed(&bench.caller, &session, 5).await;
    for query in [
        "offset=0",
        "stream=stdout&offset=-1",
        "stream=stdout&offset=x",
        "stream=stdin",
        "max_bytes=x",
        "max_bytes=-1",
        "wait_ms=soon",
        "view=tail",
        "view=head_tail&bytes=x",
    ] {
        let answer = bench.caller.send("GET", &format!("{session}/output?{query}"), &[], "").await;
        assert_eq!((answer.status.as_u16(), answer.code().as_str()), (400, "bad_request"), "{query}");
    }
    for query in ["since=x", "since=-1", "since=", "max_bytes=0", "max_bytes=99999999999999999999999999"] {
        let answer = bench.caller.send("GET", &format!("{session}/output?{query}"), &[], "").await;
        if query.ends_with("999") {
            assert_eq!(answer.status, 400, "{query}");
        } else {
            assert_eq!(text(&answer.json()), "here\n", "{query}");
        }
    }
    for query in [format!("since={}", u64::MAX), format!("stream=stdout&offset={}", u64::MAX)] {
        let page = output(&bench.caller, &session, &query).await;
        assert_eq!((&page["chunks"], &page["session_alive"]), (&json!([]), &json!(true)), "{query}");
    }
    for body in [json!({ "data_b64": "a" }), json!({ "data_b64": "_-8=" }), json!({ "data_b64": "aGk" })] {
        let answer = bench.caller.post(&format!("{session}/stdin"), body).await;
        assert_eq!((answer.status.as_u16(), answer.code().as_str()), (400, "bad_base64"));
    }
    for body in ["{", "{} x", "[]", "{\"offset\":-1}", "{\"data_b64\":7}"] {
        let answer = bench.caller.send("POST", &format!("{session}/stdin"), &[], body).await;
        assert_eq!((answer.status.as_u16(), answer.code().as_str()), (400, "bad_request"), "{body}");
    }
    let answer = bench.caller.post(&format!("{session}/terminate"), json!({ "signal": "HUP" })).await;
    assert_eq!((answer.status.as_u16(), answer.code().as_str()), (400, "bad_request"));
    for query in ["view=head_tail", "stream=stdout&offset=0"] {
        let path = format!("{session}/output?{query}");
        let answer = bench.caller.send("GET", &path, &[("accept", "text/event-stream")], "").await;
        assert_eq!((answer.status.as_u16(), answer.code().as_str()), (400, "bad_request"), "{query}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cursor_of_stream_and_offset_is_exact_to_the_byte() {
    let bench = Workbench::start().await;
    let command = "for i in $(seq 300); do seq -s, $i $((i+200)); echo $i >&2; done";
    let session = start(&bench, json!({ "command": command })).await;
    let whole = bench.shell(json!({ "command": format!("({command}) 2>/dev/null") })).await;
    let whole = whole["stdout"].as_str().unwrap().as_bytes();
    let mut offset = 777;
    loop {
        let query = format!("stream=stdout&offset={offset}&max_bytes=5000&wait_ms=5000");
        let page = output(&bench.caller, &session, &query).await;
        for chunk in page["chunks"].as_array().unwrap() {
            assert_eq!((&chunk["stream"], &chunk["offset"]), (&json!("stdout"), &json!(offset)));
            let read = bytes(chunk);
            assert!(whole[offset..].starts_with(&read), "at {offset}");
            offset += read.len();
        }
        if page["session_alive"] == false {
            break;
        }
    }
    assert_eq!(offset, whole.len());
}

/// The calls of the existing Python client in its order (connectors-api.md §9).
#[tokio::test(flavor = "multi_thread")]
async fn the_python_client_spawns_writes_reads_and_terminates() {
    let bench = Workbench::start().await;
    let call = json!({
        "tool": "exec_command",
        "arguments": { "command": "while read line; do echo \"got $line\"; done", "environment_id": "box" },
    });
    let spawned = bench.caller.post("/api/connectors/envs/box/tool/call", call).await.json();
    assert_eq!(spawned["isError"], false, "{spawned}");
    let id = spawned["structuredContent"]["session_id"].as_str().unwrap();
    let told: Value = serde_json::from_str(spawned["content"][0]["text"].as_str().unwrap()).unwrap();
    assert_eq!(told["session_id"], id);
    let session = format!("/api/connectors/processes/{id}");

    let mut highest = 0;
    let mut read = String::new();
    for line in ["one", "two"] {
        assert_eq!(write(&bench.caller, &session, format!("{line}\n").as_bytes()).await.json()["ok"], true);
        eventually("the line comes back", async || {
            let page = output(&bench.caller, &session, &format!("since={highest}")).await;
            for chunk in page["chunks"].as_array().unwrap() {
                highest = highest.max(chunk["seq"].as_u64().unwrap());
            }
            read.push_str(&text(&page));
            assert_eq!((&page["exit_code"], &page["session_alive"]), (&Value::Null, &json!(true)));
            assert_eq!((&page["truncated"], &page["lost_bytes"]), (&json!(false), &json!(0)));
            read.ends_with(&format!("got {line}\n")).then_some(())
        })
        .await;
    }
    assert_eq!(read, "got one\ngot two\n");
    assert_eq!(bench.caller.post(&format!("{session}/terminate"), json!({})).await.json()["ok"], true);
    let last = output(&bench.caller, &session, &format!("since={highest}")).await;
    assert_eq!((&last["chunks"], &last["exit_code"], &last["session_alive"]), (&json!([]), &json!(137), &json!(false)));
    assert_eq!(text(&output(&bench.caller, &session, "since=0").await), read);
    let gone = output(&bench.caller, &session, &format!("since={highest}")).await;
    assert_eq!(gone["exit_code"], 137, "the end is told as often as it is asked for");
}
