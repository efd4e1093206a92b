//! `apply_patch`: what a patch says, done to all of its files or to none (connectors-api.md §4.4).
//!
//! The files are read whole and patched in memory; the results are staged beside them and put in their place by one
//! commit, which looks once more that nobody has changed a file meanwhile.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;
use std::sync::Arc;

use futures_util::stream::{self, StreamExt, TryStreamExt};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::files::open_file::OpenFile;
use super::files::staging::{self, Committed, Expect, Put, Refused, Staged, commit, sha256};
use super::files::{Attempts, Failure, FileError, answer, expectation, look_at_file, native};
use super::patch::{self, Action, Patch, Target};
use super::{Effect, Run, Site, Tool, ToolError, parse, resolve_against};
use crate::protocol::path::FileUri;
use crate::protocol::rest::ToolResult;
use crate::protocol::rpc::{EnvironmentInfo, OpenMode};
use crate::relay::client::Client;

pub(super) const TOOL: Tool = Tool {
    name: "apply_patch",
    description: "Change several files at once by a patch: all of them, or none if anything is wrong. Two formats are \
                  recognised. (1) `*** Begin Patch`, then sections `*** Add File: PATH` (every line with `+` before \
                  it; an existing file is replaced), `*** Delete File: PATH`, or `*** Update File: PATH`, optionally \
                  followed by `*** Move to: PATH`, with hunks: `@@`, or `@@ LINE` to go behind that whole line first \
                  (several `@@ LINE` for nested places), then context lines with a space, removed with `-`, added \
                  with `+` before them, and optionally `*** End of File` if the hunk is at the end; then `*** End \
                  Patch`. Hunks follow the order of the file. Context has to fit, except for white space at the ends \
                  of lines; take three lines or more, so that the place is unique: the first that fits is taken. (2) \
                  A unified diff as `git diff` and `diff -u` write it, with renames, new and deleted files and file \
                  modes; line numbers may be off, the context has to be exact, binary changes are refused. Missing \
                  directories are made; CRLF, a missing final newline and permissions are kept. Files up to 16 MiB. \
                  Returns one line per section and for each its operation and the sha256 of the result. Failures: \
                  `invalid_patch` names the line, `no_match` the hunk and the nearest lines of the file, `changed` \
                  means that a file is not as expected, `not_found`, `exists`.",
    effect: Effect::Destroys,
    input: |schemas| schemas.root_schema_for::<Arguments>(),
    output: |schemas| schemas.root_schema_for::<Output>(),
    run: Run::At(|site, arguments| Box::pin(async move { call(site, parse(arguments)?).await })),
};

/// Largest file that is patched.
const FILE_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// Most files of one patch.
const FILES_MAX: usize = 1000;

/// Files read or written at once.
const FILES_AHEAD: usize = 4;

/// Tells the modes of files in octal digits, a line each.
const MODES: &str = r#"
for file; do
  stat -L -c %a "$file" 2>/dev/null || stat -L -f %Mp%Lp "$file" || exit 1
done
"#;

/// Files that the script is given at once: paths may be long, and systems bound what a program is given.
const MODES_AT_ONCE: usize = 100;

/// Arguments of `apply_patch`.
#[derive(Deserialize, JsonSchema)]
struct Arguments {
    /// The patch, from `*** Begin Patch` to `*** End Patch`, or a unified diff.
    patch: String,
    /// Directory for relative paths of the patch; the executor's own when left out.
    #[serde(default)]
    cwd: Option<String>,
    /// What files have to hold before, by their path as in the patch: a SHA-256 in hexadecimal, `*` for anything,
    /// `none` for no file. Nothing is changed unless all fit.
    #[serde(default)]
    if_match: BTreeMap<String, String>,
    /// Whether only to look what the patch would do.
    #[serde(default)]
    dry_run: bool,
}

