//! The `demo` command: a gateway, a real executor and one call through both, on temporary state that nobody else
//! uses. It shows what a user would do by hand and decides nothing that the gateway decides.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use bytes::Bytes;
use exec_gateway::admin::{Request, Response};
use exec_gateway::config::{Config, ConfigFaults, LogLevel, Resolved, Source};
use exec_gateway::gateway::Gateway;
use exec_gateway::protocol::ids::{EnvironmentName, WorkspaceId};
use http_body_util::{BodyExt, Full};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::codex::{self, Codex, Process, Scratch};
use crate::serve::{raise_open_files, shutdown_signal, start_logging};
use crate::show::print;

const WORKSPACE: &str = "demo";
const ENVIRONMENT: &str = "box";

/// The command of the one call: it shows where it ran, on every machine with a POSIX shell.
const COMMAND: &str = "echo \"hello from $(uname -n)\" && uname -srm";

/// Time for the executor to register and open its socket.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(60);
const CONNECT_POLL: Duration = Duration::from_millis(50);

/// Runs the demonstration; with `once` it returns after the call, else on SIGTERM or SIGINT. Whatever happens, the
/// executor has ended and the temporary state is gone when it returns.
///
/// # Errors
/// No executor is to be had, it does not connect, or the call failed.
pub fn run(resolved: Resolved, once: bool, codex: Option<PathBuf>) -> anyhow::Result<()> {
    let level = match resolved.sources["log_level"] {
        Source::Default => LogLevel::Warn,
        _ => resolved.config.log_level,
    };
    let _logging = start_logging(level, resolved.config.log_format, resolved.config.otlp_endpoint.as_deref())?;
    let open_files_max = raise_open_files();
    tracing::info!(open_files_max, "starting");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("no runtime")?;
    runtime.block_on(async {
        let shutdown = shutdown_signal().context("signals cannot be listened to")?;
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        tokio::spawn(async move {
            shutdown.await;
            stopped.cancel();
        });
        let set = async {
            let codex = Codex::find(codex.as_deref()).await?;
            Stage::set(resolved, &codex).await
        };
        let Some(stage) = stop.run_until_cancelled(set).await else { bail!("stopped before the call") };
        let mut stage = stage?;
        let shown = match stop.run_until_cancelled(stage.show(once)).await {
            Some(Ok(())) if !once => stage.serve(&stop).await,
            Some(shown) => shown,
            None => Err(anyhow::anyhow!("stopped during the call")),
        };
        stage.strike().await;
        shown
    })
}

/// Everything that is up during the demonstration. Fields drop in their order: the executor ends before the gateway
/// that it talks to, and both before the directory that they work in.
struct Stage {
    executor: Process,
    connected: String,
    caller: Caller,
    gateway: Gateway,
    _state: Scratch,
}

impl Stage {
    /// Starts a gateway and an executor, and waits until a caller sees the executor.
    async fn set(resolved: Resolved, codex: &Codex) -> anyhow::Result<Self> {
        let scratch = Scratch::new(&std::env::temp_dir().join("exec-gateway-demo"))?;
        let gateway = Gateway::start(config(resolved, scratch.make("state")?)?).await?;
        let address = *gateway.listen().first().context("the gateway has no address")?;

        let workspace = WorkspaceId::new(WORKSPACE)?;
        let request = Request::TokenCreate { workspace: workspace.clone(), user: None, ttl: None, read_only: false };
        let Response::Token { token, .. } = gateway.admin().run(request).await? else { bail!("no token") };
        let caller = Caller::new(address, token.expose().to_owned());
        let request = Request::ExecutorCreate { workspace, name: EnvironmentName::new(ENVIRONMENT)?, default: true };
        let Response::ExecutorCreated { exe_id, token, .. } = gateway.admin().run(request).await? else {
            bail!("no executor")
        };

        let started = Instant::now();
        let (home, directory) = (scratch.make("codex")?, scratch.make("work")?);
        let mut executor = codex.start(&caller.base, exe_id.as_str(), token.expose(), &home, &directory).await?;
        let connected = tokio::select! {
            connected = timeout(CONNECT_TIMEOUT, caller.sees_executor()) => match connected {
                Ok(connected) => connected,
                Err(_) => Err(anyhow::anyhow!("the executor did not connect within {} s", CONNECT_TIMEOUT.as_secs())),
            },
            ended = executor.ended() => Err(how_it_ended(ended)),
        };
        if let Err(error) = connected {
            bail!("{error:#}{}", executor.last_lines());
        }
        let other = if codex.version == codex::VERSION { "" } else { " (this demo is made for another version)" };
        let connected = format!("codex {}{other}, connected as \"{ENVIRONMENT}\" in {}", codex.version, took(started));
        Ok(Self { executor, connected, caller, gateway, _state: scratch })
    }

