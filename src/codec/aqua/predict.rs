//! Values that are predicted from keys: `v ~ W z + b`, `z` being what the token's key decodes to in the page's frame.
#![forbid(unsafe_code)]

use super::AquaCodec;
use crate::codec::page::{PageRef, ValuePredictor};
use crate::codec::quantizer::{dot, sum};
use crate::codec::query::Probabilities;
use crate::shape::MAX_HEAD_DIM;

const MAX_DIM: usize = MAX_HEAD_DIM as usize;

impl AquaCodec {
    /// What a row's key predicts, whether it is used or not.
    fn predict(&self, page: PageRef, row: usize, out: &mut [f32]) {
        let mut z = [0f32; MAX_DIM];
        let z = &mut z[..self.frame.dim_k];
        self.coefficients(page, row, z);
        let head = self.frame.head(self.place(page.bytes));
        for ((out, w), b) in out.iter_mut().zip(head.predictor.chunks_exact(z.len())).zip(&head.offset) {
            *out = dot(w, z) + b;
        }
    }
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
        let (dim_k, dim_v) = (self.frame.dim_k, self.frame.dim_v);
        let mut sums = std::mem::take(&mut p.sums);
        sums.clear();
        sums.resize(p.n_rows * (dim_k + 1), 0.0);
        let mut z = [0f32; MAX_DIM];
        let z = &mut z[..dim_k];
        for row in (0..self.page).filter(|row| self.gate(page.bytes, *row)) {
            let weights = p.rows().chunks_exact(self.page).map(|p| p[row]);
            if weights.clone().all(|weight| weight == 0.0) {
                continue;
            }
            self.coefficients(page, row, z);
            for (weight, sums) in weights.zip(sums.chunks_exact_mut(dim_k + 1)) {
                sums.iter_mut().zip(&*z).for_each(|(sum, z)| *sum += weight * z);
                sums[dim_k] += weight;
            }
        }
        let head = self.frame.head(self.place(page.bytes));
        for (sums, out) in sums.chunks_exact(dim_k + 1).zip(out.chunks_exact_mut(dim_v)) {
            let (sums, weight) = (&sums[..dim_k], sums[dim_k]);
            for ((out, w), b) in out.iter_mut().zip(head.predictor.chunks_exact(dim_k)).zip(&head.offset) {
                *out += dot(w, sums) + weight * b;
            }
        }
        p.sums = sums;
    }
}
