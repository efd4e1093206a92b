//! Harnesses that may not, that talk nonsense, that leave or are left, and whose right ends: what becomes of them, and
//! that nobody else notices.
//!
//! Where each check of the original's door (connectors-api.md §2.4) and each of its faults in tokens and on the data
//! path (§10, 18 to 44) has its test, here unless a file is named; names are cut where the first words tell:
//!
//! | of the original | test |
//! |---|---|
//! | checks 1 to 4, 6: credential, revoked turn, no socket | `who_may_not_open_a_socket_…` |
//! | check 5: ownership; it cannot be looked up | `executors_of_others_…`, `a_right_that_cannot_be_looked_up_…` |
//! | check 7: no origin check, no read limit | `a_browser_of_any_origin_…`, `a_message_that_is_too_large_…` |
//! | check 9: first frame | `first_words_that_make_no_harness_…` |
//! | equal stream ids, frames of others, text, no frames | `a_stream_id_in_use_…`, `frames_that_are_torn_…` |
//! | ping | `a_harness_that_answers_no_ping_…` |
//! | 18 a token that is minted once | unit tests of `auth::cap_token` |
//! | 19 revocations | `what_was_revoked_…`, `a_workspace_that_was_…`, `revoking_…` |
//! | 20 claims, key rotation | unit tests of `auth::cap_token` |
//! | 21 empty secret, binding anything | compat: `a_door_without_its_secret_…`, `binding_says_what_is_wrong_…` |
//! | 22 one secret for two ends, tickets in logs | links: `a_ticket_that_…`; cli: `no_line_of_the_log_…` |
//! | 23 register while the validator is down | registration: `a_register_while_…`, `somebody_elses_…` |
//! | 24 doors without a credential | registration: `a_register_without_…`; `an_authorization_opens_for_…` |
//! | 25 forged Host | registration: `a_hostile_host_…`, `the_configured_url_wins_…` |
//! | 27 one slow reader | harness: `a_harness_that_reads_later_…`; links: `an_executor_that_never_reads_…` |
//! | 28 sizes, half-open sockets | limits; `a_message_that_is_too_large_…`; links: `a_frame_past_the_bound_…` |
//! | 29 no reset | `the_executor_is_told_when_…` |
//! | 30 reconnect race | links: `the_end_of_old_links_…` |
//! | 31 dead peers | links: `an_executor_that_answers_no_ping_…`; `a_harness_that_answers_no_ping_…` |
//! | 32 unbinding | `unbinding_ends_…`; restart: `unbinding_ends_…`; tenancy: `one_executor_serves_…` |
//! | 33 what does not decode, no first frame | `frames_that_are_torn_…`, `first_words_that_make_no_harness_…` |
//! | 34 segments, shared dials, notifications | matrix: `a_message_that_a_…`; tenancy: `a_first_caller_…`; shell |
//! | 35 calls that leave by the public URL | registration: `a_public_url_that_leads_nowhere_…` |
//! | 36 nothing is evicted | tenancy: `an_idle_workspace_…`, `a_workspace_is_built_once_…` |
//! | 37 no resume | relink; harness: `a_plain_harness_resumes_…`, `a_harness_whose_socket_is_cut_…` |
//! | 38 state in memory | restart: `the_same_executor_is_back_…`; sessions: `nothing_is_lost_…`; codex_harness |
//! | 39 health, request ids | ops: `a_gateway_whose_store_is_away_…`; rest: `every_answer_carries_…` |
//! | 40 configuration | cli: `check_names_every_fault_…`, `config_names_the_source_…` |
//! | 41 unknown names | `workspace::resolver`; rest: `an_unknown_environment_…` |
//! | 42 defaults, names | store: `a_workspace_has_one_default_…`; compat: `binding_says_what_is_wrong_…` |
//! | 43 deleting | `deleting_an_executor_…`; compat: `a_machine_is_registered_…` |
//! | 44 last seen | restart: `after_a_crash_…`; compat: `an_executor_that_left_…` |

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use exec_gateway::admin::{Request, Response};
use exec_gateway::protocol::cap_token::{self, CapClaims};
use exec_gateway::protocol::frame::{Body, Data, Frame, StreamId};
use exec_gateway::protocol::harness_token::{self, HarnessClaims, KeyDigest};
use exec_gateway::protocol::ids::{EnvironmentName, ExecutorId, RegistrationId, TurnId, WorkspaceId};
use exec_gateway::protocol::rest::ConnectResponse;
use exec_gateway::store::{KeyPurpose, path_in};
use futures_util::{SinkExt, StreamExt};
use serde_json::json;
use tokio_tungstenite::tungstenite::Message;

use crate::harness::TONGUES;
use crate::links::{HANDSHAKE, Scene};
use crate::support::harness::{Farewell, HarnessKeys, connect, dial};
use crate::support::{Answer, Caller, Harness, Reply, TestGateway, Tongue, Wire, eventually};

const ENDED: (u16, &str) = (1008, "the right to this executor has ended");

impl Scene {
    fn executor_id(&self) -> ExecutorId {
        ExecutorId::new(&self.credentials.executor).unwrap()
    }

    fn door(&self) -> String {
        format!("/bridge/{}", self.credentials.executor)
    }

    fn bearing(&self, token: String) -> Caller {
        Caller::new(self.gateway.address(), Some(token))
    }

