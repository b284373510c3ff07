//! AVX2 kernels of codec `group`: byte dot products straight on the packed codes.

#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::{scalar, GroupCodec, PageRef, Probabilities, Query, QueryForm, NMSE};
use crate::codec::float8::avx2::{e4m3_decode, step_decode};
use crate::codec::hadamard;
use crate::codec::kernels::Kernels;
use crate::codec::page::MAX_PAGE;
use crate::codec::query::{allowed, is_coarse, PLANE, REST};
use crate::codec::tile::avx2::{by_width_and_rows, dot, join_planes, planes, put_pairs, Coefficients, MAX_ROWS, STRIP};
use crate::codec::tile::Width;
use crate::shape::MAX_HEAD_DIM;
use crate::simd::avx2::{dot_floats, f16_to_f32, load, load_bytes, prefetch_next, reduce_add, reduce_max, store};
use crate::simd::isa::{feature_table, Avx2};

feature_table!(Avx2 => Kernels<GroupCodec> {
    seal: seal(codec, header, page, rows),
    prepare: prepare(query, form),
    untransform: untransform(row),
    scores: scores(codec, page, query, out),
    accumulate: accumulate(codec, page, p, acc),
});

#[target_feature(enable = "avx2,fma,f16c")]
fn seal(codec: &GroupCodec, header: &mut [u8], page: &mut [u8], rows: &mut super::SealRows) {
    scalar::seal(codec, header, page, rows);
}

#[target_feature(enable = "avx2,fma,f16c")]
fn prepare(query: &mut Query, form: &QueryForm) {
    query.prepare(form);
}

#[target_feature(enable = "avx2,fma,f16c")]
fn untransform(row: &mut [f32]) {
    hadamard::rotate(row);
}

/// Eight steps, from `at` in the array of steps.
#[inline]
#[target_feature(enable = "avx2")]
fn steps(codec: &GroupCodec, page: PageRef, at: usize) -> __m256 {
    step_decode(load_bytes(page.bytes, codec.steps_offset() + at), page.header[0], codec.params.symmetric)
}

/// Eight mid-points, from `at` in the array of mid-points.
#[inline]
#[target_feature(enable = "avx2")]
fn mids(codec: &GroupCodec, page: PageRef, at: usize) -> __m256 {
    e4m3_decode(load_bytes(page.bytes, codec.mids_offset() + at), page.header[1])
}

#[target_feature(enable = "avx2,fma,f16c")]
fn scores(codec: &GroupCodec, page: PageRef, query: &Query, out: &mut [f32]) {
    let mut mean = [0f32; MAX_HEAD_DIM as usize];
    let mean = &mut mean[..codec.head_dim];
    if codec.params.mean {
        f16_to_f32(codec.smooth().mean_half(codec.smooth_part(page), codec.head_dim), mean);
    }
    for row in (0..query.n_rows()).step_by(MAX_ROWS) {
        let n = query.n_rows() - row;
        by_width_and_rows!(codec.params.width, n, score_rows(codec, page, query, row, mean, out));
    }
}

/// Scores of the `R` query rows from `first` against every token of a page.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn score_rows<const W: u8, const R: usize>(
    codec: &GroupCodec,
    page: PageRef,
    query: &Query,
    first: usize,
    mean: &[f32],
    out: &mut [f32],
) {
    let stride = planes(W) * codec.head_dim;
    let mut base = [_mm256_setzero_ps(); R];
    if codec.params.mean {
        for (i, base) in base.iter_mut().enumerate() {
            let q = &query.rows()[(first + i) * codec.head_dim..][..codec.head_dim];
            *base = _mm256_set1_ps(dot_floats(q, mean));
        }
    }
    let mut bytes = &query.int8[first * stride..][..R * stride];
    let mut pairs = [0i8; MAX_ROWS * 2 * MAX_HEAD_DIM as usize];
    if W == 8 {
        for (planes, pairs) in bytes.chunks_exact(stride).zip(pairs.chunks_exact_mut(stride)) {
            join_planes(planes, pairs);
        }
        bytes = &pairs[..R * stride];
    }
    for strip in 0..codec.page / STRIP {
        if first == 0 {
            prefetch_next::<_MM_HINT_T1>(page.bytes, page.bytes.len(), strip, codec.page / STRIP);
        }
        let mut total = [[_mm256_setzero_ps(); 2]; R];
        for (total, base) in total.iter_mut().zip(base) {
            *total = [base; 2];
        }
        for g in 0..codec.n_groups {
            let tile = &page.bytes[g * codec.tile.bytes()..][..codec.tile.bytes()];
            let coefficients = Coefficients { bytes: &bytes[g * planes(W) * codec.group..], stride };
            let sums = dot::<W, R, false>(&codec.tile, tile, strip, coefficients);
            for half in 0..2 {
                let at = g * codec.page + strip * STRIP + half * 8;
                let step = steps(codec, page, at);
                let mid = if codec.params.symmetric { step } else { mids(codec, page, at) };
                for i in 0..R {
                    let k = (first + i) * codec.n_groups + g;
                    let x = _mm256_cvtepi32_ps(sums[i][half]);
                    let x = _mm256_fmadd_ps(x, _mm256_set1_ps(query.scale[k]), _mm256_set1_ps(query.offset[k]));
                    total[i][half] = _mm256_fmadd_ps(x, step, total[i][half]);
                    if !codec.params.symmetric {
                        total[i][half] = _mm256_fmadd_ps(mid, _mm256_set1_ps(query.sum[k]), total[i][half]);
                    }
                }
            }
        }
        for (i, total) in total.iter().enumerate() {
            let at = (first + i) * codec.page + strip * STRIP;
            store(out, at, total[0]);
            store(out, at + 8, total[1]);
        }
    }
}

