//! What the bias of a page's keys adds to scores, as a sum of few curves over the page's rows.
//!
//! Row `j` has the bias `R(j) beta`. Seen from the middle of the page, pair `i` adds `a cos(w t) + b sin(w t)` to a score, `t` being
//! the distance from there: curves of one half of the page are those of the other, mirrored, once as they are and once
//! negated. Pairs that hardly turn within a page share a polynomial, so that most curves need not be read.
#![forbid(unsafe_code)]

use crate::rotation::Rotation;
use crate::shape::MAX_HEAD_DIM;
use crate::simd::vector::{dot_floats, Vector, MAX_LANES};

const MAX_PAIRS: usize = MAX_HEAD_DIM as usize / 2;
/// Even and odd powers of the polynomial.
pub(super) const SLOW: [usize; 2] = [3, 2];
/// Radians from the middle of a page to its end up to which a pair is slow: the polynomial is within 2e-5 there.
const SLOW_TURN: f64 = 0.5;

/// The curves of all pages of a layer. Immutable.
#[derive(Clone, Debug)]
pub(super) struct Curves {
    /// Pairs with a cosine and a sine of their own.
    pub(super) fast: Vec<usize>,
    /// `[power][pair]`: the polynomials of cosines and of sines; whole vectors, 0 for other pairs.
    pub(super) slow: [Vec<f32>; 2],
    /// `[len][page / 2]`: powers, then cosines or sines, of the second half of the rows. The first cosine is 1 everywhere.
    pub(super) rows: [Vec<f32>; 2],
}

impl Curves {
    pub(super) fn new(rotation: &Rotation, page: usize) -> Self {
        let frequencies: Vec<f64> = rotation.frequencies().collect();
        let (half, width) = (page as f64 / 2.0, frequencies.len().next_multiple_of(MAX_LANES));
        let over_rows =
            |of: &dyn Fn(f64) -> f64| (0..page / 2).map(|row| of(row as f64 + 0.5) as f32).collect::<Vec<_>>();
        let mut curves =
            Curves { fast: Vec::new(), slow: SLOW.map(|n| vec![0.0; n * width]), rows: Default::default() };
        for (odd, rows) in curves.rows.iter_mut().enumerate() {
            (0..SLOW[odd]).for_each(|i| rows.extend(over_rows(&|t| (t / half).powi((2 * i + odd) as i32))));
        }
        for (pair, w) in frequencies.iter().enumerate() {
            if w.abs() * half > SLOW_TURN {
                curves.fast.push(pair);
                curves.rows[0].extend(over_rows(&|t| (w * t).cos()));
                curves.rows[1].extend(over_rows(&|t| (w * t).sin()));
                continue;
            }
            let (turn, fifth) = (w * half, (w * half).powi(5) / 120.0);
            // Taylor's polynomials. Of the sine the first term left out is replaced by the best of lower degree (Lanczos).
            let cos = [1.0, -turn.powi(2) / 2.0, turn.powi(4) / 24.0];
            let sin = [turn - fifth * 5.0 / 16.0, -turn.powi(3) / 6.0 + fifth * 20.0 / 16.0];
            (0..SLOW[0]).for_each(|i| curves.slow[0][i * width + pair] = cos[i] as f32);
            (0..SLOW[1]).for_each(|i| curves.slow[1][i * width + pair] = sin[i] as f32);
        }
        curves
    }

    /// Numbers of mirrored and of negated curves.
    pub(super) fn len(&self) -> [usize; 2] {
        SLOW.map(|n| n + self.fast.len())
    }

    /// By what each curve is to be multiplied, into `out[len]`, for a query row in the frame of the page and the bias in its middle.
    #[inline(always)]
    pub(super) fn factors<V: Vector>(
        &self,
        v: V,
        rotation: &Rotation,
        query: &[f32],
        bias: &[f32],
        [even, odd]: [&mut [f32]; 2],
    ) {
        let (mut cos, mut sin) = ([0f32; MAX_PAIRS], [0f32; MAX_PAIRS]);
        let rest = rotation.products(query, bias, &mut cos, &mut sin);
        for ((out, slow), (n, of)) in
            [&mut *even, &mut *odd].into_iter().zip(&self.slow).zip(SLOW.into_iter().zip([&cos, &sin]))
        {
            let width = slow.len() / n;
            for i in 0..n {
                out[i] = dot_floats(v, &slow[i * width..][..width], &of[..width]);
            }
        }
        even[0] += rest;
        for (k, &pair) in self.fast.iter().enumerate() {
            (even[SLOW[0] + k], odd[SLOW[1] + k]) = (cos[pair], sin[pair]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rotation::Angles;
    use crate::simd::isa::{Isa, IsaToken};
    use crate::tests::random::Rng;

    /// On the widest vectors that there are: the loops are the same on all.
    #[test]
    fn curves_sum_up_to_the_turned_bias() {
        let (dim, mut rng) = (64, Rng::new(9));
        for (page, base, interleaved, n_pairs, n_fast) in
            [(128, 1e4, false, 32, 17), (64, 5e5, true, 24, 8), (256, 1e2, false, 32, 32)]
        {
            let frequencies: Vec<f64> =
                (0..n_pairs).map(|i| f64::powf(base, -f64::from(i) / f64::from(n_pairs))).collect();
            let rotation = Rotation::new(&frequencies, interleaved).unwrap();
            let curves = Curves::new(&rotation, page);
            assert_eq!(curves.fast.len(), n_fast);
            let (query, bias) = (rng.values(dim), rng.values(dim));
            let middle = rotation.turned(&bias, (page as f64 - 1.0) / 2.0);
            let [mut even, mut odd] = curves.len().map(|n| vec![0f32; n]);
            let out = [&mut even[..], &mut odd[..]];
            match IsaToken::new(Isa::Avx512).or(IsaToken::new(Isa::Avx2)) {
                #[cfg(target_arch = "x86_64")]
                Some(IsaToken::Avx512(v)) => v.run(|v| curves.factors(v, &rotation, &query, &middle, out)),
                #[cfg(target_arch = "x86_64")]
                Some(IsaToken::Avx2(v)) => v.run(|v| curves.factors(v, &rotation, &query, &middle, out)),
                _ => return,
            }
            let length = |x: &[f32]| x.iter().map(|x| x * x).sum::<f32>().sqrt();
            let mut angles = Angles::default();
            for row in 0..page {
                let mut turned = bias.clone();
                rotation.angles(row as i32, &mut angles);
                rotation.turn(&mut turned, &angles);
                let want: f32 = query.iter().zip(&turned).map(|(q, b)| q * b).sum();
                let (at, sign) = if row < page / 2 { (page / 2 - 1 - row, -1.0) } else { (row - page / 2, 1.0) };
                let sum = |rows: &[f32], factors: &[f32]| {
                    rows.chunks_exact(page / 2).zip(factors).map(|(curve, factor)| curve[at] * factor).sum::<f32>()
                };
                let found = sum(&curves.rows[0], &even) + sign * sum(&curves.rows[1], &odd);
                let error = (found - want).abs() / length(&query) / length(&bias);
                assert!(error < 2e-5, "page {page}, base {base}, row {row}: {found} {want}");
            }
        }
    }
}
