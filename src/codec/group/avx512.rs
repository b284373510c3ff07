//! AVX-512 (VNNI, VBMI) kernels of codec `group`: byte dot products straight on the packed codes.

#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::{scalar, GroupCodec, PageRef, Probabilities, Query, QueryForm, NMSE};
use crate::codec::float8::avx512::{e4m3_decode, step_decode};
use crate::codec::hadamard;
use crate::codec::kernels::Kernels;
use crate::codec::page::MAX_PAGE;
use crate::codec::query::{allowed, is_coarse, PLANE, REST};
use crate::codec::tile::avx512::{by_width_and_rows, dot, float_sum, Codes, Coefficients, MAX_ROWS};
use crate::codec::tile::{Width, LANE_BLOCK};
use crate::shape::MAX_HEAD_DIM;
use crate::simd::avx2::prefetch_next_from;
use crate::simd::avx512::{
    dot_floats, f16_to_f32, load, load_bytes, pack_bytes, pack_unsigned_bytes, store, store_bytes,
};
use crate::simd::isa::{feature_table, Avx512};

feature_table!(Avx512 => Kernels<GroupCodec> {
    seal: seal(codec, header, page, rows),
    prepare: prepare(query, form),
    untransform: untransform(row),
    scores: scores(codec, page, query, out),
    accumulate: accumulate(codec, page, p, acc),
});

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
fn seal(codec: &GroupCodec, header: &mut [u8], page: &mut [u8], rows: &mut super::SealRows) {
    scalar::seal(codec, header, page, rows);
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
fn prepare(query: &mut Query, form: &QueryForm) {
    query.prepare(form);
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
fn untransform(row: &mut [f32]) {
    hadamard::rotate(row);
}

/// Sixteen steps.
#[inline]
#[target_feature(enable = "avx512f")]
fn steps(codec: &GroupCodec, page: PageRef, at: usize) -> __m512 {
    step_decode(load_bytes(page.bytes, codec.steps_offset() + at), page.header[0], codec.params.symmetric)
}

/// Sixteen mid-points.
#[inline]
#[target_feature(enable = "avx512f")]
fn mids(codec: &GroupCodec, page: PageRef, at: usize) -> __m512 {
    e4m3_decode(load_bytes(page.bytes, codec.mids_offset() + at), page.header[1])
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
fn scores(codec: &GroupCodec, page: PageRef, query: &Query, out: &mut [f32]) {
    prefetch_next_from(page.bytes, codec.steps_offset());
    let mut mean = [0f32; MAX_HEAD_DIM as usize];
    let mean = &mut mean[..codec.head_dim];
    if codec.params.mean {
        f16_to_f32(codec.smooth().mean_half(codec.smooth_part(page), codec.head_dim), mean);
    }
    let planes = codec.coefficient_planes();
    let mut row = 0;
    while row < query.n_rows() {
        let n = (query.n_rows() - row).min(MAX_ROWS / planes);
        by_width_and_rows!(codec.params.width, n * planes, score_rows(codec, page, query, row, mean, out));
        row += n;
    }
}

/// Scores of the `R / planes` query rows from `first` against every token of a page.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
fn score_rows<const W: u8, const R: usize>(
    codec: &GroupCodec,
    page: PageRef,
    query: &Query,
    first: usize,
    mean: &[f32],
    out: &mut [f32],
) {
    let planes = if W == 8 { 2 } else { 1 };
    let n = R / planes;
    let out = &mut out[first * codec.page..][..n * codec.page];
    let mut base = [_mm512_setzero_ps(); R];
    if codec.params.mean {
        for i in 0..n {
            let q = &query.rows()[(first + i) * codec.head_dim..][..codec.head_dim];
            base[i] = _mm512_set1_ps(dot_floats(q, mean));
        }
    }
    for g in 0..codec.n_groups {
        let codes = page_codes(codec, page, g, first);
        let int8 = &query.int8[first * planes * codec.head_dim + g * codec.group..];
        // Row `n - 1` stands in for those that are second planes.
        let of_row = |values: &[f32]| -> [__m512; R] {
            std::array::from_fn(|i| _mm512_set1_ps(values[(first + i.min(n - 1)) * codec.n_groups + g]))
        };
        let (scale, offset, sum) = (of_row(&query.scale), of_row(&query.offset), of_row(&query.sum));
        for block in 0..codec.page / LANE_BLOCK {
            let sums = dot::<W, R, false>(&codec.tile, codes, block, Coefficients { int8, stride: codec.head_dim });
            for half in 0..2 {
                let at = block * LANE_BLOCK + half * 16;
                let step = steps(codec, page, g * codec.page + at);
                let mid = if codec.params.symmetric { step } else { mids(codec, page, g * codec.page + at) };
                for i in 0..n {
                    let at = i * codec.page + at;
                    let mut total = if g == 0 { base[i] } else { load(out, at) };
                    let x = _mm512_fmadd_ps(float_sum::<R>(&sums, i, half, planes), scale[i], offset[i]);
                    total = _mm512_fmadd_ps(x, step, total);
                    if !codec.params.symmetric {
                        total = _mm512_fmadd_ps(mid, sum[i], total);
                    }
                    store(out, at, total);
                }
            }
        }
    }
}

/// The tile of group `g`; only the pass of the first rows asks for the next page.
#[inline]
fn page_codes<'a>(codec: &GroupCodec, page: PageRef<'a>, g: usize, first: usize) -> Codes<'a> {
    let bytes = &page.bytes[g * codec.tile.bytes()..][..codec.tile.bytes()];
    Codes::new(bytes, page.bytes.len(), first == 0)
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
fn accumulate(codec: &GroupCodec, page: PageRef, p: &mut Probabilities, acc: &mut [f32]) {
    prefetch_next_from(page.bytes, codec.steps_offset());
    let planes = codec.coefficient_planes();
    for g in 0..codec.n_groups {
        let mut step = [0f32; MAX_PAGE];
        for t in (0..codec.page).step_by(16) {
            store(&mut step, t, steps(codec, page, g * codec.page + t));
        }
        p.coarse.clear();
        for row in 0..p.n_rows {
            if planes == 2 {
                round_weights::<2>(codec, page, p, g, row, &step);
            } else if round_weights::<1>(codec, page, p, g, row, &step) {
                p.coarse.push(row);
            }
        }
        let mut row = 0;
        while row < p.n_rows {
            let n = (p.n_rows - row).min(MAX_ROWS / planes);
            by_width_and_rows!(codec.params.width, n * planes, add_rows(codec, page, p, g, row, acc));
            row += n;
        }
        for (i, &row) in p.coarse.iter().enumerate() {
            round_rest(codec, &mut p.int8, &mut p.scale, &mut p.offset, &p.p, &step, [row, i]);
        }
        let mut row = 0;
        while row < p.coarse.len() {
            let n = (p.coarse.len() - row).min(MAX_ROWS);
            by_width_and_rows!(codec.params.width, n, add_rest(codec, page, p, g, row, acc));
            row += n;
        }
    }
}

/// Multiplies one row of weights with the steps of group `g` and rounds the products to uint8, or to two planes of int8.
/// Gives whether that took too much of them.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn round_weights<const PLANES: usize>(
    codec: &GroupCodec,
    page: PageRef,
    p: &mut Probabilities,
    g: usize,
    row: usize,
    step: &[f32; MAX_PAGE],
) -> bool {
    let n = codec.page;
    let weights = &p.p[row * n..][..n];
    let mut max = _mm512_setzero_ps();
    let mut mid_sum = _mm512_setzero_ps();
    for t in (0..n).step_by(16) {
        let weight = load(weights, t);
        if !codec.params.symmetric {
            mid_sum = _mm512_fmadd_ps(weight, mids(codec, page, g * n + t), mid_sum);
        }
        max = _mm512_max_ps(max, _mm512_mul_ps(weight, load(step, t)));
    }
    let max = _mm512_reduce_max_ps(max);
    let top = if PLANES == 2 { 127.0 * PLANE as f32 } else { 255.0 };
    let inverse = _mm512_set1_ps(if max > 0.0 { top / max } else { 0.0 });
    let allowed = _mm512_set1_ps(-allowed(NMSE));
    let mut total = _mm512_setzero_si512();
    let (mut lost, mut excess) = (_mm512_setzero_ps(), _mm512_setzero_ps());
    let int8 = &mut p.int8[row * PLANES * n..][..PLANES * n];
    for t in (0..n).step_by(64) {
        let x =
            [t, t + 16, t + 32, t + 48].map(|t| _mm512_mul_ps(_mm512_mul_ps(load(weights, t), load(step, t)), inverse));
        let whole = x.map(|x| _mm512_cvtps_epi32(x));
        if PLANES == 2 {
            total = whole.iter().fold(total, |total, x| _mm512_add_epi32(total, *x));
            let high = whole.map(|x| _mm512_srai_epi32::<7>(_mm512_add_epi32(x, _mm512_set1_epi32(PLANE / 2))));
            store_bytes(int8, t, pack_bytes(high));
            let low = std::array::from_fn(|i| _mm512_sub_epi32(whole[i], _mm512_slli_epi32::<7>(high[i])));
            store_bytes(int8, n + t, pack_bytes(low));
            continue;
        }
        for x in x {
            let error = _mm512_reduce_ps::<TO_NEAREST>(x);
            lost = _mm512_add_ps(lost, error);
            excess = _mm512_fmadd_ps(error, error, _mm512_fmadd_ps(_mm512_mul_ps(x, x), allowed, excess));
        }
        let bytes = pack_unsigned_bytes(whole);
        total = _mm512_dpbusd_epi32(total, bytes, _mm512_set1_epi8(1));
        store_bytes(int8, t, bytes);
    }
    let sum = _mm512_reduce_add_epi32(total) as f32;
    p.scale[row] = max / top;
    p.offset[row] = -codec.params.width.centre() * p.scale[row] * sum;
    if !codec.params.symmetric {
        p.offset[row] += _mm512_reduce_add_ps(mid_sum);
    }
    PLANES == 1 && is_coarse(NMSE, _mm512_reduce_add_ps(lost), sum, _mm512_reduce_add_ps(excess))
}

/// Rounding control of `_mm512_reduce_ps`: what is left of a number after rounding it to the nearest integer, as
/// `_mm512_cvtps_epi32` does.
const TO_NEAREST: i32 = 8;

/// Rounds what [`round_weights`] left of the row `from` to int8 and makes of it the row `to`, not behind it.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn round_rest(
    codec: &GroupCodec,
    int8: &mut [i8],
    scale: &mut [f32],
    offset: &mut [f32],
    weights: &[f32],
    step: &[f32; MAX_PAGE],
    [from, to]: [usize; 2],
) {
    let n = codec.page;
    let weights = &weights[from * n..][..n];
    let inverse = _mm512_set1_ps(1.0 / scale[from]);
    let mut total = _mm512_setzero_si512();
    for t in (0..n).step_by(64) {
        let rest = [t, t + 16, t + 32, t + 48].map(|t| {
            let x = _mm512_mul_ps(_mm512_mul_ps(load(weights, t), load(step, t)), inverse);
            let x = _mm512_sub_ps(x, _mm512_cvtepi32_ps(load_unsigned(int8, from * n + t)));
            _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(REST)))
        });
        let bytes = pack_bytes(rest);
        total = _mm512_dpbusd_epi32(total, _mm512_set1_epi8(1), bytes);
        store_bytes(int8, to * n + t, bytes);
    }
    scale[to] = scale[from] / REST;
    offset[to] = -codec.params.width.centre() * scale[to] * _mm512_reduce_add_epi32(total) as f32;
}

