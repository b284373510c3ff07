//! Calibration: a layer's part of a profile from what it does with a text.

use std::ffi::c_void;

use super::attention::{mask_of, rows};
use super::profile::kvq_profile;
use super::shift::kvq_rotation;
use super::{check_part, exclusive, guard, output, product, release, shared, slice};
use crate::calibrate::{Calibration, Observation};
use crate::error::Status;
use crate::shape::Shape;

/// What has been seen of one layer: as much memory as an f16 cache of all the tokens takes.
pub struct kvq_calibration {
    calibration: Calibration,
}

/// What a layer did with a text, exactly, from its first token on, whose position is 0. All strides count elements.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kvq_calibration_args {
    /// Queries, float [n_tokens][n_heads][head_dim_k].
    pub q: *const f32,
    /// Distance between tokens in `q`.
    pub q_stride_token: usize,
    /// Distance between heads in `q`.
    pub q_stride_head: usize,
    /// Keys, float [n_tokens][n_kv_heads][head_dim_k].
    pub k: *const f32,
    /// Distance between tokens in `k`.
    pub k_stride_token: usize,
    /// Distance between heads in `k`.
    pub k_stride_head: usize,
    /// Values, float [n_tokens][n_kv_heads][head_dim_v].
    pub v: *const f32,
    /// Distance between tokens in `v`.
    pub v_stride_token: usize,
    /// Distance between heads in `v`.
    pub v_stride_head: usize,
    /// What attention made of them, contiguous, float [n_tokens][n_heads][head_dim_v].
    pub out: *const f32,
    /// Natural logarithms of its softmax denominators, float [n_tokens][n_heads].
    pub lse: *const f32,
    /// As in kvq_attend_args, column = token. NULL: every earlier token is visible.
    pub mask: *const c_void,
    /// Distance between tokens in `mask`, at least `n_tokens`.
    pub mask_stride_token: usize,
    /// 0: the mask is float; 1: it is IEEE half.
    pub mask_is_f16: u32,
    /// Factor on the scores.
    pub scale: f32,
    /// Soft cap of the scores; 0: none.
    pub softcap: f32,
    /// Tokens of the text.
    pub n_tokens: u32,
}

/// Makes a calibration of a layer of `shape`, whose keys turn as `rotation` says. Free it with kvq_calibration_free.
#[no_mangle]
pub unsafe extern "C" fn kvq_calibration_new(
    shape: *const Shape,
    rotation: *const kvq_rotation,
    out: *mut *mut kvq_calibration,
) -> Status {
    guard(|| {
        // SAFETY: live objects and room for a pointer, as the header requires.
        let (shape, rotation, out) =
            unsafe { (*shared(shape, "shape")?, &shared(rotation, "rotation")?.rotation, output(out, "out")?) };
        let calibration = Calibration::new(shape, rotation.clone())?;
        out.write(Box::into_raw(Box::new(kvq_calibration { calibration })));
        Ok(())
    })
}

/// Frees a calibration. NULL is ignored.
#[no_mangle]
pub unsafe extern "C" fn kvq_calibration_free(calibration: *mut kvq_calibration) {
    guard(|| {
        // SAFETY: calibration is NULL or came from kvq_calibration_new and is not used again.
        unsafe { release(calibration) };
        Ok(())
    });
}

/// Takes in part `part` of `n_parts` of what the layer did with a text. Parts may run concurrently; texts follow each
/// other.
#[no_mangle]
pub unsafe extern "C" fn kvq_calibration_observe(
    calibration: *const kvq_calibration,
    args: *const kvq_calibration_args,
    part: u32,
    n_parts: u32,
) -> Status {
    guard(|| {
        // SAFETY: live objects that nobody changes during the call, as the header requires.
        let (calibration, args) = unsafe { (&shared(calibration, "calibration")?.calibration, shared(args, "args")?) };
        check_part(part, n_parts)?;
        let Shape { n_heads, n_kv_heads, head_dim_k, head_dim_v } = calibration.shape();
        let [heads, kv_heads, k, v, n] =
            [n_heads, n_kv_heads, head_dim_k, head_dim_v, args.n_tokens].map(|n| n as usize);
        // SAFETY: the arrays in args have the sizes that its comments give, as the header requires.
        let seen = unsafe {
            Observation {
                q: rows(args.q, [n, heads, k], args.q_stride_token, args.q_stride_head, "q")?,
                k: rows(args.k, [n, kv_heads, k], args.k_stride_token, args.k_stride_head, "k")?,
                v: rows(args.v, [n, kv_heads, v], args.v_stride_token, args.v_stride_head, "v")?,
                out: rows(args.out, [n, heads, v], heads * v, v, "out")?,
                lse: slice(args.lse, product(&[n, heads], "lse")?, "lse")?,
                mask: mask_of(args.mask, args.mask_is_f16, [n, args.mask_stride_token, n])?,
                mask_stride_token: args.mask_stride_token,
                scale: args.scale,
                softcap: args.softcap,
                n_tokens: n,
            }
        };
        calibration.observe(&seen, part as usize, n_parts as usize)
    })
}

/// Works out the layer's profile on at most `n_threads` threads and sets it as layer `layer` of `profile`. The same
/// observations give the same numbers. KVQ_STATUS_INVALID_ARGUMENT if too little has been seen.
#[no_mangle]
pub unsafe extern "C" fn kvq_calibration_solve(
    calibration: *const kvq_calibration,
    n_threads: u32,
    layer: u32,
    profile: *mut kvq_profile,
) -> Status {
    guard(|| {
        // SAFETY: live objects, the second of which nobody else uses, as the header requires.
        let (calibration, profile) =
            unsafe { (&shared(calibration, "calibration")?.calibration, exclusive(profile, "profile")?) };
        profile.profile.set(layer as usize, calibration.solve(n_threads as usize)?)
    })
}
