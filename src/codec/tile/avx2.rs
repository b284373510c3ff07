//! AVX2 byte dot products straight on the codes of a tile, also with AVX-VNNI.
//!
//! Without VNNI a byte dot product is `maddubs`, which adds pairs of products in 16 bits. Codes of up to 4 bits leave
//! room there for several quads, so a quad costs two instructions per vector and row, and sums are widened once in a
//! while. With it that is one instruction, and sums have 32 bits from the start. Codes of 8 bits would saturate `maddubs`;
//! their even and odd bytes are multiplied by 16-bit coefficients instead (`madd`), which does both int8 planes of a
//! coefficient at once.
//!
//! What ends up in one of the two differs by the token. Functions over tokens are `#[inline(always)]`, as those over vectors are.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::vector::{planes, Codes, Coefficients, TileVector};
use super::{Tile, QUAD};
use crate::codec::query::PLANE;
use crate::simd::avx2::prefetch_next;
use crate::simd::isa::Avx2;
use crate::simd::vector::{by_instructions, Vector};

/// Query rows that one pass over the codes serves: with two vectors of lanes, eight of the sixteen registers are sums.
pub(crate) const MAX_ROWS: usize = 4;
/// Lanes of one pass: half a lane block.
pub(crate) const STRIP: usize = 16;

/// Sums of one strip of lanes for `R` rows, 32 or 16 bits each: `[row][half of the strip]`.
pub(crate) type Sums<const R: usize> = [[__m256i; 2]; R];

impl<const VNNI: bool> TileVector for Avx2<VNNI> {
    const MAX_ROWS: usize = MAX_ROWS;
    /// int16, with the two middle ones of each quad swapped, so that a 32-bit word holds what the even or the odd bytes of a quad
    /// are multiplied by.
    const PLANE_ROWS: usize = 1;
    type Many = ();

    #[inline(always)]
    fn dot<const W: u8, const R: usize, const UNSIGNED: bool>(
        self,
        tile: &Tile,
        codes: Codes,
        strip: usize,
        coefficients: Coefficients<UNSIGNED>,
    ) -> Sums<R> {
        dot::<VNNI, W, R, UNSIGNED>(self, tile, codes.bytes, strip, coefficients)
    }

    #[inline(always)]
    fn many_rows(self) -> usize {
        usize::MAX
    }

    #[inline(always)]
    fn unpack<const W: u8>(self, _: &Tile, _: Codes, _: usize, _: &mut [u8]) {
        unreachable!("no number of rows is worth it");
    }

    #[inline(always)]
    fn begin_many(self, _: usize, _: usize) {}

    #[inline(always)]
    fn multiply<const UNSIGNED: bool>(self, _: &(), _: &[u8], _: Coefficients<UNSIGNED>, _: &mut [i32]) {
        unreachable!("no number of rows is worth it");
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

/// Quads that are unpacked together, and without VNNI how many times that many can be added in 16 bits: `maddubs` gives at most
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

/// Most that [`unit`] lets a sum of 16 bits become, codes having `levels` levels.
const fn most(width: u8, unsigned: bool, levels: usize) -> usize {
    let (quads, flush) = unit(width, unsigned);
    let tail = if width == 1 { 2 } else { 0 };
    (quads * flush + tail) * 2 * (if unsigned { 255 } else { 127 }) * (levels - 1)
}

const _: () = {
    const ROOM: usize = i16::MAX as usize;
    assert!(most(1, false, 3) <= ROOM && most(2, false, 4) <= ROOM && most(3, false, 8) <= ROOM);
    assert!(most(1, true, 3) <= ROOM && most(2, true, 4) <= ROOM && most(3, true, 8) <= ROOM);
    assert!(most(4, false, 16) <= ROOM && most(4, true, 16) <= ROOM);
};

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
#[inline(always)]
fn dot<const VNNI: bool, const W: u8, const R: usize, const UNSIGNED: bool>(
    v: Avx2<VNNI>,
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
    let flush = if VNNI { units } else { flush };
    let mut sums: Sums<R> = v.no_sums();
    for first in (0..units).step_by(flush) {
        let mut partial: Sums<R> = v.no_sums();
        // SAFETY: every quad below is less than `quads`, and the assertion above covers the last quad of the last row.
        unsafe {
            for unit in first..units.min(first + flush) {
                match W {
                    2 => add_fields::<VNNI, 4, R, UNSIGNED>(v, base, unit, 2, coefficients, &mut partial),
                    3 => add_3(v, base, quads, unit, coefficients, &mut partial),
                    4 => add_fields::<VNNI, 2, R, UNSIGNED>(v, base, unit, 4, coefficients, &mut partial),
                    8 => add_8(v, base, unit, coefficients, &mut partial),
                    _ => add_ternary(v, base, quads, unit, coefficients, &mut partial),
                }
            }
            if W == 1 && first == 0 {
                add_tail(v, tile, bytes, strip, coefficients, &mut partial);
            }
        }
        for (sum, partial) in sums.as_flattened_mut().iter_mut().zip(partial.as_flattened()) {
            *sum = v.add_i32(*sum, if W == 8 { *partial } else { v.widen(*partial) });
        }
    }
    sums
}

impl<const VNNI: bool> Avx2<VNNI> {
    /// Sums of nothing yet.
    #[inline(always)]
    pub(crate) fn no_sums<const R: usize>(self) -> Sums<R> {
        [[self.splat_i32(0); 2]; R]
    }

    by_instructions! {
        /// Adds products of the bytes of `a`, which have no sign, and `b`: pairs of them in 16 bits or, with VNNI, fours in 32.
        pub(crate) fn add_bytes(sum: __m256i, a: __m256i, b: __m256i) -> __m256i = {
            if VNNI {
                _mm256_dpbusd_avx_epi32(sum, a, b)
            } else {
                _mm256_add_epi16(sum, _mm256_maddubs_epi16(a, b))
            }
        };
        /// Sums of 32 bits of what [`Avx2::add_bytes`] summed up.
        pub(crate) fn widen(sums: __m256i) -> __m256i = {
            if VNNI {
                sums
            } else {
                _mm256_madd_epi16(sums, _mm256_set1_epi16(1))
            }
        };
    }
}

/// Adds the products of one unpacked quad.
///
/// # Safety
///
/// As [`Coefficients::word`] for all rows below `R` and the words of all quads that are added; so for what follows. The token
/// proves that the CPU has the instructions.
#[inline(always)]
pub(crate) unsafe fn add_quad<const VNNI: bool, const R: usize, const UNSIGNED: bool>(
    v: Avx2<VNNI>,
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
            *sum = v.add_bytes(*sum, a, b);
        }
    }
}

