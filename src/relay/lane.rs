//! One stream's place among the others of its link: whether its reader is behind, what is under way on it, and whether
//! the link may be read more slowly for its sake.
//!
//! Shared by the link's task and whoever holds the stream. It queues frames for the executor, in turn with all others,
//! and never looks into one.
//!
//! ```text
//! reader behind by all that is put aside ─┬─ another stream would be held up ─► it is reset, and nobody else
//!                                         └─ nobody would ─► it takes no frames, its inbox fills, the link waits
//! link waits ─┬─ the reader has taken something ─► on with it
//!             └─ a stream that is not behind sends, hears, or expects something ─► the one that is behind is reset
//! ```

use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Notify;

use super::link::{LinkHandle, RouteId};
use super::stream::StreamEnd;
use crate::protocol::frame::StreamId;

/// How long ago the last frame of a stream is with traffic. A request without an answer for so long was a notification;
/// what the gateway itself has asked or follows is counted apart, and has no such end.
const TRAFFIC_MS: u64 = Duration::from_secs(30).as_millis() as u64;

/// What the streams of a link and its task know of each other.
#[derive(Debug, Default)]
pub(super) struct Waits {
    /// Streams that the link is read more slowly for.
    waiting: AtomicUsize,
    /// What can wait for no reader.
    pressing: AtomicUsize,
    /// Somebody may be held up, or a stream has ended.
    changed: Notify,
    /// The link is not being read.
    paused: AtomicBool,
    /// It was not for a while, and what its executor had to say in that time may not have been read yet.
    crowded: AtomicBool,
    /// Frames that were read for streams that are no more.
    stale: AtomicU64,
}

impl Waits {
    /// Has those look who make the link wait.
    pub fn look(&self) {
        // Whoever begins to wait is counted before it looks at the others, and these call here after what it looks at.
        if self.waiting.load(SeqCst) > 0 {
            self.changed.notify_waiters();
        }
    }

    /// Lets nobody make the link wait while this is held.
    pub fn press(&self) -> Pressing<'_> {
        self.pressing.fetch_add(1, SeqCst);
        self.look();
        Pressing(self)
    }

    /// The link is not read while this is held.
    pub fn pause(&self) -> Paused<'_> {
        self.paused.store(true, Relaxed);
        self.crowded.store(true, Relaxed);
        Paused(self)
    }

    /// Counts a frame for a stream that is no more.
    pub fn dropped(&self) {
        self.stale.fetch_add(1, Relaxed);
    }

    /// Frames for streams that are no more, until now.
    pub fn stale(&self) -> u64 {
        self.stale.load(Relaxed)
    }

    /// Whether frames may be under way that the executor has held back.
    pub fn is_crowded(&self) -> bool {
        self.crowded.load(Relaxed)
    }

    /// All that was held back is read.
    pub fn cleared(&self) {
        self.crowded.store(false, Relaxed);
    }

    /// Whether the link is not being read.
    pub fn is_paused(&self) -> bool {
        self.paused.load(Relaxed)
    }
}

/// Something that can wait for no reader.
pub(super) struct Pressing<'a>(&'a Waits);

impl Drop for Pressing<'_> {
    fn drop(&mut self) {
        self.0.pressing.fetch_sub(1, SeqCst);
    }
}

/// A link that is not being read.
pub(super) struct Paused<'a>(&'a Waits);

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        self.0.paused.store(false, Relaxed);
    }
}

/// How one stream stands. Times are the link's, as its `now_ms` gives them: never 0.
#[derive(Debug, Default)]
pub(super) struct Standing {
    /// Since when its reader is behind; 0 while it is not.
    behind_since: AtomicU64,
    /// When the last frame passed, times two, and one more if that was towards the executor.
    last: AtomicU64,
    /// Answers and events that its holder is sure to get.
    expected: AtomicUsize,
    /// The link is read more slowly for it.
    waits: AtomicBool,
    /// Set when the link takes the route away, and has told the executor.
    pub taken: OnceLock<StreamEnd>,
}

impl Standing {
    pub fn sent(&self, now_ms: u64) {
        self.last.store(now_ms << 1 | 1, SeqCst);
    }

    pub fn heard(&self, now_ms: u64) {
        self.last.store(now_ms << 1, Relaxed);
    }

    pub fn is_behind(&self) -> bool {
        self.behind_since.load(SeqCst) > 0
    }

    pub fn waits(&self) -> bool {
        self.waits.load(Relaxed)
    }

