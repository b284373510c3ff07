//! What device code reads of a layer's frames: numbers that the host uploads once.
#![forbid(unsafe_code)]

use super::curves::SLOW;
use super::frame::{Frame, HeadFrame};
use crate::cuda::desc::{FrameDesc, ABSENT, FRAME_DESC_BYTES};

/// Floats in front of the first array.
const FIRST: usize = FRAME_DESC_BYTES.next_multiple_of(ALIGN) / 4;
/// Of arrays, in bytes.
const ALIGN: usize = 64;

/// The arrays behind a [`FrameDesc`].
#[derive(Default)]
struct Arrays {
    floats: Vec<f32>,
}

impl Arrays {
    /// Adds an array and says where it is; an empty one is absent.
    fn add(&mut self, array: impl IntoIterator<Item = f32>) -> u32 {
        let at = self.floats.len();
        self.floats.extend(array);
        if self.floats.len() == at {
            return ABSENT;
        }
        self.floats.resize(self.floats.len().next_multiple_of(ALIGN / 4), 0.0);
        (FIRST + at) as u32
    }
}

impl Frame {
    /// A [`FrameDesc`] and what it names; see [`crate::layout::Layout::profile`].
    pub(super) fn for_device(&self) -> Vec<u8> {
        let (mut arrays, dim, curves) = (Arrays::default(), self.dim_k, &self.curves);
        let of_heads =
            |of: fn(&HeadFrame) -> &Vec<f32>| self.heads.iter().flat_map(move |head| of(head).iter().copied());
        let predictors = self.heads.iter().flat_map(|head| {
            let size = if head.predictor.is_empty() { 0 } else { (dim + 1) * self.dim_v };
            head.predictor[..size].iter().copied()
        });
        // `[coefficient][dim_k]`, the other way round.
        let queries = self
            .heads
            .iter()
            .flat_map(|head| (0..dim).flat_map(move |channel| head.directions[channel..].iter().step_by(dim).copied()));
        let curve_of = (0..self.rotation.frequencies().count())
            .map(|pair| curves.fast.iter().position(|fast| *fast == pair).map_or(ABSENT, |i| i as u32));
        let rotation = self.rotation.describe();
        let desc = FrameDesc {
            rotation,
            bias: arrays.add(of_heads(|head| &head.bias)),
            middle: arrays.add(of_heads(|head| &head.middle)),
            transform: arrays.add(of_heads(|head| &head.transform)),
            directions: arrays.add(of_heads(|head| &head.directions)),
            queries: arrays.add(queries),
            predictor: arrays.add(predictors),
            curve_of: arrays.add(curve_of.map(f32::from_bits)),
            slow_stride: (curves.slow[0].len() / SLOW[0]) as u32,
            slow: curves.slow.each_ref().map(|slow| arrays.add(slow.iter().copied())),
            n_slow: SLOW.map(|n| n as u32),
            curves: curves.rows.each_ref().map(|rows| arrays.add(rows.iter().copied())),
            n_curves: curves.len().map(|n| n as u32),
        };
        let mut bytes = bytes_of(&desc);
        bytes.resize(4 * FIRST, 0);
        bytes.extend(arrays.floats.iter().flat_map(|x| x.to_ne_bytes()));
        bytes
    }
}

/// The struct as it lies in memory.
fn bytes_of(desc: &FrameDesc) -> Vec<u8> {
    let FrameDesc { rotation, bias, middle, transform, directions, queries, predictor, curve_of, .. } = *desc;
    let FrameDesc { slow_stride, slow, n_slow, curves, n_curves, .. } = *desc;
    let single = [bias, middle, transform, directions, queries, predictor, curve_of, slow_stride];
    let numbers = [&[rotation.n_pairs, rotation.interleaved][..], &single, &slow, &n_slow, &curves, &n_curves];
    let pairs = rotation.pairs.as_flattened().iter().flat_map(|x| x.to_ne_bytes());
    let bytes: Vec<u8> = pairs.chain(numbers.concat().iter().flat_map(|x| x.to_ne_bytes())).collect();
    assert_eq!(bytes.len(), FRAME_DESC_BYTES, "all fields, in their order");
    bytes
}
