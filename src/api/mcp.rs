//! MCP: the tools for clients of the Model Context Protocol, over streamable HTTP, without sessions on our side.
//!
//! `rmcp` speaks the protocol: versions, JSON-RPC, event streams. Here are the caller's right, the bounds, what a client
//! may cancel, and the way from a slow answer to an event stream. Tools run as for every other door (`api::calls`).

mod cut;
mod server;

use std::borrow::Cow;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use dashmap::DashMap;
use futures_util::future::Either;
use futures_util::{Stream, StreamExt, stream};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderName, HeaderValue, ORIGIN, WWW_AUTHENTICATE};
use hyper::http::request::Parts;
use hyper::{HeaderMap, Request, Response, StatusCode};
use rmcp::model::RequestId;
use rmcp::transport::streamable_http_server::session::never::NeverSessionManager;
use rmcp::transport::streamable_http_server::{StreamableHttpServerConfig, StreamableHttpService};
use serde::Deserialize;
use serde_json::json;
use serde_json::value::RawValue;
use tokio::time::{Instant, interval_at, timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use self::server::Server;
use super::calls::{Admitted, TOOL_CALL};
use super::error::ApiError;
use super::{Api, http_base, json as json_answer, json_line, late, timing};
use crate::edge::body::Body;
use crate::timing::Timing;

/// JSON-RPC code of what the gateway refuses before it knows the request; the reason is in `data.code`.
pub(super) const REFUSED: i32 = -32_000;

const INVALID_REQUEST: i32 = -32_600;
const PARSE_ERROR: i32 = -32_700;

/// Names a client from `initialize` on, so that it can cancel its own calls and no others. Any name that a client shows is
/// taken: nothing is kept under it, and it means the same to the next gateway process.
const SESSION_ID: HeaderName = HeaderName::from_static("mcp-session-id");

/// Longest name of a client, in bytes.
const SESSION_ID_BYTES_MAX: usize = 128;

/// Largest notification that is read while the workspace has no place for a call, in bytes.
const NOTIFICATION_BYTES_MAX: usize = 4096;

/// Below this path stand the documents about protected resources (RFC 9728 §3.1).
const WELL_KNOWN: &str = "/.well-known/oauth-protected-resource";

type Rpc = Response<BoxBody<Bytes, Infallible>>;

/// The calls under way that clients may cancel: each has a place among the calls of its workspace, which bounds them.
#[derive(Debug, Default, Clone)]
pub struct Calls(Arc<DashMap<String, Vec<CancellationToken>>>);

/// A call in the list until this is dropped.
struct Listed {
    calls: Calls,
    key: String,
    cancelled: CancellationToken,
}

impl Calls {
    fn list(&self, key: String) -> Listed {
        let cancelled = CancellationToken::new();
        self.0.entry(key.clone()).or_default().push(cancelled.clone());
        Listed { calls: self.clone(), key, cancelled }
    }

    /// Cancels the only call of that key. Clients without a name that number alike are not told apart, so of several calls
    /// none is ended.
    fn cancel(&self, key: &str) {
        if let Some(calls) = self.0.get(key)
            && let [only] = &calls[..]
        {
            only.cancel();
        }
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        // Cancelled first, so that this entry is told from others of the same key.
        self.cancelled.cancel();
        self.calls.0.remove_if_mut(&self.key, |_, calls| {
            calls.retain(|call| !call.is_cancelled());
            calls.is_empty()
        });
    }
}

/// The client as far as it can be told apart: its workspace, its credential, its own name.
fn client(admitted: &Admitted, headers: &HeaderMap) -> String {
    let name = headers.get(SESSION_ID).map(HeaderValue::as_bytes).unwrap_or_default();
    let name = String::from_utf8_lossy(&name[..name.len().min(SESSION_ID_BYTES_MAX)]);
    format!("{}\n{}\n{name}", admitted.principal.workspace(), admitted.principal.credential())
}

/// A call of that client.
fn call_of(client: &str, id: &RequestId) -> String {
    // As JSON: the number 1 and the text "1" are two ids.
    format!("{client}\n{}", serde_json::to_string(id).expect("an id is plain data"))
}

/// What has to be known of a message before `rmcp` reads it.
#[derive(Deserialize)]
struct Peek<'a> {
    #[serde(borrow, default)]
    method: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    id: Option<&'a RawValue>,
    #[serde(borrow, default)]
    params: Option<&'a RawValue>,
}

impl Peek<'_> {
    fn is_notification(&self) -> bool {
        self.id.is_none() && self.method.as_ref().is_some_and(|method| method.starts_with("notifications/"))
    }
}

/// Parameters of `notifications/cancelled`.
#[derive(Deserialize)]
struct Cancelled {
    #[serde(rename = "requestId")]
    request_id: RequestId,
}

