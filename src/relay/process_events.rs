//! The events of one process in the order of the executor's numbers, however they come: live, twice, or from its ring.
//!
//! A plain value: whoever follows a process owns one. It asks nobody for what is missing, but says what that is.

use std::collections::BTreeMap;

use super::client::ProcessEvent;
use crate::protocol::rpc::{OutputStream, ProcessOutputPage};

/// What happened next to a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Happened {
    /// It wrote a chunk.
    Output {
        /// The executor's number of the chunk.
        seq: u64,
        /// Where it was written.
        stream: OutputStream,
        /// What was written.
        bytes: Vec<u8>,
    },
    /// It wrote chunks that the executor no longer had.
    Missing {
        /// How many.
        chunks: u64,
        /// Number of the last of them.
        seq: u64,
    },
    /// The process itself has ended; output of its children may follow.
    Exited {
        /// With this code; `None` when the executor does not tell.
        code: Option<i32>,
    },
    /// Nothing more will come.
    Closed,
}

/// What has happened to one process, and what is known of what happened later.
#[derive(Debug, Default)]
pub struct ProcessEvents {
    newest: u64,
    /// Events by their number that wait for one before them: the executor tells output and errors from different
    /// places, so the order of arrival is not quite that of the numbers.
    early: BTreeMap<u64, Event>,
    exit_seq: Option<u64>,
}

#[derive(Debug)]
enum Event {
    Output { stream: OutputStream, bytes: Vec<u8> },
    Exited { code: i32 },
    Closed,
}

impl ProcessEvents {
    /// The events behind number `newest`; `exit_seq` is the number of the exit if it was seen already.
    pub fn after(newest: u64, exit_seq: Option<u64>) -> Self {
        Self { newest, early: BTreeMap::new(), exit_seq }
    }

    /// Number of the newest event that was given out: whatever comes after it is still wanted.
    pub fn newest(&self) -> u64 {
        self.newest
    }

    /// Number of the exit, once it is known. Lost chunks may have numbers on both sides of it.
    pub fn exit_seq(&self) -> Option<u64> {
        self.exit_seq
    }

    /// Events that wait for one before them.
    pub fn waiting(&self) -> usize {
        self.early.len()
    }

    /// Forgets the events that wait: they come again with the ring.
    pub fn forget_waiting(&mut self) {
        self.early.clear();
    }

    /// Keeps an event until its turn; a repeat is dropped.
    pub fn keep(&mut self, event: ProcessEvent) {
        let (seq, event) = match event {
            ProcessEvent::Output(output) => {
                (output.seq, Event::Output { stream: output.stream, bytes: output.chunk.0 })
            }
            ProcessEvent::Exited(exited) => (exited.seq, Event::Exited { code: exited.exit_code }),
            ProcessEvent::Closed(closed) => (closed.seq, Event::Closed),
        };
        if seq > self.newest {
            self.early.insert(seq, event);
        }
    }

    /// Everything up to the end of what the executor's ring holds; what follows that is then the next.
    pub fn merge(&mut self, page: ProcessOutputPage) -> Vec<Happened> {
        // The ring holds the newest chunks without a hole. So a number before its first chunk is that of a chunk that
        // was lost; one behind it that is not there, or any when there is no chunk, stands for the exit or for the end.
        let end = page.next_seq.saturating_sub(1).max(self.newest);
        let oldest = page.chunks.first().map_or(self.newest + 1, |chunk| chunk.seq);
        let exit_is_new = self.exit_seq.is_none_or(|seq| seq > self.newest);
        for chunk in page.chunks.into_iter().filter(|chunk| chunk.seq > self.newest) {
            self.early.entry(chunk.seq).or_insert(Event::Output { stream: chunk.stream, bytes: chunk.chunk.0 });
        }
        let mut happened = Vec::new();
        let (mut missing, mut without_chunk) = (0, None);
        let mut closed = false;
        while self.newest < end {
            match self.early.remove(&(self.newest + 1)) {
                Some(event) => {
                    name_missing(&mut happened, &mut missing, self.newest);
                    self.newest += 1;
                    closed |= matches!(event, Event::Closed);
                    let event = self.given_out(event);
                    happened.push(event);
                }
                None => {
                    self.newest += 1;
                    if self.newest < oldest {
                        missing += 1;
                    } else if !(page.closed && self.newest == end) {
                        without_chunk = without_chunk.or(Some(self.newest));
                    }
                }
            }
        }
        name_missing(&mut happened, &mut missing, self.newest);
        let seen_now = happened.iter().any(|event| matches!(event, Happened::Exited { .. }));
        if page.exited && !seen_now {
            if exit_is_new {
                // Among the lost where there is no number for it behind them: other processes went on printing.
                self.exit_seq = without_chunk.or_else(|| one_less_missing(&mut happened));
            }
            // Its code once more where its number is behind us: who was told may have been another gateway process.
            happened.push(Happened::Exited { code: page.exit_code });
        }
        if page.closed && !closed {
            happened.push(Happened::Closed);
        }
        happened
    }

