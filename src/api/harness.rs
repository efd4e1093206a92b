//! The harness's side: the way to an encrypted executor, and the socket that speaks with an executor of any kind.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::header::{CONNECTION, HeaderValue};
use hyper::{Request, Response};
use zeroize::Zeroizing;

use super::audited::act;
use super::credential::SocketCredential;
use super::error::ApiError;
use super::{Api, credential, executor, json, query_parameter};
use crate::audit::Outcome;
use crate::auth::{AuthError, Principal, bearer};
use crate::edge::body::{self, Body};
use crate::edge::upgrade::{self, SocketLimits};
use crate::ops::metrics::OutcomeLabel;
use crate::protocol::harness_token::HarnessClaims;
use crate::protocol::ids::ExecutorId;
use crate::protocol::rest::{ConnectRequest, ConnectResponse, HarnessKey, KeyBytes, SECURITY_PROFILE};
use crate::relay::harness::{Flavour, HarnessEnd, HarnessSocket, Names, Passed};
use crate::relay::link::LinkHandle;
use crate::relay::spill::Spill;
use crate::store::{Binding, Registration, Transport};
use crate::workspace::{ReachError, Workspace};

/// Largest `connect`; it holds one public key.
const BODY_BYTES_MAX: usize = 64 * 1024;

/// A harness that may reach an executor.
struct Admitted {
    principal: Principal,
    workspace: Arc<Workspace>,
    binding: Binding,
    /// Ready when the right has ended.
    refused: Pin<Box<dyn Future<Output = ()> + Send>>,
}

/// Checks a credential and that its workspace may reach the executor.
async fn admit(api: &Arc<Api>, token: Zeroizing<String>, id: &str) -> Result<Admitted, ApiError> {
    let revocations = api.corridor.auth.revocations();
    let principal = api.corridor.auth.principal(&token).await.map_err(refused)?;
    let (workspace, binding) = reach(api, &principal, id).await?;
    let caller = principal.clone();
    let refused = Box::pin(async move {
        revocations.end_of_right(&token, &caller).await;
    });
    Ok(Admitted { principal, workspace, binding, refused })
}

/// The words of the original, by which its callers tell one refusal from another (connectors-api.md §2.4).
fn refused(error: AuthError) -> ApiError {
    let words = match &error {
        AuthError::MissingBearer => "missing Bearer",
        AuthError::Invalid => "unauthorized",
        AuthError::Expired => "token expired",
        AuthError::Revoked => "turn revoked",
        AuthError::Unavailable { .. } => return error.into(),
    };
    ApiError::from(error).in_words(words)
}

/// The workspace of a principal, and its right to the executor. Unknown and foreign executors answer alike.
async fn reach(api: &Api, principal: &Principal, id: &str) -> Result<(Arc<Workspace>, Binding), ApiError> {
    let foreign = || ApiError::new(403, "forbidden", "exe_id not in workspace");
    if principal.scopes().read_only {
        return Err(super::read_only());
    }
    let executor = ExecutorId::new(id).map_err(|_| foreign())?;
    let workspace = api.workspaces.get(principal);
    let bindings = workspace.environments().await?;
    let binding = bindings.iter().find(|binding| *binding.executor() == executor).cloned().ok_or_else(foreign)?;
    Ok((workspace, binding))
}

/// The executor's link; one that was connected lately is waited for, as long as harnesses wait.
async fn link(api: &Api, binding: &Binding) -> Result<LinkHandle, ApiError> {
    let settings = &api.config.link;
    let seen = Duration::from_secs(settings.executor_seen_secs);
    let wait = Duration::from_secs(settings.harness_wait_secs);
    let link = api.corridor.registry.link_soon(binding, seen, wait).await;
    link.map_err(|_| ApiError::new(503, "executor_not_connected", "executor not connected").retry_after(1))
}

