//! HMAC-SHA256 over token texts, shared by the three kinds of token. Never compares in variable time.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, Mac};
use sha2::Sha256;

fn over(secret: &[u8], text: &str) -> Hmac<Sha256> {
    Hmac::new_from_slice(secret).expect("HMAC takes keys of any length").chain_update(text)
}

/// The base64url text of the MAC.
pub(crate) fn sign(secret: &[u8], text: &str) -> String {
    URL_SAFE_NO_PAD.encode(over(secret, text).finalize().into_bytes())
}

/// Whether `mac` is the MAC of `text`. With an unset secret nothing is: anybody could have made it.
pub(crate) fn verify(secret: &[u8], text: &str, mac: &[u8]) -> bool {
    !secret.is_empty() && over(secret, text).verify_slice(mac).is_ok()
}

/// The bytes of a base64url text without padding.
pub(crate) fn decode(text: &str) -> Option<Vec<u8>> {
    URL_SAFE_NO_PAD.decode(text).ok()
}

/// The base64url text of bytes, without padding.
pub(crate) fn encode(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}
