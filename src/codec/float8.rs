//! The two 8-bit number formats of page metadata. Both are scaled by a power of two that the page's header holds.
#![deny(unsafe_code)]

pub(crate) mod vector;

/// Largest finite E4M3 value.
pub const E4M3_MAX: f32 = 448.0;

/// Rounds to FP8 E4M3 (1 sign, 4 exponent, 3 mantissa bits, bias 7), to nearest, ties to even, saturating at 448.
/// NaN becomes 0.
#[inline]
pub fn e4m3_encode(x: f32) -> u8 {
    let sign = (x.to_bits() >> 24 & 0x80) as u8;
    // Times 2^-120 moves E4M3's exponents and subnormals onto those of f32, so that one integer rounding does it all.
    let scaled = (x.abs().min(E4M3_MAX) * f32::from_bits(7 << 23)).to_bits();
    if x.is_nan() {
        return 0;
    }
    let odd = scaled >> 20 & 1;
    sign | ((scaled + 0x7_ffff + odd) >> 20) as u8
}

/// The value of an E4M3 code.
#[inline]
pub fn e4m3_decode(code: u8) -> f32 {
    let magnitude = f32::from_bits(u32::from(code & 0x7f) << 20) * f32::from_bits(247 << 23);
    f32::from_bits(magnitude.to_bits() | u32::from(code & 0x80) << 24)
}

/// Unsigned scale with 4 exponent and 4 mantissa bits: `2^(base - 127) * 2^(code >> 4) * (1 + (code & 15) / 16)`, where
/// `base` is an f32 exponent field from the page header. Code 0 is zero. Rounds to nearest, saturates at both ends; a
/// positive scale never becomes zero.
#[inline]
pub fn scale_encode(x: f32, base: u8) -> u8 {
    if x <= 0.0 || x.is_nan() {
        return 0;
    }
    let rounded = (x.to_bits() + 0x4_0000) >> 19;
    (i64::from(rounded) - (i64::from(base) << 4)).clamp(1, 255) as u8
}

/// The value of a scale code.
#[inline]
pub fn scale_decode(code: u8, base: u8) -> f32 {
    if code == 0 {
        return 0.0;
    }
    f32::from_bits((u32::from(code) << 19) + (u32::from(base) << 23))
}

/// The `base` under which `max` is coded with two octaves of headroom above it and thirteen below.
#[inline]
pub fn scale_base(max: f32) -> u8 {
    let exponent = (max.to_bits() >> 23 & 0xff) as i32;
    // 239 + 15 is the largest exponent field of a finite f32.
    (exponent + 2 - 15).clamp(1, 239) as u8
}

/// An exponent field `e` such that `max * 2^(127 - e)` lies in `[32, 64)`: three octaves below E4M3's largest value.
#[inline]
pub fn e4m3_base(max: f32) -> u8 {
    let exponent = (max.to_bits() >> 23 & 0xff) as i32;
    (exponent - 5).clamp(1, 253) as u8
}

/// `2^(base - 127)`, what a code is multiplied with when it is read.
#[inline]
pub fn power(base: u8) -> f32 {
    f32::from_bits(u32::from(base) << 23)
}

/// `2^(127 - base)`, what a value is multiplied with before it is coded. A base of 255, which only damaged pages have, gives
/// 0, as 254 does.
#[inline]
pub fn inverse_power(base: u8) -> f32 {
    f32::from_bits(254u32.saturating_sub(u32::from(base)) << 23)
}

/// Largest exponent of a factor, either way.
pub(crate) const MAX_EXPONENT: i32 = 24;

/// `2^exponent`, also for exponents that no seal writes.
#[inline(always)]
pub(crate) fn factor(exponent: i32) -> f32 {
    f32::from_bits(((exponent.clamp(-MAX_EXPONENT, MAX_EXPONENT) + 127) as u32) << 23)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e4m3_codes_survive_and_neighbours_are_nearest() {
        for code in (0..=255u8).filter(|c| c & 0x7f != 0x7f) {
            let x = e4m3_decode(code);
            assert_eq!(e4m3_decode(e4m3_encode(x)), x, "{code}");
        }
        assert_eq!(e4m3_decode(0x7e), 448.0);
        assert_eq!(e4m3_decode(1), 2f32.powi(-9));
        for (x, want) in [(1.06, 1.0), (1.0626, 1.125), (1e9, 448.0), (-1e9, -448.0), (0.0009, 0.0), (-3.3, -3.25)] {
            assert_eq!(e4m3_decode(e4m3_encode(x)), want, "{x}");
        }
        assert_eq!(e4m3_encode(f32::NAN), 0);
    }

    #[test]
    fn scales_are_within_half_a_sixteenth() {
        for base in [1u8, 60, 112, 127, 239] {
            for code in 1..=255u8 {
                assert_eq!(scale_encode(scale_decode(code, base), base), code);
            }
        }
        let base = scale_base(3.7);
        for i in 1..1000 {
            let x = 3.7 * i as f32 / 1000.0;
            let error = (scale_decode(scale_encode(x, base), base) - x).abs() / x;
            assert!(error <= 1.0 / 32.0, "{x} {error}");
        }
        assert_eq!(scale_decode(scale_encode(0.0, base), base), 0.0);
        assert!(scale_decode(scale_encode(1e30, base), base) > 3.7);
    }
}
