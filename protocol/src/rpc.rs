//! JSON-RPC of executors (`codex-exec-server.md` §5, §6): messages told apart by shape, methods as types.
//! Both ends use it; it never sends anything, and never looks into parameters that are only handed on.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

use base64::Engine as _;
use base64::display::Base64Display;
use base64::engine::general_purpose::STANDARD;
use serde::de::{DeserializeOwned, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::value::RawValue;

use crate::path::FileUri;
use crate::trace::TraceContext;

/// The request is malformed, comes at the wrong moment, or concerns something unusual.
pub const INVALID_REQUEST: i64 = -32600;
/// No such method.
pub const METHOD_NOT_FOUND: i64 = -32601;
/// The parameters do not fit the method.
pub const INVALID_PARAMS: i64 = -32602;
/// The operating system or the executor failed.
pub const INTERNAL_ERROR: i64 = -32603;
/// The file or directory does not exist.
pub const NOT_FOUND: i64 = -32004;
/// The session is attached to another connection.
pub const ALREADY_ATTACHED: i64 = -32010;

/// What tells a request's answer from others. Executors answer what they cannot read with the id -1.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
#[serde(untagged)]
pub enum RequestId {
    /// A whole number.
    Number(i64),
    /// A text.
    Text(String),
}

impl<'de> Deserialize<'de> for RequestId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Id;
        impl Visitor<'_> for Id {
            type Value = RequestId;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a whole number or a text")
            }
            fn visit_i64<E: serde::de::Error>(self, id: i64) -> Result<RequestId, E> {
                Ok(RequestId::Number(id))
            }
            fn visit_u64<E: serde::de::Error>(self, id: u64) -> Result<RequestId, E> {
                i64::try_from(id).map(RequestId::Number).map_err(|_| E::custom("id beyond 63 bits"))
            }
            fn visit_str<E: serde::de::Error>(self, id: &str) -> Result<RequestId, E> {
                Ok(RequestId::Text(id.into()))
            }
        }
        deserializer.deserialize_any(Id)
    }
}

/// A failure as the other end reports it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message} ({code})")]
pub struct RpcError {
    /// One of the constants of this module, or another.
    pub code: i64,
    /// Untrusted text.
    #[serde(default)]
    pub message: String,
}

impl RpcError {
    /// Whether a session was not resumed since it is attached to another conversation, be that over or not.
    pub fn is_attached(&self) -> bool {
        self.code == ALREADY_ATTACHED
    }

    /// Whether a start was refused since the session has a process of that id already. Executors have no code for it.
    pub fn is_known_process(&self) -> bool {
        self.code == INVALID_REQUEST && self.message.contains("already exists")
    }

    /// Whether a process cannot be read since it is only being started, by another conversation of the session.
    pub fn is_starting_process(&self) -> bool {
        self.code == INVALID_REQUEST && self.message.ends_with("is starting")
    }
}

/// Why a text is not a message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RpcParseError {
    /// Not JSON, or a member of the envelope has the wrong type. Only the place is told: the text may hold secrets.
    #[error("not a JSON-RPC message: unreadable at line {line}, column {column}")]
    Unreadable {
        /// Line of the text, from 1.
        line: usize,
        /// Column in that line, from 1.
        column: usize,
    },
    /// The members present make neither a request, nor a notification, nor an answer.
    #[error("not a JSON-RPC message: neither request, notification nor answer")]
    Shape,
}

/// One message from the other end, with parameters and results left as they came.
#[derive(Clone)]
pub enum Incoming<'a> {
    /// A request of ours went well.
    Response {
        /// Which request.
        id: RequestId,
        /// The result, `null` included.
        result: &'a RawValue,
    },
    /// A request of ours failed.
    Error {
        /// Which request; -1 when the other end could not read it.
        id: RequestId,
        /// How it failed.
        error: RpcError,
    },
    /// News that wants no answer.
    Notification {
        /// Its name.
        method: Cow<'a, str>,
        /// Its parameters, if any; `null` is kept.
        params: Option<&'a RawValue>,
    },
    /// The other end asks us.
    Request {
        /// To be repeated in the answer.
        id: RequestId,
        /// Its name.
        method: Cow<'a, str>,
        /// Its parameters, if any; `null` is kept.
        params: Option<&'a RawValue>,
    },
}

impl fmt::Debug for Incoming<'_> {
    /// Names and ids only: parameters and results hold the caller's data.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Response { id, .. } => f.debug_struct("Response").field("id", id).finish_non_exhaustive(),
            Self::Error { id, error } => f.debug_struct("Error").field("id", id).field("error", error).finish(),
            Self::Notification { method, .. } => {
                f.debug_struct("Notification").field("method", method).finish_non_exhaustive()
            }
            Self::Request { id, method, .. } => {
                f.debug_struct("Request").field("id", id).field("method", method).finish_non_exhaustive()
            }
        }
    }
}

