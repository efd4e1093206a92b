//! A harness's socket: which kind of harness it is, and what it and its executor say to each other.
//!
//! The task that serves the socket owns it, and goes on for a moment when it breaks (`comeback`). Frames of an
//! encrypted harness are handed on as they are and cannot be read here; messages of a plain one are, but only what
//! concerns executor sessions is changed (`gate`).

use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{AcquireError, Semaphore, mpsc};
use tokio::task::unconstrained;
use tokio::time::{Instant, MissedTickBehavior, interval_at, timeout, timeout_at};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::{Error as SocketError, Message, Utf8Bytes};
use tokio_util::sync::CancellationToken;

use super::client::Detaching;
use super::comeback::{Comeback, Place, Places, Sent, Turn, WayBack};
use super::conversation::{Conversation, ConversationEnd, MessageReceiver, MessageSender};
use super::gate::{self, Said};
use super::link::LinkHandle;
use super::spill::{Spill, SpillError};
use super::stream::{Delivery, StreamEnd, StreamHandle};
use crate::config;
use crate::protocol::endpoint::{Endpoint, EndpointError, EndpointLimits};
use crate::protocol::frame::{Body, Data, Frame, FrameError, StreamId};
use crate::protocol::ids::WorkspaceId;
use crate::protocol::rpc::{ExecutorSessionId, INVALID_REQUEST};

/// How long a peer may take to answer our close frame.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// Messages written before the socket is flushed once.
const WRITE_BATCH: usize = 32;

/// How a harness's socket ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HarnessEnd {
    /// The harness closed its socket or is gone.
    Peer,
    /// The harness said nothing for too long.
    Silent,
    /// The harness broke the protocol; the text tells how.
    Protocol(&'static str),
    /// A message is too large.
    TooLarge,
    /// The executor's link is gone, or the right to it.
    Disconnected,
    /// The executor ended the stream.
    Reset,
    /// No stream to the executor was opened; the text tells why.
    Unreachable(&'static str),
    /// The gateway stops; the harness comes back to the next one.
    Draining,
    /// The right was taken away, or its credential has come to its end.
    Refused,
    /// The harness resumed its session on another socket.
    Replaced,
    /// The harness reads so slowly that what waits for it is too much.
    Overrun,
    /// The harness came back for a stream that is not there any more, or for frames that are not.
    Unresumable,
}

impl HarnessEnd {
    /// What the harness is told; `None` where there is nobody to tell.
    fn farewell(self) -> Option<CloseFrame> {
        let (code, reason) = match self {
            Self::Peer | Self::Silent => return None,
            Self::Protocol(reason) => (CloseCode::Protocol, reason),
            Self::TooLarge => (CloseCode::Size, "the message is too large"),
            Self::Disconnected => (CloseCode::Again, "the executor is gone"),
            Self::Reset => (CloseCode::Error, "the executor ended the stream"),
            Self::Unreachable(reason) => (CloseCode::Again, reason),
            Self::Draining => (CloseCode::Restart, "gateway restarts"),
            Self::Refused => (CloseCode::Policy, "the right to this executor has ended"),
            Self::Replaced => (CloseCode::Normal, "resumed on another socket"),
            Self::Overrun => (CloseCode::Policy, "the harness reads too slowly"),
            Self::Unresumable => (CloseCode::Again, "the stream cannot be resumed"),
        };
        Some(CloseFrame { code, reason: reason.into() })
    }

    /// What more there is to say about it.
    pub fn detail(self) -> Option<&'static str> {
        match self {
            Self::Protocol(detail) | Self::Unreachable(detail) => Some(detail),
            _ => None,
        }
    }

    /// Whether it was the executor's side that ended, while the harness still listens.
    fn is_of_executor(self) -> bool {
        matches!(self, Self::Disconnected | Self::Reset | Self::Unreachable(_))
    }

    /// For metrics.
    pub fn label(self) -> &'static str {
        match self {
            Self::Peer => "peer",
            Self::Silent => "silent",
            Self::Protocol(_) => "protocol",
            Self::TooLarge => "too_large",
            Self::Disconnected => "disconnected",
            Self::Reset => "reset",
            Self::Unreachable(_) => "unreachable",
            Self::Draining => "draining",
            Self::Refused => "refused",
            Self::Replaced => "replaced",
            Self::Overrun => "overrun",
            Self::Unresumable => "unresumable",
        }
    }
}

