//! Credentials of executors when they register: the gateway's own derived tokens, or what the validator upstream knows.
//!
//! Owned by [`super::Auth`]. It waits for nobody's recovery (the caller holds and retries), and a stranger cannot tell
//! from its answers which executors exist.

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use exec_gateway_protocol::ids::ExecutorId;
use hyper::HeaderMap;
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

use super::authorization;
use super::cap_token::keys;
use super::upstream::{ExecutorClaim, Upstream, UpstreamError};
use crate::store::{Executor, Keyring, Store, StoreError};

/// Longest credential of an executor, in bytes: assertions and access tokens of accounts are JWTs of a few KiB.
const CREDENTIAL_BYTES_MAX: usize = 16 * 1024;

/// Longest account id, in bytes.
const ACCOUNT_BYTES_MAX: usize = 256;

/// Checks what executors register with.
pub struct ExecutorAuth {
    store: Store,
    keys: Keyring,
    upstream: Option<Arc<Upstream>>,
}

/// Remembers a credential without being one, so that later requests of the same executor can be compared with it.
#[derive(Clone)]
pub struct ExecutorCredential {
    digest: [u8; 32],
}

impl ExecutorCredential {
    /// The credential that the headers show, checked by nobody: for comparing it with the one of a registration.
    ///
    /// # Errors
    /// [`ExecutorAuthError::Unauthorized`] when they show none.
    pub fn shown(headers: &HeaderMap) -> Result<Self, ExecutorAuthError> {
        Shown::read(headers).map(|shown| shown.remember())
    }

    /// SHA-256 of the credential, as stored with a registration.
    pub fn digest(&self) -> [u8; 32] {
        self.digest
    }

    /// Whether it is the credential of that digest, in constant time.
    pub fn is(&self, digest: &[u8; 32]) -> bool {
        self.digest.ct_eq(digest).into()
    }
}

impl fmt::Debug for ExecutorCredential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ExecutorCredential(***)")
    }
}

/// Why an executor may not register.
#[derive(Debug, thiserror::Error)]
pub enum ExecutorAuthError {
    /// The credential is missing, of an unknown scheme, or refused.
    #[error("unauthorized")]
    Unauthorized,
    /// The credential is good, but not for an executor of this id: unknown, or somebody else's.
    #[error("executor not registered")]
    NotRegistered,
    /// Nobody could say; a later try may succeed. The source is for the log.
    #[error("the authentication service is unavailable")]
    Unavailable(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl From<StoreError> for ExecutorAuthError {
    fn from(error: StoreError) -> Self {
        Self::Unavailable(error.into())
    }
}

impl From<UpstreamError> for ExecutorAuthError {
    fn from(error: UpstreamError) -> Self {
        Self::Unavailable(error.into())
    }
}

impl ExecutorAuth {
    pub(super) fn new(store: Store, keys: Keyring, upstream: Option<Arc<Upstream>>) -> Self {
        Self { store, keys, upstream }
    }

    /// Checks that the headers show a credential of this executor. Dropping the future drops the question.
    ///
    /// # Errors
    /// [`ExecutorAuthError`]; only `Unavailable` is worth a retry.
    pub async fn verify(
        &self,
        executor: &ExecutorId,
        headers: &HeaderMap,
    ) -> Result<ExecutorCredential, ExecutorAuthError> {
        let shown = Shown::read(headers)?;
        match (&self.upstream, shown.derived_token()) {
            (_, Some(token)) => self.verify_derived(executor, token).await?,
            (Some(upstream), None) => self.verify_upstream(upstream, executor, &shown).await?,
            (None, None) => return Err(ExecutorAuthError::Unauthorized),
        }
        Ok(shown.remember())
    }

    async fn verify_derived(&self, id: &ExecutorId, token: &str) -> Result<(), ExecutorAuthError> {
        let stored = self.store.executor(id).await?;
        // An unknown executor costs the same work and gives the same answer as a wrong token of a known one. Only who
        // shows the token that a deleted executor once had learns that it is gone.
        let known = stored.is_some();
        let executor = stored.unwrap_or_else(|| stand_in(id));
        let right = keys(&self.keys)
            .fold(Choice::from(0), |right, key| right | executor.token(key).as_bytes().ct_eq(token.as_bytes()));
        match (bool::from(right), known) {
            (true, true) => Ok(()),
            (true, false) => Err(ExecutorAuthError::NotRegistered),
            (false, _) => Err(ExecutorAuthError::Unauthorized),
        }
    }

    async fn verify_upstream(
        &self,
        upstream: &Upstream,
        id: &ExecutorId,
        shown: &Shown<'_>,
    ) -> Result<(), ExecutorAuthError> {
        // The store is asked second, so that a refused credential learns nothing about the id.
        let user = upstream.validate_executor(&shown.claim()).await?.ok_or(ExecutorAuthError::Unauthorized)?;
        let executor = self.store.executor(id).await?.ok_or(ExecutorAuthError::NotRegistered)?;
        match executor.user {
            Some(owner) if owner != user => Err(ExecutorAuthError::NotRegistered),
            _ => Ok(()),
        }
    }
}

fn stand_in(id: &ExecutorId) -> Executor {
    Executor { id: id.clone(), generation: 1, user: None, created_at: SystemTime::UNIX_EPOCH, last_seen: None }
}

/// What the headers of an executor show.
struct Shown<'a> {
    scheme: Scheme,
    credential: &'a str,
    account: &'a str,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Scheme {
    Bearer,
    AgentAssertion,
}

impl<'a> Shown<'a> {
    fn read(headers: &'a HeaderMap) -> Result<Self, ExecutorAuthError> {
        let unauthorized = ExecutorAuthError::Unauthorized;
        let Ok((scheme, credential)) = authorization(headers, CREDENTIAL_BYTES_MAX) else { return Err(unauthorized) };
        let scheme = match scheme {
            name if name.eq_ignore_ascii_case("bearer") => Scheme::Bearer,
            name if name.eq_ignore_ascii_case("agentassertion") => Scheme::AgentAssertion,
            _ => return Err(unauthorized),
        };
        let account = headers.get("chatgpt-account-id").map_or(Ok(""), |value| value.to_str());
        match account {
            Ok(account) if account.len() <= ACCOUNT_BYTES_MAX => Ok(Self { scheme, credential, account }),
            _ => Err(unauthorized),
        }
    }

    /// The credential if it has the form that the gateway itself gives executors.
    fn derived_token(&self) -> Option<&'a str> {
        (self.scheme == Scheme::Bearer && self.credential.starts_with("egx_")).then_some(self.credential)
    }

    fn claim(&self) -> ExecutorClaim<'a> {
        let account_id = self.account;
        match self.scheme {
            Scheme::Bearer => ExecutorClaim::Bearer { token: self.credential, account_id },
            Scheme::AgentAssertion => ExecutorClaim::AgentAssertion { assertion: self.credential, account_id },
        }
    }

    fn remember(&self) -> ExecutorCredential {
        ExecutorCredential { digest: Sha256::digest(self.credential).into() }
    }
}
