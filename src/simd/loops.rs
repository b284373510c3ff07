//! Exact rows and softmax on the vectors of any instruction set.
#![forbid(unsafe_code)]

use std::f32::consts::LOG2_E;

use super::exact::{ExactRows, Kernels, Logits, State};
use super::scalar;
use super::vector::{Vector, MAX_LANES};

impl<V: Vector> Kernels for V {
    fn exact_scores(&self, q: &[f32], rows: ExactRows, scores: &mut [f32], columns: usize) {
        self.run(
            #[inline(always)]
            move |v| exact_scores(v, q, rows, scores, columns),
        );
    }

    fn exact_accumulate(&self, p: &[f32], columns: usize, rows: ExactRows, acc: &mut [f32]) {
        self.run(
            #[inline(always)]
            move |v| exact_accumulate(v, p, columns, rows, acc),
        );
    }

    fn softmax(&self, scores: &mut [f32], columns: usize, logits: &Logits, state: &mut State) {
        self.run(
            #[inline(always)]
            move |v| softmax(v, scores, columns, logits, state),
        );
    }

    fn f16_to_f32(&self, from: &[u8], to: &mut [f32]) {
        self.run(
            #[inline(always)]
            move |v| v.f16_to_f32(from, to),
        );
    }

    fn copy_finite(&self, from: &[f32], to: &mut [f32]) {
        self.run(
            #[inline(always)]
            move |_| scalar::copy_finite(from, to),
        );
    }
}

#[inline(always)]
fn exact_scores<V: Vector>(v: V, q: &[f32], rows: ExactRows, scores: &mut [f32], columns: usize) {
    let n_q = q.len() / rows.dim;
    let mut row = v.score_many(q, rows, scores, columns);
    while row < n_q {
        let (q, scores) = (&q[row * rows.dim..], &mut scores[row * columns..]);
        row += match n_q - row {
            1 => score_rows::<V, 1>(v, q, rows, scores, columns),
            2 | 3 => score_rows::<V, 2>(v, q, rows, scores, columns),
            _ => score_rows::<V, 4>(v, q, rows, scores, columns),
        };
    }
}

/// Scores of `Q` query rows, as many keys at a time as leave a vector of sums: enough to hide the latency of a multiply-add.
#[inline(always)]
pub(super) fn score_rows<V: Vector, const Q: usize>(
    v: V,
    q: &[f32],
    rows: ExactRows,
    scores: &mut [f32],
    columns: usize,
) -> usize {
    let keys = V::LANES / Q;
    for first in (0..rows.n).step_by(keys) {
        let mut acc = [v.splat(0.0); MAX_LANES];
        for c in (0..rows.dim).step_by(V::LANES) {
            let mut queries = [v.splat(0.0); Q];
            for i in 0..Q {
                queries[i] = v.load(q, i * rows.dim + c);
            }
            for k in 0..keys {
                let key = v.load(rows.data, (first + k) * rows.dim + c);
                for i in 0..Q {
                    acc[i * keys + k] = v.mul_add(queries[i], key, acc[i * keys + k]);
                }
            }
        }
        let mut out = [0f32; MAX_LANES];
        v.store(&mut out, 0, v.sums(&acc));
        let n = keys.min(rows.n - first);
        for i in 0..Q {
            scores[i * columns + first..][..n].copy_from_slice(&out[i * keys..][..n]);
        }
    }
    Q
}

#[inline(always)]
pub(crate) fn exact_accumulate<V: Vector>(v: V, p: &[f32], columns: usize, rows: ExactRows, acc: &mut [f32]) {
    let n_q = acc.len() / rows.dim;
    let mut row = 0;
    while row < n_q {
        let n = if n_q - row >= 4 { 4 } else { 1 };
        // Four vectors of each row at a time, if sums of all rows fit into half of the registers.
        let wide = if n == 4 && V::REGISTERS < 32 { usize::MAX } else { 4 * V::LANES };
        let mut c = 0;
        while c < rows.dim {
            c += match (n, rows.dim - c >= wide) {
                (4, true) => add_rows::<V, 4, 4>(v, p, columns, rows, acc, row, c),
                (4, false) => add_rows::<V, 4, 2>(v, p, columns, rows, acc, row, c),
                (_, true) => add_rows::<V, 1, 4>(v, p, columns, rows, acc, row, c),
                (_, false) => add_rows::<V, 1, 2>(v, p, columns, rows, acc, row, c),
            };
        }
        row += n;
    }
}

