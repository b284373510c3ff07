//! Moving positions: what a K-shift does to the keys that a layer holds.
//!
//! Exact rows are turned where they are. Page rows stay as they are: the planner notes how far they have moved since they
//! were encoded, and attention turns the query back by it ([`crate::rotation`]). Only a page whose cells would have moved
//! by more different distances than a plan can say ([`crate::plan::MAX_TURNS`]) is encoded again.
#![forbid(unsafe_code)]

use crate::codec::page::{SealRows, Side};
use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::learned::read_moments;
use crate::planner::{Recoded, Shift};
use crate::pool;
use crate::rotation::{Angles, Rotation};
use crate::rows::{read_half, write_half};
use crate::shape::MAX_HEAD_DIM;
use crate::store::{read_slot, seal_rows, write_slot};

/// A rotation with the angles of the distance that was last asked for: shifts mostly have one.
struct Turner<'a> {
    rotation: &'a Rotation,
    distance: i32,
    angles: Angles,
}

impl Turner<'_> {
    fn turn(&mut self, row: &mut [f32], distance: i32) {
        if distance == 0 {
            return;
        }
        if distance != self.distance {
            self.rotation.angles(distance, &mut self.angles);
            self.distance = distance;
        }
        self.rotation.turn(row, &self.angles);
    }
}

/// Carries out a shift for one KV head of one layer, whose key region is given ([`Layout::head_bytes`]).
///
/// # Errors
///
/// [`crate::error::Status::InvalidArgument`] if the shift is of another cache or the heads have fewer values than the
/// rotation turns.
pub fn shift_head(layout: &Layout, region: &mut [u8], shift: &Shift, rotation: &Rotation) -> Result<()> {
    let side = layout.side(Side::Key);
    rotation.check(side.head_dim)?;
    if (shift.moved.len(), shift.n_slots, shift.page) != (layout.n_cells(), layout.n_slots(), layout.page()) {
        return Err(Error::invalid("the shift is of a cache with other sizes than the layout's"));
    }
    let mut turner = Turner { rotation, distance: 0, angles: Angles::default() };
    let mut row = [0f32; MAX_HEAD_DIM as usize];
    let row = &mut row[..side.head_dim];
    for &(slot, distance) in &shift.slots {
        read_slot(side, region, slot, row);
        turner.turn(row, distance);
        write_slot(side, region, slot, row);
    }
    for index in 0..layout.pool_rows() {
        let cell = pool::cells(side, region).nth(index).flatten();
        let distance = cell.and_then(|cell| shift.moved.get(cell)).copied().unwrap_or(0);
        if distance != 0 {
            read_half(side.pool_row(region, index), row);
            turner.turn(row, distance);
            write_half(side.pool_row_mut(region, index), row);
        }
    }
    for page in &shift.recoded {
        recode_page(layout, region, page, &mut turner);
    }
    Ok(())
}

/// Encodes a page anew from its live rows. Rows that are exact somewhere are taken from there. Decoded rows are scaled so
/// that what they decode to is no longer than before: unbiased steps would add the error of every coding to the length,
/// and long keys draw attention.
fn recode_page(layout: &Layout, region: &mut [u8], page: &[Recoded], turner: &mut Turner) {
    let side = layout.side(Side::Key);
    let (dim, index) = (side.head_dim, page[0].cell / layout.page());
    let at: Vec<u32> = page.iter().map(|row| (row.cell % layout.page()) as u32).collect();
    let mut rows = vec![0f32; page.len() * dim];
    let mut exact = vec![false; page.len()];
    for ((from, to), exact) in page.iter().zip(rows.chunks_exact_mut(dim)).zip(&mut exact) {
        let pooled = pool::find(side, region, from.cell);
        *exact = pooled.is_some();
        match (pooled, from.slot) {
            (Some(row), _) => read_half(side.pool_row(region, row), to),
            (None, Some(slot)) => read_slot(side, region, slot, to),
            (None, None) => {
                side.codec.decode(side.page(region, index), from.cell % layout.page(), to);
                turner.turn(to, from.turned);
            }
        }
    }
    let mut channel_weights = Vec::new();
    read_moments(side.learned(region), &mut channel_weights);
    let seal = |region: &mut [u8], rows: &[f32]| {
        let (at, exact, channel_weights) = (&at[..], &exact[..], &channel_weights[..]);
        // Sealing works in its rows.
        let rows = &mut rows.to_vec();
        let last_exponents = &mut [];
        let rows = SealRows { at, rows, fresh: true, exact, channel_weights, last_exponents, attention: &[] };
        seal_rows(side, region, index, rows);
    };
    seal(region, &rows);
    let mut decoded = vec![0f32; dim];
    for ((from, row), exact) in page.iter().zip(rows.chunks_exact_mut(dim)).zip(&exact) {
        if *exact || from.slot.is_some() {
            continue;
        }
        side.codec.decode(side.page(region, index), from.cell % layout.page(), &mut decoded);
        let (was, is) = (length(row), length(&decoded));
        if is > was {
            row.iter_mut().for_each(|x| *x *= was / is);
        }
    }
    seal(region, &rows);
}

fn length(row: &[f32]) -> f32 {
    row.iter().map(|x| x * x).sum::<f32>().sqrt()
}
