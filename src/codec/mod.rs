//! Codecs: how the rows of one page of one KV head become bytes.
//!
//! A codec is a scalar implementation in safe Rust, which is its specification, plus kernels for instruction sets that
//! must agree with it: the same sealed bytes, and scores and outputs within the codec's `nmse` bound.

pub mod adaptive;
pub mod aqua;
pub mod channel;
pub mod float8;
pub mod group;
pub mod hadamard;
pub(crate) mod kernels;
pub mod mixed;
pub mod page;
pub(crate) mod quantizer;
pub(crate) mod query;
pub(crate) mod smooth;
pub mod tile;

use std::sync::Arc;

use adaptive::{AdaptiveCodec, AdaptiveParams};
use aqua::{AquaCodec, AquaParams};
use channel::{ChannelCodec, ChannelParams};
use group::{GroupCodec, GroupParams};
use page::{PageCodec, Side};

use crate::error::{Error, Result, Status};
use crate::shape::Shape;
use crate::simd::isa::IsaToken;

/// One row of the registry.
#[derive(Clone, Copy, Debug)]
pub struct CodecInfo {
    /// Name in recipes, state files and documents.
    pub name: &'static str,
    /// Version of the page bytes; see [`group::FORMAT_VERSION`].
    pub format_version: u32,
    /// Bound on sum (a - b)^2 / sum b^2 between a kernel's scores or outputs and those of the scalar implementation.
    pub nmse: f64,
}

/// The one list of codecs; tests, benches and state files follow it.
pub const REGISTRY: &[CodecInfo] = &[
    CodecInfo { name: "group", format_version: group::FORMAT_VERSION, nmse: group::NMSE },
    // Keys are not rotated, so the unit to which a query row is rounded follows its largest channel.
    CodecInfo { name: "channel", format_version: channel::FORMAT_VERSION, nmse: mixed::NMSE },
    // As above, since rotation can be turned off.
    CodecInfo { name: "adaptive", format_version: adaptive::FORMAT_VERSION, nmse: mixed::NMSE },
    CodecInfo { name: "aqua", format_version: aqua::FORMAT_VERSION, nmse: mixed::NMSE },
];

/// How one side (keys or values) of a cache is encoded: a codec and its numbers. The one place that makes a codec.
#[derive(Clone, Debug, PartialEq)]
pub enum CodecParams {
    /// Per token, groups of channels inside a head (SKVQ).
    Group(GroupParams),
    /// Per channel over the tokens of a page (KIVI, OTT). Keys only.
    Channel(ChannelParams),
    /// Per token, each with a width of its own (QAQ).
    Adaptive(AdaptiveParams),
    /// As `Channel`, in a frame that was calibrated, with values predicted (AQUA-KV). Keys only.
    Aqua(AquaParams),
}

impl CodecParams {
    /// The codec of this side for a layer of this shape.
    pub(crate) fn build_layer(
        &self,
        side: Side,
        layer: usize,
        shape: Shape,
        page: usize,
        token: IsaToken,
    ) -> Result<Arc<dyn PageCodec>> {
        match self {
            CodecParams::Aqua(params) if side == Side::Key => {
                Ok(Arc::new(AquaCodec::new(params, layer, shape, page, token)?))
            }
            other => {
                let head_dim = if side == Side::Key { shape.head_dim_k } else { shape.head_dim_v };
                other.build(side, head_dim as usize, page, token)
            }
        }
    }

    /// The codec of this side for heads of `head_dim` channels, without what was calibrated for a layer.
    pub(crate) fn build(
        &self,
        side: Side,
        head_dim: usize,
        page: usize,
        token: IsaToken,
    ) -> Result<Arc<dyn PageCodec>> {
        Ok(match self {
            CodecParams::Group(params) => Arc::new(GroupCodec::new(params, side, head_dim, page, token)?),
            CodecParams::Channel(_) | CodecParams::Aqua(_) if side == Side::Value => {
                return Err(Error::new(Status::Recipe, "values cannot be quantized per channel"));
            }
            CodecParams::Channel(params) => Arc::new(ChannelCodec::new(params, head_dim, page, token)?),
            CodecParams::Adaptive(params) => Arc::new(AdaptiveCodec::new(params, side, head_dim, page, token)?),
            CodecParams::Aqua(params) => Arc::new(AquaCodec::unprofiled(params, head_dim, page, token)?),
        })
    }
}
