//! Vectors of AVX2 (with FMA and F16C), and of AVX-VNNI, which adds products to sums in one instruction.

use std::arch::x86_64::*;

use crate::simd::exact::ExactRows;
use crate::simd::isa::Avx2;
use crate::simd::vector::{by_instructions, Vector, MAX_LANES};

impl<const VNNI: bool> Vector for Avx2<VNNI> {
    const LANES: usize = 8;
    const REGISTERS: usize = 16;
    type F32 = __m256;
    type I32 = __m256i;

    #[inline(always)]
    fn run<R>(self, kernel: impl FnOnce(Self) -> R) -> R {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn compiled<T, R>(proof: T, kernel: impl FnOnce(T) -> R) -> R {
            kernel(proof)
        }
        #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
        fn compiled_with_vnni<T, R>(proof: T, kernel: impl FnOnce(T) -> R) -> R {
            kernel(proof)
        }
        // SAFETY: the token proves that the CPU has the features.
        unsafe {
            if VNNI {
                compiled_with_vnni(self, kernel)
            } else {
                compiled(self, kernel)
            }
        }
    }

    by_instructions! {
        fn load(x: &[f32], at: usize) -> __m256 = load(x, at);
        fn store(x: &mut [f32], at: usize, value: __m256) = store(x, at, value);
        fn load_half(x: &[u8], at: usize) -> __m256 = load_half(x, at);
        fn load_bytes(x: &[u8], at: usize) -> __m256i = load_bytes(x, at);
        fn load_unsigned(x: &[i8], at: usize) -> __m256i = load_unsigned(x, at);
        fn store_bytes(x: &mut [i8], at: usize, value: [__m256i; 4], total: __m256i) -> __m256i = {
            let [a, b] = pairs(value);
            store_bytes(x, at, _mm256_packs_epi16(a, b));
            add_all(total, value)
        };
        fn store_unsigned_bytes(x: &mut [i8], at: usize, value: [__m256i; 4], total: __m256i) -> __m256i = {
            let [a, b] = pairs(value);
            store_bytes(x, at, _mm256_packus_epi16(a, b));
            add_all(total, value)
        };
        fn gather(x: &[f32], index: __m256i) -> __m256 = gather(x, index);

        fn splat(x: f32) -> __m256 = _mm256_set1_ps(x);
        fn add(a: __m256, b: __m256) -> __m256 = _mm256_add_ps(a, b);
        fn sub(a: __m256, b: __m256) -> __m256 = _mm256_sub_ps(a, b);
        fn mul(a: __m256, b: __m256) -> __m256 = _mm256_mul_ps(a, b);
        fn div(a: __m256, b: __m256) -> __m256 = _mm256_div_ps(a, b);
        fn mul_add(a: __m256, b: __m256, c: __m256) -> __m256 = _mm256_fmadd_ps(a, b, c);
        fn max(a: __m256, b: __m256) -> __m256 = _mm256_max_ps(a, b);
        fn nearest(x: __m256) -> __m256i = _mm256_cvtps_epi32(x);
        fn rest(x: __m256, whole: __m256i) -> __m256 = _mm256_sub_ps(x, _mm256_cvtepi32_ps(whole));
        fn sum(x: __m256) -> f32 = reduce_add(x);
        fn largest(x: __m256) -> f32 = reduce_max(x);
        fn sums(x: &[__m256; MAX_LANES]) -> __m256 = sums(x);

        fn load_i32(x: &[i32], at: usize) -> __m256i = load_i32(x, at);
        fn store_i32(x: &mut [i32], at: usize, value: __m256i) = store_i32(x, at, value);
        fn add_words(sum: __m256i, a: __m256i, b: __m256i) -> __m256i = {
            if VNNI {
                _mm256_dpwssd_avx_epi32(sum, a, b)
            } else {
                _mm256_add_epi32(sum, _mm256_madd_epi16(a, b))
            }
        };
        fn splat_i32(x: i32) -> __m256i = _mm256_set1_epi32(x);
        fn add_i32(a: __m256i, b: __m256i) -> __m256i = _mm256_add_epi32(a, b);
        fn and(a: __m256i, b: __m256i) -> __m256i = _mm256_and_si256(a, b);
        fn or(a: __m256i, b: __m256i) -> __m256i = _mm256_or_si256(a, b);
        fn shift_left(x: __m256i, count: i32) -> __m256i = _mm256_sll_epi32(x, _mm_cvtsi32_si128(count));
        fn unless_zero(x: __m256i, y: __m256i) -> __m256i = {
            _mm256_andnot_si256(_mm256_cmpeq_epi32(x, _mm256_setzero_si256()), y)
        };
        fn unless_less(x: __m256, bound: __m256, y: __m256i) -> __m256i = {
            _mm256_and_si256(_mm256_castps_si256(_mm256_cmp_ps::<_CMP_NLT_UQ>(x, bound)), y)
        };
        fn sum_i32(x: __m256i) -> f32 = reduce_add(_mm256_cvtepi32_ps(x));
        fn to_f32(x: __m256i) -> __m256 = _mm256_cvtepi32_ps(x);
        fn bits(x: __m256) -> __m256i = _mm256_castps_si256(x);
        fn of_bits(x: __m256i) -> __m256 = _mm256_castsi256_ps(x);

        fn f16_to_f32(from: &[u8], to: &mut [f32]) = f16_to_f32(from, to);
    }

