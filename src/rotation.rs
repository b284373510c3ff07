//! Turning rows by distances: what RoPE does to a key when its position moves.
//!
//! RoPE turns pair `i` of a head vector by `position * frequency[i]`, whatever scaling the frequencies come from (YaRN,
//! frequency factors, linear). So a key whose position moved by a distance is its old self turned by `distance *
//! frequency[i]`, and the score `q . turned(k)` is `turned_back(q) . k`: packed keys can stay as they are.
#![forbid(unsafe_code)]

use crate::cuda::desc::RotationDesc;
use crate::error::{Error, Result};
use crate::shape::MAX_HEAD_DIM;

/// Bits of a distance's magnitude.
const BITS: usize = 32;

/// How the keys of a layer turn with their positions. Immutable; may be shared by threads.
#[derive(Clone, Debug)]
pub struct Rotation {
    n_pairs: usize,
    interleaved: bool,
    /// `[bit][cosine, sine][pair]` of a move by `2^bit` positions, of which any other is a product.
    powers: Vec<f64>,
}

/// Cosine and sine of each pair for one distance.
#[derive(Clone, Debug, Default)]
pub struct Angles {
    /// `[cosine, sine][pair]`
    pairs: Vec<f64>,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Rotation {
    /// The rotation that turns pair `i` by `frequencies[i]` radians a position. Pairs are neighbours (2i, 2i + 1) if
    /// `interleaved`, otherwise halves (i, i + n) of the first 2n values. Without frequencies keys do not turn at all.
    ///
    /// # Errors
    ///
    /// [`crate::error::Status::InvalidArgument`] if a frequency is not finite or there are more than a head has pairs.
    pub fn new(frequencies: &[f64], interleaved: bool) -> Result<Self> {
        if frequencies.len() > MAX_HEAD_DIM as usize / 2 {
            return Err(Error::invalid(format!(
                "{} pairs: a head has at most {} values",
                frequencies.len(),
                MAX_HEAD_DIM
            )));
        }
        if let Some(bad) = frequencies.iter().find(|frequency| !frequency.is_finite()) {
            return Err(Error::invalid(format!("a frequency is {bad}: use finite numbers")));
        }
        let mut power: Vec<[f64; 2]> = frequencies.iter().map(|frequency| [frequency.cos(), frequency.sin()]).collect();
        let mut powers = Vec::with_capacity(BITS * 2 * power.len());
        for _ in 0..BITS {
            (0..2).for_each(|part| powers.extend(power.iter().map(|pair| pair[part])));
            // Squared, as device code does it: sealed bytes may not depend on either side's cosine.
            power.iter_mut().for_each(|[c, s]| (*c, *s) = (*c * *c - *s * *s, 2.0 * *c * *s));
        }
        Ok(Self { n_pairs: frequencies.len(), interleaved, powers })
    }

    /// The rotation of keys that do not depend on their positions.
    pub fn none() -> Self {
        Self { n_pairs: 0, interleaved: false, powers: Vec::new() }
    }

    /// Radians a position, by pair: as given, but between -pi and pi.
    pub fn frequencies(&self) -> impl Iterator<Item = f64> + '_ {
        self.first_powers().map(|[cos, sin]| sin.atan2(cos))
    }

