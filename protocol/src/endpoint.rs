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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn data(seq: u32, text: &str) -> Data {
        Data { seq, segment_index: 0, segment_count: 1, payload: Bytes::copy_from_slice(text.as_bytes()) }
    }

    fn segment(seq: u32, segment_index: u32, segment_count: u32, text: &str) -> Data {
        Data { segment_index, segment_count, ..data(seq, text) }
    }

    fn drain(endpoint: &mut Endpoint) -> Vec<Bytes> {
        std::iter::from_fn(|| endpoint.next()).collect()
    }

    #[test]
    fn sequence_numbers_end_before_they_wrap() {
        let mut endpoint = Endpoint::new(EndpointLimits::default());
        assert_eq!((endpoint.next_seq(), endpoint.next_seq()), (Ok(0), Ok(1)));
        endpoint.next_to_send = u32::MAX - 1;
        assert_eq!(endpoint.next_seq(), Ok(u32::MAX - 1));
        assert_eq!(endpoint.next_seq(), Err(EndpointError::Exhausted));
        assert_eq!(endpoint.next_seq(), Err(EndpointError::Exhausted));
        assert_eq!(endpoint.receive(data(u32::MAX, "x")), Err(EndpointError::Exhausted));
    }

    #[test]
    fn a_gap_of_64_is_waited_for_and_one_of_65_is_not() {
        let mut endpoint = Endpoint::new(EndpointLimits::default());
        for seq in (1..=64).rev() {
            endpoint.receive(data(seq, "x")).unwrap();
        }
        assert_eq!(endpoint.receive(data(65, "x")), Err(EndpointError::TooFarAhead { seq: 65, expected: 0 }));
        assert_eq!(endpoint.next(), None);
        assert_eq!(endpoint.acknowledgement(), (0, u32::MAX));
        endpoint.receive(data(0, "x")).unwrap();
        assert_eq!(drain(&mut endpoint).len(), 65);
        assert_eq!(endpoint.acknowledgement(), (65, 0));
    }

    #[test]
    fn bytes_behind_a_gap_are_bounded_and_freed_when_it_closes() {
        let mut endpoint = Endpoint::new(EndpointLimits { gap_bytes_max: 4, ..EndpointLimits::default() });
        endpoint.receive(data(1, "four")).unwrap();
        assert_eq!(endpoint.receive(data(2, "x")), Err(EndpointError::GapTooLarge { expected: 0 }));
        assert_eq!(endpoint.receive(data(1, "four")), Ok(()), "what is here already takes no room");
        endpoint.receive(data(0, "a")).unwrap();
        endpoint.receive(data(3, "more")).unwrap();
        assert_eq!(drain(&mut endpoint), ["a", "four"]);
    }

    #[test]
    fn acknowledgement_bits_count_from_the_frame_after_the_missing_one() {
        let mut endpoint = Endpoint::new(EndpointLimits::default());
        for seq in [0, 1, 3, 5, 34, 35] {
            endpoint.receive(data(seq, "x")).unwrap();
        }
        assert_eq!(endpoint.acknowledgement(), (2, 1 | 1 << 2 | 1 << 31));
    }

    #[test]
    fn a_single_segment_is_handed_on_without_a_copy() {
        let mut endpoint = Endpoint::new(EndpointLimits::default());
        let frame = data(0, "payload");
        endpoint.receive(frame.clone()).unwrap();
        assert_eq!(endpoint.next().unwrap().as_ptr(), frame.payload.as_ptr());
    }

    #[test]
    fn segments_become_one_message_also_when_they_come_in_disorder() {
        let mut endpoint = Endpoint::new(EndpointLimits::default());
        for frame in [segment(2, 2, 3, "c"), segment(0, 0, 3, "a"), data(3, "d"), segment(1, 1, 3, "b")] {
            endpoint.receive(frame).unwrap();
        }
        assert_eq!(drain(&mut endpoint), ["abc", "d"]);
    }

    #[test]
    fn segments_that_do_not_follow_each_other_are_refused() {
        let starts: [(u32, u32); 2] = [(1, 2), (0, 0)];
        for (index, count) in starts {
            let mut endpoint = Endpoint::new(EndpointLimits::default());
            let refused = Err(EndpointError::BadSegments { seq: 0, index, count });
            assert_eq!(endpoint.receive(segment(0, index, count, "x")), refused);
        }
        let follow_ups: [(u32, u32); 4] = [(0, 3), (2, 3), (1, 4), (0, 1)];
        for (index, count) in follow_ups {
            let mut endpoint = Endpoint::new(EndpointLimits::default());
            endpoint.receive(segment(0, 0, 3, "a")).unwrap();
            let refused = Err(EndpointError::BadSegments { seq: 1, index, count });
            assert_eq!(endpoint.receive(segment(1, index, count, "b")), refused);
        }
    }

    #[test]
    fn a_message_is_bounded_over_all_its_segments() {
        let limits = EndpointLimits { message_bytes_max: 4, ..EndpointLimits::default() };
        let mut endpoint = Endpoint::new(limits);
        endpoint.receive(segment(0, 0, 2, "abc")).unwrap();
        assert_eq!(endpoint.receive(segment(1, 1, 2, "de")), Err(EndpointError::MessageTooLarge { max: 4 }));
        assert_eq!(Endpoint::new(limits).receive(data(0, "12345")), Err(EndpointError::MessageTooLarge { max: 4 }));
    }

    /// Frames 0, 1, 2... in an order that keeps each at most `reach` places early, with repetitions thrown in.
    fn shuffled() -> impl Strategy<Value = Vec<u32>> {
        (prop::collection::vec(0..32u32, 1..300), prop::collection::vec(any::<prop::sample::Index>(), 0..50)).prop_map(
            |(delays, repeats)| {
                let mut order: Vec<u32> = (0..delays.len() as u32).collect();
                order.sort_by_key(|seq| (seq + delays[*seq as usize], *seq));
                for repeat in repeats {
                    // A repetition right behind its original stays within every limit.
                    let at = repeat.index(order.len());
                    order.insert(at + 1, order[at]);
                }
                order
            },
        )
    }

    proptest! {
        #[test]
        fn every_payload_comes_once_and_in_order(order in shuffled()) {
            let mut endpoint = Endpoint::new(EndpointLimits::default());
            let mut seen = std::collections::BTreeSet::new();
            let mut out = Vec::new();
            for seq in order {
                seen.insert(seq);
                prop_assert_eq!(endpoint.receive(data(seq, &seq.to_string())), Ok(()));
                out.extend(drain(&mut endpoint));
                let expected = (0..).find(|seq| !seen.contains(seq)).unwrap();
                prop_assert_eq!(out.len(), expected as usize, "what is complete is handed out at once");
                let bits = (0..32).filter(|bit| seen.contains(&(expected + 1 + bit))).fold(0, |bits, bit| bits | 1 << bit);
                prop_assert_eq!(endpoint.acknowledgement(), (expected, bits));
            }
            let wanted: Vec<Bytes> = (0..out.len()).map(|seq| seq.to_string().into()).collect();
            prop_assert_eq!(out, wanted);
        }
    }
}
