//! The doors: parse, authenticate, call the domain, answer. No rules of the domain live here.

mod audited;
mod calls;
pub mod compat;
mod credential;
pub mod error;
pub mod executor;
pub mod files;
pub mod harness;
pub mod mcp;
pub mod openapi;
pub mod processes;
pub mod rest;
pub mod transfer;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, OnceLock, Weak};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{FutureExt, Stream, StreamExt, stream};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Body as _, Frame, Incoming};
use hyper::header::{ALLOW, CONTENT_LENGTH, CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER, TRAILER};
use hyper::http::request::Parts;
use hyper::{HeaderMap, Method, Request, Response, StatusCode};
use serde::Serialize;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::field::Empty;

use self::error::ApiError;
use crate::admin::Admin;
use crate::audit::Audit;
use crate::config::{self, Live, Running};
use crate::edge::body::{self, Body, BrokenOff, full};
use crate::edge::peer;
use crate::edge::router::{Envelope, Route, RouteError, Router, percent_decode};
use crate::ops::memory::{Held, Memory};
use crate::ops::metrics::Metrics;
use crate::protocol::rest::ErrorBody;
use crate::relay::harness::AttachedSessions;
use crate::session::Sessions;
use crate::timing::Timing;
use crate::trace;
use crate::transfer::Transfers;
use crate::workspace::cache::Workspaces;
use crate::workspace::{Corridor, Workspace};

/// Size up to which a body is read also while the process is short of memory.
const SMALL_BODY_BYTES: u64 = 64 * 1024;

/// Where transfers are, each below its ticket.
const TRANSFERS: &str = "/relay/";

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const SERVER_TIMING: HeaderName = HeaderName::from_static("server-timing");

/// What the doors need.
pub struct Api {
    /// The effective configuration.
    pub config: Arc<Running>,
    /// Store, rights, connected executors.
    pub corridor: Arc<Corridor>,
    /// Tenants in memory.
    pub workspaces: Arc<Workspaces>,
    /// Processes that outlive their callers.
    pub sessions: Arc<Sessions>,
    /// Byte pipes between two clients.
    pub transfers: Transfers,
    /// Bounds and times of tool calls.
    pub tools: Live<config::Tools>,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// What the process has taken of its memory; large work begins only while there is some.
    pub memory: Arc<Memory>,
    /// What callers do is recorded there before they do it.
    pub audit: Audit,
    /// Executor sessions of plain harnesses.
    pub harnesses: AttachedSessions,
    /// Calls of MCP clients under way, by which they are cancelled.
    pub mcp_calls: mcp::Calls,
    /// Streams that a harness may come back for.
    pub comebacks: harness::StreamPlaces,
    /// Tasks that own an executor's socket.
    pub links: TaskTracker,
    /// Tasks that own a caller's socket.
    pub sockets: TaskTracker,
    /// Cancelled when the gateway stops: new calls are refused, live streams say so and end.
    pub draining: CancellationToken,
    /// Carries out what services change, as operators' commands; set by the gateway, which owns it.
    pub operators: OnceLock<Weak<Admin>>,
    router: Router,
}

impl Api {
    /// Puts the doors in front of the domain.
    pub fn new(
        config: Arc<Running>,
        corridor: Arc<Corridor>,
        workspaces: Arc<Workspaces>,
        sessions: Arc<Sessions>,
        metrics: Arc<Metrics>,
        audit: Audit,
    ) -> Self {
        Self {
            workspaces,
            sessions,
            tools: config.tools.clone(),
            transfers: Transfers::new(config.transfer.clone()),
            memory: Memory::new(config.memory.clone(), metrics.clone()),
            config,
            corridor,
            metrics,
            audit,
            harnesses: AttachedSessions::default(),
            mcp_calls: mcp::Calls::default(),
            comebacks: harness::StreamPlaces::default(),
            links: TaskTracker::new(),
            sockets: TaskTracker::new(),
            draining: CancellationToken::new(),
            operators: OnceLock::new(),
            router: Router::new(),
        }
    }

