//! The specification of the kernels that do not depend on a codec.
#![forbid(unsafe_code)]

use crate::rows::finite;
use crate::simd::exact::{ExactRows, Kernels, Logits, State};
use crate::simd::isa::Scalar;

impl Kernels for Scalar {
    fn exact_scores(&self, q: &[f32], rows: ExactRows, scores: &mut [f32], columns: usize) {
        for (q, scores) in q.chunks_exact(rows.dim).zip(scores.chunks_exact_mut(columns)) {
            for (i, score) in scores[..rows.n].iter_mut().enumerate() {
                let row = &rows.data[i * rows.dim..][..rows.dim];
                let mut partial = [0f32; 16];
                for (q, k) in q.chunks_exact(16).zip(row.chunks_exact(16)) {
                    partial.iter_mut().zip(q.iter().zip(k)).for_each(|(s, (q, k))| *s += q * k);
                }
                *score = partial.iter().sum();
            }
        }
    }

    fn exact_accumulate(&self, p: &[f32], columns: usize, rows: ExactRows, acc: &mut [f32]) {
        for (p, acc) in p.chunks_exact(columns).zip(acc.chunks_exact_mut(rows.dim)) {
            for (i, p) in p[..rows.n].iter().enumerate().filter(|(_, p)| **p != 0.0) {
                let row = &rows.data[i * rows.dim..][..rows.dim];
                acc.iter_mut().zip(row).for_each(|(a, v)| *a += p * v);
            }
        }
    }

    fn softmax(&self, scores: &mut [f32], columns: usize, logits: &Logits, state: &mut State) {
        for (row, scores) in scores.chunks_exact_mut(columns).enumerate() {
            if logits.softcap > 0.0 {
                scores.iter_mut().for_each(|s| *s = logits.softcap * (*s / logits.softcap).tanh());
            }
            if !logits.mask_is_zero {
                let mask = &logits.mask[logits.mask_row[row] as usize * columns..][..columns];
                scores.iter_mut().zip(mask).for_each(|(s, m)| *s += logits.slopes[row] * m);
            }
            let max = scores.iter().fold(state.max[row], |a, b| a.max(*b));
            if max == f32::NEG_INFINITY {
                scores.fill(0.0);
                continue;
            }
            state.rescale(row, max);
            scores.iter_mut().for_each(|s| *s = (*s - max).exp());
            state.sum[row] += scores.iter().sum::<f32>();
        }
    }

    fn f16_to_f32(&self, from: &[u8], to: &mut [f32]) {
        for (t, f) in to.iter_mut().zip(from.chunks_exact(2)) {
            *t = finite(half::f16::from_le_bytes([f[0], f[1]]).to_f32());
        }
    }

    fn copy_finite(&self, from: &[f32], to: &mut [f32]) {
        copy_finite(from, to);
    }
}

/// Inlined, so that each instruction set compiles it for itself.
#[inline(always)]
pub(super) fn copy_finite(from: &[f32], to: &mut [f32]) {
    to.iter_mut().zip(from).for_each(|(t, f)| *t = finite(*f));
}

impl State {
    /// Clears the state for `n_rows` rows of `dim` outputs and `n_sums` sums.
    pub(crate) fn reset(&mut self, n_rows: usize, dim: usize, n_sums: usize) {
        for (values, value) in [(&mut self.max, f32::NEG_INFINITY), (&mut self.sum, 0.0)] {
            values.clear();
            values.resize(n_rows, value);
        }
        for (values, n) in [(&mut self.packed, dim), (&mut self.exact, dim), (&mut self.predicted, n_sums)] {
            values.clear();
            values.resize(n_rows * n, 0.0);
        }
    }

    /// Moves one row's state to a new maximum, not smaller than the old one.
    pub(crate) fn rescale(&mut self, row: usize, max: f32) {
        let old = std::mem::replace(&mut self.max[row], max);
        if old == max {
            return;
        }
        let factor = (old - max).exp();
        self.sum[row] *= factor;
        for out in [&mut self.packed, &mut self.exact, &mut self.predicted] {
            let dim = out.len() / self.max.len();
            out[row * dim..(row + 1) * dim].iter_mut().for_each(|x| *x *= factor);
        }
    }
}
