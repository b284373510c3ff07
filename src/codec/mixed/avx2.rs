//! AVX2 byte dot products straight on the codes of a mixed tile, also with AVX-VNNI.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::lanes_avx2::lane_sums;
use super::vector::{MixedVector, MAX_ROWS, ROUNDED};
use super::{MixedPage, MixedTile, Rounded, Segments, MAX_BITS, MAX_DEPTH, NMSE, SEGMENT, SEGMENT_QUADS};
use crate::codec::quantizer::{NORMAL_CENTRE, NORMAL_LEVELS};
use crate::codec::query::{allowed, is_coarse, REST};
use crate::codec::tile::avx2::{add_quad, field, load_codes, with_high_bit, Sums};
use crate::codec::tile::vector::{Codes, Coefficients};
use crate::simd::avx2::{gather, load, load_bytes, pairs, prefetch_next, reduce_add, reduce_max, store, store_bytes};
use crate::simd::isa::Avx2;
use crate::simd::vector::Vector;

impl<const VNNI: bool> MixedVector for Avx2<VNNI> {
    #[inline(always)]
    fn mixed_dot<const NORMAL: bool, const R: usize>(
        self,
        tile: &MixedTile,
        segments: &Segments,
        codes: Codes,
        strip: usize,
        coefficients: Coefficients,
    ) -> Sums<R> {
        dot::<VNNI, NORMAL, R>(self, tile, segments, codes.bytes, strip, coefficients)
    }

    #[inline(always)]
    fn unpack_mixed<const NORMAL: bool>(self, _: &MixedTile, _: &Segments, _: Codes, _: usize, _: &mut [u8]) {
        unreachable!("no number of rows is worth it");
    }

    #[inline(always)]
    fn lane_sums<const R: usize>(
        self,
        tile: &MixedTile,
        segments: &Segments,
        codes: &[u8],
        weights: &[i8],
        out: &mut [f32],
        stride: usize,
    ) {
        lane_sums::<VNNI, R>(self, tile, segments, codes, weights, out, stride);
    }

    #[inline(always)]
    fn permute<const B: usize>(self, x: &[f32], index: __m256i) -> __m256 {
        self.gather(x, index)
    }

    #[inline(always)]
    fn round_rows<const R: usize, const IS_REST: bool>(
        self,
        page: &MixedPage,
        x: &[f32],
        rows: &[usize; MAX_ROWS],
        int8: &mut [i8],
    ) -> [Rounded; R] {
        let depth = page.factors.len();
        let (row_of, spans) = (depth.next_multiple_of(ROUNDED), Spans::of(page));
        let mut scaled = [0f32; MAX_DEPTH];
        let mut rounded = [Rounded { unit: 0.0, offset: 0.0, is_coarse: false }; R];
        for i in 0..R {
            let (x, int8) = (&x[rows[i] * depth..][..depth], &mut int8[i * row_of..][..depth]);
            // SAFETY: the token proves that the CPU has the instructions.
            rounded[i] = unsafe { round::<IS_REST>(page, &spans, x, &mut scaled, int8) };
        }
        rounded
    }

    #[inline(always)]
    fn ask_codes(self, page: &MixedPage, part: usize, parts: usize) {
        prefetch_next::<_MM_HINT_T0>(page.codes, page.page_bytes, part, parts);
    }
}

/// What a page says about the places of each segment.
struct Spans {
    /// Middle of what codes stand for.
    centre: [f32; MAX_DEPTH / SEGMENT],
    /// See [`MixedPage::spread`].
    spread: [f32; MAX_DEPTH / SEGMENT],
}

impl Spans {
    fn of(page: &MixedPage) -> Self {
        let mut spans = Spans { centre: [0.0; MAX_DEPTH / SEGMENT], spread: [0.0; MAX_DEPTH / SEGMENT] };
        for segment in 0..page.tile.n_segments() {
            spans.centre[segment] = 0.5 * page.twice_centre(page.segments.bits(segment)) as f32;
            spans.spread[segment] = page.spread(segment);
        }
        spans
    }
}

