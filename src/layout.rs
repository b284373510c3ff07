//! Where everything of one attention layer lies in the two byte buffers that the host owns.
#![forbid(unsafe_code)]

use std::sync::Arc;

use crate::codec::page::{bits_per_value, PageCodec, Side, ValuePredictor, HEADER_BYTES};
use crate::codec::CodecParams;
use crate::cuda::desc::{LayerDesc, SideDesc, ABSENT};
use crate::error::{Error, Result};
use crate::plan::{Plan, View};
use crate::recipe::{PoolParams, Recipe};
use crate::shape::Shape;
use crate::simd::exact::Kernels;
use crate::simd::isa::IsaToken;
use crate::simd::kernels;

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
/// | learned | `5 * head_dim + 16` | keys: what the store step has learned; see `learned_bytes` |
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
    pub(crate) pool: usize,
    pub(crate) pool_table: usize,
    pub(crate) pool_table_end: usize,
    pub(crate) learned: usize,
    pub(crate) learned_end: usize,
    pub(crate) recent: usize,
    pub(crate) recent_end: usize,
    pub(crate) headers: usize,
    pub(crate) pages: usize,
    pub(crate) page_bytes: usize,
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
        let side = |side, head_dim: u32, params: &CodecParams| -> Result<SideLayout> {
            let head_dim = head_dim as usize;
            let codec = params.build_layer(side, layer, shape, recipe.page, token)?;
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

    /// Whether the store step needs to know where tokens are ([`crate::store::StoreRows::positions`]).
    pub fn wants_positions(&self) -> bool {
        self.side(Side::Key).codec.wants_places()
    }

    /// How values follow from keys, if they do.
    pub(crate) fn predictor(&self) -> Option<&dyn ValuePredictor> {
        self.side(Side::Key).codec.predictor()
    }

    /// What kernels of a device read of the layer's profile ([`crate::cuda::desc::FrameDesc`]); empty for layers without one.
    pub fn profile(&self) -> Vec<u8> {
        self.side(Side::Key).codec.profile()
    }

    pub(crate) fn pool(&self) -> Option<&PoolParams> {
        self.pool.as_ref().filter(|_| self.pool_rows > 0)
    }

    /// Pages of a head, the last one possibly not full.
    pub fn n_pages(&self) -> usize {
        self.n_cells.div_ceil(self.page)
    }

    pub(crate) fn kernels(&self) -> &'static dyn Kernels {
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
}

impl Layout {
    /// The layer for device code, without the address of its profile.
    pub fn describe(&self) -> LayerDesc {
        let shape = self.shape();
        LayerDesc {
            n_heads: shape.n_heads,
            n_kv_heads: shape.n_kv_heads,
            gqa_ratio: shape.gqa_ratio() as u32,
            n_cells: self.n_cells() as u32,
            n_slots: self.n_slots() as u32,
            page: self.page() as u32,
            n_pages: self.n_pages() as u32,
            pool_rows: self.pool_rows() as u32,
            pool_outliers: self.pool().map_or(0, |pool| pool.outliers) as u32,
            attn_window: self.attn_window() as u32,
            predicts: self.predictor().is_some().into(),
            k: self.side(Side::Key).describe(),
            v: self.side(Side::Value).describe(),
            profile: 0,
        }
    }
}

/// What all codecs have in common; the parts that a codec has, it fills in.
fn describe_codec(codec: &dyn PageCodec, head_dim: usize) -> SideDesc {
    let absent = SideDesc {
        mids: ABSENT,
        mean: ABSENT,
        exponents: ABSENT,
        order: ABSENT,
        outliers: ABSENT,
        ..SideDesc::default()
    };
    let dim = head_dim as u32;
    let mut desc = SideDesc { page_bytes: codec.page_bytes() as u32, head_dim: dim, group: dim, n_groups: 1, ..absent };
    codec.describe(&mut desc);
    desc
}

/// Bytes of the ring of a KV head for a window of so many query tokens: how many there were (u32), then FP16 queries, each
/// with an f32 logarithm.
fn ring_bytes(window: usize, gqa_ratio: usize, head_dim: usize) -> usize {
    match window * gqa_ratio {
        0 => 0,
        n => COUNT_BYTES + n * entry_bytes(head_dim),
    }
}

/// Bytes in front of the ring: how many queries there were.
pub(crate) const COUNT_BYTES: usize = 4;

/// Bytes of one query of the ring.
pub(crate) fn entry_bytes(head_dim: usize) -> usize {
    2 * head_dim + 4
}

/// Numbers behind the moments: queries seen, and those of a [`KeyError`](crate::learned::KeyError).
pub(crate) const COUNTERS: usize = 4;

/// Bytes of what is learned, for keys of `dim` channels:
///
/// | part | bytes | |
/// |---|---|---|
/// | moments | `4 * head_dim` | f32: mean square of the queries, by channel |
/// | seen | 4 | f32: how many queries that mean stands for |
/// | key error | 12 | f32: noise, signal, rows of a [`KeyError`](crate::learned::KeyError) |
/// | exponents | `head_dim` | of the page sealed last; see [`crate::codec::smooth`] |
fn learned_bytes(dim: usize) -> usize {
    4 * (dim + COUNTERS) + dim
}

/// Fails unless the plan was made for this layout.
pub(crate) fn check_plan(layout: &Layout, plan: &Plan) -> Result<()> {
    if plan.n_cells() == layout.n_cells() && plan.n_slots() == layout.n_slots() && plan.page() == layout.page() {
        debug_assert!(plan.slot_cells(View::Before).len() == layout.n_slots());
        return Ok(());
    }
    Err(Error::invalid(format!(
        "the plan is for {} cells, {} slots and pages of {}, the layout for {}, {} and {}",
        plan.n_cells(),
        plan.n_slots(),
        plan.page(),
        layout.n_cells(),
        layout.n_slots(),
        layout.page()
    )))
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
            ..describe_codec(&*self.codec, self.head_dim)
        }
    }

    fn bits(&self, page: usize) -> f64 {
        bits_per_value(self.page_bytes, page, self.head_dim)
    }
}
