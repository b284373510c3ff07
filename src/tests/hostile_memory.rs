//! Memory of arbitrary bytes, as a damaged or crafted state with the right checksum may bring: every number that comes out
//! is meaningless, but nothing panics, overflows or reads what it should not. Says more in a build with debug assertions
//! and overflow checks, which `cargo test` without `--release` is.
#![forbid(unsafe_code)]

use super::layer::{recipes, Layer};
use super::random::Rng;
use crate::attention::{attend, combine, AttendArgs, Mask};
use crate::codec::page::Side;
use crate::error::Status;
use crate::plan::Plan;
use crate::rotation::Rotation;
use crate::rows::Rows;
use crate::shape::Shape;
use crate::shift::shift_head;
use crate::simd::isa::{Isa, IsaToken};
use crate::store::{dequantize_head, dequantize_values};

#[test]
fn random_bytes_in_every_recipe() {
    let more = [
        "skvq:k=1.6,v=1.6",
        "skvq:group=64,k=8,v=8",
        "skvq:k=4,v=3,symmetric=0",
        "kivi:k=2.25",
        "kivi:meta=fp16,k=3,v=2",
        "ott:k=2.25,page=64,window=9",
        "qaq:bits=2,min-bits=1,page=256",
        "qaq:levels=normal,page=64",
        "qaq:attn-window=64,outliers=2",
    ];
    let n_seeds = if cfg!(debug_assertions) { 1 } else { 2 };
    for spec in recipes(&more) {
        for (head_dim_k, head_dim_v) in [(128, 128), (96, 64), (256, 160)] {
            for token in Isa::ALL.into_iter().filter_map(IsaToken::new) {
                for seed in 1..=n_seeds {
                    let shape = Shape { n_heads: 6, n_kv_heads: 2, head_dim_k, head_dim_v };
                    if Layer::fits(&spec, shape) {
                        use_random_memory(&spec, shape, token, seed);
                    }
                }
            }
        }
    }
}

/// Fills the memory with random bytes and then does with it all that can be done.
fn use_random_memory(spec: &str, shape: Shape, token: IsaToken, seed: u64) {
    let n_cells = 600;
    let mut layer = Layer::new(spec, shape, n_cells, token);
    let mut rng = Rng::new(seed * 7919);
    for byte in layer.memory.iter_mut().flatten() {
        // The largest exponents and the last places of everything are where things go wrong.
        let x = rng.bits();
        *byte = if x & 3 == 0 { 255 } else { (x >> 20) as u8 };
    }
    let mut pos = 0;
    for (i, n) in [400, 100, 1, 20, 1].into_iter().enumerate() {
        let ints = layer.plan(pos..pos + n);
        pos += n;
        // The first plans are not carried out, so that their pages keep the random bytes.
        if i < 2 {
            continue;
        }
        let ubatch = layer.ubatch(&mut rng, n);
        layer.attend(&ints, &ubatch, 3, None);
        let lse = layer.attend(&ints, &ubatch, 1, None).1;
        layer.store(&ints, &ubatch, &lse);
        read_and_rewrite(&mut layer, n_cells);
    }
}

fn read_and_rewrite(layer: &mut Layer, n_cells: usize) {
    let Layer { layout, planner, memory: [keys, values], .. } = layer;
    let location = planner.locate(0).unwrap();
    let shape = layout.shape();
    let mut rows = vec![0f32; n_cells * shape.head_dim_v as usize];
    let region = &values[..layout.head_bytes(Side::Value)];
    let regions = [&keys[..layout.head_bytes(Side::Key)], region];
    dequantize_values(layout, regions, &location, 0..n_cells, &mut rows).unwrap();
    let mut rows = vec![0f32; n_cells * shape.head_dim_k as usize];
    let region = &mut keys[..layout.head_bytes(Side::Key)];
    dequantize_head(layout, Side::Key, region, &location, None, 0..n_cells, &mut rows).unwrap();
    // Of a planner that is thrown away: the rows of the next steps have not moved.
    let moved: Vec<i32> = (0..n_cells).map(|cell| (cell % 7) as i32).collect();
    let shift = planner.clone().shift(0, &moved, &|_| true).unwrap();
    let rotation = Rotation::new(&[0.5; 16], false).unwrap();
    shift_head(layout, region, Some(&mut values[..layout.head_bytes(Side::Value)]), &shift, &rotation).unwrap();
}

/// Sizes that do not agree are refused, whether there is a mask or not.
#[test]
fn too_few_sink_logits_and_no_splits_are_refused() {
    let shape = Shape { n_heads: 2, n_kv_heads: 1, head_dim_k: 64, head_dim_v: 64 };
    let mut layer = Layer::new("skvq", shape, 128, IsaToken::new(Isa::Scalar).unwrap());
    let ints = layer.plan(0..1);
    let ubatch = layer.ubatch(&mut Rng::new(1), 1);
    let rows = |data, heads: usize| Rows { data, stride_token: heads * 64, stride_head: 64 };
    for (mask, sinks) in [(Mask::F32(&[0.0]), 0), (Mask::F32(&[0.0]), 1), (Mask::None, 0), (Mask::None, 1)] {
        let args = AttendArgs {
            rotation: None,
            q: rows(&ubatch.q, 2),
            current: Some((rows(&ubatch.k, 1), rows(&ubatch.v, 1))),
            k_mem: &layer.memory[0],
            v_mem: &layer.memory[1],
            plan: Plan::new(&ints).unwrap(),
            mask,
            mask_stride_token: 1,
            n_kv: 1,
            sink_logits: Some(&[0.0; 2][..sinks]),
            scale: 1.0,
            softcap: 0.0,
            max_bias: 0.0,
            n_tokens: 1,
            n_splits: 1,
            with_lse: false,
        };
        let error = attend(&layer.layout, &args, 0, 1, &mut |_, _| {}).unwrap_err();
        assert_eq!(error.status(), Status::InvalidArgument, "{error}");
    }
    for n_splits in [0, usize::MAX, usize::MAX / 2] {
        let error = combine(&layer.layout, &[], None, n_splits, 3, false, 0, 1, &mut |_, _| {}).unwrap_err();
        assert_eq!(error.status(), Status::InvalidArgument, "{error}");
    }
}
