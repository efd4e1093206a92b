//! Metrics: what `/metrics` prints is the table and nothing else, and every metric is seen to move by a scenario.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use exec_gateway::admin::Request;
use exec_gateway::config::{Config, Secret};
use exec_gateway::gateway::Gateway;
use exec_gateway::ops::metrics::{Kind, Metric, TABLE, Values};
use exec_gateway::protocol::frame::{Body, Data, Frame};
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_util::task::AbortOnDropHandle;

use crate::audit::{SMALL_DISK, limit_files};
use crate::registration::StoreAway;
use crate::support::gateway::workspace;
use crate::support::harness::{HarnessKeys, connect, dial};
use crate::support::{
    Caller, CodexExecutor, DaemonProcess, FakeExecutor, Harness, MIB, Marker, Mcp, Pieces, Proxy, Reply, Scratch,
    TestGateway, Tongue, Upstream, Workbench, eventually,
};
use crate::tls::self_signed;

/// Every series of one scrape: name and labels without the prefix → value.
struct Page(BTreeMap<String, f64>);

impl Page {
    async fn of(ops: SocketAddr) -> Self {
        let answer = Caller::new(ops, None).send("GET", "/metrics", &[], "").await;
        assert_eq!(answer.status, 200);
        let text = String::from_utf8(answer.body.to_vec()).unwrap();
        assert!(text.ends_with("# EOF\n"));
        assert_eq!(undocumented(&text), Vec::<String>::new());
        let samples = text.lines().filter(|line| !line.starts_with('#'));
        let sample = |line: &str| {
            let (series, value) = line.rsplit_once(' ').unwrap();
            (series.trim_start_matches("exec_gateway_").to_owned(), value.parse().unwrap())
        };
        Self(samples.map(sample).collect())
    }

    fn get(&self, series: &str) -> f64 {
        self.0.get(series).copied().unwrap_or(0.0)
    }
}

/// What a page has that the table does not say, and the other way round.
fn undocumented(page: &str) -> Vec<String> {
    let mut faults = Vec::new();
    let described: Vec<&str> = page.lines().filter_map(|line| line.strip_prefix("# HELP ")).collect();
    let expected: Vec<String> =
        TABLE.iter().map(|metric| format!("{} {}", metric.name().trim_end_matches("_total"), metric.help())).collect();
    if described != expected {
        faults.push(format!("{described:#?}\ninstead of\n{expected:#?}"));
    }
    let mut rows = TABLE.iter();
    let mut row = None;
    for line in page.lines() {
        if line.starts_with("# HELP") {
            row = rows.next();
        } else if !line.starts_with('#') && row.is_none_or(|row| !documents(row, line)) {
            faults.push(line.to_owned());
            break;
        }
    }
    faults
}

/// Whether a sample has the name of the row, and its labels in their order with values that it allows.
fn documents(row: &Metric, sample: &str) -> bool {
    let (series, _) = sample.rsplit_once(' ').unwrap();
    let (name, labels) =
        series.split_once('{').map_or((series, ""), |(name, labels)| (name, labels.trim_end_matches('}')));
    let mut labels: Vec<(&str, &str)> = labels
        .split(',')
        .filter(|label| !label.is_empty())
        .map(|label| label.split_once('=').unwrap())
        .map(|(name, value)| (name, value.trim_matches('"')))
        .collect();
    let endings: &[&str] = if row.kind == Kind::Histogram { &["_sum", "_count", "_bucket"] } else { &[""] };
    if name.ends_with("_bucket") {
        let bounds = labels.len();
        labels.retain(|(name, _)| *name != "le");
        if labels.len() + 1 != bounds {
            return false;
        }
    }
    let allowed = |values: Values, value: &str| match values {
        Values::Words(words) => words.contains(&value),
        // A word of the program: nothing that a caller has chosen.
        Values::Rule(_) => {
            value.len() < 40 && value.chars().all(|char| matches!(char, 'a'..='z' | '0'..='9' | '_' | '.'))
        }
    };
    endings.iter().any(|ending| name == format!("{}{ending}", row.name()))
        && labels.len() == row.labels.len()
        && labels
            .iter()
            .zip(row.labels)
            .all(|((name, value), label)| *name == label.name && allowed(label.values, value))
}

