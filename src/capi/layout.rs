//! Layouts: the bytes of one attention layer.

use std::ffi::c_char;
use std::ops::Range;

use super::recipe::{kvq_recipe, write_text};
use super::{check, guard, guard_or, output, release, shared, slice_mut};
use crate::codec::page::Side;
use crate::error::{Error, Result, Status};
use crate::layout::Layout;
use crate::shape::Shape;

/// Where everything lies in the memory of one attention layer: sizes, offsets, codecs.
///
/// It never changes after kvq_layout_new, so threads may share it. It does not refer to the recipe it was made from.
pub struct kvq_layout {
    pub(super) layout: Layout,
}

/// Makes the layout of a layer of `shape` for `n_cells` cells and `n_slots` exact rows (kvq_planner_n_slots). `layer`
/// counts from 0; some recipes treat the first layers differently.
///
/// KVQ_STATUS_SHAPE if the head sizes or counts are not supported, KVQ_STATUS_RECIPE if the recipe does not fit them.
/// Free the result with kvq_layout_free.
#[no_mangle]
pub unsafe extern "C" fn kvq_layout_new(
    recipe: *const kvq_recipe,
    shape: *const Shape,
    layer: u32,
    n_cells: u32,
    n_slots: u32,
    out: *mut *mut kvq_layout,
) -> Status {
    guard(|| {
        // SAFETY: live objects and room for a pointer, as the header requires.
        let (recipe, shape, out) = unsafe { (shared(recipe, "recipe")?, shared(shape, "shape")?, output(out, "out")?) };
        let layout = Layout::new(&recipe.recipe, *shape, layer as usize, n_cells as usize, n_slots as usize)?;
        out.write(Box::into_raw(Box::new(kvq_layout { layout })));
        Ok(())
    })
}

/// Frees a layout. NULL is ignored.
#[no_mangle]
pub unsafe extern "C" fn kvq_layout_free(layout: *mut kvq_layout) {
    guard(|| {
        // SAFETY: layout is NULL or came from kvq_layout_new and is not used again.
        unsafe { release(layout) };
        Ok(())
    });
}

/// Bytes of the key memory of one stream of one layer, a multiple of 64. The memory must be zeroed before its first
/// use, and 64-byte aligned. 0 if `layout` is NULL.
#[no_mangle]
pub unsafe extern "C" fn kvq_layout_k_bytes(layout: *const kvq_layout) -> usize {
    // SAFETY: layout is NULL or a live layout.
    guard_or(0, || Ok(unsafe { shared(layout, "layout") }?.layout.k_bytes()))
}

/// The same for the value memory.
#[no_mangle]
pub unsafe extern "C" fn kvq_layout_v_bytes(layout: *const kvq_layout) -> usize {
    // SAFETY: layout is NULL or a live layout.
    guard_or(0, || Ok(unsafe { shared(layout, "layout") }?.layout.v_bytes()))
}

/// The shape that a layout was made for. All zeros if `layout` is NULL.
#[no_mangle]
pub unsafe extern "C" fn kvq_layout_shape(layout: *const kvq_layout) -> Shape {
    let none = Shape { n_heads: 0, n_kv_heads: 0, head_dim_k: 0, head_dim_v: 0 };
    // SAFETY: layout is NULL or a live layout.
    guard_or(none, || Ok(unsafe { shared(layout, "layout") }?.layout.shape()))
}

/// Tokens back that the store step weighs a row's attention by, for which it reads `lse` of kvq_store_args; 0: it does
/// not need it. 0 if `layout` is NULL.
#[no_mangle]
pub unsafe extern "C" fn kvq_layout_attn_window(layout: *const kvq_layout) -> u32 {
    // SAFETY: layout is NULL or a live layout.
    guard_or(0, || Ok(unsafe { shared(layout, "layout") }?.layout.describe().attn_window))
}

