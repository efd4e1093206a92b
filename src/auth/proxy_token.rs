//! Proxy tokens: opaque bearers, checked in the store (the gateway's own) or by the validator upstream, and remembered.
//!
//! Owned by [`super::Auth`]. It keeps digests only, asks once however many callers wait, and never takes a failure of
//! the validator for a refusal.
//!
//! ```text
//! unknown ──asked──► good ──positive_ttl──► stale ──stale_secs since the last confirmation──► unknown
//!    │                 ▲                      │ asked again: good, refused, or (on failure) served as it is
//!    └──refused──► refused ──negative_ttl──► unknown
//! ```

use std::collections::HashMap;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use exec_gateway_protocol::ids::TokenId;
use sha2::{Digest as _, Sha256};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tracing::Span;
use zeroize::Zeroizing;

use super::cache::{Digest, DigestCache, Put, lock};
use super::upstream::Upstream;
use super::{AuthError, Claims, Clock, CredentialId, Principal, Scopes, TokenCounters};
use crate::config::{self, Live};
use crate::store::Store;
use crate::trace;

/// Different tokens asked for at once, for each of store and validator. Each costs a task and the token; past this
/// somebody sends junk faster than it can be refused.
const FLIGHTS_MAX: usize = 4096;

/// After a failure a stale token serves this long before anybody asks again, to spare a validator in trouble.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// While the validator is known to fail, a caller with a stale token waits this long for it to be back.
const STALE_PATIENCE: Duration = Duration::from_secs(1);

/// How far the wall clock may be set forward without a known token outliving its end.
const CLOCK_STEP_MAX: Duration = Duration::from_secs(60 * 60);

/// Longest time that anything is remembered.
const KEPT_MAX: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// A check that a revocation overtook is made again, this often at most.
const CHECKS_MAX: usize = 3;

/// Checks proxy tokens; cheap to clone.
#[derive(Clone)]
pub struct ProxyTokenAuth(Arc<Inner>);

struct Inner {
    store: Store,
    upstream: Live<Option<Upstream>>,
    clock: Clock,
    counters: Arc<TokenCounters>,
    positives: DigestCache<Positive>,
    negatives: DigestCache<Negative>,
    // Apart, so that a validator that hangs does not keep the gateway's own tokens out.
    own: Lane,
    foreign: Lane,
    settings: Live<config::Auth>,
    /// Counts what was forgotten because operators took it away.
    forgotten: watch::Sender<u64>,
}

/// The questions under way to one source of truth.
#[derive(Default)]
struct Lane {
    flights: Mutex<HashMap<Digest, Flight>>,
    /// Counts revocations, so that an answer obtained before one is not remembered after it.
    generation: AtomicU64,
}

/// `None` until the flight ends.
type Flight = watch::Receiver<Option<Result<Principal, AuthError>>>;

struct Positive {
    principal: Principal,
    fresh_until: Instant,
    stale_until: Instant,
    /// Set while the last question failed.
    ask_after: Option<Instant>,
    /// Whether the token may reach its own end before it is asked for again. Only then does a hit read the wall clock,
    /// which would cost it a fifth more.
    ends_soon: bool,
}

struct Negative {
    refusal: AuthError,
    until: Instant,
}

/// What is remembered of a token.
enum Memory {
    Good(Principal),
    Stale { principal: Principal, failing: bool, may_ask: bool },
    Refused(AuthError),
    Nothing,
}

impl ProxyTokenAuth {
    pub(super) fn new(
        store: Store,
        upstream: Live<Option<Upstream>>,
        settings: Live<config::Auth>,
        clock: Clock,
        counters: Arc<TokenCounters>,
    ) -> Self {
        let config = settings.now();
        Self(Arc::new(Inner {
            store,
            upstream,
            clock,
            counters,
            positives: DigestCache::new(config.positive_entries_max),
            negatives: DigestCache::new(config.negative_entries_max),
            own: Lane::default(),
            foreign: Lane::default(),
            settings,
            forgotten: watch::Sender::new(0),
        }))
    }

    /// Checks a token. The question runs in a task of its own, so a caller that leaves neither ends it nor disturbs the
    /// others that wait for it.
    ///
    /// # Errors
    /// `Invalid` or `Expired` when the token is refused, `Unavailable` when nobody could say.
    pub async fn principal(&self, token: &str) -> Result<Principal, AuthError> {
        let digest = Sha256::digest(token).into();
        match self.0.recall(&digest, Instant::now()) {
            Memory::Good(principal) => {
                self.0.counters.hits.fetch_add(1, Relaxed);
                Ok(principal)
            }
            Memory::Refused(refusal) => {
                self.0.counters.negative_hits.fetch_add(1, Relaxed);
                Err(refusal)
            }
            Memory::Stale { principal, may_ask: false, .. } => Ok(self.0.serve_stale(principal)),
            memory => match is_own(token) {
                false if self.0.upstream.now().is_none() => Err(AuthError::Invalid),
                own => self.0.ask_or_serve_stale(digest, token, own, memory).await,
            },
        }
    }

