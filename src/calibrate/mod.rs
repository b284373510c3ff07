//! Making a profile: what a layer's keys, values and queries look like while a model reads a text.
//!
//! Average errors are ruled by the many tokens that nobody looks at. So each token counts by the attention that later queries
//! pay to it: an error of its key by the squared weights times the squared distances of its value from the outputs, an error
//! of its value by the squared weights. Only queries count that come so long after the token that it is packed by then.
#![forbid(unsafe_code)]

mod fit;
#[cfg(test)]
mod tests;

use std::sync::{Mutex, PoisonError};

use half::f16;
use nalgebra::DMatrix;

use crate::attention::Mask;
use crate::codec::quantizer::dot;
use crate::error::{Error, Result};
use crate::parallel;
use crate::profile::LayerProfile;
use crate::rotation::{Angles, Rotation};
use crate::rows::{finite, Rows};
use crate::shape::Shape;
use crate::simd::exact::{ExactRows, Kernels};
use crate::simd::isa::IsaToken;
use crate::simd::kernels;

/// Tokens of a page while statistics are made; recipes may have others.
const PAGE: usize = 128;
/// Positions from which on a query counts for a token: a window's.
const DISTANCE: usize = 128;
/// First tokens of each text, which recipes keep exact.
const SINKS: usize = 4;
/// Logarithm of the least weight that counts: the squares of smaller ones are lost beside those of tokens that matter.
const LEAST_LOG: f32 = -11.5;
/// Above the logarithm of any weight, by rounding.
const MOST_LOG: f32 = 1e-3;
/// Query tokens that are looked at together.
const QUERIES: usize = 8;

/// Statistics of one layer. Threads may observe at the same time.
pub struct Calibration {
    shape: Shape,
    rotation: Rotation,
    heads: Vec<Mutex<Samples>>,
}

/// What has been seen of one KV head: memory of an f16 cache of all tokens, and a matrix.
#[derive(Default)]
struct Samples {
    /// Tokens of each text.
    lengths: Vec<usize>,
    keys: Vec<f16>,
    values: Vec<f16>,
    /// How much an error of a token's key matters, and one of its value.
    key_weights: Vec<f32>,
    value_weights: Vec<f32>,
    /// `[head_dim_k][head_dim_k]`: moments of the queries in the frames of the pages they looked at, weighted alike.
    metric: Vec<f64>,
}

/// What a layer did with a text from its first token on, exactly.
#[derive(Clone, Copy)]
pub struct Observation<'a> {
    /// `[n_tokens][n_heads][head_dim_k]`
    pub q: Rows<'a>,
    /// `[n_tokens][n_kv_heads][head_dim_k]`
    pub k: Rows<'a>,
    /// `[n_tokens][n_kv_heads][head_dim_v]`
    pub v: Rows<'a>,
    /// Outputs of attention, `[n_tokens][n_heads][head_dim_v]`.
    pub out: Rows<'a>,
    /// Logarithms of the softmax denominators, `[n_tokens][n_heads]`.
    pub lse: &'a [f32],
    /// `[n_tokens]` rows with a column per token.
    pub mask: Mask<'a>,
    /// Distance between rows of the mask.
    pub mask_stride_token: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// Soft cap of the scores; 0: none.
    pub softcap: f32,
    /// Tokens of the text, at positions from 0 on.
    pub n_tokens: usize,
}

impl Calibration {
    /// Nothing seen yet.
    ///
    /// # Errors
    ///
    /// [`crate::error::Status::Shape`] and [`crate::error::Status::InvalidArgument`] for heads that cannot be.
    pub fn new(shape: Shape, rotation: Rotation) -> Result<Self> {
        shape.validate()?;
        rotation.check(shape.head_dim_k as usize)?;
        let heads = (0..shape.n_kv_heads).map(|_| Mutex::default()).collect();
        Ok(Self { shape, rotation, heads })
    }

    /// Takes in part `part` of `n_parts` of an observation. Parts may run at the same time.
    ///
    /// # Errors
    ///
    /// [`crate::error::Status::InvalidArgument`] if sizes do not agree.
    pub fn observe(&self, seen: &Observation, part: usize, n_parts: usize) -> Result<()> {
        self.check(seen)?;
        let kernels = kernels(IsaToken::detect()?);
        for head in (part..self.heads.len()).step_by(n_parts.max(1)) {
            let mut samples = self.heads[head].lock().unwrap_or_else(PoisonError::into_inner);
            self.observe_head(seen, head, kernels, &mut samples);
        }
        Ok(())
    }

