//! `edit_file`: an exact piece of text replaced by another, in a file that nobody changes meanwhile.

use memchr::memmem;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::open_file::OpenFile;
use super::staging::{Change, Expect, Put, Staged, commit, sha256};
use super::write_file::expectation;
use super::{Attempts, Failure, FileError, answer, look_at_file};
use crate::protocol::rest::ToolResult;
use crate::protocol::rpc::OpenMode;
use crate::relay::client::Client;
use crate::tools::{Effect, Run, Site, Tool, ToolError, before, parse, resolve};

pub(in crate::tools) const TOOL: Tool = Tool {
    name: "edit_file",
    description: "Replace a piece of text in a file. `old_string` has to be in the file exactly, with its white space \
                  and line breaks, and only once, unless `replace_all` is true: otherwise nothing is changed and the \
                  failure `no_match` shows the lines that are most like it, `not_unique` those where it is. Take \
                  enough lines around the change to make it unique. Line endings (CRLF), a missing final newline, \
                  permissions and links stay as they are. Files up to 16 MiB. Returns replacements, bytes, sha256.",
    effect: Effect::Destroys,
    input: |schemas| schemas.root_schema_for::<Arguments>(),
    output: |schemas| schemas.root_schema_for::<Output>(),
    run: Run::At(|site, arguments| Box::pin(async move { call(site, parse(arguments)?).await })),
};

/// Largest file that is edited.
const FILE_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// Places named in a failure, and characters shown of a line.
const PLACES_MAX: usize = 5;
const LINE_CHARS_MAX: usize = 200;

/// Arguments of `edit_file`.
#[derive(Deserialize, JsonSchema)]
struct Arguments {
    /// The file; relative paths and `~` are taken on the executor.
    path: String,
    /// The text to replace, exactly as it is in the file.
    old_string: String,
    /// What comes in its place; may be empty.
    new_string: String,
    /// Whether every occurrence is replaced.
    #[serde(default)]
    replace_all: bool,
    /// The SHA-256 that the file has to have, in hexadecimal.
    #[serde(default)]
    if_match: Option<String>,
}

/// The structured part of the answer.
#[derive(Serialize, JsonSchema)]
struct Output {
    /// How often the text was replaced.
    replacements: usize,
    /// Line where the first replacement begins.
    line: usize,
    /// Of the whole file now.
    bytes: usize,
    /// SHA-256 of the content now, for a later `if_match`.
    sha256: String,
    /// Whether a reader sees the old file or the new one, and never a part; false only on executors without /bin/sh.
    atomic: bool,
}

async fn call(site: Site<'_>, arguments: Arguments) -> Result<ToolResult, ToolError> {
    if arguments.old_string.is_empty() {
        return Err(ToolError::Arguments("old_string: expected some text".into()));
    }
    if arguments.old_string == arguments.new_string {
        return Err(ToolError::Arguments("new_string: expected another text than old_string".into()));
    }
    let expect = match expectation(arguments.if_match.clone())? {
        Expect::Missing => return Err(ToolError::Arguments("if_match: `none` does not fit an edit".into())),
        expect => expect,
    };
    let deadline = site.call.deadline(None)?;
    let editing = async {
        let mut attempts = Attempts::harmless(site, deadline).await?;
        let (change, edited) = loop {
            let attempt = attempt(site, attempts.client(), &arguments, &expect).await;
            if let Some(staged) = attempts.over(attempt).await {
                break staged?;
            }
        };
        let committed = commit(site, vec![change], deadline).await?.map_err(|refused| refused.failure)?;
        let Edited { content, replacements, line } = edited;
        let times = if replacements == 1 { String::new() } else { format!(" and {} more", replacements - 1) };
        let text = format!("replaced at line {line}{times}");
        let (bytes, sha256) = (content.len(), sha256(&content));
        Ok(answer(Output { replacements, line, bytes, sha256, atomic: committed.atomic }, text))
    };
    before(deadline, async { editing.await.or_else(|error: FileError| error.result(&TOOL)) }).await
}

