//! The file tools, and what they share: how they fail, how they find a file, how they try again.
//!
//! Every path is made absolute here before an executor or a script sees it.

mod edit_file;
mod find_files;
mod list_directory;
mod make_directory;
mod move_path;
pub(super) mod open_file;
mod read_file;
mod remove_path;
mod search_files;
pub(super) mod staging;
mod stat;
mod walk;
mod write_file;

pub(super) use edit_file::TOOL as EDIT_FILE;
pub(super) use find_files::TOOL as FIND_FILES;
pub(super) use list_directory::TOOL as LIST_DIRECTORY;
pub(super) use make_directory::TOOL as MAKE_DIRECTORY;
pub(super) use move_path::TOOL as MOVE_PATH;
pub(super) use read_file::TOOL as READ_FILE;
pub(super) use remove_path::TOOL as REMOVE_PATH;
pub(super) use search_files::TOOL as SEARCH_FILES;
pub(super) use stat::TOOL as STAT;
pub(super) use write_file::TOOL as WRITE_FILE;

use std::time::{Duration, UNIX_EPOCH};

use schemars::JsonSchema;
use serde::Serialize;
use serde_json::json;
use tokio::time::Instant;

use super::execution::Ended;
use super::{Site, Tool, ToolError, WayBack};
use crate::protocol::path::{FileUri, PathError};
use crate::protocol::rest::{Ran, ToolResult};
use crate::protocol::rpc::{self, FsGetMetadata, Metadata, RpcError};
use crate::relay::client::{CallError, Client};
use crate::workspace::pool::Use;

/// Why a file tool has nothing to show for it.
#[derive(Debug, thiserror::Error)]
pub(super) enum FileError {
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
pub(super) struct Failure {
    /// For programs.
    pub(super) code: &'static str,
    /// For people.
    pub(super) message: String,
    /// SHA-256 of the content that was found instead of the expected one.
    pub(super) current: Option<String>,
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

    /// What a script said that did not succeed: `refused CODE` on its output, or the reason on its error stream.
    pub(super) fn said(ended: &Ended) -> Self {
        let output = String::from_utf8_lossy(&ended.stdout);
        let refused = output.lines().find_map(|line| line.strip_prefix("refused "));
        match refused.and_then(|code| Self::known(code.trim())) {
            Some(failure) => failure,
            None => Self::of_errors(&ended.stderr),
        }
    }

    /// What is wrong, by a code that needs no further reason.
    pub(super) fn known(code: &str) -> Option<Self> {
        const REASONS: &[(&str, &str)] = &[
            ("changed", "the file has another content than expected"),
            ("exists", "the path exists"),
            ("is_a_directory", "the path is a directory"),
            ("no_permission", "the file may not be written"),
            ("not_a_directory", "a file is where a directory is needed"),
            ("not_a_file", "not a regular file"),
            ("not_found", "the file does not exist"),
            ("symlink_loop", "links point to each other"),
        ];
        REASONS.iter().find(|(known, _)| *known == code).map(|(code, reason)| Self::new(code, *reason))
    }

