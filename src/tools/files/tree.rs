//! A directory with all it holds, on its way to another place: listed by a script at its executor, carried file by file,
//! completed and put in its place by a script at the other.
//!
//! Files of up to a block go in one message each, several at once; larger ones one after the other, in blocks.

use std::collections::{BTreeMap, HashMap};
use std::sync::Mutex;
use std::sync::PoisonError;

use futures_util::future::try_join_all;
use tokio::time::Instant;

use super::copy_path::{Copied, End, carry as carry_one, copy_locally, digest_of, no_shell};
use super::copying::{Mark, marked};
use super::reading::Snapshot;
use super::staging::{Change, Expect, Leftover, PREFIX, Put, commit, directory_for, sha256};
use super::{Failure, FileError, native};
use crate::protocol::path::FileUri;
use crate::protocol::rpc::{BLOCK_BYTES_MAX, FsCreateDirectory, FsReadFile, FsWriteFile};

const LIST: &str = include_str!("list.sh");

/// The SHA-256 of files below `$1`, a line each; `-` for what is not there.
const SUMS: &str = r#"
cd "$1" || exit 1
shift
if command -v sha256sum >/dev/null; then sum=sha256sum; elif command -v shasum >/dev/null; then sum='shasum -a 256'
else sum='openssl dgst -sha256 -r'; fi
for file do
  if [ -f "$file" ] && [ ! -L "$file" ]; then $sum <"$file" || exit 1; else echo -; fi
done
"#;

/// Makes links below `$1`: pairs of a path and what it says.
const LINKS: &str = r#"
cd "$1" || exit 1
shift
while [ $# -ge 2 ]; do
  rm -f "$1" && ln -s -- "$2" "$1" || exit 1
  shift 2
done
"#;

/// Gives what is below `$1` its permissions `$2`.
const MODES: &str = r#"
cd "$1" || exit 1
mode=$2
shift 2
chmod "$mode" "$@"
"#;

/// Puts `$1` in the place `$2`, where nothing is.
const SETTLE: &str = r#"
trap '' HUP INT TERM
if [ -e "$2" ] || [ -L "$2" ]; then echo 'refused exists'; exit 1; fi
mv "$1" "$2"
"#;

/// Files of up to a block that are carried at once.
const FILES_AT_ONCE: usize = 4;

/// Bytes of paths that one script is given.
const BATCH_BYTES: usize = 64 * 1024;

const KIND: u32 = 0o170_000;

/// A directory as it was listed.
pub(super) struct Tree<'a> {
    source: End<'a>,
    root: FileUri,
    /// In the order of their paths; a directory comes before what it holds.
    entries: BTreeMap<String, Entry>,
}

/// Something in it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    kind: Kind,
    /// Permissions, without those that would give others the rights of a new owner.
    mode: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    Directory,
    File { size: u64, modified: i64 },
    Link(String),
    Other,
}

impl<'a> Tree<'a> {
    /// Lists a directory.
    ///
    /// # Errors
    /// [`FileError`].
    pub(super) async fn of(source: End<'a>, root: &FileUri, deadline: Instant) -> Result<Self, FileError> {
        let listing = async {
            let ended = source.site.script(LIST, &[&native(root)?], deadline).await?.ok_or_else(no_shell)?;
            if ended.exit_code != Some(0) {
                return Err(Failure::said(&ended).into());
            }
            if ended.lost_bytes > 0 {
                return Err(Failure::new("too_large", "too many entries for one copy").into());
            }
            if ended.lost_chunks > 0 {
                return Err(Failure::new("failed", "the list of the directory was lost; try again").into());
            }
            listed(&ended.stdout)
        };
        let entries = listing.await.map_err(|error: FileError| source.says(error))?;
        Ok(Self { source, root: root.clone(), entries })
    }

    fn files(&self) -> impl Iterator<Item = (&str, u64)> {
        self.entries.iter().filter_map(|(path, entry)| match entry.kind {
            Kind::File { size, .. } => Some((path.as_str(), size)),
            Kind::Directory | Kind::Link(_) | Kind::Other => None,
        })
    }

