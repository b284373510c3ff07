//! Writing and reading the memory of one layer.

use std::ffi::c_void;

use super::attention::{optional, rotation, rows};
use super::layout::{head_region, kvq_layout, memory_name};
use super::shift::kvq_rotation;
use super::{check, check_part, guard, product, shared, slice, slice_mut};
use crate::codec::page::Side;
use crate::erase::erase_head;
use crate::error::{Error, Result, Status};
use crate::head::{Head, HeadMut};
use crate::layout::Layout;
use crate::location::Location;
use crate::plan::Plan;
use crate::pool;
use crate::recent::Attended;
use crate::rows::Rows;
use crate::store::{self, StoreRows};

/// What kvq_store reads and writes: one layer, one stream. All strides count elements.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kvq_store_args {
    /// Keys of this ubatch, float [n_tokens][n_kv_heads][head_dim_k].
    pub k_cur: *const f32,
    /// Distance between tokens in `k_cur`.
    pub k_stride_token: usize,
    /// Distance between heads in `k_cur`.
    pub k_stride_head: usize,
    /// Values of this ubatch, float [n_tokens][n_kv_heads][head_dim_v].
    pub v_cur: *const f32,
    /// Distance between tokens in `v_cur`.
    pub v_stride_token: usize,
    /// Distance between heads in `v_cur`.
    pub v_stride_head: usize,
    /// Key memory of this stream, kvq_layout_k_bytes, 64-byte aligned.
    pub k_mem: *mut u8,
    /// Value memory of this stream, kvq_layout_v_bytes, 64-byte aligned.
    pub v_mem: *mut u8,
    /// The plan of this ubatch and stream, from kvq_planner_plan.
    pub plan: *const i32,
    /// Integers in `plan`.
    pub plan_len: usize,
    /// As in kvq_attend_args.
    pub rotation: *const kvq_rotation,
    /// Queries of this ubatch, float [n_tokens][n_heads][head_dim_k], from which some recipes learn which channels of
    /// the keys matter. NULL: they learn nothing from this ubatch.
    pub q: *const f32,
    /// Distance between tokens in `q`.
    pub q_stride_token: usize,
    /// Distance between heads in `q`.
    pub q_stride_head: usize,
    /// What kvq_attend or kvq_combine wrote to `lse`, float [n_tokens][n_heads]: with `q` it tells recipes with an
    /// attention window which tokens matter. NULL: the tokens that are encoded now do not follow these queries.
    pub lse: *const f32,
    /// The factor on the scores that kvq_attend got; only read with `lse`.
    pub scale: f32,
    /// Position of each cell's token, this ubatch's included, int32 [n_cells]; values of cells without a token do not
    /// matter. Only recipes with a profile need it (kvq_layout_wants_positions), for others it may be NULL.
    pub positions: *const i32,
    /// As in kvq_attend_args.
    pub profile: *const c_void,
    /// Rows; the plan's n_tokens. Without any, `k_cur` and `v_cur` are not read.
    pub n_tokens: u32,
    /// For kvq_store_enqueue. 1: kvq_attend_enqueue with the same rows, queries, plan and memory comes before on the
    /// same stream and nothing between them writes any of these, so they may be read while it still runs. 0: they may
    /// not. kvq_store does not look at it.
    pub after_attend: u32,
}

