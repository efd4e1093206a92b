//! The executor's side: register, validate, and the socket that becomes its link.
//!
//! A refused register ends a stock executor for good, so registers and validates are held and tried again inside for
//! as long as the executor waits, and are never shed (codex-exec-server.md §2.5).

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use hyper::body::Incoming;
use hyper::header::{HeaderName, HeaderValue};
use hyper::http::Extensions;
use hyper::http::request::Parts;
use hyper::{Request, Response};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout_at};
use tokio_tungstenite::WebSocketStream;
use uuid::Uuid;

use super::error::ApiError;
use super::{Api, asked_as, credential, harness, http_base, json, query_parameter, rest};
use crate::audit::{Act, Outcome};
use crate::auth::executor::{ExecutorAuthError, ExecutorCredential};
use crate::auth::sigv4::SignedRequest;
use crate::config::Secret;
use crate::edge::body::{self, Body};
use crate::edge::peer;
use crate::edge::tls::ClientCertified;
use crate::edge::upgrade::{self, SocketLimits};
use crate::protocol::ids::{ExecutorId, RegistrationId};
use crate::protocol::rest::{
    DIRECT_TRANSPORT, RegisterRequest, RegisterResponse, SECURITY_PROFILE, ValidateRequest, ValidateResponse,
};
use crate::protocol::rpc::ExecutorSessionId;
use crate::protocol::ticket::TicketError;
use crate::relay::greeting::{self, Former};
use crate::relay::link::{self, CloseReason, LinkEnd, LinkHandle};
use crate::relay::shared::Shared;
use crate::store::{Registration, StoreError, Transport};
use crate::workspace::Corridor;

/// Pause between two tries inside a held request.
const RETRY_PAUSE: Duration = Duration::from_millis(250);

/// Largest register or validate; both are below 8 KiB.
const BODY_BYTES_MAX: usize = 64 * 1024;

/// What tells a dial of the direct transport before its registration is known: it must be refused in another way.
const DIRECT_MARK: &str = "&t=direct";

/// How long a socket waits for its predecessor to hand over the sessions of its callers.
const VACATE_WAIT: Duration = Duration::from_secs(3);

const REJECTION_REASON: HeaderName = HeaderName::from_static("x-codex-rendezvous-rejection-reason");

/// Which kind of executor registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Door {
    /// `/cloud/environment/{id}/register`, `/cloud/executor/{id}/register`
    Codex,
    /// `/agentx/environment/{id}/register`
    Agentx,
    /// `/cloud/environment/{id}/direct/register`
    Direct,
}

/// Why a held request has no answer yet.
enum Held {
    /// The credential could not be checked.
    Auth(ExecutorAuthError),
    /// The store did not answer.
    Store(StoreError),
    /// Another process of this executor is connected.
    Occupied,
    /// The same, for an executor that would not wait on any answer.
    Conflict,
}

/// A request that the executor waits for.
struct Hold {
    until: Instant,
    last: Held,
}

impl Hold {
    fn new(api: &Api) -> Self {
        Self {
            until: Instant::now() + Duration::from_secs(api.config.now().link.register_hold_secs),
            last: Held::Store(StoreError::Unavailable("no answer in time".into())),
        }
    }

    /// Makes one try: a value when it worked, `None` when it is worth another one.
    ///
    /// # Errors
    /// The failure is final, or the time is over.
    async fn attempt<T>(&mut self, attempt: impl Future<Output = Result<T, Attempt>>) -> Result<Option<T>, ApiError> {
        match timeout_at(self.until, attempt).await {
            Ok(Ok(value)) => return Ok(Some(value)),
            Ok(Err(Attempt::Final(error))) => return Err(error),
            Ok(Err(Attempt::Again(held))) => self.last = held,
            Err(_) => return Err(self.last.as_error()),
        }
        if Instant::now() + RETRY_PAUSE >= self.until {
            return Err(self.last.as_error());
        }
        sleep(RETRY_PAUSE).await;
        Ok(None)
    }
}

/// How one try ended.
enum Attempt {
    Again(Held),
    Final(ApiError),
}

impl From<StoreError> for Attempt {
    fn from(error: StoreError) -> Self {
        Self::Again(Held::Store(error))
    }
}

