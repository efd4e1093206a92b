//! Resolved: the configuration put together from flags, environment, file and defaults, with the source of each value.
//! Gathers every fault before it gives up, and never repeats a secret in one.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Serialize;
use toml::de::{DeTable, DeValue};

use super::{Auth, Config, KNOBS, Kind, Knob, SECTIONS, Secret, usual_state_dir};

/// A secret with the other ways to give it.
struct SecretKnobs {
    knob: &'static str,
    file: &'static str,
    /// Its name among systemd's credentials.
    credential: &'static str,
    of: fn(&mut Auth) -> (&mut Option<Secret>, &Option<PathBuf>),
}

static SECRETS: [SecretKnobs; 3] = [
    SecretKnobs {
        knob: "auth.upstream_secret",
        file: "auth.upstream_secret_file",
        credential: "upstream_secret",
        of: |auth| (&mut auth.upstream_secret, &auth.upstream_secret_file),
    },
    SecretKnobs {
        knob: "auth.shared_secret",
        file: "auth.shared_secret_file",
        credential: "shared_secret",
        of: |auth| (&mut auth.shared_secret, &auth.shared_secret_file),
    },
    SecretKnobs {
        knob: "auth.internal_secret",
        file: "auth.internal_secret_file",
        credential: "internal_secret",
        of: |auth| (&mut auth.internal_secret, &auth.internal_secret_file),
    },
];

/// A configuration and where each value of it came from.
#[derive(Debug, Clone)]
pub struct Resolved {
    /// The values in effect.
    pub config: Config,
    /// The source of every knob, by its name.
    pub sources: BTreeMap<&'static str, Source>,
}

/// Where a value came from. Among the first four the later wins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// Nobody said otherwise.
    Default,
    /// The configuration file.
    File,
    /// A variable of the environment.
    Environment,
    /// The command line.
    Flag,
    /// The file that `auth.upstream_secret_file` names.
    SecretFile,
    /// A credential that systemd passed.
    Credential,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Default => "default",
            Self::File => "file",
            Self::Environment => "environment",
            Self::Flag => "flag",
            Self::SecretFile => "secret file",
            Self::Credential => "credential",
        })
    }
}

/// One thing that is wrong with the configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Fault {
    /// The knob's name, variable or flag, or the path of the file.
    #[serde(rename = "where")]
    pub place: String,
    /// The line of the file, from 1.
    pub line: Option<usize>,
    /// What is wrong. Never holds a secret.
    pub message: String,
    /// What was probably meant.
    pub hint: Option<String>,
}

impl Fault {
    /// One without a line or a hint.
    pub fn new(place: impl Into<String>, message: impl Into<String>) -> Self {
        Self { place: place.into(), line: None, message: message.into(), hint: None }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", Plain(&self.place))?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        write!(f, ": {}", Plain(&self.message))?;
        self.hint.as_ref().map_or(Ok(()), |hint| write!(f, " (did you mean {hint}?)"))
    }
}

/// Text from outside on one line, without the control characters that could rewrite a terminal.
struct Plain<'a>(&'a str);

impl fmt::Display for Plain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.chars().try_for_each(|letter| match letter {
            letter if letter.is_control() => write!(f, "{}", letter.escape_default()),
            letter => fmt::Write::write_char(f, letter),
        })
    }
}

/// All that is wrong with a configuration, one per line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, thiserror::Error)]
#[serde(transparent)]
pub struct ConfigFaults(pub Vec<Fault>);

impl fmt::Display for ConfigFaults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines: Vec<String> = self.0.iter().map(Fault::to_string).collect();
        f.write_str(&lines.join("\n"))
    }
}

impl From<Fault> for ConfigFaults {
    fn from(fault: Fault) -> Self {
        Self(vec![fault])
    }
}