/// The structured part of the answer.
#[derive(Serialize, JsonSchema)]
struct Output {
    /// The sections of the patch, in its order.
    files: Vec<Section>,
    /// Whether nothing was changed because that was only looked at.
    dry_run: bool,
    /// Whether all files changed at once; false only on executors without /bin/sh, where a failure leaves those before
    /// it changed.
    atomic: bool,
}

/// One section of the patch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
struct Section {
    /// As the patch writes it.
    path: String,
    /// What was done with it.
    operation: Operation,
    /// The new path of what was moved or copied.
    #[serde(skip_serializing_if = "Option::is_none")]
    to: Option<String>,
    /// SHA-256 of the result, for a later `if_match`; left out where there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    sha256: Option<String>,
}

/// What happens to a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Operation {
    Add,
    Delete,
    Update,
    Move,
    Copy,
}

/// What a patch comes to, looked at in memory.
struct Planned {
    /// With what has to be there still when they are made.
    changes: Vec<(patch::Change<FileUri>, Expect)>,
    sections: Vec<Section>,
}

/// Why nothing was changed, with what is wrong where.
struct Refusal {
    sections: Vec<Section>,
    failures: Vec<Option<Failure>>,
}

/// The files of a patch: paths as it writes them, and where they are.
type Places = HashMap<String, FileUri>;

/// The contents of the files that are there.
type Before = HashMap<FileUri, Vec<u8>>;

/// What went well, or the place of what did not.
type Placed<T> = Result<T, (FileUri, Failure)>;

async fn call(site: Site<'_>, arguments: Arguments) -> Result<ToolResult, ToolError> {
    let Arguments { patch, cwd, if_match, dry_run } = arguments;
    let expected = if_match.into_iter().map(|(path, hash)| Ok((path, expectation(Some(hash))?)));
    let expected = expected.collect::<Result<Vec<_>, ToolError>>()?;
    let deadline = site.call.deadline(None)?;
    let patching = async {
        let text: Arc<str> = patch::normalise(patch).into();
        let sections = {
            let text = text.clone();
            aside(move || Patch::parse(&text).map(|patch| sections(&patch))).await
        };
        let sections = match sections {
            Ok(sections) => sections,
            Err(error) => return Ok(wrong("invalid_patch", &error.to_string(), json!({ "line": error.line() }))),
        };
        let mut attempts = Attempts::harmless(site, deadline).await?;
        let places = places(attempts.client().environment(), cwd.as_deref(), &sections)?;
        let mut must_be = HashMap::new();
        for (path, expect) in expected {
            let place = resolve_against(attempts.client().environment(), "if_match", cwd.as_deref(), &path)?.resolved();
            if !places.values().any(|named| *named == place) {
                return Err(ToolError::Arguments(format!("if_match.{path}: the patch does not name this file")).into());
            }
            must_be.insert(place, expect);
        }
        let refused = |place: &FileUri, failure| Refusal::at(&sections, &places, place, failure).result();

        let before = loop {
            let attempt = read(site, attempts.client(), &places, &must_be).await;
            if let Some(read) = attempts.over(attempt).await {
                match read? {
                    Ok(before) => break before,
                    Err((place, failure)) => return Ok(refused(&place, failure)),
                }
            }
        };
        let planned = {
            let (places, bytes_max) = (places.clone(), site.call.settings.patch_bytes_max);
            aside(move || plan(&text, &places, &before, bytes_max)).await
        };
        let Planned { changes, sections: done } = match planned {
            Ok(planned) => planned,
            Err(refusal) => return Ok(refusal.result()),
        };
        if dry_run || changes.is_empty() {
            return Ok(succeeded(done, dry_run, true));
        }

        let modes = modes(site, &changes, deadline).await?;
        let staged = loop {
            let attempt = stage(site, attempts.client(), &changes, &modes).await;
            if let Some(staged) = attempts.over(attempt).await {
                match staged? {
                    Ok(staged) => break staged,
                    Err((place, failure)) => return Ok(refused(&place, failure)),
                }
            }
        };
        Ok(match commit(site, staged, deadline).await? {
            Ok(Committed { atomic, .. }) => succeeded(done, false, atomic),
            Err(Refused { index, failure }) => refused(&changes[index].0.path, failure),
        })
    };
    super::before(deadline, async { patching.await.or_else(|error: FileError| error.result(&TOOL)) }).await
}

