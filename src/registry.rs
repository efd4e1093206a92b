//! Which executors are connected: [`ExecutorId`] → [`LinkHandle`].
//!
//! A link is handed out only against a [`Binding`], so no workspace reaches an executor that is not its own.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use dashmap::DashMap;
use dashmap::mapref::entry::Entry;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::protocol::ids::{ExecutorId, RegistrationId, WorkspaceId};
use crate::relay::link::{CloseReason, LinkHandle};
use crate::relay::shared::Shared;
use crate::store::{Binding, Transport};

/// All connected executors of this gateway.
#[derive(Debug)]
pub struct Registry {
    links: DashMap<ExecutorId, Connected>,
    /// When an executor that is not connected was last known to be. Bounded by the executors in the store: only
    /// registered ones connect, and entries leave with [`Registry::forget`].
    seen: DashMap<ExecutorId, Instant>,
    /// What is left of a shared socket, for the executor's next one; bounded as `seen`.
    left: DashMap<ExecutorId, Box<Shared>>,
    changes: watch::Sender<u64>,
}

#[derive(Debug, Clone)]
struct Connected {
    link: LinkHandle,
    since: SystemTime,
}

impl Default for Registry {
    fn default() -> Self {
        Self { links: DashMap::new(), seen: DashMap::new(), left: DashMap::new(), changes: watch::Sender::new(0) }
    }
}

/// A connected executor's times.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Presence {
    /// When it connected.
    pub since: SystemTime,
    /// When it was last heard.
    pub heard: SystemTime,
}

/// One link as operators see it.
#[derive(Debug, Clone)]
pub struct LinkOverview {
    /// Whose it is.
    pub executor: ExecutorId,
    /// How it is spoken to.
    pub transport: Transport,
    /// When it connected.
    pub since: SystemTime,
    /// How long it has said nothing.
    pub silence: Duration,
    /// Open streams.
    pub streams: usize,
}

/// The executor has no link and none came in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the executor is not connected")]
pub struct NotConnected;

impl Registry {
    /// The link of a bound executor, if it is connected.
    pub fn link(&self, binding: &Binding) -> Option<LinkHandle> {
        self.current(binding.executor())
    }

    /// When a bound executor connected, if it is connected.
    pub fn connected_since(&self, binding: &Binding) -> Option<SystemTime> {
        self.presence(binding).map(|presence| presence.since)
    }

    /// Since when a bound executor is connected and when it was last heard, if it is connected.
    pub fn presence(&self, binding: &Binding) -> Option<Presence> {
        let connected = self.links.get(binding.executor()).filter(|connected| !connected.link.is_ended())?;
        Some(Presence { since: connected.since, heard: SystemTime::now() - connected.link.silence() })
    }

    /// Counts executors that came or left: what was read of this registry holds while it stays the same.
    pub fn version(&self) -> u64 {
        *self.changes.borrow()
    }

    /// The link of a bound executor; one that was connected within `seen` is waited for, at most `wait`.
    ///
    /// # Errors
    /// [`NotConnected`].
    pub async fn link_soon(
        &self,
        binding: &Binding,
        seen: Duration,
        wait: Duration,
    ) -> Result<LinkHandle, NotConnected> {
        let mut changes = self.changes.subscribe();
        match self.link(binding) {
            Some(link) if !link.is_ended() => return Ok(link),
            // It ended this moment, and its task has not given up its place yet.
            Some(_) => {}
            None if self.seen.get(binding.executor()).is_some_and(|at| at.elapsed() <= seen) => {}
            None => return Err(NotConnected),
        }
        let arrival = async {
            loop {
                if let Some(link) = self.link(binding).filter(|link| !link.is_ended()) {
                    return link;
                }
                // The sender lives in self, so this only returns on a change.
                let _ = changes.changed().await;
            }
        };
        tokio::time::timeout(wait, arrival).await.map_err(|_| NotConnected)
    }

    /// What operators see of the links, at most `max` of them, in no order.
    pub fn overview(&self, max: usize) -> Vec<LinkOverview> {
        let links = self.links.iter().take(max);
        links
            .map(|connected| LinkOverview {
                executor: connected.link.executor().clone(),
                transport: connected.link.registration().transport,
                since: connected.since,
                silence: connected.link.silence(),
                streams: connected.link.streams(),
            })
            .collect()
    }

    /// The live link of an executor for those who admit or end its sockets.
    pub(crate) fn current(&self, executor: &ExecutorId) -> Option<LinkHandle> {
        self.links.get(executor).map(|connected| connected.link.clone())
    }

