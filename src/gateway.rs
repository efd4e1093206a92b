//! One gateway: what exists, how it starts and how it stops. The one file that knows all parts.
//!
//! ```text
//! start ─► serving ─► draining ─► closing ─► stopped
//!           │          │           └ links close, then the listeners, then the store, the ops listener last
//!           │          └ new calls get 503, those under way go on for `drain.grace_secs`
//!           └ until the future given to `run_until` is ready
//! ```

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use hyper::Request;
use hyper::body::Incoming;
use serde_json::json;
use tokio::net::{TcpListener, TcpSocket};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::admin::{Admin, AdminSettings, Change, bind_admin, serve_admin};
use crate::api::Api;
use crate::audit::{self, Audit};
use crate::auth::{self, Auth, AuthStartError};
use crate::config::{Config, ConfigFaults, Fault, KNOBS, Live, NoStateDir, Running, TlsFiles};
use crate::edge::listener::{Counts, Listener, Places};
use crate::edge::tls::{Tls, TlsError};
use crate::ops::health::Health;
use crate::ops::metrics::Metrics;
use crate::protocol::ids::ExecutorId;
use crate::registry::Registry;
use crate::relay::link::{CloseReason, LinkHandle};
use crate::relay::noise::{GatewayIdentity, NoiseError};
use crate::session::Sessions;
use crate::store::{RevocationScope, StateLock, Store, StoreError};
use crate::time::rfc3339;
use crate::workspace::Corridor;
use crate::workspace::cache::Workspaces;

/// Connections the kernel holds until they are accepted: many executors come back at once after a restart.
const BACKLOG: u32 = 4096;

/// How long a start waits for an operator's command that holds the state directory for a moment.
const LOCK_WAIT: Duration = Duration::from_secs(1);

/// Interval in which idle workspaces are dropped and connected executors recorded.
const SWEEP_EVERY: Duration = Duration::from_secs(20);

/// Interval in which the disk space of output is looked at: a fast process writes a few hundred MiB meanwhile.
const DISK_EVERY: Duration = Duration::from_secs(1);

/// How long sessions may take to write what they have, and calls that were cut to end their processes.
const SESSIONS_CLOSE: Duration = Duration::from_secs(5);

/// How long links may take to say farewell.
const LINKS_CLOSE: Duration = Duration::from_secs(5);

/// Links and workspaces that an overview lists; of more it tells the number.
const OVERVIEW_ENTRIES_MAX: usize = 1000;

/// How long those may take to be answered who connected last.
const LAST_ANSWERS: Duration = Duration::from_secs(1);

