//! The `generate` command: man pages and shell completions for packages, made of the command line's own definition and
//! of the table of knobs, and the page of metrics. It writes into the directory that it is given and nowhere else.

use std::fs::File;
use std::path::Path;

use anyhow::Context;
use clap::{CommandFactory, ValueEnum};
use clap_complete::Shell;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, italic, roman};
use exec_gateway::config::{Config, KNOBS, Knob};
use exec_gateway::ops::metrics::Metric;

use crate::args::{self, Cli};

/// At the foot of every page.
const VERSION: &str = concat!("exec-gateway ", env!("CARGO_PKG_VERSION"));

/// What can be generated.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Generated {
    /// exec-gateway(1), a page for each of its commands, and exec-gateway.toml(5)
    Man,
    /// Completions for bash, zsh and fish
    Completions,
    /// METRICS.md: what /metrics prints
    Metrics,
}

/// Writes the files of one kind into `directory`, which is made if it is not there.
///
/// # Errors
/// A file cannot be written.
pub fn run(what: Generated, directory: &Path) -> anyhow::Result<()> {
    let write = || {
        std::fs::create_dir_all(directory)?;
        match what {
            Generated::Man => man(directory),
            Generated::Completions => completions(directory),
            Generated::Metrics => std::fs::write(directory.join("METRICS.md"), Metric::page()),
        }
    };
    write().with_context(|| format!("{} cannot be written", directory.display()))
}

fn completions(directory: &Path) -> std::io::Result<()> {
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut Cli::command(), "exec-gateway", directory)?;
    }
    Ok(())
}

fn man(directory: &Path) -> std::io::Result<()> {
    let mut command = Cli::command();
    command.build();
    pages(command, directory)?;
    configuration().to_writer(&mut File::create(directory.join("exec-gateway.toml.5"))?)
}

/// The page of a command, and those of the commands below it.
fn pages(command: clap::Command, directory: &Path) -> std::io::Result<()> {
    for below in command.get_subcommands().filter(|below| !below.is_hide_set()) {
        pages(below.clone(), directory)?;
    }
    let (root, branch) = (command.get_name() == "exec-gateway", command.has_subcommands());
    let has_knobs = command.get_arguments().any(args::is_knob);
    // A page of their own tells them once, with their variables; here they would fill a page of every command.
    let command = command.mut_args(|arg| if args::is_knob(&arg) { arg.hide(true) } else { arg });
    let man = Man::new(command).source(VERSION);
    let mut file = File::create(directory.join(man.get_filename()))?;
    man.render_title(&mut file)?;
    man.render_name_section(&mut file)?;
    man.render_synopsis_section(&mut file)?;
    man.render_description_section(&mut file)?;
    man.render_options_section(&mut file)?;
    if branch {
        man.render_subcommands_section(&mut file)?;
    }
    let mut end = Roff::new();
    if has_knobs {
        end.control("SH", ["KNOBS"]).text([
            roman("Every knob of "),
            bold("exec-gateway.toml"),
            roman("(5) but secrets is an option as well, and wins over the file: ping_secs of [link] is "),
            bold("--link-ping-secs"),
        ]);
    }
    if root {
        operation(&mut end);
    }
    end.control("SH", ["SEE ALSO"]).text([
        bold("exec-gateway"),
        roman("(1), "),
        bold("exec-gateway.toml"),
        roman("(5)"),
    ]);
    end.to_writer(&mut file)
}

/// What an operator of the service looks up: files, signals, and what a restart does.
fn operation(page: &mut Roff) {
    const FILES: [(&str, &str); 6] = [
        (
            "/etc/exec-gateway.toml",
            "Configuration of the service, exec-gateway.toml(5). It is read when the service starts. Its user is \
             made by systemd, so the file has to be readable by all, and secrets are given as credentials instead: \
             see the lines with LoadCredential in exec-gateway.service.",
        ),
        (
            "exec-gateway.socket",
            "Address of the API, 127.0.0.1:6060 unless changed by `systemctl edit`; the configuration's listen is \
             not used. It stays open while the service restarts: who connects meanwhile waits.",
        ),
        (
            "/var/lib/exec-gateway",
            "State of the service: database, keys, output of process sessions. Operators' commands need \
             `--state-dir /var/lib/exec-gateway`, as root. Removing the package keeps it, purging deletes it.",
        ),
        ("/var/lib/exec-gateway/admin.sock", "Where a running gateway takes operators' commands."),
        ("/usr/share/doc/exec-gateway/exec-gateway.toml", "Every knob at its default."),
        ("/usr/share/doc/exec-gateway/nginx.conf, Caddyfile", "TLS in front of the gateway."),
    ];
    const SIGNALS: [(&str, &str); 2] = [
        (
            "SIGTERM, SIGINT",
            "New calls are refused with 503 and Retry-After, those under way have drain.grace_secs, executors are told \
             to come back, and the process exits 0 within 60 s. Process sessions go on at their executors, and the \
             next gateway takes them up.",
        ),
        ("SIGHUP", "Configuration, certificates and secrets are read again."),
    ];
    const STATUS: [(&str, &str); 3] = [("0", "Done."), ("1", "Failed."), ("2", "Wrong usage or configuration.")];
    let sections = [("EXIT STATUS", &STATUS[..]), ("SIGNALS", &SIGNALS), ("FILES OF THE DEBIAN PACKAGE", &FILES)];
    for (heading, entries) in sections {
        page.control("SH", [heading]);
        for (name, text) in entries {
            page.control("TP", []).text([bold(*name)]).text([roman(*text)]);
        }
    }
}

/// exec-gateway.toml(5): every knob with its names and its default.
fn configuration() -> Roff {
    let (mut page, defaults, mut section) = (Roff::new(), Config::default(), Some(""));
    page.control("TH", ["exec-gateway.toml", "5", "", VERSION]);
    page.control("SH", ["NAME"]).text([roman("exec-gateway.toml - configuration of exec-gateway")]);
    page.control("SH", ["DESCRIPTION"]).text([roman(
        "A TOML file, given by --config. A flag of serve, demo, check, probe or config wins over the environment, the \
         environment over the file, the file over the default. Lists are comma-separated outside of the file. Unknown \
         keys and variables are refused, and `exec-gateway check` prints all that is wrong. A secret has no flag.",
    )]);
    for knob in KNOBS {
        if knob.section() != section {
            section = knob.section();
            let title = section.map_or("ABOVE ALL SECTIONS".to_owned(), |name| format!("[{name}]"));
            page.control("SH", [title.as_str()]);
        }
        page.control("TP", []).text([bold(knob.key()), roman(" = "), italic(knob.toml(&defaults))]);
        page.text([roman(knob.doc())]).control("br", []);
        page.text([roman(places(knob))]);
    }
    page
}

/// Where else a knob can be set, and its bounds.
fn places(knob: &Knob) -> String {
    let flag = knob.flag().map(|flag| format!("--{flag}, ")).unwrap_or_default();
    let range = knob.range.map(|range| format!("; from {} to {}", range.start(), range.end()));
    format!("{flag}{}{}", knob.variable(), range.unwrap_or_default())
}
