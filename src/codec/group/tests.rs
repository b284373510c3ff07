//! Codec `group` against published and measured values.
#![forbid(unsafe_code)]

use crate::codec::page::{PageCodec, SealRows, Side};
use crate::codec::CodecParams;
use crate::layout::Layout;
use crate::recipe::Recipe;
use crate::shape::Shape;
use crate::simd::isa::{Isa, IsaToken};

const DIM: usize = 128;
const PAGE: usize = 128;

/// Standard normal rows (Box-Muller over a fixed linear congruential sequence).
pub(in crate::codec) fn normal(n: usize) -> Vec<f32> {
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f64 + 0.5) / (1u64 << 24) as f64
    };
    (0..n).map(|_| ((-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos()) as f32).collect()
}

/// Seals pages of standard normal rows (plus `offset`) and gives the mean squared error and the slope of the reconstruction.
fn round_trip(spec: &str, offset: f32) -> (f64, f64) {
    let recipe = Recipe::parse(spec).unwrap();
    let CodecParams::Group(params) = &recipe.value else { panic!("{spec} has no groups") };
    let token = IsaToken::new(Isa::Scalar).unwrap();
    let codec = super::GroupCodec::new(params, Side::Value, DIM, PAGE, token).unwrap();
    let at: Vec<u32> = (0..PAGE as u32).collect();
    let (mut error, mut inner, mut energy, mut n) = (0.0, 0.0, 0.0, 0);
    for page in normal(8 * PAGE * DIM).chunks_exact(PAGE * DIM) {
        let (mut header, mut bytes) = ([0u8; 4], vec![0u8; codec.page_bytes()]);
        let mut rows: Vec<f32> = page.iter().map(|x| x + offset).collect();
        let truth = rows.clone();
        codec.seal(
            &mut header,
            &mut bytes,
            &mut SealRows {
                place: None,
                at: &at,
                rows: &mut rows,
                fresh: true,
                exact: &[],
                channel_weights: &[],
                last_exponents: &mut [],
                attention: &[],
            },
        );
        let mut out = [0f32; DIM];
        for (row, truth) in truth.chunks_exact(DIM).enumerate() {
            codec.decode(crate::codec::page::PageRef { header: &header, bytes: &bytes }, row, &mut out);
            for (a, b) in out.iter().zip(truth) {
                let (a, b) = (f64::from(*a), f64::from(*b));
                error += (a - b).powi(2);
                inner += a * b;
                energy += b * b;
                n += 1;
            }
        }
    }
    (error / f64::from(n), inner / energy)
}

pub(in crate::codec) fn near(what: &str, got: f64, want: f64, share: f64) {
    assert!((got - want).abs() <= share * want, "{what}: {got:.4}, expected {want} within {share}");
}

/// SKVQ's plain min/max and clipped quantizers on N(0, 1) in groups of 128 (measured values of 64-bit simulations); FP8
/// parameters add a few per cent.
#[test]
fn affine_errors_are_the_published_ones() {
    let form = "group=128,symmetric=0,refit=0,rotate=0";
    for (bits, clip, want) in [
        ("2", "1", 0.251),
        ("2", "0.92", 0.211),
        ("2", "0.8", 0.162),
        ("2", "0.7", 0.133),
        ("1.6", "1", 0.531),
        ("1.6", "0.92", 0.459),
    ] {
        let spec = format!("skvq:v={bits},clip={clip},{form}");
        near(&spec, round_trip(&spec, 0.0).0, want, 0.06);
    }
    // Clipping is about the mid-range: an offset of ten deviations costs only what FP8 loses on the mid-point.
    near("offset", round_trip(&format!("skvq:v=2,clip=0.8,{form}"), 10.0).0, 0.163, 0.35);
}

/// The symmetric grid with the Gaussian step is within a few per cent of Lloyd-Max's error before the refit.
#[test]
fn symmetric_errors_are_near_lloyd_max() {
    for (bits, want) in [("2", 0.1175), ("3", 0.0346), ("4", 0.0095)] {
        let spec = format!("skvq:v={bits},refit=0,rotate=0");
        near(&spec, round_trip(&spec, 0.0).0, want, 0.25);
    }
    let (error, _) = round_trip("skvq:v=8,rotate=0", 0.0);
    assert!(error <= 1e-4, "{error:.2e}");
}

/// The refitted step makes the reconstruction unbiased: its regression slope on the truth is 1.
#[test]
fn refit_removes_the_shrinkage() {
    for bits in ["1.6", "2", "3"] {
        let slope = |refit| round_trip(&format!("skvq:v={bits},refit={refit}"), 0.0).1;
        assert!(slope(0) < 0.985, "{bits} bits without refit: {}", slope(0));
        near("slope", slope(1), 1.0, 0.004);
    }
}

/// `b + 16 / g` for FP8 step and mid-point (SKVQ, table 4), `b + 8 / head_dim` for one scale; a page's header adds .002.
#[test]
fn effective_bits_count_all_metadata() {
    let shape = Shape { n_heads: 8, n_kv_heads: 2, head_dim_k: 128, head_dim_v: 128 };
    for (spec, k, v) in [
        ("skvq:k=2,v=2,group=128,mean=0,smooth=0", 2.125, 2.125),
        ("skvq:k=2,v=2,group=64,mean=0,smooth=0", 2.25, 2.25),
        ("skvq:k=2,v=2,group=32,mean=0,smooth=0", 2.5, 2.5),
        ("skvq:paper", 2.25, 2.25),
        ("skvq:k=4,v=3", 4.25, 3.0625),
        ("skvq:k=2,v=2,smooth=0", 2.1875, 2.0625),
        ("skvq:k=8,v=1.6", 8.25, 1.6875),
    ] {
        let layout = Layout::new(&Recipe::parse(spec).unwrap(), shape, 0, 4096, 272).unwrap();
        near(spec, layout.bits_k(), k, 0.0015);
        near(spec, layout.bits_v(), v, 0.0015);
    }
}

/// At 32 768 cells the whole cache, exact rows and metadata included, is at most 16 % of f16.
#[test]
fn a_long_cache_is_a_sixth_of_f16() {
    let recipe = Recipe::parse("skvq:k=2,v=2,group=64,window=128").unwrap();
    let shape = Shape { n_heads: 32, n_kv_heads: 8, head_dim_k: 128, head_dim_v: 128 };
    let n_slots = crate::planner::n_slots(&recipe.planner_config(32768, 1, 1));
    let layout = Layout::new(&recipe, shape, 0, 32768, n_slots).unwrap();
    let share = (layout.k_bytes() + layout.v_bytes()) as f64 / (32768 * 8 * (128 + 128) * 2) as f64;
    assert!(share <= 0.16, "{share}");
}
