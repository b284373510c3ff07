//! The specification of codec `group`: sealing, decoding, scores and outputs in plain arithmetic.
//!
//! Sealing is compiled once more for each instruction set and must give the same bytes: no fused multiply-add, and sums
//! over a row are kept in [`LANES`] partial sums (element `i` goes to sum `i % LANES`) added in order at the end.
#![forbid(unsafe_code)]

use super::{Clip, GroupCodec, GroupKernels, PageRef, Probabilities, Query, SealRows};
use crate::codec::float8::{
    e4m3_base, e4m3_decode, e4m3_encode, inverse_power, power, scale_base, scale_decode, scale_encode,
};
use crate::codec::hadamard;
use crate::codec::tile::Width;
use crate::codec::Side;
use crate::shape::MAX_HEAD_DIM;

pub(super) static KERNELS: GroupKernels = GroupKernels {
    seal: |codec, header, page, rows| seal(codec, header, page, rows),
    prepare: |query, rows, form| query.prepare(rows, form),
    untransform: |row| hadamard::rotate(row),
    scores,
    accumulate,
};

const LANES: usize = 16;

/// Step of the uniform quantizer with this many levels that is best for a Gaussian of unit variance (Max 1960; three
/// levels and 256 levels computed the same way).
fn gaussian_step(width: Width) -> f32 {
    match width {
        Width::Ternary => 1.224,
        Width::Bits2 => 0.9957,
        Width::Bits3 => 0.5860,
        Width::Bits4 => 0.3352,
        Width::Bits8 => 0.0308,
    }
}

/// The parameters of one group of one row before they are rounded.
#[derive(Clone, Copy)]
struct Fit {
    step: f32,
    mid: f32,
}

#[inline(always)]
fn sum(x: impl Iterator<Item = f32>) -> f32 {
    let mut partial = [0f32; LANES];
    x.enumerate().for_each(|(i, x)| partial[i % LANES] += x);
    partial.iter().fold(0.0, |a, b| a + b)
}

#[inline(always)]
fn abs_max(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |a: f32, b| a.max(b.abs()))
}

/// Range of the codes of one group, before coding.
#[inline(always)]
fn fit(codec: &GroupCodec, x: &[f32]) -> Fit {
    let centre = codec.params.width.centre();
    if !codec.params.symmetric {
        let low = x.iter().fold(f32::INFINITY, |a, b| a.min(*b));
        let high = x.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
        let half = (high - low) * 0.5 * codec.params.clip.affine(codec.params.width);
        return Fit { step: half / centre, mid: (low + high) * 0.5 };
    }
    let widest = abs_max(x) / centre;
    let step = match codec.params.clip {
        Clip::Factor(factor) => widest * factor,
        Clip::Auto if codec.params.width == Width::Bits8 => widest,
        Clip::Auto => {
            let rms = (sum(x.iter().map(|x| x * x)) / x.len() as f32).sqrt();
            (rms * gaussian_step(codec.params.width)).min(widest)
        }
    };
    Fit { step, mid: 0.0 }
}

/// Codes one group and returns the step to store.
#[inline(always)]
fn code_group(codec: &GroupCodec, x: &[f32], step: f32, mid: f32, codes: &mut [u8]) -> f32 {
    let centre = codec.params.width.centre();
    let top = (codec.params.width.levels() - 1) as f32;
    let inverse = if step > 0.0 { 1.0 / step } else { 0.0 };
    for (code, &x) in codes.iter_mut().zip(x) {
        // Adding a half and cutting rounds to nearest; the value is not negative after the clamp.
        *code = (((x - mid) * inverse + centre).clamp(0.0, top) + 0.5) as u8;
    }
    if !codec.params.refit {
        return step;
    }
    let energy = sum(x.iter().map(|x| (x - mid) * (x - mid)));
    let inner = sum(x.iter().zip(codes.iter()).map(|(x, &c)| (x - mid) * (f32::from(c) - centre)));
    if inner > 0.0 {
        energy / inner
    } else {
        step
    }
}

/// Encodes rows into a page; see [`GroupCodec::seal`].
#[inline(always)]
pub(super) fn seal(codec: &GroupCodec, header: &mut [u8], page: &mut [u8], rows: &mut SealRows) {
    let dim = codec.head_dim;
    if codec.params.rotate {
        rows.rows.chunks_exact_mut(dim).for_each(hadamard::rotate);
    }
    if rows.fresh {
        page.fill(0);
        header.fill(0);
    }
    if codec.params.mean {
        if rows.fresh {
            write_mean(codec, header, page, rows);
        }
        let mut mean = [0f32; MAX_HEAD_DIM as usize];
        read_mean(codec, PageRef { header, bytes: page }, &mut mean[..dim]);
        for row in rows.rows.chunks_exact_mut(dim) {
            row.iter_mut().zip(&mean).for_each(|(x, m)| *x -= m);
        }
    }
    if rows.fresh {
        write_bases(codec, header, rows);
    }
    for (&at, row) in rows.at.iter().zip(rows.rows.chunks_exact(dim)) {
        for (g, x) in row.chunks_exact(codec.group).enumerate() {
            seal_group(codec, header, page, at as usize, g, x);
        }
    }
}

