//! What harnesses are given sealed, to be shown again later: names of executor sessions, where the gateway ends the
//! encryption, and the credential under which an encrypted one may open its socket.
//!
//! Owned by [`super::Auth`]. Nothing is stored, so that what was sealed still opens after a restart; how long a session
//! can be resumed is for the executor to say.

use aes_gcm::aead::{Aead, KeyInit, Payload};
use aes_gcm::{Aes256Gcm, Nonce};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use exec_gateway_protocol::ids::{ExecutorId, WorkspaceId};
use zeroize::Zeroizing;

use super::keys::{Keys, verifying};
use crate::protocol::rpc::ExecutorSessionId;

/// Tells such a name from others, and leaves room for another form.
const PREFIX: &str = "hs1.";

const NONCE_BYTES: usize = 12;

/// Seals and opens names of executor sessions, and credentials.
pub struct ResumeNames {
    keys: Keys,
}

impl ResumeNames {
    pub(super) fn new(keys: Keys) -> Self {
        Self { keys }
    }

    /// What a harness of the workspace is given in place of the executor's own name.
    pub fn seal(&self, workspace: &WorkspaceId, executor: &ExecutorId, session: &ExecutorSessionId) -> String {
        format!("{PREFIX}{}", self.close(&context(workspace, executor), session.reveal()))
    }

    /// The executor's own name; `None` for what was not sealed here for this workspace and executor.
    pub fn open(&self, workspace: &WorkspaceId, executor: &ExecutorId, name: &str) -> Option<ExecutorSessionId> {
        let session = self.disclose(&context(workspace, executor), name.strip_prefix(PREFIX)?)?;
        Some(ExecutorSessionId::new(session))
    }

    /// The credential of a caller, for the URL of an encrypted harness's socket: the socket ends with it.
    pub fn seal_bearer(&self, executor: &ExecutorId, bearer: &str) -> String {
        self.close(&bearer_context(executor), bearer)
    }

    /// The credential; `None` for what was not sealed here for this executor.
    pub fn open_bearer(&self, executor: &ExecutorId, sealed: &str) -> Option<Zeroizing<String>> {
        self.disclose(&bearer_context(executor), sealed).map(Zeroizing::new)
    }

    fn close(&self, context: &[u8], text: &str) -> String {
        let mut nonce = [0; NONCE_BYTES];
        getrandom::fill(&mut nonce).expect("the system gives random bytes");
        let payload = Payload { msg: text.as_bytes(), aad: context };
        let sealed = cipher(&self.keys.now().current.secret)
            .encrypt(Nonce::from_slice(&nonce), payload)
            .expect("names and credentials are far below the cipher's bound");
        URL_SAFE_NO_PAD.encode([&nonce[..], &sealed].concat())
    }

    fn disclose(&self, context: &[u8], sealed: &str) -> Option<String> {
        let bytes = URL_SAFE_NO_PAD.decode(sealed).ok()?;
        let (nonce, sealed) = bytes.split_at_checked(NONCE_BYTES)?;
        let ring = self.keys.now();
        verifying(&ring).find_map(|key| {
            let payload = Payload { msg: sealed, aad: context };
            let text = cipher(&key.secret).decrypt(Nonce::from_slice(nonce), payload).ok()?;
            String::from_utf8(text).ok()
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

/// No workspace's name is empty, so this is no context of a session.
fn bearer_context(executor: &ExecutorId) -> Vec<u8> {
    [&b"\0bearer\0"[..], executor.as_str().as_bytes()].concat()
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
    fn a_credential_opens_for_its_executor_alone_and_is_no_name_of_a_session() {
        let names = ResumeNames::new(ring(1, None));
        let (here, there) = ("exe_1".parse().unwrap(), "exe_2".parse().unwrap());
        let sealed = names.seal_bearer(&here, "secret");
        assert!(!sealed.contains("secret"));
        assert_eq!(names.open_bearer(&here, &sealed).unwrap().as_str(), "secret");
        assert!(names.open_bearer(&there, &sealed).is_none());
        let workspace = "w".parse().unwrap();
        assert!(names.open(&workspace, &here, &format!("hs1.{sealed}")).is_none());
        let session = names.seal(&workspace, &here, &ExecutorSessionId::new("s"));
        assert!(names.open_bearer(&here, &session["hs1.".len()..]).is_none());
    }

    #[test]
    fn names_of_the_previous_key_still_open() {
        let (workspace, executor) = ("w".parse().unwrap(), "exe_1".parse().unwrap());
        let name = ResumeNames::new(ring(1, None)).seal(&workspace, &executor, &ExecutorSessionId::new("s"));
        assert!(ResumeNames::new(ring(2, Some(1))).open(&workspace, &executor, &name).is_some());
        assert!(ResumeNames::new(ring(2, None)).open(&workspace, &executor, &name).is_none());
    }
}
