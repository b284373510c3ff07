//! The specification of codec `channel`. Sealing is compiled once more for each instruction set and must give the same
//! bytes: no fused multiply-add, and sums over tokens run in the order of the rows.
#![forbid(unsafe_code)]

use half::f16;

use super::{ChannelCodec, PageRef, Probabilities, Query, SealRows};
use crate::codec::float8::{e4m3_base, e4m3_decode, e4m3_encode, inverse_power, power};
use crate::codec::kernels::Kernels;
use crate::codec::mixed::{self, MixedPage, Segments, SEGMENT};
use crate::codec::page::MAX_PAGE;
use crate::codec::quantizer::without_sign_of_zero;
use crate::shape::MAX_HEAD_DIM;
use crate::simd::isa::Scalar;

const MAX_DIM: usize = MAX_HEAD_DIM as usize;

impl Kernels<ChannelCodec> for Scalar {
    fn seal(&self, codec: &ChannelCodec, header: &mut [u8], page: &mut [u8], rows: &mut SealRows) {
        seal(codec, header, page, rows);
    }

    fn scores(&self, codec: &ChannelCodec, page: PageRef, query: &Query, out: &mut [f32]) {
        scores(codec, page, query, out, |page, x, out, n| page.add_products(x, out, n));
    }

    fn accumulate(&self, _codec: &ChannelCodec, _page: PageRef, _p: &mut Probabilities, _acc: &mut [f32]) {
        unreachable!("values are not quantized per channel");
    }
}

/// A number for each channel, or for each place of the depth.
type PerChannel = [f32; MAX_DIM];

/// Which channels have how many bits, and in which order they lie.
pub(crate) struct Order {
    pub(crate) segments: Segments,
    pub(crate) channel: [u8; MAX_DIM],
}

/// Steps and mid-points by depth.
struct Params {
    step: PerChannel,
    mid: PerChannel,
}

/// What the codes of a page say about its rows, by depth: `sum x^2` and `sum x * (code - centre)`, `x` being the value
/// less its mid-point.
struct Moments {
    energy: PerChannel,
    inner: PerChannel,
}

/// Encodes rows into a page. Rows that are kept exact elsewhere are coded, but have no part in the parameters.
#[inline(always)]
pub(super) fn seal(codec: &ChannelCodec, header: &mut [u8], page: &mut [u8], rows: &mut SealRows) {
    if !rows.fresh {
        let order = read_order(codec, PageRef { header, bytes: page });
        let params = read_params(codec, PageRef { header, bytes: page });
        write_codes(codec, page, rows, &order, &params);
        return;
    }
    page.fill(0);
    header.fill(0);
    let (mut wanted, order) = fit(codec, rows);
    (header[2], header[3]) = (order.segments.0[0] as u8, order.segments.0[1] as u8);
    if codec.params.adaptive {
        page[codec.order_offset()..][..codec.head_dim].copy_from_slice(&order.channel[..codec.head_dim]);
    }
    write_params(codec, header, page, &wanted, true);
    let params = read_params(codec, PageRef { header, bytes: page });
    let moments = write_codes(codec, page, rows, &order, &params);
    if codec.params.refit {
        for d in 0..codec.head_dim {
            if moments.inner[d] > 0.0 {
                wanted.step[d] = moments.energy[d] / moments.inner[d];
            }
        }
        write_params(codec, header, page, &wanted, false);
    }
}

/// The rows that decide the parameters.
fn counted<'a>(codec: &ChannelCodec, rows: &'a SealRows) -> impl Iterator<Item = &'a [f32]> + Clone {
    let all_exact = rows.exact.iter().all(|exact| *exact);
    let rows_of = rows.rows.chunks_exact(codec.head_dim).enumerate();
    let exact = rows.exact;
    rows_of.filter(move |(i, _)| all_exact || !exact[*i]).map(|(_, row)| row)
}

/// The least error that widths of a budget leave of coefficients with these weights, widest first, as sealing gives them out.
pub(crate) fn least_error(codec: &ChannelCodec, weight: &[f32]) -> f32 {
    let mut weight = weight.to_vec();
    weight.sort_by(|a, b| b.total_cmp(a));
    let segments = mixed::share_out(&weight, SEGMENT, codec.tile.budget(), 1);
    let of_segment = |(s, weight): (usize, &[f32])| mixed::DISTORTION[segments.bits(s)] * weight.iter().sum::<f32>();
    weight.chunks_exact(SEGMENT).enumerate().map(of_segment).sum()
}

