//! Planners: which row is kept where.

use std::ffi::c_void;

use super::recipe::kvq_recipe;
use super::{exclusive, guard, guard_or, output, release, shared, slice, slice_mut};
use crate::error::{Error, Status};
use crate::location::Location;
use crate::plan::plan_len;
use crate::planner::{Planner, Row};

/// Decides, for all layers at once, which rows of a stream stay exact, in which slot, and when pages are sealed.
///
/// Deterministic, no I/O. Not thread-safe: one thread at a time. It does not refer to the recipe it was made from.
pub struct kvq_planner {
    pub(super) planner: Planner,
}

/// One token of an ubatch: the cell it is written to, its sequence and its position there.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kvq_row {
    /// Cell, smaller than the planner's n_cells.
    pub cell: u32,
    /// Position; small ones are the sink tokens that some recipes keep exact.
    pub pos: i32,
    /// Sequence, smaller than the planner's n_seq_max, whose window the token is in: the first one if several share it.
    pub seq: u32,
}

/// Tells whether `cell` of `stream` still holds a token that some sequence can see. Asked only while kvq_planner_plan
/// runs, about cells as they were before the rows of that call were placed. It must return (no longjmp, no exception).
pub type kvq_is_live_fn = Option<unsafe extern "C" fn(user: *mut c_void, stream: u32, cell: u32) -> bool>;

/// Makes a planner for `n_streams` streams of `n_cells` cells each. `n_seq_max` sequences share a single stream; of
/// several streams each has one. Every sequence has a window and sink tokens of its own; the windows of a stream take
/// at most a quarter of its cells, or one window if that is more, and are cut to the same length where they would take
/// more. Free the result with kvq_planner_free.
#[no_mangle]
pub unsafe extern "C" fn kvq_planner_new(
    recipe: *const kvq_recipe,
    n_cells: u32,
    n_streams: u32,
    n_seq_max: u32,
    out: *mut *mut kvq_planner,
) -> Status {
    guard(|| {
        // SAFETY: a live recipe and room for a pointer, as the header requires.
        let (recipe, out) = unsafe { (shared(recipe, "recipe")?, output(out, "out")?) };
        let config = recipe.recipe.planner_config(n_cells as usize, n_streams as usize, n_seq_max as usize);
        let planner = Planner::new(config)?;
        out.write(Box::into_raw(Box::new(kvq_planner { planner })));
        Ok(())
    })
}

/// Frees a planner. NULL is ignored.
#[no_mangle]
pub unsafe extern "C" fn kvq_planner_free(planner: *mut kvq_planner) {
    guard(|| {
        // SAFETY: planner is NULL or came from kvq_planner_new and is not used again.
        unsafe { release(planner) };
        Ok(())
    });
}

/// Number of exact rows of a stream, to be passed to kvq_layout_new. 0 if `planner` is NULL.
#[no_mangle]
pub unsafe extern "C" fn kvq_planner_n_slots(planner: *const kvq_planner) -> u32 {
    guard_or(0, || {
        // SAFETY: planner is NULL or a live planner.
        let planner = unsafe { shared(planner, "planner") }?;
        Ok(planner.planner.n_slots() as u32)
    })
}

/// Length (in int32) of the plan of one stream for `n_tokens` rows. 0 if `planner` is NULL or the length overflows.
#[no_mangle]
pub unsafe extern "C" fn kvq_planner_plan_len(planner: *const kvq_planner, n_tokens: u32) -> usize {
    // SAFETY: planner is NULL or a live planner.
    guard_or(0, || Ok(needed(&unsafe { shared(planner, "planner") }?.planner, n_tokens as usize)))
}

fn needed(planner: &Planner, n_tokens: usize) -> usize {
    let config = planner.config();
    plan_len(n_tokens, planner.n_slots(), config.n_cells, config.page)
}

/// Places the `n_rows` rows of one ubatch into `stream` and writes the plan that kvq_attend and kvq_store execute, in
/// that order, for every layer. `plan_len` is at least kvq_planner_plan_len(planner, n_rows).
///
/// Cells must differ within a call. `user` is handed to `is_live`. If no cell of the stream is live, kvq_store of this
/// plan also forgets what the stream has learned from its tokens. On failure the planner is as before.
#[no_mangle]
pub unsafe extern "C" fn kvq_planner_plan(
    planner: *mut kvq_planner,
    stream: u32,
    rows: *const kvq_row,
    n_rows: usize,
    is_live: kvq_is_live_fn,
    user: *mut c_void,
    plan: *mut i32,
    plan_len: usize,
) -> Status {
    guard(|| {
        // SAFETY: a live planner that no other thread uses, and arrays of the lengths given, as the header requires.
        let (planner, rows, plan) = unsafe {
            (exclusive(planner, "planner")?, slice(rows, n_rows, "rows")?, slice_mut(plan, plan_len, "plan")?)
        };
        let Some(is_live) = is_live else {
            return Err(Error::invalid("is_live is NULL"));
        };
        let needed = needed(&planner.planner, rows.len());
        if plan.len() < needed {
            let text = format!("the plan needs {needed} integers, plan_len is {}", plan.len());
            return Err(Error::new(Status::BufferTooSmall, text));
        }
        let rows: Vec<Row> = rows.iter().map(|row| Row { cell: row.cell, pos: row.pos, seq: row.seq }).collect();
        // SAFETY: a C function of this type, called with the caller's own user pointer.
        let is_live = |cell: usize| unsafe { is_live(user, stream, cell as u32) };
        planner.planner.plan(stream as usize, &rows, &is_live, &mut plan[..needed])
    })
}

