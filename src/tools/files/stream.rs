//! A file as a stream of bytes, for callers who have more of it than a tool call carries.
//!
//! Owned by a door: it moves the bytes from or to its caller, as fast as that goes.

use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::growing::{Blocks, Place, grow, verified};
use super::reading::{Snapshot, pour};
use super::staging::{Change, Expect, Outcome, Put, commit};
use super::write_file::permissions;
use super::{Attempts, Failure, FileError};
use crate::store::Binding;
use crate::tools::{Call, Site, resolve};

/// How long one may take: what is slow is honest as long as it goes on, and what does not is noticed by the ends.
const STREAM_MAX: Duration = Duration::from_secs(7 * 86_400);

/// A file to be read.
pub struct Download {
    call: Call,
    binding: Binding,
    file: Snapshot,
}

impl Download {
    /// Looks at the file.
    ///
    /// # Errors
    /// [`FileError`].
    pub async fn of(call: Call, binding: Binding, path: &str) -> Result<Self, FileError> {
        let site = Site { call: &call, binding: &binding };
        let mut attempts = Attempts::harmless(site, call.deadline(None)?).await?;
        let file = loop {
            let attempt = async {
                let client = attempts.client();
                Snapshot::of(client, &resolve(client.environment(), "path", path)?).await
            };
            let attempt = attempt.await;
            if let Some(found) = attempts.over(attempt).await {
                break found?;
            }
        };
        Ok(Self { call, binding, file })
    }

    /// Bytes of the file; unknown for those that tell none, as of /proc, and for empty ones.
    pub fn size(&self) -> Option<u64> {
        Some(self.file.size).filter(|size| *size > 0)
    }

    /// What changes with the file: its size, and its time in milliseconds.
    pub fn tag(&self) -> String {
        tag(&self.file)
    }

    /// Hands on these bytes of the file until nobody takes them any more; all, where it tells no size.
    ///
    /// # Errors
    /// [`FileError`]; what was handed on is of no use then.
    pub async fn pour(self, range: Range<u64>, into: mpsc::Sender<Bytes>) -> Result<(), FileError> {
        let site = Site { call: &self.call, binding: &self.binding };
        let mut attempts = Attempts::harmless(site, Instant::now() + STREAM_MAX).await?;
        let end = if self.file.size == 0 { u64::MAX } else { range.end };
        pour(&mut attempts, &self.file, range.start..end, &into).await
    }
}

fn tag(file: &Snapshot) -> String {
    format!("{:x}-{:x}", file.size, file.modified_at_ms)
}

/// A file to be written.
pub struct Upload {
    /// The file; relative paths and `~` are taken on the executor.
    pub path: String,
    /// Whether missing directories of it are made.
    pub parents: bool,
    /// Permissions in octal digits; those of the former file when left out.
    pub mode: Option<String>,
    /// The tag or the SHA-256, in hexadecimal digits, of what has to be there; `*` for any file.
    pub if_match: Option<String>,
    /// Whether nothing may be there.
    pub if_none: bool,
}

/// A file that was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uploaded {
    /// Bytes of it.
    pub bytes: u64,
    /// SHA-256 of its content, in hexadecimal.
    pub sha256: String,
    /// Whether every reader saw the former content or the new one.
    pub atomic: bool,
    /// Whether there was no file before.
    pub created: bool,
    /// As of [`Download::tag`].
    pub tag: String,
}

impl Upload {
    /// Writes what comes out of the channel, and puts it in the place of the file once it is whole: it is whole when the
    /// channel ends, so drop this future first where more was to come. Dropping it leaves nothing behind.
    ///
    /// # Errors
    /// [`FileError`]; `changed`, `exists` where something else is there than has to be.
    pub async fn write(
        self,
        call: &Call,
        binding: &Binding,
        content: mpsc::Receiver<Bytes>,
    ) -> Result<Uploaded, FileError> {
        let site = Site { call, binding };
        let mode = permissions(self.mode.clone())?;
        let deadline = Instant::now() + STREAM_MAX;
        let mut attempts = Attempts::harmless(site, deadline).await?;
        let target = resolve(attempts.client().environment(), "path", &self.path)?;
        let expect = match self.if_match.as_deref() {
            _ if self.if_none => Expect::Missing,
            None => Expect::Anything,
            Some(hash) if hash.len() == 64 => Expect::Content(hash.to_owned()),
            Some(_) => Expect::Present,
        };
        let tagged = self.if_match.filter(|_| expect == Expect::Present).filter(|tag| tag != "*");
        let condition = async |attempts: &mut Attempts<'_>| match &tagged {
            None => Ok(()),
            Some(wanted) => loop {
                let attempt = Snapshot::of(attempts.client(), &target).await;
                match attempts.over(attempt).await {
                    None => {}
                    Some(Ok(found)) if tag(&found) == *wanted => return Ok(()),
                    Some(Ok(_)) => {
                        return Err(Failure::new("changed", "the file is another than expected").into());
                    }
                    Some(Err(error)) => return Err::<(), FileError>(error),
                }
            },
        };
        condition(&mut attempts).await?;
        let mut content = Blocks::of(content);
        let place = Place { target: &target, parents: self.parents, mark: None };
        let staged = grow(site, &place, None, &mut content, deadline, |_| {}).await?;
        let (bytes, sha256) = (content.bytes, content.sha256());
        let grown = verified(site, staged, bytes, sha256, deadline).await?;
        // Once more, since that may have taken hours.
        condition(&mut attempts).await?;
        let put = Put { staged: grown.staged, mode, parents: self.parents };
        let change = Change { target: target.clone(), put: Some(put), expect };
        let committed = commit(site, vec![change], call.deadline(None)?).await?.map_err(|refused| refused.failure)?;
        let found = loop {
            let attempt = Snapshot::of(attempts.client(), &target).await;
            if let Some(found) = attempts.over(attempt).await {
                break found?;
            }
        };
        Ok(Uploaded {
            bytes: grown.bytes,
            sha256: grown.sha256,
            atomic: committed.atomic,
            created: committed.outcomes == [Outcome::Created],
            tag: tag(&found),
        })
    }
}