/// Adds to the channels of `Z` vectors, from `c`, of `Q` output rows from `row`; gives how many channels these are.
#[inline(always)]
fn add_rows<V: Vector, const Q: usize, const Z: usize>(
    v: V,
    p: &[f32],
    columns: usize,
    rows: ExactRows,
    acc: &mut [f32],
    row: usize,
    c: usize,
) -> usize {
    let mut sum = [[v.splat(0.0); Z]; Q];
    let p: [&[f32]; Q] = std::array::from_fn(|r| &p[(row + r) * columns..][..rows.n]);
    for i in 0..rows.n {
        let values = &rows.data[i * rows.dim + c..][..V::LANES * Z];
        let mut value = [v.splat(0.0); Z];
        for z in 0..Z {
            value[z] = v.load(values, V::LANES * z);
        }
        for (p, sum) in p.iter().zip(&mut sum) {
            let p = v.splat(p[i]);
            for z in 0..Z {
                sum[z] = v.mul_add(p, value[z], sum[z]);
            }
        }
    }
    for (r, sum) in sum.iter().enumerate() {
        for (z, sum) in sum.iter().enumerate() {
            let at = (row + r) * rows.dim + c + V::LANES * z;
            v.store(acc, at, v.add(v.load(acc, at), *sum));
        }
    }
    Z * V::LANES
}

/// `2^x` for `x <= 0` to about 2 units in the last place; exactly 0 below -125, NaN for NaN.
#[inline(always)]
#[allow(clippy::approx_constant, reason = "a coefficient near ln 2, not ln 2")]
fn exp2<V: Vector>(v: V, x: V::F32) -> V::F32 {
    let n = v.nearest(x);
    let r = v.sub(x, v.to_f32(n));
    // The polynomial of degree 5 of least relative error (7.5e-8) on -0.5 to 0.5, by Remez' algorithm.
    let mut e = v.splat(0.001_327_647_2);
    for k in [0.009_675_541, 0.055_507_133, 0.240_221_2, 0.693_147, 1.0] {
        e = v.mul_add(e, r, v.splat(k));
    }
    // To the exponent; NaN has n = -2^31, which adds nothing.
    let power = v.add_i32(v.bits(e), v.shift_left(n, 23));
    v.of_bits(v.unless_less(x, v.splat(-125.0), power))
}

#[inline(always)]
fn tanh<V: Vector>(v: V, x: V::F32) -> V::F32 {
    // tanh |x| = (1 - e) / (1 + e) with e = exp(-2 |x|)
    let (sign, size) = (v.splat_i32(i32::MIN), v.splat_i32(i32::MAX));
    let e = exp2(v, v.mul(v.of_bits(v.and(v.bits(x), size)), v.splat(-2.0 * LOG2_E)));
    let one = v.splat(1.0);
    let t = v.div(v.sub(one, e), v.add(one, e));
    v.of_bits(v.or(v.bits(t), v.and(v.bits(x), sign)))
}

#[inline(always)]
fn softmax<V: Vector>(v: V, scores: &mut [f32], columns: usize, logits: &Logits, state: &mut State) {
    // All maxima first: within a row, weights wait for its maximum.
    for (row, scores) in scores.chunks_exact_mut(columns).enumerate() {
        if logits.softcap > 0.0 || !logits.mask_is_zero {
            adjust(v, scores, row, logits);
        }
        let mut top = v.splat(state.max[row]);
        for s in scores.chunks_exact(V::LANES) {
            top = v.max(v.load(s, 0), top);
        }
        state.rescale(row, v.largest(top));
    }
    let log2_e = v.splat(LOG2_E);
    for (row, scores) in scores.chunks_exact_mut(columns).enumerate() {
        // Every weight is 0 if nothing has been visible so far.
        let max = if state.max[row] == f32::NEG_INFINITY { 0.0 } else { state.max[row] };
        let (max, mut sum) = (v.splat(max), v.splat(0.0));
        for s in scores.chunks_exact_mut(V::LANES) {
            // The difference first: it is exact near the maximum, however large that is.
            let e = exp2(v, v.mul(v.sub(v.load(s, 0), max), log2_e));
            sum = v.add(sum, e);
            v.store(s, 0, e);
        }
        state.sum[row] += v.sum(sum);
    }
}

/// Soft cap and mask.
#[inline(always)]
fn adjust<V: Vector>(v: V, scores: &mut [f32], row: usize, logits: &Logits) {
    let cap = logits.softcap;
    let mask_row = logits.mask_row[row] as usize * scores.len();
    let slope = v.splat(logits.slopes[row]);
    for (i, s) in scores.chunks_exact_mut(V::LANES).enumerate() {
        let mut x = v.load(s, 0);
        if cap > 0.0 {
            x = v.mul(tanh(v, v.mul(x, v.splat(1.0 / cap))), v.splat(cap));
        }
        if !logits.mask_is_zero {
            x = v.mul_add(slope, v.load(logits.mask, mask_row + V::LANES * i), x);
        }
        v.store(s, 0, x);
    }
}