/// Effective bits per key value of a page, all metadata counted; 16 for float16. 0 if `layout` is NULL.
#[no_mangle]
pub unsafe extern "C" fn kvq_layout_bits_k(layout: *const kvq_layout) -> f64 {
    // SAFETY: layout is NULL or a live layout.
    guard_or(0.0, || Ok(unsafe { shared(layout, "layout") }?.layout.bits_k()))
}

/// The same for values.
#[no_mangle]
pub unsafe extern "C" fn kvq_layout_bits_v(layout: *const kvq_layout) -> f64 {
    // SAFETY: layout is NULL or a live layout.
    guard_or(0.0, || Ok(unsafe { shared(layout, "layout") }?.layout.bits_v()))
}

/// One of KVQ_SIDE_K and KVQ_SIDE_V.
pub type kvq_side = u32;
/// Keys.
pub const KVQ_SIDE_K: kvq_side = 0;
/// Values.
pub const KVQ_SIDE_V: kvq_side = 1;

/// Bytes inside the key or value memory of one stream of one layer.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kvq_range {
    /// First byte.
    pub offset: usize,
    /// Number of bytes.
    pub size: usize,
}

/// Writes one line that is equal for two layouts if and only if they can exchange the bytes of pages and slots: codecs
/// with their settings and format versions, page size, KV heads and head sizes; not n_cells and n_slots.
/// NUL-terminated, into `buf` of `buf_size` bytes; KVQ_STATUS_BUFFER_TOO_SMALL if it does not fit, 512 bytes are always
/// enough.
#[no_mangle]
pub unsafe extern "C" fn kvq_layout_format(layout: *const kvq_layout, buf: *mut c_char, buf_size: usize) -> Status {
    guard(|| {
        // SAFETY: a live layout and buf_size bytes, as the header requires.
        let (layout, buf) = unsafe { (shared(layout, "layout")?, slice_mut(buf.cast::<u8>(), buf_size, "buf")?) };
        write_text(&layout.layout.format(), buf)
    })
}

/// Lists where everything but the pages of all KV heads lies in the memory of `side`: exact rows, outlier pool and what
/// was learned from queries; one range per head, ascending.
///
/// Writes the number of ranges to `n_out`, and to `out` unless it is NULL, which has room for `cap`;
/// KVQ_STATUS_BUFFER_TOO_SMALL if that is too few.
#[no_mangle]
pub unsafe extern "C" fn kvq_layout_slot_ranges(
    layout: *const kvq_layout,
    side: kvq_side,
    out: *mut kvq_range,
    cap: usize,
    n_out: *mut usize,
) -> Status {
    guard(|| {
        // SAFETY: a live layout, as the header requires.
        let layout = unsafe { &shared(layout, "layout")?.layout };
        let side = side_of(side)?;
        // SAFETY: out is NULL or has room for cap ranges, n_out has room for a size, as the header requires.
        unsafe { write_ranges(layout, side, &[layout.slots_range(side)], out, cap, n_out) }
    })
}

/// Lists where the outlier pool of all KV heads lies in the memory of `side`: one range per head, ascending; none if
/// the recipe or the layer has no pool. For kvq_pool_adopt.
///
/// `out`, `cap` and `n_out` as in kvq_layout_slot_ranges.
#[no_mangle]
pub unsafe extern "C" fn kvq_layout_pool_ranges(
    layout: *const kvq_layout,
    side: kvq_side,
    out: *mut kvq_range,
    cap: usize,
    n_out: *mut usize,
) -> Status {
    guard(|| {
        // SAFETY: a live layout, as the header requires.
        let layout = unsafe { &shared(layout, "layout")?.layout };
        let side = side_of(side)?;
        let pool = layout.pool_range(side);
        let ranges = if layout.pool_rows() > 0 { std::slice::from_ref(&pool) } else { &[] };
        // SAFETY: out is NULL or has room for cap ranges, n_out has room for a size, as the header requires.
        unsafe { write_ranges(layout, side, ranges, out, cap, n_out) }
    })
}

