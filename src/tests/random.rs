//! Random data for tests: the same numbers in every run, on every machine and with every release of the crate, whose
//! generator is one that is published (PCG).
#![forbid(unsafe_code)]

use oorandom::Rand64;

pub(crate) struct Rng(Rand64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(Rand64::new(seed.into()))
    }

    pub(crate) fn bits(&mut self) -> u64 {
        self.0.rand_u64()
    }

    /// A number below `end`, which is not 0.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        self.0.rand_range(0..end as u64) as usize
    }

    /// Nearly normal: mean 0, variance 1, within 4.3.
    pub(crate) fn normal(&mut self) -> f32 {
        let sum: f64 = (0..6).map(|_| self.0.rand_float() - 0.5).sum();
        (sum * std::f64::consts::SQRT_2) as f32
    }

    /// Nearly normal values.
    pub(crate) fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal()).collect()
    }

    /// `n` of `items` in random order.
    pub(crate) fn choose(&mut self, mut items: Vec<usize>, n: usize) -> Vec<usize> {
        for index in 0..n {
            let other = index + self.below(items.len() - index);
            items.swap(index, other);
        }
        items.truncate(n);
        items
    }
}
