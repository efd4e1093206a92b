//! Tool calls whose executor's link is lost and comes back: nobody but the gateway knows.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_util::future::join_all;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::support::{
    Answer, Caller, CodexExecutor, FakeExecutor, FakeLink, MIB, Marker, Proxy, Reply, TestGateway, eventually, noise,
};

/// A gateway, a caller, and a real executor under the name `box` behind a link that can be cut.
struct Line {
    caller: Caller,
    proxy: Proxy,
    executor: CodexExecutor,
    gateway: TestGateway,
}

impl Line {
    async fn start() -> Self {
        Self::with(|_| {}).await
    }

    async fn with(change: impl FnOnce(&mut exec_gateway::config::Config)) -> Self {
        let gateway = TestGateway::with(change).await;
        let caller = gateway.caller("w").await;
        let credentials = gateway.executor("w", "box").await;
        let proxy = Proxy::to(gateway.address()).await;
        let url = format!("http://{}", proxy.address);
        let executor = CodexExecutor::connected(&url, &credentials, &caller, "box").await;
        Self { caller, proxy, executor, gateway }
    }

    fn file(&self, name: &str) -> std::path::PathBuf {
        self.executor.home().join(name)
    }

    /// Waits until there is a file of that name, with so many lines at least.
    async fn has(&self, name: &str, lines: usize) {
        let path = self.file(name);
        eventually(&format!("{name} has {lines} lines"), async || {
            let text = std::fs::read_to_string(&path).ok()?;
            (text.lines().count() >= lines).then_some(())
        })
        .await;
    }

    /// Begins a call.
    fn call(&self, tool: &'static str, arguments: Value) -> JoinHandle<Answer> {
        let caller = self.caller.clone();
        tokio::spawn(async move { caller.tool("box", tool, arguments).await })
    }

    /// Lets the executor come back: its processes, of which so many were left to it, are ended then and not before.
    async fn ends_when_it_is_back(&self, marker: &Marker, processes: usize) {
        self.is_cut().await;
        let endings = &self.gateway.gateway.api().corridor.endings;
        eventually("the process is followed", async || (endings.len() == 1).then_some(())).await;
        assert_eq!(marker.processes().len(), processes);
        self.proxy.open();
        // The executor itself would end them 80 s after the cut, which is longer than anything here is waited for.
        marker.is_on(0).await;
        eventually("nothing is left to do", async || endings.is_empty().then_some(())).await;
    }

    /// Waits until the gateway has noticed that the link is gone.
    async fn is_cut(&self) {
        let registry = &self.gateway.gateway.api().corridor.registry;
        eventually("the link is gone", async || registry.is_empty().then_some(())).await;
    }
}

