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
        out.resize(keys.len() / dim, 0.0);
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
            let score = dot(query, key);
            *weight = weight.max((score - lse).min(0.0).exp());
        }
    }
}

fn read_count(bytes: &[u8]) -> usize {
    u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize
}
