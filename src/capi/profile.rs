//! Profiles: what calibration found of a model, between a file that the host reads and writes and the recipes that use it.

use std::ffi::c_char;

use super::recipe::{kvq_recipe, write_text};
use super::shift::kvq_rotation;
use super::{exclusive, guard, guard_or, output, product, release, shared, slice, slice_mut};
use crate::error::{Error, Result, Status};
use crate::profile::{LayerProfile, Profile};
use crate::shape::Shape;

/// The profile of a model, layer by layer.
///
/// No two calls on the same profile may run at the same time, unless neither of them changes it.
pub struct kvq_profile {
    pub(super) profile: Profile,
}

/// The numbers of one layer: arrays of all KV heads, one after the other.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kvq_profile_layer {
    /// Whose heads.
    pub shape: Shape,
    /// Mean keys, turned back to position 0, float [n_kv_heads][head_dim_k].
    pub key_bias: *const f32,
    /// From keys in the frame of a page to what is coded, float [n_kv_heads][head_dim_k][head_dim_k].
    pub key_transform: *const f32,
    /// From such keys to values, float [n_kv_heads][head_dim_v][head_dim_k].
    pub predictor: *const f32,
    /// What is added to these, float [n_kv_heads][head_dim_v].
    pub offset: *const f32,
}

/// Makes a profile without layers. Free it with kvq_profile_free.
#[no_mangle]
pub unsafe extern "C" fn kvq_profile_new(out: *mut *mut kvq_profile) -> Status {
    guard(|| {
        // SAFETY: room for a pointer, as the header requires.
        let out = unsafe { output(out, "out") }?;
        out.write(Box::into_raw(Box::new(kvq_profile { profile: Profile::default() })));
        Ok(())
    })
}

/// Frees a profile. NULL is ignored.
#[no_mangle]
pub unsafe extern "C" fn kvq_profile_free(profile: *mut kvq_profile) {
    guard(|| {
        // SAFETY: profile is NULL or came from kvq_profile_new and is not used again.
        unsafe { release(profile) };
        Ok(())
    });
}

/// Sets layer `layer`, counted as for kvq_layout_new, whose keys turn as `rotation` says. KVQ_STATUS_FORMAT if a number
/// is not finite.
#[no_mangle]
pub unsafe extern "C" fn kvq_profile_set_layer(
    profile: *mut kvq_profile,
    layer: u32,
    rotation: *const kvq_rotation,
    numbers: *const kvq_profile_layer,
) -> Status {
    guard(|| {
        // SAFETY: live objects, as the header requires.
        let (profile, rotation, numbers) =
            unsafe { (exclusive(profile, "profile")?, shared(rotation, "rotation")?, shared(numbers, "numbers")?) };
        numbers.shape.validate()?;
        let [heads, k, v] =
            [numbers.shape.n_kv_heads, numbers.shape.head_dim_k, numbers.shape.head_dim_v].map(|n| n as usize);
        let arrays = [
            (numbers.key_bias, k, "key_bias"),
            (numbers.key_transform, k * k, "key_transform"),
            (numbers.predictor, k * v, "predictor"),
            (numbers.offset, v, "offset"),
        ];
        let mut copies: [Vec<f32>; 4] = Default::default();
        for (copy, (array, size, name)) in copies.iter_mut().zip(arrays) {
            // SAFETY: arrays of these sizes, as the header requires.
            copy.extend_from_slice(unsafe { slice(array, product(&[heads, size], name)?, name) }?);
        }
        profile.profile.set(layer as usize, LayerProfile::new(numbers.shape, rotation.rotation.clone(), copies)?)
    })
}

