//! A plan: what the devices do with one ubatch of one stream, as plain int32 data. The planner writes plans; the
//! attention and the store read them. Nothing else knows where an entry lies.
#![forbid(unsafe_code)]

use std::ops::Range;

use crate::cuda::desc::{PlanDesc, RECORD_FRESH as FRESH, RECORD_RENEW as RENEW};
use crate::error::{Error, Result};

/// Version of the layout described on [`Plan`]; the first int of every plan.
pub const PLAN_VERSION: i32 = 3;
/// Ints before the first array.
pub const HEADER_INTS: usize = 16;
/// Cells whose page bits share one int. A page is a multiple of this.
pub const CELLS_PER_WORD: usize = 32;

/// Sources (slots and ubatch rows together) stay below the flags.
pub(crate) const MAX_SOURCES: usize = RENEW as usize;
/// Most different distances (but 0) by which the rows of one page may have moved.
pub const MAX_TURNS: usize = 4;
/// Ints of the header that are zero.
const RESERVED: [Range<usize>; 2] = [9..10, 11..STARTS_ANEW];
/// Int of the header that holds the number of records.
const N_RECORDS: usize = 6;
/// Ints of the header that hold [`Plan::n_pages`] of both views.
const N_PAGES: usize = 7;
/// Int of the header that holds [`Plan::n_turns`].
const N_TURNS: usize = 10;
/// Int of the header that holds [`Plan::starts_anew`].
const STARTS_ANEW: usize = HEADER_INTS - 1;

/// Which moment of an ubatch a list describes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum View {
    /// While attention runs: the ubatch's own rows are readable nowhere but in the graph's `k_cur` and `v_cur`.
    Before,
    /// After the store: what a layer sees that shares another layer's cache, and what the next ubatch starts from.
    After,
}

/// Where a seal record takes its row from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// An exact slot, as it is before this plan's rows are written to slots.
    Slot(usize),
    /// A row of the ubatch.
    Row(usize),
}

/// What becomes of a page that rows are encoded into, and of its other rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seal {
    /// They are dead: the page is made anew from the records.
    Fresh,
    /// They keep their bytes, and the records are encoded with the parameters that the page has.
    Join,
    /// The page is made anew from the records and from what those of the other rows decode to that can be read after
    /// the store ([`Plan::page_bits`]).
    Renew,
}

/// One row to encode into its page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// The cell, which names page and row.
    pub cell: usize,
    /// Where the exact row is.
    pub source: Source,
    /// What becomes of its page. All records of a page agree.
    pub seal: Seal,
}

/// Rows of a page that have moved by the same distance since they were encoded: their keys are to be turned by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turn<'a> {
    /// The page.
    pub page: usize,
    /// The distance, not 0.
    pub distance: i32,
    /// Bit `i % 32` of word `i / 32` for the page's `i`-th cell.
    pub cells: &'a [i32],
}

/// Reader of one plan.
///
/// Layout, in int32 (P = cells per page, `n_words` = ceil(`n_cells` / P) * P / 32):
///
/// | ints | content |
/// |---|---|
/// | 16 | header, see below |
/// | `n_slots` | before: the cell whose exact row is in this slot, or -1 |
/// | `n_slots` | after: the same |
/// | `n_tokens` | the cell of each ubatch row |
/// | `n_tokens` | the slot to which the store writes each ubatch row, or -1 |
/// | `n_words` | before: bit `cell % 32` of word `cell / 32` is 1 if the cell is to be read from its page |
/// | `n_words` | after: the same |
/// | 2 * (`n_slots` + `n_tokens`) | records {cell, source}, sorted by cell, `n_records` of them in use, zeros behind |
/// | 4 * `n_pages` * (2 + P / 32) | turns {page, distance, P / 32 words of cells}, sorted by page, `n_turns` of them in use, zeros behind |
///
/// Header: 0 version, 1 stream, 2 `n_tokens`, 3 `n_slots`, 4 `n_cells`, 5 P, 6 `n_records`, 7 pages to scan before,
/// 8 pages to scan after, 9 zero, 10 `n_turns`, 11 to 14 zero, 15: 1 if the stream starts anew ([`Plan::starts_anew`]),
/// else 0.
///
/// Turns hold for both views and for the rows that records name: a row that joins a page that has moved is turned back
/// before it is encoded. A cell without a turn has not moved.
///
/// A source below `n_slots` is a slot, otherwise `n_slots` + ubatch row; bit 30 is [`Seal::Fresh`], bit 29 [`Seal::Renew`].
/// Pages to scan: 1 + the last page with a bit, 0 without any. A page bit may belong to a cell that no longer holds a live
/// token: the attention mask hides it.
#[derive(Clone, Copy, Debug)]
pub struct Plan<'a> {
    ints: &'a [i32],
    stream: usize,
    n_cells: usize,
    n_records: usize,
    n_turns: usize,
    n_pages: [usize; 2],
    starts_anew: bool,
    extent: Extent,
}

