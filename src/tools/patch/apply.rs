//! Applies the hunks of one file to its bytes. What the hunks leave alone stays as it is, line ends and a missing last
//! newline included.

use std::fmt;

use super::search::{Likeness, Search, Text, TooMuch, Work};
use super::{Hunk, Line, Place, Tag, bare, short};

/// How lines have to fit, from the best to the least: of unified diffs, and of codex's patches.
const UNIFIED: &[Likeness] = &[Likeness::Exact, Likeness::Text];
const CODEX: &[Likeness] = &[Likeness::Text, Likeness::TrailingSpace, Likeness::Space, Likeness::Punctuation];

/// Lines that differ which a message names.
const DIFFERENCES_MAX: usize = 4;

/// Why hunks do not fit a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::tools) enum Misfit {
    /// The lines of a hunk are not there.
    Hunk {
        /// Among the hunks of the file, from 1.
        number: usize,
        /// The line of the patch that it begins on.
        line: usize,
        nearest: Nearest,
    },
    /// A line behind which a hunk belongs is not there.
    Anchor {
        number: usize,
        anchor: String,
        /// The line of the file from which it was looked for, from 1.
        from: usize,
        nearest: Nearest,
    },
    /// The work is past what one patch may cost.
    TooMuch,
}

/// What is most like the lines that are not there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::tools) enum Nearest {
    /// Nothing.
    Nothing,
    /// The same lines, but before where the hunk before it ended. From 1.
    Earlier(usize),
    /// The same lines, but not at the end of the file, where they have to be. From 1.
    Inside(usize),
    /// Lines of which some differ.
    Place {
        /// The first of them, from 1.
        line: usize,
        differences: Vec<Difference>,
        /// Lines that differ and are not named.
        further: usize,
    },
}

/// One line that differs, in a form fit for messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::tools) struct Difference {
    line: usize,
    expected: String,
    /// Missing behind the end of the file.
    found: Option<String>,
}

/// Where one hunk goes.
struct Edit<'h, 'p> {
    hunk: &'h Hunk<'p>,
    at: usize,
    /// Lines of the hunk that count; the last one may stand for an end of the file that is none of its lines.
    lines: usize,
    fits: Likeness,
}

