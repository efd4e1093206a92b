//! What is left of a copy whose gateway was killed, so that the same copy goes on where it was.
//!
//! Staged files carry the mark of their copy in their names. What is found under it is believed only as far as both ends
//! have the same SHA-256 of it.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

use tokio::time::Instant;

use super::copy_path::{End, digest_of};
use super::growing::{BLOCK, join, sum};
use super::open_file::BLOCKS_AHEAD;
use super::reading::Snapshot;
use super::staging::{Leftover, PREFIX, Staged, directory_for};
use super::{Attempts, FileError, look};
use crate::protocol::path::FileUri;
use crate::protocol::rpc::FsReadDirectory;
use crate::tools::Site;

/// The copies of one workspace that are under way, by their marks.
#[derive(Debug, Default)]
pub struct Copies(Mutex<HashSet<String>>);

/// What tells a copy from all others: its ends, and the state of its source. Nobody else has it as long as it lives.
pub(super) struct Mark<'a> {
    mark: String,
    copies: &'a Copies,
}

impl<'a> Mark<'a> {
    /// The mark of a copy; none while the same copy is under way already, which then shares nothing with this one.
    pub(super) fn of(source: Site<'a>, file: &Snapshot, destination: Site<'_>, to: &FileUri) -> Option<Self> {
        let state = format!("{} {}", file.size, file.modified_at_ms);
        Self::new(source, destination, &[file.path.as_str(), &state, to.as_str()])
    }

    /// The same for a copy with other facts.
    pub(super) fn new(source: Site<'a>, destination: Site<'_>, facts: &[&str]) -> Option<Self> {
        let workspace = &source.call.workspace;
        let ends =
            [workspace.id().as_str(), source.binding.executor().as_str(), destination.binding.executor().as_str()];
        let mark = digest_of(ends.into_iter().chain(facts.iter().copied()));
        let copies = &workspace.copies;
        let new = copies.0.lock().unwrap_or_else(PoisonError::into_inner).insert(mark.clone());
        new.then_some(Self { mark, copies })
    }

    /// As it stands in names.
    pub(super) fn as_str(&self) -> &str {
        &self.mark
    }
}

impl Drop for Mark<'_> {
    fn drop(&mut self) {
        self.copies.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.mark);
    }
}

/// Names in the directory of a target that carry the mark: what stands behind it, and the place.
pub(super) async fn marked(
    mark: &Mark<'_>,
    destination: End<'_>,
    to: &FileUri,
    deadline: Instant,
) -> Result<Vec<(String, FileUri)>, FileError> {
    let mut attempts = destination.attempts(deadline).await?;
    let prefix = format!("{PREFIX}{}.", mark.as_str());
    loop {
        let attempt = async {
            let directory = directory_for(attempts.client(), to, false).await?;
            let listed = attempts.client().call(&FsReadDirectory { path: directory.clone() }).await?;
            let names = listed.entries.into_iter().map(|entry| entry.file_name);
            let found = names.filter_map(|name| Some((name.strip_prefix(&prefix)?.to_owned(), directory.child(&name))));
            Ok(found.collect())
        };
        let attempt = attempt.await;
        if let Some(found) = attempts.over(attempt).await {
            return found.map_err(|error| destination.says(error));
        }
    }
}

/// What is staged of this copy already, and how many of its bytes are good. What is of no use is removed.
pub(super) async fn taken_up(
    mark: &Mark<'_>,
    source: End<'_>,
    file: &Snapshot,
    destination: End<'_>,
    to: &FileUri,
    deadline: Instant,
) -> Result<Option<(Staged, u64)>, FileError> {
    let found = marked(mark, destination, to, deadline).await?;
    if found.is_empty() {
        return Ok(None);
    }
    let mut attempts = destination.attempts(deadline).await?;
    let (mut whole, mut parts) = (None, Vec::new());
    for (name, path) in found {
        let size = size(&mut attempts, &path).await.map_err(|error| destination.says(error))?;
        let staged = Staged::from(Leftover::at(destination.site, attempts.client(), path));
        match name.split('.').next().map(str::parse::<u64>) {
            Some(Ok(start)) => parts.push((start * BLOCK, size, staged)),
            // Of several, which one killed gateway cannot leave, any will do.
            Some(Err(_)) => whole = Some((staged, confirmed(size))),
            None => {}
        }
    }
    let Some((whole, mut at)) = whole else { return Ok(None) };
    parts.sort_by_key(|(start, ..)| *start);
    let checked = async {
        for (start, size, part) in parts {
            if start <= at {
                join(destination.site, &whole, part, start, deadline).await?;
                at = at.max(start + confirmed(size));
            }
        }
        let at = at.min(confirmed(file.size));
        if at == 0 {
            return Ok(None);
        }
        let there = sum(destination.site, whole.path(), Some(at / BLOCK), deadline);
        let here = sum(source.site, &file.path, Some(at / BLOCK), deadline);
        let (there, here) = tokio::try_join!(there, here)?;
        Ok::<_, FileError>((there == here).then_some(at))
    };
    match checked.await {
        Ok(good) => Ok(good.map(|at| (whole, at))),
        // The copy can do without.
        Err(FileError::Failed(failure)) => {
            tracing::debug!(%failure, "what is left of a copy is of no use");
            Ok(None)
        }
        Err(error) => Err(destination.says(error)),
    }
}

/// What of a staged file of that size was surely written: its writer had a few blocks under way at most.
fn confirmed(size: u64) -> u64 {
    (size / BLOCK).saturating_sub(BLOCKS_AHEAD as u64) * BLOCK
}

async fn size(attempts: &mut Attempts<'_>, path: &FileUri) -> Result<u64, FileError> {
    loop {
        let attempt = look(attempts.client(), path).await;
        if let Some(found) = attempts.over(attempt).await {
            return Ok(found?.map_or(0, |found| found.size));
        }
    }
}
