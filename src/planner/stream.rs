//! One stream's state and the rules that move a token's row from the ubatch to a slot and from there to its page.
//!
//! Between plans each cell is empty, exact (its row is in a slot) or sealed (its row is in its page). An exact row may
//! be encoded as well: its page holds it, the slot overrides it, and leaving the window costs nothing.
#![forbid(unsafe_code)]

use super::config::PlannerConfig;
use super::Row;
use crate::location::{Location, IN_PAGE, IN_SLOT};
use crate::plan::{PlanWriter, Record, Seal, Source, View, CELLS_PER_WORD};

/// Parameters that were made from fewer rows say little of those that join.
const FEW_ROWS: usize = 16;

/// Where the token of a cell is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Held {
    Empty,
    /// In the page.
    Sealed,
    /// In this entry of `StreamState::exact`.
    Exact(u32),
}

/// One exact row.
#[derive(Clone, Copy, Debug)]
pub(super) struct ExactRow {
    pub(super) cell: u32,
    /// The page holds this row too.
    pub(super) encoded: bool,
    /// A sink token: never sealed.
    pub(super) pinned: bool,
    /// Arrival number in the stream.
    pub(super) stamp: u64,
    /// The sequence whose window it is in.
    pub(super) seq: u32,
}

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct PageState {
    /// Exact cells of the page.
    pub(super) n_exact: usize,
    /// Stamp of the latest row placed in the page. That row may have died, but not while the page is all exact.
    pub(super) newest: u64,
    /// Rows that were there when the page's parameters were made, those that have died since included; at least so many where
    /// the page came from outside.
    pub(super) n_fitted: usize,
}

/// The window of a sequence, among its exact rows that are not pinned.
#[derive(Clone, Copy, Debug)]
pub(super) struct Window {
    pub(super) n_rows: usize,
    /// Stamp of its oldest row: what is older has left it.
    pub(super) start: u64,
}

/// The cells, slots and pages of one stream.
#[derive(Clone, Debug)]
pub(super) struct StreamState {
    pub(super) config: PlannerConfig,
    pub(super) n_slots: usize,
    pub(super) held: Vec<Held>,
    /// By source: slots, and while a plan is made the ubatch's rows behind them.
    pub(super) exact: Vec<Option<ExactRow>>,
    /// Sources of the exact rows that are not pinned, oldest first.
    pub(super) order: Vec<u32>,
    /// By sequence: see [`StreamState::set_windows`].
    pub(super) windows: Vec<Window>,
    pub(super) pages: Vec<PageState>,
    /// The sealed cells as page bits.
    pub(super) sealed_bits: Vec<u32>,
    /// For each cell by how much the rows of its page have moved since they were encoded.
    pub(super) turned: Vec<i32>,
    /// The same as a plan has it.
    pub(super) turns: Vec<i32>,
    pub(super) n_pinned: usize,
    pub(super) next_stamp: u64,
}

impl StreamState {
    pub(super) fn new(config: PlannerConfig) -> Self {
        let n_slots = super::n_slots(&config);
        Self {
            config,
            n_slots,
            held: vec![Held::Empty; config.n_cells],
            exact: vec![None; n_slots],
            order: Vec::with_capacity(n_slots),
            windows: vec![Window { n_rows: 0, start: 0 }; config.n_seq_max],
            pages: vec![PageState::default(); config.n_pages()],
            sealed_bits: vec![0; config.n_pages() * (config.page / CELLS_PER_WORD)],
            turned: vec![0; config.n_cells],
            turns: Vec::new(),
            n_pinned: 0,
            next_stamp: 0,
        }
    }

    pub(super) fn reset(&mut self) {
        self.held.fill(Held::Empty);
        self.exact.fill(None);
        self.order.clear();
        self.pages.fill(PageState::default());
        self.sealed_bits.fill(0);
        self.turned.fill(0);
        self.turns.clear();
        self.n_pinned = 0;
        self.next_stamp = 0;
    }

    pub(super) fn copy_from(&mut self, other: &Self) {
        self.held.clone_from(&other.held);
        self.exact.clone_from(&other.exact);
        self.order.clone_from(&other.order);
        self.pages.clone_from(&other.pages);
        self.sealed_bits.clone_from(&other.sealed_bits);
        self.turned.clone_from(&other.turned);
        self.turns.clone_from(&other.turns);
        self.n_pinned = other.n_pinned;
        self.next_stamp = other.next_stamp;
    }

