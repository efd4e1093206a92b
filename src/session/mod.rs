//! Process sessions: processes that callers start, come back to, write to and end (connectors-api.md §5, §2.2).
//!
//! [`Sessions`] is the table of all of them. Each [`Session`] has one task (`process`) that owns its conversation with
//! the executor and its journal; callers read the journal and give orders. Sessions outlive links, callers and the
//! gateway process itself.

mod place;
mod process;
mod quota;
mod stdin;
pub mod view;

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use dashmap::DashMap;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::sync::watch;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use crate::audit::Audit;
use crate::auth::Auth;
use crate::config::{self, Live};
use crate::journal::{Append, Full, Journal, JournalError, JournalReader, Limits};
use crate::ops::metrics::Metrics;
use crate::protocol::ids::{ExecutorId, SessionId, WorkspaceId};
use crate::protocol::rpc::{ProcessSignal, Signal};
use crate::relay::client::{CallError, Client};
use crate::relay::process_tree::end_tree;
use crate::store::{Binding, Reserved, SessionRow, SessionState, Store, StoreError};
use crate::workspace::cache::Workspaces;
use crate::workspace::{Corridor, Workspace};

use self::place::Places;
use self::quota::{Relief, Usage};

pub use place::Place;
pub use stdin::{StdinError, WriteOrder, Written};

/// Numbers of output start where the original's do.
const FIRST_SEQ: u64 = 1;

/// How long an executor may take to kill the processes of a workspace that lost its right to it.
const WITHDRAW_WAIT: Duration = Duration::from_secs(5);

/// Bytes of one record of output that is kept after the end: what executors send at once, so that pages are as small.
const KEPT_RECORD_BYTES: usize = 8 * 1024;

/// Output that all sessions together may always keep: with none nothing could be read on a disk that others have filled.
const TOTAL_BYTES_MIN: u64 = 64 * 1024 * 1024;

/// What a caller asked for, as stored with the session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartRequest {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Working directory at the executor, as its URI; `None` is the executor's own.
    pub cwd: Option<String>,
    /// Variables over the executor's environment.
    pub env: BTreeMap<String, String>,
    /// Whether the process gets a terminal.
    pub tty: bool,
    /// What stdin is.
    pub stdin: StdinMode,
    /// Time after which the process is ended, in milliseconds from its start.
    pub timeout_ms: Option<u64>,
    /// The caller's own name for it.
    pub label: Option<String>,
}

/// What the stdin of a process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum StdinMode {
    /// Takes writes and can be ended.
    Stream,
    /// Takes writes, without an end.
    Open,
    /// Empty.
    None,
}

