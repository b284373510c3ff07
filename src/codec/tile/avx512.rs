//! AVX-512 (VNNI, VBMI) byte dot products straight on the codes of a tile.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::vector::{Codes, Coefficients, TileVector};
use super::{Tile, LANE_BLOCK, QUAD};
use crate::codec::query::PLANE;
use crate::simd::amx;
use crate::simd::avx2::prefetch_next_from;
use crate::simd::avx512::{pack_bytes, store_bytes, store_i32};
use crate::simd::isa::Avx512;
use crate::simd::vector::by_instructions;

/// Coefficient rows that one pass over the codes serves: as many accumulators as registers allow.
pub(crate) const MAX_ROWS: usize = 8;

/// Sums of one lane block for `R` coefficient rows: `[row][half of the block]`, sixteen lanes each.
pub(crate) type Sums<const R: usize> = [[__m512i; 2]; R];

impl TileVector for Avx512 {
    const MAX_ROWS: usize = MAX_ROWS;
    const PLANE_ROWS: usize = 2;
    type Many = Many;

    #[inline(always)]
    fn dot<const W: u8, const R: usize, const UNSIGNED: bool>(
        self,
        tile: &Tile,
        codes: Codes,
        strip: usize,
        coefficients: Coefficients<UNSIGNED>,
    ) -> Sums<R> {
        // SAFETY: the token proves that the CPU has the instructions.
        unsafe { dot::<W, R, UNSIGNED>(tile, codes, strip, coefficients) }
    }

    #[inline(always)]
    fn many_rows(self) -> usize {
        MAX_ROWS + 1
    }

    by_instructions! {
        fn unpack<const W: u8>(tile: &Tile, codes: Codes, strip: usize, out: &mut [u8]) = {
            unpack::<W>(tile, codes, strip, out)
        };
    }

    #[inline(always)]
    fn begin_many(self, rows: usize, depth: usize) -> Many {
        // SAFETY: the token says whether this process may use them, and a thread has one `Many` at a time.
        Many { rows, depth, registers: self.has_amx().then(|| unsafe { amx::Registers::new(rows, depth) }) }
    }

    #[inline(always)]
    fn multiply<const UNSIGNED: bool>(
        self,
        many: &Many,
        codes: &[u8],
        coefficients: Coefficients<UNSIGNED>,
        sums: &mut [i32],
    ) {
        // SAFETY: the token proves that the CPU has the instructions.
        unsafe { multiply(many, codes, coefficients, sums) }
    }

    #[inline(always)]
    fn take_planes<'a>(self, planes: &'a [i8], _rows: usize, _room: &'a mut [i8]) -> &'a [i8] {
        planes
    }

    by_instructions! {
        fn store_planes(row: &mut [i8], at: usize, x: [__m512i; 4]) = store_planes(row, at, x);
    }

    #[inline(always)]
    fn ask_part(self, _page: &[u8], _part: usize, _parts: usize) {}

    #[inline(always)]
    fn ask_behind(self, page: &[u8], from: usize) {
        prefetch_next_from(page, from);
    }
}

impl<const UNSIGNED: bool> Coefficients<'_, UNSIGNED> {
    /// The four coefficients of a quad, in every lane.
    ///
    /// # Safety
    ///
    /// `row * stride + 4 * quad + 4 <= bytes.len()`, which `dot` checks once for its last row and quad.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn quad(&self, row: usize, quad: usize) -> __m512i {
        // SAFETY: within the slice, by this function's contract.
        _mm512_set1_epi32(unsafe {
            self.bytes.as_ptr().add(row * self.stride + quad * QUAD).cast::<i32>().read_unaligned()
        })
    }
}

