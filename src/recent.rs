//! How much attention the last queries paid to the tokens of a page: QAQ's prediction of what later queries will do
//! (arXiv 2403.04643, section 3.5: the maximum over a window of queries).
//!
//! The queries of a KV head lie in a ring in the layer's memory with the logarithm of their softmax denominators, which
//! attention gives. Weights are only computed for the tokens of a page that is being sealed. A page is sealed no earlier
//! than as many tokens after its last one as the window is long, so all queries of the ring come after all its tokens;
//! that they may belong to other sequences is not looked at. Soft caps and ALiBi are left out of these weights.
#![forbid(unsafe_code)]

use crate::codec::quantizer::dot;
use crate::head::{Head, HeadMut};
use crate::layout::{entry_bytes, Layout, COUNT_BYTES};
use crate::rows::{finite, read_float, read_half, write_half, Rows};
use crate::shape::MAX_HEAD_DIM;

/// Queries of a ubatch, as attention saw them.
#[derive(Clone, Copy)]
pub struct Attended<'a> {
    /// Natural logarithms of the softmax denominators, `[n_tokens][n_heads]`.
    pub lse: &'a [f32],
    /// What multiplied the scores.
    pub scale: f32,
}

/// Puts the last queries of a ubatch into the ring of KV head `index`.
pub(crate) fn remember(
    layout: &Layout,
    index: usize,
    head: &mut HeadMut,
    q: &Rows,
    attended: &Attended,
    n_tokens: usize,
) {
    let (window, gqa) = (layout.attn_window(), layout.shape().gqa_ratio());
    let (dim, n_heads) = (head.layout.head_dim, layout.shape().n_heads as usize);
    let (count, ring) = head.recent_mut().split_at_mut(COUNT_BYTES);
    let seen = read_count(count);
    for token in n_tokens.saturating_sub(window)..n_tokens {
        let entry = (seen + token) % window;
        for i in 0..gqa {
            let q_head = index * gqa + i;
            let bytes = &mut ring[(entry * gqa + i) * entry_bytes(dim)..][..entry_bytes(dim)];
            let (query, lse) = bytes.split_at_mut(2 * dim);
            let mut scaled = [0f32; MAX_HEAD_DIM as usize];
            let scaled = &mut scaled[..dim];
            scaled.iter_mut().zip(q.row(token, q_head, dim)).for_each(|(to, x)| *to = finite(*x) * attended.scale);
            write_half(query, scaled);
            lse.copy_from_slice(&attended.lse[token * n_heads + q_head].to_le_bytes());
        }
    }
    // Kept below twice the window: the place in the ring modulo it, and that the ring is full.
    let next = (seen + n_tokens) % window + window * usize::from(seen + n_tokens >= window);
    count.copy_from_slice(&(next as u32).to_le_bytes());
}

/// Largest attention weight of each of the keys `[n][head_dim]` under the queries of the ring; empty without any.
pub(crate) fn attention(layout: &Layout, head: Head, keys: &[f32], out: &mut Vec<f32>) {
    out.clear();
    if head.recent().is_empty() {
        return;
    }
    let (count, ring) = head.recent().split_at(COUNT_BYTES);
    let n_entries = read_count(count).min(layout.attn_window()) * layout.shape().gqa_ratio();
    let dim = head.layout.head_dim;
    if n_entries > 0 {
        out.resize(keys.len() / dim, f32::NEG_INFINITY);
    }
    let mut query = [0f32; MAX_HEAD_DIM as usize];
    let query = &mut query[..dim];
    for entry in ring.chunks_exact(entry_bytes(dim)).take(n_entries) {
        read_half(&entry[..2 * dim], query);
        let lse = read_float(&entry[2 * dim..]);
        if !lse.is_finite() {
            continue;
        }
        for (weight, key) in out.iter_mut().zip(keys.chunks_exact(dim)) {
            *weight = weight.max(dot(query, key) - lse);
        }
    }
    out.iter_mut().for_each(|weight| *weight = exp_of_negative(weight.min(0.0)));
}

/// `e^x` for `x <= 0`, to about 3e-7 of it, in operations that every machine rounds alike: widths of tokens follow from it.
pub(crate) fn exp_of_negative(x: f32) -> f32 {
    // What is below the smallest normal number is nothing.
    if x <= -87.0 {
        return 0.0;
    }
    let n = (x * std::f32::consts::LOG2_E - 0.5) as i32;
    // ln 2 in two parts, of which the first has so few bits that its multiples are exact.
    let r = x - n as f32 * (355.0 / 512.0) - n as f32 * -2.121_944_4e-4;
    let terms = [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];
    let e = terms.iter().fold(1.0 / 5040.0, |e, term| e * r + term);
    f32::from_bits(e.to_bits().wrapping_add((n as u32) << 23))
}

fn read_count(bytes: &[u8]) -> usize {
    u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize
}

#[cfg(test)]
mod tests {
    use super::exp_of_negative;

    /// Every 257th number from -0 to minus infinity.
    #[test]
    fn exponentials_are_near() {
        for x in (0x8000_0000u32..=0xff80_0000).step_by(257).chain([0xff80_0000]).map(f32::from_bits) {
            let (got, want) = (exp_of_negative(x), f64::from(x).exp());
            if x > -87.0 {
                assert!((f64::from(got) / want - 1.0).abs() <= 3e-7, "{x}: {got} {want}");
            } else {
                assert_eq!(got, 0.0, "{x}");
            }
        }
        assert_eq!(exp_of_negative(0.0), 1.0);
        assert_eq!(exp_of_negative(f32::NEG_INFINITY), 0.0);
    }
}
