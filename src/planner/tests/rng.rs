//! Deterministic random numbers for tests (splitmix64).
#![forbid(unsafe_code)]

pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    /// `n` of `items` in random order.
    pub fn choose(&mut self, mut items: Vec<usize>, n: usize) -> Vec<usize> {
        for index in 0..n {
            let other = index + self.below(items.len() - index);
            items.swap(index, other);
        }
        items.truncate(n);
        items
    }
}
