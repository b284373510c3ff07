//! Where everything of one attention layer lies in the two byte buffers that the host owns.
#![forbid(unsafe_code)]

use std::sync::Arc;

use crate::codec::{PageCodec, PageRef, Side, HEADER_BYTES};
use crate::cuda::desc::SideDesc;
use crate::error::{Error, Result};
use crate::learned::learned_bytes;
use crate::pool::PoolParams;
use crate::recent::ring_bytes;
use crate::recipe::{Recipe, SideRecipe};
use crate::shape::Shape;
use crate::simd::{kernels, IsaToken, Kernels};

/// The layout and the codecs of one attention layer. Immutable; may be shared by threads.
///
/// # Memory of one stream
///
/// Keys and values have a buffer each: `n_kv_heads` consecutive *head regions* of [`Layout::head_bytes`] bytes,
///
/// | part | bytes | |
/// |---|---|---|
/// | exact slots | `n_slots * head_dim * 2` | FP16 rows `[slot][head_dim]`, as appended (not rotated) |
/// | outlier pool | `pool_rows * head_dim * 2` | FP16 rows of outlier tokens, for recipes that trace them |
/// | pool's cells | `pool_rows * 4` | u32: 1 + the cell of each row, 0 if it is free |
/// | learned | `5 * head_dim + 16` | keys: what the store step has learned; see [`learned_bytes`] |
/// | recent queries | `4 + attn_window * gqa_ratio * (2 * head_dim + 4)` | keys of recipes with an attention window: a ring of queries |
/// | page headers | `n_pages * 4` | see the codec |
/// | pages | `n_pages * page_bytes` | see the codec; page `i` holds cells `i * page` and up |
///
/// each part padded to 64 bytes. Which cell's row is in which slot or page the planner decides, alike for all layers.
#[derive(Debug, Clone)]
pub struct Layout {
    shape: Shape,
    n_cells: usize,
    n_slots: usize,
    page: usize,
    pool: Option<PoolParams>,
    pool_rows: usize,
    attn_window: usize,
    sides: [SideLayout; 2],
    token: IsaToken,
}

/// One side (keys or values) of a [`Layout`].
#[derive(Debug, Clone)]
pub(crate) struct SideLayout {
    pub(crate) codec: Arc<dyn PageCodec>,
    pub(crate) head_dim: usize,
    pool: usize,
    pool_table: usize,
    pool_table_end: usize,
    learned: usize,
    learned_end: usize,
    recent: usize,
    recent_end: usize,
    headers: usize,
    pages: usize,
    page_bytes: usize,
    head_bytes: usize,
}

impl Layout {
    /// The layout of layer `layer` of a model with `n_cells` cells in each stream and the planner's number of exact slots.
    ///
    /// # Errors
    ///
    /// [`crate::error::Status::Shape`] for unsupported head sizes or counts, [`crate::error::Status::Recipe`] if the recipe does not
    /// fit the head size, [`crate::error::Status::InvalidArgument`] for zero or absurd sizes,
    /// [`crate::error::Status::Unsupported`] if `KVQ_ISA` asks for what the CPU lacks.
    pub fn new(recipe: &Recipe, shape: Shape, layer: usize, n_cells: usize, n_slots: usize) -> Result<Layout> {
        Self::with_isa(recipe, shape, layer, n_cells, n_slots, IsaToken::detect()?)
    }

    /// [`Layout::new`] with kernels of a given instruction set.
    pub fn with_isa(
        recipe: &Recipe,
        shape: Shape,
        layer: usize,
        n_cells: usize,
        n_slots: usize,
        token: IsaToken,
    ) -> Result<Layout> {
        shape.validate()?;
        if n_cells == 0 || n_cells > i32::MAX as usize || n_slots == 0 || n_slots > 1 << 24 {
            return Err(Error::invalid(format!(
                "a layout of {n_cells} cells and {n_slots} exact slots is not possible"
            )));
        }
        let n_pages = n_cells.div_ceil(recipe.page);
        let pool_rows = recipe.pool.map_or(0, |pool| pool.rows(layer));
        let side = |side, head_dim: u32, side_recipe: &SideRecipe| -> Result<SideLayout> {
            let head_dim = head_dim as usize;
            let codec = side_recipe.codec(side, head_dim, recipe.page, token)?;
            let pool = (n_slots * head_dim * 2).next_multiple_of(64);
            let pool_table = pool + (pool_rows * head_dim * 2).next_multiple_of(64);
            let pool_table_end = pool_table + pool_rows * 4;
            let learned = pool_table_end.next_multiple_of(64);
            let learned_end = learned + if side == Side::Key { learned_bytes(head_dim) } else { 0 };
            let recent = learned_end.next_multiple_of(64);
            let window = if side == Side::Key { recipe.attn_window } else { 0 };
            let recent_end = recent + ring_bytes(window, shape.gqa_ratio(), head_dim);
            let headers = recent_end.next_multiple_of(64);
            let pages = headers + (n_pages * HEADER_BYTES).next_multiple_of(64);
            let page_bytes = codec.page_bytes();
            let head_bytes = n_pages.checked_mul(page_bytes).and_then(|n| n.checked_add(pages));
            let head_bytes = head_bytes
                .filter(|n| n.checked_mul(shape.n_kv_heads as usize).is_some_and(|n| n < isize::MAX as usize))
                .ok_or_else(|| Error::invalid(format!("{n_cells} cells do not fit in memory")))?;
            Ok(SideLayout {
                codec,
                head_dim,
                pool,
                pool_table,
                pool_table_end,
                learned,
                learned_end,
                recent,
                recent_end,
                headers,
                pages,
                page_bytes,
                head_bytes,
            })
        };
        let sides =
            [side(Side::Key, shape.head_dim_k, &recipe.key)?, side(Side::Value, shape.head_dim_v, &recipe.value)?];
        Ok(Layout {
            shape,
            n_cells,
            n_slots,
            page: recipe.page,
            pool: recipe.pool,
            pool_rows,
            attn_window: recipe.attn_window,
            sides,
            token,
        })
    }

