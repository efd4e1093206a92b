//! Restarts under load: callers and harnesses that try again at nothing but a 503 with `Retry-After`, and dial again at
//! nothing but the close code 1012, while the daemon is stopped and started on a socket that stays open.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::task::{JoinHandle, JoinSet};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_util::sync::CancellationToken;

use crate::sessions::sha256;
use crate::support::gateway::environment;
use crate::support::harness::dial;
use crate::support::{Answer, Caller, CodexExecutor, DaemonProcess, PATIENCE, Scratch, eventually};

const EXECUTORS: usize = 2;

/// What goes on all the time; whatever else is counted happens now and then.
const KINDS: [&str; 6] = ["list", "shell", "output", "attached", "stdin", "harness"];

#[tokio::test(flavor = "multi_thread")]
async fn no_call_fails_and_no_byte_is_lost_while_the_gateway_is_restarted() {
    Run { restarts: 2, life: Duration::ZERO, crowd: 1, pause: Duration::from_millis(30), activator: None }.go().await;
}

/// `make test-restart`, since it takes minutes: links live for 35 s between restarts, for the pause of an executor that
/// dials again doubles after shorter ones.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes three minutes"]
async fn no_call_fails_over_four_restarts_by_socket_activation_under_hundreds_of_calls_a_second() {
    let activator = Some("systemd-socket-activate");
    Run { restarts: 4, life: Duration::from_secs(35), crowd: 4, pause: Duration::from_millis(10), activator }
        .go()
        .await;
}

/// How often the daemon is restarted, and what goes on meanwhile.
struct Run {
    restarts: usize,
    /// From the moment at which all goes on again to the next restart.
    life: Duration,
    /// Workers of each kind, for each executor.
    crowd: usize,
    /// Between two calls of a worker.
    pause: Duration,
    /// A program that hands the listening socket on, as in [`DaemonProcess::start_on`].
    activator: Option<&'static str>,
}

/// What became of the calls of one kind.
#[derive(Default, Clone)]
struct Count {
    answered: usize,
    /// Answers 503 with `Retry-After`, and sockets closed by 1012.
    again: usize,
    slowest: Duration,
}

#[derive(Default)]
struct Tally {
    counts: Mutex<BTreeMap<&'static str, Count>>,
    failures: Mutex<Vec<String>>,
}

impl Tally {
    fn count(&self, kind: &'static str, change: impl FnOnce(&mut Count)) {
        change(self.counts.lock().unwrap().entry(kind).or_default());
    }

    fn answered(&self, kind: &'static str, since: Instant) {
        self.count(kind, |count| {
            count.answered += 1;
            count.slowest = count.slowest.max(since.elapsed());
        });
    }

    fn again(&self, kind: &'static str) {
        self.count(kind, |count| count.again += 1);
    }

    fn failed(&self, kind: &str, what: impl std::fmt::Display) {
        self.failures.lock().unwrap().push(format!("{kind}: {what}"));
    }

    fn counts(&self) -> BTreeMap<&'static str, Count> {
        self.counts.lock().unwrap().clone()
    }

    /// Waits until further calls of every kind were answered.
    async fn goes_on(&self) {
        let answered = |kind: &&str| self.counts().get(kind).map_or(0, |count| count.answered);
        let before = KINDS.map(|kind| answered(&kind));
        eventually("calls of every kind are answered", async || {
            KINDS.iter().zip(before).all(|(kind, before)| answered(kind) >= before + 5).then_some(())
        })
        .await;
    }
}

