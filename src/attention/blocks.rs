//! The blocks of rows that attention walks over, and the part of the mask that belongs to each.
#![forbid(unsafe_code)]

use std::ops::Range;

use super::{AttendArgs, Mask};
use crate::codec::page::MAX_PAGE;
use crate::plan::CELLS_PER_WORD;

/// Exact rows that are processed together.
pub(super) const EXACT_BLOCK: usize = 128;

/// One block of rows of the cache.
#[derive(Clone, Copy, Debug)]
pub(super) enum Block {
    /// A sealed page.
    Page(usize),
    /// Exact slots from this one.
    Slots(usize),
    /// The outlier pool of the head.
    Pool,
    /// Rows of the ubatch from this one.
    Current(usize),
}

/// The blocks of split `split` of `args.n_splits`: pages, then slots, the ubatch's rows, the pool. Pages and exact rows, which take
/// longer, are dealt out evenly each.
pub(super) fn blocks(args: &AttendArgs, split: usize, has_pool: bool) -> impl Iterator<Item = Block> + use<> {
    let n_pages = args.plan.n_pages(args.view());
    let n_slots = args.plan.n_slots().div_ceil(EXACT_BLOCK);
    let n_current = if args.current.is_some() { args.n_tokens.div_ceil(EXACT_BLOCK) } else { 0 };
    let n_exact = n_slots + n_current + usize::from(has_pool);
    let exact = move |i: usize| {
        if i < n_slots {
            Block::Slots(i * EXACT_BLOCK)
        } else if i < n_slots + n_current {
            Block::Current((i - n_slots) * EXACT_BLOCK)
        } else {
            Block::Pool
        }
    };
    let n_splits = args.n_splits;
    deal(n_pages, split, n_splits).map(Block::Page).chain(deal(n_exact, split, n_splits).map(exact))
}

/// What split `split` of `n_splits` gets of `n` things.
fn deal(n: usize, split: usize, n_splits: usize) -> Range<usize> {
    split * n / n_splits..(split + 1) * n / n_splits
}

/// What the mask says about a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Visible {
    /// No row is visible to any query of the tile.
    None,
    /// Every row is visible to every query and nothing is added.
    All,
    /// Look at the values.
    Some,
}

/// Fills `out[tokens][columns]` with the mask of a page for the query tokens `tokens`. The cells `pooled` (-1: none) are
/// read from the outlier pool and hidden here.
pub(super) fn page_mask(
    args: &AttendArgs,
    page: usize,
    columns: usize,
    tokens: Range<usize>,
    pooled: &[i32],
    out: &mut Vec<f32>,
) -> Visible {
    let bits = args.plan.page_bits(args.view(), page);
    if bits.iter().all(|word| *word == 0) {
        return Visible::None;
    }
    let first = page * columns;
    let in_page = |cell: i32| (first as i32..(first + columns) as i32).contains(&cell);
    let is_whole = !pooled.iter().fold(false, |some, &cell| some | in_page(cell));
    // Cells beyond the mask are hidden.
    let n = args.n_kv.saturating_sub(first).min(columns);
    if n == 0 {
        return Visible::None;
    }
    if is_whole
        && n == columns
        && bits.iter().all(|word| *word == -1)
        && tokens.clone().all(|t| is_zero(args, t, first, n))
    {
        return Visible::All;
    }
    out.clear();
    out.resize(tokens.len() * columns, f32::NEG_INFINITY);
    for (token, out) in tokens.zip(out.chunks_exact_mut(columns)) {
        let at = token * args.mask_stride_token + first;
        match args.mask {
            Mask::None => out[..n].fill(0.0),
            Mask::F32(mask) => out[..n].copy_from_slice(&mask[at..at + n]),
            Mask::F16(mask) => f16_mask(&mask[at..at + n], out),
        }
    }
    if bits.iter().any(|word| *word != -1) {
        for (i, word) in bits.iter().enumerate() {
            for bit in (0..32).filter(|bit| word >> bit & 1 == 0) {
                hide(out, columns, i * 32 + bit);
            }
        }
    }
    if !is_whole {
        let pooled = pooled.iter().filter(|&&cell| in_page(cell));
        pooled.for_each(|&cell| hide(out, columns, cell as usize % columns));
    }
    classify(out)
}

/// A set of rows of a page, a bit each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct PageRows([i32; MAX_PAGE / CELLS_PER_WORD]);

impl PageRows {
    /// Those that `words` has as well.
    pub(super) fn both(mut self, words: &[i32]) -> Self {
        let words = words.iter().chain(std::iter::repeat(&0));
        self.0.iter_mut().zip(words).for_each(|(own, word)| *own &= word);
        self
    }

    /// Those that `words` does not have.
    pub(super) fn without(mut self, words: &[i32]) -> Self {
        self.0.iter_mut().zip(words).for_each(|(own, word)| *own &= !word);
        self
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }

    /// The rows, ascending.
    pub(super) fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        (0..MAX_PAGE).filter(|row| self.0[row / CELLS_PER_WORD] >> (row % CELLS_PER_WORD) & 1 == 1)
    }
}

