//! The executor's JSON-RPC over one conversation, with the gateway as the caller.
//!
//! One task owns the conversation. [`Client`] is a cheap handle: when the last one is dropped the task ends and the
//! stream is reset. A call whose future is dropped is forgotten, its answer discarded.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::value::RawValue;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::conversation::{Conversation, ConversationEnd, HandshakeError};
use crate::protocol::rpc::{
    EnvironmentInfo, ExecutorSessionId, INITIALIZED, Incoming, Initialize, Method, ProcessClosed, ProcessExited,
    ProcessOutput, ProcessOutputPage, ProcessRead, RequestId, RpcError, RpcParseError, encode_notification,
    encode_request,
};
use crate::trace;

/// How the gateway introduces itself.
pub(super) const CLIENT_NAME: &str = "exec-gateway";

/// Messages waiting to be encrypted; each caller has at most one here, and callers are bounded by
/// `link.requests_in_flight_max`.
const OUTGOING_MAX: usize = 64;

/// Events waiting in the queue of one process: output chunks are at most 8 KiB (codex-exec-server.md §5.3).
const EVENTS_MAX: usize = 128;

/// Handles open at once; executors hold 128 per connection, and some may wait to be closed.
const FILE_HANDLES_MAX: usize = 64;

/// How long a process may be only being started, and the pause before it is asked for again.
const STARTING_WAIT: Duration = Duration::from_secs(10);
const STARTING_PAUSE: Duration = Duration::from_millis(20);

/// How long an executor may take to see that the former conversation of a session is over (about 40 ms,
/// codex-exec-server.md §7.1), and the pause before it is asked again.
const DETACH_WAIT: Duration = Duration::from_secs(5);
const DETACH_PAUSE: Duration = Duration::from_millis(50);

/// File handles where a connection is shared and each caller has 32.
const SHARED_FILE_HANDLES_MAX: usize = 16;

/// Why an executor could not be reached over a new stream; nothing has run on it then.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// There is no conversation.
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    /// The executor did not accept the session.
    #[error("the executor refused to initialize")]
    Initialize(#[source] CallError),
}

/// Why a call has no result.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The executor answered with an error.
    #[error("{}", .0.message)]
    Rpc(RpcError),
    /// The stream ended; `sent` says whether the request may have reached the executor.
    #[error("the connection to the executor was lost")]
    Lost {
        /// Whether any part of the request had been handed to the link.
        sent: bool,
    },
    /// The executor is connected and did not answer in time.
    #[error("the executor did not answer in time")]
    NoAnswer,
    /// The answer has another shape than the method's.
    #[error("the executor's answer is malformed")]
    Malformed(#[source] serde_json::Error),
}

/// What happens to a process.
#[derive(Debug)]
pub enum ProcessEvent {
    /// A chunk of output.
    Output(ProcessOutput),
    /// The process itself has ended; output of its children may follow.
    Exited(ProcessExited),
    /// Nothing more will come.
    Closed(ProcessClosed),
}

impl ProcessEvent {
    /// Its number, from 1 without holes over all events of a process. Executors tell output, errors and the end from
    /// different places, so the order of arrival is not always that of the numbers.
    pub fn seq(&self) -> u64 {
        match self {
            Self::Output(output) => output.seq,
            Self::Exited(exited) => exited.seq,
            Self::Closed(closed) => closed.seq,
        }
    }
}

/// Takes the events of one process. Runs inside the stream's task: it must neither block nor call the client.
pub type ProcessHandler = Box<dyn FnMut(ProcessEvent) + Send>;

/// Where the events of one process go.
enum Sink {
    /// Taken at once, on a stream that several calls share.
    Handler(ProcessHandler),
    /// Waited for, on a stream of one process alone: while its owner is behind, nobody else is held up.
    Queue(mpsc::Sender<ProcessEvent>),
}

/// A handle to one initialized conversation with an executor; cheap to clone.
#[derive(Clone)]
pub struct Client {
    shared: Arc<Shared>,
    outgoing: mpsc::Sender<Outgoing>,
    info: Arc<EnvironmentInfo>,
    session: Option<ExecutorSessionId>,
}

