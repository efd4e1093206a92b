//! Calls: one tool call, by whichever door it came: who may make it, its place, its end when the right to it ends, its
//! outcome in the metrics.

use std::sync::Arc;

use hyper::HeaderMap;
use serde_json::Value;
use tokio::sync::watch;
use tokio::time::Instant;
use zeroize::Zeroizing;

use super::Api;
use super::audited;
use super::error::ApiError;
use crate::audit::Act;
use crate::auth::{AuthError, Principal, Revocations, bearer};
use crate::ops::memory::Held;
use crate::protocol::rest::{Ran, ToolResult};
use crate::timing::Timing;
use crate::tools::{Call, Effect, Progress, Tool};
use crate::workspace::{CallPlace, Workspace};

/// What the audit calls a tool call.
pub(super) const TOOL_CALL: &str = "tool.call";

/// Tools that are carried out also while the process is short of memory: they look, or let a running process go on.
const FRUGAL: [&str; 5] = ["list_environments", "list_processes", "read_output", "write_stdin", "terminate"];

/// A caller that is known, and its place among the calls of its workspace.
pub(super) struct Admitted {
    pub(super) principal: Principal,
    pub(super) workspace: Arc<Workspace>,
    /// The call as it is recorded, so far.
    pub(super) act: Act,
    timing: Timing,
    pub(super) right: Right,
    pub(super) place: Option<CallPlace>,
    /// Memory that the request holds.
    pub(super) held: Arc<Held>,
}

/// The right under which a call runs.
pub(super) struct Right {
    bearer: Zeroizing<String>,
    revocations: Revocations,
}

impl Right {
    /// Waits for the end of the right, and says why it ended.
    pub(super) async fn ended(self) -> AuthError {
        self.revocations.end_of(&self.bearer).await
    }
}

/// What a caller wants done.
pub(super) struct Order {
    /// The tool, as [`Admitted::tool`] gave it.
    pub(super) tool: &'static Tool,
    /// Where, as the caller named it.
    pub(super) environment: Option<String>,
    /// The caller's `Idempotency-Key`.
    pub(super) key: Option<String>,
    /// Arguments of the tool.
    pub(super) arguments: Value,
    /// Bytes of text that the caller takes in one answer; `None` takes all.
    pub(super) text_bytes_max: Option<usize>,
    /// Told how far the call has come.
    pub(super) progress: Option<watch::Sender<Progress>>,
}

impl Admitted {
    /// Checks the caller's credential and takes a place: before the body is read, so that what waits is bounded.
    ///
    /// # Errors
    /// [`ApiError`] of the gateway that drains, of the credential, or 429 `too_many_calls`.
    pub(super) async fn admit(api: &Api, headers: &HeaderMap, timing: Timing) -> Result<Self, ApiError> {
        let mut known = Self::known(api, TOOL_CALL, headers, timing).await?;
        known.take_place(api)?;
        Ok(known)
    }

    /// Checks the credential of a caller who is about to do `action`, as the audit calls it.
    ///
    /// # Errors
    /// [`ApiError`] of the gateway that drains, or of the credential.
    pub(super) async fn known(
        api: &Api,
        action: &'static str,
        headers: &HeaderMap,
        timing: Timing,
    ) -> Result<Self, ApiError> {
        api.refuse_while_draining()?;
        let revocations = api.corridor.auth.revocations();
        let bearer = Zeroizing::new(bearer(headers)?.to_owned());
        let principal = timing.auth(api.corridor.auth.principal(&bearer)).await?;
        let workspace = api.workspaces.get(&principal);
        let act = audited::act(action, &principal, headers);
        let held = api.memory.hold();
        Ok(Self { principal, workspace, act, timing, right: Right { bearer, revocations }, place: None, held })
    }

    /// Takes a place among the calls of the workspace.
    ///
    /// # Errors
    /// 429 `rate_limited` or `too_many_calls`.
    pub(super) fn take_place(&mut self, api: &Api) -> Result<(), ApiError> {
        api.pace(&self.workspace)?;
        self.place = Some(self.workspace.begin_call()?);
        Ok(())
    }