/// Executes part `part` of `n_parts` of a plan for one layer: seals pages, then writes the rows of this ubatch into
/// their slots. All parts of kvq_attend of the same plan must have finished.
///
/// Parts touch disjoint memory and may run concurrently. Each plan is stored exactly once per layer.
#[no_mangle]
pub unsafe extern "C" fn kvq_store(
    layout: *const kvq_layout,
    args: *const kvq_store_args,
    part: u32,
    n_parts: u32,
) -> Status {
    guard(|| {
        // SAFETY: a live layout and arguments that nobody changes during the call, as the header requires.
        let (layout, args) = unsafe { (&shared(layout, "layout")?.layout, shared(args, "args")?) };
        check_part(part, n_parts)?;
        let shape = layout.shape();
        let (n, heads) = (args.n_tokens as usize, shape.n_kv_heads as usize);
        let (dim_k, dim_v) = (shape.head_dim_k as usize, shape.head_dim_v as usize);
        // SAFETY: the arrays in args have the sizes that its comments give, as the header requires.
        let (q, lse, k, v, plan, rotation, positions) = unsafe {
            let q_shape = [n, shape.n_heads as usize, dim_k];
            let q = if args.q.is_null() {
                None
            } else {
                Some(rows(args.q, q_shape, args.q_stride_token, args.q_stride_head, "q")?)
            };
            (
                q,
                optional(args.lse, product(&[n, shape.n_heads as usize], "lse")?, "lse")?,
                current(args.k_cur, [n, heads, dim_k], args.k_stride_token, args.k_stride_head, "k_cur")?,
                current(args.v_cur, [n, heads, dim_v], args.v_stride_token, args.v_stride_head, "v_cur")?,
                Plan::new(slice(args.plan, args.plan_len, "plan")?)?,
                rotation(args.rotation, "rotation")?,
                optional(args.positions, layout.n_cells(), "positions")?,
            )
        };
        plan.check_entries()?;
        if plan.n_tokens() != n {
            return Err(Error::invalid(format!("n_tokens is {n}, the plan is for {}", plan.n_tokens())));
        }
        let attended = lse.map(|lse| Attended { lse, scale: args.scale });
        check(args.k_mem, "k_mem")?;
        check(args.v_mem, "v_mem")?;
        for head in (part as usize..heads).step_by(n_parts as usize) {
            // SAFETY: the memory holds a region per head, as the header requires, and only this part touches these.
            let regions = unsafe {
                [head_region(layout, Side::Key, head, args.k_mem)?, head_region(layout, Side::Value, head, args.v_mem)?]
            };
            store::store_head(layout, head, regions, &StoreRows { positions, k, v, q, attended, rotation }, &plan)?;
        }
        Ok(())
    })
}

/// The rows of a ubatch, which may have none.
///
/// # Safety
/// As for `rows`.
unsafe fn current<'a>(
    data: *const f32,
    shape: [usize; 3],
    stride_token: usize,
    stride_head: usize,
    name: &str,
) -> Result<Rows<'a>> {
    if shape[0] == 0 {
        return Ok(Rows { data: &[], stride_token, stride_head });
    }
    // SAFETY: by the caller's promise.
    unsafe { rows(data, shape, stride_token, stride_head, name) }
}

