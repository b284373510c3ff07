//! Rows of floats: where they lie in a caller's memory, how they lie in ours.
#![forbid(unsafe_code)]

use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::error::{Error, Result};
use crate::shape::MAX_HEAD_DIM;

/// Rows of all heads: element `c` of head `h` of token `t` is `data[t * stride_token + h * stride_head + c]`.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    /// The elements.
    pub data: &'a [f32],
    /// Distance between tokens.
    pub stride_token: usize,
    /// Distance between heads.
    pub stride_head: usize,
}

impl<'a> Rows<'a> {
    /// One head vector.
    pub fn row(&self, token: usize, head: usize, dim: usize) -> &'a [f32] {
        &self.data[token * self.stride_token + head * self.stride_head..][..dim]
    }

    pub(crate) fn check(&self, what: &str, n_tokens: usize, n_heads: usize, dim: usize) -> Result<()> {
        let need = (n_tokens - 1)
            .checked_mul(self.stride_token)
            .zip((n_heads - 1).checked_mul(self.stride_head))
            .and_then(|(a, b)| a.checked_add(b)?.checked_add(dim));
        match need {
            Some(need) if need <= self.data.len() => Ok(()),
            _ => Err(Error::invalid(format!("{what} holds {} floats, too few for its strides", self.data.len()))),
        }
    }
}

/// Keys and values are kept within the range of FP16; NaN counts as 0.
#[inline(always)]
pub(crate) fn finite(x: f32) -> f32 {
    if x.is_nan() {
        0.0
    } else {
        x.clamp(-65504.0, 65504.0)
    }
}

/// Reads a little-endian float.
pub(crate) fn read_float(bytes: &[u8]) -> f32 {
    f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

/// Writes an FP16 row.
pub(crate) fn write_half(to: &mut [u8], row: &[f32]) {
    let mut halves = [f16::ZERO; MAX_HEAD_DIM as usize];
    let halves = &mut halves[..row.len()];
    halves.convert_from_f32_slice(row);
    to.chunks_exact_mut(2).zip(halves).for_each(|(to, x)| to.copy_from_slice(&x.to_le_bytes()));
}

/// Reads an FP16 row.
pub(crate) fn read_half(from: &[u8], row: &mut [f32]) {
    let mut halves = [f16::ZERO; MAX_HEAD_DIM as usize];
    let halves = &mut halves[..row.len()];
    halves.iter_mut().zip(from.chunks_exact(2)).for_each(|(x, from)| *x = f16::from_le_bytes([from[0], from[1]]));
    halves.convert_to_f32_slice(row);
}
