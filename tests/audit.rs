//! The audit log: what is recorded of callers, harnesses, executors and operators, what never is, and what kills and full
//! disks cost (connectors-api.md §7, and §10, 57 to 62).

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use exec_gateway::admin::{Request, Response};
use exec_gateway::audit::{Act, Audit, AuditReader, DIRECTORY, Outcome, verify};
use exec_gateway::config::{self, Secret};
use exec_gateway::protocol::ids::{ExecutorId, UserId, WorkspaceId};
use futures_util::{SinkExt, StreamExt};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;
use tokio_tungstenite::tungstenite::Message;

use crate::support::gateway::workspace;
use crate::support::harness::{HarnessKeys, connect, dial};
use crate::support::{
    Caller, DaemonProcess, FakeExecutor, Harness, Mcp, Scratch, TestGateway, Tongue, Workbench, eventually,
};

/// What must not be found in any record.
const SECRET: &str = "s3cret-hunter2";

fn directory(state: &Scratch) -> PathBuf {
    state.path().join(DIRECTORY)
}

/// All records, oldest first.
fn records(dir: &Path) -> Vec<Value> {
    let mut reader = AuditReader::open(dir, None).unwrap();
    let mut records = Vec::new();
    while let Some(line) = reader.next_line().unwrap() {
        assert!(line.whole, "{line:?}");
        records.push(serde_json::from_slice(&line.text).unwrap());
    }
    records
}

fn begins<'a>(records: &'a [Value], action: &str) -> Vec<&'a Value> {
    records.iter().filter(|record| record["kind"] == "begin" && record["action"] == action).collect()
}

fn end_of<'a>(records: &'a [Value], begin: &Value) -> Option<&'a Value> {
    records.iter().find(|record| record["kind"] == "end" && record["of"] == begin["seq"])
}

/// The only such beginning, with its end once that is there.
async fn act(state: &Scratch, action: &str) -> (Value, Value) {
    eventually(&format!("{action} ends"), async || {
        let records = records(&directory(state));
        let begins = begins(&records, action);
        let [begin] = &begins[..] else { return None };
        Some(((*begin).clone(), end_of(&records, begin)?.clone()))
    })
    .await
}

/// No line has a secret or anything that opens a door.
fn assert_no_secret(state: &Scratch) {
    for entry in std::fs::read_dir(directory(state)).unwrap() {
        let text = std::fs::read_to_string(entry.unwrap().path()).unwrap();
        for secret in [SECRET, "egw_", "egx_", "token=", "Bearer", "czNjcmV0LWh1bnRlcjI"] {
            let line = text.lines().find(|line| line.contains(secret));
            assert_eq!(line, None, "{secret} is on record");
        }
    }
}

/// A caller of workspace `w` on behalf of a person.
async fn person(gateway: &TestGateway) -> (Caller, String) {
    let (workspace, user) = (WorkspaceId::new("w").unwrap(), Some(UserId::new("ann").unwrap()));
    let create = Request::TokenCreate { workspace, user, ttl: None, read_only: false };
    let Response::Token { id, token, .. } = gateway.admin(create).await else { panic!("no token") };
    (Caller::new(gateway.address(), Some(token.expose().to_owned())), id.to_string())
}

