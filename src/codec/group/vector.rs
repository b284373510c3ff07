//! Codec `group` on the vectors of any instruction set: byte dot products straight on the packed codes.
#![forbid(unsafe_code)]

use super::steps::{codes_of, Steps};
use super::{many, scalar, GroupCodec, PageRef, Probabilities, Query, QueryForm, SealRows, NMSE};
use crate::codec::hadamard;
use crate::codec::kernels::Kernels;
use crate::codec::page::MAX_PAGE;
use crate::codec::query::{allowed, is_coarse, PLANE, REST};
use crate::codec::tile::many::with_room;
use crate::codec::tile::vector::{by_width, by_width_and_rows, dot_rows, float_sum, planes, Coefficients, TileVector};
use crate::codec::tile::Width;
use crate::shape::MAX_HEAD_DIM;
use crate::simd::aligned::OnLines;
use crate::simd::vector::dot_floats;

impl<V: TileVector> Kernels<GroupCodec> for V {
    fn seal(&self, codec: &GroupCodec, header: &mut [u8], page: &mut [u8], rows: &mut SealRows) {
        self.run(
            #[inline(always)]
            move |_| scalar::seal(codec, header, page, rows),
        );
    }

    fn prepare(&self, query: &mut Query, form: &QueryForm) {
        self.run(
            #[inline(always)]
            move |_| query.prepare(form),
        );
    }

    fn untransform(&self, row: &mut [f32]) {
        self.run(
            #[inline(always)]
            move |_| hadamard::rotate(row),
        );
    }

    fn scores(&self, codec: &GroupCodec, page: PageRef, query: &Query, out: &mut [f32]) {
        self.run(
            #[inline(always)]
            move |v| scores(v, codec, page, query, out),
        );
    }

    fn accumulate(&self, codec: &GroupCodec, page: PageRef, p: &mut Probabilities, acc: &mut [f32]) {
        self.run(
            #[inline(always)]
            move |v| accumulate(v, codec, page, p, acc),
        );
    }
}

#[inline(always)]
fn scores<V: TileVector>(v: V, codec: &GroupCodec, page: PageRef, query: &Query, out: &mut [f32]) {
    v.ask_behind(page.bytes, codec.steps_offset());
    let mut mean = OnLines([0f32; MAX_HEAD_DIM as usize]);
    let mean = &mut mean.0[..codec.head_dim];
    if codec.params.mean {
        v.f16_to_f32(codec.smooth().mean_half(codec.smooth_part(page), codec.head_dim), mean);
    }
    let (mean, of_dot) = (&*mean, dot_rows::<V>(codec.coefficient_planes()));
    if query.n_rows() >= v.many_rows() && codec.coefficient_planes() == 1 {
        with_room(|room| by_width!(v: V, codec.params.width, many::scores(codec, page, query, mean, out, room)));
        return;
    }
    for row in (0..query.n_rows()).step_by(V::MAX_ROWS / of_dot) {
        let n = (query.n_rows() - row).min(V::MAX_ROWS / of_dot);
        by_width_and_rows!(v: V, codec.params.width, n * of_dot, score_rows(codec, page, query, row, mean, out));
    }
}

