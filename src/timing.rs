//! Timing: where the time of one request goes, for its `Server-Timing` header (W3C Server Timing). Known to the doors,
//! which show it, and to the tools, which count what they wait for. Owns no clock.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use tokio::time::Instant;

/// The phases of one request that is under way; clones count together.
#[derive(Debug, Clone)]
pub struct Timing(Arc<Phases>);

#[derive(Debug)]
struct Phases {
    started: Instant,
    auth: AtomicU64,
    queue: AtomicU64,
    executor: AtomicU64,
}

impl Timing {
    /// A request that begins now.
    pub fn start() -> Self {
        let zero = AtomicU64::default;
        Self(Arc::new(Phases { started: Instant::now(), auth: zero(), queue: zero(), executor: zero() }))
    }

    /// When the request began.
    pub fn started(&self) -> Instant {
        self.0.started
    }

    /// Counts the check of the credential.
    pub async fn auth<T>(&self, work: impl Future<Output = T>) -> T {
        count(&self.0.auth, work).await
    }

    /// Counts a wait for a ready conversation with the executor: its link, its handshake, its turn.
    pub async fn queue<T>(&self, work: impl Future<Output = T>) -> T {
        count(&self.0.queue, work).await
    }

    /// Counts the work that was asked for, without the waits of [`Self::queue`] in it.
    pub async fn executor<T>(&self, work: impl Future<Output = T>) -> T {
        let (began, queued) = (Instant::now(), self.0.queue.load(Relaxed));
        let done = work.await;
        let queued = self.0.queue.load(Relaxed) - queued;
        self.0.executor.fetch_add(nanos(began.elapsed()).saturating_sub(queued), Relaxed);
        done
    }
}

async fn count<T>(phase: &AtomicU64, work: impl Future<Output = T>) -> T {
    let began = Instant::now();
    let done = work.await;
    phase.fetch_add(nanos(began.elapsed()), Relaxed);
    done
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// As the header has it: milliseconds so far. `route` is all that is none of the others, the gateway's own part, the
/// reading of the request included.
impl fmt::Display for Timing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of = |phase: &AtomicU64| phase.load(Relaxed);
        let (auth, queue, executor) = (of(&self.0.auth), of(&self.0.queue), of(&self.0.executor));
        let route = nanos(self.0.started.elapsed()).saturating_sub(auth + queue + executor);
        let mut comma = "";
        for (name, nanos) in [("auth", auth), ("route", route), ("queue", queue), ("executor", executor)] {
            let micros = nanos / 1000;
            write!(f, "{comma}{name};dur={}.{:03}", micros / 1000, micros % 1000)?;
            comma = ", ";
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::sleep;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn every_moment_of_a_request_is_in_one_phase() {
        let timing = Timing::start();
        let ms = Duration::from_millis;
        timing.auth(sleep(ms(2))).await;
        sleep(ms(30)).await;
        timing
            .executor(async {
                timing.queue(sleep(ms(400))).await;
                sleep(ms(5000)).await;
            })
            .await;
        assert_eq!(timing.to_string(), "auth;dur=2.000, route;dur=30.000, queue;dur=400.000, executor;dur=5000.000");
    }
}