impl Codes<'_> {
    /// The 128 bytes at `at`. What is wanted soon is asked for as these are read: a burst of requests at the start of a page
    /// would wait for free line buffers. Into the second level, since on its way to the first a line holds one of the few
    /// buffers that loads need (measured in docs/notes.md).
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(crate) fn load(&self, at: usize) -> [__m512i; 2] {
        let bytes = &self.bytes[at..at + 128];
        let (first, second) = (bytes.as_ptr(), bytes.as_ptr().wrapping_add(64));
        // SAFETY: the slice holds 128 bytes; prefetching is a hint, which no address makes fault.
        unsafe {
            _mm_prefetch::<_MM_HINT_T1>(first.wrapping_add(self.ahead).cast());
            _mm_prefetch::<_MM_HINT_T1>(second.wrapping_add(self.ahead).cast());
            [_mm512_loadu_si512(first.cast()), _mm512_loadu_si512(second.cast())]
        }
    }
}

/// Adds the products of one unpacked quad of 32 lanes.
///
/// # Safety
///
/// As [`Coefficients::quad`] for all rows below `R`.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
pub(crate) unsafe fn add_quad<const R: usize, const UNSIGNED: bool>(
    sums: &mut Sums<R>,
    codes: [__m512i; 2],
    coefficients: Coefficients<UNSIGNED>,
    quad: usize,
) {
    for (row, sums) in sums.iter_mut().enumerate() {
        // SAFETY: by this function's contract.
        let c = unsafe { coefficients.quad(row, quad) };
        for (sum, codes) in sums.iter_mut().zip(codes) {
            // Which of the two is unsigned decides the order.
            let (a, b) = if UNSIGNED { (c, codes) } else { (codes, c) };
            *sum = _mm512_dpbusd_epi32(*sum, a, b);
        }
    }
}

/// Field `index` of `bits` bits of every byte.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(crate) fn field(words: [__m512i; 2], index: usize, mask: __m512i, bits: usize) -> [__m512i; 2] {
    let count = _mm_cvtsi32_si128((index * bits) as i32);
    words.map(|w| _mm512_and_si512(_mm512_srl_epi16(w, count), mask))
}

/// Dot products of the lanes of block `block` of a tile with `R` coefficient rows of the tile's depth.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
fn dot<const W: u8, const R: usize, const UNSIGNED: bool>(
    tile: &Tile,
    codes: Codes,
    block: usize,
    coefficients: Coefficients<UNSIGNED>,
) -> Sums<R> {
    assert!((R - 1) * coefficients.stride + tile.depth() <= coefficients.bytes.len());
    let mut sums = [[_mm512_setzero_si512(); 2]; R];
    // SAFETY: the assertion above covers the last quad of the last row.
    each_quad::<W>(tile, codes, block, |quad, codes| unsafe { add_quad(&mut sums, codes, coefficients, quad) });
    sums
}

/// [`TileVector::unpack`]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
fn unpack<const W: u8>(tile: &Tile, codes: Codes, strip: usize, out: &mut [u8]) {
    let out = &mut out[..tile.depth() * LANE_BLOCK];
    each_quad::<W>(tile, codes, strip, |quad, codes| store_quad(out, quad, codes));
}

/// Puts quad `quad` of a strip where [`TileVector::unpack`] says.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn store_quad(out: &mut [u8], quad: usize, codes: [__m512i; 2]) {
    let out = &mut out[quad * 128..][..128];
    // SAFETY: the slice holds 128 bytes.
    unsafe {
        _mm512_storeu_si512(out.as_mut_ptr().cast(), codes[0]);
        _mm512_storeu_si512(out.as_mut_ptr().add(64).cast(), codes[1]);
    }
}

/// How many rows, of how many coefficients, and the registers of AMX for them.
pub(crate) struct Many {
    rows: usize,
    depth: usize,
    registers: Option<amx::Registers>,
}

