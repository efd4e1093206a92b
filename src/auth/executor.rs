//! Credentials of executors when they register: the gateway's own derived tokens, or what the validator upstream knows.
//!
//! Owned by [`super::Auth`]. It waits for nobody's recovery (the caller holds and retries), and a stranger cannot tell
//! from its answers which executors exist.

use std::fmt;
use std::time::SystemTime;

use exec_gateway_protocol::ids::ExecutorId;
use hyper::HeaderMap;
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};
use zeroize::Zeroizing;

use super::keys::{Keys, verifying};
use super::sigv4::{Signature, SignedRequest};
use super::upstream::{ExecutorClaim, Upstream, UpstreamError};
use super::{Clock, authorization};
use crate::config::Live;
use crate::store::{Executor, Store, StoreError};

/// Longest credential of an executor, in bytes: assertions and access tokens of accounts are JWTs of a few KiB.
const CREDENTIAL_BYTES_MAX: usize = 16 * 1024;

/// Longest account id, in bytes.
const ACCOUNT_BYTES_MAX: usize = 256;

/// Checks what executors register with.
pub struct ExecutorAuth {
    store: Store,
    keys: Keys,
    upstream: Live<Option<Upstream>>,
    clock: Clock,
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
    /// With a validator upstream, executors show their credential; a signature could not be handed to it.
    #[error("signed registrations are not taken while a validator is configured")]
    NoSignatures,
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
    pub(super) fn new(store: Store, keys: Keys, upstream: Live<Option<Upstream>>, clock: Clock) -> Self {
        Self { store, keys, upstream, clock }
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
        match (Option::as_ref(&self.upstream.now()), shown.derived_token()) {
            (_, Some(token)) => self.verify_derived(executor, token).await?,
            (Some(upstream), None) => self.verify_upstream(upstream, executor, &shown).await?,
            (None, None) => return Err(ExecutorAuthError::Unauthorized),
        }
        Ok(shown.remember())
    }

    /// Checks that a request was signed with the token of this executor, which is not in it. Dropping the future drops
    /// the question.
    ///
    /// # Errors
    /// [`ExecutorAuthError`]; only `Unavailable` is worth a retry.
    pub async fn verify_signed(
        &self,
        executor: &ExecutorId,
        request: SignedRequest<'_>,
    ) -> Result<ExecutorCredential, ExecutorAuthError> {
        if self.upstream.now().is_some() {
            return Err(ExecutorAuthError::NoSignatures);
        }
        let signature = Signature::read(request, self.clock.now()).map_err(|_| ExecutorAuthError::Unauthorized)?;
        if signature.key_id() != executor.as_str() {
            return Err(ExecutorAuthError::Unauthorized);
        }
        let token = self.verify_known(executor, |token| signature.is_of(token)).await?;
        Ok(ExecutorCredential { digest: Sha256::digest(token.as_bytes()).into() })
    }

    async fn verify_derived(&self, id: &ExecutorId, token: &str) -> Result<(), ExecutorAuthError> {
        self.verify_known(id, |own| own.as_bytes().ct_eq(token.as_bytes())).await.map(drop)
    }