#[target_feature(enable = "avx2,fma")]
fn accumulate(codec: &GroupCodec, page: PageRef, p: &mut Probabilities, acc: &mut [f32]) {
    for g in 0..codec.n_groups {
        let mut step = [0f32; MAX_PAGE];
        for t in (0..codec.page).step_by(8) {
            store(&mut step, t, steps(codec, page, g * codec.page + t));
        }
        p.coarse.clear();
        for row in 0..p.n_rows {
            if codec.coefficient_planes() == 2 {
                round_weights::<2>(codec, page, p, g, row, &step);
            } else if round_weights::<1>(codec, page, p, g, row, &step) {
                p.coarse.push(row);
            }
        }
        for row in (0..p.n_rows).step_by(MAX_ROWS) {
            by_width_and_rows!(codec.params.width, p.n_rows - row, add_rows(codec, page, p, g, row, acc));
        }
        for (i, &row) in p.coarse.iter().enumerate() {
            round_rest(codec, &mut p.int8, &mut p.scale, &mut p.offset, &p.p, &step, [row, i]);
        }
        for row in (0..p.coarse.len()).step_by(MAX_ROWS) {
            by_width_and_rows!(codec.params.width, p.coarse.len() - row, add_rest(codec, page, p, g, row, acc));
        }
    }
}

/// Multiplies one row of weights with the steps of group `g` and rounds the products to uint8, or to int16 pairs. Gives
/// whether that took too much of them.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn round_weights<const PLANES: usize>(
    codec: &GroupCodec,
    page: PageRef,
    p: &mut Probabilities,
    g: usize,
    row: usize,
    step: &[f32; MAX_PAGE],
) -> bool {
    let n = codec.page;
    let mut max = _mm256_setzero_ps();
    let mut mid_sum = _mm256_setzero_ps();
    let mut weights = [0f32; MAX_PAGE];
    for t in (0..n).step_by(8) {
        let weight = load(&p.p, row * n + t);
        if !codec.params.symmetric {
            mid_sum = _mm256_fmadd_ps(weight, mids(codec, page, g * n + t), mid_sum);
        }
        let weight = _mm256_mul_ps(weight, load(step, t));
        store(&mut weights, t, weight);
        max = _mm256_max_ps(max, weight);
    }
    let max = reduce_max(max);
    let top = if PLANES == 2 { 127.0 * PLANE as f32 } else { 255.0 };
    let inverse = _mm256_set1_ps(if max > 0.0 { top / max } else { 0.0 });
    let allowed = _mm256_set1_ps(-allowed(NMSE));
    let mut total = _mm256_setzero_si256();
    let (mut lost, mut excess) = (_mm256_setzero_ps(), _mm256_setzero_ps());
    let bytes = &mut p.int8[row * PLANES * n..][..PLANES * n];
    for t in (0..n).step_by(16) {
        let x = [t, t + 8].map(|t| _mm256_mul_ps(load(&weights, t), inverse));
        let whole = x.map(|x| _mm256_cvtps_epi32(x));
        total = _mm256_add_epi32(total, _mm256_add_epi32(whole[0], whole[1]));
        let packed = _mm256_permute4x64_epi64::<0xd8>(_mm256_packs_epi32(whole[0], whole[1]));
        if PLANES == 2 {
            put_pairs(&mut bytes[2 * t..], packed);
            continue;
        }
        for (x, whole) in x.into_iter().zip(whole) {
            let error = _mm256_sub_ps(x, _mm256_cvtepi32_ps(whole));
            lost = _mm256_add_ps(lost, error);
            excess = _mm256_fmadd_ps(error, error, _mm256_fmadd_ps(_mm256_mul_ps(x, x), allowed, excess));
        }
        let (low, high) = (_mm256_castsi256_si128(packed), _mm256_extracti128_si256::<1>(packed));
        put_bytes(&mut bytes[t..], _mm_packus_epi16(low, high));
    }
    let sum = reduce_add(_mm256_cvtepi32_ps(total));
    p.scale[row] = max / top;
    p.offset[row] = -codec.params.width.centre() * p.scale[row] * sum;
    if !codec.params.symmetric {
        p.offset[row] += reduce_add(mid_sum);
    }
    PLANES == 1 && is_coarse(NMSE, reduce_add(lost), sum, reduce_add(excess))
}

