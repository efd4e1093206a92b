//! What callers see of a session: what it is, its output in pages and as text, and its end.
//!
//! Shared by the doors and the tools, so that all of them tell the same. It reads the journal and the row and changes
//! neither.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use base64::display::Base64Display;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use schemars::JsonSchema;
use serde::{Serialize, Serializer};
use serde_json::{Value, json};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use super::{EndSignal, Session, SessionError, Status, StdinError, StdinMode, WriteOrder};
use crate::journal::{JournalError, JournalReader, Lost, Page, Record};
use crate::time::rfc3339;

/// How long an ended process may take to be gone before the answer says only that it was asked.
const END_CONFIRM: Duration = Duration::from_secs(10);

/// Longest grace between interrupt and kill.
const GRACE_MAX: Duration = Duration::from_secs(20);

/// Grace where the caller names none.
const GRACE: Duration = Duration::from_secs(5);

/// Streams of a process: stdout, stderr and that of a terminal.
const TAGS: usize = 3;

/// One session as lists show it.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Description {
    /// Names the process in every call.
    session_id: String,
    /// Where it runs.
    environment: String,
    /// `starting`, `running`, `exited`, `failed`, `lost` or `unknown`.
    state: &'static str,
    /// The caller's own name for it.
    label: Option<String>,
    /// Program and arguments.
    command: Vec<String>,
    /// Whether it has a terminal.
    tty: bool,
    /// What its stdin is.
    stdin: StdinMode,
    /// When it was started (RFC 3339).
    started_at: String,
    /// When it ended (RFC 3339).
    ended_at: Option<String>,
    /// Its exit code, once all output is in.
    exit_code: Option<i32>,
    /// What is known about an end without exit code.
    detail: Option<String>,
    /// Bytes written to stdout, or by the terminal.
    stdout_bytes: u64,
    /// Bytes written to stderr.
    stderr_bytes: u64,
    /// Bytes of stdin that it was given.
    stdin_accepted: u64,
    /// Whether its stdin was ended.
    stdin_eof: bool,
}

/// Which output a caller wants to read.
#[derive(Debug, Clone, Copy)]
pub struct Wish {
    /// What follows this number.
    pub since: u64,
    /// One stream, or all.
    pub tag: Option<u8>,
    /// What follows this byte of the one stream, rather than the number.
    pub offset: Option<u64>,
    /// Bytes at most; the first record is always whole.
    pub bytes_max: usize,
}

impl Session {
    /// The session as lists show it.
    pub fn describe(&self) -> Description {
        let status = self.status();
        let totals = self.journal().totals();
        let bytes = |tag: u8| totals.iter().find(|total| total.tag == tag).map_or(0, |total| total.bytes);
        Description {
            session_id: self.id.to_string(),
            environment: self.environment.clone(),
            state: status.state.as_str(),
            label: self.request.label.clone(),
            command: self.request.argv.clone(),
            tty: self.request.tty,
            stdin: self.request.stdin,
            started_at: rfc3339(self.created_at),
            ended_at: status.ended_at.map(rfc3339),
            exit_code: status.exit_code,
            detail: status.detail,
            stdout_bytes: bytes(0) + bytes(2),
            stderr_bytes: bytes(1),
            stdin_accepted: status.stdin_accepted,
            stdin_eof: status.stdin_eof,
        }
    }

    /// Everything that is known about the end.
    pub fn exit(&self) -> Value {
        let status = self.status();
        let totals: serde_json::Map<String, Value> = self
            .journal()
            .totals()
            .iter()
            .map(|total| {
                let hex = |digest: [u8; 32]| digest.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
                let sums = json!({
                    "bytes": total.bytes,
                    "lost_bytes": total.lost_bytes,
                    "exact": total.exact,
                    "sha256": total.sha256.map(hex),
                });
                (stream_name(total.tag).to_owned(), sums)
            })
            .collect();
        json!({
            "state": status.state.as_str(),
            "exit_code": status.exit_code,
            // 128 + n is how a shell and the executor tell signal n.
            "signal": status.exit_code.filter(|code| (129..=192).contains(code)).map(|code| code - 128),
            "detail": status.detail,
            "streams": totals,
            "started_at": rfc3339(self.created_at),
            "ended_at": status.ended_at.map(rfc3339),
            "duration_ms": duration_ms(self.created_at, status.ended_at),
        })
    }

    /// Bytes of the session, or of one stream of it, that can no longer be read.
    pub fn lost_bytes(&self, tag: Option<u8>) -> u64 {
        let totals = self.journal().totals();
        totals.iter().filter(|total| tag.is_none_or(|tag| total.tag == tag)).map(|total| total.lost_bytes).sum()
    }