/// Why a gateway does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No state directory can be derived.
    #[error(transparent)]
    StateDir(#[from] NoStateDir),
    /// The store cannot be used; another gateway may be running on it.
    #[error("state directory {}: {source}", .path.display())]
    Store {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        source: StoreError,
    },
    /// Keys or the upstream validator cannot be used.
    #[error(transparent)]
    Auth(#[from] AuthStartError),
    /// No keys for encrypted streams.
    #[error(transparent)]
    Noise(#[from] NoiseError),
    /// The audit log cannot be taken up.
    #[error("the audit log in {} cannot be used", .path.display())]
    Audit {
        /// Its directory.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Certificates cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// An address cannot be listened on.
    #[error("cannot listen on {address}")]
    Listen {
        /// The address.
        address: String,
        /// Why.
        source: std::io::Error,
    },
}

/// A running gateway. Dropping it without [`Gateway::run_until`] ends its tasks without a farewell.
pub struct Gateway {
    api: Arc<Api>,
    health: Arc<Health>,
    admin: Arc<Admin>,
    listen: Vec<SocketAddr>,
    ops: SocketAddr,
    connections: TaskTracker,
    drain: CancellationToken,
    accepting: CancellationToken,
    background: CancellationToken,
    acceptors: TaskTracker,
    ops_accepting: CancellationToken,
    ops_acceptors: TaskTracker,
    reloading: Reloading,
    _lock: StateLock,
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.accepting.cancel();
        self.ops_accepting.cancel();
        self.background.cancel();
        self.drain.cancel();
        self.api.draining.cancel();
        self.api.sessions.stop.cancel();
        self.api.corridor.stop.cancel();
        self.api.corridor.registry.close_all(CloseReason::Draining);
        // Before the state directory is given up, so that nobody else writes where this one still does.
        self.api.audit.close();
    }
}

impl Gateway {
    /// Opens the state, binds the listeners and serves.
    ///
    /// # Errors
    /// [`StartError`]; nothing is left behind but the state directory.
    pub async fn start(config: Config) -> Result<Self, StartError> {
        Self::start_on(config, None).await
    }

    /// The same with the API on a listening socket that outlives this process, in place of those of `config.listen`:
    /// whoever connects while no gateway runs is served by the next one.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub async fn start_on(config: Config, held: Option<std::net::TcpListener>) -> Result<Self, StartError> {
        let state_dir = config.state_dir()?;
        let of_store = |source| StartError::Store { path: state_dir.clone(), source };
        let lock = lock(&state_dir).await.map_err(of_store)?;
        let store = Store::open(&state_dir).map_err(of_store)?;
        let audit_dir = state_dir.join(audit::DIRECTORY);
        let running = Arc::new(Running::new(config.clone()));
        let audit = Audit::open(&audit_dir, running.audit.clone());
        let audit = audit.map_err(|source| StartError::Audit { path: audit_dir, source })?;
        let metrics = Arc::new(Metrics::default());
        let auth = Auth::new(store.clone(), running.auth.clone(), metrics.clone()).await?;
        let registry = Arc::new(Registry::default());
        remember_executors(&store, &registry, config.link.executor_seen_secs).await.map_err(of_store)?;
        let corridor = Arc::new(Corridor {
            state_dir: state_dir.clone(),
            store: store.clone(),
            auth,
            registry,
            identity: GatewayIdentity::generate()?.into(),
            link: running.link.clone(),
            settings: running.workspace.clone(),
            endings: TaskTracker::new(),
            stop: CancellationToken::new(),
        });
        let tls = Live::from(config.tls.api().map(Tls::new).transpose()?);
        let ops_tls = Live::from(config.tls.ops().map(Tls::new).transpose()?);
        let workspaces = Arc::new(Workspaces::new(corridor.clone()));
        let sessions = Sessions::restore(
            running.session.clone(),
            running.tools.clone(),
            &corridor,
            workspaces.clone(),
            metrics.clone(),
            audit.clone(),
        );
        let sessions = sessions.await.map_err(of_store)?;
        let api = Arc::new(Api::new(running.clone(), corridor, workspaces, sessions, metrics.clone(), audit.clone()));

        let sockets: Vec<TcpListener> = match held {
            Some(held) => vec![adopt(held)?],
            None => config.listen.iter().map(|address| bind(*address)).collect::<Result<_, _>>()?,
        };
        let ops_socket = bind(config.ops_listen)?;
        let listen: Vec<SocketAddr> = sockets.iter().filter_map(|socket| socket.local_addr().ok()).collect();
        let ops = ops_socket.local_addr().unwrap_or(config.ops_listen);
        let admin_settings = Live::from(admin_settings(&config, &listen));
        let observed = api.clone();
        let admin = Arc::new(
            Admin::new(store.clone(), admin_settings.clone(), audit)
                .observed_by(move |change| apply(&observed, change)),
        );
        let _ = api.operators.set(Arc::downgrade(&admin));
        let admin_socket = bind_admin(&state_dir, &lock).map_err(|source| StartError::Listen {
            address: crate::admin::socket_in(&state_dir).display().to_string(),
            source,
        })?;
        let service = {
            let api = api.clone();
            move |request: Request<Incoming>| api.clone().answer(request)
        };
        let listener = Listener::new(running.edge.clone(), tls.clone(), service);
        let ops_counts = Arc::new(Counts::default());
        let listeners = [("api", listener.counts.clone()), ("ops", ops_counts.clone())];
        let health = Arc::new(Health {
            store,
            metrics: metrics.printer(),
            read: Box::new(asking(&api, move |api| read(api, &listeners))),
            serving: AtomicBool::new(true),
            troubles: Box::new(asking(&api, troubles)),
            state: Box::new(asking(&api, overview)),
        });

        let (accepting, acceptors) = (CancellationToken::new(), TaskTracker::new());
        for socket in sockets {
            acceptors.spawn(listener.clone().accept(socket, accepting.clone()));
        }
        let ops_listener = {
            let health = health.clone();
            let service = move |request: Request<Incoming>| health.clone().answer(request);
            Listener::counted(running.edge.clone(), ops_tls.clone(), service, ops_counts)
        };
        let (ops_accepting, ops_acceptors) = (CancellationToken::new(), TaskTracker::new());
        let places = [listener.places(), ops_listener.places()];
        ops_acceptors.spawn(ops_listener.accept(ops_socket, ops_accepting.clone()));

        let background = CancellationToken::new();
        tokio::spawn(serve_admin(admin_socket, admin.clone(), background.clone()));
        tokio::spawn(sweep(api.clone(), background.clone()));
        tokio::spawn(watch_disk(api.clone(), background.clone()));
        tokio::spawn(api.memory.clone().watch(background.clone()));
        let reloading = Reloading {
            config: running,
            corridor: api.corridor.clone(),
            admin: admin_settings,
            listen: listen.clone(),
            tls,
            ops_tls,
            places: Arc::new(places),
        };
        Ok(Self {
            connections: listener.connections.clone(),
            drain: listener.drain.clone(),
            api,
            health,
            admin,
            listen,
            ops,
            accepting,
            background,
            acceptors,
            ops_accepting,
            ops_acceptors,
            reloading,
            _lock: lock,
        })
    }

    /// Addresses of the API, with real ports.
    pub fn listen(&self) -> &[SocketAddr] {
        &self.listen
    }

    /// Address of the operators' listener, with its real port.
    pub fn ops(&self) -> SocketAddr {
        self.ops
    }

    /// The doors and all behind them.
    pub fn api(&self) -> &Arc<Api> {
        &self.api
    }

    /// Operator commands, as the admin socket carries them out.
    pub fn admin(&self) -> &Arc<Admin> {
        &self.admin
    }

    /// What gives another configuration to this gateway while it runs.
    pub fn reloading(&self) -> Reloading {
        self.reloading.clone()
    }

    /// Serves until `stop` is ready, then drains: callers stop before what they depend on.
    pub async fn run_until(self, stop: impl Future<Output = ()>) {
        stop.await;
        let drain = self.api.config.drain.now();
        self.health.serving.store(false, Ordering::Relaxed);
        tracing::info!("draining");
        sleep(Duration::from_secs(drain.announce_secs)).await;

        self.api.draining.cancel();
        self.drain.cancel();
        self.connections.close();
        self.api.sockets.close();
        let ended = async { tokio::join!(self.connections.wait(), self.api.sockets.wait()) };
        if timeout(Duration::from_secs(drain.grace_secs), ended).await.is_err() {
            let (connections, sockets) = (self.connections.len(), self.api.sockets.len());
            tracing::warn!(connections, sockets, "calls outlived the grace and are cut");
        }

        // Their processes live on at the executors; output that came until now is on disk.
        let (sessions, endings) = (&self.api.sessions.tasks, &self.api.corridor.endings);
        self.api.sessions.stop.cancel();
        self.api.corridor.stop.cancel();
        sessions.close();
        endings.close();
        if timeout(SESSIONS_CLOSE, async { tokio::join!(sessions.wait(), endings.wait()) }).await.is_err() {
            let (sessions, endings) = (sessions.len(), endings.len());
            tracing::warn!(sessions, endings, "sessions, or what ends processes of calls, did not let go in time");
        }

        // A call after the restart waits for an executor only if it was seen lately.
        let registry = &self.api.corridor.registry;
        record_connected(&self.api).await;
        registry.close_all(CloseReason::Draining);
        self.api.links.close();
        if timeout(LINKS_CLOSE, self.api.links.wait()).await.is_err() {
            tracing::warn!(links = self.api.links.len(), "links did not close in time");
        }

        // After the links: an executor whose register meets a closed port exits.
        self.accepting.cancel();
        self.acceptors.close();
        self.acceptors.wait().await;
        // Nobody else comes; who was accepted since the drain began is still owed an answer.
        if timeout(LAST_ANSWERS, self.connections.wait()).await.is_err() {
            tracing::debug!(connections = self.connections.len(), "connections are cut");
        }
        self.background.cancel();
        let audit = self.api.audit.clone();
        let _ = tokio::task::spawn_blocking(move || audit.close()).await;
        if self.api.corridor.store.health().await.is_err() {
            tracing::error!("the store did not confirm its last writes");
        }
        self.ops_accepting.cancel();
        self.ops_acceptors.close();
        self.ops_acceptors.wait().await;
        tracing::info!("stopped");
    }
}

/// Gives another configuration to a running gateway.
#[derive(Clone)]
pub struct Reloading {
    config: Arc<Running>,
    corridor: Arc<Corridor>,
    admin: Live<AdminSettings>,
    listen: Vec<SocketAddr>,
    tls: Live<Option<Tls>>,
    ops_tls: Live<Option<Tls>>,
    places: Arc<[Places; 2]>,
}

/// What a reload came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reloaded {
    /// Knobs that have another value from now on.
    pub changed: Vec<&'static str>,
    /// Knobs that were given another value, and keep the one they have until the gateway is started anew.
    pub kept: Vec<&'static str>,
}

