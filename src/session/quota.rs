//! What gives way when output takes too much of the disk: plain rules, no I/O.
//!
//! The oldest finished sessions go first, whole; then the oldest bytes of the largest running ones.

use std::collections::HashMap;
use std::time::SystemTime;

use crate::protocol::ids::{SessionId, WorkspaceId};

/// What one session takes.
#[derive(Debug, Clone)]
pub(super) struct Usage {
    pub(super) session: SessionId,
    pub(super) workspace: WorkspaceId,
    pub(super) bytes: u64,
    /// When it ended; `None` while it runs.
    pub(super) ended: Option<SystemTime>,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Relief {
    /// Forget the session.
    Forget(SessionId),
    /// Drop its oldest output until it takes so many bytes.
    Shrink(SessionId, u64),
}

/// What brings every workspace below `workspace_max` bytes and all together below `total_max`.
pub(super) fn relieve(usages: &[Usage], workspace_max: u64, total_max: u64) -> Vec<Relief> {
    let mut left = usages.to_vec();
    let mut reliefs = Vec::new();
    let mut by_workspace: HashMap<&WorkspaceId, u64> = HashMap::new();
    for usage in usages {
        *by_workspace.entry(&usage.workspace).or_default() += usage.bytes;
    }
    for (workspace, bytes) in by_workspace {
        if let Some(excess) = bytes.checked_sub(workspace_max).filter(|excess| *excess > 0) {
            cut(&mut left, excess, &mut reliefs, |usage| usage.workspace == *workspace);
        }
    }
    let total: u64 = left.iter().map(|usage| usage.bytes).sum();
    if let Some(excess) = total.checked_sub(total_max).filter(|excess| *excess > 0) {
        cut(&mut left, excess, &mut reliefs, |_| true);
    }
    reliefs
}

fn cut(left: &mut Vec<Usage>, mut excess: u64, reliefs: &mut Vec<Relief>, concerned: impl Fn(&Usage) -> bool) {
    while excess > 0 {
        let finished = left.iter().enumerate().filter(|(_, usage)| concerned(usage) && usage.bytes > 0);
        let oldest = finished.filter_map(|(index, usage)| Some((index, usage.ended?))).min_by_key(|(_, ended)| *ended);
        let Some((index, _)) = oldest else { break };
        let gone = left.swap_remove(index);
        excess = excess.saturating_sub(gone.bytes);
        reliefs.push(Relief::Forget(gone.session));
    }
    let mut running: Vec<&mut Usage> =
        left.iter_mut().filter(|usage| concerned(usage) && usage.ended.is_none()).collect();
    running.sort_by_key(|usage| std::cmp::Reverse(usage.bytes));
    for usage in running {
        if excess == 0 {
            return;
        }
        let cut = usage.bytes.min(excess);
        usage.bytes -= cut;
        excess -= cut;
        reliefs.push(Relief::Shrink(usage.session.clone(), usage.bytes));
    }
}

/// Bytes that output may take of a disk of this size, of which it takes `taken` and `free` are free, so that so much of
/// it stays free.
pub(super) fn disk_share(taken: u64, free: u64, size: u64, free_percent: u64) -> u64 {
    taken.saturating_add(free).saturating_sub(size / 100 * free_percent)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    fn usage(session: &str, workspace: &str, bytes: u64, ended_secs: Option<u64>) -> Usage {
        Usage {
            session: session.parse().unwrap(),
            workspace: workspace.parse().unwrap(),
            bytes,
            ended: ended_secs.map(|secs| UNIX_EPOCH + Duration::from_secs(secs)),
        }
    }

    fn forget(session: &str) -> Relief {
        Relief::Forget(session.parse().unwrap())
    }

    #[test]
    fn nothing_gives_way_below_the_bounds() {
        assert_eq!(relieve(&[usage("a", "w", 5, None), usage("b", "v", 5, Some(1))], 5, 10), []);
    }

    #[test]
    fn the_oldest_finished_session_goes_before_a_running_one() {
        let usages = [usage("run", "w", 6, None), usage("new", "w", 3, Some(9)), usage("old", "w", 3, Some(1))];
        assert_eq!(relieve(&usages, 10, 100), [forget("old")]);
    }

    #[test]
    fn running_sessions_lose_their_oldest_bytes_last() {
        let usages = [usage("big", "w", 9, None), usage("small", "w", 3, None), usage("done", "w", 1, Some(1))];
        assert_eq!(relieve(&usages, 10, 100), [forget("done"), Relief::Shrink("big".parse().unwrap(), 7)]);
    }

    #[test]
    fn one_workspace_over_its_bound_costs_another_nothing() {
        let usages = [usage("a", "w", 20, Some(5)), usage("b", "v", 10, Some(1))];
        assert_eq!(relieve(&usages, 10, 100), [forget("a")]);
    }

    #[test]
    fn the_bound_of_all_counts_what_the_workspaces_have_left() {
        let usages = [usage("a", "w", 20, Some(5)), usage("b", "v", 8, Some(1)), usage("c", "u", 8, Some(2))];
        assert_eq!(relieve(&usages, 10, 10), [forget("a"), forget("b")]);
    }

    #[test]
    fn a_part_of_the_disk_stays_free() {
        assert_eq!(disk_share(10, 60, 100, 0), 70);
        assert_eq!(disk_share(10, 60, 100, 10), 60);
        assert_eq!(disk_share(10, 60, 100, 90), 0, "others have taken it already");
    }
}