    fn bytes(&self) -> u64 {
        self.files().map(|(_, size)| size).sum()
    }

    /// Copies it on its own machine.
    ///
    /// # Errors
    /// [`FileError`].
    pub(super) async fn copy_within(
        &self,
        destination: End<'_>,
        to: &FileUri,
        deadline: Instant,
    ) -> Result<Copied, FileError> {
        let staged = self.stage(destination, to, None, deadline).await?;
        copy_locally(destination, &self.root, staged.path(), true, deadline).await?;
        let paths: Vec<&str> = self.files().map(|(path, _)| path).collect();
        let sums = sums(destination, staged.path(), &paths, deadline).await?;
        let hashes: BTreeMap<String, String> = paths.iter().map(|path| (*path).to_owned()).zip(sums).collect();
        settle(destination, staged, to, deadline).await?;
        Ok(self.copied(&hashes, Vec::new()))
    }

    /// Copies it to another machine.
    ///
    /// # Errors
    /// [`FileError`].
    pub(super) async fn copy(
        &self,
        destination: End<'_>,
        to: &FileUri,
        deadline: Instant,
    ) -> Result<Copied, FileError> {
        let state = digest_of([format!("{:?}", self.entries).as_str()]);
        let mark = Mark::new(self.source.site, destination.site, &[self.root.as_str(), &state, to.as_str()]);
        let former = match &mark {
            None => None,
            Some(mark) => marked(mark, destination, to, deadline).await?.into_iter().next(),
        };
        let (staged, mut hashes) = match former {
            Some((_, path)) => {
                let attempts = destination.attempts(deadline).await?;
                let staged = Leftover::at(destination.site, attempts.client(), path);
                let good = self.taken_up(destination, staged.path(), deadline).await?;
                (staged, good)
            }
            None => (self.stage(destination, to, mark.as_ref(), deadline).await?, BTreeMap::new()),
        };
        self.carry(destination, staged.path(), &mut hashes, deadline).await?;

        let paths: Vec<&str> = hashes.keys().map(String::as_str).collect();
        let there = sums(destination, staged.path(), &paths, deadline).await?;
        if there.iter().ne(hashes.values()) {
            return Err(destination.says(Failure::new("corrupt", "what arrived is not what was sent")));
        }
        let skipped = self.complete(destination, staged.path(), deadline).await?;
        settle(destination, staged, to, deadline).await?;
        Ok(self.copied(&hashes, skipped))
    }

    fn copied(&self, hashes: &BTreeMap<String, String>, skipped: Vec<String>) -> Copied {
        let list: String = hashes.iter().map(|(path, hash)| format!("{hash}  {path}\n")).collect();
        let sha256 = sha256(list.as_bytes());
        Copied { bytes: self.bytes(), sha256, files: Some(hashes.len() as u64), skipped }
    }

    /// A place beside `to`, which is not made yet.
    async fn stage(
        &self,
        destination: End<'_>,
        to: &FileUri,
        mark: Option<&Mark<'_>>,
        deadline: Instant,
    ) -> Result<Leftover, FileError> {
        let mut attempts = destination.attempts(deadline).await?;
        let unique = uuid::Uuid::new_v4().simple();
        let name = match mark {
            Some(mark) => format!("{PREFIX}{}.tree.{unique}.part", mark.as_str()),
            None => format!("{PREFIX}{unique}.part"),
        };
        loop {
            let attempt = directory_for(attempts.client(), to, false).await;
            if let Some(directory) = attempts.over(attempt).await {
                let directory = directory.map_err(|error| destination.says(error))?;
                return Ok(Leftover::at(destination.site, attempts.client(), directory.child(&name)));
            }
        }
    }