impl From<StreamEnd> for HarnessEnd {
    fn from(end: StreamEnd) -> Self {
        match end {
            StreamEnd::Disconnected => Self::Disconnected,
            StreamEnd::Withdrawn => Self::Refused,
            StreamEnd::Reset => Self::Reset,
        }
    }
}

impl From<ConversationEnd> for HarnessEnd {
    fn from(end: ConversationEnd) -> Self {
        match end {
            ConversationEnd::Stream(end) => end.into(),
            // What the executor sent makes no sense: nothing of it is handed on.
            ConversationEnd::Sequence(_) | ConversationEnd::Noise(_) | ConversationEnd::Message(_) => Self::Reset,
        }
    }
}

impl From<SpillError> for HarnessEnd {
    fn from(error: SpillError) -> Self {
        match error {
            SpillError::Full | SpillError::Disk(_) => Self::Overrun,
            SpillError::Ended(end) => end.into(),
        }
    }
}

impl From<SocketError> for HarnessEnd {
    fn from(_: SocketError) -> Self {
        Self::Peer
    }
}

impl From<EndpointError> for HarnessEnd {
    fn from(error: EndpointError) -> Self {
        match error {
            EndpointError::MessageTooLarge { .. } => Self::TooLarge,
            _ => Self::Protocol("frames do not follow each other"),
        }
    }
}

/// A harness by its first words.
pub enum Flavour {
    /// JSON-RPC messages, as to a local executor.
    Messages(Framing, Bytes),
    /// Encrypted frames of one stream, from the first to the handshake.
    Encrypted(StreamId, Vec<Bytes>),
    /// One that is back for its own stream, and lacks the frames from this number on.
    Back(StreamId, u32),
}

/// How a plain harness's messages stand in its socket.
pub enum Framing {
    /// Each is one message of the WebSocket.
    Whole,
    /// Each is the payload of a relay frame of this stream (connectors-api.md §2.5).
    Frames {
        /// The harness's own stream.
        stream: StreamId,
        /// What it sends, in order.
        received: Endpoint,
    },
}

impl Framing {
    /// The harness's own stream, if it has one.
    pub fn stream(&self) -> Option<&StreamId> {
        match self {
            Self::Whole => None,
            Self::Frames { stream, .. } => Some(stream),
        }
    }
}

/// What a harness and the gateway agreed on about executor sessions: names that open again on another socket.
pub struct Names<'a> {
    /// The name that a harness is given.
    pub seal: &'a (dyn Fn(&ExecutorSessionId) -> String + Send + Sync),
    /// The executor's own name behind it, if it was given to this harness's workspace.
    pub open: &'a (dyn Fn(&str) -> Option<ExecutorSessionId> + Send + Sync),
    /// Which sessions are in use on which socket.
    pub attached: &'a AttachedSessions,
}

/// Which executor sessions plain harnesses use right now: one that is resumed ends the socket that had it before.
#[derive(Default)]
pub struct AttachedSessions(Places<String, CancellationToken>);

/// A socket's hold on a session.
struct Hold<'a> {
    _place: Place<'a, String, CancellationToken>,
    replaced: CancellationToken,
}

impl AttachedSessions {
    fn hold(&self, session: &ExecutorSessionId) -> Hold<'_> {
        let replaced = CancellationToken::new();
        let (place, former) = self.0.hold(session.reveal().to_owned(), replaced.clone());
        if let Some(former) = former {
            former.cancel();
        }
        Hold { _place: place, replaced }
    }
}

/// A harness's socket that was upgraded.
pub struct HarnessSocket<S> {
    sink: Sink<S>,
    source: Source<S>,
    heard: Heard,
    traffic: Arc<Traffic>,
    /// What waits to be written to it.
    outbox: Spill,
    history: Option<History<S>>,
}

/// What has passed through a harness's socket, whatever it says: messages of the WebSocket and their bytes.
#[derive(Debug, Default)]
struct Traffic {
    frames_in: AtomicU64,
    bytes_in: AtomicU64,
    frames_out: AtomicU64,
    bytes_out: AtomicU64,
}

/// What has passed through a harness's socket at one time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Passed {
    /// Messages from the harness.
    pub frames_in: u64,
    /// Their bytes.
    pub bytes_in: u64,
    /// Messages to the harness.
    pub frames_out: u64,
    /// Their bytes.
    pub bytes_out: u64,
}

