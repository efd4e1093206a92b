//! Files: the audit's files in their directory, their names, and the newest one's end.
//! Owned by the writer, which alone adds and removes; readers list them for themselves.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, BufRead, BufReader, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use super::record::{Open, Position, Read};
use crate::time::parse_rfc3339;

/// The file that begins with the record of this number.
pub(super) fn path(dir: &Path, first_seq: u64) -> PathBuf {
    dir.join(format!("audit-{first_seq:020}.jsonl"))
}

/// Numbers of the first records of all files, oldest first; none if the directory does not exist.
pub(super) fn list(dir: &Path) -> io::Result<Vec<u64>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut files = Vec::new();
    for entry in entries {
        let name = entry?.file_name();
        let digits = name.to_str().and_then(|name| name.strip_prefix("audit-")?.strip_suffix(".jsonl"));
        files.extend(digits.filter(|digits| digits.len() == 20).and_then(|digits| digits.parse::<u64>().ok()));
    }
    files.sort_unstable();
    Ok(files)
}

/// The first line of a file, as far as it is there; without its end.
pub(super) fn first_line(path: &Path) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    BufReader::new(File::open(path)?).read_until(b'\n', &mut line)?;
    if line.last() == Some(&b'\n') {
        line.pop();
    }
    Ok(line)
}

/// One file before the newest.
struct Former {
    first_seq: u64,
    bytes: u64,
    /// Where the chain stood at its end.
    through: Position,
    /// When its last record can have been written at the latest.
    closed_at: SystemTime,
}

/// Which file has to go, and why.
pub(super) struct Leaving {
    pub(super) first_seq: u64,
    pub(super) through: Position,
    pub(super) why: &'static str,
}

/// The newest file.
struct Current {
    first_seq: u64,
    file: Arc<File>,
    bytes: u64,
    /// Of these its head, which does not count against its size.
    head_bytes: u64,
    began_at: SystemTime,
}

type WriteBatch = Box<dyn FnMut(&File, &[u8]) -> io::Result<()> + Send>;

/// All files, as the writer keeps them in mind: the directory is read once.
pub(super) struct Files {
    dir: PathBuf,
    former: VecDeque<Former>,
    former_bytes: u64,
    current: Option<Current>,
    /// A failed write may have left bytes behind the last record, and cutting them off failed too.
    torn: bool,
    /// The one way to the disk for records, so that tests can have it fail.
    pub(super) write: WriteBatch,
}

/// What was found at the start.
pub(super) struct Found {
    pub(super) files: Files,
    pub(super) position: Position,
    /// What was begun and has no end.
    pub(super) open: BTreeMap<u64, Open>,
}

impl Files {
    /// Looks at what the last process left. A torn last line is cut off, and nothing else is changed: what is damaged
    /// in any other way stays for whoever verifies it.
    pub(super) fn open(dir: &Path) -> io::Result<Found> {
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        let mut names = list(dir)?;
        let mut files = Self {
            dir: dir.into(),
            former: VecDeque::new(),
            former_bytes: 0,
            current: None,
            torn: false,
            write: Box::new(|mut file, bytes| file.write_all(bytes)),
        };
        let mut newest = None;
        while newest.is_none()
            && let Some(first_seq) = names.pop()
        {
            let path = path(dir, first_seq);
            newest = recover(&path, first_seq)?;
            if newest.is_none() {
                // The last process ended before it had written the head.
                fs::remove_file(path)?;
            }
        }
        let Some((current, position, open, mut prev)) = newest else {
            return Ok(Found { files, position: Position::START, open: BTreeMap::new() });
        };
        let mut next_first = current.first_seq;
        let mut closed_at = current.began_at;
        for first_seq in names.into_iter().rev() {
            let path = path(dir, first_seq);
            let (line, bytes) = (first_line(&path)?, fs::metadata(&path)?.len());
            let head = Read::parse(&line);
            let through = Position { seq: next_first.saturating_sub(1), hash: prev };
            files.former.push_front(Former { first_seq, bytes, through, closed_at });
            files.former_bytes += bytes;
            next_first = first_seq;
            prev = head.as_ref().and_then(|head| unhex(&head.prev)).unwrap_or_default();
            closed_at = head.and_then(|head| parse_rfc3339(&head.at)).unwrap_or(closed_at);
        }
        files.current = Some(current);
        Ok(Found { files, position, open })
    }

    /// The newest file, to be synced.
    pub(super) fn file(&self) -> Option<&Arc<File>> {
        self.current.as_ref().map(|current| &current.file)
    }

    /// Bytes of all files together.
    pub(super) fn bytes(&self) -> u64 {
        self.former_bytes + self.current.as_ref().map_or(0, |current| current.bytes)
    }

    /// Whether a new file has to be begun: there is none, or the newest is large enough or was begun before `since`.
    pub(super) fn is_full(&self, file_bytes_max: u64, since: SystemTime) -> bool {
        self.current.as_ref().is_none_or(|current| {
            let records = current.bytes.saturating_sub(current.head_bytes);
            records >= file_bytes_max || records > 0 && current.began_at < since
        })
    }

