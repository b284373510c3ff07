//! Attention of codec `aqua` on the vectors of any instruction set.
#![forbid(unsafe_code)]

use super::frame::Place;
use super::kernels::Kernels;
use super::{scalar, AquaCodec, MAX_DIM};
use crate::codec::channel::scalar::read_order;
use crate::codec::channel::ChannelCodec;
use crate::codec::float8::vector::e4m3_decode;
use crate::codec::mixed::vector::MixedVector;
use crate::codec::mixed::{self, MixedTile, Segments, NMSE, SEGMENT};
use crate::codec::page::{PageCodec, PageRef, MAX_PAGE};
use crate::codec::query::{allowed, is_coarse, Framed, Probabilities, Query, REST};
use crate::simd::exact::ExactRows;
use crate::simd::loops::exact_accumulate;
use crate::simd::vector::{dot_floats, Vector, MAX_LANES};

/// Rows whose sums of keys are made together.
const MAX_ROWS: usize = 4;

impl<V: MixedVector> Kernels for V {
    fn enter(&self, codec: &AquaCodec, place: Place, at: &[u32], keys: &mut [f32]) {
        self.run(
            #[inline(always)]
            move |_| scalar::enter(codec, place, at, keys),
        );
    }

    fn predict(&self, codec: &AquaCodec, page: PageRef, at: &[u32], out: &mut [f32]) {
        self.run(
            #[inline(always)]
            move |_| scalar::predict(codec, page, at, out),
        );
    }

    fn scores(&self, codec: &AquaCodec, page: PageRef, query: &mut Query, scores: &mut [f32]) {
        let mut framed = std::mem::take(&mut query.framed);
        let inner = codec.inner(codec.place(page.bytes));
        let n_rows = framed.rows.len() / codec.frame.dim_k;
        let coded = query.plain_rows(n_rows, inner.query_dim());
        self.run(
            #[inline(always)]
            |v| enter(v, codec, page, &mut framed, coded),
        );
        inner.scores(page, query, scores);
        self.run(
            #[inline(always)]
            |v| add_curves(v, codec, page, &mut framed, &mut scores[..n_rows * codec.page]),
        );
        query.framed = framed;
    }

    fn add_keys(&self, codec: &AquaCodec, page: PageRef, p: &mut Probabilities, sums: &mut [f32]) {
        self.run(
            #[inline(always)]
            move |v| add_keys(v, codec, page, p, sums),
        );
    }
}

/// Takes the query rows into the frame of a page: in `coded` what meets its codes, in `framed` what meets its curves. What all its
/// tokens share goes to the first curve.
#[inline(always)]
fn enter<V: Vector>(v: V, codec: &AquaCodec, page: PageRef, framed: &mut Framed, coded: &mut [f32]) {
    let (place, dim) = (codec.place(page.bytes), codec.frame.dim_k);
    let (inner, head, curves) = (codec.inner(place), codec.frame.head(place), &codec.frame.curves);
    codec.frame.turn_queries(place, framed);
    let rows = framed.turned.chunks_exact(dim);
    if head.words.is_empty() {
        let coded = coded.chunks_exact_mut(inner.query_dim()).zip(rows.clone());
        coded.for_each(|(to, row)| to[..inner.head_dim].copy_from_slice(&row[..inner.head_dim]));
    } else {
        head.words.multiply(v, &framed.turned, inner.head_dim, coded, inner.query_dim());
    }
    let mut mean = [0f32; MAX_DIM];
    page_mean(v, codec, page, &mut mean[..dim]);
    let len = curves.len();
    for (factors, len) in framed.factors.iter_mut().zip(len) {
        factors.resize(rows.len() * len, 0.0);
    }
    let [even, odd] = &mut framed.factors;
    for (q, (even, odd)) in rows.zip(even.chunks_exact_mut(len[0]).zip(odd.chunks_exact_mut(len[1]))) {
        even[0] = 0.0;
        if head.bias_of(place, 0, dim).is_some() {
            curves.factors(v, &codec.frame.rotation, q, &head.middle, [&mut *even, odd]);
        }
        even[0] += dot_floats(v, q, &mean[..dim]);
    }
}

