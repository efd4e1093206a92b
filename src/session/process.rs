//! The task of one session: it owns the conversation with the executor and the journal, from the start of the process
//! to the last byte of its output.
//!
//! ```text
//! attach ─► start, or catch up ─► live: output → journal ─► over
//!   ▲                                  │ link lost
//!   └──────────────────────────────────┘
//! ```
//!
//! The executor numbers what a process does; the journal keeps that number as `mark` beside its own, so that after any
//! loss the task knows what it has and asks for the rest. Writing to the process and ending it are not done here:
//! they use the conversation that this task publishes.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout_at};
use tokio_util::sync::CancellationToken;

use super::{EndSignal, Session, Sessions, StdinMode};
use crate::audit::{self, Act};
use crate::config::Secret;
use crate::journal::{Append, Journal, JournalError};
use crate::protocol::path::FileUri;
use crate::protocol::rpc::{EnvPolicy, EnvironmentInfo, ExecutorSessionId, OutputStream, ProcessStart};
use crate::relay::client::{CallError, Client, ConnectError, ProcessEvent};
use crate::relay::process_events::{Happened, ProcessEvents};
use crate::relay::process_tree::MARK;
use crate::relay::stream::StreamKind;
use crate::store::{Binding, SessionState, StoreError};
use crate::workspace::ReachError;

/// Pause between two tries to reach an executor that is not back yet, or still holds the former stream.
const RETRY_PAUSE: Duration = Duration::from_millis(100);
const RETRY_PAUSE_MAX: Duration = Duration::from_secs(2);

/// Interval in which the journal is synced to the disk while output comes.
const SYNC_EVERY: Duration = Duration::from_secs(1);

/// Events journalled together.
const BATCH_EVENTS: usize = 128;

/// Bytes of one write to the journal: small enough for the smallest quota, and for the memory tail to share its buffer.
pub(super) const WRITE_BYTES: usize = 128 * 1024;

/// How long, and by how many events, live events may stand before one that has not come yet: then it is looked for in
/// the executor's ring.
const HOLE_WAIT: Duration = Duration::from_millis(100);
const HOLE_EVENTS: usize = 512;

/// Live events kept while the executor's ring is read; each carries at most 8 KiB.
const EARLY_EVENTS_MAX: usize = 8192;

/// Runs the program with a FIFO as its stdin, filled from base64 lines until a line with a single dot: executors
/// cannot close the stdin of a process (profiles-and-sandbox.md §1.1). Ends with the program's exit code.
const STDIN_STUB: &str = r#"dir=$(mktemp -d "${TMPDIR:-/tmp}/exec-gateway.XXXXXX") && mkfifo "$dir/stdin" || exit 126
exec 3<&0
{
  exec 4>"$dir/stdin"
  rm -rf "$dir"
  while IFS= read -r line && [ "$line" != . ]; do printf '%s\n' "$line" | base64 -d >&4 2>/dev/null || break; done
} <&3 >/dev/null 2>&1 &
feeder=$!
"$@" <"$dir/stdin" 3<&-
code=$?
kill "$feeder" 2>/dev/null
exit "$code""#;

/// What is known about the end of a session whose workspace lost its right.
pub(super) const WITHDRAWN: &str = "the environment was taken from the workspace";

