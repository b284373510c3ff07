//! Codec `channel` on the vectors of any instruction set.
#![forbid(unsafe_code)]

use super::{scalar, ChannelCodec, PageRef, Probabilities, Query, SealRows};
use crate::codec::kernels::Kernels;
use crate::codec::mixed::many::add_products;
use crate::codec::mixed::vector::MixedVector;

impl<V: MixedVector> Kernels<ChannelCodec> for V {
    fn seal(&self, codec: &ChannelCodec, header: &mut [u8], page: &mut [u8], rows: &mut SealRows) {
        self.run(
            #[inline(always)]
            move |_| scalar::seal(codec, header, page, rows),
        );
    }

    fn scores(&self, codec: &ChannelCodec, page: PageRef, query: &Query, out: &mut [f32]) {
        self.run(
            #[inline(always)]
            move |v| {
                v.ask_behind(page.bytes, codec.tile.bytes());
                scalar::scores(codec, page, query, out, |page, x, out, n| add_products(v, page, x, out, n));
            },
        );
    }

    fn accumulate(&self, _codec: &ChannelCodec, _page: PageRef, _p: &mut Probabilities, _acc: &mut [f32]) {
        unreachable!("values are not quantized per channel");
    }
}
