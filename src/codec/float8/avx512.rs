//! Sixteen numbers of either format at once.

use std::arch::x86_64::*;

use super::power;

/// [`super::e4m3_decode`] times `2^(base - 127)`.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn e4m3_decode(codes: __m512i, base: u8) -> __m512 {
    let magnitude = _mm512_slli_epi32::<20>(_mm512_and_si512(codes, _mm512_set1_epi32(0x7f)));
    let sign = _mm512_slli_epi32::<24>(_mm512_and_si512(codes, _mm512_set1_epi32(0x80)));
    // First by 2^120 (E4M3's bias against f32's), which is exact, then by the page's power.
    let x = _mm512_mul_ps(_mm512_castsi512_ps(magnitude), _mm512_set1_ps(f32::from_bits(247 << 23)));
    let x = _mm512_mul_ps(x, _mm512_set1_ps(power(base)));
    _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(x), sign))
}

/// [`super::scale_decode`].
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn scale_decode(codes: __m512i, base: u8) -> __m512 {
    let some = _mm512_test_epi32_mask(codes, codes);
    let base = _mm512_set1_epi32(i32::from(base) << 23);
    _mm512_castsi512_ps(_mm512_maskz_add_epi32(some, _mm512_slli_epi32::<19>(codes), base))
}

/// Steps of codecs with a step per token: scales of symmetric codes, else FP8.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn step_decode(codes: __m512i, base: u8, symmetric: bool) -> __m512 {
    if symmetric {
        scale_decode(codes, base)
    } else {
        e4m3_decode(codes, base)
    }
}