struct Shared {
    calls: Mutex<Calls>,
    processes: Mutex<HashMap<String, Sink>>,
    in_flight: Arc<Semaphore>,
    file_handles: Arc<Semaphore>,
    answer_timeout: Duration,
    stop: CancellationToken,
    ended: CancellationToken,
}

#[derive(Default)]
struct Calls {
    next: i64,
    waiting: HashMap<i64, Waiting>,
    ended: bool,
}

struct Waiting {
    answer: oneshot::Sender<Result<Box<RawValue>, CallError>>,
    sent: bool,
    /// Held until the executor has answered, even when the caller has left: the executor is still at work.
    _permit: OwnedSemaphorePermit,
}

struct Outgoing {
    id: Option<i64>,
    json: Vec<u8>,
}

/// Why the task ended; for the log.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error(transparent)]
    Conversation(#[from] ConversationEnd),
    #[error(transparent)]
    Rpc(#[from] RpcParseError),
    #[error("no longer used")]
    Unused,
}

/// The time that an executor is given to let go of a session that is to be resumed.
pub(super) struct Detaching(Instant);

impl Detaching {
    /// From now on.
    pub(super) fn begin() -> Self {
        Self(Instant::now() + DETACH_WAIT)
    }

    /// Waits a moment; whether the session may be asked for again.
    pub(super) async fn again(&self) -> bool {
        sleep(DETACH_PAUSE).await;
        Instant::now() < self.0
    }
}

impl Client {
    /// Initializes an executor session on a conversation: a new one, or the one to resume. Cancelling ends the
    /// conversation, and so does `stop`, then or later.
    ///
    /// # Errors
    /// [`CallError`] when the executor did not accept.
    pub async fn initialize(
        conversation: Conversation,
        resume: Option<ExecutorSessionId>,
        stop: CancellationToken,
    ) -> Result<Self, CallError> {
        let link = conversation.sender.link();
        let (settings, transport) = (link.settings(), link.registration().transport);
        let handles = if transport.is_shared() { SHARED_FILE_HANDLES_MAX } else { FILE_HANDLES_MAX };
        let (outgoing, messages) = mpsc::channel(OUTGOING_MAX);
        let shared = Arc::new(Shared {
            calls: Mutex::default(),
            processes: Mutex::default(),
            in_flight: Arc::new(Semaphore::new(settings.requests_in_flight_max)),
            file_handles: Arc::new(Semaphore::new(handles)),
            answer_timeout: Duration::from_secs(settings.answer_timeout_secs),
            stop,
            ended: CancellationToken::new(),
        });
        tokio::spawn(run(conversation, messages, shared.clone()));
        let mut client = Self { shared, outgoing, info: Arc::default(), session: None };
        let initialize = Initialize { client_name: CLIENT_NAME.into(), resume_session_id: resume };
        let detaching = Detaching::begin();
        let session = loop {
            match client.call(&initialize).await {
                Err(CallError::Rpc(refusal)) if refusal.is_attached() && detaching.again().await => {}
                answered => break answered?,
            }
        };
        client.info = Arc::new(session.environment_info);
        client.session = session.session_id;
        client.notify(INITIALIZED, &serde_json::json!({})).await?;
        Ok(client)
    }

    /// What the executor told about its machine.
    pub fn environment(&self) -> &EnvironmentInfo {
        &self.info
    }

    /// The right to resume this executor session on another stream; older executors give none.
    pub fn session(&self) -> Option<&ExecutorSessionId> {
        self.session.as_ref()
    }

    /// Whether this conversation is in the executor session of that one, so that the processes are the same.
    pub fn continues(&self, former: &Self) -> bool {
        self.session.is_some() && self.session == former.session
    }

    /// Whether the conversation is over.
    pub fn is_ended(&self) -> bool {
        self.shared.ended.is_cancelled()
    }

    /// Returns when the conversation is over.
    pub async fn ended(&self) {
        self.shared.ended.cancelled().await;
    }

    /// Ends the conversation and all calls on it.
    pub fn close(&self) {
        self.shared.stop.cancel();
    }

    /// Returns when the conversation is closed from this side, be it over before or not: it is not to be continued.
    pub async fn closed(&self) {
        self.shared.stop.cancelled().await;
    }

    /// Calls one method and waits for its result. Dropping the future forgets the call; the executor may still carry
    /// it out.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn call<M: Method>(&self, params: &M) -> Result<M::Result, CallError> {
        let answer = timeout(self.shared.answer_timeout, self.send_request(M::NAME, params))
            .await
            .map_err(|_| CallError::NoAnswer)??;
        serde_json::from_str(answer.get()).map_err(CallError::Malformed)
    }

    /// What the executor's ring has of a process behind number `after_seq`. Waits a while if the process is only being
    /// started: that may have been asked by a conversation that was lost, and its id is taken from then on.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn read_process(&self, process: &str, after_seq: u64) -> Result<ProcessOutputPage, CallError> {
        let process_id = process.to_owned();
        let read = ProcessRead { process_id, after_seq: Some(after_seq), max_bytes: None, wait_ms: Some(0) };
        let until = Instant::now() + STARTING_WAIT;
        loop {
            match self.call(&read).await {
                Err(CallError::Rpc(refusal)) if refusal.is_starting_process() && Instant::now() < until => {
                    sleep(STARTING_PAUSE).await;
                }
                answer => return answer,
            }
        }
    }

    async fn send_request(&self, method: &str, params: &impl serde::Serialize) -> Result<Box<RawValue>, CallError> {
        let lost = |_| CallError::Lost { sent: false };
        let permit =
            self.shared.in_flight.clone().acquire_owned().await.map_err(|_| CallError::Lost { sent: false })?;
        let room = self.outgoing.reserve().await.map_err(lost)?;
        let (answer, receiver) = oneshot::channel();
        let id = {
            let mut calls = self.shared.calls();
            if calls.ended {
                return Err(CallError::Lost { sent: false });
            }
            calls.next += 1;
            let id = calls.next;
            calls.waiting.insert(id, Waiting { answer, sent: false, _permit: permit });
            id
        };
        let json = encode_request(id, method, params, trace::current().as_ref());
        room.send(Outgoing { id: Some(id), json });
        receiver.await.unwrap_or(Err(CallError::Lost { sent: true }))
    }

    async fn notify(&self, method: &str, params: &impl serde::Serialize) -> Result<(), CallError> {
        let json = encode_notification(method, params);
        self.outgoing.send(Outgoing { id: None, json }).await.map_err(|_| CallError::Lost { sent: false })
    }

    /// Bounds the file handles open on this conversation.
    pub fn file_handles(&self) -> Arc<Semaphore> {
        self.shared.file_handles.clone()
    }

    /// Has the events of a process handed to `handler` until the subscription is dropped. Subscribe before starting
    /// the process: a quick one is over before its start is answered.
    pub fn subscribe(&self, process: &str, handler: ProcessHandler) -> Subscription {
        self.subscribe_to(process, Sink::Handler(handler))
    }

    /// As [`Self::subscribe`], with the events in a queue. While it is full the whole stream waits, so the stream must
    /// carry this process alone.
    pub fn subscribe_queue(&self, process: &str) -> (Subscription, mpsc::Receiver<ProcessEvent>) {
        let (sender, events) = mpsc::channel(EVENTS_MAX);
        (self.subscribe_to(process, Sink::Queue(sender)), events)
    }

    fn subscribe_to(&self, process: &str, sink: Sink) -> Subscription {
        self.shared.processes().insert(process.to_owned(), sink);
        Subscription { shared: self.shared.clone(), process: process.to_owned() }
    }
}

