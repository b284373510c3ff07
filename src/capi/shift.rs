//! Moving positions: rotations and shifts.

use std::ffi::c_void;

use super::layout::{head_region, kvq_layout};
use super::planner::{kvq_is_live_fn, kvq_planner};
use super::{check_part, exclusive, guard, output, release, shared, slice};
use crate::codec::page::Side;
use crate::error::{Error, Result, Status};
use crate::planner::Shift;
use crate::rotation::Rotation;
use crate::shift::shift_head;

/// How the keys of a layer turn with their positions (RoPE).
///
/// It never changes after kvq_rotation_new, so threads may share it.
pub struct kvq_rotation {
    pub(super) rotation: Rotation,
}

/// What one shift of positions does to the keys of a stream, alike for all layers.
///
/// It never changes after kvq_planner_shift, so threads may share it.
pub struct kvq_shift {
    shift: Shift,
}

/// Makes the rotation that turns pair i of a head by frequencies[i] radians a position: double [n_pairs]. With linear
/// scaling, YaRN or frequency factors they are what those make of them; what RoPE does to a unit vector at position 1
/// tells. `interleaved` 0: pairs are (i, i + n_pairs), as in GPT-NeoX; 1: pairs are neighbours (2i, 2i + 1).
///
/// `n_pairs` 0, with `frequencies` NULL or not: keys do not depend on their positions. Free the result with
/// kvq_rotation_free.
#[no_mangle]
pub unsafe extern "C" fn kvq_rotation_new(
    frequencies: *const f64,
    n_pairs: u32,
    interleaved: u32,
    out: *mut *mut kvq_rotation,
) -> Status {
    guard(|| {
        // SAFETY: room for a pointer, as the header requires.
        let out = unsafe { output(out, "out") }?;
        let frequencies = match n_pairs {
            0 => &[],
            // SAFETY: n_pairs numbers, as the header requires.
            n => unsafe { slice(frequencies, n as usize, "frequencies") }?,
        };
        let rotation = Rotation::new(frequencies, is_interleaved(interleaved)?)?;
        out.write(Box::into_raw(Box::new(kvq_rotation { rotation })));
        Ok(())
    })
}

pub(super) fn is_interleaved(interleaved: u32) -> Result<bool> {
    match interleaved {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(Error::invalid(format!("interleaved is {other}: use 0 or 1"))),
    }
}

/// Frees a rotation. NULL is ignored.
#[no_mangle]
pub unsafe extern "C" fn kvq_rotation_free(rotation: *mut kvq_rotation) {
    guard(|| {
        // SAFETY: rotation is NULL or came from kvq_rotation_new and is not used again.
        unsafe { release(rotation) };
        Ok(())
    });
}

/// Takes note that the positions of a stream's tokens move, that of cell i by moved[i], int32 [n_cells]; values of cells
/// without a live token do not matter. Then kvq_shift_keys has to be called for every layer before the next kvq_attend,
/// and these get the layer's kvq_rotation from then on. `is_live` and `user` as for kvq_planner_plan, asked about cells
/// as they are now.
///
/// On failure the planner is as before. Free the result with kvq_shift_free.
#[no_mangle]
pub unsafe extern "C" fn kvq_planner_shift(
    planner: *mut kvq_planner,
    stream: u32,
    moved: *const i32,
    is_live: kvq_is_live_fn,
    user: *mut c_void,
    out: *mut *mut kvq_shift,
) -> Status {
    guard(|| {
        // SAFETY: a live planner that no other thread uses and room for a pointer, as the header requires.
        let (planner, out) = unsafe { (&mut exclusive(planner, "planner")?.planner, output(out, "out")?) };
        // SAFETY: an integer per cell, as the header requires.
        let moved = unsafe { slice(moved, planner.config().n_cells, "moved") }?;
        let Some(is_live) = is_live else {
            return Err(Error::invalid("is_live is NULL"));
        };
        // SAFETY: a C function of this type, called with the caller's own user pointer.
        let is_live = |cell: usize| unsafe { is_live(user, stream, cell as u32) };
        let shift = planner.shift(stream as usize, moved, &is_live)?;
        out.write(Box::into_raw(Box::new(kvq_shift { shift })));
        Ok(())
    })
}

/// Frees a shift. NULL is ignored.
#[no_mangle]
pub unsafe extern "C" fn kvq_shift_free(shift: *mut kvq_shift) {
    guard(|| {
        // SAFETY: shift is NULL or came from kvq_planner_shift and is not used again.
        unsafe { release(shift) };
        Ok(())
    });
}

/// Carries out part `part` of `n_parts` of a shift in the key memory of one layer: exact rows are turned, packed ones
/// stay as they are as long as the plan can say how far they have moved, which loses nothing. `v_mem` is the layer's
/// value memory; it may be NULL for recipes that do not predict values from keys.
///
/// Parts touch disjoint memory and may run concurrently. Each shift is carried out exactly once per layer, and not while
/// that layer attends or stores.
#[no_mangle]
pub unsafe extern "C" fn kvq_shift_keys(
    layout: *const kvq_layout,
    rotation: *const kvq_rotation,
    shift: *const kvq_shift,
    k_mem: *mut u8,
    v_mem: *mut u8,
    part: u32,
    n_parts: u32,
) -> Status {
    guard(|| {
        // SAFETY: live objects, as the header requires.
        let (layout, rotation, shift) = unsafe {
            (&shared(layout, "layout")?.layout, &shared(rotation, "rotation")?.rotation, &shared(shift, "shift")?.shift)
        };
        check_part(part, n_parts)?;
        super::check(k_mem.cast_const(), "k_mem")?;
        for head in (part as usize..layout.shape().n_kv_heads as usize).step_by(n_parts as usize) {
            // SAFETY: the memory holds a region per head, as the header requires, and only this part touches these.
            let region = unsafe { head_region(layout, Side::Key, head, k_mem) }?;
            let values = if layout.predictor().is_none() || v_mem.is_null() {
                None
            } else {
                // SAFETY: as for the keys.
                Some(unsafe { head_region(layout, Side::Value, head, v_mem) }?)
            };
            shift_head(layout, region, values, shift, rotation)?;
        }
        Ok(())
    })
}
