//! The shape of one attention layer, checked once.
#![forbid(unsafe_code)]

use crate::error::{Error, Result, Status};

/// Heads and head sizes of one attention layer.
///
/// Query head `h` reads KV head `h / gqa_ratio` (grouped-query attention; `gqa_ratio` 1 is multi-head attention,
/// `n_kv_heads` 1 is multi-query attention).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Shape {
    /// Number of query heads; a multiple of `n_kv_heads`.
    pub n_heads: u32,
    /// Number of key/value heads, at least 1.
    pub n_kv_heads: u32,
    /// Values in one key (and query) head: 64 to 256 in steps of 32.
    pub head_dim_k: u32,
    /// Values in one value head: 64 to 256 in steps of 32; may differ from `head_dim_k`.
    pub head_dim_v: u32,
}

/// Smallest supported head size.
pub const MIN_HEAD_DIM: u32 = 64;
/// Largest supported head size.
pub const MAX_HEAD_DIM: u32 = 256;
/// Head sizes must be a multiple of this.
pub const HEAD_DIM_STEP: u32 = 32;
/// Largest supported number of query heads of one KV head.
pub const MAX_GQA_RATIO: u32 = 128;

impl Shape {
    /// Query heads per KV head.
    pub fn gqa_ratio(&self) -> usize {
        (self.n_heads / self.n_kv_heads) as usize
    }

    /// Fails with [`Status::Shape`] and the allowed values if the shape is not supported.
    pub fn validate(&self) -> Result<()> {
        let fail = |text: String| Err(Error::new(Status::Shape, text));
        for (name, dim) in [("key", self.head_dim_k), ("value", self.head_dim_v)] {
            if !(MIN_HEAD_DIM..=MAX_HEAD_DIM).contains(&dim) || dim % HEAD_DIM_STEP != 0 {
                return fail(format!(
                    "{name} head size {dim} is not supported: use {MIN_HEAD_DIM} to {MAX_HEAD_DIM} in steps of {HEAD_DIM_STEP}"
                ));
            }
        }
        if self.n_kv_heads == 0 || self.n_heads == 0 || !self.n_heads.is_multiple_of(self.n_kv_heads) {
            return fail(format!(
                "{} query heads cannot share {} KV heads: the first must be a positive multiple of the second",
                self.n_heads, self.n_kv_heads
            ));
        }
        if self.n_heads / self.n_kv_heads > MAX_GQA_RATIO {
            return fail(format!(
                "{} query heads per KV head: at most {MAX_GQA_RATIO} are supported",
                self.n_heads / self.n_kv_heads
            ));
        }
        Ok(())
    }
}