async fn attempt(
    site: Site<'_>,
    client: &Client,
    arguments: &Arguments,
    expect: &Expect,
) -> Result<(Change, Edited), FileError> {
    let target = resolve(client.environment(), "path", &arguments.path)?;
    let size = look_at_file(client, &target).await?.size;
    if size > FILE_BYTES_MAX {
        let message = format!("{size} bytes are more than can be edited ({FILE_BYTES_MAX})");
        return Err(Failure::new("too_large", message).into());
    }
    let file = OpenFile::open(client, &target, OpenMode::Read).await?;
    let content = file.read_range(0, FILE_BYTES_MAX + 1).await?;
    drop(file);
    let found = sha256(&content);
    if let Expect::Content(expected) = expect
        && *expected != found
    {
        let current = Some(found);
        return Err(Failure { current, ..Failure::known("changed").expect("a known code") }.into());
    }
    let edited = edit(&content, &arguments.old_string, &arguments.new_string, arguments.replace_all)?;
    let staged = Staged::whole(site, client, &target, false, &edited.content).await?;
    let put = Put { staged, mode: None, parents: false };
    // Whoever writes between our reading and our writing is not overwritten.
    Ok((Change { target, put: Some(put), expect: Expect::Content(found) }, edited))
}

/// A content that was changed.
#[derive(Debug, PartialEq, Eq)]
struct Edited {
    content: Vec<u8>,
    replacements: usize,
    line: usize,
}

fn edit(content: &[u8], old: &str, new: &str, all: bool) -> Result<Edited, Failure> {
    let (old, new) = if ends_lines_with_crlf(content) { (crlf(old), crlf(new)) } else { (old.into(), new.into()) };
    let finder = memmem::Finder::new(old.as_bytes());
    let Some(first) = finder.find(content) else { return Err(no_match(content, &old)) };
    // From the next byte on: two places that overlap are two.
    if !all && finder.find(&content[first + 1..]).is_some() {
        return Err(not_unique(content, finder.find_iter(content)));
    }
    let mut edited = Vec::with_capacity(content.len() + new.len());
    let (mut end, mut replacements) = (0, 0);
    for at in finder.find_iter(content) {
        edited.extend_from_slice(&content[end..at]);
        edited.extend_from_slice(new.as_bytes());
        (end, replacements) = (at + old.len(), replacements + 1);
    }
    edited.extend_from_slice(&content[end..]);
    Ok(Edited { content: edited, replacements, line: line_of(content, first) })
}

/// Whether every line of the content, and one at least, ends with CR LF.
fn ends_lines_with_crlf(content: &[u8]) -> bool {
    let mut breaks = memchr::memchr_iter(b'\n', content).peekable();
    breaks.peek().is_some() && breaks.all(|at| at > 0 && content[at - 1] == b'\r')
}

fn crlf(text: &str) -> String {
    text.replace("\r\n", "\n").replace('\n', "\r\n")
}

fn line_of(content: &[u8], at: usize) -> usize {
    memchr::memchr_iter(b'\n', &content[..at]).count() + 1
}

fn not_unique(content: &[u8], places: impl Iterator<Item = usize>) -> Failure {
    let mut lines: Vec<usize> = places.map(|at| line_of(content, at)).take(PLACES_MAX + 1).collect();
    let more = if lines.len() > PLACES_MAX { " and more" } else { "" };
    lines.truncate(PLACES_MAX);
    let lines: Vec<String> = lines.iter().map(ToString::to_string).collect();
    let message = format!(
        "old_string is there more than once, at lines {}{more}; take more lines around it, or set replace_all",
        lines.join(", ")
    );
    Failure::new("not_unique", message)
}

