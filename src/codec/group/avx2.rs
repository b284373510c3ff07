//! AVX2 kernels of codec `group`: byte dot products straight on the packed codes.
//!
//! Without VNNI a byte dot product is `maddubs`, which adds pairs of products in 16 bits. Codes of up to 4 bits leave room
//! there for several quads, so a quad costs two instructions per vector and row, and sums are widened once in a while.
//! Codes of 8 bits would saturate; their even and odd bytes are multiplied by 16-bit coefficients instead (`madd`), which
//! does both int8 planes of a coefficient at once.

#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::{scalar, GroupCodec, GroupKernels, PageRef, Probabilities, Query};
use crate::codec::query::PLANE;
use crate::codec::tile::{Tile, Width, QUAD};
use crate::shape::MAX_HEAD_DIM;
use crate::simd::avx2::{load, reduce_add, reduce_max, store};
use crate::simd::IsaToken;

static KERNELS: GroupKernels = GroupKernels {
    // SAFETY: the table is only reachable through `kernels`, which takes the proof that the CPU has these features.
    seal: |codec, header, page, rows| unsafe { seal(codec, header, page, rows) },
    // SAFETY: as above.
    scores: |codec, page, query, out| unsafe { scores(codec, page, query, out) },
    // SAFETY: as above.
    accumulate: |codec, page, p, acc| unsafe { accumulate(codec, page, p, acc) },
};

/// The table, given the proof that this CPU can run it.
pub(super) fn kernels(_token: IsaToken) -> &'static GroupKernels {
    &KERNELS
}

/// Query rows that one pass over the codes serves: with two vectors of lanes, eight of the sixteen registers are sums.
const MAX_ROWS: usize = 4;
/// Lanes of one pass: half a lane block.
const STRIP: usize = 16;

#[target_feature(enable = "avx2,fma,f16c")]
fn seal(codec: &GroupCodec, header: &mut [u8], page: &mut [u8], rows: &mut super::SealRows) {
    scalar::seal(codec, header, page, rows);
}

/// Sums of one strip of lanes for `R` rows, 32 or 16 bits each: `[row][half of the strip]`.
type Sums<const R: usize> = [[__m256i; 2]; R];

/// Rows of coefficients, `stride` bytes apart: int8, or for codes of 8 bits int16 with the two middle ones of each quad
/// swapped, so that a 32-bit word holds what the even or the odd bytes of a quad are multiplied by.
#[derive(Clone, Copy)]
struct Coefficients<'a> {
    bytes: &'a [i8],
    stride: usize,
}

impl Coefficients<'_> {
    /// One 32-bit word of a row, in every lane.
    ///
    /// # Safety
    ///
    /// `row * stride + 4 * word + 4 <= bytes.len()`, which `dot` checks once for its last row and word.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn word(&self, row: usize, word: usize) -> __m256i {
        // SAFETY: within the slice, by this function's contract.
        _mm256_set1_epi32(unsafe {
            self.bytes.as_ptr().add(row * self.stride + word * 4).cast::<i32>().read_unaligned()
        })
    }
}

/// Bytes of a coefficient.
const fn planes(width: u8) -> usize {
    if width == 8 {
        2
    } else {
        1
    }
}