/// The members that matter. `jsonrpc` and `trace` are ignored like everything unknown; order means nothing.
#[derive(Deserialize)]
struct Envelope<'a> {
    #[serde(default, deserialize_with = "present")]
    id: Option<RequestId>,
    #[serde(default, borrow)]
    method: Option<Text<'a>>,
    #[serde(default, borrow, deserialize_with = "present")]
    params: Option<&'a RawValue>,
    #[serde(default, borrow, deserialize_with = "present")]
    result: Option<&'a RawValue>,
    #[serde(default)]
    error: Option<RpcError>,
}

/// Borrows where the JSON has no escapes, which `Option<Cow<str>>` alone never does.
#[derive(Deserialize)]
#[serde(transparent)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

/// `null` counts as a value here: a `null` result is a result, and a `null` id is not a missing one.
fn present<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Option<T>, D::Error> {
    T::deserialize(deserializer).map(Some)
}

impl<'a> Incoming<'a> {
    /// Reads one message; parameters and results are slices of `json`.
    ///
    /// # Errors
    /// [`RpcParseError`] also for batches and for `null` or fractional ids, which executors refuse too.
    pub fn parse(json: &'a [u8]) -> Result<Self, RpcParseError> {
        let Envelope { id, method, params, result, error } = serde_json::from_slice(json)
            .map_err(|error| RpcParseError::Unreadable { line: error.line(), column: error.column() })?;
        match (method, id, result, error) {
            (Some(Text(method)), Some(id), None, None) => Ok(Self::Request { id, method, params }),
            (Some(Text(method)), None, None, None) => Ok(Self::Notification { method, params }),
            (None, Some(id), Some(result), None) => Ok(Self::Response { id, result }),
            (None, Some(id), None, Some(error)) => Ok(Self::Error { id, error }),
            _ => Err(RpcParseError::Shape),
        }
    }
}

/// Whether a message can be read to the bottom. [`Incoming::parse`] leaves parameters and unknown members unread, and
/// with them half of a surrogate pair, a number past all bounds, bytes that are no UTF-8 or a nesting too deep: who
/// reads all of it, as executors do, refuses the message without learning its id.
///
/// # Errors
/// [`RpcParseError::Unreadable`] names the place.
pub fn check(json: &[u8]) -> Result<(), RpcParseError> {
    match serde_json::from_slice(json) {
        Ok(Checked) => Ok(()),
        Err(error) => Err(RpcParseError::Unreadable { line: error.line(), column: error.column() }),
    }
}

/// Any JSON, read as [`serde_json::Value`] is, and not kept.
struct Checked;

impl<'de> Deserialize<'de> for Checked {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Self)
    }
}

impl<'de> Visitor<'de> for Checked {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON")
    }

    fn visit_unit<E>(self) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_str<E>(self, _: &str) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self, A::Error> {
        while let Some(Self) = seq.next_element()? {}
        Ok(self)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self, A::Error> {
        while let Some((Self, Self)) = map.next_entry()? {}
        Ok(self)
    }
}

/// A request as bytes, with the trace that it belongs to.
///
/// # Panics
/// When `params` refuses to become JSON; no type of this module, no `Value` and no `RawValue` does.
pub fn encode_request(id: i64, method: &str, params: &impl Serialize, trace: Option<&TraceContext>) -> Vec<u8> {
    #[derive(Serialize)]
    struct Request<'a, P> {
        id: i64,
        method: &'a str,
        params: &'a P,
        #[serde(skip_serializing_if = "Option::is_none")]
        trace: Option<&'a TraceContext>,
    }
    json(&Request { id, method, params, trace })
}

/// A notification as bytes.
///
/// # Panics
/// As [`encode_request`].
pub fn encode_notification(method: &str, params: &impl Serialize) -> Vec<u8> {
    #[derive(Serialize)]
    struct Notification<'a, P> {
        method: &'a str,
        params: &'a P,
    }
    json(&Notification { method, params })
}

/// An answer that tells success, as bytes.
///
/// # Panics
/// As [`encode_request`].
pub fn encode_response(id: &RequestId, result: &impl Serialize) -> Vec<u8> {
    #[derive(Serialize)]
    struct Response<'a, R> {
        id: &'a RequestId,
        result: &'a R,
    }
    json(&Response { id, result })
}

