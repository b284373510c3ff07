//! Attention: which kernel, how many blocks, how much workspace.

use std::ffi::c_void;

use super::desc::{AttendParams, LayerDesc};
use super::{Device, Launch};
use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::plan::{self, plan_len, View};

/// One row of the table of kernels.
pub(super) struct Kernel {
    pub(super) name: &'static str,
    pub(super) threads: u32,
    /// Query rows that a block takes.
    pub(super) tile_rows: u32,
    /// Smallest compute capability that has it.
    pub(super) capability: u32,
    /// Whether it can read the layer.
    pub(super) fits: fn(&LayerDesc) -> bool,
    /// Shared memory of a block.
    pub(super) shared_bytes: fn(&LayerDesc, tile_rows: u32) -> u32,
    /// Blocks that keep a multiprocessor busy.
    pub(super) blocks_per_multiprocessor: u32,
}

/// The first that fits is taken; of the last ones, one takes everything.
static KERNELS: &[Kernel] = &[general("kvq_attend_any_4", 4), general("kvq_attend_any_8", 8)];

const fn general(name: &'static str, tile_rows: u32) -> Kernel {
    Kernel {
        name,
        threads: 128,
        tile_rows,
        capability: 75,
        fits: |_| true,
        shared_bytes: general_shared_bytes,
        blocks_per_multiprocessor: 3,
    }
}

/// Exact rows that are one piece of work.
const EXACT_ROWS: u32 = 32;
/// Most blocks that share a tile of rows: the last one weighs them in a table of so many.
const MAX_SPLITS: u32 = 64;

/// See `attend_any.cu`.
fn general_shared_bytes(layer: &LayerDesc, tile_rows: u32) -> u32 {
    let columns = layer.page.max(128);
    let dim = layer.k.head_dim.max(layer.v.head_dim);
    4 * (2 * tile_rows * dim + 2 * tile_rows * columns + 8 * tile_rows + 2 * dim + 256 + 128)
}

/// Names of all kernels, for whoever loads them.
#[cfg(feature = "cuda")]
pub(super) fn kernel_names() -> impl Iterator<Item = &'static str> {
    KERNELS.iter().map(|kernel| kernel.name)
}

/// How a call is cut into blocks.
struct Cut {
    kernel: &'static Kernel,
    n_tiles: u32,
    n_splits: u32,
    shared_bytes: u32,
}

impl Cut {
    fn new(device: &Device, layer: &LayerDesc, n_tokens: u32, n_kv: u32) -> Result<Self> {
        let limits = device.limits();
        let rows = n_tokens
            .checked_mul(layer.gqa_ratio)
            .filter(|rows| *rows > 0)
            .ok_or_else(|| Error::invalid(format!("{n_tokens} query tokens are not possible")))?;
        let can = |kernel: &&Kernel| {
            let shared_bytes = (kernel.shared_bytes)(layer, kernel.tile_rows);
            kernel.capability <= limits.capability && shared_bytes <= limits.shared_bytes && (kernel.fits)(layer)
        };
        // The fewest tiles; of those that need as many, the first.
        let kernel = KERNELS
            .iter()
            .filter(can)
            .min_by_key(|kernel| rows.div_ceil(kernel.tile_rows))
            .ok_or_else(|| super::unsupported("no kernel of this build attends such a layer on this device"))?;
        let n_tiles = rows.div_ceil(kernel.tile_rows);
        let n_items = n_cells_seen(layer, n_kv).div_ceil(layer.page) + layer.n_slots.div_ceil(EXACT_ROWS) + 1;
        let wanted = (limits.n_multiprocessors * kernel.blocks_per_multiprocessor).div_ceil(n_tiles * layer.n_kv_heads);
        let n_splits = wanted.clamp(1, n_items.min(MAX_SPLITS));
        Ok(Self { kernel, n_tiles, n_splits, shared_bytes: (kernel.shared_bytes)(layer, kernel.tile_rows) })
    }

    fn ticket_bytes(&self, layer: &LayerDesc) -> usize {
        (self.n_tiles as usize * layer.n_kv_heads as usize * 4).next_multiple_of(256)
    }

    fn workspace_bytes(&self, layer: &LayerDesc) -> usize {
        let states = self.n_tiles as usize * layer.n_kv_heads as usize * self.n_splits as usize;
        self.ticket_bytes(layer) + states * self.kernel.tile_rows as usize * (layer.v.head_dim as usize + 2) * 4
    }
}

fn n_cells_seen(layer: &LayerDesc, n_kv: u32) -> u32 {
    n_kv.min(layer.n_cells)
}

/// Bytes of workspace for a call with so many query tokens and columns of the mask.
pub(crate) fn workspace_bytes(device: &Device, layout: &Layout, n_tokens: u32, n_kv: u32) -> Result<usize> {
    let layer = LayerDesc::new(layout);
    Ok(Cut::new(device, &layer, n_tokens, n_kv)?.workspace_bytes(&layer))
}

/// Device memory that a call may use while it runs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Workspace {
    pub(crate) memory: *mut c_void,
    pub(crate) bytes: usize,
}

/// Enqueues the attention of one layer and stream. `params.layer` and what the workspace holds are filled in here.
///
/// # Safety
/// Every pointer is NULL where that is allowed or names device memory of the size that kvq_attend_args gives; the workspace
/// was zeroed when it was made and no other call uses it at the same time.
pub(crate) unsafe fn enqueue(
    device: &Device,
    layout: &Layout,
    mut params: AttendParams,
    given_plan_len: usize,
    workspace: Workspace,
    stream: *mut c_void,
) -> Result<()> {
    let layer = LayerDesc::new(layout);
    let cut = Cut::new(device, &layer, params.n_tokens, params.n_kv)?;
    let need = plan_len(params.n_tokens as usize, layout.n_slots(), layout.n_cells(), layout.page());
    if given_plan_len < need {
        return Err(Error::invalid(format!(
            "a plan of {} tokens for this layout has {need} integers, plan_len is {given_plan_len}",
            params.n_tokens
        )));
    }
    let bytes = cut.workspace_bytes(&layer);
    if workspace.bytes < bytes {
        return Err(Error::new(
            crate::error::Status::BufferTooSmall,
            format!("the workspace has {} bytes, {bytes} are needed: see kvq_attend_workspace", workspace.bytes),
        ));
    }
    params.layer = layer;
    params.tickets = workspace.memory.cast();
    params.partial = workspace.memory.cast::<u8>().wrapping_add(cut.ticket_bytes(&layer)).cast();
    params.n_splits = cut.n_splits;
    let n_tokens = params.n_tokens as usize;
    params.plan_at = plan::describe(n_tokens, layout.n_slots(), layout.n_cells(), layout.page());
    params.view = if params.k_cur.is_null() { View::After } else { View::Before } as u32;
    let launch = Launch {
        blocks: [layer.n_kv_heads * cut.n_tiles, cut.n_splits],
        threads: cut.kernel.threads,
        shared_bytes: cut.shared_bytes,
    };
    // SAFETY: the kernel takes an AttendParams; the caller answers for the pointers in it.
    unsafe { device.runner.launch(cut.kernel.name, launch, (&raw mut params).cast(), stream) }
}
