//! Connector REST: environments and tool calls of a workspace (connectors-api.md §2.2).

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Request, Response};
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;
use tokio::time::{Instant, interval_at, timeout};

use super::calls::{Admitted, Order, failure};
use super::error::ApiError;
use super::{Api, json_bytes, json_line, late, timing};
use crate::auth::{Principal, bearer};
use crate::edge::body::Body;
use crate::ops::memory::Held;
use crate::protocol::rest::{Env, EnvList, ToolCall, ToolResult};
use crate::time::rfc3339;
use crate::timing::Timing;

pub(super) async fn caller(api: &Api, request: &Request<Incoming>) -> Result<Principal, ApiError> {
    let principal = api.corridor.auth.principal(bearer(request.headers())?);
    let principal = timing(request).auth(principal).await?;
    api.pace(&api.workspaces.get(&principal))?;
    Ok(principal)
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
    let key = idempotency_key(request.headers())?;
    let timing = timing(&request);
    let admitted = Admitted::admit(api, request.headers(), timing.clone()).await?;
    let held = admitted.held.clone();
    let body = api.body(request.into_body(), api.config.edge.now().body_bytes_max, &held).await?;
    let call: ToolCall = parse(&body)?;
    drop(body);
    let tool = admitted.tool(&call.tool)?;
    check_environment(name, &call)?;

    let (environment, arguments) = (Some(name.to_owned()), call.arguments);
    let order = Order { tool, environment, key, arguments, text_bytes_max: None, progress: None };
    let mut run: Pin<Box<RunningCall>> = Box::pin(admitted.run(api.clone(), order));
    let tools = api.tools.now();
    match timeout(Duration::from_secs(tools.keepalive_after_secs), &mut run).await {
        Ok(result) => {
            let text = json_line(&result?);
            held.set(text.len() as u64);
            Ok(json_bytes(Bytes::from_owner(Answer { text, _held: held })))
        }
        Err(_) => Ok(keep_alive(run, timing, Duration::from_secs(tools.keepalive_secs))),
    }
}

/// An answer that counts as memory that is held until its client has taken it.
struct Answer {
    text: Vec<u8>,
    _held: Arc<Held>,
}

impl AsRef<[u8]> for Answer {
    fn as_ref(&self) -> &[u8] {
        &self.text
    }
}

pub(super) fn idempotency_key(headers: &hyper::HeaderMap) -> Result<Option<String>, ApiError> {
    let Some(key) = headers.get("idempotency-key") else { return Ok(None) };
    let key = key.to_str().map_err(|_| ApiError::new(400, "bad_request", "Idempotency-Key: expected visible ASCII"))?;
    Ok(Some(key.to_owned()))
}

type RunningCall = dyn Future<Output = Result<ToolResult, ApiError>> + Send;

/// Sends the status at once and a space now and then, since the Python client gives up after 30 s of silence. What
/// goes wrong from here on is told inside the result, and where the time went behind it.
fn keep_alive(run: Pin<Box<RunningCall>>, timing: Timing, every: Duration) -> Response<Body> {
    // Now and then in that interval, so that the first silence is not longer than the others.
    let spaces = interval_at(Instant::now(), every);
    let pieces = stream::unfold(Some((run, spaces)), |state| async {
        let (mut run, mut spaces) = state?;
        Some(tokio::select! {
            result = &mut run => {
                let result = result.unwrap_or_else(|error| failure(&error));
                (Bytes::from(json_line(&result)), None)
            }
            _ = spaces.tick() => (Bytes::from_static(b" "), Some((run, spaces))),
        })
    });
    let mut response = late(pieces, timing);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
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
