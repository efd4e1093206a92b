//! Many streams over the one JSON-RPC session of an executor that does not multiplex (direct, agentx).
//!
//! Each stream sees an executor of its own: the ids of its requests, its processes, handles, watches and its session
//! are renamed on their way and back. A plain value behind the link's lock: it reads no socket and no clock.
//!
//! ```text
//! stream ── message ─► queue of the stream ─► turn ─► in flight ─► socket
//!   ▲                                                                │
//!   └──────────── answer, notification under the caller's names ◄────┘
//! ```

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::ops::Range;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use hmac::{Hmac, Mac};
use serde::Deserialize;
use serde_json::value::RawValue;
use sha2::Sha256;
use tokio::time::Instant;

use crate::protocol::endpoint::{Endpoint, EndpointLimits};
use crate::protocol::frame::{Body, Data, Frame, StreamId};
use crate::protocol::ids::WorkspaceId;
use crate::protocol::rpc::{
    ALREADY_ATTACHED, ExecutorSessionId, FsClose, INITIALIZED, INTERNAL_ERROR, INVALID_PARAMS, INVALID_REQUEST,
    Incoming, Initialize, METHOD_NOT_FOUND, Method, NOT_FOUND, ProcessTerminate, RequestId, RpcError, RpcParseError,
    check, encode_error, encode_response,
};

/// How long executors keep the processes of a session that is attached to nothing (codex-exec-server.md §7.1).
pub const RETENTION: Duration = Duration::from_secs(80);

/// How long the oldest request may be an unanswered write to a process while others wait behind it: then the process
/// does not read its stdin, and at an executor's default concurrency everything else hangs (§7.3).
const STALL: Duration = Duration::from_secs(5);

/// Longest wait of a `process/read`, in milliseconds: it holds up everybody else on the socket (§7.3).
const READ_WAIT_MS_MAX: u64 = 25;

/// Messages of one stream waiting for their turn, as in executors (§3.2).
const QUEUED_MAX: usize = 128;

/// File handles of one stream: executors hold 128 for all of them.
const HANDLES_MAX: usize = 32;

/// Processes of one session that have not ended, and watches of one stream.
const PROCESSES_MAX: usize = 1024;
const WATCHES_MAX: usize = 1024;

/// Frames waiting for streams before the streams are heard no more: a message of the largest size, and some answers.
const DELIVERIES_MAX: usize = 512;

/// Hexadecimal digits of a [`Tag`], and the colon behind them.
const TAG_DIGITS: usize = 16;
const TAG_BYTES: usize = TAG_DIGITS + 1;

/// How the notification begins that an executor sends most.
const OUTPUT_HEAD: &[u8] = br#"{"method":"process/output","params":{"processId":""#;

/// How an answer begins that is handed on without being read.
const ANSWER_HEAD: &[u8] = br#"{"id":"#;
const RESULT_HEAD: &[u8] = br#","result":"#;

/// Bounds of one shared socket.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Requests under way on the socket.
    pub in_flight_max: usize,
    /// Sessions of callers, detached ones included.
    pub sessions_max: usize,
    /// Bytes of one message, and of all messages that wait for their turn beside the first of each stream.
    pub message_bytes_max: usize,
    /// Bytes of one frame towards a stream.
    pub frame_bytes_max: usize,
}

/// What stands before the names of one session, or of one stream. Random, so that nobody can name what is another's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Tag(u64);

impl Tag {
    fn random() -> Self {
        let (high, low) = uuid::Uuid::new_v4().as_u64_pair();
        Self(high ^ low.rotate_left(32))
    }

    fn text(self) -> String {
        format!("{:016x}:", self.0)
    }

    fn parse(text: &[u8]) -> Option<Self> {
        let (digits, colon) = text.get(..TAG_BYTES)?.split_at(TAG_DIGITS);
        let lower = |byte: &u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        if colon != b":" || !digits.iter().all(lower) {
            return None;
        }
        u64::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok().map(Self)
    }
}

/// The executor's one session with all its callers.
pub struct Shared {
    limits: Limits,
    /// The executor's own session, and the key under which those of callers are signed. Older executors have none, and
    /// then nothing outlives the socket.
    session: Option<ExecutorSessionId>,
    /// `environmentInfo` as the executor wrote it.
    environment: Option<Box<RawValue>>,
    /// Until then, sessions that an earlier gateway process gave out are believed when they show themselves.
    adopts_until: Option<Instant>,
    streams: HashMap<StreamId, Caller>,
    sessions: HashMap<Tag, Session>,
    /// By our own ids, which rise in the order of sending.
    in_flight: BTreeMap<i64, InFlight>,
    next_id: i64,
    answered: Option<Instant>,
    disconnected: Option<Instant>,
    turns: Turns,
    waiting_bytes: usize,
    /// Requests of our own: what has lost its owner is ended.
    chores: VecDeque<Request>,
    /// Answers to what the executor asked.
    replies: VecDeque<Bytes>,
    deliveries: VecDeque<Frame>,
    /// What the executor asked, and whom.
    asked: HashMap<RequestId, StreamId>,
    watches: HashMap<u64, (StreamId, Box<RawValue>)>,
    next_watch: u64,
    next_handle: u64,
    started: bool,
}

/// One stream.
struct Caller {
    workspace: WorkspaceId,
    tag: Tag,
    phase: Phase,
    receiving: Endpoint,
    sending: Endpoint,
    queue: VecDeque<Request>,
    /// Open files by the caller's names, with what the executor calls them.
    handles: HashMap<String, Handle>,
    watches: usize,
}

/// A file's name at the executor, which takes 32 bytes at most: too few to put something before the caller's.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Handle(Tag, u64);

