//! A journal: an append-only, numbered log with byte offsets, on disk first, bounded, and exact about what it lost.
//! Owned by whoever writes it (a process session, later other event logs), read by any number of [`JournalReader`]s.
//! It knows no clock and no runtime: every call is plain file work, and waking readers is the owner's business.
//!
//! ```text
//!  append ──► encode batch ──► one write to the newest segment file ──► publish ──► readers
//!                                                                         │
//!   stream offsets   0 ······ lost ······│──── segment ────│─── segment ───│─ newest ─│
//!   seq              origin          first_seq                          │── tail ───│ next_seq
//!                                        └ pread, from the index         └ memory: a read cache
//! ```
//!
//! The tag of a record names its stream (0 stdout, 1 stderr, 2 pty, others free). `seq` counts the records of all
//! streams without a hole; the offset of a record counts the bytes of its stream before it, lost ones included. A
//! journal stands between two records as a `segment::Head`, which begins each file. So a reader, or the next process,
//! needs no file before the one it reads, and what is gone is known to the byte: it lies between where one piece that
//! exists ends and the next one starts.

mod checksum;
#[cfg(test)]
mod model_tests;
mod reader;
mod segment;
mod state;
mod tail;
#[cfg(test)]
mod tests;

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::{Bytes, BytesMut};

pub use reader::JournalReader;
use segment::{HEADER_LEN_MAX, Head, STREAMS_MAX, Segment};
use state::Written;

/// A segment is never larger than this, except for a single record that is.
const SEGMENT_BYTES_MAX: u64 = 8 * 1024 * 1024;

/// Nor is it cut smaller, or headers would take a noticeable part of the quota.
const SEGMENT_BYTES_MIN: u64 = 64 * 1024;

/// The bounds of one journal.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of memory for the newest records, their own cost included, give or take a quarter since records share
    /// buffers. The index comes on top: about 100 bytes for each 64 KiB on disk.
    pub memory_bytes_max: usize,
    /// Bytes of all segment files. Less than 128 KiB counts as 128 KiB: two of the smallest segments.
    pub spill_bytes_max: u64,
    /// What happens at `spill_bytes_max`.
    pub full: Full,
}

/// What an append does that would exceed the quota.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Full {
    /// The oldest segments go, whole, and are counted as lost.
    DropOldest,
    /// The append fails with [`JournalError::Full`] and changes nothing.
    Refuse,
}

/// One record to append.
#[derive(Debug, Clone, Copy)]
pub struct Append<'a> {
    /// Its stream.
    pub tag: u8,
    /// The owner's own number for it, kept beside it.
    pub mark: u64,
    /// May be empty.
    pub bytes: &'a [u8],
}

/// One record as readers see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Its number in the journal.
    pub seq: u64,
    /// Its stream.
    pub tag: u8,
    /// Bytes of its stream before it, lost ones included.
    pub offset: u64,
    /// The owner's own number for it.
    pub mark: u64,
    /// Shared, not copied. Empty for a gap.
    pub bytes: Bytes,
    /// Set when the record stands for bytes that never reached the journal.
    pub gap: Option<Gap>,
}

impl Record {
    /// Offset of the byte of its stream that follows it.
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(segment::extent(&self.bytes, self.gap))
    }
}

/// Bytes that were lost before they reached the journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gap {
    /// How many; `None` when nobody knows, and then offsets go on as if there were none.
    pub bytes: Option<u64>,
    /// In how many pieces of the owner.
    pub chunks: u64,
}

/// One answer to a reader. Unless it is filtered its records are contiguous: it ends before a hole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// Oldest first.
    pub records: Vec<Record>,
    /// Give this as `after_seq` for the page after this one.
    pub next_seq: u64,
    /// Number of the oldest record that still exists, or of the next one to come.
    pub first_available_seq: u64,
    /// What no longer exists between the reader's cursor and the first record.
    pub lost: Option<Lost>,
    /// No record follows, so far.
    pub end: bool,
}

