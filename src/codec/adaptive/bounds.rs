//! How coarse a token's codes may be: the bounds of QAQ (arXiv 2403.04643, sections 3.2 to 3.4).
//!
//! Both bounds are standard deviations that a token's reconstruction may have so that attention weights (`target` of a
//! key) or outputs (`target` of a value) stay within a target; times `sqrt(12)` they are steps of a uniform quantizer.
//! Three corrections to the reference implementation: logits carry `1 / sqrt(head_dim)`, so the query's squared norm is
//! divided by the head size; the step is not doubled; one token does not divide by zero.
#![forbid(unsafe_code)]

/// `2 * sqrt(3)`: a uniform error of step `s` has a standard deviation of `s / sqrt(12)`.
const STEPS_PER_DEVIATION: f32 = 3.464_101_6;

/// Largest step of a key among `n_tokens`: `sigma^2 <= ln(T^3 / (T - 1) target^2 + 1) / |q|^2`. `q_norm2` is the squared
/// norm of the queries divided by the head size. No attention weight is in it.
pub(super) fn key_step(n_tokens: usize, target: f32, q_norm2: f32) -> f32 {
    let t = n_tokens.max(2) as f32;
    STEPS_PER_DEVIATION * (ln(t * t * t / (t - 1.0) * target * target + 1.0) / q_norm2).sqrt()
}

/// Largest step of a value that has the attention weight `attention`: `sigma <= target / (sqrt(T) attention)`.
pub(super) fn value_step(n_tokens: usize, target: f32, attention: f32) -> f32 {
    STEPS_PER_DEVIATION * target / ((n_tokens as f32).sqrt() * attention)
}

/// In 64 bits and rounded, as libraries differ in the last bit of a logarithm.
fn ln(x: f32) -> f32 {
    f64::from(x).ln() as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bits of a token whose values span `range`.
    fn bits(range: f32, step: f32) -> i32 {
        (range / step).log2().ceil() as i32
    }

    /// Range 4, squared query norm 300 (not divided by a head size): the paper's formula, worked out by hand from the PDF.
    #[test]
    fn key_bits_of_the_paper() {
        for (n_tokens, want) in [(100, [5, 4, 3, 3, 3]), (1000, [4, 3, 3, 3, 3]), (8000, [3, 3, 3, 3, 3])] {
            let targets = [0.01, 0.1, 1.0, 10.0, 30.0];
            assert_eq!(targets.map(|target| bits(4.0, key_step(n_tokens, target, 300.0))), want, "{n_tokens} tokens");
        }
        assert_eq!(bits(4.0, key_step(100, 0.001, 300.0)), 8);
        assert_eq!(bits(4.0, key_step(1000, 0.001, 300.0)), 5);
        assert!(key_step(1, 0.01, 300.0).is_finite());
    }

    /// What sealed bytes depend on is the same with any library's logarithm.
    #[test]
    fn steps_of_all_pages_bit_for_bit() {
        for (page, want) in [(64, 0x41200109u32), (128, 0x412cba83), (256, 0x41389cb5)] {
            assert_eq!(key_step(page, 1.0, 1.0).to_bits(), want, "{page}");
        }
    }

    #[test]
    fn value_bits_follow_attention() {
        let want = [(1.0, 6), (0.1, 2), (0.001, -4)];
        for (attention, want) in want {
            assert_eq!(bits(4.0, value_step(1000, 1.0, attention)), want, "{attention}");
        }
    }
}
