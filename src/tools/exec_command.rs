//! `exec_command`: starts a process session (connectors-api.md §4.6).

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::command::Command;
use super::{Effect, Run, Site, Tool, ToolError, coded_failure, parse, resolve};
use crate::protocol::rest::ToolResult;
use crate::session::{SessionError, StartRequest, StdinMode};
use crate::workspace::pool::Use;

pub(super) const TOOL: Tool = Tool {
    name: "exec_command",
    description: "Start a process that goes on after this call, and return its session_id. Its output is kept, also \
                  after its end: read it with read_output, write to it with write_stdin, end it with terminate. The \
                  process survives lost connections.",
    effect: Effect::Destroys,
    input: |schemas| schemas.root_schema_for::<Arguments>(),
    output: |schemas| schemas.root_schema_for::<Output>(),
    run: Run::At(|site, arguments| Box::pin(async move { call(site, parse(arguments)?).await })),
};

/// Longest label, in characters.
const LABEL_MAX: usize = 200;

/// Longest start key, in bytes.
const KEY_BYTES_MAX: usize = 255;

/// Arguments of `exec_command`.
#[derive(Deserialize, JsonSchema)]
struct Arguments {
    /// Program and arguments as an array, or one string for the environment's shell.
    command: Command,
    /// Working directory; the executor's own when left out. Relative paths and `~` are taken on the executor.
    #[serde(default)]
    cwd: Option<String>,
    /// Variables set for the process, over the executor's environment.
    #[serde(default)]
    env: Option<BTreeMap<String, String>>,
    /// Whether the process gets a terminal.
    #[serde(default)]
    tty: bool,
    /// `stream` (writes and an end), `open` (writes, no end) or `none`; `stream` when left out, `open` with a terminal.
    #[serde(default)]
    stdin: Option<StdinMode>,
    /// `false` is the same as `stdin: "none"`.
    #[serde(default)]
    pipe_stdin: Option<bool>,
    /// Time after which the process and its children are killed, in milliseconds; never when left out.
    #[serde(default)]
    timeout_ms: Option<u64>,
    /// The caller's own name for the session.
    #[serde(default)]
    label: Option<String>,
    /// Names this start: the same key again answers with the same session.
    #[serde(default)]
    key: Option<String>,
}

impl Arguments {
    fn stdin(&self) -> StdinMode {
        match (self.tty, self.stdin, self.pipe_stdin) {
            (true, _, _) => StdinMode::Open,
            (false, Some(mode), _) => mode,
            (false, None, Some(false)) => StdinMode::None,
            (false, None, _) => StdinMode::Stream,
        }
    }
}

/// The structured part of the answer.
#[derive(Serialize, JsonSchema)]
struct Output<'a> {
    /// Names the process in every call that follows.
    session_id: &'a str,
}

async fn call(site: Site<'_>, arguments: Arguments) -> Result<ToolResult, ToolError> {
    let call = site.call;
    let stdin = arguments.stdin();
    if arguments.timeout_ms == Some(0) {
        return Err(ToolError::Arguments("timeout_ms: expected at least 1".into()));
    }
    if arguments.label.as_ref().is_some_and(|label| label.chars().count() > LABEL_MAX) {
        return Err(ToolError::Arguments(format!("label: expected at most {LABEL_MAX} characters")));
    }
    let key = arguments.key.clone().or_else(|| call.key.clone());
    if key.as_ref().is_some_and(|key| key.is_empty() || key.len() > KEY_BYTES_MAX) {
        return Err(ToolError::Arguments(format!("key: expected 1 to {KEY_BYTES_MAX} bytes")));
    }
    let env = arguments.env.clone().unwrap_or_default();
    super::command::check_env(&env)?;
    let deadline = call.deadline(None)?;
    // Shell, working directory and paths are those of the machine, which the workspace's own conversation knows.
    let client = site.client(Use::Processes, deadline).await?;
    let environment = client.environment();
    let cwd = resolve(environment, "cwd", arguments.cwd.as_deref().unwrap_or("."))?;
    let request = StartRequest {
        argv: arguments.command.argv(environment)?,
        cwd: Some(cwd.as_str().to_owned()),
        env,
        tty: arguments.tty,
        stdin,
        timeout_ms: arguments.timeout_ms,
        label: arguments.label,
    };
    let wait = deadline.saturating_duration_since(tokio::time::Instant::now());
    match call.sessions.start(site.binding, request, key, wait).await {
        Ok(session) => {
            let started = serde_json::to_value(Output { session_id: session.id.as_str() }).expect("plain data");
            Ok(ToolResult { structured_content: Some(started.clone()), ..ToolResult::text(started.to_string()) })
        }
        Err(SessionError::NotStarted(why)) => Ok(coded_failure("not_started", format!("{} failed: {why}", TOOL.name))),
        Err(error) => Err(error.into()),
    }
}
