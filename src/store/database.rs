//! The database file: how it is opened, its tables, and how a file of an older version becomes one of this version.
//! Owns no connection and asks no questions.

use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, OpenFlags, TransactionBehavior};

use super::{StoreError, make_state_dir, open_private, path_in};

/// How long a statement waits for another process that holds the database.
const BUSY_TIMEOUT: Duration = Duration::from_secs(1);

/// "exGW" in the header of the file, so that a database of another program is not taken for a store.
const APPLICATION_ID: i64 = 0x6578_4757;

/// Step N makes version N + 1 out of version N. Steps are only ever appended: files of every version are out there.
///
/// `seq` numbers the rows of a table as they were written, since the wall clock may step back. Times are nanoseconds
/// since 1970-01-01 UTC.
const MIGRATIONS: &[&str] = &[
    "
    CREATE TABLE executors (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        generation INTEGER NOT NULL,
        user TEXT,
        created_at INTEGER NOT NULL,
        last_seen INTEGER
    ) STRICT;
    CREATE TABLE bindings (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        workspace TEXT NOT NULL,
        executor TEXT NOT NULL REFERENCES executors (id) ON DELETE CASCADE,
        name TEXT NOT NULL,
        is_default INTEGER NOT NULL CHECK (is_default IN (0, 1)),
        description TEXT NOT NULL DEFAULT '',
        created_at INTEGER NOT NULL,
        UNIQUE (workspace, executor),
        UNIQUE (workspace, name)
    ) STRICT;
    CREATE UNIQUE INDEX bindings_default ON bindings (workspace) WHERE is_default = 1;
    CREATE INDEX bindings_executor ON bindings (executor);
    CREATE TABLE registrations (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        executor TEXT NOT NULL REFERENCES executors (id) ON DELETE CASCADE,
        transport TEXT NOT NULL,
        public_key BLOB NOT NULL,
        credential BLOB NOT NULL,
        created_at INTEGER NOT NULL
    ) STRICT;
    CREATE INDEX registrations_executor ON registrations (executor, seq);
    CREATE TABLE tokens (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        digest BLOB NOT NULL UNIQUE,
        workspace TEXT NOT NULL,
        user TEXT,
        read_only INTEGER NOT NULL CHECK (read_only IN (0, 1)),
        created_at INTEGER NOT NULL,
        expires_at INTEGER
    ) STRICT;
    CREATE TABLE revocations (
        scope TEXT NOT NULL,
        name TEXT NOT NULL,
        revoked_at INTEGER NOT NULL,
        forget_at INTEGER NOT NULL,
        PRIMARY KEY (scope, name)
    ) STRICT;
    CREATE TABLE keys (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        purpose TEXT NOT NULL,
        kid TEXT NOT NULL,
        secret BLOB NOT NULL,
        UNIQUE (purpose, kid)
    ) STRICT;
    CREATE TABLE probe (
        id INTEGER PRIMARY KEY CHECK (id = 1),
        writes INTEGER NOT NULL
    ) STRICT;
",
    "
    CREATE TABLE sessions (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        workspace TEXT NOT NULL,
        executor TEXT NOT NULL,
        environment TEXT NOT NULL,
        start_key TEXT,
        request_digest BLOB NOT NULL,
        request TEXT NOT NULL,
        process TEXT NOT NULL,
        executor_session TEXT,
        state TEXT NOT NULL,
        exit_code INTEGER,
        detail TEXT,
        created_at INTEGER NOT NULL,
        ended_at INTEGER,
        stdin_accepted INTEGER NOT NULL DEFAULT 0,
        stdin_eof INTEGER NOT NULL DEFAULT 0 CHECK (stdin_eof IN (0, 1)),
        write_id TEXT,
        write_length INTEGER,
        write_digest BLOB,
        UNIQUE (workspace, start_key)
    ) STRICT;
    CREATE INDEX sessions_workspace ON sessions (workspace, seq);
",
    "
    ALTER TABLE sessions ADD COLUMN exit_seq INTEGER;
    ",
    "
    CREATE TABLE shared_sessions (
        executor TEXT PRIMARY KEY REFERENCES executors (id) ON DELETE CASCADE,
        session TEXT NOT NULL
    ) STRICT;
",
    "
    ALTER TABLE shared_sessions ADD COLUMN processes TEXT NOT NULL DEFAULT '[]';
    ",
];

