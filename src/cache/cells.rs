//! Which token is in which cell.
#![forbid(unsafe_code)]

use std::ops::Range;

use crate::error::{Error, Result, Status};

/// Most sequences of one cache: a cell's set of sequences is a 64-bit mask.
pub const MAX_SEQUENCES: usize = 64;

/// Positions and sequences of all cells. A cell without sequences is free.
///
/// A sequence holds a position at most once, and tokens arrive in the order of their positions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Cells {
    pos: Vec<i32>,
    seqs: Vec<u64>,
    /// Largest position of each sequence, -1 for an empty one.
    last: Vec<i32>,
    n_used: usize,
}

/// Half-open range of positions, as callers give it: a negative start is 0, a negative end is no end.
pub(super) fn positions(start: i32, end: i32) -> Range<i32> {
    start.max(0)..if end < 0 { i32::MAX } else { end }
}

impl Cells {
    pub(super) fn new(n_cells: usize, n_seq_max: usize) -> Self {
        Self { pos: vec![0; n_cells], seqs: vec![0; n_cells], last: vec![-1; n_seq_max], n_used: 0 }
    }

    /// Builds the table from saved parts, or fails if they could not have come from one.
    pub(super) fn from_parts(pos: Vec<i32>, seqs: Vec<u64>, n_seq_max: usize) -> Result<Self> {
        let mut cells = Self { pos, seqs, last: vec![-1; n_seq_max], n_used: 0 };
        let allowed = u64::MAX >> (MAX_SEQUENCES - n_seq_max);
        let fail = |text: &str| Err(Error::new(Status::Format, text));
        for (&pos, &seqs) in cells.pos.iter().zip(&cells.seqs) {
            if seqs & !allowed != 0 || !(0..i32::MAX).contains(&pos) || (seqs == 0 && pos != 0) {
                return fail("the saved state holds an impossible cell");
            }
        }
        for seq in 0..n_seq_max {
            if has_duplicates(cells.of_sequence(seq).map(|cell| cells.pos[cell]).collect()) {
                return fail("the saved state holds a position twice in one sequence");
            }
        }
        cells.recount();
        Ok(cells)
    }

    pub(super) fn len(&self) -> usize {
        self.pos.len()
    }

    pub(super) fn n_used(&self) -> usize {
        self.n_used
    }

    /// Cells up to the last used one.
    pub(super) fn n_scanned(&self) -> usize {
        self.seqs.iter().rposition(|&seqs| seqs != 0).map_or(0, |last| last + 1)
    }

    pub(super) fn is_live(&self, cell: usize) -> bool {
        self.seqs[cell] != 0
    }

    pub(super) fn pos(&self) -> &[i32] {
        &self.pos
    }

    pub(super) fn seqs(&self) -> &[u64] {
        &self.seqs
    }

    /// Smallest and largest position of a sequence, `None` if it is empty.
    pub(super) fn range(&self, seq: usize) -> Option<(i32, i32)> {
        let first = self.of_sequence(seq).map(|cell| self.pos[cell]).min()?;
        Some((first, self.last[seq]))
    }

    /// Chooses free cells, lowest first, for tokens that continue their sequences. Changes nothing.
    pub(super) fn find(&self, seq_ids: &[u32], positions: &[i32]) -> Result<Vec<u32>> {
        let mut last = self.last.clone();
        for (index, (&seq, &pos)) in seq_ids.iter().zip(positions).enumerate() {
            self.check_sequence(seq)?;
            let last = &mut last[seq as usize];
            if pos <= *last || pos == i32::MAX {
                return Err(Error::invalid(format!(
                    "token {index}: position {pos} of sequence {seq} must be larger than {last} and smaller than {}",
                    i32::MAX
                )));
            }
            *last = pos;
        }
        let free = (0..self.len()).filter(|&cell| !self.is_live(cell)).map(|cell| cell as u32);
        let cells: Vec<u32> = free.take(positions.len()).collect();
        if cells.len() < positions.len() {
            let (want, have) = (positions.len(), self.len() - self.n_used);
            return Err(Error::new(
                Status::Full,
                format!("{want} tokens do not fit: {have} of {} cells are free", self.len()),
            ));
        }
        Ok(cells)
    }

