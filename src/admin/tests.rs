//! Commands as an operator gives them: through a real socket, and without a daemon.

#![allow(clippy::unwrap_used)]

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Mutex;

use exec_gateway_protocol::cap_token::CapToken;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::store::scratch::ScratchDir;
use crate::store::{StateLock, path_in};

fn workspace() -> WorkspaceId {
    WorkspaceId::new("a").unwrap()
}

fn named(text: &str) -> EnvironmentName {
    EnvironmentName::new(text).unwrap()
}

fn settings() -> AdminSettings {
    AdminSettings {
        public_url: None,
        listen: "0.0.0.0:6060".parse().unwrap(),
        revocations_max: 100,
        audit: config::Audit::default(),
    }
}

fn create_token() -> Request {
    Request::TokenCreate { workspace: workspace(), user: None, ttl: None, read_only: false }
}

fn create_executor(name: &str) -> Request {
    Request::ExecutorCreate { workspace: workspace(), name: named(name), default: false }
}

fn cap_token(ttl: Duration) -> Request {
    Request::CapToken { workspace: workspace(), turn: None, user: None, ttl }
}

async fn made_executor(admin: &Arc<Admin>, name: &str) -> ExecutorId {
    match admin.run(create_executor(name)).await.unwrap() {
        Response::ExecutorCreated { exe_id, .. } => exe_id,
        other => panic!("{other:?}"),
    }
}

/// An admin on a store of its own, with the changes it told.
fn admin() -> (ScratchDir, Arc<Admin>, Arc<Mutex<Vec<Change>>>) {
    let dir = ScratchDir::new();
    let changes = Arc::new(Mutex::new(Vec::new()));
    let seen = changes.clone();
    let admin = Admin::new(Store::open(dir.path()).unwrap(), settings(), Audit::disabled());
    let admin = admin.observed_by(move |change| seen.lock().unwrap().push(change.clone()));
    (dir, Arc::new(admin), changes)
}

/// The admin side of a running daemon.
struct Daemon {
    dir: ScratchDir,
    held: StateLock,
    changes: Arc<Mutex<Vec<Change>>>,
    stop: CancellationToken,
    served: tokio::task::JoinHandle<()>,
}

impl Daemon {
    fn start() -> Self {
        let (dir, admin, changes) = admin();
        let held = StateLock::acquire(dir.path()).unwrap();
        let listener = bind_admin(dir.path(), &held).unwrap();
        let stop = CancellationToken::new();
        let served = tokio::spawn(serve_admin(listener, admin, stop.clone()));
        Self { dir, held, changes, stop, served }
    }

    async fn run(&self, request: Request) -> Result<Response, AdminError> {
        execute(self.dir.path(), settings(), request).await
    }

    async fn send(&self, bytes: &[u8]) -> String {
        let mut socket = UnixStream::connect(socket_in(self.dir.path())).await.unwrap();
        // The daemon may answer and leave before it has read all.
        let _ = socket.write_all(bytes).await;
        let mut answer = Vec::new();
        let _ = socket.read_to_end(&mut answer).await;
        String::from_utf8(answer).unwrap()
    }
}

#[tokio::test]
async fn a_token_is_shown_once_and_stored_as_its_digest() {
    let (dir, admin, _) = admin();
    let ttl = Some(Duration::from_secs(60));
    let user = UserId::new("Ana").unwrap();
    let request = Request::TokenCreate { workspace: workspace(), user: Some(user.clone()), ttl, read_only: true };
    let Response::Token { id, token, expires_at, .. } = admin.run(request).await.unwrap() else { panic!() };
    assert_eq!((token.expose().len(), &token.expose()[..4]), (47, "egw_"));
    assert_eq!((id.as_str().len(), &id.as_str()[..4]), (16, "tok_"));

    let digest = Sha256::digest(token.expose()).into();
    let stored = admin.store.token_by_digest(digest).await.unwrap().unwrap();
    assert_eq!((&stored.id, stored.workspace, stored.user, stored.read_only), (&id, workspace(), Some(user), true));
    assert_eq!(stored.expires_at.map(rfc3339), expires_at);

    let Response::Tokens(listed) = admin.run(Request::TokenList).await.unwrap() else { panic!() };
    assert_eq!((listed.len(), &listed[0].id, &listed[0].expires_at), (1, &id, &expires_at));
    for entry in std::fs::read_dir(dir.path()).unwrap() {
        let bytes = std::fs::read(entry.unwrap().path()).unwrap();
        assert!(!bytes.windows(47).any(|window| window == token.expose().as_bytes()));
    }
}

