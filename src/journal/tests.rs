//! What a journal promises, one sentence each; `model_tests` has the combinations.

// The only lost range is a range, not the numbers in it.
#![allow(clippy::unwrap_used, clippy::single_range_in_vec_init)]

use std::io::ErrorKind;

use sha2::{Digest, Sha256};

use super::state::Place;
use super::*;
use crate::store::scratch::ScratchDir;

const KIB: usize = 1024;

fn limits(full: Full) -> Limits {
    Limits { memory_bytes_max: 32 * KIB, spill_bytes_max: 128 * KIB as u64, full }
}

fn journal(dir: &ScratchDir) -> Journal {
    Journal::create(dir.path(), 1, limits(Full::DropOldest)).unwrap()
}

fn put(journal: &mut Journal, tag: u8, bytes: &[u8]) -> Result<Range<u64>, JournalError> {
    let mark = journal.reader().published() + 100;
    journal.append(&[Append { tag, mark, bytes }])
}

/// The only stream's totals.
fn total(journal: &Journal) -> Totals {
    let [total] = <[Totals; 1]>::try_from(journal.reader().totals()).unwrap();
    total
}

fn text(page: &Page) -> Vec<u8> {
    page.records.iter().flat_map(|record| record.bytes.to_vec()).collect()
}

fn newest_file(dir: &ScratchDir) -> PathBuf {
    segment_files(dir.path()).unwrap().pop().unwrap().1
}

/// Lets `bytes` more bytes reach the disk, then fails as a full one does: after a part of the write.
fn fill_disk(journal: &mut Journal, mut bytes: usize) {
    journal.write_run = Box::new(move |mut file, run| {
        let fits = run.len().min(bytes);
        bytes -= fits;
        file.write_all(&run[..fits])?;
        if fits == run.len() { Ok(()) } else { Err(ErrorKind::StorageFull.into()) }
    });
}

#[test]
fn what_was_appended_is_there_after_reopening_with_the_same_numbers_offsets_and_digest() {
    let dir = ScratchDir::new();
    let mut journal = journal(&dir);
    put(&mut journal, 0, b"one").unwrap();
    put(&mut journal, 1, b"two").unwrap();
    put(&mut journal, 0, b"").unwrap();
    put(&mut journal, 0, b"three").unwrap();
    let (page, totals) = (journal.reader().page(0, None, KIB).unwrap(), journal.reader().totals());
    drop(journal);

    let mut journal = Journal::open(dir.path(), limits(Full::DropOldest)).unwrap();
    assert_eq!(journal.reader().page(0, None, KIB).unwrap(), page);
    assert_eq!(journal.reader().totals(), totals);
    assert_eq!(totals[0].sha256.unwrap()[..], Sha256::digest(b"onethree")[..]);
    assert_eq!(journal.reader().last_mark(), Some(103));
    assert_eq!(put(&mut journal, 0, b"!").unwrap(), 5..6);
    assert_eq!(journal.reader().page(4, None, KIB).unwrap().records[0].offset, 8);
}

#[test]
fn numbers_begin_where_the_owner_wants() {
    let dir = ScratchDir::new();
    let mut journal = Journal::create(dir.path(), 100, limits(Full::DropOldest)).unwrap();
    assert_eq!(journal.reader().published(), 99);
    assert_eq!(put(&mut journal, 0, b"x").unwrap(), 100..101);
    let page = journal.reader().page(0, None, KIB).unwrap();
    assert_eq!((page.records[0].seq, page.lost), (100, None));
    assert!(matches!(Journal::create(dir.path(), 1, limits(Full::DropOldest)), Err(JournalError::Exists)));
}

