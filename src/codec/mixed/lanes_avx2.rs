//! Sums over the lanes of a mixed tile with AVX2.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::{MixedTile, Segments, SEGMENT_QUADS};
use crate::codec::page::MAX_PAGE;
use crate::codec::tile::avx2::{field, load_codes};
use crate::codec::tile::QUAD;

/// Lanes whose products are added in 16 bits before they are widened: `2 * 127 * 15` for each vector of eight.
const FLUSH: usize = 8;

/// [`MixedVector::lane_sums`]
#[inline]
#[target_feature(enable = "avx2,fma")]
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
    // Of each eight lanes the weights of four in each half of a vector, four times.
    let spread = _mm256_setr_epi32(
        0x0302_0100,
        0x0302_0100,
        0x0302_0100,
        0x0302_0100,
        0x0706_0504,
        0x0706_0504,
        0x0706_0504,
        0x0706_0504,
    );
    // Four tokens of one channel into a word, instead of four channels of one token.
    let transpose = _mm256_broadcastsi128_si256(_mm_setr_epi32(0x0c08_0400, 0x0d09_0501, 0x0e0a_0602, 0x0f0b_0703));
    let mut spreads = [[_mm256_setzero_si256(); R]; MAX_PAGE / 8];
    for (i, spreads) in spreads[..lanes / 8].iter_mut().enumerate() {
        for (row, to) in spreads.iter_mut().enumerate() {
            let weights = &weights[row * lanes + i * 8..][..8];
            // SAFETY: the slice holds eight bytes.
            let weights = _mm256_broadcastq_epi64(unsafe { _mm_loadl_epi64(weights.as_ptr().cast()) });
            *to = _mm256_shuffle_epi8(weights, spread);
        }
    }
    for at in 0..tile.n_segments() * SEGMENT_QUADS {
        let (segment, f) = (at / SEGMENT_QUADS, at % SEGMENT_QUADS);
        let mut sums = [_mm256_setzero_si256(); R];
        for (group, weights) in spreads[..lanes / 8].chunks(FLUSH).enumerate() {
            let mut partial = [_mm256_setzero_si256(); R];
            for (i, weights) in weights.chunks_exact(2).enumerate() {
                let strip = group * (FLUSH / 2) + i;
                let base = &codes[strip / 2 * tile.block_bytes()..][..tile.block_bytes()][strip % 2 * 64..];
                let codes = quad(base, segments, segment, f).map(|codes| _mm256_shuffle_epi8(codes, transpose));
                for (codes, weights) in codes.into_iter().zip(weights) {
                    for row in 0..R {
                        let products = _mm256_maddubs_epi16(codes, weights[row]);
                        partial[row] = _mm256_add_epi16(partial[row], products);
                    }
                }
            }
            for row in 0..R {
                sums[row] = _mm256_add_epi32(sums[row], _mm256_madd_epi16(partial[row], _mm256_set1_epi16(1)));
            }
        }
        for (row, sum) in sums.into_iter().enumerate() {
            let sum = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256::<1>(sum));
            let to = &mut out[row * stride + at * QUAD..][..QUAD];
            // SAFETY: the slice holds four floats.
            unsafe { _mm_storeu_ps(to.as_mut_ptr(), _mm_cvtepi32_ps(sum)) };
        }
    }
}

/// Quad `f` of a segment, unpacked.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn quad(base: &[u8], segments: &Segments, segment: usize, f: usize) -> [__m256i; 2] {
    let [four, three, two, _] = segments.0;
    let plane = 2 * four + three + two;
    let single = |odd: usize| (load_codes(base, (plane + odd / 2) * 128), odd % 2 * SEGMENT_QUADS + f);
    match segments.bits(segment) {
        4 => field(load_codes(base, (2 * segment + f / 2) * 128), f % 2, 4),
        3 => {
            let low = field(load_codes(base, (four + segment) * 128), f, 2);
            let (words, bit) = single(segment - four);
            let high = field(words, bit, 1);
            std::array::from_fn(|i| _mm256_or_si256(low[i], _mm256_slli_epi16::<2>(high[i])))
        }
        2 => field(load_codes(base, (four + segment) * 128), f, 2),
        _ => {
            let (words, bit) = single(three + segment - four - three - two);
            field(words, bit, 1)
        }
    }
}