impl Held {
    /// The two answers after which an encrypted executor waits and comes again by itself.
    fn as_error(&self) -> ApiError {
        match self {
            Self::Auth(error) => {
                ApiError::new(502, "authentication_service_unavailable", "credentials cannot be checked at the moment")
                    .caused_by(error)
            }
            Self::Store(error) => ApiError::new(503, "registration_conflict", "the gateway's store does not answer")
                .retry_after(2)
                .caused_by(error),
            Self::Occupied => {
                ApiError::new(503, "registration_conflict", "another process of this executor is connected")
                    .retry_after(5)
            }
            Self::Conflict => {
                ApiError::new(409, "registration_conflict", "another process of this executor is connected")
            }
        }
    }
}

/// `POST …/register`
pub async fn register(
    api: &Arc<Api>,
    door: Door,
    id: &str,
    request: Request<Incoming>,
) -> Result<Response<Body>, ApiError> {
    let result = register_held(api, door, id, request, Hold::new(api)).await;
    let outcome = match &result {
        Ok(_) => "ok",
        Err(error) => error.code(),
    };
    api.metrics.registrations.inc([outcome]);
    result
}

async fn register_held(
    api: &Arc<Api>,
    door: Door,
    id: &str,
    request: Request<Incoming>,
    mut hold: Hold,
) -> Result<Response<Body>, ApiError> {
    let executor = ExecutorId::new(id).map_err(|error| ApiError::new(400, "bad_request", error.to_string()))?;
    let (head, body) = request.into_parts();
    check_certificate(api, &head.extensions)?;
    let body = body::read(body, BODY_BYTES_MAX, Duration::from_secs(api.config.now().edge.header_timeout_secs)).await?;
    let wanted = match door {
        // What agentx sends is not needed, and older versions send nothing.
        Door::Agentx => Wanted { transport: Transport::Agentx, public_key: Vec::new() },
        Door::Codex => Wanted::parse(&body)?,
        Door::Direct => Wanted::parse_direct(&body)?,
    };
    let shown = SignedRequest { method: &head.method, uri: &head.uri, headers: &head.headers, body: &body };
    let registered = loop {
        let attempt = store_registration(api, &executor, &wanted, shown);
        if let Some(registered) = hold.attempt(attempt).await? {
            break registered;
        }
    };
    tracing::info!(%executor, registration = %registered.id, transport = ?registered.transport, "executor registered");
    Ok(json(&answer(api, door, &registered, &head)))
}

/// One try to register: nothing is answered before it is stored, so that a restarted gateway serves the same URL.
async fn store_registration(
    api: &Api,
    executor: &ExecutorId,
    wanted: &Wanted,
    shown: SignedRequest<'_>,
) -> Result<Registration, Attempt> {
    let credential = verify(api, executor, wanted.transport, shown).await?;
    let store = &api.corridor.store;
    let encrypted = wanted.transport == Transport::Noise;
    // The same key is the same process, which registers again after a refused dial.
    let known = if encrypted { store.registration_by_key(executor, &wanted.public_key).await? } else { None };
    let known = known.map(|registration| registration.id);
    let takeover_wait = Duration::from_secs(api.config.now().link.takeover_ping_secs);
    if !api.corridor.registry.yields_to(executor, known.as_ref(), takeover_wait).await {
        // Only an encrypted executor can be told to wait.
        return Err(match wanted.transport {
            // It alone can be told to wait.
            Transport::Noise => Attempt::Final(Held::Occupied.as_error()),
            Transport::Relay => Attempt::Again(Held::Occupied),
            Transport::Direct | Transport::Agentx => Attempt::Again(Held::Conflict),
        });
    }
    let registration = Registration {
        id: known.unwrap_or_else(new_registration_id),
        executor: executor.clone(),
        transport: wanted.transport,
        public_key: wanted.public_key.clone(),
        credential: credential.digest(),
        created_at: SystemTime::now(),
    };
    let what = serde_json::json!({ "registration": registration.id, "transport": wanted.transport.name() });
    let act =
        Act::new("executor.register").by_the("executor").on(executor).asked_as(asked_as(shown.headers)).about(what);
    // Never refused: it would end the executor for good.
    let entry = api.audit.begin(act.always()).await.map_err(|error| Attempt::Final(error.into()))?;
    let saved = store.save_registration(registration.clone(), api.config.now().link.registrations_max).await;
    entry.end(Outcome::new(if saved.is_ok() { "ok" } else { "store_unavailable" }));
    saved?;
    Ok(registration)
}