/// An answer that tells failure, as bytes.
pub fn encode_error(id: &RequestId, error: &RpcError) -> Vec<u8> {
    #[derive(Serialize)]
    struct Failure<'a> {
        error: &'a RpcError,
        id: &'a RequestId,
    }
    json(&Failure { error, id })
}

fn json(message: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(message).expect("messages are structs with text keys, and memory does not fail")
}

/// Bytes that stand as base64 (standard alphabet, padded) in JSON. `Debug` shows the size only.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Base64Bytes(pub Vec<u8>);

impl From<Vec<u8>> for Base64Bytes {
    fn from(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }
}

impl fmt::Debug for Base64Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

impl Serialize for Base64Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        // Written piece by piece into the JSON: large blocks are not held a second time.
        serializer.collect_str(&Base64Display::new(&self.0, &STANDARD))
    }
}

impl<'de> Deserialize<'de> for Base64Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Base64;
        impl Visitor<'_> for Base64 {
            type Value = Base64Bytes;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("base64")
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Base64Bytes, E> {
                // The library's error would quote a byte of what may be a secret.
                STANDARD.decode(text).map(Base64Bytes).map_err(|_| E::custom("not standard base64 with padding"))
            }
        }
        deserializer.deserialize_str(Base64)
    }
}

/// The right to resume a session at its executor: a secret, so `Debug` shows `***`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ExecutorSessionId(String);

impl ExecutorSessionId {
    /// Any text: executors choose it.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The secret, for the wire and the store.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for ExecutorSessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Parameters of one method: they know its name and what it answers, so that a client is one `call(params)`.
pub trait Method: Serialize {
    /// The method's name on the wire.
    const NAME: &'static str;
    /// What a successful answer holds.
    type Result: DeserializeOwned;
}

macro_rules! methods {
    ($($params:ident => $name:literal, $result:ty;)*) => {
        $(impl Method for $params {
            const NAME: &'static str = $name;
            type Result = $result;
        })*
    };
}

methods! {
    Initialize => "initialize", Initialized;
    EnvironmentInfoRead => "environment/info", EnvironmentInfo;
    ProcessStart => "process/start", ProcessStarted;
    ProcessRead => "process/read", ProcessOutputPage;
    ProcessWrite => "process/write", ProcessWritten;
    ProcessSignal => "process/signal", Nothing;
    ProcessTerminate => "process/terminate", ProcessTerminated;
    FsReadFile => "fs/readFile", FileContent;
    FsWriteFile => "fs/writeFile", Nothing;
    FsCreateDirectory => "fs/createDirectory", Nothing;
    FsGetMetadata => "fs/getMetadata", Metadata;
    FsCanonicalize => "fs/canonicalize", CanonicalPath;
    FsReadDirectory => "fs/readDirectory", Directory;
    FsRemove => "fs/remove", Nothing;
    FsCopy => "fs/copy", Nothing;
    FsOpen => "fs/open", Opened;
    FsReadBlock => "fs/readBlock", Block;
    FsWriteBlock => "fs/writeBlock", Nothing;
    FsClose => "fs/close", Nothing;
}

/// The result of a method that answers nothing. Whatever stands there is ignored: executors differ between `{}` and
/// `null`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Nothing {}

impl<'de> Deserialize<'de> for Nothing {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        serde::de::IgnoredAny::deserialize(deserializer).map(|_| Self {})
    }
}

/// `initialize`: the first request on a stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Initialize {
    /// Who calls, for the executor's log.
    pub client_name: String,
    /// A session to take up again, within 80 s of its detaching.
    #[serde(default)]
    pub resume_session_id: Option<ExecutorSessionId>,
}

/// The notification that must follow a successful [`Initialize`].
pub const INITIALIZED: &str = "initialized";

/// The answer to [`Initialize`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Initialized {
    /// With it the session can be resumed. Older executors tell none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session_id: Option<ExecutorSessionId>,
    /// The machine.
    #[serde(default)]
    pub environment_info: EnvironmentInfo,
}

/// `environment/info`: the machine, asked again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnvironmentInfoRead {}

/// What an executor tells about its machine. Every field may be missing, and one of an unexpected form counts as
/// missing: versions differ, and a link must not fail over it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EnvironmentInfo {
    /// The person's shell.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "lenient")]
    pub shell: Option<Shell>,
    /// For example `0.169.0`.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "lenient")]
    pub executor_version: Option<String>,
    /// Where relative paths start.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "lenient")]
    pub cwd: Option<FileUri>,
    /// What `~` stands for.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "lenient")]
    pub user_home_dir: Option<FileUri>,
    /// Where temporary files belong.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "lenient")]
    pub temp_dir: Option<FileUri>,
    /// `linux`, `macos`, `windows` or another.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "lenient")]
    pub platform_os: Option<String>,
}

