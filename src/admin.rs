//! What operators change and list, as plain requests: the same code serves the running daemon's `admin.sock` and a
//! command that opens the store itself because no daemon runs. It decides nothing about who may ask.

mod socket;

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use exec_gateway_protocol::cap_token::{self, CapClaims};
use exec_gateway_protocol::ids::{EnvironmentName, ExecutorId, TokenId, TurnId, UserId, WorkspaceId};
use serde::{Deserialize, Serialize};
use serde_json::json;
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use crate::audit::{Act, Audit, Outcome};
use crate::config::{self, Live, Secret};
use crate::store::{Binding, Executor, KeyPurpose, Keyring, Revocation, RevocationScope, Store, StoreError, Token};
use crate::time::rfc3339;

pub use socket::{bind_admin, execute, serve_admin, socket_in};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Longest life of a cap-token minted here.
const CAP_TOKEN_TTL_MAX: Duration = DAY.saturating_mul(365);

/// How long a revocation is kept: longer than any cap-token lives, with room for clocks that disagree.
const REVOCATION_LIFE: Duration = DAY.saturating_mul(400);

/// How long a revocation is kept at least, for clocks that disagree about when what it ends would have ended by itself.
const REVOCATION_LIFE_MIN: Duration = Duration::from_secs(60 * 60);

/// Longest life of a proxy token that has an end; one for longer can be made without.
const TOKEN_TTL_MAX: Duration = DAY.saturating_mul(36_525);

/// One operator command.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case")]
pub enum Request {
    /// Makes a proxy token.
    TokenCreate {
        /// The tenant it opens.
        workspace: WorkspaceId,
        /// The person it stands for.
        user: Option<UserId>,
        /// Its life, at most 100 years; `None` is without end.
        ttl: Option<Duration>,
        /// Whether it may only read.
        read_only: bool,
    },
    /// Lists proxy tokens without the secrets.
    TokenList,
    /// Ends a proxy token at once.
    TokenRevoke {
        /// Its public id.
        id: TokenId,
    },
    /// Makes an executor and binds it.
    ExecutorCreate {
        /// The tenant that may reach it.
        workspace: WorkspaceId,
        /// The tenant's name for it.
        name: EnvironmentName,
        /// Whether it becomes the tenant's default.
        default: bool,
    },
    /// Makes an executor of a person, bound nowhere yet.
    ExecutorRegister {
        /// Its owner.
        user: UserId,
    },
    /// Lists executors with their bindings, of one workspace or all.
    ExecutorList {
        /// The workspace; `None` is all.
        workspace: Option<WorkspaceId>,
    },
    /// Lets a workspace reach an executor.
    ExecutorBind {
        /// The executor.
        executor: ExecutorId,
        /// The tenant that may reach it.
        workspace: WorkspaceId,
        /// The tenant's name for it.
        name: EnvironmentName,
        /// Whether it becomes the tenant's default; without, a default stays what it was.
        default: bool,
    },
    /// Says what a bound executor is for.
    ExecutorDescribe {
        /// The executor.
        executor: ExecutorId,
        /// The tenant to whom it is said.
        workspace: WorkspaceId,
        /// The text.
        description: String,
    },
    /// Takes that right away.
    ExecutorUnbind {
        /// The executor.
        executor: ExecutorId,
        /// The tenant that may reach it no more.
        workspace: WorkspaceId,
    },
    /// Gives an executor another name in a workspace.
    ExecutorRename {
        /// The executor.
        executor: ExecutorId,
        /// The tenant in which it is renamed.
        workspace: WorkspaceId,
        /// Its new name there.
        name: EnvironmentName,
    },
    /// Forgets an executor, its bindings and its credential.
    ExecutorDelete {
        /// The executor.
        executor: ExecutorId,
    },
    /// Mints one cap-token.
    CapToken {
        /// The tenant it opens.
        workspace: WorkspaceId,
        /// What it is minted for; `None` is a new turn of its own.
        turn: Option<TurnId>,
        /// The person it stands for.
        user: Option<UserId>,
        /// Its life, a second to 365 days.
        ttl: Duration,
    },
    /// Revokes the cap-tokens of a turn.
    RevokeTurn {
        /// The turn.
        turn: TurnId,
    },
    /// Revokes the cap-tokens of a turn that end by themselves at a known time.
    RevokeTurnUntil {
        /// The turn.
        turn: TurnId,
        /// That time, in Unix seconds.
        exp: u64,
    },
    /// Revokes the cap-tokens of a workspace issued so far.
    RevokeWorkspace {
        /// The workspace.
        workspace: WorkspaceId,
    },
    /// Lists the gateway's own keys by name.
    KeyList,
    /// Puts a new key before the one that signs now, which still verifies until the next rotation.
    KeyRotate {
        /// What the key signs.
        purpose: KeyPurpose,
    },
}

