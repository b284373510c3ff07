//! AVX-512 forms of the kernels that do not depend on a codec.

use std::arch::x86_64::*;
use std::f32::consts::LOG2_E;

use crate::rows::finite;
use crate::shape::MAX_HEAD_DIM;
use crate::simd::exact::{ExactRows, Kernels, Logits, State};
use crate::simd::isa::{feature_table, Avx512};
use crate::simd::scalar;

feature_table!(Avx512 => Kernels {
    exact_scores: exact_scores(q, rows, scores, columns),
    exact_accumulate: exact_accumulate(p, columns, rows, acc),
    softmax: softmax(scores, columns, logits, state),
    f16_to_f32: f16_to_f32(from, to),
    copy_finite: copy_finite(from, to),
});

/// Sixteen floats at `x[at..]`, bounds checked.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn load(x: &[f32], at: usize) -> __m512 {
    let x = &x[at..at + 16];
    // SAFETY: the slice holds sixteen floats.
    unsafe { _mm512_loadu_ps(x.as_ptr()) }
}

/// Sixteen bytes at `x[at..]`, bounds checked, as integers of 32 bits.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn load_bytes(x: &[u8], at: usize) -> __m512i {
    let x = &x[at..at + 16];
    // SAFETY: the slice holds sixteen bytes.
    _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(x.as_ptr().cast()) })
}

/// Sixteen little-endian half floats at byte `at`, bounds checked.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn load_half(x: &[u8], at: usize) -> __m512 {
    let x = &x[at..at + 32];
    // SAFETY: the slice holds sixteen half floats.
    _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(x.as_ptr().cast()) })
}

/// Stores sixteen floats at `x[at..]`, bounds checked.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn store(x: &mut [f32], at: usize, value: __m512) {
    let x = &mut x[at..at + 16];
    // SAFETY: the slice holds sixteen floats.
    unsafe { _mm512_storeu_ps(x.as_mut_ptr(), value) }
}

/// Four times sixteen integers that fit into a byte, as bytes in order.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(crate) fn pack_bytes(x: [__m512i; 4]) -> __m512i {
    let pairs = [_mm512_packs_epi32(x[0], x[1]), _mm512_packs_epi32(x[2], x[3])];
    _mm512_permutexvar_epi32(byte_order(), _mm512_packs_epi16(pairs[0], pairs[1]))
}

/// [`pack_bytes`] of integers from 0 to 255.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(crate) fn pack_unsigned_bytes(x: [__m512i; 4]) -> __m512i {
    let pairs = [_mm512_packs_epi32(x[0], x[1]), _mm512_packs_epi32(x[2], x[3])];
    _mm512_permutexvar_epi32(byte_order(), _mm512_packus_epi16(pairs[0], pairs[1]))
}

/// Packing works in lanes of 128 bits: afterwards lane l holds four bytes of each vector's lane l.
#[inline]
#[target_feature(enable = "avx512f")]
fn byte_order() -> __m512i {
    _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)
}

/// Stores 64 bytes at `x[at..]`, bounds checked.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn store_bytes(x: &mut [i8], at: usize, value: __m512i) {
    let x = &mut x[at..at + 64];
    // SAFETY: the slice holds 64 bytes.
    unsafe { _mm512_storeu_si512(x.as_mut_ptr().cast(), value) }
}

/// Dot product of two rows of a whole number of vectors.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn dot_floats(a: &[f32], b: &[f32]) -> f32 {
    let mut sum = _mm512_setzero_ps();
    for (a, b) in a.chunks_exact(16).zip(b.chunks_exact(16)) {
        sum = _mm512_fmadd_ps(load(a, 0), load(b, 0), sum);
    }
    _mm512_reduce_add_ps(sum)
}

/// The sums over each of sixteen vectors.
#[inline]
#[target_feature(enable = "avx512f")]
fn sums(v: &[__m512; 16]) -> __m512 {
    let pair = |a, b| _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    let four = |i: usize| {
        let (a, b) = (_mm512_castps_pd(pair(v[i], v[i + 1])), _mm512_castps_pd(pair(v[i + 2], v[i + 3])));
        _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)))
    };
    let lanes = |a, b| _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
    lanes(lanes(four(0), four(4)), lanes(four(8), four(12)))
}