impl EnvironmentInfo {
    /// Whether native paths have drives and backslashes.
    pub fn is_windows(&self) -> bool {
        self.platform_os.as_deref().is_some_and(|os| os.eq_ignore_ascii_case("windows"))
    }
}

fn lenient<'de, D: Deserializer<'de>, T: DeserializeOwned>(deserializer: D) -> Result<Option<T>, D::Error> {
    let value = Option::<serde_json::Value>::deserialize(deserializer)?;
    Ok(value.and_then(|value| serde_json::from_value(value).ok()))
}

/// A shell of the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shell {
    /// For example `bash`.
    #[serde(default)]
    pub name: String,
    /// Its program, a native path.
    pub path: String,
}

/// `process/start`. Notifications may arrive before the answer, so the id must be known to their reader first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProcessStart {
    /// Chosen by the caller, unique within the session.
    pub process_id: String,
    /// Program and arguments, not empty.
    pub argv: Vec<String>,
    /// Working directory.
    pub cwd: FileUri,
    /// Variables set on top of what `env_policy` lets through; without a policy these are all.
    pub env: BTreeMap<String, String>,
    /// Whether the process gets a terminal of 24 × 80.
    pub tty: bool,
    /// Whether stdin is a pipe that [`ProcessWrite`] fills; it cannot be closed. Else it is `/dev/null`.
    #[serde(default)]
    pub pipe_stdin: bool,
    /// What the program sees as its own name.
    #[serde(default)]
    pub arg0: Option<String>,
    /// What of the executor's own environment the process sees.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub env_policy: Option<EnvPolicy>,
    /// A sandbox as `codex-exec-server.md` §6.2 describes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<serde_json::Value>,
}

/// What of the executor's own environment a process sees. All five members are always sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EnvPolicy {
    /// Where to start from.
    pub inherit: EnvInherit,
    /// Whether names like `*KEY*`, `*SECRET*`, `*TOKEN*` are kept. They hold the executor's own credential.
    pub ignore_default_excludes: bool,
    /// Patterns of names to drop.
    pub exclude: Vec<String>,
    /// Variables to set.
    pub set: BTreeMap<String, String>,
    /// If not empty, only names that match one of these patterns stay.
    pub include_only: Vec<String>,
}

impl EnvPolicy {
    /// All of the executor's environment but names that match `exclude` and those that look like secrets.
    pub fn commands(exclude: &[String]) -> Self {
        Self {
            inherit: EnvInherit::All,
            ignore_default_excludes: false,
            exclude: exclude.to_vec(),
            set: BTreeMap::new(),
            include_only: Vec::new(),
        }
    }
}

/// Where a process environment starts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EnvInherit {
    /// The executor's whole environment.
    All,
    /// `HOME`, `LANG`, `PATH`, `TMPDIR` and the like.
    Core,
    /// Nothing.
    None,
}

/// The answer to [`ProcessStart`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProcessStarted {
    /// The id of the request.
    pub process_id: String,
    /// `none`, `linuxSeccomp` and so on; older executors tell nothing.
    #[serde(default)]
    pub sandbox_type: Option<String>,
}

/// `process/read`: output from the executor's ring of 1 MiB.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProcessRead {
    /// The process.
    pub process_id: String,
    /// Only what has a greater number.
    #[serde(default)]
    pub after_seq: Option<u64>,
    /// Bytes at most; one chunk comes even if it is larger.
    #[serde(default)]
    pub max_bytes: Option<u64>,
    /// Milliseconds to wait for news. Waiting blocks the stream for all other requests, so it should be 0.
    #[serde(default)]
    pub wait_ms: Option<u64>,
}

/// The answer to [`ProcessRead`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProcessOutputPage {
    /// Output in order; numbers are missing where the ring has lost them.
    pub chunks: Vec<ProcessChunk>,
    /// The number to come next.
    pub next_seq: u64,
    /// Whether the process has ended; more output may follow.
    pub exited: bool,
    /// Its exit code, 128 + n after signal n.
    #[serde(default)]
    pub exit_code: Option<i32>,
    /// Whether the output is complete.
    pub closed: bool,
    /// Why it could not run.
    #[serde(default)]
    pub failure: Option<String>,
    /// Whether the sandbox seems to have stopped it.
    #[serde(default)]
    pub sandbox_denied: bool,
}

/// A piece of output in a [`ProcessOutputPage`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessChunk {
    /// Its number.
    pub seq: u64,
    /// Where it was written.
    pub stream: OutputStream,
    /// What was written.
    pub chunk: Base64Bytes,
}

/// Where a process wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OutputStream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
    /// The terminal of a process that has one.
    Pty,
}

