//! Gateways that stop and start, executors that come and go, and operators who change their minds, on the real
//! executor.

use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use exec_gateway::admin::{Request, Response};
use exec_gateway::protocol::ids::{EnvironmentName, ExecutorId, TurnId, WorkspaceId};
use serde_json::json;
use tokio::process::Command;
use tokio::task::JoinHandle;

use crate::support::gateway::{free_address, workspace};
use crate::support::{
    Answer, Caller, CodexExecutor, DaemonProcess, FakeExecutor, Marker, Scratch, TestGateway, Wire, Workbench,
    eventually,
};

/// Waits for a file called `go` after it has made one called `started`; not for ever, should its test be gone.
const WAITING: &str = "touch started; for i in $(seq 3000); do [ -e go ] && exec echo done; sleep 0.02; done";

#[tokio::test(flavor = "multi_thread")]
async fn the_same_executor_is_back_after_every_restart() {
    let state = Scratch::new();
    let address = free_address();
    let mut daemon = DaemonProcess::start(&state, address, &[]).await;
    let (caller, credentials) = workspace(&state, &daemon).await;
    let mut executor = CodexExecutor::connected(&format!("http://{address}"), &credentials, &caller, "box").await;
    let pid = executor.pid();
    // Commands are children of the native executor, not of its launcher: its id tells whether it is the same process.
    let native = native_executor(&caller).await;

    for restart in 0..4 {
        if restart % 2 == 0 {
            assert_eq!(daemon.terminate().await, Some(0));
        } else {
            daemon.kill().await;
        }
        daemon = DaemonProcess::start(&state, address, &[]).await;

        // At once: the executor is on its way back, and the call waits for it.
        assert_eq!(native_executor(&caller).await, native, "restart {restart}");
        assert_eq!((executor.pid(), executor.is_running()), (pid, true));
    }
}

