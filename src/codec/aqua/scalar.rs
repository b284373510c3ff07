//! The one kernel that codec `aqua` has beside those of codec `channel` and of exact rows.
#![forbid(unsafe_code)]

use crate::codec::channel::scalar::decode_page;
use crate::codec::channel::ChannelCodec;
use crate::codec::page::PageRef;

/// One row of the table.
pub(super) struct Kernels {
    /// See [`decode_page`].
    pub(super) decode_page: fn(&ChannelCodec, PageRef, &mut [f32]),
}

pub(super) const KERNELS: Kernels = Kernels { decode_page: |codec, page, out| decode_page(codec, page, out) };
