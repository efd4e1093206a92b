//! A file's content in blocks, read from whatever link there is: the loss of one goes unnoticed, a change of the file
//! does not.
//!
//! Owned by whoever pours it somewhere; it holds a few blocks at a time.

use std::ops::Range;

use bytes::Bytes;
use futures_util::TryStreamExt;
use futures_util::stream::FuturesOrdered;
use tokio::sync::mpsc;

use super::open_file::{BLOCKS_AHEAD, OpenFile};
use super::{Attempts, Failure, FileError, look};
use crate::protocol::path::FileUri;
use crate::protocol::rpc::{BLOCK_BYTES_MAX, OpenMode};
use crate::relay::client::Client;

/// A file as it was when it was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::tools) struct Snapshot {
    /// The file.
    pub(in crate::tools) path: FileUri,
    /// Bytes; files of /proc and the like tell none.
    pub(in crate::tools) size: u64,
    /// Milliseconds since 1970.
    pub(in crate::tools) modified_at_ms: i64,
}

impl Snapshot {
    /// Looks at a file.
    ///
    /// # Errors
    /// [`FileError`]; `not_found`, `is_a_directory`, `not_a_file`.
    pub(in crate::tools) async fn of(client: &Client, path: &FileUri) -> Result<Self, FileError> {
        let found = look(client, path).await?.ok_or_else(|| Failure::new("not_found", "the file does not exist"))?;
        if found.is_directory {
            return Err(Failure::new("is_a_directory", "the path is a directory").into());
        }
        // Opening a pipe or a device could hold up the whole stream at the executor.
        if !found.is_file {
            return Err(Failure::new("not_a_file", "not a regular file").into());
        }
        Ok(Self { path: path.clone(), size: found.size, modified_at_ms: found.modified_at_ms })
    }

    /// Whether it is still so, as far as size and time tell.
    async fn check(&self, client: &Client) -> Result<(), FileError> {
        if Self::of(client, &self.path).await? == *self { Ok(()) } else { Err(changed()) }
    }
}

fn changed() -> FileError {
    Failure::new("changed", "the file was changed while it was read").into()
}

/// Hands on the bytes of that range, in order, or to the end of a file that tells no size; as fast as they are taken, and
/// until nobody takes them any more. The last ones are handed on when the file is seen to be unchanged.
///
/// # Errors
/// [`FileError`]; `changed` when the file is another than it was. What was handed on until then is of no use.
pub(in crate::tools) async fn pour(
    attempts: &mut Attempts<'_>,
    file: &Snapshot,
    range: Range<u64>,
    into: &mpsc::Sender<Bytes>,
) -> Result<(), FileError> {
    let mut at = range.start;
    let mut held = None;
    loop {
        let client = attempts.client().clone();
        let attempt = async {
            if at < range.end || file.size == 0 {
                // Another link may lead to another state of the file, and so may another moment.
                file.check(&client).await?;
                read(&client, attempts, file, &mut at, range.end, &mut held, into).await?;
            }
            file.check(&client).await
        };
        let attempt = attempt.await;
        if let Some(end) = attempts.over(attempt).await {
            end?;
            break;
        }
    }
    if let Some(last) = held {
        // Whoever has left knows it.
        let _ = into.send(last).await;
    }
    Ok(())
}

async fn read(
    client: &Client,
    attempts: &mut Attempts<'_>,
    file: &Snapshot,
    at: &mut u64,
    end: u64,
    held: &mut Option<Bytes>,
    into: &mpsc::Sender<Bytes>,
) -> Result<(), FileError> {
    let open = OpenFile::open(client, &file.path, OpenMode::Read).await?;
    let mut next = *at;
    let mut blocks = FuturesOrdered::new();
    loop {
        while next < end && blocks.len() < BLOCKS_AHEAD {
            let wanted = (end - next).min(BLOCK_BYTES_MAX as u64);
            let block = open.read(next, wanted);
            blocks.push_back(async move { Ok::<_, FileError>((wanted, block.await?)) });
            next += wanted;
        }
        let Some((wanted, block)) = blocks.try_next().await? else { return Ok(()) };
        let bytes = Bytes::from(block.chunk.0);
        let (len, whole) = (bytes.len() as u64, bytes.len() as u64 == wanted);
        *at += len;
        attempts.got_on();
        if let Some(earlier) = held.replace(bytes).filter(|bytes| !bytes.is_empty())
            && into.send(earlier).await.is_err()
        {
            return Ok(());
        }
        match (block.eof, file.size) {
            (true, 0) => return Ok(()),
            // Shorter than it was.
            (true, _) if *at < end => return Err(changed()),
            // Blocks that are already asked for would leave a hole.
            (false, _) if !whole => {
                blocks = FuturesOrdered::new();
                next = *at;
            }
            _ => {}
        }
    }
}