#[target_feature(enable = "avx512f")]
fn exact_scores(q: &[f32], rows: ExactRows, scores: &mut [f32], columns: usize) {
    let n_q = q.len() / rows.dim;
    let mut row = 0;
    if n_q >= 8 {
        row = n_q / 8 * 8;
        score_many(&q[..row * rows.dim], rows, scores, columns);
    }
    while row < n_q {
        let (q, scores) = (&q[row * rows.dim..], &mut scores[row * columns..]);
        row += match n_q - row {
            1 => score_rows::<1, 16>(q, rows, scores, columns),
            2 | 3 => score_rows::<2, 8>(q, rows, scores, columns),
            _ => score_rows::<4, 4>(q, rows, scores, columns),
        };
    }
}

/// Scores of a multiple of eight query rows: sixteen keys are transposed, so that no sum goes across lanes.
#[inline]
#[target_feature(enable = "avx512f")]
fn score_many(q: &[f32], rows: ExactRows, scores: &mut [f32], columns: usize) {
    let dim = rows.dim;
    let mut keys = [_mm512_setzero_ps(); MAX_HEAD_DIM as usize];
    for first in (0..rows.n).step_by(16) {
        for c in (0..dim).step_by(16) {
            let block = std::array::from_fn(|i| load(rows.data, (first + i) * dim + c));
            keys[c..c + 16].copy_from_slice(&transpose(block));
        }
        let seen = u16::MAX >> (16 - (rows.n - first).min(16));
        for (i, q) in q.chunks_exact(8 * dim).enumerate() {
            let mut acc = [_mm512_setzero_ps(); 8];
            for (c, key) in keys[..dim].iter().enumerate() {
                for (row, acc) in acc.iter_mut().enumerate() {
                    *acc = _mm512_fmadd_ps(_mm512_set1_ps(q[row * dim + c]), *key, *acc);
                }
            }
            for (row, acc) in acc.into_iter().enumerate() {
                let to = &mut scores[(8 * i + row) * columns + first..][..(rows.n - first).min(16)];
                // SAFETY: the mask has as many bits as the slice has floats.
                unsafe { _mm512_mask_storeu_ps(to.as_mut_ptr(), seen, acc) };
            }
        }
    }
}

