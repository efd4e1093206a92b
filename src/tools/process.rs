//! A process started for one call, ended with its whole tree when the call is over before the process is.

use crate::relay::client::{CallError, Client};
use crate::relay::process_tree::end_tree;

/// Ends its process on drop, unless it is [`Process::gone`].
pub(super) struct Process {
    client: Client,
    id: String,
    running: bool,
}

impl Process {
    /// A process that is about to be started under this id. Made before the request is sent, so that a call dropped
    /// meanwhile ends what it may have started.
    pub(super) fn new(client: &Client, id: &str) -> Self {
        Self { client: client.clone(), id: id.to_owned(), running: true }
    }

    /// The process ended by itself, or never began.
    pub(super) fn gone(mut self) {
        self.running = false;
    }

    /// Kills the process and all it started; returns when the executor has done so.
    ///
    /// # Errors
    /// [`CallError`] when the executor could not be asked; the attempt goes on in the background.
    pub(super) async fn end(mut self) -> Result<(), CallError> {
        end_tree(&self.client, &self.id).await?;
        self.running = false;
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.running && !self.client.is_ended() {
            let (client, id) = (self.client.clone(), std::mem::take(&mut self.id));
            tokio::spawn(async move {
                if let Err(error) = end_tree(&client, &id).await {
                    tracing::debug!(%error, "a process was left to its executor");
                }
            });
        }
    }
}
