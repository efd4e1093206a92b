//! Memory: a flood of large work is refused before it ends the process, and what runs goes on.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_util::future::join_all;
use serde_json::{Value, json};

use crate::support::gateway::workspace;
use crate::support::{Answer, Caller, CodexExecutor, DaemonProcess, Scratch, TestGateway, Workbench, noise, peak_mib};

const MIB: usize = 1024 * 1024;

/// Whether an answer is a refusal for want of memory, as clients are to see it.
#[track_caller]
fn is_shed(answer: &Answer) -> bool {
    let shed = answer.status == 503;
    if shed {
        assert_eq!((answer.code().as_str(), answer.header("retry-after")), ("overloaded", Some("1")), "{answer:?}");
    } else {
        assert_eq!(answer.status, 200, "{answer:?}");
    }
    shed
}

/// All output of a session so far, and whether there is more to come.
async fn output(caller: &Caller, session: &str, after: u64) -> (String, u64, bool) {
    let path = format!("/api/connectors/processes/{session}/output?since={after}&wait_ms=1000&max_bytes=8388608");
    let answer = caller.send("GET", &path, &[], "").await;
    assert_eq!(answer.status, 200, "{answer:?}");
    let page = answer.json();
    let text =
        |chunk: &Value| String::from_utf8(STANDARD.decode(chunk["data_b64"].as_str().unwrap()).unwrap()).unwrap();
    let chunks = page["chunks"].as_array().unwrap();
    let next = chunks.last().map_or(after, |chunk| chunk["seq"].as_u64().unwrap());
    (chunks.iter().map(text).collect(), next, page["session_alive"].as_bool().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_large_calls_is_shed_and_the_process_and_its_sessions_live() {
    const LIMIT_MIB: u64 = 640;
    const CALLERS: usize = 12;
    const FILE_BYTES: usize = 16 * MIB;
    let state = Scratch::new();
    let bounds = [format!("--edge-body-bytes-max={}", 32 * MIB), format!("--memory-bodies-bytes-max={}", 80 * MIB)];
    let daemon = DaemonProcess::start_in_memory(&state, LIMIT_MIB, &bounds.each_ref().map(String::as_str)).await;
    let (caller, credentials) = workspace(&state, &daemon).await;
    let executor = CodexExecutor::connected(&format!("http://{}", daemon.address), &credentials, &caller, "box").await;
    let home = executor.home().display().to_string();
    let content = noise(1, FILE_BYTES);
    std::fs::write(executor.home().join("large"), &content).unwrap();
    let started =
        json!({ "command": "for i in $(seq 1 60); do seq $i 60 10000; sleep 0.05; done", "yield_time_ms": 0 });
    let started = caller.result("box", "exec_command", started).await;
    let session = started["structuredContent"]["session_id"].as_str().unwrap().to_owned();

    let body = STANDARD.encode(&content);
    let (over, shed, done) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let count = |answer: &Answer| if is_shed(answer) { &shed } else { &done }.fetch_add(1, Ordering::Relaxed);
    let flood = async |nth: usize| {
        for _ in 0..3 {
            let path = format!("{home}/copy-{nth}");
            let write = json!({ "path": path, "content": body, "encoding": "base64" });
            count(&caller.tool("box", "write_file", write).await);
            let answer =
                caller.tool("box", "read_file", json!({ "path": format!("{home}/large"), "encoding": "base64" })).await;
            if count(&answer) == 0 || answer.status == 200 {
                let read = answer.json()["content"][0]["text"].as_str().map(|text| text.len());
                assert!(read.is_none_or(|read| read >= body.len()), "{read:?}");
            }
        }
    };
    let follow = async {
        let (mut text, mut seq) = (String::new(), 0);
        loop {
            let (more, next, alive) = output(&caller, &session, seq).await;
            text += &more;
            seq = next;
            if !alive && more.is_empty() {
                return text;
            }
        }
    };
    let flooding = async {
        join_all((0..CALLERS).map(&flood)).await;
        over.store(true, Ordering::Relaxed);
    };
    let (text, ()) = tokio::join!(follow, flooding);

    let expected: String =
        (1..=60).flat_map(|first| (first..=10000).step_by(60)).map(|number| format!("{number}\n")).collect();
    assert!(text == expected, "{} bytes of {} came", text.len(), expected.len());
    let (shed, done) = (shed.into_inner(), done.into_inner());
    println!(
        "{CALLERS} callers with {} MiB each way: {done} calls done, {shed} shed with 503; at most {} MiB resident of \
         {LIMIT_MIB} MiB; {} bytes of a session meanwhile, all there",
        FILE_BYTES / MIB,
        peak_mib(daemon.pid()),
        text.len()
    );
    assert!(shed > 0 && done > 0, "{shed} were shed, {done} done");
    let answer =
        caller.tool("box", "read_file", json!({ "path": format!("{home}/large"), "encoding": "base64" })).await;
    assert!(!is_shed(&answer), "there is memory again");
}

#[tokio::test(flavor = "multi_thread")]
async fn past_the_watermark_new_work_is_refused_and_what_runs_is_served() {
    let bench = Workbench::start().await;
    let started = json!({ "command": "cat", "yield_time_ms": 0 });
    let started = bench.caller.result("box", "exec_command", started).await;
    let session = started["structuredContent"]["session_id"].as_str().unwrap().to_owned();
    let (caller, gateway) = (&bench.caller, &bench.gateway);
    let is_high = async |high: bool| {
        crate::support::eventually("the watermark is looked at", async || {
            (gateway.gateway.api().memory.is_high() == high).then_some(())
        })
        .await;
    };
    let large = vec![b'x'; 100_000];

    // More than a mebibyte is taken by any process.
    gateway.reload(|config| config.memory.limit_bytes = MIB).unwrap();
    is_high(true).await;
    assert!(is_shed(&caller.tool("box", "shell", json!({ "command": "true" })).await));
    assert!(is_shed(&caller.post("/api/connectors/envs/box/tool/call", json!({ "x": "x".repeat(100_000) })).await));
    let path = format!("/api/connectors/envs/box/files?path={}/f", bench.executor.home().display());
    assert!(is_shed(&caller.send("PUT", &path, &[], large).await));
    assert_eq!(caller.environments().await, ["box"]);
    let path = format!("/api/connectors/processes/{session}/stdin");
    let written = caller.post(&path, json!({ "data_b64": STANDARD.encode("hello\n") })).await;
    assert!(written.status.is_success(), "{written:?}");
    assert_eq!(output(caller, &session, 0).await.0, "hello\n");
    let read = caller.tool("box", "read_output", json!({ "session_id": session })).await;
    assert!(!is_shed(&read));
    let end = caller.post(&format!("/api/connectors/processes/{session}/terminate"), json!({})).await;
    assert_eq!(end.status, 200, "{end:?}");
    let ops = Caller::new(gateway.gateway.ops(), None);
    assert_eq!(ops.send("GET", "/readyz", &[], "").await.status, 200);
    assert_eq!(ops.send("GET", "/debug/state", &[], "").await.json()["memory"]["high"], true);

    gateway.reload(|config| config.memory.limit_bytes = 0).unwrap();
    is_high(false).await;
    assert!(!is_shed(&caller.tool("box", "shell", json!({ "command": "true" })).await));
}

#[tokio::test]
async fn bodies_past_their_part_of_the_memory_are_refused_until_others_are_gone() {
    let gateway = TestGateway::with(|config| {
        (config.edge.body_bytes_max, config.memory.bodies_bytes_max) = (1000, 1000);
    })
    .await;
    let caller = gateway.caller("w").await;
    let held = gateway.gateway.api().memory.hold();
    held.grow(1).unwrap();
    let answer = caller.tool("box", "shell", json!({ "command": "true" })).await;
    assert_eq!(answer.status, 404, "a short one that says so fits");
    held.grow(999).unwrap();
    assert!(is_shed(&caller.tool("box", "shell", json!({ "command": "true" })).await));
    drop(held);
    assert_eq!(caller.tool("box", "shell", json!({ "command": "true" })).await.status, 404);
}
