//! The numbers of either format, as many at once as a vector has.
#![forbid(unsafe_code)]

use super::power;
use crate::simd::vector::Vector;

/// [`super::e4m3_decode`] times `2^(base - 127)`.
#[inline(always)]
pub(crate) fn e4m3_decode<V: Vector>(v: V, codes: V::I32, base: u8) -> V::F32 {
    let magnitude = v.shift_left(v.and(codes, v.splat_i32(0x7f)), 20);
    let sign = v.shift_left(v.and(codes, v.splat_i32(0x80)), 24);
    // First by 2^120 (E4M3's bias against f32's), which is exact, then by the page's power.
    let x = v.mul(v.of_bits(magnitude), v.splat(f32::from_bits(247 << 23)));
    let x = v.mul(x, v.splat(power(base)));
    v.of_bits(v.or(v.bits(x), sign))
}

/// [`super::scale_decode`].
#[inline(always)]
fn scale_decode<V: Vector>(v: V, codes: V::I32, base: u8) -> V::F32 {
    let step = v.add_i32(v.shift_left(codes, 19), v.splat_i32(i32::from(base) << 23));
    v.of_bits(v.unless_zero(codes, step))
}

/// Steps of codecs with a step per token: scales of symmetric codes, else FP8.
#[inline(always)]
pub(crate) fn step_decode<V: Vector>(v: V, codes: V::I32, base: u8, symmetric: bool) -> V::F32 {
    if symmetric {
        scale_decode(v, codes, base)
    } else {
        e4m3_decode(v, codes, base)
    }
}
