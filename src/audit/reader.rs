//! AuditReader: the lines of an audit from its oldest to its newest, also while a daemon writes them.
//! Owned by whoever reads; it opens files for reading only and never waits.

use std::fs::File;
use std::io::{self, BufRead, BufReader, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::files;
use super::record::Read;
use crate::time::parse_rfc3339;

/// One line with where it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// Its file.
    pub file: PathBuf,
    /// Its number in the file, from 1.
    pub number: u64,
    /// The line without its end.
    pub text: Vec<u8>,
    /// Whether it has an end. One that has none, and never will since a further file was begun, is no record.
    pub whole: bool,
}

/// Reads an audit line by line.
pub struct AuditReader {
    dir: PathBuf,
    /// Files that begin before this number were read.
    next_seq: u64,
    current: Option<Current>,
}

struct Current {
    path: PathBuf,
    lines: u64,
    reader: BufReader<File>,
    /// What is there of the next line.
    begun: Vec<u8>,
}

impl Current {
    fn is_torn(&self) -> bool {
        !self.begun.is_empty()
    }
}

impl AuditReader {
    /// Reads from the oldest file on, or from the one that holds the first record of that time.
    ///
    /// # Errors
    /// What the file system says.
    pub fn open(dir: &Path, since: Option<SystemTime>) -> io::Result<Self> {
        let mut next_seq = 0;
        if let Some(since) = since {
            // A file's records were all said before the next one's head was written.
            for first_seq in files::list(dir)? {
                match files::first_line(&files::path(dir, first_seq)) {
                    Ok(head) if is_later(&head, since) => break,
                    Ok(_) => next_seq = first_seq,
                    Err(error) if error.kind() == ErrorKind::NotFound => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(Self { dir: dir.into(), next_seq, current: None })
    }

    /// The next whole line; `None` when there is none yet. Files that went for their age or the quota are passed over.
    ///
    /// # Errors
    /// What the file system says.
    pub fn next_line(&mut self) -> io::Result<Option<Line>> {
        loop {
            if let Some(line) = self.read()? {
                return Ok(Some(line));
            }
            let Some(first_seq) = files::list(&self.dir)?.into_iter().find(|first_seq| *first_seq >= self.next_seq)
            else {
                return Ok(None);
            };
            // Between the look at this file's end and that at the list of files more may have come.
            if let Some(line) = self.read()? {
                return Ok(Some(line));
            }
            if let Some(Current { path, lines, begun, .. }) = self.current.take().filter(Current::is_torn) {
                return Ok(Some(Line { file: path, number: lines + 1, text: begun, whole: false }));
            }
            let path = files::path(&self.dir, first_seq);
            self.next_seq = first_seq + 1;
            match File::open(&path) {
                Ok(file) => {
                    let reader = BufReader::with_capacity(256 * 1024, file);
                    self.current = Some(Current { path, lines: 0, reader, begun: Vec::new() });
                }
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Whether the newest line is not whole: it is being written, or its writer was killed.
    pub fn is_torn(&self) -> bool {
        self.current.as_ref().is_some_and(Current::is_torn)
    }

    fn read(&mut self) -> io::Result<Option<Line>> {
        let Some(Current { path, lines, reader, begun }) = &mut self.current else { return Ok(None) };
        reader.read_until(b'\n', begun)?;
        if begun.last() != Some(&b'\n') {
            return Ok(None);
        }
        begun.pop();
        *lines += 1;
        Ok(Some(Line { file: path.clone(), number: *lines, text: std::mem::take(begun), whole: true }))
    }
}

fn is_later(head: &[u8], since: SystemTime) -> bool {
    Read::parse(head).and_then(|head| parse_rfc3339(&head.at)).is_some_and(|at| at > since)
}
