//! The tools of a workspace: a closed list with schemas, and one dispatch.
//!
//! A tool that ran and failed is a [`ToolResult`] with `is_error`; a [`ToolError`] says that it did not get that far.

mod apply_patch;
mod command;
mod exec_command;
mod execution;
mod files;
mod list_environments;
mod list_processes;
mod patch;
mod process;
mod read_output;
mod script;
mod session;
mod shell;
mod terminate;
mod write_stdin;

pub use files::{Copies, Download, Failure, FileError, Upload, Uploaded};

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use schemars::Schema;
use schemars::generate::{SchemaGenerator, SchemaSettings};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::config;
use crate::ops::memory::{Held, Overloaded};
use crate::protocol::path::{FileUri, PathError};
use crate::protocol::rest::{Ran, ToolInfo, ToolResult};
use crate::protocol::rpc::{self, EnvironmentInfo, RpcError};
use crate::relay::client::{CallError, Client};
use crate::session::{SessionError, Sessions, StdinError};
use crate::store::Binding;
use crate::timing::Timing;
use crate::workspace::pool::{Pool, Use};
use crate::workspace::{ReachError, Workspace};

/// Pause before a call that was cut off again, with nothing to show for it since, is tried another time.
const RELINK_PAUSE: Duration = Duration::from_millis(100);
const RELINK_PAUSE_MAX: Duration = Duration::from_secs(2);

/// One tool: what callers are told about it, and what it does.
pub struct Tool {
    name: &'static str,
    /// Written for a model: what it does, its limits, what comes back.
    description: &'static str,
    effect: Effect,
    input: fn(&mut SchemaGenerator) -> Schema,
    output: fn(&mut SchemaGenerator) -> Schema,
    run: Run,
}

/// What a tool may do to what is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Nothing: a token that only reads may call it.
    Reads,
    /// It adds, and takes nothing away.
    Adds,
    /// It may replace, remove or end something.
    Destroys,
}

/// How a tool runs: at one environment, or for the workspace as a whole.
enum Run {
    At(for<'a> fn(Site<'a>, Value) -> Running<'a>),
    Workspace(for<'a> fn(&'a Call, Value) -> Running<'a>),
}

type Running<'a> = Pin<Box<dyn Future<Output = Result<ToolResult, ToolError>> + Send + 'a>>;

/// One call of a tool, as a door hands it in.
#[derive(Clone)]
pub struct Call {
    /// Who calls.
    pub workspace: Arc<Workspace>,
    /// Bounds and times.
    pub settings: Arc<config::Tools>,
    /// When the call arrived: its timeout counts from here.
    pub started: Instant,
    /// Processes that outlive the call.
    pub sessions: Arc<Sessions>,
    /// The caller's `Idempotency-Key`.
    pub key: Option<String>,
    /// Cancelled when the gateway stops: nobody waits any longer for what the next one can tell as well.
    pub draining: CancellationToken,
    /// Told how far a long call has come, where the caller wants to know.
    pub progress: Option<watch::Sender<Progress>>,
    /// Bytes of text that the caller takes in one answer, as models do; `None` takes all.
    pub text_bytes_max: Option<usize>,
    /// Where the time of the request goes.
    pub timing: Timing,
    /// Memory that the request holds.
    pub held: Arc<Held>,
}

/// How far a long call has come, in the unit of its tool (bytes for `copy_path`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// What is done; it never goes back.
    pub done: u64,
    /// What there is to do, once that is known.
    pub total: Option<u64>,
}

/// One environment as one call works at it.
#[derive(Clone, Copy)]
pub(super) struct Site<'a> {
    call: &'a Call,
    binding: &'a Binding,
}