impl Reloading {
    /// Takes over a configuration as it was read anew, and reads again the files that it names. What begins from now on
    /// follows it; connections, links, streams, sessions and calls under way go on as they began. The gateway's key
    /// towards executors is made anew too.
    ///
    /// # Errors
    /// All that is wrong with it, and then everything stays as it was.
    pub fn reload(&self, read: Result<Config, ConfigFaults>) -> Result<Reloaded, ConfigFaults> {
        let reloaded = read.and_then(|config| self.take_over(config));
        let reloads = &self.config.reloads;
        let count = if reloaded.is_ok() { &reloads.done } else { &reloads.refused };
        count.fetch_add(1, Ordering::Relaxed);
        reloaded
    }

    fn take_over(&self, mut config: Config) -> Result<Reloaded, ConfigFaults> {
        let running = self.config.now();
        let others = KNOBS.iter().filter(|knob| !knob.same(&config, &running));
        let (kept, changed): (Vec<_>, Vec<_>) = others.partition(|knob| knob.at_start);
        kept.iter().for_each(|knob| knob.copy(&mut config, &running));

        let mut faults = config.validate();
        let tls = tls("tls.certificate", config.tls.api(), &mut faults);
        let ops_tls = self::tls("tls.ops_certificate", config.tls.ops(), &mut faults);
        let upstream = usable("auth.upstream_url", self.corridor.auth.upstream(&config.auth), &mut faults);
        let identity = usable("link", GatewayIdentity::generate(), &mut faults);
        let (true, Some(upstream), Some(identity)) = (faults.is_empty(), upstream, identity) else {
            return Err(ConfigFaults(faults));
        };

        self.tls.set(tls);
        self.ops_tls.set(ops_tls);
        self.corridor.identity.set(identity);
        self.admin.set(admin_settings(&config, &self.listen));
        let places_max = config.edge.connections_max;
        self.places.iter().for_each(|places| places.resize(running.edge.connections_max, places_max));
        self.config.set(config);
        self.corridor.auth.reconfigure(upstream);
        let names = |knobs: Vec<&crate::config::Knob>| knobs.into_iter().map(|knob| knob.name).collect();
        Ok(Reloaded { changed: names(changed), kept: names(kept) })
    }
}