    /// The files that are staged already and the same as here.
    async fn taken_up(
        &self,
        destination: End<'_>,
        staged: &FileUri,
        deadline: Instant,
    ) -> Result<BTreeMap<String, String>, FileError> {
        let paths: Vec<&str> = self.files().map(|(path, _)| path).collect();
        let there = sums(destination, staged, &paths, deadline).await;
        // It may have been removed since, or never been made.
        let Ok(there) = there else { return Ok(BTreeMap::new()) };
        let here = sums(self.source, &self.root, &paths, deadline).await?;
        let same = paths.iter().zip(there.into_iter().zip(here)).filter(|(_, (there, here))| there == here);
        Ok(same.map(|(path, (hash, _))| ((*path).to_owned(), hash)).collect())
    }

    /// Carries directories and those files of which the hash is not known yet.
    async fn carry(
        &self,
        destination: End<'_>,
        staged: &FileUri,
        hashes: &mut BTreeMap<String, String>,
        deadline: Instant,
    ) -> Result<(), FileError> {
        let mut attempts = destination.attempts(deadline).await?;
        let directories = self.entries.iter().filter(|(_, entry)| entry.kind == Kind::Directory);
        for (path, _) in directories {
            loop {
                let make = FsCreateDirectory { path: below(staged, path), recursive: true };
                let attempt = attempts.client().call(&make).await.map_err(FileError::from);
                if let Some(made) = attempts.over(attempt).await {
                    made.map_err(|error| destination.says(error))?;
                    break;
                }
            }
        }
        let total = self.bytes();
        let done: u64 = self.files().filter(|(path, _)| hashes.contains_key(*path)).map(|(_, size)| size).sum();
        let missing = self.files().filter(|(path, _)| !hashes.contains_key(*path));
        let (small, large): (Vec<_>, Vec<_>) = missing.partition(|(_, size)| *size <= BLOCK_BYTES_MAX as u64);
        let carried = Mutex::new((done, HashMap::new()));
        let carry = |path: &str, size: u64, hash: String| {
            let mut carried = carried.lock().unwrap_or_else(PoisonError::into_inner);
            carried.0 += size;
            carried.1.insert(path.to_owned(), hash);
            self.source.site.call.progressed(carried.0, total);
        };
        let queue = Mutex::new(small.into_iter());
        let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
        let worker = || async {
            let (mut from, mut to) = (self.source.attempts(deadline).await?, destination.attempts(deadline).await?);
            while let Some((path, size)) = next() {
                let content = loop {
                    let read = FsReadFile { path: below(&self.root, path) };
                    let attempt = from.client().call(&read).await.map_err(FileError::from);
                    if let Some(content) = from.over(attempt).await {
                        from.got_on();
                        break content.map_err(|error| self.source.says(error))?.data_base64;
                    }
                };
                if content.0.len() as u64 != size {
                    let changed = Failure::new("changed", format!("{path} was changed while it was read"));
                    return Err(self.source.says(changed));
                }
                let hash = sha256(&content.0);
                let write = FsWriteFile { path: below(staged, path), data_base64: content };
                loop {
                    let attempt = to.client().call(&write).await.map_err(FileError::from);
                    if let Some(written) = to.over(attempt).await {
                        to.got_on();
                        written.map_err(|error| destination.says(error))?;
                        break;
                    }
                }
                carry(path, size, hash);
            }
            Ok::<_, FileError>(())
        };
        try_join_all((0..FILES_AT_ONCE).map(|_| worker())).await?;

        for (path, size) in large {
            let mut from = self.source.attempts(deadline).await?;
            let file = loop {
                let attempt = Snapshot::of(from.client(), &below(&self.root, path)).await;
                if let Some(file) = from.over(attempt).await {
                    break file.map_err(|error| self.source.says(error))?;
                }
            };
            if file.size != size {
                let changed = Failure::new("changed", format!("{path} was changed while it was read"));
                return Err(self.source.says(changed));
            }
            let to = below(staged, path);
            let mark = Mark::of(self.source.site, &file, destination.site, &to);
            let (content, _, hash) = carry_one(self.source, &file, destination, &to, mark.as_ref(), deadline).await?;
            let put = Put { staged: content, mode: None, parents: false };
            let change = Change { target: to, put: Some(put), expect: Expect::Anything };
            let committed = commit(destination.site, vec![change], deadline).await;
            let committed = committed.map_err(|error| destination.says(error))?;
            committed.map_err(|refused| destination.says(refused.failure))?;
            carry(path, size, hash);
        }
        hashes.extend(carried.into_inner().unwrap_or_else(PoisonError::into_inner).1);
        Ok(())
    }

