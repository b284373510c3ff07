//! Codec `group` where many rows meet a page: its codes are unpacked once for all of them.
#![forbid(unsafe_code)]

use super::steps::{codes_of, Steps};
use super::{GroupCodec, PageRef, Probabilities, Query};
use crate::codec::tile::many::Room;
use crate::codec::tile::vector::{Coefficients, TileVector, MANY_ROWS};
use crate::simd::vector::dot_floats;

/// Scores of all query rows against every token of a page.
#[inline(always)]
pub(super) fn scores<V: TileVector, const W: u8>(
    v: V,
    codec: &GroupCodec,
    page: PageRef,
    query: &Query,
    mean: &[f32],
    out: &mut [f32],
    room: &mut Room,
) {
    let (dim, n) = (codec.head_dim, codec.page);
    let steps = Steps::of(codec, page);
    for g in 0..codec.n_groups {
        let codes = codes_of(codec, page, g, true);
        for first in (0..query.n_rows()).step_by(MANY_ROWS) {
            let rows = (query.n_rows() - first).min(MANY_ROWS);
            let mut base = [0f32; MANY_ROWS];
            if g == 0 && codec.params.mean {
                let rows = query.rows()[first * dim..].chunks_exact(dim);
                base.iter_mut().zip(rows).for_each(|(base, row)| *base = dot_floats(v, row, mean));
            }
            let coefficients = Coefficients { bytes: &query.int8[first * dim + g * codec.group..], stride: dim };
            let numbers = first * codec.n_groups + g;
            let many = v.begin_many(rows, codec.group);
            for strip in 0..n / V::STRIP {
                v.unpack::<W>(&codec.tile, codes, strip, &mut room.codes);
                v.multiply::<false>(&many, &room.codes, coefficients, &mut room.sums);
                let [mut step, mut mid] = [[v.splat(0.0); 2]; 2];
                for half in 0..2 {
                    let at = g * n + strip * V::STRIP + half * V::LANES;
                    step[half] = steps.step(v, at);
                    mid[half] = if steps.symmetric { step[half] } else { steps.mid(v, at) };
                }
                let out = out[first * n..].chunks_exact_mut(n).zip(room.sums.chunks_exact(V::STRIP)).take(rows);
                for (row, (out, sums)) in out.enumerate() {
                    let of_group = numbers + row * codec.n_groups;
                    let (scale, offset) = (v.splat(query.scale[of_group]), v.splat(query.offset[of_group]));
                    let out = &mut out[strip * V::STRIP..][..V::STRIP];
                    for half in 0..2 {
                        let at = half * V::LANES;
                        let x = v.mul_add(v.to_f32(v.load_i32(sums, at)), scale, offset);
                        let before = if g == 0 { v.splat(base[row]) } else { v.load(out, at) };
                        let mut total = v.mul_add(x, step[half], before);
                        if !steps.symmetric {
                            total = v.mul_add(mid[half], v.splat(query.sum[of_group]), total);
                        }
                        v.store(out, at, total);
                    }
                }
            }
        }
    }
}

/// Adds the products of the codes of group `g` with all rounded rows of weights.
#[inline(always)]
pub(super) fn add<V: TileVector, const W: u8>(
    v: V,
    codec: &GroupCodec,
    page: PageRef,
    p: &Probabilities,
    g: usize,
    acc: &mut [f32],
    room: &mut Room,
) {
    let (dim, n, group) = (codec.head_dim, codec.page, codec.group);
    let codes = codes_of(codec, page, g, true);
    for first in (0..p.n_rows).step_by(MANY_ROWS) {
        let rows = (p.n_rows - first).min(MANY_ROWS);
        let coefficients = Coefficients::<true> { bytes: &p.int8[first * n..], stride: n };
        let numbers = p.scale[first..].iter().zip(&p.offset[first..]);
        let many = v.begin_many(rows, n);
        for strip in 0..group / V::STRIP {
            v.unpack::<W>(&codec.tile, codes, strip, &mut room.codes);
            v.multiply(&many, &room.codes, coefficients, &mut room.sums);
            let acc = acc[first * dim..].chunks_exact_mut(dim).zip(room.sums.chunks_exact(V::STRIP)).take(rows);
            for ((acc, sums), (scale, offset)) in acc.zip(numbers.clone()) {
                let (scale, offset) = (v.splat(*scale), v.splat(*offset));
                let acc = &mut acc[g * group + strip * V::STRIP..][..V::STRIP];
                for at in [0, V::LANES] {
                    let x = v.mul_add(v.to_f32(v.load_i32(sums, at)), scale, offset);
                    v.store(acc, at, v.add(x, v.load(acc, at)));
                }
            }
        }
    }
}
