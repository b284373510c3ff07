//! AVX2 byte dot products straight on the codes of a mixed tile.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::lanes_avx2::{lane_sums, quad};
use super::vector::MixedVector;
use super::{listed, MixedPage, MixedTile, Rounded, Segments, MAX_DEPTH, NMSE, SEGMENT, SEGMENT_QUADS};
use crate::codec::quantizer::NORMAL_LEVELS;
use crate::codec::query::{allowed, is_coarse, REST};
use crate::codec::tile::avx2::{add_quad, Sums, MAX_ROWS, STRIP};
use crate::codec::tile::vector::{Codes, Coefficients};
use crate::simd::avx2::{gather, load, load_bytes, prefetch_next, reduce_add, reduce_max, store};
use crate::simd::isa::Avx2;
use crate::simd::vector::{by_instructions, Vector};

/// Calls a kernel with the kind of levels and the number of rows as constants.
macro_rules! by_levels_and_rows {
    ($normal:expr, $rows:expr, $call:ident ( $($arg:expr),* )) => {
        match ($normal, $rows) {
            (false, 1) => $call::<false, 1>($($arg),*),
            (false, 2) => $call::<false, 2>($($arg),*),
            (false, 3) => $call::<false, 3>($($arg),*),
            (false, _) => $call::<false, 4>($($arg),*),
            (true, 1) => $call::<true, 1>($($arg),*),
            (true, 2) => $call::<true, 2>($($arg),*),
            (true, 3) => $call::<true, 3>($($arg),*),
            (true, _) => $call::<true, 4>($($arg),*),
        }
    };
}

impl MixedVector for Avx2 {
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
        unsafe { dot::<NORMAL, R>(tile, segments, codes.bytes, strip, coefficients) }
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
    fn permute<const B: usize>(self, x: &[f32], index: __m256i) -> __m256 {
        self.gather(x, index)
    }

    by_instructions! {
        fn add_products(page: &MixedPage, x: &[f32], out: &mut [f32], stride: usize) = {
            add_products(page, x, out, stride)
        };
    }
}

/// [`MixedPage::add_products`] on the codes as they are, with coefficients rounded to int8.
#[target_feature(enable = "avx2,fma")]
fn add_products(page: &MixedPage, x: &[f32], out: &mut [f32], stride: usize) {
    let depth = page.factors.len();
    for (group, x) in x.chunks(MAX_ROWS * depth).enumerate() {
        let out = &mut out[group * MAX_ROWS * stride..];
        let n = x.len() / depth;
        let coarse = by_levels_and_rows!(page.normal, n, add_rows(page, x, out, stride, group == 0));
        let (rows, n) = listed(&coarse[..n]);
        if n > 0 {
            by_levels_and_rows!(page.normal, n, add_rest(page, x, &rows, out, stride));
        }
    }
}

/// Adds the products of `R` rows and gives which of them are coarse.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn add_rows<const NORMAL: bool, const R: usize>(
    page: &MixedPage,
    x: &[f32],
    out: &mut [f32],
    stride: usize,
    prefetch: bool,
) -> [bool; MAX_ROWS] {
    add::<NORMAL, R, false>(page, x, &std::array::from_fn(|row| row), out, stride, prefetch)
}

/// Adds what rounding left of the `R` coarse rows `rows`.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn add_rest<const NORMAL: bool, const R: usize>(
    page: &MixedPage,
    x: &[f32],
    rows: &[usize; MAX_ROWS],
    out: &mut [f32],
    stride: usize,
) {
    add::<NORMAL, R, true>(page, x, rows, out, stride, false);
}

/// Adds the products of the rows `rows[..R]` of `x`, or of what rounding left of them, to the same rows of `out`.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn add<const NORMAL: bool, const R: usize, const IS_REST: bool>(
    page: &MixedPage,
    x: &[f32],
    rows: &[usize; MAX_ROWS],
    out: &mut [f32],
    stride: usize,
    prefetch: bool,
) -> [bool; MAX_ROWS] {
    let depth = page.factors.len();
    let mut int8 = [0i8; MAX_ROWS * MAX_DEPTH];
    let mut scale = [_mm256_setzero_ps(); R];
    let mut offset = [_mm256_setzero_ps(); R];
    let mut coarse = [false; MAX_ROWS];
    for i in 0..R {
        let rounded = round::<IS_REST>(page, &x[rows[i] * depth..][..depth], &mut int8[i * depth..][..depth]);
        (scale[i], offset[i]) = (_mm256_set1_ps(rounded.unit), _mm256_set1_ps(rounded.offset));
        coarse[i] = rounded.is_coarse;
    }
    let strips = page.tile.lanes / STRIP;
    for strip in 0..strips {
        if prefetch {
            prefetch_next::<_MM_HINT_T0>(page.codes, page.page_bytes, strip, strips);
        }
        let coefficients = Coefficients { bytes: &int8[..R * depth], stride: depth };
        let sums = dot::<NORMAL, R>(page.tile, &page.segments, page.codes, strip, coefficients);
        for row in 0..R {
            for half in 0..2 {
                let at = rows[row] * stride + strip * STRIP + half * 8;
                let sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[row][half]), scale[row], offset[row]);
                store(out, at, _mm256_add_ps(load(out, at), sum));
            }
        }
    }
    coarse
}

