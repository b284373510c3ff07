//! A query that is not finite makes its own output row NaN, visibly, and touches no other.
#![forbid(unsafe_code)]

use super::layer::{recipes, Layer, Rng, Ubatch};
use crate::shape::Shape;
use crate::simd::isa::{Isa, IsaToken};

const SHAPE: Shape = Shape { n_heads: 6, n_kv_heads: 2, head_dim_k: 128, head_dim_v: 64 };

#[test]
fn a_query_that_is_not_finite_gives_nan_in_its_own_row_only() {
    let more = ["skvq:mean=0,window=0,sinks=0", "skvq:k=8,v=8", "qaq:mean=0", "skvq:group=64,rotate=0"];
    for spec in recipes(&more) {
        for token in Isa::ALL.into_iter().filter_map(IsaToken::new) {
            check(&spec, token);
        }
    }
}

fn check(spec: &str, token: IsaToken) {
    let mut layer = Layer::new(spec, SHAPE, 512, token);
    let mut rng = Rng::new(77);
    let mut pos = 0;
    for n in [250, 9, 1] {
        let ints = layer.plan(pos..pos + n);
        let clean = layer.ubatch(&mut rng, n);
        if pos > 0 {
            for (n_splits, sink_logits) in [(1, None), (3, Some(&[0.5f32; 6][..]))] {
                spoil(&layer, &ints, &clean, n_splits, sink_logits, &format!("{spec}, {}", token.isa().name()));
            }
        }
        let lse = layer.attend(&ints, &clean, 1, None).1;
        layer.store(&ints, &clean, &lse);
        pos += n;
    }
}

/// Spoils the query row of a middle token, of a head that shares its KV head with others.
fn spoil(layer: &Layer, ints: &[i32], clean: &Ubatch, n_splits: usize, sink_logits: Option<&[f32]>, what: &str) {
    let (n_heads, dim_k, dim_v) = (SHAPE.n_heads as usize, SHAPE.head_dim_k as usize, SHAPE.head_dim_v as usize);
    let n_tokens = clean.q.len() / (n_heads * dim_k);
    let row = n_tokens / 2 * n_heads + 4;
    let (want, want_lse) = layer.attend(ints, clean, n_splits, sink_logits);
    assert!(want.iter().chain(&want_lse).all(|x| x.is_finite()), "{what}: not finite as it was");
    for (values, kind) in [
        (&[f32::NAN; 128][..], "all NaN"),
        (&[f32::NAN], "one NaN"),
        (&[f32::INFINITY], "one infinity"),
        (&[f32::NEG_INFINITY], "one negative infinity"),
        (&[f32::MAX], "a value too large for any score"),
    ] {
        let what = format!("{what}, {n_tokens} tokens, {n_splits} splits, {kind}");
        let mut spoiled = clean.clone();
        spoiled.q[row * dim_k + 128 - values.len()..][..values.len()].copy_from_slice(values);
        let (out, lse) = layer.attend(ints, &spoiled, n_splits, sink_logits);
        let rows = out.chunks_exact(dim_v).zip(&lse).zip(want.chunks_exact(dim_v).zip(&want_lse));
        for (i, (got, want)) in rows.enumerate() {
            if i == row {
                assert!(got.0.iter().chain([got.1]).all(|x| x.is_nan()), "{what}: {got:?}");
            } else {
                assert_eq!(got, want, "{what}: row {i} has changed");
            }
        }
    }
}
