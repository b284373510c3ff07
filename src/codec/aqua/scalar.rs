//! The specification of codec `aqua`'s attention.
#![forbid(unsafe_code)]

use super::frame::Place;
use super::kernels::Kernels;
use super::{AquaCodec, MAX_DIM};
use crate::codec::channel::scalar::decode_page;
use crate::codec::page::{PageCodec, PageRef};
use crate::codec::quantizer::{dot, sum};
use crate::codec::query::{Probabilities, Query};
use crate::simd::isa::Scalar;

impl Kernels for Scalar {
    fn enter(&self, codec: &AquaCodec, place: Place, at: &[u32], keys: &mut [f32]) {
        enter(codec, place, at, keys);
    }

    fn predict(&self, codec: &AquaCodec, page: PageRef, at: &[u32], out: &mut [f32]) {
        predict(codec, page, at, out);
    }

    /// `score = y . z + R(-s) q . R(j) beta` with `y = T^-T R(-s) q`.
    fn scores(&self, codec: &AquaCodec, page: PageRef, query: &mut Query, scores: &mut [f32]) {
        let (place, dim) = (codec.place(page.bytes), codec.frame.dim_k);
        let (inner, head) = (codec.inner(place), codec.frame.head(place));
        let mut framed = std::mem::take(&mut query.framed);
        codec.frame.turn_queries(place, &mut framed);
        let n_rows = framed.turned.len() / dim;
        let mut y = framed.turned.clone();
        if !head.directions.is_empty() {
            for (y, q) in y.chunks_exact_mut(dim).zip(framed.turned.chunks_exact(dim)) {
                y.iter_mut().zip(head.directions.chunks_exact(dim)).for_each(|(y, direction)| *y = dot(q, direction));
            }
        }
        let coded = query.plain_rows(n_rows, inner.query_dim()).chunks_exact_mut(inner.query_dim());
        coded.zip(y.chunks_exact(dim)).for_each(|(to, y)| to[..inner.head_dim].copy_from_slice(&y[..inner.head_dim]));
        inner.scores(page, query, scores);
        let mut means = [0f32; MAX_DIM];
        codec.read_means(page, place, &mut means[..dim]);
        let rows = y.chunks_exact(dim).zip(framed.turned.chunks_exact(dim));
        for ((y, q), scores) in rows.zip(scores.chunks_exact_mut(codec.page)) {
            let of_means = dot(y, &means[..dim]);
            for (j, score) in scores.iter_mut().enumerate() {
                let bias = head.bias_of(place, j, dim);
                *score += of_means + bias.map_or(0.0, |bias| dot(q, bias));
            }
        }
        query.framed = framed;
    }

    fn add_keys(&self, codec: &AquaCodec, page: PageRef, p: &mut Probabilities, sums: &mut [f32]) {
        let dim = codec.frame.dim_k;
        let keys = &mut p.keys;
        keys.resize(dim * codec.page, 0.0);
        page_keys(codec, page, keys);
        let weights = p.p[..p.n_rows * codec.page].chunks_exact(codec.page);
        for (weights, sums) in weights.zip(sums.chunks_exact_mut(dim + 1)) {
            let gated = |t: usize| if codec.gate(page.bytes, t) { weights[t] } else { 0.0 };
            let weights: Vec<f32> = (0..codec.page).map(gated).collect();
            sums.iter_mut().zip(keys.chunks_exact(codec.page)).for_each(|(sum, key)| *sum += dot(&weights, key));
            sums[dim] += sum(&weights, |weight| weight);
        }
    }
}

/// See [`Kernels::enter`].
#[inline(always)]
pub(super) fn enter(codec: &AquaCodec, place: Place, at: &[u32], keys: &mut [f32]) {
    let angles = codec.frame.angles(place);
    for (&row, key) in at.iter().zip(keys.chunks_exact_mut(codec.frame.dim_k)) {
        codec.frame.enter(place, &angles, row as usize, key);
    }
}

/// See [`Kernels::predict`].
#[inline(always)]
pub(super) fn predict(codec: &AquaCodec, page: PageRef, at: &[u32], out: &mut [f32]) {
    let (dim_k, dim_v) = (codec.frame.dim_k, codec.frame.dim_v);
    let head = codec.frame.head(codec.place(page.bytes));
    let (mut keys, mut z) = (vec![0f32; dim_k * codec.page], [0f32; MAX_DIM]);
    page_keys(codec, page, &mut keys);
    for (&row, out) in at.iter().zip(out.chunks_exact_mut(dim_v)) {
        z.iter_mut().zip(keys.iter().skip(row as usize).step_by(codec.page)).for_each(|(z, key)| *z = *key);
        head.predict(&z[..dim_k], out);
    }
}

/// Decodes what a page codes, `out[coefficient][row]`.
#[inline(always)]
fn page_keys(codec: &AquaCodec, page: PageRef, out: &mut [f32]) {
    let (place, mut means) = (codec.place(page.bytes), [0f32; MAX_DIM]);
    codec.read_means(page, place, &mut means[..codec.frame.dim_k]);
    out.chunks_exact_mut(codec.page).zip(means).for_each(|(channel, mean)| channel.fill(mean));
    decode_page(codec.inner(place), page, out);
}