/// The bytes after the hunks.
///
/// # Errors
/// [`Misfit`] for the first hunk that does not fit.
pub(super) fn apply(source: &[u8], hunks: &[Hunk<'_>], work: &mut Work) -> Result<Vec<u8>, Misfit> {
    let text = Text::new(source, work)?;
    let mut placing = Placing::new(&text, hunks);
    let mut edits = Vec::with_capacity(hunks.len());
    for (number, hunk) in (1..).zip(hunks) {
        edits.push(placing.place(number, hunk, work)?);
    }
    // Lines for the end of the file may come before hunks that are looked for further up.
    edits.sort_by_key(|edit| edit.at);
    work.spend(source.len() / 16)?;
    Ok(compose(source, &text, &edits))
}

/// Finds the places of hunks one after the other.
struct Placing<'t, 'p> {
    text: &'t Text<'t>,
    search: Search<'t, 'p>,
    /// The line behind the last hunk.
    cursor: usize,
    /// How far from its line number the last hunk was.
    drift: isize,
}

impl<'t, 'p> Placing<'t, 'p> {
    fn new(text: &'t Text<'t>, hunks: &[Hunk<'p>]) -> Self {
        let mut wanted: Vec<&'p str> = Vec::new();
        for hunk in hunks {
            wanted.extend(hunk.before());
            if let Place::After(anchors) = &hunk.place {
                wanted.extend(anchors);
            }
        }
        Self { text, search: Search::new(text, wanted), cursor: 0, drift: 0 }
    }

    fn place<'h>(&mut self, number: usize, hunk: &'h Hunk<'p>, work: &mut Work) -> Result<Edit<'h, 'p>, Misfit> {
        let old: Vec<&str> = hunk.before().collect();
        let found = match &hunk.place {
            Place::Near(line) => self.near(hunk, &old, *line, work)?,
            Place::After(anchors) => {
                let from = self.behind(number, anchors, work)?;
                if old.is_empty() {
                    let end = hunk.at_end || anchors.is_empty();
                    if !end {
                        self.cursor = from;
                    }
                    let at = if end { self.text.len() } else { from };
                    return Ok(Edit { hunk, at, lines: hunk.lines.len(), fits: Likeness::Text });
                }
                self.cursor = from;
                self.after(hunk, &old, from, work)?
            }
        };
        let Some(edit) = found else {
            return Err(Misfit::Hunk { number, line: hunk.line, nearest: self.nearest(hunk, &old, work)? });
        };
        self.cursor = edit.at + hunk.lines[..edit.lines].iter().filter(|line| line.tag != Tag::Add).count();
        Ok(edit)
    }

    fn near<'h>(
        &mut self,
        hunk: &'h Hunk<'p>,
        old: &[&'p str],
        line: usize,
        work: &mut Work,
    ) -> Result<Option<Edit<'h, 'p>>, TooMuch> {
        let (lines, end) = (hunk.lines.len(), self.text.len());
        let expected = line.saturating_add_signed(self.drift);
        if old.is_empty() {
            let fits = if hunk.at_end { expected == end } else { (self.cursor..=end).contains(&expected) };
            return Ok(fits.then_some(Edit { hunk, at: expected, lines, fits: Likeness::Exact }));
        }
        // Less context on one side than on the other says that the file begins or ends there.
        let context =
            |lines: &mut dyn Iterator<Item = &Line<'_>>| lines.take_while(|line| line.tag == Tag::Context).count();
        let (before, behind) = (context(&mut hunk.lines.iter()), context(&mut hunk.lines.iter().rev()));
        for fits in UNIFIED {
            let mut at = None;
            if hunk.at_end || behind < before {
                at = self.search.first(*fits, old, self.cursor, true, work)?;
            } else if before < behind {
                at = self.search.nearest(*fits, old, self.cursor, 0, work)?.filter(|at| *at == 0);
            }
            if at.is_none() && !hunk.at_end {
                at = self.search.nearest(*fits, old, self.cursor, expected, work)?;
            }
            if let Some(at) = at {
                self.drift = at.wrapping_sub(line) as isize;
                return Ok(Some(Edit { hunk, at, lines, fits: *fits }));
            }
        }
        Ok(None)
    }

    fn after<'h>(
        &mut self,
        hunk: &'h Hunk<'p>,
        old: &[&'p str],
        from: usize,
        work: &mut Work,
    ) -> Result<Option<Edit<'h, 'p>>, TooMuch> {
        let lines = hunk.lines.len();
        if let Some((at, fits)) = self.best(CODEX, old, from, hunk.at_end, work)? {
            return Ok(Some(Edit { hunk, at, lines, fits }));
        }
        // An empty line at its end often stands for the end of the file, or sets it apart from the next section.
        let last_is_empty = hunk.lines.last().is_some_and(|line| line.tag != Tag::Add && line.text.trim().is_empty());
        if !last_is_empty || old.len() == 1 {
            return Ok(None);
        }
        let best = self.best(CODEX, &old[..old.len() - 1], from, hunk.at_end, work)?;
        Ok(best.map(|(at, fits)| Edit { hunk, at, lines: lines - 1, fits }))
    }

    /// The first place where the lines fit best.
    fn best(
        &mut self,
        likenesses: &[Likeness],
        lines: &[&'p str],
        from: usize,
        at_end: bool,
        work: &mut Work,
    ) -> Result<Option<(usize, Likeness)>, TooMuch> {
        for likeness in likenesses {
            if let Some(at) = self.search.first(*likeness, lines, from, at_end, work)? {
                return Ok(Some((at, *likeness)));
            }
        }
        Ok(None)
    }

    /// The line behind the last of the anchors.
    fn behind(&mut self, number: usize, anchors: &[&'p str], work: &mut Work) -> Result<usize, Misfit> {
        let mut from = self.cursor;
        for anchor in anchors {
            let Some((at, _)) = self.best(CODEX, &[anchor], from, false, work)? else {
                let nearest = match self.best(CODEX, &[anchor], 0, false, work)? {
                    Some((at, _)) => Nearest::Earlier(at + 1),
                    None => self.likest(&[anchor], from, work)?,
                };
                let anchor = short(bare(anchor));
                return Err(Misfit::Anchor { number, anchor, from: from + 1, nearest });
            };
            from = at + 1;
        }
        Ok(from)
    }

    /// What a message tells about a hunk whose old lines are not there.
    fn nearest(&mut self, hunk: &Hunk<'p>, old: &[&'p str], work: &mut Work) -> Result<Nearest, TooMuch> {
        let (likenesses, expected) = match hunk.place {
            Place::Near(line) => (UNIFIED, line.saturating_add_signed(self.drift)),
            Place::After(_) => (CODEX, self.cursor),
        };
        if hunk.at_end
            && let Some((at, _)) = self.best(likenesses, old, self.cursor, false, work)?
        {
            return Ok(Nearest::Inside(at + 1));
        }
        if let Some((at, _)) = self.best(likenesses, old, 0, hunk.at_end, work)? {
            return Ok(Nearest::Earlier(at + 1));
        }
        self.likest(old, expected, work)
    }

    fn likest(&mut self, old: &[&'p str], expected: usize, work: &mut Work) -> Result<Nearest, TooMuch> {
        let Some(start) = self.search.likest(old, expected, work)? else { return Ok(Nearest::Nothing) };
        let found = |at: usize| (at < self.text.len()).then(|| String::from_utf8_lossy(self.text.line(at)));
        let mut differences = Vec::new();
        let mut further = 0;
        for (at, expected) in (start..).zip(old) {
            let found = found(at);
            if found.as_deref().map(bare) == Some(bare(expected)) {
                continue;
            }
            if differences.len() == DIFFERENCES_MAX {
                further += 1;
                continue;
            }
            let found = found.as_deref().map(|line| short(bare(line)));
            differences.push(Difference { line: at + 1, expected: short(bare(expected)), found });
        }
        Ok(Nearest::Place { line: start + 1, differences, further })
    }
}

fn compose(source: &[u8], text: &Text<'_>, edits: &[Edit<'_, '_>]) -> Vec<u8> {
    let mut out = Vec::with_capacity(source.len());
    let mut at = 0;
    let mut ends_with_newline = source.is_empty() || source.ends_with(b"\n");
    let mut ending: &[u8] = b"\n";
    for edit in edits {
        out.extend_from_slice(text.lines(at..edit.at));
        at = edit.at;
        // New lines end as the old ones that they replace or follow.
        let neighbour = ending_of(text, at.wrapping_sub(1)).or_else(|| ending_of(text, at)).unwrap_or(b"\n");
        let exact = edit.fits == Likeness::Exact;
        ending = if exact { b"\n" } else { neighbour };
        for line in &edit.hunk.lines[..edit.lines] {
            match line.tag {
                Tag::Context | Tag::Remove => {
                    if line.tag == Tag::Context {
                        out.extend_from_slice(text.line(at));
                    }
                    if !exact {
                        ending = ending_of(text, at).unwrap_or(ending);
                    }
                    at += 1;
                }
                Tag::Add => {
                    if !out.is_empty() && !out.ends_with(b"\n") {
                        out.extend_from_slice(ending);
                    }
                    let line = bare(line.text);
                    let line = if exact { line } else { line.strip_suffix('\r').unwrap_or(line) };
                    out.extend_from_slice(line.as_bytes());
                    out.extend_from_slice(ending);
                }
            }
        }
        if let Some(changed) = changed_newline(edit.hunk) {
            ends_with_newline = changed;
        }
    }
    out.extend_from_slice(text.lines(at..text.len()));
    if !ends_with_newline && out.ends_with(ending) {
        out.truncate(out.len() - ending.len());
    }
    out
}

/// How that line ends, if there is one and it ends.
fn ending_of(text: &Text<'_>, at: usize) -> Option<&'static [u8]> {
    if at >= text.len() {
        return None;
    }
    let line = text.line(at);
    match line.ends_with(b"\r\n") {
        true => Some(b"\r\n"),
        false => line.ends_with(b"\n").then_some(b"\n"),
    }
}

/// Whether the file ends with a newline after the hunk, where the hunk says that it changes that.
fn changed_newline(hunk: &Hunk<'_>) -> Option<bool> {
    let old = hunk.before().next_back().map(|line| line.ends_with('\n'));
    let new = hunk.after().next_back().map(|line| line.ends_with('\n'));
    match (old, new) {
        (Some(false), None) => Some(true),
        (None, Some(false)) => Some(false),
        (Some(old), Some(new)) if old != new => Some(new),
        _ => None,
    }
}

impl From<TooMuch> for Misfit {
    fn from(TooMuch: TooMuch) -> Self {
        Self::TooMuch
    }
}

impl fmt::Display for Misfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hunk { number, line, nearest } => {
                write!(f, "hunk {number} context did not match source (line {line} of the patch); {nearest}")
            }
            Self::Anchor { number, anchor, from, nearest } => {
                write!(f, "hunk {number} anchor {anchor} not found in source from line {from}; {nearest}")
            }
            Self::TooMuch => {
                f.write_str("the patch or the file is too large or repeats itself too much to be searched")
            }
        }
    }
}

impl fmt::Display for Nearest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nothing => f.write_str("nothing in the file is like it"),
            Self::Earlier(line) => {
                write!(f, "it is at line {line} only, and hunks have to follow the order of the file")
            }
            Self::Inside(line) => write!(f, "it is at line {line}, which is not the end of the file"),
            Self::Place { line, differences, further } => {
                write!(f, "the nearest place is line {line}")?;
                for Difference { line, expected, found } in differences {
                    write!(f, "; line {line}: expected {expected}, found ")?;
                    f.write_str(found.as_deref().unwrap_or("the end of the file"))?;
                }
                if *further > 0 { write!(f, "; and {further} lines more") } else { Ok(()) }
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::edits::patched;

    /// What an update in codex's format makes of a file.
    fn codex(source: &str, hunks: &str) -> Result<String, String> {
        patched(source, format!("*** Begin Patch\n*** Update File: f\n{hunks}*** End Patch\n"))
    }

    fn unified(source: &str, hunks: &str) -> Result<String, String> {
        patched(source, format!("--- a/f\n+++ b/f\n{hunks}"))
    }

    fn made(text: &str) -> Result<String, String> {
        Ok(text.to_owned())
    }

    #[test]
    fn line_ends_stay_as_they_are_in_the_file() {
        assert_eq!(codex("a\r\nb\r\nc\r\n", "@@\n a\n-b\n+x\n+y\n"), made("a\r\nx\r\ny\r\nc\r\n"));
        assert_eq!(unified("a\r\nb\r\n", "@@ -1,2 +1,2 @@\n a\n-b\n+x\n"), made("a\r\nx\r\n"));
        assert_eq!(unified("a\nb\n", "@@ -1,2 +1,2 @@\n a\r\n-b\r\n+x\r\n"), made("a\nx\n"));
        assert_eq!(codex("a\nb\r\nc\n", "@@\n-b\n+x\n c\n+y\n"), made("a\nx\r\nc\ny\n"), "each as its neighbour");
        assert_eq!(
            unified("a\nb\n", "@@ -1,2 +1,2 @@\n-a\n+a\r\n b\n"),
            made("a\r\nb\n"),
            "where the patch changes them"
        );
    }

    #[test]
    fn a_missing_last_newline_stays_missing_unless_the_patch_says_otherwise() {
        assert_eq!(codex("a\nb", "@@\n-b\n+x\n"), made("a\nx"));
        assert_eq!(codex("a\nb", "@@\n b\n+x\n"), made("a\nb\nx"));
        assert_eq!(codex("a\r\nb", "@@\n-a\n"), made("b"));
        assert_eq!(codex("a\r\nb", "@@\n-b\n"), made("a"));
        assert_eq!(codex("a\nb", "@@\n-a\n+x\n"), made("x\nb"));
        assert_eq!(unified("a", "@@ -1 +1 @@\n-a\n+b\n"), made("b"));
        let lost = "@@ -1 +1 @@\n-a\n+a\n\\ No newline at end of file\n";
        assert_eq!(unified("a\n", lost), made("a"));
        assert_eq!(unified("a\r\n", lost), made("a"));
        assert_eq!(unified("a", "@@ -1 +1 @@\n-a\n\\ No newline at end of file\n+a\n"), made("a\n"));
    }

    #[test]
    fn anchors_are_whole_lines_that_follow_each_other() {
        let source = "class AB\n  def f\n    1\nclass A\n  def f\n    1\n  def g\n    1\n";
        let replaced = |line: usize| {
            let lines = source.split_inclusive('\n').enumerate();
            Ok(lines.map(|(at, text)| if at + 1 == line { "    2\n" } else { text }).collect::<String>())
        };
        assert_eq!(codex(source, "@@ class A\n-    1\n+    2\n"), replaced(6), "not behind a longer line");
        assert_eq!(codex(source, "@@ class A\n@@   def g\n-    1\n+    2\n"), replaced(8));
        assert_eq!(codex(source, "@@ class A\n@@ def g\n-    1\n+    2\n"), replaced(8), "but for white space");
        assert_eq!(
            codex(source, "@@   def g\n-    1\n+    2\n@@ class A\n-    1\n+    3\n").unwrap_err(),
            "hunk 2 anchor \"class A\" not found in source from line 9; it is at line 4 only, and hunks have to follow \
             the order of the file"
        );
    }

    #[test]
    fn new_lines_alone_go_behind_their_anchor_or_to_the_end() {
        assert_eq!(codex("a\nb\nc\n", "@@ b\n+x\n"), made("a\nb\nx\nc\n"));
        assert_eq!(codex("a\nb\nc\n", "@@ b\n+x\n*** End of File\n"), made("a\nb\nc\nx\n"));
        assert_eq!(codex("a\nb\nc\n", "@@\n+x\n"), made("a\nb\nc\nx\n"));
        assert_eq!(codex("a\nb", "@@\n+x\n@@\n-a\n+y\n"), made("y\nb\nx"), "hunks behind it still find their place");
        assert_eq!(codex("", "@@\n+x\n"), made("x\n"));
        assert_eq!(unified("a\nb\n", "@@ -1,0 +2 @@\n+x\n"), made("a\nx\nb\n"));
    }

    #[test]
    fn the_end_of_file_mark_holds_a_hunk_there() {
        assert_eq!(codex("a\nb\na\n", "@@\n-a\n+x\n*** End of File\n"), made("a\nb\nx\n"));
        assert_eq!(
            codex("a\nb\n", "@@\n-a\n+x\n*** End of File\n").unwrap_err(),
            "hunk 1 context did not match source (line 3 of the patch); it is at line 1, which is not the end of the \
             file"
        );
    }

    #[test]
    fn codex_hunks_fit_but_for_white_space_and_typography_where_nothing_fits_better() {
        assert_eq!(codex("a \nb\n", "@@\n a\n-b\n+x\n"), made("a \nx\n"));
        assert_eq!(codex("  a\n\tb\n", "@@\n a\n-b\n+x\n"), made("  a\nx\n"));
        assert_eq!(codex("“a” – b\n", "@@\n-\"a\" - b\n+x\n"), made("x\n"));
        assert_eq!(codex("  a\na\n", "@@\n-a\n+x\n"), made("  a\nx\n"), "the better fit, though it comes later");
        assert_eq!(codex("a\nb\n", "@@\n a\n-b\n+x\n\n"), made("a\nx\n"), "the empty line ends the hunk");
        assert!(unified("a \n", "@@ -1 +1 @@\n-a\n+x\n").is_err(), "unified diffs have to fit");
    }

    #[test]
    fn hunks_go_to_the_nearest_place_behind_the_one_before() {
        let source = "a\nx\nb\nx\nc\nx\nd\n";
        let hunk = |line: usize| format!("@@ -{line},1 +{line},1 @@\n-x\n+y\n");
        assert_eq!(unified(source, &hunk(4)), made("a\nx\nb\ny\nc\nx\nd\n"));
        assert_eq!(unified(source, &hunk(3)), made("a\nx\nb\ny\nc\nx\nd\n"), "of two the later");
        assert_eq!(unified(source, &hunk(99)), made("a\nx\nb\nx\nc\ny\nd\n"));
        assert_eq!(unified(source, &(hunk(4) + &hunk(4))), made("a\nx\nb\ny\nc\ny\nd\n"));
        let error = unified(source, &(hunk(6) + &hunk(2))).unwrap_err();
        assert!(error.contains("it is at line 2 only"), "{error}");
    }

    #[test]
    fn what_does_not_fit_is_shown_beside_the_nearest_place() {
        let source = "fn a() {\n    one();\n    two();\n}\n";
        assert_eq!(
            codex(source, "@@\n     one();\n-    to();\n+    three();\n }\n").unwrap_err(),
            "hunk 1 context did not match source (line 3 of the patch); the nearest place is line 2; line 3: expected \
             \"    to();\", found \"    two();\""
        );
        assert_eq!(
            codex(source, "@@\n-    tow();\n").unwrap_err(),
            "hunk 1 context did not match source (line 3 of the patch); the nearest place is line 3; line 3: expected \
             \"    tow();\", found \"    two();\"",
            "a line that is like no other is compared by its letters"
        );
        let error = codex(source, "@@\n-quite different\n").unwrap_err();
        assert!(error.ends_with("; nothing in the file is like it"), "{error}");
        let error = codex("same\n", &format!("@@\n same\n-{}\n", "long ".repeat(100_000))).unwrap_err();
        assert!(error.len() < 500 && error.ends_with("found the end of the file"), "{error}");
    }

    /// Patches of a MiB against files of many, made to be searched for ever. Without bounds some take hours.
    #[test]
    fn hostile_patches_end_within_bounds() {
        let alike = "a\n".repeat(500_000);
        let nearly = "@@\n".to_owned() + &" a\n".repeat(100_000);
        let too_large = "too large or repeats itself too much";
        for (source, hunks, end) in [
            (alike.clone() + "b\n", nearly + "-b\n c\n", "the nearest place is line"),
            ("  a\n".repeat(200_000) + &"a\nb\n".repeat(200_000), "@@\n a\n-a\n".repeat(100_000), too_large),
            (alike.clone(), "@@\n a\n-a\n-a\n".repeat(50_000) + "@@\n-c\n", "hunk 50001 context did not match"),
            ("a".repeat(16 << 20), "@@\n-b\n".repeat(100_000), "nothing in the file is like it"),
            ("\n".repeat(16 << 20), "@@\n-b\n".into(), too_large),
        ] {
            let error = codex(&source, &hunks).expect_err("it does not fit, or is not searched to its end");
            assert!(error.contains(end), "{error}");
        }
        let far = "@@ -4000000000,3 +1,2 @@\n a\n-a\n a\n".repeat(40_000);
        let error = unified(&alike, &far).expect_err("there is room for one at the end");
        assert!(error.contains("hunk 2 context did not match"), "{error}");
    }
}
