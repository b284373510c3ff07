//! How long calls take on a GPU that does nothing else: `cargo test --release --features cuda times_of -- --ignored --nocapture`.

use std::time::Instant;

use super::device_question::{Asked, Given, MaskKind, Question, PLAIN};
use super::device_twin::{Learns, Twin};
use super::layer::Layer;
use super::random::Rng;
use crate::cuda::attend::Workspace;
use crate::cuda::lab::Lab;
use crate::cuda::store::enqueue;
use crate::plan::Plan;
use crate::shape::Shape;
use crate::simd::isa::{Isa, IsaToken};

const SHAPE: Shape = Shape { n_heads: 32, n_kv_heads: 8, head_dim_k: 128, head_dim_v: 128 };

/// Microseconds of a store: one token that goes to a slot, and pages that are sealed.
#[test]
#[ignore = "a measurement"]
fn times_of_storing() {
    const CALLS: u32 = 200;
    for lab in Lab::all() {
        for spec in ["skvq:k=2,v=2", "kivi:k=2.25,v=2", "on", "ott", "qaq:bits=2.25", "aqua"] {
            let mut twin = Twin::new(&lab, spec, SHAPE, 4096);
            let mut rng = Rng::new(1);
            let mut time = |cells: std::ops::Range<usize>| {
                let ints = twin.layer.plan(cells.clone());
                let ubatch = twin.layer.ubatch(&mut rng, cells.len());
                let lse = vec![1.0; cells.len() * 32];
                let floats = |x: &[f32]| lab.upload(x);
                let (plan, positions) = (lab.upload(&ints), lab.upload(twin.layer.positions()));
                let rows = [floats(&ubatch.q), floats(&ubatch.k), floats(&ubatch.v), floats(&lse), plan, positions];
                let workspace = Workspace { memory: twin.workspace.pointer(), bytes: twin.workspace.bytes() };
                let call = || {
                    let call = twin.call(&rows, &ints, Learns::Everything);
                    // SAFETY: as in `Twin::store`.
                    unsafe {
                        enqueue(lab.device(), &twin.layer.layout, call, workspace, std::ptr::null_mut()).unwrap();
                    }
                };
                call();
                lab.download::<f32>(&rows[3]);
                let start = Instant::now();
                (0..CALLS).for_each(|_| call());
                lab.download::<f32>(&rows[3]);
                let microseconds = start.elapsed().as_secs_f64() * 1e6 / f64::from(CALLS);
                let n_records = Plan::new(&ints).unwrap().records().len();
                (microseconds, n_records)
            };
            let (many, n_many) = time(0..512);
            let (one, n_one) = time(512..513);
            println!(
                "{:10} {spec:18} 512 tokens, {n_many} rows sealed: {many:8.1} us; 1 token, {n_one}: {one:6.1} us",
                lab.name()
            );
        }
    }
}

/// Microseconds of attention of one token over 32 768 cells, of the call alone.
#[test]
#[ignore = "a measurement"]
fn times_of_attention() {
    const CALLS: u32 = 200;
    const N_CELLS: usize = 32_768;
    for lab in Lab::all() {
        for spec in ["skvq:k=2,v=2", "kivi:k=2.25,v=2", "qaq:bits=2.25", "aqua", "aqua:predict=0", "aqua:bias=0"] {
            let mut layer = Layer::new(spec, SHAPE, N_CELLS, IsaToken::detect().unwrap());
            let scalar = Layer::new(spec, SHAPE, N_CELLS, IsaToken::new(Isa::Scalar).unwrap()).layout;
            let mut rng = Rng::new(1);
            for first in (0..N_CELLS - 512).step_by(512) {
                let (ints, ubatch) = (layer.plan(first..first + 512), layer.ubatch(&mut rng, 512));
                layer.store(&ints, &ubatch, &vec![1.0; 512 * SHAPE.n_heads as usize]);
            }
            let (ints, ubatch) = (layer.plan(N_CELLS - 512..N_CELLS - 511), layer.ubatch(&mut rng, 1));
            let given = Given { ints: &ints, ubatch: &ubatch, mask: &[], half: &[], sinks: &[0.0; 32], n_kv: N_CELLS };
            let asked = Asked { mask: MaskKind::None, ..PLAIN };
            let question = [Question { layer: &layer, scalar: &scalar, given, asked }];
            let (got, microseconds) = Question::timed(&question, &lab, &mut None, CALLS);
            question[0].check(&got[0], spec);
            println!("{:10} {spec:18} {microseconds:8.1} us", lab.name());
        }
    }
}