/// Quads that are unpacked together, and how many times that many can be added in 16 bits: `maddubs` gives at most
/// `2 * 127 * (levels - 1)`. Ternary leaves room for two quads from the tail.
const fn unit(width: u8) -> (usize, usize) {
    match width {
        2 => (4, 8),
        3 => (8, 2),
        4 => (2, 4),
        8 => (1, 64),
        _ => (5, 12),
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_codes(bytes: &[u8], at: usize) -> [__m256i; 2] {
    let bytes = &bytes[at..at + 64];
    // SAFETY: the slice holds 64 bytes.
    unsafe { [_mm256_loadu_si256(bytes.as_ptr().cast()), _mm256_loadu_si256(bytes.as_ptr().add(32).cast())] }
}

/// Field `index` of `bits` bits of every byte.
#[inline]
#[target_feature(enable = "avx2")]
fn field(words: [__m256i; 2], index: usize, bits: usize) -> [__m256i; 2] {
    let (count, mask) = (_mm_cvtsi32_si128((index * bits) as i32), _mm256_set1_epi8((1 << bits) - 1));
    words.map(|w| _mm256_and_si256(_mm256_srl_epi16(w, count), mask))
}

/// Dot products of the lanes of a strip of a tile with `R` rows of coefficients of the tile's depth.
#[inline]
#[target_feature(enable = "avx2")]
fn dot<const W: u8, const R: usize>(tile: &Tile, bytes: &[u8], strip: usize, coefficients: Coefficients) -> Sums<R> {
    let quads = tile.depth() / QUAD;
    assert!((R - 1) * coefficients.stride + planes(W) * tile.depth() <= coefficients.bytes.len());
    // Word `w` of the strip is at byte `128 * w`.
    let base = &bytes[strip / 2 * tile.block_bytes()..][..tile.block_bytes()][strip % 2 * 64..];
    let (per_unit, flush) = unit(W);
    let units = (quads - tile.tail_quads()).div_ceil(per_unit);
    let mut sums = [[_mm256_setzero_si256(); 2]; R];
    for first in (0..units).step_by(flush) {
        let mut partial = [[_mm256_setzero_si256(); 2]; R];
        // SAFETY: every quad below is less than `quads`, and the assertion above covers the last quad of the last row.
        unsafe {
            for unit in first..units.min(first + flush) {
                match W {
                    2 => add_fields::<4, R>(base, unit, 2, coefficients, &mut partial),
                    3 => add_3(base, quads, unit, coefficients, &mut partial),
                    4 => add_fields::<2, R>(base, unit, 4, coefficients, &mut partial),
                    8 => add_8(base, unit, coefficients, &mut partial),
                    _ => add_ternary(base, quads, unit, coefficients, &mut partial),
                }
            }
            if W == 1 && first == 0 {
                add_tail(tile, bytes, strip, coefficients, &mut partial);
            }
        }
        for (sum, partial) in sums.as_flattened_mut().iter_mut().zip(partial.as_flattened()) {
            let wide = if W == 8 { *partial } else { _mm256_madd_epi16(*partial, _mm256_set1_epi16(1)) };
            *sum = _mm256_add_epi32(*sum, wide);
        }
    }
    sums
}

/// Adds the products of one unpacked quad, in 16 bits.
///
/// # Safety
///
/// As [`Coefficients::word`] for all rows below `R` and the words of all quads that are added; so for what follows.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn add_quad<const R: usize>(sums: &mut Sums<R>, codes: [__m256i; 2], coefficients: Coefficients, quad: usize) {
    for (row, sums) in sums.iter_mut().enumerate() {
        // SAFETY: by this function's contract.
        let c = unsafe { coefficients.word(row, quad) };
        sums[0] = _mm256_add_epi16(sums[0], _mm256_maddubs_epi16(codes[0], c));
        sums[1] = _mm256_add_epi16(sums[1], _mm256_maddubs_epi16(codes[1], c));
    }
}

/// Adds the `N` quads of a word of 2-bit or 4-bit codes.
///
/// # Safety
///
/// As [`add_quad`].
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn add_fields<const N: usize, const R: usize>(
    base: &[u8],
    word: usize,
    bits: usize,
    c: Coefficients,
    sums: &mut Sums<R>,
) {
    let words = load_codes(base, word * 128);
    for f in 0..N {
        // SAFETY: by this function's contract.
        unsafe { add_quad(sums, field(words, f, bits), c, word * N + f) };
    }
}

/// Adds the eight quads of a word of the high plane.
///
/// # Safety
///
/// As [`add_quad`].
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn add_3<const R: usize>(base: &[u8], quads: usize, pair: usize, c: Coefficients, sums: &mut Sums<R>) {
    let high_mask = _mm256_set1_epi8(4);
    let high = load_codes(base, (quads / 4 + pair) * 128);
    for half in 0..2 {
        let low = load_codes(base, (pair * 2 + half) * 128);
        for f in 0..4 {
            let bit = half * 4 + f;
            let low = field(low, f, 2);
            let codes = std::array::from_fn(|i| {
                // Bring the bit to the place worth 4.
                let moved = if bit < 2 {
                    _mm256_sll_epi16(high[i], _mm_cvtsi32_si128(2 - bit as i32))
                } else {
                    _mm256_srl_epi16(high[i], _mm_cvtsi32_si128(bit as i32 - 2))
                };
                _mm256_or_si256(_mm256_and_si256(moved, high_mask), low[i])
            });
            // SAFETY: by this function's contract.
            unsafe { add_quad(sums, codes, c, pair * 8 + bit) };
        }
    }
}

/// Adds a quad of 8-bit codes, in 32 bits.
///
/// # Safety
///
/// As [`add_quad`].
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn add_8<const R: usize>(base: &[u8], quad: usize, c: Coefficients, sums: &mut Sums<R>) {
    let words = load_codes(base, quad * 128);
    let even = words.map(|w| _mm256_and_si256(w, _mm256_set1_epi16(0xff)));
    let odd = words.map(|w| _mm256_srli_epi16::<8>(w));
    for (i, codes) in [even, odd].iter().enumerate() {
        for (row, sums) in sums.iter_mut().enumerate() {
            // SAFETY: by this function's contract.
            let c = unsafe { c.word(row, 2 * quad + i) };
            sums[0] = _mm256_add_epi32(sums[0], _mm256_madd_epi16(codes[0], c));
            sums[1] = _mm256_add_epi32(sums[1], _mm256_madd_epi16(codes[1], c));
        }
    }
}

/// Adds the quads of a word of ternary codes: five, or what is left.
///
/// # Safety
///
/// As [`add_quad`].
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn add_ternary<const R: usize>(base: &[u8], quads: usize, word: usize, c: Coefficients, sums: &mut Sums<R>) {
    let digits = load_codes(base, word * 128).map(|w| base_3(w));
    for f in 0..5.min(quads - word * 5) {
        // SAFETY: by this function's contract.
        unsafe { add_quad(sums, [digits[0][f], digits[1][f]], c, word * 5 + f) };
    }
}

/// The five base-3 digits of every byte, each at most 242.
#[inline]
#[target_feature(enable = "avx2")]
fn base_3(x: __m256i) -> [__m256i; 5] {
    let bytes = |n| _mm256_set1_epi8(n);
    let times_9 = |x| _mm256_add_epi8(x, _mm256_slli_epi16::<3>(x));
    // Digits 0 and 1 of 0..=8.
    let first = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0));
    let second = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0));
    // 65536 / 9 rounded up. The byte below an odd one adds less than the 1/9 that would carry, being at most 242.
    let ninth = _mm256_set1_epi16(7282);
    let even = _mm256_mulhi_epu16(_mm256_and_si256(x, _mm256_set1_epi16(0xff)), ninth);
    let odd = _mm256_andnot_si256(_mm256_set1_epi16(0xff), _mm256_mulhi_epu16(x, ninth));
    let upper = _mm256_or_si256(even, odd);
    let lower = _mm256_sub_epi8(x, times_9(upper));
    // `upper` is at most 26; each comparison counts minus one.
    let last = _mm256_add_epi8(_mm256_cmpgt_epi8(upper, bytes(8)), _mm256_cmpgt_epi8(upper, bytes(17)));
    let last = _mm256_abs_epi8(last);
    let upper = _mm256_sub_epi8(upper, times_9(last));
    let digit = _mm256_shuffle_epi8;
    [digit(first, lower), digit(second, lower), digit(first, upper), digit(second, upper), last]
}