impl Handle {
    fn text(self) -> String {
        format!("{:016x}{:016x}", self.0.0, self.1)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    New,
    Initialized(Tag),
    Ready(Tag),
}

/// One caller's session at this executor; it outlives its stream.
struct Session {
    stream: Option<StreamId>,
    /// When it ends unless it is taken up again.
    expires: Instant,
    /// Processes that have not ended, by the caller's names, and whether they may have begun.
    processes: HashMap<String, bool>,
    /// Those that do not read their stdin: written to once more, they would stop everybody again.
    stalled: HashSet<String>,
}

/// A request that has all but its id.
struct Request {
    id: RequestId,
    kind: Kind,
    /// `{"method":…,"params":…`
    json: Vec<u8>,
}

/// What is to be known about a request when its answer comes.
enum Kind {
    Start {
        session: Tag,
        name: String,
    },
    Write {
        session: Tag,
        name: String,
    },
    Open {
        name: String,
        handle: Handle,
    },
    Close {
        name: String,
    },
    Watch {
        id: u64,
    },
    Other,
    /// Our own: the end of a process that nobody owns any more.
    End {
        session: Tag,
        name: String,
    },
    /// Our own, of no interest once its socket is gone.
    Chore,
}

struct InFlight {
    /// The stream, and its tag: the id may have been taken into use again.
    owner: Option<(StreamId, Tag)>,
    id: RequestId,
    kind: Kind,
    since: Instant,
}

/// Whose turn it is: workspaces one after the other, and in each of them its streams.
#[derive(Default)]
struct Turns(VecDeque<(WorkspaceId, VecDeque<StreamId>)>);

impl Turns {
    fn join(&mut self, workspace: &WorkspaceId, stream: StreamId) {
        match self.0.iter_mut().find(|(of, _)| of == workspace) {
            Some((_, streams)) => streams.push_back(stream),
            None => self.0.push_back((workspace.clone(), VecDeque::from([stream]))),
        }
    }

    fn next(&mut self) -> Option<StreamId> {
        let (workspace, mut streams) = self.0.pop_front()?;
        let stream = streams.pop_front();
        if !streams.is_empty() {
            self.0.push_back((workspace, streams));
        }
        stream
    }

    fn leave(&mut self, stream: &StreamId) {
        for (_, streams) in &mut self.0 {
            streams.retain(|other| other != stream);
        }
        self.0.retain(|(_, streams)| !streams.is_empty());
    }
}

/// A refusal in the executor's stead.
struct Refusal(i64, Cow<'static, str>);

/// The names in parameters. A name that stands there twice is refused, as executors do.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Names<'a> {
    #[serde(borrow, default)]
    process_id: Option<&'a RawValue>,
    #[serde(borrow, default)]
    handle_id: Option<&'a RawValue>,
    #[serde(borrow, default)]
    watch_id: Option<&'a RawValue>,
    #[serde(borrow, default)]
    request_id: Option<&'a RawValue>,
    #[serde(borrow, default)]
    wait_ms: Option<&'a RawValue>,
}

impl<'a> Names<'a> {
    /// Executors also read parameters that stand in a list, by their order; such ones are refused, since a name in them
    /// would not be found.
    fn of(params: &'a RawValue) -> Result<Self, String> {
        if !params.get().starts_with('{') {
            return Err("params must be an object".to_owned());
        }
        serde_json::from_str(params.get()).map_err(|error| error.to_string())
    }
}

impl Shared {
    /// A socket whose session has just been initialized. `environment` is the executor's `environmentInfo`. With
    /// `adopts_until`, sessions are believed until then that an earlier gateway process gave out.
    pub fn new(
        limits: Limits,
        session: Option<ExecutorSessionId>,
        environment: Option<Box<RawValue>>,
        adopts_until: Option<Instant>,
    ) -> Self {
        Self {
            limits,
            session,
            environment,
            adopts_until,
            streams: HashMap::new(),
            sessions: HashMap::new(),
            in_flight: BTreeMap::new(),
            next_id: 1,
            answered: None,
            disconnected: None,
            turns: Turns::default(),
            waiting_bytes: 0,
            chores: VecDeque::new(),
            replies: VecDeque::new(),
            deliveries: VecDeque::new(),
            asked: HashMap::new(),
            watches: HashMap::new(),
            next_watch: 0,
            next_handle: 0,
            started: false,
        }
    }

    /// Takes over processes of an earlier gateway process, by their names at the executor: they are ended as others are
    /// when nobody takes up their sessions in time.
    pub fn adopt(&mut self, processes: &[String]) {
        let Some(until) = self.adopts_until else { return };
        for process in processes {
            let Some(tag) = Tag::parse(process.as_bytes()) else { continue };
            if self.sessions.contains_key(&tag) || self.sessions.len() < self.limits.sessions_max {
                self.sessions.entry(tag).or_insert_with(|| Session::new(until)).learn(&process[TAG_BYTES..]);
            }
        }
    }

    /// The processes that have not ended, by their names at the executor; so many at most.
    pub fn processes(&self, max: usize) -> Vec<String> {
        let names = self
            .sessions
            .iter()
            .flat_map(|(tag, session)| session.processes.keys().map(|name| format!("{}{name}", tag.text())));
        names.take(max).collect()
    }

    /// Whether processes were begun since this was asked last.
    pub fn take_started(&mut self) -> bool {
        std::mem::take(&mut self.started)
    }

    /// The executor's own session, to be resumed on its next socket.
    pub fn session(&self) -> Option<&ExecutorSessionId> {
        self.session.as_ref()
    }

