//! The byte stream inside an encrypted stream: messages behind a length of four big-endian bytes, cut into records
//! at any place. Owned by the end of the stream; it never looks into a message.

use std::collections::VecDeque;

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Most plaintext bytes in one record; executors reset a stream that brings more (`codex-exec-server.md` §4.3).
pub const RECORD_BYTES_MAX: usize = 61_440;

/// Longest message that executors take, in bytes.
pub const MESSAGE_BYTES_MAX: usize = 64 << 20;

/// Why records are not messages.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// A message announces no bytes at all.
    #[error("a message announces a length of 0")]
    Empty,
    /// A message announces more than the limit.
    #[error("a message announces {length} bytes, more than {max}")]
    TooLong {
        /// The announced length in bytes.
        length: usize,
        /// The limit in bytes.
        max: usize,
    },
}

/// Cuts records back into messages. `Debug` shows sizes only.
pub struct MessageReader {
    max: usize,
    /// Pushed and not yet looked at. With `next` called after each `push` it never holds more than one record.
    records: VecDeque<Bytes>,
    header: [u8; 4],
    header_len: usize,
    /// A message that spans records. It grows with what came in, never with what was announced.
    body: Vec<u8>,
}

impl std::fmt::Debug for MessageReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MessageReader").field("body_bytes", &self.body.len()).finish_non_exhaustive()
    }
}

impl MessageReader {
    /// A reader of messages of 1 to `max` bytes.
    pub fn new(max: usize) -> Self {
        Self { max, records: VecDeque::new(), header: [0; 4], header_len: 0, body: Vec::new() }
    }

    /// Adds a record. Call [`MessageReader::next`] until it is empty afterwards.
    pub fn push(&mut self, record: Bytes) {
        self.records.push_back(record);
    }

    /// The next complete message, without a copy when its bytes lie within one record.
    ///
    /// # Errors
    /// [`MessageError`] for an impossible length. The stream is then out of step for good: it is told again on every
    /// further call.
    #[expect(clippy::should_implement_trait, reason = "more may come after None, which an iterator must not do")]
    pub fn next(&mut self) -> Result<Option<Bytes>, MessageError> {
        while let Some(record) = self.records.front_mut() {
            if self.header_len < 4 {
                let take = record.len().min(4 - self.header_len);
                record.copy_to_slice(&mut self.header[self.header_len..self.header_len + take]);
                self.header_len += take;
            }
            if self.header_len == 4 {
                let length = checked_length(self.header, self.max)?;
                let missing = length - self.body.len();
                if record.len() >= missing {
                    let rest = record.split_to(missing);
                    self.header_len = 0;
                    if self.body.is_empty() {
                        return Ok(Some(rest));
                    }
                    // Exactly what is missing: a message keeps no spare memory.
                    self.body.reserve_exact(missing);
                    self.body.extend_from_slice(&rest);
                    return Ok(Some(std::mem::take(&mut self.body).into()));
                }
                if self.body.capacity() - self.body.len() < record.len() {
                    // Doubling keeps many records linear; the announced length caps it.
                    self.body.reserve_exact(missing.min(self.body.len().max(record.len())));
                }
                self.body.extend_from_slice(record);
            }
            self.records.pop_front();
        }
        // Told again when the last record ended with the impossible length.
        if self.header_len == 4 {
            checked_length(self.header, self.max)?;
        }
        Ok(None)
    }
}

fn checked_length(header: [u8; 4], max: usize) -> Result<usize, MessageError> {
    match u32::from_be_bytes(header) as usize {
        0 => Err(MessageError::Empty),
        length if length > max => Err(MessageError::TooLong { length, max }),
        length => Ok(length),
    }
}

/// Appends one message. The caller cuts `out` into records of at most [`RECORD_BYTES_MAX`].
///
/// # Panics
/// When `json` does not fit the four bytes of its length; executors refuse all above [`MESSAGE_BYTES_MAX`] anyway.
pub fn write_message(out: &mut BytesMut, json: &[u8]) {
    let length = u32::try_from(json.len()).expect("callers keep messages below MESSAGE_BYTES_MAX");
    out.reserve(4 + json.len());
    out.put_u32(length);
    out.put_slice(json);
}
