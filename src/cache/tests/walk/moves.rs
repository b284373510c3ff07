//! Copies across streams, and a saved sequence that is restored into other cells beside live ones: what a host does with the
//! parts of the library that the C boundary gives it.

use super::*;
use crate::erase::erase_head;
use crate::head::HeadMut;
use crate::layout::Layout;

/// The stream that is not walked now, and one to swap them by.
const PARKED: usize = 1;
const SPARE: usize = 2;
pub(super) const N_STREAMS: usize = 3;

/// What a stream holds.
#[derive(Clone)]
pub(super) struct Parked {
    cells: Cells,
    memory: [Vec<u8>; 2],
    shadow: Vec<Option<Held>>,
}

/// Where the row of a cell that is saved comes from.
#[derive(Clone, Copy, PartialEq)]
enum SavedAs {
    /// The cell has none.
    Nothing,
    /// It comes with its page.
    Packed(Location),
    /// It is read and stored anew.
    Row,
}

/// A token, and its key and value if they are stored anew.
pub(super) struct SavedToken {
    pub(super) held: Held,
    rows: [Vec<f32>; 2],
}

/// Pages of a sequence in a layout of just these pages.
struct SavedPages {
    layout: Layout,
    memory: [Vec<u8>; 2],
}

impl Walk {
    fn memory(&self) -> [Vec<u8>; 2] {
        let layer = &self.cache.layers[0];
        [layer.k.bytes().to_vec(), layer.v.bytes().to_vec()]
    }

    pub(super) fn parked_now(&self) -> Parked {
        Parked { cells: self.cache.cells.clone(), memory: self.memory(), shadow: self.shadow.clone() }
    }

    /// Makes the parked stream a copy of this one, or goes on with it.
    pub(super) fn use_streams(&mut self) {
        let Some(parked) = self.parked.take() else { return };
        let here = self.parked_now();
        let planner = &mut self.cache.planner;
        if self.rng.below(2) == 0 {
            self.what += ", copy the stream";
            planner.copy_stream(STREAM, PARKED).unwrap();
            self.parked = Some(here);
            return;
        }
        self.what += ", change the stream";
        for (src, dst) in [(STREAM, SPARE), (PARKED, STREAM), (SPARE, PARKED)] {
            planner.copy_stream(src, dst).unwrap();
        }
        let layer = &mut self.cache.layers[0];
        layer.k.bytes_mut().copy_from_slice(&parked.memory[0]);
        layer.v.bytes_mut().copy_from_slice(&parked.memory[1]);
        (self.cache.cells, self.shadow, self.parked) = (parked.cells, parked.shadow, Some(here));
    }

    /// Keeps the planner's parked stream over a change of the cache.
    pub(super) fn change_cache(&mut self, change: impl FnOnce(&mut Self)) {
        let parked = self.parked.is_some().then(|| self.cache.planner.snapshot(PARKED).unwrap());
        change(self);
        if let Some(parked) = parked {
            self.cache.planner.restore(PARKED, &parked).unwrap();
        }
    }

    /// Saves one sequence and restores it, as itself or as another one, into cells that are free then.
    pub(super) fn move_sequence(&mut self, src: usize) {
        let dst = self.rng.below(self.n_seqs);
        let page = self.cache.recipe.page;
        let location = self.cache.planner.locate(STREAM).unwrap();
        let is_own = |cell: usize| self.shadow[cell].as_ref().is_some_and(|token| token.seqs >> src & 1 == 1);
        let is_whole = |page_of: &usize| {
            let cells = page_of * page..(page_of + 1) * page;
            let n_own = cells.clone().filter(|cell| is_own(*cell)).count();
            let n_free = cells.clone().filter(|cell| self.shadow[*cell].is_none()).count();
            n_own + n_free == page
                && 2 * n_own >= page
                && cells.clone().any(|c| is_own(c) && location[c].places == IN_PAGE)
        };
        let pages: Vec<usize> = (0..N_CELLS / page).filter(is_whole).collect();
        let saved_as = |cell: usize| match (is_own(cell), location[cell].places == IN_PAGE) {
            (false, _) => SavedAs::Nothing,
            (true, true) if pages.contains(&(cell / page)) => SavedAs::Packed(location[cell]),
            (true, _) => SavedAs::Row,
        };
        let saved: Vec<SavedAs> = (0..N_CELLS).map(saved_as).collect();
        let own: Vec<usize> = (0..N_CELLS).filter(|cell| is_own(*cell)).collect();
        let mut tokens: Vec<SavedToken> =
            own.iter().map(|&cell| self.save_token(cell, saved[cell] == SavedAs::Row, &location)).collect();
        tokens.iter_mut().for_each(|token| token.held.seqs = 1 << dst);
        let copy = (!pages.is_empty()).then(|| self.save_pages(&pages, &saved));

        self.remove(Some(dst), 0, -1);
        let Some(targets) = self.places_for(&pages, &own) else { return };
        self.what += &format!(", move sequence {src} to {dst}, pages {pages:?}");
        let moved: Vec<(usize, usize)> = own.iter().copied().zip(targets).collect();
        if let Some(copy) = copy {
            self.restore_pages(&pages, &copy, &saved, &moved);
        }
        let (rows, packed): (Vec<_>, Vec<_>) =
            moved.iter().zip(tokens).partition(|((from, _), _)| saved[*from] == SavedAs::Row);
        packed.into_iter().for_each(|((_, to), token)| self.put(*to, token.held));
        let mut rows: Vec<(usize, SavedToken)> = rows.into_iter().map(|((_, to), token)| (*to, token)).collect();
        rows.sort_by_key(|(_, token)| token.held.pos);
        self.restore_rows(rows);
        let cells = &self.cache.cells;
        self.cache.cells = Cells::from_parts(cells.pos().to_vec(), cells.seqs().to_vec(), self.n_seqs).unwrap();
    }

