//! New contents of files, put beside them at the executor and then in their place: all of a list, or none of it.
//!
//! Nobody sees a part of a content, and what is not committed is removed, also where its call or its link is lost. On
//! executors without a POSIX shell nothing can be renamed: contents are then copied into their places, one by one.

use std::sync::Arc;
use std::time::Duration;

use futures_util::TryStreamExt;
use futures_util::stream::FuturesUnordered;
use sha2::{Digest, Sha256};
use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use super::open_file::{BLOCKS_AHEAD, OpenFile};
use super::{Attempts, Failure, FileError, look, native};
use crate::protocol::path::FileUri;
use crate::protocol::rest::Ran;
use crate::protocol::rpc::{BLOCK_BYTES_MAX, FsCanonicalize, FsCreateDirectory, FsRemove, OpenMode};
use crate::relay::client::{CallError, Client};
use crate::store::Binding;
use crate::tools::execution::Ended;
use crate::tools::{Call, Site, ToolError};
use crate::workspace::Workspace;
use crate::workspace::pool::{Pool, Use};

/// How a file begins that holds what is not committed yet.
pub(in crate::tools) const PREFIX: &str = ".exec-gateway-";

/// How long a commit may take at least, whatever its call has left: once begun it is not given up half-way.
const COMMIT_WAIT: Duration = Duration::from_secs(60);

/// How long an executor that is away is waited for, to remove what is left over, and the pause between two tries.
const FOLLOW_WAIT: Duration = Duration::from_secs(80);
const FOLLOW_PAUSE: Duration = Duration::from_millis(200);

/// Bytes of arguments that a script is given; systems take at least 1 MiB, with the variables.
const ARGUMENT_BYTES_MAX: usize = 512 * 1024;

const COMMIT: &str = concat!(include_str!("hash.sh"), include_str!("commit.sh"));

/// A content beside the file that it is for. Removed on drop.
pub(in crate::tools) struct Staged(Leftover);

/// Something at the executor that is not to stay, whatever becomes of its call. Removed on drop, with all it holds.
pub(in crate::tools) struct Leftover(Option<Left>);

/// What is at the executor until it is committed or removed.
struct Left {
    workspace: Arc<Workspace>,
    binding: Binding,
    client: Client,
    path: FileUri,
    /// Under way: what is not made yet cannot be removed.
    opening: Option<JoinHandle<Result<OpenFile, CallError>>>,
    open: Option<OpenFile>,
}

/// What one file is to become.
pub(in crate::tools) struct Change {
    /// The file. A link is followed to what it points to, unless it is to be removed.
    pub(in crate::tools) target: FileUri,
    /// Its new content; none removes it.
    pub(in crate::tools) put: Option<Put>,
    /// What has to be there; looked at right before the change.
    pub(in crate::tools) expect: Expect,
}

/// A content for its place.
pub(in crate::tools) struct Put {
    /// The content, finished.
    pub(in crate::tools) staged: Staged,
    /// Permission bits; those of the former file, or the executor's default, where none are given.
    pub(in crate::tools) mode: Option<u32>,
    /// Whether missing directories of the target are made.
    pub(in crate::tools) parents: bool,
}

/// What has to be in the place of a change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::tools) enum Expect {
    /// Whatever it is; to remove nothing is a failure all the same.
    Anything,
    /// Nothing.
    Missing,
    /// A file.
    Present,
    /// A file with a content of this SHA-256, in lower-case hexadecimal.
    Content(String),
}

/// What became of one change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::tools) enum Outcome {
    /// There was no file before.
    Created,
    /// There was another content before.
    Replaced,
    /// There is no file now.
    Removed,
}

/// All changes were made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::tools) struct Committed {
    /// Whether every reader saw a former or a new content, and never a part.
    pub(in crate::tools) atomic: bool,
    /// In the order of the changes.
    pub(in crate::tools) outcomes: Vec<Outcome>,
}