/// What is coded as the mean alone, back in the frame.
#[inline(always)]
fn page_mean<V: Vector>(v: V, codec: &AquaCodec, page: PageRef, out: &mut [f32]) {
    let place = codec.place(page.bytes);
    let (coded, dim, head) = (codec.inner(place).head_dim, out.len(), codec.frame.head(place));
    let means = read_means(v, codec, page);
    if head.directions.is_empty() {
        out.copy_from_slice(&means[..dim]);
        return;
    }
    let rest = ExactRows { data: &head.directions[coded * dim..], n: dim - coded, dim };
    exact_accumulate(v, &means[coded..], rest.n, rest, out);
}

/// The means of what a page does not code, by coefficient.
#[inline(always)]
fn read_means<V: Vector>(v: V, codec: &AquaCodec, page: PageRef) -> [f32; MAX_DIM] {
    let (mut means, inner) = ([0f32; MAX_DIM], codec.inner(codec.place(page.bytes)));
    for c in (inner.head_dim..codec.frame.dim_k).step_by(V::LANES) {
        let bytes = v.load_bytes(page.bytes, inner.used_bytes() + c - inner.head_dim);
        v.store(&mut means, c, e4m3_decode(v, bytes, page.header[1]));
    }
    means
}

/// Adds the curves of a page to the scores.
#[inline(always)]
fn add_curves<V: MixedVector>(v: V, codec: &AquaCodec, page: PageRef, framed: &mut Framed, scores: &mut [f32]) {
    let (place, n, curves) = (codec.place(page.bytes), codec.page, &codec.frame.curves);
    let len = curves.len();
    if codec.frame.head(place).bias_of(place, 0, codec.frame.dim_k).is_none() {
        for (scores, even) in scores.chunks_exact_mut(n).zip(framed.factors[0].chunks_exact(len[0])) {
            for t in (0..n).step_by(V::LANES) {
                v.store(scores, t, v.add(v.load(scores, t), v.splat(even[0])));
            }
        }
        return;
    }
    for i in 0..2 {
        let sums = &mut framed.curves[i];
        sums.clear();
        sums.resize(scores.len() / 2, 0.0);
        exact_accumulate(
            v,
            &framed.factors[i],
            len[i],
            ExactRows { data: &curves.rows[i], n: len[i], dim: n / 2 },
            sums,
        );
    }
    let [even, odd] = &framed.curves;
    let sums = even.chunks_exact(n / 2).zip(odd.chunks_exact(n / 2));
    for (scores, (even, odd)) in scores.chunks_exact_mut(n).zip(sums) {
        let mut mirrored = [0f32; MAX_PAGE / 2];
        let (left, right) = scores.split_at_mut(n / 2);
        for t in (0..n / 2).step_by(V::LANES) {
            let (even, odd) = (v.load(even, t), v.load(odd, t));
            v.store(right, t, v.add(v.load(right, t), v.add(even, odd)));
            v.store(&mut mirrored, t, v.sub(even, odd));
        }
        match n {
            64 => add_mirrored::<V, 1>(v, &mirrored, left),
            128 => add_mirrored::<V, 2>(v, &mirrored, left),
            _ => add_mirrored::<V, 4>(v, &mirrored, left),
        }
    }
}

/// `out[i] += x[32 * B - 1 - i]`
#[inline(always)]
fn add_mirrored<V: MixedVector, const B: usize>(v: V, x: &[f32; MAX_PAGE / 2], out: &mut [f32]) {
    for i in (0..32 * B).step_by(V::LANES) {
        let from: [u8; MAX_LANES] = std::array::from_fn(|lane| (32 * B - 1).saturating_sub(i + lane) as u8);
        let mirrored = v.permute::<B>(&x[..32 * B], v.load_bytes(&from, 0));
        v.store(out, i, v.add(v.load(out, i), mirrored));
    }
}

/// What sums of the keys of a page need to know of it.
struct Keys<'a> {
    tile: &'a MixedTile,
    segments: Segments,
    codes: &'a [u8],
    /// By place of the depth.
    step: &'a [f32],
    mid: &'a [f32],
    /// Of each coded coefficient the place.
    place: &'a [u8],
    /// `[dim]`: means of what is not coded.
    means: &'a [f32],
    /// `[page]`: 1 where the value is predicted, else 0.
    gates: &'a [f32],
}

