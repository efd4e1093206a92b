//! `read_file`: a file, a slice of its bytes or some of its lines, read in blocks (connectors-api.md §4.2).

use std::pin::pin;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_util::TryStreamExt;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::open_file::OpenFile;
use super::{Attempts, Failure, FileError, answer, look_at_file, native, staging, time};
use crate::protocol::path::FileUri;
use crate::protocol::rest::ToolResult;
use crate::protocol::rpc::{Metadata, OpenMode};
use crate::relay::client::Client;
use crate::tools::{Call, Effect, Run, Site, Tool, ToolError, before, parse, resolve};

pub(in crate::tools) const TOOL: Tool = Tool {
    name: "read_file",
    description: "Read a file. With `encoding: \"text\"` or `start_line` the lines of a UTF-8 text come back as they \
                  are, at most 2000 lines or 256 KiB in one call: if `truncated` is true, go on with `start_line` = \
                  `end_line` + 1. Otherwise the bytes come back as base64, whole or from `offset` for `limit` bytes. \
                  With size and mtime of the file, and its sha256 where it was read to its end (up to 16 MiB) or \
                  `hash` is true: pass that as `if_match` to write_file or edit_file.",
    effect: Effect::Reads,
    input: |schemas| schemas.root_schema_for::<Arguments>(),
    output: |schemas| schemas.root_schema_for::<Output>(),
    run: Run::At(|site, arguments| Box::pin(async move { call(site, parse(arguments)?).await })),
};

/// Largest file whose hash is told without being asked for.
const HASH_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// What one call returns of a text.
const LINES_MAX: u64 = 2000;
const TEXT_BYTES_MAX: usize = 256 * 1024;

const HASH: &str = concat!(include_str!("facts.sh"), "hash \"$1\" && echo \"$sum\"");

/// Arguments of `read_file`.
#[derive(Deserialize, JsonSchema)]
struct Arguments {
    /// The file; relative paths and `~` are taken on the executor.
    path: String,
    /// First byte; negative is 0. Not with `encoding: "text"`.
    #[serde(default)]
    offset: Option<i64>,
    /// Bytes at most; 0 or left out is all. Not with `encoding: "text"`.
    #[serde(default)]
    limit: Option<u64>,
    /// `base64` when left out, unless lines are asked for.
    #[serde(default)]
    encoding: Option<Encoding>,
    /// First line, from 1.
    #[serde(default)]
    start_line: Option<u64>,
    /// Last line.
    #[serde(default)]
    end_line: Option<u64>,
    /// Whether each line begins with its number and a tab.
    #[serde(default)]
    line_numbers: bool,
    /// Whether the sha256 of the whole file is wanted in any case.
    #[serde(default)]
    hash: bool,
}

/// How a content is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Encoding {
    /// Any bytes.
    Base64,
    /// UTF-8.
    Text,
}

/// The structured part of the answer.
#[derive(Serialize, JsonSchema)]
struct Output {
    /// How the text of the answer is to be read.
    encoding: Encoding,
    /// As it was asked for.
    path: String,
    /// Of the whole file, in bytes.
    size: u64,
    /// When the file was last changed, RFC 3339 in UTC.
    mtime: String,
    /// SHA-256 of the whole file in hexadecimal, where it is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    sha256: Option<String>,
    /// First line of the text.
    #[serde(skip_serializing_if = "Option::is_none")]
    start_line: Option<u64>,
    /// Last line of the text; the one before `start_line` where there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    end_line: Option<u64>,
    /// Lines of the whole file, where it was read to its end.
    #[serde(skip_serializing_if = "Option::is_none")]
    total_lines: Option<u64>,
    /// Whether lines that were asked for are missing, since they are too many for one call.
    #[serde(skip_serializing_if = "Option::is_none")]
    truncated: Option<bool>,
}

/// What is to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Bytes { offset: u64, limit: Option<u64> },
    Lines { first: u64, last: u64 },
}

