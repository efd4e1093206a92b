//! What must outlive the process: executors, bindings, registrations, own tokens, revocations, gateway keys.
//!
//! [`Store`] answers the few questions the gateway asks. Every answer comes from one thread that owns the database
//! (`embedded`), so callers never block the runtime.

mod database;
mod embedded;
mod lock;
#[cfg(test)]
pub(crate) mod scratch;
mod sessions;

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::SystemTime;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use exec_gateway_protocol::ids::{
    EnvironmentName, ExecutorId, RegistrationId, SessionId, TokenId, TurnId, UserId, WorkspaceId,
};
use hmac::{Hmac, Mac};
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use zeroize::Zeroizing;

use crate::config::Secret;

pub use embedded::{Store, StoreCounts};
pub use lock::StateLock;
pub use sessions::Reserved;

/// Why the store could not answer.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database is locked or its disk does not answer; a later try may succeed.
    #[error("the store does not answer")]
    Unavailable(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The request contradicts what is stored; the text names the conflict.
    #[error("{0}")]
    Conflict(String),
    /// Nothing of that name is stored; the text names it.
    #[error("{0}")]
    NotFound(String),
    /// The file is not a store of this program or version.
    #[error("the store is damaged or of another version")]
    Damaged(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Proof that a workspace may reach an executor: only the store makes one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binding {
    workspace: WorkspaceId,
    executor: ExecutorId,
    name: EnvironmentName,
    is_default: bool,
    description: String,
}

impl Binding {
    /// The tenant that may reach the executor.
    pub fn workspace(&self) -> &WorkspaceId {
        &self.workspace
    }
    /// The executor it may reach.
    pub fn executor(&self) -> &ExecutorId {
        &self.executor
    }
    /// The tenant's name for it.
    pub fn name(&self) -> &EnvironmentName {
        &self.name
    }
    /// Whether it is chosen where no environment is named.
    pub fn is_default(&self) -> bool {
        self.is_default
    }
    /// Free text of the operator.
    pub fn description(&self) -> &str {
        &self.description
    }
}

/// An executor as stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Executor {
    /// Its id on the wire.
    pub id: ExecutorId,
    /// Counts credentials: the executor's token is derived from id and generation, so raising it revokes the token.
    pub generation: u64,
    /// Its owner, where an upstream service made it.
    pub user: Option<UserId>,
    /// When it was created.
    pub created_at: SystemTime,
    /// When its link was last known to be up.
    pub last_seen: Option<SystemTime>,
}

impl Executor {
    /// The credential this executor registers with, derived from the executor key: `egx_` and 43 characters of base64url.
    ///
    /// It ends when the executor is deleted, when its generation rises, or when the key it was derived from has left
    /// the keyring.
    pub fn token(&self, key: &GatewayKey) -> Zeroizing<String> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&key.secret).expect("HMAC takes keys of any length");
        mac.update(format!("{}.{}", self.id, self.generation).as_bytes());
        Zeroizing::new(format!("egx_{}", URL_SAFE_NO_PAD.encode(mac.finalize().into_bytes())))
    }
}

/// How a registered executor speaks on its socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// Relay frames, each stream end-to-end encrypted.
    Noise,
    /// Relay frames in clear (older codex).
    Relay,
    /// One JSON-RPC message per WebSocket message, signed with SigV4.
    Direct,
    /// One JSON-RPC message per WebSocket message.
    Agentx,
}

impl Transport {
    /// Its word, in the store and for operators.
    pub fn name(self) -> &'static str {
        match self {
            Self::Noise => "noise",
            Self::Relay => "relay",
            Self::Direct => "direct",
            Self::Agentx => "agentx",
        }
    }

    /// Whether all callers share the one JSON-RPC session of the socket: there are no relay frames on it.
    pub fn is_shared(self) -> bool {
        matches!(self, Self::Direct | Self::Agentx)
    }
}

