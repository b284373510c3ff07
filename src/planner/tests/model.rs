//! A naive cache that knows which token each cell holds, and a memory that carries out plans as attention and store do.
//! After each plan both must agree.
#![forbid(unsafe_code)]

use crate::plan::{plan_len, Plan, Seal, Source, View};
use crate::planner::{Planner, PlannerConfig, Row, Shift};
use crate::tests::random::Rng;

/// What a cell of the host holds.
#[derive(Clone, Copy, Debug)]
pub struct Token {
    /// Unique, and larger for later arrivals.
    pub id: u64,
    pub pos: i32,
    /// The position to which its key is turned: shifts that the planner hears of.
    key_pos: i32,
    /// Bit set of sequences.
    pub seqs: u32,
    pinned: bool,
    /// The sequence whose window it is in.
    owner: u32,
    /// Has been outside that sequence's window after some plan, so it may be sealed.
    left_window: bool,
}

/// A stored key: whose it is, and the position to which it is turned.
type Key = (u64, i32);

/// Slots and pages of a stream.
#[derive(Clone)]
struct Memory {
    slots: Vec<Option<Key>>,
    page_rows: Vec<Option<Key>>,
    has_header: Vec<bool>,
}

/// One stream: the host's cells and the memory.
#[derive(Clone)]
pub struct Stream {
    pub cells: Vec<Option<Token>>,
    pub head: usize,
    memory: Memory,
}

/// A row to append.
#[derive(Clone, Copy)]
pub struct NewRow {
    pub cell: usize,
    pub pos: i32,
    pub seqs: u32,
}

impl NewRow {
    /// The sequence whose window the row is in.
    fn owner(&self) -> u32 {
        self.seqs.trailing_zeros()
    }
}

pub struct Model {
    pub planner: Planner,
    pub streams: Vec<Stream>,
    config: PlannerConfig,
    next_id: u64,
    out: Vec<i32>,
    /// Statistics: records by [`Seal`]: fresh, joining, renewing.
    pub n_records: [usize; 3],
    /// Pages that a shift encoded again.
    pub n_recoded: usize,
}

impl Memory {
    fn new(config: &PlannerConfig, n_slots: usize) -> Self {
        Self {
            slots: vec![None; n_slots],
            page_rows: vec![None; config.n_cells],
            has_header: vec![false; config.n_cells.div_ceil(config.page)],
        }
    }

    /// The keys that a reader of `view` finds for `cell`.
    fn read(&self, plan: &Plan, view: View, cell: usize) -> Vec<Option<Key>> {
        let slots = plan.slot_cells(view).iter().zip(&self.slots).filter(|(&held, _)| held == cell as i32);
        let mut found: Vec<_> = slots.map(|(_, &row)| row).collect();
        let (page, index) = (cell / plan.page(), cell % plan.page());
        if plan.page_bits(view, page)[index / 32] as u32 >> (index % 32) & 1 == 1 {
            assert!(page < plan.n_pages(view), "a readable row is behind the pages to scan");
            assert!(self.has_header[page], "a row of a page that was never sealed is readable");
            found.push(self.page_rows[cell].map(|(id, pos)| (id, pos + plan.turned(cell))));
        }
        found
    }

    /// What the store does: pages first, then slots. `ids` are the ubatch's tokens.
    fn store(&mut self, plan: &Plan, rows: &[Key]) {
        let mut last: Option<crate::plan::Record> = None;
        for record in plan.records() {
            let page = record.cell / plan.page();
            let same_page = last.filter(|last| last.cell / plan.page() == page);
            assert!(last.is_none_or(|last| last.cell < record.cell), "records are sorted and distinct");
            match same_page {
                Some(last) => assert_eq!(last.seal, record.seal, "records of a page agree"),
                None if record.seal == Seal::Fresh => {
                    let first = page * plan.page();
                    self.page_rows[first..plan.n_cells().min(first + plan.page())].fill(None);
                    self.has_header[page] = true;
                }
                None => {
                    assert!(self.has_header[page], "a page without header is patched");
                    if record.seal == Seal::Renew {
                        self.keep_readable(plan, page);
                    }
                }
            }
            let (row, cell) = match record.source {
                Source::Slot(slot) => (self.slots[slot], plan.slot_cells(View::Before)[slot]),
                Source::Row(row) => (Some(rows[row]), plan.row_cells()[row]),
            };
            assert_eq!(cell, record.cell as i32, "a record's source holds its cell");
            let turned = plan.turned(record.cell);
            assert!(record.seal != Seal::Fresh || turned == 0, "a fresh page has not moved");
            self.page_rows[record.cell] = row.map(|(id, pos)| (id, pos - turned));
            last = Some(record);
        }
        for (&slot, &row) in plan.row_slots().iter().zip(rows).filter(|(&slot, _)| slot >= 0) {
            self.slots[slot as usize] = Some(row);
        }
    }