/// A hole that a reader has come upon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lost {
    /// Numbers of the missing records. Empty when the cursor was a byte offset.
    pub seqs: Range<u64>,
    /// Tag and offset where the streams go on behind the hole. From its own position up to there a reader misses
    /// exactly the bytes between.
    pub resume: Vec<(u8, u64)>,
}

/// The sums of one stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Totals {
    /// The stream.
    pub tag: u8,
    /// Length of the stream, lost bytes included.
    pub bytes: u64,
    /// Bytes that can no longer be read: dropped for the quota, or named lost by the owner.
    pub lost_bytes: u64,
    /// No gap of unknown size: `bytes` and `lost_bytes` are the truth.
    pub exact: bool,
    /// SHA-256 of the whole stream, dropped bytes included. `None` once a byte never reached the journal.
    pub sha256: Option<[u8; 32]>,
}

/// Why a journal could not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The quota is used up and the journal was told to refuse.
    #[error("the journal is full at {bytes_max} bytes")]
    Full {
        /// The quota.
        bytes_max: u64,
    },
    /// A batch must fit into half of the quota.
    #[error("a batch of {bytes} bytes is too large for a journal that takes {bytes_max}")]
    TooLarge {
        /// Size of the batch on disk.
        bytes: u64,
        /// The largest that is taken.
        bytes_max: u64,
    },
    /// A journal has at most 16 streams.
    #[error("the journal has no room for another stream")]
    TooManyStreams,
    /// The directory holds no usable segment. If it holds others they are left alone, for the owner to remove.
    #[error("there is no journal")]
    Missing,
    /// The directory holds a journal already.
    #[error("there is a journal already")]
    Exists,
    /// The disk failed. What was to be done has not happened.
    #[error("the journal's disk failed")]
    Disk(#[from] io::Error),
}

type WriteRun = Box<dyn FnMut(&File, &[u8]) -> io::Result<()> + Send>;

/// The writing end. Dropping it leaves the files as they are; what was appended survives the process, and what was
/// synced survives the machine.
pub struct Journal {
    reader: JournalReader,
    limits: Limits,
    segment_bytes: u64,
    current: Option<Arc<File>>,
    in_memory: bool,
    /// A failed write may have left bytes behind the newest record, and cutting them off failed too.
    torn: bool,
    /// First numbers of the files written since the last sync.
    unsynced: Vec<u64>,
    /// The one way to the disk for records, so that tests can have it fail.
    write_run: WriteRun,
}

impl std::fmt::Debug for Journal {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Journal").field("dir", &self.reader.dir()).field("in_memory", &self.in_memory).finish()
    }
}

impl Journal {
    /// Makes a journal in `dir`, which is created if need be, for its owner's eyes only. `first_seq` is the number of
    /// the first record, at least 1.
    ///
    /// # Errors
    /// [`JournalError::Exists`], [`JournalError::Disk`].
    pub fn create(dir: &Path, first_seq: u64, limits: Limits) -> Result<Self, JournalError> {
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        if !segment_files(dir)?.is_empty() {
            return Err(JournalError::Exists);
        }
        let mut journal = Self::with(JournalReader::new(dir.into(), Head::new(first_seq.max(1)), limits), limits);
        journal.rotate()?;
        Ok(journal)
    }

