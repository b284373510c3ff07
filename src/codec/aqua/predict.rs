//! Values that are predicted from keys: `v ~ W z + b`, `z` being what the token's key decodes to in the page's frame.
#![forbid(unsafe_code)]

use super::kernels::Kernels;
use super::AquaCodec;
use crate::codec::channel::ChannelCodec;
use crate::codec::page::{PageRef, ValuePredictor};
use crate::codec::quantizer::{dot, sum};
use crate::codec::query::{Predicting, Probabilities};
use crate::shape::MAX_HEAD_DIM;
use crate::simd::exact::ExactRows;
use crate::simd::isa::kernels_of;
use crate::simd::kernels;

const MAX_DIM: usize = MAX_HEAD_DIM as usize;

impl AquaCodec {
    /// What a row's key predicts, whether it is used or not.
    pub(super) fn predict(&self, page: PageRef, row: usize, out: &mut [f32]) {
        let mut z = [0f32; MAX_DIM];
        let z = &mut z[..self.frame.dim_k];
        self.coefficients(page, row, z);
        let head = self.frame.head(self.place(page.bytes));
        for ((out, w), b) in out.iter_mut().zip(head.predictor.chunks_exact(z.len())).zip(&head.offset) {
            *out = dot(w, z) + b;
        }
    }
}

/// Decodes what a page codes, `out[coefficient][row]`.
pub(super) fn decode_page(codec: &AquaCodec, inner: &ChannelCodec, page: PageRef, out: &mut [f32]) {
    kernels_of!(codec.token => dyn Kernels).decode_page(inner, page, out);
}

impl ValuePredictor for AquaCodec {
    fn take(&self, header: &[u8], page: &mut [u8], at: &[u32], values: &mut [f32]) {
        let mut predicted = [0f32; MAX_DIM];
        let predicted = &mut predicted[..self.frame.dim_v];
        for (&row, value) in at.iter().zip(values.chunks_exact_mut(self.frame.dim_v)) {
            self.predict(PageRef { header, bytes: page }, row as usize, predicted);
            let whole = sum(value, |x| x * x);
            predicted.iter_mut().zip(&*value).for_each(|(p, v)| *p = v - *p);
            // Not so if anything is not finite.
            let gate = sum(predicted, |x| x * x) < whole;
            self.set_gate(page, row as usize, gate);
            if gate {
                value.copy_from_slice(predicted);
            }
        }
    }

    fn add(&self, page: PageRef, row: usize, value: &mut [f32]) {
        if !self.gate(page.bytes, row) {
            return;
        }
        let mut predicted = [0f32; MAX_DIM];
        let predicted = &mut predicted[..self.frame.dim_v];
        self.predict(page, row, predicted);
        value.iter_mut().zip(predicted).for_each(|(v, p)| *v += *p);
    }

    fn accumulate(&self, page: PageRef, p: &mut Probabilities, out: &mut [f32]) {
        let (dim_k, dim_v, n_rows) = (self.frame.dim_k, self.frame.dim_v, p.n_rows);
        let mut scratch = std::mem::take(&mut p.predicting);
        let Predicting { keys, weights, sums } = &mut scratch;
        let place = self.place(page.bytes);
        let mut means = [0f32; MAX_DIM];
        self.read_means(page, place, &mut means[..dim_k]);
        keys.resize(dim_k * self.page, 0.0);
        keys.chunks_exact_mut(self.page).zip(means).for_each(|(channel, mean)| channel.fill(mean));
        decode_page(self, self.inner(place), self.body(page, place), keys);
        weights.clear();
        weights.extend_from_slice(p.rows());
        for row in (0..self.page).filter(|row| !self.gate(page.bytes, *row)) {
            weights.iter_mut().skip(row).step_by(self.page).for_each(|weight| *weight = 0.0);
        }
        sums.clear();
        sums.resize(n_rows * dim_k, 0.0);
        // Weights are to channels what queries are to keys.
        let channels = ExactRows { data: keys, n: dim_k, dim: self.page };
        kernels(self.token).exact_scores(weights, channels, sums, dim_k);
        let head = self.frame.head(place);
        let matrix = ExactRows { data: &head.by_key, n: dim_k, dim: dim_v };
        kernels(self.token).exact_accumulate(sums, dim_k, matrix, out);
        for (weights, out) in weights.chunks_exact(self.page).zip(out.chunks_exact_mut(dim_v)) {
            let weight = sum(weights, |weight| weight);
            out.iter_mut().zip(&head.offset).for_each(|(out, b)| *out += weight * b);
        }
        p.predicting = scratch;
    }
}
