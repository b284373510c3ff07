//! Codec `adaptive`: every token on its own, with a width of its own.
//!
//! Source: QAQ (arXiv 2403.04643). Its bounds say how coarse each token may be (`bounds`); here a page has a fixed size,
//! so the bounds decide how the page's bits are shared out. Tokens are ordered by how many allowed steps their values
//! span, widest first, in segments of one width, and the widths are those that leave the least error. What a target of
//! the bounds would multiply all steps by cancels. One or two values of a token may be kept exactly.
#![deny(unsafe_code)]

mod bounds;
pub(crate) mod scalar;
mod vector;

#[cfg(test)]
mod tests;

use super::kernels::Kernels;
use super::mixed::{MixedTile, MAX_BITS, SEGMENT};
use super::quantizer::Quantizer;
use super::query::{Probabilities, Query, QueryForm};
use super::smooth::Smooth;
use super::tile::LANE_BLOCK;
use crate::codec::page::{PageCodec, PageRef, SealRows, Side};
use crate::codec::quantizer::Clip;
use crate::cuda::desc::{SideDesc, CODEC_ADAPTIVE};
use crate::error::{Error, Result, Status};
use crate::simd::isa::{kernels_of, IsaToken};

/// Raised whenever the same rows would seal to other bytes, or the same bytes would mean other rows.
pub const FORMAT_VERSION: u32 = 4;

/// Most values of a row that can be kept exactly.
pub const MAX_OUTLIERS: usize = 2;

/// Parameters of one side of an `adaptive` recipe.
#[derive(Clone, Debug, PartialEq)]
pub struct AdaptiveParams {
    /// Mean bits of a code, 1 to 4. Rounded down to what a page can hold: for keys a whole number of bits per 32 tokens,
    /// for values an even number per 16.
    pub bits: f32,
    /// Widths follow the bounds. Otherwise the first tokens of a page are the widest.
    pub adaptive: bool,
    /// Narrowest code, 1 or 2 bits.
    pub min_bits: usize,
    /// A token's weight follows the attention that it has had lately.
    pub attention: bool,
    /// Values of a row that are kept exactly, 0 to 2.
    pub outliers: usize,
    /// Codes stand for the levels that are best for a Gaussian instead of equal steps. Symmetric only.
    pub normal: bool,
    /// No mid-point: codes lie about zero. Otherwise FP8 step and mid-point.
    pub symmetric: bool,
    /// Range of the codes.
    pub clip: Clip,
    /// Replace the step after coding by the one that makes the reconstruction unbiased.
    pub refit: bool,
    /// Take the page's channel mean (FP16) off first. Keys only.
    pub mean: bool,
    /// Divide each channel by a power of two of its own first. Keys only.
    pub smooth: bool,
    /// Rotate each head vector by a Hadamard matrix first.
    pub rotate: bool,
}

/// The codec for one side of one shape.
///
/// # Page layout
///
/// A page holds `page` tokens of one KV head, in *places*: natural order or, with adaptive widths, widest first.
///
/// | part | bytes | |
/// |---|---|---|
/// | codes | `codes_bytes()` | keys: for each run of places of one width a [`MixedTile`], lanes are places; values: one [`MixedTile`], lanes are channels, depth is places |
/// | steps | `page` | by place, as in codec `group` |
/// | mid-points | `page` | by place; affine only: E4M3 times `2^(header 1 - 127)` |
/// | smoothing | `Smooth::bytes` | keys only: mean and factors |
/// | order | `page` | adaptive only: keys: the place of each token; values: the token at each place |
/// | outliers | `3 * outliers * page` | by place: the channels, one byte each, then what to add to their coded values, FP16 |
///
/// padded to 64 bytes. Header byte 0 is the steps' base, bytes 2 and 3 are the numbers of segments of 4 and 3 bits, from
/// which the others follow. Segments have 32 tokens for keys and 16 for values.
#[derive(Clone, Debug)]
pub struct AdaptiveCodec {
    pub(crate) params: AdaptiveParams,
    pub(crate) side: Side,
    pub(crate) head_dim: usize,
    pub(crate) page: usize,
    /// Sum of the widths of the segments.
    pub(crate) budget: usize,
    kernels: &'static dyn Kernels<AdaptiveCodec>,
}

impl AdaptiveCodec {
    /// The codec for heads of `head_dim` channels in pages of `page` tokens.
    ///
    /// # Errors
    ///
    /// [`Status::Recipe`] if a page cannot hold that many bits.
    pub fn new(params: &AdaptiveParams, side: Side, head_dim: usize, page: usize, token: IsaToken) -> Result<Self> {
        let mut params = params.clone();
        params.mean &= side == Side::Key;
        params.smooth &= side == Side::Key;
        let mut codec =
            Self { params, side, head_dim, page, budget: 0, kernels: kernels_of!(token => dyn Kernels<AdaptiveCodec>) };
        let n = codec.n_segments();
        // An even number fills all words of a mixed tile.
        let unit = if side == Side::Key { 1 } else { 2 };
        codec.budget = (codec.params.bits * n as f32 / unit as f32 + 1e-3).floor() as usize * unit;
        if !(codec.params.min_bits * n..=MAX_BITS * n).contains(&codec.budget) {
            let what = format!(
                "{} bits in pages of {page} with min-bits={} are not possible: use more bits or min-bits=1",
                codec.params.bits, codec.params.min_bits
            );
            return Err(Error::new(Status::Recipe, what));
        }
        Ok(codec)
    }