    /// Forgets one of the gateway's own tokens at once; a check under way is made again.
    pub fn forget(&self, token: &TokenId) {
        self.0.own.generation.fetch_add(1, SeqCst);
        self.0
            .positives
            .retain(|entry| !matches!(entry.principal.credential(), CredentialId::Token(id) if id == token));
        self.0.forgotten.send_modify(|count| *count += 1);
    }

    /// Remembers as many as the configuration says now.
    pub(super) fn resize(&self) {
        let settings = self.0.settings.now();
        self.0.positives.resize(settings.positive_entries_max);
        self.0.negatives.resize(settings.negative_entries_max);
    }

    /// Forgets all tokens, good and refused; checks under way are made again.
    pub fn forget_all(&self) {
        self.0.own.generation.fetch_add(1, SeqCst);
        self.0.foreign.generation.fetch_add(1, SeqCst);
        self.0.positives.retain(|_| false);
        self.0.negatives.retain(|_| false);
        self.0.forgotten.send_modify(|count| *count += 1);
    }

    /// Whether a validator is configured that does not answer, and has not for so long that no token can be served
    /// stale. The gateway's own tokens are not touched by that.
    pub fn is_upstream_down(&self) -> bool {
        Option::as_ref(&self.0.upstream.now()).is_some_and(|upstream| upstream.is_down(self.0.stale()))
    }

    /// Tokens remembered now: good ones, refused ones.
    pub fn remembered(&self) -> (usize, usize) {
        (self.0.positives.len(), self.0.negatives.len())
    }

    /// Announces from now on that tokens were forgotten.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.0.forgotten.subscribe()
    }
}

impl Inner {
    /// How long a good token is believed while the validator fails.
    fn stale(&self) -> Duration {
        let settings = self.settings.now();
        secs(settings.stale_secs).max(secs(settings.positive_ttl_secs))
    }

    fn lane(&self, own: bool) -> &Lane {
        if own { &self.own } else { &self.foreign }
    }

    fn recall(&self, digest: &Digest, now: Instant) -> Memory {
        let good = self.positives.with(digest, |entry| {
            let principal = entry.principal.clone();
            if entry.ends_soon && principal.expires_at().is_some_and(|end| end <= self.clock.now()) {
                Memory::Refused(AuthError::Expired)
            } else if now < entry.fresh_until {
                Memory::Good(principal)
            } else if now < entry.stale_until {
                let may_ask = entry.ask_after.is_none_or(|after| now >= after);
                Memory::Stale { principal, failing: entry.ask_after.is_some(), may_ask }
            } else {
                Memory::Nothing
            }
        });
        match good {
            Some(Memory::Nothing) | None => {}
            Some(memory) => return memory,
        }
        let refused = self.negatives.with(digest, |entry| (now < entry.until).then(|| entry.refusal.clone()));
        refused.flatten().map_or(Memory::Nothing, Memory::Refused)
    }

    fn serve_stale(&self, principal: Principal) -> Principal {
        self.counters.stale.fetch_add(1, Relaxed);
        principal
    }

    async fn ask_or_serve_stale(
        self: &Arc<Self>,
        digest: Digest,
        token: &str,
        own: bool,
        memory: Memory,
    ) -> Result<Principal, AuthError> {
        self.counters.misses.fetch_add(1, Relaxed);
        let asked = self.ask(digest, token, own);
        let answer = match memory {
            Memory::Stale { principal, failing: true, .. } => match timeout(STALE_PATIENCE, asked).await {
                Ok(answer) => answer,
                Err(_) => return Ok(self.serve_stale(principal)),
            },
            _ => asked.await,
        };
        match answer {
            // Looked up again, since a revocation may have removed it meanwhile.
            Err(AuthError::Unavailable { source }) => match self.recall(&digest, Instant::now()) {
                Memory::Good(principal) => Ok(principal),
                Memory::Stale { principal, .. } => Ok(self.serve_stale(principal)),
                _ => Err(AuthError::Unavailable { source }),
            },
            answer => answer,
        }
    }

    /// Joins the flight for this token, or starts it.
    async fn ask(self: &Arc<Self>, digest: Digest, token: &str, own: bool) -> Result<Principal, AuthError> {
        let mut flight = {
            let mut flights = lock(&self.lane(own).flights);
            // A flight may have landed since the caller looked; what it learnt was remembered before it left the map.
            match self.recall(&digest, Instant::now()) {
                Memory::Good(principal) => return Ok(principal),
                Memory::Refused(refusal) => return Err(refusal),
                Memory::Stale { may_ask: false, .. } => return Err(AuthError::unavailable(JustFailed)),
                Memory::Stale { .. } | Memory::Nothing => {}
            }
            match flights.get(&digest) {
                Some(flight) => flight.clone(),
                None if flights.len() >= FLIGHTS_MAX => return Err(AuthError::unavailable(TooManyFlights)),
                None => {
                    let (result, flight) = watch::channel(None);
                    flights.insert(digest, flight.clone());
                    let landing = Landing { inner: self.clone(), digest, own };
                    let token = Zeroizing::new(token.to_owned());
                    tokio::spawn(trace::within(trace::current(), Span::current(), async move {
                        let answer = landing.inner.check(&digest, &token, own).await;
                        drop(landing);
                        result.send_replace(Some(answer));
                    }));
                    flight
                }
            }
        };
        match flight.wait_for(Option::is_some).await {
            Ok(answer) => answer.clone().expect("waited until there is one"),
            Err(lost) => Err(AuthError::unavailable(lost)),
        }
    }

