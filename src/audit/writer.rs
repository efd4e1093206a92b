//! Writer: the thread that writes the audit, and the one that syncs it.
//! Owns the files and where the chain stands. It never waits for the disk to become permanent: that is the other one's.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use super::files::{Files, Found};
use super::record::{Open, Outcome, Position, Said};
use super::{AuditError, Begun, Entry, Item, Shared};
use crate::time::rfc3339_millis;

/// Size past which a batch takes no further record, in bytes.
const BATCH_BYTES: usize = 1024 * 1024;

/// Pause between two tries on a disk that takes nothing; who calls meanwhile is answered at once.
const RETRY_PAUSE: Duration = Duration::from_millis(100);

/// Interval of fsync.
const SYNC_EVERY: Duration = Duration::from_secs(1);

/// Interval in which the age of files is looked at.
const AGE_LOOK: Duration = Duration::from_secs(600);

/// Age at which a file is closed, so that its records go in time.
const DAY: Duration = Duration::from_secs(86_400);

pub(super) struct Writer {
    shared: Arc<Shared>,
    files: Files,
    position: Position,
    /// What is under way, by the numbers of its beginnings.
    open: BTreeMap<u64, Open>,
    /// Ends, and beginnings whose callers wait, in the order in which they came.
    waiting: VecDeque<Item>,
    /// Records that are missing since the last one that was written.
    missing: u64,
    /// When the disk last took nothing, until it takes something again.
    failed: Option<Instant>,
    looked: Instant,
    unsynced: Option<Unsynced>,
}

/// What was written and is not permanent yet, for the syncing thread.
struct Unsynced {
    files: Arc<Mutex<Vec<Arc<File>>>>,
    /// Says that there is something; closed with the writer.
    news: SyncSender<()>,
}

impl Unsynced {
    fn add(&self, file: &Arc<File>) {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        if !files.iter().any(|known| Arc::ptr_eq(known, file)) {
            files.push(file.clone());
        }
        drop(files);
        let _ = self.news.try_send(());
    }
}

/// Starts both threads.
pub(super) fn spawn(mut writer: Writer) -> io::Result<Vec<JoinHandle<()>>> {
    let files: Arc<Mutex<Vec<Arc<File>>>> = Arc::default();
    let (news, told) = sync_channel(1);
    writer.unsynced = Some(Unsynced { files: files.clone(), news });
    let sync = std::thread::Builder::new().name("audit-sync".into()).spawn(move || sync(&files, &told))?;
    let write = std::thread::Builder::new().name("audit".into()).spawn(move || writer.run())?;
    Ok(vec![write, sync])
}

/// Makes what was written permanent, at most once a second. Ends with the writer, and not before all is permanent.
fn sync(files: &Mutex<Vec<Arc<File>>>, told: &Receiver<()>) {
    let mut goes_on = true;
    while goes_on {
        goes_on = told.recv().is_ok();
        let until = Instant::now() + SYNC_EVERY;
        while goes_on {
            match told.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(()) => {}
                Err(RecvTimeoutError::Timeout) => break,
                Err(RecvTimeoutError::Disconnected) => goes_on = false,
            }
        }
        let written = std::mem::take(&mut *files.lock().unwrap_or_else(PoisonError::into_inner));
        for file in written {
            if let Err(error) = file.sync_data() {
                tracing::error!(%error, "the audit log may lose its newest records if the machine fails");
            }
        }
    }
}

impl Writer {
    pub(super) fn new(shared: Arc<Shared>, found: Found) -> Self {
        let Found { files, position, open } = found;
        let unknown = |(of, open): (&u64, &Open)| Item::End {
            of: *of,
            open: open.clone(),
            outcome: Outcome::new("unknown"),
            at: SystemTime::now(),
            duration: None,
        };
        Self {
            waiting: open.iter().map(unknown).collect(),
            shared,
            files,
            position,
            open,
            missing: 0,
            failed: None,
            looked: Instant::now(),
            unsynced: None,
        }
    }

    fn run(mut self) {
        self.make_room();
        loop {
            let closing = self.take();
            self.commit(closing);
            if self.looked.elapsed() >= AGE_LOOK {
                self.make_room();
            }
            if closing && self.shared.queue().items.is_empty() {
                self.refuse_waiting();
                return;
            }
        }
    }

    /// Waits for something to do and takes it. Says whether this is the end.
    fn take(&mut self) -> bool {
        let mut queue = self.shared.queue();
        if queue.items.is_empty() && !queue.closing && self.waiting.is_empty() {
            // What is held back, or missing, is tried again without anybody asking.
            let wait = if self.failed.is_some() { RETRY_PAUSE } else { AGE_LOOK };
            let wake = self.shared.wake.wait_timeout(queue, wait);
            queue = wake.unwrap_or_else(PoisonError::into_inner).0;
        } else if queue.items.is_empty() && !queue.closing && self.failed.is_some() {
            let wake = self.shared.wake.wait_timeout(queue, RETRY_PAUSE);
            queue = wake.unwrap_or_else(PoisonError::into_inner).0;
        }
        self.missing += std::mem::take(&mut queue.missing);
        self.waiting.extend(queue.items.drain(..));
        self.shared.counts.kept.store(self.waiting.len(), Relaxed);
        queue.closing
    }

    /// Writes what waits, batch by batch, or answers those who wait that it cannot be written.
    fn commit(&mut self, last_try: bool) {
        while !self.waiting.is_empty() || self.missing > 0 {
            if self.failed.is_some_and(|at| at.elapsed() < RETRY_PAUSE) && !last_try {
                return self.refuse_waiting();
            }
            if let Err(error) = self.write_batch() {
                if self.failed.replace(Instant::now()).is_none() {
                    tracing::error!(%error, "the audit log cannot be written");
                }
                self.shared.counts.failing.store(true, Relaxed);
                return self.refuse_waiting();
            }
            if self.failed.take().is_some() {
                tracing::warn!("the audit log is written again");
            }
            self.shared.counts.failing.store(false, Relaxed);
        }
    }