#[tokio::test]
async fn an_executor_comes_with_its_derived_token_and_a_command_to_paste() {
    let (_dir, admin, changes) = admin();
    let answer = admin.run(create_executor("box")).await.unwrap();
    let Response::ExecutorCreated { exe_id, token, command, .. } = answer else { panic!() };
    let stored = admin.store.executor(&exe_id).await.unwrap().unwrap();
    let key = admin.store.keyring(KeyPurpose::Executor).await.unwrap().current;
    assert_eq!(token.expose(), stored.token(&key).as_str());
    let (token, url) = (token.expose(), "http://127.0.0.1:6060");
    let flags = format!("--remote {url} --environment-id {exe_id} --registration-bearer-stdin");
    assert_eq!(command.expose(), format!("printf '%s\\n' {token} | codex exec-server {flags}"));
    assert_eq!(*changes.lock().unwrap(), [Change::Bound { workspace: workspace() }]);
}

#[tokio::test]
async fn the_command_to_paste_quotes_what_a_shell_would_read() {
    assert_eq!(shell_word("https://gw.example/base_1"), "https://gw.example/base_1");
    assert_eq!(shell_word("http://[::1]:6060"), "'http://[::1]:6060'");
    assert_eq!(shell_word("a'; rm -rf ~; '"), r"'a'\''; rm -rf ~; '\'''");
    assert_eq!(shell_word(""), "''");
}

#[tokio::test]
async fn executors_are_listed_with_their_bindings() {
    let (_dir, admin, _) = admin();
    let executor = made_executor(&admin, "box").await;
    let other = WorkspaceId::new("b").unwrap();
    let bind = Request::ExecutorBind {
        executor: executor.clone(),
        workspace: other.clone(),
        name: named("guest"),
        default: true,
    };
    assert_eq!(admin.run(bind).await, Ok(Response::Bound));
    let list = async |workspace| match admin.run(Request::ExecutorList { workspace }).await.unwrap() {
        Response::Executors(executors) => executors,
        other => panic!("{other:?}"),
    };
    let everywhere = list(None).await;
    assert_eq!((everywhere.len(), &everywhere[0].exe_id, &everywhere[0].last_seen), (1, &executor, &None));
    let [own, guest] = &everywhere[0].bindings[..] else { panic!() };
    assert_eq!((own.name.as_str(), own.default), ("box", false));
    assert_eq!(*guest, BindingEntry { workspace: other.clone(), name: named("guest"), default: true });
    assert_eq!(list(Some(other)).await[0].bindings, everywhere[0].bindings[1..]);
    assert_eq!(list(Some(WorkspaceId::new("c").unwrap())).await, []);
}

#[tokio::test]
async fn every_change_is_told_and_no_failure_is() {
    let (_dir, admin, changes) = admin();
    let executor = made_executor(&admin, "box").await;
    let Response::Token { id, .. } = admin.run(create_token()).await.unwrap() else { panic!() };
    changes.lock().unwrap().clear();

    let turn = TurnId::new("t1").unwrap();
    let rename = || Request::ExecutorRename { executor: executor.clone(), workspace: workspace(), name: named("new") };
    let unbind = || Request::ExecutorUnbind { executor: executor.clone(), workspace: workspace() };
    let requests = [
        Request::TokenRevoke { id: id.clone() },
        rename(),
        unbind(),
        Request::ExecutorDelete { executor: executor.clone() },
        Request::RevokeTurn { turn: turn.clone() },
    ];
    for request in requests {
        assert_eq!(admin.run(request).await, Ok(Response::Done));
    }
    for request in [Request::TokenRevoke { id: id.clone() }, rename(), unbind()] {
        assert!(matches!(admin.run(request).await, Err(AdminError::NotFound(_))));
    }
    let revocation = admin.store.revocations().await.unwrap().remove(0);
    assert_eq!(revocation.scope, RevocationScope::Turn(turn));
    assert_eq!(
        *changes.lock().unwrap(),
        [
            Change::TokenRevoked(id),
            Change::Bound { workspace: workspace() },
            Change::Unbound { workspace: workspace(), executor: executor.clone() },
            Change::ExecutorDeleted(executor),
            Change::Revoked(revocation),
        ]
    );
}

