//! Workspaces side by side: none reaches another's executor, and none costs more than it uses.

use exec_gateway::admin::Request;
use exec_gateway::protocol::ids::{EnvironmentName, ExecutorId, WorkspaceId};
use futures_util::future::join_all;
use serde_json::json;

use crate::support::{
    Caller, Credentials, FakeExecutor, FakeLink, Harness, PATIENCE, Reply, TestGateway, Tongue, Workbench, eventually,
};

async fn with_executor(gateway: &TestGateway, workspace: &str) -> (Caller, Credentials, FakeExecutor, FakeLink) {
    let credentials = gateway.executor(workspace, "box").await;
    let caller = gateway.caller(workspace).await;
    let (executor, link) = FakeExecutor::connected(gateway, &credentials).await;
    (caller, credentials, executor, link)
}

async fn stdout(caller: &Caller, environment: &str) -> String {
    let result = caller.shell(environment, json!({ "command": "true" })).await;
    result["stdout"].as_str().unwrap().trim_end().to_owned()
}

#[tokio::test]
async fn equal_names_in_two_workspaces_never_meet() {
    let gateway = TestGateway::start().await;
    let (ours, our_box, _our_executor, _our_link) = with_executor(&gateway, "ours").await;
    let (theirs, their_box, _their_executor, _their_link) = with_executor(&gateway, "theirs").await;
    assert_ne!(our_box.executor, their_box.executor);
    let calls = (0..100).map(|n| {
        let (caller, expected) = if n % 2 == 0 { (&ours, &our_box) } else { (&theirs, &their_box) };
        async move { assert_eq!(stdout(caller, "box").await, expected.executor) }
    });
    join_all(calls).await;
}