impl Run {
    async fn go(self) {
        let (state, held) = (Scratch::new(), TcpListener::bind("127.0.0.1:0").unwrap());
        // A program that hands the socket on waits for a first connection.
        let first = TcpStream::connect(held.local_addr().unwrap()).await.unwrap();
        let mut daemon = DaemonProcess::start_on(&state, &held, self.activator).await;
        drop(first);
        let (mut executors, mut caller) = (Vec::new(), None);
        for nth in 0..EXECUTORS {
            let name = format!("box{nth}");
            let (other, credentials) = environment(&state, &daemon, &name).await;
            let caller = caller.get_or_insert(other);
            let url = format!("http://{}", daemon.address);
            let executor = CodexExecutor::connected(&url, &credentials, caller, &name).await;
            executors.push((name, executor, credentials.executor));
        }
        let client = Client {
            caller: caller.unwrap(),
            tally: Arc::default(),
            stop: CancellationToken::new(),
            pause: self.pause,
        };
        let mut before = Vec::new();
        for (name, ..) in &executors {
            before.push(client.native_executor(name).await);
        }

        let mut workers = JoinSet::new();
        for (name, executor, id) in &executors {
            for _ in 0..self.crowd {
                let end = executor.home().join("end");
                workers.spawn(client.clone().lists());
                workers.spawn(client.clone().shells(name.clone()));
                workers.spawn(client.clone().reads(name.clone(), end));
                workers.spawn(client.clone().writes(name.clone()));
                workers.spawn(client.clone().harness(id.clone()));
            }
        }
        let started = Instant::now();
        let mut away = Duration::ZERO;
        for nth in 0..self.restarts {
            client.tally.goes_on().await;
            tokio::time::sleep(self.life).await;
            let long = client.clone().long_call(&executors[0], nth).await;
            let readiness = tokio::spawn(readiness(Caller::new(daemon.ops, None)));
            assert_eq!(daemon.terminate().await, Some(0));
            let gone = Instant::now();
            daemon = DaemonProcess::start_on(&state, &held, self.activator).await;
            away = away.max(gone.elapsed());
            let said = readiness.await.unwrap();
            assert!(said.last() == Some(&503) && said.is_sorted(), "ready, then not, to the end: {said:?}");
            assert_eq!(Caller::new(daemon.ops, None).send("GET", "/readyz", &[], "").await.status, 200);
            long.await.unwrap();
        }
        client.tally.goes_on().await;
        let took = started.elapsed();

        client.stop.cancel();
        for (_, executor, _) in &executors {
            std::fs::write(executor.home().join("end"), "").unwrap();
        }
        while let Some(worker) = workers.join_next().await {
            worker.unwrap();
        }
        let (counts, failures) = (client.tally.counts(), client.tally.failures.lock().unwrap().clone());
        for (kind, Count { answered, again, slowest }) in &counts {
            println!("{kind:>16}: {answered:6} answered, {again:4} tried again, slowest {slowest:.2?}");
        }
        // A message to one who is attached is no call.
        let calls = counts.iter().filter(|(kind, _)| **kind != "attached");
        let all: usize = calls.map(|(_, count)| count.answered).sum();
        let rate = all as f64 / took.as_secs_f64();
        println!(
            "{} restarts in {took:.1?}: {all} calls, {rate:.0} a second, {} failed",
            self.restarts,
            failures.len()
        );
        println!("nobody listened for {away:.2?} at most");
        assert_eq!(failures, Vec::<String>::new());
        for ((name, executor, _), before) in executors.iter_mut().zip(before) {
            assert!(executor.is_running(), "{name} is lost");
            assert_eq!(client.native_executor(name).await, before, "{name} is the same process");
        }
    }
}

