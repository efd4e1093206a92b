//! Proxy tokens at the REST door, with a validator behind the gateway that is busy, broken or gone (decisions D5).

use exec_gateway::admin::{Request, Response};
use exec_gateway::config::Config;
use exec_gateway::protocol::ids::WorkspaceId;
use futures_util::future::join_all;
use serde_json::json;

use crate::support::{Answer, Caller, FakeExecutor, TestGateway, Upstream, Verdict, eventually};

async fn start() -> (Upstream, TestGateway) {
    with(|_| {}).await
}

async fn with(change: impl FnOnce(&mut Config)) -> (Upstream, TestGateway) {
    let upstream = Upstream::start().await;
    let both = |config: &mut Config| {
        upstream.configure(config);
        change(config);
    };
    let gateway = TestGateway::with(both).await;
    (upstream, gateway)
}

fn bearing(gateway: &TestGateway, token: &str) -> Caller {
    Caller::new(gateway.address(), Some(token.to_owned()))
}

async fn list(caller: &Caller) -> Answer {
    caller.post("/api/connectors/envs/list", json!({})).await
}

#[track_caller]
fn assert_invalid(answer: &Answer) {
    assert_eq!((answer.status.as_u16(), answer.code().as_str()), (401, "invalid_token"), "{answer:?}");
}

/// Nobody could say, which is no verdict about the token, and tells nothing about who could not.
#[track_caller]
fn assert_unavailable(answer: &Answer) {
    assert_eq!((answer.status.as_u16(), answer.code().as_str()), (503, "auth_unavailable"), "{answer:?}");
    assert!(!String::from_utf8_lossy(&answer.body).contains("127.0.0.1"), "{answer:?}");
}

