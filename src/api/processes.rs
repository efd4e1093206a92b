//! Process sessions of a workspace over HTTP: output, stdin, terminate, list (connectors-api.md §2.2, §5); the doors that
//! stay open are in `events` and `attach`.

mod attach;
mod events;
mod live;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::display::Base64Display;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use hyper::body::Incoming;
use hyper::{Request, Response};
use serde::{Deserialize, Serialize, Serializer};
use serde_json::{Value, json};
use tokio::time::{Instant, timeout_at};

use super::audited::{in_session, recorded};
use super::error::ApiError;
use super::rest::{caller, field_error};
use super::{Api, json as json_answer, json_bytes, json_line_in, query_parameter, read_only};
use crate::audit::{Act, Outcome};
use crate::auth::Principal;
use crate::edge::body::{self, Body};
use crate::journal::{JournalError, Lost, Page, Record};
use crate::session::{EndSignal, Session, StdinMode, WriteOrder};
use crate::time::rfc3339;

pub use attach::attach;

/// How long an ended process may take to be gone before the answer says only that it was asked.
const END_CONFIRM: Duration = Duration::from_secs(10);

/// Room for what stands around the base64 of a chunk.
const CHUNK_HEAD_BYTES: usize = 96;

/// Longest grace between interrupt and kill.
const GRACE_MAX: Duration = Duration::from_secs(20);

async fn session(api: &Api, id: &str, request: &Request<Incoming>) -> Result<Arc<Session>, ApiError> {
    Ok(session_of_caller(api, id, request).await?.1)
}

async fn session_of_caller(
    api: &Api,
    id: &str,
    request: &Request<Incoming>,
) -> Result<(Principal, Arc<Session>), ApiError> {
    let principal = caller(api, request).await?;
    let session = api.sessions.get(principal.workspace(), id)?;
    Ok((principal, session))
}

/// The session, for somebody who may do more than look, and what is done as it is recorded.
async fn changed_session(
    api: &Api,
    id: &str,
    action: &'static str,
    request: &Request<Incoming>,
) -> Result<(Arc<Session>, Act), ApiError> {
    let (principal, session) = session_of_caller(api, id, request).await?;
    if principal.scopes().read_only {
        return Err(read_only());
    }
    let act = in_session(action, &principal, request.headers(), &session);
    Ok((session, act))
}

fn bad_request(message: impl Into<String>) -> ApiError {
    ApiError::new(400, "bad_request", message)
}

/// `GET …/processes`: the workspace's sessions, oldest first.
pub async fn list(api: &Arc<Api>, request: Request<Incoming>) -> Result<Response<Body>, ApiError> {
    let principal = caller(api, &request).await?;
    let sessions: Vec<Value> = api.sessions.of(principal.workspace()).iter().map(|session| describe(session)).collect();
    Ok(json_answer(&json!({ "processes": sessions })))
}

/// `GET …/processes/{sid}`
pub async fn show(api: &Arc<Api>, id: &str, request: Request<Incoming>) -> Result<Response<Body>, ApiError> {
    let session = session(api, id, &request).await?;
    session.touch();
    Ok(json_answer(&describe(&session)))
}

/// `DELETE …/processes/{sid}`: ends the process and forgets its output.
pub async fn forget(api: &Arc<Api>, id: &str, request: Request<Incoming>) -> Result<Response<Body>, ApiError> {
    let (session, act) = changed_session(api, id, "process.forget", &request).await?;
    // Ends are never refused for want of a record.
    let forgotten = async { Ok(api.sessions.forget(&session).await?) };
    recorded(api, act.always(), forgotten, |()| Outcome::new("ok")).await?;
    Ok(json_answer(&json!({ "ok": true })))
}

fn describe(session: &Session) -> Value {
    let status = session.status();
    let totals = session.journal().totals();
    let bytes = |tag: u8| totals.iter().find(|total| total.tag == tag).map_or(0, |total| total.bytes);
    json!({
        "session_id": session.id.as_str(),
        "environment": session.environment,
        "state": status.state.as_str(),
        "label": session.request.label,
        "command": session.request.argv,
        "tty": session.request.tty,
        "stdin": session.request.stdin,
        "started_at": rfc3339(session.created_at),
        "ended_at": status.ended_at.map(rfc3339),
        "exit_code": status.exit_code,
        "detail": status.detail,
        "stdout_bytes": bytes(0) + bytes(2),
        "stderr_bytes": bytes(1),
        "stdin_accepted": status.stdin_accepted,
        "stdin_eof": status.stdin_eof,
    })
}

/// What a caller wants to read.
struct OutputQuery {
    since: u64,
    tag: Option<u8>,
    offset: Option<u64>,
    bytes_max: usize,
    wait: Duration,
    head_tail: Option<usize>,
}

