//! After attention: seal pages as the plan says, then keep the new rows exact. Also the way back, from bytes to rows.
#![forbid(unsafe_code)]

use std::ops::Range;

use crate::codec::page::{SealRows, Side};
use crate::error::{Error, Result};
use crate::layout::{check_plan, Layout, SideLayout};
use crate::learned::{exponents, learn_queries, read_moments, KeyError, Sample};
use crate::location::Location;
use crate::plan::{Plan, Record, Source};
use crate::pool;
use crate::recent::{self, Attended};
use crate::rotation::{Angles, Rotation};
use crate::rows::{finite, read_half, write_half, Rows};
use crate::shape::MAX_HEAD_DIM;

/// Writes a row to an exact slot.
pub(crate) fn write_slot(side: &SideLayout, region: &mut [u8], slot: usize, row: &[f32]) {
    let mut kept = [0f32; MAX_HEAD_DIM as usize];
    let kept = &mut kept[..row.len()];
    kept.iter_mut().zip(row).for_each(|(to, x)| *to = finite(*x));
    write_half(side.slot_mut(region, slot), kept);
}

/// Reads a row from an exact slot.
pub(crate) fn read_slot(side: &SideLayout, region: &[u8], slot: usize, out: &mut [f32]) {
    read_half(side.slot(region, slot), out);
    out.iter_mut().for_each(|x| *x = finite(*x));
}

/// What a layer's store step takes in, `[n_tokens][heads][head_dim]`.
#[derive(Clone, Copy)]
pub struct StoreRows<'a> {
    /// Keys of the ubatch.
    pub k: Rows<'a>,
    /// Values of the ubatch.
    pub v: Rows<'a>,
    /// Queries of the ubatch, from which codecs learn which channels matter. `None`: they learn nothing.
    pub q: Option<Rows<'a>>,
    /// What attention made of the queries, for layouts with an attention window. `None`: widths of tokens that are
    /// encoded now do not follow these queries.
    pub attended: Option<Attended<'a>>,
    /// How keys turn when their positions move. `None`: no position has moved, the plan has no turns.
    pub rotation: Option<&'a Rotation>,
}

/// Executes a plan for one KV head of one layer: encodes the rows that leave the exact part, then writes the ubatch's rows
/// that stay exact to their slots. `regions` are that head's key and value regions ([`Layout::head_bytes`]).
///
/// # Errors
///
/// [`crate::error::Status::InvalidArgument`] if the plan was made for other sizes.
pub fn store_head(
    layout: &Layout,
    head: usize,
    mut regions: [&mut [u8]; 2],
    rows: &StoreRows,
    plan: &Plan,
) -> Result<()> {
    check_plan(layout, plan)?;
    check_rotation(layout, plan, rows.rotation)?;
    if plan.starts_anew() {
        forget(layout, &mut regions);
    }
    if let Some(q) = &rows.q {
        let learned = layout.side(Side::Key).learned_mut(regions[0]);
        learn_queries(layout, head, learned, q, plan.n_tokens());
        if let Some(attended) = rows.attended.as_ref().filter(|_| layout.attn_window() > 0) {
            recent::remember(layout, head, regions[0], q, attended, plan.n_tokens());
        }
    }
    if layout.pool().is_some() {
        pool::drop_stale(layout, &mut regions, plan);
    }
    let mut page = SealedPage::default();
    let mut records = plan.records().peekable();
    while let Some(first) = records.next() {
        page.records.clear();
        page.records.push(first);
        while let Some(record) = records.next_if(|r| r.cell / layout.page() == first.cell / layout.page()) {
            page.records.push(record);
        }
        page.turned.clear();
        page.turned.extend(page.records.iter().map(|record| if record.fresh { 0 } else { plan.turned(record.cell) }));
        seal_page(layout, head, &mut regions, rows, &mut page);
    }
    for (side, current) in [(Side::Key, &rows.k), (Side::Value, &rows.v)] {
        let side_layout = layout.side(side);
        for (row, &slot) in plan.row_slots().iter().enumerate().filter(|(_, slot)| **slot >= 0) {
            let row = current.row(row, head, side_layout.head_dim);
            write_slot(side_layout, regions[side as usize], slot as usize, row);
        }
    }
    Ok(())
}