    /// A caller of another workspace that may reach the same executor.
    async fn sharer(&self) -> Caller {
        let (workspace, name) = (WorkspaceId::new("sharers").unwrap(), EnvironmentName::new("shared").unwrap());
        let bind = Request::ExecutorBind { executor: self.executor_id(), workspace, name, default: false };
        self.gateway.admin(bind).await;
        self.gateway.caller("sharers").await
    }

    async fn harness(&self, caller: &Caller, tongue: Tongue) -> Harness {
        Harness::initialized(caller, &self.credentials.executor, tongue).await.0
    }

    /// A harness of each kind.
    async fn harnesses(&self, caller: &Caller) -> Vec<Harness> {
        let mut harnesses = Vec::new();
        for tongue in TONGUES {
            harnesses.push(self.harness(caller, tongue).await);
        }
        harnesses
    }

    /// Mints a cap-token of workspace `w` that ends so many seconds from now.
    async fn cap_token(&self, turn: &str, seconds: i64) -> String {
        let keys = self.gateway.gateway.api().corridor.store.keyring(KeyPurpose::CapToken).await.unwrap();
        let claims = CapClaims {
            turn_id: TurnId::new(turn).unwrap(),
            workspace_id: WorkspaceId::new("w").unwrap(),
            user_id: None,
            iat: now() - 100,
            exp: now().saturating_add_signed(seconds),
            skip_audit: false,
            kid: Some(keys.current.kid.clone()),
        };
        cap_token::mint(&claims, &keys.current.secret)
    }

    /// The way to the executor as an encrypted harness is told it, with its path and query.
    async fn way(&self, caller: &Caller) -> (HarnessKeys, ConnectResponse, String) {
        let keys = HarnessKeys::new();
        let way = connect(caller, &self.credentials.executor, &keys).await;
        let path = format!("/bridge/{}", way.url.split_once("/bridge/").unwrap().1);
        (keys, way, path)
    }

    /// Opens an encrypted harness's socket and begins a handshake that cannot succeed.
    async fn begin_broken_handshake(&self, caller: &Caller) -> Result<Harness, (u16, String)> {
        let path = self.way(caller).await.2;
        let mut harness = Harness::plain(dial(&self.gateway.stranger(), &path).await?, Tongue::Frames);
        harness.send_body(Body::Resume { next_seq: 0 }).await;
        harness.send_body(junk_handshake()).await;
        Ok(harness)
    }

