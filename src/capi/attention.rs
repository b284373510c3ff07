//! Attention over one layer, in memory that the caller owns.

use std::ffi::c_void;

use super::layout::kvq_layout;
use super::shift::kvq_rotation;
use super::{check, check_len, check_part, guard, guard_or, product, shared, slice};
use crate::attention;
use crate::attention::{AttendArgs, Mask};
use crate::error::{Error, Result, Status};
use crate::plan::Plan;
use crate::rotation::Rotation;
use crate::rows::Rows;

/// What kvq_attend reads and writes: one layer, one stream. All strides count elements.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kvq_attend_args {
    /// Queries, float [n_tokens][n_heads][head_dim_k].
    pub q: *const f32,
    /// Distance between tokens in `q`.
    pub q_stride_token: usize,
    /// Distance between heads in `q`.
    pub q_stride_head: usize,
    /// Keys of this ubatch, float [n_tokens][n_kv_heads][head_dim_k]; NULL (with `v_cur`) if kvq_store has already run
    /// for this plan, as for layers that share another layer's memory.
    pub k_cur: *const f32,
    /// Distance between tokens in `k_cur`.
    pub k_stride_token: usize,
    /// Distance between heads in `k_cur`.
    pub k_stride_head: usize,
    /// Values of this ubatch, float [n_tokens][n_kv_heads][head_dim_v]; NULL together with `k_cur`.
    pub v_cur: *const f32,
    /// Distance between tokens in `v_cur`.
    pub v_stride_token: usize,
    /// Distance between heads in `v_cur`.
    pub v_stride_head: usize,
    /// Key memory of this stream, kvq_layout_k_bytes, 64-byte aligned.
    pub k_mem: *const u8,
    /// Value memory of this stream, kvq_layout_v_bytes, 64-byte aligned.
    pub v_mem: *const u8,
    /// The plan of this ubatch and stream, from kvq_planner_plan.
    pub plan: *const i32,
    /// Integers in `plan`.
    pub plan_len: usize,
    /// How the layer's keys turn with their positions; may be NULL as long as no kvq_planner_shift was carried out.
    pub rotation: *const kvq_rotation,
    /// Added to the scores: [n_tokens][n_kv], column = cell, -INFINITY hides. NULL: every held cell is visible.
    pub mask: *const c_void,
    /// Distance between tokens in `mask`, at least `n_kv`.
    pub mask_stride_token: usize,
    /// 0: the mask is float; 1: it is IEEE half.
    pub mask_is_f16: u32,
    /// Columns of the mask; cells from n_kv on are not read.
    pub n_kv: u32,
    /// Learned sink logits, float [n_heads], or NULL.
    pub sink_logits: *const f32,
    /// Factor on the scores, usually 1/sqrt(head_dim_k).
    pub scale: f32,
    /// Soft cap: scores become softcap * tanh(score / softcap). 0: none.
    pub softcap: f32,
    /// ALiBi: the mask is multiplied by each head's slope, as ggml computes it. 0: none.
    pub max_bias: f32,
    /// Query rows; the plan's n_tokens.
    pub n_tokens: u32,
    /// 1: `out` is the result. More (kvq_attend_splits): `out` holds partial results for kvq_combine.
    pub n_splits: u32,
    /// Contiguous, float [n_tokens][n_heads][head_dim_v] or, if n_splits > 1,
    /// float [n_splits][n_tokens][n_heads][head_dim_v + 2].
    pub out: *mut f32,
    /// If n_splits is 1: natural logarithms of the softmax denominators, float [n_tokens][n_heads], for kvq_store. NULL:
    /// not wanted.
    pub lse: *mut f32,
    /// Read by the functions of devices alone: device memory that holds what kvq_layout_profile gives, 64-byte aligned.
    /// NULL for layouts that have none.
    pub profile: *const c_void,
}

/// Computes part `part` of `n_parts` of the attention of one layer over the cells that the mask shows: sealed pages,
/// exact rows and the rows of this ubatch. It changes neither memory, and must run before kvq_store of the same plan
/// unless `k_cur` is NULL.
///
/// Parts write disjoint ranges of `out` and may run concurrently, on any threads; all of them together write all of it.
/// On failure the content of `out` is unspecified.
#[no_mangle]
pub unsafe extern "C" fn kvq_attend(
    layout: *const kvq_layout,
    args: *const kvq_attend_args,
    part: u32,
    n_parts: u32,
) -> Status {
    guard(|| {
        // SAFETY: a live layout and arguments that nobody changes during the call, as the header requires.
        let (layout, args) = unsafe { (&shared(layout, "layout")?.layout, shared(args, "args")?) };
        check_part(part, n_parts)?;
        // SAFETY: the arrays in args have the sizes that its comments give, as the header requires.
        let safe = unsafe { attend_args(layout, args) }?;
        let extra = if args.n_splits > 1 { 2 } else { 0 };
        let shape = layout.shape();
        let row = shape.head_dim_v as usize + extra;
        let n = product(&[args.n_splits as usize, args.n_tokens as usize, shape.n_heads as usize, row], "out")?;
        let lse = (args.lse, safe.n_tokens * shape.n_heads as usize);
        // SAFETY: out has room for n floats and lse, unless NULL, for one per query row; no other part touches what this
        // one writes.
        let mut emit = unsafe { scatter(args.out, n, lse) }?;
        attention::attend(layout, &safe, part as usize, n_parts as usize, &mut emit)
    })
}

