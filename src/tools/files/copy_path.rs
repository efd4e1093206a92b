//! `copy_path`: a file or a tree from one environment to another, or within one (connectors-api.md §4.5).
//!
//! Bytes pass through the gateway a few blocks at a time and end beside their place; nobody sees a copy before it is whole
//! and its SHA-256 has been checked where it is. Lost links are bridged. What a gateway that was killed has left is
//! taken up by the same call to the next one, where both ends agree on what is there.

use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

use super::copying::{Mark, taken_up};
use super::growing::{Blocks, Place, grow, sum, verified};
use super::reading::{Snapshot, pour};
use super::staging::{Change, Expect, Leftover, Put, Staged, commit, directory_for};
use super::tree::Tree;
use super::{Attempts, Failure, FileError, answer, look, native};
use crate::protocol::path::FileUri;
use crate::protocol::rest::ToolResult;
use crate::protocol::rpc::Metadata;
use crate::store::Binding;
use crate::tools::{Call, Effect, Run, Site, Tool, ToolError, parse, resolve};
use crate::workspace::ReachError;

pub(in crate::tools) const TOOL: Tool = Tool {
    name: "copy_path",
    description: "Copy a file, or with `recursive` a directory, from one environment to another or within one; \
                  `destination_path` is the path of the copy itself, not a directory to put it into. A file that is \
                  there is replaced, anything else there is kept, and the failure is `exists` or `is_a_directory`. \
                  Permissions are kept, symbolic links in a directory stay links, empty directories stay. The copy \
                  appears whole and checked, or not at all; lost connections are bridged. If a copy is interrupted, \
                  repeat the same call: it goes on where it was. Returns bytes, sha256 and duration_ms.",
    effect: Effect::Destroys,
    input: |schemas| schemas.root_schema_for::<Arguments>(),
    output: |schemas| schemas.root_schema_for::<Output>(),
    run: Run::Workspace(|call, arguments| Box::pin(async move { run(call, parse(arguments)?).await })),
};

/// How long a copy may take that does not say.
const TIMEOUT_MS: u64 = 600_000;

/// A copy on one machine; `$3` is `tree` for a directory.
const LOCAL: &str = r#"
if [ "$3" ]; then
  mkdir "$2" && cp -RPp "$1/." "$2/" && cd "$1" && find . -type f -exec sh -c '
    copy=$1; shift; for file do cmp -s "$file" "$copy/$file" || exit 1; done' sh "$2" {} +
else
  cp -p "$1" "$2" && cmp "$1" "$2"
fi"#;

/// The permissions of `$1`, in octal digits.
const MODE: &str = r#"stat -L -c %a "$1" 2>/dev/null || stat -L -f %Mp%Lp "$1""#;

/// Arguments of `copy_path`.
#[derive(Deserialize, JsonSchema)]
struct Arguments {
    /// Name of the environment to copy from.
    source_environment_id: String,
    /// What to copy; relative paths and `~` are taken on that executor, and a link is followed.
    source_path: String,
    /// Name of the environment to copy to; it may be the same.
    destination_environment_id: String,
    /// The path of the copy; its directory has to exist.
    destination_path: String,
    /// Whether a directory is copied with all it holds.
    #[serde(default)]
    recursive: bool,
    /// Time for the whole copy, in milliseconds; 600000 when left out.
    #[serde(default)]
    timeout_ms: Option<u64>,
    /// `auto`, `http` or `ws`: accepted for older callers, and all the same.
    #[serde(default)]
    transport: Option<String>,
}

/// The structured part of the answer; the text is the same as JSON.
#[derive(Serialize, JsonSchema)]
struct Output {
    /// How the bytes went: `ws` over the executors' own connections, `local` within one executor.
    transport: &'static str,
    /// Bytes of all files.
    bytes: u64,
    /// Milliseconds.
    duration_ms: u64,
    /// SHA-256 of the file; of a directory that of its list, a line `SHA256  PATH` for each file in the order of the paths.
    sha256: String,
    /// Files in a directory.
    #[serde(skip_serializing_if = "Option::is_none")]
    files: Option<u64>,
    /// What was not copied of a directory, since it is neither file, directory nor link.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    skipped: Vec<String>,
}

/// What was copied.
pub(super) struct Copied {
    pub(super) bytes: u64,
    pub(super) sha256: String,
    pub(super) files: Option<u64>,
    pub(super) skipped: Vec<String>,
}

/// One end of a copy.
#[derive(Clone, Copy)]
pub(super) struct End<'a> {
    pub(super) site: Site<'a>,
    name: &'static str,
}

