//! The table of kernels of codec `aqua`, beside those of codec `channel`, which it calls.
#![forbid(unsafe_code)]

use super::frame::Place;
use super::AquaCodec;
use crate::codec::page::PageRef;
use crate::codec::query::{Probabilities, Query};

pub(super) trait Kernels: std::fmt::Debug + Send + Sync {
    /// Takes keys `[at.len()][head_dim]` to what is coded. Numbers are equal on every instruction set.
    fn enter(&self, codec: &AquaCodec, place: Place, at: &[u32], keys: &mut [f32]);
    /// What the rows `at` of a sealed page predict, whether it is used or not, `[at.len()][head_dim_v]`. Equal as well.
    fn predict(&self, codec: &AquaCodec, page: PageRef, at: &[u32], out: &mut [f32]);
    /// `scores[row * page + token]` of all query rows.
    fn scores(&self, codec: &AquaCodec, page: PageRef, query: &mut Query, scores: &mut [f32]);
    /// Adds to `sums[row * n_sums + c]` the coefficients of all keys whose values are predicted, each times its token's weight,
    /// and behind those of a row the weights.
    fn add_keys(&self, codec: &AquaCodec, page: PageRef, p: &mut Probabilities, sums: &mut [f32]);
}
