//! The executor's socket: who may open it, who replaces whom, and what a faulty executor can do to others: nothing.

use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use exec_gateway::protocol::frame::{Body, Data, Frame, StreamId};
use exec_gateway::protocol::ids::ExecutorId;
use exec_gateway::protocol::ticket;
use exec_gateway::store::KeyPurpose;
use futures_util::SinkExt;
use serde_json::json;
use tokio_tungstenite::tungstenite::Message;

use crate::support::{
    Answer, Caller, Credentials, FakeExecutor, FakeLink, Harness, MIB, PATIENCE, Reply, TestGateway, Tongue, eventually,
};

pub const HANDSHAKE: [(&str, &str); 4] = [
    ("connection", "Upgrade"),
    ("upgrade", "websocket"),
    ("sec-websocket-version", "13"),
    ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
];

/// A gateway, its workspace's caller, and a stand-in on the line under the name `box`.
pub struct Scene {
    pub gateway: TestGateway,
    pub caller: Caller,
    pub credentials: Credentials,
    pub executor: FakeExecutor,
    pub link: FakeLink,
}

impl Scene {
    pub async fn start() -> Self {
        Self::with(|_| {}).await
    }

    pub async fn with(change: impl FnOnce(&mut exec_gateway::config::Config)) -> Self {
        let gateway = TestGateway::with(change).await;
        let caller = gateway.caller("w").await;
        let credentials = gateway.executor("w", "box").await;
        let (executor, link) = FakeExecutor::connected(&gateway, &credentials).await;
        Self { gateway, caller, credentials, executor, link }
    }

    async fn call(&self) -> Answer {
        self.caller.tool("box", "shell", json!({ "command": "true" })).await
    }

    async fn works(&self) {
        assert_works(&self.caller, "box", &self.credentials).await;
    }

    /// A second executor under that name, in a workspace of its own.
    async fn neighbour(&self) -> Neighbour {
        let credentials = self.gateway.executor("neighbours", "box").await;
        let caller = self.gateway.caller("neighbours").await;
        let (_executor, link) = FakeExecutor::connected(&self.gateway, &credentials).await;
        Neighbour { caller, credentials, link }
    }

    /// Only the newest link is left, and its predecessors have cleaned up.
    async fn one_link_is_left(&self) {
        let links = &self.gateway.gateway.api().links;
        eventually("former links have ended", async || (links.len() == 1).then_some(())).await;
        assert_eq!(self.caller.environments().await, ["box"]);
    }
}

struct Neighbour {
    caller: Caller,
    credentials: Credentials,
    link: FakeLink,
}

impl Neighbour {
    async fn works(&self) {
        assert_works(&self.caller, "box", &self.credentials).await;
        assert!(!self.link.is_ended());
    }
}

async fn assert_works(caller: &Caller, name: &str, credentials: &Credentials) {
    let result = caller.shell(name, json!({ "command": "true" })).await;
    assert_eq!(result["stdout"], format!("{}\n", credentials.executor));
}

fn path_of(url: &str) -> &str {
    let host = url.split_once("://").unwrap().1;
    &host[host.find('/').unwrap()..]
}

fn frame(stream: &str, body: Body) -> Message {
    Message::Binary(Frame { stream_id: StreamId::new(stream).unwrap(), body }.encode())
}

fn data(payload: Bytes) -> Body {
    Body::Data(Data { seq: 0, segment_index: 0, segment_count: 1, payload })
}

#[track_caller]
fn assert_failure(answer: &Answer, status: u16, code: &str, ran: Option<&str>) {
    assert_eq!((answer.status.as_u16(), answer.code().as_str()), (status, code), "{answer:?}");
    assert_eq!(answer.json()["error"]["ran"].as_str(), ran, "{answer:?}");
}

