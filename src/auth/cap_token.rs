//! Cap-tokens: signed rights of a workspace, verified, minted for the gateway's own calls, and revoked.
//!
//! Owned by [`super::Auth`]. Revocations are stored before they count, survive restarts and are announced, so that
//! live streams end; a token's own wish not to be audited is never followed.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use exec_gateway_protocol::cap_token::{self, CapClaims, CapToken};
use exec_gateway_protocol::ids::{TurnId, WorkspaceId};
use lru::LruCache;
use tokio::sync::broadcast;

use super::cache::lock;
use super::{AuthError, Claims, Clock, CredentialId, Principal, Scopes, unix_secs};
use crate::config::{self, Secret};
use crate::store::{GatewayKey, Keyring, Revocation, RevocationScope, Store, StoreError};

/// No minter gives more than a year; a token far beyond is a mistake that no revocation list would outlive.
const LIFE_MAX_SECS: u64 = 400 * 24 * 60 * 60;

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
    keys: Keyring,
    clock: Clock,
    ttl_secs: u64,
    revocations_max: usize,
    revoked: Mutex<Revoked>,
    minted: Mutex<LruCache<WorkspaceId, Minted>>,
    announce: broadcast::Sender<Revocation>,
}

/// Why a cap-token gives no [`Principal`], or could not be revoked.
#[derive(Debug, thiserror::Error)]
pub enum CapTokenError {
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
    /// Its turn, or its workspace at a later time than it was issued, was revoked.
    #[error("the cap-token was revoked")]
    Revoked,
    /// The revocation could not be stored and does not count.
    #[error("the revocation cannot be stored")]
    Store(#[from] StoreError),
}

impl From<cap_token::CapTokenError> for CapTokenError {
    fn from(error: cap_token::CapTokenError) -> Self {
        match error {
            cap_token::CapTokenError::Malformed => Self::Malformed,
            cap_token::CapTokenError::BadSignature => Self::BadSignature,
            cap_token::CapTokenError::Expired => Self::Expired,
        }
    }
}

impl From<CapTokenError> for AuthError {
    fn from(error: CapTokenError) -> Self {
        match error {
            CapTokenError::Malformed | CapTokenError::BadSignature | CapTokenError::TooLong => Self::Invalid,
            CapTokenError::Expired => Self::Expired,
            CapTokenError::Revoked => Self::Revoked,
            CapTokenError::Store(source) => Self::unavailable(source),
        }
    }
}

struct Minted {
    token: Secret,
    turn: TurnId,
    issued_at: u64,
    expires_at: u64,
}

impl CapTokens {
    pub(super) async fn new(
        store: Store,
        keys: Keyring,
        config: &config::Auth,
        clock: Clock,
    ) -> Result<Self, StoreError> {
        let mut revoked = Revoked::default();
        store.revocations().await?.iter().for_each(|revocation| revoked.add(revocation));
        Ok(Self(Arc::new(Inner {
            store,
            keys,
            clock,
            ttl_secs: config.cap_token_ttl_secs.clamp(1, LIFE_MAX_SECS),
            revocations_max: config.revocations_max,
            revoked: Mutex::new(revoked),
            minted: Mutex::new(LruCache::unbounded()),
            announce: broadcast::Sender::new(ANNOUNCED_MAX),
        })))
    }

    /// Checks a cap-token against the keys, the wall clock and the revocations.
    ///
    /// # Errors
    /// All of [`CapTokenError`] but `Store`.
    pub fn verify(&self, token: &str) -> Result<Principal, CapTokenError> {
        let now = self.0.clock.unix_secs();
        let claims = self.0.verified_claims(token, now)?;
        if claims.exp > now.saturating_add(LIFE_MAX_SECS) {
            return Err(CapTokenError::TooLong);
        }
        if lock(&self.0.revoked).ends(&claims.turn_id, &claims.workspace_id, claims.iat) {
            return Err(CapTokenError::Revoked);
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
    pub fn for_workspace(&self, workspace: &WorkspaceId) -> Secret {
        let now = self.0.clock.unix_secs();
        let life_left_min = (self.0.ttl_secs / 10).max(LIFE_LEFT_MIN_SECS);
        let mut minted = lock(&self.0.minted);
        // Always the second of the two locks.
        let revoked = lock(&self.0.revoked);
        if let Some(last) = minted.get(workspace)
            && last.expires_at >= now.saturating_add(life_left_min)
            && !revoked.ends(&last.turn, workspace, last.issued_at)
        {
            return last.token.clone();
        }
        // Seconds are coarse: a token minted in the second of a revocation would fall under it.
        let issued_at =
            revoked.workspaces.get(workspace).map_or(now, |end| now.max(end.issued_until.saturating_add(1)));
        drop(revoked);
        let turn = TurnId::new(&format!("sdk_{}", random_12())).expect("16 plain characters");
        let expires_at = now.saturating_add(self.0.ttl_secs);
        let claims = CapClaims {
            turn_id: turn.clone(),
            workspace_id: workspace.clone(),
            user_id: None,
            iat: issued_at,
            exp: expires_at,
            skip_audit: true,
            kid: Some(self.0.keys.current.kid.clone()),
        };
        let token = Secret::new(cap_token::mint(&claims, &self.0.keys.current.secret));
        minted.put(workspace.clone(), Minted { token: token.clone(), turn, issued_at, expires_at });
        if minted.len() > MINTED_MAX {
            minted.pop_lru();
        }
        token
    }

    /// Stores a revocation, then lets it count and announces it. Once begun, it is completed even if the future is
    /// dropped.
    ///
    /// # Errors
    /// [`CapTokenError::Store`] when it could not be stored; nothing is revoked then.
    pub async fn revoke(&self, revocation: Revocation) -> Result<(), CapTokenError> {
        let tokens = self.clone();
        let task = tokio::spawn(async move {
            tokens.0.store.add_revocation(revocation.clone(), tokens.0.revocations_max).await?;
            tokens.apply(&revocation);
            Ok(())
        });
        task.await.expect("storing does not panic, and nobody aborts the task")
    }

    /// Lets a revocation count that is stored already, and announces it.
    pub fn apply(&self, revocation: &Revocation) {
        let now = self.0.clock.now();
        let mut revoked = lock(&self.0.revoked);
        if revoked.len() >= self.0.revocations_max {
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
    fn verified_claims(&self, token: &str, now: u64) -> Result<CapClaims, CapTokenError> {
        let parsed = CapToken::parse(token)?;
        let named = parsed.kid().map(str::to_owned);
        let keys = keys(&self.keys).filter(|key| named.as_ref().is_none_or(|kid| key.kid == *kid));
        for key in keys {
            match CapToken::parse(token)?.verify(&key.secret, now) {
                Err(cap_token::CapTokenError::BadSignature) => {}
                verdict => return Ok(verdict?),
            }
        }
        Err(CapTokenError::BadSignature)
    }
}

/// The keys that verify, the one that signs first.
pub(super) fn keys(ring: &Keyring) -> impl Iterator<Item = &GatewayKey> {
    std::iter::once(&ring.current).chain(&ring.previous)
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