/// Lists where the pages [page0, page0 + n_pages) of all KV heads lie in the memory of `side`: per head a range of
/// headers and a range of pages, ascending. Two layouts of the same kvq_layout_format give the same number of ranges of
/// the same sizes.
///
/// `out`, `cap` and `n_out` as in kvq_layout_slot_ranges.
#[no_mangle]
pub unsafe extern "C" fn kvq_layout_page_ranges(
    layout: *const kvq_layout,
    side: kvq_side,
    page0: u32,
    n_pages: u32,
    out: *mut kvq_range,
    cap: usize,
    n_out: *mut usize,
) -> Status {
    guard(|| {
        // SAFETY: a live layout, as the header requires.
        let layout = unsafe { &shared(layout, "layout")?.layout };
        let side = side_of(side)?;
        let (first, end) = (page0 as usize, page0 as usize + n_pages as usize);
        if first >= end || end > layout.n_pages() {
            let text = format!("pages {first}..{end}: name at least one of {}", layout.n_pages());
            return Err(Error::invalid(text));
        }
        let headers = layout.header_range(side, first).start..layout.header_range(side, end - 1).end;
        let pages = layout.page_range(side, first).start..layout.page_range(side, end - 1).end;
        // SAFETY: out is NULL or has room for cap ranges, n_out has room for a size, as the header requires.
        unsafe { write_ranges(layout, side, &[headers, pages], out, cap, n_out) }
    })
}

/// Repeats ranges of a head region for every head.
///
/// # Safety
/// `out` is NULL or has room for `cap` ranges, `n_out` is NULL or has room for a size; nobody else uses them.
unsafe fn write_ranges(
    layout: &Layout,
    side: Side,
    ranges: &[Range<usize>],
    out: *mut kvq_range,
    cap: usize,
    n_out: *mut usize,
) -> Result<()> {
    // SAFETY: by the caller's promise.
    let n_out = unsafe { output(n_out, "n_out") }?;
    let n_heads = layout.shape().n_kv_heads as usize;
    let n = n_heads * ranges.len();
    if !out.is_null() {
        if cap < n {
            return Err(Error::new(Status::BufferTooSmall, format!("{n} ranges do not fit into {cap}")));
        }
        // SAFETY: not NULL, so there is room for cap ranges by the caller's promise, and n of them are enough.
        let out = unsafe { slice_mut(out.cast::<std::mem::MaybeUninit<kvq_range>>(), n, "out") }?;
        for (index, to) in out.iter_mut().enumerate() {
            let range = &ranges[index % ranges.len()];
            let head = index / ranges.len() * layout.head_bytes(side);
            to.write(kvq_range { offset: head + range.start, size: range.len() });
        }
    }
    n_out.write(n);
    Ok(())
}

fn side_of(side: kvq_side) -> Result<Side> {
    match side {
        KVQ_SIDE_K => Ok(Side::Key),
        KVQ_SIDE_V => Ok(Side::Value),
        other => Err(Error::invalid(format!("side {other}: use KVQ_SIDE_K or KVQ_SIDE_V"))),
    }
}

/// The region of a head.
///
/// # Safety
/// `memory` is NULL or the memory of `side`, and nobody else uses the region of `head` during `'a`.
pub(super) unsafe fn head_region<'a>(
    layout: &Layout,
    side: Side,
    head: usize,
    memory: *mut u8,
) -> Result<&'a mut [u8]> {
    let bytes = layout.head_bytes(side);
    check(memory, memory_name(side))?;
    // SAFETY: the region of a head lies inside the memory of its side, by the definition of the layout.
    unsafe { slice_mut(memory.add(head * bytes), bytes, memory_name(side)) }
}

pub(super) fn memory_name(side: Side) -> &'static str {
    match side {
        Side::Key => "k_mem",
        Side::Value => "v_mem",
    }
}