/// Why a tool did not run to a result.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// The arguments do not fit; the text names the field and what was expected.
    #[error("{0}")]
    Arguments(String),
    /// The executor was not reached.
    #[error(transparent)]
    Reach(#[from] Arc<ReachError>),
    /// There is no memory for what the call would return; nothing was begun.
    #[error(transparent)]
    Overloaded(#[from] Overloaded),
    /// The connection to the executor was lost.
    #[error("the connection to the executor was lost during the call")]
    Lost {
        /// Whether the call may have run.
        ran: Ran,
    },
    /// The executor is connected and does not answer.
    #[error("the executor did not answer in time")]
    NoAnswer {
        /// Whether the call may have run.
        ran: Ran,
    },
    /// It failed at one of its two executors.
    #[error("{end}: {error}")]
    End {
        /// Which one, as the tool's arguments call it.
        end: &'static str,
        /// What failed there.
        error: Box<ToolError>,
    },
    /// A process session is not there or could not be started.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// Bytes for a process were not accepted.
    #[error(transparent)]
    Stdin(#[from] StdinError),
    /// The executor's answer makes no sense.
    #[error("the executor's answer is malformed")]
    Malformed(#[source] serde_json::Error),
}

impl Tool {
    /// Every tool, those of the original first and in its order.
    pub const ALL: &'static [&'static Self] = &[
        &shell::TOOL,
        &files::READ_FILE,
        &files::WRITE_FILE,
        &apply_patch::TOOL,
        &files::COPY_PATH,
        &exec_command::TOOL,
        &write_stdin::TOOL,
        &read_output::TOOL,
        &terminate::TOOL,
        &list_processes::TOOL,
        &list_environments::TOOL,
        &files::EDIT_FILE,
        &files::LIST_DIRECTORY,
        &files::FIND_FILES,
        &files::SEARCH_FILES,
        &files::STAT,
        &files::MAKE_DIRECTORY,
        &files::REMOVE_PATH,
        &files::MOVE_PATH,
    ];

    /// The tool of that name.
    pub fn named(name: &str) -> Option<&'static Self> {
        Self::ALL.iter().copied().find(|tool| tool.name == name)
    }

    /// Its name on the wire.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// What models are told about it.
    pub fn description(&self) -> &'static str {
        self.description
    }

    /// What it may do to what is there.
    pub fn effect(&self) -> Effect {
        self.effect
    }

    /// Whether it works at one environment, rather than in the workspace as a whole.
    pub fn needs_environment(&self) -> bool {
        matches!(self.run, Run::At(_))
    }

    /// JSON schema of its arguments.
    pub fn input_schema(&self) -> Value {
        schema(SchemaSettings::for_deserialize, self.input)
    }

    /// JSON schema of the structured part of its answer, where it did not fail.
    pub fn output_schema(&self) -> Value {
        schema(SchemaSettings::for_serialize, self.output)
    }

    /// What callers are told about it.
    fn info(&self) -> ToolInfo {
        ToolInfo {
            name: self.name.into(),
            description: self.description.into(),
            kind: "core".into(),
            input_schema: Some(self.input_schema()),
        }
    }

    /// What callers are told about it, as JSON; made once, since every list of environments repeats it.
    pub fn info_json(&self) -> &'static RawValue {
        static INFOS: LazyLock<HashMap<&str, Box<RawValue>>> = LazyLock::new(|| {
            let info = |tool: &&Tool| (tool.name, to_raw_value(&tool.info()).expect("an info is plain data"));
            Tool::ALL.iter().map(info).collect()
        });
        &INFOS[self.name]
    }

    /// Where a call runs: at the environment of that name; without a name at the only environment or the default one,
    /// or in the workspace as a whole, where the tool works in that.
    ///
    /// # Errors
    /// [`ToolError::Reach`].
    pub async fn environment(&self, call: &Call, name: Option<&str>) -> Result<Option<Binding>, ToolError> {
        let binding = match name {
            Some(name) => call.workspace.environment(name).await,
            None if self.needs_environment() => call.workspace.default_environment().await,
            None => return Ok(None),
        };
        Ok(Some(binding.map_err(Arc::new)?))
    }

    /// Runs one call where [`Self::environment`] says. Dropping the future ends what it started on the executor.
    ///
    /// # Errors
    /// [`ToolError`].
    pub async fn call(
        &self,
        call: &Call,
        binding: Option<&Binding>,
        mut arguments: Value,
    ) -> Result<ToolResult, ToolError> {
        let running = match (&self.run, binding) {
            (Run::At(run), Some(binding)) => run(Site { call, binding }, arguments),
            (Run::At(_), None) => return Err(ToolError::Arguments("environment_id: expected a string".into())),
            (Run::Workspace(run), binding) => {
                if arguments.is_null() {
                    arguments = json!({});
                }
                if let (Some(binding), Some(arguments)) = (binding, arguments.as_object_mut()) {
                    arguments.insert("environment_id".into(), binding.name().as_str().into());
                }
                run(call, arguments)
            }
        };
        call.timing.executor(running).await
    }
}

