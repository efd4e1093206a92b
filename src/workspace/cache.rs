//! WorkspaceId → Workspace: built once on first use however many callers come first, dropped when idle.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use dashmap::DashMap;
use tokio::time::Instant;

use super::{Corridor, Workspace};
use crate::auth::Principal;
use crate::protocol::ids::WorkspaceId;

/// The workspaces in memory.
pub struct Workspaces {
    corridor: Arc<Corridor>,
    entries: DashMap<WorkspaceId, Entry>,
    built: AtomicU64,
    evicted: AtomicU64,
}

struct Entry {
    workspace: Arc<Workspace>,
    used: Instant,
}

impl Workspaces {
    /// An empty cache.
    pub fn new(corridor: Arc<Corridor>) -> Self {
        Self { corridor, entries: DashMap::new(), built: AtomicU64::new(0), evicted: AtomicU64::new(0) }
    }

    /// The workspace of a caller. Only a [`Principal`] opens one, so nobody gets another's.
    pub fn get(&self, principal: &Principal) -> Arc<Workspace> {
        let id = principal.workspace();
        if let Some(mut entry) = self.entries.get_mut(id) {
            entry.used = Instant::now();
            return entry.workspace.clone();
        }
        if self.entries.len() >= self.corridor.settings.now().entries_max {
            self.evict_oldest();
        }
        // Building takes no I/O, so it happens under the entry's lock: concurrent first callers build once.
        let mut entry = self.entries.entry(id.clone()).or_insert_with(|| {
            self.built.fetch_add(1, Ordering::Relaxed);
            let workspace = Arc::new(Workspace::new(id.clone(), self.corridor.clone()));
            Entry { workspace, used: Instant::now() }
        });
        entry.used = Instant::now();
        entry.workspace.clone()
    }

    /// The workspace if it is in memory, without counting as use.
    pub fn peek(&self, id: &WorkspaceId) -> Option<Arc<Workspace>> {
        self.entries.get(id).map(|entry| entry.workspace.clone())
    }

    /// Drops what was not used for the configured time and has no call under way.
    pub fn evict_idle(&self) {
        let idle = Duration::from_secs(self.corridor.settings.now().idle_secs);
        self.entries.retain(|_, entry| entry.used.elapsed() < idle || !self.evict(entry));
    }

    /// Makes room for one more. Where every workspace has calls under way the bound is exceeded rather than a call cut.
    fn evict_oldest(&self) {
        let idle = self.entries.iter().filter(|entry| entry.workspace.calls() == 0);
        let oldest = idle.min_by_key(|entry| entry.used).map(|entry| entry.key().clone());
        if let Some(oldest) = oldest {
            self.entries.remove_if(&oldest, |_, entry| self.evict(entry));
        }
    }

    fn evict(&self, entry: &Entry) -> bool {
        let idle = entry.workspace.calls() == 0;
        if idle {
            self.evicted.fetch_add(1, Ordering::Relaxed);
        }
        idle
    }

    /// Every workspace in memory.
    pub fn all(&self) -> Vec<Arc<Workspace>> {
        self.entries.iter().map(|entry| entry.workspace.clone()).collect()
    }

    /// Workspaces in memory.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether none is in memory.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Workspaces built since start.
    pub fn built(&self) -> u64 {
        self.built.load(Ordering::Relaxed)
    }

    /// Workspaces dropped since start.
    pub fn evicted(&self) -> u64 {
        self.evicted.load(Ordering::Relaxed)
    }
}
