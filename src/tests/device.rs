//! Attention on a device against the scalar path, for every codec, width, head size and way to be asked. Devices are the
//! emulation (feature `cuda-emulation`) and the first GPU (feature `cuda`), where there is one.

use super::device_question::{mask_of, Asked, Given, MaskKind, Question, PLAIN};
use super::layer::{recipes, Layer};
use super::random::Rng;
use crate::cuda::lab::Lab;
use crate::plan::Plan;
use crate::shape::Shape;
use crate::simd::isa::{Isa, IsaToken};

/// Says of a plan that rows of the first pages have moved since they were encoded: by two distances, and some not at all.
fn turn_pages(ints: &mut [i32], layer: &Layer) {
    let plan = Plan::new(ints).unwrap();
    let at = crate::plan::describe(plan.n_tokens(), plan.n_slots(), plan.n_cells(), plan.page());
    let turns = [(0, 17, 0x0f0f_00ff), (0, -40_000, 0xf000_ff00u32 as i32), (1, 3, -1)];
    ints[at.n_turns as usize] = turns.len() as i32;
    for (i, (page, distance, cells)) in turns.into_iter().enumerate() {
        let turn = &mut ints[at.turns as usize + i * at.turn_ints as usize..][..2 + layer.layout.page() / 32];
        turn.fill(cells);
        (turn[0], turn[1]) = (page, distance);
    }
}

/// Feeds a layer ubatches and compares attention at each of them; gives the worst error.
fn compare(lab: &Lab, spec: &str, shape: Shape, n_cells: usize, ubatches: &[usize], asked: Asked) -> f64 {
    let mut layer = Layer::new(spec, shape, n_cells, IsaToken::detect().unwrap());
    let scalar = IsaToken::new(Isa::Scalar).unwrap();
    let scalar = Layer::new(spec, shape, n_cells, scalar).layout;
    let mut rng = Rng::new(spec.len() as u64 + u64::from(shape.n_heads) * 131 + n_cells as u64);
    let (mut at, mut worst, mut workspace) = (0, 0f64, None);
    for (i, &n) in ubatches.iter().enumerate() {
        let plan = layer.plan(at..at + n);
        let mut ints = plan.clone();
        if asked.turned {
            turn_pages(&mut ints, &layer);
        }
        at += n;
        let mut ubatch = layer.ubatch(&mut rng, n);
        if asked.uneven {
            let channels = ubatch.k.iter_mut().enumerate();
            channels.for_each(|(at, x)| *x *= [0.05, 4.0, 1.0][(at % shape.head_dim_k as usize * (i + 3) / 7) % 3]);
        }
        let n_kv = at.next_multiple_of(64).min(n_cells).saturating_sub(asked.short).max(1);
        let mask = mask_of(&mut rng, n, n_kv);
        let half: Vec<u16> = mask.iter().map(|x| half::f16::from_f32(*x).to_bits()).collect();
        let sinks = rng.values(shape.n_heads as usize);
        let given = Given { ints: &ints, ubatch: &ubatch, mask: &mask, half: &half, sinks: &sinks, n_kv };
        let mut check = |question: Question| {
            let what = format!("{}: {spec} {shape:?} {n_cells} cells, ubatch {i} of {ubatches:?}", lab.name());
            let question = [question];
            let got = Question::on(&question, lab, &mut workspace);
            worst = worst.max(question[0].check(&got[0], &what));
        };
        if !asked.stored && n <= 64 {
            check(Question { layer: &layer, scalar: &scalar, given, asked });
        }
        let (_, lse) = Question { layer: &layer, scalar: &scalar, given, asked: Asked { stored: false, ..asked } }
            .on_cpu(&layer.layout);
        layer.store(&plan, &ubatch, &lse);
        if asked.stored && i + 1 == ubatches.len() {
            check(Question { layer: &layer, scalar: &scalar, given, asked });
        }
    }
    worst
}

fn shape(n_kv_heads: u32, gqa: u32, head_dim_k: u32, head_dim_v: u32) -> Shape {
    Shape { n_heads: n_kv_heads * gqa, n_kv_heads, head_dim_k, head_dim_v }
}

/// Enough for sealed pages, a window and rows of the ubatch; the last but one ends inside a page.
const UBATCHES: &[usize] = &[430, 7, 1];

#[test]
fn every_recipe_and_width() {
    let more = ["skvq:k=8,v=8", "skvq:k=4,v=4", "skvq:k=3,v=3", "skvq:k=1.6,v=1.6", "skvq:k=2,v=2", "skvq:group=32"];
    let more = [&more[..], &["skvq:smooth=0", "skvq:mean=0,rotate=0", "skvq:group=64,symmetric=0,mean=0,k=4"]].concat();
    let more = [&more[..], &["kivi:k=2.25", "kivi:k=1", "kivi:k=3.5,meta=fp16", "kivi:k=4,adaptive=0"]].concat();
    let more = [&more[..], &["qaq:bits=3", "qaq:levels=normal", "qaq:outliers=2,symmetric=0,mean=0,smooth=0"]].concat();
    let more = [&more[..], &["qaq:bits=1.5,min-bits=1,levels=normal", "skvq:page=64", "kivi:k=3,page=256"]].concat();
    let more = [&more[..], &["aqua:k=1.5,v=1.6", "aqua:k=4,v=8", "aqua:klt=0", "aqua:bias=0,page=64"]].concat();
    let more = [&more[..], &["aqua:predict=0,page=256"]].concat();
    for lab in Lab::all() {
        for spec in recipes(&more) {
            compare(&lab, &spec, shape(2, 4, 128, 128), 640, UBATCHES, PLAIN);
        }
    }
}