    /// The socket is gone: every stream ends, and the sessions wait for the next socket.
    pub fn disconnect(&mut self, now: Instant) {
        let streams: Vec<StreamId> = self.streams.keys().cloned().collect();
        for stream in streams {
            self.end_stream(&stream, now);
        }
        self.chores.retain(|chore| matches!(chore.kind, Kind::End { .. }));
        for request in std::mem::take(&mut self.in_flight).into_values() {
            match request.kind {
                Kind::End { session, name } => self.terminate(session, &name),
                // It may have begun, for all we know.
                Kind::Start { session, name } => {
                    if let Some(session) = self.sessions.get_mut(&session) {
                        session.processes.insert(name, true);
                    }
                }
                _ => {}
            }
        }
        self.turns = Turns::default();
        self.waiting_bytes = 0;
        self.disconnected = Some(now);
        self.replies.clear();
        self.deliveries.clear();
        self.asked.clear();
        self.watches.clear();
    }

    /// Until when the executor can take it up on another socket, once it is disconnected.
    pub fn kept_until(&self) -> Option<Instant> {
        self.session.as_ref().and(self.disconnected).map(|at| at + RETENTION)
    }

    /// Whether the stream has been heard of.
    pub fn knows(&self, stream: &StreamId) -> bool {
        self.streams.contains_key(stream)
    }

    /// Adds a stream of that workspace.
    pub fn open_stream(&mut self, stream: StreamId, workspace: WorkspaceId) {
        let limits = EndpointLimits { message_bytes_max: self.limits.message_bytes_max, ..EndpointLimits::default() };
        let caller = Caller {
            workspace,
            tag: Tag::random(),
            phase: Phase::New,
            receiving: Endpoint::new(limits),
            sending: Endpoint::new(EndpointLimits::default()),
            queue: VecDeque::new(),
            handles: HashMap::new(),
            watches: 0,
        };
        self.streams.insert(stream.detached(), caller);
    }

    /// Takes what a stream sends. Of an unknown one it is dropped.
    pub fn from_stream(&mut self, frame: Frame, now: Instant) {
        let Frame { stream_id: stream, body } = frame;
        match body {
            Body::Reset { .. } => self.end_stream(&stream, now),
            Body::Data(data) => {
                let Some(caller) = self.streams.get_mut(&stream) else { return };
                if caller.receiving.receive(data).is_err() {
                    self.reset(&stream, "frames do not follow each other", now);
                    return;
                }
                while let Some(message) = self.streams.get_mut(&stream).and_then(|caller| caller.receiving.next()) {
                    self.message(&stream, &message, now);
                }
            }
            Body::Ack | Body::Resume { .. } | Body::Heartbeat | Body::Handshake { .. } => {}
        }
    }

    /// The next message for the socket, as JSON.
    pub fn next_for_socket(&mut self, now: Instant) -> Option<Bytes> {
        if let Some(reply) = self.replies.pop_front() {
            return Some(reply);
        }
        if self.in_flight.len() >= self.limits.in_flight_max {
            return None;
        }
        let (owner, request) = match self.chores.pop_front() {
            Some(chore) => (None, chore),
            None => {
                let stream = self.turns.next()?;
                let caller = self.streams.get_mut(&stream)?;
                let request = caller.queue.pop_front()?;
                self.waiting_bytes -= request.json.len();
                if !caller.queue.is_empty() {
                    self.turns.join(&caller.workspace, stream.clone());
                }
                (Some((stream, caller.tag)), request)
            }
        };
        let Request { id, kind, mut json } = request;
        let number = self.next_id;
        self.next_id += 1;
        json.extend_from_slice(b",\"id\":");
        json.extend_from_slice(number.to_string().as_bytes());
        json.push(b'}');
        self.in_flight.insert(number, InFlight { owner, id, kind, since: now });
        Some(json.into())
    }

    /// Whether [`Self::next_for_socket`] has one.
    pub fn has_messages(&self) -> bool {
        let waiting = !self.chores.is_empty() || !self.turns.0.is_empty();
        !self.replies.is_empty() || (waiting && self.in_flight.len() < self.limits.in_flight_max)
    }

    /// The next frame for a stream.
    pub fn next_for_streams(&mut self) -> Option<Frame> {
        self.deliveries.pop_front()
    }

    /// Whether so much waits for streams that no more should be taken from them.
    pub fn is_crowded(&self) -> bool {
        self.deliveries.len() >= DELIVERIES_MAX
    }

    /// Whether a frame for a stream is waiting.
    pub fn has_deliveries(&self) -> bool {
        !self.deliveries.is_empty()
    }

    /// When [`Self::expire`] and [`Self::is_stalled`] have something to say, if nothing else happens.
    pub fn deadline(&self) -> Option<Instant> {
        let detached = self.sessions.values().filter(|session| session.stream.is_none());
        let expiry = detached.map(|session| session.expires).min();
        expiry.into_iter().chain(self.stalls_at()).min()
    }

    /// Ends the sessions that nobody has taken up again in time, with their processes.
    pub fn expire(&mut self, now: Instant) {
        let over = |session: &Session| session.stream.is_none() && session.expires <= now;
        let expired: Vec<Tag> =
            self.sessions.iter().filter(|(_, session)| over(session)).map(|(tag, _)| *tag).collect();
        for tag in expired {
            let Some(session) = self.sessions.remove(&tag) else { continue };
            for name in session.processes.into_keys() {
                self.terminate(tag, &name);
            }
        }
    }

    /// The executor was not listened to until now: what it has not answered by now counts from now on.
    pub fn was_not_heard(&mut self, now: Instant) {
        self.answered = Some(now);
    }

