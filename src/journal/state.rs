//! What the writer and the readers of a journal share: the list of segments, the tail, and where the journal stands.
//! Behind the lock of [`super::reader`]; it does no I/O, so no holder of the lock ever waits for a disk.

use std::collections::VecDeque;
use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use super::segment::{Head, Segment};
use super::tail::Tail;
use super::{Limits, Record, Totals};

/// Older segments that stay open between two reads.
const OPEN_FILES_MAX: usize = 2;

/// Records taken from the tail under one lock.
const TAIL_STEP: usize = 1024;

#[derive(Debug)]
pub(super) struct State {
    pub(super) head: Head,
    /// Oldest first. Between two of them there may be a hole, where a file was damaged.
    pub(super) segments: VecDeque<Segment>,
    /// Ends where the journal ends. Reaches into the segments, or beyond them once the disk was given up.
    pub(super) tail: Tail,
    /// The file of the newest segment.
    pub(super) current: Option<Arc<File>>,
    opened: VecDeque<(u64, Arc<File>)>,
    /// Bytes of the segments that were dropped.
    pub(super) dropped_bytes: u64,
}

/// What one write brought to the disk, or to memory alone: a new segment or more of the newest, and its records with
/// the slots of their streams.
pub(super) struct Written {
    pub(super) segment: Option<Segment>,
    pub(super) records: Vec<(usize, Record)>,
}

/// Where the record is that a reader wants next.
pub(super) enum Place {
    /// Not there yet.
    End,
    /// In memory: these, and all that were passed over up to and with `through` are of other streams.
    Tail { records: Vec<Record>, through: u64 },
    /// In this part of a file. Should it be damaged, the next good record is `beyond`.
    Disk { first_seq: u64, file: Option<Arc<File>>, part: Range<u64>, beyond: u64 },
    /// Nothing for this reader before `next`.
    Skip { next: u64 },
    /// Gone; the journal goes on at `next`.
    Hole { next: u64 },
}

impl State {
    pub(super) fn new(head: Head, limits: Limits) -> Self {
        let tail = Tail::new(head.next_seq, head.offsets(), limits.memory_bytes_max);
        Self { head, segments: VecDeque::new(), tail, current: None, opened: VecDeque::new(), dropped_bytes: 0 }
    }

    /// Moves on to `head`. Without a current file the records are in memory alone.
    pub(super) fn take(&mut self, runs: Vec<Written>, head: Head, current: Option<Arc<File>>) {
        for Written { segment, records } in runs {
            self.segments.extend(segment);
            for (slot, record) in records {
                if current.is_some()
                    && let Some(segment) = self.segments.back_mut()
                {
                    segment.push(slot, &record);
                }
                self.tail.push(slot, record);
            }
        }
        self.head = head;
        self.current = current;
    }

    pub(super) fn disk_bytes(&self) -> u64 {
        self.segments.iter().map(|segment| segment.len).sum()
    }

    pub(super) fn first_seq(&self) -> u64 {
        let on_disk = self.segments.iter().find(|segment| !segment.is_empty());
        on_disk.map_or(self.tail.first_seq(), |segment| segment.first_seq)
    }

    /// Finds record `seq`, or the next one of stream `tag`.
    pub(super) fn locate(&self, seq: u64, tag: Option<u8>) -> Place {
        if seq >= self.head.next_seq {
            return Place::End;
        }
        let slot = tag.map(|tag| self.head.slot(tag));
        if slot == Some(None) {
            return Place::Skip { next: self.head.next_seq };
        }
        let slot = slot.flatten();
        if seq >= self.tail.first_seq() {
            return self.locate_in_tail(seq, slot);
        }
        let after = self.segments.partition_point(|segment| segment.first_seq <= seq);
        if let Some(segment) = after.checked_sub(1).and_then(|found| self.segments.get(found))
            && seq < segment.next_seq
        {
            let beyond = segment.next_seq.min(self.tail.first_seq());
            let first_seq = segment.first_seq;
            return segment.block(seq, slot).map_or(Place::Skip { next: segment.next_seq }, |part| Place::Disk {
                first_seq,
                file: self.file(first_seq),
                part,
                beyond,
            });
        }
        let next = self.segments.range(after..).find(|segment| !segment.is_empty());
        Place::Hole { next: next.map_or(self.tail.first_seq(), |segment| segment.first_seq) }
    }

    fn locate_in_tail(&self, seq: u64, slot: Option<usize>) -> Place {
        let mut records = Vec::new();
        let mut through = seq;
        for (of, record) in self.tail.from(seq).take(TAIL_STEP) {
            through = record.seq;
            if slot.is_none_or(|slot| slot == of) {
                records.push(record.clone());
            }
        }
        Place::Tail { records, through }
    }

