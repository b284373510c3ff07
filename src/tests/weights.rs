//! Weights are rounded to bytes, and however a softmax spreads them over a page, what comes out stays within the bound that
//! the codec's row of the registry names.
#![forbid(unsafe_code)]

use super::random::Rng;
use crate::codec::page::{PageRef, SealRows, Side};
use crate::codec::query::Probabilities;
use crate::codec::REGISTRY;
use crate::layout::Layout;
use crate::recipe::Recipe;
use crate::shape::Shape;
use crate::simd::isa::{Isa, IsaToken};

/// Query rows of a page, more than any kernel takes at once.
const N_ROWS: usize = 21;

/// Weights of one row: as a softmax gives them, the largest being 1.
type Weights = dyn Fn(&mut Rng, usize, usize) -> Vec<f32>;

#[test]
fn one_peak_over_a_flat_rest() {
    for rest in [0.1, 0.05, 0.01, 0.0059, 0.0039, 0.0038, 0.003, 0.002, 0.0019, 0.001, 0.0001] {
        check(&format!("one weight of 1 beside {rest}"), &move |rng, _, page| {
            let mut p = vec![rest; page];
            p[rng.below(page)] = 1.0;
            p
        });
    }
}

/// The peaks of a row hide what is below them, and these hide what is below them.
#[test]
fn peaks_of_several_sizes() {
    check("a few peaks per row over two flat levels", &|rng, row, page| {
        let mut p: Vec<f32> = (0..page).map(|t| if t % 2 == 0 { 0.0058 } else { 0.0019 }).collect();
        for size in [0.3, 1.0, 0.02].iter().take(1 + row % 3) {
            p[rng.below(page)] = *size;
        }
        normalised(p)
    });
    check("weights that alternate between roundings", &|_, _, page| {
        (0..page).map(|t| if t == 5 { 1.0 } else { [1.49, 0.51][t % 2] / 255.0 }).collect()
    });
    check("a row that decays", &|_, row, page| {
        (0..page).map(|t| (-(t as f32) * 0.02 * (1 + row) as f32).exp()).collect()
    });
    check("few visible tokens", &|rng, row, page| {
        let visible = |t: usize| t % 16 == row % 16;
        normalised((0..page).map(|t| if visible(t) { rng.normal().exp() } else { 0.0 }).collect())
    });
}

#[test]
fn lognormal_weights() {
    for deviation in [0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0] {
        check(&format!("logits of deviation {deviation}"), &move |rng, _, page| {
            let logits: Vec<f32> = (0..page).map(|_| rng.normal() * deviation).collect();
            let top = logits.iter().copied().fold(f32::MIN, f32::max);
            logits.into_iter().map(|x| (x - top).exp()).collect()
        });
    }
}

fn normalised(mut p: Vec<f32>) -> Vec<f32> {
    let top = p.iter().copied().fold(0.0, f32::max);
    p.iter_mut().for_each(|p| *p /= top);
    p
}

/// Compares every codec, width and instruction set with the scalar implementation, row by row.
fn check(what: &str, weights: &Weights) {
    let mut specs: Vec<String> = Vec::new();
    for width in ["1.6", "2", "3", "4", "8"] {
        for form in ["", ",group=64", ",rotate=0,symmetric=0"] {
            specs.push(format!("skvq:k={width},v={width}{form}"));
        }
    }
    specs.extend(["skvq:v=2,page=64", "skvq:v=4,page=256", "skvq:paper", "kivi:paper"].map(String::from));
    for bits in ["1", "2.25", "3", "4"] {
        specs.push(format!("qaq:bits={bits},min-bits=1"));
        specs.push(format!("qaq:bits={bits},min-bits=1,levels=normal"));
    }
    specs.extend(["qaq:paper", "qaq:page=256", "qaq:page=64,outliers=1"].map(String::from));
    for spec in specs {
        for (mean, noise) in [(1.0, 0.5), (0.0, 1.0), (1.0, 0.0)] {
            check_recipe(&spec, what, weights, [mean, noise]);
        }
    }
}

fn check_recipe(spec: &str, what: &str, weights: &Weights, [mean, noise]: [f32; 2]) {
    let shape = Shape { n_heads: 1, n_kv_heads: 1, head_dim_k: 64, head_dim_v: 96 };
    let shape = if spec.contains("group=64") { Shape { head_dim_v: 128, ..shape } } else { shape };
    let shape = if spec.contains("paper") { Shape { head_dim_k: 128, head_dim_v: 128, ..shape } } else { shape };
    let recipe = Recipe::parse(spec).unwrap();
    let (page, dim) = (recipe.page, shape.head_dim_v as usize);
    let mut rng = Rng::new(5);
    // A mean in common, as real values have it, and what each token adds to it.
    let common = rng.values(dim);
    let rows: Vec<f32> = (0..page * dim).map(|i| mean * common[i % dim] + noise * rng.normal()).collect();
    let p: Vec<f32> = (0..N_ROWS).flat_map(|row| weights(&mut rng, row, page)).collect();
    let mut want = Vec::new();
    for token in Isa::ALL.into_iter().filter_map(IsaToken::new) {
        let layout = Layout::with_isa(&recipe, shape, 0, page, page, token).unwrap();
        let out = outputs(&layout, &rows, &p);
        if token.isa() == Isa::Scalar {
            want = out;
            continue;
        }
        let codec = layout.side(Side::Value).codec.format();
        let bound = REGISTRY.iter().find(|row| codec.starts_with(row.name)).unwrap().nmse;
        for (row, (out, want)) in out.chunks_exact(dim).zip(want.chunks_exact(dim)).enumerate() {
            let error: f64 = out.iter().zip(want).map(|(a, b)| f64::from(a - b).powi(2)).sum();
            let nmse = error / want.iter().map(|b| f64::from(*b).powi(2)).sum::<f64>();
            let isa = token.isa().name();
            assert!(nmse <= bound, "{spec} on {isa}, {what}, values {mean} + {noise}, row {row}: NMSE {nmse:.2e}");
        }
    }
}

/// Seals a page of values and accumulates it with the weights `p`, `[N_ROWS][page]`.
fn outputs(layout: &Layout, rows: &[f32], p: &[f32]) -> Vec<f32> {
    let side = layout.side(Side::Value);
    let at: Vec<u32> = (0..layout.page() as u32).collect();
    let (mut header, mut bytes) = ([0u8; 4], vec![0u8; side.codec.page_bytes()]);
    let mut rows = rows.to_vec();
    let mut rows = SealRows {
        place: None,
        at: &at,
        rows: &mut rows,
        fresh: true,
        exact: &[],
        channel_weights: &[],
        last_exponents: &mut [],
        attention: &[],
    };
    side.codec.seal(&mut header, &mut bytes, &mut rows);
    let mut probabilities = Probabilities::default();
    probabilities.resize(N_ROWS, layout.page());
    probabilities.p[..p.len()].copy_from_slice(p);
    let mut acc = vec![0f32; N_ROWS * side.head_dim];
    side.codec.accumulate(PageRef { header: &header, bytes: &bytes }, &mut probabilities, &mut acc);
    acc
}
