//! Who calls: turns credentials into a [`Principal`], and mints the gateway's own short-lived rights.
//!
//! Owned by the gateway, one per process. It says who somebody is and never what they may reach: that is
//! [`crate::store::Binding`]. No credential leaves it in an error, a log line or a `Debug` text.

mod cache;
pub mod cap_token;
#[cfg(test)]
mod doubles;
pub mod executor;
pub mod harness;
mod keys;
pub mod proxy_token;
pub mod resume;
pub mod sigv4;
pub mod ticket;
mod upstream;

use std::collections::HashMap;
use std::error::Error;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, SystemTime};

use exec_gateway_protocol::cap_token::is_cap_token;
use exec_gateway_protocol::harness_token::{HarnessClaims, HarnessTokenError};
use exec_gateway_protocol::ids::{ExecutorId, TokenId, TurnId, UserId, WorkspaceId};
use hyper::HeaderMap;
use hyper::header::AUTHORIZATION;
use tokio::sync::{broadcast, watch};
use tokio::time::sleep;

pub use upstream::UpstreamError;

use crate::config::{self, Live};
use crate::ops::metrics::Metrics;
use crate::store::{KeyPurpose, Keyring, Revocation, Store, StoreError};

use self::cap_token::CapTokens;
use self::executor::ExecutorAuth;
use self::harness::{HarnessAuth, HarnessAuthError};
use self::keys::Keys;
use self::proxy_token::ProxyTokenAuth;
use self::resume::ResumeNames;
use self::ticket::Tickets;
use self::upstream::Upstream;

/// Longest credential looked at, in bytes. Cap-tokens are the longest by nature, below 1 KiB.
pub const CREDENTIAL_BYTES_MAX: usize = 4096;

/// How long the wall clock is not looked at while the end of a credential is waited for.
const EXPIRY_LOOK: Duration = Duration::from_secs(30);

/// Proof of who calls. Only this module makes one, so holding it means that a credential was checked.
#[derive(Debug, Clone)]
pub struct Principal(Arc<Claims>);

#[derive(Debug)]
struct Claims {
    workspace: WorkspaceId,
    user: Option<UserId>,
    credential: CredentialId,
    scopes: Scopes,
    expires_at: Option<SystemTime>,
    /// Unix second at which a cap-token was issued; a revocation of its workspace compares it.
    issued_at: Option<u64>,
}

impl Principal {
    /// The tenant.
    pub fn workspace(&self) -> &WorkspaceId {
        &self.0.workspace
    }
    /// The person, where the credential names one.
    pub fn user(&self) -> Option<&UserId> {
        self.0.user.as_ref()
    }
    /// Which credential was shown, fit for audit.
    pub fn credential(&self) -> &CredentialId {
        &self.0.credential
    }
    /// What the credential is limited to.
    pub fn scopes(&self) -> Scopes {
        self.0.scopes
    }
    /// When the credential ends by itself (wall clock); `None` where that is not known.
    pub fn expires_at(&self) -> Option<SystemTime> {
        self.0.expires_at
    }
    /// Waits until the credential has ended by itself; for ever where its end is not known.
    pub async fn expired(&self) {
        let Some(end) = self.expires_at() else { return std::future::pending().await };
        while let Ok(left) = end.duration_since(SystemTime::now())
            && !left.is_zero()
        {
            // The wall clock may be set meanwhile, and does not stand still while the machine sleeps.
            sleep(left.min(EXPIRY_LOOK)).await;
        }
    }
}

/// Names a credential without being one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum CredentialId {
    /// One of the gateway's own proxy tokens.
    Token(TokenId),
    /// SHA-256 of a proxy token that the validator upstream knows.
    Digest([u8; 32]),
    /// A cap-token, by the turn it was minted for.
    Cap(TurnId),
}

impl fmt::Display for CredentialId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Token(id) => write!(f, "{id}"),
            // Eight bytes tell tokens apart in a log and are no help in finding one.
            Self::Digest(digest) => {
                f.write_str("sha256:")?;
                digest[..8].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
            Self::Cap(turn) => write!(f, "cap:{turn}"),
        }
    }
}