/// All that is wrong with a configuration and with the files that it names; empty when a gateway can start with them,
/// as far as can be said without starting it.
pub fn faults(config: &Config) -> Vec<Fault> {
    let mut faults = config.validate();
    tls("tls.certificate", config.tls.api(), &mut faults);
    tls("tls.ops_certificate", config.tls.ops(), &mut faults);
    if faults.iter().all(|fault| !fault.place.starts_with("auth.upstream")) {
        usable("auth.upstream_url", auth::check_upstream(&config.auth), &mut faults);
    }
    faults
}

fn tls(knob: &str, files: Option<TlsFiles>, faults: &mut Vec<Fault>) -> Option<Tls> {
    usable(knob, files.map(Tls::new).transpose(), faults).flatten()
}

/// The value, or what is wrong with it among the faults, with all that led to it.
fn usable<T, E: std::error::Error>(knob: &str, made: Result<T, E>, faults: &mut Vec<Fault>) -> Option<T> {
    let note = |error: E| {
        let mut message = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            message += &format!(": {error}");
            cause = error.source();
        }
        faults.push(Fault::new(knob, message));
    };
    made.map_err(note).ok()
}

fn admin_settings(config: &Config, listen: &[SocketAddr]) -> AdminSettings {
    AdminSettings {
        public_url: config.public_url.clone(),
        listen: listen.first().copied().unwrap_or(config.ops_listen),
        revocations_max: config.auth.revocations_max,
        audit: config.audit.clone(),
    }
}