    /// The reason that programs have told on an error stream.
    fn of_errors(stderr: &[u8]) -> Self {
        let text = String::from_utf8_lossy(stderr);
        let line = text.lines().find(|line| system_code(line).is_some()).or(text.lines().last());
        // What stands before it are names of programs and paths, also of ours.
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
        ("to a subdirectory of itself", "invalid"),
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

/// A success: what programs read and what people and models read.
fn answer(output: impl Serialize, text: impl Into<String>) -> ToolResult {
    ToolResult { structured_content: Some(serde_json::to_value(output).expect("plain data")), ..ToolResult::text(text) }
}

/// A time as callers are told it.
fn time(ms: i64) -> String {
    let since = Duration::from_millis(ms.unsigned_abs());
    crate::time::rfc3339(if ms < 0 { UNIX_EPOCH - since } else { UNIX_EPOCH + since })
}

/// What is at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Kind {
    /// A regular file, or a link to one.
    File,
    /// A directory, or a link to one.
    Directory,
    /// A link that leads nowhere.
    Symlink,
    /// A pipe, a socket, a device.
    Other,
}

impl Kind {
    fn of(metadata: &Metadata) -> Self {
        match metadata {
            Metadata { is_directory: true, .. } => Self::Directory,
            Metadata { is_file: true, .. } => Self::File,
            _ => Self::Other,
        }
    }
}

/// Makes sure that the path is a directory.
///
/// # Errors
/// [`FileError`] where it is none.
async fn look_at_directory(client: &Client, path: &FileUri) -> Result<(), FileError> {
    match look(client, path).await? {
        Some(found) if found.is_directory => Ok(()),
        Some(_) => Err(Failure::new("not_a_directory", "the path is not a directory").into()),
        None => Err(Failure::new("not_found", "the directory does not exist").into()),
    }
}

/// The regular file at the path. Anything else is refused: opening a pipe or a device could hold up the whole stream
/// at the executor.
///
/// # Errors
/// [`FileError`] where it is none.
pub(super) async fn look_at_file(client: &Client, path: &FileUri) -> Result<Metadata, FileError> {
    match look(client, path).await? {
        Some(found) if found.is_file => Ok(found),
        Some(found) if found.is_directory => Err(Failure::new("is_a_directory", "the path is a directory").into()),
        Some(_) => Err(Failure::new("not_a_file", "not a regular file").into()),
        None => Err(Failure::new("not_found", "the file does not exist").into()),
    }
}

/// Attempts at something with a client for files, on one link after the other: for what does no harm when it is done
/// twice.
pub(super) struct Attempts<'a> {
    client: Client,
    way: WayBack<'a>,
    /// What an attempt that was cut off counts as.
    lost: Ran,
    again: bool,
}

impl<'a> Attempts<'a> {
    /// Gets ready for the first attempt at something that changes nothing, or nothing that anybody sees.
    ///
    /// # Errors
    /// [`ToolError`] where the executor is not reached.
    pub(super) async fn harmless(site: Site<'a>, deadline: Instant) -> Result<Self, ToolError> {
        Self::at(site, deadline, Ran::No).await
    }

    /// The same for something of which one cannot tell, once it was cut off, whether it has been done.
    ///
    /// # Errors
    /// [`ToolError`] where the executor is not reached.
    pub(super) async fn visible(site: Site<'a>, deadline: Instant) -> Result<Self, ToolError> {
        Self::at(site, deadline, Ran::Unknown).await
    }

    async fn at(site: Site<'a>, deadline: Instant, lost: Ran) -> Result<Self, ToolError> {
        let client = site.client(Use::Files, deadline).await?;
        Ok(Self { client, way: site.way_back(Use::Files, deadline), lost, again: false })
    }

    /// What the next attempt is made with.
    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    /// Whether an attempt before this one was cut off, and may have been successful.
    pub(super) fn again(&self) -> bool {
        self.again
    }

    /// The result of the last attempt, unless it was cut off by the loss of its link: then nothing, and another can be
    /// made.
    pub(super) async fn over<T>(&mut self, attempt: Result<T, FileError>) -> Option<Result<T, FileError>> {
        match attempt {
            Err(FileError::Tool(ToolError::Lost { ran })) => {
                let sent = ran == Ran::Unknown && self.lost == Ran::Unknown;
                match self.way.find(&self.client, sent).await {
                    Ok(next) => {
                        self.again |= sent;
                        self.client = next;
                        None
                    }
                    Err(error) => Some(Err(error.into())),
                }
            }
            Err(FileError::Tool(ToolError::NoAnswer { .. })) => {
                Some(Err(ToolError::NoAnswer { ran: self.lost }.into()))
            }
            attempt => Some(attempt),
        }
    }
}