/// Into how many splits kvq_attend should cut the cells to keep `n_threads` threads busy with `n_tokens` query rows; 1
/// when heads and tokens are enough. 0 if `layout` is NULL.
#[no_mangle]
pub unsafe extern "C" fn kvq_attend_splits(layout: *const kvq_layout, n_tokens: u32, n_threads: u32) -> u32 {
    guard_or(0, || {
        // SAFETY: layout is NULL or a live layout.
        let layout = unsafe { shared(layout, "layout") }?;
        Ok(attention::n_splits(&layout.layout, n_tokens as usize, n_threads as usize) as u32)
    })
}

/// Merges the partial results of kvq_attend with n_splits > 1 into `out`, float [n_tokens][n_heads][head_dim_v]; part
/// `part` of `n_parts`. All parts of kvq_attend must have finished. `n_splits` is what they were given, never 0.
/// `sink_logits` and `lse` as in kvq_attend_args, or NULL.
///
/// Parts write disjoint ranges of `out` and may run concurrently.
#[no_mangle]
pub unsafe extern "C" fn kvq_combine(
    layout: *const kvq_layout,
    partial: *const f32,
    sink_logits: *const f32,
    n_splits: u32,
    n_tokens: u32,
    out: *mut f32,
    lse: *mut f32,
    part: u32,
    n_parts: u32,
) -> Status {
    guard(|| {
        // SAFETY: a live layout, as the header requires.
        let layout = unsafe { &shared(layout, "layout")?.layout };
        check_part(part, n_parts)?;
        let shape = layout.shape();
        let (heads, dim) = (shape.n_heads as usize, shape.head_dim_v as usize);
        let n_rows = product(&[n_tokens as usize, heads], "out")?;
        let n_partial = product(&[n_splits as usize, n_rows, dim + 2], "partial")?;
        // SAFETY: partial has the shape that the header gives, sink_logits is NULL or has n_heads floats.
        let (partial, sinks) =
            unsafe { (slice(partial, n_partial, "partial")?, optional(sink_logits, heads, "sink_logits")?) };
        // SAFETY: out has room for a row per token and head, lse (unless NULL) for a float; parts write disjoint ranges.
        let mut emit = unsafe { scatter(out, product(&[n_rows, dim], "out")?, (lse, n_rows)) }?;
        let (splits, tokens, with_lse) = (n_splits as usize, n_tokens as usize, !lse.is_null());
        let (part, n_parts) = (part as usize, n_parts as usize);
        attention::combine(layout, partial, sinks, splits, tokens, with_lse, part, n_parts, &mut emit)
    })
}

/// # Safety
/// The arrays of `args` have the sizes that its comments give and nobody changes them during `'a`.
unsafe fn attend_args<'a>(layout: &crate::layout::Layout, args: &kvq_attend_args) -> Result<AttendArgs<'a>> {
    let shape = layout.shape();
    let (n, heads, kv_heads) = (args.n_tokens as usize, shape.n_heads as usize, shape.n_kv_heads as usize);
    let (dim_k, dim_v) = (shape.head_dim_k as usize, shape.head_dim_v as usize);
    if args.n_splits == 0 {
        return Err(Error::invalid("n_splits is 0: use 1 for a final result"));
    }
    if args.k_cur.is_null() != args.v_cur.is_null() {
        return Err(Error::invalid("k_cur and v_cur must both be given or both be NULL"));
    }
    // SAFETY: an array of plan_len integers by the caller's promise.
    let plan = Plan::new(unsafe { slice(args.plan, args.plan_len, "plan") }?)?;
    plan.check_entries()?;
    // SAFETY: all of it by the caller's promise.
    unsafe {
        let current = if args.k_cur.is_null() {
            None
        } else {
            let k = rows(args.k_cur, [n, kv_heads, dim_k], args.k_stride_token, args.k_stride_head, "k_cur")?;
            let v = rows(args.v_cur, [n, kv_heads, dim_v], args.v_stride_token, args.v_stride_head, "v_cur")?;
            Some((k, v))
        };
        Ok(AttendArgs {
            q: rows(args.q, [n, heads, dim_k], args.q_stride_token, args.q_stride_head, "q")?,
            current,
            k_mem: slice(args.k_mem, layout.k_bytes(), "k_mem")?,
            v_mem: slice(args.v_mem, layout.v_bytes(), "v_mem")?,
            plan,
            rotation: rotation(args.rotation, "rotation")?,
            mask: mask_of(args.mask, args.mask_is_f16, [n, args.mask_stride_token, args.n_kv as usize])?,
            mask_stride_token: args.mask_stride_token,
            n_kv: args.n_kv as usize,
            sink_logits: optional(args.sink_logits, heads, "sink_logits")?,
            scale: args.scale,
            softcap: args.softcap,
            max_bias: args.max_bias,
            n_tokens: n,
            n_splits: args.n_splits as usize,
            with_lse: !args.lse.is_null(),
        })
    }
}