impl OutputQuery {
    fn parse(api: &Api, query: &str) -> Result<Self, ApiError> {
        let settings = &api.config.session;
        let number = |name: &str| -> Result<Option<u64>, ApiError> {
            match query_parameter(query, name) {
                None => Ok(None),
                Some(text) => match text.parse() {
                    Ok(number) => Ok(Some(number)),
                    Err(_) => Err(bad_request(format!("{name}: expected a whole number from 0"))),
                },
            }
        };
        let bounded = |name: &str, default: usize| -> Result<usize, ApiError> {
            let wanted = number(name)?.map_or(default, |wanted| usize::try_from(wanted).unwrap_or(usize::MAX));
            Ok(wanted.clamp(1, settings.page_bytes_max))
        };
        let tag = match query_parameter(query, "stream").as_deref() {
            None => None,
            Some("stdout") => Some(0),
            Some("stderr") => Some(1),
            Some("pty") => Some(2),
            Some(_) => return Err(bad_request("stream: expected stdout, stderr or pty")),
        };
        let head_tail = match query_parameter(query, "view").as_deref() {
            None => None,
            Some("head_tail") => Some(bounded("bytes", settings.page_bytes)?),
            Some(_) => return Err(bad_request("view: expected head_tail")),
        };
        let offset = number("offset")?;
        if offset.is_some() && tag.is_none() {
            return Err(bad_request("offset: needs stream"));
        }
        let wait = number("wait_ms")?.unwrap_or(0).min(settings.wait_max_secs * 1000);
        // As the original: what is not a number counts from the start.
        let since = query_parameter(query, "since").and_then(|since| since.parse().ok()).unwrap_or(0);
        let bytes_max = bounded("max_bytes", settings.page_bytes)?;
        Ok(Self { since, tag, offset, bytes_max, wait: Duration::from_millis(wait), head_tail })
    }
}

/// `GET …/processes/{sid}/output`
pub async fn output(api: &Arc<Api>, id: &str, request: Request<Incoming>) -> Result<Response<Body>, ApiError> {
    if events::wanted(request.headers()) {
        return events::output(api, id, request).await;
    }
    let session = session(api, id, &request).await?;
    session.touch();
    let query = OutputQuery::parse(api, request.uri().query().unwrap_or_default())?;
    if let Some(bytes) = query.head_tail {
        return head_tail(&session, &query, bytes).await;
    }
    let until = Instant::now() + query.wait;
    let mut changes = session.watch();
    loop {
        let status = changes.borrow_and_update().clone();
        let page = page(&session, &query).await?;
        let nothing = page.records.is_empty() && page.lost.is_none();
        if nothing && !status.state.is_final() {
            let changed = tokio::select! {
                changed = timeout_at(until, changes.changed()) => changed.is_ok_and(|changed| changed.is_ok()),
                // The next gateway knows as much; a restart is not held up for those who wait.
                () = api.draining.cancelled() => false,
            };
            if changed {
                continue;
            }
        }
        session.touch();
        // The exit is told on the page that reaches the end, and on every later empty one.
        let over = status.state.is_final() && page.end;
        let lost_bytes = lost_bytes(&session, query.tag);
        let output = Output {
            chunks: chunks(&page),
            exit: over.then(|| exit(&session)),
            exit_code: status.exit_code.filter(|_| over),
            lost: page.lost.as_ref().map(lost),
            lost_bytes,
            next_since: page.next_seq,
            session_alive: !over,
            state: if over { status.state.as_str() } else { "running" },
            truncated: lost_bytes > 0,
        };
        // Room for all of it at once: growing would copy megabytes, and take twice the memory while it does.
        let room = page.records.iter().map(|record| record.bytes.len() * 4 / 3 + CHUNK_HEAD_BYTES).sum::<usize>();
        return Ok(json_bytes(json_line_in(Vec::with_capacity(room), &output)));
    }
}

/// An answer with output. It borrows, since output is the bulk of all that callers are told: each byte goes into the
/// answer once, as base64.
#[derive(Serialize)]
struct Output<'a> {
    chunks: Vec<Chunk<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    exit: Option<Value>,
    exit_code: Option<i32>,
    lost: Option<Value>,
    lost_bytes: u64,
    next_since: u64,
    session_alive: bool,
    state: &'static str,
    truncated: bool,
}

async fn page(session: &Arc<Session>, query: &OutputQuery) -> Result<Page, ApiError> {
    let journal = session.journal().clone();
    let (since, tag, offset, bytes_max) = (query.since, query.tag, query.offset, query.bytes_max);
    read(move || match (tag, offset) {
        (Some(tag), Some(offset)) => journal.page_from(tag, offset, bytes_max),
        _ => journal.page(since, tag, bytes_max),
    })
    .await
}

