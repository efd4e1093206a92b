//! The relay frame, the one message on an executor's socket, read and written by hand so that nothing is copied.
//! Links and harness sockets use it; it never looks into a payload and knows nothing of order (see `endpoint`).
//!
//! Accepts exactly what prost accepts for the schema of `codex-exec-server.md` §3.2, less what executors would drop
//! anyway: another version than 1, a blank or over-long stream id, no body, an empty payload or reason, impossible
//! segment numbers, and groups. Both ends reading the same bytes alike is what makes routing by stream id safe.

use std::borrow::Borrow;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::ops::Range;

use bytes::{BufMut, Bytes, BytesMut};

/// The only version that executors speak.
const VERSION: u64 = 1;
/// Longest stream id in bytes. Real ones are UUIDs; a route table must not be filled with novels.
pub const STREAM_ID_BYTES_MAX: usize = 256;

/// One relay message of one stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// The stream it belongs to, chosen by the harness.
    pub stream_id: StreamId,
    /// What it says.
    pub body: Body,
}

/// What a frame says. `Debug` shows sizes of payloads, never their bytes.
#[derive(Clone, PartialEq, Eq)]
pub enum Body {
    /// A piece of the conversation.
    Data(Data),
    /// An acknowledgement; executors ignore it.
    Ack,
    /// The first frame of a harness.
    Resume {
        /// The sequence number the sender goes on with; 0 at the start.
        next_seq: u32,
    },
    /// The end of the stream.
    Reset {
        /// Untrusted text for people, never empty.
        reason: String,
    },
    /// A sign of life; executors ignore it.
    Heartbeat,
    /// A message of the encrypted handshake.
    Handshake {
        /// The Noise message, never empty.
        payload: Bytes,
    },
}

/// A piece of the conversation. `Debug` shows the size of the payload, never its bytes.
#[derive(Clone, PartialEq, Eq)]
pub struct Data {
    /// Counts frames per stream and direction, from 0.
    pub seq: u32,
    /// Which segment of its message this is, below `segment_count`.
    pub segment_index: u32,
    /// How many segments the message has; executors always say 1.
    pub segment_count: u32,
    /// The bytes, never empty.
    pub payload: Bytes,
}

impl fmt::Debug for Data {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Data")
            .field("seq", &self.seq)
            .field("segment", &format_args!("{}/{}", self.segment_index, self.segment_count))
            .field("payload_bytes", &self.payload.len())
            .finish()
    }
}

impl fmt::Debug for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Data(data) => data.fmt(f),
            Self::Ack => f.write_str("Ack"),
            Self::Resume { next_seq } => f.debug_struct("Resume").field("next_seq", next_seq).finish(),
            Self::Reset { reason } => f.debug_struct("Reset").field("reason", reason).finish(),
            Self::Heartbeat => f.write_str("Heartbeat"),
            Self::Handshake { payload } => f.debug_struct("Handshake").field("payload_bytes", &payload.len()).finish(),
        }
    }
}

/// Why bytes are not a relay frame.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The bytes end inside a field.
    #[error("the frame ends inside a field")]
    Truncated,
    /// A number of more than 64 bits.
    #[error("a number does not fit 64 bits")]
    Varint,
    /// A field number of 0 or beyond 29 bits, or a wire type that does not exist.
    #[error("a field has an impossible key")]
    Key,
    /// Groups were never part of this protocol.
    #[error("groups are not accepted")]
    Group,
    /// A known field has the wrong wire type.
    #[error("field {field} has the wrong wire type")]
    WireType {
        /// The field's number within its message.
        field: u32,
    },
    /// A text field is not UTF-8.
    #[error("field {field} is not UTF-8")]
    Utf8 {
        /// The field's number within its message.
        field: u32,
    },
    /// The version is not 1.
    #[error("frame version {0} is not 1")]
    Version(u32),
    /// The stream id is missing or only white space.
    #[error("the stream id is blank")]
    BlankStreamId,
    /// The stream id is longer than [`STREAM_ID_BYTES_MAX`].
    #[error("the stream id has {bytes} bytes, more than {STREAM_ID_BYTES_MAX}")]
    LongStreamId {
        /// Its length in bytes.
        bytes: usize,
    },
    /// No body that we know.
    #[error("the frame has no body")]
    NoBody,
    /// Data or handshake without bytes.
    #[error("the payload is empty")]
    EmptyPayload,
    /// A reset without a reason.
    #[error("the reset has no reason")]
    EmptyReason,
    /// `segment_index` is not below `segment_count`.
    #[error("segment {index} of {count} cannot be")]
    BadSegments {
        /// The index that was read.
        index: u32,
        /// The count that was read.
        count: u32,
    },
}

