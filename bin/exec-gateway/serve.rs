//! The `serve` command: log lines, open-file limit, runtime and signals around one gateway. What the gateway does
//! between its start and its shutdown is its own.

use std::future::Future;
use std::io::{IsTerminal, Write};
use std::net::{SocketAddr, TcpListener};

use anyhow::Context;
use exec_gateway::config::{Config, LogFormat, LogLevel};
use exec_gateway::gateway::{Gateway, Reloading};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::prelude::*;

use crate::service_manager;
use crate::spans::{self, Spans};

/// Serves with a valid configuration until SIGTERM or SIGINT, then drains.
///
/// # Errors
/// The gateway cannot start, or failed while it ran.
pub fn run(config: Config) -> anyhow::Result<()> {
    // Sends its last spans when it goes, behind the gateway.
    let _spans = start_logging(config.log_level, config.log_format, config.otlp_endpoint.as_deref())?;
    let open_files_max = raise_open_files();
    let held = service_manager::held_socket().context("the socket given by the service manager cannot be used")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("no runtime")?;
    runtime.block_on(async {
        // Listened to before the start, so that a signal in its midst drains instead of killing.
        let shutdown = shutdown_signal().context("signals cannot be listened to")?;
        serve(config, held, open_files_max, shutdown).await
    })
}

async fn serve(
    config: Config,
    held: Option<TcpListener>,
    open_files_max: Option<u64>,
    shutdown: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let gateway = Gateway::start_on(config, held).await?;
    tracing::info!(open_files_max, "serving");
    announce_ready(gateway.listen(), gateway.ops());
    service_manager::serving();
    tokio::spawn(reload_at_hangup(gateway.reloading()));
    let shutdown = async {
        shutdown.await;
        service_manager::stopping();
    };
    gateway.run_until(shutdown).await;
    Ok(())
}

/// Reads what can be read anew at each SIGHUP. What cannot be used then is logged, and what was read before stays.
async fn reload_at_hangup(reloading: Reloading) {
    let mut hangup = match signal(SignalKind::hangup()) {
        Ok(hangup) => hangup,
        Err(error) => return tracing::error!(%error, "SIGHUP cannot be listened to"),
    };
    while hangup.recv().await.is_some() {
        match reloading.reload() {
            Ok(()) => tracing::info!("certificates were read again"),
            Err(error) => tracing::error!(%error, "certificates were not read again"),
        }
    }
}

/// Tells whoever started the daemon that it serves, and on which ports. Not a log line: it is the same at any level
/// and format.
fn announce_ready(listen: &[SocketAddr], ops: SocketAddr) {
    // Nobody reading is no reason to end: the daemon serves all the same.
    let _ = writeln!(std::io::stderr(), "{}", ready_line(listen, ops));
}

fn ready_line(listen: &[SocketAddr], ops: SocketAddr) -> String {
    let listen: Vec<String> = listen.iter().map(SocketAddr::to_string).collect();
    format!("exec-gateway ready listen={} ops={ops}", listen.join(","))
}

/// Writes log lines of this program to stderr from now on, and sends its spans to a collector while the result lives.
///
/// # Errors
/// The address of the collector is of no use.
pub fn start_logging(level: LogLevel, format: LogFormat, collector: Option<&str>) -> anyhow::Result<Spans> {
    let level = match level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    // The HTTP and WebSocket libraries log whole request lines below `warn`, and a query string may hold a ticket.
    let targets = Targets::new()
        .with_default(level.min(LevelFilter::WARN))
        // It warns of every mistake of a client, in the client's words.
        .with_target("rmcp", LevelFilter::ERROR)
        .with_target("exec_gateway", level);
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let lines = match format {
        LogFormat::Text => lines.with_ansi(std::io::stderr().is_terminal()).boxed(),
        LogFormat::Json => lines.json().boxed(),
    };
    let spans = spans::start(collector)?;
    tracing_subscriber::registry().with(lines.with_filter(targets)).with(spans.layer()).init();
    Ok(spans)
}

/// Raises the limit of open files as far as it goes and says how far that is: every executor, harness and caller is an
/// open file, and the usual soft limit is 1024.
pub fn raise_open_files() -> Option<u64> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    // A service manager that has set both may have forbidden the call.
    if current != maximum
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })
    {
        tracing::warn!(%error, "the limit of open files could not be raised");
    }
    getrlimit(Resource::Nofile).current
}

/// Ready at the first SIGTERM or SIGINT from now on.
///
/// # Errors
/// The system does not let signals be listened to.
pub fn shutdown_signal() -> std::io::Result<impl Future<Output = ()>> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_ready_line_lists_the_addresses_of_the_api_with_commas() {
        let (first, second) = ("127.0.0.1:6060".parse().unwrap(), "[::1]:6060".parse().unwrap());
        assert_eq!(
            ready_line(&[first, second], "127.0.0.1:6061".parse().unwrap()),
            "exec-gateway ready listen=127.0.0.1:6060,[::1]:6060 ops=127.0.0.1:6061"
        );
    }
}
