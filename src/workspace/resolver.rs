//! Environment name → executor for one workspace: a short-lived copy of the workspace's bindings.
//!
//! Unknown names are answered from the copy as well, so they cost the store nothing. What operators change is dropped
//! from the copy at once; the time to live only bounds how long a missed change could last.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::config::{self, Live};
use crate::protocol::ids::WorkspaceId;
use crate::store::{Binding, Store, StoreError};

/// The names of one workspace.
pub struct Resolver {
    workspace: WorkspaceId,
    settings: Live<config::Workspaces>,
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
    pub(super) fn new(workspace: WorkspaceId, settings: Live<config::Workspaces>) -> Self {
        Self { workspace, settings, copy: Mutex::default(), refresh: tokio::sync::Mutex::default() }
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
        (at.elapsed() < Duration::from_secs(self.settings.now().resolver_ttl_secs)).then(|| bindings.clone())
    }

    fn copy(&self) -> std::sync::MutexGuard<'_, Copy> {
        self.copy.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use rusqlite::Connection;

    use super::*;
    use crate::protocol::ids::EnvironmentName;
    use crate::store::path_in;
    use crate::store::scratch::ScratchDir;

    #[tokio::test(start_paused = true)]
    async fn names_are_asked_for_once_in_a_while_and_forgotten_ones_never_come_back() {
        let dir = ScratchDir::new();
        let store = Store::open(dir.path()).unwrap();
        let workspace: WorkspaceId = "w".parse().unwrap();
        let create = async |name: &str| {
            let name = EnvironmentName::new(name).unwrap();
            store.create_executor(&workspace, &name, false, None).await.unwrap();
        };
        let resolver = Resolver::new(workspace.clone(), config::Workspaces::default().into());
        create("first").await;
        let first = resolver.bindings(&store).await.unwrap();
        create("second").await;
        let same = resolver.bindings(&store).await.unwrap();
        assert!(Arc::ptr_eq(&first, &same), "whatever name is looked for, the store is not asked again");
        tokio::time::advance(Duration::from_secs(10)).await;
        assert_eq!(resolver.bindings(&store).await.unwrap().len(), 2);

        Connection::open(path_in(dir.path())).unwrap().execute_batch("DROP TABLE bindings").unwrap();
        assert_eq!(resolver.bindings(&store).await.unwrap().len(), 2);
        resolver.invalidate();
        assert!(resolver.bindings(&store).await.is_err(), "an old name may be unbound by now");
    }
}
