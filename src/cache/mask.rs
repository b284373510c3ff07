//! The causal mask of an open batch, built from positions and sequences.
#![forbid(unsafe_code)]

use super::cells::Cells;
use crate::attention::Mask;

const F16_ZERO: u16 = 0;
const F16_MINUS_INFINITY: u16 = 0xfc00;

/// What distinguishes the masks of one batch: models mix windowed and full layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MaskKind {
    /// Newest keys visible, the current one included; 0: all.
    pub(super) n_swa: u32,
    /// The mask carries distances for the slopes of ALiBi, which float16 would round.
    pub(super) alibi: bool,
}

/// `[n_tokens][n_kv]`.
#[derive(Debug)]
pub(super) enum MaskData {
    F16(Vec<u16>),
    F32(Vec<f32>),
}

impl MaskData {
    /// A token sees the cells of its sequence at positions up to its own, at most `n_swa` of them back.
    pub(super) fn new(kind: MaskKind, cells: &Cells, n_kv: usize, seq_ids: &[u32], positions: &[i32]) -> Self {
        let (cell_pos, cell_seqs) = (&cells.pos()[..n_kv], &cells.seqs()[..n_kv]);
        let n_visible = if kind.n_swa == 0 { i64::MAX } else { i64::from(kind.n_swa) };
        let rows = seq_ids.iter().zip(positions);
        let entries = rows.flat_map(|(&seq, &pos)| {
            cell_pos.iter().zip(cell_seqs).map(move |(&cell_pos, &seqs)| {
                let distance = i64::from(pos) - i64::from(cell_pos);
                (seqs >> seq & 1 == 1 && (0..n_visible).contains(&distance)).then_some(distance)
            })
        });
        if kind.alibi {
            Self::F32(entries.map(|distance| distance.map_or(f32::NEG_INFINITY, |d| -(d as f32))).collect())
        } else {
            Self::F16(entries.map(|distance| distance.map_or(F16_MINUS_INFINITY, |_| F16_ZERO)).collect())
        }
    }

    pub(super) fn as_mask(&self) -> Mask<'_> {
        match self {
            Self::F16(data) => Mask::F16(data),
            Self::F32(data) => Mask::F32(data),
        }
    }
}