/// The id of one stream: UTF-8, not blank, at most [`STREAM_ID_BYTES_MAX`] bytes. Cloning never copies.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct StreamId(Bytes);

impl StreamId {
    /// Copies the text once.
    ///
    /// # Errors
    /// [`FrameError::BlankStreamId`] and [`FrameError::LongStreamId`].
    pub fn new(text: &str) -> Result<Self, FrameError> {
        check_stream_id(text)?;
        Ok(Self(Bytes::copy_from_slice(text.as_bytes())))
    }

    /// The text as it stands on the wire.
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).expect("both ways to make a stream id check that it is UTF-8")
    }

    /// The same id with memory of its own. A decoded id keeps the whole frame it came in alive, so what outlives the
    /// frame, such as the key of a route, should be detached.
    pub fn detached(&self) -> Self {
        Self(Bytes::copy_from_slice(&self.0))
    }
}

impl Hash for StreamId {
    fn hash<H: Hasher>(&self, state: &mut H) {
        // Maps are asked by `&str` too, and a byte slice hashes differently.
        self.as_str().hash(state);
    }
}

impl Borrow<str> for StreamId {
    fn borrow(&self) -> &str {
        self.as_str()
    }
}

impl fmt::Display for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Harnesses choose the text: quoted, so that it cannot draw lines of its own into a log.
        fmt::Debug::fmt(self.as_str(), f)
    }
}

fn check_stream_id(text: &str) -> Result<(), FrameError> {
    if text.len() > STREAM_ID_BYTES_MAX {
        return Err(FrameError::LongStreamId { bytes: text.len() });
    }
    if text.trim().is_empty() {
        return Err(FrameError::BlankStreamId);
    }
    Ok(())
}

impl Frame {
    /// Reads one frame. Stream id and payload are slices of `input`; nothing is copied but the reason of a reset.
    ///
    /// # Errors
    /// Any [`FrameError`]; the bytes should then be dropped, as executors do.
    pub fn decode(input: Bytes) -> Result<Self, FrameError> {
        let mut fields = Fields::new(&input);
        let mut head = Head::default();
        let mut body = Draft::None;
        while let Some((field, wire)) = fields.key()? {
            match field {
                5 => body = Draft::Data(body.data().merge(fields.message(field, wire)?)?),
                6 => body = fields.empty_message(field, wire, Draft::Ack)?,
                7 => body = Draft::Resume(resume(body.next_seq(), fields.message(field, wire)?)?),
                8 => body = Draft::Reset(text_at_1(body.reason(), fields.message(field, wire)?)?),
                9 => body = fields.empty_message(field, wire, Draft::Heartbeat)?,
                10 => body = Draft::Handshake(bytes_at_1(body.handshake(), fields.message(field, wire)?)?),
                _ => head.take(&mut fields, field, wire)?,
            }
        }
        let stream_id = head.finish(&input)?;
        let body = body.finish(&input)?;
        Ok(Self { stream_id: StreamId(input.slice(stream_id)), body })
    }

    /// Writes the frame into one exactly sized buffer, proto3 defaults omitted.
    ///
    /// A frame with an empty payload or reason can be written, but [`Frame::decode`] and executors drop it.
    pub fn encode(&self) -> Bytes {
        match &self.body {
            Body::Data(data) => {
                let mut out = BytesMut::with_capacity(data_header_len(&self.stream_id, data) + data.payload.len());
                put_data_header(&mut out, &self.stream_id, data, data.payload.len());
                out.put_slice(&data.payload);
                out.freeze()
            }
            Body::Ack => self.encode_small(6, |_| {}),
            Body::Resume { next_seq } => self.encode_small(7, |out| put_number(out, 1, *next_seq)),
            Body::Reset { reason } => self.encode_small(8, |out| put_bytes(out, 1, reason.as_bytes())),
            Body::Heartbeat => self.encode_small(9, |_| {}),
            Body::Handshake { payload } => self.encode_small(10, |out| put_bytes(out, 1, payload)),
        }
    }