    /// All that waits, with what is missing before it: for a follower that waits no longer.
    pub fn rest(&mut self) -> Vec<Happened> {
        let mut happened = Vec::new();
        while let Some((seq, event)) = self.early.pop_first() {
            let mut missing = seq - self.newest - 1;
            name_missing(&mut happened, &mut missing, seq - 1);
            self.newest = seq;
            let event = self.given_out(event);
            happened.push(event);
        }
        happened
    }

    /// The event whose number is `newest` by now.
    fn given_out(&mut self, event: Event) -> Happened {
        match event {
            Event::Output { stream, bytes } => Happened::Output { seq: self.newest, stream, bytes },
            Event::Exited { code } => {
                self.exit_seq = Some(self.newest);
                Happened::Exited { code: Some(code) }
            }
            Event::Closed => Happened::Closed,
        }
    }
}

/// What follows the newest event without a hole, as far as it is there; more may follow later.
impl Iterator for ProcessEvents {
    type Item = Happened;

    fn next(&mut self) -> Option<Happened> {
        let event = self.early.remove(&(self.newest + 1))?;
        self.newest += 1;
        Some(self.given_out(event))
    }
}

fn name_missing(happened: &mut Vec<Happened>, missing: &mut u64, seq: u64) {
    let chunks = std::mem::take(missing);
    if chunks > 0 {
        happened.push(Happened::Missing { chunks, seq });
    }
}