    /// The exact row of a cell, if it has one.
    pub(super) fn exact_row(&self, cell: usize) -> Option<ExactRow> {
        match self.held[cell] {
            Held::Exact(source) => self.exact[source as usize],
            _ => None,
        }
    }

    /// Where the row of a cell is, between plans.
    pub(super) fn location(&self, cell: usize) -> Location {
        match self.held[cell] {
            Held::Empty => Location::default(),
            Held::Sealed => Location { places: IN_PAGE, slot: 0, turned: self.turned[cell] },
            Held::Exact(slot) if self.exact_row(cell).is_some_and(|row| row.encoded) => {
                Location { places: IN_SLOT | IN_PAGE, slot, turned: self.turned[cell] }
            }
            Held::Exact(slot) => Location { places: IN_SLOT, slot, turned: 0 },
        }
    }

    /// Exact rows, pinned ones included.
    pub(super) fn n_exact(&self) -> usize {
        self.order.len() + self.n_pinned
    }

    /// Whether no cell holds a live token. Call after `drop_dead_rows`.
    pub(super) fn is_empty(&self, is_live: &dyn Fn(usize) -> bool) -> bool {
        let mut words = self.sealed_bits.iter().enumerate();
        self.n_exact() == 0
            && words.all(|(word, &bits)| {
                (0..CELLS_PER_WORD).all(|bit| bits >> bit & 1 == 0 || !is_live(word * CELLS_PER_WORD + bit))
            })
    }

    /// Frees the slots of dead tokens and of the cells that `rows` overwrites, and makes the latter unreadable.
    pub(super) fn drop_dead_rows(&mut self, rows: &[Row], is_live: &dyn Fn(usize) -> bool) {
        for slot in 0..self.n_slots {
            if self.exact[slot].is_some_and(|row| !is_live(row.cell as usize)) {
                self.drop_exact(slot);
            }
        }
        for row in rows {
            let cell = row.cell as usize;
            match self.held[cell] {
                Held::Empty => {}
                Held::Sealed => self.unseal(cell),
                Held::Exact(source) => self.drop_exact(source as usize),
            }
        }
        self.order.retain(|&source| self.exact[source as usize].is_some());
    }

    /// Makes dead sealed cells unreadable, so that attention need not scan their pages.
    pub(super) fn drop_dead_sealed(&mut self, is_live: &dyn Fn(usize) -> bool) {
        for cell in 0..self.held.len() {
            if self.held[cell] == Held::Sealed && !is_live(cell) {
                self.unseal(cell);
            }
        }
    }

    /// Takes in the ubatch's rows as sources behind the slots. A position below `sink_tokens` is pinned while there is
    /// sink room; a later change of its position does not matter.
    pub(super) fn place(&mut self, rows: &[Row]) {
        for (index, row) in rows.iter().enumerate() {
            let is_sink = usize::try_from(row.pos).is_ok_and(|pos| pos < self.config.sink_tokens);
            self.exact.push(None);
            self.hold(self.n_slots + index, *row, false, is_sink);
        }
    }

    /// Makes `source` the exact row of an empty cell and the newest of the stream and of its sequence.
    pub(super) fn hold(&mut self, source: usize, row: Row, encoded: bool, is_sink: bool) {
        let Row { cell, seq, .. } = row;
        let pinned = is_sink && self.n_pinned < self.config.max_sinks();
        let stamp = self.next_stamp;
        self.next_stamp += 1;
        self.exact[source] = Some(ExactRow { cell, encoded, pinned, stamp, seq });
        self.held[cell as usize] = Held::Exact(source as u32);
        let page = &mut self.pages[cell as usize / self.config.page];
        page.n_exact += 1;
        page.newest = stamp;
        if pinned {
            self.n_pinned += 1;
        } else {
            self.order.push(source as u32);
        }
    }

