//! Devices: attention and storing where the memory is a GPU's.

use std::ffi::{c_char, c_void, CStr};

use super::attention::{kvq_attend_args, rotation};
use super::layout::kvq_layout;
use super::shift::kvq_rotation;
use super::store::kvq_store_args;
use super::{check, guard, guard_or, output, release, shared, slice_mut};
use crate::cuda::attend::{self, Size, Workspace};
use crate::cuda::desc::{AttendCall, BlockDesc, RotationDesc, StoreCall, StreamDesc, STORE_EARLY};
use crate::cuda::{dequantize, store, Call, Device};
use crate::error::{Error, Result, Status};
use crate::layout::Layout;

/// A GPU and the kernels for it.
///
/// It never changes after kvq_device_new, so threads may share it. It outlives every call that is enqueued with it.
pub struct kvq_device {
    device: Device,
}

/// Streams of a layer that one call serves, all with the same number of tokens: what its arguments name is the first
/// one's, and here is how far it is from one to the next. Rows, queries, outputs and softmax denominators of the
/// streams follow each other, so that n_tokens more of them belong to the next stream. NULL stands for a single
/// stream.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kvq_streams {
    /// Streams, 1 or more.
    pub n_streams: u32,
    /// Bytes between their key memories, a multiple of 64, and at least what a layer takes.
    pub k_stride: usize,
    /// Bytes between their value memories, alike.
    pub v_stride: usize,
    /// Integers between their plans, at least plan_len.
    pub plan_stride: usize,
    /// Elements between their masks; 0: all have the same. Not read where there is no mask.
    pub mask_stride: usize,
    /// Integers between their positions, at least n_cells. Read by kvq_store_enqueue of layouts that want positions.
    pub positions_stride: usize,
}

/// Opens a device: "cuda:0" is the first that the CUDA driver lists, with its primary context, which the CUDA
/// runtime uses as well. The kernels are loaded into it. Without a driver, or in a library built without CUDA,
/// KVQ_STATUS_UNSUPPORTED; for names of no device KVQ_STATUS_INVALID_ARGUMENT. Free the result with kvq_device_free.
#[no_mangle]
pub unsafe extern "C" fn kvq_device_new(name: *const c_char, out: *mut *mut kvq_device) -> Status {
    guard(|| {
        check(name, "name")?;
        // SAFETY: a text that ends with a zero and room for a pointer, as the header requires.
        let (name, out) = unsafe { (CStr::from_ptr(name), output(out, "out")?) };
        let name = name.to_str().map_err(|_| Error::invalid("name is not UTF-8"))?;
        let device = Device::open(name)?;
        out.write(Box::into_raw(Box::new(kvq_device { device })));
        Ok(())
    })
}

/// Frees a device once everything enqueued with it has finished. NULL is ignored.
#[no_mangle]
pub unsafe extern "C" fn kvq_device_free(device: *mut kvq_device) {
    guard(|| {
        // SAFETY: device is NULL or came from kvq_device_new and is not used again.
        unsafe { release(device) };
        Ok(())
    });
}

/// Bytes of device memory that kvq_attend_enqueue needs as workspace for `n_streams` streams with `n_tokens` query
/// rows each and `n_kv` columns of the mask. Zero it once when it is made (256-byte aligned): every call leaves it
/// ready for the next one, of any layer for which it is large enough. Calls that may run at the same time need a
/// workspace each.
#[no_mangle]
pub unsafe extern "C" fn kvq_attend_workspace(
    layout: *const kvq_layout,
    device: *const kvq_device,
    n_tokens: u32,
    n_streams: u32,
    n_kv: u32,
    bytes: *mut usize,
) -> Status {
    guard(|| {
        // SAFETY: live objects and room for a size, as the header requires.
        let (layout, device, bytes) =
            unsafe { (shared(layout, "layout")?, shared(device, "device")?, output(bytes, "bytes")?) };
        check_streams(n_streams)?;
        let size = Size { n_tokens, n_streams, n_kv };
        bytes.write(attend::workspace_bytes(&device.device, &layout.layout, size)?);
        Ok(())
    })
}

