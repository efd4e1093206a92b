//! A command run to its end on whatever link, with all its output: what `shell` and the scripts of file tools share.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, timeout, timeout_at};

use super::process::Process;
use super::{Site, ToolError, WayBack};
use crate::protocol::rest::Ran;
use crate::protocol::rpc::{OutputStream, ProcessOutputPage, ProcessStart, RpcError};
use crate::relay::client::{CallError, Client, ProcessEvent, ProcessHandler};
use crate::relay::process_events::{Happened, ProcessEvents};
use crate::workspace::pool::Use;

/// Events kept for one that should come before them; each carries at most 8 KiB.
const EARLY_EVENTS_MAX: usize = 1024;

/// How long the last output of an ended process may take; one that the executor cannot end must not hold the answer.
const LAST_OUTPUT_WAIT: Duration = Duration::from_secs(5);

/// What became of a command.
pub(super) enum Execution {
    /// The executor did not start it.
    Refused(RpcError),
    /// It ran, and nothing of it is left.
    Ended(Ended),
}

/// A command that is over.
pub(super) struct Ended {
    /// What it wrote, a terminal's output included, within the bound.
    pub(super) stdout: Vec<u8>,
    /// What it wrote to its error stream, within the bound.
    pub(super) stderr: Vec<u8>,
    /// Missing where it ran out of time.
    pub(super) exit_code: Option<i32>,
    /// Whether it was killed because its time was up.
    pub(super) timed_out: bool,
    /// Bytes written past the bound.
    pub(super) lost_bytes: u64,
    /// Chunks that the executor no longer had when its link was back.
    pub(super) lost_chunks: u64,
}

/// How far the start has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Start {
    /// No part of it was sent.
    Unsent,
    /// It may have arrived.
    Unanswered,
    /// The process has begun.
    Begun,
}

/// Runs the process to its end; of what it writes, `bytes_max` are kept. Dropping the future ends it with its whole tree.
///
/// # Errors
/// [`ToolError`] where it did not come to an end that is known.
pub(super) async fn execute(
    site: Site<'_>,
    mut client: Client,
    start: &ProcessStart,
    deadline: Instant,
    bytes_max: usize,
) -> Result<Execution, ToolError> {
    let id = &start.process_id;
    let output = Output::new(bytes_max);
    let mut process = Process::new(&site.call.workspace, site.binding, &client, id);
    let mut way = site.way_back(Use::Processes, deadline);
    let mut begun = Start::Unsent;
    let timed_out = loop {
        // Before the start is sent: a quick process is over before its start is answered.
        let _events = client.subscribe(id, output.handler());
        let followed = timeout_at(deadline, follow(&client, start, &mut begun, &output, &mut way)).await;
        let lost = match followed {
            Ok(Ok(())) => {
                process.gone();
                break false;
            }
            // All of it is here; only the answer to the start is not.
            Ok(Err(CallError::Lost { .. })) if output.is_whole() => {
                process.gone();
                break false;
            }
            Ok(Err(CallError::Rpc(refusal))) => {
                process.gone();
                if begun != Start::Begun {
                    return Ok(Execution::Refused(refusal));
                }
                // It is asked for what it has of the process, and has forgotten it.
                return Err(ToolError::Lost { ran: Ran::Unknown });
            }
            Ok(Err(CallError::Lost { sent })) => sent || begun != Start::Unsent,
            Ok(Err(error)) => return Err(error.into()),
            Err(_) if begun == Start::Begun => {
                process.end().await?;
                // Nothing is left that could write; what it has written is still on its way.
                let _ = timeout(LAST_OUTPUT_WAIT, follow(&client, start, &mut begun, &output, &mut way)).await;
                break true;
            }
            Err(_) => return Err(ToolError::NoAnswer { ran: Ran::Unknown }),
        };
        let next = way.find(&client, lost).await?;
        if begun != Start::Unsent && !next.continues(&client) {
            process.gone();
            return Err(ToolError::Lost { ran: Ran::Unknown });
        }
        process.moved_to(&next);
        output.interrupted();
        client = next;
    };
    Ok(Execution::Ended(output.take().ended(timed_out)))
}