/// Range and width of each channel.
#[inline(always)]
fn fit(codec: &ChannelCodec, rows: &SealRows) -> (Params, Order) {
    let dim = codec.head_dim;
    let (mut low, mut high, mut sum) = ([f32::INFINITY; MAX_DIM], [f32::NEG_INFINITY; MAX_DIM], [0f32; MAX_DIM]);
    let mut n = 0;
    for row in counted(codec, rows) {
        n += 1;
        for c in 0..dim {
            low[c] = low[c].min(row[c]);
            high[c] = high[c].max(row[c]);
            sum[c] += row[c];
        }
    }
    let mut weight = [0f32; MAX_DIM];
    let scale = 1.0 / n.max(1) as f32;
    for row in counted(codec, rows) {
        for c in 0..dim {
            let x = row[c] - sum[c] * scale;
            weight[c] += x * x;
        }
    }
    if rows.channel_weights.len() == dim {
        weight.iter_mut().zip(rows.channel_weights).for_each(|(w, q)| *w *= q);
    }
    let order = choose_order(codec, &weight[..dim]);
    let mut params = Params { step: [0.0; MAX_DIM], mid: [0.0; MAX_DIM] };
    for d in 0..dim {
        let (c, bits) = (usize::from(order.channel[d]), order.segments.bits(d / SEGMENT));
        let (low, high) = (without_sign_of_zero(low[c]), without_sign_of_zero(high[c]));
        let half = (high - low) * 0.5 * codec.params.clip.affine(1 << bits);
        params.step[d] = half / mixed::centre(bits);
        params.mid[d] = (high + low) * 0.5;
    }
    (params, order)
}

/// Widest first: segments of channels of falling weight, with the split of the budget that leaves the least weighted
/// error. Without adaptive widths the natural order.
#[inline(always)]
fn choose_order(codec: &ChannelCodec, weight: &[f32]) -> Order {
    let n = codec.tile.n_segments();
    let mut order = Order { segments: Segments::uniform(codec.tile.budget() / n, n), channel: [0; MAX_DIM] };
    order.channel.iter_mut().enumerate().for_each(|(c, channel)| *channel = c as u8);
    if codec.params.adaptive {
        let channel = &mut order.channel[..weight.len()];
        channel.sort_by(|a, b| weight[usize::from(*b)].total_cmp(&weight[usize::from(*a)]));
        let mut by_depth = [0f32; MAX_DIM];
        by_depth.iter_mut().zip(channel).for_each(|(w, c)| *w = weight[usize::from(*c)]);
        order.segments = mixed::share_out(&by_depth[..weight.len()], SEGMENT, codec.tile.budget(), 1);
    }
    order
}

/// Codes the rows with parameters as they are read back.
#[inline(always)]
fn write_codes(codec: &ChannelCodec, page: &mut [u8], rows: &SealRows, order: &Order, params: &Params) -> Moments {
    let dim = codec.head_dim;
    let (mut inverse, mut centre, mut top) = ([0f32; MAX_DIM], [0f32; MAX_DIM], [0f32; MAX_DIM]);
    for d in 0..dim {
        centre[d] = mixed::centre(order.segments.bits(d / SEGMENT));
        top[d] = 2.0 * centre[d];
        inverse[d] = if params.step[d] > 0.0 { 1.0 / params.step[d] } else { 0.0 };
    }
    let mut moments = Moments { energy: [0.0; MAX_DIM], inner: [0.0; MAX_DIM] };
    for (i, row) in rows.rows.chunks_exact(dim).enumerate() {
        let (mut x, mut codes) = ([0f32; MAX_DIM], [0u8; MAX_DIM]);
        for d in 0..dim {
            x[d] = row[usize::from(order.channel[d])] - params.mid[d];
        }
        for d in 0..dim {
            // Adding a half and cutting rounds to nearest; the value is not negative after the clamp.
            codes[d] = ((x[d] * inverse[d] + centre[d]).clamp(0.0, top[d]) + 0.5) as u8;
        }
        codec.tile.set_lane(page, &order.segments, rows.at[i] as usize, &codes[..dim]);
        if rows.exact.get(i) != Some(&true) {
            for d in 0..dim {
                moments.energy[d] += x[d] * x[d];
                moments.inner[d] += x[d] * (f32::from(codes[d]) - centre[d]);
            }
        }
    }
    moments
}

/// Writes steps and mid-points; on `new` pages the powers of two that FP8 numbers are relative to as well.
#[inline(always)]
fn write_params(codec: &ChannelCodec, header: &mut [u8], page: &mut [u8], params: &Params, new: bool) {
    let dim = codec.head_dim;
    for (i, (at, numbers)) in
        [(codec.steps_offset(), &params.step), (codec.mids_offset(), &params.mid)].into_iter().enumerate()
    {
        let numbers = &numbers[..dim];
        if codec.params.half {
            for (to, &x) in page[at..at + 2 * dim].chunks_exact_mut(2).zip(numbers) {
                to.copy_from_slice(&f16::from_f32(x.clamp(-65504.0, 65504.0)).to_le_bytes());
            }
            continue;
        }
        if new {
            header[i] = e4m3_base(numbers.iter().fold(0.0, |a: f32, x| a.max(x.abs())));
        }
        for (to, &x) in page[at..at + dim].iter_mut().zip(numbers) {
            *to = e4m3_encode(x * inverse_power(header[i]));
        }
    }
}

