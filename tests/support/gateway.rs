//! A gateway for one test: inside the test's process, or as the real daemon where a test stops and starts it.

use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use exec_gateway::admin::{Request, Response};
use exec_gateway::config::{Config, ConfigFaults};
use exec_gateway::gateway::{Gateway, Reloaded};
use exec_gateway::protocol::ids::{EnvironmentName, TokenId, WorkspaceId};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use super::{Caller, PATIENCE, Scratch, eventually};

/// A gateway inside this process.
pub struct TestGateway {
    pub gateway: Gateway,
    pub state: Arc<Scratch>,
}

/// An executor that operators made, with what it needs to register.
#[derive(Debug, Clone)]
pub struct Credentials {
    pub executor: String,
    pub token: String,
}

impl TestGateway {
    pub async fn start() -> Self {
        Self::with(|_| {}).await
    }

    pub async fn with(change: impl FnOnce(&mut Config)) -> Self {
        Self::on(Arc::new(Scratch::new()), change).await
    }

    /// A gateway on the state of an earlier one.
    pub async fn on(state: Arc<Scratch>, change: impl FnOnce(&mut Config)) -> Self {
        let mut config = Config { state_dir: Some(state.path().to_owned()), ..Config::default() };
        config.listen = vec!["127.0.0.1:0".parse().unwrap()];
        config.ops_listen = "127.0.0.1:0".parse().unwrap();
        change(&mut config);
        assert_eq!(config.validate(), vec![], "a test runs on a configuration that the daemon accepts");
        Self { gateway: Gateway::start(config).await.unwrap(), state }
    }

    pub fn address(&self) -> SocketAddr {
        self.gateway.listen()[0]
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address())
    }

    /// Has the gateway read its configuration and its files again, with this changed.
    pub fn reload(&self, change: impl FnOnce(&mut Config)) -> Result<Reloaded, ConfigFaults> {
        let mut config = (*self.gateway.api().config.now()).clone();
        change(&mut config);
        self.gateway.reloading().reload(Ok(config))
    }

    /// Carries out an operator's command.
    pub async fn admin(&self, request: Request) -> Response {
        self.gateway.admin().run(request).await.unwrap()
    }

    /// A caller with a fresh token of the workspace.
    pub async fn caller(&self, workspace: &str) -> Caller {
        self.caller_and_token(workspace).await.0
    }

    /// The same with the token's public id, by which operators revoke it.
    pub async fn caller_and_token(&self, workspace: &str) -> (Caller, TokenId) {
        let workspace = WorkspaceId::new(workspace).unwrap();
        let request = Request::TokenCreate { workspace, user: None, ttl: None, read_only: false };
        let Response::Token { id, token, .. } = self.admin(request).await else { panic!("no token") };
        (Caller::new(self.address(), Some(token.expose().to_owned())), id)
    }

    /// A caller without a token.
    pub fn stranger(&self) -> Caller {
        Caller::new(self.address(), None)
    }

    /// An executor bound to the workspace under that name.
    pub async fn executor(&self, workspace: &str, name: &str) -> Credentials {
        let (workspace, name) = (WorkspaceId::new(workspace).unwrap(), EnvironmentName::new(name).unwrap());
        match self.admin(Request::ExecutorCreate { workspace, name, default: false }).await {
            Response::ExecutorCreated { exe_id, token, .. } => {
                Credentials { executor: exe_id.to_string(), token: token.expose().to_owned() }
            }
            other => panic!("no executor: {other:?}"),
        }
    }
}

/// The real daemon as its own process.
pub struct DaemonProcess {
    child: Child,
    log: Arc<Mutex<Vec<String>>>,
    pub address: SocketAddr,
    pub ops: SocketAddr,
}

impl DaemonProcess {
    /// Starts the daemon on this state and waits for its ready line. Port 0 lets the system choose.
    pub async fn start(state: &Scratch, listen: SocketAddr, arguments: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_exec-gateway"));
        command.args(["serve", "--listen", &listen.to_string()]).args(arguments);
        Self::ready(command, state).await
    }

