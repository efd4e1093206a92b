//! Record: one line of the audit: what is said in it, and how it hangs on the line before.
//! Plain values; no file, no clock and no thread.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::protocol::ids::{ExecutorId, UserId, WorkspaceId};

/// Longest name from outside in a record, in bytes; names that the gateway gave are shorter.
const NAME_BYTES_MAX: usize = 256;

/// Where a chain stands: the number and the hash of its newest line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// Number of the newest record; 0 before the first one.
    pub seq: u64,
    /// SHA-256 of its line, without the line end; zeros before the first one.
    pub hash: [u8; 32],
}

impl Position {
    /// Before the first record.
    pub const START: Self = Self { seq: 0, hash: [0; 32] };

    /// Where the chain stands after this line, given without its end.
    pub fn after(self, line: &[u8]) -> Self {
        Self { seq: self.seq + 1, hash: Sha256::digest(line).into() }
    }

    /// The hash as records write it.
    pub fn hex(&self) -> String {
        hex(&self.hash)
    }
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// What somebody is about to do: who, what, where, and as which request.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Act {
    action: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    workspace: Option<WorkspaceId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    user: Option<UserId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    credential: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    request: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    client: Option<IpAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    environment: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    executor: Option<ExecutorId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    session: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    what: Option<Box<RawValue>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    contents: Option<Box<RawValue>>,
    #[serde(skip)]
    details: Option<Value>,
    #[serde(skip)]
    all: Option<Value>,
    #[serde(skip)]
    always: bool,
}

impl Act {
    /// An action by its name, like `tool.call`.
    pub fn new(action: &'static str) -> Self {
        Self { action, ..Self::default() }
    }

    /// Who acts, and with which credential; its name, never the credential itself.
    #[must_use]
    pub fn by(self, workspace: &WorkspaceId, user: Option<&UserId>, credential: impl ToString) -> Self {
        let credential = Some(credential.to_string());
        Self { workspace: Some(workspace.clone()), user: user.cloned(), credential, ..self }
    }

    /// Who acts where it is no caller: an operator, a service, an executor.
    #[must_use]
    pub fn by_the(self, role: &str) -> Self {
        Self { credential: Some(role.into()), ..self }
    }

    /// The workspace that it is about.
    #[must_use]
    pub fn of_workspace(self, workspace: &WorkspaceId) -> Self {
        Self { workspace: Some(workspace.clone()), ..self }
    }

    /// The person whom it is about.
    #[must_use]
    pub fn of_user(self, user: &UserId) -> Self {
        Self { user: Some(user.clone()), ..self }
    }

    /// The request that it came with.
    #[must_use]
    pub fn asked_as(self, request: &str) -> Self {
        Self { request: Some(clipped(request)), ..self }
    }

    /// The address that it came from.
    #[must_use]
    pub fn came_from(self, client: Option<IpAddr>) -> Self {
        Self { client, ..self }
    }

    /// The environment as the caller names it.
    #[must_use]
    pub fn at(self, environment: &str) -> Self {
        Self { environment: Some(clipped(environment)), ..self }
    }

    /// The executor on which it happens.
    #[must_use]
    pub fn on(self, executor: &ExecutorId) -> Self {
        Self { executor: Some(executor.clone()), ..self }
    }

    /// The process session that it is about.
    #[must_use]
    pub fn in_session(self, session: &str) -> Self {
        Self { session: Some(clipped(session)), ..self }
    }

    /// The tool.
    #[must_use]
    pub fn with_tool(self, tool: &'static str) -> Self {
        Self { tool: Some(tool), ..self }
    }

    /// What is done, like a command or a path. Recorded up to `audit.detail_bytes_max`.
    #[must_use]
    pub fn about(self, details: Value) -> Self {
        Self { details: Some(details), ..self }
    }

    /// What it is done with. Recorded only with `audit.contents`, up to `audit.content_bytes_max`.
    #[must_use]
    pub fn containing(self, contents: Value) -> Self {
        Self { all: Some(contents), ..self }
    }

    /// Never refused for want of a record: it takes something away, or would cost an executor its life.
    #[must_use]
    pub fn always(self) -> Self {
        Self { always: true, ..self }
    }

    pub(super) fn is_always(&self) -> bool {
        self.always
    }

    /// Brings what is done, and with what, into the size in which it is recorded.
    pub(super) fn bounded(mut self, detail_bytes_max: usize, content_bytes_max: Option<usize>) -> Self {
        self.what = self.details.take().map(|details| bounded(&details, detail_bytes_max));
        self.contents = self.all.take().zip(content_bytes_max).map(|(all, max)| bounded(&all, max));
        self
    }

    /// What is needed to tell its end.
    pub(super) fn open(&self) -> Open {
        Open { action: self.action.into(), workspace: self.workspace.clone() }
    }
}

/// What is under way, as its end repeats it and the head of each file lists it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Open {
    pub(super) action: Cow<'static, str>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) workspace: Option<WorkspaceId>,
}

fn clipped(name: &str) -> String {
    let end = (0..=NAME_BYTES_MAX.min(name.len())).rev().find(|end| name.is_char_boundary(*end)).unwrap_or(0);
    name[..end].to_owned()
}

