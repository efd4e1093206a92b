//! The newest records in memory: a read cache while the disk works, and all there is after it failed. Owned by the
//! journal's state; it never grows beyond its bytes.

use std::collections::VecDeque;

use super::Record;
use super::segment::Offsets;

/// What a record costs beside its bytes: the value itself, and the head that shares its buffer.
const RECORD_COST: usize = 128;

#[derive(Debug)]
pub(super) struct Tail {
    /// Contiguous: the record `seq` is at `seq - first_seq`. Each with the slot of its stream.
    records: VecDeque<(usize, Record)>,
    first_seq: u64,
    /// Where each stream stands before the first record.
    floor: Offsets,
    bytes: usize,
    bytes_max: usize,
}

impl Tail {
    pub(super) fn new(first_seq: u64, floor: Offsets, bytes_max: usize) -> Self {
        Self { records: VecDeque::new(), first_seq, floor, bytes: 0, bytes_max }
    }

    /// What its records take.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Number of the oldest record, or of the next one to come.
    pub(super) fn first_seq(&self) -> u64 {
        self.first_seq
    }

    pub(super) fn floor(&self) -> &Offsets {
        &self.floor
    }

    /// Takes the next record, and lets go of the oldest that no longer fit; that may be this one.
    pub(super) fn push(&mut self, slot: usize, record: Record) {
        self.bytes += record.bytes.len() + RECORD_COST;
        self.records.push_back((slot, record));
        while self.bytes > self.bytes_max {
            self.pop();
        }
    }

    /// Lets go of all records, and goes on with `first_seq`, before which the streams stand at `floor`.
    pub(super) fn restart(&mut self, first_seq: u64, floor: Offsets) {
        let bytes_max = self.bytes_max;
        *self = Self::new(first_seq, floor, bytes_max);
    }

    /// Lets go of all records before `seq`.
    pub(super) fn drop_before(&mut self, seq: u64) {
        while self.first_seq < seq && !self.records.is_empty() {
            self.pop();
        }
    }

    /// The records from `seq` on, each with the slot of its stream.
    pub(super) fn from(&self, seq: u64) -> impl Iterator<Item = (usize, &Record)> {
        let skip = seq.saturating_sub(self.first_seq).min(self.records.len() as u64) as usize;
        self.records.range(skip..).map(|(slot, record)| (*slot, record))
    }

    fn pop(&mut self) {
        if let Some((slot, record)) = self.records.pop_front() {
            self.bytes -= record.bytes.len() + RECORD_COST;
            self.floor.set(slot, record.end());
            self.first_seq = record.seq + 1;
        }
    }
}
