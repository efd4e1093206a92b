//! Executors that do not speak encrypted relay frames: codex's direct transport, agentx, and codex before it encrypted.
//! The same tools and sessions work on all of them, and callers who share a socket see nothing of each other.

use std::net::SocketAddr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use exec_gateway::admin::Request;
use exec_gateway::config::Secret;
use exec_gateway::protocol::ids::{EnvironmentName, ExecutorId, WorkspaceId};
use serde_json::json;

use crate::sessions::start;
use crate::support::adapter::Make;
use crate::support::gateway::{free_address, workspace};
use crate::support::{
    Adapter, Answer, Caller, CodexExecutor, Credentials, DaemonProcess, Harness, MIB, Marker, Proxy, Scratch, Signer,
    TestGateway, Tongue, eventually, noise,
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flavour {
    Encrypted,
    Direct,
    Agentx,
    Relay,
}

const UNENCRYPTED: [Flavour; 3] = [Flavour::Direct, Flavour::Agentx, Flavour::Relay];

/// Keeps an executor running, whatever is between it and the gateway.
pub enum Executor {
    Stock(CodexExecutor),
    Adapter(Adapter),
}

impl Executor {
    pub async fn start(flavour: Flavour, address: SocketAddr, credentials: &Credentials) -> Self {
        let url = format!("http://{address}");
        match flavour {
            Flavour::Encrypted => Self::Stock(CodexExecutor::start(&url, credentials).await),
            Flavour::Direct => Self::Stock(CodexExecutor::start_direct(&url, credentials, |_| {})),
            Flavour::Agentx => Self::Adapter(Adapter::start(address, credentials, Make::Agentx).await),
            Flavour::Relay => Self::Adapter(Adapter::start(address, credentials, Make::Relay).await),
        }
    }

    pub fn process(&self) -> &CodexExecutor {
        match self {
            Self::Stock(executor) => executor,
            Self::Adapter(adapter) => &adapter.executor,
        }
    }
}

/// A gateway with an executor of one flavour behind a line that can be cut.
struct Scene {
    gateway: TestGateway,
    caller: Caller,
    credentials: Credentials,
    proxy: Proxy,
    executor: Executor,
}

impl Scene {
    async fn start(flavour: Flavour) -> Self {
        let gateway = TestGateway::start().await;
        let caller = gateway.caller("w").await;
        let credentials = gateway.executor("w", "box").await;
        let proxy = Proxy::to(gateway.address()).await;
        let executor = Executor::start(flavour, proxy.address, &credentials).await;
        executor.process().seen_by(&caller, "box").await;
        Self { gateway, caller, credentials, proxy, executor }
    }

    /// Another workspace that reaches the same executor under the same name.
    async fn neighbour(&self) -> Caller {
        let (workspace, name) = (WorkspaceId::new("other").unwrap(), EnvironmentName::new("box").unwrap());
        let executor = ExecutorId::new(&self.credentials.executor).unwrap();
        self.gateway.admin(Request::ExecutorBind { executor, workspace, name, default: false }).await;
        self.gateway.caller("other").await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_files_and_sessions_work_on_every_flavour() {
    for flavour in UNENCRYPTED {
        let scene = Scene::start(flavour).await;
        let caller = &scene.caller;

        let result = caller.shell("box", json!({ "command": "echo out; echo err >&2; exit 3" })).await;
        assert_eq!((&result["stdout"], &result["stderr"]), (&json!("out\n"), &json!("err\n")), "{flavour:?}");
        assert_eq!(result["exit_code"], 3, "{flavour:?}");

        // Larger than a frame, and than a block.
        let content = noise(7, 3 * MIB + 17);
        let data = STANDARD.encode(&content);
        let written = caller.result("box", "write_file", json!({ "path": "a", "content_b64": data })).await;
        assert_eq!(written["isError"], false, "{flavour:?}: {written}");
        assert!(std::fs::read(scene.executor.process().home().join("a")).unwrap() == content, "{flavour:?}");
        let read = caller.result("box", "read_file", json!({ "path": "a" })).await;
        assert!(read["content"][0]["text"] == data, "{flavour:?}");

        let session = start(caller, json!({ "command": "while read line; do echo got $line; done; echo over" })).await;
        let stdin = json!({ "data_b64": STANDARD.encode("one\ntwo\n"), "eof": true });
        assert_eq!(session.post("stdin", stdin).await.status, 200);
        let printed = session.read_all().await;
        assert_eq!(String::from_utf8(printed.stdout).unwrap(), "got one\ngot two\nover\n", "{flavour:?}");
        assert_eq!(printed.last["exit_code"], 0, "{flavour:?}");

        let marker = Marker::new();
        let session = start(caller, json!({ "command": ["sleep", marker.to_string()], "stdin": "none" })).await;
        marker.is_on(1).await;
        assert_eq!(session.post("terminate", json!({})).await.status, 200);
        assert_eq!(session.read_all().await.last["exit_code"], 137, "{flavour:?}");
        marker.is_on(0).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_goes_on_over_cuts_of_a_shared_socket_without_loss() {
    for flavour in [Flavour::Direct, Flavour::Agentx] {
        let scene = Scene::start(flavour).await;
        let command = "for i in $(seq 300); do echo line $i; sleep 0.01; done";
        let session = start(&scene.caller, json!({ "command": command })).await;
        for page in 1..=3 {
            eventually("it prints", async || {
                let page_of = session.get("/output?since=0&max_bytes=1000000").await;
                (page_of["next_since"].as_u64().unwrap() > 30 * page).then_some(())
            })
            .await;
            scene.proxy.cut();
        }
        let wanted: String = (1..=300).map(|i| format!("line {i}\n")).collect();
        let printed = session.read_all().await;
        assert_eq!(String::from_utf8(printed.stdout).unwrap(), wanted, "{flavour:?}");
        assert_eq!(printed.last["exit_code"], 0, "{flavour:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_goes_on_over_a_gateway_that_is_killed() {
    let (state, address) = (Scratch::new(), free_address());
    let daemon = DaemonProcess::start(&state, address, &[]).await;
    let (caller, credentials) = workspace(&state, &daemon).await;
    let executor = Executor::start(Flavour::Direct, address, &credentials).await;
    executor.process().seen_by(&caller, "box").await;
    let command = "for i in $(seq 200); do echo line $i; sleep 0.02; done; read line; echo got $line";
    let session = start(&caller, json!({ "command": command, "stdin": "open" })).await;
    eventually("it prints", async || {
        (session.get("/output?since=0").await["next_since"].as_u64().unwrap() > 10).then_some(())
    })
    .await;

    daemon.kill().await;
    let _daemon = DaemonProcess::start(&state, address, &[]).await;

    let stdin = json!({ "data_b64": STANDARD.encode("hello\n") }).to_string();
    let path = format!("/api/connectors/processes/{}/stdin", session.id);
    eventually("stdin is accepted", async || {
        let answer = caller.try_send("POST", &path, &[], stdin.clone()).await.ok()?;
        (answer.status == 200).then_some(())
    })
    .await;
    let lines: String = (1..=200).map(|i| format!("line {i}\n")).collect();
    let printed = session.read_all().await;
    assert_eq!(String::from_utf8(printed.stdout).unwrap(), format!("{lines}got hello\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_processes_that_nobody_takes_up_after_a_gateway_was_killed_are_ended() {
    let (state, address) = (Scratch::new(), free_address());
    let arguments = ["--link-adopt-secs", "5"];
    let daemon = DaemonProcess::start(&state, address, &arguments).await;
    let (caller, credentials) = workspace(&state, &daemon).await;
    let executor = Executor::start(Flavour::Direct, address, &credentials).await;
    executor.process().seen_by(&caller, "box").await;
    let (called, held, left, kept) = (Marker::new(), Marker::new(), Marker::new(), Marker::new());
    let call = tokio::spawn({
        let (caller, sleep) = (caller.clone(), json!({ "command": ["sleep", called.to_string()] }));
        let body = json!({ "tool": "shell", "arguments": sleep }).to_string();
        async move { caller.try_send("POST", "/api/connectors/envs/box/tool/call", &[], body).await.is_ok() }
    });
    start(&caller, json!({ "command": ["sleep", held.to_string()], "stdin": "none" })).await;
    let (mut leaver, _) = Harness::initialized(&caller, &credentials.executor, Tongue::Json).await;
    leaver.start("p", &format!("exec sleep {left}")).await;
    let (mut keeper, session) = Harness::initialized(&caller, &credentials.executor, Tongue::Json).await;
    keeper.start("p", &format!("exec sleep {kept}")).await;
    let store = rusqlite::Connection::open(state.path().join("gateway.db")).unwrap();
    eventually("the gateway has stored what runs", async || {
        let stored: String = store.query_row("SELECT processes FROM shared_sessions", [], |row| row.get(0)).unwrap();
        (serde_json::from_str::<Vec<String>>(&stored).unwrap().len() == 4).then_some(())
    })
    .await;

    daemon.kill().await;
    call.await.unwrap();
    for marker in [&called, &held, &left, &kept] {
        marker.is_on(1).await;
    }
    let _daemon = DaemonProcess::start(&state, address, &arguments).await;
    executor.process().seen_by(&caller, "box").await;
    let mut keeper = Harness::open(&caller, &credentials.executor, Tongue::Json).await;
    keeper.initialize(Some(&session)).await.unwrap();

    called.is_on(0).await;
    left.is_on(0).await;
    let read = json!({ "processId": "p", "afterSeq": 0, "maxBytes": 1024, "waitMs": 0 });
    assert_eq!(keeper.call("process/read", read).await.unwrap()["exited"], false);
    assert_eq!((held.processes().len(), kept.processes().len()), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn two_workspaces_on_one_shared_socket_see_nothing_of_each_other() {
    let scene = Scene::start(Flavour::Direct).await;
    let neighbour = scene.neighbour().await;
    let command = |word: &str| json!({ "command": format!("for i in $(seq 200); do echo {word} $i; done") });
    let printed = |word: &str| (1..=200).map(|i| format!("{word} {i}\n")).collect::<String>();
    let (ours, theirs) =
        tokio::join!(scene.caller.shell("box", command("ours")), neighbour.shell("box", command("theirs")));
    assert_eq!((&ours["stdout"], &theirs["stdout"]), (&json!(printed("ours")), &json!(printed("theirs"))));

    let marker = Marker::new();
    let session = start(&scene.caller, json!({ "command": ["sleep", marker.to_string()], "stdin": "none" })).await;
    marker.is_on(1).await;
    let path = format!("/api/connectors/processes/{}/terminate", session.id);
    assert_eq!(neighbour.post(&path, json!({})).await.status, 404);
    let workspace = WorkspaceId::new("other").unwrap();
    let executor = ExecutorId::new(&scene.credentials.executor).unwrap();
    scene.gateway.admin(Request::ExecutorUnbind { executor, workspace }).await;
    assert_eq!(session.get("").await["state"], "running");
    marker.is_on(1).await;
}

const REGISTER: &str = r#"{"transport":"direct_jsonrpc_v1"}"#;

const HANDSHAKE: [(&str, &str); 4] = [
    ("connection", "Upgrade"),
    ("upgrade", "websocket"),
    ("sec-websocket-version", "13"),
    ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
];

async fn register(gateway: &TestGateway, executor: &str, headers: &[(&str, String)], body: &str) -> Answer {
    let headers: Vec<(&str, &str)> = headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let path = format!("/cloud/environment/{executor}/direct/register");
    gateway.stranger().send("POST", &path, &headers, body.to_owned()).await
}

fn signed_register(gateway: &TestGateway, executor: &str, signer: &Signer<'_>) -> [(&'static str, String); 2] {
    let path = format!("/cloud/environment/{executor}/direct/register");
    signer.sign("POST", &gateway.address().to_string(), &path, REGISTER)
}

/// Status of a dial.
async fn dial(gateway: &TestGateway, path: &str, headers: &[(&str, String)]) -> u16 {
    let mut all: Vec<(&str, &str)> = headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
    all.extend(HANDSHAKE);
    gateway.stranger().request("GET", path, &all, "").await.unwrap().status().as_u16()
}

#[tokio::test]
async fn a_direct_register_is_signed_with_the_executors_own_token() {
    let gateway = TestGateway::start().await;
    let credentials = gateway.executor("w", "box").await;
    let other = gateway.executor("w", "other").await;
    let id = credentials.executor.as_str();
    let sign = |signer: Signer<'_>| signed_register(&gateway, id, &signer);

    let answer = register(&gateway, id, &sign(Signer::of(&credentials)), REGISTER).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    let fields = answer.json();
    assert_eq!((&fields["environment_id"], &fields["transport"]), (&json!(id), &json!("direct_jsonrpc_v1")));
    let registration = fields["registration_id"].as_str().unwrap();
    let url = fields["url"].as_str().unwrap();
    assert!(url.starts_with(&format!("ws://{}/bridge/{id}?token=", gateway.address())), "{url}");
    assert!(url.ends_with(&format!("&reg={registration}&t=direct")), "{url}");

    let wrong_secret = Signer { secret: &other.token, ..Signer::of(&credentials) };
    let wrong_key = Signer { key_id: &other.executor, ..Signer::of(&credentials) };
    let late = Signer { ahead: -600, ..Signer::of(&credentials) };
    let early = Signer { ahead: 600, ..Signer::of(&credentials) };
    let good = sign(Signer::of(&credentials));
    for headers in [
        sign(wrong_secret).to_vec(),
        sign(wrong_key).to_vec(),
        sign(Signer::of(&other)).to_vec(),
        sign(late).to_vec(),
        sign(early).to_vec(),
        good[..1].to_vec(),
        good[1..].to_vec(),
        vec![("authorization", format!("Bearer {}", credentials.token))],
    ] {
        let answer = register(&gateway, id, &headers, REGISTER).await;
        assert_eq!((answer.status.as_u16(), answer.code().as_str()), (401, "unauthorized"), "{headers:?}");
    }
    let altered = format!("{REGISTER} ");
    assert_eq!(register(&gateway, id, &good, &altered).await.status, 401);
    for body in ["", "{}", r#"{"transport":"other"}"#] {
        assert_eq!(register(&gateway, id, &good, body).await.status, 400, "{body}");
    }
    gateway.admin(Request::ExecutorDelete { executor: id.parse().unwrap() }).await;
    let answer = register(&gateway, id, &good, REGISTER).await;
    assert_eq!((answer.status.as_u16(), answer.code().as_str()), (403, "executor_not_registered"));
}

#[tokio::test]
async fn with_a_validator_upstream_the_direct_transport_is_refused() {
    let gateway = TestGateway::with(|config| {
        config.auth.upstream_url = Some("http://127.0.0.1:9".into());
        config.auth.upstream_secret = Some(Secret::new("between us".into()));
    })
    .await;
    let credentials = gateway.executor("w", "box").await;
    let headers = signed_register(&gateway, &credentials.executor, &Signer::of(&credentials));
    let answer = register(&gateway, &credentials.executor, &headers, REGISTER).await;
    assert_eq!((answer.status.as_u16(), answer.code().as_str()), (403, "direct_transport_refused"));
}

#[tokio::test]
async fn a_direct_dial_that_may_not_is_sent_to_register_again_by_409_and_nothing_else() {
    let gateway = TestGateway::start().await;
    let credentials = gateway.executor("w", "box").await;
    let id = credentials.executor.as_str();
    let headers = signed_register(&gateway, id, &Signer::of(&credentials));
    let url = register(&gateway, id, &headers, REGISTER).await.json()["url"].as_str().unwrap().to_owned();
    let path = &url[url.find("/bridge").unwrap()..];
    let host = gateway.address().to_string();
    let sign = |signer: Signer<'_>, path: &str| signer.sign("GET", &host, path, "").to_vec();
    let wrong = || Signer { secret: "egx_wrong", ..Signer::of(&credentials) };
    let unknown = path.replace("&reg=exr_", "&reg=exr_0");
    let no_ticket = format!("/bridge/{id}?token=x{}", &path[path.find("&reg").unwrap()..]);
    for (path, headers) in [
        (path, vec![]),
        (path, sign(wrong(), path)),
        (path, sign(Signer { ahead: -600, ..Signer::of(&credentials) }, path)),
        (path, sign(Signer::of(&credentials), &format!("{path}&more=1"))),
        (&unknown, sign(Signer::of(&credentials), &unknown)),
        (&no_ticket, sign(Signer::of(&credentials), &no_ticket)),
    ] {
        assert_eq!(dial(&gateway, path, &headers).await, 409, "{path}");
    }
    // Neither does the URL open without what marks it.
    let unmarked = path.replace("&t=direct", "");
    assert_eq!(dial(&gateway, &unmarked, &sign(Signer::of(&credentials), &unmarked)).await, 404);
    assert_eq!(dial(&gateway, path, &sign(Signer::of(&credentials), path)).await, 101);
}

#[tokio::test(flavor = "multi_thread")]
async fn while_a_direct_executor_answers_another_process_is_held_and_then_refused() {
    let gateway = TestGateway::with(|config| {
        config.link.takeover_ping_secs = 1;
        config.link.register_hold_secs = 2;
    })
    .await;
    let caller = gateway.caller("w").await;
    let credentials = gateway.executor("w", "box").await;
    let executor = CodexExecutor::start_direct(&gateway.url(), &credentials, |_| {});
    executor.seen_by(&caller, "box").await;
    let id = credentials.executor.as_str();
    let headers = signed_register(&gateway, id, &Signer::of(&credentials));
    let answer = register(&gateway, id, &headers, REGISTER).await;
    assert_eq!((answer.status.as_u16(), answer.code().as_str()), (409, "registration_conflict"));
    assert_eq!(caller.shell("box", json!({ "command": ["echo", "here"] })).await["stdout"], "here\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_does_not_read_stops_its_own_stdin_and_nobody_else() {
    let gateway = TestGateway::with(|config| config.session.wait_max_secs = 8).await;
    let caller = gateway.caller("w").await;
    let credentials = gateway.executor("w", "box").await;
    let executor = CodexExecutor::start_direct(&gateway.url(), &credentials, |_| {});
    executor.seen_by(&caller, "box").await;
    let marker = Marker::new();
    let session = start(&caller, json!({ "command": ["sleep", marker.to_string()], "stdin": "open" })).await;
    let neighbour = start(&caller, json!({ "command": "cat", "stdin": "open" })).await;
    let block = STANDARD.encode(noise(1, 16 * MIB));

    let answer = session.post("stdin", json!({ "data_b64": block })).await;

    assert_eq!((answer.status.as_u16(), answer.code().as_str()), (429, "stdin_full"));
    assert_eq!(caller.shell("box", json!({ "command": ["echo", "here"] })).await["stdout"], "here\n");
    let line = json!({ "data_b64": STANDARD.encode("through\n") });
    assert_eq!(neighbour.post("stdin", line).await.status, 200);
    eventually("it comes back", async || {
        let page = neighbour.get("/output?since=0").await;
        (page["chunks"][0]["data_b64"] == STANDARD.encode("through\n")).then_some(())
    })
    .await;
    let links = &gateway.gateway.api().metrics.links_ended;
    let stalled = links.of(["stalled"]).get();
    assert_eq!(stalled, 1, "the socket was given up once");
    assert_eq!(session.post("terminate", json!({})).await.status, 200);
    assert_eq!(session.read_all().await.last["exit_code"], 137);
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_an_executor_cannot_read_hold_up_nobody() {
    for flavour in [Flavour::Direct, Flavour::Agentx] {
        let scene = Scene::start(flavour).await;
        let (mut harness, _) = Harness::initialized(&scene.caller, &scene.credentials.executor, Tongue::Json).await;
        for unreadable in [r#""\ud800""#, "1e999"].repeat(50) {
            let params = format!(r#"{{"processId":{unreadable}}}"#);
            harness.say_text(&format!(r#"{{"id":1,"method":"process/read","params":{params}}}"#)).await;
            assert_eq!(harness.hear().await.unwrap()["error"]["code"], -32600, "{flavour:?}");
        }
        let result = scene.neighbour().await.shell("box", json!({ "command": "echo quick" })).await;
        assert_eq!(result["stdout"], "quick\n", "{flavour:?}");
    }
}
