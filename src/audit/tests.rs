//! Tests of the audit: the chain under every kind of change, kills at every byte, disks that take no more.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::protocol::ids::WorkspaceId;
use crate::store::scratch::ScratchDir;

fn settings() -> config::Audit {
    config::Audit { enabled: true, ..config::Audit::default() }
}

/// Files of one or two records.
fn small_files() -> config::Audit {
    config::Audit { file_bytes_max: 500, ..settings() }
}

fn act(request: &str) -> Act {
    let workspace = WorkspaceId::new("acme").unwrap();
    Act::new("tool.call").by(&workspace, None, "tok_1").asked_as(request).with_tool("shell").at("box")
}

async fn call(audit: &Audit, request: &str) {
    audit.begin(act(request)).await.unwrap().end(Outcome::new("ok").bytes(1, 2).exit_code(Some(0)));
}

/// An audit of a few calls in several files, closed.
async fn filled(dir: &Path, calls: usize) {
    let audit = Audit::open(dir, small_files()).unwrap();
    for nth in 0..calls {
        call(&audit, &format!("req_{nth}")).await;
    }
    audit.close();
}

fn file_paths(dir: &Path) -> Vec<PathBuf> {
    files::list(dir).unwrap().into_iter().map(|first_seq| files::path(dir, first_seq)).collect()
}

fn records(dir: &Path) -> Vec<Value> {
    let mut reader = AuditReader::open(dir, None).unwrap();
    let mut records = Vec::new();
    while let Some(line) = reader.next_line().unwrap() {
        records.push(serde_json::from_slice(&line.text).unwrap());
    }
    records
}

fn of_kind<'a>(records: &'a [Value], kind: &str) -> Vec<&'a Value> {
    records.iter().filter(|record| record["kind"] == kind).collect()
}

fn broken(dir: &Path) -> Option<Broken> {
    match verify(dir) {
        Ok(_) => None,
        Err(VerifyError::Broken(broken)) => Some(broken),
        Err(error) => panic!("{error}"),
    }
}

#[tokio::test]
async fn a_call_is_on_record_before_it_begins_and_its_end_when_it_is_over() {
    let dir = ScratchDir::new();
    let audit = Audit::open(dir.path(), settings()).unwrap();

    let entry = audit.begin(act("req_1").about(json!({ "command": ["ls", "-l"] }))).await.unwrap();
    let begun = records(dir.path());
    assert_eq!(of_kind(&begun, "begin").len(), 1);
    let begin = of_kind(&begun, "begin")[0].clone();
    entry.end(Outcome::new("ok").bytes(10, 20).exit_code(Some(3)).with("frames", 4));
    audit.close();

    let records = records(dir.path());
    let end = of_kind(&records, "end")[0];
    for (field, value) in
        [("action", "tool.call"), ("workspace", "acme"), ("credential", "tok_1"), ("environment", "box")]
    {
        assert_eq!(begin[field], value);
    }
    assert_eq!((&begin["request"], &begin["tool"]), (&json!("req_1"), &json!("shell")));
    assert_eq!(begin["what"], json!({ "command": ["ls", "-l"] }));
    assert_eq!((&end["of"], &end["outcome"], &end["exit_code"]), (&begin["seq"], &json!("ok"), &json!(3)));
    assert_eq!((&end["bytes_in"], &end["bytes_out"], &end["frames"]), (&json!(10), &json!(20), &json!(4)));
    assert_eq!((&end["action"], &end["workspace"]), (&json!("tool.call"), &json!("acme")));
    assert!(end["duration_ms"].is_u64());
    let verified = verify(dir.path()).unwrap();
    assert_eq!((verified.first_seq, verified.head.seq, verified.missing, verified.torn), (1, 3, 0, false));
}

#[tokio::test]
async fn files_and_directory_are_for_the_gateways_user_alone() {
    use std::os::unix::fs::PermissionsExt;
    let dir = ScratchDir::new();
    filled(dir.path(), 1).await;
    assert_eq!(fs::metadata(dir.path()).unwrap().permissions().mode() & 0o777, 0o700);
    for file in file_paths(dir.path()) {
        assert_eq!(fs::metadata(file).unwrap().permissions().mode() & 0o777, 0o600);
    }
}