/// Why a conversation could not be opened.
#[derive(Debug, thiserror::Error)]
enum AttachError {
    /// The executor has forgotten the session, or was restarted.
    #[error("the executor no longer has the process")]
    Gone,
    /// The workspace may no longer reach the executor.
    #[error("{WITHDRAWN}")]
    Unbound,
    /// Worth another try: the executor still holds the former stream, or the store does not answer.
    #[error("the executor was not reached again")]
    Busy,
    /// The executor is away.
    #[error(transparent)]
    Reach(#[from] ReachError),
    /// The conversation was not opened.
    #[error(transparent)]
    Connect(ConnectError),
}

/// How the work with one conversation ended.
enum Outcome {
    /// The link is gone; the session goes on.
    Lost,
    /// The session is over.
    Over,
}

struct Task {
    sessions: Arc<Sessions>,
    session: Arc<Session>,
    /// Away only while a write to the disk is under way.
    journal: Option<Journal>,
    /// Where the start goes; looked up anew after a loss, since the right may have been taken away.
    binding: Option<Binding>,
    /// What follows the journal.
    events: ProcessEvents,
    /// Until its ring is read for the first time: readers may have seen more of the output than the journal has now, from
    /// the memory of an earlier gateway process.
    restored: bool,
    exit_code: Option<i32>,
    deadline: Option<Instant>,
    /// Dropped bytes of the journal that are counted.
    dropped: u64,
}

/// Runs until the session is over or the gateway stops; in the second case the process lives on at its executor and
/// the next gateway process takes it up.
pub(super) async fn run(sessions: Arc<Sessions>, session: Arc<Session>, journal: Journal, binding: Option<Binding>) {
    let stop = sessions.stop.clone();
    let mark = journal.reader().last_mark().unwrap_or(0);
    let restored = binding.is_none();
    let timeout = session.request.timeout_ms.map(Duration::from_millis);
    let age = session.created_at.elapsed().unwrap_or_default();
    let deadline = timeout.map(|timeout| Instant::now() + timeout.saturating_sub(age));
    let events = ProcessEvents::after(mark, session.row().exit_seq);
    let mut task = Task {
        sessions,
        session,
        journal: Some(journal),
        binding,
        events,
        restored,
        exit_code: None,
        deadline,
        dropped: 0,
    };
    let forgotten = task.session.forgotten.clone();
    let _ended = task.session.task_ended.clone().drop_guard();
    tokio::select! {
        () = task.drive() => {}
        () = stop.cancelled() => {}
        () = forgotten.cancelled() => {}
    }
    task.session.client.send_replace(None);
    task.sync().await;
}

impl Task {
    async fn drive(&mut self) {
        while let Some(client) = self.attach().await {
            match self.converse(&client).await {
                Outcome::Over => return,
                Outcome::Lost => tracing::info!(session = %self.session.id, "the link of a session was lost"),
            }
            self.session.client.send_replace(None);
        }
    }

    /// Opens a conversation in the session's executor session; `None` when the session is over instead.
    async fn attach(&mut self) -> Option<Client> {
        let until = Instant::now() + Duration::from_secs(self.sessions.settings.now().retention_secs);
        let mut pause = RETRY_PAUSE;
        loop {
            // A start takes as long as its caller waits; after a loss the executor keeps the process only for so long.
            let attached = if self.session.row().executor_session.is_none() {
                self.try_attach().await
            } else {
                timeout_at(until, self.try_attach()).await.unwrap_or(Err(AttachError::Busy))
            };
            let failure = match attached {
                Ok(client) => return Some(client),
                Err(failure) => failure,
            };
            let nothing_sent = self.session.row().executor_session.is_none();
            let final_now = match &failure {
                AttachError::Gone | AttachError::Unbound => true,
                // The caller is waiting to hear that nothing was started.
                AttachError::Reach(_) | AttachError::Connect(_) => nothing_sent || Instant::now() >= until,
                AttachError::Busy => Instant::now() >= until,
            };
            if final_now {
                let state = match self.session.row().state {
                    SessionState::Starting if nothing_sent => SessionState::Failed,
                    SessionState::Starting => SessionState::Unknown,
                    _ => SessionState::Lost,
                };
                self.finish(state, Some(failure.to_string())).await;
                return None;
            }
            // Growing, so that many sessions of one executor do not starve each other of handshakes.
            sleep(pause).await;
            pause = (pause * 2).min(RETRY_PAUSE_MAX);
        }
    }

