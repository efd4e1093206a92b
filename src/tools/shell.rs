//! `shell`: one command to its end, with all its output (connectors-api.md §4.1).

use std::collections::BTreeMap;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::command::{Command, check_env};
use super::execution::{Ended, Execution, execute};
use super::{Effect, Run, Site, Tool, ToolError, failure, head_and_tail, parse, resolve};
use crate::protocol::rest::{Content, ToolResult};
use crate::protocol::rpc::{EnvPolicy, ProcessStart};
use crate::relay::process_tree::MARK;
use crate::session::{Over, StartRequest, StdinMode};
use crate::workspace::pool::Use;

pub(super) const TOOL: Tool = Tool {
    name: "shell",
    description: "Run a command to its end and return its whole output and exit code. A command that fails is an \
                  answer too: look at exit_code. When timeout_ms is over, the command and all it started are killed. \
                  The command gets no stdin; use exec_command for what runs long or reads input.",
    effect: Effect::Destroys,
    input: |schemas| schemas.root_schema_for::<Arguments>(),
    output: |schemas| schemas.root_schema_for::<Output>(),
    run: Run::At(|site, arguments| Box::pin(async move { call(site, parse(arguments)?).await })),
};

/// Arguments of `shell`.
#[derive(Deserialize, JsonSchema)]
struct Arguments {
    /// Program and arguments as an array, or one string for the environment's shell.
    command: Command,
    /// Working directory; the executor's own when left out. Relative paths and `~` are taken on the executor.
    #[serde(default)]
    cwd: Option<String>,
    /// Variables set for the command, over the executor's environment.
    #[serde(default)]
    env: Option<BTreeMap<String, String>>,
    /// Wall-clock time after which the command and its children are killed, in milliseconds; 60000 when left out.
    #[serde(default)]
    timeout_ms: Option<u64>,
}

/// The structured part of the answer.
#[derive(Serialize, JsonSchema)]
struct Output {
    /// What the command wrote, as text.
    stdout: String,
    /// What it wrote to its error stream, as text.
    stderr: String,
    /// Its exit code; null when it ran out of time.
    exit_code: Option<i32>,
    /// Whether it was killed because its time was up.
    timed_out: bool,
    /// Wall-clock time of the call, in milliseconds.
    duration_ms: u64,
    /// The bytes of stdout in base64, where they are not UTF-8.
    #[serde(skip_serializing_if = "Option::is_none")]
    stdout_b64: Option<String>,
    /// The bytes of stderr in base64, where they are not UTF-8.
    #[serde(skip_serializing_if = "Option::is_none")]
    stderr_b64: Option<String>,
    /// Bytes that the command wrote past the bound of one answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    lost_bytes: Option<u64>,
    /// Chunks of output that the executor no longer had when its link was back.
    #[serde(skip_serializing_if = "Option::is_none")]
    lost_chunks: Option<u64>,
    /// The session that read_output shows all of the output of, where stdout and stderr stand here without their middle.
    #[serde(skip_serializing_if = "Option::is_none")]
    session_id: Option<String>,
}

impl Output {
    /// All but the output itself.
    fn of(ended: &Ended, duration: Duration) -> Self {
        let some = |count: u64| (count > 0).then_some(count);
        Self {
            stdout: String::new(),
            stderr: String::new(),
            exit_code: ended.exit_code,
            timed_out: ended.timed_out,
            duration_ms: u64::try_from(duration.as_millis()).unwrap_or(u64::MAX),
            stdout_b64: None,
            stderr_b64: None,
            lost_bytes: some(ended.lost_bytes),
            lost_chunks: some(ended.lost_chunks),
            session_id: None,
        }
    }
}

async fn call(site: Site<'_>, arguments: Arguments) -> Result<ToolResult, ToolError> {
    let Arguments { command, cwd, env, timeout_ms } = arguments;
    let mut env = env.unwrap_or_default();
    check_env(&env)?;
    let deadline = site.call.deadline(timeout_ms)?;
    let client = site.client(Use::Processes, deadline).await?;
    let environment = client.environment();
    let process_id = format!("sh_{}", uuid::Uuid::new_v4().simple());
    env.insert(MARK.to_owned(), process_id.clone());
    let start = ProcessStart {
        process_id,
        argv: command.argv(environment)?,
        cwd: resolve(environment, "cwd", cwd.as_deref().unwrap_or("."))?,
        env,
        tty: false,
        pipe_stdin: false,
        arg0: None,
        env_policy: Some(EnvPolicy::commands(&site.call.settings.env_exclude)),
        sandbox: None,
    };
    let ended = match execute(site, client, &start, deadline, site.call.settings.output_bytes_max).await? {
        Execution::Refused(refusal) => return Ok(failure(&TOOL, &refusal)),
        Execution::Ended(ended) => ended,
    };
    let duration = site.call.started.elapsed();
    let long = site.call.text_bytes_max.filter(|bytes_max| ended.stdout.len() + ended.stderr.len() > *bytes_max);
    Ok(match long {
        None => whole(ended, duration),
        Some(bytes_max) => cut(site, start, ended, duration, bytes_max).await,
    })
}

