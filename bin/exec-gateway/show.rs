//! The commands that show the configuration: `check` what is wrong with it, `config` what is in effect. They start
//! nothing and show no secret.

use std::io::Write;
use std::process::ExitCode;

use exec_gateway::config::{Config, ConfigFaults, KNOBS, Knob, Resolved};
use serde_json::{Value, json};

use crate::table::Table;

/// Prints all that is wrong; in text on stderr, where `serve` prints it too.
pub fn check(valid: Result<Config, ConfigFaults>, json: bool) -> anyhow::Result<ExitCode> {
    let faults = valid.err().map(|ConfigFaults(faults)| faults).unwrap_or_default();
    let fine = faults.is_empty();
    if json {
        print(&format!("{:#}\n", json!({ "ok": fine, "faults": faults })))?;
    } else if fine {
        print("the configuration is fine\n")?;
    } else {
        eprintln!("{}", ConfigFaults(faults));
    }
    Ok(if fine { ExitCode::SUCCESS } else { ExitCode::from(2) })
}

/// Prints every knob with its value and source.
pub fn config(resolved: &Resolved, json: bool) -> anyhow::Result<()> {
    let text = if json { format!("{:#}\n", config_json(resolved)) } else { config_table(resolved).to_string() };
    print(&text)
}

fn config_json(resolved: &Resolved) -> Value {
    let knob = |knob: &Knob| json!({ "name": knob.name, "value": knob.get(&resolved.config), "source": resolved.sources[knob.name] });
    KNOBS.iter().map(knob).collect()
}

fn config_table(resolved: &Resolved) -> Table {
    let mut table = Table::new(["KNOB", "VALUE", "SOURCE"].map(String::from).to_vec());
    for knob in KNOBS {
        let source = resolved.sources[knob.name].to_string();
        table.row(vec![knob.name.into(), knob.toml(&resolved.config), source]);
    }
    table
}

/// Writes to stdout. A reader that left, like `head`, has what it wanted.
///
/// # Errors
/// Any other failure to write, such as a full disk.
pub fn print(text: &str) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_effective_configuration_names_every_source_and_masks_the_secret() {
        let env = [("EXEC_GATEWAY_AUTH_UPSTREAM_SECRET".into(), "hunter2".into())].into_iter();
        let flags = [("link.ping_secs".into(), "7".into())];
        let resolved = Config::resolve(&flags, None, env).unwrap();
        let table = config_table(&resolved).to_string();
        let row = |knob: &str| {
            let line = table.lines().find(|line| line.starts_with(knob)).unwrap();
            line.split_whitespace().skip(1).map(String::from).collect::<Vec<_>>()
        };
        assert_eq!(row("link.ping_secs"), ["7", "flag"]);
        assert_eq!(row("auth.upstream_secret "), ["\"***\"", "environment"]);
        assert_eq!(row("log_level"), ["\"info\"", "default"]);
        assert!(!table.contains("hunter2") && !config_json(&resolved).to_string().contains("hunter2"));
    }
}