/// What the operators' door says until it is gone.
async fn readiness(operator: Caller) -> Vec<u16> {
    let mut said = Vec::new();
    while let Ok(answer) = operator.try_send("GET", "/readyz", &[], "").await {
        said.push(answer.status.as_u16());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    said
}

/// One that calls until it is told to stop.
#[derive(Clone)]
struct Client {
    caller: Caller,
    tally: Arc<Tally>,
    stop: CancellationToken,
    pause: Duration,
}

impl Client {
    /// Whether there is another call to make.
    async fn goes_on(&self) -> bool {
        tokio::time::sleep(self.pause).await;
        !self.stop.is_cancelled()
    }

    /// One call; it is sent again only after a 503 with `Retry-After`. Anything but 200 is a failure, and nothing.
    async fn call(&self, kind: &'static str, method: &str, path: &str, body: &str) -> Option<Value> {
        let since = Instant::now();
        loop {
            let answer = match self.caller.try_send(method, path, &[], body.to_owned()).await {
                Ok(answer) => answer,
                Err(error) => {
                    self.tally.failed(kind, format!("{error:?}"));
                    return None;
                }
            };
            let Answer { status, .. } = &answer;
            match answer.header("retry-after").and_then(|secs| secs.parse().ok()) {
                Some(secs) if *status == 503 => {
                    self.tally.again(kind);
                    tokio::time::sleep(Duration::from_secs(secs)).await;
                }
                _ if *status == 200 => {
                    self.tally.answered(kind, since);
                    return Some(answer.json());
                }
                _ => {
                    self.tally.failed(kind, format!("{answer:?}"));
                    return None;
                }
            }
        }
    }

    async fn tool(&self, kind: &'static str, name: &str, tool: &str, arguments: Value) -> Value {
        let body = json!({ "tool": tool, "arguments": arguments }).to_string();
        let answer = self.call(kind, "POST", &format!("/api/connectors/envs/{name}/tool/call"), &body).await;
        let answer = answer.unwrap_or_default();
        if answer["isError"] != false {
            self.tally.failed(kind, &answer);
        }
        answer["structuredContent"].clone()
    }

    /// The process id of the native executor.
    async fn native_executor(&self, name: &str) -> Value {
        self.tool("shell", name, "shell", json!({ "command": "echo $PPID" })).await["stdout"].clone()
    }

    /// Starts a session; gives its path.
    async fn session(&self, name: &str, command: &str) -> String {
        let session = self.tool("exec_command", name, "exec_command", json!({ "command": command })).await;
        format!("/api/connectors/processes/{}", session["session_id"].as_str().unwrap())
    }

    async fn lists(self) {
        while self.goes_on().await {
            self.call("list", "POST", "/api/connectors/envs/list", "{}").await;
        }
    }

    async fn shells(self, name: String) {
        for nth in 0.. {
            if !self.goes_on().await {
                return;
            }
            let said = self.tool("shell", &name, "shell", json!({ "command": format!("echo {nth}") })).await;
            if said["stdout"] != format!("{nth}\n") || said["exit_code"] != 0 {
                self.tally.failed("shell", format!("{nth}: {said}"));
            }
        }
    }

    /// A call that outlives the beginning of the drain. It runs when this returns.
    async fn long_call(self, (name, executor, _): &(String, CodexExecutor, String), nth: usize) -> JoinHandle<()> {
        let (name, begun) = (name.clone(), executor.home().join(format!("begun-{nth}")));
        let command = format!("touch {}; sleep 1; echo done", begun.display());
        let call = tokio::spawn(async move {
            let said = self.tool("long call", &name, "shell", json!({ "command": command })).await;
            if said["stdout"] != "done\n" {
                self.tally.failed("long call", said);
            }
        });
        eventually("the long call runs", async || begun.exists().then_some(())).await;
        call
    }

    /// One session that prints until there is a file called `end`, read by pages and attached at the same time.
    async fn reads(self, name: String, end: std::path::PathBuf) {
        let command = format!("i=0; while [ ! -e {} ]; do i=$((i+1)); echo $i; sleep 0.02; done", end.display());
        let session = self.session(&name, &command).await;
        let (polled, attached) = tokio::join!(self.poll(&session), self.attached(&session));
        let lines = polled.iter().filter(|byte| **byte == b'\n').count();
        let wanted: String = (1..=lines).map(|line| format!("{line}\n")).collect();
        for (kind, read) in [("output", polled), ("attached", attached)] {
            if read != wanted.as_bytes() {
                self.tally.failed(kind, format!("{} bytes instead of the {} printed", read.len(), wanted.len()));
            }
        }
    }

    /// What a session prints, page by page to its end.
    async fn poll(&self, session: &str) -> Vec<u8> {
        let (mut read, mut since) = (Vec::new(), 0);
        loop {
            tokio::time::sleep(self.pause).await;
            let path = format!("{session}/output?since={since}&wait_ms=2000");
            let Some(page) = self.call("output", "GET", &path, "").await else { continue };
            for chunk in page["chunks"].as_array().unwrap() {
                take(chunk, &mut since, &mut read);
            }
            if page["session_alive"] == false {
                if page["exit"]["streams"]["stdout"]["sha256"] != sha256(&read) {
                    self.tally.failed("output", format!("{} bytes read, and {}", read.len(), page["exit"]));
                }
                return read;
            }
        }
    }

    /// What a session prints, over a WebSocket.
    async fn attached(&self, session: &str) -> Vec<u8> {
        let (mut read, mut since) = (Vec::new(), 0);
        loop {
            let mut socket = self.dial("attached", &format!("{session}/attach?since={since}")).await;
            while let Some(message) = self.hear("attached", &mut socket).await {
                match message["type"].as_str() {
                    Some("chunk") => {
                        take(&message, &mut since, &mut read);
                        self.tally.answered("attached", Instant::now());
                    }
                    Some("exit") => return read,
                    _ => self.tally.failed("attached", message),
                }
            }
        }
    }

    /// A session that is fed piece by piece, each under its offset, and repeats what it gets.
    async fn writes(self, name: String) {
        let session = self.session(&name, "cat").await;
        let mut written = Vec::new();
        while self.goes_on().await {
            let piece = format!("piece at {}\n", written.len());
            let body = json!({ "data_b64": STANDARD.encode(&piece), "offset": written.len() }).to_string();
            let answer = self.call("stdin", "POST", &format!("{session}/stdin"), &body).await.unwrap_or_default();
            written.extend_from_slice(piece.as_bytes());
            if answer["accepted"] != written.len() {
                self.tally.failed("stdin", format!("{answer} of {}", written.len()));
            }
        }
        self.call("stdin", "POST", &format!("{session}/stdin"), r#"{"eof":true}"#).await;
        if self.poll(&session).await != written {
            self.tally.failed("stdin", "what came out is not what went in");
        }
    }

    /// A harness that feeds a process; a request that was not answered before its socket closed is sent again on the
    /// next one, under its own name, and done once.
    async fn harness(self, executor: String) {
        let (kind, path) = ("harness", format!("/bridge/{executor}"));
        let mut socket = self.dial(kind, &path).await;
        let begin = |session: &Value| json!({ "clientName": "test", "resumeSessionId": session });
        let session = self.ask(&mut socket, "initialize", &begin(&Value::Null)).await.unwrap()["sessionId"].clone();
        let policy = json!({ "inherit": "all", "ignoreDefaultExcludes": false, "exclude": [], "set": {},
            "includeOnly": [] });
        let start = json!({ "processId": "p", "argv": ["cat"], "cwd": "file:///", "env": {}, "tty": false,
            "pipeStdin": true, "envPolicy": policy });
        self.ask(&mut socket, "process/start", &start).await.unwrap();
        let (mut written, mut read, mut after) = (String::new(), Vec::new(), 0);
        while self.goes_on().await || read.len() < written.len() {
            let piece = format!("piece at {}\n", written.len());
            let write = json!({ "processId": "p", "chunk": STANDARD.encode(&piece), "writeId": piece });
            let news = json!({ "processId": "p", "afterSeq": after, "maxBytes": null, "waitMs": 0 });
            let wanted = if self.stop.is_cancelled() { None } else { Some(("process/write", write)) };
            for (method, params) in wanted.into_iter().chain([("process/read", news)]) {
                let since = Instant::now();
                let answer = loop {
                    if let Some(answer) = self.ask(&mut socket, method, &params).await {
                        break answer;
                    }
                    socket = self.dial(kind, &path).await;
                    // The next socket may close as well before it has answered.
                    let Some(resumed) = self.ask(&mut socket, "initialize", &begin(&session)).await else { continue };
                    if resumed["sessionId"] != session {
                        self.tally.failed(kind, format!("another session: {resumed}"));
                    }
                };
                self.tally.answered(kind, since);
                match method {
                    "process/write" if answer["status"] == "accepted" => written += &piece,
                    "process/read" if answer["chunks"].is_array() => {
                        for chunk in answer["chunks"].as_array().unwrap() {
                            after = chunk["seq"].as_u64().unwrap();
                            read.extend(STANDARD.decode(chunk["chunk"].as_str().unwrap()).unwrap());
                        }
                    }
                    _ => return self.tally.failed(kind, format!("{method}: {answer}")),
                }
            }
        }
        if read != written.as_bytes() {
            self.tally.failed(kind, "what came out is not what went in");
        }
    }

    /// Sends one request; its result, or the whole answer if it has none; nothing if the socket closed before.
    async fn ask(&self, socket: &mut WebSocketStream<TcpStream>, method: &str, params: &Value) -> Option<Value> {
        let request = json!({ "id": method, "method": method, "params": params });
        // One that fails is followed by the close frame that says why.
        let _ = socket.send(Message::text(request.to_string())).await;
        loop {
            let mut message = self.hear("harness", socket).await?;
            if message["id"] == method {
                if method == "initialize" {
                    let initialized = json!({ "method": "initialized", "params": {} });
                    let _ = socket.send(Message::text(initialized.to_string())).await;
                }
                return Some(if message["result"].is_null() { message } else { message["result"].take() });
            }
        }
    }

    /// Opens a WebSocket; a refusal by 503 is tried again.
    async fn dial(&self, kind: &'static str, path: &str) -> WebSocketStream<TcpStream> {
        loop {
            match dial(&self.caller, path).await {
                Ok(socket) => return socket,
                Err((503, _)) => {
                    self.tally.again(kind);
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
                Err(refusal) => panic!("{kind}: {refusal:?}"),
            }
        }
    }

    /// The next message; nothing once the socket has closed, which is a failure by any code but 1012.
    async fn hear(&self, kind: &'static str, socket: &mut WebSocketStream<TcpStream>) -> Option<Value> {
        loop {
            match tokio::time::timeout(PATIENCE, socket.next()).await.expect("the gateway says something") {
                Some(Ok(Message::Text(text))) => return Some(serde_json::from_str(&text).unwrap()),
                Some(Ok(Message::Close(Some(frame)))) if frame.code == CloseCode::Restart => {
                    self.tally.again(kind);
                    return None;
                }
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                other => {
                    self.tally.failed(kind, format!("{other:?}"));
                    return None;
                }
            }
        }
    }
}

/// Takes the next chunk of a session's output, which has none in between.
fn take(chunk: &Value, since: &mut u64, read: &mut Vec<u8>) {
    *since += 1;
    assert_eq!((&chunk["seq"], &chunk["offset"], &chunk["gap"]), (&json!(since), &json!(read.len()), &Value::Null));
    read.extend(STANDARD.decode(chunk["data_b64"].as_str().unwrap()).unwrap());
}
