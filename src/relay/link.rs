//! One executor's socket and the streams on it.
//!
//! [`run`] is the only task that reads, writes or closes the socket. Everybody else holds a [`LinkHandle`]: an id, a
//! bounded outbox and the table of routes. When `run` returns, the routes drop and every stream on the link ends with
//! [`StreamEnd::Disconnected`].

use std::collections::{HashMap, HashSet};
use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Sink, SinkExt, Stream, StreamExt};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Notify, Semaphore, mpsc, watch};
use tokio::task::yield_now;
use tokio::time::error::Elapsed;
use tokio::time::{Instant, Sleep, sleep, sleep_until, timeout};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::error::ProtocolError;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::protocol::frame::Frame as SocketFrame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::{CloseCode, Data as OpData, OpCode};
use tokio_tungstenite::tungstenite::{Error as SocketError, Message, Utf8Bytes};
use tokio_util::sync::CancellationToken;

use super::lane::{Lane, Refusal, Standing, Waits};
use super::shared::Shared as Session;
use super::stream::{Delivery, StreamEnd, StreamHandle};
use crate::config;
use crate::ops::metrics::Metrics;
use crate::protocol::frame::{Body, Frame, StreamId};
use crate::protocol::ids::{ExecutorId, WorkspaceId};
use crate::store::Registration;

/// How long a peer may take to answer our close frame: it only avoids a reset of the connection.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// Frames written before the socket is flushed once.
const WRITE_BATCH: usize = 32;

/// Messages read before there is a turn of writing in between.
const READ_BATCH: usize = 32;

/// Bytes written to a shared socket before it is flushed once; one write has `link.write_timeout_secs`.
const WRITE_BYTES: usize = 8 << 20;

/// Largest frame that executors take on a shared socket, in bytes (codex-exec-server.md §3.1).
const JSON_FRAME_BYTES_MAX: usize = 16 << 20;

/// Failed encrypted handshakes of one workspace after which it may begin no more on this link, and for how long. The
/// executor's own bound is 8 of all workspaces together.
const FAILED_HANDSHAKES_MAX: u32 = 2;
const FAILED_HANDSHAKES_FOR: Duration = Duration::from_secs(60);

/// A process on a shared socket that has run so long lasts, and how many of them are told: the next gateway process ends
/// them if nobody takes them up.
const LASTING_AFTER: Duration = Duration::from_millis(250);
const LASTING_MAX: usize = 4096;

/// Tells one socket from another of the same executor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkId(u64);

/// Tells one use of a stream id from a later one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RouteId(u64);

/// How a link ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkEnd {
    /// The executor closed or dropped the socket.
    Peer,
    /// Nothing was heard for too long.
    Silent,
    /// The executor did not read.
    WriteTimeout,
    /// The socket failed or broke the WebSocket protocol.
    Failed,
    /// A process that does not read its stdin held up everybody on a shared socket.
    Stalled,
    /// We closed it.
    Closed(CloseReason),
}

/// Why we close a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CloseReason {
    /// The gateway stops; the executor comes back to the same URL.
    Draining,
    /// The same executor process has dialled again, or another took the place of one that was silent.
    Replaced,
    /// The executor was deleted.
    Deleted,
}

impl CloseReason {
    fn frame(self) -> CloseFrame {
        let (code, reason) = match self {
            // 1012 "service restart" (RFC 6455 registry): come back to the same place.
            Self::Draining => (CloseCode::Restart, "gateway restarts"),
            Self::Replaced => (CloseCode::Normal, "replaced by a newer connection"),
            Self::Deleted => (CloseCode::Policy, "executor deleted"),
        };
        CloseFrame { code, reason: reason.into() }
    }
}

/// Why no stream was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// The link ended meanwhile.
    #[error("the executor's link is gone")]
    Disconnected,
    /// The link or the workspace's share of it is full.
    #[error("too many streams on this executor")]
    TooManyStreams,
    /// The id is in use on this link.
    #[error("the stream id is taken")]
    Taken,
}

/// A cheap handle to one executor's socket.
#[derive(Debug, Clone)]
pub struct LinkHandle(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    id: LinkId,
    registration: Registration,
    settings: Arc<config::Link>,
    metrics: Arc<Metrics>,
    outbox: mpsc::Sender<Bytes>,
    routes: Mutex<Routes>,
    handshakes: Arc<Semaphore>,
    /// Encrypted handshakes of harnesses, by workspace. Bounded by the workspaces bound to the executor.
    harness_handshakes: Mutex<HashMap<WorkspaceId, HarnessHandshakes>>,
    opened: Instant,
    /// When the last byte of the executor came, as `now_ms` tells it.
    heard_ms: AtomicU64,
    waits: Waits,
    pongs: watch::Sender<u64>,
    ping: Notify,
    stop: CancellationToken,
    stop_reason: OnceLock<CloseReason>,
}

/// The encrypted handshakes of one workspace's harnesses.
#[derive(Debug)]
struct HarnessHandshakes {
    failed: u32,
    last_failure: Instant,
    turns: Arc<Semaphore>,
}

