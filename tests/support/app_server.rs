//! A stock harness: `codex app-server` of the pinned version, unmodified, with a model that a test chooses.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::codex::{kill_group, process};
use super::gateway::Credentials;
use super::{Model, PATIENCE, Scratch, eventually};

/// How a stock harness is told where its executor is (codex-exec-server.md §8.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// `environments.toml` with a bearer token: plain messages.
    File,
    /// The variable with a URL: plain relay frames.
    Url,
    /// The variables of the registry: encrypted relay frames.
    Registry,
}

/// One harness process with a home of its own.
pub struct AppServer {
    child: Child,
    stdin: ChildStdin,
    said: mpsc::UnboundedReceiver<Value>,
    environment: &'static str,
    next_id: i64,
    _home: Scratch,
}

impl AppServer {
    /// Starts a harness of a workspace's token and waits until it has reached the executor.
    pub async fn connected(
        route: Route,
        gateway: SocketAddr,
        credentials: &Credentials,
        token: &str,
        model: &Model,
    ) -> Self {
        let home = Scratch::new();
        let mut command = process(home.path(), &["app-server"]);
        configure(home.path(), model);
        let environment = aim(&mut command, home.path(), route, gateway, &credentials.executor, token);
        let mut child = command
            // It asks public hosts for a catalogue when it starts; nobody answers here.
            .env("HTTPS_PROXY", "http://127.0.0.1:9")
            .env("CODEX_API_KEY", "unused")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdin = child.stdin.take().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let (sender, said) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                let _ = sender.send(serde_json::from_str(&line).unwrap());
            }
        });
        let mut harness = Self { child, stdin, said, environment, next_id: 0, _home: home };
        let client = json!({ "clientInfo": { "name": "test", "version": "0" },
            "capabilities": { "experimentalApi": true } });
        harness.call("initialize", client).await;
        harness.say(&json!({ "method": "initialized" })).await;
        eventually("the harness has reached the executor", async || {
            let status = harness.call("environment/status", json!({ "environmentId": environment })).await;
            (status["status"] == "ready").then_some(())
        })
        .await;
        harness
    }

    /// Begins a turn in this directory of the executor: the model's orders are carried out.
    pub async fn begin_turn(&mut self, directory: &Path) {
        let environments = json!([{ "environmentId": self.environment, "cwd": directory }]);
        let thread =
            json!({ "approvalPolicy": "never", "sandbox": "danger-full-access", "environments": environments });
        let thread = self.call("thread/start", thread).await["thread"]["id"].clone();
        let input = json!([{ "type": "text", "text": "go" }]);
        self.call("turn/start", json!({ "threadId": thread, "input": input, "environments": environments })).await;
    }

    /// Waits until the command of the turn runs and the harness knows it.
    pub async fn hears_of_the_command(&mut self) {
        loop {
            let message = self.hear().await;
            if message["method"] == "item/started" && message["params"]["item"]["type"] == "commandExecution" {
                return;
            }
        }
    }

    /// Waits until the turn is over, which must have come to its end.
    pub async fn end_turn(&mut self) {
        loop {
            let message = self.hear().await;
            if message["method"] == "turn/completed" {
                let turn = &message["params"]["turn"];
                assert_eq!((&turn["status"], &turn["error"]), (&json!("completed"), &Value::Null), "{message}");
                return;
            }
        }
    }

    /// A request and its result; what else the harness says before is nobody's concern.
    async fn call(&mut self, method: &str, params: Value) -> Value {
        self.next_id += 1;
        let id = self.next_id;
        self.say(&json!({ "id": id, "method": method, "params": params })).await;
        loop {
            let message = self.hear().await;
            if message["id"] == id && message.get("method").is_none() {
                assert!(message.get("error").is_none(), "{method}: {message}");
                return message["result"].clone();
            }
        }
    }

    async fn say(&mut self, message: &Value) {
        self.stdin.write_all(format!("{message}\n").as_bytes()).await.unwrap();
    }

    async fn hear(&mut self) -> Value {
        let next = timeout(PATIENCE, self.said.recv()).await;
        next.expect("the harness says something").expect("the harness runs")
    }
}

impl Drop for AppServer {
    fn drop(&mut self) {
        kill_group(&self.child);
    }
}

fn configure(home: &Path, model: &Model) {
    let config = format!(
        "model = \"test\"\nmodel_provider = \"test\"\n\
         [model_providers.test]\nname = \"test\"\nbase_url = \"http://{}/v1\"\nwire_api = \"responses\"\n\
         [features]\nplugins = false\napps = false\n[analytics]\nenabled = false\n",
        model.address
    );
    std::fs::write(home.join("config.toml"), config).unwrap();
}

/// Tells the harness where its executor is; gives the name under which it then knows it.
fn aim(
    command: &mut Command,
    home: &Path,
    route: Route,
    gateway: SocketAddr,
    executor: &str,
    token: &str,
) -> &'static str {
    let url = format!("ws://{gateway}/bridge/{executor}");
    match route {
        Route::File => {
            let environments = format!(
                "default = \"box\"\ninclude_local = false\n\
                 [[environments]]\nid = \"box\"\nurl = \"{url}\"\nauth_bearer_token = \"{token}\"\n"
            );
            std::fs::write(home.join("environments.toml"), environments).unwrap();
            return "box";
        }
        Route::Url => {
            command.env("CODEX_EXEC_SERVER_URL", format!("{url}?role=harness&token={token}"));
        }
        Route::Registry => {
            command
                .env("CODEX_EXEC_SERVER_NOISE_REGISTRY_URL", format!("http://{gateway}"))
                .env("CODEX_EXEC_SERVER_NOISE_ENVIRONMENT_ID", executor)
                .env("CODEX_EXEC_SERVER_NOISE_AUTH_TOKEN", token);
        }
    }
    "remote"
}
