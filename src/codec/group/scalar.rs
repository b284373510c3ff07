//! The specification of codec `group`: sealing, decoding, scores and outputs in plain arithmetic.
#![forbid(unsafe_code)]

use super::{GroupCodec, PageRef, Probabilities, Query, SealRows};
use crate::codec::float8::{e4m3_base, e4m3_decode, power, scale_base};
use crate::codec::hadamard;
use crate::codec::kernels::Kernels;
use crate::codec::page::{PageCodec, Side};
use crate::codec::quantizer::{dot, Quantizer};
use crate::shape::MAX_HEAD_DIM;
use crate::simd::isa::Scalar;

impl Kernels<GroupCodec> for Scalar {
    fn seal(&self, codec: &GroupCodec, header: &mut [u8], page: &mut [u8], rows: &mut SealRows) {
        seal(codec, header, page, rows);
    }

    fn scores(&self, codec: &GroupCodec, page: PageRef, query: &Query, out: &mut [f32]) {
        scores(codec, page, query, out);
    }

    fn accumulate(&self, codec: &GroupCodec, page: PageRef, p: &mut Probabilities, acc: &mut [f32]) {
        accumulate(codec, page, p, acc);
    }
}

/// Encodes rows into a page; see [`GroupCodec::seal`].
#[inline(always)]
pub(super) fn seal(codec: &GroupCodec, header: &mut [u8], page: &mut [u8], rows: &mut SealRows) {
    let dim = codec.head_dim;
    if rows.fresh {
        page.fill(0);
        header.fill(0);
    }
    codec.smooth().apply(&mut page[codec.smooth_offset()..], rows, dim);
    if codec.params.rotate {
        hadamard::rotate_rows(rows.rows, dim);
    }
    let rows_of = &mut *rows.rows;
    let quantizer = codec.quantizer();
    if rows.fresh {
        let (mut step, mut mid) = (0f32, 0f32);
        for x in rows_of.chunks_exact(codec.group) {
            let fit = quantizer.fit(x);
            (step, mid) = (step.max(fit.step), mid.max(fit.mid.abs()));
        }
        header[0] = if codec.params.symmetric { scale_base(step) } else { e4m3_base(step) };
        header[1] = e4m3_base(mid);
    }
    for (&at, row) in rows.at.iter().zip(rows_of.chunks_exact(dim)) {
        for (g, x) in row.chunks_exact(codec.group).enumerate() {
            seal_group(codec, &quantizer, header, page, at as usize, g, x);
        }
    }
}

#[inline(always)]
fn seal_group(
    codec: &GroupCodec,
    quantizer: &Quantizer,
    header: &[u8],
    page: &mut [u8],
    row: usize,
    g: usize,
    x: &[f32],
) {
    let mut codes = [0u8; MAX_HEAD_DIM as usize];
    let codes = &mut codes[..codec.group];
    let slot = g * codec.page + row;
    let [step, mid] = quantizer.seal(x, [header[0], header[1]], codes);
    page[codec.steps_offset() + slot] = step;
    if !codec.params.symmetric {
        page[codec.mids_offset() + slot] = mid;
    }
    let tile = &mut page[g * codec.tile.bytes()..][..codec.tile.bytes()];
    match codec.side {
        Side::Key => codec.tile.set_lane(tile, row, codes),
        Side::Value => codec.tile.set_depth(tile, row, codes),
    }
}

/// Step of one group of one row.
#[inline(always)]
pub(super) fn read_step(codec: &GroupCodec, page: PageRef, g: usize, row: usize) -> f32 {
    codec.quantizer().read_step(page.bytes[codec.steps_offset() + g * codec.page + row], page.header[0])
}

/// Decodes one row, still rotated, without mean and factors.
pub(super) fn decode_transformed(codec: &GroupCodec, page: PageRef, row: usize, out: &mut [f32]) {
    let centre = codec.params.width.centre();
    for (g, out) in out.chunks_exact_mut(codec.group).enumerate() {
        let step = read_step(codec, page, g, row);
        let mid = if codec.params.symmetric {
            0.0
        } else {
            e4m3_decode(page.bytes[codec.mids_offset() + g * codec.page + row]) * power(page.header[1])
        };
        let tile = &page.bytes[g * codec.tile.bytes()..][..codec.tile.bytes()];
        for (c, out) in out.iter_mut().enumerate() {
            let code = match codec.side {
                Side::Key => codec.tile.get(tile, row, c),
                Side::Value => codec.tile.get(tile, c, row),
            };
            *out = step * (f32::from(code) - centre) + mid;
        }
    }
}

fn scores(codec: &GroupCodec, page: PageRef, query: &Query, scores: &mut [f32]) {
    let mut key = [0f32; MAX_HEAD_DIM as usize];
    let key = &mut key[..codec.head_dim];
    for token in 0..codec.page {
        codec.decode(page, token, key);
        for (q, scores) in query.rows().chunks_exact(codec.head_dim).zip(scores.chunks_exact_mut(codec.page)) {
            scores[token] = dot(q, key);
        }
    }
}

fn accumulate(codec: &GroupCodec, page: PageRef, p: &mut Probabilities, acc: &mut [f32]) {
    let mut value = [0f32; MAX_HEAD_DIM as usize];
    let value = &mut value[..codec.head_dim];
    for token in 0..codec.page {
        if p.rows().chunks_exact(codec.page).all(|p| p[token] == 0.0) {
            continue;
        }
        decode_transformed(codec, page, token, value);
        for (p, acc) in p.rows().chunks_exact(codec.page).zip(acc.chunks_exact_mut(codec.head_dim)) {
            acc.iter_mut().zip(value.iter()).for_each(|(a, v)| *a += p[token] * v);
        }
    }
}