    async fn try_attach(&mut self) -> Result<Client, AttachError> {
        let (id, executor) = (&self.session.workspace, self.session.row().executor);
        if self.session.withdrawn.is_cancelled() {
            return Err(AttachError::Unbound);
        }
        let workspace = self.sessions.workspace(id).ok_or(AttachError::Unbound)?;
        let binding = match self.binding.take() {
            Some(binding) => binding,
            None => {
                let stored = self.sessions.store.binding(id, &executor).await.map_err(|_| AttachError::Busy)?;
                stored.ok_or(AttachError::Unbound)?
            }
        };
        // Its process is ended over it, also after the right has ended.
        let stream = workspace.open_own_stream(&binding, StreamKind::Session).await?.ended_by_holder();
        let resume = self.session.row().executor_session.map(|secret| ExecutorSessionId::new(secret.expose()));
        let resumes = resume.is_some();
        let client =
            workspace.connect(stream, resume, CancellationToken::new()).await.map_err(|error| match error {
                ConnectError::Initialize(CallError::Rpc(refusal)) if resumes && refusal.is_attached() => {
                    AttachError::Busy
                }
                ConnectError::Initialize(CallError::Rpc(_)) if resumes => AttachError::Gone,
                error => AttachError::Connect(error),
            })?;
        if !resumes {
            // Before the start is sent: only with this can a later gateway process ask whether it arrived.
            let session = client.session().map(|id| Secret::new(id.reveal().to_owned()));
            self.session.change(|row| row.executor_session = session);
            self.save().await.map_err(|_| AttachError::Busy)?;
        }
        Ok(client)
    }

    async fn converse(&mut self, client: &Client) -> Outcome {
        let process = self.session.row().process;
        let (_events, mut events) = client.subscribe_queue(&process);
        self.events.forget_waiting();
        if self.session.row().state == SessionState::Starting {
            let start = start_request(&self.session, client.environment(), &self.sessions.tools.now().env_exclude);
            match self.while_waiting(&mut events, client.call(&start)).await {
                Ok(_) => {}
                // It was sent before the link was lost, and had arrived.
                Err(CallError::Rpc(refusal)) if refusal.is_known_process() => {}
                Err(CallError::Rpc(refusal)) => {
                    self.finish(SessionState::Failed, Some(refusal.message)).await;
                    return Outcome::Over;
                }
                Err(_) => return Outcome::Lost,
            }
            self.session.change(|row| row.state = SessionState::Running);
            if self.save().await.is_err() {
                // The next process finds the start stored and asks again, which the executor answers.
                tracing::warn!(session = %self.session.id, "the start of a session was not stored");
            }
            self.session.publish(self.newest());
        }
        if let Some(outcome) = self.read_ring(client, &mut events).await {
            return outcome;
        }
        self.session.client.send_replace(Some(client.clone()));
        self.live(client, &mut events).await
    }

    async fn live(&mut self, client: &Client, events: &mut mpsc::Receiver<ProcessEvent>) -> Outcome {
        let mut sync = interval(SYNC_EVERY);
        sync.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut hole_until: Option<Instant> = None;
        loop {
            let never = || Instant::now() + SYNC_EVERY * 2;
            let (deadline, hole) = (self.deadline.unwrap_or_else(never), hole_until.unwrap_or_else(never));
            tokio::select! {
                event = events.recv() => {
                    let Some(event) = event else { return Outcome::Lost };
                    self.events.keep(event);
                    while self.events.waiting() < BATCH_EVENTS && let Ok(event) = events.try_recv() {
                        self.events.keep(event);
                    }
                    if self.take_in().await {
                        return Outcome::Over;
                    }
                    hole_until = match hole_until {
                        _ if self.events.waiting() == 0 => None,
                        _ if self.events.waiting() >= HOLE_EVENTS => Some(Instant::now()),
                        None => Some(Instant::now() + HOLE_WAIT),
                        waiting => waiting,
                    };
                }
                // An event is missing that the ring still has.
                () = sleep_until(hole), if hole_until.is_some() => {
                    hole_until = None;
                    if let Some(outcome) = self.read_ring(client, events).await {
                        return outcome;
                    }
                }
                () = client.ended() => return Outcome::Lost,
                _ = sync.tick() => self.sync().await,
                () = sleep_until(deadline), if self.deadline.is_some() => {
                    self.deadline = None;
                    self.session.change(|row| row.detail = Some("timed out".into()));
                    let session = self.session.clone();
                    tokio::spawn(async move { session.end(EndSignal::Kill, Duration::ZERO).await });
                }
            }
        }
    }

