//! Connector REST: environments and tool calls of a workspace (connectors-api.md §2.2).

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Request, Response};
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;
use tokio::time::{Instant, interval_at, timeout};
use zeroize::Zeroizing;

use super::audited::{self, act};
use super::error::ApiError;
use super::{Api, json, json_bytes, json_line};
use crate::auth::{Principal, bearer};
use crate::edge::body::{self, Body};
use crate::ops::metrics::CallLabels;
use crate::protocol::rest::{Env, EnvList, Ran, ToolCall, ToolResult};
use crate::time::rfc3339;
use crate::tools::{Call, Effect, Tool};
use crate::workspace::Workspace;

pub(super) async fn caller(api: &Api, request: &Request<Incoming>) -> Result<Principal, ApiError> {
    Ok(api.corridor.auth.principal(bearer(request.headers())?).await?)
}

/// `POST …/envs/list`: the connected environments of the caller's workspace. The body is ignored, as the original
/// does.
pub async fn list_environments(api: &Arc<Api>, request: Request<Incoming>) -> Result<Response<Body>, ApiError> {
    api.refuse_while_draining()?;
    let principal = caller(api, &request).await?;
    let workspace = api.workspaces.get(&principal);
    let registry = &api.corridor.registry;
    // Before the list is made: what changes meanwhile makes the next caller's anew.
    let version = registry.version();
    let bindings = workspace.environments().await?;
    let list = workspace.listing(&bindings, version, || {
        let tools: Vec<&RawValue> = workspace.tools().iter().map(|tool| tool.info_json()).collect();
        let connected = bindings.iter().filter_map(|binding| {
            let since = registry.connected_since(binding)?;
            Some(Env {
                name: binding.name().to_string(),
                kind: "executor".into(),
                is_default: binding.is_default(),
                tools: &tools,
                last_seen: Some(rfc3339(since)),
            })
        });
        json_line(&EnvList { envs: connected.collect() }).into()
    });
    Ok(json_bytes(list))
}

/// `POST …/envs/{name}/tool/call`
pub async fn call_tool(api: &Arc<Api>, name: &str, request: Request<Incoming>) -> Result<Response<Body>, ApiError> {
    api.refuse_while_draining()?;
    let revocations = api.corridor.auth.revocations();
    let bearer = Zeroizing::new(bearer(request.headers())?.to_owned());
    let principal = api.corridor.auth.principal(&bearer).await?;
    let workspace = api.workspaces.get(&principal);
    let key = idempotency_key(request.headers())?;
    let place = workspace.begin_call()?;
    let edge = &api.config.edge;
    let wait = Duration::from_secs(edge.body_timeout_secs);
    let (head, body) = request.into_parts();
    let body = body::read(body, edge.body_bytes_max, wait).await?;
    let call: ToolCall = parse(&body)?;
    let bytes_in = body.len();
    drop(body);
    let tool = Tool::named(&call.tool)
        .filter(|tool| workspace.tools().iter().any(|known| known.name() == tool.name()))
        .ok_or_else(|| ApiError::new(400, "unknown_tool", format!("no such tool: {}", call.tool)))?;
    if principal.scopes().read_only && tool.effect() != Effect::Reads {
        return Err(ApiError::new(403, "forbidden", format!("the token may only read, and {} does more", tool.name())));
    }
    check_environment(name, &call)?;

    let act = act("tool.call", &principal, &head.headers).at(name);
    let act = workspace.environment(name).await.map_or(act.clone(), |binding| act.on(binding.executor()));
    let entry = audited::tool_call(api, act, tool.name(), &call.arguments).await?;
    let run = run(api.clone(), workspace, tool, name.to_owned(), key, call);
    let mut run: Pin<Box<RunningCall>> = Box::pin(async move {
        let result = tokio::select! {
            result = run => result,
            refused = revocations.end_of(&bearer) => Err(ApiError::from(refused).with_ran(Ran::Unknown)),
        };
        drop(place);
        if let Some(entry) = entry {
            entry.end(audited::outcome(&result, bytes_in));
        }
        result
    });
    let tools = &api.config.tools;
    match timeout(Duration::from_secs(tools.keepalive_after_secs), &mut run).await {
        Ok(result) => Ok(json(&result?)),
        Err(_) => Ok(keep_alive(run, Duration::from_secs(tools.keepalive_secs))),
    }
}

