//! The outlier token pool of one KV head: rows that stay exact wherever their cell's page is (OTT, arXiv 2505.10938).
//!
//! Each time a page is sealed, its tokens compete with the pool's for `outliers` places: those with the smallest L1 norm
//! of the key win. A winner from the page keeps its exact key and value here and has no part in the page's range. A member
//! that loses its place stays exact, since its page was written without it; such members fill `extra` further places, and
//! when those are full no new token enters (section 3.3 of the paper's method as public summaries give it).
//!
//! Decided here where the paper is silent: norms are per KV head and of keys as they are cached; a long ubatch is traced
//! page by page in cell order; a member leaves when its cell is freed or used again, and the next smallest member then
//! counts among the `outliers`.
#![forbid(unsafe_code)]

use std::ops::Range;

use crate::error::{Error, Result, Status};
use crate::head::{Head, HeadMut};
use crate::plan::{Plan, View, CELLS_PER_WORD};
use crate::recipe::PoolParams;

/// The cell of each row of a pool.
pub(crate) fn cells<'a>(head: Head<'a>) -> impl ExactSizeIterator<Item = Option<usize>> + use<'a> {
    head.pool_table().chunks_exact(4).map(parse_cell)
}

/// An entry of the table; zeroed memory is an empty pool.
fn parse_cell(entry: &[u8]) -> Option<usize> {
    u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]]).checked_sub(1).map(|cell| cell as usize)
}

/// The row of the pool that belongs to a cell.
pub(crate) fn find(head: Head, cell: usize) -> Option<usize> {
    cells(head).position(|member| member == Some(cell))
}

/// Writes the cell of a row, or that it is free.
pub(crate) fn set_cell(head: &mut HeadMut, row: usize, cell: Option<usize>) {
    let stored = cell.map_or(0, |cell| cell as u32 + 1);
    head.pool_table_mut()[4 * row..][..4].copy_from_slice(&stored.to_le_bytes());
}

/// Refuses a pool that names a cell twice, as only a crafted state brings it: attention relies on reading each row once.
///
/// # Errors
///
/// [`Status::Format`]
pub(crate) fn check(head: Head) -> Result<()> {
    let mut members: Vec<usize> = cells(head).flatten().collect();
    members.sort_unstable();
    match members.windows(2).find(|two| two[0] == two[1]) {
        Some(two) => Err(Error::new(Status::Format, format!("an outlier pool names cell {} twice", two[0]))),
        None => Ok(()),
    }
}

/// Removes the members whose cells hold no token any more, or another one, and those that a crafted state names a second time.
pub(crate) fn drop_stale(heads: &mut [HeadMut; 2], plan: &Plan) {
    let holds = |cell: usize| {
        let bit = |word: i32| word >> (cell % CELLS_PER_WORD) & 1 == 1;
        let in_page = || {
            let words = plan.page_bits(View::After, cell / plan.page());
            bit(words[cell % plan.page() / CELLS_PER_WORD])
        };
        cell < plan.n_cells()
            && !plan.row_cells().contains(&(cell as i32))
            && (in_page() || plan.slot_cells(View::After).contains(&(cell as i32)))
    };
    for head in heads {
        let members: Vec<Option<usize>> = cells(head.as_ref()).collect();
        for (i, entry) in head.pool_table_mut().chunks_exact_mut(4).enumerate() {
            if members[i].is_some_and(|cell| !holds(cell) || members[..i].contains(&Some(cell))) {
                entry.fill(0);
            }
        }
    }
}

/// Takes the cells of a page off the pool: the page is sealed anew, with all that is live in it, and its tokens compete
/// again. A member that stayed would be read beside the row that enters for the same cell.
pub(crate) fn give_back(heads: &mut [HeadMut; 2], page: Range<usize>) {
    for head in heads {
        for entry in head.pool_table_mut().chunks_exact_mut(4) {
            if parse_cell(entry).is_some_and(|cell| page.contains(&cell)) {
                entry.fill(0);
            }
        }
    }
}

