//! A journal beside a plain list of all its records: whatever happens, both answer the same.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use proptest::collection::vec;
use proptest::prelude::*;
use sha2::{Digest, Sha256};

use super::*;
use crate::store::scratch::ScratchDir;

#[derive(Debug, Clone)]
enum Step {
    Append(Vec<(u8, usize)>),
    Gap(u8, Option<u64>),
    Shrink(u64),
    /// The process is killed, and the machine forgets this many bytes of the newest file.
    Crash(u64),
    Read {
        after: u64,
        filter: Option<u8>,
        bytes_max: usize,
    },
    ReadFrom {
        tag: u8,
        offset: u64,
        bytes_max: usize,
    },
    HeadTail {
        filter: Option<u8>,
        bytes: usize,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let len = prop_oneof![4 => 0..300usize, 3 => 2000..9000usize, 1 => 15_000..40_000usize];
    let filter = proptest::option::of(0..4u8);
    prop_oneof![
        8 => vec((0..3u8, len), 0..5).prop_filter("too large", |batch| batch.iter().map(|b| b.1).sum::<usize>() < 60_000)
            .prop_map(Step::Append),
        1 => (0..3u8, proptest::option::of(0..500u64)).prop_map(|(tag, bytes)| Step::Gap(tag, bytes)),
        1 => (0..140_000u64).prop_map(Step::Shrink),
        2 => prop_oneof![Just(0), 0..200u64, 0..30_000u64].prop_map(Step::Crash),
        2 => (0..80u64, filter.clone(), 0..60_000usize)
            .prop_map(|(after, filter, bytes_max)| Step::Read { after, filter, bytes_max }),
        2 => (0..3u8, 0..200_000u64, 0..60_000usize)
            .prop_map(|(tag, offset, bytes_max)| Step::ReadFrom { tag, offset, bytes_max }),
        2 => (filter, 0..60_000usize).prop_map(|(filter, bytes)| Step::HeadTail { filter, bytes }),
    ]
}

/// All records there ever were; those before `first_seq` are dropped.
#[derive(Default)]
struct Model {
    records: Vec<Record>,
    first_seq: u64,
}

impl Model {
    fn push(&mut self, tag: u8, len: usize, gap: Option<Gap>) -> Record {
        let seq = self.records.len() as u64 + 1;
        let bytes = (0..len).map(|n| (n as u64 * 31 + seq) as u8).collect::<Vec<_>>().into();
        let record = Record { seq, tag, offset: self.end(tag), mark: seq * 3, bytes, gap };
        self.records.push(record.clone());
        record
    }

    fn end(&self, tag: u8) -> u64 {
        self.records.iter().rfind(|record| record.tag == tag).map_or(0, Record::end)
    }

    fn kept(&self, filter: Option<u8>) -> impl Iterator<Item = &Record> {
        let first_seq = self.first_seq;
        let wanted = move |record: &&Record| record.seq >= first_seq && filter.is_none_or(|tag| tag == record.tag);
        self.records.iter().filter(wanted)
    }

    fn totals(&self) -> BTreeMap<u8, Totals> {
        let mut totals = BTreeMap::new();
        for record in &self.records {
            let total = totals.entry(record.tag).or_insert_with(|| Totals {
                tag: record.tag,
                bytes: 0,
                lost_bytes: 0,
                exact: true,
                sha256: None,
            });
            total.bytes = record.end();
            total.exact &= record.gap.is_none_or(|gap| gap.bytes.is_some());
            if record.gap.is_some() || record.seq < self.first_seq {
                total.lost_bytes += record.end() - record.offset;
            }
        }
        for total in totals.values_mut() {
            let of_tag = || self.records.iter().filter(|record| record.tag == total.tag);
            if of_tag().all(|record| record.gap.is_none_or(|gap| gap.bytes == Some(0))) {
                let bytes: Vec<u8> = of_tag().flat_map(|record| record.bytes.to_vec()).collect();
                total.sha256 = Some(Sha256::digest(bytes).into());
            }
        }
        totals
    }