    /// Whether another process than `registration` may take the executor's place: nobody is there, it is the same
    /// process dialling again, or the one that is there does not answer a ping within `wait`.
    pub async fn yields_to(
        &self,
        executor: &ExecutorId,
        registration: Option<&RegistrationId>,
        wait: Duration,
    ) -> bool {
        match self.current(executor) {
            None => true,
            Some(link) if registration == Some(&link.registration().id) => true,
            Some(link) => !link.answers(wait).await,
        }
    }

    /// Makes the link the executor's current one; a former one is closed. The place is given up when the guard drops.
    pub fn attach(self: &Arc<Self>, link: LinkHandle) -> Attached {
        let connected = Connected { link: link.clone(), since: SystemTime::now() };
        let former = self.links.insert(link.executor().clone(), connected);
        if let Some(former) = former {
            former.link.close(CloseReason::Replaced);
        }
        self.changes.send_modify(|count| *count += 1);
        Attached { registry: self.clone(), link }
    }

    /// Has an executor's link closed, and waits until it has given up its place, at most `wait`.
    pub async fn vacate(&self, executor: &ExecutorId, wait: Duration) {
        let mut changes = self.changes.subscribe();
        let Some(former) = self.current(executor) else { return };
        former.close(CloseReason::Replaced);
        let gone = async {
            while self.current(executor).is_some_and(|link| link.id() == former.id()) {
                // The sender lives in self, so this only returns on a change.
                let _ = changes.changed().await;
            }
        };
        let _ = tokio::time::timeout(wait, gone).await;
    }

    /// Keeps what is left of a shared socket for the executor's next one.
    pub fn leave(&self, executor: &ExecutorId, shared: Box<Shared>) {
        let now = Instant::now();
        self.left.retain(|_, shared| shared.kept_until().is_some_and(|until| until > now));
        if shared.kept_until().is_some() {
            self.left.insert(executor.clone(), shared);
        }
    }

    /// Takes what is left of the executor's former shared socket.
    pub fn take_left(&self, executor: &ExecutorId) -> Option<Box<Shared>> {
        self.left.remove(executor).map(|(_, shared)| shared)
    }

    /// Records that executors were connected shortly before this gateway started.
    pub fn remember(&self, executor: ExecutorId, ago: Duration) {
        if let Some(at) = Instant::now().checked_sub(ago) {
            self.seen.insert(executor, at);
        }
    }

    /// Ends an executor's link and forgets that it was there.
    pub fn forget(&self, executor: &ExecutorId) {
        if let Some(link) = self.current(executor) {
            link.close(CloseReason::Deleted);
        }
        self.seen.remove(executor);
        self.left.remove(executor);
    }

    /// Ends the streams of a workspace that may reach this executor, or any if none is named, no more.
    pub fn end_workspace(&self, workspace: &WorkspaceId, executor: Option<&ExecutorId>) {
        match executor {
            Some(executor) => self.current(executor).iter().for_each(|link| link.end_workspace(workspace)),
            None => self.links.iter().for_each(|entry| entry.link.end_workspace(workspace)),
        }
    }

    /// Executors connected now.
    pub fn connected(&self) -> Vec<ExecutorId> {
        self.links.iter().map(|entry| entry.key().clone()).collect()
    }

    /// Every link at this moment.
    pub fn links(&self) -> Vec<LinkHandle> {
        self.links.iter().map(|entry| entry.link.clone()).collect()
    }

    /// How many executors are connected.
    pub fn len(&self) -> usize {
        self.links.len()
    }

    /// Whether no executor is connected.
    pub fn is_empty(&self) -> bool {
        self.links.is_empty()
    }

    /// Closes every link.
    pub fn close_all(&self, reason: CloseReason) {
        for entry in &self.links {
            entry.link.close(reason);
        }
    }
}

/// An executor's place in the registry.
#[derive(Debug)]
pub struct Attached {
    registry: Arc<Registry>,
    link: LinkHandle,
}

impl Drop for Attached {
    fn drop(&mut self) {
        // The executor may have come back already: remove our link, never its successor.
        if let Entry::Occupied(entry) = self.registry.links.entry(self.link.executor().clone())
            && entry.get().link.id() == self.link.id()
        {
            self.registry.seen.insert(self.link.executor().clone(), Instant::now());
            entry.remove();
            self.registry.changes.send_modify(|count| *count += 1);
        }
    }
}