/// Shows the lines that are most like the first one of the text.
fn no_match(content: &[u8], old: &str) -> Failure {
    let wanted = old.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or_default();
    let text = String::from_utf8_lossy(content);
    let mut likely: Vec<(usize, usize, &str)> = text
        .lines()
        .enumerate()
        .map(|(index, line)| (likeness(line.trim(), wanted), index + 1, line))
        // At least half of it.
        .filter(|(likeness, ..)| !wanted.is_empty() && 2 * likeness >= wanted.len())
        .collect();
    likely.sort_by_key(|(likeness, line, _)| (std::cmp::Reverse(*likeness), *line));
    likely.truncate(3);
    if likely.is_empty() {
        return Failure::new("no_match", "old_string is not in the file, and no line is like its first one");
    }
    let shown = likely.iter().map(|(_, number, line)| {
        let line: String = line.chars().take(LINE_CHARS_MAX).collect();
        format!("\n{number}: {line}")
    });
    Failure::new(
        "no_match",
        format!("old_string is not in the file; most like its first line:{}", shown.collect::<String>()),
    )
}

/// Bytes that two lines have in common at their beginning and their end; of equal ones all.
fn likeness(line: &str, wanted: &str) -> usize {
    let same = |(a, b): &(u8, u8)| a == b;
    let head = line.bytes().zip(wanted.bytes()).take_while(same).count();
    let tail = line[..].bytes().rev().zip(wanted.bytes().rev()).take_while(same).count();
    (head + tail).min(line.len()).min(wanted.len())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn edited(content: &str, old: &str, new: &str, all: bool) -> Result<(String, usize, usize), &'static str> {
        edit(content.as_bytes(), old, new, all)
            .map(|edited| (String::from_utf8(edited.content).unwrap(), edited.replacements, edited.line))
            .map_err(|failure| failure.code)
    }

    #[test]
    fn one_place_is_replaced_and_all_the_rest_stays() {
        assert_eq!(edited("a\nb\nc", "b\n", "x\ny\n", false), Ok(("a\nx\ny\nc".into(), 1, 2)));
        assert_eq!(edited("a b", "b", "", false), Ok(("a ".into(), 1, 1)));
        assert_eq!(edit(b"\xff b \xff", "b", "ü", false).unwrap().content, b"\xff \xc3\xbc \xff");
    }

    #[test]
    fn a_text_that_is_there_twice_is_replaced_only_where_all_are_meant() {
        assert_eq!(edited("x y x", "x", "z", false), Err("not_unique"));
        assert_eq!(edited("aaa", "aa", "b", false), Err("not_unique"), "places that overlap");
        assert_eq!(edited("x y x", "x", "zz", true), Ok(("zz y zz".into(), 2, 1)));
    }

    #[test]
    fn line_endings_are_those_of_the_file() {
        assert_eq!(edited("a\r\nb\r\nc", "a\nb", "x\ny\nz", false), Ok(("x\r\ny\r\nz\r\nc".into(), 1, 1)));
        assert_eq!(edited("a\r\nb", "a\r\nb", "c\r\nd", false), Ok(("c\r\nd".into(), 1, 1)));
        assert_eq!(edited("a\r\nb\n", "a\nb", "x", false), Err("no_match"), "mixed ones are taken as they are");
        assert_eq!(edited("a\nb\n", "b", "c\r\nd", false), Ok(("a\nc\r\nd\n".into(), 1, 2)));
    }

    #[test]
    fn a_text_that_is_not_there_is_shown_what_is_like_it() {
        let message = |content: &str, old: &str| edit(content.as_bytes(), old, "", false).unwrap_err().message;
        let content = "fn one() {\n    let a = 1;\n}\nfn two() {}\n";
        let shown = message(content, "let a = 2;\n}");
        assert!(shown.contains("\n2:     let a = 1;"), "{shown}");
        let shown = message(content, "completely different");
        assert!(shown.contains("no line"), "{shown}");
        let shown = message(content, "\n\n");
        assert!(shown.contains("no line"), "{shown}");
    }
}