    /// The layer's shape.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Cells in a stream.
    pub fn n_cells(&self) -> usize {
        self.n_cells
    }

    /// Exact slots in a stream.
    pub fn n_slots(&self) -> usize {
        self.n_slots
    }

    /// Cells in a page.
    pub fn page(&self) -> usize {
        self.page
    }

    /// Rows of each head's outlier pool; 0 if the recipe or the layer has none.
    pub fn pool_rows(&self) -> usize {
        self.pool_rows
    }

    /// How many of the last queries' attention decides the widths of the tokens of a page; 0 if the recipe has no such
    /// rule. Then [`crate::store::StoreRows`] need no softmax denominators.
    pub fn attn_window(&self) -> usize {
        self.attn_window
    }

    pub(crate) fn pool(&self) -> Option<&PoolParams> {
        self.pool.as_ref().filter(|_| self.pool_rows > 0)
    }

    /// Pages of a head, the last one possibly not full.
    pub fn n_pages(&self) -> usize {
        self.n_cells.div_ceil(self.page)
    }

    /// Instruction set of the kernels.
    pub fn isa(&self) -> IsaToken {
        self.token
    }

    pub(crate) fn kernels(&self) -> &'static Kernels {
        kernels(self.token)
    }

    pub(crate) fn side(&self, side: Side) -> &SideLayout {
        &self.sides[side as usize]
    }

    /// Bytes of one head region, a multiple of 64.
    pub fn head_bytes(&self, side: Side) -> usize {
        self.side(side).head_bytes
    }

    /// Bytes of the key buffer of one stream.
    pub fn k_bytes(&self) -> usize {
        self.head_bytes(Side::Key) * self.shape.n_kv_heads as usize
    }

    /// Bytes of the value buffer of one stream.
    pub fn v_bytes(&self) -> usize {
        self.head_bytes(Side::Value) * self.shape.n_kv_heads as usize
    }

    /// Effective bits per key value in a page: codes, steps, mid-points, mean, header and padding.
    pub fn bits_k(&self) -> f64 {
        self.side(Side::Key).bits(self.page)
    }

    /// Effective bits per value of the value side.
    pub fn bits_v(&self) -> f64 {
        self.side(Side::Value).bits(self.page)
    }

    /// Byte range of page `page` inside a head region.
    pub fn page_range(&self, side: Side, page: usize) -> std::ops::Range<usize> {
        let side = self.side(side);
        let at = side.pages + page * side.page_bytes;
        at..at + side.page_bytes
    }

    /// Byte range of the header of page `page` inside a head region.
    pub fn header_range(&self, side: Side, page: usize) -> std::ops::Range<usize> {
        let at = self.side(side).headers + page * HEADER_BYTES;
        at..at + HEADER_BYTES
    }

    /// Byte range of everything before the pages inside a head region: exact slots, outlier pool, what was learned and recent
    /// queries.
    pub fn slots_range(&self, side: Side) -> std::ops::Range<usize> {
        0..self.side(side).recent_end
    }

    /// Byte range of the outlier pool, its cells included, inside a head region.
    pub fn pool_range(&self, side: Side) -> std::ops::Range<usize> {
        let side = self.side(side);
        side.pool..side.pool_table_end
    }

    /// One line that is equal for two layouts exactly if they understand each other's page bytes and slots: codecs with
    /// their format versions and parameters, page size, head counts and sizes. Numbers of cells and slots are not in it.
    pub fn format(&self) -> String {
        let [k, v] = &self.sides;
        let shape = self.shape;
        format!(
            "k={};v={};page={};n_kv_heads={};head_dim={}/{}{}{}",
            k.codec.format(),
            v.codec.format(),
            self.page,
            shape.n_kv_heads,
            shape.head_dim_k,
            shape.head_dim_v,
            if self.pool_rows > 0 { format!(";pool={}", self.pool_rows) } else { String::new() },
            match self.attn_window {
                0 => String::new(),
                n => format!(";recent={n}*{}", shape.gqa_ratio()),
            }
        )
    }

    /// Byte range of an exact slot inside a head region.
    pub fn slot_range(&self, side: Side, slot: usize) -> std::ops::Range<usize> {
        let bytes = self.side(side).head_dim * 2;
        slot * bytes..(slot + 1) * bytes
    }
}