#[inline(always)]
fn add_keys<V: MixedVector>(v: V, codec: &AquaCodec, page: PageRef, p: &Probabilities, sums: &mut [f32]) {
    let (place, dim, n) = (codec.place(page.bytes), codec.frame.dim_k, codec.page);
    let inner = codec.inner(place);
    let order = read_order(inner, page);
    let [step, mid] = [(inner.steps_offset(), page.header[0]), (inner.mids_offset(), page.header[1])]
        .map(|(at, base)| read_numbers(v, inner, page, at, base));
    let (mut places, mut gates) = ([0u8; MAX_DIM], [0f32; MAX_PAGE]);
    order.channel[..inner.head_dim].iter().enumerate().for_each(|(d, &c)| places[usize::from(c)] = d as u8);
    let means = read_means(v, codec, page);
    for (gates, byte) in gates[..n].chunks_exact_mut(8).zip(codec.gates(page.bytes)) {
        gates.iter_mut().enumerate().for_each(|(i, gate)| *gate = f32::from(byte >> i & 1));
    }
    let keys = Keys {
        tile: &inner.tile,
        segments: order.segments,
        codes: &page.bytes[..inner.tile.bytes()],
        step: &step[..inner.head_dim],
        mid: &mid[..inner.head_dim],
        place: &places[..inner.head_dim],
        means: &means[..dim],
        gates: &gates[..n],
    };
    let (weights, n_sums) = (&p.p[..p.n_rows * n], dim + 1);
    for (weights, sums) in weights.chunks(MAX_ROWS * n).zip(sums.chunks_mut(MAX_ROWS * n_sums)) {
        match weights.len() / n {
            1 => add_rows::<V, 1>(v, &keys, weights, sums),
            2 => add_rows::<V, 2>(v, &keys, weights, sums),
            3 => add_rows::<V, 3>(v, &keys, weights, sums),
            _ => add_rows::<V, MAX_ROWS>(v, &keys, weights, sums),
        }
    }
}

/// Steps or mid-points of a page, at byte `at` of it.
#[inline(always)]
fn read_numbers<V: Vector>(v: V, inner: &ChannelCodec, page: PageRef, at: usize, base: u8) -> [f32; MAX_DIM] {
    let mut numbers = [0f32; MAX_DIM];
    for d in (0..inner.head_dim).step_by(V::LANES) {
        let x = if inner.params.half {
            v.load_half(page.bytes, at + 2 * d)
        } else {
            e4m3_decode(v, v.load_bytes(page.bytes, at + d), base)
        };
        v.store(&mut numbers, d, x);
    }
    numbers
}

/// A row of weights as integers.
#[derive(Clone, Copy)]
struct Rounded {
    /// Value of one.
    unit: f32,
    /// Sum of the integers.
    total: f32,
    /// Sum of the weights; 0 for what rounding left of them.
    sum: f32,
    is_coarse: bool,
}

#[inline(always)]
fn add_rows<V: MixedVector, const R: usize>(v: V, keys: &Keys, weights: &[f32], sums: &mut [f32]) {
    let (n, n_sums) = (keys.gates.len(), keys.means.len() + 1);
    let mut int8 = [0i8; MAX_ROWS * MAX_PAGE];
    let mut products = [[0f32; MAX_DIM]; R];
    let mut rounded = [Rounded { unit: 0.0, total: 0.0, sum: 0.0, is_coarse: false }; R];
    for r in 0..R {
        rounded[r] = round::<V, false>(v, keys, &weights[r * n..][..n], &mut int8[r * n..][..n]);
    }
    v.lane_sums::<R>(keys.tile, &keys.segments, keys.codes, &int8[..R * n], products.as_flattened_mut(), MAX_DIM);
    for r in 0..R {
        let sums = &mut sums[r * n_sums..][..n_sums];
        add_products(v, keys, rounded[r], &mut products[r], sums);
        if rounded[r].is_coarse {
            let rest = round::<V, true>(v, keys, &weights[r * n..][..n], &mut int8[..n]);
            v.lane_sums::<1>(keys.tile, &keys.segments, keys.codes, &int8[..n], &mut products[r], MAX_DIM);
            add_products(v, keys, rest, &mut products[r], sums);
        }
    }
}

