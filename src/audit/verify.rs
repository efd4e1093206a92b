//! Verification: whether the chain is whole, from the oldest record that is kept to the newest.
//! Reads the files and nothing else, so it needs no daemon and disturbs none.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use super::files;
use super::reader::{AuditReader, Line};
use super::record::{Position, Read};

/// A chain without a break.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    /// Number of the oldest record; 0 without any.
    pub first_seq: u64,
    /// The newest record. What was cut off behind it cannot be seen in the files: who kept an earlier one can tell.
    pub head: Position,
    /// Files that hold the records.
    pub files: usize,
    /// Records that could not be written, as the record says itself.
    pub missing: u64,
    /// The newest line is not whole: it is being written, or its writer was killed.
    pub torn: bool,
}

/// The first break of a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Broken {
    /// The file.
    pub file: PathBuf,
    /// The line in it, from 1.
    pub line: u64,
    /// Number of the record that should stand there.
    pub seq: u64,
    /// What is wrong.
    pub why: &'static str,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} line {}, record {}: {}", self.file.display(), self.line, self.seq, self.why)
    }
}

/// Why a chain is not verified.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// It is broken.
    #[error("the audit log is broken at {0}")]
    Broken(Broken),
    /// It cannot be read.
    #[error("the audit log cannot be read")]
    Disk(#[from] io::Error),
}

const NO_RECORD: &str = "this is no record";
const OTHER_NUMBER: &str = "records before this one are missing, or were added";
const OTHER_HASH: &str = "the record before it was changed, or this one was";
const NO_ANCHOR: &str = "older records are gone, and none says that they went";
const TORN: &str = "the line has no end";

/// Checks every record's number and what it hangs on.
///
/// # Errors
/// [`VerifyError::Broken`] with the first break, [`VerifyError::Disk`].
pub fn verify(dir: &Path) -> Result<Verified, VerifyError> {
    loop {
        let oldest = files::list(dir)?.first().copied();
        match verify_from(dir) {
            // The daemon may have let the oldest file go meanwhile, and with it what its successors hung on.
            Err(VerifyError::Broken(_)) if files::list(dir)?.first().copied() != oldest => {}
            result => return result,
        }
    }
}

fn verify_from(dir: &Path) -> Result<Verified, VerifyError> {
    let mut reader = AuditReader::open(dir, None)?;
    let mut chain = Verified { first_seq: 0, head: Position::START, files: 0, missing: 0, torn: false };
    let mut unanchored: Option<(Broken, String)> = None;
    let mut file = PathBuf::new();
    while let Some(Line { file: of, number, text, whole }) = reader.next_line()? {
        let begins = chain.first_seq == 0;
        let broken = |seq, why| VerifyError::Broken(Broken { file: of.clone(), line: number, seq, why });
        if !whole {
            return Err(broken(chain.head.seq + 1, TORN));
        }
        let Some(record) = Read::parse(&text) else { return Err(broken(chain.head.seq + 1, NO_RECORD)) };
        if begins {
            chain.first_seq = record.seq;
            chain.head.seq = record.seq.checked_sub(1).ok_or_else(|| broken(0, OTHER_NUMBER))?;
            if record.seq > 1 {
                let found = Broken { file: of.clone(), line: number, seq: record.seq, why: NO_ANCHOR };
                unanchored = Some((found, record.prev.clone().into_owned()));
            }
        }
        if file != of {
            if files::path(dir, record.seq) != of {
                return Err(broken(chain.head.seq + 1, OTHER_NUMBER));
            }
            chain.files += 1;
            file.clone_from(&of);
        }
        if record.seq != chain.head.seq + 1 {
            return Err(broken(chain.head.seq + 1, OTHER_NUMBER));
        }
        if record.prev != chain.head.hex() && unanchored.as_ref().is_none_or(|(at, _)| at.seq != record.seq) {
            return Err(broken(record.seq, OTHER_HASH));
        }
        match &*record.kind {
            "gap" => chain.missing += record.missing,
            "dropped" => {
                let anchors = |(at, hash): &mut (Broken, String)| {
                    record.through_seq == Some(at.seq - 1) && record.through_hash.as_deref() == Some(hash)
                };
                unanchored.take_if(anchors);
            }
            _ => {}
        }
        chain.head = chain.head.after(&text);
    }
    chain.torn = reader.is_torn();
    match unanchored {
        Some((broken, _)) => Err(VerifyError::Broken(broken)),
        None => Ok(chain),
    }
}
