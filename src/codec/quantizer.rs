//! One row's scalar quantizer, which codecs with a step per token share: its range, its codes, its unbiased refit.
//!
//! Compiled once more for each instruction set and must give the same bytes: no fused multiply-add, and sums over a row
//! are kept in [`LANES`] partial sums (element `i` goes to sum `i % LANES`) added in order at the end.
#![forbid(unsafe_code)]

use std::fmt;

use super::float8::{e4m3_decode, e4m3_encode, inverse_power, power, scale_decode, scale_encode};
use crate::cuda::desc::{SideDesc, CLIP_AUTO, CLIP_CELLS, CLIP_FACTOR};
use crate::error::{Error, Result, Status};

pub(crate) const LANES: usize = 16;

/// How the range that the codes cover is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Clip {
    /// Symmetric: the uniform step that is best for a Gaussian of the group's root mean square. Affine: [`Clip::affine`].
    Auto,
    /// This part of the largest distance from the middle of the range.
    Factor(f32),
    /// The range is cut into as many cells as there are codes, which stand for the cells' middles.
    Cells,
}

impl Clip {
    /// Parses the `clip` key of a recipe.
    pub fn parse(text: &str) -> Result<Self> {
        match (text, text.parse::<f32>()) {
            ("auto", _) => Ok(Clip::Auto),
            ("cells", _) => Ok(Clip::Cells),
            (_, Ok(x)) if (0.3..=1.0).contains(&x) => Ok(Clip::Factor(x)),
            _ => Err(Error::new(Status::Recipe, format!("clip={text}: use auto, cells or a number from 0.3 to 1"))),
        }
    }

    /// The part of the half-range that affine codes reach: more levels want less clipping.
    pub fn affine(self, levels: u32) -> f32 {
        match (self, levels) {
            (Clip::Factor(x), _) => x,
            (Clip::Cells, _) => (levels - 1) as f32 / levels as f32,
            (Clip::Auto, 3) => 0.7,
            (Clip::Auto, 4) => 0.8,
            (Clip::Auto, 8) => 0.9,
            // Two levels stand for a sign, whatever their distance.
            (Clip::Auto, _) => 1.0,
        }
    }
}

impl fmt::Display for Clip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Clip::Auto => f.write_str("auto"),
            Clip::Cells => f.write_str("cells"),
            Clip::Factor(x) => write!(f, "{x}"),
        }
    }
}

/// Codes from 0 to `levels - 1` about zero (`symmetric`) or about a mid-point.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Quantizer {
    pub(crate) levels: u32,
    /// Codes stand for [`NORMAL_LEVELS`] instead of equal steps; symmetric only, and at most 16 levels.
    pub(crate) normal: bool,
    pub(crate) symmetric: bool,
    pub(crate) clip: Clip,
    pub(crate) refit: bool,
}