/// No change was made, and this one is why. Only without a POSIX shell may those before it have been made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::tools) struct Refused {
    /// Its place in the list.
    pub(in crate::tools) index: usize,
    /// The reason; `changed` and `exists` come with the SHA-256 of what is there.
    pub(in crate::tools) failure: Failure,
}

impl Staged {
    /// Makes an empty file beside `target`; with `parents` in the nearest of its directories that is there.
    ///
    /// # Errors
    /// [`FileError`]; of a target that cannot be written: `is_a_directory`, `not_a_file`, `not_found` without its directory.
    pub(in crate::tools) async fn begin(
        site: Site<'_>,
        client: &Client,
        target: &FileUri,
        parents: bool,
    ) -> Result<Self, FileError> {
        let target = target.resolved();
        let directory = directory_for(client, &target, parents).await?;
        let mut staged = Self(Leftover::beside(site, client, &directory));
        if let Some(left) = &mut staged.0.0 {
            left.open = Some(left.open_for_writing().await?);
        }
        Ok(staged)
    }

    /// A whole content beside its target.
    ///
    /// # Errors
    /// As [`Self::begin`], and what the executor has against the content, as `no_space`.
    pub(in crate::tools) async fn whole(
        site: Site<'_>,
        client: &Client,
        target: &FileUri,
        parents: bool,
        content: &[u8],
    ) -> Result<Self, FileError> {
        let mut staged = Self::begin(site, client, target, parents).await?;
        let mut writing = FuturesUnordered::new();
        for (at, block) in (0..).step_by(BLOCK_BYTES_MAX).zip(content.chunks(BLOCK_BYTES_MAX)) {
            if writing.len() == BLOCKS_AHEAD {
                writing.try_next().await?;
            }
            writing.push(staged.write(at, block));
        }
        while writing.try_next().await?.is_some() {}
        drop(writing);
        staged.finish().await?;
        Ok(staged)
    }

    /// Writes up to [`BLOCK_BYTES_MAX`] bytes at an offset, in any order, several under way at once.
    ///
    /// # Errors
    /// [`CallError`]; after the loss of the link the content has to be staged anew, since its handle is lost.
    pub(in crate::tools) async fn write(&self, offset: u64, block: &[u8]) -> Result<(), CallError> {
        match self.0.0.as_ref().and_then(|left| left.open.as_ref()) {
            Some(handle) => handle.write(offset, block).await,
            None => Err(CallError::Lost { sent: false }),
        }
    }

    /// The content is whole: from now on the loss of the link does not harm it.
    ///
    /// # Errors
    /// [`CallError`]: what the executor could not write it may tell here.
    pub(in crate::tools) async fn finish(&mut self) -> Result<(), CallError> {
        match self.0.0.as_mut().and_then(|left| left.open.take()) {
            Some(handle) => handle.close().await,
            None => Ok(()),
        }
    }

    /// Where it is.
    pub(in crate::tools) fn path(&self) -> &FileUri {
        self.0.path()
    }
}

impl Leftover {
    /// Something about to be made in that directory, under a name that nobody else has.
    pub(in crate::tools) fn beside(site: Site<'_>, client: &Client, directory: &FileUri) -> Self {
        Self::at(site, client, directory.child(&format!("{PREFIX}{}.part", uuid::Uuid::new_v4().simple())))
    }

    /// Something about to be made there.
    fn at(site: Site<'_>, client: &Client, path: FileUri) -> Self {
        let (workspace, binding) = (site.call.workspace.clone(), site.binding.clone());
        Self(Some(Left { workspace, binding, client: client.clone(), path, opening: None, open: None }))
    }

    /// Where it is.
    pub(in crate::tools) fn path(&self) -> &FileUri {
        &self.0.as_ref().expect("only `gone` and the drop take it").path
    }

    /// It is there no longer, or in its place.
    pub(in crate::tools) fn gone(mut self) {
        self.0 = None;
    }
}

