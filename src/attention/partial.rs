//! How attention is cut up, into tiles of query rows and splits over the cells, and how the parts of a row are merged.
#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use crate::layout::Layout;

/// Query rows (tokens times query heads of a KV head) of a tile: enough to pay for unpacking a page, few enough that
/// scores and outputs stay near. 32 took 6 % longer with AMX (docs/notes.md).
const TILE_ROWS: usize = 64;

/// Query tokens of a tile.
pub(super) fn tokens_per_tile(gqa_ratio: usize) -> usize {
    (TILE_ROWS / gqa_ratio).max(1)
}

/// Number of splits over the cells that keeps `n_threads` threads busy with `n_tokens` query tokens.
pub fn n_splits(layout: &Layout, n_tokens: usize, n_threads: usize) -> usize {
    let shape = layout.shape();
    let items = shape.n_kv_heads as usize * n_tokens.max(1).div_ceil(tokens_per_tile(shape.gqa_ratio()));
    if items >= n_threads && (items.is_multiple_of(n_threads) || items >= 4 * n_threads) {
        return 1;
    }
    // Enough splits that every thread gets the same number of items, or nearly so.
    let wanted = n_threads / gcd(items, n_threads);
    if wanted <= 8 {
        wanted
    } else {
        (2 * n_threads).div_ceil(items)
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 {
        a
    } else {
        gcd(b, a % b)
    }
}

/// Adds the learned sink logit to the softmax and divides by its sum: the last step of every output row. Gives the
/// logarithm of the denominator.
pub(super) fn finish(row: &mut [f32], max: f32, sum: f32, sink_logit: Option<f32>) -> f32 {
    let (mut factor, mut sum, mut top) = (1.0, sum, max);
    if let Some(sink) = sink_logit {
        top = max.max(sink);
        factor = (max - top).exp();
        sum = sum * factor + (sink - top).exp();
    }
    let scale = if sum > 0.0 { factor / sum } else { 0.0 };
    // The sum of a row whose query is not finite is NaN; it must not look valid.
    let scale = if sum.is_nan() { f32::NAN } else { scale };
    row.iter_mut().for_each(|x| *x *= scale);
    top + sum.ln()
}

/// Merges partial states `[n_splits][n_tokens][n_heads][head_dim_v + 2]` (output, maximum, sum) into final rows of
/// `[n_tokens][n_heads][head_dim_v]`, part `part` of `n_parts` of them. `emit` and `with_lse` as for
/// [`super::attend`].
#[allow(clippy::too_many_arguments)]
pub fn combine(
    layout: &Layout,
    partial: &[f32],
    sink_logits: Option<&[f32]>,
    n_splits: usize,
    n_tokens: usize,
    with_lse: bool,
    part: usize,
    n_parts: usize,
    emit: &mut dyn FnMut(usize, &[f32]),
) -> Result<()> {
    let (n_heads, dim) = (layout.shape().n_heads as usize, layout.shape().head_dim_v as usize);
    if n_splits == 0 {
        return Err(Error::invalid("n_splits is 0: there is nothing to combine"));
    }
    let n_rows = n_tokens.saturating_mul(n_heads);
    let need = n_splits.saturating_mul(n_rows).saturating_mul(dim + 2);
    if partial.len() < need || sink_logits.is_some_and(|s| s.len() < n_heads) {
        return Err(Error::invalid("the partial states or the sink logits are smaller than their sizes say"));
    }
    let mut out = [0f32; crate::shape::MAX_HEAD_DIM as usize];
    let out = &mut out[..dim];
    for row in (part..n_rows).step_by(n_parts.max(1)) {
        let state = |split: usize| &partial[(split * n_rows + row) * (dim + 2)..][..dim + 2];
        let max = (0..n_splits).fold(f32::NEG_INFINITY, |a, s| a.max(state(s)[dim]));
        let mut sum = 0.0;
        out.fill(0.0);
        for split in 0..n_splits {
            let state = state(split);
            // A split that saw nothing has maximum minus infinity and weighs nothing, also if all are such.
            let weight = if state[dim] == f32::NEG_INFINITY { 0.0 } else { (state[dim] - max).exp() };
            sum += weight * state[dim + 1];
            out.iter_mut().zip(state).for_each(|(o, x)| *o += weight * x);
        }
        let lse = finish(out, max, sum, sink_logits.map(|s| s[row % n_heads]));
        emit(row * dim, out);
        if with_lse {
            emit(n_rows * dim + row, &[lse]);
        }
    }
    Ok(())
}
