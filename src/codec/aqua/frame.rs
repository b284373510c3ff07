//! The frame of a page: where its keys are turned to, and what calibration knows of them there.
//!
//! A key `k` in row `j` of a page whose row 0 would be at position `s` is coded as `z = T (R(-s) k - R(j) beta)`. `R(n)`
//! turns by `n` positions, so that what is coded does not depend on where the page is.
#![forbid(unsafe_code)]

use std::sync::Arc;

use nalgebra::DMatrix;

use super::curves::Curves;
use super::words::Words;
use super::{AquaParams, MAX_DIM};
use crate::codec::quantizer::LANES;
use crate::codec::query::Framed;
use crate::error::{Error, Result, Status};
use crate::profile::LayerProfile;
use crate::rotation::{Angles, Rotation};

/// What is known of the frames of a layer's pages. Immutable.
#[derive(Debug)]
pub(crate) struct Frame {
    pub(super) rotation: Rotation,
    /// What the bias adds to scores.
    pub(super) curves: Curves,
    pub(super) heads: Vec<HeadFrame>,
    pub(super) dim_k: usize,
    pub(super) dim_v: usize,
    /// Of the profile; 0 without one.
    pub(super) hash: u32,
}

/// The same for one KV head.
#[derive(Debug, Default)]
pub(super) struct HeadFrame {
    /// `R(j) beta`, `[page][dim_k]`; empty: none.
    pub(super) bias: Vec<f32>,
    /// The same in the middle of a page, `[dim_k]`.
    pub(super) middle: Vec<f32>,
    /// `T`, transposed: `[dim_k][coefficient]`; empty: the identity.
    pub(super) transform: Vec<f32>,
    /// Its inverse, transposed: `[coefficient][dim_k]`.
    pub(super) directions: Vec<f32>,
    /// The same for queries.
    pub(super) words: Words,
    /// `W` of what is coded, transposed, `[dim_k][dim_v]`, and behind it `b`: what sums of keys, and of weights, are multiplied by.
    /// Whole groups of 16 rows; empty: values are not predicted.
    pub(super) predictor: Vec<f32>,
}

/// Where a page is, as the page says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Place {
    /// Position of row 0, or where it would be.
    pub(crate) first: i32,
    /// The KV head.
    pub(crate) head: usize,
    /// The bias has been taken off.
    pub(crate) biased: bool,
    /// Segments of coefficients that are coded.
    pub(crate) segments: usize,
}

impl Frame {
    /// A frame that knows nothing: keys do not turn, nothing is taken off.
    pub(super) fn identity(dim_k: usize, page: usize) -> Self {
        let rotation = Rotation::none();
        let curves = Curves::new(&rotation, page);
        Frame { rotation, curves, heads: vec![HeadFrame::default()], dim_k, dim_v: dim_k, hash: 0 }
    }

    /// What a profile says, as far as the recipe wants it, for pages of `page` rows.
    ///
    /// # Errors
    ///
    /// [`Status::Format`] if a transform has no inverse.
    pub(super) fn new(profile: &Arc<LayerProfile>, params: &AquaParams, page: usize) -> Result<Self> {
        let shape = profile.shape;
        let (dim_k, dim_v) = (shape.head_dim_k as usize, shape.head_dim_v as usize);
        let heads = (0..shape.n_kv_heads as usize)
            .map(|head| HeadFrame::new(profile, params, page, head))
            .collect::<Result<Vec<_>>>()?;
        let curves = Curves::new(&profile.rotation, page);
        Ok(Frame { rotation: profile.rotation.clone(), curves, heads, dim_k, dim_v, hash: profile.hash() })
    }

    pub(super) fn head(&self, place: Place) -> &HeadFrame {
        // A crafted page may name a head that does not exist.
        self.head_of(place.head.min(self.heads.len() - 1))
    }

    pub(super) fn head_of(&self, head: usize) -> &HeadFrame {
        &self.heads[head]
    }

    pub(super) fn predicts(&self) -> bool {
        self.heads.iter().all(|head| !head.predictor.is_empty())
    }

    /// Takes the key of row `row` to what is coded, in place. `angles` are those of `place.first`.
    #[inline(always)]
    pub(super) fn enter(&self, place: Place, angles: &Angles, row: usize, key: &mut [f32]) {
        let (head, dim) = (self.head(place), self.dim_k);
        self.rotation.turn_back(key, angles);
        if let Some(bias) = head.bias_of(place, row, dim) {
            key.iter_mut().zip(bias).for_each(|(x, b)| *x -= b);
        }
        multiply_in_place(&head.transform, key);
    }

    /// The way back.
    pub(super) fn leave(&self, place: Place, angles: &Angles, row: usize, key: &mut [f32]) {
        let (head, dim) = (self.head(place), self.dim_k);
        self.untransform(place, key);
        if let Some(bias) = head.bias_of(place, row, dim) {
            key.iter_mut().zip(bias).for_each(|(x, b)| *x += b);
        }
        self.rotation.turn(key, angles);
    }

    /// From coefficients to the frame.
    pub(super) fn untransform(&self, place: Place, key: &mut [f32]) {
        multiply_in_place(&self.head(place).directions, key);
    }

