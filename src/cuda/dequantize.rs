//! Rows as FP16, by cell, for attention that knows nothing of pages.

use std::ffi::c_void;

use super::desc::{AttendCall, AttendParams, DequantizeParams, DEQUANTIZE_THREADS};
use super::{plan_of, Call, Device, Launch};
use crate::error::Result;
use crate::layout::Layout;
use crate::plan::{View, CELLS_PER_WORD};

/// The one kernel; see `dequantize.cu`.
pub(super) const KERNEL: &str = "kvq_dequantize_any";

/// Exact rows that are one piece of work: EXACT_ROWS of `attend.cuh`.
const EXACT_ROWS: u32 = 32;

/// Enqueues the decoding of one layer: `rows` are those of keys and of values, either of which may be NULL, the streams'
/// one after the other.
///
/// # Safety
/// What attention reads by `given`, and what is written, is device memory of the size that kvq_dequantize_enqueue gives.
pub(crate) unsafe fn enqueue(
    device: &Device,
    layout: &Layout,
    given: Call<AttendCall>,
    rows: [*mut u16; 2],
    stream: *mut c_void,
) -> Result<()> {
    let layer = layout.describe();
    let Call { mut call, rotation, n_streams, plan_len } = given;
    let plan_at = plan_of(layout, call.n_tokens, plan_len)?;
    call.view = if call.k_cur.is_null() { View::After } else { View::Before } as u32;
    let read = AttendParams { call, layer, plan_at, rotation };
    let n_chunks = call.n_kv.div_ceil(CELLS_PER_WORD as u32);
    let n_exact = [layer.n_slots, layer.pool_rows, if call.k_cur.is_null() { 0 } else { call.n_tokens }];
    let n_exact: u32 = n_exact.into_iter().map(|n| n.div_ceil(EXACT_ROWS)).sum();
    for (side, rows) in (0..).zip(rows).filter(|(_, rows)| !rows.is_null()) {
        let desc = if side == 0 { &layer.k } else { &layer.v };
        // Rows of a chunk, and the angles of each warp.
        let shared_bytes = 4 * (CELLS_PER_WORD as u32 * (desc.head_dim + 1) + DEQUANTIZE_THREADS / 32 * desc.head_dim);
        // Exact rows take the place of what a page has for their cells.
        for (exact, n_blocks) in [(0, n_chunks), (1, n_exact)].into_iter().filter(|(_, n_blocks)| *n_blocks > 0) {
            let mut params = DequantizeParams { read, rows, side, exact };
            let launch =
                Launch { blocks: [layer.n_kv_heads, n_blocks, n_streams], threads: DEQUANTIZE_THREADS, shared_bytes };
            // SAFETY: the kernel takes a DequantizeParams; the caller answers for the pointers in it.
            unsafe { device.runner.launch(KERNEL, launch, (&raw mut params).cast(), stream) }?;
        }
    }
    Ok(())
}
