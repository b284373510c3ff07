//! Vectors of AVX-512.

use std::arch::x86_64::*;

use crate::rows::finite;
use crate::shape::MAX_HEAD_DIM;
use crate::simd::exact::ExactRows;
use crate::simd::isa::Avx512;
use crate::simd::vector::{by_instructions, Vector, MAX_LANES};

impl Vector for Avx512 {
    const LANES: usize = 16;
    const REGISTERS: usize = 32;
    type F32 = __m512;
    type I32 = __m512i;

    #[inline(always)]
    fn run<R>(self, kernel: impl FnOnce(Self) -> R) -> R {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,f16c")]
        fn compiled<R>(proof: Avx512, kernel: impl FnOnce(Avx512) -> R) -> R {
            kernel(proof)
        }
        // SAFETY: the token proves that the CPU has the features.
        unsafe { compiled(self, kernel) }
    }

    by_instructions! {
        fn load(x: &[f32], at: usize) -> __m512 = load(x, at);
        fn store(x: &mut [f32], at: usize, value: __m512) = store(x, at, value);
        fn load_half(x: &[u8], at: usize) -> __m512 = load_half(x, at);
        fn load_bytes(x: &[u8], at: usize) -> __m512i = load_bytes(x, at);
        fn load_unsigned(x: &[i8], at: usize) -> __m512i = load_unsigned(x, at);
        fn store_bytes(x: &mut [i8], at: usize, value: [__m512i; 4], total: __m512i) -> __m512i = {
            let bytes = pack_bytes(value);
            store_bytes(x, at, bytes);
            _mm512_dpbusd_epi32(total, _mm512_set1_epi8(1), bytes)
        };
        fn store_unsigned_bytes(x: &mut [i8], at: usize, value: [__m512i; 4], total: __m512i) -> __m512i = {
            let bytes = pack_unsigned_bytes(value);
            store_bytes(x, at, bytes);
            _mm512_dpbusd_epi32(total, bytes, _mm512_set1_epi8(1))
        };
        fn gather(x: &[f32], index: __m512i) -> __m512 = gather(x, index);

        fn splat(x: f32) -> __m512 = _mm512_set1_ps(x);
        fn add(a: __m512, b: __m512) -> __m512 = _mm512_add_ps(a, b);
        fn sub(a: __m512, b: __m512) -> __m512 = _mm512_sub_ps(a, b);
        fn mul(a: __m512, b: __m512) -> __m512 = _mm512_mul_ps(a, b);
        fn div(a: __m512, b: __m512) -> __m512 = _mm512_div_ps(a, b);
        fn mul_add(a: __m512, b: __m512, c: __m512) -> __m512 = _mm512_fmadd_ps(a, b, c);
        fn max(a: __m512, b: __m512) -> __m512 = _mm512_max_ps(a, b);
        fn nearest(x: __m512) -> __m512i = _mm512_cvtps_epi32(x);
        fn rest(x: __m512, _whole: __m512i) -> __m512 = _mm512_reduce_ps::<TO_NEAREST>(x);
        fn sum(x: __m512) -> f32 = _mm512_reduce_add_ps(x);
        fn largest(x: __m512) -> f32 = _mm512_reduce_max_ps(x);
        fn sums(x: &[__m512; MAX_LANES]) -> __m512 = sums(x);

        fn load_i32(x: &[i32], at: usize) -> __m512i = load_i32(x, at);
        fn store_i32(x: &mut [i32], at: usize, value: __m512i) = store_i32(x, at, value);
        fn add_words(sum: __m512i, a: __m512i, b: __m512i) -> __m512i = _mm512_dpwssd_epi32(sum, a, b);
        fn splat_i32(x: i32) -> __m512i = _mm512_set1_epi32(x);
        fn add_i32(a: __m512i, b: __m512i) -> __m512i = _mm512_add_epi32(a, b);
        fn and(a: __m512i, b: __m512i) -> __m512i = _mm512_and_si512(a, b);
        fn or(a: __m512i, b: __m512i) -> __m512i = _mm512_or_si512(a, b);
        fn shift_left(x: __m512i, count: i32) -> __m512i = _mm512_sll_epi32(x, _mm_cvtsi32_si128(count));
        fn unless_zero(x: __m512i, y: __m512i) -> __m512i = _mm512_maskz_mov_epi32(_mm512_test_epi32_mask(x, x), y);
        fn unless_less(x: __m512, bound: __m512, y: __m512i) -> __m512i = {
            _mm512_maskz_mov_epi32(_mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, bound), y)
        };
        fn sum_i32(x: __m512i) -> f32 = _mm512_reduce_add_epi32(x) as f32;
        fn to_f32(x: __m512i) -> __m512 = _mm512_cvtepi32_ps(x);
        fn bits(x: __m512) -> __m512i = _mm512_castps_si512(x);
        fn of_bits(x: __m512i) -> __m512 = _mm512_castsi512_ps(x);

