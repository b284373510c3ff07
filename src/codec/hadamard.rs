//! The orthonormal Walsh-Hadamard rotation of a head (QuaRot, HIGGS): spreads outlier channels evenly.
#![forbid(unsafe_code)]

/// Rotates one head vector in place. It is its own inverse.
///
/// A head whose size is no power of two is rotated in equal blocks of the largest power of two that divides it.
#[inline(always)]
pub fn rotate(row: &mut [f32]) {
    let block = 1 << row.len().trailing_zeros();
    let norm = 1.0 / (block as f32).sqrt();
    for part in row.chunks_exact_mut(block) {
        let mut half = block / 2;
        while half > 0 {
            for pair in part.chunks_exact_mut(2 * half) {
                let (a, b) = pair.split_at_mut(half);
                for (x, y) in a.iter_mut().zip(b) {
                    (*x, *y) = (*x + *y, *x - *y);
                }
            }
            half /= 2;
        }
        part.iter_mut().for_each(|x| *x *= norm);
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