    /// One flight: asks whoever knows, and remembers the verdict unless a revocation came in between.
    async fn check(&self, digest: &Digest, token: &str, own: bool) -> Result<Principal, AuthError> {
        let lane = self.lane(own);
        for _ in 0..CHECKS_MAX {
            let generation = lane.generation.load(SeqCst);
            let verdict = if own { self.check_own(digest).await } else { self.check_upstream(digest, token).await };
            let remembered = self.remember(digest, &verdict, || lane.generation.load(SeqCst) == generation);
            if remembered {
                return verdict;
            }
        }
        Err(AuthError::unavailable(Overtaken))
    }

    async fn check_own(&self, digest: &Digest) -> Result<Principal, AuthError> {
        let token = self.store.token_by_digest(*digest).await.map_err(AuthError::unavailable)?;
        let token = token.ok_or(AuthError::Invalid)?;
        if token.expires_at.is_some_and(|end| end <= self.clock.now()) {
            return Err(AuthError::Expired);
        }
        Ok(Principal(Arc::new(Claims {
            workspace: token.workspace,
            user: token.user,
            credential: CredentialId::Token(token.id),
            scopes: Scopes { read_only: token.read_only },
            expires_at: token.expires_at,
            issued_at: None,
        })))
    }

    async fn check_upstream(&self, digest: &Digest, token: &str) -> Result<Principal, AuthError> {
        let upstream = self.upstream.now();
        let upstream = Option::as_ref(&upstream).ok_or(AuthError::Invalid)?;
        let owner = upstream.validate_token(token).await.map_err(AuthError::unavailable)?;
        let owner = owner.ok_or(AuthError::Invalid)?;
        Ok(Principal(Arc::new(Claims {
            workspace: owner.workspace,
            user: owner.user,
            credential: CredentialId::Digest(*digest),
            scopes: Scopes::default(),
            expires_at: None,
            issued_at: None,
        })))
    }

    /// False when `current`, asked under the lock of the entry, says that the verdict is out of date.
    fn remember(&self, digest: &Digest, verdict: &Result<Principal, AuthError>, current: impl Fn() -> bool) -> bool {
        let now = Instant::now();
        match verdict {
            Ok(principal) => {
                let stale = self.stale();
                let entry = Positive {
                    principal: principal.clone(),
                    fresh_until: now + secs(self.settings.now().positive_ttl_secs),
                    stale_until: now + stale,
                    ask_after: None,
                    ends_soon: principal
                        .expires_at()
                        .is_some_and(|end| end <= self.clock.now() + stale + CLOCK_STEP_MAX),
                };
                let put = self.positives.put_if(*digest, entry, current);
                self.counters.positive_evictions.fetch_add(u64::from(put == Put::Evicting), Relaxed);
                put != Put::NotAllowed
            }
            // Not remembered as such: the next caller asks again. Only who is served meanwhile waits a little.
            Err(AuthError::Unavailable { .. }) => {
                self.positives.with(digest, |entry| entry.ask_after = Some(now + RETRY_AFTER));
                true
            }
            Err(refusal) => {
                let entry =
                    Negative { refusal: refusal.clone(), until: now + secs(self.settings.now().negative_ttl_secs) };
                let put = self.negatives.put_if(*digest, entry, current);
                self.counters.negative_evictions.fetch_add(u64::from(put == Put::Evicting), Relaxed);
                // After the refusal is there, so that no caller finds neither.
                if put != Put::NotAllowed {
                    self.positives.remove(digest);
                }
                put != Put::NotAllowed
            }
        }
    }
}

/// Longer would only overflow the clocks.
fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs).min(KEPT_MAX)
}

/// Takes the flight out of the map when it ends, also by a panic.
struct Landing {
    inner: Arc<Inner>,
    digest: Digest,
    own: bool,
}

impl Drop for Landing {
    fn drop(&mut self) {
        lock(&self.inner.lane(self.own).flights).remove(&self.digest);
    }
}

#[derive(Debug, thiserror::Error)]
#[error("too many different tokens are being checked")]
struct TooManyFlights;

#[derive(Debug, thiserror::Error)]
#[error("the last check of this token just failed")]
struct JustFailed;

#[derive(Debug, thiserror::Error)]
#[error("revocations keep overtaking the check")]
struct Overtaken;

/// The form of the gateway's own tokens: `egw_` and 32 bytes in base64url.
fn is_own(token: &str) -> bool {
    let encoded = token.strip_prefix("egw_").filter(|encoded| encoded.len() == 43);
    encoded
        .is_some_and(|encoded| encoded.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_')))
}

#[cfg(test)]
#[path = "proxy_token_tests.rs"]
mod tests;
