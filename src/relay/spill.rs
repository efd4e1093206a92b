//! Frames for a harness that reads more slowly than its executor speaks: in memory first, then in a file.
//!
//! Owned by the task of one harness socket. It never reorders or drops a frame and never makes the link wait for the
//! harness: what fits in neither place is refused, and the owner resets that one stream.
//!
//! ```text
//! push ─► tail ─► batch being written ─► file ─► head ─► pop        memory: head, batch and tail
//!           └──────────── nothing on disk ────────┘
//! ```

use std::collections::VecDeque;
use std::fs::File;
use std::future::{Future, poll_fn};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, ready};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use rustix::fs::{Mode, OFlags};
use tokio::sync::Notify;

use crate::config;
use crate::ops::metrics::Metrics;

/// What a frame costs beside its bytes, so that small ones are bounded too: its place in a queue and the head of its
/// buffer, or its length in the file, which is less.
const FRAME_COST: usize = 64;

/// Frames below this are copied when they wait.
const COPIED_BYTES_MAX: usize = 4096;

/// The length before each frame of the file.
const LENGTH_BYTES: usize = 4;

/// The memory in pieces of what one write or read moves. The tail takes one, the batch being written another, and a
/// third its copy as it goes to the file; the head has the others.
const PIECES: usize = 8;

/// Why a frame is not taken. What was taken before can still be had, up to a loss.
#[derive(Debug, Clone, thiserror::Error)]
pub enum SpillError {
    /// Memory and file are full: the harness is too far behind.
    #[error("the reader is too far behind")]
    Full,
    /// The file failed.
    #[error("the spill file failed")]
    Disk(#[source] Arc<io::Error>),
}

/// A first-in-first-out queue of frames, bounded in bytes in memory and on disk.
///
/// One task pushes and pops, in two futures that it polls in this order: then what is pushed is popped in the same poll.
/// A push does not wake the pop, since a task that wakes itself is handed to another thread, which costs a small message
/// more than all the rest of its way. Needs a runtime. Dropping it forgets its frames and gives the disk space back.
pub struct Spill(Arc<Shared>);

struct Shared {
    directory: PathBuf,
    head_bytes_max: usize,
    batch_bytes_max: usize,
    file_bytes_max: u64,
    metrics: Arc<Metrics>,
    state: Mutex<State>,
    /// The disk is done: there may be a frame to pop.
    read: Notify,
    /// Likewise there may be room in the tail.
    room: Notify,
}

#[derive(Default)]
struct State {
    head: Queue,
    /// How many frames lie in the file, and what they cost.
    stored: usize,
    stored_cost: u64,
    batch: Queue,
    tail: Queue,
    /// With the job while there is one.
    file: Option<Ring>,
    /// One job at a time has the file.
    busy: bool,
    /// Nothing more is written.
    unwritable: Option<SpillError>,
    /// What is in the file is lost.
    unreadable: Option<SpillError>,
}

#[derive(Default)]
struct Queue {
    frames: VecDeque<Bytes>,
    cost: usize,
}

impl Queue {
    fn push(&mut self, frame: Bytes) {
        self.cost += cost(&frame);
        self.frames.push_back(frame);
    }

    fn pop(&mut self) -> Option<Bytes> {
        let frame = self.frames.pop_front()?;
        self.cost -= cost(&frame);
        Some(frame)
    }

    fn append(&mut self, mut other: Self) {
        self.cost += other.cost;
        self.frames.append(&mut other.frames);
    }

    /// One frame always has room: it has to pass, however large it is.
    fn takes(&self, frame: &Bytes, cost_max: usize) -> bool {
        self.frames.is_empty() || self.cost + cost(frame) <= cost_max
    }
}

fn cost(frame: &Bytes) -> usize {
    frame.len() + FRAME_COST
}

/// A frame that has to wait, in bytes of its own: a small one is a piece of the buffer that the link reads into, and
/// would keep all of it.
fn apart(frame: &Bytes) -> Bytes {
    if frame.len() < COPIED_BYTES_MAX { Bytes::copy_from_slice(frame) } else { frame.clone() }
}

impl Spill {
    /// An empty queue whose file, once it is needed, is made in `directory` without a name. The directory must exist
    /// by then.
    pub fn new(directory: &Path, settings: &config::Link, metrics: Arc<Metrics>) -> Self {
        let batch_bytes_max = settings.spill_memory_bytes_max / PIECES;
        Self(Arc::new(Shared {
            directory: directory.to_owned(),
            head_bytes_max: settings.spill_memory_bytes_max - 3 * batch_bytes_max,
            batch_bytes_max,
            file_bytes_max: settings.spill_bytes_max,
            metrics,
            state: Mutex::default(),
            read: Notify::new(),
            room: Notify::new(),
        }))
    }