#[inline(always)]
fn read_params(codec: &ChannelCodec, page: PageRef) -> Params {
    let dim = codec.head_dim;
    let mut params = Params { step: [0.0; MAX_DIM], mid: [0.0; MAX_DIM] };
    for (i, (at, numbers)) in
        [(codec.steps_offset(), &mut params.step), (codec.mids_offset(), &mut params.mid)].into_iter().enumerate()
    {
        if codec.params.half {
            for (x, from) in numbers.iter_mut().zip(page.bytes[at..at + 2 * dim].chunks_exact(2)) {
                *x = f16::from_le_bytes([from[0], from[1]]).to_f32();
            }
        } else {
            let scale = power(page.header[i]);
            numbers.iter_mut().zip(&page.bytes[at..at + dim]).for_each(|(x, &b)| *x = e4m3_decode(b) * scale);
        }
    }
    params
}

#[inline(always)]
fn read_segments(codec: &ChannelCodec, page: PageRef) -> Segments {
    let (four, three) = (usize::from(page.header[2]), usize::from(page.header[3]));
    let n = codec.tile.n_segments();
    // A page that was never sealed has no header; its rows are read by nobody.
    Segments::complete(four, three, n, codec.tile.budget()).unwrap_or(Segments::uniform(1, n))
}

#[inline(always)]
pub(crate) fn read_order(codec: &ChannelCodec, page: PageRef) -> Order {
    let mut order = Order { segments: read_segments(codec, page), channel: [0; MAX_DIM] };
    order.channel.iter_mut().enumerate().for_each(|(c, channel)| *channel = c as u8);
    if codec.params.adaptive {
        let top = (codec.head_dim - 1) as u8;
        let stored = &page.bytes[codec.order_offset()..][..codec.head_dim];
        order.channel.iter_mut().zip(stored).for_each(|(channel, &c)| *channel = c.min(top));
    }
    order
}

/// Decodes one row.
pub(super) fn decode(codec: &ChannelCodec, page: PageRef, row: usize, out: &mut [f32]) {
    let (order, params) = (read_order(codec, page), read_params(codec, page));
    for d in 0..codec.head_dim {
        let code = f32::from(codec.tile.get(page.bytes, &order.segments, row, d));
        let centre = mixed::centre(order.segments.bits(d / SEGMENT));
        out[usize::from(order.channel[d])] = params.step[d] * (code - centre) + params.mid[d];
    }
}

/// Decodes all rows of a page, channel by channel: `out[head_dim][page]`. The values of [`decode`], many times faster.
#[inline(always)]
pub(crate) fn decode_page(codec: &ChannelCodec, page: PageRef, out: &mut [f32]) {
    let (order, params) = (read_order(codec, page), read_params(codec, page));
    let mut codes = [0u8; MAX_PAGE];
    let codes = &mut codes[..codec.page];
    for d in 0..codec.head_dim {
        codec.tile.get_depth(page.bytes, &order.segments, d, codes);
        let (step, mid) = (params.step[d], params.mid[d]);
        let centre = mixed::centre(order.segments.bits(d / SEGMENT));
        let out = &mut out[usize::from(order.channel[d]) * codec.page..][..codec.page];
        for (out, code) in out.iter_mut().zip(&*codes) {
            *out = step * (f32::from(*code) - centre) + mid;
        }
    }
}

/// Scores through a function that computes [`MixedPage::add_products`].
#[inline(always)]
pub(super) fn scores(
    codec: &ChannelCodec,
    page: PageRef,
    query: &Query,
    out: &mut [f32],
    add_products: impl Fn(&MixedPage, &[f32], &mut [f32], usize),
) {
    let (order, params) = (read_order(codec, page), read_params(codec, page));
    let mixed = MixedPage {
        tile: &codec.tile,
        segments: order.segments,
        codes: &page.bytes[..codec.tile.bytes()],
        page_bytes: page.bytes.len(),
        normal: false,
        order: if codec.params.adaptive { &order.channel[..codec.query_dim()] } else { &[] },
        factors: &params.step[..codec.query_dim()],
        mids: &params.mid[..codec.query_dim()],
        weights: false,
    };
    out[..query.n_rows() * codec.page].fill(0.0);
    add_products(&mixed, query.rotated(), out, codec.page);
}