impl Default for HarnessHandshakes {
    fn default() -> Self {
        let turns = Arc::new(Semaphore::new(FAILED_HANDSHAKES_MAX as usize));
        Self { failed: 0, last_failure: Instant::now(), turns }
    }
}

#[derive(Debug, Default)]
struct Routes {
    streams: HashMap<StreamId, Route>,
    per_workspace: HashMap<WorkspaceId, usize>,
    next: u64,
    closed: bool,
}

#[derive(Debug)]
struct Route {
    id: RouteId,
    workspace: WorkspaceId,
    inbox: mpsc::Sender<Delivery>,
    standing: Arc<Standing>,
    by_holder: bool,
}

impl Routes {
    fn have_room(&self, workspace: &WorkspaceId, settings: &config::Link) -> bool {
        let of_workspace = self.per_workspace.get(workspace).copied().unwrap_or(0);
        self.streams.len() < settings.streams_max && of_workspace < settings.workspace_streams_max
    }

    /// Whether it was there.
    fn remove(&mut self, stream: &StreamId, id: RouteId) -> bool {
        if self.streams.get(stream).is_none_or(|route| route.id != id) {
            return false;
        }
        let Some(route) = self.streams.remove(stream) else { return false };
        if let Some(count) = self.per_workspace.get_mut(&route.workspace) {
            *count -= 1;
            if *count == 0 {
                self.per_workspace.remove(&route.workspace);
            }
        }
        true
    }
}

impl LinkHandle {
    /// Makes the handle of a link that is about to run, with the receiver that [`run`] takes.
    pub fn new(
        registration: Registration,
        settings: Arc<config::Link>,
        metrics: Arc<Metrics>,
    ) -> (Self, mpsc::Receiver<Bytes>) {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let (outbox, frames) = mpsc::channel(settings.outbox_frames_max);
        let handle = Self(Arc::new(Shared {
            id: LinkId(NEXT.fetch_add(1, Ordering::Relaxed)),
            handshakes: Arc::new(Semaphore::new(settings.handshakes_pending_max)),
            harness_handshakes: Mutex::default(),
            registration,
            settings,
            metrics,
            outbox,
            routes: Mutex::default(),
            opened: Instant::now(),
            heard_ms: AtomicU64::new(0),
            waits: Waits::default(),
            pongs: watch::Sender::new(0),
            ping: Notify::new(),
            stop: CancellationToken::new(),
            stop_reason: OnceLock::new(),
        }));
        (handle, frames)
    }

    /// Which socket this is.
    pub fn id(&self) -> LinkId {
        self.0.id
    }

    /// Whose socket this is.
    pub fn executor(&self) -> &ExecutorId {
        &self.0.registration.executor
    }

    /// What the executor said about itself before it dialled.
    pub fn registration(&self) -> &Registration {
        &self.0.registration
    }

    /// Bounds and times of this link.
    pub fn settings(&self) -> &config::Link {
        &self.0.settings
    }

    /// Bounds the handshakes under way: an executor resets what exceeds its own bound.
    pub fn handshakes(&self) -> &Arc<Semaphore> {
        &self.0.handshakes
    }

    /// Streams open now.
    pub fn streams(&self) -> usize {
        self.routes().streams.len()
    }

    /// Frames that wait to be sent.
    pub fn outbox_frames(&self) -> usize {
        self.0.outbox.max_capacity() - self.0.outbox.capacity()
    }

    /// Frames that wait for the reader of each stream.
    pub fn inbox_frames(&self) -> Vec<usize> {
        self.routes().streams.values().map(|route| route.inbox.max_capacity() - route.inbox.capacity()).collect()
    }

    /// Where what happens on it is counted.
    pub(super) fn metrics(&self) -> &Metrics {
        &self.0.metrics
    }

    /// Whether the workspace may open another stream right now.
    pub fn has_room(&self, workspace: &WorkspaceId) -> bool {
        self.routes().have_room(workspace, &self.0.settings)
    }

    /// Whether no more than half of the places of the link are taken, and of those of the workspace on it.
    pub(super) fn has_half_free(&self, workspace: &WorkspaceId) -> bool {
        let (routes, settings) = (self.routes(), &self.0.settings);
        let of_workspace = routes.per_workspace.get(workspace).copied().unwrap_or(0);
        routes.streams.len() * 2 <= settings.streams_max && of_workspace * 2 <= settings.workspace_streams_max
    }

    /// Opens a stream under an id of the gateway's choice.
    ///
    /// # Errors
    /// [`OpenError::TooManyStreams`] at the bound of the link or the workspace, [`OpenError::Disconnected`] when the
    /// link has ended.
    pub(crate) fn open_stream(&self, workspace: &WorkspaceId) -> Result<StreamHandle, OpenError> {
        let id = StreamId::new(&uuid::Uuid::new_v4().to_string()).expect("a UUID is a stream id");
        self.open_stream_as(id, workspace)
    }