/// Files are read beside the runtime, so that a slow disk holds up nobody else.
async fn read<T: Send + 'static>(
    reading: impl FnOnce() -> Result<T, JournalError> + Send + 'static,
) -> Result<T, ApiError> {
    let failed = |error: &(dyn std::error::Error + 'static)| {
        ApiError::new(503, "store_unavailable", "the output could not be read").retry_after(2).caused_by(error)
    };
    match tokio::task::spawn_blocking(reading).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(failed(&error)),
        Err(error) => Err(failed(&error)),
    }
}

async fn head_tail(session: &Arc<Session>, query: &OutputQuery, bytes: usize) -> Result<Response<Body>, ApiError> {
    let journal = session.journal().clone();
    let tag = query.tag;
    let (head, tail) = read(move || journal.head_tail(tag, bytes)).await?;
    let status = session.status();
    let over = status.state.is_final();
    Ok(json_answer(&HeadTail {
        exit: over.then(|| exit(session)),
        exit_code: status.exit_code,
        head: chunks(&head),
        session_alive: !over,
        state: status.state.as_str(),
        tail: chunks(&tail),
    }))
}

/// An answer with the two ends of the output.
#[derive(Serialize)]
struct HeadTail<'a> {
    exit: Option<Value>,
    exit_code: Option<i32>,
    head: Vec<Chunk<'a>>,
    session_alive: bool,
    state: &'static str,
    tail: Vec<Chunk<'a>>,
}

/// Bytes of the session that can no longer be read.
fn lost_bytes(session: &Session, tag: Option<u8>) -> u64 {
    session
        .journal()
        .totals()
        .iter()
        .filter(|total| tag.is_none_or(|tag| total.tag == tag))
        .map(|total| total.lost_bytes)
        .sum()
}

/// What no longer exists between the reader's cursor and the first chunk.
fn lost(lost: &Lost) -> Value {
    let resume: serde_json::Map<String, Value> =
        lost.resume.iter().map(|(tag, offset)| (stream_name(*tag).to_owned(), json!(offset))).collect();
    json!({ "from_seq": lost.seqs.start, "to_seq": lost.seqs.end, "resume_offsets": resume })
}

fn stream_name(tag: u8) -> &'static str {
    match tag {
        1 => "stderr",
        2 => "pty",
        _ => "stdout",
    }
}

/// A record as callers see it.
#[derive(Serialize)]
struct Chunk<'a> {
    #[serde(serialize_with = "base64")]
    data_b64: &'a [u8],
    #[serde(skip_serializing_if = "Option::is_none")]
    gap: Option<Missing>,
    offset: u64,
    seq: u64,
    stream: &'static str,
}

/// What a gap stands for.
#[derive(Serialize)]
struct Missing {
    bytes: Option<u64>,
    chunks: u64,
}

impl<'a> From<&'a Record> for Chunk<'a> {
    fn from(record: &'a Record) -> Self {
        Self {
            data_b64: &record.bytes,
            gap: record.gap.map(|gap| Missing { bytes: gap.bytes, chunks: gap.chunks }),
            offset: record.offset,
            seq: record.seq,
            stream: stream_name(record.tag),
        }
    }
}

fn base64<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&Base64Display::new(bytes, &STANDARD))
}

fn chunks(page: &Page) -> Vec<Chunk<'_>> {
    page.records.iter().map(Chunk::from).collect()
}

/// Everything that is known about the end.
fn exit(session: &Session) -> Value {
    let status = session.status();
    let totals: serde_json::Map<String, Value> = session
        .journal()
        .totals()
        .iter()
        .map(|total| {
            let digest = total.sha256.map(|digest| digest.iter().map(|byte| format!("{byte:02x}")).collect::<String>());
            (
                stream_name(total.tag).to_owned(),
                json!({ "bytes": total.bytes, "lost_bytes": total.lost_bytes, "exact": total.exact, "sha256": digest }),
            )
        })
        .collect();
    json!({
        "state": status.state.as_str(),
        "exit_code": status.exit_code,
        // 128 + n is how a shell and the executor tell signal n.
        "signal": status.exit_code.filter(|code| (129..=192).contains(code)).map(|code| code - 128),
        "detail": status.detail,
        "streams": totals,
        "started_at": rfc3339(session.created_at),
        "ended_at": status.ended_at.map(rfc3339),
        "duration_ms": duration_ms(session.created_at, status.ended_at),
    })
}

fn duration_ms(from: SystemTime, to: Option<SystemTime>) -> Option<u64> {
    u64::try_from(to?.duration_since(from).ok()?.as_millis()).ok()
}

