//! What codecs ask of an instruction set for mixed tiles.
#![forbid(unsafe_code)]

use super::{MixedPage, MixedTile, Segments};
use crate::codec::tile::vector::{Codes, Coefficients, Sums, TileVector};

/// An instruction set with byte dot products on mixed tiles.
pub(crate) trait MixedVector: TileVector {
    /// [`MixedPage::add_products`] on the codes as they are, with coefficients rounded to int8.
    fn add_products(self, page: &MixedPage, x: &[f32], out: &mut [f32], stride: usize);
    /// Dot products of the lanes of a strip with `R` rows of coefficients, which are in the order of the depth.
    fn mixed_dot<const NORMAL: bool, const R: usize>(
        self,
        tile: &MixedTile,
        segments: &Segments,
        codes: Codes,
        strip: usize,
        coefficients: Coefficients,
    ) -> Sums<Self, R>;
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