/// `POST /mcp`: one message of a client.
pub async fn message(api: &Arc<Api>, request: Request<Incoming>) -> Result<Response<Body>, ApiError> {
    let timing = timing(&request);
    let (head, body) = request.into_parts();
    check_origin(api, &head)?;
    let admitted = Admitted::known(api, TOOL_CALL, &head.headers, timing.clone()).await;
    let mut admitted = admitted.map_err(|refused| challenge(api, &head, refused))?;
    // Without a place a client can still cancel, which makes room.
    let full = admitted.take_place(api).err();
    let bytes_max = if full.is_none() { api.config.now().edge.body_bytes_max } else { NOTIFICATION_BYTES_MAX };
    let is_json = |value: &HeaderValue| {
        let media_type = value.to_str().unwrap_or_default().split(';').next().unwrap_or_default();
        media_type.trim().eq_ignore_ascii_case("application/json")
    };
    if !head.headers.get(CONTENT_TYPE).is_some_and(is_json) {
        return Err(ApiError::new(415, "bad_request", "Content-Type: expected application/json"));
    }
    let body = match (api.body(body, bytes_max, &admitted.held).await, &full) {
        (Err(refused), Some(_)) if refused.status() == 413 => Bytes::new(),
        (body, _) => body?,
    };
    if let Some(full) = full
        && !serde_json::from_slice::<Peek<'_>>(&body).is_ok_and(|peek| peek.is_notification())
    {
        return Err(full);
    }
    let peek: Peek<'_> = match serde_json::from_slice(&body) {
        Ok(peek) => peek,
        Err(error) if error.is_data() => return Ok(rpc_error(None, INVALID_REQUEST, "expected one JSON-RPC message")),
        Err(error) => return Ok(rpc_error(None, PARSE_ERROR, &format!("the body is not JSON: {error}"))),
    };
    let client = client(&admitted, &head.headers);
    if peek.method.as_deref() == Some("notifications/cancelled")
        && let Some(Ok(Cancelled { request_id })) = peek.params.map(|params| serde_json::from_str(params.get()))
    {
        api.mcp_calls.cancel(&call_of(&client, &request_id));
    }
    api.metrics.mcp_messages.inc([method_name(peek.method.as_deref())]);
    let begins = peek.method.as_deref() == Some("initialize");
    let id = peek.id.map(|id| id.get().to_owned());

    let server = Server::new(api.clone(), admitted, client);
    let service = StreamableHttpService::new(
        move || Ok(server.clone()),
        Arc::new(NeverSessionManager::default()),
        protocol_config(api),
    );
    let message = Request::from_parts(head, Full::new(body));
    let handled = async move { told(service.handle(message).await, id).await };
    let tools = api.tools.now();
    let mut handled: Pin<Box<dyn Future<Output = Rpc> + Send>> = Box::pin(handled);
    match timeout(Duration::from_secs(tools.keepalive_after_secs), &mut handled).await {
        Ok(answer) if is_events(&answer) => Ok(events(pieces(answer), timing)),
        Ok(answer) => {
            let mut answer = answer.map(boxed);
            if begins && answer.status() == StatusCode::OK {
                let name = HeaderValue::try_from(Uuid::new_v4().to_string()).expect("a UUID is a header value");
                answer.headers_mut().insert(SESSION_ID, name);
            }
            Ok(answer)
        }
        Err(_) => Ok(slow(handled, timing, Duration::from_secs(tools.keepalive_secs))),
    }
}

fn protocol_config(api: &Api) -> StreamableHttpServerConfig {
    StreamableHttpServerConfig::default()
        .with_legacy_session_mode(false)
        .with_json_response(true)
        // The gateway goes by many names behind proxies; who calls is known by the bearer, and pages by their origin.
        .disable_allowed_hosts()
        .with_max_request_body_bytes(api.config.now().edge.body_bytes_max)
        .with_sse_keep_alive(Some(Duration::from_secs(api.config.now().tools.keepalive_secs)))
        .with_sse_retry(None)
}

/// Pages of other sites must not call, whatever name they have made for this machine (DNS rebinding).
fn check_origin(api: &Api, request: &Parts) -> Result<(), ApiError> {
    let Some(origin) = request.headers.get(ORIGIN) else { return Ok(()) };
    let origin = origin.to_str().unwrap_or_default();
    let host = origin.split_once("://").map_or("", |(_, authority)| authority);
    let host = match host.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => host,
        _ => host,
    };
    let own = || api.config.now().public_url.is_some() && origin_of(&http_base(api, request)) == origin;
    let allowed = matches!(host, "localhost" | "127.0.0.1" | "[::1]")
        || api.config.now().mcp.allowed_origins.iter().any(|allowed| allowed.trim_end_matches('/') == origin)
        || own();
    if allowed { Ok(()) } else { Err(ApiError::new(403, "origin_refused", "pages of this origin may not call")) }
}

/// Scheme and authority of a URL.
fn origin_of(url: &str) -> &str {
    let authority = url.find("://").map_or(0, |at| at + 3);
    let end = url[authority..].find('/').map_or(url.len(), |at| authority + at);
    &url[..end]
}

