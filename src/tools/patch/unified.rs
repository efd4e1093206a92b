//! Unified diffs as `git diff`, `diff -u` and people write them: what is text between the file sections is passed over,
//! as `git apply` and `patch` do. There is no fuzz: a hunk has to be as long as it says, and to fit.

use std::borrow::Cow;

use super::{Action, FileChange, Hunk, Line, Lines, ParseError, Place, Tag, Target, bare};

const BINARY: &str = "a binary change cannot be applied; write the file instead";

/// What stands for the hunks of a file that is not text.
fn is_binary(line: &str) -> bool {
    line == "GIT binary patch" || line.starts_with("Binary files ") && line.ends_with(" differ")
}

/// Reads the file sections.
pub(super) fn parse(text: &str) -> Result<Vec<FileChange<'_>>, ParseError> {
    let mut lines = Lines::new(text);
    let mut files = Vec::new();
    while let Some(line) = lines.peek() {
        if let Some(names) = line.strip_prefix("diff --git ") {
            lines.next();
            files.extend(git_section(names, &mut lines)?);
        } else if lines.at_names() {
            let begins = lines.number + 1;
            let section = Section { hunks: names_and_hunks(&mut lines)?, ..Section::default() };
            files.push(section.change(begins)?);
        } else if line.starts_with("@@ -") {
            return Err(lines.error("a hunk before the '--- ' and '+++ ' lines that name its file"));
        } else if is_binary(bare(line)) {
            return Err(lines.error(BINARY));
        } else {
            lines.next();
        }
    }
    if files.is_empty() {
        let message = "neither '*** Begin Patch' nor a file section of a unified diff ('--- a/path', '+++ b/path', \
                       '@@ -1,2 +1,2 @@')";
        return Err(ParseError::new(message, 1));
    }
    Ok(files)
}

/// What the lines of one file section say, before they are held against each other.
#[derive(Default)]
struct Section<'p> {
    /// What stands behind `diff --git`.
    git: Option<&'p str>,
    hunks: Hunks<'p>,
    added: bool,
    deleted: bool,
    from: Option<(Cow<'p, str>, bool)>,
    to: Option<Cow<'p, str>>,
    executable: Option<bool>,
}

/// Two names and what follows them.
#[derive(Default)]
struct Hunks<'p> {
    names: Option<[Name<'p>; 2]>,
    hunks: Vec<Hunk<'p>>,
}

/// What a `---` or `+++` line says.
struct Name<'p> {
    /// `/dev/null` is none.
    path: Option<Cow<'p, str>>,
    /// Whether it has the time with which `diff -N` marks what is not there.
    epoch: bool,
}

/// The lines from `diff --git` on. A section that changes nothing is none.
fn git_section<'p>(names: &'p str, lines: &mut Lines<'p>) -> Result<Option<FileChange<'p>>, ParseError> {
    let begins = lines.number;
    let mut section = Section { git: Some(bare(names)), ..Section::default() };
    let mut silent = true;
    while let Some(line) = lines.peek().map(bare) {
        let name = |text: &'p str| unquoted(text, lines.number + 1);
        if let Some(mode) = line.strip_prefix("new mode ") {
            section.executable = Some(executable(mode, lines)?);
        } else if let Some(mode) = line.strip_prefix("new file mode ") {
            section.added = true;
            section.executable = Some(executable(mode, lines)?);
        } else if let Some(mode) = line.strip_prefix("deleted file mode ") {
            section.deleted = true;
            executable(mode, lines)?;
        } else if let Some(path) = line.strip_prefix("rename from ") {
            section.from = Some((name(path)?, false));
        } else if let Some(path) = line.strip_prefix("copy from ") {
            section.from = Some((name(path)?, true));
        } else if let Some(path) = line.strip_prefix("rename to ").or_else(|| line.strip_prefix("copy to ")) {
            section.to = Some(name(path)?);
        } else if is_binary(line) {
            return Err(lines.error(BINARY));
        } else if lines.at_names() {
            section.hunks = names_and_hunks(lines)?;
            return section.change(begins).map(Some);
        } else if line.starts_with("@@ -") {
            return Err(lines.error("a hunk before the '--- ' and '+++ ' lines that name its file"));
        } else if let Some(mode) = line.strip_prefix("old mode ") {
            executable(mode, lines)?;
        } else if !["index ", "similarity index ", "dissimilarity index "].iter().any(|prefix| line.starts_with(prefix))
        {
            break;
        } else {
            lines.next();
            continue;
        }
        silent = false;
        lines.next();
    }
    if silent { Ok(None) } else { section.change(begins).map(Some) }
}

