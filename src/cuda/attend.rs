//! Attention: which kernel, how many blocks, how much workspace.

use std::ffi::c_void;

use super::desc::{
    AttendCall, AttendParams, BlockDesc, LayerDesc, SideDesc, ABSENT, CODEC_AQUA, CODEC_CHANNEL, CODEC_GROUP,
};
use super::{plan_of, Call, Device, Launch, Limits};
use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::plan::View;

/// One row of the table of kernels.
pub(super) struct Kernel {
    pub(super) name: &'static str,
    /// Query rows that a block takes.
    pub(super) tile_rows: u32,
    /// It knows pages whose positions have moved.
    pub(super) reads_turned: bool,
    /// Whether it can read the layer.
    pub(super) fits: fn(&LayerDesc) -> bool,
    /// Blocks that keep a multiprocessor busy.
    pub(super) blocks_per_multiprocessor: u32,
    /// The most blocks that share a tile of rows, of so many pages and pieces of exact rows.
    pub(super) most_splits: fn(&LayerDesc, &Kernel, [u32; 2], Limits) -> u32,
    /// The threads and the shared memory of a block.
    pub(super) block: fn(&LayerDesc, &Kernel, Work, Limits) -> Option<BlockDesc>,
}

/// What the blocks of a tile of rows have to do.
#[derive(Clone, Copy, Debug)]
pub(super) struct Work {
    n_pages: u32,
    /// Pieces of [`EXACT_PIECE`] rows.
    n_exact_pieces: u32,
    n_splits: u32,
}

/// Of those that need the fewest tiles, the first is taken. The general ones take everything.
static KERNELS: &[Kernel] = &[
    fast("kvq_attend_known_4_22", 4, |layer| is_known(layer, [CODEC_GROUP, 2], 2)),
    fast("kvq_attend_known_4_33", 4, |layer| is_known(layer, [CODEC_GROUP, 3], 3)),
    fast("kvq_attend_known_4_44", 4, |layer| is_known(layer, [CODEC_GROUP, 4], 4)),
    fast("kvq_attend_known_4_c2", 4, |layer| is_known(layer, [CODEC_CHANNEL, 0], 2)),
    fast("kvq_attend_known_4_c3", 4, |layer| is_known(layer, [CODEC_CHANNEL, 0], 3)),
    fast("kvq_attend_known_4_c4", 4, |layer| is_known(layer, [CODEC_CHANNEL, 0], 4)),
    fast("kvq_attend_known_8_22", 8, |layer| is_known(layer, [CODEC_GROUP, 2], 2)),
    fast("kvq_attend_known_8_33", 8, |layer| is_known(layer, [CODEC_GROUP, 3], 3)),
    fast("kvq_attend_known_8_44", 8, |layer| is_known(layer, [CODEC_GROUP, 4], 4)),
    fast("kvq_attend_known_8_c2", 8, |layer| is_known(layer, [CODEC_CHANNEL, 0], 2)),
    fast("kvq_attend_known_8_c3", 8, |layer| is_known(layer, [CODEC_CHANNEL, 0], 3)),
    fast("kvq_attend_known_8_c4", 8, |layer| is_known(layer, [CODEC_CHANNEL, 0], 4)),
    fast("kvq_attend_fast_4_64", 4, |layer| fits_fast(layer, 128, 64)),
    fast("kvq_attend_fast_4_128", 4, |layer| fits_fast(layer, 128, 128)),
    fast("kvq_attend_fast_8_64", 8, |layer| fits_fast(layer, 128, 64)),
    fast("kvq_attend_fast_8_128", 8, |layer| fits_fast(layer, 128, 128)),
    fast("kvq_attend_fast_4_64_small", 4, |layer| fits_fast(layer, 64, 64)),
    fast("kvq_attend_fast_4_128_small", 4, |layer| fits_fast(layer, 64, 128)),
    fast("kvq_attend_fast_8_64_small", 8, |layer| fits_fast(layer, 64, 64)),
    fast("kvq_attend_fast_8_128_small", 8, |layer| fits_fast(layer, 64, 128)),
    general("kvq_attend_any_4", 4, |layer| !has_frames(layer)),
    general("kvq_attend_any_8", 8, |layer| !has_frames(layer)),
    general("kvq_attend_aqua_4", 4, has_frames),
    general("kvq_attend_aqua_8", 8, has_frames),
];