/// The schema of a type as callers are given it: whole, without references, and as it is read or as it is written.
fn schema(contract: fn(SchemaSettings) -> SchemaSettings, of: fn(&mut SchemaGenerator) -> Schema) -> Value {
    let settings = contract(SchemaSettings::draft2020_12()).with(|settings| {
        settings.meta_schema = None;
        settings.inline_subschemas = true;
    });
    let mut schema = of(&mut settings.into_generator()).to_value();
    if let Some(schema) = schema.as_object_mut() {
        schema.remove("title");
    }
    forget_widths(&mut schema);
    schema
}

/// Takes out how wide Rust's numbers are: JSON schema knows no such formats, and clients complain about them.
pub fn forget_widths(schema: &mut Value) {
    match schema {
        Value::Object(members) => {
            let is_width = |format: &Value| format.as_str().is_some_and(|format| format.contains("int"));
            if members.get("format").is_some_and(is_width) {
                members.remove("format");
            }
            members.values_mut().for_each(forget_widths);
        }
        Value::Array(values) => values.iter_mut().for_each(forget_widths),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// The arguments as the tool's own type.
fn parse<T: DeserializeOwned>(arguments: Value) -> Result<T, ToolError> {
    let arguments = match arguments {
        Value::Null => Value::Object(serde_json::Map::new()),
        // serde reads a struct from an array too, member by member.
        Value::Array(_) => return Err(ToolError::Arguments("arguments: expected an object".into())),
        arguments => arguments,
    };
    serde_path_to_error::deserialize(arguments).map_err(|error| {
        let path = error.path().to_string();
        ToolError::Arguments(if path == "." {
            format!("arguments: {}", error.inner())
        } else {
            format!("{path}: {}", error.inner())
        })
    })
}

impl Call {
    /// Tells who wants to know how far it has come.
    fn progressed(&self, done: u64, total: u64) {
        if let Some(progress) = &self.progress {
            progress.send_replace(Progress { done, total: Some(total) });
        }
    }

    /// When a call that may take `timeout_ms` is over.
    fn deadline(&self, timeout_ms: Option<u64>) -> Result<Instant, ToolError> {
        let max = Duration::from_secs(self.settings.timeout_max_secs);
        let timeout = timeout_ms.map_or(Duration::from_secs(self.settings.timeout_secs), Duration::from_millis);
        if timeout.is_zero() || timeout > max {
            return Err(ToolError::Arguments(format!("timeout_ms: expected 1 to {}", max.as_millis())));
        }
        Ok(self.started + timeout)
    }
}

impl<'a> Site<'a> {
    /// A ready client of the environment's executor.
    async fn client(self, purpose: Use, deadline: Instant) -> Result<Client, ToolError> {
        let Self { call, binding } = self;
        let client = Pool::client(&call.workspace, binding, purpose);
        match call.timing.queue(tokio::time::timeout_at(deadline, client)).await {
            Ok(client) => Ok(client?),
            Err(_) if call.workspace.corridor().registry.link(binding).is_none() => {
                Err(Arc::new(ReachError::NotConnected(binding.name().to_string())).into())
            }
            Err(_) => Err(ToolError::NoAnswer { ran: Ran::No }),
        }
    }

    fn way_back(self, purpose: Use, deadline: Instant) -> WayBack<'a> {
        let left = Duration::from_secs(self.call.settings.relink_wait_secs);
        WayBack { site: self, purpose, deadline, left, pause: Duration::ZERO, ran: Ran::No }
    }
}

/// How a call finds its executor again after the loss of a link.
struct WayBack<'a> {
    site: Site<'a>,
    purpose: Use,
    deadline: Instant,
    /// How long it may still wait since it last got on.
    left: Duration,
    /// Before the next try: an executor that breaks every conversation is not asked without end.
    pause: Duration,
    /// Whether anything of the call may have run.
    ran: Ran,
}