    /// Seals each page whose cells are all exact, if some of its rows were never encoded and `seal_lag` tokens have
    /// arrived since its newest one. A page with an empty or a sealed cell waits: it may still fill up, or the rows
    /// that it has already encoded would have to stay as they are.
    pub(super) fn seal_full_pages(&mut self, is_live: &dyn Fn(usize) -> bool, records: &mut Vec<Record>) {
        for index in 0..self.order.len() {
            let Some(row) = self.exact[self.order[index] as usize].filter(|row| !row.encoded) else { continue };
            let page = row.cell as usize / self.config.page;
            let PageState { n_exact, newest, .. } = self.pages[page];
            let age = self.next_stamp - 1 - newest;
            if n_exact == self.page_cells(page).len() && age >= self.config.seal_lag as u64 {
                self.seal_page(page, Seal::Fresh, is_live, records);
            }
        }
    }

    /// Releases the encoded rows that have left their sequence's window: from now on they are read from their page.
    pub(super) fn release_aged(&mut self) {
        self.set_windows(self.config.window);
        self.release_outside_windows();
    }

    /// Makes the exact rows fit into the slots: cuts the windows if they do not all fit, then seals the pages of the oldest
    /// rows outside them, and releases what that allows. Call after `release_aged`. Always succeeds.
    pub(super) fn relieve_pressure(&mut self, is_live: &dyn Fn(usize) -> bool, records: &mut Vec<Record>) {
        if self.n_exact() <= self.n_slots {
            return;
        }
        self.set_windows(self.shared_window());
        self.release_outside_windows();
        let mut excess = self.n_exact().saturating_sub(self.n_slots);
        for index in 0..self.order.len() {
            if excess == 0 {
                break;
            }
            let row = self.exact[self.order[index] as usize].filter(|row| !row.encoded && self.is_aged(row));
            let Some(row) = row else { continue };
            let page = row.cell as usize / self.config.page;
            let first = records.len();
            self.seal_page(page, self.way_to_seal(page, is_live), is_live, records);
            let sealed = records[first..].iter().filter_map(|record| self.exact_row(record.cell));
            excess = excess.saturating_sub(sealed.filter(|row| self.is_aged(row)).count());
        }
        self.release_outside_windows();
    }

    /// The length of all windows that fit into the slots. Windows that must be cut also leave room for a page that is
    /// filling up, which would otherwise be sealed before it is full.
    fn shared_window(&self) -> usize {
        let room = self.n_slots - self.n_pinned;
        let n_rows = |window: usize| self.windows.iter().map(|of| of.n_rows.min(window)).sum::<usize>();
        if n_rows(self.config.window) <= room {
            return self.config.window;
        }
        let room = room - self.config.page.min(room / 2);
        let (mut fits, mut too_long) = (0, self.config.window);
        while too_long - fits > 1 {
            let middle = (fits + too_long) / 2;
            if n_rows(middle) <= room {
                fits = middle;
            } else {
                too_long = middle;
            }
        }
        fits
    }

    /// Moves the ubatch's rows that are still exact to free slots, lowest slot first, and notes the slot of each row.
    pub(super) fn assign_slots(&mut self, row_slots: &mut [i32]) {
        let mut next_slot = 0;
        for (index, row_slot) in row_slots.iter_mut().enumerate() {
            *row_slot = -1;
            let Some(row) = self.exact[self.n_slots + index] else { continue };
            next_slot = self.free_slot(next_slot);
            self.exact[next_slot] = Some(row);
            self.held[row.cell as usize] = Held::Exact(next_slot as u32);
            *row_slot = next_slot as i32;
        }
        for source in &mut self.order {
            if *source as usize >= self.n_slots {
                *source = row_slots[*source as usize - self.n_slots] as u32;
            }
        }
        self.exact.truncate(self.n_slots);
    }

    /// The first free slot from `start` on. The caller knows that there is one.
    pub(super) fn free_slot(&self, start: usize) -> usize {
        start + self.exact[start..].iter().position(Option::is_none).expect("the exact rows fit into the slots")
    }

    /// Writes the slots and page bits of a view.
    pub(super) fn write_view(&self, view: View, plan: &mut PlanWriter) {
        for (cell, row) in plan.slot_cells(view).iter_mut().zip(&self.exact) {
            *cell = row.map_or(-1, |row| row.cell as i32);
        }
        plan.set_page_bits(view, &self.sealed_bits);
    }

    /// Writes how far the rows in pages have moved.
    pub(super) fn write_turns(&self, plan: &mut PlanWriter) {
        plan.set_turns(&self.turns);
    }

    /// Makes an empty cell readable from its page.
    pub(super) fn seal(&mut self, cell: usize) {
        self.held[cell] = Held::Sealed;
        self.sealed_bits[cell / CELLS_PER_WORD] |= 1 << (cell % CELLS_PER_WORD);
    }

