//! `read_output`: what a process session has written (connectors-api.md §4.6).

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::{Call, Effect, Run, Tool, ToolError, parse, session, success};
use crate::protocol::rest::ToolResult;
use crate::session::view::{self, Chunk, Wish};

/// Bytes of one answer that names no bound: what a model reads at once.
const BYTES: usize = 48 * 1024;

/// How long an answer waits for something new where the caller does not say.
const YIELD: Duration = Duration::from_secs(1);

pub(super) const TOOL: Tool = Tool {
    name: "read_output",
    description: "Read what a process started by exec_command has written, from after_seq on, stdout and stderr in the \
                  order in which they came. Waits up to yield_time_ms (25000 at most) while there is nothing new. Call \
                  again with after_seq = next_seq for what follows; all was read when session_alive is false. Reading \
                  takes nothing away, and works after the end of the process too.",
    effect: Effect::Reads,
    input: |schemas| schemas.root_schema_for::<Arguments>(),
    output: |schemas| schemas.root_schema_for::<Output>(),
    run: Run::Workspace(|call, arguments| Box::pin(async move { read(call, parse(arguments)?).await })),
};

/// Arguments of `read_output`.
#[derive(Deserialize, JsonSchema)]
struct Arguments {
    /// As returned by exec_command.
    session_id: String,
    /// The environment of the session; not needed.
    #[serde(default)]
    environment_id: Option<String>,
    /// Read what follows this number; 0 or left out is from the beginning.
    #[serde(default)]
    after_seq: u64,
    /// How long to wait for something new, in milliseconds; 1000 when left out, 25000 at most.
    #[serde(default)]
    yield_time_ms: Option<u64>,
    /// Bytes of output to return at most, in whole chunks but at least one; 49152 when left out.
    #[serde(default)]
    max_bytes: Option<usize>,
    /// Whether to return the bytes of each chunk in base64 as well.
    #[serde(default)]
    chunks: bool,
}

/// The structured part of the answer.
#[derive(Serialize, JsonSchema)]
struct Output<'a> {
    /// The output as text.
    text: String,
    /// Give this as after_seq for what follows.
    next_seq: u64,
    /// Whether more can be read at once.
    more: bool,
    /// Whether more may come: the process runs, or not all of its output was read.
    session_alive: bool,
    /// The exit code, once all output was read.
    exit_code: Option<i32>,
    /// `running`, or how it ended once all output was read: `exited`, `lost`, `failed` or `unknown`.
    state: &'static str,
    /// What is known about an end without exit code.
    #[serde(skip_serializing_if = "Option::is_none")]
    detail: Option<String>,
    /// Whether some output can no longer be read.
    truncated: bool,
    /// How many bytes that is.
    lost_bytes: u64,
    /// The bytes of each chunk, where they were asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    chunks: Option<Vec<Chunk<'a>>>,
}

async fn read(call: &Call, arguments: Arguments) -> Result<ToolResult, ToolError> {
    let Arguments { session_id, environment_id, after_seq, yield_time_ms, max_bytes, chunks } = arguments;
    let session = session::find(call, &session_id, environment_id.as_deref())?;
    let settings = call.sessions.settings();
    let bytes_max = max_bytes.unwrap_or(BYTES).clamp(1, settings.page_bytes_max);
    let wait = yield_time_ms.map_or(YIELD, Duration::from_millis).min(Duration::from_secs(settings.wait_max_secs));
    let wish = Wish { since: after_seq, tag: None, offset: None, bytes_max };
    let (status, page) = session.next_page(wish, Instant::now() + wait, &call.draining).await?;
    let over = status.state.is_final() && page.end;
    let journal = session.journal().clone();
    let (page, text) = view::read(move || {
        let text = view::text(&journal, &page, over)?;
        Ok((page, text))
    })
    .await?;
    let lost_bytes = session.lost_bytes(None);
    let exit_code = status.exit_code.filter(|_| over);
    let state = if over { status.state.as_str() } else { "running" };
    let told = match exit_code {
        Some(code) => format!("{text}\n[exit_code={code}]"),
        None => format!("{text}\n[{state}; next_seq={}]", page.next_seq),
    };
    let output = Output {
        text,
        next_seq: page.next_seq,
        more: !page.end,
        session_alive: !over,
        exit_code,
        state,
        detail: status.detail.filter(|_| over),
        truncated: lost_bytes > 0,
        lost_bytes,
        chunks: chunks.then(|| view::chunks(&page)),
    };
    Ok(success(told, &output))
}