/// Sixteen bytes of a row of weights as [`round_weights`] rounded them.
#[inline]
#[target_feature(enable = "avx512f")]
fn load_unsigned(x: &[i8], at: usize) -> __m512i {
    let x = &x[at..at + 16];
    // SAFETY: the slice holds sixteen bytes.
    _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(x.as_ptr().cast()) })
}

/// Adds the outputs of group `g` of the `R / planes` rows from `first`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
fn add_rows<const W: u8, const R: usize>(
    codec: &GroupCodec,
    page: PageRef,
    p: &Probabilities,
    g: usize,
    first: usize,
    acc: &mut [f32],
) {
    let n = if W == 8 { R / 2 } else { R };
    let codes = page_codes(codec, page, g, first);
    let acc = &mut acc[first * codec.head_dim..][..n * codec.head_dim];
    if W == 8 {
        add::<W, R, false>(codec, codes, p, g, first, acc, |row| row);
    } else {
        add::<W, R, true>(codec, codes, p, g, first, acc, |row| row);
    }
}

/// Adds to the outputs of group `g` what rounding left of the `R` coarse rows from `first`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
fn add_rest<const W: u8, const R: usize>(
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
        let bytes = &page.bytes[g * codec.tile.bytes()..][..codec.tile.bytes()];
        add::<W, R, false>(codec, Codes::new(bytes, 0, false), p, g, first, acc, |row| rows[row]);
    }
}

