//! Rows that a device decodes, cell by cell, beside the CPU's: the same FP16 numbers.
#![forbid(unsafe_code)]

use half::f16;

use super::device_twin::{denominators, next_cells, spoil, Learns, Twin};
use super::layer::{recipes, Layer, Ubatch};
use super::random::Rng;
use crate::codec::page::Side;
use crate::cuda::lab::Lab;
use crate::location::Location;
use crate::shape::Shape;
use crate::store::{dequantize_head, dequantize_values};

/// What the CPU reads of some cells of one side, `[head][cell][dim]`.
fn decoded(layer: &Layer, side: Side, location: &[Location]) -> Vec<f16> {
    let shape = layer.layout.shape();
    let dim = if side == Side::Key { shape.head_dim_k } else { shape.head_dim_v } as usize;
    let [keys, values] =
        [Side::Key, Side::Value].map(|of| layer.memory[of as usize].chunks_exact(layer.layout.head_bytes(of)));
    let mut rows = vec![0f32; dim * location.len()];
    keys.zip(values)
        .flat_map(|(key, value)| {
            let (layout, rotation, cells) = (&layer.layout, layer.rotation.as_ref(), 0..location.len());
            match side {
                Side::Key => dequantize_head(layout, side, key, location, rotation, cells, &mut rows).unwrap(),
                Side::Value => dequantize_values(layout, [key, value], location, cells, &mut rows).unwrap(),
            }
            rows.iter().map(|x| f16::from_f32(x.clamp(-65504.0, 65504.0))).collect::<Vec<f16>>()
        })
        .collect()
}

/// The first row of a live cell that is not the CPU's; `current`: what a ubatch has for some cells.
fn differs(
    layer: &mut Layer,
    location: &[Location],
    current: Option<(&[usize], &Ubatch)>,
    got: &[Vec<f16>; 2],
) -> Option<String> {
    let shape = layer.layout.shape();
    let (n_heads, n_kv) = (shape.n_kv_heads as usize, location.len());
    let live = layer.live().to_vec();
    for (side, dim) in [(Side::Key, shape.head_dim_k as usize), (Side::Value, shape.head_dim_v as usize)] {
        let mut want = decoded(layer, side, location);
        if let Some((cells, ubatch)) = current {
            let rows = if side == Side::Key { &ubatch.k } else { &ubatch.v };
            for (row, (token, head)) in
                rows.chunks_exact(dim).zip((0..cells.len()).flat_map(|t| (0..n_heads).map(move |h| (t, h))))
            {
                let to = &mut want[(head * n_kv + cells[token]) * dim..][..dim];
                let finite = |x: f32| if x.is_nan() { 0.0 } else { x.clamp(-65504.0, 65504.0) };
                to.iter_mut().zip(row).for_each(|(to, x)| *to = f16::from_f32(finite(*x)));
            }
        }
        let rows = want.chunks_exact(dim).zip(got[side as usize].chunks_exact(dim)).enumerate();
        for (i, (want, got)) in rows {
            let (head, cell) = (i / n_kv, i % n_kv);
            let bits = |row: &[f16]| row.iter().map(|x| x.to_bits()).collect::<Vec<u16>>();
            if live[cell] && bits(want) != bits(got) {
                return Some(format!("{side:?} head {head} cell {cell}: {:?} for {:?}", &got[..4], &want[..4]));
            }
            if !got.iter().all(|x| x.is_finite()) {
                return Some(format!("{side:?} head {head} cell {cell} is not finite"));
            }
        }
    }
    None
}

