//! Planner state of single cells, for state files.
#![forbid(unsafe_code)]

use super::stream::{ExactRow, Held};
use super::{Planner, Row};
use crate::error::{Error, Result};

/// Where the row of a cell that holds a token is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CellState {
    /// In an exact slot.
    Exact {
        /// The slot. [`Planner::import`] chooses another one.
        slot: usize,
        /// The page holds the row as well, so it leaves the window without being sealed again.
        encoded: bool,
        /// How far the page's row has moved since it was encoded; 0 if the page does not hold it.
        turned: i32,
        /// A sink token: never sealed, hence never encoded.
        pinned: bool,
        /// Arrival number in its stream: larger is newer. [`Planner::import`] keeps the order, not the numbers.
        stamp: u64,
        /// The sequence whose window it is in.
        seq: u32,
    },
    /// In its page.
    Sealed {
        /// How far the row has moved since it was encoded.
        turned: i32,
    },
}

impl Planner {
    /// The state of each of `cells`, in their order. Fails if the stream or a cell does not exist, or if a cell holds
    /// no row.
    pub fn export(&self, stream: usize, cells: &[u32]) -> Result<Vec<CellState>> {
        self.check_stream(stream)?;
        let state = &self.streams[stream];
        let turned = |cell: u32| state.location(cell as usize).turned;
        let export_cell = |&cell: &u32| match state.held.get(cell as usize) {
            Some(Held::Sealed) => Ok(CellState::Sealed { turned: turned(cell) }),
            Some(&Held::Exact(slot)) => {
                let row = state.exact[slot as usize].expect("an exact cell has a row");
                let ExactRow { encoded, pinned, stamp, seq, .. } = row;
                Ok(CellState::Exact { slot: slot as usize, encoded, turned: turned(cell), pinned, stamp, seq })
            }
            Some(Held::Empty) => Err(Error::invalid(format!("cell {cell} holds no row to save"))),
            None => Err(Error::invalid(format!("cell {cell} does not exist: there are {}", self.config.n_cells))),
        };
        cells.iter().map(export_cell).collect()
    }

    /// Takes in rows that were exported, at cells that hold none, as the newest of the stream. Returns for each state
    /// the slot that its row is to be written to, or `None` for a sealed row.
    ///
    /// The caller writes the rows: exact ones to the slots; sealed and encoded ones to their pages, with page headers.
    /// A sink token that finds no sink room left becomes an ordinary row.
    ///
    /// Fails, with nothing changed, if the stream, a cell or a sequence does not exist, a cell occurs twice or is held, a row
    /// is both pinned and encoded, the rows of a page have moved by too many distances, or the exact rows do not fit into the
    /// free slots. Cells of removed tokens count as held
    /// until [`Planner::drop_dead`].
    pub fn import(&mut self, stream: usize, states: &[(u32, CellState)]) -> Result<Vec<Option<usize>>> {
        self.check_stream(stream)?;
        self.check_cells(states.iter().map(|&(cell, _)| cell))?;
        let n_slots = self.n_slots;
        let state = &mut self.streams[stream];
        if let Some((cell, _)) = states.iter().find(|&&(cell, _)| state.held[cell as usize] != Held::Empty) {
            return Err(Error::invalid(format!("cell {cell} already holds a row")));
        }
        let mut by_age = Vec::new();
        for (index, &(cell, saved)) in states.iter().enumerate() {
            if let CellState::Exact { encoded, pinned, stamp, seq, .. } = saved {
                if encoded && pinned {
                    return Err(Error::invalid(format!("cell {cell} is both a sink token and encoded")));
                }
                if seq as usize >= self.config.n_seq_max {
                    return Err(Error::invalid(format!("cell {cell} is of sequence {seq}, which does not exist")));
                }
                by_age.push((stamp, index, Row { cell, pos: 0, seq }, encoded, pinned));
            }
        }
        if by_age.len() > n_slots - state.n_exact() {
            return Err(Error::invalid(format!(
                "{} exact rows do not fit into the {} free slots of stream {stream}",
                by_age.len(),
                n_slots - state.n_exact()
            )));
        }
        let in_pages = states.iter().filter_map(|&(cell, saved)| match saved {
            CellState::Sealed { turned } | CellState::Exact { encoded: true, turned, .. } => {
                Some((cell as usize, turned))
            }
            CellState::Exact { .. } => None,
        });
        let mut in_pages: Vec<(usize, i32)> = in_pages.collect();
        in_pages.sort_unstable();
        state.join_turned(&in_pages)?;
        by_age.sort_unstable_by_key(|&(stamp, index, ..)| (stamp, index));
        let mut slots = vec![None; states.len()];
        let mut next_slot = 0;
        for (_, index, row, encoded, pinned) in by_age {
            next_slot = state.free_slot(next_slot);
            state.hold(next_slot, row, encoded, pinned);
            slots[index] = Some(next_slot);
        }
        for &(cell, saved) in states {
            if matches!(saved, CellState::Sealed { .. }) {
                state.seal(cell as usize);
            }
        }
        Ok(slots)
    }
}
