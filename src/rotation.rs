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
    /// `[bit][pair]`: cosine and sine of a move by `2^bit` positions, of which any other is a product.
    powers: Vec<[f64; 2]>,
}

/// Cosine and sine of each pair for one distance.
#[derive(Clone, Debug, Default)]
pub struct Angles {
    pairs: Vec<[f64; 2]>,
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
        let mut powers = Vec::with_capacity(BITS * power.len());
        for _ in 0..BITS {
            powers.extend_from_slice(&power);
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
        self.powers[..self.n_pairs].iter().map(|[cos, sin]| sin.atan2(*cos))
    }

    /// The same for device code.
    pub(crate) fn describe(&self) -> RotationDesc {
        let mut desc = RotationDesc::default();
        // The first of the powers is a move by one.
        desc.pairs.iter_mut().zip(&self.powers[..self.n_pairs]).for_each(|(to, from)| *to = *from);
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
    pub fn angles(&self, distance: i32, out: &mut Angles) {
        out.pairs.clear();
        out.pairs.resize(self.n_pairs, [1.0, 0.0]);
        let magnitude = distance.unsigned_abs();
        for bit in (0..BITS).filter(|bit| magnitude >> bit & 1 == 1) {
            let powers = &self.powers[bit * self.n_pairs..][..self.n_pairs];
            for ([cos, sin], [c, s]) in out.pairs.iter_mut().zip(powers) {
                (*cos, *sin) = (*cos * c - *sin * s, *cos * s + *sin * c);
            }
        }
        let sign = if distance < 0 { -1.0 } else { 1.0 };
        out.cos.clear();
        out.sin.clear();
        out.cos.extend(out.pairs.iter().map(|[cos, _]| *cos as f32));
        out.sin.extend(out.pairs.iter().map(|[_, sin]| (sign * sin) as f32));
    }

    /// Turns a row by the distance of `angles`.
    pub fn turn(&self, row: &mut [f32], angles: &Angles) {
        self.turn_with(row, angles, 1.0);
    }

    /// Undoes [`Rotation::turn`].
    pub fn turn_back(&self, row: &mut [f32], angles: &Angles) {
        self.turn_with(row, angles, -1.0);
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