    /// Opens a stream under an id that the caller chose.
    ///
    /// # Errors
    /// As [`Self::open_stream`], and [`OpenError::Taken`] when the id is in use: ids are chosen by callers, so a
    /// stream is never taken over.
    pub(crate) fn open_stream_as(&self, id: StreamId, workspace: &WorkspaceId) -> Result<StreamHandle, OpenError> {
        let settings = &self.0.settings;
        // The route is there before the first frame is queued, so an answer always finds it.
        let (inbox, receiver) = mpsc::channel((settings.stream_bytes_max / settings.frame_bytes_max).max(1));
        let mut routes = self.routes();
        if routes.closed {
            return Err(OpenError::Disconnected);
        }
        if routes.streams.contains_key(&id) {
            return Err(OpenError::Taken);
        }
        if !routes.have_room(workspace, settings) {
            return Err(OpenError::TooManyStreams);
        }
        routes.next += 1;
        let route = RouteId(routes.next);
        *routes.per_workspace.entry(workspace.clone()).or_default() += 1;
        let standing = Arc::<Standing>::default();
        let lane = Lane::new(self.clone(), id.clone(), route, standing.clone());
        routes.streams.insert(id, Route { id: route, workspace: workspace.clone(), inbox, standing, by_holder: false });
        Ok(StreamHandle::new(lane, receiver))
    }

    /// Whether the link has ended or is about to: no stream should be opened on it.
    pub fn is_ended(&self) -> bool {
        self.0.stop.is_cancelled()
    }

    /// Whether the executor answers a ping within `wait`. The answer comes behind all that the executor said before, so no
    /// reader is waited for meanwhile.
    pub async fn answers(&self, wait: Duration) -> bool {
        let _pressing = self.0.waits.press();
        let mut pongs = self.0.pongs.subscribe();
        self.0.ping.notify_one();
        tokio::select! {
            changed = timeout(wait, pongs.changed()) => matches!(changed, Ok(Ok(()))),
            () = self.0.stop.cancelled() => false,
        }
    }

    /// Waits until the executor of a link that was read more slowly has got rid of what it had to say: an encrypted one ends
    /// its socket when the answer to a handshake finds its queue full. No reader is waited for meanwhile.
    pub(super) async fn make_way(&self) {
        let waits = &self.0.waits;
        if !waits.is_crowded() {
            return;
        }
        let _pressing = waits.press();
        let mut pongs = self.0.pongs.subscribe();
        loop {
            let before = waits.stale();
            self.0.ping.notify_one();
            tokio::select! {
                _ = pongs.changed() => {}
                () = self.0.stop.cancelled() => return,
            }
            // The way of a ping and its pong without one frame for those who were let go: none are left.
            if waits.stale() == before && !waits.is_paused() {
                waits.cleared();
                return;
            }
        }
    }

    /// Asks the link's task to send what was accepted, close the socket and return.
    pub fn close(&self, reason: CloseReason) {
        let _ = self.0.stop_reason.set(reason);
        self.0.stop.cancel();
    }

    /// Waits for room in the outbox, in turn with all other senders, and queues one frame.
    pub(super) async fn send(&self, frame: Bytes) -> Result<(), StreamEnd> {
        self.0.outbox.send(frame).await.map_err(|_| StreamEnd::Disconnected)
    }

    /// Queues one frame from a place that cannot wait.
    pub(super) fn send_detached(&self, frame: Bytes) {
        if let Err(mpsc::error::TrySendError::Full(frame)) = self.0.outbox.try_send(frame) {
            let link = self.clone();
            if let Ok(runtime) = tokio::runtime::Handle::try_current() {
                runtime.spawn(async move { link.send(frame).await });
            }
        }
    }

    /// Counts a frame that is for nobody.
    pub(super) fn drop_frame(&self) {
        self.0.metrics.frames_dropped.inc();
    }

    /// Whether a workspace may not begin encrypted streams for now: an executor locks everybody out after some failed
    /// handshakes, whoever they are of (codex-exec-server.md §3.2).
    pub fn locks_out(&self, workspace: &WorkspaceId) -> bool {
        let workspaces = self.harness_handshakes();
        workspaces
            .get(workspace)
            .is_some_and(|of| of.failed >= FAILED_HANDSHAKES_MAX && of.last_failure.elapsed() < FAILED_HANDSHAKES_FOR)
    }

    /// Counts an encrypted handshake of this workspace that the executor refused.
    pub(super) fn handshake_failed(&self, workspace: &WorkspaceId) {
        let mut workspaces = self.harness_handshakes();
        let of = workspaces.entry(workspace.clone()).or_default();
        if of.last_failure.elapsed() >= FAILED_HANDSHAKES_FOR {
            of.failed = 0;
        }
        of.failed += 1;
        of.last_failure = Instant::now();
        self.0.metrics.handshakes_failed.inc(["harness"]);
    }