    /// Takes a frame as the newest; waits while the disk is busy with those before it. Dropping the future takes
    /// nothing.
    ///
    /// # Errors
    /// [`SpillError::Full`] once the bounds are reached, [`SpillError::Disk`] once the file could not be written. The
    /// frame is gone then, so the stream has a hole and must be reset.
    pub async fn push(&self, frame: Bytes) -> Result<(), SpillError> {
        while !self.0.offer(&frame)? {
            self.0.room.notified().await;
        }
        Ok(())
    }

    /// The oldest frame; waits until there is one, and looks for it whenever it is polled. Dropping the future leaves it
    /// where it is.
    ///
    /// # Errors
    /// [`SpillError::Disk`] once the file could not be read: the next frame in turn is lost.
    pub async fn pop(&self) -> Result<Bytes, SpillError> {
        let mut read = pin!(self.0.read.notified());
        poll_fn(|context| {
            loop {
                if let Some(popped) = self.try_pop().transpose() {
                    return Poll::Ready(popped);
                }
                ready!(read.as_mut().poll(context));
                read.set(self.0.read.notified());
            }
        })
        .await
    }

    /// The oldest frame, if it is in memory; otherwise it is on its way from the file, or there is none.
    ///
    /// # Errors
    /// As [`Self::pop`].
    pub fn try_pop(&self) -> Result<Option<Bytes>, SpillError> {
        let mut state = self.0.state();
        state.fill_head();
        let frame = state.head.pop();
        self.0.read_on(&mut state);
        match (&frame, &state.unreadable) {
            (None, Some(lost)) => Err(lost.clone()),
            _ => Ok(frame),
        }
    }

    /// Frames taken and not yet popped.
    pub fn len(&self) -> usize {
        let state = self.0.state();
        state.head.frames.len() + state.stored + state.batch.frames.len() + state.tail.frames.len()
    }

    /// Whether every frame was popped.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What these frames cost, in bytes, as the bounds count them: each its length and 64 more.
    pub fn bytes(&self) -> u64 {
        let state = self.0.state();
        state.head.cost as u64 + state.behind()
    }
}

impl State {
    /// What stands behind the head: on disk, or on its way there.
    fn behind(&self) -> u64 {
        self.stored_cost + (self.batch.cost + self.tail.cost) as u64
    }

