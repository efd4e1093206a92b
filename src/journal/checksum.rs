//! The two sums of a journal: a CRC-32 per record, and a SHA-256 per stream that can be stored half done and taken up
//! again. Plain values; they do no I/O and never see a file.

use sha2::compress256;
use sha2::digest::generic_array::GenericArray;

const BLOCK: usize = 64;

/// CRC-32 (IEEE 802.3) of the parts, one after the other. The library has the processor multiply polynomials: with
/// tables this took an eighth of the gateway's time while a process printed much.
pub(super) fn crc32(parts: &[&[u8]]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    parts.iter().for_each(|part| crc.update(part));
    crc.finalize()
}

/// A SHA-256 under way (FIPS 180-4). The hasher of `sha2` cannot be stored between two blocks, so the block function
/// alone is taken from there.
#[derive(Debug, Clone)]
pub(super) struct RunningSha256 {
    state: [u32; 8],
    bytes: u64,
    /// The first `bytes % 64` are waiting for the rest of their block.
    partial: [u8; BLOCK],
}

impl RunningSha256 {
    pub(super) fn new() -> Self {
        let state =
            [0x6a09_e667, 0xbb67_ae85, 0x3c6e_f372, 0xa54f_f53a, 0x510e_527f, 0x9b05_688c, 0x1f83_d9ab, 0x5be0_cd19];
        Self { state, bytes: 0, partial: [0; BLOCK] }
    }

    pub(super) fn update(&mut self, mut data: &[u8]) {
        let filled = self.filled();
        self.bytes += data.len() as u64;
        if filled > 0 {
            let (now, rest) = data.split_at(data.len().min(BLOCK - filled));
            self.partial[filled..filled + now.len()].copy_from_slice(now);
            if filled + now.len() < BLOCK {
                return;
            }
            compress(&mut self.state, &self.partial);
            data = rest;
        }
        let (blocks, rest) = data.as_chunks::<BLOCK>();
        for block in blocks {
            compress(&mut self.state, block);
        }
        self.partial[..rest.len()].copy_from_slice(rest);
    }

    /// The digest of what was given so far; more may follow.
    pub(super) fn digest(&self) -> [u8; 32] {
        let mut end = self.clone();
        let mut padding = [0; BLOCK + 8];
        padding[0] = 0x80;
        // One bit, zeros up to eight bytes before a block ends, and the length in bits there.
        let zeros_end = if self.filled() < BLOCK - 8 { BLOCK - 8 } else { 2 * BLOCK - 8 } - self.filled();
        let bits = self.bytes.wrapping_mul(8).to_be_bytes();
        end.update(&padding[..zeros_end]);
        end.update(&bits);
        let mut digest = [0; 32];
        for (out, word) in digest.chunks_exact_mut(4).zip(end.state) {
            out.copy_from_slice(&word.to_be_bytes());
        }
        digest
    }

    /// At most 103 bytes, for [`RunningSha256::load`].
    pub(super) fn store(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(40 + self.filled());
        for word in self.state {
            out.extend_from_slice(&word.to_be_bytes());
        }
        out.extend_from_slice(&self.bytes.to_le_bytes());
        out.extend_from_slice(&self.partial[..self.filled()]);
        out
    }

    /// `None` when the bytes are not from [`RunningSha256::store`].
    pub(super) fn load(stored: &[u8]) -> Option<Self> {
        let (words, rest) = stored.split_at_checked(32)?;
        let (bytes, partial) = rest.split_first_chunk::<8>()?;
        let mut sha = Self { bytes: u64::from_le_bytes(*bytes), ..Self::new() };
        for (word, stored) in sha.state.iter_mut().zip(words.as_chunks::<4>().0) {
            *word = u32::from_be_bytes(*stored);
        }
        if partial.len() != sha.filled() {
            return None;
        }
        sha.partial[..partial.len()].copy_from_slice(partial);
        Some(sha)
    }

    fn filled(&self) -> usize {
        (self.bytes % BLOCK as u64) as usize
    }
}

fn compress(state: &mut [u32; 8], block: &[u8; BLOCK]) {
    compress256(state, std::slice::from_ref(GenericArray::from_slice(block)));
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use sha2::{Digest, Sha256};

    use super::*;

    #[test]
    fn the_crc_is_that_of_everybody_else() {
        assert_eq!(crc32(&[b"123456789"]), 0xCBF4_3926);
        assert_eq!(crc32(&[b"The quick brown fox ", b"jumps over the lazy dog"]), 0x414F_A339);
    }

    #[test]
    fn a_digest_stored_after_any_number_of_bytes_goes_on_to_the_same_result() {
        let data: Vec<u8> = (0..300u32).map(|n| (n * 7) as u8).collect();
        for cut in 0..data.len() {
            let mut sha = RunningSha256::new();
            sha.update(&data[..cut]);
            assert_eq!(sha.digest()[..], Sha256::digest(&data[..cut])[..], "{cut} bytes");
            let mut sha = RunningSha256::load(&sha.store()).unwrap();
            sha.update(&data[cut..]);
            assert_eq!(sha.digest()[..], Sha256::digest(&data)[..], "stored after {cut} bytes");
        }
        assert!(RunningSha256::load(&[0; 39]).is_none());
        assert!(RunningSha256::load(&[0; 41]).is_none());
    }
}
