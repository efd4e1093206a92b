//! The real executor: `codex exec-server --remote` of the pinned version, unmodified.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use exec_gateway::config::Config;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, Command};

use super::gateway::{Credentials, TestGateway};
use super::{Caller, Scratch, eventually};

/// One executor process with a home of its own.
pub struct CodexExecutor {
    child: Child,
    home: Scratch,
}

/// The executor's program, as `make test` installs it.
pub fn program() -> PathBuf {
    let modules = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/support/node_modules");
    let program = modules.join(".bin/codex");
    assert!(program.exists(), "the real executor is not installed: run `make test`, which installs it");
    program
}

/// The program with these arguments, a home of its own and nothing of this process's variables.
pub fn process(home: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(program());
    command
        .args(arguments)
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("HOME", home)
        .env("CODEX_HOME", home)
        .env("NO_PROXY", "127.0.0.1,localhost")
        .current_dir(home)
        .stderr(if std::env::var_os("EXECUTOR_LOG").is_some() { Stdio::inherit() } else { Stdio::null() })
        // Its own process group: the launcher has a native child, and both must end with the test.
        .process_group(0)
        .kill_on_drop(true);
    command
}

/// Runs the command in namespaces of its own: `setup` first, by a shell that may mount, then the command without the
/// right to pass over the modes of files, whoever runs the test.
pub fn in_namespaces(command: &mut Command, setup: &str) {
    let inner = std::mem::replace(command, Command::new("unshare"));
    let inner = inner.as_std();
    command
        .args(["-rm", "sh", "-c", &format!("{setup}\nexec unshare -U -- \"$0\" \"$@\"")])
        .arg(inner.get_program())
        .args(inner.get_args())
        .env_clear()
        .envs(inner.get_envs().filter_map(|(name, value)| Some((name, value?))))
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .kill_on_drop(true);
    if let Some(directory) = inner.get_current_dir() {
        command.current_dir(directory);
    }
}

/// Whether this machine lets anybody make namespaces; a test that cannot do without says so and is over.
pub fn has_namespaces() -> bool {
    let tried = std::process::Command::new("unshare").args(["-rm", "unshare", "-U", "true"]).status();
    let has = tried.is_ok_and(|status| status.success());
    if !has {
        eprintln!("no namespaces on this machine: not tested");
    }
    has
}

/// Kills launcher and program at once.
pub fn kill_group(child: &Child) {
    if let Some(pid) = child.id() {
        let _ = std::process::Command::new("kill").args(["-KILL", "--", &format!("-{pid}")]).status();
    }
}

impl CodexExecutor {
    /// Starts an executor that registers at the gateway of this base URL.
    pub async fn start(url: &str, credentials: &Credentials) -> Self {
        Self::start_with(url, credentials, |_, _| {}).await
    }

    /// Starts an executor whose command line, variables or directory are changed before; the path is its home.
    pub async fn start_with(url: &str, credentials: &Credentials, change: impl FnOnce(&mut Command, &Path)) -> Self {
        let home = Scratch::new();
        let remote = ["exec-server", "--remote", url, "--environment-id", &credentials.executor];
        let mut command = process(home.path(), &[&remote[..], &["--registration-bearer-stdin"]].concat());
        command.stdin(Stdio::piped()).stdout(Stdio::null());
        change(&mut command, home.path());
        let mut child = command.spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(format!("{}\n", credentials.token).as_bytes()).await.unwrap();
        Self { child, home }
    }

    /// Starts an executor on the direct transport: plain JSON-RPC, signed requests.
    pub fn start_direct(url: &str, credentials: &Credentials, change: impl FnOnce(&mut Command)) -> Self {
        let home = Scratch::new();
        let remote = ["exec-server", "--remote", url, "--environment-id", &credentials.executor];
        let mut command =
            process(home.path(), &[&remote[..], &["--remote-transport", "direct", "--aws-sigv4"]].concat());
        command
            .env("AWS_ACCESS_KEY_ID", &credentials.executor)
            .env("AWS_SECRET_ACCESS_KEY", &credentials.token)
            .env("AWS_REGION", "eu-north-1")
            .env("AWS_EC2_METADATA_DISABLED", "true")
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        change(&mut command);
        Self { child: command.spawn().unwrap(), home }
    }