async fn call(site: Site<'_>, arguments: Arguments) -> Result<ToolResult, ToolError> {
    let part = part(&arguments)?;
    let deadline = site.call.deadline(None)?;
    let reading = async {
        let mut attempts = Attempts::harmless(site, deadline).await?;
        let (mut output, text, uri) = loop {
            let attempt = attempt(attempts.client(), &arguments, part, site.call).await;
            if let Some(read) = attempts.over(attempt).await {
                break read?;
            }
        };
        if arguments.hash && output.sha256.is_none() {
            output.sha256 = Some(match site.script(HASH, &[&native(&uri)?], deadline).await? {
                Some(ended) if ended.exit_code == Some(0) => String::from_utf8_lossy(&ended.stdout).trim().to_owned(),
                Some(ended) => return Err(Failure::said(&ended).into()),
                None => staging::content_hash(attempts.client(), &uri).await?,
            });
        }
        Ok(answer(output, text))
    };
    before(deadline, async { reading.await.or_else(|error: FileError| error.result(&TOOL)) }).await
}

/// What the arguments ask for.
fn part(arguments: &Arguments) -> Result<Part, ToolError> {
    let Arguments { offset, limit, encoding, start_line, end_line, line_numbers, .. } = arguments;
    let wrong = |message: &str| Err(ToolError::Arguments(message.into()));
    let lines = start_line.is_some() || end_line.is_some() || *line_numbers;
    match encoding {
        Some(Encoding::Base64) if lines => return wrong("encoding: expected text where lines are asked for"),
        None if !lines => {}
        Some(Encoding::Base64) => {}
        Some(Encoding::Text) | None => {
            if offset.is_some() || limit.is_some() {
                return wrong("offset: not with text; expected start_line and end_line");
            }
            let first = start_line.unwrap_or(1);
            let last = end_line.unwrap_or(u64::MAX);
            return match first {
                0 => wrong("start_line: expected 1 or more"),
                first if last < first => wrong("end_line: expected start_line or more"),
                first => Ok(Part::Lines { first, last }),
            };
        }
    }
    let offset = u64::try_from(offset.unwrap_or(0)).unwrap_or(0);
    Ok(Part::Bytes { offset, limit: limit.filter(|limit| *limit > 0) })
}

async fn attempt(
    client: &Client,
    arguments: &Arguments,
    part: Part,
    call: &Call,
) -> Result<(Output, String, FileUri), FileError> {
    let uri = resolve(client.environment(), "path", &arguments.path)?;
    let metadata = look_at_file(client, &uri).await?;
    let mut output = Output {
        encoding: Encoding::Base64,
        path: arguments.path.clone(),
        size: metadata.size,
        mtime: time(metadata.modified_at_ms),
        sha256: None,
        start_line: None,
        end_line: None,
        total_lines: None,
        truncated: None,
    };
    let text = match part {
        Part::Bytes { offset, limit } => {
            let bytes = bytes(client, &uri, &metadata, offset, limit, call).await?;
            let whole = offset == 0 && limit.is_none_or(|limit| limit > bytes.len() as u64);
            if whole && (arguments.hash || bytes.len() as u64 <= HASH_BYTES_MAX) {
                output.sha256 = Some(staging::sha256(&bytes));
            }
            STANDARD.encode(&bytes)
        }
        Part::Lines { first, last } => {
            let mut lines = Lines::new(first, last, arguments.line_numbers);
            let file = OpenFile::open(client, &uri, OpenMode::Read).await?;
            let mut blocks = pin!(file.blocks(0, u64::MAX));
            while let Some(block) = blocks.try_next().await? {
                lines.add(&block.chunk.0);
                if lines.is_full() {
                    break;
                }
            }
            lines.finish(arguments.hash, &mut output)?
        }
    };
    Ok((output, text, uri))
}

