//! However a byte stream is cut into records, it holds the same messages and ends in the same error.

use bytes::{Bytes, BytesMut};
use exec_gateway_protocol::message::{MessageError, MessageReader, write_message};

const MAX: usize = 300;

/// The first byte says how many of the following ones are record lengths; the rest is the stream.
pub fn run(input: &[u8]) {
    let Some((&count, rest)) = input.split_first() else { return };
    let (cuts, stream) = rest.split_at(rest.len().min(count as usize % 16));
    let whole = read([Bytes::copy_from_slice(stream)]);

    let mut left = Bytes::copy_from_slice(stream);
    let mut records = Vec::new();
    for cut in cuts {
        records.push(left.split_to(left.len().min(*cut as usize)));
    }
    records.extend(left.chunks(7).map(Bytes::copy_from_slice));
    assert_eq!(read(records), whole);

    let mut written = BytesMut::new();
    whole.0.iter().for_each(|message| write_message(&mut written, message));
    assert!(stream.starts_with(&written), "the messages are what the stream begins with");
    assert_eq!(read([written.freeze()]), (whole.0, None));
}

fn read(records: impl IntoIterator<Item = Bytes>) -> (Vec<Bytes>, Option<MessageError>) {
    let mut reader = MessageReader::new(MAX);
    let mut messages = Vec::new();
    for record in records {
        reader.push(record);
        loop {
            match reader.next() {
                Ok(Some(message)) => messages.push(message),
                Ok(None) => break,
                Err(error) => return (messages, Some(error)),
            }
        }
    }
    (messages, None)
}