/// The directory to stage in: the one of the target, or of what it points to.
async fn directory_for(client: &Client, target: &FileUri, parents: bool) -> Result<FileUri, FileError> {
    let no_directory = || Failure::new("is_a_directory", "the path is a directory");
    let mut directory = target.parent().ok_or_else(no_directory)?;
    match look(client, target).await? {
        Some(found) if found.is_directory => return Err(no_directory().into()),
        Some(found) if !found.is_file => return Err(Failure::new("not_a_file", "not a regular file").into()),
        Some(found) if found.is_symlink => {
            let real = client.call(&FsCanonicalize { path: target.clone() }).await?.path;
            return Ok(real.parent().ok_or_else(no_directory)?);
        }
        Some(_) => return Ok(directory),
        None => {}
    }
    loop {
        match look(client, &directory).await? {
            Some(found) if found.is_directory => return Ok(directory),
            Some(_) => return Err(Failure::new("not_a_directory", "a directory of the path is a file").into()),
            None if parents => directory = directory.parent().ok_or_else(no_directory)?,
            None => return Err(Failure::new("not_found", "the directory of the path does not exist").into()),
        }
    }
}

impl Drop for Leftover {
    fn drop(&mut self) {
        let (Some(left), Ok(runtime)) = (self.0.take(), Handle::try_current()) else { return };
        let endings = left.workspace.corridor().endings.clone();
        let removing = async move {
            if timeout(FOLLOW_WAIT, left.remove()).await.is_err() {
                tracing::debug!("something staged was left at its executor, which is away");
            }
        };
        endings.spawn_on(removing, &runtime);
    }
}

impl Left {
    async fn open_for_writing(&mut self) -> Result<OpenFile, CallError> {
        let (client, path) = (self.client.clone(), self.path.clone());
        let opening = async move { OpenFile::open(&client, &path, OpenMode::Replace).await };
        let opening = self.opening.insert(tokio::spawn(opening));
        let opened = opening.await.unwrap_or(Err(CallError::Lost { sent: true }));
        self.opening = None;
        opened
    }

    async fn remove(mut self) {
        if let Some(opening) = self.opening.take() {
            self.open = opening.await.ok().and_then(Result::ok);
        }
        // Some systems do not remove what is open.
        if let Some(open) = self.open.take() {
            let _ = open.close().await;
        }
        loop {
            let remove = FsRemove { path: self.path.clone(), recursive: true, force: true };
            match self.client.call(&remove).await {
                Err(CallError::Lost { .. }) => {}
                Err(error) => return tracing::debug!(%error, "something staged was left at its executor"),
                Ok(_) => return,
            }
            match Pool::successor(&self.workspace, &self.binding, Use::Files, &self.client).await {
                Some(next) => self.client = next,
                None => return,
            }
            sleep(FOLLOW_PAUSE).await;
        }
    }
}

/// Makes all the changes, or none. Goes on when the future is dropped: once begun, it comes to its end.
///
/// # Errors
/// [`ToolError`] where that end is not known; `ran` says whether anything may have changed.
pub(in crate::tools) async fn commit(
    site: Site<'_>,
    changes: Vec<Change>,
    deadline: Instant,
) -> Result<Result<Committed, Refused>, ToolError> {
    let (call, binding) = (site.call.clone(), site.binding.clone());
    let endings = call.workspace.corridor().endings.clone();
    let deadline = deadline.max(Instant::now() + COMMIT_WAIT);
    let committing = endings.spawn(async move { run(&call, &binding, changes, deadline).await });
    // It ends early only where the runtime does.
    committing.await.unwrap_or(Err(ToolError::Lost { ran: Ran::Unknown }))
}

async fn run(
    call: &Call,
    binding: &Binding,
    changes: Vec<Change>,
    deadline: Instant,
) -> Result<Result<Committed, Refused>, ToolError> {
    let site = Site { call, binding };
    let arguments = match arguments(&changes) {
        Ok(arguments) => arguments,
        Err(refused) => return Ok(Err(refused)),
    };
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let committed = match site.script(COMMIT, &arguments, deadline).await? {
        Some(ended) => said(&ended),
        None => direct(site, &changes, deadline).await?,
    };
    if let Ok(Committed { atomic: true, .. }) = committed {
        changes.into_iter().filter_map(|change| change.put).for_each(|put| put.staged.0.gone());
    }
    Ok(committed)
}

