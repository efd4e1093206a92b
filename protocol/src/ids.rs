//! Identifiers as types. Each is checked when made, cheap to clone, and never a bare string elsewhere.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Why a text is not an identifier of the wanted kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a valid {kind}: expected {rule}")]
pub struct InvalidId {
    kind: &'static str,
    rule: &'static str,
}

fn is_name(text: &str) -> bool {
    (1..=64).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'))
}

/// Ids that stand in a URL path: codex inserts them there almost raw (codex-exec-server.md §2.6), and tickets
/// separate their parts by dots.
fn is_path_id(text: &str) -> bool {
    (1..=256).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-'))
}

fn is_opaque(text: &str) -> bool {
    (1..=256).contains(&text.len()) && !text.chars().any(char::is_control)
}

/// The rules as regular expressions, for schemas.
const NAME: &str = "^[A-Za-z0-9._-]{1,64}$";
const PATH_ID: &str = "^[A-Za-z0-9_-]{1,256}$";
const OPAQUE: &str = "^[^\\u0000-\\u001f\\u007f-\\u009f]{1,256}$";

macro_rules! id {
    ($(#[doc = $doc:literal])* $name:ident, $kind:literal, $rule:literal, $check:ident, $pattern:ident) => {
        $(#[doc = $doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(Arc<str>);

        impl $name {
            /// Checks the text against the rule of this kind.
            ///
            /// # Errors
            /// [`InvalidId`] names the kind and the rule.
            pub fn new(text: &str) -> Result<Self, InvalidId> {
                if $check(text) {
                    Ok(Self(text.into()))
                } else {
                    Err(InvalidId { kind: $kind, rule: $rule })
                }
            }

            /// The text as it stands on the wire.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;
            fn from_str(text: &str) -> Result<Self, InvalidId> {
                Self::new(text)
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl JsonSchema for $name {
            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({ "type": "string", "description": concat!($($doc),*).trim(), "pattern": $pattern })
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                Self::new(&text).map_err(serde::de::Error::custom)
            }
        }
    };
}

id!(
    /// A tenant.
    WorkspaceId, "workspace", "1 to 64 of A-Z a-z 0-9 . _ -", is_name, NAME
);
id!(
    /// A workspace's name for an executor.
    EnvironmentName, "environment name", "1 to 64 of A-Z a-z 0-9 . _ -", is_name, NAME
);
id!(
    /// A machine that connects to the gateway, `exe_<uuid>` when the gateway made it.
    ExecutorId, "executor id", "1 to 256 of A-Z a-z 0-9 _ -", is_path_id, PATH_ID
);
id!(
    /// One registration of one executor process, `exr_<uuid>`.
    RegistrationId, "registration id", "1 to 256 of A-Z a-z 0-9 _ -", is_path_id, PATH_ID
);
id!(
    /// A person, as the validator upstream names them.
    UserId, "user id", "1 to 256 characters without control characters", is_opaque, OPAQUE
);
id!(
    /// What a cap-token was minted for; the unit of revocation.
    TurnId, "turn id", "1 to 256 characters without control characters", is_opaque, OPAQUE
);
id!(
    /// A running process that callers can come back to, a version 4 UUID.
    SessionId, "session id", "1 to 256 of A-Z a-z 0-9 _ -", is_path_id, PATH_ID
);
id!(
    /// One of the gateway's own proxy tokens, `tok_<12>`.
    TokenId, "token id", "1 to 256 of A-Z a-z 0-9 _ -", is_path_id, PATH_ID
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_rule_of_the_admin_service() {
        assert!(EnvironmentName::new("my-mac.2_x").is_ok());
        for bad in ["", "a/b", "a b", "ü", &"x".repeat(65)] {
            assert!(EnvironmentName::new(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn an_executor_id_never_holds_a_dot() {
        assert!(ExecutorId::new("exe_1").is_ok());
        assert!(ExecutorId::new("exe.1").is_err());
    }
}
