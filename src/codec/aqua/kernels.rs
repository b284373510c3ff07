//! The one kernel that codec `aqua` has beside those of codec `channel` and of exact rows.
#![forbid(unsafe_code)]

use crate::codec::channel::scalar::decode_page;
use crate::codec::channel::ChannelCodec;
use crate::codec::page::PageRef;
use crate::simd::isa::Scalar;
use crate::simd::vector::Vector;

pub(super) trait Kernels {
    /// See [`decode_page`].
    fn decode_page(&self, codec: &ChannelCodec, page: PageRef, out: &mut [f32]);
}

impl Kernels for Scalar {
    fn decode_page(&self, codec: &ChannelCodec, page: PageRef, out: &mut [f32]) {
        decode_page(codec, page, out);
    }
}

impl<V: Vector> Kernels for V {
    fn decode_page(&self, codec: &ChannelCodec, page: PageRef, out: &mut [f32]) {
        self.run(
            #[inline(always)]
            move |_| decode_page(codec, page, out),
        );
    }
}
