//! A process's stdin: what of a caller's bytes goes to the executor next, and bringing it there.
//!
//! Bytes are counted from the start of stdin. A write names where it begins, so a repeat is recognised; what was sent
//! and not answered is sent again under the same id and with the same bounds, so the executor writes it once.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use sha2::{Digest, Sha256};
use tokio::time::{Instant, sleep, timeout_at};
use uuid::Uuid;

use super::{Session, StdinMode};
use crate::protocol::rpc::{Base64Bytes, ProcessWrite, WriteStatus};
use crate::relay::client::CallError;
use crate::store::{PendingWrite, Store};

/// A write unanswered for this long means that the process does not read, and that at the executor's default
/// concurrency nothing else of this conversation is answered either (codex-exec-server.md §7.3).
const WRITE_STALL: Duration = Duration::from_secs(5);

/// Pause before a write is sent again.
const RETRY_PAUSE: Duration = Duration::from_millis(200);

/// The id of the write that ends stdin: there is one per process.
const END_WRITE: &str = "end";

/// Bytes of a caller that one write to the executor carries: its base64 line stays below one relay frame, and below
/// what a pipe holds.
pub(super) const PIECE_BYTES: usize = 32 * 1024;

/// A caller's bytes for stdin.
#[derive(Debug, Clone)]
pub struct WriteOrder {
    /// Where they begin; `None` is behind all that was accepted so far.
    pub offset: Option<u64>,
    /// The bytes.
    pub bytes: Bytes,
    /// Whether stdin ends behind them.
    pub eof: bool,
}

/// What became of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// Bytes of stdin accepted by the executor since the start.
    pub accepted: u64,
    /// Whether stdin has ended.
    pub eof: bool,
}

/// Why bytes were not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StdinError {
    /// The process is over, has no stdin, or stdin was ended.
    #[error("stdin is closed")]
    Closed,
    /// The process does not read; what was accepted stays accepted.
    #[error("the process does not read its stdin; {accepted} bytes are accepted")]
    Full {
        /// Bytes accepted since the start.
        accepted: u64,
    },
    /// The write would leave a hole.
    #[error("the write begins at {offset} and {accepted} bytes are accepted")]
    Gap {
        /// Where it begins.
        offset: u64,
        /// Bytes accepted since the start.
        accepted: u64,
    },
    /// A repeat with other bytes than those that may have been written already.
    #[error("bytes from {accepted} on were sent before, and they were others")]
    Changed {
        /// Bytes accepted since the start.
        accepted: u64,
    },
    /// The stdin of this process has no end.
    #[error("the stdin of this session has no end; start it with stdin \"stream\"")]
    Endless,
    /// The executor cannot end stdin and has no shell that could.
    #[error("this executor cannot end stdin")]
    EofUnsupported,
    /// The connection to the executor was lost, and it did not come back.
    #[error("the executor is gone")]
    Lost,
}

/// How bytes stand in a write to the executor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Encoding {
    /// As they are.
    Plain,
    /// A base64 line for the stub that can end stdin.
    Line,
}

impl Encoding {
    /// The chunk that carries these bytes.
    pub(super) fn encode(self, piece: &[u8]) -> Vec<u8> {
        match self {
            Self::Plain => piece.to_vec(),
            Self::Line => {
                let mut line = STANDARD.encode(piece).into_bytes();
                line.push(b'\n');
                line
            }
        }
    }
}

/// What tells the stub that stdin is over.
pub(super) const END_LINE: &[u8] = b".\n";

/// The part of an order that is still to be accepted.
#[derive(Debug)]
pub(super) struct Plan {
    rest: Bytes,
    pub(super) eof: bool,
}

impl Plan {
    /// Cuts off what is accepted already.
    ///
    /// # Errors
    /// [`StdinError::Gap`].
    pub(super) fn new(order: &WriteOrder, accepted: u64) -> Result<Self, StdinError> {
        let offset = order.offset.unwrap_or(accepted);
        let Some(known) = accepted.checked_sub(offset) else { return Err(StdinError::Gap { offset, accepted }) };
        let known = usize::try_from(known).unwrap_or(usize::MAX).min(order.bytes.len());
        Ok(Self { rest: order.bytes.slice(known..), eof: order.eof })
    }

    /// The next bytes to send, with what is to be stored before they are sent. A write that was not answered keeps its
    /// id and its bounds.
    ///
    /// # Errors
    /// [`StdinError::Changed`] when the bytes are not those of the write that was not answered.
    pub(super) fn next(
        &self,
        accepted: u64,
        pending: Option<&PendingWrite>,
        new_id: impl FnOnce() -> String,
    ) -> Result<Option<(Bytes, PendingWrite)>, StdinError> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let Some(pending) = pending else {
            let piece = self.rest.slice(..self.rest.len().min(PIECE_BYTES));
            let write =
                PendingWrite { id: new_id(), length: piece.len() as u64, digest: Sha256::digest(&piece).into() };
            return Ok(Some((piece, write)));
        };
        let length = usize::try_from(pending.length).unwrap_or(usize::MAX);
        if length > self.rest.len() || Sha256::digest(&self.rest[..length])[..] != pending.digest {
            return Err(StdinError::Changed { accepted });
        }
        Ok(Some((self.rest.slice(..length), pending.clone())))
    }

    /// Takes off what was accepted.
    pub(super) fn accept(&mut self, length: usize) {
        self.rest = self.rest.slice(length..);
    }
}