    #[inline(always)]
    fn score_many(self, _q: &[f32], _rows: ExactRows, _scores: &mut [f32], _columns: usize) -> usize {
        0
    }
}

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

/// Eight bytes without a sign, bounds checked.
#[inline]
#[target_feature(enable = "avx2")]
fn load_unsigned(x: &[i8], at: usize) -> __m256i {
    let x = &x[at..at + 8];
    // SAFETY: the slice holds eight bytes.
    _mm256_cvtepu8_epi32(unsafe { _mm_loadl_epi64(x.as_ptr().cast()) })
}

/// Eight little-endian half floats at byte `at`, bounds checked.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn load_half(x: &[u8], at: usize) -> __m256 {
    let x = &x[at..at + 16];
    // SAFETY: the slice holds eight half floats.
    _mm256_cvtph_ps(unsafe { _mm_loadu_si128(x.as_ptr().cast()) })
}

/// The sum of five vectors.
#[inline]
#[target_feature(enable = "avx2")]
fn add_all(total: __m256i, x: [__m256i; 4]) -> __m256i {
    let (a, b) = (_mm256_add_epi32(x[0], x[1]), _mm256_add_epi32(x[2], x[3]));
    _mm256_add_epi32(total, _mm256_add_epi32(a, b))
}

/// Packs pairs of vectors to 16 bits.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn pairs(x: [__m256i; 4]) -> [__m256i; 2] {
    [_mm256_packs_epi32(x[0], x[1]), _mm256_packs_epi32(x[2], x[3])]
}

/// Stores 32 bytes at `x[at..]`, bounds checked, which packing in lanes of 128 bits left so that lane l holds four bytes of each
/// of four vectors' lane l.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn store_bytes(x: &mut [i8], at: usize, value: __m256i) {
    let x = &mut x[at..at + 32];
    let value = _mm256_permutevar8x32_epi32(value, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    // SAFETY: the slice holds 32 bytes.
    unsafe { _mm256_storeu_si256(x.as_mut_ptr().cast(), value) }
}

/// Eight integers at `x[at..]`, bounds checked.
#[inline]
#[target_feature(enable = "avx2")]
fn load_i32(x: &[i32], at: usize) -> __m256i {
    let x = &x[at..at + 8];
    // SAFETY: the slice holds eight integers.
    unsafe { _mm256_loadu_si256(x.as_ptr().cast()) }
}

/// Stores eight integers at `x[at..]`, bounds checked.
#[inline]
#[target_feature(enable = "avx2")]
fn store_i32(x: &mut [i32], at: usize, value: __m256i) {
    let x = &mut x[at..at + 8];
    // SAFETY: the slice holds eight integers.
    unsafe { _mm256_storeu_si256(x.as_mut_ptr().cast(), value) }
}

/// Entries of a row, the last one for an index beyond it.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn gather(x: &[f32], index: __m256i) -> __m256 {
    assert!(!x.is_empty());
    let index = _mm256_min_epu32(index, _mm256_set1_epi32(x.len() as i32 - 1));
    // SAFETY: every index is below the length of `x`.
    unsafe { _mm256_i32gather_ps::<4>(x.as_ptr(), index) }
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

/// The sums over each of the first eight vectors.
#[inline]
#[target_feature(enable = "avx2")]
fn sums(v: &[__m256; MAX_LANES]) -> __m256 {
    let four = |i: usize| _mm256_hadd_ps(_mm256_hadd_ps(v[i], v[i + 1]), _mm256_hadd_ps(v[i + 2], v[i + 3]));
    let (a, b) = (four(0), four(4));
    _mm256_add_ps(_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b))
}

#[target_feature(enable = "avx2,f16c")]
fn f16_to_f32(from: &[u8], to: &mut [f32]) {
    for (f, t) in from.chunks_exact(16).zip(to.chunks_exact_mut(8)) {
        // SAFETY: the chunk holds eight half floats.
        let x = _mm256_cvtph_ps(unsafe { _mm_loadu_si128(f.as_ptr().cast()) });
        let x = _mm256_and_ps(_mm256_cmp_ps::<_CMP_ORD_Q>(x, x), x);
        let x = _mm256_max_ps(_mm256_min_ps(x, _mm256_set1_ps(65504.0)), _mm256_set1_ps(-65504.0));
        store(t, 0, x);
    }
}