    /// The tail follows at once where nothing on disk lies between.
    fn fill_head(&mut self) {
        if self.head.frames.is_empty() && self.stored == 0 && self.batch.frames.is_empty() {
            self.head = std::mem::take(&mut self.tail);
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Queues and counts agree between any two statements that can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the frame was taken; otherwise the disk has to catch up first.
    fn offer(self: &Arc<Self>, frame: &Bytes) -> Result<bool, SpillError> {
        let mut state = self.state();
        if let Some(failed) = state.unwritable.as_ref().or(state.unreadable.as_ref()) {
            return Err(failed.clone());
        }
        state.fill_head();
        if state.behind() == 0 && state.head.takes(frame, self.head_bytes_max) {
            // The first is likely about to be popped.
            let frame = if state.head.frames.is_empty() { frame.clone() } else { apart(frame) };
            state.head.push(frame);
        } else if state.behind() + cost(frame) as u64 > self.file_bytes_max {
            self.metrics.spill_overruns.inc();
            return Err(SpillError::Full);
        } else {
            if !state.tail.takes(frame, self.batch_bytes_max) {
                if state.busy {
                    return Ok(false);
                }
                self.write_tail(&mut state);
            }
            state.tail.push(apart(frame));
        }
        Ok(true)
    }

    /// Sends the tail to the file. It stays in the batch until it is there: a disk that fails costs no frame.
    fn write_tail(self: &Arc<Self>, state: &mut State) {
        state.batch = std::mem::take(&mut state.tail);
        let frames: Vec<Bytes> = state.batch.frames.iter().cloned().collect();
        let file = state.file.take();
        self.begin(state, move |shared| {
            let (file, written) = match file.map_or_else(|| Ring::create(&shared.directory, shared.file_bytes_max), Ok)
            {
                Ok(mut file) => {
                    let written = file.write(&frames);
                    (Some(file), written)
                }
                Err(error) => (None, Err(error)),
            };
            let mut state = shared.state();
            state.file = file;
            let batch = std::mem::take(&mut state.batch);
            match written {
                Ok(bytes) => {
                    shared.metrics.spilled.add(bytes);
                    state.stored += batch.frames.len();
                    state.stored_cost += batch.cost as u64;
                }
                Err(error) => {
                    tracing::error!(%error, "a spill file could not be written");
                    state.unwritable = Some(SpillError::Disk(Arc::new(error)));
                    let newer = std::mem::replace(&mut state.tail, batch);
                    state.tail.append(newer);
                }
            }
        });
    }

    /// Fetches the next frames from the file before the head is empty.
    fn read_on(self: &Arc<Self>, state: &mut State) {
        if state.busy || state.unreadable.is_some() || state.head.cost > self.head_bytes_max / 2 {
            return;
        }
        let stored = state.stored;
        let Some(mut file) = state.file.take_if(|_| stored > 0) else { return };
        let bytes_max = self.batch_bytes_max;
        self.begin(state, move |shared| {
            let read = file.read(bytes_max, stored);
            // A file that is drained goes, and with it its space; here, since that is work for the disk as well.
            let file = matches!(&read, Ok(frames) if frames.len() < stored).then_some(file);
            let mut state = shared.state();
            state.file = file;
            match read {
                Ok(frames) => {
                    for frame in frames {
                        state.stored -= 1;
                        state.stored_cost -= cost(&frame) as u64;
                        state.head.push(frame);
                    }
                }
                Err(error) => {
                    tracing::error!(%error, "a spill file could not be read");
                    state.unreadable = Some(SpillError::Disk(Arc::new(error)));
                }
            }
        });
    }

    /// Does file work beside the runtime. It goes on when nobody waits for it.
    fn begin(self: &Arc<Self>, state: &mut State, job: impl FnOnce(&Self) + Send + 'static) {
        state.busy = true;
        let shared = self.clone();
        tokio::task::spawn_blocking(move || {
            job(&shared);
            shared.state().busy = false;
            shared.read.notify_one();
            shared.room.notify_one();
        });
    }
}

/// The file: a ring of frames, each after its length, that may wrap around its end anywhere.
struct Ring {
    file: File,
    capacity: u64,
    /// Bytes read and written since it was made.
    read: u64,
    written: u64,
}

impl Ring {
    /// A file without a name, so that nothing is left of it whatever ends the process.
    fn create(directory: &Path, capacity: u64) -> io::Result<Self> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let file = match rustix::fs::open(directory, flags, Mode::RUSR | Mode::WUSR) {
            Ok(file) => File::from(file),
            // Not every file system has them; there it has a name for a moment.
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR) => {
                let path = directory.join(format!("spill-{}", uuid::Uuid::new_v4().simple()));
                let file = File::options().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
                std::fs::remove_file(&path)?;
                file
            }
            Err(error) => return Err(error.into()),
        };
        Ok(Self { file, capacity, read: 0, written: 0 })
    }

    /// Appends frames in one piece; says how many bytes that were. They fit: the caller counts them at a higher cost.
    fn write(&mut self, frames: &[Bytes]) -> io::Result<u64> {
        let length = frames.iter().map(|frame| LENGTH_BYTES + frame.len()).sum();
        let mut batch = BytesMut::with_capacity(length);
        for frame in frames {
            batch.put_u32(u32::try_from(frame.len()).map_err(io::Error::other)?);
            batch.put_slice(frame);
        }
        let (at, first) = self.place(self.written, length);
        self.file.write_all_at(&batch[..first], at)?;
        self.file.write_all_at(&batch[first..], 0)?;
        self.written += length as u64;
        Ok(length as u64)
    }

    /// The oldest of `stored` frames that fit in so many bytes, at least one.
    fn read(&mut self, bytes_max: usize, stored: usize) -> io::Result<Vec<Bytes>> {
        let mut bytes = self.bytes(bytes_max.max(LENGTH_BYTES))?;
        let first = LENGTH_BYTES + bytes.clone().try_get_u32().map_err(io::Error::other)? as usize;
        if first > bytes.len() {
            bytes = self.bytes(first)?;
        }
        let mut frames = Vec::new();
        while frames.len() < stored {
            let mut rest = bytes.clone();
            let Ok(length) = rest.try_get_u32() else { break };
            if rest.len() < length as usize {
                break;
            }
            frames.push(rest.split_to(length as usize));
            self.read += (LENGTH_BYTES + length as usize) as u64;
            bytes = rest;
        }
        if frames.is_empty() { Err(io::ErrorKind::InvalidData.into()) } else { Ok(frames) }
    }

