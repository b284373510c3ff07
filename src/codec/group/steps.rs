//! What kernels of codec `group` read of a page beside its rows: steps, mid-points and where its codes are.
#![forbid(unsafe_code)]

use super::{GroupCodec, PageRef};
use crate::codec::float8::vector::{e4m3_decode, step_decode};
use crate::codec::tile::vector::{Codes, TileVector};

/// The steps and mid-points of a page, found once: in a loop that stores scores the compiler would look them up each time.
#[derive(Clone, Copy)]
pub(super) struct Steps<'a> {
    steps: &'a [u8],
    mids: &'a [u8],
    header: [u8; 2],
    pub(super) symmetric: bool,
}

impl<'a> Steps<'a> {
    #[inline(always)]
    pub(super) fn of(codec: &GroupCodec, page: PageRef<'a>) -> Self {
        let (steps, n) = (&page.bytes[codec.steps_offset()..], codec.n_groups * codec.page);
        let symmetric = codec.params.symmetric;
        let (steps, mids) = steps.split_at(n);
        Self { steps, mids, header: [page.header[0], page.header[1]], symmetric }
    }

    /// Steps from the one of token `at % page` in group `at / page` on.
    #[inline(always)]
    pub(super) fn step<V: TileVector>(&self, v: V, at: usize) -> V::F32 {
        step_decode(v, v.load_bytes(self.steps, at), self.header[0], self.symmetric)
    }

    /// Mid-points, likewise; symmetric codes have none.
    #[inline(always)]
    pub(super) fn mid<V: TileVector>(&self, v: V, at: usize) -> V::F32 {
        e4m3_decode(v, v.load_bytes(self.mids, at), self.header[1])
    }
}

/// The tile of group `g`; with `ask` the same of a later page is asked for.
#[inline(always)]
pub(super) fn codes_of<'a>(codec: &GroupCodec, page: PageRef<'a>, g: usize, ask: bool) -> Codes<'a> {
    Codes::new(&page.bytes[g * codec.tile.bytes()..][..codec.tile.bytes()], page.bytes.len(), ask)
}