/// `process/write`: bytes for stdin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProcessWrite {
    /// The process.
    pub process_id: String,
    /// The bytes.
    pub chunk: Base64Bytes,
    /// Not empty; a repeated id is accepted without writing again.
    pub write_id: String,
}

/// The answer to [`ProcessWrite`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessWritten {
    /// What became of the bytes.
    pub status: WriteStatus,
}

/// What became of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum WriteStatus {
    /// Written, now or by an earlier request of the same id.
    Accepted,
    /// No such process.
    UnknownProcess,
    /// Its stdin is not, or no longer, a pipe.
    StdinClosed,
    /// The process is only being started: try again.
    Starting,
    /// A status that we do not know.
    #[serde(other)]
    Other,
}

/// `process/signal`. Unknown processes are no error.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProcessSignal {
    /// The process.
    pub process_id: String,
    /// Which signal.
    pub signal: Signal,
}

/// The signals that executors send.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Signal {
    /// SIGINT.
    Interrupt,
}

/// `process/terminate`: SIGKILL to the whole process group, at once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProcessTerminate {
    /// The process.
    pub process_id: String,
}

/// The answer to [`ProcessTerminate`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessTerminated {
    /// Whether it ran until now; false also for an unknown one.
    pub running: bool,
}

/// Notification: a process wrote something.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProcessOutput {
    /// The process.
    pub process_id: String,
    /// One counter per process over output, exit and close, from 1, without gaps.
    pub seq: u64,
    /// Where it was written.
    pub stream: OutputStream,
    /// What was written.
    pub chunk: Base64Bytes,
}

impl ProcessOutput {
    /// The notification's name.
    pub const NAME: &'static str = "process/output";
}

/// Notification: a process ended. Output may still follow until [`ProcessClosed`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProcessExited {
    /// The process.
    pub process_id: String,
    /// Counts on from the output.
    pub seq: u64,
    /// 128 + n after signal n; 1 for a process with a terminal.
    pub exit_code: i32,
    /// Whether the sandbox seems to have stopped it.
    #[serde(default)]
    pub sandbox_denied: bool,
}

impl ProcessExited {
    /// The notification's name.
    pub const NAME: &'static str = "process/exited";
}

/// Notification: the output of a process is complete.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProcessClosed {
    /// The process.
    pub process_id: String,
    /// The last number.
    pub seq: u64,
}

impl ProcessClosed {
    /// The notification's name.
    pub const NAME: &'static str = "process/closed";
}

/// `fs/readFile`: a whole regular file in one message; blocks are better above 1 MiB.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsReadFile {
    /// The file.
    pub path: FileUri,
}

/// The answer to [`FsReadFile`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FileContent {
    /// All its bytes.
    pub data_base64: Base64Bytes,
}

/// `fs/writeFile`: creates or replaces a file whose directory exists.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FsWriteFile {
    /// The file.
    pub path: FileUri,
    /// All its bytes.
    pub data_base64: Base64Bytes,
}

/// `fs/createDirectory`. An existing one is fine when `recursive`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsCreateDirectory {
    /// The directory.
    pub path: FileUri,
    /// Whether missing parents are made. Always sent: the executor's own default is true.
    pub recursive: bool,
}

/// `fs/getMetadata`. Links are followed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsGetMetadata {
    /// What to look at.
    pub path: FileUri,
}

/// The answer to [`FsGetMetadata`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Metadata {
    /// Whether it is a directory.
    pub is_directory: bool,
    /// Whether it is a regular file.
    pub is_file: bool,
    /// Whether the path itself is a link.
    #[serde(default)]
    pub is_symlink: bool,
    /// Bytes.
    #[serde(default)]
    pub size: u64,
    /// Milliseconds since 1970; 0 where the file system does not know.
    #[serde(default)]
    pub created_at_ms: i64,
    /// Milliseconds since 1970.
    #[serde(default)]
    pub modified_at_ms: i64,
}

/// `fs/canonicalize`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsCanonicalize {
    /// An existing path.
    pub path: FileUri,
}

/// The answer to [`FsCanonicalize`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CanonicalPath {
    /// The same place without links.
    pub path: FileUri,
}

/// `fs/readDirectory`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsReadDirectory {
    /// The directory.
    pub path: FileUri,
}

/// The answer to [`FsReadDirectory`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Directory {
    /// Unsorted.
    pub entries: Vec<DirectoryEntry>,
}

/// What a directory holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DirectoryEntry {
    /// Its name alone.
    pub file_name: String,
    /// Whether it is, or links to, a directory.
    pub is_directory: bool,
    /// Whether it is, or links to, a regular file.
    pub is_file: bool,
}