impl Traffic {
    fn received(&self, message: &Message) {
        if let Message::Text(_) | Message::Binary(_) = message {
            self.frames_in.fetch_add(1, Ordering::Relaxed);
            self.bytes_in.fetch_add(message.len() as u64, Ordering::Relaxed);
        }
    }

    fn sent(&self, message: &Message) {
        self.frames_out.fetch_add(1, Ordering::Relaxed);
        self.bytes_out.fetch_add(message.len() as u64, Ordering::Relaxed);
    }
}

pub(super) type Sink<S> = SplitSink<WebSocketStream<S>, Message>;
pub(super) type SourceStream<S> = SplitStream<WebSocketStream<S>>;

/// The writing half's part of the way back.
struct History<S> {
    stream: StreamId,
    sent: Sent,
    turns: mpsc::UnboundedReceiver<Turn<S>>,
}

/// When the harness was last heard.
#[derive(Clone)]
struct Heard(Arc<Mutex<Instant>>);

impl Heard {
    fn now(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    fn silence(&self) -> Duration {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).elapsed()
    }
}

/// The reading half of a socket.
struct Source<S> {
    stream: SourceStream<S>,
    heard: Heard,
    traffic: Arc<Traffic>,
    way_back: Option<WayBack<S>>,
}

/// What a harness says.
enum Word {
    Text(Bytes),
    Binary(Bytes),
}

impl<S: AsyncRead + AsyncWrite + Unpin> Source<S> {
    /// The next message of the harness, on whichever of its sockets. Cancelling may lose its way back.
    async fn next(&mut self) -> Result<Word, HarnessEnd> {
        loop {
            let message = match &mut self.way_back {
                None => self.stream.next().await,
                // Its socket may be dead and not know it.
                Some(way_back) => tokio::select! {
                    biased;
                    Some(comeback) = way_back.comebacks.recv() => {
                        self.stream = way_back.take_up(comeback);
                        continue;
                    }
                    message = self.stream.next() => message,
                },
            };
            self.heard.now();
            message.iter().flatten().for_each(|message| self.traffic.received(message));
            match message {
                Some(Ok(Message::Text(text))) => return Ok(Word::Text(text.into())),
                Some(Ok(Message::Binary(bytes))) => return Ok(Word::Binary(bytes)),
                Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => {}
                Some(Err(SocketError::Capacity(_))) => return Err(HarnessEnd::TooLarge),
                Some(Ok(Message::Close(_))) => return Err(HarnessEnd::Peer),
                None | Some(Err(_)) => {
                    let way_back = self.way_back.as_mut().ok_or(HarnessEnd::Peer)?;
                    let comeback = way_back.wait().await.ok_or(HarnessEnd::Peer)?;
                    self.stream = way_back.take_up(comeback);
                }
            }
        }
    }

    /// All before this number has come.
    fn lacks(&mut self, seq: u32) {
        if let Some(way_back) = &mut self.way_back {
            way_back.gateway_lacks = seq;
        }
    }

    /// The next JSON-RPC message of a plain harness.
    async fn message(&mut self, framing: &mut Framing) -> Result<Bytes, HarnessEnd> {
        loop {
            let Framing::Frames { stream, received, .. } = framing else {
                let (Word::Text(json) | Word::Binary(json)) = self.next().await?;
                return Ok(json);
            };
            if let Some(json) = received.next() {
                return Ok(json);
            }
            // Texts, and what does not decode or is of another stream, are for nobody.
            let Word::Binary(wire) = self.next().await? else { continue };
            match Frame::decode(wire).ok().filter(|frame| frame.stream_id == *stream).map(|frame| frame.body) {
                Some(Body::Data(data)) => {
                    received.receive(data)?;
                    self.lacks(received.acknowledgement().0);
                }
                Some(Body::Reset { .. }) => return Err(HarnessEnd::Peer),
                _ => {}
            }
        }
    }
}

/// How messages of the executor are written to the harness.
struct Writing<'a> {
    form: Form,
    traffic: &'a Traffic,
}

enum Form {
    /// As a frame that is one already.
    Frame,
    /// As a text.
    Text,
    /// In a relay frame of this stream.
    Data(StreamId, Endpoint),
}

