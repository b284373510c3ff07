//! AVX2 kernels of codec `channel`.
#![allow(unsafe_code)]

use super::{scalar, ChannelCodec, ChannelKernels, PageRef, Query, SealRows};
use crate::codec::mixed::avx2::add_products;
use crate::simd::isa::{Isa, IsaToken};

static KERNELS: ChannelKernels = ChannelKernels {
    // SAFETY: the table is only reachable through `kernels`, which asks for the proof that the CPU has these features.
    seal: |codec, header, page, rows| unsafe { seal(codec, header, page, rows) },
    // SAFETY: as above.
    scores: |codec, page, query, out| unsafe { scores(codec, page, query, out) },
};

/// The table, given the proof that this CPU can run it.
pub(super) fn kernels(token: IsaToken) -> &'static ChannelKernels {
    token.expect(Isa::Avx2);
    &KERNELS
}

#[target_feature(enable = "avx2,fma,f16c")]
fn seal(codec: &ChannelCodec, header: &mut [u8], page: &mut [u8], rows: &mut SealRows) {
    scalar::seal(codec, header, page, rows);
}

#[target_feature(enable = "avx2,fma,f16c")]
fn scores(codec: &ChannelCodec, page: PageRef, query: &Query, out: &mut [f32]) {
    scalar::scores(codec, page, query, out, |page, x, out, n| add_products(page, x, out, n));
}