    /// Brings what the executor's ring has beyond the journal: nothing after a fresh start, all that was missed after a
    /// loss. Gives how it ended where that was the end.
    async fn read_ring(&mut self, client: &Client, events: &mut mpsc::Receiver<ProcessEvent>) -> Option<Outcome> {
        let process = self.session.row().process;
        let page = client.read_process(&process, self.events.newest());
        let page = match self.while_waiting(events, page).await {
            Ok(page) => page,
            Err(CallError::Rpc(refusal)) => {
                self.finish(SessionState::Lost, Some(refusal.message)).await;
                return Some(Outcome::Over);
            }
            Err(_) => return Some(Outcome::Lost),
        };
        let mut records = Records::default();
        if std::mem::take(&mut self.restored) {
            // A chunk has a number each, here and there. What stands for the missing ones has the last of theirs, so that
            // no chunk behind it comes under a number that a reader has passed already.
            let oldest = page.chunks.first().map_or(0, |chunk| chunk.seq);
            let missing = oldest.saturating_sub(self.events.newest() + 1);
            records.skip(missing.saturating_sub(gap_tags(self.session.request.tty).len() as u64));
        }
        // The ring's content, then the live events behind it.
        let happened = self.events.merge(page);
        let over = self.journal(records, happened).await || self.take_in().await;
        over.then_some(Outcome::Over)
    }

    /// Journals what follows the journal without a hole; true when the session is over.
    async fn take_in(&mut self) -> bool {
        let ready = self.events.by_ref().collect();
        self.journal(Records::default(), ready).await
    }

    /// True when the session is over.
    async fn journal(&mut self, mut records: Records, happened: Vec<Happened>) -> bool {
        let mut closed = false;
        for event in happened {
            match event {
                Happened::Output { seq, stream, bytes } => records.output(seq, stream, bytes),
                Happened::Missing { chunks, seq } => records.missing(chunks, seq),
                Happened::Exited { code } => self.exit_code = code.or(self.exit_code),
                Happened::Closed => closed = true,
            }
        }
        self.store_exit(&records).await;
        self.append(records).await;
        if closed {
            self.finish(SessionState::Exited, None).await;
        }
        closed
    }

    /// Stores which number the exit has before output behind it is journalled: the next gateway process must not take
    /// it for one of the numbers that it finds missing.
    async fn store_exit(&mut self, records: &Records) {
        let Some(exit) = self.events.exit_seq().filter(|exit| records.last_mark() > *exit) else { return };
        if self.session.row().exit_seq == Some(exit) {
            return;
        }
        self.session.change(|row| row.exit_seq = Some(exit));
        if self.save().await.is_err() {
            tracing::warn!(session = %self.session.id, "the exit of a process was not stored");
        }
    }

    /// Waits for an answer while taking events out of the queue: they stand before it on the stream.
    async fn while_waiting<T>(
        &mut self,
        events: &mut mpsc::Receiver<ProcessEvent>,
        answer: impl Future<Output = Result<T, CallError>>,
    ) -> Result<T, CallError> {
        let mut answer = std::pin::pin!(answer);
        loop {
            tokio::select! {
                biased;
                answer = &mut answer => return answer,
                event = events.recv() => match event {
                    Some(event) if self.events.waiting() < EARLY_EVENTS_MAX => self.events.keep(event),
                    // Too much to keep: the ring is read again on the next conversation.
                    Some(_) | None => return Err(CallError::Lost { sent: true }),
                },
            }
        }
    }

    /// To the disk first, then to the readers.
    async fn append(&mut self, records: Records) {
        if records.0.is_empty() {
            return;
        }
        let Some(mut journal) = self.journal.take() else { return };
        self.sessions.metrics.session_output.add(records.bytes());
        let tty = self.session.request.tty;
        let written = tokio::task::spawn_blocking(move || {
            let result = records.write(&mut journal, tty);
            (journal, result)
        });
        // A panic of the journal would end this task with it; the session is then taken up at the next start.
        let Ok((journal, result)) = written.await else { return };
        self.journal = Some(journal);
        self.count_dropped("session");
        if let Err(error) = result {
            tracing::error!(session = %self.session.id, %error, "output is kept in memory only: the disk failed");
        }
        self.session.publish(self.newest());
    }

    fn count_dropped(&mut self, quota: &'static str) {
        let dropped = self.session.journal.dropped_bytes();
        self.sessions.metrics.session_lost.of([quota]).add(dropped - self.dropped);
        self.dropped = dropped;
    }

