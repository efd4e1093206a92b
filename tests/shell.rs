//! `shell` on the real executor.

use serde_json::json;

use crate::support::{CodexExecutor, TestGateway};

#[tokio::test(flavor = "multi_thread")]
async fn a_command_runs_on_the_real_executor() {
    let gateway = TestGateway::start().await;
    let caller = gateway.caller("w").await;
    let credentials = gateway.executor("w", "box").await;
    let _executor = CodexExecutor::connected(&gateway.url(), &credentials, &caller, "box").await;

    let result = caller.shell("box", json!({ "command": ["echo", "hello"] })).await;

    assert_eq!(result["stdout"], "hello\n");
    assert_eq!(result["exit_code"], 0);
}