impl WayBack<'_> {
    /// The call has got on: the next loss is waited for in full.
    fn got_on(&mut self) {
        self.left = Duration::from_secs(self.site.call.settings.relink_wait_secs);
        self.pause = RELINK_PAUSE;
    }

    /// The client after the one that was lost; `sent` says whether a request may have reached the executor by it. It is
    /// in the same executor session if [`Client::continues`] says so.
    ///
    /// # Errors
    /// [`ToolError::Lost`] when none comes in time or the right to it was taken away.
    async fn find(&mut self, lost: &Client, sent: bool) -> Result<Client, ToolError> {
        if sent {
            self.ran = Ran::Unknown;
        }
        let began = Instant::now();
        let found = async {
            tokio::time::sleep(self.pause).await;
            Pool::successor(&self.site.call.workspace, self.site.binding, self.purpose, lost).await
        };
        let until = self.deadline.min(began + self.left);
        let found = self.site.call.timing.queue(tokio::time::timeout_at(until, found)).await;
        self.left = self.left.saturating_sub(began.elapsed());
        self.pause = (self.pause * 2).clamp(RELINK_PAUSE, RELINK_PAUSE_MAX);
        found.ok().flatten().ok_or(ToolError::Lost { ran: self.ran })
    }
}

impl From<CallError> for ToolError {
    /// For calls whose refusal by the executor is not a result of the tool.
    fn from(error: CallError) -> Self {
        match error {
            CallError::Lost { sent: false } => Self::Lost { ran: Ran::No },
            CallError::Lost { sent: true } => Self::Lost { ran: Ran::Unknown },
            CallError::NoAnswer | CallError::Rpc(_) => Self::NoAnswer { ran: Ran::Unknown },
            CallError::Malformed(error) => Self::Malformed(error),
        }
    }
}

/// Runs the part of a call that has no other way to end in time.
async fn before(
    deadline: Instant,
    call: impl Future<Output = Result<ToolResult, ToolError>>,
) -> Result<ToolResult, ToolError> {
    tokio::time::timeout_at(deadline, call).await.unwrap_or(Err(ToolError::NoAnswer { ran: Ran::Unknown }))
}

/// A refusal of the executor as the tool's result. `code` lets programs tell the kinds apart.
fn failure(tool: &Tool, error: &RpcError) -> ToolResult {
    let code = match error.code {
        rpc::NOT_FOUND => "not_found",
        rpc::INVALID_REQUEST | rpc::INVALID_PARAMS => "invalid",
        _ => "failed",
    };
    coded_failure(code, format!("{} failed: {}", tool.name, error.message))
}

/// A success: `text` for models, `structured` for programs.
fn success(text: impl Into<String>, structured: &impl Serialize) -> ToolResult {
    let structured = serde_json::to_value(structured).expect("what a tool tells is plain data");
    ToolResult { structured_content: Some(structured), ..ToolResult::text(text) }
}

/// The beginning and the end of a text, together of at most `bytes_max` bytes, cut between characters.
pub fn head_and_tail(text: &str, bytes_max: usize) -> (&str, &str) {
    if text.len() <= bytes_max {
        return (text, "");
    }
    let boundary = |at: &usize| text.is_char_boundary(*at);
    let head = (0..=bytes_max / 2).rev().find(boundary).unwrap_or(0);
    let tail = (text.len() - (bytes_max - bytes_max / 2)..text.len()).find(boundary).unwrap_or(text.len());
    (&text[..head], &text[tail..])
}

fn coded_failure(code: &str, message: String) -> ToolResult {
    ToolResult { structured_content: Some(json!({ "code": code })), ..ToolResult::error(message) }
}

/// The URI of a path as the caller wrote it, taken against the executor's working directory and home.
fn resolve(environment: &EnvironmentInfo, field: &str, path: &str) -> Result<FileUri, ToolError> {
    resolve_against(environment, field, None, path)
}

/// The same against another directory, which is itself taken so; errors name the directory by `cwd`.
fn resolve_against(
    environment: &EnvironmentInfo,
    field: &str,
    directory: Option<&str>,
    path: &str,
) -> Result<FileUri, ToolError> {
    let windows = environment.is_windows();
    let root = || FileUri::parse(if windows { "file:///C:/" } else { "file:///" }).expect("a literal URI");
    let cwd = match directory {
        Some(directory) => resolve(environment, "cwd", directory)?,
        None => environment.cwd.clone().unwrap_or_else(root),
    };
    let home = environment.user_home_dir.clone().unwrap_or_else(root);
    FileUri::from_native(path, windows, &cwd, &home)
        .map_err(|error: PathError| ToolError::Arguments(format!("{field}: {error}")))
}
