//! Environment name → executor for one workspace: a short-lived copy of the workspace's bindings.
//!
//! Unknown names are answered from the copy as well, so they cost the store nothing. What operators change is dropped
//! from the copy at once; the time to live only bounds how long a missed change could last.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::protocol::ids::WorkspaceId;
use crate::store::{Binding, Store, StoreError};

/// The names of one workspace.
pub struct Resolver {
    workspace: WorkspaceId,
    ttl: Duration,
    copy: Mutex<Copy>,
    /// One reader of the store at a time; the others take what it brings.
    refresh: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct Copy {
    bindings: Option<(Arc<Vec<Binding>>, Instant)>,
    /// Counts invalidations: a copy read before one of them must not be kept.
    generation: u64,
}

impl Resolver {
    pub(super) fn new(workspace: WorkspaceId, ttl: Duration) -> Self {
        Self { workspace, ttl, copy: Mutex::default(), refresh: tokio::sync::Mutex::default() }
    }

    /// The workspace's bindings, at most the time to live old.
    ///
    /// # Errors
    /// [`StoreError`] when they are not at hand and the store does not answer.
    pub async fn bindings(&self, store: &Store) -> Result<Arc<Vec<Binding>>, Arc<StoreError>> {
        if let Some(bindings) = self.fresh() {
            return Ok(bindings);
        }
        let _turn = self.refresh.lock().await;
        if let Some(bindings) = self.fresh() {
            return Ok(bindings);
        }
        let generation = self.copy().generation;
        let bindings = match store.bindings(&self.workspace).await {
            Ok(bindings) => Arc::new(bindings),
            // Only this process changes bindings, and a change empties the copy: an old copy is still true.
            Err(StoreError::Unavailable(error)) => match &self.copy().bindings {
                Some((bindings, _)) => return Ok(bindings.clone()),
                None => return Err(Arc::new(StoreError::Unavailable(error))),
            },
            Err(error) => return Err(Arc::new(error)),
        };
        let mut copy = self.copy();
        if copy.generation == generation {
            copy.bindings = Some((bindings.clone(), Instant::now()));
        }
        Ok(bindings)
    }

    /// Drops the copy, since an operator changed the workspace's bindings.
    pub fn invalidate(&self) {
        let mut copy = self.copy();
        copy.generation += 1;
        copy.bindings = None;
    }

    fn fresh(&self) -> Option<Arc<Vec<Binding>>> {
        let copy = self.copy();
        let (bindings, at) = copy.bindings.as_ref()?;
        (at.elapsed() < self.ttl).then(|| bindings.clone())
    }

    fn copy(&self) -> std::sync::MutexGuard<'_, Copy> {
        self.copy.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
