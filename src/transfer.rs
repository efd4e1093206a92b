//! Transfers: byte pipes between two HTTP clients that hold the same ticket, one sending and one receiving.
//!
//! Owned by the gateway, in memory only. A transfer keeps no bytes but those on their way, opens nothing by itself, and
//! never ends well for one side and badly for the other.
//!
//! ```text
//! created ─► one side waits ─► both met: bytes pass ─► over, when the receiver has everything
//!    ▲            │                  │
//!    └────────────┴──────────────────┘ a side hangs up or fails: both may try again until the ticket ends
//! ```

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sha2::{Digest, Sha256};
use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use zeroize::Zeroizing;

use crate::config::{self, Live};
use crate::edge::body::BrokenOff;
use crate::edge::pipe::{PipeWriter, PipedBody, pipe};
use crate::protocol::ids::{ExecutorId, WorkspaceId};

/// Pieces between the two sides. Each is what one read of the sender's socket gave, `edge.header_bytes_max` at most.
const PIECES: usize = 4;

/// What tickets begin with, as those of the original do (connectors-api.md §3.4).
const TICKET_PREFIX: &str = "rly_";

/// Why a side does not come to its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TransferError {
    /// The ticket is unknown, another workspace's, or has ended.
    #[error("no such transfer")]
    Unknown,
    /// The workspace has as many tickets as it may.
    #[error("the workspace has {0} transfers already")]
    TooMany(usize),
    /// Somebody else is on that side.
    #[error("{0} side already claimed")]
    Claimed(Side),
    /// Nobody came to the other side until the ticket ended.
    #[error("timed out waiting for {0} side")]
    Alone(Side),
    /// The receiver has everything.
    #[error("relay already finished")]
    Over,
    /// The other side came and failed before the first byte.
    #[error("the {0} side failed")]
    Failed(Side),
}

/// One of the two clients, by the method of its request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// It sends.
    Put,
    /// It receives.
    Get,
}

impl std::fmt::Display for Side {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Put => "PUT",
            Self::Get => "GET",
        })
    }
}

/// What a transfer is made for.
#[derive(Debug, Clone)]
pub struct Order {
    /// Whose it is: it ends with the right of this workspace to either executor.
    pub workspace: WorkspaceId,
    /// From where.
    pub source: ExecutorId,
    /// To where.
    pub destination: ExecutorId,
    /// Time for the two sides to meet; within the bounds of the configuration.
    pub ttl: Option<Duration>,
    /// Bytes at most; without end when left out.
    pub bytes_max: Option<u64>,
}

/// A transfer that was made.
pub struct Created {
    /// What its two clients show.
    pub ticket: Zeroizing<String>,
    /// How long they have to meet.
    pub ttl: Duration,
    /// The transfer.
    pub transfer: Arc<Transfer>,
}

/// Every transfer of the gateway.
pub struct Transfers {
    settings: Live<config::Transfers>,
    /// By the digest of the ticket: how long a look-up takes says nothing about tickets.
    table: Mutex<HashMap<[u8; 32], Arc<Transfer>>>,
}

/// One transfer.
pub struct Transfer {
    name: String,
    order: Order,
    ends: Instant,
    /// Cancelled when the right to it is taken away.
    withdrawn: CancellationToken,
    meeting: Mutex<Meeting>,
}

/// Who is there. A side that waits does so by holding a receiver, so one that hung up is seen by its sender.
enum Meeting {
    Nobody,
    Put {
        bytes: Option<u64>,
        met: oneshot::Sender<Upload>,
        wait: Arc<Wait>,
    },
    Get {
        met: oneshot::Sender<Download>,
    },
    /// Until neither side holds its half any more. It is over then if the receiver took everything.
    Both {
        halves: Weak<()>,
        taken: Arc<AtomicBool>,
    },
}

/// How a sender waits for its receiver.
#[derive(Debug, Default)]
pub struct Wait {
    /// Its first bytes fill the room there is, so it is read no further and would not be seen to hang up.
    deaf: AtomicBool,
}

impl Wait {
    /// The sender is read no further.
    pub fn is_deaf(&self) {
        self.deaf.store(true, Ordering::Release);
    }
}

/// The sender's half of a meeting.
pub struct Upload {
    /// Where its bytes go.
    pub writer: PipeWriter,
    _half: Arc<()>,
}

/// The receiver's half of a meeting.
pub struct Download {
    /// What it receives.
    pub body: PipedBody,
    /// To be kept as long as the body.
    pub half: Arc<()>,
}