const fn general(name: &'static str, tile_rows: u32, fits: fn(&LayerDesc) -> bool) -> Kernel {
    let (reads_turned, blocks_per_multiprocessor) = (true, 3);
    let (most_splits, block) = (general_splits, general_block);
    Kernel { name, tile_rows, reads_turned, fits, blocks_per_multiprocessor, most_splits, block }
}

/// Whether keys are coded in the frames of pages.
pub(super) fn has_frames(layer: &LayerDesc) -> bool {
    layer.k.codec == CODEC_AQUA
}

const fn fast(name: &'static str, tile_rows: u32, fits: fn(&LayerDesc) -> bool) -> Kernel {
    let (reads_turned, blocks_per_multiprocessor) = (false, 1);
    Kernel {
        name,
        tile_rows,
        reads_turned,
        fits,
        blocks_per_multiprocessor,
        most_splits: fast_splits,
        block: fast_block,
    }
}

/// A page, or 32 exact rows, are worth a block.
fn general_splits(_: &LayerDesc, _: &Kernel, [n_pages, n_exact_pieces]: [u32; 2], _: Limits) -> u32 {
    (n_pages + n_exact_pieces.div_ceil(2)).min(MAX_SPLITS)
}

/// See `attend_any.cuh` and `attend_aqua.cu`.
fn general_block(layer: &LayerDesc, kernel: &Kernel, _work: Work, limits: Limits) -> Option<BlockDesc> {
    let (columns, rows) = (layer.page.max(128), kernel.tile_rows);
    let dim = layer.k.head_dim.max(layer.v.head_dim);
    let framed = if has_frames(layer) { rows * (4 * layer.k.head_dim + 2 * 4 + 2) } else { 0 };
    let shared_bytes = 4 * (3 * rows * dim + 2 * rows * columns + 8 * rows + 2 * dim + 256 + 128 + framed);
    let block = BlockDesc { n_warps: 4, shared_bytes, ..BlockDesc::default() };
    (shared_bytes <= limits.shared_bytes).then_some(block)
}

/// What `attend_fast.cuh` can read.
fn fits_fast(layer: &LayerDesc, page: u32, head_dim_v: u32) -> bool {
    let grouped = |side: &SideDesc| {
        side.codec == CODEC_GROUP && side.symmetric == 1 && side.n_groups == 1 && matches!(side.width, 2..=4)
    };
    layer.page == page
        && matches!(layer.k.head_dim, 64 | 96 | 128)
        && layer.v.head_dim == head_dim_v
        && (grouped(&layer.k) || layer.k.codec == CODEC_CHANNEL && layer.k.half == 0)
        && grouped(&layer.v)
}

/// What a kernel of `attend_known.cu` can read: `keys` are a codec and the width of its codes.
fn is_known(layer: &LayerDesc, keys: [u32; 2], width_v: u32) -> bool {
    fits_fast(layer, 128, 128)
        && layer.k.head_dim == 128
        && [layer.k.codec, layer.k.width] == keys
        && layer.v.width == width_v
}

/// The fewest warps of a block of a fast kernel that are worth it.
const LEAST_WARPS: u32 = 4;
/// Most of them, for four query rows.
const MOST_WARPS: u32 = 12;
/// The same for eight, which need more registers.
const FEW_WARPS: u32 = 8;

/// Bytes that a warp or a block leaves of a tile of rows.
fn source_bytes(layer: &LayerDesc, kernel: &Kernel) -> u32 {
    4 * kernel.tile_rows * (layer.v.head_dim + 2)
}

