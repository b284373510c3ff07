//! An outlier pool that names a cell twice, as a crafted state may bring it: it is refused where states are read, so that
//! attention need not look.
#![forbid(unsafe_code)]

use super::layer::Layer;
use super::random::Rng;
use crate::codec::page::Side;
use crate::error::Status;
use crate::head::{Head, HeadMut};
use crate::pool;
use crate::rows::write_half;
use crate::shape::Shape;
use crate::simd::isa::{Isa, IsaToken};

const SPEC: &str = "ott:page=64,window=0,sinks=0,outliers=3,pool=4";

/// A layer with two pages and, if `is_crafted`, a second row for the first member in both pools.
fn layer(token: IsaToken, is_crafted: bool) -> (Layer, Vec<Option<usize>>) {
    let shape = Shape { n_heads: 2, n_kv_heads: 1, head_dim_k: 64, head_dim_v: 64 };
    let mut layer = Layer::new(SPEC, shape, 256, token);
    let ints = layer.plan(0..128);
    let ubatch = layer.ubatch(&mut Rng::new(1), 128);
    layer.store(&ints, &ubatch, &[1.0; 256]);
    let members = members(&layer, Side::Key);
    let first = members.iter().flatten().next().copied();
    let free = members.iter().rposition(Option::is_none).expect("the pool has room");
    for (side, memory) in [Side::Key, Side::Value].into_iter().zip(&mut layer.memory).filter(|_| is_crafted) {
        let mut head = HeadMut::new(&layer.layout, side, memory);
        write_half(head.pool_row_mut(free), &[3.0; 64]);
        pool::set_cell(&mut head, free, first);
    }
    (layer, members)
}

fn members(layer: &Layer, side: Side) -> Vec<Option<usize>> {
    pool::cells(Head::new(&layer.layout, side, &layer.memory[side as usize])).collect()
}

#[test]
fn a_cell_that_is_named_twice_is_refused() {
    let token = IsaToken::new(Isa::Scalar).unwrap();
    for (is_crafted, status) in [(false, None), (true, Some(Status::Format))] {
        let (layer, _) = layer(token, is_crafted);
        for side in [Side::Key, Side::Value] {
            let checked = pool::check(Head::new(&layer.layout, side, &layer.memory[side as usize]));
            assert_eq!(checked.err().map(|error| error.status()), status, "{side:?}");
        }
    }
}

#[test]
fn a_store_removes_the_second_name_of_a_cell() {
    for token in Isa::ALL.into_iter().filter_map(IsaToken::new) {
        let (mut layer, members_before) = layer(token, true);
        assert_ne!(members(&layer, Side::Key), members_before);
        let ints = layer.plan(128..130);
        let ubatch = layer.ubatch(&mut Rng::new(2), 2);
        layer.store(&ints, &ubatch, &[1.0; 4]);
        for side in [Side::Key, Side::Value] {
            assert_eq!(members(&layer, side), members_before, "{side:?}, {}", token.isa().name());
        }
    }
}

#[test]
fn a_cell_that_is_saved_twice_enters_once() {
    let token = IsaToken::new(Isa::Scalar).unwrap();
    let (crafted, members_before) = layer(token, true);
    let mut from: Vec<u32> = members_before.iter().flatten().map(|cell| *cell as u32).collect();
    from.sort_unstable();
    let to: Vec<u32> = from.iter().map(|cell| cell + 128).collect();
    let mut target = Layer::new(SPEC, crafted.layout.shape(), 256, token);
    for (side, memory) in [Side::Key, Side::Value].into_iter().zip(&mut target.memory) {
        let saved = &crafted.memory[side as usize][crafted.layout.pool_range(side)];
        pool::adopt(&mut HeadMut::new(&target.layout, side, memory), saved, &from, &to);
    }
    for side in [Side::Key, Side::Value] {
        let mut found: Vec<usize> = members(&target, side).into_iter().flatten().collect();
        found.sort_unstable();
        assert_eq!(found, to.iter().map(|cell| *cell as usize).collect::<Vec<_>>(), "{side:?}");
    }
}