    /// Bounds the encrypted handshakes of one workspace's harnesses that are under way: of many begun at once only so
    /// many can fail before the next is refused.
    pub(super) fn handshake_turns(&self, workspace: &WorkspaceId) -> Arc<Semaphore> {
        let mut workspaces = self.harness_handshakes();
        workspaces
            .retain(|_, of| of.last_failure.elapsed() < FAILED_HANDSHAKES_FOR || Arc::strong_count(&of.turns) > 1);
        workspaces.entry(workspace.clone()).or_default().turns.clone()
    }

    fn harness_handshakes(&self) -> MutexGuard<'_, HashMap<WorkspaceId, HarnessHandshakes>> {
        self.0.harness_handshakes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends every stream of a workspace that may reach the executor no more, here and at the executor, but for those
    /// that their holders end. Who reads one learns of it after what had arrived before.
    pub fn end_workspace(&self, workspace: &WorkspaceId) {
        let mut routes = self.routes();
        let of_workspace = |(_, route): &(&StreamId, &Route)| route.workspace == *workspace && !route.by_holder;
        let ended: Vec<(StreamId, RouteId)> =
            routes.streams.iter().filter(of_workspace).map(|(id, route)| (id.clone(), route.id)).collect();
        for (id, route) in &ended {
            if let Some(route) = routes.streams.get(id) {
                let _ = route.standing.taken.set(StreamEnd::Withdrawn);
            }
            routes.remove(id, *route);
        }
        drop(routes);
        self.0.waits.look();
        for (stream_id, _) in ended {
            self.send_detached(Frame { stream_id, body: Body::Reset { reason: "withdrawn".into() } }.encode());
        }
    }

    /// Leaves the end of a stream to its holder when the right of its workspace ends.
    pub(super) fn spare(&self, stream: &StreamId, route: RouteId) {
        if let Some(entry) = self.routes().streams.get_mut(stream).filter(|entry| entry.id == route) {
            entry.by_holder = true;
        }
    }

    /// Forgets a route, unless that has happened already; whether it had to.
    pub(super) fn release(&self, stream: &StreamId, route: RouteId) -> bool {
        self.routes().remove(stream, route)
    }

    fn routes(&self) -> MutexGuard<'_, Routes> {
        // The table is consistent between any two statements, so a panic elsewhere does not spoil it.
        self.0.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether, and what for, the link may not be read more slowly for the sake of a stream.
    pub(super) fn refusal(&self, stream: &StreamId, route: RouteId, standing: &Standing) -> Option<Refusal> {
        let (routes, now_ms) = (self.routes(), self.now_ms());
        if let Some(end) = standing.taken.get().copied().or(routes.closed.then_some(StreamEnd::Disconnected)) {
            return Some(Refusal::Ended(end));
        }
        // Of a stream that its executor has ended nothing more comes, so nobody waits.
        let is_open = routes.streams.get(stream).is_some_and(|open| open.id == route);
        let mut others = routes.streams.values().filter(|other| other.id != route);
        (is_open && others.any(|other| other.standing.is_held_up_by(standing, now_ms))).then_some(Refusal::HoldsUp)
    }

    /// Whether the link is read more slowly for the sake of a stream.
    fn waits_for(&self, stream: &StreamId) -> bool {
        self.routes().streams.get(stream).is_some_and(|route| route.standing.waits())
    }

    /// The same while every other stream is behind, or there is none.
    fn waits_alone(&self, stream: &StreamId) -> bool {
        let others_behind =
            |routes: &Routes| routes.streams.iter().all(|(other, route)| other == stream || route.standing.is_behind());
        self.waits_for(stream) && others_behind(&self.routes())
    }

    /// What streams and the link's task know of each other.
    pub(super) fn waits(&self) -> &Waits {
        &self.0.waits
    }

    /// Milliseconds since the link was opened, and one more.
    pub(super) fn now_ms(&self) -> u64 {
        u64::try_from(self.0.opened.elapsed().as_millis()).map_or(u64::MAX >> 1, |elapsed| elapsed + 1)
    }

    fn heard(&self) {
        self.0.heard_ms.store(self.now_ms(), Ordering::Relaxed);
    }

    /// How long nothing was heard of the executor while it was listened to.
    pub fn silence(&self) -> Duration {
        if self.0.waits.is_paused() {
            return Duration::ZERO;
        }
        Duration::from_millis(self.now_ms().saturating_sub(self.0.heard_ms.load(Ordering::Relaxed)))
    }

    pub(super) fn shut(&self) {
        let mut routes = self.routes();
        routes.closed = true;
        routes.streams.clear();
        routes.per_workspace.clear();
        drop(routes);
        self.0.stop.cancel();
        self.0.waits.look();
    }
}

/// Ends the routes however the task ends, by return, panic or abort.
struct Shut<'a>(&'a LinkHandle);

impl Drop for Shut<'_> {
    fn drop(&mut self) {
        self.0.shut();
    }
}

/// Owns the socket until it ends: no other task reads, writes or closes it.
pub async fn run<S>(socket: WebSocketStream<S>, link: LinkHandle, outbox: mpsc::Receiver<Bytes>) -> LinkEnd
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    serve(socket, &link, outbox, None).await
}

