//! AVX2 (with FMA and F16C) forms of the kernels that do not depend on a codec.

use std::arch::x86_64::*;

use crate::simd::exact::{ExactRows, Kernels, Logits, State};
use crate::simd::isa::{feature_table, Avx2};
use crate::simd::scalar;

feature_table!(Avx2 => Kernels {
    exact_scores: exact_scores(q, rows, scores, columns),
    exact_accumulate: exact_accumulate(p, columns, rows, acc),
    softmax: softmax(scores, columns, logits, state),
    f16_to_f32: f16_to_f32(from, to),
    copy_finite: copy_finite(from, to),
});

/// Eight floats at `x[at..]`, bounds checked.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn load(x: &[f32], at: usize) -> __m256 {
    let x = &x[at..at + 8];
    // SAFETY: the slice holds eight floats.
    unsafe { _mm256_loadu_ps(x.as_ptr()) }
}

/// Stores eight floats at `x[at..]`, bounds checked.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn store(x: &mut [f32], at: usize, value: __m256) {
    let x = &mut x[at..at + 8];
    // SAFETY: the slice holds eight floats.
    unsafe { _mm256_storeu_ps(x.as_mut_ptr(), value) }
}

/// Eight bytes at `x[at..]`, bounds checked, as integers of 32 bits.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn load_bytes(x: &[u8], at: usize) -> __m256i {
    let x = &x[at..at + 8];
    // SAFETY: the slice holds eight bytes.
    _mm256_cvtepu8_epi32(unsafe { _mm_loadl_epi64(x.as_ptr().cast()) })
}

/// Dot product of two rows of a whole number of vectors.
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(crate) fn dot_floats(a: &[f32], b: &[f32]) -> f32 {
    let mut sum = _mm256_setzero_ps();
    for (a, b) in a.chunks_exact(8).zip(b.chunks_exact(8)) {
        sum = _mm256_fmadd_ps(load(a, 0), load(b, 0), sum);
    }
    reduce_add(sum)
}

/// Asks for part `part` of `parts` of what lies where `bytes` lie, one page of `page_bytes` on. The pages of a head lie one
/// after the other and are read in that order, but keys and values take turns, and a page is too short for the hardware
/// to foresee the next. `HINT` is the level to bring them to: on their way to the first, lines hold buffers that loads
/// wait for, and the second is near enough for most kernels. docs/notes.md has the measurements.
#[inline]
pub(crate) fn prefetch_next<const HINT: i32>(bytes: &[u8], page_bytes: usize, part: usize, parts: usize) {
    let (next, lines) = (bytes.as_ptr().wrapping_add(page_bytes), bytes.len().div_ceil(64));
    let share = lines.div_ceil(parts);
    for line in part * share..((part + 1) * share).min(lines) {
        // SAFETY: a hint, which no address makes fault.
        unsafe { _mm_prefetch::<HINT>(next.wrapping_add(line * 64).cast()) };
    }
}

/// Asks for what the next page has from byte `from` on, into the second level.
#[inline]
pub(crate) fn prefetch_next_from(page: &[u8], from: usize) {
    for at in (from..page.len()).step_by(64) {
        // SAFETY: a hint, which no address makes fault.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(page.as_ptr().wrapping_add(page.len() + at).cast()) };
    }
}

/// The sum of the eight lanes.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn reduce_add(x: __m256) -> f32 {
    let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
}

/// The largest of the eight lanes.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn reduce_max(x: __m256) -> f32 {
    let x = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)))
}

/// The sums over each of eight vectors.
#[inline]
#[target_feature(enable = "avx2")]
fn sums(v: &[__m256; 8]) -> __m256 {
    let four = |i: usize| _mm256_hadd_ps(_mm256_hadd_ps(v[i], v[i + 1]), _mm256_hadd_ps(v[i + 2], v[i + 3]));
    let (a, b) = (four(0), four(4));
    _mm256_add_ps(_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b))
}

#[target_feature(enable = "avx2,fma")]
fn exact_scores(q: &[f32], rows: ExactRows, scores: &mut [f32], columns: usize) {
    let n_q = q.len() / rows.dim;
    let mut row = 0;
    while row < n_q {
        let (q, scores) = (&q[row * rows.dim..], &mut scores[row * columns..]);
        row += match n_q - row {
            1 => score_rows::<1, 8>(q, rows, scores, columns),
            2 | 3 => score_rows::<2, 4>(q, rows, scores, columns),
            _ => score_rows::<4, 2>(q, rows, scores, columns),
        };
    }
}

/// Scores of `Q` query rows, `K` keys at a time (`Q * K` is 8, enough sums to hide the latency of a multiply-add).
#[inline]
#[target_feature(enable = "avx2,fma")]
fn score_rows<const Q: usize, const K: usize>(q: &[f32], rows: ExactRows, scores: &mut [f32], columns: usize) -> usize {
    for first in (0..rows.n).step_by(K) {
        let mut acc = [_mm256_setzero_ps(); 8];
        for c in (0..rows.dim).step_by(8) {
            let queries: [__m256; Q] = std::array::from_fn(|i| load(q, i * rows.dim + c));
            for k in 0..K {
                let key = load(rows.data, (first + k) * rows.dim + c);
                for i in 0..Q {
                    acc[i * K + k] = _mm256_fmadd_ps(queries[i], key, acc[i * K + k]);
                }
            }
        }
        let mut out = [0f32; 8];
        store(&mut out, 0, sums(&acc));
        let n = K.min(rows.n - first);
        for i in 0..Q {
            scores[i * columns + first..][..n].copy_from_slice(&out[i * K..][..n]);
        }
    }
    Q
}

