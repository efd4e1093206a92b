//! Live: a part of the configuration that a reload replaces while the gateway runs. Parts of the gateway hold their
//! section as one of these and ask it when they need a number; nobody waits for a change.

use std::sync::{Arc, PoisonError, RwLock};

/// A value that is replaced as a whole. Clones are handles to the same one.
pub struct Live<T>(Arc<RwLock<Arc<T>>>);

impl<T> Live<T> {
    /// The value in effect at this moment; who keeps it goes on with it.
    pub fn now(&self) -> Arc<T> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Puts another one in its place, for whoever asks from now on.
    pub fn set(&self, value: impl Into<Arc<T>>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = value.into();
    }
}

impl<T> Clone for Live<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> From<T> for Live<T> {
    fn from(value: T) -> Self {
        Self(Arc::new(RwLock::new(Arc::new(value))))
    }
}
