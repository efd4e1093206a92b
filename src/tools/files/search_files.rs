//! `search_files`: lines below a directory, by a regular expression.
//!
//! The executor names the files that may have such a line: those with a text that every match has in it. They are read
//! and matched here, so that an expression means the same at every executor, whatever programs it has.

use std::pin::pin;
use std::sync::Arc;

use futures_util::StreamExt;
use futures_util::stream;
use regex::bytes::{Regex, RegexBuilder};
use regex_syntax::hir::literal::{ExtractKind, Extractor, Seq};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::find_files::{bounded, is_zero};
use super::open_file::OpenFile;
use super::walk::{Excluded, Found, Pattern, Wanted, found, read};
use super::{Attempts, Failure, FileError, answer, look, native};
use crate::protocol::path::FileUri;
use crate::protocol::rest::ToolResult;
use crate::protocol::rpc::OpenMode;
use crate::relay::client::Client;
use crate::tools::{Effect, Run, Site, Tool, ToolError, before, parse, resolve};

pub(in crate::tools) const TOOL: Tool = Tool {
    name: "search_files",
    description: "Search the lines of files for a regular expression (syntax of Rust's regex crate: no look-around, \
                  no back-references), in one file or below a directory, with `context` lines before and after. \
                  `glob` narrows the files as in find_files; `.git` is left out unless `exclude` says otherwise. \
                  Binary files and files above 4 MiB are left out; at most 64 MiB are read in one call, and lines \
                  are cut at 500 characters. Returns matches sorted by path and line, at most `limit`; `truncated` \
                  tells that there may be more.",
    effect: Effect::Reads,
    input: |schemas| schemas.root_schema_for::<Arguments>(),
    output: |schemas| schemas.root_schema_for::<Output>(),
    run: Run::At(|site, arguments| Box::pin(async move { call(site, parse(arguments)?).await })),
};

const SEARCH: &str = include_str!("search.sh");

/// Bytes that the script says at most; `search.sh` has the same.
const FOUND_BYTES_MAX: usize = 4 * 1024 * 1024;

const FILE_BYTES_MAX: u64 = 4 * 1024 * 1024;
/// The same, as `find` counts.
const FILE_BLOCKS_MAX: &str = "8192";

/// Bytes of all files that one call reads.
const READ_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Files that are read at once, for memory and for others who use the stream.
const FILES_AHEAD: usize = 8;

/// Bytes in which a binary file shows itself.
const BINARY_BYTES: usize = 8192;

const LIMIT: usize = 100;
const LIMIT_MAX: usize = 1000;
const CONTEXT_MAX: usize = 20;
const LINE_CHARS_MAX: usize = 500;
const PATTERN_BYTES_MAX: usize = 4096;

/// Arguments of `search_files`.
#[derive(Deserialize, JsonSchema)]
struct Arguments {
    /// The regular expression, for single lines.
    pattern: String,
    /// A file or a directory; the executor's working directory when left out.
    #[serde(default)]
    path: Option<String>,
    /// Which files, as in find_files; all when left out.
    #[serde(default)]
    glob: Option<String>,
    /// Names that are left out with all below them, as globs; `[".git"]` when left out.
    #[serde(default)]
    exclude: Option<Vec<String>>,
    /// Whether upper and lower case are the same.
    #[serde(default)]
    ignore_case: bool,
    /// Lines shown before and after each match; at most 20.
    #[serde(default)]
    context: usize,
    /// Matching lines at most; 100 when left out, at most 1000.
    #[serde(default)]
    limit: Option<usize>,
}

/// The structured part of the answer.
#[derive(Serialize, JsonSchema)]
struct Output {
    /// Sorted by path and line.
    matches: Vec<Match>,
    /// Whether there may be more.
    truncated: bool,
    /// Directories that may not be read.
    #[serde(skip_serializing_if = "is_zero")]
    unreadable: usize,
}