#[tokio::test]
async fn a_token_that_the_validator_knows_opens_its_workspace() {
    let (upstream, gateway) = start().await;
    upstream.knows_token("theirs", "w");
    let credentials = gateway.executor("w", "box").await;
    let _connected = FakeExecutor::connected(&gateway, &credentials).await;
    assert_eq!(bearing(&gateway, "theirs").environments().await, ["box"]);
    assert_invalid(&list(&bearing(&gateway, "unknown")).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_first_callers_cost_one_question() {
    let (upstream, gateway) = start().await;
    upstream.knows_token("t", "w");
    upstream.hold();
    let caller = bearing(&gateway, "t");
    let counters = gateway.gateway.api().corridor.auth.counters();
    let (answers, ()) = tokio::join!(join_all((0..1000).map(|_| list(&caller))), async {
        eventually("all of them wait", async || (counters.snapshot().misses == 1000).then_some(())).await;
        upstream.release();
    });
    assert!(answers.iter().all(|answer| answer.status == 200));
    assert_eq!(upstream.asked("t"), 1);
}

#[tokio::test]
async fn a_caller_that_leaves_does_not_take_the_question_with_it() {
    let (upstream, gateway) = start().await;
    upstream.knows_token("t", "w");
    upstream.hold();
    let caller = bearing(&gateway, "t");
    let mut left = Box::pin(list(&caller));
    let asked = eventually("the validator is asked", async || (upstream.asked("t") == 1).then_some(()));
    tokio::select! {
        answer = &mut left => panic!("{answer:?}"),
        () = asked => {}
    }
    drop(left);
    upstream.release();
    assert_eq!(list(&bearing(&gateway, "t")).await.status, 200);
    assert_eq!(upstream.asked("t"), 1);
}

#[tokio::test]
async fn junk_never_costs_a_good_token_its_place() {
    let (upstream, gateway) = with(|config| {
        config.auth.positive_entries_max = 16;
        config.auth.negative_entries_max = 16;
    })
    .await;
    upstream.knows_token("good", "w");
    let good = bearing(&gateway, "good");
    assert_eq!(list(&good).await.status, 200);
    for n in 0..200 {
        assert_invalid(&list(&bearing(&gateway, &format!("junk-{n}"))).await);
    }
    assert_eq!(upstream.asked_in_all(), 201);
    assert_eq!(list(&good).await.status, 200);
    assert_eq!(upstream.asked("good"), 1);
}

#[tokio::test]
async fn known_verdicts_are_not_asked_for_again() {
    let (upstream, gateway) = start().await;
    upstream.knows_token("good", "w");
    for _ in 0..10 {
        assert_eq!(list(&bearing(&gateway, "good")).await.status, 200);
        assert_invalid(&list(&bearing(&gateway, "bad")).await);
    }
    assert_eq!((upstream.asked("good"), upstream.asked("bad")), (1, 1));
}

#[tokio::test]
async fn a_validator_that_fails_in_any_way_is_no_refusal_and_is_not_remembered() {
    let (mut upstream, gateway) = start().await;
    upstream.knows_token("t", "w");
    let caller = bearing(&gateway, "t");
    for verdict in [
        Verdict::Say(500, json!({})),
        Verdict::Say(503, json!({})),
        Verdict::Say(403, json!({})),
        Verdict::Say(404, json!({})),
        Verdict::Say(200, json!({})),
        Verdict::Say(200, json!({ "workspace_id": "" })),
        Verdict::Say(200, json!({ "workspace_id": "a/b" })),
        Verdict::Say(200, json!("w")),
        Verdict::Silence,
    ] {
        upstream.says_to_all(Some(verdict));
        assert_unavailable(&list(&caller).await);
    }
    upstream.says_to_all(None);
    upstream.go_away().await;
    assert_unavailable(&list(&caller).await);
    upstream.come_back();
    assert_eq!(list(&caller).await.status, 200);
}

#[tokio::test]
async fn a_token_once_good_is_believed_while_the_validator_fails() {
    let (mut upstream, gateway) = with(|config| config.auth.positive_ttl_secs = 1).await;
    upstream.knows_token("t", "w");
    let caller = bearing(&gateway, "t");
    let counters = gateway.gateway.api().corridor.auth.counters();
    assert_eq!(list(&caller).await.status, 200);
    upstream.says_to_all(Some(Verdict::Say(500, json!({}))));
    eventually("it is served stale", async || {
        assert_eq!(list(&caller).await.status, 200);
        (counters.snapshot().stale > 0).then_some(())
    })
    .await;
    upstream.go_away().await;
    assert_eq!(list(&caller).await.status, 200);
    assert_unavailable(&list(&bearing(&gateway, "another")).await);
    // The first verdict ends it.
    upstream.says_to_all(Some(Verdict::Say(401, json!({}))));
    upstream.come_back();
    eventually("it is refused", async || (list(&caller).await.status == 401).then_some(())).await;
}

#[tokio::test]
async fn a_good_token_is_asked_for_again_after_its_time() {
    let (upstream, gateway) = with(|config| config.auth.positive_ttl_secs = 1).await;
    upstream.knows_token("t", "w");
    let caller = bearing(&gateway, "t");
    eventually("it is asked for again", async || {
        assert_eq!(list(&caller).await.status, 200);
        (upstream.asked("t") == 2).then_some(())
    })
    .await;
    upstream.says("t", Verdict::Say(401, json!({})));
    eventually("it is refused", async || (list(&caller).await.status == 401).then_some(())).await;
}

#[tokio::test]
async fn a_refused_token_gets_another_chance_after_its_time() {
    let (upstream, gateway) = with(|config| config.auth.negative_ttl_secs = 1).await;
    let caller = bearing(&gateway, "t");
    assert_invalid(&list(&caller).await);
    upstream.knows_token("t", "w");
    eventually("it is good", async || (list(&caller).await.status == 200).then_some(())).await;
    assert_eq!(upstream.asked("t"), 2);
}

#[tokio::test]
async fn the_gateways_own_tokens_need_no_validator() {
    let (mut upstream, gateway) = start().await;
    upstream.go_away().await;
    assert_eq!(list(&gateway.caller("w").await).await.status, 200);
    let unknown = format!("egw_{}", "x".repeat(43));
    assert_invalid(&list(&bearing(&gateway, &unknown)).await);
    assert_eq!(upstream.asked_in_all(), 0);
}

#[tokio::test]
async fn a_revoked_token_is_refused_at_once() {
    let gateway = TestGateway::start().await;
    let create =
        Request::TokenCreate { workspace: WorkspaceId::new("w").unwrap(), user: None, ttl: None, read_only: false };
    let Response::Token { id, token, .. } = gateway.admin(create).await else { panic!("no token") };
    let (revoked, other) = (bearing(&gateway, token.expose()), gateway.caller("w").await);
    assert_eq!(list(&revoked).await.status, 200);
    gateway.admin(Request::TokenRevoke { id }).await;
    assert_invalid(&list(&revoked).await);
    assert_eq!(list(&other).await.status, 200);
}