async fn result(call: JoinHandle<Answer>) -> Value {
    let answer = call.await.unwrap();
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()["structuredContent"].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_whose_link_is_cut_twice_runs_once_and_its_output_is_exact() {
    let line = Line::start().await;
    let command = "echo x >> starts; for i in $(seq 1 200); do echo $i; echo e$i >&2; echo $i >> printed; \
                   sleep 0.02; done; exit 7";
    let call = line.call("shell", json!({ "command": command }));
    line.has("printed", 20).await;
    line.proxy.cut();
    line.has("printed", 150).await;
    line.proxy.cut();

    let result = result(call).await;
    let lines = |prefix: &str| (1..=200).map(|i| format!("{prefix}{i}\n")).collect::<String>();
    assert_eq!(result["stdout"], lines(""));
    assert_eq!(result["stderr"], lines("e"));
    assert_eq!((&result["exit_code"], &result["lost_chunks"]), (&json!(7), &Value::Null));
    line.has("starts", 1).await;
    assert_eq!(std::fs::read_to_string(line.file("starts")).unwrap(), "x\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_command_that_ends_while_the_link_is_away_is_told_as_ever() {
    let line = Line::start().await;
    let command = "echo begun > begun; while [ ! -e go ]; do sleep 0.02; done; echo over > over; exit 3";
    let call = line.call("shell", json!({ "command": command }));
    line.has("begun", 1).await;
    line.proxy.shut();
    line.is_cut().await;
    std::fs::write(line.file("go"), "").unwrap();
    line.has("over", 1).await;
    line.proxy.open();

    let result = result(call).await;
    assert_eq!(
        (&result["exit_code"], &result["stdout"], &result["lost_chunks"]),
        (&json!(3), &json!(""), &Value::Null)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_executor_cannot_keep_while_its_link_is_away_is_named_exactly() {
    let line = Line::start().await;
    // Pieces of which the executor makes one chunk each.
    let (piece, pieces) = (8192, 512);
    let bytes = noise(11, pieces * piece);
    std::fs::write(line.file("block"), &bytes).unwrap();
    let command = "exec 2>/dev/null; echo begun > begun; while [ ! -e go ]; do sleep 0.02; done; \
                   dd if=block bs=8192; echo over > over; exit 4";
    let call = line.call("shell", json!({ "command": command }));
    line.has("begun", 1).await;
    line.proxy.shut();
    line.is_cut().await;
    std::fs::write(line.file("go"), "").unwrap();
    line.has("over", 1).await;
    line.proxy.open();

    let answer = call.await.unwrap().json();
    let result = &answer["structuredContent"];
    let kept = STANDARD.decode(result["stdout_b64"].as_str().unwrap()).unwrap();
    assert!(kept.len() >= MIB - piece && bytes.ends_with(&kept), "{} bytes", kept.len());
    assert_eq!(result["lost_chunks"], (bytes.len() - kept.len()) / piece);
    assert_eq!(result["exit_code"], 4);
    let text = answer["content"][0]["text"].as_str().unwrap();
    assert!(text.ends_with(&format!(
        "[{} chunks of output lost while the executor was away]\n[exit_code=4]",
        result["lost_chunks"]
    )));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_whose_link_is_cut_in_the_middle_is_read_exactly() {
    let line = Line::start().await;
    let bytes = noise(12, 30 * MIB);
    std::fs::write(line.file("large"), &bytes).unwrap();
    line.proxy.cut_after(10 * MIB);
    let answer = line.call("read_file", json!({ "path": "large" })).await.unwrap();
    assert_eq!(answer.status, 200, "{}", answer.code());
    let read = STANDARD.decode(answer.json()["content"][0]["text"].as_str().unwrap()).unwrap();
    assert!(read == bytes, "{} bytes", read.len());
    assert_eq!(line.proxy.cuts(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_whose_link_is_cut_in_the_middle_is_written_exactly() {
    let line = Line::start().await;
    let bytes = noise(13, 10 * MIB);
    line.proxy.cut_after(6 * MIB);
    let arguments = json!({ "path": "made/large", "content_b64": STANDARD.encode(&bytes), "create_parents": true });
    assert_eq!(result(line.call("write_file", arguments)).await["bytes"], bytes.len());
    assert!(std::fs::read(line.file("made/large")).unwrap() == bytes);
    assert_eq!(line.proxy.cuts(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_whose_caller_leaves_while_the_link_is_away_is_ended_when_it_is_back() {
    let line = Line::start().await;
    let marker = Marker::new();
    let command = format!("setsid sleep {marker} & sleep {marker}");
    let call = line.call("shell", json!({ "command": ["/bin/sh", "-c", command] }));
    marker.is_on(3).await;
    line.proxy.shut();
    line.is_cut().await;
    call.abort();
    line.ends_when_it_is_back(&marker, 3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_whose_time_is_over_while_the_link_is_away_is_ended_when_it_is_back() {
    let line = Line::start().await;
    let marker = Marker::new();
    let call = line.call("shell", json!({ "command": ["sleep", marker.to_string()], "timeout_ms": 3000 }));
    marker.is_on(1).await;
    line.proxy.shut();
    let answer = call.await.unwrap();
    assert_eq!((answer.status.as_u16(), answer.code().as_str()), (502, "executor_unreachable"));
    assert_eq!(answer.json()["error"]["ran"], "unknown");
    line.ends_when_it_is_back(&marker, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_whose_wait_is_over_is_ended_when_the_link_is_back_after_all() {
    let line = Line::with(|config| config.tools.relink_wait_secs = 1).await;
    let marker = Marker::new();
    let call = line.call("shell", json!({ "command": ["sleep", marker.to_string()] }));
    marker.is_on(1).await;
    line.proxy.shut();
    assert_eq!(call.await.unwrap().json()["error"]["ran"], "unknown");
    line.ends_when_it_is_back(&marker, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_commands_of_one_executor_outlive_the_same_cut_once_each() {
    let line = Line::start().await;
    let calls = (0..20).map(|n| {
        let command = format!(
            "echo x >> starts{n}; for i in 1 2 3; do echo {n}-$i; done; echo x >> ready; \
             while [ ! -e go ]; do sleep 0.05; done; for i in 4 5 6; do echo {n}-$i; done; exit {n}"
        );
        line.call("shell", json!({ "command": command }))
    });
    let calls: Vec<_> = calls.collect();
    line.has("ready", 20).await;
    line.proxy.cut();
    line.is_cut().await;
    std::fs::write(line.file("go"), "").unwrap();
    for (n, result) in join_all(calls.into_iter().map(result)).await.iter().enumerate() {
        let expected: String = (1..=6).map(|i| format!("{n}-{i}\n")).collect();
        assert_eq!((&result["stdout"], &result["exit_code"]), (&json!(expected), &json!(n)));
        assert_eq!(std::fs::read_to_string(line.file(&format!("starts{n}"))).unwrap(), "x\n");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn unbinding_while_the_link_is_away_ends_the_calls_that_wait_for_it() {
    use exec_gateway::admin::Request;
    let scene = Scene::start().await;
    scene.executor.on("process/start", Reply::Unanswered);
    let call = scene.call();
    scene.link.ended().await;
    let (executor, workspace) = (scene.credentials.parse().unwrap(), "w".parse().unwrap());
    scene.gateway.admin(Request::ExecutorUnbind { executor, workspace }).await;
    // Long before the wait would be over, which is an hour.
    let answer = call.await.unwrap();
    assert_eq!((answer.status.as_u16(), answer.code().as_str()), (502, "executor_unreachable"));
    assert_eq!(answer.json()["error"]["ran"], "unknown");
    let endings = &scene.gateway.gateway.api().corridor.endings;
    eventually("nobody waits", async || endings.is_empty().then_some(())).await;
}

/// A stand-in on the line under the name `box`, and a gateway that waits for it for an hour.
struct Scene {
    gateway: TestGateway,
    caller: Caller,
    credentials: String,
    executor: FakeExecutor,
    link: FakeLink,
}

impl Scene {
    async fn start() -> Self {
        let gateway = TestGateway::with(|config| config.tools.relink_wait_secs = 3600).await;
        let caller = gateway.caller("w").await;
        let credentials = gateway.executor("w", "box").await;
        let (executor, link) = FakeExecutor::connected(&gateway, &credentials).await;
        Self { gateway, caller, credentials: credentials.executor, executor, link }
    }

    fn call(&self) -> JoinHandle<Answer> {
        let caller = self.caller.clone();
        let arguments = json!({ "command": "true", "timeout_ms": 3_600_000 });
        tokio::spawn(async move { caller.tool("box", "shell", arguments).await })
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_was_not_answered_is_asked_again_and_has_run_once() {
    for (lost, ran) in [(Reply::Unanswered, "before"), (Reply::Hangup, "only now")] {
        let scene = Scene::start().await;
        scene.executor.on("process/start", lost);
        let call = scene.call();
        scene.link.ended().await;
        scene.executor.on("process/start", Reply::Usual);
        let _link = scene.executor.register_and_dial().await;
        let result = result(call).await;
        assert_eq!(result["stdout"], format!("{}\n", scene.credentials), "{ran}");
        assert_eq!((scene.executor.asked("process/start"), scene.executor.processes()), (2, 1), "{ran}");
    }
}

/// A start whose answer is lost, and an executor that refuses what is asked of it next until it was asked some times.
async fn is_asked_again(method: &str, refusal: Reply, times: usize) {
    let scene = Scene::start().await;
    scene.executor.on("process/start", Reply::Unanswered);
    let call = scene.call();
    scene.link.ended().await;
    scene.executor.on(method, refusal);
    scene.executor.on("process/start", Reply::Usual);
    let _link = scene.executor.register_and_dial().await;
    eventually("it is asked again", async || (scene.executor.asked(method) > times).then_some(())).await;
    scene.executor.on(method, Reply::Usual);
    assert_eq!(result(call).await["stdout"], format!("{}\n", scene.credentials));
    assert_eq!(scene.executor.processes(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_executor_that_has_not_noticed_the_loss_yet_is_asked_again() {
    is_asked_again("initialize", Reply::Refused(-32010, "session x is already attached"), 3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_is_still_being_started_is_waited_for() {
    // The real executor answers so under load, even after the process has begun to print.
    is_asked_again("process/read", Reply::Refused(-32600, "process id x is starting"), 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_that_stops_waits_for_no_link() {
    let gateway = TestGateway::with(|config| {
        config.tools.relink_wait_secs = 3600;
        config.drain.grace_secs = 1;
    })
    .await;
    let caller = gateway.caller("w").await;
    let credentials = gateway.executor("w", "box").await;
    let (executor, link) = FakeExecutor::connected(&gateway, &credentials).await;
    executor.on("process/start", Reply::Hangup);
    let arguments = json!({ "command": "true", "timeout_ms": 3_600_000 });
    let call = tokio::spawn(async move { caller.tool("box", "shell", arguments).await });
    link.ended().await;
    let corridor = gateway.gateway.api().corridor.clone();
    gateway.gateway.run_until(std::future::ready(())).await;
    let answer = call.await.unwrap();
    assert_eq!((answer.status.as_u16(), answer.code().as_str()), (502, "executor_unreachable"));
    eventually("nobody waits", async || corridor.endings.is_empty().then_some(())).await;
}
