//! A shift may encode the keys of a page again. Values that they predict must be those that were stored.
#![forbid(unsafe_code)]

use super::layer::Layer;
use super::profile;
use super::random::Rng;
use crate::codec::page::Side;
use crate::reference::nmse;
use crate::rotation::Rotation;
use crate::shape::Shape;
use crate::simd::isa::{Isa, IsaToken};

const DIM: usize = 64;
const PAGE: usize = 64;

#[test]
fn values_stay_when_the_keys_that_predict_them_are_encoded_again() {
    let shape = Shape { n_heads: 1, n_kv_heads: 1, head_dim_k: DIM as u32, head_dim_v: DIM as u32 };
    let mut layer = Layer::new("aqua:page=64,window=0,sinks=0,bias=0", shape, 256, IsaToken::new(Isa::Scalar).unwrap());
    layer.rotation = Some(Rotation::new(&[0.3; 16], false).unwrap());
    let ints = layer.plan(0..2 * PAGE);
    let mut rng = Rng::new(3);
    let mut ubatch = layer.ubatch(&mut rng, 2 * PAGE);
    // What keys of small size predict is the offset.
    let offset = profile::profile(shape, 1).layer(3, shape).unwrap().offset.clone();
    ubatch.k.iter_mut().for_each(|x| *x *= 0.01);
    ubatch.v = (0..2 * PAGE).flat_map(|_| offset.iter().map(|b| b + 0.01 * rng.normal()).collect::<Vec<_>>()).collect();
    layer.store(&ints, &ubatch, &[1.0; 2 * PAGE]);
    let decoded = |layer: &Layer| layer.decoded(Side::Value, &layer.planner.locate(0).unwrap(), 0..PAGE);
    let truth: Vec<f64> = ubatch.v[..PAGE * DIM].iter().map(|x| f64::from(*x)).collect();
    let before = nmse(&decoded(&layer), &truth);
    // More distances than a plan can say.
    layer.shift(|cell| 5 * (cell % 7) as i32);
    assert!(layer.planner.locate(0).unwrap()[..PAGE].iter().all(|location| location.turned == 0), "encoded again");
    let after = nmse(&decoded(&layer), &truth);
    assert!(before < 0.02 && after < 2.0 * before, "before {before}, after {after}");
}
