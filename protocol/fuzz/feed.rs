//! Feeds a target on stable: a corpus, random bytes, and mutations of both, from a fixed seed. Shared by the crates whose
//! tests have targets.

/// Runs the target on so many inputs, or on as many as `EXEC_GATEWAY_FUZZ_ITERATIONS` says.
pub fn feed(corpus: Vec<Vec<u8>>, iterations: u64, target: impl Fn(&[u8])) {
    let mut pool = corpus;
    pool.iter().for_each(|input| target(input));
    let wanted = std::env::var("EXEC_GATEWAY_FUZZ_ITERATIONS").ok();
    let iterations = wanted.map_or(iterations, |count| count.parse().expect("a number of iterations"));
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