    /// Drops the rows of a page that cannot be read after the plan; the others must be there.
    fn keep_readable(&mut self, plan: &Plan, page: usize) {
        let bits = plan.page_bits(View::After, page);
        for (index, row) in self.page_rows[page * plan.page()..].iter_mut().take(plan.page()).enumerate() {
            if bits[index / 32] as u32 >> (index % 32) & 1 == 0 {
                *row = None;
            }
        }
    }

    /// What a layer does with a shift.
    fn shift(&mut self, shift: &Shift) {
        for &(slot, distance) in &shift.slots {
            self.slots[slot].as_mut().unwrap().1 += distance;
        }
        for page in &shift.recoded {
            let first = page[0].cell / shift.page * shift.page;
            let rows = page.iter().map(|row| {
                let (id, pos) = self.page_rows[row.cell].unwrap();
                if let Some(slot) = row.slot {
                    assert_eq!(self.slots[slot], Some((id, pos + row.turned)));
                }
                (row.cell, (id, pos + row.turned))
            });
            let rows: Vec<_> = rows.collect();
            let end = (first + shift.page).min(self.page_rows.len());
            self.page_rows[first..end].fill(None);
            rows.into_iter().for_each(|(cell, row)| self.page_rows[cell] = Some(row));
        }
    }
}

impl Stream {
    fn is_live(&self, cell: usize) -> bool {
        self.cells[cell].is_some()
    }

    pub fn live_cells(&self) -> Vec<usize> {
        (0..self.cells.len()).filter(|&cell| self.is_live(cell)).collect()
    }
}

impl Model {
    pub fn new(config: PlannerConfig) -> Self {
        let planner = Planner::new(config).unwrap();
        let memory = Memory::new(&config, planner.n_slots());
        let stream = Stream { cells: vec![None; config.n_cells], head: 0, memory };
        let streams = vec![stream; config.n_streams];
        Self { planner, streams, config, next_id: 0, out: Vec::new(), n_records: [0; 3], n_recoded: 0 }
    }

    /// Plans and carries out one ubatch, checking both views. Returns the number of exact rows after it.
    pub fn append(&mut self, stream: usize, new_rows: &[NewRow]) -> usize {
        let rows: Vec<Row> =
            new_rows.iter().map(|row| Row { cell: row.cell as u32, pos: row.pos, seq: row.owner() }).collect();
        let keys: Vec<Key> = (self.next_id..).zip(&rows).map(|(id, row)| (id, row.pos)).collect();
        self.next_id += rows.len() as u64;
        self.out.clear();
        // Garbage, so that an entry left unwritten shows.
        self.out
            .resize(plan_len(rows.len(), self.planner.n_slots(), self.config.n_cells, self.config.page), 0x5a5a_5a5a);
        let host = &mut self.streams[stream];
        self.planner.plan(stream, &rows, &|cell| host.is_live(cell), &mut self.out).unwrap();
        let plan = Plan::new(&self.out).unwrap();
        plan.check_entries().unwrap();
        assert_eq!((plan.stream(), plan.n_tokens()), (stream, rows.len()));
        assert!(plan.row_cells().iter().zip(&rows).all(|(&cell, row)| cell == row.cell as i32));

        for row in &rows {
            host.cells[row.cell as usize] = None;
        }
        check_view(host, &plan, View::Before);
        for row in &rows {
            assert!(host.memory.read(&plan, View::Before, row.cell as usize).is_empty(), "an ubatch row is readable");
        }
        place_tokens(&self.config, host, new_rows, &keys);
        host.memory.store(&plan, &keys);
        check_view(host, &plan, View::After);
        check_rows(&plan);
        check_window(&self.config, host, &plan);
        for record in plan.records() {
            self.n_records[record.seal as usize] += 1;
        }
        plan.slot_cells(View::After).iter().filter(|&&cell| cell >= 0).count()
    }

    /// The plan of the latest [`Model::append`].
    pub fn last_plan(&self) -> &[i32] {
        &self.out
    }

    /// Moves the keys of the tokens by a distance each.
    pub fn shift(&mut self, stream: usize, moved: impl Fn(&Token) -> i32) {
        let host = &mut self.streams[stream];
        // Of cells without a token anything may be said.
        let distances = host.cells.iter().map(|cell| cell.as_ref().map_or(77, &moved)).collect::<Vec<_>>();
        let shift = self.planner.shift(stream, &distances, &|cell| host.is_live(cell)).unwrap();
        for (token, distance) in host.cells.iter_mut().zip(&distances) {
            token.iter_mut().for_each(|token| token.key_pos += distance);
        }
        host.memory.shift(&shift);
        self.n_recoded += shift.recoded.len();
        for (cell, location) in self.planner.locate(stream).unwrap().iter().enumerate() {
            let Some(token) = host.cells[cell] else { continue };
            if let Some(slot) = location.slot() {
                assert_eq!(host.memory.slots[slot], Some((token.id, token.key_pos)));
            }
            if location.in_page() {
                assert_eq!(host.memory.page_rows[cell], Some((token.id, token.key_pos - location.turned)));
            }
        }
    }

    /// Removes everything, with or without telling the planner.
    pub fn clear(&mut self, stream: usize, reset: bool) {
        self.streams[stream].cells.fill(None);
        if reset {
            self.planner.reset(stream).unwrap();
        }
    }

