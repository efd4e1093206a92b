//! The harness's side: the way to an encrypted executor, and the socket that speaks with an executor of any kind.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::header::{CONNECTION, HeaderValue};
use hyper::{Request, Response};
use tokio::sync::mpsc;
use zeroize::Zeroizing;

use super::audited::act;
use super::credential::SocketCredential;
use super::error::ApiError;
use super::{Api, credential, executor, json, query_parameter};
use crate::audit::Outcome;
use crate::auth::{AuthError, CredentialId, Principal, bearer};
use crate::edge::body::{self, Body};
use crate::edge::peer;
use crate::edge::upgrade::{self, SocketLimits, SocketStream as HarnessStream};
use crate::ops::metrics::Held;
use crate::protocol::frame::StreamId;
use crate::protocol::harness_token::{HarnessClaims, KeyDigest};
use crate::protocol::ids::{ExecutorId, WorkspaceId};
use crate::protocol::rest::{ConnectRequest, ConnectResponse, HarnessKey, KeyBytes, SECURITY_PROFILE};
use crate::relay::comeback::{Comebacks, Places};
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

/// Who may come back for a stream: the same credential at the same executor.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Holder {
    workspace: WorkspaceId,
    executor: ExecutorId,
    credential: CredentialId,
    mark: Mark,
}

/// What tells streams of one credential apart.
#[derive(Clone, PartialEq, Eq, Hash)]
enum Mark {
    /// The harness of an encrypted stream. Its newest stream takes the place of the one before: who takes its executor
    /// session up again on a new one must not find the session attached to the old one.
    Key(KeyDigest),
    /// The stream of a plain harness.
    Stream(StreamId),
}

/// The streams that harnesses may come back for.
pub type StreamPlaces = Places<Holder, (StreamId, Comebacks<HarnessStream>)>;

/// Checks a credential and that its workspace may reach the executor.
async fn admit(api: &Arc<Api>, token: Zeroizing<String>, id: &str) -> Result<Admitted, ApiError> {
    let revocations = api.corridor.auth.revocations();
    let principal = api.corridor.auth.principal(&token).await.map_err(refused)?;
    let (workspace, binding) = reach(api, &principal, id).await?;
    api.pace(&workspace)?;
    api.memory.admit()?;
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
    let settings = api.corridor.link.now();
    let seen = Duration::from_secs(settings.executor_seen_secs);
    let wait = Duration::from_secs(settings.harness_wait_secs);
    let link = api.corridor.registry.link_soon(binding, seen, wait).await;
    link.map_err(|_| ApiError::new(503, "executor_not_connected", "executor not connected").retry_after(1))
}

/// `POST /cloud/environment/{id}/connect`: the way to an encrypted executor, for one harness key and a short time.
///
/// Its connection ends with the answer, also with one that says to try again: a harness asks the moment its socket
/// breaks, and gives up for good when the connection that it kept from the last time has broken as well.
pub async fn connect(api: &Arc<Api>, id: &str, request: Request<Incoming>) -> Result<Response<Body>, ApiError> {
    let close = HeaderValue::from_static("close");
    let mut answer = way(api, id, request).await.map_err(|error| error.with_header(CONNECTION, close.clone()))?;
    answer.headers_mut().insert(CONNECTION, close);
    Ok(answer)
}