/// What a credential is limited to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Scopes {
    /// Whether it may only read.
    pub read_only: bool,
}

/// Why a credential gives no [`Principal`]. The texts are fit for callers.
#[derive(Debug, Clone, thiserror::Error)]
pub enum AuthError {
    /// No `Authorization: Bearer` header, or an empty one.
    #[error("a bearer token is required")]
    MissingBearer,
    /// The credential is refused: unknown, altered, or in no known form.
    #[error("the token is not valid")]
    Invalid,
    /// It was valid once.
    #[error("the token has expired")]
    Expired,
    /// Its turn or its workspace was revoked.
    #[error("the token was revoked")]
    Revoked,
    /// Nobody could say. The source is for the log.
    #[error("the token cannot be checked at the moment")]
    Unavailable {
        /// What failed.
        source: Arc<dyn Error + Send + Sync>,
    },
}

impl AuthError {
    fn unavailable(source: impl Error + Send + Sync + 'static) -> Self {
        Self::Unavailable { source: Arc::new(source) }
    }
}

/// Why authentication cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum AuthStartError {
    /// Keys or revocations could not be read.
    #[error("the gateway's keys cannot be read")]
    Store(#[from] StoreError),
    /// The section `auth` names a validator that cannot be asked.
    #[error(transparent)]
    Upstream(#[from] UpstreamError),
}

/// All authentications of one gateway; cheap to clone.
#[derive(Clone)]
pub struct Auth(Arc<Parts>);

struct Parts {
    upstream: Live<Option<Upstream>>,
    proxy_tokens: ProxyTokenAuth,
    cap_tokens: CapTokens,
    executors: ExecutorAuth,
    tickets: Tickets,
    harness: HarnessAuth,
    resume: ResumeNames,
    counters: Arc<TokenCounters>,
    metrics: Arc<Metrics>,
    keys: HashMap<KeyPurpose, Keys>,
}

impl Auth {
    /// Signs and verifies with these keys from now on: they were rotated, and are stored.
    pub fn use_keys(&self, purpose: KeyPurpose, ring: Keyring) {
        self.0.keys[&purpose].replace(ring);
    }

    /// Reads keys and revocations once. The validator upstream is not asked yet.
    ///
    /// # Errors
    /// [`AuthStartError`] when the store does not answer or the configuration cannot work.
    pub async fn new(
        store: Store,
        settings: impl Into<Live<config::Auth>>,
        metrics: Arc<Metrics>,
    ) -> Result<Self, AuthStartError> {
        let counters = Arc::new(TokenCounters::default());
        let settings = settings.into();
        let upstream = Live::from(upstream(&settings.now(), &counters, &metrics)?);
        let clock = Clock::system();
        let mut keys = HashMap::new();
        for purpose in KeyPurpose::ALL {
            keys.insert(purpose, Keys::new(store.keyring(purpose).await?));
        }
        let of = |purpose| keys[&purpose].clone();
        Ok(Self(Arc::new(Parts {
            cap_tokens: CapTokens::new(store.clone(), of(KeyPurpose::CapToken), settings.clone(), clock.clone())
                .await?,
            tickets: Tickets::new(of(KeyPurpose::Ticket), settings.clone(), clock.clone()),
            harness: HarnessAuth::new(of(KeyPurpose::Harness), settings.clone(), clock.clone()),
            resume: ResumeNames::new(of(KeyPurpose::Resume)),
            executors: ExecutorAuth::new(store.clone(), of(KeyPurpose::Executor), upstream.clone(), clock.clone()),
            proxy_tokens: ProxyTokenAuth::new(store, upstream.clone(), settings, clock, counters.clone()),
            upstream,
            counters,
            metrics,
            keys,
        })))
    }

    /// The validator upstream as it is to be from now on; its authorities are read again.
    ///
    /// # Errors
    /// [`UpstreamError`] when it could not be asked.
    pub fn upstream(&self, config: &config::Auth) -> Result<NewUpstream, UpstreamError> {
        upstream(config, &self.0.counters, &self.0.metrics).map(NewUpstream)
    }

    /// Follows a reload that the settings of this have followed. Questions under way come to their end as they began.
    pub fn reconfigure(&self, upstream: NewUpstream) {
        self.0.upstream.set(upstream.0);
        self.0.proxy_tokens.resize();
    }

    /// Checks a caller's credential; its form decides how. Dropping the future harms no other caller of the same
    /// token.
    ///
    /// # Errors
    /// [`AuthError`]; `Unavailable` says nothing about the token.
    pub async fn principal(&self, bearer: &str) -> Result<Principal, AuthError> {
        if bearer.is_empty() {
            return Err(AuthError::MissingBearer);
        }
        if bearer.len() > CREDENTIAL_BYTES_MAX {
            return Err(AuthError::Invalid);
        }
        if is_cap_token(bearer) {
            return Ok(self.0.cap_tokens.verify(bearer)?);
        }
        self.0.proxy_tokens.principal(bearer).await
    }

    /// What the authorization of an encrypted handshake with this executor says, shown at our door. It opens a socket;
    /// once one is open its own end means nothing.
    ///
    /// # Errors
    /// [`AuthError::Invalid`], [`AuthError::Expired`].
    pub fn handshake(&self, authorization: &str, executor: &ExecutorId) -> Result<HarnessClaims, AuthError> {
        self.0.harness.admit(authorization, executor).map_err(|error| match error {
            HarnessAuthError::Token(HarnessTokenError::Expired) => AuthError::Expired,
            HarnessAuthError::Token(_) | HarnessAuthError::OtherHandshake => AuthError::Invalid,
        })
    }

    /// Watches for credentials that are taken away from now on. Made before a credential is checked, it misses nothing
    /// that happens to it afterwards.
    pub fn revocations(&self) -> Revocations {
        Revocations {
            proxy_tokens: self.0.proxy_tokens.subscribe(),
            cap_tokens: self.0.cap_tokens.subscribe(),
            auth: self.clone(),
        }
    }

    /// Proxy tokens.
    pub fn proxy_tokens(&self) -> &ProxyTokenAuth {
        &self.0.proxy_tokens
    }
    /// Cap-tokens.
    pub fn cap_tokens(&self) -> &CapTokens {
        &self.0.cap_tokens
    }
    /// Credentials of executors at register.
    pub fn executors(&self) -> &ExecutorAuth {
        &self.0.executors
    }
    /// Tickets of executor sockets.
    pub fn tickets(&self) -> &Tickets {
        &self.0.tickets
    }
    /// Authorizations of encrypted handshakes.
    pub fn harness(&self) -> &HarnessAuth {
        &self.0.harness
    }
    /// What harnesses are given sealed.
    pub fn resume_names(&self) -> &ResumeNames {
        &self.0.resume
    }
    /// What the token caches and the validator did so far.
    pub fn counters(&self) -> &TokenCounters {
        &self.0.counters
    }
}

/// A validator upstream that nobody asks yet.
pub struct NewUpstream(Option<Upstream>);

/// Whether the validator upstream could be asked with these settings; its file of authorities is read.
///
/// # Errors
/// [`UpstreamError`] says why not.
pub fn check_upstream(config: &config::Auth) -> Result<(), UpstreamError> {
    upstream(config, &Arc::default(), &Arc::default()).map(drop)
}

fn upstream(
    config: &config::Auth,
    counters: &Arc<TokenCounters>,
    metrics: &Arc<Metrics>,
) -> Result<Option<Upstream>, UpstreamError> {
    let url = config.upstream_url.as_deref().filter(|url| !url.is_empty());
    url.map(|url| Upstream::new(url, config, counters.clone(), metrics.clone())).transpose()
}

/// What operators have taken away since this was made.
pub struct Revocations {
    proxy_tokens: watch::Receiver<u64>,
    cap_tokens: broadcast::Receiver<Revocation>,
    auth: Auth,
}

impl Revocations {
    /// As [`Self::end_of`], and also once the credential of this principal has come to its end by itself.
    pub async fn end_of_right(self, bearer: &str, principal: &Principal) -> AuthError {
        tokio::select! {
            biased;
            refused = self.end_of(bearer) => refused,
            () = principal.expired() => AuthError::Expired,
        }
    }

    /// Returns once the credential has been taken away, with what its owner is told. A credential that expires, or
    /// cannot be checked at the moment, was not taken away.
    pub async fn end_of(mut self, bearer: &str) -> AuthError {
        loop {
            // The senders live in `auth`, so these end on news only; who missed some of it asks all the same.
            tokio::select! {
                _ = self.proxy_tokens.changed() => {}
                _ = self.cap_tokens.recv() => {}
            }
            match self.auth.principal(bearer).await {
                Err(refused @ (AuthError::Invalid | AuthError::Revoked)) => return refused,
                Ok(_) | Err(AuthError::MissingBearer | AuthError::Expired | AuthError::Unavailable { .. }) => {}
            }
        }
    }
}

/// The token of an `Authorization: Bearer` header; the scheme in any case, as HTTP has it (RFC 9110, 11.1).
///
/// # Errors
/// [`AuthError::MissingBearer`] without such a header or with an empty token, [`AuthError::Invalid`] when the token is
/// longer than [`CREDENTIAL_BYTES_MAX`], is no visible ASCII, or the header stands there twice.
pub fn bearer(headers: &HeaderMap) -> Result<&str, AuthError> {
    match authorization(headers, CREDENTIAL_BYTES_MAX)? {
        (scheme, credential) if scheme.eq_ignore_ascii_case("bearer") => Ok(credential),
        _ => Err(AuthError::MissingBearer),
    }
}

/// Scheme and credential of the only `Authorization` header, the credential of `bytes_max` bytes at most.
fn authorization(headers: &HeaderMap, bytes_max: usize) -> Result<(&str, &str), AuthError> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let value = values.next().ok_or(AuthError::MissingBearer)?;
    // Of two credentials a proxy before us may have checked the other one.
    if values.next().is_some() {
        return Err(AuthError::Invalid);
    }
    let value = value.to_str().map_err(|_| AuthError::Invalid)?;
    let (scheme, credential) = value.split_once(' ').ok_or(AuthError::MissingBearer)?;
    match credential.trim_matches([' ', '\t']) {
        "" => Err(AuthError::MissingBearer),
        long if long.len() > bytes_max => Err(AuthError::Invalid),
        spaced if spaced.contains([' ', '\t']) => Err(AuthError::Invalid),
        credential => Ok((scheme, credential)),
    }
}

