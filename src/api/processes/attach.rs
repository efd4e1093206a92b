//! Attach: a WebSocket on a session: its output, its stdin and its end in one conversation.
//!
//! One task owns the socket. Three loops run in it: what the caller says, its bytes on their way to stdin, and what the
//! caller is told; each waits without holding up the others until its own short queue is full. Messages are JSON texts;
//! a binary message is bytes for stdin. Nothing of the session ends with the socket.

use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{FutureExt, Sink, SinkExt, Stream, StreamExt};
use hyper::body::Incoming;
use hyper::{Request, Response};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval_at, timeout, timeout_at};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::{Error as SocketError, Message};
use tokio_util::task::TaskTracker;

use super::live::{Cut, Follow, Live, Step};
use super::{OutputQuery, StdinBody, TerminateBody, object};
use crate::api::audited::in_session;
use crate::api::error::ApiError;
use crate::api::{Api, credential};
use crate::audit::Outcome;
use crate::auth::AuthError;
use crate::edge::body::Body;
use crate::edge::upgrade::{self, SocketLimits};
use crate::journal::Page;
use crate::session::view::{Chunk, lost};
use crate::session::{Session, StdinError, WriteOrder};

/// Largest message of a caller, in bytes.
const MESSAGE_BYTES_MAX: usize = 1024 * 1024;

/// Messages for stdin that wait for the one before; past it the socket is read no further.
const ORDERS_MAX: usize = 4;

/// Answers that wait for the caller to take them.
const REPLIES_MAX: usize = 16;

/// Requests to end the process under way at once: an interrupt, a patient end, a kill, and one to spare.
const ENDINGS_MAX: usize = 4;

/// How long the exit waits for the answers to what the caller has written before, and a farewell for the caller's.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// What a caller says.
#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum Said {
    /// Bytes for stdin, or its end.
    Stdin(StdinBody),
    /// The process is to end.
    Terminate(TerminateBody),
    /// A terminal has another size, of which executors cannot be told.
    Resize {},
}

/// How the conversation ended.
enum End {
    /// The caller closed or is gone.
    Peer,
    /// The caller took nothing, or said nothing, for too long.
    Silent,
    /// The gateway closes.
    Farewell(CloseCode, &'static str),
}

/// `GET …/processes/{sid}/attach?since=N`
pub async fn attach(api: &Arc<Api>, id: &str, request: Request<Incoming>) -> Result<Response<Body>, ApiError> {
    let query = OutputQuery::parse(api, request.uri().query().unwrap_or_default())?;
    let credential = credential::of_socket(&request)?;
    let live = Live::admit(api, "attach", id, &credential.token).await?;
    upgrade::check(request.headers())?;
    let act = in_session("process.attach", &live.principal, request.headers(), &live.session);
    let entry = api.audit.begin(act).await?;
    let limits = SocketLimits {
        read_buffer_bytes: api.config.now().link.read_buffer_bytes,
        message_bytes_max: MESSAGE_BYTES_MAX,
    };
    let (response, socket) = upgrade::accept(request, credential.protocol, limits);
    let follow = Follow::new(live.session.clone(), query.wish.since, query.wish.tag);
    let attached = api.clone();
    api.sockets.spawn(async move {
        if let Some(socket) = socket.await {
            entry.end(run(socket, attached, live, follow).await);
        }
    });
    Ok(response)
}

/// What the loops of one socket share.
struct Attached {
    api: Arc<Api>,
    session: Arc<Session>,
    read_only: bool,
    endings: TaskTracker,
    /// When the caller was last heard; `None` while it is kept from being heard.
    heard: Mutex<Option<Instant>>,
    /// Orders for stdin that were not answered yet.
    unanswered: watch::Sender<usize>,
    /// Bytes for stdin that the caller has sent.
    stdin_bytes: AtomicU64,
}

/// Owns the socket until it ends; gives what is recorded of it.
async fn run<S>(socket: WebSocketStream<S>, api: Arc<Api>, live: Live, follow: Follow) -> Outcome
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let Live { principal, session, mut cut, place: _place } = live;
    let read_only = principal.scopes().read_only;
    let attached = Attached {
        api,
        session,
        read_only,
        endings: TaskTracker::new(),
        heard: Mutex::new(Some(Instant::now())),
        unanswered: watch::Sender::new(0),
        stdin_bytes: AtomicU64::new(0),
    };
    let ended =
        |code: &'static str| Outcome::new(code).with("stdin_bytes", attached.stdin_bytes.load(Ordering::Relaxed));
    let (mut sink, stream) = socket.split();
    let (replies, told) = mpsc::channel(REPLIES_MAX);
    let (orders, queued) = mpsc::channel(ORDERS_MAX);
    let mut reads = pin!(attached.read(stream, orders, replies.clone()).fuse());
    let (code, reason) = {
        // Dropped before the farewell, and with it what is queued: a right taken away ends here.
        let mut writes = pin!(attached.write(queued, replies));
        let tells = attached.tell(&mut sink, follow, told);
        let end = tokio::select! {
            biased;
            cut = &mut cut => farewell(&cut),
            end = &mut reads => end,
            end = tells => end,
            () = &mut writes => End::Peer,
        };
        match end {
            End::Silent => return ended("silent"),
            End::Farewell(code, reason) => (code, reason),
            End::Peer => {
                // What it had written before it left still goes to the process.
                tokio::select! {
                    _ = &mut cut => {}
                    () = writes => {}
                }
                return ended("peer");
            }
        }
    };
    let close = Message::Close(Some(CloseFrame { code, reason: reason.into() }));
    let goodbye = async {
        if sink.send(close).await.is_ok() {
            // Closing with bytes unread resets the connection; the peer could miss our close frame.
            reads.await;
        }
    };
    let _ = timeout(CLOSE_TIMEOUT, goodbye).await;
    ended("closed").with("detail", reason)
}

