//! Cli: the command line as types. Knob flags come from the table of knobs; nothing is read or run here.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use clap::{Arg, ArgAction, ArgMatches, Args, FromArgMatches, Parser, Subcommand};
use exec_gateway::admin::Request;
use exec_gateway::config::{Config, KNOBS, Knob};
use exec_gateway::protocol::ids::{EnvironmentName, ExecutorId, TokenId, TurnId, UserId, WorkspaceId};
use exec_gateway::store::KeyPurpose;
use exec_gateway::time::parse_rfc3339;

use crate::generate::Generated;

/// Bridges workspaces to remote executors over WebSockets.
#[derive(Debug, Parser)]
#[command(name = "exec-gateway", version, arg_required_else_help = true, disable_help_subcommand = true)]
#[command(after_help = "Exit codes: 0 done, 1 failed, 2 wrong usage or configuration.")]
pub struct Cli {
    #[command(flatten)]
    pub common: Common,
    #[command(subcommand)]
    pub command: Command,
}

/// What every subcommand takes.
#[derive(Debug, Args)]
pub struct Common {
    /// Configuration file (TOML)
    #[arg(long, global = true, value_name = "FILE", help_heading = "Common options")]
    pub config: Option<PathBuf>,
    /// Directory of everything that outlives the process [default: $STATE_DIRECTORY, else
    /// $XDG_STATE_HOME/exec-gateway, else ~/.local/state/exec-gateway]
    #[arg(long, global = true, value_name = "DIR", help_heading = "Common options")]
    pub state_dir: Option<String>,
    /// Print JSON for programs
    #[arg(long, global = true, help_heading = "Common options")]
    pub json: bool,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the gateway until SIGTERM or SIGINT
    Serve {
        #[command(flatten)]
        knobs: Knobs,
    },
    /// Run a gateway with a real executor and make one call through it
    Demo {
        /// Exit after the call instead of staying up
        #[arg(long)]
        once: bool,
        /// The codex program to run as executor [default: from PATH, else fetched by npm]
        #[arg(long, value_name = "FILE")]
        codex: Option<PathBuf>,
        #[command(flatten)]
        knobs: Knobs,
    },
    /// Validate the configuration and print all that is wrong; exits 2 when something is
    Check {
        #[command(flatten)]
        knobs: Knobs,
    },
    /// Ask the running gateway whether it takes new work; exits 1 when it does not
    Probe {
        #[command(flatten)]
        knobs: Knobs,
    },
    /// Print the effective configuration with the source of each value, secrets masked
    Config {
        #[command(flatten)]
        knobs: Knobs,
    },
    /// Create, list and revoke proxy tokens, with which callers of a workspace authenticate
    #[command(subcommand)]
    Token(Token),
    /// Create, list, bind, rename and delete executors
    #[command(subcommand)]
    Executor(Executor),
    /// Mint one cap-token for a workspace and print it alone
    CapToken(CapToken),
    /// Revoke the cap-tokens of a turn, or all that a workspace was given so far
    Revoke(Revoke),
    /// Print who did what, from the audit log; exits 1 when --verify finds that it was changed
    Audit(Audit),
    /// List and rotate the gateway's own keys
    #[command(subcommand)]
    Key(Key),
    /// Write man pages, shell completions or the page of metrics, for packages
    #[command(hide = true)]
    Generate {
        /// What to write
        what: Generated,
        /// Directory for the files; it is made if it is not there
        directory: PathBuf,
    },
}

#[derive(Debug, Subcommand)]
pub enum Key {
    /// List the keys by name, without their secrets
    List,
    /// Sign with a new key from now on; what the last one signed stays good until the next rotation
    Rotate {
        /// What it signs: cap-token, ticket (24 h), harness (60 s), resume, or executor: with that one, tokens of
        /// executors from before the last rotation stop to register once it is rotated again
        purpose: KeyPurpose,
    },
}