    /// Puts tokens into cells that `find` chose.
    pub(super) fn place(&mut self, cells: &[u32], seq_ids: &[u32], positions: &[i32]) {
        for ((&cell, &seq), &pos) in cells.iter().zip(seq_ids).zip(positions) {
            self.pos[cell as usize] = pos;
            self.seqs[cell as usize] = 1 << seq;
            self.last[seq as usize] = pos;
        }
        self.n_used += cells.len();
    }

    /// Takes a range of positions out of one sequence, or out of all (`None`).
    pub(super) fn remove(&mut self, seq: Option<usize>, range: &Range<i32>) {
        let gone = seq.map_or(u64::MAX, |seq| 1 << seq);
        for (pos, seqs) in self.pos.iter_mut().zip(&mut self.seqs) {
            if range.contains(pos) {
                *seqs &= !gone;
                if *seqs == 0 {
                    *pos = 0;
                }
            }
        }
        self.recount();
    }

    /// Makes `dst` hold what `src` holds in a range of positions, in the same cells.
    pub(super) fn copy(&mut self, src: usize, dst: usize, range: &Range<i32>) {
        if src == dst {
            return;
        }
        self.remove(Some(dst), range);
        for (pos, seqs) in self.pos.iter().zip(&mut self.seqs) {
            if range.contains(pos) && *seqs >> src & 1 == 1 {
                *seqs |= 1 << dst;
            }
        }
        self.recount();
    }

    /// Removes all sequences but one.
    pub(super) fn keep(&mut self, seq: usize) {
        for (pos, seqs) in self.pos.iter_mut().zip(&mut self.seqs) {
            *seqs &= 1 << seq;
            if *seqs == 0 {
                *pos = 0;
            }
        }
        self.recount();
    }

    /// The cells whose positions `shift` would move. Fails if it must not: a cell is shared with another sequence, a
    /// position would leave the allowed range, or would meet one that stays.
    pub(super) fn shiftable(&self, seq: usize, range: &Range<i32>, delta: i32) -> Result<Vec<usize>> {
        let (moved, stays): (Vec<usize>, Vec<usize>) =
            self.of_sequence(seq).partition(|&cell| range.contains(&self.pos[cell]));
        for &cell in &moved {
            let pos = self.pos[cell];
            if self.seqs[cell] != 1 << seq {
                return Err(Error::invalid(format!(
                    "position {pos} of sequence {seq} is shared with another sequence and cannot be shifted"
                )));
            }
            if !pos.checked_add(delta).is_some_and(|pos| (0..i32::MAX).contains(&pos)) {
                return Err(Error::invalid(format!("position {pos} of sequence {seq} cannot be shifted by {delta}")));
            }
        }
        let moved_to = moved.iter().map(|&cell| self.pos[cell] + delta);
        if has_duplicates(moved_to.chain(stays.iter().map(|&cell| self.pos[cell])).collect()) {
            return Err(Error::invalid(format!(
                "shifting sequence {seq} by {delta} would give two tokens the same position"
            )));
        }
        Ok(moved)
    }

    /// Moves the positions of cells that `shiftable` named.
    pub(super) fn shift(&mut self, cells: &[usize], delta: i32) {
        for &cell in cells {
            self.pos[cell] += delta;
        }
        self.recount();
    }

    pub(super) fn check_sequence(&self, seq: u32) -> Result<()> {
        if (seq as usize) < self.last.len() {
            return Ok(());
        }
        Err(Error::invalid(format!("sequence {seq} does not exist: the cache has {}", self.last.len())))
    }

    fn of_sequence(&self, seq: usize) -> impl Iterator<Item = usize> + '_ {
        (0..self.len()).filter(move |&cell| self.seqs[cell] >> seq & 1 == 1)
    }

    fn recount(&mut self) {
        self.n_used = self.seqs.iter().filter(|&&seqs| seqs != 0).count();
        for seq in 0..self.last.len() {
            self.last[seq] = self.of_sequence(seq).map(|cell| self.pos[cell]).max().unwrap_or(-1);
        }
    }
}

fn has_duplicates(mut positions: Vec<i32>) -> bool {
    positions.sort_unstable();
    positions.windows(2).any(|pair| pair[0] == pair[1])
}