/// The sizes that decide where each array of a plan lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Extent {
    n_tokens: usize,
    n_slots: usize,
    page: usize,
    n_words: usize,
}

impl Extent {
    fn new(n_tokens: usize, n_slots: usize, n_cells: usize, page: usize) -> Self {
        Self { n_tokens, n_slots, page, n_words: n_cells.div_ceil(page).saturating_mul(page / CELLS_PER_WORD) }
    }

    fn slot_cells(&self, view: View) -> Range<usize> {
        range(HEADER_INTS + view as usize * self.n_slots, self.n_slots)
    }

    fn row_cells(&self) -> Range<usize> {
        range(self.slot_cells(View::After).end, self.n_tokens)
    }

    fn row_slots(&self) -> Range<usize> {
        range(self.row_cells().end, self.n_tokens)
    }

    fn page_bits(&self, view: View) -> Range<usize> {
        range(self.row_slots().end + view as usize * self.n_words, self.n_words)
    }

    fn records(&self) -> Range<usize> {
        range(self.page_bits(View::After).end, 2 * self.max_records())
    }

    fn max_records(&self) -> usize {
        self.n_slots + self.n_tokens
    }

    fn turns(&self) -> Range<usize> {
        range(self.records().end, self.max_turns() * turn_ints(self.page))
    }

    fn max_turns(&self) -> usize {
        MAX_TURNS * (self.n_words / (self.page / CELLS_PER_WORD))
    }
}

/// Where the arrays of a plan of these sizes lie, for device code. The sizes must fit an `i32`.
pub(crate) fn describe(n_tokens: usize, n_slots: usize, n_cells: usize, page: usize) -> PlanDesc {
    let extent = Extent::new(n_tokens, n_slots, n_cells, page);
    let at = |range: Range<usize>| range.start as u32;
    PlanDesc {
        slot_cells: [View::Before, View::After].map(|view| at(extent.slot_cells(view))),
        row_cells: at(extent.row_cells()),
        row_slots: at(extent.row_slots()),
        page_bits: [View::Before, View::After].map(|view| at(extent.page_bits(view))),
        records: at(extent.records()),
        n_records: N_RECORDS as u32,
        n_pages: [N_PAGES as u32, N_PAGES as u32 + 1],
        turns: at(extent.turns()),
        n_turns: N_TURNS as u32,
        starts_anew: STARTS_ANEW as u32,
        turn_ints: turn_ints(page) as u32,
    }
}

fn range(start: usize, len: usize) -> Range<usize> {
    start..start + len
}

/// Ints of a [`Turn`].
pub(crate) fn turn_ints(page: usize) -> usize {
    2 + page / CELLS_PER_WORD
}

/// Ints in a plan of these sizes. `page` is a positive multiple of [`CELLS_PER_WORD`]; sizes that no address space
/// holds give `usize::MAX`.
pub fn plan_len(n_tokens: usize, n_slots: usize, n_cells: usize, page: usize) -> usize {
    let n_words = Extent::new(n_tokens, n_slots, n_cells, page).n_words;
    let rows = n_slots.saturating_add(n_tokens).saturating_mul(4);
    let turns = n_cells.div_ceil(page).saturating_mul(MAX_TURNS * turn_ints(page));
    HEADER_INTS.saturating_add(rows).saturating_add(n_words.saturating_mul(2)).saturating_add(turns)
}

