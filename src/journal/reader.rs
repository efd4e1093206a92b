//! The reading end of a journal: pages by number or by byte, sums, and what is lost. Cloned and shared freely; it
//! holds the lock only to look things up, reads files outside it, and so never makes the writer wait.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use super::segment::{self, Head};
use super::state::{Place, State, Written};
use super::{JournalError, Limits, Lost, Page, Record, Totals, open_segment, segment_path};

/// Records of one page, so that one of empty records has a bound too.
const PAGE_RECORDS_MAX: usize = 8192;

/// A handle on a journal; stays good for what it has when the journal is dropped.
#[derive(Debug, Clone)]
pub struct JournalReader {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    dir: PathBuf,
    newest_seq: AtomicU64,
    state: Mutex<State>,
}

impl JournalReader {
    pub(super) fn new(dir: PathBuf, head: Head, limits: Limits) -> Self {
        let newest_seq = AtomicU64::new(head.next_seq - 1);
        Self { shared: Arc::new(Shared { dir, newest_seq, state: Mutex::new(State::new(head, limits)) }) }
    }

    /// Number of the newest record, one less than the first one's before there is any. Costs one atomic load; waiting
    /// for it to change is left to whoever owns the journal.
    pub fn published(&self) -> u64 {
        self.shared.newest_seq.load(Ordering::Acquire)
    }

    /// Number of the oldest record that can be read, or of the next one to come.
    pub fn first_seq(&self) -> u64 {
        self.state().first_seq()
    }

    /// The owner's mark on the newest record.
    pub fn last_mark(&self) -> Option<u64> {
        self.state().head.last_mark
    }

    /// Bytes that the segment files take.
    pub fn disk_bytes(&self) -> u64 {
        self.state().disk_bytes()
    }

    /// Bytes that the tail in memory takes, as its bound counts them.
    pub fn memory_bytes(&self) -> usize {
        self.state().tail.bytes()
    }

    /// Bytes of output that were dropped for want of room since the journal was opened.
    pub fn dropped_bytes(&self) -> u64 {
        self.state().dropped_bytes
    }

    /// The sums of all streams, in the order in which they appeared.
    pub fn totals(&self) -> Vec<Totals> {
        self.state().totals()
    }

    /// What is lost of a stream, as offsets: oldest first, joined where they touch. All that was dropped, and the
    /// first 256 gaps of each segment; every gap is also a record, and every byte is in the totals.
    pub fn lost_ranges(&self, tag: u8) -> Vec<Range<u64>> {
        let state = self.state();
        state.head.slot(tag).map(|slot| state.lost_ranges(slot)).unwrap_or_default()
    }

    /// The records after number `after_seq` (0 = from the beginning), of one stream or of all, until they have
    /// `bytes_max` bytes; the first one is always whole.
    ///
    /// # Errors
    /// [`JournalError::Disk`]; bytes that do not match their checksum are a hole instead.
    pub fn page(&self, after_seq: u64, filter: Option<u8>, bytes_max: usize) -> Result<Page, JournalError> {
        self.collect(after_seq, Wish { tag: filter, bytes_max, ..Wish::default() })
    }

    /// The bytes of one stream from `offset` on; the first record is cut there. Records without bytes are left out,
    /// but a gap of unknown size comes with the bytes that follow it.
    ///
    /// # Errors
    /// As [`JournalReader::page`].
    pub fn page_from(&self, tag: u8, offset: u64, bytes_max: usize) -> Result<Page, JournalError> {
        let (start_seq, end) = {
            let state = self.state();
            let slot = state.head.slot(tag);
            let end = slot.map_or(0, |slot| state.head.streams[slot].offset);
            // A reader that has everything is sent to the end at once, where nothing needs to be read.
            let start_seq = if end <= offset { state.head.next_seq } else { state.seq_reaching(slot, offset) };
            (start_seq, end)
        };
        let wish = Wish { tag: Some(tag), from: Some(offset), bytes_max, ..Wish::default() };
        let mut page = self.collect(start_seq - 1, wish)?;
        let resume = page.records.first().map(|first| (first.seq, first.offset));
        // Nothing left up to where the stream ended: then all of that is lost.
        let resume = resume.or_else(|| page.end.then_some((page.next_seq + 1, end)));
        page.lost = resume
            .filter(|(_, resume)| *resume > offset)
            .map(|(seq, resume)| Lost { seqs: seq..seq, resume: vec![(tag, resume)] });
        Ok(page)
    }