/// Carries one caller's bytes to the process, over as many conversations as it takes until `until`. Dropping the future
/// begins no further write.
///
/// # Errors
/// [`StdinError`].
pub(super) async fn write(
    session: &Session,
    store: &Store,
    order: WriteOrder,
    until: Instant,
) -> Result<Written, StdinError> {
    let row = session.row();
    let mut plan = Plan::new(&order, row.stdin_accepted)?;
    if plan.rest.is_empty() && row.stdin_eof && order.eof {
        return Ok(Written { accepted: row.stdin_accepted, eof: true });
    }
    if row.stdin_eof || session.request.stdin == StdinMode::None {
        return Err(StdinError::Closed);
    }
    if order.eof && session.request.stdin != StdinMode::Stream {
        return Err(StdinError::EofUnsupported);
    }
    let encoding = if session.stdin_needs_stub() { Encoding::Line } else { Encoding::Plain };
    let new_id = || Uuid::new_v4().simple().to_string();
    loop {
        let row = session.row();
        let Some((piece, pending)) = plan.next(row.stdin_accepted, row.pending_write.as_ref(), new_id)? else { break };
        // Before it is sent: a repeat after a loss must have the same id and bounds.
        session.change(|row| row.pending_write = Some(pending.clone()));
        store.save_session(session.row()).await.map_err(|_| StdinError::Lost)?;
        send(session, &pending.id, encoding.encode(&piece), until).await?;
        session.change(|row| {
            row.stdin_accepted += pending.length;
            row.pending_write = None;
        });
        plan.accept(piece.len());
    }
    if plan.eof {
        send(session, END_WRITE, END_LINE.to_vec(), until).await?;
        session.change(|row| row.stdin_eof = true);
    }
    store.save_session(session.row()).await.map_err(|_| StdinError::Lost)?;
    let row = session.row();
    Ok(Written { accepted: row.stdin_accepted, eof: row.stdin_eof })
}

/// Sends one chunk until the executor has answered it.
async fn send(session: &Session, id: &str, chunk: Vec<u8>, until: Instant) -> Result<(), StdinError> {
    let mut clients = session.client.subscribe();
    let write = ProcessWrite { process_id: session.row().process, chunk: Base64Bytes(chunk), write_id: id.to_owned() };
    loop {
        let full = StdinError::Full { accepted: session.row().stdin_accepted };
        let client = match timeout_at(until, session.conversation(&mut clients)).await {
            Ok(Some(client)) => client,
            Ok(None) => return Err(StdinError::Closed),
            Err(_) => return Err(StdinError::Lost),
        };
        match timeout_at((Instant::now() + WRITE_STALL).min(until), client.call(&write)).await {
            Ok(Ok(answer)) => match answer.status {
                WriteStatus::Accepted => return Ok(()),
                WriteStatus::Starting => {}
                WriteStatus::StdinClosed | WriteStatus::UnknownProcess | WriteStatus::Other => {
                    return Err(StdinError::Closed);
                }
            },
            Ok(Err(CallError::Rpc(_) | CallError::Malformed(_))) => return Err(StdinError::Closed),
            Ok(Err(CallError::Lost { .. })) => {}
            // The process does not read. Everything else on this conversation hangs behind the write, so it is left;
            // the next one begins with what the executor still answers.
            Ok(Err(CallError::NoAnswer)) | Err(_) => client.close(),
        }
        if Instant::now() >= until {
            return Err(full);
        }
        sleep(RETRY_PAUSE).await;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn order(offset: Option<u64>, bytes: &'static [u8]) -> WriteOrder {
        WriteOrder { offset, bytes: Bytes::from_static(bytes), eof: false }
    }

    fn id() -> String {
        "w1".into()
    }

    #[test]
    fn a_repeat_is_cut_at_what_was_accepted() {
        let plan = Plan::new(&order(Some(2), b"cdef"), 4).unwrap();
        assert_eq!(plan.next(4, None, id).unwrap().unwrap().0, "ef");
        let plan = Plan::new(&order(Some(0), b"abcd"), 4).unwrap();
        assert!(plan.next(4, None, id).unwrap().is_none());
    }

    #[test]
    fn a_write_behind_a_hole_is_refused() {
        assert_eq!(Plan::new(&order(Some(5), b"x"), 4).unwrap_err(), StdinError::Gap { offset: 5, accepted: 4 });
    }

    #[test]
    fn an_unanswered_write_is_repeated_with_its_bounds_and_id() {
        let first = Plan::new(&order(None, b"abc"), 0).unwrap();
        let (_, pending) = first.next(0, None, id).unwrap().unwrap();
        let again = Plan::new(&order(Some(0), b"abcdef"), 0).unwrap();
        let (piece, write) = again.next(0, Some(&pending), || unreachable!()).unwrap().unwrap();
        assert_eq!((piece, write.id.as_str()), (Bytes::from_static(b"abc"), "w1"));
    }

    #[test]
    fn other_bytes_in_place_of_an_unanswered_write_are_refused() {
        let first = Plan::new(&order(None, b"abc"), 0).unwrap();
        let (_, pending) = first.next(0, None, id).unwrap().unwrap();
        for other in [&b"abX"[..], b"ab"] {
            let again = Plan::new(&order(Some(0), other), 0).unwrap();
            assert_eq!(again.next(0, Some(&pending), id).unwrap_err(), StdinError::Changed { accepted: 0 });
        }
    }

    #[test]
    fn a_line_is_the_same_for_the_same_bytes() {
        assert_eq!(Encoding::Line.encode(b"hi"), b"aGk=\n");
        assert_eq!(Encoding::Plain.encode(b"hi"), b"hi");
    }
}