/// Chooses the rows of a page that enter the pool: for each of `keys`, `[n][head_dim]`, the row of the pool it is to have.
/// None of them is a member.
pub(crate) fn trace(params: &PoolParams, head: Head, keys: &[f32]) -> Vec<Option<usize>> {
    let members: Vec<Option<usize>> = cells(head).collect();
    let norm = |row: &[f32]| row.iter().map(|x| x.abs()).sum::<f32>();
    let mut exact = vec![0f32; head.layout.head_dim];
    // The members that hold the places: the smallest ones. Candidates of the page take them in the order of their norms.
    let mut places: Vec<f32> = Vec::new();
    for (row, _) in members.iter().enumerate().filter(|(_, cell)| cell.is_some()) {
        head.read_pooled(row, &mut exact);
        places.push(norm(&exact));
    }
    places.sort_by(f32::total_cmp);
    places.truncate(params.outliers);
    let mut candidates: Vec<(f32, usize)> =
        keys.chunks_exact(head.layout.head_dim).enumerate().map(|(i, row)| (norm(row), i)).collect();
    candidates.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    let mut free = members.iter().enumerate().filter(|(_, cell)| cell.is_none()).map(|(row, _)| row);
    let mut chosen = vec![None; candidates.len()];
    for (taken, &(norm, row)) in candidates.iter().take(params.outliers).enumerate() {
        // This candidate is among the smallest if fewer than `outliers` members and candidates are smaller.
        let smaller = taken + places.iter().filter(|member| **member <= norm).count();
        let Some(place) = (smaller < params.outliers).then(|| free.next()).flatten() else { break };
        chosen[row] = Some(place);
    }
    chosen
}

