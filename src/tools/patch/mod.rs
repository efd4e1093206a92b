//! A patch as values: which files it changes and how, read from the text of either format, and applied to bytes.
//! Owned by `apply_patch`. It knows no executor and touches no file.

mod apply;
mod codex;
mod plan;
mod search;
mod unified;

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod edits;

use std::borrow::Cow;
use std::str::SplitInclusive;

pub(super) use plan::{Change, Failure, plan};

/// Lines of a patch, or of one file that it changes: what is kept for each takes more memory than a short line does.
const LINES_MAX: usize = 2_000_000;

/// What a patch says, in its order.
#[derive(Debug, PartialEq)]
pub(super) struct Patch<'p> {
    /// One for each file section; a file may have several.
    pub(super) files: Vec<FileChange<'p>>,
}

/// One file section of a patch.
#[derive(Debug, PartialEq)]
pub(super) struct FileChange<'p> {
    /// As the patch writes it, without the prefixes of git.
    pub(super) path: Cow<'p, str>,
    /// What happens to it.
    pub(super) action: Action<'p>,
}

/// What happens to a file.
#[derive(Debug, PartialEq)]
pub(super) enum Action<'p> {
    /// It is made.
    Add {
        /// All of it.
        content: Vec<u8>,
        /// Whether one that is there is replaced, rather than an obstacle.
        replace: bool,
        /// Whether it can be run.
        executable: bool,
    },
    /// It goes.
    Delete {
        /// What it has to hold, where the patch says so: they have to leave nothing of it.
        hunks: Option<Vec<Hunk<'p>>>,
    },
    /// It becomes another.
    Update {
        /// In the order of the file.
        hunks: Vec<Hunk<'p>>,
        /// Where the result goes, if not to the same path.
        to: Option<Target<'p>>,
        /// Whether it can be run, where that changes.
        executable: Option<bool>,
    },
}

/// Where the result of an update goes.
#[derive(Debug, PartialEq)]
pub(super) struct Target<'p> {
    /// The new path.
    pub(super) path: Cow<'p, str>,
    /// Whether the file also stays where it was.
    pub(super) copy: bool,
    /// Whether a file that is there is replaced, rather than an obstacle.
    pub(super) replace: bool,
}

/// Some lines of a file that stand together, and what becomes of them.
#[derive(Debug, PartialEq)]
pub(super) struct Hunk<'p> {
    /// The line of the patch that it begins on, from 1.
    line: usize,
    place: Place<'p>,
    lines: Vec<Line<'p>>,
    /// Whether it fits at the end of the file only.
    at_end: bool,
}

/// Where in the file a hunk is looked for, always behind the hunk before it.
#[derive(Debug, PartialEq)]
enum Place<'p> {
    /// The first place behind these lines, which follow each other in that order. What differs in white space or
    /// punctuation fits where nothing fits better: such patches are written from memory.
    After(Vec<&'p str>),
    /// The place nearest to this line, from 0. It has to fit to the letter, but for the form of line ends.
    Near(usize),
}

/// One line of a hunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Line<'p> {
    tag: Tag,
    /// With its line end, unless it has none.
    text: &'p str,
}

/// What becomes of a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tag {
    Context,
    Remove,
    Add,
}

/// Why a text is no patch, and where. Nothing was touched.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message} (line {line})")]
pub(super) struct ParseError {
    message: String,
    line: usize,
}

impl ParseError {
    fn new(message: impl Into<String>, line: usize) -> Self {
        Self { message: message.into(), line }
    }

    /// The line of the patch where it is wrong, from 1.
    pub(super) fn line(&self) -> usize {
        self.line
    }
}

/// The text of a patch in the form that [`Patch::parse`] takes: every line ends in a newline, and carriage returns are
/// left only where they are content. They are not where lines that cannot be content have them too.
pub(super) fn normalise(mut text: String) -> String {
    if !text.ends_with('\n') {
        text.push('\n');
    }
    let header = |line: &&str| line.starts_with("--- ") || line.starts_with("diff --git ");
    let carriage = match codex::begins(&text) {
        true => text.contains('\r'),
        false => text.split_inclusive('\n').find(header).is_some_and(|line| line.ends_with("\r\n")),
    };
    if carriage { text.replace("\r\n", "\n") } else { text }
}

impl<'p> Patch<'p> {
    /// Reads a patch: codex's format if it begins like one, else a unified diff as git, diff and people write it.
    ///
    /// # Errors
    /// [`ParseError`] where it is neither, or broken.
    pub(super) fn parse(text: &'p str) -> Result<Self, ParseError> {
        let lines = text.bytes().filter(|byte| *byte == b'\n').count();
        if lines > LINES_MAX {
            return Err(ParseError::new(format!("a patch may have {LINES_MAX} lines at most"), LINES_MAX + 1));
        }
        let files = if codex::begins(text) { codex::parse(text)? } else { unified::parse(text)? };
        Ok(Self { files })
    }
}

impl<'p> Hunk<'p> {
    /// The lines that have to be there.
    fn before(&self) -> impl DoubleEndedIterator<Item = &'p str> {
        self.lines.iter().filter(|line| line.tag != Tag::Add).map(|line| line.text)
    }

    /// The lines that are there afterwards.
    fn after(&self) -> impl DoubleEndedIterator<Item = &'p str> {
        self.lines.iter().filter(|line| line.tag != Tag::Remove).map(|line| line.text)
    }
}

/// The lines of a patch that are not yet read.
struct Lines<'p> {
    rest: &'p str,
    /// Lines read.
    number: usize,
}

impl<'p> Lines<'p> {
    fn new(text: &'p str) -> Self {
        Self { rest: text, number: 0 }
    }

    /// The next lines, with their ends.
    fn ahead(&self) -> SplitInclusive<'p, char> {
        self.rest.split_inclusive('\n')
    }

    fn peek(&self) -> Option<&'p str> {
        self.ahead().next()
    }

    fn next(&mut self) {
        self.rest = &self.rest[self.peek().map_or(0, str::len)..];
        self.number += 1;
    }

    fn skip_blank(&mut self) {
        while self.peek().is_some_and(|line| line.trim().is_empty()) {
            self.next();
        }
    }

    /// Whether the next two lines name a file before and after, as unified diffs do.
    fn at_names(&self) -> bool {
        let mut ahead = self.ahead();
        let mut begins = |prefix| ahead.next().is_some_and(|line| line.starts_with(prefix));
        begins("--- ") && begins("+++ ")
    }

    /// What is wrong with the next line.
    fn error(&self, message: impl Into<String>) -> ParseError {
        ParseError::new(message, self.number + 1)
    }
}

/// A line without its end.
fn bare(line: &str) -> &str {
    line.strip_suffix('\n').unwrap_or(line)
}

/// A line as messages quote it.
fn short(line: &str) -> String {
    const CHARS_MAX: usize = 120;
    match line.char_indices().nth(CHARS_MAX) {
        Some((end, _)) => format!("{:?}…", &line[..end]),
        None => format!("{line:?}"),
    }
}
