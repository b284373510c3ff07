//! One tile of query rows of one KV head against one split of the cache.
#![forbid(unsafe_code)]

use std::cell::RefCell;
use std::ops::Range;

use super::args::alibi_slope;
use super::blocks::{
    blocks, cell_mask, current_cells, is_in_page, mask_columns, page_mask, seen_rows, slot_cells, Block, PageRows,
    Visible, EXACT_BLOCK,
};
use super::partial::finish;
use super::AttendArgs;
use crate::codec::page::Side;
use crate::codec::query::{Probabilities, Query};
use crate::head::Head;
use crate::layout::Layout;
use crate::plan::MAX_TURNS;
use crate::pool;
use crate::rotation::Angles;
use crate::simd::aligned::Aligned;
use crate::simd::exact::{ExactRows, Logits, State};

/// Buffers of a thread, kept from call to call so that the path allocates nothing.
#[derive(Default)]
pub(super) struct Workspace {
    q: Vec<f32>,
    /// What is prepared of it: turned back by this distance.
    query: Query,
    query_turned: i32,
    turned: Vec<f32>,
    angles: Angles,
    /// Scores of the rows of a page that have moved by another distance than those before.
    scores: Aligned<f32>,
    probabilities: Probabilities,
    mask: Vec<f32>,
    exact: Aligned<f32>,
    slopes: Vec<f32>,
    mask_row: Vec<u32>,
    /// For each query row: it is not finite, and its output is NaN.
    spoiled: Vec<bool>,
    /// For each row of the head's outlier pool the cell, or -1 if that cell is not to be read from its page.
    pooled: Vec<i32>,
    state: State,
}

/// Calls `f` with this thread's buffers.
pub(super) fn with_workspace(f: impl FnOnce(&mut Workspace)) {
    thread_local!(static WORKSPACE: RefCell<Workspace> = RefCell::default());
    WORKSPACE.with_borrow_mut(f);
}

/// Attends the query tokens `tokens` of KV head `head` over split `split` and emits their rows.
pub(super) fn run(
    layout: &Layout,
    args: &AttendArgs,
    head: usize,
    tokens: Range<usize>,
    split: usize,
    work: &mut Workspace,
    emit: &mut dyn FnMut(usize, &[f32]),
) {
    let key = Head::of_stream(layout, Side::Key, args.k_mem, head);
    let value = Head::of_stream(layout, Side::Value, args.v_mem, head);
    prepare(layout, args, head, tokens.clone(), work);
    let n_rows = work.slopes.len();
    work.query_turned = 0;
    key.layout.codec.begin_query(&work.q, &mut work.query);
    let predictor = layout.predictor();
    work.state.reset(n_rows, value.layout.head_dim, predictor.map_or(0, |predictor| predictor.n_sums()));
    work.pooled.clear();
    work.pooled.extend(
        pool::cells(key).map(|cell| cell.filter(|cell| is_in_page(args, *cell)).map_or(-1, |cell| cell as i32)),
    );
    for block in blocks(args, split, layout.pool_rows() > 0) {
        match block {
            Block::Page(page) => {
                let columns = layout.page();
                let visible = page_mask(args, page, columns, tokens.clone(), &work.pooled, &mut work.mask);
                if visible == Visible::None {
                    continue;
                }
                work.probabilities.resize(n_rows, columns);
                page_scores(layout, args, key, page, visible, work);
                softmax(layout, args, visible, columns, work);
                if let Some(predictor) = predictor {
                    predictor.accumulate(key.page(page), &mut work.probabilities, &mut work.state.predicted);
                }
                value.layout.codec.accumulate(value.page(page), &mut work.probabilities, &mut work.state.packed);
            }
            Block::Slots(first) => {
                let cells = slot_cells(args, first);
                exact_block(layout, args, cells, tokens.clone(), work, |side, n, work| {
                    let head = if side == Side::Key { key } else { value };
                    layout.kernels().f16_to_f32(head.slots(first, n), &mut work.exact);
                });
            }
            Block::Pool => {
                let cells = std::mem::take(&mut work.pooled);
                exact_block(layout, args, &cells, tokens.clone(), work, |side, n, work| {
                    let head = if side == Side::Key { key } else { value };
                    layout.kernels().f16_to_f32(head.pool_rows(n), &mut work.exact);
                });
                work.pooled = cells;
            }
            Block::Current(first) => {
                let Some((k, v)) = args.current else { continue };
                let cells = current_cells(args, first);
                exact_block(layout, args, cells, tokens.clone(), work, |side, n, work| {
                    let (rows, dim) =
                        if side == Side::Key { (k, key.layout.head_dim) } else { (v, value.layout.head_dim) };
                    for (i, out) in work.exact.chunks_exact_mut(dim).take(n).enumerate() {
                        layout.kernels().copy_finite(rows.row(first + i, head, dim), out);
                    }
                });
            }
        }
    }
    if let Some(predictor) = predictor {
        predictor.finish(head, &work.state.predicted, &mut work.state.exact);
    }
    emit_rows(layout, args, head, tokens, split, work, emit);
}