#[tokio::test]
async fn what_is_too_long_is_cut_and_told_by_size_and_hash() {
    let dir = ScratchDir::new();
    let audit = Audit::open(dir.path(), config::Audit { detail_bytes_max: 256, ..settings() }).unwrap();
    let command = "é".repeat(10_000);
    drop(audit.begin(act(&"r".repeat(5000)).at(&"e".repeat(5000)).about(json!(command))).await.unwrap());
    audit.close();
    let records = records(dir.path());
    let begin = of_kind(&records, "begin")[0];
    let text = json!(command).to_string();
    assert_eq!(begin["what"]["bytes"], text.len());
    assert_eq!(begin["what"]["sha256"], record::hex(&Position::START.after(text.as_bytes()).hash));
    assert!(text.starts_with(begin["what"]["cut"].as_str().unwrap()));
    assert!(begin.to_string().len() < 2000);
}

#[tokio::test]
async fn contents_have_a_bound_of_their_own() {
    for (content_bytes_max, whole) in [(256, false), (4096, true)] {
        let dir = ScratchDir::new();
        let settings = config::Audit { contents: true, detail_bytes_max: 256, content_bytes_max, ..settings() };
        let audit = Audit::open(dir.path(), settings).unwrap();
        let contents = json!({ "content": "x".repeat(2000) });
        drop(audit.begin(act("req").containing(contents.clone())).await.unwrap());
        audit.close();
        let records = records(dir.path());
        let recorded = &of_kind(&records, "begin")[0]["contents"];
        assert_eq!(*recorded == contents, whole, "{recorded}");
        assert_eq!(recorded["bytes"] == contents.to_string().len(), !whole, "{recorded}");
    }
}

#[tokio::test]
async fn contents_are_recorded_only_where_that_is_switched_on() {
    for contents in [false, true] {
        let dir = ScratchDir::new();
        let audit = Audit::open(dir.path(), config::Audit { contents, ..settings() }).unwrap();
        assert_eq!(audit.keeps_contents(), contents);
        drop(audit.begin(act("req").containing(json!({ "content": "s3cret" }))).await.unwrap());
        audit.close();
        let text = fs::read_to_string(&file_paths(dir.path())[0]).unwrap();
        assert_eq!(text.contains("s3cret"), contents);
    }
}

#[tokio::test]
async fn an_audit_that_is_off_leaves_no_trace() {
    let dir = ScratchDir::new();
    let audit = Audit::open(dir.path(), config::Audit { enabled: false, ..settings() }).unwrap();
    call(&audit, "req").await;
    audit.close();
    assert!(!dir.path().exists());
}

#[tokio::test]
async fn a_caller_that_leaves_is_on_record_as_such() {
    let dir = ScratchDir::new();
    let audit = Audit::open(dir.path(), settings()).unwrap();
    drop(audit.begin(act("left later")).await.unwrap());
    {
        let mut begin = std::pin::pin!(audit.begin(act("left at once")));
        assert!(futures_util::poll!(begin.as_mut()).is_pending());
    }
    // Answered behind the one that has left.
    call(&audit, "stayed").await;
    audit.close();
    let records = records(dir.path());
    let outcomes: Vec<_> = of_kind(&records, "end").iter().map(|end| end["outcome"].as_str().unwrap()).collect();
    assert_eq!((of_kind(&records, "begin").len(), outcomes.len()), (3, 3), "{records:?}");
    assert_eq!(outcomes.iter().filter(|outcome| **outcome == "cancelled").count(), 2);
}

