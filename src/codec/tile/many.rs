//! Room for what [`TileVector::unpack`](super::vector::TileVector::unpack) and
//! [`TileVector::multiply`](super::vector::TileVector::multiply) write. A strip at a time: what a page takes beside it would not stay
//! in the first-level cache.
#![forbid(unsafe_code)]

use std::cell::RefCell;

use super::vector::MANY_ROWS;
use super::LANE_BLOCK;
use crate::codec::page::MAX_PAGE;
use crate::shape::MAX_HEAD_DIM;

/// Most codes of a lane.
const MAX_DEPTH: usize = if MAX_PAGE > MAX_HEAD_DIM as usize { MAX_PAGE } else { MAX_HEAD_DIM as usize };

/// The codes of a strip as bytes, and their products with many rows of coefficients. On lines of the cache: a read that crosses two
/// takes twice as long.
#[repr(align(64))]
pub(crate) struct Room {
    pub(crate) codes: [u8; MAX_DEPTH * LANE_BLOCK],
    pub(crate) sums: [i32; MANY_ROWS * LANE_BLOCK],
    /// Coefficients that a kernel rounds for a page.
    pub(crate) int8: [i8; MANY_ROWS * MAX_DEPTH],
}

/// Calls `f` with this thread's room, which holds what was left in it. Kernels are to be run inside `f`: around it they would not
/// be compiled as one with what they call.
pub(crate) fn with_room<R>(f: impl FnOnce(&mut Room) -> R) -> R {
    thread_local!(static ROOM: RefCell<Box<Room>> = RefCell::new(Box::new(Room {
        codes: [0; MAX_DEPTH * LANE_BLOCK],
        sums: [0; MANY_ROWS * LANE_BLOCK],
        int8: [0; MANY_ROWS * MAX_DEPTH],
    })));
    ROOM.with_borrow_mut(|room| f(room))
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;
    use crate::codec::tile::vector::{by_width, Codes, Coefficients, TileVector};
    use crate::codec::tile::{Tile, Width};
    use crate::simd::isa::{Isa, IsaToken};

    /// Largest codes and coefficients, and mixed ones.
    fn coefficient(row: usize, d: usize) -> i32 {
        match row {
            0 => 127,
            1 => -128,
            _ => (d * 7907 + row * 31) as i32 % 256 - 128,
        }
    }

    fn check<V: TileVector, const W: u8>(v: V, tile: &Tile, bytes: &[u8], rows: usize) {
        check_signs::<V, W, false>(v, tile, bytes, rows, 0);
        check_signs::<V, W, true>(v, tile, bytes, rows, 128);
    }

    /// `add` to each coefficient makes bytes without a sign.
    fn check_signs<V: TileVector, const W: u8, const UNSIGNED: bool>(
        v: V,
        tile: &Tile,
        bytes: &[u8],
        rows: usize,
        add: i32,
    ) {
        // Rows lie further apart than they are long, and nothing is behind the last.
        let (depth, stride) = (tile.depth(), tile.depth() + 32);
        let mut c = vec![0i8; (rows - 1) * stride + depth];
        for (row, c) in c.chunks_mut(stride).enumerate() {
            c.iter_mut().take(depth).enumerate().for_each(|(d, c)| *c = (coefficient(row, d) + add) as u8 as i8);
        }
        let coefficients = Coefficients::<UNSIGNED> { bytes: &c, stride };
        with_room(|room| {
            for strip in 0..tile.lanes() / V::STRIP {
                room.sums.fill(-1);
                v.unpack::<W>(tile, Codes::new(bytes, 0, false), strip, &mut room.codes);
                v.multiply(&v.begin_many(rows, depth), &room.codes, coefficients, &mut room.sums);
                for (row, sums) in room.sums.chunks_exact(V::STRIP).enumerate() {
                    for (lane, sum) in sums.iter().enumerate() {
                        let code = |d| i32::from(tile.get(bytes, strip * V::STRIP + lane, d));
                        let want = (0..depth).map(|d| code(d) * (coefficient(row, d) + add)).sum();
                        let want: i32 = if row < rows { want } else { -1 };
                        assert_eq!(*sum, want, "{v:?} {tile:?} strip {strip}, {rows} rows: row {row}, lane {lane}");
                    }
                }
            }
        });
    }

    fn sums_are_exact<V: TileVector>(v: V) {
        for width in Width::ALL.into_iter().filter(|width| *width != Width::Bits8) {
            for (lanes, depth) in [(32, 32), (64, 64), (96, 128), (64, 160), (32, 256)] {
                let tile = Tile::new(width, lanes, depth);
                let mut bytes = vec![0; tile.bytes()];
                for i in 0..lanes * depth {
                    let levels = width.levels() as usize;
                    let code = if i < depth { levels - 1 } else { (i * 7919 + i / 5) % levels };
                    tile.set(&mut bytes, i / depth, i % depth, code as u8);
                }
                for rows in [1, 2, 7, 8, 9, 15, 16, 17, 30, 31, MANY_ROWS] {
                    by_width!(v: V, width, self::check(&tile, &bytes, rows));
                }
            }
        }
    }

    #[test]
    fn sums_of_many_rows_are_exact() {
        for isa in Isa::ALL {
            match IsaToken::new(isa) {
                Some(IsaToken::Avx512(v) | IsaToken::Amx(v)) => sums_are_exact(v),
                Some(IsaToken::Avx2(_) | IsaToken::AvxVnni(_) | IsaToken::Scalar) | None => (),
            }
        }
    }
}
