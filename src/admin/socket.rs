//! Operator commands over `admin.sock` in the state directory: one JSON line asks, one JSON line answers, and the
//! connection ends. Whoever may open the socket is an operator; nothing here looks into commands.

use std::io::{self, ErrorKind};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use zeroize::Zeroizing;

use super::{Admin, AdminError, AdminSettings, Request, Response};
use crate::audit::{self, Audit};
use crate::store::{StateLock, Store, StoreError};

/// Size of a request with its line end, in bytes.
const REQUEST_BYTES_MAX: u64 = 64 * 1024;

/// Size of an answer, in bytes: a list of a hundred thousand executors has about 30 MiB.
const ANSWER_BYTES_MAX: u64 = 256 * 1024 * 1024;

/// Time for a connection from its acceptance to the end of its answer.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);

/// Connections served at once; further ones wait in the backlog.
const CONNECTIONS_MAX: usize = 32;

/// Pause after a failed accept, which is mostly a lack of file descriptors and would fail again at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long a command waits for a daemon that holds the state directory but does not listen yet, or for another
/// command that works on it.
const LOCK_TIMEOUT: Duration = Duration::from_secs(5);
const LOCK_RETRY: Duration = Duration::from_millis(50);

/// The daemon answers or ends the connection within its own timeout; the rest is for a busy machine.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Answer {
    Ok(Response),
    Error(AdminError),
}

/// The socket of a daemon that works on that state directory.
pub fn socket_in(state_dir: &Path) -> PathBuf {
    state_dir.join("admin.sock")
}

/// Binds the socket (0600) of the daemon that holds the state directory, in place of one that a dead daemon left.
/// Needs a runtime.
///
/// # Errors
/// Those of the file system; a path of more than about a hundred bytes is no socket's.
pub fn bind_admin(state_dir: &Path, _held: &StateLock) -> io::Result<UnixListener> {
    let path = socket_in(state_dir);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&path)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Serves commands until `stop`, then lets those that have begun finish, at most ten seconds.
