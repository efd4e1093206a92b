//! One end of one stream: numbers what is sent, and puts what is received back into order.
//! Owned by whoever ends the stream; it holds no socket, and after an error the owner resets the stream.

use std::collections::{BTreeMap, VecDeque};

use bytes::{Bytes, BytesMut};

use crate::frame::Data;

/// How much one end keeps for its peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EndpointLimits {
    /// How far ahead of the expected frame one may be, in frames. Executors allow 64.
    pub gap_frames_max: u32,
    /// Payload bytes kept while an earlier frame is missing.
    pub gap_bytes_max: usize,
    /// Bytes of one reassembled payload.
    pub message_bytes_max: usize,
}

impl Default for EndpointLimits {
    /// What executors keep themselves (`codex-exec-server.md` §3.2, §4.3): 64 frames, 1 MiB, 64 MiB.
    fn default() -> Self {
        Self { gap_frames_max: 64, gap_bytes_max: 1 << 20, message_bytes_max: 64 << 20 }
    }
}

/// Why a stream cannot go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EndpointError {
    /// All 2^32 - 1 sequence numbers are used; they never wrap, since the cipher's nonces run along.
    #[error("the stream has used all its sequence numbers")]
    Exhausted,
    /// A frame came too far ahead of the expected one.
    #[error("frame {seq} is too far ahead of {expected}")]
    TooFarAhead {
        /// Its sequence number.
        seq: u32,
        /// The number that was expected.
        expected: u32,
    },
    /// Too many bytes wait for a missing frame.
    #[error("too many bytes wait for frame {expected}")]
    GapTooLarge {
        /// The number that was expected.
        expected: u32,
    },
    /// The segments of a message do not follow each other.
    #[error("frame {seq} holds segment {index} of {count}, which does not continue the message")]
    BadSegments {
        /// Its sequence number.
        seq: u32,
        /// The segment's index.
        index: u32,
        /// The segment count it names.
        count: u32,
    },
    /// A reassembled payload is over the limit.
    #[error("a message exceeds {max} bytes")]
    MessageTooLarge {
        /// The limit in bytes.
        max: usize,
    },
}

/// The sequence of one stream, both directions.
#[derive(Debug)]
pub struct Endpoint {
    limits: EndpointLimits,
    next_to_send: u32,
    expected: u32,
    /// Frames after a missing one; at most `gap_frames_max` of them, together at most `gap_bytes_max`.
    early: BTreeMap<u32, Data>,
    early_bytes: usize,
    partial: Option<Partial>,
    /// Complete payloads, taken out by `next`: one `receive` adds at most `gap_frames_max` + 1.
    ready: VecDeque<Bytes>,
}

/// A message of several segments that is not complete yet.
#[derive(Debug)]
struct Partial {
    next_index: u32,
    count: u32,
    bytes: BytesMut,
}

impl Endpoint {
    /// A stream at its beginning: both directions count from 0.
    pub fn new(limits: EndpointLimits) -> Self {
        Self {
            limits,
            next_to_send: 0,
            expected: 0,
            early: BTreeMap::new(),
            early_bytes: 0,
            partial: None,
            ready: VecDeque::new(),
        }
    }

    /// The number for the next frame to send.
    ///
    /// # Errors
    /// [`EndpointError::Exhausted`] after 2^32 - 1 frames.
    pub fn next_seq(&mut self) -> Result<u32, EndpointError> {
        let seq = self.next_to_send;
        self.next_to_send = seq.checked_add(1).ok_or(EndpointError::Exhausted)?;
        Ok(seq)
    }

    /// Takes a frame in any order. Repeated frames are ignored. Call [`Endpoint::next`] until it is empty afterwards.
    ///
    /// # Errors
    /// Any [`EndpointError`]; the stream must then be reset, for a part of it is lost.
    pub fn receive(&mut self, data: Data) -> Result<(), EndpointError> {
        let expected = self.expected;
        if data.seq == u32::MAX {
            return Err(EndpointError::Exhausted);
        }
        if data.seq < expected || self.early.contains_key(&data.seq) {
            return Ok(());
        }
        if data.seq > expected {
            if data.seq - expected > self.limits.gap_frames_max {
                return Err(EndpointError::TooFarAhead { seq: data.seq, expected });
            }
            if data.payload.len() > self.limits.gap_bytes_max - self.early_bytes {
                return Err(EndpointError::GapTooLarge { expected });
            }
            self.early_bytes += data.payload.len();
            self.early.insert(data.seq, data);
            return Ok(());
        }
        self.accept(data)?;
        while let Some(data) = self.early.remove(&self.expected) {
            self.early_bytes -= data.payload.len();
            self.accept(data)?;
        }
        Ok(())
    }

    /// The next complete payload in order. A payload of one segment is the received one, not a copy.
    #[expect(clippy::should_implement_trait, reason = "more may come after None, which an iterator must not do")]
    pub fn next(&mut self) -> Option<Bytes> {
        self.ready.pop_front()
    }

    /// What the peer may forget: the sequence number expected next, and a bit for each of the 32 numbers after it,
    /// lowest first, that is already here.
    pub fn acknowledgement(&self) -> (u32, u32) {
        let bits = self
            .early
            .keys()
            .map(|seq| seq - self.expected - 1)
            .take_while(|distance| *distance < 32)
            .fold(0, |bits, distance| bits | 1 << distance);
        (self.expected, bits)
    }

    /// Takes the frame that was expected.
    fn accept(
        &mut self,
        Data { seq, segment_index: index, segment_count: count, payload }: Data,
    ) -> Result<(), EndpointError> {
        let max = self.limits.message_bytes_max;
        let held = self.partial.as_ref().map_or(0, |partial| partial.bytes.len());
        // An endpoint is also fed by hand-made frames, so the check of the decoder is repeated here.
        let follows = match &self.partial {
            Some(partial) => index == partial.next_index && count == partial.count,
            None => index == 0 && count > 0,
        };
        if !follows {
            return Err(EndpointError::BadSegments { seq, index, count });
        }
        if payload.len() > max.saturating_sub(held) {
            return Err(EndpointError::MessageTooLarge { max });
        }
        self.expected = seq + 1;
        if count == 1 {
            self.ready.push_back(payload);
            return Ok(());
        }
        let partial = self.partial.get_or_insert_with(|| Partial { next_index: 0, count, bytes: BytesMut::new() });
        partial.bytes.extend_from_slice(&payload);
        partial.next_index += 1;
        if partial.next_index == partial.count {
            let whole = self.partial.take().map(|partial| partial.bytes.freeze());
            self.ready.extend(whole);
        }
        Ok(())
    }
}