/// Blocks with few pieces of work are for few cells; the last block has what all have left in shared memory.
fn fast_splits(layer: &LayerDesc, kernel: &Kernel, [n_pages, n_exact_pieces]: [u32; 2], limits: Limits) -> u32 {
    let n_pieces = n_pages + n_exact_pieces;
    let worth = if n_pieces <= MOST_WARPS { 1 } else { n_pieces.div_ceil(PIECES_OF_BLOCK) };
    worth.min(MAX_SPLITS).min(limits.shared_bytes / 2 / source_bytes(layer, kernel))
}

/// See `attend_fast.cuh`.
fn fast_block(layer: &LayerDesc, kernel: &Kernel, work: Work, limits: Limits) -> Option<BlockDesc> {
    let rows = kernel.tile_rows;
    // Columns of B, two for a query row, start half of all banks apart.
    let padded = |bytes: u32| bytes.next_multiple_of(128) + 64;
    let coefficients = match layer.k.width {
        2 if layer.k.head_dim.is_multiple_of(64) => layer.k.head_dim,
        4 => layer.k.head_dim,
        // Each word may be read bit by bit.
        _ => layer.k.tile_words.next_multiple_of(4) * 32,
    };
    let weights = layer.page * if layer.v.width == 3 { 2 } else { 1 };
    let (coefficient_bytes, weight_bytes) = (padded(coefficients), padded(weights));
    let page = |side: &SideDesc| side.page_bytes.next_multiple_of(128);
    // All warps have the same coefficients, unless a page has factors of its own.
    let (of_block, of_warp) = match (layer.k.codec == CODEC_GROUP, layer.k.exponents == ABSENT) {
        (true, true) => (coefficient_bytes, weight_bytes),
        (true, false) => (coefficient_bytes, coefficient_bytes + weight_bytes),
        (false, _) => (0, coefficient_bytes + weight_bytes),
    };
    let source = source_bytes(layer, kernel);
    // What a warp leaves at last lies from its first page on, and so does a piece of exact rows, but for its weights.
    let piece = EXACT_PIECE * 2 * (layer.k.head_dim + 8 + layer.v.head_dim + 8);
    let pages = (page(&layer.k) + page(&layer.v)).max(piece.next_multiple_of(128));
    let shared_warp = (pages + 2 * rows * of_warp).max(source).next_multiple_of(128);
    let dim = layer.k.head_dim;
    let fixed = rows * (4 * dim.max(layer.v.head_dim) + 2 * (dim + 8)) + 4 * (5 * rows + 2 + layer.pool_rows);
    let shared_exact = fixed.next_multiple_of(128);
    let [n_pages, n_exact_pieces] = [work.n_pages, work.n_exact_pieces].map(|n| n.div_ceil(work.n_splits));
    let sources = if work.n_splits > 1 { work.n_splits * source } else { 0 };
    // Half of them at most where the others have pages enough, which are on their way meanwhile.
    let exact_of = |n_warps: u32| n_exact_pieces.min((n_warps / 2).max(n_warps.saturating_sub(n_pages)));
    let with = |n_warps: u32, exact_warps: u32| {
        let shared_warps = (shared_exact + exact_warps * source).next_multiple_of(128) + 2 * rows * of_block;
        let shared_warps = shared_warps.next_multiple_of(128);
        let shared_bytes = shared_warps + (n_warps * shared_warp).max(sources);
        BlockDesc {
            n_warps,
            exact_warps,
            shared_bytes,
            shared_exact,
            shared_warps,
            shared_warp,
            coefficient_bytes,
            weight_bytes,
        }
    };
    let most = if rows > 4 { FEW_WARPS } else { MOST_WARPS };
    let wanted = (n_pages + n_exact_pieces).clamp(LEAST_WARPS, most);
    let many = (LEAST_WARPS..=wanted).rev().map(|n_warps| with(n_warps, exact_of(n_warps)));
    let few = (1..exact_of(LEAST_WARPS)).rev().map(|exact_warps| with(LEAST_WARPS, exact_warps));
    many.chain(few).find(|block| block.shared_bytes <= limits.shared_bytes)
}

