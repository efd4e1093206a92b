//! `shell`: one command to its end, with all its output (connectors-api.md §4.1).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use super::command::{Command, check_env};
use super::process::Process;
use super::{Call, Tool, ToolError, failure, refused, resolve};
use crate::protocol::rest::{Content, Ran, ToolResult};
use crate::protocol::rpc::{EnvPolicy, OutputStream, ProcessStart};
use crate::relay::client::{Client, ProcessEvent};
use crate::relay::process_tree::MARK;
use crate::workspace::pool::Use;

pub(super) const DESCRIPTION: &str = "Run a command synchronously.";

/// Events kept for one that should come before them; each carries at most 8 KiB.
const EARLY_EVENTS_MAX: usize = 1024;

/// How long the last output of an ended process may take; one that the executor cannot end must not hold the answer.
const LAST_OUTPUT_WAIT: Duration = Duration::from_secs(5);

/// Arguments of `shell`.
#[derive(Deserialize, JsonSchema)]
pub(super) struct Arguments {
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

pub(super) async fn call(mut call: Call) -> Result<ToolResult, ToolError> {
    let Arguments { command, cwd, env, timeout_ms } = call.arguments()?;
    let mut env = env.unwrap_or_default();
    check_env(&env)?;
    let deadline = call.deadline(timeout_ms)?;
    let client = call.client(Use::Processes, deadline).await?;
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
        env_policy: Some(EnvPolicy::commands(&call.settings.env_exclude)),
        sandbox: None,
    };
    run(&client, start, deadline, call.started, call.settings.output_bytes_max).await
}

async fn run(
    client: &Client,
    start: ProcessStart,
    deadline: Instant,
    started: Instant,
    output_bytes_max: usize,
) -> Result<ToolResult, ToolError> {
    let output = Output::new(output_bytes_max);
    // Before the start is sent: a quick process is over before its start is answered.
    let _events = client.subscribe(&start.process_id, output.handler());
    let process = Process::new(client, &start.process_id);
    match tokio::time::timeout_at(deadline, client.call(&start)).await {
        Err(_) => return Err(ToolError::NoAnswer { ran: Ran::Unknown }),
        Ok(answer) => {
            if let Err(error) = refused(answer)? {
                process.gone();
                return Ok(failure(Tool::Shell, &error));
            }
        }
    }
    let timed_out = tokio::select! {
        biased;
        () = output.closed() => false,
        () = client.ended() => return Err(ToolError::Lost { ran: Ran::Unknown }),
        () = tokio::time::sleep_until(deadline) => true,
    };
    if timed_out {
        process.end().await?;
        // Nothing is left that could write; what it has written is still on its way.
        let _ = timeout(LAST_OUTPUT_WAIT, output.closed()).await;
    } else {
        process.gone();
    }
    Ok(output.take().into_result(timed_out, started.elapsed()))
}

/// What a process has written so far, filled by the stream's task.
struct Output {
    collected: Arc<Mutex<Collected>>,
    closed: watch::Receiver<bool>,
    close: watch::Sender<bool>,
}

#[derive(Default)]
struct Collected {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    bytes_max: usize,
    lost_bytes: u64,
    exit_code: Option<i32>,
    /// Number of the newest event that was taken in.
    newest: u64,
    /// Events by their number that came before one of a smaller number.
    early: BTreeMap<u64, ProcessEvent>,
}

impl Output {
    fn new(bytes_max: usize) -> Self {
        let (close, closed) = watch::channel(false);
        Self { collected: Arc::new(Mutex::new(Collected { bytes_max, ..Collected::default() })), closed, close }
    }

    fn handler(&self) -> crate::relay::client::ProcessHandler {
        let collected = self.collected.clone();
        let close = self.close.clone();
        Box::new(move |event| {
            if lock(&collected).take_in(event) {
                close.send_replace(true);
            }
        })
    }

    async fn closed(&self) {
        // The sender lives in self, so this only returns when the value is true.
        let _ = self.closed.clone().wait_for(|closed| *closed).await;
    }

    fn take(&self) -> Collected {
        std::mem::take(&mut *lock(&self.collected))
    }
}

fn lock(collected: &Mutex<Collected>) -> MutexGuard<'_, Collected> {
    collected.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The structured part of the answer, but for stdout and stderr.
