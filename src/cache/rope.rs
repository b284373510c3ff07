//! Rotating stored keys when their positions move.
#![forbid(unsafe_code)]

use super::{Cache, STREAM};
use crate::codec::page::Side;
use crate::error::{Error, Result};
use crate::parallel;
use crate::rotation::Rotation;
use crate::shift;

/// How the keys that a cache stores were rotated (RoPE): pair i of the first `n_rot` values is turned by
/// `pos * freq_scale * freq_base^(-2i / n_rot)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rope {
    /// Values that take part, an even number up to the head size.
    pub n_rot: usize,
    /// Base of the frequencies, such as 10000.
    pub freq_base: f32,
    /// Factor on positions; 1 unless positions are interpolated.
    pub freq_scale: f32,
    /// Pairs are neighbours (2i, 2i + 1) instead of halves (i, i + n_rot / 2).
    pub interleaved: bool,
}

impl Rope {
    pub(super) fn validate(&self, head_dim: usize) -> Result<()> {
        if self.n_rot == 0 || !self.n_rot.is_multiple_of(2) || self.n_rot > head_dim {
            return Err(Error::invalid(format!("n_rot = {}: use an even number from 2 to {head_dim}", self.n_rot)));
        }
        for (name, value) in [("freq_base", self.freq_base), ("freq_scale", self.freq_scale)] {
            if !(value.is_finite() && value > 0.0) {
                return Err(Error::invalid(format!("{name} = {value}: use a positive number")));
            }
        }
        Ok(())
    }

    pub(super) fn rotation(&self) -> Result<Rotation> {
        let frequency = |pair: usize| {
            let frequency = f64::from(self.freq_base).powf(-2.0 * pair as f64 / self.n_rot as f64);
            f64::from(self.freq_scale) * frequency
        };
        Rotation::new(&(0..self.n_rot / 2).map(frequency).collect::<Vec<_>>(), self.interleaved)
    }
}

impl Cache {
    /// Turns the stored keys of cells whose positions move by `delta`. Fails, with nothing changed, if one has moved too far.
    pub(super) fn turn_keys(&mut self, moved: &[usize], delta: i32) -> Result<()> {
        let Some(rotation) = &self.rotation else { return Ok(()) };
        let mut distances = vec![0; self.params.n_cells];
        moved.iter().for_each(|&cell| distances[cell] = delta);
        let cells = &self.cells;
        let shift = self.planner.shift(STREAM, &distances, &|cell| cells.is_live(cell))?;
        self.broken = true;
        let regions = self.layers.iter_mut().flat_map(|super::Layer { layout, k, v }| {
            let layout = &*layout;
            let keys = k.bytes_mut().chunks_exact_mut(layout.head_bytes(Side::Key));
            let values = v.bytes_mut().chunks_exact_mut(layout.head_bytes(Side::Value));
            keys.zip(values).map(move |regions| (layout, regions))
        });
        parallel::for_each(super::n_threads(&self.params), regions.collect(), |(layout, (keys, values))| {
            shift::shift_head(layout, keys, Some(values), &shift, rotation)
        })?;
        self.broken = false;
        Ok(())
    }
}