#[tokio::test]
async fn a_ticket_that_does_not_open_sends_the_executor_to_register_again_and_never_away() {
    let gateway = TestGateway::start().await;
    let credentials = gateway.executor("w", "box").await;
    let other = gateway.executor("w", "other").await;
    let executor = FakeExecutor::new(gateway.address(), &credentials);
    let url = executor.registered().await;
    let registration = url.split_once("&reg=").unwrap().1;
    let other_ticket = FakeExecutor::new(gateway.address(), &other).registered().await;
    let (other_ticket, other_registration) = other_ticket.split_once("token=").unwrap().1.split_once("&reg=").unwrap();
    let keys = gateway.gateway.api().corridor.store.keyring(KeyPurpose::Ticket).await.unwrap();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let id = ExecutorId::new(&credentials.executor).unwrap();
    let ticket = |exp, key: &[u8]| ticket::mint(&id, exp, key);
    let good = ticket(now + 60, &keys.current.secret);
    let forged = ticket(now + 60, b"another key");
    let expired = ticket(now - 1, &keys.current.secret);

    for (query, reason) in [
        (format!("reg={registration}"), "unknown_route"),
        (format!("token=&reg={registration}"), "unknown_route"),
        (format!("token=x&reg={registration}"), "unknown_route"),
        (format!("token={forged}&reg={registration}"), "invalid_signature"),
        (format!("token={expired}&reg={registration}"), "expired"),
        (format!("token={other_ticket}&reg={registration}"), "unknown_route"),
        (format!("token={good}"), "unknown_route"),
        (format!("token={good}&reg=exr_unknown"), "unknown_route"),
        (format!("token={good}&reg={other_registration}"), "unknown_route"),
        (format!("token={good}&reg=a.b"), "unknown_route"),
    ] {
        let path = format!("/bridge/{}?{query}", credentials.executor);
        let answer = gateway.stranger().send("GET", &path, &HANDSHAKE, "").await;
        assert_eq!(answer.status, 404, "{query}");
        assert_eq!(answer.header("x-codex-rendezvous-rejection-reason"), Some(reason), "{query}");
    }
    let path = format!("/bridge/exe.1?token={good}&reg={registration}");
    assert_eq!(gateway.stranger().send("GET", &path, &HANDSHAKE, "").await.status, 404);
    // The same by which the executor comes in.
    assert!(executor.dial(&url).await.is_ok());
}

#[tokio::test]
async fn a_request_that_is_no_websocket_is_told_so() {
    let gateway = TestGateway::start().await;
    let credentials = gateway.executor("w", "box").await;
    let url = FakeExecutor::new(gateway.address(), &credentials).registered().await;
    let plain = gateway.stranger().send("GET", path_of(&url), &[], "").await;
    assert_eq!((plain.status.as_u16(), plain.header("upgrade")), (426, Some("websocket")));
    let old = HANDSHAKE.map(|(name, value)| (name, if value == "13" { "8" } else { value }));
    let old = gateway.stranger().send("GET", path_of(&url), &old, "").await;
    assert_eq!((old.status.as_u16(), old.header("sec-websocket-version")), (426, Some("13")));
}

#[tokio::test]
async fn a_process_that_dials_again_replaces_its_own_link_at_once() {
    // A ping would be answered, so only the equal registration explains that nobody waits.
    let scene = Scene::start().await;
    let url = scene.executor.registered().await;
    let again = scene.executor.dial(&url).await.unwrap();
    scene.link.ended().await;
    scene.one_link_is_left().await;
    scene.works().await;
    assert!(!again.is_ended());
}

#[tokio::test]
async fn a_process_that_registers_again_keeps_its_registration() {
    let scene = Scene::start().await;
    let first = scene.executor.register().await.json()["executor_registration_id"].clone();
    let second = scene.executor.register().await.json()["executor_registration_id"].clone();
    assert!(first.is_string());
    assert_eq!(first, second);
    assert!(!scene.link.is_ended(), "a register alone ends nothing");
}

#[tokio::test]
async fn while_a_process_answers_another_one_waits_outside() {
    let gateway = TestGateway::start().await;
    let credentials = gateway.executor("w", "box").await;
    let caller = gateway.caller("w").await;
    let newcomer = FakeExecutor::new(gateway.address(), &credentials);
    let url = newcomer.registered().await;
    let (executor, link) = FakeExecutor::connected(&gateway, &credentials).await;

    let answer = newcomer.register().await;

    assert_failure(&answer, 503, "registration_conflict", None);
    assert_eq!(newcomer.dial(&url).await.err(), Some(503));
    assert!(!link.is_ended());
    assert_works(&caller, "box", &credentials).await;
    assert_eq!((executor.asked("process/start"), newcomer.asked("process/start")), (1, 0));

    drop(link);
    eventually("the place is free", async || newcomer.dial(&url).await.ok()).await;
}