#[tokio::test]
async fn no_byte_of_a_chain_can_be_changed_unseen() {
    let dir = ScratchDir::new();
    filled(dir.path(), 3).await;
    let whole = verify(dir.path()).unwrap();
    assert!(whole.files > 1);
    for file in file_paths(dir.path()) {
        let bytes = fs::read(&file).unwrap();
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] = match changed[at] {
                b'0'..=b'8' | b'a'..=b'y' => changed[at] + 1,
                b'\n' => b' ',
                b' ' => b'\n',
                other => other ^ 1,
            };
            fs::write(&file, changed).unwrap();
            // Of the newest line only the hash tells, which is why it is printed.
            let seen = verify(dir.path()).map_or(true, |verified| verified.head != whole.head);
            assert!(seen, "byte {at} of {}", file.display());
        }
        fs::write(&file, bytes).unwrap();
    }
    assert_eq!(verify(dir.path()).unwrap(), whole);
}

#[tokio::test]
async fn lines_cannot_be_dropped_added_or_swapped_unseen_and_the_first_break_is_named() {
    let dir = ScratchDir::new();
    filled(dir.path(), 8).await;
    let files = file_paths(dir.path());
    let file = &files[files.len() / 2];
    let bytes = fs::read(file).unwrap();
    let lines: Vec<&[u8]> = bytes.split_inclusive(|byte| *byte == b'\n').collect();
    assert!(lines.len() >= 3, "a head and two records");
    let first_seq = files::list(dir.path()).unwrap()[files.len() / 2];
    let check = |what: &str, changed: Vec<&[u8]>, line: u64| {
        fs::write(file, changed.concat()).unwrap();
        let found = broken(dir.path()).unwrap_or_else(|| panic!("{what} is not seen"));
        assert_eq!((&found.file, found.line, found.seq), (file, line, first_seq + line - 1), "{what}: {found}");
    };
    let with = |order: &[usize]| order.iter().map(|at| lines[*at]).collect::<Vec<_>>();
    check("a dropped line", with(&[0, 2]), 2);
    check("a swap", with(&[0, 2, 1]), 2);
    check("a doubled line", with(&[0, 1, 1, 2]), 3);
    check("a line cut short", vec![lines[0], &lines[1][..20], b"\n", lines[2]], 2);
    check("a file cut short", vec![lines[0], &lines[1][..20]], 2);
    check("bytes behind the last line", vec![&bytes, b"x"], lines.len() as u64 + 1);
    let forged = String::from_utf8(lines[1].to_vec()).unwrap().replace("acme", "evil");
    check("a changed line", vec![lines[0], forged.as_bytes(), lines[2]], 3);
    fs::write(file, &bytes).unwrap();
    assert_eq!(broken(dir.path()), None);

    fs::remove_file(file).unwrap();
    let found = broken(dir.path()).unwrap();
    assert_eq!((found.line, found.seq), (1, first_seq), "{found}");
    fs::write(file, &bytes).unwrap();
    fs::remove_file(&files[0]).unwrap();
    assert_eq!(broken(dir.path()).unwrap().why, "older records are gone, and none says that they went");
}

/// Fault 57: what was uploaded is never deleted, and the quota fills.
#[tokio::test]
async fn the_oldest_files_go_for_the_quota_and_the_rest_still_verifies() {
    let dir = ScratchDir::new();
    let quota = config::Audit { bytes_max: 5000, ..small_files() };
    let audit = Audit::open(dir.path(), quota).unwrap();
    for nth in 0..100 {
        call(&audit, &format!("req_{nth}")).await;
        let bytes: u64 = file_paths(dir.path()).iter().filter_map(|file| Some(fs::metadata(file).ok()?.len())).sum();
        // What is being filled may be larger by one batch.
        assert!(bytes < 6500, "{bytes}");
    }
    assert!(!audit.counts().failing);
    audit.close();
    let verified = verify(dir.path()).unwrap();
    assert!(verified.first_seq > 100 && verified.head.seq > 200, "{verified:?}");
    let records = records(dir.path());
    let last = *of_kind(&records, "dropped").last().unwrap();
    assert_eq!((&last["through_seq"], &last["why"]), (&json!(verified.first_seq - 1), &json!("quota")));

    // The record of what went is what vouches for the rest.
    fs::remove_file(&file_paths(dir.path())[0]).unwrap();
    assert!(broken(dir.path()).is_some());
}