/// What a register asks for.
struct Wanted {
    transport: Transport,
    public_key: Vec<u8>,
}

impl Wanted {
    fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let bad = |message: String| ApiError::new(400, "bad_request", message);
        // Executors before the encrypted transport send no body or one that nobody needs.
        let request: RegisterRequest = if body.is_empty() { RegisterRequest::default() } else { rest::parse(body)? };
        match request.security_profile.as_deref() {
            None => Ok(Self { transport: Transport::Relay, public_key: Vec::new() }),
            Some(SECURITY_PROFILE) => {
                let key = request.executor_public_key.ok_or_else(|| bad("executor_public_key: missing".into()))?;
                let key = key.decode().map_err(|error| bad(error.to_string()))?;
                let mut public_key = key.x25519.to_vec();
                public_key.extend_from_slice(key.mlkem768.as_slice());
                Ok(Self { transport: Transport::Noise, public_key })
            }
            Some(_) => Err(bad(format!("security_profile: expected {SECURITY_PROFILE}"))),
        }
    }

    fn parse_direct(body: &[u8]) -> Result<Self, ApiError> {
        let bad = |message: String| ApiError::new(400, "bad_request", message);
        let request: RegisterRequest = rest::parse(body)?;
        if request.transport.as_deref() != Some(DIRECT_TRANSPORT) {
            return Err(bad(format!("transport: expected {DIRECT_TRANSPORT}")));
        }
        Ok(Self { transport: Transport::Direct, public_key: Vec::new() })
    }
}

fn new_registration_id() -> RegistrationId {
    RegistrationId::new(&format!("exr_{}", Uuid::new_v4())).expect("a UUID is a path id")
}

async fn verify(
    api: &Api,
    executor: &ExecutorId,
    transport: Transport,
    shown: SignedRequest<'_>,
) -> Result<ExecutorCredential, Attempt> {
    let executors = api.corridor.auth.executors();
    let verified = match transport {
        Transport::Direct => executors.verify_signed(executor, shown).await,
        Transport::Noise | Transport::Relay | Transport::Agentx => executors.verify(executor, shown.headers).await,
    };
    verified.map_err(|error| match error {
        ExecutorAuthError::NoSignatures => {
            Attempt::Final(ApiError::new(403, "direct_transport_refused", error.to_string()))
        }
        ExecutorAuthError::Unauthorized => Attempt::Final(unauthorized()),
        ExecutorAuthError::NotRegistered => Attempt::Final(ApiError::new(
            403,
            "executor_not_registered",
            "no executor of this id is registered for this credential",
        )),
        ExecutorAuthError::Unavailable(_) => Attempt::Again(Held::Auth(error)),
    })
}

fn answer(api: &Api, door: Door, registration: &Registration, request: &Parts) -> RegisterResponse {
    let executor = &registration.executor;
    let ticket = api.corridor.auth.tickets().mint(executor);
    let base = websocket_base(api, request);
    let (path, mark) = match door {
        Door::Codex => ("bridge", ""),
        Door::Agentx => ("agentx", ""),
        Door::Direct => ("bridge", DIRECT_MARK),
    };
    // Ids and tickets consist of characters that need no escaping in a query.
    let url = format!("{base}/{path}/{executor}?token={ticket}&reg={}{mark}", registration.id);
    let direct = registration.transport == Transport::Direct;
    let encrypted = registration.transport == Transport::Noise;
    RegisterResponse {
        id: Some(executor.to_string()),
        executor_id: Some(executor.to_string()),
        environment_id: Some(executor.to_string()),
        url,
        security_profile: encrypted.then(|| SECURITY_PROFILE.to_owned()),
        executor_registration_id: encrypted.then(|| registration.id.to_string()),
        transport: direct.then(|| DIRECT_TRANSPORT.to_owned()),
        registration_id: direct.then(|| registration.id.to_string()),
    }
}

/// Where certificates are asked of executors, this one has to have shown one in its TLS handshake.
fn check_certificate(api: &Api, connection: &Extensions) -> Result<(), ApiError> {
    if api.config.now().tls.executor_authorities.is_none() || connection.get::<ClientCertified>().is_some() {
        return Ok(());
    }
    Err(ApiError::new(403, "certificate_required", "executors have to show a client certificate here"))
}

/// Where the executor dials: the configured public URL, else the Host under which it has just reached us.
pub(super) fn websocket_base(api: &Api, request: &Parts) -> String {
    // `https` becomes `wss` by this too.
    http_base(api, request).replacen("http", "ws", 1)
}

