//! AVX2 kernels of codec `adaptive`.
#![allow(unsafe_code)]

use super::{scalar, AdaptiveCodec, AdaptiveKernels, PageRef, Probabilities, Query, QueryForm, SealRows};
use crate::codec::hadamard;
use crate::codec::mixed::avx2::add_products;
use crate::simd::IsaToken;

static KERNELS: AdaptiveKernels = AdaptiveKernels {
    // SAFETY: the table is only reachable through `kernels`, which takes the proof that the CPU has these features.
    seal: |codec, header, page, rows| unsafe { seal(codec, header, page, rows) },
    // SAFETY: as above.
    prepare: |query, rows, form| unsafe { prepare(query, rows, form) },
    // SAFETY: as above.
    untransform: |row| unsafe { untransform(row) },
    // SAFETY: as above.
    scores: |codec, page, query, out| unsafe { scores(codec, page, query, out) },
    // SAFETY: as above.
    accumulate: |codec, page, p, acc| unsafe { accumulate(codec, page, p, acc) },
};

/// The table, given the proof that this CPU can run it.
pub(super) fn kernels(_token: IsaToken) -> &'static AdaptiveKernels {
    &KERNELS
}

#[target_feature(enable = "avx2,fma,f16c")]
fn seal(codec: &AdaptiveCodec, header: &mut [u8], page: &mut [u8], rows: &mut SealRows) {
    scalar::seal(codec, header, page, rows);
}

#[target_feature(enable = "avx2,fma,f16c")]
fn prepare(query: &mut Query, rows: &[f32], form: &QueryForm) {
    query.prepare(rows, form);
}

#[target_feature(enable = "avx2,fma,f16c")]
fn untransform(row: &mut [f32]) {
    hadamard::rotate(row);
}

#[target_feature(enable = "avx2,fma,f16c")]
fn scores(codec: &AdaptiveCodec, page: PageRef, query: &Query, out: &mut [f32]) {
    scalar::scores(codec, page, query, out, |page, x, out, n| add_products(page, x, out, n));
}

#[target_feature(enable = "avx2,fma,f16c")]
fn accumulate(codec: &AdaptiveCodec, page: PageRef, p: &mut Probabilities, acc: &mut [f32]) {
    scalar::accumulate(codec, page, p, acc, |page, x, out, n| add_products(page, x, out, n));
}