async fn lock(state_dir: &std::path::Path) -> Result<StateLock, StoreError> {
    let until = Instant::now() + LOCK_WAIT;
    loop {
        match StateLock::acquire(state_dir) {
            Err(StoreError::Conflict(_)) if Instant::now() < until => sleep(Duration::from_millis(50)).await,
            result => return result,
        }
    }
}

fn bind(address: SocketAddr) -> Result<TcpListener, StartError> {
    let listen = || {
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        // The port of a gateway that was killed a moment ago is free again.
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(BACKLOG)
    };
    listen().map_err(|source| StartError::Listen { address: address.to_string(), source })
}

fn adopt(held: std::net::TcpListener) -> Result<TcpListener, StartError> {
    let adopted = held.set_nonblocking(true).and_then(|()| TcpListener::from_std(held));
    adopted.map_err(|source| StartError::Listen { address: "the socket given by the service manager".into(), source })
}

/// Executors that were connected to the gateway before this one are on their way back.
async fn remember_executors(store: &Store, registry: &Registry, seen_secs: u64) -> Result<(), StoreError> {
    let now = SystemTime::now();
    for (executor, _) in store.executors(None).await? {
        let ago = executor.last_seen.map(|at| now.duration_since(at).unwrap_or_default());
        if let Some(ago) = ago.filter(|ago| ago.as_secs() <= seen_secs) {
            registry.remember(executor.id, ago);
        }
    }
    Ok(())
}

/// Lets an operator's change take effect before the operator is answered.
fn apply(api: &Api, change: &Change) {
    let revoked = |right| api.metrics.revocations.inc([right]);
    match change {
        Change::TokenRevoked(token) => {
            revoked("token");
            api.corridor.auth.proxy_tokens().forget(token);
        }
        Change::ExecutorDeleted(executor) => {
            revoked("executor");
            api.corridor.registry.forget(executor);
            api.sessions.withdraw(None, Some(executor));
            api.transfers.withdraw(None, Some(executor));
            for workspace in api.workspaces.all() {
                workspace.resolver.invalidate();
                workspace.pool.close_executor(executor);
            }
        }
        Change::Unbound { workspace, executor } => {
            revoked("binding");
            api.sessions.withdraw(Some(workspace), Some(executor));
            api.transfers.withdraw(Some(workspace), Some(executor));
            if let Some(workspace) = api.workspaces.peek(workspace) {
                workspace.resolver.invalidate();
                workspace.pool.close_executor(executor);
            }
            // After the clients above: whatever else runs under the right.
            api.corridor.registry.end_workspace(workspace, Some(executor));
        }
        Change::Bound { workspace } => {
            if let Some(workspace) = api.workspaces.peek(workspace) {
                workspace.resolver.invalidate();
            }
        }
        Change::KeyRotated { purpose, ring } => api.corridor.auth.use_keys(*purpose, ring.clone()),
        Change::Revoked(revocation) => {
            revoked(if let RevocationScope::Workspace(_) = &revocation.scope { "workspace" } else { "turn" });
            api.corridor.auth.cap_tokens().apply(revocation);
            if let RevocationScope::Workspace(id) = &revocation.scope {
                api.sessions.withdraw(Some(id), None);
                api.transfers.withdraw(Some(id), None);
                if let Some(workspace) = api.workspaces.peek(id) {
                    workspace.pool.close_all();
                }
                api.corridor.registry.end_workspace(id, None);
            }
        }
    }
}

