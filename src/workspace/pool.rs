//! Executor → ready client, for one workspace. A client that was lost is opened again by the next call, in the executor
//! session of the one before where the executor still has it.
//!
//! Two clients per executor: one for processes, one for files, so that a long file transfer never stands before the
//! start of a command (executors carry out the requests of one stream in order).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::{ReachError, Workspace};
use crate::protocol::ids::ExecutorId;
use crate::protocol::rpc::ExecutorSessionId;
use crate::relay::client::{CallError, Client, ConnectError};
use crate::relay::conversation::HandshakeError;
use crate::relay::stream::{StreamEnd, StreamKind};
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

/// Pause between two tries to reach an executor again.
const RETRY_PAUSE: Duration = Duration::from_millis(100);
const RETRY_PAUSE_MAX: Duration = Duration::from_secs(2);

type Dial = Shared<BoxFuture<'static, Result<Client, Arc<ReachError>>>>;

/// The ready clients of one workspace: at most two for each of its executors.
#[derive(Default)]
pub struct Pool {
    slots: Mutex<HashMap<(ExecutorId, Use), Slot>>,
}

#[derive(Default)]
struct Slot {
    dial: Option<Dial>,
    /// The executor session of the last client.
    session: Option<ExecutorSessionId>,
    /// Cancelled when the workspace may no longer reach the executor.
    withdrawn: CancellationToken,
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

    /// The client after one that was lost, in the same executor session if [`Client::continues`] says so. Tries until
    /// there is one, so the caller must bound the wait; `None` when the right to it was taken away or the gateway
    /// stops.
    pub async fn successor(
        workspace: &Arc<Workspace>,
        binding: &Binding,
        purpose: Use,
        lost: &Client,
    ) -> Option<Client> {
        let found = async {
            lost.ended().await;
            let mut pause = RETRY_PAUSE;
            loop {
                match Self::client(workspace, binding, purpose).await {
                    Ok(client) => return Some(client),
                    Err(error) if matches!(*error, ReachError::NoEnvironment(_)) => return None,
                    Err(error) => tracing::debug!(executor = %binding.executor(), %error, "not reached again yet"),
                }
                sleep(pause).await;
                pause = (pause * 2).min(RETRY_PAUSE_MAX);
            }
        };
        tokio::select! {
            biased;
            () = lost.closed() => None,
            () = workspace.corridor().stop.cancelled() => None,
            found = found => found,
        }
    }

    fn dial(&self, workspace: &Arc<Workspace>, binding: &Binding, purpose: Use) -> Dial {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = slots.entry((binding.executor().clone(), purpose)).or_default();
        if let Some(dial) = &slot.dial {
            match dial.peek() {
                None => return dial.clone(),
                Some(Ok(client)) if !client.is_ended() => return dial.clone(),
                Some(Ok(client)) => slot.session = client.session().cloned(),
                Some(Err(_)) => {}
            }
        }
        let opening = open(workspace.clone(), binding.clone(), slot.session.clone(), slot.withdrawn.clone());
        let task = tokio::spawn(opening);
        let dial = async move { task.await.unwrap_or_else(|_| Err(Arc::new(ReachError::Failed))) };
        slot.dial.insert(dial.boxed().shared()).clone()
    }

    /// Ends the clients of an executor that this workspace may no longer reach, with the calls on them and those that
    /// wait for a successor. Their executor sessions are forgotten.
    pub fn close_executor(&self, executor: &ExecutorId) {
        self.close_where(|of| of == executor);
    }

    /// Ends all clients, as [`Self::close_executor`] does.
    pub fn close_all(&self) {
        self.close_where(|_| true);
    }

    fn close_where(&self, wanted: impl Fn(&ExecutorId) -> bool) {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner).retain(|(executor, _), slot| {
            let close = wanted(executor);
            if close {
                slot.withdrawn.cancel();
            }
            !close
        });
    }
}

/// Opens a conversation, in the former executor session if there is one and the executor still has it.
async fn open(
    workspace: Arc<Workspace>,
    binding: Binding,
    former: Option<ExecutorSessionId>,
    withdrawn: CancellationToken,
) -> Result<Client, Arc<ReachError>> {
    let opening = async {
        check(&workspace, &binding).await?;
        let client = resume_or_begin(&workspace, &binding, former, &withdrawn).await?;
        // The right may have been taken away while the conversation was being opened.
        check(&workspace, &binding).await?;
        Ok(client)
    };
    let opened = tokio::select! {
        biased;
        () = withdrawn.cancelled() => Err(ReachError::NoEnvironment(binding.name().to_string())),
        opened = opening => opened,
    };
    opened.map_err(Arc::new)
}

/// Whether the workspace's environment of that name is still this executor.
async fn check(workspace: &Workspace, binding: &Binding) -> Result<(), ReachError> {
    let name = binding.name().as_str();
    let now = workspace.environment(name).await?;
    if now.executor() == binding.executor() { Ok(()) } else { Err(ReachError::NoEnvironment(name.to_owned())) }
}

/// A conversation cut off by the loss of its link is opened again, on the link that follows: nothing has reached the
/// executor yet.
async fn resume_or_begin(
    workspace: &Workspace,
    binding: &Binding,
    mut resume: Option<ExecutorSessionId>,
    withdrawn: &CancellationToken,
) -> Result<Client, ReachError> {
    let environment = || binding.name().to_string();
    let mut tries = 0;
    loop {
        let stream = workspace.open_own_stream(binding, StreamKind::Call).await?;
        let error = match workspace.connect(stream, resume.clone(), withdrawn.child_token()).await {
            Ok(client) => return Ok(client),
            Err(error) => error,
        };
        match &error {
            ConnectError::Initialize(CallError::Rpc(_)) if resume.is_some() => {
                resume = None;
                continue;
            }
            ConnectError::Handshake(HandshakeError::Ended(StreamEnd::Disconnected))
            | ConnectError::Initialize(CallError::Lost { .. }) => {
                tries += 1;
                if tries < OPEN_TRIES {
                    continue;
                }
            }
            _ => {}
        }
        if let ConnectError::Handshake(HandshakeError::Ended(StreamEnd::Disconnected)) = error {
            return Err(ReachError::NotConnected(environment()));
        }
        tracing::warn!(executor = %binding.executor(), %error, "no conversation with the executor");
        return Err(ReachError::Unreachable { environment: environment(), source: Arc::new(error) });
    }
}
