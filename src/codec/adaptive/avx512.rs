//! AVX-512 kernels of codec `adaptive`.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::{scalar, AdaptiveCodec, PageRef, Probabilities, Query, QueryForm, SealRows};
use crate::codec::float8::avx512::{e4m3_decode, step_decode};
use crate::codec::hadamard;
use crate::codec::kernels::Kernels;
use crate::codec::mixed::avx512::{add_products, by_levels_and_rows, dot, permute};
use crate::codec::mixed::{Segments, SEGMENT};
use crate::codec::tile::avx512::{Codes, Coefficients, MAX_ROWS};
use crate::codec::tile::LANE_BLOCK;
use crate::shape::MAX_HEAD_DIM;
use crate::simd::avx2::prefetch_next_from;
use crate::simd::avx512::{dot_floats, f16_to_f32, load, load_bytes, load_half, store};
use crate::simd::isa::{feature_table, Avx512};

feature_table!(Avx512 => Kernels<AdaptiveCodec> {
    seal: seal(codec, header, page, rows),
    prepare: prepare(query, form),
    untransform: untransform(row),
    scores: scores(codec, page, query, out),
    accumulate: accumulate(codec, page, p, acc),
});

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
fn seal(codec: &AdaptiveCodec, header: &mut [u8], page: &mut [u8], rows: &mut SealRows) {
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

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c")]
fn scores(codec: &AdaptiveCodec, page: PageRef, query: &Query, out: &mut [f32]) {
    prefetch_next_from(page.bytes, codec.codes_bytes());
    let mut mean = [0f32; MAX_HEAD_DIM as usize];
    let mean = &mut mean[..codec.head_dim];
    if codec.params.mean {
        f16_to_f32(codec.smooth().mean_half(codec.smooth_part(page), codec.head_dim), mean);
    }
    let mut row = 0;
    while row < query.n_rows() {
        let n = (query.n_rows() - row).min(MAX_ROWS);
        by_levels_and_rows!(codec.params.normal, n, score_rows(codec, page, query, row, mean, out));
        row += n;
    }
}

/// Scores of the `R` query rows from `first` against every token of a page.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c")]
fn score_rows<const NORMAL: bool, const R: usize>(
    codec: &AdaptiveCodec,
    page: PageRef,
    query: &Query,
    first: usize,
    mean: &[f32],
    out: &mut [f32],
) {
    let (dim, n) = (codec.head_dim, codec.page);
    let q = &query.rotated()[first * dim..][..R * dim];
    let coefficients = Coefficients { int8: &query.int8[first * dim..][..R * dim], stride: dim };
    let out = &mut out[first * n..][..R * n];
    let plain = &query.rows()[first * dim..][..R * dim];
    let base: [__m512; R] = std::array::from_fn(|i| _mm512_set1_ps(dot_floats(&plain[i * dim..][..dim], mean)));
    let of_row = |values: &[f32]| -> [__m512; R] { std::array::from_fn(|i| _mm512_set1_ps(values[first + i])) };
    let (scale, offset, sum) = (of_row(&query.scale), of_row(&query.offset), of_row(&query.sum));
    let segments = scalar::read_segments(codec, page);
    for (first_segment, count, bits) in scalar::runs(&segments) {
        let (tile, uniform) = (codec.key_tile(count, bits), Segments::uniform(bits, dim / SEGMENT));
        let bytes = &page.bytes[scalar::run_offset(codec, &segments, first_segment)..][..tile.bytes()];
        let codes = Codes::new(bytes, page.bytes.len(), first == 0);
        let centre = _mm512_set1_ps(codec.quantizer(bits).centre());
        let offset = offset.map(|offset| _mm512_mul_ps(offset, centre));
        for block in 0..count {
            let sums = dot::<NORMAL, R>(&tile, &uniform, codes, block, coefficients);
            for half in 0..2 {
                let place = (first_segment + block) * LANE_BLOCK + half * 16;
                let step = load_bytes(page.bytes, codec.steps_offset() + place);
                let step = step_decode(step, page.header[0], codec.params.symmetric);
                for i in 0..R {
                    let x = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[i][half]), scale[i], offset[i]);
                    let mut total = _mm512_fmadd_ps(x, step, base[i]);
                    if !codec.params.symmetric {
                        let mid = e4m3_decode(load_bytes(page.bytes, codec.mids_offset() + place), page.header[1]);
                        total = _mm512_fmadd_ps(mid, sum[i], total);
                    }
                    store(out, i * n + place, total);
                }
            }
        }
    }
    for (q, out) in q.chunks_exact(dim).zip(out.chunks_exact_mut(n)) {
        add_outliers(codec, page, q, out);
        if codec.params.adaptive {
            let order = &page.bytes[codec.order_offset()..][..n];
            match n {
                64 => to_tokens::<2>(order, out),
                128 => to_tokens::<4>(order, out),
                _ => to_tokens::<8>(order, out),
            }
        }
    }
}

/// Brings `32 * B` scores from the order of places to that of tokens.
#[inline]
#[target_feature(enable = "avx512f")]
fn to_tokens<const B: usize>(place: &[u8], scores: &mut [f32]) {
    let mut by_place = [[0f32; 32]; B];
    by_place.as_flattened_mut().copy_from_slice(scores);
    for token in (0..32 * B).step_by(16) {
        store(scores, token, permute::<B>(by_place.as_flattened(), load_bytes(place, token)));
    }
}

/// Adds what the exact values of the tokens are worth to a query, by place.
#[inline]
#[target_feature(enable = "avx512f,avx512vl")]
fn add_outliers(codec: &AdaptiveCodec, page: PageRef, q: &[f32], scores: &mut [f32]) {
    let (n, outliers) = (codec.page, codec.params.outliers);
    let (channels, summands) = page.bytes[codec.outliers_offset()..][..3 * outliers * n].split_at(outliers * n);
    let last = _mm512_set1_epi32(q.len() as i32 - 1);
    for i in 0..outliers {
        for place in (0..n).step_by(16) {
            let summand = load_half(summands, 2 * (i * n + place));
            let channels = load_bytes(channels, i * n + place);
            // SAFETY: no index is beyond the last.
            let q = unsafe { _mm512_i32gather_ps::<4>(_mm512_min_epu32(channels, last), q.as_ptr()) };
            store(scores, place, _mm512_fmadd_ps(q, summand, load(scores, place)));
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c")]
fn accumulate(codec: &AdaptiveCodec, page: PageRef, p: &mut Probabilities, acc: &mut [f32]) {
    prefetch_next_from(page.bytes, codec.codes_bytes());
    scalar::accumulate(codec, page, p, acc, |page, x, out, n| add_products(page, x, out, n));
}