    /// The rare bodies: written aside first, because their length precedes them.
    fn encode_small(&self, field: u32, write: impl FnOnce(&mut BytesMut)) -> Bytes {
        let mut body = BytesMut::new();
        write(&mut body);
        let mut out = BytesMut::with_capacity(self.stream_id.0.len() + body.len() + 32);
        put_head(&mut out, &self.stream_id);
        put_key(&mut out, field, LENGTH);
        put_varint(&mut out, body.len() as u64);
        out.put_slice(&body);
        out.freeze()
    }
}

/// Everything of a data frame (segment 0 of 1) but its payload of `payload_len` bytes, which the caller writes behind
/// it: encryption goes straight into the buffer. There is room for the payload and `reserve` bytes more, so a cipher
/// that works in place needs no second allocation.
pub fn data_header(stream_id: &StreamId, seq: u32, payload_len: usize, reserve: usize) -> BytesMut {
    let data = Data { seq, segment_index: 0, segment_count: 1, payload: Bytes::new() };
    let mut out = BytesMut::with_capacity(HEADER_BYTES_MAX + stream_id.0.len() + payload_len + reserve);
    put_data_header(&mut out, stream_id, &data, payload_len);
    out
}

/// The stream id of a frame that is handed on untouched. Checks what [`Frame::decode`] checks outside of the body,
/// which stays unopened; a frame that neither end would read may pass.
///
/// # Errors
/// Any [`FrameError`] that does not concern the body.
pub fn peek_stream_id(input: &[u8]) -> Result<&str, FrameError> {
    let mut fields = Fields::new(input);
    let mut head = Head::default();
    while let Some((field, wire)) = fields.key()? {
        match field {
            5..=10 => _ = fields.message(field, wire)?,
            _ => head.take(&mut fields, field, wire)?,
        }
    }
    let range = head.finish(input)?;
    Ok(std::str::from_utf8(&input[range]).expect("checked when the field was read"))
}

/// The fields outside of the body, gathered in wire order: the last of each wins.
#[derive(Default)]
struct Head {
    version: u32,
    stream_id: Range<usize>,
}

impl Head {
    fn take(&mut self, fields: &mut Fields<'_>, field: u32, wire: u8) -> Result<(), FrameError> {
        match field {
            1 => self.version = fields.number(field, wire)?,
            2 => self.stream_id = fields.text(field, wire)?,
            // Nobody uses acknowledgements or trace contexts here, yet a reader of the schema would refuse them
            // when they are malformed, and so do we.
            3 | 4 => _ = fields.number(field, wire)?,
            11 | 12 => _ = fields.text(field, wire)?,
            _ => fields.skip(wire)?,
        }
        Ok(())
    }

    fn finish(self, input: &[u8]) -> Result<Range<usize>, FrameError> {
        if u64::from(self.version) != VERSION {
            return Err(FrameError::Version(self.version));
        }
        let text = std::str::from_utf8(&input[self.stream_id.clone()]).expect("checked when the field was read");
        check_stream_id(text)?;
        Ok(self.stream_id)
    }
}

/// The body while fields still come in: a second body of the same kind merges into it, another kind replaces it.
enum Draft {
    None,
    Data(DataDraft),
    Ack,
    Resume(u32),
    Reset(Range<usize>),
    Heartbeat,
    Handshake(Range<usize>),
}

#[derive(Default)]
struct DataDraft {
    seq: u32,
    segment_index: u32,
    segment_count: u32,
    payload: Range<usize>,
}

impl DataDraft {
    fn merge(mut self, mut fields: Fields<'_>) -> Result<Self, FrameError> {
        while let Some((field, wire)) = fields.key()? {
            match field {
                1 => self.seq = fields.number(field, wire)?,
                2 => self.segment_index = fields.number(field, wire)?,
                3 => self.segment_count = fields.number(field, wire)?,
                4 => self.payload = fields.bytes(field, wire)?,
                _ => fields.skip(wire)?,
            }
        }
        Ok(self)
    }
}

impl Draft {
    fn data(self) -> DataDraft {
        if let Self::Data(data) = self { data } else { DataDraft::default() }
    }

    fn next_seq(self) -> u32 {
        if let Self::Resume(next_seq) = self { next_seq } else { 0 }
    }

    fn reason(self) -> Range<usize> {
        if let Self::Reset(reason) = self { reason } else { 0..0 }
    }

    fn handshake(self) -> Range<usize> {
        if let Self::Handshake(payload) = self { payload } else { 0..0 }
    }

