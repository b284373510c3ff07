//! Sums over the lanes of a mixed tile with AVX2, also with AVX-VNNI.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::{MixedTile, Segments, SEGMENT_QUADS};
use crate::codec::page::MAX_PAGE;
use crate::codec::tile::avx2::{field, load_codes};
use crate::codec::tile::QUAD;
use crate::simd::isa::Avx2;
use crate::simd::vector::Vector;

/// Lanes whose products are added in 16 bits, without VNNI, before they are widened: `2 * 127 * 15` for each vector of eight.
const FLUSH: usize = 8;

/// [`MixedVector::lane_sums`]
#[inline(always)]
pub(super) fn lane_sums<const VNNI: bool, const R: usize>(
    v: Avx2<VNNI>,
    tile: &MixedTile,
    segments: &Segments,
    codes: &[u8],
    weights: &[i8],
    out: &mut [f32],
    stride: usize,
) {
    let lanes = tile.lanes;
    assert!(weights.len() == R * lanes && lanes <= MAX_PAGE);
    // SAFETY: the token proves that the CPU has the instructions.
    let spreads = unsafe { spread::<R>(weights, lanes) };
    for at in 0..tile.n_segments() * SEGMENT_QUADS {
        let (segment, f) = (at / SEGMENT_QUADS, at % SEGMENT_QUADS);
        let mut sums = [v.splat_i32(0); R];
        let flush = if VNNI { MAX_PAGE / 8 } else { FLUSH };
        for (group, weights) in spreads[..lanes / 8].chunks(flush).enumerate() {
            let mut partial = [v.splat_i32(0); R];
            for (i, weights) in weights.chunks_exact(2).enumerate() {
                let strip = group * (flush / 2) + i;
                let base = &codes[strip / 2 * tile.block_bytes()..][..tile.block_bytes()][strip % 2 * 64..];
                // SAFETY: as above.
                let codes = unsafe { transposed(quad(base, segments, segment, f)) };
                for (codes, weights) in codes.into_iter().zip(weights) {
                    for row in 0..R {
                        partial[row] = v.add_bytes(partial[row], codes, weights[row]);
                    }
                }
            }
            for row in 0..R {
                sums[row] = v.add_i32(sums[row], v.widen(partial[row]));
            }
        }
        for (row, sum) in sums.into_iter().enumerate() {
            // SAFETY: as above.
            unsafe { store_sums(&mut out[row * stride + at * QUAD..], sum) };
        }
    }
}

/// Of each eight lanes the weights of four in each half of a vector, four times.
#[inline]
#[target_feature(enable = "avx2")]
fn spread<const R: usize>(weights: &[i8], lanes: usize) -> [[__m256i; R]; MAX_PAGE / 8] {
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
    let mut spreads = [[_mm256_setzero_si256(); R]; MAX_PAGE / 8];
    for (i, spreads) in spreads[..lanes / 8].iter_mut().enumerate() {
        for (row, to) in spreads.iter_mut().enumerate() {
            let weights = &weights[row * lanes + i * 8..][..8];
            // SAFETY: the slice holds eight bytes.
            let weights = _mm256_broadcastq_epi64(unsafe { _mm_loadl_epi64(weights.as_ptr().cast()) });
            *to = _mm256_shuffle_epi8(weights, spread);
        }
    }
    spreads
}

/// Four tokens of one channel in a word, instead of four channels of one token.
#[inline]
#[target_feature(enable = "avx2")]
fn transposed(codes: [__m256i; 2]) -> [__m256i; 2] {
    let order = _mm256_broadcastsi128_si256(_mm_setr_epi32(0x0c08_0400, 0x0d09_0501, 0x0e0a_0602, 0x0f0b_0703));
    codes.map(|codes| _mm256_shuffle_epi8(codes, order))
}

/// Stores the sums of both halves.
#[inline]
#[target_feature(enable = "avx2")]
fn store_sums(to: &mut [f32], sums: __m256i) {
    let to = &mut to[..QUAD];
    let sums = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256::<1>(sums));
    // SAFETY: the slice holds four floats.
    unsafe { _mm_storeu_ps(to.as_mut_ptr(), _mm_cvtepi32_ps(sums)) };
}

/// Quad `f` of a segment, unpacked.
#[inline]
#[target_feature(enable = "avx2")]
fn quad(base: &[u8], segments: &Segments, segment: usize, f: usize) -> [__m256i; 2] {
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