/// What `register` stored before it answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registration {
    /// Its id.
    pub id: RegistrationId,
    /// Whose it is.
    pub executor: ExecutorId,
    /// How that executor speaks.
    pub transport: Transport,
    /// The executor's X25519 key (32 bytes) followed by its ML-KEM-768 key (1184 bytes); empty without encryption.
    pub public_key: Vec<u8>,
    /// SHA-256 of the credential it registered with.
    pub credential: [u8; 32],
    /// When it was made.
    pub created_at: SystemTime,
}

/// One of the gateway's own proxy tokens. The token itself is not stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// Its public id.
    pub id: TokenId,
    /// The tenant it opens.
    pub workspace: WorkspaceId,
    /// The person it stands for.
    pub user: Option<UserId>,
    /// Whether it may only read.
    pub read_only: bool,
    /// When it was created.
    pub created_at: SystemTime,
    /// When it ends; `None` is never.
    pub expires_at: Option<SystemTime>,
}

/// What a revocation ends.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum RevocationScope {
    /// Every cap-token of this turn.
    Turn(TurnId),
    /// Every cap-token of this workspace issued up to the revocation.
    Workspace(WorkspaceId),
}

/// A stored revocation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Revocation {
    /// What it ends.
    pub scope: RevocationScope,
    /// When it was made; cap-tokens of a workspace issued later are valid.
    pub revoked_at: SystemTime,
    /// From when it may be forgotten, since nothing it ends could still be valid.
    pub forget_at: SystemTime,
}

/// What a gateway key signs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KeyPurpose {
    /// Cap-tokens.
    CapToken,
    /// Executor tickets.
    Ticket,
    /// Derived executor tokens.
    Executor,
    /// Authorizations of encrypted harnesses.
    Harness,
    /// Names of executor sessions that harnesses are given.
    Resume,
}

impl KeyPurpose {
    /// Every purpose.
    pub const ALL: [Self; 5] = [Self::CapToken, Self::Ticket, Self::Executor, Self::Harness, Self::Resume];

    /// Its word, in the store and for operators.
    pub fn name(self) -> &'static str {
        match self {
            Self::CapToken => "cap_token",
            Self::Ticket => "ticket",
            Self::Executor => "executor",
            Self::Harness => "harness",
            Self::Resume => "resume",
        }
    }
}

impl FromStr for KeyPurpose {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let words = || Self::ALL.map(Self::name).join(", ");
        let found = Self::ALL.into_iter().find(|purpose| purpose.name() == text.replace('-', "_"));
        found.ok_or_else(|| format!("expected one of {}", words()))
    }
}

/// One secret of the gateway.
#[derive(Clone, PartialEq, Eq)]
pub struct GatewayKey {
    /// Names the key in what it signs.
    pub kid: String,
    /// 32 random bytes.
    pub secret: Zeroizing<Vec<u8>>,
}

impl fmt::Debug for GatewayKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GatewayKey").field("kid", &self.kid).field("secret", &"***").finish()
    }
}

/// The keys of one purpose: one signs, both verify.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keyring {
    /// Signs and verifies.
    pub current: GatewayKey,
    /// Verifies what was signed before the last rotation.
    pub previous: Option<GatewayKey>,
}

/// The file of the store inside the state directory.
pub fn path_in(state_dir: &Path) -> PathBuf {
    state_dir.join("gateway.db")
}

/// Makes the state directory, closed to everybody else. One that exists keeps its mode: it may be shared on purpose,
/// and every file in it has a mode of its own.
fn make_state_dir(state_dir: &Path) -> Result<(), StoreError> {
    use std::os::unix::fs::DirBuilderExt;
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(state_dir);
    made.map_err(|error| StoreError::Unavailable(error.into()))
}