    /// Whether a process that does not read its stdin holds up everybody: only a new socket helps. It is remembered,
    /// so that the same process does so once only.
    pub fn is_stalled(&mut self, now: Instant) -> bool {
        if self.stalls_at().is_none_or(|at| at > now) {
            return false;
        }
        if let Some(InFlight { kind: Kind::Write { session, name }, .. }) = self.in_flight.values().next()
            && let Some(session) = self.sessions.get_mut(session)
        {
            session.stalled.insert(name.clone());
        }
        true
    }

    fn stalls_at(&self) -> Option<Instant> {
        let oldest = self.in_flight.values().next()?;
        let others_wait = self.in_flight.len() > 1 || !self.turns.0.is_empty();
        let Kind::Write { .. } = oldest.kind else { return None };
        let since = self.answered.map_or(oldest.since, |answered| answered.max(oldest.since));
        others_wait.then_some(since + STALL)
    }

    fn message(&mut self, stream: &StreamId, json: &[u8], now: Instant) {
        // To the bottom: what the executor cannot read it answers without an id, and that request would be under way
        // for ever.
        match check(json).and_then(|()| Incoming::parse(json)) {
            // As executors answer what they cannot read (§5).
            Err(error) => {
                self.refuse(stream, &RequestId::Number(-1), Refusal(INVALID_REQUEST, error.to_string().into()), now)
            }
            Ok(Incoming::Request { id, method, params }) => {
                if let Err(refusal) = self.request(stream, &id, &method, params, now) {
                    self.refuse(stream, &id, refusal, now);
                }
            }
            Ok(Incoming::Notification { method, .. }) => {
                let caller = self.streams.get_mut(stream);
                match caller.map(|caller| (caller.phase, caller)) {
                    Some((Phase::Initialized(tag), caller)) if method == INITIALIZED => {
                        caller.phase = Phase::Ready(tag)
                    }
                    // Executors end the connection over it (§5).
                    _ => self.reset(stream, "unexpected notification", now),
                }
            }
            Ok(Incoming::Response { id, .. } | Incoming::Error { id, .. }) => {
                if self.asked.get(&id) == Some(stream) {
                    self.asked.remove(&id);
                    self.replies.push_back(Bytes::copy_from_slice(json));
                } else {
                    self.reset(stream, "an answer to nothing", now);
                }
            }
        }
    }

    fn request(
        &mut self,
        stream: &StreamId,
        id: &RequestId,
        method: &str,
        params: Option<&RawValue>,
        now: Instant,
    ) -> Result<(), Refusal> {
        let Some(caller) = self.streams.get(stream) else { return Ok(()) };
        // The texts are the executor's own.
        let session = match (caller.phase, method) {
            (Phase::New, Initialize::NAME) => return self.initialize(stream, id, params, now),
            (_, Initialize::NAME) => {
                return Err(Refusal(INVALID_REQUEST, "initialize may only be sent once per connection".into()));
            }
            (Phase::New, _) => {
                return Err(Refusal(INVALID_REQUEST, "client must call initialize before using exec methods".into()));
            }
            (Phase::Initialized(_), _) => {
                return Err(Refusal(INVALID_REQUEST, "client must send initialized before using exec methods".into()));
            }
            (Phase::Ready(session), _) => session,
        };
        let Some((kind, edits)) = self.rename(stream, session, id, method, params, now)? else { return Ok(()) };
        let request = Request { id: id.clone(), kind, json: request_head(method, params, &edits) };
        let Some(caller) = self.streams.get_mut(stream) else { return Ok(()) };
        let crowded =
            !caller.queue.is_empty() && self.waiting_bytes + request.json.len() > self.limits.message_bytes_max;
        if crowded || caller.queue.len() >= QUEUED_MAX {
            self.reset(stream, "too many requests wait", now);
            return Ok(());
        }
        if caller.queue.is_empty() {
            self.turns.join(&caller.workspace, stream.clone());
        }
        self.waiting_bytes += request.json.len();
        caller.queue.push_back(request);
        Ok(())
    }