impl Upload {
    /// Says that all is sent, and returns when the receiver took it.
    ///
    /// # Errors
    /// [`BrokenOff`] when the receiver has left before.
    pub async fn finish(self) -> Result<(), BrokenOff> {
        self.writer.finish().await
    }
}

impl Transfers {
    /// No transfers yet.
    pub fn new(settings: impl Into<Live<config::Transfers>>) -> Self {
        Self { settings: settings.into(), table: Mutex::default() }
    }

    /// Makes a transfer; gives its ticket and how long the two sides have to meet.
    ///
    /// # Errors
    /// [`TransferError::TooMany`].
    pub fn create(&self, order: Order) -> Result<Created, TransferError> {
        let settings = self.settings.now();
        let ttl_max = Duration::from_secs(settings.ticket_ttl_max_secs);
        let ttl = order.ttl.unwrap_or(Duration::from_secs(settings.ticket_ttl_secs)).min(ttl_max);
        let mut random = Zeroizing::new([0; 32]);
        getrandom::fill(&mut *random).expect("the system has random numbers");
        let ticket = Zeroizing::new(format!("{TICKET_PREFIX}{}", URL_SAFE_NO_PAD.encode(*random)));
        let transfer = Transfer {
            name: format!("xfer_{}", uuid::Uuid::new_v4().simple()),
            ends: Instant::now() + ttl,
            withdrawn: CancellationToken::new(),
            meeting: Mutex::new(Meeting::Nobody),
            order,
        };

        let mut table = self.table();
        let now = Instant::now();
        table.retain(|_, known| !known.is_forgotten(now));
        let of_workspace = |known: &&Arc<Transfer>| known.order.workspace == transfer.order.workspace;
        let (over, open): (Vec<_>, Vec<_>) = table.values().filter(of_workspace).partition(|known| known.is_over());
        let max = settings.workspace_max;
        if open.len() >= max {
            return Err(TransferError::TooMany(max));
        }
        // Those are kept only to say so to who comes late.
        if over.len() >= max {
            table.retain(|_, known| !(known.order.workspace == transfer.order.workspace && known.is_over()));
        }
        let transfer = Arc::new(transfer);
        table.insert(digest(&ticket), transfer.clone());
        Ok(Created { ticket, ttl, transfer })
    }

    /// The transfer of a ticket; of this workspace, where the caller shows who it is.
    ///
    /// # Errors
    /// [`TransferError::Unknown`], the same for all that may not be had.
    pub fn find(&self, ticket: &str, workspace: Option<&WorkspaceId>) -> Result<Arc<Transfer>, TransferError> {
        let found = self.table().get(&digest(ticket)).cloned();
        let of_caller = |found: &Arc<Transfer>| workspace.is_none_or(|workspace| *workspace == found.order.workspace);
        let found = found.filter(of_caller).filter(|found| !found.is_forgotten(Instant::now()));
        found.ok_or(TransferError::Unknown)
    }

    /// Ends the transfers of a workspace, of an executor, or of both together, whatever they are at.
    pub fn withdraw(&self, workspace: Option<&WorkspaceId>, executor: Option<&ExecutorId>) {
        self.table().retain(|_, transfer| {
            let Order { workspace: of, source, destination, .. } = &transfer.order;
            let meant = workspace.is_none_or(|workspace| workspace == of)
                && executor.is_none_or(|executor| executor == source || executor == destination);
            if meant {
                transfer.withdrawn.cancel();
            }
            !meant
        });
    }