/// Puts a row of coefficients times the factors in the order of the depth and rounds it, or what rounding leaves of it, to
/// int8.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn round<const IS_REST: bool>(
    page: &MixedPage,
    spans: &Spans,
    x: &[f32],
    scaled: &mut [f32; MAX_DEPTH],
    int8: &mut [i8],
) -> Rounded {
    let depth = page.factors.len();
    assert!(x.len() == depth && depth.is_multiple_of(32) && (page.order.is_empty() || page.order.len() == depth));
    let (mut max, mut mid) = (_mm256_setzero_ps(), _mm256_setzero_ps());
    for d in (0..depth).step_by(8) {
        let x = if page.order.is_empty() { load(x, d) } else { gather(x, load_bytes(page.order, d)) };
        if !page.mids.is_empty() {
            mid = _mm256_fmadd_ps(x, load(page.mids, d), mid);
        }
        let product = _mm256_mul_ps(x, load(page.factors, d));
        max = _mm256_max_ps(max, _mm256_andnot_ps(_mm256_set1_ps(-0.0), product));
        store(scaled, d, product);
    }
    let max = reduce_max(max);
    if max == 0.0 || !max.is_finite() {
        int8.fill(0);
        return Rounded { unit: 0.0, offset: if IS_REST { 0.0 } else { reduce_add(mid) }, is_coarse: false };
    }
    let inverse = _mm256_set1_ps(127.0 / max);
    let allowed = _mm256_set1_ps(-allowed(NMSE));
    // Whole numbers and halves, of which floats hold the sums exactly.
    let mut centres = _mm256_setzero_ps();
    let (mut sum, mut lost, mut excess) = (_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps());
    for d in (0..depth).step_by(32) {
        let mut whole = [_mm256_setzero_si256(); 4];
        for i in 0..4 {
            let segment = d / SEGMENT + i / 2;
            let x = _mm256_mul_ps(load(scaled, d + 8 * i), inverse);
            whole[i] = _mm256_cvtps_epi32(x);
            if page.weights {
                let spread = _mm256_set1_ps(spans.spread[segment]);
                let error = _mm256_sub_ps(x, _mm256_cvtepi32_ps(whole[i]));
                let (weight, by_spread) = (_mm256_mul_ps(x, spread), _mm256_mul_ps(error, spread));
                (sum, lost) = (_mm256_add_ps(sum, weight), _mm256_add_ps(lost, by_spread));
                excess = _mm256_fmadd_ps(_mm256_mul_ps(weight, weight), allowed, excess);
                excess = _mm256_fmadd_ps(by_spread, by_spread, excess);
                if IS_REST {
                    whole[i] = _mm256_cvtps_epi32(_mm256_mul_ps(error, _mm256_set1_ps(REST)));
                }
            }
            centres = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole[i]), _mm256_set1_ps(spans.centre[segment]), centres);
        }
        let [a, b] = pairs(whole);
        store_bytes(int8, d, _mm256_packs_epi16(a, b));
    }
    let unit = if IS_REST { max / (127.0 * REST) } else { max / 127.0 };
    let of_centres = -unit * reduce_add(centres);
    Rounded {
        unit,
        offset: if IS_REST { of_centres } else { reduce_add(mid) + of_centres },
        is_coarse: page.weights && is_coarse(NMSE, reduce_add(lost), reduce_add(sum), reduce_add(excess)),
    }
}

/// Most that products of a segment of codes of `bits` bits with int8 coefficients add to a sum of 16 bits: two in each quad.
const fn most(bits: usize) -> i16 {
    (SEGMENT_QUADS * 2 * 127 * ((1 << bits) - 1)) as i16
}

// What `dot` takes for granted: a segment of any width fits, and normal levels leave room for a quad of their own.
const _: () = assert!(SEGMENT_QUADS * 2 * 127 * ((1 << MAX_BITS) - 1) <= i16::MAX as usize);
const _: () = assert!(2 * 127 * (2 * NORMAL_CENTRE as usize) <= i16::MAX as usize);

/// Sums of 32 bits and, without VNNI, those of 16 bits that come before.
struct Totals<const R: usize> {
    wide: Sums<R>,
    narrow: Sums<R>,
    /// What may still be added to each of the latter.
    room: i16,
}

/// Adds sums of 16 bits to those of 32.
#[inline(always)]
fn flush<const VNNI: bool, const R: usize>(v: Avx2<VNNI>, sums: &mut Totals<R>) {
    for (wide, narrow) in sums.wide.as_flattened_mut().iter_mut().zip(sums.narrow.as_flattened_mut()) {
        *wide = v.add_i32(*wide, v.widen(*narrow));
        *narrow = v.splat_i32(0);
    }
    sums.room = i16::MAX;
}

