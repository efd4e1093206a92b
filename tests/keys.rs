//! Rotation of the gateway's keys while everything runs under them.

use exec_gateway::admin::{Request, Response};
use exec_gateway::protocol::ids::WorkspaceId;
use exec_gateway::store::KeyPurpose;
use serde_json::json;
use tokio::task::JoinSet;

use crate::support::{Caller, CodexExecutor, TestGateway, Workbench};

async fn rotate(gateway: &TestGateway, purpose: KeyPurpose) {
    let Response::Keys(keys) = gateway.admin(Request::KeyRotate { purpose }).await else { panic!("no keys") };
    let [entry] = keys.as_slice() else { panic!("{keys:?}") };
    assert!(entry.purpose == purpose && entry.previous.is_some() && entry.previous.as_ref() != Some(&entry.current));
}

async fn cap_token(gateway: &TestGateway) -> Caller {
    let workspace = WorkspaceId::new("w").unwrap();
    let ttl = std::time::Duration::from_secs(600);
    let request = Request::CapToken { workspace, turn: None, user: None, ttl };
    let Response::CapToken { token } = gateway.admin(request).await else { panic!("no token") };
    Caller::new(gateway.address(), Some(token.expose().to_owned()))
}

#[tokio::test(flavor = "multi_thread")]
async fn no_call_fails_while_every_key_is_rotated() {
    let bench = Workbench::start().await;
    let gateway = &bench.gateway;
    let held = cap_token(gateway).await;
    let mut load = JoinSet::new();
    let (done, _) = tokio::sync::watch::channel(false);
    for caller in [held.clone(), bench.caller.clone()] {
        let done = done.subscribe();
        load.spawn(async move {
            let mut calls = 0;
            while !*done.borrow() || calls == 0 {
                let answer = caller.tool("box", "shell", json!({ "command": ["true"] })).await;
                assert_eq!(
                    (answer.status.as_u16(), &answer.json()["structuredContent"]["exit_code"]),
                    (200, &json!(0))
                );
                calls += 1;
            }
            calls
        });
    }

    for purpose in KeyPurpose::ALL {
        rotate(gateway, purpose).await;
        // What was signed before is good, and so is what is signed now; also when the executor has to come again.
        assert_eq!(held.tool("box", "shell", json!({ "command": ["true"] })).await.status, 200);
        assert_eq!(cap_token(gateway).await.tool("box", "shell", json!({ "command": ["true"] })).await.status, 200);
    }
    done.send(true).unwrap();
    while let Some(calls) = load.join_next().await {
        assert!(calls.unwrap() > 0);
    }

    // The second rotation is the end of what was signed before the first.
    rotate(gateway, KeyPurpose::CapToken).await;
    let refused = held.post("/api/connectors/envs/list", json!({})).await;
    assert_eq!((refused.status.as_u16(), refused.code().as_str()), (401, "invalid_token"));
    // The gateway's own right to open streams is not among it.
    gateway.gateway.api().workspaces.all().iter().for_each(|workspace| workspace.pool.close_all());
    assert_eq!(bench.caller.tool("box", "shell", json!({ "command": ["true"] })).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_executor_comes_back_after_the_keys_of_its_ticket_and_token_were_rotated() {
    let gateway = TestGateway::start().await;
    let credentials = gateway.executor("w", "box").await;
    let caller = gateway.caller("w").await;
    let first = CodexExecutor::connected(&gateway.url(), &credentials, &caller, "box").await;
    rotate(&gateway, KeyPurpose::Ticket).await;
    rotate(&gateway, KeyPurpose::Executor).await;

    // Its socket goes, and it dials the URL that it was given under the old key.
    gateway.gateway.api().corridor.registry.close_all(exec_gateway::relay::link::CloseReason::Draining);
    let answer = caller.tool("box", "shell", json!({ "command": ["true"] })).await;
    assert_eq!(answer.status, 200, "{answer:?}");

    // Another process registers with the token made under the old key.
    drop(first);
    let _second = CodexExecutor::connected(&gateway.url(), &credentials, &caller, "box").await;
}
