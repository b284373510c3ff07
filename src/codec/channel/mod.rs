//! Codec `channel`: keys quantized channel by channel over the tokens of a page.
//!
//! Source: KIVI (arXiv 2402.02750) for the axis, OTT (arXiv 2505.10938) for leaving outlier tokens out of the range. The
//! step is refitted after coding so that reconstruction is unbiased, and with a fractional or `adaptive` width each
//! channel has 1 to 4 bits of its own: the budget of a page goes where variance times the second moment of the queries,
//! kept by the store step, is largest (reverse water-filling).
#![deny(unsafe_code)]

pub(crate) mod scalar;
mod vector;

#[cfg(test)]
mod tests;

use super::kernels::Kernels;
use super::mixed::{MixedTile, SEGMENT};
use super::quantizer::Quantizer;
use super::query::{Probabilities, Query, QueryForm};
use crate::codec::page::{PageCodec, PageRef, SealRows};
use crate::codec::quantizer::Clip;
use crate::cuda::desc::{SideDesc, CODEC_CHANNEL};
use crate::error::{Error, Result, Status};
use crate::simd::isa::{kernels_of, IsaToken};

/// Raised whenever the same rows would seal to other bytes, or the same bytes would mean other rows.
pub const FORMAT_VERSION: u32 = 2;

/// Parameters of a `channel` recipe's keys.
#[derive(Clone, Debug, PartialEq)]
pub struct ChannelParams {
    /// Mean bits of a code, 1 to 4. Rounded to what the head size allows (an even number of bits per 16 channels).
    pub bits: f32,
    /// Each channel has a width of its own. Otherwise `bits` is 2, 3 or 4.
    pub adaptive: bool,
    /// Range of the codes.
    pub clip: Clip,
    /// Replace the step after coding by the one that makes the reconstruction unbiased.
    pub refit: bool,
    /// Step and mid-point as FP16 instead of FP8.
    pub half: bool,
}

/// The codec for the keys of one shape.
///
/// # Page layout
///
/// A page holds `page` tokens of one KV head. Its depth runs over channels, in natural order or, with adaptive widths,
/// widest first:
///
/// | part | bytes | |
/// |---|---|---|
/// | codes | `tile.bytes()` | a [`MixedTile`]: lanes are tokens |
/// | steps | `head_dim` (`2 * head_dim` as FP16) | by depth; E4M3 times `2^(header 0 - 127)` |
/// | mid-points | the same | by depth; E4M3 times `2^(header 1 - 127)` |
/// | order | `head_dim` | adaptive only: the channel at each place of the depth |
///
/// padded to 64 bytes. Header bytes 2 and 3 are the numbers of segments of 4 and 3 bits, from which the others follow. A
/// value is `step * (code - centre) + mid-point`.
#[derive(Clone, Debug)]
pub struct ChannelCodec {
    pub(crate) params: ChannelParams,
    pub(crate) head_dim: usize,
    pub(crate) page: usize,
    pub(crate) tile: MixedTile,
    kernels: &'static dyn Kernels<ChannelCodec>,
}

impl ChannelCodec {
    /// The codec for heads of `head_dim` channels in pages of `page` tokens.
    ///
    /// # Errors
    ///
    /// [`Status::Recipe`] if a page cannot hold that many bits.
    pub fn new(params: &ChannelParams, head_dim: usize, page: usize, token: IsaToken) -> Result<Self> {
        let n = head_dim / SEGMENT;
        let budget = (params.bits * n as f32 / 2.0 + 1e-3).floor() as usize * 2;
        let uniform = [2.0, 3.0, 4.0].contains(&params.bits);
        if !(n..=4 * n).contains(&budget) || !(params.adaptive || uniform) {
            let what =
                format!("{} bits per key are not possible with a head size of {head_dim}: use 2, 3 or 4", params.bits);
            return Err(Error::new(Status::Recipe, what));
        }
        Ok(Self::with_budget(params, head_dim, page, budget, token))
    }

    /// The codec for `depth` channels, a multiple of 16, whose widths sum up to `budget` over the segments.
    pub(crate) fn with_budget(
        params: &ChannelParams,
        depth: usize,
        page: usize,
        budget: usize,
        token: IsaToken,
    ) -> Self {
        let tile = MixedTile::new(page, depth, budget);
        let kernels = kernels_of!(token => dyn Kernels<ChannelCodec>);
        Self { params: params.clone(), head_dim: depth, page, tile, kernels }
    }

    /// Values of a query row: kernels read them 32 at a time, and those behind the channels are zero.
    pub(crate) fn query_dim(&self) -> usize {
        self.head_dim.next_multiple_of(32)
    }

    /// Bytes of a page in use.
    pub(crate) fn used_bytes(&self) -> usize {
        self.order_offset() + if self.params.adaptive { self.head_dim } else { 0 }
    }

    fn number_bytes(&self) -> usize {
        if self.params.half {
            2
        } else {
            1
        }
    }

    pub(crate) fn steps_offset(&self) -> usize {
        self.tile.bytes()
    }

    pub(crate) fn mids_offset(&self) -> usize {
        self.steps_offset() + self.number_bytes() * self.head_dim
    }

    pub(crate) fn order_offset(&self) -> usize {
        self.mids_offset() + self.number_bytes() * self.head_dim
    }
}

impl PageCodec for ChannelCodec {
    fn format(&self) -> String {
        let ChannelParams { adaptive, half, .. } = self.params;
        format!("channel/{FORMAT_VERSION}:{},{adaptive},{half}", self.tile.budget())
    }

    fn page_bytes(&self) -> usize {
        self.used_bytes().next_multiple_of(64)
    }

    fn seal(&self, header: &mut [u8], page: &mut [u8], rows: &mut SealRows) {
        self.kernels.seal(self, header, page, rows);
    }

    fn decode(&self, page: PageRef, row: usize, out: &mut [f32]) {
        scalar::decode(self, page, row, out);
    }

    fn begin_query(&self, rows: &[f32], query: &mut Query) {
        let head_dim = self.query_dim();
        query.begin(rows);
        query.prepare(&QueryForm { head_dim, group: head_dim, planes: 1, centre: 0.0, rotate: false });
    }

    fn scores(&self, page: PageRef, query: &mut Query, scores: &mut [f32]) {
        self.kernels.scores(self, page, query, scores);
    }

    fn accumulate(&self, _page: PageRef, _p: &mut Probabilities, _acc: &mut [f32]) {
        unreachable!("recipes use this codec for keys only");
    }

    fn untransform(&self, _row: &mut [f32]) {}

    fn describe(&self, desc: &mut SideDesc) {
        let ChannelParams { adaptive, clip, refit, half, .. } = self.params;
        desc.codec = CODEC_CHANNEL;
        desc.describe_mixed(&self.tile);
        (desc.steps, desc.mids) = (self.steps_offset() as u32, self.mids_offset() as u32);
        if adaptive {
            desc.order = self.order_offset() as u32;
        }
        desc.half = half.into();
        desc.describe_quantizer(&Quantizer { levels: 0, normal: false, symmetric: false, clip, refit }, false);
    }
}