#[tokio::test]
async fn files_go_when_their_time_is_over() {
    let dir = ScratchDir::new();
    filled(dir.path(), 6).await;
    let files = file_paths(dir.path()).len();
    assert!(files > 2);
    Audit::open(dir.path(), config::Audit { retention_days: 0, ..settings() }).unwrap().close();
    assert_eq!(file_paths(dir.path()).len(), 1);
    let records = records(dir.path());
    assert!(of_kind(&records, "dropped").iter().all(|dropped| dropped["why"] == "age"));
    assert_eq!(verify(dir.path()).unwrap().files, 1);
}

/// Fault 58: each append lists the directory. Here nothing is looked up by its name: the directory may be elsewhere.
#[tokio::test]
async fn a_record_costs_no_look_at_the_directory() {
    let (dir, elsewhere) = (ScratchDir::new(), ScratchDir::new());
    let audit = Audit::open(dir.path(), settings()).unwrap();
    call(&audit, "before").await;
    fs::rename(dir.path(), elsewhere.path()).unwrap();
    for nth in 0..10 {
        call(&audit, &format!("req_{nth}")).await;
    }
    audit.close();
    assert_eq!(of_kind(&records(elsewhere.path()), "end").len(), 11);
}

/// Fault 61: two rotations in one second reuse a file's name.
#[tokio::test]
async fn files_of_one_moment_have_names_of_their_own() {
    let dir = ScratchDir::new();
    let audit = Audit::open(dir.path(), config::Audit { file_bytes_max: 1, ..settings() }).unwrap();
    for nth in 0..20 {
        call(&audit, &format!("req_{nth}")).await;
    }
    audit.close();
    let (records, verified) = (records(dir.path()), verify(dir.path()).unwrap());
    assert_eq!(of_kind(&records, "begin").len(), 20);
    assert!(verified.files >= 20, "{verified:?}");
}

/// What is on a disk that takes nothing while `full` is set, and half of what it is given at the moment it fills.
fn failing(dir: &Path, settings: config::Audit) -> (Audit, Arc<AtomicBool>) {
    let full = Arc::new(AtomicBool::new(false));
    let is_full = full.clone();
    let audit = Audit::with(dir, settings.into(), |files| {
        let mut write = std::mem::replace(&mut files.write, Box::new(|_, _| Ok(())));
        files.write = Box::new(move |file, bytes| {
            if is_full.load(Ordering::SeqCst) {
                write(file, &bytes[..bytes.len() / 2])?;
                return Err(io::ErrorKind::StorageFull.into());
            }
            write(file, bytes)
        });
    });
    (audit.unwrap(), full)
}