/// Whether a mode of git lets the file be run.
fn executable(mode: &str, lines: &Lines<'_>) -> Result<bool, ParseError> {
    match mode.trim() {
        "100644" | "100664" => Ok(false),
        "100755" => Ok(true),
        "120000" => Err(lines.error("a symbolic link cannot be patched")),
        "160000" => Err(lines.error("a submodule cannot be patched")),
        other => Err(lines.error(format!("unknown file mode {}", super::short(other)))),
    }
}

/// `---`, `+++`, and the hunks behind them.
fn names_and_hunks<'p>(lines: &mut Lines<'p>) -> Result<Hunks<'p>, ParseError> {
    let mut name = |prefix: &str| {
        let line = lines.peek().and_then(|line| line.strip_prefix(prefix)).expect("whoever comes here saw both lines");
        let name = Name::parse(bare(line), lines.number + 1);
        lines.next();
        name
    };
    let names = [name("--- ")?, name("+++ ")?];
    let mut hunks = Vec::new();
    while let Some(line) = lines.peek() {
        let Some(marker) = line.strip_prefix("@@") else { break };
        hunks.push(hunk(bare(marker), lines)?);
    }
    // What looks like more of a hunk must not be passed over as text between sections. A mail ends with "-- ".
    let more = |line: &str| line.starts_with([' ', '+', '-', '\\']) && !matches!(bare(line), "-- " | "--");
    if lines.peek().is_some_and(more) && !lines.at_names() {
        return Err(match hunks.last() {
            Some(hunk) => lines.error(format!("the hunk of line {} has more lines than it says", hunk.line)),
            None => lines.error("expected '@@ -<line>,<lines> +<line>,<lines> @@'"),
        });
    }
    Ok(Hunks { names: Some(names), hunks })
}

impl<'p> Name<'p> {
    fn parse(text: &'p str, number: usize) -> Result<Self, ParseError> {
        let (path, time) = text.split_once('\t').unwrap_or((text, ""));
        // In quotes a tab is written as an escape.
        let path = unquoted(path.trim_end(), number)?;
        if path.is_empty() {
            return Err(ParseError::new("expected a path", number));
        }
        // Midnight in Greenwich is still the evening of the day before in America.
        let epoch = time.starts_with("1970-01-01 ") || time.starts_with("1969-12-31 ");
        Ok(Self { path: (path != "/dev/null").then_some(path), epoch })
    }
}

