//! The connector REST door: credentials, environments, and calls that are wrong in every way (connectors-api.md §2.2).

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use exec_gateway::admin::{Request, Response};
use exec_gateway::protocol::cap_token::{self, CapClaims};
use exec_gateway::protocol::ids::{TurnId, WorkspaceId};
use exec_gateway::store::KeyPurpose;
use serde_json::{Value, json};

use crate::support::{Answer, Caller, FakeExecutor, TestGateway, Wire, eventually};

const LIST: &str = "/api/connectors/envs/list";
const CALL: &str = "/api/connectors/envs/box/tool/call";

async fn list_with(gateway: &TestGateway, authorizations: &[&str]) -> Answer {
    let headers: Vec<(&str, &str)> = authorizations.iter().map(|value| ("authorization", *value)).collect();
    gateway.stranger().send("POST", LIST, &headers, "{}").await
}

fn message(answer: &Answer) -> String {
    answer.json()["error"]["message"].as_str().unwrap().to_owned()
}

/// A gateway with a caller of workspace `w`, whose environment `box` has no executor on the line.
async fn with_unconnected_box() -> (TestGateway, Caller) {
    let gateway = TestGateway::start().await;
    gateway.executor("w", "box").await;
    let caller = gateway.caller("w").await;
    (gateway, caller)
}

#[tokio::test]
async fn without_a_bearer_token_it_is_missing() {
    let gateway = TestGateway::start().await;
    for authorizations in [&[][..], &["Basic dTpw"], &["Bearer"], &["Bearer "]] {
        let answer = list_with(&gateway, authorizations).await;
        assert_eq!((answer.status.as_u16(), answer.code().as_str()), (401, "missing_bearer"), "{authorizations:?}");
    }
}

#[tokio::test]
async fn a_token_that_is_wrong_in_any_way_is_invalid() {
    let gateway = TestGateway::start().await;
    let good = gateway.caller("w").await.token.unwrap();
    let unknown = format!("Bearer egw_{}", "x".repeat(43));
    let twice = format!("Bearer {good}");
    let followed = format!("Bearer {good} more");
    for authorizations in
        [&["Bearer x"][..], &["Bearer a.b.c"], &[unknown.as_str()], &[followed.as_str()], &[twice.as_str(), "Bearer x"]]
    {
        let answer = list_with(&gateway, authorizations).await;
        assert_eq!((answer.status.as_u16(), answer.code().as_str()), (401, "invalid_token"), "{authorizations:?}");
    }
}

#[tokio::test]
async fn the_scheme_may_be_written_in_any_case() {
    let gateway = TestGateway::start().await;
    let token = gateway.caller("w").await.token.unwrap();
    for scheme in ["Bearer", "bearer", "BEARER"] {
        assert_eq!(list_with(&gateway, &[&format!("{scheme} {token}")]).await.status, 200);
    }
}

#[tokio::test]
async fn a_cap_token_opens_its_workspace_until_it_expires() {
    let gateway = TestGateway::start().await;
    let workspace = WorkspaceId::new("w").unwrap();
    let mint = Request::CapToken { workspace: workspace.clone(), turn: None, user: None, ttl: Duration::from_secs(60) };
    let Response::CapToken { token, .. } = gateway.admin(mint).await else { panic!("no cap-token") };
    assert_eq!(list_with(&gateway, &[&format!("Bearer {}", token.expose())]).await.status, 200);

    let keys = gateway.gateway.api().corridor.store.keyring(KeyPurpose::CapToken).await.unwrap();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let mut claims = CapClaims {
        turn_id: TurnId::new("t").unwrap(),
        workspace_id: workspace,
        user_id: None,
        iat: now - 100,
        exp: now + 60,
        skip_audit: false,
        kid: Some(keys.current.kid.clone()),
    };
    let bearer = |claims: &CapClaims| format!("Bearer {}", cap_token::mint(claims, &keys.current.secret));
    assert_eq!(list_with(&gateway, &[&bearer(&claims)]).await.status, 200);
    claims.exp = now - 10;
    let answer = list_with(&gateway, &[&bearer(&claims)]).await;
    assert_eq!((answer.status.as_u16(), answer.code().as_str()), (401, "invalid_token"));
    assert_eq!(message(&answer), "the token has expired");
}

#[tokio::test]
async fn a_list_without_executors_is_empty_and_not_null() {
    let (_gateway, caller) = with_unconnected_box().await;
    assert_eq!(&caller.post(LIST, json!({})).await.body[..], b"{\"envs\":[]}\n");
}

