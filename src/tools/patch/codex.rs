//! The patch format of codex (connectors-api.md §4.4), with the leniencies that codex itself has: blank lines and
//! spaces around markers, and the marks of a shell document around it all.

use super::{Action, FileChange, Hunk, Line, Lines, ParseError, Place, Tag, Target, bare, unified};

const BEGIN: &str = "*** Begin Patch";
const END: &str = "*** End Patch";
const ADD: &str = "*** Add File:";
const DELETE: &str = "*** Delete File:";
const UPDATE: &str = "*** Update File:";
const MOVE: &str = "*** Move to:";
const END_OF_FILE: &str = "*** End of File";

/// Whether the text means to be of this format.
pub(super) fn begins(text: &str) -> bool {
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let first = lines.next();
    first.is_some_and(|line| line.starts_with("*** ") || opens_document(line) && lines.next() == Some(BEGIN))
}

/// `<<EOF`, as models write it that take the argument for a line of a shell.
fn opens_document(line: &str) -> bool {
    matches!(line, "<<EOF" | "<<'EOF'" | "<<\"EOF\"")
}

/// Reads the file sections.
pub(super) fn parse(text: &str) -> Result<Vec<FileChange<'_>>, ParseError> {
    let mut lines = Lines::new(text);
    lines.skip_blank();
    let document = lines.peek().is_some_and(|line| opens_document(line.trim()));
    if document {
        lines.next();
        lines.skip_blank();
    }
    if lines.peek().map(str::trim) != Some(BEGIN) {
        return Err(lines.error(format!("missing header: expected '{BEGIN}'")));
    }
    lines.next();
    let mut files = Vec::new();
    loop {
        lines.skip_blank();
        let Some(header) = lines.peek().map(str::trim) else {
            return Err(lines.error(format!("missing footer: expected '{END}'")));
        };
        if header == END {
            break;
        }
        files.push(section(header, &mut lines)?);
    }
    lines.next();
    lines.skip_blank();
    if document && lines.peek().is_some_and(|line| line.trim() == "EOF") {
        lines.next();
        lines.skip_blank();
    }
    match lines.peek() {
        Some(_) => Err(lines.error(format!("nothing may follow '{END}'"))),
        None if files.is_empty() => Err(ParseError::new("the patch changes no file", lines.number)),
        None => Ok(files),
    }
}

fn section<'p>(header: &'p str, lines: &mut Lines<'p>) -> Result<FileChange<'p>, ParseError> {
    let path = |marker| header.strip_prefix(marker).map(str::trim);
    let (path, action) = if let Some(path) = path(ADD) {
        named(path, "Add File", lines)?;
        let content = added(path, lines)?;
        // As codex does it: its models write whole files anew this way.
        (path, Action::Add { content, replace: true, executable: false })
    } else if let Some(path) = path(DELETE) {
        named(path, "Delete File", lines)?;
        (path, Action::Delete { hunks: None })
    } else if let Some(path) = path(UPDATE) {
        named(path, "Update File", lines)?;
        (path, update(path, lines)?)
    } else {
        return Err(lines.error(format!("unknown hunk header {}", super::short(header))));
    };
    Ok(FileChange { path: path.into(), action })
}

/// Takes the header line, if it has a path.
fn named(path: &str, what: &str, lines: &mut Lines<'_>) -> Result<(), ParseError> {
    if path.is_empty() {
        return Err(lines.error(format!("{what} requires a path")));
    }
    lines.next();
    Ok(())
}

fn added(path: &str, lines: &mut Lines<'_>) -> Result<Vec<u8>, ParseError> {
    let mut content = Vec::new();
    while let Some(line) = lines.peek().and_then(|line| line.strip_prefix('+')) {
        content.extend_from_slice(line.as_bytes());
        lines.next();
    }
    if content.is_empty() {
        return Err(lines.error(format!("Add File hunk for {path} has no '+' lines")));
    }
    Ok(content)
}

fn update<'p>(path: &str, lines: &mut Lines<'p>) -> Result<Action<'p>, ParseError> {
    let header = lines.number;
    let mut to = None;
    if let Some(target) = lines.peek().and_then(|line| line.trim().strip_prefix(MOVE)) {
        let target = target.trim();
        named(target, "Move to", lines)?;
        to = Some(Target { path: target.into(), copy: false, replace: true });
    }
    let mut hunks: Vec<Hunk<'_>> = Vec::new();
    loop {
        // Between hunks only; within one, an empty line is an empty line of context.
        if hunks.is_empty() || hunks.last().is_some_and(|hunk| hunk.at_end) {
            lines.skip_blank();
        }
        match lines.peek() {
            Some(line) if !line.starts_with("***") && !at_footer(lines) => hunks.push(hunk(hunks.is_empty(), lines)?),
            _ if hunks.is_empty() && to.is_none() => {
                return Err(ParseError::new(format!("Update File hunk for {path} is empty"), header));
            }
            _ => return Ok(Action::Update { hunks, to, executable: None }),
        }
    }
}

/// Whether the next line is the last and the footer: codex takes it for that whatever blanks are before it.
fn at_footer(lines: &Lines<'_>) -> bool {
    lines.peek().is_some_and(|line| line.trim() == END) && lines.rest.trim() == END
}