fn whole(mut ended: Ended, duration: Duration) -> ToolResult {
    let (stdout, stdout_b64) = text_and_exact(std::mem::take(&mut ended.stdout));
    let (stderr, stderr_b64) = text_and_exact(std::mem::take(&mut ended.stderr));
    result(stdout, stderr, Output { stdout_b64, stderr_b64, ..Output::of(&ended, duration) })
}

/// Both ends of what it wrote, for a caller that takes no more, and the session that keeps all of it.
async fn cut(site: Site<'_>, start: ProcessStart, ended: Ended, duration: Duration, bytes_max: usize) -> ToolResult {
    let mut output = Output::of(&ended, duration);
    let request = StartRequest {
        argv: start.argv,
        cwd: Some(start.cwd.as_str().to_owned()),
        env: BTreeMap::new(),
        tty: false,
        stdin: StdinMode::None,
        timeout_ms: None,
        label: Some(TOOL.name.to_owned()),
    };
    let (stdout, stderr) = (Bytes::from(ended.stdout), Bytes::from(ended.stderr));
    let over = Over {
        output: vec![(0, stdout.clone()), (1, stderr.clone())],
        lost_bytes: ended.lost_bytes,
        exit_code: ended.exit_code,
        detail: ended.timed_out.then(|| "timed out".to_owned()),
    };
    let hint = match site.call.sessions.keep(site.binding, request, over).await {
        Ok(kept) => {
            let hint = format!("read_output with session_id {} shows all", kept.id);
            output.session_id = Some(kept.id.to_string());
            hint
        }
        Err(error) => format!("it could not be kept: {error}"),
    };
    // What one stream leaves of the room is the other's.
    let half = bytes_max / 2;
    let of_stderr = stderr.len().min(bytes_max - stdout.len().min(half));
    let ends = |bytes: &[u8], name: &str, bytes_max: usize| {
        let text = String::from_utf8_lossy(bytes);
        let (head, tail) = head_and_tail(&text, bytes_max);
        match text.len() - head.len() - tail.len() {
            0 => text.into_owned(),
            left_out => format!("{head}\n[{left_out} bytes of {name} left out here; {hint}]\n{tail}"),
        }
    };
    let (stdout, stderr) = (ends(&stdout, "stdout", bytes_max - of_stderr), ends(&stderr, "stderr", of_stderr));
    result(stdout, stderr, output)
}

fn result(stdout: String, stderr: String, output: Output) -> ToolResult {
    let exit_code = output.exit_code;
    let mut text = String::with_capacity(stdout.len() + stderr.len() + 64);
    text.push_str(&stdout);
    if !stderr.is_empty() {
        if !text.is_empty() {
            text.push_str("\n--- stderr ---\n");
        }
        text.push_str(&stderr);
    }
    if let Some(lost) = output.lost_bytes {
        text.push_str(&format!("\n[{lost} bytes of output past the bound of one answer]"));
    }
    if let Some(lost) = output.lost_chunks {
        text.push_str(&format!("\n[{lost} chunks of output lost while the executor was away]"));
    }
    match exit_code {
        Some(code) => text.push_str(&format!("\n[exit_code={code}]")),
        None => text.push_str("\n[exec timed out without exit signal]"),
    }
    let mut structured = serde_json::to_value(output).expect("plain data");
    // Moved in, not serialised like the rest: they may have many megabytes.
    structured["stdout"] = stdout.into();
    structured["stderr"] = stderr.into();
    ToolResult {
        content: vec![Content::Text { text }],
        structured_content: Some(structured),
        is_error: exit_code.is_none(),
    }
}

/// Output as text, and as base64 where the text is not exact.
fn text_and_exact(bytes: Vec<u8>) -> (String, Option<String>) {
    match String::from_utf8(bytes) {
        Ok(text) => (text, None),
        Err(error) => {
            let bytes = error.as_bytes();
            (String::from_utf8_lossy(bytes).into_owned(), Some(STANDARD.encode(bytes)))
        }
    }
}