/// Starts the process unless that is done, and follows it to its end. After a loss the same start is sent again, or the
/// executor's ring is read, in the same executor session.
async fn follow(
    client: &Client,
    start: &ProcessStart,
    begun: &mut Start,
    output: &Output,
    way: &mut WayBack<'_>,
) -> Result<(), CallError> {
    if *begun != Start::Begun {
        match client.call(start).await {
            Ok(_) => {}
            // It was sent before the link was lost, and had arrived.
            Err(CallError::Rpc(refusal)) if *begun == Start::Unanswered && refusal.is_known_process() => {}
            Err(error) => {
                if let CallError::Lost { sent: true } = error {
                    *begun = Start::Unanswered;
                }
                return Err(error);
            }
        }
        *begun = Start::Begun;
        way.got_on();
    }
    loop {
        let stage = tokio::select! {
            biased;
            stage = output.news() => stage,
            () = client.ended() => return Err(CallError::Lost { sent: true }),
        };
        if stage == Stage::Closed {
            return Ok(());
        }
        output.merge(client.read_process(&start.process_id, output.newest()).await?);
        way.got_on();
    }
}

/// What a process has written so far, filled by the stream's task.
struct Output {
    collected: Arc<Mutex<Collected>>,
    stage: watch::Sender<Stage>,
}

/// Where the output stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// More comes by itself.
    Live,
    /// Something is missing that the executor's ring may still have.
    Behind,
    /// Nothing more will come.
    Closed,
}

#[derive(Default)]
struct Collected {
    events: ProcessEvents,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    bytes_max: usize,
    lost_bytes: u64,
    lost_chunks: u64,
    exit_code: Option<i32>,
    closed: bool,
    /// Whether events may have passed unseen since the newest one.
    interrupted: bool,
    /// Greatest number of an event that there was no room to keep until its turn.
    dropped: u64,
}

impl Output {
    fn new(bytes_max: usize) -> Self {
        let collected = Collected { bytes_max, ..Collected::default() };
        Self { collected: Arc::new(Mutex::new(collected)), stage: watch::Sender::new(Stage::Live) }
    }

    fn handler(&self) -> ProcessHandler {
        let (collected, stage) = (self.collected.clone(), self.stage.clone());
        Box::new(move |event| change(&collected, &stage, |collected| collected.keep(event)))
    }

    /// The link was lost: what comes next is behind something unseen.
    fn interrupted(&self) {
        change(&self.collected, &self.stage, |collected| {
            collected.interrupted = true;
            collected.events.forget_waiting();
        });
    }

    fn merge(&self, page: ProcessOutputPage) {
        change(&self.collected, &self.stage, |collected| collected.merge(page));
    }

    fn newest(&self) -> u64 {
        lock(&self.collected).events.newest()
    }

    fn is_whole(&self) -> bool {
        *self.stage.borrow() == Stage::Closed
    }

    /// Waits until more does not come by itself.
    async fn news(&self) -> Stage {
        // The sender lives in self, so an error cannot happen.
        let mut stage = self.stage.subscribe();
        stage.wait_for(|stage| *stage != Stage::Live).await.map_or(Stage::Closed, |stage| *stage)
    }

    fn take(&self) -> Collected {
        let mut collected = std::mem::take(&mut *lock(&self.collected));
        let rest = collected.events.rest();
        collected.take_in(rest);
        collected
    }
}

fn change(collected: &Mutex<Collected>, stage: &watch::Sender<Stage>, change: impl FnOnce(&mut Collected)) {
    let mut collected = lock(collected);
    change(&mut collected);
    let now = collected.stage();
    // While it is locked, so that an older stage never replaces a newer one.
    stage.send_if_modified(|stage| std::mem::replace(stage, now) != now);
}