/// Body of `stdin`.
#[derive(Deserialize)]
struct StdinBody {
    #[serde(default)]
    data_b64: Option<String>,
    #[serde(default)]
    offset: Option<u64>,
    #[serde(default)]
    eof: bool,
}

impl StdinBody {
    fn order(self, session: &Session) -> Result<WriteOrder, ApiError> {
        let bytes = STANDARD
            .decode(self.data_b64.unwrap_or_default())
            .map_err(|_| ApiError::new(400, "bad_base64", "data_b64: expected standard base64 with padding"))?;
        if self.eof && session.request.stdin != StdinMode::Stream {
            return Err(ApiError::new(
                409,
                "eof_unsupported",
                "the stdin of this session has no end; start it with stdin \"stream\"",
            ));
        }
        Ok(WriteOrder { offset: self.offset, bytes: Bytes::from(bytes), eof: self.eof })
    }
}

/// `POST …/processes/{sid}/stdin`
pub async fn stdin(api: &Arc<Api>, id: &str, request: Request<Incoming>) -> Result<Response<Body>, ApiError> {
    api.refuse_while_draining()?;
    let (session, act) = changed_session(api, id, "process.stdin", &request).await?;
    let body: StdinBody = read_json(api, request).await?;
    let act = act.about(json!({ "offset": body.offset, "eof": body.eof }));
    let act = if api.audit.keeps_contents() { act.containing(json!({ "data_b64": body.data_b64 })) } else { act };
    let order = body.order(&session)?;
    let (bytes, wait) = (order.bytes.len() as u64, Duration::from_secs(api.config.session.wait_max_secs));
    let written = async { Ok(session.write(&api.corridor.store, order, wait).await?) };
    let written =
        recorded(api, act, written, |written| Outcome::new("ok").bytes(bytes, 0).with("accepted", written.accepted));
    let written = written.await?;
    Ok(json_answer(&json!({ "ok": true, "accepted": written.accepted, "eof": written.eof })))
}

/// Body of `terminate`.
#[derive(Deserialize, Default)]
struct TerminateBody {
    #[serde(default)]
    signal: Option<EndSignal>,
    #[serde(default)]
    grace_ms: Option<u64>,
}

impl TerminateBody {
    fn order(&self) -> (EndSignal, Duration) {
        let grace = self.grace_ms.map_or(Duration::from_secs(5), Duration::from_millis);
        (self.signal.unwrap_or(EndSignal::Kill), grace.min(GRACE_MAX))
    }
}

/// `POST …/processes/{sid}/terminate`: kills at once unless the body says otherwise; confirmed by the exit where it
/// comes soon.
pub async fn terminate(api: &Arc<Api>, id: &str, request: Request<Incoming>) -> Result<Response<Body>, ApiError> {
    let (session, act) = changed_session(api, id, "process.terminate", &request).await?;
    let body: TerminateBody = read_json(api, request).await?;
    let (signal, grace) = body.order();
    let act = act.about(json!({ "signal": body.signal, "grace_ms": body.grace_ms })).always();
    let ended = async {
        let ending = {
            let session = session.clone();
            // Goes on when the caller leaves.
            tokio::spawn(async move { session.end(signal, grace).await })
        };
        let wait = if signal == EndSignal::Interrupt { Duration::from_secs(1) } else { grace + END_CONFIRM };
        let _ = tokio::time::timeout(wait, ending).await;
        Ok(session.over(if signal == EndSignal::Interrupt { Duration::ZERO } else { END_CONFIRM }).await)
    };
    let status = recorded(api, act, ended, |status| {
        Outcome::new("ok").exit_code(status.exit_code.map(i64::from)).with("state", status.state.as_str())
    });
    let status = status.await?;
    Ok(json_answer(&json!({ "ok": true, "state": status.state.as_str(), "exit_code": status.exit_code })))
}

async fn read_json<T: serde::de::DeserializeOwned>(api: &Api, request: Request<Incoming>) -> Result<T, ApiError> {
    let edge = &api.config.edge;
    let body =
        body::read(request.into_body(), edge.body_bytes_max, Duration::from_secs(edge.body_timeout_secs)).await?;
    object(if body.is_empty() { b"{}" } else { &body })
}

fn object<T: serde::de::DeserializeOwned>(text: &[u8]) -> Result<T, ApiError> {
    // serde reads a struct from an array too, member by member.
    if text.trim_ascii_start().first() == Some(&b'[') {
        return Err(bad_request("expected an object"));
    }
    let mut json = serde_json::Deserializer::from_slice(text);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| bad_request(field_error("", &error)))?;
    json.end().map_err(|error| bad_request(error.to_string()))?;
    Ok(value)
}
