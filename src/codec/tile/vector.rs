//! What codecs ask of an instruction set beside vectors: byte dot products straight on the codes of a tile.
#![forbid(unsafe_code)]

use super::Tile;
use crate::codec::query::PLANE;
use crate::simd::vector::Vector;

/// Sums of one strip of lanes for `R` rows of coefficients: `[row][half of the strip]`.
pub(crate) type Sums<V, const R: usize> = [[<V as Vector>::I32; 2]; R];

/// Most rows of coefficients that [`TileVector::multiply`] takes.
pub(crate) const MANY_ROWS: usize = 32;

/// `R` rows of coefficients of a byte, `stride` apart: int8 or, `UNSIGNED`, uint8, of which weights, having no sign, get a
/// unit half as large. Codes of 8 bits need their own eighth bit and finer coefficients: see [`TileVector::PLANE_ROWS`].
#[derive(Clone, Copy)]
pub(crate) struct Coefficients<'a, const UNSIGNED: bool = false> {
    pub(crate) bytes: &'a [i8],
    pub(crate) stride: usize,
}

/// Packed codes, and those that are wanted soon.
#[derive(Clone, Copy)]
pub(crate) struct Codes<'a> {
    pub(crate) bytes: &'a [u8],
    /// Bytes from here to the same place of the page that is asked for; 0: none.
    pub(super) ahead: usize,
}

impl<'a> Codes<'a> {
    /// Codes of a page of `page_bytes`. With `ask` the page after the next is asked for.
    pub(crate) fn new(bytes: &'a [u8], page_bytes: usize, ask: bool) -> Self {
        Codes { bytes, ahead: if ask { 2 * page_bytes } else { 0 } }
    }

    /// A part of them.
    pub(crate) fn part(&self, at: usize, len: usize) -> Self {
        Codes { bytes: &self.bytes[at..at + len], ahead: self.ahead }
    }
}

/// An instruction set with byte dot products on tiles.
pub(crate) trait TileVector: Vector {
    /// Rows of coefficients that one pass over the codes serves: as many accumulators as registers allow.
    const MAX_ROWS: usize;
    /// Lanes of one pass: two vectors of sums.
    const STRIP: usize = 2 * Self::LANES;
    /// Coefficients of codes of 8 bits take two bytes. These are 2 rows of int8, of which the first weighs [`PLANE`], or 1 row of
    /// int16.
    const PLANE_ROWS: usize;
    /// What many rows at once take beside the proof.
    type Many;

    /// Dot products of the lanes of a strip of a tile with `R` rows of coefficients of the tile's depth.
    fn dot<const W: u8, const R: usize, const UNSIGNED: bool>(
        self,
        tile: &Tile,
        codes: Codes,
        strip: usize,
        coefficients: Coefficients<UNSIGNED>,
    ) -> Sums<Self, R>;
    /// Rows of coefficients, at fewest, for which the codes of a page are first unpacked to bytes: [`MAX_ROWS`](TileVector::MAX_ROWS)
    /// at a time would unpack them again and again.
    fn many_rows(self) -> usize;
    /// Unpacks the codes of a strip: `out[quad][lane of the strip][code of the quad]`.
    fn unpack<const W: u8>(self, tile: &Tile, codes: Codes, strip: usize, out: &mut [u8]);
    /// Makes ready for [`TileVector::multiply`] with `rows` rows, at most [`MANY_ROWS`], of `depth` coefficients.
    fn begin_many(self, rows: usize, depth: usize) -> Self::Many;
    /// Dot products of the lanes of an unpacked strip with many rows of coefficients: `sums[row][lane of the strip]`.
    fn multiply<const UNSIGNED: bool>(
        self,
        many: &Self::Many,
        codes: &[u8],
        coefficients: Coefficients<UNSIGNED>,
        sums: &mut [i32],
    );
    /// Makes of `rows` rows of two planes, high and low, what [`TileVector::dot`] takes for codes of 8 bits, in `room` if it is
    /// something else.
    fn take_planes<'a>(self, planes: &'a [i8], rows: usize, room: &'a mut [i8]) -> &'a [i8];
    /// Writes coefficients from `at` on of one row for codes of 8 bits.
    fn store_planes(self, row: &mut [i8], at: usize, x: [Self::I32; 4]);
    /// Asks for part `part` of `parts` of the page after this one, unless codes are asked for as they are read.
    fn ask_part(self, page: &[u8], part: usize, parts: usize);
    /// Asks for what the next page has from byte `from` on, if only codes are asked for as they are read.
    fn ask_behind(self, page: &[u8], from: usize);
}