/// Which series of a scenario have moved so far.
struct Watch {
    ops: SocketAddr,
    before: Page,
    due: BTreeSet<&'static str>,
}

impl Watch {
    async fn start(ops: SocketAddr, due: &[&'static str]) -> Self {
        Self { ops, before: Page::of(ops).await, due: due.iter().copied().collect() }
    }

    /// Looks once; levels are seen while they last.
    async fn look(&mut self) -> Page {
        let now = Page::of(self.ops).await;
        self.due.retain(|series| now.get(series) == self.before.get(series));
        now
    }

    /// Looks until all of these have moved.
    async fn sees(&mut self, series: &[&str]) {
        eventually(&format!("{series:?} move"), async || {
            self.look().await;
            (!series.iter().any(|series| self.due.contains(series))).then_some(())
        })
        .await;
    }

    /// Looks until nothing of the scenario is due.
    async fn sees_all(mut self) {
        let due: Vec<&str> = self.due.iter().copied().collect();
        self.sees(&due).await;
    }
}

/// A test for each, and the list of all that they see move.
macro_rules! scenarios {
    ($(async fn $name:ident($due:ident) sees [$($series:expr),+ $(,)?] $body:block)+) => {
        $(
            #[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                let $due: &[&'static str] = &[$($series),+];
                $body
            }
        )+

        const SEEN: &[&str] = &[$($($series),+),+];
    };
}

/// A metric without a scenario is one that nobody has seen at work.
#[test]
fn every_metric_of_the_table_is_seen_to_move() {
    let seen: BTreeSet<String> = SEEN
        .iter()
        .map(|series| series.split('{').next().unwrap())
        .map(|name| name.trim_end_matches("_count").trim_end_matches("_sum").to_owned())
        .collect();
    let names: BTreeSet<String> =
        TABLE.iter().map(|metric| metric.name().trim_start_matches("exec_gateway_").to_owned()).collect();
    let differing: Vec<&String> = seen.symmetric_difference(&names).collect();
    assert!(differing.is_empty(), "{differing:?}");
}