impl Request {
    /// What is recorded of it; `None` for what only looks.
    fn act(&self, role: &str) -> Option<Act> {
        let of = |action| Act::new(action).by_the(role);
        Some(match self {
            Self::TokenList | Self::ExecutorList { .. } | Self::KeyList => return None,
            Self::TokenCreate { workspace, user, ttl, read_only } => {
                let what = json!({ "ttl_secs": ttl.map(|ttl| ttl.as_secs()), "read_only": read_only });
                for_user(of("token.create").of_workspace(workspace), user.as_ref()).about(what)
            }
            Self::TokenRevoke { id } => of("token.revoke").about(json!({ "token": id })).always(),
            Self::ExecutorCreate { workspace, name, default } => {
                let act = of("executor.create").of_workspace(workspace).at(name.as_str());
                act.about(json!({ "default": default }))
            }
            Self::ExecutorRegister { user } => of("executor.create").of_user(user),
            Self::ExecutorBind { executor, workspace, name, default } => {
                let act = of("executor.bind").of_workspace(workspace).on(executor).at(name.as_str());
                act.about(json!({ "default": default }))
            }
            Self::ExecutorDescribe { executor, workspace, .. } => {
                of("executor.describe").of_workspace(workspace).on(executor)
            }
            Self::ExecutorUnbind { executor, workspace } => {
                of("executor.unbind").of_workspace(workspace).on(executor).always()
            }
            Self::ExecutorRename { executor, workspace, name } => {
                of("executor.rename").of_workspace(workspace).on(executor).at(name.as_str())
            }
            Self::ExecutorDelete { executor } => of("executor.delete").on(executor).always(),
            Self::CapToken { workspace, turn, user, ttl } => {
                let what = json!({ "turn": turn, "ttl_secs": ttl.as_secs() });
                for_user(of("cap_token.mint").of_workspace(workspace), user.as_ref()).about(what)
            }
            Self::RevokeTurn { turn } | Self::RevokeTurnUntil { turn, .. } => {
                of("cap_token.revoke").about(json!({ "turn": turn })).always()
            }
            Self::RevokeWorkspace { workspace } => of("cap_token.revoke").of_workspace(workspace).always(),
            // It takes away what the key before the last one signed.
            Self::KeyRotate { purpose } => of("key.rotate").about(json!({ "purpose": purpose })).always(),
        })
    }
}

fn for_user(act: Act, user: Option<&UserId>) -> Act {
    match user {
        Some(user) => act.of_user(user),
        None => act,
    }
}

/// What is recorded of an answer: names of what was made, never the secret.
fn outcome(result: &Result<Response, AdminError>) -> Outcome {
    match result {
        Ok(Response::Token { id, .. }) => Outcome::new("ok").with("token", id.as_str()),
        Ok(Response::ExecutorCreated { exe_id, .. } | Response::ExecutorRegistered { exe_id }) => {
            Outcome::new("ok").with("executor", exe_id.as_str())
        }
        Ok(_) => Outcome::new("ok"),
        Err(AdminError::Refused(_)) => Outcome::new("refused"),
        Err(AdminError::Conflict(_)) => Outcome::new("conflict"),
        Err(AdminError::NotFound(_)) => Outcome::new("not_found"),
        Err(AdminError::Unavailable(_) | AdminError::Damaged(_)) => Outcome::new("failed"),
    }
}