/// Rounds what [`round_weights`] left of the row `from` to int8 and makes of it the row `to`, not behind it.
#[target_feature(enable = "avx2,fma")]
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
    let inverse = _mm256_set1_ps(1.0 / scale[from]);
    let mut total = _mm256_setzero_si256();
    for t in (0..n).step_by(16) {
        let rest = [t, t + 8].map(|t| {
            let x = _mm256_mul_ps(_mm256_mul_ps(load(weights, t), load(step, t)), inverse);
            let x = _mm256_sub_ps(x, _mm256_cvtepi32_ps(load_unsigned(int8, from * n + t)));
            _mm256_cvtps_epi32(_mm256_mul_ps(x, _mm256_set1_ps(REST)))
        });
        total = _mm256_add_epi32(total, _mm256_add_epi32(rest[0], rest[1]));
        let packed = _mm256_permute4x64_epi64::<0xd8>(_mm256_packs_epi32(rest[0], rest[1]));
        let (low, high) = (_mm256_castsi256_si128(packed), _mm256_extracti128_si256::<1>(packed));
        put_bytes(&mut int8[to * n + t..], _mm_packs_epi16(low, high));
    }
    scale[to] = scale[from] / REST;
    offset[to] = -codec.params.width.centre() * scale[to] * reduce_add(_mm256_cvtepi32_ps(total));
}

/// Eight bytes of a row of weights as [`round_weights`] rounded them.
#[inline]
#[target_feature(enable = "avx2")]
fn load_unsigned(x: &[i8], at: usize) -> __m256i {
    let x = &x[at..at + 8];
    // SAFETY: the slice holds eight bytes.
    _mm256_cvtepu8_epi32(unsafe { _mm_loadl_epi64(x.as_ptr().cast()) })
}

#[inline]
#[target_feature(enable = "avx2")]
fn put_bytes(to: &mut [i8], x: __m128i) {
    let to = &mut to[..16];
    // SAFETY: the slice holds sixteen bytes.
    unsafe { _mm_storeu_si128(to.as_mut_ptr().cast(), x) };
}

/// Adds the outputs of group `g` of the `R` rows from `first`.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn add_rows<const W: u8, const R: usize>(
    codec: &GroupCodec,
    page: PageRef,
    p: &Probabilities,
    g: usize,
    first: usize,
    acc: &mut [f32],
) {
    if W == 8 {
        add::<W, R, false>(codec, page, p, g, first, acc, first == 0, |row| first + row);
    } else {
        add::<W, R, true>(codec, page, p, g, first, acc, first == 0, |row| first + row);
    }
}

/// Adds to the outputs of group `g` what rounding left of the `R` coarse rows from `first`.
#[inline]
#[target_feature(enable = "avx2,fma")]
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
        add::<W, R, false>(codec, page, p, g, first, acc, false, |row| rows[row]);
    }
}

/// Adds the products of the codes of group `g` with the rounded rows from `first`, row `i` of them to the output `to(i)`.
#[inline]
#[allow(clippy::too_many_arguments)]
#[target_feature(enable = "avx2,fma")]
fn add<const W: u8, const R: usize, const UNSIGNED: bool>(
    codec: &GroupCodec,
    page: PageRef,
    p: &Probabilities,
    g: usize,
    first: usize,
    acc: &mut [f32],
    prefetch: bool,
    to: impl Fn(usize) -> usize,
) {
    let stride = planes(W) * codec.page;
    let tile = &page.bytes[g * codec.tile.bytes()..][..codec.tile.bytes()];
    let coefficients = Coefficients::<UNSIGNED> { bytes: &p.int8[first * stride..], stride };
    let strips = codec.group / STRIP;
    for strip in 0..strips {
        if prefetch {
            prefetch_next::<_MM_HINT_T1>(page.bytes, page.bytes.len(), g * strips + strip, codec.n_groups * strips);
        }
        let sums = dot::<W, R, UNSIGNED>(&codec.tile, tile, strip, coefficients);
        for (i, sums) in sums.iter().enumerate() {
            let (scale, offset) = (_mm256_set1_ps(p.scale[first + i]), _mm256_set1_ps(p.offset[first + i]));
            let at = to(i) * codec.head_dim + g * codec.group + strip * STRIP;
            for (at, sum) in [at, at + 8].into_iter().zip(sums) {
                let x = _mm256_fmadd_ps(_mm256_cvtepi32_ps(*sum), scale, offset);
                store(acc, at, _mm256_add_ps(x, load(acc, at)));
            }
        }
    }
}
