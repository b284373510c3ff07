//! The specification of codec `adaptive`. Sealing is compiled once more for each instruction set and must give the same
//! bytes; see [`crate::codec::quantizer`].
#![forbid(unsafe_code)]

use half::f16;

use super::bounds;
use super::{AdaptiveCodec, PageRef, Probabilities, Query, SealRows, MAX_OUTLIERS};
use crate::codec::float8::{e4m3_base, e4m3_decode, power, scale_base};
use crate::codec::hadamard;
use crate::codec::kernels::Kernels;
use crate::codec::mixed::{self, MixedPage, Segments, MAX_BITS, SEGMENT};
use crate::codec::page::{Side, MAX_PAGE};
use crate::codec::quantizer::{self, sum};
use crate::codec::tile::LANE_BLOCK;
use crate::shape::MAX_HEAD_DIM;
use crate::simd::isa::Scalar;

const MAX_DIM: usize = MAX_HEAD_DIM as usize;

impl Kernels<AdaptiveCodec> for Scalar {
    fn seal(&self, codec: &AdaptiveCodec, header: &mut [u8], page: &mut [u8], rows: &mut SealRows) {
        seal(codec, header, page, rows);
    }

    fn scores(&self, codec: &AdaptiveCodec, page: PageRef, query: &Query, out: &mut [f32]) {
        scores(codec, page, query, out, |page, x, out, n| page.add_products(x, out, n));
    }

    fn accumulate(&self, codec: &AdaptiveCodec, page: PageRef, p: &mut Probabilities, acc: &mut [f32]) {
        accumulate(codec, page, p, acc, |page, x, out, n| page.add_products(x, out, n));
    }
}

/// Which tokens have how many bits, and in which order they lie.
struct Order {
    segments: Segments,
    /// The token at each place.
    token: [u8; MAX_PAGE],
    /// The place of each token.
    place: [u8; MAX_PAGE],
}

/// Values of one row that are kept exactly: channels and values.
type Outliers = [(usize, f32); MAX_OUTLIERS];

/// Encodes rows into a page.
#[inline(always)]
pub(super) fn seal(codec: &AdaptiveCodec, header: &mut [u8], page: &mut [u8], rows: &mut SealRows) {
    let dim = codec.head_dim;
    if rows.fresh {
        page.fill(0);
        header.fill(0);
    }
    codec.smooth().apply(&mut page[codec.smooth_offset()..], rows, dim);
    if codec.params.rotate {
        hadamard::rotate_rows(rows.rows, dim);
    }
    let mut outliers = [[(0, 0.0); MAX_OUTLIERS]; MAX_PAGE];
    if codec.params.outliers > 0 {
        for (row, outliers) in rows.rows.chunks_exact_mut(dim).zip(&mut outliers) {
            take_outliers(codec, row, outliers);
        }
    }
    if rows.fresh {
        let order = choose_order(codec, rows);
        (header[2], header[3]) = (order.segments.0[0] as u8, order.segments.0[1] as u8);
        if codec.params.adaptive {
            let order = if codec.side == Side::Key { &order.place } else { &order.token };
            page[codec.order_offset()..][..codec.page].copy_from_slice(&order[..codec.page]);
        }
    }
    let order = read_order(codec, PageRef { header, bytes: page });
    let place = |i: usize| usize::from(order.place[rows.at[i] as usize]);
    if rows.fresh {
        let (mut step, mut mid) = (0f32, 0f32);
        for (i, x) in rows.rows.chunks_exact(dim).enumerate() {
            let fit = codec.quantizer(order.segments.bits(place(i) / codec.segment())).fit(x);
            (step, mid) = (step.max(fit.step), mid.max(fit.mid.abs()));
        }
        header[0] = if codec.params.symmetric { scale_base(step) } else { e4m3_base(step) };
        if !codec.params.symmetric {
            header[1] = e4m3_base(mid);
        }
    }
    for (i, x) in rows.rows.chunks_exact(dim).enumerate() {
        seal_row(codec, header, page, &order.segments, place(i), x, &outliers[i]);
    }
}

