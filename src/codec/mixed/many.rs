//! Products of a mixed tile with many rows of coefficients: its codes are unpacked once for all of them.
#![forbid(unsafe_code)]

use super::vector::{add_few, add_rest, by_levels_and_rows, MixedVector, MAX_ROWS, ROUNDED};
use super::{MixedPage, Rounded};
use crate::codec::tile::many::{with_room, Room};
use crate::codec::tile::vector::{Codes, Coefficients, MANY_ROWS};

/// [`MixedPage::add_products`] with coefficients rounded to int8.
#[inline(always)]
pub(crate) fn add_products<V: MixedVector>(v: V, page: &MixedPage, x: &[f32], out: &mut [f32], stride: usize) {
    let depth = page.factors.len();
    if x.len() / depth < v.many_rows() || page.tile.depth != depth {
        return add_few(v, page, x, out, stride);
    }
    with_room(|room| {
        if page.normal {
            v.run(
                #[inline(always)]
                |v| add_unpacked::<V, true>(v, page, x, out, stride, room),
            );
        } else {
            v.run(
                #[inline(always)]
                |v| add_unpacked::<V, false>(v, page, x, out, stride, room),
            );
        }
    });
}

#[inline(always)]
fn add_unpacked<V: MixedVector, const NORMAL: bool>(
    v: V,
    page: &MixedPage,
    x: &[f32],
    out: &mut [f32],
    stride: usize,
    room: &mut Room,
) {
    let (depth, lanes) = (page.factors.len(), page.tile.lanes);
    let stride_int8 = depth.next_multiple_of(ROUNDED);
    let mut rounded = [Rounded { unit: 0.0, offset: 0.0, is_coarse: false }; MANY_ROWS];
    let codes = Codes::new(page.codes, page.page_bytes, true);
    for (x, out) in x.chunks(MANY_ROWS * depth).zip(out.chunks_mut(MANY_ROWS * stride)) {
        let rows = x.len() / depth;
        for row in (0..rows).step_by(V::MAX_ROWS) {
            let int8 = &mut room.int8[row * stride_int8..];
            let n = (rows - row).min(V::MAX_ROWS);
            let of_rows = by_levels_and_rows!(v: V, NORMAL, n, round(page, &x[row * depth..], int8));
            rounded[row..row + n].copy_from_slice(&of_rows[..n]);
        }
        let coefficients = Coefficients::<false> { bytes: &room.int8, stride: stride_int8 };
        let many = v.begin_many(rows, depth);
        for strip in 0..lanes / V::STRIP {
            v.unpack_mixed::<NORMAL>(page.tile, &page.segments, codes, strip, &mut room.codes);
            v.multiply(&many, &room.codes, coefficients, &mut room.sums);
            let rows_of = out.chunks_mut(stride).zip(room.sums.chunks_exact(V::STRIP)).zip(&rounded);
            for ((out, sums), rounded) in rows_of.take(rows) {
                let (unit, offset) = (v.splat(rounded.unit), v.splat(rounded.offset));
                let out = &mut out[strip * V::STRIP..][..V::STRIP];
                for at in [0, V::LANES] {
                    let sum = v.mul_add(v.to_f32(v.load_i32(sums, at)), unit, offset);
                    v.store(out, at, v.add(v.load(out, at), sum));
                }
            }
        }
        drop(many);
        for row in (0..rows).filter(|row| rounded[*row].is_coarse) {
            add_rest::<V, NORMAL, 1>(v, page, x, &[row; MAX_ROWS], out, stride);
        }
    }
}

/// Rounds the first `R` rows of `x`.
#[inline(always)]
fn round<V: MixedVector, const NORMAL: bool, const R: usize>(
    v: V,
    page: &MixedPage,
    x: &[f32],
    int8: &mut [i8],
) -> [Rounded; MAX_ROWS] {
    let rounded = v.round_rows::<R, false>(page, x, &std::array::from_fn(|row| row), int8);
    std::array::from_fn(|i| rounded[i.min(R - 1)])
}