    fn newest(&self) -> u64 {
        self.journal.as_ref().map_or(0, |journal| journal.reader().published())
    }

    async fn sync(&mut self) {
        let Some(mut journal) = self.journal.take() else { return };
        let spill_bytes = self.session.spill_bytes.swap(u64::MAX, Ordering::Relaxed);
        let synced = tokio::task::spawn_blocking(move || {
            if journal.reader().disk_bytes() > spill_bytes
                && let Err(error) = journal.shrink_to(spill_bytes)
            {
                tracing::warn!(%error, "old output could not be dropped");
            }
            let result = journal.sync();
            (journal, result)
        });
        let Ok((journal, result)) = synced.await else { return };
        self.journal = Some(journal);
        self.count_dropped("shared");
        if let Err(error) = result {
            tracing::warn!(session = %self.session.id, %error, "output was not synced to the disk");
        }
    }

    fn save(&self) -> impl Future<Output = Result<(), StoreError>> + Send + use<> {
        let (store, row) = (self.sessions.store.clone(), self.session.row());
        async move { store.save_session(row).await }
    }

    /// The end is told only when all output is on disk and the end itself is stored.
    async fn finish(&mut self, state: SessionState, detail: Option<String>) {
        self.sync().await;
        let exit_code = if state == SessionState::Exited { self.exit_code } else { None };
        self.session.change(|row| {
            row.state = state;
            row.exit_code = exit_code;
            row.ended_at = Some(SystemTime::now());
            row.detail = detail.or(row.detail.take());
        });
        if let Err(error) = self.save().await {
            tracing::warn!(session = %self.session.id, %error, "the end of a session was not stored");
        }
        self.sessions.metrics.sessions_ended.inc([state.as_str()]);
        // Behind the store: what is over there does not end again.
        let (act, outcome) = self.recorded_end();
        if let Ok(entry) = self.sessions.audit.begin(act).await {
            entry.end(outcome);
        }
        self.session.client.send_replace(None);
        self.session.publish(self.newest());
    }

    /// How it ended, for the audit; its beginning was the call of the tool.
    fn recorded_end(&self) -> (Act, audit::Outcome) {
        let (session, row) = (&self.session, self.session.row());
        let act = Act::new("process.end").by_the("gateway").of_workspace(&session.workspace);
        let act = act.in_session(session.id.as_str()).at(&session.environment).on(&session.executor()).always();
        let totals = self.journal.as_ref().map(|journal| journal.reader().totals()).unwrap_or_default();
        let written = totals.iter().map(|stream| stream.bytes).sum();
        let outcome = audit::Outcome::new(row.state.as_str()).exit_code(row.exit_code.map(i64::from));
        (act, outcome.bytes(row.stdin_accepted, written))
    }
}

fn start_request(session: &Session, environment: &EnvironmentInfo, env_exclude: &[String]) -> ProcessStart {
    let request = &session.request;
    let process = session.row().process;
    let mut env = request.env.clone();
    env.insert(MARK.to_owned(), process.clone());
    let argv = if session.stdin_needs_stub() {
        let stub = ["/bin/sh", "-c", STDIN_STUB, "sh"].map(str::to_owned);
        stub.into_iter().chain(request.argv.iter().cloned()).collect()
    } else {
        request.argv.clone()
    };
    let root = || FileUri::parse("file:///").expect("a literal URI");
    let cwd = request.cwd.as_deref().and_then(|cwd| FileUri::parse(cwd).ok());
    ProcessStart {
        process_id: process,
        argv,
        cwd: cwd.or_else(|| environment.cwd.clone()).unwrap_or_else(root),
        env,
        tty: request.tty,
        pipe_stdin: request.stdin != StdinMode::None,
        arg0: None,
        env_policy: Some(EnvPolicy::commands(env_exclude)),
        sandbox: None,
    }
}

/// What one batch adds to the journal.
#[derive(Default)]
struct Records(Vec<Record>);

enum Record {
    Output { tag: u8, mark: u64, bytes: Vec<u8> },
    Missing { chunks: u64, mark: u64 },
    Skipped { numbers: u64 },
}

/// Streams of which missing chunks may be: nobody knows which.
fn gap_tags(tty: bool) -> &'static [u8] {
    if tty { &[2] } else { &[0, 1] }
}