impl From<Key> for Request {
    fn from(command: Key) -> Self {
        match command {
            Key::List => Self::KeyList,
            Key::Rotate { purpose } => Self::KeyRotate { purpose },
        }
    }
}

#[derive(Debug, Subcommand)]
pub enum Token {
    /// Create a proxy token and print it; it is shown this once
    Create {
        /// Workspace that the token speaks for; it need not exist before
        #[arg(long)]
        workspace: WorkspaceId,
        /// Person on whose behalf it is used
        #[arg(long)]
        user: Option<UserId>,
        /// Life of the token, like 90d, 1h, 15m or 30s [default: no end]
        #[arg(long, value_parser = duration)]
        ttl: Option<Duration>,
        /// Let the token read only
        #[arg(long)]
        read_only: bool,
    },
    /// List proxy tokens without their secrets
    List,
    /// End a proxy token at once
    Revoke {
        /// The token's id, as `token list` shows it
        id: TokenId,
    },
}

#[derive(Debug, Subcommand)]
pub enum Executor {
    /// Create an executor, bind it to a workspace and print the command that connects it
    Create {
        /// Workspace that may reach it
        #[arg(long)]
        workspace: WorkspaceId,
        /// The workspace's name for it
        #[arg(long)]
        name: EnvironmentName,
        /// Make it the one that calls without a name go to
        #[arg(long)]
        default: bool,
    },
    /// List executors with their bindings
    List {
        /// Only those of this workspace
        #[arg(long)]
        workspace: Option<WorkspaceId>,
    },
    /// Let one more workspace reach an executor
    Bind {
        /// The executor's id, exe_…
        #[arg(value_name = "EXE_ID")]
        executor: ExecutorId,
        /// Workspace that may reach it
        #[arg(long)]
        workspace: WorkspaceId,
        /// The workspace's name for it
        #[arg(long)]
        name: EnvironmentName,
        /// Make it the one that calls without a name go to
        #[arg(long)]
        default: bool,
    },
    /// Take a workspace's right to reach an executor away and end its streams there
    Unbind {
        /// The executor's id, exe_…
        #[arg(value_name = "EXE_ID")]
        executor: ExecutorId,
        /// Workspace that loses it
        #[arg(long)]
        workspace: WorkspaceId,
    },
    /// Give an executor another name in a workspace
    Rename {
        /// The executor's id, exe_…
        #[arg(value_name = "EXE_ID")]
        executor: ExecutorId,
        /// Workspace whose name for it changes
        #[arg(long)]
        workspace: WorkspaceId,
        /// The new name
        #[arg(long)]
        name: EnvironmentName,
    },
    /// Forget an executor, its bindings and its credential
    Delete {
        /// The executor's id, exe_…
        #[arg(value_name = "EXE_ID")]
        executor: ExecutorId,
    },
}