    /// The next bytes to be read, at most so many.
    fn bytes(&self, bytes_max: usize) -> io::Result<Bytes> {
        let length = usize::try_from(self.written - self.read).map_or(bytes_max, |left| left.min(bytes_max));
        let mut bytes = BytesMut::zeroed(length);
        let (at, first) = self.place(self.read, length);
        self.file.read_exact_at(&mut bytes[..first], at)?;
        self.file.read_exact_at(&mut bytes[first..], 0)?;
        Ok(bytes.freeze())
    }

    /// Where in the file so many bytes begin, and how many of them come before its end.
    fn place(&self, position: u64, length: usize) -> (u64, usize) {
        let at = position % self.capacity;
        (at, usize::try_from(self.capacity - at).map_or(length, |room| room.min(length)))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use futures_util::FutureExt;
    use proptest::prelude::*;

    use super::*;
    use crate::store::scratch::ScratchDir;

    /// Frames of 960 bytes cost 1 KiB.
    const KIB: usize = 1024;

    struct Rig {
        spill: Spill,
        metrics: Arc<Metrics>,
        directory: ScratchDir,
    }

    fn rig(memory: usize, disk: usize) -> Rig {
        let directory = ScratchDir::new();
        std::fs::create_dir(directory.path()).unwrap();
        let settings =
            config::Link { spill_memory_bytes_max: memory, spill_bytes_max: disk as u64, ..config::Link::default() };
        let metrics = Arc::new(Metrics::default());
        Rig { spill: Spill::new(directory.path(), &settings, metrics.clone()), metrics, directory }
    }

    fn frame(nth: usize, length: usize) -> Bytes {
        (0..length).map(|at| (at * 31 + nth * 7) as u8).collect::<Vec<_>>().into()
    }

    #[tokio::test]
    async fn frames_are_taken_up_to_the_byte_and_come_back_in_order() {
        let Rig { spill, metrics, directory } = rig(64 * KIB, 100 * KIB);
        // Five of eight pieces of the memory, and all of the disk.
        for nth in 0..140 {
            spill.push(frame(nth, 960)).await.unwrap();
        }
        assert!(matches!(spill.push(frame(140, 0)).await, Err(SpillError::Full)));
        assert_eq!((spill.len(), spill.bytes(), metrics.spill_overruns.get()), (140, 140 * KIB as u64, 1));
        assert!(metrics.spilled.get() >= 80 * 964);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0, "the file has no name");
        for nth in 0..140 {
            assert_eq!(spill.pop().await.unwrap(), frame(nth, 960));
        }
        assert_eq!((spill.len(), spill.bytes()), (0, 0));
        assert!(spill.0.state().file.is_none(), "a drained file is dropped");
        spill.push(frame(141, 960)).await.unwrap();
        assert_eq!(spill.try_pop().unwrap(), Some(frame(141, 960)));
    }

    #[tokio::test]
    async fn little_touches_no_disk() {
        let Rig { spill, metrics, directory } = rig(64 * KIB, 100 * KIB);
        std::fs::remove_dir(directory.path()).unwrap();
        for nth in 0..1000 {
            spill.push(frame(nth, 960)).await.unwrap();
            spill.push(frame(nth, 10)).await.unwrap();
            assert_eq!(spill.try_pop().unwrap(), Some(frame(nth, 960)));
            assert_eq!(spill.pop().await.unwrap(), frame(nth, 10));
        }
        assert_eq!(metrics.spilled.get(), 0);
    }

    #[tokio::test]
    async fn a_reader_that_waits_has_it_in_the_same_poll_and_one_that_leaves_takes_nothing() {
        let Rig { spill, directory: _directory, .. } = rig(64 * KIB, 100 * KIB);
        let mut pop = pin!(spill.pop());
        assert!(futures_util::poll!(pop.as_mut()).is_pending());
        spill.push(frame(1, 10)).await.unwrap();
        assert!(spill.pop().now_or_never().is_some_and(|popped| popped.unwrap() == frame(1, 10)));
        let both = async { tokio::join!(biased; spill.push(frame(2, 10)), pop) };
        let (pushed, popped) = both.now_or_never().expect("one poll is enough");
        assert_eq!((pushed.is_ok(), popped.unwrap()), (true, frame(2, 10)));
    }