    /// Makes the one call and prints it, then how to make more.
    async fn show(&mut self, once: bool) -> anyhow::Result<()> {
        let started = Instant::now();
        let arguments = json!({ "command": COMMAND });
        let result = tokio::select! {
            result = self.caller.call("shell", arguments) => result?,
            ended = self.executor.ended() => return Err(how_it_ended(ended)),
        };
        let time = took(started);
        let structured = &result["structuredContent"];
        let output = ["stdout", "stderr"].map(|stream| structured[stream].as_str().unwrap_or_default()).concat();
        let mut text = format!("executor   {}\ncommand    {COMMAND}\n", self.connected);
        for (nth, line) in output.lines().enumerate() {
            text += &format!("{}{line}\n", if nth == 0 { "output     " } else { "           " });
        }
        text += &format!("exit code  {}\ntime       {time}, over HTTP and back\n", structured["exit_code"]);
        print(&text)?;
        if structured["exit_code"] != 0 {
            bail!("the command failed on the executor");
        }
        if !once {
            print(&self.caller.invitation())?;
        }
        Ok(())
    }

    /// Stays up until `stop`, or until the executor is gone.
    async fn serve(&mut self, stop: &CancellationToken) -> anyhow::Result<()> {
        tokio::select! {
            () = stop.cancelled() => Ok(()),
            ended = self.executor.ended() => bail!("{}{}", how_it_ended(ended), self.executor.last_lines()),
        }
    }

    /// Ends everything in order. Calls under way end with their executor, so the gateway's drain has nothing to wait
    /// for.
    async fn strike(self) {
        self.executor.end().await;
        drop(self.caller);
        self.gateway.run_until(std::future::ready(())).await;
    }
}

/// What was asked for, on state and ports of its own. Nobody upstream knows its tokens, and nobody outside reaches it.
fn config(resolved: Resolved, state: PathBuf) -> anyhow::Result<Config> {
    let Resolved { mut config, sources } = resolved;
    let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
    if sources["listen"] != Source::Flag {
        config.listen = vec![loopback];
    }
    if sources["ops_listen"] != Source::Flag {
        config.ops_listen = loopback;
    }
    config.state_dir = Some(state);
    config.public_url = None;
    config.auth.upstream_url = None;
    if sources["drain.grace_secs"] == Source::Default {
        config.drain.grace_secs = 2;
    }
    match config.validate() {
        faults if faults.is_empty() => Ok(config),
        faults => Err(ConfigFaults(faults).into()),
    }
}

/// A caller of the gateway's API, as any program on this machine would be.
struct Caller {
    client: Client<HttpConnector, Full<Bytes>>,
    base: String,
    token: String,
}

impl Caller {
    fn new(address: SocketAddr, token: String) -> Self {
        Self { client: Client::builder(TokioExecutor::new()).build_http(), base: format!("http://{address}"), token }
    }

    async fn post(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        let request = hyper::Request::post(format!("{}{path}", self.base))
            .header(AUTHORIZATION, format!("Bearer {}", self.token))
            .header(CONTENT_TYPE, "application/json")
            .body(Full::from(body.to_string()))?;
        let response = self.client.request(request).await.context("the gateway does not answer")?;
        let status = response.status();
        let body = response.into_body().collect().await.context("the gateway broke off")?.to_bytes();
        if !status.is_success() {
            bail!("the gateway answered {status}: {}", String::from_utf8_lossy(&body).trim_end());
        }
        serde_json::from_slice(&body).context("the gateway's answer is no JSON")
    }

    async fn call(&self, tool: &str, arguments: Value) -> anyhow::Result<Value> {
        let path = format!("/api/connectors/envs/{ENVIRONMENT}/tool/call");
        self.post(&path, &json!({ "tool": tool, "arguments": arguments })).await
    }

    /// Returns when the executor is in the list of environments.
    async fn sees_executor(&self) -> anyhow::Result<()> {
        loop {
            let list = self.post("/api/connectors/envs/list", &json!({})).await?;
            if list["envs"].as_array().is_some_and(|envs| envs.iter().any(|env| env["name"] == ENVIRONMENT)) {
                return Ok(());
            }
            sleep(CONNECT_POLL).await;
        }
    }

    /// Lines that work when pasted into any POSIX shell on this machine: the token has no character that a shell
    /// would read, and the JSON no single quote.
    fn invitation(&self) -> String {
        let line = |path: &str, body: &str| {
            format!("curl -sS -H 'Authorization: Bearer {}' -d '{body}' {}{path}\n", self.token, self.base)
        };
        let call = |body: &str| line(&format!("/api/connectors/envs/{ENVIRONMENT}/tool/call"), body);
        format!(
            "\ntoken      {}\n\nIt serves until Ctrl-C. To try it from another terminal:\n\n{}{}{}{}\n",
            self.token,
            line("/api/connectors/envs/list", "{}"),
            call(r#"{"tool":"shell","arguments":{"command":["uname","-a"]}}"#),
            call(r#"{"tool":"write_file","arguments":{"path":"hello.txt","content_b64":"aGVsbG8K"}}"#),
            call(r#"{"tool":"read_file","arguments":{"path":"hello.txt"}}"#),
        )
    }
}

fn how_it_ended(ended: std::io::Result<ExitStatus>) -> anyhow::Error {
    match ended {
        Ok(status) => anyhow::anyhow!("the executor ended ({status})"),
        Err(error) => anyhow::anyhow!("the executor was lost: {error}"),
    }
}

fn took(since: Instant) -> String {
    match since.elapsed() {
        short if short < Duration::from_secs(1) => format!("{} ms", short.as_millis()),
        long => format!("{:.1} s", long.as_secs_f64()),
    }
}
