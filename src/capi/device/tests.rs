//! What functions of devices refuse, and what they write.

use super::*;
use crate::capi::status::kvq_last_error;
use crate::recipe::Recipe;
use crate::shape::Shape;

/// Without what kernels would read, nothing is enqueued.
#[test]
fn layers_with_a_profile_need_it() {
    let device = kvq_device { device: Device::open("emulated:0").unwrap() };
    let shape = Shape { n_heads: 1, n_kv_heads: 1, head_dim_k: 64, head_dim_v: 64 };
    let recipe = crate::tests::profile::parse("aqua", shape);
    let layout = kvq_layout { layout: Layout::new(&recipe, shape, 3, 256, 256).unwrap() };
    let memory = std::ptr::without_provenance_mut::<u8>(256);
    // SAFETY: numbers and pointers, for which zero is a value.
    let (mut attend, mut store): (kvq_attend_args, kvq_store_args) = unsafe { std::mem::zeroed() };
    (attend.q, attend.out, attend.n_tokens, attend.n_splits) = (memory.cast(), memory.cast(), 1, 1);
    (attend.k_mem, attend.v_mem, attend.plan, attend.plan_len) = (memory, memory, memory.cast(), 4096);
    (store.k_mem, store.v_mem, store.plan, store.plan_len) = (memory, memory, memory.cast(), 4096);
    store.positions = memory.cast();
    let said = |status: Status| {
        assert_eq!(status, Status::InvalidArgument);
        // SAFETY: a text that ends with a zero, until the next call.
        unsafe { CStr::from_ptr(kvq_last_error()) }.to_str().unwrap().to_string()
    };
    let none = std::ptr::null_mut::<c_void>();
    for (profile, want) in [(0, "profile is NULL"), (32, "profile is not aligned to 64 bytes")] {
        (attend.profile, store.profile) =
            (std::ptr::without_provenance(profile), std::ptr::without_provenance(profile));
        // SAFETY: live objects; nothing is enqueued, so no pointer is followed.
        let errors = unsafe {
            [
                said(kvq_attend_enqueue(&device, &layout, &attend, none.cast(), memory.cast(), 0, none)),
                said(kvq_store_enqueue(&device, &layout, &store, none.cast(), memory.cast(), 0, none)),
                said(kvq_dequantize_enqueue(&device, &layout, &attend, none.cast(), memory.cast(), none, none)),
            ]
        };
        assert!(errors.iter().all(|error| error.starts_with(want)), "{errors:?}");
    }
    store.positions = std::ptr::null();
    // SAFETY: as above.
    let error = unsafe { said(kvq_store_enqueue(&device, &layout, &store, none.cast(), memory.cast(), 0, none)) };
    assert!(error.contains("positions"), "{error}");
}

#[test]
fn profiles_are_written_whole_or_not_at_all() {
    let shape = Shape { n_heads: 1, n_kv_heads: 1, head_dim_k: 64, head_dim_v: 64 };
    let recipe = crate::tests::profile::parse("aqua", shape);
    let layout = kvq_layout { layout: Layout::new(&recipe, shape, 3, 256, 256).unwrap() };
    // SAFETY: a live layout.
    let n = unsafe { kvq_layout_profile_bytes(&layout) };
    let mut buf = vec![7u8; n + 1];
    // SAFETY: a live layout, and a buffer of at least the size that is given.
    let status = [n - 1, n].map(|size| unsafe { kvq_layout_profile(&layout, buf.as_mut_ptr().cast(), size) });
    assert_eq!(status, [Status::BufferTooSmall, Status::Ok]);
    assert!(buf[..n] == layout.layout.profile() && buf[n] == 7);
    let plain = kvq_layout { layout: Layout::new(&Recipe::parse("on").unwrap(), shape, 3, 256, 256).unwrap() };
    // SAFETY: a live layout.
    assert_eq!(unsafe { kvq_layout_profile_bytes(&plain) }, 0);
}