    /// The next page, waited for while there is nothing new and the session is not over: until `until`, or until `stop`
    /// ends the wait with an empty page. The status is that before the page was read, so nothing follows the end of a
    /// page with a final one. Counts as use; dropping the future loses nothing.
    ///
    /// # Errors
    /// [`SessionError::Unreadable`].
    pub async fn next_page(
        &self,
        wish: Wish,
        until: Instant,
        stop: &CancellationToken,
    ) -> Result<(Status, Page), SessionError> {
        self.touch();
        let mut changes = self.watch();
        loop {
            let status = changes.borrow_and_update().clone();
            let journal = self.journal().clone();
            let page = read(move || match (wish.tag, wish.offset) {
                (Some(tag), Some(offset)) => journal.page_from(tag, offset, wish.bytes_max),
                _ => journal.page(wish.since, wish.tag, wish.bytes_max),
            })
            .await?;
            let nothing = page.records.is_empty() && page.lost.is_none();
            if nothing && !status.state.is_final() {
                let changed = tokio::select! {
                    changed = timeout_at(until, changes.changed()) => changed.is_ok_and(|changed| changed.is_ok()),
                    () = stop.cancelled() => false,
                };
                if changed {
                    continue;
                }
            }
            self.touch();
            return Ok((status, page));
        }
    }

    /// Bytes for stdin, and whether it ends behind them.
    ///
    /// # Errors
    /// [`StdinError::Endless`] when the end of a stdin is asked for that has none.
    pub fn order(&self, offset: Option<u64>, bytes: Bytes, eof: bool) -> Result<WriteOrder, StdinError> {
        if eof && self.request.stdin != StdinMode::Stream {
            return Err(StdinError::Endless);
        }
        Ok(WriteOrder { offset, bytes, eof })
    }

    /// Asks the process to end and waits a moment for it; the status says whether it has. What was asked goes on when
    /// the future is dropped.
    pub async fn end_soon(self: &Arc<Self>, signal: EndSignal, grace: Duration) -> Status {
        let ending = {
            let session = self.clone();
            tokio::spawn(async move { session.end(signal, grace).await })
        };
        let interrupt = signal == EndSignal::Interrupt;
        let _ = timeout(if interrupt { Duration::from_secs(1) } else { grace + END_CONFIRM }, ending).await;
        self.over(if interrupt { Duration::ZERO } else { END_CONFIRM }).await
    }
}

/// How to end a process, as callers may leave it open: kill at once, or with a grace that has a bound.
pub fn ending(signal: Option<EndSignal>, grace_ms: Option<u64>) -> (EndSignal, Duration) {
    let grace = grace_ms.map_or(GRACE, Duration::from_millis);
    (signal.unwrap_or(EndSignal::Kill), grace.min(GRACE_MAX))
}

/// Reads a journal beside the runtime, so that a slow disk holds up nobody else.
///
/// # Errors
/// [`SessionError::Unreadable`].
pub async fn read<T: Send + 'static>(
    reading: impl FnOnce() -> Result<T, JournalError> + Send + 'static,
) -> Result<T, SessionError> {
    let done = tokio::task::spawn_blocking(reading).await;
    let read = done.unwrap_or_else(|error| Err(JournalError::Disk(std::io::Error::other(error))));
    read.map_err(|error| SessionError::Unreadable(error.into()))
}

/// The output of a page as text, its streams in the order in which they came. A character whose bytes fall on two pages
/// stands on the second one; bytes that are no text are replaced. `over`: nothing follows the page. Reads the journal,
/// which blocks.
///
/// # Errors
/// As the journal's.
pub fn text(journal: &JournalReader, page: &Page, over: bool) -> Result<String, JournalError> {
    let mut text = String::new();
    if let Some(hole) = &page.lost {
        text.push_str(&format!("[output up to number {} is no longer kept]\n", hole.seqs.end.saturating_sub(1)));
    }
    let mut open: [Option<Vec<u8>>; TAGS] = Default::default();
    for record in &page.records {
        let Some(open) = open.get_mut(usize::from(record.tag)) else { continue };
        let mut bytes = match open.take() {
            Some(bytes) => bytes,
            None => unfinished_before(journal, record)?,
        };
        bytes.extend_from_slice(&record.bytes);
        if let Some(gap) = &record.gap {
            let bytes = gap.bytes.map_or("an unknown number of".to_owned(), |bytes| bytes.to_string());
            text.push_str(&format!("\n[{bytes} bytes of output are missing]\n"));
        }
        let rest = bytes.split_off(bytes.len() - unfinished(&bytes));
        text.push_str(&String::from_utf8_lossy(&bytes));
        *open = Some(rest);
    }
    if over {
        open.iter().flatten().for_each(|rest| text.push_str(&String::from_utf8_lossy(rest)));
    }
    Ok(text)
}

/// What the bytes right before a record leave unfinished.
fn unfinished_before(journal: &JournalReader, record: &Record) -> Result<Vec<u8>, JournalError> {
    let from = record.offset.saturating_sub(3);
    if from == record.offset {
        return Ok(Vec::new());
    }
    let mut before = Vec::new();
    for earlier in journal.page_from(record.tag, from, 3)?.records {
        let wanted = record.offset.saturating_sub(earlier.offset);
        before.extend(earlier.bytes.iter().take(usize::try_from(wanted).unwrap_or(usize::MAX)));
    }
    Ok(before.split_off(before.len() - unfinished(&before)))
}

