//! A process started for one call, ended with its whole tree when the call is over before the process is.

use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::{sleep, timeout};

use crate::relay::client::{CallError, Client};
use crate::relay::process_tree::end_tree;
use crate::store::Binding;
use crate::workspace::Workspace;
use crate::workspace::pool::{Pool, Use};

/// How long a process is followed to an executor that is away. It ends what nobody resumes after 80 s by itself
/// (codex-exec-server.md §7.1).
const FOLLOW_WAIT: Duration = Duration::from_secs(80);

/// Pause before an executor is asked again, so that one that breaks every conversation is not asked without end.
const FOLLOW_PAUSE: Duration = Duration::from_millis(200);

/// Ends its process on drop, unless it is [`Process::gone`]: also where the link is lost, by following it to the next.
pub(super) struct Process {
    left: Left,
    running: bool,
}

#[derive(Clone)]
struct Left {
    workspace: Arc<Workspace>,
    binding: Binding,
    client: Client,
    id: String,
}

impl Process {
    /// A process that is about to be started under this id. Made before the request is sent, so that a call dropped
    /// meanwhile ends what it may have started.
    pub(super) fn new(workspace: &Arc<Workspace>, binding: &Binding, client: &Client, id: &str) -> Self {
        let (workspace, binding) = (workspace.clone(), binding.clone());
        Self { left: Left { workspace, binding, client: client.clone(), id: id.to_owned() }, running: true }
    }

    /// It is reached by this client from now on.
    pub(super) fn moved_to(&mut self, client: &Client) {
        self.left.client = client.clone();
    }

    /// The process ended by itself, or with its executor session, or never began.
    pub(super) fn gone(mut self) {
        self.running = false;
    }

    /// Kills the process and all it started; returns when the executor has done so.
    ///
    /// # Errors
    /// [`CallError`] when the executor could not be asked; the attempt goes on in the background.
    pub(super) async fn end(mut self) -> Result<(), CallError> {
        end_tree(&self.left.client, &self.left.id).await?;
        self.running = false;
        Ok(())
    }
}

impl Left {
    async fn end(mut self) -> Result<(), CallError> {
        loop {
            match end_tree(&self.client, &self.id).await {
                Err(CallError::Lost { .. }) => {}
                ended => return ended,
            }
            match Pool::successor(&self.workspace, &self.binding, Use::Processes, &self.client).await {
                Some(next) if next.continues(&self.client) => {
                    self.client = next;
                    // What is only being started is not ended yet by asking for it.
                    if let Err(CallError::Rpc(_)) = self.client.read_process(&self.id, u64::MAX).await {
                        tracing::debug!("a process that may have been started was not");
                    }
                }
                // It went with its executor session, or is the executor's to end when nobody comes for it.
                Some(_) | None => return Ok(()),
            }
            sleep(FOLLOW_PAUSE).await;
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.running {
            return;
        }
        let Ok(runtime) = Handle::try_current() else { return };
        let left = self.left.clone();
        let ending = async move {
            match timeout(FOLLOW_WAIT, left.end()).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(%error, "a process was left to its executor"),
                Err(_) => tracing::debug!("a process was left to its executor, which is away"),
            }
        };
        self.left.workspace.corridor().endings.spawn_on(ending, &runtime);
    }
}