/// Adds the products of the codes of group `g` with the rounded rows from `first`, row `i` of them to the output `to(i)`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
fn add<const W: u8, const R: usize, const UNSIGNED: bool>(
    codec: &GroupCodec,
    codes: Codes,
    p: &Probabilities,
    g: usize,
    first: usize,
    acc: &mut [f32],
    to: impl Fn(usize) -> usize,
) {
    let planes = if W == 8 { 2 } else { 1 };
    let n = R / planes;
    let int8 = &p.int8[first * planes * codec.page..];
    // Row `n - 1` stands in for those that are second planes.
    let of_row =
        |values: &[f32]| -> [__m512; R] { std::array::from_fn(|i| _mm512_set1_ps(values[first + i.min(n - 1)])) };
    let (scale, offset) = (of_row(&p.scale), of_row(&p.offset));
    for block in 0..codec.group / LANE_BLOCK {
        let coefficients = Coefficients::<UNSIGNED> { int8, stride: codec.page };
        let sums = dot::<W, R, UNSIGNED>(&codec.tile, codes, block, coefficients);
        for half in 0..2 {
            let at = g * codec.group + block * LANE_BLOCK + half * 16;
            for i in 0..n {
                let at = to(i) * codec.head_dim + at;
                let x = _mm512_fmadd_ps(float_sum::<R>(&sums, i, half, planes), scale[i], offset[i]);
                store(acc, at, _mm512_add_ps(x, load(acc, at)));
            }
        }
    }
}
