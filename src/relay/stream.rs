//! The gateway's end of one stream on a link. Dropping it resets the stream, so that an executor never keeps a
//! conversation nobody listens to.

use bytes::Bytes;
use tokio::sync::mpsc;

use super::lane::Lane;
use super::link::LinkHandle;
use crate::ops::metrics::Held;
use crate::protocol::frame::{Body, Frame, StreamId};

/// Why a stream carries nothing any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StreamEnd {
    /// The executor's socket is gone.
    #[error("the executor's link is gone")]
    Disconnected,
    /// The executor ended this stream; its reason is untrusted text and only logged.
    #[error("the executor reset the stream")]
    Reset,
    /// The workspace may reach the executor no more.
    #[error("the right to reach the executor was withdrawn")]
    Withdrawn,
}

/// What a stream carries, for metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamKind {
    /// Calls of the gateway's own clients.
    Call,
    /// One process session.
    Session,
    /// What a plain harness says.
    PlainHarness,
    /// The frames of an encrypted one.
    EncryptedHarness,
}

impl StreamKind {
    fn name(self) -> &'static str {
        match self {
            Self::Call => "call",
            Self::Session => "session",
            Self::PlainHarness => "plain_harness",
            Self::EncryptedHarness => "encrypted_harness",
        }
    }
}

/// A frame that arrived: as read, and as it stood on the wire for those who only hand it on. Both share its bytes.
#[derive(Debug)]
pub struct Delivery {
    /// What it says.
    pub body: Body,
    /// Its bytes.
    pub wire: Bytes,
}

/// One conversation over a link; made only by `LinkHandle::open_stream`.
#[derive(Debug)]
pub struct StreamHandle {
    lane: Lane,
    inbox: mpsc::Receiver<Delivery>,
    ended: Option<StreamEnd>,
    open: Option<Held>,
}

impl StreamHandle {
    pub(super) fn new(lane: Lane, inbox: mpsc::Receiver<Delivery>) -> Self {
        Self { lane, inbox, ended: None, open: None }
    }

    /// Counts it among the open streams of its kind until it is dropped.
    #[must_use]
    pub fn counted(mut self, kind: StreamKind) -> Self {
        let metrics = self.link().metrics();
        metrics.streams_opened.inc([kind.name()]);
        self.open = Some(Held::one(metrics.streams.of([kind.name()])));
        self
    }

    /// A stream that its holder ends when the workspace's right does, after what it has to say first.
    #[must_use]
    pub fn ended_by_holder(self) -> Self {
        self.link().spare(self.id(), self.lane.route());
        self
    }

    /// Its id on the wire.
    pub fn id(&self) -> &StreamId {
        self.lane.stream()
    }

    /// The link that carries it.
    pub fn link(&self) -> &LinkHandle {
        self.lane.link()
    }

    /// Its place on that link.
    pub(super) fn lane(&self) -> &Lane {
        &self.lane
    }

    /// Queues one encoded frame; waits while the link's outbox is full. Dropping the future queues nothing.
    ///
    /// # Errors
    /// [`StreamEnd::Disconnected`] when the link is gone, [`StreamEnd::Withdrawn`] when the right is.
    pub async fn send(&self, frame: Bytes) -> Result<(), StreamEnd> {
        // A frame after our reset would be taken for the begin of another stream.
        match self.lane.standing().taken.get() {
            Some(end) => Err(*end),
            None => self.lane.send(frame).await,
        }
    }

    /// The next body the executor sent on this stream, in the order of the wire. Cancelling loses nothing.
    ///
    /// # Errors
    /// [`StreamEnd`], on this and every later call.
    pub async fn receive(&mut self) -> Result<Body, StreamEnd> {
        Ok(self.receive_frame().await?.body)
    }

    /// As [`Self::receive`], with the bytes of the frame.
    ///
    /// # Errors
    /// [`StreamEnd`], on this and every later call.
    pub async fn receive_frame(&mut self) -> Result<Delivery, StreamEnd> {
        if let Some(end) = self.ended {
            return Err(end);
        }
        match self.inbox.recv().await {
            Some(Delivery { body: Body::Reset { reason }, .. }) => {
                tracing::debug!(stream = %self.id(), %reason, "executor reset the stream");
                Err(*self.ended.insert(StreamEnd::Reset))
            }
            Some(delivery) => Ok(delivery),
            None => {
                let taken = self.lane.standing().taken.get().copied();
                Err(*self.ended.insert(taken.unwrap_or(StreamEnd::Disconnected)))
            }
        }
    }
}

impl StreamHandle {
    /// Why it ends, for metrics.
    fn reason(&self) -> &'static str {
        match self.lane.standing().taken.get().copied().or(self.ended) {
            None => "closed",
            Some(StreamEnd::Reset) => "reset",
            Some(StreamEnd::Withdrawn) => "withdrawn",
            Some(StreamEnd::Disconnected) if self.link().is_ended() => "disconnected",
            // Its route went while the link stands.
            Some(StreamEnd::Disconnected) => "overrun",
        }
    }
}

impl Drop for StreamHandle {
    fn drop(&mut self) {
        if self.open.is_some() {
            self.link().metrics().streams_ended.inc([self.reason()]);
        }
        // Whoever took the route away has told the executor, or was told by it, and the id may be another's by now.
        if self.link().release(self.id(), self.lane.route()) {
            let reset = Frame { stream_id: self.id().clone(), body: Body::Reset { reason: "closed".into() } };
            self.link().send_detached(reset.encode());
        }
    }
}
