//! The gateway's keys of one purpose, as they are at the moment: rotated while they are in use.

use std::sync::{Arc, PoisonError, RwLock};

use crate::store::{GatewayKey, Keyring};

/// Shared by what signs and verifies with the keys; cheap to clone.
#[derive(Clone)]
pub(super) struct Keys(Arc<RwLock<Arc<Keyring>>>);

impl Keys {
    pub(super) fn new(ring: Keyring) -> Self {
        Self(Arc::new(RwLock::new(Arc::new(ring))))
    }

    /// The keys now. Who signs and then verifies within one call uses one reading for both.
    pub(super) fn now(&self) -> Arc<Keyring> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// These keys from now on.
    pub(super) fn replace(&self, ring: Keyring) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(ring);
    }
}

/// The keys that verify, the one that signs first.
pub(super) fn verifying(ring: &Keyring) -> impl Iterator<Item = &GatewayKey> {
    std::iter::once(&ring.current).chain(&ring.previous)
}