/// Does work that takes long enough to hold up others on a thread apart.
async fn aside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime ends, and this call with it.
            Err(_) => std::future::pending().await,
        },
    }
}

fn sections(patch: &Patch<'_>) -> Vec<Section> {
    let section = |file: &patch::FileChange<'_>| {
        let (operation, to) = match &file.action {
            Action::Add { .. } => (Operation::Add, None),
            Action::Delete { .. } => (Operation::Delete, None),
            Action::Update { to: None, .. } => (Operation::Update, None),
            Action::Update { to: Some(Target { path, copy, .. }), .. } => {
                (if *copy { Operation::Copy } else { Operation::Move }, Some(path.to_string()))
            }
        };
        Section { path: file.path.to_string(), operation, to, sha256: None }
    };
    patch.files.iter().map(section).collect()
}

impl Section {
    fn paths(&self) -> impl Iterator<Item = &String> {
        std::iter::once(&self.path).chain(&self.to)
    }

    /// Where its result is.
    fn result(&self) -> &String {
        self.to.as_ref().unwrap_or(&self.path)
    }
}

/// Where the files of a patch are. Two ways to write a path come to one place, links aside.
fn places(environment: &EnvironmentInfo, cwd: Option<&str>, sections: &[Section]) -> Result<Places, FileError> {
    let mut places = Places::new();
    for path in sections.iter().flat_map(Section::paths) {
        if !places.contains_key(path) {
            let place = resolve_against(environment, "patch", cwd, path)?.resolved();
            places.insert(path.clone(), place);
        }
    }
    if places.len() > FILES_MAX {
        return Err(Failure::new("too_large", format!("a patch may name {FILES_MAX} files at most")).into());
    }
    Ok(places)
}

/// Reads all files that are there, if they are what they must be.
async fn read(
    site: Site<'_>,
    client: &Client,
    places: &Places,
    must_be: &HashMap<FileUri, Expect>,
) -> Result<Placed<Before>, FileError> {
    let mut distinct: Vec<&FileUri> = places.values().collect();
    distinct.sort();
    distinct.dedup();
    let sizes = distinct.into_iter().map(|place| async move {
        match look_at_file(client, place).await {
            Ok(found) if found.size > FILE_BYTES_MAX => {
                let message = format!("{} bytes are more than can be patched ({FILE_BYTES_MAX})", found.size);
                Err((place, Failure::new("too_large", message).into()))
            }
            Ok(found) => Ok((place, Some(found.size))),
            Err(FileError::Failed(Failure { code: "not_found", .. })) => Ok((place, None)),
            Err(error) => Err((place, error)),
        }
    });
    let sizes: Vec<_> = match in_order(sizes).await {
        Ok(sizes) => sizes,
        Err((place, error)) => return failed(place, error),
    };
    let bytes_max = site.call.settings.patch_bytes_max;
    if sizes.iter().filter_map(|(_, size)| *size).sum::<u64>() > bytes_max as u64 {
        let message = format!("the files of one patch may have {bytes_max} bytes together");
        return Err(Failure::new("too_large", message).into());
    }
    let contents = sizes.into_iter().map(|(place, size)| async move {
        let content = match size {
            Some(size) => Some(content(client, place, size).await.map_err(|error| (place, error))?),
            None => None,
        };
        match must_be.get(place).map_or(Ok(()), |expect| check(content.as_deref(), expect)) {
            Ok(()) => Ok((place.clone(), content)),
            Err(failure) => Err((place, failure.into())),
        }
    });
    let contents: Vec<_> = match in_order(contents).await {
        Ok(contents) => contents,
        Err((place, error)) => return failed(place, error),
    };
    Ok(Ok(contents.into_iter().filter_map(|(place, content)| Some((place, content?))).collect()))
}