/// Scores of the query rows from `first` that are `R` rows of `dot` against every token of a page.
#[inline(always)]
fn score_rows<V: TileVector, const W: u8, const R: usize>(
    v: V,
    codec: &GroupCodec,
    page: PageRef,
    query: &Query,
    first: usize,
    mean: &[f32],
    out: &mut [f32],
) {
    let (dim, page_len, of_dot) = (codec.head_dim, codec.page, dot_rows::<V>(planes(W)));
    let n = R / of_dot;
    let out = &mut out[first * page_len..][..n * page_len];
    let mut base = [v.splat(0.0); R];
    if codec.params.mean {
        for i in 0..n {
            base[i] = v.splat(dot_floats(v, &query.rows()[(first + i) * dim..][..dim], mean));
        }
    }
    let stride = planes(W) / of_dot * dim;
    let mut bytes = &query.int8[first * of_dot * stride..][..R * stride];
    let mut room = [0i8; 8 * MAX_HEAD_DIM as usize];
    if W == 8 {
        bytes = v.take_planes(bytes, n, &mut room);
    }
    let (steps, strips) = (Steps::of(codec, page), page_len / V::STRIP);
    for g in 0..codec.n_groups {
        let codes = codes_of(codec, page, g, first == 0);
        let coefficients = Coefficients { bytes: &bytes[g * codec.group * (planes(W) / of_dot)..], stride };
        let (mut scale, mut offset, mut sum) = ([v.splat(0.0); R], [v.splat(0.0); R], [v.splat(0.0); R]);
        for i in 0..n {
            let at = (first + i) * codec.n_groups + g;
            scale[i] = v.splat(query.scale[at]);
            offset[i] = v.splat(query.offset[at]);
            sum[i] = v.splat(query.sum[at]);
        }
        for strip in 0..strips {
            if first == 0 {
                v.ask_part(page.bytes, g * strips + strip, codec.n_groups * strips);
            }
            let sums = v.dot::<W, R, false>(&codec.tile, codes, strip, coefficients);
            for half in 0..2 {
                let at = strip * V::STRIP + half * V::LANES;
                let step = steps.step(v, g * page_len + at);
                let mid = if steps.symmetric { step } else { steps.mid(v, g * page_len + at) };
                for i in 0..n {
                    let at = i * page_len + at;
                    let mut total = if g == 0 { base[i] } else { v.load(out, at) };
                    let x = v.mul_add(float_sum::<V, R>(v, &sums, i, half, of_dot), scale[i], offset[i]);
                    total = v.mul_add(x, step, total);
                    if !steps.symmetric {
                        total = v.mul_add(mid, sum[i], total);
                    }
                    v.store(out, at, total);
                }
            }
        }
    }
}

#[inline(always)]
fn accumulate<V: TileVector>(v: V, codec: &GroupCodec, page: PageRef, p: &mut Probabilities, acc: &mut [f32]) {
    v.ask_behind(page.bytes, codec.steps_offset());
    let of_dot = dot_rows::<V>(codec.coefficient_planes());
    let steps = Steps::of(codec, page);
    for g in 0..codec.n_groups {
        let [mut step, mut mid, mut x] = [OnLines([0f32; MAX_PAGE]); 3];
        let (step, mid, x) = (&mut step.0, &mut mid.0, &mut x.0);
        for t in (0..codec.page).step_by(V::LANES) {
            v.store(step, t, steps.step(v, g * codec.page + t));
            if !steps.symmetric {
                v.store(mid, t, steps.mid(v, g * codec.page + t));
            }
        }
        p.coarse.clear();
        for row in 0..p.n_rows {
            if codec.coefficient_planes() == 2 {
                round_weights::<V, 2>(v, codec, p, row, step, mid, x);
            } else if round_weights::<V, 1>(v, codec, p, row, step, mid, x) {
                p.coarse.push(row);
            }
        }
        let all = &*p;
        if p.n_rows >= v.many_rows() && codec.coefficient_planes() == 1 {
            with_room(|room| by_width!(v: V, codec.params.width, many::add(codec, page, all, g, acc, room)));
        } else {
            for row in (0..p.n_rows).step_by(V::MAX_ROWS / of_dot) {
                let n = (p.n_rows - row).min(V::MAX_ROWS / of_dot);
                by_width_and_rows!(v: V, codec.params.width, n * of_dot, add_rows(codec, page, all, g, row, acc));
            }
        }
        for i in 0..p.coarse.len() {
            round_rest(v, codec, p, step, i);
        }
        let rest = &*p;
        for row in (0..p.coarse.len()).step_by(V::MAX_ROWS) {
            let n = (p.coarse.len() - row).min(V::MAX_ROWS);
            by_width_and_rows!(v: V, codec.params.width, n, add_rest(codec, page, rest, g, row, acc));
        }
    }
}