#[derive(Serialize)]
struct Structured {
    exit_code: Option<i32>,
    timed_out: bool,
    duration_ms: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    stdout_b64: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stderr_b64: Option<String>,
    /// Bytes that the command wrote past the bound of one answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    lost_bytes: Option<u64>,
}

impl Collected {
    /// Takes events in the order of their numbers, since the end may arrive before the exit or the last output. True
    /// when nothing more will come.
    fn take_in(&mut self, event: ProcessEvent) -> bool {
        self.early.insert(event.seq(), event);
        if self.early.len() > EARLY_EVENTS_MAX
            && let Some((first, _)) = self.early.first_key_value()
        {
            // An executor that skips numbers: what is there counts.
            self.newest = first - 1;
        }
        let mut closed = false;
        while let Some(event) = self.early.remove(&(self.newest + 1)) {
            self.newest += 1;
            match event {
                ProcessEvent::Output(output) => self.add(output.stream, &output.chunk.0),
                ProcessEvent::Exited(exited) => self.exit_code = Some(exited.exit_code),
                ProcessEvent::Closed(_) => closed = true,
            }
        }
        closed
    }

    fn add(&mut self, stream: OutputStream, chunk: &[u8]) {
        let room = self.bytes_max.saturating_sub(self.stdout.len() + self.stderr.len());
        let (kept, lost) = chunk.split_at(chunk.len().min(room));
        self.lost_bytes += lost.len() as u64;
        match stream {
            OutputStream::Stderr => self.stderr.extend_from_slice(kept),
            OutputStream::Stdout | OutputStream::Pty => self.stdout.extend_from_slice(kept),
        }
    }

    fn into_result(self, timed_out: bool, duration: Duration) -> ToolResult {
        let (stdout, stdout_b64) = text_and_exact(self.stdout);
        let (stderr, stderr_b64) = text_and_exact(self.stderr);
        let exit_code = self.exit_code.filter(|_| !timed_out);
        let structured = Structured {
            exit_code,
            timed_out,
            duration_ms: u64::try_from(duration.as_millis()).unwrap_or(u64::MAX),
            stdout_b64,
            stderr_b64,
            lost_bytes: (self.lost_bytes > 0).then_some(self.lost_bytes),
        };
        let mut structured = serde_json::to_value(structured).expect("plain data");
        let mut text = String::with_capacity(stdout.len() + stderr.len() + 64);
        text.push_str(&stdout);
        if !stderr.is_empty() {
            if !text.is_empty() {
                text.push_str("\n--- stderr ---\n");
            }
            text.push_str(&stderr);
        }
        if self.lost_bytes > 0 {
            text.push_str(&format!("\n[{} bytes of output past the bound of one answer]", self.lost_bytes));
        }
        match exit_code {
            Some(code) => text.push_str(&format!("\n[exit_code={code}]")),
            None => text.push_str("\n[exec timed out without exit signal]"),
        }
        // Moved in, not serialised like the rest: they may have many megabytes.
        structured["stdout"] = stdout.into();
        structured["stderr"] = stderr.into();
        ToolResult {
            content: vec![Content::Text { text }],
            structured_content: Some(structured),
            is_error: exit_code.is_none(),
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::rpc::{Base64Bytes, ProcessClosed, ProcessExited, ProcessOutput};

    fn output(seq: u64, text: &str) -> ProcessEvent {
        let chunk = Base64Bytes(text.into());
        ProcessEvent::Output(ProcessOutput { process_id: String::new(), seq, stream: OutputStream::Stdout, chunk })
    }

    #[test]
    fn an_end_that_overtakes_the_exit_and_the_last_output_waits_for_them() {
        let mut collected = Collected { bytes_max: 100, ..Collected::default() };
        let exited = ProcessExited { process_id: String::new(), seq: 3, exit_code: 7, sandbox_denied: false };
        assert!(!collected.take_in(ProcessEvent::Closed(ProcessClosed { process_id: String::new(), seq: 4 })));
        assert!(!collected.take_in(output(2, "b")));
        assert!(!collected.take_in(output(1, "a")));
        assert!(collected.take_in(ProcessEvent::Exited(exited)));
        assert_eq!((collected.stdout.as_slice(), collected.exit_code), (&b"ab"[..], Some(7)));
    }
}
