//! The audit: who did what, where and to what end, in files that nobody can change unseen.
//! Owned by the gateway, one per state directory, which its lock guards. It records what it is told and judges nothing;
//! it knows no HTTP and no runtime.
//!
//! ```text
//!  begin ──► queue ──► writer thread: batch, one write ──► the beginning is on disk, the caller goes on
//!  end   ──►                 │
//!                            ├ sync thread: fsync each second
//!  audit-…01.jsonl           └ rotation, retention
//!  ┌───────────────────────────────────────────┐    ┌──────────────────
//!  │ head ◄─prev─ begin ◄─prev─ end ◄─prev─ …  │◄───│ head ◄─prev─ …
//!  └───────────────────────────────────────────┘    └──────────────────
//! ```
//!
//! Each line is a record with its number `seq`, and `prev`, the SHA-256 of the line before it, over all files. Whoever
//! changes, drops or adds a line changes the hash that the next one keeps ([`verify`]). A record of what begins is
//! written before it begins; a beginning without an end, which a kill leaves behind, is ended as `unknown` at the next
//! start. The files are bounded: the oldest go, and a record keeps number and hash of what went last.

mod files;
mod reader;
mod record;
#[cfg(test)]
mod tests;
mod verify;
mod writer;

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

pub use reader::{AuditReader, Line};
pub use record::{Act, Outcome, Position};
pub use verify::{Broken, Verified, VerifyError, verify};

use crate::config::{self, Live, WhenFull};
use files::Files;
use record::Open;
use writer::Writer;

/// How long a call waits for its record before the disk counts as one that takes no more.
const WRITE_WAIT: Duration = Duration::from_secs(10);

/// The same for what is done with or without a record.
const WRITE_WAIT_ALWAYS: Duration = Duration::from_secs(1);

/// Directory of the audit within the state directory.
pub const DIRECTORY: &str = "audit";

/// Why something cannot be recorded.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    /// The disk takes no more, or not in time, and the configuration has calls refused then.
    #[error("the audit log cannot be written")]
    Unavailable,
}

/// The writing end; cheap to clone.
#[derive(Clone)]
pub struct Audit(Arc<Shared>);

/// What callers and the writer share.
struct Shared {
    settings: Live<config::Audit>,
    queue: Mutex<Queue>,
    /// There is something in the queue, or it closes.
    wake: Condvar,
    /// Places in the queue for beginnings. Ends need none: each had a beginning.
    room: Arc<Semaphore>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    counts: Counts,
}

#[derive(Default)]
struct Queue {
    items: Vec<Item>,
    /// Records that were given up before they reached the queue.
    missing: u64,
    closing: bool,
}

/// What was recorded and what was not.
#[derive(Default)]
struct Counts {
    records: AtomicU64,
    missing: AtomicU64,
    refused: AtomicU64,
    bytes: AtomicU64,
    /// What the writer has taken and the disk has not.
    kept: AtomicUsize,
    failing: AtomicBool,
}

/// The counts of an audit at one time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AuditCounts {
    /// Records written since the start.
    pub records: u64,
    /// Records that could not be written since the start.
    pub missing: u64,
    /// Beginnings refused since the start, for want of a record.
    pub refused: u64,
    /// Bytes of all files.
    pub bytes: u64,
    /// Beginnings and ends that the writer has not come to.
    pub waiting: usize,
    /// Whether the disk took nothing when it was last tried.
    pub failing: bool,
}

/// Something for the writer.
enum Item {
    Begin {
        act: Box<Act>,
        at: SystemTime,
        began: Instant,
        written: oneshot::Sender<Result<Entry, AuditError>>,
        _place: OwnedSemaphorePermit,
    },
    End {
        of: u64,
        open: Open,
        outcome: Outcome,
        at: SystemTime,
        duration: Option<Duration>,
    },
}

/// Something under way whose beginning is on record. Dropping it records that whoever asked has left.
#[must_use = "dropping it ends it"]
pub struct Entry(Option<Begun>);

struct Begun {
    audit: Arc<Shared>,
    /// `None` for one that goes on without a record.
    seq: Option<u64>,
    open: Open,
    began: Instant,
}

impl Audit {
    /// Takes up the audit in `dir`, which is made if need be, for its owner's eyes only. Reads the newest file once.
    ///
    /// # Errors
    /// What the file system says.
    pub fn open(dir: &Path, settings: impl Into<Live<config::Audit>>) -> io::Result<Self> {
        let settings = settings.into();
        if !settings.now().enabled {
            return Ok(Self::disabled());
        }
        Self::with(dir, settings, |_| {})
    }