    fn finish(self, input: &Bytes) -> Result<Body, FrameError> {
        let filled = |range: Range<usize>, error| if range.is_empty() { Err(error) } else { Ok(range) };
        Ok(match self {
            Self::None => return Err(FrameError::NoBody),
            Self::Data(DataDraft { seq, segment_index, segment_count, payload }) => {
                if segment_index >= segment_count {
                    return Err(FrameError::BadSegments { index: segment_index, count: segment_count });
                }
                let payload = input.slice(filled(payload, FrameError::EmptyPayload)?);
                Body::Data(Data { seq, segment_index, segment_count, payload })
            }
            Self::Ack => Body::Ack,
            Self::Resume(next_seq) => Body::Resume { next_seq },
            Self::Reset(reason) => {
                let reason = &input[filled(reason, FrameError::EmptyReason)?];
                Body::Reset { reason: std::str::from_utf8(reason).expect("checked when the field was read").into() }
            }
            Self::Heartbeat => Body::Heartbeat,
            Self::Handshake(payload) => {
                Body::Handshake { payload: input.slice(filled(payload, FrameError::EmptyPayload)?) }
            }
        })
    }
}

fn resume(mut next_seq: u32, mut fields: Fields<'_>) -> Result<u32, FrameError> {
    while let Some((field, wire)) = fields.key()? {
        match field {
            1 => next_seq = fields.number(field, wire)?,
            _ => fields.skip(wire)?,
        }
    }
    Ok(next_seq)
}

fn text_at_1(mut text: Range<usize>, mut fields: Fields<'_>) -> Result<Range<usize>, FrameError> {
    while let Some((field, wire)) = fields.key()? {
        match field {
            1 => text = fields.text(field, wire)?,
            _ => fields.skip(wire)?,
        }
    }
    Ok(text)
}

fn bytes_at_1(mut bytes: Range<usize>, mut fields: Fields<'_>) -> Result<Range<usize>, FrameError> {
    while let Some((field, wire)) = fields.key()? {
        match field {
            1 => bytes = fields.bytes(field, wire)?,
            _ => fields.skip(wire)?,
        }
    }
    Ok(bytes)
}

const VARINT: u8 = 0;
const FIXED64: u8 = 1;
const LENGTH: u8 = 2;
const FIXED32: u8 = 5;

/// Walks the fields of one message. Positions are those of the whole frame, so that a nested field is a slice of it.
struct Fields<'a> {
    frame: &'a [u8],
    at: usize,
    end: usize,
}

impl<'a> Fields<'a> {
    fn new(frame: &'a [u8]) -> Self {
        Self { frame, at: 0, end: frame.len() }
    }

    /// The next field's number and wire type, `None` at the end.
    fn key(&mut self) -> Result<Option<(u32, u8)>, FrameError> {
        if self.at == self.end {
            return Ok(None);
        }
        let key = u32::try_from(self.varint()?).map_err(|_| FrameError::Key)?;
        match (key >> 3, (key & 7) as u8) {
            (0, _) | (_, 6 | 7) => Err(FrameError::Key),
            (_, 3 | 4) => Err(FrameError::Group),
            key => Ok(Some(key)),
        }
    }

    fn varint(&mut self) -> Result<u64, FrameError> {
        let mut value = 0u64;
        for shift in (0..70).step_by(7) {
            if self.at == self.end {
                return Err(FrameError::Truncated);
            }
            let byte = self.frame[self.at];
            self.at += 1;
            if shift == 63 && byte > 1 {
                return Err(FrameError::Varint);
            }
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(FrameError::Varint)
    }

    fn advance(&mut self, count: u64) -> Result<Range<usize>, FrameError> {
        let count = usize::try_from(count).map_err(|_| FrameError::Truncated)?;
        if count > self.end - self.at {
            return Err(FrameError::Truncated);
        }
        let start = self.at;
        self.at += count;
        Ok(start..self.at)
    }

    /// A `uint32`: proto3 cuts longer numbers to their low 32 bits.
    fn number(&mut self, field: u32, wire: u8) -> Result<u32, FrameError> {
        if wire != VARINT {
            return Err(FrameError::WireType { field });
        }
        Ok(self.varint()? as u32)
    }

    fn bytes(&mut self, field: u32, wire: u8) -> Result<Range<usize>, FrameError> {
        if wire != LENGTH {
            return Err(FrameError::WireType { field });
        }
        let length = self.varint()?;
        self.advance(length)
    }

    fn text(&mut self, field: u32, wire: u8) -> Result<Range<usize>, FrameError> {
        let range = self.bytes(field, wire)?;
        match std::str::from_utf8(&self.frame[range.clone()]) {
            Ok(_) => Ok(range),
            Err(_) => Err(FrameError::Utf8 { field }),
        }
    }

    fn message(&mut self, field: u32, wire: u8) -> Result<Fields<'a>, FrameError> {
        let Range { start, end } = self.bytes(field, wire)?;
        Ok(Fields { frame: self.frame, at: start, end })
    }

