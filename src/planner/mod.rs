//! The planner decides, for each ubatch and stream, which rows stay exact in slots and which are sealed into pages.
//!
//! It sees cells and positions, never data, so one plan serves all layers. It does no I/O and is deterministic: the
//! same calls give the same plans.
#![forbid(unsafe_code)]

mod config;
mod shift;
mod snapshot;
mod stream;
#[cfg(test)]
mod tests;
mod turns;

pub use config::{n_slots, PlannerConfig};
pub(crate) use config::{sequences_per_stream, UNSEALED_SHARE};
pub(crate) use shift::Recoded;
pub use shift::Shift;

use crate::error::{Error, Result};
use crate::location::Location;
use crate::plan::{PlanSizes, PlanWriter, Record, View, CELLS_PER_WORD};
use stream::StreamState;

/// One row of an ubatch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// The cell the host chose for it.
    pub cell: u32,
    /// Its position in its sequence; the first ones are sink tokens.
    pub pos: i32,
    /// The sequence whose window it is in, below `n_seq_max`: the first one of a token that several share.
    pub seq: u32,
}

/// Keeps track of the rows of all streams and plans their way from ubatch to slot to page.
#[derive(Clone, Debug)]
pub struct Planner {
    config: PlannerConfig,
    n_slots: usize,
    streams: Vec<StreamState>,
    /// Scratch: the records of the plan being made.
    records: Vec<Record>,
    /// Scratch: cells already met, as bits; zero between calls.
    seen: Vec<u32>,
}

impl Planner {
    /// A planner whose streams are empty. Fails if a size is zero, too large, or no multiple it has to be.
    pub fn new(config: PlannerConfig) -> Result<Self> {
        config.validate()?;
        Ok(Self {
            config,
            n_slots: n_slots(&config),
            streams: vec![StreamState::new(config); config.n_streams],
            records: Vec::new(),
            seen: vec![0; config.n_cells.div_ceil(CELLS_PER_WORD)],
        })
    }

    /// What the planner was made with.
    pub fn config(&self) -> &PlannerConfig {
        &self.config
    }

    /// Exact slots of each stream.
    pub fn n_slots(&self) -> usize {
        self.n_slots
    }

    /// Plans one ubatch of a stream, writes the plan to the front of `out` (see [`crate::plan::plan_len`]), and takes
    /// the plan as carried out.
    ///
    /// `is_live` tells whether a cell held a live token just before this ubatch's rows were placed; what the rows' own
    /// cells held counts as dead. An ubatch may be larger than the number of slots, or empty.
    ///
    /// If nothing in the stream is live, it starts anew: the plan is that of an empty planner, and says so
    /// ([`crate::plan::Plan::starts_anew`]).
    ///
    /// Fails, with planner and `out` unchanged, if the stream, a cell or a sequence does not exist, a cell occurs twice, or
    /// `out` is too short.
    pub fn plan(
        &mut self,
        stream: usize,
        rows: &[Row],
        is_live: &dyn Fn(usize) -> bool,
        out: &mut [i32],
    ) -> Result<()> {
        self.check_stream(stream)?;
        self.check_cells(rows.iter().map(|row| row.cell))?;
        let PlannerConfig { n_cells, page, n_seq_max, .. } = self.config;
        if let Some(row) = rows.iter().find(|row| row.seq as usize >= n_seq_max) {
            return Err(Error::invalid(format!("sequence {} does not exist: there are {n_seq_max}", row.seq)));
        }
        let sizes = PlanSizes { stream, n_tokens: rows.len(), n_slots: self.n_slots, n_cells, page };
        let mut plan = PlanWriter::new(out, &sizes)?;
        let state = &mut self.streams[stream];
        let records = &mut self.records;
        records.clear();

        state.drop_dead_rows(rows, is_live);
        if state.is_empty(is_live) {
            state.reset();
            plan.set_starts_anew();
        }
        if self.config.frees_early && rows.iter().any(|row| (row.cell as usize + 1).is_multiple_of(page)) {
            state.drop_dead_sealed(is_live);
        }
        state.write_view(View::Before, &mut plan);
        state.place(rows);
        state.seal_full_pages(is_live, records);
        state.release_aged();
        state.relieve_pressure(is_live, records);
        state.assign_slots(plan.row_slots());
        state.write_view(View::After, &mut plan);
        state.write_turns(&mut plan);

        for (cell, row) in plan.row_cells().iter_mut().zip(rows) {
            *cell = row.cell as i32;
        }
        records.sort_unstable_by_key(|record| record.cell);
        plan.set_records(records);
        Ok(())
    }

    /// Empties a stream.
    pub fn reset(&mut self, stream: usize) -> Result<()> {
        self.check_stream(stream)?;
        self.streams[stream].reset();
        Ok(())
    }

    /// Makes stream `dst` a copy of `src`, for a host that copies the stream's memory alike.
    pub fn copy_stream(&mut self, src: usize, dst: usize) -> Result<()> {
        self.check_stream(src)?;
        self.check_stream(dst)?;
        if let Ok([source, target]) = self.streams.get_disjoint_mut([src, dst]) {
            target.copy_from(source);
        }
        Ok(())
    }

    /// Forgets the tokens of a stream that are no longer live.
    fn drop_dead(&mut self, stream: usize, is_live: &dyn Fn(usize) -> bool) -> Result<()> {
        self.check_stream(stream)?;
        self.streams[stream].drop_dead_rows(&[], is_live);
        self.streams[stream].drop_dead_sealed(is_live);
        Ok(())
    }

    /// Where the row of each cell is after the latest plan.
    pub fn locate(&self, stream: usize) -> Result<Vec<Location>> {
        self.check_stream(stream)?;
        let state = &self.streams[stream];
        Ok((0..self.config.n_cells).map(|cell| state.location(cell)).collect())
    }

    fn check_stream(&self, stream: usize) -> Result<()> {
        if stream < self.config.n_streams {
            return Ok(());
        }
        Err(Error::invalid(format!("stream {stream} does not exist: there are {}", self.config.n_streams)))
    }

    /// Fails unless all cells exist and no two are the same.
    fn check_cells(&mut self, cells: impl Iterator<Item = u32> + Clone) -> Result<()> {
        let mut result = Ok(());
        let mut n_seen = 0;
        for cell in cells.clone() {
            let index = cell as usize;
            if index >= self.config.n_cells {
                result = Err(Error::invalid(format!("cell {cell} does not exist: there are {}", self.config.n_cells)));
                break;
            }
            let (word, bit) = (index / CELLS_PER_WORD, 1 << (index % CELLS_PER_WORD));
            if self.seen[word] & bit != 0 {
                result = Err(Error::invalid(format!("cell {cell} is named twice")));
                break;
            }
            self.seen[word] |= bit;
            n_seen += 1;
        }
        for cell in cells.take(n_seen) {
            self.seen[cell as usize / CELLS_PER_WORD] = 0;
        }
        result
    }
}
