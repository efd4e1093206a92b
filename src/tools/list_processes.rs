//! `list_processes`: the process sessions of a workspace.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Call, Effect, Run, Tool, ToolError, parse, success};
use crate::protocol::rest::ToolResult;
use crate::session::view::Description;

pub(super) const TOOL: Tool = Tool {
    name: "list_processes",
    description: "List the processes started by exec_command, oldest first, those included that have ended and can \
                  still be read: their session_id, command, environment, state and exit code.",
    effect: Effect::Reads,
    input: |schemas| schemas.root_schema_for::<Arguments>(),
    output: |schemas| schemas.root_schema_for::<Output>(),
    run: Run::Workspace(|call, arguments| Box::pin(async move { list(call, parse(arguments)?) })),
};

/// Arguments of `list_processes`.
#[derive(Deserialize, JsonSchema)]
struct Arguments {
    /// Only those of this environment.
    #[serde(default)]
    environment_id: Option<String>,
}

/// The structured part of the answer.
#[derive(Serialize, JsonSchema)]
struct Output {
    /// The processes.
    processes: Vec<Description>,
}

fn list(call: &Call, arguments: Arguments) -> Result<ToolResult, ToolError> {
    let wanted = |environment: &str| arguments.environment_id.as_ref().is_none_or(|name| name == environment);
    let sessions = call.sessions.of(call.workspace.id());
    let listed = sessions.iter().filter(|session| wanted(&session.environment));
    let output = Output { processes: listed.map(|session| session.describe()).collect() };
    let text = serde_json::to_string(&output.processes).expect("what a tool tells is plain data");
    Ok(success(text, &output))
}