    fn with(dir: &Path, settings: Live<config::Audit>, prepare: impl FnOnce(&mut Files)) -> io::Result<Self> {
        let mut found = Files::open(dir)?;
        prepare(&mut found.files);
        let shared = Arc::new(Shared::new(settings));
        shared.counts.bytes.store(found.files.bytes(), Relaxed);
        let threads = writer::spawn(Writer::new(shared.clone(), found))?;
        shared.threads.lock().unwrap_or_else(PoisonError::into_inner).extend(threads);
        Ok(Self(shared))
    }

    /// One that records nothing.
    pub fn disabled() -> Self {
        Self(Arc::new(Shared::new(config::Audit { enabled: false, ..config::Audit::default() }.into())))
    }

    /// Whether contents are recorded; who has some to tell need not copy them otherwise.
    pub fn keeps_contents(&self) -> bool {
        let settings = self.0.settings.now();
        settings.enabled && settings.contents
    }

    /// Records that something begins, and returns once that is written; it outlives the process then, and a second
    /// later the machine. Dropping the future before that leaves a beginning at most, ended as `cancelled`.
    ///
    /// # Errors
    /// [`AuditError::Unavailable`] when it cannot be recorded, with [`WhenFull::Refuse`] only and never for what
    /// is done always ([`Act::always`]).
    pub async fn begin(&self, act: Act) -> Result<Entry, AuditError> {
        let shared = &self.0;
        let settings = shared.settings.now();
        if !settings.enabled {
            return Ok(Entry(None));
        }
        let (began, goes_on) = (Instant::now(), shared.goes_on(&act));
        let wait = if act.is_always() { WRITE_WAIT_ALWAYS } else { WRITE_WAIT };
        let open = act.open();
        let written = async {
            let place = shared.room.clone().acquire_owned().await.ok()?;
            let contents_max = settings.contents.then_some(settings.content_bytes_max);
            let act = Box::new(act.bounded(settings.detail_bytes_max, contents_max));
            let (written, answer) = oneshot::channel();
            let item = Item::Begin { act, at: SystemTime::now(), began, written, _place: place };
            if !shared.push(item) {
                return None;
            }
            answer.await.ok()
        };
        match tokio::time::timeout(wait, written).await {
            Ok(Some(written)) => written,
            _ if goes_on => {
                shared.miss();
                Ok(Entry(Some(Begun { audit: shared.clone(), seq: None, open, began })))
            }
            _ => {
                shared.counts.refused.fetch_add(1, Relaxed);
                Err(AuditError::Unavailable)
            }
        }
    }

    /// Whether calls are refused at the moment, since the disk takes no records.
    pub fn refuses(&self) -> bool {
        self.0.settings.now().when_full == WhenFull::Refuse && self.counts().failing
    }

    /// The counts now.
    pub fn counts(&self) -> AuditCounts {
        let counts = &self.0.counts;
        AuditCounts {
            records: counts.records.load(Relaxed),
            missing: counts.missing.load(Relaxed),
            refused: counts.refused.load(Relaxed),
            bytes: counts.bytes.load(Relaxed),
            waiting: self.0.queue().items.len() + counts.kept.load(Relaxed),
            failing: counts.failing.load(Relaxed),
        }
    }

    /// Writes and syncs what was recorded, and ends the threads. Blocks as long as the disk takes. What begins later
    /// is not recorded.
    pub fn close(&self) {
        self.0.queue().closing = true;
        self.0.wake.notify_all();
        let threads = std::mem::take(&mut *self.0.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            // One that panicked has said so.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn new(settings: Live<config::Audit>) -> Self {
        Self {
            room: Arc::new(Semaphore::new(settings.now().queue_max)),
            settings,
            queue: Mutex::default(),
            wake: Condvar::new(),
            threads: Mutex::default(),
            counts: Counts::default(),
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands it to the writer; `false` when that has ended.
    fn push(&self, item: Item) -> bool {
        let mut queue = self.queue();
        if queue.closing {
            return false;
        }
        queue.items.push(item);
        drop(queue);
        self.wake.notify_all();
        true
    }

    fn goes_on(&self, act: &Act) -> bool {
        act.is_always() || self.settings.now().when_full == WhenFull::GoOn
    }

    /// Counts a record that is given up, to be told with the next one that is written.
    fn miss(&self) {
        self.queue().missing += 1;
        self.counts.missing.fetch_add(1, Relaxed);
    }
}

impl Entry {
    /// Records how it ended. Does not wait: the record follows those before it.
    pub fn end(mut self, outcome: Outcome) {
        self.close(outcome);
    }

    fn close(&mut self, outcome: Outcome) {
        let Some(Begun { audit, seq, open, began }) = self.0.take() else { return };
        match seq {
            Some(of) => {
                let duration = Some(began.elapsed());
                audit.push(Item::End { of, open, outcome, at: SystemTime::now(), duration });
            }
            None => audit.miss(),
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.close(Outcome::new("cancelled"));
    }
}