/// The same for an executor whose streams share one JSON-RPC session; gives that back for the executor's next socket.
/// `lasting` tells which processes have run on it for a moment, by their names at the executor.
pub async fn run_shared<S>(
    socket: WebSocketStream<S>,
    link: LinkHandle,
    outbox: mpsc::Receiver<Bytes>,
    session: Box<Session>,
    lasting: watch::Sender<Vec<String>>,
) -> (LinkEnd, Box<Session>)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let desk = Desk { session: Mutex::new(session), incoming: Notify::new(), started: Notify::new() };
    let end = tokio::select! {
        end = serve(socket, &link, outbox, Some(&desk)) => end,
        end = desk.watch_processes(&lasting) => match end {},
    };
    let mut session = desk.session.into_inner().unwrap_or_else(PoisonError::into_inner);
    session.disconnect(Instant::now());
    (end, session)
}

/// Where the two loops of a shared socket meet. The lock is held for the work on one message.
struct Desk {
    session: Mutex<Box<Session>>,
    /// Frames wait for streams that do not come of a message of the executor. The other way needs none: the loop that
    /// writes runs behind the one that reads, in the same poll.
    incoming: Notify,
    /// Processes were begun.
    started: Notify,
}

impl Desk {
    fn session(&self) -> MutexGuard<'_, Box<Session>> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a frame that a stream has sent.
    fn take(&self, frame: Bytes, link: &LinkHandle) {
        let Ok(frame) = Frame::decode(frame) else { return };
        // Its route is gone when the stream has ended meanwhile; then it is of no interest any more.
        let workspace = link.routes().streams.get(&frame.stream_id).map(|route| route.workspace.clone());
        let mut session = self.session();
        if !session.knows(&frame.stream_id)
            && let Some(workspace) = workspace
        {
            session.open_stream(frame.stream_id.clone(), workspace);
        }
        session.from_stream(frame, Instant::now());
        if session.has_deliveries() {
            self.incoming.notify_one();
        }
        if session.take_started() {
            self.started.notify_one();
        }
    }

    /// Tells which processes last. Most are over before they are seen twice, and of those nothing is told.
    async fn watch_processes(&self, lasting: &watch::Sender<Vec<String>>) -> Infallible {
        let look = || -> HashSet<String> { self.session().processes(LASTING_MAX).into_iter().collect() };
        let mut seen = look();
        loop {
            while !seen.is_empty() {
                sleep(LASTING_AFTER).await;
                let mut now = look();
                let mut last: Vec<String> = now.intersection(&seen).cloned().collect();
                last.sort_unstable();
                lasting.send_if_modified(|known| {
                    *known != last && {
                        *known = last;
                        true
                    }
                });
                std::mem::swap(&mut seen, &mut now);
            }
            self.started.notified().await;
            seen = look();
        }
    }

    /// Takes a message of the executor and hands out what comes of it.
    async fn message(&self, json: Bytes, link: &LinkHandle) {
        let taken = self.session().from_socket(&json, Instant::now());
        self.hand_out(link).await;
        if let Err(error) = taken {
            link.0.metrics.frames_dropped.inc();
            tracing::debug!(executor = %link.executor(), %error, "message dropped");
        }
    }

    async fn hand_out(&self, link: &LinkHandle) {
        loop {
            // Apart, so that the lock is gone before anybody waits.
            let frame = self.session().next_for_streams();
            let Some(frame) = frame else { return };
            // Encrypted harnesses alone hand on bytes of the wire, and never over this link.
            deliver(frame, Bytes::new(), link).await;
        }
    }

    /// Returns when there is something to write, or to end, or when there is room again where there was none. It looks
    /// whenever it is polled.
    async fn due(&self, had_room: bool) {
        let mut timer = pin!(None::<Sleep>);
        poll_fn(|context| {
            let session = self.session();
            if session.has_messages() || (!had_room && !session.is_crowded()) {
                return Poll::Ready(());
            }
            let deadline = session.deadline();
            drop(session);
            if timer.as_ref().as_pin_ref().map(|timer| timer.deadline()) != deadline {
                timer.set(deadline.map(sleep_until));
            }
            timer.as_mut().as_pin_mut().map_or(Poll::Pending, |timer| timer.poll(context))
        })
        .await;
    }

    /// Whether frames of streams may be taken; while they may not, `due` tells when to look again.
    fn has_room(&self) -> bool {
        !self.session().is_crowded()
    }

    fn next_message(&self) -> Option<Bytes> {
        self.session().next_for_socket(Instant::now())
    }

    /// Ends what is over; whether the socket must go.
    fn expire(&self, waits: &Waits) -> bool {
        let (mut session, now) = (self.session(), Instant::now());
        if waits.is_crowded() {
            // Answers may lie unread, or have until just now.
            session.was_not_heard(now);
            if !waits.is_paused() {
                waits.cleared();
            }
        }
        session.expire(now);
        session.is_stalled(now)
    }
}