/// What a command answers. Times are RFC 3339 in UTC.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", content = "value", rename_all = "snake_case")]
pub enum Response {
    /// A new proxy token; it cannot be shown again.
    Token {
        /// Its public id.
        id: TokenId,
        /// The token itself.
        #[serde(with = "secret_text")]
        token: Secret,
        /// The tenant it opens.
        workspace: WorkspaceId,
        /// The person it stands for.
        user: Option<UserId>,
        /// When it ends; `None` is never.
        expires_at: Option<String>,
    },
    /// The proxy tokens, oldest first.
    Tokens(Vec<TokenEntry>),
    /// A new executor with its credential.
    ExecutorCreated {
        /// Its id.
        exe_id: ExecutorId,
        /// What it registers with.
        #[serde(with = "secret_text")]
        token: Secret,
        /// The tenant that may reach it.
        workspace: WorkspaceId,
        /// The tenant's name for it.
        name: EnvironmentName,
        /// A shell command that connects it, with the token inside.
        #[serde(with = "secret_text")]
        command: Secret,
    },
    /// A new executor without a binding.
    ExecutorRegistered {
        /// Its id.
        exe_id: ExecutorId,
    },
    /// The executors, oldest first.
    Executors(Vec<ExecutorEntry>),
    /// The executor is bound.
    Bound,
    /// One cap-token.
    CapToken {
        /// The token itself.
        #[serde(with = "secret_text")]
        token: Secret,
    },
    /// The gateway's keys, without the secrets.
    Keys(Vec<KeyEntry>),
    /// It is done, and there is nothing to tell.
    Done,
}

impl Response {
    /// What `--json` prints, with the secrets in it: the fields alone, or null where there is nothing to tell.
    pub fn json(&self) -> serde_json::Value {
        let mut tagged = serde_json::to_value(self).expect("only texts, flags and lists of them");
        tagged["value"].take()
    }
}

/// A proxy token in a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenEntry {
    /// Its public id.
    pub id: TokenId,
    /// The tenant it opens.
    pub workspace: WorkspaceId,
    /// The person it stands for.
    pub user: Option<UserId>,
    /// Whether it may only read.
    pub read_only: bool,
    /// When it was created.
    pub created_at: String,
    /// When it ends; `None` is never.
    pub expires_at: Option<String>,
}

/// The keys of one purpose in a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyEntry {
    /// What they sign.
    pub purpose: KeyPurpose,
    /// Names the key that signs.
    pub current: String,
    /// Names the one that still verifies.
    pub previous: Option<String>,
}

impl KeyEntry {
    fn of(purpose: KeyPurpose, ring: &Keyring) -> Self {
        let previous = ring.previous.as_ref().map(|key| key.kid.clone());
        Self { purpose, current: ring.current.kid.clone(), previous }
    }
}

/// An executor in a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecutorEntry {
    /// Its id.
    pub exe_id: ExecutorId,
    /// When it was created.
    pub created_at: String,
    /// When its link was last known to be up.
    pub last_seen: Option<String>,
    /// Who may reach it; in the list of one workspace, that one alone.
    pub bindings: Vec<BindingEntry>,
}

/// A binding in a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BindingEntry {
    /// The tenant that may reach the executor.
    pub workspace: WorkspaceId,
    /// The tenant's name for it.
    pub name: EnvironmentName,
    /// Whether it is the tenant's default.
    pub default: bool,
}

/// Why a command failed. Every kind is a text alone, since it crosses a socket; it may name files and causes, because
/// only operators read it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(tag = "code", content = "message", rename_all = "snake_case")]
pub enum AdminError {
    /// The command itself is wrong or not permitted.
    #[error("{0}")]
    Refused(String),
    /// It contradicts what is stored.
    #[error("{0}")]
    Conflict(String),
    /// It names what is not stored.
    #[error("{0}")]
    NotFound(String),
    /// The store or the daemon does not answer; a later try may succeed.
    #[error("{0}")]
    Unavailable(String),
    /// The store is not one of this program or version.
    #[error("{0}")]
    Damaged(String),
}

impl AdminError {
    fn unavailable(what: &str, cause: impl fmt::Display) -> Self {
        Self::Unavailable(format!("{what}: {cause}"))
    }
}

impl From<StoreError> for AdminError {
    fn from(error: StoreError) -> Self {
        let text = error.to_string();
        match error {
            StoreError::Conflict(_) => Self::Conflict(text),
            StoreError::NotFound(_) => Self::NotFound(text),
            StoreError::Unavailable(cause) => Self::Unavailable(format!("{text}: {cause}")),
            StoreError::Damaged(cause) => Self::Damaged(format!("{text}: {cause}")),
        }
    }
}

