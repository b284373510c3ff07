//! What a user names: a method and its numbers, parsed from text such as `skvq:k=2,v=2,window=128`.
#![forbid(unsafe_code)]

mod parse;

use std::fmt;
use std::sync::Arc;

use crate::codec::group::{GroupCodec, GroupParams};
use crate::codec::{PageCodec, Side};
use crate::error::Result;
use crate::planner::PlannerConfig;
use crate::simd::IsaToken;

/// Cells in a page unless the recipe says otherwise.
pub const DEFAULT_PAGE: usize = 128;

/// How one side (keys or values) of the cache is encoded.
#[derive(Clone, Debug, PartialEq)]
pub enum SideRecipe {
    /// Per token, groups of channels inside a head (SKVQ).
    Group(GroupParams),
}

impl SideRecipe {
    /// The codec of this side for heads of `head_dim` channels.
    pub(crate) fn codec(
        &self,
        side: Side,
        head_dim: usize,
        page: usize,
        token: IsaToken,
    ) -> Result<Arc<dyn PageCodec>> {
        Ok(match self {
            SideRecipe::Group(params) => Arc::new(GroupCodec::new(params, side, head_dim, page, token)?),
        })
    }
}

/// A complete, validated description of a compressed cache, independent of any model. Immutable; cheap to clone.
#[derive(Clone, Debug, PartialEq)]
pub struct Recipe {
    /// Name of the method, the first word of the specification.
    pub method: &'static str,
    /// Cells in a page: 64, 128 or 256.
    pub page: usize,
    /// Residual window: the newest tokens of a stream that stay exact (FP16).
    pub window: usize,
    /// Sink tokens: the first positions of each sequence that stay exact.
    pub sink_tokens: usize,
    /// A full page is sealed once this many newer tokens exist; 0 seals it as soon as it is full.
    pub seal_lag: usize,
    /// How keys are encoded.
    pub key: SideRecipe,
    /// How values are encoded.
    pub value: SideRecipe,
}

impl Recipe {
    /// The canonical specification: every key spelled out. Parsing it gives the same recipe.
    pub fn spec(&self) -> String {
        self.to_string()
    }

    /// The planner's part of this recipe for a cache of `n_cells` cells in each of `n_streams` streams.
    pub fn planner_config(&self, n_cells: usize, n_streams: usize, n_seq_max: usize) -> PlannerConfig {
        PlannerConfig {
            n_cells,
            page: self.page,
            window: self.window,
            sink_tokens: self.sink_tokens,
            n_streams,
            n_seq_max,
            seal_lag: self.seal_lag,
        }
    }
}

impl fmt::Display for Recipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (SideRecipe::Group(k), SideRecipe::Group(v)) = (&self.key, &self.value);
        write!(f, "{}:k={},v={}", self.method, k.width, v.width)?;
        parse::write_group_keys(f, k, v)?;
        write!(f, ",window={},sinks={},page={}", self.window, self.sink_tokens, self.page)
    }
}
