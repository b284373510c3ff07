//! After attention: seal pages as the plan says, then keep the new rows exact. Also the way back, from bytes to rows.
#![forbid(unsafe_code)]

use std::ops::Range;

use crate::codec::page::{RowPlaces, SealRows, Side};
use crate::error::{Error, Result};
use crate::head::{Head, HeadMut};
use crate::layout::{check_plan, Layout};
use crate::learned::{learn_queries, read_moments, KeyError, Sample};
use crate::location::Location;
use crate::plan::{Plan, Record, Seal, Source, View, CELLS_PER_WORD};
use crate::pool;
use crate::recent::{self, Attended};
use crate::rotation::{Angles, Rotation};
use crate::rows::{finite, write_half, Rows};

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
    /// `[n_cells]`: the position of each cell's token, the ubatch's included, for layouts that want them
    /// ([`Layout::wants_positions`]). Cells without a token do not matter.
    pub positions: Option<&'a [i32]>,
}

/// Executes a plan for one KV head of one layer: encodes the rows that leave the exact part, then writes the ubatch's rows
/// that stay exact to their slots. `[k, v]` are that head's key and value regions ([`Layout::head_bytes`]).
///
/// # Errors
///
/// [`crate::error::Status::InvalidArgument`] if the plan was made for other sizes.
pub fn store_head(layout: &Layout, head: usize, [k, v]: [&mut [u8]; 2], rows: &StoreRows, plan: &Plan) -> Result<()> {
    check_plan(layout, plan)?;
    check_rotation(layout, plan, rows.rotation)?;
    check_positions(layout, rows.positions)?;
    let mut heads = [HeadMut::new(layout, Side::Key, k), HeadMut::new(layout, Side::Value, v)];
    if plan.starts_anew() {
        forget(&mut heads);
    }
    if let Some(q) = &rows.q {
        learn_queries(layout.shape(), head, heads[0].learned_mut(), q, plan.n_tokens());
        if let Some(attended) = rows.attended.as_ref().filter(|_| layout.attn_window() > 0) {
            recent::remember(layout, head, &mut heads[0], q, attended, plan.n_tokens());
        }
    }
    if layout.pool().is_some() {
        pool::drop_stale(&mut heads, plan);
    }
    let mut page = SealedPage::default();
    let mut records = plan.records().peekable();
    while let Some(first) = records.next() {
        page.records.clear();
        page.records.push(first);
        while let Some(record) = records.next_if(|r| r.cell / layout.page() == first.cell / layout.page()) {
            page.records.push(record);
        }
        page.find_rows(layout, plan, rows.positions);
        seal_page(layout, head, &mut heads, rows, &mut page);
    }
    for (to, current) in heads.iter_mut().zip([&rows.k, &rows.v]) {
        for (row, &slot) in plan.row_slots().iter().enumerate().filter(|(_, slot)| **slot >= 0) {
            to.write_slot(slot as usize, current.row(row, head, to.layout.head_dim));
        }
    }
    Ok(())
}

/// Makes a head as new, but for what is known of the model rather than of its tokens: how far packed keys are off.
fn forget(heads: &mut [HeadMut; 2]) {
    let error = KeyError::read(heads[0].as_ref().learned());
    heads.iter_mut().for_each(|head| head.remembered_mut().fill(0));
    error.write(heads[0].learned_mut());
}

/// One page on its way, with its buffers.
#[derive(Default)]
struct SealedPage {
    records: Vec<Record>,
    /// The cells to encode, ascending, and where their exact rows are; `None`: in the page itself.
    sources: Vec<(usize, Option<Source>)>,
    /// For each of them by how much its row has moved since the page was encoded first.
    turned: Vec<i32>,
    at: Vec<u32>,
    rows: Vec<f32>,
    /// For each the row of the outlier pool that it enters.
    pooled: Vec<Option<usize>>,
    /// For each whether it is exact in the pool.
    exact: Vec<bool>,
    channel_weights: Vec<f32>,
    attention: Vec<f32>,
    /// Where the rows were when the page was encoded; empty if the layout does not want to know.
    positions: Vec<i32>,
    /// Values that are decoded before the page of the keys that predict them is made anew.
    values: Vec<f32>,
}