/// `POST …/validate`: may this harness key talk to this executor? Never asks upstream: the bearer is compared with the
/// one that registered.
pub async fn validate(api: &Arc<Api>, id: &str, request: Request<Incoming>) -> Result<Response<Body>, ApiError> {
    let mut hold = Hold::new(api);
    let (head, body) = request.into_parts();
    let wait = Duration::from_secs(api.config.now().edge.header_timeout_secs);
    let body = body::read(body, BODY_BYTES_MAX, wait).await?;
    let request: ValidateRequest = rest::parse(&body)?;
    let shown = ExecutorCredential::shown(&head.headers).map_err(|_| unauthorized())?;
    let (Ok(executor), Ok(registration)) =
        (ExecutorId::new(id), RegistrationId::new(&request.executor_registration_id))
    else {
        return Ok(json(&ValidateResponse { valid: false }));
    };
    let valid = loop {
        let attempt = is_valid(api, &shown, &executor, &registration, &request);
        if let Some(valid) = hold.attempt(attempt).await? {
            break valid;
        }
    };
    Ok(json(&ValidateResponse { valid }))
}

/// 401 is about the executor's credential; a harness that may not is `false`.
async fn is_valid(
    api: &Api,
    shown: &ExecutorCredential,
    executor: &ExecutorId,
    registration: &RegistrationId,
    request: &ValidateRequest,
) -> Result<bool, Attempt> {
    let store = &api.corridor.store;
    let Some(stored) = store.registration(registration).await? else { return Ok(false) };
    if stored.executor != *executor {
        return Ok(false);
    }
    if !shown.is(&stored.credential) {
        return Err(Attempt::Final(unauthorized()));
    }
    let Ok(key) = request.harness_public_key.decode() else { return Ok(false) };
    let harness = api.corridor.auth.harness();
    let claimed = harness.verify(&request.harness_key_authorization, executor, registration, &key.digest());
    let Ok(workspace) = claimed else { return Ok(false) };
    Ok(store.binding(&workspace, executor).await?.is_some())
}

fn unauthorized() -> ApiError {
    ApiError::new(401, "unauthorized", "unauthorized")
}

/// `GET /bridge/{id}`: the socket of an executor, or of a harness. Executors show a registration and a ticket.
pub async fn open_link(api: &Arc<Api>, id: &str, request: Request<Incoming>) -> Result<Response<Body>, ApiError> {
    let query = request.uri().query().unwrap_or_default();
    let (ticket, registration) = (query_parameter(query, "token"), query_parameter(query, "reg"));
    // A ticket begins with the id of its executor, which no credential of a harness does.
    let of_executor = |ticket: &String| ticket.strip_prefix(id).is_some_and(|rest| rest.starts_with('.'));
    if registration.is_none() && !ticket.as_ref().is_some_and(of_executor) {
        return harness::open(api, id, request).await;
    }
    serve_link(api, id, ticket, registration, request).await
}

/// `GET /cloud/relay/{registration}`: the same with the executor that has registered so. Its harnesses show their
/// credential anywhere but in the query, where the executor has its ticket.
pub async fn open_registered_link(
    api: &Arc<Api>,
    registration: &str,
    request: Request<Incoming>,
) -> Result<Response<Body>, ApiError> {
    let stored = match RegistrationId::new(registration) {
        Ok(id) => find_registration(api, &mut Hold::new(api), &id).await?,
        Err(_) => None,
    };
    let executor = stored.map(|stored| stored.executor);
    let ticket = query_parameter(request.uri().query().unwrap_or_default(), "token");
    if ticket.is_none() && credential::of_socket(&request).is_ok() {
        // One that is not there answers harnesses as another workspace's does.
        return harness::open(api, executor.as_ref().map_or("", ExecutorId::as_str), request).await;
    }
    let executor = executor.ok_or_else(|| register_again(false, "unknown_route"))?;
    serve_link(api, executor.as_str(), ticket, Some(registration.to_owned()), request).await
}

async fn find_registration(api: &Api, hold: &mut Hold, id: &RegistrationId) -> Result<Option<Registration>, ApiError> {
    loop {
        let attempt = async { Ok(api.corridor.store.registration(id).await?) };
        if let Some(stored) = hold.attempt(attempt).await? {
            return Ok(stored);
        }
    }
}

