//! Attention on a compressed cache: one online softmax over sealed pages, exact slots and the rows of the current ubatch.
//!
//! Work is split by KV head, by tiles of query rows, and by splits of the cells; splits give partial states that
//! [`combine`] merges (FlashDecoding). All query heads of a KV head are processed together, so that packed codes are read
//! and unpacked once.
#![forbid(unsafe_code)]

mod args;
mod blocks;
mod partial;
mod tile;

#[cfg(test)]
mod tests;

pub use args::{AttendArgs, Mask};
pub use partial::{combine, n_splits};

use crate::error::Result;
use crate::layout::Layout;

/// Computes part `part` of `n_parts` of the attention of one layer and stream. Parts may run at the same time; together
/// they call `emit(offset, floats)` once for every row of the output, for disjoint ranges. A query that sees nothing gives
/// zeros. A query row with a value that is not finite, or beyond 1e20 once it is scaled, gives NaN in its own output row and
/// touches no other; non-finite keys and values count as 0 (NaN) and +-65504.
///
/// # Errors
///
/// [`crate::error::Status::InvalidArgument`] if sizes do not agree.
pub fn attend(
    layout: &Layout,
    args: &AttendArgs,
    part: usize,
    n_parts: usize,
    emit: &mut dyn FnMut(usize, &[f32]),
) -> Result<()> {
    args.check(layout)?;
    let n_kv_heads = layout.shape().n_kv_heads as usize;
    let per_tile = partial::tokens_per_tile(layout.shape().gqa_ratio());
    let n_tiles = args.n_tokens.div_ceil(per_tile);
    let n_items = n_kv_heads * n_tiles * args.n_splits;
    tile::with_workspace(|work| {
        for item in (part..n_items).step_by(n_parts.max(1)) {
            let (head, rest) = (item % n_kv_heads, item / n_kv_heads);
            let (split, i) = (rest % args.n_splits, rest / args.n_splits);
            let tokens = i * per_tile..((i + 1) * per_tile).min(args.n_tokens);
            tile::run(layout, args, head, tokens, split, work, emit);
        }
    });
    Ok(())
}