/// What comes of each, some at once, until one fails.
async fn in_order<T, E>(work: impl Iterator<Item = impl Future<Output = Result<T, E>>>) -> Result<Vec<T>, E> {
    // All made now: a stream that made them as it goes would not be known to be `Send`.
    let work: Vec<_> = work.collect();
    stream::iter(work).buffered(FILES_AHEAD).try_collect().await
}

/// Splits what is wrong with one file from what is wrong with the call.
fn failed<T>(place: &FileUri, error: FileError) -> Result<Placed<T>, FileError> {
    match error {
        FileError::Failed(failure) => Ok(Err((place.clone(), failure))),
        error @ FileError::Tool(_) => Err(error),
    }
}

async fn content(client: &Client, place: &FileUri, size: u64) -> Result<Vec<u8>, FileError> {
    let file = OpenFile::open(client, place, OpenMode::Read).await?;
    let content = file.read_range(0, size + 1).await?;
    if content.len() as u64 > size {
        return Err(Failure::new("changed", "the file grows while it is read").into());
    }
    Ok(content)
}

fn check(content: Option<&[u8]>, expect: &Expect) -> Result<(), Failure> {
    let current = content.map(sha256);
    let code = match (expect, &current) {
        (Expect::Missing, Some(_)) => "exists",
        (Expect::Present | Expect::Content(_), None) => "not_found",
        (Expect::Content(expected), Some(current)) if expected != current => "changed",
        _ => return Ok(()),
    };
    Err(Failure { current, ..Failure::known(code).expect("all three are known") })
}

/// Applies the patch in memory.
fn plan(text: &str, places: &Places, before: &Before, bytes_max: usize) -> Result<Planned, Refusal> {
    let patch = Patch::parse(text).expect("it was read before");
    let mut sections = sections(&patch);
    let changes = match patch::plan(&patch, |path| places[path].clone(), before, bytes_max) {
        Ok(changes) => changes,
        Err(failures) => {
            let failure = |failure: patch::Failure| Failure::new(failure.code(), failure.to_string());
            let failures = failures.into_iter().map(|failed| failed.map(failure)).collect();
            return Err(Refusal { sections, failures });
        }
    };
    let changed: HashMap<_, _> = changes.iter().map(|change| (&change.path, change.content.as_ref())).collect();
    for section in &mut sections {
        let place = &places[section.result()];
        let content = changed.get(place).copied().unwrap_or_else(|| before.get(place));
        section.sha256 = content.map(|content| sha256(content));
    }
    let changes = changes.into_iter().map(|change| {
        let content = before.get(&change.path);
        let expect = content.map_or(Expect::Missing, |content| Expect::Content(sha256(content)));
        (change, expect)
    });
    Ok(Planned { changes: changes.collect(), sections })
}

/// The modes of results that do not just keep their own.
async fn modes(
    site: Site<'_>,
    changes: &[(patch::Change<FileUri>, Expect)],
    deadline: Instant,
) -> Result<HashMap<FileUri, u32>, FileError> {
    let mut modes = HashMap::new();
    let mut asked = Vec::new();
    for (change, expect) in changes {
        let known = change.like.as_ref().or((*expect != Expect::Missing).then_some(&change.path));
        match (known, change.executable) {
            _ if change.content.is_none() || change.like.is_none() && change.executable.is_none() => {}
            (Some(place), executable) => asked.push((&change.path, native(place)?, executable)),
            (None, Some(true)) => drop(modes.insert(change.path.clone(), 0o755)),
            (None, _) => {}
        }
    }
    for asked in asked.chunks(MODES_AT_ONCE) {
        let files: Vec<&str> = asked.iter().map(|(_, file, _)| &**file).collect();
        // Without a POSIX shell there are no modes.
        let Some(ended) = site.script(MODES, &files, deadline).await? else { return Ok(modes) };
        let said = String::from_utf8_lossy(&ended.stdout);
        let told: Vec<u32> = said.lines().filter_map(|line| u32::from_str_radix(line, 8).ok()).collect();
        if told.len() != asked.len() {
            return Err(Failure::said(&ended).into());
        }
        for ((place, _, executable), mode) in asked.iter().zip(told) {
            let mode = match executable {
                // Whoever may read it may run it, as git has it.
                Some(true) => mode | (mode & 0o444) >> 2,
                Some(false) => mode & !0o111,
                None => mode,
            };
            modes.insert((*place).clone(), mode);
        }
    }
    Ok(modes)
}

