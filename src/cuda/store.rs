//! Storing: how many blocks, and where rows are while they are encoded.

use std::ffi::c_void;

use super::attend::Workspace;
use super::desc::{LayerDesc, StoreParams, STORE_SCRATCH_BYTES, STORE_THREADS};
use super::{Device, Launch};
use crate::error::{Error, Result, Status};
use crate::layout::Layout;
use crate::plan::{self, plan_len};

/// The one kernel; see `store.cu`.
pub(super) const KERNEL: &str = "kvq_store_any";

/// How a call is cut into blocks.
struct Cut {
    blocks: [u32; 2],
    /// Floats from row to row: an odd number, so that threads that take a row each do not wait for each other.
    row_stride: u32,
    row_bytes: u32,
    in_shared: bool,
}

impl Cut {
    fn new(device: &Device, layer: &LayerDesc) -> Self {
        let row_stride =
            [layer.k, layer.v].map(|side| side.head_dim + 2 * side.n_outliers + 1).into_iter().fold(0, u32::max);
        let row_bytes = layer.page * row_stride * 4;
        // Keys decide who enters the pool, and for both sides which tokens matter.
        let n_sides = if layer.pool_rows > 0 || layer.attn_window > 0 { 1 } else { 2 };
        let in_shared = STORE_SCRATCH_BYTES + row_bytes <= device.limits().shared_bytes;
        Self { blocks: [layer.n_kv_heads, n_sides], row_stride, row_bytes, in_shared }
    }

    fn workspace_bytes(&self) -> usize {
        match self.in_shared {
            true => 0,
            false => self.blocks.map(|n| n as usize).iter().product::<usize>() * self.row_bytes as usize,
        }
    }
}

/// Bytes of workspace for a call.
pub(crate) fn workspace_bytes(device: &Device, layout: &Layout) -> usize {
    // Some, so that whoever allocates them gets an address.
    Cut::new(device, &LayerDesc::new(layout)).workspace_bytes().max(256)
}

/// Enqueues the store step of one layer and stream. `params.layer` and what the workspace holds are filled in here.
///
/// # Safety
/// Every pointer is NULL where that is allowed or names device memory of the size that kvq_store_args gives; no other call
/// uses the workspace at the same time.
pub(crate) unsafe fn enqueue(
    device: &Device,
    layout: &Layout,
    mut params: StoreParams,
    given_plan_len: usize,
    workspace: Workspace,
    stream: *mut c_void,
) -> Result<()> {
    let layer = LayerDesc::new(layout);
    let cut = Cut::new(device, &layer);
    let n_tokens = params.n_tokens as usize;
    let need = plan_len(n_tokens, layout.n_slots(), layout.n_cells(), layout.page());
    if given_plan_len < need {
        return Err(Error::invalid(format!(
            "a plan of {n_tokens} tokens for this layout has {need} integers, plan_len is {given_plan_len}"
        )));
    }
    let bytes = cut.workspace_bytes();
    if workspace.bytes < bytes {
        return Err(Error::new(
            Status::BufferTooSmall,
            format!("the workspace has {} bytes, {bytes} are needed: see kvq_store_workspace", workspace.bytes),
        ));
    }
    params.layer = layer;
    params.plan_at = plan::describe(n_tokens, layout.n_slots(), layout.n_cells(), layout.page());
    params.rows = if cut.in_shared { std::ptr::null_mut() } else { workspace.memory.cast() };
    params.row_stride = cut.row_stride;
    let shared_bytes = STORE_SCRATCH_BYTES + if cut.in_shared { cut.row_bytes } else { 0 };
    let launch = Launch { blocks: cut.blocks, threads: STORE_THREADS, shared_bytes };
    // SAFETY: the kernel takes a StoreParams; the caller answers for the pointers in it.
    unsafe { device.runner.launch(KERNEL, launch, (&raw mut params).cast(), stream) }
}