#[tokio::test]
async fn after_a_crash_only_those_are_connected_who_are_there() {
    let state = Scratch::new();
    let daemon = DaemonProcess::start(&state, "127.0.0.1:0".parse().unwrap(), &[]).await;
    let (caller, credentials) = workspace(&state, &daemon).await;
    let executor = FakeExecutor::new(daemon.address, &credentials);
    let link = executor.register_and_dial().await;
    eventually("it is connected", async || (caller.environments().await == ["box"]).then_some(())).await;

    daemon.kill().await;
    drop(link);
    let daemon = DaemonProcess::start(&state, "127.0.0.1:0".parse().unwrap(), &[]).await;

    let caller = Caller::new(daemon.address, caller.token);
    assert!(caller.environments().await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn who_connects_to_a_socket_that_outlives_the_gateway_is_answered_by_the_next_one() {
    let (state, held) = (Scratch::new(), TcpListener::bind("127.0.0.1:0").unwrap());
    let mut early = Wire::connect(held.local_addr().unwrap()).await;
    early.send("GET /healthz HTTP/1.1\r\nhost: gw\r\n\r\n").await;

    let daemon = DaemonProcess::start_on(&state, &held, None).await;

    assert_eq!(daemon.address, held.local_addr().unwrap(), "no other address is bound");
    assert!(early.receive().await.starts_with("HTTP/1.1 200 "));
    daemon.kill().await;
    let mut late = Wire::connect(held.local_addr().unwrap()).await;
    late.send("GET /healthz HTTP/1.1\r\nhost: gw\r\n\r\n").await;
    let _daemon = DaemonProcess::start_on(&state, &held, None).await;
    assert!(late.receive().await.starts_with("HTTP/1.1 200 "));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_under_way_is_finished_before_the_gateway_stops() {
    let state = Scratch::new();
    let daemon = DaemonProcess::start(&state, "127.0.0.1:0".parse().unwrap(), &[]).await;
    let (caller, credentials) = workspace(&state, &daemon).await;
    let executor = CodexExecutor::connected(&format!("http://{}", daemon.address), &credentials, &caller, "box").await;
    let call = begin(&caller, &executor).await;

    let operator = Caller::new(daemon.ops, None);
    assert_eq!(operator.send("GET", "/readyz", &[], "").await.status, 200);
    assert_eq!(probe(operator.address).await, (Some(0), String::new()));
    let stopped = tokio::spawn(daemon.terminate());
    eventually("the gateway refuses new calls", async || {
        let answer = caller.tool("box", "shell", json!({ "command": ["true"] })).await;
        (answer.status == 503 && answer.code() == "draining").then_some(())
    })
    .await;
    assert_eq!(operator.send("GET", "/readyz", &[], "").await.status, 503);
    assert_eq!(probe(operator.address).await, (Some(1), "exec-gateway: not ready: draining\n".to_owned()));
    std::fs::write(executor.home().join("go"), "").unwrap();

    let result = call.await.unwrap().json();
    assert_eq!(result["structuredContent"]["stdout"], "done\n");
    assert_eq!(stopped.await.unwrap(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_whose_executor_dies_ends_when_its_wait_is_over_and_the_next_one_works() {
    let bench = Workbench::with(|config| config.tools.relink_wait_secs = 1).await;
    let call = begin(&bench.caller, &bench.executor).await;

    bench.executor.kill();

    assert_is_cut(call).await;
    // Lets the command end, which has outlived its executor.
    std::fs::write(bench.file("go"), "").unwrap();

    let _executor = CodexExecutor::start(&bench.gateway.url(), &bench.credentials).await;
    assert_eq!(bench.shell(json!({ "command": ["echo", "back"] })).await["stdout"], "back\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_whose_executor_was_restarted_ends_when_the_new_one_is_there() {
    // The wait alone would take longer than a test may.
    let bench = Workbench::with(|config| config.tools.relink_wait_secs = 3600).await;
    let arguments = json!({ "command": WAITING, "timeout_ms": 3_600_000 });
    let caller = bench.caller.clone();
    let call = tokio::spawn(async move { caller.tool("box", "shell", arguments).await });
    eventually("the call runs", async || bench.file("started").exists().then_some(())).await;

    bench.executor.kill();
    let _successor = CodexExecutor::start(&bench.gateway.url(), &bench.credentials).await;

    assert_is_cut(call).await;
    std::fs::write(bench.file("go"), "").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_whose_executor_dies_after_the_first_space_tells_so_in_its_result() {
    let bench = Workbench::with(|config| {
        config.tools.keepalive_after_secs = 1;
        config.tools.relink_wait_secs = 1;
    })
    .await;
    let marker = Marker::new();
    let sleep = json!({ "tool": "shell", "arguments": { "command": ["sleep", marker.to_string()] } });
    let answer = bench.caller.open("POST", "/api/connectors/envs/box/tool/call", sleep.to_string()).await;

    bench.executor.kill();

    let result = Answer::whole(answer).await.unwrap().json();
    assert_eq!(result["isError"], true);
    assert_eq!(result["structuredContent"], json!({ "code": "executor_unreachable", "ran": "unknown" }));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_to_an_executor_that_never_connected_is_refused_at_once() {
    // A call that waited for the executor would have begun its answer by then, with status 200.
    let gateway = TestGateway::with(|config| config.tools.keepalive_after_secs = 5).await;
    let caller = gateway.caller("w").await;
    gateway.executor("w", "box").await;

    let answer = caller.tool("box", "shell", json!({ "command": ["true"] })).await;

    assert_eq!((answer.status.as_u16(), answer.code().as_str()), (503, "executor_not_connected"));
    assert!(answer.header("retry-after").unwrap().parse::<u64>().unwrap() > 0, "{answer:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn unbinding_ends_the_calls_of_that_workspace_alone() {
    let bench = Workbench::start().await;
    let (workspace, name) = (WorkspaceId::new("other").unwrap(), EnvironmentName::new("shared").unwrap());
    let executor = bench.executor_id();
    bench.gateway.admin(Request::ExecutorBind { executor, workspace, name, default: false }).await;
    let neighbour = bench.gateway.caller("other").await;
    let call = begin(&bench.caller, &bench.executor).await;
    let neighbours = begin_as(&neighbour, "shared", &bench.executor, "neighbour").await;

    let workspace = WorkspaceId::new("w").unwrap();
    bench.gateway.admin(Request::ExecutorUnbind { executor: bench.executor_id(), workspace }).await;

    assert_is_cut(call).await;
    assert_eq!(refusal(&bench.caller).await, (404, "env_not_found".into()));
    std::fs::write(bench.file("go"), "").unwrap();
    assert_eq!(neighbours.await.unwrap().json()["structuredContent"]["stdout"], "done\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn deleting_an_executor_ends_its_calls_and_the_executor() {
    let mut bench = Workbench::start().await;
    let call = begin(&bench.caller, &bench.executor).await;

    bench.gateway.admin(Request::ExecutorDelete { executor: bench.executor_id() }).await;

    assert_is_cut(call).await;
    assert_eq!(refusal(&bench.caller).await, (404, "env_not_found".into()));
    eventually("the executor ends by itself", async || (!bench.executor.is_running()).then_some(())).await;
    std::fs::write(bench.file("go"), "").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn revoking_a_token_ends_its_calls_alone() {
    let bench = Workbench::start().await;
    let (leaver, id) = bench.gateway.caller_and_token("w").await;
    revoking_ends_calls(&bench, leaver, Request::TokenRevoke { id }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn revoking_a_turn_ends_its_calls_alone() {
    let bench = Workbench::start().await;
    let (turn, ttl) = (TurnId::new("turn-1").unwrap(), Duration::from_secs(3600));
    let workspace = WorkspaceId::new("w").unwrap();
    let mint = Request::CapToken { workspace, turn: Some(turn.clone()), user: None, ttl };
    let Response::CapToken { token } = bench.gateway.admin(mint).await else { panic!("no cap-token") };
    let leaver = Caller::new(bench.gateway.address(), Some(token.expose().to_owned()));
    revoking_ends_calls(&bench, leaver, Request::RevokeTurn { turn }).await;
}

/// Takes the right of one of two callers of the same workspace away, while both have a call under way.
async fn revoking_ends_calls(bench: &Workbench, leaver: Caller, revoke: Request) {
    let marker = Marker::new();
    let sleep = json!({ "command": ["sleep", marker.to_string()] });
    let left = leaver.clone();
    let call = tokio::spawn(async move { left.tool("box", "shell", sleep).await });
    marker.is_on(1).await;
    let others = begin(&bench.caller, &bench.executor).await;

    bench.gateway.admin(revoke).await;

    let answer = call.await.unwrap();
    assert_eq!((answer.status.as_u16(), answer.code().as_str()), (401, "invalid_token"));
    assert_eq!(answer.json()["error"]["ran"], "unknown");
    marker.is_on(0).await;
    assert_eq!(refusal(&leaver).await, (401, "invalid_token".into()));
    std::fs::write(bench.file("go"), "").unwrap();
    assert_eq!(others.await.unwrap().json()["structuredContent"]["stdout"], "done\n");
}

impl Workbench {
    fn executor_id(&self) -> ExecutorId {
        ExecutorId::new(&self.credentials.executor).unwrap()
    }
}

/// What the command line finds out about the gateway with this address for operators.
async fn probe(ops: SocketAddr) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_exec-gateway"));
    let output = command.args(["probe", "--ops-listen", &ops.to_string()]).output().await.unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

/// The process id of the native executor.
async fn native_executor(caller: &Caller) -> String {
    let result = caller.shell("box", json!({ "command": "echo $PPID" })).await;
    result["stdout"].as_str().unwrap().to_owned()
}

/// A call that runs until there is a file called `go`.
async fn begin(caller: &Caller, executor: &CodexExecutor) -> JoinHandle<Answer> {
    begin_as(caller, "box", executor, "started").await
}

/// The same with a name of its own for the file that says that it runs.
async fn begin_as(caller: &Caller, environment: &str, executor: &CodexExecutor, started: &str) -> JoinHandle<Answer> {
    let (caller, environment) = (caller.clone(), environment.to_owned());
    let arguments = json!({ "command": WAITING.replace("started", started) });
    let call = tokio::spawn(async move { caller.tool(&environment, "shell", arguments).await });
    let started = executor.home().join(started);
    eventually("the call runs", async || started.exists().then_some(())).await;
    call
}

/// The call has ended before its command, and says so.
async fn assert_is_cut(call: JoinHandle<Answer>) {
    let answer = call.await.unwrap();
    assert_eq!((answer.status.as_u16(), answer.code().as_str()), (502, "executor_unreachable"));
    assert_eq!(answer.json()["error"]["ran"], "unknown");
}

async fn refusal(caller: &Caller) -> (u16, String) {
    let answer = caller.tool("box", "shell", json!({ "command": ["true"] })).await;
    (answer.status.as_u16(), answer.code())
}