/// Makes a head as new, but for what is known of the model rather than of its tokens: how far packed keys are off.
fn forget(layout: &Layout, regions: &mut [&mut [u8]; 2]) {
    let key = layout.side(Side::Key);
    let error = KeyError::read(key.learned(regions[0]));
    for side in [Side::Key, Side::Value] {
        layout.side(side).remembered_mut(regions[side as usize]).fill(0);
    }
    error.write(key.learned_mut(regions[0]));
}

/// One page on its way, with its buffers.
#[derive(Default)]
struct SealedPage {
    records: Vec<Record>,
    /// For each record by how much the rows that it joins have moved.
    turned: Vec<i32>,
    at: Vec<u32>,
    rows: Vec<f32>,
    /// For each record the row of the outlier pool that it enters.
    pooled: Vec<Option<usize>>,
    exact: Vec<bool>,
    channel_weights: Vec<f32>,
    attention: Vec<f32>,
}

/// Encodes the records of one page, keys first: they decide which tokens enter the outlier pool.
fn seal_page(layout: &Layout, head: usize, regions: &mut [&mut [u8]; 2], rows: &StoreRows, page: &mut SealedPage) {
    let SealedPage { records, turned, at, rows: gathered, pooled, exact, channel_weights, attention } = page;
    let (index, fresh) = (records[0].cell / layout.page(), records[0].fresh);
    at.clear();
    at.extend(records.iter().map(|record| (record.cell % layout.page()) as u32));
    if fresh && layout.pool().is_some() {
        pool::give_back(layout, regions, index);
    }
    for (side, current) in [(Side::Key, &rows.k), (Side::Value, &rows.v)] {
        let (side_layout, region) = (layout.side(side), &mut *regions[side as usize]);
        let dim = side_layout.head_dim;
        gathered.clear();
        gathered.resize(records.len() * dim, 0.0);
        for (record, to) in records.iter().zip(gathered.chunks_exact_mut(dim)) {
            match record.source {
                Source::Slot(slot) => read_slot(side_layout, region, slot, to),
                Source::Row(row) => {
                    to.iter_mut().zip(current.row(row, head, dim)).for_each(|(t, x)| *t = finite(*x));
                }
            }
        }
        if side == Side::Key {
            pooled.clear();
            // Rows that join a page whose range is fixed are too few to tell an outlier among.
            if let Some(pool) = layout.pool().filter(|_| fresh) {
                pooled.extend(pool::trace(layout, pool, region, gathered));
            }
            exact.clear();
            exact.extend(pooled.iter().map(Option::is_some));
            recent::attention(layout, region, gathered, attention);
        }
        for (i, row) in pooled.iter().enumerate() {
            let Some(row) = *row else { continue };
            write_half(side_layout.pool_row_mut(region, row), &gathered[i * dim..][..dim]);
            pool::set_cell(side_layout, region, row, Some(records[i].cell));
        }
        if let Some(rotation) = rows.rotation.filter(|_| side == Side::Key) {
            turn_back(rotation, turned, gathered);
        }
        read_moments(side_layout.learned(region), channel_weights);
        let sample = (side == Side::Key).then(|| Sample::take(gathered, dim, exact));
        let rows = SealRows { at, rows: gathered, fresh, exact, channel_weights, last_exponents: &mut [], attention };
        seal_rows(side_layout, region, index, rows);
        if let Some(sample) = sample {
            let page = side_layout.page(region, index);
            let error = sample.error(channel_weights, |i, out| side_layout.codec.decode(page, at[i] as usize, out));
            let mut known = KeyError::read(side_layout.learned(region));
            known.add(&error);
            known.write(side_layout.learned_mut(region));
        }
    }
}

