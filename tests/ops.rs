//! What operators see of a running gateway.

use exec_gateway::gateway::Gateway;
use serde_json::{Value, json};

use crate::registration::StoreAway;
use crate::support::{Caller, FakeExecutor, TestGateway, Upstream, eventually};

/// A page of the operators' listener.
async fn page(gateway: &Gateway, path: &str) -> (u16, String) {
    let answer = Caller::new(gateway.ops(), None).try_send("GET", path, &[], "").await.unwrap();
    (answer.status.as_u16(), String::from_utf8(answer.body.to_vec()).unwrap())
}

#[tokio::test]
async fn a_gateway_whose_store_is_away_is_alive_and_not_ready() {
    let gateway = TestGateway::start().await;
    let get = async |path| page(&gateway.gateway, path).await;
    assert_eq!(get("/readyz").await, (200, "ready\n".into()));
    let away = StoreAway::take(&gateway);
    assert_eq!(get("/readyz").await, (503, "store does not write\n".into()));
    assert_eq!(get("/healthz").await, (200, "ok\n".into()));
    let (status, metrics) = get("/metrics").await;
    assert!(status == 200 && metrics.contains("frames_dropped_total"), "{metrics}");
    away.give_back();
    eventually("it is ready again", async || (get("/readyz").await.0 == 200).then_some(())).await;
}

#[tokio::test]
async fn a_gateway_whose_validator_is_away_is_ready_as_long_as_it_can_serve_what_it_knows() {
    const DOWN: &str = "the validator upstream does not answer, and what was known of tokens is too old\n";
    let mut upstream = Upstream::start().await;
    let gateway = TestGateway::with(|config| upstream.configure(config)).await;
    upstream.knows_token("good", "w");
    let list = async |token: &str| {
        let caller = Caller::new(gateway.address(), Some(token.into()));
        caller.post("/api/connectors/envs/list", json!({})).await.status.as_u16()
    };
    let ready = async || page(&gateway.gateway, "/readyz").await;

    upstream.go_away().await;
    assert_eq!(list("good").await, 503);
    assert_eq!(ready().await, (503, DOWN.into()), "nobody was ever confirmed");
    upstream.come_back();
    assert_eq!(list("good").await, 200);
    assert_eq!(ready().await, (200, "ready\n".into()));
    upstream.go_away().await;
    assert_eq!((list("other").await, list("good").await), (503, 200));
    assert_eq!(ready().await, (200, "ready\n".into()), "who is known is served");
}

#[tokio::test]
async fn the_state_tells_what_is_connected_and_open() {
    let gateway = TestGateway::start().await;
    let credentials = gateway.executor("w", "box").await;
    let _connected = FakeExecutor::connected(&gateway, &credentials).await;
    let caller = gateway.caller("w").await;
    caller.post("/api/connectors/envs/list", json!({})).await;

    let (status, text) = page(&gateway.gateway, "/debug/state").await;

    let state: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((status, &state["draining"], &state["links"]["count"]), (200, &json!(false), &json!(1)));
    let link = &state["links"]["some"][0];
    assert_eq!((&link["executor"], &link["transport"]), (&json!(credentials.executor), &json!("noise")));
    assert_eq!(state["workspaces"]["some"], json!([{ "workspace": "w", "calls": 0, "sessions": 0 }]));
    assert_eq!(state["tokens"], json!({ "known": 1, "refused": 0 }));
    assert!(!text.contains("egx_") && !text.contains("egw_"), "no secrets");
}