#[target_feature(enable = "avx2,fma")]
fn exact_accumulate(p: &[f32], columns: usize, rows: ExactRows, acc: &mut [f32]) {
    let n_q = acc.len() / rows.dim;
    let mut row = 0;
    while row < n_q {
        if n_q - row >= 4 {
            (0..rows.dim).step_by(16).for_each(|c| add_rows::<4, 2>(p, columns, rows, acc, row, c));
            row += 4;
        } else {
            (0..rows.dim).step_by(32).for_each(|c| add_rows::<1, 4>(p, columns, rows, acc, row, c));
            row += 1;
        }
    }
}

/// Adds to `8 * Z` channels from `c` of `Q` output rows from `row`.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn add_rows<const Q: usize, const Z: usize>(
    p: &[f32],
    columns: usize,
    rows: ExactRows,
    acc: &mut [f32],
    row: usize,
    c: usize,
) {
    let mut sum = [[_mm256_setzero_ps(); Z]; Q];
    for i in 0..rows.n {
        let value: [__m256; Z] = std::array::from_fn(|z| load(rows.data, i * rows.dim + c + 8 * z));
        for (r, sum) in sum.iter_mut().enumerate() {
            let p = _mm256_set1_ps(p[(row + r) * columns + i]);
            for z in 0..Z {
                sum[z] = _mm256_fmadd_ps(p, value[z], sum[z]);
            }
        }
    }
    for (r, sum) in sum.iter().enumerate() {
        for (z, sum) in sum.iter().enumerate() {
            let at = (row + r) * rows.dim + c + 8 * z;
            store(acc, at, _mm256_add_ps(load(acc, at), *sum));
        }
    }
}

/// `e^x` for `x <= 0` to about 2 units in the last place; exactly 0 below -87.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn exp(x: __m256) -> __m256 {
    let c = |x: f32| _mm256_set1_ps(x);
    let keep = _mm256_cmp_ps::<_CMP_NLT_UQ>(x, c(-87.0));
    let y = _mm256_mul_ps(x, c(std::f32::consts::LOG2_E));
    let n = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(y);
    // The fractional part from x itself, in two steps, so that large |x| keep their precision.
    let r = _mm256_fnmadd_ps(n, c(0.693_359_4), x);
    let r = _mm256_fnmadd_ps(n, c(-2.121_944_4e-4), r);
    let mut e = c(1.0 / 720.0);
    for k in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        e = _mm256_fmadd_ps(e, r, c(k));
    }
    // Times 2^n on the exponent field, which stays positive: e >= 1 wherever n is its least, -126.
    let power = _mm256_slli_epi32::<23>(_mm256_cvtps_epi32(n));
    _mm256_and_ps(keep, _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(e), power)))
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn tanh(x: __m256) -> __m256 {
    // tanh |x| = (1 - e) / (1 + e) with e = exp(-2 |x|)
    let (sign_bit, one) = (_mm256_set1_ps(-0.0), _mm256_set1_ps(1.0));
    let e = exp(_mm256_mul_ps(_mm256_andnot_ps(sign_bit, x), _mm256_set1_ps(-2.0)));
    let t = _mm256_div_ps(_mm256_sub_ps(one, e), _mm256_add_ps(one, e));
    _mm256_or_ps(t, _mm256_and_ps(sign_bit, x))
}

#[target_feature(enable = "avx2,fma")]
fn softmax(scores: &mut [f32], columns: usize, logits: &Logits, state: &mut State) {
    let cap = logits.softcap;
    for (row, scores) in scores.chunks_exact_mut(columns).enumerate() {
        let mask_row = logits.mask_row[row] as usize * columns;
        let slope = _mm256_set1_ps(logits.slopes[row]);
        let mut top = _mm256_set1_ps(state.max[row]);
        for i in (0..columns).step_by(8) {
            let mut s = load(scores, i);
            if cap > 0.0 {
                s = _mm256_mul_ps(tanh(_mm256_mul_ps(s, _mm256_set1_ps(1.0 / cap))), _mm256_set1_ps(cap));
            }
            if !logits.mask_is_zero {
                s = _mm256_fmadd_ps(slope, load(logits.mask, mask_row + i), s);
            }
            store(scores, i, s);
            top = _mm256_max_ps(s, top);
        }
        let max = reduce_max(top);
        if max == f32::NEG_INFINITY {
            scores.fill(0.0);
            continue;
        }
        state.rescale(row, max);
        let (max, mut sum) = (_mm256_set1_ps(max), _mm256_setzero_ps());
        for i in (0..columns).step_by(8) {
            let e = exp(_mm256_sub_ps(load(scores, i), max));
            sum = _mm256_add_ps(sum, e);
            store(scores, i, e);
        }
        state.sum[row] += reduce_add(sum);
    }
}

#[target_feature(enable = "avx2,f16c")]
pub(crate) fn f16_to_f32(from: &[u8], to: &mut [f32]) {
    for (f, t) in from.chunks_exact(16).zip(to.chunks_exact_mut(8)) {
        // SAFETY: the chunk holds eight half floats.
        let x = _mm256_cvtph_ps(unsafe { _mm_loadu_si128(f.as_ptr().cast()) });
        let x = _mm256_and_ps(_mm256_cmp_ps::<_CMP_ORD_Q>(x, x), x);
        let x = _mm256_max_ps(_mm256_min_ps(x, _mm256_set1_ps(65504.0)), _mm256_set1_ps(-65504.0));
        store(t, 0, x);
    }
}

#[target_feature(enable = "avx2")]
fn copy_finite(from: &[f32], to: &mut [f32]) {
    super::scalar::copy_finite(from, to);
}