impl<'a> End<'a> {
    /// What went wrong, with the end where it did.
    pub(super) fn says(self, error: impl Into<FileError>) -> FileError {
        match error.into() {
            FileError::Failed(failure) => {
                let message = format!("{}: {}", self.name, failure.message);
                FileError::Failed(Failure { message, ..failure })
            }
            FileError::Tool(error) => ToolError::End { end: self.name, error: Box::new(error) }.into(),
        }
    }

    /// Attempts at something at this end.
    pub(super) async fn attempts(self, deadline: Instant) -> Result<Attempts<'a>, FileError> {
        Attempts::harmless(self.site, deadline).await.map_err(|error| self.says(error))
    }

    /// The place of a path, and what is there.
    async fn look(self, field: &str, path: &str, deadline: Instant) -> Result<(FileUri, Option<Metadata>), FileError> {
        let mut attempts = self.attempts(deadline).await?;
        let uri = resolve(attempts.client().environment(), field, path)?.resolved();
        loop {
            let attempt = look(attempts.client(), &uri).await;
            if let Some(found) = attempts.over(attempt).await {
                return Ok((uri, found.map_err(|error| self.says(error))?));
            }
        }
    }
}

async fn run(call: &Call, arguments: Arguments) -> Result<ToolResult, ToolError> {
    let transport = arguments.transport.as_deref().unwrap_or("auto");
    if !["auto", "http", "ws"].iter().any(|known| known.eq_ignore_ascii_case(transport)) {
        return Err(ToolError::Arguments(format!("transport: invalid transport \"{transport}\" (want auto|http|ws)")));
    }
    let timeout_ms = arguments.timeout_ms.unwrap_or(TIMEOUT_MS.min(call.settings.timeout_max_secs * 1000));
    let deadline = call.deadline(Some(timeout_ms))?;
    let environment = async |name: &str| -> Result<Binding, ToolError> {
        Ok(call.workspace.environment(name).await.map_err(Arc::<ReachError>::from)?)
    };
    let from = environment(&arguments.source_environment_id).await?;
    let to = environment(&arguments.destination_environment_id).await?;
    let source = End { site: Site { call, binding: &from }, name: "source" };
    let destination = End { site: Site { call, binding: &to }, name: "destination" };
    let local = from.executor() == to.executor();
    let copied = match timeout_at(deadline, copy(source, destination, local, &arguments, deadline)).await {
        Ok(copied) => copied,
        Err(_) => Err(Failure::new("timed_out", format!("not done within {timeout_ms} ms")).into()),
    };
    match copied {
        Ok(Copied { bytes, sha256, files, skipped }) => {
            let duration_ms = u64::try_from(call.started.elapsed().as_millis()).unwrap_or(u64::MAX);
            let transport = if local { "local" } else { "ws" };
            let output = Output { transport, bytes, duration_ms, sha256, files, skipped };
            let text = serde_json::to_string(&output).expect("plain data");
            Ok(answer(output, text))
        }
        Err(error) => error.result(&TOOL),
    }
}

async fn copy(
    source: End<'_>,
    destination: End<'_>,
    local: bool,
    arguments: &Arguments,
    deadline: Instant,
) -> Result<Copied, FileError> {
    let (from, found) = source.look("source_path", &arguments.source_path, deadline).await?;
    let found = found.ok_or_else(|| source.says(Failure::new("not_found", "nothing is there")))?;
    let (to, there) = destination.look("destination_path", &arguments.destination_path, deadline).await?;
    if found.is_directory && !arguments.recursive {
        let message = "the path is a directory; it is copied with recursive: true";
        return Err(source.says(Failure::new("is_a_directory", message)));
    }
    if let Some(there) = there {
        if there.is_directory && !found.is_directory {
            return Err(destination.says(Failure::new("is_a_directory", "the path is a directory")));
        }
        if found.is_directory {
            return Err(destination.says(Failure::new("exists", "the path exists; a directory replaces nothing")));
        }
    }
    if local && to.as_str().strip_prefix(from.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('/')) {
        return Err(destination.says(Failure::new("invalid", "the path is the source, or within it")));
    }
    if found.is_directory {
        let tree = Tree::of(source, &from, deadline).await?;
        return if local {
            tree.copy_within(destination, &to, deadline).await
        } else {
            tree.copy(destination, &to, deadline).await
        };
    }

    let mut attempts = source.attempts(deadline).await?;
    let file = loop {
        let attempt = Snapshot::of(attempts.client(), &from).await;
        if let Some(found) = attempts.over(attempt).await {
            break found.map_err(|error| source.says(error))?;
        }
    };
    let mode = mode(source, &from, deadline).await?;
    let (staged, bytes, sha256) = if local {
        let staged = copied_within(destination, &from, &to, deadline).await?;
        let sha256 = sum(destination.site, staged.path(), None, deadline).await;
        (staged, file.size, sha256.map_err(|error| destination.says(error))?)
    } else {
        let mark = Mark::of(source.site, &file, destination.site, &to);
        carry(source, &file, destination, &to, mark.as_ref(), deadline).await?
    };
    let put = Put { staged, mode, parents: false };
    let change = Change { target: to, put: Some(put), expect: Expect::Anything };
    let committed = commit(destination.site, vec![change], deadline).await.map_err(|error| destination.says(error))?;
    committed.map_err(|refused| destination.says(refused.failure))?;
    Ok(Copied { bytes, sha256, files: None, skipped: Vec::new() })
}

