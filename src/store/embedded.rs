//! The embedded store: one SQLite file in the state directory, owned by one thread that takes questions in turn.
//! Every write is a transaction of its own and on disk before its answer; nothing here decides who may ask.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use exec_gateway_protocol::ids::{EnvironmentName, ExecutorId, RegistrationId, TokenId, TurnId, UserId, WorkspaceId};
use rusqlite::types::Type;
use rusqlite::{Connection, ErrorCode, OptionalExtension, Params, Row, Transaction, TransactionBehavior, params};
use tokio::sync::{mpsc, oneshot};
use zeroize::Zeroizing;

use super::{
    Binding, Executor, GatewayKey, KeyPurpose, Keyring, Registration, Revocation, RevocationScope, StoreError, Token,
    Transport, database,
};
use crate::config::Secret;

/// Questions that wait for the thread; further callers wait for a place.
const QUEUE_JOBS_MAX: usize = 1024;

/// A question that waited longer is answered `Unavailable` unasked. While another process holds the database each
/// write takes a second to fail, and a full queue would otherwise keep its last caller for a quarter of an hour.
const QUEUE_WAIT_MAX: Duration = Duration::from_secs(5);

const KEY_BYTES: usize = 32;

type Job = Box<dyn FnOnce(&mut Connection) + Send>;

/// Handle to the store; cheap to clone. When the last one is dropped the thread finishes what was queued and ends.
///
/// Dropping the future of a question drops its answer: a write that was already queued still happens. Every question
/// may fail with `Unavailable` (the database is locked, its disk fails, or the queue did not move for 5 s; a write
/// that failed so has not happened) and `Damaged` (the file holds what this program did not write).
#[derive(Debug, Clone)]
pub struct Store {
    jobs: mpsc::Sender<Job>,
    counts: Arc<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    questions: AtomicU64,
    failures: AtomicU64,
    wait_micros: AtomicU64,
    work_micros: AtomicU64,
}

/// What the store has done since the start, and what is before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoreCounts {
    /// Questions that wait for their turn.
    pub waiting: u64,
    /// Questions that were answered.
    pub questions: u64,
    /// Questions that ended as `Unavailable`.
    pub failures: u64,
    /// How long all together waited, in microseconds.
    pub wait_micros: u64,
    /// How long was worked at them, in microseconds.
    pub work_micros: u64,
}

impl Store {
    /// Opens the store of a state directory, and makes both if there are none. Blocks for the disk, at most a second
    /// for another process.
    ///
    /// # Errors
    /// `Unavailable` if the files cannot be opened, `Damaged` if they are not a store or one of a newer version.
    pub fn open(state_dir: &Path) -> Result<Self, StoreError> {
        let connection = database::open(state_dir)?;
        let (jobs, queue) = mpsc::channel(QUEUE_JOBS_MAX);
        let thread = std::thread::Builder::new().name("store".into());
        thread.spawn(move || serve(connection, queue)).map_err(|error| StoreError::Unavailable(error.into()))?;
        Ok(Self { jobs, counts: Arc::default() })
    }

    /// What it has done so far.
    pub fn counts(&self) -> StoreCounts {
        let Counts { questions, failures, wait_micros, work_micros } = &*self.counts;
        StoreCounts {
            waiting: (self.jobs.max_capacity() - self.jobs.capacity()) as u64,
            questions: questions.load(Relaxed),
            failures: failures.load(Relaxed),
            wait_micros: wait_micros.load(Relaxed),
            work_micros: work_micros.load(Relaxed),
        }
    }

    /// Makes an executor with a new id and binds it, both or neither.
    ///
    /// # Errors
    /// `Conflict` if the workspace has another executor of that name.
    pub async fn create_executor(
        &self,
        workspace: &WorkspaceId,
        name: &EnvironmentName,
        default: bool,
        user: Option<&UserId>,
    ) -> Result<Executor, StoreError> {
        let (workspace, name, user) = (workspace.clone(), name.clone(), user.cloned());
        self.write(move |tx| {
            let executor = add_executor(tx, user)?;
            bind(tx, &executor.id, &workspace, &name, default)?;
            Ok(executor)
        })
        .await
    }