/// Replaces the values that lie farthest from the row's mean by that mean.
#[inline(always)]
fn take_outliers(codec: &AdaptiveCodec, row: &mut [f32], outliers: &mut Outliers) {
    let mean = sum(row, |x| x) / row.len() as f32;
    for outlier in &mut outliers[..codec.params.outliers] {
        let mut farthest = 0;
        for (c, x) in row.iter().enumerate() {
            if (x - mean).abs() > (row[farthest] - mean).abs() {
                farthest = c;
            }
        }
        *outlier = (farthest, row[farthest]);
        row[farthest] = mean;
    }
}

/// Widest first: how many of the steps that the bounds allow a token's values span, squared, is what its bits are for.
#[inline(always)]
fn choose_order(codec: &AdaptiveCodec, rows: &SealRows) -> Order {
    let mut weight = [0f32; MAX_PAGE];
    // Targets and query norms are the same for all tokens of a page and cancel.
    let target = 1.0;
    for (i, x) in rows.rows.chunks_exact(codec.head_dim).enumerate() {
        let spread = if codec.params.symmetric {
            quantizer::root_mean_square(x)
        } else {
            let (low, high) = quantizer::range(x);
            high - low
        };
        let attention = if codec.params.attention { rows.attention.get(i).copied().unwrap_or(1.0) } else { 1.0 };
        let step = match codec.side {
            Side::Key => bounds::key_step(codec.page, target, 1.0) / attention,
            Side::Value => bounds::value_step(codec.page, target, attention),
        };
        weight[rows.at[i] as usize] = (spread / step) * (spread / step);
    }
    if !codec.params.adaptive {
        weight = [1.0; MAX_PAGE];
    }
    let mut order = natural_order(Segments([0; MAX_BITS]));
    let token = &mut order.token[..codec.page];
    token.sort_by(|a, b| weight[usize::from(*b)].total_cmp(&weight[usize::from(*a)]));
    let mut by_place = [0f32; MAX_PAGE];
    by_place.iter_mut().zip(token).for_each(|(w, t)| *w = weight[usize::from(*t)]);
    let weight = &by_place[..codec.page];
    order.segments = mixed::share_out(weight, codec.segment(), codec.budget, codec.params.min_bits);
    invert(&order.token[..codec.page], &mut order.place);
    order
}

fn natural_order(segments: Segments) -> Order {
    let order = std::array::from_fn(|i| i as u8);
    Order { segments, token: order, place: order }
}

/// Makes of the token at each place the place of each token, and the other way round.
#[inline(always)]
fn invert(order: &[u8], inverse: &mut [u8; MAX_PAGE]) {
    order.iter().enumerate().for_each(|(i, &at)| inverse[usize::from(at)] = i as u8);
}

#[inline(always)]
pub(super) fn read_segments(codec: &AdaptiveCodec, page: PageRef) -> Segments {
    let (four, three) = (usize::from(page.header[2]), usize::from(page.header[3]));
    let n = codec.n_segments();
    // A page that was never sealed has no header; its rows are read by nobody.
    Segments::complete(four, three, n, codec.budget).unwrap_or(Segments::uniform(1, n))
}

#[inline(always)]
fn read_order(codec: &AdaptiveCodec, page: PageRef) -> Order {
    let mut order = natural_order(read_segments(codec, page));
    if codec.params.adaptive {
        let stored = &page.bytes[codec.order_offset()..][..codec.page];
        let Order { token, place, .. } = &mut order;
        let (read, other) = if codec.side == Side::Key { (place, token) } else { (token, place) };
        read.iter_mut().zip(stored).for_each(|(to, &at)| *to = at.min((codec.page - 1) as u8));
        invert(&read[..codec.page], other);
    }
    order
}

/// Runs of places of one width: first segment, number of segments, bits.
#[inline(always)]
pub(super) fn runs(segments: &Segments) -> impl Iterator<Item = (usize, usize, usize)> {
    let mut first = 0;
    segments.0.into_iter().zip((1..=MAX_BITS).rev()).filter(|(n, _)| *n > 0).map(move |(n, bits)| {
        first += n;
        (first - n, n, bits)
    })
}

