//! A harness's way back to its own stream after its socket broke.
//!
//! Owned by the task of the broken socket, which goes on with the stream for a while; the task of the next socket finds
//! it in [`Places`] and hands its halves over. Nothing is kept for who has left with a farewell or never sent anything.
//!
//! ```text
//! broken ─► waits ─┬─ Resume{next_seq: what the harness lacks} ─► Resume{next_seq: what the gateway lacks},
//!                  │                                              frames from there on, then as before
//!                  └─ too late, or no longer kept ─► reset
//! ```

use std::collections::VecDeque;
use std::hash::Hash;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use dashmap::DashMap;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::harness::{HarnessEnd, Sink, SourceStream};
use super::link::LinkHandle;
use crate::protocol::frame::{Body, Frame};
use crate::protocol::ids::WorkspaceId;

/// Frames up to this many bytes are copied where they are kept, so that none of them keeps alive the much larger buffer
/// that it was read into.
const COPY_BYTES_MAX: usize = 4096;

/// Who holds what right now. Whoever comes later takes the place of who came before.
pub struct Places<K, V> {
    held: DashMap<K, (u64, V)>,
    next: AtomicU64,
}

impl<K: Eq + Hash, V> Default for Places<K, V> {
    fn default() -> Self {
        Self { held: DashMap::new(), next: AtomicU64::new(0) }
    }
}

/// A place until it is dropped.
pub struct Place<'a, K: Eq + Hash, V> {
    places: &'a Places<K, V>,
    key: K,
    number: u64,
}

impl<K: Eq + Hash + Clone, V: Clone> Places<K, V> {
    /// Takes a place; gives what stood there before.
    pub fn hold(&self, key: K, value: V) -> (Place<'_, K, V>, Option<V>) {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let former = self.held.insert(key.clone(), (number, value));
        (Place { places: self, key, number }, former.map(|(_, value)| value))
    }

    /// What stands there.
    pub fn get(&self, key: &K) -> Option<V> {
        self.held.get(key).map(|held| held.1.clone())
    }
}

impl<K: Eq + Hash, V> Drop for Place<'_, K, V> {
    fn drop(&mut self) {
        self.places.held.remove_if(&self.key, |_, (number, _)| *number == self.number);
    }
}

/// A harness that is back, on another socket.
pub struct Comeback<S> {
    pub(super) sink: Sink<S>,
    pub(super) stream: SourceStream<S>,
    /// The number of the first frame that the harness lacks.
    pub(super) next_seq: u32,
}

/// Where harnesses that are back are handed over.
pub type Comebacks<S> = mpsc::Sender<Comeback<S>>;

/// What the reading half of a broken socket tells the writing half.
pub(super) enum Turn<S> {
    /// Nothing can be written for now.
    Broken,
    /// The harness is back.
    Back {
        sink: Sink<S>,
        /// The number of the first frame that the harness lacks, and of the first that the gateway does.
        harness_lacks: u32,
        gateway_lacks: u32,
    },
}

/// The reading half's part of the way back.
pub(super) struct WayBack<S> {
    pub comebacks: mpsc::Receiver<Comeback<S>>,
    pub turns: mpsc::UnboundedSender<Turn<S>>,
    pub link: LinkHandle,
    pub workspace: WorkspaceId,
    pub wait: Duration,
    /// The number of the first frame that the harness has not sent yet.
    pub gateway_lacks: u32,
}

impl<S> WayBack<S> {
    /// The harness's next socket, if it comes back in time.
    pub async fn wait(&mut self) -> Option<Comeback<S>> {
        // Who has sent nothing has nothing to lose, and an encrypted one may not even have shaken hands. Streams that
        // wait take no place that others may need.
        if self.gateway_lacks == 0 || !self.link.has_half_free(&self.workspace) {
            return None;
        }
        let _ = self.turns.send(Turn::Broken);
        timeout(self.wait, self.comebacks.recv()).await.ok().flatten()
    }

    /// Hands the writing half on; gives the reading half.
    pub fn take_up(&mut self, comeback: Comeback<S>) -> SourceStream<S> {
        let Comeback { sink, stream, next_seq: harness_lacks } = comeback;
        // Its receiver lives as long as the writing loop, which ends with the reading one.
        let _ = self.turns.send(Turn::Back { sink, harness_lacks, gateway_lacks: self.gateway_lacks });
        stream
    }
}

/// The newest frames that were written to a harness: nobody knows which of them a broken socket still delivered.
pub(super) struct Sent {
    frames: VecDeque<Bytes>,
    bytes: usize,
    bytes_max: usize,
    /// The numbers of the oldest frame that is kept, and of the next one to come.
    oldest: u32,
    next: u32,
}

impl Sent {
    pub fn new(bytes_max: usize) -> Self {
        Self { frames: VecDeque::new(), bytes: 0, bytes_max, oldest: 0, next: 0 }
    }

    /// Keeps a frame with data, in place of the oldest ones.
    pub fn push(&mut self, wire: &Bytes) {
        let Ok(Frame { body: Body::Data(data), .. }) = Frame::decode(wire.clone()) else { return };
        self.next = data.seq.saturating_add(1);
        self.bytes += wire.len();
        let copied = wire.len() <= COPY_BYTES_MAX;
        self.frames.push_back(if copied { Bytes::copy_from_slice(wire) } else { wire.clone() });
        while self.bytes > self.bytes_max
            && let Some(oldest) = self.frames.pop_front()
        {
            self.bytes -= oldest.len();
            self.oldest += 1;
        }
    }

    /// The frames from that number on.
    pub fn since(&self, seq: u32) -> Result<impl Iterator<Item = Bytes>, HarnessEnd> {
        if !(self.oldest..=self.next).contains(&seq) {
            return Err(HarnessEnd::Unresumable);
        }
        // Executors and the gateway number without gaps.
        Ok(self.frames.iter().skip((seq - self.oldest) as usize).cloned())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::protocol::frame::{Data, StreamId};

    fn data(seq: u32, length: usize) -> Bytes {
        let payload = vec![seq as u8; length].into();
        let body = Body::Data(Data { seq, segment_index: 0, segment_count: 1, payload });
        Frame { stream_id: StreamId::new("s").unwrap(), body }.encode()
    }

    #[test]
    fn what_was_sent_is_had_again_as_far_as_it_is_kept() {
        let mut sent = Sent::new(3 * data(1, 1000).len());
        assert_eq!(sent.since(0).unwrap().count(), 0);
        for seq in 0..10 {
            sent.push(&data(seq, 1000));
            sent.push(&Frame { stream_id: StreamId::new("s").unwrap(), body: Body::Heartbeat }.encode());
        }
        assert_eq!(sent.since(8).unwrap().collect::<Vec<_>>(), [data(8, 1000), data(9, 1000)]);
        assert_eq!(sent.since(10).unwrap().count(), 0, "it has all of it");
        assert!(sent.since(6).is_err(), "no longer kept");
        assert!(sent.since(11).is_err(), "never sent");
        // One that is larger than all that may be kept.
        sent.push(&data(10, 5000));
        assert!(sent.since(10).is_err() && sent.bytes == 0);
        assert_eq!(sent.since(11).unwrap().count(), 0);
    }

    #[test]
    fn a_place_goes_to_the_latest_and_is_left_by_its_holder_alone() {
        let places = Places::default();
        let (first, former) = places.hold("k", 1);
        assert_eq!(former, None);
        let (second, former) = places.hold("k", 2);
        assert_eq!(former, Some(1));
        drop(first);
        assert_eq!(places.get(&"k"), Some(2));
        drop(second);
        assert_eq!(places.get(&"k"), None);
    }
}
