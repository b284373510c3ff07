//! Codec `adaptive`: what its widths do.
#![forbid(unsafe_code)]

use super::AdaptiveCodec;
use crate::codec::group::tests::{near, normal};
use crate::codec::page::{PageCodec, PageRef, SealRows, Side};
use crate::codec::CodecParams;
use crate::layout::Layout;
use crate::recipe::Recipe;
use crate::shape::Shape;
use crate::simd::isa::{Isa, IsaToken};

const DIM: usize = 128;
const PAGE: usize = 128;

/// Seals a page and decodes it: squared error of each row.
fn errors(spec: &str, side: Side, rows: &[f32], attention: &[f32]) -> Vec<f64> {
    let recipe = Recipe::parse(spec).unwrap();
    let params = if side == Side::Key { &recipe.key } else { &recipe.value };
    let CodecParams::Adaptive(params) = params else { panic!("{spec} has no widths by token") };
    let codec = AdaptiveCodec::new(params, side, DIM, PAGE, IsaToken::new(Isa::Scalar).unwrap()).unwrap();
    let at: Vec<u32> = (0..PAGE as u32).collect();
    let (mut header, mut bytes) = ([0u8; 4], vec![0u8; codec.page_bytes()]);
    let mut scratch = rows.to_vec();
    let mut sealed = SealRows {
        place: None,
        at: &at,
        rows: &mut scratch,
        fresh: true,
        exact: &[],
        channel_weights: &[],
        last_exponents: &mut [],
        attention,
    };
    codec.seal(&mut header, &mut bytes, &mut sealed);
    let mut out = [0f32; DIM];
    rows.chunks_exact(DIM)
        .enumerate()
        .map(|(row, want)| {
            codec.decode(PageRef { header: &header, bytes: &bytes }, row, &mut out);
            out.iter().zip(want).map(|(a, b)| f64::from(a - b).powi(2)).sum()
        })
        .collect()
}

/// Mean over all values of a page.
fn mse(errors: &[f64]) -> f64 {
    errors.iter().sum::<f64>() / (errors.len() * DIM) as f64
}

/// Rows of a Gaussian of unit variance, the first 32 of them four times as large.
fn some_loud_rows() -> Vec<f32> {
    normal(PAGE * DIM).iter().enumerate().map(|(i, x)| if i < 32 * DIM { 4.0 * x } else { *x }).collect()
}

/// Without outliers, rotation or a mean, a page of `bits` bits per value has the error of the uniform mid-point quantizer
/// of the row's range (1 to 4 bits on Gaussian rows of 128: .615, .146, .0366, .0092).
#[test]
fn ranges_of_rows_give_the_published_errors() {
    for (bits, want) in [(1, 0.615), (2, 0.146), (3, 0.0366), (4, 0.0092)] {
        let spec = format!("qaq:paper,bits={bits},outliers=0,adaptive=0,attn-window=0");
        for side in [Side::Key, Side::Value] {
            let got = mse(&errors(&spec, side, &normal(PAGE * DIM), &[]));
            near(&spec, got, want, 0.05);
        }
    }
}

#[test]
fn large_rows_get_the_bits() {
    let rows = some_loud_rows();
    for side in [Side::Key, Side::Value] {
        let error = |spec: &str| mse(&errors(spec, side, &rows, &[]));
        // The rows lie where natural order would make them the widest, so the other way round as well.
        let backwards: Vec<f32> = rows.chunks_exact(DIM).rev().flatten().copied().collect();
        let uniform = mse(&errors("qaq:bits=2.25,adaptive=0", side, &backwards, &[]));
        let free = error("qaq:bits=2.25,min-bits=1");
        assert!(free < 0.6 * uniform, "{side:?}: {free} {uniform}");
        // A floor of 2 bits leaves less to share out.
        assert!((free..uniform).contains(&error("qaq:bits=2.25,min-bits=2")));
    }
}

#[test]
fn widths_of_values_follow_attention() {
    let rows = normal(PAGE * DIM);
    let attention: Vec<f32> = (0..PAGE).map(|i| if i % 8 == 3 { 0.1 } else { 1e-3 }).collect();
    let seen = |errors: &[f64]| errors.iter().skip(3).step_by(8).sum::<f64>();
    let value = |attention: &[f32]| seen(&errors("qaq:bits=2.25", Side::Value, &rows, attention));
    assert!(value(&attention) < 0.2 * value(&[]), "{} {}", value(&attention), value(&[]));
    // Keys only if they are asked to: the bound has no attention in it.
    let key = |spec: &str, attention: &[f32]| seen(&errors(spec, Side::Key, &rows, attention));
    assert_eq!(key("qaq:bits=2.25", &attention), key("qaq:bits=2.25", &[]));
    assert!(key("qaq:bits=2.25,attn-keys=1", &attention) < 0.5 * key("qaq:bits=2.25", &[]));
}

#[test]
fn outlier_values_are_exact() {
    let mut rows = normal(PAGE * DIM);
    for (i, row) in rows.chunks_exact_mut(DIM).enumerate() {
        row[i * 37 % DIM] = 25.0;
        row[(i * 37 + 5) % DIM] = -30.0;
    }
    for side in [Side::Key, Side::Value] {
        let error = |n: usize| mse(&errors(&format!("qaq:paper,outliers={n}"), side, &rows, &[]));
        assert!(
            error(2) < 0.25 && error(1) < 0.5 * error(0) && error(2) < 0.1 * error(1),
            "{:?}",
            [0, 1, 2].map(error)
        );
    }
}

/// Step 8 / 128, order 8 / 128, mean 8 / 128 (keys); as published step and mid-point 16 / 128, two outliers 48 / 128. The
/// page's header is 32 bits.
#[test]
fn effective_bits_count_all_metadata() {
    let shape = Shape { n_heads: 8, n_kv_heads: 2, head_dim_k: 128, head_dim_v: 128 };
    for (spec, k, v) in [
        ("qaq:bits=2.25", 2.5625, 2.375),
        ("qaq:bits=2.25,adaptive=0,smooth=0", 2.4375, 2.3125),
        ("qaq:k=2.5,v=2,outliers=1", 3.0, 2.3125),
        ("qaq:paper", 2.5625, 2.5625),
    ] {
        let layout = Layout::new(&Recipe::parse(spec).unwrap(), shape, 0, 4096, 272).unwrap();
        near(spec, layout.bits_k(), k, 0.002);
        near(spec, layout.bits_v(), v, 0.002);
    }
}

/// Squared errors of the quantizers of 1 to 4 bits that are best for a Gaussian, of any levels (.363, .117, .0346, .0095)
/// and of equal steps (.363, .119, .0374, .0115); Max 1960. The refit, which takes the shrinkage out of the reconstruction,
/// is off; rows of 128 values know their deviation to a few per cent only.
#[test]
fn normal_levels_are_the_best_for_a_gaussian() {
    for (bits, any, equal) in [(1, 0.3634, 0.3634), (2, 0.1175, 0.1188), (3, 0.03454, 0.03744), (4, 0.009497, 0.01154)]
    {
        for (levels, want) in [("normal", any), ("uniform", equal)] {
            let spec = format!("qaq:bits={bits},min-bits=1,levels={levels},refit=0,mean=0,rotate=0");
            near(&spec, mse(&errors(&spec, Side::Value, &normal(PAGE * DIM), &[])), want, 0.06);
        }
    }
}
