//! Timing: where the time of one request goes, for its `Server-Timing` header (W3C Server Timing). Known to the doors,
//! which show it, and to the tools, which count what they wait for. Owns no clock.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use tokio::time::Instant;
use tracing::{Instrument, debug_span};

/// The phases of one request that is under way; clones count together.
#[derive(Clone)]
pub struct Timing(Arc<Phases>);

struct Phases {
    started: Instant,
    auth: AtomicU64,
    queue: AtomicU64,
    executor: AtomicU64,
    observed: Option<(Arc<dyn Observer>, &'static str)>,
}

/// Where time goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The check of the credential.
    Auth,
    /// All that is none of the others: the gateway's own part, the reading of the request included.
    Route,
    /// The wait for a ready conversation with the executor.
    Queue,
    /// The executor's work.
    Executor,
}

impl Phase {
    /// Their names, in their order.
    pub const NAMES: &[&str] = &["auth", "route", "queue", "executor"];

    /// Its name.
    pub fn name(self) -> &'static str {
        Self::NAMES[self as usize]
    }
}

/// The phases of a request with the time that each took.
pub type Spent = [(Phase, Duration); Phase::NAMES.len()];

/// Is told of requests that have ended.
pub trait Observer: Send + Sync {
    /// One that came by this door, once nobody works on it any more.
    fn ended(&self, door: &'static str, spent: Spent);
}

impl Timing {
    /// A request that begins now.
    pub fn start() -> Self {
        Self::with(None)
    }

    /// The same by this door; the observer is told when the last clone is dropped.
    pub fn observed(door: &'static str, by: Arc<dyn Observer>) -> Self {
        Self::with(Some((by, door)))
    }

    fn with(observed: Option<(Arc<dyn Observer>, &'static str)>) -> Self {
        let zero = AtomicU64::default;
        Self(Arc::new(Phases { started: Instant::now(), auth: zero(), queue: zero(), executor: zero(), observed }))
    }

    /// When the request began.
    pub fn started(&self) -> Instant {
        self.0.started
    }

    /// Counts the check of the credential.
    pub async fn auth<T>(&self, work: impl Future<Output = T>) -> T {
        count(&self.0.auth, work).instrument(debug_span!("auth")).await
    }

    /// Counts a wait for a ready conversation with the executor: its link, its handshake, its turn.
    pub async fn queue<T>(&self, work: impl Future<Output = T>) -> T {
        count(&self.0.queue, work).instrument(debug_span!("queue")).await
    }

    /// Counts the work that was asked for, without the waits of [`Self::queue`] in it.
    pub async fn executor<T>(&self, work: impl Future<Output = T>) -> T {
        let (began, queued) = (Instant::now(), self.0.queue.load(Relaxed));
        let done = work.instrument(debug_span!("executor")).await;
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

impl Phases {
    /// The time so far.
    fn spent(&self) -> Spent {
        let of = |phase: &AtomicU64| Duration::from_nanos(phase.load(Relaxed));
        let (auth, queue, executor) = (of(&self.auth), of(&self.queue), of(&self.executor));
        let route = self.started.elapsed().saturating_sub(auth + queue + executor);
        [(Phase::Auth, auth), (Phase::Route, route), (Phase::Queue, queue), (Phase::Executor, executor)]
    }
}

impl Drop for Phases {
    fn drop(&mut self) {
        if let Some((observer, door)) = &self.observed {
            observer.ended(door, self.spent());
        }
    }
}

/// As the header has it: milliseconds so far.
impl fmt::Display for Timing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut comma = "";
        for (phase, time) in self.0.spent() {
            let micros = time.as_micros();
            write!(f, "{comma}{};dur={}.{:03}", phase.name(), micros / 1000, micros % 1000)?;
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