/// [`TileVector::multiply`]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
fn multiply<const UNSIGNED: bool>(many: &Many, codes: &[u8], coefficients: Coefficients<UNSIGNED>, sums: &mut [i32]) {
    let Coefficients { bytes, stride } = coefficients;
    if let Some(registers) = &many.registers {
        let size = (many.rows, many.depth);
        // SAFETY: they are for this size.
        return unsafe { registers.multiply::<UNSIGNED>(size, (bytes, stride), codes, (sums, LANE_BLOCK)) };
    }
    let codes = &codes[..many.depth * LANE_BLOCK];
    for row in (0..many.rows).step_by(MAX_ROWS) {
        let c = Coefficients { bytes: &bytes[row * stride..], stride };
        let sums = &mut sums[row * LANE_BLOCK..];
        match many.rows - row {
            1 => multiply_rows::<1, UNSIGNED>(codes, c, sums),
            2 => multiply_rows::<2, UNSIGNED>(codes, c, sums),
            3 => multiply_rows::<3, UNSIGNED>(codes, c, sums),
            4 => multiply_rows::<4, UNSIGNED>(codes, c, sums),
            5 => multiply_rows::<5, UNSIGNED>(codes, c, sums),
            6 => multiply_rows::<6, UNSIGNED>(codes, c, sums),
            7 => multiply_rows::<7, UNSIGNED>(codes, c, sums),
            _ => multiply_rows::<MAX_ROWS, UNSIGNED>(codes, c, sums),
        }
    }
}

/// `R` rows of them.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn multiply_rows<const R: usize, const UNSIGNED: bool>(
    codes: &[u8],
    coefficients: Coefficients<UNSIGNED>,
    sums: &mut [i32],
) {
    assert!((R - 1) * coefficients.stride + codes.len() / LANE_BLOCK <= coefficients.bytes.len());
    let mut products = [[_mm512_setzero_si512(); 2]; R];
    for (quad, codes) in codes.chunks_exact(128).enumerate() {
        // SAFETY: the chunk holds 128 bytes, and the assertion above covers the last quad of the last row.
        unsafe {
            let codes = [_mm512_loadu_si512(codes.as_ptr().cast()), _mm512_loadu_si512(codes.as_ptr().add(64).cast())];
            add_quad(&mut products, codes, coefficients, quad);
        }
    }
    for (row, products) in products.into_iter().enumerate() {
        store_i32(sums, row * LANE_BLOCK, products[0]);
        store_i32(sums, row * LANE_BLOCK + LANE_BLOCK / 2, products[1]);
    }
}

/// Calls `f(quad, codes)` for every quad of the lanes of block `block` of a tile, unpacked.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
fn each_quad<const W: u8>(tile: &Tile, codes: Codes, block: usize, f: impl FnMut(usize, [__m512i; 2])) {
    let (quads, mut f) = (tile.depth() / QUAD, f);
    let base = codes.part(block * tile.block_bytes(), tile.block_bytes());
    match W {
        2 => fields::<4>(base, quads, 2, f),
        3 => three_bits(base, quads, f),
        4 => fields::<2>(base, quads, 4, f),
        8 => (0..quads).for_each(|quad| f(quad, base.load(quad * 128))),
        _ => {
            ternary(base, quads, &mut f);
            tail(tile, codes.bytes, block, f);
        }
    }
}

