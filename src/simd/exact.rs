//! The table of kernels that do not depend on a codec: exact rows, softmax, conversions.
#![forbid(unsafe_code)]

use std::fmt;

use super::aligned::Aligned;

/// A block of exact rows `[n][dim]`, finite, with room behind them: `data` holds a multiple of 16 rows.
#[derive(Clone, Copy)]
pub(crate) struct ExactRows<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) n: usize,
    pub(crate) dim: usize,
}

/// Running softmax state of the rows of one query tile: maximum, sum, and the outputs that share them.
#[derive(Default, Debug)]
pub(crate) struct State {
    /// `[row]`
    pub(crate) max: Vec<f32>,
    /// `[row]`
    pub(crate) sum: Vec<f32>,
    /// `[row][head_dim_v]`, in the value codec's transformed space.
    pub(crate) packed: Aligned<f32>,
    /// `[row][head_dim_v]`, from exact rows.
    pub(crate) exact: Aligned<f32>,
    /// `[row][n_sums]` of the keys' predictor (`codec::page::ValuePredictor`); empty: values are not predicted.
    pub(crate) predicted: Aligned<f32>,
}

/// How raw scores become logits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Logits<'a> {
    /// `softcap * tanh(score / softcap)` if positive.
    pub(crate) softcap: f32,
    /// `[row]`: ALiBi slope that multiplies the mask; 1 without ALiBi.
    pub(crate) slopes: &'a [f32],
    /// `[row]`: which row of the mask block belongs to this row.
    pub(crate) mask_row: &'a [u32],
    /// `[mask row][columns]`, added to the scores; minus infinity hides.
    pub(crate) mask: &'a [f32],
    /// All mask values are zero; `mask` is not read.
    pub(crate) mask_is_zero: bool,
}

/// The table of kernels that do not depend on a codec, for one instruction set.
pub(crate) trait Kernels: fmt::Debug + Send + Sync {
    /// `scores[row * columns + i] = <q[row], rows[i]>`, `q` being `[n_q][dim]`.
    fn exact_scores(&self, q: &[f32], rows: ExactRows, scores: &mut [f32], columns: usize);
    /// `acc[row * dim + c] += sum_i p[row * columns + i] * rows[i][c]`.
    fn exact_accumulate(&self, p: &[f32], columns: usize, rows: ExactRows, acc: &mut [f32]);
    /// Turns scores `[n_rows][columns]` into weights in place and updates the state.
    fn softmax(&self, scores: &mut [f32], columns: usize, logits: &Logits, state: &mut State);
    /// Little-endian half precision to single precision; what is not finite as [`finite`](crate::rows::finite) says.
    fn f16_to_f32(&self, from: &[u8], to: &mut [f32]);
    /// Copies a row, with what is not finite as [`finite`](crate::rows::finite) says.
    fn copy_finite(&self, from: &[f32], to: &mut [f32]);
}