/// Takes one number off the last chunks that are missing, and gives it.
fn one_less_missing(happened: &mut Vec<Happened>) -> Option<u64> {
    let at = happened.iter().rposition(|event| matches!(event, Happened::Missing { .. }))?;
    let Happened::Missing { chunks, seq } = &mut happened[at] else { return None };
    let (number, left) = (*seq, *chunks - 1);
    (*chunks, *seq) = (left, number - 1);
    if left == 0 {
        happened.remove(at);
    }
    Some(number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::rpc::{Base64Bytes, ProcessChunk, ProcessClosed, ProcessExited, ProcessOutput};

    const OUT: OutputStream = OutputStream::Stdout;

    fn live(seq: u64) -> ProcessEvent {
        let chunk = Base64Bytes(seq.to_string().into());
        ProcessEvent::Output(ProcessOutput { process_id: String::new(), seq, stream: OUT, chunk })
    }

    fn live_exit(seq: u64) -> ProcessEvent {
        ProcessEvent::Exited(ProcessExited { process_id: String::new(), seq, exit_code: 7, sandbox_denied: false })
    }

    fn live_close(seq: u64) -> ProcessEvent {
        ProcessEvent::Closed(ProcessClosed { process_id: String::new(), seq })
    }

    fn output(seq: u64) -> Happened {
        Happened::Output { seq, stream: OUT, bytes: seq.to_string().into() }
    }

    fn missing(chunks: u64, seq: u64) -> Happened {
        Happened::Missing { chunks, seq }
    }

    const EXITED: Happened = Happened::Exited { code: Some(7) };

    /// What the ring holds: chunks of these numbers, and whether the process has ended.
    fn page(chunks: std::ops::Range<u64>, next_seq: u64, exited: bool, closed: bool) -> ProcessOutputPage {
        let chunk = |seq: u64| ProcessChunk { seq, stream: OUT, chunk: Base64Bytes(seq.to_string().into()) };
        ProcessOutputPage {
            chunks: chunks.map(chunk).collect(),
            next_seq,
            exited,
            exit_code: exited.then_some(7),
            closed,
            failure: None,
            sandbox_denied: false,
        }
    }

    fn all(events: &mut ProcessEvents) -> Vec<Happened> {
        events.collect()
    }

    #[test]
    fn what_comes_too_early_waits_and_what_comes_twice_is_dropped() {
        let mut events = ProcessEvents::default();
        for event in [live_close(4), live(2)] {
            events.keep(event);
            assert_eq!(events.next(), None);
        }
        events.keep(live(1));
        assert_eq!(all(&mut events), [output(1), output(2)]);
        for event in [live(1), live_exit(3), live(2)] {
            events.keep(event);
        }
        assert_eq!(all(&mut events), [EXITED, Happened::Closed]);
        assert_eq!((events.newest(), events.waiting(), events.exit_seq()), (4, 0, Some(3)));
    }

    #[test]
    fn the_ring_fills_a_hole_and_what_waited_behind_it_follows() {
        let mut events = ProcessEvents::after(2, None);
        events.keep(live(5));
        events.keep(live(7));
        assert_eq!(events.merge(page(3..6, 6, false, false)), [output(3), output(4), output(5)]);
        assert_eq!(events.next(), None);
        events.keep(live(6));
        assert_eq!(all(&mut events), [output(6), output(7)]);
    }

    #[test]
    fn what_the_ring_no_longer_has_is_counted() {
        let mut events = ProcessEvents::after(2, None);
        assert_eq!(events.merge(page(8..10, 10, false, false)), [missing(5, 7), output(8), output(9)]);
    }

    #[test]
    fn the_numbers_of_exit_and_end_are_no_chunks() {
        let ended = |newest, exit_seq, page| {
            let mut events = ProcessEvents::after(newest, exit_seq);
            (events.merge(page), events.exit_seq())
        };
        // Silent to the end: 3 is the exit, 4 the end.
        assert_eq!(ended(2, None, page(0..0, 5, true, true)), (vec![EXITED, Happened::Closed], Some(3)));
        // The exit behind the output, and between it.
        let all = vec![output(3), output(4), EXITED, Happened::Closed];
        assert_eq!(ended(2, None, page(3..5, 7, true, true)), (all, Some(5)));
        let mut between = page(3..6, 7, true, true);
        between.chunks.remove(1);
        assert_eq!(ended(2, None, between), (vec![output(3), output(5), EXITED, Happened::Closed], Some(4)));
        // The exit among the lost: 3 to 7 are four chunks and the exit.
        let lost = vec![missing(4, 6), output(8), EXITED, Happened::Closed];
        assert_eq!(ended(2, None, page(8..9, 10, true, true)), (lost, Some(7)));
        // The exit was told before, so that all five are chunks.
        let told = vec![missing(5, 7), output(8), EXITED, Happened::Closed];
        assert_eq!(ended(2, Some(2), page(8..9, 10, true, true)), (told, Some(2)));
        // Known, but behind what is here: it comes again.
        let again = vec![missing(4, 6), output(8), EXITED, Happened::Closed];
        assert_eq!(ended(2, Some(4), page(8..9, 10, true, true)), (again, Some(7)));
        // Nothing but the exit was lost.
        assert_eq!(ended(2, None, page(4..5, 5, true, false)), (vec![output(4), EXITED], Some(3)));
        // The exit has come live while the ring was read.
        let mut events = ProcessEvents::after(2, None);
        events.keep(live_exit(3));
        events.keep(live_close(5));
        assert_eq!(events.merge(page(4..5, 5, true, false)), [EXITED, output(4)]);
        assert_eq!(events.next(), Some(Happened::Closed));
    }

    #[test]
    fn who_waits_no_longer_gets_the_rest_with_its_holes() {
        let mut events = ProcessEvents::after(1, None);
        events.keep(live(4));
        events.keep(live(5));
        assert_eq!(events.rest(), [missing(2, 3), output(4), output(5)]);
        assert_eq!((events.newest(), events.rest()), (5, vec![]));
    }
}