    /// Answers one request. Never fails: whatever goes wrong becomes an answer in the envelope of its door.
    pub async fn answer(self: Arc<Self>, mut request: Request<Incoming>) -> Response<Body> {
        let request_id = request_id(request.headers());
        // Where the doors find it.
        request.headers_mut().insert(REQUEST_ID, request_id.clone());
        let trace = trace::of(request.headers());
        let trace_id = trace.as_ref().map(|trace| trace.trace_id().to_owned()).unwrap_or_default();
        let method = request.method().clone();
        let path = request.uri().path().to_owned();
        let found = self.router.find(&method, &path);
        let row = match &found {
            Ok((route, _)) | Err(RouteError::Parameter(route)) => Some(route.row()),
            Err(RouteError::NotFound | RouteError::Method(_)) => None,
        };
        let envelope = row.map_or(Envelope::Json, |row| row.envelope);
        let (name, door) = row.map_or((Route::NONE, None), |row| (row.name, row.timed_door));
        let span = tracing::debug_span!(
            "request",
            "otel.name" = name,
            "otel.kind" = "server",
            request_id = ?request_id,
            trace_id,
            %method,
            path = public_part(&path),
            status = Empty,
        );
        let timing = door.map(|door| Timing::observed(door, self.metrics.clone()));
        if let Some(timing) = &timing {
            request.extensions_mut().insert(timing.clone());
        }
        let metrics = self.metrics.clone();
        let result = match found {
            Ok((route, parameter)) => {
                let work = trace::within(trace, span.clone(), self.dispatch(route, parameter, request));
                let handled = std::panic::AssertUnwindSafe(work).catch_unwind();
                handled.await.unwrap_or_else(|_| {
                    metrics.panics.inc();
                    Err(ApiError::internal("the gateway failed at this request"))
                })
            }
            Err(RouteError::NotFound | RouteError::Parameter(_)) => {
                Err(ApiError::new(404, "not_found", "no such path"))
            }
            Err(RouteError::Method(allowed)) => Err(ApiError::new(405, "method_not_allowed", format!("use {allowed}"))
                .with_header(ALLOW, HeaderValue::from_str(&allowed).expect("a method is a header value"))),
        };
        let mut response = result.unwrap_or_else(|error| {
            // The path only: queries carry tickets and tokens.
            log(&error, &request_id, &trace_id, &method, &path);
            render(&error, envelope)
        });
        span.record("status", response.status().as_u16());
        metrics.http_requests.inc([name, class(response.status())]);
        let headers = response.headers_mut();
        headers.insert(REQUEST_ID, request_id);
        if let Some(timing) = timing {
            headers.insert(SERVER_TIMING, timing_value(&timing));
        }
        response
    }

    async fn dispatch(
        self: Arc<Self>,
        route: Route,
        parameter: String,
        request: Request<Incoming>,
    ) -> Result<Response<Body>, ApiError> {
        match route {
            Route::EnvList => rest::list_environments(&self, request).await,
            Route::ToolCall => rest::call_tool(&self, &parameter, request).await,
            Route::FileGet => files::get(&self, &parameter, request).await,
            Route::FilePut => files::put(&self, &parameter, request).await,
            Route::ProcessList => processes::list(&self, request).await,
            Route::ProcessShow => processes::show(&self, &parameter, request).await,
            Route::ProcessForget => processes::forget(&self, &parameter, request).await,
            Route::ProcessOutput => processes::output(&self, &parameter, request).await,
            Route::ProcessAttach => processes::attach(&self, &parameter, request).await,
            Route::ProcessStdin => processes::stdin(&self, &parameter, request).await,
            Route::ProcessTerminate => processes::terminate(&self, &parameter, request).await,
            Route::RegisterCodex => executor::register(&self, executor::Door::Codex, &parameter, request).await,
            Route::RegisterAgentx => executor::register(&self, executor::Door::Agentx, &parameter, request).await,
            Route::RegisterDirect => executor::register(&self, executor::Door::Direct, &parameter, request).await,
            Route::Validate => executor::validate(&self, &parameter, request).await,
            Route::Connect => harness::connect(&self, &parameter, request).await,
            Route::Connected => compat::connected(&self, request).await,
            Route::RevokeTurn => compat::revoke_turn(&self, request).await,
            Route::ExecutorRegister => compat::register(&self, request).await,
            Route::ExecutorDelete => compat::delete(&self, &parameter, request).await,
            Route::ExecutorBind => compat::bind(&self, &parameter, request).await,
            Route::ExecutorsBound => compat::bound(&self, &parameter, request).await,
            Route::ExecutorUnbind => compat::unbind(&self, &parameter, request).await,
            Route::TransferCreate => transfer::create(&self, request).await,
            Route::TransferPut => transfer::put(&self, &parameter, request).await,
            Route::TransferGet => transfer::get(&self, &parameter, request).await,
            Route::CloudRelay => executor::open_registered_link(&self, &parameter, request).await,
            Route::Bridge => executor::open_link(&self, &parameter, request).await,
            Route::Mcp => mcp::message(&self, request).await,
            Route::ProtectedResource => mcp::protected_resource(&self, request),
            Route::Health => Ok(fixed(&request, "text/plain; charset=utf-8", Bytes::from_static(b"ok\n"))),
            Route::OpenApi => Ok(fixed(&request, "application/json", openapi::text())),
        }
    }

