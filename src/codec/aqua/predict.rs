//! Values that are predicted from keys: `v ~ W z + b`, `z` being what the token's key decodes to in the page's frame.
#![forbid(unsafe_code)]

use super::{AquaCodec, MAX_DIM};
use crate::codec::page::{PageRef, ValuePredictor};
use crate::codec::quantizer::sum;
use crate::codec::query::Probabilities;
use crate::simd::exact::ExactRows;
use crate::simd::kernels;

impl AquaCodec {
    /// What a row's key predicts, whether it is used or not.
    pub(super) fn predict(&self, page: PageRef, row: usize, out: &mut [f32]) {
        let (mut z, dim_k) = ([0f32; MAX_DIM], self.frame.dim_k);
        self.coefficients(page, row, &mut z[..dim_k]);
        self.frame.head(self.place(page.bytes)).predict(&z[..dim_k], out);
    }
}

impl ValuePredictor for AquaCodec {
    fn take(&self, header: &[u8], page: &mut [u8], at: &[u32], values: &mut [f32]) {
        let mut predicted = vec![0f32; values.len()];
        self.kernels.predict(self, PageRef { header, bytes: page }, at, &mut predicted);
        let rows = values.chunks_exact_mut(self.frame.dim_v).zip(predicted.chunks_exact_mut(self.frame.dim_v));
        for (&row, (value, predicted)) in at.iter().zip(rows) {
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

    fn n_sums(&self) -> usize {
        self.frame.dim_k + 1
    }

    fn accumulate(&self, page: PageRef, p: &mut Probabilities, sums: &mut [f32]) {
        self.kernels.add_keys(self, page, p, sums);
    }

    fn finish(&self, head: usize, sums: &[f32], out: &mut [f32]) {
        let (n, data) = (self.n_sums(), &self.frame.head_of(head).predictor);
        kernels(self.token).exact_accumulate(sums, n, ExactRows { data, n, dim: self.frame.dim_v }, out);
    }
}