impl Writing<'_> {
    fn message(&mut self, bytes: Bytes) -> Result<Message, HarnessEnd> {
        let message = match &mut self.form {
            Form::Frame => Message::Binary(bytes),
            Form::Text => Message::Text(Utf8Bytes::try_from(bytes).map_err(|_| HarnessEnd::Reset)?),
            Form::Data(stream, endpoint) => {
                let data = Data { seq: endpoint.next_seq()?, segment_index: 0, segment_count: 1, payload: bytes };
                Message::Binary(Frame { stream_id: stream.clone(), body: Body::Data(data) }.encode())
            }
        };
        self.traffic.sent(&message);
        Ok(message)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> HarnessSocket<S> {
    /// A socket of which nothing was read yet. What a slow harness does not take waits in `outbox`.
    pub fn new(socket: WebSocketStream<S>, outbox: Spill) -> Self {
        let (sink, stream) = socket.split();
        let heard = Heard(Arc::new(Mutex::new(Instant::now())));
        let traffic = Arc::new(Traffic::default());
        let source = Source { stream, heard: heard.clone(), traffic: traffic.clone(), way_back: None };
        Self { sink, source, heard, traffic, outbox, history: None }
    }

    /// What has passed so far.
    pub fn passed(&self) -> Passed {
        let Traffic { frames_in, bytes_in, frames_out, bytes_out } = &*self.traffic;
        let [frames_in, bytes_in, frames_out, bytes_out] =
            [frames_in, bytes_in, frames_out, bytes_out].map(|count| count.load(Ordering::Relaxed));
        Passed { frames_in, bytes_in, frames_out, bytes_out }
    }

    /// Lets the harness come back to its stream on this link when its socket breaks, as long as `settings` say.
    pub fn wait_for_comebacks(
        &mut self,
        stream: StreamId,
        comebacks: mpsc::Receiver<Comeback<S>>,
        workspace: &WorkspaceId,
        link: &LinkHandle,
        settings: &config::Link,
    ) {
        let (told, turns) = mpsc::unbounded_channel();
        self.history = Some(History { stream, sent: Sent::new(settings.comeback_bytes_max), turns });
        self.source.way_back = Some(WayBack {
            comebacks,
            turns: told,
            link: link.clone(),
            workspace: workspace.clone(),
            wait: Duration::from_secs(settings.comeback_wait_secs),
            gateway_lacks: 0,
        });
    }

    /// Tells the harness that its stream is not there any more.
    pub async fn reset(&mut self, stream_id: StreamId) {
        let reset = Frame { stream_id, body: Body::Reset { reason: "no such stream".into() } };
        let _ = timeout(CLOSE_TIMEOUT, self.sink.send(Message::Binary(reset.encode()))).await;
    }

    /// Hands the socket on, to the task that has the stream.
    pub fn back(self, next_seq: u32) -> Comeback<S> {
        Comeback { sink: self.sink, stream: self.source.stream, next_seq }
    }

    /// Reads until it is known what kind of harness this is.
    ///
    /// # Errors
    /// [`HarnessEnd`] when it is none, or does not say in time.
    pub async fn flavour(&mut self, wait: Duration, message_bytes_max: usize) -> Result<Flavour, HarnessEnd> {
        let late = HarnessEnd::Protocol("first frame read failed");
        timeout(wait, self.first_words(message_bytes_max)).await.unwrap_or(Err(late))
    }

    async fn first_words(&mut self, message_bytes_max: usize) -> Result<Flavour, HarnessEnd> {
        let wire = match self.source.next().await? {
            Word::Text(json) => return Ok(Flavour::Messages(Framing::Whole, json)),
            // Executors take JSON in binary messages too, and no relay frame begins like an object.
            Word::Binary(json) if json.trim_ascii_start().starts_with(b"{") => {
                return Ok(Flavour::Messages(Framing::Whole, json));
            }
            Word::Binary(wire) => wire,
        };
        let frame = Frame::decode(wire.clone()).map_err(|error| match error {
            FrameError::BlankStreamId => HarnessEnd::Protocol("Resume missing stream_id"),
            _ => HarnessEnd::Protocol("malformed first frame"),
        })?;
        let stream = frame.stream_id.detached();
        match frame.body {
            Body::Handshake { .. } => return Ok(Flavour::Encrypted(stream, vec![wire])),
            Body::Resume { next_seq: 0 } => {}
            Body::Resume { next_seq } => return Ok(Flavour::Back(stream, next_seq)),
            _ => return Err(HarnessEnd::Protocol("first frame must be Resume")),
        }
        let limits = EndpointLimits { message_bytes_max, ..EndpointLimits::default() };
        let mut received = Endpoint::new(limits);
        loop {
            let Word::Binary(next) = self.source.next().await? else { continue };
            let frame = Frame::decode(next.clone()).ok().filter(|frame| frame.stream_id == stream);
            match frame.map(|frame| frame.body) {
                Some(Body::Handshake { .. }) => return Ok(Flavour::Encrypted(stream, vec![wire, next])),
                Some(Body::Data(data)) => {
                    received.receive(data)?;
                    if let Some(json) = received.next() {
                        return Ok(Flavour::Messages(Framing::Frames { stream, received }, json));
                    }
                }
                Some(Body::Reset { .. }) => return Err(HarnessEnd::Peer),
                // What does not decode, or is of another stream, is for nobody.
                _ => {}
            }
        }
    }

    /// Hands the frames of an encrypted harness to its stream and back, until either ends. Dropping the future resets
    /// the stream.
    pub async fn forward(
        &mut self,
        mut stream: StreamHandle,
        first: Vec<Bytes>,
        workspace: &WorkspaceId,
        settings: &config::Link,
    ) -> HarnessEnd {
        let (id, lane, link) = (stream.id().clone(), stream.lane().clone(), stream.link().clone());
        let Self { sink, source, heard, traffic, outbox, history } = self;
        outbox.waits_for(&lane);
        let wait = Duration::from_secs(settings.handshake_timeout_secs);
        let turns = async {
            // First that of the workspace: whoever waits for it takes no place of others.
            let of_workspace = link.handshake_turns(workspace).acquire_owned().await?;
            let turn = link.handshakes().clone().acquire_owned().await?;
            link.make_way().await;
            Ok::<_, AcquireError>((of_workspace, turn))
        };
        let Ok(Ok(turn)) = timeout(wait, turns).await else {
            return HarnessEnd::Unreachable("too many handshakes with this executor");
        };
        if link.locks_out(workspace) {
            return HarnessEnd::Unreachable("too many encrypted handshakes with this executor have failed");
        }
        for wire in first {
            // Not past the stream: after its end a handshake would begin another one.
            if let Err(end) = stream.send(wire).await {
                return end.into();
            }
        }
        let mut turn = Some(turn);
        let upwards = async {
            loop {
                let Word::Binary(wire) = source.next().await? else { continue };
                if wire.len() > settings.frame_bytes_max {
                    // It would end the executor's socket, and with it everybody else's streams.
                    return Err(HarnessEnd::TooLarge);
                }
                let frame = Frame::decode(wire.clone()).ok().filter(|frame| frame.stream_id == id);
                match frame.map(|frame| frame.body) {
                    Some(Body::Reset { .. }) => return Err(HarnessEnd::Peer),
                    // An executor answers a second handshake with a reset and keeps the stream.
                    None | Some(Body::Handshake { .. }) => link.drop_frame(),
                    Some(body) => {
                        lane.send(wire).await?;
                        if let Body::Data(data) = body {
                            source.lacks(data.seq.saturating_add(1));
                        }
                    }
                }
            }
        };
        let downwards = async {
            let shaken = shaken(&mut stream, workspace, wait).await;
            turn = None;
            let mut delivery = shaken?;
            loop {
                outbox.push(delivery.wire).await?;
                delivery = stream.receive_frame().await?;
            }
        };
        let mut writing = Writing { form: Form::Frame, traffic };
        let words = first_end(upwards, downwards, std::future::pending());
        let end = written(words, write(sink, outbox, &mut writing, history, heard, settings)).await;
        if end.is_of_executor() {
            let reset = Frame { stream_id: id, body: Body::Reset { reason: "the stream has ended".into() } };
            flush(sink, outbox, &mut writing, Some(reset.encode())).await;
        }
        if let Some(turn) = turn {
            // The executor has the handshake all the same, and counts it if it is a bad one.
            let workspace = workspace.clone();
            tokio::spawn(async move {
                let _ = shaken(&mut stream, &workspace, wait).await;
                drop(turn);
            });
        }
        end
    }

    /// Carries the messages of a plain harness to its executor and back, until either ends. Dropping the future resets
    /// the stream, and the executor keeps the session for its time.
    pub async fn converse(
        &mut self,
        conversation: Conversation,
        mut framing: Framing,
        first: Bytes,
        names: &Names<'_>,
        settings: &config::Link,
    ) -> HarnessEnd {
        let Self { sink, source, heard, traffic, outbox, history } = self;
        let Conversation { mut sender, mut receiver } = conversation;
        outbox.waits_for(sender.lane());
        let form = match &framing {
            Framing::Whole => Form::Text,
            Framing::Frames { stream, .. } => Form::Data(stream.clone(), Endpoint::new(EndpointLimits::default())),
        };
        let mut writing = Writing { form, traffic };
        if let Framing::Frames { received, .. } = &framing {
            source.lacks(received.acknowledgement().0);
        }
        // As many as an executor takes without locking up, whatever the harness asks.
        let slots = Semaphore::new(settings.requests_in_flight_max);
        let talk = async {
            let opening = open(&mut sender, &mut receiver, source, &mut framing, first, names, outbox, settings);
            let hold = opening.await?;
            let upwards = async {
                loop {
                    let json = source.message(&mut framing).await?;
                    match gate::said(&json) {
                        Said::Malformed => outbox.push(gate::malformed()).await?,
                        Said::Initialize { .. } | Said::Request => {
                            // Given back by the answer.
                            slots.acquire().await.map_err(|_| HarnessEnd::Peer)?.forget();
                            sender.send(&json).await?;
                        }
                        Said::Other => sender.send(&json).await?,
                    }
                }
            };
            let downwards = async {
                loop {
                    let json = receiver.next().await?;
                    if gate::is_answer(&json) && slots.available_permits() < settings.requests_in_flight_max {
                        slots.add_permits(1);
                    }
                    outbox.push(json).await?;
                }
            };
            let replaced = async {
                match &hold {
                    Some(hold) => hold.replaced.cancelled().await,
                    None => std::future::pending().await,
                }
                Err(HarnessEnd::Replaced)
            };
            first_end(upwards, downwards, replaced).await
        };
        let end = written(talk, write(sink, outbox, &mut writing, history, heard, settings)).await;
        if end.is_of_executor() {
            flush(sink, outbox, &mut writing, None).await;
        }
        end
    }

    /// Tells the harness why its socket ends, and gives it a moment to take the farewell.
    pub async fn close(mut self, end: HarnessEnd) {
        let Some(frame) = end.farewell() else { return };
        let goodbye = async {
            if self.sink.send(Message::Close(Some(frame))).await.is_ok() {
                // Closing with bytes unread resets the connection; the peer could miss our close frame.
                while self.source.next().await.is_ok() {}
            }
        };
        let _ = timeout(CLOSE_TIMEOUT, goodbye).await;
    }
}

/// The executor's answer to a handshake; a refusal is counted against the workspace.
async fn shaken(stream: &mut StreamHandle, workspace: &WorkspaceId, wait: Duration) -> Result<Delivery, HarnessEnd> {
    match timeout(wait, stream.receive_frame()).await {
        Ok(Ok(delivery)) => Ok(delivery),
        Ok(Err(end)) => {
            if end == StreamEnd::Reset {
                stream.link().handshake_failed(workspace);
            }
            Err(end.into())
        }
        Err(_) => Err(HarnessEnd::Unreachable("the executor did not complete the handshake")),
    }
}

/// Brings a plain harness into an executor session, a new one or one that it had on another socket. Until then its
/// requests are carried out one by one.
#[expect(clippy::too_many_arguments, reason = "both halves of both ends are borrowed apart")]
async fn open<'a, S: AsyncRead + AsyncWrite + Unpin>(
    sender: &mut MessageSender,
    receiver: &mut MessageReceiver,
    source: &mut Source<S>,
    framing: &mut Framing,
    first: Bytes,
    names: &Names<'a>,
    outbox: &Spill,
    settings: &config::Link,
) -> Result<Option<Hold<'a>>, HarnessEnd> {
    let answer_wait = Duration::from_secs(settings.answer_timeout_secs);
    let mut said = first;
    loop {
        match gate::said(&said) {
            Said::Malformed => outbox.push(gate::malformed()).await?,
            Said::Other => sender.send(&said).await?,
            Said::Request => {
                sender.send(&said).await?;
                let answer = answer(receiver, outbox, answer_wait).await?;
                outbox.push(answer).await?;
            }
            Said::Initialize { id, resume } => {
                let session = resume.as_deref().and_then(names.open);
                if let (Some(name), None) = (&resume, &session) {
                    outbox.push(gate::error(&id, INVALID_REQUEST, &format!("unknown session id {name}"))).await?;
                    said = source.message(framing).await?;
                    continue;
                }
                // Before the executor is asked: the socket that had the session may be dead and not know it.
                let held = session.as_ref().map(|session| names.attached.hold(session));
                let request = gate::initialize(&said, session.as_ref());
                let detaching = Detaching::begin();
                let reply = loop {
                    sender.send(&request).await?;
                    let reply = answer(receiver, outbox, answer_wait).await?;
                    if session.is_none() || !gate::is_attached(&reply) || !detaching.again().await {
                        break reply;
                    }
                };
                // A stock harness gives up a session that comes back under another name than the one it asked for.
                let name = |given: &ExecutorSessionId| match &resume {
                    Some(name) if session.as_ref() == Some(given) => name.clone(),
                    _ => (names.seal)(given),
                };
                let Some((reply, given)) = gate::initialized(&reply, &name) else {
                    outbox.push(reply).await?;
                    said = source.message(framing).await?;
                    continue;
                };
                outbox.push(reply).await?;
                return Ok(held.or_else(|| Some(names.attached.hold(&given?))));
            }
        }
        said = source.message(framing).await?;
    }
}

