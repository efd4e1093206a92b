//! `terminate`: ends the process of a session (connectors-api.md §4.6).

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Call, Effect, Run, Tool, ToolError, parse, session, success};
use crate::protocol::rest::ToolResult;
use crate::session::EndSignal;
use crate::session::view::ending;

pub(super) const TOOL: Tool = Tool {
    name: "terminate",
    description: "End a process started by exec_command with all that it started: kill it at once, interrupt it (INT), \
                  or interrupt it and kill it after a grace (TERM). Its output stays readable by read_output.",
    effect: Effect::Destroys,
    input: |schemas| schemas.root_schema_for::<Arguments>(),
    output: |schemas| schemas.root_schema_for::<Output>(),
    run: Run::Workspace(|call, arguments| Box::pin(async move { terminate(call, parse(arguments)?).await })),
};

/// Arguments of `terminate`.
#[derive(Deserialize, JsonSchema)]
struct Arguments {
    /// As returned by exec_command.
    session_id: String,
    /// The environment of the session; not needed.
    #[serde(default)]
    environment_id: Option<String>,
    /// `KILL` (when left out), `TERM` or `INT`.
    #[serde(default)]
    signal: Option<EndSignal>,
    /// Time between interrupt and kill with `TERM`, in milliseconds; 5000 when left out, 20000 at most.
    #[serde(default)]
    grace_ms: Option<u64>,
}

/// The structured part of the answer.
#[derive(Serialize, JsonSchema)]
struct Output {
    /// How far the process is: `exited` when it is over, `running` when it was asked to end and has not yet.
    state: &'static str,
    /// Its exit code, 128 + n after signal n; null while it has none.
    exit_code: Option<i32>,
}

async fn terminate(call: &Call, arguments: Arguments) -> Result<ToolResult, ToolError> {
    let Arguments { session_id, environment_id, signal, grace_ms } = arguments;
    let session = session::find(call, &session_id, environment_id.as_deref())?;
    let (signal, grace) = ending(signal, grace_ms);
    let status = session.end_soon(signal, grace).await;
    let text = if status.state.is_final() { "terminated" } else { "asked to end" };
    Ok(success(text, &Output { state: status.state.as_str(), exit_code: status.exit_code }))
}
