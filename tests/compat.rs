//! Doors for services that were built around the original gateway (connectors-api.md §2.7).

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use exec_gateway::admin::{Request, Response};
use exec_gateway::config::{Config, Secret};
use exec_gateway::store::KeyPurpose;
use serde_json::{Value, json};

use crate::support::{Answer, Caller, Credentials, FakeExecutor, Reply, Scratch, TestGateway, eventually};

const SHARED: &str = "between-the-services";
const INTERNAL: &str = "between us";

fn with_secrets(config: &mut Config) {
    config.auth.shared_secret = Some(Secret::new(SHARED.into()));
    config.auth.internal_secret = Some(Secret::new(INTERNAL.into()));
}

/// The service that registers and binds for people.
struct Service(Caller);

impl Service {
    async fn of(gateway: &TestGateway) -> Self {
        Self(gateway.stranger())
    }

    async fn send(&self, method: &str, path: &str, user: Option<&str>, body: Value) -> Answer {
        let mut headers = vec![("x-internal-secret", INTERNAL)];
        headers.extend(user.map(|user| ("x-user-id", user)));
        self.0.send(method, &format!("/api/codex-exec/{path}"), &headers, body.to_string()).await
    }

    async fn register(&self, user: &str) -> String {
        let answer = self.send("POST", "register", Some(user), json!({ "display_name": "my machine" })).await;
        assert_eq!(answer.status, 201, "{answer:?}");
        answer.json()["exe_id"].as_str().unwrap().to_owned()
    }

    async fn bind(&self, workspace: &str, body: Value) -> Answer {
        self.send("POST", &format!("workspaces/{workspace}/executors"), None, body).await
    }

    async fn bound(&self, workspace: &str) -> Vec<Value> {
        let answer = self.send("GET", &format!("workspaces/{workspace}/executors"), None, Value::Null).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.json().as_array().unwrap().clone()
    }
}

/// What an executor registers with, as its service would be given it.
async fn credentials(gateway: &TestGateway, executor: &str) -> Credentials {
    let store = &gateway.gateway.api().corridor.store;
    let key = store.keyring(KeyPurpose::Executor).await.unwrap().current;
    let stored = store.executor(&executor.parse().unwrap()).await.unwrap().unwrap();
    Credentials { executor: executor.into(), token: stored.token(&key).to_string() }
}

/// A caller with a cap-token of that turn.
async fn of_turn(gateway: &TestGateway, workspace: &str, turn: &str) -> Caller {
    let (workspace, turn) = (workspace.parse().unwrap(), Some(turn.parse().unwrap()));
    let request = Request::CapToken { workspace, turn, user: None, ttl: Duration::from_secs(3600) };
    let Response::CapToken { token } = gateway.admin(request).await else { panic!("no cap-token") };
    Caller::new(gateway.address(), Some(token.expose().to_owned()))
}

async fn connected(caller: &Caller) -> Answer {
    caller.send("GET", "/api/exec-gateway/connected", &[], "").await
}

async fn revoke(gateway: &TestGateway, body: Value) -> Answer {
    Caller::new(gateway.address(), Some(SHARED.into())).post("/api/exec-gateway/revoke-turn", body).await
}

/// The text of an error in the envelope of these doors.
#[track_caller]
fn refusal(answer: &Answer) -> (u16, String) {
    (answer.status.as_u16(), answer.json()["error"].as_str().unwrap_or_else(|| panic!("{answer:?}")).to_owned())
}

#[tokio::test]
async fn a_door_without_its_secret_does_not_exist_and_one_with_it_opens_to_nothing_else() {
    let doors = [
        ("POST", "/api/exec-gateway/revoke-turn"),
        ("POST", "/api/codex-exec/register"),
        ("DELETE", "/api/codex-exec/executors/exe_1"),
        ("POST", "/api/codex-exec/workspaces/w/executors"),
        ("GET", "/api/codex-exec/workspaces/w/executors"),
        ("DELETE", "/api/codex-exec/workspaces/w/executors/exe_1"),
    ];
    let (closed, open) = (TestGateway::start().await, TestGateway::with(with_secrets).await);
    for (method, path) in doors {
        for shown in ["", "wrong", "between u", "between-the-service"] {
            let bearer = format!("Bearer {shown}");
            let headers = [("x-internal-secret", shown), ("x-user-id", "ann"), ("authorization", bearer.as_str())];
            assert_eq!(closed.stranger().send(method, path, &headers, "{}").await.status, 404, "{path}");
            let answer = open.stranger().send(method, path, &headers, "{}").await;
            assert_eq!(refusal(&answer), (401, "unauthorized".into()), "{path} {shown}");
        }
        assert_eq!(refusal(&open.stranger().send(method, path, &[], "{}").await).0, 401, "{path}");
    }
    assert_eq!(refusal(&connected(&open.stranger()).await).0, 401);
}