/// Bytes of a coefficient.
pub(crate) const fn planes(width: u8) -> usize {
    if width == 8 {
        2
    } else {
        1
    }
}

/// Rows of [`TileVector::dot`] that a row of coefficients of so many bytes takes.
pub(crate) const fn dot_rows<V: TileVector>(planes: usize) -> usize {
    if planes == 2 {
        V::PLANE_ROWS
    } else {
        1
    }
}

/// The sums of row `i` of coefficients, which takes `dot_rows` rows, as floats.
#[inline(always)]
pub(crate) fn float_sum<V: TileVector, const R: usize>(
    v: V,
    sums: &Sums<V, R>,
    i: usize,
    half: usize,
    dot_rows: usize,
) -> V::F32 {
    if dot_rows == 1 {
        return v.to_f32(sums[i][half]);
    }
    v.mul_add(v.to_f32(sums[2 * i][half]), v.splat(PLANE as f32), v.to_f32(sums[2 * i + 1][half]))
}

/// Runs a kernel over `$v: $V` with the width and the number of rows as constants.
macro_rules! by_width_and_rows {
    ($v:ident: $V:ident, $width:expr, $rows:expr, $call:ident $args:tt) => {
        match $width {
            Width::Ternary => by_width_and_rows!(@rows $v $V 1, $rows, $call $args),
            Width::Bits2 => by_width_and_rows!(@rows $v $V 2, $rows, $call $args),
            Width::Bits3 => by_width_and_rows!(@rows $v $V 3, $rows, $call $args),
            Width::Bits4 => by_width_and_rows!(@rows $v $V 4, $rows, $call $args),
            Width::Bits8 => by_width_and_rows!(@rows $v $V 8, $rows, $call $args),
        }
    };
    (@rows $v:ident $V:ident $w:literal, $rows:expr, $call:ident $args:tt) => {
        match $rows {
            1 => by_width_and_rows!(@run $v $V $w 1, $call $args),
            2 => by_width_and_rows!(@run $v $V $w 2, $call $args),
            3 => by_width_and_rows!(@run $v $V $w 3, $call $args),
            5 if $V::MAX_ROWS > 4 => by_width_and_rows!(@run $v $V $w 5, $call $args),
            6 if $V::MAX_ROWS > 4 => by_width_and_rows!(@run $v $V $w 6, $call $args),
            7 if $V::MAX_ROWS > 4 => by_width_and_rows!(@run $v $V $w 7, $call $args),
            8 if $V::MAX_ROWS > 4 => by_width_and_rows!(@run $v $V $w 8, $call $args),
            _ => by_width_and_rows!(@run $v $V $w 4, $call $args),
        }
    };
    (@run $v:ident $V:ident $w:literal $r:literal, $call:ident ( $($arg:expr),* )) => {
        $v.run(#[inline(always)] |v| $call::<$V, $w, $r>(v, $($arg),*))
    };
}
pub(crate) use by_width_and_rows;

/// Runs a kernel for many rows over `$v: $V` with the width as a constant. Codes of 8 bits take other coefficients.
macro_rules! by_width {
    ($v:ident: $V:ident, $width:expr, $module:ident::$call:ident $args:tt) => {{
        use $module::$call as call;
        match $width {
            Width::Ternary => by_width!(@run $v $V 1, call $args),
            Width::Bits2 => by_width!(@run $v $V 2, call $args),
            Width::Bits3 => by_width!(@run $v $V 3, call $args),
            Width::Bits4 => by_width!(@run $v $V 4, call $args),
            Width::Bits8 => unreachable!("they have two planes"),
        }
    }};
    (@run $v:ident $V:ident $w:literal, $call:ident ( $($arg:expr),* )) => {
        $v.run(#[inline(always)] |v| $call::<$V, $w>(v, $($arg),*))
    };
}
pub(crate) use by_width;
