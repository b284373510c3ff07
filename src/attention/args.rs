//! What attention reads, and whether it fits together.
#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use crate::layout::{check_plan, Layout};
use crate::plan::{Plan, View};
use crate::rotation::Rotation;
use crate::rows::Rows;
use crate::store::check_rotation;

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

/// Everything [`super::attend`] reads, for one layer and stream.
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
    /// `[n_splits][n_tokens][n_heads][head_dim_v + 2]` for [`super::combine`].
    pub n_splits: usize,
    /// Final rows only: `emit` also gets `[n_tokens][n_heads]` natural logarithms of the softmax denominators, behind the
    /// rows.
    pub with_lse: bool,
}

impl AttendArgs<'_> {
    pub(super) fn view(&self) -> View {
        match self.current {
            Some(_) => View::Before,
            None => View::After,
        }
    }

    pub(super) fn check(&self, layout: &Layout) -> Result<()> {
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

/// ALiBi slope of a query head, as ggml computes it.
pub(super) fn alibi_slope(head: usize, n_heads: usize, max_bias: f32) -> f32 {
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