/// Largest magnitude of a query value, times the scale: with keys in the range of FP16, and whatever the head size and a
/// page's factors, no score overflows.
const MAX_QUERY: f32 = 1e20;

/// Gathers the tile's query rows (scaled) and what belongs to each of them. A row that is not finite goes through the kernels
/// as zeros, so that none of them has to care, and is marked.
fn prepare(layout: &Layout, args: &AttendArgs, head: usize, tokens: Range<usize>, work: &mut Workspace) {
    let (gqa, dim) = (layout.shape().gqa_ratio(), layout.shape().head_dim_k as usize);
    work.q.clear();
    work.slopes.clear();
    work.mask_row.clear();
    work.spoiled.clear();
    for (i, token) in tokens.enumerate() {
        for q_head in head * gqa..(head + 1) * gqa {
            let first = work.q.len();
            work.q.extend(args.q.row(token, q_head, dim).iter().map(|x| x * args.scale));
            let row = &mut work.q[first..];
            let is_finite = row.iter().fold(true, |finite, x| finite & (x.abs() <= MAX_QUERY));
            if !is_finite {
                row.fill(0.0);
            }
            work.spoiled.push(!is_finite);
            work.slopes.push(alibi_slope(q_head, layout.shape().n_heads as usize, args.max_bias));
            work.mask_row.push(i as u32);
        }
    }
}

/// Scores of all query rows against the keys of a page. Where its rows have moved since they were encoded, the query is
/// turned back by the same distance; rows that moved by different ones are scored one distance after the other.
fn page_scores(layout: &Layout, args: &AttendArgs, key: Head, page: usize, visible: Visible, work: &mut Workspace) {
    let (codec, page_ref, columns) = (&key.layout.codec, key.page(page), layout.page());
    let mut turns = args.plan.turns(page).peekable();
    if turns.peek().is_none() {
        turn_query(layout, args, 0, work);
        codec.scores(page_ref, &mut work.query, &mut work.probabilities.p);
        return;
    }
    let seen = seen_rows(visible, &work.mask, columns);
    let mut unmoved = seen;
    let mut groups: [(i32, PageRows); MAX_TURNS + 1] = Default::default();
    let mut n = 0;
    for turn in turns.take(MAX_TURNS) {
        groups[n] = (turn.distance, seen.both(turn.cells));
        unmoved = unmoved.without(turn.cells);
        n += 1;
    }
    groups[n] = (0, unmoved);
    let mut is_first = true;
    for (distance, rows) in groups.iter().filter(|(_, rows)| !rows.is_empty()) {
        turn_query(layout, args, *distance, work);
        if is_first {
            codec.scores(page_ref, &mut work.query, &mut work.probabilities.p);
            is_first = false;
            continue;
        }
        work.scores.resize(work.probabilities.p.len(), 0.0);
        codec.scores(page_ref, &mut work.query, &mut work.scores);
        let scores = work.probabilities.p.chunks_exact_mut(columns).zip(work.scores.chunks_exact(columns));
        for (to, from) in scores.take(work.slopes.len()) {
            rows.iter().for_each(|row| to[row] = from[row]);
        }
    }
}

