//! One page of one KV head: its two sides, its bytes, and what a codec does with it.
#![forbid(unsafe_code)]

use std::fmt::Debug;

use super::query::{Probabilities, Query};
use crate::cuda::desc::SideDesc;

/// Which of the two halves of the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// Keys.
    Key,
    /// Values.
    Value,
}

/// Rows to be sealed into one page, already copied out of wherever they were.
pub struct SealRows<'a> {
    /// `rows[i]` goes to this row of the page; strictly increasing.
    pub at: &'a [u32],
    /// `[at.len()][head_dim]`, finite. Used as scratch: the transform before coding happens in place.
    pub rows: &'a mut [f32],
    /// The page keeps nothing: its header is made anew from these rows, all other rows are dead.
    pub fresh: bool,
    /// `[at.len()]`: rows that are kept exact elsewhere and hidden in the page; empty: none.
    pub exact: &'a [bool],
    /// `[head_dim]`: how much an error of each channel matters; empty: unknown.
    pub channel_weights: &'a [f32],
    /// `[head_dim]`: exponents of the page sealed last (`codec::smooth`), which are replaced where this page has its own; empty:
    /// there is none.
    pub last_exponents: &'a mut [u8],
    /// `[at.len()]`: the largest attention weight that recent queries gave each row; empty: unknown.
    pub attention: &'a [f32],
    /// Where the rows are, for codecs that want to know (`PageCodec::wants_places`). `None`: unknown.
    pub place: Option<RowPlaces<'a>>,
}

/// Where the rows of a page are.
#[derive(Clone, Copy)]
pub struct RowPlaces<'a> {
    /// The KV head.
    pub head: usize,
    /// `[at.len()]`: the position for which each key was turned.
    pub positions: &'a [i32],
}

/// Largest page of any recipe, in cells.
pub const MAX_PAGE: usize = 256;

/// Bytes of a page's header, kept apart from the page so that pages stay 64-byte aligned.
pub const HEADER_BYTES: usize = 4;

/// What a value of a page costs, header and metadata counted.
pub(crate) fn bits_per_value(page_bytes: usize, page: usize, head_dim: usize) -> f64 {
    (page_bytes + HEADER_BYTES) as f64 * 8.0 / (page * head_dim) as f64
}

/// Header and packed bytes of one page of one KV head.
#[derive(Clone, Copy)]
pub struct PageRef<'a> {
    /// [`HEADER_BYTES`] bytes.
    pub header: &'a [u8],
    /// The packed page.
    pub bytes: &'a [u8],
}

/// What a codec does with the pages of one side of one layer. Implementations are immutable and choose their kernels when
/// they are made.
pub(crate) trait PageCodec: Debug + Send + Sync {
    /// Everything that decides what a page's bytes mean, for state files.
    fn format(&self) -> String;

    /// Bytes of one page, a multiple of 64.
    fn page_bytes(&self) -> usize;

    /// Encodes rows into a page. Rows not listed keep their bytes, or become zero on a fresh page.
    fn seal(&self, header: &mut [u8], page: &mut [u8], rows: &mut SealRows);

    /// Decodes one row of a page to the values that were appended, `out[head_dim]`.
    fn decode(&self, page: PageRef, row: usize, out: &mut [f32]);

    /// Takes query rows `[n_rows][head_dim]`, already multiplied by the softmax scale.
    fn begin_query(&self, rows: &[f32], query: &mut Query);

    /// Keys: `scores[row * page + token]` of all prepared query rows against all tokens of a page.
    fn scores(&self, page: PageRef, query: &mut Query, scores: &mut [f32]);

    /// Values: adds `sum_t p[row * page + t] * value[t]`, still transformed, to `acc[row * head_dim + channel]`.
    fn accumulate(&self, page: PageRef, p: &mut Probabilities, acc: &mut [f32]);

    /// Undoes the transform on one accumulated output row.
    fn untransform(&self, row: &mut [f32]);

    /// Fills in what device code has to know of a page.
    fn describe(&self, desc: &mut SideDesc);

    /// What kernels of a device read beside the page, of a codec that was calibrated: [`crate::cuda::desc::FrameDesc`] and what
    /// it names.
    fn profile(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Whether sealing a page anew needs [`SealRows::place`] for its best result.
    fn wants_places(&self) -> bool {
        false
    }

    /// Of keys whose pages say something of the values of the same tokens: how values follow.
    fn predictor(&self) -> Option<&dyn ValuePredictor> {
        None
    }
}

/// Values that the key page of the same tokens predicts, where that helps: the value page holds what is left.
pub(crate) trait ValuePredictor {
    /// Decides for the rows `at` of a sealed key page, notes it there, and leaves in `values`, `[at.len()][head_dim_v]`, what
    /// the value page is to hold.
    fn take(&self, header: &[u8], page: &mut [u8], at: &[u32], values: &mut [f32]);

    /// Adds what a key page predicts of the value of one row.
    fn add(&self, page: PageRef, row: usize, value: &mut [f32]);

    /// Length of a row of sums.
    fn n_sums(&self) -> usize;

    /// Adds what a page gives to the sums of each row, `[row][n_sums]`: linear in the weights, so that sums of pages, scaled as
    /// outputs are, add up.
    fn accumulate(&self, page: PageRef, p: &mut Probabilities, sums: &mut [f32]);

    /// Adds what the sums of all pages of KV head `head` predict, once they are complete: `sum_t p[row][t] * predicted[t]`, to
    /// `out[row * head_dim_v + channel]`.
    fn finish(&self, head: usize, sums: &[f32], out: &mut [f32]);
}
