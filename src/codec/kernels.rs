//! The table of kernels of a codec: one for each instruction set, chosen once, when a codec is made.
#![forbid(unsafe_code)]

use std::fmt;

use super::hadamard;
use super::page::{PageRef, SealRows};
use super::query::{Probabilities, Query, QueryForm};

/// What a codec `C` does in its own way on every instruction set. The scalar table is the specification; what another leaves out
/// is scalar.
pub(crate) trait Kernels<C>: fmt::Debug + Send + Sync {
    /// Encodes rows: header, page, rows. Bytes are equal on every instruction set.
    fn seal(&self, codec: &C, header: &mut [u8], page: &mut [u8], rows: &mut SealRows);
    /// Rotates and rounds the rows of a query.
    fn prepare(&self, query: &mut Query, form: &QueryForm) {
        query.prepare(form);
    }
    /// Undoes the rotation on an output row.
    fn untransform(&self, row: &mut [f32]) {
        hadamard::rotate(row);
    }
    /// `scores[row * page + token]` of all query rows.
    fn scores(&self, codec: &C, page: PageRef, query: &Query, out: &mut [f32]);
    /// Adds a page's weighted values to `acc[row * head_dim + channel]`.
    fn accumulate(&self, codec: &C, page: PageRef, p: &mut Probabilities, acc: &mut [f32]);
}