    /// Whether it would be held up if the link waited for the other.
    pub fn is_held_up_by(&self, other: &Self, now_ms: u64) -> bool {
        let since = other.behind_since.load(SeqCst);
        if self.is_behind() || since == 0 {
            return false;
        }
        let last = self.last.load(SeqCst);
        let (at, asked) = (last >> 1, last & 1 == 1);
        let lately = at > 0 && now_ms.saturating_sub(at) < TRAFFIC_MS;
        // What was heard before the other fell behind was the end of what was under way, for all that can be seen.
        self.expected.load(SeqCst) > 0 || (lately && (asked || at >= since))
    }
}

/// Why the link does not wait for a stream any longer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    /// Somebody else would be held up.
    HoldsUp,
    /// The stream has ended meanwhile.
    Ended(StreamEnd),
}

/// A stream's place on its link; cheap to clone.
#[derive(Debug, Clone)]
pub struct Lane {
    link: LinkHandle,
    stream: StreamId,
    route: RouteId,
    standing: Arc<Standing>,
}

impl Lane {
    pub(super) fn new(link: LinkHandle, stream: StreamId, route: RouteId, standing: Arc<Standing>) -> Self {
        Self { link, stream, route, standing }
    }

    /// The link.
    pub fn link(&self) -> &LinkHandle {
        &self.link
    }

    /// The stream's id on the wire.
    pub fn stream(&self) -> &StreamId {
        &self.stream
    }

    pub(super) fn route(&self) -> RouteId {
        self.route
    }

    pub(super) fn standing(&self) -> &Standing {
        &self.standing
    }

    /// Queues one encoded frame; waits while the link's outbox is full. Dropping the future queues nothing.
    ///
    /// # Errors
    /// [`StreamEnd::Disconnected`] when the link is gone.
    pub(super) async fn send(&self, frame: Bytes) -> Result<(), StreamEnd> {
        // Before the frame: the answer may be there before this goes on.
        self.standing.sent(self.link.now_ms());
        if !self.standing.is_behind() {
            self.link.waits().look();
        }
        self.link.send(frame).await
    }

    /// Counts something that the executor is sure to say, until the value is dropped.
    pub(super) fn expect(&self) -> Expected {
        self.standing.expected.fetch_add(1, SeqCst);
        self.link.waits().look();
        Expected(self.standing.clone())
    }

    /// Its reader is behind: more waits for it than memory holds.
    pub(super) fn fell_behind(&self) {
        if !self.standing.is_behind() {
            self.standing.behind_since.store(self.link.now_ms(), SeqCst);
        }
    }

    /// Its reader has taken all there was.
    pub(super) fn caught_up(&self) {
        if self.standing.is_behind() {
            self.standing.behind_since.store(0, SeqCst);
            self.link.waits().look();
        }
    }

    /// Whether its reader is behind.
    pub(super) fn is_behind(&self) -> bool {
        self.standing.is_behind()
    }

    /// Lets the link be read more slowly as long as this is awaited; returns when that may not be.
    pub(super) async fn wait(&self) -> Refusal {
        let waits = self.link.waits();
        let _waiting = Waiting::begin(waits, &self.standing);
        loop {
            // Before it looks: what changes from now on is not missed.
            let changed = waits.changed.notified();
            let refusal = match waits.pressing.load(SeqCst) {
                0 => self.link.refusal(&self.stream, self.route, &self.standing),
                _ => Some(Refusal::HoldsUp),
            };
            if let Some(refusal) = refusal {
                return refusal;
            }
            changed.await;
        }
    }
}

/// Something that a stream's executor is sure to say.
#[derive(Debug)]
pub(super) struct Expected(Arc<Standing>);

impl Drop for Expected {
    fn drop(&mut self) {
        self.0.expected.fetch_sub(1, SeqCst);
    }
}

/// A stream that the link is read more slowly for.
struct Waiting<'a>(&'a Waits, &'a Standing);

