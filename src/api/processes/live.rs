//! Live: one caller's stream over a session, whether as events or attached: its right, its place, its way through the
//! output.
//!
//! Owned by the task or the body that feeds the caller. It holds one page at a time and reads the next only when asked,
//! so a slow caller keeps nobody waiting but itself. It never writes to the session.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use tokio::sync::watch;
use zeroize::Zeroizing;

use crate::api::Api;
use crate::api::error::ApiError;
use crate::auth::{AuthError, Principal};
use crate::journal::Page;
use crate::ops::metrics::Held;
use crate::session::view::read;
use crate::session::{Place, Session, Status};

/// Output read at once for a live stream, in bytes: enough to make reading cheap, little enough to hold for each of
/// many streams.
const PAGE_BYTES: usize = 256 * 1024;

/// A stream that was admitted.
pub(super) struct Live {
    /// Who follows.
    pub(super) principal: Principal,
    /// What it follows.
    pub(super) session: Arc<Session>,
    /// Ready when the stream is to end before the session does.
    pub(super) cut: BoxFuture<'static, Cut>,
    /// Kept as long as the stream is open.
    pub(super) place: (Place, Held),
}

/// Why a stream ends before its session.
#[derive(Debug, Clone)]
pub(super) enum Cut {
    /// The caller's right was taken away, or has come to its end.
    Refused(AuthError),
    /// The gateway restarts; the caller comes back to the next one.
    Draining,
    /// The session was forgotten, with its output.
    Forgotten,
}

impl Live {
    /// Checks the caller's right and takes a place.
    ///
    /// # Errors
    /// [`ApiError`] as on the other doors of a session; 429 `too_many_streams` when no place is left.
    pub(super) async fn admit(api: &Arc<Api>, door: &'static str, id: &str, bearer: &str) -> Result<Self, ApiError> {
        api.refuse_while_draining()?;
        let revocations = api.corridor.auth.revocations();
        let principal = api.corridor.auth.principal(bearer).await?;
        let session = api.sessions.get(principal.workspace(), id)?;
        let place = api.sessions.open_stream(principal.workspace())?;
        let place = (place, Held::one(api.metrics.session_followers.of([door])));
        let cut = {
            let (bearer, session) = (Zeroizing::new(bearer.to_owned()), session.clone());
            let (caller, draining) = (principal.clone(), api.draining.clone());
            async move {
                tokio::select! {
                    biased;
                    refused = revocations.end_of_right(&bearer, &caller) => Cut::Refused(refused),
                    () = session.forgotten() => Cut::Forgotten,
                    () = draining.cancelled_owned() => Cut::Draining,
                }
            }
        };
        Ok(Self { principal, session, cut: Box::pin(cut), place })
    }
}

/// What comes next on the way through a session's output.
pub(super) enum Step {
    /// Something new: records, or a hole, or both.
    Page(Page),
    /// All was read and the process is over.
    Exit,
}

/// A cursor that moves through a session's output, from what was there before to what comes.
pub(super) struct Follow {
    session: Arc<Session>,
    changes: watch::Receiver<Status>,
    since: u64,
    tag: Option<u8>,
}

impl Follow {
    /// Begins behind number `since`, with the stream of that tag or with all.
    pub(super) fn new(session: Arc<Session>, since: u64, tag: Option<u8>) -> Self {
        Self { changes: session.watch(), session, since, tag }
    }

    /// The next step, waited for. Counts as use of the session. Dropping the future loses nothing: the cursor moves
    /// with what is returned.
    ///
    /// # Errors
    /// 503 `store_unavailable` when the output cannot be read.
    pub(super) async fn next(&mut self) -> Result<Step, ApiError> {
        loop {
            // Before the page is read: a process that was over then has nothing to add to it.
            let over = self.changes.borrow_and_update().state.is_final();
            self.session.touch();
            let (journal, since, tag) = (self.session.journal().clone(), self.since, self.tag);
            let page = read(move || journal.page(since, tag, PAGE_BYTES)).await?;
            self.since = page.next_seq;
            if !page.records.is_empty() || page.lost.is_some() {
                return Ok(Step::Page(page));
            }
            if over && page.end {
                return Ok(Step::Exit);
            }
            // The sender lives in the session, which this holds.
            let _ = self.changes.changed().await;
        }
    }
}