    /// Makes an executor of a person with a new id, bound nowhere yet.
    pub async fn register_executor(&self, user: &UserId) -> Result<Executor, StoreError> {
        let user = user.clone();
        self.write(move |tx| add_executor(tx, Some(user))).await
    }

    /// The executor of that id, if there is one.
    pub async fn executor(&self, id: &ExecutorId) -> Result<Option<Executor>, StoreError> {
        let id = id.clone();
        self.read(move |db| {
            one(db, &format!("SELECT {EXECUTOR} FROM executors WHERE id = ?"), [id.as_str()], executor_from)
        })
        .await
    }

    /// All executors with their bindings, or those bound to one workspace with their bindings there; oldest first.
    pub async fn executors(
        &self,
        workspace: Option<&WorkspaceId>,
    ) -> Result<Vec<(Executor, Vec<Binding>)>, StoreError> {
        let workspace = workspace.cloned();
        self.read(move |db| {
            let workspace = workspace.as_ref().map(WorkspaceId::as_str);
            let executors = all(
                db,
                &format!(
                    "SELECT {EXECUTOR} FROM executors WHERE ?1 IS NULL
                     OR id IN (SELECT executor FROM bindings WHERE workspace = ?1) ORDER BY created_at, seq"
                ),
                [workspace],
                executor_from,
            )?;
            let bindings = all(
                db,
                &format!("SELECT {BINDING} FROM bindings WHERE ?1 IS NULL OR workspace = ?1 ORDER BY created_at, seq"),
                [workspace],
                binding_from,
            )?;
            let mut by_executor: HashMap<ExecutorId, Vec<Binding>> = HashMap::new();
            for binding in bindings {
                by_executor.entry(binding.executor.clone()).or_default().push(binding);
            }
            let with_bindings = |executor: Executor| {
                let bindings = by_executor.remove(&executor.id).unwrap_or_default();
                (executor, bindings)
            };
            Ok(executors.into_iter().map(with_bindings).collect())
        })
        .await
    }

    /// Forgets an executor with its bindings and registrations.
    ///
    /// # Errors
    /// `NotFound` if there is none of that id.
    pub async fn delete_executor(&self, id: &ExecutorId) -> Result<(), StoreError> {
        let id = id.clone();
        self.write(move |tx| {
            let deleted = tx.execute("DELETE FROM executors WHERE id = ?", [id.as_str()])?;
            found(deleted, || no_executor(&id))
        })
        .await
    }

    /// Lets a workspace reach an executor. Binding again renames; `default` makes it the one default of the workspace,
    /// and without it a default stays what it was.
    ///
    /// # Errors
    /// `NotFound` if there is no such executor, `Conflict` if the workspace has another executor of that name.
    pub async fn bind(
        &self,
        executor: &ExecutorId,
        workspace: &WorkspaceId,
        name: &EnvironmentName,
        default: bool,
    ) -> Result<Binding, StoreError> {
        let (executor, workspace, name) = (executor.clone(), workspace.clone(), name.clone());
        self.write(move |tx| bind(tx, &executor, &workspace, &name, default)).await
    }

    /// Says what a bound executor is for.
    ///
    /// # Errors
    /// `NotFound` if it is not bound there.
    pub async fn describe(
        &self,
        executor: &ExecutorId,
        workspace: &WorkspaceId,
        description: &str,
    ) -> Result<(), StoreError> {
        let (executor, workspace, description) = (executor.clone(), workspace.clone(), description.to_owned());
        self.write(move |tx| {
            let described = tx.execute(
                "UPDATE bindings SET description = ? WHERE workspace = ? AND executor = ?",
                [&description, workspace.as_str(), executor.as_str()],
            )?;
            found(described, || no_binding(&workspace, &executor))
        })
        .await
    }

    /// Takes an executor from a workspace.
    ///
    /// # Errors
    /// `NotFound` if it was not bound there.
    pub async fn unbind(&self, executor: &ExecutorId, workspace: &WorkspaceId) -> Result<(), StoreError> {
        let (executor, workspace) = (executor.clone(), workspace.clone());
        self.write(move |tx| {
            let deleted = tx.execute(
                "DELETE FROM bindings WHERE workspace = ? AND executor = ?",
                [workspace.as_str(), executor.as_str()],
            )?;
            found(deleted, || no_binding(&workspace, &executor))
        })
        .await
    }