impl Config {
    /// Puts the configuration together: a flag wins over the environment, the environment over the file, the file over
    /// the default. `flags` are pairs of a knob's name and a text, in the order of the command line; `file` is the path
    /// (for messages) and content of a TOML file; `env` is the whole environment, of which other variables than
    /// `EXEC_GATEWAY_*` matter for the state directory and the credentials only. Texts of flags and variables are
    /// comma-separated where the knob is a list.
    ///
    /// The result is not validated, so that it can be shown even when it is not fit to start with.
    ///
    /// # Errors
    /// All faults at once: unknown names, texts that are no value, secrets that cannot be read, and then also what
    /// [`Config::validate`] finds in the rest.
    pub fn resolve(
        flags: &[(String, String)],
        file: Option<(&Path, &str)>,
        env: impl Iterator<Item = (OsString, OsString)>,
    ) -> Result<Resolved, ConfigFaults> {
        let env: HashMap<OsString, OsString> = env.collect();
        let mut draft = Draft::default();
        if let Some((path, text)) = file {
            draft.take_file(path, text);
        }
        draft.take_environment(&env);
        draft.take_flags(flags);
        let credentials = env.get(OsStr::new("CREDENTIALS_DIRECTORY")).map(Path::new);
        SECRETS.iter().for_each(|secret| draft.find_secret(secret, credentials));
        if draft.config.state_dir.is_none() {
            draft.config.state_dir = usual_state_dir(|name| env.get(OsStr::new(name)).cloned());
        }
        draft.finish()
    }
}

/// The configuration while sources are read into it, from the weakest to the strongest.
#[derive(Default)]
struct Draft {
    config: Config,
    sources: BTreeMap<&'static str, Source>,
    /// Knobs whose value could not be read: what they hold now was never meant, so no rule is checked on it.
    refused: BTreeSet<&'static str>,
    torn_file: bool,
    faults: Vec<Fault>,
}

impl Draft {
    fn take(&mut self, knob: &'static Knob, source: Source, items: Result<Vec<String>, String>, fault: Fault) {
        match items.and_then(|items| knob.set(&mut self.config, &items)) {
            Ok(()) => {
                self.sources.insert(knob.name, source);
            }
            Err(message) => {
                self.refused.insert(knob.name);
                // A variable or flag names the knob already; a line of the file does not.
                let message = if source == Source::File { format!("`{}`: {message}", knob.name) } else { message };
                self.faults.push(Fault { message, ..fault });
            }
        }
    }

    fn take_file(&mut self, path: &Path, text: &str) {
        let at = |offset: usize, message: String| Fault {
            line: Some(1 + text.bytes().take(offset).filter(|byte| *byte == b'\n').count()),
            ..Fault::new(path.display().to_string(), message)
        };
        let (table, errors) = DeTable::parse_recoverable(text);
        if !errors.is_empty() {
            // The keys around a torn line may be pieces of it: reporting them would only mislead.
            self.torn_file = true;
            // Only the message: the error's own text would show the line, which may hold a secret.
            let offset = |error: &toml::de::Error| error.span().map_or(0, |span| span.start);
            self.faults.extend(errors.iter().map(|error| at(offset(error), error.message().into())));
            return;
        }
        let mut entries: Vec<_> = table.get_ref().iter().collect();
        entries.sort_by_key(|(key, _)| key.span().start);
        for (key, value) in entries {
            let (name, offset) = (key.get_ref().as_ref(), key.span().start);
            let known = SECTIONS.iter().any(|(section, _)| *section == name);
            match value.get_ref() {
                DeValue::Table(section) if known => {
                    let mut entries: Vec<_> = section.iter().collect();
                    entries.sort_by_key(|(key, _)| key.span().start);
                    for (key, value) in entries {
                        let fault = at(key.span().start, String::new());
                        self.take_key(Some(name), key.get_ref(), value.get_ref(), fault);
                    }
                }
                DeValue::Table(_) if KNOBS.iter().all(|knob| knob.name != name) => {
                    let hint = nearest(name, SECTIONS.iter().map(|(section, _)| *section), levenshtein);
                    let hint = hint.map(|section| format!("[{section}]"));
                    self.faults.push(Fault { hint, ..at(offset, format!("unknown section [{name}]")) });
                }
                _ if known => self.faults.push(at(offset, format!("`{name}` is a section: write [{name}]"))),
                value => self.take_key(None, name, value, at(offset, String::new())),
            }
        }
    }

