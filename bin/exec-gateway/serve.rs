//! The `serve` command: log lines, open-file limit, runtime and signals around one gateway. What the gateway does
//! between its start and its shutdown is its own.

use std::convert::Infallible;
use std::future::Future;
use std::io::{IsTerminal, Write};
use std::net::SocketAddr;

use anyhow::Context;
use exec_gateway::config::{Config, ConfigFaults, LogFormat, LogLevel};
use exec_gateway::gateway::{Gateway, Reloaded, Reloading};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::prelude::*;
use tracing_subscriber::{Registry, reload};

use crate::service_manager;
use crate::spans::{self, Spans};

/// Serves with a valid configuration until SIGTERM or SIGINT, then drains. At SIGHUP it is read anew by `read`.
///
/// # Errors
/// The gateway cannot start, or failed while it ran.
pub fn run(config: Config, read: impl Fn() -> Result<Config, ConfigFaults>) -> anyhow::Result<()> {
    // Sends the last spans when they go, behind the gateway.
    let (filter, _spans) = start_logging(config.log_level, config.log_format, config.otlp_endpoint.as_deref())?;
    let open_files_max = raise_open_files();
    let held = service_manager::held_socket().context("the socket given by the service manager cannot be used")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("no runtime")?;
    runtime.block_on(async {
        // Listened to before the start, so that a signal in its midst drains instead of killing.
        let shutdown = shutdown_signal().context("signals cannot be listened to")?;
        let hangup = signal(SignalKind::hangup()).context("SIGHUP cannot be listened to")?;
        let gateway = Gateway::start_on(config, held).await?;
        tracing::info!(open_files_max, "serving");
        announce_ready(gateway.listen(), gateway.ops());
        service_manager::serving();
        let reloading = gateway.reloading();
        let shutdown = async {
            shutdown.await;
            service_manager::stopping();
        };
        tokio::select! {
            () = gateway.run_until(shutdown) => Ok(()),
            never = reload_at_hangup(hangup, reloading, filter, read) => match never {},
        }
    })
}

/// Reads the configuration and its files anew at each SIGHUP. If something is wrong with them all of it is logged, and
/// everything stays as it was.
async fn reload_at_hangup(
    mut hangup: Signal,
    reloading: Reloading,
    filter: LogFilter,
    read: impl Fn() -> Result<Config, ConfigFaults>,
) -> Infallible {
    loop {
        if hangup.recv().await.is_none() {
            // The runtime ends, and this with it.
            std::future::pending::<()>().await;
        }
        service_manager::reloading();
        let read = read();
        let level = read.as_ref().map(|config| config.log_level).ok();
        match reloading.reload(read) {
            Ok(Reloaded { changed, kept }) => {
                if let Some(level) = level
                    && let Err(error) = filter.reload(targets(level))
                {
                    tracing::error!(%error, "the level of log lines was not changed");
                }
                for knob in kept {
                    tracing::warn!(knob, "needs a restart to change; the value with which the gateway started stays");
                }
                tracing::info!(?changed, "the configuration, certificates and secrets were read again");
            }
            Err(ConfigFaults(faults)) => {
                for fault in &faults {
                    tracing::error!(%fault, "wrong in the configuration");
                }
                tracing::error!(faults = faults.len(), "nothing was reloaded; everything stays as it was");
            }
        }
        service_manager::reloaded();
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

/// Which log lines are written, to be changed while they are.
pub type LogFilter = reload::Handle<Targets, Registry>;

/// Writes log lines of this program to stderr from now on, and sends its spans to a collector while the second result
/// lives.
///
/// # Errors
/// The address of the collector is of no use.
pub fn start_logging(
    level: LogLevel,
    format: LogFormat,
    collector: Option<&str>,
) -> anyhow::Result<(LogFilter, Spans)> {
    let (filter, handle) = reload::Layer::new(targets(level));
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let lines = match format {
        LogFormat::Text => lines.with_ansi(std::io::stderr().is_terminal()).boxed(),
        LogFormat::Json => lines.json().boxed(),
    };
    let spans = spans::start(collector)?;
    tracing_subscriber::registry().with(lines.with_filter(filter)).with(spans.layer()).init();
    Ok((handle, spans))
}

fn targets(level: LogLevel) -> Targets {
    let level = match level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    // The HTTP and WebSocket libraries log whole request lines below `warn`, and a query string may hold a ticket.
    Targets::new()
        .with_default(level.min(LevelFilter::WARN))
        // It warns of every mistake of a client, in the client's words.
        .with_target("rmcp", LevelFilter::ERROR)
        .with_target("exec_gateway", level)
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
