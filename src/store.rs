//! After attention: seal pages as the plan says, then keep the new rows exact. Also the way back, from bytes to rows.
#![forbid(unsafe_code)]

use half::f16;

use crate::attention::Rows;
use crate::codec::{SealRows, Side};
use crate::error::{Error, Result};
use crate::layout::{Layout, SideLayout};
use crate::plan::{Plan, Source, View};

/// Keys and values are kept within the range of FP16; NaN counts as 0.
#[inline(always)]
pub(crate) fn finite(x: f32) -> f32 {
    if x.is_nan() {
        0.0
    } else {
        x.clamp(-65504.0, 65504.0)
    }
}

/// Writes a row to an exact slot.
fn write_slot(side: &SideLayout, region: &mut [u8], slot: usize, row: &[f32]) {
    for (to, &x) in side.slot_mut(region, slot).chunks_exact_mut(2).zip(row) {
        to.copy_from_slice(&f16::from_f32(finite(x)).to_le_bytes());
    }
}

/// Reads a row from an exact slot.
fn read_slot(side: &SideLayout, region: &[u8], slot: usize, out: &mut [f32]) {
    for (from, x) in side.slot(region, slot).chunks_exact(2).zip(out) {
        *x = finite(f16::from_le_bytes([from[0], from[1]]).to_f32());
    }
}

/// Executes a plan for one side and KV head of one layer: encodes the rows that leave the exact part, then writes the
/// ubatch's rows that stay exact to their slots. `region` is that head's region ([`Layout::head_bytes`]), `current` holds
/// the ubatch's rows of all heads.
///
/// # Errors
///
/// [`crate::error::Status::InvalidArgument`] if the plan was made for other sizes.
pub fn store_head(
    layout: &Layout,
    side: Side,
    head: usize,
    region: &mut [u8],
    current: &Rows,
    plan: &Plan,
) -> Result<()> {
    check_plan(layout, plan)?;
    let side = layout.side(side);
    let (mut at, mut rows) = (Vec::new(), Vec::new());
    let mut records = plan.records().peekable();
    while let Some(first) = records.next() {
        let page = first.cell / layout.page();
        at.clear();
        rows.clear();
        let mut next = Some(first);
        while let Some(record) = next {
            let start = rows.len();
            rows.resize(start + side.head_dim, 0.0);
            match record.source {
                Source::Slot(slot) => read_slot(side, region, slot, &mut rows[start..]),
                Source::Row(row) => {
                    rows[start..]
                        .iter_mut()
                        .zip(current.row(row, head, side.head_dim))
                        .for_each(|(t, x)| *t = finite(*x));
                }
            }
            at.push((record.cell % layout.page()) as u32);
            next = records.next_if(|r| r.cell / layout.page() == page);
        }
        let (header, bytes) = side.page_mut(region, page);
        side.codec.seal(header, bytes, &mut SealRows { at: &at, rows: &mut rows, fresh: first.fresh });
    }
    for (row, &slot) in plan.row_slots().iter().enumerate().filter(|(_, slot)| **slot >= 0) {
        write_slot(side, region, slot as usize, current.row(row, head, side.head_dim));
    }
    Ok(())
}

/// Fails unless the plan was made for this layout.
pub(crate) fn check_plan(layout: &Layout, plan: &Plan) -> Result<()> {
    if plan.n_cells() == layout.n_cells() && plan.n_slots() == layout.n_slots() && plan.page() == layout.page() {
        debug_assert!(plan.slot_cells(View::Before).len() == layout.n_slots());
        return Ok(());
    }
    Err(Error::invalid(format!(
        "the plan is for {} cells, {} slots and pages of {}, the layout for {}, {} and {}",
        plan.n_cells(),
        plan.n_slots(),
        plan.page(),
        layout.n_cells(),
        layout.n_slots(),
        layout.page()
    )))
}

/// Location of a cell's row, as the planner reports it: exact slot if not negative, [`IN_PAGE`], or [`ABSENT`].
pub type Location = i32;
/// The row is in its page.
pub const IN_PAGE: Location = -2;
/// The cell holds nothing.
pub const ABSENT: Location = -1;

fn check_location(layout: &Layout, location: &[Location], cell0: usize, n: usize) -> Result<()> {
    let end = cell0.checked_add(n).filter(|end| *end <= layout.n_cells() && location.len() == layout.n_cells());
    let end = end.ok_or_else(|| Error::invalid(format!("cells {cell0} and {n} more are not all in the cache")))?;
    match location[cell0..end].iter().find(|l| **l >= layout.n_slots() as i32 || **l < IN_PAGE) {
        Some(l) => Err(Error::invalid(format!("{l} is not a location"))),
        None => Ok(()),
    }
}

/// Decodes the rows of cells `cell0..cell0 + n` of one head into `out`, `[n][head_dim]`; absent cells give zeros.
pub fn dequantize_head(
    layout: &Layout,
    side: Side,
    region: &[u8],
    location: &[Location],
    cell0: usize,
    n: usize,
    out: &mut [f32],
) -> Result<()> {
    check_location(layout, location, cell0, n)?;
    let side = layout.side(side);
    for (cell, out) in (cell0..cell0 + n).zip(out.chunks_exact_mut(side.head_dim)) {
        match location[cell] {
            ABSENT => out.fill(0.0),
            IN_PAGE => side.codec.decode(side.page(region, cell / layout.page()), cell % layout.page(), out),
            slot => read_slot(side, region, slot as usize, out),
        }
    }
    Ok(())
}

/// Replaces the key rows of those cells of `cell0..cell0 + changed.len()` for which `changed` is not 0: exact slots are
/// overwritten, page rows are encoded again, with a new page header if no other row of the page is left. `rows` is
/// `[n][head_dim_k]`.
pub fn requantize_k_head(
    layout: &Layout,
    region: &mut [u8],
    location: &[Location],
    cell0: usize,
    rows: &[f32],
    changed: &[u8],
) -> Result<()> {
    check_location(layout, location, cell0, changed.len())?;
    let side = layout.side(Side::Key);
    let (mut at, mut packed) = (Vec::new(), Vec::new());
    let mut cell = cell0;
    while cell < cell0 + changed.len() {
        let page = cell / layout.page();
        let end = ((page + 1) * layout.page()).min(cell0 + changed.len());
        at.clear();
        packed.clear();
        for i in cell..end {
            let row = &rows[(i - cell0) * side.head_dim..][..side.head_dim];
            match location[i] {
                _ if changed[i - cell0] == 0 => {}
                ABSENT => {}
                IN_PAGE => {
                    at.push((i % layout.page()) as u32);
                    packed.extend(row.iter().map(|x| finite(*x)));
                }
                slot => write_slot(side, region, slot as usize, row),
            }
        }
        if !at.is_empty() {
            let cells = page * layout.page()..((page + 1) * layout.page()).min(layout.n_cells());
            let fresh = cells.filter(|i| location[*i] == IN_PAGE).count() == at.len();
            let (header, bytes) = side.page_mut(region, page);
            side.codec.seal(header, bytes, &mut SealRows { at: &at, rows: &mut packed, fresh });
        }
        cell = end;
    }
    Ok(())
}