/// Exact rows that a warp takes together.
const EXACT_PIECE: u32 = 16;
/// Pieces of work that are worth a block of their own.
const PIECES_OF_BLOCK: u32 = 6;
/// Most blocks that share a tile of rows: the last one weighs them in a table of so many.
const MAX_SPLITS: u32 = 64;

/// Names of all kernels, for whoever loads them.
#[cfg(any(test, feature = "cuda"))]
pub(super) fn kernel_names() -> impl Iterator<Item = &'static str> {
    KERNELS.iter().map(|kernel| kernel.name)
}

/// Where the workspace counts blocks, alike for all layers and calls, so that none finds another's partial results there. Rows
/// are cut into splits only while that makes no more blocks than the device runs at a time, so there are never as many tiles.
const TICKET_BYTES: usize = 1 << 15;

/// How a call is cut into blocks.
struct Cut {
    kernel: &'static Kernel,
    n_streams: u32,
    /// Of a stream.
    n_tiles: u32,
    n_splits: u32,
    block: BlockDesc,
}

impl Cut {
    fn new(device: &Device, layer: &LayerDesc, size: Size, turned: bool) -> Result<Self> {
        let Size { n_tokens, n_streams, n_kv } = size;
        let rows = n_tokens
            .checked_mul(layer.gqa_ratio)
            .filter(|rows| *rows > 0)
            .ok_or_else(|| Error::invalid(format!("{n_tokens} query tokens are not possible")))?;
        let cuts = KERNELS.iter().filter(|kernel| (kernel.fits)(layer) && (kernel.reads_turned || !turned));
        let cuts =
            cuts.filter_map(|kernel| Self::with(kernel, device.limits(), layer, [n_tokens, rows, n_streams], n_kv));
        cuts.min_by_key(|cut| cut.n_tiles)
            .ok_or_else(|| super::unsupported("no kernel of this build attends such a layer on this device"))
    }

    fn with(
        kernel: &'static Kernel,
        limits: Limits,
        layer: &LayerDesc,
        [n_tokens, rows, n_streams]: [u32; 3],
        n_kv: u32,
    ) -> Option<Self> {
        let n_tiles = rows.div_ceil(kernel.tile_rows);
        let n_heads = layer.n_kv_heads * n_streams;
        let n_pages = n_cells_seen(layer, n_kv).div_ceil(layer.page);
        let exact_pieces = [layer.n_slots, layer.pool_rows, n_tokens].map(|rows| rows.div_ceil(EXACT_PIECE));
        let n_exact_pieces = exact_pieces.iter().sum::<u32>();
        let wanted = limits.n_multiprocessors * kernel.blocks_per_multiprocessor / (n_tiles * n_heads).max(1);
        let most = (kernel.most_splits)(layer, kernel, [n_pages, n_exact_pieces], limits);
        let n_splits = wanted.clamp(1, most.max(1));
        debug_assert!(n_splits == 1 || (n_tiles * n_heads) as usize * 4 <= TICKET_BYTES);
        let block = (kernel.block)(layer, kernel, Work { n_pages, n_exact_pieces, n_splits }, limits)?;
        Some(Self { kernel, n_streams, n_tiles, n_splits, block })
    }

    /// Floats that the blocks of a stream leave each other.
    fn partial_floats(&self, layer: &LayerDesc) -> usize {
        let states = match self.n_splits {
            1 => 0,
            n_splits => self.n_tiles as usize * layer.n_kv_heads as usize * n_splits as usize,
        };
        states * self.kernel.tile_rows as usize * (layer.v.head_dim as usize + 2)
    }

    fn workspace_bytes(&self, layer: &LayerDesc) -> usize {
        TICKET_BYTES + self.n_streams as usize * self.partial_floats(layer) * 4
    }
}

fn n_cells_seen(layer: &LayerDesc, n_kv: u32) -> u32 {
    n_kv.min(layer.n_cells)
}

/// What decides how a call is cut.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Size {
    /// Query tokens of a stream.
    pub(crate) n_tokens: u32,
    pub(crate) n_streams: u32,
    /// Columns of a mask.
    pub(crate) n_kv: u32,
}

