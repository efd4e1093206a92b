//! Accepts connections and serves HTTP on each, within the bounds of the configuration.
//!
//! One task accepts, one task owns each connection; a connection that fails or panics ends alone.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared};
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use hyper::header::{CONNECTION, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, SetOnce};
use tokio::time::{Instant, timeout};
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::body::{Body, BrokenOff};
use super::peer::{Peer, is_trusted};
use super::stall::StallLimit;
use super::tls::{ClientCertified, Tls};
use super::transport::Transport;
use crate::config::{self, Live};

/// Pause after the kernel refused to accept (no file descriptors left, usually): it lasts until a connection ends.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long a client may take to read the last of an answer that has come to its end.
const ENDING_GRACE: Duration = Duration::from_secs(3);

/// How long an idle connection stays open once the gateway drains. Its client may be about to use it, and fails at one
/// that closes at that moment: a harness does, whose socket was closed just before. Answers given meanwhile say that
/// the connection ends with them.
const IDLE_GRACE: Duration = Duration::from_secs(1);

/// When an answer that goes on for long has to end, put among its extensions. Its body is not asked for anything while
/// the client reads nothing, so it cannot see to that alone: its connection is closed shortly after, whoever reads.
#[derive(Clone)]
pub struct Ending(Shared<BoxFuture<'static, ()>>);

impl Ending {
    /// Comes when `end` is ready.
    pub fn when(end: impl Future<Output = ()> + Send + 'static) -> Self {
        Self(end.boxed().shared())
    }
}

/// What has become of connections since the start.
#[derive(Debug, Default)]
pub struct Counts {
    /// Open now.
    pub open: AtomicU64,
    /// Accepted.
    pub accepted: AtomicU64,
    /// Not accepted, for a reason that is not the connection's own.
    pub accept_failures: AtomicU64,
    /// Ended over their TLS handshake.
    pub tls_failures: AtomicU64,
}

/// One connection that is open.
struct Open<'a>(&'a Counts);