/// Multiplies one row of weights with the steps of a group and rounds the products, for which `x` is room, to uint8, or to what
/// codes of 8 bits are multiplied by. Gives whether that took too much of them.
#[inline(always)]
fn round_weights<V: TileVector, const PLANES: usize>(
    v: V,
    codec: &GroupCodec,
    p: &mut Probabilities,
    row: usize,
    step: &[f32; MAX_PAGE],
    mid: &[f32; MAX_PAGE],
    x: &mut [f32; MAX_PAGE],
) -> bool {
    let n = codec.page;
    let weights = &p.p[row * n..][..n];
    let [mut max, mut all, mut squares] = [v.splat(0.0); 3];
    for t in (0..n).step_by(V::LANES) {
        let product = v.mul(v.load(weights, t), v.load(step, t));
        max = v.max(max, product);
        if PLANES == 1 {
            all = v.add(all, product);
            squares = v.mul_add(product, product, squares);
        }
        v.store(x, t, product);
    }
    let max = v.largest(max);
    let top = if PLANES == 2 { 127.0 * PLANE as f32 } else { 255.0 };
    let of_unit = if max > 0.0 { top / max } else { 0.0 };
    let inverse = v.splat(of_unit);
    let mut total = v.splat_i32(0);
    let int8 = &mut p.int8[row * PLANES * n..][..PLANES * n];
    for t in (0..n).step_by(4 * V::LANES) {
        let mut whole = [v.splat_i32(0); 4];
        for i in 0..4 {
            whole[i] = v.nearest(v.mul(v.load(x, t + i * V::LANES), inverse));
            if PLANES == 2 {
                total = v.add_i32(total, whole[i]);
            }
        }
        if PLANES == 2 {
            v.store_planes(int8, t, whole);
        } else {
            total = v.store_unsigned_bytes(int8, t, whole, total);
        }
    }
    let sum = v.sum_i32(total);
    p.scale[row] = max / top;
    p.offset[row] = -codec.params.width.centre() * p.scale[row] * sum;
    if !codec.params.symmetric {
        let mut mid_sum = v.splat(0.0);
        for t in (0..n).step_by(V::LANES) {
            mid_sum = v.mul_add(v.load(weights, t), v.load(mid, t), mid_sum);
        }
        p.offset[row] += v.sum(mid_sum);
    }
    if PLANES == 2 {
        return false;
    }
    let lost = of_unit * v.sum(all) - sum;
    // In this order, as the squares of small weights may be too small for a float and those of the unit too large.
    let power = allowed(NMSE) * (v.sum(squares) * of_unit * of_unit);
    is_coarse(NMSE, lost, sum, excess(v, &x[..n], inverse, power))
}

/// What the squares of the errors of rounding `x` times `inverse` come to beyond `power`; something below it where no errors could
/// come to that much.
#[inline(always)]
fn excess<V: TileVector>(v: V, x: &[f32], inverse: V::F32, power: f32) -> f32 {
    let most = 0.25 * x.len() as f32;
    if power >= most {
        return most - power;
    }
    let mut sum = v.splat(0.0);
    for t in (0..x.len()).step_by(V::LANES) {
        let x = v.mul(v.load(x, t), inverse);
        let error = v.rest(x, v.nearest(x));
        sum = v.mul_add(error, error, sum);
    }
    v.sum(sum) - power
}

