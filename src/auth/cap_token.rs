//! Cap-tokens: signed rights of a workspace, verified, minted for the gateway's own calls, and revoked.
//!
//! Owned by [`super::Auth`]. Revocations are stored before they count, survive restarts and are announced, so that
//! live streams end; a token's own wish not to be audited is never followed.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use exec_gateway_protocol::cap_token::{self as wire, CapClaims, CapToken, CapTokenError};
use exec_gateway_protocol::ids::{TurnId, WorkspaceId};
use lru::LruCache;
use tokio::sync::broadcast;

use super::cache::lock;
use super::keys::{Keys, verifying};
use super::{AuthError, Claims, Clock, CredentialId, Principal, Scopes, unix_secs};
use crate::config::{self, Live, Secret};
use crate::store::{Revocation, RevocationScope, Store, StoreError};

/// No minter gives more than a year; a token far beyond is a mistake that no revocation list would outlive.
const LIFE_MAX_SECS: u64 = 400 * 24 * 60 * 60;

/// How far ahead of ours the clock of another minter may be. What claims to be issued later than that would outlive the
/// revocations of its workspace, which end what was issued before them.
const AHEAD_MAX_SECS: u64 = 5 * 60;

/// A minted token is renewed before less than this is left, so that a call made with it can still connect.
const LIFE_LEFT_MIN_SECS: u64 = 60;

/// Workspaces whose minted token is kept; minting another costs microseconds.
const MINTED_MAX: usize = 4096;

/// Revocations a subscriber may lag behind before it has to look at all its streams again.
const ANNOUNCED_MAX: usize = 1024;

/// Verifies, mints and revokes cap-tokens; cheap to clone.
#[derive(Clone)]
pub struct CapTokens(Arc<Inner>);

struct Inner {
    store: Store,
    keys: Keys,
    clock: Clock,
    settings: Live<config::Auth>,
    revoked: Mutex<Revoked>,
    minted: Mutex<LruCache<WorkspaceId, Minted>>,
    announce: broadcast::Sender<Revocation>,
}

/// Why a cap-token gives no [`Principal`], or a workspace no cap-token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CapTokenRefused {
    /// Not of the form of a cap-token, or names no valid workspace or turn.
    #[error("the cap-token is malformed")]
    Malformed,
    /// Signed by no key of ours.
    #[error("the cap-token's signature is wrong")]
    BadSignature,
    /// Its end has passed.
    #[error("the cap-token has expired")]
    Expired,
    /// It claims to live longer than 400 days from now.
    #[error("the cap-token claims too long a life")]
    TooLong,
    /// It claims to be issued in the future.
    #[error("the cap-token is not issued yet")]
    TooEarly,
    /// Its turn, or its workspace at a later time than it was issued, was revoked.
    #[error("the cap-token was revoked")]
    Revoked,
}

impl From<CapTokenError> for CapTokenRefused {
    fn from(error: CapTokenError) -> Self {
        match error {
            CapTokenError::Malformed => Self::Malformed,
            CapTokenError::BadSignature => Self::BadSignature,
            CapTokenError::Expired => Self::Expired,
        }
    }
}

impl From<CapTokenRefused> for AuthError {
    fn from(error: CapTokenRefused) -> Self {
        match error {
            CapTokenRefused::Malformed
            | CapTokenRefused::BadSignature
            | CapTokenRefused::TooLong
            | CapTokenRefused::TooEarly => Self::Invalid,
            CapTokenRefused::Expired => Self::Expired,
            CapTokenRefused::Revoked => Self::Revoked,
        }
    }
}

struct Minted {
    token: Secret,
    /// The key that signed it: after another rotation it would open nothing.
    kid: String,
    turn: TurnId,
    issued_at: u64,
    expires_at: u64,
}

impl CapTokens {
    pub(super) async fn new(
        store: Store,
        keys: Keys,
        settings: Live<config::Auth>,
        clock: Clock,
    ) -> Result<Self, StoreError> {
        let mut revoked = Revoked::default();
        store.revocations().await?.iter().for_each(|revocation| revoked.add(revocation));
        Ok(Self(Arc::new(Inner {
            store,
            keys,
            clock,
            settings,
            revoked: Mutex::new(revoked),
            minted: Mutex::new(LruCache::unbounded()),
            announce: broadcast::Sender::new(ANNOUNCED_MAX),
        })))
    }

