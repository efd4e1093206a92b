//! A socket that is read in large pieces while it has much to say, and has no buffer while it has not.
//!
//! Owned by the WebSocket around it, whose own read buffer is small because thousands of sockets are idle; without
//! this, a megabyte of output would cost hundreds of reads. It never waits for more than is there.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Room for several frames of output. Below the size at which allocators ask the system for each piece anew.
const BURST_BYTES: usize = 64 * 1024;

/// Smallest read that shows a burst when it is filled: what is left of its reader's buffer may be a few bytes.
const ROOM_BYTES_MIN: usize = 512;

/// Reads ahead from `S` during a burst; writing passes through.
#[derive(Debug)]
pub struct BurstRead<S> {
    inner: S,
    /// Empty (and not allocated) outside a burst.
    buffer: Vec<u8>,
    /// What of the buffer holds bytes not handed out yet.
    unread: std::ops::Range<usize>,
}

impl<S> BurstRead<S> {
    /// Wraps a socket of which `read` was read already; allocates nothing.
    pub fn new(inner: S, read: Vec<u8>) -> Self {
        Self { inner, unread: 0..read.len(), buffer: read }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for BurstRead<S> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.unread.is_empty() && this.buffer.len() < BURST_BYTES {
            this.buffer = Vec::new();
            let room = out.remaining();
            ready!(Pin::new(&mut this.inner).poll_read(context, out))?;
            // All room was needed, so there is likely more.
            if out.remaining() == 0 && room >= ROOM_BYTES_MIN {
                this.buffer = vec![0; BURST_BYTES];
            }
            return Poll::Ready(Ok(()));
        }
        if this.unread.is_empty() {
            let mut ahead = ReadBuf::new(&mut this.buffer);
            let read = Pin::new(&mut this.inner).poll_read(context, &mut ahead);
            this.unread = 0..ahead.filled().len();
            if this.unread.is_empty() {
                // Nothing there, the end, or an error: the burst is over.
                this.buffer = Vec::new();
                return read;
            }
        }
        let piece = this.unread.len().min(out.remaining());
        out.put_slice(&this.buffer[this.unread.start..this.unread.start + piece]);
        this.unread.start += piece;
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for BurstRead<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(context, bytes)
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

    #[tokio::test]
    async fn a_burst_arrives_whole_and_leaves_no_buffer_behind() {
        let sent: Vec<u8> = (0..200_000_u32).flat_map(u32::to_le_bytes).collect();
        let (mut peer, socket) = tokio::io::duplex(16 * 1024);
        let mut socket = BurstRead::new(socket, Vec::new());
        let burst = sent.clone();
        let writes = tokio::spawn(async move {
            peer.write_all(&burst).await.unwrap();
            peer
        });

        let mut received = Vec::new();
        let mut piece = [0; 4096];
        let mut largest_buffer = 0;
        while received.len() < sent.len() {
            let read = socket.read(&mut piece).await.unwrap();
            received.extend_from_slice(&piece[..read]);
            largest_buffer = largest_buffer.max(socket.buffer.len());
        }
        assert!(received == sent);
        assert_eq!(largest_buffer, BURST_BYTES);

        let _peer = writes.await.unwrap();
        assert!(futures_util::poll!(std::pin::pin!(socket.read(&mut piece))).is_pending());
        assert_eq!(socket.buffer.capacity(), 0);
    }

    #[tokio::test]
    async fn what_was_read_ahead_is_handed_out_before_the_end() {
        let (mut peer, socket) = tokio::io::duplex(64 * 1024);
        let mut socket = BurstRead::new(socket, b"before".to_vec());
        let sent: Vec<u8> = (0..2 * ROOM_BYTES_MIN + 5).map(|byte| byte as u8).collect();
        peer.write_all(&sent).await.unwrap();
        drop(peer);

        let mut piece = [0; ROOM_BYTES_MIN];
        let mut received = Vec::new();
        loop {
            match socket.read(&mut piece).await.unwrap() {
                0 => break,
                read => received.extend_from_slice(&piece[..read]),
            }
        }
        assert_eq!(received, [b"before", &sent[..]].concat());
        assert_eq!(socket.buffer.capacity(), 0);
    }
}