    /// Opens the journal in `dir` as the last process left it, however that ended. Reads all its files once: numbers,
    /// offsets, digests and losses are as before; a torn end is cut off, and what is damaged further up is a hole of
    /// known size. After a power failure records that were never synced may be missing at the end, and their numbers
    /// are used again: [`JournalReader::last_mark`] tells the owner where to go on.
    ///
    /// # Errors
    /// [`JournalError::Missing`], [`JournalError::Disk`].
    pub fn open(dir: &Path, limits: Limits) -> Result<Self, JournalError> {
        let mut newest: Option<Head> = None;
        let mut segments = Vec::new();
        let mut unusable = Vec::new();
        for (first_seq, path) in segment_files(dir)?.into_iter().rev() {
            let file = Bytes::from(fs::read(&path)?);
            let len = file.len() as u64;
            let scanned = segment::scan(file, newest.is_none()).filter(|(segment, _)| segment.first_seq == first_seq);
            let Some((segment, head)) = scanned else {
                unusable.push(path);
                continue;
            };
            if segment.len < len {
                OpenOptions::new().write(true).open(&path)?.set_len(segment.len)?;
            }
            newest.get_or_insert(head);
            segments.push(segment);
        }
        let head = newest.ok_or(JournalError::Missing)?;
        for path in unusable {
            fs::remove_file(path)?;
        }
        let mut journal = Self::with(JournalReader::new(dir.into(), head, limits), limits);
        if let Some(newest) = segments.first() {
            journal.unsynced.push(newest.first_seq);
            journal.current = Some(Arc::new(open_segment(&journal.path(newest.first_seq), false)?));
        }
        let mut state = journal.reader.state();
        state.segments = segments.into_iter().rev().collect();
        state.current.clone_from(&journal.current);
        drop(state);
        Ok(journal)
    }

    /// A journal that never touches a disk: the newest `memory_bytes_max` bytes, and exact numbers of what is gone.
    pub fn in_memory(first_seq: u64, limits: Limits) -> Self {
        let head = Head::new(first_seq.max(1));
        let mut journal = Self::with(JournalReader::new(PathBuf::new(), head, limits), limits);
        journal.in_memory = true;
        journal
    }

    /// Deletes the journal in `dir`, and the directory. Readers keep what they have open, nothing else. None there is
    /// no error.
    ///
    /// # Errors
    /// What the file system says.
    pub fn remove(dir: &Path) -> io::Result<()> {
        fs::remove_dir_all(dir).or_else(none_is_fine)
    }

    /// The reading end, to be cloned for others.
    pub fn reader(&self) -> &JournalReader {
        &self.reader
    }