    fn take_key(&mut self, section: Option<&str>, key: &str, value: &DeValue<'_>, fault: Fault) {
        match KNOBS.iter().find(|knob| knob.section() == section && knob.key() == key) {
            Some(knob) => {
                self.take(knob, Source::File, items_of(value, knob.kind), fault);
            }
            None => {
                let name = section.map_or(key.to_string(), |section| format!("{section}.{key}"));
                let hint = nearest_knob(&name).map(|knob| format!("`{}`", knob.name));
                self.faults.push(Fault { message: format!("unknown key `{name}`"), hint, ..fault });
            }
        }
    }

    fn take_environment(&mut self, env: &HashMap<OsString, OsString>) {
        let mut variables: Vec<_> = env.iter().collect();
        variables.sort();
        for (variable, value) in variables {
            let variable = variable.to_string_lossy();
            let Some(name) = variable.strip_prefix("EXEC_GATEWAY_") else { continue };
            let fault = Fault::new(variable.as_ref(), "unknown variable");
            match KNOBS.iter().find(|knob| knob.variable() == *variable) {
                Some(knob) => {
                    let items = value.to_str().ok_or("is not UTF-8".into()).map(|text| split(text, knob.kind));
                    self.take(knob, Source::Environment, items, fault);
                }
                None => {
                    let hint = nearest_knob(&name.to_lowercase()).map(Knob::variable);
                    self.faults.push(Fault { hint, ..fault });
                }
            }
        }
    }

    fn take_flags(&mut self, flags: &[(String, String)]) {
        let mut given: Vec<(&str, Vec<&str>)> = Vec::new();
        for (name, text) in flags {
            match given.iter_mut().find(|(known, _)| known == name) {
                Some((_, texts)) => texts.push(text),
                None => given.push((name, vec![text])),
            }
        }
        for (name, texts) in given {
            let fault = Fault::new(format!("--{}", name.replace(['.', '_'], "-")), "unknown flag");
            match KNOBS.iter().find(|knob| knob.name == name) {
                Some(knob) if knob.kind == Kind::Secret => self.faults.push(Fault {
                    message: "a secret is not taken from the command line, which everybody on the machine can read"
                        .into(),
                    hint: Some(format!("{}-file", fault.place)),
                    ..fault
                }),
                Some(knob) => {
                    let items = texts.iter().flat_map(|text| split(text, knob.kind)).collect();
                    self.take(knob, Source::Flag, Ok(items), fault);
                }
                None => {
                    let hint = nearest_knob(name).and_then(Knob::flag).map(|flag| format!("--{flag}"));
                    self.faults.push(Fault { hint, ..fault });
                }
            }
        }
    }

    /// The secret may be given itself, by its file, or by systemd; of the first two the stronger source counts.
    fn find_secret(&mut self, secret: &SecretKnobs, credentials: Option<&Path>) {
        let source = |knob| self.sources.get(knob).copied().unwrap_or(Source::Default);
        let (direct, by_file) = (source(secret.knob), source(secret.file));
        let (value, file) = (secret.of)(&mut self.config.auth);
        let (path, found) = match file {
            Some(_) if value.is_some() && direct == by_file => {
                let message = format!("{} is given as well; only one of them can hold", secret.knob);
                return self.faults.push(Fault::new(secret.file, message));
            }
            Some(path) if value.is_none() || direct < by_file => (path.clone(), Source::SecretFile),
            _ if value.is_some() || self.refused.contains(secret.knob) => return,
            _ => match credentials.map(|directory| directory.join(secret.credential)) {
                Some(path) if path.exists() => (path, Source::Credential),
                _ => return,
            },
        };
        match read_secret(&path) {
            Ok(text) => {
                *value = Some(text);
                self.sources.insert(secret.knob, found);
            }
            Err(message) => {
                self.refused.insert(secret.knob);
                self.faults.push(Fault::new(secret.file, message));
            }
        }
    }

    fn finish(mut self) -> Result<Resolved, ConfigFaults> {
        if self.faults.is_empty() {
            let source = |knob: &Knob| self.sources.get(knob.name).copied().unwrap_or(Source::Default);
            let sources = KNOBS.iter().map(|knob| (knob.name, source(knob))).collect();
            return Ok(Resolved { config: self.config, sources });
        }
        // Without its file the rest says little: a knob that seems to be missing may stand there.
        if !self.torn_file {
            let rules = self.config.validate();
            self.faults.extend(rules.into_iter().filter(|fault| !self.refused.contains(fault.place.as_str())));
        }
        Err(ConfigFaults(self.faults))
    }
}