/// The value as JSON, or of a larger one its beginning, size and hash.
fn bounded(value: &Value, bytes_max: usize) -> Box<RawValue> {
    let text = value.to_string();
    if text.len() > bytes_max {
        let end = (0..=bytes_max).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
        let cut = serde_json::json!({
            "cut": &text[..end],
            "bytes": text.len(),
            "sha256": hex(&Sha256::digest(&text)),
        });
        return raw(cut.to_string());
    }
    raw(text)
}

fn raw(json: String) -> Box<RawValue> {
    RawValue::from_string(json).expect("a value writes itself as JSON, and on one line")
}

/// How something ended.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    code: Cow<'static, str>,
    exit_code: Option<i64>,
    bytes_in: Option<u64>,
    bytes_out: Option<u64>,
    more: Map<String, Value>,
}

impl Outcome {
    /// `ok`, or a word that says why not.
    pub fn new(code: impl Into<Cow<'static, str>>) -> Self {
        Self { code: code.into(), ..Self::default() }
    }

    /// What the caller sent and was sent, in bytes.
    #[must_use]
    pub fn bytes(self, bytes_in: u64, bytes_out: u64) -> Self {
        Self { bytes_in: Some(bytes_in), bytes_out: Some(bytes_out), ..self }
    }

    /// The exit code of a command.
    #[must_use]
    pub fn exit_code(self, exit_code: Option<i64>) -> Self {
        Self { exit_code, ..self }
    }

    /// One more thing to know; names and numbers, never contents.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.more.insert(name.into(), value.into());
        self
    }
}

/// What a line says besides its place in the chain.
#[derive(Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub(super) enum Said<'a> {
    /// The head of a file.
    File {
        /// What is under way, by the numbers of its beginnings.
        open: Vec<(u64, &'a Open)>,
    },
    /// Something begins.
    Begin(&'a Act),
    /// It has ended.
    End {
        /// Number of its beginning.
        of: u64,
        #[serde(flatten)]
        open: &'a Open,
        outcome: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        exit_code: Option<i64>,
        #[serde(skip_serializing_if = "Option::is_none")]
        bytes_in: Option<u64>,
        #[serde(skip_serializing_if = "Option::is_none")]
        bytes_out: Option<u64>,
        #[serde(skip_serializing_if = "Option::is_none")]
        duration_ms: Option<u64>,
        #[serde(flatten)]
        more: &'a Map<String, Value>,
    },
    /// Records that could not be written are missing here.
    Gap {
        /// How many.
        missing: u64,
    },
    /// The oldest file is removed.
    Dropped {
        /// Number of its last record.
        through_seq: u64,
        /// Hash of that record's line.
        through_hash: String,
        /// `age` or `quota`.
        why: &'static str,
    },
}

impl<'a> Said<'a> {
    pub(super) fn end(of: u64, open: &'a Open, outcome: &'a Outcome, duration_ms: Option<u64>) -> Self {
        let Outcome { code, exit_code, bytes_in, bytes_out, more } = outcome;
        let (exit_code, bytes_in, bytes_out) = (*exit_code, *bytes_in, *bytes_out);
        Self::End { of, open, outcome: code, exit_code, bytes_in, bytes_out, duration_ms, more }
    }

    /// Adds the line that follows `position` to the text, and gives the position behind it.
    pub(super) fn write(&self, position: Position, at: &str, text: &mut Vec<u8>) -> Position {
        #[derive(Serialize)]
        struct Line<'a> {
            seq: u64,
            prev: String,
            at: &'a str,
            #[serde(flatten)]
            said: &'a Said<'a>,
        }
        let from = text.len();
        let line = Line { seq: position.seq + 1, prev: position.hex(), at, said: self };
        serde_json::to_writer(&mut *text, &line).expect("a record is names, numbers and JSON");
        let position = position.after(&text[from..]);
        text.push(b'\n');
        position
    }
}

/// A line as far as it is read back.
#[derive(Debug, Deserialize)]
pub(super) struct Read<'a> {
    pub(super) seq: u64,
    #[serde(borrow)]
    pub(super) prev: Cow<'a, str>,
    #[serde(borrow)]
    pub(super) at: Cow<'a, str>,
    #[serde(borrow)]
    pub(super) kind: Cow<'a, str>,
    #[serde(default)]
    pub(super) action: Option<Cow<'static, str>>,
    #[serde(default)]
    pub(super) workspace: Option<WorkspaceId>,
    #[serde(default)]
    pub(super) of: Option<u64>,
    #[serde(default)]
    pub(super) open: Vec<(u64, Open)>,
    #[serde(default)]
    pub(super) missing: u64,
    #[serde(default)]
    pub(super) through_seq: Option<u64>,
    #[serde(default, borrow)]
    pub(super) through_hash: Option<Cow<'a, str>>,
}

impl<'a> Read<'a> {
    /// The line without its end; `None` if it is no record.
    pub(super) fn parse(line: &'a [u8]) -> Option<Self> {
        // No gateway lives to write as many: sums with it cannot wrap round.
        serde_json::from_slice(line).ok().filter(|read: &Self| read.seq < u64::MAX / 2)
    }
}