/// The script's arguments; it says at its top what they are.
fn arguments(changes: &[Change]) -> Result<Vec<String>, Refused> {
    let mut arguments = vec![uuid::Uuid::new_v4().simple().to_string()];
    for (index, Change { target, put, expect }) in changes.iter().enumerate() {
        let path = |path| native(path).map_err(|failure| Refused { index, failure });
        let action = match put {
            None => "remove",
            Some(Put { parents: false, .. }) => "put",
            Some(Put { parents: true, .. }) => "put-parents",
        };
        arguments.push(action.into());
        arguments.push(path(target)?);
        arguments.push(put.as_ref().map_or(Ok(String::new()), |put| path(put.staged.path()))?);
        arguments.push(put.as_ref().and_then(|put| put.mode).map_or(String::new(), |mode| format!("{mode:o}")));
        arguments.push(match expect {
            Expect::Anything => String::new(),
            Expect::Missing => "missing".into(),
            Expect::Present => "present".into(),
            Expect::Content(sha256) => sha256.to_ascii_lowercase(),
        });
        if arguments.iter().map(|argument| argument.len() + 1).sum::<usize>() > ARGUMENT_BYTES_MAX {
            return Err(Refused { index, failure: Failure::new("too_large", "too many changes at once") });
        }
    }
    Ok(arguments)
}

/// What the script said.
fn said(ended: &Ended) -> Result<Committed, Refused> {
    let text = String::from_utf8_lossy(&ended.stdout);
    let mut lines = text.lines();
    let mut words = lines.next().unwrap_or_default().split(' ');
    if words.next() == Some("done") {
        let outcome = |line| match line {
            "created" => Outcome::Created,
            "removed" => Outcome::Removed,
            _ => Outcome::Replaced,
        };
        return Ok(Committed { atomic: true, outcomes: lines.map(outcome).collect() });
    }
    let index = words.next().and_then(|word| word.parse().ok()).unwrap_or_default();
    let mut failure = words.next().and_then(Failure::known).unwrap_or_else(|| Failure::said(ended));
    failure.current = words.next().filter(|word| !word.is_empty()).map(str::to_owned);
    Err(Refused { index, failure })
}

/// Makes the changes one by one, where nothing can be renamed.
async fn direct(
    site: Site<'_>,
    changes: &[Change],
    deadline: Instant,
) -> Result<Result<Committed, Refused>, ToolError> {
    let mut outcomes = Vec::new();
    let mut attempts = Attempts::visible(site, deadline).await?;
    for (index, change) in changes.iter().enumerate() {
        let changed = loop {
            let attempt = change_directly(attempts.client(), change).await;
            if let Some(changed) = attempts.over(attempt).await {
                break changed;
            }
        };
        match changed {
            Ok(outcome) => outcomes.push(outcome),
            Err(FileError::Failed(failure)) => return Ok(Err(Refused { index, failure })),
            Err(FileError::Tool(error)) => return Err(error),
        }
    }
    Ok(Ok(Committed { atomic: false, outcomes }))
}