#[test]
fn a_torn_last_record_is_cut_off_and_its_number_given_again() {
    let dir = ScratchDir::new();
    let mut journal = journal(&dir);
    put(&mut journal, 0, b"whole").unwrap();
    put(&mut journal, 0, b"torn").unwrap();
    drop(journal);
    let file = OpenOptions::new().write(true).open(newest_file(&dir)).unwrap();
    file.set_len(file.metadata().unwrap().len() - 1).unwrap();

    let mut journal = Journal::open(dir.path(), limits(Full::DropOldest)).unwrap();
    assert_eq!(put(&mut journal, 0, b"again").unwrap(), 2..3);
    drop(journal);
    let journal = Journal::open(dir.path(), limits(Full::DropOldest)).unwrap();
    assert_eq!(text(&journal.reader().page(0, None, KIB).unwrap()), b"wholeagain");
    assert_eq!(total(&journal).sha256.unwrap()[..], Sha256::digest(b"wholeagain")[..]);
}

#[test]
fn damage_in_an_old_segment_becomes_a_hole_of_known_size_and_the_digest_stays() {
    let dir = ScratchDir::new();
    let mut journal = journal(&dir);
    for _ in 0..5 {
        put(&mut journal, 0, &[7; 20 * KIB]).unwrap();
    }
    let (sha256, live) = (total(&journal).sha256, journal.reader().clone());
    let mut old = fs::read(dir.path().join("00000000000000000001.seg")).unwrap();
    let at = old.len() - 30 * KIB;
    old[at] ^= 1;
    fs::write(dir.path().join("00000000000000000001.seg"), &old).unwrap();

    // A reader that is there meets it, and so does the next process.
    let lost = Some(Lost { seqs: 2..4, resume: vec![(0, 60 * KIB as u64)] });
    assert_eq!(live.page(1, None, KIB).unwrap().lost, lost);
    drop(journal);
    let journal = Journal::open(dir.path(), limits(Full::DropOldest)).unwrap();
    let whole = journal.reader().page(0, None, 200 * KIB).unwrap();
    assert_eq!((whole.records.len(), whole.end), (1, false), "a page ends before a hole");
    assert_eq!(journal.reader().page(whole.next_seq, None, KIB).unwrap().lost, lost);
    assert_eq!(journal.reader().lost_ranges(0), [20 * KIB as u64..60 * KIB as u64]);
    assert_eq!((total(&journal).lost_bytes, total(&journal).sha256), (40 * KIB as u64, sha256));
    let by_byte = journal.reader().page_from(0, 30 * KIB as u64, KIB).unwrap();
    assert_eq!(by_byte.lost.unwrap().resume, [(0, 60 * KIB as u64)]);
}

#[test]
fn a_file_that_was_not_even_begun_is_dropped_and_the_one_before_goes_on() {
    let dir = ScratchDir::new();
    let mut journal = journal(&dir);
    put(&mut journal, 0, &[1; 40 * KIB]).unwrap();
    put(&mut journal, 0, &[2; 40 * KIB]).unwrap();
    drop(journal);
    fs::write(newest_file(&dir), b"EGWJ").unwrap();

    let mut journal = Journal::open(dir.path(), limits(Full::DropOldest)).unwrap();
    assert_eq!(put(&mut journal, 0, &[3; 40 * KIB]).unwrap(), 2..3);
    let sha256 = Sha256::new_with_prefix([1; 40 * KIB]).chain_update([3; 40 * KIB]).finalize();
    assert_eq!(total(&journal).sha256.unwrap()[..], sha256[..]);
    drop(journal);
    fs::write(dir.path().join("00000000000000000001.seg"), b"").unwrap();
    fs::write(newest_file(&dir), b"").unwrap();
    assert!(matches!(Journal::open(dir.path(), limits(Full::DropOldest)), Err(JournalError::Missing)));
    Journal::remove(dir.path()).unwrap();
    assert!(Journal::create(dir.path(), 1, limits(Full::DropOldest)).is_ok());
}

