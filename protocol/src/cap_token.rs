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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const SECRET: &[u8] = b"golden-secret";
    // Computed with Python's hmac, independently of this crate.
    const ORIGINAL: &str = concat!(
        "eyJhbGciOiJIUzI1NiIsInR5cCI6IkNYRyJ9.",
        "eyJ0dXJuX2lkIjoic2RrIiwid29ya3NwYWNlX2lkIjoid3MtMSIsInVzZXJfaWQiOiJhZGEiLCJpYXQiOjE3MDAwMDAwMDAsImV4cCI6MTcw",
        "MDAwMzYwMCwic2tpcF9hdWRpdCI6dHJ1ZX0.vqU7Zqx6alnp4mD7Ivs8K5kT_3AvwC1jH-PFEn4T3Kc"
    );
    const WITH_KID: &str = concat!(
        "eyJhbGciOiJIUzI1NiIsInR5cCI6IkNYRyJ9.",
        "eyJ0dXJuX2lkIjoidHVybi03Iiwid29ya3NwYWNlX2lkIjoid3MtMSIsImlhdCI6MTcwMDAwMDAwMCwiZXhwIjoxNzAwMDAzNjAwLCJraWQi",
        "OiJrMiJ9.o1MMd9pUGOl0-DG7YPbGZx4BytBoT2jlnJyPzPEvmNE"
    );
    /// The header's members in another order and spaced, one unknown claim.
    const OTHER_MINTER: &str = concat!(
        "eyJ0eXAiOiAiQ1hHIiwgImFsZyI6ICJIUzI1NiJ9.",
        "eyJ0dXJuX2lkIjoidCIsIndvcmtzcGFjZV9pZCI6InciLCJpYXQiOjEsImV4cCI6MiwiZXh0cmEiOltdfQ.",
        "4rht_zQrC1Vvvtey1r_Zn4wazMJOrQ5imcbgqJSmSgU"
    );
    /// Properly signed, but the payload is `not json`.
    const NOT_JSON: &str =
        "eyJhbGciOiJIUzI1NiIsInR5cCI6IkNYRyJ9.bm90IGpzb24.V_JI3dNwiihFCsX85KFlo81g-ta6u3-FxrmMIay5qgc";

    fn original() -> CapClaims {
        CapClaims {
            turn_id: TurnId::new("sdk").unwrap(),
            workspace_id: WorkspaceId::new("ws-1").unwrap(),
            user_id: Some(UserId::new("ada").unwrap()),
            iat: 1_700_000_000,
            exp: 1_700_003_600,
            skip_audit: true,
            kid: None,
        }
    }

    fn with_kid() -> CapClaims {
        let turn_id = TurnId::new("turn-7").unwrap();
        CapClaims { turn_id, user_id: None, skip_audit: false, kid: Some("k2".into()), ..original() }
    }

    fn verify(token: &str, secret: &[u8], now: u64) -> Result<CapClaims, CapTokenError> {
        CapToken::parse(token)?.verify(secret, now)
    }

    #[test]
    fn tokens_are_minted_to_the_letter_of_the_original() {
        assert_eq!(mac::encode(HEADER), HEADER_PART);
        assert_eq!(mint(&original(), SECRET), ORIGINAL);
        assert_eq!(mint(&with_kid(), SECRET), WITH_KID);
    }

    #[test]
    fn tokens_of_other_minters_are_verified() {
        assert_eq!(verify(ORIGINAL, SECRET, 1_700_000_000), Ok(original()));
        assert_eq!(verify(WITH_KID, SECRET, 1_700_000_000), Ok(with_kid()));
        assert!(is_cap_token(OTHER_MINTER));
        assert_eq!(verify(OTHER_MINTER, SECRET, 2).unwrap().exp, 2);
    }

    #[test]
    fn the_key_id_is_known_before_the_signature_is_checked() {
        assert_eq!(CapToken::parse(WITH_KID).unwrap().kid(), Some("k2"));
        assert_eq!(CapToken::parse(ORIGINAL).unwrap().kid(), None);
        assert_eq!(CapToken::parse(NOT_JSON).unwrap().kid(), None);
    }

    #[test]
    fn the_second_of_expiry_is_still_valid() {
        assert!(verify(ORIGINAL, SECRET, 1_700_003_600).is_ok());
        assert_eq!(verify(ORIGINAL, SECRET, 1_700_003_601), Err(CapTokenError::Expired));
    }

    #[test]
    fn a_wrong_signature_is_told_before_anything_in_the_payload() {
        let late = u64::MAX;
        assert_eq!(verify(ORIGINAL, b"other", late), Err(CapTokenError::BadSignature));
        assert_eq!(verify(NOT_JSON, b"other", late), Err(CapTokenError::BadSignature));
        assert_eq!(verify(NOT_JSON, SECRET, late), Err(CapTokenError::Malformed));
        let short = &ORIGINAL[..ORIGINAL.len() - 4];
        assert_eq!(verify(short, SECRET, 0), Err(CapTokenError::BadSignature));
        let (signed, mac) = ORIGINAL.rsplit_once('.').unwrap();
        assert_eq!(verify(&format!("{signed}A.{mac}"), SECRET, 0), Err(CapTokenError::BadSignature));
    }

    #[test]
    fn an_unset_secret_verifies_nothing() {
        assert_eq!(verify(&mint(&original(), b""), b"", 0), Err(CapTokenError::BadSignature));
    }

    #[test]
    fn what_has_not_three_parts_and_the_right_header_is_malformed() {
        let (signed, mac) = ORIGINAL.rsplit_once('.').unwrap();
        let (header, payload) = signed.split_once('.').unwrap();
        let jwt = mac::encode(r#"{"alg":"HS256","typ":"JWT"}"#);
        let unsigned = mac::encode(r#"{"alg":"none","typ":"CXG"}"#);
        for token in [
            "".to_owned(),
            signed.to_owned(),
            format!("{signed}."),
            format!("{header}..{mac}"),
            format!(".{payload}.{mac}"),
            format!("{signed}.{mac}.{mac}"),
            format!("{signed}.{mac}="),
            format!("{jwt}.{payload}.{mac}"),
            format!("{unsigned}.{payload}.{mac}"),
            format!("{header}.{}.{mac}", "A".repeat(TOKEN_BYTES_MAX)),
        ] {
            assert_eq!(CapToken::parse(&token).err(), Some(CapTokenError::Malformed), "{token}");
        }
    }

    #[test]
    fn cap_tokens_are_known_by_their_header() {
        assert!(is_cap_token(ORIGINAL));
        for token in ["", "egw_x", "exe_1.1700000300.mac", "h1.payload.mac", HEADER_PART] {
            assert!(!is_cap_token(token), "{token}");
        }
    }

    #[test]
    fn an_empty_user_is_no_user() {
        let claims: CapClaims =
            serde_json::from_str(r#"{"turn_id":"t","workspace_id":"w","user_id":"","iat":1,"exp":2}"#).unwrap();
        assert_eq!(claims.user_id, None);
    }

    #[test]
    fn debug_output_shows_no_token() {
        assert_eq!(format!("{:?}", CapToken::parse(ORIGINAL)), "Ok(CapToken(***))");
    }
}
