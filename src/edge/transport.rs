//! The bytes of one connection: as they are, or through TLS. Owned by the connection.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;

/// A connection that was accepted.
#[derive(Debug)]
pub enum Transport {
    /// In the open.
    Plain(TcpStream),
    /// Through TLS; boxed, since it holds far more.
    Tls(Box<TlsStream<TcpStream>>),
}

/// Does the same with whatever is inside.
macro_rules! inner {
    ($transport:expr, $inner:ident => $done:expr) => {
        match $transport {
            Transport::Plain($inner) => $done,
            Transport::Tls($inner) => $done,
        }
    };
}

impl AsyncRead for Transport {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        inner!(&mut *self, inner => Pin::new(inner).poll_read(context, out))
    }
}

impl AsyncWrite for Transport {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        inner!(&mut *self, inner => Pin::new(inner).poll_write(context, bytes))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        inner!(&mut *self, inner => Pin::new(inner).poll_write_vectored(context, slices))
    }

    fn is_write_vectored(&self) -> bool {
        inner!(self, inner => inner.is_write_vectored())
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        inner!(&mut *self, inner => Pin::new(inner).poll_flush(context))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        inner!(&mut *self, inner => Pin::new(inner).poll_shutdown(context))
    }
}
