//! `list_environments`: what a workspace can work at (connectors-api.md §4.7).

use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Call, Effect, Run, Tool, ToolError, parse, success};
use crate::protocol::rest::ToolResult;
use crate::time::rfc3339;

pub(super) const TOOL: Tool = Tool {
    name: "list_environments",
    description: "List the environments (machines) that other tools can work at, by name: which are connected now, and \
                  which one is meant where a call names none.",
    effect: Effect::Reads,
    input: |schemas| schemas.root_schema_for::<Arguments>(),
    output: |schemas| schemas.root_schema_for::<Output>(),
    run: Run::Workspace(|call, arguments| Box::pin(async move { list(call, parse(arguments)?).await })),
};

/// There are none.
#[derive(Deserialize, JsonSchema)]
struct Arguments {}

/// The structured part of the answer.
#[derive(Serialize, JsonSchema)]
struct Output {
    /// The environments, by name.
    environments: Vec<Environment>,
}

/// One environment.
#[derive(Serialize, JsonSchema)]
struct Environment {
    /// Give this as environment_id.
    name: String,
    /// Whether it can be reached now.
    connected: bool,
    /// Whether a call that names no environment means this one.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    #[schemars(default)]
    is_default: bool,
    /// What it is for, in its owner's words.
    #[serde(skip_serializing_if = "String::is_empty")]
    #[schemars(default)]
    description: String,
    /// Since when it is connected (RFC 3339).
    #[serde(skip_serializing_if = "Option::is_none")]
    last_seen: Option<String>,
}

async fn list(call: &Call, Arguments {}: Arguments) -> Result<ToolResult, ToolError> {
    let bindings = call.workspace.environments().await.map_err(Arc::new)?;
    let registry = &call.workspace.corridor().registry;
    let mut environments: Vec<_> = bindings
        .iter()
        .map(|binding| {
            let since = registry.connected_since(binding);
            Environment {
                name: binding.name().to_string(),
                connected: since.is_some(),
                is_default: binding.is_default() || bindings.len() == 1,
                description: binding.description().to_owned(),
                last_seen: since.map(rfc3339),
            }
        })
        .collect();
    environments.sort_by(|one, other| one.name.cmp(&other.name));
    let text = serde_json::to_string(&environments).expect("what a tool tells is plain data");
    Ok(success(text, &Output { environments }))
}