    fn put(&mut self, cell: usize, token: Held) {
        self.cache.cells.place(&[cell as u32], &[token.seqs.trailing_zeros()], &[token.pos]);
        self.shadow[cell] = Some(token);
    }

    /// The token of a cell, and its rows if they are saved as such, in FP16. What is read from a page is from then on what
    /// the token should be.
    pub(super) fn save_token(&self, cell: usize, as_row: bool, location: &[Location]) -> SavedToken {
        let held = self.shadow[cell].clone().unwrap();
        if !as_row {
            return SavedToken { held, rows: [Vec::new(), Vec::new()] };
        }
        let rows = [Side::Key, Side::Value].map(|side| {
            let mut row = self.decoded(side, location, cell..cell + 1);
            let is_exact = location[cell].slot().is_some() || self.members(side).contains(&cell);
            let (truth, turns) = if side == Side::Key { (self.turned(&held), held.turns) } else { (held.v.clone(), 0) };
            self.check_row(&row, &truth, is_exact, turns, &format!("{side:?} of cell {cell} on its way"));
            row.iter_mut().for_each(|x| *x = half::f16::from_f32(*x).to_f32());
            row
        });
        if location[cell].slot().is_some() {
            return SavedToken { held, rows };
        }
        let [mut k, v] = rows.clone();
        let (rotation, mut angles) = (self.rope.rotation().unwrap(), Default::default());
        rotation.angles(held.pos, &mut angles);
        rotation.turn_back(&mut k, &angles);
        SavedToken { held: Held { k, v, turns: held.turns + 1, ..held }, rows }
    }

    /// Free cells for the cells `own`: whole pages for whole pages. None if there is no room.
    fn places_for(&mut self, pages: &[usize], own: &[usize]) -> Option<Vec<usize>> {
        let page = self.cache.recipe.page;
        let is_free = |cell: &usize| self.shadow[*cell].is_none();
        let free_pages: Vec<usize> =
            (0..N_CELLS / page).filter(|of| (of * page..(of + 1) * page).all(|cell| is_free(&cell))).collect();
        let n = pages.len();
        if free_pages.len() < n {
            return None;
        }
        let targets = self.rng.choose(free_pages, n);
        let rest = (0..N_CELLS).filter(|cell| self.shadow[*cell].is_none() && !targets.contains(&(cell / page)));
        let (mut rest, n_rest) =
            (rest.collect::<Vec<usize>>(), own.iter().filter(|cell| !pages.contains(&(*cell / page))).count());
        if rest.len() < n_rest {
            return None;
        }
        if self.rng.below(2) == 0 {
            rest = self.rng.choose(rest, n_rest);
        }
        let mut rest = rest.into_iter();
        let place = |&cell: &usize| match pages.iter().position(|of| *of == cell / page) {
            Some(index) => targets[index] * page + cell % page,
            None => rest.next().unwrap(),
        };
        Some(own.iter().map(place).collect())
    }

