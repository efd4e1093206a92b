//! A body that is written while it is sent: what its client takes makes room for what comes next.
//!
//! Owned by two: the writer and the answer. A writer that is dropped before its end breaks the answer off, so no client
//! takes a part for the whole.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http_body_util::BodyExt;
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use tokio::sync::mpsc;

use super::body::{Body, BrokenOff};

/// The end into which bytes are written.
pub struct PipeWriter {
    pieces: mpsc::Sender<Piece>,
    /// Whether the reader took everything.
    taken: Arc<AtomicBool>,
}

/// The body of an answer.
pub struct PipedBody {
    pieces: mpsc::Receiver<Piece>,
    /// Bytes still to come, where the size is known.
    left: Option<u64>,
    taken: Arc<AtomicBool>,
    /// Polled and dropped with the body.
    pump: Option<BoxFuture<'static, ()>>,
    /// Nothing more comes, and it is not whole.
    broken: bool,
}

enum Piece {
    Bytes(Bytes),
    End,
}

/// A pipe with room for so many pieces. The body has `bytes` bytes, where that is known before.
pub fn pipe(pieces: usize, bytes: Option<u64>) -> (PipeWriter, PipedBody) {
    let (sender, receiver) = mpsc::channel(pieces);
    let taken = Arc::new(AtomicBool::new(bytes == Some(0)));
    let writer = PipeWriter { pieces: sender, taken: taken.clone() };
    (writer, PipedBody { pieces: receiver, left: bytes, taken, pump: None, broken: false })
}

impl PipeWriter {
    /// Waits for room and adds a piece.
    ///
    /// # Errors
    /// [`BrokenOff`] when the reader has left.
    pub async fn write(&self, piece: Bytes) -> Result<(), BrokenOff> {
        self.pieces.send(Piece::Bytes(piece)).await.map_err(|_| BrokenOff)
    }

    /// Says that the body is whole.
    ///
    /// # Errors
    /// [`BrokenOff`] when the reader has left before.
    pub async fn end(&self) -> Result<(), BrokenOff> {
        let sent = self.pieces.send(Piece::End).await;
        // A reader that knows the size leaves with the last byte.
        if sent.is_ok() || self.is_taken() { Ok(()) } else { Err(BrokenOff) }
    }

    /// As [`Self::end`], and returns when the reader is done.
    ///
    /// # Errors
    /// [`BrokenOff`] when the reader has left before it took everything.
    pub async fn finish(self) -> Result<(), BrokenOff> {
        self.end().await?;
        self.left().await;
        if self.is_taken() { Ok(()) } else { Err(BrokenOff) }
    }

    /// Returns when the reader has left, be it before the end or after.
    pub async fn left(&self) {
        self.pieces.closed().await;
    }

    /// Becomes true once the reader has taken everything.
    pub fn taken(&self) -> Arc<AtomicBool> {
        self.taken.clone()
    }

    fn is_taken(&self) -> bool {
        self.taken.load(Ordering::Acquire)
    }
}

impl PipedBody {
    /// The body of an answer.
    pub fn boxed(self) -> Body {
        self.boxed_unsync()
    }

    /// The same, with `pump` at work whenever the answer is asked for more: it fills the pipe, or watches over it and
    /// breaks it off by its end.
    pub fn pumped_by(mut self, pump: impl Future<Output = ()> + Send + 'static) -> Body {
        self.pump = Some(Box::pin(pump));
        self.boxed()
    }
}

impl HttpBody for PipedBody {
    type Data = Bytes;
    type Error = BrokenOff;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BrokenOff>>> {
        let this = &mut *self;
        if let Some(pump) = &mut this.pump
            && pump.as_mut().poll(context).is_ready()
        {
            this.pump = None;
        }
        if this.broken {
            return Poll::Ready(Some(Err(BrokenOff)));
        }
        let piece = ready!(this.pieces.poll_recv(context));
        Poll::Ready(match piece {
            Some(Piece::Bytes(bytes)) => {
                this.left = this.left.map(|left| left.saturating_sub(bytes.len() as u64));
                if this.left == Some(0) {
                    this.taken.store(true, Ordering::Release);
                }
                Some(Ok(Frame::data(bytes)))
            }
            Some(Piece::End) if this.left.is_none_or(|left| left == 0) => {
                this.taken.store(true, Ordering::Release);
                None
            }
            Some(Piece::End) | None => {
                // An error has the connection drop what it has not written yet: it is given a moment for that.
                this.broken = true;
                context.waker().wake_by_ref();
                return Poll::Pending;
            }
        })
    }

    fn is_end_stream(&self) -> bool {
        self.left == Some(0)
    }

    fn size_hint(&self) -> SizeHint {
        self.left.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    const HALF: Bytes = Bytes::from_static(b"half");

    #[tokio::test]
    async fn what_is_written_and_ended_arrives_whole() {
        for bytes in [None, Some(8)] {
            let (writer, body) = pipe(1, bytes);
            let written = async {
                writer.write(HALF).await.unwrap();
                writer.write(HALF).await.unwrap();
                writer.finish().await
            };
            let (written, read) = tokio::join!(written, body.collect());
            assert_eq!((written, read.unwrap().to_bytes()), (Ok(()), Bytes::from_static(b"halfhalf")), "{bytes:?}");
        }
    }

    #[tokio::test]
    async fn a_writer_that_leaves_in_the_middle_breaks_the_body_off() {
        for bytes in [None, Some(8)] {
            let (writer, body) = pipe(2, bytes);
            writer.write(HALF).await.unwrap();
            drop(writer);
            assert_eq!(body.collect().await.map(|_| ()), Err(BrokenOff), "{bytes:?}");
        }
        let (writer, body) = pipe(2, Some(8));
        writer.write(HALF).await.unwrap();
        writer.end().await.unwrap();
        assert_eq!(body.collect().await.map(|_| ()), Err(BrokenOff), "an end before its time");
    }

    #[tokio::test]
    async fn a_reader_that_leaves_in_the_middle_is_told_to_the_writer() {
        let (writer, mut body) = pipe(1, Some(8));
        writer.write(HALF).await.unwrap();
        assert!(writer.write(HALF).now_or_never().is_none(), "there is room for one piece");
        body.frame().await.unwrap().unwrap();
        drop(body);
        assert_eq!((writer.write(HALF).await, writer.finish().await), (Err(BrokenOff), Err(BrokenOff)));
    }

    #[tokio::test]
    async fn a_pump_works_only_while_the_body_is_read() {
        let (writer, body) = pipe(1, None);
        let body = body.pumped_by(async move {
            writer.write(HALF).await.unwrap();
            writer.write(HALF).await.unwrap();
            writer.end().await.unwrap();
        });
        assert_eq!(body.collect().await.unwrap().to_bytes(), "halfhalf");
    }
}