/// Reads rows of the cells [cell0, cell0 + n) as float [n][n_kv_heads][head_dim]. `location` comes from
/// kvq_planner_locate; cells that are nowhere give zeros. `rotation` as in kvq_attend_args. `k_out` (with `k_mem`) or
/// `v_out` (with `v_mem`) may be NULL, then that side is left out. Recipes that predict values need `k_mem` for these
/// too.
#[no_mangle]
pub unsafe extern "C" fn kvq_dequantize(
    layout: *const kvq_layout,
    k_mem: *const u8,
    v_mem: *const u8,
    location: *const Location,
    rotation: *const kvq_rotation,
    cell0: u32,
    n: u32,
    k_out: *mut f32,
    v_out: *mut f32,
) -> Status {
    guard(|| {
        // SAFETY: a live layout, as the header requires.
        let layout = unsafe { &shared(layout, "layout")?.layout };
        let cells = cell_range(layout, cell0, n)?;
        // SAFETY: location has an entry per cell of the layout, as the header requires.
        let location = unsafe { slice(location, layout.n_cells(), "location") }?;
        // SAFETY: rotation is NULL or a live rotation, as the header requires.
        let rotation = unsafe { self::rotation(rotation, "rotation") }?;
        let sides = [(Side::Key, "k_mem", k_mem, "k_out", k_out), (Side::Value, "v_mem", v_mem, "v_out", v_out)];
        for (side, memory_name, memory, out_name, out) in sides {
            if out.is_null() {
                continue;
            }
            let (heads, dim) = head_shape(layout, side);
            let n_out = product(&[n as usize, heads, dim], "the output")?;
            // SAFETY: the memory holds a region per head and out a row per cell and head, as the header requires.
            let (memory, out) = unsafe {
                (slice(memory, heads * layout.head_bytes(side), memory_name)?, slice_mut(out, n_out, out_name)?)
            };
            let head_bytes = layout.head_bytes(Side::Key);
            let keys = match side {
                Side::Value if layout.predictor().is_some() => {
                    // SAFETY: the memory holds a region per head, as the header requires.
                    unsafe { slice(k_mem, heads * head_bytes, "k_mem") }?
                }
                _ => &[],
            };
            let mut keys = keys.chunks_exact(head_bytes);
            read_rows(layout, side, memory, cells.clone(), out, |region, rows| match side {
                Side::Key => store::dequantize_head(layout, side, region, location, rotation, cells.clone(), rows),
                Side::Value => {
                    let regions = [keys.next().unwrap_or_default(), region];
                    store::dequantize_values(layout, regions, location, cells.clone(), rows)
                }
            })?;
        }
        Ok(())
    })
}

/// Takes over saved members of the outlier pool: those of the cells `from[i]` become members for the cells `to[i]`,
/// whose pages the caller has put into the memory. `saved_k` and `saved_v` hold the bytes of kvq_layout_pool_ranges, one
/// range after the other, of a layout with the same kvq_layout_format. What the pool held for the cells `to` is
/// forgotten. A member that finds no room is read from its page from then on.
#[no_mangle]
pub unsafe extern "C" fn kvq_pool_adopt(
    layout: *const kvq_layout,
    k_mem: *mut u8,
    v_mem: *mut u8,
    saved_k: *const u8,
    saved_v: *const u8,
    from: *const u32,
    to: *const u32,
    n: u32,
) -> Status {
    guard(|| {
        // SAFETY: a live layout, as the header requires.
        let layout = unsafe { &shared(layout, "layout")?.layout };
        let heads = layout.shape().n_kv_heads as usize;
        // SAFETY: arrays of n cells, as the header requires.
        let (from, to) = unsafe { (slice(from, n as usize, "from")?, slice(to, n as usize, "to")?) };
        if let Some(cell) = to.iter().find(|cell| **cell as usize >= layout.n_cells()) {
            return Err(Error::invalid(format!("cell {cell} does not exist: there are {}", layout.n_cells())));
        }
        if layout.pool_rows() == 0 {
            return Ok(());
        }
        check(k_mem, "k_mem")?;
        check(v_mem, "v_mem")?;
        for (side, memory, saved, name) in
            [(Side::Key, k_mem, saved_k, "saved_k"), (Side::Value, v_mem, saved_v, "saved_v")]
        {
            let n_saved = layout.pool_range(side).len();
            // SAFETY: saved holds a range per head, as the header requires.
            let saved = unsafe { slice(saved, heads * n_saved, name) }?;
            for (head, saved) in saved.chunks_exact(n_saved).enumerate() {
                // SAFETY: the memory holds a region per head, which nobody else uses, as the header requires.
                let region = unsafe { head_region(layout, side, head, memory) }?;
                pool::adopt(&mut HeadMut::new(layout, side, region), saved, from, to);
            }
        }
        Ok(())
    })
}

