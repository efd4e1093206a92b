//! Knob: one entry of the table of knobs: its names, its sentence, and how its value is read from and shown as text.
//! Knows nothing of where a value came from, and never shows a secret.

use std::borrow::Cow;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::PathBuf;

use ipnet::IpNet;
use serde_json::Value;

use super::{Config, LogFormat, LogLevel, Secret, WhenFull};

/// Everything there is to know about one knob except its value.
pub struct Knob {
    /// The name in full: `auth.upstream_url`.
    pub name: &'static str,
    /// What values it takes.
    pub kind: Kind,
    /// The smallest and largest value of a number.
    pub range: Option<&'static RangeInclusive<u64>>,
    pub(super) doc: &'static str,
    pub(super) set: fn(&mut Config, &[String]) -> Result<(), String>,
    pub(super) get: fn(&Config) -> Value,
    /// Whether the value with which the gateway starts holds until it ends; others follow a reload.
    pub at_start: bool,
    pub(super) same: fn(&Config, &Config) -> bool,
    pub(super) copy: fn(&mut Config, &Config),
}

/// What values a knob takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// An address with its port.
    Address,
    /// A list of those.
    Addresses,
    /// A path; empty for none.
    Path,
    /// A base URL; empty for none.
    Url,
    /// A secret; empty for none. Never taken from the command line.
    Secret,
    /// A whole number.
    Number,
    /// True or false.
    Switch,
    /// A list of addresses without port, or ranges of them.
    Networks,
    /// A list of texts.
    Texts,
    /// One of these words.
    Choice(&'static [&'static str]),
}

impl Knob {
    /// The section of the file it stands in; `None` for those above all sections.
    pub fn section(&self) -> Option<&'static str> {
        self.name.split_once('.').map(|(section, _)| section)
    }

    /// Its name within the section.
    pub fn key(&self) -> &'static str {
        self.name.split_once('.').map_or(self.name, |(_, key)| key)
    }

    /// Its flag without the leading dashes: `auth-upstream-url`. Secrets have none, since everybody on a machine can
    /// read the arguments of its processes.
    pub fn flag(&self) -> Option<String> {
        (self.kind != Kind::Secret).then(|| self.name.replace(['.', '_'], "-"))
    }

    /// Its environment variable: `EXEC_GATEWAY_AUTH_UPSTREAM_URL`.
    pub fn variable(&self) -> String {
        format!("EXEC_GATEWAY_{}", self.name.replace('.', "_").to_uppercase())
    }

    /// Its sentences, on one line.
    pub fn doc(&self) -> String {
        self.doc.split_whitespace().collect::<Vec<_>>().join(" ")
    }

    /// Its value, for programs: a number, a text, a list of texts, or null for none. A secret is `***`.
    pub fn get(&self, config: &Config) -> Value {
        (self.get)(config)
    }

    /// Its value as it would stand in the file, except that a secret is `"***"`.
    pub fn toml(&self, config: &Config) -> String {
        match self.get(config) {
            Value::Null => "\"\"".into(),
            // Numbers and texts are written the same way in JSON and in TOML.
            Value::Array(items) => format!("[{}]", items.iter().map(Value::to_string).collect::<Vec<_>>().join(", ")),
            value => value.to_string(),
        }
    }

    /// Whether both have the same value; of a secret too.
    pub fn same(&self, one: &Config, other: &Config) -> bool {
        (self.same)(one, other)
    }

    /// Gives it the value that it has in `from`.
    pub fn copy(&self, config: &mut Config, from: &Config) {
        (self.copy)(config, from);
    }

    /// Sets it from the items of a list, or from the one text of anything else.
    ///
    /// # Errors
    /// A sentence for the operator; it repeats the text unless that may be a secret.
    pub fn set(&self, config: &mut Config, items: &[String]) -> Result<(), String> {
        (self.set)(config, items)
    }
}

impl Kind {
    /// Whether it holds several values.
    pub fn is_list(self) -> bool {
        matches!(self, Self::Addresses | Self::Networks | Self::Texts)
    }

    /// What stands for a value in help texts.
    pub fn placeholder(self) -> Cow<'static, str> {
        match self {
            Self::Address | Self::Addresses => "ADDR".into(),
            Self::Path => "PATH".into(),
            Self::Url => "URL".into(),
            Self::Secret => "SECRET".into(),
            Self::Number => "N".into(),
            Self::Switch => "true|false".into(),
            Self::Networks | Self::Texts => "LIST".into(),
            Self::Choice(words) => words.join("|").into(),
        }
    }

    /// How a value looks in the file, for the one who wrote something else there.
    pub(super) fn in_file(self) -> &'static str {
        match self {
            Self::Number => "a whole number",
            Self::Switch => "true or false",
            Self::Addresses | Self::Networks | Self::Texts => "an array of texts in quotes",
            _ => "a text in quotes",
        }
    }
}

/// A type that a knob can have.
pub(super) trait Setting: Sized {
    const KIND: Kind;
    fn parse(items: &[String]) -> Result<Self, String>;
    fn show(&self) -> Value;
}