#[derive(Debug, Args)]
pub struct CapToken {
    /// Workspace that the cap-token is a right of
    #[arg(long)]
    workspace: WorkspaceId,
    /// Turn that it is minted for, by which it can be revoked
    #[arg(long)]
    turn: Option<TurnId>,
    /// Person on whose behalf it is used
    #[arg(long)]
    user: Option<UserId>,
    /// Life of the cap-token, like 90d, 1h, 15m or 30s
    #[arg(long, value_parser = duration, default_value = "1h")]
    ttl: Duration,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct Revoke {
    /// Turn whose cap-tokens end
    #[arg(long)]
    turn: Option<TurnId>,
    /// Workspace whose cap-tokens issued so far end
    #[arg(long)]
    workspace: Option<WorkspaceId>,
}

#[derive(Debug, Args)]
pub struct Audit {
    /// Go on with what is recorded from now on
    #[arg(long)]
    pub follow: bool,
    /// Only what this workspace did or had done
    #[arg(long)]
    pub workspace: Option<WorkspaceId>,
    /// Only what was recorded since then, like 2026-03-01 or 2026-03-01T12:00:00Z
    #[arg(long, value_name = "TIME", value_parser = time)]
    pub since: Option<SystemTime>,
    /// Check instead that no record was changed, dropped or added, and print the hash of the newest
    #[arg(long, conflicts_with_all = ["follow", "workspace", "since"])]
    pub verify: bool,
}

impl From<Token> for Request {
    fn from(command: Token) -> Self {
        match command {
            Token::Create { workspace, user, ttl, read_only } => Self::TokenCreate { workspace, user, ttl, read_only },
            Token::List => Self::TokenList,
            Token::Revoke { id } => Self::TokenRevoke { id },
        }
    }
}

impl From<Executor> for Request {
    fn from(command: Executor) -> Self {
        match command {
            Executor::Create { workspace, name, default } => Self::ExecutorCreate { workspace, name, default },
            Executor::List { workspace } => Self::ExecutorList { workspace },
            Executor::Bind { executor, workspace, name, default } => {
                Self::ExecutorBind { executor, workspace, name, default }
            }
            Executor::Unbind { executor, workspace } => Self::ExecutorUnbind { executor, workspace },
            Executor::Rename { executor, workspace, name } => Self::ExecutorRename { executor, workspace, name },
            Executor::Delete { executor } => Self::ExecutorDelete { executor },
        }
    }
}

impl From<CapToken> for Request {
    fn from(CapToken { workspace, turn, user, ttl }: CapToken) -> Self {
        Self::CapToken { workspace, turn, user, ttl }
    }
}

impl From<Revoke> for Request {
    fn from(command: Revoke) -> Self {
        match (command.turn, command.workspace) {
            (Some(turn), _) => Self::RevokeTurn { turn },
            (None, Some(workspace)) => Self::RevokeWorkspace { workspace },
            (None, None) => unreachable!("the group of arguments requires one of them"),
        }
    }
}

/// The knob flags of one command line: pairs of a knob's name and a text, as `Config::resolve` takes them.
#[derive(Debug, Clone, Default)]
pub struct Knobs(pub Vec<(String, String)>);

/// The knobs that have a flag of their own; `--state-dir` is common to all subcommands.
fn flagged() -> impl Iterator<Item = (&'static Knob, String)> {
    KNOBS.iter().filter(|knob| knob.name != "state_dir").filter_map(|knob| Some((knob, knob.flag()?)))
}

/// Whether an argument is the flag of a knob.
pub fn is_knob(arg: &Arg) -> bool {
    flagged().any(|(knob, _)| arg.get_id() == knob.name)
}

impl Args for Knobs {
    fn augment_args(command: clap::Command) -> clap::Command {
        let defaults = Config::default();
        command.args(flagged().map(|(knob, flag)| {
            let default = match knob.toml(&defaults) {
                none if none == "\"\"" => String::new(),
                value => format!(" [default: {}]", value.trim_matches(['[', ']', '"']).replace("\", \"", ",")),
            };
            let arg = Arg::new(knob.name)
                .long(flag)
                .value_name(knob.kind.placeholder().into_owned())
                .help(knob.doc().trim_end_matches('.').to_owned() + &default)
                .action(if knob.kind.is_list() { ArgAction::Append } else { ArgAction::Set });
            match knob.section() {
                Some(section) => arg.help_heading(format!("Knobs of [{section}]")),
                None => arg,
            }
        }))
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Knobs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let given = flagged().flat_map(|(knob, _)| {
            let texts = matches.get_many::<String>(knob.name).into_iter().flatten();
            texts.map(|text| (knob.name.to_owned(), text.clone()))
        });
        Ok(Self(given.collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// Reads a time by RFC 3339, or a day.
fn time(text: &str) -> Result<SystemTime, String> {
    parse_rfc3339(text).ok_or_else(|| format!("`{text}` is no time like 2026-03-01 or 2026-03-01T12:00:00Z"))
}

/// Reads `90d`, `1h`, `15m` or `30s`.
fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("`{text}` is not a duration like 90d, 1h, 15m or 30s");
    let unit = text.chars().last().ok_or_else(wrong)?;
    let secs: u64 = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        'd' => 86_400,
        _ => return Err(wrong()),
    };
    let digits = &text[..text.len() - 1];
    let count: u64 =
        digits.parse().ok().filter(|_| digits.bytes().all(|byte| byte.is_ascii_digit())).ok_or_else(wrong)?;
    match count.checked_mul(secs) {
        Some(0) => Err("must last at least one second".into()),
        // Expiry times are added to the present; a century keeps the sum far from any end of the calendar.
        Some(secs) if secs <= 36_500 * 86_400 => Ok(Duration::from_secs(secs)),
        _ => Err("must be at most 36500d".into()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn knobs_of(arguments: &[&str]) -> Vec<(String, String)> {
        let cli = Cli::try_parse_from([&["exec-gateway"], arguments].concat()).unwrap();
        match cli.command {
            Command::Serve { knobs } | Command::Demo { knobs, .. } => knobs.0,
            Command::Check { knobs } | Command::Probe { knobs } | Command::Config { knobs } => knobs.0,
            other => panic!("{other:?} has no knobs"),
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_knob_but_a_secret_has_its_flag_on_the_commands_that_need_it() {
        for command in ["serve", "demo", "check", "probe", "config"] {
            for (knob, flag) in flagged() {
                let wanted = [(knob.name.to_string(), "text".to_string())];
                assert_eq!(knobs_of(&[command, &format!("--{flag}"), "text"]), wanted);
            }
        }
        assert!(Cli::try_parse_from(["exec-gateway", "serve", "--auth-upstream-secret", "x"]).is_err());
    }

    #[test]
    fn listen_can_be_repeated() {
        assert_eq!(knobs_of(&["serve", "--listen", "a", "--listen", "b"]).len(), 2);
    }

    #[test]
    fn the_common_options_stand_after_any_subcommand() {
        for command in [
            "serve",
            "demo",
            "check",
            "probe",
            "config",
            "token list",
            "token revoke tok_1",
            "executor list",
            "executor delete exe_1",
            "cap-token --workspace w",
            "revoke --turn t",
            "audit --follow",
        ] {
            let words = command.split(' ').chain(["--json", "--state-dir", "d", "--config", "c"]);
            let cli = Cli::try_parse_from(std::iter::once("exec-gateway").chain(words)).unwrap();
            let Common { config, state_dir, json } = cli.common;
            assert_eq!((config, state_dir.as_deref(), json), (Some("c".into()), Some("d"), true), "{command}");
        }
    }

    #[test]
    fn revoke_takes_a_turn_or_a_workspace_and_not_both() {
        for (arguments, fine) in [
            (&["revoke", "--turn", "t"][..], true),
            (&["revoke", "--workspace", "w"], true),
            (&["revoke"], false),
            (&["revoke", "--turn", "t", "--workspace", "w"], false),
        ] {
            let parsed = Cli::try_parse_from([&["exec-gateway"], arguments].concat());
            assert_eq!(parsed.is_ok(), fine, "{arguments:?}");
        }
    }

    #[test]
    fn a_chain_is_verified_whole_or_not_at_all() {
        let parses = |words: &str| Cli::try_parse_from(["exec-gateway", "audit"].into_iter().chain(words.split(' ')));
        assert!(parses("--verify --json").is_ok());
        assert!(parses("--follow --workspace w --since 2026-03-01T12:00:00+01:00").is_ok());
        for wrong in ["--verify --follow", "--verify --workspace w", "--verify --since 2026-03-01", "--since yesterday"]
        {
            assert!(parses(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn durations_have_one_number_and_one_unit() {
        for (text, secs) in [("90d", 90 * 86_400), ("1h", 3600), ("15m", 900), ("30s", 30)] {
            assert_eq!(duration(text), Ok(Duration::from_secs(secs)));
        }
        for bad in ["", "d", "1", "1w", "-1h", "+1h", "1.5h", "1h30m", "0s", "99999999999999999999s", "40000d", "1é"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }
}