/// Why a session is not there or cannot be started.
#[derive(Debug, Clone, thiserror::Error)]
pub enum SessionError {
    /// The workspace has no session of that id.
    #[error("no such session: {0}")]
    Unknown(String),
    /// The workspace has as many sessions as it may.
    #[error("the workspace has {0} sessions already")]
    TooMany(usize),
    /// The workspace has as many live streams open as it may.
    #[error("the workspace has {0} live streams open already")]
    TooManyStreams(usize),
    /// The start key was used for something else.
    #[error("the idempotency key was used for another request")]
    KeyConflict,
    /// The store does not answer.
    #[error("the session could not be stored")]
    Store(#[source] Arc<StoreError>),
    /// The session's directory cannot be used.
    #[error("the session's output cannot be stored")]
    Disk(#[source] Arc<JournalError>),
    /// The session's output cannot be read.
    #[error("the output could not be read")]
    Unreadable(#[source] Arc<JournalError>),
    /// The executor refused to start the process; nothing ran.
    #[error("{0}")]
    NotStarted(String),
    /// Whether the process was started cannot be told.
    #[error("the executor was lost before it said whether it had started the process")]
    StartUnknown,
    /// The start is still under way.
    #[error("the executor has not answered the start yet")]
    StartPending,
}

impl From<StoreError> for SessionError {
    fn from(error: StoreError) -> Self {
        Self::Store(error.into())
    }
}

impl From<JournalError> for SessionError {
    fn from(error: JournalError) -> Self {
        Self::Disk(error.into())
    }
}

/// What callers see of a session's life.
#[derive(Debug, Clone, PartialEq)]
pub struct Status {
    /// How far it is.
    pub state: SessionState,
    /// The exit code, once all output is in.
    pub exit_code: Option<i32>,
    /// What is known about an end without exit code.
    pub detail: Option<String>,
    /// When it ended.
    pub ended_at: Option<SystemTime>,
    /// Newest number of the journal.
    pub newest: u64,
    /// Bytes of stdin accepted by the executor.
    pub stdin_accepted: u64,
    /// Whether the end of stdin was asked for.
    pub stdin_eof: bool,
}

impl Status {
    fn of(row: &SessionRow, newest: u64) -> Self {
        Self {
            state: row.state,
            exit_code: row.exit_code,
            detail: row.detail.clone(),
            ended_at: row.ended_at,
            newest,
            stdin_accepted: row.stdin_accepted,
            stdin_eof: row.stdin_eof,
        }
    }
}

/// One process session.
pub struct Session {
    /// Its id.
    pub id: SessionId,
    /// Whose it is.
    pub workspace: WorkspaceId,
    /// The workspace's name for the executor.
    pub environment: String,
    /// What was asked for.
    pub request: StartRequest,
    /// When it was asked for.
    pub created_at: SystemTime,
    journal: JournalReader,
    row: Mutex<SessionRow>,
    status: watch::Sender<Status>,
    /// The conversation with the executor while there is one.
    client: watch::Sender<Option<Client>>,
    /// One writer at a time; each brings its bytes behind those of the one before.
    writing: tokio::sync::Mutex<()>,
    used: Mutex<Instant>,
    /// Its workspace's place for it, until it is forgotten.
    place: Mutex<Option<Place>>,
    /// Its right to the executor was taken away: nothing more is written to the process.
    withdrawn: CancellationToken,
    /// The session is forgotten: its task lets go.
    forgotten: CancellationToken,
    /// Its task has ended, or it never had one.
    task_ended: CancellationToken,
    /// Bytes that the journal may take on disk; lowered when the disk is wanted for others.
    spill_bytes: AtomicU64,
}

/// A process that is over, with all that is known of it.
#[derive(Debug)]
pub struct Over {
    /// What it wrote, by stream: 0 is stdout, 1 stderr.
    pub output: Vec<(u8, Bytes)>,
    /// Bytes that it wrote besides.
    pub lost_bytes: u64,
    /// Its exit code.
    pub exit_code: Option<i32>,
    /// What is known about an end without exit code.
    pub detail: Option<String>,
}

impl Over {
    fn write(&self, path: &Path, limits: Limits) -> Result<Journal, JournalError> {
        let mut journal = new_journal(path, limits)?;
        for (tag, bytes) in &self.output {
            for bytes in bytes.chunks(process::WRITE_BYTES) {
                let records = bytes.chunks(KEPT_RECORD_BYTES).map(|bytes| Append { tag: *tag, mark: 0, bytes });
                journal.append(&records.collect::<Vec<_>>())?;
            }
        }
        if self.lost_bytes > 0 {
            journal.append_gap(0, Some(self.lost_bytes), 1, 0)?;
        }
        if let Err(error) = journal.sync() {
            tracing::warn!(%error, "output was not synced to the disk");
        }
        Ok(journal)
    }
}

/// How a process is asked to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub enum EndSignal {
    /// Interrupt.
    #[serde(rename = "INT")]
    Interrupt,
    /// Interrupt, then kill after a grace.
    #[serde(rename = "TERM")]
    Terminate,
    /// Kill at once.
    #[serde(rename = "KILL")]
    Kill,
}

impl Session {
    /// Its output.
    pub fn journal(&self) -> &JournalReader {
        &self.journal
    }

    /// The executor on which its process runs.
    pub fn executor(&self) -> ExecutorId {
        self.lock_row().executor.clone()
    }

    /// Its life so far.
    pub fn status(&self) -> Status {
        self.status.borrow().clone()
    }

    /// Follows its life; each journal entry is a change.
    pub fn watch(&self) -> watch::Receiver<Status> {
        self.status.subscribe()
    }

    /// Counts as use, so that the session is kept.
    pub fn touch(&self) {
        *self.used.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// Waits until the session is forgotten; from then on its output is no longer there.
    pub async fn forgotten(&self) {
        self.forgotten.cancelled().await;
    }

    fn idle(&self) -> Duration {
        self.used.lock().unwrap_or_else(PoisonError::into_inner).elapsed()
    }

    /// Writes to the process's stdin; what was accepted stays accepted, as [`Status::stdin_accepted`] tells. Dropping the
    /// future begins no further write to the executor.
    ///
    /// # Errors
    /// [`StdinError`]; `Full` when the process did not read in time.
    pub async fn write(&self, store: &Store, order: WriteOrder, wait: Duration) -> Result<Written, StdinError> {
        self.touch();
        let until = Instant::now() + wait;
        let full = || StdinError::Full { accepted: self.row().stdin_accepted };
        let _turn = timeout_at(until, self.writing.lock()).await.map_err(|_| full())?;
        if self.status().state.is_final() || self.withdrawn.is_cancelled() {
            return Err(StdinError::Closed);
        }
        let written = stdin::write(self, store, order, until).await;
        self.publish(self.status().newest);
        written
    }

    /// Asks the process to end, over as many conversations as that takes; returns when the executor was asked or the
    /// session is over. A session that is over already needs nothing.
    pub async fn end(&self, signal: EndSignal, grace: Duration) {
        self.touch();
        if self.writing.try_lock().is_err()
            && let Some(client) = self.client.borrow().as_ref()
        {
            // A write that the process does not read may hold up the request that ends it (codex-exec-server.md §7.3):
            // the next conversation starts without it.
            client.close();
        }
        let mut clients = self.client.subscribe();
        while let Some(client) = self.conversation(&mut clients).await {
            match self.ask_to_end(&client, signal, grace).await {
                Err(CallError::Lost { .. } | CallError::NoAnswer) => {
                    client.close();
                    client.ended().await;
                    let _ = clients.changed().await;
                }
                _ => return,
            }
        }
    }

    async fn ask_to_end(&self, client: &Client, signal: EndSignal, grace: Duration) -> Result<(), CallError> {
        let process = self.row().process;
        if signal != EndSignal::Kill {
            client.call(&ProcessSignal { process_id: process.clone(), signal: Signal::Interrupt }).await?;
            if signal == EndSignal::Interrupt {
                return Ok(());
            }
            self.over(grace).await;
        }
        // Also when the process itself is over: what it left behind goes with it.
        end_tree(client, &process).await
    }

    /// The conversation, waited for while there is none; `None` when the session is over.
    async fn conversation(&self, clients: &mut watch::Receiver<Option<Client>>) -> Option<Client> {
        let mut status = self.watch();
        loop {
            let client = clients.borrow_and_update().clone().filter(|client| !client.is_ended());
            if client.is_some() {
                return client;
            }
            if status.borrow_and_update().state.is_final() {
                return None;
            }
            tokio::select! {
                changed = clients.changed() => changed.ok()?,
                changed = status.changed() => changed.ok()?,
            }
        }
    }

    fn row(&self) -> SessionRow {
        self.lock_row().clone()
    }

    fn change(&self, change: impl FnOnce(&mut SessionRow)) {
        change(&mut self.lock_row());
    }

    fn lock_row(&self) -> MutexGuard<'_, SessionRow> {
        self.row.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn publish(&self, newest: u64) {
        // A process that prints is in use, and one that ended is kept from then on for those who come to read.
        self.touch();
        // Not a copy of the row: this runs for every batch of output, and the row holds the whole request.
        let status = Status::of(&self.lock_row(), newest);
        self.status.send_replace(status);
    }

    /// Whether stdin goes through the stub that can end it. A terminal has its own way to end input.
    fn stdin_needs_stub(&self) -> bool {
        self.request.stdin == StdinMode::Stream && !self.request.tty
    }

    /// Waits until the session is over, or for `wait`.
    pub async fn over(&self, wait: Duration) -> Status {
        let mut status = self.watch();
        let _ = tokio::time::timeout(wait, status.wait_for(|status| status.state.is_final())).await;
        self.status()
    }
}

/// A start until it is in the table or refused; `None` before.
type Entering = watch::Receiver<Option<Result<Arc<Session>, SessionError>>>;

/// The starts under way that have a key, with the digest of what is asked for.
type Starts = HashMap<(WorkspaceId, String), ([u8; 32], Entering)>;

/// Takes a start out of those under way when it is in the table or refused, also by a panic.
struct Landing {
    sessions: Arc<Sessions>,
    key: Option<(WorkspaceId, String)>,
}

impl Drop for Landing {
    fn drop(&mut self) {
        if let Some(key) = &self.key {
            self.sessions.lock_starts().remove(key);
        }
    }
}

/// A journal for a process that is about to start; in memory where the disk refuses one, since that must not stop the
/// process.
fn new_journal(path: &Path, limits: Limits) -> Result<Journal, JournalError> {
    match Journal::create(path, FIRST_SEQ, limits) {
        Err(JournalError::Disk(error)) => {
            tracing::error!(%error, "output is kept in memory only: the disk failed");
            Ok(Journal::in_memory(FIRST_SEQ, limits))
        }
        created => created,
    }
}

/// The row of a session that is about to begin.
fn new_row(binding: &Binding, key: Option<String>, request: &StartRequest) -> Result<SessionRow, SessionError> {
    let text = serde_json::to_string(request).map_err(|error| JournalError::Disk(error.into()))?;
    let digest =
        Sha256::new().chain_update(binding.executor().as_str()).chain_update([0]).chain_update(&text).finalize();
    Ok(SessionRow {
        id: SessionId::new(&Uuid::new_v4().to_string()).expect("a UUID is a path id"),
        process: format!("ps_{}", Uuid::new_v4().simple()),
        workspace: binding.workspace().clone(),
        executor: binding.executor().clone(),
        environment: binding.name().clone(),
        start_key: key,
        request_digest: digest.into(),
        request: text,
        executor_session: None,
        state: SessionState::Starting,
        exit_code: None,
        exit_seq: None,
        detail: None,
        created_at: SystemTime::now(),
        ended_at: None,
        stdin_accepted: 0,
        stdin_eof: false,
        pending_write: None,
    })
}

/// Work on the disk, beside the runtime.
async fn on_disk<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, JournalError> + Send + 'static,
) -> Result<T, JournalError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(JournalError::Disk(std::io::Error::other(error))))
}

