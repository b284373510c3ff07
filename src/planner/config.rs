//! What a planner must know about the cache, and how many exact slots follow from it.
#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use crate::plan::{CELLS_PER_WORD, MAX_SOURCES};

/// Slot counts are a multiple of this, so that the pages behind the slots keep their alignment.
const SLOT_STEP: usize = 16;
/// The windows of all sequences and a page that is filling up take at most one cell in so many, but always one window.
pub(crate) const UNSEALED_SHARE: usize = 4;
/// More sequences than any host has; a stream keeps a few bytes for each.
const MAX_SEQUENCES: usize = 1 << 16;

/// Sizes and rules of a [`Planner`](super::Planner).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlannerConfig {
    /// Cells of each stream.
    pub n_cells: usize,
    /// Cells of a page: a positive multiple of 32. The last page of a stream may be cut short.
    pub page: usize,
    /// Number of newest tokens of each sequence that stay exact, the current ones included. If the windows of all sequences
    /// do not fit into the slots, all are cut to the same length.
    pub window: usize,
    /// Number of first positions of a sequence that stay exact for good.
    pub sink_tokens: usize,
    /// Streams with a cell space of their own.
    pub n_streams: usize,
    /// Sequences, numbered from 0. They share the stream if there is only one; otherwise each stream has one.
    pub n_seq_max: usize,
    /// A full page waits until this many tokens have arrived after its newest one; 0 seals it at once.
    pub seal_lag: usize,
    /// Make the sealed rows of removed tokens unreadable as soon as another page fills up, so that layers can tell which
    /// rows of their own are still needed. Otherwise the mask alone hides them.
    pub frees_early: bool,
    /// Most rows of a page that its parameters may be made without: outlier tokens, of which the planner knows nothing else.
    pub outliers: usize,
}

impl PlannerConfig {
    /// Most sink tokens that a stream keeps exact: each sequence's when all share one stream.
    pub(super) fn max_sinks(&self) -> usize {
        self.sink_tokens.saturating_mul(sequences_per_stream(self.n_streams, self.n_seq_max))
    }

    /// Rows for the windows of a stream's sequences and for a page that is filling up.
    ///
    /// The rows of a page that is not sealed yet are the newest ones, so most of them are in a window anyway; only what is
    /// longer than a window needs room of its own: a page and the tokens it waits for.
    fn unsealed_rows(&self) -> usize {
        let waiting = self.page.saturating_add(self.seal_lag);
        let one = self.window.max(waiting);
        let others = (sequences_per_stream(self.n_streams, self.n_seq_max) - 1).saturating_mul(self.window);
        one.saturating_add(others).min(one.max(self.n_cells / UNSEALED_SHARE))
    }

    pub(super) fn n_pages(&self) -> usize {
        self.n_cells.div_ceil(self.page)
    }

    pub(super) fn validate(&self) -> Result<()> {
        for (name, value, min, max) in [
            ("n_cells", self.n_cells, 1, MAX_SOURCES),
            ("n_streams", self.n_streams, 1, MAX_SOURCES),
            ("n_seq_max", self.n_seq_max, 1, MAX_SEQUENCES),
            ("page", self.page, 1, MAX_SOURCES),
            ("window", self.window, 0, MAX_SOURCES),
            ("sink_tokens", self.sink_tokens, 0, MAX_SOURCES),
            ("seal_lag", self.seal_lag, 0, MAX_SOURCES),
            ("outliers", self.outliers, 0, MAX_SOURCES),
        ] {
            if value < min || value > max {
                return Err(Error::invalid(format!("{name} = {value} must be {min} to {max}")));
            }
        }
        if !self.page.is_multiple_of(CELLS_PER_WORD) {
            return Err(Error::invalid(format!(
                "page = {} must be a positive multiple of {CELLS_PER_WORD}",
                self.page
            )));
        }
        // An ubatch has at most one row per cell.
        if n_slots(self).saturating_add(self.n_cells) > MAX_SOURCES {
            return Err(Error::invalid(format!(
                "{} cells and their exact rows are more than {MAX_SOURCES}",
                self.n_cells
            )));
        }
        Ok(())
    }
}

/// Sequences that share a stream.
pub(crate) fn sequences_per_stream(n_streams: usize, n_seq_max: usize) -> usize {
    if n_streams == 1 {
        n_seq_max
    } else {
        1
    }
}

/// Exact slots of one stream: room for the windows, for a page that is filling up and for the sink tokens; never more than
/// there are cells.
pub fn n_slots(config: &PlannerConfig) -> usize {
    let rows = config.unsealed_rows().saturating_add(config.max_sinks());
    rows.min(config.n_cells).div_ceil(SLOT_STEP).saturating_mul(SLOT_STEP)
}
