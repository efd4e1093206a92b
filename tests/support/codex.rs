//! The real executor: `codex exec-server --remote` of the pinned version, unmodified.

use std::path::PathBuf;
use std::process::Stdio;

use tokio::io::AsyncWriteExt;
use tokio::process::{Child, Command};

use super::gateway::Credentials;
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

impl CodexExecutor {
    /// Starts an executor that registers at the gateway of this base URL.
    pub async fn start(url: &str, credentials: &Credentials) -> Self {
        let home = Scratch::new();
        // Its own process group: the launcher has a native child, and both must end with the test.
        let mut child = Command::new(program())
            .args(["exec-server", "--remote", url, "--environment-id", &credentials.executor])
            .arg("--registration-bearer-stdin")
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", home.path())
            .env("CODEX_HOME", home.path())
            .env("NO_PROXY", "127.0.0.1,localhost")
            .current_dir(home.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(if std::env::var_os("EXECUTOR_LOG").is_some() { Stdio::inherit() } else { Stdio::null() })
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(format!("{}\n", credentials.token).as_bytes()).await.unwrap();
        Self { child, home }
    }

    /// Starts an executor and waits until the caller sees it.
    pub async fn connected(url: &str, credentials: &Credentials, caller: &Caller, name: &str) -> Self {
        let executor = Self::start(url, credentials).await;
        eventually("the executor connects", async || {
            caller.environments().await.iter().any(|env| env == name).then_some(())
        })
        .await;
        executor
    }

    /// The process id of the launcher, which is that of the process group.
    pub fn pid(&self) -> u32 {
        self.child.id().expect("the executor runs")
    }

    /// Its working directory and home.
    pub fn home(&self) -> &std::path::Path {
        self.home.path()
    }

    /// Whether the process still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Kills launcher and executor at once.
    pub fn kill(&self) {
        if let Some(pid) = self.child.id() {
            let _ = std::process::Command::new("kill").args(["-KILL", "--", &format!("-{pid}")]).status();
        }
    }
}

impl Drop for CodexExecutor {
    fn drop(&mut self) {
        self.kill();
    }
}