/// Rounds what [`round_weights`] left of the coarse row `to` to int8 and puts it there; coarse rows are not before that place.
#[inline(always)]
fn round_rest<V: TileVector>(v: V, codec: &GroupCodec, p: &mut Probabilities, step: &[f32; MAX_PAGE], to: usize) {
    let (n, from) = (codec.page, p.coarse[to]);
    let weights = &p.p[from * n..][..n];
    let inverse = v.splat(1.0 / p.scale[from]);
    let mut total = v.splat_i32(0);
    for t in (0..n).step_by(4 * V::LANES) {
        let mut rest = [v.splat_i32(0); 4];
        for i in 0..4 {
            let t = t + i * V::LANES;
            let x = v.mul(v.mul(v.load(weights, t), v.load(step, t)), inverse);
            let x = v.sub(x, v.to_f32(v.load_unsigned(&p.int8, from * n + t)));
            rest[i] = v.nearest(v.mul(x, v.splat(REST)));
        }
        total = v.store_bytes(&mut p.int8, to * n + t, rest, total);
    }
    p.scale[to] = p.scale[from] / REST;
    p.offset[to] = -codec.params.width.centre() * p.scale[to] * v.sum_i32(total);
}

/// Adds the outputs of group `g` of the rows from `first` that are `R` rows of `dot`.
#[inline(always)]
fn add_rows<V: TileVector, const W: u8, const R: usize>(
    v: V,
    codec: &GroupCodec,
    page: PageRef,
    p: &Probabilities,
    g: usize,
    first: usize,
    acc: &mut [f32],
) {
    if W == 8 {
        add::<V, W, R, false>(v, codec, page, p, g, first, acc, first == 0, |row| first + row);
    } else {
        add::<V, W, R, true>(v, codec, page, p, g, first, acc, first == 0, |row| first + row);
    }
}

/// Adds to the outputs of group `g` what rounding left of the `R` coarse rows from `first`.
#[inline(always)]
fn add_rest<V: TileVector, const W: u8, const R: usize>(
    v: V,
    codec: &GroupCodec,
    page: PageRef,
    p: &Probabilities,
    g: usize,
    first: usize,
    acc: &mut [f32],
) {
    // Codes of 8 bits have finer coefficients from the start.
    if W != 8 {
        let rows = &p.coarse[first..][..R];
        add::<V, W, R, false>(v, codec, page, p, g, first, acc, false, |row| rows[row]);
    }
}

/// Adds the products of the codes of group `g` with the rounded rows from `first`, row `i` of them to the output `to(i)`. With
/// `ask` the next page is asked for.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn add<V: TileVector, const W: u8, const R: usize, const UNSIGNED: bool>(
    v: V,
    codec: &GroupCodec,
    page: PageRef,
    p: &Probabilities,
    g: usize,
    first: usize,
    acc: &mut [f32],
    ask: bool,
    to: impl Fn(usize) -> usize,
) {
    let (dim, group, of_dot) = (codec.head_dim, codec.group, dot_rows::<V>(planes(W)));
    let n = R / of_dot;
    let stride = planes(W) / of_dot * codec.page;
    let bytes = &p.int8[first * of_dot * stride..][..R * stride];
    let (mut scale, mut offset) = ([v.splat(0.0); R], [v.splat(0.0); R]);
    for i in 0..n {
        (scale[i], offset[i]) = (v.splat(p.scale[first + i]), v.splat(p.offset[first + i]));
    }
    let codes = codes_of(codec, page, g, ask);
    let strips = group / V::STRIP;
    for strip in 0..strips {
        if ask {
            v.ask_part(page.bytes, g * strips + strip, codec.n_groups * strips);
        }
        let coefficients = Coefficients::<UNSIGNED> { bytes, stride };
        let sums = v.dot::<W, R, UNSIGNED>(&codec.tile, codes, strip, coefficients);
        for half in 0..2 {
            let at = g * group + strip * V::STRIP + half * V::LANES;
            for i in 0..n {
                let at = to(i) * dim + at;
                let x = v.mul_add(float_sum::<V, R>(v, &sums, i, half, of_dot), scale[i], offset[i]);
                v.store(acc, at, v.add(x, v.load(acc, at)));
            }
        }
    }
}