async fn serve_link(
    api: &Arc<Api>,
    id: &str,
    ticket: Option<String>,
    registration: Option<String>,
    request: Request<Incoming>,
) -> Result<Response<Body>, ApiError> {
    // A registration without a ticket is still an executor, to whom 401 is never said.
    let ticket = ticket.unwrap_or_default();
    upgrade::check(request.headers())?;
    api.refuse_while_draining()?;
    let query = request.uri().query().unwrap_or_default();
    let direct = query_parameter(query, "t").is_some_and(|transport| transport == "direct");
    let again = |reason| register_again(direct, reason);
    let unknown = || again("unknown_route");
    let executor = ExecutorId::new(id).map_err(|_| unknown())?;
    api.corridor.auth.tickets().verify(&ticket, &executor).map_err(|error| {
        again(match error {
            TicketError::Expired => "expired",
            TicketError::BadSignature => "invalid_signature",
            TicketError::Malformed | TicketError::WrongExecutor => "unknown_route",
        })
    })?;
    check_certificate(api, request.extensions())?;
    let registration = registration.and_then(|id| RegistrationId::new(&id).ok()).ok_or_else(unknown)?;
    // The executor waits 10 s for the upgrade, as for a register.
    let mut hold = Hold::new(api);
    let stored = find_registration(api, &mut hold, &registration).await?;
    let registration = stored.filter(|stored| stored.executor == executor).ok_or_else(unknown)?;
    let transport = registration.transport;
    if direct != (transport == Transport::Direct) {
        return Err(unknown());
    }
    if direct {
        let (method, uri) = (request.method().clone(), request.uri().clone());
        let shown = SignedRequest { method: &method, uri: &uri, headers: request.headers(), body: b"" };
        while hold.attempt(may_dial(api, &executor, shown)).await?.is_none() {}
    }
    let registry = &api.corridor.registry;
    if registry.len() >= api.config.now().link.links_max && registry.current(&executor).is_none() {
        return Err(
            ApiError::new(503, "too_many_links", "the gateway serves as many executors as it may").retry_after(10)
        );
    }
    let takeover_wait = Duration::from_secs(api.config.now().link.takeover_ping_secs);
    while !registry.yields_to(&executor, Some(&registration.id), takeover_wait).await {
        if !transport.is_shared() {
            // 5xx: it dials the same URL again (codex-exec-server.md §2.5).
            return Err(Held::Occupied.as_error());
        }
        hold.attempt(async { Err::<(), _>(Attempt::Again(Held::Conflict)) }).await?;
    }
    let link = api.corridor.link.now();
    let message_bytes_max = if transport.is_shared() { link.json_frame_bytes_max } else { link.frame_bytes_max };
    let limits = SocketLimits { read_buffer_bytes: link.read_buffer_bytes, message_bytes_max };
    let what = serde_json::json!({ "registration": registration.id, "transport": transport.name() });
    let act = Act::new("executor.link").by_the("executor").on(&executor).asked_as(asked_as(request.headers()));
    let act = act.came_from(peer::client(request.headers(), request.extensions().get())).about(what).always();
    let (response, socket) = upgrade::accept(request, None, limits);
    // Boxed, so that it is gone once it is done: what a task captures lasts as long as the task, here as the link.
    let socket = Box::pin(socket);
    let (handle, outbox) = LinkHandle::new(registration, link, api.metrics.clone());
    let api = api.clone();
    api.clone().links.spawn(async move {
        let Some(mut socket) = socket.await else { return };
        let shared = if transport.is_shared() {
            let Some(shared) = Box::pin(greet(&api, &executor, &mut socket)).await else { return };
            Some(shared)
        } else {
            None
        };
        let Ok(entry) = Box::pin(api.audit.begin(act)).await else { return };
        let place = api.corridor.registry.attach(handle.clone());
        tracing::info!(%executor, "executor connected");
        api.metrics.links_opened.inc([transport.name()]);
        seen(&api, &executor).await;
        let end = match shared {
            None => link::run(socket, handle, outbox).await,
            // Boxed for the same reason: most links are not of this kind, and need no room for it.
            Some(shared) => {
                let (lasting, told) = watch::channel(Vec::new());
                tokio::spawn(keep_processes(api.clone(), executor.clone(), told));
                let (end, shared) = Box::pin(link::run_shared(socket, handle, outbox, shared, lasting)).await;
                // Before the place is given up: the executor's next socket waits for that, and takes it.
                api.corridor.registry.leave(&executor, shared);
                end
            }
        };
        // Before anything that waits: until then callers are given a link that has ended.
        drop(place);
        tracing::info!(%executor, ?end, "executor disconnected");
        entry.end(Outcome::new(end_reason(end)));
        api.metrics.links_ended.inc([end_reason(end)]);
        seen(&api, &executor).await;
    });
    Ok(response)
}

