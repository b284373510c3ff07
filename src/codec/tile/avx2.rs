//! AVX2 byte dot products straight on the codes of a tile.
//!
//! Without VNNI a byte dot product is `maddubs`, which adds pairs of products in 16 bits. Codes of up to 4 bits leave
//! room there for several quads, so a quad costs two instructions per vector and row, and sums are widened once in a
//! while. Codes of 8 bits would saturate; their even and odd bytes are multiplied by 16-bit coefficients instead
//! (`madd`), which does both int8 planes of a coefficient at once.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::vector::{planes, Codes, Coefficients, TileVector};
use super::{Tile, QUAD};
use crate::codec::query::PLANE;
use crate::simd::avx2::prefetch_next;
use crate::simd::isa::Avx2;
use crate::simd::vector::by_instructions;

/// Query rows that one pass over the codes serves: with two vectors of lanes, eight of the sixteen registers are sums.
pub(crate) const MAX_ROWS: usize = 4;
/// Lanes of one pass: half a lane block.
pub(crate) const STRIP: usize = 16;

/// Sums of one strip of lanes for `R` rows, 32 or 16 bits each: `[row][half of the strip]`.
pub(crate) type Sums<const R: usize> = [[__m256i; 2]; R];

impl TileVector for Avx2 {
    const MAX_ROWS: usize = MAX_ROWS;
    /// int16, with the two middle ones of each quad swapped, so that a 32-bit word holds what the even or the odd bytes of a quad
    /// are multiplied by.
    const PLANE_ROWS: usize = 1;

    #[inline(always)]
    fn dot<const W: u8, const R: usize, const UNSIGNED: bool>(
        self,
        tile: &Tile,
        codes: Codes,
        strip: usize,
        coefficients: Coefficients<UNSIGNED>,
    ) -> Sums<R> {
        // SAFETY: the token proves that the CPU has the instructions.
        unsafe { dot::<W, R, UNSIGNED>(tile, codes.bytes, strip, coefficients) }
    }

    #[inline(always)]
    fn take_planes<'a>(self, planes: &'a [i8], rows: usize, room: &'a mut [i8]) -> &'a [i8] {
        let row = planes.len() / rows;
        for (planes, room) in planes.chunks_exact(row).zip(room.chunks_exact_mut(row)) {
            // SAFETY: the token proves that the CPU has the instructions.
            unsafe { join_planes(planes, room) };
        }
        &room[..planes.len()]
    }

    by_instructions! {
        fn store_planes(row: &mut [i8], at: usize, x: [__m256i; 4]) = {
            put_pairs(&mut row[2 * at..], pack_pair(x[0], x[1]));
            put_pairs(&mut row[2 * at + 32..], pack_pair(x[2], x[3]));
        };
    }

    #[inline(always)]
    fn ask_part(self, page: &[u8], part: usize, parts: usize) {
        prefetch_next::<_MM_HINT_T1>(page, page.len(), part, parts);
    }

    #[inline(always)]
    fn ask_behind(self, _page: &[u8], _from: usize) {}
}

impl<const UNSIGNED: bool> Coefficients<'_, UNSIGNED> {
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

/// Quads that are unpacked together, and how many times that many can be added in 16 bits: `maddubs` gives at most
/// `2 * 127 * (levels - 1)`, or with 255 instead of 127. Ternary leaves room for two quads from the tail.
const fn unit(width: u8, unsigned: bool) -> (usize, usize) {
    match (width, unsigned) {
        (2, false) => (4, 8),
        (2, true) => (4, 5),
        (3, false) => (8, 2),
        (3, true) => (8, 1),
        (4, false) => (2, 4),
        (4, true) => (2, 2),
        (8, _) => (1, 64),
        (_, false) => (5, 12),
        (_, true) => (5, 6),
    }
}

#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn load_codes(bytes: &[u8], at: usize) -> [__m256i; 2] {
    let bytes = &bytes[at..at + 64];
    // SAFETY: the slice holds 64 bytes.
    unsafe { [_mm256_loadu_si256(bytes.as_ptr().cast()), _mm256_loadu_si256(bytes.as_ptr().add(32).cast())] }
}