    /// The first and the last bytes of what is there now, half of `bytes` each: everything, without overlap, when there
    /// are not more than `bytes`. Records are cut to fit.
    ///
    /// # Errors
    /// As [`JournalReader::page`].
    pub fn head_tail(&self, filter: Option<u8>, bytes: usize) -> Result<(Page, Page), JournalError> {
        let (start_seq, until) = {
            let state = self.state();
            let slot = filter.and_then(|tag| state.head.slot(tag));
            let end = state.head.offsets().position(slot);
            (state.seq_reaching(slot, end.saturating_sub(bytes as u64)), state.head.next_seq)
        };
        let wish = Wish { tag: filter, until, ..Wish::default() };
        let head = self.collect(0, Wish { bytes_max: bytes / 2, cut: true, ..wish })?;
        let taken = head.records.last().map_or((0, 0), |last| (last.seq, last.end()));
        let mut tail = self.collect(start_seq - 1, Wish { bytes_max: bytes.max(1), ..wish })?;
        let mut newest = Newest::of(bytes - bytes / 2);
        loop {
            newest.extend(tail.records.drain(..).filter_map(|record| after(taken, record)));
            if tail.end {
                break;
            }
            tail = self.collect(tail.next_seq, Wish { bytes_max: bytes.max(1), ..wish })?;
        }
        tail.records = newest.records.into();
        tail.lost = None;
        Ok((head, tail))
    }