#[test]
fn past_the_quota_the_oldest_go_and_are_counted_to_the_byte() {
    let dir = ScratchDir::new();
    let mut journal = journal(&dir);
    for n in 0..60u8 {
        put(&mut journal, 0, &[n; 10 * KIB]).unwrap();
        assert!(journal.reader().disk_bytes() <= 128 * KIB as u64);
    }
    let page = journal.reader().page(0, None, 1).unwrap();
    let first = journal.reader().first_seq();
    assert!(first > 40, "{first}");
    let lost_bytes = (first - 1) * 10 * KIB as u64;
    assert_eq!(page.lost, Some(Lost { seqs: 1..first, resume: vec![(0, lost_bytes)] }));
    assert_eq!((page.records[0].seq, page.records[0].offset), (first, lost_bytes));
    assert_eq!(journal.reader().lost_ranges(0), [0..lost_bytes]);
    drop(journal);
    let journal = Journal::open(dir.path(), limits(Full::DropOldest)).unwrap();
    assert_eq!(total(&journal).lost_bytes, lost_bytes);
    assert!(total(&journal).sha256.is_some(), "dropped bytes were hashed");
}

#[test]
fn a_journal_told_to_refuse_says_so_and_changes_nothing() {
    let dir = ScratchDir::new();
    let mut journal = Journal::create(dir.path(), 1, limits(Full::Refuse)).unwrap();
    while journal.reader().disk_bytes() < 120 * KIB as u64 {
        put(&mut journal, 0, &[1; 3 * KIB]).unwrap();
    }
    let before = (journal.reader().totals(), journal.reader().disk_bytes(), journal.reader().published());
    assert!(matches!(put(&mut journal, 0, &[1; 20 * KIB]), Err(JournalError::Full { .. })));
    assert!(matches!(put(&mut journal, 0, &[1; 65 * KIB]), Err(JournalError::TooLarge { .. })));
    assert_eq!((journal.reader().totals(), journal.reader().disk_bytes(), journal.reader().published()), before);
    assert_eq!(journal.reader().first_seq(), 1);
}

#[test]
fn shrinking_to_nothing_keeps_the_numbers_and_the_sums() {
    let dir = ScratchDir::new();
    let mut journal = journal(&dir);
    for _ in 0..9 {
        put(&mut journal, 2, &[1; 10 * KIB]).unwrap();
    }
    journal.shrink_to(70 * KIB as u64).unwrap();
    assert!(journal.reader().disk_bytes() <= 70 * KIB as u64 && journal.reader().first_seq() < 10);
    journal.shrink_to(0).unwrap();
    assert_eq!((journal.reader().first_seq(), total(&journal).lost_bytes), (10, 90 * KIB as u64));
    assert_eq!(journal.reader().page(0, None, KIB).unwrap().lost.unwrap().seqs, 1..10);
    drop(journal);
    let mut journal = Journal::open(dir.path(), limits(Full::DropOldest)).unwrap();
    assert_eq!(journal.reader().last_mark(), Some(108));
    assert_eq!(put(&mut journal, 2, b"x").unwrap(), 10..11);
}

#[test]
fn a_gap_moves_the_offset_and_ends_the_digest() {
    let dir = ScratchDir::new();
    let mut journal = journal(&dir);
    put(&mut journal, 0, b"abc").unwrap();
    journal.append_gap(0, Some(10), 2, 7).unwrap();
    put(&mut journal, 0, b"def").unwrap();
    let sum = total(&journal);
    assert_eq!((sum.bytes, sum.lost_bytes, sum.exact, sum.sha256), (16, 10, true, None));
    assert_eq!(journal.reader().lost_ranges(0), [3..13]);
    journal.append_gap(0, None, 1, 8).unwrap();
    put(&mut journal, 0, b"g").unwrap();
    drop(journal);

    let journal = Journal::open(dir.path(), limits(Full::DropOldest)).unwrap();
    assert!(!total(&journal).exact);
    let page = journal.reader().page_from(0, 5, KIB).unwrap();
    let seen: Vec<_> = page.records.iter().map(|r| (r.offset, r.gap.map(|gap| gap.bytes), r.bytes.len())).collect();
    assert_eq!(seen, [(5, Some(Some(8)), 0), (13, None, 3), (16, Some(None), 0), (16, None, 1)]);
}

