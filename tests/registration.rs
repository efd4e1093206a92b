//! Register and validate, where one wrong answer ends an executor for good (connectors-api.md §2.3,
//! codex-exec-server.md §2).

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use exec_gateway::admin::Request;
use exec_gateway::config::Config;
use exec_gateway::protocol::harness_token::{self, HarnessClaims, KeyDigest};
use exec_gateway::protocol::ids::{EnvironmentName, ExecutorId, RegistrationId, UserId, WorkspaceId};
use exec_gateway::protocol::rest::{HarnessKey, KeyBytes};
use exec_gateway::store::{KeyPurpose, path_in};
use rusqlite::Connection;
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::support::{
    Answer, Caller, CodexExecutor, Credentials, FakeExecutor, TestGateway, Upstream, Verdict, Wire, eventually,
};

/// Longer than one try of a held request, shorter than the hold: how long something is away that comes back in time.
const A_WHILE: Duration = Duration::from_secs(2);

fn short_hold(config: &mut Config) {
    config.link.register_hold_secs = 2;
    config.link.takeover_ping_secs = 1;
}

/// Keeps the gateway from writing to its store until this is dropped.
pub struct StoreAway(Connection);

impl StoreAway {
    pub fn take(gateway: &TestGateway) -> Self {
        let connection = Connection::open(path_in(gateway.state.path())).unwrap();
        connection.busy_timeout(Duration::from_secs(10)).unwrap();
        connection.execute_batch("BEGIN EXCLUSIVE").unwrap();
        Self(connection)
    }

    pub fn give_back(self) {
        self.0.execute_batch("ROLLBACK").unwrap();
    }
}

/// An executor that belongs to a person whom the validator knows by this credential.
async fn owned_executor(gateway: &TestGateway, upstream: &Upstream) -> Credentials {
    upstream.knows_executor("of-user-1", "user-1");
    let store = &gateway.gateway.api().corridor.store;
    let (workspace, name) = (WorkspaceId::new("w").unwrap(), EnvironmentName::new("box").unwrap());
    let user = UserId::new("user-1").unwrap();
    let executor = store.create_executor(&workspace, &name, false, Some(&user)).await.unwrap();
    Credentials { executor: executor.id.to_string(), token: "of-user-1".into() }
}

async fn post(gateway: &TestGateway, path: &str, authorization: Option<&str>, body: &str) -> Answer {
    let headers: Vec<(&str, &str)> = authorization.iter().map(|value| ("authorization", *value)).collect();
    gateway.stranger().send("POST", path, &headers, body.to_owned()).await
}

#[track_caller]
fn assert_refused(answer: &Answer, status: u16, code: &str) {
    assert_eq!((answer.status.as_u16(), answer.code().as_str()), (status, code), "{answer:?}");
    assert!(answer.json()["error"]["message"].as_str().is_some_and(|text| !text.is_empty()), "{answer:?}");
}

fn register_path(executor: &str) -> String {
    format!("/cloud/environment/{executor}/register")
}

// Register: who

#[tokio::test]
async fn a_register_without_the_right_credential_is_unauthorized_at_every_door() {
    let gateway = TestGateway::start().await;
    let executor = gateway.executor("w", "box").await;
    let other = gateway.executor("w", "other").await;
    let caller = gateway.caller("w").await.token.unwrap();
    for door in ["cloud/environment", "cloud/executor", "agentx/environment"] {
        let path = format!("/{door}/{}/register", executor.executor);
        for authorization in [
            None,
            Some("Basic dTpw".to_owned()),
            Some(format!("Basic {}", executor.token)),
            Some("Bearer ".to_owned()),
            Some("Bearer x".to_owned()),
            Some(format!("Bearer {}", other.token)),
            Some(format!("Bearer {}x", executor.token)),
            Some(format!("Bearer {caller}")),
            Some(format!("AgentAssertion {}", executor.token)),
        ] {
            let answer = post(&gateway, &path, authorization.as_deref(), "").await;
            assert_refused(&answer, 401, "unauthorized");
        }
        assert_eq!(post(&gateway, &path, Some(&format!("bearer {}", executor.token)), "").await.status, 200);
    }
}

