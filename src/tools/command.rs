//! A command as callers write it, and what the executor is given to start.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Deserialize;

use super::ToolError;
use crate::protocol::rpc::EnvironmentInfo;

/// A command as callers write it.
#[derive(Debug, Clone, PartialEq, Eq, JsonSchema)]
#[schemars(untagged)]
pub(super) enum Command {
    /// For the environment's shell.
    Line(String),
    /// Program and arguments, run as they are.
    Argv(Vec<String>),
}

impl<'de> Deserialize<'de> for Command {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> serde::de::Visitor<'de> for Visitor {
            type Value = Command;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an array of strings or one string")
            }
            fn visit_str<E: serde::de::Error>(self, line: &str) -> Result<Command, E> {
                Ok(Command::Line(line.to_owned()))
            }
            fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut items: A) -> Result<Command, A::Error> {
                let mut argv = Vec::new();
                while let Some(item) = items.next_element()? {
                    argv.push(item);
                }
                Ok(Command::Argv(argv))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

impl Command {
    /// What the executor starts; a string goes through the shell that the executor names.
    pub(super) fn argv(self, environment: &EnvironmentInfo) -> Result<Vec<String>, ToolError> {
        let argv = match self {
            Self::Argv(argv) => argv,
            Self::Line(line) if line.trim().is_empty() => Vec::new(),
            Self::Line(line) => {
                let Some(shell) = &environment.shell else {
                    let message = "command: this environment names no shell; expected an array of strings";
                    return Err(ToolError::Arguments(message.into()));
                };
                let name = shell.name.to_ascii_lowercase();
                let flags: &[&str] = match name.as_str() {
                    "powershell" | "pwsh" => &["-NoProfile", "-Command"],
                    "cmd" => &["/C"],
                    _ => &["-c"],
                };
                let mut argv = vec![shell.path.clone()];
                argv.extend(flags.iter().map(ToString::to_string));
                argv.push(line);
                argv
            }
        };
        match argv.first() {
            None => Err(ToolError::Arguments("command: expected at least a program".into())),
            Some(program) if program.is_empty() => Err(ToolError::Arguments("command: the program is empty".into())),
            Some(_) if argv.iter().any(|word| word.contains('\0')) => {
                Err(ToolError::Arguments("command: a NUL character cannot be passed".into()))
            }
            Some(_) => Ok(argv),
        }
    }
}

/// Checks the caller's variables; what no operating system accepts would otherwise fail at the executor.
pub(super) fn check_env(env: &BTreeMap<String, String>) -> Result<(), ToolError> {
    for (name, value) in env {
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            return Err(ToolError::Arguments(format!("env.{name}: not a variable a process can have")));
        }
    }
    Ok(())
}
