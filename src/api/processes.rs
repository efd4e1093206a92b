//! Process sessions of a workspace over HTTP: output, stdin, terminate, list (connectors-api.md §2.2, §5); the doors that
//! stay open are in `events` and `attach`.

mod attach;
mod events;
mod live;

use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use hyper::body::Incoming;
use hyper::{Request, Response};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::audited::{in_session, recorded};
use super::error::ApiError;
use super::rest::{caller, field_error};
use super::{Api, json as json_answer, json_bytes, json_line_in, query_parameter, read_only, timing};
use crate::audit::{Act, Outcome};
use crate::auth::Principal;
use crate::edge::body::{self, Body};
use crate::session::view::{Chunk, Wish, chunks, ending, lost, read};
use crate::session::{EndSignal, Session, WriteOrder};

pub use attach::attach;

/// Room for what stands around the base64 of a chunk.
const CHUNK_HEAD_BYTES: usize = 96;

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
    let sessions: Vec<_> = api.sessions.of(principal.workspace()).iter().map(|session| session.describe()).collect();
    Ok(json_answer(&json!({ "processes": sessions })))
}

/// `GET …/processes/{sid}`
pub async fn show(api: &Arc<Api>, id: &str, request: Request<Incoming>) -> Result<Response<Body>, ApiError> {
    let session = session(api, id, &request).await?;
    session.touch();
    Ok(json_answer(&session.describe()))
}

/// `DELETE …/processes/{sid}`: ends the process and forgets its output.
pub async fn forget(api: &Arc<Api>, id: &str, request: Request<Incoming>) -> Result<Response<Body>, ApiError> {
    let (session, act) = changed_session(api, id, "process.forget", &request).await?;
    // Ends are never refused for want of a record.
    let forgotten = async { Ok(timing(&request).executor(api.sessions.forget(&session)).await?) };
    recorded(api, act.always(), forgotten, |()| Outcome::new("ok")).await?;
    Ok(json_answer(&json!({ "ok": true })))
}

/// What a caller wants to read.
struct OutputQuery {
    wish: Wish,
    wait: Duration,
    head_tail: Option<usize>,
}