/// Bytes of workspace for a call.
pub(crate) fn workspace_bytes(device: &Device, layout: &Layout, size: Size) -> Result<usize> {
    let layer = layout.describe();
    let bytes = |turned| Ok(Cut::new(device, &layer, size, turned)?.workspace_bytes(&layer));
    Ok(usize::max(bytes(false)?, bytes(true)?))
}

/// Device memory that a call may use while it runs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Workspace {
    pub(crate) memory: *mut c_void,
    pub(crate) bytes: usize,
}

/// Enqueues the attention of one layer.
///
/// # Safety
/// Every pointer is NULL where that is allowed or names device memory of the size that kvq_attend_args gives; the workspace
/// was zeroed when it was made and no other call uses it at the same time.
pub(crate) unsafe fn enqueue(
    device: &Device,
    layout: &Layout,
    given: Call<AttendCall>,
    workspace: Workspace,
    stream: *mut c_void,
) -> Result<()> {
    let layer = given.layer(layout);
    let Call { mut call, rotation, n_streams, plan_len, .. } = given;
    let size = Size { n_tokens: call.n_tokens, n_streams, n_kv: call.n_kv };
    let cut = Cut::new(device, &layer, size, rotation.n_pairs > 0)?;
    let plan_at = plan_of(layout, call.n_tokens, plan_len)?;
    let bytes = cut.workspace_bytes(&layer);
    if workspace.bytes < bytes {
        return Err(Error::new(
            crate::error::Status::BufferTooSmall,
            format!("the workspace has {} bytes, {bytes} are needed: see kvq_attend_workspace", workspace.bytes),
        ));
    }
    call.tickets = workspace.memory.cast();
    call.partial = workspace.memory.cast::<u8>().wrapping_add(TICKET_BYTES).cast();
    call.streams.partial = cut.partial_floats(&layer) as u64;
    call.n_splits = cut.n_splits;
    call.view = if call.k_cur.is_null() { View::After } else { View::Before } as u32;
    call.block = cut.block;
    let launch = Launch {
        blocks: [layer.n_kv_heads * cut.n_tiles, cut.n_splits, n_streams],
        threads: 32 * call.block.n_warps,
        shared_bytes: call.block.shared_bytes,
    };
    let mut params = AttendParams { call, layer, plan_at, rotation };
    // SAFETY: the kernel takes an AttendParams; the caller answers for the pointers in it.
    unsafe { device.runner.launch(cut.kernel.name, launch, (&raw mut params).cast(), stream) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::Recipe;
    use crate::shape::Shape;

    /// The oldest GPUs have 64 KiB of shared memory for a block, room for four warps with pages of 2 bits: these are for tensor
    /// cores, however few cells there are.
    #[test]
    fn small_shared_memory_is_enough_for_the_fast_kernels() {
        let limits = Limits { n_multiprocessors: 40, shared_bytes: 64 << 10, capability: 75 };
        let shape = Shape { n_heads: 32, n_kv_heads: 8, head_dim_k: 128, head_dim_v: 128 };
        for spec in ["2", "skvq:k=2,v=2", "kivi"] {
            for (n_cells, n_kv) in [(256, 256), (4096, 256), (4096, 512), (4096, 4096), (1 << 17, 1 << 17)] {
                let recipe = Recipe::parse(spec).unwrap().fit(n_cells, 1, 1);
                let n_slots = crate::planner::n_slots(&recipe.planner_config(n_cells, 1, 1));
                let layer = Layout::new(&recipe, shape, 3, n_cells, n_slots).unwrap().describe();
                let fast = KERNELS.iter().filter(|kernel| kernel.tile_rows == 4 && !kernel.reads_turned);
                let fast = fast.filter(|kernel| (kernel.fits)(&layer));
                let cut = fast.filter_map(|kernel| Cut::with(kernel, limits, &layer, [1, 4, 1], n_kv as u32)).next();
                assert!(cut.is_some(), "{spec}, {n_kv} of {n_cells} cells");
            }
        }
    }
}