impl<'p> Section<'p> {
    /// What the section does.
    fn change(self, begins: usize) -> Result<FileChange<'p>, ParseError> {
        let Self { git, hunks: Hunks { names, hunks }, mut added, mut deleted, from, to, executable } = self;
        let error = |message: &str| Err(ParseError::new(message, begins));
        let (mut old, mut new) = (None, None);
        if let Some([first, second]) = names {
            let empty = |side: fn(&Hunk<'p>) -> bool| matches!(&*hunks, [hunk] if side(hunk));
            added |=
                first.path.is_none() || git.is_none() && first.epoch && empty(|hunk| hunk.before().next().is_none());
            deleted |=
                second.path.is_none() || git.is_none() && second.epoch && empty(|hunk| hunk.after().next().is_none());
            [old, new] = without_prefixes(first.path, second.path);
        } else if let (Some(git), None) = (git, &from) {
            let [first, second] = same_names(git, begins)?;
            [old, new] = without_prefixes(first, second);
        }
        let executable = executable.filter(|_| !deleted);
        Ok(match (added, deleted, from) {
            (true, true, _) => return error("a file cannot be both added and deleted"),
            (true, false, None) => {
                let Some(path) = new.or(old) else { return error("expected the path of the added file") };
                if let Some(hunk) = hunks.iter().find(|hunk| hunk.before().next().is_some()) {
                    return Err(ParseError::new("a file that is added has '+' lines only", hunk.line));
                }
                let content = hunks.iter().flat_map(Hunk::after).collect::<String>().into_bytes();
                let action = Action::Add { content, replace: false, executable: executable.unwrap_or(false) };
                FileChange { path, action }
            }
            (false, true, None) => {
                let Some(path) = old.or(new) else { return error("expected the path of the deleted file") };
                FileChange { path, action: Action::Delete { hunks: Some(hunks) } }
            }
            (false, false, Some((path, copy))) => {
                let Some(to) = to else { return error("expected the path that the file is renamed or copied to") };
                let to = Some(Target { path: to, copy, replace: false });
                FileChange { path, action: Action::Update { hunks, to, executable } }
            }
            (_, _, Some(_)) => return error("a file cannot be both renamed and added or deleted"),
            (false, false, None) => {
                let Some(path) = new.or(old) else { return error("expected the path of the file") };
                if hunks.is_empty() && executable.is_none() {
                    return error("expected '@@ -<line>,<lines> +<line>,<lines> @@'");
                }
                FileChange { path, action: Action::Update { hunks, to: None, executable } }
            }
        })
    }
}

/// The two names without what git and diff put before them: `a/` and `b/`, or two directories that were compared.
fn without_prefixes<'p>(old: Option<Cow<'p, str>>, new: Option<Cow<'p, str>>) -> [Option<Cow<'p, str>>; 2] {
    let prefixed = match (&old, &new) {
        (Some(old), Some(new)) => match (old.split_once('/'), new.split_once('/')) {
            (Some((a, old)), Some((b, new))) => (a, b) == ("a", "b") || a != b && old == new,
            _ => false,
        },
        (Some(old), None) => old.starts_with("a/"),
        (None, Some(new)) => new.starts_with("b/"),
        (None, None) => false,
    };
    [old, new].map(|name| match name {
        Some(Cow::Borrowed(name)) if prefixed => name.split_once('/').map(|(_, path)| Cow::Borrowed(path)),
        Some(Cow::Owned(name)) if prefixed => name.split_once('/').map(|(_, path)| Cow::Owned(path.to_owned())),
        name => name,
    })
}

/// The names of a `diff --git` line whose section has no others: they are the same then, but for the prefix, so one
/// with spaces is still told apart.
fn same_names(names: &str, number: usize) -> Result<[Option<Cow<'_, str>>; 2], ParseError> {
    let split = match names.split_once("\" \"") {
        Some((old, _)) => old.len() + 1,
        None => names.len() / 2,
    };
    if let (Some(old), Some(new)) = (names.get(..split), names.get(split + 1..)) {
        let (old, new) = (unquoted(old, number)?, unquoted(new, number)?);
        let tail = |name: &str| name.split_once('/').map(|(_, tail)| tail.to_owned());
        if old == new || tail(&old).is_some() && tail(&old) == tail(&new) {
            return Ok([Some(old), Some(new)]);
        }
    }
    Err(ParseError::new("'diff --git' does not name one file", number))
}