impl<'a> Plan<'a> {
    /// Reads a plan's header. Fails if the version is another one, a size is out of range, or `ints` is too short for
    /// the sizes it names. `ints` may be longer than the plan. Entries are not looked at: see
    /// [`Plan::check_entries`].
    pub fn new(ints: &'a [i32]) -> Result<Plan<'a>> {
        let Some(header) = ints.get(..HEADER_INTS) else {
            return Err(Error::invalid(format!("a plan has at least {HEADER_INTS} ints, this one has {}", ints.len())));
        };
        if header[0] != PLAN_VERSION {
            return Err(Error::invalid(format!("plan version {} is not {PLAN_VERSION}", header[0])));
        }
        let size = |index: usize, name: &str| {
            usize::try_from(header[index]).map_err(|_| Error::invalid(format!("plan has {} {name}", header[index])))
        };
        let (n_tokens, n_slots) = (size(2, "tokens")?, size(3, "slots")?);
        let (n_cells, page) = (size(4, "cells")?, size(5, "cells per page")?);
        let (stream, n_records) = (size(1, "as its stream")?, size(N_RECORDS, "records")?);
        let n_turns = size(N_TURNS, "turns")?;
        let n_pages = [size(N_PAGES, "pages to scan before")?, size(N_PAGES + 1, "pages to scan after")?];
        if n_cells == 0 || page == 0 || !page.is_multiple_of(CELLS_PER_WORD) {
            return Err(Error::invalid(format!("plan has {n_cells} cells in pages of {page}")));
        }
        let len = plan_len(n_tokens, n_slots, n_cells, page);
        if ints.len() < len {
            return Err(Error::invalid(format!("plan needs {len} ints for its sizes, but has {}", ints.len())));
        }
        let extent = Extent::new(n_tokens, n_slots, n_cells, page);
        if n_records > extent.max_records()
            || n_turns > extent.max_turns()
            || n_pages.iter().any(|&n| n > n_cells.div_ceil(page))
        {
            return Err(Error::invalid("plan names more records, turns or pages than it can have"));
        }
        if extent.max_records() > MAX_SOURCES
            || RESERVED.into_iter().any(|ints| header[ints].iter().any(|&int| int != 0))
            || !matches!(header[STARTS_ANEW], 0 | 1)
        {
            return Err(Error::invalid("plan header is malformed"));
        }
        let starts_anew = header[STARTS_ANEW] == 1;
        Ok(Plan { ints, stream, n_cells, n_records, n_turns, n_pages, starts_anew, extent })
    }

    /// Fails unless every slot, cell, source and page named by the plan exists, records and turns are sorted, and the
    /// records of a page agree on [`Record::seal`]. For plans that come from outside the planner.
    pub fn check_entries(&self) -> Result<()> {
        let within = |ints: &[i32], first: i32, end: usize| {
            ints.iter().all(|&int| int >= first && usize::try_from(int).map_or(true, |index| index < end))
        };
        let slots = within(self.slot_cells(View::Before), -1, self.n_cells)
            && within(self.slot_cells(View::After), -1, self.n_cells);
        let rows = within(self.row_cells(), 0, self.n_cells) && within(self.row_slots(), -1, self.n_slots());
        let raw = &self.ints[self.extent.records()][..2 * self.n_records];
        let records = raw.chunks_exact(2).all(|record| {
            within(&record[..1], 0, self.n_cells)
                && within(&[record[1] & !(FRESH | RENEW)], 0, self.extent.max_records())
                && record[1] & (FRESH | RENEW) != FRESH | RENEW
        });
        let sorted = raw.chunks_exact(2).zip(raw.chunks_exact(2).skip(1)).all(|(a, b)| {
            let same_page = a[0] as usize / self.page() == b[0] as usize / self.page();
            a[0] < b[0] && (!same_page || (a[1] ^ b[1]) & (FRESH | RENEW) == 0)
        });
        let pages = (0..self.n_turns).map(|index| self.turn(index).page);
        let turns = pages.clone().all(|page| page < self.n_cells.div_ceil(self.page()))
            && pages.clone().zip(pages.skip(1)).all(|(a, b)| a <= b);
        if slots && rows && records && sorted && turns {
            Ok(())
        } else {
            Err(Error::invalid(
                "plan names a slot, cell, source or page that does not exist, or its records or turns are out of order",
            ))
        }
    }

    /// The stream this plan is for.
    pub fn stream(&self) -> usize {
        self.stream
    }

    /// Rows of the ubatch.
    pub fn n_tokens(&self) -> usize {
        self.extent.n_tokens
    }

    /// Exact slots of the stream.
    pub fn n_slots(&self) -> usize {
        self.extent.n_slots
    }

    /// Cells of the stream.
    pub fn n_cells(&self) -> usize {
        self.n_cells
    }

    /// Cells of a page.
    pub fn page(&self) -> usize {
        self.extent.page
    }

    /// The stream held no live token before this ubatch: the store forgets what the layer has learned from earlier ones.
    pub fn starts_anew(&self) -> bool {
        self.starts_anew
    }

    /// Pages to scan: no later page has a readable row.
    pub fn n_pages(&self, view: View) -> usize {
        self.n_pages[view as usize]
    }

    /// For each slot the cell whose exact row it holds, or -1.
    pub fn slot_cells(&self, view: View) -> &'a [i32] {
        &self.ints[self.extent.slot_cells(view)]
    }