fn split(text: &str, kind: Kind) -> Vec<String> {
    if !kind.is_list() {
        return vec![text.into()];
    }
    text.split(',').map(str::trim).filter(|item| !item.is_empty()).map(String::from).collect()
}

fn items_of(value: &DeValue<'_>, kind: Kind) -> Result<Vec<String>, String> {
    let wrong = || format!("must be {}", kind.in_file());
    match value {
        DeValue::Integer(number) if kind == Kind::Number => u64::from_str_radix(number.as_str(), number.radix())
            .map(|number| vec![number.to_string()])
            .map_err(|_| format!("`{number}` is not a whole number of 0 or more")),
        DeValue::Array(items) if kind.is_list() => {
            items.iter().map(|item| item.get_ref().as_str().map(String::from).ok_or_else(wrong)).collect()
        }
        DeValue::Boolean(on) if kind == Kind::Switch => Ok(vec![on.to_string()]),
        DeValue::String(text) if !matches!(kind, Kind::Number | Kind::Switch) && !kind.is_list() => {
            Ok(vec![text.to_string()])
        }
        _ => Err(wrong()),
    }
}

fn read_secret(path: &Path) -> Result<Secret, String> {
    // A secret is short; the bound keeps a wrong path, such as a device, from filling the memory.
    const BYTES_MAX: u64 = 64 * 1024;
    let name = path.display();
    let mut text = zeroize::Zeroizing::new(String::new());
    let read = File::open(path).and_then(|file| file.take(BYTES_MAX).read_to_string(&mut text));
    match (read, text.trim_end_matches(['\r', '\n'])) {
        (Err(error), _) => Err(format!("{name} cannot be read: {error}")),
        (Ok(_), "") => Err(format!("{name} is empty")),
        (Ok(_), secret) => Ok(Secret::new(secret.into())),
    }
}

fn nearest_knob(name: &str) -> Option<&'static Knob> {
    fn key(name: &str) -> &str {
        name.rsplit_once('.').map_or(name, |(_, key)| key)
    }
    // Variables have no dots, and the right key in the wrong section is a near miss too.
    let found = nearest(name, KNOBS.iter().map(|knob| knob.name), |name, known| {
        let whole = levenshtein(&name.replace('.', "_"), &known.replace('.', "_"));
        whole.min(1 + levenshtein(key(name), key(known)))
    })?;
    KNOBS.iter().find(|knob| knob.name == found)
}

/// The known name at the least distance, if that is near enough to have been meant.
fn nearest<'a>(
    name: &str,
    known: impl Iterator<Item = &'a str>,
    distance: impl Fn(&str, &str) -> usize,
) -> Option<&'a str> {
    let near = (name.len() / 4).max(2);
    known.map(|known| (distance(name, known), known)).min().filter(|(far, _)| *far <= near).map(|(_, known)| known)
}

