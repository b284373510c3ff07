//! Codec `adaptive` on the vectors of any instruction set.
#![forbid(unsafe_code)]

use super::{scalar, AdaptiveCodec, PageRef, Probabilities, Query, QueryForm, SealRows};
use crate::codec::float8::vector::{e4m3_decode, step_decode};
use crate::codec::hadamard;
use crate::codec::kernels::Kernels;
use crate::codec::mixed::many::add_products;
use crate::codec::mixed::vector::{by_levels_and_rows, MixedVector};
use crate::codec::mixed::{Segments, SEGMENT};
use crate::codec::tile::vector::{Codes, Coefficients};
use crate::codec::tile::LANE_BLOCK;
use crate::shape::MAX_HEAD_DIM;
use crate::simd::vector::dot_floats;

impl<V: MixedVector> Kernels<AdaptiveCodec> for V {
    fn seal(&self, codec: &AdaptiveCodec, header: &mut [u8], page: &mut [u8], rows: &mut SealRows) {
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

    fn scores(&self, codec: &AdaptiveCodec, page: PageRef, query: &Query, out: &mut [f32]) {
        self.run(
            #[inline(always)]
            move |v| scores(v, codec, page, query, out),
        );
    }

    fn accumulate(&self, codec: &AdaptiveCodec, page: PageRef, p: &mut Probabilities, acc: &mut [f32]) {
        self.run(
            #[inline(always)]
            move |v| {
                v.ask_behind(page.bytes, codec.codes_bytes());
                scalar::accumulate(codec, page, p, acc, |page, x, out, n| add_products(v, page, x, out, n));
            },
        );
    }
}

#[inline(always)]
fn scores<V: MixedVector>(v: V, codec: &AdaptiveCodec, page: PageRef, query: &Query, out: &mut [f32]) {
    v.ask_behind(page.bytes, codec.codes_bytes());
    let mut mean = [0f32; MAX_HEAD_DIM as usize];
    let mean = &mut mean[..codec.head_dim];
    if codec.params.mean {
        v.f16_to_f32(codec.smooth().mean_half(codec.smooth_part(page), codec.head_dim), mean);
    }
    let mean = &*mean;
    for row in (0..query.n_rows()).step_by(V::MAX_ROWS) {
        let n = (query.n_rows() - row).min(V::MAX_ROWS);
        by_levels_and_rows!(v: V, codec.params.normal, n, score_rows(codec, page, query, row, mean, out));
    }
}

/// Scores of the `R` query rows from `first` against every token of a page.
#[inline(always)]
fn score_rows<V: MixedVector, const NORMAL: bool, const R: usize>(
    v: V,
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
    let (mut base, mut scale, mut offset, mut sum) =
        ([v.splat(0.0); R], [v.splat(0.0); R], [v.splat(0.0); R], [v.splat(0.0); R]);
    for i in 0..R {
        base[i] = v.splat(dot_floats(v, &plain[i * dim..][..dim], mean));
        scale[i] = v.splat(query.scale[first + i]);
        offset[i] = v.splat(query.offset[first + i]);
        sum[i] = v.splat(query.sum[first + i]);
    }
    let segments = scalar::read_segments(codec, page);
    for (first_segment, count, bits) in scalar::runs(&segments) {
        let (tile, uniform) = (codec.key_tile(count, bits), Segments::uniform(bits, dim / SEGMENT));
        let bytes = &page.bytes[scalar::run_offset(codec, &segments, first_segment)..][..tile.bytes()];
        let codes = Codes::new(bytes, page.bytes.len(), first == 0);
        let centre = v.splat(codec.quantizer(bits).centre());
        for strip in 0..count * LANE_BLOCK / V::STRIP {
            let place = first_segment * LANE_BLOCK + strip * V::STRIP;
            if first == 0 {
                v.ask_part(page.bytes, place / V::STRIP, n / V::STRIP);
            }
            let sums = v.mixed_dot::<NORMAL, R>(&tile, &uniform, codes, strip, coefficients);
            for half in 0..2 {
                let place = place + half * V::LANES;
                let step = v.load_bytes(page.bytes, codec.steps_offset() + place);
                let step = step_decode(v, step, page.header[0], codec.params.symmetric);
                for i in 0..R {
                    let offset = v.mul(offset[i], centre);
                    let x = v.mul_add(v.to_f32(sums[i][half]), scale[i], offset);
                    let mut total = v.mul_add(x, step, base[i]);
                    if !codec.params.symmetric {
                        let mid = v.load_bytes(page.bytes, codec.mids_offset() + place);
                        total = v.mul_add(e4m3_decode(v, mid, page.header[1]), sum[i], total);
                    }
                    v.store(out, i * n + place, total);
                }
            }
        }
    }
    for (q, out) in q.chunks_exact(dim).zip(out.chunks_exact_mut(n)) {
        add_outliers(v, codec, page, q, out);
        if codec.params.adaptive {
            let order = &page.bytes[codec.order_offset()..][..n];
            match n {
                64 => to_tokens::<V, 2>(v, order, out),
                128 => to_tokens::<V, 4>(v, order, out),
                _ => to_tokens::<V, 8>(v, order, out),
            }
        }
    }
}

/// Brings `32 * B` scores from the order of places to that of tokens.
#[inline(always)]
fn to_tokens<V: MixedVector, const B: usize>(v: V, place: &[u8], scores: &mut [f32]) {
    let mut by_place = [[0f32; 32]; B];
    by_place.as_flattened_mut().copy_from_slice(scores);
    for token in (0..32 * B).step_by(V::LANES) {
        v.store(scores, token, v.permute::<B>(by_place.as_flattened(), v.load_bytes(place, token)));
    }
}

/// Adds what the exact values of the tokens are worth to a query, by place.
#[inline(always)]
fn add_outliers<V: MixedVector>(v: V, codec: &AdaptiveCodec, page: PageRef, q: &[f32], scores: &mut [f32]) {
    let (n, outliers) = (codec.page, codec.params.outliers);
    let (channels, summands) = page.bytes[codec.outliers_offset()..][..3 * outliers * n].split_at(outliers * n);
    for i in 0..outliers {
        for place in (0..n).step_by(V::LANES) {
            let summand = v.load_half(summands, 2 * (i * n + place));
            let q = v.gather(q, v.load_bytes(channels, i * n + place));
            v.store(scores, place, v.mul_add(q, summand, v.load(scores, place)));
        }
    }
}