    /// What a request is about, and how its parameters change; `None` when it was answered here.
    fn rename(
        &mut self,
        stream: &StreamId,
        session: Tag,
        id: &RequestId,
        method: &str,
        params: Option<&RawValue>,
        now: Instant,
    ) -> Result<Option<(Kind, Edits)>, Refusal> {
        let family = method.split_once('/').map_or("", |(family, _)| family);
        let (Some(params), "process" | "fs" | "http") = (params, family) else {
            return Ok(Some((Kind::Other, Vec::new())));
        };
        let names = Names::of(params).map_err(|error| Refusal(INVALID_PARAMS, error.into()))?;
        let mut kind = Kind::Other;
        let mut edits = Vec::new();
        if family == "process"
            && let Some(name) = names.process_id.filter(|name| is_text(name))
        {
            edits.push(prefix(params, name, session));
            if let Some(wait) =
                names.wait_ms.filter(|wait| wait.get().parse().is_ok_and(|ms: u64| ms > READ_WAIT_MS_MAX))
            {
                edits.push((place(params, wait), READ_WAIT_MS_MAX.to_string()));
            }
            let name = text(name);
            let mut known = self.sessions.get_mut(&session);
            if self.adopts_until.is_some() && method != "process/start" {
                known.iter_mut().for_each(|known| known.learn(&name));
            }
            match (method, known) {
                ("process/start", Some(known)) => {
                    if known.processes.len() >= PROCESSES_MAX {
                        return Err(Refusal(INVALID_REQUEST, "too many processes".into()));
                    }
                    known.processes.entry(name.clone()).or_insert(false);
                    self.started = true;
                    kind = Kind::Start { session, name };
                }
                ("process/write", Some(known)) if known.stalled.contains(&name) => {
                    // To be tried again; but never again by us.
                    let answer = encode_response(id, &serde_json::json!({ "status": "starting" }));
                    self.deliver(stream, answer.into(), now);
                    return Ok(None);
                }
                ("process/write", Some(_)) => kind = Kind::Write { session, name },
                _ => {}
            }
        }
        let Some(caller) = self.streams.get_mut(stream) else { return Ok(None) };
        if family == "fs"
            && let Some(handle) = names.handle_id.filter(|handle| is_text(handle))
        {
            let (place, name) = (place(params, handle), text(handle));
            let handle = match (caller.handles.get(&name), method) {
                (Some(_), "fs/open") => {
                    return Err(Refusal(INVALID_REQUEST, format!("file handle `{name}` already exists").into()));
                }
                (Some(handle), _) => *handle,
                (None, "fs/open") if caller.handles.len() >= HANDLES_MAX => {
                    let text = format!("at most {HANDLES_MAX} file handles may be open per connection");
                    return Err(Refusal(INVALID_REQUEST, text.into()));
                }
                (None, "fs/open") => {
                    self.next_handle += 1;
                    let handle = Handle(caller.tag, self.next_handle);
                    caller.handles.insert(name.clone(), handle);
                    handle
                }
                (None, "fs/close") => {
                    let answer = encode_response(id, &serde_json::json!({}));
                    self.deliver(stream, answer.into(), now);
                    return Ok(None);
                }
                (None, _) => return Err(Refusal(NOT_FOUND, format!("unknown file handle `{name}`").into())),
            };
            edits.push((place, format!("\"{}\"", handle.text())));
            match method {
                "fs/open" => kind = Kind::Open { name, handle },
                "fs/close" => kind = Kind::Close { name },
                _ => {}
            }
        }
        if method == "fs/watchMissing"
            && let Some(watch) = names.watch_id
        {
            if caller.watches >= WATCHES_MAX {
                return Err(Refusal(INVALID_REQUEST, "too many watches".into()));
            }
            caller.watches += 1;
            self.next_watch += 1;
            self.watches.insert(self.next_watch, (stream.clone(), watch.to_owned()));
            edits.push((place(params, watch), self.next_watch.to_string()));
            kind = Kind::Watch { id: self.next_watch };
        }
        if family == "http"
            && let Some(request) = names.request_id.filter(|request| is_text(request))
        {
            edits.push(prefix(params, request, caller.tag));
        }
        Ok(Some((kind, edits)))
    }

    fn initialize(
        &mut self,
        stream: &StreamId,
        id: &RequestId,
        params: Option<&RawValue>,
        now: Instant,
    ) -> Result<(), Refusal> {
        let bad = |error: serde_json::Error| Refusal(INVALID_PARAMS, error.to_string().into());
        let wanted: Initialize = serde_json::from_str(params.map_or("null", RawValue::get)).map_err(bad)?;
        let Some(caller) = self.streams.get(stream) else { return Ok(()) };
        let workspace = caller.workspace.clone();
        let tag = match wanted.resume_session_id {
            Some(known) => self.resume(&workspace, known.reveal(), now)?,
            None => self.begin()?,
        };
        let expires = now + RETENTION;
        let session = self.sessions.entry(tag).or_insert_with(|| Session::new(expires));
        session.stream = Some(stream.clone());
        if let Some(caller) = self.streams.get_mut(stream) {
            caller.phase = Phase::Initialized(tag);
        }
        #[derive(serde::Serialize)]
        #[serde(rename_all = "camelCase")]
        struct Initialized<'a> {
            #[serde(skip_serializing_if = "Option::is_none")]
            session_id: Option<String>,
            #[serde(skip_serializing_if = "Option::is_none")]
            environment_info: Option<&'a RawValue>,
        }
        let result =
            Initialized { session_id: self.sign(&workspace, tag), environment_info: self.environment.as_deref() };
        let answer = encode_response(id, &result);
        self.deliver(stream, answer.into(), now);
        Ok(())
    }

    /// Makes room for one more session; the oldest go that nobody holds and nothing runs in.
    fn begin(&mut self) -> Result<Tag, Refusal> {
        if self.sessions.len() >= self.limits.sessions_max {
            let idle =
                self.sessions.iter().filter(|(_, session)| session.stream.is_none() && session.processes.is_empty());
            let oldest = idle.min_by_key(|(_, session)| session.expires).map(|(tag, _)| *tag);
            let oldest = oldest.ok_or(Refusal(INVALID_REQUEST, "too many sessions on this executor".into()))?;
            self.sessions.remove(&oldest);
        }
        Ok(Tag::random())
    }

    fn resume(&mut self, workspace: &WorkspaceId, id: &str, now: Instant) -> Result<Tag, Refusal> {
        // Not quoted: it is a secret, and this text may be logged.
        let unknown = || Refusal(INVALID_REQUEST, "unknown session id".into());
        let tag = self.verify(workspace, id).ok_or_else(unknown)?;
        match self.sessions.get(&tag) {
            Some(session) if session.stream.is_some() => {
                Err(Refusal(ALREADY_ATTACHED, "the session is attached to another connection".into()))
            }
            Some(session) if session.expires > now => Ok(tag),
            None if self.adopts(now) && self.sessions.len() < self.limits.sessions_max => Ok(tag),
            _ => Err(unknown()),
        }
    }

    fn adopts(&self, now: Instant) -> bool {
        self.adopts_until.is_some_and(|until| now < until)
    }

    /// The id of a caller's session: only its workspace can resume it, and only while the executor has its own.
    fn sign(&self, workspace: &WorkspaceId, tag: Tag) -> Option<String> {
        let mac = self.mac(workspace, tag)?.finalize().into_bytes();
        Some(format!("{}{}", tag.text(), URL_SAFE_NO_PAD.encode(&mac[..16])))
    }