        fn score_many(q: &[f32], rows: ExactRows, scores: &mut [f32], columns: usize) -> usize = {
            score_many(q, rows, scores, columns)
        };
        fn f16_to_f32(from: &[u8], to: &mut [f32]) = f16_to_f32(from, to);
    }
}

/// Rounding control of `_mm512_reduce_ps`: what is left of a number after rounding it to the nearest integer, as
/// `_mm512_cvtps_epi32` does.
const TO_NEAREST: i32 = 8;

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

/// Sixteen bytes without a sign, bounds checked.
#[inline]
#[target_feature(enable = "avx512f")]
fn load_unsigned(x: &[i8], at: usize) -> __m512i {
    let x = &x[at..at + 16];
    // SAFETY: the slice holds sixteen bytes.
    _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(x.as_ptr().cast()) })
}

/// Sixteen little-endian half floats at byte `at`, bounds checked.
#[inline]
#[target_feature(enable = "avx512f")]
fn load_half(x: &[u8], at: usize) -> __m512 {
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
fn pack_unsigned_bytes(x: [__m512i; 4]) -> __m512i {
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

/// Sixteen integers at `x[at..]`, bounds checked.
#[inline]
#[target_feature(enable = "avx512f")]
fn load_i32(x: &[i32], at: usize) -> __m512i {
    let x = &x[at..at + 16];
    // SAFETY: the slice holds sixteen integers.
    unsafe { _mm512_loadu_si512(x.as_ptr().cast()) }
}

/// Stores sixteen integers at `x[at..]`, bounds checked.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn store_i32(x: &mut [i32], at: usize, value: __m512i) {
    let x = &mut x[at..at + 16];
    // SAFETY: the slice holds sixteen integers.
    unsafe { _mm512_storeu_si512(x.as_mut_ptr().cast(), value) }
}

/// Entries of a row, the last one for an index beyond it.
#[inline]
#[target_feature(enable = "avx512f")]
fn gather(x: &[f32], index: __m512i) -> __m512 {
    assert!(!x.is_empty());
    let last = _mm512_set1_epi32(x.len() as i32 - 1);
    // SAFETY: no index is beyond the last.
    unsafe { _mm512_i32gather_ps::<4>(_mm512_min_epu32(index, last), x.as_ptr()) }
}

/// The sums over each of sixteen vectors.
#[inline]
#[target_feature(enable = "avx512f")]
fn sums(v: &[__m512; MAX_LANES]) -> __m512 {
    let pair = |a, b| _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    let four = |i: usize| {
        let (a, b) = (_mm512_castps_pd(pair(v[i], v[i + 1])), _mm512_castps_pd(pair(v[i + 2], v[i + 3])));
        _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)))
    };
    let lanes = |a, b| _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
    lanes(lanes(four(0), four(4)), lanes(four(8), four(12)))
}

/// Scores of the largest multiple of eight query rows: sixteen keys are transposed, so that no sum goes across lanes.
#[inline]
#[target_feature(enable = "avx512f")]
fn score_many(q: &[f32], rows: ExactRows, scores: &mut [f32], columns: usize) -> usize {
    let dim = rows.dim;
    let n_q = q.len() / dim / 8 * 8;
    if n_q == 0 {
        return 0;
    }
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
    n_q
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

/// Bytes from what is converted to what is asked for from memory.
const AHEAD: usize = 2048;

/// Rows of a multiple of 32 values.
#[target_feature(enable = "avx512f,avx512bw")]
fn f16_to_f32(from: &[u8], to: &mut [f32]) {
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