/// `fs/remove`. Both flags are always sent, for the executor's own defaults let trees vanish.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsRemove {
    /// What to remove; a link, not its target.
    pub path: FileUri,
    /// Whether a directory goes with all it holds.
    pub recursive: bool,
    /// Whether a missing path is fine.
    pub force: bool,
}

/// `fs/copy`. Links are copied as links.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FsCopy {
    /// What to copy.
    pub source_path: FileUri,
    /// Where to.
    pub destination_path: FileUri,
    /// Whether a directory is copied with all it holds. Always sent: executors require it.
    pub recursive: bool,
}

/// `fs/open`: at most 128 handles per connection, lost when a session is resumed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FsOpen {
    /// Chosen by the caller.
    pub handle_id: String,
    /// The file.
    pub path: FileUri,
    /// What for.
    pub mode: OpenMode,
}

/// What a file is opened for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OpenMode {
    /// Reading.
    #[default]
    Read,
    /// Writing; the file is created or emptied at once.
    Replace,
}

/// The answer to [`FsOpen`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Opened {
    /// The handle of the request.
    pub handle_id: String,
}

/// Most bytes in one block.
pub const BLOCK_BYTES_MAX: usize = 1 << 20;

/// `fs/readBlock`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FsReadBlock {
    /// An open handle.
    pub handle_id: String,
    /// Bytes from the start of the file.
    pub offset: u64,
    /// 1 to [`BLOCK_BYTES_MAX`] bytes.
    pub len: u64,
}

/// The answer to [`FsReadBlock`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Block {
    /// The bytes there.
    pub chunk: Base64Bytes,
    /// Whether the file ends with them.
    pub eof: bool,
}

/// `fs/writeBlock`. A gap before `offset` is filled with zeros.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FsWriteBlock {
    /// A handle opened with [`OpenMode::Replace`].
    pub handle_id: String,
    /// Bytes from the start of the file.
    pub offset: u64,
    /// 1 to [`BLOCK_BYTES_MAX`] bytes.
    pub chunk: Base64Bytes,
}