/// Adds the `N` quads of a word of 2-bit or 4-bit codes.
///
/// # Safety
///
/// As [`add_quad`].
#[inline(always)]
unsafe fn add_fields<const VNNI: bool, const N: usize, const R: usize, const U: bool>(
    v: Avx2<VNNI>,
    base: &[u8],
    word: usize,
    bits: usize,
    c: Coefficients<U>,
    sums: &mut Sums<R>,
) {
    // SAFETY: by this function's contract.
    unsafe {
        let words = load_codes(base, word * 128);
        for f in 0..N {
            add_quad(v, sums, field(words, f, bits), c, word * N + f);
        }
    }
}

/// Codes of 3 bits: fields of 2 bits and bit `bit` of every byte of `high`, which is worth 4.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn with_high_bit(low: [__m256i; 2], high: [__m256i; 2], bit: usize) -> [__m256i; 2] {
    std::array::from_fn(|i| {
        let moved = if bit < 2 {
            _mm256_sll_epi16(high[i], _mm_cvtsi32_si128(2 - bit as i32))
        } else {
            _mm256_srl_epi16(high[i], _mm_cvtsi32_si128(bit as i32 - 2))
        };
        _mm256_or_si256(_mm256_and_si256(moved, _mm256_set1_epi8(4)), low[i])
    })
}

/// Adds the eight quads of a word of the high plane.
///
/// # Safety
///
/// As [`add_quad`].
#[inline(always)]
unsafe fn add_3<const VNNI: bool, const R: usize, const U: bool>(
    v: Avx2<VNNI>,
    base: &[u8],
    quads: usize,
    pair: usize,
    c: Coefficients<U>,
    sums: &mut Sums<R>,
) {
    // SAFETY: by this function's contract.
    unsafe {
        let high = load_codes(base, (quads / 4 + pair) * 128);
        for half in 0..2 {
            let low = load_codes(base, (pair * 2 + half) * 128);
            for f in 0..4 {
                let bit = half * 4 + f;
                add_quad(v, sums, with_high_bit(field(low, f, 2), high, bit), c, pair * 8 + bit);
            }
        }
    }
}

/// The even and the odd bytes.
#[inline]
#[target_feature(enable = "avx2")]
fn even_and_odd(words: [__m256i; 2]) -> [[__m256i; 2]; 2] {
    let even = words.map(|w| _mm256_and_si256(w, _mm256_set1_epi16(0xff)));
    [even, words.map(|w| _mm256_srli_epi16::<8>(w))]
}

