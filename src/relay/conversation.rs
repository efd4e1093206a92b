//! JSON messages over one stream, whatever carries them there: encrypted records, or plain relay frames.
//!
//! Owned by the end of the stream. It orders, encrypts and puts together; it never looks into a message.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::time::timeout;

use super::lane::Lane;
use super::link::LinkHandle;
use super::noise::{Channel, Context, GatewayIdentity, NoiseError, Pending, TAG_BYTES};
use super::stream::{StreamEnd, StreamHandle};
use crate::protocol::endpoint::{Endpoint, EndpointError, EndpointLimits};
use crate::protocol::frame::{Body, Data, Frame, StreamId, data_header};
use crate::protocol::message::{MessageError, MessageReader, RECORD_BYTES_MAX, write_message};
use crate::store::Transport;

/// What the head of a relay frame takes at most: a stream id of 256 bytes and a few numbers.
const FRAME_HEAD_BYTES: usize = 512;

/// Why no conversation was opened; nothing has run on the executor.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The link or the stream ended meanwhile.
    #[error(transparent)]
    Ended(#[from] StreamEnd),
    /// The handshake failed.
    #[error(transparent)]
    Noise(#[from] NoiseError),
    /// The executor did not finish the handshake in time.
    #[error("the executor did not complete the encrypted handshake in time")]
    Timeout,
}

/// Why a conversation carries nothing any more.
#[derive(Debug, thiserror::Error)]
pub enum ConversationEnd {
    /// The stream ended.
    #[error(transparent)]
    Stream(#[from] StreamEnd),
    /// Frames do not follow each other.
    #[error(transparent)]
    Sequence(#[from] EndpointError),
    /// A record does not decrypt.
    #[error(transparent)]
    Noise(#[from] NoiseError),
    /// A message is too long or empty.
    #[error(transparent)]
    Message(#[from] MessageError),
}

/// Both directions of one conversation, to be used apart. Dropping the receiver ends the stream.
pub struct Conversation {
    /// Towards the executor.
    pub sender: MessageSender,
    /// From the executor.
    pub receiver: MessageReceiver,
}

impl Conversation {
    /// Starts a conversation on a stream, in the way of its executor's transport: encrypted ones are proven the right
    /// to it by `authorization`. Cancelling resets the stream.
    ///
    /// # Errors
    /// [`HandshakeError`].
    pub async fn open(
        mut stream: StreamHandle,
        identity: &GatewayIdentity,
        authorization: &str,
    ) -> Result<Self, HandshakeError> {
        let link = stream.link().clone();
        let coding = match link.registration().transport {
            Transport::Noise => {
                let wait = Duration::from_secs(link.settings().handshake_timeout_secs);
                let shaken = timeout(wait, shake_hands(&mut stream, identity, authorization)).await;
                let shaken = shaken.unwrap_or(Err(HandshakeError::Timeout));
                if !matches!(shaken, Ok(_) | Err(HandshakeError::Ended(StreamEnd::Disconnected | StreamEnd::Withdrawn)))
                {
                    link.metrics().handshakes_failed.inc(["client"]);
                }
                let channel = shaken?;
                Coding::Records(Arc::new(Mutex::new(channel)))
            }
            Transport::Relay | Transport::Direct | Transport::Agentx => {
                // What the executor takes as the birth of a stream (connectors-api.md §2.5).
                let resume = Frame { stream_id: stream.id().clone(), body: Body::Resume { next_seq: 0 } };
                stream.send(resume.encode()).await?;
                Coding::Frames
            }
        };
        let message_bytes_max = link.settings().message_bytes_max;
        let limits = EndpointLimits { message_bytes_max, ..EndpointLimits::default() };
        Ok(Self {
            sender: MessageSender {
                lane: stream.lane().clone(),
                coding: coding.clone(),
                endpoint: Endpoint::new(EndpointLimits::default()),
                payload_bytes_max: link.settings().frame_bytes_max - FRAME_HEAD_BYTES,
            },
            receiver: MessageReceiver {
                stream,
                coding,
                endpoint: Endpoint::new(limits),
                records: MessageReader::new(message_bytes_max),
                whole: VecDeque::new(),
            },
        })
    }
}

async fn shake_hands(
    stream: &mut StreamHandle,
    identity: &GatewayIdentity,
    authorization: &str,
) -> Result<Channel, HandshakeError> {
    let link = stream.link().clone();
    let _turn = link.handshakes().acquire().await;
    link.make_way().await;
    let registration = link.registration();
    let context = Context { executor: &registration.executor, registration: &registration.id, stream: stream.id() };
    let (pending, message) = Pending::initiate(identity, &registration.public_key, &context, authorization.as_bytes())?;
    let frame = Frame { stream_id: stream.id().clone(), body: Body::Handshake { payload: message } };
    stream.send(frame.encode()).await?;
    loop {
        if let Body::Handshake { payload } = stream.receive().await? {
            return Ok(pending.finish(&payload)?);
        }
    }
}

/// How messages stand in the frames of a stream.
#[derive(Clone)]
enum Coding {
    /// Cut into encrypted records (codex-exec-server.md §4.3). The lock is held for the work on one record.
    Records(Arc<Mutex<Channel>>),
    /// One message in the clear in each frame or run of segments (connectors-api.md §2.5).
    Frames,
}

fn lock(channel: &Mutex<Channel>) -> MutexGuard<'_, Channel> {
    channel.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sends messages to the executor.
pub struct MessageSender {
    lane: Lane,
    coding: Coding,
    endpoint: Endpoint,
    payload_bytes_max: usize,
}

impl MessageSender {
    /// The link that carries the messages.
    pub fn link(&self) -> &LinkHandle {
        self.lane.link()
    }

    /// The stream that carries them.
    pub fn stream(&self) -> &StreamId {
        self.lane.stream()
    }

    /// The stream's place on its link.
    pub(super) fn lane(&self) -> &Lane {
        &self.lane
    }

    /// Sends one message; waits, in turn with all others, while the link has no room. A future that is dropped may have
    /// sent a part, after which nothing else may be sent.
    ///
    /// # Errors
    /// [`ConversationEnd`].
    pub async fn send(&mut self, json: &[u8]) -> Result<(), ConversationEnd> {
        match &self.coding {
            Coding::Records(channel) => {
                let mut plain = BytesMut::with_capacity(4 + json.len());
                write_message(&mut plain, json);
                for record in plain.chunks(RECORD_BYTES_MAX) {
                    let length = record.len() + TAG_BYTES;
                    let mut frame = data_header(self.lane.stream(), self.endpoint.next_seq()?, length, length);
                    lock(channel).seal(record, &mut frame)?;
                    self.lane.send(frame.freeze()).await?;
                }
            }
            Coding::Frames => {
                let segments = json.chunks(self.payload_bytes_max);
                let segment_count = u32::try_from(segments.len()).expect("a message has at most 64 MiB");
                for (segment_index, segment) in (0..).zip(segments) {
                    let (seq, payload) = (self.endpoint.next_seq()?, Bytes::copy_from_slice(segment));
                    let body = Body::Data(Data { seq, segment_index, segment_count, payload });
                    self.lane.send(Frame { stream_id: self.lane.stream().clone(), body }.encode()).await?;
                }
            }
        }
        Ok(())
    }
}

/// Receives messages of the executor.
pub struct MessageReceiver {
    stream: StreamHandle,
    coding: Coding,
    endpoint: Endpoint,
    records: MessageReader,
    whole: VecDeque<Bytes>,
}

impl MessageReceiver {
    /// The next message. Cancelling loses nothing.
    ///
    /// # Errors
    /// [`ConversationEnd`]; nothing more comes then.
    pub async fn next(&mut self) -> Result<Bytes, ConversationEnd> {
        loop {
            let ready = match self.coding {
                Coding::Records(_) => self.records.next()?,
                Coding::Frames => self.whole.pop_front(),
            };
            if let Some(message) = ready {
                return Ok(message);
            }
            let Body::Data(data) = self.stream.receive().await? else { continue };
            self.endpoint.receive(data)?;
            while let Some(payload) = self.endpoint.next() {
                match &self.coding {
                    Coding::Records(channel) => self.records.push(lock(channel).open(&payload)?),
                    Coding::Frames => self.whole.push_back(payload),
                }
            }
        }
    }
}