/// The executor's next answer; what else it says goes to the harness.
async fn answer(receiver: &mut MessageReceiver, outbox: &Spill, wait: Duration) -> Result<Bytes, HarnessEnd> {
    let until = Instant::now() + wait;
    loop {
        let next = timeout_at(until, receiver.next()).await;
        let json = next.map_err(|_| HarnessEnd::Unreachable("the executor does not answer"))??;
        if gate::is_answer(&json) {
            return Ok(json);
        }
        outbox.push(json).await?;
    }
}

/// Runs three loops until one of them ends.
async fn first_end(
    one: impl Future<Output = Result<(), HarnessEnd>>,
    two: impl Future<Output = Result<(), HarnessEnd>>,
    three: impl Future<Output = Result<(), HarnessEnd>>,
) -> Result<(), HarnessEnd> {
    tokio::select! {
        end = one => end,
        end = two => end,
        end = three => end,
    }
}

/// Runs what fills the outbox, and behind it in the same poll what empties it: the outbox wakes nobody.
async fn written(
    words: impl Future<Output = Result<(), HarnessEnd>>,
    writes: impl Future<Output = Result<(), HarnessEnd>>,
) -> HarnessEnd {
    let end = tokio::select! {
        biased;
        end = words => end,
        // However much of its turn the task has used up by then: this comes last each time, and writes what is there.
        end = unconstrained(writes) => end,
    };
    end.err().unwrap_or(HarnessEnd::Peer)
}

