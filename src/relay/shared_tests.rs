//! What callers of one shared socket see, and what its executor does, message by message.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use bytes::Bytes;
use proptest::prelude::*;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::shared::{Limits, RETENTION, Shared};
use crate::protocol::endpoint::{Endpoint, EndpointLimits};
use crate::protocol::frame::{Body, Data, Frame, StreamId};
use crate::protocol::ids::WorkspaceId;
use crate::protocol::rpc::ExecutorSessionId;

#[path = "../../protocol/fuzz/feed.rs"]
mod feeding;

const LIMITS: Limits =
    Limits { in_flight_max: 4, sessions_max: 8, message_bytes_max: 64 * 1024, frame_bytes_max: 4096 };

/// A shared socket with both its ends in the test's hands.
struct Rig {
    shared: Shared,
    now: Instant,
    ends: HashMap<String, (Endpoint, Endpoint)>,
    heard: HashMap<String, Vec<Value>>,
    reset: Vec<String>,
}

impl Rig {
    fn new() -> Self {
        Self::of(Some("secret"), false)
    }

    fn of(session: Option<&str>, adopts: bool) -> Self {
        let now = Instant::now();
        let environment = serde_json::value::to_raw_value(&json!({ "platformOs": "linux" })).unwrap();
        let session = session.map(ExecutorSessionId::new);
        let shared = Shared::new(LIMITS, session, Some(environment), adopts.then(|| now + RETENTION));
        Self { shared, now, ends: HashMap::new(), heard: HashMap::new(), reset: Vec::new() }
    }

    /// A stream of that workspace, not initialized.
    fn open(&mut self, stream: &str, workspace: &str) {
        self.shared.open_stream(id(stream), WorkspaceId::new(workspace).unwrap());
        let end = || Endpoint::new(EndpointLimits::default());
        self.ends.insert(stream.into(), (end(), end()));
    }

    /// A stream in a new session, or in the one to resume; gives the answer to `initialize`.
    fn initialize(&mut self, stream: &str, workspace: &str, resume: Option<&str>) -> Value {
        self.open(stream, workspace);
        let params = json!({ "clientName": "c", "resumeSessionId": resume });
        self.say(stream, &json!({ "id": "init", "method": "initialize", "params": params }));
        let answer = self.hear(stream).pop().unwrap();
        assert_eq!(answer["id"], "init");
        if answer["error"].is_null() {
            self.say(stream, &json!({ "method": "initialized" }));
        }
        answer
    }

    fn session(&mut self, stream: &str, workspace: &str) -> String {
        self.initialize(stream, workspace, None)["result"]["sessionId"].as_str().unwrap().to_owned()
    }

    fn say(&mut self, stream: &str, message: &Value) {
        self.say_bytes(stream, message.to_string().as_bytes());
    }

    fn say_bytes(&mut self, stream: &str, json: &[u8]) {
        let Some((sending, _)) = self.ends.get_mut(stream) else { return };
        let pieces: Vec<&[u8]> = json.chunks(1000).collect();
        let mut frames = Vec::new();
        for (index, piece) in pieces.iter().enumerate() {
            let (segment_index, segment_count) = (index as u32, pieces.len() as u32);
            let seq = sending.next_seq().unwrap();
            let data = Data { seq, segment_index, segment_count, payload: Bytes::copy_from_slice(piece) };
            frames.push(Frame { stream_id: id(stream), body: Body::Data(data) });
        }
        for frame in frames {
            self.shared.from_stream(frame, self.now);
        }
    }

    fn leave(&mut self, stream: &str) {
        self.ends.remove(stream);
        let body = Body::Reset { reason: "closed".into() };
        self.shared.from_stream(Frame { stream_id: id(stream), body }, self.now);
    }

    /// A request, and what of it reaches the executor at once.
    fn ask(&mut self, stream: &str, id: &str, method: &str, params: Value) -> Vec<Value> {
        self.say(stream, &json!({ "id": id, "method": method, "params": params }));
        self.socket()
    }

    /// All that may be written to the socket now.
    fn socket(&mut self) -> Vec<Value> {
        std::iter::from_fn(|| self.shared.next_for_socket(self.now))
            .map(|json| serde_json::from_slice(&json).unwrap())
            .collect()
    }

    fn executor(&mut self, message: &Value) {
        self.executor_bytes(message.to_string());
    }

    fn executor_bytes(&mut self, json: String) {
        self.shared.from_socket(&Bytes::from(json), self.now).unwrap();
    }

    /// All that has come for a stream since.
    fn hear(&mut self, stream: &str) -> Vec<Value> {
        while let Some(Frame { stream_id, body }) = self.shared.next_for_streams() {
            let name = stream_id.to_string();
            match body {
                Body::Reset { .. } => {
                    self.ends.remove(&name);
                    self.reset.push(name);
                }
                Body::Data(data) => {
                    assert!(data.payload.len() <= LIMITS.frame_bytes_max);
                    // What was under way when it left.
                    let Some((_, receiving)) = self.ends.get_mut(&name) else { continue };
                    receiving.receive(data).unwrap();
                    while let Some(json) = receiving.next() {
                        let message = serde_json::from_slice(&json).unwrap();
                        self.heard.entry(name.clone()).or_default().push(message);
                    }
                }
                other => panic!("{other:?}"),
            }
        }
        self.heard.remove(stream).unwrap_or_default()
    }

