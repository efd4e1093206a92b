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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn drain(reader: &mut MessageReader) -> Vec<Bytes> {
        std::iter::from_fn(|| reader.next().unwrap()).collect()
    }

    #[test]
    fn a_message_within_one_record_is_a_slice_of_it() {
        let mut stream = BytesMut::new();
        write_message(&mut stream, b"{}");
        write_message(&mut stream, b"[1]");
        let record = stream.freeze();
        let mut reader = MessageReader::new(10);
        reader.push(record.clone());
        let messages = drain(&mut reader);
        assert_eq!(messages, ["{}", "[1]"]);
        assert_eq!(messages[1].as_ptr(), record[10..].as_ptr());
    }

    #[test]
    fn an_impossible_length_is_told_and_stays_told() {
        for (length, error) in [(0, MessageError::Empty), (11, MessageError::TooLong { length: 11, max: 10 })] {
            let mut reader = MessageReader::new(10);
            let mut stream = BytesMut::new();
            write_message(&mut stream, b"{}");
            stream.put_u32(length);
            reader.push(stream.freeze());
            assert_eq!(reader.next(), Ok(Some(Bytes::from_static(b"{}"))));
            assert_eq!(reader.next(), Err(error.clone()));
            reader.push(Bytes::from_static(b"more"));
            assert_eq!(reader.next(), Err(error));
        }
    }

    #[test]
    fn a_liar_gets_no_memory_for_what_it_announces() {
        let mut reader = MessageReader::new(MESSAGE_BYTES_MAX);
        reader.push(Bytes::from((MESSAGE_BYTES_MAX as u32).to_be_bytes().to_vec()));
        for _ in 0..10 {
            reader.push(Bytes::from_static(&[7; 100]));
            assert_eq!(reader.next(), Ok(None));
        }
        assert!(reader.body.capacity() <= 2 * 1000, "{} bytes for 1000", reader.body.capacity());
        assert!(reader.records.is_empty());
    }

    #[test]
    fn the_largest_message_in_full_records_comes_out_whole_and_takes_no_more_than_its_size() {
        let json = vec![b'x'; MESSAGE_BYTES_MAX];
        let mut stream = BytesMut::new();
        write_message(&mut stream, &json);
        let mut stream = stream.freeze();
        let mut reader = MessageReader::new(MESSAGE_BYTES_MAX);
        let mut grown = 0;
        while stream.len() > RECORD_BYTES_MAX {
            let before = reader.body.capacity();
            reader.push(stream.split_to(RECORD_BYTES_MAX));
            assert_eq!(reader.next(), Ok(None));
            grown += usize::from(reader.body.capacity() != before);
        }
        assert!(grown < 20, "{grown} growths for 1093 records are not a doubling");
        reader.push(stream);
        let message = reader.next().unwrap().unwrap();
        assert!(message == json, "the message came out changed");
        assert_eq!(Vec::from(message).capacity(), MESSAGE_BYTES_MAX);
    }

    proptest! {
        #[test]
        fn messages_come_out_as_they_went_in_however_the_stream_was_cut(
            messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..50), 0..20),
            cuts in prop::collection::vec(0..60usize, 1..50),
            at_once in any::<bool>(),
        ) {
            let mut stream = BytesMut::new();
            messages.iter().for_each(|message| write_message(&mut stream, message));
            let mut reader = MessageReader::new(50);
            let mut out = Vec::new();
            for cut in cuts.into_iter().chain(std::iter::repeat(13)) {
                if stream.is_empty() {
                    break;
                }
                reader.push(stream.split_to(cut.min(stream.len())).freeze());
                if !at_once {
                    out.extend(drain(&mut reader));
                }
            }
            out.extend(drain(&mut reader));
            prop_assert_eq!(out, messages);
        }
    }
}