#[test]
fn head_sizes_and_ratios() {
    for lab in Lab::all() {
        for spec in ["skvq:k=2,v=1.6", "on", "qaq", "aqua"] {
            for shape in [
                shape(1, 1, 64, 64),
                shape(2, 7, 64, 96),
                shape(1, 8, 256, 256),
                shape(1, 9, 96, 64),
                shape(1, 2, 160, 224),
            ] {
                if Layer::fits(spec, shape) {
                    compare(&lab, spec, shape, 640, UBATCHES, PLAIN);
                }
            }
        }
    }
}

#[test]
fn fill_levels() {
    for lab in Lab::all() {
        for spec in ["2", "on", "qaq:bits=2.25", "ott", "aqua"] {
            for ubatches in [&[1][..], &[20], &[256, 5], &[600, 16], &[900, 2]] {
                compare(&lab, spec, shape(1, 4, 128, 128), 1000, ubatches, PLAIN);
            }
        }
    }
}

#[test]
fn factors_that_change_from_page_to_page() {
    for lab in Lab::all() {
        for spec in ["skvq:k=2,v=2", "skvq:k=3,v=3", "skvq:k=4,v=4", "skvq:k=2,v=3,page=64"] {
            for mask in [MaskKind::None, MaskKind::F16] {
                let asked = Asked { mask, uneven: true, ..PLAIN };
                compare(&lab, spec, shape(2, 4, 128, 128), 1024, &[300, 300, 200, 2], asked);
            }
        }
    }
}

#[test]
fn ways_to_ask() {
    let f32_mask = Asked { mask: MaskKind::F32, ..PLAIN };
    let ways = [
        Asked { mask: MaskKind::None, ..PLAIN },
        f32_mask,
        Asked { softcap: 5.0, ..PLAIN },
        Asked { max_bias: 8.0, ..f32_mask },
        Asked { sink_logits: true, ..PLAIN },
        Asked { stored: true, ..PLAIN },
        Asked { stored: true, mask: MaskKind::None, sink_logits: true, softcap: 20.0, ..PLAIN },
        Asked { short: 70, ..PLAIN },
        Asked { turned: true, ..PLAIN },
    ];
    for lab in Lab::all() {
        for spec in ["2", "on", "qaq", "ott:sinks=0", "aqua"] {
            for asked in ways {
                compare(&lab, spec, shape(2, 3, 64, 128), 640, UBATCHES, asked);
            }
        }
    }
}

/// Streams that hold different amounts of different rows, and are asked in one call.
#[test]
fn several_streams() {
    const N_CELLS: usize = 640;
    let shape = shape(2, 4, 64, 64);
    for lab in Lab::all() {
        for (spec, n, asked) in [
            ("skvq:k=2,v=2", 1, PLAIN),
            ("on", 2, PLAIN),
            ("qaq", 1, Asked { mask: MaskKind::F32, ..PLAIN }),
            ("kivi", 3, Asked { turned: true, ..PLAIN }),
            ("aqua", 2, PLAIN),
            ("on", 1, Asked { mask: MaskKind::None, ..PLAIN }),
        ] {
            let scalar = Layer::new(spec, shape, N_CELLS, IsaToken::new(Isa::Scalar).unwrap()).layout;
            let mut rng = Rng::new(7);
            let given = [600, 40, 330].map(|held| {
                let mut layer = Layer::new(spec, shape, N_CELLS, IsaToken::detect().unwrap());
                let (ints, ubatch) = (layer.plan(0..held), layer.ubatch(&mut rng, held));
                let (_, lse) = layer.attend(&ints, &ubatch, 1, None);
                layer.store(&ints, &ubatch, &lse);
                let mut ints = layer.plan(held..held + n);
                if asked.turned {
                    turn_pages(&mut ints, &layer);
                }
                let mask = mask_of(&mut rng, n, N_CELLS);
                let half: Vec<u16> = mask.iter().map(|x| half::f16::from_f32(*x).to_bits()).collect();
                let ubatch = layer.ubatch(&mut rng, n);
                (layer, ints, ubatch, mask, half)
            });
            let streams: Vec<_> = given
                .iter()
                .map(|(layer, ints, ubatch, mask, half)| Question {
                    layer,
                    scalar: &scalar,
                    given: Given { ints, ubatch, mask, half, sinks: &[0.0; 8], n_kv: N_CELLS },
                    asked,
                })
                .collect();
            let got = Question::on(&streams, &lab, &mut None);
            for (i, (stream, got)) in streams.iter().zip(&got).enumerate() {
                stream.check(got, &format!("{}: {spec}, stream {i}", lab.name()));
            }
        }
    }
}