async fn change_directly(client: &Client, change: &Change) -> Result<Outcome, FileError> {
    let found = look(client, &change.target).await?;
    match (&found, &change.expect, &change.put) {
        (None, Expect::Present | Expect::Content(_), _) | (None, _, None) => {
            return Err(Failure::new("not_found", "the file does not exist").into());
        }
        (Some(_), Expect::Missing, _) => {
            let current = Some(content_hash(client, &change.target).await?);
            return Err(Failure { current, ..Failure::new("exists", "the file exists") }.into());
        }
        (Some(_), Expect::Content(expected), _) => {
            let current = content_hash(client, &change.target).await?;
            if !current.eq_ignore_ascii_case(expected) {
                let failure = Failure::new("changed", "the file has another content than expected");
                return Err(Failure { current: Some(current), ..failure }.into());
            }
        }
        _ => {}
    }
    let Some(Put { staged, parents, .. }) = &change.put else {
        client.call(&FsRemove { path: change.target.clone(), recursive: false, force: false }).await?;
        return Ok(Outcome::Removed);
    };
    if let (true, Some(parent)) = (parents, change.target.resolved().parent()) {
        client.call(&FsCreateDirectory { path: parent, recursive: true }).await?;
    }
    let from = OpenFile::open(client, staged.path(), OpenMode::Read).await?;
    let to = OpenFile::open(client, &change.target, OpenMode::Replace).await?;
    let mut at = 0;
    loop {
        let block = from.read(at, BLOCK_BYTES_MAX as u64).await?;
        if !block.chunk.0.is_empty() {
            to.write(at, &block.chunk.0).await?;
            at += block.chunk.0.len() as u64;
        }
        if block.eof || block.chunk.0.is_empty() {
            break;
        }
    }
    to.close().await?;
    Ok(if found.is_some() { Outcome::Replaced } else { Outcome::Created })
}

/// The SHA-256 of a file, read in blocks.
///
/// # Errors
/// [`CallError`].
pub(in crate::tools) async fn content_hash(client: &Client, path: &FileUri) -> Result<String, CallError> {
    let file = OpenFile::open(client, path, OpenMode::Read).await?;
    let (mut hash, mut at) = (Sha256::new(), 0);
    loop {
        let block = file.read(at, BLOCK_BYTES_MAX as u64).await?;
        hash.update(&block.chunk.0);
        at += block.chunk.0.len() as u64;
        if block.eof || block.chunk.0.is_empty() {
            return Ok(format!("{:x}", hash.finalize()));
        }
    }
}

/// The SHA-256 of a content, as callers are told it.
pub(in crate::tools) fn sha256(content: &[u8]) -> String {
    format!("{:x}", Sha256::digest(content))
}