    fn later(&mut self, by: Duration) {
        self.now += by;
        self.shared.expire(self.now);
    }
}

fn id(stream: &str) -> StreamId {
    StreamId::new(stream).unwrap()
}

fn start(process: &str) -> Value {
    json!({ "processId": process, "argv": ["x"], "cwd": "file:///", "env": {}, "tty": false })
}

fn output(process: &Value, chunk: &str) -> Value {
    let params = json!({ "processId": process, "seq": 1, "stream": "stdout", "chunk": chunk });
    json!({ "method": "process/output", "params": params })
}

/// As executors write it: the members in their order.
fn written_output(process: &Value, chunk: &str) -> String {
    format!(
        r#"{{"method":"process/output","params":{{"processId":{process},"seq":1,"stream":"stdout","chunk":"{chunk}"}}}}"#
    )
}

fn code(answer: &Value) -> i64 {
    answer["error"]["code"].as_i64().unwrap_or_else(|| panic!("{answer}"))
}

#[test]
fn two_callers_of_one_name_have_two_processes_and_hear_of_their_own_alone() {
    let mut rig = Rig::new();
    rig.session("a", "w");
    rig.session("b", "w");
    let ours = rig.ask("a", "1", "process/start", start("p1")).remove(0);
    let theirs = rig.ask("b", "1", "process/start", start("p1")).remove(0);
    let (our_name, their_name) = (&ours["params"]["processId"], &theirs["params"]["processId"]);
    assert_ne!(our_name, their_name);
    assert_ne!(ours["id"], theirs["id"]);

    rig.executor(&json!({ "id": theirs["id"], "result": { "processId": their_name, "sandboxType": "none" } }));
    assert_eq!(rig.hear("a"), Vec::<Value>::new());
    assert_eq!(rig.hear("b"), [json!({ "id": "1", "result": { "processId": "p1", "sandboxType": "none" } })]);

    rig.executor(&output(our_name, "YQ=="));
    rig.executor_bytes(written_output(our_name, "YQ=="));
    rig.executor(&json!({ "method": "process/exited", "params": { "seq": 2, "processId": our_name, "exitCode": 0 } }));
    assert_eq!(
        rig.hear("a"),
        [
            output(&json!("p1"), "YQ=="),
            output(&json!("p1"), "YQ=="),
            json!({ "method": "process/exited", "params": { "seq": 2, "processId": "p1", "exitCode": 0 } }),
        ]
    );
    assert_eq!(rig.hear("b"), Vec::<Value>::new());
}

