//! AVX-512 (VNNI, VBMI) kernels of codec `group`: byte dot products straight on the packed codes.

#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::{scalar, GroupCodec, GroupKernels, PageRef, Probabilities, Query, QueryForm};
use crate::codec::hadamard;
use crate::codec::query::PLANE;
use crate::codec::tile::avx512::{by_width_and_rows, dot, float_sum, Coefficients, MAX_ROWS};
use crate::codec::tile::{Width, LANE_BLOCK};
use crate::shape::MAX_HEAD_DIM;
use crate::simd::avx2::prefetch_next;
use crate::simd::avx512::{load, store};
use crate::simd::IsaToken;

static KERNELS: GroupKernels = GroupKernels {
    // SAFETY: the table is only reachable through `kernels`, which takes the proof that the CPU has these features.
    seal: |codec, header, page, rows| unsafe { seal(codec, header, page, rows) },
    // SAFETY: as above.
    prepare: |query, rows, form| unsafe { prepare(query, rows, form) },
    // SAFETY: as above.
    untransform: |row| unsafe { untransform(row) },
    // SAFETY: as above.
    scores: |codec, page, query, out| unsafe { scores(codec, page, query, out) },
    // SAFETY: as above.
    accumulate: |codec, page, p, acc| unsafe { accumulate(codec, page, p, acc) },
};

/// The table, given the proof that this CPU can run it.
pub(super) fn kernels(_token: IsaToken) -> &'static GroupKernels {
    &KERNELS
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
fn seal(codec: &GroupCodec, header: &mut [u8], page: &mut [u8], rows: &mut super::SealRows) {
    scalar::seal(codec, header, page, rows);
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
fn prepare(query: &mut Query, rows: &[f32], form: &QueryForm) {
    query.prepare(rows, form);
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
fn untransform(row: &mut [f32]) {
    hadamard::rotate(row);
}

/// Sixteen step codes as floats.
#[inline]
#[target_feature(enable = "avx512f")]
fn steps(codec: &GroupCodec, page: PageRef, at: usize) -> __m512 {
    let bytes = &page.bytes[at..at + 16];
    // SAFETY: the slice holds sixteen bytes.
    let codes = _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) });
    if codec.params.symmetric {
        let base = _mm512_set1_epi32(i32::from(page.header[0]) << 23);
        let some = _mm512_test_epi32_mask(codes, codes);
        return _mm512_castsi512_ps(_mm512_maskz_add_epi32(some, _mm512_slli_epi32::<19>(codes), base));
    }
    e4m3(codes, page.header[0])
}

