//! Rows as FP16, by cell, for attention that knows nothing of pages.

use std::ffi::c_void;

use super::attend::has_frames;
use super::desc::{
    AttendCall, AttendParams, DequantizeParams, SideDesc, CODEC_CHANNEL, CODEC_GROUP, DEQUANTIZE_ROWS_WARPS,
    DEQUANTIZE_THREADS,
};
use super::{plan_of, Call, Device, Launch};
use crate::error::Result;
use crate::layout::Layout;
use crate::plan::{View, CELLS_PER_WORD};

/// The kernels for everything, and for exact rows: of layers without frames and with them; see `dequantize.cu`.
const GENERAL: [&str; 2] = ["kvq_dequantize_any", "kvq_dequantize_aqua"];

/// A kernel for pages of one kind.
struct RowsKernel {
    name: &'static str,
    is_key: bool,
    head_dim: u32,
    codec: u32,
}

const fn rows(name: &'static str, is_key: bool, head_dim: u32, codec: u32) -> RowsKernel {
    RowsKernel { name, is_key, head_dim, codec }
}

/// See `dequantize_rows.cuh`.
static KERNELS: &[RowsKernel] = &[
    rows("kvq_dequantize_64_keys", true, 64, CODEC_GROUP),
    rows("kvq_dequantize_64_values", false, 64, CODEC_GROUP),
    rows("kvq_dequantize_64_channels", true, 64, CODEC_CHANNEL),
    rows("kvq_dequantize_128_keys", true, 128, CODEC_GROUP),
    rows("kvq_dequantize_128_values", false, 128, CODEC_GROUP),
    rows("kvq_dequantize_128_channels", true, 128, CODEC_CHANNEL),
];

impl RowsKernel {
    fn fits(&self, side: &SideDesc, is_key: bool) -> bool {
        let is_read = match side.codec {
            CODEC_GROUP => side.n_groups == 1 && side.symmetric == 1 && matches!(side.width, 2..=4),
            CODEC_CHANNEL => true,
            _ => false,
        };
        is_read && side.codec == self.codec && is_key == self.is_key && side.head_dim == self.head_dim
    }

    /// Tables of a warp, then its rows: keys lie there as FP16, values as floats before. Odd numbers of words a row.
    fn shared_warp(&self) -> u32 {
        let words = if self.is_key { self.head_dim / 2 } else { self.head_dim } + 1;
        4 * (4 * self.head_dim + 32 * words)
    }
}

fn kernel_of(side: &SideDesc, is_key: bool) -> Option<&'static RowsKernel> {
    KERNELS.iter().find(|kernel| kernel.fits(side, is_key))
}

/// Names of all kernels, for whoever loads them.
#[cfg(any(test, feature = "cuda"))]
pub(super) fn kernel_names() -> impl Iterator<Item = &'static str> {
    KERNELS.iter().map(|kernel| kernel.name).chain(GENERAL)
}

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
    let layer = given.layer(layout);
    let Call { mut call, rotation, n_streams, plan_len, .. } = given;
    let plan_at = plan_of(layout, call.n_tokens, plan_len)?;
    call.view = if call.k_cur.is_null() { View::After } else { View::Before } as u32;
    let read = AttendParams { call, layer, plan_at, rotation };
    let general = GENERAL[usize::from(has_frames(&layer))];
    let n_chunks = call.n_kv.div_ceil(CELLS_PER_WORD as u32);
    let n_exact = [layer.n_slots, layer.pool_rows, if call.k_cur.is_null() { 0 } else { call.n_tokens }];
    let n_exact: u32 = n_exact.into_iter().map(|n| n.div_ceil(EXACT_ROWS)).sum();
    let may_have_moved = rotation.n_pairs > 0;
    for (side, rows) in (0..).zip(rows).filter(|(_, rows)| !rows.is_null()) {
        let (desc, is_key) = if side == 0 { (&layer.k, true) } else { (&layer.v, false) };
        let launch = |kernel: &str, exact: u32, shared_warp: u32, n_blocks: u32, threads: u32, shared_bytes: u32| {
            let mut params = DequantizeParams { read, rows, side, exact, shared_warp };
            let launch = Launch { blocks: [layer.n_kv_heads, n_blocks, n_streams], threads, shared_bytes };
            // SAFETY: the kernel takes a DequantizeParams; the caller answers for the pointers in it.
            unsafe { device.runner.launch(kernel, launch, (&raw mut params).cast(), stream) }
        };
        // Pairs of words are written at once.
        let is_aligned = (rows as usize).is_multiple_of(8);
        let fitting = kernel_of(desc, is_key).filter(|_| is_key || layer.predicts == 0);
        let known = fitting.filter(|_| is_aligned && !(may_have_moved && is_key));
        // Rows of a chunk, of values after the keys that predict them, and the angles of its page and of each warp.
        let dim = desc.head_dim.max(layer.predicts * layer.k.head_dim);
        let angles = (1 + DEQUANTIZE_THREADS / 32) * desc.head_dim;
        let general_bytes = 4 * (CELLS_PER_WORD as u32 * (dim + 1) + angles);
        match known {
            _ if n_chunks == 0 => {}
            Some(kernel) => {
                let (warps, shared_warp) = (DEQUANTIZE_ROWS_WARPS, kernel.shared_warp());
                launch(kernel.name, 0, shared_warp, n_chunks.div_ceil(warps), 32 * warps, warps * shared_warp)?;
            }
            None => launch(general, 0, 0, n_chunks, DEQUANTIZE_THREADS, general_bytes)?,
        }
        // Exact rows take the place of what a page has for their cells.
        if n_exact > 0 {
            launch(general, 1, 0, n_exact, DEQUANTIZE_THREADS, general_bytes)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::Recipe;
    use crate::shape::Shape;

    #[test]
    fn formats_that_people_take_have_kernels() {
        let kernels = |spec: &str, dim: u32| {
            let shape = Shape { n_heads: 2, n_kv_heads: 1, head_dim_k: dim, head_dim_v: dim };
            let layer = Layout::new(&Recipe::parse(spec).unwrap(), shape, 3, 4096, 256).unwrap().describe();
            let name = |side: &SideDesc, is_key| kernel_of(side, is_key).map_or("none", |kernel| kernel.name);
            [name(&layer.k, true), name(&layer.v, false)]
        };
        assert_eq!(kernels("on", 128), ["kvq_dequantize_128_channels", "kvq_dequantize_128_values"]);
        assert_eq!(kernels("4", 64), ["kvq_dequantize_64_channels", "kvq_dequantize_64_values"]);
        assert_eq!(kernels("kivi:k=2.25,v=2", 128), ["kvq_dequantize_128_channels", "kvq_dequantize_128_values"]);
        assert_eq!(kernels("skvq:k=2,v=2", 128), ["kvq_dequantize_128_keys", "kvq_dequantize_128_values"]);
        // Heads, groups, widths and codecs of which the table has no row.
        for (spec, dim) in [("on", 96), ("skvq:group=32", 128), ("skvq:k=8,v=8", 128), ("qaq", 128)] {
            assert_eq!(kernels(spec, dim), ["none", "none"], "{spec}");
        }
    }
}