/// Adds the left-over quads of ternary codes.
///
/// # Safety
///
/// As [`add_quad`].
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn add_tail<const R: usize>(tile: &Tile, bytes: &[u8], strip: usize, c: Coefficients, sums: &mut Sums<R>) {
    let first = tile.depth() / QUAD - tile.tail_quads();
    for u in 0..tile.tail_quads() {
        let entry = u * (tile.lanes() / STRIP) + strip;
        let words = load_codes(bytes, tile.tail_offset() + entry / 4 * 64);
        // SAFETY: by this function's contract.
        unsafe { add_quad(sums, field(words, entry % 4, 2), c, first + u) };
    }
}

/// Eight bytes as integers.
#[inline]
#[target_feature(enable = "avx2")]
fn load_bytes(bytes: &[u8], at: usize) -> __m256i {
    let bytes = &bytes[at..at + 8];
    // SAFETY: the slice holds eight bytes.
    _mm256_cvtepu8_epi32(unsafe { _mm_loadl_epi64(bytes.as_ptr().cast()) })
}

/// Eight steps, from `at` in the array of steps.
#[inline]
#[target_feature(enable = "avx2")]
fn steps(codec: &GroupCodec, page: PageRef, at: usize) -> __m256 {
    let codes = load_bytes(page.bytes, codec.steps_offset() + at);
    if codec.params.symmetric {
        let base = _mm256_set1_epi32(i32::from(page.header[0]) << 23);
        let none = _mm256_cmpeq_epi32(codes, _mm256_setzero_si256());
        let step = _mm256_add_epi32(_mm256_slli_epi32::<19>(codes), base);
        return _mm256_castsi256_ps(_mm256_andnot_si256(none, step));
    }
    e4m3(codes, page.header[0])
}

