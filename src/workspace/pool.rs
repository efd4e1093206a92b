//! Executor → ready client, for one workspace. A client that was lost is opened again by the next call.
//!
//! Two clients per executor: one for processes, one for files, so that a long file transfer never stands before the
//! start of a command (executors carry out the requests of one stream in order).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared};

use super::{ReachError, Workspace};
use crate::protocol::ids::ExecutorId;
use crate::relay::client::{Client, ConnectError};
use crate::relay::conversation::HandshakeError;
use crate::relay::stream::StreamEnd;
use crate::store::Binding;

/// What a client is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Use {
    /// `process/*`
    Processes,
    /// `fs/*`
    Files,
}

/// Links that may be lost one after the other while a conversation is opened.
const OPEN_TRIES: usize = 3;

type Dial = Shared<BoxFuture<'static, Result<Client, Arc<ReachError>>>>;

/// The ready clients of one workspace: at most two for each of its executors.
#[derive(Default)]
pub struct Pool {
    dials: Mutex<HashMap<(ExecutorId, Use), Dial>>,
}

impl Pool {
    /// A ready client, opened on first use. Callers that come while it is being opened wait for the same one; the
    /// opening goes on when one of them leaves.
    ///
    /// # Errors
    /// [`ReachError`]; the next call tries again.
    pub async fn client(
        workspace: &Arc<Workspace>,
        binding: &Binding,
        purpose: Use,
    ) -> Result<Client, Arc<ReachError>> {
        let dial = workspace.pool.dial(workspace, binding, purpose);
        dial.await
    }

    fn dial(&self, workspace: &Arc<Workspace>, binding: &Binding, purpose: Use) -> Dial {
        let mut dials = self.dials.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (binding.executor().clone(), purpose);
        match dials.get(&key) {
            Some(dial) if dial.peek().is_none_or(|done| done.as_ref().is_ok_and(|client| !client.is_ended())) => {
                dial.clone()
            }
            _ => {
                let task = tokio::spawn(open(workspace.clone(), binding.clone()));
                let dial = async move { task.await.unwrap_or_else(|_| Err(Arc::new(ReachError::Failed))) };
                let dial = dial.boxed().shared();
                dials.insert(key, dial.clone());
                dial
            }
        }
    }

    /// Ends the clients of an executor that this workspace may no longer reach, with the calls on them.
    pub fn close_executor(&self, executor: &ExecutorId) {
        self.close_where(|of| of == executor);
    }

    /// Ends all clients, with the calls on them.
    pub fn close_all(&self) {
        self.close_where(|_| true);
    }

    fn close_where(&self, wanted: impl Fn(&ExecutorId) -> bool) {
        self.dials.lock().unwrap_or_else(PoisonError::into_inner).retain(|(executor, _), dial| {
            let close = wanted(executor);
            if close && let Some(Ok(client)) = dial.peek() {
                client.close();
            }
            !close
        });
    }
}

/// Opens a conversation. One cut off by the loss of its link is opened again, on the link that follows: nothing has
/// reached the executor yet.
async fn open(workspace: Arc<Workspace>, binding: Binding) -> Result<Client, Arc<ReachError>> {
    let environment = || binding.name().to_string();
    for _ in 0..OPEN_TRIES {
        match try_open(&workspace, &binding).await? {
            // The right may have been taken away while the conversation was being opened.
            Ok(client) => match workspace.environment(binding.name().as_str()).await {
                Ok(now) if now.executor() == binding.executor() => return Ok(client),
                Ok(_) => return Err(Arc::new(ReachError::NoEnvironment(environment()))),
                Err(error) => return Err(Arc::new(error)),
            },
            Err(ConnectError::Handshake(HandshakeError::Ended(StreamEnd::Disconnected))) => {}
            Err(error) => {
                tracing::warn!(executor = %binding.executor(), %error, "no conversation with the executor");
                return Err(Arc::new(ReachError::Unreachable { environment: environment(), source: Arc::new(error) }));
            }
        }
    }
    Err(Arc::new(ReachError::NotConnected(environment())))
}

async fn try_open(workspace: &Workspace, binding: &Binding) -> Result<Result<Client, ConnectError>, Arc<ReachError>> {
    let stream = workspace.open_own_stream(binding).await.map_err(Arc::new)?;
    Ok(workspace.connect(stream, None).await)
}