    /// Waits until no harness's socket is served any more.
    async fn all_have_left(&self) {
        let sockets = &self.gateway.gateway.api().sockets;
        eventually("the harnesses have left", async || sockets.is_empty().then_some(())).await;
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

fn junk_handshake() -> Body {
    Body::Handshake { payload: vec![7; 3600].into() }
}

fn data(payload: &'static [u8]) -> Body {
    Body::Data(Data { seq: 0, segment_index: 0, segment_count: 1, payload: Bytes::from_static(payload) })
}

fn frame(stream: &StreamId, body: Body) -> Message {
    Message::Binary(Frame { stream_id: stream.clone(), body }.encode())
}

/// The executor answers this harness.
async fn assert_lives(harness: &mut Harness) {
    harness.call("fs/getMetadata", json!({ "path": "file:///a" })).await.unwrap();
}

/// The gateway has ended the socket, and says so.
async fn assert_ends(harness: &mut Harness, expected: (u16, &str)) {
    let farewell = harness.farewell().await.expect("a farewell");
    assert_eq!((u16::from(farewell.code), &*farewell.reason), expected);
}

#[track_caller]
fn assert_refused(answer: &Answer, status: u16, text: &str) {
    assert_eq!((answer.status.as_u16(), &answer.body[..]), (status, format!("{text}\n").as_bytes()), "{answer:?}");
}

#[tokio::test]
async fn who_may_not_open_a_socket_is_told_in_the_words_of_the_original() {
    let scene = Scene::start().await;
    let (gateway, path) = (&scene.gateway, scene.door());
    let upgrade = async |caller: &Caller, path: &str| caller.send("GET", path, &HANDSHAKE, "").await;

    assert_refused(&upgrade(&gateway.stranger(), &path).await, 401, "missing Bearer");
    assert_refused(&upgrade(&gateway.stranger(), &format!("{path}?token=")).await, 401, "missing Bearer");
    assert_refused(&upgrade(&scene.bearing(String::new()), &path).await, 401, "missing Bearer");
    assert_eq!(upgrade(&scene.caller, "/bridge/").await.status, 404);
    assert_refused(&upgrade(&scene.bearing("junk".into()), &path).await, 401, "unauthorized");
    let expired = scene.cap_token("turn", -1).await;
    assert_refused(&upgrade(&scene.bearing(expired), &path).await, 401, "token expired");
    let revoked = scene.bearing(scene.cap_token("revoked", 60).await);
    gateway.admin(Request::RevokeTurn { turn: TurnId::new("revoked").unwrap() }).await;
    assert_refused(&upgrade(&revoked, &path).await, 401, "turn revoked");
    let reading =
        Request::TokenCreate { workspace: WorkspaceId::new("w").unwrap(), user: None, ttl: None, read_only: true };
    let Response::Token { token, .. } = gateway.admin(reading).await else { panic!("no token") };
    let reader = scene.bearing(token.expose().to_owned());
    assert_refused(&upgrade(&reader, &path).await, 403, "the token may only read");
    let answer = reader.post(&format!("/cloud/environment/{}/connect", scene.credentials.executor), json!({})).await;
    assert_eq!(answer.status, 403, "{answer:?}");
    let offline = gateway.executor("w", "offline").await;
    let answer = upgrade(&scene.caller, &format!("/bridge/{}", offline.executor)).await;
    assert_refused(&answer, 503, "executor not connected");
}

#[tokio::test]
async fn a_connection_that_asked_for_the_way_to_an_executor_ends_with_any_answer() {
    let scene = Scene::with(|config| config.edge.idle_timeout_secs = 3600).await;
    let offline = scene.gateway.executor("w", "offline").await.executor;
    let foreign = scene.gateway.executor("other", "box").await.executor;
    let good = json!({ "harness_public_key": HarnessKeys::new().public() }).to_string();
    let token = scene.caller.token.as_deref().unwrap();
    for (executor, token, body, status) in [
        (&scene.credentials.executor, token, good.as_str(), 200),
        (&scene.credentials.executor, token, "{}", 400),
        (&scene.credentials.executor, "junk", &good, 401),
        (&foreign, token, &good, 403),
        (&offline, token, &good, 503),
    ] {
        let mut wire = Wire::connect(scene.gateway.address()).await;
        wire.send(&format!(
            "POST /cloud/environment/{executor}/connect HTTP/1.1\r\nhost: gw\r\nauthorization: Bearer {token}\r\n\
             content-length: {}\r\n\r\n{body}",
            body.len()
        ))
        .await;
        let answer = wire.until_closed().await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
        assert!(answer.contains("\r\nconnection: close\r\n"), "{answer}");
    }
}

#[tokio::test]
async fn executors_of_others_answer_as_ones_that_do_not_exist() {
    let scene = Scene::start().await;
    let foreign = scene.gateway.executor("other", "box").await;
    let mut answers = Vec::new();
    for id in [foreign.executor.as_str(), "exe_00000000-0000-4000-8000-000000000000", "a.b"] {
        let mut answer = scene.caller.send("GET", &format!("/bridge/{id}"), &HANDSHAKE, "").await;
        assert_refused(&answer, 403, "exe_id not in workspace");
        answer.headers.remove("x-request-id");
        answer.headers.remove("date");
        answers.push((answer.headers, answer.body));
    }
    assert!(answers.iter().all(|answer| *answer == answers[0]), "{answers:?}");
}

#[tokio::test]
async fn a_right_that_cannot_be_looked_up_is_neither_granted_nor_refused() {
    let scene = Scene::start().await;
    // Nobody has asked for the environments of this workspace before, and its cap-token takes no look at the store.
    let caller = scene.bearing(scene.cap_token("turn", 600).await);
    let store = rusqlite::Connection::open(path_in(scene.gateway.state.path())).unwrap();
    store.execute_batch("ALTER TABLE bindings RENAME TO away").unwrap();
    assert_eq!(dial(&caller, &scene.door()).await.err().unwrap().0, 503);
    store.execute_batch("ALTER TABLE away RENAME TO bindings").unwrap();
    eventually("the right is known again", async || dial(&caller, &scene.door()).await.ok()).await;
}

#[tokio::test]
async fn a_browser_of_any_origin_comes_in_by_its_sub_protocol() {
    let scene = Scene::start().await;
    let offered = format!("bearer.{}", scene.caller.token.as_deref().unwrap());
    let mut headers = HANDSHAKE.to_vec();
    headers.extend([("origin", "https://elsewhere.example"), ("sec-websocket-protocol", offered.as_str())]);
    let answer = scene.gateway.stranger().request("GET", &scene.door(), &headers, "").await.unwrap();
    assert_eq!(answer.status(), 101);
    assert_eq!(answer.headers()["sec-websocket-protocol"], offered);
}

#[tokio::test]
async fn a_harness_that_answers_no_ping_for_too_long_is_gone() {
    let scene = Scene::with(|config| (config.link.ping_secs, config.link.dead_secs) = (1, 2)).await;
    let silent = scene.harnesses(&scene.caller).await;
    let ends = &scene.gateway.gateway.api().metrics.harnesses_ended;
    let mut talking = scene.harness(&scene.caller, Tongue::Frames).await;
    let gone = async {
        eventually("all silent ones are gone", async || {
            (ends.of(["silent"]).get() == silent.len() as u64).then_some(())
        })
        .await;
    };
    let mut gone = std::pin::pin!(gone);
    loop {
        tokio::select! {
            () = &mut gone => break,
            () = assert_lives(&mut talking) => {}
        }
    }
    assert_lives(&mut talking).await;
    assert!(!scene.link.is_ended());
}

#[tokio::test]
async fn an_authorization_opens_for_its_own_executor_registration_and_time_alone() {
    let scene = Scene::start().await;
    let stranger = scene.gateway.stranger();
    let path = scene.way(&scene.caller).await.2;
    let credential = path.split_once("&by=").unwrap().1;
    let keys = scene.gateway.gateway.api().corridor.store.keyring(KeyPurpose::Harness).await.unwrap();
    let authorization = |executor: ExecutorId, registration: &str, exp| {
        let claims = HarnessClaims {
            workspace: WorkspaceId::new("w").unwrap(),
            executor,
            registration: RegistrationId::new(registration).unwrap(),
            key: KeyDigest([0; 32]),
            exp,
        };
        harness_token::mint(&claims, &keys.current.secret)
    };
    let other = ExecutorId::new(&scene.gateway.executor("w", "other").await.executor).unwrap();
    let mine = scene.executor_id();
    for (query, refusal) in [
        (format!("token={}&by={credential}", authorization(mine.clone(), "exr_1", now() - 1)), "token expired"),
        (format!("token={}&by={credential}", authorization(mine, "exr_1", now() + 60)), "unauthorized"),
        (format!("token={}&by={credential}", authorization(other, "exr_1", now() + 60)), "unauthorized"),
        (format!("token=h1.junk.junk&by={credential}"), "unauthorized"),
        (path.split_once('?').unwrap().1.replace(credential, "junk"), "unauthorized"),
        (path.split_once('?').unwrap().1.replace("&by=", "&"), "unauthorized"),
    ] {
        let answer = stranger.send("GET", &format!("{}?{query}", scene.door()), &HANDSHAKE, "").await;
        assert_refused(&answer, 401, refusal);
    }
    // With the credential of somebody who has been given none.
    let theirs = scene.way(&scene.sharer().await).await.2;
    let mixed = path.replace(credential, theirs.split_once("&by=").unwrap().1);
    assert_refused(&stranger.send("GET", &mixed, &HANDSHAKE, "").await, 401, "unauthorized");
    assert!(dial(&stranger, &path).await.is_ok());
}

#[tokio::test]
async fn first_words_that_make_no_harness_end_the_socket() {
    let scene = Scene::with(|config| config.link.first_frame_secs = 1).await;
    let stream = StreamId::new("s").unwrap();
    let binary = |bytes: &'static [u8]| Some(Message::Binary(Bytes::from_static(bytes)));
    for (words, reason) in [
        (None, "first frame read failed"),
        (binary(b""), "malformed first frame"),
        (binary(b"\xff\xfe\xfd"), "malformed first frame"),
        // Version 2, then no version; both with stream `s` and a resume.
        (binary(b"\x08\x02\x12\x01s\x3a\x00"), "malformed first frame"),
        (binary(b"\x12\x01s\x3a\x00"), "malformed first frame"),
        (binary(b"\x08\x01\x3a\x00"), "Resume missing stream_id"),
        (binary(b"\x08\x01\x12\x01s"), "malformed first frame"),
        (Some(frame(&stream, data(b"{}"))), "first frame must be Resume"),
        (Some(frame(&stream, Body::Heartbeat)), "first frame must be Resume"),
        // And then nothing else.
        (Some(frame(&stream, Body::Resume { next_seq: 0 })), "first frame read failed"),
    ] {
        let mut harness = Harness::plain(dial(&scene.caller, &scene.door()).await.unwrap(), Tongue::Frames);
        if let Some(words) = words {
            harness.socket.send(words).await.unwrap();
        }
        assert_ends(&mut harness, (1002, reason)).await;
    }
    assert_eq!(scene.executor.asked("handshake"), 0, "the executor is not bothered");
}

#[tokio::test]
async fn what_is_no_json_is_answered_as_a_local_executor_does() {
    let scene = Scene::start().await;
    for tongue in [Tongue::Json, Tongue::Frames] {
        let mut harness = Harness::open(&scene.caller, &scene.credentials.executor, tongue).await;
        // Before there is a session, and in it.
        for _ in 0..2 {
            for nonsense in ["nonsense", "{", "[]", "{\"id\":null,\"method\":\"m\"}", "7"] {
                harness.say_text(nonsense).await;
                let answer = harness.hear().await.unwrap();
                assert_eq!((&answer["id"], &answer["error"]["code"]), (&json!(-1), &json!(-32600)), "{nonsense}");
            }
            harness.initialize(None).await.unwrap();
        }
        assert_lives(&mut harness).await;
    }
}

#[tokio::test]
async fn an_authorization_for_encrypted_frames_opens_no_plain_conversation() {
    let scene = Scene::start().await;
    let reason = (1002, "the credential is for encrypted frames");
    for tongue in [Tongue::Json, Tongue::Frames] {
        let path = scene.way(&scene.caller).await.2;
        let mut harness = Harness::plain(dial(&scene.gateway.stranger(), &path).await.unwrap(), tongue);
        if tongue == Tongue::Frames {
            harness.send_body(Body::Resume { next_seq: 0 }).await;
        }
        harness.say_text("{\"id\":1,\"method\":\"initialize\",\"params\":{\"clientName\":\"x\"}}").await;
        assert_ends(&mut harness, reason).await;
    }
    assert_eq!(scene.executor.asked("initialize"), 0);
}

#[tokio::test]
async fn frames_that_are_torn_or_of_another_stream_are_for_nobody() {
    let scene = Scene::start().await;
    let sharer = scene.sharer().await;
    let mut victim = scene.harness(&sharer, Tongue::Encrypted).await;
    let mut senders = Vec::new();
    for tongue in [Tongue::Frames, Tongue::Encrypted] {
        let mut harness = scene.harness(&scene.caller, tongue).await;
        let (own, other) = (harness.stream.clone(), victim.stream.clone());
        let reset = || Body::Reset { reason: "mine now".into() };
        for message in [
            Message::Binary(Bytes::from_static(b"\xff\xfe")),
            Message::Binary(Bytes::from_static(b"\x08\x02\x12\x01s\x3a\x00")),
            frame(&other, reset()),
            frame(&other, data(b"junk")),
            frame(&other, junk_handshake()),
            frame(&StreamId::new("nobody's").unwrap(), reset()),
            frame(&own, junk_handshake()),
            frame(&own, Body::Resume { next_seq: 7 }),
            frame(&own, Body::Heartbeat),
            Message::text("frames are binary"),
        ] {
            harness.socket.send(message).await.unwrap();
        }
        assert_lives(&mut harness).await;
        senders.push(harness);
    }
    assert_lives(&mut victim).await;
    assert_eq!((scene.executor.asked("reset"), scene.link.is_ended()), (0, false));
}

#[tokio::test]
async fn a_message_that_is_too_large_ends_its_harness_alone() {
    let scene = Scene::with(|config| config.link.message_bytes_max = config.link.frame_bytes_max).await;
    let mut neighbours = scene.harnesses(&scene.caller).await;
    let large = Message::Binary(vec![b' '; 256 * 1024 + 1].into());
    for mut harness in scene.harnesses(&scene.caller).await {
        harness.socket.send(large.clone()).await.unwrap();
        assert_ends(&mut harness, (1009, "the message is too large")).await;
    }
    for neighbour in &mut neighbours {
        assert_lives(neighbour).await;
    }
    assert!(!scene.link.is_ended());
}

#[tokio::test]
async fn an_encrypted_frame_that_would_end_the_executors_socket_never_gets_there() {
    // Under a credential that also opens plain conversations, whose messages may be larger.
    let scene = Scene::start().await;
    let mut neighbour = scene.harness(&scene.caller, Tongue::Encrypted).await;
    let (keys, way, _) = scene.way(&scene.caller).await;
    let socket = dial(&scene.caller, &scene.door()).await.unwrap();
    let mut harness = Harness::shake_hands(socket, &keys, &way).await.unwrap();
    let payload = vec![0; 256 * 1024].into();
    harness.send_body(Body::Data(Data { seq: 0, segment_index: 0, segment_count: 1, payload })).await;
    assert_ends(&mut harness, (1009, "the message is too large")).await;
    assert_lives(&mut neighbour).await;
    assert!(!scene.link.is_ended());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_million_tiny_frames_pass_while_the_neighbours_are_served() {
    let scene = Scene::start().await;
    for tongue in [Tongue::Frames, Tongue::Encrypted] {
        let mut neighbour = scene.harness(&scene.caller, tongue).await;
        let mut harness = scene.harness(&scene.caller, tongue).await;
        let tiny = frame(&harness.stream, Body::Heartbeat);
        let flood = async {
            for _ in 0..1_000_000 {
                harness.socket.feed(tiny.clone()).await.unwrap();
            }
            assert_lives(&mut harness).await;
        };
        let (mut flood, mut served) = (std::pin::pin!(flood), 0);
        loop {
            tokio::select! {
                () = &mut flood => break,
                () = assert_lives(&mut neighbour) => served += 1,
            }
        }
        assert!(served > 10, "{tongue:?}: {served}");
    }
}

#[tokio::test]
async fn a_stream_id_in_use_is_refused_and_its_holder_goes_on() {
    let scene = Scene::start().await;
    let sharer = scene.sharer().await;
    let mut first = scene.harness(&scene.caller, Tongue::Encrypted).await;
    for caller in [&scene.caller, &sharer] {
        let mut second = Harness::plain(dial(caller, &scene.door()).await.unwrap(), Tongue::Frames);
        second.stream = first.stream.clone();
        second.send_body(Body::Resume { next_seq: 0 }).await;
        second.send_body(junk_handshake()).await;
        assert_ends(&mut second, (1013, "the stream id is taken")).await;
    }
    assert_lives(&mut first).await;
    assert_eq!((scene.executor.asked("handshake"), scene.executor.asked("reset")), (1, 0));
}

#[tokio::test]
async fn a_workspace_whose_handshakes_fail_waits_and_others_shake_hands() {
    let scene = Scene::start().await;
    let sharer = scene.sharer().await;
    for _ in 0..2 {
        let mut broken = scene.begin_broken_handshake(&scene.caller).await.unwrap();
        assert_ends(&mut broken, (1011, "the executor ended the stream")).await;
    }
    let refused = scene.begin_broken_handshake(&scene.caller).await.err().unwrap();
    assert_eq!(refused, (429, "too many encrypted handshakes with this executor have failed\n".into()));
    // Nor under a credential that opens plain conversations too.
    let mut framed = Harness::plain(dial(&scene.caller, &scene.door()).await.unwrap(), Tongue::Frames);
    framed.send_body(junk_handshake()).await;
    assert_ends(&mut framed, (1013, "too many encrypted handshakes with this executor have failed")).await;
    assert_eq!(scene.executor.asked("handshake"), 2);

    assert_lives(&mut scene.harness(&sharer, Tongue::Encrypted).await).await;
    assert_lives(&mut scene.harness(&scene.caller, Tongue::Json).await).await;
}

#[tokio::test]
async fn of_many_broken_handshakes_at_once_few_reach_the_executor() {
    let scene = Scene::start().await;
    let mut broken = Vec::new();
    scene.executor.on("handshake", Reply::Held);
    for _ in 0..10 {
        broken.push(scene.begin_broken_handshake(&scene.caller).await.unwrap());
    }
    eventually("two are under way", async || (scene.executor.asked("handshake") == 2).then_some(())).await;
    scene.executor.on("handshake", Reply::Usual);
    scene.executor.release();
    for harness in &mut broken {
        harness.farewell().await.expect("a farewell");
    }
    // Executors lock everybody out at the eighth.
    assert!(scene.executor.asked("handshake") <= 3, "{}", scene.executor.asked("handshake"));
}

#[tokio::test]
async fn a_handshake_that_fails_after_its_harness_has_left_counts() {
    let scene = Scene::start().await;
    scene.executor.on("handshake", Reply::Held);
    for handshakes in 1..=2 {
        let broken = scene.begin_broken_handshake(&scene.caller).await.unwrap();
        let asked = async || (scene.executor.asked("handshake") == handshakes).then_some(());
        eventually("the executor has the handshake", asked).await;
        drop(broken);
        scene.all_have_left().await;
    }
    scene.executor.release();
    eventually("the workspace has to wait", async || {
        let path = scene.way(&scene.caller).await.2;
        dial(&scene.gateway.stranger(), &path).await.is_err_and(|(status, _)| status == 429).then_some(())
    })
    .await;
}

#[tokio::test]
async fn the_executor_is_told_when_a_harness_leaves() {
    // Who leaves with a farewell is not waited for, and the others this long.
    let scene = Scene::with(|config| config.link.comeback_wait_secs = 600).await;
    for (left, tongue) in (1..).zip(TONGUES) {
        let mut harness = scene.harness(&scene.caller, tongue).await;
        harness.socket.close(None).await.unwrap();
        eventually("the stream is reset", async || (scene.executor.asked("reset") == left).then_some(())).await;
    }
}

/// Breaks the harness's socket without a farewell.
async fn cut(harness: &mut Harness) {
    use tokio::io::AsyncWriteExt;
    harness.socket.get_mut().shutdown().await.unwrap();
}

const UNRESUMABLE: (u16, &str) = (1013, "the stream cannot be resumed");

async fn assert_unresumable(came_back: Result<(), Farewell>) {
    let farewell = came_back.expect_err("it has no way back").expect("a farewell");
    assert_eq!((u16::from(farewell.code), &*farewell.reason), UNRESUMABLE);
}

#[tokio::test]
async fn a_stream_that_waits_is_taken_up_by_its_own_harness_alone() {
    let scene = Scene::with(|config| config.link.comeback_wait_secs = 600).await;
    let (sharer, colleague) = (scene.sharer().await, scene.gateway.caller("w").await);
    for tongue in [Tongue::Frames, Tongue::Encrypted] {
        let mut harness = scene.harness(&scene.caller, tongue).await;
        cut(&mut harness).await;
        let stranger = scene.gateway.stranger();
        let others = [
            // Another workspace, another credential of its own, and with either another harness's key.
            (sharer.clone(), scene.door()),
            (colleague.clone(), scene.door()),
            (stranger.clone(), scene.way(&sharer).await.2),
            (stranger.clone(), scene.way(&colleague).await.2),
            (stranger, scene.way(&scene.caller).await.2),
        ];
        for (caller, path) in &others {
            assert_unresumable(harness.come_back_as(caller, path).await).await;
        }
        // Its own credential opens no other stream.
        let stream = std::mem::replace(&mut harness.stream, StreamId::new("other").unwrap());
        assert_unresumable(harness.come_back().await).await;
        harness.stream = stream;
        harness.come_back().await.unwrap();
        assert_lives(&mut harness).await;
    }
    assert_eq!(scene.executor.asked("reset"), 0);
}

#[tokio::test]
async fn a_harness_that_comes_back_before_its_socket_is_known_to_be_dead_takes_its_stream_along() {
    let scene = Scene::start().await;
    for tongue in [Tongue::Frames, Tongue::Encrypted] {
        let mut harness = scene.harness(&scene.caller, tongue).await;
        let (caller, path) = harness.way.clone().unwrap();
        let former = std::mem::replace(&mut harness.socket, dial(&caller, &path).await.unwrap());
        harness.come_back().await.unwrap();
        assert_lives(&mut harness).await;
        let mut former = Harness::plain(former, Tongue::Frames);
        assert!(former.farewell().await.is_none(), "it is closed");
    }
    assert_eq!(scene.executor.asked("reset"), 0);
}

#[tokio::test]
async fn a_harness_that_does_not_come_back_in_time_is_told_that_its_stream_has_ended() {
    let scene = Scene::with(|config| config.link.comeback_wait_secs = 1).await;
    for (ended, tongue) in (1..).zip([Tongue::Frames, Tongue::Encrypted]) {
        let mut harness = scene.harness(&scene.caller, tongue).await;
        cut(&mut harness).await;
        eventually("the stream is reset", async || (scene.executor.asked("reset") == ended).then_some(())).await;
        assert_unresumable(harness.come_back().await).await;
    }
}

#[tokio::test]
async fn a_harness_that_lacks_more_than_is_kept_is_told_that_its_stream_has_ended() {
    let scene = Scene::with(|config| config.link.comeback_bytes_max = 0).await;
    for (ended, tongue) in (1..).zip([Tongue::Frames, Tongue::Encrypted]) {
        let mut harness = scene.harness(&scene.caller, tongue).await;
        harness.say(&json!({ "id": 7, "method": "fs/getMetadata", "params": { "path": "file:///a" } })).await;
        // Not heard: it was written to the socket that breaks now.
        harness.socket.next().await.unwrap().unwrap();
        cut(&mut harness).await;
        assert_unresumable(harness.come_back().await).await;
        eventually("the stream is reset", async || (scene.executor.asked("reset") == ended).then_some(())).await;
    }
}

#[tokio::test]
async fn an_encrypted_harness_that_begins_anew_lets_its_former_stream_go() {
    // Its executor session is attached to that stream; stock harnesses resume the session on a new one.
    let scene = Scene::with(|config| config.link.comeback_wait_secs = 600).await;
    let (keys, way, path) = scene.way(&scene.caller).await;
    let open = async || {
        let socket = dial(&scene.gateway.stranger(), &path).await.unwrap();
        let mut harness = Harness::shake_hands(socket, &keys, &way).await.unwrap();
        harness.initialize(None).await.unwrap();
        harness
    };
    let mut former = open().await;
    cut(&mut former).await;
    let mut harness = open().await;
    eventually("the former stream is reset", async || (scene.executor.asked("reset") == 1).then_some(())).await;
    assert_lives(&mut harness).await;
    let caller = scene.gateway.stranger();
    assert_unresumable(former.come_back_as(&caller, &path).await).await;
}

#[tokio::test]
async fn the_right_to_a_stream_ends_while_it_waits() {
    let scene = Scene::with(|config| config.link.comeback_wait_secs = 600).await;
    let (leaver, id) = scene.gateway.caller_and_token("w").await;
    for tongue in [Tongue::Frames, Tongue::Encrypted] {
        cut(&mut scene.harness(&leaver, tongue).await).await;
    }
    assert_eq!(scene.executor.asked("reset"), 0);
    scene.gateway.admin(Request::TokenRevoke { id }).await;
    eventually("both streams are reset", async || (scene.executor.asked("reset") == 2).then_some(())).await;
    scene.all_have_left().await;
}

#[tokio::test]
async fn streams_that_wait_leave_half_of_the_places_to_others() {
    let scene = Scene::with(|config| {
        config.link.comeback_wait_secs = 600;
        config.link.workspace_streams_max = 4;
    })
    .await;
    for _ in 0..6 {
        cut(&mut scene.harness(&scene.caller, Tongue::Frames).await).await;
    }
    eventually("the others were reset", async || (scene.executor.asked("reset") == 4).then_some(())).await;
    assert_lives(&mut scene.harness(&scene.caller, Tongue::Encrypted).await).await;
}

#[tokio::test]
async fn a_harness_is_told_when_its_executor_ends_the_stream() {
    let scene = Scene::start().await;
    let mut neighbours = scene.harnesses(&scene.caller).await;
    let mut harnesses = scene.harnesses(&scene.caller).await;
    scene.executor.on("process/read", Reply::Reset);
    for harness in &mut harnesses {
        harness.say(&json!({ "id": 7, "method": "process/read", "params": {} })).await;
        assert_ends(harness, (1011, "the executor ended the stream")).await;
    }
    for neighbour in &mut neighbours {
        assert_lives(neighbour).await;
    }
}

#[tokio::test]
async fn a_harness_is_told_when_its_executor_is_gone() {
    let scene = Scene::start().await;
    let mut harnesses = scene.harnesses(&scene.caller).await;
    scene.executor.on("process/read", Reply::Hangup);
    harnesses[0].say(&json!({ "id": 7, "method": "process/read", "params": {} })).await;
    for harness in &mut harnesses {
        assert_ends(harness, (1013, "the executor is gone")).await;
    }
}

#[tokio::test]
async fn what_the_executor_said_before_it_ended_the_stream_arrives() {
    const FRAMES: usize = 2_000;
    let scene = Scene::start().await;
    let mut harness = scene.harness(&scene.caller, Tongue::Encrypted).await;
    let said = vec![7; 2048].into();
    let said = Body::Data(Data { seq: 1, segment_index: 0, segment_count: 1, payload: said });
    scene.link.flood(frame(&harness.stream, said.clone()), FRAMES);
    scene.link.send(frame(&harness.stream, Body::Reset { reason: "enough".into() }));
    for _ in 0..FRAMES {
        let wire = harness.word().await.expect("it is not cut short");
        assert_eq!(Frame::decode(wire).unwrap().body, said);
    }
    assert!(matches!(Frame::decode(harness.word().await.unwrap()).unwrap().body, Body::Reset { .. }));
    assert_ends(&mut harness, (1011, "the executor ended the stream")).await;
}

#[tokio::test]
async fn an_executor_has_no_more_requests_at_once_than_it_bears() {
    let scene = Scene::start().await;
    for tongue in [Tongue::Json, Tongue::Frames] {
        let mut harness = scene.harness(&scene.caller, tongue).await;
        let before = scene.executor.asked("fs/open");
        scene.executor.on("fs/open", Reply::Held);
        for id in 1000..1500 {
            harness.say(&json!({ "id": id, "method": "fs/open", "params": { "handleId": "h" } })).await;
        }
        let asked = || scene.executor.asked("fs/open") - before;
        eventually("it has as many as it bears", async || (asked() >= 64).then_some(())).await;
        // Whatever was read by now was handed on before this neighbour's request.
        assert_lives(&mut scene.harness(&scene.caller, tongue).await).await;
        assert_eq!(asked(), 64);
        scene.executor.release();
        for _ in 0..500 {
            assert!(harness.hear().await.unwrap().get("result").is_some());
        }
    }
}

/// Lets `end` take a right away under which harnesses of each kind are served: they end at once, and those of the
/// others go on.
async fn right_ends(scene: &Scene, leaver: &Caller, others: &[&Caller], end: impl AsyncFnOnce()) {
    let mut left = scene.harnesses(leaver).await;
    let mut staying = Vec::new();
    for other in others {
        staying.extend(scene.harnesses(other).await);
    }
    end().await;
    for harness in &mut left {
        assert_ends(harness, ENDED).await;
    }
    for harness in &mut staying {
        assert_lives(harness).await;
    }
}

#[tokio::test]
async fn unbinding_ends_the_harnesses_of_that_workspace() {
    let scene = Scene::start().await;
    let sharer = scene.sharer().await;
    let workspace = WorkspaceId::new("w").unwrap();
    right_ends(&scene, &scene.caller, &[&sharer], async || {
        scene.gateway.admin(Request::ExecutorUnbind { executor: scene.executor_id(), workspace }).await;
    })
    .await;
    assert_eq!(dial(&scene.caller, &scene.door()).await.err().unwrap().0, 403);
}

#[tokio::test]
async fn revoking_a_token_ends_its_harnesses() {
    let scene = Scene::start().await;
    let sharer = scene.sharer().await;
    let (leaver, id) = scene.gateway.caller_and_token("w").await;
    right_ends(&scene, &leaver, &[&scene.caller, &sharer], async || {
        scene.gateway.admin(Request::TokenRevoke { id }).await;
    })
    .await;
    assert_eq!(dial(&leaver, &scene.door()).await.err().unwrap().0, 401);
}

#[tokio::test]
async fn revoking_a_turn_ends_its_harnesses() {
    let scene = Scene::start().await;
    let sharer = scene.sharer().await;
    let leaver = scene.bearing(scene.cap_token("over", 600).await);
    let other = scene.bearing(scene.cap_token("going", 600).await);
    right_ends(&scene, &leaver, &[&scene.caller, &other, &sharer], async || {
        scene.gateway.admin(Request::RevokeTurn { turn: TurnId::new("over").unwrap() }).await;
    })
    .await;
    assert_eq!(dial(&leaver, &scene.door()).await.err().unwrap().0, 401);
}

#[tokio::test]
async fn revoking_a_workspace_ends_its_harnesses() {
    let scene = Scene::start().await;
    let sharer = scene.sharer().await;
    let leaver = scene.bearing(scene.cap_token("turn", 600).await);
    right_ends(&scene, &leaver, &[&sharer], async || {
        scene.gateway.admin(Request::RevokeWorkspace { workspace: WorkspaceId::new("w").unwrap() }).await;
    })
    .await;
    assert_eq!(dial(&leaver, &scene.door()).await.err().unwrap().0, 401);
}

#[tokio::test]
async fn a_harness_ends_with_its_credential() {
    let scene = Scene::start().await;
    let leaver = scene.bearing(scene.cap_token("turn", 5).await);
    right_ends(&scene, &leaver, &[&scene.caller], async || {}).await;
    let refused = eventually("its last second is over", async || dial(&leaver, &scene.door()).await.err()).await;
    assert_eq!(refused, (401, "token expired\n".into()));
}

#[tokio::test]
async fn deleting_an_executor_ends_its_harnesses() {
    let scene = Scene::start().await;
    let mut harnesses = scene.harnesses(&scene.caller).await;
    scene.gateway.admin(Request::ExecutorDelete { executor: scene.executor_id() }).await;
    for harness in &mut harnesses {
        assert!(harness.farewell().await.is_some());
    }
    assert_eq!(dial(&scene.caller, &scene.door()).await.err().unwrap().0, 403);
}

#[tokio::test]
async fn what_was_revoked_stays_so_after_a_restart() {
    let scene = Scene::start().await;
    let door = scene.door();
    let (leaver, id) = scene.gateway.caller_and_token("w").await;
    let turn = scene.bearing(scene.cap_token("over", 600).await);
    let way = scene.way(&leaver).await.2;
    scene.gateway.admin(Request::TokenRevoke { id }).await;
    scene.gateway.admin(Request::RevokeTurn { turn: TurnId::new("over").unwrap() }).await;
    let state = scene.gateway.state.clone();
    drop(scene);

    let gateway = TestGateway::on(state, |_| {}).await;
    let again = |caller: &Caller| Caller::new(gateway.address(), caller.token.clone());
    assert_eq!(dial(&again(&leaver), &door).await.err().unwrap(), (401, "unauthorized\n".into()));
    assert_eq!(dial(&again(&turn), &door).await.err().unwrap(), (401, "turn revoked\n".into()));
    assert_eq!(dial(&gateway.stranger(), &way).await.err().unwrap(), (401, "unauthorized\n".into()));
}

#[tokio::test]
async fn a_workspace_that_was_revoked_stays_so_after_a_restart_and_its_later_cap_tokens_open() {
    let scene = Scene::start().await;
    let (door, workspace) = (scene.door(), WorkspaceId::new("w").unwrap());
    let revoked = [scene.cap_token("one", 600).await, scene.cap_token("another", 600).await];
    let way = scene.way(&scene.bearing(revoked[0].clone())).await.2;
    scene.gateway.admin(Request::RevokeWorkspace { workspace: workspace.clone() }).await;
    let state = scene.gateway.state.clone();
    drop(scene);

    let gateway = TestGateway::on(state, |_| {}).await;
    let bearing = |token: String| Caller::new(gateway.address(), Some(token));
    for token in revoked {
        assert_eq!(dial(&bearing(token), &door).await.err().unwrap(), (401, "turn revoked\n".into()));
    }
    assert_eq!(dial(&gateway.stranger(), &way).await.err().unwrap(), (401, "turn revoked\n".into()));
    // Both times are in seconds: one of the same second may be from before.
    let ttl = Duration::from_secs(600);
    let answer = eventually("a later one opens", async || {
        let mint = Request::CapToken { workspace: workspace.clone(), turn: None, user: None, ttl };
        let Response::CapToken { token } = gateway.admin(mint).await else { panic!("no cap-token") };
        dial(&bearing(token.expose().to_owned()), &door).await.err().filter(|(status, _)| *status != 401)
    })
    .await;
    assert_eq!(answer, (503, "executor not connected\n".into()), "it has the right, and nobody is there");
}