/// Rounds the weights of values that are predicted, or what that leaves of them, to int8.
#[inline(always)]
fn round<V: Vector, const IS_REST: bool>(v: V, keys: &Keys, weights: &[f32], int8: &mut [i8]) -> Rounded {
    let gated = |t: usize| v.mul(v.load(weights, t), v.load(keys.gates, t));
    let (mut max, mut sum) = (v.splat(0.0), v.splat(0.0));
    for t in (0..weights.len()).step_by(V::LANES) {
        let weight = gated(t);
        (max, sum) = (v.max(max, weight), v.add(sum, weight));
    }
    let max = v.largest(max);
    let inverse = v.splat(if max > 0.0 { 127.0 / max } else { 0.0 });
    let allowed = v.splat(-allowed(NMSE));
    let mut total = v.splat_i32(0);
    let (mut lost, mut excess) = (v.splat(0.0), v.splat(0.0));
    for t in (0..weights.len()).step_by(4 * V::LANES) {
        let mut whole = [v.splat_i32(0); 4];
        for i in 0..4 {
            let x = v.mul(gated(t + i * V::LANES), inverse);
            whole[i] = v.nearest(x);
            let error = v.rest(x, whole[i]);
            lost = v.add(lost, error);
            excess = v.mul_add(error, error, v.mul_add(v.mul(x, x), allowed, excess));
            if IS_REST {
                whole[i] = v.nearest(v.mul(error, v.splat(REST)));
            }
        }
        total = v.store_bytes(int8, t, whole, total);
    }
    let total = v.sum_i32(total);
    let unit = max / 127.0;
    if IS_REST {
        return Rounded { unit: unit / REST, total, sum: 0.0, is_coarse: false };
    }
    Rounded { unit, total, sum: v.sum(sum), is_coarse: is_coarse(NMSE, v.sum(lost), total, v.sum(excess)) }
}

/// Adds what sums of codes by place stand for to a row of sums of keys.
#[inline(always)]
fn add_products<V: MixedVector>(v: V, keys: &Keys, row: Rounded, products: &mut [f32; MAX_DIM], sums: &mut [f32]) {
    let (depth, dim) = (keys.step.len(), keys.means.len());
    let (unit, sum) = (v.splat(row.unit), v.splat(row.sum));
    for segment in 0..depth / SEGMENT {
        let centre = v.splat(-mixed::centre(keys.segments.bits(segment)) * row.total);
        for d in (segment * SEGMENT..(segment + 1) * SEGMENT).step_by(V::LANES) {
            let product = v.mul(v.add(v.load(products, d), centre), unit);
            v.store(products, d, v.mul_add(product, v.load(keys.step, d), v.mul(v.load(keys.mid, d), sum)));
        }
    }
    match depth.div_ceil(32) {
        1 => add_by_place::<V, 1>(v, products, keys.place, sums),
        2 => add_by_place::<V, 2>(v, products, keys.place, sums),
        3 => add_by_place::<V, 3>(v, products, keys.place, sums),
        4 => add_by_place::<V, 4>(v, products, keys.place, sums),
        5 => add_by_place::<V, 5>(v, products, keys.place, sums),
        6 => add_by_place::<V, 6>(v, products, keys.place, sums),
        7 => add_by_place::<V, 7>(v, products, keys.place, sums),
        _ => add_by_place::<V, 8>(v, products, keys.place, sums),
    }
    for c in (depth..dim).step_by(V::LANES) {
        v.store(sums, c, v.mul_add(v.load(keys.means, c), sum, v.load(sums, c)));
    }
    sums[dim] += row.sum;
}

/// Adds `x[place[c]]`, places being below `32 * B`.
#[inline(always)]
fn add_by_place<V: MixedVector, const B: usize>(v: V, x: &[f32; MAX_DIM], place: &[u8], sums: &mut [f32]) {
    for c in (0..place.len()).step_by(V::LANES) {
        let found = v.permute::<B>(&x[..32 * B], v.load_bytes(place, c));
        v.store(sums, c, v.add(v.load(sums, c), found));
    }
}