fn lock(collected: &Mutex<Collected>) -> MutexGuard<'_, Collected> {
    collected.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Collected {
    fn stage(&self) -> Stage {
        match self {
            Self { closed: true, .. } => Stage::Closed,
            _ if self.interrupted || self.dropped > self.events.newest() => Stage::Behind,
            _ => Stage::Live,
        }
    }

    fn keep(&mut self, event: ProcessEvent) {
        if self.events.waiting() >= EARLY_EVENTS_MAX && event.seq() != self.events.newest() + 1 {
            self.dropped = self.dropped.max(event.seq());
            return;
        }
        self.events.keep(event);
        self.take_in_ready();
    }

    fn merge(&mut self, page: ProcessOutputPage) {
        self.interrupted = false;
        let happened = self.events.merge(page);
        self.take_in(happened);
        self.take_in_ready();
    }

    fn take_in_ready(&mut self) {
        while let Some(event) = self.events.next() {
            self.take_in([event]);
        }
    }

    fn take_in(&mut self, happened: impl IntoIterator<Item = Happened>) {
        for event in happened {
            match event {
                Happened::Output { stream, bytes, .. } => self.add(stream, &bytes),
                Happened::Missing { chunks, .. } => self.lost_chunks += chunks,
                Happened::Exited { code } => self.exit_code = code.or(self.exit_code),
                Happened::Closed => self.closed = true,
            }
        }
    }

    fn add(&mut self, stream: OutputStream, chunk: &[u8]) {
        let room = self.bytes_max.saturating_sub(self.stdout.len() + self.stderr.len());
        let (kept, lost) = chunk.split_at(chunk.len().min(room));
        self.lost_bytes += lost.len() as u64;
        match stream {
            OutputStream::Stderr => self.stderr.extend_from_slice(kept),
            OutputStream::Stdout | OutputStream::Pty => self.stdout.extend_from_slice(kept),
        }
    }

    fn ended(self, timed_out: bool) -> Ended {
        let Self { stdout, stderr, lost_bytes, lost_chunks, .. } = self;
        let exit_code = self.exit_code.filter(|_| !timed_out);
        Ended { stdout, stderr, exit_code, timed_out, lost_bytes, lost_chunks }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::rpc::{Base64Bytes, ProcessChunk, ProcessOutput};

    fn output(seq: u64) -> ProcessEvent {
        let chunk = Base64Bytes(vec![b'x']);
        ProcessEvent::Output(ProcessOutput { process_id: String::new(), seq, stream: OutputStream::Stdout, chunk })
    }

    #[test]
    fn more_than_may_wait_is_fetched_from_the_ring() {
        let mut collected = Collected { bytes_max: 10_000, ..Collected::default() };
        for seq in 2..2000 {
            collected.keep(output(seq));
        }
        assert_eq!((collected.events.waiting(), collected.stage()), (EARLY_EVENTS_MAX, Stage::Behind));
        let chunk = |seq| ProcessChunk { seq, stream: OutputStream::Stdout, chunk: Base64Bytes(vec![b'x']) };
        let page = |seqs: std::ops::Range<u64>| ProcessOutputPage {
            next_seq: seqs.end,
            chunks: seqs.map(chunk).collect(),
            exited: false,
            exit_code: None,
            closed: false,
            failure: None,
            sandbox_denied: false,
        };
        collected.merge(page(1..3));
        assert_eq!((collected.stdout.len(), collected.stage()), (EARLY_EVENTS_MAX + 1, Stage::Behind));
        collected.merge(page(1500..2000));
        assert_eq!((collected.stdout.len(), collected.stage()), (EARLY_EVENTS_MAX + 501, Stage::Live));
        assert_eq!(collected.lost_chunks, 1500 - (EARLY_EVENTS_MAX as u64 + 2));
    }
}