/// The permissions of a file, but for what would give others the rights of its new owner; none without a shell.
async fn mode(source: End<'_>, path: &FileUri, deadline: Instant) -> Result<Option<u32>, FileError> {
    let native = native(path).map_err(|error| source.says(error))?;
    let said = source.site.script(MODE, &[&native], deadline).await.map_err(|error| source.says(error))?;
    let mode = said.and_then(|said| u32::from_str_radix(String::from_utf8_lossy(&said.stdout).trim(), 8).ok());
    Ok(mode.map(|mode| mode & 0o777))
}

/// Copies a file beside its place, by the executor itself.
async fn copied_within(
    destination: End<'_>,
    from: &FileUri,
    to: &FileUri,
    deadline: Instant,
) -> Result<Staged, FileError> {
    let mut attempts = destination.attempts(deadline).await?;
    loop {
        let attempt = async {
            let directory = directory_for(attempts.client(), to, false).await?;
            Ok(Leftover::beside(destination.site, attempts.client(), &directory))
        };
        let attempt = attempt.await;
        let Some(staged) = attempts.over(attempt).await else { continue };
        let staged = staged.map_err(|error| destination.says(error))?;
        copy_locally(destination, from, staged.path(), false, deadline).await?;
        return Ok(Staged::from(staged));
    }
}

/// Has the executor copy what is there, and compare.
pub(super) async fn copy_locally(
    destination: End<'_>,
    from: &FileUri,
    to: &FileUri,
    tree: bool,
    deadline: Instant,
) -> Result<(), FileError> {
    let says = |error: FileError| destination.says(error);
    let paths = (native(from).map_err(|e| says(e.into()))?, native(to).map_err(|e| says(e.into()))?);
    let arguments = [paths.0.as_str(), paths.1.as_str(), if tree { "tree" } else { "" }];
    match destination.site.script(LOCAL, &arguments, deadline).await.map_err(|error| says(error.into()))? {
        Some(ended) if ended.exit_code == Some(0) => Ok(()),
        Some(ended) => Err(says(Failure::said(&ended).into())),
        None => Err(says(no_shell().into())),
    }
}

pub(super) fn no_shell() -> Failure {
    Failure::new("unsupported", "that needs /bin/sh on the executor")
}

/// Takes a file from one end to beside its place at the other: staged, size, SHA-256.
pub(super) async fn carry(
    source: End<'_>,
    file: &Snapshot,
    destination: End<'_>,
    to: &FileUri,
    mark: Option<&Mark<'_>>,
    deadline: Instant,
) -> Result<(Staged, u64, String), FileError> {
    let call = source.site.call;
    let mut attempts = source.attempts(deadline).await?;
    let begun = match mark {
        Some(mark) => taken_up(mark, source, file, destination, to, deadline).await?,
        None => None,
    };
    let from = begun.as_ref().map_or(0, |(_, at)| *at);
    let (pieces, content) = mpsc::channel(1);
    let mut blocks = Blocks::of(content);
    let read = async {
        let pieces = pieces;
        pour(&mut attempts, file, from..file.size, &pieces).await.map_err(|error| source.says(error))
    };
    let write = async {
        let place = Place { target: to, parents: false, mark: mark.map(Mark::as_str) };
        let staged = grow(destination.site, &place, begun, &mut blocks, deadline, |at| call.progressed(at, file.size));
        staged.await.map_err(|error| destination.says(error))
    };
    let ((), staged) = tokio::try_join!(read, write)?;
    let bytes = from + blocks.bytes;
    let sha256 = match from {
        0 => blocks.sha256(),
        // What was there before has not passed through this gateway.
        _ => sum(source.site, &file.path, None, deadline).await.map_err(|error| source.says(error))?,
    };
    let grown = verified(destination.site, staged, bytes, sha256, deadline).await;
    let grown = grown.map_err(|error| destination.says(error))?;
    Ok((grown.staged, grown.bytes, grown.sha256))
}

/// A digest of what tells one copy from all others, as a part of file names.
pub(super) fn digest_of<'a>(facts: impl IntoIterator<Item = &'a str>) -> String {
    let mut hash = Sha256::new();
    for fact in facts {
        hash.update((fact.len() as u64).to_be_bytes());
        hash.update(fact);
    }
    format!("{:x}", hash.finalize())[..24].to_owned()
}