/// Eight mid-points, from `at` in the array of mid-points.
#[inline]
#[target_feature(enable = "avx2")]
fn mids(codec: &GroupCodec, page: PageRef, at: usize) -> __m256 {
    e4m3(load_bytes(page.bytes, codec.mids_offset() + at), page.header[1])
}

/// FP8 E4M3 codes times `2^(base - 127)`.
#[inline]
#[target_feature(enable = "avx2")]
fn e4m3(codes: __m256i, base: u8) -> __m256 {
    let magnitude = _mm256_slli_epi32::<20>(_mm256_and_si256(codes, _mm256_set1_epi32(0x7f)));
    let sign = _mm256_slli_epi32::<24>(_mm256_and_si256(codes, _mm256_set1_epi32(0x80)));
    // First by 2^120 (E4M3's bias against f32's), which is exact, then by the page's power.
    let x = _mm256_mul_ps(_mm256_castsi256_ps(magnitude), _mm256_set1_ps(f32::from_bits(247 << 23)));
    let x = _mm256_mul_ps(x, _mm256_set1_ps(crate::codec::float8::power(base)));
    _mm256_or_ps(x, _mm256_castsi256_ps(sign))
}

/// Calls a kernel with the width and the number of rows as constants.
macro_rules! by_width_and_rows {
    ($width:expr, $rows:expr, $call:ident $args:tt) => {
        match $width {
            Width::Ternary => by_width_and_rows!(@rows 1, $rows, $call $args),
            Width::Bits2 => by_width_and_rows!(@rows 2, $rows, $call $args),
            Width::Bits3 => by_width_and_rows!(@rows 3, $rows, $call $args),
            Width::Bits4 => by_width_and_rows!(@rows 4, $rows, $call $args),
            Width::Bits8 => by_width_and_rows!(@rows 8, $rows, $call $args),
        }
    };
    (@rows $w:literal, $rows:expr, $call:ident $args:tt) => {
        match $rows {
            1 => $call::<$w, 1> $args,
            2 => $call::<$w, 2> $args,
            3 => $call::<$w, 3> $args,
            _ => $call::<$w, 4> $args,
        }
    };
}

#[target_feature(enable = "avx2,fma")]
fn scores(codec: &GroupCodec, page: PageRef, query: &Query, out: &mut [f32]) {
    let mut mean = [0f32; MAX_HEAD_DIM as usize];
    let mean = &mut mean[..codec.head_dim];
    if codec.params.mean {
        for c in (0..codec.head_dim).step_by(8) {
            store(mean, c, e4m3(load_bytes(page.bytes, codec.mean_offset() + c), page.header[2]));
        }
    }
    for row in (0..query.n_rows()).step_by(MAX_ROWS) {
        let n = query.n_rows() - row;
        by_width_and_rows!(codec.params.width, n, score_rows(codec, page, query, row, mean, out));
    }
}

