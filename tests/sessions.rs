//! Process sessions on the real executor: what they print, read and leave behind, and what they outlive.

use std::net::SocketAddr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use exec_gateway::session::{SessionError, StartRequest, StdinMode};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::support::gateway::{free_address, workspace};
use crate::support::{Caller, CodexExecutor, DaemonProcess, PATIENCE, Proxy, Scratch, Workbench, eventually, noise};

/// A session as a caller sees it.
pub struct Started<'a> {
    pub caller: &'a Caller,
    pub id: String,
}

/// All that a session printed.
#[derive(Default)]
pub struct Printed {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub last: Value,
}

pub async fn start<'a>(caller: &'a Caller, arguments: Value) -> Started<'a> {
    let result = caller.result("box", "exec_command", arguments).await;
    assert_eq!(result["isError"], false, "{result}");
    let id = result["structuredContent"]["session_id"].as_str().unwrap().to_owned();
    assert_eq!(result["content"][0]["text"], json!({ "session_id": id }).to_string());
    Started { caller, id }
}

impl Started<'_> {
    pub async fn get(&self, query: &str) -> Value {
        let path = format!("/api/connectors/processes/{}{query}", self.id);
        // A gateway that is being restarted refuses connections; the caller comes again.
        eventually("an answer", async || {
            let answer = self.caller.try_send("GET", &path, &[], "").await.ok()?;
            assert!(answer.status == 200 || answer.status == 503, "{answer:?}");
            (answer.status == 200).then(|| answer.json())
        })
        .await
    }

    pub async fn post(&self, what: &str, body: Value) -> crate::support::Answer {
        self.caller.post(&format!("/api/connectors/processes/{}/{what}", self.id), body).await
    }

    /// Reads to the end as a client does: page after page, by number.
    pub async fn read_all(&self) -> Printed {
        let mut printed = Printed::default();
        let (mut since, mut seq) = (0, 0);
        loop {
            let page = self.get(&format!("/output?since={since}&wait_ms=5000")).await;
            for chunk in page["chunks"].as_array().unwrap() {
                let next = chunk["seq"].as_u64().unwrap();
                assert_eq!(next, seq + 1, "numbers have no holes");
                assert!(chunk["gap"].is_null(), "{chunk}");
                seq = next;
                let stream = if chunk["stream"] == "stderr" { &mut printed.stderr } else { &mut printed.stdout };
                assert_eq!(chunk["offset"], stream.len(), "offsets count the bytes of the stream");
                stream.extend(STANDARD.decode(chunk["data_b64"].as_str().unwrap()).unwrap());
            }
            since = page["next_since"].as_u64().unwrap();
            if page["session_alive"] == false {
                printed.last = page;
                return printed;
            }
            assert!(page["exit_code"].is_null(), "the exit is told after the last byte");
        }
    }
}

pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_tells_output_exit_and_digests() {
    let bench = Workbench::start().await;
    let session = start(&bench.caller, json!({ "command": "printf out; printf err >&2; exit 4" })).await;
    let printed = session.read_all().await;
    assert_eq!((printed.stdout.as_slice(), printed.stderr.as_slice()), (&b"out"[..], &b"err"[..]));
    assert_eq!(printed.last["exit_code"], 4);
    assert_eq!(printed.last["exit"]["streams"]["stdout"]["sha256"], sha256(b"out"));
    assert_eq!(printed.last["exit"]["streams"]["stderr"]["bytes"], 3);
    // Reading does not consume, and the end is repeated.
    assert_eq!(session.get("/output?since=0").await["chunks"].as_array().unwrap().len(), 2);
    assert_eq!(session.get("/output?since=99").await["exit_code"], 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn stdin_arrives_once_whatever_is_repeated_and_ends() {
    let bench = Workbench::start().await;
    let session = start(&bench.caller, json!({ "command": ["cat"] })).await;
    let bytes = noise(7, 300_000);
    for offset in [0, 0, 100_000, 50_000, 200_000] {
        let end = (offset + 100_000).min(bytes.len());
        let body = json!({ "data_b64": STANDARD.encode(&bytes[offset..end]), "offset": offset });
        let answer = session.post("stdin", body).await;
        assert_eq!(answer.status, 200, "{answer:?}");
    }
    let behind = session.post("stdin", json!({ "data_b64": "eA==", "offset": 300_001 })).await;
    assert_eq!((behind.status.as_u16(), behind.code().as_str()), (409, "stdin_offset"));
    let end = session.post("stdin", json!({ "eof": true })).await;
    assert_eq!(end.json()["accepted"], 300_000);
    let printed = session.read_all().await;
    assert!(printed.stdout == bytes, "{} bytes", printed.stdout.len());
    assert_eq!(printed.last["exit_code"], 0);
    let late = session.post("stdin", json!({ "data_b64": "eA==" })).await;
    assert_eq!((late.status.as_u16(), late.code().as_str()), (409, "stdin_closed"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminated_session_leaves_no_process_and_stays_readable() {
    let bench = Workbench::start().await;
    let marker = crate::support::Marker::new();
    let session =
        start(&bench.caller, json!({ "command": format!("echo begun; setsid sleep {marker} & sleep {marker}") })).await;
    eventually("the session prints", async || {
        let page = session.get("/output?since=0&wait_ms=1000").await;
        (!page["chunks"].as_array().unwrap().is_empty()).then_some(())
    })
    .await;
    for _ in 0..2 {
        let answer = session.post("terminate", json!({})).await.json();
        assert_eq!((&answer["ok"], &answer["exit_code"]), (&json!(true), &json!(137)));
    }
    let printed = session.read_all().await;
    assert_eq!(printed.stdout, b"begun\n");
    assert_eq!(printed.last["exit"]["signal"], 9);
    assert_eq!(marker.processes(), Vec::<u32>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_does_not_read_can_still_be_terminated() {
    let bench = Workbench::with(|config| config.session.wait_max_secs = 8).await;
    let session = start(&bench.caller, json!({ "command": ["sleep", "600"], "stdin": "open" })).await;
    // Pipe and executor take some MiB before they are full.
    let block = STANDARD.encode(noise(1, 4 * 1024 * 1024));
    let mut full = None;
    for _ in 0..8 {
        let answer = session.post("stdin", json!({ "data_b64": block })).await;
        if answer.status != 200 {
            full = Some(answer);
            break;
        }
    }
    let full = full.expect("stdin is full at last");
    assert_eq!((full.status.as_u16(), full.code().as_str()), (429, "stdin_full"));
    assert!(full.header("retry-after").is_some());
    let answer = session.post("terminate", json!({})).await.json();
    assert_eq!(answer["exit_code"], 137, "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_start_key_is_one_process_however_often_it_is_sent() {
    let bench = Workbench::start().await;
    let arguments = json!({ "command": "echo x >> starts; sleep 600", "key": "k1" });
    let starts = (0..100).map(|_| {
        let (caller, arguments) = (bench.caller.clone(), arguments.clone());
        tokio::spawn(async move { start(&caller, arguments).await.id })
    });
    let ids = futures_util::future::try_join_all(starts).await.unwrap();
    assert!(ids.iter().all(|id| *id == ids[0]));
    let written = async || std::fs::read_to_string(bench.file("starts")).ok().filter(|text| !text.is_empty());
    assert_eq!(eventually("the process writes", written).await, "x\n");
    let other = bench.caller.tool("box", "exec_command", json!({ "command": "true", "key": "k1" })).await;
    assert_eq!((other.status.as_u16(), other.code().as_str()), (409, "idempotency_conflict"));
    let session = Started { caller: &bench.caller, id: ids[0].clone() };
    session.post("terminate", json!({})).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_failed_leaves_nothing_and_its_key_may_be_used_again() {
    let bench = Workbench::start().await;
    let program = bench.file("program");
    let arguments = json!({ "command": [program], "key": "k", "stdin": "none" });
    let failed = bench.caller.result("box", "exec_command", arguments.clone()).await;
    assert_eq!((&failed["isError"], &failed["structuredContent"]["code"]), (&json!(true), &json!("not_started")));
    assert!(bench.gateway.gateway.api().sessions.is_empty());
    std::fs::write(&program, "#!/bin/sh\necho here\n").unwrap();
    std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    assert_eq!(start(&bench.caller, arguments).await.read_all().await.stdout, b"here\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_session_is_as_unknown_as_one_that_never_was() {
    let bench = Workbench::start().await;
    let session = start(&bench.caller, json!({ "command": "true" })).await;
    let stranger = bench.gateway.caller("other").await;
    let unknown = uuid::Uuid::new_v4().to_string();
    for what in ["/output", ""] {
        let theirs = stranger.send("GET", &format!("/api/connectors/processes/{}{what}", session.id), &[], "").await;
        let nobodys = stranger.send("GET", &format!("/api/connectors/processes/{unknown}{what}"), &[], "").await;
        let text = |answer: &crate::support::Answer, id: &str| String::from_utf8_lossy(&answer.body).replace(id, "ID");
        assert_eq!((theirs.status, text(&theirs, &session.id)), (nobodys.status, text(&nobodys, &unknown)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_past_the_bound_are_refused_and_forgotten_ones_make_room() {
    let bench = Workbench::with(|config| config.session.workspace_max = 2).await;
    let first = start(&bench.caller, json!({ "command": "true" })).await;
    start(&bench.caller, json!({ "command": "sleep 600" })).await;
    let third = bench.caller.tool("box", "exec_command", json!({ "command": "true" })).await;
    assert_eq!((third.status.as_u16(), third.code().as_str()), (429, "too_many_sessions"));
    let path = format!("/api/connectors/processes/{}", first.id);
    assert_eq!(bench.caller.send("DELETE", &path, &[], "").await.status, 200);
    assert_eq!(bench.caller.send("GET", &path, &[], "").await.status, 404);
    start(&bench.caller, json!({ "command": "true" })).await;
    let listed = bench.caller.send("GET", "/api/connectors/processes", &[], "").await.json();
    assert_eq!(listed["processes"].as_array().unwrap().len(), 2);
    assert_eq!(listed["processes"][0]["state"], "running");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_start_key_is_refused_alike_while_there_is_no_room_and_works_once_there_is() {
    let bench = Workbench::with(|config| config.session.workspace_max = 1).await;
    let first = start(&bench.caller, json!({ "command": "true" })).await;
    let arguments = json!({ "command": "echo x >> starts", "key": "k", "stdin": "none" });
    let refused = bench.caller.tool("box", "exec_command", arguments.clone()).await;
    assert_eq!((refused.status.as_u16(), refused.code().as_str()), (429, "too_many_sessions"));
    // Behind the door they all meet: over HTTP most would come one after the other.
    let api = bench.gateway.gateway.api();
    let principal = api.corridor.auth.principal(bench.caller.token.as_deref().unwrap()).await.unwrap();
    let workspace = api.workspaces.get(&principal);
    let binding = workspace.environment("box").await.unwrap();
    let request = StartRequest {
        argv: vec!["true".into()],
        cwd: None,
        env: Default::default(),
        tty: false,
        stdin: StdinMode::None,
        timeout_ms: None,
        label: None,
    };
    let starts = (0..50).map(|_| {
        let key = Some("k".to_owned());
        api.sessions.start(&binding, request.clone(), key, PATIENCE)
    });
    for refused in futures_util::future::join_all(starts).await {
        assert!(matches!(refused, Err(SessionError::TooMany(1))), "{:?}", refused.err());
    }
    let path = format!("/api/connectors/processes/{}", first.id);
    assert_eq!(bench.caller.send("DELETE", &path, &[], "").await.status, 200);
    let starts = (0..50).map(|_| start(&bench.caller, arguments.clone()));
    let started = futures_util::future::join_all(starts).await;
    assert!(started.iter().all(|session| session.id == started[0].id));
    started[0].read_all().await;
    assert_eq!(std::fs::read_to_string(bench.file("starts")).unwrap(), "x\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_under_one_start_key_are_all_told_that_it_failed() {
    let bench = Workbench::start().await;
    let arguments = json!({ "command": [bench.file("nothing")], "key": "k", "stdin": "none" });
    let starts = (0..50).map(|_| bench.caller.result("box", "exec_command", arguments.clone()));
    for failed in futures_util::future::join_all(starts).await {
        assert_eq!(failed["structuredContent"]["code"], "not_started", "{failed}");
    }
    assert!(bench.gateway.gateway.api().sessions.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_while_the_link_is_cut() {
    outlive(4, 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_while_the_gateway_is_killed() {
    outlive(0, 3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_while_the_link_is_cut_and_the_gateway_killed() {
    outlive(2, 2).await;
}

const SESSIONS: usize = 24;
const PIECES: usize = 64;
const STDOUT_PIECE: usize = 32 * 1024;
const STDERR_PIECE: usize = 4 * 1024;

/// Many sessions print at about 35 KiB/s, so that the executor's ring of 1 MiB bridges its longest pause here, while links
/// are cut and gateways killed; all arrives.
async fn outlive(cuts: usize, kills: usize) {
    let state = Scratch::new();
    let address: SocketAddr = free_address();
    let mut daemon = Some(DaemonProcess::start(&state, address, &[]).await);
    let (caller, credentials) = workspace(&state, daemon.as_ref().unwrap()).await;
    let proxy = Proxy::to(address).await;
    let executor = CodexExecutor::connected(&format!("http://{}", proxy.address), &credentials, &caller, "box").await;
    let command = format!(
        "i=0; while [ $i -lt {PIECES} ]; do \
         dd if=out.$1 bs={STDOUT_PIECE} skip=$i count=1 2>/dev/null; \
         dd if=err.$1 bs={STDERR_PIECE} skip=$i count=1 >&2 2>/dev/null; \
         sleep 1; i=$((i+1)); done; exit $1"
    );
    let mut sessions = Vec::new();
    for number in 0..SESSIONS {
        std::fs::write(executor.home().join(format!("out.{number}")), noise(number as u64 + 1, PIECES * STDOUT_PIECE))
            .unwrap();
        std::fs::write(executor.home().join(format!("err.{number}")), noise(number as u64 + 99, PIECES * STDERR_PIECE))
            .unwrap();
        let argv = json!(["/bin/sh", "-c", command, "sh", number.to_string()]);
        sessions.push(start(&caller, json!({ "command": argv, "stdin": "none" })).await);
    }
    let disturb = async {
        let mut events = [vec![true; cuts], vec![false; kills]].concat();
        // Cuts and kills in turn.
        events.sort_by_key(|cut| *cut);
        for (index, cut) in events.into_iter().enumerate() {
            // Each disturbance comes when output has come after the one before.
            let mark = (index + 1) * PIECES / 8;
            eventually("output goes on", async || {
                let shown = sessions[0].get("").await;
                (shown["stdout_bytes"].as_u64()? >= (mark * STDOUT_PIECE) as u64).then_some(())
            })
            .await;
            if cut {
                proxy.cut();
            } else {
                daemon.take().unwrap().kill().await;
                daemon = Some(DaemonProcess::start(&state, address, &[]).await);
            }
        }
    };
    let read = futures_util::future::join_all(sessions.iter().map(Started::read_all));
    let (printed, ()) = tokio::join!(read, disturb);
    let mut bytes = 0;
    for (number, printed) in printed.iter().enumerate() {
        let (stdout, stderr) =
            (noise(number as u64 + 1, PIECES * STDOUT_PIECE), noise(number as u64 + 99, PIECES * STDERR_PIECE));
        assert!(printed.stdout == stdout, "session {number}: {} bytes of stdout", printed.stdout.len());
        assert!(printed.stderr == stderr, "session {number}: {} bytes of stderr", printed.stderr.len());
        assert_eq!(printed.last["exit_code"], number);
        let streams = &printed.last["exit"]["streams"];
        assert_eq!(streams["stdout"]["sha256"], sha256(&stdout));
        assert_eq!(streams["stderr"]["sha256"], sha256(&stderr));
        bytes += stdout.len() + stderr.len();
    }
    println!("{SESSIONS} sessions, {bytes} bytes, {cuts} cuts, {kills} kills: 0 bytes lost, 0 doubled");
}
