//! Bounds of the doors: what is too slow, too long or too much ends alone (decisions D9, D12).

use std::time::Duration;

use serde_json::json;
use tokio::time::timeout;

use crate::support::{Answer, Caller, FakeExecutor, PATIENCE, Reply, TestGateway, Wire, eventually};

async fn shell(caller: &Caller) -> Answer {
    caller.tool("box", "shell", json!({ "command": "true" })).await
}

async fn read_file(caller: &Caller) -> Answer {
    caller.tool("box", "read_file", json!({ "path": "a" })).await
}

#[track_caller]
fn assert_too_many_streams(answer: &Answer) {
    assert_eq!((answer.status.as_u16(), answer.code().as_str()), (429, "too_many_streams"), "{answer:?}");
    assert!(answer.header("retry-after").unwrap().parse::<u64>().unwrap() > 0);
}

#[tokio::test]
async fn a_client_that_never_ends_its_headers_is_cut_off() {
    let gateway = TestGateway::with(|config| config.edge.header_timeout_secs = 1).await;
    let mut silent = Wire::connect(gateway.address()).await;
    let mut slow = Wire::connect(gateway.address()).await;
    slow.send("GET /healthz HTTP/1.1\r\nhost: gw\r\nx-").await;
    assert_eq!((slow.until_closed().await, silent.until_closed().await), (String::new(), String::new()));
    assert_eq!(gateway.stranger().send("GET", "/healthz", &[], "").await.status, 200);
}

#[tokio::test]
async fn a_client_that_never_ends_its_body_is_told_so() {
    let gateway = TestGateway::with(|config| config.edge.body_timeout_secs = 1).await;
    let token = gateway.caller("w").await.token.unwrap();
    let mut wire = Wire::connect(gateway.address()).await;
    wire.send(&format!(
        "POST /api/connectors/envs/box/tool/call HTTP/1.1\r\nhost: gw\r\nauthorization: Bearer {token}\r\n\
         content-length: 100\r\n\r\n{{\"tool\":"
    ))
    .await;
    let answer = wire.receive().await;
    assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
    assert!(answer.contains("\"body_timeout\""), "{answer}");
}

#[tokio::test]
async fn a_connection_without_a_further_request_is_closed() {
    let gateway = TestGateway::with(|config| config.edge.idle_timeout_secs = 1).await;
    let mut wire = Wire::connect(gateway.address()).await;
    wire.send("GET /healthz HTTP/1.1\r\nhost: gw\r\n\r\n").await;
    assert!(wire.receive().await.starts_with("HTTP/1.1 200 "));
    wire.until_closed().await;
}

#[tokio::test]
async fn executors_past_the_bound_are_told_to_come_again() {
    let gateway = TestGateway::with(|config| config.link.links_max = 1).await;
    let (first, second) = (gateway.executor("w", "first").await, gateway.executor("w", "second").await);
    let (executor, link) = FakeExecutor::connected(&gateway, &first).await;
    let late = FakeExecutor::new(gateway.address(), &second);
    let url = late.registered().await;
    assert_eq!(late.dial(&url).await.err(), Some(503));
    // One that is there already may dial again.
    let again = executor.register_and_dial().await;
    link.ended().await;
    drop(again);
    eventually("there is room", async || late.dial(&url).await.ok()).await;
}

#[tokio::test]
async fn headers_past_the_bound_are_refused() {
    let gateway = TestGateway::with(|config| config.edge.header_bytes_max = 8192).await;
    let long = "x".repeat(10_000);
    let answer = gateway.stranger().send("GET", "/healthz", &[("x-long", &long)], "").await;
    assert_eq!(answer.status, 431);
}

#[tokio::test]
async fn what_is_no_http_at_all_harms_nobody() {
    let gateway = TestGateway::start().await;
    for junk in ["\0\0\0\0\r\n\r\n", "GET\r\n\r\n", "\u{16}\u{3}\u{1}\0\u{5}hello", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]
    {
        let mut wire = Wire::connect(gateway.address()).await;
        wire.send(junk).await;
        let answer = wire.until_closed().await;
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer}");
    }
    assert_eq!(gateway.stranger().send("GET", "/healthz", &[], "").await.status, 200);
}

