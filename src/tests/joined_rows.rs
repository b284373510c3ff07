//! A page that was sealed with few rows, since the others had been removed, and then takes in more: what they decode to
//! must not depend on who was there first.
#![forbid(unsafe_code)]

use super::layer::{recipes, Layer};
use super::random::Rng;
use crate::codec::page::Side;
use crate::plan::{Plan, Seal};
use crate::reference::nmse;
use crate::shape::Shape;
use crate::simd::isa::{Isa, IsaToken};

const PAGE: usize = 64;
const N_CELLS: usize = 256;
/// Most normalised error of rows of 2 bits. A row that is cut to the range of another one has 1 or more.
const BOUND: f64 = 0.5;

/// Appends a random row to each of the cells; gives the plan.
fn append(layer: &mut Layer, rng: &mut Rng, rows: &mut [Vec<f32>; 2], cells: &[usize]) -> Vec<i32> {
    let ints = layer.plan_cells(cells, 0);
    let ubatch = layer.ubatch(rng, cells.len());
    let n_heads = layer.layout.shape().n_heads as usize;
    let lse = vec![3.0; cells.len() * n_heads];
    layer.store(&ints, &ubatch, &lse);
    for (rows, new) in rows.iter_mut().zip([&ubatch.k, &ubatch.v]) {
        let dim = new.len() / cells.len();
        for (cell, new) in cells.iter().zip(new.chunks_exact(dim)) {
            rows[cell * dim..][..dim].copy_from_slice(new);
        }
    }
    ints
}

/// The errors of the first `n` rows of page 0, of which the first `n_first` were sealed before the others, and how it was
/// sealed.
fn errors(spec: &str, n_first: usize, n: usize) -> ([f64; 2], Vec<Seal>) {
    let dim = 128;
    let shape = Shape { n_heads: 1, n_kv_heads: 1, head_dim_k: dim, head_dim_v: dim };
    let mut layer = Layer::new(spec, shape, N_CELLS, IsaToken::new(Isa::Scalar).unwrap());
    assert_eq!(layer.planner.n_slots(), PAGE, "{spec}");
    let (mut rng, mut rows) = (Rng::new(5), [(); 2].map(|()| vec![0f32; N_CELLS * dim as usize]));
    let mut seals = Vec::new();
    let mut append = |layer: &mut Layer, cells: &[usize]| {
        let ints = append(layer, &mut rng, &mut rows, cells);
        seals.extend(Plan::new(&ints).unwrap().records().find(|record| record.cell < PAGE).map(|record| record.seal));
    };
    // Few tokens of page 0 are left when more than the slots hold are in the two pages behind it, neither of them full.
    append(&mut layer, &(0..PAGE - 1).collect::<Vec<_>>());
    layer.live()[n_first..PAGE].fill(false);
    append(&mut layer, &(PAGE..2 * PAGE - 1).collect::<Vec<_>>());
    append(&mut layer, &[2 * PAGE]);
    // Its other cells are used again, and their rows become the oldest that are exact.
    append(&mut layer, &(n_first..n).collect::<Vec<_>>());
    append(&mut layer, &(3 * PAGE..4 * PAGE - 1).collect::<Vec<_>>());
    append(&mut layer, &(2 * PAGE + 1..3 * PAGE - 1).collect::<Vec<_>>());
    let location = layer.planner.locate(0).unwrap();
    assert!(location[..n].iter().all(|location| location.in_page()), "{spec}: {:?}", &location[..n]);
    let errors = [Side::Key, Side::Value].map(|side| {
        let found = layer.decoded(side, &location, 0..n);
        let truth: Vec<f64> = rows[side as usize][..found.len()].iter().map(|x| f64::from(*x)).collect();
        nmse(&found, &truth)
    });
    (errors, seals)
}

fn small(spec: &str) -> String {
    format!("{spec}{}page={PAGE},window=0,sinks=0", if spec.contains(':') { "," } else { ":" })
}

#[test]
fn rows_that_join_a_page_of_few_are_not_cut_to_those() {
    let more = ["ott:skip-layers=0,outliers=1,pool=0", "kivi:k=2", "kivi:k=2.25,meta=fp16", "qaq:bits=2,min-bits=1"];
    for spec in recipes(&more) {
        let spec = small(&spec).replace("qaq:", "qaq:attn-window=0,");
        for n_first in [1, 2, 7, 15] {
            let (errors, seals) = errors(&spec, n_first, PAGE - 1);
            assert!(errors.iter().all(|error| *error < BOUND), "{spec}, {n_first} rows first: {errors:?}, {seals:?}");
            assert_eq!(seals, [Seal::Fresh, Seal::Renew], "{spec}, {n_first} rows first");
        }
    }
}

/// A page that was sealed with most of its rows stays as it is for the few that join it.
#[test]
fn few_rows_that_join_many_leave_them_as_they_are() {
    for (spec, n_first) in
        ["kivi:k=2", "skvq:k=2,v=2", "qaq:attn-window=0"].into_iter().flat_map(|spec| [20, 50].map(|n| (spec, n)))
    {
        let (errors, seals) = errors(&small(spec), n_first, PAGE - 1);
        assert!(errors.iter().all(|error| *error < BOUND), "{spec}, {n_first} rows first: {errors:?}");
        assert_eq!(seals, [Seal::Fresh, Seal::Join], "{spec}, {n_first} rows first");
    }
}

/// Rows of the outlier pool are not what a page's parameters are made from, so they do not count among those that were there.
#[test]
fn a_page_of_outlier_tokens_is_made_anew_for_those_that_join() {
    for (n_first, n) in [(1, 2), (6, 7), (7, 12), (12, 20)] {
        let (errors, seals) = errors(&small("ott:k=4,v=8,skip-layers=0,outliers=6,pool=20"), n_first, n);
        assert!(errors.iter().all(|error| *error < BOUND), "{n_first} rows first of {n}: {errors:?}");
        assert_eq!(seals, [Seal::Fresh, Seal::Renew], "{n_first} rows first of {n}");
    }
}