    pub(super) fn dir(&self) -> &Path {
        &self.shared.dir
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves nothing half done: all changes under the lock are moves of finished values.
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows readers what has been written.
    pub(super) fn publish(&self, runs: Vec<Written>, head: Head, current: Option<Arc<File>>) {
        let newest_seq = head.next_seq - 1;
        self.state().take(runs, head, current);
        self.shared.newest_seq.store(newest_seq, Ordering::Release);
    }

    /// The same, where the numbers up to those of `head` are left out.
    pub(super) fn skip(&self, runs: Vec<Written>, head: Head, current: Option<Arc<File>>) {
        self.state().tail.restart(head.next_seq, head.offsets());
        self.publish(runs, head, current);
    }

    fn collect(&self, after_seq: u64, wish: Wish) -> Result<Page, JournalError> {
        let (origin, first_available_seq) = {
            let state = self.state();
            (state.head.origin, state.first_seq())
        };
        // No record has the highest number, so that there is always a next one.
        let after_seq = after_seq.clamp(origin - 1, u64::MAX - 1);
        let mut page = Collector::new(after_seq, first_available_seq, wish);
        while !page.full {
            let next_seq = page.page.next_seq + 1;
            if next_seq >= wish.until {
                page.page.end = true;
                break;
            }
            let place = self.state().locate(next_seq, wish.tag);
            match place {
                Place::End => {
                    page.page.end = true;
                    break;
                }
                Place::Skip { next } => page.skip_to(next),
                Place::Hole { next } => page.hole(next, self.state().resume(next)),
                Place::Tail { records, through } => {
                    if records.into_iter().all(|record| page.offer(record)) {
                        page.skip_to(through + 1);
                    }
                }
                Place::Disk { first_seq, file, part, beyond } => {
                    let Some(mut bytes) = self.read(first_seq, file, &part)? else { continue };
                    while !bytes.is_empty() && !page.full {
                        match segment::decode(&mut bytes) {
                            Some(record) => _ = page.offer(record),
                            None => {
                                page.hole(beyond, self.state().resume(beyond));
                                break;
                            }
                        }
                    }
                }
            }
        }
        Ok(page.page)
    }

    /// Part of a segment file; `None` when the segment was dropped before its file could be opened.
    pub(super) fn read(&self, first_seq: u64, file: Option<Arc<File>>, part: &Range<u64>) -> io::Result<Option<Bytes>> {
        let file = match file {
            Some(file) => file,
            None => match open_segment(&segment_path(self.dir(), first_seq), false) {
                Ok(file) => {
                    let file = Arc::new(file);
                    self.state().keep_open(first_seq, file.clone());
                    file
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound && !self.state().has_segment(first_seq) => {
                    return Ok(None);
                }
                Err(error) => return Err(error),
            },
        };
        let mut bytes = vec![0; (part.end - part.start) as usize];
        file.read_exact_at(&mut bytes, part.start)?;
        Ok(Some(bytes.into()))
    }
}

/// What a reader wants.
#[derive(Debug, Clone, Copy)]
struct Wish {
    tag: Option<u8>,
    /// First byte of the stream, for a cursor of bytes.
    from: Option<u64>,
    /// No record from this number on.
    until: u64,
    bytes_max: usize,
    /// Keep to `bytes_max` to the byte, cutting the last record.
    cut: bool,
}

impl Default for Wish {
    fn default() -> Self {
        Self { tag: None, from: None, until: u64::MAX, bytes_max: 0, cut: false }
    }
}

/// A page being filled.
struct Collector {
    page: Page,
    wish: Wish,
    bytes: usize,
    full: bool,
    /// A gap of unknown size that waits for bytes to follow it.
    pending: Option<Record>,
}

impl Collector {
    fn new(after_seq: u64, first_available_seq: u64, wish: Wish) -> Self {
        let page = Page { records: Vec::new(), next_seq: after_seq, first_available_seq, lost: None, end: false };
        Self { page, wish, bytes: 0, full: false, pending: None }
    }

    /// Takes a record if it is wanted. False when the page is full, and the record is for the next one.
    fn offer(&mut self, mut record: Record) -> bool {
        if record.seq >= self.wish.until {
            self.page.end = true;
            self.full = true;
            return false;
        }
        if record.seq <= self.page.next_seq {
            return true;
        }
        if self.wish.tag.is_some_and(|tag| tag != record.tag) {
            self.skip_to(record.seq + 1);
            return true;
        }
        if let Some(from) = self.wish.from {
            if record.end() <= from || record.end() == record.offset {
                self.skip_to(record.seq + 1);
                if record.gap.is_some_and(|gap| gap.bytes.is_none()) && record.offset >= from {
                    self.pending = Some(record);
                }
                return true;
            }
            let cut = from.saturating_sub(record.offset);
            cut_front(&mut record, cut);
        }
        let room = self.wish.bytes_max.saturating_sub(self.bytes);
        if self.wish.cut && record.bytes.len() > room {
            self.full = true;
            record.bytes.truncate(room);
            if room == 0 {
                return false;
            }
        } else if !self.page.records.is_empty() && record.bytes.len() > room {
            self.full = true;
            return false;
        }
        self.skip_to(record.seq + 1);
        self.bytes += record.bytes.len();
        self.page.records.extend(self.pending.take());
        self.page.records.push(record);
        self.full |= self.page.records.len() >= PAGE_RECORDS_MAX;
        !self.full
    }

    fn skip_to(&mut self, next_seq: u64) {
        self.page.next_seq = self.page.next_seq.max(next_seq - 1);
    }

    /// The records before `next` do not exist. A page that has some already ends here, and the next one says so.
    fn hole(&mut self, next: u64, resume: Vec<(u8, u64)>) {
        if !self.page.records.is_empty() {
            self.full = true;
            return;
        }
        let start = self.page.lost.as_ref().map_or(self.page.next_seq + 1, |lost| lost.seqs.start);
        self.page.lost = Some(Lost { seqs: start..next, resume });
        self.skip_to(next);
    }
}

/// The newest records up to a number of bytes.
struct Newest {
    records: VecDeque<Record>,
    bytes: usize,
    bytes_max: usize,
}

impl Newest {
    fn of(bytes_max: usize) -> Self {
        Self { records: VecDeque::new(), bytes: 0, bytes_max }
    }

    fn extend(&mut self, records: impl Iterator<Item = Record>) {
        for record in records {
            self.bytes += record.bytes.len();
            self.records.push_back(record);
            while self.bytes > self.bytes_max || self.records.len() > PAGE_RECORDS_MAX {
                let Some(mut oldest) = self.records.pop_front() else { break };
                let cut = oldest.bytes.len().min(self.bytes.saturating_sub(self.bytes_max));
                self.bytes -= oldest.bytes.len();
                if cut < oldest.bytes.len() && self.records.len() < PAGE_RECORDS_MAX {
                    cut_front(&mut oldest, cut as u64);
                    self.bytes += oldest.bytes.len();
                    self.records.push_front(oldest);
                }
            }
        }
    }
}

/// What of a record lies behind the record `taken.0`, which was read up to offset `taken.1`.
fn after(taken: (u64, u64), mut record: Record) -> Option<Record> {
    if record.seq == taken.0 && taken.1 < record.end() {
        let cut = taken.1.saturating_sub(record.offset);
        cut_front(&mut record, cut);
        return Some(record);
    }
    (record.seq > taken.0).then_some(record)
}

/// Takes `cut` bytes of the stream off the front of a record, which has more.
fn cut_front(record: &mut Record, cut: u64) {
    record.offset += cut;
    match &mut record.gap {
        Some(gap) => gap.bytes = gap.bytes.map(|bytes| bytes - cut),
        None => record.bytes = record.bytes.slice(cut as usize..),
    }
}
