//! Bounds of the doors: what is too slow, too long or too much ends alone (decisions D9, D12).

use std::time::{Duration, SystemTime};

use exec_gateway::store::{Registration, Transport};
use futures_util::future::join_all;
use rustix::process::{Resource, getrlimit, setrlimit};
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
async fn who_asks_too_often_is_told_when_to_come_again_and_executors_never_are() {
    let gateway = TestGateway::with(|config| {
        (config.workspace.calls_per_second_max, config.workspace.calls_burst_max) = (1, 3);
    })
    .await;
    let (hasty, calm) = (gateway.caller("hasty").await, gateway.caller("calm").await);
    let credentials = gateway.executor("hasty", "box").await;
    let mut refused = 0;
    for _ in 0..8 {
        for answer in [
            hasty.post("/api/connectors/envs/list", json!({})).await,
            hasty.tool("nowhere", "shell", json!({ "command": "true" })).await,
            hasty.send("GET", "/api/connectors/envs/nowhere/files?path=a", &[], "").await,
            hasty.send("GET", "/api/connectors/processes", &[], "").await,
            hasty.post(&format!("/cloud/environment/{}/connect", credentials.executor), json!({})).await,
        ] {
            match (answer.status.as_u16(), answer.header("retry-after")) {
                (429, Some("1" | "2")) => {
                    assert_eq!(answer.code(), "rate_limited");
                    refused += 1;
                }
                (200 | 400 | 404, None) => {}
                _ => panic!("{answer:?}"),
            }
        }
        let executor = FakeExecutor::new(gateway.address(), &credentials);
        executor.registered().await;
    }
    assert!(refused > 20, "{refused} of 40 requests were refused");
    assert_eq!(calm.post("/api/connectors/envs/list", json!({})).await.status, 200, "others are not concerned");
}

/// The request of a new executor's socket, as one that has registered sends it.
async fn upgrade_request(gateway: &TestGateway, name: &str) -> String {
    let corridor = &gateway.gateway.api().corridor;
    let made = corridor.store.create_executor(&"machines".parse().unwrap(), &name.parse().unwrap(), false, None).await;
    let executor = made.unwrap().id;
    let ticket = corridor.auth.tickets().mint(&executor);
    let registration = Registration {
        id: format!("exr_{name}").parse().unwrap(),
        executor: executor.clone(),
        transport: Transport::Noise,
        public_key: vec![0; 1216],
        credential: [0; 32],
        created_at: SystemTime::now(),
    };
    corridor.store.save_registration(registration, 1).await.unwrap();
    format!(
        "GET /bridge/{executor}?token={ticket}&reg=exr_{name} HTTP/1.1\r\nhost: gw\r\nconnection: upgrade\r\n\
         upgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn thousands_of_half_open_connections_hold_nobody_up_and_go() {
    // Both ends of each are files of this process.
    let mut open_files = getrlimit(Resource::Nofile);
    open_files.current = open_files.maximum;
    setrlimit(Resource::Nofile, open_files).unwrap();
    let gateway = TestGateway::with(|config| {
        (config.edge.header_timeout_secs, config.edge.body_timeout_secs) = (3, 3);
        (config.link.ping_secs, config.link.dead_secs) = (1, 3);
    })
    .await;
    let (caller, other) = (gateway.caller("w").await, gateway.caller("other").await);
    let half_body = format!(
        "POST /api/connectors/envs/box/tool/call HTTP/1.1\r\nhost: gw\r\nauthorization: Bearer {}\r\n\
         content-length: 100\r\n\r\n{{",
        other.token.unwrap()
    );
    let names: Vec<String> = (0..200).map(|nth| format!("box-{nth}")).collect();
    let upgrades = join_all(names.iter().map(|name| upgrade_request(&gateway, name))).await;
    let half_open = join_all((0..2000).map(async |nth| {
        let mut wire = Wire::connect(gateway.address()).await;
        match nth % 10 {
            0..=4 => {}
            5..=7 => wire.send("GET /healthz HTTP/1.1\r\nhost: gw\r\nx-").await,
            8 => wire.send(&half_body).await,
            _ => wire.send(&upgrades[nth / 10]).await,
        }
        wire
    }))
    .await;

    for _ in 0..20 {
        assert_eq!(gateway.stranger().send("GET", "/healthz", &[], "").await.status, 200);
        caller.environments().await;
    }
    let said = join_all(half_open.into_iter().map(async |mut wire| wire.until_closed().await)).await;
    for (nth, said) in said.iter().enumerate() {
        let expected = match nth % 10 {
            0..=7 => "",
            8 => "HTTP/1.1 408 ",
            _ => "HTTP/1.1 101 ",
        };
        assert!(said.starts_with(expected) && said.is_empty() == expected.is_empty(), "{nth}: {said}");
    }
    let api = gateway.gateway.api();
    eventually("the links are gone", async || api.corridor.registry.is_empty().then_some(())).await;
    assert_eq!(api.workspaces.peek(&"other".parse().unwrap()).unwrap().calls(), 0);
    caller.environments().await;
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