pub(super) const USER_INFO: &str = "cannot hold a user or password; secrets have their own knob";

/// Whether a URL has something before the host, as in `http://user:password@host`.
pub(super) fn has_user_info(url: &str) -> bool {
    let authority = url.split_once("://").map_or(url, |(_, rest)| rest);
    authority.split(['/', '?', '#']).next().is_some_and(|authority| authority.contains('@'))
}

fn only(items: &[String]) -> Result<&str, String> {
    match items {
        [item] => Ok(item),
        [] => Err("needs a value".into()),
        _ => Err(format!("takes one value, not {}", items.len())),
    }
}

fn optional(items: &[String]) -> Result<Option<&str>, String> {
    only(items).map(|text| (!text.is_empty()).then_some(text))
}

fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| format!("`{text}` is not an address with a port, like 127.0.0.1:6060 or [::1]:6060"))
}

impl Setting for SocketAddr {
    const KIND: Kind = Kind::Address;
    fn parse(items: &[String]) -> Result<Self, String> {
        address(only(items)?)
    }
    fn show(&self) -> Value {
        self.to_string().into()
    }
}

impl Setting for Vec<SocketAddr> {
    const KIND: Kind = Kind::Addresses;
    fn parse(items: &[String]) -> Result<Self, String> {
        items.iter().map(|item| address(item)).collect()
    }
    fn show(&self) -> Value {
        self.iter().map(SocketAddr::to_string).collect()
    }
}

impl Setting for Vec<String> {
    const KIND: Kind = Kind::Texts;
    fn parse(items: &[String]) -> Result<Self, String> {
        Ok(items.to_vec())
    }
    fn show(&self) -> Value {
        self.clone().into()
    }
}

impl Setting for Vec<IpNet> {
    const KIND: Kind = Kind::Networks;
    fn parse(items: &[String]) -> Result<Self, String> {
        let network = |text: &String| {
            let address = || text.parse::<IpAddr>().ok().map(IpNet::from);
            let network = text.parse().ok().or_else(address);
            network.ok_or_else(|| format!("`{text}` is no address or network like 10.0.0.0/8"))
        };
        items.iter().map(network).collect()
    }
    fn show(&self) -> Value {
        self.iter().map(ToString::to_string).collect()
    }
}

impl Setting for Option<PathBuf> {
    const KIND: Kind = Kind::Path;
    fn parse(items: &[String]) -> Result<Self, String> {
        Ok(optional(items)?.map(PathBuf::from))
    }
    fn show(&self) -> Value {
        self.as_ref().map(|path| path.display().to_string()).into()
    }
}

/// The only texts that may be absent are URLs.
impl Setting for Option<String> {
    const KIND: Kind = Kind::Url;
    fn parse(items: &[String]) -> Result<Self, String> {
        // Refused before it is kept, so that no output of the configuration can show the password.
        match optional(items)? {
            Some(url) if has_user_info(url) => Err(USER_INFO.into()),
            url => Ok(url.map(String::from)),
        }
    }
    fn show(&self) -> Value {
        self.clone().into()
    }
}

impl Setting for Option<Secret> {
    const KIND: Kind = Kind::Secret;
    fn parse(items: &[String]) -> Result<Self, String> {
        Ok(optional(items)?.map(|text| Secret::new(text.into())))
    }
    fn show(&self) -> Value {
        self.as_ref().map(|secret| format!("{secret:?}")).into()
    }
}

macro_rules! numbers {
    ($($number:ty),*) => { $(
        impl Setting for $number {
            const KIND: Kind = Kind::Number;
            fn parse(items: &[String]) -> Result<Self, String> {
                let text = only(items)?;
                text.parse().map_err(|_| format!("`{text}` is not a whole number"))
            }
            fn show(&self) -> Value {
                (*self).into()
            }
        }
    )* };
}

numbers!(u64, usize);

impl Setting for bool {
    const KIND: Kind = Kind::Switch;
    fn parse(items: &[String]) -> Result<Self, String> {
        let text = only(items)?;
        text.parse().map_err(|_| format!("`{text}` is neither true nor false"))
    }
    fn show(&self) -> Value {
        (*self).into()
    }
}

macro_rules! choices {
    ($($choice:ident { $($variant:ident = $word:literal),* })*) => { $(
        impl Setting for $choice {
            const KIND: Kind = Kind::Choice(&[$($word),*]);
            fn parse(items: &[String]) -> Result<Self, String> {
                match only(items)? {
                    $( $word => Ok(Self::$variant), )*
                    other => Err(format!("`{other}` is none of {}", [$($word),*].join(", "))),
                }
            }
            fn show(&self) -> Value {
                match self { $( Self::$variant => $word, )* }.into()
            }
        }
    )* };
}

choices! {
    LogLevel { Error = "error", Warn = "warn", Info = "info", Debug = "debug", Trace = "trace" }
    LogFormat { Text = "text", Json = "json" }
    WhenFull { Refuse = "refuse", GoOn = "go_on" }
}
