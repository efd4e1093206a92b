//! The `audit` command: prints the records of the audit log, or verifies that nobody changed them. It reads files and
//! nothing else, so it works beside a daemon and without one.

use std::io::{ErrorKind, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use exec_gateway::audit::{AuditReader, DIRECTORY, Line, Verified, VerifyError, verify};
use exec_gateway::config::Config;
use exec_gateway::protocol::ids::WorkspaceId;
use exec_gateway::time::parse_rfc3339;
use serde_json::{Value, json};

use crate::show::print;

/// Pause between two looks for new records.
const FOLLOW_PAUSE: Duration = Duration::from_millis(200);

/// Which records to print.
pub struct Wanted {
    /// Only what this workspace did, or had done.
    pub workspace: Option<WorkspaceId>,
    /// Only what was recorded from then on.
    pub since: Option<SystemTime>,
    /// Whether to wait for more.
    pub follow: bool,
}

/// Prints the records, oldest first.
///
/// # Errors
/// The files cannot be read, or stdout takes no more.
pub fn records(config: &Config, wanted: &Wanted, json: bool) -> anyhow::Result<()> {
    let dir = config.state_dir()?.join(DIRECTORY);
    let unreadable = || format!("the audit log in {} cannot be read", dir.display());
    let mut reader = AuditReader::open(&dir, wanted.since).with_context(unreadable)?;
    let mut stdout = std::io::BufWriter::new(std::io::stdout().lock());
    loop {
        let written = match reader.next_line().with_context(unreadable)? {
            Some(line) => shown(&line, wanted, json).map_or(Ok(()), |text| stdout.write_all(&text)),
            None if wanted.follow => stdout.flush().map(|()| std::thread::sleep(FOLLOW_PAUSE)),
            None => return left(stdout.flush()).map(drop),
        };
        if left(written)? {
            return Ok(());
        }
    }
}

/// Whether the reader of stdout has left, like `head` that has what it wanted.
fn left(written: std::io::Result<()>) -> anyhow::Result<bool> {
    match written {
        Ok(()) => Ok(false),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(true),
        Err(error) => Err(error.into()),
    }
}

/// Verifies the whole chain and prints what it spans.
///
/// # Errors
/// The first break, or the files cannot be read.
pub fn check(config: &Config, json: bool) -> anyhow::Result<ExitCode> {
    let dir = config.state_dir()?.join(DIRECTORY);
    match verify(&dir) {
        Ok(verified) => {
            print(&if json { format!("{:#}\n", verified_json(&verified)) } else { verified_text(&verified) })?;
            Ok(ExitCode::SUCCESS)
        }
        Err(VerifyError::Broken(broken)) if json => {
            let place =
                json!({ "ok": false, "file": broken.file, "line": broken.line, "seq": broken.seq, "why": broken.why });
            print(&format!("{place:#}\n"))?;
            Ok(ExitCode::FAILURE)
        }
        Err(error) => Err(error.into()),
    }
}

fn verified_json(verified: &Verified) -> Value {
    let Verified { first_seq, head, files, missing, torn } = verified;
    json!({
        "ok": true, "first_seq": first_seq, "last_seq": head.seq, "head": head.hex(), "files": files,
        "missing": missing, "torn": torn,
    })
}

fn verified_text(verified: &Verified) -> String {
    let Verified { first_seq, head, files, missing, torn } = verified;
    if head.seq == 0 {
        return "there are no records\n".into();
    }
    let mut text = format!("records {first_seq} to {} in {files} files: the chain is whole\n", head.seq);
    text += &format!("head {}\n", head.hex());
    if *missing > 0 {
        text += &format!("{missing} records are missing: they could not be written\n");
    }
    if *torn {
        text += "the newest line is not whole yet\n";
    }
    text
}

/// A line as it is printed, with its end; `None` if it is not wanted.
fn shown(line: &Line, wanted: &Wanted, json: bool) -> Option<Vec<u8>> {
    let record: Value = serde_json::from_slice(&line.text).unwrap_or_default();
    let at = record["at"].as_str().and_then(parse_rfc3339);
    if wanted.since.is_some_and(|since| at.is_some_and(|at| at < since)) {
        return None;
    }
    // What is missing may be anybody's.
    let of_all = record["kind"] == "gap";
    let other = |workspace: &WorkspaceId| record["workspace"] != workspace.as_str();
    if wanted.workspace.as_ref().is_some_and(other) && !of_all {
        return None;
    }
    if json {
        // As it stands in the file, so that hashes can be made of it.
        return Some([&line.text, &b"\n"[..]].concat());
    }
    if record["kind"] == "file" {
        return None;
    }
    if !record.is_object() {
        return Some(format!("{} line {} is no record\n", name(&line.file), line.number).into_bytes());
    }
    Some((text(&record) + "\n").into_bytes())
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// One record on one line: when, number, what happens, whose, and the rest.
fn text(record: &Value) -> String {
    let said = |field: &str| record.get(field).filter(|value| !value.is_null()).map(cell);
    let (at, seq) = (said("at").unwrap_or_default(), said("seq").unwrap_or_default());
    let action = [said("action"), said("tool")].into_iter().flatten().collect::<Vec<_>>().join(" ");
    let who = [said("workspace"), said("user")].into_iter().flatten().collect::<Vec<_>>().join("/");
    let mut parts: Vec<String> = Vec::new();
    let mut add = |label: &str, field: &str, unit: &str| {
        parts.extend(said(field).map(|value| format!("{label}{value}{unit}")));
    };
    match record["kind"].as_str() {
        Some("begin") => {
            for field in ["credential", "client", "environment", "executor", "session", "what", "contents", "request"] {
                add("", field, "");
            }
        }
        Some("end") => {
            add("", "outcome", "");
            add("end of ", "of", "");
            add("exit ", "exit_code", "");
            add("", "duration_ms", " ms");
            add("in ", "bytes_in", " B");
            add("out ", "bytes_out", " B");
            const SAID: [&str; 13] = [
                "seq",
                "prev",
                "at",
                "kind",
                "action",
                "workspace",
                "outcome",
                "of",
                "exit_code",
                "duration_ms",
                "bytes_in",
                "bytes_out",
                "user",
            ];
            let fields = record.as_object().into_iter().flatten().map(|(field, _)| field.as_str());
            for field in fields.filter(|field| !SAID.contains(field)) {
                add(&format!("{field} "), field, "");
            }
        }
        Some("gap") => add("", "missing", " records could not be written"),
        Some("dropped") => {
            add("records up to ", "through_seq", "");
            add("went for their ", "why", "");
        }
        _ => parts.push(cell(record)),
    }
    let who = if who.is_empty() { "-" } else { &who };
    format!("{at} {seq:>8} {who:<16} {action:<20} {}", parts.join("  ")).trim_end().into()
}

/// A value on one line. Names from outside are written as in JSON where they hold what could rewrite a terminal.
fn cell(value: &Value) -> String {
    match value {
        Value::String(text) if !text.chars().any(char::is_control) => text.clone(),
        value => value.to_string().chars().map(|letter| if letter.is_control() { '?' } else { letter }).collect(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn line(record: &Value) -> Line {
        Line { file: "audit.jsonl".into(), number: 1, text: record.to_string().into_bytes(), whole: true }
    }

    fn begin() -> Value {
        json!({
            "seq": 7, "prev": "00", "at": "2026-03-01T12:00:00.250Z", "kind": "begin", "action": "tool.call",
            "workspace": "acme", "user": "ann", "credential": "tok_1", "environment": "box", "executor": "exe_1",
            "tool": "shell", "what": { "command": ["ls", "\u{1b}[2J"] },
        })
    }

    #[test]
    fn a_record_is_one_line_that_says_who_what_and_where() {
        assert_eq!(
            text(&begin()),
            "2026-03-01T12:00:00.250Z        7 acme/ann         tool.call shell      \
             tok_1  box  exe_1  {\"command\":[\"ls\",\"\\u001b[2J\"]}"
        );
        let end = json!({
            "seq": 8, "at": "T", "kind": "end", "of": 7, "action": "tool.call", "workspace": "acme", "outcome": "ok",
            "exit_code": 1, "bytes_in": 2, "bytes_out": 3, "duration_ms": 4, "frames_in": 5,
        });
        let text = text(&end);
        assert!(text.ends_with("ok  end of 7  exit 1  4 ms  in 2 B  out 3 B  frames_in 5"), "{text}");
    }

    #[test]
    fn a_name_cannot_rewrite_the_terminal() {
        let mut record = begin();
        record["environment"] = "a\u{1b}]0;x\u{7}\u{9b}b\nc".into();
        let text = text(&record);
        assert!(!text.contains(char::is_control), "{text:?}");
    }

    #[test]
    fn records_of_others_and_of_earlier_times_are_left_out_but_never_what_is_missing() {
        let of = |workspace: &str, since: &str| Wanted {
            workspace: Some(WorkspaceId::new(workspace).unwrap()),
            since: parse_rfc3339(since),
            follow: false,
        };
        let gap = json!({ "seq": 9, "at": "2026-03-01T12:00:00Z", "kind": "gap", "missing": 3 });
        assert!(shown(&line(&begin()), &of("acme", "2026-03-01"), false).is_some());
        assert!(shown(&line(&begin()), &of("other", "2026-03-01"), false).is_none());
        assert!(shown(&line(&begin()), &of("acme", "2026-03-02"), false).is_none());
        assert!(shown(&line(&gap), &of("acme", "2026-03-01"), false).is_some());
    }

    #[test]
    fn programs_get_the_line_as_it_stands_in_the_file() {
        let (line, all) = (line(&begin()), Wanted { workspace: None, since: None, follow: false });
        assert_eq!(shown(&line, &all, true).unwrap(), [&line.text[..], b"\n"].concat());
    }
}