/// FP8 E4M3 codes times `2^(base - 127)`.
#[inline]
#[target_feature(enable = "avx512f")]
fn e4m3(codes: __m512i, base: u8) -> __m512 {
    let magnitude = _mm512_slli_epi32::<20>(_mm512_and_si512(codes, _mm512_set1_epi32(0x7f)));
    let sign = _mm512_slli_epi32::<24>(_mm512_and_si512(codes, _mm512_set1_epi32(0x80)));
    // First by 2^120 (E4M3's bias against f32's), which is exact, then by the page's power.
    let x = _mm512_mul_ps(_mm512_castsi512_ps(magnitude), _mm512_set1_ps(f32::from_bits(247 << 23)));
    let x = _mm512_mul_ps(x, _mm512_set1_ps(crate::codec::float8::power(base)));
    _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(x), sign))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn mids(codec: &GroupCodec, page: PageRef, at: usize) -> __m512 {
    let bytes = &page.bytes[codec.mids_offset() + at..][..16];
    // SAFETY: the slice holds sixteen bytes.
    e4m3(_mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }), page.header[1])
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
fn scores(codec: &GroupCodec, page: PageRef, query: &Query, out: &mut [f32]) {
    let mut mean = [0f32; MAX_HEAD_DIM as usize];
    let mean = &mut mean[..codec.head_dim];
    if codec.params.mean {
        for c in (0..codec.head_dim).step_by(16) {
            let bytes = &page.bytes[codec.mean_offset() + c..][..16];
            // SAFETY: the slice holds sixteen bytes.
            let codes = _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) });
            store(mean, c, e4m3(codes, page.header[2]));
        }
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
    let mut base = [_mm512_setzero_ps(); R];
    if codec.params.mean {
        for (i, base) in base[..n].iter_mut().enumerate() {
            let q = &query.rotated()[(first + i) * codec.head_dim..][..codec.head_dim];
            let mut sum = _mm512_setzero_ps();
            for c in (0..codec.head_dim).step_by(16) {
                sum = _mm512_fmadd_ps(load(q, c), load(mean, c), sum);
            }
            *base = _mm512_set1_ps(_mm512_reduce_add_ps(sum));
        }
    }
    for block in 0..codec.page / LANE_BLOCK {
        if first == 0 {
            prefetch_next(page.bytes, block, codec.page / LANE_BLOCK);
        }
        let mut total = [[_mm512_setzero_ps(); 2]; R];
        for (total, base) in total.iter_mut().zip(base) {
            *total = [base; 2];
        }
        for g in 0..codec.n_groups {
            let tile = &page.bytes[g * codec.tile.bytes()..][..codec.tile.bytes()];
            let int8 = &query.int8[first * planes * codec.head_dim + g * codec.group..];
            let sums = dot::<W, R>(&codec.tile, tile, block, Coefficients { int8, stride: codec.head_dim });
            let at = g * codec.page + block * LANE_BLOCK;
            for half in 0..2 {
                let step = steps(codec, page, codec.steps_offset() + at + half * 16);
                let mid = if codec.params.symmetric { step } else { mids(codec, page, at + half * 16) };
                for i in 0..n {
                    let k = (first + i) * codec.n_groups + g;
                    let x = float_sum::<R>(&sums, i, half, planes);
                    let x = _mm512_fmadd_ps(x, _mm512_set1_ps(query.scale[k]), _mm512_set1_ps(query.offset[k]));
                    total[i][half] = _mm512_fmadd_ps(x, step, total[i][half]);
                    if !codec.params.symmetric {
                        total[i][half] = _mm512_fmadd_ps(mid, _mm512_set1_ps(query.sum[k]), total[i][half]);
                    }
                }
            }
        }
        for (i, total) in total[..n].iter().enumerate() {
            let at = (first + i) * codec.page + block * LANE_BLOCK;
            store(out, at, total[0]);
            store(out, at + 16, total[1]);
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
fn accumulate(codec: &GroupCodec, page: PageRef, p: &mut Probabilities, acc: &mut [f32]) {
    let planes = codec.coefficient_planes();
    for g in 0..codec.n_groups {
        let mut step = [0f32; MAX_PAGE];
        for t in (0..codec.page).step_by(16) {
            store(&mut step, t, steps(codec, page, codec.steps_offset() + g * codec.page + t));
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

/// Largest page of any recipe.
const MAX_PAGE: usize = 256;

/// Multiplies one row of weights with the steps of group `g` and rounds the products to int8.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
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
    let mut total = _mm512_setzero_si512();
    let int8 = &mut p.int8[row * planes * n..][..planes * n];
    let (high_plane, low_plane) = int8.split_at_mut((planes - 1) * n);
    for t in (0..n).step_by(16) {
        let weight = _mm512_mul_ps(load(weights, t), load(step, t));
        let x = _mm512_cvtps_epi32(_mm512_mul_ps(weight, inverse));
        total = _mm512_add_epi32(total, x);
        let low = if planes == 2 {
            let high = _mm512_srai_epi32::<7>(_mm512_add_epi32(x, _mm512_set1_epi32(PLANE / 2)));
            put_int8(&mut high_plane[t..t + 16], high);
            _mm512_sub_epi32(x, _mm512_slli_epi32::<7>(high))
        } else {
            x
        };
        put_int8(&mut low_plane[t..t + 16], low);
    }
    p.scale[row] = max / top;
    p.offset[row] = -codec.params.width.centre() * p.scale[row] * _mm512_reduce_add_epi32(total) as f32;
    if !codec.params.symmetric {
        p.offset[row] += _mm512_reduce_add_ps(mid_sum);
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn put_int8(to: &mut [i8], x: __m512i) {
    let to = &mut to[..16];
    // SAFETY: the slice holds sixteen bytes.
    unsafe { _mm_storeu_si128(to.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(x)) };
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
    let tile = &page.bytes[g * codec.tile.bytes()..][..codec.tile.bytes()];
    let coefficients = Coefficients { int8: &p.int8[first * planes * codec.page..], stride: codec.page };
    let blocks = codec.group / LANE_BLOCK;
    for block in 0..blocks {
        if first == 0 {
            prefetch_next(page.bytes, g * blocks + block, codec.n_groups * blocks);
        }
        let sums = dot::<W, R>(&codec.tile, tile, block, coefficients);
        for i in 0..R / planes {
            let (scale, offset) = (_mm512_set1_ps(p.scale[first + i]), _mm512_set1_ps(p.offset[first + i]));
            for half in 0..2 {
                let at = (first + i) * codec.head_dim + g * codec.group + block * LANE_BLOCK + half * 16;
                let x = _mm512_add_ps(
                    _mm512_fmadd_ps(float_sum::<R>(&sums, i, half, planes), scale, offset),
                    load(acc, at),
                );
                store(acc, at, x);
            }
        }
    }
}
