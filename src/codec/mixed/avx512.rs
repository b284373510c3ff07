//! AVX-512 (VNNI) byte dot products straight on the codes of a mixed tile.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::{MixedPage, MixedTile, Segments, SEGMENT, SEGMENT_QUADS};
use crate::codec::quantizer::NORMAL_LEVELS;
use crate::codec::tile::avx512::{add_quad, field, load_codes, Coefficients, Sums, MAX_ROWS};
use crate::codec::tile::LANE_BLOCK;
use crate::simd::avx2::prefetch_next;
use crate::simd::avx512::{load, store};

/// Largest depth: channels of a head or tokens of a page.
const MAX_DEPTH: usize = 256;

/// [`MixedPage::add_products`] on the codes as they are, with coefficients rounded to int8.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(crate) fn add_products(page: &MixedPage, x: &[f32], out: &mut [f32], stride: usize) {
    let depth = page.factors.len();
    for (group, x) in x.chunks(MAX_ROWS * depth).enumerate() {
        let out = &mut out[group * MAX_ROWS * stride..];
        match (page.normal, x.len() / depth) {
            (false, 1) => add_rows::<false, 1>(page, x, out, stride, group == 0),
            (false, 2) => add_rows::<false, 2>(page, x, out, stride, group == 0),
            (false, 3) => add_rows::<false, 3>(page, x, out, stride, group == 0),
            (false, 4) => add_rows::<false, 4>(page, x, out, stride, group == 0),
            (false, 5) => add_rows::<false, 5>(page, x, out, stride, group == 0),
            (false, 6) => add_rows::<false, 6>(page, x, out, stride, group == 0),
            (false, 7) => add_rows::<false, 7>(page, x, out, stride, group == 0),
            (false, _) => add_rows::<false, 8>(page, x, out, stride, group == 0),
            (true, 1) => add_rows::<true, 1>(page, x, out, stride, group == 0),
            (true, 2) => add_rows::<true, 2>(page, x, out, stride, group == 0),
            (true, 3) => add_rows::<true, 3>(page, x, out, stride, group == 0),
            (true, 4) => add_rows::<true, 4>(page, x, out, stride, group == 0),
            (true, 5) => add_rows::<true, 5>(page, x, out, stride, group == 0),
            (true, 6) => add_rows::<true, 6>(page, x, out, stride, group == 0),
            (true, 7) => add_rows::<true, 7>(page, x, out, stride, group == 0),
            (true, _) => add_rows::<true, 8>(page, x, out, stride, group == 0),
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn add_rows<const NORMAL: bool, const R: usize>(
    page: &MixedPage,
    x: &[f32],
    out: &mut [f32],
    stride: usize,
    prefetch: bool,
) {
    let depth = page.factors.len();
    let mut int8 = [0i8; MAX_ROWS * MAX_DEPTH];
    let mut scale = [_mm512_setzero_ps(); R];
    let mut offset = [_mm512_setzero_ps(); R];
    for row in 0..R {
        let (s, o) = round(page, &x[row * depth..][..depth], &mut int8[row * depth..][..depth]);
        (scale[row], offset[row]) = (_mm512_set1_ps(s), _mm512_set1_ps(o));
    }
    let blocks = page.tile.lanes / LANE_BLOCK;
    for block in 0..blocks {
        if prefetch {
            prefetch_next(page.codes, block, blocks);
        }
        let coefficients = Coefficients { int8: &int8[..R * depth], stride: depth };
        let sums = dot::<NORMAL, R>(page.tile, &page.segments, page.codes, block, coefficients);
        for row in 0..R {
            for half in 0..2 {
                let at = row * stride + block * LANE_BLOCK + half * 16;
                let sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[row][half]), scale[row], offset[row]);
                store(out, at, _mm512_add_ps(load(out, at), sum));
            }
        }
    }
}