/// Ends the delivery of a process's events when dropped.
pub struct Subscription {
    shared: Arc<Shared>,
    process: String,
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.shared.processes().remove(&self.process);
    }
}

impl Shared {
    fn calls(&self) -> MutexGuard<'_, Calls> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn processes(&self) -> MutexGuard<'_, HashMap<String, Sink>> {
        self.processes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn mark_sent(&self, id: i64) {
        if let Some(waiting) = self.calls().waiting.get_mut(&id) {
            waiting.sent = true;
        }
    }

    async fn take_in(&self, message: &[u8]) -> Result<(), RpcParseError> {
        match Incoming::parse(message)? {
            Incoming::Response { id, result } => self.answer(&id, Ok(result.to_owned())),
            // Malformed input is answered with id -1, which is never ours: numbers start at 1.
            Incoming::Error { id, error } => self.answer(&id, Err(CallError::Rpc(error))),
            Incoming::Notification { method, params } => self.notified(&method, params).await,
            // Asked only when a start carried a network proxy, which ours never does.
            Incoming::Request { method, .. } => tracing::debug!(%method, "request of an executor ignored"),
        }
        Ok(())
    }

    fn answer(&self, id: &RequestId, answer: Result<Box<RawValue>, CallError>) {
        let RequestId::Number(id) = id else { return };
        let waiting = self.calls().waiting.remove(id);
        if let Some(waiting) = waiting {
            // The caller may have left.
            let _ = waiting.answer.send(answer);
        }
    }

    async fn notified(&self, method: &str, params: Option<&RawValue>) {
        let params = params.map_or("null", RawValue::get);
        let event = match method {
            ProcessOutput::NAME => serde_json::from_str(params).map(ProcessEvent::Output),
            ProcessExited::NAME => serde_json::from_str(params).map(ProcessEvent::Exited),
            ProcessClosed::NAME => serde_json::from_str(params).map(ProcessEvent::Closed),
            _ => return,
        };
        match event {
            Ok(event) => {
                let process = match &event {
                    ProcessEvent::Output(output) => &output.process_id,
                    ProcessEvent::Exited(exited) => &exited.process_id,
                    ProcessEvent::Closed(closed) => &closed.process_id,
                };
                let queue = match self.processes().get_mut(process) {
                    None => return,
                    Some(Sink::Handler(handler)) => {
                        handler(event);
                        return;
                    }
                    Some(Sink::Queue(queue)) => queue.clone(),
                };
                // The owner may have left.
                let _ = queue.send(event).await;
            }
            Err(error) => tracing::warn!(%method, %error, "notification of an executor does not parse"),
        }
    }

    fn end(&self) {
        let waiting = {
            let mut calls = self.calls();
            calls.ended = true;
            std::mem::take(&mut calls.waiting)
        };
        for call in waiting.into_values() {
            let _ = call.answer.send(Err(CallError::Lost { sent: call.sent }));
        }
        self.in_flight.close();
        self.file_handles.close();
        self.ended.cancel();
        self.processes().clear();
    }
}

/// Ends all calls however the task ends.
struct EndGuard(Arc<Shared>);

impl Drop for EndGuard {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// Owns the conversation until either side ends it.
async fn run(conversation: Conversation, mut messages: mpsc::Receiver<Outgoing>, shared: Arc<Shared>) {
    let _guard = EndGuard(shared.clone());
    let Conversation { mut sender, mut receiver } = conversation;
    let (executor, stream) = (sender.link().executor().clone(), sender.stream().clone());
    let reads = async {
        loop {
            let message = receiver.next().await?;
            shared.take_in(&message).await?;
        }
    };
    let writes = async {
        while let Some(message) = messages.recv().await {
            if let Some(id) = message.id {
                shared.mark_sent(id);
            }
            sender.send(&message.json).await?;
        }
        Err::<(), End>(End::Unused)
    };
    let end: Result<(), End> = tokio::select! {
        end = reads => end,
        end = writes => end,
        () = shared.stop.cancelled() => Err(End::Unused),
    };
    match end {
        Ok(()) | Err(End::Unused | End::Conversation(ConversationEnd::Stream(_))) => {
            tracing::debug!(%stream, "conversation ended");
        }
        Err(error) => tracing::warn!(%executor, %stream, %error, "conversation broken"),
    }
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("ended", &self.is_ended()).finish_non_exhaustive()
    }
}
