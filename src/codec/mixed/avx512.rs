//! AVX-512 (VNNI) byte dot products straight on the codes of a mixed tile.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::lanes_avx512::lane_sums;
use super::vector::{MixedVector, MAX_ROWS, ROUNDED};
use super::{MixedPage, MixedTile, Rounded, Segments, MAX_DEPTH, NMSE, SEGMENT, SEGMENT_QUADS};
use crate::codec::quantizer::NORMAL_LEVELS;
use crate::codec::query::{allowed, is_coarse, REST};
use crate::codec::tile::avx512::{add_quad, field, store_quad, Sums};
use crate::codec::tile::vector::{Codes, Coefficients};
use crate::codec::tile::LANE_BLOCK;
use crate::simd::avx512::{load, load_bytes, pack_bytes, store_bytes};
use crate::simd::isa::Avx512;
use crate::simd::vector::by_instructions;

impl MixedVector for Avx512 {
    #[inline(always)]
    fn mixed_dot<const NORMAL: bool, const R: usize>(
        self,
        tile: &MixedTile,
        segments: &Segments,
        codes: Codes,
        strip: usize,
        coefficients: Coefficients,
    ) -> Sums<R> {
        // SAFETY: the token proves that the CPU has the instructions.
        unsafe { dot::<NORMAL, R>(tile, segments, codes, strip, coefficients) }
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
        // SAFETY: the token proves that the CPU has the instructions.
        unsafe { lane_sums::<R>(tile, segments, codes, weights, out, stride) }
    }

    #[inline(always)]
    fn ask_codes(self, _page: &MixedPage, _part: usize, _parts: usize) {}

    by_instructions! {
        fn unpack_mixed<const NORMAL: bool>(
            tile: &MixedTile, segments: &Segments, codes: Codes, strip: usize, out: &mut [u8]
        ) = unpack::<NORMAL>(tile, segments, codes, strip, out);
        fn permute<const B: usize>(x: &[f32], index: __m512i) -> __m512 = permute::<B>(x, index);
        fn round_rows<const R: usize, const IS_REST: bool>(
            page: &MixedPage, x: &[f32], rows: &[usize; MAX_ROWS], int8: &mut [i8]
        ) -> [Rounded; R] = round_rows::<R, IS_REST>(page, x, rows, int8);
    }
}

/// [`MixedVector::round_rows`]
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn round_rows<const R: usize, const IS_REST: bool>(
    page: &MixedPage,
    x: &[f32],
    rows: &[usize; MAX_ROWS],
    int8: &mut [i8],
) -> [Rounded; R] {
    let depth = page.factors.len();
    assert!(page.order.is_empty() || page.order.len() == depth);
    // Twice the centre of every place, in bytes as the codes are.
    let twice_centre: [__m512i; MAX_DEPTH / ROUNDED] = std::array::from_fn(|i| {
        let of_segment = |s: usize| page.twice_centre(page.segments.bits(i * (ROUNDED / SEGMENT) + s)) * 0x0101_0101;
        let [a, b, c, d] = [0, 1, 2, 3].map(of_segment);
        _mm512_setr_epi32(a, a, a, a, b, b, b, b, c, c, c, c, d, d, d, d)
    });
    std::array::from_fn(|i| {
        let x = &x[rows[i] * depth..][..depth];
        let int8 = &mut int8[i * depth.next_multiple_of(ROUNDED)..][..depth.next_multiple_of(ROUNDED)];
        match depth / 32 {
            1 => round::<1, IS_REST>(page, x, &twice_centre, int8),
            2 => round::<2, IS_REST>(page, x, &twice_centre, int8),
            3 => round::<3, IS_REST>(page, x, &twice_centre, int8),
            4 => round::<4, IS_REST>(page, x, &twice_centre, int8),
            5 => round::<5, IS_REST>(page, x, &twice_centre, int8),
            6 => round::<6, IS_REST>(page, x, &twice_centre, int8),
            7 => round::<7, IS_REST>(page, x, &twice_centre, int8),
            _ => round::<8, IS_REST>(page, x, &twice_centre, int8),
        }
    })
}