    /// The profile of the layer, worked out on at most `n_threads` threads.
    ///
    /// # Errors
    ///
    /// [`crate::error::Status::InvalidArgument`] if too little has been seen.
    pub fn solve(&self, n_threads: usize) -> Result<LayerProfile> {
        let found: Vec<Mutex<[Vec<f32>; 4]>> = self.heads.iter().map(|_| Mutex::default()).collect();
        parallel::for_each(n_threads, (0..self.heads.len()).collect(), |head| {
            let samples = self.heads[head].lock().unwrap_or_else(PoisonError::into_inner);
            let solved = fit::solve(&samples, self.shape, &self.rotation)?;
            *found[head].lock().unwrap_or_else(PoisonError::into_inner) = solved;
            Ok(())
        })?;
        let mut arrays: [Vec<f32>; 4] = Default::default();
        for head in found {
            let head = head.into_inner().unwrap_or_else(PoisonError::into_inner);
            arrays.iter_mut().zip(head).for_each(|(all, own)| all.extend(own));
        }
        LayerProfile::new(self.shape, self.rotation.clone(), arrays)
    }

    /// Whose layer.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    fn check(&self, seen: &Observation) -> Result<()> {
        let Shape { n_heads, n_kv_heads, head_dim_k, head_dim_v } = self.shape;
        let [heads, kv_heads, k, v] = [n_heads, n_kv_heads, head_dim_k, head_dim_v].map(|n| n as usize);
        let n = seen.n_tokens;
        if n == 0 || seen.lse.len() < n * heads {
            return Err(Error::invalid(format!("{n} tokens with {} denominators for {heads} heads", seen.lse.len())));
        }
        seen.q.check("q", n, heads, k)?;
        seen.k.check("k", n, kv_heads, k)?;
        seen.v.check("v", n, kv_heads, v)?;
        seen.out.check("out", n, heads, v)?;
        let columns = match seen.mask {
            Mask::None => return Ok(()),
            Mask::F16(mask) => mask.len(),
            Mask::F32(mask) => mask.len(),
        };
        if columns < (n - 1) * seen.mask_stride_token + n {
            return Err(Error::invalid("the mask is smaller than its sizes say"));
        }
        Ok(())
    }

    fn observe_head(&self, seen: &Observation, head: usize, kernels: &dyn Kernels, samples: &mut Samples) {
        let (k, v, n) = (self.shape.head_dim_k as usize, self.shape.head_dim_v as usize, seen.n_tokens);
        let gather = |rows: &Rows, dim: usize| -> Vec<f32> {
            // Kernels read whole pages.
            let mut all = vec![0f32; n.next_multiple_of(PAGE) * dim];
            all.chunks_exact_mut(dim).take(n).enumerate().for_each(|(token, to)| copy(rows.row(token, head, dim), to));
            all
        };
        let (keys, values) = (gather(&seen.k, k), gather(&seen.v, v));
        let squares = values.chunks_exact(v).map(|value| dot(value, value)).collect();
        let [key_weights, value_weights] = [(); 2].map(|()| vec![0.0; n]);
        let mut text = Text { keys, values, squares, key_weights, value_weights, metric: DMatrix::zeros(k, k) };
        for first in (0..n).step_by(PAGE) {
            self.weigh_page(seen, first, head, kernels, &mut text);
        }
        samples.lengths.push(n);
        samples.keys.extend(text.keys[..n * k].iter().map(|x| f16::from_f32(*x)));
        samples.values.extend(text.values[..n * v].iter().map(|x| f16::from_f32(*x)));
        samples.key_weights.extend(text.key_weights);
        samples.value_weights.extend(text.value_weights);
        samples.metric.resize(k * k, 0.0);
        samples.metric.iter_mut().zip(text.metric.iter()).for_each(|(sum, x)| *sum += f64::from(*x));
    }

    /// Adds what all queries that come late enough make of the tokens of a page.
    fn weigh_page(&self, seen: &Observation, first: usize, head: usize, kernels: &dyn Kernels, text: &mut Text) {
        let (k, v) = (self.shape.head_dim_k as usize, self.shape.head_dim_v as usize);
        let (gqa, heads) = (self.shape.gqa_ratio(), self.shape.n_heads as usize);
        let mut angles = Angles::default();
        self.rotation.angles(first as i32, &mut angles);
        let [mut queries, mut outs] = [k, v].map(|dim| vec![0f32; QUERIES * gqa * dim]);
        let mut turned = Vec::<f32>::new();
        let [mut scores, mut products] = [(); 2].map(|()| vec![0f32; QUERIES * gqa * PAGE]);
        let all: Vec<usize> = (first + DISTANCE..seen.n_tokens).collect();
        for some in all.chunks(QUERIES) {
            let each =
                || some.iter().flat_map(|query| (head * gqa..(head + 1) * gqa).map(move |q_head| (*query, q_head)));
            let gather = |to: &mut [f32], from: &Rows, dim| {
                let rows = each().zip(to.chunks_exact_mut(dim));
                rows.for_each(|((query, q_head), to)| copy(from.row(query, q_head, dim), to));
            };
            gather(&mut queries, &seen.q, k);
            gather(&mut outs, &seen.out, v);
            kernels.exact_scores(
                &queries,
                ExactRows { data: &text.keys[first * k..][..PAGE * k], n: PAGE, dim: k },
                &mut scores,
                PAGE,
            );
            kernels.exact_scores(
                &outs,
                ExactRows { data: &text.values[first * v..][..PAGE * v], n: PAGE, dim: v },
                &mut products,
                PAGE,
            );
            for (row, (query, q_head)) in each().enumerate() {
                let lse = seen.lse[query * heads + q_head];
                let [scores, products] = [&scores, &products].map(|all| &all[row * PAGE..][..PAGE]);
                let out = &outs[row * v..][..v];
                let weight = text.weigh(seen, (first, query), scores, products, [lse, dot(out, out)]);
                if weight > 0.0 {
                    let at = turned.len();
                    turned.extend(queries[row * k..][..k].iter().map(|x| x * weight.sqrt()));
                    self.rotation.turn_back(&mut turned[at..], &angles);
                }
            }
        }
        let turned = DMatrix::from_vec(k, turned.len() / k, turned);
        text.metric += &turned * turned.transpose();
    }
}