/// What a command changed: whoever caches it or serves under it drops it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// The proxy token opens nothing any more.
    TokenRevoked(TokenId),
    /// The executor is gone with all its bindings.
    ExecutorDeleted(ExecutorId),
    /// The workspace may reach the executor no more.
    Unbound {
        /// The workspace.
        workspace: WorkspaceId,
        /// The executor.
        executor: ExecutorId,
    },
    /// The workspace's names or its default have changed.
    Bound {
        /// The workspace.
        workspace: WorkspaceId,
    },
    /// Cap-tokens were revoked; the revocation is stored.
    Revoked(Revocation),
    /// Other keys sign and verify from now on.
    KeyRotated {
        /// What they sign.
        purpose: KeyPurpose,
        /// The keys.
        ring: Keyring,
    },
}

/// What commands need to know of the configuration.
#[derive(Debug, Clone)]
pub struct AdminSettings {
    /// Base URL under which executors reach the gateway.
    pub public_url: Option<String>,
    /// The API's address, which stands in for the URL where there is none.
    pub listen: SocketAddr,
    /// Revocations kept; a further one is refused.
    pub revocations_max: usize,
    /// What is recorded where no daemon runs that records.
    pub audit: config::Audit,
}

/// Runs operator commands on a store.
pub struct Admin {
    store: Store,
    settings: Live<AdminSettings>,
    audit: Audit,
    observer: Box<dyn Fn(&Change) + Send + Sync>,
}

impl Admin {
    /// Commands on that store, recorded in that audit, with nobody to tell of changes.
    pub fn new(store: Store, settings: impl Into<Live<AdminSettings>>, audit: Audit) -> Self {
        Self { store, settings: settings.into(), audit, observer: Box::new(|_| {}) }
    }

    /// Has the observer called after each change is stored and before it is answered. It must not block.
    #[must_use]
    pub fn observed_by(self, observer: impl Fn(&Change) + Send + Sync + 'static) -> Self {
        Self { observer: Box::new(observer), ..self }
    }

    /// Runs one command of an operator. Once begun, it is completed and its change told even if the future is dropped.
    ///
    /// # Errors
    /// All of [`AdminError`]; nothing was changed then.
    pub async fn run(self: &Arc<Self>, request: Request) -> Result<Response, AdminError> {
        self.run_for("operator", request).await
    }