/// Puts a row of coefficients times the factors in the order of the depth and rounds it to int8. Gives the unit and what
/// the codes' centres and the mid-points add to every lane.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn round(page: &MixedPage, x: &[f32], int8: &mut [i8]) -> (f32, f32) {
    let depth = page.factors.len();
    assert!(x.len() == depth && int8.len() == depth && (page.order.is_empty() || page.order.len() == depth));
    let mut scaled = [0f32; MAX_DEPTH];
    let (mut max, mut mid) = (_mm512_setzero_ps(), _mm512_setzero_ps());
    for d in (0..depth).step_by(16) {
        let x = if page.order.is_empty() { load(x, d) } else { gather(x, &page.order[d..d + 16]) };
        if !page.mids.is_empty() {
            mid = _mm512_fmadd_ps(x, load(page.mids, d), mid);
        }
        let product = _mm512_mul_ps(x, load(page.factors, d));
        max = _mm512_max_ps(max, _mm512_abs_ps(product));
        store(&mut scaled, d, product);
    }
    let max = _mm512_reduce_max_ps(max);
    if max == 0.0 || !max.is_finite() {
        int8.fill(0);
        return (0.0, _mm512_reduce_add_ps(mid));
    }
    let inverse = _mm512_set1_ps(127.0 / max);
    let mut centres = _mm512_setzero_si512();
    for d in (0..depth).step_by(SEGMENT) {
        let n = _mm512_cvtps_epi32(_mm512_mul_ps(load(&scaled, d), inverse));
        let twice = _mm512_set1_epi32(page.twice_centre(page.segments.bits(d / SEGMENT)));
        centres = _mm512_add_epi32(centres, _mm512_mullo_epi32(n, twice));
        let to = &mut int8[d..d + SEGMENT];
        // SAFETY: the slice holds sixteen bytes.
        unsafe { _mm_storeu_si128(to.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(n)) };
    }
    let scale = max / 127.0;
    (scale, _mm512_reduce_add_ps(mid) - 0.5 * scale * _mm512_reduce_add_epi32(centres) as f32)
}

/// Sixteen entries of a row.
#[inline]
#[target_feature(enable = "avx512f")]
fn gather(x: &[f32], order: &[u8]) -> __m512 {
    let order = &order[..16];
    // SAFETY: the slice holds sixteen bytes.
    let index = _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(order.as_ptr().cast()) });
    let index = _mm512_min_epu32(index, _mm512_set1_epi32(x.len() as i32 - 1));
    // SAFETY: every index is below the length of `x`.
    unsafe { _mm512_i32gather_ps::<4>(index, x.as_ptr()) }
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
    bytes: &[u8],
    block: usize,
    coefficients: Coefficients,
) -> Sums<R> {
    let [four, three, two, one] = segments.0;
    let n = four + three + two + one;
    assert!(n == tile.n_segments() && (R - 1) * coefficients.stride + n * SEGMENT <= coefficients.int8.len());
    let base = &bytes[block * tile.block_bytes()..][..tile.block_bytes()];
    let mut sums = [[_mm512_setzero_si512(); 2]; R];
    let (mask4, mask2, mask1) = (_mm512_set1_epi8(15), _mm512_set1_epi8(3), _mm512_set1_epi8(1));
    let bit2 = _mm512_set1_epi8(4);
    let plane = 2 * four + three + two;
    let levels = |codes, bits: usize| if NORMAL { normal_levels(codes, bits) } else { codes };
    // SAFETY: every quad below belongs to one of the `n` segments, whose coefficients the assertion above covers.
    unsafe {
        for word in 0..2 * four {
            let words = load_codes(base, word * 128);
            for f in 0..2 {
                add_quad(&mut sums, levels(field(words, f, mask4, 4), 4), coefficients, word * 2 + f);
            }
        }
        for i in 0..three {
            let low = load_codes(base, (2 * four + i) * 128);
            let high = load_codes(base, (plane + i / 2) * 128);
            for f in 0..SEGMENT_QUADS {
                let (low, bit) = (field(low, f, mask2, 2), i % 2 * SEGMENT_QUADS + f);
                let codes = std::array::from_fn(|half| {
                    // Bring the bit to the place worth 4.
                    let moved = if bit < 2 {
                        _mm512_sll_epi16(high[half], _mm_cvtsi32_si128(2 - bit as i32))
                    } else {
                        _mm512_srl_epi16(high[half], _mm_cvtsi32_si128(bit as i32 - 2))
                    };
                    _mm512_ternarylogic_epi32::<0xea>(moved, bit2, low[half])
                });
                add_quad(&mut sums, levels(codes, 3), coefficients, (four + i) * SEGMENT_QUADS + f);
            }
        }
        for segment in four + three..four + three + two {
            let words = load_codes(base, (four + segment) * 128);
            for f in 0..SEGMENT_QUADS {
                let codes = levels(field(words, f, mask2, 2), 2);
                add_quad(&mut sums, codes, coefficients, segment * SEGMENT_QUADS + f);
            }
        }
        for i in 0..one {
            let (odd, segment) = (three + i, four + three + two + i);
            let words = load_codes(base, (plane + odd / 2) * 128);
            for f in 0..SEGMENT_QUADS {
                let codes = field(words, odd % 2 * SEGMENT_QUADS + f, mask1, 1);
                add_quad(&mut sums, levels(codes, 1), coefficients, segment * SEGMENT_QUADS + f);
            }
        }
    }
    sums
}