/// Turns keys back to where the rows that they join were encoded.
fn turn_back(rotation: &Rotation, turned: &[i32], keys: &mut [f32]) {
    let mut angles = Angles::default();
    for (&distance, key) in turned.iter().zip(keys.chunks_exact_mut(keys.len() / turned.len())) {
        if distance != 0 {
            rotation.angles(distance, &mut angles);
            rotation.turn_back(key, &angles);
        }
    }
}

/// Encodes rows into page `index`, which goes on from the factors of the page sealed before it.
pub(crate) fn seal_rows(side: &SideLayout, region: &mut [u8], index: usize, rows: SealRows) {
    let mut kept = [0u8; MAX_HEAD_DIM as usize];
    let last = exponents(side.learned_mut(region));
    let kept = &mut kept[..last.len()];
    kept.copy_from_slice(last);
    let (header, bytes) = side.page_mut(region, index);
    side.codec.seal(header, bytes, &mut SealRows { last_exponents: kept, ..rows });
    exponents(side.learned_mut(region)).copy_from_slice(kept);
}

pub(crate) fn check_location(layout: &Layout, location: &[Location], cells: &Range<usize>) -> Result<()> {
    if cells.start > cells.end || cells.end > layout.n_cells() || location.len() != layout.n_cells() {
        return Err(Error::invalid(format!("cells {cells:?} are not all in the cache")));
    }
    match location[cells.clone()].iter().find(|location| !location.is_possible(layout.n_slots())) {
        Some(location) => Err(Error::invalid(format!("{location:?} is not possible with {} slots", layout.n_slots()))),
        None => Ok(()),
    }
}

/// Fails unless the turns of the plan can be carried out.
pub(crate) fn check_rotation(layout: &Layout, plan: &Plan, rotation: Option<&Rotation>) -> Result<()> {
    match rotation {
        Some(rotation) => rotation.check(layout.side(Side::Key).head_dim),
        None if plan.n_turns() == 0 => Ok(()),
        None => Err(no_rotation()),
    }
}

fn no_rotation() -> Error {
    Error::invalid("positions have moved since pages were encoded: give the rotation of the layer's keys")
}

/// Decodes the rows of some cells of one head into `out`, `[cells.len()][head_dim]`; absent cells give zeros. Keys are turned
/// to where their positions are now, which needs the layer's `rotation` if any has moved.
pub fn dequantize_head(
    layout: &Layout,
    side: Side,
    region: &[u8],
    location: &[Location],
    rotation: Option<&Rotation>,
    cells: Range<usize>,
    out: &mut [f32],
) -> Result<()> {
    check_location(layout, location, &cells)?;
    let (is_key, side) = (side == Side::Key, layout.side(side));
    if is_key
        && rotation.is_none()
        && location[cells.clone()].iter().any(|location| location.slot().is_none() && location.turned != 0)
    {
        return Err(no_rotation());
    }
    rotation.filter(|_| is_key).map_or(Ok(()), |rotation| rotation.check(side.head_dim))?;
    let mut angles = Angles::default();
    for (cell, out) in cells.zip(out.chunks_exact_mut(side.head_dim)) {
        if let Some(slot) = location[cell].slot() {
            read_slot(side, region, slot, out);
        } else if !location[cell].in_page() {
            out.fill(0.0);
        } else if let Some(row) = pool::find(side, region, cell) {
            read_half(side.pool_row(region, row), out);
        } else {
            side.codec.decode(side.page(region, cell / layout.page()), cell % layout.page(), out);
            if let Some(rotation) = rotation.filter(|_| is_key && location[cell].turned != 0) {
                rotation.angles(location[cell].turned, &mut angles);
                rotation.turn(out, &angles);
            }
        }
    }
    Ok(())
}