/// Tells a caller without a good token where it learns how to come by one (RFC 9728 §5.1).
fn challenge(api: &Api, request: &Parts, refused: ApiError) -> ApiError {
    if refused.status() != 401 {
        return refused;
    }
    let error = if refused.code() == "invalid_token" { r#"error="invalid_token", "# } else { "" };
    let (base, path) = (http_base(api, request), request.uri.path());
    let challenge = format!(r#"Bearer {error}resource_metadata="{base}{WELL_KNOWN}{path}""#);
    match HeaderValue::try_from(challenge) {
        Ok(challenge) => refused.with_header(WWW_AUTHENTICATE, challenge),
        Err(_) => refused,
    }
}

/// `GET /.well-known/oauth-protected-resource…`: what the MCP door is as a protected resource (RFC 9728).
pub fn protected_resource(api: &Api, request: Request<Incoming>) -> Result<Response<Body>, ApiError> {
    let (request, _) = request.into_parts();
    let path = match request.uri.path() {
        path if path.starts_with("/v1/") || path.ends_with("/v1/mcp") => "/v1/mcp",
        _ => "/mcp",
    };
    let mut document = json!({
        "resource": format!("{}{path}", http_base(api, &request)),
        "resource_name": "exec-gateway",
        "bearer_methods_supported": ["header"],
    });
    let config = api.config.now();
    let issuers = &config.mcp.authorization_servers;
    if !issuers.is_empty() {
        document["authorization_servers"] = json!(issuers);
    }
    Ok(json_answer(&document))
}

fn rpc_error(id: Option<&str>, code: i32, message: &str) -> Response<Body> {
    rpc_error_answer(id, code, message).map(boxed)
}

fn boxed(body: BoxBody<Bytes, Infallible>) -> Body {
    body.map_err(|never| match never {}).boxed_unsync()
}

fn rpc_error_answer(id: Option<&str>, code: i32, message: &str) -> Rpc {
    // What is no id of the protocol is not given back as one.
    let id = id.and_then(|id| serde_json::from_str::<RequestId>(id).ok());
    let error = json!({ "jsonrpc": "2.0", "id": id, "error": { "code": code, "message": message } });
    let mut answer = Response::new(Full::new(Bytes::from(json_line(&error))).boxed());
    *answer.status_mut() = StatusCode::BAD_REQUEST;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    answer
}

/// What `rmcp` refuses in plain text, as JSON-RPC.
async fn told(answer: Rpc, id: Option<String>) -> Rpc {
    let is_text = !answer.headers().contains_key(CONTENT_TYPE);
    if answer.status().is_success() || !is_text {
        return answer;
    }
    let (head, body) = answer.into_parts();
    let text = body.collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
    let mut told = rpc_error_answer(id.as_deref(), INVALID_REQUEST, &String::from_utf8_lossy(&text));
    // Its answer to JSON that is no message of the protocol: the media type was right.
    if head.status != StatusCode::UNSUPPORTED_MEDIA_TYPE {
        *told.status_mut() = head.status;
    }
    told
}

fn is_events(answer: &Rpc) -> bool {
    answer.headers().get(CONTENT_TYPE).is_some_and(|value| value.as_bytes().starts_with(b"text/event-stream"))
}

fn pieces(answer: Rpc) -> impl Stream<Item = Bytes> + Send {
    let frames = BodyExt::into_data_stream(answer.into_body().boxed_unsync());
    frames.filter_map(|frame| std::future::ready(frame.ok()))
}

/// A message's method, for metrics; a client may write anything there.
fn method_name(method: Option<&str>) -> &'static str {
    match method {
        Some("initialize") => "initialize",
        Some("tools/list") => "tools/list",
        Some("tools/call") => "tools/call",
        Some("ping") => "ping",
        Some(other) if other.starts_with("notifications/") => "notification",
        _ => "other",
    }
}

fn events(pieces: impl Stream<Item = Bytes> + Send + 'static, timing: Timing) -> Response<Body> {
    let mut response = late(pieces, timing);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    // nginx would collect events until it has a buffer full of them.
    headers.insert(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
    response
}

/// An answer that takes its time, as a stream of comments until it comes: proxies and clients give up on silence.
fn slow(handled: Pin<Box<dyn Future<Output = Rpc> + Send>>, timing: Timing, every: Duration) -> Response<Body> {
    let comments = interval_at(Instant::now(), every);
    let waiting = stream::unfold(Some((handled, comments)), |state| async {
        let (mut handled, mut comments) = state?;
        Some(tokio::select! {
            answer = &mut handled => (Either::Right(answer), None),
            _ = comments.tick() => (Either::Left(Bytes::from_static(b": still at it\n\n")), Some((handled, comments))),
        })
    });
    let all = waiting.flat_map(|step| match step {
        Either::Left(comment) => stream::once(async { comment }).left_stream(),
        Either::Right(answer) if is_events(&answer) => pieces(answer).left_stream().right_stream(),
        Either::Right(answer) => stream::once(event(answer)).right_stream().right_stream(),
    });
    events(all, timing)
}

/// A whole answer as one event; JSON on one line has no line breaks that would end it early.
async fn event(answer: Rpc) -> Bytes {
    let json = answer.into_body().collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
    let mut event = b"event: message\ndata: ".to_vec();
    event.extend_from_slice(json.trim_ascii());
    event.extend_from_slice(b"\n\n");
    event.into()
}