#[tokio::test]
async fn a_change_is_told_although_its_caller_left() {
    let (_dir, admin, changes) = admin();
    {
        let mut run = Box::pin(admin.run(Request::RevokeWorkspace { workspace: workspace() }));
        assert!(futures_util::poll!(&mut run).is_pending());
    }
    let told = || !changes.lock().unwrap().is_empty();
    while !told() {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_minted_cap_token_is_valid_for_its_workspace_until_its_end() {
    let (_dir, admin, _) = admin();
    let user = UserId::new("Ana").unwrap();
    let ttl = Duration::from_secs(60);
    let request = Request::CapToken { workspace: workspace(), turn: None, user: Some(user.clone()), ttl };
    let Response::CapToken { token } = admin.run(request).await.unwrap() else { panic!() };
    let key = admin.store.keyring(KeyPurpose::CapToken).await.unwrap().current;
    let parsed = CapToken::parse(token.expose()).unwrap();
    assert_eq!(parsed.kid(), Some(key.kid.as_str()));
    let claims = parsed.verify(&key.secret, 0).unwrap();
    assert_eq!((claims.workspace_id, claims.user_id, claims.skip_audit), (workspace(), Some(user), false));
    assert!(claims.turn_id.as_str().starts_with("cli_"));
    assert_eq!(claims.exp - claims.iat, 60);
}

#[tokio::test]
async fn a_cap_token_minted_after_a_revocation_does_not_fall_under_it() {
    let (_dir, admin, _) = admin();
    admin.run(Request::RevokeWorkspace { workspace: workspace() }).await.unwrap();
    let Response::CapToken { token } = admin.run(cap_token(DAY)).await.unwrap() else { panic!() };
    let key = admin.store.keyring(KeyPurpose::CapToken).await.unwrap().current;
    let claims = CapToken::parse(token.expose()).unwrap().verify(&key.secret, 0).unwrap();
    let revocation = admin.store.revocations().await.unwrap().remove(0);
    assert!(claims.iat > unix_secs(revocation.revoked_at));
    assert!(claims.exp < unix_secs(revocation.forget_at));
}

#[tokio::test]
async fn lives_that_make_no_sense_are_refused() {
    let (_dir, admin, _) = admin();
    let token = |ttl| Request::TokenCreate { workspace: workspace(), user: None, ttl: Some(ttl), read_only: false };
    let wrong =
        [cap_token(Duration::ZERO), cap_token(CAP_TOKEN_TTL_MAX + DAY), token(Duration::ZERO), token(Duration::MAX)];
    for request in wrong {
        assert!(matches!(admin.run(request).await, Err(AdminError::Refused(_))));
    }
    assert!(admin.run(cap_token(CAP_TOKEN_TTL_MAX)).await.is_ok());
}

#[tokio::test]
async fn secrets_are_in_the_json_of_an_answer_and_not_in_its_debug_output() {
    let (_dir, admin, _) = admin();
    for request in [create_token(), create_executor("box"), cap_token(DAY)] {
        let answer = admin.run(request).await.unwrap();
        let json = answer.json();
        let token = json["token"].as_str().unwrap();
        assert!(token.len() > 40 && !format!("{answer:?}").contains(token));
    }
    assert!(Response::Done.json().is_null());
    assert_eq!(admin.run(Request::TokenList).await.unwrap().json().as_array().map(Vec::len), Some(1));
}

#[tokio::test]
async fn a_command_reaches_the_running_daemon_which_tells_the_change_first() {
    let daemon = Daemon::start();
    let Response::Token { id, .. } = daemon.run(create_token()).await.unwrap() else { panic!() };
    assert_eq!(daemon.run(Request::TokenRevoke { id: id.clone() }).await, Ok(Response::Done));
    assert_eq!(*daemon.changes.lock().unwrap(), [Change::TokenRevoked(id.clone())]);
    let refused = daemon.run(Request::TokenRevoke { id: id.clone() }).await;
    assert_eq!(refused, Err(AdminError::NotFound(format!("there is no token {id}"))));
}

#[tokio::test]
async fn the_socket_is_for_its_owner_alone() {
    let daemon = Daemon::start();
    let mode = socket_in(daemon.dir.path()).metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[tokio::test]
async fn a_line_is_answered_by_a_line() {
    let daemon = Daemon::start();
    assert_eq!(daemon.send(b"{\"command\":\"token_list\"}\n").await, "{\"ok\":{\"answer\":\"tokens\",\"value\":[]}}\n");
    let ghost = b"{\"command\":\"token_revoke\",\"id\":\"tok_x\"}\n";
    let missing = "{\"error\":{\"code\":\"not_found\",\"message\":\"there is no token tok_x\"}}\n";
    assert_eq!(daemon.send(ghost).await, missing);
}

#[tokio::test]
async fn what_is_no_request_or_too_long_is_refused() {
    let daemon = Daemon::start();
    for line in [&b"hello\n"[..], b"{\"command\":\"executor_delete\",\"executor\":\"../x\"}\n"] {
        assert!(daemon.send(line).await.starts_with("{\"error\":{\"code\":\"refused\",\"message\":\"not a request"));
    }
    // Spaces are JSON: only the length tells these two apart.
    let padded = |len: usize| [&b"{\"command\":\"token_list\"}"[..], &vec![b' '; len - 25], b"\n"].concat();
    assert!(daemon.send(&padded(64 * 1024)).await.starts_with("{\"ok\""));
    assert!(daemon.send(&padded(64 * 1024 + 1)).await.contains("at most 65536 bytes"));
}

#[tokio::test]
async fn more_connections_than_are_served_at_once_wait_and_are_all_served() {
    let daemon = Daemon::start();
    let asked = (0..100).map(|_| daemon.run(create_token()));
    let answers = futures_util::future::join_all(asked).await;
    assert!(answers.iter().all(Result::is_ok), "{answers:?}");
}

#[tokio::test]
async fn stopping_ends_connections_that_ask_nothing() {
    let daemon = Daemon::start();
    let mut silent = UnixStream::connect(socket_in(daemon.dir.path())).await.unwrap();
    daemon.run(Request::TokenList).await.unwrap();
    daemon.stop.cancel();
    daemon.served.await.unwrap();
    assert_eq!(silent.read(&mut [0]).await.unwrap(), 0);
}

#[tokio::test]
async fn without_a_daemon_the_command_works_on_the_store_itself() {
    let dir = ScratchDir::new();
    let run = async |request| execute(dir.path(), settings(), request).await;
    run(create_executor("box")).await.unwrap();
    assert!(matches!(run(create_executor("box")).await, Err(AdminError::Conflict(_))));
    let Response::Executors(listed) = run(Request::ExecutorList { workspace: None }).await.unwrap() else { panic!() };
    assert_eq!(listed.len(), 1);
    StateLock::acquire(dir.path()).unwrap();
}

#[tokio::test]
async fn a_socket_that_a_dead_daemon_left_stops_neither_a_command_nor_the_next_daemon() {
    let Daemon { dir, held, stop, served, .. } = Daemon::start();
    stop.cancel();
    served.await.unwrap();
    drop(held);
    assert!(socket_in(dir.path()).exists());
    execute(dir.path(), settings(), create_token()).await.unwrap();
    let held = StateLock::acquire(dir.path()).unwrap();
    bind_admin(dir.path(), &held).unwrap();
}

#[tokio::test]
async fn commands_at_once_without_a_daemon_take_turns() {
    let dir = ScratchDir::new();
    let asked =
        (0..8).map(|i| execute(dir.path(), settings(), create_executor(&format!("box-{i}")))).collect::<Vec<_>>();
    let answers = futures_util::future::join_all(asked).await;
    assert!(answers.iter().all(Result::is_ok), "{answers:?}");
}

#[tokio::test(start_paused = true)]
async fn a_daemon_that_never_listens_is_given_up_and_named() {
    let dir = ScratchDir::new();
    let _held = StateLock::acquire(dir.path()).unwrap();
    let refused = execute(dir.path(), settings(), create_token()).await.unwrap_err();
    assert!(matches!(&refused, AdminError::Unavailable(text) if text.contains("does not listen")), "{refused:?}");
    assert!(!path_in(dir.path()).exists());
}

#[tokio::test]
async fn a_command_waits_for_a_daemon_that_is_starting() {
    let (dir, admin, _) = admin();
    let held = StateLock::acquire(dir.path()).unwrap();
    let mut command = Box::pin(execute(dir.path(), settings(), create_token()));
    // It finds the lock held and nobody listening, and sleeps.
    assert!(futures_util::poll!(&mut command).is_pending());
    let listener = bind_admin(dir.path(), &held).unwrap();
    tokio::spawn(serve_admin(listener, admin.clone(), CancellationToken::new()));
    command.await.unwrap();
    assert_eq!(admin.store.tokens().await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_store_of_another_version_is_named_as_the_cause() {
    let dir = ScratchDir::new();
    execute(dir.path(), settings(), create_token()).await.unwrap();
    let db = rusqlite::Connection::open(path_in(dir.path())).unwrap();
    db.pragma_update(None, "user_version", 1000).unwrap();
    let refused = execute(dir.path(), settings(), create_token()).await.unwrap_err();
    assert!(matches!(&refused, AdminError::Damaged(text) if text.contains("version 1000")), "{refused:?}");
}

#[tokio::test]
async fn a_path_too_long_for_a_socket_does_not_stop_commands() {
    let dir = ScratchDir::new();
    let deep = dir.path().join("d".repeat(120));
    execute(Path::new(&deep), settings(), create_token()).await.unwrap();
}