    /// The cell of each ubatch row.
    pub fn row_cells(&self) -> &'a [i32] {
        &self.ints[self.extent.row_cells()]
    }

    /// For each ubatch row the slot to which the store writes it, or -1.
    pub fn row_slots(&self) -> &'a [i32] {
        &self.ints[self.extent.row_slots()]
    }

    /// The readable rows of a page: bit `i % 32` of word `i / 32` for its `i`-th cell.
    ///
    /// # Panics
    /// If the stream has no such page.
    pub fn page_bits(&self, view: View, page: usize) -> &'a [i32] {
        let n_words = self.page() / CELLS_PER_WORD;
        &self.ints[self.extent.page_bits(view)][page * n_words..][..n_words]
    }

    /// Turns of all pages together.
    pub fn n_turns(&self) -> usize {
        self.n_turns
    }

    /// The turns of a page; cells in none of them have not moved.
    pub fn turns(&self, page: usize) -> impl Iterator<Item = Turn<'a>> + Clone + use<'a> {
        // Turns are sorted by page.
        let (mut first, mut end) = (0, self.n_turns);
        while first < end {
            let middle = (first + end) / 2;
            if self.turn(middle).page < page {
                first = middle + 1;
            } else {
                end = middle;
            }
        }
        let plan = *self;
        (first..self.n_turns).map(move |index| plan.turn(index)).take_while(move |turn| turn.page == page)
    }

    fn turn(&self, index: usize) -> Turn<'a> {
        let n_ints = turn_ints(self.page());
        let ints = &self.ints[self.extent.turns()][index * n_ints..][..n_ints];
        // A negative page is none that exists.
        Turn { page: ints[0] as usize, distance: ints[1], cells: &ints[2..] }
    }

    /// By how many positions the page row of a cell has moved since it was encoded.
    pub fn turned(&self, cell: usize) -> i32 {
        let (word, bit) = (cell % self.page() / CELLS_PER_WORD, cell % CELLS_PER_WORD);
        let holds = |turn: &Turn| turn.cells[word] >> bit & 1 == 1;
        self.turns(cell / self.page()).find(holds).map_or(0, |turn| turn.distance)
    }

    /// The rows to encode, sorted by cell, so that the records of a page are adjacent. An entry that
    /// [`Plan::check_entries`] refuses comes out as a record that exists nowhere.
    pub fn records(&self) -> impl ExactSizeIterator<Item = Record> + Clone + use<'a> {
        let n_slots = self.n_slots();
        self.ints[self.extent.records()][..2 * self.n_records].chunks_exact(2).map(move |ints| {
            let index = (ints[1] & !(FRESH | RENEW)) as usize;
            let source = if index < n_slots { Source::Slot(index) } else { Source::Row(index - n_slots) };
            let seal = match ints[1] & (FRESH | RENEW) {
                0 => Seal::Join,
                RENEW => Seal::Renew,
                _ => Seal::Fresh,
            };
            Record { cell: ints[0] as usize, source, seal }
        })
    }
}