/// Scores of the `R` query rows from `first` against every token of a page.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn score_rows<const W: u8, const R: usize>(
    codec: &GroupCodec,
    page: PageRef,
    query: &Query,
    first: usize,
    mean: &[f32],
    out: &mut [f32],
) {
    let stride = planes(W) * codec.head_dim;
    let mut base = [_mm256_setzero_ps(); R];
    if codec.params.mean {
        for (i, base) in base.iter_mut().enumerate() {
            let q = &query.rotated()[(first + i) * codec.head_dim..][..codec.head_dim];
            for c in (0..codec.head_dim).step_by(8) {
                *base = _mm256_fmadd_ps(load(q, c), load(mean, c), *base);
            }
            *base = _mm256_set1_ps(reduce_add(*base));
        }
    }
    let mut bytes = &query.int8[first * stride..][..R * stride];
    let mut pairs = [0i8; MAX_ROWS * 2 * MAX_HEAD_DIM as usize];
    if W == 8 {
        for (planes, pairs) in bytes.chunks_exact(stride).zip(pairs.chunks_exact_mut(stride)) {
            join_planes(planes, pairs);
        }
        bytes = &pairs[..R * stride];
    }
    for strip in 0..codec.page / STRIP {
        let mut total = [[_mm256_setzero_ps(); 2]; R];
        for (total, base) in total.iter_mut().zip(base) {
            *total = [base; 2];
        }
        for g in 0..codec.n_groups {
            let tile = &page.bytes[g * codec.tile.bytes()..][..codec.tile.bytes()];
            let coefficients = Coefficients { bytes: &bytes[g * planes(W) * codec.group..], stride };
            let sums = dot::<W, R>(&codec.tile, tile, strip, coefficients);
            for half in 0..2 {
                let at = g * codec.page + strip * STRIP + half * 8;
                let step = steps(codec, page, at);
                let mid = if codec.params.symmetric { step } else { mids(codec, page, at) };
                for i in 0..R {
                    let k = (first + i) * codec.n_groups + g;
                    let x = _mm256_cvtepi32_ps(sums[i][half]);
                    let x = _mm256_fmadd_ps(x, _mm256_set1_ps(query.scale[k]), _mm256_set1_ps(query.offset[k]));
                    total[i][half] = _mm256_fmadd_ps(x, step, total[i][half]);
                    if !codec.params.symmetric {
                        total[i][half] = _mm256_fmadd_ps(mid, _mm256_set1_ps(query.sum[k]), total[i][half]);
                    }
                }
            }
        }
        for (i, total) in total.iter().enumerate() {
            let at = (first + i) * codec.page + strip * STRIP;
            store(out, at, total[0]);
            store(out, at + 8, total[1]);
        }
    }
}

/// Turns the high and the low plane of a row into 16-bit coefficients as [`Coefficients`] has them.
#[inline]
#[target_feature(enable = "avx2")]
fn join_planes(planes: &[i8], pairs: &mut [i8]) {
    let (high, low) = planes.split_at(planes.len() / 2);
    for (i, (high, low)) in high.chunks_exact(16).zip(low.chunks_exact(16)).enumerate() {
        // SAFETY: the chunks hold sixteen bytes.
        let (high, low) = unsafe { (_mm_loadu_si128(high.as_ptr().cast()), _mm_loadu_si128(low.as_ptr().cast())) };
        let high = _mm256_mullo_epi16(_mm256_cvtepi8_epi16(high), _mm256_set1_epi16(PLANE as i16));
        put_pairs(&mut pairs[i * 32..], _mm256_add_epi16(high, _mm256_cvtepi8_epi16(low)));
    }
}

/// Stores sixteen 16-bit coefficients as [`Coefficients`] has them.
#[inline]
#[target_feature(enable = "avx2")]
fn put_pairs(to: &mut [i8], x: __m256i) {
    let to = &mut to[..32];
    let x = _mm256_shufflehi_epi16::<0xd8>(_mm256_shufflelo_epi16::<0xd8>(x));
    // SAFETY: the slice holds 32 bytes.
    unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), x) };
}