    /// A number at or shortly before the first record that reaches `position` of one stream, or of all taken as one.
    pub(super) fn seq_reaching(&self, slot: Option<usize>, position: u64) -> u64 {
        let reached = self.segments.iter().find_map(|segment| segment.seq_reaching(slot, position));
        reached.unwrap_or(self.tail.first_seq())
    }

    /// Tag and offset of each stream at `seq`, if that is where something begins that still exists.
    pub(super) fn resume(&self, seq: u64) -> Vec<(u8, u64)> {
        let segment = self.segments.iter().find(|segment| segment.first_seq == seq);
        let end = self.head.offsets();
        let offsets = match segment {
            Some(segment) => &segment.start,
            None if seq == self.tail.first_seq() => self.tail.floor(),
            None if seq == self.head.next_seq => &end,
            None => return Vec::new(),
        };
        self.head.streams.iter().enumerate().map(|(slot, stream)| (stream.tag, offsets.get(slot))).collect()
    }

    /// The sums of all streams, in the order in which they appeared.
    pub(super) fn totals(&self) -> Vec<Totals> {
        let slots = 0..self.head.streams.len();
        let totals = slots.zip(&self.head.streams).map(|(slot, stream)| Totals {
            tag: stream.tag,
            bytes: stream.offset,
            lost_bytes: self.holes(slot).map(|hole| hole.end - hole.start).sum::<u64>()
                + self.segments.iter().map(|segment| segment.gap_bytes(slot)).sum::<u64>()
                + self.tail_gaps(slot).map(|gap| gap.end - gap.start).sum::<u64>(),
            exact: stream.exact,
            sha256: stream.whole.then(|| stream.sha.digest()),
        });
        totals.collect()
    }

    /// What is lost of a stream, as ranges of offsets that neither touch nor overlap.
    pub(super) fn lost_ranges(&self, slot: usize) -> Vec<Range<u64>> {
        let gaps = self.segments.iter().flat_map(|segment| segment.gaps(slot));
        let mut ranges: Vec<Range<u64>> = self.holes(slot).chain(gaps).chain(self.tail_gaps(slot)).collect();
        ranges.sort_unstable_by_key(|range| range.start);
        ranges.dedup_by(|next, last| {
            let touches = next.start <= last.end;
            if touches {
                last.end = last.end.max(next.end);
            }
            touches
        });
        ranges
    }

    /// The ranges between the end of one piece that exists and the start of the next.
    fn holes(&self, slot: usize) -> impl Iterator<Item = Range<u64>> + '_ {
        let pieces = self.segments.iter().map(move |segment| (segment.start.get(slot), segment.end.get(slot)));
        // The tail only adds a hole when it begins beyond the disk.
        let tail = (self.tail.floor().get(slot), u64::MAX);
        pieces
            .chain([tail])
            .scan(0, |end, (start, piece_end)| {
                let hole = *end..start;
                *end = piece_end;
                Some(hole)
            })
            .filter(|hole| !hole.is_empty())
    }

    /// The gaps that are in memory alone.
    fn tail_gaps(&self, slot: usize) -> impl Iterator<Item = Range<u64>> + '_ {
        let disk_next_seq = self.segments.back().map_or(0, |segment| segment.next_seq);
        let records = self.tail.from(disk_next_seq).filter(move |(of, record)| *of == slot && record.gap.is_some());
        records.map(|(_, record)| record.offset..record.end()).filter(|range| !range.is_empty())
    }

    /// Forgets the oldest segment if the files take more than `bytes` and there are more than `keep`. Returns its
    /// first number, for its file to be deleted.
    pub(super) fn drop_oldest(&mut self, bytes: u64, keep: usize) -> Option<u64> {
        if self.disk_bytes() <= bytes || self.segments.len() <= keep {
            return None;
        }
        let dropped = self.segments.pop_front()?;
        self.dropped_bytes += dropped.end.position(None) - dropped.start.position(None);
        // What is counted as lost is not to be seen again from memory.
        self.tail.drop_before(dropped.next_seq);
        self.opened.retain(|(first_seq, _)| *first_seq != dropped.first_seq);
        Some(dropped.first_seq)
    }

    pub(super) fn has_segment(&self, first_seq: u64) -> bool {
        self.segments.iter().any(|segment| segment.first_seq == first_seq)
    }

    /// Keeps a file open for the next reader.
    pub(super) fn keep_open(&mut self, first_seq: u64, file: Arc<File>) {
        if self.has_segment(first_seq) && self.file(first_seq).is_none() {
            self.opened.push_back((first_seq, file));
            if self.opened.len() > OPEN_FILES_MAX {
                self.opened.pop_front();
            }
        }
    }

    fn file(&self, first_seq: u64) -> Option<Arc<File>> {
        let current = self.current.as_ref().filter(|_| self.segments.back().is_some_and(|s| s.first_seq == first_seq));
        let opened = self.opened.iter().find(|(of, _)| *of == first_seq).map(|(_, file)| file);
        current.or(opened).cloned()
    }
}
