//! The frame of a page: where its keys are turned to, and what calibration knows of them there.
//!
//! A key `k` in row `j` of a page whose row 0 would be at position `s` is coded as `z = T (R(-s) k - R(j) beta)`. `R(n)`
//! turns by `n` positions, so that what is coded does not depend on where the page is.
#![forbid(unsafe_code)]

use std::sync::Arc;

use nalgebra::DMatrix;

use super::AquaParams;
use crate::codec::quantizer::dot;
use crate::error::{Error, Result, Status};
use crate::profile::LayerProfile;
use crate::rotation::{Angles, Rotation};
use crate::simd::exact::{ExactRows, Kernels};

/// What is known of the frames of a layer's pages. Immutable.
#[derive(Debug)]
pub(crate) struct Frame {
    rotation: Rotation,
    heads: Vec<HeadFrame>,
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
    /// `T`, `[dim_k][dim_k]`; empty: the identity.
    transform: Vec<f32>,
    /// Its inverse.
    inverse: Vec<f32>,
    /// `W`, `[dim_v][dim_k]`, of what is coded; empty: values are not predicted.
    pub(super) predictor: Vec<f32>,
    /// The same as `[dim_k][dim_v]`.
    pub(super) by_key: Vec<f32>,
    /// `b`, `[dim_v]`.
    pub(super) offset: Vec<f32>,
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
    pub(super) fn identity(dim_k: usize) -> Self {
        let rotation = Rotation::none();
        Frame { rotation, heads: vec![HeadFrame::default()], dim_k, dim_v: dim_k, hash: 0 }
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
        Ok(Frame { rotation: profile.rotation.clone(), heads, dim_k, dim_v, hash: profile.hash() })
    }

    pub(super) fn head(&self, place: Place) -> &HeadFrame {
        // A crafted page may name a head that does not exist.
        &self.heads[place.head.min(self.heads.len() - 1)]
    }

    pub(super) fn predicts(&self) -> bool {
        self.heads.iter().all(|head| !head.predictor.is_empty())
    }

    /// Takes the key of row `row` to what is coded, in place. `angles` are those of `place.first`.
    pub(super) fn enter(&self, place: Place, angles: &Angles, row: usize, key: &mut [f32]) {
        let (head, dim) = (self.head(place), self.dim_k);
        self.rotation.turn_back(key, angles);
        if place.biased && !head.bias.is_empty() {
            key.iter_mut().zip(&head.bias[row * dim..][..dim]).for_each(|(x, b)| *x -= b);
        }
        multiply(&head.transform, key);
    }

    /// The way back.
    pub(super) fn leave(&self, place: Place, angles: &Angles, row: usize, key: &mut [f32]) {
        let (head, dim) = (self.head(place), self.dim_k);
        self.untransform(place, key);
        if place.biased && !head.bias.is_empty() {
            key.iter_mut().zip(&head.bias[row * dim..][..dim]).for_each(|(x, b)| *x += b);
        }
        self.rotation.turn(key, angles);
    }

    /// From coefficients to the frame.
    pub(super) fn untransform(&self, place: Place, key: &mut [f32]) {
        multiply(&self.head(place).inverse, key);
    }

    pub(super) fn angles(&self, place: Place) -> Angles {
        let mut angles = Angles::default();
        self.rotation.angles(place.first, &mut angles);
        angles
    }

    /// Takes query rows into the frame: `turned` (`R(-s) q`), which meets the bias, from what is there, and in
    /// `coefficients` (`T^-T R(-s) q`) what meets the codes.
    pub(super) fn enter_queries(
        &self,
        place: Place,
        turned: &mut [f32],
        coefficients: &mut Vec<f32>,
        kernels: &dyn Kernels,
    ) {
        let (head, dim, angles) = (self.head(place), self.dim_k, self.angles(place));
        turned.chunks_exact_mut(dim).for_each(|row| self.rotation.turn_back(row, &angles));
        coefficients.clear();
        if head.inverse.is_empty() {
            coefficients.extend_from_slice(turned);
            return;
        }
        coefficients.resize(turned.len(), 0.0);
        kernels.exact_accumulate(turned, dim, ExactRows { data: &head.inverse, n: dim, dim }, coefficients);
    }
}

impl HeadFrame {
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
        let mut frame = HeadFrame { transform: row_major(&transform), inverse: row_major(&inverse), ..Self::default() };
        if params.bias {
            let (bias, mut angles) = (of_head(&profile.key_bias, k), Angles::default());
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
            (frame.predictor, frame.by_key) = (row_major(&predictor), row_major(&predictor.transpose()));
            frame.offset = of_head(&profile.offset, v);
        }
        Ok(frame)
    }
}

fn row_major(matrix: &DMatrix<f64>) -> Vec<f32> {
    matrix.transpose().iter().map(|x| *x as f32).collect()
}

/// `x = matrix x`; an empty matrix is the identity.
fn multiply(matrix: &[f32], x: &mut [f32]) {
    if matrix.is_empty() {
        return;
    }
    let mut from = [0f32; crate::shape::MAX_HEAD_DIM as usize];
    let from = &mut from[..x.len()];
    from.copy_from_slice(x);
    for (x, row) in x.iter_mut().zip(matrix.chunks_exact(from.len())) {
        *x = dot(row, from);
    }
}