    pub(super) fn unseal(&mut self, cell: usize) {
        self.held[cell] = Held::Empty;
        self.sealed_bits[cell / CELLS_PER_WORD] &= !(1 << (cell % CELLS_PER_WORD));
    }

    /// How a page takes in its exact rows: it is made anew if its parameters could be made from twice as many rows as they were
    /// made from, or four times as many if those were not few. So a row is encoded again a few times at most, however many
    /// join one by one, since each time its error grows and its key gets longer. Any row may be an outlier token, which
    /// parameters are not made from.
    fn way_to_seal(&self, page: usize, is_live: &dyn Fn(usize) -> bool) -> Seal {
        let is_kept = |cell: &usize| self.held[*cell] == Held::Sealed && is_live(*cell);
        let n_kept = self.page_cells(page).filter(is_kept).count();
        let is_recorded = |cell: &usize| self.exact_row(*cell).is_some_and(|row| !row.pinned);
        let n_rows = n_kept + self.page_cells(page).filter(is_recorded).count();
        let [n_fitted, n_fit] = [self.pages[page].n_fitted, n_rows].map(|n| n.saturating_sub(self.config.outliers));
        let growth = if n_fitted < FEW_ROWS { 2 } else { 4 };
        if n_kept == 0 {
            Seal::Fresh
        } else if growth * n_fitted <= n_fit {
            Seal::Renew
        } else {
            Seal::Join
        }
    }

    /// Records all exact rows of a page that are not pinned, and marks them encoded. Sealed cells of which a page that is made
    /// anew keeps nothing lose their bytes.
    fn seal_page(&mut self, page: usize, seal: Seal, is_live: &dyn Fn(usize) -> bool, records: &mut Vec<Record>) {
        if seal == Seal::Fresh {
            self.forget_turns(page);
        }
        let (first, mut n_kept) = (records.len(), 0);
        for cell in self.page_cells(page) {
            match self.held[cell] {
                Held::Sealed if seal == Seal::Renew && is_live(cell) => n_kept += 1,
                Held::Sealed if seal != Seal::Join => self.unseal(cell),
                Held::Exact(index) => {
                    let index = index as usize;
                    let Some(row) = self.exact[index].as_mut().filter(|row| !row.pinned) else { continue };
                    row.encoded = true;
                    let source =
                        if index < self.n_slots { Source::Slot(index) } else { Source::Row(index - self.n_slots) };
                    records.push(Record { cell, source, seal });
                }
                _ => {}
            }
        }
        if seal != Seal::Join {
            self.pages[page].n_fitted = records.len() - first + n_kept;
        }
    }

    /// Makes the newest `len` exact rows of each sequence its window.
    fn set_windows(&mut self, len: usize) {
        self.windows.fill(Window { n_rows: 0, start: u64::MAX });
        for &source in self.order.iter().rev() {
            let Some(row) = self.exact[source as usize] else { continue };
            let window = &mut self.windows[row.seq as usize];
            if window.n_rows < len {
                *window = Window { n_rows: window.n_rows + 1, start: row.stamp };
            }
        }
    }

    /// Whether a row has left its sequence's window.
    fn is_aged(&self, row: &ExactRow) -> bool {
        row.stamp < self.windows[row.seq as usize].start
    }

    fn release_outside_windows(&mut self) {
        for index in 0..self.order.len() {
            let source = self.order[index] as usize;
            if self.exact[source].is_some_and(|row| row.encoded && self.is_aged(&row)) {
                self.release(source);
            }
        }
        self.order.retain(|&source| self.exact[source as usize].is_some());
    }

    pub(super) fn page_cells(&self, page: usize) -> std::ops::Range<usize> {
        let first = page * self.config.page;
        first..(first + self.config.page).min(self.config.n_cells)
    }

    fn drop_exact(&mut self, source: usize) {
        let Some(row) = self.exact[source].take() else { return };
        self.held[row.cell as usize] = Held::Empty;
        self.pages[row.cell as usize / self.config.page].n_exact -= 1;
        self.n_pinned -= usize::from(row.pinned);
    }

    fn release(&mut self, source: usize) {
        let Some(row) = self.exact[source] else { return };
        self.drop_exact(source);
        self.seal(row.cell as usize);
    }
}
