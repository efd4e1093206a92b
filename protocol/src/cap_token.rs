//! Cap-tokens: signed rights of a workspace (`connectors-api.md` §3.2), with a key id of ours in the payload.
//! Values only: who mints, which keys are current and what is revoked is for the daemon's `auth`.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize};

use crate::ids::{TurnId, UserId, WorkspaceId};
use crate::mac;

/// The exact header of every token, and its base64url form.
const HEADER: &str = r#"{"alg":"HS256","typ":"CXG"}"#;
const HEADER_PART: &str = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkNYRyJ9";

/// Longest token in bytes. Real ones have about 250; what is longer is not worth a MAC.
const TOKEN_BYTES_MAX: usize = 4096;

/// What a cap-token grants. Times are Unix seconds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CapClaims {
    /// What it was minted for; the unit of revocation.
    pub turn_id: TurnId,
    /// The tenant it speaks for.
    pub workspace_id: WorkspaceId,
    /// The person, if known.
    #[serde(default, deserialize_with = "empty_is_none", skip_serializing_if = "Option::is_none")]
    pub user_id: Option<UserId>,
    /// When it was minted.
    #[serde(default)]
    pub iat: u64,
    /// The last second in which it is valid.
    #[serde(default)]
    pub exp: u64,
    /// Whether the caller writes the audit log itself.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub skip_audit: bool,
    /// Which of our keys signed it; other minters name none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kid: Option<String>,
}

/// Other minters write an unknown person as an empty text.
fn empty_is_none<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<UserId>, D::Error> {
    let text = Option::<String>::deserialize(deserializer)?.filter(|text| !text.is_empty());
    text.map(|text| UserId::new(&text).map_err(serde::de::Error::custom)).transpose()
}

/// Why a token is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CapTokenError {
    /// Not of the form of a cap-token.
    #[error("the token is malformed")]
    Malformed,
    /// Signed by another key.
    #[error("the token's signature is wrong")]
    BadSignature,
    /// Its time is over.
    #[error("the token has expired")]
    Expired,
}

/// Signs the claims.
pub fn mint(claims: &CapClaims, secret: &[u8]) -> String {
    let payload = serde_json::to_vec(claims).expect("claims are texts and numbers");
    let mut token = format!("{HEADER_PART}.{}", mac::encode(payload));
    let mac = mac::sign(secret, &token);
    token.push('.');
    token.push_str(&mac);
    token
}

/// Whether a bearer has the form of a cap-token, judged by its header alone; it may still be refused as one.
pub fn is_cap_token(token: &str) -> bool {
    token.split_once('.').is_some_and(|(header, _)| is_header(header))
}

/// Every minter known writes [`HEADER`]; their verifiers, however, only ask what it says, and so do we.
fn is_header(part: &str) -> bool {
    #[derive(Deserialize)]
    struct Header<'a> {
        alg: &'a str,
        typ: &'a str,
    }
    part == HEADER_PART
        || part.len() <= 4 * HEADER.len()
            && mac::decode(part).is_some_and(|json| {
                serde_json::from_slice(&json).is_ok_and(|Header { alg, typ }| alg == "HS256" && typ == "CXG")
            })
}

/// A token of the right form that nobody has verified yet. `Debug` shows nothing of it.
pub struct CapToken<'a> {
    signed: &'a str,
    mac: Vec<u8>,
    /// Read before the signature was checked, for the key id; handed out as claims only by `verify`.
    claims: Option<CapClaims>,
}

impl fmt::Debug for CapToken<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CapToken(***)")
    }
}

impl<'a> CapToken<'a> {
    /// Takes a token apart.
    ///
    /// # Errors
    /// [`CapTokenError::Malformed`] unless there are three parts, the right header and a decodable signature.
    pub fn parse(token: &'a str) -> Result<Self, CapTokenError> {
        if token.len() > TOKEN_BYTES_MAX {
            return Err(CapTokenError::Malformed);
        }
        let (signed, mac) = token.rsplit_once('.').ok_or(CapTokenError::Malformed)?;
        let (header, payload) = signed.split_once('.').ok_or(CapTokenError::Malformed)?;
        if payload.is_empty() || payload.contains('.') || mac.is_empty() || !is_header(header) {
            return Err(CapTokenError::Malformed);
        }
        let mac = mac::decode(mac).ok_or(CapTokenError::Malformed)?;
        let claims = mac::decode(payload).and_then(|json| serde_json::from_slice(&json).ok());
        Ok(Self { signed, mac, claims })
    }

    /// Which key the token claims to be signed with. Good for choosing a key, and for nothing else.
    pub fn kid(&self) -> Option<&str> {
        self.claims.as_ref()?.kid.as_deref()
    }

    /// Checks signature, payload and time, in this order. `now_unix` is in seconds.
    ///
    /// # Errors
    /// [`CapTokenError::BadSignature`], then [`CapTokenError::Malformed`] for an unreadable payload, then
    /// [`CapTokenError::Expired`] from the second after `exp`.
    pub fn verify(self, secret: &[u8], now_unix: u64) -> Result<CapClaims, CapTokenError> {
        if !mac::verify(secret, self.signed, &self.mac) {
            return Err(CapTokenError::BadSignature);
        }
        let claims = self.claims.ok_or(CapTokenError::Malformed)?;
        if now_unix > claims.exp { Err(CapTokenError::Expired) } else { Ok(claims) }
    }
}