    pub fn copy_stream(&mut self, src: usize, dst: usize) {
        self.streams[dst] = self.streams[src].clone();
        self.planner.copy_stream(src, dst).unwrap();
    }

    /// Saves a stream, empties it and restores it.
    pub fn save_and_restore(&mut self, stream: usize, rng: &mut Rng) {
        let (host, saved) = (self.streams[stream].clone(), self.planner.snapshot(stream).unwrap());
        self.clear(stream, rng.below(2) == 0);
        self.planner.restore(stream, &saved).unwrap();
        self.streams[stream] = host;
    }

    /// The planner's own account must agree with the host's, also on which tokens are sink tokens.
    pub fn check_locations(&self, stream: usize) {
        let locations = self.planner.locate(stream).unwrap();
        for cell in self.streams[stream].live_cells() {
            let sink = self.streams[stream].cells[cell].is_some_and(|token| token.pinned);
            let row = locations[cell].slot().map(|slot| self.planner.streams[stream].exact[slot].unwrap());
            assert_eq!(row.is_some_and(|row| row.pinned), sink);
            assert_eq!(row.is_none_or(|row| row.encoded), locations[cell].in_page());
        }
    }
}

/// Each live cell is readable in exactly one place, which holds its token; a dead cell is in no slot.
fn check_view(host: &Stream, plan: &Plan, view: View) {
    for (cell, token) in host.cells.iter().enumerate() {
        match token {
            Some(token) => {
                assert_eq!(
                    host.memory.read(plan, view, cell),
                    [Some((token.id, token.key_pos))],
                    "{view:?} cell {cell}"
                );
            }
            None => assert!(!plan.slot_cells(view).contains(&(cell as i32)), "{view:?}: dead cell {cell} has a slot"),
        }
    }
    let last = plan.n_pages(view).checked_sub(1);
    assert!(
        last.is_none_or(|page| plan.page_bits(view, page).iter().any(|&word| word != 0)),
        "an empty page is scanned"
    );
}

/// The store's slots are those of the view after it.
fn check_rows(plan: &Plan) {
    let after = plan.slot_cells(View::After);
    for (&cell, &slot) in plan.row_cells().iter().zip(plan.row_slots()) {
        let expected = after.iter().position(|&held| held == cell).map_or(-1, |slot| slot as i32);
        assert_eq!(slot, expected, "row of cell {cell}");
    }
}

/// Places the tokens in the host's cells, with its own count of the sink room.
fn place_tokens(config: &PlannerConfig, host: &mut Stream, rows: &[NewRow], keys: &[Key]) {
    let n_sequences = if config.n_streams == 1 { config.n_seq_max } else { 1 };
    let mut room = config.sink_tokens * n_sequences - host.cells.iter().flatten().filter(|token| token.pinned).count();
    for (row, &(id, key_pos)) in rows.iter().zip(keys) {
        let pinned = room > 0 && row.pos < config.sink_tokens as i32;
        room -= usize::from(pinned);
        host.cells[row.cell] =
            Some(Token { id, pos: row.pos, key_pos, seqs: row.seqs, pinned, owner: row.owner(), left_window: false });
    }
}

/// Sink tokens are exact, and so are the tokens that have always been among the newest of their sequence: `window` of them,
/// or fewer if that many of every sequence do not fit into the slots.
fn check_window(config: &PlannerConfig, host: &mut Stream, plan: &Plan) {
    let mut newest: Vec<(u64, usize)> = Vec::new();
    let mut n_pinned = 0;
    for (cell, token) in host.cells.iter().enumerate() {
        let Some(token) = token else { continue };
        if token.pinned {
            n_pinned += 1;
            assert!(plan.slot_cells(View::After).contains(&(cell as i32)), "sink token {token:?} is not exact");
        } else {
            newest.push((token.id, cell));
        }
    }
    newest.sort_unstable_by(|a, b| b.cmp(a));
    let owner = |cell: usize| host.cells[cell].map_or(0, |token| token.owner as usize);
    let mut n_rows = vec![0; config.n_seq_max];
    newest.iter().for_each(|&(_, cell)| n_rows[owner(cell)] += 1);
    let fits = |window: usize, room: usize| n_rows.iter().map(|&n: &usize| n.min(window)).sum::<usize>() <= room;
    let room = plan.n_slots() - n_pinned;
    let cut_room = room - config.page.min(room / 2);
    let window = if fits(config.window, room) {
        config.window
    } else {
        (0..config.window).rev().find(|&window| fits(window, cut_room)).unwrap()
    };
    let mut n_newer = vec![0; config.n_seq_max];
    for &(_, cell) in &newest {
        let Some(token) = &mut host.cells[cell] else { continue };
        let n_newer = &mut n_newer[token.owner as usize];
        token.left_window |= *n_newer >= window;
        *n_newer += 1;
        if !token.left_window {
            assert!(plan.slot_cells(View::After).contains(&(cell as i32)), "{token:?} of the window is not exact");
        }
    }
}
