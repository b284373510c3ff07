//! A 64-bit checksum for state files: fast, and sure to notice a change inside any one word. Not cryptographic.
#![forbid(unsafe_code)]

/// Running checksum.
///
/// Bytes are taken as little-endian 64-bit words, word i going to lane i % 4: lane = rotate_left((lane ^ word) * M,
/// 29), with the lanes starting at M * 1, M * 2, M * 3, M * 4. A last incomplete block of 32 bytes is filled with
/// zeros. The result starts as the number of bytes and takes in the four lanes the same way, then x ^= x >> 32, x *= M,
/// x ^= x >> 29. M is odd, so each step is a bijection of the lane and of the word.
#[derive(Clone, Debug)]
pub(super) struct Checksum {
    lanes: [u64; 4],
    block: [u8; BLOCK],
    n_bytes: u64,
}

const BLOCK: usize = 32;
/// 2^64 divided by the golden ratio.
const M: u64 = 0x9e37_79b9_7f4a_7c15;

impl Checksum {
    pub(super) fn new() -> Self {
        Self { lanes: [1, 2, 3, 4].map(|i: u64| M.wrapping_mul(i)), block: [0; BLOCK], n_bytes: 0 }
    }

    pub(super) fn update(&mut self, mut bytes: &[u8]) {
        let n_held = (self.n_bytes % BLOCK as u64) as usize;
        self.n_bytes += bytes.len() as u64;
        if n_held > 0 {
            let (first, rest) = bytes.split_at(bytes.len().min(BLOCK - n_held));
            self.block[n_held..][..first.len()].copy_from_slice(first);
            if n_held + first.len() < BLOCK {
                return;
            }
            take_block(&mut self.lanes, &self.block);
            bytes = rest;
        }
        let blocks = bytes.chunks_exact(BLOCK);
        let tail = blocks.remainder();
        for block in blocks {
            take_block(&mut self.lanes, block);
        }
        self.block[..tail.len()].copy_from_slice(tail);
    }

    pub(super) fn finish(mut self) -> u64 {
        let n_held = (self.n_bytes % BLOCK as u64) as usize;
        if n_held > 0 {
            self.block[n_held..].fill(0);
            take_block(&mut self.lanes, &self.block);
        }
        let mut sum = self.lanes.iter().fold(self.n_bytes, |sum, &lane| step(sum, lane));
        sum ^= sum >> 32;
        sum = sum.wrapping_mul(M);
        sum ^ (sum >> 29)
    }
}

fn take_block(lanes: &mut [u64; 4], block: &[u8]) {
    for (lane, word) in lanes.iter_mut().zip(block.chunks_exact(8)) {
        *lane = step(*lane, u64::from_le_bytes(word.try_into().expect("chunks of eight")));
    }
}

fn step(lane: u64, word: u64) -> u64 {
    (lane ^ word).wrapping_mul(M).rotate_left(29)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u64 {
        let mut checksum = Checksum::new();
        checksum.update(bytes);
        checksum.finish()
    }

    #[test]
    fn pieces_give_the_sum_of_the_whole() {
        let bytes: Vec<u8> = (0..200u32).map(|i| (i * 37 % 251) as u8).collect();
        for piece in [1, 3, 8, 31, 32, 33, 64, 199] {
            let mut checksum = Checksum::new();
            bytes.chunks(piece).for_each(|part| checksum.update(part));
            assert_eq!(checksum.finish(), sum(&bytes), "pieces of {piece}");
        }
    }

    #[test]
    fn any_bit_and_any_length_changes_it() {
        let bytes = vec![0u8; 100];
        let clean = sum(&bytes);
        for bit in 0..800 {
            let mut changed = bytes.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert_ne!(sum(&changed), clean, "bit {bit}");
        }
        for len in 0..100 {
            assert_ne!(sum(&bytes[..len]), clean, "length {len}");
        }
    }

    #[test]
    fn the_format_stays() {
        assert_eq!(sum(b""), GOLDEN[0]);
        assert_eq!(sum(b"kvq"), GOLDEN[1]);
    }

    /// From an independent implementation of the comment on [`Checksum`].
    const GOLDEN: [u64; 2] = [0xf576_fe87_af96_dbb6, 0xc0ff_a9a0_0b71_e11d];
}
