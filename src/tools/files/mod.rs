//! The file tools, and what they share: how they fail, how they find a file, how they try again.
//!
//! Every path is made absolute here before an executor or a script sees it.

pub(super) mod growing;
pub(super) mod open_file;
mod read_file;
pub(super) mod reading;
pub(super) mod staging;
mod stream;
mod write_file;

pub(super) use read_file::TOOL as READ_FILE;
pub(super) use write_file::TOOL as WRITE_FILE;

pub use stream::{Download, Upload, Uploaded};

use serde_json::json;
use tokio::time::Instant;

use super::{Site, Tool, ToolError, WayBack};
use crate::protocol::path::{FileUri, PathError};
use crate::protocol::rest::{Ran, ToolResult};
use crate::protocol::rpc::{self, FsGetMetadata, Metadata, RpcError};
use crate::relay::client::{CallError, Client};
use crate::workspace::pool::Use;

/// Why a file tool has nothing to show for it.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The executor did its part, and it was not possible: a result of the tool.
    #[error(transparent)]
    Failed(#[from] Failure),
    /// The call did not get that far.
    #[error(transparent)]
    Tool(#[from] ToolError),
}

/// What was not possible.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// For programs.
    pub code: &'static str,
    /// For people.
    pub message: String,
    /// SHA-256 of the content that was found instead of the expected one.
    pub current: Option<String>,
}

impl Failure {
    pub(super) fn new(code: &'static str, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), current: None }
    }

    /// A refusal of the executor.
    pub(super) fn refusal(error: &RpcError) -> Self {
        let code = match (error.code, system_code(&error.message)) {
            (rpc::NOT_FOUND, _) => "not_found",
            (_, Some(code)) => code,
            (rpc::INVALID_REQUEST | rpc::INVALID_PARAMS, None) => "invalid",
            (_, None) => "failed",
        };
        Self::new(code, error.message.clone())
    }

    /// What a script had to say on its error stream.
    pub(super) fn said(stderr: &[u8]) -> Self {
        let text = String::from_utf8_lossy(stderr);
        // The last line is the nearest to the end; no path is shown twice, and none of ours.
        let line = text.lines().rev().find(|line| system_code(line).is_some()).or(text.lines().last());
        let reason = line.and_then(|line| line.rsplit(": ").next()).unwrap_or("the script ended early");
        Self::new(line.and_then(system_code).unwrap_or("failed"), reason)
    }

    /// The result of a tool that failed so.
    pub(super) fn result(&self, tool: &Tool) -> ToolResult {
        let mut structured = json!({ "code": self.code });
        if let Some(current) = &self.current {
            structured["current_sha256"] = json!(current);
        }
        ToolResult {
            structured_content: Some(structured),
            ..ToolResult::error(format!("{} failed: {}", tool.name, self.message))
        }
    }
}

impl FileError {
    /// A failure becomes the tool's result, anything else stays an error.
    ///
    /// # Errors
    /// [`ToolError`].
    pub(super) fn result(self, tool: &Tool) -> Result<ToolResult, ToolError> {
        match self {
            Self::Failed(failure) => Ok(failure.result(tool)),
            Self::Tool(error) => Err(error),
        }
    }
}

impl From<CallError> for FileError {
    fn from(error: CallError) -> Self {
        match error {
            CallError::Rpc(error) => Failure::refusal(&error).into(),
            error => Self::Tool(error.into()),
        }
    }
}

impl From<PathError> for FileError {
    fn from(error: PathError) -> Self {
        Failure::new("invalid", error.to_string()).into()
    }
}

/// The kind of what an operating system says, in the words of the C locale or of Windows.
fn system_code(message: &str) -> Option<&'static str> {
    const SAYINGS: &[(&str, &str)] = &[
        ("No such file or directory", "not_found"),
        ("cannot find the", "not_found"),
        ("Permission denied", "no_permission"),
        ("Operation not permitted", "no_permission"),
        ("Read-only file system", "no_permission"),
        ("Access is denied", "no_permission"),
        ("No space left on device", "no_space"),
        ("Disk quota exceeded", "no_space"),
        ("not enough space", "no_space"),
        ("File too large", "too_large"),
        ("Too many levels of symbolic links", "symlink_loop"),
        ("Symbolic link loop", "symlink_loop"),
        ("Not a directory", "not_a_directory"),
        ("Is a directory", "is_a_directory"),
        ("is a directory", "is_a_directory"),
        ("is not a file", "not_a_file"),
        ("Directory not empty", "not_empty"),
        ("directory is not empty", "not_empty"),
        ("File exists", "exists"),
        ("already exists", "exists"),
        ("File name too long", "invalid"),
        ("Invalid argument", "invalid"),
    ];
    SAYINGS.iter().find(|(saying, _)| message.contains(saying)).map(|(_, code)| *code)
}

/// The path as scripts are given it: absolute, so that it never reads as an option, and with `..` resolved as the
/// executor's file calls do.
pub(super) fn native(path: &FileUri) -> Result<String, Failure> {
    path.resolved().to_native().map_err(|error| Failure::new("invalid", error.to_string()))
}

/// What is at the path; `None` where nothing is.
///
/// # Errors
/// [`FileError`] where the executor cannot tell.
pub(super) async fn look(client: &Client, path: &FileUri) -> Result<Option<Metadata>, FileError> {
    match client.call(&FsGetMetadata { path: path.clone() }).await {
        Ok(metadata) => Ok(Some(metadata)),
        Err(CallError::Rpc(error)) if error.code == rpc::NOT_FOUND => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Attempts at something with a client for files, on one link after the other: for what does no harm when it is done
/// twice, or not to its end.
pub(super) struct Attempts<'a> {
    client: Client,
    way: WayBack<'a>,
}

impl<'a> Attempts<'a> {
    /// Gets ready for the first attempt.
    ///
    /// # Errors
    /// [`ToolError`] where the executor is not reached.
    pub(super) async fn at(site: Site<'a>, deadline: Instant) -> Result<Self, ToolError> {
        let client = site.client(Use::Files, deadline).await?;
        Ok(Self { client, way: site.way_back(Use::Files, deadline) })
    }

    /// What the next attempt is made with.
    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    /// The attempt under way has got on: the next loss of a link is waited for in full.
    pub(super) fn got_on(&mut self) {
        self.way.got_on();
    }

    /// The result of the last attempt, unless it was cut off by the loss of its link: then nothing, and another can be
    /// made. Nothing counts as having run.
    pub(super) async fn over<T>(&mut self, attempt: Result<T, FileError>) -> Option<Result<T, FileError>> {
        match attempt {
            Err(FileError::Tool(ToolError::Lost { .. })) => match self.way.find(&self.client, false).await {
                Ok(next) => {
                    self.client = next;
                    None
                }
                Err(error) => Some(Err(error.into())),
            },
            Err(FileError::Tool(ToolError::NoAnswer { .. })) => Some(Err(ToolError::NoAnswer { ran: Ran::No }.into())),
            attempt => Some(attempt),
        }
    }
}