fn hunk<'p>(first: bool, lines: &mut Lines<'p>) -> Result<Hunk<'p>, ParseError> {
    let mut anchors = Vec::new();
    let line = lines.number + 1;
    let mut marked = false;
    while let Some(marker) = lines.peek().map(bare).and_then(|line| line.strip_prefix("@@")) {
        marked = true;
        let anchor = marker.strip_prefix(' ').unwrap_or(marker);
        // Line numbers of the other format are no text to look for; here the lines alone say where a hunk belongs.
        if !anchor.trim().is_empty() && unified::ranges(marker).is_none() {
            anchors.push(anchor);
        }
        lines.next();
    }
    if !marked && !first {
        return Err(lines.error("expected '@@' context marker, or a line that begins with ' ', '+' or '-'"));
    }
    let mut hunk = Hunk { line, place: Place::After(anchors), lines: Vec::new(), at_end: false };
    while let Some(text) = lines.peek() {
        let (tag, text) = match text.as_bytes()[0] {
            b' ' if at_footer(lines) => break,
            b' ' => (Tag::Context, &text[1..]),
            b'+' => (Tag::Add, &text[1..]),
            b'-' => (Tag::Remove, &text[1..]),
            b'\n' => (Tag::Context, text),
            _ => break,
        };
        hunk.lines.push(Line { tag, text });
        lines.next();
    }
    if hunk.lines.is_empty() {
        return Err(lines.error("Update hunk has no body lines"));
    }
    if lines.peek().is_some_and(|line| line.trim() == END_OF_FILE) {
        hunk.at_end = true;
        lines.next();
    }
    Ok(hunk)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::{Patch, normalise};
    use super::*;

    /// What is wrong with a patch.
    fn wrong(patch: &str) -> String {
        Patch::parse(&normalise(patch.to_owned())).expect_err("the patch is broken").to_string()
    }

    /// Its file sections, in short.
    fn read(patch: &str) -> String {
        let text = normalise(patch.to_owned());
        let describe = |file: &FileChange<'_>| match &file.action {
            Action::Add { content, .. } => format!("add {} {:?}", file.path, String::from_utf8_lossy(content)),
            Action::Delete { .. } => format!("delete {}", file.path),
            Action::Update { hunks, to, .. } => {
                let to = to.as_ref().map(|to| format!(" to {}", to.path)).unwrap_or_default();
                let hunks = hunks.iter().map(|hunk| {
                    let end = if hunk.at_end { "$" } else { "" };
                    format!(" {:?}{}{end}", hunk.place, hunk.lines.len())
                });
                format!("update {}{to}{}", file.path, hunks.collect::<String>())
            }
        };
        Patch::parse(&text).expect("the patch is whole").files.iter().map(describe).collect::<Vec<_>>().join("; ")
    }

    #[test]
    fn every_kind_of_section_is_read() {
        let patch = "*** Begin Patch\n*** Add File: new.txt\n+one\n+\n*** Delete File: a b\n*** Update File: from\n\
                     *** Move to: to\n@@ class A\n@@   def f():\n keep\n-old\n+new\n\n*** End of File\n*** End Patch";
        let read_as = "add new.txt \"one\\n\\n\"; delete a b; update from to to After([\"class A\", \"  def f():\"])4$";
        assert_eq!(read(patch), read_as);
        assert_eq!(read(&patch.replace('\n', "\r\n")), read_as, "carriage returns of the patch are no content");
        let padded = patch.replace("*** Delete", "  *** Delete").replace("*** End Patch", "  *** End Patch ");
        assert_eq!(read(&format!("\n\n{padded}\n\n")), read_as, "markers may have blanks around them");
        assert_eq!(read(&format!("<<'EOF'\n{patch}\nEOF\n")), read_as, "a document of a shell");
        assert_eq!(
            read("*** Begin Patch\n*** Update File: f\n-a\n*** End Patch"),
            "update f After([])1",
            "no '@@' at first"
        );
        assert_eq!(read("*** Begin Patch\n*** Update File: f\n*** Move to: g\n*** End Patch"), "update f to g");
        assert_eq!(
            read("*** Begin Patch\n*** Update File: f\n@@ -1,2 +1,3 @@ fn\n-a\n*** End Patch"),
            "update f After([])1"
        );
    }

    #[test]
    fn what_cannot_be_read_is_named_with_its_line() {
        let within = |sections: &str| wrong(&format!("*** Begin Patch\n{sections}\n*** End Patch"));
        for (message, expected) in [
            (wrong("*** Begin\n*** End Patch"), "missing header: expected '*** Begin Patch' (line 1)"),
            (wrong("*** Begin Patch\n*** Delete File: f\n"), "missing footer: expected '*** End Patch' (line 3)"),
            (wrong("*** Begin Patch\n*** End Patch\n"), "the patch changes no file (line 2)"),
            (
                wrong("*** Begin Patch\n*** Delete File: f\n*** End Patch\nx"),
                "nothing may follow '*** End Patch' (line 4)",
            ),
            (within("*** Add File: "), "Add File requires a path (line 2)"),
            (within("*** Add File: f\nno plus"), "Add File hunk for f has no '+' lines (line 3)"),
            (within("*** Add File: f\n+x\nno plus"), "unknown hunk header \"no plus\" (line 4)"),
            (within("*** Delete File:"), "Delete File requires a path (line 2)"),
            (within("*** Update File:"), "Update File requires a path (line 2)"),
            (within("*** Update File: f"), "Update File hunk for f is empty (line 2)"),
            (within("*** Update File: f\n*** Move to: \n-a"), "Move to requires a path (line 3)"),
            (within("*** Update File: f\n@@ a"), "Update hunk has no body lines (line 4)"),
            (
                within("*** Update File: f\n-a\nb"),
                "expected '@@' context marker, or a line that begins with ' ', '+' or '-' (line 4)",
            ),
            (within("*** Rename File: f"), "unknown hunk header \"*** Rename File: f\" (line 2)"),
        ] {
            assert_eq!(message, expected);
        }
    }
}