/// One line that matches.
#[derive(Debug, PartialEq, Eq, Serialize, JsonSchema)]
struct Match {
    /// Relative to the directory, with slashes; of a single file as it was asked for.
    path: String,
    /// From 1.
    line: usize,
    /// The line.
    text: String,
    /// The lines before it, oldest first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    before: Vec<String>,
    /// The lines after it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    after: Vec<String>,
}

/// What is looked for in a file.
#[derive(Clone)]
struct Search {
    regex: Arc<Regex>,
    context: usize,
}

async fn call(site: Site<'_>, arguments: Arguments) -> Result<ToolResult, ToolError> {
    let Arguments { pattern, path, glob, exclude, ignore_case, context, limit } = arguments;
    let search = Search { regex: Arc::new(regex(&pattern, ignore_case)?), context };
    if context > CONTEXT_MAX {
        return Err(ToolError::Arguments(format!("context: expected 0 to {CONTEXT_MAX}")));
    }
    let limit = bounded("limit", limit, LIMIT, LIMIT_MAX)?;
    let files = glob.as_deref().map_or(Ok(Pattern::any()), |glob| Pattern::parse("glob", glob))?;
    let excluded = Excluded::parse(exclude)?;
    let path = path.unwrap_or_else(|| ".".into());
    let deadline = site.call.deadline(None)?;
    let searching = async {
        let mut attempts = Attempts::harmless(site, deadline).await?;
        let root = resolve(attempts.client().environment(), "path", &path)?;
        let kind = loop {
            let attempt = look(attempts.client(), &root).await;
            if let Some(looked) = attempts.over(attempt).await {
                break looked?;
            }
        };
        let found = match kind {
            None => return Err(Failure::new("not_found", "the path does not exist").into()),
            Some(kind) if kind.is_directory => {
                let texts = texts_in_every_match(&pattern, ignore_case);
                match candidates(site, &root, &texts, ignore_case, &files, &excluded, deadline).await? {
                    Some(found) => found,
                    None => loop {
                        let attempt = read(attempts.client(), &root, Wanted::Files, &files, &excluded).await;
                        if let Some(found) = attempts.over(attempt).await {
                            break found?;
                        }
                    },
                }
            }
            Some(kind) if kind.is_file => Found { paths: vec![String::new()], cut: false, unreadable: 0 },
            Some(_) => return Err(Failure::new("not_a_file", "neither a directory nor a regular file").into()),
        };
        let (mut matches, cut) = loop {
            let attempt = search_all(attempts.client(), &root, &found.paths, &search, limit).await;
            if let Some(searched) = attempts.over(attempt).await {
                break searched?;
            }
        };
        for found in matches.iter_mut().filter(|found| found.path.is_empty()) {
            found.path.clone_from(&path);
        }
        let output = Output { matches, truncated: cut || found.cut, unreadable: found.unreadable };
        let text = text(&output);
        Ok(answer(output, text))
    };
    before(deadline, async { searching.await.or_else(|error: FileError| error.result(&TOOL)) }).await
}

fn regex(pattern: &str, ignore_case: bool) -> Result<Regex, ToolError> {
    if pattern.len() > PATTERN_BYTES_MAX {
        return Err(ToolError::Arguments(format!("pattern: expected at most {PATTERN_BYTES_MAX} bytes")));
    }
    RegexBuilder::new(pattern)
        .case_insensitive(ignore_case)
        .build()
        .map_err(|error| ToolError::Arguments(format!("pattern: {error}")))
}

/// Texts of which every line that matches has one; none where nothing can be said. Without regard to case only letters
/// that have no other forms than their two in ASCII are in them, since that is how executors compare.
fn texts_in_every_match(pattern: &str, ignore_case: bool) -> Vec<String> {
    let Ok(hir) = regex_syntax::ParserBuilder::new().utf8(false).build().parse(pattern) else { return Vec::new() };
    [ExtractKind::Prefix, ExtractKind::Suffix]
        .into_iter()
        .map(|kind| texts(&Extractor::new().kind(kind).extract(&hir), ignore_case))
        .max_by_key(|texts| texts.iter().map(String::len).min())
        .unwrap_or_default()
}