impl SealedPage {
    /// What the plan says of the page of the records.
    fn find_rows(&mut self, layout: &Layout, plan: &Plan, positions: Option<&[i32]>) {
        let Record { cell, seal, .. } = self.records[0];
        let page = cell / layout.page();
        let bits = plan.page_bits(View::After, page);
        let stays = |row: usize| bits[row / CELLS_PER_WORD] >> (row % CELLS_PER_WORD) & 1 == 1;
        let mut records = self.records.iter().peekable();
        self.sources.clear();
        for (row, cell) in (page * layout.page()..(page + 1) * layout.page()).enumerate() {
            if let Some(record) = records.next_if(|record| record.cell == cell) {
                self.sources.push((cell, Some(record.source)));
            } else if seal == Seal::Renew && stays(row) {
                self.sources.push((cell, None));
            }
        }
        let turned = |cell: usize| if seal == Seal::Fresh { 0 } else { plan.turned(cell) };
        self.turned.clear();
        self.turned.extend(self.sources.iter().map(|&(cell, _)| turned(cell)));
        self.positions.clear();
        if let Some(positions) = positions.filter(|_| layout.wants_positions()) {
            let encoded = self.sources.iter().zip(&self.turned).map(|(&(cell, _), turned)| (cell, *turned));
            self.positions
                .extend(encoded.map(|(cell, turned)| positions.get(cell).map_or(0, |pos| pos.wrapping_sub(turned))));
        }
        self.at.clear();
        self.at.extend(self.sources.iter().map(|(cell, _)| (cell % layout.page()) as u32));
    }

    /// Copies the rows of one side together as they are now. `rotation` is that of keys, `index` the head's number.
    fn gather(&mut self, layout: &Layout, head: Head, rotation: Option<&Rotation>, current: &Rows, index: usize) {
        let dim = head.layout.head_dim;
        let mut angles = Angles::default();
        self.rows.clear();
        self.rows.resize(self.sources.len() * dim, 0.0);
        let rows = self.rows.chunks_exact_mut(dim);
        for ((&(cell, source), &distance), to) in self.sources.iter().zip(&self.turned).zip(rows) {
            match source {
                Some(Source::Slot(slot)) => head.read_slot(slot, to),
                Some(Source::Row(row)) => to.copy_from_slice(current.row(row, index, dim)),
                None => {
                    let turn = rotation.map(|rotation| (rotation, distance));
                    read_from_page(layout, head, cell, turn, &mut angles, to);
                }
            }
            to.iter_mut().for_each(|x| *x = finite(*x));
        }
    }

    /// Gathers values that keys predict while their page is as it was.
    fn gather_predicted(&mut self, layout: &Layout, heads: &[HeadMut; 2], current: &Rows, index: usize) {
        let Some(predictor) = layout.predictor() else { return };
        let [key, value] = [heads[0].as_ref(), heads[1].as_ref()];
        self.gather(layout, value, None, current, index);
        for (&(cell, source), to) in self.sources.iter().zip(self.rows.chunks_exact_mut(value.layout.head_dim)) {
            if source.is_none() {
                predictor.add(key.page(cell / layout.page()), cell % layout.page(), to);
                to.iter_mut().for_each(|x| *x = finite(*x));
            }
        }
        std::mem::swap(&mut self.rows, &mut self.values);
    }
}

/// Encodes one page, keys first: they decide which tokens enter the outlier pool, and may predict the values.
fn seal_page(layout: &Layout, index: usize, heads: &mut [HeadMut; 2], rows: &StoreRows, sealed: &mut SealedPage) {
    let Record { cell, seal, .. } = sealed.records[0];
    let page = cell / layout.page();
    if seal == Seal::Fresh && layout.pool().is_some() {
        pool::give_back(heads, page * layout.page()..(page + 1) * layout.page());
    }
    sealed.gather_predicted(layout, heads, &rows.v, index);
    for (side, current) in [(Side::Key, &rows.k), (Side::Value, &rows.v)] {
        let rotation = rows.rotation.filter(|_| side == Side::Key);
        match layout.predictor().filter(|_| side == Side::Value) {
            Some(predictor) => {
                std::mem::swap(&mut sealed.rows, &mut sealed.values);
                let (header, bytes) = heads[0].page_mut(page);
                predictor.take(header, bytes, &sealed.at, &mut sealed.rows);
            }
            None => sealed.gather(layout, heads[side as usize].as_ref(), rotation, current, index),
        }
        let head = &mut heads[side as usize];
        let dim = head.layout.head_dim;
        let SealedPage { sources, turned, at, rows: gathered, pooled, exact, channel_weights, attention, .. } = sealed;
        let place = (!sealed.positions.is_empty()).then(|| RowPlaces { head: index, positions: &sealed.positions });
        if side == Side::Key {
            pooled.clear();
            // Rows that join a page are too few to tell an outlier among.
            if let Some(pool) = layout.pool().filter(|_| seal == Seal::Fresh) {
                pooled.extend(pool::trace(pool, head.as_ref(), gathered));
            }
            let is_member = |cell: usize| pool::find(head.as_ref(), cell).is_some();
            exact.clear();
            match seal {
                Seal::Fresh => exact.extend(pooled.iter().map(Option::is_some)),
                Seal::Renew => exact.extend(sources.iter().map(|(cell, _)| is_member(*cell))),
                Seal::Join => {}
            }
            recent::attention(layout, head.as_ref(), gathered, attention);
        }
        for (i, row) in pooled.iter().enumerate() {
            let Some(row) = *row else { continue };
            write_half(head.pool_row_mut(row), &gathered[i * dim..][..dim]);
            pool::set_cell(head, row, Some(sources[i].0));
        }
        if let Some(rotation) = rotation {
            turn_back(rotation, turned, gathered);
        }
        read_moments(head.as_ref().learned(), channel_weights);
        let sample = (side == Side::Key).then(|| Sample::take(gathered, dim, exact));
        let fresh = seal != Seal::Join;
        let last_exponents = &mut [];
        let rows = SealRows { at, rows: gathered, fresh, exact, channel_weights, last_exponents, attention, place };
        head.seal(page, rows);
        if let Some(sample) = sample {
            let sealed = head.as_ref();
            let error = sample.error(channel_weights, |i, out| sealed.decode(page, at[i] as usize, out));
            let mut known = KeyError::read(sealed.learned());
            known.add(&error);
            known.write(head.learned_mut());
        }
    }
}

