//! Attention on a compressed cache: one online softmax over sealed pages, exact slots and the rows of the current ubatch.
//!
//! Work is split by KV head, by tiles of query rows, and by splits of the cells; splits give partial states that
//! [`combine`] merges (FlashDecoding). All query heads of a KV head are processed together, so that packed codes are read
//! and unpacked once.
#![forbid(unsafe_code)]

mod blocks;
mod partial;
mod tile;

#[cfg(test)]
mod tests;

pub use partial::{combine, n_splits};

use crate::codec::Side;
use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::plan::{Plan, View};
use crate::rotation::Rotation;
use crate::store::{check_plan, check_rotation};

/// Rows of all heads: element `c` of head `h` of token `t` is `data[t * stride_token + h * stride_head + c]`.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    /// The elements.
    pub data: &'a [f32],
    /// Distance between tokens.
    pub stride_token: usize,
    /// Distance between heads.
    pub stride_head: usize,
}

impl<'a> Rows<'a> {
    /// One head vector.
    pub fn row(&self, token: usize, head: usize, dim: usize) -> &'a [f32] {
        &self.data[token * self.stride_token + head * self.stride_head..][..dim]
    }

    fn check(&self, what: &str, n_tokens: usize, n_heads: usize, dim: usize) -> Result<()> {
        let need = (n_tokens - 1)
            .checked_mul(self.stride_token)
            .zip((n_heads - 1).checked_mul(self.stride_head))
            .and_then(|(a, b)| a.checked_add(b)?.checked_add(dim));
        match need {
            Some(need) if need <= self.data.len() => Ok(()),
            _ => Err(Error::invalid(format!("{what} holds {} floats, too few for its strides", self.data.len()))),
        }
    }
}

/// The attention mask, `[n_tokens][n_kv]` with a row stride: added to the scores; minus infinity hides a cell.
#[derive(Clone, Copy)]
pub enum Mask<'a> {
    /// Every cell that holds a row is visible.
    None,
    /// FP16 bits.
    F16(&'a [u16]),
    /// Single precision.
    F32(&'a [f32]),
}

/// Everything [`attend`] reads, for one layer and stream.
#[derive(Clone, Copy)]
pub struct AttendArgs<'a> {
    /// Queries, `[n_tokens][n_heads][head_dim_k]`.
    pub q: Rows<'a>,
    /// Keys and values of the ubatch, `[n_tokens][n_kv_heads][head_dim]`, which the store has not written yet. `None`:
    /// another layer has stored them already, attend the plan's view after the store.
    pub current: Option<(Rows<'a>, Rows<'a>)>,
    /// Key buffer of the stream.
    pub k_mem: &'a [u8],
    /// Value buffer of the stream.
    pub v_mem: &'a [u8],
    /// The planner's plan for this ubatch and stream.
    pub plan: Plan<'a>,
    /// How keys turn when their positions move. `None`: no position has moved, the plan has no turns.
    pub rotation: Option<&'a Rotation>,
    /// The mask.
    pub mask: Mask<'a>,
    /// Distance between rows of the mask, in elements.
    pub mask_stride_token: usize,
    /// Columns of the mask; cells from here on are hidden.
    pub n_kv: usize,
    /// Learned sink logits, `[n_heads]`: one more term in the softmax's denominator.
    pub sink_logits: Option<&'a [f32]>,
    /// Multiplies scores.
    pub scale: f32,
    /// `softcap * tanh(score / softcap)` if positive.
    pub softcap: f32,
    /// ALiBi: slopes multiply the mask (Press et al. 2022, with ggml's rule for head counts that are no power of two).
    pub max_bias: f32,
    /// Query tokens.
    pub n_tokens: usize,
    /// 1: `emit` gets final rows of `[n_tokens][n_heads][head_dim_v]`. More: partial states of
    /// `[n_splits][n_tokens][n_heads][head_dim_v + 2]` for [`combine`].
    pub n_splits: usize,
    /// Final rows only: `emit` also gets `[n_tokens][n_heads]` natural logarithms of the softmax denominators, behind the
    /// rows.
    pub with_lse: bool,
}

impl AttendArgs<'_> {
    fn view(&self) -> View {
        match self.current {
            Some(_) => View::Before,
            None => View::After,
        }
    }

    fn check(&self, layout: &Layout) -> Result<()> {
        let shape = layout.shape();
        let (n_heads, n_kv_heads) = (shape.n_heads as usize, shape.n_kv_heads as usize);
        if self.n_tokens == 0 || self.n_tokens != self.plan.n_tokens() || self.n_splits == 0 {
            return Err(Error::invalid(format!(
                "{} query tokens in {} splits, but the plan is for {} tokens",
                self.n_tokens,
                self.n_splits,
                self.plan.n_tokens()
            )));
        }
        check_plan(layout, &self.plan)?;
        check_rotation(layout, &self.plan, self.rotation)?;
        self.q.check("q", self.n_tokens, n_heads, shape.head_dim_k as usize)?;
        if let Some((k, v)) = &self.current {
            k.check("k", self.n_tokens, n_kv_heads, shape.head_dim_k as usize)?;
            v.check("v", self.n_tokens, n_kv_heads, shape.head_dim_v as usize)?;
        }
        if self.k_mem.len() < layout.k_bytes() || self.v_mem.len() < layout.v_bytes() {
            return Err(Error::invalid("the key or value buffer is smaller than the layout says"));
        }
        if self.sink_logits.is_some_and(|s| s.len() < n_heads) {
            return Err(Error::invalid("the sink logits are fewer than the heads"));
        }
        let mask_len = match self.mask {
            Mask::None => return Ok(()),
            Mask::F16(m) => m.len(),
            Mask::F32(m) => m.len(),
        };
        let need = (self.n_tokens - 1).checked_mul(self.mask_stride_token).and_then(|n| n.checked_add(self.n_kv));
        if need.is_none_or(|need| need > mask_len) {
            return Err(Error::invalid("the mask is smaller than its sizes say"));
        }
        Ok(())
    }
}

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
    let per_tile = tile::tokens_per_tile(layout.shape().gqa_ratio());
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

/// Region of one KV head in a stream's buffer.
fn region<'a>(layout: &Layout, side: Side, mem: &'a [u8], head: usize) -> &'a [u8] {
    let bytes = layout.head_bytes(side);
    &mem[head * bytes..(head + 1) * bytes]
}

/// ALiBi slope of a query head, as ggml computes it.
fn alibi_slope(head: usize, n_heads: usize, max_bias: f32) -> f32 {
    if max_bias <= 0.0 {
        return 1.0;
    }
    let n = 1usize << n_heads.ilog2();
    if head < n {
        2f32.powf(-max_bias / n as f32).powi(head as i32 + 1)
    } else {
        2f32.powf(-max_bias / 2.0 / n as f32).powi(2 * (head - n) as i32 + 1)
    }
}