#[tokio::test]
async fn connections_past_the_bound_wait_until_another_ends() {
    let gateway = TestGateway::with(|config| config.edge.connections_max = 2).await;
    let (first, _second) = (Wire::connect(gateway.address()).await, Wire::connect(gateway.address()).await);
    let client = gateway.stranger();
    let mut third = Box::pin(client.send("GET", "/healthz", &[], ""));
    assert!(timeout(Duration::from_millis(300), &mut third).await.is_err(), "it is not accepted yet");
    drop(first);
    assert_eq!(third.await.status, 200);
}

#[tokio::test]
async fn streams_past_the_bound_of_a_link_are_refused() {
    let gateway = TestGateway::with(|config| config.link.streams_max = 1).await;
    let credentials = gateway.executor("w", "box").await;
    let (_executor, _link) = FakeExecutor::connected(&gateway, &credentials).await;
    let caller = gateway.caller("w").await;
    assert_eq!(shell(&caller).await.status, 200);
    assert_too_many_streams(&read_file(&caller).await);
    assert_eq!(shell(&caller).await.status, 200);
}

#[tokio::test]
async fn streams_past_the_share_of_a_workspace_leave_room_for_another() {
    let gateway = TestGateway::with(|config| config.link.workspace_streams_max = 1).await;
    let credentials = gateway.executor("w", "box").await;
    let bind = exec_gateway::admin::Request::ExecutorBind {
        executor: credentials.executor.parse().unwrap(),
        workspace: "other".parse().unwrap(),
        name: "box".parse().unwrap(),
        default: false,
    };
    gateway.admin(bind).await;
    let (_executor, link) = FakeExecutor::connected(&gateway, &credentials).await;
    let (caller, other) = (gateway.caller("w").await, gateway.caller("other").await);
    assert_eq!(shell(&caller).await.status, 200);
    assert_too_many_streams(&read_file(&caller).await);
    assert_eq!(read_file(&other).await.status, 200);
    assert!(!link.is_ended());
}

#[tokio::test]
async fn handshakes_past_the_bound_of_a_link_wait_their_turn() {
    let gateway = TestGateway::with(|config| config.link.handshakes_pending_max = 1).await;
    let credentials = gateway.executor("w", "box").await;
    let (executor, _link) = FakeExecutor::connected(&gateway, &credentials).await;
    let caller = gateway.caller("w").await;
    executor.on("handshake", Reply::Held);
    let (registry, workspaces) = (&gateway.gateway.api().corridor.registry, &gateway.gateway.api().workspaces);
    let id = credentials.executor.parse().unwrap();
    let (processes, files, ()) = tokio::join!(shell(&caller), read_file(&caller), async {
        eventually("both calls wait", async || {
            (executor.asked("handshake") > 0 && workspaces.all()[0].calls() == 2).then_some(())
        })
        .await;
        // What would have been sent is there before the pongs are back.
        for _ in 0..3 {
            assert!(!registry.yields_to(&id, None, PATIENCE).await, "the executor answers pings");
        }
        assert_eq!(executor.asked("handshake"), 1);
        executor.release();
    });
    assert_eq!((processes.status.as_u16(), files.status.as_u16()), (200, 200));
    assert_eq!(executor.asked("handshake"), 2);
}

#[tokio::test]
async fn a_credential_of_any_length_is_refused_and_not_asked_about() {
    let gateway = TestGateway::start().await;
    let long = Caller::new(gateway.address(), Some("x".repeat(20_000)));
    let answer = long.post("/api/connectors/envs/list", json!({})).await;
    assert_eq!((answer.status.as_u16(), answer.code().as_str()), (401, "invalid_token"));
}