/// Writes to the harness what is queued, and pings it; while its socket is broken, neither.
async fn write<S: AsyncRead + AsyncWrite + Unpin>(
    sink: &mut Sink<S>,
    outbox: &Spill,
    writing: &mut Writing<'_>,
    history: &mut Option<History<S>>,
    heard: &Heard,
    settings: &config::Link,
) -> Result<(), HarnessEnd> {
    let dead = Duration::from_secs(settings.dead_secs);
    let ping_every = Duration::from_secs(settings.ping_secs);
    let mut ping = interval_at(Instant::now() + ping_every, ping_every);
    ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut broken = false;
    loop {
        let (mut sent, turns) = match history {
            Some(History { sent, turns, .. }) => (Some(sent), Some(turns)),
            None => (None, None),
        };
        let turn = async {
            match turns {
                Some(turns) => turns.recv().await,
                None => None,
            }
        };
        let step = async {
            tokio::select! {
                biased;
                _ = ping.tick() => {
                    if heard.silence() >= dead {
                        return Err(HarnessEnd::Silent);
                    }
                    if broken {
                        return Ok(());
                    }
                    timeout(dead, async { Ok(sink.send(Message::Ping(Bytes::new())).await?) }).await
                }
                next = outbox.pop(), if !broken => {
                    let (next, traffic) = (next?, writing.traffic);
                    Ok(while_taken(traffic, dead, write_batch(sink, next, outbox, writing, sent.as_deref_mut())).await)
                }
            }
            .unwrap_or(Err(HarnessEnd::Silent))
        };
        let (turn, mut written) = tokio::select! {
            biased;
            // Also while a write takes its time to fail: what was begun is in the history.
            Some(turn) = turn => (Some(turn), Ok(())),
            written = step => (None, written),
        };
        match (turn, &*history) {
            (Some(Turn::Back { sink: next, harness_lacks, gateway_lacks }), Some(history)) => {
                (*sink, broken) = (next, false);
                let back = timeout(dead, go_on(sink, history, harness_lacks, gateway_lacks)).await;
                written = back.unwrap_or(Err(HarnessEnd::Silent));
            }
            (Some(_), _) => broken = true,
            (None, _) => {}
        }
        match written {
            // The reading half finds out whether the harness comes back.
            Err(HarnessEnd::Peer) if history.is_some() => broken = true,
            written => written?,
        }
        if outbox.is_behind() && !broken {
            // Its socket is full, so what was written was room that it had made by reading. Its pongs may be long in
            // coming: our pings stand behind all that it has not read.
            heard.now();
        }
    }
}