#[tokio::test]
async fn one_executor_serves_two_workspaces_under_two_names_until_one_is_unbound() {
    let gateway = TestGateway::start().await;
    let (first, credentials, executor, _link) = with_executor(&gateway, "first").await;
    let second = gateway.caller("second").await;
    assert!(second.environments().await.is_empty());
    let id = ExecutorId::new(&credentials.executor).unwrap();
    let (workspace, name) = (WorkspaceId::new("second").unwrap(), EnvironmentName::new("shared").unwrap());
    let bind = Request::ExecutorBind { executor: id.clone(), workspace: workspace.clone(), name, default: false };
    gateway.admin(bind).await;

    assert_eq!((first.environments().await, second.environments().await), (vec!["box".into()], vec!["shared".into()]));
    assert_eq!(stdout(&first, "box").await, credentials.executor);
    assert_eq!(stdout(&second, "shared").await, credentials.executor);
    assert_eq!(second.tool("box", "shell", json!({ "command": "true" })).await.code(), "env_not_found");
    assert_eq!(executor.asked("handshake"), 2, "each workspace has its own conversation");

    executor.on("process/start", Reply::Never);
    let (answer, ()) = tokio::join!(second.tool("shared", "shell", json!({ "command": "true" })), async {
        eventually("the call has begun", async || (executor.asked("process/start") == 3).then_some(())).await;
        gateway.admin(Request::ExecutorUnbind { executor: id, workspace }).await;
    });
    executor.on("process/start", Reply::Usual);
    assert_eq!((answer.status.as_u16(), answer.code().as_str()), (502, "executor_unreachable"));
    assert_eq!(second.tool("shared", "shell", json!({ "command": "true" })).await.code(), "env_not_found");
    assert!(second.environments().await.is_empty());
    assert_eq!(stdout(&first, "box").await, credentials.executor);
    assert_eq!(executor.asked("handshake"), 2, "the other conversation goes on");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_harness_ends_with_the_right_of_its_workspace_and_its_neighbour_does_not() {
    let bench = Workbench::start().await;
    let executor = bench.credentials.executor.as_str();
    let guests: WorkspaceId = "guests".parse().unwrap();
    let guest = bench.gateway.caller("guests").await;
    let id: ExecutorId = executor.parse().unwrap();
    let (name, workspace) = (EnvironmentName::new("shared").unwrap(), guests.clone());
    let bind = Request::ExecutorBind { executor: id.clone(), workspace, name, default: false };
    let unbind = Request::ExecutorUnbind { executor: id, workspace: guests.clone() };
    // It ends with the directory of this test.
    std::fs::write(bench.file("going-on"), "").unwrap();
    let command = format!("while [ -e {} ]; do sleep 0.05; done", bench.file("going-on").display());
    for tongue in [Tongue::Json, Tongue::Frames, Tongue::Encrypted] {
        let (mut neighbour, _) = Harness::initialized(&bench.caller, executor, tongue).await;
        for end in [unbind.clone(), Request::RevokeWorkspace { workspace: guests.clone() }] {
            bench.gateway.admin(bind.clone()).await;
            let (mut harness, _) = Harness::initialized(&guest, executor, tongue).await;
            harness.start("p1", &command).await;
            bench.gateway.admin(end).await;
            let farewell = tokio::time::timeout(PATIENCE, harness.farewell()).await.expect("its socket ends");
            let farewell = farewell.expect("a farewell");
            assert_eq!(&*farewell.reason, "the right to this executor has ended", "{tongue:?}");
        }
        assert_eq!(neighbour.run("p1", "echo on").await.0, "on\n", "{tongue:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workspace_is_built_once_however_many_call_first() {
    let gateway = TestGateway::with(|config| config.workspace.calls_max = 2000).await;
    let (caller, credentials, executor, _link) = with_executor(&gateway, "w").await;
    let workspaces = &gateway.gateway.api().workspaces;
    assert_eq!(workspaces.built(), 0);
    executor.on("handshake", Reply::Held);
    let calls = join_all((0..1000).map(|_| stdout(&caller, "box")));
    let (outputs, ()) = tokio::join!(calls, async {
        let under_way = || workspaces.all().iter().map(|workspace| workspace.calls()).sum::<usize>();
        eventually("all of them wait", async || (under_way() == 1000).then_some(())).await;
        executor.release();
    });
    assert!(outputs.iter().all(|stdout| *stdout == credentials.executor));
    assert_eq!((workspaces.built(), executor.asked("handshake"), executor.asked("process/start")), (1, 1, 1000));
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_past_the_bound_of_a_workspace_are_refused_and_the_others_succeed() {
    let gateway = TestGateway::start().await;
    let (caller, _credentials, executor, _link) = with_executor(&gateway, "w").await;
    let (neighbour, their_box, _their_executor, _their_link) = with_executor(&gateway, "neighbours").await;
    executor.on("process/start", Reply::Held);
    let workspaces = &gateway.gateway.api().workspaces;
    let under_way = || workspaces.peek(&"w".parse().unwrap()).map_or(0, |workspace| workspace.calls());

    let calls = join_all((0..256).map(|_| caller.tool("box", "shell", json!({ "command": "true" }))));
    let surplus = async {
        eventually("all places are taken", async || (under_way() == 256).then_some(())).await;
        let refused = join_all((0..744).map(|_| caller.tool("box", "shell", json!({ "command": "true" })))).await;
        assert_eq!(stdout(&neighbour, "box").await, their_box.executor);
        executor.release();
        refused
    };
    let (answers, refused) = tokio::join!(calls, surplus);

    assert!(answers.iter().all(|answer| answer.status == 200));
    for answer in refused {
        assert_eq!((answer.status.as_u16(), answer.code().as_str()), (429, "too_many_calls"));
    }
    assert_eq!(under_way(), 0, "every place was given back");
}

#[tokio::test]
async fn a_call_that_its_caller_leaves_gives_its_place_back_and_ends_its_process() {
    let gateway = TestGateway::start().await;
    let (caller, _credentials, executor, _link) = with_executor(&gateway, "w").await;
    executor.on("process/start", Reply::Never);
    {
        let call = caller.tool("box", "shell", json!({ "command": "true" }));
        let begun = eventually("the call has begun", async || (executor.asked("process/start") == 1).then_some(()));
        tokio::select! {
            answer = call => panic!("{answer:?}"),
            () = begun => {}
        }
    }
    let workspaces = &gateway.gateway.api().workspaces;
    eventually("the place is given back", async || (workspaces.all()[0].calls() == 0).then_some(())).await;
    eventually("the process is ended", async || (executor.asked("process/terminate") == 1).then_some(())).await;
}

#[tokio::test]
async fn an_idle_workspace_is_dropped_and_built_again_while_a_busy_one_stays() {
    let gateway = TestGateway::with(|config| config.workspace.idle_secs = 1).await;
    let (busy, _busy_box, busy_executor, _busy_link) = with_executor(&gateway, "busy").await;
    let (idle, idle_box, idle_executor, _idle_link) = with_executor(&gateway, "idle").await;
    let workspaces = &gateway.gateway.api().workspaces;
    busy_executor.on("process/start", Reply::Held);

    let (answer, ()) = tokio::join!(busy.tool("box", "shell", json!({ "command": "true" })), async {
        eventually("it is busy", async || (busy_executor.asked("process/start") == 1).then_some(())).await;
        // Used after the busy one, so whatever drops this one would have dropped the other first.
        assert_eq!(stdout(&idle, "box").await, idle_box.executor);
        assert_eq!((workspaces.built(), workspaces.evicted()), (2, 0));
        eventually("the idle one is dropped", async || {
            workspaces.evict_idle();
            (workspaces.evicted() == 1).then_some(())
        })
        .await;
        assert!(workspaces.peek(&"busy".parse().unwrap()).is_some());
        assert!(workspaces.peek(&"idle".parse().unwrap()).is_none());
        busy_executor.release();
    });

    assert_eq!(answer.status, 200);
    assert_eq!(stdout(&idle, "box").await, idle_box.executor);
    assert_eq!(workspaces.built(), 3);
    assert_eq!(idle_executor.asked("handshake"), 2, "its conversation was dropped with it");
}