/// Takes over the members of a saved pool ([`Layout::pool_range`]) that belong to the cells `from`, as members for `to`. Both
/// sides of a cell find the same place, since their pools hold the same cells. A cell that is saved twice enters once.
pub(crate) fn adopt(head: &mut HeadMut, saved: &[u8], from: &[u32], to: &[u32]) {
    for entry in head.pool_table_mut().chunks_exact_mut(4) {
        if parse_cell(entry).is_some_and(|cell| to.contains(&(cell as u32))) {
            entry.fill(0);
        }
    }
    let (rows, table) = saved.split_at(saved.len() - head.as_ref().pool_table().len());
    let free = cells(head.as_ref()).enumerate().filter_map(|(i, cell)| cell.is_none().then_some(i));
    let free: Vec<usize> = free.collect();
    let mut free = free.into_iter();
    for (entry, row) in table.chunks_exact(4).zip(rows.chunks_exact(head.layout.head_dim * 2)) {
        let index = parse_cell(entry).and_then(|cell| from.iter().position(|from| *from as usize == cell));
        let Some(index) = index else { continue };
        if find(head.as_ref(), to[index] as usize).is_some() {
            continue;
        }
        let Some(place) = free.next() else { return };
        head.pool_row_mut(place).copy_from_slice(row);
        set_cell(head, place, Some(to[index] as usize));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::page::Side;
    use crate::layout::Layout;
    use crate::plan::{plan_len, Plan};
    use crate::planner::{Planner, Row};
    use crate::recipe::Recipe;
    use crate::rows::Rows;
    use crate::shape::Shape;
    use crate::store::{store_head, StoreRows};

    const DIM: usize = 64;

    /// One head with pages of 64 cells: each is sealed as it gets full.
    struct OneHead {
        layout: Layout,
        planner: Planner,
        memory: [Vec<u8>; 2],
        live: Vec<bool>,
    }

    impl OneHead {
        fn new(spec: &str, layer: usize, window: usize) -> Self {
            let recipe = Recipe::parse(&format!("{spec}:page=64,window={window},sinks=0")).unwrap();
            let shape = Shape { n_heads: 1, n_kv_heads: 1, head_dim_k: DIM as u32, head_dim_v: DIM as u32 };
            let planner = Planner::new(recipe.planner_config(512, 1, 1)).unwrap();
            let layout = Layout::new(&recipe, shape, layer, 512, planner.n_slots()).unwrap();
            let memory = [vec![0; layout.k_bytes()], vec![0; layout.v_bytes()]];
            Self { layout, planner, memory, live: vec![false; 512] }
        }

        /// Appends a page of keys of size 1 but for some (row, size). Gives the members' cells, ascending.
        fn append(&mut self, page: usize, sizes: &[(usize, f32)]) -> Vec<usize> {
            self.append_cells(page * 64..(page + 1) * 64, sizes)
        }

        /// Appends keys to a range of cells.
        fn append_cells(&mut self, cells_of_rows: Range<usize>, sizes: &[(usize, f32)]) -> Vec<usize> {
            let n = cells_of_rows.len();
            let rows: Vec<Row> =
                cells_of_rows.map(|cell| Row { cell: cell as u32, pos: cell as i32, seq: 0 }).collect();
            let mut keys: Vec<f32> = (0..n * DIM).map(|i| if i * 7 % 13 < 6 { 1.0 } else { -1.0 }).collect();
            for &(row, size) in sizes {
                keys[row * DIM..(row + 1) * DIM].iter_mut().for_each(|x| *x *= size);
            }
            let mut ints = vec![0; plan_len(n, self.planner.n_slots(), 512, 64)];
            let live = &self.live;
            self.planner.plan(0, &rows, &|cell| live[cell], &mut ints).unwrap();
            rows.iter().for_each(|row| self.live[row.cell as usize] = true);
            let current = Rows { data: &keys, stride_token: DIM, stride_head: DIM };
            let [k, v] = &mut self.memory;
            let store = StoreRows { positions: None, k: current, v: current, q: None, attended: None, rotation: None };
            store_head(&self.layout, 0, [k, v], &store, &Plan::new(&ints).unwrap()).unwrap();
            let members = |side: Side| {
                let found = cells(Head::new(&self.layout, side, &self.memory[side as usize])).flatten();
                let mut found: Vec<usize> = found.collect();
                found.sort_unstable();
                found
            };
            assert_eq!(members(Side::Key), members(Side::Value));
            members(Side::Key)
        }
    }

    #[test]
    fn the_smallest_keys_enter_and_losers_stay_until_the_pool_is_full() {
        let mut head = OneHead::new("ott:outliers=2,pool=2", 2, 0);
        assert_eq!(head.append(0, &[(5, 0.2), (9, 0.1), (11, 0.3)]), [5, 9]);
        // One smaller key displaces the larger member, which stays as an extra one.
        assert_eq!(head.append(1, &[(3, 0.15), (4, 0.25)]), [5, 9, 64 + 3]);
        assert_eq!(
            head.append(2, &[(1, 0.05), (2, 0.04)]),
            [5, 9, 64 + 3, 128 + 1].map(|c| if c == 129 { 130 } else { c })
        );
        // Full: even a smaller key finds no place.
        assert_eq!(head.append(3, &[(0, 0.01)]).len(), 4);
        // The exact row is what is read back.
        let location = head.planner.locate(0).unwrap();
        let mut out = vec![0f32; DIM];
        for side in [Side::Key, Side::Value] {
            let memory = &head.memory[side as usize];
            crate::store::dequantize_head(&head.layout, side, memory, &location, None, 9..10, &mut out).unwrap();
            assert!(out.iter().all(|x| (x.abs() - 0.1).abs() < 1e-4), "{out:?}");
        }
        // Removed and overwritten cells leave and make room.
        head.live[9] = false;
        assert!(!head.append(4, &[(7, 0.001)]).contains(&9));
        assert!(head.append(4, &[(8, 0.001)]).iter().all(|cell| *cell != 4 * 64 + 7));
    }

    /// A page that was sealed inside the window, lost its tail and is full again is sealed anew.
    #[test]
    fn a_page_that_is_sealed_again_enters_once() {
        let mut head = OneHead::new("ott:outliers=3,pool=4", 2, 128);
        assert_eq!(head.append(0, &[(5, 0.1), (9, 0.2), (60, 0.3)]), [5, 9, 60]);
        for round in 0..4 {
            head.live[54..64].fill(false);
            // Other tails: one without a small key, one with.
            let (sizes, want) =
                if round % 2 == 0 { (&[][..], &[5, 9][..]) } else { (&[(2, 0.3)][..], &[5, 9, 56][..]) };
            let members = head.append_cells(54..64, sizes);
            assert!(want.iter().all(|cell| members.contains(cell)) && members.len() == 3, "{members:?}");
        }
        // Members of other pages stay, as does the room that they left.
        assert_eq!(head.append(1, &[(0, 0.01)]).len(), 4);
    }

    #[test]
    fn first_layers_have_no_pool() {
        assert_eq!(OneHead::new("ott", 1, 0).layout.pool_rows(), 0);
        assert_eq!(OneHead::new("ott", 2, 0).layout.pool_rows(), 35);
        assert!(OneHead::new("ott", 0, 0).append(0, &[(5, 0.1)]).is_empty());
    }
}