#[test]
fn a_full_disk_takes_nothing_of_a_batch_and_the_journal_goes_on_in_memory() {
    let dir = ScratchDir::new();
    let mut journal = journal(&dir);
    put(&mut journal, 0, &[1; 50 * KIB]).unwrap();
    fill_disk(&mut journal, 20 * KIB);
    // The first run fits, the second, in a new file, does not.
    let chunk = Append { tag: 0, mark: 0, bytes: &[2; 8 * KIB] };
    assert!(matches!(journal.append(&[chunk; 3]), Err(JournalError::Disk(_))));
    assert_eq!((journal.reader().published(), total(&journal).bytes), (1, 50 * KIB as u64));

    journal.continue_in_memory();
    for batch in 0..4 {
        assert_eq!(journal.append(&[chunk; 3]).unwrap().start, 2 + 3 * batch);
    }
    // 96 KiB went to a memory of 32 KiB: three records are left, and the disk's one.
    let reader = journal.reader();
    assert_eq!(total(&journal).lost_bytes, 72 * KIB as u64);
    assert_eq!(reader.lost_ranges(0), [50 * KIB as u64..122 * KIB as u64]);
    assert_eq!(reader.first_seq(), 1);
    let page = reader.page(1, None, 99 * KIB).unwrap();
    assert_eq!(page.lost, Some(Lost { seqs: 2..11, resume: vec![(0, 122 * KIB as u64)] }));
    assert_eq!((page.records.len(), page.end), (3, true));
    let sha256 = Sha256::new_with_prefix([1; 50 * KIB]).chain_update([2; 96 * KIB]).finalize();
    assert_eq!(total(&journal).sha256.unwrap()[..], sha256[..]);
    drop(journal);
    let journal = Journal::open(dir.path(), limits(Full::DropOldest)).unwrap();
    assert_eq!((journal.reader().published(), total(&journal).lost_bytes), (1, 0));
}

#[test]
fn a_disk_that_has_room_again_takes_the_batch_that_failed() {
    let dir = ScratchDir::new();
    let mut journal = journal(&dir);
    put(&mut journal, 0, b"before").unwrap();
    fill_disk(&mut journal, 10);
    assert!(put(&mut journal, 0, b"held back").is_err());
    fill_disk(&mut journal, KIB);
    put(&mut journal, 0, b"after").unwrap();
    journal.sync().unwrap();
    drop(journal);
    let journal = Journal::open(dir.path(), limits(Full::DropOldest)).unwrap();
    assert_eq!(text(&journal.reader().page(0, None, KIB).unwrap()), b"beforeafter");
}

#[test]
fn a_journal_in_memory_forgets_exactly_what_no_longer_fits() {
    let mut journal = Journal::in_memory(1, limits(Full::Refuse));
    for n in 0..100u8 {
        put(&mut journal, 0, &[n; KIB]).unwrap();
    }
    journal.append_gap(0, Some(5), 1, 0).unwrap();
    let first = journal.reader().first_seq();
    assert!((70..75).contains(&first), "{first}");
    assert_eq!(total(&journal).lost_bytes, (first - 1) * KIB as u64 + 5);
    assert_eq!(journal.reader().page(0, None, 1).unwrap().records[0].bytes[0], first as u8 - 1);
    journal.shrink_to(0).unwrap();
    assert_eq!(journal.reader().first_seq(), first);
}

#[test]
fn numbers_that_are_left_out_are_a_hole_on_disk_in_memory_and_after_reopening() {
    let dir = ScratchDir::new();
    let check = |journal: &Journal, kept: &[u8]| {
        let first = journal.reader().page(0, None, KIB).unwrap();
        let kept_seqs = first.records.iter().map(|record| record.seq).collect::<Vec<_>>();
        let page = if kept_seqs == [1] { journal.reader().page(1, None, KIB).unwrap() } else { first };
        let lost = page.lost.unwrap();
        assert_eq!((lost.seqs.end, lost.resume), (10, vec![(0, kept.len() as u64)]));
        assert_eq!((page.records[0].seq, page.records[0].offset, page.next_seq), (10, kept.len() as u64, 10));
        assert_eq!(total(journal).lost_bytes, 0);
    };
    let mut on_disk = journal(&dir);
    put(&mut on_disk, 0, b"one").unwrap();
    on_disk.skip(8).unwrap();
    assert_eq!(on_disk.reader().page(5, None, KIB).unwrap().lost.unwrap().seqs, 6..10, "before anything follows");
    put(&mut on_disk, 0, b"ten").unwrap();
    check(&on_disk, b"one");
    drop(on_disk);
    let mut reopened = Journal::open(dir.path(), limits(Full::DropOldest)).unwrap();
    check(&reopened, b"one");
    assert_eq!(put(&mut reopened, 0, b"more").unwrap(), 11..12);

    let mut in_memory = Journal::in_memory(1, limits(Full::DropOldest));
    in_memory.skip(9).unwrap();
    put(&mut in_memory, 0, b"ten").unwrap();
    check(&in_memory, b"");
}

