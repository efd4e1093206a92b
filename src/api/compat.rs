//! Doors for services that were built around the original gateway (connectors-api.md §2.7): who is connected, turns
//! that end, machines that people register and bind.
//!
//! What they change goes the way of operators' commands, so it takes effect before it is answered. A door whose secret
//! is not configured does not exist.

use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::{HeaderMap, Request, Response, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::error::ApiError;
use super::{Api, json, rest};
use crate::admin::{self, AdminError};
use crate::auth::bearer;
use crate::config::{self, Secret};
use crate::edge::body::{self, Body, full};
use crate::protocol::compat::{BindExecutor, ConnectedExecutor, RegisterExecutor, RegisteredExecutor, RevokeTurn};
use crate::protocol::ids::{ExecutorId, UserId, WorkspaceId};
use crate::time::rfc3339;

/// Largest body of these doors: a few names.
const BODY_BYTES_MAX: usize = 64 * 1024;

/// Longest description of an executor, in bytes.
const DESCRIPTION_BYTES_MAX: usize = 4096;

/// `GET /api/exec-gateway/connected`: the connected executors of the caller's workspace.
pub async fn connected(api: &Arc<Api>, request: Request<Incoming>) -> Result<Response<Body>, ApiError> {
    let principal = rest::caller(api, &request).await?;
    let mut executors = executors(api, principal.workspace()).await?;
    executors.retain(|executor| executor.is_online);
    Ok(json(&executors))
}

/// `POST /api/exec-gateway/revoke-turn`
pub async fn revoke_turn(api: &Arc<Api>, request: Request<Incoming>) -> Result<Response<Body>, ApiError> {
    admit_service(api, bearer(request.headers()).ok())?;
    let RevokeTurn { turn_id: turn, exp } = read(api, request).await?;
    let revoke = match exp {
        Some(exp) => admin::Request::RevokeTurnUntil { turn, exp: exp.try_into().unwrap_or(0) },
        None => admin::Request::RevokeTurn { turn },
    };
    match operate(api, revoke).await {
        Ok(_) => Ok(no_content()),
        // Nothing contradicts this one; there is no room until others may be forgotten.
        Err(AdminError::Conflict(full)) => Err(ApiError::new(503, "too_many_revocations", full).retry_after(60)),
        Err(error) => Err(error.into()),
    }
}

/// `POST /api/codex-exec/register`: a machine of the person whom the service names.
pub async fn register(api: &Arc<Api>, request: Request<Incoming>) -> Result<Response<Body>, ApiError> {
    admit_internal(api, request.headers())?;
    let user = user(request.headers())?.ok_or_else(|| unauthorized("X-User-Id is required"))?;
    let RegisterExecutor { .. } = read(api, request).await?;
    match operate(api, admin::Request::ExecutorRegister { user }).await? {
        admin::Response::ExecutorRegistered { exe_id } => Ok(created(&RegisteredExecutor { exe_id })),
        _ => Err(ApiError::internal("the command was answered with something else")),
    }
}

/// `DELETE /api/codex-exec/executors/{exe_id}`: with its bindings and its socket. Gone is gone, also the second time.
pub async fn delete(api: &Arc<Api>, id: &str, request: Request<Incoming>) -> Result<Response<Body>, ApiError> {
    admit_internal(api, request.headers())?;
    if let Ok(executor) = ExecutorId::new(id) {
        gone(operate(api, admin::Request::ExecutorDelete { executor }).await)?;
    }
    Ok(no_content())
}

/// `POST /api/codex-exec/workspaces/{wid}/executors`. A person who is named can bind their own executors only.
pub async fn bind(api: &Arc<Api>, workspace: &str, request: Request<Incoming>) -> Result<Response<Body>, ApiError> {
    admit_internal(api, request.headers())?;
    let workspace = workspace_id(workspace)?;
    let user = user(request.headers())?;
    let BindExecutor { exe_id: executor, name, description, is_default } = read(api, request).await?;
    if description.as_ref().is_some_and(|text| text.len() > DESCRIPTION_BYTES_MAX) {
        return Err(bad_request(format!("description: more than {DESCRIPTION_BYTES_MAX} bytes")));
    }
    let stored = api.corridor.store.executor(&executor).await?;
    if stored.is_none_or(|executor| user.is_some() && executor.user != user) {
        return Err(ApiError::new(404, "not_found", format!("there is no executor {executor}")));
    }
    let default = is_default.unwrap_or(false);
    let bind = admin::Request::ExecutorBind { executor: executor.clone(), workspace: workspace.clone(), name, default };
    operate(api, bind).await?;
    if let Some(description) = description {
        operate(api, admin::Request::ExecutorDescribe { executor, workspace, description }).await?;
    }
    Ok(created(&serde_json::json!({ "status": "ok" })))
}

/// `GET /api/codex-exec/workspaces/{wid}/executors`: all that are bound, connected or not.
pub async fn bound(api: &Arc<Api>, workspace: &str, request: Request<Incoming>) -> Result<Response<Body>, ApiError> {
    admit_internal(api, request.headers())?;
    Ok(json(&executors(api, &workspace_id(workspace)?).await?))
}

/// `DELETE /api/codex-exec/workspaces/{wid}/executors/{exe_id}`
pub async fn unbind(api: &Arc<Api>, path: &str, request: Request<Incoming>) -> Result<Response<Body>, ApiError> {
    admit_internal(api, request.headers())?;
    let (workspace, executor) = path.split_once('/').unwrap_or_default();
    let workspace = workspace_id(workspace)?;
    if let Ok(executor) = ExecutorId::new(executor) {
        gone(operate(api, admin::Request::ExecutorUnbind { executor, workspace }).await)?;
    }
    Ok(no_content())
}

async fn executors(api: &Api, workspace: &WorkspaceId) -> Result<Vec<ConnectedExecutor>, ApiError> {
    let stored = api.corridor.store.executors(Some(workspace)).await?;
    let bindings = stored.iter().flat_map(|(executor, bindings)| bindings.iter().map(move |of| (executor, of)));
    let described = bindings.map(|(executor, binding)| {
        let presence = api.corridor.registry.presence(binding);
        ConnectedExecutor {
            exe_id: executor.id.clone(),
            name: binding.name().clone(),
            description: binding.description().to_owned(),
            is_default: binding.is_default(),
            last_seen_at: presence.map(|presence| presence.heard).or(executor.last_seen).map(rfc3339),
            connected_at: presence.map(|presence| rfc3339(presence.since)),
            is_online: presence.is_some(),
        }
    });
    Ok(described.collect())
}

fn admit_internal(api: &Api, headers: &HeaderMap) -> Result<(), ApiError> {
    let shown = headers.get("x-internal-secret").and_then(|value| value.to_str().ok());
    admit(api, |auth| auth.internal_secret.as_ref(), shown)
}

pub(super) fn admit_service(api: &Api, shown: Option<&str>) -> Result<(), ApiError> {
    admit(api, |auth| auth.shared_secret.as_ref(), shown)
}

/// Takes the secret, or the one before the last reload: whoever shows it has to be given the new one in between. A door
/// whose secret is gone is closed at once.
fn admit(api: &Api, secret: fn(&config::Auth) -> Option<&Secret>, shown: Option<&str>) -> Result<(), ApiError> {
    let (config, before) = (api.config.now(), api.config.before());
    let current = secret(&config.auth).ok_or_else(|| ApiError::new(404, "not_found", "no such path"))?;
    let former = before.as_ref().and_then(|config| secret(&config.auth));
    let is_known = |shown| current.is(shown) || former.is_some_and(|former| former.is(shown));
    if shown.is_some_and(is_known) { Ok(()) } else { Err(unauthorized("unauthorized")) }
}

fn user(headers: &HeaderMap) -> Result<Option<UserId>, ApiError> {
    let Some(shown) = headers.get("x-user-id").filter(|shown| !shown.is_empty()) else { return Ok(None) };
    let text = shown.to_str().map_err(|_| bad_request("X-User-Id: expected visible ASCII"))?;
    UserId::new(text).map(Some).map_err(|error| bad_request(error.to_string()))
}

fn workspace_id(text: &str) -> Result<WorkspaceId, ApiError> {
    WorkspaceId::new(text).map_err(|error| bad_request(error.to_string()))
}

pub(super) async fn read<T: DeserializeOwned>(api: &Api, request: Request<Incoming>) -> Result<T, ApiError> {
    let wait = Duration::from_secs(api.config.now().edge.body_timeout_secs);
    let body = body::read(request.into_body(), BODY_BYTES_MAX, wait).await?;
    rest::parse(&body)
}

async fn operate(api: &Api, request: admin::Request) -> Result<admin::Response, AdminError> {
    let operators = api.operators.get().and_then(|admin| admin.upgrade());
    let operators = operators.ok_or_else(|| AdminError::Unavailable("the gateway has ended".into()))?;
    operators.run_for("service", request).await
}

fn gone(result: Result<admin::Response, AdminError>) -> Result<(), AdminError> {
    match result {
        Ok(_) | Err(AdminError::NotFound(_)) => Ok(()),
        Err(error) => Err(error),
    }
}

pub(super) fn created(value: &impl Serialize) -> Response<Body> {
    let mut response = json(value);
    *response.status_mut() = StatusCode::CREATED;
    response
}

fn no_content() -> Response<Body> {
    let mut response = Response::new(full(""));
    *response.status_mut() = StatusCode::NO_CONTENT;
    response
}

pub(super) fn unauthorized(message: &str) -> ApiError {
    ApiError::new(401, "unauthorized", message)
}

pub(super) fn bad_request(message: impl Into<String>) -> ApiError {
    ApiError::new(400, "bad_request", message)
}
