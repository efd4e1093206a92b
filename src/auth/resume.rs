//! Names of executor sessions for harnesses whose encryption the gateway ends: the executor's own name, sealed for one
//! workspace and one executor.
//!
//! Owned by [`super::Auth`]. Nothing is stored, so that a name still opens after a restart; how long the session behind
//! it can be resumed is for the executor to say.

use aes_gcm::aead::{Aead, KeyInit, Payload};
use aes_gcm::{Aes256Gcm, Nonce};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use exec_gateway_protocol::ids::{ExecutorId, WorkspaceId};

use super::cap_token::keys;
use crate::protocol::rpc::ExecutorSessionId;
use crate::store::Keyring;

/// Tells such a name from others, and leaves room for another form.
const PREFIX: &str = "hs1.";

const NONCE_BYTES: usize = 12;

/// Seals and opens names of executor sessions.
pub struct ResumeNames {
    keys: Keyring,
}

impl ResumeNames {
    pub(super) fn new(keys: Keyring) -> Self {
        Self { keys }
    }

    /// What a harness of the workspace is given in place of the executor's own name.
    pub fn seal(&self, workspace: &WorkspaceId, executor: &ExecutorId, session: &ExecutorSessionId) -> String {
        let mut nonce = [0; NONCE_BYTES];
        getrandom::fill(&mut nonce).expect("the system gives random bytes");
        let data = context(workspace, executor);
        let payload = Payload { msg: session.reveal().as_bytes(), aad: &data };
        let sealed = cipher(&self.keys.current.secret)
            .encrypt(Nonce::from_slice(&nonce), payload)
            .expect("a session name is far below the cipher's bound");
        format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode([&nonce[..], &sealed].concat()))
    }

    /// The executor's own name; `None` for what was not sealed here for this workspace and executor.
    pub fn open(&self, workspace: &WorkspaceId, executor: &ExecutorId, name: &str) -> Option<ExecutorSessionId> {
        let bytes = URL_SAFE_NO_PAD.decode(name.strip_prefix(PREFIX)?).ok()?;
        let (nonce, sealed) = bytes.split_at_checked(NONCE_BYTES)?;
        let data = context(workspace, executor);
        keys(&self.keys).find_map(|key| {
            let payload = Payload { msg: sealed, aad: &data };
            let session = cipher(&key.secret).decrypt(Nonce::from_slice(nonce), payload).ok()?;
            Some(ExecutorSessionId::new(String::from_utf8(session).ok()?))
        })
    }
}

fn cipher(secret: &[u8]) -> Aes256Gcm {
    Aes256Gcm::new_from_slice(secret).expect("keys of the gateway have 32 bytes")
}

/// Ids have no NUL, so no two pairs give the same bytes.
fn context(workspace: &WorkspaceId, executor: &ExecutorId) -> Vec<u8> {
    [workspace.as_str().as_bytes(), &[0], executor.as_str().as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::auth::doubles::ring;

    #[test]
    fn a_name_opens_for_its_workspace_and_executor_alone() {
        let names = ResumeNames::new(ring(1, None));
        let (one, other) = ("one".parse().unwrap(), "other".parse().unwrap());
        let (here, there) = ("exe_1".parse().unwrap(), "exe_2".parse().unwrap());
        let name = names.seal(&one, &here, &ExecutorSessionId::new("secret"));
        assert!(!name.contains("secret"));
        assert_eq!(names.open(&one, &here, &name).unwrap().reveal(), "secret");
        assert!(names.open(&other, &here, &name).is_none());
        assert!(names.open(&one, &there, &name).is_none());
        for strange in ["", "hs1.", "hs1.AAAA", "2fe417ee-09f3-4cda-b576-6d5c432917a8", &name[..name.len() - 2]] {
            assert!(names.open(&one, &here, strange).is_none(), "{strange}");
        }
    }

    #[test]
    fn names_of_the_previous_key_still_open() {
        let (workspace, executor) = ("w".parse().unwrap(), "exe_1".parse().unwrap());
        let name = ResumeNames::new(ring(1, None)).seal(&workspace, &executor, &ExecutorSessionId::new("s"));
        assert!(ResumeNames::new(ring(2, Some(1))).open(&workspace, &executor, &name).is_some());
        assert!(ResumeNames::new(ring(2, None)).open(&workspace, &executor, &name).is_none());
    }
}
