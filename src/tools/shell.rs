//! `shell`: one command to its end, with all its output (connectors-api.md §4.1).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::{Instant, timeout, timeout_at};

use super::command::{Command, check_env};
use super::process::Process;
use super::{Call, Tool, ToolError, WayBack, failure, resolve};
use crate::protocol::rest::{Content, Ran, ToolResult};
use crate::protocol::rpc::{EnvPolicy, OutputStream, ProcessOutputPage, ProcessStart};
use crate::relay::client::{CallError, Client, ProcessEvent, ProcessHandler};
use crate::relay::process_events::{Happened, ProcessEvents};
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
    run(&call, client, &start, deadline).await
}

/// How far the start has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Start {
    /// No part of it was sent.
    Unsent,
    /// It may have arrived.
    Unanswered,
    /// The process has begun.
    Begun,
}

async fn run(
    call: &Call,
    mut client: Client,
    start: &ProcessStart,
    deadline: Instant,
) -> Result<ToolResult, ToolError> {
    let id = &start.process_id;
    let output = Output::new(call.settings.output_bytes_max);
    let mut process = Process::new(&call.workspace, &call.binding, &client, id);
    let mut way = call.way_back(Use::Processes, deadline);
    let mut begun = Start::Unsent;
    let timed_out = loop {
        // Before the start is sent: a quick process is over before its start is answered.
        let _events = client.subscribe(id, output.handler());
        let followed = timeout_at(deadline, follow(&client, start, &mut begun, &output, &mut way)).await;
        let lost = match followed {
            Ok(Ok(())) => {
                process.gone();
                break false;
            }
            // All of it is here; only the answer to the start is not.
            Ok(Err(CallError::Lost { .. })) if output.is_whole() => {
                process.gone();
                break false;
            }
            Ok(Err(CallError::Rpc(refusal))) => {
                process.gone();
                if begun != Start::Begun {
                    return Ok(failure(Tool::Shell, &refusal));
                }
                // It is asked for what it has of the process, and has forgotten it.
                return Err(ToolError::Lost { ran: Ran::Unknown });
            }
            Ok(Err(CallError::Lost { sent })) => sent || begun != Start::Unsent,
            Ok(Err(error)) => return Err(error.into()),
            Err(_) if begun == Start::Begun => {
                process.end().await?;
                // Nothing is left that could write; what it has written is still on its way.
                let _ = timeout(LAST_OUTPUT_WAIT, follow(&client, start, &mut begun, &output, &mut way)).await;
                break true;
            }
            Err(_) => return Err(ToolError::NoAnswer { ran: Ran::Unknown }),
        };
        let next = way.find(&client, lost).await?;
        if begun != Start::Unsent && !next.continues(&client) {
            process.gone();
            return Err(ToolError::Lost { ran: Ran::Unknown });
        }
        process.moved_to(&next);
        output.interrupted();
        client = next;
    };
    Ok(output.take().into_result(timed_out, call.started.elapsed()))
}

/// Starts the process unless that is done, and follows it to its end. After a loss the same start is sent again, or the
/// executor's ring is read, in the same executor session.
async fn follow(
    client: &Client,
    start: &ProcessStart,
    begun: &mut Start,
    output: &Output,
    way: &mut WayBack<'_>,
) -> Result<(), CallError> {
    if *begun != Start::Begun {
        match client.call(start).await {
            Ok(_) => {}
            // It was sent before the link was lost, and had arrived.
            Err(CallError::Rpc(refusal)) if *begun == Start::Unanswered && refusal.is_known_process() => {}
            Err(error) => {
                if let CallError::Lost { sent: true } = error {
                    *begun = Start::Unanswered;
                }
                return Err(error);
            }
        }
        *begun = Start::Begun;
        way.got_on();
    }
    loop {
        let stage = tokio::select! {
            biased;
            stage = output.news() => stage,
            () = client.ended() => return Err(CallError::Lost { sent: true }),
        };
        if stage == Stage::Closed {
            return Ok(());
        }
        output.merge(client.read_process(&start.process_id, output.newest()).await?);
        way.got_on();
    }
}

/// What a process has written so far, filled by the stream's task.
struct Output {
    collected: Arc<Mutex<Collected>>,
    stage: watch::Sender<Stage>,
}

/// Where the output stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// More comes by itself.
    Live,
    /// Something is missing that the executor's ring may still have.
    Behind,
    /// Nothing more will come.
    Closed,
}

#[derive(Default)]
struct Collected {
    events: ProcessEvents,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    bytes_max: usize,
    lost_bytes: u64,
    lost_chunks: u64,
    exit_code: Option<i32>,
    closed: bool,
    /// Whether events may have passed unseen since the newest one.
    interrupted: bool,
    /// Greatest number of an event that there was no room to keep until its turn.
    dropped: u64,
}

impl Output {
    fn new(bytes_max: usize) -> Self {
        let collected = Collected { bytes_max, ..Collected::default() };
        Self { collected: Arc::new(Mutex::new(collected)), stage: watch::Sender::new(Stage::Live) }
    }

