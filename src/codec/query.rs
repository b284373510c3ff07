//! Query rows and probabilities in the form that the integer kernels consume, with their buffers.
#![forbid(unsafe_code)]

use super::hadamard;
use super::quantizer::{abs_max, sum};
use crate::codec::float8::factor;
use crate::rotation::Angles;
use crate::shape::MAX_HEAD_DIM;
use crate::simd::aligned::Aligned;

/// Largest magnitude of one int8 coefficient.
const INT8_MAX: f32 = 127.0;
/// Weight of the first of two coefficient planes: a value is `128 * high + low`.
pub(crate) const PLANE: i32 = 128;

/// What a codec wants of query rows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QueryForm {
    /// Channels of a row.
    pub(crate) head_dim: usize,
    /// Channels that share an int8 unit.
    pub(crate) group: usize,
    /// int8 coefficients per channel: 1, or 2 where one would be coarser than the codes.
    pub(crate) planes: usize,
    /// Middle of the codes' range.
    pub(crate) centre: f32,
    /// Rotate rows first.
    pub(crate) rotate: bool,
}

/// Query rows of one KV head, multiplied by the softmax scale and by a page's factors, rotated if the codec rotates, and
/// rounded to int8 per group.
#[derive(Default, Debug)]
pub(crate) struct Query {
    n_rows: usize,
    rows: Aligned<f32>,
    /// Of the page that the rows below are made for; empty: none, or no page has factors.
    exponents: Vec<u8>,
    rotated: Aligned<f32>,
    /// `[row][plane][head_dim]`
    pub(crate) int8: Aligned<i8>,
    /// `[row][group]`: value of one unit of the (low plane's) coefficients.
    pub(crate) scale: Vec<f32>,
    /// `[row][group]`: minus the codes' centre times the sum of the rounded coefficients.
    pub(crate) offset: Vec<f32>,
    /// `[row][group]`: exact sum of the coefficients, which mid-points multiply.
    pub(crate) sum: Vec<f32>,
    pub(crate) framed: Framed,
}

/// Query rows on their way into the frame of a page, of codecs that have frames (`codec::aqua`).
#[derive(Default, Debug)]
pub(crate) struct Framed {
    /// As they came.
    pub(crate) rows: Vec<f32>,
    /// Turned back to where the page is.
    pub(crate) turned: Vec<f32>,
    /// By how much.
    pub(crate) angles: Angles,
    /// What meets the curves of a page, mirrored and negated ones.
    pub(crate) factors: [Vec<f32>; 2],
    /// Sums of these.
    pub(crate) curves: [Vec<f32>; 2],
}

impl Query {
    /// Number of prepared rows.
    pub(crate) fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// The rows as they came, `[n_rows][head_dim]`.
    pub(crate) fn rows(&self) -> &[f32] {
        &self.rows
    }

    /// Takes rows `[n_rows][head_dim]`, already multiplied by the softmax scale; [`Query::prepare`] comes next, at once or,
    /// where pages have factors, after [`Query::set_exponents`].
    pub(crate) fn begin(&mut self, rows: &[f32]) {
        self.rows.clear();
        self.rows.extend_from_slice(rows);
        self.exponents.clear();
    }

    /// Whether the rows have to be prepared anew to meet a page with these exponents, which are then taken.
    pub(crate) fn set_exponents(&mut self, exponents: &[u8]) -> bool {
        let changed = self.exponents != exponents;
        if changed {
            self.exponents.clear();
            self.exponents.extend_from_slice(exponents);
        }
        changed
    }

    /// Room for `n_rows` rows of `dim`, all zero, that kernels take as they are: what [`Query::rotated`] gives.
    pub(crate) fn plain_rows(&mut self, n_rows: usize, dim: usize) -> &mut [f32] {
        self.n_rows = n_rows;
        self.rotated.clear();
        self.rotated.resize(n_rows * dim, 0.0);
        &mut self.rotated
    }

    /// The rows before rounding, `[n_rows][head_dim]`.
    pub(crate) fn rotated(&self) -> &[f32] {
        &self.rotated
    }