/// Opens the store of a state directory at the present version, and makes directory and file if there are none.
pub(super) fn open(state_dir: &Path) -> Result<Connection, StoreError> {
    make_state_dir(state_dir)?;
    let path = path_in(state_dir);
    // SQLite gives its log and index the mode of the database, so making this one file private covers all three.
    drop(open_private(&path)?);
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut connection = Connection::open_with_flags(&path, flags)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.pragma_update(None, "foreign_keys", true)?;
    // Deleted keys and token digests are overwritten, and nothing is put aside in files elsewhere.
    connection.pragma_update(None, "secure_delete", true)?;
    connection.pragma_update(None, "temp_store", "memory")?;
    // A file of another program is refused before anything in it changes, be it only the journal mode.
    check_owner(&connection)?;
    connection.pragma_update(None, "journal_mode", "wal")?;
    // An answered write must survive a power cut: syncing at checkpoints only would lose the last ones.
    connection.pragma_update(None, "synchronous", "full")?;
    migrate(&mut connection)?;
    Ok(connection)
}

fn check_owner(connection: &Connection) -> Result<(), StoreError> {
    let tables: i64 = connection.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))?;
    let owner: i64 = connection.pragma_query_value(None, "application_id", |row| row.get(0))?;
    if tables > 0 && owner != APPLICATION_ID {
        return Err(StoreError::Damaged("the file is a database of another program".into()));
    }
    Ok(())
}

fn migrate(connection: &mut Connection) -> Result<(), StoreError> {
    // The lock is taken before the version is read: two processes that open a new store must not both make its tables.
    let tx = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let version: i64 = tx.pragma_query_value(None, "user_version", |row| row.get(0))?;
    let known = MIGRATIONS.len();
    let Some(missing) = usize::try_from(version).ok().and_then(|version| MIGRATIONS.get(version..)) else {
        let text = format!("the file has version {version}, this program knows versions up to {known}");
        return Err(StoreError::Damaged(text.into()));
    };
    for step in missing {
        tx.execute_batch(step)?;
    }
    if !missing.is_empty() {
        tx.pragma_update(None, "application_id", APPLICATION_ID)?;
        tx.pragma_update(None, "user_version", i64::try_from(known).expect("a handful of steps fits"))?;
    }
    Ok(tx.commit()?)
}

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> Self {
        match error.sqlite_error_code() {
            Some(
                ErrorCode::DatabaseBusy
                | ErrorCode::DatabaseLocked
                | ErrorCode::SystemIoFailure
                | ErrorCode::DiskFull
                | ErrorCode::ReadOnly
                | ErrorCode::CannotOpen
                | ErrorCode::PermissionDenied
                | ErrorCode::OutOfMemory
                | ErrorCode::FileLockingProtocolFailed,
            ) => Self::Unavailable(error.into()),
            // Statements that can meet a stored row name the conflict themselves; this is what nobody foresaw.
            Some(ErrorCode::ConstraintViolation) => Self::Conflict("it contradicts what is stored".into()),
            _ => Self::Damaged(error.into()),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::error::Error;
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::store::scratch::ScratchDir;

    fn mode(path: &Path) -> u32 {
        path.metadata().unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn directory_and_files_are_for_their_owner_alone() {
        let dir = ScratchDir::new();
        let connection = open(dir.path()).unwrap();
        connection.execute("INSERT INTO probe VALUES (1, 0)", []).unwrap();
        assert_eq!(mode(dir.path()), 0o700);
        for file in ["gateway.db", "gateway.db-wal", "gateway.db-shm"] {
            assert_eq!(mode(&dir.path().join(file)), 0o600, "{file}");
        }
    }

    #[test]
    fn an_answered_write_is_synced_to_a_write_ahead_log() {
        let dir = ScratchDir::new();
        let connection = open(dir.path()).unwrap();
        let journal: String = connection.pragma_query_value(None, "journal_mode", |row| row.get(0)).unwrap();
        let synchronous: i64 = connection.pragma_query_value(None, "synchronous", |row| row.get(0)).unwrap();
        assert_eq!((journal.as_str(), synchronous), ("wal", 2));
    }

    #[test]
    fn a_file_of_a_newer_version_is_refused_and_says_so() {
        let dir = ScratchDir::new();
        open(dir.path()).unwrap().pragma_update(None, "user_version", 1000).unwrap();
        let refused = open(dir.path()).unwrap_err();
        assert!(matches!(refused, StoreError::Damaged(_)));
        assert!(refused.source().unwrap().to_string().contains("version 1000"));
    }

    #[test]
    fn what_is_not_a_store_is_refused_and_left_as_it_is() {
        let dir = ScratchDir::new();
        make_state_dir(dir.path()).unwrap();
        let path = path_in(dir.path());
        std::fs::write(&path, [b'x'; 4096]).unwrap();
        assert!(matches!(open(dir.path()), Err(StoreError::Damaged(_))));
        assert_eq!(std::fs::read(&path).unwrap(), [b'x'; 4096]);

        std::fs::remove_file(&path).unwrap();
        Connection::open(&path).unwrap().execute_batch("CREATE TABLE theirs (x)").unwrap();
        let before = std::fs::read(&path).unwrap();
        assert!(matches!(open(dir.path()), Err(StoreError::Damaged(_))));
        assert_eq!(std::fs::read(&path).unwrap(), before);
    }
}