fn texts(found: &Seq, ignore_case: bool) -> Vec<String> {
    let mut texts = Vec::new();
    for literal in found.literals().unwrap_or_default() {
        let bytes = literal.as_bytes();
        // A match with a line break is in no single line.
        if bytes.contains(&b'\n') {
            continue;
        }
        let longest = std::str::from_utf8(bytes).ok().and_then(|text| {
            let other_forms = |c: char| ignore_case && (!c.is_ascii() || matches!(c, 'k' | 'K' | 's' | 'S'));
            text.split(|c| c == '\0' || other_forms(c)).max_by_key(|part| part.len())
        });
        match longest {
            Some(text) if !text.is_empty() => texts.push(text.to_owned()),
            // A match without any text that is known.
            _ => return Vec::new(),
        }
    }
    texts
}

/// The files below the directory that may have a match, by the executor's `find` and `grep`; nothing where it has no
/// shell.
async fn candidates(
    site: Site<'_>,
    directory: &FileUri,
    texts: &[String],
    ignore_case: bool,
    files: &Pattern,
    excluded: &Excluded,
    deadline: Instant,
) -> Result<Option<Found>, FileError> {
    let (directory, texts) = (native(directory)?, texts.join("\n"));
    let case = if ignore_case { "i" } else { "" };
    let mut words = vec![directory.as_str(), FILE_BLOCKS_MAX, &texts, case, files.name()];
    words.extend(excluded.names());
    let Some(ended) = site.script(SEARCH, &words, deadline).await? else { return Ok(None) };
    // A name with a line break is none of a file here, and is passed over when it is not there.
    let names = ended.stdout.split_inclusive(|byte| *byte == b'\n').filter_map(|name| name.strip_suffix(b"\n"));
    Ok(Some(found(&ended, names, FOUND_BYTES_MAX, files)?))
}

/// The matches in these files, in their order, and whether there may be more.
async fn search_all(
    client: &Client,
    root: &FileUri,
    paths: &[String],
    search: &Search,
    limit: usize,
) -> Result<(Vec<Match>, bool), FileError> {
    let (mut matches, mut bytes) = (Vec::new(), 0);
    let contents = paths.iter().cloned().map(|path| content(client, root, path));
    let mut contents = pin!(stream::iter(contents).buffered(FILES_AHEAD));
    while let Some(read) = contents.next().await {
        let Some((path, content)) = read? else { continue };
        bytes += content.len();
        let (search, room) = (search.clone(), limit - matches.len());
        // Long work for a task that others wait behind.
        let searched = tokio::task::spawn_blocking(move || search.content(&path, &content, room + 1));
        matches.extend(searched.await.unwrap_or_default());
        if matches.len() > limit {
            matches.truncate(limit);
            return Ok((matches, true));
        }
        if bytes > READ_BYTES_MAX {
            return Ok((matches, true));
        }
    }
    Ok((matches, false))
}

/// The content of a file that is searched; nothing where it is not, or not any more.
async fn content(client: &Client, root: &FileUri, path: String) -> Result<Option<(String, Vec<u8>)>, FileError> {
    let uri = path.split('/').filter(|name| !name.is_empty()).fold(root.clone(), |uri, name| uri.child(name));
    let reading = async {
        // Without a shell nobody has looked at it yet.
        if !look(client, &uri).await?.is_some_and(|found| found.is_file && found.size <= FILE_BYTES_MAX) {
            return Ok(None);
        }
        let file = OpenFile::open(client, &uri, OpenMode::Read).await?;
        let content = file.read_range(0, FILE_BYTES_MAX).await?;
        let binary = memchr::memchr(0, &content[..content.len().min(BINARY_BYTES)]).is_some();
        Ok((!binary).then_some(content))
    };
    match reading.await {
        Err(FileError::Failed(_)) => Ok(None),
        read => Ok(read?.map(|content| (path, content))),
    }
}