    /// A message without known fields: whatever it holds must still be well formed.
    fn empty_message(&mut self, field: u32, wire: u8, draft: Draft) -> Result<Draft, FrameError> {
        let mut inner = self.message(field, wire)?;
        while let Some((_, wire)) = inner.key()? {
            inner.skip(wire)?;
        }
        Ok(draft)
    }

    fn skip(&mut self, wire: u8) -> Result<(), FrameError> {
        match wire {
            VARINT => _ = self.varint()?,
            FIXED64 => _ = self.advance(8)?,
            FIXED32 => _ = self.advance(4)?,
            _ => {
                let length = self.varint()?;
                self.advance(length)?;
            }
        }
        Ok(())
    }
}

/// Keys and numbers of a data frame at their longest: version 2, stream id key and length 3, data key and length 11,
/// seq, index and count 6 each, payload key and length 11.
const HEADER_BYTES_MAX: usize = 45;

fn varint_len(value: u64) -> usize {
    // 7 bits a byte; zero takes one byte as well.
    (64 - (value | 1).leading_zeros() as usize).div_ceil(7)
}

fn number_len(value: u32) -> usize {
    if value == 0 { 0 } else { 1 + varint_len(value.into()) }
}

/// Length of the data message with a payload of `payload_len` bytes, and without its own key and length.
fn data_len(data: &Data, payload_len: usize) -> usize {
    let payload = if payload_len == 0 { 0 } else { 1 + varint_len(payload_len as u64) + payload_len };
    number_len(data.seq) + number_len(data.segment_index) + number_len(data.segment_count) + payload
}

/// Length of a whole data frame without the payload's bytes.
fn data_header_len(stream_id: &StreamId, data: &Data) -> usize {
    let inner = data_len(data, data.payload.len());
    let id = stream_id.0.len();
    2 + 1 + varint_len(id as u64) + id + 1 + varint_len(inner as u64) + inner - data.payload.len()
}

fn put_data_header(out: &mut BytesMut, stream_id: &StreamId, data: &Data, payload_len: usize) {
    put_head(out, stream_id);
    put_key(out, 5, LENGTH);
    put_varint(out, data_len(data, payload_len) as u64);
    put_number(out, 1, data.seq);
    put_number(out, 2, data.segment_index);
    put_number(out, 3, data.segment_count);
    if payload_len > 0 {
        put_key(out, 4, LENGTH);
        put_varint(out, payload_len as u64);
    }
}

fn put_head(out: &mut BytesMut, stream_id: &StreamId) {
    put_key(out, 1, VARINT);
    put_varint(out, VERSION);
    put_bytes(out, 2, &stream_id.0);
}

fn put_number(out: &mut BytesMut, field: u32, value: u32) {
    if value != 0 {
        put_key(out, field, VARINT);
        put_varint(out, value.into());
    }
}

fn put_bytes(out: &mut BytesMut, field: u32, bytes: &[u8]) {
    if !bytes.is_empty() {
        put_key(out, field, LENGTH);
        put_varint(out, bytes.len() as u64);
        out.put_slice(bytes);
    }
}

fn put_key(out: &mut BytesMut, field: u32, wire: u8) {
    put_varint(out, u64::from(field << 3 | u32::from(wire)));
}