/// `POST /cloud/environment/{id}/connect`: the way to an encrypted executor, for one harness key and a short time.
pub async fn connect(api: &Arc<Api>, id: &str, request: Request<Incoming>) -> Result<Response<Body>, ApiError> {
    api.refuse_while_draining()?;
    let principal = super::rest::caller(api, &request).await?;
    let (workspace, binding) = reach(api, &principal, id).await?;
    let (head, body) = request.into_parts();
    let body = body::read(body, BODY_BYTES_MAX, Duration::from_secs(api.config.edge.header_timeout_secs)).await?;
    let bad = |message: String| ApiError::new(400, "bad_request", message);
    let request: ConnectRequest = serde_json::from_slice(&body).map_err(|error| bad(error.to_string()))?;
    let key = request.harness_public_key.decode().map_err(|error| bad(format!("harness_public_key: {error}")))?;
    let link = link(api, &binding).await?;
    let registration = link.registration();
    let executor_public_key = public_key(registration).ok_or_else(not_encrypted)?;
    let harness = api.corridor.auth.harness();
    let authorization = harness.mint(workspace.id(), &registration.executor, &registration.id, &key.digest());
    // For our door alone: the authorization is shown to the executor too, and tells nothing about the caller.
    let credential = api.corridor.auth.resume_names().seal_bearer(&registration.executor, bearer(&head.headers)?);
    let base = executor::websocket_base(api, &head.headers);
    let mut answer = json(&ConnectResponse {
        environment_id: id.to_owned(),
        // All three consist of characters that need no escaping in a query.
        url: format!("{base}/bridge/{id}?token={authorization}&by={credential}"),
        security_profile: SECURITY_PROFILE.to_owned(),
        executor_registration_id: registration.id.to_string(),
        executor_public_key,
        harness_key_authorization: authorization,
    });
    // A harness asks again the moment its socket breaks, and gives up for good when the connection that it kept from the
    // last time has broken as well.
    answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    Ok(answer)
}

fn public_key(registration: &Registration) -> Option<HarnessKey> {
    let (x25519, mlkem768) = registration.public_key.split_first_chunk()?;
    Some(KeyBytes { x25519: *x25519, mlkem768: Box::new(mlkem768.try_into().ok()?) }.encode())
}

fn not_encrypted() -> ApiError {
    ApiError::new(409, "not_encrypted", "this executor is connected without encryption")
}

/// `GET /bridge/{id}` without a ticket: the harness's socket.
pub async fn open(api: &Arc<Api>, id: &str, request: Request<Incoming>) -> Result<Response<Body>, ApiError> {
    upgrade::check(request.headers())?;
    api.refuse_while_draining()?;
    let SocketCredential { token, protocol } = credential::of_socket(&request).map_err(refused)?;
    let (token, handshake) = if token.starts_with("h1.") {
        let (bearer, claims) = handshake(api, &token, id, request.uri().query()).map_err(refused)?;
        (bearer, Some(claims))
    } else {
        (token, None)
    };
    let admitted = admit(api, token, id).await?;
    if handshake.as_ref().is_some_and(|claims| claims.workspace != *admitted.workspace.id()) {
        return Err(refused(AuthError::Invalid));
    }
    let registration = handshake.map(|claims| claims.registration);
    let link = link(api, &admitted.binding).await?;
    if registration.as_ref().is_some_and(|registration| *registration != link.registration().id) {
        // The executor was restarted: the harness asks for the way again (codex-exec-server.md §8.3).
        return Err(refused(AuthError::Invalid));
    }
    if registration.is_some() && link.locks_out(admitted.workspace.id()) {
        let message = "too many encrypted handshakes with this executor have failed";
        return Err(ApiError::new(429, "too_many_handshakes", message).retry_after(60));
    }
    if !link.has_room(admitted.workspace.id()) {
        return Err(ReachError::TooManyStreams.into());
    }
    let opened = act("harness.socket", &admitted.principal, request.headers())
        .at(admitted.binding.name().as_str())
        .on(admitted.binding.executor())
        .about(serde_json::json!({ "encrypted": registration.is_some() }));
    let entry = api.audit.begin(opened).await?;
    let settings = &api.config.link;
    let limits = SocketLimits {
        read_buffer_bytes: settings.read_buffer_bytes,
        // Encrypted frames are handed on to an executor, whose socket ends over a larger one.
        message_bytes_max: if registration.is_some() { settings.frame_bytes_max } else { settings.message_bytes_max },
    };
    let (response, socket) = upgrade::accept(request, protocol, limits);
    let api = api.clone();
    api.clone().sockets.spawn(async move {
        let Some(socket) = socket.await else { return };
        let outbox = Spill::new(&api.corridor.state_dir, &api.corridor.link, api.metrics.clone());
        let mut socket = HarnessSocket::new(socket, outbox);
        let Admitted { principal, workspace, binding, mut refused } = admitted;
        let end = tokio::select! {
            biased;
            () = &mut refused => HarnessEnd::Refused,
            () = api.draining.cancelled() => HarnessEnd::Draining,
            end = serve(&api, &mut socket, &principal, &workspace, &binding, registration.is_some()) => end,
        };
        tracing::debug!(executor = %binding.executor(), workspace = %workspace.id(), ?end, "harness socket ended");
        api.metrics.harnesses_ended.get_or_create(&OutcomeLabel { outcome: end.label() }).inc();
        entry.end(outcome(end, socket.passed()));
        socket.close(end).await;
    });
    Ok(response)
}