    /// Checks a cap-token against the keys, the wall clock and the revocations.
    ///
    /// # Errors
    /// [`CapTokenRefused`].
    pub fn verify(&self, token: &str) -> Result<Principal, CapTokenRefused> {
        let now = self.0.clock.unix_secs();
        let claims = self.0.verified_claims(token, now)?;
        if claims.exp > now.saturating_add(LIFE_MAX_SECS) {
            return Err(CapTokenRefused::TooLong);
        }
        if claims.iat > now.saturating_add(AHEAD_MAX_SECS) {
            return Err(CapTokenRefused::TooEarly);
        }
        if lock(&self.0.revoked).ends(&claims.turn_id, &claims.workspace_id, claims.iat) {
            return Err(CapTokenRefused::Revoked);
        }
        Ok(Principal(Arc::new(Claims {
            workspace: claims.workspace_id,
            user: claims.user_id,
            credential: CredentialId::Cap(claims.turn_id),
            scopes: Scopes::default(),
            expires_at: SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(claims.exp)),
            issued_at: Some(claims.iat),
        })))
    }

    /// A token of the gateway itself for a workspace: the last one minted while it has enough life left, else a new
    /// one. Each has a turn of its own, so revoking one blocks no other workspace.
    ///
    /// # Errors
    /// [`CapTokenRefused::Revoked`] when the workspace is revoked from a time that is still to come.
    pub fn for_workspace(&self, workspace: &WorkspaceId) -> Result<Secret, CapTokenRefused> {
        let now = self.0.clock.unix_secs();
        let ttl_secs = self.0.settings.now().cap_token_ttl_secs.clamp(1, LIFE_MAX_SECS);
        let life_left_min = (ttl_secs / 10).max(LIFE_LEFT_MIN_SECS);
        let ring = self.0.keys.now();
        let mut minted = lock(&self.0.minted);
        // Always the second of the two locks.
        let revoked = lock(&self.0.revoked);
        if let Some(last) = minted.get(workspace)
            && last.kid == ring.current.kid
            && last.expires_at >= now.saturating_add(life_left_min)
            && !revoked.ends(&last.turn, workspace, last.issued_at)
        {
            return Ok(last.token.clone());
        }
        let issued_at = match revoked.workspaces.get(workspace) {
            Some(end) if end.issued_until > now => return Err(CapTokenRefused::Revoked),
            // Seconds are coarse: what is minted in the second of the revocation must not fall under it.
            Some(end) if end.issued_until == now => now + 1,
            _ => now,
        };
        drop(revoked);
        let turn = TurnId::new(&format!("sdk_{}", random_12())).expect("16 plain characters");
        let expires_at = now.saturating_add(ttl_secs);
        let claims = CapClaims {
            turn_id: turn.clone(),
            workspace_id: workspace.clone(),
            user_id: None,
            iat: issued_at,
            exp: expires_at,
            skip_audit: true,
            kid: Some(ring.current.kid.clone()),
        };
        let token = Secret::new(wire::mint(&claims, &ring.current.secret));
        let kid = ring.current.kid.clone();
        minted.put(workspace.clone(), Minted { token: token.clone(), kid, turn, issued_at, expires_at });
        if minted.len() > MINTED_MAX {
            minted.pop_lru();
        }
        Ok(token)
    }

    /// Stores a revocation, then lets it count and announces it. Once begun, it is completed even if the future is
    /// dropped.
    ///
    /// # Errors
    /// [`StoreError`] when it could not be stored; nothing is revoked then.
    pub async fn revoke(&self, revocation: Revocation) -> Result<(), StoreError> {
        let tokens = self.clone();
        let task = tokio::spawn(async move {
            tokens.0.store.add_revocation(revocation.clone(), tokens.0.settings.now().revocations_max).await?;
            tokens.apply(&revocation);
            Ok(())
        });
        task.await.expect("storing does not panic, and nobody aborts the task")
    }

    /// Lets a revocation count that is stored already, and announces it.
    pub fn apply(&self, revocation: &Revocation) {
        let now = self.0.clock.now();
        let mut revoked = lock(&self.0.revoked);
        if revoked.len() >= self.0.settings.now().revocations_max {
            revoked.forget(now);
        }
        revoked.add(revocation);
        drop(revoked);
        // Without subscribers there are no live streams to end.
        let _ = self.0.announce.send(revocation.clone());
    }

    /// Announces each revocation from now on. Who lags too far behind asks [`CapTokens::stands`] for each of its
    /// streams.
    pub fn subscribe(&self) -> broadcast::Receiver<Revocation> {
        self.0.announce.subscribe()
    }

    /// Whether no revocation ends what was opened with this principal. Always true for proxy tokens.
    pub fn stands(&self, principal: &Principal) -> bool {
        match (principal.credential(), principal.0.issued_at) {
            (CredentialId::Cap(turn), Some(issued_at)) => {
                !lock(&self.0.revoked).ends(turn, principal.workspace(), issued_at)
            }
            _ => true,
        }
    }
}