/// # Safety
/// `rotation` is NULL or a live rotation.
pub(super) unsafe fn rotation<'a>(rotation: *const kvq_rotation, name: &str) -> Result<Option<&'a Rotation>> {
    if rotation.is_null() {
        return Ok(None);
    }
    // SAFETY: not NULL, so a live rotation by the caller's promise.
    Ok(Some(unsafe { &shared(rotation, name)?.rotation }))
}

/// # Safety
/// `mask` is NULL or has rows of `shape` = [tokens, distance, columns].
pub(super) unsafe fn mask_of<'a>(mask: *const c_void, is_f16: u32, shape: [usize; 3]) -> Result<Mask<'a>> {
    if mask.is_null() {
        return Ok(Mask::None);
    }
    let [n_tokens, stride_token, n_columns] = shape;
    let n = span(&[(n_tokens, stride_token)], n_columns, "mask")?;
    // SAFETY: n elements reach from the first to the last one that is read, and exist by the caller's promise.
    unsafe {
        match is_f16 {
            0 => Ok(Mask::F32(slice(mask.cast(), n, "mask")?)),
            1 => Ok(Mask::F16(slice(mask.cast(), n, "mask")?)),
            other => Err(Error::invalid(format!("mask_is_f16 is {other}: use 0 or 1"))),
        }
    }
}

/// Elements from the first to the last of a strided array: `outer` is (count, stride) per dimension, `inner`
/// contiguous.
fn span(outer: &[(usize, usize)], inner: usize, name: &str) -> Result<usize> {
    let mut last = 0usize;
    for &(count, stride) in outer {
        let Some(steps) = count.checked_sub(1) else {
            return Err(Error::invalid(format!("{name} has no rows")));
        };
        let reach = steps.checked_mul(stride).and_then(|reach| last.checked_add(reach));
        last = reach.ok_or_else(|| Error::invalid(format!("the strides of {name} overflow")))?;
    }
    last.checked_add(inner).ok_or_else(|| Error::invalid(format!("the strides of {name} overflow")))
}

/// # Safety
/// `data` is NULL or points to rows of `shape` = [tokens, heads, head_dim] with these strides.
pub(super) unsafe fn rows<'a>(
    data: *const f32,
    shape: [usize; 3],
    stride_token: usize,
    stride_head: usize,
    name: &str,
) -> Result<Rows<'a>> {
    let [n_tokens, n_heads, head_dim] = shape;
    let n = span(&[(n_tokens, stride_token), (n_heads, stride_head)], head_dim, name)?;
    // SAFETY: n elements reach from the first to the last one that is read, and exist by the caller's promise.
    Ok(Rows { data: unsafe { slice(data, n, name) }?, stride_token, stride_head })
}

/// # Safety
/// `data` is NULL or points to `n` elements that nobody changes during `'a`.
pub(super) unsafe fn optional<'a, T>(data: *const T, n: usize, name: &str) -> Result<Option<&'a [T]>> {
    if data.is_null() {
        return Ok(None);
    }
    // SAFETY: not NULL, so valid by the caller's promise.
    unsafe { slice(data, n, name) }.map(Some)
}

/// A writer of rows into `out` and, from offset `n` on, into `behind`. They never become slices, because other parts write
/// to them at the same time.
///
/// # Safety
/// `out` is NULL or has room for `n` floats while the writer lives, `behind` is NULL or has room for as many as it says,
/// and the ranges that the writer writes are its own.
unsafe fn scatter(out: *mut f32, n: usize, behind: (*mut f32, usize)) -> Result<impl FnMut(usize, &[f32])> {
    check(out, "out")?;
    check_len::<f32>(n, "out")?;
    if !behind.0.is_null() {
        check(behind.0, "lse")?;
    }
    let first = out;
    Ok(move |offset: usize, row: &[f32]| {
        let (out, n, offset) = if offset < n { (first, n, offset) } else { (behind.0, behind.1, offset - n) };
        let end = offset.checked_add(row.len());
        assert!(!out.is_null() && end.is_some_and(|end| end <= n), "a row for {offset}..{end:?} in an output of {n}");
        // SAFETY: the range is inside out (just checked) and belongs to this writer.
        unsafe { std::ptr::copy_nonoverlapping(row.as_ptr(), out.add(offset), row.len()) };
    })
}