/// A name that git may have put in quotes, with the escapes of C.
fn unquoted(text: &str, number: usize) -> Result<Cow<'_, str>, ParseError> {
    let Some(quoted) = text.strip_prefix('"') else { return Ok(Cow::Borrowed(text)) };
    let broken = || ParseError::new("a quoted path is broken", number);
    let mut bytes = Vec::with_capacity(quoted.len());
    let mut rest = quoted.bytes();
    loop {
        match rest.next().ok_or_else(broken)? {
            b'"' => break,
            b'\\' => bytes.push(match rest.next().ok_or_else(broken)? {
                b'a' => 7,
                b'b' => 8,
                b't' => b'\t',
                b'n' => b'\n',
                b'v' => 11,
                b'f' => 12,
                b'r' => b'\r',
                literal @ (b'"' | b'\\') => literal,
                first @ b'0'..=b'3' => {
                    let mut digit = || rest.next().filter(|byte| matches!(byte, b'0'..=b'7')).map(|byte| byte - b'0');
                    (first - b'0') * 64 + digit().ok_or_else(broken)? * 8 + digit().ok_or_else(broken)?
                }
                _ => return Err(broken()),
            }),
            byte => bytes.push(byte),
        }
    }
    String::from_utf8(bytes).map(Cow::Owned).map_err(|_| ParseError::new("a path that is not UTF-8", number))
}

/// Where a hunk stands and how long it is, from what follows its first `@@`: old line, old lines, new lines.
pub(super) fn ranges(marker: &str) -> Option<[usize; 3]> {
    let (old, rest) = marker.strip_prefix(" -")?.split_once(" +")?;
    let (new, _) = rest.split_once(" @@")?;
    let range = |text: &str| {
        let (start, count) = text.split_once(',').unwrap_or((text, "1"));
        Some((start.parse::<u32>().ok()? as usize, count.parse::<u32>().ok()? as usize))
    };
    let ((start, old), (_, new)) = (range(old)?, range(new)?);
    Some([start, old, new])
}

