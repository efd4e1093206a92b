//! Whatever is read as a frame is written and read again as the same frame, by every way there is to write it.

use bytes::{Bytes, BytesMut};
use exec_gateway_protocol::frame::{Body, Data, Frame, data_header, peek_stream_id};

pub fn run(input: &[u8]) {
    let peeked = peek_stream_id(input);
    let Ok(frame) = Frame::decode(Bytes::copy_from_slice(input)) else { return };
    assert_eq!(peeked, Ok(frame.stream_id.as_str()), "a frame that is routed untouched goes where its reader says");

    let written = frame.encode();
    let again = Frame::decode(written.clone()).expect("what was written can be read");
    assert_eq!(again, frame);
    assert_eq!(again.encode(), written);

    if let Body::Data(Data { seq, segment_index: 0, segment_count: 1, payload }) = &frame.body {
        let mut out: BytesMut = data_header(&frame.stream_id, *seq, payload.len(), 16);
        out.extend_from_slice(payload);
        assert_eq!(out, written);
    }
}
