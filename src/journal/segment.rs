//! One segment file: its format, and what the journal knows of it in memory. Owned by the journal's state; it opens,
//! writes and deletes nothing.
//!
//! ```text
//! file    = header record*                                                     all numbers little endian
//! header  = "EGWJRNL1" crc32:u32 length:u32 | origin:u64 first_seq:u64 marked:u8 mark:u64 streams:u8 stream*
//! stream  = tag:u8 flags:u8 offset:u64 length:u8 SHA-256-under-way             as they were before `first_seq`
//! record  = 0x524A:u16 kind:u8 tag:u8 length:u32 crc32:u32 seq:u64 offset:u64 mark:u64 payload
//! kind    = 0 bytes | 1 gap, payload = bytes:u64 chunks:u64 | 2 gap of unknown size, payload = 0:u64 chunks:u64
//! ```
//!
//! Each checksum covers everything after and before it in its header or record. A header says where every stream
//! stands, so the loss of all earlier files, or of the end of the file before, is still counted to the byte.

use std::ops::Range;

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::checksum::{RunningSha256, crc32};
use super::{Gap, Record};

/// Size of a record without its payload.
pub(super) const RECORD_HEAD_LEN: usize = 36;

/// A header with all streams a journal may have is smaller.
pub(super) const HEADER_LEN_MAX: usize = 16 + 26 + STREAMS_MAX * (11 + 103);

/// Streams (tags) of one journal: bounds the header and the masks of the index.
pub(super) const STREAMS_MAX: usize = 16;

/// A page reads the file in blocks of this size, or of one record if that is larger.
const BLOCK_LEN_MAX: u64 = 64 * 1024;

/// Gaps of one segment that are listed as ranges; all are counted, and all are in the records.
const GAPS_LISTED_MAX: usize = 256;

const FILE_MAGIC: &[u8; 8] = b"EGWJRNL1";
const RECORD_MAGIC: u16 = 0x524A;
const GAP_PAYLOAD_LEN: usize = 16;

/// Where a journal stands between two records: all that a segment file needs to know of those before it.
#[derive(Debug, Clone)]
pub(super) struct Head {
    /// The number the journal began with.
    pub(super) origin: u64,
    pub(super) next_seq: u64,
    /// Mark of the newest record.
    pub(super) last_mark: Option<u64>,
    /// In the order of their first records; the index of a stream is its slot. Streams are only ever added, at the end.
    pub(super) streams: Vec<Stream>,
}

impl Head {
    pub(super) fn new(origin: u64) -> Self {
        Self { origin, next_seq: origin, last_mark: None, streams: Vec::new() }
    }

    pub(super) fn slot(&self, tag: u8) -> Option<usize> {
        self.streams.iter().position(|stream| stream.tag == tag)
    }

    /// Index of the stream with this tag, which is made if it is new.
    pub(super) fn slot_or_new(&mut self, tag: u8) -> usize {
        self.slot(tag).unwrap_or_else(|| {
            self.streams.push(Stream::new(tag));
            self.streams.len() - 1
        })
    }

    pub(super) fn offsets(&self) -> Offsets {
        Offsets(self.streams.iter().map(|stream| stream.offset).collect())
    }

    /// Moves past the next record. Hashing is left out where a later header has the result.
    pub(super) fn pass(&mut self, slot: usize, mark: u64, payload: &[u8], gap: Option<Gap>, hash: bool) {
        self.streams[slot].pass(payload, gap, hash);
        self.next_seq += 1;
        self.last_mark = Some(mark);
    }
}

/// Where one stream stands.
#[derive(Debug, Clone)]
pub(super) struct Stream {
    pub(super) tag: u8,
    /// Offset of its next byte.
    pub(super) offset: u64,
    pub(super) sha: RunningSha256,
    /// Every byte of it went through `sha`.
    pub(super) whole: bool,
    /// No gap of unknown size.
    pub(super) exact: bool,
}

impl Stream {
    fn new(tag: u8) -> Self {
        Self { tag, offset: 0, sha: RunningSha256::new(), whole: true, exact: true }
    }

    fn pass(&mut self, payload: &[u8], gap: Option<Gap>, hash: bool) {
        if hash {
            self.sha.update(payload);
        }
        if let Some(gap) = gap {
            self.whole &= gap.bytes == Some(0);
            self.exact &= gap.bytes.is_some();
        }
        self.offset = self.offset.saturating_add(extent(payload, gap));
    }
}

/// How far a record takes its stream.
pub(super) fn extent(payload: &[u8], gap: Option<Gap>) -> u64 {
    gap.map_or(payload.len() as u64, |gap| gap.bytes.unwrap_or(0))
}

/// A number per stream, by slot; a stream that did not exist yet has 0.
#[derive(Debug, Clone, Default)]
pub(super) struct Offsets(Vec<u64>);

impl Offsets {
    pub(super) fn get(&self, slot: usize) -> u64 {
        self.0.get(slot).copied().unwrap_or(0)
    }