    /// Makes of the rows what kernels read. Inlined, so that each instruction set compiles it for itself.
    #[inline(always)]
    pub(crate) fn prepare(&mut self, form: &QueryForm) {
        let QueryForm { head_dim, group, planes, .. } = *form;
        let n_groups = head_dim / group;
        self.n_rows = self.rows.len() / head_dim;
        self.rotated.clear();
        self.rotated.extend_from_slice(&self.rows);
        if !self.exponents.is_empty() {
            let mut factors = [1f32; MAX_HEAD_DIM as usize];
            factors.iter_mut().zip(&self.exponents).for_each(|(f, &e)| *f = factor(i32::from(e as i8)));
            for row in self.rotated.chunks_exact_mut(head_dim) {
                row.iter_mut().zip(&factors).for_each(|(x, f)| *x *= f);
            }
        }
        if form.rotate {
            hadamard::rotate_rows(&mut self.rotated, head_dim);
        }
        let n = self.n_rows * n_groups;
        for values in [&mut self.scale, &mut self.offset, &mut self.sum] {
            values.clear();
            values.resize(n, 0.0);
        }
        self.int8.clear();
        self.int8.resize(self.n_rows * planes * head_dim, 0);
        for (i, x) in self.rotated.chunks_exact(group).enumerate() {
            let (row, g) = (i / n_groups, i % n_groups);
            let int8 = &mut self.int8[row * planes * head_dim..][..planes * head_dim];
            let (high, low) = int8.split_at_mut((planes - 1) * head_dim);
            let at = g * group..(g + 1) * group;
            let high = if planes == 2 { Some(&mut high[at.clone()]) } else { None };
            let (scale, total) = round_group(x, high, &mut low[at]);
            self.scale[i] = scale;
            self.offset[i] = -form.centre * scale * total as f32;
            self.sum[i] = sum(x, |x| x);
        }
    }
}

/// To the nearest integer, halves away from zero; `f32::round` would be a call.
#[inline(always)]
fn nearest(x: f32) -> i32 {
    (x + if x < 0.0 { -0.5 } else { 0.5 }) as i32
}

/// Rounds a group to one or two int8 planes; gives the unit and the integer sum.
#[inline(always)]
fn round_group(x: &[f32], high: Option<&mut [i8]>, low: &mut [i8]) -> (f32, i32) {
    let top = if high.is_some() { INT8_MAX * PLANE as f32 } else { INT8_MAX };
    let max = abs_max(x);
    if max == 0.0 || !max.is_finite() {
        return (0.0, 0);
    }
    let inverse = top / max;
    let mut total = 0;
    match high {
        None => {
            for (low, x) in low.iter_mut().zip(x) {
                let n = nearest(x * inverse);
                total += n;
                *low = n as i8;
            }
        }
        Some(high) => {
            for ((low, high), x) in low.iter_mut().zip(high).zip(x) {
                let n = nearest(x * inverse);
                total += n;
                let h = (n + PLANE / 2) >> 7;
                (*high, *low) = (h as i8, (n - h * PLANE) as i8);
            }
        }
    }
    (max / top, total)
}

/// What part of a bound on the normalised error either error of the rounding of weights, that of their sum and that of each,
/// may use up; the rest is for what is rounded besides.
const SHARE_OF_WEIGHTS: f64 = 0.4;

/// Largest magnitude of what rounding leaves of a coefficient, times this: an int8.
pub(crate) const REST: f32 = 2.0 * INT8_MAX;

/// Whether rounding a row of weights to integers cost too much for a codec with this bound (the registry's `nmse`). `lost` is
/// what the integers sum up to less than the weights did, in units, `sum` their sum, and `excess` the sum of
/// `error^2 - allowed(nmse) * weight^2`: what values have in common shrinks by `lost / sum`, and what they do not gets noise
/// of the squared errors. Where codes differ in width, all of these count by how far the codes spread. Then what rounding left of the row is added as well, in units of its own.
#[inline(always)]
pub(crate) fn is_coarse(nmse: f64, lost: f32, sum: f32, excess: f32) -> bool {
    lost * lost > allowed(nmse) * sum * sum || excess > 0.0
}

/// Part of the power of weights that [`is_coarse`] allows their errors.
#[inline(always)]
pub(crate) fn allowed(nmse: f64) -> f32 {
    (SHARE_OF_WEIGHTS * nmse) as f32
}

/// Softmax weights of one page for all rows of a query tile, and room for their integer form.
#[derive(Default, Debug)]
pub(crate) struct Probabilities {
    /// `[n_rows][page]`, not negative.
    pub(crate) p: Aligned<f32>,
    /// Rows in use.
    pub(crate) n_rows: usize,
    /// Columns.
    pub(crate) page: usize,
    /// `[row][plane][page]` of one group of channels.
    pub(crate) int8: Aligned<i8>,
    /// `[row]`: value of one unit of the (low plane's) coefficients.
    pub(crate) scale: Vec<f32>,
    /// `[row]`: what the codes' centre and the mid-points add to every channel of the group.
    pub(crate) offset: Vec<f32>,
    /// Rows that [`is_coarse`] names.
    pub(crate) coarse: Vec<usize>,
    /// `[head_dim_k][page]`: decoded keys, of which values are predicted.
    pub(crate) keys: Vec<f32>,
}

impl Probabilities {
    /// Makes room for `n_rows` rows of `page` weights.
    pub(crate) fn resize(&mut self, n_rows: usize, page: usize) {
        (self.n_rows, self.page) = (n_rows, page);
        self.p.resize(n_rows * page, 0.0);
        self.int8.resize(n_rows * page * 2, 0);
        self.scale.resize(n_rows, 0.0);
        self.offset.resize(n_rows, 0.0);
    }

    /// The weights, `[n_rows][page]`.
    pub(crate) fn rows(&self) -> &[f32] {
        &self.p[..self.n_rows * self.page]
    }
}
