//! The kernel of codec `aqua` compiled for AVX2.
#![allow(unsafe_code)]

use super::scalar::{self, Kernels};
use crate::codec::channel::scalar::decode_page as decode;
use crate::codec::channel::ChannelCodec;
use crate::codec::page::PageRef;
use crate::simd::isa::{feature_table, Avx2};

feature_table!(Avx2 => Kernels {
    decode_page: decode_page(codec, page, out),
});

#[target_feature(enable = "avx2,fma,f16c")]
fn decode_page(codec: &ChannelCodec, page: PageRef, out: &mut [f32]) {
    decode(codec, page, out);
}