/// Puts a row of coefficients times the factors in the order of the depth and rounds it, or what rounding leaves of it, to
/// int8.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn round<const IS_REST: bool>(page: &MixedPage, x: &[f32], int8: &mut [i8]) -> Rounded {
    let depth = page.factors.len();
    assert!(x.len() == depth && int8.len() == depth && (page.order.is_empty() || page.order.len() == depth));
    let mut scaled = [0f32; MAX_DEPTH];
    let (mut max, mut mid) = (_mm256_setzero_ps(), _mm256_setzero_ps());
    for d in (0..depth).step_by(8) {
        let x = if page.order.is_empty() { load(x, d) } else { gather(x, load_bytes(page.order, d)) };
        if !page.mids.is_empty() {
            mid = _mm256_fmadd_ps(x, load(page.mids, d), mid);
        }
        let product = _mm256_mul_ps(x, load(page.factors, d));
        max = _mm256_max_ps(max, _mm256_andnot_ps(_mm256_set1_ps(-0.0), product));
        store(&mut scaled, d, product);
    }
    let max = reduce_max(max);
    if max == 0.0 || !max.is_finite() {
        int8.fill(0);
        return Rounded { unit: 0.0, offset: if IS_REST { 0.0 } else { reduce_add(mid) }, is_coarse: false };
    }
    let inverse = _mm256_set1_ps(127.0 / max);
    let allowed = _mm256_set1_ps(-allowed(NMSE));
    let mut centres = _mm256_setzero_si256();
    let (mut sum, mut lost, mut excess) = (_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps());
    for d in (0..depth).step_by(SEGMENT) {
        let x = [d, d + 8].map(|d| _mm256_mul_ps(load(&scaled, d), inverse));
        let mut n = x.map(|x| _mm256_cvtps_epi32(x));
        if page.weights {
            let spread = _mm256_set1_ps(page.spread(d / SEGMENT));
            for i in 0..2 {
                let error = _mm256_sub_ps(x[i], _mm256_cvtepi32_ps(n[i]));
                let (weight, by_spread) = (_mm256_mul_ps(x[i], spread), _mm256_mul_ps(error, spread));
                (sum, lost) = (_mm256_add_ps(sum, weight), _mm256_add_ps(lost, by_spread));
                excess = _mm256_fmadd_ps(_mm256_mul_ps(weight, weight), allowed, excess);
                excess = _mm256_fmadd_ps(by_spread, by_spread, excess);
                if IS_REST {
                    n[i] = _mm256_cvtps_epi32(_mm256_mul_ps(error, _mm256_set1_ps(REST)));
                }
            }
        }
        let twice = _mm256_set1_epi32(page.twice_centre(page.segments.bits(d / SEGMENT)));
        centres = _mm256_add_epi32(centres, _mm256_mullo_epi32(_mm256_add_epi32(n[0], n[1]), twice));
        let n = _mm256_permute4x64_epi64::<0xd8>(_mm256_packs_epi32(n[0], n[1]));
        let n = _mm_packs_epi16(_mm256_castsi256_si128(n), _mm256_extracti128_si256::<1>(n));
        let to = &mut int8[d..d + SEGMENT];
        // SAFETY: the slice holds sixteen bytes.
        unsafe { _mm_storeu_si128(to.as_mut_ptr().cast(), n) };
    }
    let unit = if IS_REST { max / (127.0 * REST) } else { max / 127.0 };
    let of_centres = -0.5 * unit * reduce_add(_mm256_cvtepi32_ps(centres));
    Rounded {
        unit,
        offset: if IS_REST { of_centres } else { reduce_add(mid) + of_centres },
        is_coarse: page.weights && is_coarse(NMSE, reduce_add(lost), reduce_add(sum), reduce_add(excess)),
    }
}

/// Quads whose products are added in 16 bits before they are widened: `2 * 127 * 15` each, or `2 * 127 * 126`.
const fn flush(normal: bool) -> usize {
    if normal {
        1
    } else {
        2 * SEGMENT_QUADS
    }
}

/// Dot products of the lanes of strip `strip` with `R` coefficient rows, which are in the order of the depth.
#[inline]
#[target_feature(enable = "avx2")]
fn dot<const NORMAL: bool, const R: usize>(
    tile: &MixedTile,
    segments: &Segments,
    bytes: &[u8],
    strip: usize,
    coefficients: Coefficients,
) -> Sums<R> {
    let n = tile.n_segments();
    assert!(
        segments.0.iter().sum::<usize>() == n
            && (R - 1) * coefficients.stride + n * SEGMENT <= coefficients.bytes.len()
    );
    // Word `w` of the strip is at byte `128 * w`.
    let base = &bytes[strip / 2 * tile.block_bytes()..][..tile.block_bytes()][strip % 2 * 64..];
    let mut sums = [[_mm256_setzero_si256(); 2]; R];
    for first in (0..n * SEGMENT_QUADS).step_by(flush(NORMAL)) {
        let mut partial = [[_mm256_setzero_si256(); 2]; R];
        for at in first..(n * SEGMENT_QUADS).min(first + flush(NORMAL)) {
            let segment = at / SEGMENT_QUADS;
            let mut codes = quad(base, segments, segment, at % SEGMENT_QUADS);
            if NORMAL {
                codes = normal_levels(codes, segments.bits(segment));
            }
            // SAFETY: the quad belongs to one of the `n` segments, whose coefficients the assertion above covers.
            unsafe { add_quad(&mut partial, codes, coefficients, at) };
        }
        for (sum, partial) in sums.as_flattened_mut().iter_mut().zip(partial.as_flattened()) {
            *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(*partial, _mm256_set1_epi16(1)));
        }
    }
    sums
}

/// What codes of `bits` bits stand for in pages with normal levels.
#[inline]
#[target_feature(enable = "avx2")]
fn normal_levels(codes: [__m256i; 2], bits: usize) -> [__m256i; 2] {
    // SAFETY: a row of the table is sixteen bytes.
    let table = _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(NORMAL_LEVELS[bits].as_ptr().cast()) });
    codes.map(|codes| _mm256_shuffle_epi8(table, codes))
}
