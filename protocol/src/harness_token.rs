//! Harness tokens: `h1.<payload>.<mac>`, the right of one harness key to reach one registration of one executor.
//! Made when a harness asks for the way, brought back by harness and executor; opaque to both.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::ids::{ExecutorId, RegistrationId, WorkspaceId};
use crate::mac;

const PREFIX: &str = "h1.";

/// Longest token in bytes: what executors accept as an authorization.
pub const TOKEN_BYTES_MAX: usize = 4096;

/// What a harness token grants.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HarnessClaims {
    /// The tenant.
    pub workspace: WorkspaceId,
    /// The executor it may reach.
    pub executor: ExecutorId,
    /// The registration it may reach.
    pub registration: RegistrationId,
    /// The harness key it is bound to.
    pub key: KeyDigest,
    /// The Unix second from which it is no longer valid.
    pub exp: u64,
}

/// SHA-256 of a harness key, see [`crate::rest::KeyBytes::digest`]. Base64url in JSON.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct KeyDigest(pub [u8; 32]);

impl fmt::Debug for KeyDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&mac::encode(self.0))
    }
}

impl Serialize for KeyDigest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&mac::encode(self.0))
    }
}

impl<'de> Deserialize<'de> for KeyDigest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let digest = mac::decode(&String::deserialize(deserializer)?).and_then(|bytes| bytes.try_into().ok());
        digest.map(Self).ok_or_else(|| serde::de::Error::custom("expected base64url of 32 bytes"))
    }
}

/// Why a token is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HarnessTokenError {
    /// Not of the form of a harness token.
    #[error("the token is malformed")]
    Malformed,
    /// Signed by another key.
    #[error("the token's signature is wrong")]
    BadSignature,
    /// Its time is over.
    #[error("the token has expired")]
    Expired,
}

/// Signs the claims. Bounded ids keep every token below [`TOKEN_BYTES_MAX`].
pub fn mint(claims: &HarnessClaims, secret: &[u8]) -> String {
    let payload = serde_json::to_vec(claims).expect("claims are texts and numbers");
    let signed = format!("{PREFIX}{}", mac::encode(payload));
    let mac = mac::sign(secret, &signed);
    format!("{signed}.{mac}")
}

/// Whether a bearer has the form of a harness token, judged by its prefix alone; it may still be refused as one.
pub fn is_harness_token(token: &str) -> bool {
    token.starts_with(PREFIX)
}

/// Checks form, signature and time at the Unix second `now`. That executor, registration and key are the ones at hand
/// is for the caller to compare.
///
/// # Errors
/// [`HarnessTokenError`].
pub fn verify(token: &str, now: u64, secret: &[u8]) -> Result<HarnessClaims, HarnessTokenError> {
    if token.len() > TOKEN_BYTES_MAX {
        return Err(HarnessTokenError::Malformed);
    }
    let (signed, mac) = token.rsplit_once('.').ok_or(HarnessTokenError::Malformed)?;
    let payload = signed.strip_prefix(PREFIX).ok_or(HarnessTokenError::Malformed)?;
    let mac = mac::decode(mac).ok_or(HarnessTokenError::Malformed)?;
    if !mac::verify(secret, signed, &mac) {
        return Err(HarnessTokenError::BadSignature);
    }
    let claims: HarnessClaims =
        mac::decode(payload).and_then(|json| serde_json::from_slice(&json).ok()).ok_or(HarnessTokenError::Malformed)?;
    if now >= claims.exp { Err(HarnessTokenError::Expired) } else { Ok(claims) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::rest::KeyBytes;

    const SECRET: &[u8] = b"golden-secret";
    // Computed with Python's hmac and hashlib, independently of this crate.
    const GOLDEN: &str = concat!(
        "h1.eyJ3b3Jrc3BhY2UiOiJ3cy0xIiwiZXhlY3V0b3IiOiJleGVfMSIsInJlZ2lzdHJhdGlvbiI6ImV4cl8xIiwia2V5IjoiOHpZNXpOb2tn",
        "NTZOMENuSy1FSUNBa0pGV2dmRktkZHZMajlNN1VCTnY5NCIsImV4cCI6MTcwMDAwMDA2MH0.",
        "52mXzD0P03K_mfvAw1ULnML4LRO5MCnVme8Snlgigmg"
    );

    fn claims() -> HarnessClaims {
        HarnessClaims {
            workspace: WorkspaceId::new("ws-1").unwrap(),
            executor: ExecutorId::new("exe_1").unwrap(),
            registration: RegistrationId::new("exr_1").unwrap(),
            key: KeyDigest(KeyBytes { x25519: [1; 32], mlkem768: Box::new([2; 1184]) }.digest()),
            exp: 1_700_000_060,
        }
    }

    #[test]
    fn tokens_look_alike_wherever_they_are_made() {
        assert_eq!(mint(&claims(), SECRET), GOLDEN);
        assert_eq!(verify(GOLDEN, 1_700_000_059, SECRET), Ok(claims()));
    }

    #[test]
    fn every_fault_of_a_token_has_its_name() {
        assert_eq!(verify(GOLDEN, 1_700_000_060, SECRET), Err(HarnessTokenError::Expired));
        assert_eq!(verify(GOLDEN, u64::MAX, b"other"), Err(HarnessTokenError::BadSignature));
        assert_eq!(verify(&mint(&claims(), b""), 0, b""), Err(HarnessTokenError::BadSignature));
        let signed = format!("h1.{}", mac::encode("{}"));
        let hollow = format!("{signed}.{}", mac::sign(SECRET, &signed));
        assert_eq!(verify(&hollow, 0, SECRET), Err(HarnessTokenError::Malformed));
        for token in ["", "h1", "h1.x", "h2.x.AA", "h1.x.?", &format!("h1.{}.AA", "x".repeat(TOKEN_BYTES_MAX))] {
            assert_eq!(verify(token, 0, SECRET), Err(HarnessTokenError::Malformed), "{token}");
        }
    }

    #[test]
    fn the_longest_token_fits_where_executors_put_it() {
        let longest = HarnessClaims {
            workspace: WorkspaceId::new(&"w".repeat(64)).unwrap(),
            executor: ExecutorId::new(&"e".repeat(256)).unwrap(),
            registration: RegistrationId::new(&"r".repeat(256)).unwrap(),
            exp: u64::MAX,
            ..claims()
        };
        let token = mint(&longest, SECRET);
        assert!(token.len() <= TOKEN_BYTES_MAX, "{} bytes", token.len());
        assert_eq!(verify(&token, 0, SECRET), Ok(longest));
    }

    #[test]
    fn no_kind_of_token_passes_as_another() {
        let executor = ExecutorId::new("h1").unwrap();
        let ticket = crate::ticket::mint(&executor, u64::MAX, SECRET);
        assert!(is_harness_token(GOLDEN) && !crate::cap_token::is_cap_token(GOLDEN));
        assert_eq!(verify(&ticket, 0, SECRET), Err(HarnessTokenError::Malformed));
        assert_eq!(crate::ticket::verify(GOLDEN, &executor, 0, SECRET), Err(crate::ticket::TicketError::Malformed));
    }
}