async fn sweep(api: Arc<Api>, stop: CancellationToken) {
    let mut ticks = interval(SWEEP_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = stop.cancelled() => return,
        }
        api.workspaces.evict_idle();
        api.sessions.expire().await;
        record_connected(&api).await;
        if let Err(error) = api.corridor.store.forget_revocations(SystemTime::now()).await {
            tracing::warn!(%error, "expired revocations were not forgotten");
        }
    }
}

/// Keeps the output of sessions within its part of the disk.
async fn watch_disk(api: Arc<Api>, stop: CancellationToken) {
    let mut ticks = interval(DISK_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => api.sessions.relieve_disk().await,
            () = stop.cancelled() => return,
        }
    }
}

/// Stores that executors are connected now, for calls that come right after a restart.
async fn record_connected(api: &Api) {
    let now = SystemTime::now();
    let connected: Vec<(ExecutorId, SystemTime)> =
        api.corridor.registry.connected().into_iter().map(|executor| (executor, now)).collect();
    if connected.is_empty() {
        return;
    }
    if let Err(error) = api.corridor.store.touch_executors(connected).await {
        tracing::warn!(%error, "the executors' last contact was not stored");
    }
}

/// Asks the parts without keeping them alive.
fn asking<T: Default>(
    api: &Arc<Api>,
    ask: impl Fn(&Api) -> T + Send + Sync + 'static,
) -> impl Fn() -> T + Send + Sync + 'static {
    let api = Arc::downgrade(api);
    move || api.upgrade().map(|api| ask(&api)).unwrap_or_default()
}

/// What keeps this gateway from its work, beside the store and the drain.
fn troubles(api: &Api) -> Vec<&'static str> {
    let mut troubles = Vec::new();
    if api.corridor.auth.proxy_tokens().is_upstream_down() {
        troubles.push("the validator upstream does not answer, and what was known of tokens is too old");
    }
    if api.audit.refuses() {
        troubles.push("the audit log cannot be written, so calls are refused");
    }
    troubles
}

/// What there is at this moment, for operators who look into a running gateway.
fn overview(api: &Api) -> serde_json::Value {
    let (known, refused) = api.corridor.auth.proxy_tokens().remembered();
    let audit = api.audit.counts();
    let links = api.corridor.registry.overview(OVERVIEW_ENTRIES_MAX).into_iter().map(|link| {
        json!({
            "executor": link.executor,
            "transport": link.transport.name(),
            "connected_at": rfc3339(link.since),
            "silent_ms": link.silence.as_millis() as u64,
            "streams": link.streams,
        })
    });
    let workspaces = api.workspaces.all().into_iter().take(OVERVIEW_ENTRIES_MAX).map(|workspace| {
        json!({
            "workspace": workspace.id(),
            "calls": workspace.calls(),
            "sessions": api.sessions.of(workspace.id()).len(),
        })
    });
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "draining": api.draining.is_cancelled(),
        "links": { "count": api.corridor.registry.len(), "some": links.collect::<Vec<_>>() },
        "workspaces": { "count": api.workspaces.len(), "some": workspaces.collect::<Vec<_>>() },
        "sessions": { "count": api.sessions.len() },
        "sockets": { "executors": api.links.len(), "callers": api.sockets.len() },
        "audit": { "records": audit.records, "bytes": audit.bytes, "missing": audit.missing, "failing": audit.failing },
        "tokens": { "known": known, "refused": refused },
        "memory": { "high": api.memory.is_high(), "held": api.memory.held() },
        "tasks": tokio::runtime::Handle::current().metrics().num_alive_tasks(),
    })
}