/// Faults 59 and 62: no results, no executors; contents in clear.
#[tokio::test(flavor = "multi_thread")]
async fn a_tool_call_tells_who_what_where_and_to_what_end_and_nothing_of_contents() {
    let bench = Workbench::start().await;
    let (caller, token) = person(&bench.gateway).await;
    let call = async |tool: &str, arguments: Value| {
        let body = json!({ "tool": tool, "arguments": arguments }).to_string();
        let headers = [("x-request-id", tool), ("content-type", "application/json")];
        caller.send("POST", "/api/connectors/envs/box/tool/call", &headers, body).await
    };
    let command = json!(["sh", "-c", "printf four; exit 3"]);
    call("shell", json!({ "command": command, "env": { "PASSWORD": SECRET } })).await;
    call("write_file", json!({ "path": "notes", "content_b64": "czNjcmV0LWh1bnRlcjI=" })).await;
    call("read_file", json!({ "path": "missing" })).await;
    let missing = caller.tool("nowhere", "shell", json!({ "command": "true" })).await;
    assert_eq!(missing.code(), "env_not_found");

    let records = eventually("all ends are there", async || {
        let records = records(&directory(&bench.gateway.state));
        let begins = begins(&records, "tool.call");
        (begins.len() == 4 && begins.iter().all(|begin| end_of(&records, begin).is_some())).then_some(records)
    })
    .await;
    let begins = begins(&records, "tool.call");
    for begin in &begins[..3] {
        let who = (&begin["workspace"], &begin["user"], &begin["credential"], &begin["request"]);
        assert_eq!(who, (&json!("w"), &json!("ann"), &json!(token), &begin["tool"]));
        let place = (&begin["environment"], &begin["executor"]);
        assert_eq!(place, (&json!("box"), &json!(bench.credentials.executor)), "{begin}");
    }
    assert_eq!(begins[0]["what"], json!({ "command": command, "env": ["PASSWORD"] }));
    assert_eq!(begins[1]["what"], json!({ "path": "notes" }));
    let outcome = |nth: usize| end_of(&records, begins[nth]).unwrap();
    assert_eq!((&outcome(0)["outcome"], &outcome(0)["exit_code"]), (&json!("ok"), &json!(3)));
    assert!(outcome(0)["bytes_in"].as_u64() > Some(20) && outcome(0)["bytes_out"].as_u64() >= Some(4), "{records:?}");
    assert_eq!(outcome(1)["outcome"], "ok");
    assert_eq!(outcome(2)["outcome"], "not_found");
    assert_eq!((&begins[3]["environment"], &outcome(3)["outcome"]), (&json!("nowhere"), &json!("env_not_found")));
    assert!(begins[3].get("executor").is_none(), "{}", begins[3]);
    assert_no_secret(&bench.gateway.state);
    verify(&directory(&bench.gateway.state)).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_of_mcp_clients_are_on_record_like_those_over_rest() {
    let bench = Workbench::start().await;
    let client = Mcp::connect(&bench.caller).await;
    client.call("list_environments", json!({})).await;
    let result = client.call("shell", json!({ "command": "exit 4" })).await;
    assert_eq!(result["structuredContent"]["exit_code"], 4, "{result}");
    let (begin, end) = act(&bench.gateway.state, "tool.call").await;
    assert_eq!((&begin["tool"], &begin["what"]), (&json!("shell"), &json!({ "command": "exit 4" })));
    // Found, though the client did not name it.
    let place = (&begin["environment"], &begin["executor"]);
    assert_eq!(place, (&json!("box"), &json!(bench.credentials.executor)));
    assert!(begin["request"].as_str().is_some_and(|request| request.starts_with("req_")), "{begin}");
    assert_eq!((&end["outcome"], &end["exit_code"], &end["bytes_in"]), (&json!("ok"), &json!(4), &json!(6)));
}

#[tokio::test(flavor = "multi_thread")]
async fn files_over_http_are_on_record_with_their_bytes_and_without_their_contents() {
    let bench = Workbench::start().await;
    let path = bench.file("notes");
    let url = format!("/api/connectors/envs/box/files?path={}", path.display());

    assert_eq!(bench.caller.send("PUT", &url, &[], SECRET).await.status, 201);
    assert_eq!(&bench.caller.send("GET", &url, &[], "").await.body[..], SECRET.as_bytes());

    let (put, end) = act(&bench.gateway.state, "file.put").await;
    assert_eq!((&put["environment"], &put["what"]), (&json!("box"), &json!({ "path": path })));
    assert_eq!((&end["outcome"], &end["bytes_in"]), (&json!("ok"), &json!(SECRET.len())));
    let (_, end) = act(&bench.gateway.state, "file.get").await;
    assert_eq!((&end["outcome"], &end["bytes_out"]), (&json!("ok"), &json!(SECRET.len())));
    assert_no_secret(&bench.gateway.state);

    let missing = bench.caller.send("GET", &url.replace("notes", "missing"), &[], "").await;
    assert_eq!(missing.status, 404);
    let both = eventually("both ends are there", async || {
        let records = records(&directory(&bench.gateway.state));
        let ends =
            begins(&records, "file.get").into_iter().map(|begin| Some(end_of(&records, begin)?["outcome"].clone()));
        ends.collect::<Option<Vec<_>>>()
    });
    assert_eq!(both.await, ["ok", "file_not_found"]);
}

#[tokio::test]
async fn a_transfer_is_on_record_with_its_bytes_and_without_its_ticket() {
    let gateway = TestGateway::with(|config| config.auth.shared_secret = Some(Secret::new(SECRET.into()))).await;
    let (from, to) = (gateway.executor("w", "from").await.executor, gateway.executor("w", "to").await.executor);
    let service = Caller::new(gateway.address(), Some(SECRET.into()));
    let order = json!({ "workspace_id": "w", "source_exe_id": from, "dest_exe_id": to });
    let ticket = service.post("/api/exec-gateway/relay/create", order).await.json()["ticket"].clone();
    let ticket = ticket.as_str().unwrap();
    let client = Caller::new(gateway.address(), Some(ticket.into()));
    let path = format!("/relay/{ticket}");

    let (put, get) = tokio::join!(client.send("PUT", &path, &[], "12345"), client.send("GET", &path, &[], ""));

    assert_eq!((put.status.as_u16(), &get.body[..]), (200, &b"12345"[..]));
    let (made, end) = act(&gateway.state, "transfer.create").await;
    let ends = json!({ "source": from, "destination": to });
    assert_eq!((&made["credential"], &made["workspace"], &made["what"]), (&json!("service"), &json!("w"), &ends));
    let name = &end["transfer"];
    for (action, bytes) in [("transfer.put", json!(5)), ("transfer.get", Value::Null)] {
        let (begin, end) = act(&gateway.state, action).await;
        let what = json!({ "source": from, "destination": to, "transfer": name });
        assert_eq!((&begin["credential"], &begin["workspace"], &begin["what"]), (&json!("ticket"), &json!("w"), &what));
        assert_eq!((&end["outcome"], &end["bytes_in"]), (&json!("ok"), &bytes), "{action}");
    }
    let files = std::fs::read_dir(directory(&gateway.state)).unwrap();
    let text: String = files.map(|file| std::fs::read_to_string(file.unwrap().path()).unwrap()).collect();
    assert!(!text.contains("rly_") && !text.contains(SECRET), "{text}");
}

#[tokio::test]
async fn a_harness_that_asks_for_the_way_is_on_record() {
    let gateway = TestGateway::start().await;
    let credentials = gateway.executor("w", "box").await;
    let _executor = FakeExecutor::connected(&gateway, &credentials).await;
    let caller = gateway.caller("w").await;

    connect(&caller, &credentials.executor, &HarnessKeys::new()).await;

    let (asked, end) = act(&gateway.state, "harness.connect").await;
    assert_eq!((&asked["environment"], &asked["executor"]), (&json!("box"), &json!(credentials.executor)));
    assert_eq!(end["outcome"], "ok");
}

#[tokio::test(flavor = "multi_thread")]
async fn contents_are_on_record_where_the_operator_wants_them() {
    let bench = Workbench::with(|config| config.audit.contents = true).await;
    bench.shell(json!({ "command": "true", "env": { "PASSWORD": SECRET } })).await;
    let (begin, _) = act(&bench.gateway.state, "tool.call").await;
    assert_eq!(begin["contents"]["env"]["PASSWORD"], SECRET);
    assert!(!begin["what"].to_string().contains(SECRET));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_done_to_a_process_is_on_record_and_looking_at_it_is_not() {
    let bench = Workbench::start().await;
    let state = &bench.gateway.state;
    let started = bench.caller.result("box", "exec_command", json!({ "command": "cat" })).await;
    let id = started["structuredContent"]["session_id"].as_str().unwrap().to_owned();
    let session = format!("/api/connectors/processes/{id}");
    bench.caller.post(&format!("{session}/stdin"), json!({ "data_b64": "czNjcmV0LWh1bnRlcjI=" })).await;
    bench.caller.send("GET", &format!("{session}/output?wait_ms=5000"), &[], "").await;
    let mut attached = dial(&bench.caller, &format!("{session}/attach")).await.unwrap();
    attached.send(Message::binary(SECRET)).await.unwrap();
    let told = |message: &Message| message.to_text().is_ok_and(|text| text.contains("\"accepted\""));
    while !told(&attached.next().await.unwrap().unwrap()) {}
    attached.close(None).await.unwrap();
    let (begin, end) = act(state, "process.attach").await;
    assert_eq!((&begin["session"], &begin["environment"]), (&json!(id), &json!("box")));
    assert_eq!((&end["outcome"], &end["stdin_bytes"]), (&json!("peer"), &json!(SECRET.len())));

    bench.caller.post(&format!("{session}/terminate"), json!({ "signal": "KILL" })).await;
    assert_eq!(bench.caller.send("DELETE", &session, &[], "").await.status, 200);
    let (begin, end) = act(state, "process.stdin").await;
    assert_eq!((&begin["session"], &begin["executor"]), (&json!(id), &json!(bench.credentials.executor)));
    assert_eq!((&end["bytes_in"], &end["accepted"]), (&json!(SECRET.len()), &json!(SECRET.len())));
    let (begin, end) = act(state, "process.terminate").await;
    assert_eq!(
        (&begin["what"]["signal"], &end["exit_code"], &end["state"]),
        (&json!("KILL"), &json!(137), &json!("exited"))
    );
    assert_eq!(act(state, "process.forget").await.1["outcome"], "ok");
    let (begin, end) = act(state, "process.end").await;
    assert_eq!(
        (&begin["session"], &begin["workspace"], &begin["environment"]),
        (&json!(id), &json!("w"), &json!("box"))
    );
    assert_eq!((&end["outcome"], &end["exit_code"]), (&json!("exited"), &json!(137)));
    assert_eq!((&end["bytes_in"], &end["bytes_out"]), (&json!(2 * SECRET.len()), &json!(2 * SECRET.len())));

    let actions: BTreeSet<String> = records(&directory(state))
        .iter()
        .filter_map(|record| Some(record["action"].as_str()?.to_owned()))
        .filter(|action| action.starts_with("process."))
        .collect();
    let changes = ["process.attach", "process.end", "process.forget", "process.stdin", "process.terminate"];
    assert_eq!(actions.iter().collect::<Vec<_>>(), changes);
    assert_no_secret(state);
}

/// Faults 59 and 60: one reason for every end, and frames that escape the record.
#[tokio::test(flavor = "multi_thread")]
async fn a_harness_is_on_record_with_all_that_passed_and_the_reason_of_its_end() {
    for tongue in [Tongue::Json, Tongue::Frames, Tongue::Encrypted] {
        let bench = Workbench::start().await;
        let (state, id) = (&bench.gateway.state, &bench.credentials.executor);
        let (mut harness, _) = Harness::initialized(&bench.caller, id, tongue).await;
        assert_eq!(harness.run("p1", &format!("echo {SECRET}")).await.0, format!("{SECRET}\n"));
        // Not JSON-RPC, not a frame, not of this stream: it passes nothing on, and is counted all the same.
        for _ in 0..100 {
            harness.socket.send(Message::binary(&b"\xff\xff\xff"[..])).await.unwrap();
        }
        let before = begins(&records(&directory(state)), "harness.socket")[0].clone();
        assert_eq!(
            (&before["workspace"], &before["environment"], &before["executor"]),
            (&json!("w"), &json!("box"), &json!(id))
        );
        assert_eq!(before["client"], "127.0.0.1");
        assert_eq!(before["what"]["encrypted"], tongue == Tongue::Encrypted);
        harness.socket.close(None).await.unwrap();

        let (_, end) = act(state, "harness.socket").await;
        assert_eq!(end["outcome"], "peer", "{tongue:?}");
        assert!(end["frames_in"].as_u64() >= Some(103), "{tongue:?}: {end}");
        assert!(end["frames_out"].as_u64() >= Some(3), "{tongue:?}: {end}");
        assert!(end["bytes_in"].as_u64() > Some(400) && end["bytes_out"].as_u64() > Some(200), "{tongue:?}: {end}");
        assert_no_secret(state);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sockets_end_on_record_for_the_reason_for_which_they_end() {
    let bench = Workbench::start().await;
    let state = &bench.gateway.state;
    let (_harness, _) = Harness::initialized(&bench.caller, &bench.credentials.executor, Tongue::Json).await;
    let (register, registered) = act(state, "executor.register").await;
    assert_eq!((&register["executor"], &registered["outcome"]), (&json!(bench.credentials.executor), &json!("ok")));
    assert_eq!(register["what"]["transport"], "noise");

    let executor = ExecutorId::new(&bench.credentials.executor).unwrap();
    bench.gateway.admin(Request::ExecutorUnbind { executor: executor.clone(), workspace: "w".parse().unwrap() }).await;
    assert_eq!(act(state, "harness.socket").await.1["outcome"], "refused");
    bench.gateway.admin(Request::ExecutorDelete { executor }).await;
    let (link, ended) = act(state, "executor.link").await;
    assert_eq!(
        (&link["what"]["registration"], &ended["outcome"]),
        (&register["what"]["registration"], &json!("deleted"))
    );
}

#[tokio::test]
async fn what_operators_change_is_on_record_with_a_daemon_and_without_and_what_they_look_at_is_not() {
    let state = Scratch::new();
    let daemon = DaemonProcess::start(&state, "127.0.0.1:0".parse().unwrap(), &[]).await;
    let operate = async |words: &str| {
        let words: Vec<&str> = words.split(' ').collect();
        DaemonProcess::operate(&state, &words).await
    };
    let token = operate("token create --workspace w --user ann").await;
    let executor = operate("executor create --workspace w --name box").await;
    let id = executor["exe_id"].as_str().unwrap();
    operate(&format!("executor bind {id} --workspace v --name pc")).await;
    operate("token list").await;
    operate("executor list").await;
    operate("cap-token --workspace w").await;
    assert_eq!(daemon.terminate().await, Some(0));
    operate(&format!("executor unbind {id} --workspace v")).await;
    operate("revoke --turn t1").await;
    operate(&format!("token revoke {}", token["id"].as_str().unwrap())).await;
    operate(&format!("executor delete {id}")).await;

    let records = records(&directory(&state));
    let begun: Vec<&str> = records
        .iter()
        .filter(|record| record["kind"] == "begin")
        .filter_map(|record| record["action"].as_str())
        .collect();
    assert_eq!(
        begun,
        [
            "token.create",
            "executor.create",
            "executor.bind",
            "cap_token.mint",
            "executor.unbind",
            "cap_token.revoke",
            "token.revoke",
            "executor.delete",
        ]
    );
    let made = begins(&records, "token.create")[0];
    assert_eq!(
        (&made["credential"], &made["workspace"], &made["user"]),
        (&json!("operator"), &json!("w"), &json!("ann"))
    );
    assert_eq!(end_of(&records, made).unwrap()["token"], token["id"]);
    assert_eq!(begins(&records, "token.revoke")[0]["what"]["token"], token["id"]);
    assert_eq!(end_of(&records, begins(&records, "executor.create")[0]).unwrap()["executor"], *id);
    assert!(begins(&records, "cap_token.mint")[0]["what"]["turn"].as_str().unwrap().starts_with("cli_"));
    assert!(records.iter().all(|record| record["kind"] != "end" || record["outcome"] == "ok"), "{records:?}");
    assert_no_secret(&state);
    verify(&directory(&state)).unwrap();
}

#[tokio::test]
async fn nothing_is_recorded_where_the_audit_is_off() {
    let gateway = TestGateway::with(|config| config.audit.enabled = false).await;
    gateway.caller("w").await.tool("nowhere", "shell", json!({ "command": "true" })).await;
    assert!(!directory(&gateway.state).exists());
}

/// A caller of a daemon, whose environment `box` has no executor on the line.
async fn unconnected(state: &Scratch, arguments: &[&str]) -> (DaemonProcess, Caller) {
    let daemon = DaemonProcess::start_on_small_disk(state, arguments).await;
    let caller = workspace(state, &daemon).await.0;
    (daemon, caller)
}

/// A call whose record is large and whose work is none.
async fn cheap(caller: &Caller, request: &str) -> String {
    let body = json!({ "tool": "read_file", "arguments": { "path": "x".repeat(4000) } }).to_string();
    let headers = [("x-request-id", request)];
    caller.send("POST", "/api/connectors/envs/box/tool/call", &headers, body).await.code()
}

/// Lets files of the daemon grow up to this size, or as they like.
fn limit_files(daemon: &DaemonProcess, bytes: Option<u64>) {
    let pid = Pid::from_raw(daemon.pid().try_into().unwrap()).unwrap();
    prlimit(Some(pid), Resource::Fsize, Rlimit { current: bytes, maximum: None }).unwrap();
}

const SMALL_DISK: u64 = 512 * 1024;

#[tokio::test]
async fn a_full_disk_refuses_calls_until_it_takes_records_again_and_costs_none() {
    let state = Scratch::new();
    let (daemon, caller) = unconnected(&state, &[]).await;
    limit_files(&daemon, Some(SMALL_DISK));
    let mut answered = 0;
    while cheap(&caller, "req").await != "audit_unavailable" {
        answered += 1;
        assert!(answered < 1000, "the disk does not fill");
    }
    assert!(answered > 50, "{answered}");
    assert_eq!(cheap(&caller, "req").await, "audit_unavailable");
    // Whoever takes a right away is not held up.
    DaemonProcess::operate(&state, &["revoke", "--turn", "t1"]).await;

    limit_files(&daemon, None);
    eventually("calls are taken again", async || {
        (cheap(&caller, "after").await == "executor_not_connected").then_some(())
    })
    .await;
    assert_eq!(daemon.terminate().await, Some(0));
    let (records, verified) = (records(&directory(&state)), verify(&directory(&state)).unwrap());
    let of = |request: &str| begins(&records, "tool.call").iter().filter(|begin| begin["request"] == request).count();
    assert_eq!((of("req"), of("after")), (answered, 1));
    assert!(begins(&records, "tool.call").iter().all(|begin| end_of(&records, begin).is_some()));
    // The revocation alone: its beginning and its end.
    assert_eq!(verified.missing, 2);
}

#[tokio::test]
async fn where_the_operator_says_so_calls_go_on_over_a_full_disk_and_the_gap_is_counted() {
    let state = Scratch::new();
    let (daemon, caller) = unconnected(&state, &["--audit-when-full", "go_on"]).await;
    limit_files(&daemon, Some(SMALL_DISK));
    for _ in 0..250 {
        assert_eq!(cheap(&caller, "req").await, "executor_not_connected");
    }
    limit_files(&daemon, None);
    let missing = eventually("the gap is on record", async || {
        Some(verify(&directory(&state)).unwrap().missing).filter(|missing| *missing > 0)
    })
    .await;
    assert_eq!(cheap(&caller, "after").await, "executor_not_connected");
    assert_eq!(daemon.terminate().await, Some(0));
    let records = records(&directory(&state));
    let recorded = begins(&records, "tool.call").len() as u64 - 1;
    assert!(recorded > 50 && recorded < 200, "{recorded}");
    // Of each call that is missing both records are.
    assert_eq!((recorded + missing / 2, missing % 2), (250, 0));
}

#[tokio::test]
async fn a_killed_daemon_leaves_each_call_on_record_once_and_ends_what_it_cannot_know_as_unknown() {
    let state = Scratch::new();
    let mut answered = BTreeSet::new();
    for round in 0..3 {
        let daemon = DaemonProcess::start(&state, "127.0.0.1:0".parse().unwrap(), &[]).await;
        let caller = workspace_caller(&state, &daemon, round).await;
        let counter = Arc::new(AtomicU64::new(0));
        let mut calls = tokio::task::JoinSet::new();
        for nth in 0..8 {
            let (caller, counter) = (caller.clone(), counter.clone());
            calls.spawn(async move {
                let mut answered = Vec::new();
                loop {
                    let request = format!("req_{round}_{nth}_{}", answered.len());
                    let body = json!({ "tool": "read_file", "arguments": { "path": "x" } }).to_string();
                    let path = "/api/connectors/envs/box/tool/call";
                    if caller.try_send("POST", path, &[("x-request-id", &request)], body).await.is_err() {
                        return answered;
                    }
                    answered.push(request);
                    counter.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        eventually("calls are answered", async || (counter.load(Ordering::Relaxed) > 200).then_some(())).await;
        daemon.kill().await;
        while let Some(call) = calls.join_next().await {
            answered.extend(call.unwrap());
        }
    }
    let daemon = DaemonProcess::start(&state, "127.0.0.1:0".parse().unwrap(), &[]).await;
    assert_eq!(daemon.terminate().await, Some(0));
    assert_all_on_record(&directory(&state), &answered);
}

/// A new caller of workspace `w`; the first one makes its environment too.
async fn workspace_caller(state: &Scratch, daemon: &DaemonProcess, round: usize) -> Caller {
    if round == 0 {
        return workspace(state, daemon).await.0;
    }
    let token = DaemonProcess::operate(state, &["token", "create", "--workspace", "w"]).await;
    Caller::new(daemon.address, Some(token["token"].as_str().unwrap().to_owned()))
}

/// The chain is whole, each of these calls is in it once, and whatever has begun has ended once.
fn assert_all_on_record(dir: &Path, answered: &BTreeSet<String>) {
    let verified = verify(dir).unwrap();
    let records = records(dir);
    assert_eq!((verified.first_seq, verified.head.seq as usize, verified.missing), (1, records.len(), 0));
    let (mut requests, mut ends): (BTreeMap<&str, u64>, BTreeMap<u64, u64>) = Default::default();
    let mut open = BTreeSet::new();
    for record in &records {
        match record["kind"].as_str() {
            Some("begin") => {
                open.insert(record["seq"].as_u64().unwrap());
                if record["action"] == "tool.call" {
                    *requests.entry(record["request"].as_str().unwrap()).or_default() += 1;
                }
            }
            Some("end") => *ends.entry(record["of"].as_u64().unwrap()).or_default() += 1,
            _ => {}
        }
    }
    let twice = requests.iter().find(|(_, times)| **times != 1);
    assert_eq!(twice, None, "on record more than once");
    let missing = answered.iter().find(|request| !requests.contains_key(request.as_str()));
    assert_eq!(missing, None, "answered and not on record");
    assert!(ends.keys().copied().eq(open) && ends.values().all(|times| *times == 1), "each has one end");
}

const CALLS: usize = 100_000;

/// Run by the test below as a process of its own, which it kills: records calls and says which are.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a part of the next test"]
async fn one_life_of_a_hundred_thousand_calls() {
    let Some(dir) = std::env::var_os("AUDIT_OF_TEST") else { return };
    let from: usize = std::env::var("AUDIT_OF_TEST_FROM").unwrap().parse().unwrap();
    let audit = Audit::open(Path::new(&dir), config::Audit::default()).unwrap();
    let workspace = WorkspaceId::new("w").unwrap();
    let next = Arc::new(AtomicU64::new(from as u64));
    let calls = (0..64).map(|_| {
        let (audit, workspace, next) = (audit.clone(), workspace.clone(), next.clone());
        tokio::spawn(async move {
            loop {
                let nth = next.fetch_add(1, Ordering::Relaxed);
                if nth >= CALLS as u64 {
                    return;
                }
                let act = Act::new("tool.call").by(&workspace, None, "tok_1").asked_as(&format!("req_{nth}"));
                let entry = audit.begin(act).await.unwrap();
                println!("answered req_{nth}");
                entry.end(Outcome::new("ok"));
            }
        })
    });
    for call in calls.collect::<Vec<_>>() {
        call.await.unwrap();
    }
    audit.close();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_thousand_calls_over_two_kills_are_each_on_record_once() {
    let state = Scratch::new();
    let mut answered = BTreeSet::new();
    // Behind what a life may have begun and not said.
    for (from, until) in [(0, CALLS / 3), (CALLS / 3 + 200, 2 * CALLS / 3), (2 * CALLS / 3 + 400, usize::MAX)] {
        let mut life = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "--nocapture", "audit::one_life_of_a_hundred_thousand_calls"])
            .env("AUDIT_OF_TEST", state.path())
            .env("AUDIT_OF_TEST_FROM", from.to_string())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(life.stdout.take().unwrap()).lines();
        let mut said = 0;
        while let Ok(Some(line)) = lines.next_line().await {
            let Some(request) = line.split("answered ").nth(1) else { continue };
            answered.insert(request.to_owned());
            said += 1;
            if from + said == until {
                life.start_kill().unwrap();
            }
        }
        let status = life.wait().await.unwrap();
        assert_eq!(status.success(), until == usize::MAX, "{status}");
    }
    assert!(answered.len() > CALLS - 1000, "{}", answered.len());
    assert_all_on_record(state.path(), &answered);
}

async fn command(state: &Scratch, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_exec-gateway"));
    command.arg("audit").args(arguments).args(["--state-dir", state.path().to_str().unwrap()]);
    command.output().await.unwrap()
}

fn lines(output: &Output) -> Vec<String> {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap().lines().map(String::from).collect()
}

#[tokio::test]
async fn operators_read_the_log_by_workspace_and_time_for_people_and_for_programs() {
    let gateway = TestGateway::start().await;
    for workspace in ["a", "b"] {
        let caller = gateway.caller(workspace).await;
        caller.tool("nowhere", "shell", json!({ "command": "uname" })).await;
    }
    let state = &gateway.state;
    let of_a = eventually("the end is there", async || {
        let lines = lines(&command(state, &["--workspace", "a"]).await);
        (lines.len() == 4).then_some(lines)
    })
    .await;
    assert!(of_a[2].contains("tool.call shell") && of_a[2].contains("{\"command\":\"uname\"}"), "{of_a:?}");
    assert!(of_a[3].contains("env_not_found"), "{of_a:?}");
    let all = lines(&command(state, &["--json"]).await);
    assert_eq!(all.len(), 9);
    let seqs: Vec<u64> =
        all.iter().map(|line| serde_json::from_str::<Value>(line).unwrap()["seq"].as_u64().unwrap()).collect();
    assert_eq!(seqs, (1..=9).collect::<Vec<_>>());
    assert_eq!(lines(&command(state, &["--since", "2999-01-01"]).await), Vec::<String>::new());
    assert_eq!(lines(&command(state, &["--json", "--since", "2020-01-01T00:00:00Z"]).await).len(), 9);
    assert_eq!(command(state, &["--since", "yesterday"]).await.status.code(), Some(2));
    assert!(lines(&command(&Scratch::new(), &[]).await).is_empty(), "without a log");
}

#[tokio::test]
async fn the_log_is_followed_while_it_grows() {
    let gateway = TestGateway::start().await;
    let caller = gateway.caller("w").await;
    let mut follow = Command::new(env!("CARGO_BIN_EXE_exec-gateway"))
        .args(["audit", "--follow", "--json", "--state-dir", gateway.state.path().to_str().unwrap()])
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(follow.stdout.take().unwrap()).lines();
    for nth in 0..3 {
        caller.tool(&format!("nowhere-{nth}"), "shell", json!({ "command": "true" })).await;
        loop {
            let line =
                tokio::time::timeout(Duration::from_secs(30), lines.next_line()).await.unwrap().unwrap().unwrap();
            if line.contains(&format!("nowhere-{nth}")) {
                break;
            }
        }
    }
}

#[tokio::test]
async fn the_command_verifies_the_chain_and_names_the_first_break() {
    let gateway = TestGateway::start().await;
    gateway.caller("w").await.tool("nowhere", "shell", json!({ "command": "true" })).await;
    let state = &gateway.state;
    let fine = command(state, &["--verify"]).await;
    assert!(lines(&fine)[0].starts_with("records 1 to "), "{fine:?}");
    gateway.gateway.api().audit.close();
    let fine: Value = serde_json::from_slice(&command(state, &["--verify", "--json"]).await.stdout).unwrap();
    let verified = verify(&directory(state)).unwrap();
    assert_eq!((&fine["ok"], &fine["last_seq"], &fine["head"]), (&json!(true), &json!(5), &json!(verified.head.hex())));

    let file = std::fs::read_dir(directory(state)).unwrap().next().unwrap().unwrap().path();
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.replace("nowhere", "elsewhere")).unwrap();
    let broken = command(state, &["--verify"]).await;
    let said = String::from_utf8(broken.stderr).unwrap();
    assert_eq!(broken.status.code(), Some(1));
    let name = file.file_name().unwrap().to_str().unwrap();
    assert!(said.contains(&format!("{name} line 5, record 5")), "{said}");
    let broken = command(state, &["--verify", "--json"]).await;
    assert_eq!(broken.status.code(), Some(1));
    assert_eq!(serde_json::from_slice::<Value>(&broken.stdout).unwrap()["line"], 5);
}
