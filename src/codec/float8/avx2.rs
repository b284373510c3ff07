//! Eight numbers of either format at once.

use std::arch::x86_64::*;

use super::power;

/// [`super::e4m3_decode`] times `2^(base - 127)`.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn e4m3_decode(codes: __m256i, base: u8) -> __m256 {
    let magnitude = _mm256_slli_epi32::<20>(_mm256_and_si256(codes, _mm256_set1_epi32(0x7f)));
    let sign = _mm256_slli_epi32::<24>(_mm256_and_si256(codes, _mm256_set1_epi32(0x80)));
    // First by 2^120 (E4M3's bias against f32's), which is exact, then by the page's power.
    let x = _mm256_mul_ps(_mm256_castsi256_ps(magnitude), _mm256_set1_ps(f32::from_bits(247 << 23)));
    let x = _mm256_mul_ps(x, _mm256_set1_ps(power(base)));
    _mm256_or_ps(x, _mm256_castsi256_ps(sign))
}

/// [`super::scale_decode`].
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn scale_decode(codes: __m256i, base: u8) -> __m256 {
    let none = _mm256_cmpeq_epi32(codes, _mm256_setzero_si256());
    let step = _mm256_add_epi32(_mm256_slli_epi32::<19>(codes), _mm256_set1_epi32(i32::from(base) << 23));
    _mm256_castsi256_ps(_mm256_andnot_si256(none, step))
}

/// Steps of codecs with a step per token: scales of symmetric codes, else FP8.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn step_decode(codes: __m256i, base: u8, symmetric: bool) -> __m256 {
    if symmetric {
        scale_decode(codes, base)
    } else {
        e4m3_decode(codes, base)
    }
}
