//! Wiping what a stream's memory still holds of rows that nobody may read any more, before a copy of it leaves the
//! process. Removed tokens stay in slots and pages until something else takes their place.
//!
//! What a page's other rows need stays: its mean, ranges and order were made from all rows that were sealed together.
#![forbid(unsafe_code)]

use crate::codec::page::{SealRows, Side};
use crate::error::Result;
use crate::head::HeadMut;
use crate::layout::Layout;
use crate::location::Location;
use crate::pool;
use crate::store::check_location;

/// Wipes the rows of one side of one head that `location` does not name: slots, members of the outlier pool, and rows of
/// pages.
///
/// Slots and pool rows become zero. A row of a page becomes what a row of zeros is encoded to, whatever it was; a page
/// of which no row is left becomes zero.
///
/// # Errors
///
/// [`crate::error::Status::InvalidArgument`] if `location` is not one of this layout's.
pub fn erase_head(layout: &Layout, side: Side, region: &mut [u8], location: &[Location]) -> Result<()> {
    check_location(layout, location, &(0..layout.n_cells()))?;
    let in_page = |cell: usize| location[cell].in_page();
    let mut head = HeadMut::new(layout, side, region);
    erase_slots(layout, &mut head, location);
    erase_pool(layout, &mut head, &in_page);
    for page in 0..layout.n_pages() {
        erase_page_rows(layout, &mut head, page, &in_page);
    }
    Ok(())
}

fn erase_slots(layout: &Layout, head: &mut HeadMut, location: &[Location]) {
    let mut is_used = vec![false; layout.n_slots()];
    location.iter().filter_map(Location::slot).for_each(|slot| is_used[slot] = true);
    for slot in (0..layout.n_slots()).filter(|slot| !is_used[*slot]) {
        head.slot_mut(slot).fill(0);
    }
}

fn erase_pool(layout: &Layout, head: &mut HeadMut, in_page: &dyn Fn(usize) -> bool) {
    let members: Vec<Option<usize>> = pool::cells(head.as_ref()).collect();
    for (row, cell) in members.into_iter().enumerate() {
        if !cell.is_some_and(|cell| cell < layout.n_cells() && in_page(cell)) {
            head.pool_row_mut(row).fill(0);
            pool::set_cell(head, row, None);
        }
    }
}

