//! Attention in 64-bit floats over plain rows: short, slow and obvious. Every kernel is compared with it.
#![forbid(unsafe_code)]

/// One query head against `n` rows.
pub struct Query<'a> {
    /// The query, `[head_dim_k]`.
    pub q: &'a [f32],
    /// Multiplies scores.
    pub scale: f64,
    /// `softcap * tanh(score / softcap)` if positive.
    pub softcap: f64,
    /// Added to the score of each row (mask and ALiBi); minus infinity hides it.
    pub bias: &'a [f64],
    /// A logit that takes part in the softmax but has no value.
    pub sink_logit: Option<f64>,
}

/// `softmax(scale q K^T + bias) V` for rows `k[n][head_dim_k]` and `v[n][head_dim_v]`, and the natural logarithm of the
/// softmax denominator; zeros and minus infinity if everything is hidden.
pub fn attention(query: &Query, k: &[f32], v: &[f32], head_dim_v: usize) -> (Vec<f64>, f64) {
    let logits: Vec<f64> = k
        .chunks_exact(query.q.len())
        .zip(query.bias)
        .map(|(k, bias)| {
            let dot: f64 = query.q.iter().zip(k).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum();
            let score = dot * query.scale;
            let score = if query.softcap > 0.0 { query.softcap * (score / query.softcap).tanh() } else { score };
            score + bias
        })
        .collect();
    let max = logits.iter().copied().chain(query.sink_logit).fold(f64::NEG_INFINITY, f64::max);
    let mut out = vec![0.0; head_dim_v];
    if max == f64::NEG_INFINITY {
        return (out, max);
    }
    let mut sum = query.sink_logit.map_or(0.0, |sink| (sink - max).exp());
    for (logit, v) in logits.iter().zip(v.chunks_exact(head_dim_v)) {
        let weight = (logit - max).exp();
        sum += weight;
        out.iter_mut().zip(v).for_each(|(o, v)| *o += weight * f64::from(*v));
    }
    out.iter_mut().for_each(|o| *o /= sum);
    (out, max + sum.ln())
}

/// Normalised mean squared error `sum (a - b)^2 / sum b^2`; NaN if anything is.
pub fn nmse(a: &[f32], b: &[f64]) -> f64 {
    let error: f64 = a.iter().zip(b).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum();
    let power: f64 = b.iter().map(|b| b * b).sum();
    if error == 0.0 {
        0.0
    } else {
        error / power
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_rows_by_hand() {
        // Scores 0 and ln 3: weights 1/4 and 3/4.
        let query = Query { q: &[1.0, 0.0], scale: 1.0, softcap: 0.0, bias: &[0.0, 0.0], sink_logit: None };
        let (out, lse) = attention(&query, &[0.0, 9.0, 3f32.ln(), 9.0], &[4.0, 8.0], 1);
        assert!((out[0] - 7.0).abs() < 1e-6 && (lse - 4f64.ln()).abs() < 1e-6);
        // A sink of the same weight as both together halves the output.
        let sink = Query { sink_logit: Some(4f64.ln()), ..query };
        assert!((attention(&sink, &[0.0, 9.0, 3f32.ln(), 9.0], &[4.0, 8.0], 1).0[0] - 3.5).abs() < 1e-6);
    }
}
