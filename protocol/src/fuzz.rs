//! Runs the fuzz targets on stable. `EXEC_GATEWAY_FUZZ_ITERATIONS` sets the number of inputs per target.

#[path = "../fuzz/feed.rs"]
mod feeding;
#[path = "../fuzz/targets/frame.rs"]
mod frame;
#[path = "../fuzz/targets/message.rs"]
mod message;
#[path = "../fuzz/targets/rpc.rs"]
mod rpc;

#[test]
fn frames_that_can_be_read_can_be_written() {
    feed("frame", frame::run);
}

#[test]
fn messages_do_not_depend_on_how_records_were_cut() {
    feed("message", message::run);
}

#[test]
fn json_rpc_that_can_be_read_can_be_written() {
    feed("rpc", rpc::run);
}

fn feed(name: &str, target: fn(&[u8])) {
    feeding::feed(corpus(name), 200_000, target);
}

fn corpus(name: &str) -> Vec<Vec<u8>> {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
    let mut files: Vec<_> = folder.read_dir().expect("the corpus").map(|entry| entry.expect("a file").path()).collect();
    // Folders list in any order, and a seed must always make the same inputs.
    files.sort();
    assert!(!files.is_empty(), "{name} has no corpus");
    files.iter().map(|file| std::fs::read(file).expect("a file of the corpus")).collect()
}
