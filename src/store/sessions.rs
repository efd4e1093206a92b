//! The rows of process sessions: reserved before anything is sent, kept until the session is forgotten.

use rusqlite::{Connection, Row, params};

use super::embedded::{all, nanos, one, parsed, time, unknown_text};
use super::{PendingWrite, SessionRow, SessionState, Store, StoreError};
use crate::config::Secret;
use crate::protocol::ids::SessionId;

const SESSION: &str = "id, workspace, executor, environment, start_key, request_digest, request, process, \
     executor_session, state, exit_code, detail, created_at, ended_at, stdin_accepted, stdin_eof, \
     write_id, write_length, write_digest, exit_seq";

/// What became of a reservation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reserved {
    /// The row is new.
    New,
    /// The workspace has used the key before, for this.
    Known(Box<SessionRow>),
}

impl Store {
    /// Reserves a session, unless the workspace has one under the same start key.
    ///
    /// # Errors
    /// `Conflict` when the id is taken.
    pub async fn reserve_session(&self, row: SessionRow) -> Result<Reserved, StoreError> {
        self.write(move |tx| {
            if let Some(key) = &row.start_key
                && let Some(known) = one(
                    tx,
                    &format!("SELECT {SESSION} FROM sessions WHERE workspace = ? AND start_key = ?"),
                    [row.workspace.as_str(), key],
                    session_from,
                )?
            {
                return Ok(Reserved::Known(Box::new(known)));
            }
            insert(tx, &row)?;
            Ok(Reserved::New)
        })
        .await
    }

    /// Stores what changes in a session's life. A session that was forgotten meanwhile stays so.
    pub async fn save_session(&self, row: SessionRow) -> Result<(), StoreError> {
        self.write(move |tx| {
            let write = row.pending_write.as_ref();
            tx.prepare_cached(
                "UPDATE sessions SET executor_session = ?2, state = ?3, exit_code = ?4, detail = ?5, ended_at = ?6,
                 stdin_accepted = ?7, stdin_eof = ?8, write_id = ?9, write_length = ?10, write_digest = ?11,
                 exit_seq = ?12 WHERE id = ?1",
            )?
            .execute(params![
                row.id.as_str(),
                row.executor_session.as_ref().map(Secret::expose),
                row.state.as_str(),
                row.exit_code,
                row.detail,
                row.ended_at.map(nanos),
                i64::try_from(row.stdin_accepted).unwrap_or(i64::MAX),
                row.stdin_eof,
                write.map(|write| write.id.as_str()),
                write.map(|write| i64::try_from(write.length).unwrap_or(i64::MAX)),
                write.map(|write| write.digest.to_vec()),
                row.exit_seq.map(|seq| i64::try_from(seq).unwrap_or(i64::MAX)),
            ])?;
            Ok(())
        })
        .await
    }

    /// All sessions, oldest first.
    pub async fn sessions(&self) -> Result<Vec<SessionRow>, StoreError> {
        self.read(|db| all(db, &format!("SELECT {SESSION} FROM sessions ORDER BY seq"), [], session_from)).await
    }

    /// Forgets a session; an unknown one is forgotten already.
    pub async fn forget_session(&self, id: &SessionId) -> Result<(), StoreError> {
        let id = id.clone();
        self.write(move |tx| {
            tx.execute("DELETE FROM sessions WHERE id = ?", [id.as_str()])?;
            Ok(())
        })
        .await
    }
}

fn insert(db: &Connection, row: &SessionRow) -> Result<(), StoreError> {
    db.prepare_cached(
        "INSERT INTO sessions (id, workspace, executor, environment, start_key, request_digest, request, process,
         state, created_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    )?
    .execute(params![
        row.id.as_str(),
        row.workspace.as_str(),
        row.executor.as_str(),
        row.environment.as_str(),
        row.start_key,
        row.request_digest,
        row.request,
        row.process,
        row.state.as_str(),
        nanos(row.created_at),
    ])?;
    Ok(())
}