    /// Cosine and sine of a move by one position.
    fn first_powers(&self) -> impl Iterator<Item = [f64; 2]> + '_ {
        let (cos, sin) = self.powers[..2 * self.n_pairs].split_at(self.n_pairs);
        cos.iter().zip(sin).map(|(cos, sin)| [*cos, *sin])
    }

    /// The same for device code.
    pub(crate) fn describe(&self) -> RotationDesc {
        let mut desc = RotationDesc::default();
        desc.pairs.iter_mut().zip(self.first_powers()).for_each(|(to, from)| *to = from);
        (desc.n_pairs, desc.interleaved) = (self.n_pairs as u32, self.interleaved.into());
        desc
    }

    /// Fails unless heads of `head_dim` values have all the pairs.
    pub(crate) fn check(&self, head_dim: usize) -> Result<()> {
        if 2 * self.n_pairs <= head_dim {
            return Ok(());
        }
        Err(Error::invalid(format!("the rotation has {} pairs, the heads have {head_dim} values", self.n_pairs)))
    }

    /// Works out the angles of a distance.
    #[inline(always)]
    pub fn angles(&self, distance: i32, out: &mut Angles) {
        let n = self.n_pairs;
        out.pairs.clear();
        out.pairs.resize(n, 1.0);
        out.pairs.resize(2 * n, 0.0);
        let (cos, sin) = out.pairs.split_at_mut(n);
        let magnitude = distance.unsigned_abs();
        for bit in (0..BITS).filter(|bit| magnitude >> bit & 1 == 1) {
            let (c, s) = self.powers[bit * 2 * n..][..2 * n].split_at(n);
            for ((cos, sin), (c, s)) in cos.iter_mut().zip(&mut *sin).zip(c.iter().zip(s)) {
                (*cos, *sin) = (*cos * c - *sin * s, *cos * s + *sin * c);
            }
        }
        let sign = if distance < 0 { -1.0 } else { 1.0 };
        out.cos.clear();
        out.sin.clear();
        out.cos.extend(cos.iter().map(|cos| *cos as f32));
        out.sin.extend(sin.iter().map(|sin| (sign * sin) as f32));
    }

    /// Turns a row by the distance of `angles`.
    pub fn turn(&self, row: &mut [f32], angles: &Angles) {
        self.turn_with(row, angles, 1.0);
    }

    /// Undoes [`Rotation::turn`].
    #[inline(always)]
    pub fn turn_back(&self, row: &mut [f32], angles: &Angles) {
        self.turn_with(row, angles, -1.0);
    }

    /// What a key that turns by an angle adds to its score: by the cosine of that angle, `cos[pair]`, by its sine, `sin[pair]`, and
    /// what does not turn at all.
    #[inline(always)]
    pub(crate) fn products(&self, query: &[f32], key: &[f32], cos: &mut [f32], sin: &mut [f32]) -> f32 {
        let (cos, sin) = (&mut cos[..self.n_pairs], &mut sin[..self.n_pairs]);
        let ((q, q_rest), (k, k_rest)) = (query.split_at(2 * self.n_pairs), key.split_at(2 * self.n_pairs));
        let mut set = |i: usize, [qx, qy]: [f32; 2], [kx, ky]: [f32; 2]| {
            (cos[i], sin[i]) = (qx * kx + qy * ky, qy * kx - qx * ky);
        };
        if self.interleaved {
            for (i, (q, k)) in q.chunks_exact(2).zip(k.chunks_exact(2)).enumerate() {
                set(i, [q[0], q[1]], [k[0], k[1]]);
            }
        } else {
            let ((qx, qy), (kx, ky)) = (q.split_at(self.n_pairs), k.split_at(self.n_pairs));
            for (i, ((qx, qy), (kx, ky))) in qx.iter().zip(qy).zip(kx.iter().zip(ky)).enumerate() {
                set(i, [*qx, *qy], [*kx, *ky]);
            }
        }
        q_rest.iter().zip(k_rest).map(|(q, k)| q * k).sum()
    }

    /// A row turned by a distance, which need not be whole, in double precision.
    pub(crate) fn turned(&self, row: &[f32], distance: f64) -> Vec<f32> {
        let mut out = row.to_vec();
        for (i, w) in self.frequencies().enumerate() {
            let (x, y) = if self.interleaved { (2 * i, 2 * i + 1) } else { (i, self.n_pairs + i) };
            let ((sin, cos), a, b) = ((w * distance).sin_cos(), f64::from(row[x]), f64::from(row[y]));
            (out[x], out[y]) = ((a * cos - b * sin) as f32, (a * sin + b * cos) as f32);
        }
        out
    }

    #[inline(always)]
    fn turn_with(&self, row: &mut [f32], angles: &Angles, sign: f32) {
        let turns = angles.cos.iter().zip(&angles.sin);
        if self.interleaved {
            for (pair, (cos, sin)) in row.chunks_exact_mut(2).zip(turns) {
                let (x, y, sin) = (pair[0], pair[1], sign * sin);
                (pair[0], pair[1]) = (x * cos - y * sin, x * sin + y * cos);
            }
        } else {
            let (left, right) = row.split_at_mut(self.n_pairs);
            for ((x, y), (cos, sin)) in left.iter_mut().zip(right).zip(turns) {
                let sin = sign * sin;
                (*x, *y) = (*x * cos - *y * sin, *x * sin + *y * cos);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn angles_are_those_of_the_distance() {
        let frequencies: Vec<f64> = (0..32).map(|pair| 1e4f64.powf(-f64::from(pair) / 32.0)).collect();
        let rotation = Rotation::new(&frequencies, false).unwrap();
        let mut angles = Angles::default();
        for distance in [0, 1, -1, 8, 12_345, -131_072, i32::MAX, i32::MIN] {
            rotation.angles(distance, &mut angles);
            for (pair, frequency) in frequencies.iter().enumerate() {
                let want = frequency * f64::from(distance);
                // Arguments of 2^31 are themselves only known to 1e-7 or so.
                let (cos, sin) = (f64::from(angles.cos[pair]), f64::from(angles.sin[pair]));
                assert!((cos - want.cos()).abs() < 1e-6 && (sin - want.sin()).abs() < 1e-6, "{distance}, pair {pair}");
            }
        }
    }

    #[test]
    fn both_pairings_turn_their_pairs_and_back() {
        let mut angles = Angles::default();
        for (interleaved, want) in [(false, [-3.0, -4.0, 1.0, 2.0, 5.0]), (true, [-2.0, 1.0, -4.0, 3.0, 5.0])] {
            let rotation = Rotation::new(&[std::f64::consts::FRAC_PI_2 / 3.0; 2], interleaved).unwrap();
            rotation.angles(3, &mut angles);
            let mut row = [1.0f32, 2.0, 3.0, 4.0, 5.0];
            rotation.turn(&mut row, &angles);
            assert!(row.iter().zip(want).all(|(x, want)| (x - want).abs() < 1e-6), "{row:?}");
            rotation.turn_back(&mut row, &angles);
            assert!(row.iter().zip([1.0, 2.0, 3.0, 4.0, 5.0]).all(|(x, want)| (x - want).abs() < 1e-6), "{row:?}");
        }
    }

    #[test]
    fn impossible_rotations_are_refused() {
        assert!(Rotation::new(&[0.1; 1000], false).is_err() && Rotation::new(&[f64::NAN], true).is_err());
        assert!(Rotation::new(&[0.1; 33], false).unwrap().check(64).is_err());
        assert!(Rotation::new(&[], false).unwrap().check(64).is_ok());
    }
}
