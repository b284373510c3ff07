//! What codecs with a step per token take off a page's keys before they rotate and code them: each channel's mean, and
//! powers of two that make channels of very different size fit one step.
//!
//! A model with key biases has channels a hundred times larger than others. A rotation spreads such a channel's error over
//! all of them, and a mean in FP8 is off by more than the other channels hold. So the mean is FP16, is taken before the
//! rotation, and the rest is divided by factors that the query is multiplied with (SmoothQuant, arXiv 2211.10438, equation
//! 4). With variances `v` and second moments of the queries `m`, the error of a score grows with
//! `sum(m s^2) * sum(v / s^2)`, which is least at `s = (v / m)^(1/4)`: half of the difficulty on either side.
//!
//! Compiled once more for each instruction set and must give the same bytes; see [`super::quantizer`].
#![forbid(unsafe_code)]

use half::f16;

use super::float8::{factor, MAX_EXPONENT};
use super::quantizer::{mean_row, subtract};
use crate::codec::page::SealRows;
use crate::cuda::desc::SideDesc;
use crate::shape::MAX_HEAD_DIM;

const MAX_DIM: usize = MAX_HEAD_DIM as usize;

/// A page keeps the factors of the page sealed before it unless its own would make the error this many times smaller: a
/// query is prepared anew wherever factors change.
const WORTH_A_CHANGE: f32 = 1.1;

/// Fewer rows have no mean and no factors of their own. One row would be its own mean, and what is left of it, its rounding,
/// would set the factors, from which later pages go on.
const MIN_ROWS: usize = 8;

/// Which of the two a codec stores; they lie behind each other in its page.
///
/// | part | bytes | |
/// |---|---|---|
/// | mean | `2 * head_dim` | with `mean`: FP16 by channel |
/// | exponents | `head_dim` | with `factors`: signed; channel `c` is divided by `2^exponent` before it is rotated and coded |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Smooth {
    pub(crate) mean: bool,
    pub(crate) factors: bool,
}

impl Smooth {
    pub(crate) fn bytes(self, dim: usize) -> usize {
        self.mean_bytes(dim) + if self.factors { dim } else { 0 }
    }

    fn mean_bytes(self, dim: usize) -> usize {
        if self.mean {
            2 * dim
        } else {
            0
        }
    }

    /// The exponents in this part of a page; empty without factors.
    pub(crate) fn exponents(self, part: &[u8], dim: usize) -> &[u8] {
        &part[self.mean_bytes(dim)..self.bytes(dim)]
    }

    /// The mean in this part of a page, FP16; empty without one.
    pub(crate) fn mean_half(self, part: &[u8], dim: usize) -> &[u8] {
        &part[..self.mean_bytes(dim)]
    }

    /// The mean in this part of a page.
    #[inline(always)]
    pub(crate) fn read_mean(self, part: &[u8], out: &mut [f32]) {
        out.fill(0.0);
        let half = self.mean_half(part, out.len()).chunks_exact(2);
        out.iter_mut().zip(half).for_each(|(m, b)| *m = f16::from_le_bytes([b[0], b[1]]).to_f32());
    }

    /// Takes mean and factors off the rows; on a fresh page both are chosen and written first.
    #[inline(always)]
    pub(crate) fn apply(self, part: &mut [u8], rows: &mut SealRows, dim: usize) {
        let mut mean = [0f32; MAX_DIM];
        let mean = &mut mean[..dim];
        if self.mean {
            if rows.fresh {
                if rows.rows.len() >= MIN_ROWS * dim {
                    mean_row(rows.rows, mean);
                }
                for (bytes, m) in part[..2 * dim].chunks_exact_mut(2).zip(mean.iter()) {
                    bytes.copy_from_slice(&f16::from_f32(*m).to_le_bytes());
                }
            }
            self.read_mean(part, mean);
            subtract(rows.rows, mean);
        }
        if self.factors {
            let stored = &mut part[self.mean_bytes(dim)..][..dim];
            if rows.fresh {
                choose(rows, stored);
            }
            let mut inverse = [0f32; MAX_DIM];
            inverse.iter_mut().zip(stored.iter()).for_each(|(f, &e)| *f = factor(-i32::from(e as i8)));
            for row in rows.rows.chunks_exact_mut(dim) {
                row.iter_mut().zip(&inverse).for_each(|(x, f)| *x *= f);
            }
        }
    }

    /// Puts them back on a decoded row.
    pub(crate) fn restore(self, part: &[u8], row: &mut [f32]) {
        let dim = row.len();
        row.iter_mut().zip(self.exponents(part, dim)).for_each(|(x, &e)| *x *= factor(i32::from(e as i8)));
        let mut mean = [0f32; MAX_DIM];
        self.read_mean(part, &mut mean[..dim]);
        row.iter_mut().zip(&mean).for_each(|(x, m)| *x += m);
    }
}