async fn serve<S>(
    socket: WebSocketStream<S>,
    link: &LinkHandle,
    outbox: mpsc::Receiver<Bytes>,
    desk: Option<&Desk>,
) -> LinkEnd
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let _shut = Shut(link);
    let (sink, stream) = socket.split();
    // Two loops in one task: if a slow write paused reads, two peers that both have much to say would wait for each
    // other for ever. What is read may be followed by something to write, in the same poll: a task that wakes itself is
    // handed to another thread, which costs a small message more than all the rest of its way.
    let mut reads = pin!(read_loop(stream, link, desk));
    let end = tokio::select! {
        biased;
        end = &mut reads => return end,
        end = write_loop(sink, link, outbox, desk) => end,
    };
    if matches!(end, LinkEnd::Closed(_)) {
        // Closing with bytes unread resets the connection; the peer could miss our close frame.
        let _ = timeout(CLOSE_TIMEOUT, reads).await;
    }
    end
}

async fn read_loop<R>(mut socket: R, link: &LinkHandle, desk: Option<&Desk>) -> LinkEnd
where
    R: Stream<Item = Result<Message, SocketError>> + Unpin,
{
    let mut read = 0;
    loop {
        if read == READ_BATCH {
            // Otherwise an executor that has much to say would take the task's whole turn each time.
            yield_now().await;
            read = 0;
        }
        read += 1;
        let message = match desk {
            None => socket.next().await,
            Some(desk) => tokio::select! {
                message = socket.next() => message,
                () = desk.incoming.notified() => {
                    desk.hand_out(link).await;
                    continue;
                }
            },
        };
        let Some(message) = message else { return LinkEnd::Peer };
        link.heard();
        link.0.metrics.received(message.as_ref().map_or(0, Message::len));
        match message {
            Ok(Message::Binary(wire)) => match desk {
                Some(desk) => desk.message(wire, link).await,
                None => match Frame::decode(wire.clone()) {
                    Ok(frame) => deliver(frame, wire, link).await,
                    Err(error) => {
                        link.0.metrics.frames_dropped.inc();
                        tracing::debug!(executor = %link.executor(), %error, "frame dropped");
                    }
                },
            },
            Ok(Message::Text(text)) => match desk {
                Some(desk) => desk.message(text.into(), link).await,
                // Relay frames are binary; executors drop our text frames likewise.
                None => {
                    link.0.metrics.frames_dropped.inc();
                }
            },
            Ok(Message::Pong(_)) => link.0.pongs.send_modify(|count| *count += 1),
            Ok(Message::Ping(_) | Message::Frame(_)) => {}
            Ok(Message::Close(_)) => return LinkEnd::Peer,
            // A killed executor says no farewell.
            Err(
                SocketError::ConnectionClosed
                | SocketError::AlreadyClosed
                | SocketError::Io(_)
                | SocketError::Protocol(ProtocolError::ResetWithoutClosingHandshake),
            ) => return LinkEnd::Peer,
            Err(error) => {
                tracing::warn!(executor = %link.executor(), %error, "executor socket failed");
                return LinkEnd::Failed;
            }
        }
    }
}

/// Hands a frame to its stream. Clients wait for nobody, and the task of a harness puts aside what it cannot write yet,
/// so a full inbox means a moment's work, or a stream that the link is read more slowly for.
async fn deliver(frame: Frame, wire: Bytes, link: &LinkHandle) {
    let (inbox, route) = {
        let routes = link.routes();
        let Some(route) = routes.streams.get(&frame.stream_id) else {
            // Frames that were under way when we reset the stream.
            link.0.waits.dropped();
            return;
        };
        route.standing.heard(link.0.heard_ms.load(Ordering::Relaxed));
        if !route.standing.is_behind() {
            link.0.waits.look();
        }
        (route.inbox.clone(), route.id)
    };
    let Frame { stream_id, body } = frame;
    let ended = matches!(body, Body::Reset { .. });
    let full = match inbox.try_send(Delivery { body, wire }) {
        Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => false,
        Err(mpsc::error::TrySendError::Full(delivery)) => !waited_for(inbox, delivery, &stream_id, link).await,
    };
    if full {
        link.0.metrics.streams_overrun.inc();
        let reset = Frame { stream_id: stream_id.clone(), body: Body::Reset { reason: "reader too slow".into() } };
        link.send_detached(reset.encode());
    }
    if full || ended {
        link.release(&stream_id, route);
    }
}

/// Waits until a stream takes what is delivered to it, or has ended; whether it did. One that does not is to be reset
/// rather than allowed to hold up its neighbours, but one that the link is read more slowly for has as long as it likes
/// while there are none.
async fn waited_for(inbox: mpsc::Sender<Delivery>, delivery: Delivery, stream: &StreamId, link: &LinkHandle) -> bool {
    let wait = Duration::from_secs(link.0.settings.write_timeout_secs);
    let paused = link.0.waits.pause();
    let mut taken = pin!(inbox.send(delivery));
    let mut in_time = timeout(wait, &mut taken).await.is_ok();
    while !in_time && link.waits_alone(stream) {
        in_time = timeout(wait, &mut taken).await.is_ok();
    }
    if !in_time && link.waits_for(stream) {
        // Its holder resets it, and knows why.
        let _pressing = link.0.waits.press();
        in_time = timeout(wait, taken).await.is_ok();
    }
    // All that it said meanwhile is still to be read.
    link.heard();
    drop(paused);
    in_time
}