    /// What a page has to hold: while there is room, and at least one.
    fn page(&self, after: u64, filter: Option<u8>, bytes_max: usize) -> Vec<Record> {
        let mut room = bytes_max;
        let fits = |(n, record): &(usize, &Record)| {
            let fits = *n == 0 || record.bytes.len() <= room;
            room = room.saturating_sub(record.bytes.len());
            fits
        };
        let wanted = self.kept(filter).filter(|record| record.seq > after);
        wanted.enumerate().take_while(fits).map(|(_, record)| record.clone()).collect()
    }
}

/// Cuts the newest file, but not into its header, and returns what the model loses by it.
fn crash(dir: &Path, cut: u64, model: &mut Model) {
    let (first_seq, path) = segment_files(dir).unwrap().pop().unwrap();
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    let records = model.records.iter().filter(|record| record.seq >= first_seq);
    let mut left = records.map(|record| segment::encoded_len(&record.bytes, record.gap)).sum::<u64>();
    let len = file.metadata().unwrap().len();
    let cut = cut.min(left);
    file.set_len(len - cut).unwrap();
    let intact = left - cut;
    while left > intact {
        let record = model.records.pop().unwrap();
        left -= segment::encoded_len(&record.bytes, record.gap);
    }
}

fn play(steps: Vec<Step>, memory_bytes_max: usize) -> Result<(), TestCaseError> {
    let dir = ScratchDir::new();
    let limits = Limits { memory_bytes_max, spill_bytes_max: 140_000, full: Full::DropOldest };
    let mut journal = Journal::create(dir.path(), 1, limits).unwrap();
    let mut model = Model { first_seq: 1, ..Model::default() };
    for step in steps {
        match step {
            Step::Append(batch) => {
                let records: Vec<Record> = batch.into_iter().map(|(tag, len)| model.push(tag, len, None)).collect();
                let batch: Vec<Append<'_>> =
                    records.iter().map(|r| Append { tag: r.tag, mark: r.mark, bytes: &r.bytes }).collect();
                let seqs = journal.append(&batch).unwrap();
                prop_assert_eq!(seqs.end, model.records.len() as u64 + 1);
                prop_assert_eq!(seqs.end - seqs.start, records.len() as u64);
                prop_assert!(journal.reader().disk_bytes() <= 140_000);
            }
            Step::Gap(tag, bytes) => {
                let record = model.push(tag, 0, Some(Gap { bytes, chunks: 3 }));
                journal.append_gap(tag, bytes, 3, record.mark).unwrap();
            }
            Step::Shrink(bytes) => {
                journal.shrink_to(bytes).unwrap();
                prop_assert!(journal.reader().disk_bytes() <= bytes.max(HEADER_LEN_MAX as u64));
            }
            Step::Crash(cut) => {
                drop(journal);
                crash(dir.path(), cut, &mut model);
                journal = Journal::open(dir.path(), limits).unwrap();
                prop_assert_eq!(journal.reader().published(), model.records.len() as u64);
                let mark = model.records.last().map(|record| record.mark);
                prop_assert_eq!(journal.reader().last_mark(), mark);
            }
            Step::Read { after, filter, bytes_max } => {
                let page = journal.reader().page(after, filter, bytes_max).unwrap();
                let wanted = model.page(after, filter, bytes_max);
                prop_assert_eq!(page.end, model.kept(filter).filter(|r| r.seq > after).count() == wanted.len());
                prop_assert_eq!(page.records, wanted);
                let lost = page.lost.map(|lost| lost.seqs);
                let known = filter.is_none_or(|tag| model.records.iter().any(|record| record.tag == tag));
                if known {
                    prop_assert_eq!(lost, (after + 1 < model.first_seq).then_some(after + 1..model.first_seq));
                }
                let rest = journal.reader().page(page.next_seq, filter, usize::MAX).unwrap();
                prop_assert_eq!(rest.records, model.page(page.next_seq, filter, usize::MAX));
            }
            Step::ReadFrom { tag, offset, bytes_max } => {
                let page = journal.reader().page_from(tag, offset, bytes_max).unwrap();
                let mut at = offset;
                let first = model.kept(Some(tag)).find(|record| record.end() > offset);
                let lost_to = first.map_or(model.end(tag), |first| first.offset.max(offset));
                prop_assert_eq!(page.lost.map(|lost| lost.resume), (lost_to > offset).then(|| vec![(tag, lost_to)]));
                at = at.max(lost_to);
                for record in &page.records {
                    prop_assert_eq!(record.offset, at);
                    let whole = &model.records[record.seq as usize - 1];
                    prop_assert_eq!(record.end(), whole.end());
                    prop_assert!(whole.bytes.ends_with(&record.bytes));
                    at = record.end();
                }
                prop_assert!(page.end || !page.records.is_empty());
                prop_assert!(!page.end || at == offset.max(model.end(tag)));
            }
            Step::HeadTail { filter, bytes } => {
                let (head, tail) = journal.reader().head_tail(filter, bytes).unwrap();
                let all: Vec<u8> = model.kept(filter).flat_map(|record| record.bytes.to_vec()).collect();
                let text = |page: &Page| page.records.iter().flat_map(|r| r.bytes.to_vec()).collect::<Vec<u8>>();
                let (head, tail) = (text(&head), text(&tail));
                prop_assert_eq!(&head, &all[..all.len().min(bytes / 2)]);
                prop_assert!(all[head.len()..].ends_with(&tail));
                // Gaps count as the bytes they stand for when the last ones are looked for.
                let gaps = model.kept(filter).any(|record| record.gap.is_some());
                let wanted = (all.len() - head.len()).min(bytes - bytes / 2);
                prop_assert!(tail.len() == wanted || (gaps && tail.len() < wanted), "{} {}", tail.len(), wanted);
            }
        }
        let first_seq = journal.reader().first_seq();
        prop_assert!(first_seq >= model.first_seq.min(model.records.len() as u64 + 1), "what was dropped came back");
        model.first_seq = first_seq;
        let totals = journal.reader().totals();
        let by_tag: BTreeMap<u8, Totals> = totals.into_iter().map(|total| (total.tag, total)).collect();
        for (tag, total) in &by_tag {
            let lost: u64 = journal.reader().lost_ranges(*tag).iter().map(|range| range.end - range.start).sum();
            prop_assert_eq!(lost, total.lost_bytes);
        }
        prop_assert_eq!(by_tag, model.totals());
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_journal_answers_as_a_plain_list_would(
        steps in vec(step(), 1..40),
        memory_bytes_max in prop_oneof![Just(0usize), Just(20_000), Just(1 << 20)],
    ) {
        play(steps, memory_bytes_max)?;
    }
}