/// How many letters to add, drop or replace to make one word the other.
fn levenshtein(one: &str, other: &str) -> usize {
    let other: Vec<char> = other.chars().collect();
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (nth, letter) in one.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], nth + 1);
        for (column, wanted) in other.iter().enumerate() {
            let replaced = diagonal + usize::from(letter != *wanted);
            diagonal = row[column + 1];
            row[column + 1] = replaced.min(diagonal + 1).min(row[column] + 1);
        }
    }
    row[other.len()]
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const FILE: &str = "gateway.toml";

    fn resolve(flags: &[(&str, &str)], file: &str, env: &[(&str, &str)]) -> Result<Resolved, ConfigFaults> {
        let flags: Vec<_> = flags.iter().map(|(name, text)| (name.to_string(), text.to_string())).collect();
        let env = env.iter().map(|(name, text)| (OsString::from(name), OsString::from(text)));
        Config::resolve(&flags, Some((Path::new(FILE), file)), env)
    }

    fn faults(flags: &[(&str, &str)], file: &str, env: &[(&str, &str)]) -> Vec<Fault> {
        resolve(flags, file, env).unwrap_err().0
    }

    /// A value that differs from the default, as a flag or variable has it and as the file has it.
    fn another_value(knob: &Knob) -> (String, String) {
        let quoted = |text: &str| (text.to_string(), format!("\"{text}\""));
        match knob.kind {
            Kind::Address => quoted("127.0.0.1:7001"),
            Kind::Addresses => ("127.0.0.1:7002,[::1]:7003".into(), r#"["127.0.0.1:7002", "[::1]:7003"]"#.into()),
            Kind::Path => quoted("elsewhere"),
            Kind::Url => quoted("http://other.test"),
            Kind::Secret => quoted("hunter2"),
            Kind::Networks => ("10.0.0.0/8, ::1".into(), r#"["10.0.0.0/8", "::1"]"#.into()),
            Kind::Texts => ("A_*, B".into(), r#"["A_*", "B"]"#.into()),
            Kind::Number => {
                let number = knob.get(&Config::default()).as_u64().unwrap() + 1;
                (number.to_string(), number.to_string())
            }
            Kind::Switch => {
                let other = (knob.get(&Config::default()) == false).to_string();
                (other.clone(), other)
            }
            Kind::Choice(words) => quoted(words[words.len() - 1]),
        }
    }

    fn in_file(knob: &Knob, value: &str) -> String {
        let section = knob.section().map(|section| format!("[{section}]\n")).unwrap_or_default();
        format!("{section}{} = {value}\n", knob.key())
    }

    #[test]
    fn every_knob_is_set_by_flag_by_variable_and_by_file() {
        let scratch = Scratch::new("every-knob");
        let secret = scratch.write("secret", "from the file");
        for knob in KNOBS {
            let (mut text, mut value) = another_value(knob);
            if knob.name.ends_with("_secret_file") {
                (text, value) = (secret.clone(), format!("'{secret}'"));
            }
            let mut ways = vec![
                (resolve(&[], "", &[(&knob.variable(), &text)]), Source::Environment),
                (resolve(&[], &in_file(knob, &value), &[]), Source::File),
            ];
            if knob.flag().is_some() {
                ways.push((resolve(&[(knob.name, &text)], "", &[]), Source::Flag));
            }
            let shown: Vec<_> = ways
                .into_iter()
                .map(|(resolved, source)| {
                    let resolved = resolved.unwrap();
                    assert_eq!(resolved.sources[knob.name], source, "{}", knob.name);
                    knob.get(&resolved.config)
                })
                .collect();
            assert_ne!(shown[0], knob.get(&Config::default()), "{}", knob.name);
            assert!(shown.iter().all(|value| *value == shown[0]), "{}: {shown:?}", knob.name);
        }
    }

    #[test]
    fn no_two_knobs_share_a_flag_or_a_variable() {
        let flags: BTreeSet<_> = KNOBS.iter().map(|knob| knob.name.replace(['.', '_'], "-")).collect();
        let variables: BTreeSet<_> = KNOBS.iter().map(Knob::variable).collect();
        assert_eq!((flags.len(), variables.len()), (KNOBS.len(), KNOBS.len()));
    }

    #[test]
    fn a_flag_wins_over_the_environment_which_wins_over_the_file() {
        let (flag, env, file) =
            (("link.ping_secs", "11"), ("EXEC_GATEWAY_LINK_PING_SECS", "12"), "link.ping_secs = 13");
        for (resolved, value, source) in [
            (resolve(&[flag], file, &[env]), 11, Source::Flag),
            (resolve(&[], file, &[env]), 12, Source::Environment),
            (resolve(&[], file, &[]), 13, Source::File),
            (resolve(&[], "", &[]), 20, Source::Default),
        ] {
            let resolved = resolved.unwrap();
            assert_eq!((resolved.config.link.ping_secs, resolved.sources["link.ping_secs"]), (value, source));
        }
    }

    #[test]
    fn a_repeated_flag_makes_a_list_and_is_refused_where_one_value_is_meant() {
        let resolved = resolve(&[("listen", "127.0.0.1:1"), ("listen", "127.0.0.1:2,127.0.0.1:3")], "", &[]).unwrap();
        assert_eq!(resolved.config.listen.len(), 3);
        let twice = faults(&[("log_level", "info"), ("log_level", "warn")], "", &[]);
        assert_eq!(twice[0].to_string(), "--log-level: takes one value, not 2");
    }

    #[test]
    fn an_empty_text_takes_an_optional_value_back() {
        let env = ("EXEC_GATEWAY_PUBLIC_URL", "");
        let resolved = resolve(&[], "public_url = 'http://gateway.test'", &[env]).unwrap();
        assert_eq!((resolved.config.public_url, resolved.sources["public_url"]), (None, Source::Environment));
    }

    #[test]
    fn an_unknown_key_is_refused_with_its_line_and_the_nearest_name() {
        let file =
            "log_level = 'info'\n\n[auth]\nupstream_ulr = 'x'\n[edge]\nping_secs = 3\n[lnik]\n[link]\nzebra = 1\n";
        let lines: Vec<String> = faults(&[], file, &[]).iter().map(Fault::to_string).collect();
        assert_eq!(
            lines,
            [
                "gateway.toml:4: unknown key `auth.upstream_ulr` (did you mean `auth.upstream_url`?)",
                "gateway.toml:6: unknown key `edge.ping_secs` (did you mean `link.ping_secs`?)",
                "gateway.toml:7: unknown section [lnik] (did you mean [link]?)",
                "gateway.toml:9: unknown key `link.zebra`",
            ]
        );
    }

    #[test]
    fn an_unknown_variable_is_refused_with_the_nearest_name() {
        let found = faults(&[], "", &[("EXEC_GATEWAY_UPSTREAM_URL", "x"), ("EXEC_OTHER", "x")]);
        let hint = Some("EXEC_GATEWAY_AUTH_UPSTREAM_URL".to_string());
        assert_eq!(found, [Fault { hint, ..Fault::new("EXEC_GATEWAY_UPSTREAM_URL", "unknown variable") }]);
    }

    #[test]
    fn all_faults_come_at_once_and_rules_are_checked_on_the_rest() {
        let found = faults(
            &[("log_level", "loud"), ("lissen", "x")],
            "listen = '127.0.0.1:1'\n[link]\nping_secs = -1\nstreams_max = 500\n",
            &[("EXEC_GATEWAY_TOOLS_TIMEOUT_SECS", "soon"), ("EXEC_GATEWAY_NOISE", "1")],
        );
        let places: Vec<_> = found.iter().map(|fault| (fault.place.as_str(), fault.line)).collect();
        assert_eq!(
            places,
            [
                (FILE, Some(1)),
                (FILE, Some(3)),
                ("EXEC_GATEWAY_NOISE", None),
                ("EXEC_GATEWAY_TOOLS_TIMEOUT_SECS", None),
                ("--log-level", None),
                ("--lissen", None),
                ("link.streams_max", None),
            ]
        );
    }

    #[test]
    fn a_fault_stays_on_its_line_whatever_stands_in_the_value() {
        let found = faults(&[("log_level", "a\nb\u{1b}[2J")], "", &[]);
        assert_eq!(found[0].to_string(), r"--log-level: `a\nb\u{1b}[2J` is none of error, warn, info, debug, trace");
    }

    #[test]
    fn a_torn_file_is_named_by_line_and_nothing_of_it_is_repeated() {
        let found = faults(&[], "log_level = 'info'\n[auth]\nupstream_secret = 'hunter2\n", &[]);
        assert!(found.iter().all(|fault| fault.line >= Some(3)), "{found:?}");
        assert!(!ConfigFaults(found).to_string().contains("hunter2"));
    }

    #[test]
    fn a_secret_is_never_shown() {
        let env = [("EXEC_GATEWAY_AUTH_UPSTREAM_SECRET", "hunter2")];
        let resolved = resolve(&[], "", &env).unwrap();
        assert_eq!(resolved.config.auth.upstream_secret.as_ref().unwrap().expose(), "hunter2");
        assert!(!format!("{resolved:?}").contains("hunter2"));
        for knob in KNOBS {
            assert!(!knob.toml(&resolved.config).contains("hunter2"), "{}", knob.name);
        }

        let faulty = [
            resolve(&[("auth.upstream_secret", "hunter2")], "", &[]),
            resolve(&[], "auth.upstream_secret = ['hunter2']", &[]),
            resolve(&[], "auth.upstream_secret.hunter = 'hunter2'", &[]),
            resolve(&[], "auth.upstream_url = 'http://me:hunter2@host'", &[]),
            resolve(&[], "", &[("EXEC_GATEWAY_AUTH_UPSTREAM_SECRET", "hunter2\n"), ("EXEC_GATEWAY_X", "hunter2")]),
        ];
        for result in faulty {
            let faults = result.unwrap_err();
            assert!(!format!("{faults} {faults:?}").contains("hunter2"), "{faults}");
        }
    }

    #[test]
    fn a_secret_on_the_command_line_is_refused_and_its_file_proposed() {
        let found = faults(&[("auth.upstream_secret", "hunter2")], "", &[]);
        assert_eq!(found[0].hint.as_deref(), Some("--auth-upstream-secret-file"));
    }

    #[test]
    fn a_secret_comes_from_its_file_or_from_systemd() {
        let scratch = Scratch::new("secret-sources");
        let file = scratch.write("named", "in the file\n");
        scratch.write("upstream_secret", "from systemd");
        let by_flag = ("auth.upstream_secret_file", file.as_str());
        let systemd = ("CREDENTIALS_DIRECTORY", scratch.0.to_str().unwrap());
        let direct = ("EXEC_GATEWAY_AUTH_UPSTREAM_SECRET", "direct");
        for (resolved, secret, source) in [
            (resolve(&[by_flag], "", &[systemd]), "in the file", Source::SecretFile),
            (resolve(&[by_flag], "", &[direct]), "in the file", Source::SecretFile),
            (resolve(&[], "", &[systemd]), "from systemd", Source::Credential),
            (resolve(&[], "", &[systemd, direct]), "direct", Source::Environment),
        ] {
            let resolved = resolved.unwrap();
            assert_eq!(resolved.config.auth.upstream_secret.unwrap().expose(), secret);
            assert_eq!(resolved.sources["auth.upstream_secret"], source);
        }

        let both = "auth.upstream_secret = 'x'\nauth.upstream_secret_file = 'y'";
        assert_eq!(faults(&[], both, &[])[0].place, "auth.upstream_secret_file");
        // Each secret has a credential of its own.
        scratch.write("internal_secret", "another");
        let auth = resolve(&[], "", &[systemd]).unwrap().config.auth;
        assert_eq!((auth.internal_secret.unwrap().expose(), auth.shared_secret), ("another", None));
        // An unreadable file is one fault: that the secret is missing as well would be noise.
        let missing = [("auth.upstream_secret_file", "no/such/file"), ("auth.upstream_url", "http://upstream.test")];
        assert_eq!(faults(&missing, "", &[]).len(), 1);
    }

    #[test]
    fn the_state_directory_is_found_in_the_documented_order() {
        let all = [("STATE_DIRECTORY", "/a:/b"), ("XDG_STATE_HOME", "/x"), ("HOME", "/h")];
        let found = |flags, env: &[(&str, &str)]| resolve(flags, "", env).unwrap().config.state_dir;
        assert_eq!(found(&[("state_dir", "/given")], &all), Some("/given".into()));
        assert_eq!(found(&[], &all), Some("/a".into()));
        assert_eq!(found(&[], &all[1..]), Some("/x/exec-gateway".into()));
        assert_eq!(found(&[], &all[2..]), Some("/h/.local/state/exec-gateway".into()));
        assert_eq!(found(&[], &[("XDG_STATE_HOME", "relative"), ("HOME", "")]), None);
    }

    /// A directory that goes with the test.
    struct Scratch(std::path::PathBuf);

    impl Scratch {
        fn new(test: &str) -> Self {
            let path = std::env::temp_dir().join(format!("exec-gateway-{test}-{}", std::process::id()));
            std::fs::create_dir_all(&path).unwrap();
            Self(path)
        }

        fn write(&self, name: &str, text: &str) -> String {
            let path = self.0.join(name);
            std::fs::write(&path, text).unwrap();
            path.to_str().unwrap().into()
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }
}