fn idempotency_key(headers: &hyper::HeaderMap) -> Result<Option<String>, ApiError> {
    let Some(key) = headers.get("idempotency-key") else { return Ok(None) };
    let key = key.to_str().map_err(|_| ApiError::new(400, "bad_request", "Idempotency-Key: expected visible ASCII"))?;
    Ok(Some(key.to_owned()))
}

type RunningCall = dyn Future<Output = Result<ToolResult, ApiError>> + Send;

async fn run(
    api: Arc<Api>,
    workspace: Arc<Workspace>,
    tool: &'static Tool,
    environment: String,
    key: Option<String>,
    call: ToolCall,
) -> Result<ToolResult, ApiError> {
    let started = Instant::now();
    let result = async {
        let (settings, sessions) = (api.tools.clone(), api.sessions.clone());
        let arguments = call.arguments;
        let call = Call { workspace, settings, started, sessions, key };
        Ok::<_, ApiError>(tool.call(&call, &environment, arguments).await?)
    }
    .await;
    let outcome = match &result {
        Ok(result) if result.is_error => "failed",
        Ok(_) => "ok",
        Err(error) => error.code(),
    };
    api.metrics.calls.get_or_create(&CallLabels { tool: tool.name(), outcome }).inc();
    result
}

/// Sends the status at once and a space now and then, since the Python client gives up after 30 s of silence. What
/// goes wrong from here on is told inside the result.
fn keep_alive(run: Pin<Box<RunningCall>>, every: Duration) -> Response<Body> {
    struct State {
        run: Pin<Box<RunningCall>>,
        spaces: tokio::time::Interval,
    }
    // Now and then in that interval, so that the first silence is not longer than the others.
    let state = State { run, spaces: interval_at(Instant::now(), every) };
    let frames = stream::unfold(Some(state), |state| async {
        let mut state = state?;
        let (bytes, state) = tokio::select! {
            result = &mut state.run => {
                let result = result.unwrap_or_else(|error| late_failure(&error));
                (Bytes::from(json_line(&result)), None)
            }
            _ = state.spaces.tick() => (Bytes::from_static(b" "), Some(state)),
        };
        Some((Ok::<_, Infallible>(Frame::data(bytes)), state))
    });
    let mut response = Response::new(BodyExt::boxed_unsync(StreamBody::new(frames)));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// An error after the status has been sent.
fn late_failure(error: &ApiError) -> ToolResult {
    let mut structured = serde_json::json!({ "code": error.code() });
    if let Some(ran) = error.ran() {
        structured["ran"] = serde_json::json!(ran);
    }
    ToolResult { structured_content: Some(structured), ..ToolResult::error(error.message()) }
}

/// A body that is one JSON object; what is wrong with it is said with the field it is about.
pub(super) fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    // serde reads a struct from an array too, member by member.
    if body.trim_ascii_start().first() == Some(&b'[') {
        return Err(ApiError::new(400, "bad_request", "expected an object"));
    }
    let mut json = serde_json::Deserializer::from_slice(body);
    let value = serde_path_to_error::deserialize(&mut json)
        .map_err(|error| ApiError::new(400, "bad_request", field_error("", &error)))?;
    json.end().map_err(|error| ApiError::new(400, "bad_request", error.to_string()))?;
    Ok(value)
}

/// A decoder's error with the field it is about.
pub fn field_error(prefix: &str, error: &serde_path_to_error::Error<serde_json::Error>) -> String {
    let path = error.path().to_string();
    match path.as_str() {
        "." | "?" => format!("{prefix}{}", error.inner()),
        path => format!("{prefix}{path}: {}", error.inner()),
    }
}

/// The path decides where a call runs; an `environment_id` that says otherwise is refused rather than overruled.
fn check_environment(name: &str, call: &ToolCall) -> Result<(), ApiError> {
    match call.arguments.get("environment_id") {
        None | Some(serde_json::Value::Null) => Ok(()),
        Some(serde_json::Value::String(id)) if id == name => Ok(()),
        Some(serde_json::Value::String(id)) => {
            let message = format!("the path names environment \"{name}\" and environment_id names \"{id}\"");
            Err(ApiError::new(409, "env_mismatch", message))
        }
        Some(_) => Err(ApiError::new(400, "bad_arguments", "environment_id: expected a string")),
    }
}