    /// Appends a batch, all or nothing: one write for each segment file it reaches (nearly always one), then readers
    /// see it. Returns the numbers of its records.
    ///
    /// # Errors
    /// After any error the journal is as it was, except that old segments may have been dropped to make room.
    /// [`JournalError::Full`] only with [`Full::Refuse`]. After [`JournalError::Disk`] the owner may try again, or call
    /// [`Journal::continue_in_memory`] and append the same batch there.
    pub fn append(&mut self, batch: &[Append<'_>]) -> Result<Range<u64>, JournalError> {
        self.commit(batch.iter().map(|append| (*append, None)))
    }

    /// Appends a record that says: here bytes of `tag` are missing that never reached the journal, in `chunks` pieces
    /// of the owner. `bytes` moves the stream's offset; `None` means that nobody knows how many.
    ///
    /// # Errors
    /// As [`Journal::append`].
    pub fn append_gap(
        &mut self,
        tag: u8,
        bytes: Option<u64>,
        chunks: u64,
        mark: u64,
    ) -> Result<Range<u64>, JournalError> {
        let append = Append { tag, mark, bytes: &[] };
        self.commit(std::iter::once((append, Some(Gap { bytes, chunks }))))
    }

    /// Writes to the medium what was appended since the last call. Blocks as long as the disk takes.
    ///
    /// # Errors
    /// What the disk says; the data in question may then be lost with the power, and a later call does not repeat it.
    pub fn sync(&mut self) -> io::Result<()> {
        self.unsynced().sync()
    }

    /// What [`Journal::sync`] would do, as a value: another thread can wait for the disk while this one appends.
    pub fn unsynced(&mut self) -> Unsynced {
        let files = std::mem::take(&mut self.unsynced);
        Unsynced { dir: self.reader.dir().into(), paths: files.into_iter().map(|seq| self.path(seq)).collect() }
    }

    /// Drops the oldest segments until the files take at most `bytes`, all but one empty segment if need be. For a
    /// quota over many journals.
    ///
    /// # Errors
    /// [`JournalError::Disk`]; some may be dropped already.
    pub fn shrink_to(&mut self, bytes: u64) -> Result<(), JournalError> {
        let keep = usize::from(self.current.is_some());
        self.drop_oldest(bytes, keep)?;
        let (disk_bytes, bare) = {
            let state = self.reader.state();
            (state.disk_bytes(), state.segments.back().is_none_or(Segment::is_empty))
        };
        if disk_bytes > bytes && !bare && !self.in_memory {
            // The newest file goes only when the numbers have another place to survive in, a power failure too.
            self.rotate()?;
            self.sync()?;
            self.drop_oldest(bytes, 1)?;
        }
        Ok(())
    }

    /// Gives up the disk for new records: from now on the newest `memory_bytes_max` bytes are kept, and what goes is
    /// counted. Records on disk stay readable. A process that opens the journal later finds it as it was on disk.
    pub fn continue_in_memory(&mut self) {
        self.in_memory = true;
        self.current = None;
        self.reader.state().current = None;
    }

    /// Leaves out the next `numbers`, as a hole of which readers are told. For an owner who finds less than it may have
    /// shown to readers before: what it appends from here on keeps the numbers that it had then.
    ///
    /// # Errors
    /// As [`Journal::append`].
    pub fn skip(&mut self, numbers: u64) -> Result<(), JournalError> {
        let mut head = self.reader.state().head.clone();
        head.next_seq = head.next_seq.saturating_add(numbers);
        let mut runs = Vec::new();
        if !self.in_memory {
            let run = Run::fresh(&head);
            self.write(std::slice::from_ref(&run))?;
            runs.push(run.publishable(0));
        }
        self.reader.skip(runs, head, self.current.clone());
        Ok(())
    }

    fn with(reader: JournalReader, limits: Limits) -> Self {
        let limits = Limits { spill_bytes_max: limits.spill_bytes_max.max(2 * SEGMENT_BYTES_MIN), ..limits };
        Self {
            reader,
            limits,
            segment_bytes: (limits.spill_bytes_max / 8).clamp(SEGMENT_BYTES_MIN, SEGMENT_BYTES_MAX),
            current: None,
            in_memory: false,
            torn: false,
            unsynced: Vec::new(),
            write_run: Box::new(|mut file, bytes| file.write_all(bytes)),
        }
    }

    fn path(&self, first_seq: u64) -> PathBuf {
        segment_path(self.reader.dir(), first_seq)
    }

    fn commit<'a>(
        &mut self,
        batch: impl Iterator<Item = (Append<'a>, Option<Gap>)> + Clone,
    ) -> Result<Range<u64>, JournalError> {
        let mut head = self.reader.state().head.clone();
        let first_seq = head.next_seq;
        let (bytes, bytes_max) = (
            batch.clone().map(|(append, gap)| segment::encoded_len(append.bytes, gap)).sum::<u64>(),
            self.limits.spill_bytes_max / 2,
        );
        if bytes > bytes_max {
            return Err(JournalError::TooLarge { bytes, bytes_max });
        }
        // Counted apart from `head`: a header written halfway through must not name streams that begin after it.
        let mut new_tags: Vec<u8> =
            batch.clone().map(|(append, _)| append.tag).filter(|tag| head.slot(*tag).is_none()).collect();
        new_tags.sort_unstable();
        new_tags.dedup();
        if head.streams.len() + new_tags.len() > STREAMS_MAX {
            return Err(JournalError::TooManyStreams);
        }
        if bytes == 0 {
            return Ok(first_seq..first_seq);
        }
        let runs = self.encode(&mut head, batch, bytes);
        if !self.in_memory {
            self.make_room(&runs)?;
            self.write(&runs)?;
        }
        let next_seq = head.next_seq;
        let share_bytes_max = self.limits.memory_bytes_max / 4;
        let runs = runs.into_iter().map(|run| run.publishable(share_bytes_max)).collect();
        self.reader.publish(runs, head, self.current.clone());
        if !self.in_memory {
            // With a small quota the file before this one may have to go too, but not before the numbers have another
            // place to survive in. The batch is in, so a file that cannot be deleted is no failure of it.
            let _ = self.drop_oldest(self.limits.spill_bytes_max, 1);
        }
        Ok(first_seq..next_seq)
    }

    /// Turns a batch into what is written, moving `head` past it.
    fn encode<'a>(
        &self,
        head: &mut Head,
        batch: impl Iterator<Item = (Append<'a>, Option<Gap>)>,
        batch_bytes: u64,
    ) -> Vec<Run> {
        let newest = self.reader.state().segments.back().map(|segment| (segment.len, segment.is_empty()));
        let (mut len, mut empty) = newest.unwrap_or((0, true));
        // With a small quota even the newest segment may have to go; then it is not written to before.
        let crowded = len + batch_bytes + 2 * HEADER_LEN_MAX as u64 > self.limits.spill_bytes_max;
        let mut fresh = self.current.is_none() || (crowded && self.limits.full == Full::DropOldest);
        let mut runs: Vec<Run> = Vec::new();
        for (append, gap) in batch {
            let size = segment::encoded_len(append.bytes, gap);
            fresh |= !empty && len + size > self.segment_bytes;
            if !self.in_memory && fresh {
                runs.push(Run::fresh(head));
                len = runs.last().map_or(0, |run| run.buf.len() as u64);
            } else if runs.is_empty() {
                runs.push(Run { segment: None, buf: BytesMut::new(), records: Vec::new() });
            }
            (fresh, empty, len) = (false, false, len + size);
            if let Some(run) = runs.last_mut() {
                run.push(head, append, gap);
            }
        }
        runs
    }

    fn make_room(&mut self, runs: &[Run]) -> Result<(), JournalError> {
        let bytes_max = self.limits.spill_bytes_max;
        let room = bytes_max.saturating_sub(runs.iter().map(|run| run.buf.len() as u64).sum());
        match self.limits.full {
            Full::Refuse if self.reader.disk_bytes() > room => Err(JournalError::Full { bytes_max }),
            Full::Refuse => Ok(()),
            Full::DropOldest => Ok(self.drop_oldest(room, 1)?),
        }
    }

    /// Writes all runs, or none of them: what a failure leaves behind is taken back.
    fn write(&mut self, runs: &[Run]) -> io::Result<()> {
        let before = self.current.clone();
        let before_len = self.reader.state().segments.back().map_or(0, |segment| segment.len);
        if self.torn
            && let Some(current) = &before
        {
            current.set_len(before_len)?;
            self.torn = false;
        }
        for (written, run) in runs.iter().enumerate() {
            let Err(error) = self.write_one(run) else { continue };
            for segment in runs[..=written].iter().filter_map(|run| run.segment.as_ref()) {
                // Left behind it would be overwritten by the next attempt, which has the same number.
                let _ = fs::remove_file(self.path(segment.first_seq));
                self.unsynced.retain(|unsynced| *unsynced != segment.first_seq);
            }
            self.torn = before.as_ref().is_some_and(|current| current.set_len(before_len).is_err());
            self.current = before;
            return Err(error);
        }
        Ok(())
    }

    fn write_one(&mut self, run: &Run) -> io::Result<()> {
        let first_seq = match &run.segment {
            Some(segment) => {
                self.current = Some(Arc::new(open_segment(&self.path(segment.first_seq), true)?));
                Some(segment.first_seq)
            }
            None => self.reader.state().segments.back().map(|segment| segment.first_seq),
        };
        if let Some(first_seq) = first_seq.filter(|seq| self.unsynced.last() != Some(seq)) {
            self.unsynced.push(first_seq);
        }
        let current = self.current.as_ref().ok_or(io::ErrorKind::NotFound)?;
        (self.write_run)(current, &run.buf)
    }

    /// Begins a new segment.
    fn rotate(&mut self) -> io::Result<()> {
        let head = self.reader.state().head.clone();
        let run = Run::fresh(&head);
        self.write(std::slice::from_ref(&run))?;
        self.reader.publish(vec![run.publishable(0)], head, self.current.clone());
        Ok(())
    }

    /// Drops the oldest segments while the files take more than `bytes` and there are more than `keep`.
    fn drop_oldest(&mut self, bytes: u64, keep: usize) -> io::Result<()> {
        loop {
            let dropped = self.reader.state().drop_oldest(bytes, keep);
            let Some(first_seq) = dropped else { return Ok(()) };
            self.unsynced.retain(|unsynced| *unsynced != first_seq);
            fs::remove_file(self.path(first_seq)).or_else(none_is_fine)?;
        }
    }
}

/// What waits for the disk; made by [`Journal::unsynced`].
#[derive(Debug)]
#[must_use = "nothing is synced until `sync` is called"]
pub struct Unsynced {
    dir: PathBuf,
    paths: Vec<PathBuf>,
}

impl Unsynced {
    /// Blocks until the medium has it all. A segment that was dropped meanwhile needs no sync.
    ///
    /// # Errors
    /// What the disk says.
    pub fn sync(self) -> io::Result<()> {
        for path in &self.paths {
            // Opening it again costs little, and keeps old segments from staying open until they are synced.
            File::open(path).and_then(|file| file.sync_data()).or_else(none_is_fine)?;
        }
        if self.paths.is_empty() {
            return Ok(());
        }
        File::open(&self.dir).and_then(|dir| dir.sync_data()).or_else(none_is_fine)
    }
}

/// One write: to the newest segment, or of a new one.
struct Run {
    segment: Option<Segment>,
    buf: BytesMut,
    /// Slot, record still without its bytes, and where in `buf` they are.
    records: Vec<(usize, Record, Range<usize>)>,
}

impl Run {
    fn fresh(head: &Head) -> Self {
        let mut buf = BytesMut::new();
        segment::encode_header(&mut buf, head);
        Self { segment: Some(Segment::new(head, buf.len() as u64)), buf, records: Vec::new() }
    }