/// `fs/close`. Unknown handles are no error.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FsClose {
    /// The handle.
    pub handle_id: String,
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;

    fn uri(text: &str) -> FileUri {
        FileUri::parse(text).unwrap()
    }

    #[test]
    fn messages_are_told_apart_by_shape_whatever_the_order() {
        let parsed = |text| format!("{:?}", Incoming::parse(text));
        assert_eq!(parsed(br#"{"result":{},"id":7}"#), "Ok(Response { id: Number(7), .. })");
        assert_eq!(parsed(br#"{"jsonrpc":"2.0","id":"a","result":null}"#), r#"Ok(Response { id: Text("a"), .. })"#);
        assert_eq!(parsed(br#"{"method":"m","params":{}}"#), r#"Ok(Notification { method: "m", .. })"#);
        assert_eq!(
            parsed(br#"{"params":null,"method":"m","id":1,"trace":{}}"#),
            r#"Ok(Request { id: Number(1), method: "m", .. })"#
        );
        assert_eq!(
            parsed(br#"{"error":{"code":-32600,"message":"bad","data":1},"id":-1}"#),
            r#"Ok(Error { id: Number(-1), error: RpcError { code: -32600, message: "bad" } })"#
        );
    }

    #[test]
    fn what_is_no_single_message_is_refused() {
        for text in [r#"{}"#, r#"{"id":1}"#, r#"{"id":1,"method":"m","result":1}"#, r#"{"result":1}"#] {
            assert_eq!(Incoming::parse(text.as_bytes()).unwrap_err(), RpcParseError::Shape, "{text}");
        }
        let error_and_result = br#"{"id":1,"result":1,"error":{"code":1,"message":""}}"#;
        assert_eq!(Incoming::parse(error_and_result).unwrap_err(), RpcParseError::Shape);
        let batch = r#"[{"id":1,"method":"m"}]"#;
        for text in [r#"{"id":null,"method":"m"}"#, r#"{"id":1.5,"method":"m"}"#, "", r#"{"id":1"#, batch] {
            assert!(matches!(Incoming::parse(text.as_bytes()), Err(RpcParseError::Unreadable { .. })), "{text}");
        }
    }

    #[test]
    fn a_parse_error_does_not_repeat_the_text() {
        let error = Incoming::parse(br#"{"id":true,"method":"m","params":"secret"}"#).unwrap_err();
        assert!(!error.to_string().contains("true"));
        let error = serde_json::from_str::<Base64Bytes>(r#""secret!""#).unwrap_err();
        assert!(!error.to_string().contains("secret"));
    }

    #[test]
    fn method_names_and_parameters_are_borrowed_from_the_text() {
        let text = br#"{"method":"process/output","params":{"a":1}}"#;
        let Ok(Incoming::Notification { method: Cow::Borrowed(_), params: Some(params) }) = Incoming::parse(text)
        else {
            panic!("a notification with a borrowed name");
        };
        assert!(text.as_ptr_range().contains(&params.get().as_ptr()));
    }

    #[test]
    fn null_parameters_and_missing_ones_are_told_apart() {
        let params = |text| match Incoming::parse(text) {
            Ok(Incoming::Notification { params, .. }) => params.map(|params| params.get().to_owned()),
            other => panic!("a notification, not {other:?}"),
        };
        assert_eq!(params(br#"{"method":"m","params":null}"#).as_deref(), Some("null"));
        assert_eq!(params(br#"{"method":"m"}"#), None);
    }

    #[test]
    fn requests_look_as_a_real_harness_writes_them() {
        let start = ProcessStart {
            process_id: "p1".into(),
            argv: vec!["/bin/sh".into()],
            cwd: uri("file:///tmp"),
            env: BTreeMap::from([("PATH".into(), "/bin".into())]),
            tty: false,
            pipe_stdin: false,
            arg0: None,
            env_policy: Some(EnvPolicy {
                inherit: EnvInherit::All,
                ignore_default_excludes: false,
                exclude: vec!["AWS_*".into()],
                set: BTreeMap::new(),
                include_only: vec![],
            }),
            sandbox: None,
        };
        let text = String::from_utf8(encode_request(2, ProcessStart::NAME, &start, None)).unwrap();
        assert_eq!(
            text,
            concat!(
                r#"{"id":2,"method":"process/start","params":{"processId":"p1","argv":["/bin/sh"],"cwd":"file:///tmp","#,
                r#""env":{"PATH":"/bin"},"tty":false,"pipeStdin":false,"arg0":null,"envPolicy":{"inherit":"all","#,
                r#""ignoreDefaultExcludes":false,"exclude":["AWS_*"],"set":{},"includeOnly":[]}}}"#
            )
        );
        let hello = Initialize { client_name: "gw".into(), resume_session_id: None };
        assert_eq!(
            encode_request(1, Initialize::NAME, &hello, None),
            br#"{"id":1,"method":"initialize","params":{"clientName":"gw","resumeSessionId":null}}"#
        );
        assert_eq!(encode_notification(INITIALIZED, &Nothing {}), br#"{"method":"initialized","params":{}}"#);
    }

    #[test]
    fn every_parameter_stands_under_the_name_executors_expect() {
        let path = || uri("file:///f");
        let bytes = || Base64Bytes(b"hi\n".to_vec());
        let id = || "p".to_owned();
        fn call<M: Method>(params: M) -> (&'static str, serde_json::Value) {
            (M::NAME, serde_json::to_value(params).unwrap())
        }
        let all = [
            (call(EnvironmentInfoRead {}), ("environment/info", json!({}))),
            (
                call(ProcessRead { process_id: id(), after_seq: Some(0), max_bytes: None, wait_ms: Some(0) }),
                ("process/read", json!({"processId": "p", "afterSeq": 0, "maxBytes": null, "waitMs": 0})),
            ),
            (
                call(ProcessWrite { process_id: id(), chunk: bytes(), write_id: "w1".into() }),
                ("process/write", json!({"processId": "p", "chunk": "aGkK", "writeId": "w1"})),
            ),
            (
                call(ProcessSignal { process_id: id(), signal: Signal::Interrupt }),
                ("process/signal", json!({"processId": "p", "signal": "interrupt"})),
            ),
            (call(ProcessTerminate { process_id: id() }), ("process/terminate", json!({"processId": "p"}))),
            (call(FsReadFile { path: path() }), ("fs/readFile", json!({"path": "file:///f"}))),
            (
                call(FsWriteFile { path: path(), data_base64: bytes() }),
                ("fs/writeFile", json!({"path": "file:///f", "dataBase64": "aGkK"})),
            ),
            (
                call(FsCreateDirectory { path: path(), recursive: false }),
                ("fs/createDirectory", json!({"path": "file:///f", "recursive": false})),
            ),
            (call(FsGetMetadata { path: path() }), ("fs/getMetadata", json!({"path": "file:///f"}))),
            (call(FsCanonicalize { path: path() }), ("fs/canonicalize", json!({"path": "file:///f"}))),
            (call(FsReadDirectory { path: path() }), ("fs/readDirectory", json!({"path": "file:///f"}))),
            (
                call(FsRemove { path: path(), recursive: false, force: false }),
                ("fs/remove", json!({"path": "file:///f", "recursive": false, "force": false})),
            ),
            (
                call(FsOpen { handle_id: "h".into(), path: path(), mode: OpenMode::Replace }),
                ("fs/open", json!({"handleId": "h", "path": "file:///f", "mode": "replace"})),
            ),
            (
                call(FsReadBlock { handle_id: "h".into(), offset: 5, len: 9 }),
                ("fs/readBlock", json!({"handleId": "h", "offset": 5, "len": 9})),
            ),
            (
                call(FsWriteBlock { handle_id: "h".into(), offset: 5, chunk: bytes() }),
                ("fs/writeBlock", json!({"handleId": "h", "offset": 5, "chunk": "aGkK"})),
            ),
            (call(FsClose { handle_id: "h".into() }), ("fs/close", json!({"handleId": "h"}))),
        ];
        for (ours, theirs) in all {
            assert_eq!(ours, theirs);
        }
    }

    #[test]
    fn answers_of_a_real_executor_are_read() {
        let page: ProcessOutputPage = serde_json::from_value(json!({
            "chunks": [{"seq": 1, "stream": "stdout", "chunk": "b3V0Cg=="}, {"seq": 2, "stream": "pty", "chunk": ""}],
            "nextSeq": 5, "exited": true, "exitCode": 3, "closed": true, "failure": null, "sandboxDenied": false
        }))
        .unwrap();
        assert_eq!(page.chunks[0].chunk.0, b"out\n");
        assert_eq!((page.next_seq, page.exit_code, page.chunks[1].stream), (5, Some(3), OutputStream::Pty));
        let status = |text: &str| serde_json::from_value::<ProcessWritten>(json!({"status": text})).unwrap().status;
        assert_eq!(status("unknownProcess"), WriteStatus::UnknownProcess);
        assert_eq!(status("stdinClosed"), WriteStatus::StdinClosed);
        assert_eq!(status("new in some version"), WriteStatus::Other);
        let metadata: Metadata =
            serde_json::from_value(json!({"isDirectory": false, "isFile": true, "isSymlink": true,
            "size": 9, "createdAtMs": 0, "modifiedAtMs": 1_700_000_000_000_i64}))
            .unwrap();
        assert!(metadata.is_file && metadata.is_symlink && metadata.size == 9);
        for nothing in ["{}", "null", r#"{"new":1}"#] {
            assert!(serde_json::from_str::<Nothing>(nothing).is_ok(), "{nothing}");
        }
    }

    #[test]
    fn notifications_of_a_real_executor_are_read_also_with_escapes() {
        let text = r#"{"processId":"p1","seq":1,"stream":"stderr","chunk":"\u0062\/8="}"#;
        let output: ProcessOutput = serde_json::from_str(text).unwrap();
        assert_eq!((output.chunk.0.as_slice(), output.stream), (b"o\xff".as_slice(), OutputStream::Stderr));
        let exited: ProcessExited = serde_json::from_str(r#"{"processId":"p1","seq":3,"exitCode":-1}"#).unwrap();
        assert_eq!((exited.exit_code, exited.sandbox_denied), (-1, false));
        let closed: ProcessClosed = serde_json::from_str(r#"{"processId":"p1","seq":4}"#).unwrap();
        assert_eq!(closed.seq, 4);
    }

    #[test]
    fn an_environment_of_any_form_is_read() {
        let info: EnvironmentInfo = serde_json::from_value(json!({
            "shell": {"name": "bash", "path": "/bin/bash"}, "executorVersion": "0.169.0", "providerId": "sha256:00",
            "cwd": "file:///srv/a%20b", "userHomeDir": "/not/a/uri", "tempDir": null, "platformOs": "linux",
            "capabilities": {"fsWatchMissing": true}
        }))
        .unwrap();
        assert_eq!(info.cwd, Some(uri("file:///srv/a%20b")));
        assert_eq!((info.user_home_dir.as_ref(), info.temp_dir.as_ref()), (None, None));
        assert!(!info.is_windows());
        let old: Initialized = serde_json::from_str("{}").unwrap();
        assert_eq!(old, Initialized { session_id: None, environment_info: EnvironmentInfo::default() });
    }

    #[test]
    fn debug_output_shows_neither_session_ids_nor_bytes() {
        let answer: Initialized = serde_json::from_str(r#"{"sessionId":"secret"}"#).unwrap();
        let write = ProcessWrite { process_id: "p".into(), chunk: b"secret".to_vec().into(), write_id: "w".into() };
        assert!(!format!("{answer:?}{write:?}").contains("secret"));
        assert_eq!(answer.session_id.unwrap().reveal(), "secret");
    }
}
