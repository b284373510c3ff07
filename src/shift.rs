//! Moving positions: what a K-shift does to the keys that a layer holds.
//!
//! Exact rows are turned where they are. Page rows stay as they are: the planner notes how far they have moved since they
//! were encoded, and attention turns the query back by it ([`crate::rotation`]). Only a page whose cells would have moved
//! by more different distances than a plan can say ([`crate::plan::MAX_TURNS`]) is encoded again.
#![forbid(unsafe_code)]

use crate::codec::page::{SealRows, Side};
use crate::error::{Error, Result};
use crate::head::{Head, HeadMut};
use crate::layout::Layout;
use crate::learned::read_moments;
use crate::planner::{Recoded, Shift};
use crate::pool;
use crate::rotation::{Angles, Rotation};
use crate::rows::{finite, write_half};
use crate::shape::MAX_HEAD_DIM;

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

/// Carries out a shift for one KV head of one layer, whose key region is given ([`Layout::head_bytes`]), and with it, for
/// layouts that predict values from keys, its value region.
///
/// # Errors
///
/// [`crate::error::Status::InvalidArgument`] if the shift is of another cache or the heads have fewer values than the
/// rotation turns, or the values are missing.
pub fn shift_head(
    layout: &Layout,
    region: &mut [u8],
    values: Option<&mut [u8]>,
    shift: &Shift,
    rotation: &Rotation,
) -> Result<()> {
    let mut head = HeadMut::new(layout, Side::Key, region);
    let mut values = match (layout.predictor(), values) {
        (None, _) => None,
        (Some(_), Some(region)) => Some(HeadMut::new(layout, Side::Value, region)),
        (Some(_), None) => {
            return Err(Error::invalid("values of this recipe are predicted from keys: give their memory"))
        }
    };
    let dim = head.layout.head_dim;
    rotation.check(dim)?;
    if (shift.moved.len(), shift.n_slots, shift.page) != (layout.n_cells(), layout.n_slots(), layout.page()) {
        return Err(Error::invalid("the shift is of a cache with other sizes than the layout's"));
    }
    let mut turner = Turner { rotation, distance: 0, angles: Angles::default() };
    let mut row = [0f32; MAX_HEAD_DIM as usize];
    let row = &mut row[..dim];
    for &(slot, distance) in &shift.slots {
        head.as_ref().read_slot(slot, row);
        turner.turn(row, distance);
        head.write_slot(slot, row);
    }
    for index in 0..layout.pool_rows() {
        let cell = pool::cells(head.as_ref()).nth(index).flatten();
        let distance = cell.and_then(|cell| shift.moved.get(cell)).copied().unwrap_or(0);
        if distance != 0 {
            head.as_ref().read_pooled(index, row);
            turner.turn(row, distance);
            write_half(head.pool_row_mut(index), row);
        }
    }
    for page in &shift.recoded {
        // What values are predicted from changes under them.
        let old = values.as_ref().map(|values| decoded_values(layout, [head.as_ref(), values.as_ref()], page));
        recode_page(&mut head, layout.page(), page, &mut turner);
        if let (Some(values), Some(old)) = (&mut values, old) {
            recode_values(layout, [&mut head, values], page, old);
        }
    }
    Ok(())
}

/// The values of the rows of a page, as they are read.
fn decoded_values(layout: &Layout, [key, value]: [Head; 2], page: &[Recoded]) -> Vec<f32> {
    let mut rows = vec![0f32; page.len() * value.layout.head_dim];
    for (from, to) in page.iter().zip(rows.chunks_exact_mut(value.layout.head_dim)) {
        let (index, row) = (from.cell / layout.page(), from.cell % layout.page());
        match from.slot {
            Some(slot) => value.read_slot(slot, to),
            None => {
                value.decode(index, row, to);
                layout.predictor().into_iter().for_each(|predictor| predictor.add(key.page(index), row, to));
            }
        }
        to.iter_mut().for_each(|x| *x = finite(*x));
    }
    rows
}

/// Encodes the values of a page anew beside its recoded keys, with the parameters that their page has.
fn recode_values(layout: &Layout, [key, value]: [&mut HeadMut; 2], page: &[Recoded], mut rows: Vec<f32>) {
    let index = page[0].cell / layout.page();
    let at: Vec<u32> = page.iter().map(|row| (row.cell % layout.page()) as u32).collect();
    let (header, bytes) = key.page_mut(index);
    layout.predictor().into_iter().for_each(|predictor| predictor.take(header, bytes, &at, &mut rows));
    let (at, rows, last_exponents) = (&at[..], &mut rows[..], &mut [][..]);
    let [channel_weights, attention]: [&[f32]; 2] = [&[], &[]];
    let rows = SealRows { at, rows, fresh: false, exact: &[], channel_weights, last_exponents, attention, place: None };
    value.seal(index, rows);
}

/// Encodes a page anew from its live rows. Rows that are exact somewhere are taken from there. Decoded rows are scaled so
/// that what they decode to is no longer than before: unbiased steps would add the error of every coding to the length,
/// and long keys draw attention.
fn recode_page(head: &mut HeadMut, page_cells: usize, page: &[Recoded], turner: &mut Turner) {
    let (dim, index) = (head.layout.head_dim, page[0].cell / page_cells);
    let at: Vec<u32> = page.iter().map(|row| (row.cell % page_cells) as u32).collect();
    let mut rows = vec![0f32; page.len() * dim];
    let mut exact = vec![false; page.len()];
    for ((from, to), exact) in page.iter().zip(rows.chunks_exact_mut(dim)).zip(&mut exact) {
        let pooled = pool::find(head.as_ref(), from.cell);
        *exact = pooled.is_some();
        match (pooled, from.slot) {
            (Some(row), _) => head.as_ref().read_pooled(row, to),
            (None, Some(slot)) => head.as_ref().read_slot(slot, to),
            (None, None) => {
                head.as_ref().decode(index, from.cell % page_cells, to);
                turner.turn(to, from.turned);
            }
        }
    }
    let mut channel_weights = Vec::new();
    read_moments(head.as_ref().learned(), &mut channel_weights);
    let seal = |head: &mut HeadMut, rows: &[f32]| {
        let (at, exact, channel_weights) = (&at[..], &exact[..], &channel_weights[..]);
        // Sealing works in its rows.
        let rows = &mut rows.to_vec();
        let last_exponents = &mut [];
        let rows =
            SealRows { place: None, at, rows, fresh: true, exact, channel_weights, last_exponents, attention: &[] };
        head.seal(index, rows);
    };
    seal(head, &rows);
    let mut decoded = vec![0f32; dim];
    for ((from, row), exact) in page.iter().zip(rows.chunks_exact_mut(dim)).zip(&exact) {
        if *exact || from.slot.is_some() {
            continue;
        }
        head.as_ref().decode(index, from.cell % page_cells, &mut decoded);
        let (was, is) = (length(row), length(&decoded));
        if is > was {
            row.iter_mut().for_each(|x| *x *= was / is);
        }
    }
    seal(head, &rows);
}

fn length(row: &[f32]) -> f32 {
    row.iter().map(|x| x * x).sum::<f32>().sqrt()
}
