//! A content of any size that grows beside the file it is for, over as many links as it takes.
//!
//! It is staged in one piece as long as its link lasts. Executors can only begin a file anew, so after a loss it goes on
//! in parts of [`PART_BYTES`], each joined to the first by a script at the executor: the disk holds one part twice, and
//! what an executor has confirmed is never sent again.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use futures_util::stream::FuturesOrdered;
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::open_file::BLOCKS_AHEAD;
use super::staging::{PREFIX, Staged, content_hash};
use super::{Attempts, Failure, FileError, native};
use crate::protocol::path::FileUri;
use crate::protocol::rpc::BLOCK_BYTES_MAX;
use crate::tools::{Site, ToolError};

/// What goes into one part after the loss of a link.
pub(super) const PART_BYTES: u64 = 64 * 1024 * 1024;

pub(super) const BLOCK: u64 = BLOCK_BYTES_MAX as u64;

/// `$2` is written into `$1` from block `$3` on; done twice it does no harm.
const JOIN: &str = r#"dd if="$2" of="$1" bs=1048576 seek="$3" conv=notrunc && rm -f "$2""#;

/// The SHA-256 of `$1`, or of its first `$2` blocks. What was left beside it by gateways that were killed goes along, when
/// it is a day old.
const SUM: &str = r#"
if [ -z "$2" ]; then
  find "${1%/*}/." ! -name . -prune -name '.exec-gateway-*.part' -mtime +0 -exec rm -rf {} +
fi 2>/dev/null
first() { if [ "$1" ]; then dd bs=1048576 count="$1" 2>/dev/null; else cat; fi; }
sum() { sha256sum 2>/dev/null || shasum -a 256 2>/dev/null || openssl dgst -sha256 -r; }
[ -r "$1" ] && first "$2" <"$1" | sum
"#;

/// The content that is to come.
pub(in crate::tools) struct Blocks {
    pieces: mpsc::Receiver<Bytes>,
    /// Less than a block, while more may come.
    rest: BytesMut,
    hash: Sha256,
    /// Bytes so far.
    pub(in crate::tools) bytes: u64,
}

/// Where a content grows.
pub(in crate::tools) struct Place<'a> {
    /// The file that it is for.
    pub(in crate::tools) target: &'a FileUri,
    /// Whether missing directories of it will be made.
    pub(in crate::tools) parents: bool,
    /// What the names of its staged files say, so that a later call finds them.
    pub(in crate::tools) mark: Option<&'a str>,
}

/// A content that is whole, and as it was sent.
pub(in crate::tools) struct Grown {
    /// It, beside its file.
    pub(in crate::tools) staged: Staged,
    /// How large it is.
    pub(in crate::tools) bytes: u64,
    /// SHA-256 in lower-case hexadecimal.
    pub(in crate::tools) sha256: String,
}

impl Blocks {
    /// What comes out of the channel; it ends with it.
    pub(in crate::tools) fn of(pieces: mpsc::Receiver<Bytes>) -> Self {
        Self { pieces, rest: BytesMut::new(), hash: Sha256::new(), bytes: 0 }
    }

    /// The next block; only the last one is shorter than the others. Dropping the future loses nothing.
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if self.rest.len() >= BLOCK_BYTES_MAX {
                let block = self.rest.split_to(BLOCK_BYTES_MAX).freeze();
                return Some(self.counted(block));
            }
            match self.pieces.recv().await {
                Some(block) if self.rest.is_empty() && block.len() == BLOCK_BYTES_MAX => {
                    return Some(self.counted(block));
                }
                Some(piece) => {
                    self.rest.reserve(BLOCK_BYTES_MAX.max(piece.len()));
                    self.rest.extend_from_slice(&piece);
                }
                None if self.rest.is_empty() => return None,
                None => {
                    let block = std::mem::take(&mut self.rest).freeze();
                    return Some(self.counted(block));
                }
            }
        }
    }

    fn counted(&mut self, block: Bytes) -> Bytes {
        self.hash.update(&block);
        self.bytes += block.len() as u64;
        block
    }

    /// The SHA-256 of what has come.
    pub(in crate::tools) fn sha256(&self) -> String {
        format!("{:x}", self.hash.clone().finalize())
    }
}

/// Stages a content as it comes, after `begun`: what is staged of it already, and how many bytes that are. `acknowledged`
/// is told how many bytes the executor has. Dropping the future removes what is staged.
///
/// # Errors
/// [`FileError`].
pub(in crate::tools) async fn grow(
    site: Site<'_>,
    place: &Place<'_>,
    begun: Option<(Staged, u64)>,
    blocks: &mut Blocks,
    deadline: Instant,
    mut acknowledged: impl FnMut(u64) + Send,
) -> Result<Staged, FileError> {
    let mut attempts = Attempts::harmless(site, deadline).await?;
    let (mut whole, mut at) = match begun {
        Some((staged, at)) => (Some(staged), at),
        None => (None, 0),
    };
    let mut unconfirmed = VecDeque::new();
    loop {
        let start = at;
        let name = place.mark.map(|mark| part_name(mark, whole.is_some().then_some(start)));
        let staging = Staged::begin_as(site, attempts.client(), place.target, place.parents, name.as_deref()).await;
        let Some(staging) = attempts.over(staging).await else { continue };
        let mut part = staging?;
        let until = if whole.is_none() { u64::MAX } else { start + PART_BYTES };
        let filled = async {
            let mut confirmed = |bytes| {
                at += bytes;
                acknowledged(at);
            };
            let ended = fill(&part, start, until, &mut unconfirmed, blocks, &mut confirmed).await?;
            part.finish().await?;
            Ok(ended)
        };
        let filled = filled.await;
        if at > start {
            attempts.got_on();
        }
        let ended = attempts.over(filled).await.transpose()?;
        match &whole {
            None => whole = Some(part),
            Some(whole) if at > start => join(site, whole, part, start, deadline).await?,
            // Nothing of it is confirmed.
            Some(_) => drop(part),
        }
        if let (Some(true), Some(whole)) = (ended, whole.take_if(|_| ended == Some(true))) {
            return Ok(whole);
        }
    }
}