fn erase_page_rows(layout: &Layout, head: &mut HeadMut, page: usize, in_page: &dyn Fn(usize) -> bool) {
    let (first, n) = (page * layout.page(), layout.page());
    let keeps = |row: &u32| first + (*row as usize) < layout.n_cells() && in_page(first + *row as usize);
    let at: Vec<u32> = (0..n as u32).filter(|row| !keeps(row)).collect();
    let side = head.layout;
    let (header, bytes) = head.page_mut(page);
    if at.len() == n {
        header.fill(0);
        bytes.fill(0);
        return;
    }
    let mut rows = vec![0f32; at.len() * side.head_dim];
    let no_weights: [&[f32]; 2] = [&[], &[]];
    let [channel_weights, attention] = no_weights;
    let mut rows = SealRows {
        place: None,
        at: &at,
        rows: &mut rows,
        fresh: false,
        exact: &[],
        channel_weights,
        last_exponents: &mut [],
        attention,
    };
    side.codec.seal(header, bytes, &mut rows);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::location::IN_SLOT;
    use crate::plan::{plan_len, Plan};
    use crate::planner::{Planner, Row};
    use crate::recipe::Recipe;
    use crate::rows::Rows;
    use crate::shape::Shape;
    use crate::store::{dequantize_head, store_head, StoreRows};

    const DIM: usize = 64;
    const N_CELLS: usize = 192;
    const SPECS: [&str; 8] = [
        "skvq:page=64,window=16",
        "skvq:k=1.6,v=2,page=64,window=16",
        "skvq:paper,page=64,window=16",
        "kivi:k=2.5,page=64,window=16",
        "ott:k=2.5,page=64,window=16,outliers=6,skip-layers=0",
        "qaq:page=64,window=16",
        "qaq:paper,page=64,window=16",
        "qaq:levels=normal,page=64,window=16,attn-keys=1",
    ];

    /// One head with 150 tokens, of which those of `changed` have other rows, one of them the smallest of its page.
    fn stored(spec: &str, changed: &[usize]) -> (Layout, [Vec<u8>; 2], Vec<Location>) {
        let recipe = Recipe::parse(spec).unwrap();
        let shape = Shape { n_heads: 1, n_kv_heads: 1, head_dim_k: DIM as u32, head_dim_v: DIM as u32 };
        let mut planner = Planner::new(recipe.planner_config(N_CELLS, 1, 1)).unwrap();
        let layout = Layout::new(&recipe, shape, 0, N_CELLS, planner.n_slots()).unwrap();
        let mut memory = [vec![0; layout.k_bytes()], vec![0; layout.v_bytes()]];
        let value = |token: usize, i: usize| {
            let size = if changed.contains(&token) { 0.1 } else { 1.0 };
            ((token * DIM + i) * 7919 % 1009) as f32 / 504.0 * size - size
        };
        for start in (0..150).step_by(30) {
            let rows: Vec<Row> = (start..start + 30).map(|i| Row { cell: i as u32, pos: i as i32, seq: 0 }).collect();
            let data: Vec<f32> = rows.iter().flat_map(|row| (0..DIM).map(|i| value(row.cell as usize, i))).collect();
            let mut ints = vec![0; plan_len(rows.len(), planner.n_slots(), N_CELLS, 64)];
            planner.plan(0, &rows, &|cell| cell < start, &mut ints).unwrap();
            let current = Rows { data: &data, stride_token: DIM, stride_head: DIM };
            let store = StoreRows { positions: None, k: current, v: current, q: None, attended: None, rotation: None };
            let [k, v] = &mut memory;
            store_head(&layout, 0, [k, v], &store, &Plan::new(&ints).unwrap()).unwrap();
        }
        (layout, memory, planner.locate(0).unwrap())
    }

    fn decoded(layout: &Layout, memory: &[Vec<u8>; 2], location: &[Location]) -> Vec<Vec<f32>> {
        let sides = [Side::Key, Side::Value].into_iter().zip(memory);
        sides
            .map(|(side, memory)| {
                let mut out = vec![0f32; N_CELLS * DIM];
                dequantize_head(layout, side, memory, location, None, 0..N_CELLS, &mut out).unwrap();
                out
            })
            .collect()
    }

    fn erase(layout: &Layout, memory: &mut [Vec<u8>; 2], location: &[Location]) {
        for (side, memory) in [Side::Key, Side::Value].into_iter().zip(memory) {
            erase_head(layout, side, memory, location).unwrap();
        }
    }

    #[test]
    fn other_rows_stay_bit_for_bit() {
        for spec in SPECS {
            let (layout, mut memory, mut location) = stored(spec, &[70]);
            (60..80).chain([1, 140]).for_each(|cell| location[cell] = Location::default());
            let before = decoded(&layout, &memory, &location);
            erase(&layout, &mut memory, &location);
            assert_eq!(decoded(&layout, &memory, &location), before, "{spec}");
        }
    }

    /// In pages no row of which is left, in slots and in the pool, nothing tells what was there.
    #[test]
    fn erased_rows_leave_no_trace_outside_pages_that_others_share() {
        for spec in SPECS {
            let foreign: Vec<usize> = (64..128).chain(140..150).collect();
            let [a, b] = [&[][..], &foreign].map(|changed| {
                let (layout, mut memory, mut location) = stored(spec, changed);
                foreign.iter().for_each(|&cell| location[cell] = Location::default());
                erase(&layout, &mut memory, &location);
                // What was learned is the stream's, not a row.
                HeadMut::new(&layout, Side::Key, &mut memory[0]).learned_mut().fill(0);
                memory
            });
            assert!(a == b, "{spec}");
            assert_ne!(stored(spec, &[]).1, stored(spec, &foreign).1, "{spec}: the rows must matter before");
        }
    }

    /// In a page that others share, the row's own codes, step and mid-point say nothing about it.
    #[test]
    fn a_row_of_a_shared_page_decodes_to_the_same_whatever_it_was() {
        for spec in SPECS {
            let (layout, memory, location) = stored(spec, &[]);
            let mut kept = location.clone();
            kept[70] = Location::default();
            let mut overwritten = memory.clone();
            for (side, memory) in [Side::Key, Side::Value].into_iter().zip(&mut overwritten) {
                let mut head = HeadMut::new(&layout, side, memory);
                let (header, bytes) = head.page_mut(1);
                let mut rows: Vec<f32> = (0..DIM).map(|i| (i * 37 % 11) as f32 - 5.0).collect();
                let (at, none): (_, &[f32]) = (&[6], &[]);
                let mut rows = SealRows {
                    place: None,
                    at,
                    rows: &mut rows,
                    fresh: false,
                    exact: &[],
                    channel_weights: none,
                    last_exponents: &mut [],
                    attention: none,
                };
                layout.side(side).codec.seal(header, bytes, &mut rows);
            }
            assert_ne!(memory, overwritten, "{spec}");
            let [a, b] = [memory, overwritten].map(|mut memory| {
                erase(&layout, &mut memory, &kept);
                memory
            });
            assert!(a == b, "{spec}");
        }
    }

    #[test]
    fn what_is_no_location_is_refused() {
        let (layout, mut memory, mut location) = stored(SPECS[0], &[]);
        let mut refused = |location: &[Location]| erase_head(&layout, Side::Key, &mut memory[0], location);
        assert!(refused(&location[1..]).is_err());
        location[3] = Location { places: IN_SLOT, slot: layout.n_slots() as u32, turned: 0 };
        assert!(refused(&location).is_err());
    }
}
