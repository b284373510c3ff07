//! Where the row of a cell is: one definition for the planner, which knows it, for whoever reads or turns rows, and for C.
#![forbid(unsafe_code)]

/// Of a kvq_location: no place holds the cell's row.
pub const NOWHERE: u32 = 0;
/// Of a kvq_location: an exact slot holds the row.
pub const IN_SLOT: u32 = 1;
/// Of a kvq_location: the cell's page holds the row. Heads whose outlier pool has the cell keep the exact row there as
/// well; which ones do, the layer's memory says.
pub const IN_PAGE: u32 = 2;

/// Where the row of a cell is. A row in both places is read from its slot, and from its page once it leaves the slot.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Location {
    /// KVQ_NOWHERE, KVQ_IN_SLOT, KVQ_IN_PAGE, or KVQ_IN_SLOT | KVQ_IN_PAGE.
    pub places: u32,
    /// The exact slot if KVQ_IN_SLOT is set, otherwise 0.
    pub slot: u32,
    /// By how many positions the row in the page has moved since it was encoded: its key is to be turned by that. Slots
    /// and pools hold rows that are turned already.
    pub turned: i32,
}

impl Location {
    /// The exact slot, if one holds the row.
    pub fn slot(&self) -> Option<usize> {
        (self.places & IN_SLOT != 0).then_some(self.slot as usize)
    }

    /// Whether the page holds the row, be it behind a slot.
    pub fn in_page(&self) -> bool {
        self.places & IN_PAGE != 0
    }

    /// Whether there is a row.
    pub fn is_held(&self) -> bool {
        self.places != NOWHERE
    }

    /// Whether the planner could have said this of a stream with `n_slots` slots.
    pub fn is_possible(&self, n_slots: usize) -> bool {
        self.places <= IN_SLOT | IN_PAGE && self.slot().is_none_or(|slot| slot < n_slots)
    }
}