/// What a staged file is called: the whole, or the part that begins at that byte of it. No name is used twice, since
/// what had it before may be about to be removed.
fn part_name(mark: &str, start: Option<u64>) -> String {
    let place = start.map_or_else(|| "whole".to_owned(), |start| (start / BLOCK).to_string());
    format!("{PREFIX}{mark}.{place}.{}.part", uuid::Uuid::new_v4().simple())
}

/// Writes what comes into a staged file that begins at `start` of the content, until that has come to `until`. Says
/// whether the content has ended.
async fn fill(
    staged: &Staged,
    start: u64,
    until: u64,
    unconfirmed: &mut VecDeque<Bytes>,
    blocks: &mut Blocks,
    confirmed: &mut (dyn FnMut(u64) + Send),
) -> Result<bool, FileError> {
    let write = |offset: u64, block: Bytes| async move { staged.write(offset - start, &block).await };
    let (mut writing, mut next, mut ended) = (FuturesOrdered::new(), start, false);
    for block in unconfirmed.iter() {
        writing.push_back(write(next, block.clone()));
        next += block.len() as u64;
    }
    loop {
        let more = !ended && next < until && writing.len() < BLOCKS_AHEAD;
        tokio::select! {
            biased;
            Some(written) = writing.next(), if !writing.is_empty() => {
                written?;
                let block: Bytes = unconfirmed.pop_front().expect("a block for each write");
                confirmed(block.len() as u64);
            }
            block = blocks.next(), if more => match block {
                Some(block) => {
                    unconfirmed.push_back(block.clone());
                    let len = block.len() as u64;
                    writing.push_back(write(next, block));
                    next += len;
                }
                None => ended = true,
            },
            else => return Ok(ended),
        }
    }
}

/// Writes a part into its place in the whole.
pub(super) async fn join(
    site: Site<'_>,
    whole: &Staged,
    part: Staged,
    start: u64,
    deadline: Instant,
) -> Result<(), FileError> {
    let (of, with) = (native(whole.path())?, native(part.path())?);
    let joined = site.script(JOIN, &[&of, &with, &(start / BLOCK).to_string()], deadline).await?;
    match joined {
        // There is no way to put two files together.
        None => Err(ToolError::Lost { ran: crate::protocol::rest::Ran::Unknown }.into()),
        Some(ended) if ended.exit_code == Some(0) => Ok(()),
        Some(ended) => Err(Failure::said(&ended).into()),
    }
}

/// The SHA-256 of a file as its executor has it, or of its first blocks. Without a shell it is read from there.
///
/// # Errors
/// [`FileError`].
pub(in crate::tools) async fn sum(
    site: Site<'_>,
    path: &FileUri,
    blocks: Option<u64>,
    deadline: Instant,
) -> Result<String, FileError> {
    let native = native(path)?;
    let blocks = blocks.map_or(String::new(), |blocks| blocks.to_string());
    if let Some(ended) = site.script(SUM, &[&native, &blocks], deadline).await? {
        let text = String::from_utf8_lossy(&ended.stdout);
        let sum: String = text.chars().take_while(char::is_ascii_hexdigit).collect();
        return if sum.len() == 64 { Ok(sum) } else { Err(Failure::said(&ended).into()) };
    }
    let mut attempts = Attempts::harmless(site, deadline).await?;
    loop {
        let attempt = content_hash(attempts.client(), path).await.map_err(FileError::from);
        if let Some(sum) = attempts.over(attempt).await {
            return sum;
        }
    }
}

/// Checks that what is staged is what was sent.
///
/// # Errors
/// [`FileError`]; `corrupt` when it is not.
pub(in crate::tools) async fn verified(
    site: Site<'_>,
    staged: Staged,
    bytes: u64,
    sha256: String,
    deadline: Instant,
) -> Result<Grown, FileError> {
    if sum(site, staged.path(), None, deadline).await? != sha256 {
        return Err(Failure::new("corrupt", "what arrived is not what was sent").into());
    }
    Ok(Grown { staged, bytes, sha256 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn pieces_of_any_size_become_blocks_of_which_only_the_last_is_short() {
        let (pieces, content) = mpsc::channel(8);
        let mut blocks = Blocks::of(content);
        let bytes: Vec<u8> = (0..3 * BLOCK_BYTES_MAX + 5).map(|nth| (nth % 251) as u8).collect();
        let sent = bytes.clone();
        tokio::spawn(async move {
            let (first, rest) = sent.split_at(BLOCK_BYTES_MAX);
            let _ = pieces.send(Bytes::copy_from_slice(first)).await;
            for piece in rest.chunks(100_001) {
                let _ = pieces.send(Bytes::copy_from_slice(piece)).await;
            }
        });
        let mut received = Vec::new();
        while let Some(block) = blocks.next().await {
            assert!(received.len() % BLOCK_BYTES_MAX == 0, "only the last one is short");
            received.extend_from_slice(&block);
        }
        assert!(received == bytes);
        assert_eq!((blocks.bytes, blocks.sha256()), (bytes.len() as u64, super::super::staging::sha256(&bytes)));
    }
}