#[target_feature(enable = "avx2,fma")]
fn accumulate(codec: &GroupCodec, page: PageRef, p: &mut Probabilities, acc: &mut [f32]) {
    for g in 0..codec.n_groups {
        for row in 0..p.n_rows {
            round_weights(codec, page, p, g, row);
        }
        for row in (0..p.n_rows).step_by(MAX_ROWS) {
            by_width_and_rows!(codec.params.width, p.n_rows - row, add_rows(codec, page, p, g, row, acc));
        }
    }
}

/// Multiplies one row of weights with the steps of group `g` and rounds the products to int8, or to int16 pairs.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn round_weights(codec: &GroupCodec, page: PageRef, p: &mut Probabilities, g: usize, row: usize) {
    let (n, planes) = (codec.page, codec.coefficient_planes());
    let mut max = _mm256_setzero_ps();
    let mut mid_sum = _mm256_setzero_ps();
    let mut weights = [0f32; 256];
    for t in (0..n).step_by(8) {
        let weight = load(&p.p, row * n + t);
        if !codec.params.symmetric {
            mid_sum = _mm256_fmadd_ps(weight, mids(codec, page, g * n + t), mid_sum);
        }
        let weight = _mm256_mul_ps(weight, steps(codec, page, g * n + t));
        store(&mut weights, t, weight);
        max = _mm256_max_ps(max, weight);
    }
    let max = reduce_max(max);
    let top = if planes == 2 { 127.0 * PLANE as f32 } else { 127.0 };
    let inverse = _mm256_set1_ps(if max > 0.0 { top / max } else { 0.0 });
    let mut total = _mm256_setzero_si256();
    let bytes = &mut p.int8[row * planes * n..][..planes * n];
    for t in (0..n).step_by(16) {
        let x = [t, t + 8].map(|t| _mm256_cvtps_epi32(_mm256_mul_ps(load(&weights, t), inverse)));
        total = _mm256_add_epi32(total, _mm256_add_epi32(x[0], x[1]));
        let x = _mm256_permute4x64_epi64::<0xd8>(_mm256_packs_epi32(x[0], x[1]));
        if planes == 2 {
            put_pairs(&mut bytes[2 * t..], x);
        } else {
            put_int8(&mut bytes[t..], x);
        }
    }
    p.scale[row] = max / top;
    p.offset[row] = -codec.params.width.centre() * p.scale[row] * reduce_add(_mm256_cvtepi32_ps(total));
    if !codec.params.symmetric {
        p.offset[row] += reduce_add(mid_sum);
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn put_int8(to: &mut [i8], x: __m256i) {
    let to = &mut to[..16];
    let x = _mm_packs_epi16(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
    // SAFETY: the slice holds sixteen bytes.
    unsafe { _mm_storeu_si128(to.as_mut_ptr().cast(), x) };
}

/// Adds the outputs of group `g` of the `R` rows from `first`.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn add_rows<const W: u8, const R: usize>(
    codec: &GroupCodec,
    page: PageRef,
    p: &Probabilities,
    g: usize,
    first: usize,
    acc: &mut [f32],
) {
    let stride = planes(W) * codec.page;
    let tile = &page.bytes[g * codec.tile.bytes()..][..codec.tile.bytes()];
    let coefficients = Coefficients { bytes: &p.int8[first * stride..], stride };
    for strip in 0..codec.group / STRIP {
        let sums = dot::<W, R>(&codec.tile, tile, strip, coefficients);
        for i in 0..R {
            let (scale, offset) = (_mm256_set1_ps(p.scale[first + i]), _mm256_set1_ps(p.offset[first + i]));
            for half in 0..2 {
                let at = (first + i) * codec.head_dim + g * codec.group + strip * STRIP + half * 8;
                let x = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[i][half]), scale, offset);
                store(acc, at, _mm256_add_ps(x, load(acc, at)));
            }
        }
    }
}