    /// Transfers that wait for a side, or carry bytes.
    pub fn len(&self) -> usize {
        let now = Instant::now();
        self.table().values().filter(|transfer| !transfer.is_forgotten(now) && !transfer.is_over()).count()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn table(&self) -> MutexGuard<'_, HashMap<[u8; 32], Arc<Transfer>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Transfer {
    /// What it was made for.
    pub fn order(&self) -> &Order {
        &self.order
    }

    /// What records call it; its ticket cannot be told from that.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes it carries at most.
    pub fn bytes_max(&self) -> u64 {
        self.order.bytes_max.unwrap_or(u64::MAX)
    }

    /// Returns once the right to it was taken away.
    pub async fn withdrawn(&self) {
        self.withdrawn.cancelled().await;
    }

    /// Ends it now, for both sides.
    pub fn cut(&self) {
        self.withdrawn.cancel();
    }

    /// The sender comes, with so many bytes where it says so, and waits for the receiver; it reads on meanwhile as
    /// `wait` tells. Dropping the future gives the side up.
    ///
    /// # Errors
    /// [`TransferError`].
    pub async fn put(&self, bytes: Option<u64>, wait: Arc<Wait>) -> Result<Upload, TransferError> {
        let met = {
            let mut meeting = self.meeting();
            match &*meeting {
                Meeting::Put { met, wait, .. } if !met.is_closed() && !wait.deaf.load(Ordering::Acquire) => {
                    return Err(TransferError::Claimed(Side::Put));
                }
                Meeting::Both { .. } => meeting.check(Side::Put)?,
                Meeting::Nobody | Meeting::Put { .. } | Meeting::Get { .. } => {}
            }
            if bytes.is_some_and(|bytes| bytes > self.bytes_max()) {
                // A receiver that waits learns it from its end of the channel.
                *meeting = Meeting::Nobody;
                return Err(TransferError::Failed(Side::Put));
            }
            if let Meeting::Get { met } = std::mem::replace(&mut *meeting, Meeting::Nobody) {
                let (upload, download) = halves(bytes);
                let both = Meeting::both(&upload);
                if met.send(download).is_ok() {
                    *meeting = both;
                    return Ok(upload);
                }
            }
            let (sender, met) = oneshot::channel();
            *meeting = Meeting::Put { bytes, met: sender, wait };
            met
        };
        // Whoever takes the place of one that may have hung up drops its end of the channel.
        self.wait(met, Side::Get, TransferError::Claimed(Side::Put)).await
    }

    /// The receiver comes and waits for the sender; its body knows its size if the sender told it. Dropping the future
    /// gives the side up.
    ///
    /// # Errors
    /// [`TransferError`].
    pub async fn get(&self) -> Result<Download, TransferError> {
        let met = {
            let mut meeting = self.meeting();
            match &*meeting {
                Meeting::Get { met } if !met.is_closed() => return Err(TransferError::Claimed(Side::Get)),
                Meeting::Both { .. } => meeting.check(Side::Get)?,
                Meeting::Nobody | Meeting::Put { .. } | Meeting::Get { .. } => {}
            }
            if let Meeting::Put { bytes, met, .. } = std::mem::replace(&mut *meeting, Meeting::Nobody) {
                let (upload, download) = halves(bytes);
                let both = Meeting::both(&upload);
                if met.send(upload).is_ok() {
                    *meeting = both;
                    return Ok(download);
                }
            }
            let (sender, met) = oneshot::channel();
            *meeting = Meeting::Get { met: sender };
            met
        };
        self.wait(met, Side::Put, TransferError::Failed(Side::Put)).await
    }

    async fn wait<T>(
        &self,
        met: oneshot::Receiver<T>,
        other: Side,
        turned_away: TransferError,
    ) -> Result<T, TransferError> {
        tokio::select! {
            biased;
            met = met => met.map_err(|_| turned_away),
            () = self.withdrawn() => Err(TransferError::Unknown),
            () = tokio::time::sleep_until(self.ends) => Err(TransferError::Alone(other)),
        }
    }

    /// Whether nobody can do anything with it any more. Its holders are told of one that is over until it ends.
    fn is_forgotten(&self, now: Instant) -> bool {
        self.ends <= now && !self.meeting().is_running()
    }

    fn is_over(&self) -> bool {
        matches!(self.meeting().check(Side::Put), Err(TransferError::Over))
    }

    fn meeting(&self) -> MutexGuard<'_, Meeting> {
        self.meeting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Meeting {
    fn both(upload: &Upload) -> Self {
        Self::Both { halves: Arc::downgrade(&upload._half), taken: upload.writer.taken() }
    }

    fn is_running(&self) -> bool {
        matches!(self, Self::Both { halves, .. } if halves.strong_count() > 0)
    }

    /// Whether a further client of that side would be too late.
    fn check(&self, side: Side) -> Result<(), TransferError> {
        match self {
            Self::Both { .. } if self.is_running() => Err(TransferError::Claimed(side)),
            Self::Both { taken, .. } if taken.load(Ordering::Acquire) => Err(TransferError::Over),
            Self::Nobody | Self::Put { .. } | Self::Get { .. } | Self::Both { .. } => Ok(()),
        }
    }
}

fn halves(bytes: Option<u64>) -> (Upload, Download) {
    let (writer, body) = pipe(PIECES, bytes);
    let half = Arc::new(());
    (Upload { writer, _half: half.clone() }, Download { body, half })
}

fn digest(ticket: &str) -> [u8; 32] {
    Sha256::digest(ticket).into()
}