#[inline(always)]
fn write_mean(codec: &GroupCodec, header: &mut [u8], page: &mut [u8], rows: &SealRows) {
    let mut mean = [0f32; MAX_HEAD_DIM as usize];
    let mean = &mut mean[..codec.head_dim];
    for row in rows.rows.chunks_exact(codec.head_dim) {
        mean.iter_mut().zip(row).for_each(|(m, x)| *m += x);
    }
    let scale = 1.0 / rows.at.len().max(1) as f32;
    mean.iter_mut().for_each(|m| *m *= scale);
    let base = e4m3_base(abs_max(mean));
    header[2] = base;
    let at = codec.mean_offset();
    for (byte, m) in page[at..at + codec.head_dim].iter_mut().zip(mean.iter()) {
        *byte = e4m3_encode(m * inverse_power(base));
    }
}

/// The page's mean of the rotated channels.
#[inline(always)]
pub(super) fn read_mean(codec: &GroupCodec, page: PageRef, out: &mut [f32]) {
    let scale = power(page.header[2]);
    let bytes = &page.bytes[codec.mean_offset()..][..codec.head_dim];
    out.iter_mut().zip(bytes).for_each(|(m, &b)| *m = e4m3_decode(b) * scale);
}

#[inline(always)]
fn write_bases(codec: &GroupCodec, header: &mut [u8], rows: &SealRows) {
    let (mut step, mut mid) = (0f32, 0f32);
    for x in rows.rows.chunks_exact(codec.group) {
        let fit = fit(codec, x);
        (step, mid) = (step.max(fit.step), mid.max(fit.mid.abs()));
    }
    header[0] = if codec.params.symmetric { scale_base(step) } else { e4m3_base(step) };
    header[1] = e4m3_base(mid);
}

#[inline(always)]
fn seal_group(codec: &GroupCodec, header: &[u8], page: &mut [u8], row: usize, g: usize, x: &[f32]) {
    let Fit { step, mid } = fit(codec, x);
    let mut codes = [0u8; MAX_HEAD_DIM as usize];
    let codes = &mut codes[..codec.group];
    let slot = g * codec.page + row;
    let stored = if codec.params.symmetric {
        let step = scale_decode(scale_encode(step, header[0]), header[0]);
        scale_encode(code_group(codec, x, step, 0.0, codes), header[0])
    } else {
        let mid_code = e4m3_encode(mid * inverse_power(header[1]));
        let mid = e4m3_decode(mid_code) * power(header[1]);
        page[codec.mids_offset() + slot] = mid_code;
        let step = e4m3_decode(encode_step(step, header[0])) * power(header[0]);
        encode_step(code_group(codec, x, step, mid, codes), header[0])
    };
    page[codec.steps_offset() + slot] = stored;
    let tile = &mut page[g * codec.tile.bytes()..][..codec.tile.bytes()];
    match codec.side {
        Side::Key => codec.tile.set_lane(tile, row, codes),
        Side::Value => codec.tile.set_depth(tile, row, codes),
    }
}

#[inline(always)]
fn encode_step(step: f32, base: u8) -> u8 {
    e4m3_encode(step * inverse_power(base))
}

/// Step of one group of one row.
#[inline(always)]
pub(super) fn read_step(codec: &GroupCodec, page: PageRef, g: usize, row: usize) -> f32 {
    let code = page.bytes[codec.steps_offset() + g * codec.page + row];
    if codec.params.symmetric {
        scale_decode(code, page.header[0])
    } else {
        e4m3_decode(code) * power(page.header[0])
    }
}

/// Decodes one row, still rotated.
pub(super) fn decode_transformed(codec: &GroupCodec, page: PageRef, row: usize, out: &mut [f32]) {
    let centre = codec.params.width.centre();
    if codec.params.mean {
        read_mean(codec, page, out);
    } else {
        out.fill(0.0);
    }
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
            *out += step * (f32::from(code) - centre) + mid;
        }
    }
}

fn scores(codec: &GroupCodec, page: PageRef, query: &Query, scores: &mut [f32]) {
    let mut key = [0f32; MAX_HEAD_DIM as usize];
    let key = &mut key[..codec.head_dim];
    for token in 0..codec.page {
        decode_transformed(codec, page, token, key);
        for (q, scores) in query.rotated().chunks_exact(codec.head_dim).zip(scores.chunks_exact_mut(codec.page)) {
            scores[token] = sum(q.iter().zip(key.iter()).map(|(q, k)| q * k));
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