#[tokio::test]
async fn a_machine_is_registered_bound_seen_and_deleted_with_its_socket() {
    let gateway = TestGateway::with(with_secrets).await;
    let (service, caller) = (Service::of(&gateway).await, of_turn(&gateway, "w", "t").await);
    let missing = service.send("POST", "register", None, json!({ "display_name": "x" })).await;
    assert_eq!(refusal(&missing).0, 401);
    let exe_id = service.register("ann").await;
    // What the workspace knows of its names is not believed any longer.
    assert!(caller.environments().await.is_empty());
    let body = json!({ "exe_id": exe_id, "name": "laptop", "description": "on the desk", "is_default": true });
    let answer = service.bind("w", body).await;
    assert_eq!((answer.status.as_u16(), answer.json()), (201, json!({ "status": "ok" })));
    let offline = json!({
        "exe_id": exe_id, "name": "laptop", "description": "on the desk", "is_default": true, "is_online": false,
    });
    assert_eq!(service.bound("w").await, std::slice::from_ref(&offline));
    assert_eq!(connected(&caller).await.json(), json!([]));

    let (_executor, link) = FakeExecutor::connected(&gateway, &credentials(&gateway, &exe_id).await).await;
    assert_eq!(caller.environments().await, ["laptop"]);
    let mut online = connected(&caller).await.json();
    assert_eq!(online.as_array().unwrap(), &service.bound("w").await);
    for time in ["connected_at", "last_seen_at"] {
        let text = online[0].as_object_mut().unwrap().remove(time).unwrap();
        assert!(text.as_str().unwrap().ends_with('Z'), "{time}: {text}");
    }
    assert_eq!(online[0]["is_online"], true);
    assert_eq!(connected(&of_turn(&gateway, "other", "t").await).await.json(), json!([]));

    for _ in 0..2 {
        assert_eq!(service.send("DELETE", &format!("executors/{exe_id}"), None, Value::Null).await.status, 204);
    }
    link.ended().await;
    assert_eq!((connected(&caller).await.json(), service.bound("w").await), (json!([]), vec![]));
    assert!(caller.environments().await.is_empty());
}

#[tokio::test]
async fn an_executor_that_left_was_last_seen_when_it_left() {
    let gateway = TestGateway::with(with_secrets).await;
    let service = Service::of(&gateway).await;
    let credentials = gateway.executor("w", "box").await;
    let (_executor, link) = FakeExecutor::connected(&gateway, &credentials).await;
    drop(link);
    let left = eventually("it is offline", async || {
        let bound = service.bound("w").await;
        (bound[0]["is_online"] == false && bound[0].get("last_seen_at").is_some()).then(|| bound[0].clone())
    })
    .await;
    assert!(left.get("connected_at").is_none(), "{left}");
}

#[tokio::test]
async fn binding_says_what_is_wrong_and_conflicts_only_where_there_is_a_conflict() {
    let gateway = TestGateway::with(with_secrets).await;
    let service = Service::of(&gateway).await;
    let (first, second) = (service.register("ann").await, service.register("bob").await);
    let bind = async |body: Value| service.bind("w", body).await;
    assert_eq!(bind(json!({ "exe_id": first, "name": "a", "is_default": true })).await.status, 201);

    let unknown = refusal(&bind(json!({ "exe_id": "exe_unknown", "name": "b" })).await);
    assert_eq!(unknown, (404, "there is no executor exe_unknown".into()));
    for wrong in ["", "with space", "a/b", &"x".repeat(65)] {
        let (status, text) = refusal(&bind(json!({ "exe_id": second, "name": wrong })).await);
        assert!(status == 400 && text.starts_with("name: "), "{status} {text}");
    }
    assert_eq!(refusal(&bind(json!({ "name": "b" })).await).0, 400);
    assert_eq!(refusal(&bind(json!([second, "b", null, null])).await).0, 400);
    let long = json!({ "exe_id": second, "name": "b", "description": "x".repeat(5000) });
    assert_eq!(refusal(&bind(long).await).0, 400);
    let taken = json!({ "exe_id": second, "name": "a" });
    assert_eq!(refusal(&bind(taken.clone()).await).0, 409);
    assert_eq!(service.bind("elsewhere", taken).await.status, 201, "names are the workspace's own");
    assert_eq!(refusal(&service.bind("no%20name", json!({ "exe_id": second, "name": "a" })).await).0, 400);

    // Binding again renames, and a new default takes the place of the old one.
    assert_eq!(bind(json!({ "exe_id": first, "name": "renamed" })).await.status, 201);
    assert_eq!(bind(json!({ "exe_id": second, "name": "a", "is_default": true })).await.status, 201);
    let bound = service.bound("w").await;
    let names: Vec<_> = bound.iter().map(|one| (one["name"].clone(), one["is_default"].clone())).collect();
    assert_eq!(names, [(json!("renamed"), json!(false)), (json!("a"), json!(true))]);

    // Where the service says for whom it binds, a foreign executor is an unknown one.
    let body = json!({ "exe_id": second, "name": "b" });
    let foreign = service.send("POST", "workspaces/w2/executors", Some("ann"), body.clone()).await;
    assert_eq!(refusal(&foreign), (404, format!("there is no executor {second}")));
    assert_eq!(service.send("POST", "workspaces/w2/executors", Some("bob"), body).await.status, 201);
}