/// The rows of a page that some query of the tile sees, by what [`page_mask`] gave.
pub(super) fn seen_rows(visible: Visible, mask: &[f32], columns: usize) -> PageRows {
    let mut seen = PageRows::default();
    for column in 0..columns {
        let is_seen = || mask.iter().skip(column).step_by(columns).any(|m| *m != f32::NEG_INFINITY);
        if visible == Visible::All || is_seen() {
            seen.0[column / CELLS_PER_WORD] |= 1 << (column % CELLS_PER_WORD);
        }
    }
    seen
}

/// Hides a column from all rows of a mask.
fn hide(mask: &mut [f32], columns: usize, column: usize) {
    mask.iter_mut().skip(column).step_by(columns).for_each(|m| *m = f32::NEG_INFINITY);
}

/// Whether the mask hides nothing and adds nothing in `n` columns: the common case, decided without a branch per value.
fn is_zero(args: &AttendArgs, token: usize, first: usize, n: usize) -> bool {
    let at = token * args.mask_stride_token + first;
    match args.mask {
        Mask::None => true,
        Mask::F16(mask) => mask[at..at + n].iter().fold(0, |a, x| a | x) == 0,
        Mask::F32(mask) => mask[at..at + n].iter().fold(0, |a, x| a | x.to_bits()) == 0,
    }
}

/// Mask values are nearly always 0 or minus infinity; the general conversion is slow.
fn f16_value(bits: u16) -> f32 {
    match bits {
        0 => 0.0,
        0xfc00 => f32::NEG_INFINITY,
        bits => half::f16::from_bits(bits).to_f32(),
    }
}

fn f16_mask(from: &[u16], to: &mut [f32]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to = f16_value(*from));
}

/// Columns of the mask and the weights of `n` exact rows: whole vectors.
pub(super) fn mask_columns(n: usize) -> usize {
    n.next_multiple_of(16)
}

/// Fills `out[tokens][mask_columns(n)]` with the mask of the first `n` of the exact rows that belong to `cells` (-1: none);
/// rows from `n` on are visible to no token.
pub(super) fn cell_mask(
    args: &AttendArgs,
    cells: &[i32],
    tokens: Range<usize>,
    out: &mut Vec<f32>,
) -> (usize, Visible) {
    let (n_tokens, columns) = (tokens.len(), mask_columns(cells.len()));
    out.clear();
    out.resize(n_tokens * columns, f32::NEG_INFINITY);
    let mut n = 0;
    for (token, out) in tokens.zip(out.chunks_exact_mut(columns)) {
        let at = token * args.mask_stride_token;
        for (i, (out, &cell)) in out.iter_mut().zip(cells).enumerate() {
            if cell < 0 || cell as usize >= args.n_kv {
                continue;
            }
            *out = match args.mask {
                Mask::None => 0.0,
                Mask::F32(mask) => mask[at + cell as usize],
                Mask::F16(mask) => f16_value(mask[at + cell as usize]),
            };
            if *out != f32::NEG_INFINITY {
                n = n.max(i + 1);
            }
        }
    }
    if n == 0 {
        return (0, Visible::None);
    }
    for token in 1..n_tokens {
        out.copy_within(token * columns..token * columns + mask_columns(n), token * mask_columns(n));
    }
    out.truncate(n_tokens * mask_columns(n));
    (n, classify(out))
}

fn classify(mask: &[f32]) -> Visible {
    let (mut hidden, mut zero) = (true, true);
    for m in mask {
        hidden &= *m == f32::NEG_INFINITY;
        zero &= *m == 0.0;
    }
    match (hidden, zero) {
        (true, _) => Visible::None,
        (_, true) => Visible::All,
        _ => Visible::Some,
    }
}

/// Whether a cell is to be read from its page.
pub(super) fn is_in_page(args: &AttendArgs, cell: usize) -> bool {
    let (page, bit) = (cell / args.plan.page(), cell % args.plan.page());
    let words = || args.plan.page_bits(args.view(), page);
    cell < args.plan.n_cells() && words()[bit / CELLS_PER_WORD] >> (bit % CELLS_PER_WORD) & 1 == 1
}

/// The cells of a block of exact slots.
pub(super) fn slot_cells<'a>(args: &AttendArgs<'a>, first: usize) -> &'a [i32] {
    let cells = args.plan.slot_cells(args.view());
    &cells[first..cells.len().min(first + EXACT_BLOCK)]
}

/// The cells of a block of the ubatch's rows.
pub(super) fn current_cells<'a>(args: &AttendArgs<'a>, first: usize) -> &'a [i32] {
    let cells = args.plan.row_cells();
    &cells[first..cells.len().min(first + EXACT_BLOCK)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_dealt_once_and_evenly() {
        for n in [0, 1, 3, 5, 256, 1000] {
            for n_splits in [1, 2, 3, 7, 16] {
                let shares: Vec<Range<usize>> = (0..n_splits).map(|split| deal(n, split, n_splits)).collect();
                assert!(shares.iter().cloned().flatten().eq(0..n), "{n} among {n_splits}");
                let of = |share: &Range<usize>| share.len();
                let (least, most) = (shares.iter().map(of).min().unwrap(), shares.iter().map(of).max().unwrap());
                assert!(most - least <= 1, "{n} among {n_splits}: {least} to {most}");
            }
        }
    }
}