scenarios! {

async fn a_call_by_each_door(due) sees [
    r#"calls_total{tool="shell",outcome="ok"}"#, r#"calls_total{tool="shell",outcome="env_not_found"}"#,
    r#"call_duration_seconds_count{tool="shell"}"#, r#"request_duration_seconds_count{door="rest"}"#,
    r#"request_duration_seconds_count{door="mcp"}"#, r#"request_duration_seconds_count{door="files"}"#,
    r#"request_phase_duration_seconds_count{door="rest",phase="auth"}"#,
    r#"request_phase_duration_seconds_sum{door="rest",phase="executor"}"#,
    r#"mcp_messages_total{method="initialize"}"#, r#"mcp_messages_total{method="tools/call"}"#,
    r#"http_requests_total{route="tool_call",status="2xx"}"#, r#"http_requests_total{route="none",status="4xx"}"#,
    r#"connections_accepted_total{listener="api"}"#, r#"connections{listener="api"}"#,
    r#"registrations_total{outcome="ok"}"#, r#"links{transport="noise"}"#, r#"links_opened_total{transport="noise"}"#,
    "link_received_frames_total", "link_sent_frames_total", "link_received_bytes_total", "link_sent_bytes_total",
    r#"streams{kind="call"}"#, r#"streams_opened_total{kind="call"}"#, "workspaces", "workspaces_built_total",
    "token_misses_total", "token_hits_total", r#"token_entries{verdict="good"}"#, "audit_records_total", "audit_bytes",
    "store_questions_total", "store_wait_seconds_total", "store_work_seconds_total", "tasks",
] {
    let gateway = TestGateway::start().await;
    let watch = Watch::start(gateway.gateway.ops(), due).await;
    let caller = gateway.caller("w").await;
    let credentials = gateway.executor("w", "box").await;
    let _executor = CodexExecutor::connected(&gateway.url(), &credentials, &caller, "box").await;
    caller.shell("box", json!({ "command": "true" })).await;
    caller.tool("nowhere", "shell", json!({ "command": "true" })).await;
    caller.send("GET", "/nowhere", &[], "").await;
    caller.send("PUT", "/api/connectors/envs/box/files?path=a.txt", &[], "text").await;
    let mcp = Mcp::connect(&caller).await;
    mcp.call("shell", json!({ "command": "true" })).await;
    watch.sees_all().await;
}

async fn a_call_under_way(due) sees ["calls_open"] {
    let bench = Workbench::start().await;
    let ops = bench.gateway.gateway.ops();
    let go = bench.file("go");
    let command = format!("while [ ! -e {} ]; do sleep 0.02; done", go.display());
    let watch = Watch::start(ops, due).await;
    let call = AbortOnDropHandle::new(tokio::spawn({
        let caller = bench.caller.clone();
        async move { caller.shell("box", json!({ "command": command })).await }
    }));
    watch.sees_all().await;
    std::fs::write(go, "").unwrap();
    call.await.unwrap();
    eventually("it is over", async || (Page::of(ops).await.get("calls_open") == 0.0).then_some(())).await;
}

async fn a_process_session_that_is_followed(due) sees [
    r#"sessions{state="running"}"#, "sessions_started_total", r#"sessions_ended_total{state="exited"}"#,
    "session_output_bytes_total", r#"session_journal_bytes{place="disk"}"#, r#"session_journal_bytes{place="memory"}"#,
    r#"session_followers{door="events"}"#, r#"streams_opened_total{kind="session"}"#,
    r#"streams_ended_total{reason="closed"}"#,
] {
    let bench = Workbench::start().await;
    let mut watch = Watch::start(bench.gateway.gateway.ops(), due).await;
    let started = bench.caller.result("box", "exec_command", json!({ "command": "echo out; read line" })).await;
    let session = started["structuredContent"]["session_id"].as_str().unwrap().to_owned();
    let path = format!("/api/connectors/processes/{session}/output");
    let events = bench.caller.request("GET", &path, &[("accept", "text/event-stream")], "").await.unwrap();
    let running = [r#"sessions{state="running"}"#, r#"session_followers{door="events"}"#, "session_output_bytes_total"];
    watch.sees(&running).await;
    drop(events);
    let ended = bench.caller.post(&format!("/api/connectors/processes/{session}/terminate"), json!({})).await;
    assert_eq!(ended.status, 200, "{ended:?}");
    watch.sees_all().await;
}

async fn output_without_room(due) sees [
    r#"session_lost_bytes_total{quota="session"}"#, r#"session_lost_bytes_total{quota="shared"}"#,
    "sessions_given_way_total",
] {
    let bench = Workbench::with(|config| {
        config.session.spill_bytes_max = MIB as u64;
        config.session.workspace_spill_bytes_max = MIB as u64;
    })
    .await;
    let watch = Watch::start(bench.gateway.gateway.ops(), due).await;
    for _ in 0..2 {
        let command = format!("head -c {} /dev/zero", 3 * MIB);
        bench.caller.result("box", "exec_command", json!({ "command": command })).await;
    }
    watch.sees_all().await;
}

async fn harnesses_that_come_back_and_leave(due) sees [
    r#"harnesses{kind="plain"}"#, r#"harnesses{kind="encrypted"}"#, r#"harnesses_ended_total{outcome="peer"}"#,
    "harness_comebacks_total", r#"streams_opened_total{kind="plain_harness"}"#,
    r#"streams_opened_total{kind="encrypted_harness"}"#,
] {
    let bench = Workbench::start().await;
    let proxy = Proxy::to(bench.gateway.address()).await;
    let caller = Caller::new(proxy.address, bench.caller.token.clone());
    let mut watch = Watch::start(bench.gateway.gateway.ops(), due).await;
    let (mut plain, _) = Harness::initialized(&caller, &bench.credentials.executor, Tongue::Frames).await;
    let (mut encrypted, _) = Harness::initialized(&caller, &bench.credentials.executor, Tongue::Encrypted).await;
    watch.look().await;
    proxy.cut();
    eventually("it is back", async || plain.come_back().await.ok()).await;
    eventually("it is back", async || encrypted.come_back().await.ok()).await;
    for harness in [&mut plain, &mut encrypted] {
        harness.send_body(Body::Reset { reason: "done".into() }).await;
    }
    watch.sees_all().await;
}

async fn a_harness_that_does_not_read(due) sees [
    "spilled_bytes_total", "spill_overruns_total", r#"spill_held_bytes{place="memory"}"#,
    r#"spill_held_bytes{place="disk"}"#, r#"harnesses_ended_total{outcome="overrun"}"#, "spill_waits_total",
] {
    let bench = Workbench::with(|config| config.link.spill_bytes_max = 4 * MIB as u64).await;
    let ops = bench.gateway.gateway.ops();
    let go = bench.file("go");
    let mut watch = Watch::start(ops, due).await;
    let (mut stopped, _) = Harness::initialized(&bench.caller, &bench.credentials.executor, Tongue::Json).await;
    // More than the buffers of the kernel and the memory for it, and less than there is room for in all.
    let command = format!("yes | head -c {}; while [ ! -e {} ]; do sleep 0.02; done; yes", 7 * MIB, go.display());
    stopped.start("p1", &command).await;
    watch.sees(&[r#"spill_held_bytes{place="disk"}"#, r#"spill_held_bytes{place="memory"}"#]).await;
    std::fs::write(go, "").unwrap();
    // It is waited for while it is in nobody's way.
    watch.sees(&["spill_waits_total"]).await;
    bench.shell(json!({ "command": "true" })).await;
    watch.sees_all().await;
    drop(stopped);
    eventually("nothing is held for it", async || {
        let page = Page::of(ops).await;
        let held = |place: &str| page.get(&format!("spill_held_bytes{{place=\"{place}\"}}"));
        (held("memory") == 0.0 && held("disk") == 0.0).then_some(())
    })
    .await;
}

async fn an_executor_that_misbehaves(due) sees [
    "frames_dropped_total", r#"handshakes_failed_total{by="client"}"#, r#"streams_ended_total{reason="reset"}"#,
    r#"links_ended_total{outcome="peer"}"#, r#"registrations_total{outcome="unauthorized"}"#,
] {
    let gateway = TestGateway::start().await;
    let credentials = gateway.executor("w", "box").await;
    let (executor, link) = FakeExecutor::connected(&gateway, &credentials).await;
    let watch = Watch::start(gateway.gateway.ops(), due).await;
    link.send(Message::text("no frame"));
    executor.on("handshake", Reply::Reset);
    gateway.caller("w").await.tool("box", "shell", json!({ "command": "true" })).await;
    drop(link);
    executor.shows("egx_wrong");
    executor.register().await;
    watch.sees_all().await;
}

async fn an_encrypted_harness_that_is_refused(due) sees [r#"handshakes_failed_total{by="harness"}"#] {
    let gateway = TestGateway::start().await;
    let credentials = gateway.executor("w", "box").await;
    let (executor, _link) = FakeExecutor::connected(&gateway, &credentials).await;
    let watch = Watch::start(gateway.gateway.ops(), due).await;
    executor.on("handshake", Reply::Reset);
    let caller = gateway.caller("w").await;
    let keys = HarnessKeys::new();
    let way = connect(&caller, &credentials.executor, &keys).await;
    let path = format!("/bridge/{}", way.url.split_once("/bridge/").unwrap().1);
    let socket = dial(&Caller::new(gateway.address(), None), &path).await.unwrap();
    assert!(Harness::shake_hands(socket, &keys, &way).await.is_err());
    watch.sees_all().await;
}

async fn a_stream_whose_reader_does_not_read(due) sees [
    "stream_inbox_frames", "stream_inbox_frames_max", "streams_overrun_total",
    r#"streams_ended_total{reason="overrun"}"#,
] {
    let gateway = TestGateway::with(|config| config.link.write_timeout_secs = 1).await;
    let credentials = gateway.executor("w", "box").await;
    let (_executor, link) = FakeExecutor::connected(&gateway, &credentials).await;
    let mut watch = Watch::start(gateway.gateway.ops(), due).await;
    let api = gateway.gateway.api();
    let caller = gateway.caller("w").await;
    let principal = api.corridor.auth.principal(caller.token.as_deref().unwrap()).await.unwrap();
    let workspace = api.workspaces.get(&principal);
    let binding = workspace.environment("box").await.unwrap();
    let mut unread = workspace.open_stream(&principal, &binding).await.unwrap();
    let frame = |seq| {
        let data = Data { seq, segment_index: 0, segment_count: 1, payload: Bytes::from_static(b"{}") };
        Message::Binary(Frame { stream_id: unread.id().clone(), body: Body::Data(data) }.encode())
    };
    link.flood(frame(0), 10);
    watch.sees(&["stream_inbox_frames", "stream_inbox_frames_max"]).await;
    link.flood(frame(1), 1000);
    watch.sees(&["streams_overrun_total"]).await;
    while unread.receive().await.is_ok() {}
    drop(unread);
    watch.sees_all().await;
}

async fn an_executor_that_does_not_read(due) sees ["link_outbox_frames", "link_outbox_frames_max"] {
    let gateway = TestGateway::start().await;
    let credentials = gateway.executor("w", "box").await;
    let (_executor, link) = FakeExecutor::connected(&gateway, &credentials).await;
    let caller = gateway.caller("w").await;
    let watch = Watch::start(gateway.gateway.ops(), due).await;
    let (mut harness, _) = Harness::initialized(&caller, &credentials.executor, Tongue::Json).await;
    link.silence();
    // More than the buffers of the kernel take.
    let _talking = AbortOnDropHandle::new(tokio::spawn(async move {
        let message = json!({ "method": "process/note", "params": "x".repeat(MIB) });
        loop {
            harness.say(&message).await;
        }
    }));
    watch.sees_all().await;
}

async fn a_validator_that_fails(due) sees [
    "token_negative_hits_total", "token_stale_total", r#"token_entries{verdict="refused"}"#,
    r#"token_evictions_total{verdict="good"}"#, "upstream_requests_total", "upstream_failures_total",
    r#"upstream_duration_seconds_count{outcome="answered"}"#, r#"upstream_duration_seconds_count{outcome="failed"}"#,
] {
    let mut upstream = Upstream::start().await;
    let gateway = TestGateway::with(|config| {
        upstream.configure(config);
        config.auth.positive_ttl_secs = 1;
        config.auth.positive_entries_max = 1;
    })
    .await;
    let watch = Watch::start(gateway.gateway.ops(), due).await;
    let list = async |token: &str| {
        let caller = Caller::new(gateway.address(), Some(token.into()));
        caller.post("/api/connectors/envs/list", json!({})).await.status.as_u16()
    };
    assert_eq!((list("bad").await, list("bad").await), (401, 401));
    for nth in 0..40 {
        let token = format!("good-{nth}");
        upstream.knows_token(&token, "w");
        assert_eq!(list(&token).await, 200);
    }
    upstream.go_away().await;
    eventually("it is served stale", async || {
        list("good-39").await;
        (Page::of(watch.ops).await.get("token_stale_total") > 0.0).then_some(())
    })
    .await;
    watch.sees_all().await;
}

async fn rights_that_are_taken_away(due) sees [
    r#"revocations_total{right="token"}"#, r#"revocations_total{right="executor"}"#,
    r#"revocations_total{right="workspace"}"#, r#"streams_ended_total{reason="withdrawn"}"#,
] {
    let bench = Workbench::start().await;
    let gateway = &bench.gateway;
    let watch = Watch::start(gateway.gateway.ops(), due).await;
    let _harness = Harness::initialized(&bench.caller, &bench.credentials.executor, Tongue::Json).await;
    let (_, token) = gateway.caller_and_token("w").await;
    gateway.admin(Request::TokenRevoke { id: token }).await;
    gateway.admin(Request::RevokeWorkspace { workspace: "w".parse().unwrap() }).await;
    gateway.admin(Request::ExecutorDelete { executor: bench.credentials.executor.parse().unwrap() }).await;
    watch.sees_all().await;
}

async fn a_second_workspace_where_there_is_room_for_one(due) sees ["workspaces_evicted_total"] {
    let gateway = TestGateway::with(|config| config.workspace.entries_max = 1).await;
    let watch = Watch::start(gateway.gateway.ops(), due).await;
    for workspace in ["one", "two"] {
        gateway.caller(workspace).await.environments().await;
    }
    watch.sees_all().await;
}

async fn a_transfer(due) sees ["transfers", r#"transfers_ended_total{outcome="ok"}"#, "transferred_bytes_total"] {
    let gateway = TestGateway::with(|config| config.auth.shared_secret = Some(Secret::new("service".into()))).await;
    let service = Caller::new(gateway.address(), Some("service".into()));
    let (from, to) = (gateway.executor("w", "from").await.executor, gateway.executor("w", "to").await.executor);
    let mut watch = Watch::start(gateway.gateway.ops(), due).await;
    let order = json!({ "workspace_id": "w", "source_exe_id": from, "dest_exe_id": to });
    let made = service.post("/api/exec-gateway/relay/create", order).await;
    let ticket = made.json()["ticket"].as_str().unwrap().to_owned();
    watch.sees(&["transfers"]).await;
    let (path, bearer) = (format!("/relay/{ticket}"), format!("Bearer {ticket}"));
    let headers = [("authorization", bearer.as_str())];
    let put = Pieces::send(gateway.address(), "PUT", &path, &headers, Some(5)).await;
    put.piece("hello").await.unwrap();
    put.end().await;
    let got = gateway.stranger().send("GET", &path, &headers, "").await;
    assert_eq!(got.body, "hello");
    assert_eq!(put.answer().await.unwrap().status, 200);
    watch.sees_all().await;
}

async fn an_audit_log_on_a_full_disk(due) sees [
    "audit_missing_total", "audit_refused_total", "audit_failing", "audit_waiting",
] {
    let state = Scratch::new();
    let daemon = DaemonProcess::start_on_small_disk(&state, &[]).await;
    let (caller, credentials) = workspace(&state, &daemon).await;
    let executor = CodexExecutor::connected(&format!("http://{}", daemon.address), &credentials, &caller, "box").await;
    let watch = Watch::start(daemon.ops, due).await;
    // Its end is told while the disk takes nothing, and is held back.
    let marker = Marker::new();
    let long = AbortOnDropHandle::new(tokio::spawn({
        let (caller, command) = (caller.clone(), format!("sleep {marker}"));
        async move { caller.tool("box", "shell", json!({ "command": command })).await }
    }));
    marker.is_on(1).await;
    limit_files(&daemon, Some(SMALL_DISK));
    eventually("the disk is full", async || {
        let answer = caller.tool("box", "stat", json!({ "path": "x".repeat(4000) })).await;
        (answer.status == 503).then_some(())
    })
    .await;
    drop(marker);
    long.await.unwrap();
    // Whoever takes a right away is not held up, and that is counted.
    DaemonProcess::operate(&state, &["revoke", "--turn", "t1"]).await;
    watch.sees_all().await;
    drop(executor);
}

async fn a_store_that_is_held_by_another_process(due) sees ["store_waiting", "store_failures_total"] {
    let gateway = TestGateway::start().await;
    let watch = Watch::start(gateway.gateway.ops(), due).await;
    let away = StoreAway::take(&gateway);
    let caller = Caller::new(gateway.gateway.ops(), None);
    let askers = (0..20).map(|_| {
        let caller = caller.clone();
        AbortOnDropHandle::new(tokio::spawn(async move {
            while caller.send("GET", "/readyz", &[], "").await.status == 503 {}
        }))
    });
    let _askers: Vec<_> = askers.collect();
    watch.sees_all().await;
    away.give_back();
}

async fn a_client_without_tls_at_a_listener_with_it(due) sees [r#"tls_handshakes_failed_total{listener="api"}"#] {
    let scratch = Scratch::new();
    let (certificate, key) = self_signed(&scratch);
    let gateway = TestGateway::with(|config| {
        config.tls.certificate = Some(certificate);
        config.tls.key = Some(key);
    })
    .await;
    let watch = Watch::start(gateway.gateway.ops(), due).await;
    let mut socket = TcpStream::connect(gateway.address()).await.unwrap();
    socket.write_all(b"GET /healthz HTTP/1.1\r\n\r\n").await.unwrap();
    watch.sees_all().await;
}

async fn more_connections_than_file_descriptors(due) sees [
    r#"accept_failures_total{listener="api"}"#, "process_max_fds",
] {
    let state = Scratch::new();
    let daemon = DaemonProcess::start(&state, "127.0.0.1:0".parse().unwrap(), &[]).await;
    let watch = Watch::start(daemon.ops, due).await;
    let pid = Pid::from_raw(daemon.pid().try_into().unwrap()).unwrap();
    let limits = Rlimit { current: Some(48), maximum: getrlimit(Resource::Nofile).maximum };
    prlimit(Some(pid), Resource::Nofile, limits).unwrap();
    for _ in 0..3 {
        let sockets: Vec<_> = futures_util::future::join_all((0..64).map(|_| TcpStream::connect(daemon.address))).await;
        drop(sockets);
    }
    watch.sees_all().await;
}

async fn a_process_at_work(due) sees [
    concat!("build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"}"), "process_cpu_seconds_total", "process_resident_memory_bytes",
    "process_virtual_memory_bytes", "process_threads", "process_open_fds", "process_start_time_seconds",
] {
    let state = Scratch::new();
    let daemon = DaemonProcess::start(&state, "127.0.0.1:0".parse().unwrap(), &[]).await;
    // What never changes is compared with nothing: before the first scrape it was not there.
    let mut watch = Watch { ops: daemon.ops, before: Page(BTreeMap::new()), due: due.iter().copied().collect() };
    let page = watch.look().await;
    let (started, now) = (page.get("process_start_time_seconds"), SystemTime::now());
    let age = now.duration_since(UNIX_EPOCH).unwrap().as_secs_f64() - started;
    assert!(age.abs() < 3600.0, "{started}");
    let of_system = |file: &str| Path::new("/proc").join(daemon.pid().to_string()).join(file);
    let threads = std::fs::read_dir(of_system("task")).unwrap().count() as f64;
    assert!((page.get("process_threads") - threads).abs() < 20.0, "{threads}");
    let resident = page.get("process_resident_memory_bytes");
    assert!(resident > 1e6 && resident < page.get("process_virtual_memory_bytes"), "{resident}");

    watch.before = page;
    watch.due.extend(["process_open_fds", "process_cpu_seconds_total"]);
    let mut sockets = Vec::new();
    for _ in 0..50 {
        sockets.push(TcpStream::connect(daemon.address).await.unwrap());
    }
    let caller = Caller::new(daemon.address, None);
    eventually("its work and its sockets are seen", async || {
        for _ in 0..100 {
            caller.send("GET", "/healthz", &[], "").await;
        }
        watch.look().await;
        watch.due.is_empty().then_some(())
    })
    .await;
}

async fn a_gateway_that_stops(due) sees ["draining"] {
    let bench = Workbench::start().await;
    let marker = Marker::new();
    let Workbench { caller, executor, gateway, .. } = bench;
    let watch = Watch::start(gateway.gateway.ops(), due).await;
    let call = AbortOnDropHandle::new(tokio::spawn({
        let command = format!("sleep {marker}");
        async move { caller.tool("box", "shell", json!({ "command": command })).await }
    }));
    marker.is_on(1).await;
    let stopping = AbortOnDropHandle::new(tokio::spawn(gateway.gateway.run_until(std::future::ready(()))));
    watch.sees_all().await;
    drop(marker);
    call.await.unwrap();
    stopping.await.unwrap();
    drop(executor);
}

async fn limits_that_are_met_and_changed(due) sees [
    r#"reloads_total{outcome="done"}"#, r#"reloads_total{outcome="refused"}"#, "rate_limited_total",
    r#"shed_total{cause="bodies"}"#, r#"shed_total{cause="watermark"}"#, "memory_high", "memory_limit_bytes",
    "body_memory_bytes",
] {
    let gateway = TestGateway::with(|config| {
        (config.edge.body_bytes_max, config.memory.bodies_bytes_max) = (1000, 1000);
        config.memory.limit_bytes = 1 << 40;
    })
    .await;
    let caller = gateway.caller("w").await;
    let call = async || caller.tool("box", "shell", json!({ "command": "true" })).await.status.as_u16();
    let mut watch = Watch::start(gateway.gateway.ops(), due).await;
    let held = gateway.gateway.api().memory.hold();
    held.grow(1000).unwrap();
    assert_eq!(call().await, 503);
    watch.sees(&["body_memory_bytes"]).await;
    drop(held);
    // More than this is taken by any process.
    gateway.reload(|config| config.memory.limit_bytes = MIB).unwrap();
    watch.sees(&["memory_high"]).await;
    assert_eq!(call().await, 503);
    gateway.reload(|config| config.auth.upstream_url = Some("nobody".into())).unwrap_err();
    gateway
        .reload(|config| (config.workspace.calls_per_second_max, config.workspace.calls_burst_max) = (1, 1))
        .unwrap();
    eventually("it is told to slow down", async || (call().await == 429).then_some(())).await;
    watch.sees_all().await;
}

async fn a_fault_of_the_program(due) sees ["panics_total"] {
    // No configuration file can have this: an interval of nothing panics.
    let state = Arc::new(Scratch::new());
    let mut config = Config { state_dir: Some(state.path().to_owned()), ..Config::default() };
    config.listen = vec!["127.0.0.1:0".parse().unwrap()];
    config.ops_listen = "127.0.0.1:0".parse().unwrap();
    config.tools.keepalive_after_secs = 0;
    config.tools.keepalive_secs = 0;
    let gateway = TestGateway { gateway: Gateway::start(config).await.unwrap(), state };
    let watch = Watch::start(gateway.gateway.ops(), due).await;
    let credentials = gateway.executor("w", "box").await;
    let (executor, _link) = FakeExecutor::connected(&gateway, &credentials).await;
    executor.on("process/start", Reply::Never);
    let answer = gateway.caller("w").await.tool("box", "shell", json!({ "command": "true" })).await;
    assert_eq!(answer.status, 500);
    watch.sees_all().await;
}

}