/// Adds a quad of 8-bit codes, in 32 bits.
///
/// # Safety
///
/// As [`add_quad`].
#[inline(always)]
unsafe fn add_8<const VNNI: bool, const R: usize, const U: bool>(
    v: Avx2<VNNI>,
    base: &[u8],
    quad: usize,
    c: Coefficients<U>,
    sums: &mut Sums<R>,
) {
    // SAFETY: by this function's contract.
    unsafe {
        for (i, codes) in even_and_odd(load_codes(base, quad * 128)).iter().enumerate() {
            for (row, sums) in sums.iter_mut().enumerate() {
                let c = c.word(row, 2 * quad + i);
                for half in 0..2 {
                    sums[half] = v.add_words(sums[half], codes[half], c);
                }
            }
        }
    }
}

/// Adds the quads of a word of ternary codes: five, or what is left.
///
/// # Safety
///
/// As [`add_quad`].
#[inline(always)]
unsafe fn add_ternary<const VNNI: bool, const R: usize, const U: bool>(
    v: Avx2<VNNI>,
    base: &[u8],
    quads: usize,
    word: usize,
    c: Coefficients<U>,
    sums: &mut Sums<R>,
) {
    // SAFETY: by this function's contract.
    unsafe {
        let [a, b] = load_codes(base, word * 128);
        for (f, (a, b)) in base_3(a).into_iter().zip(base_3(b)).enumerate() {
            if word * 5 + f < quads {
                add_quad(v, sums, [a, b], c, word * 5 + f);
            }
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
#[inline(always)]
unsafe fn add_tail<const VNNI: bool, const R: usize, const U: bool>(
    v: Avx2<VNNI>,
    tile: &Tile,
    bytes: &[u8],
    strip: usize,
    c: Coefficients<U>,
    sums: &mut Sums<R>,
) {
    let first = tile.depth() / QUAD - tile.tail_quads();
    for u in 0..tile.tail_quads() {
        let entry = u * (tile.lanes() / STRIP) + strip;
        // SAFETY: by this function's contract.
        unsafe {
            let words = load_codes(bytes, tile.tail_offset() + entry / 4 * 64);
            add_quad(v, sums, field(words, entry % 4, 2), c, first + u);
        }
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

    /// Compares all strips with sums over single codes, for coefficients that the kernels may be given: with a sign, and
    /// where codes leave room for it, of twice the size without.
    fn check<V: TileVector, const W: u8, const R: usize>(v: V, tile: &Tile, bytes: &[u8], c: &[Vec<i32>]) {
        check_signs::<V, W, R, false>(v, tile, bytes, c);
        if W != 8 {
            let c: Vec<Vec<i32>> = c.iter().map(|c| c.iter().map(|c| c + 128).collect()).collect();
            check_signs::<V, W, R, true>(v, tile, bytes, &c);
        }
    }

    fn check_signs<V: TileVector, const W: u8, const R: usize, const U: bool>(
        v: V,
        tile: &Tile,
        bytes: &[u8],
        c: &[Vec<i32>],
    ) {
        let stride = planes(W) * tile.depth();
        let quad = |q: &[i32]| match W {
            8 => [q[0], q[2], q[1], q[3]].iter().flat_map(|x| (*x as i16).to_le_bytes()).collect(),
            _ => q.iter().map(|x| *x as u8).collect::<Vec<u8>>(),
        };
        let packed: Vec<i8> = c.iter().flat_map(|c| c.chunks_exact(4).flat_map(quad)).map(|x| x as i8).collect();
        for strip in 0..tile.lanes() / STRIP {
            let codes = Codes::new(bytes, 0, false);
            let sums = v.dot::<W, R, U>(tile, codes, strip, Coefficients { bytes: &packed, stride });
            for (row, sums) in sums.iter().enumerate() {
                let mut lanes = [0; STRIP];
                v.store_i32(&mut lanes, 0, sums[0]);
                v.store_i32(&mut lanes, STRIP / 2, sums[1]);
                for (lane, sum) in lanes.into_iter().enumerate() {
                    let at = |d| i32::from(tile.get(bytes, strip * STRIP + lane, d)) * c[row][d];
                    assert_eq!(sum, (0..tile.depth()).map(at).sum::<i32>(), "{v:?} {tile:?} {strip} {row} {lane}");
                }
            }
        }
    }

    #[test]
    fn sums_are_exact_up_to_the_largest_codes_and_coefficients() {
        if let Some(IsaToken::Avx2(v)) = IsaToken::new(Isa::Avx2) {
            sums_are_exact(v);
        }
        if let Some(IsaToken::AvxVnni(v)) = IsaToken::new(Isa::AvxVnni) {
            sums_are_exact(v);
        }
    }

    fn sums_are_exact<V: TileVector>(v: V) {
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
                        by_width_and_rows!(v: V, width, rows, check(&tile, &bytes, &c[..rows]));
                    }
                }
            }
        }
    }
}
