//! One side of one KV head: its bytes in a stream's memory, and where each part of them lies.
#![forbid(unsafe_code)]

use crate::codec::page::{PageRef, SealRows, Side, HEADER_BYTES};
use crate::layout::{Layout, SideLayout};
use crate::learned::exponents;
use crate::rows::{finite, read_half, write_half};
use crate::shape::MAX_HEAD_DIM;

/// A head's keys or values, to read.
#[derive(Clone, Copy)]
pub(crate) struct Head<'a> {
    pub(crate) layout: &'a SideLayout,
    bytes: &'a [u8],
}

/// A head's keys or values, to write to.
pub(crate) struct HeadMut<'a> {
    pub(crate) layout: &'a SideLayout,
    bytes: &'a mut [u8],
}

impl<'a> Head<'a> {
    /// The head whose region is given ([`Layout::head_bytes`]).
    ///
    /// # Panics
    ///
    /// If the region has another length than the layout says.
    pub(crate) fn new(layout: &'a Layout, side: Side, region: &'a [u8]) -> Self {
        assert_eq!(region.len(), layout.head_bytes(side), "bytes of a head region");
        Self { layout: layout.side(side), bytes: region }
    }

    /// Head `head` of a stream's buffer.
    pub(crate) fn of_stream(layout: &'a Layout, side: Side, memory: &'a [u8], head: usize) -> Self {
        let bytes = layout.head_bytes(side);
        Self::new(layout, side, &memory[head * bytes..(head + 1) * bytes])
    }

    /// A page.
    pub(crate) fn page(&self, page: usize) -> PageRef<'a> {
        let (side, bytes) = (self.layout, self.bytes);
        PageRef {
            header: &bytes[side.headers + page * HEADER_BYTES..][..HEADER_BYTES],
            bytes: &bytes[side.pages + page * side.page_bytes..][..side.page_bytes],
        }
    }

    /// Decodes one row of a page.
    pub(crate) fn decode(&self, page: usize, row: usize, out: &mut [f32]) {
        self.layout.codec.decode(self.page(page), row, out);
    }

    /// The FP16 rows of `n` exact slots from `first`.
    pub(crate) fn slots(&self, first: usize, n: usize) -> &'a [u8] {
        let row = self.layout.head_dim * 2;
        &self.bytes[first * row..][..n * row]
    }

    /// Reads the row of an exact slot.
    pub(crate) fn read_slot(&self, slot: usize, out: &mut [f32]) {
        read_half(self.slots(slot, 1), out);
        out.iter_mut().for_each(|x| *x = finite(*x));
    }

    /// The first `n` FP16 rows of the outlier pool.
    pub(crate) fn pool_rows(&self, n: usize) -> &'a [u8] {
        &self.bytes[self.layout.pool..][..n * self.layout.head_dim * 2]
    }

    /// Reads the row of a member of the outlier pool.
    pub(crate) fn read_pooled(&self, row: usize, out: &mut [f32]) {
        read_half(self.pool_rows(row + 1).split_at(row * self.layout.head_dim * 2).1, out);
    }

    /// The cells of the outlier pool, as the layout has them.
    pub(crate) fn pool_table(&self) -> &'a [u8] {
        &self.bytes[self.layout.pool_table..self.layout.pool_table_end]
    }

    /// What the store step has learned, as [`crate::learned`] has it; empty for values.
    pub(crate) fn learned(&self) -> &'a [u8] {
        &self.bytes[self.layout.learned..self.layout.learned_end]
    }

    /// The ring of recent queries, as the layout has it; empty if the recipe has no attention window.
    pub(crate) fn recent(&self) -> &'a [u8] {
        &self.bytes[self.layout.recent..self.layout.recent_end]
    }
}

impl<'a> HeadMut<'a> {
    /// As [`Head::new`].
    ///
    /// # Panics
    ///
    /// As there.
    pub(crate) fn new(layout: &'a Layout, side: Side, region: &'a mut [u8]) -> Self {
        assert_eq!(region.len(), layout.head_bytes(side), "bytes of a head region");
        Self { layout: layout.side(side), bytes: region }
    }

    /// The same, to read.
    pub(crate) fn as_ref(&self) -> Head<'_> {
        Head { layout: self.layout, bytes: self.bytes }
    }

    /// Header and bytes of a page.
    pub(crate) fn page_mut(&mut self, page: usize) -> (&mut [u8], &mut [u8]) {
        let side = self.layout;
        let (front, pages) = self.bytes.split_at_mut(side.pages);
        let header = &mut front[side.headers + page * HEADER_BYTES..][..HEADER_BYTES];
        (header, &mut pages[page * side.page_bytes..][..side.page_bytes])
    }

    /// Encodes rows into a page, which goes on from the factors of the page sealed before it.
    pub(crate) fn seal(&mut self, page: usize, rows: SealRows) {
        let mut kept = [0u8; MAX_HEAD_DIM as usize];
        let last = exponents(self.learned_mut());
        let kept = &mut kept[..last.len()];
        kept.copy_from_slice(last);
        let side = self.layout;
        let (header, bytes) = self.page_mut(page);
        side.codec.seal(header, bytes, &mut SealRows { last_exponents: kept, ..rows });
        exponents(self.learned_mut()).copy_from_slice(kept);
    }

    /// The FP16 row of an exact slot.
    pub(crate) fn slot_mut(&mut self, slot: usize) -> &mut [u8] {
        let row = self.layout.head_dim * 2;
        &mut self.bytes[slot * row..][..row]
    }

    /// Writes a row to an exact slot.
    pub(crate) fn write_slot(&mut self, slot: usize, row: &[f32]) {
        let mut kept = [0f32; MAX_HEAD_DIM as usize];
        let kept = &mut kept[..row.len()];
        kept.iter_mut().zip(row).for_each(|(to, x)| *to = finite(*x));
        write_half(self.slot_mut(slot), kept);
    }

    /// The FP16 row of a member of the outlier pool.
    pub(crate) fn pool_row_mut(&mut self, row: usize) -> &mut [u8] {
        let (at, bytes) = (self.layout.pool, self.layout.head_dim * 2);
        &mut self.bytes[at + row * bytes..][..bytes]
    }

    /// [`Head::pool_table`]
    pub(crate) fn pool_table_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.layout.pool_table..self.layout.pool_table_end]
    }

    /// All that a stream's tokens leave beside their rows, to be forgotten with the last of them: who is in the outlier
    /// pool, what was learned, recent queries.
    pub(crate) fn remembered_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.layout.pool_table..self.layout.recent_end]
    }

    /// [`Head::learned`]
    pub(crate) fn learned_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.layout.learned..self.layout.learned_end]
    }

    /// [`Head::recent`]
    pub(crate) fn recent_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.layout.recent..self.layout.recent_end]
    }
}
