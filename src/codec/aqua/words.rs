//! A matrix as integers of 16 bits, two of a column in a word: half as many bytes and multiplications as of floats.
#![forbid(unsafe_code)]

use super::MAX_DIM;
use crate::simd::vector::Vector;

/// Largest magnitude of an integer of a row, and largest sum of magnitudes of a column: no sum of products overflows.
const ROW_MAX: f32 = 8191.0;
const COLUMN_SUM: f64 = (1 << 18) as f64;

/// `[rows][columns]`, both multiples of 32. Immutable.
#[derive(Clone, Debug, Default)]
pub(super) struct Words {
    columns: usize,
    /// `[rows / 2][columns]`: row `i`, and `rows / 2` behind it in the upper half of a word.
    words: Vec<i32>,
    /// `[columns]`: value of one.
    unit: Vec<f32>,
}

impl Words {
    pub(super) fn new(matrix: &[f32], columns: usize) -> Self {
        let rows = matrix.len() / columns;
        let column = |c: usize| matrix.iter().skip(c).step_by(columns).map(|x| f64::from(x.abs()));
        let unit: Vec<f32> = (0..columns)
            .map(|c| {
                // Rounding adds at most a half for each row.
                let by_sum = column(c).sum::<f64>() / (COLUMN_SUM - rows as f64);
                by_sum.max(column(c).fold(0.0, f64::max) / 32767.0).max(f64::from(f32::MIN_POSITIVE)) as f32
            })
            .collect();
        let integer =
            |row: usize, c: usize| (matrix[row * columns + c] / unit[c]).round().clamp(-32767.0, 32767.0) as i32;
        let word = |i: usize| {
            let (row, c) = (i / columns, i % columns);
            integer(row, c) & 0xffff | integer(row + rows / 2, c) << 16
        };
        let words = (0..rows / 2 * columns).map(word).collect();
        Words { columns, words, unit }
    }

    /// Whether there is no matrix.
    pub(super) fn is_empty(&self) -> bool {
        self.words.is_empty()
    }

    /// `out[row * stride + c] = sum_i x[row][i] * matrix[i][c]` for the first `columns` columns.
    #[inline(always)]
    pub(super) fn multiply<V: Vector>(&self, v: V, x: &[f32], columns: usize, out: &mut [f32], stride: usize) {
        let dim = 2 * self.words.len() / self.columns;
        let mut row = 0;
        while row * dim < x.len() {
            let (x, out) = (&x[row * dim..], &mut out[row * stride..]);
            row += if x.len() >= 4 * dim {
                self.multiply_rows::<V, 4>(v, &x[..4 * dim], columns, out, stride)
            } else {
                self.multiply_rows::<V, 1>(v, &x[..dim], columns, out, stride)
            };
        }
    }

    #[inline(always)]
    fn multiply_rows<V: Vector, const R: usize>(
        &self,
        v: V,
        x: &[f32],
        columns: usize,
        out: &mut [f32],
        stride: usize,
    ) -> usize {
        let mut rounded = [[0i32; MAX_DIM / 2]; R];
        let mut unit = [0f32; R];
        for (r, x) in x.chunks_exact(x.len() / R).enumerate() {
            unit[r] = round(v, x, &mut rounded[r]);
        }
        let mut c = 0;
        while c < columns {
            c += V::LANES
                * match (columns - c) / V::LANES {
                    1 => self.multiply_columns::<V, R, 1>(v, &rounded, &unit, c, out, stride),
                    2 => self.multiply_columns::<V, R, 2>(v, &rounded, &unit, c, out, stride),
                    // Sums of four rows and three vectors leave registers for what is multiplied.
                    3 | 5.. if V::REGISTERS < 32 => {
                        self.multiply_columns::<V, R, 2>(v, &rounded, &unit, c, out, stride)
                    }
                    3 | 5 | 6 => self.multiply_columns::<V, R, 3>(v, &rounded, &unit, c, out, stride),
                    4.. if V::REGISTERS < 32 => self.multiply_columns::<V, R, 2>(v, &rounded, &unit, c, out, stride),
                    _ => self.multiply_columns::<V, R, 4>(v, &rounded, &unit, c, out, stride),
                };
        }
        R
    }

    /// The columns of `Z` vectors from `c`; gives `Z`.
    #[inline(always)]
    fn multiply_columns<V: Vector, const R: usize, const Z: usize>(
        &self,
        v: V,
        rounded: &[[i32; MAX_DIM / 2]; R],
        unit: &[f32; R],
        c: usize,
        out: &mut [f32],
        stride: usize,
    ) -> usize {
        let mut sum = [[v.splat_i32(0); Z]; R];
        for (i, words) in self.words.chunks_exact(self.columns).enumerate() {
            let words = &words[c..c + Z * V::LANES];
            let mut column = [v.splat_i32(0); Z];
            for z in 0..Z {
                column[z] = v.load_i32(words, z * V::LANES);
            }
            for r in 0..R {
                let x = v.splat_i32(rounded[r][i % (MAX_DIM / 2)]);
                for z in 0..Z {
                    sum[r][z] = v.add_words(sum[r][z], x, column[z]);
                }
            }
        }
        for r in 0..R {
            for z in 0..Z {
                let unit = v.mul(v.splat(unit[r]), v.load(&self.unit, c + z * V::LANES));
                v.store(out, r * stride + c + z * V::LANES, v.mul(v.to_f32(sum[r][z]), unit));
            }
        }
        Z
    }
}

/// Rounds a row to integers, in words as [`Words`] has those of a column; gives the value of one.
#[inline(always)]
fn round<V: Vector>(v: V, x: &[f32], out: &mut [i32; MAX_DIM / 2]) -> f32 {
    let (low, high) = x.split_at(x.len() / 2);
    let magnitude = |x: V::F32| v.of_bits(v.and(v.bits(x), v.splat_i32(i32::MAX)));
    let mut max = v.splat(0.0);
    for i in (0..x.len()).step_by(V::LANES) {
        max = v.max(magnitude(v.load(x, i)), max);
    }
    let max = v.largest(max);
    let inverse = v.splat(if max > 0.0 { ROW_MAX / max } else { 0.0 });
    for i in (0..low.len()).step_by(V::LANES) {
        let [low, high] = [low, high].map(|half| v.nearest(v.mul(v.load(half, i), inverse)));
        v.store_i32(out, i, v.or(v.and(low, v.splat_i32(0xffff)), v.shift_left(high, 16)));
    }
    max / ROW_MAX
}