/// Enqueues kvq_attend for the streams of a layer whose memory is on `device`, on a CUDA stream (a cudaStream_t or
/// CUstream; NULL: the default stream). Every pointer in `args` but `rotation` is a device pointer, `plan` included,
/// and `n_splits` is 1: the result is final. With a rotation the kernels that read turned pages are taken, which are
/// slow: leave it NULL until positions have moved. The host reads nothing of them, allocates nothing and does not
/// wait, so the call can be captured in a CUDA graph; `args` itself is read during the call only. The plan is
/// trusted: it must come from kvq_planner_plan.
///
/// What no kernel can do is refused with KVQ_STATUS_UNSUPPORTED before anything is enqueued.
#[no_mangle]
pub unsafe extern "C" fn kvq_attend_enqueue(
    device: *const kvq_device,
    layout: *const kvq_layout,
    args: *const kvq_attend_args,
    streams: *const kvq_streams,
    workspace: *mut c_void,
    workspace_bytes: usize,
    stream: *mut c_void,
) -> Status {
    guard(|| {
        // SAFETY: live objects and arguments that nobody changes during the call, as the header requires.
        let (device, layout, args) =
            unsafe { (shared(device, "device")?, shared(layout, "layout")?, shared(args, "args")?) };
        check_workspace(workspace, "workspace")?;
        let layout = &layout.layout;
        let mut call = attend_call(args)?;
        let profile = profile_of(layout, args.profile)?;
        // SAFETY: both are NULL or live, on the host, as the header requires.
        let (rotation, n_streams) = unsafe {
            (
                describe(args.rotation, layout)?,
                streams_of(streams, "streams", layout, args.plan_len, &mut call.streams)?,
            )
        };
        let call = Call { call, rotation, n_streams, plan_len: args.plan_len, profile };
        let workspace = Workspace { memory: workspace, bytes: workspace_bytes };
        // SAFETY: device memory of the sizes that the header gives.
        unsafe { attend::enqueue(&device.device, layout, call, workspace, stream) }
    })
}

/// Bytes of device memory that kvq_store_enqueue needs as workspace for `n_streams` streams, each with any number of
/// rows up to `n_tokens`. What is in it does not matter, so it cannot be one of kvq_attend_enqueue. Calls that may
/// run at the same time need a workspace each.
#[no_mangle]
pub unsafe extern "C" fn kvq_store_workspace(
    layout: *const kvq_layout,
    device: *const kvq_device,
    n_tokens: u32,
    n_streams: u32,
    bytes: *mut usize,
) -> Status {
    guard(|| {
        // SAFETY: live objects and room for a size, as the header requires.
        let (layout, device, bytes) =
            unsafe { (shared(layout, "layout")?, shared(device, "device")?, output(bytes, "bytes")?) };
        check_streams(n_streams)?;
        bytes.write(store::workspace_bytes(&device.device, &layout.layout, n_tokens, n_streams));
        Ok(())
    })
}