/// Adds the products of one unpacked quad of codes of `bits` bits.
///
/// # Safety
///
/// As [`add_quad`].
#[inline(always)]
unsafe fn add_levels<const VNNI: bool, const NORMAL: bool, const R: usize>(
    v: Avx2<VNNI>,
    sums: &mut Totals<R>,
    codes: [__m256i; 2],
    bits: usize,
    coefficients: Coefficients,
    quad: usize,
) {
    // SAFETY: by this function's contract.
    unsafe {
        let codes = if NORMAL { normal_levels(codes, bits) } else { codes };
        add_quad(v, &mut sums.narrow, codes, coefficients, quad);
    }
    if NORMAL && !VNNI {
        flush(v, sums);
    }
}

/// Dot products of the lanes of strip `strip` with `R` coefficient rows, which are in the order of the depth.
#[inline(always)]
fn dot<const VNNI: bool, const NORMAL: bool, const R: usize>(
    v: Avx2<VNNI>,
    tile: &MixedTile,
    segments: &Segments,
    bytes: &[u8],
    strip: usize,
    coefficients: Coefficients,
) -> Sums<R> {
    let [four, three, two, one] = segments.0;
    let n = four + three + two + one;
    assert!(n == tile.n_segments() && (R - 1) * coefficients.stride + n * SEGMENT <= coefficients.bytes.len());
    // Word `w` of the strip is at byte `128 * w`.
    let base = &bytes[strip / 2 * tile.block_bytes()..][..tile.block_bytes()][strip % 2 * 64..];
    let plane = 2 * four + three + two;
    let mut sums = Totals { wide: v.no_sums(), narrow: v.no_sums(), room: i16::MAX };
    for segment in 0..n {
        let bits = segments.bits(segment);
        if !VNNI && !NORMAL {
            if sums.room < most(bits) {
                flush(v, &mut sums);
            }
            sums.room -= most(bits);
        }
        let quad = segment * SEGMENT_QUADS;
        // SAFETY: the segment is one of `n`, whose coefficients the assertion above covers.
        unsafe {
            match bits {
                4 => {
                    for half in 0..2 {
                        let words = load_codes(base, (2 * segment + half) * 128);
                        for f in 0..2 {
                            let codes = field(words, f, 4);
                            add_levels::<VNNI, NORMAL, R>(v, &mut sums, codes, 4, coefficients, quad + 2 * half + f);
                        }
                    }
                }
                3 => {
                    let low = load_codes(base, (four + segment) * 128);
                    let high = single_bits(base, plane, segment - four);
                    for f in 0..SEGMENT_QUADS {
                        let codes = with_high_bit(field(low, f, 2), high, f);
                        add_levels::<VNNI, NORMAL, R>(v, &mut sums, codes, 3, coefficients, quad + f);
                    }
                }
                2 => {
                    let words = load_codes(base, (four + segment) * 128);
                    for f in 0..SEGMENT_QUADS {
                        add_levels::<VNNI, NORMAL, R>(v, &mut sums, field(words, f, 2), 2, coefficients, quad + f);
                    }
                }
                _ => {
                    let words = single_bits(base, plane, segment - four - two);
                    for f in 0..SEGMENT_QUADS {
                        add_levels::<VNNI, NORMAL, R>(v, &mut sums, field(words, f, 1), 1, coefficients, quad + f);
                    }
                }
            }
        }
    }
    flush(v, &mut sums);
    sums.wide
}

/// The bits of segment `odd` of those with an odd width, from bit 0 of every byte on.
#[inline]
#[target_feature(enable = "avx2")]
fn single_bits(base: &[u8], plane: usize, odd: usize) -> [__m256i; 2] {
    let count = _mm_cvtsi32_si128((odd % 2 * SEGMENT_QUADS) as i32);
    load_codes(base, (plane + odd / 2) * 128).map(|words| _mm256_srl_epi16(words, count))
}

/// What codes of `bits` bits stand for in pages with normal levels.
#[inline]
#[target_feature(enable = "avx2")]
fn normal_levels(codes: [__m256i; 2], bits: usize) -> [__m256i; 2] {
    // SAFETY: a row of the table is sixteen bytes.
    let table = _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(NORMAL_LEVELS[bits].as_ptr().cast()) });
    codes.map(|codes| _mm256_shuffle_epi8(table, codes))
}