    /// Counts a request of this workspace.
    fn pace(&self, workspace: &Workspace) -> Result<(), ApiError> {
        workspace.count_request().inspect_err(|_| self.metrics.rate_limited.inc()).map_err(ApiError::from)
    }

    /// Reads a request's body, which is held against what all bodies together may take. While the process is short of
    /// memory only small ones are read: an order to a running process is one.
    async fn body(&self, body: Incoming, bytes_max: usize, held: &Held) -> Result<Bytes, ApiError> {
        let announced = body.size_hint().exact().unwrap_or(bytes_max as u64);
        let wait = Duration::from_secs(self.config.edge.now().body_timeout_secs);
        let room = if announced > SMALL_BODY_BYTES { self.memory.admit() } else { Ok(()) };
        // What is too large is refused for that.
        if let Err(overloaded) = room.and_then(|()| held.grow(announced.min(bytes_max as u64))) {
            body::discard(body, bytes_max, wait).await;
            return Err(overloaded.into());
        }
        let body = body::read(body, bytes_max, wait).await?;
        held.set(body.len() as u64);
        Ok(body)
    }

    fn refuse_while_draining(&self) -> Result<(), ApiError> {
        if self.draining.is_cancelled() { Err(draining()) } else { Ok(()) }
    }
}

const DRAINING: &str = "draining";

fn draining() -> ApiError {
    ApiError::new(503, DRAINING, "the gateway is restarting").retry_after(1)
}

/// The class of a status, for metrics.
fn class(status: StatusCode) -> &'static str {
    match status.as_u16() {
        ..200 => "1xx",
        200..300 => "2xx",
        300..400 => "3xx",
        400..500 => "4xx",
        500.. => "5xx",
    }
}

/// The caller's request id where it is a usable one, else a new one.
fn request_id(headers: &HeaderMap) -> HeaderValue {
    let usable = |value: &&HeaderValue| {
        let bytes = value.as_bytes();
        (1..=128).contains(&bytes.len()) && bytes.iter().all(u8::is_ascii_graphic)
    };
    headers.get(REQUEST_ID).filter(usable).cloned().unwrap_or_else(|| {
        // Counted from a random start rather than random each: that would be a system call for every request.
        static GATEWAY: LazyLock<u64> = LazyLock::new(|| uuid::Uuid::new_v4().as_u64_pair().0);
        static REQUESTS: AtomicU64 = AtomicU64::new(0);
        let id = format!("req_{:016x}{:016x}", *GATEWAY, REQUESTS.fetch_add(1, Ordering::Relaxed));
        HeaderValue::from_str(&id).expect("hexadecimal digits are a header value")
    })
}

/// What callers get wrong is theirs to know; what the gateway could not do is the operator's as well. The path only:
/// queries carry tickets and tokens.
fn log(error: &ApiError, request_id: &HeaderValue, trace_id: &str, method: &Method, path: &str) {
    let request_id = request_id.to_str().unwrap_or_default();
    let (status, code, cause) = (error.status(), error.code(), error.cause().unwrap_or_default());
    let path = public_part(path);
    // A restart is nothing to look into.
    if status >= 500 && code != DRAINING {
        tracing::warn!(request_id, trace_id, %method, path, status, code, cause, "request failed");
    } else {
        tracing::debug!(request_id, trace_id, %method, path, status, code, cause, "request refused");
    }
}

/// What may be told of a path: that of a transfer goes on with its ticket.
fn public_part(path: &str) -> &str {
    if path.starts_with(TRANSFERS) { TRANSFERS } else { path }
}

