//! Sums over the lanes of a mixed tile with AVX-512 (VNNI).
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::{MixedTile, Segments, SEGMENT, SEGMENT_QUADS};
use crate::codec::page::MAX_PAGE;
use crate::simd::avx512::store;

/// Lanes of a vector.
const LANES: usize = 16;

/// [`MixedVector::lane_sums`]
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn lane_sums<const R: usize>(
    tile: &MixedTile,
    segments: &Segments,
    codes: &[u8],
    weights: &[i8],
    out: &mut [f32],
    stride: usize,
) {
    let lanes = tile.lanes;
    assert!(weights.len() == R * lanes && lanes <= MAX_PAGE);
    // Of each sixteen lanes the weights of four in each lane of 128 bits, four times.
    let spread = _mm512_setr_epi32(
        0x0302_0100,
        0x0302_0100,
        0x0302_0100,
        0x0302_0100,
        0x0706_0504,
        0x0706_0504,
        0x0706_0504,
        0x0706_0504,
        0x0b0a_0908,
        0x0b0a_0908,
        0x0b0a_0908,
        0x0b0a_0908,
        0x0f0e_0d0c,
        0x0f0e_0d0c,
        0x0f0e_0d0c,
        0x0f0e_0d0c,
    );
    let mut spreads = [[_mm512_setzero_si512(); R]; MAX_PAGE / LANES];
    for (i, spreads) in spreads[..lanes / LANES].iter_mut().enumerate() {
        for (row, to) in spreads.iter_mut().enumerate() {
            let weights = &weights[row * lanes + i * LANES..][..LANES];
            // SAFETY: the slice holds sixteen bytes.
            let weights = _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(weights.as_ptr().cast()) });
            *to = _mm512_shuffle_epi8(weights, spread);
        }
    }
    let weights = &spreads[..lanes / LANES];
    for segment in 0..tile.n_segments() {
        let quads = match segments.bits(segment) {
            4 => segment_sums::<4, R>(tile, segments, codes, segment, weights),
            3 => segment_sums::<3, R>(tile, segments, codes, segment, weights),
            2 => segment_sums::<2, R>(tile, segments, codes, segment, weights),
            _ => segment_sums::<1, R>(tile, segments, codes, segment, weights),
        };
        for row in 0..R {
            let add = |a, b| _mm512_add_epi32(_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b));
            let [a, b, c, d] = [0, 1, 2, 3].map(|quad| quads[quad][row]);
            store(out, row * stride + segment * SEGMENT, _mm512_cvtepi32_ps(add(add(a, b), add(c, d))));
        }
    }
}

/// Sums over the lanes for the four quads of a segment of `BITS` bits: in each lane of 128 bits the sums of a quad over the lanes of
/// the tile that have their weights there.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn segment_sums<const BITS: usize, const R: usize>(
    tile: &MixedTile,
    segments: &Segments,
    codes: &[u8],
    segment: usize,
    weights: &[[__m512i; R]],
) -> [[__m512i; R]; SEGMENT_QUADS] {
    let [four, three, two, _] = segments.0;
    let plane = 2 * four + three + two;
    let odd = if BITS == 3 { segment - four } else { (segment + three).saturating_sub(four + three + two) };
    let (mask4, mask2, mask1) = (_mm512_set1_epi8(15), _mm512_set1_epi8(3), _mm512_set1_epi8(1));
    // Four tokens of one channel into a word, instead of four channels of one token.
    let transpose = _mm512_set4_epi32(0x0f0b_0703, 0x0e0a_0602, 0x0d09_0501, 0x0c08_0400);
    let mut sums = [[_mm512_setzero_si512(); R]; SEGMENT_QUADS];
    for (i, weights) in weights.iter().enumerate() {
        let block = &codes[i / 2 * tile.block_bytes()..][..tile.block_bytes()];
        let word = |word: usize| {
            let bytes = &block[word * 128 + i % 2 * 64..][..64];
            // SAFETY: the slice holds 64 bytes.
            _mm512_shuffle_epi8(unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }, transpose)
        };
        let twos = |w| {
            let shifted = [w, _mm512_srli_epi16::<2>(w), _mm512_srli_epi16::<4>(w), _mm512_srli_epi16::<6>(w)];
            shifted.map(|w| _mm512_and_si512(w, mask2))
        };
        let ones = || {
            let w = _mm512_srl_epi16(word(plane + odd / 2), _mm_cvtsi32_si128((odd % 2 * SEGMENT_QUADS) as i32));
            let shifted = [w, _mm512_srli_epi16::<1>(w), _mm512_srli_epi16::<2>(w), _mm512_srli_epi16::<3>(w)];
            shifted.map(|w| _mm512_and_si512(w, mask1))
        };
        let quads = match BITS {
            4 => {
                let words = [word(2 * segment), word(2 * segment + 1)];
                let [a, b] = words.map(|w| [w, _mm512_srli_epi16::<4>(w)].map(|w| _mm512_and_si512(w, mask4)));
                [a[0], a[1], b[0], b[1]]
            }
            3 => {
                let (low, high) = (twos(word(four + segment)), ones());
                std::array::from_fn(|f| _mm512_or_si512(low[f], _mm512_slli_epi16::<2>(high[f])))
            }
            2 => twos(word(four + segment)),
            _ => ones(),
        };
        for (sums, codes) in sums.iter_mut().zip(quads) {
            for row in 0..R {
                sums[row] = _mm512_dpbusd_epi32(sums[row], codes, weights[row]);
            }
        }
    }
    sums
}
