//! A TCP proxy whose connections can be cut, between an executor and its gateway.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

/// Forwards to one address until it is dropped.
pub struct Proxy {
    pub address: SocketAddr,
    inner: Arc<Inner>,
    stop: CancellationToken,
}

#[derive(Default)]
struct Inner {
    connections: std::sync::Mutex<CancellationToken>,
    shut: AtomicBool,
    /// Bytes that may still pass, either way, before every connection is cut; 0 is without end.
    bytes_left: AtomicUsize,
    cuts: AtomicUsize,
}

/// Pause before a target that is away is tried again.
const RETRY_PAUSE: Duration = Duration::from_millis(20);

impl Proxy {
    pub async fn to(target: SocketAddr) -> Self {
        Self::start(target, false).await
    }

    /// One that holds a connection until its target is there, as does the kernel for a daemon whose listening socket
    /// outlives it.
    pub async fn holding(target: SocketAddr) -> Self {
        Self::start(target, true).await
    }

    async fn start(target: SocketAddr, holds: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (inner, stop) = (Arc::new(Inner::default()), CancellationToken::new());
        tokio::spawn({
            let (proxy, stop) = (inner.clone(), stop.clone());
            async move {
                loop {
                    let accepted = tokio::select! {
                        accepted = listener.accept() => accepted,
                        () = stop.cancelled() => return,
                    };
                    let Ok((executor, _)) = accepted else { continue };
                    if proxy.shut.load(Ordering::SeqCst) {
                        continue;
                    }
                    let cut = proxy.connections.lock().unwrap().clone();
                    let (proxy, stop) = (proxy.clone(), stop.clone());
                    tokio::spawn(async move {
                        let forward = async {
                            let gateway = loop {
                                match TcpStream::connect(target).await {
                                    Ok(gateway) => break gateway,
                                    Err(_) if holds => tokio::time::sleep(RETRY_PAUSE).await,
                                    Err(_) => return,
                                }
                            };
                            let ((from_executor, to_executor), (from_gateway, to_gateway)) =
                                (executor.into_split(), gateway.into_split());
                            tokio::join!(proxy.copy(from_executor, to_gateway), proxy.copy(from_gateway, to_executor),);
                        };
                        tokio::select! {
                            () = forward => {}
                            () = cut.cancelled() => {}
                            () = stop.cancelled() => {}
                        }
                    });
                }
            }
        });
        Self { address, inner, stop }
    }

    /// Cuts every connection there is now; later ones are forwarded.
    pub fn cut(&self) {
        self.inner.cut();
    }

    /// Cuts every connection when so many more bytes have passed.
    pub fn cut_after(&self, bytes: usize) {
        self.inner.bytes_left.store(bytes, Ordering::SeqCst);
    }

    /// How often connections were cut.
    pub fn cuts(&self) -> usize {
        self.inner.cuts.load(Ordering::SeqCst)
    }
}

impl Inner {
    fn cut(&self) {
        let former = std::mem::take(&mut *self.connections.lock().unwrap());
        self.cuts.fetch_add(1, Ordering::SeqCst);
        former.cancel();
    }

    async fn copy(&self, mut from: impl AsyncReadExt + Unpin, mut to: impl AsyncWriteExt + Unpin) {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(length @ 1..) = from.read(&mut buffer).await {
            let left = self.bytes_left.load(Ordering::SeqCst);
            if left > 0 {
                self.bytes_left.store(left.saturating_sub(length), Ordering::SeqCst);
                if left <= length {
                    self.cut();
                    return;
                }
            }
            if to.write_all(&buffer[..length]).await.is_err() {
                return;
            }
        }
        let _ = to.shutdown().await;
    }
}

impl Proxy {
    /// Cuts every connection, and those that come, until [`Self::open`].
    pub fn shut(&self) {
        self.inner.shut.store(true, Ordering::SeqCst);
        self.cut();
    }

    pub fn open(&self) {
        self.inner.shut.store(false, Ordering::SeqCst);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}