/// Forgets every row of a stream. Nothing happens if `planner` is NULL or there is no such stream.
#[no_mangle]
pub unsafe extern "C" fn kvq_planner_reset(planner: *mut kvq_planner, stream: u32) {
    guard(|| {
        // SAFETY: planner is NULL or a live planner that no other thread uses.
        let planner = unsafe { exclusive(planner, "planner") }?;
        planner.planner.reset(stream as usize)
    });
}

/// Makes stream `dst` equal to stream `src`. The caller copies the memory of all layers likewise.
#[no_mangle]
pub unsafe extern "C" fn kvq_planner_copy_stream(planner: *mut kvq_planner, src: u32, dst: u32) -> Status {
    guard(|| {
        // SAFETY: a live planner that no other thread uses, as the header requires.
        let planner = unsafe { exclusive(planner, "planner") }?;
        planner.planner.copy_stream(src as usize, dst as usize)
    })
}

/// Tells where the row of each cell of a stream is. `location` has room for n_cells.
#[no_mangle]
pub unsafe extern "C" fn kvq_planner_locate(
    planner: *const kvq_planner,
    stream: u32,
    location: *mut Location,
) -> Status {
    guard(|| {
        // SAFETY: a live planner, as the header requires.
        let planner = unsafe { shared(planner, "planner") }?;
        let found = planner.planner.locate(stream as usize)?;
        // SAFETY: location has room for n_cells locations that no other thread uses.
        let location =
            unsafe { slice_mut(location.cast::<std::mem::MaybeUninit<Location>>(), found.len(), "location") }?;
        location.iter_mut().zip(&found).for_each(|(to, &from)| {
            to.write(from);
        });
        Ok(())
    })
}

/// Writes the size of what kvq_planner_export gives to `size`.
#[no_mangle]
pub unsafe extern "C" fn kvq_planner_export_size(planner: *const kvq_planner, stream: u32, size: *mut usize) -> Status {
    guard(|| {
        // SAFETY: a live planner and room for a size, as the header requires.
        let (planner, size) = unsafe { (&shared(planner, "planner")?.planner, output(size, "size")?) };
        size.write(planner.snapshot(stream as usize)?.len());
        Ok(())
    })
}

/// Writes the whole state of a stream, opaque and portable, to `out` of `size` bytes (kvq_planner_export_size; more is
/// allowed, fewer is KVQ_STATUS_BUFFER_TOO_SMALL).
#[no_mangle]
pub unsafe extern "C" fn kvq_planner_export(
    planner: *const kvq_planner,
    stream: u32,
    out: *mut u8,
    size: usize,
) -> Status {
    guard(|| {
        // SAFETY: a live planner and size bytes that no other thread uses, as the header requires.
        let (planner, out) = unsafe { (&shared(planner, "planner")?.planner, slice_mut(out, size, "out")?) };
        let bytes = planner.snapshot(stream as usize)?;
        if out.len() < bytes.len() {
            let text = format!("the planner state needs {} bytes, out has {}", bytes.len(), out.len());
            return Err(Error::new(Status::BufferTooSmall, text));
        }
        out[..bytes.len()].copy_from_slice(&bytes);
        Ok(())
    })
}

/// Makes a stream what it was when the `size` bytes were exported, by a planner made with the same recipe and numbers
/// (but for n_streams, unless that changes the number of slots). The bytes are not trusted: KVQ_STATUS_FORMAT, with
/// nothing changed, if they are of another planner or describe an impossible state.
#[no_mangle]
pub unsafe extern "C" fn kvq_planner_import(
    planner: *mut kvq_planner,
    stream: u32,
    bytes: *const u8,
    size: usize,
) -> Status {
    guard(|| {
        // SAFETY: a live planner that no other thread uses and size bytes, as the header requires.
        let (planner, bytes) = unsafe { (exclusive(planner, "planner")?, slice(bytes, size, "bytes")?) };
        planner.planner.restore(stream as usize, bytes)
    })
}

/// Tells the planner that the caller has copied whole pages into the memory of a stream: the `n_cells` cells at `cells`
/// are read from their pages from now on, where the row of cells[i] has moved by turned[i] positions since it was
/// encoded (kvq_location). Whatever was held for them and for the other cells of those pages is forgotten. Exact rows
/// follow through kvq_planner_plan and kvq_store, like a new ubatch.
#[no_mangle]
pub unsafe extern "C" fn kvq_planner_adopt(
    planner: *mut kvq_planner,
    stream: u32,
    cells: *const u32,
    turned: *const i32,
    n_cells: usize,
) -> Status {
    guard(|| {
        // SAFETY: a live planner that no other thread uses and n_cells elements each, as the header requires.
        let (planner, cells, turned) = unsafe {
            (exclusive(planner, "planner")?, slice(cells, n_cells, "cells")?, slice(turned, n_cells, "turned")?)
        };
        planner.planner.adopt(stream as usize, cells, turned)
    })
}