    /// Gives a bound executor another name in a workspace.
    ///
    /// # Errors
    /// `NotFound` if it is not bound there, `Conflict` if the workspace has another executor of that name.
    pub async fn rename(
        &self,
        executor: &ExecutorId,
        workspace: &WorkspaceId,
        name: &EnvironmentName,
    ) -> Result<(), StoreError> {
        let (executor, workspace, name) = (executor.clone(), workspace.clone(), name.clone());
        self.write(move |tx| {
            let renamed = tx.execute(
                "UPDATE bindings SET name = ? WHERE workspace = ? AND executor = ?",
                [name.as_str(), workspace.as_str(), executor.as_str()],
            );
            let renamed = renamed.map_err(|error| or_conflict(error, || name_taken(&workspace, &name)))?;
            found(renamed, || no_binding(&workspace, &executor))
        })
        .await
    }

    /// What a workspace may reach, in the order it was bound.
    pub async fn bindings(&self, workspace: &WorkspaceId) -> Result<Vec<Binding>, StoreError> {
        let workspace = workspace.clone();
        self.read(move |db| {
            all(
                db,
                &format!("SELECT {BINDING} FROM bindings WHERE workspace = ? ORDER BY created_at, seq"),
                [workspace.as_str()],
                binding_from,
            )
        })
        .await
    }

    /// The proof that a workspace may reach an executor, if it may.
    pub async fn binding(&self, workspace: &WorkspaceId, executor: &ExecutorId) -> Result<Option<Binding>, StoreError> {
        let (workspace, executor) = (workspace.clone(), executor.clone());
        self.read(move |db| find_binding(db, &workspace, &executor)).await
    }

    /// Notes when links were last known to be up, all in one transaction. A time never moves back, and executors that
    /// are gone are passed over.
    pub async fn touch_executors(&self, seen: Vec<(ExecutorId, SystemTime)>) -> Result<(), StoreError> {
        self.write(move |tx| {
            let mut touch = tx.prepare_cached(
                "UPDATE executors SET last_seen = ?2 WHERE id = ?1 AND coalesce(last_seen < ?2, true)",
            )?;
            for (executor, at) in &seen {
                touch.execute(params![executor.as_str(), nanos(*at)])?;
            }
            Ok(())
        })
        .await
    }

    /// Stores a registration as the newest of its executor and forgets all but the newest `keep` of them, at least the
    /// one given. One of the same id is replaced.
    ///
    /// # Errors
    /// `NotFound` if there is no such executor, `Conflict` if the id belongs to another executor.
    pub async fn save_registration(&self, registration: Registration, keep: usize) -> Result<(), StoreError> {
        self.write(move |tx| {
            let Registration { id, executor, transport, public_key, credential, created_at } = &registration;
            must_exist(tx, executor)?;
            tx.execute("DELETE FROM registrations WHERE id = ? AND executor = ?", [id.as_str(), executor.as_str()])?;
            let stored = tx.execute(
                "INSERT INTO registrations (id, executor, transport, public_key, credential, created_at)
                 VALUES (?, ?, ?, ?, ?, ?)",
                params![id.as_str(), executor.as_str(), transport.name(), public_key, credential, nanos(*created_at)],
            );
            let taken = || StoreError::Conflict(format!("registration {id} belongs to another executor"));
            stored.map_err(|error| or_conflict(error, taken))?;
            tx.execute(
                "DELETE FROM registrations WHERE executor = ?1 AND seq NOT IN
                 (SELECT seq FROM registrations WHERE executor = ?1 ORDER BY seq DESC LIMIT ?2)",
                params![executor.as_str(), count(keep.max(1))],
            )?;
            Ok(())
        })
        .await
    }

    /// Stores the right to resume the session that an executor's socket carries for all its callers.
    ///
    /// # Errors
    /// `NotFound` if there is no such executor.
    pub async fn save_shared_session(&self, executor: &ExecutorId, session: Secret) -> Result<(), StoreError> {
        let executor = executor.clone();
        self.write(move |tx| {
            must_exist(tx, &executor)?;
            // A new session, in which nothing runs yet.
            let sql = "INSERT OR REPLACE INTO shared_sessions (executor, session) VALUES (?, ?)";
            tx.execute(sql, [executor.as_str(), session.expose()])?;
            Ok(())
        })
        .await
    }

