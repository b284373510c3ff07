//! Rotating stored keys when their positions move.
#![forbid(unsafe_code)]

use std::ops::Range;

use super::{Cache, STREAM};
use crate::codec::Side;
use crate::error::{Error, Result};
use crate::parallel;
use crate::planner::CellState;
use crate::store::{self, ABSENT, IN_PAGE};

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

    /// Cosine and sine of each pair for a move by `delta` positions.
    pub(super) fn angles(&self, delta: i32) -> Vec<(f32, f32)> {
        let angle = |pair: usize| {
            let frequency = f64::from(self.freq_base).powf(-2.0 * pair as f64 / self.n_rot as f64);
            f64::from(delta) * f64::from(self.freq_scale) * frequency
        };
        (0..self.n_rot / 2).map(|pair| (angle(pair).cos() as f32, angle(pair).sin() as f32)).collect()
    }

    /// Turns one key row.
    pub(super) fn rotate(&self, row: &mut [f32], angles: &[(f32, f32)]) {
        for (pair, &(cos, sin)) in angles.iter().enumerate() {
            let (i, j) = if self.interleaved { (2 * pair, 2 * pair + 1) } else { (pair, pair + angles.len()) };
            let (x, y) = (row[i], row[j]);
            (row[i], row[j]) = (x * cos - y * sin, x * sin + y * cos);
        }
    }
}

impl Cache {
    /// Turns the stored keys of cells whose positions move by `delta`.
    pub(super) fn rotate_keys(&mut self, rope: &Rope, moved: &[usize], delta: i32) -> Result<()> {
        let mut location = vec![ABSENT; self.params.n_cells];
        self.planner.locate(STREAM, &mut location)?;
        let mut changed = vec![0; self.params.n_cells];
        moved.iter().for_each(|&cell| changed[cell] = 1);
        let held: Vec<u32> =
            (0..self.params.n_cells as u32).filter(|&cell| location[cell as usize] != ABSENT).collect();
        let mut sealed = vec![false; self.params.n_cells];
        for (&cell, state) in held.iter().zip(self.planner.export(STREAM, &held)?) {
            sealed[cell as usize] = !matches!(state, CellState::Exact { encoded: false, .. });
        }
        let places = split_location(&location, |cell| sealed[cell]);
        let page = self.planner.config().page;
        let pages: Vec<Range<usize>> = (0..self.params.n_cells.div_ceil(page))
            .map(|index| index * page..((index + 1) * page).min(self.params.n_cells))
            .filter(|cells| changed[cells.clone()].contains(&1))
            .collect();
        let angles = rope.angles(delta);
        let dim = self.params.shape.head_dim_k as usize;
        let regions = self.layers.iter_mut().flat_map(|super::Layer { layout, k, .. }| {
            let layout = &*layout;
            k.bytes_mut().chunks_exact_mut(layout.head_bytes(Side::Key)).map(move |region| (layout, region))
        });
        parallel::for_each(super::n_threads(&self.params), regions.collect(), |(layout, region)| {
            let mut rows = vec![0.0; page * dim];
            for cells in &pages {
                let (rows, changed) = (&mut rows[..cells.len() * dim], &changed[cells.clone()]);
                store::dequantize_head(layout, Side::Key, region, &location, cells.start, cells.len(), rows)?;
                for (row, _) in rows.chunks_exact_mut(dim).zip(changed).filter(|(_, &changed)| changed == 1) {
                    rope.rotate(row, &angles);
                }
                for location in &places {
                    store::requantize_k_head(layout, region, location, cells.start, rows, changed)?;
                }
            }
            Ok(())
        })
    }
}

/// Keys have to be replaced wherever they are: in slots, and in pages also behind a slot, for a row that is sealed
/// while in the window is in both. `location` is split into the slots and the pages, of which `is_sealed` names those
/// behind slots. Two calls of [`store::requantize_k_head`] then reach all rows; it makes a new page header if all rows
/// of the page change, so a page must be given whole.
pub(crate) fn split_location(location: &[i32], is_sealed: impl Fn(usize) -> bool) -> [Vec<i32>; 2] {
    // What is no location at all stays, to be refused.
    let slots = location.iter().map(|&at| if at == IN_PAGE { ABSENT } else { at });
    let in_page = |(cell, &at): (usize, &i32)| at == IN_PAGE || (at >= 0 && is_sealed(cell));
    let pages = location.iter().enumerate().map(|cell| if in_page(cell) { IN_PAGE } else { ABSENT });
    [slots.collect(), pages.collect()]
}
