//! Storing: how many blocks, and where rows are while they are encoded.

use std::ffi::c_void;

use super::attend::{has_frames, Workspace};
use super::desc::{
    LayerDesc, StoreCall, StoreParams, ABSENT, FEW_ROWS, QUERIES_AT_ONCE, STORE_EARLY, STORE_FEW, STORE_FINISH,
    STORE_LEARN, STORE_SCRATCH_BYTES, STORE_SEAL, STORE_THREADS,
};
use super::{plan_of, Call, Device, Launch};
use crate::error::{Error, Result, Status};
use crate::layout::Layout;

/// The kernels, for layers without frames and with them; see `store.cu`.
pub(super) const KERNELS: [&str; 2] = ["kvq_store_any", "kvq_store_aqua"];

/// Channels of a block that learns from queries.
const QUERY_CHANNELS: u32 = 32;

/// Most blocks that share the pages of a side of a head.
const MAX_TURNS: u32 = 8;

/// How a call is cut into blocks.
struct Cut {
    n_streams: u32,
    n_key_blocks: u32,
    n_value_blocks: u32,
    /// Floats from row to row: an odd number, so that threads that take a row each do not wait for each other.
    row_stride: u32,
    row_bytes: u32,
    in_shared: bool,
    /// Most pages of a call.
    n_pages: u32,
    /// Floats of a head's notes.
    note_stride: u32,
}

impl Cut {
    fn new(device: &Device, layer: &LayerDesc, n_tokens: u32, n_streams: u32) -> Self {
        let row_stride =
            [layer.k, layer.v].map(|side| side.head_dim + 2 * side.n_outliers + 1).into_iter().fold(0, u32::max);
        let row_bytes = (1 + layer.predicts) * layer.page * row_stride * 4;
        let turns = n_tokens.div_ceil(layer.page).clamp(1, MAX_TURNS);
        // Factors stay from page to page.
        let keys_are_apart = layer.k.exponents == ABSENT;
        // Keys decide for both sides which tokens matter, what of values they predict, and who enters the pool unless that is decided before.
        let sides_are_apart = layer.attn_window == 0 && layer.predicts == 0 && (layer.pool_rows == 0 || turns > 1);
        let n_records = layer.n_slots + n_tokens;
        let n_pages = layer.n_pages.min(n_records);
        Self {
            n_streams,
            n_key_blocks: if keys_are_apart { turns } else { 1 },
            n_value_blocks: if sides_are_apart { turns } else { 0 },
            row_stride,
            row_bytes,
            in_shared: STORE_SCRATCH_BYTES + row_bytes <= device.limits().shared_bytes,
            n_pages,
            note_stride: 1 + 3 * n_pages + if layer.pool_rows > 0 { n_records.div_ceil(2) } else { 0 },
        }
    }

    /// Whether one launch does it all.
    fn is_one_launch(&self) -> bool {
        self.n_key_blocks == 1 && self.n_value_blocks <= 1
    }

    fn blocks_of_head(&self) -> u32 {
        self.n_key_blocks + self.n_value_blocks
    }

    fn note_bytes(&self, layer: &LayerDesc) -> usize {
        let bytes = (self.n_streams * layer.n_kv_heads) as usize * self.note_stride as usize * 4;
        if self.is_one_launch() {
            0
        } else {
            bytes.next_multiple_of(256)
        }
    }

    fn workspace_bytes(&self, layer: &LayerDesc) -> usize {
        let n_blocks = (self.n_streams * layer.n_kv_heads) as usize * self.blocks_of_head() as usize;
        self.note_bytes(layer) + if self.in_shared { 0 } else { n_blocks * self.row_bytes as usize }
    }
}

/// Whether `few.cuh` may do it. It does not wait for softmax denominators, which attention writes.
fn is_few(layer: &LayerDesc, n_tokens: u32) -> bool {
    let n_rows = n_tokens.saturating_mul(layer.gqa_ratio);
    layer.attn_window == 0 && (1..=FEW_ROWS).contains(&n_rows)
}