/// Reads the row of a cell that is in its page, or in the outlier pool instead, as it is now: a key in its page turned by a
/// distance.
fn read_from_page(
    layout: &Layout,
    head: Head,
    cell: usize,
    turn: Option<(&Rotation, i32)>,
    angles: &mut Angles,
    out: &mut [f32],
) {
    if let Some(row) = pool::find(head, cell) {
        head.read_pooled(row, out);
        return;
    }
    head.decode(cell / layout.page(), cell % layout.page(), out);
    if let Some((rotation, distance)) = turn.filter(|(_, distance)| *distance != 0) {
        rotation.angles(distance, angles);
        rotation.turn(out, angles);
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

/// Fails unless there are the positions that a layout wants.
fn check_positions(layout: &Layout, positions: Option<&[i32]>) -> Result<()> {
    if !layout.wants_positions() || positions.is_some_and(|positions| positions.len() == layout.n_cells()) {
        return Ok(());
    }
    Err(Error::invalid(format!("this recipe needs the position of each of the {} cells", layout.n_cells())))
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
    if side == Side::Value && layout.predictor().is_some() {
        return Err(Error::invalid("values of this recipe are predicted from keys: give the memory of both"));
    }
    dequantize_side(layout, side, region, location, rotation, cells, out)
}

/// Decodes the values of some cells of one head as [`dequantize_head`] does, `[k, v]` being that head's regions, of which a
/// layout without predicted values reads only the second.
pub fn dequantize_values(
    layout: &Layout,
    [k, v]: [&[u8]; 2],
    location: &[Location],
    cells: Range<usize>,
    out: &mut [f32],
) -> Result<()> {
    check_location(layout, location, &cells)?;
    dequantize_side(layout, Side::Value, v, location, None, cells.clone(), out)?;
    if let Some(predictor) = layout.predictor() {
        let keys = Head::new(layout, Side::Key, k);
        for (cell, out) in cells.zip(out.chunks_exact_mut(layout.side(Side::Value).head_dim)) {
            if location[cell].slot().is_none() && location[cell].in_page() {
                predictor.add(keys.page(cell / layout.page()), cell % layout.page(), out);
            }
        }
    }
    Ok(())
}

/// [`dequantize_head`], of values without what keys predict.
fn dequantize_side(
    layout: &Layout,
    side: Side,
    region: &[u8],
    location: &[Location],
    rotation: Option<&Rotation>,
    cells: Range<usize>,
    out: &mut [f32],
) -> Result<()> {
    let (is_key, head) = (side == Side::Key, Head::new(layout, side, region));
    if is_key
        && rotation.is_none()
        && location[cells.clone()].iter().any(|location| location.slot().is_none() && location.turned != 0)
    {
        return Err(no_rotation());
    }
    rotation.filter(|_| is_key).map_or(Ok(()), |rotation| rotation.check(head.layout.head_dim))?;
    let mut angles = Angles::default();
    for (cell, out) in cells.zip(out.chunks_exact_mut(head.layout.head_dim)) {
        if let Some(slot) = location[cell].slot() {
            head.read_slot(slot, out);
        } else if location[cell].in_page() {
            let turn = rotation.filter(|_| is_key).map(|rotation| (rotation, location[cell].turned));
            read_from_page(layout, head, cell, turn, &mut angles, out);
        } else {
            out.fill(0.0);
        }
    }
    Ok(())
}