/// Field `index` of `bits` bits of every byte.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn field(words: [__m256i; 2], index: usize, bits: usize) -> [__m256i; 2] {
    let (count, mask) = (_mm_cvtsi32_si128((index * bits) as i32), _mm256_set1_epi8((1 << bits) - 1));
    words.map(|w| _mm256_and_si256(_mm256_srl_epi16(w, count), mask))
}

/// Dot products of the lanes of a strip of a tile with `R` rows of coefficients of the tile's depth.
#[inline]
#[target_feature(enable = "avx2")]
fn dot<const W: u8, const R: usize, const UNSIGNED: bool>(
    tile: &Tile,
    bytes: &[u8],
    strip: usize,
    coefficients: Coefficients<UNSIGNED>,
) -> Sums<R> {
    let quads = tile.depth() / QUAD;
    assert!((R - 1) * coefficients.stride + planes(W) * tile.depth() <= coefficients.bytes.len());
    // Word `w` of the strip is at byte `128 * w`.
    let base = &bytes[strip / 2 * tile.block_bytes()..][..tile.block_bytes()][strip % 2 * 64..];
    let (per_unit, flush) = unit(W, UNSIGNED);
    let units = (quads - tile.tail_quads()).div_ceil(per_unit);
    let mut sums = [[_mm256_setzero_si256(); 2]; R];
    for first in (0..units).step_by(flush) {
        let mut partial = [[_mm256_setzero_si256(); 2]; R];
        // SAFETY: every quad below is less than `quads`, and the assertion above covers the last quad of the last row.
        unsafe {
            for unit in first..units.min(first + flush) {
                match W {
                    2 => add_fields::<4, R, UNSIGNED>(base, unit, 2, coefficients, &mut partial),
                    3 => add_3(base, quads, unit, coefficients, &mut partial),
                    4 => add_fields::<2, R, UNSIGNED>(base, unit, 4, coefficients, &mut partial),
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
pub(crate) unsafe fn add_quad<const R: usize, const UNSIGNED: bool>(
    sums: &mut Sums<R>,
    codes: [__m256i; 2],
    coefficients: Coefficients<UNSIGNED>,
    quad: usize,
) {
    for (row, sums) in sums.iter_mut().enumerate() {
        // SAFETY: by this function's contract.
        let c = unsafe { coefficients.word(row, quad) };
        for (sum, codes) in sums.iter_mut().zip(codes) {
            // Which of the two is unsigned decides the order.
            let (a, b) = if UNSIGNED { (c, codes) } else { (codes, c) };
            *sum = _mm256_add_epi16(*sum, _mm256_maddubs_epi16(a, b));
        }
    }
}

/// Adds the `N` quads of a word of 2-bit or 4-bit codes.
///
/// # Safety
///
/// As [`add_quad`].
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn add_fields<const N: usize, const R: usize, const U: bool>(
    base: &[u8],
    word: usize,
    bits: usize,
    c: Coefficients<U>,
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
unsafe fn add_3<const R: usize, const U: bool>(
    base: &[u8],
    quads: usize,
    pair: usize,
    c: Coefficients<U>,
    sums: &mut Sums<R>,
) {
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
unsafe fn add_8<const R: usize, const U: bool>(base: &[u8], quad: usize, c: Coefficients<U>, sums: &mut Sums<R>) {
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
unsafe fn add_ternary<const R: usize, const U: bool>(
    base: &[u8],
    quads: usize,
    word: usize,
    c: Coefficients<U>,
    sums: &mut Sums<R>,
) {
    let [a, b] = load_codes(base, word * 128).map(|w| base_3(w));
    for (f, (a, b)) in a.into_iter().zip(b).enumerate() {
        if word * 5 + f < quads {
            // SAFETY: by this function's contract.
            unsafe { add_quad(sums, [a, b], c, word * 5 + f) };
        }
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
unsafe fn add_tail<const R: usize, const U: bool>(
    tile: &Tile,
    bytes: &[u8],
    strip: usize,
    c: Coefficients<U>,
    sums: &mut Sums<R>,
) {
    let first = tile.depth() / QUAD - tile.tail_quads();
    for u in 0..tile.tail_quads() {
        let entry = u * (tile.lanes() / STRIP) + strip;
        let words = load_codes(bytes, tile.tail_offset() + entry / 4 * 64);
        // SAFETY: by this function's contract.
        unsafe { add_quad(sums, field(words, entry % 4, 2), c, first + u) };
    }
}

/// Turns the high and the low plane of a row into 16-bit coefficients as [`TileVector::PLANE_ROWS`] says.
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

/// Sixteen integers in 16 bits each, in order.
#[inline]
#[target_feature(enable = "avx2")]
fn pack_pair(a: __m256i, b: __m256i) -> __m256i {
    _mm256_permute4x64_epi64::<0xd8>(_mm256_packs_epi32(a, b))
}

/// Stores sixteen 16-bit coefficients as [`TileVector::PLANE_ROWS`] says.
#[inline]
#[target_feature(enable = "avx2")]
fn put_pairs(to: &mut [i8], x: __m256i) {
    let to = &mut to[..32];
    let x = _mm256_shufflehi_epi16::<0xd8>(_mm256_shufflelo_epi16::<0xd8>(x));
    // SAFETY: the slice holds 32 bytes.
    unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), x) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::tile::vector::by_width_and_rows;
    use crate::codec::tile::Width;
    use crate::simd::isa::{Isa, IsaToken};
    use crate::simd::vector::Vector;

    /// Compares all strips with sums over single codes, for coefficients that the kernels may be given: with a sign, and
    /// where codes leave room for it, of twice the size without.
    fn check<V, const W: u8, const R: usize>(_: V, tile: &Tile, bytes: &[u8], c: &[Vec<i32>]) {
        check_signs::<W, R, false>(tile, bytes, c);
        if W != 8 {
            let c: Vec<Vec<i32>> = c.iter().map(|c| c.iter().map(|c| c + 128).collect()).collect();
            check_signs::<W, R, true>(tile, bytes, &c);
        }
    }

    fn check_signs<const W: u8, const R: usize, const U: bool>(tile: &Tile, bytes: &[u8], c: &[Vec<i32>]) {
        let stride = planes(W) * tile.depth();
        let quad = |q: &[i32]| match W {
            8 => [q[0], q[2], q[1], q[3]].iter().flat_map(|x| (*x as i16).to_le_bytes()).collect(),
            _ => q.iter().map(|x| *x as u8).collect::<Vec<u8>>(),
        };
        let packed: Vec<i8> = c.iter().flat_map(|c| c.chunks_exact(4).flat_map(quad)).map(|x| x as i8).collect();
        for strip in 0..tile.lanes() / STRIP {
            // SAFETY: the caller has a token.
            let sums = unsafe { dot::<W, R, U>(tile, bytes, strip, Coefficients { bytes: &packed, stride }) };
            for (row, sums) in sums.iter().enumerate() {
                for lane in 0..STRIP {
                    // SAFETY: both are eight 32-bit integers.
                    let sums: [i32; 8] = unsafe { std::mem::transmute(sums[lane / 8]) };
                    let at = |d| i32::from(tile.get(bytes, strip * STRIP + lane, d)) * c[row][d];
                    assert_eq!(sums[lane % 8], (0..tile.depth()).map(at).sum::<i32>(), "{tile:?} {strip} {row} {lane}");
                }
            }
        }
    }

    #[test]
    fn sums_are_exact_up_to_the_largest_codes_and_coefficients() {
        let Some(IsaToken::Avx2(v)) = IsaToken::new(Isa::Avx2) else {
            return;
        };
        for width in Width::ALL {
            let (levels, top) = (width.levels() as usize, if width == Width::Bits8 { 127 * PLANE } else { 127 });
            for (lanes, depth) in [(32, 32), (64, 64), (96, 128), (64, 160), (32, 256)] {
                let tile = Tile::new(width, lanes, depth);
                for largest in [false, true] {
                    let mut bytes = vec![0; tile.bytes()];
                    for i in 0..lanes * depth {
                        let code = if largest { levels - 1 } else { (i * 7919 + i / 5) % levels };
                        tile.set(&mut bytes, i / depth, i % depth, code as u8);
                    }
                    let c = |row: i32, d: i32| match row {
                        0 => top,
                        1 => -top,
                        _ => (d * 7907 + row * 31) % (2 * top + 1) - top,
                    };
                    let c: Vec<Vec<i32>> = (0..4).map(|row| (0..depth as i32).map(|d| c(row, d)).collect()).collect();
                    for rows in 1..=4 {
                        by_width_and_rows!(v: Avx2, width, rows, check(&tile, &bytes, &c[..rows]));
                    }
                }
            }
        }
    }
}