/// Bytes of workspace for a call of `n_streams` streams with `n_tokens` rows each.
pub(crate) fn workspace_bytes(device: &Device, layout: &Layout, n_tokens: u32, n_streams: u32) -> usize {
    let layer = layout.describe();
    // Some, so that whoever allocates them gets an address.
    Cut::new(device, &layer, n_tokens, n_streams).workspace_bytes(&layer).max(256)
}

/// Enqueues the store step of one layer.
///
/// # Safety
/// Every pointer is NULL where that is allowed or names device memory of the size that kvq_store_args gives; no other call
/// uses the workspace at the same time.
pub(crate) unsafe fn enqueue(
    device: &Device,
    layout: &Layout,
    given: Call<StoreCall>,
    workspace: Workspace,
    stream: *mut c_void,
) -> Result<()> {
    let layer = given.layer(layout);
    let Call { mut call, rotation, n_streams, plan_len, .. } = given;
    let cut = Cut::new(device, &layer, call.n_tokens, n_streams);
    let plan_at = plan_of(layout, call.n_tokens, plan_len)?;
    let bytes = cut.workspace_bytes(&layer);
    if workspace.bytes < bytes {
        return Err(Error::new(
            Status::BufferTooSmall,
            format!("the workspace has {} bytes, {bytes} are needed: see kvq_store_workspace", workspace.bytes),
        ));
    }
    let (n_tokens, early) = (call.n_tokens, call.phases & STORE_EARLY);
    call.notes = if cut.is_one_launch() { std::ptr::null_mut() } else { workspace.memory.cast() };
    let memory: *mut u8 = workspace.memory.cast();
    call.rows = if cut.in_shared { std::ptr::null_mut() } else { memory.wrapping_add(cut.note_bytes(&layer)).cast() };
    (call.row_stride, call.note_stride, call.n_pages) = (cut.row_stride, cut.note_stride, cut.n_pages);
    // Queries of many tokens are learned from by blocks of their own.
    let learns_many = !cut.is_one_launch() && !call.q.is_null();
    call.n_query_blocks = if learns_many { layer.k.head_dim.div_ceil(QUERY_CHANNELS) } else { 0 };
    let row_bytes = if cut.in_shared { cut.row_bytes } else { 0 };
    let query_bytes = if learns_many { QUERIES_AT_ONCE * QUERY_CHANNELS * 4 } else { 0 };
    let shared_bytes = STORE_SCRATCH_BYTES + row_bytes.max(query_bytes);
    let n_query_blocks = call.n_query_blocks;
    let mut params = StoreParams { call, layer, plan_at, rotation };
    let mut launch = |phases: u32, n_key_blocks: u32, n_value_blocks: u32, n_more: u32| {
        let call = &mut params.call;
        (call.phases, call.n_key_blocks, call.n_value_blocks) = (phases, n_key_blocks, n_value_blocks);
        let blocks = [layer.n_kv_heads, n_key_blocks + n_value_blocks + n_more, n_streams];
        let launch = Launch { blocks, threads: STORE_THREADS, shared_bytes };
        // SAFETY: the kernel takes a StoreParams; the caller answers for the pointers in it.
        unsafe {
            device.runner.launch(KERNELS[usize::from(has_frames(&layer))], launch, (&raw mut params).cast(), stream)
        }
    };
    if cut.is_one_launch() {
        let few = if is_few(&layer, n_tokens) { STORE_FEW | early } else { 0 };
        return launch(STORE_LEARN | STORE_SEAL | STORE_FINISH | few, 1, cut.n_value_blocks, 0);
    }
    // The block that fills the pool has both sides.
    let n_value_blocks = if layer.pool_rows > 0 { 0 } else { cut.n_value_blocks.min(1) };
    launch(STORE_LEARN, 1, n_value_blocks, n_query_blocks)?;
    launch(STORE_SEAL, cut.n_key_blocks, cut.n_value_blocks, 0)?;
    launch(STORE_FINISH, cut.n_key_blocks, cut.n_value_blocks, 0)
}