#[tokio::test]
async fn a_register_for_an_executor_that_is_gone_is_told_that_it_is_not_registered() {
    let gateway = TestGateway::start().await;
    let executor = gateway.executor("w", "box").await;
    gateway.admin(Request::ExecutorDelete { executor: executor.executor.parse().unwrap() }).await;
    let answer = FakeExecutor::new(gateway.address(), &executor).register().await;
    assert_refused(&answer, 403, "executor_not_registered");
    let agentx = format!("/agentx/environment/{}/register", executor.executor);
    let answer = post(&gateway, &agentx, Some(&format!("Bearer {}", executor.token)), "").await;
    assert_refused(&answer, 403, "executor_not_registered");
}

#[tokio::test]
async fn somebody_elses_executor_and_an_unknown_one_get_the_same_answer() {
    let upstream = Upstream::start().await;
    let gateway = TestGateway::with(|config| upstream.configure(config)).await;
    let owned = owned_executor(&gateway, &upstream).await;
    let ownerless = gateway.executor("w", "made-by-an-operator").await;
    upstream.knows_executor("of-user-2", "user-2");
    let unknown = post(&gateway, &register_path("exe_unknown"), Some("Bearer of-user-2"), "").await;
    assert_refused(&unknown, 403, "executor_not_registered");
    for executor in [&owned, &ownerless] {
        let foreign = post(&gateway, &register_path(&executor.executor), Some("Bearer of-user-2"), "").await;
        assert_eq!((foreign.status, foreign.body), (unknown.status, unknown.body.clone()));
    }
    assert_eq!(post(&gateway, &register_path(&owned.executor), Some("Bearer of-user-1"), "").await.status, 200);
}

#[tokio::test]
async fn the_validator_hears_of_assertions_and_accounts() {
    let upstream = Upstream::start().await;
    let gateway = TestGateway::with(|config| upstream.configure(config)).await;
    let path = register_path(&owned_executor(&gateway, &upstream).await.executor);
    upstream.knows_executor("assertion", "user-1");
    assert_eq!(post(&gateway, &path, Some("AgentAssertion assertion"), "").await.status, 200);
    upstream.says("nobody", Verdict::Say(200, json!({ "user_id": "" })));
    upstream.says("forbidden", Verdict::Say(403, json!({})));
    for refused in ["nobody", "forbidden", "unknown"] {
        let answer = post(&gateway, &path, Some(&format!("AgentAssertion {refused}")), "").await;
        assert_refused(&answer, 401, "unauthorized");
    }
}

// Register: what

#[tokio::test]
async fn a_register_that_cannot_be_read_is_a_bad_request() {
    let gateway = TestGateway::start().await;
    let executor = gateway.executor("w", "box").await;
    let bearer = format!("Bearer {}", executor.token);
    let good = serde_json::to_value(FakeExecutor::new(gateway.address(), &executor).key()).unwrap();
    let key = |member: &str, value: Value| {
        let mut key = good.clone();
        key[member] = value;
        json!({ "security_profile": "noise_hybrid_ik_v1", "executor_public_key": key }).to_string()
    };
    let short = "QUJD";
    for body in [
        "{".to_owned(),
        "\"x\"".to_owned(),
        json!({ "security_profile": "another" }).to_string(),
        json!({ "security_profile": 1 }).to_string(),
        json!({ "security_profile": "noise_hybrid_ik_v1" }).to_string(),
        json!({ "security_profile": "noise_hybrid_ik_v1", "executor_public_key": null }).to_string(),
        json!({ "security_profile": "noise_hybrid_ik_v1", "executor_public_key": {} }).to_string(),
        key("suite", json!("another")),
        key("x25519_public_key", json!(short)),
        key("mlkem768_public_key", json!(short)),
        key("mlkem768_public_key", json!("%")),
        key("x25519_public_key", good["mlkem768_public_key"].clone()),
    ] {
        let answer = post(&gateway, &register_path(&executor.executor), Some(&bearer), &body).await;
        assert_refused(&answer, 400, "bad_request");
    }
    for id in ["exe.1", "a%2Fb", "a%20b", &"x".repeat(257)] {
        assert_refused(&post(&gateway, &register_path(id), Some(&bearer), "").await, 400, "bad_request");
    }
    let huge = post(&gateway, &register_path(&executor.executor), Some(&bearer), &" ".repeat(65 * 1024)).await;
    assert_refused(&huge, 413, "body_too_large");
}