#[tokio::test]
async fn a_process_that_is_silent_gives_its_place_to_another_one() {
    let scene = Scene::with(|config| config.link.takeover_ping_secs = 1).await;
    scene.link.silence();
    let newcomer = FakeExecutor::new(scene.gateway.address(), &scene.credentials);
    let link = newcomer.register_and_dial().await;
    scene.one_link_is_left().await;
    scene.works().await;
    assert_eq!((scene.executor.asked("process/start"), newcomer.asked("process/start")), (0, 1));
    assert!(!link.is_ended());
}

#[tokio::test]
async fn the_end_of_old_links_never_removes_the_newest() {
    let scene = Scene::start().await;
    let url = scene.executor.registered().await;
    let mut links = Vec::new();
    for _ in 0..20 {
        links.push(scene.executor.dial(&url).await.unwrap());
    }
    let newest = links.pop().unwrap();
    drop(links);
    scene.one_link_is_left().await;
    scene.works().await;
    assert!(!newest.is_ended());
}

#[tokio::test]
async fn an_executor_that_answers_no_ping_for_too_long_is_gone() {
    let change = |config: &mut exec_gateway::config::Config| {
        config.link.ping_secs = 1;
        config.link.dead_secs = 2;
    };
    let scene = Scene::with(change).await;
    let neighbour = scene.neighbour().await;
    scene.link.silence();
    eventually("the silent one is gone", async || scene.caller.environments().await.is_empty().then_some(())).await;
    neighbour.works().await;
}

#[tokio::test]
async fn what_is_no_frame_for_anybody_is_dropped_and_the_link_lives() {
    let scene = Scene::start().await;
    scene.works().await;
    let whole = Frame { stream_id: StreamId::new("s").unwrap(), body: data(Bytes::from_static(b"x")) }.encode();
    let mut wrong_version = whole.to_vec();
    assert_eq!(wrong_version[..2], [0x08, 1], "field 1 is the version");
    wrong_version[1] = 2;
    scene.link.send(Message::text("{\"jsonrpc\":\"2.0\"}"));
    scene.link.send(Message::Binary(Bytes::new()));
    scene.link.send(Message::Binary(whole.slice(..whole.len() - 1)));
    scene.link.send(Message::Binary(wrong_version.into()));
    scene.link.send(Message::Binary(Bytes::from_static(&[0xff; 64])));
    for body in [data(Bytes::from_static(b"x")), Body::Ack, Body::Heartbeat, Body::Resume { next_seq: 7 }] {
        scene.link.send(frame("nobody's", body));
    }
    scene.link.send(frame("nobody's", Body::Reset { reason: "r".into() }));
    scene.link.send(frame("nobody's", Body::Handshake { payload: Bytes::from_static(b"x") }));

    let dropped = &scene.gateway.gateway.api().metrics.frames_dropped;
    eventually("five are dropped", async || (dropped.get() == 5).then_some(())).await;
    scene.works().await;
    assert!(!scene.link.is_ended());
    assert_eq!(scene.executor.asked("handshake"), 1, "even the conversation is the same");
}