/// One row of `32 * B` coefficients.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn round<const B: usize, const IS_REST: bool>(
    page: &MixedPage,
    x: &[f32],
    twice_centre: &[__m512i; MAX_DEPTH / ROUNDED],
    int8: &mut [i8],
) -> Rounded {
    let (x, factors) = (&x[..32 * B], &page.factors[..32 * B]);
    let mut scaled = [_mm512_setzero_ps(); MAX_DEPTH / 16];
    let (mut max, mut mid) = (_mm512_setzero_ps(), _mm512_setzero_ps());
    for i in 0..2 * B {
        let d = 16 * i;
        let x = if page.order.is_empty() { load(x, d) } else { permute::<B>(x, load_bytes(page.order, d)) };
        if !page.mids.is_empty() {
            mid = _mm512_fmadd_ps(x, load(page.mids, d), mid);
        }
        scaled[i] = _mm512_mul_ps(x, load(factors, d));
        max = _mm512_max_ps(max, _mm512_abs_ps(scaled[i]));
    }
    let max = _mm512_reduce_max_ps(max);
    let unit = if max.is_finite() { max / 127.0 } else { 0.0 };
    let inverse = _mm512_set1_ps(if unit > 0.0 { 127.0 / max } else { 0.0 });
    let unit = if IS_REST { unit / REST } else { unit };
    let allowed = _mm512_set1_ps(-allowed(NMSE));
    let mut centres = _mm512_setzero_si512();
    let (mut sum, mut lost, mut excess) = (_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps());
    for i in 0..B.div_ceil(2) {
        let x = [0, 1, 2, 3].map(|v| _mm512_mul_ps(scaled[4 * i + v], inverse));
        let mut n = x.map(|x| _mm512_cvtps_epi32(x));
        if page.weights {
            for v in 0..4 {
                let spread = _mm512_set1_ps(page.spread(4 * i + v));
                let error = _mm512_sub_ps(x[v], _mm512_cvtepi32_ps(n[v]));
                let (weight, by_spread) = (_mm512_mul_ps(x[v], spread), _mm512_mul_ps(error, spread));
                (sum, lost) = (_mm512_add_ps(sum, weight), _mm512_add_ps(lost, by_spread));
                excess = _mm512_fmadd_ps(_mm512_mul_ps(weight, weight), allowed, excess);
                excess = _mm512_fmadd_ps(by_spread, by_spread, excess);
                if IS_REST {
                    n[v] = _mm512_cvtps_epi32(_mm512_mul_ps(error, _mm512_set1_ps(REST)));
                }
            }
        }
        let n = pack_bytes(n);
        centres = _mm512_dpbusd_epi32(centres, twice_centre[i], n);
        store_bytes(int8, i * ROUNDED, n);
    }
    let of_centres = -0.5 * unit * _mm512_reduce_add_epi32(centres) as f32;
    let [sum, lost, excess] = [sum, lost, excess].map(|x| _mm512_reduce_add_ps(x));
    Rounded {
        unit,
        offset: if IS_REST { of_centres } else { _mm512_reduce_add_ps(mid) + of_centres },
        is_coarse: page.weights && is_coarse(NMSE, lost, sum, excess),
    }
}

/// Sixteen entries of a row of `32 * B`; any value for an index beyond it.
#[inline]
#[target_feature(enable = "avx512f")]
fn permute<const B: usize>(x: &[f32], index: __m512i) -> __m512 {
    let x = &x[..32 * B];
    let block = _mm512_srli_epi32::<5>(index);
    let mut found = _mm512_permutex2var_ps(load(x, 0), index, load(x, 16));
    for i in 1..B {
        let here = _mm512_cmpeq_epi32_mask(block, _mm512_set1_epi32(i as i32));
        let entries = _mm512_permutex2var_ps(load(x, 32 * i), index, load(x, 32 * i + 16));
        found = _mm512_mask_mov_ps(found, here, entries);
    }
    found
}