pub async fn serve_admin(listener: UnixListener, admin: Arc<Admin>, stop: CancellationToken) {
    let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let connections = TaskTracker::new();
    let accept = async {
        loop {
            let permit = permits.clone().acquire_owned().await.expect("nobody closes the semaphore");
            match listener.accept().await {
                Ok((socket, _)) => {
                    let served = serve_connection(socket, admin.clone(), stop.clone());
                    connections.spawn(async move {
                        let _permit = permit;
                        match timeout(CONNECTION_TIMEOUT, served).await {
                            Ok(Ok(())) => {}
                            Ok(Err(error)) => tracing::debug!(%error, "an operator's connection broke"),
                            Err(_) => tracing::debug!("an operator's connection took too long"),
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept an operator's connection");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = accept => {}
    }
    drop(listener);
    connections.close();
    connections.wait().await;
}

async fn serve_connection(mut socket: UnixStream, admin: Arc<Admin>, stop: CancellationToken) -> io::Result<()> {
    // The mode of the socket says the same, but it is set a moment after binding, and the directory may be open.
    let permitted = is_operator(&socket)?;
    let (reads, mut writes) = socket.split();
    // One byte more than permitted tells a line that is too long from one that just fits.
    let mut reads = BufReader::new(reads.take(REQUEST_BYTES_MAX + 1));
    let mut line = Vec::new();
    tokio::select! {
        read = reads.read_until(b'\n', &mut line) => read?,
        () = stop.cancelled() => return Ok(()),
    };
    if line.is_empty() {
        return Ok(());
    }
    let result = if !permitted {
        Err(AdminError::Refused("only the user that runs the gateway may command it".into()))
    } else {
        match parse(&line) {
            Ok(request) => admin.run(request).await,
            Err(refused) => Err(refused),
        }
    };
    let answer = result.map_or_else(Answer::Error, Answer::Ok);
    let mut bytes = Zeroizing::new(serde_json::to_vec(&answer)?);
    bytes.push(b'\n');
    writes.write_all(&bytes).await
}

/// Whether the other end runs as the same user as this process, or as root.
fn is_operator(socket: &UnixStream) -> io::Result<bool> {
    let (own, _other) = UnixStream::pair()?;
    let peer = socket.peer_cred()?.uid();
    Ok(peer == 0 || peer == own.peer_cred()?.uid())
}

fn parse(line: &[u8]) -> Result<Request, AdminError> {
    if line.len() as u64 > REQUEST_BYTES_MAX {
        return Err(AdminError::Refused(format!("a request has at most {REQUEST_BYTES_MAX} bytes")));
    }
    serde_json::from_slice(line).map_err(|error| AdminError::Refused(format!("not a request: {error}")))
}

/// Runs a command in the daemon that works on the state directory, or here if none does.
///
/// Dropping the future leaves open whether the command is done.
///
/// # Errors
/// All of [`AdminError`]. After `Unavailable` from a daemon that broke off, the change may have been made.
pub async fn execute(state_dir: &Path, settings: AdminSettings, request: Request) -> Result<Response, AdminError> {
    let deadline = Instant::now() + LOCK_TIMEOUT;
    loop {
        if let Some(socket) = connect(state_dir).await? {
            return timeout(ANSWER_TIMEOUT, ask(socket, &request)).await.unwrap_or_else(|_| {
                Err(AdminError::Unavailable(
                    "the gateway does not answer; whether it made the change is unknown".into(),
                ))
            });
        }
        match StateLock::acquire(state_dir) {
            Ok(_held) => {
                let audit = Audit::open(&state_dir.join(audit::DIRECTORY), settings.audit.clone())
                    .map_err(|error| AdminError::unavailable("the audit log cannot be opened", error))?;
                let admin = Arc::new(Admin::new(Store::open(state_dir)?, settings, audit.clone()));
                let result = admin.run(request).await;
                let _ = tokio::task::spawn_blocking(move || audit.close()).await;
                return result;
            }
            Err(StoreError::Conflict(_)) if Instant::now() < deadline => sleep(LOCK_RETRY).await,
            Err(StoreError::Conflict(text)) => {
                let socket = socket_in(state_dir);
                return Err(AdminError::Unavailable(format!("{text} but does not listen on {}", socket.display())));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// A connection to the daemon; `None` if none listens.
async fn connect(state_dir: &Path) -> Result<Option<UnixStream>, AdminError> {
    match UnixStream::connect(socket_in(state_dir)).await {
        Ok(socket) => Ok(Some(socket)),
        Err(error) => match error.kind() {
            // Refused: a dead daemon left it. Invalid: the path is too long, so no daemon can listen there either.
            // Would block: the backlog of a live daemon is full, and it holds the lock, so this is tried again.
            ErrorKind::NotFound
            | ErrorKind::NotADirectory
            | ErrorKind::ConnectionRefused
            | ErrorKind::InvalidInput
            | ErrorKind::WouldBlock => Ok(None),
            ErrorKind::PermissionDenied => {
                Err(AdminError::Refused("only the user that runs the gateway may command it".into()))
            }
            _ => Err(AdminError::unavailable("cannot reach the gateway", error)),
        },
    }
}

async fn ask(mut socket: UnixStream, request: &Request) -> Result<Response, AdminError> {
    let broke = |error: io::Error| {
        AdminError::unavailable("the gateway broke off; whether it made the change is unknown", error)
    };
    let mut line = serde_json::to_vec(request).expect("a request is texts, flags and numbers");
    line.push(b'\n');
    socket.write_all(&line).await.map_err(broke)?;
    let mut bytes = Zeroizing::new(Vec::new());
    (&mut socket).take(ANSWER_BYTES_MAX).read_to_end(&mut bytes).await.map_err(broke)?;
    // The parser's text is left out: it could quote a secret of the answer.
    match serde_json::from_slice(&bytes) {
        Ok(Answer::Ok(response)) => Ok(response),
        Ok(Answer::Error(error)) => Err(error),
        Err(_) => Err(broke(ErrorKind::UnexpectedEof.into())),
    }
}