#[tokio::test]
async fn the_list_has_the_original_form_and_only_what_is_connected() {
    let (gateway, caller) = with_unconnected_box().await;
    let create = Request::ExecutorCreate {
        workspace: WorkspaceId::new("w").unwrap(),
        name: "mac".parse().unwrap(),
        default: true,
    };
    let Response::ExecutorCreated { exe_id, token, .. } = gateway.admin(create).await else { panic!("no executor") };
    let credentials = crate::support::Credentials { executor: exe_id.to_string(), token: token.expose().into() };
    let _connected = FakeExecutor::connected(&gateway, &credentials).await;

    let answer = caller.post(LIST, Value::Null).await;

    assert_eq!(answer.header("content-type"), Some("application/json"));
    let list = answer.json();
    let [env] = list["envs"].as_array().unwrap().as_slice() else { panic!("{list}") };
    let mut members: Vec<&str> = env.as_object().unwrap().keys().map(String::as_str).collect();
    members.sort_unstable();
    assert_eq!(members, ["is_default", "last_seen", "name", "tools", "type"]);
    assert_eq!((&env["name"], &env["type"], &env["is_default"]), (&json!("mac"), &json!("executor"), &json!(true)));
    // 2026-05-20T10:00:00Z: UTC, whole seconds.
    let shape: String =
        env["last_seen"].as_str().unwrap().chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
    assert_eq!(shape, "0000-00-00T00:00:00Z");

    let tools = env["tools"].as_array().unwrap();
    let names: Vec<&str> = tools.iter().map(|tool| tool["name"].as_str().unwrap()).collect();
    let original = ["shell", "read_file", "write_file", "apply_patch", "copy_path", "exec_command"];
    let in_order: Vec<&str> = original.into_iter().filter(|name| names.contains(name)).collect();
    assert_eq!(names[..in_order.len()], in_order, "the original's tools come first and in its order");
    assert!(names.starts_with(&["shell", "read_file", "write_file"]));
    for tool in tools {
        assert_eq!(tool["kind"], "core");
        assert!(tool["description"].as_str().is_some_and(|text| !text.is_empty()));
        assert_eq!(tool["inputSchema"]["type"], "object");
    }
}

#[tokio::test]
async fn an_unknown_environment_is_not_found() {
    let (_gateway, caller) = with_unconnected_box().await;
    for name in ["nowhere", "%62ax", "b%20x", "exe_1"] {
        let answer = caller.tool(name, "shell", json!({ "command": "true" })).await;
        assert_eq!((answer.status.as_u16(), answer.code().as_str()), (404, "env_not_found"), "{name}");
    }
}

#[tokio::test]
async fn a_bound_environment_without_executor_is_not_connected_and_says_when_to_retry() {
    let (_gateway, caller) = with_unconnected_box().await;
    let answer = caller.tool("box", "shell", json!({ "command": "true" })).await;
    assert_eq!((answer.status.as_u16(), answer.code().as_str()), (503, "executor_not_connected"));
    assert!(answer.header("retry-after").unwrap().parse::<u64>().unwrap() > 0);
}

#[tokio::test]
async fn another_workspaces_environment_is_as_unknown_as_one_that_never_was() {
    let gateway = TestGateway::start().await;
    let credentials = gateway.executor("theirs", "box").await;
    let (executor, _link) = FakeExecutor::connected(&gateway, &credentials).await;
    let caller = gateway.caller("ours").await;

    assert_eq!(&caller.post(LIST, json!({})).await.body[..], b"{\"envs\":[]}\n");
    let foreign = caller.tool("box", "shell", json!({ "command": "true" })).await;
    let unknown = caller.tool("b0x", "shell", json!({ "command": "true" })).await;

    assert_eq!((foreign.status.as_u16(), foreign.code().as_str()), (404, "env_not_found"));
    assert_eq!(foreign.status, unknown.status);
    let unknown_body = String::from_utf8(unknown.body.to_vec()).unwrap();
    assert_eq!(foreign.body, unknown_body.replace("b0x", "box"));
    let names = |answer: &Answer| answer.headers.keys().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(names(&foreign), names(&unknown));
    assert_eq!(executor.asked("handshake"), 0, "nothing of the call reached their executor");
}

#[tokio::test]
async fn the_environment_in_the_arguments_must_be_that_of_the_path() {
    let gateway = TestGateway::start().await;
    let credentials = gateway.executor("w", "box").await;
    let _other = gateway.executor("w", "other").await;
    let (executor, _link) = FakeExecutor::connected(&gateway, &credentials).await;
    let caller = gateway.caller("w").await;
    let call = async |id: Value| caller.tool("box", "shell", json!({ "command": "true", "environment_id": id })).await;

    let differs = call(json!("other")).await;
    assert_eq!((differs.status.as_u16(), differs.code().as_str()), (409, "env_mismatch"));
    let number = call(json!(7)).await;
    assert_eq!((number.status.as_u16(), number.code().as_str()), (400, "bad_arguments"));
    assert!(message(&number).starts_with("environment_id: "), "{number:?}");
    assert_eq!(executor.asked("process/start"), 0);
    assert_eq!(call(json!("box")).await.status, 200);
    assert_eq!(call(Value::Null).await.status, 200);
}

