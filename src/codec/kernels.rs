//! The table of kernels of a codec: one for each instruction set, chosen once, when a codec is made.
#![forbid(unsafe_code)]

use std::fmt;

use super::page::{PageRef, SealRows};
use super::query::{Probabilities, Query, QueryForm};

/// What a codec `C` does in its own way on every instruction set. The scalar table is the specification.
pub(crate) struct Kernels<C> {
    /// Encodes rows: header, page, rows. Bytes are equal on every instruction set.
    pub(crate) seal: fn(&C, &mut [u8], &mut [u8], &mut SealRows),
    /// Rotates and rounds the rows of a query.
    pub(crate) prepare: fn(&mut Query, &QueryForm),
    /// Undoes the rotation on an output row.
    pub(crate) untransform: fn(&mut [f32]),
    /// `scores[row * page + token]` of all query rows.
    pub(crate) scores: fn(&C, PageRef, &Query, &mut [f32]),
    /// Adds a page's weighted values to `acc[row * head_dim + channel]`.
    pub(crate) accumulate: fn(&C, PageRef, &mut Probabilities, &mut [f32]),
}

impl<C> fmt::Debug for Kernels<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Kernels")
    }
}