#[test]
fn ids_of_any_kind_come_back_as_they_were() {
    let mut rig = Rig::new();
    rig.session("a", "w");
    for own in [json!(7), json!(-1), json!("7"), json!("a\"b\n"), json!(i64::MAX)] {
        rig.say("a", &json!({ "id": own, "method": "environment/status", "params": null }));
        let sent = rig.socket().remove(0);
        assert_eq!((&sent["method"], &sent["params"]), (&json!("environment/status"), &Value::Null));
        // In the order of executors, and in another one.
        rig.executor_bytes(format!(r#"{{"id":{},"result":{{"status":"ready"}}}}"#, sent["id"]));
        rig.say("a", &json!({ "id": own, "method": "environment/status" }));
        let sent = rig.socket().remove(0);
        rig.executor_bytes(format!(r#"{{"result": {{"status":"ready"}}, "id": {}}}"#, sent["id"]));
        let answer = json!({ "id": own, "result": { "status": "ready" } });
        assert_eq!(rig.hear("a"), [answer.clone(), answer]);
    }
}

#[test]
fn names_in_refusals_are_the_callers() {
    let mut rig = Rig::new();
    rig.session("a", "w");
    let sent = rig.ask("a", "1", "process/start", start("p1")).remove(0);
    let name = sent["params"]["processId"].as_str().unwrap();
    let message = format!("process {name} already exists");
    rig.executor(&json!({ "error": { "code": -32600, "message": message }, "id": sent["id"] }));
    let refusal = json!({ "error": { "code": -32600, "message": "process p1 already exists" }, "id": "1" });
    assert_eq!(rig.hear("a"), [refusal]);
}

#[test]
fn requests_at_the_wrong_moment_are_answered_as_executors_do() {
    let mut rig = Rig::new();
    rig.open("a", "w");
    assert!(rig.ask("a", "1", "process/read", json!({ "processId": "p" })).is_empty());
    let initialize = json!({ "clientName": "c" });
    rig.ask("a", "2", "initialize", initialize.clone());
    rig.ask("a", "3", "process/read", json!({ "processId": "p" }));
    rig.say("a", &json!({ "method": "initialized", "params": {} }));
    assert!(rig.ask("a", "4", "initialize", initialize).is_empty());
    rig.say_bytes("a", b"{]");
    let heard = rig.hear("a");
    assert_eq!(heard[0]["error"]["message"], "client must call initialize before using exec methods");
    assert_eq!(heard[1]["result"]["environmentInfo"], json!({ "platformOs": "linux" }));
    assert_eq!(heard[2]["error"]["message"], "client must send initialized before using exec methods");
    assert_eq!(heard[3]["error"]["message"], "initialize may only be sent once per connection");
    assert_eq!((code(&heard[4]), &heard[4]["id"]), (-32600, &json!(-1)));
    assert_eq!(heard.len(), 5);
}

#[test]
fn what_would_end_an_executors_connection_ends_the_stream_alone() {
    let unasked = [
        json!({ "method": "initialized" }),
        json!({ "method": "process/forget", "params": {} }),
        json!({ "id": 1, "result": {} }),
        json!({ "id": 1, "error": { "code": 1, "message": "" } }),
    ];
    for message in unasked {
        let mut rig = Rig::new();
        rig.session("a", "w");
        rig.session("b", "w");
        rig.say("a", &message);
        assert!(rig.socket().is_empty(), "{message}");
        rig.hear("a");
        assert_eq!(rig.reset, ["a"], "{message}");
        assert_eq!(rig.ask("b", "1", "environment/status", json!({})).len(), 1);
    }
}

#[test]
fn parameters_in_which_a_name_could_hide_are_refused() {
    let mut rig = Rig::new();
    rig.session("a", "w");
    for (method, params) in [
        ("process/terminate", r#"["someone's"]"#),
        ("process/terminate", r#"{"processId":"mine","processId":"someone's"}"#),
        ("process/terminate", r#"{"processId":"mine","process\u0049d":"someone's"}"#),
        ("fs/close", r#"["someone's"]"#),
        ("http/request", r#"["GET"]"#),
    ] {
        rig.say_bytes("a", format!(r#"{{"id":1,"method":"{method}","params":{params}}}"#).as_bytes());
        assert!(rig.socket().is_empty(), "{params}");
        assert_eq!(code(&rig.hear("a")[0]), -32602, "{params}");
    }
    // Escapes alone hide nothing.
    rig.say_bytes("a", br#"{"id":1,"method":"process\/terminate","params":{"process\u0049d":"\u006dine"}}"#);
    let sent = rig.socket().remove(0);
    let name = sent["params"]["processId"].as_str().unwrap();
    assert!(name.len() > "mine".len() && name.ends_with(":mine"), "{sent}");
}

#[test]
fn a_read_never_holds_up_the_others() {
    let mut rig = Rig::new();
    rig.session("a", "w");
    let params = json!({ "waitMs": 30_000, "processId": "p", "afterSeq": 3, "maxBytes": null });
    let sent = rig.ask("a", "1", "process/read", params).remove(0);
    assert_eq!((&sent["params"]["waitMs"], &sent["params"]["afterSeq"]), (&json!(25), &json!(3)));
    let sent = rig.ask("a", "2", "process/read", json!({ "processId": "p", "waitMs": 0 })).remove(0);
    assert_eq!(sent["params"]["waitMs"], 0);
}

#[test]
fn file_handles_are_each_callers_own_bounded_and_closed_with_the_stream() {
    let mut rig = Rig::new();
    rig.session("a", "w");
    rig.session("b", "w");
    let open = |handle: &str| json!({ "handleId": handle, "path": "file:///f" });
    let sent = rig.ask("a", "1", "fs/open", open("h")).remove(0);
    let name = sent["params"]["handleId"].as_str().unwrap().to_owned();
    assert!(name.len() <= 32, "executors take no longer names");
    rig.executor(&json!({ "id": sent["id"], "result": { "handleId": name } }));
    assert_eq!(rig.hear("a"), [json!({ "id": "1", "result": { "handleId": "h" } })]);
    let block = json!({ "handleId": "h", "offset": 0, "len": 1 });
    let sent = rig.ask("a", "2", "fs/readBlock", block.clone()).remove(0);
    assert_eq!(sent["params"], json!({ "handleId": name, "offset": 0, "len": 1 }));
    rig.executor(&json!({ "error": { "code": -32004, "message": format!("no `{name}`") }, "id": sent["id"] }));
    assert_eq!(rig.hear("a")[0]["error"]["message"], "no `h`");

    assert!(rig.ask("b", "1", "fs/readBlock", block).is_empty());
    assert!(rig.ask("b", "2", "fs/close", json!({ "handleId": "h" })).is_empty());
    assert!(rig.ask("a", "3", "fs/open", open("h")).is_empty());
    let (theirs, ours) = (rig.hear("b"), rig.hear("a"));
    assert_eq!((code(&theirs[0]), &theirs[1]), (-32004, &json!({ "id": "2", "result": {} })));
    assert_eq!(ours[0]["error"]["message"], "file handle `h` already exists");

    for more in 1..32 {
        let sent = rig.ask("a", "x", "fs/open", open(&more.to_string())).remove(0);
        rig.executor(&json!({ "id": sent["id"], "result": { "handleId": sent["params"]["handleId"] } }));
    }
    assert!(rig.ask("a", "33", "fs/open", open("33")).is_empty());
    let refused = rig.hear("a").pop().unwrap();
    assert_eq!(refused["error"]["message"], "at most 32 file handles may be open per connection");

    // One that is opened only after its stream has ended is closed as well.
    let late = rig.ask("b", "3", "fs/open", open("late")).remove(0);
    rig.leave("b");
    rig.leave("a");
    let mut closed = 0;
    loop {
        let sent = rig.socket();
        if sent.is_empty() {
            break;
        }
        for chore in sent {
            assert_eq!(chore["method"], "fs/close");
            closed += 1;
            rig.executor(&json!({ "id": chore["id"], "result": {} }));
        }
    }
    // The late one is asked for at once, and again when it is known to be open.
    rig.executor(&json!({ "id": late["id"], "result": { "handleId": late["params"]["handleId"] } }));
    let again = rig.socket();
    assert_eq!((closed, &again[0]["params"]), (33, &json!({ "handleId": late["params"]["handleId"] })));
}

#[test]
fn watches_and_answers_in_pieces_reach_who_asked() {
    let mut rig = Rig::new();
    rig.session("a", "w");
    rig.session("b", "w");
    let watch = json!({ "watchId": 1, "missing": ["file:///f"], "present": null });
    let ours = rig.ask("a", "1", "fs/watchMissing", watch.clone()).remove(0);
    let theirs = rig.ask("b", "1", "fs/watchMissing", watch).remove(0);
    assert_ne!(ours["params"]["watchId"], theirs["params"]["watchId"]);
    let appeared = json!({ "method": "fs/missingChanged", "params": { "watchId": theirs["params"]["watchId"] } });
    rig.executor(&appeared);
    rig.executor(&appeared);
    assert_eq!(rig.hear("a"), Vec::<Value>::new());
    assert_eq!(rig.hear("b"), [json!({ "method": "fs/missingChanged", "params": { "watchId": 1 } })]);

    let get = json!({ "method": "GET", "url": "http://x/", "requestId": "r", "streamResponse": true });
    let ours = rig.ask("a", "2", "http/request", get.clone()).remove(0);
    let theirs = rig.ask("b", "2", "http/request", get).remove(0);
    assert_ne!(ours["params"]["requestId"], theirs["params"]["requestId"]);
    let delta =
        |request: &Value| json!({ "method": "http/request/bodyDelta", "params": { "requestId": request, "seq": 1 } });
    rig.executor(&delta(&theirs["params"]["requestId"]));
    assert_eq!(rig.hear("a"), Vec::<Value>::new());
    assert_eq!(rig.hear("b"), [delta(&json!("r"))]);
}

#[test]
fn what_the_executor_asks_is_answered_by_the_owner_of_the_process() {
    let mut rig = Rig::new();
    rig.session("a", "w");
    rig.session("b", "w");
    let started = rig.ask("a", "1", "process/start", start("p")).remove(0);
    let ask = |id: i64| {
        let params = json!({ "processId": started["params"]["processId"], "request": { "host": "h" } });
        json!({ "id": id, "method": "network/policyRequest", "params": params })
    };
    rig.executor(&ask(5));
    let heard = rig.hear("a");
    assert_eq!(heard[0]["params"], json!({ "processId": "p", "request": { "host": "h" } }));
    assert_eq!(rig.hear("b"), Vec::<Value>::new());
    let allow = json!({ "id": 5, "result": { "decision": { "type": "allow" } } });
    rig.say("a", &allow);
    assert_eq!(rig.socket(), std::slice::from_ref(&allow));
    rig.executor(&ask(6));
    rig.say("b", &json!({ "id": 6, "result": {} }));
    assert!(rig.socket().is_empty(), "somebody else's answer is none");
    rig.leave("a");
    let sent = rig.socket();
    assert!(sent[0]["error"].is_object() && sent[0]["id"] == 6, "{sent:?}");
}

#[test]
fn requests_take_turns_by_workspace_and_are_bounded_on_the_socket() {
    let mut rig = Rig::new();
    for (stream, workspace) in [("a1", "a"), ("a2", "a"), ("b", "b")] {
        rig.session(stream, workspace);
    }
    for stream in ["a1", "a2", "b"] {
        for number in 0..4 {
            let (id, params) = (format!("{stream}-{number}"), json!({ "s": stream }));
            rig.say(stream, &json!({ "id": id, "method": "environment/status", "params": params }));
        }
    }
    let mut order = Vec::new();
    let mut sent = rig.socket();
    assert_eq!(sent.len(), LIMITS.in_flight_max);
    while !sent.is_empty() {
        let first = sent.remove(0);
        order.push(first["params"]["s"].as_str().unwrap().to_owned());
        rig.executor(&json!({ "id": first["id"], "result": {} }));
        sent.extend(rig.socket());
    }
    assert_eq!(order, ["a1", "b", "a2", "b", "a1", "b", "a2", "b", "a1", "a2", "a1", "a2"]);
    for stream in ["a1", "a2", "b"] {
        let ids: Vec<Value> = rig.hear(stream).iter().map(|answer| answer["id"].clone()).collect();
        assert_eq!(ids, [0, 1, 2, 3].map(|number| json!(format!("{stream}-{number}"))));
    }
}

#[test]
fn a_stream_that_asks_without_end_is_reset_alone() {
    let mut rig = Rig::new();
    rig.session("a", "w");
    rig.session("b", "w");
    for _ in 0..LIMITS.in_flight_max {
        rig.ask("b", "1", "environment/status", json!({}));
    }
    for _ in 0..129 {
        rig.say("a", &json!({ "id": 1, "method": "environment/status" }));
    }
    rig.hear("a");
    assert_eq!(rig.reset, ["a"]);
    rig.session("c", "w");
    let large = json!({ "path": "file:///f", "dataBase64": "x".repeat(40_000) });
    rig.say("c", &json!({ "id": 1, "method": "fs/writeFile", "params": large }));
    rig.say("c", &json!({ "id": 2, "method": "fs/writeFile", "params": large }));
    rig.hear("c");
    assert_eq!(rig.reset, ["a", "c"]);
    assert_eq!(rig.ask("b", "1", "environment/status", json!({})), Vec::<Value>::new(), "and it still has its turn");
}

#[test]
fn a_session_is_resumed_by_its_workspace_within_its_time_and_nobody_else() {
    let mut rig = Rig::new();
    let session = rig.session("a", "w");
    assert!(!session.contains("secret"));
    let started = rig.ask("a", "1", "process/start", start("p")).remove(0);
    assert_eq!(code(&rig.initialize("b", "w", Some(&session))), -32010);
    rig.leave("a");
    assert_eq!(code(&rig.initialize("c", "other", Some(&session))), -32600);
    let mut forged = session.clone();
    forged.pop();
    forged.push(if session.ends_with('A') { 'Q' } else { 'A' });
    assert_eq!(code(&rig.initialize("d", "w", Some(&forged))), -32600);
    assert_eq!(code(&rig.initialize("e", "w", Some("secret"))), -32600);

    rig.later(RETENTION - Duration::from_secs(1));
    rig.executor(&output(&started["params"]["processId"], "YQ=="));
    let resumed = rig.initialize("f", "w", Some(&session));
    assert_eq!(resumed["result"]["sessionId"], session.as_str());
    let read = rig.ask("f", "1", "process/read", json!({ "processId": "p" })).remove(0);
    assert_eq!(read["params"]["processId"], started["params"]["processId"]);
    rig.executor(&output(&started["params"]["processId"], "Yg=="));
    assert_eq!(rig.hear("f"), [output(&json!("p"), "Yg==")]);
}

#[test]
fn what_nobody_takes_up_again_is_ended_in_its_time() {
    let mut rig = Rig::new();
    let session = rig.session("a", "w");
    let runs = rig.ask("a", "1", "process/start", start("runs")).remove(0);
    let over = rig.ask("a", "2", "process/start", start("over")).remove(0);
    let refused = rig.ask("a", "3", "process/start", start("refused")).remove(0);
    rig.executor(
        &json!({ "method": "process/closed", "params": { "processId": over["params"]["processId"], "seq": 9 } }),
    );
    rig.executor(&json!({ "error": { "code": -32603, "message": "" }, "id": refused["id"] }));
    rig.leave("a");
    assert_eq!(rig.shared.deadline(), Some(rig.now + RETENTION));
    rig.later(RETENTION);
    let ended: Vec<Value> = rig.socket().iter().map(|sent| json!([sent["method"], sent["params"]])).collect();
    assert_eq!(ended, [json!(["process/terminate", { "processId": runs["params"]["processId"] }])]);
    assert_eq!(code(&rig.initialize("b", "w", Some(&session))), -32600);
}

#[test]
fn sessions_outlive_the_socket_and_their_bound_is_kept() {
    let mut rig = Rig::new();
    let session = rig.session("a", "w");
    let started = rig.ask("a", "1", "process/start", start("p")).remove(0);
    rig.shared.disconnect(rig.now);
    assert_eq!(rig.shared.kept_until(), Some(rig.now + RETENTION));
    assert!(rig.socket().is_empty());
    for stream in 1..LIMITS.sessions_max {
        rig.session(&format!("s{stream}"), "w");
    }
    rig.open("full", "w");
    rig.ask("full", "1", "initialize", json!({ "clientName": "c" }));
    assert_eq!(code(&rig.hear("full")[0]), -32600);
    // One that nothing runs in gives way.
    rig.leave("s3");
    rig.session("next", "w");
    assert_eq!(rig.initialize("again", "w", Some(&session))["result"]["sessionId"], session.as_str());
    rig.executor(&output(&started["params"]["processId"], "YQ=="));
    assert_eq!(rig.hear("again").len(), 1);
}

#[test]
fn silent_processes_of_another_gateway_process_are_ended_unless_they_are_taken_up() {
    let mut before = Rig::new();
    let session = before.session("a", "w");
    let kept = before.ask("a", "1", "process/start", start("p")).remove(0);
    before.session("b", "w");
    let left = before.ask("b", "1", "process/start", start("p")).remove(0);
    assert!(before.shared.take_started() && !before.shared.take_started());
    let processes = before.shared.processes(10);
    assert_eq!((processes.len(), before.shared.processes(1).len()), (2, 1));

    let mut after = Rig::of(Some("secret"), true);
    after.shared.adopt(&processes);
    after.shared.adopt(&["no name of ours".into()]);
    assert_eq!(after.initialize("a", "w", Some(&session))["result"]["sessionId"], session.as_str());
    after.later(RETENTION);
    let ended: Vec<_> = after.socket().iter().map(|message| message["params"]["processId"].clone()).collect();
    assert_eq!(ended, [left["params"]["processId"].clone()]);
    assert_eq!(after.shared.processes(10), [kept["params"]["processId"].as_str().unwrap()]);
}

#[test]
fn an_executor_without_sessions_gives_none_and_nothing_outlives_its_socket() {
    let mut rig = Rig::of(None, false);
    let answer = rig.initialize("a", "w", None);
    assert_eq!(answer["result"], json!({ "environmentInfo": { "platformOs": "linux" } }));
    rig.ask("a", "1", "process/start", start("p"));
    rig.shared.disconnect(rig.now);
    assert_eq!(rig.shared.kept_until(), None);
    assert_eq!(code(&rig.initialize("b", "w", Some("0123456789abcdef:AAAAAAAAAAAAAAAAAAAAAA"))), -32600);
}

#[test]
fn another_gateway_process_believes_the_sessions_of_the_one_before_for_a_time() {
    let mut before = Rig::new();
    let session = before.session("a", "w");
    let started = before.ask("a", "1", "process/start", start("p")).remove(0);
    let strays = before.session("b", "w");
    let stray = before.ask("b", "1", "process/start", start("stray")).remove(0);
    let name = &started["params"]["processId"];

    let mut after = Rig::of(Some("secret"), true);
    after.executor_bytes(written_output(&stray["params"]["processId"], "YQ=="));
    assert_eq!(after.initialize("a", "w", Some(&session))["result"]["sessionId"], session.as_str());
    after.executor_bytes(written_output(name, "YQ=="));
    assert_eq!(after.hear("a"), [output(&json!("p"), "YQ==")]);
    assert_eq!(after.ask("a", "1", "process/read", json!({ "processId": "p" }))[0]["params"]["processId"], *name);
    after.later(RETENTION);
    let ended = after.socket();
    assert_eq!((ended.len(), &ended[0]["params"]), (1, &json!({ "processId": stray["params"]["processId"] })));
    assert_eq!(code(&after.initialize("b", "w", Some(&strays))), -32600);
    // What only now is heard of has nobody any more.
    after.executor(&output(&json!("00000000000000ff:late"), "YQ=="));
    assert_eq!(after.socket()[0]["params"], json!({ "processId": "00000000000000ff:late" }));
    assert_eq!(code(&Rig::of(Some("another"), true).initialize("a", "w", Some(&session))), -32600);
}

#[test]
fn a_write_that_holds_up_the_others_ends_the_socket_once() {
    let mut rig = Rig::new();
    let session = rig.session("a", "w");
    rig.session("b", "w");
    let write = json!({ "processId": "p", "chunk": "YQ==", "writeId": "w" });
    rig.ask("a", "1", "process/start", start("p")).iter().for_each(|sent| {
        rig.shared.from_socket(&Bytes::from(json!({ "id": sent["id"], "result": {} }).to_string()), rig.now).unwrap();
    });
    assert_eq!(rig.ask("a", "2", "process/write", write.clone()).len(), 1);
    rig.now += Duration::from_secs(60);
    assert!(!rig.shared.is_stalled(rig.now), "nobody else wants anything");
    rig.ask("b", "1", "environment/status", json!({}));
    assert!(rig.shared.is_stalled(rig.now));

    rig.shared.disconnect(rig.now);
    rig.initialize("c", "w", Some(&session));
    assert!(rig.ask("c", "3", "process/write", write).is_empty());
    assert_eq!(rig.hear("c"), [json!({ "id": "3", "result": { "status": "starting" } })]);
    let other = json!({ "processId": "q", "chunk": "YQ==", "writeId": "w" });
    assert_eq!(rig.ask("c", "4", "process/write", other).len(), 1);
}

#[test]
fn large_answers_are_cut_into_frames() {
    let mut rig = Rig::new();
    rig.session("a", "w");
    let sent = rig.ask("a", "1", "fs/readFile", json!({ "path": "file:///f" })).remove(0);
    let content = "x".repeat(3 * LIMITS.frame_bytes_max + 7);
    rig.executor_bytes(format!(r#"{{"id":{},"result":{{"dataBase64":"{content}"}}}}"#, sent["id"]));
    assert_eq!(rig.hear("a"), [json!({ "id": "1", "result": { "dataBase64": content } })]);
}

#[test]
fn what_an_executor_could_not_read_never_reaches_it() {
    let mut rig = Rig::new();
    rig.session("a", "w");
    let deep = "[".repeat(200) + &"]".repeat(200);
    for unreadable in [r#""\ud800""#, "1e999", &deep, "\"\u{1}\""] {
        for method in ["process/read", "fs/close", "environment/status"] {
            let params = format!(r#"{{"processId":{unreadable},"handleId":{unreadable}}}"#);
            rig.say_bytes("a", format!(r#"{{"id":7,"method":"{method}","params":{params}}}"#).as_bytes());
            assert_eq!(rig.socket(), Vec::<Value>::new(), "{unreadable}");
            let heard = rig.hear("a");
            assert_eq!((heard.len(), code(&heard[0]), &heard[0]["id"]), (1, -32600, &json!(-1)), "{unreadable}");
        }
    }
    let sent = rig.ask("a", "1", "process/start", start("p")).remove(0);
    let tag = sent["params"]["processId"].as_str().unwrap().trim_end_matches('p').to_owned();
    rig.executor_bytes(format!(r#"{{"method":"process/exited","params":{{"processId":"{tag}\ud800"}}}}"#));
    assert_eq!(rig.hear("a"), Vec::<Value>::new(), "a name that cannot be read is nobody's");
}

/// Each line is what the caller says, or after an `x` the executor; `@` stands for what is before the caller's names.
#[test]
fn whatever_a_caller_and_the_executor_say_a_neighbour_is_served() {
    let corpus = [
        r#"{"id":1,"method":"process/start","params":{"processId":"q","argv":["x"],"cwd":"file:///","env":{}}}
x{"id":3,"result":{"processId":"@q"}}
x{"method":"process/output","params":{"processId":"@q","seq":1,"stream":"stdout","chunk":"YQ=="}}
x{"method":"process/closed","params":{"processId":"@q","seq":2}}"#,
        r#"{"id":"1","method":"fs/open","params":{"handleId":"h","path":"file:///f"}}
x{"id":3,"error":{"code":-1,"message":"@h"}}
{"id":2,"method":"fs/readBlock","params":{"handleId":"\ud83d\ude00"}}"#,
        r#"{"id":4,"method":"process/write","params":{"processId":"\u0070","chunk":"YQ==","writeId":"w"}}
{"id":5,"method":"process/read","params":{"processId":"p","waitMs":60000,"afterSeq":1.5e300}}"#,
        r#"{"id":6,"method":"fs/watchMissing","params":{"watchId":1}}
x{"method":"fs/appeared","params":{"watchId":1}}
{"id":7,"method":"http/request","params":{"requestId":"r"}}
x{"method":"http/request/bodyDelta","params":{"requestId":"@r"}}"#,
        r#"x{"id":9,"method":"process/ask","params":{"processId":"@p"}}
{"id":9,"result":{"deep":[[[{}]]]}}"#,
    ];
    feeding::feed(corpus.map(|text| text.as_bytes().to_vec()).into(), 2_000, |input| {
        let mut rig = Rig::new();
        let [ours, theirs] = ["a", "b"].map(|stream| {
            rig.session(stream, stream);
            let sent = rig.ask(stream, "1", "process/start", start("p")).remove(0);
            rig.executor(&json!({ "id": sent["id"], "result": {} }));
            assert_eq!(rig.hear(stream).len(), 1);
            sent["params"]["processId"].as_str().unwrap().trim_end_matches('p').to_owned()
        });
        for line in input.split(|byte| *byte == b'\n') {
            match line.strip_prefix(b"x") {
                Some(said) => {
                    let cut: Vec<&[u8]> = said.split(|byte| *byte == b'@').collect();
                    let _ = rig.shared.from_socket(&cut.join(ours.as_bytes()).into(), rig.now);
                }
                None => rig.say_bytes("a", line),
            }
            while let Some(frame) = rig.shared.next_for_streams() {
                assert!(frame.stream_id == id("a"), "what concerns one caller is told to that one: {frame:?}");
                if let Body::Reset { .. } = frame.body {
                    rig.ends.remove("a");
                }
            }
            // Reads each to the bottom, as executors do, and answers.
            for sent in rig.socket() {
                let name = sent["params"]["processId"].as_str().unwrap_or_default();
                assert!(!name.starts_with(&theirs), "{sent}");
                rig.executor(&json!({ "id": sent["id"], "error": { "code": -1, "message": "no" } }));
            }
        }
        rig.hear("");
        assert_eq!(rig.ask("b", "2", "environment/status", json!({})).len(), 1);
    });
}

/// What a caller, the executor, or time does next. Numbers choose among what there is.
#[derive(Debug, Clone)]
enum Step {
    Open(u8),
    Resume(u8, u8),
    Start(u8, u8),
    Terminate(u8, u8),
    Leave(u8),
    Answer(u8),
    Print(u8),
    Close(u8),
    Cut,
    Wait(u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        2 => (0..6u8).prop_map(Step::Open),
        2 => (0..6u8, any::<u8>()).prop_map(|(stream, session)| Step::Resume(stream, session)),
        6 => (0..6u8, 0..3u8).prop_map(|(stream, process)| Step::Start(stream, process)),
        2 => (0..6u8, 0..3u8).prop_map(|(stream, process)| Step::Terminate(stream, process)),
        2 => (0..6u8).prop_map(Step::Leave),
        8 => any::<u8>().prop_map(Step::Answer),
        6 => any::<u8>().prop_map(Step::Print),
        2 => any::<u8>().prop_map(Step::Close),
        1 => Just(Step::Cut),
        1 => (0..60u8).prop_map(Step::Wait),
    ]
}

/// An executor that keeps processes by the names it is given, and remembers who wanted them.
#[derive(Default)]
struct Machine {
    processes: BTreeMap<String, String>,
    /// Names of those that are over: they are kept for a while.
    over: Vec<String>,
    asked: Vec<Value>,
}

impl Machine {
    fn answer(&mut self, request: &Value) -> Value {
        let name = request["params"]["processId"].as_str().unwrap().to_owned();
        match request["method"].as_str().unwrap() {
            "process/start" if self.processes.contains_key(&name) || self.over.contains(&name) => {
                let message = format!("process {name} already exists");
                json!({ "error": { "code": -32600, "message": message }, "id": request["id"] })
            }
            "process/start" => {
                self.processes.insert(name.clone(), request["params"]["argv"][0].as_str().unwrap().to_owned());
                json!({ "id": request["id"], "result": { "processId": name } })
            }
            _ => {
                let running = self.processes.remove(&name).is_some();
                self.over.extend(running.then_some(name));
                json!({ "id": request["id"], "result": { "running": running } })
            }
        }
    }
}

proptest! {
    /// Every request is answered once, to who asked; every notification reaches the session that started the process;
    /// and in the end no process is left.
    #[test]
    fn callers_are_apart_whatever_happens(steps in prop::collection::vec(step(), 1..120)) {
        let mut rig = Rig::new();
        let mut machine = Machine::default();
        // Stream → its session; session → its owner's mark.
        let mut streams: BTreeMap<String, usize> = BTreeMap::new();
        let mut sessions: Vec<(String, &str)> = Vec::new();
        let mut waiting: HashMap<String, String> = HashMap::new();
        let mut requests = 0;
        for step in steps {
            let stream_of = |number: u8| (format!("s{number}"), if number.is_multiple_of(2) { "even" } else { "odd" });
            match step {
                Step::Open(number) => {
                    let (stream, workspace) = stream_of(number);
                    let free = !streams.contains_key(&stream);
                    if free {
                        let answer = rig.initialize(&stream, workspace, None);
                        if let Some(session) = answer["result"]["sessionId"].as_str() {
                            sessions.push((session.to_owned(), workspace));
                            streams.insert(stream, sessions.len() - 1);
                        } else {
                            rig.leave(&stream);
                        }
                    }
                }
                Step::Resume(number, session) => {
                    let (stream, workspace) = stream_of(number);
                    if !streams.contains_key(&stream) && !sessions.is_empty() {
                        let index = session as usize % sessions.len();
                        let (session, owner) = sessions[index].clone();
                        let answer = rig.initialize(&stream, workspace, Some(&session));
                        let attached = streams.values().any(|held| *held == index);
                        if answer["error"].is_null() {
                            prop_assert!(owner == workspace && !attached);
                            streams.insert(stream, index);
                        } else {
                            rig.leave(&stream);
                        }
                    }
                }
                Step::Start(number, process) | Step::Terminate(number, process) => {
                    let (stream, _) = stream_of(number);
                    if let Some(session) = streams.get(&stream) {
                        requests += 1;
                        let id = format!("r{requests}");
                        waiting.insert(id.clone(), stream.clone());
                        let process = format!("p{process}");
                        let mark = format!("{session}/{process}");
                        let (method, params) = match step {
                            Step::Start(..) => ("process/start", json!({ "processId": process, "argv": [mark] })),
                            _ => ("process/terminate", json!({ "processId": process })),
                        };
                        rig.say(&stream, &json!({ "id": id, "method": method, "params": params }));
                    }
                }
                Step::Leave(number) => {
                    let (stream, _) = stream_of(number);
                    if streams.remove(&stream).is_some() {
                        rig.leave(&stream);
                        waiting.retain(|_, of| *of != stream);
                    }
                }
                Step::Answer(which) => {
                    if !machine.asked.is_empty() {
                        let request = machine.asked.remove(which as usize % machine.asked.len());
                        let answer = machine.answer(&request);
                        rig.executor(&answer);
                    }
                }
                Step::Print(which) | Step::Close(which) => {
                    let count = machine.processes.len();
                    if count > 0 {
                        let (name, mark) = machine.processes.iter().nth(which as usize % count).unwrap();
                        let (name, mark) = (name.clone(), mark.clone());
                        if let Step::Print(_) = step {
                            rig.executor_bytes(written_output(&json!(name), &mark));
                        } else {
                            machine.processes.remove(&name);
                            machine.over.push(name.clone());
                            let params = json!({ "processId": name, "seq": 9, "mark": mark });
                            rig.executor(&json!({ "method": "process/closed", "params": params }));
                        }
                    }
                }
                Step::Cut => {
                    rig.shared.disconnect(rig.now);
                    rig.ends.clear();
                    streams.clear();
                    waiting.clear();
                    // What it was asked it does all the same.
                    for request in std::mem::take(&mut machine.asked) {
                        machine.answer(&request);
                    }
                }
                Step::Wait(seconds) => rig.later(Duration::from_secs(seconds.into())),
            }
            let sent = rig.socket();
            machine.asked.extend(sent);
            prop_assert!(machine.asked.len() <= LIMITS.in_flight_max);
            rig.hear("");
            prop_assert!(rig.reset.is_empty());
            for (stream, messages) in std::mem::take(&mut rig.heard) {
                for message in messages {
                    if let Some(id) = message["id"].as_str() {
                        prop_assert_eq!(waiting.remove(id), Some(stream.clone()), "{}", message);
                        if let Some(error) = message["error"]["message"].as_str() {
                            prop_assert!(error.starts_with("process p"), "{}", error);
                        }
                    } else {
                        let mark = message["params"]["chunk"].as_str().or(message["params"]["mark"].as_str()).unwrap();
                        let own = format!("{}/{}", streams[&stream], message["params"]["processId"].as_str().unwrap());
                        prop_assert_eq!(mark, own);
                    }
                }
            }
        }
        let left: Vec<String> = streams.into_keys().collect();
        for stream in left {
            rig.leave(&stream);
        }
        // Until nothing is under way, and then for as long as sessions are kept.
        for wait in [Duration::ZERO, RETENTION] {
            rig.later(wait);
            loop {
                let sent = rig.socket();
                machine.asked.extend(sent);
                let Some(request) = machine.asked.pop() else { break };
                let answer = machine.answer(&request);
                rig.executor(&answer);
            }
        }
        prop_assert_eq!(machine.processes, BTreeMap::new());
    }
}
