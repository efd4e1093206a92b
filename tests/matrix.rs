//! Every kind of executor with every kind of harness: each pair either works, alone and beside another workspace that
//! uses the same names, or says that it cannot.

use bytes::Bytes;
use exec_gateway::admin::Request;
use exec_gateway::protocol::frame::{Body, Data};
use exec_gateway::protocol::ids::{EnvironmentName, ExecutorId, WorkspaceId};
use futures_util::future::join_all;
use serde_json::json;

use crate::flavours::{Executor, Flavour};
use crate::harness::TONGUES;
use crate::support::harness::{HarnessKeys, dial};
use crate::support::{Caller, Credentials, Harness, TestGateway, Tongue, eventually};

const EXECUTORS: [Flavour; 4] = [Flavour::Encrypted, Flavour::Direct, Flavour::Agentx, Flavour::Relay];

/// An executor of one kind that two workspaces may reach.
struct Row {
    flavour: Flavour,
    ours: Caller,
    theirs: Caller,
    credentials: Credentials,
    executor: Executor,
    _gateway: TestGateway,
}

impl Row {
    async fn start(flavour: Flavour) -> Self {
        let gateway = TestGateway::start().await;
        let (ours, theirs) = (gateway.caller("ours").await, gateway.caller("theirs").await);
        let credentials = gateway.executor("ours", "box").await;
        let (workspace, name) = (WorkspaceId::new("theirs").unwrap(), EnvironmentName::new("box").unwrap());
        let id = ExecutorId::new(&credentials.executor).unwrap();
        gateway.admin(Request::ExecutorBind { executor: id, workspace, name, default: false }).await;
        let executor = Executor::start(flavour, gateway.address(), &credentials).await;
        executor.process().seen_by(&ours, "box").await;
        Self { flavour, ours, theirs, credentials, executor, _gateway: gateway }
    }

    /// The harnesses that can speak with it.
    fn tongues(&self) -> impl Iterator<Item = Tongue> {
        let encrypted = self.flavour == Flavour::Encrypted;
        TONGUES.into_iter().filter(move |tongue| encrypted || *tongue != Tongue::Encrypted)
    }

