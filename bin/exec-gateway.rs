//! The exec-gateway command: reads the command line, puts the configuration together and runs one subcommand.
//! Owns the exit code: 0 done, 1 failed, 2 wrong usage or configuration. No behaviour of the gateway lives here.

#[path = "exec-gateway/args.rs"]
mod args;
#[path = "exec-gateway/audit.rs"]
mod audit;
#[path = "exec-gateway/codex.rs"]
mod codex;
#[path = "exec-gateway/demo.rs"]
mod demo;
#[path = "exec-gateway/generate.rs"]
mod generate;
#[path = "exec-gateway/operate.rs"]
mod operate;
#[path = "exec-gateway/probe.rs"]
mod probe;
#[path = "exec-gateway/serve.rs"]
mod serve;
#[path = "exec-gateway/service_manager.rs"]
mod service_manager;
#[path = "exec-gateway/show.rs"]
mod show;
#[path = "exec-gateway/spans.rs"]
mod spans;
#[path = "exec-gateway/table.rs"]
mod table;

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use exec_gateway::admin::Request;
use exec_gateway::config::{Config, ConfigFaults, Fault, Resolved};
use exec_gateway::gateway;

use args::{Cli, Command, Common, Knobs};

fn main() -> ExitCode {
    let Cli { common, command } = Cli::parse();
    match run(&common, command) {
        Ok(code) => code,
        Err(error) => match error.downcast_ref::<ConfigFaults>() {
            Some(faults) => {
                eprintln!("{faults}");
                ExitCode::from(2)
            }
            None => {
                eprintln!("exec-gateway: {error:#}");
                ExitCode::FAILURE
            }
        },
    }
}

fn run(common: &Common, command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Serve { knobs } => serve::run(valid(common, &knobs)?, || valid(common, &knobs))?,
        // A demonstration is the same on every machine, so no variable takes part.
        Command::Demo { once, codex, knobs } => demo::run(resolve_with(common, &knobs, Vec::new())?, once, codex)?,
        Command::Check { knobs } => return show::check(startable(common, &knobs), common.json),
        Command::Probe { knobs } => probe::run(&valid(common, &knobs)?)?,
        Command::Config { knobs } => show::config(&resolve(common, &knobs)?, common.json)?,
        Command::Token(command) => operate(common, command.into())?,
        Command::Executor(command) => operate(common, command.into())?,
        Command::CapToken(command) => operate(common, command.into())?,
        Command::Revoke(command) => operate(common, command.into())?,
        Command::Audit(args::Audit { verify: true, .. }) => {
            return audit::check(&valid(common, &Knobs::default())?, common.json);
        }
        Command::Audit(args::Audit { workspace, since, follow, .. }) => {
            let wanted = audit::Wanted { workspace, since, follow };
            audit::records(&valid(common, &Knobs::default())?, &wanted, common.json)?;
        }
        Command::Openapi => std::io::stdout().write_all(&exec_gateway::api::openapi::text())?,
        Command::Generate { what, directory } => generate::run(what, &directory)?,
        Command::Key(command) => operate(common, command.into())?,
    }
    Ok(ExitCode::SUCCESS)
}

fn operate(common: &Common, request: Request) -> anyhow::Result<()> {
    operate::run(valid(common, &Knobs::default())?, request, common.json)
}

/// The configuration of this command line, fit to start with.
fn valid(common: &Common, knobs: &Knobs) -> Result<Config, ConfigFaults> {
    let config = resolve(common, knobs)?.config;
    let faults = config.validate();
    if faults.is_empty() { Ok(config) } else { Err(ConfigFaults(faults)) }
}

/// The same, with the files that it names looked at too.
fn startable(common: &Common, knobs: &Knobs) -> Result<Config, ConfigFaults> {
    let config = resolve(common, knobs)?.config;
    let faults = gateway::faults(&config);
    if faults.is_empty() { Ok(config) } else { Err(ConfigFaults(faults)) }
}

fn resolve(common: &Common, knobs: &Knobs) -> Result<Resolved, ConfigFaults> {
    resolve_with(common, knobs, std::env::vars_os().collect())
}

fn resolve_with(common: &Common, knobs: &Knobs, env: Vec<(OsString, OsString)>) -> Result<Resolved, ConfigFaults> {
    let mut flags = knobs.0.clone();
    flags.extend(common.state_dir.iter().map(|path| ("state_dir".into(), path.clone())));
    let Some(path) = &common.config else { return Config::resolve(&flags, None, env.into_iter()) };
    match std::fs::read_to_string(path) {
        Ok(text) => Config::resolve(&flags, Some((path, &text)), env.into_iter()),
        Err(error) => {
            let message = format!("cannot be read: {error}");
            let mut faults = vec![Fault { place: path.display().to_string(), line: None, message, hint: None }];
            // Flags and variables are wrong with or without the file; of other faults it may be the remedy.
            let others = Config::resolve(&flags, None, env.into_iter()).err().map(|ConfigFaults(faults)| faults);
            let apart = |fault: &Fault| fault.place.starts_with("--") || fault.place.starts_with("EXEC_GATEWAY_");
            faults.extend(others.into_iter().flatten().filter(apart));
            Err(ConfigFaults(faults))
        }
    }
}
