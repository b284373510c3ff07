//! AVX-512 (VNNI, VBMI) byte dot products straight on the codes of a tile.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::{Tile, QUAD};
use crate::codec::query::PLANE;

/// Coefficient rows that one pass over the codes serves: as many accumulators as registers allow.
pub(crate) const MAX_ROWS: usize = 8;

/// Sums of one lane block for `R` coefficient rows: `[row][half of the block]`, sixteen lanes each.
pub(crate) type Sums<const R: usize> = [[__m512i; 2]; R];

/// `R` rows of coefficients of a byte, `stride` apart: int8 or, `UNSIGNED`, uint8, of which weights, having no sign, get a
/// unit half as large. Codes of 8 bits need their own eighth bit, so their coefficients are int8.
#[derive(Clone, Copy)]
pub(crate) struct Coefficients<'a, const UNSIGNED: bool = false> {
    pub(crate) int8: &'a [i8],
    pub(crate) stride: usize,
}

impl<const UNSIGNED: bool> Coefficients<'_, UNSIGNED> {
    /// The four coefficients of a quad, in every lane.
    ///
    /// # Safety
    ///
    /// `row * stride + 4 * quad + 4 <= int8.len()`, which `dot` checks once for its last row and quad.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn quad(&self, row: usize, quad: usize) -> __m512i {
        // SAFETY: within the slice, by this function's contract.
        _mm512_set1_epi32(unsafe {
            self.int8.as_ptr().add(row * self.stride + quad * QUAD).cast::<i32>().read_unaligned()
        })
    }
}

/// Packed codes with the distance to those that are wanted soon, which are asked for as these are read: a burst of
/// requests at the start of a page would wait for free line buffers. Into the second level, since on its way to the first
/// a line holds one of the few buffers that loads need (measured in docs/notes.md).
#[derive(Clone, Copy)]
pub(crate) struct Codes<'a> {
    bytes: &'a [u8],
    /// Bytes from here to the same place of the page that is asked for; 0: none.
    ahead: usize,
}

impl<'a> Codes<'a> {
    /// Codes of a page of `page_bytes`. With `ask` the page after the next is asked for.
    pub(crate) fn new(bytes: &'a [u8], page_bytes: usize, ask: bool) -> Self {
        Codes { bytes, ahead: if ask { 2 * page_bytes } else { 0 } }
    }

    /// The 128 bytes at `at`.
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

    /// A part of them.
    pub(crate) fn part(&self, at: usize, len: usize) -> Self {
        Codes { bytes: &self.bytes[at..at + len], ahead: self.ahead }
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
pub(crate) fn dot<const W: u8, const R: usize, const UNSIGNED: bool>(
    tile: &Tile,
    codes: Codes,
    block: usize,
    coefficients: Coefficients<UNSIGNED>,
) -> Sums<R> {
    let quads = tile.depth() / QUAD;
    assert!((R - 1) * coefficients.stride + tile.depth() <= coefficients.int8.len());
    let base = codes.part(block * tile.block_bytes(), tile.block_bytes());
    let mut sums = [[_mm512_setzero_si512(); 2]; R];
    // SAFETY: every quad below is less than `quads`, and the assertion above covers the last quad of the last row.
    unsafe {
        match W {
            2 => dot_2(base, quads, coefficients, &mut sums),
            3 => dot_3(base, quads, coefficients, &mut sums),
            4 => dot_4(base, quads, coefficients, &mut sums),
            8 => {
                for quad in 0..quads {
                    add_quad(&mut sums, base.load(quad * 128), coefficients, quad);
                }
            }
            _ => {
                dot_ternary(base, quads, coefficients, &mut sums);
                dot_tail(tile, codes.bytes, block, coefficients, &mut sums);
            }
        }
    }
    sums
}

/// # Safety
///
/// As [`Coefficients::quad`] for all rows below `R` and quads below `quads`; so for the functions that follow.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn dot_2<const R: usize, const U: bool>(base: Codes, quads: usize, c: Coefficients<U>, sums: &mut Sums<R>) {
    let mask = _mm512_set1_epi8(3);
    for word in 0..quads / 4 {
        let words = base.load(word * 128);
        for f in 0..4 {
            // SAFETY: by this function's contract.
            unsafe { add_quad(sums, field(words, f, mask, 2), c, word * 4 + f) };
        }
    }
}

/// # Safety
///
/// As [`dot_2`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn dot_3<const R: usize, const U: bool>(base: Codes, quads: usize, c: Coefficients<U>, sums: &mut Sums<R>) {
    let (mask, high_mask) = (_mm512_set1_epi8(3), _mm512_set1_epi8(4));
    for pair in 0..quads / 8 {
        let high = base.load((quads / 4 + pair) * 128);
        for half in 0..2 {
            let low = base.load((pair * 2 + half) * 128);
            for f in 0..4 {
                let bit = half * 4 + f;
                let low = field(low, f, mask, 2);
                let codes = std::array::from_fn(|i| {
                    // Bring the bit to the place worth 4.
                    let moved = if bit < 2 {
                        _mm512_sll_epi16(high[i], _mm_cvtsi32_si128(2 - bit as i32))
                    } else {
                        _mm512_srl_epi16(high[i], _mm_cvtsi32_si128(bit as i32 - 2))
                    };
                    _mm512_ternarylogic_epi32::<0xea>(moved, high_mask, low[i])
                });
                // SAFETY: by this function's contract.
                unsafe { add_quad(sums, codes, c, pair * 8 + bit) };
            }
        }
    }
}