    /// Writes the next batch with one write, and tells those who wait for it.
    fn write_batch(&mut self) -> io::Result<()> {
        let now = SystemTime::now();
        if self.files.is_full(self.shared.settings.now().file_bytes_max, now - DAY) {
            self.begin_file(now)?;
            self.make_room();
        }
        let (mut lines, mut position, mut count) = (Vec::new(), self.position, 0);
        if self.missing > 0 {
            let gap = Said::Gap { missing: self.missing };
            position = gap.write(position, &rfc3339_millis(now), &mut lines);
        }
        for item in &self.waiting {
            if lines.len() >= BATCH_BYTES {
                break;
            }
            position = match item {
                Item::Begin { act, at, .. } => Said::Begin(act).write(position, &rfc3339_millis(*at), &mut lines),
                Item::End { of, open, outcome, at, duration } => {
                    let millis = duration.map(|spent| u64::try_from(spent.as_millis()).unwrap_or(u64::MAX));
                    Said::end(*of, open, outcome, millis).write(position, &rfc3339_millis(*at), &mut lines)
                }
            };
            count += 1;
        }
        self.append(&lines, position)?;
        let mut seq = position.seq - count as u64;
        self.missing = 0;
        self.shared.counts.kept.store(self.waiting.len() - count, Relaxed);
        for item in self.waiting.drain(..count) {
            seq += 1;
            match item {
                Item::Begin { act, began, written, .. } => {
                    if self.open.len() >= self.shared.settings.now().open_max {
                        self.open.pop_first();
                    }
                    let open = act.open();
                    self.open.insert(seq, open.clone());
                    let begun = Begun { audit: self.shared.clone(), seq: Some(seq), open, began };
                    // Whoever has left drops the entry, which tells its end.
                    let _ = written.send(Ok(Entry(Some(begun))));
                }
                Item::End { of, .. } => {
                    self.open.remove(&of);
                }
            }
        }
        Ok(())
    }

    /// Adds lines that lead to `position`.
    fn append(&mut self, lines: &[u8], position: Position) -> io::Result<()> {
        self.files.append(lines)?;
        self.written(position);
        Ok(())
    }

    fn written(&mut self, position: Position) {
        self.shared.counts.records.fetch_add(position.seq - self.position.seq, Relaxed);
        self.shared.counts.bytes.store(self.files.bytes(), Relaxed);
        self.position = position;
        if let (Some(unsynced), Some(file)) = (&self.unsynced, self.files.file()) {
            unsynced.add(file);
        }
    }

    /// Begins a new file, whose head lists what is under way.
    fn begin_file(&mut self, now: SystemTime) -> io::Result<()> {
        let mut head = Vec::new();
        let open = Said::File { open: self.open.iter().map(|(seq, open)| (*seq, open)).collect() };
        let position = open.write(self.position, &rfc3339_millis(now), &mut head);
        self.files.begin(self.position, &head, now)?;
        self.written(position);
        Ok(())
    }

    /// Has the oldest files go that are too old or too much. What their last record was is on record before.
    fn make_room(&mut self) {
        self.looked = Instant::now();
        let now = SystemTime::now();
        if self.files.is_full(u64::MAX, now - DAY)
            && let Err(error) = self.begin_file(now)
        {
            return tracing::warn!(%error, "no new file of the audit log");
        }
        let settings = self.shared.settings.now();
        // Room for the file that is being filled.
        let bytes_max = settings.bytes_max.saturating_sub(settings.file_bytes_max);
        let since = now - Duration::from_secs(settings.retention_days * DAY.as_secs());
        while let Some(leaving) = self.files.leaving(bytes_max, since) {
            let (through_seq, through_hash) = (leaving.through.seq, leaving.through.hex());
            let dropped = Said::Dropped { through_seq, through_hash, why: leaving.why };
            let mut line = Vec::new();
            let position = dropped.write(self.position, &rfc3339_millis(now), &mut line);
            if let Err(error) = self.append(&line, position) {
                return tracing::warn!(%error, "old files of the audit log stay for want of a record");
            }
            if let Err(error) = self.files.remove_oldest() {
                tracing::warn!(%error, file = leaving.first_seq, "an old file of the audit log stays");
            }
            self.shared.counts.bytes.store(self.files.bytes(), Relaxed);
        }
    }

    /// Tells those who wait that nothing is written; ends are held back, as many as there is room for.
    fn refuse_waiting(&mut self) {
        let mut held = VecDeque::new();
        for item in self.waiting.drain(..) {
            match item {
                Item::Begin { act, began, written, .. } => {
                    let answer = if self.shared.goes_on(&act) {
                        self.missing += 1;
                        self.shared.counts.missing.fetch_add(1, Relaxed);
                        Ok(Entry(Some(Begun { audit: self.shared.clone(), seq: None, open: act.open(), began })))
                    } else {
                        self.shared.counts.refused.fetch_add(1, Relaxed);
                        Err(AuditError::Unavailable)
                    };
                    let _ = written.send(answer);
                }
                end if held.len() < self.shared.settings.now().queue_max => held.push_back(end),
                Item::End { .. } => {
                    self.missing += 1;
                    self.shared.counts.missing.fetch_add(1, Relaxed);
                }
            }
        }
        self.shared.counts.kept.store(held.len(), Relaxed);
        self.waiting = held;
    }
}