/// The members of the answer, with the ticket taken out of the URL.
fn members(answer: &Answer) -> (Value, String) {
    assert_eq!(answer.status, 200, "{answer:?}");
    let mut body = answer.json();
    let url = body.as_object_mut().unwrap().remove("url").unwrap().as_str().unwrap().to_owned();
    (body, url)
}

#[tokio::test]
async fn an_encrypted_executor_is_answered_what_it_checks() {
    let gateway = TestGateway::start().await;
    let credentials = gateway.executor("w", "box").await;
    let id = &credentials.executor;
    let (body, url) = members(&FakeExecutor::new(gateway.address(), &credentials).register().await);
    let registration = body["executor_registration_id"].as_str().unwrap();
    assert!(registration.starts_with("exr_"));
    assert_eq!((&body["environment_id"], &body["security_profile"]), (&json!(id), &json!("noise_hybrid_ik_v1")));
    assert!(url.starts_with(&format!("ws://{}/bridge/{id}?token={id}.", gateway.address())), "{url}");
    assert!(url.ends_with(&format!("&reg={registration}")), "{url}");
}

#[tokio::test]
async fn older_executors_find_their_id_under_the_name_they_know() {
    let gateway = TestGateway::start().await;
    let credentials = gateway.executor("w", "box").await;
    let (id, bearer) = (&credentials.executor, format!("Bearer {}", credentials.token));
    let ids = json!({ "id": id, "executor_id": id, "environment_id": id });
    for (door, path, body) in [
        ("cloud/executor", "bridge", ""),
        ("cloud/environment", "bridge", "{}"),
        ("cloud/environment", "bridge", "{\"name\":\"x\"}"),
        ("agentx/environment", "agentx", "{\"id\":\"x\",\"public_key\":\"\"}"),
        ("agentx/environment", "agentx", ""),
        ("agentx/environment", "agentx", "no JSON at all"),
    ] {
        let answer = post(&gateway, &format!("/{door}/{id}/register"), Some(&bearer), body).await;
        let (members, url) = members(&answer);
        assert_eq!(members, ids);
        assert!(url.starts_with(&format!("ws://{}/{path}/{id}?token={id}.", gateway.address())), "{url}");
    }
}

#[tokio::test]
async fn the_url_is_that_of_the_host_by_which_the_gateway_was_called() {
    let gateway = TestGateway::start().await;
    let credentials = gateway.executor("w", "box").await;
    let bearer = format!("Bearer {}", credentials.token);
    for (host, base) in [("gw.example:8443", "ws://gw.example:8443/bridge/"), ("[::1]:6060", "ws://[::1]:6060/bridge/")]
    {
        let headers = [("authorization", bearer.as_str()), ("host", host)];
        let answer = gateway.stranger().send("POST", &register_path(&credentials.executor), &headers, "").await;
        let url = members(&answer).1;
        assert!(url.starts_with(base), "{url}");
    }
}