/// Vector `i` of the result holds lane `i` of each of the sixteen.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(v: [__m512; 16]) -> [__m512; 16] {
    // Within lanes of 128 bits: four rows of four.
    let mut fours = [_mm512_setzero_ps(); 16];
    for i in 0..4 {
        let [a, b, c, d] = [0, 1, 2, 3].map(|k| v[4 * i + k]);
        let (ab, cd) = (_mm512_unpacklo_ps(a, b), _mm512_unpacklo_ps(c, d));
        let (ab, cd) = ([ab, _mm512_unpackhi_ps(a, b)], [cd, _mm512_unpackhi_ps(c, d)]);
        for k in 0..2 {
            let (ab, cd) = (_mm512_castps_pd(ab[k]), _mm512_castps_pd(cd[k]));
            fours[4 * i + 2 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
            fours[4 * i + 2 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
        }
    }
    // Then the lanes: lane l of fours[4 * i + k] goes to lane i of column 4 * l + k.
    let mut out = [_mm512_setzero_ps(); 16];
    for k in 0..4 {
        let [a, b, c, d] = [0, 1, 2, 3].map(|i| fours[4 * i + k]);
        let (even, odd) = (_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
        let (even_2, odd_2) = (_mm512_shuffle_f32x4::<0x88>(c, d), _mm512_shuffle_f32x4::<0xdd>(c, d));
        out[k] = _mm512_shuffle_f32x4::<0x88>(even, even_2);
        out[4 + k] = _mm512_shuffle_f32x4::<0x88>(odd, odd_2);
        out[8 + k] = _mm512_shuffle_f32x4::<0xdd>(even, even_2);
        out[12 + k] = _mm512_shuffle_f32x4::<0xdd>(odd, odd_2);
    }
    out
}

/// Scores of `Q` query rows, `K` keys at a time (`Q * K` is 16).
#[inline]
#[target_feature(enable = "avx512f")]
fn score_rows<const Q: usize, const K: usize>(q: &[f32], rows: ExactRows, scores: &mut [f32], columns: usize) -> usize {
    for first in (0..rows.n).step_by(K) {
        let mut acc = [_mm512_setzero_ps(); 16];
        for c in (0..rows.dim).step_by(16) {
            let queries: [__m512; Q] = std::array::from_fn(|i| load(q, i * rows.dim + c));
            for k in 0..K {
                let key = load(rows.data, (first + k) * rows.dim + c);
                for i in 0..Q {
                    acc[i * K + k] = _mm512_fmadd_ps(queries[i], key, acc[i * K + k]);
                }
            }
        }
        let mut out = [0f32; 16];
        store(&mut out, 0, sums(&acc));
        let n = K.min(rows.n - first);
        for i in 0..Q {
            scores[i * columns + first..][..n].copy_from_slice(&out[i * K..][..n]);
        }
    }
    Q
}

#[target_feature(enable = "avx512f")]
fn exact_accumulate(p: &[f32], columns: usize, rows: ExactRows, acc: &mut [f32]) {
    let n_q = acc.len() / rows.dim;
    let mut row = 0;
    while row < n_q {
        let n = if n_q - row >= 4 { 4 } else { 1 };
        for c in (0..rows.dim).step_by(64) {
            match (n, rows.dim - c >= 64) {
                (4, true) => add_rows::<4, 4>(p, columns, rows, acc, row, c),
                (4, false) => add_rows::<4, 2>(p, columns, rows, acc, row, c),
                (_, true) => add_rows::<1, 4>(p, columns, rows, acc, row, c),
                (_, false) => add_rows::<1, 2>(p, columns, rows, acc, row, c),
            }
        }
        row += n;
    }
}

/// Adds to `16 * Z` channels from `c` of `Q` output rows from `row`.
#[inline]
#[target_feature(enable = "avx512f")]
fn add_rows<const Q: usize, const Z: usize>(
    p: &[f32],
    columns: usize,
    rows: ExactRows,
    acc: &mut [f32],
    row: usize,
    c: usize,
) {
    let mut sum = [[_mm512_setzero_ps(); Z]; Q];
    for i in 0..rows.n {
        let value: [__m512; Z] = std::array::from_fn(|z| load(rows.data, i * rows.dim + c + 16 * z));
        for (r, sum) in sum.iter_mut().enumerate() {
            let p = _mm512_set1_ps(p[(row + r) * columns + i]);
            for z in 0..Z {
                sum[z] = _mm512_fmadd_ps(p, value[z], sum[z]);
            }
        }
    }
    for (r, sum) in sum.iter().enumerate() {
        for (z, sum) in sum.iter().enumerate() {
            let at = (row + r) * rows.dim + c + 16 * z;
            store(acc, at, _mm512_add_ps(load(acc, at), *sum));
        }
    }
}

/// `2^x` for `x <= 0` to about 2 units in the last place; exactly 0 below -125, NaN for NaN.
#[inline]
#[allow(clippy::approx_constant, reason = "a coefficient near ln 2, not ln 2")]
#[target_feature(enable = "avx512f")]
fn exp2(x: __m512) -> __m512 {
    let c = |x: f32| _mm512_set1_ps(x);
    let keep = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, c(-125.0));
    let n = _mm512_cvtps_epi32(x);
    let r = _mm512_sub_ps(x, _mm512_cvtepi32_ps(n));
    // The polynomial of degree 5 of least relative error (7.5e-8) on -0.5 to 0.5, by Remez' algorithm.
    let mut e = c(0.001_327_647_2);
    for k in [0.009_675_541, 0.055_507_133, 0.240_221_2, 0.693_147, 1.0] {
        e = _mm512_fmadd_ps(e, r, c(k));
    }
    // To the exponent; NaN has n = -2^31, which adds nothing.
    _mm512_castsi512_ps(_mm512_maskz_add_epi32(keep, _mm512_castps_si512(e), _mm512_slli_epi32::<23>(n)))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn tanh(x: __m512) -> __m512 {
    // tanh |x| = (1 - e) / (1 + e) with e = exp(-2 |x|)
    let e = exp2(_mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(-2.0 * LOG2_E)));
    let one = _mm512_set1_ps(1.0);
    let t = _mm512_div_ps(_mm512_sub_ps(one, e), _mm512_add_ps(one, e));
    let negative = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(x, _mm512_setzero_ps());
    _mm512_mask_sub_ps(t, negative, _mm512_setzero_ps(), t)
}

#[target_feature(enable = "avx512f")]
fn softmax(scores: &mut [f32], columns: usize, logits: &Logits, state: &mut State) {
    // All maxima first: within a row, weights wait for its maximum.
    for (row, scores) in scores.chunks_exact_mut(columns).enumerate() {
        if logits.softcap > 0.0 || !logits.mask_is_zero {
            adjust(scores, row, logits);
        }
        let mut top = _mm512_set1_ps(state.max[row]);
        for s in scores.chunks_exact(16) {
            top = _mm512_max_ps(load(s, 0), top);
        }
        state.rescale(row, _mm512_reduce_max_ps(top));
    }
    let log2_e = _mm512_set1_ps(LOG2_E);
    for (row, scores) in scores.chunks_exact_mut(columns).enumerate() {
        // Every weight is 0 if nothing has been visible so far.
        let max = if state.max[row] == f32::NEG_INFINITY { 0.0 } else { state.max[row] };
        let (max, mut sum) = (_mm512_set1_ps(max), _mm512_setzero_ps());
        for s in scores.chunks_exact_mut(16) {
            // The difference first: it is exact near the maximum, however large that is.
            let e = exp2(_mm512_mul_ps(_mm512_sub_ps(load(s, 0), max), log2_e));
            sum = _mm512_add_ps(sum, e);
            store(s, 0, e);
        }
        state.sum[row] += _mm512_reduce_add_ps(sum);
    }
}

/// Soft cap and mask.
#[target_feature(enable = "avx512f")]
fn adjust(scores: &mut [f32], row: usize, logits: &Logits) {
    let cap = logits.softcap;
    let mask_row = logits.mask_row[row] as usize * scores.len();
    let slope = _mm512_set1_ps(logits.slopes[row]);
    for (i, s) in scores.chunks_exact_mut(16).enumerate() {
        let mut x = load(s, 0);
        if cap > 0.0 {
            x = _mm512_mul_ps(tanh(_mm512_mul_ps(x, _mm512_set1_ps(1.0 / cap))), _mm512_set1_ps(cap));
        }
        if !logits.mask_is_zero {
            x = _mm512_fmadd_ps(slope, load(logits.mask, mask_row + 16 * i), x);
        }
        store(s, 0, x);
    }
}

/// Bytes from what is converted to what is asked for from memory.
const AHEAD: usize = 2048;

/// Rows of a multiple of 32 values.
#[target_feature(enable = "avx512f,avx512bw")]
pub(crate) fn f16_to_f32(from: &[u8], to: &mut [f32]) {
    for (from, to) in from.chunks_exact(64).zip(to.chunks_exact_mut(32)) {
        _mm_prefetch::<_MM_HINT_T0>(from.as_ptr().wrapping_add(AHEAD).cast());
        // SAFETY: the chunk holds 64 bytes.
        let halves = unsafe { _mm512_loadu_si512(from.as_ptr().cast()) };
        let magnitude = _mm512_and_si512(halves, _mm512_set1_epi16(0x7fff));
        let x = [_mm512_castsi512_si256(halves), _mm512_extracti64x4_epi64::<1>(halves)].map(|h| _mm512_cvtph_ps(h));
        store(to, 0, x[0]);
        store(to, 16, x[1]);
        // What is not finite is next to never there.
        if _mm512_cmpge_epu16_mask(magnitude, _mm512_set1_epi16(0x7c00)) != 0 {
            to.iter_mut().for_each(|x| *x = finite(*x));
        }
    }
}

#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
fn copy_finite(from: &[f32], to: &mut [f32]) {
    super::scalar::copy_finite(from, to);
}