    fn verify(&self, workspace: &WorkspaceId, id: &str) -> Option<Tag> {
        let tag = Tag::parse(id.as_bytes())?;
        let signature = URL_SAFE_NO_PAD.decode(&id[TAG_BYTES..]).ok().filter(|signature| signature.len() == 16)?;
        self.mac(workspace, tag)?.verify_truncated_left(&signature).ok()?;
        Some(tag)
    }

    fn mac(&self, workspace: &WorkspaceId, tag: Tag) -> Option<Hmac<Sha256>> {
        let key = self.session.as_ref()?.reveal();
        let mut mac = Hmac::<Sha256>::new_from_slice(key.as_bytes()).expect("HMAC takes keys of any length");
        mac.update(tag.text().as_bytes());
        mac.update(workspace.as_str().as_bytes());
        Some(mac)
    }

    /// Takes a message of the executor.
    ///
    /// # Errors
    /// [`RpcParseError`]: it is no message. The socket lives on.
    pub fn from_socket(&mut self, json: &Bytes, now: Instant) -> Result<(), RpcParseError> {
        // Most of what comes, and the largest: neither is read beyond the name or the number at its beginning.
        if let Some(tag) = json.strip_prefix(OUTPUT_HEAD).and_then(Tag::parse)
            && let Some(stream) = self.sessions.get(&tag).and_then(|session| session.stream.clone())
        {
            let cut = OUTPUT_HEAD.len()..OUTPUT_HEAD.len() + TAG_BYTES;
            self.deliver(&stream, edited(json, &[(cut, String::new())]).into(), now);
            return Ok(());
        }
        if let Some((number, result)) = split_answer(json)
            && let Some(InFlight { kind: Kind::Other | Kind::Write { .. }, .. }) = self.in_flight.get(&number)
        {
            let Some(request) = self.answered(number, now) else { return Ok(()) };
            if let Some(stream) = self.owner(&request) {
                let id = serde_json::to_vec(&request.id).expect("numbers and texts become JSON");
                let answer = [ANSWER_HEAD, &id, &json[result..]].concat();
                self.deliver(&stream, answer.into(), now);
            }
            return Ok(());
        }
        match Incoming::parse(json)? {
            Incoming::Response { id, result } => self.response(&id, Ok(result), now),
            Incoming::Error { id, error } => self.response(&id, Err(error), now),
            Incoming::Notification { method, params } => self.notification(&method, params, json, now),
            Incoming::Request { id, method, params } => self.executor_asks(id, &method, params, json, now),
        }
        Ok(())
    }

    fn answered(&mut self, number: i64, now: Instant) -> Option<InFlight> {
        let request = self.in_flight.remove(&number)?;
        self.answered = Some(now);
        Some(request)
    }

    /// The stream that sent the request, if it is still there.
    fn owner(&self, request: &InFlight) -> Option<StreamId> {
        let (stream, tag) = request.owner.as_ref()?;
        self.streams.get(stream).filter(|caller| caller.tag == *tag).map(|_| stream.clone())
    }

    fn response(&mut self, id: &RequestId, answer: Result<&RawValue, RpcError>, now: Instant) {
        // Malformed input is answered with the id -1, which is never ours.
        let RequestId::Number(number) = id else { return };
        let Some(request) = self.answered(*number, now) else { return };
        let stream = self.owner(&request);
        let caller = stream.as_ref().and_then(|stream| self.streams.get_mut(stream));
        match (&request.kind, &request.owner) {
            (Kind::Start { session, name }, _) => match self.sessions.get_mut(session) {
                // It may be over already; then it is not listed any more.
                Some(known) if answer.is_ok() => {
                    known.processes.get_mut(name).into_iter().for_each(|begun| *begun = true)
                }
                // Refused, though an earlier request of that name may have begun one.
                Some(known) if known.processes.get(name) == Some(&false) => drop(known.processes.remove(name)),
                None if answer.is_ok() => self.terminate(*session, name),
                _ => {}
            },
            (Kind::Open { handle, .. }, _) if answer.is_ok() && caller.is_none() => self.close(*handle),
            (Kind::Open { name, .. }, _) if answer.is_err() => drop(caller.map(|caller| caller.handles.remove(name))),
            (Kind::Close { name }, _) => drop(caller.map(|caller| caller.handles.remove(name))),
            (Kind::Watch { id }, _) if answer.is_err() => self.forget_watch(*id),
            _ => {}
        }
        let Some(stream) = stream else { return };
        let unnamed = |text: &str| self.unname(&stream, text);
        let message = match answer {
            Ok(result) if matches!(request.kind, Kind::Start { .. } | Kind::Open { .. }) => {
                // A small answer that repeats the name.
                let id = serde_json::to_vec(&request.id).expect("numbers and texts become JSON");
                [ANSWER_HEAD, &id, RESULT_HEAD, unnamed(result.get()).as_bytes(), b"}"].concat()
            }
            Ok(result) => encode_response(&request.id, &result),
            Err(error) => encode_error(&request.id, &RpcError { message: unnamed(&error.message), ..error }),
        };
        self.deliver(&stream, message.into(), now);
    }

    /// A text of the executor with the names that the stream gave.
    fn unname(&self, stream: &StreamId, text: &str) -> String {
        let Some(caller) = self.streams.get(stream) else { return text.to_owned() };
        let Phase::Ready(session) = caller.phase else { return text.to_owned() };
        let mut plain = text.replace(&session.text(), "").replace(&caller.tag.text(), "");
        let digits = format!("{:016x}", caller.tag.0);
        if plain.contains(&digits) {
            for (name, handle) in &caller.handles {
                plain = plain.replace(&handle.text(), name);
            }
        }
        plain
    }