    /// Makes the links and gives everything its permissions; says what cannot be copied.
    async fn complete(
        &self,
        destination: End<'_>,
        staged: &FileUri,
        deadline: Instant,
    ) -> Result<Vec<String>, FileError> {
        let (mut links, mut skipped) = (Vec::new(), Vec::new());
        let (mut files, mut directories) = (BTreeMap::<u32, Vec<&str>>::new(), Vec::new());
        for (path, entry) in &self.entries {
            match &entry.kind {
                Kind::Link(says) => links.push([path.as_str(), says.as_str()]),
                Kind::File { .. } => files.entry(entry.mode).or_default().push(path),
                // One that may not be written is closed after all it holds.
                Kind::Directory => directories.push((entry.mode, path.as_str())),
                Kind::Other => skipped.push(path.clone()),
            }
        }
        run(destination, LINKS, staged, &[], &links, deadline).await?;
        for (mode, paths) in files {
            let paths: Vec<[&str; 1]> = paths.into_iter().map(|path| [path]).collect();
            run(destination, MODES, staged, &[&format!("{mode:o}")], &paths, deadline).await?;
        }
        directories.reverse();
        for same in directories.chunk_by(|(one, _), (other, _)| one == other) {
            let paths: Vec<[&str; 1]> = same.iter().map(|(_, path)| [*path]).collect();
            run(destination, MODES, staged, &[&format!("{:o}", same[0].0)], &paths, deadline).await?;
        }
        Ok(skipped)
    }
}

fn below(root: &FileUri, path: &str) -> FileUri {
    path.split('/').filter(|name| *name != ".").fold(root.clone(), |place, name| place.child(name))
}

/// Runs a script on as many items at once as fit; gives what they said, one after the other.
async fn run<const N: usize>(
    end: End<'_>,
    script: &'static str,
    root: &FileUri,
    head: &[&str],
    items: &[[&str; N]],
    deadline: Instant,
) -> Result<Vec<u8>, FileError> {
    let root = native(root).map_err(|error| end.says(error))?;
    let (mut said, mut rest) = (Vec::new(), items);
    while !rest.is_empty() {
        let mut bytes = 0;
        let fits = rest.iter().take_while(|item| {
            bytes += item.iter().map(|text| text.len() + 1).sum::<usize>();
            bytes <= BATCH_BYTES
        });
        let (batch, others) = rest.split_at(fits.count().max(1));
        rest = others;
        let mut arguments = vec![root.as_str()];
        arguments.extend(head);
        arguments.extend(batch.iter().flatten());
        let ended = end.site.script(script, &arguments, deadline).await.map_err(|error| end.says(error))?;
        let ended = ended.ok_or_else(|| end.says(no_shell()))?;
        if ended.exit_code != Some(0) {
            return Err(end.says(Failure::said(&ended)));
        }
        said.extend(ended.stdout);
    }
    Ok(said)
}

/// The SHA-256 of each of these files.
async fn sums(end: End<'_>, root: &FileUri, paths: &[&str], deadline: Instant) -> Result<Vec<String>, FileError> {
    let items: Vec<[&str; 1]> = paths.iter().map(|path| [*path]).collect();
    let said = run(end, SUMS, root, &[], &items, deadline).await?;
    let sums: Vec<String> = String::from_utf8_lossy(&said)
        .lines()
        .map(|line| line.chars().take_while(char::is_ascii_hexdigit).collect())
        .collect();
    if sums.len() == paths.len() {
        Ok(sums)
    } else {
        Err(end.says(Failure::new("failed", "the sums are not complete")))
    }
}

