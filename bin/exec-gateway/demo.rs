//! The `demo` command: a gateway, a real executor and one call through both, on temporary state.

use std::path::PathBuf;

use exec_gateway::config::Config;

/// Runs the demonstration; with `once` it returns after the call, else on SIGTERM or SIGINT.
pub fn run(_config: Config, _once: bool, _codex: Option<PathBuf>) -> anyhow::Result<()> {
    anyhow::bail!("this build has no demo")
}