impl Inner {
    fn verified_claims(&self, token: &str, now: u64) -> Result<CapClaims, CapTokenRefused> {
        let named = CapToken::parse(token)?.kid().map(str::to_owned);
        let ring = self.keys.now();
        for key in verifying(&ring).filter(|key| named.as_ref().is_none_or(|kid| key.kid == *kid)) {
            match CapToken::parse(token)?.verify(&key.secret, now) {
                Err(CapTokenError::BadSignature) => {}
                verdict => return Ok(verdict?),
            }
        }
        Err(CapTokenRefused::BadSignature)
    }
}

/// Twelve random hexadecimal digits: those of a version 4 UUID before its version digit.
fn random_12() -> String {
    let mut digits = uuid::Uuid::new_v4().simple().to_string();
    digits.truncate(12);
    digits
}

/// What is revoked: a plain value, bounded by what the store accepts.
#[derive(Default)]
struct Revoked {
    turns: HashMap<TurnId, SystemTime>,
    workspaces: HashMap<WorkspaceId, WorkspaceEnd>,
}

struct WorkspaceEnd {
    /// Tokens issued up to this Unix second have ended.
    issued_until: u64,
    forget_at: SystemTime,
}

impl Revoked {
    fn len(&self) -> usize {
        self.turns.len() + self.workspaces.len()
    }

    fn add(&mut self, revocation: &Revocation) {
        let forget_at = revocation.forget_at;
        match &revocation.scope {
            RevocationScope::Turn(turn) => {
                let known = self.turns.entry(turn.clone()).or_insert(forget_at);
                *known = forget_at.max(*known);
            }
            RevocationScope::Workspace(workspace) => {
                let issued_until = unix_secs(revocation.revoked_at);
                let end = self.workspaces.entry(workspace.clone()).or_insert(WorkspaceEnd { issued_until, forget_at });
                end.issued_until = end.issued_until.max(issued_until);
                end.forget_at = end.forget_at.max(forget_at);
            }
        }
    }

    fn forget(&mut self, now: SystemTime) {
        self.turns.retain(|_, forget_at| now < *forget_at);
        self.workspaces.retain(|_, end| now < end.forget_at);
    }