async fn bytes(
    client: &Client,
    uri: &FileUri,
    metadata: &Metadata,
    offset: u64,
    limit: Option<u64>,
    call: &Call,
) -> Result<Vec<u8>, FileError> {
    let bytes_max = call.settings.output_bytes_max as u64;
    let rest = metadata.size.saturating_sub(offset);
    let wanted = limit.unwrap_or(u64::MAX);
    if rest.min(wanted) > bytes_max {
        let message = format!(
            "{} bytes are more than one call returns ({bytes_max}); read slices by offset and limit",
            rest.min(wanted)
        );
        return Err(Failure::new("too_large", message).into());
    }
    // Whoever tries again holds it already.
    call.held.grow_to(rest.min(wanted)).map_err(ToolError::from)?;
    let file = OpenFile::open(client, uri, OpenMode::Read).await?;
    // Files of /proc and the like tell no size: read to the end, within the bound.
    let end = offset.saturating_add(wanted.min(if metadata.size == 0 { bytes_max } else { rest }));
    // Dropping closes: what was read is whole, so nobody needs to wait for that.
    Ok(file.read_range(offset, end).await?)
}

/// The lines of a file that are wanted, taken from its blocks as they come.
struct Lines {
    first: u64,
    last: u64,
    numbers: bool,
    hash: Sha256,
    /// Bytes seen.
    seen: u64,
    /// The line that the next byte belongs to.
    line: u64,
    /// Whether that line has begun.
    begun: bool,
    kept: Vec<u8>,
    /// The last line of which something was kept.
    kept_to: u64,
    binary: bool,
    truncated: bool,
    full: bool,
}

impl Lines {
    fn new(first: u64, last: u64, numbers: bool) -> Self {
        Self {
            first,
            last,
            numbers,
            hash: Sha256::new(),
            seen: 0,
            line: 1,
            begun: false,
            kept: Vec::new(),
            kept_to: first - 1,
            binary: false,
            truncated: false,
            full: false,
        }
    }

    /// Whether nothing more is wanted.
    fn is_full(&self) -> bool {
        self.full
    }

    fn add(&mut self, block: &[u8]) {
        self.hash.update(block);
        self.seen += block.len() as u64;
        self.binary |= memchr::memchr(0, block).is_some();
        for piece in block.split_inclusive(|byte| *byte == b'\n') {
            if self.full {
                return;
            }
            self.add_piece(piece);
        }
    }

    fn add_piece(&mut self, piece: &[u8]) {
        if self.line > self.last {
            self.full = true;
            return;
        }
        if self.line >= self.first {
            let lines = self.line - self.first;
            if !self.begun && (lines >= LINES_MAX || self.kept.len() + piece.len() > TEXT_BYTES_MAX && lines > 0) {
                (self.full, self.truncated) = (true, true);
                return;
            }
            if self.numbers && !self.begun {
                self.kept.extend_from_slice(format!("{:>6}\t", self.line).as_bytes());
            }
            let room = TEXT_BYTES_MAX.saturating_sub(self.kept.len());
            self.truncated |= piece.len() > room;
            self.kept.extend_from_slice(&piece[..piece.len().min(room)]);
            self.kept_to = self.line;
        }
        self.begun = !piece.ends_with(b"\n");
        self.line += u64::from(!self.begun);
    }

    /// The text; what is known of the file goes into the output.
    fn finish(self, hash: bool, output: &mut Output) -> Result<String, Failure> {
        let not_text = || Failure::new("binary", "the file is not UTF-8 text; read it with encoding base64");
        if self.binary {
            return Err(not_text());
        }
        let text = match String::from_utf8(self.kept) {
            Ok(text) => text,
            // The bound may stand inside of a character.
            Err(error) if self.truncated && error.utf8_error().error_len().is_none() => {
                let end = error.utf8_error().valid_up_to();
                String::from_utf8_lossy(&error.as_bytes()[..end]).into_owned()
            }
            Err(_) => return Err(not_text()),
        };
        if !self.full {
            output.total_lines = Some(self.line - 1 + u64::from(self.begun));
            if hash || self.seen <= HASH_BYTES_MAX {
                output.sha256 = Some(format!("{:x}", self.hash.finalize()));
            }
        }
        output.encoding = Encoding::Text;
        output.start_line = Some(self.first);
        output.end_line = Some(self.kept_to);
        output.truncated = Some(self.truncated);
        Ok(text)
    }
}