#[tokio::test]
async fn a_hostile_host_decides_nothing_but_the_answer_to_who_sent_it() {
    let gateway = TestGateway::start().await;
    let credentials = gateway.executor("w", "box").await;
    let bearer = format!("Bearer {}", credentials.token);
    let path = register_path(&credentials.executor);
    for host in ["evil.example/x?y=", "evil.example#", "user@evil.example", "evil example", "evil%2eexample", "\"evil"]
    {
        let mut wire = Wire::connect(gateway.address()).await;
        let request = format!("POST {path} HTTP/1.1\r\nhost: {host}\r\nauthorization: {bearer}\r\n");
        wire.send(&format!("{request}content-length: 0\r\nconnection: close\r\n\r\n")).await;
        assert!(!wire.until_closed().await.contains("evil"), "{host}");
    }
    // Whoever believes in a host of this kind sent it himself, and may as well have dialled there.
    let forged = [("authorization", bearer.as_str()), ("host", "evil.example"), ("x-forwarded-host", "evil.example")];
    let url = members(&gateway.stranger().send("POST", &path, &forged, "").await).1;
    assert!(url.starts_with("ws://evil.example/bridge/"), "{url}");
    let executor = FakeExecutor::new(gateway.address(), &credentials);
    let url = executor.registered().await;
    assert!(url.starts_with(&format!("ws://{}/bridge/", gateway.address())), "{url}");
    let forwarded = [("authorization", bearer.as_str()), ("x-forwarded-host", "evil.example")];
    let url = members(&gateway.stranger().send("POST", &path, &forwarded, "").await).1;
    assert!(url.starts_with(&format!("ws://{}/bridge/", gateway.address())), "{url}");
}

#[tokio::test]
async fn the_configured_url_wins_over_the_host() {
    for (configured, base) in [
        ("https://gw.example/base/", "wss://gw.example/base/bridge/"),
        ("http://gw.example:81", "ws://gw.example:81/bridge/"),
        ("wss://gw.example", "wss://gw.example/bridge/"),
    ] {
        let gateway = TestGateway::with(|config| config.public_url = Some(configured.into())).await;
        let credentials = gateway.executor("w", "box").await;
        let url = FakeExecutor::new(gateway.address(), &credentials).registered().await;
        assert!(url.starts_with(base), "{url}");
    }
}

// Register: when something else is away

#[tokio::test]
async fn a_register_while_the_store_is_away_is_told_to_wait() {
    let gateway = TestGateway::with(short_hold).await;
    let executor = FakeExecutor::new(gateway.address(), &gateway.executor("w", "box").await);
    let away = StoreAway::take(&gateway);
    let answer = executor.register().await;
    assert_refused(&answer, 503, "registration_conflict");
    away.give_back();
    assert_eq!(executor.register().await.status, 200);
}

#[tokio::test]
async fn a_public_url_that_leads_nowhere_keeps_no_call_from_its_executor() {
    let gateway = TestGateway::with(|config| config.public_url = Some("http://127.0.0.1:9".into())).await;
    let credentials = gateway.executor("w", "box").await;
    let (_executor, _link) = FakeExecutor::connected(&gateway, &credentials).await;
    let result = gateway.caller("w").await.shell("box", json!({ "command": "true" })).await;
    assert_eq!(result["exit_code"], 0);
}

#[tokio::test]
async fn a_register_outlasts_a_store_that_is_away_for_a_while() {
    let gateway = TestGateway::start().await;
    let executor = FakeExecutor::new(gateway.address(), &gateway.executor("w", "box").await);
    let away = StoreAway::take(&gateway);
    let mut register = Box::pin(executor.register());
    assert!(timeout(A_WHILE, &mut register).await.is_err(), "it is held");
    away.give_back();
    assert_eq!(register.await.status, 200);
}

