//! What moving positions means for memory, decided once for all layers.
#![forbid(unsafe_code)]

/// One shift of a stream, alike for all layers and heads. [`super::Planner::shift`] makes it; each layer carries
/// it out once.
#[derive(Clone, Debug)]
pub struct Shift {
    pub(crate) n_slots: usize,
    pub(crate) page: usize,
    /// Exact slots and by how much their rows move.
    pub(crate) slots: Vec<(usize, i32)>,
    /// By how much the page row of each cell moves, so that its exact copy in an outlier pool moves likewise; 0 for cells
    /// whose page does not hold their row.
    pub(crate) moved: Vec<i32>,
    /// The live rows of each page to be encoded again, ascending.
    pub(crate) recoded: Vec<Vec<Recoded>>,
}

/// One row to be encoded again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Recoded {
    pub(crate) cell: usize,
    /// The slot that holds the row as well, moved already.
    pub(crate) slot: Option<usize>,
    /// By how much the page row has moved, this shift included.
    pub(crate) turned: i32,
}