async fn write_loop<W>(
    mut socket: W,
    link: &LinkHandle,
    mut outbox: mpsc::Receiver<Bytes>,
    desk: Option<&Desk>,
) -> LinkEnd
where
    W: Sink<Message, Error = SocketError> + Unpin,
{
    let settings = &link.0.settings;
    let ping_every = Duration::from_secs(settings.ping_secs);
    let mut ping = tokio::time::interval_at(Instant::now() + ping_every, ping_every);
    ping.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let room = desk.is_none_or(Desk::has_room);
        let due = async {
            match desk {
                Some(desk) => desk.due(room).await,
                None => std::future::pending().await,
            }
        };
        let written = tokio::select! {
            () = link.0.stop.cancelled() => break,
            frame = outbox.recv(), if room => match (frame, desk) {
                (Some(frame), None) => {
                    in_time(link, write_batch(&mut socket, frame, &mut outbox, &link.0.metrics)).await
                }
                (Some(frame), Some(desk)) => {
                    desk.take(frame, link);
                    in_time(link, write_messages(&mut socket, desk, &link.0.metrics)).await
                }
                (None, _) => break,
            },
            () = due => match desk {
                Some(desk) if desk.expire(&link.0.waits) => return LinkEnd::Stalled,
                Some(desk) => in_time(link, write_messages(&mut socket, desk, &link.0.metrics)).await,
                None => continue,
            },
            _ = ping.tick() => {
                if link.silence() >= Duration::from_secs(settings.dead_secs) {
                    return LinkEnd::Silent;
                }
                in_time(link, async {
                    if link.0.waits.is_paused() {
                        // The executor's own ping stands behind what is not read yet, and it gives up a link on which it
                        // hears no pong for a minute.
                        socket.feed(Message::Pong(Bytes::new())).await?;
                    }
                    socket.send(Message::Ping(Bytes::new())).await
                })
                .await
            }
            () = link.0.ping.notified() => in_time(link, socket.send(Message::Ping(Bytes::new()))).await,
        };
        match written {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return LinkEnd::Peer,
            Err(_) => return LinkEnd::WriteTimeout,
        }
    }
    let reason = link.0.stop_reason.get().copied().unwrap_or(CloseReason::Draining);
    outbox.close();
    let farewell = async {
        while let Some(frame) = outbox.recv().await {
            match desk {
                None => socket.feed(Message::Binary(frame)).await?,
                Some(desk) => desk.take(frame, link),
            }
        }
        if let Some(desk) = desk {
            write_messages(&mut socket, desk, &link.0.metrics).await?;
        }
        socket.send(Message::Close(Some(reason.frame()))).await
    };
    let _ = timeout(Duration::from_secs(settings.write_timeout_secs), farewell).await;
    LinkEnd::Closed(reason)
}

/// A write within its time. An executor that is not read may read no more itself, so whoever makes the link wait is let
/// go before the link is given up.
async fn in_time<T>(link: &LinkHandle, write: impl Future<Output = T>) -> Result<T, Elapsed> {
    let (wait, mut write) = (Duration::from_secs(link.0.settings.write_timeout_secs), pin!(write));
    match timeout(wait, &mut write).await {
        Err(_) if link.0.waits.is_paused() => {
            let _pressing = link.0.waits.press();
            timeout(wait, write).await
        }
        written => written,
    }
}

/// Writes the frame and those already waiting behind it, then flushes once.
async fn write_batch<W>(
    socket: &mut W,
    first: Bytes,
    outbox: &mut mpsc::Receiver<Bytes>,
    metrics: &Metrics,
) -> Result<(), SocketError>
where
    W: Sink<Message, Error = SocketError> + Unpin,
{
    metrics.sent(first.len());
    socket.feed(Message::Binary(first)).await?;
    for _ in 1..WRITE_BATCH {
        let Ok(frame) = outbox.try_recv() else { break };
        metrics.sent(frame.len());
        socket.feed(Message::Binary(frame)).await?;
    }
    socket.flush().await
}

/// Writes what may be written now to a shared socket, then flushes once. Frames may be long; what is longer than a
/// frame that executors take goes in several.
async fn write_messages<W>(socket: &mut W, desk: &Desk, metrics: &Metrics) -> Result<(), SocketError>
where
    W: Sink<Message, Error = SocketError> + Unpin,
{
    let mut written = 0;
    while written < WRITE_BYTES {
        let Some(json) = desk.next_message() else { break };
        written += json.len();
        metrics.sent(json.len());
        if json.len() <= JSON_FRAME_BYTES_MAX {
            // Our own JSON, or JSON that was read from its bytes.
            let text = Utf8Bytes::try_from(json).map_err(|error| SocketError::Utf8(error.to_string()))?;
            socket.feed(Message::Text(text)).await?;
            continue;
        }
        let pieces = json.len().div_ceil(JSON_FRAME_BYTES_MAX);
        for piece in 0..pieces {
            let start = piece * JSON_FRAME_BYTES_MAX;
            let bytes = json.slice(start..json.len().min(start + JSON_FRAME_BYTES_MAX));
            let code = OpCode::Data(if piece == 0 { OpData::Text } else { OpData::Continue });
            let frame = SocketFrame::message(bytes, code, piece + 1 == pieces);
            socket.feed(Message::Frame(frame)).await?;
        }
    }
    if written > 0 { socket.flush().await } else { Ok(()) }
}