impl Records {
    /// Leaves out numbers of the journal.
    fn skip(&mut self, numbers: u64) {
        if numbers > 0 {
            self.0.push(Record::Skipped { numbers });
        }
    }

    fn output(&mut self, mark: u64, stream: OutputStream, bytes: Vec<u8>) {
        let tag = match stream {
            OutputStream::Stdout => 0,
            OutputStream::Stderr => 1,
            OutputStream::Pty => 2,
        };
        self.0.push(Record::Output { tag, mark, bytes });
    }

    /// Chunks up to this number that the executor no longer had.
    fn missing(&mut self, chunks: u64, mark: u64) {
        self.0.push(Record::Missing { chunks, mark });
    }

    /// Bytes of output in them.
    fn bytes(&self) -> u64 {
        let outputs = self.0.iter();
        outputs.map(|record| if let Record::Output { bytes, .. } = record { bytes.len() as u64 } else { 0 }).sum()
    }

    /// The executor's newest number in them; 0 when there are none.
    fn last_mark(&self) -> u64 {
        self.0.last().map_or(0, |record| match record {
            Record::Output { mark, .. } | Record::Missing { mark, .. } => *mark,
            Record::Skipped { .. } => 0,
        })
    }

    /// Journals all of it, whatever the disk does.
    ///
    /// # Errors
    /// The disk's first failure; from then on the journal goes on in memory.
    fn write(self, journal: &mut Journal, tty: bool) -> Result<(), JournalError> {
        let mut result = Ok(());
        let mut outputs = Vec::new();
        let mut bytes_waiting = 0;
        for record in &self.0 {
            match record {
                Record::Output { tag, mark, bytes } => {
                    if bytes_waiting + bytes.len() > WRITE_BYTES {
                        result = result.and(append(journal, &std::mem::take(&mut outputs)));
                        bytes_waiting = 0;
                    }
                    bytes_waiting += bytes.len();
                    outputs.push(Append { tag: *tag, mark: *mark, bytes });
                }
                Record::Missing { chunks, mark } => {
                    result = result.and(append(journal, &std::mem::take(&mut outputs)));
                    bytes_waiting = 0;
                    // Counted once; none of the streams is whole any more.
                    for (nth, tag) in gap_tags(tty).iter().enumerate() {
                        let chunks = if nth == 0 { *chunks } else { 0 };
                        let gap = |journal: &mut Journal| journal.append_gap(*tag, None, chunks, *mark).map(drop);
                        result = result.and(or_in_memory(journal, gap));
                    }
                }
                // Always the first.
                Record::Skipped { numbers } => {
                    result = result.and(or_in_memory(journal, |journal| journal.skip(*numbers)));
                }
            }
        }
        result.and(append(journal, &outputs))
    }
}

/// Says in the journal of a session that is over that nobody knows what it printed.
pub(super) fn name_as_lost(journal: &mut Journal, tty: bool) -> Result<(), JournalError> {
    for tag in gap_tags(tty) {
        or_in_memory(journal, |journal| journal.append_gap(*tag, None, 0, 0).map(drop))?;
    }
    Ok(())
}

fn append(journal: &mut Journal, outputs: &[Append<'_>]) -> Result<(), JournalError> {
    if outputs.is_empty() {
        return Ok(());
    }
    or_in_memory(journal, |journal| match journal.append(outputs) {
        Err(JournalError::TooLarge { .. }) => {
            // One chunk that is larger than half of the quota: its bytes are named as missing.
            for output in outputs {
                journal.append_gap(output.tag, Some(output.bytes.len() as u64), 1, output.mark)?;
            }
            Ok(())
        }
        appended => appended.map(drop),
    })
}

/// A disk that fails must not stop the process: its newest output stays readable from memory.
fn or_in_memory(
    journal: &mut Journal,
    append: impl Fn(&mut Journal) -> Result<(), JournalError>,
) -> Result<(), JournalError> {
    let Err(error) = append(journal) else { return Ok(()) };
    journal.continue_in_memory();
    append(journal)?;
    Err(error)
}