#[tokio::test]
async fn a_frame_past_the_bound_ends_its_own_link_and_no_other() {
    let scene = Scene::start().await;
    let neighbour = scene.neighbour().await;
    scene.link.send(Message::Binary(vec![0; 256 * 1024].into()));
    scene.works().await;
    scene.link.send(Message::Binary(vec![0; 256 * 1024 + 1].into()));
    scene.link.ended().await;
    neighbour.works().await;
    let _again = scene.executor.register_and_dial().await;
    eventually("it is back", async || (scene.call().await.status == 200).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_tiny_frames_costs_the_others_nothing() {
    let scene = Scene::start().await;
    let neighbour = scene.neighbour().await;
    scene.link.flood(frame("nobody's", Body::Heartbeat), 200_000);
    neighbour.works().await;
    scene.works().await;
    assert!(!scene.link.is_ended());
}

#[tokio::test]
async fn a_handshake_that_is_never_completed_fails_its_call_alone() {
    let scene = Scene::with(|config| config.link.handshake_timeout_secs = 1).await;
    scene.executor.on("handshake", Reply::Never);
    let neighbour = scene.neighbour().await;
    let same_workspace = scene.gateway.executor("w", "healthy").await;
    let _healthy = FakeExecutor::connected(&scene.gateway, &same_workspace).await;

    let (answer, ()) = tokio::join!(scene.call(), async {
        eventually("the handshake is under way", async || (scene.executor.asked("handshake") == 1).then_some(())).await;
        neighbour.works().await;
        assert_works(&scene.caller, "healthy", &same_workspace).await;
    });

    assert_failure(&answer, 504, "executor_timeout", Some("no"));
    scene.executor.on("handshake", Reply::Usual);
    scene.works().await;
}

#[tokio::test]
async fn a_handshake_that_was_altered_runs_nothing() {
    let scene = Scene::start().await;
    scene.executor.on("handshake", Reply::Tampered);
    assert_failure(&scene.call().await, 502, "executor_unreachable", Some("no"));
    assert_eq!(scene.executor.asked("initialize"), 0);
    scene.executor.on("handshake", Reply::Usual);
    scene.works().await;
}

#[tokio::test]
async fn a_handshake_that_the_executor_refuses_runs_nothing() {
    let scene = Scene::start().await;
    scene.executor.on("handshake", Reply::Reset);
    assert_failure(&scene.call().await, 502, "executor_unreachable", Some("no"));
    scene.executor.on("handshake", Reply::Usual);
    scene.works().await;
}

#[tokio::test]
async fn an_executor_that_never_initializes_runs_nothing() {
    let scene = Scene::with(|config| config.link.answer_timeout_secs = 1).await;
    scene.executor.on("initialize", Reply::Never);
    assert_failure(&scene.call().await, 504, "executor_timeout", Some("no"));
    scene.executor.on("initialize", Reply::Usual);
    scene.works().await;
}

#[tokio::test]
async fn a_link_lost_in_the_middle_of_a_call_leaves_open_whether_it_ran() {
    let scene = Scene::with(|config| config.tools.relink_wait_secs = 1).await;
    scene.executor.on("process/start", Reply::Hangup);
    // The timeout of the call is an hour: it is the loss that ends it.
    let arguments = json!({ "command": "true", "timeout_ms": 3_600_000 });
    let answer = scene.caller.tool("box", "shell", arguments).await;
    assert_failure(&answer, 502, "executor_unreachable", Some("unknown"));
}

#[tokio::test]
async fn a_link_lost_while_reading_a_file_leaves_the_gateway_well() {
    let scene = Scene::with(|config| config.tools.relink_wait_secs = 1).await;
    let neighbour = scene.neighbour().await;
    scene.executor.on("fs/readBlock", Reply::Hangup);
    let answer = scene.caller.tool("box", "read_file", json!({ "path": "a" })).await;
    assert_failure(&answer, 502, "executor_unreachable", Some("no"));
    neighbour.works().await;
}

#[tokio::test]
async fn a_link_lost_before_the_request_was_sent_ran_nothing() {
    let scene = Scene::with(|config| config.link.executor_wait_secs = 1).await;
    scene.executor.on("handshake", Reply::Hangup);
    assert_failure(&scene.call().await, 503, "executor_not_connected", None);
    assert_eq!(scene.executor.asked("process/start"), 0);
}

#[tokio::test]
async fn a_call_between_two_links_waits_for_the_second() {
    let scene = Scene::start().await;
    scene.works().await;
    let url = scene.executor.registered().await;
    drop(scene.link);
    let (caller, gateway) = (&scene.caller, &scene.gateway);
    let registry = &gateway.gateway.api().corridor.registry;
    eventually("the first link is gone", async || registry.is_empty().then_some(())).await;

    let (result, _link) = tokio::join!(caller.shell("box", json!({ "command": "true" })), async {
        let workspace = &gateway.gateway.api().workspaces;
        let calls = || workspace.all().iter().map(|workspace| workspace.calls()).sum::<usize>();
        eventually("the call waits", async || (calls() == 1).then_some(())).await;
        scene.executor.dial(&url).await.unwrap()
    });

    assert_eq!(result["exit_code"], 0);
    assert_eq!(scene.executor.asked("process/start"), 2);
}

#[tokio::test]
async fn an_altered_record_ends_its_conversation_and_the_call_goes_on_in_another() {
    for fault in [Reply::Tampered, Reply::Garbage, Reply::Reset] {
        let scene = Scene::start().await;
        let neighbour = scene.neighbour().await;
        scene.executor.on("process/start", fault);
        let (answer, ()) = tokio::join!(scene.call(), async {
            let asked = || scene.executor.asked("process/start");
            eventually("the call is tried again", async || (asked() > 1).then_some(())).await;
            scene.executor.on("process/start", Reply::Usual);
        });
        assert_eq!(answer.json()["structuredContent"]["stdout"], format!("{}\n", scene.credentials.executor));
        assert!(!scene.link.is_ended(), "{fault:?}");
        neighbour.works().await;
    }
}

#[tokio::test]
async fn an_executor_that_breaks_every_conversation_is_not_asked_without_end() {
    let scene = Scene::with(|config| config.tools.relink_wait_secs = 1).await;
    for fault in [Reply::Tampered, Reply::Garbage, Reply::Reset] {
        let before = scene.executor.asked("process/start");
        scene.executor.on("process/start", fault);
        assert_failure(&scene.call().await, 502, "executor_unreachable", Some("unknown"));
        let asked = scene.executor.asked("process/start") - before;
        assert!((2..=8).contains(&asked), "{fault:?}: {asked}");
    }
    scene.executor.on("process/start", Reply::Usual);
    scene.works().await;
    assert!(!scene.link.is_ended());
}

#[tokio::test]
async fn a_broken_conversation_about_processes_leaves_the_one_about_files_alone() {
    let scene = Scene::with(|config| config.tools.relink_wait_secs = 1).await;
    let files = async || scene.caller.tool("box", "read_file", json!({ "path": "a" })).await.status;
    assert_eq!(files().await, 200);
    scene.executor.on("process/start", Reply::Garbage);
    assert_failure(&scene.call().await, 502, "executor_unreachable", Some("unknown"));
    let handshakes = scene.executor.asked("handshake");
    assert_eq!(files().await, 200);
    assert_eq!(scene.executor.asked("handshake"), handshakes, "not opened anew");
}

#[tokio::test]
async fn a_request_that_is_never_answered_times_out_and_leaves_open_whether_it_ran() {
    let scene = Scene::with(|config| config.link.answer_timeout_secs = 1).await;
    scene.executor.on("process/start", Reply::Never);
    assert_failure(&scene.call().await, 504, "executor_timeout", Some("unknown"));
    scene.executor.on("process/start", Reply::Usual);
    scene.works().await;
    assert_eq!(scene.executor.asked("handshake"), 1, "a slow answer is no reason to begin anew");
}

#[tokio::test]
async fn unbinding_or_deleting_an_executor_ends_what_it_is_asked() {
    use exec_gateway::admin::Request;
    let scene = Scene::start().await;
    scene.executor.on("process/start", Reply::Never);
    let (answer, ()) = tokio::join!(scene.call(), async {
        eventually("the call has begun", async || (scene.executor.asked("process/start") == 1).then_some(())).await;
        let executor = scene.credentials.executor.parse().unwrap();
        scene.gateway.admin(Request::ExecutorDelete { executor }).await;
    });
    assert_failure(&answer, 502, "executor_unreachable", Some("unknown"));
    scene.link.ended().await;
    assert_eq!(scene.call().await.code(), "env_not_found");
    assert_eq!(scene.executor.register().await.status, 403);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_executor_that_never_reads_loses_its_link_and_the_others_wait_for_nothing() {
    let scene = Scene::with(|config| config.link.write_timeout_secs = 1).await;
    let neighbour = scene.neighbour().await;
    let (mut harness, _) = Harness::initialized(&scene.caller, &scene.credentials.executor, Tongue::Json).await;
    scene.link.silence();
    // More than all buffers between the harness and the executor hold.
    let large = "x".repeat(MIB);
    let write = json!({ "id": 1, "method": "fs/writeFile", "params": { "path": "file:///a", "dataBase64": large } });
    let write = Message::text(write.to_string());
    let flood = async move { while harness.socket.send(write.clone()).await.is_ok() {} };
    let (mut flood, mut served) = (tokio::spawn(tokio::time::timeout(PATIENCE, flood)), 0);
    loop {
        tokio::select! {
            ended = &mut flood => break ended.unwrap().expect("the harness is told"),
            () = neighbour.works() => served += 1,
        }
    }
    assert!(served > 0);
    let ends = &scene.gateway.gateway.api().metrics.links_ended;
    assert_eq!(ends.of(["write_timeout"]).get(), 1);
    assert!(scene.caller.environments().await.is_empty());
    assert!(!neighbour.link.is_ended());
}
