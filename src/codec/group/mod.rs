//! Codec `group`: every token on its own, uniform codes with one step per group of channels inside a head.
//!
//! Source: SKVQ (arXiv 2405.06219) for groups, FP8 parameters and clipping; parameters are rounded before they are used
//! and the step is refitted after coding so that reconstruction is unbiased (`<x, x^> = <x, x>`). Symmetric groups after a
//! Hadamard rotation, and the page's channel mean and smoothing factors taken off keys (`codec::smooth`), are the forms
//! that measure best without calibration.
#![deny(unsafe_code)]

mod many;
pub(crate) mod scalar;
mod steps;
mod vector;

#[cfg(test)]
pub(super) mod tests;

use std::fmt;

use super::kernels::Kernels;
pub use super::quantizer::Clip;
use super::quantizer::Quantizer;
use super::query::{Probabilities, Query, QueryForm};
use super::smooth::Smooth;
use super::tile::{Tile, Width};
use crate::codec::page::{PageCodec, PageRef, SealRows, Side};
use crate::cuda::desc::{SideDesc, CODEC_GROUP};
use crate::error::{Error, Result, Status};
use crate::simd::isa::{kernels_of, IsaToken};

/// Raised whenever the same rows would seal to other bytes, or the same bytes would mean other rows.
pub const FORMAT_VERSION: u32 = 3;

/// See [`super::CodecInfo::nmse`].
pub(crate) const NMSE: f64 = 2e-4;

/// How many channels share a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupSize {
    /// This many: 32, 64 or 128.
    Channels(usize),
    /// The whole head.
    Head,
}

impl GroupSize {
    /// Parses the `group` key of a recipe.
    pub fn parse(text: &str) -> Result<Self> {
        match text {
            "head" => Ok(GroupSize::Head),
            "32" => Ok(GroupSize::Channels(32)),
            "64" => Ok(GroupSize::Channels(64)),
            "128" => Ok(GroupSize::Channels(128)),
            _ => Err(Error::new(Status::Recipe, format!("group={text}: use 32, 64, 128 or head"))),
        }
    }
}

impl fmt::Display for GroupSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            GroupSize::Channels(n) => write!(f, "{n}"),
            GroupSize::Head => f.write_str("head"),
        }
    }
}

/// Parameters of one side of a `group` recipe.
#[derive(Clone, Debug, PartialEq)]
pub struct GroupParams {
    /// Width of the codes.
    pub width: Width,
    /// Channels that share a step.
    pub group: GroupSize,
    /// No mid-point: codes lie about zero and one 8-bit scale per group is stored. Otherwise FP8 step and mid-point.
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
/// A page holds `page` tokens of one KV head, `n_groups = head_dim / group` groups:
///
/// | part | bytes | |
/// |---|---|---|
/// | codes | `n_groups * tile.bytes()` | one [`Tile`] per group. Keys: lanes are tokens, depth is the group's channels. Values: lanes are the group's channels, depth is tokens |
/// | steps | `n_groups * page` | `[group][token]`; symmetric: [`super::float8::scale_encode`] with header byte 0 as base; affine: E4M3 times `2^(header 0 - 127)` |
/// | mid-points | `n_groups * page` | affine only: E4M3 times `2^(header 1 - 127)` |
/// | smoothing | `Smooth::bytes` | keys only: mean and factors |
///
/// padded to 64 bytes. A value is `step * (code - centre) [+ mid-point]`, then rotated back, times the factor, plus the mean. Bytes of rows that
/// were never sealed are zero.
#[derive(Clone, Debug)]
pub struct GroupCodec {
    pub(crate) params: GroupParams,
    pub(crate) side: Side,
    pub(crate) head_dim: usize,
    pub(crate) page: usize,
    pub(crate) group: usize,
    pub(crate) n_groups: usize,
    pub(crate) tile: Tile,
    kernels: &'static dyn Kernels<GroupCodec>,
}

impl GroupCodec {
    /// The codec for heads of `head_dim` channels in pages of `page` tokens.
    ///
    /// # Errors
    ///
    /// [`Status::Recipe`] if the head size is not a multiple of the group.
    pub fn new(params: &GroupParams, side: Side, head_dim: usize, page: usize, token: IsaToken) -> Result<Self> {
        let group = match params.group {
            GroupSize::Head => head_dim,
            GroupSize::Channels(n) => n,
        };
        if !head_dim.is_multiple_of(group) {
            let what = format!("group={group} does not divide a head size of {head_dim}: use group=head or group=32");
            return Err(Error::new(Status::Recipe, what));
        }
        let tile = match side {
            Side::Key => Tile::new(params.width, page, group),
            Side::Value => Tile::new(params.width, group, page),
        };
        let mut params = params.clone();
        params.mean &= side == Side::Key;
        params.smooth &= side == Side::Key;
        let n_groups = head_dim / group;
        Ok(Self {
            params,
            side,
            head_dim,
            page,
            group,
            n_groups,
            tile,
            kernels: kernels_of!(token => dyn Kernels<GroupCodec>),
        })
    }

    pub(crate) fn steps_offset(&self) -> usize {
        self.n_groups * self.tile.bytes()
    }

    pub(crate) fn mids_offset(&self) -> usize {
        self.steps_offset() + self.n_groups * self.page
    }

    fn smooth(&self) -> Smooth {
        Smooth { mean: self.params.mean, factors: self.params.smooth }
    }

    fn smooth_offset(&self) -> usize {
        self.mids_offset() + if self.params.symmetric { 0 } else { self.n_groups * self.page }
    }

    /// Mean and factors of a page.
    pub(crate) fn smooth_part<'a>(&self, page: PageRef<'a>) -> &'a [u8] {
        &page.bytes[self.smooth_offset()..][..self.smooth().bytes(self.head_dim)]
    }

    fn query_form(&self) -> QueryForm {
        QueryForm {
            head_dim: self.head_dim,
            group: self.group,
            planes: self.coefficient_planes(),
            centre: self.params.width.centre(),
            rotate: self.params.rotate,
        }
    }

    #[inline(always)]
    pub(crate) fn quantizer(&self) -> Quantizer {
        let GroupParams { width, symmetric, clip, refit, .. } = self.params;
        Quantizer { levels: width.levels(), normal: false, symmetric, clip, refit }
    }

    /// Two int8 coefficients instead of one where a single one would be coarser than the codes.
    pub(crate) fn coefficient_planes(&self) -> usize {
        if self.params.width == Width::Bits8 {
            2
        } else {
            1
        }
    }
}

impl PageCodec for GroupCodec {
    fn format(&self) -> String {
        let GroupParams { width, symmetric, mean, smooth, rotate, .. } = self.params;
        format!("group/{FORMAT_VERSION}:{width},{},{symmetric},{mean},{smooth},{rotate}", self.group)
    }

    fn page_bytes(&self) -> usize {
        (self.smooth_offset() + self.smooth().bytes(self.head_dim)).next_multiple_of(64)
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
        desc.codec = CODEC_GROUP;
        (desc.group, desc.n_groups) = (self.group as u32, self.n_groups as u32);
        desc.describe_tile(&self.tile);
        desc.steps = self.steps_offset() as u32;
        if !self.params.symmetric {
            desc.mids = self.mids_offset() as u32;
        }
        desc.describe_smooth(self.smooth(), self.smooth_offset());
        desc.describe_quantizer(&self.quantizer(), self.params.rotate);
    }
}