    /// Tokens that share a width.
    pub(crate) fn segment(&self) -> usize {
        match self.side {
            Side::Key => LANE_BLOCK,
            Side::Value => SEGMENT,
        }
    }

    pub(crate) fn n_segments(&self) -> usize {
        self.page / self.segment()
    }

    /// Keys: the tile of `n` segments of `bits` bits.
    pub(crate) fn key_tile(&self, n: usize, bits: usize) -> MixedTile {
        MixedTile::new(n * LANE_BLOCK, self.head_dim, bits * (self.head_dim / SEGMENT))
    }

    /// Values: the tile of the page.
    pub(crate) fn value_tile(&self) -> MixedTile {
        MixedTile::new(self.head_dim, self.page, self.budget)
    }

    /// Mean and factors of a page.
    pub(crate) fn smooth_part<'a>(&self, page: PageRef<'a>) -> &'a [u8] {
        &page.bytes[self.smooth_offset()..][..self.smooth().bytes(self.head_dim)]
    }

    fn query_form(&self) -> QueryForm {
        QueryForm {
            head_dim: self.head_dim,
            group: self.head_dim,
            planes: 1,
            // Times a width's centre: the offset of its tokens.
            centre: 1.0,
            rotate: self.params.rotate,
        }
    }

    pub(crate) fn quantizer(&self, bits: usize) -> Quantizer {
        let AdaptiveParams { normal, symmetric, clip, refit, .. } = self.params;
        Quantizer { levels: 1 << bits, normal, symmetric, clip, refit }
    }

    pub(crate) fn codes_bytes(&self) -> usize {
        self.budget * self.segment() * self.head_dim / 8
    }

    pub(crate) fn steps_offset(&self) -> usize {
        self.codes_bytes()
    }

    pub(crate) fn mids_offset(&self) -> usize {
        self.steps_offset() + self.page
    }

    fn smooth(&self) -> Smooth {
        Smooth { mean: self.params.mean, factors: self.params.smooth }
    }

    fn smooth_offset(&self) -> usize {
        self.mids_offset() + if self.params.symmetric { 0 } else { self.page }
    }

    pub(crate) fn order_offset(&self) -> usize {
        self.smooth_offset() + self.smooth().bytes(self.head_dim)
    }

    pub(crate) fn outliers_offset(&self) -> usize {
        self.order_offset() + if self.params.adaptive { self.page } else { 0 }
    }
}

impl PageCodec for AdaptiveCodec {
    fn format(&self) -> String {
        let AdaptiveParams { adaptive, outliers, normal, symmetric, mean, smooth, rotate, .. } = self.params;
        format!(
            "adaptive/{FORMAT_VERSION}:{},{adaptive},{outliers},{normal},{symmetric},{mean},{smooth},{rotate}",
            self.budget
        )
    }

    fn page_bytes(&self) -> usize {
        (self.outliers_offset() + 3 * self.params.outliers * self.page).next_multiple_of(64)
    }

    fn seal(&self, header: &mut [u8], page: &mut [u8], rows: &mut SealRows) {
        self.kernels.seal(self, header, page, rows);
    }

    fn decode(&self, page: PageRef, row: usize, out: &mut [f32]) {
        scalar::decode_transformed(self, page, row, out);
        self.untransform(out);
        self.smooth().restore(self.smooth_part(page), out);
    }

    fn begin_query(&self, rows: &[f32], query: &mut Query) {
        query.begin(rows);
        if !self.params.smooth {
            self.kernels.prepare(query, &self.query_form());
        }
    }

    fn scores(&self, page: PageRef, query: &mut Query, scores: &mut [f32]) {
        let exponents = self.smooth().exponents(self.smooth_part(page), self.head_dim);
        if query.set_exponents(exponents) {
            self.kernels.prepare(query, &self.query_form());
        }
        self.kernels.scores(self, page, query, scores);
    }

    fn accumulate(&self, page: PageRef, p: &mut Probabilities, acc: &mut [f32]) {
        self.kernels.accumulate(self, page, p, acc);
    }

    fn untransform(&self, row: &mut [f32]) {
        if self.params.rotate {
            self.kernels.untransform(row);
        }
    }

    fn describe(&self, desc: &mut SideDesc) {
        desc.codec = CODEC_ADAPTIVE;
        match self.side {
            // Tiles of the runs of one width.
            Side::Key => (desc.budget, desc.tile_bytes) = (self.budget as u32, self.codes_bytes() as u32),
            Side::Value => desc.describe_mixed(&self.value_tile()),
        }
        (desc.segment, desc.n_segments) = (self.segment() as u32, self.n_segments() as u32);
        desc.steps = self.steps_offset() as u32;
        if !self.params.symmetric {
            desc.mids = self.mids_offset() as u32;
        }
        desc.describe_smooth(self.smooth(), self.smooth_offset());
        if self.params.adaptive {
            desc.order = self.order_offset() as u32;
        }
        if self.params.outliers > 0 {
            (desc.outliers, desc.n_outliers) = (self.outliers_offset() as u32, self.params.outliers as u32);
        }
        if self.side == Side::Key {
            desc.bound = bounds::key_step(self.page, 1.0, 1.0);
        }
        (desc.min_bits, desc.attention) = (self.params.min_bits as u32, self.params.attention.into());
        desc.describe_quantizer(&self.quantizer(1), self.params.rotate);
    }
}