/// Gives the numbers of a layer. The arrays are the profile's: they are there until the layer is set again or the
/// profile freed. KVQ_STATUS_FORMAT if the profile has no such layer or it is of other KV heads than those of `shape`.
#[no_mangle]
pub unsafe extern "C" fn kvq_profile_get_layer(
    profile: *const kvq_profile,
    layer: u32,
    shape: *const Shape,
    out: *mut kvq_profile_layer,
) -> Status {
    guard(|| {
        // SAFETY: live objects and room for the result, as the header requires.
        let (profile, shape, out) =
            unsafe { (shared(profile, "profile")?, *shared(shape, "shape")?, output(out, "out")?) };
        let found = profile.profile.layer(layer as usize, shape)?;
        out.write(kvq_profile_layer {
            shape,
            key_bias: found.key_bias.as_ptr(),
            key_transform: found.key_transform.as_ptr(),
            predictor: found.predictor.as_ptr(),
            offset: found.offset.as_ptr(),
        });
        Ok(())
    })
}

/// Writes the radians by which each pair of a rotation turns per position, between -pi and pi, double [n_out]: their
/// number to `n_out`, and to `out` unless it is NULL, which has room for `cap`; KVQ_STATUS_BUFFER_TOO_SMALL if that is
/// too few.
#[no_mangle]
pub unsafe extern "C" fn kvq_rotation_frequencies(
    rotation: *const kvq_rotation,
    out: *mut f64,
    cap: usize,
    n_out: *mut usize,
) -> Status {
    guard(|| {
        // SAFETY: a live rotation and room for a size, as the header requires.
        let (rotation, n_out) = unsafe { (&shared(rotation, "rotation")?.rotation, output(n_out, "n_out")?) };
        let n = rotation.frequencies().count();
        if !out.is_null() {
            if cap < n {
                return Err(Error::new(Status::BufferTooSmall, format!("{n} frequencies do not fit into {cap}")));
            }
            // SAFETY: not NULL, so there is room for cap numbers by the header's promise, and n of them are enough.
            let out = if n > 0 { unsafe { slice_mut(out, n, "out") }? } else { &mut [] };
            out.iter_mut().zip(rotation.frequencies()).for_each(|(to, x)| *to = x);
        }
        n_out.write(n);
        Ok(())
    })
}

/// Writes the file of the profile that a recipe wants, as its key `profile` names it, NUL-terminated, into `buf` of
/// `buf_size` bytes; an empty text if it wants none. KVQ_STATUS_RECIPE if it needs one and names none.
#[no_mangle]
pub unsafe extern "C" fn kvq_recipe_profile(recipe: *const kvq_recipe, buf: *mut c_char, buf_size: usize) -> Status {
    guard(|| {
        // SAFETY: a live recipe and buf_size bytes, as the header requires.
        let (recipe, buf) = unsafe { (shared(recipe, "recipe")?, slice_mut(buf.cast::<u8>(), buf_size, "buf")?) };
        write_text(recipe.recipe.profile_path()?.unwrap_or_default(), buf)
    })
}

/// Makes the recipe with the profile that it wants, for kvq_layout_new. KVQ_STATUS_RECIPE if it wants none.
///
/// Free the result with kvq_recipe_free; the profile may be freed before it.
#[no_mangle]
pub unsafe extern "C" fn kvq_recipe_with_profile(
    recipe: *const kvq_recipe,
    profile: *const kvq_profile,
    out: *mut *mut kvq_recipe,
) -> Status {
    guard(|| {
        // SAFETY: live objects and room for a pointer, as the header requires.
        let (recipe, profile, out) =
            unsafe { (shared(recipe, "recipe")?, shared(profile, "profile")?, output(out, "out")?) };
        let recipe = recipe.recipe.with_profile(&profile.profile)?;
        out.write(Box::into_raw(Box::new(kvq_recipe { recipe })));
        Ok(())
    })
}

/// Whether kvq_store needs `positions` in its arguments for this layout. False if `layout` is NULL.
#[no_mangle]
pub unsafe extern "C" fn kvq_layout_wants_positions(layout: *const super::layout::kvq_layout) -> bool {
    // SAFETY: layout is NULL or a live layout.
    guard_or(false, || -> Result<bool> { Ok(unsafe { shared(layout, "layout") }?.layout.wants_positions()) })
}
