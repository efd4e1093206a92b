//! What is remembered of credentials: a bounded map from digest to value, least lately used out first.
//!
//! A plain value of its owner: it keeps no time of its own, never sees a credential, and never waits.

use std::hash::{BuildHasherDefault, Hasher};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};

use lru::LruCache;

/// SHA-256 of a credential.
pub(super) type Digest = [u8; 32];

/// Enough that callers on all cores of a large machine seldom meet at one lock.
const SHARDS: usize = 16;

type Shard<V> = LruCache<Digest, V, BuildHasherDefault<DigestHasher>>;

pub(super) struct DigestCache<V> {
    shards: [Mutex<Shard<V>>; SHARDS],
    shard_entries_max: AtomicUsize,
}

impl<V> DigestCache<V> {
    /// Holds `entries_max` entries, rounded up to the number of shards.
    pub(super) fn new(entries_max: usize) -> Self {
        let shard_entries_max = AtomicUsize::new(in_shard(entries_max));
        Self {
            // A bounded `LruCache` allocates its whole table at once, megabytes that most gateways never fill.
            shards: std::array::from_fn(|_| Mutex::new(LruCache::unbounded_with_hasher(Default::default()))),
            shard_entries_max,
        }
    }

    /// Holds as many from now on; what is too much goes.
    pub(super) fn resize(&self, entries_max: usize) {
        self.shard_entries_max.store(in_shard(entries_max), Relaxed);
        for shard in &self.shards {
            let mut shard = lock(shard);
            while shard.len() > in_shard(entries_max) {
                shard.pop_lru();
            }
        }
    }

    /// Reads or changes the entry under its lock, and marks it as used.
    pub(super) fn with<R>(&self, digest: &Digest, read: impl FnOnce(&mut V) -> R) -> Option<R> {
        self.shard(digest).get_mut(digest).map(read)
    }

    /// Puts the entry unless `allowed`, asked under the lock, says no. Answers whether another was evicted for it.
    pub(super) fn put_if(&self, digest: Digest, value: V, allowed: impl FnOnce() -> bool) -> Put {
        let mut shard = self.shard(&digest);
        if !allowed() {
            return Put::NotAllowed;
        }
        shard.put(digest, value);
        if shard.len() > self.shard_entries_max.load(Relaxed) {
            shard.pop_lru();
            return Put::Evicting;
        }
        Put::Done
    }

    pub(super) fn remove(&self, digest: &Digest) {
        self.shard(digest).pop(digest);
    }

    pub(super) fn retain(&self, mut keep: impl FnMut(&V) -> bool) {
        for shard in &self.shards {
            let mut shard = lock(shard);
            shard.retain(|_, value| keep(value));
        }
    }

    /// Entries of all shards.
    pub(super) fn len(&self) -> usize {
        self.shards.iter().map(|shard| lock(shard).len()).sum()
    }

    fn shard(&self, digest: &Digest) -> MutexGuard<'_, Shard<V>> {
        // A digest is uniform, so any of its bytes spreads the entries evenly.
        lock(&self.shards[usize::from(digest[0]) % SHARDS])
    }
}

fn in_shard(entries_max: usize) -> usize {
    entries_max.div_ceil(SHARDS).max(1)
}

/// Takes eight bytes of a digest as its hash: a digest is uniform already. Who searches for tokens with alike digests
/// gains no more than a walk over one shard's entries.
#[derive(Default)]
struct DigestHasher(u64);

impl Hasher for DigestHasher {
    fn write(&mut self, bytes: &[u8]) {
        // Not the first byte, which has chosen the shard.
        if let Some(hash) = bytes.last_chunk() {
            self.0 = u64::from_le_bytes(*hash);
        }
    }

    /// The length that arrays put in front says nothing.
    fn write_usize(&mut self, _: usize) {}

    fn finish(&self) -> u64 {
        self.0
    }
}

/// How [`DigestCache::put_if`] ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Put {
    Done,
    Evicting,
    NotAllowed,
}

/// Every change under these locks is complete in itself, so a panic elsewhere leaves nothing half done.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(shard: u8, number: u8) -> Digest {
        let mut digest = [0; 32];
        (digest[0], digest[1]) = (shard, number);
        digest
    }

    #[test]
    fn the_entry_unused_for_longest_leaves_first() {
        let cache = DigestCache::new(2 * SHARDS);
        assert_eq!(cache.put_if(digest(3, 1), "one", || true), Put::Done);
        assert_eq!(cache.put_if(digest(3, 2), "two", || true), Put::Done);
        cache.with(&digest(3, 1), |_| ());
        assert_eq!(cache.put_if(digest(3, 3), "three", || true), Put::Evicting);
        assert_eq!(cache.with(&digest(3, 2), |value| *value), None);
        assert_eq!(cache.with(&digest(3, 1), |value| *value), Some("one"));
    }

    #[test]
    fn a_put_that_is_not_allowed_changes_nothing() {
        let cache = DigestCache::new(SHARDS);
        cache.put_if(digest(0, 1), "old", || true);
        assert_eq!(cache.put_if(digest(0, 1), "new", || false), Put::NotAllowed);
        assert_eq!(cache.with(&digest(0, 1), |value| *value), Some("old"));
    }

    #[test]
    fn what_is_not_retained_is_gone_from_every_shard() {
        let cache = DigestCache::new(64);
        for shard in 0..16 {
            cache.put_if(digest(shard, 0), shard, || true);
        }
        cache.retain(|value| value % 2 == 0);
        assert!((0..16).all(|shard| cache.with(&digest(shard, 0), |_| ()).is_some() == (shard % 2 == 0)));
    }
}
