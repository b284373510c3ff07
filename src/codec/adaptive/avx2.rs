//! AVX2 kernels of codec `adaptive`.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::{scalar, AdaptiveCodec, PageRef, Probabilities, Query, QueryForm, SealRows};
use crate::codec::float8::avx2::{e4m3_decode, step_decode};
use crate::codec::hadamard;
use crate::codec::kernels::Kernels;
use crate::codec::mixed::avx2::{add_products, by_levels_and_rows, dot};
use crate::codec::mixed::{Segments, SEGMENT};
use crate::codec::page::MAX_PAGE;
use crate::codec::tile::avx2::{Coefficients, MAX_ROWS, STRIP};
use crate::codec::tile::LANE_BLOCK;
use crate::shape::MAX_HEAD_DIM;
use crate::simd::avx2::{dot_floats, f16_to_f32, load_bytes, prefetch_next, store};
use crate::simd::isa::{feature_table, Avx2};

feature_table!(Avx2 => Kernels<AdaptiveCodec> {
    seal: seal(codec, header, page, rows),
    prepare: prepare(query, form),
    untransform: untransform(row),
    scores: scores(codec, page, query, out),
    accumulate: accumulate(codec, page, p, acc),
});

#[target_feature(enable = "avx2,fma,f16c")]
fn seal(codec: &AdaptiveCodec, header: &mut [u8], page: &mut [u8], rows: &mut SealRows) {
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

#[target_feature(enable = "avx2,fma,f16c")]
fn scores(codec: &AdaptiveCodec, page: PageRef, query: &Query, out: &mut [f32]) {
    let mut mean = [0f32; MAX_HEAD_DIM as usize];
    let mean = &mut mean[..codec.head_dim];
    if codec.params.mean {
        f16_to_f32(codec.smooth().mean_half(codec.smooth_part(page), codec.head_dim), mean);
    }
    for row in (0..query.n_rows()).step_by(MAX_ROWS) {
        let n = query.n_rows() - row;
        by_levels_and_rows!(codec.params.normal, n, score_rows(codec, page, query, row, mean, out));
    }
}

/// Scores of the `R` query rows from `first` against every token of a page.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
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
    let coefficients = Coefficients { bytes: &query.int8[first * dim..][..R * dim], stride: dim };
    let out = &mut out[first * n..][..R * n];
    let plain = &query.rows()[first * dim..][..R * dim];
    let base: [__m256; R] = std::array::from_fn(|i| _mm256_set1_ps(dot_floats(&plain[i * dim..][..dim], mean)));
    let of_row = |values: &[f32]| -> [__m256; R] { std::array::from_fn(|i| _mm256_set1_ps(values[first + i])) };
    let (scale, offset, sum) = (of_row(&query.scale), of_row(&query.offset), of_row(&query.sum));
    let segments = scalar::read_segments(codec, page);
    for (first_segment, count, bits) in scalar::runs(&segments) {
        let (tile, uniform) = (codec.key_tile(count, bits), Segments::uniform(bits, dim / SEGMENT));
        let codes = &page.bytes[scalar::run_offset(codec, &segments, first_segment)..][..tile.bytes()];
        let centre = _mm256_set1_ps(codec.quantizer(bits).centre());
        let offset = offset.map(|offset| _mm256_mul_ps(offset, centre));
        for strip in 0..count * LANE_BLOCK / STRIP {
            let place = first_segment * LANE_BLOCK + strip * STRIP;
            if first == 0 {
                prefetch_next::<_MM_HINT_T1>(page.bytes, page.bytes.len(), place / STRIP, n / STRIP);
            }
            let sums = dot::<NORMAL, R>(&tile, &uniform, codes, strip, coefficients);
            for half in 0..2 {
                let place = place + half * 8;
                let step = load_bytes(page.bytes, codec.steps_offset() + place);
                let step = step_decode(step, page.header[0], codec.params.symmetric);
                for i in 0..R {
                    let x = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[i][half]), scale[i], offset[i]);
                    let mut total = _mm256_fmadd_ps(x, step, base[i]);
                    if !codec.params.symmetric {
                        let mid = e4m3_decode(load_bytes(page.bytes, codec.mids_offset() + place), page.header[1]);
                        total = _mm256_fmadd_ps(mid, sum[i], total);
                    }
                    store(out, i * n + place, total);
                }
            }
        }
    }
    for (q, out) in q.chunks_exact(dim).zip(out.chunks_exact_mut(n)) {
        for (place, channel, x) in scalar::read_outliers(codec, page) {
            out[place] += q[channel] * x;
        }
        if codec.params.adaptive {
            let mut by_place = [0f32; MAX_PAGE];
            by_place[..n].copy_from_slice(out);
            let places = &page.bytes[codec.order_offset()..][..n];
            out.iter_mut().zip(places).for_each(|(to, &place)| *to = by_place[usize::from(place)]);
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn accumulate(codec: &AdaptiveCodec, page: PageRef, p: &mut Probabilities, acc: &mut [f32]) {
    scalar::accumulate(codec, page, p, acc, |page, x, out, n| add_products(page, x, out, n));
}