/// One head's part of a text.
struct Text {
    keys: Vec<f32>,
    values: Vec<f32>,
    /// Of the values.
    squares: Vec<f32>,
    key_weights: Vec<f32>,
    value_weights: Vec<f32>,
    metric: DMatrix<f32>,
}

impl Text {
    /// Adds what one query makes of the tokens of the page from `first` on to their weights; gives the sum of those of the keys.
    /// `scores` and `products` are those of the query with keys and of its output with values, `[lse, square]` belong to
    /// them: the logarithm of the denominator and the output's square.
    fn weigh(
        &mut self,
        seen: &Observation,
        (first, query): (usize, usize),
        scores: &[f32],
        products: &[f32],
        [lse, square]: [f32; 2],
    ) -> f32 {
        let mut total = 0.0;
        for token in first.max(SINKS)..(first + PAGE).min(query + 1 - DISTANCE) {
            let mut score = seen.scale * scores[token - first];
            if seen.softcap > 0.0 {
                score = seen.softcap * (score / seen.softcap).tanh();
            }
            // Hidden tokens may score anything.
            if !(LEAST_LOG..=MOST_LOG).contains(&(score - lse)) || is_hidden(seen, query, token) {
                continue;
            }
            let p = (score - lse).exp();
            let distance = (self.squares[token] - 2.0 * products[token - first] + square).max(0.0);
            self.key_weights[token] += p * p * distance;
            self.value_weights[token] += p * p;
            total += p * p * distance;
        }
        total
    }
}

fn copy(from: &[f32], to: &mut [f32]) {
    to.copy_from_slice(from);
    to.iter_mut().for_each(|x| *x = finite(*x));
}

fn is_hidden(seen: &Observation, query: usize, token: usize) -> bool {
    let at = query * seen.mask_stride_token + token;
    match seen.mask {
        Mask::None => false,
        Mask::F16(mask) => mask[at] == f16::NEG_INFINITY.to_bits(),
        Mask::F32(mask) => mask[at] == f32::NEG_INFINITY,
    }
}