    /// Copies whole pages with what the outlier pool has of them, and wipes everything else from the copy.
    fn save_pages(&self, pages: &[usize], saved: &[SavedAs]) -> SavedPages {
        let (recipe, page) = (&self.cache.recipe, self.cache.recipe.page);
        let layout = Layout::new(recipe, self.cache.params.shape, 0, pages.len() * page, 16).unwrap();
        let mut memory = [vec![0; layout.k_bytes()], vec![0; layout.v_bytes()]];
        let mut kept = vec![Location::default(); pages.len() * page];
        let (mut from, mut to) = (Vec::new(), Vec::new());
        for (index, location) in kept.iter_mut().enumerate() {
            let cell = pages[index / page] * page + index % page;
            if let SavedAs::Packed(at) = saved[cell] {
                *location = at;
                from.push(cell as u32);
                to.push(index as u32);
            }
        }
        for side in [Side::Key, Side::Value] {
            let (own, region) = self.region(side);
            let copy = &mut memory[side as usize];
            for (index, &of) in pages.iter().enumerate() {
                copy_page((own, region, of), (&layout, &mut *copy, index), side);
            }
            if layout.pool_rows() > 0 {
                pool::adopt(&mut HeadMut::new(&layout, side, copy), &region[own.pool_range(side)], &from, &to);
            }
            erase_head(&layout, side, copy, &kept).unwrap();
        }
        SavedPages { layout, memory }
    }

    fn restore_pages(&mut self, pages: &[usize], copy: &SavedPages, saved: &[SavedAs], moved: &[(usize, usize)]) {
        let page = self.cache.recipe.page;
        let packed: Vec<(usize, usize, i32)> = moved
            .iter()
            .filter_map(|&(from, to)| match saved[from] {
                SavedAs::Packed(at) => Some((from, to, at.turned)),
                _ => None,
            })
            .collect();
        let index_of = |cell: usize| pages.iter().position(|of| *of == cell / page).unwrap();
        let from: Vec<u32> = packed.iter().map(|p| (index_of(p.0) * page + p.0 % page) as u32).collect();
        let to: Vec<u32> = packed.iter().map(|p| p.1 as u32).collect();
        let turned: Vec<i32> = packed.iter().map(|p| p.2).collect();
        let layer = &mut self.cache.layers[0];
        for (side, memory) in [(Side::Key, &mut layer.k), (Side::Value, &mut layer.v)] {
            let region = memory.bytes_mut();
            for (index, &of) in pages.iter().enumerate() {
                let target = packed.iter().find(|p| p.0 / page == of).unwrap().1 / page;
                copy_page(
                    (&copy.layout, &copy.memory[side as usize], index),
                    (&layer.layout, &mut *region, target),
                    side,
                );
            }
            if copy.layout.pool_rows() > 0 {
                let saved = &copy.memory[side as usize][copy.layout.pool_range(side)];
                pool::adopt(&mut HeadMut::new(&layer.layout, side, region), saved, &from, &to);
            }
        }
        self.cache.planner.adopt(STREAM, &to, &turned).unwrap();
    }

    /// Stores rows anew, as those of an ubatch that nobody attends.
    fn restore_rows(&mut self, rows: Vec<(usize, SavedToken)>) {
        if rows.is_empty() {
            return;
        }
        let planned: Vec<Row> = rows
            .iter()
            .map(|(cell, token)| (*cell as u32, &token.held))
            .map(|(cell, held)| Row { cell, pos: held.pos, seq: held.seqs.trailing_zeros() })
            .collect();
        let planner = &mut self.cache.planner;
        let mut ints = vec![0; plan_len(rows.len(), planner.n_slots(), N_CELLS, self.cache.recipe.page)];
        let cells = &self.cache.cells;
        planner.plan(STREAM, &planned, &|cell| cells.is_live(cell), &mut ints).unwrap();
        let of_side = |side: Side| rows.iter().flat_map(|(_, token)| token.rows[side as usize].clone()).collect();
        let (k, v): (Vec<f32>, Vec<f32>) = (of_side(Side::Key), of_side(Side::Value));
        let shape = self.cache.params.shape;
        let of = |data, dim: u32| Rows { data, stride_token: dim as usize, stride_head: dim as usize };
        let (k, v) = (of(&k, shape.head_dim_k), of(&v, shape.head_dim_v));
        let rotation = self.cache.rotation.as_ref();
        let mut positions = cells.pos().to_vec();
        planned.iter().for_each(|row| positions[row.cell as usize] = row.pos);
        let positions = Some(&positions[..]);
        let store = StoreRows { positions, k, v, q: None, attended: None, rotation };
        store_layer(&mut self.cache.layers[0], &store, &Plan::new(&ints).unwrap(), 1).unwrap();
        for (cell, token) in rows {
            self.put(cell, token.held);
        }
        self.take_renewed(Self::renewed(&Plan::new(&ints).unwrap()));
    }
}

/// Copies header and bytes of one page of the only head.
fn copy_page(from: (&Layout, &[u8], usize), to: (&Layout, &mut [u8], usize), side: Side) {
    let page = Head::new(from.0, side, from.1).page(from.2);
    let mut head = HeadMut::new(to.0, side, to.1);
    let (header, bytes) = head.page_mut(to.2);
    header.copy_from_slice(page.header);
    bytes.copy_from_slice(page.bytes);
}