fn session_from(row: &Row<'_>) -> rusqlite::Result<SessionRow> {
    let unsigned = |value: i64| u64::try_from(value).unwrap_or(0);
    let state: String = row.get(9)?;
    let write: Option<String> = row.get(16)?;
    let pending_write = match write {
        None => None,
        Some(id) => Some(PendingWrite { id, length: unsigned(row.get(17)?), digest: row.get(18)? }),
    };
    Ok(SessionRow {
        id: parsed(row, 0)?,
        workspace: parsed(row, 1)?,
        executor: parsed(row, 2)?,
        environment: parsed(row, 3)?,
        start_key: row.get(4)?,
        request_digest: row.get(5)?,
        request: row.get(6)?,
        process: row.get(7)?,
        executor_session: row.get::<_, Option<String>>(8)?.map(Secret::new),
        state: SessionState::from_word(&state).ok_or_else(|| unknown_text(9, "session state"))?,
        exit_code: row.get(10)?,
        exit_seq: row.get::<_, Option<i64>>(19)?.map(unsigned),
        detail: row.get(11)?,
        created_at: time(row.get(12)?),
        ended_at: row.get::<_, Option<i64>>(13)?.map(time),
        stdin_accepted: unsigned(row.get(14)?),
        stdin_eof: row.get(15)?,
        pending_write,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::store::scratch::ScratchDir;

    fn row(id: &str, key: Option<&str>) -> SessionRow {
        SessionRow {
            id: SessionId::new(id).unwrap(),
            workspace: "w".parse().unwrap(),
            executor: "exe_1".parse().unwrap(),
            environment: "box".parse().unwrap(),
            start_key: key.map(str::to_owned),
            request_digest: [7; 32],
            request: "{}".into(),
            process: format!("p_{id}"),
            executor_session: None,
            state: SessionState::Starting,
            exit_code: None,
            exit_seq: None,
            detail: None,
            created_at: time(nanos(SystemTime::now())),
            ended_at: None,
            stdin_accepted: 0,
            stdin_eof: false,
            pending_write: None,
        }
    }

    #[tokio::test]
    async fn a_start_key_stands_for_one_session_of_its_workspace() {
        let dir = ScratchDir::new();
        let store = Store::open(dir.path()).unwrap();
        let first = row("s1", Some("k"));
        assert_eq!(store.reserve_session(first.clone()).await.unwrap(), Reserved::New);
        assert_eq!(store.reserve_session(row("s2", Some("k"))).await.unwrap(), Reserved::Known(Box::new(first)));
        let elsewhere = SessionRow { workspace: "v".parse().unwrap(), ..row("s3", Some("k")) };
        assert_eq!(store.reserve_session(elsewhere).await.unwrap(), Reserved::New);
        assert_eq!(store.reserve_session(row("s4", None)).await.unwrap(), Reserved::New);
        assert_eq!(store.reserve_session(row("s5", None)).await.unwrap(), Reserved::New);
    }

    #[tokio::test]
    async fn what_changes_in_a_session_is_there_after_a_restart() {
        let dir = ScratchDir::new();
        let store = Store::open(dir.path()).unwrap();
        store.reserve_session(row("s1", None)).await.unwrap();
        let later = SessionRow {
            executor_session: Some(Secret::new("secret".into())),
            state: SessionState::Running,
            exit_seq: Some(4),
            stdin_accepted: 9,
            pending_write: Some(PendingWrite { id: "w1".into(), length: 3, digest: [1; 32] }),
            ..store.sessions().await.unwrap().remove(0)
        };
        store.save_session(later.clone()).await.unwrap();
        drop(store);
        let store = Store::open(dir.path()).unwrap();
        assert_eq!(store.sessions().await.unwrap(), std::slice::from_ref(&later));
        store.forget_session(&later.id).await.unwrap();
        assert_eq!(store.sessions().await.unwrap(), []);
    }
}
