//! What one tenant can reach: its resolver, its pool of ready clients, its calls.
//!
//! A [`Workspace`] holds nothing that cannot be rebuilt, so dropping it from memory is always safe. Every stream to an
//! executor is opened by [`Workspace::open_stream`].

pub mod cache;
pub mod pace;
pub mod pool;
pub mod resolver;

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::auth::cap_token::CapTokenRefused;
use crate::auth::{Auth, Principal};
use crate::config::{self, Live};
use crate::protocol::frame::StreamId;
use crate::protocol::ids::WorkspaceId;
use crate::protocol::rpc::ExecutorSessionId;
use crate::registry::Registry;
use crate::relay::client::{Client, ConnectError};
use crate::relay::conversation::{Conversation, HandshakeError};
use crate::relay::link::OpenError;
use crate::relay::noise::GatewayIdentity;
use crate::relay::stream::{StreamHandle, StreamKind};
use crate::store::{Binding, Store, StoreError};
use crate::tools::{Copies, Tool};

use self::pace::{Pace, TooFast};
use self::pool::Pool;
use self::resolver::Resolver;

/// Largest list of environments that a workspace keeps for the next caller: about a hundred environments.
const LISTING_BYTES_MAX: usize = 256 * 1024;

/// What all workspaces share.
pub struct Corridor {
    /// Where the gateway keeps its files.
    pub state_dir: PathBuf,
    /// Durable state.
    pub store: Store,
    /// Who may do what.
    pub auth: Auth,
    /// Who is connected.
    pub registry: Arc<Registry>,
    /// The gateway's end of encrypted streams.
    pub identity: Live<GatewayIdentity>,
    /// Bounds and times of links.
    pub link: Live<config::Link>,
    /// Bounds and times of workspaces.
    pub settings: Live<config::Workspaces>,
    /// Tasks that end what calls have left behind at executors.
    pub endings: TaskTracker,
    /// Cancelled when the gateway stops: no call and no ending waits any longer for an executor that is away.
    pub stop: CancellationToken,
}

/// Why a workspace cannot reach an executor.
#[derive(Debug, thiserror::Error)]
pub enum ReachError {
    /// The workspace has no environment of that name.
    #[error("no environment named \"{0}\"")]
    NoEnvironment(String),
    /// The caller named none, and there is no only and no default one.
    #[error("{}", several(.0))]
    WhichEnvironment(Vec<String>),
    /// The executor has no link.
    #[error("the executor of environment \"{0}\" is not connected")]
    NotConnected(String),
    /// The link or the workspace's share of it is full.
    #[error("too many streams on this executor")]
    TooManyStreams,
    /// The id that a harness chose for its stream is in use.
    #[error("the stream id is taken")]
    StreamTaken,
    /// The executor is connected and did not take the call.
    #[error("the executor of environment \"{environment}\" could not be reached")]
    Unreachable {
        /// The tenant's name for it.
        environment: String,
        /// What failed, for the log.
        source: Arc<ConnectError>,
    },
    /// The workspace's own right to open streams was refused.
    #[error("the workspace may not open streams")]
    Refused(#[source] CapTokenRefused),
    /// The gateway failed while it opened the conversation.
    #[error("the gateway failed at this request")]
    Failed,
    /// The store does not answer.
    #[error("the environments of the workspace cannot be read")]
    Store(#[source] Arc<StoreError>),
}

fn several(names: &[String]) -> String {
    match names {
        [] => "the workspace has no environment".into(),
        names => format!("environment_id: the workspace has several environments: {}", names.join(", ")),
    }
}

/// A list of environments as it was last answered, and what it was made from.
struct Listing {
    bindings: Arc<Vec<Binding>>,
    version: u64,
    answer: Bytes,
}

/// One tenant in memory.
pub struct Workspace {
    id: WorkspaceId,
    corridor: Arc<Corridor>,
    calls: Arc<AtomicUsize>,
    pace: Pace,
    tools: &'static [&'static Tool],
    listing: Mutex<Option<Listing>>,
    /// Names of this tenant.
    pub resolver: Resolver,
    /// Ready clients of this tenant.
    pub pool: Pool,
    /// Copies under way between this tenant's environments.
    pub copies: Copies,
}

/// The workspace has as many calls under way as it may.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("the workspace has {0} calls under way already")]
pub struct TooManyCalls(usize);

/// One of a workspace's places for calls, given back when it is dropped.
pub struct CallPlace(Arc<AtomicUsize>);

impl Drop for CallPlace {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Workspace {
    fn new(id: WorkspaceId, corridor: Arc<Corridor>) -> Self {
        Self {
            calls: Arc::default(),
            pace: Pace::default(),
            tools: Tool::ALL,
            listing: Mutex::default(),
            resolver: Resolver::new(id.clone(), corridor.settings.clone()),
            pool: Pool::default(),
            copies: Copies::default(),
            corridor,
            id,
        }
    }