    /// Stores which processes run in that session, by their names at the executor.
    ///
    /// # Errors
    /// None of its own; without a session nothing is stored.
    pub async fn save_shared_processes(&self, executor: &ExecutorId, names: &[String]) -> Result<(), StoreError> {
        let (executor, names) = (executor.clone(), serde_json::json!(names).to_string());
        self.write(move |tx| {
            let sql = "UPDATE shared_sessions SET processes = ? WHERE executor = ?";
            tx.execute(sql, [&names, executor.as_str()])?;
            Ok(())
        })
        .await
    }

    /// The session that [`Self::save_shared_session`] has stored, and the processes that run in it.
    ///
    /// # Errors
    /// None of its own.
    pub async fn shared_session(&self, executor: &ExecutorId) -> Result<Option<(Secret, Vec<String>)>, StoreError> {
        let executor = executor.clone();
        let stored = self.read(move |db| {
            let sql = "SELECT session, processes FROM shared_sessions WHERE executor = ?";
            one(db, sql, [executor.as_str()], |row| Ok((Secret::new(row.get(0)?), row.get::<_, String>(1)?)))
        });
        let Some((session, processes)) = stored.await? else { return Ok(None) };
        let processes = serde_json::from_str(&processes).map_err(|error| StoreError::Damaged(error.into()))?;
        Ok(Some((session, processes)))
    }

    /// The registration of that id, if it is remembered.
    pub async fn registration(&self, id: &RegistrationId) -> Result<Option<Registration>, StoreError> {
        let id = id.clone();
        self.read(move |db| {
            one(db, &format!("SELECT {REGISTRATION} FROM registrations WHERE id = ?"), [id.as_str()], registration_from)
        })
        .await
    }

    /// The newest registration of an executor with that public key. An empty key names none.
    pub async fn registration_by_key(
        &self,
        executor: &ExecutorId,
        public_key: &[u8],
    ) -> Result<Option<Registration>, StoreError> {
        if public_key.is_empty() {
            return Ok(None);
        }
        let (executor, public_key) = (executor.clone(), public_key.to_vec());
        self.read(move |db| {
            one(
                db,
                &format!(
                    "SELECT {REGISTRATION} FROM registrations WHERE executor = ? AND public_key = ?
                     ORDER BY seq DESC LIMIT 1"
                ),
                params![executor.as_str(), public_key],
                registration_from,
            )
        })
        .await
    }

    /// The remembered registrations of an executor, newest first.
    pub async fn registrations(&self, executor: &ExecutorId) -> Result<Vec<Registration>, StoreError> {
        let executor = executor.clone();
        self.read(move |db| {
            all(
                db,
                &format!("SELECT {REGISTRATION} FROM registrations WHERE executor = ? ORDER BY seq DESC"),
                [executor.as_str()],
                registration_from,
            )
        })
        .await
    }

    /// Stores a proxy token under its SHA-256.
    ///
    /// # Errors
    /// `Conflict` if its id or digest is stored already.
    pub async fn create_token(&self, token: Token, digest: [u8; 32]) -> Result<(), StoreError> {
        self.write(move |tx| {
            let stored = tx.execute(
                "INSERT INTO tokens (id, digest, workspace, user, read_only, created_at, expires_at)
                 VALUES (?, ?, ?, ?, ?, ?, ?)",
                params![
                    token.id.as_str(),
                    digest,
                    token.workspace.as_str(),
                    token.user.as_ref().map(UserId::as_str),
                    token.read_only,
                    nanos(token.created_at),
                    token.expires_at.map(nanos)
                ],
            );
            let taken = || StoreError::Conflict(format!("token {} exists already", token.id));
            stored.map_err(|error| or_conflict(error, taken))?;
            Ok(())
        })
        .await
    }

    /// The proxy token with that SHA-256, expired or not. A revoked one is gone.
    pub async fn token_by_digest(&self, digest: [u8; 32]) -> Result<Option<Token>, StoreError> {
        self.read(move |db| one(db, &format!("SELECT {TOKEN} FROM tokens WHERE digest = ?"), [digest], token_from))
            .await
    }