/// Levels of the best quantizer of 1 to 4 bits for a Gaussian (Max 1960, Lloyd 1982), at index `bits`, in steps of
/// 1 / [`NORMAL_CENTRE`] of the outermost one: what integer kernels multiply. Their middle is [`NORMAL_CENTRE`].
pub(crate) static NORMAL_LEVELS: [[u8; 16]; 5] = [
    [0; 16],
    [0, 126, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    [0, 44, 82, 126, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    [0, 24, 41, 56, 70, 85, 102, 126, 0, 0, 0, 0, 0, 0, 0, 0],
    [0, 15, 26, 34, 41, 48, 54, 60, 66, 72, 78, 85, 92, 100, 111, 126],
];

/// The level, between two of them, that stands for zero.
pub(crate) const NORMAL_CENTRE: f32 = 63.0;

/// Outermost of [`NORMAL_LEVELS`] for a Gaussian of unit variance.
const NORMAL_TOP: [f32; 5] = [0.0, 0.7979, 1.510, 2.152, 2.733];

/// The parameters of one row before they are rounded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fit {
    pub(crate) step: f32,
    pub(crate) mid: f32,
}

/// Step of the uniform quantizer with this many levels that is best for a Gaussian of unit variance (Max 1960; two, three
/// and 256 levels computed the same way).
fn gaussian_step(levels: u32) -> f32 {
    match levels {
        2 => 1.5958,
        3 => 1.224,
        4 => 0.9957,
        8 => 0.5860,
        16 => 0.3352,
        _ => 0.0308,
    }
}

/// Folds a row in [`LANES`] lanes, element `i` in lane `i % LANES`, and then the lanes in order: a shape that compilers turn
/// into vectors.
#[inline(always)]
fn fold(x: &[f32], start: f32, f: impl Fn(f32, f32) -> f32, join: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [start; LANES];
    for chunk in x.chunks(LANES) {
        lanes.iter_mut().zip(chunk).for_each(|(lane, x)| *lane = f(*lane, *x));
    }
    lanes.into_iter().fold(start, join)
}

/// Sum of `f` over a row.
#[inline(always)]
pub(crate) fn sum(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    fold(x, 0.0, |sum, x| sum + f(x), |a, b| a + b)
}

/// Sum of `f` over the pairs of two rows, in the order of [`sum`].
#[inline(always)]
pub(crate) fn sum_pairs<T: Copy>(x: &[f32], y: &[T], f: impl Fn(f32, T) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    for (x, y) in x.chunks(LANES).zip(y.chunks(LANES)) {
        lanes.iter_mut().zip(x.iter().zip(y)).for_each(|(lane, (x, y))| *lane += f(*x, *y));
    }
    lanes.into_iter().fold(0.0, |a, b| a + b)
}

#[inline(always)]
pub(crate) fn dot(x: &[f32], y: &[f32]) -> f32 {
    sum_pairs(x, y, |x, y| x * y)
}

#[inline(always)]
pub(crate) fn abs_max(x: &[f32]) -> f32 {
    fold(x, 0.0, |a, x| a.max(x.abs()), f32::max)
}

/// Smallest and largest element.
#[inline(always)]
pub(crate) fn range(x: &[f32]) -> (f32, f32) {
    let low = fold(x, f32::INFINITY, f32::min, f32::min);
    let high = fold(x, f32::NEG_INFINITY, f32::max, f32::max);
    (without_sign_of_zero(low), without_sign_of_zero(high))
}

/// Of zeros of both signs, which one is the smallest depends on the machine.
#[inline(always)]
pub(crate) fn without_sign_of_zero(x: f32) -> f32 {
    x + 0.0
}

#[inline(always)]
pub(crate) fn root_mean_square(x: &[f32]) -> f32 {
    (sum(x, |x| x * x) / x.len() as f32).sqrt()
}

impl Quantizer {
    /// What codes stand for, when nothing is to be coded.
    #[inline(always)]
    pub(crate) fn of_codes(bits: usize, normal: bool) -> Self {
        Self { levels: 1 << bits, normal, symmetric: true, clip: Clip::Auto, refit: false }
    }

    /// The code value, possibly between two codes, that stands for the middle of the range.
    #[inline(always)]
    pub(crate) fn centre(&self) -> f32 {
        if self.normal {
            NORMAL_CENTRE
        } else {
            (self.levels - 1) as f32 * 0.5
        }
    }

    /// Standard deviation of what the codes of a Gaussian row stand for, in steps.
    #[inline(always)]
    pub(crate) fn spread(&self) -> f32 {
        if self.normal {
            NORMAL_CENTRE / NORMAL_TOP[self.levels.ilog2() as usize]
        } else {
            1.0 / gaussian_step(self.levels)
        }
    }

    #[inline(always)]
    fn normal_levels(&self) -> &'static [u8] {
        &NORMAL_LEVELS[self.levels.ilog2() as usize][..self.levels as usize]
    }

    /// What a code stands for, in steps above or below the middle.
    #[inline(always)]
    pub(crate) fn value(&self, code: u8) -> f32 {
        let level = if self.normal { self.normal_levels()[usize::from(code)] } else { code };
        f32::from(level) - self.centre()
    }

    /// Range of the codes of a row, before coding.
    #[inline(always)]
    pub(crate) fn fit(&self, x: &[f32]) -> Fit {
        if !self.symmetric {
            let (low, high) = range(x);
            let half = (high - low) * 0.5 * self.clip.affine(self.levels);
            return Fit { step: half / self.centre(), mid: (low + high) * 0.5 };
        }
        let widest = abs_max(x) / self.centre();
        let step = match self.clip {
            Clip::Factor(_) | Clip::Cells => widest * self.clip.affine(self.levels),
            Clip::Auto if self.levels == 256 => widest,
            Clip::Auto if self.normal => {
                (root_mean_square(x) * NORMAL_TOP[self.levels.ilog2() as usize] / NORMAL_CENTRE).min(widest)
            }
            Clip::Auto => (root_mean_square(x) * gaussian_step(self.levels)).min(widest),
        };
        Fit { step, mid: 0.0 }
    }

    /// Codes a row and returns the step to store.
    #[inline(always)]
    pub(crate) fn code(&self, x: &[f32], step: f32, mid: f32, codes: &mut [u8]) -> f32 {
        let (centre, top) = (self.centre(), (self.levels - 1) as f32);
        let inverse = if step > 0.0 { 1.0 / step } else { 0.0 };
        if self.normal {
            codes.fill(0);
            for pair in self.normal_levels().windows(2) {
                let border = (f32::from(pair[0]) + f32::from(pair[1])) * 0.5 - centre;
                codes.iter_mut().zip(x).for_each(|(code, &x)| *code += u8::from(x * inverse > border));
            }
        } else {
            for (code, &x) in codes.iter_mut().zip(x) {
                // Adding a half and cutting rounds to nearest; the value is not negative after the clamp.
                *code = (((x - mid) * inverse + centre).clamp(0.0, top) + 0.5) as i32 as u8;
            }
        }
        if !self.refit {
            return step;
        }
        let energy = sum(x, |x| (x - mid) * (x - mid));
        let inner = sum_pairs(x, codes, |x, c| (x - mid) * self.value(c));
        if inner > 0.0 {
            energy / inner
        } else {
            step
        }
    }

    /// Codes a row with parameters as they will be read back. Gives the bytes of the step and of the mid-point; `bases`
    /// are the page's powers of two for each.
    #[inline(always)]
    pub(crate) fn seal(&self, x: &[f32], bases: [u8; 2], codes: &mut [u8]) -> [u8; 2] {
        let Fit { step, mid } = self.fit(x);
        if self.symmetric {
            let step = scale_decode(scale_encode(step, bases[0]), bases[0]);
            return [scale_encode(self.code(x, step, 0.0, codes), bases[0]), 0];
        }
        let encode_step = |step: f32| e4m3_encode(step * inverse_power(bases[0]));
        let mid = e4m3_encode(mid * inverse_power(bases[1]));
        let step = e4m3_decode(encode_step(step)) * power(bases[0]);
        [encode_step(self.code(x, step, e4m3_decode(mid) * power(bases[1]), codes)), mid]
    }

    /// A step as [`Quantizer::seal`] gives it.
    #[inline(always)]
    pub(crate) fn read_step(&self, byte: u8, base: u8) -> f32 {
        if self.symmetric {
            scale_decode(byte, base)
        } else {
            e4m3_decode(byte) * power(base)
        }
    }
}

