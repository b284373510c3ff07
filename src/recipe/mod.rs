//! What a user names: a preset or a method, and its numbers, parsed from text such as `on` or `skvq:k=2,v=2`.
#![forbid(unsafe_code)]

pub mod auto;
mod fit;
pub mod help;
mod methods;
mod parse;
pub mod presets;

#[cfg(test)]
pub(crate) use methods::METHODS;

use std::fmt;

use crate::codec::CodecParams;
use crate::error::{Error, Result, Status};
use crate::planner::{sequences_per_stream, PlannerConfig};
use crate::profile::Profile;

/// Cells in a page unless the recipe says otherwise.
pub const DEFAULT_PAGE: usize = 128;
/// Fewest cells in a page.
const MIN_PAGE: usize = 64;

/// Sizes of the pool. The default is the published one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolParams {
    /// Tokens that compete for a place.
    pub outliers: usize,
    /// Room for members that lost their place.
    pub extra: usize,
    /// First layers without a pool, where the pattern does not show.
    pub skip_layers: usize,
}

impl PoolParams {
    /// Most rows of a pool: one block of exact rows.
    pub const MAX_ROWS: usize = 128;

    /// Rows in a layer's pool.
    pub(crate) fn rows(&self, layer: usize) -> usize {
        if self.outliers == 0 || layer < self.skip_layers {
            0
        } else {
            self.outliers + self.extra
        }
    }
}

/// A complete, validated description of a compressed cache, independent of any model. Immutable; cheap to clone.
#[derive(Clone, Debug, PartialEq)]
pub struct Recipe {
    /// Name of the method, the first word of the specification.
    pub method: &'static str,
    /// Cells in a page: 64, 128 or 256.
    pub page: usize,
    /// Residual window: the newest tokens of each sequence that stay exact (FP16).
    pub window: usize,
    /// Sink tokens: the first positions of each sequence that stay exact.
    pub sink_tokens: usize,
    /// A full page is sealed once this many newer tokens exist; 0 seals it as soon as it is full.
    pub seal_lag: usize,
    /// Trace outlier tokens and keep them exact (OTT).
    pub pool: Option<PoolParams>,
    /// Last queries whose attention decides the widths of tokens (QAQ); 0: none does.
    pub attn_window: usize,
    /// How keys are encoded.
    pub key: CodecParams,
    /// How values are encoded.
    pub value: CodecParams,
}

impl Recipe {
    /// The canonical specification: every key spelled out. Parsing it gives the same recipe, without the profile itself.
    pub fn spec(&self) -> String {
        self.to_string()
    }

    /// The file of the profile that this recipe wants, as it was named; `None`: it wants none.
    ///
    /// # Errors
    ///
    /// [`Status::Recipe`] if it needs one and names none.
    pub fn profile_path(&self) -> Result<Option<&str>> {
        let CodecParams::Aqua(params) = &self.key else { return Ok(None) };
        params.check_named()?;
        Ok(Some(&params.path))
    }

    /// The recipe with the profile that it wants.
    ///
    /// # Errors
    ///
    /// [`Status::Recipe`] if it wants none.
    pub fn with_profile(&self, profile: &Profile) -> Result<Recipe> {
        let mut recipe = self.clone();
        let CodecParams::Aqua(params) = &mut recipe.key else {
            return Err(Error::new(Status::Recipe, format!("{} takes no profile", self.method)));
        };
        params.profile = Some(profile.clone());
        Ok(recipe)
    }

    /// The planner's part of this recipe, fitted or not, for a cache of `n_cells` cells in each of `n_streams` streams.
    pub fn planner_config(&self, n_cells: usize, n_streams: usize, n_seq_max: usize) -> PlannerConfig {
        // Sequences that share a stream would each need room for the rows that wait: there pages wait no longer than it
        // takes that all recent queries come after them.
        let is_shared = sequences_per_stream(n_streams, n_seq_max) > 1;
        PlannerConfig {
            n_cells,
            page: self.page,
            window: self.window,
            sink_tokens: self.sink_tokens,
            n_streams,
            n_seq_max,
            seal_lag: if is_shared { self.seal_lag.min(self.attn_window) } else { self.seal_lag },
            frees_early: self.pool.is_some(),
            outliers: self.pool.map_or(0, |pool| pool.outliers),
        }
    }
}

impl fmt::Display for Recipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.method)?;
        parse::write_keys(f, self)
    }
}
