//! A file opened at the executor, read and written in blocks so that no single message is large.
//!
//! The handle is closed when this is dropped: executors hold 128 of them per connection.

use std::future::ready;
use std::iter::successors;
use std::pin::pin;
use std::sync::Arc;

use futures_util::stream::{self, Stream, StreamExt, TryStreamExt};
use tokio::sync::OwnedSemaphorePermit;

use crate::protocol::path::FileUri;
use crate::protocol::rpc::{BLOCK_BYTES_MAX, Base64Bytes, Block, FsClose, FsOpen, FsReadBlock, FsWriteBlock, OpenMode};
use crate::relay::client::{CallError, Client};

/// Blocks asked for at once: enough to hide the way there and back, few enough to leave the stream to others.
pub(in crate::tools) const BLOCKS_AHEAD: usize = 3;

/// An open handle.
pub(in crate::tools) struct OpenFile {
    client: Client,
    handle: Arc<str>,
    open: bool,
    _permit: OwnedSemaphorePermit,
}

impl OpenFile {
    /// Opens the file; waits while the stream has as many open handles as it may.
    pub(in crate::tools) async fn open(client: &Client, path: &FileUri, mode: OpenMode) -> Result<Self, CallError> {
        let permit = client.file_handles().acquire_owned().await.map_err(|_| CallError::Lost { sent: false })?;
        let handle: Arc<str> = uuid::Uuid::new_v4().simple().to_string().into();
        // Before the request is sent: a call dropped on its way must still close what it may have opened.
        let file = Self { client: client.clone(), handle, open: true, _permit: permit };
        client.call(&FsOpen { handle_id: file.handle.to_string(), path: path.clone(), mode }).await?;
        Ok(file)
    }

    /// Reads up to one block.
    pub(in crate::tools) async fn read(&self, offset: u64, len: u64) -> Result<Block, CallError> {
        let len = len.min(BLOCK_BYTES_MAX as u64);
        self.client.call(&FsReadBlock { handle_id: self.handle.to_string(), offset, len }).await
    }

    /// Reads `offset..end`, or to the end of the file if that comes first; several blocks are under way at once.
    pub(in crate::tools) async fn read_range(&self, offset: u64, end: u64) -> Result<Vec<u8>, CallError> {
        let mut bytes = Vec::new();
        let mut blocks = pin!(self.blocks(offset, end));
        while let Some(block) = blocks.try_next().await? {
            bytes.extend_from_slice(&block.chunk.0);
        }
        Ok(bytes)
    }

    /// The blocks of `offset..end`, in their order, to the end of the file if that comes first.
    pub(in crate::tools) fn blocks(&self, offset: u64, end: u64) -> impl Stream<Item = Result<Block, CallError>> {
        let starts = successors(Some(offset), |at| at.checked_add(BLOCK_BYTES_MAX as u64));
        let asked = starts.take_while(move |at| *at < end).map(move |at| self.read(at, end - at));
        let mut ended = false;
        stream::iter(asked).buffered(BLOCKS_AHEAD).try_take_while(move |block| {
            let before = std::mem::replace(&mut ended, block.eof);
            ready(Ok(!before))
        })
    }

    /// Writes one block of at most [`BLOCK_BYTES_MAX`] bytes.
    pub(in crate::tools) async fn write(&self, offset: u64, chunk: &[u8]) -> Result<(), CallError> {
        let chunk = Base64Bytes(chunk.to_vec());
        self.client.call(&FsWriteBlock { handle_id: self.handle.to_string(), offset, chunk }).await?;
        Ok(())
    }

    /// Closes the handle and waits for the executor to say so: what it could not write it tells here.
    pub(in crate::tools) async fn close(mut self) -> Result<(), CallError> {
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