    fn ends(&self, turn: &TurnId, workspace: &WorkspaceId, issued_at: u64) -> bool {
        self.turns.contains_key(turn) || self.workspaces.get(workspace).is_some_and(|end| issued_at <= end.issued_until)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use base64::Engine;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;
    use hmac::{Hmac, Mac};
    use sha2::Sha256;

    use super::*;
    use crate::auth::doubles::{FakeClock, ring};
    use crate::store::scratch::ScratchDir;

    const NOW: u64 = 1_000_000;

    struct Rig {
        tokens: CapTokens,
        clock: FakeClock,
        store: Store,
        _dir: ScratchDir,
    }

    async fn rig() -> Rig {
        let dir = ScratchDir::new();
        let store = Store::open(dir.path()).unwrap();
        let clock = FakeClock::at(NOW);
        let tokens = open(&store, &clock).await;
        Rig { tokens, clock, store, _dir: dir }
    }

    async fn open(store: &Store, clock: &FakeClock) -> CapTokens {
        CapTokens::new(store.clone(), ring(1, Some(2)), config::Auth::default().into(), clock.clock()).await.unwrap()
    }

    fn claims() -> CapClaims {
        CapClaims {
            turn_id: "turn".parse().unwrap(),
            workspace_id: "w".parse().unwrap(),
            user_id: Some("ann".parse().unwrap()),
            iat: NOW,
            exp: NOW + 3600,
            skip_audit: false,
            kid: None,
        }
    }

    fn signed(key: u8, claims: &CapClaims) -> String {
        wire::mint(claims, &ring(key, None).now().current.secret)
    }

    impl Rig {
        fn refusal(&self, token: &str) -> Option<CapTokenRefused> {
            self.tokens.verify(token).err()
        }

        async fn revoke(&self, scope: RevocationScope) {
            let revoked_at = self.clock.now();
            let forget_at = revoked_at + Duration::from_secs(LIFE_MAX_SECS);
            self.tokens.revoke(Revocation { scope, revoked_at, forget_at }).await.unwrap();
        }

        async fn revoke_workspace(&self, workspace: &str) {
            self.revoke(RevocationScope::Workspace(workspace.parse().unwrap())).await;
        }
    }

    #[tokio::test]
    async fn a_good_cap_token_names_workspace_user_turn_and_end() {
        let rig = rig().await;
        let principal = rig.tokens.verify(&signed(1, &claims())).unwrap();
        assert_eq!((principal.workspace().as_str(), principal.user().unwrap().as_str()), ("w", "ann"));
        assert_eq!(principal.credential(), &CredentialId::Cap("turn".parse().unwrap()));
        assert_eq!(principal.expires_at(), Some(SystemTime::UNIX_EPOCH + Duration::from_secs(NOW + 3600)));
    }

    #[tokio::test]
    async fn without_a_kid_both_keys_are_tried_and_with_one_only_its_own() {
        let rig = rig().await;
        let kid = |kid: &str| CapClaims { kid: Some(kid.into()), ..claims() };
        for (token, refusal) in [
            (signed(1, &claims()), None),
            (signed(2, &claims()), None),
            (signed(3, &claims()), Some(CapTokenRefused::BadSignature)),
            (signed(1, &kid("kid1")), None),
            (signed(2, &kid("kid2")), None),
            (signed(1, &kid("kid2")), Some(CapTokenRefused::BadSignature)),
            (signed(1, &kid("kid9")), Some(CapTokenRefused::BadSignature)),
        ] {
            assert_eq!(rig.refusal(&token), refusal);
        }
    }

    #[tokio::test]
    async fn an_altered_cap_token_is_refused() {
        let rig = rig().await;
        let token = signed(1, &claims());
        let other = signed(1, &CapClaims { workspace_id: "other".parse().unwrap(), ..claims() });
        let payload = |token: &str| token.split('.').nth(1).unwrap().to_owned();
        let swapped = token.replace(&payload(&token), &payload(&other));
        assert_eq!(rig.refusal(&swapped), Some(CapTokenRefused::BadSignature));
        assert_eq!(rig.refusal(token.rsplit_once('.').unwrap().0), Some(CapTokenRefused::Malformed));
    }

    #[tokio::test]
    async fn a_cap_token_is_good_in_its_last_second_and_not_after_it() {
        let rig = rig().await;
        let token = signed(1, &claims());
        rig.clock.advance(3600);
        assert_eq!(rig.refusal(&token), None);
        rig.clock.advance(1);
        assert_eq!(rig.refusal(&token), Some(CapTokenRefused::Expired));
    }

    #[tokio::test]
    async fn a_life_of_more_than_400_days_is_refused() {
        let rig = rig().await;
        let lasting = |secs: u64| signed(1, &CapClaims { exp: NOW.saturating_add(secs), ..claims() });
        assert_eq!(rig.refusal(&lasting(LIFE_MAX_SECS)), None);
        assert_eq!(rig.refusal(&lasting(LIFE_MAX_SECS + 1)), Some(CapTokenRefused::TooLong));
        assert_eq!(rig.refusal(&lasting(u64::MAX)), Some(CapTokenRefused::TooLong));
    }

    #[tokio::test]
    async fn a_token_of_the_future_is_refused_so_that_none_outlives_the_revocation_of_its_workspace() {
        let rig = rig().await;
        let issued = |ahead: u64| signed(1, &CapClaims { iat: NOW + ahead, exp: NOW + 36_000, ..claims() });
        assert_eq!(rig.refusal(&issued(AHEAD_MAX_SECS)), None);
        let early = issued(AHEAD_MAX_SECS + 1);
        assert_eq!(rig.refusal(&early), Some(CapTokenRefused::TooEarly));
        rig.clock.advance(1);
        assert_eq!(rig.refusal(&early), None);
        rig.clock.advance(AHEAD_MAX_SECS);
        rig.revoke_workspace("w").await;
        assert_eq!(rig.refusal(&early), Some(CapTokenRefused::Revoked));
    }

    #[tokio::test]
    async fn a_token_that_names_no_workspace_is_malformed() {
        let rig = rig().await;
        for workspace in ["\"\"", "null", "\"a/b\""] {
            let payload = format!(r#"{{"turn_id":"t","workspace_id":{workspace},"iat":{NOW},"exp":{}}}"#, NOW + 60);
            let signed = format!("eyJhbGciOiJIUzI1NiIsInR5cCI6IkNYRyJ9.{}", URL_SAFE_NO_PAD.encode(payload));
            let mut mac = <Hmac<Sha256> as Mac>::new_from_slice(&ring(1, None).now().current.secret).unwrap();
            mac.update(signed.as_bytes());
            let token = format!("{signed}.{}", URL_SAFE_NO_PAD.encode(mac.finalize().into_bytes()));
            assert_eq!(rig.refusal(&token), Some(CapTokenRefused::Malformed), "{workspace}");
        }
    }

    #[tokio::test]
    async fn a_revoked_turn_ends_its_tokens_and_no_others_also_after_a_restart() {
        let rig = rig().await;
        let other = signed(1, &CapClaims { turn_id: "other".parse().unwrap(), ..claims() });
        rig.revoke(RevocationScope::Turn("turn".parse().unwrap())).await;
        let restarted = open(&rig.store, &rig.clock).await;
        for tokens in [&rig.tokens, &restarted] {
            assert_eq!(tokens.verify(&signed(1, &claims())).unwrap_err(), CapTokenRefused::Revoked);
            assert!(tokens.verify(&other).is_ok());
        }
    }

    #[tokio::test]
    async fn a_revoked_workspace_ends_what_was_issued_up_to_then() {
        let rig = rig().await;
        rig.revoke_workspace("w").await;
        let issued = |iat: u64| signed(1, &CapClaims { iat, ..claims() });
        assert_eq!(rig.refusal(&issued(NOW - 1)), Some(CapTokenRefused::Revoked));
        assert_eq!(rig.refusal(&issued(NOW)), Some(CapTokenRefused::Revoked));
        assert_eq!(rig.refusal(&issued(0)), Some(CapTokenRefused::Revoked));
        assert_eq!(rig.refusal(&issued(NOW + 1)), None);
        let elsewhere = CapClaims { workspace_id: "v".parse().unwrap(), ..claims() };
        assert_eq!(rig.refusal(&signed(1, &elsewhere)), None);
    }

    #[tokio::test]
    async fn a_revocation_that_cannot_be_stored_does_not_count() {
        let rig = rig().await;
        let config = config::Auth { revocations_max: 1, ..config::Auth::default() };
        let tokens = CapTokens::new(rig.store.clone(), ring(1, None), config.into(), rig.clock.clock()).await.unwrap();
        let turn = |turn: &str| Revocation {
            scope: RevocationScope::Turn(turn.parse().unwrap()),
            revoked_at: SystemTime::now(),
            forget_at: SystemTime::now() + Duration::from_secs(3600),
        };
        tokens.revoke(turn("first")).await.unwrap();
        assert!(tokens.revoke(turn("turn")).await.is_err());
        assert!(tokens.verify(&signed(1, &claims())).is_ok());
    }

    #[tokio::test]
    async fn a_revocation_is_announced_and_ends_what_was_opened_under_it() {
        let rig = rig().await;
        let principal = rig.tokens.verify(&signed(1, &claims())).unwrap();
        let mut announced = rig.tokens.subscribe();
        assert!(rig.tokens.stands(&principal));
        rig.revoke_workspace("w").await;
        assert_eq!(announced.recv().await.unwrap().scope, RevocationScope::Workspace("w".parse().unwrap()));
        assert!(!rig.tokens.stands(&principal));
    }

    #[tokio::test]
    async fn a_minted_token_is_kept_per_workspace_and_renewed_in_the_last_tenth_of_its_life() {
        let rig = rig().await;
        let mint = |workspace: &str| rig.tokens.for_workspace(&workspace.parse().unwrap()).unwrap();
        let first = mint("w");
        assert_eq!(rig.tokens.verify(first.expose()).unwrap().workspace().as_str(), "w");
        assert!(first != mint("v"));
        rig.clock.advance(86_400 * 9 / 10);
        assert!(first == mint("w"));
        rig.clock.advance(1);
        let second = mint("w");
        assert!(first != second);
        rig.clock.advance(86_400 / 10);
        assert_eq!(rig.refusal(first.expose()), Some(CapTokenRefused::Expired));
        assert_eq!(rig.refusal(second.expose()), None);
    }

    #[tokio::test]
    async fn a_revoked_minted_token_is_replaced_within_the_same_second_and_only_in_its_workspace() {
        let rig = rig().await;
        let mint = |workspace: &str| rig.tokens.for_workspace(&workspace.parse().unwrap()).unwrap();
        let (first, other) = (mint("w"), mint("v"));
        let CredentialId::Cap(turn) = rig.tokens.verify(first.expose()).unwrap().credential().clone() else { panic!() };
        rig.revoke(RevocationScope::Turn(turn)).await;
        let second = mint("w");
        assert_eq!(rig.refusal(second.expose()), None);
        rig.revoke_workspace("w").await;
        assert_eq!(rig.refusal(second.expose()), Some(CapTokenRefused::Revoked));
        assert_eq!(rig.refusal(mint("w").expose()), None);
        assert!(other == mint("v"));
    }
}