async fn begins_again(audit: &Audit, request: &str) -> Entry {
    loop {
        // Tried every tenth of a second.
        if let Ok(entry) = audit.begin(act(request)).await {
            return entry;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Fault 60: closed at the start and open later. Here what has begun keeps its end, and nothing else begins.
#[tokio::test]
async fn a_full_disk_refuses_calls_and_costs_no_end_of_those_before() {
    let dir = ScratchDir::new();
    let (audit, full) = failing(dir.path(), settings());
    let running = audit.begin(act("running")).await.unwrap();
    full.store(true, Ordering::SeqCst);

    for _ in 0..10 {
        assert!(matches!(audit.begin(act("refused")).await, Err(AuditError::Unavailable)));
    }
    running.end(Outcome::new("ok"));
    assert!(audit.counts().failing);
    assert_eq!(audit.counts().refused, 10);
    assert!(audit.begin(act("an end of a right").always()).await.is_ok(), "what takes away is never refused");

    full.store(false, Ordering::SeqCst);
    begins_again(&audit, "after").await.end(Outcome::new("ok"));
    audit.close();
    let records = records(dir.path());
    let begins: Vec<_> = of_kind(&records, "begin").iter().map(|begin| begin["request"].clone()).collect();
    assert_eq!(begins, ["running", "after"]);
    assert_eq!(of_kind(&records, "end").len(), 2);
    // The beginning and the end of what was done all the same.
    assert_eq!(verify(dir.path()).unwrap().missing, 2);
    assert!(!audit.counts().failing);
}

#[tokio::test]
async fn where_calls_go_on_over_a_full_disk_what_is_missing_is_counted() {
    let dir = ScratchDir::new();
    let (audit, full) = failing(dir.path(), config::Audit { when_full: WhenFull::GoOn, ..settings() });
    call(&audit, "before").await;
    full.store(true, Ordering::SeqCst);
    for nth in 0..25 {
        call(&audit, &format!("missing_{nth}")).await;
    }
    full.store(false, Ordering::SeqCst);
    // Told by itself, without anybody calling.
    while verify(dir.path()).unwrap().missing < 50 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    call(&audit, "after").await;
    audit.close();
    let records = records(dir.path());
    let begins: Vec<_> = of_kind(&records, "begin").iter().map(|begin| begin["request"].clone()).collect();
    assert_eq!(begins, ["before", "after"]);
    assert_eq!(verify(dir.path()).unwrap().missing, 50);
    assert_eq!(audit.counts().missing, 50);
}

#[tokio::test]
async fn what_was_under_way_at_a_kill_ends_as_unknown_even_where_it_began_files_ago() {
    let dir = ScratchDir::new();
    let copy = ScratchDir::new();
    let audit = Audit::open(dir.path(), small_files()).unwrap();
    let long = audit.begin(act("long")).await.unwrap();
    for nth in 0..10 {
        call(&audit, &format!("req_{nth}")).await;
    }
    let last = audit.begin(act("last")).await.unwrap();
    killed(dir.path(), copy.path());
    drop((long, last));
    audit.close();

    Audit::open(copy.path(), settings()).unwrap().close();
    let found = records(copy.path());
    let unknown: Vec<_> = of_kind(&found, "end").into_iter().filter(|end| end["outcome"] == "unknown").collect();
    assert_eq!(unknown.len(), 2, "{found:?}");
    assert!(unknown.iter().all(|end| end["workspace"] == "acme" && end["action"] == "tool.call"));
    assert_each_ends_once(&found);
    verify(copy.path()).unwrap();
    Audit::open(copy.path(), settings()).unwrap().close();
    assert_eq!(records(copy.path()), found, "told once");
}

#[tokio::test]
async fn what_is_remembered_for_a_kill_is_bounded() {
    let dir = ScratchDir::new();
    let audit = Audit::open(dir.path(), config::Audit { open_max: 3, ..small_files() }).unwrap();
    let mut entries = Vec::new();
    for nth in 0..10 {
        entries.push(audit.begin(act(&format!("req_{nth}"))).await.unwrap());
    }
    drop(entries);
    audit.close();
    let records = records(dir.path());
    let remembered: Vec<_> =
        of_kind(&records, "file").iter().map(|head| head["open"].as_array().unwrap().len()).collect();
    assert_eq!(remembered.iter().max(), Some(&3), "{remembered:?}");
    // Who was forgotten still tells its own end.
    assert_each_ends_once(&records);
}

/// What a kill at this moment leaves: the system keeps what was written.
fn killed(dir: &Path, copy: &Path) {
    fs::create_dir_all(copy).unwrap();
    for file in file_paths(dir) {
        fs::copy(&file, copy.join(file.file_name().unwrap())).unwrap();
    }
}

fn assert_each_ends_once(records: &[Value]) {
    let mut ends: BTreeMap<u64, usize> = BTreeMap::new();
    for end in of_kind(records, "end") {
        *ends.entry(end["of"].as_u64().unwrap()).or_default() += 1;
    }
    let begins: BTreeSet<u64> = of_kind(records, "begin").iter().map(|begin| begin["seq"].as_u64().unwrap()).collect();
    assert_eq!(ends.keys().copied().collect::<BTreeSet<_>>(), begins);
    assert!(ends.values().all(|ends| *ends == 1), "{ends:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_kill_at_any_byte_leaves_a_chain_that_goes_on(cut in 0.0..1.0f64, calls in 1usize..6, unfinished in 0usize..3) {
        let (dir, copy) = (ScratchDir::new(), ScratchDir::new());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let audit = Audit::open(dir.path(), config::Audit { file_bytes_max: 900, ..settings() }).unwrap();
            let mut open = Vec::new();
            for nth in 0..unfinished {
                open.push(audit.begin(act(&format!("open_{nth}"))).await.unwrap());
            }
            for nth in 0..calls {
                call(&audit, &format!("req_{nth}")).await;
            }
            // Written behind the ends.
            open.push(audit.begin(act("last")).await.unwrap());
            killed(dir.path(), copy.path());
            drop(open);
            audit.close();

            let newest = file_paths(copy.path()).pop().unwrap();
            let bytes = fs::read(&newest).unwrap();
            let kept = &bytes[..(bytes.len() as f64 * cut) as usize];
            fs::write(&newest, kept).unwrap();
            let whole = records(copy.path());

            let audit = Audit::open(copy.path(), settings()).unwrap();
            call(&audit, "after").await;
            audit.close();
            let after = records(copy.path());
            assert_eq!(after[..whole.len()], whole[..], "what was written stays as it was");
            assert_each_ends_once(&after);
            let verified = verify(copy.path()).unwrap();
            assert_eq!((verified.first_seq, verified.head.seq as usize, verified.torn), (1, after.len(), false));
        });
    }
}

#[tokio::test]
async fn damage_by_others_is_neither_mended_nor_hidden_by_a_start() {
    let dir = ScratchDir::new();
    filled(dir.path(), 1).await;
    let newest = file_paths(dir.path()).pop().unwrap();
    let text = fs::read_to_string(&newest).unwrap();
    fs::write(&newest, text.replace("acme", "evil")).unwrap();
    let found = broken(dir.path());
    let audit = Audit::open(dir.path(), settings()).unwrap();
    call(&audit, "after").await;
    audit.close();
    assert!(broken(dir.path()).is_some(), "{found:?}");
    assert!(fs::read_to_string(&newest).unwrap().contains("evil"));
}

#[tokio::test]
async fn a_reader_follows_over_files_and_begins_where_it_is_told() {
    let dir = ScratchDir::new();
    let audit = Audit::open(dir.path(), small_files()).unwrap();
    call(&audit, "req_0").await;
    let mut reader = AuditReader::open(dir.path(), None).unwrap();
    let mut seen = 0;
    for nth in 1..10 {
        call(&audit, &format!("req_{nth}")).await;
        while let Some(line) = reader.next_line().unwrap() {
            seen += 1;
            assert_eq!(serde_json::from_slice::<Value>(&line.text).unwrap()["seq"], seen);
        }
    }
    audit.close();
    while reader.next_line().unwrap().is_some() {
        seen += 1;
    }
    assert_eq!(seen, verify(dir.path()).unwrap().head.seq);

    let later = SystemTime::now() + Duration::from_secs(60);
    let mut newest = AuditReader::open(dir.path(), Some(later)).unwrap();
    let first = newest.next_line().unwrap().unwrap();
    assert_eq!(Some(first.file), file_paths(dir.path()).pop());
    let mut all = AuditReader::open(dir.path(), Some(SystemTime::UNIX_EPOCH)).unwrap();
    assert_eq!(all.next_line().unwrap().unwrap().file, file_paths(dir.path())[0]);
}

#[tokio::test]
async fn many_callers_at_once_share_writes_and_each_is_on_record() {
    let dir = ScratchDir::new();
    let audit = Audit::open(dir.path(), config::Audit { queue_max: 8, ..settings() }).unwrap();
    let calls = (0..500).map(|nth| {
        let audit = audit.clone();
        tokio::spawn(async move { call(&audit, &format!("req_{nth}")).await })
    });
    for call in calls.collect::<Vec<_>>() {
        call.await.unwrap();
    }
    audit.close();
    let records = records(dir.path());
    let requests: BTreeSet<_> = of_kind(&records, "begin").iter().map(|begin| begin["request"].to_string()).collect();
    assert_eq!(requests.len(), 500);
    assert_each_ends_once(&records);
    verify(dir.path()).unwrap();
}
