//! By how much the rows in pages have moved since they were encoded, and what a shift of positions does to a stream.
//!
//! Each cell has a distance, also while its page does not hold its row: a row that joins the page later is turned back by
//! it, so that it meets the page's parameters as the rows beside it did. A page encoded afresh starts from 0.
#![forbid(unsafe_code)]

use super::stream::{Held, StreamState};
use super::Planner;
use crate::error::{Error, Result};
use crate::plan::{turn_ints, CELLS_PER_WORD, MAX_TURNS};
use crate::planner::{Recoded, Shift};

impl Planner {
    /// Takes note that the positions of a stream's tokens move: that of cell `i` by `moved[i]`. Gives what each layer has to
    /// do; the planner takes it as done. Values of cells that hold no live token do not matter.
    ///
    /// `is_live` as for [`Planner::plan`], asked about cells as they are now.
    ///
    /// Fails, with nothing changed, if the stream does not exist, `moved` has not one value per cell, or a row would have
    /// moved too far for an `i32`.
    pub fn shift(&mut self, stream: usize, moved: &[i32], is_live: &dyn Fn(usize) -> bool) -> Result<Shift> {
        self.check_stream(stream)?;
        if moved.len() != self.config.n_cells {
            return Err(Error::invalid(format!("{} distances for {} cells", moved.len(), self.config.n_cells)));
        }
        self.streams[stream].shift(moved, is_live)
    }
}

impl StreamState {
    fn shift(&mut self, moved: &[i32], is_live: &dyn Fn(usize) -> bool) -> Result<Shift> {
        let rows = self.exact.iter().enumerate().filter_map(|(slot, row)| Some((slot, row.as_ref()?.cell as usize)));
        let slots = rows.filter(|&(_, cell)| moved[cell] != 0 && is_live(cell)).map(|(slot, cell)| (slot, moved[cell]));
        let mut shift = Shift {
            n_slots: self.n_slots,
            page: self.config.page,
            slots: slots.collect(),
            moved: vec![0; moved.len()],
            recoded: Vec::new(),
        };
        let mut turned = self.turned.clone();
        for page in 0..self.pages.len() {
            let cells = self.page_cells(page);
            if moved[cells.clone()].iter().all(|&distance| distance == 0) {
                continue;
            }
            let in_page: Vec<usize> =
                cells.clone().filter(|&cell| self.location(cell).in_page() && is_live(cell)).collect();
            for &cell in &in_page {
                shift.moved[cell] = moved[cell];
                turned[cell] = turned[cell].checked_add(moved[cell]).ok_or_else(|| {
                    Error::invalid(format!("the row of cell {cell} would have moved by more than 2^31 positions"))
                })?;
            }
            let usual = most_frequent(in_page.iter().map(|&cell| turned[cell]));
            if n_distances(in_page.iter().map(|&cell| turned[cell])) > MAX_TURNS {
                let recoded = in_page.iter().map(|&cell| {
                    let slot = self.location(cell).slot();
                    Recoded { cell, slot, turned: turned[cell] }
                });
                shift.recoded.push(recoded.collect());
                turned[cells].fill(0);
            } else {
                // Cells without a live row there follow their neighbours, so that they make no turn of their own.
                let mut rows = in_page.iter().peekable();
                for cell in cells {
                    if rows.next_if(|&&row| row == cell).is_none() {
                        turned[cell] = usual;
                    }
                }
            }
        }
        for rows in &shift.recoded {
            let page = rows[0].cell / self.config.page;
            self.pages[page].n_fitted = rows.len();
            for cell in self.page_cells(page) {
                if self.held[cell] == Held::Sealed && !is_live(cell) {
                    self.unseal(cell);
                }
            }
        }
        self.turned = turned;
        self.find_turns();
        Ok(shift)
    }

    /// A page is encoded afresh, from rows as they are now.
    pub(super) fn forget_turns(&mut self, page: usize) {
        let cells = self.page_cells(page);
        if self.turned[cells.clone()].iter().any(|&distance| distance != 0) {
            self.turned[cells].fill(0);
            self.find_turns();
        }
    }

    /// Sets the distances of cells whose rows were put into their pages from outside. What other cells of these pages had is
    /// forgotten, and they follow the rows given.
    pub(super) fn adopt_turned(&mut self, rows: &[(usize, i32)]) -> Result<()> {
        let mut turned = self.turned.clone();
        for &(cell, distance) in rows.iter().rev() {
            turned[self.page_cells(cell / self.config.page)].fill(distance);
        }
        rows.iter().for_each(|&(cell, distance)| turned[cell] = distance);
        self.take_turned(turned)
    }

    /// Replaces all distances, or fails and changes nothing if a page would have more turns than a plan can say.
    pub(super) fn take_turned(&mut self, turned: Vec<i32>) -> Result<()> {
        let is_possible = |page| n_distances(turned[self.page_cells(page)].iter().copied()) <= MAX_TURNS;
        if !(0..self.pages.len()).all(is_possible) {
            return Err(Error::invalid(format!("rows of a page have moved by more than {MAX_TURNS} distances")));
        }
        self.turned = turned;
        self.find_turns();
        Ok(())
    }

    /// The turns of all pages, as a plan has them.
    fn find_turns(&mut self) {
        self.turns.clear();
        for page in 0..self.pages.len() {
            let cells = self.page_cells(page);
            let first_turn = self.turns.len();
            for (index, &distance) in self.turned[cells].iter().enumerate().filter(|(_, distance)| **distance != 0) {
                let n_ints = turn_ints(self.config.page);
                let known = self.turns[first_turn..].chunks_exact(n_ints).position(|turn| turn[1] == distance);
                let turn = known.map_or(self.turns.len(), |turn| first_turn + turn * n_ints);
                if known.is_none() {
                    self.turns.extend([page as i32, distance]);
                    self.turns.resize(turn + n_ints, 0);
                }
                self.turns[turn + 2 + index / CELLS_PER_WORD] |= 1 << (index % CELLS_PER_WORD);
            }
        }
    }
}

/// Different distances but 0.
fn n_distances(distances: impl Iterator<Item = i32>) -> usize {
    let mut known = Vec::new();
    for distance in distances.filter(|&distance| distance != 0) {
        if !known.contains(&distance) {
            known.push(distance);
        }
    }
    known.len()
}

/// The first of those that occur most often; 0 if there are none.
fn most_frequent(distances: impl Iterator<Item = i32>) -> i32 {
    let mut counts: Vec<(i32, usize)> = Vec::new();
    for distance in distances {
        match counts.iter_mut().find(|(known, _)| *known == distance) {
            Some((_, count)) => *count += 1,
            None => counts.push((distance, 1)),
        }
    }
    counts.iter().rev().max_by_key(|(_, count)| *count).map_or(0, |(distance, _)| *distance)
}