impl<'a> Waiting<'a> {
    fn begin(waits: &'a Waits, standing: &'a Standing) -> Self {
        waits.waiting.fetch_add(1, SeqCst);
        standing.waits.store(true, Relaxed);
        Self(waits, standing)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.1.waits.store(false, Relaxed);
        self.0.waiting.fetch_sub(1, SeqCst);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use futures_util::FutureExt;
    use futures_util::future::BoxFuture;
    use tokio::sync::mpsc;
    use tokio::time::advance;

    use super::super::link::tests::{link_with, say};
    use super::super::stream::StreamHandle;
    use super::*;
    use crate::config;

    const A_MOMENT: Duration = Duration::from_millis(10);

    /// A link on which one stream is behind, and another has got its last answer before.
    struct Scene {
        link: LinkHandle,
        _outbox: mpsc::Receiver<Bytes>,
        slow: StreamHandle,
        other: StreamHandle,
    }

    impl Scene {
        async fn new() -> Self {
            let (link, _outbox) = link_with(config::Link::default());
            let workspace = "w".parse().unwrap();
            let (slow, other) = (link.open_stream(&workspace).unwrap(), link.open_stream(&workspace).unwrap());
            let scene = Self { link, _outbox, slow, other };
            advance(A_MOMENT).await;
            scene.ask().await;
            scene.answer(&scene.other).await;
            advance(A_MOMENT).await;
            scene.answer(&scene.slow).await;
            scene.slow.lane().fell_behind();
            scene
        }

        async fn ask(&self) {
            self.other.lane().send(Bytes::new()).await.unwrap();
        }

        async fn answer(&self, stream: &StreamHandle) {
            say(&self.link, stream.id()).await;
        }

        /// The link waits for the slow one until this is ready.
        fn wait(&self) -> BoxFuture<'static, Refusal> {
            let lane = self.slow.lane().clone();
            let mut wait = async move { lane.wait().await }.boxed();
            assert!((&mut wait).now_or_never().is_none(), "it holds up nobody");
            wait
        }

        fn refusal(&self) -> Option<Refusal> {
            self.slow.lane().wait().now_or_never()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_link_waits_for_one_reader_until_another_stream_has_something_to_do() {
        let scene = Scene::new().await;
        let wait = scene.wait();
        scene.ask().await;
        assert_eq!(wait.now_or_never(), Some(Refusal::HoldsUp), "a request");
        assert_eq!(scene.refusal(), Some(Refusal::HoldsUp), "and as long as its answer is due");
        advance(Duration::from_millis(TRAFFIC_MS)).await;
        let wait = scene.wait();
        scene.answer(&scene.other).await;
        assert_eq!(wait.now_or_never(), Some(Refusal::HoldsUp), "a word of its executor");
        assert_eq!(scene.refusal(), Some(Refusal::HoldsUp), "others may follow");
        advance(Duration::from_millis(TRAFFIC_MS)).await;
        let wait = scene.wait();
        let expected = scene.other.lane().expect();
        assert_eq!(wait.now_or_never(), Some(Refusal::HoldsUp), "something that the gateway follows");
        advance(Duration::from_millis(2 * TRAFFIC_MS)).await;
        assert_eq!(scene.refusal(), Some(Refusal::HoldsUp), "for as long as it does");
        drop(expected);
        drop(scene.wait());
    }

    #[tokio::test(start_paused = true)]
    async fn streams_that_are_all_behind_wait_for_each_other_until_one_has_caught_up() {
        let scene = Scene::new().await;
        scene.ask().await;
        scene.other.lane().fell_behind();
        let mut wait = scene.wait();
        scene.ask().await;
        scene.answer(&scene.other).await;
        assert!((&mut wait).now_or_never().is_none());
        assert!(scene.other.lane().wait().now_or_never().is_none(), "each of them");
        scene.other.lane().caught_up();
        assert_eq!(wait.now_or_never(), Some(Refusal::HoldsUp));
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_ends_with_the_right_and_the_link_and_goes_on_where_nothing_more_comes() {
        let scene = Scene::new().await;
        let mut wait = scene.wait();
        scene.link.close(super::super::link::CloseReason::Draining);
        assert!((&mut wait).now_or_never().is_none(), "what the link has accepted comes first");
        scene.link.end_workspace(&"w".parse().unwrap());
        assert_eq!(wait.now_or_never(), Some(Refusal::Ended(StreamEnd::Withdrawn)));

        let scene = Scene::new().await;
        let mut wait = scene.wait();
        scene.link.release(scene.slow.id(), scene.slow.lane().route());
        scene.ask().await;
        assert!((&mut wait).now_or_never().is_none(), "its executor has ended it, and it is in nobody's way");
        scene.link.shut();
        assert_eq!(wait.now_or_never(), Some(Refusal::Ended(StreamEnd::Disconnected)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_link_whose_place_is_asked_for_waits_for_nobody() {
        let scene = Scene::new().await;
        let wait = scene.wait();
        let answers = tokio::spawn({
            let link = scene.link.clone();
            async move { link.answers(Duration::from_secs(3)).await }
        });
        assert_eq!(wait.await, Refusal::HoldsUp);
        assert!(!answers.await.unwrap(), "nobody runs the link");
        drop(scene.wait());
    }

    #[tokio::test(start_paused = true)]
    async fn an_executor_that_is_not_listened_to_is_not_silent() {
        let scene = Scene::new().await;
        let paused = scene.link.waits().pause();
        advance(Duration::from_secs(3600)).await;
        assert_eq!(scene.link.silence(), Duration::ZERO);
        drop(paused);
        assert!(scene.link.silence() >= Duration::from_secs(3600));
        scene.answer(&scene.slow).await;
        assert_eq!(scene.link.silence(), Duration::ZERO);
    }
}
