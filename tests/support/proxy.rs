//! A TCP proxy whose connections can be cut, between an executor and its gateway.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

/// Forwards to one address until it is dropped.
pub struct Proxy {
    pub address: SocketAddr,
    connections: Arc<std::sync::Mutex<CancellationToken>>,
    shut: Arc<AtomicBool>,
    stop: CancellationToken,
}

impl Proxy {
    pub async fn to(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let connections = Arc::new(std::sync::Mutex::new(CancellationToken::new()));
        let shut = Arc::new(AtomicBool::new(false));
        let stop = CancellationToken::new();
        tokio::spawn({
            let (connections, shut, stop) = (connections.clone(), shut.clone(), stop.clone());
            async move {
                loop {
                    let accepted = tokio::select! {
                        accepted = listener.accept() => accepted,
                        () = stop.cancelled() => return,
                    };
                    let Ok((mut inner, _)) = accepted else { continue };
                    if shut.load(Ordering::SeqCst) {
                        continue;
                    }
                    let (cut, stop) = (connections.lock().unwrap().clone(), stop.clone());
                    tokio::spawn(async move {
                        let Ok(mut outer) = TcpStream::connect(target).await else { return };
                        tokio::select! {
                            _ = tokio::io::copy_bidirectional(&mut inner, &mut outer) => {}
                            () = cut.cancelled() => {}
                            () = stop.cancelled() => {}
                        }
                    });
                }
            }
        });
        Self { address, connections, shut, stop }
    }

    /// Cuts every connection there is now; later ones are forwarded.
    pub fn cut(&self) {
        let former = std::mem::take(&mut *self.connections.lock().unwrap());
        former.cancel();
    }
}

impl Proxy {
    /// Cuts every connection, and those that come, until [`Self::open`].
    pub fn shut(&self) {
        self.shut.store(true, Ordering::SeqCst);
        self.cut();
    }

    pub fn open(&self) {
        self.shut.store(false, Ordering::SeqCst);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}