fn hunk<'p>(marker: &'p str, lines: &mut Lines<'p>) -> Result<Hunk<'p>, ParseError> {
    let Some([start, mut old, mut new]) = ranges(marker) else {
        return Err(lines.error("expected '@@ -<line>,<lines> +<line>,<lines> @@'"));
    };
    let line = lines.number + 1;
    // Of nothing, git and diff name the line before it.
    let place = Place::Near(if old == 0 { start } else { start.saturating_sub(1) });
    let mut hunk = Hunk { line, place, lines: Vec::new(), at_end: false };
    lines.next();
    while old + new > 0 || lines.peek().is_some_and(|line| line.starts_with('\\')) {
        let text = lines.peek().unwrap_or_default();
        let (tag, text) = match text.bytes().next() {
            Some(b' ') => (Tag::Context, &text[1..]),
            Some(b'+') => (Tag::Add, &text[1..]),
            Some(b'-') => (Tag::Remove, &text[1..]),
            // Editors take away the space of an empty line of context.
            Some(b'\n') => (Tag::Context, text),
            // "\ No newline at end of file", in whatever language.
            Some(b'\\') => {
                match hunk.lines.last_mut() {
                    Some(last) => last.text = bare(last.text),
                    None => return Err(lines.error("nothing before it that could lack a newline")),
                }
                hunk.at_end = true;
                lines.next();
                continue;
            }
            _ => (Tag::Context, ""),
        };
        let (takes_old, takes_new) = (usize::from(tag != Tag::Add), usize::from(tag != Tag::Remove));
        if text.is_empty() || takes_old > old || takes_new > new {
            let message =
                format!("the hunk of line {line} has not the lines it says: {old} old and {new} new are missing");
            return Err(lines.error(message));
        }
        (old, new) = (old - takes_old, new - takes_new);
        hunk.lines.push(Line { tag, text });
        lines.next();
    }
    let inner = hunk.before().rev().skip(1).chain(hunk.after().rev().skip(1)).any(|line| !line.ends_with('\n'));
    if inner {
        return Err(ParseError::new("only the last line of a file can lack a newline", line));
    }
    Ok(hunk)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::{Patch, normalise};
    use super::*;

    const HUNK: &str = "@@ -1 +1 @@\n-a\n+b\n";

    /// The file sections of a diff, in short, or what is wrong with it.
    fn read(diff: &str) -> String {
        let text = normalise(diff.to_owned());
        let patch = match Patch::parse(&text) {
            Ok(patch) => patch,
            Err(error) => return error.to_string(),
        };
        let describe = |file: &FileChange<'_>| match &file.action {
            Action::Add { content, executable, .. } => {
                format!(
                    "add{} {} {:?}",
                    if *executable { "+x" } else { "" },
                    file.path,
                    String::from_utf8_lossy(content)
                )
            }
            Action::Delete { .. } => format!("delete {}", file.path),
            Action::Update { hunks, to, executable } => {
                let mode = executable.map(|executable| if executable { "+x" } else { "-x" }).unwrap_or_default();
                let to = to.as_ref().map(|to| format!(" {} {}", if to.copy { "copied to" } else { "to" }, to.path));
                format!("update{mode} {}{} {}", file.path, to.unwrap_or_default(), hunks.len())
            }
        };
        patch.files.iter().map(describe).collect::<Vec<_>>().join("; ")
    }

    #[test]
    fn names_are_read_as_git_and_diff_write_them() {
        for (names, read_as) in [
            ("--- a/src/f.rs\n+++ b/src/f.rs\n", "update src/f.rs 1"),
            ("--- src/f.rs\n+++ src/f.rs\n", "update src/f.rs 1"),
            ("--- a/f\n+++ a/f\n", "update a/f 1"),
            ("--- old/f\t2026-01-01 10:00:00\n+++ new/f\t2026-01-01 11:00:00\n", "update f 1"),
            ("--- f.orig\n+++ f\n", "update f 1"),
            ("--- /srv/f\n+++ /srv/f\n", "update /srv/f 1"),
            ("diff --git a/a b b/a b\n--- a/a b\t\n+++ b/a b\t\n", "update a b 1"),
            ("diff --git i/f w/f\nindex 1..2 100644\n--- i/f\n+++ w/f\n", "update f 1"),
            ("--- \"a/\\303\\274 \\\"q\\\"\"\n+++ \"b/\\303\\274 \\\"q\\\"\"\n", "update ü \"q\" 1"),
            ("From 1 Mon\nSubject: x\n---\n f | 2 +-\n\n--- a/f\n+++ b/f\n", "update f 1"),
        ] {
            assert_eq!(read(&format!("{names}{HUNK}")), read_as, "{names}");
        }
    }

    #[test]
    fn what_happens_to_a_file_is_read_from_the_lines_of_git() {
        for (diff, read_as) in [
            ("diff --git a/f b/f\nold mode 100644\nnew mode 100755\n", "update+x f 0"),
            ("diff --git a/a b b/a b\nold mode 100755\nnew mode 100644\n", "update-x a b 0"),
            ("diff --git \"a/\\303\\274\" \"b/\\303\\274\"\nold mode 100644\nnew mode 100755\n", "update+x ü 0"),
            ("diff --git a/f b/g\nsimilarity index 100%\nrename from f\nrename to g\n", "update f to g 0"),
            ("diff --git a/f b/g\nsimilarity index 100%\ncopy from f\ncopy to g\n", "update f copied to g 0"),
            ("diff --git a/f b/f\nnew file mode 100755\nindex 0..1\n", "add+x f \"\""),
            ("diff --git a/f b/f\nnew file mode 100644\n--- /dev/null\n+++ b/f\n@@ -0,0 +1 @@\n+x\n", "add f \"x\\n\""),
            ("--- /dev/null\n+++ b/f\n@@ -0,0 +1 @@\n+x\n\\ No newline at end of file\n", "add f \"x\""),
            ("--- a/f\n+++ /dev/null\n@@ -1 +0,0 @@\n-x\n", "delete f"),
            ("--- a/f\t1970-01-01 00:00:00.0 +0000\n+++ b/f\t2026-01-01\n@@ -0,0 +1 @@\n+x\n", "add f \"x\\n\""),
            ("--- a/f\t2026-01-01\n+++ b/f\t1969-12-31 19:00:00.0 -0500\n@@ -1 +0,0 @@\n-x\n", "delete f"),
        ] {
            assert_eq!(read(diff), read_as, "{diff}");
        }
    }

    #[test]
    fn what_cannot_be_read_is_named_with_its_line() {
        let hunks = |hunks: &str| read(&format!("--- a/f\n+++ b/f\n{hunks}"));
        let binary = "a binary change cannot be applied; write the file instead";
        for (message, expected) in [
            (
                read("hello"),
                "neither '*** Begin Patch' nor a file section of a unified diff ('--- a/path', \
                             '+++ b/path', '@@ -1,2 +1,2 @@') (line 1)"
                    .to_owned(),
            ),
            (read(HUNK), "a hunk before the '--- ' and '+++ ' lines that name its file (line 1)".into()),
            (read("diff --git a/f b/f\nindex 1..2\nGIT binary patch\n"), format!("{binary} (line 3)")),
            (read("Binary files a/f and b/f differ\n"), format!("{binary} (line 1)")),
            (read("diff --git a/f b/f\nnew file mode 120000\n"), "a symbolic link cannot be patched (line 2)".into()),
            (read("diff --git a/f b/f\nnew mode 160000\n"), "a submodule cannot be patched (line 2)".into()),
            (read("--- \"a/\\q\"\n+++ b/f\n"), "a quoted path is broken (line 1)".into()),
            (hunks(""), "expected '@@ -<line>,<lines> +<line>,<lines> @@' (line 1)".into()),
            (hunks("@@ @@\n-a\n"), "expected '@@ -<line>,<lines> +<line>,<lines> @@' (line 3)".into()),
            (hunks("-a\n+b\n"), "expected '@@ -<line>,<lines> +<line>,<lines> @@' (line 3)".into()),
            (
                hunks("@@ -1,2 +1 @@\n-a\n+b\n"),
                "the hunk of line 3 has not the lines it says: 1 old and 0 new are missing (line 6)".into(),
            ),
            (hunks("@@ -1 +1 @@\n-a\n+b\n c\n"), "the hunk of line 3 has more lines than it says (line 6)".into()),
            (
                hunks("@@ -1,2 +1 @@\n-a\n\\ No newline\n-b\n+c\n"),
                "only the last line of a file can lack a newline (line 3)".into(),
            ),
            (
                read("--- /dev/null\n+++ b/f\n@@ -1 +1 @@\n-a\n+b\n"),
                "a file that is added has '+' lines only (line 3)".into(),
            ),
            (
                read(&format!("diff --git a/f b/g\nrename from f\n--- a/f\n+++ b/g\n{HUNK}")),
                "expected the path that the file is renamed or copied to (line 1)".into(),
            ),
            (
                hunks("@@ -99999999999999999999 +1 @@\n"),
                "expected '@@ -<line>,<lines> +<line>,<lines> @@' (line 3)".into(),
            ),
        ] {
            assert_eq!(message, expected);
        }
    }

    #[test]
    fn removed_and_added_lines_that_look_like_headers_are_lines() {
        assert_eq!(read("--- a/f\n+++ b/f\n@@ -1,2 +1 @@\n--- a/x\n-b\n+++ b/x\n"), "update f 1");
    }

    #[test]
    fn the_end_of_a_mail_is_no_part_of_the_last_hunk() {
        assert_eq!(read(&format!("--- a/f\n+++ b/f\n{HUNK}-- \n2.39.2\n\n")), "update f 1");
    }
}
