//! Finds the lines of a patch in a file. The work is counted, so that no patch can make it much more than the patch
//! and its files are large: lines are compared by number, and each search passes over the file once.

use std::borrow::Cow;
use std::cmp::Reverse;
use std::collections::HashMap;
use std::ops::{ControlFlow, Range};

use super::{LINES_MAX, bare};

/// Steps that one patch may cost. A step is a line compared, or a few bytes read, and takes ten nanoseconds or so: all
/// of them half a second.
const STEPS_MAX: u64 = 50_000_000;

/// Starts that are weighed when nothing fits.
const VOTES_MAX: usize = 200_000;

/// Lines of a hunk, and places of each, that are weighed then; a line that stands everywhere says nothing.
const VOTERS_MAX: usize = 1000;

/// How well a line has to fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Likeness {
    /// To the letter, its end included.
    Exact,
    /// But for its end.
    Text,
    /// But for white space before its end.
    TrailingSpace,
    /// But for white space on both sides.
    Space,
    /// But for that, and with simple quotes, dashes and spaces for typographic ones.
    Punctuation,
}

/// What is left of the steps that one patch may cost.
#[derive(Debug)]
pub(super) struct Work {
    left: u64,
}

/// A file and a patch that would take too long, or too much memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TooMuch;

/// A file cut into lines.
pub(super) struct Text<'t> {
    bytes: &'t [u8],
    /// Where each line begins, and the end of the last.
    starts: Vec<usize>,
}

/// The lines that hunks look for, and where they stand in one file.
pub(super) struct Search<'t, 'p> {
    text: &'t Text<'t>,
    wanted: Vec<&'p str>,
    indexes: [Option<Index<'p>>; 5],
}

/// The file as the numbers of its lines, where like lines have one number.
struct Index<'p> {
    numbers: HashMap<Cow<'p, [u8]>, u32>,
    /// [`UNWANTED`] where no hunk looks for it.
    lines: Vec<u32>,
    /// The lines of each number, ascending.
    places: Vec<Vec<u32>>,
}

const UNWANTED: u32 = u32::MAX;

impl Likeness {
    /// What two lines have in common exactly when they are alike.
    fn key(self, line: &[u8]) -> Cow<'_, [u8]> {
        let text = line.strip_suffix(b"\n").map_or(line, |text| text.strip_suffix(b"\r").unwrap_or(text));
        Cow::Borrowed(match self {
            Self::Exact => line,
            Self::Text => text,
            Self::TrailingSpace => text.trim_ascii_end(),
            Self::Space => text.trim_ascii(),
            Self::Punctuation => {
                let plain = str::from_utf8(text).map(|text| text.chars().map(plain).collect::<String>());
                return Cow::Owned(plain.map_or_else(|_| text.to_vec(), |text| text.trim().as_bytes().to_vec()));
            }
        })
    }
}

/// The character that people type for a typographic one.
fn plain(character: char) -> char {
    match character {
        '\u{2010}'..='\u{2015}' | '\u{2212}' => '-',
        '\u{2018}'..='\u{201B}' => '\'',
        '\u{201C}'..='\u{201F}' => '"',
        '\u{A0}' | '\u{2002}'..='\u{200A}' | '\u{202F}' | '\u{205F}' | '\u{3000}' => ' ',
        other => other,
    }
}

impl Work {
    pub(super) fn new() -> Self {
        Self { left: STEPS_MAX }
    }

    pub(super) fn spend(&mut self, steps: usize) -> Result<(), TooMuch> {
        let left = self.left.checked_sub(steps as u64);
        // What could not be paid ends the rest too.
        self.left = left.unwrap_or(0);
        left.map(|_| ()).ok_or(TooMuch)
    }
}

impl<'t> Text<'t> {
    pub(super) fn new(bytes: &'t [u8], work: &mut Work) -> Result<Self, TooMuch> {
        work.spend(bytes.len() / 16)?;
        let newlines = bytes.iter().enumerate().filter(|(_, byte)| **byte == b'\n').map(|(at, _)| at + 1);
        let mut starts: Vec<usize> = std::iter::once(0).chain(newlines.take(LINES_MAX)).collect();
        work.spend(starts.len())?;
        if starts.last() != Some(&bytes.len()) {
            starts.push(bytes.len());
        }
        if starts.len() > LINES_MAX + 1 { Err(TooMuch) } else { Ok(Self { bytes, starts }) }
    }