/// Opens a file of the state directory for reading and writing, and makes it, for its owner alone.
fn open_private(path: &Path) -> Result<std::fs::File, StoreError> {
    use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
    let open = || {
        let file =
            std::fs::OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
        // A file left by a copy or a restored backup may have been made with a wider mode.
        file.set_permissions(std::fs::Permissions::from_mode(0o600))?;
        Ok(file)
    };
    open().map_err(|error: std::io::Error| StoreError::Unavailable(error.into()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn executor(generation: u64) -> Executor {
        let id = ExecutorId::new("exe_1").unwrap();
        Executor { id, generation, user: None, created_at: SystemTime::UNIX_EPOCH, last_seen: None }
    }

    fn key(byte: u8) -> GatewayKey {
        GatewayKey { kid: "00c0ffee".into(), secret: Zeroizing::new(vec![byte; 32]) }
    }

    #[test]
    fn an_executor_token_follows_from_id_generation_and_key() {
        let token = executor(1).token(&key(7));
        // HMAC-SHA256 of "exe_1.1" under 32 bytes of 7, computed by another implementation.
        assert_eq!(token.as_str(), "egx_f9RCOCGJRvDSSilT8ANnn9oc62pcxoWe6Dei1o-DFLI");
        assert_ne!(token, executor(2).token(&key(7)));
        assert_ne!(token, executor(1).token(&key(8)));
    }

    #[test]
    fn the_secret_of_a_key_is_not_in_its_debug_output() {
        assert_eq!(format!("{:?}", key(7)), r#"GatewayKey { kid: "00c0ffee", secret: "***" }"#);
    }
}

/// A process session as stored: what another gateway process needs to take it up again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionRow {
    /// Its id.
    pub id: SessionId,
    /// Whose it is.
    pub workspace: WorkspaceId,
    /// Where it runs.
    pub executor: ExecutorId,
    /// The workspace's name for the executor when it was started.
    pub environment: EnvironmentName,
    /// The caller's key of the start.
    pub start_key: Option<String>,
    /// SHA-256 of what was asked for, so that one key never stands for two commands.
    pub request_digest: [u8; 32],
    /// What was asked for, as JSON of its owner.
    pub request: String,
    /// The process's id at the executor.
    pub process: String,
    /// The right to resume the executor's session; known once the conversation was opened.
    pub executor_session: Option<Secret>,
    /// How far it is.
    pub state: SessionState,
    /// The process's exit code.
    pub exit_code: Option<i32>,
    /// The executor's number of the exit, where output with greater numbers may be in the journal.
    pub exit_seq: Option<u64>,
    /// What is known about an end without exit code.
    pub detail: Option<String>,
    /// When it was asked for.
    pub created_at: SystemTime,
    /// When it ended.
    pub ended_at: Option<SystemTime>,
    /// Bytes of stdin that the executor has accepted.
    pub stdin_accepted: u64,
    /// Whether the end of stdin was asked for.
    pub stdin_eof: bool,
    /// A write that was sent and may not have been answered.
    pub pending_write: Option<PendingWrite>,
}

/// A write to stdin under way: repeated with the same id, the executor writes it once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PendingWrite {
    /// Its id at the executor.
    pub id: String,
    /// Bytes of the caller that it carries, from the accepted ones on.
    pub length: u64,
    /// SHA-256 of those bytes: a repeat must be the same.
    pub digest: [u8; 32],
}

/// How far a session is.
///
/// ```text
/// starting ─► running ─► exited
///     │  └─► failed └─► lost
///     └─► unknown
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SessionState {
    /// The start may or may not have reached the executor.
    Starting,
    /// The executor has started the process.
    Running,
    /// The process has ended and all its output is here.
    Exited,
    /// The executor refused to start it: nothing ran.
    Failed,
    /// The executor was gone for longer than it keeps a session; the process was running.
    Lost,
    /// The executor was gone before it said whether it had started the process.
    Unknown,
}

impl SessionState {
    /// The word for callers and the store.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Exited => "exited",
            Self::Failed => "failed",
            Self::Lost => "lost",
            Self::Unknown => "unknown",
        }
    }

    /// Whether nothing more will come.
    pub fn is_final(self) -> bool {
        !matches!(self, Self::Starting | Self::Running)
    }

    fn from_word(word: &str) -> Option<Self> {
        let all = [Self::Starting, Self::Running, Self::Exited, Self::Failed, Self::Lost, Self::Unknown];
        all.into_iter().find(|state| state.as_str() == word)
    }
}