/// Sets the metrics that the parts know themselves.
fn read(api: &Api, listeners: &[(&'static str, Arc<Counts>)]) {
    let metrics = &api.metrics;
    metrics.read_process();
    metrics.build_info.of([env!("CARGO_PKG_VERSION")]).set(1);
    metrics.tasks.set(tokio::runtime::Handle::current().metrics().num_alive_tasks() as u64);

    metrics.draining.set(api.draining.is_cancelled().into());

    for (listener, counts) in listeners {
        let count = |count: &AtomicU64| count.load(Ordering::Relaxed);
        metrics.connections.of([listener]).set(count(&counts.open));
        metrics.connections_accepted.of([listener]).set(count(&counts.accepted));
        metrics.accept_failures.of([listener]).set(count(&counts.accept_failures));
        metrics.tls_handshakes_failed.of([listener]).set(count(&counts.tls_failures));
    }

    let workspaces = api.workspaces.all();
    metrics.calls_open.set(workspaces.iter().map(|workspace| workspace.calls() as u64).sum());
    metrics.workspaces.set(workspaces.len() as u64);
    metrics.workspaces_built.set(api.workspaces.built());
    metrics.workspaces_evicted.set(api.workspaces.evicted());
    metrics.transfers.set(api.transfers.len() as u64);

    let links = api.corridor.registry.links();
    metrics.links.count(links.iter().map(|link| ([link.registration().transport.name()], 1)));
    let outboxes: Vec<usize> = links.iter().map(LinkHandle::outbox_frames).collect();
    let inboxes: Vec<usize> = links.iter().flat_map(LinkHandle::inbox_frames).collect();
    let sum_and_max =
        |frames: &[usize]| (frames.iter().sum::<usize>() as u64, frames.iter().max().map_or(0, |max| *max as u64));
    let ((outbox, outbox_max), (inbox, inbox_max)) = (sum_and_max(&outboxes), sum_and_max(&inboxes));
    metrics.link_outbox_frames.set(outbox);
    metrics.link_outbox_frames_max.set(outbox_max);
    metrics.stream_inbox_frames.set(inbox);
    metrics.stream_inbox_frames_max.set(inbox_max);

    let sessions = api.sessions.all();
    metrics.sessions.count(sessions.iter().map(|session| ([session.status().state.as_str()], 1)));
    let journals = sessions.iter().map(|session| session.journal());
    metrics.session_journal.count(
        journals.flat_map(|journal| [(["memory"], journal.memory_bytes() as u64), (["disk"], journal.disk_bytes())]),
    );

    let tokens = api.corridor.auth.counters().snapshot();
    metrics.token_hits.set(tokens.hits);
    metrics.token_negative_hits.set(tokens.negative_hits);
    metrics.token_misses.set(tokens.misses);
    metrics.token_stale.set(tokens.stale);
    let (good, refused) = api.corridor.auth.proxy_tokens().remembered();
    metrics.token_entries.count([(["good"], good as u64), (["refused"], refused as u64)]);
    metrics.token_evictions.count([(["good"], tokens.positive_evictions), (["refused"], tokens.negative_evictions)]);
    metrics.upstream_requests.set(tokens.upstream_requests);
    metrics.upstream_failures.set(tokens.upstream_failures);

    metrics.body_memory.set(api.memory.held());
    let reloads = &api.config.reloads;
    metrics.reloads.of(["done"]).set(reloads.done.load(Ordering::Relaxed));
    metrics.reloads.of(["refused"]).set(reloads.refused.load(Ordering::Relaxed));

    let audit = api.audit.counts();
    metrics.audit_records.set(audit.records);
    metrics.audit_missing.set(audit.missing);
    metrics.audit_refused.set(audit.refused);
    metrics.audit.set(audit.bytes);
    metrics.audit_waiting.set(audit.waiting as u64);
    metrics.audit_failing.set(audit.failing.into());

    let store = api.corridor.store.counts();
    metrics.store_waiting.set(store.waiting);
    metrics.store_questions.set(store.questions);
    metrics.store_failures.set(store.failures);
    metrics.store_wait.set(store.wait_micros);
    metrics.store_work.set(store.work_micros);
}