#[tokio::test]
async fn a_register_while_the_validator_fails_in_any_way_is_told_to_wait() {
    let mut upstream = Upstream::start().await;
    let change = |config: &mut Config| {
        upstream.configure(config);
        short_hold(config);
    };
    let gateway = TestGateway::with(change).await;
    let executor = FakeExecutor::new(gateway.address(), &owned_executor(&gateway, &upstream).await);
    for verdict in
        [Verdict::Say(500, json!({})), Verdict::Say(404, json!({})), Verdict::Say(200, json!([])), Verdict::Silence]
    {
        upstream.says_to_all(Some(verdict));
        assert_refused(&executor.register().await, 502, "authentication_service_unavailable");
    }
    upstream.says_to_all(None);
    upstream.go_away().await;
    assert_refused(&executor.register().await, 502, "authentication_service_unavailable");
    upstream.come_back();
    assert_eq!(executor.register().await.status, 200);
}

#[tokio::test]
async fn a_register_outlasts_a_validator_that_is_away_for_a_while() {
    let mut upstream = Upstream::start().await;
    let gateway = TestGateway::with(|config| upstream.configure(config)).await;
    let executor = FakeExecutor::new(gateway.address(), &owned_executor(&gateway, &upstream).await);
    upstream.go_away().await;
    let mut register = Box::pin(executor.register());
    assert!(timeout(A_WHILE, &mut register).await.is_err(), "it is held");
    upstream.come_back();
    assert_eq!(register.await.status, 200);
}

#[tokio::test]
async fn an_executor_of_the_gateways_own_registers_without_the_validator() {
    let mut upstream = Upstream::start().await;
    let gateway = TestGateway::with(|config| upstream.configure(config)).await;
    let executor = FakeExecutor::new(gateway.address(), &gateway.executor("w", "box").await);
    upstream.go_away().await;
    assert_eq!(executor.register().await.status, 200);
}

#[tokio::test]
async fn a_plain_executor_waits_for_the_place_of_another_process() {
    let gateway = TestGateway::start().await;
    let credentials = gateway.executor("w", "box").await;
    let (_executor, link) = FakeExecutor::connected(&gateway, &credentials).await;
    let bearer = format!("Bearer {}", credentials.token);
    let path = register_path(&credentials.executor);
    let mut register = Box::pin(post(&gateway, &path, Some(&bearer), ""));
    assert!(timeout(A_WHILE, &mut register).await.is_err(), "it is held, since it could not be told to wait");
    drop(link);
    assert_eq!(register.await.status, 200);
}

/// Waits until a register was held for the whole time and then refused.
async fn refused_once(gateway: &TestGateway, outcome: &'static str) {
    let registrations = &gateway.gateway.api().metrics.registrations;
    eventually("a register is refused", async || (registrations.of([outcome]).get() > 0).then_some(())).await;
}