#[test]
fn a_file_deleted_while_it_is_read_stays_readable_and_a_lookup_after_it_moves_on() {
    let dir = ScratchDir::new();
    let mut journal = journal(&dir);
    for n in 0..12u8 {
        put(&mut journal, 0, &[n; 8 * KIB]).unwrap();
    }
    let reader = journal.reader().clone();
    let (Place::Disk { first_seq, part, .. }, opened) =
        (reader.state().locate(1, None), File::open(dir.path().join("00000000000000000001.seg")))
    else {
        panic!("record 1 is on disk");
    };
    journal.shrink_to(0).unwrap();
    // One reader had opened the file in time, the other had only looked it up.
    let bytes = reader.read(first_seq, Some(Arc::new(opened.unwrap())), &part).unwrap();
    assert_eq!(segment::decode(&mut bytes.unwrap()).unwrap().bytes, [0; 8 * KIB][..]);
    assert!(reader.read(first_seq, None, &part).unwrap().is_none());
    assert!(reader.page(0, None, KIB).unwrap().end);
}

#[test]
fn a_page_of_a_rare_stream_passes_over_the_blocks_of_the_others() {
    let dir = ScratchDir::new();
    let mut journal = journal(&dir);
    put(&mut journal, 1, b"first").unwrap();
    for _ in 0..50 {
        put(&mut journal, 0, &[0; 2 * KIB]).unwrap();
    }
    put(&mut journal, 1, b"last").unwrap();
    let page = journal.reader().page(0, Some(1), KIB).unwrap();
    assert_eq!((text(&page), page.end, page.next_seq), (b"firstlast".to_vec(), true, 52));
    assert_eq!(text(&journal.reader().page_from(1, 3, KIB).unwrap()), b"stlast");
    assert_eq!(text(&journal.reader().page(0, Some(9), KIB).unwrap()), b"");
}

#[test]
fn the_seventeenth_stream_is_refused() {
    let mut journal = Journal::in_memory(1, limits(Full::DropOldest));
    for tag in 0..16 {
        put(&mut journal, tag, b"x").unwrap();
    }
    assert!(matches!(put(&mut journal, 16, b"x"), Err(JournalError::TooManyStreams)));
    assert_eq!(journal.reader().totals().len(), 16);
}

#[test]
fn readers_on_other_threads_see_every_record_once_and_in_order_while_it_is_written() {
    let dir = ScratchDir::new();
    let roomy = Limits { spill_bytes_max: 1 << 30, ..limits(Full::DropOldest) };
    let mut journal = Journal::create(dir.path(), 1, roomy).unwrap();
    let records = 3000;
    std::thread::scope(|scope| {
        for _ in 0..2 {
            let reader = journal.reader().clone();
            scope.spawn(move || {
                let mut next_seq = 0;
                while next_seq < records {
                    let page = reader.page(next_seq, None, 16 * KIB).unwrap();
                    for record in page.records {
                        next_seq += 1;
                        assert_eq!((record.seq, record.bytes[..] == next_seq.to_le_bytes()), (next_seq, true));
                    }
                    std::thread::yield_now();
                }
            });
        }
        for seq in 1..=records {
            put(&mut journal, 0, &seq.to_le_bytes()).unwrap();
        }
    });
}