/// The script alone, in the shells of this machine; that contents are staged and committed at executors is tested from
/// outside.
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeMap;
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::path::{Path, PathBuf};
    use std::process::Command;

    use super::*;

    /// One change as the script is given it, with paths below the directory of the test.
    struct Line<'a>(&'a str, &'a str, &'a str, &'a str, &'a str);

    struct Shell(&'static [&'static str]);

    /// A directory with some files, and a shell for the script.
    struct Room {
        directory: PathBuf,
        shell: &'static Shell,
    }

    const SHELLS: &[Shell] = &[Shell(&["sh"]), Shell(&["dash"]), Shell(&["bash"]), Shell(&["busybox", "sh"])];

    impl Shell {
        fn is_here(&self) -> bool {
            Command::new(self.0[0])
                .args(&self.0[1..])
                .args(["-c", "exit 7"])
                .output()
                .is_ok_and(|output| output.status.code() == Some(7))
        }
    }

    impl Room {
        /// The same test in each shell of this machine.
        fn in_each_shell(test: impl Fn(&Self)) {
            for shell in SHELLS.iter().filter(|shell| shell.is_here()) {
                let name = format!("exec-gateway-commit-{}", uuid::Uuid::new_v4().simple());
                let room = Self { directory: std::env::temp_dir().join(name), shell };
                std::fs::create_dir(&room.directory).unwrap();
                test(&room);
                std::fs::remove_dir_all(&room.directory).unwrap();
            }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.directory.join(name)
        }

        fn write(&self, name: &str, content: &str) {
            std::fs::write(self.path(name), content).unwrap();
        }

        fn mode(&self, name: &str) -> u32 {
            std::fs::metadata(self.path(name)).unwrap().permissions().mode() & 0o7777
        }

        fn run(&self, lines: &[Line<'_>]) -> Result<Vec<Outcome>, (usize, &'static str, Option<String>)> {
            let mut command = Command::new(self.shell.0[0]);
            command.args(&self.shell.0[1..]).args(["-c", COMMIT, "test", "tag"]).env("LC_ALL", "C").current_dir("/");
            for Line(action, target, staged, mode, expected) in lines {
                command.arg(action).arg(self.path(target));
                if staged.is_empty() {
                    command.arg("")
                } else {
                    command.arg(self.path(staged))
                };
                command.arg(mode).arg(expected);
            }
            let output = command.output().unwrap();
            let (stdout, stderr, exit_code) = (output.stdout.clone(), output.stderr.clone(), output.status.code());
            match said(&Ended { stdout, stderr, exit_code, timed_out: false, lost_bytes: 0, lost_chunks: 0 }) {
                Ok(committed) => Ok(committed.outcomes),
                Err(Refused { index, failure }) => {
                    assert_ne!(failure.message, "the script ended early", "{output:?}");
                    Err((index, failure.code, failure.current))
                }
            }
        }

        /// Every file with its content.
        fn files(&self) -> BTreeMap<String, String> {
            let mut files = BTreeMap::new();
            list(&self.directory, &self.directory, &mut files);
            files
        }
    }

    fn list(root: &Path, directory: &Path, files: &mut BTreeMap<String, String>) {
        for entry in std::fs::read_dir(directory).unwrap().map(Result::unwrap) {
            if entry.file_type().unwrap().is_dir() {
                list(root, &entry.path(), files);
            } else {
                let name = entry.path().strip_prefix(root).unwrap().display().to_string();
                files.insert(name, std::fs::read_to_string(entry.path()).unwrap_or_else(|_| "dangling".into()));
            }
        }
    }

    fn files(expected: &[(&str, &str)]) -> BTreeMap<String, String> {
        expected.iter().map(|(name, content)| ((*name).to_owned(), (*content).to_owned())).collect()
    }

    #[test]
    fn a_list_of_changes_is_made() {
        Room::in_each_shell(|room| {
            for (name, content) in [("old", "1"), ("gone", "2"), (".a", "new"), (".b", "fresh")] {
                room.write(name, content);
            }
            let outcomes = room.run(&[
                Line("put", "old", ".a", "", &sha256(b"1")),
                Line("remove", "gone", "", "", &sha256(b"2")),
                Line("put-parents", "x/y/z", ".b", "", "missing"),
            ]);
            assert_eq!(outcomes, Ok(vec![Outcome::Replaced, Outcome::Removed, Outcome::Created]));
            assert_eq!(room.files(), files(&[("old", "new"), ("x/y/z", "fresh")]));
        });
    }

    #[test]
    fn one_that_fails_leaves_every_file_as_it_was() {
        Room::in_each_shell(|room| {
            for (name, content) in [("old", "1"), ("gone", "2"), ("last", "3"), (".a", "a"), (".b", "b"), (".c", "c")] {
                room.write(name, content);
            }
            std::fs::set_permissions(room.path("old"), PermissionsExt::from_mode(0o640)).unwrap();
            symlink("gone", room.path("link")).unwrap();
            let before = room.files();
            let others = |last| {
                [
                    Line("put", "old", ".a", "", ""),
                    Line("remove", "link", "", "", ""),
                    Line("put-parents", "x/y/z", ".b", "", "missing"),
                    last,
                ]
            };
            let run = |last| room.run(&others(last));
            for (last, code) in [
                // Found before anything is touched.
                (Line("put", "last", ".c", "", &sha256(b"other")), "changed"),
                (Line("put", "last", ".c", "", "missing"), "exists"),
                (Line("put", "none", ".c", "", "present"), "not_found"),
                (Line("remove", "none", "", "", ""), "not_found"),
                // Found when the others are done.
                (Line("put", "last", ".none", "", ""), "not_found"),
                (Line("put", "no/directory", ".c", "", ""), "not_found"),
                (Line("put", "last", ".c", "9", ""), "failed"),
            ] {
                let (index, found, _) = run(last).unwrap_err();
                assert_eq!((index, found), (3, code));
                assert_eq!(room.mode("old"), 0o640);
                assert!(room.path("link").is_symlink() && !room.path("x").exists());
                // What was staged and put is not staged again: whoever staged it removes what is left.
                for (name, content) in [(".a", "a"), (".b", "b"), (".c", "c")] {
                    room.write(name, content);
                }
                assert_eq!(room.files(), before, "{code}");
            }
        });
    }

    #[test]
    fn what_is_there_is_told_where_something_else_was_expected() {
        Room::in_each_shell(|room| {
            room.write("file", "now");
            room.write(".a", "a");
            let expected = sha256(b"before");
            let now = Some(sha256(b"now"));
            assert_eq!(room.run(&[Line("put", "file", ".a", "", &expected)]), Err((0, "changed", now.clone())));
            assert_eq!(room.run(&[Line("put", "file", ".a", "", "missing")]), Err((0, "exists", now)));
            assert_eq!(room.run(&[Line("put", "file", ".a", "", "present")]), Ok(vec![Outcome::Replaced]));
        });
    }

    #[test]
    fn modes_are_kept_or_set() {
        Room::in_each_shell(|room| {
            for (name, former, mode, then) in
                [("kept", Some(0o4751), "", 0o4751), ("set", Some(0o600), "755", 0o755), ("new", None, "640", 0o640)]
            {
                room.write(".a", "a");
                if let Some(former) = former {
                    room.write(name, "b");
                    std::fs::set_permissions(room.path(name), PermissionsExt::from_mode(former)).unwrap();
                }
                room.run(&[Line("put", name, ".a", mode, "")]).unwrap();
                assert_eq!(room.mode(name), then, "{name}");
            }
        });
    }

    #[test]
    fn links_are_followed_to_the_file_and_removed_themselves() {
        Room::in_each_shell(|room| {
            std::fs::create_dir(room.path("d")).unwrap();
            room.write("d/file", "1");
            symlink("d/file", room.path("inner")).unwrap();
            symlink(room.path("inner"), room.path("outer")).unwrap();
            symlink("d/not yet", room.path("dangling")).unwrap();
            symlink("round", room.path("round")).unwrap();

            room.write(".a", "2");
            assert_eq!(room.run(&[Line("put", "outer", ".a", "", &sha256(b"1"))]), Ok(vec![Outcome::Replaced]));
            room.write(".a", "3");
            assert_eq!(room.run(&[Line("put", "dangling", ".a", "", "missing")]), Ok(vec![Outcome::Created]));
            assert_eq!(std::fs::read_to_string(room.path("d/file")).unwrap(), "2");
            assert_eq!(std::fs::read_to_string(room.path("d/not yet")).unwrap(), "3");
            assert!(room.path("outer").is_symlink() && room.path("dangling").is_symlink());

            room.write(".a", "4");
            assert_eq!(room.run(&[Line("put", "round", ".a", "", "")]), Err((0, "symlink_loop", None)));
            assert_eq!(room.run(&[Line("remove", "outer", "", "", "")]), Ok(vec![Outcome::Removed]));
            assert!(!room.path("outer").is_symlink() && room.path("inner").exists());
        });
    }

    #[test]
    fn no_name_is_read_as_anything_but_a_name() {
        Room::in_each_shell(|room| {
            for name in
                ["-rf", "a b", "it's \"$HOME\" `id` $(id)", "line\nbreak\n", "* ?", "\\n", "Grüße 🌍", "#", "a;b&c|d"]
            {
                let link = format!("{name} link");
                symlink(name, room.path(&link)).unwrap();
                room.write(".a", "1");
                assert_eq!(room.run(&[Line("put", name, ".a", "", "")]), Ok(vec![Outcome::Created]), "{name:?}");
                room.write(".a", "2");
                let changes = [Line("put", &link, ".a", "", &sha256(b"1")), Line("remove", &link, "", "", "")];
                assert_eq!(room.run(&changes), Ok(vec![Outcome::Replaced, Outcome::Removed]), "{name:?}");
                assert_eq!(room.files(), files(&[(name, "2")]));
                assert_eq!(room.run(&[Line("remove", name, "", "", "present")]), Ok(vec![Outcome::Removed]));
            }
        });
    }
}