    fn push(&mut self, head: &mut Head, append: Append<'_>, gap: Option<Gap>) {
        let Append { tag, mark, bytes } = append;
        let slot = head.slot_or_new(tag);
        let offset = head.streams[slot].offset;
        let record = Record { seq: head.next_seq, tag, offset, mark, bytes: Bytes::new(), gap };
        self.buf.reserve(segment::encoded_len(bytes, gap) as usize);
        let payload = segment::encode(&mut self.buf, &record, bytes);
        head.pass(slot, mark, bytes, gap, true);
        self.records.push((slot, record, payload));
    }

    /// The records with their bytes: slices of what was written, unless keeping one of them would keep too much alive
    /// beside it.
    fn publishable(self, share_bytes_max: usize) -> Written {
        let share = self.buf.capacity() <= share_bytes_max;
        let buf = self.buf.freeze();
        let records = self.records.into_iter().map(|(slot, mut record, payload)| {
            if record.gap.is_none() {
                record.bytes = if share { buf.slice(payload) } else { Bytes::copy_from_slice(&buf[payload]) };
            }
            (slot, record)
        });
        Written { segment: self.segment, records: records.collect() }
    }
}

fn segment_path(dir: &Path, first_seq: u64) -> PathBuf {
    dir.join(format!("{first_seq:020}.seg"))
}

/// First number and path of each segment file, oldest first.
fn segment_files(dir: &Path) -> io::Result<Vec<(u64, PathBuf)>> {
    let mut files = Vec::new();
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(files),
        entries => entries?,
    };
    for entry in entries {
        let path = entry?.path();
        let is_segment = path.extension().is_some_and(|extension| extension == "seg");
        let number = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse().ok());
        if let Some(first_seq) = number.filter(|_| is_segment) {
            files.push((first_seq, path));
        }
    }
    files.sort_unstable();
    Ok(files)
}

fn open_segment(path: &Path, fresh: bool) -> io::Result<File> {
    if fresh {
        // `append` and `truncate` exclude each other: an earlier attempt's remains are deleted instead.
        fs::remove_file(path).or_else(none_is_fine)?;
    }
    OpenOptions::new().read(true).append(true).create_new(fresh).mode(0o600).open(path)
}

fn none_is_fine(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) }
}
