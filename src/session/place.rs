//! Places of a workspace, for sessions or for live streams of their output: how many are taken, and one guard for each.
//!
//! Owned by the table of sessions. It counts; it does not know what stands in a place.

use std::sync::Arc;

use dashmap::DashMap;
use dashmap::mapref::entry::Entry;

use crate::protocol::ids::WorkspaceId;

/// The places of all workspaces; those without a taken one take no memory.
#[derive(Debug, Default, Clone)]
pub(super) struct Places(Arc<DashMap<WorkspaceId, usize>>);

/// One place, given back when dropped.
#[derive(Debug)]
pub struct Place {
    places: Places,
    workspace: WorkspaceId,
}

impl Places {
    /// One more place of the workspace; `None` when it has `places_max` already.
    pub(super) fn take(&self, workspace: &WorkspaceId, places_max: usize) -> Option<Place> {
        let mut taken = self.0.entry(workspace.clone()).or_default();
        if *taken >= places_max {
            return None;
        }
        *taken += 1;
        Some(Place { places: self.clone(), workspace: workspace.clone() })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Entry::Occupied(mut taken) = self.places.0.entry(self.workspace.clone()) {
            *taken.get_mut() -= 1;
            if *taken.get() == 0 {
                taken.remove();
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_place_given_back_is_free_again_and_leaves_nothing_behind() {
        let (places, [one, other]) = (Places::default(), ["one", "other"].map(|id| WorkspaceId::new(id).unwrap()));
        let held = places.take(&one, 1).unwrap();
        assert!(places.take(&one, 1).is_none());
        assert!(places.take(&other, 1).is_some(), "another workspace has places of its own");
        drop(held);
        assert!(places.take(&one, 1).is_some());
        assert_eq!(places.0.len(), 0);
    }
}
