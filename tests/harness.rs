//! Harnesses of every kind on the bridge, with the real executor behind it.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use exec_gateway::admin::Request;
use exec_gateway::config::Config;
use exec_gateway::protocol::ids::{EnvironmentName, ExecutorId, WorkspaceId};
use serde_json::json;
use tokio::time::sleep;

use crate::support::{Caller, Harness, MIB, Proxy, Tongue, Workbench, eventually};

pub const TONGUES: [Tongue; 3] = [Tongue::Json, Tongue::Frames, Tongue::Encrypted];

#[tokio::test(flavor = "multi_thread")]
async fn a_plain_harness_resumes_its_session_on_another_socket() {
    let bench = Workbench::start().await;
    let executor = &bench.credentials.executor;
    for tongue in [Tongue::Json, Tongue::Frames] {
        let (mut first, session) = Harness::initialized(&bench.caller, executor, tongue).await;
        let go = bench.file(&format!("go-{tongue:?}"));
        let command = format!("echo one; while [ ! -e {} ]; do sleep 0.02; done; echo two", go.display());
        first.start("p1", &command).await;
        // The first socket still lives: its harness may be gone without a word.
        let mut second = Harness::open(&bench.caller, executor, tongue).await;
        // Under the name that it asked for: a stock harness takes no other.
        assert_eq!(second.initialize(Some(&session)).await.unwrap(), session, "{tongue:?}");
        std::fs::write(&go, "").unwrap();
        let (printed, code) = second.finished("p1").await;
        assert!(String::from_utf8(printed).unwrap().ends_with("two\n"));
        assert_eq!(code, 0);
        assert_eq!(&*first.farewell().await.unwrap().reason, "resumed on another socket");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_harness_whose_socket_is_cut_goes_on_with_its_stream_and_nothing_is_lost_or_doubled() {
    let bench = Workbench::start().await;
    let proxy = Proxy::to(bench.gateway.address()).await;
    let caller = Caller::new(proxy.address, bench.caller.token.clone());
    for tongue in [Tongue::Frames, Tongue::Encrypted] {
        let (mut harness, _) = Harness::initialized(&caller, &bench.credentials.executor, tongue).await;
        let printed = bench.file(&format!("printed-{tongue:?}"));
        let command = format!("seq 100000; while read line; do echo got $line; done; touch {}", printed.display());
        harness.start("p1", &command).await;
        let (mut events, mut answered, mut asked) = (BTreeMap::new(), HashSet::new(), 0);
        // Some of what either side says is under way whenever the socket is cut.
        while answered.len() < 60 {
            if asked < 60 {
                asked += 1;
                let write = json!({ "processId": "p1", "chunk": STANDARD.encode(format!("{asked}\n")),
                    "writeId": asked.to_string() });
                harness.say(&json!({ "id": 1000 + asked, "method": "process/write", "params": write })).await;
            }
            if asked % 12 == 6 {
                proxy.cut();
            }
            match harness.hear().await {
                Ok(message) => match message["id"].as_i64() {
                    Some(id) => assert!(answered.insert(id), "{tongue:?}: answered twice: {message}"),
                    None => {
                        let params = &message["params"];
                        let bytes = STANDARD.decode(params["chunk"].as_str().unwrap()).unwrap();
                        assert!(
                            events.insert(params["seq"].as_u64().unwrap(), bytes).is_none(),
                            "{tongue:?}: {message}"
                        );
                    }
                },
                Err(_) => eventually("it is back", async || harness.come_back().await.ok()).await,
            }
        }
        let lines: String =
            (1..=100_000).map(|n| format!("{n}\n")).chain((1..=60).map(|n| format!("got {n}\n"))).collect();
        while events.values().map(Vec::len).sum::<usize>() < lines.len() {
            let message = harness.hear().await.unwrap();
            let params = &message["params"];
            let bytes = STANDARD.decode(params["chunk"].as_str().unwrap()).unwrap();
            assert!(events.insert(params["seq"].as_u64().unwrap(), bytes).is_none(), "{tongue:?}: {message}");
        }
        assert!(events.keys().copied().eq(1..=events.len() as u64), "{tongue:?}");
        assert!(events.into_values().flatten().eq(lines.bytes()), "{tongue:?}");
    }
    assert!(proxy.cuts() >= 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_harness_that_reads_later_gets_all_of_it_and_its_neighbours_wait_for_nothing() {
    let bench = Workbench::start().await;
    let executor = &bench.credentials.executor;
    for tongue in TONGUES {
        let (mut late, _) = Harness::initialized(&bench.caller, executor, tongue).await;
        let printed = bench.file(&format!("printed-{tongue:?}"));
        let command = format!("head -c {} /dev/zero | tr '\\0' x; touch {}", 24 * MIB, printed.display());
        // An executor that has much to say may end its socket when somebody shakes hands.
        let (mut neighbour, _) = Harness::initialized(&bench.caller, executor, tongue).await;
        late.start("p1", &command).await;
        // The executor would not get rid of the output if the gateway did not take it.
        eventually("all of it is printed", async || printed.exists().then_some(())).await;
        assert_eq!(neighbour.run("p1", "echo quick").await.0, "quick\n");
        let (bytes, code) = late.finished("p1").await;
        assert!(bytes.len() == 24 * MIB && bytes.iter().all(|byte| *byte == b'x') && code == 0, "{tongue:?}");
    }
}

/// A bench where little is put aside for a harness that reads slowly.
async fn narrow_bench(change: impl FnOnce(&mut Config)) -> Workbench {
    Workbench::with(|config| {
        (config.link.spill_memory_bytes_max, config.link.spill_bytes_max) = (MIB / 4, MIB as u64);
        change(config);
    })
    .await
}

/// Waits until a link is read more slowly for a harness.
async fn is_waited_for(bench: &Workbench) {
    let waits = &bench.gateway.gateway.api().metrics.spill_waits;
    let before = waits.get();
    eventually("a harness is waited for", async || (waits.get() > before).then_some(())).await;
}

fn print(mebibytes: usize) -> String {
    format!("head -c {} /dev/zero | tr '\\0' x", mebibytes * MIB)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_harness_that_is_alone_on_its_link_gets_all_of_it() {
    // Neither is taken for dead, though the pings of both stand behind what is not read yet.
    let bench = narrow_bench(|config| (config.link.ping_secs, config.link.dead_secs) = (1, 2)).await;
    let metrics = &bench.gateway.gateway.api().metrics;
    for (tongue, mebibytes) in TONGUES.into_iter().zip([68, 24, 24]) {
        let (mut slow, _) = Harness::initialized(&bench.caller, &bench.credentials.executor, tongue).await;
        slow.start("p1", &print(mebibytes)).await;
        is_waited_for(&bench).await;
        let (mut read, mut closed) = (0, false);
        while !closed {
            // Its own pace, and longer than what is taken for death.
            if read % (mebibytes * MIB / 64) < 8192 {
                sleep(Duration::from_millis(60)).await;
            }
            let message = slow.hear().await.unwrap();
            if let Some(chunk) = message["params"]["chunk"].as_str() {
                let bytes = STANDARD.decode(chunk).unwrap();
                assert!(bytes.iter().all(|byte| *byte == b'x'));
                read += bytes.len();
            }
            closed = message["method"] == "process/closed";
        }
        assert_eq!(read, mebibytes * MIB, "{tongue:?}");
    }
    assert_eq!(metrics.spill_overruns.get(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_harness_is_waited_for_until_an_idle_neighbour_asks_for_something() {
    let bench = narrow_bench(|_| {}).await;
    for tongue in TONGUES {
        let (mut neighbour, _) = Harness::initialized(&bench.caller, &bench.credentials.executor, tongue).await;
        assert_eq!(neighbour.run("p1", "echo first").await.0, "first\n");
        let (mut slow, _) = Harness::initialized(&bench.caller, &bench.credentials.executor, tongue).await;
        slow.start("p1", "yes").await;
        is_waited_for(&bench).await;
        assert_eq!(neighbour.run("p2", "echo second").await.0, "second\n", "{tongue:?}");
        let farewell = slow.farewell().await;
        assert_eq!(&*farewell.expect("a farewell").reason, "the harness reads too slowly", "{tongue:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_harness_that_never_reads_is_left_behind_alone() {
    let bench = narrow_bench(|_| {}).await;
    let metrics = &bench.gateway.gateway.api().metrics;
    for tongue in TONGUES {
        let (mut stopped, _) = Harness::initialized(&bench.caller, &bench.credentials.executor, tongue).await;
        let (mut neighbour, _) = Harness::initialized(&bench.caller, &bench.credentials.executor, tongue).await;
        stopped.start("p1", "yes").await;
        let before = metrics.spill_overruns.get();
        for nth in 0.. {
            assert_eq!(neighbour.run(&format!("p{nth}"), "echo quick").await.0, "quick\n");
            if metrics.spill_overruns.get() > before {
                break;
            }
        }
        assert_eq!(neighbour.run("last", "echo quick").await.0, "quick\n");
        let farewell = stopped.farewell().await;
        assert_eq!(&*farewell.expect("a farewell").reason, "the harness reads too slowly", "{tongue:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_harness_that_never_reads_and_is_alone_has_the_time_of_a_write() {
    let bench = narrow_bench(|config| {
        (config.link.ping_secs, config.link.dead_secs, config.link.comeback_wait_secs) = (1, 2, 0);
    })
    .await;
    let metrics = &bench.gateway.gateway.api().metrics;
    let silent = metrics.harnesses_ended.of(["silent"]).clone();
    for (nth, tongue) in (1..).zip(TONGUES) {
        let (mut stopped, _) = Harness::initialized(&bench.caller, &bench.credentials.executor, tongue).await;
        stopped.start("p1", "yes").await;
        is_waited_for(&bench).await;
        eventually("it is gone", async || (silent.get() == nth).then_some(())).await;
        let (mut next, _) = Harness::initialized(&bench.caller, &bench.credentials.executor, tongue).await;
        assert_eq!(next.run("p1", "echo quick").await.0, "quick\n", "{tongue:?}: the link is still there");
    }
    assert_eq!(metrics.spill_overruns.get(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plain_harness_that_asks_five_hundred_things_at_once_is_answered_each() {
    // An executor that had them all at once would give up the stream.
    let bench = Workbench::start().await;
    for tongue in [Tongue::Json, Tongue::Frames] {
        let (mut harness, _) = Harness::initialized(&bench.caller, &bench.credentials.executor, tongue).await;
        let asked: HashSet<i64> = (1000..1500).collect();
        for id in &asked {
            harness.say(&json!({ "id": id, "method": "fs/getMetadata", "params": { "path": "file:///" } })).await;
        }
        let mut answered = HashSet::new();
        while answered.len() < asked.len() {
            let answer = harness.hear().await.unwrap();
            assert_eq!(answer["result"]["isDirectory"], true, "{tongue:?}: {answer}");
            assert!(answered.insert(answer["id"].as_i64().unwrap()), "{tongue:?}: answered twice: {answer}");
        }
        assert_eq!(answered, asked);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn workspaces_on_one_executor_see_nothing_of_each_other() {
    let bench = Workbench::start().await;
    let id = &bench.credentials.executor;
    let (workspace, name) = (WorkspaceId::new("other").unwrap(), EnvironmentName::new("shared").unwrap());
    let executor = ExecutorId::new(id).unwrap();
    bench.gateway.admin(Request::ExecutorBind { executor, workspace, name, default: false }).await;
    let other = bench.gateway.caller("other").await;
    for tongue in TONGUES {
        let (mut ours, session) = Harness::initialized(&bench.caller, id, tongue).await;
        let (mut theirs, _) = Harness::initialized(&other, id, tongue).await;
        let go = bench.file(&format!("go-{tongue:?}"));
        let command = |who: &str| format!("echo {who}; while [ ! -e {} ]; do sleep 0.02; done", go.display());
        ours.start("ours", &command("ours")).await;
        theirs.start("theirs", &command("theirs")).await;

        let read = json!({ "processId": "ours", "afterSeq": 0, "maxBytes": 1024, "waitMs": 0 });
        assert!(theirs.call("process/read", read.clone()).await.is_err(), "{tongue:?}");
        let end = json!({ "processId": "ours" });
        assert_eq!(theirs.call("process/terminate", end).await.unwrap()["running"], false, "{tongue:?}");
        assert_eq!(ours.call("process/read", read).await.unwrap()["exited"], false, "{tongue:?}");
        if tongue != Tongue::Encrypted {
            let mut thief = Harness::open(&other, id, tongue).await;
            let refused = thief.initialize(Some(&session)).await.unwrap_err();
            assert_eq!(refused["message"], format!("unknown session id {session}"), "{tongue:?}");
            // The socket is good for another try, and who has the session keeps it.
            thief.initialize(None).await.unwrap();
        }

        std::fs::write(&go, "").unwrap();
        // Both would fail on a notification about another's process.
        assert_eq!(ours.finished("ours").await, (b"ours\n".to_vec(), 0), "{tongue:?}");
        assert_eq!(theirs.finished("theirs").await, (b"theirs\n".to_vec(), 0), "{tongue:?}");
    }
}