/// What the sessions of a gateway share.
pub struct Sessions {
    settings: Live<config::Sessions>,
    tools: Live<config::Tools>,
    directory: PathBuf,
    store: Store,
    auth: Auth,
    workspaces: Arc<Workspaces>,
    metrics: Arc<Metrics>,
    audit: Audit,
    entries: DashMap<SessionId, Arc<Session>>,
    /// Bounded by the calls that may be under way, and gone with their reservation.
    starts: Mutex<Starts>,
    /// Places for sessions.
    session_places: Places,
    /// Places for live streams of their output.
    stream_places: Places,
    /// One process task per session that is not over.
    pub tasks: TaskTracker,
    /// Cancelled when the gateway stops: tasks let go of their processes, which live on at the executor.
    pub stop: CancellationToken,
}

impl Sessions {
    /// The table, with the sessions that an earlier gateway process left in the store.
    ///
    /// # Errors
    /// [`StoreError`] when the store does not answer.
    pub async fn restore(
        settings: Live<config::Sessions>,
        tools: Live<config::Tools>,
        corridor: &Corridor,
        workspaces: Arc<Workspaces>,
        metrics: Arc<Metrics>,
        audit: Audit,
    ) -> Result<Arc<Self>, StoreError> {
        let Corridor { state_dir, store, auth, .. } = corridor;
        let rows = store.sessions().await?;
        let sessions = Arc::new(Self {
            settings,
            tools,
            directory: state_dir.join("sessions"),
            store: store.clone(),
            auth: auth.clone(),
            workspaces,
            metrics,
            audit,
            entries: DashMap::new(),
            starts: Mutex::default(),
            session_places: Places::default(),
            stream_places: Places::default(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        });
        sessions.remove_unknown(&rows).await;
        for row in rows {
            let id = row.id.clone();
            if let Err(error) = sessions.take_up(row).await {
                tracing::error!(session = %id, %error, "a session could not be taken up");
            }
        }
        Ok(sessions)
    }

    /// Removes the output of sessions that were forgotten while the gateway process ended.
    async fn remove_unknown(&self, rows: &[SessionRow]) {
        let known: HashSet<OsString> = rows.iter().map(|row| row.id.as_str().into()).collect();
        let directory = self.directory.clone();
        let removing = tokio::task::spawn_blocking(move || {
            // No directory yet: there is nothing to remove.
            let Ok(entries) = std::fs::read_dir(directory) else { return };
            for entry in entries.flatten().filter(|entry| !known.contains(&entry.file_name())) {
                if let Err(error) = Journal::remove(&entry.path()) {
                    tracing::warn!(%error, "the output of a forgotten session was not removed");
                }
            }
        });
        if let Err(error) = removing.await {
            tracing::warn!(%error, "the output of forgotten sessions was not looked for");
        }
    }

    async fn take_up(self: &Arc<Self>, row: SessionRow) -> Result<(), SessionError> {
        let request: StartRequest =
            serde_json::from_str(&row.request).map_err(|error| JournalError::Disk(error.into()))?;
        let (path, limits) = (self.directory_of(&row.id), self.limits());
        let (over, tty) = (row.state.is_final(), request.tty);
        let journal = on_disk(move || match Journal::open(&path, limits) {
            // Reserved, and the gateway was gone before there was output; or its output was kept in memory only.
            Err(JournalError::Missing) => {
                Journal::remove(&path)?;
                let mut journal = new_journal(&path, limits)?;
                if over {
                    process::name_as_lost(&mut journal, tty)?;
                }
                Ok(journal)
            }
            journal => journal,
        });
        let journal = journal.await?;
        // The bound may have been lowered since it was started.
        let Some(place) = self.session_places.take(&row.workspace, usize::MAX) else { return Ok(()) };
        self.enter(row, request, journal, place, None);
        Ok(())
    }

    fn limits(&self) -> Limits {
        let settings = self.settings.now();
        Limits {
            memory_bytes_max: settings.memory_bytes_max,
            spill_bytes_max: settings.spill_bytes_max,
            full: Full::DropOldest,
        }
    }

    fn directory_of(&self, id: &SessionId) -> PathBuf {
        self.directory.join(id.as_str())
    }

    fn enter(
        self: &Arc<Self>,
        row: SessionRow,
        request: StartRequest,
        journal: Journal,
        place: Place,
        binding: Option<Binding>,
    ) -> Arc<Session> {
        let session = Arc::new(Session {
            id: row.id.clone(),
            workspace: row.workspace.clone(),
            environment: row.environment.to_string(),
            request,
            created_at: row.created_at,
            status: watch::Sender::new(Status::of(&row, journal.reader().published())),
            client: watch::Sender::new(None),
            writing: tokio::sync::Mutex::new(()),
            journal: journal.reader().clone(),
            row: Mutex::new(row),
            used: Mutex::new(Instant::now()),
            place: Mutex::new(Some(place)),
            withdrawn: CancellationToken::new(),
            forgotten: CancellationToken::new(),
            task_ended: CancellationToken::new(),
            spill_bytes: AtomicU64::new(u64::MAX),
        });
        self.entries.insert(session.id.clone(), session.clone());
        if session.status().state.is_final() {
            session.task_ended.cancel();
        } else {
            self.tasks.spawn(process::run(self.clone(), session.clone(), journal, binding));
        }
        session
    }

    /// Starts a process, or finds the session that the workspace started under the same key, and waits until the
    /// executor has answered. Dropping the future does not undo the start.
    ///
    /// # Errors
    /// [`SessionError`].
    pub async fn start(
        self: &Arc<Self>,
        binding: &Binding,
        request: StartRequest,
        key: Option<String>,
        wait: Duration,
    ) -> Result<Arc<Session>, SessionError> {
        let row = new_row(binding, key, &request)?;
        let mut entering = self.entering(row, request, binding)?;
        let session = match entering.wait_for(Option::is_some).await {
            Ok(entered) => entered.clone().expect("waited until there is one")?,
            Err(_) => return Err(SessionError::StartUnknown),
        };
        self.started(session, wait).await
    }

    /// Keeps what a process wrote that is over already, as a session like any other. Goes on when the future is dropped.
    ///
    /// # Errors
    /// [`SessionError::TooMany`], `Store` and `Disk`.
    pub async fn keep(
        self: &Arc<Self>,
        binding: &Binding,
        request: StartRequest,
        over: Over,
    ) -> Result<Arc<Session>, SessionError> {
        let places_max = self.settings.now().workspace_max;
        let place = self.session_places.take(binding.workspace(), places_max);
        let place = place.ok_or(SessionError::TooMany(places_max))?;
        let mut row = new_row(binding, None, &request)?;
        row.state = SessionState::Exited;
        row.exit_code = over.exit_code;
        row.detail.clone_from(&over.detail);
        row.ended_at = Some(row.created_at);
        let sessions = self.clone();
        let keeping = tokio::spawn(async move {
            let (path, limits) = (sessions.directory_of(&row.id), sessions.limits());
            // Its row comes last: a directory without one is removed at the next start.
            let journal = on_disk(move || over.write(&path, limits)).await?;
            sessions.store.reserve_session(row.clone()).await?;
            Ok(sessions.enter(row, request, journal, place, None))
        });
        let kept = keeping.await;
        kept.unwrap_or_else(|error| Err(JournalError::Disk(std::io::Error::other(error)).into()))
    }

    /// Begins a start, or joins the one that is under way under the same key: who joins gets the session itself, whatever
    /// becomes of it. The task goes on when the caller leaves: from the reservation on, the start is carried through.
    fn entering(
        self: &Arc<Self>,
        row: SessionRow,
        request: StartRequest,
        binding: &Binding,
    ) -> Result<Entering, SessionError> {
        let (result, entering) = watch::channel(None);
        let key = row.start_key.clone().map(|key| (row.workspace.clone(), key));
        if let Some(key) = &key {
            match self.lock_starts().entry(key.clone()) {
                Entry::Occupied(start) if start.get().0 == row.request_digest => return Ok(start.get().1.clone()),
                Entry::Occupied(_) => return Err(SessionError::KeyConflict),
                Entry::Vacant(place) => _ = place.insert((row.request_digest, entering.clone())),
            }
        }
        let landing = Landing { sessions: self.clone(), key };
        let binding = binding.clone();
        tokio::spawn(async move {
            let entered = landing.sessions.find_or_enter(row, request, binding).await;
            drop(landing);
            result.send_replace(Some(entered));
        });
        Ok(entering)
    }

    /// The session that was started under the key before, else a new one.
    async fn find_or_enter(
        self: &Arc<Self>,
        row: SessionRow,
        request: StartRequest,
        binding: Binding,
    ) -> Result<Arc<Session>, SessionError> {
        let known = match self.reserve(&row).await? {
            Some(known) if self.entries.contains_key(&known.id) => Some(known),
            // Forgotten at this moment: its row went before its entry, and the key is free.
            Some(_) => self.reserve(&row).await?,
            None => None,
        };
        if let Some(known) = known {
            let session = self.entries.get(&known.id).map(|entry| entry.clone());
            return session.ok_or_else(|| SessionError::Unknown(known.id.to_string()));
        }
        // After the reservation: a start that is found takes no place.
        let places_max = self.settings.now().workspace_max;
        let place = self.session_places.take(&row.workspace, places_max);
        let created = async {
            let place = place.ok_or(SessionError::TooMany(places_max))?;
            let (path, limits) = (self.directory_of(&row.id), self.limits());
            Ok((place, on_disk(move || new_journal(&path, limits)).await?))
        };
        match created.await {
            Ok((place, journal)) => {
                self.metrics.sessions_started.inc();
                Ok(self.enter(row, request, journal, place, Some(binding)))
            }
            Err(error) => {
                self.store.forget_session(&row.id).await?;
                Err(error)
            }
        }
    }

    /// Reserves the row, or gives the one that has its key.
    async fn reserve(&self, row: &SessionRow) -> Result<Option<SessionRow>, SessionError> {
        match self.store.reserve_session(row.clone()).await? {
            Reserved::New => Ok(None),
            Reserved::Known(known) if known.request_digest == row.request_digest => Ok(Some(*known)),
            Reserved::Known(_) => Err(SessionError::KeyConflict),
        }
    }

    fn lock_starts(&self) -> MutexGuard<'_, Starts> {
        self.starts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn started(&self, session: Arc<Session>, wait: Duration) -> Result<Arc<Session>, SessionError> {
        let mut status = session.watch();
        let answered = tokio::time::timeout(wait, status.wait_for(|status| status.state != SessionState::Starting));
        let status = match answered.await {
            Ok(Ok(status)) => status.clone(),
            Ok(Err(_)) | Err(_) => return Err(SessionError::StartPending),
        };
        match status.state {
            SessionState::Failed => {
                // Nothing ran and nothing is left to read: the key and the place are free for another try.
                self.forget(&session).await?;
                Err(SessionError::NotStarted(status.detail.unwrap_or_else(|| "the process was not started".into())))
            }
            SessionState::Unknown => Err(SessionError::StartUnknown),
            _ => Ok(session),
        }
    }

    /// The session of that id, if it is the workspace's own. A foreign one answers as an unknown one.
    ///
    /// # Errors
    /// [`SessionError::Unknown`].
    pub fn get(&self, workspace: &WorkspaceId, id: &str) -> Result<Arc<Session>, SessionError> {
        let unknown = || SessionError::Unknown(id.to_owned());
        let key = SessionId::new(id).map_err(|_| unknown())?;
        let session = self.entries.get(&key).map(|entry| entry.clone()).ok_or_else(unknown)?;
        if session.workspace == *workspace { Ok(session) } else { Err(unknown()) }
    }

    /// Takes one of the workspace's places for streams that follow a session live.
    ///
    /// # Errors
    /// [`SessionError::TooManyStreams`] when all are taken; nothing waits.
    pub fn open_stream(&self, workspace: &WorkspaceId) -> Result<Place, SessionError> {
        let places_max = self.settings.now().streams_max;
        self.stream_places.take(workspace, places_max).ok_or(SessionError::TooManyStreams(places_max))
    }

    /// The workspace's sessions, oldest first.
    pub fn of(&self, workspace: &WorkspaceId) -> Vec<Arc<Session>> {
        let mut sessions: Vec<_> =
            self.entries.iter().filter(|entry| entry.workspace == *workspace).map(|entry| entry.clone()).collect();
        sessions.sort_by_key(|session| session.created_at);
        sessions
    }

    /// Every session at this moment.
    pub fn all(&self) -> Vec<Arc<Session>> {
        self.entries.iter().map(|entry| entry.clone()).collect()
    }

    /// Bounds and times of sessions.
    pub fn settings(&self) -> Arc<config::Sessions> {
        self.settings.now()
    }

    /// Sessions in the table.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is no session.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Ends a session's process and forgets the session with its output. Waits at most `wait_max_secs` for the executor;
    /// one that is away ends the process by itself, since nobody resumes the session any more.
    ///
    /// # Errors
    /// [`SessionError::Store`]; the session is still there then.
    pub async fn forget(&self, session: &Arc<Session>) -> Result<(), SessionError> {
        if !session.status().state.is_final() {
            let wait = Duration::from_secs(self.settings.now().wait_max_secs);
            let ending = async {
                session.end(EndSignal::Kill, Duration::ZERO).await;
                session.over(wait).await;
            };
            let _ = timeout(wait, ending).await;
        }
        self.store.forget_session(&session.id).await?;
        self.entries.remove(&session.id);
        drop(session.place.lock().unwrap_or_else(PoisonError::into_inner).take());
        // Before the files go: a reader must not take them for lost.
        session.forgotten.cancel();
        session.task_ended.cancelled().await;
        let path = self.directory_of(&session.id);
        let removed = tokio::task::spawn_blocking(move || Journal::remove(&path)).await;
        if let Ok(Err(error)) = removed {
            tracing::warn!(session = %session.id, %error, "the output of a forgotten session was not removed");
        }
        Ok(())
    }

    /// Ends the sessions of a workspace, or of all, on an executor, or on all, that may no longer be reached: at once
    /// nothing more is written to their processes, which are then killed where the executor still answers.
    pub fn withdraw(&self, workspace: Option<&WorkspaceId>, executor: Option<&ExecutorId>) {
        for session in &self.entries {
            let concerned = executor.is_none_or(|of| session.row().executor == *of)
                && workspace.is_none_or(|of| session.workspace == *of);
            if !concerned || session.status().state.is_final() {
                continue;
            }
            session.withdrawn.cancel();
            session.change(|row| row.detail = Some(process::WITHDRAWN.into()));
            let session = session.clone();
            self.tasks.spawn(async move {
                let _ = timeout(WITHDRAW_WAIT, session.end(EndSignal::Kill, Duration::ZERO)).await;
                session.over(WITHDRAW_WAIT).await;
                // Its task looks the right up again, and finds that it is gone.
                if let Some(client) = session.client.borrow().as_ref() {
                    client.close();
                }
            });
        }
    }

    /// Forgets what was not used for too long; a running process is ended first.
    pub async fn expire(&self) {
        let settings = self.settings.now();
        let expired = self.all().into_iter().filter(|session| {
            let bound = if session.status().state.is_final() { settings.idle_secs } else { settings.running_idle_secs };
            session.idle() >= Duration::from_secs(bound)
        });
        // At once: one executor that does not answer keeps no other session.
        let forgotten = expired.map(async |session| {
            if let Err(error) = self.forget(&session).await {
                tracing::warn!(session = %session.id, %error, "an expired session was not forgotten");
            }
        });
        futures_util::future::join_all(forgotten).await;
    }

    /// Frees disk space where output takes more than it may: forgets the oldest finished sessions, then has running ones
    /// drop their oldest output.
    pub async fn relieve_disk(&self) {
        let usages: Vec<Usage> = self
            .entries
            .iter()
            .map(|session| Usage {
                session: session.id.clone(),
                workspace: session.workspace.clone(),
                bytes: session.journal.disk_bytes(),
                ended: session.status().ended_at,
            })
            .collect();
        let taken: u64 = usages.iter().map(|usage| usage.bytes).sum();
        let settings = self.settings.now();
        let total_max = settings.total_spill_bytes_max.min(self.disk_share(taken)).max(TOTAL_BYTES_MIN);
        for relief in quota::relieve(&usages, settings.workspace_spill_bytes_max, total_max) {
            match relief {
                Relief::Forget(id) => {
                    let Some(session) = self.entries.get(&id).map(|entry| entry.clone()) else { continue };
                    tracing::info!(session = %id, "a finished session gave way to newer output");
                    let lost = session.journal.totals().iter().map(|stream| stream.bytes - stream.lost_bytes).sum();
                    self.metrics.session_lost.of(["shared"]).add(lost);
                    self.metrics.sessions_given_way.inc();
                    if let Err(error) = self.forget(&session).await {
                        tracing::warn!(session = %id, %error, "a finished session could not give way");
                    }
                }
                Relief::Shrink(id, bytes) => {
                    if let Some(session) = self.entries.get(&id) {
                        session.spill_bytes.store(bytes, Ordering::Relaxed);
                    }
                }
            }
        }
    }

    /// Bytes that output may take of the disk it is on, where it takes `taken` now.
    fn disk_share(&self, taken: u64) -> u64 {
        let Some(parent) = self.directory.parent() else { return u64::MAX };
        let Ok(disk) = rustix::fs::statvfs(parent) else { return u64::MAX };
        let [free, size] = [disk.f_bavail, disk.f_blocks].map(|blocks| blocks.saturating_mul(disk.f_frsize));
        quota::disk_share(taken, free, size, self.settings.now().disk_free_percent)
    }

    /// The workspace of a session that no caller is asking for right now, under a right of its own.
    fn workspace(&self, id: &WorkspaceId) -> Option<Arc<Workspace>> {
        let token = self.auth.cap_tokens().for_workspace(id).ok()?;
        let principal = self.auth.cap_tokens().verify(token.expose()).ok()?;
        Some(self.workspaces.get(&principal))
    }
}
