//! Distributed traces: what a caller says of its trace is told on, and nothing else is.

use serde_json::json;

use crate::support::caller::Caller;
use crate::support::fake_executor::FakeExecutor;
use crate::support::gateway::TestGateway;
use crate::support::upstream::Upstream;

const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

#[tokio::test]
async fn a_callers_trace_goes_on_to_the_executor_and_to_the_validator() {
    let upstream = Upstream::start().await;
    let gateway = TestGateway::with(|config| upstream.configure(config)).await;
    upstream.knows_token("good", "w");
    let credentials = gateway.executor("w", "box").await;
    upstream.knows_executor(&credentials.token, "u");
    let (executor, _link) = FakeExecutor::connected(&gateway, &credentials).await;
    let caller = Caller::new(gateway.address(), Some("good".into()));
    let call = async |headers: &[(&str, &str)]| {
        let call = json!({ "tool": "shell", "arguments": { "command": ["true"] } });
        let answer = caller.send("POST", "/api/connectors/envs/box/tool/call", headers, call.to_string()).await;
        assert_eq!(answer.status, 200, "{answer:?}");
    };

    call(&[("traceparent", PARENT), ("tracestate", "a=1"), ("tracestate", "b=2")]).await;
    let told = executor.traces();
    let expected = json!({ "traceparent": PARENT, "tracestate": "a=1,b=2" });
    assert!(!told.is_empty() && told.iter().all(|trace| *trace == expected), "{told:?}");
    assert_eq!(upstream.traces(), [PARENT]);

    call(&[]).await;
    call(&[("traceparent", "00-what-ever-01")]).await;
    assert_eq!(executor.traces(), told, "who says nothing of a trace is of none");
}