    /// All proxy tokens, expired ones too, oldest first.
    pub async fn tokens(&self) -> Result<Vec<Token>, StoreError> {
        self.read(|db| all(db, &format!("SELECT {TOKEN} FROM tokens ORDER BY created_at, seq"), [], token_from)).await
    }

    /// Forgets a proxy token, so that it opens nothing any more.
    ///
    /// # Errors
    /// `NotFound` if there is none of that id.
    pub async fn revoke_token(&self, id: &TokenId) -> Result<(), StoreError> {
        let id = id.clone();
        self.write(move |tx| {
            let deleted = tx.execute("DELETE FROM tokens WHERE id = ?", [id.as_str()])?;
            found(deleted, || StoreError::NotFound(format!("there is no token {id}")))
        })
        .await
    }

    /// Stores a revocation. One of the same scope is joined with it: the later of both times each. Those that
    /// may be forgotten when this one is made give it their places.
    ///
    /// # Errors
    /// `Conflict` if `max` others are live: dropping one of them would make valid again what it ended.
    pub async fn add_revocation(&self, revocation: Revocation, max: usize) -> Result<(), StoreError> {
        self.write(move |tx| {
            let Revocation { scope, revoked_at, forget_at } = &revocation;
            let (scope, name) = scope_names(scope);
            tx.execute("DELETE FROM revocations WHERE forget_at <= ?", [nanos(*revoked_at)])?;
            let live: i64 =
                tx.query_row("SELECT count(*) FROM revocations WHERE (scope, name) <> (?, ?)", [scope, name], |row| {
                    row.get(0)
                })?;
            if live >= count(max) {
                return Err(StoreError::Conflict(format!("{max} revocations are live, and no more are kept")));
            }
            tx.execute(
                "INSERT INTO revocations (scope, name, revoked_at, forget_at) VALUES (?, ?, ?, ?)
                 ON CONFLICT (scope, name) DO UPDATE SET revoked_at = max(revoked_at, excluded.revoked_at),
                 forget_at = max(forget_at, excluded.forget_at)",
                params![scope, name, nanos(*revoked_at), nanos(*forget_at)],
            )?;
            Ok(())
        })
        .await
    }

    /// All revocations not forgotten yet, oldest first.
    pub async fn revocations(&self) -> Result<Vec<Revocation>, StoreError> {
        self.read(|db| {
            all(
                db,
                "SELECT scope, name, revoked_at, forget_at FROM revocations ORDER BY revoked_at, scope, name",
                [],
                revocation_from,
            )
        })
        .await
    }

    /// Forgets the revocations that may be forgotten at that time and says how many they were.
    pub async fn forget_revocations(&self, now: SystemTime) -> Result<usize, StoreError> {
        self.write(move |tx| Ok(tx.execute("DELETE FROM revocations WHERE forget_at <= ?", [nanos(now)])?)).await
    }

    /// The keys of a purpose. The first question makes the first key.
    pub async fn keyring(&self, purpose: KeyPurpose) -> Result<Keyring, StoreError> {
        let stored = self.read(move |db| find_keyring(db, purpose)).await?;
        if let Some(keyring) = stored {
            return Ok(keyring);
        }
        self.write(move |tx| {
            // Another caller may have made it since it was looked for.
            if let Some(keyring) = find_keyring(tx, purpose)? {
                return Ok(keyring);
            }
            Ok(Keyring { current: add_key(tx, purpose)?, previous: None })
        })
        .await
    }

    /// Puts a new key before the keys of a purpose. The one that signed until now still verifies; older ones are gone.
    pub async fn rotate_key(&self, purpose: KeyPurpose) -> Result<Keyring, StoreError> {
        self.write(move |tx| {
            let previous = find_keyring(tx, purpose)?.map(|keyring| keyring.current);
            let current = add_key(tx, purpose)?;
            tx.execute(
                "DELETE FROM keys WHERE purpose = ?1 AND seq NOT IN
                 (SELECT seq FROM keys WHERE purpose = ?1 ORDER BY seq DESC LIMIT 2)",
                [purpose.name()],
            )?;
            Ok(Keyring { current, previous })
        })
        .await
    }

    /// Writes one small row through to the disk: says whether the store can keep a promise now.
    pub async fn health(&self) -> Result<(), StoreError> {
        self.write(|tx| {
            tx.execute(
                "INSERT INTO probe (id, writes) VALUES (1, 1) ON CONFLICT (id) DO UPDATE SET writes = writes + 1",
                [],
            )?;
            Ok(())
        })
        .await
    }