fn render(error: &ApiError, envelope: Envelope) -> Response<Body> {
    let (body, content_type) = match envelope {
        Envelope::Json => {
            let mut body = ErrorBody::new(error.code(), error.message());
            body.error.ran = error.ran();
            (full(json_line(&body)), "application/json")
        }
        Envelope::Message => {
            let body = serde_json::json!({ "error": error.message() });
            (full(json_line(&body)), "application/json")
        }
        Envelope::Rpc => {
            let body = serde_json::json!({
                "jsonrpc": "2.0",
                "id": null,
                "error": { "code": mcp::REFUSED, "message": error.message(), "data": { "code": error.code() } },
            });
            (full(json_line(&body)), "application/json")
        }
        Envelope::Text => (full(format!("{}\n", error.message())), "text/plain; charset=utf-8"),
    };
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::from_u16(error.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    if let Some(secs) = error.retry_after_secs() {
        headers.insert(RETRY_AFTER, HeaderValue::from(secs));
    }
    for (name, value) in error.headers() {
        headers.insert(name.clone(), value.clone());
    }
    response
}

/// The id of a request that [`Api::answer`] has let in.
fn asked_as(headers: &HeaderMap) -> &str {
    headers.get(REQUEST_ID).and_then(|id| id.to_str().ok()).unwrap_or_default()
}

/// Where the time of this request goes.
fn timing<B>(request: &Request<B>) -> Timing {
    request.extensions().get::<Timing>().cloned().unwrap_or_else(Timing::start)
}

fn timing_value(timing: &Timing) -> HeaderValue {
    HeaderValue::try_from(timing.to_string()).expect("names and numbers are a header value")
}

/// An answer whose head leaves before its end is known: where the time went stands behind its last piece too, for
/// clients that read trailers.
fn late(pieces: impl Stream<Item = Bytes> + Send + 'static, timing: Timing) -> Response<Body> {
    let behind =
        stream::once(async move { Frame::trailers([(SERVER_TIMING, timing_value(&timing))].into_iter().collect()) });
    let frames = pieces.map(Frame::data).chain(behind).map(Ok::<_, BrokenOff>);
    let mut response = Response::new(BodyExt::boxed_unsync(StreamBody::new(frames)));
    response.headers_mut().insert(TRAILER, HeaderValue::from_name(SERVER_TIMING));
    response
}

/// Base URL under which callers reach this gateway: the configured one, else the Host of the request.
fn http_base(api: &Api, request: &Parts) -> String {
    match &api.config.now().public_url {
        Some(url) => {
            let url = url.trim_end_matches('/');
            match url.split_once("://") {
                Some(("ws", rest)) => format!("http://{rest}"),
                Some(("wss", rest)) => format!("https://{rest}"),
                _ => url.to_owned(),
            }
        }
        None => {
            let (tls, host) = peer::reached(&request.headers, request.extensions.get());
            let scheme = if tls { "https" } else { "http" };
            format!("{scheme}://{}", host.as_deref().unwrap_or("127.0.0.1"))
        }
    }
}

fn read_only() -> ApiError {
    ApiError::new(403, "forbidden", "the token may only read")
}

/// A JSON answer ends with a newline, as the original's do.
fn json_line(value: &impl Serialize) -> Vec<u8> {
    json_line_in(Vec::new(), value)
}

/// As [`json_line`], in a buffer that has the room already.
fn json_line_in(mut line: Vec<u8>, value: &impl Serialize) -> Vec<u8> {
    write_json(&mut line, value);
    line.push(b'\n');
    line
}

fn write_json(text: &mut Vec<u8>, value: &impl Serialize) {
    serde_json::to_writer(text, value).expect("what the API tells is plain data");
}

fn json(value: &impl Serialize) -> Response<Body> {
    json_bytes(json_line(value))
}

/// An answer that is always the same.
fn fixed<B>(request: &Request<B>, content_type: &'static str, content: Bytes) -> Response<Body> {
    let length = content.len();
    let mut response = Response::new(full(if request.method() == Method::HEAD { Bytes::new() } else { content }));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(length));
    response
}

/// An answer that is JSON already.
fn json_bytes(line: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(full(line));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// A query parameter, percent-decoded.
fn query_parameter(query: &str, name: &str) -> Option<String> {
    let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
    pairs.into_iter().find(|(key, _)| *key == name).and_then(|(_, value)| percent_decode(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_of_a_transfer_is_logged_without_its_ticket() {
        assert_eq!(public_part("/relay/rly_secret"), "/relay/");
        assert_eq!(public_part("/relay/rly_secret/more"), "/relay/");
        assert_eq!(public_part("/api/connectors/envs/list"), "/api/connectors/envs/list");
    }
}
