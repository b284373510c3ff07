//! AVX-512 (VNNI, VBMI) kernels of codec `group`: byte dot products straight on the packed codes.

#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::{scalar, GroupCodec, GroupKernels, PageRef, Probabilities, Query, QueryForm};
use crate::codec::float8::avx512::{e4m3_decode, step_decode};
use crate::codec::hadamard;
use crate::codec::query::PLANE;
use crate::codec::tile::avx512::{by_width_and_rows, dot, float_sum, Codes, Coefficients, MAX_ROWS};
use crate::codec::tile::{Width, LANE_BLOCK};
use crate::codec::MAX_PAGE;
use crate::shape::MAX_HEAD_DIM;
use crate::simd::avx2::prefetch_next_from;
use crate::simd::avx512::{dot_floats, f16_to_f32, load, load_bytes, pack_bytes, store, store_bytes};
use crate::simd::{Isa, IsaToken};

static KERNELS: GroupKernels = GroupKernels {
    // SAFETY: the table is only reachable through `kernels`, which asks for the proof that the CPU has these features.
    seal: |codec, header, page, rows| unsafe { seal(codec, header, page, rows) },
    // SAFETY: as above.
    prepare: |query, form| unsafe { prepare(query, form) },
    // SAFETY: as above.
    untransform: |row| unsafe { untransform(row) },
    // SAFETY: as above.
    scores: |codec, page, query, out| unsafe { scores(codec, page, query, out) },
    // SAFETY: as above.
    accumulate: |codec, page, p, acc| unsafe { accumulate(codec, page, p, acc) },
};

/// The table, given the proof that this CPU can run it.
pub(super) fn kernels(token: IsaToken) -> &'static GroupKernels {
    token.expect(Isa::Avx512);
    &KERNELS
}

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
            let sums = dot::<W, R>(&codec.tile, codes, block, Coefficients { int8, stride: codec.head_dim });
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

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
fn accumulate(codec: &GroupCodec, page: PageRef, p: &mut Probabilities, acc: &mut [f32]) {
    prefetch_next_from(page.bytes, codec.steps_offset());
    let planes = codec.coefficient_planes();
    for g in 0..codec.n_groups {
        let mut step = [0f32; MAX_PAGE];
        for t in (0..codec.page).step_by(16) {
            store(&mut step, t, steps(codec, page, g * codec.page + t));
        }
        for row in 0..p.n_rows {
            round_weights(codec, page, p, g, row, &step, planes);
        }
        let mut row = 0;
        while row < p.n_rows {
            let n = (p.n_rows - row).min(MAX_ROWS / planes);
            by_width_and_rows!(codec.params.width, n * planes, add_rows(codec, page, p, g, row, acc));
            row += n;
        }
    }
}

/// Multiplies one row of weights with the steps of group `g` and rounds the products to int8.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn round_weights(
    codec: &GroupCodec,
    page: PageRef,
    p: &mut Probabilities,
    g: usize,
    row: usize,
    step: &[f32; MAX_PAGE],
    planes: usize,
) {
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
    let top = if planes == 2 { 127.0 * PLANE as f32 } else { 127.0 };
    let inverse = _mm512_set1_ps(if max > 0.0 { top / max } else { 0.0 });
    let product = |t: usize| _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_mul_ps(load(weights, t), load(step, t)), inverse));
    let mut total = _mm512_setzero_si512();
    let int8 = &mut p.int8[row * planes * n..][..planes * n];
    let (high_plane, low_plane) = int8.split_at_mut((planes - 1) * n);
    for t in (0..n).step_by(64) {
        let mut x = [t, t + 16, t + 32, t + 48].map(product);
        if planes == 2 {
            total = x.iter().fold(total, |total, x| _mm512_add_epi32(total, *x));
            let high = x.map(|x| _mm512_srai_epi32::<7>(_mm512_add_epi32(x, _mm512_set1_epi32(PLANE / 2))));
            store_bytes(high_plane, t, pack_bytes(high));
            x = std::array::from_fn(|i| _mm512_sub_epi32(x[i], _mm512_slli_epi32::<7>(high[i])));
        }
        let low = pack_bytes(x);
        if planes == 1 {
            total = _mm512_dpbusd_epi32(total, _mm512_set1_epi8(1), low);
        }
        store_bytes(low_plane, t, low);
    }
    p.scale[row] = max / top;
    p.offset[row] = -codec.params.width.centre() * p.scale[row] * _mm512_reduce_add_epi32(total) as f32;
    if !codec.params.symmetric {
        p.offset[row] += _mm512_reduce_add_ps(mid_sum);
    }
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
    let planes = if W == 8 { 2 } else { 1 };
    let n = R / planes;
    let codes = page_codes(codec, page, g, first);
    let coefficients = Coefficients { int8: &p.int8[first * planes * codec.page..], stride: codec.page };
    let acc = &mut acc[first * codec.head_dim..][..n * codec.head_dim];
    // Row `n - 1` stands in for those that are second planes.
    let of_row =
        |values: &[f32]| -> [__m512; R] { std::array::from_fn(|i| _mm512_set1_ps(values[first + i.min(n - 1)])) };
    let (scale, offset) = (of_row(&p.scale), of_row(&p.offset));
    for block in 0..codec.group / LANE_BLOCK {
        let sums = dot::<W, R>(&codec.tile, codes, block, coefficients);
        for half in 0..2 {
            let at = g * codec.group + block * LANE_BLOCK + half * 16;
            for i in 0..n {
                let at = i * codec.head_dim + at;
                let x = _mm512_fmadd_ps(float_sum::<R>(&sums, i, half, planes), scale[i], offset[i]);
                store(acc, at, _mm512_add_ps(x, load(acc, at)));
            }
        }
    }
}