/// Waits for a write as long as the harness goes on taking messages, however slowly; one that takes none for so long is
/// gone.
async fn while_taken(
    traffic: &Traffic,
    dead: Duration,
    write: impl Future<Output = Result<(), HarnessEnd>>,
) -> Result<(), HarnessEnd> {
    let mut write = pin!(write);
    loop {
        let before = traffic.frames_out.load(Ordering::Relaxed);
        match timeout(dead, &mut write).await {
            Ok(written) => return written,
            Err(_) if traffic.frames_out.load(Ordering::Relaxed) > before => {}
            Err(_) => return Err(HarnessEnd::Silent),
        }
    }
}

/// Tells a harness that is back what the gateway lacks, and sends what the harness does.
async fn go_on<S: AsyncRead + AsyncWrite + Unpin>(
    sink: &mut Sink<S>,
    history: &History<S>,
    harness_lacks: u32,
    gateway_lacks: u32,
) -> Result<(), HarnessEnd> {
    let frame = |body| Message::Binary(Frame { stream_id: history.stream.clone(), body }.encode());
    let frames = match history.sent.since(harness_lacks) {
        Ok(frames) => frames,
        Err(end) => {
            sink.send(frame(Body::Reset { reason: "no longer kept".into() })).await?;
            return Err(end);
        }
    };
    sink.feed(frame(Body::Resume { next_seq: gateway_lacks })).await?;
    for wire in frames {
        sink.feed(Message::Binary(wire)).await?;
    }
    Ok(sink.flush().await?)
}