    /// The same under a service manager that listens on `notify`, and wants to hear of it every `watchdog`.
    pub async fn start_watched(state: &Scratch, notify: &Path, watchdog: Duration) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_exec-gateway"));
        command.args(["serve", "--listen", "127.0.0.1:0"]);
        command.env("NOTIFY_SOCKET", notify).env("WATCHDOG_USEC", watchdog.as_micros().to_string());
        Self::ready(command, state).await
    }

    /// The same on a listening socket that outlives the daemon, as service managers hand it over; through a program of
    /// that kind if there is one.
    pub async fn start_on(state: &Scratch, held: &TcpListener, activator: Option<&str>) -> Self {
        let mut command = Command::new("sh");
        command
            .args(["-c", "LISTEN_FDS=1 LISTEN_PID=$$ exec \"$0\" \"$@\" 3<&0 </dev/null"])
            .args(activator)
            .args([env!("CARGO_BIN_EXE_exec-gateway"), "serve"])
            .stdin(OwnedFd::from(held.try_clone().unwrap()));
        Self::ready(command, state).await
    }

    /// The same as a process that a full disk does not end: writes past a limit of file sizes fail, as on a disk.
    pub async fn start_on_small_disk(state: &Scratch, arguments: &[&str]) -> Self {
        let mut command = Command::new("sh");
        command.args(["-c", "trap '' XFSZ; exec \"$0\" serve \"$@\"", env!("CARGO_BIN_EXE_exec-gateway")]);
        command.args(["--listen", "127.0.0.1:0"]).args(arguments);
        Self::ready(command, state).await
    }

    /// The same with so much memory for its data (RLIMIT_DATA); more is refused to it, which ends it.
    pub async fn start_in_memory(state: &Scratch, data_mib: u64, arguments: &[&str]) -> Self {
        let mut command = Command::new("sh");
        let limited = format!("ulimit -d {}; exec \"$0\" serve \"$@\"", data_mib * 1024);
        command.args(["-c", &limited, env!("CARGO_BIN_EXE_exec-gateway"), "--listen", "127.0.0.1:0"]).args(arguments);
        Self::ready(command, state).await
    }

    async fn ready(mut command: Command, state: &Scratch) -> Self {
        let mut child = command
            .args(["--state-dir", state.path().to_str().unwrap(), "--ops-listen", "127.0.0.1:0"])
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let ready = tokio::time::timeout(PATIENCE, async {
            loop {
                let line = lines.next_line().await.unwrap().expect("the daemon ended before it was ready");
                if let Some(ready) = line.strip_prefix("exec-gateway ready ") {
                    return ready.to_owned();
                }
                eprintln!("daemon: {line}");
            }
        });
        let ready = ready.await.expect("the daemon was not ready in time");
        let log = Arc::new(Mutex::new(Vec::new()));
        let kept = log.clone();
        tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                eprintln!("daemon: {line}");
                kept.lock().unwrap().push(line);
            }
        });
        let field = |name: &str| {
            let field = ready.split(' ').find_map(|field| field.strip_prefix(name)).unwrap();
            field.parse().unwrap()
        };
        Self { child, log, address: field("listen="), ops: field("ops=") }
    }

    /// Has it read its configuration again.
    pub async fn hang_up(&self) {
        assert!(Command::new("kill").args(["-HUP", &self.pid().to_string()]).status().await.unwrap().success());
    }

    /// What it has logged so far that holds this text.
    pub fn lines(&self, text: &str) -> Vec<String> {
        self.log.lock().unwrap().iter().filter(|line| line.contains(text)).cloned().collect()
    }

    /// Waits until it has logged so many lines with this text.
    pub async fn says(&self, text: &str, lines: usize) {
        eventually(text, async || (self.lines(text).len() >= lines).then_some(())).await;
    }

    /// The daemon's process id.
    pub fn pid(&self) -> u32 {
        self.child.id().expect("the daemon runs")
    }

    /// An operator's command on the daemon of this state, as its command line carries it out.
    pub async fn operate(state: &Scratch, arguments: &[&str]) -> Value {
        let mut command = Command::new(env!("CARGO_BIN_EXE_exec-gateway"));
        command.args(arguments).args(["--json", "--state-dir", state.path().to_str().unwrap()]);
        let output = command.output().await.unwrap();
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Asks the daemon to stop; gives its exit code.
    pub async fn terminate(mut self) -> Option<i32> {
        let pid = self.child.id().unwrap().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().await.unwrap().success());
        self.child.wait().await.unwrap().code()
    }

    /// Kills the daemon without a warning.
    pub async fn kill(mut self) {
        self.child.kill().await.unwrap();
    }
}

/// A caller of workspace `w` and the credentials of its environment `box`, made at a running daemon.
pub async fn workspace(state: &Scratch, daemon: &DaemonProcess) -> (Caller, Credentials) {
    environment(state, daemon, "box").await
}

/// The same with an environment of another name.
pub async fn environment(state: &Scratch, daemon: &DaemonProcess, name: &str) -> (Caller, Credentials) {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let token = DaemonProcess::operate(state, &["token", "create", "--workspace", "w"]).await;
    let executor = DaemonProcess::operate(state, &["executor", "create", "--workspace", "w", "--name", name]).await;
    let credentials = Credentials { executor: text(&executor["exe_id"]), token: text(&executor["token"]) };
    (Caller::new(daemon.address, Some(text(&token["token"]))), credentials)
}

/// An address that stays free while its gateway is away: below the ports that the system hands out by itself.
pub fn free_address() -> SocketAddr {
    loop {
        let port = 20_000 + (uuid::Uuid::new_v4().as_u128() % 10_000) as u16;
        if let Ok(listener) = TcpListener::bind(("127.0.0.1", port)) {
            return listener.local_addr().unwrap();
        }
    }
}
