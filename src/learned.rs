//! What a head's store step has learned from the rows that came by: how large its queries are, channel by channel, which
//! factors its last page was smoothed with, and how far packed keys are off. It lies in the head's key region.
#![forbid(unsafe_code)]

use crate::layout::COUNTERS;
use crate::rows::{finite, read_float, Rows};
use crate::shape::{Shape, MAX_HEAD_DIM};

/// Queries that the mean of their squares remembers: older ones fade.
const MOMENT_MEMORY: f32 = 4096.0;

/// Rows that [`KeyError`] remembers.
const ERROR_MEMORY: f32 = 4096.0;

/// The squares of queries that codecs weigh errors with; empty without any queries so far.
pub(crate) fn read_moments(learned: &[u8], out: &mut Vec<f32>) {
    out.clear();
    let dim = learned.len().saturating_sub(4 * COUNTERS) / 5;
    if dim > 0 && read_float(&learned[4 * dim..]) > 0.0 {
        out.extend(learned[..4 * dim].chunks_exact(4).map(read_float));
    }
}

/// Adds the squares of the ubatch's queries of a KV head to its moments.
pub(crate) fn learn_queries(shape: Shape, head: usize, learned: &mut [u8], q: &Rows, n_tokens: usize) {
    let (dim, gqa) = (shape.head_dim_k as usize, shape.gqa_ratio());
    if n_tokens == 0 {
        return;
    }
    let mut squares = [0f32; MAX_HEAD_DIM as usize];
    for token in 0..n_tokens {
        for q_head in head * gqa..(head + 1) * gqa {
            squares.iter_mut().zip(q.row(token, q_head, dim)).for_each(|(s, x)| *s += finite(*x) * finite(*x));
        }
    }
    let (means, rest) = learned.split_at_mut(4 * dim);
    let (n, seen) = ((n_tokens * gqa) as f32, read_float(rest));
    for (bytes, sum) in means.chunks_exact_mut(4).zip(&squares) {
        let mean = read_float(bytes);
        bytes.copy_from_slice(&(mean + (sum - mean * n) / (seen + n)).to_le_bytes());
    }
    rest[..4].copy_from_slice(&(seen + n).min(MOMENT_MEMORY).to_le_bytes());
}

/// The exponents that the page sealed last was smoothed with; zeros before the first.
pub(crate) fn exponents(learned: &mut [u8]) -> &mut [u8] {
    let dim = learned.len().saturating_sub(4 * COUNTERS) / 5;
    let at = learned.len() - dim;
    &mut learned[at..]
}

/// How far packed keys are off, in the metric of the queries: means over a sample of the rows sealed lately. Times
/// the square of the factor on the scores, `noise` is the variance of what packing adds to an attention logit,
/// `signal` that of the logit itself.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct KeyError {
    /// Variance that packing adds to a product of query and key: the sum over channels of the queries' mean square
    /// times the key's squared error.
    pub noise: f32,
    /// Variance of the product: the same of the key's distance from its page's mean.
    pub signal: f32,
    /// Rows that the means stand for; 0: none was sealed yet, and the others are 0 too.
    pub rows: f32,
}

impl KeyError {
    /// Takes in the rows that another one stands for.
    pub fn add(&mut self, other: &KeyError) {
        let rows = self.rows + other.rows;
        if rows > 0.0 {
            self.noise += (other.noise - self.noise) * (other.rows / rows);
            self.signal += (other.signal - self.signal) * (other.rows / rows);
            self.rows = rows;
        }
    }

    pub(crate) fn read(learned: &[u8]) -> Self {
        let dim = learned.len().saturating_sub(4 * COUNTERS) / 5;
        let number = |i: usize| read_float(&learned[4 * (dim + 1 + i)..]);
        Self { noise: number(0), signal: number(1), rows: number(2) }
    }

    pub(crate) fn write(&self, learned: &mut [u8]) {
        let dim = learned.len().saturating_sub(4 * COUNTERS) / 5;
        let numbers = [self.noise, self.signal, self.rows.min(ERROR_MEMORY)];
        for (bytes, x) in learned[4 * (dim + 1)..].chunks_exact_mut(4).zip(numbers) {
            bytes.copy_from_slice(&x.to_le_bytes());
        }
    }
}

/// Rows of a page whose error is looked at: enough, since a page has the same parameters throughout, and few, since
/// decoding a row costs about as much as coding it.
const SAMPLES: usize = 4;

/// Rows of a page before they are coded, to be compared with what they became.
pub(crate) struct Sample {
    rows: [[f32; MAX_HEAD_DIM as usize]; SAMPLES],
    mean: [f32; MAX_HEAD_DIM as usize],
    index: [usize; SAMPLES],
    n: usize,
    dim: usize,
}

impl Sample {
    /// Takes some of `rows` `[n][dim]`, none of those that are `exact` elsewhere.
    pub(crate) fn take(rows: &[f32], dim: usize, exact: &[bool]) -> Self {
        let mut sample = Sample {
            rows: [[0.0; MAX_HEAD_DIM as usize]; SAMPLES],
            mean: [0.0; MAX_HEAD_DIM as usize],
            index: [0; SAMPLES],
            n: 0,
            dim,
        };
        crate::codec::quantizer::mean_row(rows, &mut sample.mean[..dim]);
        let n_rows = rows.len() / dim;
        for i in (0..n_rows).step_by((n_rows / SAMPLES).max(1)).take(SAMPLES) {
            if exact.get(i) != Some(&true) {
                sample.rows[sample.n][..dim].copy_from_slice(&rows[i * dim..][..dim]);
                sample.index[sample.n] = i;
                sample.n += 1;
            }
        }
        sample
    }

    /// The error of the sampled rows; `decode(i, out)` gives what row `i` became.
    pub(crate) fn error(&self, moments: &[f32], mut decode: impl FnMut(usize, &mut [f32])) -> KeyError {
        let mut total = KeyError::default();
        let mut decoded = [0f32; MAX_HEAD_DIM as usize];
        for (row, index) in self.rows.iter().zip(self.index).take(self.n) {
            decode(index, &mut decoded[..self.dim]);
            let mut one = KeyError { rows: 1.0, ..KeyError::default() };
            for (c, q) in moments.iter().enumerate() {
                let (error, spread) = (decoded[c] - row[c], row[c] - self.mean[c]);
                one.noise += q * error * error;
                one.signal += q * spread * spread;
            }
            total.add(&one);
        }
        total
    }
}