#[tokio::test]
async fn a_body_that_is_no_tool_call_is_told_what_is_wrong_with_it() {
    let (_gateway, caller) = with_unconnected_box().await;
    for (body, code, begins) in [
        ("", "bad_request", ""),
        ("{", "bad_request", ""),
        ("[]", "bad_request", ""),
        (" [\"shell\",{\"command\":\"true\"}]", "bad_request", "expected an object"),
        ("\"shell\"", "bad_request", ""),
        ("{\"tool\":\"shell\"} x", "bad_request", ""),
        ("\u{feff}{}", "bad_request", ""),
        ("{\"tool\":1}", "bad_request", "tool: "),
        ("{\"tool\":null}", "bad_request", "tool: "),
        ("{}", "unknown_tool", "no such tool: "),
        ("{\"tool\":\"fly\",\"arguments\":{}}", "unknown_tool", "no such tool: fly"),
        ("{\"tool\":\"shell\"}", "bad_arguments", "arguments: missing field `command`"),
        ("{\"tool\":\"shell\",\"arguments\":null}", "bad_arguments", "arguments: missing field `command`"),
        ("{\"tool\":\"shell\",\"arguments\":[\"true\"]}", "bad_arguments", "arguments: expected an object"),
        ("{\"tool\":\"shell\",\"arguments\":{\"command\":7}}", "bad_arguments", "command: "),
        ("{\"tool\":\"shell\",\"arguments\":{\"command\":[\"a\",7]}}", "bad_arguments", "command"),
        ("{\"tool\":\"shell\",\"arguments\":{\"command\":\"a\",\"cwd\":7}}", "bad_arguments", "cwd: "),
        ("{\"tool\":\"shell\",\"arguments\":{\"command\":\"a\",\"env\":{\"A\":1}}}", "bad_arguments", "env.A: "),
        (
            "{\"tool\":\"shell\",\"arguments\":{\"command\":\"a\",\"timeout_ms\":\"1\"}}",
            "bad_arguments",
            "timeout_ms: ",
        ),
        ("{\"tool\":\"shell\",\"arguments\":{\"command\":\"a\",\"timeout_ms\":0}}", "bad_arguments", "timeout_ms: "),
        ("{\"tool\":\"read_file\",\"arguments\":{\"path\":[]}}", "bad_arguments", "path: "),
    ] {
        let answer = caller.send("POST", CALL, &[], body.to_owned()).await;
        assert_eq!((answer.status.as_u16(), answer.code().as_str()), (400, code), "{body}");
        assert!(message(&answer).starts_with(begins), "{body}: {}", message(&answer));
    }
}

#[tokio::test]
async fn a_body_past_the_bound_is_refused_whether_it_is_announced_or_not() {
    let gateway = TestGateway::with(|config| config.edge.body_bytes_max = 4096).await;
    let caller = gateway.caller("w").await;
    let announced = caller.send("POST", CALL, &[], " ".repeat(4097)).await;
    assert_eq!((announced.status.as_u16(), announced.code().as_str()), (413, "body_too_large"));
    assert_eq!(caller.send("POST", CALL, &[], " ".repeat(4096)).await.code(), "bad_request");

    let mut wire = Wire::connect(gateway.address()).await;
    let token = caller.token.unwrap();
    wire.send(&format!(
        "POST {CALL} HTTP/1.1\r\nhost: gw\r\nauthorization: Bearer {token}\r\ntransfer-encoding: chunked\r\n\r\n"
    ))
    .await;
    wire.send(&format!("1001\r\n{}\r\n", " ".repeat(0x1001))).await;
    let chunked = wire.receive().await;
    assert!(chunked.starts_with("HTTP/1.1 413 "), "{chunked}");
    assert!(chunked.contains("\"body_too_large\""), "{chunked}");
}

#[tokio::test]
async fn an_oversized_body_is_refused_before_it_was_sent() {
    let gateway = TestGateway::with(|config| config.edge.body_bytes_max = 4096).await;
    let token = gateway.caller("w").await.token.unwrap();
    let mut wire = Wire::connect(gateway.address()).await;
    wire.send(&format!(
        "POST {CALL} HTTP/1.1\r\nhost: gw\r\nauthorization: Bearer {token}\r\ncontent-length: 99999999\r\n\r\n"
    ))
    .await;
    assert!(wire.receive().await.starts_with("HTTP/1.1 413 "));
}

