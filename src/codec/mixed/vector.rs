//! What codecs ask of an instruction set for mixed tiles.
#![forbid(unsafe_code)]

use super::{listed, MixedPage, MixedTile, Rounded, Segments, MAX_DEPTH};
use crate::codec::tile::vector::{Codes, Coefficients, Sums, TileVector};

/// Most rows of coefficients that a pass over the codes serves.
pub(super) const MAX_ROWS: usize = 8;
/// What rows of rounded coefficients are a whole number of apart.
pub(super) const ROUNDED: usize = 64;

/// An instruction set with byte dot products on mixed tiles.
pub(crate) trait MixedVector: TileVector {
    /// Puts the rows `rows[..R]` of coefficients times the factors in the order of the depth and rounds them, or what rounding
    /// leaves of them, to int8, rows a whole number of [`ROUNDED`] apart.
    fn round_rows<const R: usize, const IS_REST: bool>(
        self,
        page: &MixedPage,
        x: &[f32],
        rows: &[usize; MAX_ROWS],
        int8: &mut [i8],
    ) -> [Rounded; R];
    /// Asks for part `part` of `parts` of the next page's codes, unless they are asked for as these are read.
    fn ask_codes(self, page: &MixedPage, part: usize, parts: usize);
    /// Dot products of the lanes of a strip with `R` rows of coefficients, which are in the order of the depth.
    fn mixed_dot<const NORMAL: bool, const R: usize>(
        self,
        tile: &MixedTile,
        segments: &Segments,
        codes: Codes,
        strip: usize,
        coefficients: Coefficients,
    ) -> Sums<Self, R>;
    /// Unpacks what the codes of a strip stand for, as [`TileVector::unpack`].
    fn unpack_mixed<const NORMAL: bool>(
        self,
        tile: &MixedTile,
        segments: &Segments,
        codes: Codes,
        strip: usize,
        out: &mut [u8],
    );
    /// `out[row * stride + d] = sum_lane weights[row * lanes + lane] * code[lane][d]` for `R` rows, at most 4, of weights between
    /// -127 and 127.
    fn lane_sums<const R: usize>(
        self,
        tile: &MixedTile,
        segments: &Segments,
        codes: &[u8],
        weights: &[i8],
        out: &mut [f32],
        stride: usize,
    );
    /// `x[index]` of a row of `32 * B`; any value for an index beyond it.
    fn permute<const B: usize>(self, x: &[f32], index: Self::I32) -> Self::F32;
}