/// Writer of one plan, for the planner.
pub(crate) struct PlanWriter<'a> {
    ints: &'a mut [i32],
    extent: Extent,
}

/// The sizes a plan starts with.
pub(crate) struct PlanSizes {
    pub(crate) stream: usize,
    pub(crate) n_tokens: usize,
    pub(crate) n_slots: usize,
    pub(crate) n_cells: usize,
    pub(crate) page: usize,
}

impl<'a> PlanWriter<'a> {
    /// Writes the header. Fails, having written nothing, if `out` is too short. The sizes must fit an `i32`.
    pub(crate) fn new(out: &'a mut [i32], sizes: &PlanSizes) -> Result<Self> {
        let PlanSizes { stream, n_tokens, n_slots, n_cells, page } = *sizes;
        let len = plan_len(n_tokens, n_slots, n_cells, page);
        if out.len() < len {
            return Err(Error::invalid(format!(
                "the plan of {n_tokens} tokens needs {len} ints, the buffer has {}",
                out.len()
            )));
        }
        let ints = &mut out[..len];
        ints[..HEADER_INTS].fill(0);
        ints[0] = PLAN_VERSION;
        for (int, size) in ints[1..].iter_mut().zip([stream, n_tokens, n_slots, n_cells, page]) {
            *int = size as i32;
        }
        Ok(Self { ints, extent: Extent::new(n_tokens, n_slots, n_cells, page) })
    }

    /// Sets [`Plan::starts_anew`].
    pub(crate) fn set_starts_anew(&mut self) {
        self.ints[STARTS_ANEW] = 1;
    }

    /// All entries of [`Plan::slot_cells`], to be set.
    pub(crate) fn slot_cells(&mut self, view: View) -> &mut [i32] {
        &mut self.ints[self.extent.slot_cells(view)]
    }

    /// All entries of [`Plan::row_cells`], to be set.
    pub(crate) fn row_cells(&mut self) -> &mut [i32] {
        &mut self.ints[self.extent.row_cells()]
    }

    /// All entries of [`Plan::row_slots`], to be set.
    pub(crate) fn row_slots(&mut self) -> &mut [i32] {
        &mut self.ints[self.extent.row_slots()]
    }

    /// Sets the page bits of a view and its number of pages to scan.
    pub(crate) fn set_page_bits(&mut self, view: View, words: &[u32]) {
        let bits = &mut self.ints[self.extent.page_bits(view)];
        for (int, &word) in bits.iter_mut().zip(words) {
            *int = word as i32;
        }
        let words_per_page = self.extent.page / CELLS_PER_WORD;
        let last = words.iter().rposition(|&word| word != 0);
        self.ints[N_PAGES + view as usize] = last.map_or(0, |word| word / words_per_page + 1) as i32;
    }

    /// Sets the records, which must be sorted by cell.
    pub(crate) fn set_records(&mut self, records: &[Record]) {
        let n_slots = self.extent.n_slots;
        let (used, unused) = self.ints[self.extent.records()].split_at_mut(2 * records.len());
        for (ints, record) in used.chunks_exact_mut(2).zip(records) {
            let index = match record.source {
                Source::Slot(slot) => slot,
                Source::Row(row) => n_slots + row,
            };
            let flag = match record.seal {
                Seal::Fresh => FRESH,
                Seal::Join => 0,
                Seal::Renew => RENEW,
            };
            (ints[0], ints[1]) = (record.cell as i32, index as i32 | flag);
        }
        unused.fill(0);
        self.ints[N_RECORDS] = records.len() as i32;
    }

    /// Sets the turns, which are as [`Plan`] describes them.
    pub(crate) fn set_turns(&mut self, turns: &[i32]) {
        let (used, unused) = self.ints[self.extent.turns()].split_at_mut(turns.len());
        used.copy_from_slice(turns);
        unused.fill(0);
        self.ints[N_TURNS] = (turns.len() / turn_ints(self.extent.page)) as i32;
    }
}

#[cfg(test)]
#[path = "plan/tests.rs"]
mod tests;