    /// Begins the file whose first line is `head` and follows `position`.
    pub(super) fn begin(&mut self, position: Position, head: &[u8], now: SystemTime) -> io::Result<()> {
        let first_seq = position.seq + 1;
        let path = path(&self.dir, first_seq);
        // One that is there is what a failed try left: its name is the number of a record that is not written.
        let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path)?;
        if let Err(error) = (self.write)(&file, head) {
            let _ = fs::remove_file(&path);
            return Err(error);
        }
        // The name must outlive the machine before anything counts on it.
        File::open(&self.dir)?.sync_all()?;
        let bytes = head.len() as u64;
        let current = Current { first_seq, file: Arc::new(file), bytes, head_bytes: bytes, began_at: now };
        if let Some(last) = self.current.replace(current) {
            self.former_bytes += last.bytes;
            self.former.push_back(Former {
                first_seq: last.first_seq,
                bytes: last.bytes,
                through: position,
                closed_at: now,
            });
        }
        self.torn = false;
        Ok(())
    }

    /// Adds lines to the newest file with one write. After an error they are not there.
    pub(super) fn append(&mut self, lines: &[u8]) -> io::Result<()> {
        let current = self.current.as_mut().ok_or(ErrorKind::NotFound)?;
        if self.torn {
            rewind(&current.file, current.bytes)?;
            self.torn = false;
        }
        if let Err(error) = (self.write)(&current.file, lines) {
            self.torn = rewind(&current.file, current.bytes).is_err();
            return Err(error);
        }
        current.bytes += lines.len() as u64;
        Ok(())
    }

    /// The oldest file, if it was closed before `since` or all files take more than `bytes_max`. Never the newest.
    pub(super) fn leaving(&self, bytes_max: u64, since: SystemTime) -> Option<Leaving> {
        let oldest = self.former.front()?;
        let why = if oldest.closed_at < since {
            "age"
        } else if self.bytes() > bytes_max {
            "quota"
        } else {
            return None;
        };
        Some(Leaving { first_seq: oldest.first_seq, through: oldest.through, why })
    }

    /// Removes the oldest file. One that cannot be removed is forgotten all the same, and found at the next start.
    pub(super) fn remove_oldest(&mut self) -> io::Result<()> {
        let Some(oldest) = self.former.pop_front() else { return Ok(()) };
        self.former_bytes -= oldest.bytes;
        fs::remove_file(path(&self.dir, oldest.first_seq))
    }
}

fn rewind(mut file: &File, bytes: u64) -> io::Result<()> {
    use std::io::Seek;
    file.set_len(bytes)?;
    file.seek(io::SeekFrom::Start(bytes)).map(drop)
}

pub(super) fn unhex(text: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(bytes)
}

type Recovered = (Current, Position, BTreeMap<u64, Open>, [u8; 32]);

/// The newest file with where its chain stands, what is under way at its end, and what its first line hangs on; `None`
/// if it has not one whole line.
fn recover(path: &Path, first_seq: u64) -> io::Result<Option<Recovered>> {
    let mut reader = BufReader::with_capacity(256 * 1024, File::open(path)?);
    let (mut line, mut last) = (Vec::new(), Vec::new());
    let (mut bytes, mut head_bytes, mut seq) = (0, 0, first_seq - 1);
    let (mut prev, mut began_at, mut open) = (None, None, BTreeMap::new());
    loop {
        line.clear();
        reader.read_until(b'\n', &mut line)?;
        if line.pop() != Some(b'\n') {
            break;
        }
        bytes += line.len() as u64 + 1;
        seq += 1;
        if let Some(read) = Read::parse(&line) {
            // Every line is one record, unless a line end was damaged: then the number that is told is the right one.
            seq = seq.max(read.seq);
            prev = prev.or_else(|| unhex(&read.prev));
            began_at = began_at.or_else(|| parse_rfc3339(&read.at));
            match (&*read.kind, read.action, read.of) {
                ("file", ..) => {
                    head_bytes = bytes;
                    open = read.open.into_iter().collect();
                }
                ("begin", Some(action), _) => {
                    open.insert(read.seq, Open { action, workspace: read.workspace });
                }
                ("end", _, Some(of)) => {
                    open.remove(&of);
                }
                _ => {}
            }
        }
        std::mem::swap(&mut line, &mut last);
    }
    if bytes == 0 {
        return Ok(None);
    }
    drop(reader);
    let file = OpenOptions::new().write(true).open(path)?;
    rewind(&file, bytes)?;
    let position = Position { seq: seq - 1, ..Position::START }.after(&last);
    let began_at = began_at.unwrap_or(SystemTime::UNIX_EPOCH);
    let current = Current { first_seq, file: Arc::new(file), bytes, head_bytes, began_at };
    Ok(Some((current, position, open, prev.unwrap_or_default())))
}