fn farewell(cut: &Cut) -> End {
    match cut {
        Cut::Refused(AuthError::Expired) => End::Farewell(CloseCode::Policy, "the token has expired"),
        Cut::Refused(_) => End::Farewell(CloseCode::Policy, "the token was revoked"),
        Cut::Draining => End::Farewell(CloseCode::Restart, "gateway restarts"),
        Cut::Forgotten => End::Farewell(CloseCode::Normal, "the session was forgotten"),
    }
}

impl Attached {
    /// Takes what the caller says until it leaves. Once nobody takes orders any more it only reads, so that the caller
    /// gets the farewell.
    async fn read<R>(&self, mut socket: R, orders: mpsc::Sender<WriteOrder>, replies: mpsc::Sender<Value>) -> End
    where
        R: Stream<Item = Result<Message, SocketError>> + Unpin,
    {
        while let Some(message) = socket.next().await {
            self.hear(Some(Instant::now()));
            let said = match message {
                Ok(_) if orders.is_closed() => continue,
                Ok(Message::Text(text)) => object(text.as_bytes()),
                Ok(Message::Binary(bytes)) => {
                    let order = WriteOrder { offset: None, bytes, eof: false };
                    self.enqueue(order, &orders, &replies).await;
                    continue;
                }
                // The library answers a close frame at the next read, which then ends.
                Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_) | Message::Close(_)) => continue,
                Err(SocketError::Capacity(_)) => return End::Farewell(CloseCode::Size, "the message is too large"),
                Err(_) => return End::Peer,
            };
            let refused = match said {
                Ok(Said::Stdin(body)) => match body.order(&self.session) {
                    Ok(order) => {
                        self.enqueue(order, &orders, &replies).await;
                        continue;
                    }
                    Err(error) => error,
                },
                Ok(Said::Terminate(body)) => match self.terminate(&body) {
                    Ok(()) => continue,
                    Err(error) => error,
                },
                Ok(Said::Resize {}) => {
                    ApiError::new(409, "resize_unsupported", "executors cannot change the size of a terminal")
                }
                Err(error) => error,
            };
            self.reply(&replies, error(&refused)).await;
        }
        End::Peer
    }

    /// Queues bytes for stdin behind those before them.
    async fn enqueue(&self, order: WriteOrder, orders: &mpsc::Sender<WriteOrder>, replies: &mpsc::Sender<Value>) {
        if let Err(refused) = self.may_change() {
            return self.reply(replies, error(&refused)).await;
        }
        self.stdin_bytes.fetch_add(order.bytes.len() as u64, Ordering::Relaxed);
        // Its pongs wait behind its bytes, which wait for the process: that is not the caller's silence.
        self.hear(None);
        self.unanswered.send_modify(|orders| *orders += 1);
        let _ = orders.send(order).await;
        self.hear(Some(Instant::now()));
    }

    async fn reply(&self, replies: &mpsc::Sender<Value>, reply: Value) {
        self.hear(None);
        let _ = replies.send(reply).await;
        self.hear(Some(Instant::now()));
    }

    fn may_change(&self) -> Result<(), ApiError> {
        if self.read_only { Err(super::read_only()) } else { Ok(()) }
    }

    /// Begins to end the process, which goes on when the caller leaves; the exit is what answers.
    fn terminate(&self, body: &TerminateBody) -> Result<(), ApiError> {
        self.may_change()?;
        if self.endings.len() >= ENDINGS_MAX {
            return Err(ApiError::new(429, "too_many_calls", "the process is being ended already"));
        }
        let (session, (signal, grace)) = (self.session.clone(), body.order());
        self.endings.spawn(async move { session.end(signal, grace).await });
        Ok(())
    }

    /// Brings bytes to the process, one order after the other.
    async fn write(&self, mut orders: mpsc::Receiver<WriteOrder>, replies: mpsc::Sender<Value>) {
        let wait = Duration::from_secs(self.api.config.now().session.wait_max_secs);
        // Set when bytes were not accepted: those sent behind them in good faith must not take their place.
        let mut torn = false;
        while let Some(order) = orders.recv().await {
            let reply = if torn && order.offset.is_none() {
                let accepted = self.session.status().stdin_accepted;
                self.refusal(&ApiError::from(StdinError::Gap { offset: accepted, accepted }))
            } else {
                let written = self.session.write(&self.api.corridor.store, order, wait).await;
                torn = written.as_ref().is_err_and(|error| *error != StdinError::Closed);
                match written {
                    Ok(written) => json!({ "type": "stdin", "accepted": written.accepted, "eof": written.eof }),
                    Err(error) => self.refusal(&ApiError::from(error)),
                }
            };
            let _ = replies.send(reply).await;
            self.unanswered.send_modify(|orders| *orders -= 1);
        }
    }

    /// A refused write says from where to go on.
    fn refusal(&self, refused: &ApiError) -> Value {
        let mut reply = error(refused);
        reply["accepted"] = json!(self.session.status().stdin_accepted);
        reply
    }

    /// Tells the caller what the process prints and what became of its orders, until the exit.
    async fn tell<W>(&self, sink: &mut W, mut follow: Follow, mut replies: mpsc::Receiver<Value>) -> End
    where
        W: Sink<Message, Error = SocketError> + Unpin,
    {
        let settings = self.api.corridor.link.now();
        let write_timeout = Duration::from_secs(settings.write_timeout_secs);
        let (ping_every, dead_after) =
            (Duration::from_secs(settings.ping_secs), Duration::from_secs(settings.dead_secs));
        let mut ping = interval_at(Instant::now() + ping_every, ping_every);
        ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut unanswered = self.unanswered.subscribe();
        // Set when all output was told: since when the exit waits for the answers to earlier orders.
        let mut over = None;
        loop {
            let settled = async {
                let until = over.unwrap_or_else(Instant::now) + CLOSE_TIMEOUT;
                let _ = timeout_at(until, unanswered.wait_for(|orders| *orders == 0)).await;
            };
            let (messages, end) = tokio::select! {
                biased;
                _ = ping.tick() => {
                    if self.silence() >= dead_after {
                        return End::Silent;
                    }
                    (vec![Message::Ping(Bytes::new())], None)
                }
                Some(reply) = replies.recv() => (vec![text(&reply)], None),
                step = follow.next(), if over.is_none() => match step {
                    Ok(Step::Page(page)) => (page_messages(&page), None),
                    Ok(Step::Exit) => {
                        over = Some(Instant::now());
                        continue;
                    }
                    Err(failed) => {
                        let end = End::Farewell(CloseCode::Error, "the output could not be read");
                        (vec![text(&error(&failed))], Some(end))
                    }
                },
                () = settled, if over.is_some() => {
                    let exit = typed("exit", self.session.exit());
                    (vec![text(&exit)], Some(End::Farewell(CloseCode::Normal, "the process is over")))
                }
            };
            // Each write has its time, however many there are: a slow caller is not a dead one.
            for message in messages {
                match timeout(write_timeout, sink.feed(message)).await {
                    Ok(Ok(())) => {}
                    Ok(Err(_)) => return End::Peer,
                    Err(_) => return End::Silent,
                }
            }
            match timeout(write_timeout, sink.flush()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return End::Peer,
                Err(_) => return End::Silent,
            }
            if let Some(end) = end {
                return end;
            }
        }
    }

    fn hear(&self, at: Option<Instant>) {
        *self.heard.lock().unwrap_or_else(PoisonError::into_inner) = at;
    }

    fn silence(&self) -> Duration {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).map_or(Duration::ZERO, |heard| heard.elapsed())
    }
}

fn page_messages(page: &Page) -> Vec<Message> {
    let hole = page.lost.iter().map(|hole| text(&typed("lost", lost(hole))));
    let records = page.records.iter().map(|record| {
        let name = if record.gap.is_some() { "gap" } else { "chunk" };
        text(&typed(name, Chunk::from(record)))
    });
    hole.chain(records).collect()
}

/// A message with its name beside what it says.
#[derive(Serialize)]
struct Typed<T> {
    #[serde(flatten)]
    message: T,
    r#type: &'static str,
}

fn typed<T>(name: &'static str, message: T) -> Typed<T> {
    Typed { message, r#type: name }
}

fn error(error: &ApiError) -> Value {
    json!({ "type": "error", "code": error.code(), "message": error.message() })
}

fn text(message: &impl Serialize) -> Message {
    Message::text(serde_json::to_string(message).expect("what the API tells is plain data"))
}