    /// The token of this executor that is the right one, if one of them is.
    async fn verify_known(
        &self,
        id: &ExecutorId,
        is_right: impl Fn(&str) -> Choice,
    ) -> Result<Zeroizing<String>, ExecutorAuthError> {
        let stored = self.store.executor(id).await?;
        // An unknown executor costs the same work and gives the same answer as a wrong token of a known one. Only who
        // shows the token that a deleted executor once had learns that it is gone.
        let known = stored.is_some();
        let executor = stored.unwrap_or_else(|| stand_in(id));
        let ring = self.keys.now();
        let tried = verifying(&ring).map(|key| {
            let own = executor.token(key);
            (is_right(&own), own)
        });
        // Both keys are tried, whichever is the right one.
        let tried: Vec<(Choice, Zeroizing<String>)> = tried.collect();
        match tried.into_iter().find(|(right, _)| (*right).into()) {
            Some((_, token)) if known => Ok(token),
            Some(_) => Err(ExecutorAuthError::NotRegistered),
            None => Err(ExecutorAuthError::Unauthorized),
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
        // One without an owner was made by an operator here and opens to its own token alone: else anybody whom the
        // validator knows could take its place.
        if executor.user == Some(user) { Ok(()) } else { Err(ExecutorAuthError::NotRegistered) }
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::sync::Arc;

    use exec_gateway_protocol::ids::UserId;
    use serde_json::json;

    use super::*;
    use crate::auth::doubles::{FakeValidator, Reply, ok, refused, ring};
    use crate::store::scratch::ScratchDir;

    struct Rig {
        store: Store,
        validator: FakeValidator,
        embedded: ExecutorAuth,
        upstream: ExecutorAuth,
        _dir: ScratchDir,
    }

    async fn rig() -> Rig {
        let dir = ScratchDir::new();
        let store = Store::open(dir.path()).unwrap();
        let validator = FakeValidator::start().await;
        let client = validator.client(&Arc::default());
        Rig {
            embedded: ExecutorAuth::new(store.clone(), ring(1, Some(2)), None.into(), Clock::system()),
            upstream: ExecutorAuth::new(store.clone(), ring(1, Some(2)), Some(client).into(), Clock::system()),
            store,
            validator,
            _dir: dir,
        }
    }

    impl Rig {
        async fn executor(&self, name: &str, user: Option<&str>) -> Executor {
            let user = user.map(|user| UserId::new(user).unwrap());
            let (workspace, name) = ("w".parse().unwrap(), name.parse().unwrap());
            self.store.create_executor(&workspace, &name, false, user.as_ref()).await.unwrap()
        }
    }

    fn token(executor: &Executor, key: u8) -> String {
        executor.token(&ring(key, None).now().current).to_string()
    }

    fn headers(authorization: &str) -> HeaderMap {
        [(hyper::header::AUTHORIZATION, authorization.parse().unwrap())].into_iter().collect()
    }

    fn kind<T>(answer: Result<T, ExecutorAuthError>) -> &'static str {
        match answer {
            Ok(_) => "ok",
            Err(ExecutorAuthError::Unauthorized) => "unauthorized",
            Err(ExecutorAuthError::NotRegistered) => "not registered",
            Err(ExecutorAuthError::NoSignatures) => "no signatures",
            Err(ExecutorAuthError::Unavailable(_)) => "unavailable",
        }
    }

    #[tokio::test]
    async fn an_executor_registers_with_its_own_token_of_either_key() {
        let rig = rig().await;
        let (executor, other) = (rig.executor("a", None).await, rig.executor("b", None).await);
        for (authorization, answer) in [
            (format!("Bearer {}", token(&executor, 1)), "ok"),
            (format!("bearer  {}", token(&executor, 2)), "ok"),
            (format!("Bearer {}", token(&executor, 3)), "unauthorized"),
            (format!("Bearer {}", token(&other, 1)), "unauthorized"),
            (format!("AgentAssertion {}", token(&executor, 1)), "unauthorized"),
            (format!("Basic {}", token(&executor, 1)), "unauthorized"),
            ("Bearer egx_".into(), "unauthorized"),
            ("Bearer something".into(), "unauthorized"),
        ] {
            assert_eq!(kind(rig.embedded.verify(&executor.id, &headers(&authorization)).await), answer);
        }
        assert_eq!(kind(rig.embedded.verify(&executor.id, &HeaderMap::new()).await), "unauthorized");
    }

    #[tokio::test]
    async fn an_unknown_executor_answers_as_a_known_one_unless_the_token_was_its_own() {
        let rig = rig().await;
        let executor = rig.executor("a", None).await;
        let own = headers(&format!("Bearer {}", token(&executor, 1)));
        let bad = headers("Bearer egx_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA");
        let unknown = "exe_unknown".parse().unwrap();
        assert_eq!(kind(rig.embedded.verify(&executor.id, &bad).await), "unauthorized");
        assert_eq!(kind(rig.embedded.verify(&unknown, &bad).await), "unauthorized");
        rig.store.delete_executor(&executor.id).await.unwrap();
        assert_eq!(kind(rig.embedded.verify(&executor.id, &own).await), "not registered");
    }

    #[tokio::test]
    async fn the_validator_is_asked_with_scheme_credential_and_account() {
        let rig = rig().await;
        let executor = rig.executor("a", Some("ann")).await;
        rig.validator.replies(ok(r#"{"user_id":"ann"}"#));
        let mut shown = headers("AgentAssertion jwt");
        shown.insert("ChatGPT-Account-ID", "acc".parse().unwrap());
        let credential = rig.upstream.verify(&executor.id, &shown).await.unwrap();
        let (path, secret, body) = rig.validator.last_question();
        assert_eq!((path.as_str(), secret.as_deref()), ("/internal/codex-auth/validate", Some("between-us")));
        assert_eq!(body, json!({"scheme": "agent_assertion", "assertion": "jwt", "account_id": "acc"}));
        assert!(ExecutorCredential::shown(&shown).unwrap().is(&credential.digest()));
        assert_eq!(credential.digest(), <[u8; 32]>::from(Sha256::digest("jwt")));
        assert!(rig.upstream.verify(&executor.id, &headers("Bearer access")).await.is_ok());
        assert_eq!(rig.validator.last_question().2, json!({"scheme": "bearer", "token": "access", "account_id": ""}));
    }

    #[tokio::test]
    async fn somebody_elses_executor_answers_as_an_unknown_one() {
        let rig = rig().await;
        let executor = rig.executor("a", Some("ann")).await;
        rig.validator.replies(ok(r#"{"user_id":"bob"}"#));
        let unknown = "exe_unknown".parse().unwrap();
        for id in [&executor.id, &unknown] {
            assert_eq!(kind(rig.upstream.verify(id, &headers("Bearer access")).await), "not registered");
        }
    }

    #[tokio::test]
    async fn an_operators_executor_opens_to_its_own_token_alone() {
        let rig = rig().await;
        let executor = rig.executor("a", None).await;
        rig.validator.replies(ok(r#"{"user_id":"ann"}"#));
        assert_eq!(kind(rig.upstream.verify(&executor.id, &headers("Bearer access")).await), "not registered");
    }

    #[tokio::test]
    async fn what_names_nobody_is_refused_and_what_fails_is_not() {
        let rig = rig().await;
        let executor = rig.executor("a", Some("ann")).await;
        for (reply, answer) in [
            (refused(), "unauthorized"),
            (ok(r#"{"user_id":""}"#), "unauthorized"),
            (ok(r#"{"error":"no"}"#), "unauthorized"),
            (Reply::Answer(500, String::new()), "unavailable"),
            (Reply::Answer(404, String::new()), "unavailable"),
            (ok("garbage"), "unavailable"),
            (ok(r#"{"user_id":"ann"}"#), "ok"),
        ] {
            rig.validator.replies(reply);
            assert_eq!(kind(rig.upstream.verify(&executor.id, &headers("Bearer access")).await), answer);
        }
    }

    #[tokio::test]
    async fn a_derived_token_is_checked_here_even_with_a_validator() {
        let rig = rig().await;
        let executor = rig.executor("a", None).await;
        let shown = headers(&format!("Bearer {}", token(&executor, 1)));
        assert_eq!(kind(rig.upstream.verify(&executor.id, &shown).await), "ok");
        assert_eq!(rig.validator.asked(), 0);
    }

    #[test]
    fn a_credential_is_never_shown() {
        let credential = ExecutorCredential::shown(&headers("Bearer hunter2")).unwrap();
        assert_eq!(format!("{credential:?}"), "ExecutorCredential(***)");
    }
}
