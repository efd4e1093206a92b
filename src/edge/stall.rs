//! A socket whose peer has to go on taking what it is sent: a write that gets nowhere for too long fails.
//!
//! Owned by the connection that writes. It counts progress and not speed, so an honest slow reader keeps its connection.

use std::future::Future;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

/// Fails writes to `S` with [`io::ErrorKind::TimedOut`] once no byte was accepted for `stall_max`; reading passes
/// through.
#[derive(Debug)]
pub struct StallLimit<S> {
    inner: S,
    stall_max: Duration,
    /// There while a write waits.
    stalled: Option<Pin<Box<Sleep>>>,
}

impl<S> StallLimit<S> {
    /// Wraps a socket; allocates only while a write waits.
    pub fn new(inner: S, stall_max: Duration) -> Self {
        Self { inner, stall_max, stalled: None }
    }

    /// The socket without the limit.
    pub fn into_inner(self) -> S {
        self.inner
    }

    fn limit<T>(&mut self, context: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(sleep(self.stall_max)));
        stalled.as_mut().poll(context).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for StallLimit<S> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(context, out)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for StallLimit<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write(context, bytes);
        self.limit(context, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write_vectored(context, slices);
        self.limit(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(context)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    const STALL_MAX: Duration = Duration::from_secs(10);

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_takes_a_little_now_and_then_keeps_its_connection() {
        let (mut peer, socket) = tokio::io::duplex(16);
        let mut socket = StallLimit::new(socket, STALL_MAX);
        let reads = tokio::spawn(async move {
            let mut read = [0; 8];
            for _ in 0..32 {
                sleep(STALL_MAX - Duration::from_secs(1)).await;
                peer.read_exact(&mut read).await.unwrap();
            }
        });
        socket.write_all(&[7; 256]).await.unwrap();
        reads.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_takes_nothing_loses_it() {
        let (_peer, socket) = tokio::io::duplex(16);
        let mut socket = StallLimit::new(socket, STALL_MAX);
        assert_eq!(socket.write(&[7; 256]).await.unwrap(), 16);
        // Silence between two writes is none of the peer's.
        sleep(10 * STALL_MAX).await;
        let failed = socket.write(&[7; 256]).await.unwrap_err();
        assert_eq!(failed.kind(), io::ErrorKind::TimedOut);
    }
}