    pub(super) fn set(&mut self, slot: usize, offset: u64) {
        if self.0.len() <= slot {
            self.0.resize(slot + 1, 0);
        }
        self.0[slot] = offset;
    }

    /// The offset of one stream, or of all streams taken as one.
    pub(super) fn position(&self, slot: Option<usize>) -> u64 {
        slot.map_or_else(
            || self.0.iter().fold(0, |sum: u64, offset| sum.saturating_add(*offset)),
            |slot| self.get(slot),
        )
    }
}

/// What a reader finds between two places of a segment.
#[derive(Debug)]
struct Block {
    at: u64,
    seq: u64,
    start: Offsets,
    /// Bit per slot that has a record here, so that a page of one stream passes over blocks of the others.
    slots: u16,
}

/// One segment file, without the file.
#[derive(Debug)]
pub(super) struct Segment {
    pub(super) first_seq: u64,
    /// Number after the last record.
    pub(super) next_seq: u64,
    /// Length of the file up to the end of the last good record.
    pub(super) len: u64,
    pub(super) start: Offsets,
    pub(super) end: Offsets,
    gap_bytes: Offsets,
    gaps: Vec<(usize, Range<u64>)>,
    blocks: Vec<Block>,
}

impl Segment {
    /// A segment without records, that begins where the journal stands.
    pub(super) fn new(head: &Head, header_len: u64) -> Self {
        Self {
            first_seq: head.next_seq,
            next_seq: head.next_seq,
            len: header_len,
            start: head.offsets(),
            end: head.offsets(),
            gap_bytes: Offsets::default(),
            gaps: Vec::new(),
            blocks: Vec::new(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.next_seq == self.first_seq
    }

    /// Takes the next record into the index.
    pub(super) fn push(&mut self, slot: usize, record: &Record) {
        let len = encoded_len(&record.bytes, record.gap);
        if self.blocks.last().is_none_or(|block| self.len + len - block.at > BLOCK_LEN_MAX) {
            self.blocks.push(Block { at: self.len, seq: record.seq, start: self.end.clone(), slots: 0 });
        }
        if let Some(block) = self.blocks.last_mut() {
            block.slots |= 1 << slot;
        }
        if record.gap.is_some() && record.end() > record.offset {
            self.gap_bytes.set(slot, self.gap_bytes.get(slot) + (record.end() - record.offset));
            if self.gaps.len() < GAPS_LISTED_MAX {
                self.gaps.push((slot, record.offset..record.end()));
            }
        }
        self.end.set(slot, record.end());
        self.next_seq = record.seq + 1;
        self.len += len;
    }

    /// Bytes of a stream that are named lost within this segment.
    pub(super) fn gap_bytes(&self, slot: usize) -> u64 {
        self.gap_bytes.get(slot)
    }

    /// Their ranges, oldest first.
    pub(super) fn gaps(&self, slot: usize) -> impl Iterator<Item = Range<u64>> + '_ {
        self.gaps.iter().filter(move |(of, _)| *of == slot).map(|(_, range)| range.clone())
    }

    /// The part of the file to read for the records from `seq` on, of one stream or of all. `None` when none follow.
    pub(super) fn block(&self, seq: u64, slot: Option<usize>) -> Option<Range<u64>> {
        let first = self.blocks.partition_point(|block| block.seq <= seq).saturating_sub(1);
        let wanted = |block: &Block| slot.is_none_or(|slot| block.slots & (1 << slot) != 0);
        let found = first + self.blocks[first..].iter().position(wanted)?;
        let end = self.blocks.get(found + 1).map_or(self.len, |next| next.at);
        Some(self.blocks[found].at..end)
    }

    /// The first number of a block that reaches `position`.
    pub(super) fn seq_reaching(&self, slot: Option<usize>, position: u64) -> Option<u64> {
        let ends = self.blocks.iter().skip(1).map(|block| &block.start).chain([&self.end]);
        let reached = self.blocks.iter().zip(ends).find(|(_, end)| end.position(slot) >= position);
        reached.map(|(block, _)| block.seq)
    }
}

/// Appends the header of a segment file that begins where the journal stands.
pub(super) fn encode_header(out: &mut BytesMut, head: &Head) {
    let mut body = BytesMut::new();
    body.put_u64_le(head.origin);
    body.put_u64_le(head.next_seq);
    body.put_u8(u8::from(head.last_mark.is_some()));
    body.put_u64_le(head.last_mark.unwrap_or(0));
    body.put_u8(head.streams.len() as u8);
    for stream in &head.streams {
        let sha = stream.sha.store();
        body.put_u8(stream.tag);
        body.put_u8(u8::from(stream.whole) | u8::from(stream.exact) << 1);
        body.put_u64_le(stream.offset);
        body.put_u8(sha.len() as u8);
        body.put_slice(&sha);
    }
    out.put_slice(FILE_MAGIC);
    out.put_u32_le(crc32(&[&body]));
    out.put_u32_le(body.len() as u32);
    out.put_slice(&body);
}

/// Size of a record in the file.
pub(super) fn encoded_len(payload: &[u8], gap: Option<Gap>) -> u64 {
    (RECORD_HEAD_LEN + if gap.is_some() { GAP_PAYLOAD_LEN } else { payload.len() }) as u64
}

/// Appends a record whose payload is given beside it, and returns where in `out` the payload is.
pub(super) fn encode(out: &mut BytesMut, record: &Record, payload: &[u8]) -> Range<usize> {
    let mut gap_payload = [0; GAP_PAYLOAD_LEN];
    let (kind, payload) = match record.gap {
        None => (0, payload),
        Some(gap) => {
            gap_payload[..8].copy_from_slice(&gap.bytes.unwrap_or(0).to_le_bytes());
            gap_payload[8..].copy_from_slice(&gap.chunks.to_le_bytes());
            (if gap.bytes.is_some() { 1 } else { 2 }, &gap_payload[..])
        }
    };
    let at = out.len();
    out.put_u16_le(RECORD_MAGIC);
    out.put_u8(kind);
    out.put_u8(record.tag);
    out.put_u32_le(payload.len() as u32);
    out.put_u32_le(0);
    out.put_u64_le(record.seq);
    out.put_u64_le(record.offset);
    out.put_u64_le(record.mark);
    let crc = crc32(&[&out[at..at + 8], &out[at + 12..], payload]);
    out[at + 8..at + 12].copy_from_slice(&crc.to_le_bytes());
    out.put_slice(payload);
    at + RECORD_HEAD_LEN..out.len()
}

/// Takes the record at the beginning of `buf`, sharing its bytes. `None`, with `buf` as it was, when it is torn or
/// damaged.
pub(super) fn decode(buf: &mut Bytes) -> Option<Record> {
    let mut head = buf.get(..RECORD_HEAD_LEN)?;
    let (magic, kind, tag) = (head.get_u16_le(), head.get_u8(), head.get_u8());
    let (len, crc) = (head.get_u32_le() as usize, head.get_u32_le());
    let (seq, offset, mark) = (head.get_u64_le(), head.get_u64_le(), head.get_u64_le());
    let end = RECORD_HEAD_LEN.checked_add(len)?;
    let payload = buf.get(RECORD_HEAD_LEN..end)?;
    if magic != RECORD_MAGIC || crc != crc32(&[&buf[..8], &buf[12..RECORD_HEAD_LEN], payload]) {
        return None;
    }
    let gap = match kind {
        0 => None,
        1 | 2 if len == GAP_PAYLOAD_LEN => {
            let mut payload = payload;
            let bytes = payload.get_u64_le();
            Some(Gap { bytes: (kind == 1).then_some(bytes), chunks: payload.get_u64_le() })
        }
        _ => return None,
    };
    let payload = buf.split_to(end).slice(RECORD_HEAD_LEN..);
    let bytes = if gap.is_some() { Bytes::new() } else { payload };
    Some(Record { seq, tag, offset, mark, bytes, gap })
}

/// Reads a whole file up to the first record that is torn, damaged or out of order. `None` when not even the header
/// is good. The head is that after the last good record, its digests only if asked for.
pub(super) fn scan(mut file: Bytes, hash: bool) -> Option<(Segment, Head)> {
    let len = file.len();
    let mut head = decode_header(&mut file)?;
    let mut segment = Segment::new(&head, (len - file.len()) as u64);
    while let Some(record) = decode(&mut file) {
        let known = head.streams.len();
        let slot = head.slot_or_new(record.tag);
        if record.seq != head.next_seq || record.offset != head.streams[slot].offset || slot >= STREAMS_MAX {
            head.streams.truncate(known);
            break;
        }
        head.pass(slot, record.mark, &record.bytes, record.gap, hash);
        segment.push(slot, &record);
    }
    Some((segment, head))
}

fn decode_header(file: &mut Bytes) -> Option<Head> {
    let mut start = file.get(..16)?;
    let (magic, crc, len) = (start.copy_to_bytes(8), start.get_u32_le(), start.get_u32_le() as usize);
    let mut body = file.get(16..16usize.checked_add(len)?)?;
    if magic[..] != FILE_MAGIC[..] || crc != crc32(&[body]) {
        return None;
    }
    let mut head = Head::new(body.try_get_u64_le().ok()?);
    head.next_seq = body.try_get_u64_le().ok()?;
    let marked = body.try_get_u8().ok()? != 0;
    head.last_mark = Some(body.try_get_u64_le().ok()?).filter(|_| marked);
    for _ in 0..body.try_get_u8().ok()? {
        let (tag, flags) = (body.try_get_u8().ok()?, body.try_get_u8().ok()?);
        let offset = body.try_get_u64_le().ok()?;
        let len = usize::from(body.try_get_u8().ok()?);
        let (sha, rest) = body.split_at_checked(len)?;
        let sha = RunningSha256::load(sha)?;
        head.streams.push(Stream { tag, offset, sha, whole: flags & 1 != 0, exact: flags & 2 != 0 });
        body = rest;
    }
    file.advance(16 + len);
    Some(head)
}