/// # Safety
///
/// As [`dot_2`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn dot_4<const R: usize, const U: bool>(base: Codes, quads: usize, c: Coefficients<U>, sums: &mut Sums<R>) {
    let mask = _mm512_set1_epi8(15);
    for word in 0..quads / 2 {
        let words = base.load(word * 128);
        for f in 0..2 {
            // SAFETY: by this function's contract.
            unsafe { add_quad(sums, field(words, f, mask, 4), c, word * 2 + f) };
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

/// # Safety
///
/// As [`dot_2`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vbmi")]
unsafe fn dot_ternary<const R: usize, const U: bool>(
    base: Codes,
    quads: usize,
    c: Coefficients<U>,
    sums: &mut Sums<R>,
) {
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
        for f in 0..4.min(quads - word * 5) {
            // SAFETY: by this function's contract.
            unsafe { add_quad(sums, field(digits, f, mask, 2), c, word * 5 + f) };
        }
        if word * 5 + 4 < quads {
            // SAFETY: by this function's contract.
            unsafe { add_quad(sums, fifth, c, word * 5 + 4) };
        }
    }
}

/// # Safety
///
/// As [`dot_2`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn dot_tail<const R: usize, const U: bool>(
    tile: &Tile,
    bytes: &[u8],
    block: usize,
    c: Coefficients<U>,
    sums: &mut Sums<R>,
) {
    let first = tile.depth() / QUAD - tile.tail_quads();
    for u in 0..tile.tail_quads() {
        let codes = std::array::from_fn(|half| {
            let entry = u * (tile.lanes() / 16) + block * 2 + half;
            let vector = &bytes[tile.tail_offset() + entry / 4 * 64..][..64];
            // SAFETY: the slice holds 64 bytes.
            let words = unsafe { _mm512_loadu_si512(vector.as_ptr().cast()) };
            field([words; 2], entry % 4, _mm512_set1_epi8(3), 2)[0]
        });
        // SAFETY: by this function's contract.
        unsafe { add_quad(sums, codes, c, first + u) };
    }
}

/// The sums of row `i` as floats; with two planes, the high one weighs [`PLANE`].
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn float_sum<const R: usize>(sums: &Sums<R>, i: usize, half: usize, planes: usize) -> __m512 {
    if planes == 1 {
        return _mm512_cvtepi32_ps(sums[i][half]);
    }
    let (high, low) = (_mm512_cvtepi32_ps(sums[2 * i][half]), _mm512_cvtepi32_ps(sums[2 * i + 1][half]));
    _mm512_fmadd_ps(high, _mm512_set1_ps(PLANE as f32), low)
}

/// Calls a kernel with the width and the number of rows as constants.
macro_rules! by_width_and_rows {
    ($width:expr, $rows:expr, $call:ident ( $($arg:expr),* )) => {
        match $width {
            Width::Ternary => by_width_and_rows!(@rows 1, $rows, $call($($arg),*)),
            Width::Bits2 => by_width_and_rows!(@rows 2, $rows, $call($($arg),*)),
            Width::Bits3 => by_width_and_rows!(@rows 3, $rows, $call($($arg),*)),
            Width::Bits4 => by_width_and_rows!(@rows 4, $rows, $call($($arg),*)),
            Width::Bits8 => by_width_and_rows!(@rows 8, $rows, $call($($arg),*)),
        }
    };
    (@rows $w:literal, $rows:expr, $call:ident ( $($arg:expr),* )) => {
        match $rows {
            1 => $call::<$w, 1>($($arg),*),
            2 => $call::<$w, 2>($($arg),*),
            3 => $call::<$w, 3>($($arg),*),
            4 => $call::<$w, 4>($($arg),*),
            5 => $call::<$w, 5>($($arg),*),
            6 => $call::<$w, 6>($($arg),*),
            7 => $call::<$w, 7>($($arg),*),
            _ => $call::<$w, 8>($($arg),*),
        }
    };
}
pub(crate) use by_width_and_rows;
