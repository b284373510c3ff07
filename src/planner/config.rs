//! What a planner must know about the cache, and how many exact slots follow from it.
#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use crate::plan::{CELLS_PER_WORD, MAX_SOURCES};

/// Slot counts are a multiple of this, so that the pages behind the slots keep their alignment.
const SLOT_STEP: usize = 16;

/// Sizes and rules of a [`Planner`](super::Planner).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlannerConfig {
    /// Cells of each stream.
    pub n_cells: usize,
    /// Cells of a page: a positive multiple of 32. The last page of a stream may be cut short.
    pub page: usize,
    /// Number of newest tokens of a stream that stay exact, the current ones included.
    pub window: usize,
    /// Number of first positions of a sequence that stay exact for good.
    pub sink_tokens: usize,
    /// Streams with a cell space of their own.
    pub n_streams: usize,
    /// Sequences that share the stream if there is only one.
    pub n_seq_max: usize,
    /// A full page waits until this many tokens have arrived after its newest one; 0 seals it at once.
    pub seal_lag: usize,
    /// Make the sealed rows of removed tokens unreadable as soon as another page fills up, so that layers can tell which
    /// rows of their own are still needed. Otherwise the mask alone hides them.
    pub frees_early: bool,
}

impl PlannerConfig {
    /// Most sink tokens that a stream keeps exact: each sequence's when all share one stream.
    pub(super) fn max_sinks(&self) -> usize {
        let n_sequences = if self.n_streams == 1 { self.n_seq_max } else { 1 };
        self.sink_tokens.saturating_mul(n_sequences)
    }

    pub(super) fn n_pages(&self) -> usize {
        self.n_cells.div_ceil(self.page)
    }

    pub(super) fn validate(&self) -> Result<()> {
        for (name, value) in [("n_cells", self.n_cells), ("n_streams", self.n_streams), ("n_seq_max", self.n_seq_max)] {
            if value == 0 || value > MAX_SOURCES {
                return Err(Error::invalid(format!("{name} = {value} must be 1 to {MAX_SOURCES}")));
            }
        }
        if self.page == 0 || !self.page.is_multiple_of(CELLS_PER_WORD) {
            return Err(Error::invalid(format!(
                "page = {} must be a positive multiple of {CELLS_PER_WORD}",
                self.page
            )));
        }
        // An ubatch has at most one row per cell.
        if n_slots(self).saturating_add(self.n_cells) > MAX_SOURCES {
            return Err(Error::invalid(format!(
                "{} cells and the exact rows of window = {}, page = {} and {} sink tokens are more than {MAX_SOURCES}",
                self.n_cells,
                self.window,
                self.page,
                self.max_sinks()
            )));
        }
        Ok(())
    }
}

/// Exact slots of one stream: room for the window, for one page that is filling up, and for the sink tokens.
pub fn n_slots(config: &PlannerConfig) -> usize {
    let rows = config.window.saturating_add(config.page).saturating_add(config.max_sinks());
    rows.div_ceil(SLOT_STEP).saturating_mul(SLOT_STEP)
}