/// What is recorded of a socket that has ended.
fn outcome(end: HarnessEnd, passed: Passed) -> Outcome {
    let outcome = Outcome::new(end.label()).bytes(passed.bytes_in, passed.bytes_out);
    let outcome = outcome.with("frames_in", passed.frames_in).with("frames_out", passed.frames_out);
    match end.detail() {
        Some(detail) => outcome.with("detail", detail),
        None => outcome,
    }
}

/// The credential under which a handshake was authorized, and for what.
fn handshake(
    api: &Api,
    authorization: &str,
    id: &str,
    query: Option<&str>,
) -> Result<(Zeroizing<String>, HarnessClaims), AuthError> {
    let (auth, executor) = (&api.corridor.auth, ExecutorId::new(id).map_err(|_| AuthError::Invalid)?);
    let claims = auth.handshake(authorization, &executor)?;
    let sealed = query_parameter(query.unwrap_or_default(), "by").ok_or(AuthError::Invalid)?;
    Ok((auth.resume_names().open_bearer(&executor, &sealed).ok_or(AuthError::Invalid)?, claims))
}

/// Carries what one harness and its executor say, until either ends.
async fn serve<S>(
    api: &Api,
    socket: &mut HarnessSocket<S>,
    principal: &Principal,
    workspace: &Workspace,
    binding: &Binding,
    encrypted_only: bool,
) -> HarnessEnd
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let settings = &api.corridor.link;
    let wait = Duration::from_secs(settings.first_frame_secs);
    let flavour = match socket.flavour(wait, settings.message_bytes_max).await {
        Ok(flavour) => flavour,
        Err(end) => return end,
    };
    match flavour {
        Flavour::Encrypted(id, first) => {
            let stream = match workspace.open_stream_as(principal, binding, id).await {
                Ok(stream) => stream,
                Err(error) => return HarnessEnd::Unreachable(unreachable(&error)),
            };
            if stream.link().registration().transport != Transport::Noise {
                return HarnessEnd::Protocol("this executor is connected without encryption");
            }
            socket.forward(stream, first, workspace.id(), settings).await
        }
        Flavour::Messages(..) if encrypted_only => HarnessEnd::Protocol("the credential is for encrypted frames"),
        Flavour::Messages(framing, first) => {
            let stream = match workspace.open_stream(principal, binding).await {
                Ok(stream) => stream,
                Err(error) => return HarnessEnd::Unreachable(unreachable(&error)),
            };
            let conversation = match workspace.converse(stream).await {
                Ok(conversation) => conversation,
                Err(error) => {
                    tracing::warn!(executor = %binding.executor(), %error, "no conversation for a harness");
                    return HarnessEnd::Unreachable("the executor could not be reached");
                }
            };
            let (resume, executor) = (api.corridor.auth.resume_names(), binding.executor());
            let names = Names {
                seal: &|session| resume.seal(workspace.id(), executor, session),
                open: &|name| resume.open(workspace.id(), executor, name),
                attached: &api.harnesses,
            };
            socket.converse(conversation, framing, first, &names, settings).await
        }
    }
}

/// Why there is no stream, as a close frame says it.
fn unreachable(error: &ReachError) -> &'static str {
    match error {
        ReachError::TooManyStreams => "too many streams on this executor",
        ReachError::StreamTaken => "the stream id is taken",
        ReachError::NotConnected(_) => "executor not connected",
        _ => "the executor could not be reached",
    }
}
