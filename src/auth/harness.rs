//! Authorization of one encrypted handshake: lets one harness key reach one registration of one executor, briefly.
//!
//! Owned by [`super::Auth`]; made by `connect`, shown at our door and to the executor's `validate`. Never stored.

use exec_gateway_protocol::harness_token::{self, HarnessClaims, HarnessTokenError, KeyDigest};
use exec_gateway_protocol::ids::{ExecutorId, RegistrationId, WorkspaceId};
use subtle::ConstantTimeEq;

use super::Clock;
use super::keys::{Keys, verifying};
use crate::config::{self, Live};

/// Mints and verifies authorizations of handshakes.
pub struct HarnessAuth {
    keys: Keys,
    clock: Clock,
    settings: Live<config::Auth>,
}

/// Why an authorization is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HarnessAuthError {
    /// Not one of ours, altered, or expired.
    #[error(transparent)]
    Token(#[from] HarnessTokenError),
    /// Made for another executor, registration or harness key.
    #[error("the authorization is for another handshake")]
    OtherHandshake,
}

impl HarnessAuth {
    pub(super) fn new(keys: Keys, settings: Live<config::Auth>, clock: Clock) -> Self {
        Self { keys, clock, settings }
    }

    /// Lets the harness key of this digest reach one registration of an executor, for `auth.harness_ttl_secs` from now.
    pub fn mint(
        &self,
        workspace: &WorkspaceId,
        executor: &ExecutorId,
        registration: &RegistrationId,
        key_digest: &[u8; 32],
    ) -> String {
        let claims = HarnessClaims {
            workspace: workspace.clone(),
            executor: executor.clone(),
            registration: registration.clone(),
            key: KeyDigest(*key_digest),
            exp: self.clock.unix_secs().saturating_add(self.settings.now().harness_ttl_secs),
        };
        harness_token::mint(&claims, &self.keys.now().current.secret)
    }

    /// For which workspace a harness asks, if its authorization is for this executor, registration and harness key.
    ///
    /// # Errors
    /// [`HarnessAuthError`]; a peer is told none of it.
    pub fn verify(
        &self,
        token: &str,
        executor: &ExecutorId,
        registration: &RegistrationId,
        key_digest: &[u8; 32],
    ) -> Result<WorkspaceId, HarnessAuthError> {
        let claims = self.claims(token)?;
        let same_key: bool = claims.key.0.ct_eq(key_digest).into();
        if claims.executor != *executor || claims.registration != *registration || !same_key {
            return Err(HarnessAuthError::OtherHandshake);
        }
        Ok(claims.workspace)
    }

    /// What an authorization says before any harness key is seen: our door opens by it, for this executor alone.
    ///
    /// # Errors
    /// [`HarnessAuthError`]; a peer is told none of it.
    pub fn admit(&self, token: &str, executor: &ExecutorId) -> Result<HarnessClaims, HarnessAuthError> {
        let claims = self.claims(token)?;
        if claims.executor == *executor { Ok(claims) } else { Err(HarnessAuthError::OtherHandshake) }
    }

    fn claims(&self, token: &str) -> Result<HarnessClaims, HarnessTokenError> {
        let now = self.clock.unix_secs();
        let ring = self.keys.now();
        for key in verifying(&ring) {
            match harness_token::verify(token, now, &key.secret) {
                Err(HarnessTokenError::BadSignature) => {}
                verdict => return verdict,
            }
        }
        Err(HarnessTokenError::BadSignature)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::auth::doubles::{FakeClock, ring};

    fn rig() -> (HarnessAuth, FakeClock) {
        let clock = FakeClock::at(1_000);
        (HarnessAuth::new(ring(1, Some(2)), config::Auth::default().into(), clock.clock()), clock)
    }

    fn ids() -> (WorkspaceId, ExecutorId, RegistrationId) {
        ("w".parse().unwrap(), "exe_1".parse().unwrap(), "exr_1".parse().unwrap())
    }

    #[test]
    fn an_authorization_opens_exactly_the_handshake_it_was_made_for() {
        let (auth, _) = rig();
        let (workspace, executor, registration) = ids();
        let token = auth.mint(&workspace, &executor, &registration, &[7; 32]);
        assert_eq!(auth.verify(&token, &executor, &registration, &[7; 32]).unwrap(), workspace);
        assert_eq!(auth.admit(&token, &executor).unwrap().registration, registration);
        let other = HarnessAuthError::OtherHandshake;
        let (other_executor, other_registration) = ("exe_2".parse().unwrap(), "exr_2".parse().unwrap());
        assert_eq!(auth.verify(&token, &other_executor, &registration, &[7; 32]), Err(other));
        assert_eq!(auth.verify(&token, &executor, &other_registration, &[7; 32]), Err(other));
        assert_eq!(auth.verify(&token, &executor, &registration, &[8; 32]), Err(other));
        assert_eq!(auth.admit(&token, &other_executor), Err(other));
    }

    #[test]
    fn an_authorization_ends_after_a_minute() {
        let (auth, clock) = rig();
        let (workspace, executor, registration) = ids();
        let token = auth.mint(&workspace, &executor, &registration, &[7; 32]);
        clock.advance(59);
        assert!(auth.admit(&token, &executor).is_ok());
        clock.advance(1);
        assert_eq!(auth.admit(&token, &executor), Err(HarnessTokenError::Expired.into()));
    }

    #[test]
    fn the_previous_key_still_verifies_and_a_strange_one_does_not() {
        let (auth, clock) = rig();
        let (workspace, executor, registration) = ids();
        for (key, accepted) in [(2, true), (3, false)] {
            let signer = HarnessAuth::new(ring(key, None), config::Auth::default().into(), clock.clock());
            let token = signer.mint(&workspace, &executor, &registration, &[7; 32]);
            assert_eq!(auth.admit(&token, &executor).is_ok(), accepted);
        }
    }
}