impl<'a> Open<'a> {
    fn new(counts: &'a Counts) -> Self {
        counts.open.fetch_add(1, Ordering::Relaxed);
        Self(counts)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Serves one kind of requests on any number of addresses.
pub struct Listener<S> {
    settings: Live<config::Edge>,
    service: S,
    tls: Live<Option<Tls>>,
    permits: Arc<Semaphore>,
    /// Of all its addresses.
    pub counts: Arc<Counts>,
    /// Every connection task, for shutdown to wait on.
    pub connections: TaskTracker,
    /// Cancelled to finish the answers under way and close.
    pub drain: CancellationToken,
}

impl<S, F> Listener<S>
where
    S: Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Response<Body>> + Send + 'static,
{
    /// A listener that answers with `service`, through TLS while there is one. New settings hold for connections that
    /// are accepted from then on; how many those may be together is told to [`Places`] besides.
    pub fn new(settings: impl Into<Live<config::Edge>>, tls: impl Into<Live<Option<Tls>>>, service: S) -> Arc<Self> {
        Self::counted(settings, tls, service, Arc::default())
    }

    /// The same that counts its connections there.
    pub fn counted(
        settings: impl Into<Live<config::Edge>>,
        tls: impl Into<Live<Option<Tls>>>,
        service: S,
        counts: Arc<Counts>,
    ) -> Arc<Self> {
        let settings = settings.into();
        Arc::new(Self {
            permits: Arc::new(Semaphore::new(settings.now().connections_max)),
            settings,
            service,
            tls: tls.into(),
            counts,
            connections: TaskTracker::new(),
            drain: CancellationToken::new(),
        })
    }

    /// The places of its connections.
    pub fn places(&self) -> Places {
        Places(self.permits.clone())
    }

    /// Accepts until `stop`. The socket closes when this returns.
    pub async fn accept(self: Arc<Self>, socket: TcpListener, stop: CancellationToken) {
        loop {
            // At the bound connections wait in the kernel's queue.
            let permit = tokio::select! {
                permit = self.permits.clone().acquire_owned() => permit.expect("the permits are never closed"),
                () = stop.cancelled() => return,
            };
            let accepted = tokio::select! {
                accepted = socket.accept() => accepted,
                () = stop.cancelled() => return,
            };
            match accepted {
                Ok((stream, address)) => {
                    self.counts.accepted.fetch_add(1, Ordering::Relaxed);
                    let listener = self.clone();
                    self.connections.spawn(async move {
                        let _open = Open::new(&listener.counts);
                        listener.serve(stream, address).await;
                        drop(permit);
                    });
                }
                Err(error) if is_of_one_connection(&error) => {}
                Err(error) => {
                    self.counts.accept_failures.fetch_add(1, Ordering::Relaxed);
                    tracing::error!(%error, "accepting a connection failed");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// The connection with TLS around it, if this listener has it, and whether its client has shown a certificate.
    async fn transport(
        stream: TcpStream,
        tls: Option<&Tls>,
        settings: &config::Edge,
    ) -> Option<(Transport, Option<ClientCertified>)> {
        let Some(tls) = tls else { return Some((Transport::Plain(stream), None)) };
        // As long as a client has for its first request.
        let patience = Duration::from_secs(settings.header_timeout_secs);
        match timeout(patience, tls.acceptor().accept(stream)).await {
            Ok(Ok(stream)) => {
                let certified = is_certified(&stream);
                Some((Transport::Tls(Box::new(stream)), certified))
            }
            Ok(Err(error)) => {
                tracing::debug!(%error, "a TLS handshake failed");
                None
            }
            Err(_) => None,
        }
    }

    async fn serve(&self, stream: TcpStream, address: SocketAddr) {
        let (settings, tls) = (self.settings.now(), self.tls.now());
        tune(&stream, Duration::from_secs(settings.tcp_user_timeout_secs));
        let trusted = is_trusted(&settings.trusted_proxies, address.ip());
        let peer = Peer { address, tls: tls.is_some(), trusted };
        let transport = Self::transport(stream, Option::as_ref(&tls), &settings).await;
        drop(tls);
        let Some((stream, certified)) = transport else {
            self.counts.tls_failures.fetch_add(1, Ordering::Relaxed);
            return;
        };

        let activity = Arc::new(Activity::new(&settings));
        let service = {
            let activity = activity.clone();
            let (service, drain) = (self.service.clone(), self.drain.clone());
            service_fn(move |mut request: Request<Incoming>| {
                let extensions = request.extensions_mut();
                extensions.insert(peer);
                certified.map(|certified| extensions.insert(certified));
                let busy = Busy::new(activity.clone());
                let (answer, drain) = (service(request), drain.clone());
                async move {
                    let mut answer = answer.await;
                    if drain.is_cancelled() && answer.status() != StatusCode::SWITCHING_PROTOCOLS {
                        answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
                    }
                    if let Some(ending) = answer.extensions_mut().remove::<Ending>() {
                        // No other answer follows on the connection, so it may be cut when this one has to end.
                        answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
                        let _ = busy.0.ending.set(ending);
                    }
                    // The connection is busy until the last byte of the body was taken.
                    Ok::<_, Infallible>(answer.map(|body| BusyBody { body, _busy: busy }))
                }
            })
        };
        let write_timeout = Duration::from_secs(settings.write_timeout_secs);
        // One accepted while the gateway drains is answered once: a register refused now would end its executor.
        let draining = self.drain.is_cancelled();
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(None)
            .keep_alive(!draining)
            .max_buf_size(settings.header_bytes_max)
            .serve_connection(TokioIo::new(StallLimit::new(stream, write_timeout)), service)
            .with_upgrades();
        let mut connection = pin!(connection);
        let mut idle = pin!(activity.expired());
        let mut draining = draining;
        let drained = async {
            self.drain.cancelled().await;
            // Likewise one that has been opened and has not yet said what it wants.
            activity.begun.cancelled().await;
            tokio::time::sleep(IDLE_GRACE).await;
        };
        let mut drained = pin!(drained);
        let ended = async {
            activity.ending.wait().await.clone().0.await;
            tokio::time::sleep(ENDING_GRACE).await;
        };
        let mut ended = pin!(ended);
        loop {
            tokio::select! {
                closed = connection.as_mut() => {
                    if let Err(error) = closed {
                        tracing::debug!(%error, "connection ended");
                    }
                    return;
                }
                () = drained.as_mut(), if !draining => {
                    draining = true;
                    connection.as_mut().graceful_shutdown();
                }
                () = idle.as_mut() => return,
                () = ended.as_mut() => return,
            }
        }
    }
}

/// How many connections a listener may have at once.
pub struct Places(Arc<Semaphore>);

impl Places {
    /// Makes them more or fewer. Nobody is cut: where more are taken than there are now, the next is accepted when as
    /// many have closed; but for one, whose place was asked for already.
    pub fn resize(&self, from: usize, to: usize) {
        if to >= from {
            return self.0.add_permits(to - from);
        }
        let (permits, fewer) = (self.0.clone(), (from - to).try_into().unwrap_or(u32::MAX));
        tokio::spawn(async move { permits.acquire_many(fewer).await.map(|places| places.forget()) });
    }
}

fn is_certified(stream: &TlsStream<TcpStream>) -> Option<ClientCertified> {
    stream.get_ref().1.peer_certificates().map(|_| ClientCertified)
}

/// Lets the kernel find a peer that vanished: by bytes it does not take, and where none are sent by its silence to
/// probes. A socket that refuses an option is served all the same.
fn tune(stream: &TcpStream, user_timeout: Duration) {
    let _ = stream.set_nodelay(true);
    let socket = SockRef::from(stream);
    let _ = socket.set_tcp_user_timeout(Some(user_timeout));
    // Probes count in whole seconds, at least one. How many go unanswered is decided by the user timeout.
    let part = |nth: u64| Duration::from_secs((user_timeout.as_secs() / nth).max(1));
    let probes = TcpKeepalive::new().with_time(part(2)).with_interval(part(6));
    let _ = socket.set_tcp_keepalive(&probes);
}

/// Whether an accept failed because of the one connection it would have accepted.
fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::Interrupted
    )
}

/// When one connection was last of use: requests under way keep it, silence ends it.
struct Activity {
    requests: AtomicUsize,
    begun: CancellationToken,
    /// Set by the answer that is to be the last.
    ending: SetOnce<Ending>,
    deadline: Mutex<Instant>,
    idle_timeout: Duration,
}

impl Activity {
    fn new(settings: &config::Edge) -> Self {
        let first_request = Instant::now() + Duration::from_secs(settings.header_timeout_secs);
        Self {
            requests: AtomicUsize::new(0),
            begun: CancellationToken::new(),
            ending: SetOnce::new(),
            deadline: Mutex::new(first_request),
            idle_timeout: Duration::from_secs(settings.idle_timeout_secs),
        }
    }

    /// Returns once no request has been under way since the deadline. It looks now and then instead of being woken:
    /// a connection that answers thousands of requests a second would be woken as often for nothing.
    async fn expired(&self) {
        loop {
            let now = Instant::now();
            let deadline = self.deadline();
            if deadline <= now && self.requests.load(Ordering::Acquire) == 0 {
                return;
            }
            // The end of a request under way moves the deadline to at least the moment of this next look.
            let next_look = now + self.idle_timeout;
            tokio::time::sleep_until(if deadline <= now { next_look } else { deadline.min(next_look) }).await;
        }
    }

    fn deadline(&self) -> Instant {
        *self.deadline.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One request under way.
struct Busy(Arc<Activity>);

impl Busy {
    fn new(activity: Arc<Activity>) -> Self {
        activity.requests.fetch_add(1, Ordering::AcqRel);
        activity.begun.cancel();
        Self(activity)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        // The deadline first: a connection without requests must not be seen with that of an earlier one.
        *self.0.deadline.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now() + self.0.idle_timeout;
        self.0.requests.fetch_sub(1, Ordering::AcqRel);
    }
}

/// An answer's body that keeps its connection busy. It tells its size, so that the answer has a `content-length` and
/// is sent in one piece; the combinators of `http_body_util` would lose it.
struct BusyBody {
    body: Body,
    _busy: Busy,
}

impl HttpBody for BusyBody {
    type Data = Bytes;
    type Error = BrokenOff;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BrokenOff>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tokio::io::AsyncWriteExt;
    use tokio_util::task::AbortOnDropHandle;

    use super::super::body::full;
    use super::*;

    /// How long the kernel may take to notice, on a busy machine.
    const PATIENCE: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn a_peer_that_takes_nothing_is_cut_by_the_kernel() {
        let settings = config::Edge { tcp_user_timeout_secs: 1, ..config::Edge::default() };
        let listener = Listener::new(settings, None, |_| async { Response::new(full(vec![0; 64 << 20])) });
        let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        let stop = CancellationToken::new();
        let _accepting = AbortOnDropHandle::new(tokio::spawn(listener.clone().accept(socket, stop)));
        let mut stuck = TcpStream::connect(address).await.unwrap();
        stuck.write_all(b"GET / HTTP/1.1\r\nhost: gw\r\n\r\n").await.unwrap();
        stuck.readable().await.unwrap();
        listener.connections.close();
        tokio::time::timeout(PATIENCE, listener.connections.wait()).await.expect("the connection ends");
    }

    #[tokio::test]
    async fn a_silent_connection_is_probed() {
        let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (_peer, accepted) = tokio::join!(TcpStream::connect(socket.local_addr().unwrap()), socket.accept());
        let (stream, _) = accepted.unwrap();
        tune(&stream, Duration::from_secs(30));
        let socket = SockRef::from(&stream);
        assert!(socket.keepalive().unwrap() && socket.tcp_nodelay().unwrap());
        assert_eq!(socket.tcp_keepalive_time().unwrap(), Duration::from_secs(15));
        assert_eq!(socket.tcp_keepalive_interval().unwrap(), Duration::from_secs(5));
        assert_eq!(socket.tcp_user_timeout().unwrap(), Some(Duration::from_secs(30)));
    }
}