    /// The tools that the caller may call.
    pub(super) fn tools(&self) -> impl Iterator<Item = &'static Tool> {
        let read_only = self.principal.scopes().read_only;
        self.workspace.tools().iter().copied().filter(move |tool| may_call(read_only, tool))
    }

    /// The tool of that name.
    ///
    /// # Errors
    /// 400 `unknown_tool`; 403 `forbidden` where the caller may only read and the tool does more.
    pub(super) fn tool(&self, name: &str) -> Result<&'static Tool, ApiError> {
        let tool = self.workspace.tools().iter().copied().find(|tool| tool.name() == name);
        let tool = tool.ok_or_else(|| ApiError::new(400, "unknown_tool", format!("no such tool: {name}")))?;
        if may_call(self.principal.scopes().read_only, tool) {
            return Ok(tool);
        }
        Err(ApiError::new(403, "forbidden", format!("the token may only read, and {name} does more")))
    }

    /// What the tools, or the streams of a file, are given of it; it began now.
    pub(super) fn call(&self, api: &Api) -> Call {
        Call {
            workspace: self.workspace.clone(),
            settings: api.tools.now(),
            started: Instant::now(),
            sessions: api.sessions.clone(),
            key: None,
            draining: api.draining.clone(),
            progress: None,
            text_bytes_max: None,
            timing: self.timing.clone(),
            held: self.held.clone(),
        }
    }

    /// Runs the call to its end, or to that of the caller's right. Dropping the future ends what it started on the
    /// executor.
    ///
    /// # Errors
    /// [`ApiError`] where there is no result of the tool.
    pub(super) async fn run(self, api: Arc<Api>, order: Order) -> Result<ToolResult, ApiError> {
        let Order { tool, environment, key, arguments, text_bytes_max, progress } = order;
        if !FRUGAL.contains(&tool.name()) {
            api.memory.admit()?;
        }
        let call = Call { key, text_bytes_max, progress, ..self.call(&api) };
        let started = call.started;
        let Self { principal: _, workspace: _, act, timing: _, right, place, held: _ } = self;
        // One that cannot be found is told as the result, and recorded by the name that the caller gave.
        let binding = tool.environment(&call, environment.as_deref()).await;
        let act = match &binding {
            Ok(Some(binding)) => act.at(binding.name().as_str()).on(binding.executor()),
            Ok(None) => act,
            Err(_) => environment.iter().fold(act, |act, name| act.at(name)),
        };
        let (entry, bytes_in) = audited::tool_call(&api, act, tool, &arguments).await?;
        let work = async { tool.call(&call, binding?.as_ref(), arguments).await };
        let result = tokio::select! {
            result = work => result.map_err(ApiError::from),
            refused = right.ended() => Err(ApiError::from(refused).with_ran(Ran::Unknown)),
        };
        drop(place);
        if let Some(entry) = entry {
            entry.end(audited::outcome(&result, bytes_in));
        }
        let outcome = match &result {
            Ok(result) if result.is_error => "failed",
            Ok(_) => "ok",
            Err(error) => error.code(),
        };
        api.metrics.calls.inc([tool.name(), outcome]);
        api.metrics.call_duration.observe([tool.name()], started.elapsed());
        result
    }
}

fn may_call(read_only: bool, tool: &Tool) -> bool {
    !read_only || tool.effect() == Effect::Reads
}

/// An error as the result of a tool, where the status is sent already or the door has no other way to tell it.
pub(super) fn failure(error: &ApiError) -> ToolResult {
    let mut structured = serde_json::json!({ "code": error.code() });
    if let Some(ran) = error.ran() {
        structured["ran"] = serde_json::json!(ran);
    }
    if let Some(secs) = error.retry_after_secs() {
        structured["retry_after_secs"] = secs.into();
    }
    ToolResult { structured_content: Some(structured), ..ToolResult::error(error.message()) }
}