    fn notification(&mut self, method: &str, params: Option<&RawValue>, json: &Bytes, now: Instant) {
        let Some((params, names)) = params.and_then(|params| Some((params, Names::of(params).ok()?))) else { return };
        let offset = place_in(json, params);
        let cut = |name: &RawValue| {
            let start = offset + place(params, name).start + 1;
            start..start + TAG_BYTES
        };
        if let Some(name) = names.process_id.filter(|name| is_text(name)) {
            let Some((tag, own)) = split_name(name) else { return };
            if let Some(stream) = self.process_said(method, tag, &own, now) {
                self.deliver(&stream, edited(json, &[(cut(name), String::new())]).into(), now);
            }
        } else if let Some(request) = names.request_id.filter(|request| is_text(request)) {
            let Some((tag, _)) = split_name(request) else { return };
            let stream = self.streams.iter().find(|(_, caller)| caller.tag == tag).map(|(stream, _)| stream.clone());
            if let Some(stream) = stream {
                self.deliver(&stream, edited(json, &[(cut(request), String::new())]).into(), now);
            }
        } else if let Some(watch) = names.watch_id {
            // It is told once only (§6).
            let number: Option<u64> = watch.get().parse().ok();
            let Some((number, (stream, own))) =
                number.and_then(|number| Some((number, self.watches.get(&number)?.clone())))
            else {
                return;
            };
            self.forget_watch(number);
            let place = place(params, watch);
            let edit = (offset + place.start..offset + place.end, own.get().to_owned());
            self.deliver(&stream, edited(json, &[edit]).into(), now);
        }
    }

    /// Keeps track of a process; gives the stream that wants to know.
    fn process_said(&mut self, method: &str, tag: Tag, name: &str, now: Instant) -> Option<StreamId> {
        if let Some(session) = self.sessions.get_mut(&tag) {
            if method == "process/closed" {
                session.processes.remove(name);
                session.stalled.remove(name);
            } else if matches!(method, "process/output" | "process/exited") {
                session.learn(name);
            }
            return session.stream.clone();
        }
        // Nobody's: its caller may come back to this gateway, which was started since; if not, it is ended.
        if method != "process/output" {
            return None;
        }
        match self.adopts_until.filter(|until| now < *until && self.sessions.len() < self.limits.sessions_max) {
            Some(until) => {
                let mut session = Session::new(until);
                session.learn(name);
                self.sessions.insert(tag, session);
            }
            None if self.chores.len() < PROCESSES_MAX => self.terminate(tag, name),
            None => {}
        }
        None
    }

    /// The executor asks about a process: its owner answers.
    fn executor_asks(&mut self, id: RequestId, method: &str, params: Option<&RawValue>, json: &Bytes, now: Instant) {
        let unasked = || RpcError { code: METHOD_NOT_FOUND, message: "nobody is there to answer".into() };
        let named = params.and_then(|params| {
            let name = Names::of(params).ok()?.process_id.filter(|name| is_text(name))?;
            let (tag, _) = split_name(name)?;
            let start = place_in(json, params) + place(params, name).start + 1;
            let stream = self.sessions.get(&tag)?.stream.clone()?;
            Some((stream, start..start + TAG_BYTES))
        });
        let Some((stream, cut)) = named.filter(|_| self.asked.len() < PROCESSES_MAX) else {
            tracing::debug!(%method, "nobody is there to answer an executor's question");
            self.replies.push_back(encode_error(&id, &unasked()).into());
            return;
        };
        self.asked.insert(id, stream.clone());
        self.deliver(&stream, edited(json, &[(cut, String::new())]).into(), now);
    }

    fn forget_watch(&mut self, id: u64) {
        if let Some((stream, _)) = self.watches.remove(&id)
            && let Some(caller) = self.streams.get_mut(&stream)
        {
            caller.watches -= 1;
        }
    }

    fn terminate(&mut self, session: Tag, name: &str) {
        let end = ProcessTerminate { process_id: format!("{}{name}", session.text()) };
        self.chore(&end, Kind::End { session, name: name.to_owned() });
    }

    fn close(&mut self, handle: Handle) {
        self.chore(&FsClose { handle_id: handle.text() }, Kind::Chore);
    }

    fn chore<M: Method>(&mut self, params: &M, kind: Kind) {
        let params = serde_json::value::to_raw_value(params).expect("parameters become JSON");
        let json = request_head(M::NAME, Some(&params), &Vec::new());
        self.chores.push_back(Request { id: RequestId::Number(-1), kind, json });
    }

    fn refuse(&mut self, stream: &StreamId, id: &RequestId, Refusal(code, message): Refusal, now: Instant) {
        let answer = encode_error(id, &RpcError { code, message: message.into_owned() });
        self.deliver(stream, answer.into(), now);
    }

    /// Queues a message for a stream, cut so that no frame is larger than others may be.
    fn deliver(&mut self, stream: &StreamId, json: Bytes, now: Instant) {
        let Some(caller) = self.streams.get_mut(stream) else { return };
        let piece = self.limits.frame_bytes_max;
        let count = json.len().div_ceil(piece);
        let Ok(segment_count) = u32::try_from(count) else { return };
        for segment_index in 0..segment_count {
            let start = segment_index as usize * piece;
            let Ok(seq) = caller.sending.next_seq() else {
                self.reset(stream, "the stream is used up", now);
                return;
            };
            let payload = json.slice(start..json.len().min(start + piece));
            let body = Body::Data(Data { seq, segment_index, segment_count, payload });
            self.deliveries.push_back(Frame { stream_id: stream.clone(), body });
        }
    }