/// Writes the exponents for rows whose mean has been taken off: those of the page before or, where that pays, their own.
#[inline(always)]
fn choose(rows: &mut SealRows, exponents: &mut [u8]) {
    let dim = exponents.len();
    if rows.rows.len() < MIN_ROWS * dim {
        exponents.fill(0);
        if rows.last_exponents.len() == dim {
            exponents.copy_from_slice(rows.last_exponents);
        }
        return;
    }
    let (mut variance, mut weight) = ([0f32; MAX_DIM], [1f32; MAX_DIM]);
    for row in rows.rows.chunks_exact(dim) {
        variance.iter_mut().zip(row).for_each(|(v, x)| *v += x * x);
    }
    weight.iter_mut().zip(rows.channel_weights).for_each(|(m, q)| *m = *q);
    for (c, e) in exponents.iter_mut().enumerate() {
        // A fourth root, rounded to the nearest power of two.
        let wanted = (eighths_of_octaves(variance[c]) - eighths_of_octaves(weight[c]) + 16).div_euclid(32);
        *e = wanted.clamp(-MAX_EXPONENT, MAX_EXPONENT) as i8 as u8;
    }
    let error = |exponents: &[u8]| {
        let (mut queries, mut keys) = (0f32, 0f32);
        for (c, &e) in exponents.iter().enumerate() {
            let s = factor(i32::from(e as i8));
            queries += weight[c] * s * s;
            keys += variance[c] / (s * s);
        }
        queries * keys
    };
    if rows.last_exponents.len() == dim {
        if error(rows.last_exponents) <= WORTH_A_CHANGE * error(exponents) {
            exponents.copy_from_slice(rows.last_exponents);
        } else {
            rows.last_exponents.copy_from_slice(exponents);
        }
    }
}

/// Eight times `log2`, by the number's own exponent and a straight line between powers of two: at most .09 of an octave
/// off. Zero and what is below counts as the smallest normal number.
#[inline(always)]
fn eighths_of_octaves(x: f32) -> i32 {
    (x.max(f32::MIN_POSITIVE).to_bits() >> 20) as i32 - (127 << 3)
}

impl SideDesc {
    /// Fills in mean and factors, which lie at `at` in a page.
    pub(crate) fn describe_smooth(&mut self, smooth: Smooth, at: usize) {
        let dim = self.head_dim as usize;
        if smooth.mean {
            self.mean = at as u32;
        }
        if smooth.factors {
            self.exponents = (at + smooth.bytes(dim) - dim) as u32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::group::tests::normal;

    #[test]
    fn logarithms_are_near() {
        for (x, want) in [(1.0, 0), (1.5, 4), (2.0, 8), (3.0, 12), (0.5, -8), (0.0, -1008), (f32::MAX, 1023)] {
            assert_eq!(eighths_of_octaves(x), want, "{x}");
        }
    }

    /// A page may be sealed with a single row, when the others were removed before it was full.
    #[test]
    fn one_row_has_no_mean_and_no_factors() {
        let dim = 64;
        let mut coded = normal(dim);
        let smooth = Smooth { mean: true, factors: true };
        let mut part = vec![0u8; smooth.bytes(dim)];
        let mut last: Vec<u8> = (0..dim as u8).map(|channel| channel % 3).collect();
        let expected = last.clone();
        let mut rows = SealRows {
            place: None,
            at: &[5],
            rows: &mut coded,
            fresh: true,
            exact: &[],
            channel_weights: &vec![1.0; dim],
            last_exponents: &mut last,
            attention: &[],
        };
        smooth.apply(&mut part, &mut rows, dim);
        assert_eq!(smooth.exponents(&part, dim), expected);
        assert!(smooth.mean_half(&part, dim).iter().all(|&byte| byte == 0));
        assert_eq!(last, expected);
    }

    /// One channel 4 096 times as large as the others: what is left to code differs by 64 at most, and comes back.
    #[test]
    fn a_huge_channel_is_divided_and_comes_back() {
        let dim = 64;
        let mut truth = normal(dim * 128);
        truth.iter_mut().skip(9).step_by(dim).for_each(|x| *x = 4096.0 * (*x + 5.0));
        let mut coded = truth.clone();
        let at: Vec<u32> = (0..128).collect();
        let mut last = vec![0u8; dim];
        let weights = vec![1f32; dim];
        let smooth = Smooth { mean: true, factors: true };
        let mut part = vec![0u8; smooth.bytes(dim)];
        let mut rows = SealRows {
            place: None,
            at: &at,
            rows: &mut coded,
            fresh: true,
            exact: &[],
            channel_weights: &weights,
            last_exponents: &mut last,
            attention: &[],
        };
        smooth.apply(&mut part, &mut rows, dim);
        assert_eq!(last, smooth.exponents(&part, dim), "the next page starts from these");
        let size = |c: usize| coded.iter().skip(c).step_by(dim).map(|x| x * x).sum::<f32>().sqrt();
        assert!((30.0..140.0).contains(&(size(9) / size(8))), "{}", size(9) / size(8));
        for (row, truth) in coded.chunks_exact_mut(dim).zip(truth.chunks_exact(dim)) {
            smooth.restore(&part, row);
            for (x, want) in row.iter().zip(truth) {
                assert!((x - want).abs() <= want.abs().max(1.0) * 1e-5, "{x} {want}");
            }
        }
    }
}
