//! Pace: how often a workspace may ask (the generic cell rate algorithm, ITU-T I.371): one number, no timer, no queue.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

/// What the numbers count from.
static EPOCH: LazyLock<Instant> = LazyLock::new(Instant::now);

/// When a workspace that asks without a pause at its rate would have asked all that it did, in nanoseconds.
#[derive(Debug, Default)]
pub struct Pace(AtomicU64);

/// The workspace asks too often; it may again in that time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the workspace asks more than {per_second} times a second")]
pub struct TooFast {
    per_second: u64,
    /// How long to wait.
    pub wait: Duration,
}

impl Pace {
    /// Counts one question: `per_second` of them for any length of time (0: without end), and `burst` more at once
    /// after a pause.
    ///
    /// # Errors
    /// [`TooFast`]; the question does not count then.
    pub fn count(&self, per_second: u64, burst: u64) -> Result<(), TooFast> {
        let Some(each) = 1_000_000_000u64.checked_div(per_second) else { return Ok(()) };
        let now = u64::try_from(EPOCH.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let latest = now.saturating_add(each.saturating_mul(burst));
        let counted = self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, |due| {
            (due <= latest).then(|| due.max(now).saturating_add(each))
        });
        let late = |due: u64| TooFast { per_second, wait: Duration::from_nanos(due - latest) };
        counted.map(drop).map_err(late)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_burst_passes_at_once_and_then_the_rate_holds() {
        LazyLock::force(&EPOCH);
        tokio::time::advance(Duration::from_secs(60)).await;
        let pace = Pace::default();
        let passed = |pace: &Pace| (0..100).take_while(|_| pace.count(10, 5).is_ok()).count();
        assert_eq!(passed(&pace), 6, "five at once beside the one that is due");
        let wait = pace.count(10, 5).err().map(|late| late.wait);
        assert_eq!(wait, Some(Duration::from_millis(100)));
        tokio::time::advance(Duration::from_millis(300)).await;
        assert_eq!(passed(&pace), 3);
        assert!((0..100_000).all(|_| pace.count(0, 5).is_ok()), "0 is no bound");
    }
}