impl SideLayout {
    /// The same for device code.
    pub(crate) fn describe(&self) -> SideDesc {
        let offset = |bytes: usize| bytes as u64;
        SideDesc {
            head_bytes: offset(self.head_bytes),
            pool: offset(self.pool),
            pool_table: offset(self.pool_table),
            learned: offset(self.learned),
            learned_end: offset(self.learned_end),
            recent: offset(self.recent),
            recent_end: offset(self.recent_end),
            headers: offset(self.headers),
            pages: offset(self.pages),
            ..SideDesc::of_codec(&*self.codec, self.head_dim)
        }
    }

    fn bits(&self, page: usize) -> f64 {
        (self.page_bytes + HEADER_BYTES) as f64 * 8.0 / (page * self.head_dim) as f64
    }

    /// A page of a head region.
    pub(crate) fn page<'a>(&self, region: &'a [u8], page: usize) -> PageRef<'a> {
        PageRef {
            header: &region[self.headers + page * HEADER_BYTES..][..HEADER_BYTES],
            bytes: &region[self.pages + page * self.page_bytes..][..self.page_bytes],
        }
    }

    /// Header and bytes of a page, to write to.
    pub(crate) fn page_mut<'a>(&self, region: &'a mut [u8], page: usize) -> (&'a mut [u8], &'a mut [u8]) {
        let (front, pages) = region.split_at_mut(self.pages);
        let header = &mut front[self.headers + page * HEADER_BYTES..][..HEADER_BYTES];
        (header, &mut pages[page * self.page_bytes..][..self.page_bytes])
    }

    /// The FP16 row of an exact slot.
    pub(crate) fn slot<'a>(&self, region: &'a [u8], slot: usize) -> &'a [u8] {
        &region[slot * self.head_dim * 2..][..self.head_dim * 2]
    }

    /// The FP16 rows of `n` exact slots from `first`.
    pub(crate) fn slots<'a>(&self, region: &'a [u8], first: usize, n: usize) -> &'a [u8] {
        &region[first * self.head_dim * 2..][..n * self.head_dim * 2]
    }

    /// The FP16 row of a member of the outlier pool.
    pub(crate) fn pool_row<'a>(&self, region: &'a [u8], row: usize) -> &'a [u8] {
        self.pool_rows(region, row + 1).split_at(row * self.head_dim * 2).1
    }

    /// The first `n` FP16 rows of the outlier pool.
    pub(crate) fn pool_rows<'a>(&self, region: &'a [u8], n: usize) -> &'a [u8] {
        &region[self.pool..][..n * self.head_dim * 2]
    }

    /// The FP16 row of a member of the outlier pool, to write to.
    pub(crate) fn pool_row_mut<'a>(&self, region: &'a mut [u8], row: usize) -> &'a mut [u8] {
        &mut region[self.pool + row * self.head_dim * 2..][..self.head_dim * 2]
    }

    /// The cells of the outlier pool, as the layout has them.
    pub(crate) fn pool_table<'a>(&self, region: &'a [u8]) -> &'a [u8] {
        &region[self.pool_table..self.pool_table_end]
    }

    /// [`SideLayout::pool_table`], to write to.
    pub(crate) fn pool_table_mut<'a>(&self, region: &'a mut [u8]) -> &'a mut [u8] {
        &mut region[self.pool_table..self.pool_table_end]
    }

    /// All that a stream's tokens leave beside their rows, to be forgotten with the last of them: who is in the outlier
    /// pool, what was learned, recent queries.
    pub(crate) fn remembered_mut<'a>(&self, region: &'a mut [u8]) -> &'a mut [u8] {
        &mut region[self.pool_table..self.recent_end]
    }

    /// What the store step has learned, as [`crate::learned`] has it; empty for values.
    pub(crate) fn learned<'a>(&self, region: &'a [u8]) -> &'a [u8] {
        &region[self.learned..self.learned_end]
    }

    /// [`SideLayout::learned`], to write to.
    pub(crate) fn learned_mut<'a>(&self, region: &'a mut [u8]) -> &'a mut [u8] {
        &mut region[self.learned..self.learned_end]
    }

    /// The ring of recent queries, as the layout has it; empty if the recipe has no attention window.
    pub(crate) fn recent<'a>(&self, region: &'a [u8]) -> &'a [u8] {
        &region[self.recent..self.recent_end]
    }

    /// [`SideLayout::recent`], to write to.
    pub(crate) fn recent_mut<'a>(&self, region: &'a mut [u8]) -> &'a mut [u8] {
        &mut region[self.recent..self.recent_end]
    }

    /// The FP16 row of an exact slot, to write to.
    pub(crate) fn slot_mut<'a>(&self, region: &'a mut [u8], slot: usize) -> &'a mut [u8] {
        &mut region[slot * self.head_dim * 2..][..self.head_dim * 2]
    }
}