/// Keys: where the codes of the run from segment `first` lie.
#[inline(always)]
pub(super) fn run_offset(codec: &AdaptiveCodec, segments: &Segments, first: usize) -> usize {
    (0..first).map(|s| segments.bits(s)).sum::<usize>() * LANE_BLOCK * codec.head_dim / 8
}

#[inline(always)]
fn seal_row(
    codec: &AdaptiveCodec,
    header: &[u8],
    page: &mut [u8],
    segments: &Segments,
    place: usize,
    x: &[f32],
    outliers: &Outliers,
) {
    let dim = codec.head_dim;
    let bits = segments.bits(place / codec.segment());
    let quantizer = codec.quantizer(bits);
    let mut codes = [0u8; MAX_DIM];
    let [step, mid] = quantizer.seal(x, [header[0], header[1]], &mut codes[..dim]);
    page[codec.steps_offset() + place] = step;
    if !codec.params.symmetric {
        page[codec.mids_offset() + place] = mid;
    }
    for (i, &(channel, value)) in outliers[..codec.params.outliers].iter().enumerate() {
        let mid = if codec.params.symmetric { 0.0 } else { e4m3_decode(mid) * power(header[1]) };
        let coded = quantizer.read_step(step, header[0]) * quantizer.value(codes[channel]) + mid;
        let missing = f16::from_f32((value - coded).clamp(-65504.0, 65504.0));
        page[codec.outliers_offset() + i * codec.page + place] = channel as u8;
        let at = codec.outliers_offset() + (codec.params.outliers + 2 * i) * codec.page + 2 * place;
        page[at..at + 2].copy_from_slice(&missing.to_le_bytes());
    }
    match codec.side {
        Side::Key => {
            let run = runs(segments).find(|(first, n, _)| (*first..first + n).contains(&(place / LANE_BLOCK)));
            let (first, n, bits) = run.unwrap_or((0, codec.n_segments(), bits));
            let tile = codec.key_tile(n, bits);
            let codes_of_run = &mut page[run_offset(codec, segments, first)..][..tile.bytes()];
            let uniform = Segments::uniform(bits, dim / SEGMENT);
            tile.set_lane(codes_of_run, &uniform, place - first * LANE_BLOCK, &codes[..dim]);
        }
        Side::Value => {
            let tile = codec.value_tile();
            tile.set_depth(&mut page[..tile.bytes()], segments, place, &codes[..dim]);
        }
    }
}

/// Steps and mid-points by place.
#[inline(always)]
fn read_params(codec: &AdaptiveCodec, page: PageRef) -> ([f32; MAX_PAGE], [f32; MAX_PAGE]) {
    let (mut steps, mut mids) = ([0f32; MAX_PAGE], [0f32; MAX_PAGE]);
    let quantizer = codec.quantizer(1);
    let bytes = &page.bytes[codec.steps_offset()..][..codec.page];
    steps.iter_mut().zip(bytes).for_each(|(s, &b)| *s = quantizer.read_step(b, page.header[0]));
    if !codec.params.symmetric {
        let bytes = &page.bytes[codec.mids_offset()..][..codec.page];
        mids.iter_mut().zip(bytes).for_each(|(m, &b)| *m = e4m3_decode(b) * power(page.header[1]));
    }
    (steps, mids)
}

/// What is added to the coded values: place, channel and summand.
#[inline(always)]
pub(super) fn read_outliers<'a>(
    codec: &AdaptiveCodec,
    page: PageRef<'a>,
) -> impl Iterator<Item = (usize, usize, f32)> + 'a {
    let (n, top) = (codec.page, codec.head_dim - 1);
    let (channels, summands) =
        page.bytes[codec.outliers_offset()..][..3 * codec.params.outliers * n].split_at(codec.params.outliers * n);
    channels
        .iter()
        .zip(summands.chunks_exact(2))
        .enumerate()
        .map(move |(i, (&c, x))| (i % n, usize::from(c).min(top), f16::from_le_bytes([x[0], x[1]]).to_f32()))
}