    /// Lines.
    pub(super) fn len(&self) -> usize {
        self.starts.len() - 1
    }

    /// Some lines, with their ends.
    pub(super) fn lines(&self, range: Range<usize>) -> &'t [u8] {
        &self.bytes[self.starts[range.start]..self.starts[range.end]]
    }

    /// One line, with its end.
    pub(super) fn line(&self, at: usize) -> &'t [u8] {
        self.lines(at..at + 1)
    }
}

impl<'t, 'p> Search<'t, 'p> {
    /// A search for some of the lines `wanted`.
    pub(super) fn new(text: &'t Text<'t>, wanted: Vec<&'p str>) -> Self {
        Self { text, wanted, indexes: [const { None }; 5] }
    }

    fn index(&mut self, likeness: Likeness, work: &mut Work) -> Result<&Index<'p>, TooMuch> {
        let slot = &mut self.indexes[likeness as usize];
        if slot.is_none() {
            let bytes = self.text.bytes.len() + self.wanted.iter().map(|line| line.len()).sum::<usize>();
            work.spend(bytes / 16 + 2 * (self.text.len() + self.wanted.len()))?;
            *slot = Some(Index::new(likeness, self.text, &self.wanted));
        }
        Ok(slot.as_ref().expect("it was just made"))
    }

    /// The first place from `from` on where these lines stand; with `at_end` only where the file ends with them.
    pub(super) fn first(
        &mut self,
        likeness: Likeness,
        pattern: &[&'p str],
        from: usize,
        at_end: bool,
        work: &mut Work,
    ) -> Result<Option<usize>, TooMuch> {
        let mut first = None;
        let from = if at_end { from.max(self.text.len().saturating_sub(pattern.len())) } else { from };
        self.each(likeness, pattern, from, work, |at| {
            first = Some(at);
            ControlFlow::Break(())
        })?;
        Ok(first)
    }

    /// The place from `from` on that is nearest to `expected`; of two, the later one, as `patch` and git have it.
    pub(super) fn nearest(
        &mut self,
        likeness: Likeness,
        pattern: &[&'p str],
        from: usize,
        expected: usize,
        work: &mut Work,
    ) -> Result<Option<usize>, TooMuch> {
        let mut nearest: Option<usize> = None;
        self.each(likeness, pattern, from, work, |at| {
            if nearest.is_none_or(|nearest| at.abs_diff(expected) <= nearest.abs_diff(expected)) {
                nearest = Some(at);
            }
            if at < expected { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })?;
        Ok(nearest)
    }

    /// Visits every place from `from` on where these lines stand, in order (Knuth, Morris and Pratt).
    fn each(
        &mut self,
        likeness: Likeness,
        pattern: &[&'p str],
        from: usize,
        work: &mut Work,
        mut visit: impl FnMut(usize) -> ControlFlow<()>,
    ) -> Result<(), TooMuch> {
        let Some(last) = self.text.len().checked_sub(pattern.len()).filter(|last| from <= *last) else { return Ok(()) };
        let index = self.index(likeness, work)?;
        work.spend(8 * pattern.len())?;
        let numbers: Vec<u32> = pattern.iter().map(|line| index.number(likeness, line)).collect();
        // Where its rarest line stands bounds where the whole can.
        let rarest = numbers.iter().enumerate().map(|(offset, number)| {
            let places = index.within(*number, from + offset..last + offset + 1);
            (places.len(), places.first().map(|first| (*first as usize, places[places.len() - 1] as usize)), offset)
        });
        let Some((_, Some((first, last)), offset)) = rarest.min_by_key(|(count, ..)| *count) else { return Ok(()) };
        let haystack = &index.lines[first - offset..last - offset + numbers.len()];

        // For each prefix of the pattern, the longest shorter one that it ends with.
        let mut borders = vec![0; numbers.len()];
        let mut matched = 0;
        for at in 1..numbers.len() {
            while matched > 0 && numbers[at] != numbers[matched] {
                matched = borders[matched - 1];
            }
            matched += usize::from(numbers[at] == numbers[matched]);
            borders[at] = matched;
        }
        matched = 0;
        let mut passed = haystack.len();
        for (at, number) in haystack.iter().enumerate() {
            while matched > 0 && *number != numbers[matched] {
                matched = borders[matched - 1];
            }
            matched += usize::from(*number == numbers[matched]);
            if matched == numbers.len() {
                if visit(first - offset + at + 1 - matched).is_break() {
                    passed = at + 1;
                    break;
                }
                matched = borders[matched - 1];
            }
        }
        work.spend(2 * passed)
    }

    /// Where most of these lines stand as they should; of several such places, the one nearest to `expected`.
    pub(super) fn likest(
        &mut self,
        pattern: &[&'p str],
        expected: usize,
        work: &mut Work,
    ) -> Result<Option<usize>, TooMuch> {
        let likeness = Likeness::Space;
        let index = self.index(likeness, work)?;
        let mut votes: HashMap<usize, usize> = HashMap::new();
        let voters = pattern.iter().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let voters = voters.take(VOTERS_MAX).flat_map(|(offset, line)| {
            let places = &index.places[index.number(likeness, line) as usize];
            let few = if places.len() > VOTERS_MAX { &[] } else { &**places };
            few.iter().filter_map(move |place| (*place as usize).checked_sub(offset))
        });
        for start in voters.take(VOTES_MAX) {
            *votes.entry(start).or_default() += 1;
        }
        work.spend(VOTES_MAX.min(votes.len()) * 8)?;
        let best = votes.into_iter().max_by_key(|(start, count)| (*count, Reverse(start.abs_diff(expected)), *start));
        match (best, pattern.iter().position(|line| !line.trim().is_empty())) {
            (Some((start, _)), _) => Ok(Some(start)),
            (None, Some(offset)) => Ok(self.most_similar(pattern[offset], work)?.map(|at| at.saturating_sub(offset))),
            (None, None) => Ok(None),
        }
    }

    /// The line that begins and ends most like this one, if that is half of the longer of the two.
    fn most_similar(&self, line: &str, work: &mut Work) -> Result<Option<usize>, TooMuch> {
        work.spend(self.text.bytes.len() / 16 + self.text.len())?;
        let line = bare(line).trim().as_bytes();
        let mut best = (0.5, None);
        for at in 0..self.text.len() {
            let found = self.text.line(at).trim_ascii();
            let equal = |pairs: &mut dyn Iterator<Item = (&u8, &u8)>| pairs.take_while(|(a, b)| a == b).count();
            let head = equal(&mut line.iter().zip(found));
            let tail = equal(&mut line[head..].iter().rev().zip(found[head..].iter().rev()));
            let similarity = (head + tail) as f64 / line.len().max(found.len()) as f64;
            if similarity > best.0 {
                best = (similarity, Some(at));
            }
        }
        Ok(best.1)
    }
}

impl<'p> Index<'p> {
    fn new(likeness: Likeness, text: &Text<'_>, wanted: &[&'p str]) -> Self {
        let mut numbers = HashMap::new();
        for line in wanted {
            let next = numbers.len() as u32;
            numbers.entry(likeness.key(line.as_bytes())).or_insert(next);
        }
        let mut places = vec![Vec::new(); numbers.len()];
        let number = |at: usize| {
            let number = numbers.get(&*likeness.key(text.line(at))).copied().unwrap_or(UNWANTED);
            if let Some(places) = places.get_mut(number as usize) {
                places.push(at as u32);
            }
            number
        };
        let lines = (0..text.len()).map(number).collect();
        Self { numbers, lines, places }
    }

    fn number(&self, likeness: Likeness, line: &str) -> u32 {
        self.numbers[&*likeness.key(line.as_bytes())]
    }

    /// The places of a number that are in this range.
    fn within(&self, number: u32, range: Range<usize>) -> &[u32] {
        let places = &self.places[number as usize];
        let up_to = |end: usize| places.partition_point(|place| (*place as usize) < end);
        &places[up_to(range.start)..up_to(range.end)]
    }
}