/// Refuses memory whose outlier pools name a cell twice, as only a crafted state brings it: kvq_attend would count that
/// token twice. For bytes of kvq_layout_slot_ranges that come from outside the process, before they are attended to;
/// kvq_pool_adopt takes such a member once. KVQ_STATUS_FORMAT if so.
#[no_mangle]
pub unsafe extern "C" fn kvq_pool_check(layout: *const kvq_layout, k_mem: *const u8, v_mem: *const u8) -> Status {
    guard(|| {
        // SAFETY: a live layout, as the header requires.
        let layout = unsafe { &shared(layout, "layout")?.layout };
        let heads = layout.shape().n_kv_heads as usize;
        check(k_mem, "k_mem")?;
        check(v_mem, "v_mem")?;
        for (side, memory) in [(Side::Key, k_mem), (Side::Value, v_mem)] {
            // SAFETY: the memory holds a region per head, as the header requires.
            let memory = unsafe { slice(memory, heads * layout.head_bytes(side), memory_name(side)) }?;
            memory
                .chunks_exact(layout.head_bytes(side))
                .try_for_each(|region| pool::check(Head::new(layout, side, region)))?;
        }
        Ok(())
    })
}

/// Wipes what the memory of one stream still holds of rows that `location` does not name, so that a copy of it can be
/// given away: slots, the outlier pool and the rows of pages. `location` is as kvq_planner_locate gives it; write
/// KVQ_NOWHERE for cells that are not to be read.
///
/// The other rows decode to the same values as before. What a page holds for all its rows together (its mean, ranges and
/// order of tokens) stays. `k_mem` or `v_mem` may be NULL, then that side is left out.
#[no_mangle]
pub unsafe extern "C" fn kvq_erase(
    layout: *const kvq_layout,
    k_mem: *mut u8,
    v_mem: *mut u8,
    location: *const Location,
) -> Status {
    guard(|| {
        // SAFETY: a live layout, as the header requires.
        let layout = unsafe { &shared(layout, "layout")?.layout };
        // SAFETY: location has an entry per cell of the layout, as the header requires.
        let location = unsafe { slice(location, layout.n_cells(), "location") }?;
        for (side, memory, name) in [(Side::Key, k_mem, "k_mem"), (Side::Value, v_mem, "v_mem")] {
            if memory.is_null() {
                continue;
            }
            let (heads, _) = head_shape(layout, side);
            // SAFETY: the memory holds a region per head, which nobody else uses, as the header requires.
            let memory = unsafe { slice_mut(memory, heads * layout.head_bytes(side), name) }?;
            for region in memory.chunks_exact_mut(layout.head_bytes(side)) {
                erase_head(layout, side, region, location)?;
            }
        }
        Ok(())
    })
}

/// Gathers the heads of each cell, which lie in separate regions and are decoded one by one, into rows of `out`.
fn read_rows(
    layout: &Layout,
    side: Side,
    memory: &[u8],
    cells: std::ops::Range<usize>,
    out: &mut [f32],
    mut decode: impl FnMut(&[u8], &mut [f32]) -> Result<()>,
) -> Result<()> {
    let (heads, dim) = head_shape(layout, side);
    let mut head_rows = vec![0.0; cells.len() * dim];
    for (head, region) in memory.chunks_exact(layout.head_bytes(side)).enumerate() {
        decode(region, &mut head_rows)?;
        for (from, to) in head_rows.chunks_exact(dim).zip(out.chunks_exact_mut(heads * dim)) {
            to[head * dim..][..dim].copy_from_slice(from);
        }
    }
    Ok(())
}

/// KV heads and head size of a side.
fn head_shape(layout: &Layout, side: Side) -> (usize, usize) {
    let shape = layout.shape();
    let dim = if side == Side::Key { shape.head_dim_k } else { shape.head_dim_v };
    (shape.n_kv_heads as usize, dim as usize)
}

fn cell_range(layout: &Layout, cell0: u32, n: u32) -> Result<std::ops::Range<usize>> {
    let (start, end) = (cell0 as usize, cell0 as usize + n as usize);
    if end > layout.n_cells() {
        return Err(Error::invalid(format!("cells {start}..{end} do not exist: the layout has {}", layout.n_cells())));
    }
    Ok(start..end)
}