    fn handler(&self) -> ProcessHandler {
        let (collected, stage) = (self.collected.clone(), self.stage.clone());
        Box::new(move |event| change(&collected, &stage, |collected| collected.keep(event)))
    }

    /// The link was lost: what comes next is behind something unseen.
    fn interrupted(&self) {
        change(&self.collected, &self.stage, |collected| {
            collected.interrupted = true;
            collected.events.forget_waiting();
        });
    }

    fn merge(&self, page: ProcessOutputPage) {
        change(&self.collected, &self.stage, |collected| collected.merge(page));
    }

    fn newest(&self) -> u64 {
        lock(&self.collected).events.newest()
    }

    fn is_whole(&self) -> bool {
        *self.stage.borrow() == Stage::Closed
    }

    /// Waits until more does not come by itself.
    async fn news(&self) -> Stage {
        // The sender lives in self, so an error cannot happen.
        let mut stage = self.stage.subscribe();
        stage.wait_for(|stage| *stage != Stage::Live).await.map_or(Stage::Closed, |stage| *stage)
    }

    fn take(&self) -> Collected {
        let mut collected = std::mem::take(&mut *lock(&self.collected));
        let rest = collected.events.rest();
        collected.take_in(rest);
        collected
    }
}

fn change(collected: &Mutex<Collected>, stage: &watch::Sender<Stage>, change: impl FnOnce(&mut Collected)) {
    let mut collected = lock(collected);
    change(&mut collected);
    let now = collected.stage();
    // While it is locked, so that an older stage never replaces a newer one.
    stage.send_if_modified(|stage| std::mem::replace(stage, now) != now);
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
    /// Chunks that the executor no longer had when its link was back.
    #[serde(skip_serializing_if = "Option::is_none")]
    lost_chunks: Option<u64>,
}

impl Collected {
    fn stage(&self) -> Stage {
        match self {
            Self { closed: true, .. } => Stage::Closed,
            _ if self.interrupted || self.dropped > self.events.newest() => Stage::Behind,
            _ => Stage::Live,
        }
    }

    fn keep(&mut self, event: ProcessEvent) {
        if self.events.waiting() >= EARLY_EVENTS_MAX && event.seq() != self.events.newest() + 1 {
            self.dropped = self.dropped.max(event.seq());
            return;
        }
        self.events.keep(event);
        self.take_in_ready();
    }

    fn merge(&mut self, page: ProcessOutputPage) {
        self.interrupted = false;
        let happened = self.events.merge(page);
        self.take_in(happened);
        self.take_in_ready();
    }

    fn take_in_ready(&mut self) {
        while let Some(event) = self.events.next() {
            self.take_in([event]);
        }
    }

    fn take_in(&mut self, happened: impl IntoIterator<Item = Happened>) {
        for event in happened {
            match event {
                Happened::Output { stream, bytes, .. } => self.add(stream, &bytes),
                Happened::Missing { chunks, .. } => self.lost_chunks += chunks,
                Happened::Exited { code } => self.exit_code = code.or(self.exit_code),
                Happened::Closed => self.closed = true,
            }
        }
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
            lost_chunks: (self.lost_chunks > 0).then_some(self.lost_chunks),
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
        if self.lost_chunks > 0 {
            text.push_str(&format!("\n[{} chunks of output lost while the executor was away]", self.lost_chunks));
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
    use crate::protocol::rpc::{Base64Bytes, ProcessChunk, ProcessOutput};

    fn output(seq: u64) -> ProcessEvent {
        let chunk = Base64Bytes(vec![b'x']);
        ProcessEvent::Output(ProcessOutput { process_id: String::new(), seq, stream: OutputStream::Stdout, chunk })
    }

    #[test]
    fn more_than_may_wait_is_fetched_from_the_ring() {
        let mut collected = Collected { bytes_max: 10_000, ..Collected::default() };
        for seq in 2..2000 {
            collected.keep(output(seq));
        }
        assert_eq!((collected.events.waiting(), collected.stage()), (EARLY_EVENTS_MAX, Stage::Behind));
        let chunk = |seq| ProcessChunk { seq, stream: OutputStream::Stdout, chunk: Base64Bytes(vec![b'x']) };
        let page = |seqs: std::ops::Range<u64>| ProcessOutputPage {
            next_seq: seqs.end,
            chunks: seqs.map(chunk).collect(),
            exited: false,
            exit_code: None,
            closed: false,
            failure: None,
            sandbox_denied: false,
        };
        collected.merge(page(1..3));
        assert_eq!((collected.stdout.len(), collected.stage()), (EARLY_EVENTS_MAX + 1, Stage::Behind));
        collected.merge(page(1500..2000));
        assert_eq!((collected.stdout.len(), collected.stage()), (EARLY_EVENTS_MAX + 501, Stage::Live));
        assert_eq!(collected.lost_chunks, 1500 - (EARLY_EVENTS_MAX as u64 + 2));
    }
}