/// How many bytes at the end begin a character of UTF-8 that needs more.
fn unfinished(bytes: &[u8]) -> usize {
    let last = &bytes[bytes.len().saturating_sub(3)..];
    let lead = last.iter().rposition(|byte| byte & 0xc0 != 0x80);
    lead.map_or(0, |lead| match std::str::from_utf8(&last[lead..]) {
        Err(error) if error.error_len().is_none() => last.len() - lead,
        _ => 0,
    })
}

/// What no longer exists between the reader's cursor and the first chunk.
pub fn lost(lost: &Lost) -> Value {
    let resume: serde_json::Map<String, Value> =
        lost.resume.iter().map(|(tag, offset)| (stream_name(*tag).to_owned(), json!(offset))).collect();
    json!({ "from_seq": lost.seqs.start, "to_seq": lost.seqs.end, "resume_offsets": resume })
}

fn stream_name(tag: u8) -> &'static str {
    match tag {
        1 => "stderr",
        2 => "pty",
        _ => "stdout",
    }
}

fn duration_ms(from: SystemTime, to: Option<SystemTime>) -> Option<u64> {
    u64::try_from(to?.duration_since(from).ok()?.as_millis()).ok()
}

/// A record as callers see it. It borrows, since output is the bulk of all that callers are told: each byte goes into the
/// answer once, as base64.
#[derive(Serialize, JsonSchema)]
pub struct Chunk<'a> {
    /// The bytes in base64.
    #[serde(serialize_with = "base64")]
    #[schemars(with = "String")]
    data_b64: &'a [u8],
    /// Stands for bytes that are missing.
    #[serde(skip_serializing_if = "Option::is_none")]
    gap: Option<Missing>,
    /// Where they begin in their stream.
    offset: u64,
    /// The chunk's number.
    seq: u64,
    /// `stdout`, `stderr` or `pty`.
    stream: &'static str,
}

/// What a gap stands for.
#[derive(Serialize, JsonSchema)]
struct Missing {
    /// Bytes, where their number is known.
    bytes: Option<u64>,
    /// Chunks of the executor.
    chunks: u64,
}

impl<'a> From<&'a Record> for Chunk<'a> {
    fn from(record: &'a Record) -> Self {
        Self {
            data_b64: &record.bytes,
            gap: record.gap.map(|gap| Missing { bytes: gap.bytes, chunks: gap.chunks }),
            offset: record.offset,
            seq: record.seq,
            stream: stream_name(record.tag),
        }
    }
}

fn base64<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&Base64Display::new(bytes, &STANDARD))
}

/// The records of a page as callers see them.
pub fn chunks(page: &Page) -> Vec<Chunk<'_>> {
    page.records.iter().map(Chunk::from).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::journal::{Append, Full, Journal, Limits};

    /// The text of a journal with these pieces of stdout and stderr, read in pages of so many bytes.
    fn read_in_pages(pieces: &[(u8, &[u8])], bytes_max: usize) -> String {
        let limits = Limits { memory_bytes_max: 1 << 20, spill_bytes_max: 1 << 20, full: Full::DropOldest };
        let mut journal = Journal::in_memory(1, limits);
        let pieces: Vec<_> = pieces.iter().map(|(tag, bytes)| Append { tag: *tag, mark: 0, bytes }).collect();
        journal.append(&pieces).unwrap();
        let (mut read, mut since) = (String::new(), 0);
        loop {
            let page = journal.reader().page(since, None, bytes_max).unwrap();
            read.push_str(&text(journal.reader(), &page, page.end).unwrap());
            since = page.next_seq;
            if page.end {
                return read;
            }
        }
    }

    #[test]
    fn characters_stay_whole_wherever_chunks_and_pages_end() {
        let text = "a€𝄞ü";
        let pieces: Vec<(u8, &[u8])> = text.as_bytes().chunks(1).map(|byte| (0, byte)).collect();
        for bytes_max in 1..=text.len() {
            assert_eq!(read_in_pages(&pieces, bytes_max), text, "pages of {bytes_max}");
        }
    }

    #[test]
    fn a_stream_between_does_not_break_a_character_of_another() {
        assert_eq!(read_in_pages(&[(0, b"\xe2\x82"), (1, b"err"), (0, b"\xac")], 1), "err€");
    }

    #[test]
    fn bytes_that_are_no_text_are_replaced_and_none_is_left_out() {
        assert_eq!(read_in_pages(&[(0, b"\xff\xfe"), (0, b"x\xe2")], 1), "\u{fffd}\u{fffd}x\u{fffd}");
        assert_eq!(read_in_pages(&[(0, b"\xe2"), (0, b"x")], 1), "\u{fffd}x");
    }
}