/// Random appends, removals and perhaps moves of positions; before and after each store all rows are read.
fn walk(lab: &Lab, spec: &str, shape: Shape, steps: usize, moves: bool) {
    let page = Layer::page_of(spec);
    let mut twin = Twin::new(lab, spec, shape, 5 * page + 11);
    if moves {
        twin.rotate(shape.n_heads.is_multiple_of(2));
    }
    let mut rng = Rng::new(spec.len() as u64 * 31 + u64::from(shape.head_dim_k));
    let (mut position, mut n_turned) = (0, 0);
    for step in 0..steps {
        let cells = match step {
            0 => (0..2 * page + 40).collect(),
            1 => (2 * page + 40..3 * page).collect(),
            _ => next_cells(&mut rng, &mut twin.layer, page),
        };
        // Cells that hold no token are free to hold anything.
        let before = twin.layer.planner.locate(0).unwrap();
        n_turned += before.iter().filter(|location| location.turned != 0).count();
        let ints = twin.layer.plan_cells(&cells, position);
        position += cells.len();
        let mut ubatch = twin.layer.ubatch(&mut rng, cells.len());
        spoil(&mut rng, &shape, &mut ubatch, step > 1);
        let got = twin.dequantize(&ints, Some(&ubatch));
        let difference = differs(&mut twin.layer, &before, Some((&cells, &ubatch)), &got);
        assert_eq!(difference, None, "{}: {spec} {shape:?} step {step}, before the store", lab.name());
        let lse = denominators(&mut rng, cells.len() * shape.n_heads as usize);
        assert_eq!(twin.store(&ints, &ubatch, &lse, Learns::Everything), None);
        let after = twin.layer.planner.locate(0).unwrap();
        let got = twin.dequantize(&ints, None);
        let difference = differs(&mut twin.layer, &after, None, &got);
        assert_eq!(difference, None, "{}: {spec} {shape:?} step {step}, after the store", lab.name());
        if moves && step % 3 == 2 {
            twin.shift(&mut rng);
        }
    }
    assert!(!moves || n_turned > page / 2, "{spec}: {n_turned} turned rows tell too little");
}

#[test]
fn rows_are_those_of_the_cpu() {
    for lab in Lab::all() {
        for spec in recipes(&[
            "skvq:k=1.6,v=1.6",
            "skvq:k=8,v=4,group=32",
            "skvq:page=64",
            "ott:sinks=0,window=0",
            "kivi:page=256",
            "aqua:k=1.5,v=1.6,page=64",
            "aqua:klt=0,page=256",
            "aqua:predict=0",
        ]) {
            for shape in [
                Shape { n_heads: 4, n_kv_heads: 2, head_dim_k: 128, head_dim_v: 64 },
                Shape { n_heads: 3, n_kv_heads: 1, head_dim_k: 64, head_dim_v: 96 },
            ] {
                if Layer::fits(&spec, shape) {
                    walk(&lab, &spec, shape, 9, true);
                }
            }
        }
    }
}

/// What dequantize_rows.cuh reads: every kernel and every width at least once.
#[test]
fn rows_that_never_move() {
    for lab in Lab::all() {
        for (spec, head_dim) in [
            ("skvq:k=2,v=2", 128),
            ("skvq:k=3,v=3,page=64", 64),
            ("skvq:k=4,v=4", 64),
            ("ott:k=3,v=3", 128),
            ("kivi:k=2.25,v=2", 64),
            ("kivi:k=2.25,v=4", 128),
        ] {
            let shape = Shape { n_heads: 2, n_kv_heads: 2, head_dim_k: head_dim, head_dim_v: head_dim };
            walk(&lab, spec, shape, 6, false);
        }
    }
}

#[test]
fn what_cannot_be_decoded_is_refused() {
    for lab in Lab::all() {
        let mut twin = Twin::new(&lab, "on", Shape { n_heads: 2, n_kv_heads: 1, head_dim_k: 64, head_dim_v: 64 }, 256);
        let ints = twin.layer.plan(0..3);
        let message = |plan_len: usize| {
            twin.try_dequantize(&ints, plan_len, None, [true, true]).unwrap_err().message().to_owned()
        };
        let n = ints.len();
        let short = format!("a plan of 3 tokens for this layout has {n} integers, plan_len is {}", n - 1);
        assert_eq!(message(n - 1), short);
        assert!(twin.try_dequantize(&ints, n, None, [false, true]).is_ok());
    }
}