/// Prepares the query for keys that have moved by a distance since they were encoded.
fn turn_query(layout: &Layout, args: &AttendArgs, distance: i32, work: &mut Workspace) {
    if work.query_turned == distance {
        return;
    }
    work.query_turned = distance;
    work.turned.clone_from(&work.q);
    if let Some(rotation) = args.rotation.filter(|_| distance != 0) {
        rotation.angles(distance, &mut work.angles);
        let rows = work.turned.chunks_exact_mut(layout.shape().head_dim_k as usize);
        rows.for_each(|row| rotation.turn_back(row, &work.angles));
    }
    layout.side(Side::Key).codec.begin_query(&work.turned, &mut work.query);
}

fn softmax(layout: &Layout, args: &AttendArgs, visible: Visible, columns: usize, work: &mut Workspace) {
    let logits = Logits {
        softcap: args.softcap,
        slopes: &work.slopes,
        mask_row: &work.mask_row,
        mask: &work.mask,
        mask_is_zero: visible == Visible::All,
    };
    let n = work.slopes.len() * columns;
    layout.kernels().softmax(&mut work.probabilities.p[..n], columns, &logits, &mut work.state);
}

/// Attends a block of exact rows; `load` fills `work.exact` with the keys or values of the first so many of them.
fn exact_block(
    layout: &Layout,
    args: &AttendArgs,
    cells: &[i32],
    tokens: Range<usize>,
    work: &mut Workspace,
    load: impl Fn(Side, usize, &mut Workspace),
) {
    let (n, visible) = cell_mask(args, cells, tokens, &mut work.mask);
    if visible == Visible::None {
        return;
    }
    let columns = mask_columns(n);
    work.probabilities.resize(work.slopes.len(), columns);
    for side in [Side::Key, Side::Value] {
        let dim = layout.side(side).head_dim;
        work.exact.resize(EXACT_BLOCK * dim, 0.0);
        load(side, n, work);
        let rows = ExactRows { data: &work.exact, n, dim };
        if side == Side::Key {
            work.probabilities.p.fill(0.0);
            layout.kernels().exact_scores(&work.q, rows, &mut work.probabilities.p, columns);
            softmax(layout, args, visible, columns, work);
        } else {
            let p = &work.probabilities;
            layout.kernels().exact_accumulate(&p.p, columns, rows, &mut work.state.exact);
        }
    }
}

/// Joins the outputs of pages and exact rows and emits final rows or partial states.
fn emit_rows(
    layout: &Layout,
    args: &AttendArgs,
    head: usize,
    tokens: Range<usize>,
    split: usize,
    work: &mut Workspace,
    emit: &mut dyn FnMut(usize, &[f32]),
) {
    let (gqa, n_heads) = (layout.shape().gqa_ratio(), layout.shape().n_heads as usize);
    let value = layout.side(Side::Value);
    let (dim, state) = (value.head_dim, &mut work.state);
    let mut out = [0f32; crate::shape::MAX_HEAD_DIM as usize + 2];
    for row in 0..state.max.len() {
        let (token, q_head) = (tokens.start + row / gqa, head * gqa + row % gqa);
        let packed = &mut state.packed[row * dim..(row + 1) * dim];
        // All zero where no page was visible.
        if packed.iter().any(|x| *x != 0.0) {
            value.codec.untransform(packed);
        }
        let exact = &state.exact[row * dim..(row + 1) * dim];
        out.iter_mut().zip(packed.iter().zip(exact)).for_each(|(o, (p, e))| *o = p + e);
        if work.spoiled[row] {
            // In every split, so that nothing depends on which of them saw a token.
            out[..dim].fill(f32::NAN);
            (state.max[row], state.sum[row]) = (0.0, f32::NAN);
        }
        let at = token * n_heads + q_head;
        if args.n_splits == 1 {
            let sink_logit = args.sink_logits.map(|s| s[q_head]);
            let lse = finish(&mut out[..dim], state.max[row], state.sum[row], sink_logit);
            emit(at * dim, &out[..dim]);
            if args.with_lse {
                emit(args.n_tokens * n_heads * dim + at, &[lse]);
            }
        } else {
            out[dim] = state.max[row];
            out[dim + 1] = state.sum[row];
            emit((split * args.n_tokens * n_heads + at) * (dim + 2), &out[..dim + 2]);
        }
    }
}