async fn way(api: &Arc<Api>, id: &str, request: Request<Incoming>) -> Result<Response<Body>, ApiError> {
    api.refuse_while_draining()?;
    let principal = super::rest::caller(api, &request).await?;
    let (workspace, binding) = reach(api, &principal, id).await?;
    let (head, body) = request.into_parts();
    let body = body::read(body, BODY_BYTES_MAX, Duration::from_secs(api.config.now().edge.header_timeout_secs)).await?;
    let bad = |message: String| ApiError::new(400, "bad_request", message);
    let request: ConnectRequest = super::rest::parse(&body)?;
    let key = request.harness_public_key.decode().map_err(|error| bad(format!("harness_public_key: {error}")))?;
    let link = link(api, &binding).await?;
    let registration = link.registration();
    let executor_public_key = public_key(registration).ok_or_else(not_encrypted)?;
    let asked = act("harness.connect", &principal, &head.headers).at(binding.name().as_str()).on(binding.executor());
    api.audit.begin(asked).await?.end(Outcome::new("ok"));
    let harness = api.corridor.auth.harness();
    let authorization = harness.mint(workspace.id(), &registration.executor, &registration.id, &key.digest());
    // For our door alone: the authorization is shown to the executor too, and tells nothing about the caller.
    let credential = api.corridor.auth.resume_names().seal_bearer(&registration.executor, bearer(&head.headers)?);
    let base = executor::websocket_base(api, &head);
    Ok(json(&ConnectResponse {
        environment_id: id.to_owned(),
        // All three consist of characters that need no escaping in a query.
        url: format!("{base}/bridge/{id}?token={authorization}&by={credential}"),
        security_profile: SECURITY_PROFILE.to_owned(),
        executor_registration_id: registration.id.to_string(),
        executor_public_key,
        harness_key_authorization: authorization,
    }))
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
    let link = link(api, &admitted.binding).await?;
    if handshake.as_ref().is_some_and(|claims| claims.registration != link.registration().id) {
        // The executor was restarted: the harness asks for the way again (codex-exec-server.md §8.3).
        return Err(refused(AuthError::Invalid));
    }
    if handshake.is_some() && link.locks_out(admitted.workspace.id()) {
        let message = "too many encrypted handshakes with this executor have failed";
        return Err(ApiError::new(429, "too_many_handshakes", message).retry_after(60));
    }
    if !link.has_room(admitted.workspace.id()) {
        return Err(ReachError::TooManyStreams.into());
    }
    let opened = act("harness.socket", &admitted.principal, request.headers())
        .came_from(peer::client(request.headers(), request.extensions().get()))
        .at(admitted.binding.name().as_str())
        .on(admitted.binding.executor())
        .about(serde_json::json!({ "encrypted": handshake.is_some() }));
    let entry = api.audit.begin(opened).await?;
    let settings = api.corridor.link.now();
    let limits = SocketLimits {
        read_buffer_bytes: settings.read_buffer_bytes,
        // Encrypted frames are handed on to an executor, whose socket ends over a larger one.
        message_bytes_max: if handshake.is_some() { settings.frame_bytes_max } else { settings.message_bytes_max },
    };
    let (response, socket) = upgrade::accept(request, protocol, limits);
    let key = handshake.map(|claims| claims.key);
    let api = api.clone();
    api.clone().sockets.spawn(async move {
        let Some(socket) = socket.await else { return };
        let outbox = Spill::new(&api.corridor.state_dir, &api.corridor.link.now(), api.metrics.clone());
        let mut socket = HarnessSocket::new(socket, outbox);
        let kind = if key.is_some() { "encrypted" } else { "plain" };
        let _open = Held::one(api.metrics.harnesses.of([kind]));
        let Admitted { principal, workspace, binding, mut refused } = admitted;
        let served = tokio::select! {
            biased;
            () = &mut refused => Served::Ended(HarnessEnd::Refused),
            () = api.draining.cancelled() => Served::Ended(HarnessEnd::Draining),
            served = serve(&api, &mut socket, &principal, &workspace, &binding, key) => served,
        };
        let end = match served {
            Served::Ended(end) => end,
            Served::Back(comebacks, next_seq) => {
                // The task that has the stream serves it from now on. Should that have ended this moment, so does this.
                let _ = comebacks.try_send(socket.back(next_seq));
                api.metrics.harness_comebacks.inc();
                entry.end(Outcome::new("resumed"));
                return;
            }
        };
        tracing::debug!(executor = %binding.executor(), workspace = %workspace.id(), ?end, "harness socket ended");
        api.metrics.harnesses_ended.inc([end.label()]);
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

/// What became of a harness's socket.
enum Served {
    /// It ended.
    Ended(HarnessEnd),
    /// It is for the task that has the stream, from the frame of this number on.
    Back(Comebacks<HarnessStream>, u32),
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

/// Carries what one harness and its executor say, until either ends. A harness whose authorization named its `key` is
/// encrypted.
async fn serve(
    api: &Api,
    socket: &mut HarnessSocket<HarnessStream>,
    principal: &Principal,
    workspace: &Workspace,
    binding: &Binding,
    key: Option<KeyDigest>,
) -> Served {
    let settings = &*api.corridor.link.now();
    let wait = Duration::from_secs(settings.first_frame_secs);
    let flavour = match socket.flavour(wait, settings.message_bytes_max).await {
        Ok(flavour) => flavour,
        Err(end) => return Served::Ended(end),
    };
    let holder = |stream: &StreamId| Holder {
        workspace: workspace.id().clone(),
        executor: binding.executor().clone(),
        credential: principal.credential().clone(),
        mark: key.map_or_else(|| Mark::Stream(stream.clone()), Mark::Key),
    };
    let (came_back, comebacks) = mpsc::channel(1);
    let hold = |stream: &StreamId| api.comebacks.hold(holder(stream), (stream.clone(), came_back)).0;
    let unreachable = |error| Served::Ended(HarnessEnd::Unreachable(unreachable(&error)));
    match flavour {
        Flavour::Back(stream, next_seq) => match api.comebacks.get(&holder(&stream)) {
            Some((held, comebacks)) if held == stream && !comebacks.is_closed() && comebacks.capacity() > 0 => {
                Served::Back(comebacks, next_seq)
            }
            _ => {
                socket.reset(stream).await;
                Served::Ended(HarnessEnd::Unresumable)
            }
        },
        Flavour::Encrypted(id, first) => {
            let _place = key.map(|_| hold(&id));
            let stream = match workspace.open_stream_as(principal, binding, id.clone()).await {
                Ok(stream) => stream,
                Err(error) => return unreachable(error),
            };
            if stream.link().registration().transport != Transport::Noise {
                return Served::Ended(HarnessEnd::Protocol("this executor is connected without encryption"));
            }
            if key.is_some() {
                socket.wait_for_comebacks(id, comebacks, workspace.id(), stream.link(), settings);
            }
            Served::Ended(socket.forward(stream, first, workspace.id(), settings).await)
        }
        Flavour::Messages(..) if key.is_some() => {
            Served::Ended(HarnessEnd::Protocol("the credential is for encrypted frames"))
        }
        Flavour::Messages(framing, first) => {
            let stream = match workspace.open_stream(principal, binding).await {
                Ok(stream) => stream,
                Err(error) => return unreachable(error),
            };
            let _place = framing.stream().map(hold);
            if let Some(id) = framing.stream() {
                socket.wait_for_comebacks(id.clone(), comebacks, workspace.id(), stream.link(), settings);
            }
            let conversation = match workspace.converse(stream).await {
                Ok(conversation) => conversation,
                Err(error) => {
                    tracing::warn!(executor = %binding.executor(), %error, "no conversation for a harness");
                    return Served::Ended(HarnessEnd::Unreachable("the executor could not be reached"));
                }
            };
            let (resume, executor) = (api.corridor.auth.resume_names(), binding.executor());
            let names = Names {
                seal: &|session| resume.seal(workspace.id(), executor, session),
                open: &|name| resume.open(workspace.id(), executor, name),
                attached: &api.harnesses,
            };
            Served::Ended(socket.converse(conversation, framing, first, &names, settings).await)
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