/// Writes one message and those that wait behind it in memory, then flushes once. Kept is what is given to the socket,
/// whatever becomes of it.
async fn write_batch<S: AsyncRead + AsyncWrite + Unpin>(
    sink: &mut Sink<S>,
    first: Bytes,
    outbox: &Spill,
    writing: &mut Writing<'_>,
    mut sent: Option<&mut Sent>,
) -> Result<(), HarnessEnd> {
    let mut next = Some(first);
    let mut room = WRITE_BATCH;
    while let Some(bytes) = next {
        let message = writing.message(bytes)?;
        if let (Some(sent), Message::Binary(wire)) = (&mut sent, &message) {
            sent.push(wire);
        }
        sink.feed(message).await?;
        room -= 1;
        next = if room > 0 { outbox.try_pop()? } else { None };
    }
    Ok(sink.flush().await?)
}

/// Writes what is left after the executor's side has ended, for a moment.
async fn flush<S: AsyncRead + AsyncWrite + Unpin>(
    sink: &mut Sink<S>,
    outbox: &Spill,
    writing: &mut Writing<'_>,
    last: Option<Bytes>,
) {
    let flushing = async {
        while !outbox.is_empty() {
            let next = outbox.pop().await?;
            write_batch(sink, next, outbox, writing, None).await?;
        }
        if let Some(last) = last {
            sink.send(Message::Binary(last)).await?;
        }
        Ok::<_, HarnessEnd>(())
    };
    let _ = timeout(CLOSE_TIMEOUT, flushing).await;
}