/// A direct executor signs its dial like its register.
async fn may_dial(api: &Api, executor: &ExecutorId, shown: SignedRequest<'_>) -> Result<(), Attempt> {
    match api.corridor.auth.executors().verify_signed(executor, shown).await {
        Ok(_) => Ok(()),
        Err(error @ ExecutorAuthError::Unavailable(_)) => Err(Attempt::Again(Held::Auth(error))),
        // Its register is refused, if that is so, and says why.
        Err(_) => Err(Attempt::Final(register_again(true, "invalid_signature"))),
    }
}

/// Initializes the session that all streams of a socket will share, following the executor's former socket.
async fn greet<S>(api: &Api, executor: &ExecutorId, socket: &mut WebSocketStream<S>) -> Option<Box<Shared>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let Corridor { registry, store, link, .. } = &*api.corridor;
    registry.vacate(executor, VACATE_WAIT).await;
    let former = match registry.take_left(executor) {
        Some(left) => Former::Socket(left),
        None => match store.shared_session(executor).await {
            Ok(Some((session, processes))) => Former::Stored(ExecutorSessionId::new(session.expose()), processes),
            Ok(None) => Former::None,
            Err(error) => {
                tracing::warn!(%executor, %error, "the executor's session is not known");
                Former::None
            }
        },
    };
    let before = former.session().cloned();
    let shared = match greeting::greet(socket, &link.now(), former).await {
        Ok(shared) => shared,
        Err((error, former)) => {
            tracing::warn!(%executor, %error, "executor not taken into use");
            if let Former::Socket(left) = former {
                registry.leave(executor, left);
            }
            return None;
        }
    };
    // Before anything is started in it: the next gateway process asks for it again.
    if let Some(session) = shared.session().filter(|session| before.as_ref() != Some(session))
        && let Err(error) = store.save_shared_session(executor, Secret::new(session.reveal().to_owned())).await
    {
        tracing::warn!(%executor, %error, "the executor's session was not stored");
    }
    Some(shared)
}

/// Stores which processes run on a shared socket until it ends, so that the next gateway process can end what nobody
/// takes up: what prints nothing would not be heard of.
async fn keep_processes(api: Arc<Api>, executor: ExecutorId, mut told: watch::Receiver<Vec<String>>) {
    while told.changed().await.is_ok() {
        let processes = told.borrow_and_update().clone();
        if let Err(error) = api.corridor.store.save_shared_processes(&executor, &processes).await {
            tracing::warn!(%executor, %error, "the processes of an executor were not stored");
        }
    }
}

/// Makes an executor register again, which its credential decides: on the direct transport 409 alone does, elsewhere any
/// 4xx; 401 is never used here.
fn register_again(direct: bool, reason: &'static str) -> ApiError {
    let (status, code) = if direct { (409, "conflict") } else { (404, "not_found") };
    ApiError::new(status, code, "register again").with_header(REJECTION_REASON, HeaderValue::from_static(reason))
}

/// How a link ended, and where we closed it, why.
fn end_reason(end: LinkEnd) -> &'static str {
    match end {
        LinkEnd::Peer => "peer",
        LinkEnd::Silent => "silent",
        LinkEnd::WriteTimeout => "write_timeout",
        LinkEnd::Failed => "failed",
        LinkEnd::Stalled => "stalled",
        LinkEnd::Closed(CloseReason::Draining) => "draining",
        LinkEnd::Closed(CloseReason::Replaced) => "replaced",
        LinkEnd::Closed(CloseReason::Deleted) => "deleted",
    }
}

/// Calls after a restart wait for executors seen lately; a failure to say so costs no more than that.
async fn seen(api: &Api, executor: &ExecutorId) {
    if let Err(error) = api.corridor.store.touch_executors(vec![(executor.clone(), SystemTime::now())]).await {
        tracing::warn!(%executor, %error, "the executor's last contact was not stored");
    }
}