#[cfg(test)]
#[path = "link_tests.rs"]
mod model_tests;

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(super) mod tests {
    use std::time::SystemTime;

    use futures_util::FutureExt;

    use super::*;
    use crate::store::Transport;

    pub(in crate::relay) fn link_with(settings: config::Link) -> (LinkHandle, mpsc::Receiver<Bytes>) {
        let registration = Registration {
            id: "exr_1".parse().unwrap(),
            executor: "exe_1".parse().unwrap(),
            transport: Transport::Relay,
            public_key: Vec::new(),
            credential: [0; 32],
            created_at: SystemTime::UNIX_EPOCH,
        };
        LinkHandle::new(registration, Arc::new(settings), Arc::default())
    }

    /// Has a stream hear a frame of its executor.
    pub(in crate::relay) async fn say(link: &LinkHandle, stream: &StreamId) {
        link.heard();
        deliver(Frame { stream_id: stream.clone(), body: Body::Heartbeat }, Bytes::new(), link).await;
    }

    #[tokio::test(start_paused = true)]
    async fn an_inbox_has_room_for_its_bytes_in_frames_of_the_largest_size() {
        let settings = config::Link { stream_bytes_max: 4096, frame_bytes_max: 1024, ..config::Link::default() };
        let (link, _outbox) = link_with(settings);
        let mut stream = link.open_stream(&"w".parse().unwrap()).unwrap();
        let id = stream.id().clone();
        for nth in 0..4 {
            assert!(say(&link, &id).now_or_never().is_some(), "frame {nth}");
        }
        let mut fifth = Box::pin(say(&link, &id));
        assert!((&mut fifth).now_or_never().is_none(), "the link waits for its reader");
        assert_eq!(stream.receive().await, Ok(Body::Heartbeat));
        fifth.await;
    }

    #[tokio::test]
    async fn the_streams_of_a_workspace_end_with_its_right_and_no_others() {
        let (link, mut outbox) = link_with(config::Link::default());
        let (ours, theirs) = ("ours".parse().unwrap(), "theirs".parse().unwrap());
        let mut withdrawn = link.open_stream(&ours).unwrap();
        let mut spared = link.open_stream(&ours).unwrap().ended_by_holder();
        let mut other = link.open_stream(&theirs).unwrap();
        let id = withdrawn.id().clone();
        let heartbeat = Frame { stream_id: id.clone(), body: Body::Heartbeat };
        deliver(heartbeat.clone(), Bytes::new(), &link).await;

        link.end_workspace(&ours);

        assert_eq!(withdrawn.receive().await, Ok(Body::Heartbeat), "it had arrived before");
        assert_eq!(withdrawn.receive().await, Err(StreamEnd::Withdrawn));
        assert_eq!(withdrawn.send(heartbeat.encode()).await, Err(StreamEnd::Withdrawn));
        assert!(spared.receive().now_or_never().is_none() && other.receive().now_or_never().is_none());
        assert_eq!(link.streams(), 2);
        drop(withdrawn);
        let reset = Frame::decode(outbox.try_recv().unwrap()).unwrap();
        assert_eq!(reset, Frame { stream_id: id, body: Body::Reset { reason: "withdrawn".into() } });
        assert!(outbox.try_recv().is_err(), "the executor is told once, and nothing of the others");
        drop((spared, other));
        assert_eq!(link.streams(), 0);
    }

    #[tokio::test]
    async fn who_floods_a_link_lets_a_neighbour_pass_within_an_outbox_and_a_batch() {
        let (link, mut outbox) = link_with(config::Link::default());
        let flood = Bytes::from(vec![b'f'; 200 * 1024]);
        for _ in 0..3 {
            let (link, flood) = (link.clone(), flood.clone());
            tokio::spawn(async move { while link.send(flood.clone()).await.is_ok() {} });
        }
        while link.0.outbox.capacity() > 0 {
            tokio::task::yield_now().await;
        }
        let neighbour = link.clone();
        tokio::spawn(async move { neighbour.send(Bytes::from_static(b"small")).await });
        tokio::task::yield_now().await;

        // As the link writes: so many at once, and the senders fill what became free.
        let mut before = 0;
        while let Some(frame) = outbox.recv().await
            && frame != "small"
        {
            before += 1;
            assert!(before <= link.settings().outbox_frames_max + WRITE_BATCH + 3, "{before} frames went before");
            if before % WRITE_BATCH == 0 {
                tokio::task::yield_now().await;
            }
        }
    }
}