/// Puts the staged directory in its place.
async fn settle(destination: End<'_>, staged: Leftover, to: &FileUri, deadline: Instant) -> Result<(), FileError> {
    let paths = native(staged.path()).and_then(|staged| Ok((staged, native(to)?)));
    let (from, to) = paths.map_err(|error| destination.says(error))?;
    let ended = destination.site.script(SETTLE, &[&from, &to], deadline).await;
    match ended.map_err(|error| destination.says(error))? {
        Some(ended) if ended.exit_code == Some(0) => {
            staged.gone();
            Ok(())
        }
        Some(ended) => Err(destination.says(Failure::said(&ended))),
        None => Err(destination.says(no_shell())),
    }
}

/// What the script said; its top tells the form.
fn listed(said: &[u8]) -> Result<BTreeMap<String, Entry>, FileError> {
    let changed = || Failure::new("changed", "the directory was changed while it was listed");
    let no_text =
        |name: &[u8]| Failure::new("invalid", format!("a name in it is no UTF-8: {}", String::from_utf8_lossy(name)));
    let mut rest = said;
    let mut record = |until: u8| -> Result<&[u8], Failure> {
        let end = rest.iter().position(|byte| *byte == until).ok_or_else(changed)?;
        let record = &rest[..end];
        rest = &rest[end + 1..];
        Ok(record)
    };
    let mut paths = Vec::new();
    loop {
        match record(0)? {
            b"" => break,
            path => paths.push(std::str::from_utf8(path).map_err(|_| no_text(path))?),
        }
    }
    let mut facts = Vec::new();
    loop {
        match record(b'\n')? {
            b"" => break,
            line => facts.push(line),
        }
    }
    if facts.len() != paths.len() {
        return Err(changed().into());
    }
    let mut entries = BTreeMap::new();
    for (path, facts) in paths.into_iter().zip(facts) {
        let facts = String::from_utf8_lossy(facts);
        let mut facts = facts.split(' ');
        let mode = facts.next().and_then(|mode| u32::from_str_radix(mode, 16).ok()).ok_or_else(changed)?;
        let size = facts.next().and_then(|size| size.parse().ok()).ok_or_else(changed)?;
        let modified = facts.next().and_then(|seconds| seconds.parse().ok()).ok_or_else(changed)?;
        let kind = match mode & KIND {
            0o040_000 => Kind::Directory,
            0o100_000 => Kind::File { size, modified },
            0o120_000 => {
                let says = record(0)?;
                let says = says.strip_suffix(b"\nx").ok_or_else(changed)?;
                Kind::Link(std::str::from_utf8(says).map_err(|_| no_text(says))?.to_owned())
            }
            _ => Kind::Other,
        };
        entries.insert(path.to_owned(), Entry { kind, mode: mode & 0o777 });
    }
    Ok(entries)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const SAID: &[u8] = b".\0./a\nb\0./l\0./p\0\0\
        41ed 4096 7\n81a4 12 8\na1ff 3 9\n11a4 0 9\n\n\
        to\n\nx\0";

    #[test]
    fn a_list_is_read_with_whatever_stands_in_names() {
        let entries = listed(SAID).unwrap();
        let entry = |kind, mode| Entry { kind, mode };
        let expected = [
            (".", entry(Kind::Directory, 0o755)),
            ("./a\nb", entry(Kind::File { size: 12, modified: 8 }, 0o644)),
            ("./l", entry(Kind::Link("to\n".into()), 0o777)),
            ("./p", entry(Kind::Other, 0o644)),
        ];
        assert!(entries.iter().map(|(path, entry)| (path.as_str(), entry.clone())).eq(expected));
    }

    #[test]
    fn a_list_that_is_torn_or_contradicts_itself_is_refused() {
        for end in 0..SAID.len() {
            assert!(listed(&SAID[..end]).is_err(), "{end} bytes");
        }
        assert!(listed(b".\0./a\x00\x0041ed 4096 7\n\n").is_err(), "two paths and facts of one");
        assert!(listed(b"./\xff\x00\x0081a4 1 7\n\n").is_err(), "no text");
    }
}