fn put_varint(out: &mut BytesMut, mut value: u64) {
    while value >= 0x80 {
        out.put_u8(value as u8 | 0x80);
        value >>= 7;
    }
    out.put_u8(value as u8);
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;
    use prost::Message;

    use super::*;

    /// The schema of `codex-exec-server.md` §3.2 as prost reads it.
    #[derive(Clone, PartialEq, Message)]
    struct ProtoFrame {
        #[prost(uint32, tag = "1")]
        version: u32,
        #[prost(string, tag = "2")]
        stream_id: String,
        #[prost(uint32, tag = "3")]
        ack: u32,
        #[prost(uint32, tag = "4")]
        ack_bits: u32,
        #[prost(oneof = "ProtoBody", tags = "5, 6, 7, 8, 9, 10")]
        body: Option<ProtoBody>,
        #[prost(string, optional, tag = "11")]
        traceparent: Option<String>,
        #[prost(string, optional, tag = "12")]
        tracestate: Option<String>,
    }

    #[derive(Clone, PartialEq, prost::Oneof)]
    enum ProtoBody {
        #[prost(message, tag = "5")]
        Data(ProtoData),
        #[prost(message, tag = "6")]
        Ack(ProtoEmpty),
        #[prost(message, tag = "7")]
        Resume(ProtoResume),
        #[prost(message, tag = "8")]
        Reset(ProtoReset),
        #[prost(message, tag = "9")]
        Heartbeat(ProtoEmpty),
        #[prost(message, tag = "10")]
        Handshake(ProtoHandshake),
    }

    #[derive(Clone, PartialEq, Message)]
    struct ProtoData {
        #[prost(uint32, tag = "1")]
        seq: u32,
        #[prost(uint32, tag = "2")]
        segment_index: u32,
        #[prost(uint32, tag = "3")]
        segment_count: u32,
        #[prost(bytes = "bytes", tag = "4")]
        payload: Bytes,
    }

    #[derive(Clone, PartialEq, Message)]
    struct ProtoEmpty {}

    #[derive(Clone, PartialEq, Message)]
    struct ProtoResume {
        #[prost(uint32, tag = "1")]
        next_seq: u32,
    }

    #[derive(Clone, PartialEq, Message)]
    struct ProtoReset {
        #[prost(string, tag = "1")]
        reason: String,
    }

    #[derive(Clone, PartialEq, Message)]
    struct ProtoHandshake {
        #[prost(bytes = "bytes", tag = "1")]
        payload: Bytes,
    }

    impl From<&Frame> for ProtoFrame {
        fn from(frame: &Frame) -> Self {
            let body = match frame.body.clone() {
                Body::Data(Data { seq, segment_index, segment_count, payload }) => {
                    ProtoBody::Data(ProtoData { seq, segment_index, segment_count, payload })
                }
                Body::Ack => ProtoBody::Ack(ProtoEmpty {}),
                Body::Resume { next_seq } => ProtoBody::Resume(ProtoResume { next_seq }),
                Body::Reset { reason } => ProtoBody::Reset(ProtoReset { reason }),
                Body::Heartbeat => ProtoBody::Heartbeat(ProtoEmpty {}),
                Body::Handshake { payload } => ProtoBody::Handshake(ProtoHandshake { payload }),
            };
            ProtoFrame { version: 1, stream_id: frame.stream_id.to_string(), body: Some(body), ..Default::default() }
        }
    }

    /// What the stricter rules of this module leave of what prost has read.
    fn accepted(proto: ProtoFrame) -> Option<Frame> {
        let stream_id = StreamId::new(&proto.stream_id).ok()?;
        let body = match proto.body? {
            ProtoBody::Data(ProtoData { seq, segment_index, segment_count, payload }) => {
                let possible = !payload.is_empty() && segment_index < segment_count;
                possible.then_some(Body::Data(Data { seq, segment_index, segment_count, payload }))?
            }
            ProtoBody::Ack(_) => Body::Ack,
            ProtoBody::Resume(ProtoResume { next_seq }) => Body::Resume { next_seq },
            ProtoBody::Reset(ProtoReset { reason }) => (!reason.is_empty()).then_some(Body::Reset { reason })?,
            ProtoBody::Heartbeat(_) => Body::Heartbeat,
            ProtoBody::Handshake(ProtoHandshake { payload }) => {
                (!payload.is_empty()).then_some(Body::Handshake { payload })?
            }
        };
        (proto.version == 1).then_some(Frame { stream_id, body })
    }

    fn agrees_with_prost(bytes: Vec<u8>) -> Result<(), TestCaseError> {
        let ours = Frame::decode(bytes.clone().into());
        if ours == Err(FrameError::Group) {
            return Ok(());
        }
        prop_assert_eq!(ours.ok(), ProtoFrame::decode(&bytes[..]).ok().and_then(accepted));
        Ok(())
    }

    fn payloads() -> impl Strategy<Value = Bytes> {
        prop_oneof![
            prop::collection::vec(any::<u8>(), 1..40),
            prop::collection::vec(any::<u8>(), 120..136),
            Just(vec![7; 61_456]),
        ]
        .prop_map(Bytes::from)
    }

    fn numbers() -> impl Strategy<Value = u32> {
        prop_oneof![0..3u32, 126..130u32, any::<u32>(), Just(u32::MAX)]
    }

    fn frames() -> impl Strategy<Value = Frame> {
        let data = (numbers(), numbers(), numbers(), payloads()).prop_map(|(seq, a, b, payload)| {
            let (segment_index, segment_count) = (a.min(b).min(u32::MAX - 1), a.max(b).max(1));
            let segment_index = segment_index.min(segment_count - 1);
            Body::Data(Data { seq, segment_index, segment_count, payload })
        });
        let body = prop_oneof![
            4 => data,
            1 => Just(Body::Ack),
            1 => numbers().prop_map(|next_seq| Body::Resume { next_seq }),
            1 => "\\PC{1,20}".prop_map(|reason| Body::Reset { reason }),
            1 => Just(Body::Heartbeat),
            1 => payloads().prop_map(|payload| Body::Handshake { payload }),
        ];
        let ids = prop_oneof!["[0-9a-f-]{36}", "\\PC{1,60}"].prop_filter_map("blank", |id| StreamId::new(&id).ok());
        (ids, body).prop_map(|(stream_id, body)| Frame { stream_id, body })
    }

    /// Frames of the schema as no honest peer writes them.
    fn odd_frames() -> impl Strategy<Value = ProtoFrame> {
        let traces = (prop::option::of("\\PC{0,9}"), prop::option::of("\\PC{0,9}"));
        (frames(), 0..3u32, numbers(), numbers(), traces, any::<bool>()).prop_map(
            |(frame, version, ack, ack_bits, (traceparent, tracestate), whole)| {
                let proto = ProtoFrame::from(&frame);
                let body = proto.body.clone().filter(|_| whole);
                ProtoFrame { version, ack, ack_bits, traceparent, tracestate, body, ..proto }
            },
        )
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_alike_by_prost_and_by_us(frame in frames()) {
            let written = frame.encode();
            prop_assert_eq!(ProtoFrame::decode(written.clone()).unwrap(), ProtoFrame::from(&frame));
            prop_assert_eq!(&ProtoFrame::from(&frame).encode_to_vec(), &written);
            prop_assert_eq!(peek_stream_id(&written), Ok(frame.stream_id.as_str()));
            prop_assert_eq!(Frame::decode(written), Ok(frame));
        }

        #[test]
        fn a_data_header_is_the_frame_without_its_payload(frame in frames(), reserve in 0..64usize) {
            let Body::Data(Data { seq, payload, .. }) = &frame.body else { return Ok(()) };
            let header = data_header(&frame.stream_id, *seq, payload.len(), reserve);
            prop_assert!(header.capacity() >= header.len() + payload.len() + reserve);
            let data = Data { seq: *seq, segment_index: 0, segment_count: 1, payload: payload.clone() };
            let whole = Frame { stream_id: frame.stream_id, body: Body::Data(data) }.encode();
            prop_assert_eq!([&header[..], payload].concat(), whole);
        }

        #[test]
        fn arbitrary_bytes_are_accepted_exactly_as_by_prost(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            agrees_with_prost(bytes)?;
        }

        #[test]
        fn odd_frames_are_accepted_exactly_as_by_prost(frame in odd_frames()) {
            agrees_with_prost(frame.encode_to_vec())?;
        }

        /// Two messages behind each other are one message that prost merges.
        #[test]
        fn repeated_fields_merge_as_in_prost(first in odd_frames(), second in odd_frames()) {
            agrees_with_prost([first.encode_to_vec(), second.encode_to_vec()].concat())?;
        }

        #[test]
        fn halves_of_one_data_body_merge_as_in_prost(first in numbers(), second in numbers(), payload in payloads()) {
            let half = |data| ProtoFrame {
                version: 1, stream_id: "s".into(), body: Some(ProtoBody::Data(data)), ..Default::default()
            };
            let first = half(ProtoData { seq: first, segment_count: 1, ..Default::default() });
            let second = half(ProtoData { seq: second, payload, ..Default::default() });
            agrees_with_prost([first.encode_to_vec(), second.encode_to_vec()].concat())?;
        }

        #[test]
        fn damaged_frames_are_accepted_exactly_as_by_prost(
            frame in odd_frames(),
            damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
            cut in prop::option::of(any::<prop::sample::Index>()),
        ) {
            let mut bytes = frame.encode_to_vec();
            // Keys and lengths stand in front; damage inside a long payload would test nothing.
            let reach = bytes.len().min(90);
            for (at, byte) in damage {
                bytes[at.index(reach)] = byte;
            }
            if let Some(cut) = cut {
                bytes.truncate(cut.index(bytes.len()));
            }
            agrees_with_prost(bytes)?;
        }
    }

    /// A frame of stream `s` with these fields behind the version and the id.
    fn frame_with(fields: &[u8]) -> Result<Frame, FrameError> {
        Frame::decode([b"\x08\x01\x12\x01s", fields].concat().into())
    }

    #[test]
    fn what_executors_would_drop_is_refused_by_name() {
        assert_eq!(frame_with(b""), Err(FrameError::NoBody));
        assert_eq!(frame_with(b"\x2a\x02\x18\x01"), Err(FrameError::EmptyPayload));
        assert_eq!(frame_with(b"\x2a\x03\x22\x01x"), Err(FrameError::BadSegments { index: 0, count: 0 }));
        assert_eq!(
            frame_with(b"\x2a\x07\x10\x02\x18\x02\x22\x01x"),
            Err(FrameError::BadSegments { index: 2, count: 2 })
        );
        assert_eq!(frame_with(b"\x42\x00"), Err(FrameError::EmptyReason));
        assert_eq!(frame_with(b"\x42\x03\x0a\x01\xff"), Err(FrameError::Utf8 { field: 1 }));
        assert_eq!(frame_with(b"\x52\x00"), Err(FrameError::EmptyPayload));
        assert_eq!(frame_with(b"\x08\x02\x4a\x00"), Err(FrameError::Version(2)));
        assert_eq!(frame_with(b"\x4a\x00\x12\x01 "), Err(FrameError::BlankStreamId));
        assert_eq!(frame_with(b"\x4a\x00\x6b\x6c"), Err(FrameError::Group));
        assert_eq!(frame_with(b"\x4a\x05"), Err(FrameError::Truncated));
        assert_eq!(frame_with(b"\x4d\x00\x00\x00\x00"), Err(FrameError::WireType { field: 9 }));
        assert_eq!(Frame::decode(Bytes::from_static(b"\x4a\x00")), Err(FrameError::Version(0)));
    }

    #[test]
    fn unknown_fields_of_every_wire_type_are_skipped() {
        let unknown = b"\x68\x96\x01\x71aaaaaaaa\x7a\x03abc\x85\x01aaaa\x4a\x00";
        assert_eq!(frame_with(unknown).unwrap().body, Body::Heartbeat);
    }

    #[test]
    fn a_number_of_more_than_64_bits_is_refused() {
        assert_eq!(frame_with(b"\x18\xff\xff\xff\xff\xff\xff\xff\xff\xff\x02\x4a\x00"), Err(FrameError::Varint));
        assert!(frame_with(b"\x18\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01\x4a\x00").is_ok());
    }

    #[test]
    fn a_decoded_frame_is_made_of_slices_of_its_buffer() {
        let input = frame_with(b"\x2a\x05\x18\x01\x22\x01x").unwrap().encode();
        let within = |part: &[u8]| input.as_ptr_range().contains(&part.as_ptr());
        let frame = Frame::decode(input.clone()).unwrap();
        let Body::Data(data) = frame.body else { panic!("the data that was written") };
        assert!(within(&data.payload) && within(frame.stream_id.as_str().as_bytes()));
        assert!(!within(frame.stream_id.detached().as_str().as_bytes()), "a detached id lets the buffer go");
    }

    #[test]
    fn stream_ids_are_bounded_and_not_blank() {
        assert!(StreamId::new(&"x".repeat(STREAM_ID_BYTES_MAX)).is_ok());
        assert_eq!(StreamId::new(&"x".repeat(257)), Err(FrameError::LongStreamId { bytes: 257 }));
        assert_eq!(StreamId::new("\t \u{2003}"), Err(FrameError::BlankStreamId));
    }

    #[test]
    fn a_map_of_streams_is_asked_by_text() {
        let map = HashMap::from([(StreamId::new("s-1").unwrap(), 7)]);
        assert_eq!(map.get("s-1"), Some(&7));
    }

    #[test]
    fn debug_output_never_shows_a_payload() {
        let frame = Frame {
            stream_id: StreamId::new("s").unwrap(),
            body: Body::Data(Data { seq: 0, segment_index: 0, segment_count: 1, payload: "secret".into() }),
        };
        assert!(!format!("{frame:?}").contains("secret"));
    }
}