/// Decodes one row, still rotated, without mean and factors.
pub(super) fn decode_transformed(codec: &AdaptiveCodec, page: PageRef, row: usize, out: &mut [f32]) {
    let order = read_order(codec, page);
    let (steps, mids) = read_params(codec, page);
    let place = usize::from(order.place[row]);
    let bits = order.segments.bits(place / codec.segment());
    for (c, out) in out.iter_mut().enumerate() {
        let code = match codec.side {
            Side::Key => {
                let block = place / LANE_BLOCK;
                let bytes = &page.bytes[run_offset(codec, &order.segments, block)..];
                let uniform = Segments::uniform(bits, codec.head_dim / SEGMENT);
                codec.key_tile(1, bits).get(bytes, &uniform, place % LANE_BLOCK, c)
            }
            Side::Value => codec.value_tile().get(page.bytes, &order.segments, c, place),
        };
        *out = steps[place] * codec.quantizer(bits).value(code) + mids[place];
    }
    for (_, channel, x) in read_outliers(codec, page).filter(|(i, _, _)| *i == place) {
        out[channel] += x;
    }
}

/// Scores through a function that computes [`MixedPage::add_products`].
#[inline(always)]
pub(super) fn scores(
    codec: &AdaptiveCodec,
    page: PageRef,
    query: &Query,
    out: &mut [f32],
    add_products: impl Fn(&MixedPage, &[f32], &mut [f32], usize),
) {
    let (dim, n) = (codec.head_dim, codec.page);
    let order = read_order(codec, page);
    let (steps, mids) = read_params(codec, page);
    let out = &mut out[..query.n_rows() * n];
    out.fill(0.0);
    for (first, count, bits) in runs(&order.segments) {
        let tile = codec.key_tile(count, bits);
        let mixed = MixedPage {
            tile: &tile,
            segments: Segments::uniform(bits, dim / SEGMENT),
            codes: &page.bytes[run_offset(codec, &order.segments, first)..][..tile.bytes()],
            page_bytes: page.bytes.len(),
            normal: codec.params.normal,
            order: &[],
            factors: &[1.0; MAX_DIM][..dim],
            mids: &[],
            weights: false,
        };
        add_products(&mixed, query.rotated(), &mut out[first * LANE_BLOCK..], n);
    }
    let mut mean = [0f32; MAX_DIM];
    codec.smooth().read_mean(codec.smooth_part(page), &mut mean[..dim]);
    let rows = query.rows().chunks_exact(dim).zip(query.rotated().chunks_exact(dim));
    for ((plain, q), out) in rows.zip(out.chunks_exact_mut(n)) {
        let base = quantizer::dot(plain, &mean[..dim]);
        let total = sum(q, |x| x);
        let mut by_place = [0f32; MAX_PAGE];
        for i in 0..n {
            by_place[i] = out[i] * steps[i] + mids[i] * total + base;
        }
        if codec.params.outliers > 0 {
            read_outliers(codec, page).for_each(|(i, channel, x)| by_place[i] += q[channel] * x);
        }
        (0..n).for_each(|i| out[usize::from(order.token[i])] = by_place[i]);
    }
}

/// Adds outputs through a function that computes [`MixedPage::add_products`].
#[inline(always)]
pub(super) fn accumulate(
    codec: &AdaptiveCodec,
    page: PageRef,
    p: &Probabilities,
    acc: &mut [f32],
    add_products: impl Fn(&MixedPage, &[f32], &mut [f32], usize),
) {
    let (dim, n) = (codec.head_dim, codec.page);
    let order = read_order(codec, page);
    let (steps, mids) = read_params(codec, page);
    let tile = codec.value_tile();
    let mixed = MixedPage {
        tile: &tile,
        segments: order.segments,
        codes: &page.bytes[..tile.bytes()],
        page_bytes: page.bytes.len(),
        normal: codec.params.normal,
        order: &order.token[..n],
        factors: &steps[..n],
        mids: if codec.params.symmetric { &[] } else { &mids[..n] },
        weights: true,
    };
    add_products(&mixed, p.rows(), acc, dim);
    if codec.params.outliers > 0 {
        for (p, acc) in p.rows().chunks_exact(n).zip(acc.chunks_exact_mut(dim)) {
            read_outliers(codec, page).for_each(|(i, channel, x)| acc[channel] += p[usize::from(order.token[i])] * x);
        }
    }
}