    /// Which tenant this is.
    pub fn id(&self) -> &WorkspaceId {
        &self.id
    }

    /// What it shares with all others.
    pub fn corridor(&self) -> &Arc<Corridor> {
        &self.corridor
    }

    /// The tools it may call.
    pub fn tools(&self) -> &'static [&'static Tool] {
        self.tools
    }

    /// Takes one of the workspace's places for calls.
    ///
    /// # Errors
    /// [`TooManyCalls`] when all are taken; nothing waits.
    pub fn begin_call(&self) -> Result<CallPlace, TooManyCalls> {
        let calls_max = self.corridor.settings.now().calls_max;
        // A place from the start: should the call be refused, dropping it gives it back.
        let place = CallPlace(self.calls.clone());
        if self.calls.fetch_add(1, Ordering::AcqRel) < calls_max { Ok(place) } else { Err(TooManyCalls(calls_max)) }
    }

    /// Counts one request of this workspace.
    ///
    /// # Errors
    /// [`TooFast`] when it asks more often than it may; nothing waits.
    pub fn count_request(&self) -> Result<(), TooFast> {
        let settings = self.corridor.settings.now();
        self.pace.count(settings.calls_per_second_max, settings.calls_burst_max)
    }

    /// Calls under way.
    pub fn calls(&self) -> usize {
        self.calls.load(Ordering::Acquire)
    }

    /// The environments of this workspace.
    ///
    /// # Errors
    /// [`ReachError::Store`].
    pub async fn environments(&self) -> Result<Arc<Vec<Binding>>, ReachError> {
        self.resolver.bindings(&self.corridor.store).await.map_err(ReachError::Store)
    }

    /// The answer that lists these environments, made anew when they or the registry's version are others than before.
    pub fn listing(&self, bindings: &Arc<Vec<Binding>>, version: u64, make: impl FnOnce() -> Bytes) -> Bytes {
        // A value is replaced whole, so a panic elsewhere does not spoil it.
        let listing = || self.listing.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = &*listing()
            && known.version == version
            && Arc::ptr_eq(&known.bindings, bindings)
        {
            return known.answer.clone();
        }
        let answer = make();
        let kept = answer.len() <= LISTING_BYTES_MAX;
        let new = kept.then(|| Listing { bindings: bindings.clone(), version, answer: answer.clone() });
        *listing() = new;
        answer
    }

    /// The environment of that name.
    ///
    /// # Errors
    /// [`ReachError::NoEnvironment`], [`ReachError::Store`].
    pub async fn environment(&self, name: &str) -> Result<Binding, ReachError> {
        let bindings = self.environments().await?;
        let binding = bindings.iter().find(|binding| binding.name().as_str() == name);
        binding.cloned().ok_or_else(|| ReachError::NoEnvironment(name.to_owned()))
    }

    /// The environment of a call that names none: the only one, else the default.
    ///
    /// # Errors
    /// [`ReachError::WhichEnvironment`] with the names there are, [`ReachError::Store`].
    pub async fn default_environment(&self) -> Result<Binding, ReachError> {
        let bindings = self.environments().await?;
        let only = if let [only] = &**bindings { Some(only) } else { None };
        let found = only.or_else(|| bindings.iter().find(|binding| binding.is_default()));
        found.cloned().ok_or_else(|| {
            let mut names: Vec<_> = bindings.iter().map(|binding| binding.name().to_string()).collect();
            names.sort();
            ReachError::WhichEnvironment(names)
        })
    }