    /// Starts an executor that listens, and gives the URL of its plain JSON-RPC.
    pub async fn listening() -> (Self, String) {
        let home = Scratch::new();
        let mut command = process(home.path(), &["exec-server", "--listen", "ws://127.0.0.1:0"]);
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let url = lines.next_line().await.unwrap().expect("the executor tells its URL");
        (Self { child, home }, url)
    }

    /// Starts an executor and waits until the caller sees it.
    pub async fn connected(url: &str, credentials: &Credentials, caller: &Caller, name: &str) -> Self {
        let executor = Self::start(url, credentials).await;
        executor.seen_by(caller, name).await;
        executor
    }

    /// Waits until the caller sees the executor under that name.
    pub async fn seen_by(&self, caller: &Caller, name: &str) {
        eventually("the executor connects", async || {
            caller.environments().await.iter().any(|env| env == name).then_some(())
        })
        .await;
    }

    /// The process id of the launcher, which is that of the process group.
    pub fn pid(&self) -> u32 {
        self.child.id().expect("the executor runs")
    }

    /// Its home, and its working directory unless it was started elsewhere.
    pub fn home(&self) -> &Path {
        self.home.path()
    }

    /// Whether the process still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Kills launcher and executor at once.
    pub fn kill(&self) {
        kill_group(&self.child);
    }
}

impl Drop for CodexExecutor {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A gateway, a caller of workspace `w`, and a real executor connected under the name `box`.
pub struct Workbench {
    pub caller: Caller,
    pub executor: CodexExecutor,
    pub credentials: Credentials,
    pub gateway: TestGateway,
}

impl Workbench {
    pub async fn start() -> Self {
        Self::with(|_| {}).await
    }

    /// On a gateway with a changed configuration.
    pub async fn with(change: impl FnOnce(&mut Config)) -> Self {
        Self::of(change, |_, _| {}).await
    }

    /// With both a changed configuration and a changed executor, as in [`CodexExecutor::start_with`].
    pub async fn of(change: impl FnOnce(&mut Config), executor: impl FnOnce(&mut Command, &Path)) -> Self {
        let gateway = TestGateway::with(change).await;
        let caller = gateway.caller("w").await;
        let credentials = gateway.executor("w", "box").await;
        let executor = CodexExecutor::start_with(&gateway.url(), &credentials, executor).await;
        executor.seen_by(&caller, "box").await;
        Self { caller, executor, credentials, gateway }
    }

    /// A shell command's structured result.
    pub async fn shell(&self, arguments: Value) -> Value {
        self.caller.shell("box", arguments).await
    }

    /// A file in the executor's home.
    pub fn file(&self, name: &str) -> PathBuf {
        self.executor.home().join(name)
    }
}

/// A number of seconds that no other command sleeps: by it a test finds its own processes on this machine.
pub struct Marker(String);

impl Marker {
    pub fn new() -> Self {
        Self(format!("600.{}", uuid::Uuid::new_v4().as_u128() % 1_000_000_000_000))
    }

    /// The processes with the number in their arguments.
    pub fn processes(&self) -> Vec<u32> {
        let entries = std::fs::read_dir("/proc").unwrap().flatten();
        let ids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let marked = |id: &u32| {
            // A process that has ended meanwhile has no arguments.
            let arguments = std::fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&arguments).contains(&self.0)
        };
        ids.filter(marked).collect()
    }

    /// Waits until exactly so many such processes are there.
    pub async fn is_on(&self, processes: usize) {
        eventually(&format!("{processes} processes with {}", self.0), async || {
            (self.processes().len() == processes).then_some(())
        })
        .await;
    }
}

impl std::fmt::Display for Marker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl Drop for Marker {
    fn drop(&mut self) {
        for id in self.processes() {
            let _ = std::process::Command::new("kill").args(["-KILL", &id.to_string()]).status();
        }
    }
}