    fn reset(&mut self, stream: &StreamId, reason: &str, now: Instant) {
        if self.streams.contains_key(stream) {
            let body = Body::Reset { reason: reason.into() };
            self.deliveries.push_back(Frame { stream_id: stream.clone(), body });
            self.end_stream(stream, now);
        }
    }

    /// Forgets a stream: what it has open is closed, and its session waits to be taken up again.
    fn end_stream(&mut self, stream: &StreamId, now: Instant) {
        let Some(caller) = self.streams.remove(stream) else { return };
        self.turns.leave(stream);
        for request in caller.queue {
            self.waiting_bytes -= request.json.len();
            match request.kind {
                Kind::Start { session, name } => {
                    let under_way = self.in_flight.values().any(|request| match &request.kind {
                        Kind::Start { session: of, name: started } => *of == session && *started == name,
                        _ => false,
                    });
                    if let Some(session) = self.sessions.get_mut(&session)
                        && !under_way
                        && session.processes.get(&name) == Some(&false)
                    {
                        session.processes.remove(&name);
                    }
                }
                Kind::Watch { id } => drop(self.watches.remove(&id)),
                _ => {}
            }
        }
        for handle in caller.handles.into_values() {
            self.close(handle);
        }
        self.watches.retain(|_, (of, _)| of != stream);
        let asked: Vec<RequestId> =
            self.asked.iter().filter(|(_, of)| *of == stream).map(|(id, _)| id.clone()).collect();
        for id in asked {
            self.asked.remove(&id);
            let error = RpcError { code: INTERNAL_ERROR, message: "the caller has left".into() };
            self.replies.push_back(encode_error(&id, &error).into());
        }
        if let Phase::Initialized(tag) | Phase::Ready(tag) = caller.phase
            && let Some(session) = self.sessions.get_mut(&tag)
        {
            session.stream = None;
            session.expires = now + RETENTION;
        }
    }
}

impl Session {
    fn new(expires: Instant) -> Self {
        Self { stream: None, expires, processes: HashMap::new(), stalled: HashSet::new() }
    }

    /// Remembers a process whose start was seen by an earlier gateway process.
    fn learn(&mut self, process: &str) {
        if self.processes.len() < PROCESSES_MAX && !self.processes.contains_key(process) {
            self.processes.insert(process.to_owned(), true);
        }
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared")
            .field("streams", &self.streams.len())
            .field("sessions", &self.sessions.len())
            .field("in_flight", &self.in_flight.len())
            .finish_non_exhaustive()
    }
}

/// Places in a text, in order, with what stands there instead.
type Edits = Vec<(Range<usize>, String)>;

/// Where a value stands in the value that holds it.
fn place(whole: &RawValue, part: &RawValue) -> Range<usize> {
    let start = part.get().as_ptr().addr() - whole.get().as_ptr().addr();
    start..start + part.get().len()
}

fn place_in(json: &[u8], part: &RawValue) -> usize {
    part.get().as_ptr().addr() - json.as_ptr().addr()
}

fn is_text(value: &RawValue) -> bool {
    value.get().starts_with('"')
}

fn text(value: &RawValue) -> String {
    serde_json::from_str(value.get()).expect("callers have looked at the quote, and messages of streams are checked")
}

/// Puts the tag before a name.
fn prefix(params: &RawValue, name: &RawValue, tag: Tag) -> (Range<usize>, String) {
    let start = place(params, name).start + 1;
    (start..start, tag.text())
}

/// A name that came back, without its tag. Tags consist of what is never escaped.
fn split_name(name: &RawValue) -> Option<(Tag, String)> {
    let tag = Tag::parse(&name.get().as_bytes()[1..])?;
    // Executors are not checked: a name that cannot be read is nobody's.
    let name: String = serde_json::from_str(name.get()).ok()?;
    Some((tag, name[TAG_BYTES..].to_owned()))
}

fn edited(json: &[u8], edits: &[(Range<usize>, String)]) -> Vec<u8> {
    let mut out = Vec::with_capacity(json.len() + edits.iter().map(|(_, new)| new.len()).sum::<usize>());
    append_edited(&mut out, json, edits);
    out
}

fn append_edited(out: &mut Vec<u8>, json: &[u8], edits: &[(Range<usize>, String)]) {
    let mut done = 0;
    for (range, new) in edits {
        out.extend_from_slice(&json[done..range.start]);
        out.extend_from_slice(new.as_bytes());
        done = range.end;
    }
    out.extend_from_slice(&json[done..]);
}

/// A request without its id and its last brace, with room for both.
fn request_head(method: &str, params: Option<&RawValue>, edits: &Edits) -> Vec<u8> {
    let method = serde_json::to_string(method).expect("a text becomes JSON");
    let params = params.map(|params| params.get().as_bytes());
    let mut json = Vec::with_capacity(method.len() + params.map_or(0, <[u8]>::len) + 128);
    json.extend_from_slice(b"{\"method\":");
    json.extend_from_slice(method.as_bytes());
    if let Some(params) = params {
        json.extend_from_slice(b",\"params\":");
        let mut edits = edits.clone();
        edits.sort_by_key(|(range, _)| range.start);
        append_edited(&mut json, params, &edits);
    }
    json
}

/// The number of an answer in its usual form, and where its result member begins.
fn split_answer(json: &[u8]) -> Option<(i64, usize)> {
    let rest = json.strip_prefix(ANSWER_HEAD)?;
    // A number of 63 bits has at most 19 digits.
    let digits = rest.iter().take(20).take_while(|byte| byte.is_ascii_digit()).count();
    let number = std::str::from_utf8(&rest[..digits]).ok()?.parse().ok()?;
    rest[digits..].starts_with(RESULT_HEAD).then_some((number, ANSWER_HEAD.len() + digits))
}