/// Enqueues kvq_store of all heads for a layer whose memory is on `device`; pointers, plan and stream as for
/// kvq_attend_enqueue, after which it is enqueued on the same stream. The bytes are those that kvq_store makes.
#[no_mangle]
pub unsafe extern "C" fn kvq_store_enqueue(
    device: *const kvq_device,
    layout: *const kvq_layout,
    args: *const kvq_store_args,
    streams: *const kvq_streams,
    workspace: *mut c_void,
    workspace_bytes: usize,
    stream: *mut c_void,
) -> Status {
    guard(|| {
        // SAFETY: live objects and arguments that nobody changes during the call, as the header requires.
        let (device, layout, args) =
            unsafe { (shared(device, "device")?, shared(layout, "layout")?, shared(args, "args")?) };
        check_workspace(workspace, "workspace")?;
        let layout = &layout.layout;
        let mut call = store_call(layout, args)?;
        let profile = profile_of(layout, args.profile)?;
        // SAFETY: both are NULL or live, on the host, as the header requires.
        let (rotation, n_streams) = unsafe {
            (
                describe(args.rotation, layout)?,
                streams_of(streams, "streams", layout, args.plan_len, &mut call.streams)?,
            )
        };
        let n_positions = if layout.wants_positions() && n_streams > 1 { layout.n_cells() } else { 0 };
        if call.streams.positions < n_positions as u64 {
            return Err(Error::invalid(format!(
                "positions_stride is {}: a stream has {n_positions}",
                call.streams.positions
            )));
        }
        let call = Call { call, rotation, n_streams, plan_len: args.plan_len, profile };
        let workspace = Workspace { memory: workspace, bytes: workspace_bytes };
        // SAFETY: device memory of the sizes that the header gives.
        unsafe { store::enqueue(&device.device, layout, call, workspace, stream) }
    })
}

/// Bytes of device memory, beside that of the cache, in which kernels find the profile of a layer; 0 for layouts that
/// have none, and if `layout` is NULL.
#[no_mangle]
pub unsafe extern "C" fn kvq_layout_profile_bytes(layout: *const kvq_layout) -> usize {
    // SAFETY: layout is NULL or a live layout.
    guard_or(0, || Ok(unsafe { shared(layout, "layout") }?.layout.profile().len()))
}

/// Writes what such memory is to hold (64-byte aligned, the same for all streams) into `buf` of `buf_size` bytes on the
/// host, at least kvq_layout_profile_bytes; KVQ_STATUS_BUFFER_TOO_SMALL if it does not fit.
#[no_mangle]
pub unsafe extern "C" fn kvq_layout_profile(layout: *const kvq_layout, buf: *mut c_void, buf_size: usize) -> Status {
    guard(|| {
        // SAFETY: a live layout and buf_size bytes, as the header requires.
        let (layout, buf) = unsafe { (shared(layout, "layout")?, slice_mut(buf.cast::<u8>(), buf_size, "buf")?) };
        let profile = layout.layout.profile();
        let Some(buf) = buf.get_mut(..profile.len()) else {
            let text = format!("the profile has {} bytes, the buffer {buf_size}", profile.len());
            return Err(Error::new(Status::BufferTooSmall, text));
        };
        buf.copy_from_slice(&profile);
        Ok(())
    })
}

/// The address of a layer's profile.
fn profile_of(layout: &Layout, profile: *const c_void) -> Result<u64> {
    if !layout.wants_positions() {
        return Ok(0);
    }
    if profile.is_null() {
        return Err(Error::invalid("profile is NULL: on a device this recipe needs what kvq_layout_profile gives"));
    }
    if !(profile as usize).is_multiple_of(64) {
        return Err(Error::invalid("profile is not aligned to 64 bytes"));
    }
    Ok(profile as u64)
}

/// A rotation as kernels get it.
///
/// # Safety
/// `rotation` is NULL or a live rotation.
unsafe fn describe(rotation: *const kvq_rotation, layout: &Layout) -> Result<RotationDesc> {
    // SAFETY: as the caller vouches.
    let Some(rotation) = (unsafe { self::rotation(rotation, "rotation") })? else {
        return Ok(RotationDesc::default());
    };
    rotation.check(layout.shape().head_dim_k as usize)?;
    Ok(rotation.describe())
}

fn check_streams(n_streams: u32) -> Result<()> {
    if n_streams == 0 {
        return Err(Error::invalid("n_streams is 0: a call is for one stream at least"));
    }
    Ok(())
}

