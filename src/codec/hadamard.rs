//! The orthonormal Walsh-Hadamard rotation of a head (QuaRot, HIGGS): spreads outlier channels evenly.
#![forbid(unsafe_code)]

/// Rotates one head vector in place. It is its own inverse.
///
/// A head whose size is no power of two is rotated in equal blocks of the largest power of two that divides it (32 at
/// least, as head sizes are multiples of 32).
#[inline(always)]
pub fn rotate(row: &mut [f32]) {
    let block = 1 << row.len().trailing_zeros();
    let norm = 1.0 / (block as f32).sqrt();
    for part in row.chunks_exact_mut(block) {
        let mut half = block / 2;
        while half >= LANES {
            for pair in part.chunks_exact_mut(2 * half) {
                let (a, b) = pair.split_at_mut(half);
                for (a, b) in a.chunks_exact_mut(LANES).zip(b.chunks_exact_mut(LANES)) {
                    for i in 0..LANES {
                        (a[i], b[i]) = (a[i] + b[i], a[i] - b[i]);
                    }
                }
            }
            half /= 2;
        }
        for chunk in part.chunks_exact_mut(LANES) {
            let mut x: [f32; LANES] = std::array::from_fn(|i| chunk[i]);
            x = butterfly::<8>(x);
            x = butterfly::<4>(x);
            x = butterfly::<2>(x);
            x = butterfly::<1>(x);
            for i in 0..LANES {
                chunk[i] = x[i] * norm;
            }
        }
    }
}

/// Values that the last four stages keep among themselves, in a shape that compilers turn into vectors.
const LANES: usize = 16;

/// The stage that joins values `HALF` apart.
#[inline(always)]
fn butterfly<const HALF: usize>(x: [f32; LANES]) -> [f32; LANES] {
    let other: [f32; LANES] = std::array::from_fn(|i| x[i ^ HALF]);
    std::array::from_fn(|i| if i & HALF == 0 { x[i] + other[i] } else { other[i] - x[i] })
}

/// Rotates rows of `dim` values. A loop, since a closure given to an iterator is not always compiled for the instruction set
/// of its caller.
#[inline(always)]
pub fn rotate_rows(rows: &mut [f32], dim: usize) {
    for row in rows.chunks_exact_mut(dim) {
        rotate(row);
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn rotation_is_its_own_inverse_and_keeps_the_norm() {
        for dim in [64, 96, 128, 160, 192, 224, 256] {
            let x: Vec<f32> = (0..dim).map(|i| ((i * 37 % 101) as f32 - 50.0) / 17.0).collect();
            let mut y = x.clone();
            super::rotate(&mut y);
            let norm = |v: &[f32]| v.iter().map(|a| f64::from(*a).powi(2)).sum::<f64>();
            assert!((norm(&y) / norm(&x) - 1.0).abs() < 1e-6);
            assert!(x.iter().zip(&y).any(|(a, b)| (a - b).abs() > 0.1));
            super::rotate(&mut y);
            let error: f64 = x.iter().zip(&y).map(|(a, b)| f64::from(a - b).powi(2)).sum();
            assert!(error / norm(&x) <= 1e-12, "{dim}: {error}");
        }
    }
}