/// What codes of `bits` bits stand for in pages with normal levels.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn normal_levels(codes: [__m512i; 2], bits: usize) -> [__m512i; 2] {
    // SAFETY: a row of the table is sixteen bytes.
    let table = _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(NORMAL_LEVELS[bits].as_ptr().cast()) });
    codes.map(|codes| _mm512_shuffle_epi8(table, codes))
}

/// Dot products of the lanes of block `block` with `R` coefficient rows, which are in the order of the depth.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn dot<const NORMAL: bool, const R: usize>(
    tile: &MixedTile,
    segments: &Segments,
    codes: Codes,
    block: usize,
    coefficients: Coefficients,
) -> Sums<R> {
    let n = segments.0.iter().sum::<usize>();
    assert!(n == tile.n_segments() && (R - 1) * coefficients.stride + n * SEGMENT <= coefficients.bytes.len());
    let base = codes.part(block * tile.block_bytes(), tile.block_bytes());
    let mut sums = [[_mm512_setzero_si512(); 2]; R];
    each_quad::<NORMAL>(segments, base, |quad, codes| {
        // SAFETY: the quad belongs to one of the `n` segments, whose coefficients the assertion above covers.
        unsafe { add_quad(&mut sums, codes, coefficients, quad) }
    });
    sums
}

/// [`MixedVector::unpack_mixed`]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn unpack<const NORMAL: bool>(tile: &MixedTile, segments: &Segments, codes: Codes, strip: usize, out: &mut [u8]) {
    assert!(segments.0.iter().sum::<usize>() == tile.n_segments());
    let out = &mut out[..tile.depth * LANE_BLOCK];
    let base = codes.part(strip * tile.block_bytes(), tile.block_bytes());
    each_quad::<NORMAL>(segments, base, |quad, codes| store_quad(out, quad, codes));
}

/// Calls `f(quad, codes)` for every quad of the lanes of a block, unpacked.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn each_quad<const NORMAL: bool>(segments: &Segments, base: Codes, mut f: impl FnMut(usize, [__m512i; 2])) {
    let [four, three, two, one] = segments.0;
    let (mask4, mask2, mask1) = (_mm512_set1_epi8(15), _mm512_set1_epi8(3), _mm512_set1_epi8(1));
    let bit2 = _mm512_set1_epi8(4);
    let plane = 2 * four + three + two;
    let levels = |codes, bits: usize| if NORMAL { normal_levels(codes, bits) } else { codes };
    for word in 0..2 * four {
        let words = base.load(word * 128);
        for i in 0..2 {
            f(word * 2 + i, levels(field(words, i, mask4, 4), 4));
        }
    }
    for i in 0..three {
        let low = base.load((2 * four + i) * 128);
        let high = base.load((plane + i / 2) * 128);
        for quad in 0..SEGMENT_QUADS {
            let (low, bit) = (field(low, quad, mask2, 2), i % 2 * SEGMENT_QUADS + quad);
            let codes = std::array::from_fn(|half| {
                // Bring the bit to the place worth 4.
                let moved = if bit < 2 {
                    _mm512_sll_epi16(high[half], _mm_cvtsi32_si128(2 - bit as i32))
                } else {
                    _mm512_srl_epi16(high[half], _mm_cvtsi32_si128(bit as i32 - 2))
                };
                _mm512_ternarylogic_epi32::<0xea>(moved, bit2, low[half])
            });
            f((four + i) * SEGMENT_QUADS + quad, levels(codes, 3));
        }
    }
    for segment in four + three..four + three + two {
        let words = base.load((four + segment) * 128);
        for quad in 0..SEGMENT_QUADS {
            f(segment * SEGMENT_QUADS + quad, levels(field(words, quad, mask2, 2), 2));
        }
    }
    for i in 0..one {
        let (odd, segment) = (three + i, four + three + two + i);
        let words = base.load((plane + odd / 2) * 128);
        for quad in 0..SEGMENT_QUADS {
            let codes = field(words, odd % 2 * SEGMENT_QUADS + quad, mask1, 1);
            f(segment * SEGMENT_QUADS + quad, levels(codes, 1));
        }
    }
}