/// The number of streams; writes down how far they are from each other.
///
/// # Safety
/// `streams` is NULL or names one that nobody changes meanwhile.
unsafe fn streams_of(
    streams: *const kvq_streams,
    name: &str,
    layout: &Layout,
    plan_len: usize,
    desc: &mut StreamDesc,
) -> Result<u32> {
    if streams.is_null() {
        return Ok(1);
    }
    // SAFETY: as the caller vouches.
    let kvq_streams { n_streams, k_stride, v_stride, plan_stride, mask_stride, positions_stride } =
        *unsafe { shared(streams, name) }?;
    check_streams(n_streams)?;
    let needs = [
        ("k_stride", k_stride, layout.k_bytes(), 64),
        ("v_stride", v_stride, layout.v_bytes(), 64),
        ("plan_stride", plan_stride, plan_len, 1),
    ];
    for (field, stride, least, multiple) in needs {
        if n_streams != 1 && (stride < least || !stride.is_multiple_of(multiple)) {
            return Err(Error::invalid(format!("{field} is {stride}: a stream has {least}, in steps of {multiple}")));
        }
    }
    (desc.k, desc.v) = (k_stride as u64, v_stride as u64);
    (desc.plan, desc.mask) = (plan_stride as u64, mask_stride as u64);
    desc.positions = positions_stride as u64;
    Ok(n_streams)
}

/// What can be seen of the arguments without following a pointer.
fn store_call(layout: &Layout, args: &kvq_store_args) -> Result<StoreCall> {
    check(args.plan, "plan")?;
    check_memory(args.k_mem, args.v_mem)?;
    if args.n_tokens > 0 {
        check(args.k_cur, "k_cur")?;
        check(args.v_cur, "v_cur")?;
    }
    if layout.wants_positions() {
        check(args.positions, "positions")?;
    }
    for (rows, name) in [(args.q, "q"), (args.lse, "lse")] {
        if !rows.is_null() {
            check(rows, name)?;
        }
    }
    Ok(StoreCall {
        k_cur: args.k_cur,
        k_stride_token: args.k_stride_token as u64,
        k_stride_head: args.k_stride_head as u64,
        v_cur: args.v_cur,
        v_stride_token: args.v_stride_token as u64,
        v_stride_head: args.v_stride_head as u64,
        q: args.q,
        q_stride_token: args.q_stride_token as u64,
        q_stride_head: args.q_stride_head as u64,
        lse: args.lse,
        k_mem: args.k_mem,
        v_mem: args.v_mem,
        plan: args.plan,
        positions: if layout.wants_positions() { args.positions } else { std::ptr::null() },
        rows: std::ptr::null_mut(),
        notes: std::ptr::null_mut(),
        note_stride: 0,
        n_pages: 0,
        row_stride: 0,
        phases: match args.after_attend {
            0 => 0,
            1 => STORE_EARLY,
            other => return Err(Error::invalid(format!("after_attend is {other}: use 0 or 1"))),
        },
        n_key_blocks: 1,
        n_value_blocks: 0,
        n_query_blocks: 0,
        scale: args.scale,
        n_tokens: args.n_tokens,
        streams: StreamDesc::default(),
    })
}

fn check_memory(k_mem: *const u8, v_mem: *const u8) -> Result<()> {
    for (memory, name) in [(k_mem, "k_mem"), (v_mem, "v_mem")] {
        check(memory, name)?;
        if !(memory as usize).is_multiple_of(64) {
            return Err(Error::invalid(format!("{name} is not aligned to 64 bytes")));
        }
    }
    Ok(())
}

fn check_workspace(workspace: *mut c_void, name: &str) -> Result<()> {
    check(workspace.cast::<u8>(), name)?;
    if !(workspace as usize).is_multiple_of(256) {
        return Err(Error::invalid(format!("{name} is not aligned to 256 bytes")));
    }
    Ok(())
}