    pub(super) async fn read<T, F>(&self, question: F) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> Result<T, StoreError> + Send + 'static,
    {
        self.ask(|db| {
            // One snapshot for questions of several statements.
            let tx = db.transaction_with_behavior(TransactionBehavior::Deferred)?;
            question(&tx)
        })
        .await
    }

    pub(super) async fn write<T, F>(&self, change: F) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: FnOnce(&Transaction<'_>) -> Result<T, StoreError> + Send + 'static,
    {
        self.ask(|db| {
            let tx = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let answer = change(&tx)?;
            tx.commit()?;
            Ok(answer)
        })
        .await
    }

    async fn ask<T, F>(&self, question: F) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: FnOnce(&mut Connection) -> Result<T, StoreError> + Send + 'static,
    {
        let (answer, answered) = oneshot::channel();
        // The clock of std: the thread has no runtime, so a paused clock of a test would not reach it.
        let asked_at = Instant::now();
        let counts = self.counts.clone();
        let job: Job = Box::new(move |db| {
            let waited = asked_at.elapsed();
            let result = if waited > QUEUE_WAIT_MAX {
                Err(StoreError::Unavailable("the question waited too long for its turn".into()))
            } else {
                question(db)
            };
            counts.answered(waited, asked_at.elapsed() - waited, matches!(result, Err(StoreError::Unavailable(_))));
            // The caller may have left; what was asked is done all the same.
            let _ = answer.send(result);
        });
        self.jobs.send(job).await.map_err(|_| StoreError::Unavailable("the store's thread has ended".into()))?;
        answered.await.map_err(|_| StoreError::Unavailable("the question failed inside the store".into()))?
    }
}

impl Counts {
    fn answered(&self, waited: Duration, worked: Duration, failed: bool) {
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        (if failed { &self.failures } else { &self.questions }).fetch_add(1, Relaxed);
        self.wait_micros.fetch_add(micros(waited), Relaxed);
        self.work_micros.fetch_add(micros(worked), Relaxed);
    }
}

/// Owns the connection until the last handle is dropped and the queue is empty.
fn serve(mut connection: Connection, mut queue: mpsc::Receiver<Job>) {
    while let Some(job) = queue.blocking_recv() {
        // A panic costs its own caller the answer and rolls its transaction back; the others keep their store.
        if catch_unwind(AssertUnwindSafe(|| job(&mut connection))).is_err() {
            tracing::error!("a question to the store panicked");
        }
    }
}

fn add_executor(tx: &Transaction<'_>, user: Option<UserId>) -> Result<Executor, StoreError> {
    let id = ExecutorId::new(&format!("exe_{}", uuid::Uuid::new_v4())).expect("a UUID is hex and dashes");
    let executor = Executor { id, generation: 1, user, created_at: now(), last_seen: None };
    tx.execute(
        "INSERT INTO executors (id, generation, user, created_at) VALUES (?, 1, ?, ?)",
        params![executor.id.as_str(), executor.user.as_ref().map(UserId::as_str), nanos(executor.created_at)],
    )?;
    Ok(executor)
}

fn bind(
    tx: &Transaction<'_>,
    executor: &ExecutorId,
    workspace: &WorkspaceId,
    name: &EnvironmentName,
    default: bool,
) -> Result<Binding, StoreError> {
    must_exist(tx, executor)?;
    if default {
        // The old default goes first: the index allows one at any moment.
        tx.execute("UPDATE bindings SET is_default = 0 WHERE workspace = ? AND is_default = 1", [workspace.as_str()])?;
    }
    let bound = tx.execute(
        "INSERT INTO bindings (workspace, executor, name, is_default, created_at) VALUES (?, ?, ?, ?, ?)
         ON CONFLICT (workspace, executor) DO UPDATE SET name = excluded.name,
         is_default = max(is_default, excluded.is_default)",
        params![workspace.as_str(), executor.as_str(), name.as_str(), default, nanos(now())],
    );
    bound.map_err(|error| or_conflict(error, || name_taken(workspace, name)))?;
    Ok(find_binding(tx, workspace, executor)?.expect("the row was written above"))
}

fn find_binding(
    db: &Connection,
    workspace: &WorkspaceId,
    executor: &ExecutorId,
) -> Result<Option<Binding>, StoreError> {
    one(
        db,
        &format!("SELECT {BINDING} FROM bindings WHERE workspace = ? AND executor = ?"),
        [workspace.as_str(), executor.as_str()],
        binding_from,
    )
}

fn find_keyring(db: &Connection, purpose: KeyPurpose) -> Result<Option<Keyring>, StoreError> {
    let keys =
        all(db, "SELECT kid, secret FROM keys WHERE purpose = ? ORDER BY seq DESC LIMIT 2", [purpose.name()], |row| {
            Ok(GatewayKey { kid: row.get(0)?, secret: Zeroizing::new(row.get(1)?) })
        })?;
    let mut keys = keys.into_iter();
    Ok(keys.next().map(|current| Keyring { current, previous: keys.next() }))
}

fn add_key(tx: &Transaction<'_>, purpose: KeyPurpose) -> Result<GatewayKey, StoreError> {
    let mut kid = [0; 4];
    let mut secret = Zeroizing::new(vec![0; KEY_BYTES]);
    let filled = getrandom::fill(&mut kid).and_then(|()| getrandom::fill(&mut secret));
    filled.map_err(|error| StoreError::Unavailable(error.into()))?;
    let key = GatewayKey { kid: format!("{:08x}", u32::from_be_bytes(kid)), secret };
    tx.execute(
        "INSERT INTO keys (purpose, kid, secret) VALUES (?, ?, ?)",
        params![purpose.name(), key.kid, *key.secret],
    )?;
    Ok(key)
}

fn must_exist(tx: &Transaction<'_>, executor: &ExecutorId) -> Result<(), StoreError> {
    let found = one(tx, "SELECT 1 FROM executors WHERE id = ?", [executor.as_str()], |_| Ok(()))?;
    found.ok_or_else(|| no_executor(executor))
}

fn found(rows: usize, missing: impl FnOnce() -> StoreError) -> Result<(), StoreError> {
    if rows == 0 { Err(missing()) } else { Ok(()) }
}

fn or_conflict(error: rusqlite::Error, conflict: impl FnOnce() -> StoreError) -> StoreError {
    match error.sqlite_error_code() {
        Some(ErrorCode::ConstraintViolation) => conflict(),
        _ => error.into(),
    }
}

fn no_executor(id: &ExecutorId) -> StoreError {
    StoreError::NotFound(format!("there is no executor {id}"))
}

fn no_binding(workspace: &WorkspaceId, executor: &ExecutorId) -> StoreError {
    StoreError::NotFound(format!("executor {executor} is not bound to workspace {workspace}"))
}

fn name_taken(workspace: &WorkspaceId, name: &EnvironmentName) -> StoreError {
    StoreError::Conflict(format!("workspace {workspace} has another executor named {name}"))
}

pub(super) fn one<T>(
    db: &Connection,
    sql: &str,
    params: impl Params,
    from: impl FnOnce(&Row<'_>) -> rusqlite::Result<T>,
) -> Result<Option<T>, StoreError> {
    Ok(db.prepare_cached(sql)?.query_row(params, from).optional()?)
}

pub(super) fn all<T>(
    db: &Connection,
    sql: &str,
    params: impl Params,
    from: impl FnMut(&Row<'_>) -> rusqlite::Result<T>,
) -> Result<Vec<T>, StoreError> {
    Ok(db.prepare_cached(sql)?.query_map(params, from)?.collect::<Result<_, _>>()?)
}

const EXECUTOR: &str = "id, generation, user, created_at, last_seen";

fn executor_from(row: &Row<'_>) -> rusqlite::Result<Executor> {
    let generation: i64 = row.get(1)?;
    Ok(Executor {
        id: parsed(row, 0)?,
        generation: u64::try_from(generation).map_err(|_| rusqlite::Error::IntegralValueOutOfRange(1, generation))?,
        user: parsed_option(row, 2)?,
        created_at: time(row.get(3)?),
        last_seen: row.get::<_, Option<i64>>(4)?.map(time),
    })
}

const BINDING: &str = "workspace, executor, name, is_default, description";

fn binding_from(row: &Row<'_>) -> rusqlite::Result<Binding> {
    Ok(Binding {
        workspace: parsed(row, 0)?,
        executor: parsed(row, 1)?,
        name: parsed(row, 2)?,
        is_default: row.get(3)?,
        description: row.get(4)?,
    })
}

const REGISTRATION: &str = "id, executor, transport, public_key, credential, created_at";

fn registration_from(row: &Row<'_>) -> rusqlite::Result<Registration> {
    let name: String = row.get(2)?;
    let transport = TRANSPORTS.into_iter().find(|transport| transport.name() == name);
    Ok(Registration {
        id: parsed(row, 0)?,
        executor: parsed(row, 1)?,
        transport: transport.ok_or_else(|| unknown_text(2, "transport"))?,
        public_key: row.get(3)?,
        credential: row.get(4)?,
        created_at: time(row.get(5)?),
    })
}

const TOKEN: &str = "id, workspace, user, read_only, created_at, expires_at";

fn token_from(row: &Row<'_>) -> rusqlite::Result<Token> {
    Ok(Token {
        id: parsed(row, 0)?,
        workspace: parsed(row, 1)?,
        user: parsed_option(row, 2)?,
        read_only: row.get(3)?,
        created_at: time(row.get(4)?),
        expires_at: row.get::<_, Option<i64>>(5)?.map(time),
    })
}

fn revocation_from(row: &Row<'_>) -> rusqlite::Result<Revocation> {
    let scope = match row.get::<_, String>(0)?.as_str() {
        "turn" => RevocationScope::Turn(parsed::<TurnId>(row, 1)?),
        "workspace" => RevocationScope::Workspace(parsed(row, 1)?),
        _ => return Err(unknown_text(0, "scope")),
    };
    Ok(Revocation { scope, revoked_at: time(row.get(2)?), forget_at: time(row.get(3)?) })
}

fn scope_names(scope: &RevocationScope) -> (&'static str, &str) {
    match scope {
        RevocationScope::Turn(turn) => ("turn", turn.as_str()),
        RevocationScope::Workspace(workspace) => ("workspace", workspace.as_str()),
    }
}

const TRANSPORTS: [Transport; 4] = [Transport::Noise, Transport::Relay, Transport::Direct, Transport::Agentx];

pub(super) fn parsed<T>(row: &Row<'_>, column: usize) -> rusqlite::Result<T>
where
    T: FromStr<Err: std::error::Error + Send + Sync + 'static>,
{
    from_text(column, &row.get::<_, String>(column)?)
}

pub(super) fn parsed_option<T>(row: &Row<'_>, column: usize) -> rusqlite::Result<Option<T>>
where
    T: FromStr<Err: std::error::Error + Send + Sync + 'static>,
{
    row.get::<_, Option<String>>(column)?.map(|text| from_text(column, &text)).transpose()
}

fn from_text<T>(column: usize, text: &str) -> rusqlite::Result<T>
where
    T: FromStr<Err: std::error::Error + Send + Sync + 'static>,
{
    text.parse().map_err(|error: T::Err| rusqlite::Error::FromSqlConversionFailure(column, Type::Text, error.into()))
}

pub(super) fn unknown_text(column: usize, what: &str) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(column, Type::Text, format!("unknown {what}").into())
}

fn now() -> SystemTime {
    // Through the stored form and back, so that a row that was just made equals the one that is read later.
    time(nanos(SystemTime::now()))
}

/// Nanoseconds since 1970, negative before; the years 1677 to 2262 fit, and what lies outside becomes the nearest end.
pub(super) fn nanos(time: SystemTime) -> i64 {
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => i64::try_from(after.as_nanos()).unwrap_or(i64::MAX),
        Err(before) => i64::try_from(before.duration().as_nanos()).map_or(i64::MIN, |nanos| -nanos),
    }
}

pub(super) fn time(nanos: i64) -> SystemTime {
    let away = Duration::from_nanos(nanos.unsigned_abs());
    if nanos < 0 { UNIX_EPOCH - away } else { UNIX_EPOCH + away }
}

fn count(rows: usize) -> i64 {
    i64::try_from(rows).unwrap_or(i64::MAX)
}

#[cfg(test)]
#[path = "embedded_tests.rs"]
mod tests;