#[test]
fn streams_that_overlap_are_refused_by_name() {
    let device = kvq_device { device: Device::open("emulated:0").unwrap() };
    let shape = Shape { n_heads: 1, n_kv_heads: 1, head_dim_k: 64, head_dim_v: 64 };
    let layout = kvq_layout { layout: Layout::new(&Recipe::parse("on").unwrap(), shape, 3, 256, 256).unwrap() };
    let (k, v) = (layout.layout.k_bytes(), layout.layout.v_bytes());
    let memory = std::ptr::without_provenance_mut::<u8>(256);
    // SAFETY: numbers and pointers, for which zero is a value.
    let (mut attend, mut store): (kvq_attend_args, kvq_store_args) = unsafe { std::mem::zeroed() };
    (attend.q, attend.out, attend.n_tokens, attend.n_splits) = (memory.cast(), memory.cast(), 1, 1);
    (attend.k_mem, attend.v_mem, attend.plan, attend.plan_len) = (memory, memory, memory.cast(), 4096);
    (store.k_mem, store.v_mem, store.plan, store.plan_len) = (memory, memory, memory.cast(), 4096);
    let good =
        kvq_streams { n_streams: 2, k_stride: k, v_stride: v, plan_stride: 4096, mask_stride: 0, positions_stride: 0 };
    for (streams, want) in [
        (kvq_streams { n_streams: 0, ..good }, "n_streams is 0: a call is for one stream at least".to_string()),
        (kvq_streams { k_stride: k - 64, ..good }, format!("k_stride is {}: a stream has {k}, in steps of 64", k - 64)),
        (kvq_streams { v_stride: v + 4, ..good }, format!("v_stride is {}: a stream has {v}, in steps of 64", v + 4)),
        (kvq_streams { plan_stride: 1, ..good }, "plan_stride is 1: a stream has 4096, in steps of 1".to_string()),
    ] {
        let (space, none) = (memory.cast(), std::ptr::null_mut());
        // SAFETY: live objects; it is refused before any other pointer is followed.
        unsafe {
            for status in [
                kvq_attend_enqueue(&device, &layout, &attend, &streams, space, 1 << 20, none),
                kvq_store_enqueue(&device, &layout, &store, &streams, space, 1 << 20, none),
                kvq_dequantize_enqueue(&device, &layout, &attend, &streams, space, space, none),
            ] {
                assert_eq!(status, Status::InvalidArgument);
                assert_eq!(CStr::from_ptr(kvq_last_error()).to_str().unwrap(), want);
            }
        }
    }
}

#[test]
fn after_attend_is_a_truth_value() {
    let device = kvq_device { device: Device::open("emulated:0").unwrap() };
    let shape = Shape { n_heads: 1, n_kv_heads: 1, head_dim_k: 64, head_dim_v: 64 };
    let layout = kvq_layout { layout: Layout::new(&Recipe::parse("on").unwrap(), shape, 3, 256, 256).unwrap() };
    let (memory, none) = (std::ptr::without_provenance_mut::<u8>(256), std::ptr::null_mut());
    // SAFETY: numbers and pointers, for which zero is a value.
    let mut args: kvq_store_args = unsafe { std::mem::zeroed() };
    (args.k_mem, args.v_mem, args.plan, args.after_attend) = (memory, memory, memory.cast(), 2);
    // SAFETY: live objects; it is refused before any other pointer is followed.
    let (status, said) = unsafe {
        let status = kvq_store_enqueue(&device, &layout, &args, std::ptr::null(), memory.cast(), 1 << 20, none);
        (status, CStr::from_ptr(kvq_last_error()).to_str().unwrap())
    };
    assert_eq!((status, said), (Status::InvalidArgument, "after_attend is 2: use 0 or 1"));
}

#[test]
fn decoding_wants_room_for_one_side_at_least() {
    let device = kvq_device { device: Device::open("emulated:0").unwrap() };
    let shape = Shape { n_heads: 1, n_kv_heads: 1, head_dim_k: 64, head_dim_v: 64 };
    let layout = kvq_layout { layout: Layout::new(&Recipe::parse("on").unwrap(), shape, 3, 256, 256).unwrap() };
    let (memory, none) = (std::ptr::without_provenance_mut::<u8>(64), std::ptr::null_mut());
    // SAFETY: numbers and pointers, for which zero is a value.
    let mut args: kvq_attend_args = unsafe { std::mem::zeroed() };
    (args.k_mem, args.v_mem, args.plan) = (memory, memory, memory.cast());
    // SAFETY: live objects; it is refused before any other pointer is followed.
    let (status, said) = unsafe {
        let status = kvq_dequantize_enqueue(&device, &layout, &args, std::ptr::null(), none, none, none);
        (status, CStr::from_ptr(kvq_last_error()).to_str().unwrap())
    };
    assert_eq!(status, Status::InvalidArgument);
    assert_eq!(said, "k_out and v_out are both NULL: there is nothing to decode");
}