    /// The same for somebody in another role, which is recorded.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub async fn run_for(self: &Arc<Self>, role: &'static str, request: Request) -> Result<Response, AdminError> {
        let admin = Arc::clone(self);
        // A task of its own: a caller that leaves between storing and telling would leave revoked streams alive.
        let task = tokio::spawn(async move { admin.record(role, request).await });
        task.await.unwrap_or_else(|error| Err(AdminError::unavailable("the command failed inside the gateway", error)))
    }

    /// Performs it between the records of its beginning and its end.
    async fn record(&self, role: &str, mut request: Request) -> Result<Response, AdminError> {
        if let Request::CapToken { turn: turn @ None, .. } = &mut request {
            // Before it is recorded, since the turn is what the token is revoked by.
            *turn = Some(TurnId::new(&format!("cli_{}", random_name()?)).expect("16 letters, digits and a line"));
        }
        let Some(act) = request.act(role) else { return self.perform(request).await };
        let entry = self.audit.begin(act).await.map_err(|error| AdminError::Unavailable(error.to_string()))?;
        let result = self.perform(request).await;
        entry.end(outcome(&result));
        result
    }

    async fn perform(&self, request: Request) -> Result<Response, AdminError> {
        match request {
            Request::TokenCreate { workspace, user, ttl, read_only } => {
                self.create_token(workspace, user, ttl, read_only).await
            }
            Request::TokenList => {
                let tokens = self.store.tokens().await?;
                Ok(Response::Tokens(tokens.into_iter().map(token_entry).collect()))
            }
            Request::TokenRevoke { id } => {
                self.store.revoke_token(&id).await?;
                Ok(self.done(Change::TokenRevoked(id)))
            }
            Request::ExecutorCreate { workspace, name, default } => {
                self.create_executor(workspace, name, default).await
            }
            Request::ExecutorList { workspace } => {
                let executors = self.store.executors(workspace.as_ref()).await?;
                Ok(Response::Executors(executors.into_iter().map(executor_entry).collect()))
            }
            Request::ExecutorBind { executor, workspace, name, default } => {
                self.store.bind(&executor, &workspace, &name, default).await?;
                (self.observer)(&Change::Bound { workspace });
                Ok(Response::Bound)
            }
            Request::ExecutorRegister { user } => {
                let exe_id = self.store.register_executor(&user).await?.id;
                Ok(Response::ExecutorRegistered { exe_id })
            }
            Request::ExecutorDescribe { executor, workspace, description } => {
                self.store.describe(&executor, &workspace, &description).await?;
                Ok(self.done(Change::Bound { workspace }))
            }
            Request::ExecutorUnbind { executor, workspace } => {
                self.store.unbind(&executor, &workspace).await?;
                Ok(self.done(Change::Unbound { workspace, executor }))
            }
            Request::ExecutorRename { executor, workspace, name } => {
                self.store.rename(&executor, &workspace, &name).await?;
                Ok(self.done(Change::Bound { workspace }))
            }
            Request::ExecutorDelete { executor } => {
                self.store.delete_executor(&executor).await?;
                Ok(self.done(Change::ExecutorDeleted(executor)))
            }
            Request::CapToken { workspace, turn, user, ttl } => {
                let turn = turn.expect("it was given one before it was recorded");
                self.mint_cap_token(workspace, turn, user, ttl).await
            }
            Request::RevokeTurn { turn } => self.revoke(RevocationScope::Turn(turn), REVOCATION_LIFE).await,
            Request::RevokeTurnUntil { turn, exp } => {
                let left = Duration::from_secs(exp.saturating_sub(unix_secs(SystemTime::now())));
                self.revoke(RevocationScope::Turn(turn), left.clamp(REVOCATION_LIFE_MIN, REVOCATION_LIFE)).await
            }
            Request::RevokeWorkspace { workspace } => {
                self.revoke(RevocationScope::Workspace(workspace), REVOCATION_LIFE).await
            }
            Request::KeyList => {
                let mut keys = Vec::new();
                for purpose in KeyPurpose::ALL {
                    keys.push(KeyEntry::of(purpose, &self.store.keyring(purpose).await?));
                }
                Ok(Response::Keys(keys))
            }
            Request::KeyRotate { purpose } => {
                let ring = self.store.rotate_key(purpose).await?;
                let entry = KeyEntry::of(purpose, &ring);
                (self.observer)(&Change::KeyRotated { purpose, ring });
                Ok(Response::Keys(vec![entry]))
            }
        }
    }

    fn done(&self, change: Change) -> Response {
        (self.observer)(&change);
        Response::Done
    }

    async fn create_token(
        &self,
        workspace: WorkspaceId,
        user: Option<UserId>,
        ttl: Option<Duration>,
        read_only: bool,
    ) -> Result<Response, AdminError> {
        let created_at = SystemTime::now();
        let expires_at = match ttl {
            Some(ttl) if ttl.is_zero() || ttl > TOKEN_TTL_MAX => {
                return Err(AdminError::Refused("a token lives more than 0 seconds and at most 100 years".into()));
            }
            ttl => ttl.map(|ttl| created_at + ttl),
        };
        let secret = Zeroizing::new(random::<32>()?);
        let text = Secret::new(format!("egw_{}", URL_SAFE_NO_PAD.encode(*secret)));
        let id = TokenId::new(&format!("tok_{}", random_name()?)).expect("16 letters, digits and a line");
        let token = Token { id, workspace, user, read_only, created_at, expires_at };
        self.store.create_token(token.clone(), Sha256::digest(text.expose()).into()).await?;
        let TokenEntry { id, workspace, user, expires_at, .. } = token_entry(token);
        Ok(Response::Token { id, token: text, workspace, user, expires_at })
    }

    async fn create_executor(
        &self,
        workspace: WorkspaceId,
        name: EnvironmentName,
        default: bool,
    ) -> Result<Response, AdminError> {
        // First the key: without it the executor could be made but not answered.
        let key = self.store.keyring(KeyPurpose::Executor).await?.current;
        let executor = self.store.create_executor(&workspace, &name, default, None).await?;
        (self.observer)(&Change::Bound { workspace: workspace.clone() });
        let token = executor.token(&key);
        let command = Secret::new(format!(
            "printf '%s\\n' {} | codex exec-server --remote {} --environment-id {} --registration-bearer-stdin",
            token.as_str(),
            shell_word(&self.base_url()),
            executor.id
        ));
        let token = Secret::new(token.as_str().to_owned());
        Ok(Response::ExecutorCreated { exe_id: executor.id, token, workspace, name, command })
    }

    /// Where executors find the gateway, as far as it knows: without a public URL, those on its own machine.
    fn base_url(&self) -> String {
        let settings = self.settings.now();
        settings.public_url.clone().unwrap_or_else(|| {
            let mut listen = settings.listen;
            if listen.ip().is_unspecified() {
                let loopback = if listen.is_ipv4() { [127, 0, 0, 1].into() } else { [0, 0, 0, 0, 0, 0, 0, 1].into() };
                listen.set_ip(loopback);
            }
            format!("http://{listen}")
        })
    }

    async fn mint_cap_token(
        &self,
        workspace: WorkspaceId,
        turn: TurnId,
        user: Option<UserId>,
        ttl: Duration,
    ) -> Result<Response, AdminError> {
        if ttl.as_secs() == 0 || ttl > CAP_TOKEN_TTL_MAX {
            return Err(AdminError::Refused("a cap-token lives at least 1 second and at most 365 days".into()));
        }
        let key = self.store.keyring(KeyPurpose::CapToken).await?.current;
        let now = unix_secs(SystemTime::now());
        let scope = RevocationScope::Workspace(workspace.clone());
        let revocations = self.store.revocations().await?;
        let revoked_at = revocations.into_iter().find(|revocation| revocation.scope == scope);
        // A revocation ends what was issued up to its second, and this token is minted after it.
        let iat = revoked_at.map_or(now, |revocation| now.max(unix_secs(revocation.revoked_at) + 1));
        let claims = CapClaims {
            turn_id: turn,
            workspace_id: workspace,
            user_id: user,
            iat,
            exp: now + ttl.as_secs(),
            skip_audit: false,
            kid: Some(key.kid),
        };
        Ok(Response::CapToken { token: Secret::new(cap_token::mint(&claims, &key.secret)) })
    }

    async fn revoke(&self, scope: RevocationScope, life: Duration) -> Result<Response, AdminError> {
        let revoked_at = SystemTime::now();
        let revocation = Revocation { scope, revoked_at, forget_at: revoked_at + life };
        self.store.add_revocation(revocation.clone(), self.settings.now().revocations_max).await?;
        Ok(self.done(Change::Revoked(revocation)))
    }
}