/// Enqueues the decoding of what kvq_attend_enqueue with the same `args` would read, for an attention that knows
/// nothing of pages: rows of cells 0 to n_kv - 1 as FP16, `k_out` [n_streams][n_kv_heads][n_kv][head_dim_k] and
/// `v_out` [n_streams][n_kv_heads][n_kv][head_dim_v] on the device, either of which may be NULL. Cells that no query
/// may see get zeros or some finite row. Of `args`, queries, mask, output and what belongs to them are not looked
/// at. Pays where there are many query rows.
#[no_mangle]
pub unsafe extern "C" fn kvq_dequantize_enqueue(
    device: *const kvq_device,
    layout: *const kvq_layout,
    args: *const kvq_attend_args,
    streams: *const kvq_streams,
    k_out: *mut c_void,
    v_out: *mut c_void,
    stream: *mut c_void,
) -> Status {
    guard(|| {
        // SAFETY: live objects and arguments that nobody changes during the call, as the header requires.
        let (device, layout, args) =
            unsafe { (shared(device, "device")?, shared(layout, "layout")?, shared(args, "args")?) };
        let layout = &layout.layout;
        let mut read = read_call(args)?;
        let profile = profile_of(layout, args.profile)?;
        // SAFETY: both are NULL or live, on the host, as the header requires.
        let (rotation, n_streams) = unsafe {
            (
                describe(args.rotation, layout)?,
                streams_of(streams, "streams", layout, args.plan_len, &mut read.streams)?,
            )
        };
        if k_out.is_null() && v_out.is_null() {
            return Err(Error::invalid("k_out and v_out are both NULL: there is nothing to decode"));
        }
        let read = Call { call: read, rotation, n_streams, plan_len: args.plan_len, profile };
        // SAFETY: device memory of the sizes that the header gives.
        unsafe { dequantize::enqueue(&device.device, layout, read, [k_out.cast(), v_out.cast()], stream) }
    })
}

/// What can be seen of the arguments without following a pointer.
fn attend_call(args: &kvq_attend_args) -> Result<AttendCall> {
    check(args.q, "q")?;
    check(args.out, "out")?;
    if !args.sink_logits.is_null() {
        check(args.sink_logits, "sink_logits")?;
    }
    if args.n_splits != 1 {
        return Err(Error::invalid(format!("n_splits is {}: a device splits by itself, use 1", args.n_splits)));
    }
    if args.mask_is_f16 > 1 {
        return Err(Error::invalid(format!("mask_is_f16 is {}: use 0 or 1", args.mask_is_f16)));
    }
    read_call(args)
}

/// The same for what is read of the cache.
fn read_call(args: &kvq_attend_args) -> Result<AttendCall> {
    check(args.plan, "plan")?;
    check_memory(args.k_mem, args.v_mem)?;
    if args.k_cur.is_null() != args.v_cur.is_null() {
        return Err(Error::invalid("k_cur and v_cur must both be given or both be NULL"));
    }
    for (rows, name) in [(args.k_cur, "k_cur"), (args.v_cur, "v_cur")] {
        if !rows.is_null() {
            check(rows, name)?;
        }
    }
    Ok(AttendCall {
        q: args.q,
        q_stride_token: args.q_stride_token as u64,
        q_stride_head: args.q_stride_head as u64,
        k_cur: args.k_cur,
        k_stride_token: args.k_stride_token as u64,
        k_stride_head: args.k_stride_head as u64,
        v_cur: args.v_cur,
        v_stride_token: args.v_stride_token as u64,
        v_stride_head: args.v_stride_head as u64,
        k_mem: args.k_mem,
        v_mem: args.v_mem,
        plan: args.plan,
        mask: args.mask.cast(),
        mask_stride_token: args.mask_stride_token as u64,
        sink_logits: args.sink_logits,
        out: args.out,
        lse: args.lse,
        tickets: std::ptr::null_mut(),
        partial: std::ptr::null_mut(),
        mask_is_f16: args.mask_is_f16,
        n_kv: args.n_kv,
        scale: args.scale,
        softcap: args.softcap,
        max_bias: args.max_bias,
        n_tokens: args.n_tokens,
        n_splits: 1,
        view: 0,
        block: BlockDesc::default(),
        streams: StreamDesc::default(),
    })
}

#[cfg(all(test, feature = "cuda-emulation"))]
mod tests;