impl Search {
    /// The first matches in a content.
    fn content(&self, path: &str, content: &[u8], room: usize) -> Vec<Match> {
        let mut lines: Vec<&[u8]> = content.split(|byte| *byte == b'\n').collect();
        // What follows the last line break is a line only if there is something.
        if lines.last().is_some_and(|last| last.is_empty()) {
            lines.pop();
        }
        let matching = lines.iter().enumerate().filter(|(_, line)| self.regex.is_match(without_cr(line)));
        matching
            .take(room)
            .map(|(index, line)| {
                let shown = |lines: &[&[u8]]| lines.iter().map(|line| shown(line)).collect();
                Match {
                    path: path.to_owned(),
                    line: index + 1,
                    text: self::shown(line),
                    before: shown(&lines[index.saturating_sub(self.context)..index]),
                    after: shown(&lines[index + 1..lines.len().min(index + 1 + self.context)]),
                }
            })
            .collect()
    }
}

fn without_cr(line: &[u8]) -> &[u8] {
    line.strip_suffix(b"\r").unwrap_or(line)
}

fn shown(line: &[u8]) -> String {
    String::from_utf8_lossy(without_cr(line)).chars().take(LINE_CHARS_MAX).collect()
}

/// As `grep -n` writes it.
fn text(output: &Output) -> String {
    let mut text = String::new();
    for Match { path, line, text: found, before, after } in &output.matches {
        for (at, line) in (line - before.len()..).zip(before) {
            text.push_str(&format!("{path}-{at}-{line}\n"));
        }
        text.push_str(&format!("{path}:{line}:{found}\n"));
        for (at, line) in (line + 1..).zip(after) {
            text.push_str(&format!("{path}-{at}-{line}\n"));
        }
        if !(before.is_empty() && after.is_empty()) {
            text.push_str("--\n");
        }
    }
    if output.matches.is_empty() {
        text.push_str("nothing found\n");
    }
    if output.truncated {
        text.push_str("[there may be more]\n");
    }
    text
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_match_has_one_of_the_texts() {
        for (pattern, ignore_case, texts) in [
            ("needle", false, &["needle"][..]),
            (r"\bfn \w+", false, &["fn "]),
            (r"\w+_id\b", false, &["_id"]),
            ("one|two", false, &["one", "two"]),
            (r"\d+", false, &[]),
            ("", false, &[]),
            ("a*", false, &[]),
            ("session", true, &["ion"]),
            ("Größe", true, &["Gr"]),
            ("kk", true, &[]),
            (r"x\ny", false, &[]),
        ] {
            assert_eq!(texts_in_every_match(pattern, ignore_case), texts, "{pattern}");
        }
    }

    #[test]
    fn lines_come_with_what_is_around_them() {
        let search = Search { regex: Arc::new(regex("b+$", false).unwrap()), context: 1 };
        let found = search.content("f", b"a\r\nbb\r\nc\nb", 10);
        let line = |line, text: &str, before: &[&str], after: &[&str]| Match {
            path: "f".into(),
            line,
            text: text.into(),
            before: before.iter().map(ToString::to_string).collect(),
            after: after.iter().map(ToString::to_string).collect(),
        };
        assert_eq!(found, [line(2, "bb", &["a"], &["c"]), line(4, "b", &["c"], &[])]);
        assert_eq!(search.content("f", b"b\nb\nb\n", 2).len(), 2);
        let empty = Search { regex: Arc::new(regex("^$", false).unwrap()), context: 0 };
        assert_eq!(empty.content("f", b"\na\n", 10).len(), 1, "what ends the last line begins none");
    }
}