/// Puts the new contents beside their files.
async fn stage(
    site: Site<'_>,
    client: &Client,
    changes: &[(patch::Change<FileUri>, Expect)],
    modes: &HashMap<FileUri, u32>,
) -> Result<Placed<Vec<staging::Change>>, FileError> {
    let staged = changes.iter().map(|(change, expect)| async move {
        let target = &change.path;
        let put = match &change.content {
            Some(content) => {
                let parents = *expect == Expect::Missing;
                let staged = Staged::whole(site, client, target, parents, content).await;
                let staged = staged.map_err(|error| (target, error))?;
                Some(Put { staged, mode: modes.get(target).copied(), parents })
            }
            None => None,
        };
        Ok(staging::Change { target: target.clone(), put, expect: expect.clone() })
    });
    match in_order(staged).await {
        Ok(staged) => Ok(Ok(staged)),
        Err((place, error)) => failed(place, error),
    }
}

fn succeeded(files: Vec<Section>, dry_run: bool, atomic: bool) -> ToolResult {
    let mut text = String::new();
    for section in &files {
        let _ = writeln!(text, "{}: ok", section.path);
    }
    if dry_run {
        text.push_str("dry run: nothing was changed\n");
    }
    answer(Output { files, dry_run, atomic }, text.trim_end())
}

/// A failure that is not one file's.
fn wrong(code: &str, message: &str, mut structured: Value) -> ToolResult {
    structured["code"] = json!(code);
    ToolResult { structured_content: Some(structured), ..ToolResult::error(format!("apply_patch: {message}")) }
}

impl Refusal {
    /// What is wrong with the file of that place, in the sections that name it.
    fn at(sections: &[Section], places: &Places, place: &FileUri, failure: Failure) -> Self {
        let named = |section: &Section| section.paths().any(|path| places[path] == *place);
        let failures = sections.iter().map(|section| named(section).then(|| failure.clone()));
        Self { failures: failures.collect(), sections: sections.to_vec() }
    }

    /// One line per section, as for a success; none was carried out.
    fn result(self) -> ToolResult {
        let Self { sections, failures } = self;
        let mut text = String::new();
        let mut files = Vec::new();
        let mut structured = json!({});
        for (section, failure) in sections.into_iter().zip(failures) {
            let path = section.path.clone();
            let mut file = serde_json::to_value(section).expect("plain data");
            match failure {
                None => drop(writeln!(text, "{path}: not changed")),
                Some(Failure { code, message, current }) => {
                    let _ = writeln!(text, "{path}: error: {message}");
                    file["code"] = json!(code);
                    file["message"] = json!(message);
                    if let Some(current) = current {
                        file["current_sha256"] = json!(current);
                    }
                    if structured.get("code").is_none() {
                        structured["code"] = json!(code);
                        if let Some(current) = file.get("current_sha256") {
                            structured["current_sha256"] = current.clone();
                        }
                    }
                }
            }
            files.push(file);
        }
        structured["files"] = json!(files);
        ToolResult { structured_content: Some(structured), ..ToolResult::error(text.trim_end()) }
    }
}