impl fmt::Debug for Admin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Admin").field("settings", &*self.settings.now()).finish_non_exhaustive()
    }
}

/// Secrets of an answer as plain texts of its JSON: showing them once is what the answer is for.
mod secret_text {
    use serde::{Deserialize, Deserializer, Serializer};

    use crate::config::Secret;

    pub(super) fn serialize<S: Serializer>(secret: &Secret, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(secret.expose())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Secret, D::Error> {
        String::deserialize(deserializer).map(Secret::new)
    }
}

fn token_entry(token: Token) -> TokenEntry {
    let Token { id, workspace, user, read_only, created_at, expires_at } = token;
    TokenEntry { id, workspace, user, read_only, created_at: rfc3339(created_at), expires_at: expires_at.map(rfc3339) }
}

fn executor_entry((executor, bindings): (Executor, Vec<Binding>)) -> ExecutorEntry {
    let entry = |binding: Binding| BindingEntry {
        workspace: binding.workspace().clone(),
        name: binding.name().clone(),
        default: binding.is_default(),
    };
    ExecutorEntry {
        exe_id: executor.id,
        created_at: rfc3339(executor.created_at),
        last_seen: executor.last_seen.map(rfc3339),
        bindings: bindings.into_iter().map(entry).collect(),
    }
}

fn random<const N: usize>() -> Result<[u8; N], AdminError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| AdminError::unavailable("no random bytes", error))?;
    Ok(bytes)
}

/// Twelve random letters and digits, to tell things apart. Not even enough for a secret.
fn random_name() -> Result<String, AdminError> {
    const ALPHABET: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";
    Ok(random::<12>()?.map(|byte| char::from(ALPHABET[usize::from(byte) % ALPHABET.len()])).iter().collect())
}

/// The text as one word of a POSIX shell.
fn shell_word(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b":/._-".contains(&byte);
    if !text.is_empty() && text.bytes().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

fn unix_secs(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
#[path = "admin/tests.rs"]
mod tests;