    async fn harness(&self, caller: &Caller, tongue: Tongue) -> (Harness, String) {
        Harness::initialized(caller, &self.credentials.executor, tongue).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_harness_works_with_every_executor() {
    join_all(EXECUTORS.map(async |flavour| {
        let row = Row::start(flavour).await;
        let home = row.executor.process().home();
        std::fs::write(home.join("note"), "written before").unwrap();
        let result = row.ours.shell("box", json!({ "command": "echo hello; cat note; exit 3" })).await;
        assert_eq!((&result["stdout"], &result["exit_code"]), (&json!("hello\nwritten before"), &json!(3)));

        for tongue in row.tongues() {
            let cell = (flavour, tongue);
            let (mut first, session) = row.harness(&row.ours, tongue).await;
            first.start("p1", "echo ready; read line; echo got $line; exit 3").await;
            first.write("p1", "hello\n").await;
            assert_eq!(first.finished("p1").await, (b"ready\ngot hello\n".to_vec(), 3), "{cell:?}");
            let path = format!("file://{}/note", home.display());
            let read = first.call("fs/readFile", json!({ "path": path })).await.unwrap();
            assert_eq!(read["dataBase64"], "d3JpdHRlbiBiZWZvcmU=", "{cell:?}");
            let refused = first.call("fs/readFile", json!({ "path": "file:///nope" })).await.unwrap_err();
            assert_eq!(refused["code"], -32004, "{cell:?}");

            for id in [json!("a text"), json!(""), json!(-7), json!(i64::MAX)] {
                first.say(&json!({ "id": id, "method": "fs/getMetadata", "params": { "path": "file:///" } })).await;
                assert_eq!(first.hear().await.unwrap()["id"], id, "{cell:?}");
            }

            first.start("p2", "read line; echo got $line").await;
            drop(first);
            let second = eventually("the executor has given up the former stream", async || {
                let mut second = Harness::open(&row.ours, &row.credentials.executor, tongue).await;
                let resumed = second.initialize(Some(&session)).await.ok()?;
                assert_eq!(resumed, session, "{cell:?}");
                Some(second)
            });
            let mut second = second.await;
            second.write("p2", "more\n").await;
            assert_eq!(second.finished("p2").await, (b"got more\n".to_vec(), 0), "{cell:?}");
        }
    }))
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_a_harness_sends_in_segments_is_one() {
    let row = Row::start(Flavour::Encrypted).await;
    let mut harness = Harness::open(&row.ours, &row.credentials.executor, Tongue::Frames).await;
    let message = json!({ "id": 1, "method": "initialize", "params": { "clientName": "in pieces" } }).to_string();
    let pieces: Vec<_> = message.as_bytes().chunks(20).map(Bytes::copy_from_slice).collect();
    for (index, payload) in (0..).zip(&pieces) {
        let (segment_count, payload) = (pieces.len() as u32, payload.clone());
        harness.send_body(Body::Data(Data { seq: index, segment_index: index, segment_count, payload })).await;
    }
    let answer = harness.hear().await.unwrap();
    assert!(answer["result"]["sessionId"].is_string(), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_encrypted_harness_is_told_that_its_executor_is_not() {
    join_all(EXECUTORS.into_iter().filter(|flavour| *flavour != Flavour::Encrypted).map(async |flavour| {
        let row = Row::start(flavour).await;
        let path = format!("/cloud/environment/{}/connect", row.credentials.executor);
        let answer = row.ours.post(&path, json!({ "harness_public_key": HarnessKeys::new().public() })).await;
        assert_eq!((answer.status.as_u16(), answer.code().as_str()), (409, "not_encrypted"), "{flavour:?}");

        let door = format!("/bridge/{}", row.credentials.executor);
        let mut harness = Harness::plain(dial(&row.ours, &door).await.unwrap(), Tongue::Frames);
        harness.send_body(Body::Resume { next_seq: 0 }).await;
        harness.send_body(Body::Handshake { payload: vec![7; 3600].into() }).await;
        let farewell = harness.farewell().await.expect("a farewell");
        let told = (u16::from(farewell.code), farewell.reason.as_str());
        assert_eq!(told, (1002, "this executor is connected without encryption"), "{flavour:?}");

        // The executor has noticed nothing.
        let (mut harness, _) = row.harness(&row.ours, Tongue::Json).await;
        assert_eq!(harness.run("p1", "echo on").await, ("on\n".into(), 0), "{flavour:?}");
    }))
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn equal_names_of_two_workspaces_on_one_executor_never_meet() {
    join_all(EXECUTORS.map(async |flavour| {
        let row = Row::start(flavour).await;
        for our_tongue in row.tongues() {
            for their_tongue in row.tongues() {
                let cell = (flavour, our_tongue, their_tongue);
                let (mut ours, our_session) = row.harness(&row.ours, our_tongue).await;
                let (mut theirs, their_session) = row.harness(&row.theirs, their_tongue).await;
                assert_ne!(our_session, their_session, "{cell:?}");
                for (harness, word) in [(&mut ours, "ours"), (&mut theirs, "theirs")] {
                    harness.start("p1", &format!("echo {word}; read line; echo $line; exit ${{#line}}")).await;
                }

                let mut thief = Harness::open(&row.theirs, &row.credentials.executor, their_tongue).await;
                assert!(thief.initialize(Some(&our_session)).await.is_err(), "{cell:?}");

                ours.write("p1", "a\n").await;
                assert_eq!(ours.finished("p1").await, (b"ours\na\n".to_vec(), 1), "{cell:?}");
                let read = json!({ "processId": "p1", "afterSeq": 0, "maxBytes": 1024, "waitMs": 0 });
                let theirs_now = theirs.call("process/read", read).await.unwrap();
                assert_eq!(theirs_now["exited"], false, "{cell:?}");
                theirs.write("p1", "bc\n").await;
                assert_eq!(theirs.finished("p1").await, (b"theirs\nbc\n".to_vec(), 2), "{cell:?}");
            }
        }
    }))
    .await;
}
