//! `write_stdin`: input for a process session (connectors-api.md §4.6).

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Call, Effect, Run, Tool, ToolError, parse, session, success};
use crate::protocol::rest::ToolResult;

pub(super) const TOOL: Tool = Tool {
    name: "write_stdin",
    description: "Write to the stdin of a process started by exec_command, as text or as base64, and end stdin with \
                  eof. Nothing is added: a line needs its newline. Returns how many bytes the process was given since \
                  its start; fails after a while when it does not read.",
    effect: Effect::Destroys,
    input: |schemas| schemas.root_schema_for::<Arguments>(),
    output: |schemas| schemas.root_schema_for::<Output>(),
    run: Run::Workspace(|call, arguments| Box::pin(async move { write(call, parse(arguments)?).await })),
};

/// Arguments of `write_stdin`.
#[derive(Deserialize, JsonSchema)]
struct Arguments {
    /// As returned by exec_command.
    session_id: String,
    /// The environment of the session; not needed.
    #[serde(default)]
    environment_id: Option<String>,
    /// The text to write.
    #[serde(default)]
    chars: Option<String>,
    /// The bytes to write in base64, instead of chars.
    #[serde(default)]
    data_b64: Option<String>,
    /// Where the bytes begin, counted from the start of stdin: makes a repeated write harmless.
    #[serde(default)]
    offset: Option<u64>,
    /// Whether stdin ends behind them.
    #[serde(default)]
    eof: bool,
}

/// The structured part of the answer.
#[derive(Serialize, JsonSchema)]
struct Output {
    /// Bytes that the process was given since its start.
    accepted: u64,
    /// Whether its stdin has ended.
    eof: bool,
}

async fn write(call: &Call, arguments: Arguments) -> Result<ToolResult, ToolError> {
    let Arguments { session_id, environment_id, chars, data_b64, offset, eof } = arguments;
    let bytes = match (chars, data_b64) {
        (Some(_), Some(_)) => return Err(ToolError::Arguments("data_b64: expected either chars or data_b64".into())),
        (Some(chars), None) => chars.into_bytes(),
        (None, Some(data)) => STANDARD
            .decode(data)
            .map_err(|_| ToolError::Arguments("data_b64: expected standard base64 with padding".into()))?,
        (None, None) if eof => Vec::new(),
        (None, None) => return Err(ToolError::Arguments("chars: expected a string".into())),
    };
    let session = session::find(call, &session_id, environment_id.as_deref())?;
    let order = session.order(offset, Bytes::from(bytes), eof)?;
    let wait = Duration::from_secs(call.sessions.settings().wait_max_secs);
    let written = session.write(&call.workspace.corridor().store, order, wait).await?;
    Ok(success("ok", &Output { accepted: written.accepted, eof: written.eof }))
}