/// The wall clock, which tests replace.
#[derive(Clone)]
struct Clock(Arc<dyn Fn() -> SystemTime + Send + Sync>);

impl Clock {
    fn system() -> Self {
        Self(Arc::new(SystemTime::now))
    }

    fn now(&self) -> SystemTime {
        (self.0)()
    }

    /// Unix seconds, which tokens carry.
    fn unix_secs(&self) -> u64 {
        unix_secs(self.now())
    }
}

/// A clock set before 1970 counts as 1970.
fn unix_secs(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

macro_rules! counters {
    ($( $(#[doc = $doc:literal])* $name:ident ),* $(,)?) => {
        /// What the token caches and the validator did since the start.
        #[derive(Debug, Default)]
        pub struct TokenCounters { $( $name: AtomicU64, )* }

        /// The counts of [`TokenCounters`] at one time.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        pub struct TokenCounts { $( $(#[doc = $doc])* pub $name: u64, )* }

        impl TokenCounters {
            /// The counts now.
            pub fn snapshot(&self) -> TokenCounts {
                TokenCounts { $( $name: self.$name.load(Relaxed), )* }
            }
        }
    };
}

counters! {
    /// Calls whose token was known as good.
    hits,
    /// Calls whose token had to be asked for, or for which another call was already asking.
    misses,
    /// Calls whose token was known as refused.
    negative_hits,
    /// Calls served by a token that could not be confirmed in time.
    stale,
    /// Questions sent to the validator.
    upstream_requests,
    /// Questions that got no verdict.
    upstream_failures,
    /// Good tokens forgotten for lack of room.
    positive_evictions,
    /// Refused tokens forgotten for lack of room.
    negative_evictions,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn headers(values: &[&str]) -> HeaderMap {
        values.iter().map(|value| (AUTHORIZATION, value.parse().unwrap())).collect()
    }

    #[test]
    fn the_scheme_is_read_in_any_case_and_with_any_number_of_spaces() {
        for value in ["Bearer abc", "bearer abc", "BEARER   abc", "bEaReR abc  "] {
            assert_eq!(bearer(&headers(&[value])).unwrap(), "abc", "{value:?}");
        }
    }

    #[test]
    fn without_a_bearer_token_it_is_missing_and_not_invalid() {
        for values in [&[][..], &["Basic abc"], &["Bearer"], &["Bearer "], &["Bearer    "], &["abc"], &["Bearerabc"]] {
            assert!(matches!(bearer(&headers(values)), Err(AuthError::MissingBearer)), "{values:?}");
        }
    }

    #[test]
    fn a_token_that_no_minter_makes_is_invalid() {
        let long = format!("Bearer {}", "x".repeat(CREDENTIAL_BYTES_MAX + 1));
        for values in [&[long.as_str()][..], &["Bearer a b"], &["Bearer a", "Bearer b"]] {
            assert!(matches!(bearer(&headers(values)), Err(AuthError::Invalid)), "{values:?}");
        }
        let longest = format!("Bearer {}", "x".repeat(CREDENTIAL_BYTES_MAX));
        assert_eq!(bearer(&headers(&[&longest])).unwrap().len(), CREDENTIAL_BYTES_MAX);
    }

    #[test]
    fn what_a_caller_reads_of_a_failure_never_names_its_cause() {
        let error = AuthError::unavailable(std::io::Error::other("http://10.0.0.1:8080/internal"));
        assert_eq!(error.to_string(), "the token cannot be checked at the moment");
        assert!(error.source().unwrap().to_string().contains("10.0.0.1"));
    }

    #[tokio::test]
    async fn the_form_of_a_credential_decides_how_it_is_checked() {
        let dir = crate::store::scratch::ScratchDir::new();
        let auth = Auth::new(Store::open(dir.path()).unwrap(), config::Auth::default(), Arc::default()).await.unwrap();
        let minted = auth.cap_tokens().for_workspace(&"w".parse().unwrap()).unwrap();
        assert_eq!(auth.principal(minted.expose()).await.unwrap().workspace().as_str(), "w");
        let executor = "exe_1".parse().unwrap();
        let ticket = auth.tickets().mint(&executor);
        let authorization = auth.harness().mint(&"w".parse().unwrap(), &executor, &"exr_1".parse().unwrap(), &[0; 32]);
        for credential in [ticket.as_str(), &authorization, "x", &"x".repeat(CREDENTIAL_BYTES_MAX + 1)] {
            assert!(matches!(auth.principal(credential).await, Err(AuthError::Invalid)));
        }
        assert!(auth.harness().admit(minted.expose(), &executor).is_err());
        assert!(auth.tickets().verify(&authorization, &executor).is_err());
        assert!(matches!(auth.principal("").await, Err(AuthError::MissingBearer)));
    }

    #[tokio::test]
    async fn a_validator_that_cannot_be_asked_is_reported_at_start() {
        let dir = crate::store::scratch::ScratchDir::new();
        let config = config::Auth { upstream_url: Some("validator:80".into()), ..config::Auth::default() };
        let started = Auth::new(Store::open(dir.path()).unwrap(), config, Arc::default()).await;
        assert!(matches!(started.err(), Some(AuthStartError::Upstream(UpstreamError::Url))));
    }
}