    #[tokio::test]
    async fn a_disk_that_fails_costs_no_frame_that_was_taken() {
        let Rig { spill, directory, .. } = rig(64 * KIB, 100 * KIB);
        std::fs::remove_dir(directory.path()).unwrap();
        let mut taken = 0;
        let failure = loop {
            match spill.push(frame(taken, 960)).await {
                Ok(()) => taken += 1,
                Err(failure) => break failure,
            }
        };
        assert!(matches!(failure, SpillError::Disk(_)), "{failure:?}");
        assert!(taken > 40);
        for nth in 0..taken {
            assert_eq!(spill.pop().await.unwrap(), frame(nth, 960));
        }
        assert!(spill.is_empty());
        assert!(spill.push(frame(taken, 960)).await.is_err());
    }

    #[tokio::test]
    async fn a_frame_larger_than_the_memory_passes() {
        let Rig { spill, directory: _directory, .. } = rig(64 * KIB, 1024 * KIB);
        for nth in 0..3 {
            spill.push(frame(nth, 300 * KIB)).await.unwrap();
        }
        for nth in 0..3 {
            assert_eq!(spill.pop().await.unwrap(), frame(nth, 300 * KIB));
        }
    }

    #[derive(Debug, Clone)]
    enum Step {
        Push(usize),
        /// A push whose caller leaves at the first wait.
        Offer(usize),
        Pop,
        /// A pop whose caller leaves at the first wait.
        Glance,
        TryPop,
    }

    fn step() -> impl Strategy<Value = Step> {
        let length = || prop_oneof![3 => 0..200usize, 3 => 500..1500usize, 1 => 3000..6000usize];
        prop_oneof![
            6 => length().prop_map(Step::Push),
            2 => length().prop_map(Step::Offer),
            4 => Just(Step::Pop),
            1 => Just(Step::Glance),
            1 => Just(Step::TryPop),
        ]
    }

    const MEMORY: usize = 8 * KIB;
    const DISK: usize = 20 * KIB;

    async fn run(steps: Vec<Step>) {
        let Rig { spill, directory: _directory, .. } = rig(MEMORY, DISK);
        let mut model = VecDeque::new();
        let mut longest = 0;
        for (nth, step) in steps.into_iter().enumerate() {
            let before = spill.bytes();
            match step {
                Step::Push(length) | Step::Offer(length) => {
                    let frame = frame(nth, length);
                    longest = longest.max(cost(&frame));
                    let result = match step {
                        Step::Push(_) => Some(spill.push(frame.clone()).await),
                        _ => spill.push(frame.clone()).now_or_never(),
                    };
                    let after = before + cost(&frame) as u64;
                    match result {
                        Some(Ok(())) => {
                            assert!(after <= (MEMORY + DISK) as u64 || model.is_empty());
                            model.push_back(frame);
                        }
                        Some(Err(refused)) => {
                            assert!(matches!(refused, SpillError::Full), "{refused:?}");
                            assert!(after > DISK as u64, "refused with {before} bytes of {DISK} on disk alone");
                        }
                        None => {}
                    }
                }
                Step::Pop if model.is_empty() => assert!(spill.pop().now_or_never().is_none()),
                Step::Pop => assert_eq!(Some(spill.pop().await.unwrap()), model.pop_front()),
                Step::Glance | Step::TryPop => {
                    let popped = match step {
                        Step::TryPop => spill.try_pop().unwrap(),
                        _ => spill.pop().now_or_never().transpose().unwrap(),
                    };
                    if popped.is_some() {
                        assert_eq!(popped, model.pop_front());
                    }
                }
            }
            assert_eq!(spill.len(), model.len());
            let state = spill.0.state();
            // A frame longer than a piece of the memory is read or written alone.
            let head_max = spill.0.head_bytes_max;
            assert!(state.head.cost <= head_max.max(head_max / 2 + longest));
            assert!(state.tail.cost <= spill.0.batch_bytes_max.max(longest));
            assert!(state.behind() <= DISK as u64);
        }
        for frame in model {
            assert_eq!(spill.pop().await.unwrap(), frame);
        }
        assert!(spill.is_empty());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(96))]

        #[test]
        fn whatever_is_pushed_and_popped_comes_in_order_and_within_the_bounds(
            steps in proptest::collection::vec(step(), 1..250)
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(run(steps));
        }
    }
}