async fn assert_connects(executor: &mut CodexExecutor, caller: &Caller) {
    eventually("the executor is connected", async || {
        assert!(executor.is_running(), "the executor has exited");
        (caller.environments().await == ["box"]).then_some(())
    })
    .await;
    assert_eq!(caller.shell("box", json!({ "command": ["echo", "hello"] })).await["stdout"], "hello\n");
    assert!(executor.is_running());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_real_executor_outlives_a_store_that_is_away_when_it_registers() {
    let gateway = TestGateway::start().await;
    let caller = gateway.caller("w").await;
    // The token is read before the store goes away, since the caller polls meanwhile.
    assert!(caller.environments().await.is_empty());
    let credentials = gateway.executor("w", "box").await;
    let away = StoreAway::take(&gateway);
    let mut executor = CodexExecutor::start(&gateway.url(), &credentials).await;
    refused_once(&gateway, "registration_conflict").await;
    away.give_back();
    assert_connects(&mut executor, &caller).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_real_executor_outlives_a_validator_that_is_away_when_it_registers() {
    let mut upstream = Upstream::start().await;
    let gateway = TestGateway::with(|config| upstream.configure(config)).await;
    let caller = gateway.caller("w").await;
    let credentials = owned_executor(&gateway, &upstream).await;
    upstream.go_away().await;
    let mut executor = CodexExecutor::start(&gateway.url(), &credentials).await;
    refused_once(&gateway, "authentication_service_unavailable").await;
    upstream.come_back();
    assert_connects(&mut executor, &caller).await;
}

// Validate

/// A registered stand-in and a harness with the right to reach it.
struct Validation {
    gateway: TestGateway,
    credentials: Credentials,
    registration: String,
    harness: HarnessKey,
}

impl Validation {
    async fn new() -> Self {
        let gateway = TestGateway::start().await;
        let credentials = gateway.executor("w", "box").await;
        let executor = FakeExecutor::new(gateway.address(), &credentials);
        let registration = registration_of(&executor).await;
        Self { gateway, credentials, registration, harness: harness(1) }
    }

    fn claims(&self) -> HarnessClaims {
        HarnessClaims {
            workspace: WorkspaceId::new("w").unwrap(),
            executor: ExecutorId::new(&self.credentials.executor).unwrap(),
            registration: RegistrationId::new(&self.registration).unwrap(),
            key: KeyDigest(self.harness.decode().unwrap().digest()),
            exp: SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() + 60,
        }
    }

    async fn sign(&self, claims: &HarnessClaims) -> String {
        let keys = self.gateway.gateway.api().corridor.store.keyring(KeyPurpose::Harness).await.unwrap();
        harness_token::mint(claims, &keys.current.secret)
    }

    async fn right(&self) -> String {
        self.sign(&self.claims()).await
    }

    /// Asks with the executor's own credential.
    async fn ask(&self, registration: &str, harness: &HarnessKey, right: &str) -> Answer {
        self.ask_as(Some(&self.credentials.token), registration, harness, right).await
    }

    async fn ask_as(&self, token: Option<&str>, registration: &str, harness: &HarnessKey, right: &str) -> Answer {
        let body = json!({
            "executor_registration_id": registration,
            "harness_public_key": harness,
            "harness_key_authorization": right,
        });
        let path = format!("/cloud/environment/{}/validate", self.credentials.executor);
        let bearer = token.map(|token| format!("Bearer {token}"));
        post(&self.gateway, &path, bearer.as_deref(), &body.to_string()).await
    }
}

async fn registration_of(executor: &FakeExecutor) -> String {
    executor.register().await.json()["executor_registration_id"].as_str().unwrap().to_owned()
}

fn harness(byte: u8) -> HarnessKey {
    KeyBytes { x25519: [byte; 32], mlkem768: Box::new([byte; 1184]) }.encode()
}

#[track_caller]
fn assert_verdict(answer: &Answer, valid: bool) {
    assert_eq!((answer.status.as_u16(), answer.json()), (200, json!({ "valid": valid })), "{answer:?}");
}

#[tokio::test]
async fn a_harness_with_the_right_to_this_handshake_is_valid() {
    let scene = Validation::new().await;
    let right = scene.right().await;
    assert_verdict(&scene.ask(&scene.registration, &scene.harness, &right).await, true);
}

#[tokio::test]
async fn a_right_to_another_handshake_is_not_valid() {
    let scene = Validation::new().await;
    let right = scene.right().await;
    // Another harness took it.
    assert_verdict(&scene.ask(&scene.registration, &harness(2), &right).await, false);
    // It was made for another process of the executor.
    let other = registration_of(&FakeExecutor::new(scene.gateway.address(), &scene.credentials)).await;
    assert_ne!(other, scene.registration);
    assert_verdict(&scene.ask(&other, &scene.harness, &right).await, false);
    assert_verdict(&scene.ask("exr_unknown", &scene.harness, &right).await, false);
    assert_verdict(&scene.ask("not an id", &scene.harness, &right).await, false);
    let mut claims = scene.claims();
    claims.registration = RegistrationId::new(&other).unwrap();
    assert_verdict(&scene.ask(&scene.registration, &scene.harness, &scene.sign(&claims).await).await, false);
    // It was made for another executor.
    let mut claims = scene.claims();
    claims.executor = ExecutorId::new("exe_other").unwrap();
    assert_verdict(&scene.ask(&scene.registration, &scene.harness, &scene.sign(&claims).await).await, false);
}

#[tokio::test]
async fn a_right_that_is_forged_or_expired_is_not_valid() {
    let scene = Validation::new().await;
    let right = scene.right().await;
    let mut expired = scene.claims();
    expired.exp -= 61;
    let altered = right.replacen("h1.e", "h1.f", 1);
    assert_ne!(altered, right);
    for wrong in [
        scene.sign(&expired).await,
        harness_token::mint(&scene.claims(), b"another key"),
        altered,
        right[..right.len() - 2].to_owned(),
        scene.credentials.token.clone(),
        scene.gateway.caller("w").await.token.unwrap(),
        String::new(),
        "x".repeat(5000),
    ] {
        assert_verdict(&scene.ask(&scene.registration, &scene.harness, &wrong).await, false);
    }
    let mut broken = scene.harness.clone();
    broken.x25519_public_key = "QUJD".into();
    assert_verdict(&scene.ask(&scene.registration, &broken, &right).await, false);
}

#[tokio::test]
async fn a_right_ends_when_its_workspace_is_unbound() {
    let scene = Validation::new().await;
    let right = scene.right().await;
    assert_verdict(&scene.ask(&scene.registration, &scene.harness, &right).await, true);
    let unbind = Request::ExecutorUnbind { executor: scene.claims().executor, workspace: scene.claims().workspace };
    scene.gateway.admin(unbind).await;
    assert_verdict(&scene.ask(&scene.registration, &scene.harness, &right).await, false);
}

#[tokio::test]
async fn a_validate_with_another_credential_than_registered_is_unauthorized() {
    let scene = Validation::new().await;
    let right = scene.right().await;
    let other = scene.gateway.executor("w", "other").await;
    for token in [None, Some("x"), Some(other.token.as_str())] {
        let answer = scene.ask_as(token, &scene.registration, &scene.harness, &right).await;
        assert_refused(&answer, 401, "unauthorized");
    }
}

#[tokio::test]
async fn a_validate_that_cannot_be_read_is_a_bad_request() {
    let scene = Validation::new().await;
    let path = format!("/cloud/environment/{}/validate", scene.credentials.executor);
    let bearer = format!("Bearer {}", scene.credentials.token);
    for body in ["", "{", "{}", "{\"executor_registration_id\":1}"] {
        assert_refused(&post(&scene.gateway, &path, Some(&bearer), body).await, 400, "bad_request");
    }
}

#[tokio::test]
async fn a_handshake_is_validated_without_the_validator() {
    let mut upstream = Upstream::start().await;
    let gateway = TestGateway::with(|config| upstream.configure(config)).await;
    let credentials = owned_executor(&gateway, &upstream).await;
    let (executor, _link) = FakeExecutor::connected(&gateway, &credentials).await;
    assert_eq!(upstream.asked("of-user-1"), 1, "for the register");
    upstream.go_away().await;

    let caller = gateway.caller("w").await;
    assert_eq!(caller.tool("box", "shell", json!({ "command": "true" })).await.status, 200);

    let asked: Vec<Value> = executor.validations();
    assert_eq!(asked.len(), 1);
    assert_eq!(upstream.asked("of-user-1"), 1);
}

#[tokio::test]
async fn an_executor_whose_credential_is_refused_at_validate_runs_nothing() {
    let gateway = TestGateway::start().await;
    let credentials = gateway.executor("w", "box").await;
    let (executor, _link) = FakeExecutor::connected(&gateway, &credentials).await;
    let caller = gateway.caller("w").await;
    executor.shows("another-credential");
    let answer = caller.tool("box", "shell", json!({ "command": "true" })).await;
    assert_refused(&answer, 502, "executor_unreachable");
    assert_eq!(answer.json()["error"]["ran"], "no");
    assert_eq!(executor.asked("initialize"), 0);
}