#[tokio::test]
async fn unbinding_ends_what_runs_there_and_leaves_the_executor() {
    let gateway = TestGateway::with(with_secrets).await;
    let service = Service::of(&gateway).await;
    let credentials = gateway.executor("w", "box").await;
    let (executor, link) = FakeExecutor::connected(&gateway, &credentials).await;
    let caller = gateway.caller("w").await;
    executor.on("process/start", Reply::Never);
    let path = format!("workspaces/w/executors/{}", credentials.executor);
    let (call, ()) = tokio::join!(caller.tool("box", "shell", json!({ "command": "true" })), async {
        eventually("the call has begun", async || (executor.asked("process/start") == 1).then_some(())).await;
        assert_eq!(service.send("DELETE", &path, None, Value::Null).await.status, 204);
    });
    assert_eq!((call.status.as_u16(), call.code().as_str()), (502, "executor_unreachable"));
    assert!(caller.environments().await.is_empty());
    assert_eq!(service.send("DELETE", &path, None, Value::Null).await.status, 204, "the second time too");
    assert!(!link.is_ended());
}

#[tokio::test]
async fn a_revoked_turn_ends_its_calls_and_stays_revoked_over_a_restart() {
    let state = Arc::new(Scratch::new());
    let gateway = TestGateway::on(state.clone(), with_secrets).await;
    let credentials = gateway.executor("w", "box").await;
    let (executor, _link) = FakeExecutor::connected(&gateway, &credentials).await;
    let (caller, other) = (of_turn(&gateway, "w", "turn-1").await, of_turn(&gateway, "w", "turn-2").await);
    executor.on("process/start", Reply::Never);
    let exp = SystemTime::now() + Duration::from_secs(7200);
    let exp_secs = exp.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    let (call, ()) = tokio::join!(caller.tool("box", "shell", json!({ "command": "true" })), async {
        eventually("the call has begun", async || (executor.asked("process/start") == 1).then_some(())).await;
        assert_eq!(revoke(&gateway, json!({ "turn_id": "turn-1", "exp": exp_secs })).await.status, 204);
    });
    assert_eq!((call.status.as_u16(), call.code().as_str()), (401, "invalid_token"));
    assert_eq!(refusal(&connected(&caller).await), (401, "the token was revoked".into()));
    assert_eq!(connected(&other).await.status, 200, "other turns go on");
    for wrong in [json!({}), json!({ "turn_id": "" }), json!({ "turn_id": "t", "exp": "soon" }), json!(["t", 1])] {
        assert_eq!(refusal(&revoke(&gateway, wrong).await).0, 400);
    }

    let store = &gateway.gateway.api().corridor.store;
    let kept = store.revocations().await.unwrap()[0].forget_at;
    assert!(kept.duration_since(exp).unwrap_or_else(|before| before.duration()) < Duration::from_secs(60));
    // What claims to have ended is kept for a while all the same, and what claims nothing for as long as it may matter.
    assert_eq!(revoke(&gateway, json!({ "turn_id": "turn-2", "exp": -1 })).await.status, 204);
    assert_eq!(connected(&other).await.status, 401);
    assert_eq!(revoke(&gateway, json!({ "turn_id": "turn-3" })).await.status, 204);
    assert_eq!(store.forget_revocations(exp + Duration::from_secs(60)).await.unwrap(), 2);

    assert_eq!(revoke(&gateway, json!({ "turn_id": "turn-1", "exp": exp_secs })).await.status, 204);
    drop(gateway);
    let gateway = TestGateway::on(state, with_secrets).await;
    let caller = Caller::new(gateway.address(), caller.token);
    assert_eq!(refusal(&connected(&caller).await).0, 401);
}

#[tokio::test]
async fn an_executor_may_dial_by_its_registration() {
    let gateway = TestGateway::start().await;
    let credentials = gateway.executor("w", "box").await;
    let caller = gateway.caller("w").await;
    let executor = FakeExecutor::new(gateway.address(), &credentials);
    let url = executor.registered().await;
    let (base, query) = url.split_once("/bridge/").unwrap();
    let (_, query) = query.split_once('?').unwrap();
    let registration = query.split_once("reg=").unwrap().1;

    for wrong in [format!("exr_unknown?{query}"), format!("{registration}?reg={registration}")] {
        assert_eq!(executor.dial(&format!("{base}/cloud/relay/{wrong}")).await.err(), Some(404));
    }
    let _link = executor.dial(&format!("{base}/cloud/relay/{registration}?{query}")).await.unwrap();
    eventually("it is connected", async || (caller.environments().await == ["box"]).then_some(())).await;
    let result = caller.shell("box", json!({ "command": "true" })).await;
    assert_eq!(result["stdout"].as_str().unwrap().trim_end(), credentials.executor);
}