#[tokio::test]
async fn unknown_paths_and_wrong_methods_answer_in_the_envelope() {
    let gateway = TestGateway::start().await;
    let caller = gateway.caller("w").await;
    for path in ["/", "/api", "/api/connectors/envs", "/api/connectors/envs/a/b/tool/call", "/nowhere"] {
        let answer = caller.send("POST", path, &[], "{}").await;
        assert_eq!((answer.status.as_u16(), answer.code().as_str()), (404, "not_found"), "{path}");
        assert_eq!(answer.header("content-type"), Some("application/json"));
    }
    for (method, path) in [("GET", LIST), ("DELETE", CALL), ("GET", "/cloud/environment/e/register")] {
        let answer = caller.send(method, path, &[], "").await;
        assert_eq!((answer.status.as_u16(), answer.code().as_str()), (405, "method_not_allowed"), "{method} {path}");
        assert_eq!(answer.header("allow"), Some("POST"));
    }
}

#[tokio::test]
async fn every_answer_carries_a_request_id_and_a_usable_one_is_given_back() {
    let (gateway, caller) = with_unconnected_box().await;
    let mut seen = std::collections::HashSet::new();
    for (caller, method, path) in [
        (&caller, "POST", LIST),
        (&caller, "POST", CALL),
        (&gateway.stranger(), "POST", LIST),
        (&caller, "GET", "/nowhere"),
        (&caller, "GET", LIST),
        (&caller, "GET", "/healthz"),
        (&caller, "GET", "/bridge/exe_1?token=x&reg=y"),
        (&caller, "POST", "/cloud/environment/e/register"),
    ] {
        let answer = caller.send(method, path, &[], "{}").await;
        let id = answer.header("x-request-id").unwrap_or_else(|| panic!("none for {path}")).to_owned();
        assert!(seen.insert(id), "an id is given once");
        let answer = caller.send(method, path, &[("x-request-id", "of-the-caller.7")], "{}").await;
        assert_eq!(answer.header("x-request-id"), Some("of-the-caller.7"), "{path}");
    }
    for unusable in ["a b", "", &"x".repeat(129)] {
        let answer = caller.send("POST", LIST, &[("x-request-id", unusable)], "{}").await;
        assert!(answer.header("x-request-id").unwrap().starts_with("req_"), "{unusable:?}");
    }
}

#[tokio::test]
async fn an_answer_tells_its_length() {
    let (_gateway, caller) = with_unconnected_box().await;
    let answer = caller.post(LIST, json!({})).await;
    assert_eq!(answer.header("content-length"), Some(answer.body.len().to_string().as_str()));
    assert_eq!(answer.header("transfer-encoding"), None);
}

#[tokio::test]
async fn a_list_that_was_answered_before_shows_who_came_and_left_since() {
    let gateway = TestGateway::start().await;
    let registry = gateway.gateway.api().corridor.registry.clone();
    let boxes = [gateway.executor("w", "a").await, gateway.executor("w", "b").await];
    let caller = gateway.caller("w").await;
    assert!(caller.environments().await.is_empty());
    let (_a, link) = FakeExecutor::connected(&gateway, &boxes[0]).await;
    assert_eq!(caller.environments().await, ["a"]);
    let _b = FakeExecutor::connected(&gateway, &boxes[1]).await;
    assert_eq!(caller.environments().await, ["a", "b"]);
    drop(link);
    eventually("a's link is gone", async || (registry.len() == 1).then_some(())).await;
    assert_eq!(caller.environments().await, ["b"]);
}

#[tokio::test]
async fn the_paths_of_older_clients_lead_to_the_same_answers() {
    let gateway = TestGateway::start().await;
    let credentials = gateway.executor("w", "box").await;
    let _connected = FakeExecutor::connected(&gateway, &credentials).await;
    let caller = gateway.caller("w").await;
    let old = LIST.replace("connectors", "sdk");
    assert_eq!(caller.post(&old, json!({})).await.body, caller.post(LIST, json!({})).await.body);
    let call = json!({ "tool": "shell", "arguments": { "command": "true" } });
    let answer = caller.post(&CALL.replace("connectors", "sdk"), call).await;
    assert_eq!(answer.json()["structuredContent"]["stdout"], format!("{}\n", credentials.executor));
    let unknown = caller.post("/api/sdk/envs/nowhere/tool/call", json!({ "tool": "shell", "arguments": {} })).await;
    assert_eq!(unknown.code(), "env_not_found");
}