/// Mean of rows `[n][out.len()]`.
#[inline(always)]
pub(crate) fn mean_row(rows: &[f32], out: &mut [f32]) {
    out.fill(0.0);
    let dim = out.len();
    for row in rows.chunks_exact(dim) {
        out.iter_mut().zip(row).for_each(|(m, x)| *m += x);
    }
    let scale = 1.0 / (rows.len() / dim).max(1) as f32;
    out.iter_mut().for_each(|m| *m *= scale);
}

/// Takes the mean off every row.
#[inline(always)]
pub(crate) fn subtract(rows: &mut [f32], mean: &[f32]) {
    for row in rows.chunks_exact_mut(mean.len()) {
        row.iter_mut().zip(mean).for_each(|(x, m)| *x -= m);
    }
}

impl SideDesc {
    /// Fills in how codes are chosen.
    pub(crate) fn describe_quantizer(&mut self, quantizer: &Quantizer, rotate: bool) {
        let Quantizer { normal, symmetric, clip, refit, .. } = *quantizer;
        (self.normal, self.symmetric, self.refit) = (normal.into(), symmetric.into(), refit.into());
        self.rotate = rotate.into();
        (self.clip, self.clip_factor) = match clip {
            Clip::Auto => (CLIP_AUTO, 0.0),
            Clip::Factor(factor) => (CLIP_FACTOR, factor),
            Clip::Cells => (CLIP_CELLS, 0.0),
        };
    }
}