/// The `N` quads of each word of 2-bit or 4-bit codes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn fields<const N: usize>(base: Codes, quads: usize, bits: usize, mut f: impl FnMut(usize, [__m512i; 2])) {
    let mask = _mm512_set1_epi8((1 << bits) - 1);
    for word in 0..quads / N {
        let words = base.load(word * 128);
        for i in 0..N {
            f(word * N + i, field(words, i, mask, bits));
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn three_bits(base: Codes, quads: usize, mut f: impl FnMut(usize, [__m512i; 2])) {
    let (mask, high_mask) = (_mm512_set1_epi8(3), _mm512_set1_epi8(4));
    for pair in 0..quads / 8 {
        let high = base.load((quads / 4 + pair) * 128);
        for half in 0..2 {
            let low = base.load((pair * 2 + half) * 128);
            for i in 0..4 {
                let bit = half * 4 + i;
                let low = field(low, i, mask, 2);
                let codes = std::array::from_fn(|i| {
                    // Bring the bit to the place worth 4.
                    let moved = if bit < 2 {
                        _mm512_sll_epi16(high[i], _mm_cvtsi32_si128(2 - bit as i32))
                    } else {
                        _mm512_srl_epi16(high[i], _mm_cvtsi32_si128(bit as i32 - 2))
                    };
                    _mm512_ternarylogic_epi32::<0xea>(moved, high_mask, low[i])
                });
                f(pair * 8 + bit, codes);
            }
        }
    }
}

/// The first four base-3 digits of 0..=80 as 2-bit fields: what the lower 81 of a 128-entry byte table hold.
const DIGITS: [u8; 128] = {
    let mut table = [0u8; 128];
    let mut i = 0;
    while i < 81 {
        table[i] = (i % 3 + i / 3 % 3 * 4 + i / 9 % 3 * 16 + i / 27 * 64) as u8;
        i += 1;
    }
    table
};

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vbmi")]
fn ternary(base: Codes, quads: usize, mut f: impl FnMut(usize, [__m512i; 2])) {
    let (mask, one, top) = (_mm512_set1_epi8(3), _mm512_set1_epi8(1), _mm512_set1_epi8(81));
    let table = Codes::new(&DIGITS, 0, false).load(0);
    for word in 0..base.bytes.len() / 128 {
        let words = base.load(word * 128);
        let (mut digits, mut fifth) = (words, words);
        for i in 0..2 {
            let some = _mm512_cmpge_epu8_mask(words[i], top);
            let two = _mm512_cmpge_epu8_mask(words[i], _mm512_set1_epi8(162u8 as i8));
            let rest = _mm512_mask_sub_epi8(words[i], some, words[i], top);
            let rest = _mm512_mask_sub_epi8(rest, two, rest, top);
            digits[i] = _mm512_permutex2var_epi8(table[0], rest, table[1]);
            let digit = _mm512_maskz_mov_epi8(some, one);
            fifth[i] = _mm512_mask_add_epi8(digit, two, digit, one);
        }
        for i in 0..4.min(quads - word * 5) {
            f(word * 5 + i, field(digits, i, mask, 2));
        }
        if word * 5 + 4 < quads {
            f(word * 5 + 4, fifth);
        }
    }
}

/// The left-over quads of ternary codes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn tail(tile: &Tile, bytes: &[u8], block: usize, mut f: impl FnMut(usize, [__m512i; 2])) {
    let first = tile.depth() / QUAD - tile.tail_quads();
    for u in 0..tile.tail_quads() {
        let codes = std::array::from_fn(|half| {
            let entry = u * (tile.lanes() / 16) + block * 2 + half;
            let vector = &bytes[tile.tail_offset() + entry / 4 * 64..][..64];
            // SAFETY: the slice holds 64 bytes.
            let words = unsafe { _mm512_loadu_si512(vector.as_ptr().cast()) };
            field([words; 2], entry % 4, _mm512_set1_epi8(3), 2)[0]
        });
        f(first + u, codes);
    }
}

/// Stores the high and the low plane of coefficients.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn store_planes(row: &mut [i8], at: usize, x: [__m512i; 4]) {
    let high = x.map(|x| _mm512_srai_epi32::<7>(_mm512_add_epi32(x, _mm512_set1_epi32(PLANE / 2))));
    let low = std::array::from_fn(|i| _mm512_sub_epi32(x[i], _mm512_slli_epi32::<7>(high[i])));
    let (high_plane, low_plane) = row.split_at_mut(row.len() / 2);
    store_bytes(high_plane, at, pack_bytes(high));
    store_bytes(low_plane, at, pack_bytes(low));
}
