//! AVX-512 (VNNI) kernels of codec `channel`.
#![allow(unsafe_code)]

use super::{scalar, ChannelCodec, PageRef, Query, SealRows};
use crate::codec::kernels::Kernels;
use crate::codec::mixed::avx512::add_products;
use crate::simd::avx2::prefetch_next_from;
use crate::simd::isa::{feature_table, Avx512};

feature_table!(Avx512 => Kernels<ChannelCodec> {
    seal: seal(codec, header, page, rows),
    scores: scores(codec, page, query, out),
});

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
fn seal(codec: &ChannelCodec, header: &mut [u8], page: &mut [u8], rows: &mut SealRows) {
    scalar::seal(codec, header, page, rows);
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c")]
fn scores(codec: &ChannelCodec, page: PageRef, query: &Query, out: &mut [f32]) {
    prefetch_next_from(page.bytes, codec.tile.bytes());
    scalar::scores(codec, page, query, out, |page, x, out, n| add_products(page, x, out, n));
}