impl OutputQuery {
    fn parse(api: &Api, query: &str) -> Result<Self, ApiError> {
        let settings = api.sessions.settings();
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
        let ends = bounded("bytes", settings.page_bytes)?;
        let head_tail = match query_parameter(query, "view").as_deref() {
            None => None,
            Some("head_tail") => Some(ends),
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
        let wish = Wish { since, tag, offset, bytes_max };
        Ok(Self { wish, wait: Duration::from_millis(wait), head_tail })
    }
}

/// `GET …/processes/{sid}/output`
pub async fn output(api: &Arc<Api>, id: &str, request: Request<Incoming>) -> Result<Response<Body>, ApiError> {
    if events::wanted(request.headers()) {
        return events::output(api, id, request).await;
    }
    let timing = timing(&request);
    let session = session(api, id, &request).await?;
    let query = OutputQuery::parse(api, request.uri().query().unwrap_or_default())?;
    if let Some(bytes) = query.head_tail {
        session.touch();
        return head_tail(&session, &query, bytes).await;
    }
    // The next gateway knows as much; a restart is not held up for those who wait.
    let page = session.next_page(query.wish, Instant::now() + query.wait, &api.draining);
    let (status, page) = timing.executor(page).await?;
    // The exit is told on the page that reaches the end, and on every later empty one.
    let over = status.state.is_final() && page.end;
    let lost_bytes = session.lost_bytes(query.wish.tag);
    let output = Output {
        chunks: chunks(&page),
        exit: over.then(|| session.exit()),
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
    Ok(json_bytes(json_line_in(Vec::with_capacity(room), &output)))
}

/// An answer with output.
#[derive(Serialize, JsonSchema)]
pub(super) struct Output<'a> {
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

async fn head_tail(session: &Arc<Session>, query: &OutputQuery, bytes: usize) -> Result<Response<Body>, ApiError> {
    let journal = session.journal().clone();
    let tag = query.wish.tag;
    let (head, tail) = read(move || journal.head_tail(tag, bytes)).await?;
    let status = session.status();
    let over = status.state.is_final();
    Ok(json_answer(&HeadTail {
        exit: over.then(|| session.exit()),
        exit_code: status.exit_code,
        head: chunks(&head),
        session_alive: !over,
        state: status.state.as_str(),
        tail: chunks(&tail),
    }))
}

/// An answer with the two ends of the output.
#[derive(Serialize, JsonSchema)]
pub(super) struct HeadTail<'a> {
    exit: Option<Value>,
    exit_code: Option<i32>,
    head: Vec<Chunk<'a>>,
    session_alive: bool,
    state: &'static str,
    tail: Vec<Chunk<'a>>,
}

/// Body of `stdin`.
#[derive(Deserialize, JsonSchema)]
pub(super) struct StdinBody {
    /// Bytes in standard base64 with padding.
    #[serde(default)]
    #[schemars(extend("pattern" = "^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/][AQgw]==|[A-Za-z0-9+/]{2}[AEIMQUYcgkosw048]=)?$"))]
    data_b64: Option<String>,
    /// Where the bytes begin among all that the process was given.
    #[serde(default)]
    offset: Option<u64>,
    /// Whether nothing follows them.
    #[serde(default)]
    eof: bool,
}

impl StdinBody {
    fn order(self, session: &Session) -> Result<WriteOrder, ApiError> {
        let bytes = STANDARD
            .decode(self.data_b64.unwrap_or_default())
            .map_err(|_| ApiError::new(400, "bad_base64", "data_b64: expected standard base64 with padding"))?;
        Ok(session.order(self.offset, Bytes::from(bytes), self.eof)?)
    }
}

/// `POST …/processes/{sid}/stdin`
pub async fn stdin(api: &Arc<Api>, id: &str, request: Request<Incoming>) -> Result<Response<Body>, ApiError> {
    api.refuse_while_draining()?;
    let timing = timing(&request);
    let (session, act) = changed_session(api, id, "process.stdin", &request).await?;
    let body: StdinBody = read_json(api, request).await?;
    let act = act.about(json!({ "offset": body.offset, "eof": body.eof }));
    let act = if api.audit.keeps_contents() { act.containing(json!({ "data_b64": body.data_b64 })) } else { act };
    let order = body.order(&session)?;
    let (bytes, wait) = (order.bytes.len() as u64, Duration::from_secs(api.config.now().session.wait_max_secs));
    let written = async { Ok(timing.executor(session.write(&api.corridor.store, order, wait)).await?) };
    let written =
        recorded(api, act, written, |written| Outcome::new("ok").bytes(bytes, 0).with("accepted", written.accepted));
    let written = written.await?;
    Ok(json_answer(&json!({ "ok": true, "accepted": written.accepted, "eof": written.eof })))
}

/// Body of `terminate`.
#[derive(Deserialize, JsonSchema, Default)]
pub(super) struct TerminateBody {
    /// How it is asked; `KILL` where nothing is said.
    #[serde(default)]
    signal: Option<EndSignal>,
    /// Time between interrupt and kill, for `TERM`.
    #[serde(default)]
    grace_ms: Option<u64>,
}

impl TerminateBody {
    fn order(&self) -> (EndSignal, Duration) {
        ending(self.signal, self.grace_ms)
    }
}

/// `POST …/processes/{sid}/terminate`: kills at once unless the body says otherwise; confirmed by the exit where it
/// comes soon.
pub async fn terminate(api: &Arc<Api>, id: &str, request: Request<Incoming>) -> Result<Response<Body>, ApiError> {
    let timing = timing(&request);
    let (session, act) = changed_session(api, id, "process.terminate", &request).await?;
    let body: TerminateBody = read_json(api, request).await?;
    let (signal, grace) = body.order();
    let act = act.about(json!({ "signal": body.signal, "grace_ms": body.grace_ms })).always();
    let ended = async { Ok(timing.executor(session.end_soon(signal, grace)).await) };
    let status = recorded(api, act, ended, |status| {
        Outcome::new("ok").exit_code(status.exit_code.map(i64::from)).with("state", status.state.as_str())
    });
    let status = status.await?;
    Ok(json_answer(&json!({ "ok": true, "state": status.state.as_str(), "exit_code": status.exit_code })))
}

async fn read_json<T: serde::de::DeserializeOwned>(api: &Api, request: Request<Incoming>) -> Result<T, ApiError> {
    let config = api.config.now();
    let edge = &config.edge;
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