    /// The right under which this workspace's own clients open streams: a cap-token that the gateway mints for it and
    /// renews before it ends.
    ///
    /// # Errors
    /// [`ReachError::Refused`].
    pub fn own_right(&self) -> Result<Principal, ReachError> {
        let cap_tokens = self.corridor.auth.cap_tokens();
        let token = cap_tokens.for_workspace(&self.id).map_err(ReachError::Refused)?;
        cap_tokens.verify(token.expose()).map_err(ReachError::Refused)
    }

    /// Opens a stream under the workspace's own right.
    ///
    /// # Errors
    /// As [`Self::open_stream`].
    pub async fn open_own_stream(&self, binding: &Binding, kind: StreamKind) -> Result<StreamHandle, ReachError> {
        self.open(&self.own_right()?, binding, None, kind).await
    }

    /// Starts a conversation on a stream of this workspace.
    ///
    /// # Errors
    /// [`HandshakeError`].
    pub async fn converse(&self, stream: StreamHandle) -> Result<Conversation, HandshakeError> {
        let registration = stream.link().registration();
        let identity = self.corridor.identity.now();
        let harness = self.corridor.auth.harness();
        let authorization = harness.mint(&self.id, &registration.executor, &registration.id, &identity.key_digest());
        Conversation::open(stream, &identity, &authorization).await
    }

    /// The same with the gateway as the caller, in a new executor session or in the one to resume. `stop` ends it.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub async fn connect(
        &self,
        stream: StreamHandle,
        resume: Option<ExecutorSessionId>,
        stop: CancellationToken,
    ) -> Result<Client, ConnectError> {
        let conversation = self.converse(stream).await?;
        Client::initialize(conversation, resume, stop).await.map_err(ConnectError::Initialize)
    }

    /// Opens a stream of a harness to a bound executor: the only way from a caller to an executor, so rights and bounds are
    /// checked here and nowhere else. An executor that was connected lately is waited for.
    ///
    /// # Errors
    /// [`ReachError`]; nothing has reached the executor then.
    pub async fn open_stream(&self, right: &Principal, binding: &Binding) -> Result<StreamHandle, ReachError> {
        self.open(right, binding, None, StreamKind::PlainHarness).await
    }

    /// The same under an id that the caller has chosen.
    ///
    /// # Errors
    /// As [`Self::open_stream`], and [`ReachError::StreamTaken`] when the id is in use on the executor's link.
    pub async fn open_stream_as(
        &self,
        right: &Principal,
        binding: &Binding,
        id: StreamId,
    ) -> Result<StreamHandle, ReachError> {
        self.open(right, binding, Some(id), StreamKind::EncryptedHarness).await
    }

    async fn open(
        &self,
        right: &Principal,
        binding: &Binding,
        id: Option<StreamId>,
        kind: StreamKind,
    ) -> Result<StreamHandle, ReachError> {
        if right.workspace() != &self.id || binding.workspace() != &self.id {
            return Err(ReachError::Refused(CapTokenRefused::Revoked));
        }
        let settings = self.corridor.link.now();
        let seen = Duration::from_secs(settings.executor_seen_secs);
        let wait = Duration::from_secs(settings.executor_wait_secs);
        loop {
            let found = self.corridor.registry.link_soon(binding, seen, wait).await;
            let link = found.map_err(|_| ReachError::NotConnected(binding.name().to_string()))?;
            let opened = match &id {
                None => link.open_stream(&self.id),
                Some(id) => link.open_stream_as(id.clone(), &self.id),
            };
            match opened {
                Ok(stream) => return Ok(stream.counted(kind)),
                // The link ended between the two: its successor is waited for like any other.
                Err(OpenError::Disconnected) => {}
                Err(OpenError::TooManyStreams) => return Err(ReachError::TooManyStreams),
                Err(OpenError::Taken) => return Err(ReachError::StreamTaken),
            }
        }
    }
}