/// Runs a kernel over `$v: $V` with the kind of levels and the number of rows as constants.
macro_rules! by_levels_and_rows {
    ($v:ident: $V:ident, $normal:expr, $rows:expr, $call:ident $args:tt) => {
        if $normal {
            by_levels_and_rows!(@rows $v $V true, $rows, $call $args)
        } else {
            by_levels_and_rows!(@rows $v $V false, $rows, $call $args)
        }
    };
    (@rows $v:ident $V:ident $normal:literal, $rows:expr, $call:ident $args:tt) => {
        match $rows {
            1 => by_levels_and_rows!(@run $v $V $normal 1, $call $args),
            2 => by_levels_and_rows!(@run $v $V $normal 2, $call $args),
            3 => by_levels_and_rows!(@run $v $V $normal 3, $call $args),
            5 if $V::MAX_ROWS > 4 => by_levels_and_rows!(@run $v $V $normal 5, $call $args),
            6 if $V::MAX_ROWS > 4 => by_levels_and_rows!(@run $v $V $normal 6, $call $args),
            7 if $V::MAX_ROWS > 4 => by_levels_and_rows!(@run $v $V $normal 7, $call $args),
            8 if $V::MAX_ROWS > 4 => by_levels_and_rows!(@run $v $V $normal 8, $call $args),
            _ => by_levels_and_rows!(@run $v $V $normal 4, $call $args),
        }
    };
    (@run $v:ident $V:ident $normal:literal $r:literal, $call:ident ( $($arg:expr),* )) => {
        $v.run(#[inline(always)] |v| $call::<$V, $normal, $r>(v, $($arg),*))
    };
}
pub(crate) use by_levels_and_rows;

/// [`MixedPage::add_products`] on the codes as they are, a few rows at a time, with coefficients rounded to int8.
#[inline(always)]
pub(super) fn add_few<V: MixedVector>(v: V, page: &MixedPage, x: &[f32], out: &mut [f32], stride: usize) {
    let depth = page.factors.len();
    for (group, x) in x.chunks(V::MAX_ROWS * depth).enumerate() {
        let out = &mut out[group * V::MAX_ROWS * stride..];
        let n = x.len() / depth;
        let coarse = by_levels_and_rows!(v: V, page.normal, n, add_rows(page, x, out, stride, group == 0));
        let (rows, n) = listed(&coarse[..n]);
        if n > 0 {
            by_levels_and_rows!(v: V, page.normal, n, add_rest(page, x, &rows, out, stride));
        }
    }
}

/// Adds the products of `R` rows and gives which of them are coarse.
#[inline(always)]
fn add_rows<V: MixedVector, const NORMAL: bool, const R: usize>(
    v: V,
    page: &MixedPage,
    x: &[f32],
    out: &mut [f32],
    stride: usize,
    ask: bool,
) -> [bool; MAX_ROWS] {
    let out = &mut out[..(R - 1) * stride + page.tile.lanes];
    add::<V, NORMAL, R, false>(v, page, x, &std::array::from_fn(|row| row), out, stride, ask)
}

/// Adds what rounding left of the `R` coarse rows `rows`.
#[inline(always)]
pub(super) fn add_rest<V: MixedVector, const NORMAL: bool, const R: usize>(
    v: V,
    page: &MixedPage,
    x: &[f32],
    rows: &[usize; MAX_ROWS],
    out: &mut [f32],
    stride: usize,
) {
    add::<V, NORMAL, R, true>(v, page, x, rows, out, stride, false);
}

/// Adds the products of the rows `rows[..R]` of `x`, or of what rounding left of them, to the same rows of `out`. With `ask` the
/// next page is asked for.
#[inline(always)]
fn add<V: MixedVector, const NORMAL: bool, const R: usize, const IS_REST: bool>(
    v: V,
    page: &MixedPage,
    x: &[f32],
    rows: &[usize; MAX_ROWS],
    out: &mut [f32],
    stride: usize,
    ask: bool,
) -> [bool; MAX_ROWS] {
    let stride_int8 = page.factors.len().next_multiple_of(ROUNDED);
    let mut int8 = [[0i8; MAX_DEPTH]; R];
    let int8 = &mut int8.as_flattened_mut()[..R * stride_int8];
    let rounded = v.round_rows::<R, IS_REST>(page, x, rows, int8);
    let (mut scale, mut offset) = ([v.splat(0.0); R], [v.splat(0.0); R]);
    for i in 0..R {
        (scale[i], offset[i]) = (v.splat(rounded[i].unit), v.splat(rounded[i].offset));
    }
    let codes = Codes::new(page.codes, page.page_bytes, ask);
    let strips = page.tile.lanes / V::STRIP;
    for strip in 0..strips {
        if ask {
            v.ask_codes(page, strip, strips);
        }
        let coefficients = Coefficients { bytes: int8, stride: stride_int8 };
        let sums = v.mixed_dot::<NORMAL, R>(page.tile, &page.segments, codes, strip, coefficients);
        for row in 0..R {
            for half in 0..2 {
                let at = rows[row] * stride + strip * V::STRIP + half * V::LANES;
                let sum = v.mul_add(v.to_f32(sums[row][half]), scale[row], offset[row]);
                v.store(out, at, v.add(v.load(out, at), sum));
            }
        }
    }
    std::array::from_fn(|i| i < R && rounded[i.min(R - 1)].is_coarse)
}
