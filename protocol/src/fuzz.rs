//! Runs the fuzz targets on stable: the corpus, random bytes, and mutations of both, from a fixed seed.
//! `EXEC_GATEWAY_FUZZ_ITERATIONS` sets the number of inputs per target.

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
    let mut pool = corpus(name);
    pool.iter().for_each(|input| target(input));
    let iterations = std::env::var("EXEC_GATEWAY_FUZZ_ITERATIONS").ok();
    let iterations: u64 = iterations.map_or(200_000, |count| count.parse().expect("a number of iterations"));
    let mut random = SplitMix(0x5eed);
    pool.push(Vec::new());
    for _ in 0..iterations {
        let mut input = pool[random.below(pool.len())].clone();
        for _ in 0..random.below(6) {
            let other = &pool[random.below(pool.len())];
            mutate(&mut input, other, &mut random);
        }
        target(&input);
    }
}

fn corpus(name: &str) -> Vec<Vec<u8>> {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
    let mut files: Vec<_> = folder.read_dir().expect("the corpus").map(|entry| entry.expect("a file").path()).collect();
    // Folders list in any order, and a seed must always make the same inputs.
    files.sort();
    assert!(!files.is_empty(), "{name} has no corpus");
    files.iter().map(|file| std::fs::read(file).expect("a file of the corpus")).collect()
}

fn mutate(input: &mut Vec<u8>, other: &[u8], random: &mut SplitMix) {
    let at = random.below(input.len() + 1);
    let byte = random.next() as u8;
    match random.below(7) {
        0 if at < input.len() => input[at] = byte,
        1 if at < input.len() => input[at] ^= 1 << (byte % 8),
        2 if at < input.len() => drop(input.remove(at)),
        3 => input.truncate(at),
        4 => input.extend_from_slice(other),
        5 => drop(input.splice(at.., other[random.below(other.len() + 1)..].iter().copied())),
        _ => input.insert(at, byte),
    }
}

/// A generator that needs no crate and gives the same inputs everywhere.
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }
}