    pub(super) fn angles(&self, place: Place) -> Angles {
        let mut angles = Angles::default();
        self.rotation.angles(place.first, &mut angles);
        angles
    }

    /// Turns query rows back to where the page is: they meet the bias there, and `T^-T` takes them to what meets the codes.
    #[inline(always)]
    pub(super) fn turn_queries(&self, place: Place, framed: &mut Framed) {
        self.rotation.angles(place.first, &mut framed.angles);
        framed.turned.clone_from(&framed.rows);
        for row in framed.turned.chunks_exact_mut(self.dim_k) {
            self.rotation.turn_back(row, &framed.angles);
        }
    }
}

impl HeadFrame {
    /// What has been taken off the keys in row `row` of a page.
    pub(super) fn bias_of(&self, place: Place, row: usize, dim: usize) -> Option<&[f32]> {
        (place.biased && !self.bias.is_empty()).then(|| &self.bias[row * dim..][..dim])
    }

    /// `W z + b` of a decoded key in the frame.
    #[inline(always)]
    pub(super) fn predict(&self, z: &[f32], out: &mut [f32]) {
        let (matrix, offset) = self.predictor.split_at(z.len() * out.len());
        multiply(matrix, z, out);
        out.iter_mut().zip(offset).for_each(|(out, b)| *out += b);
    }

    fn new(profile: &LayerProfile, params: &AquaParams, page: usize, head: usize) -> Result<Self> {
        let (k, v) = (profile.shape.head_dim_k as usize, profile.shape.head_dim_v as usize);
        let of_head = |array: &[f32], size: usize| array[head * size..][..size].to_vec();
        let full = DMatrix::from_row_iterator(k, k, of_head(&profile.key_transform, k * k).into_iter().map(f64::from));
        // T' T is how much errors matter; without the rotation to independent coefficients only its diagonal is used.
        let transform = if params.klt {
            full
        } else {
            DMatrix::from_diagonal(&full.column_iter().map(|column| column.norm()).collect::<Vec<_>>().into())
        };
        let Some(inverse) = transform.clone().try_inverse().filter(|m| m.iter().all(|x| x.abs() < 1e6)) else {
            return Err(Error::new(
                Status::Format,
                format!("the profile's key transform of head {head} has no inverse"),
            ));
        };
        let mut frame = HeadFrame {
            transform: row_major(&transform.transpose()),
            directions: row_major(&inverse.transpose()),
            words: Words::new(&row_major(&inverse), k),
            ..Self::default()
        };
        if params.bias {
            let (bias, mut angles) = (of_head(&profile.key_bias, k), Angles::default());
            frame.middle = profile.rotation.turned(&bias, (page as f64 - 1.0) / 2.0);
            for row in 0..page {
                profile.rotation.angles(row as i32, &mut angles);
                let first = frame.bias.len();
                frame.bias.extend_from_slice(&bias);
                profile.rotation.turn(&mut frame.bias[first..], &angles);
            }
        }
        if params.predict {
            let predictor = of_head(&profile.predictor, k * v).into_iter().map(f64::from);
            let predictor = DMatrix::from_row_iterator(v, k, predictor) * inverse;
            frame.predictor = row_major(&predictor.transpose());
            frame.predictor.extend_from_slice(&of_head(&profile.offset, v));
            frame.predictor.resize((k + 1).next_multiple_of(16) * v, 0.0);
        }
        Ok(frame)
    }
}

fn row_major(matrix: &DMatrix<f64>) -> Vec<f32> {
    matrix.transpose().iter().map(|x| *x as f32).collect()
}

/// `x = matrix x`, as [`multiply`]; an empty matrix is the identity.
#[inline(always)]
fn multiply_in_place(transposed: &[f32], x: &mut [f32]) {
    if transposed.is_empty() {
        return;
    }
    let mut from = [0f32; MAX_DIM];
    let from = &mut from[..x.len()];
    from.copy_from_slice(x);
    multiply(transposed, from, x);
}

/// `out = matrix x` with a matrix that is given as `[x.len()][out.len()]`. Each sum is that of [`dot`](crate::codec::quantizer::dot),
/// bit for bit, but those of several rows are made at once.
#[inline(always)]
fn multiply(transposed: &[f32], x: &[f32], out: &mut [f32]) {
    let n = out.len();
    for (block, out) in out.chunks_exact_mut(ROWS).enumerate() {
        let mut lanes = [[0f32; ROWS]; LANES];
        for (i, x) in x.chunks_exact(LANES).enumerate() {
            for (k, (x, lane)) in x.iter().zip(&mut lanes).enumerate() {
                let column = &transposed[(i * LANES + k) * n + block * ROWS..][..ROWS];
                lane.iter_mut().zip(column).for_each(|(lane, m)| *lane += x * m);
            }
        }
        out.fill(0.0);
        for lane in &lanes {
            out.iter_mut().zip(lane).for_each(|(out, x)| *out += x);
        }
    }
}

/// Rows of a matrix that are summed at once.
const ROWS: usize = 16;
