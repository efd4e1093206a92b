//! A file opened at the executor, read and written in blocks so that no single message is large.
//!
//! The handle is closed when this is dropped: executors hold 128 of them per connection.

use std::sync::Arc;

use tokio::sync::OwnedSemaphorePermit;

use crate::protocol::path::FileUri;
use crate::protocol::rpc::{BLOCK_BYTES_MAX, Base64Bytes, Block, FsClose, FsOpen, FsReadBlock, FsWriteBlock, OpenMode};
use crate::relay::client::{CallError, Client};

/// Blocks asked for at once: enough to hide the way there and back, few enough to leave the stream to others.
pub(super) const BLOCKS_AHEAD: usize = 3;

/// An open handle.
pub(super) struct OpenFile {
    client: Client,
    handle: Arc<str>,
    open: bool,
    _permit: OwnedSemaphorePermit,
}

impl OpenFile {
    /// Opens the file; waits while the stream has as many open handles as it may.
    pub(super) async fn open(client: &Client, path: &FileUri, mode: OpenMode) -> Result<Self, CallError> {
        let permit = client.file_handles().acquire_owned().await.map_err(|_| CallError::Lost { sent: false })?;
        let handle: Arc<str> = uuid::Uuid::new_v4().simple().to_string().into();
        // Before the request is sent: a call dropped on its way must still close what it may have opened.
        let file = Self { client: client.clone(), handle, open: true, _permit: permit };
        client.call(&FsOpen { handle_id: file.handle.to_string(), path: path.clone(), mode }).await?;
        Ok(file)
    }

    /// Reads up to one block.
    pub(super) async fn read(&self, offset: u64, len: u64) -> Result<Block, CallError> {
        let len = len.min(BLOCK_BYTES_MAX as u64);
        self.client.call(&FsReadBlock { handle_id: self.handle.to_string(), offset, len }).await
    }

    /// Writes one block of at most [`BLOCK_BYTES_MAX`] bytes.
    pub(super) async fn write(&self, offset: u64, chunk: &[u8]) -> Result<(), CallError> {
        let chunk = Base64Bytes(chunk.to_vec());
        self.client.call(&FsWriteBlock { handle_id: self.handle.to_string(), offset, chunk }).await?;
        Ok(())
    }

    /// Closes the handle and waits for the executor to say so: what it could not write it tells here.
    pub(super) async fn close(mut self) -> Result<(), CallError> {
        self.open = false;
        self.client.call(&FsClose { handle_id: self.handle.to_string() }).await?;
        Ok(())
    }
}

impl Drop for OpenFile {
    fn drop(&mut self) {
        if !self.open || self.client.is_ended() {
            return;
        }
        let client = self.client.clone();
        let close = FsClose { handle_id: self.handle.to_string() };
        tokio::spawn(async move { client.call(&close).await });
    }
}
