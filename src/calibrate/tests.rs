//! A head whose keys, values and queries are known: calibration must find what they were made of.
#![forbid(unsafe_code)]

use super::{Calibration, Observation};
use crate::attention::Mask;
use crate::profile::LayerProfile;
use crate::rotation::{Angles, Rotation};
use crate::rows::Rows;
use crate::shape::Shape;
use crate::tests::random::Rng;

const DIM: usize = 64;
const N: usize = 1024;
const SHAPE: Shape = Shape { n_heads: 2, n_kv_heads: 1, head_dim_k: DIM as u32, head_dim_v: DIM as u32 };
const SCALE: f32 = 0.125;

fn rotation() -> Rotation {
    Rotation::new(&(0..32).map(|pair| 1e4f64.powf(-f64::from(pair) / 32.0)).collect::<Vec<_>>(), false).unwrap()
}

/// One head's text.
struct Text {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    out: Vec<f32>,
    lse: Vec<f32>,
}

/// Keys of `bias` and noise, values of `slope` times the first channel's noise, all turned as they are cached. Attention is
/// that of all earlier tokens.
fn text(rng: &mut Rng, bias: &[f32], slope: f32) -> Text {
    let (rotation, mut angles) = (rotation(), Angles::default());
    let mut text = Text { q: rng.values(N * 2 * DIM), k: Vec::new(), v: Vec::new(), out: Vec::new(), lse: Vec::new() };
    for token in 0..N {
        // The slowest pair hardly turns inside a page: noise there stays where it is.
        let mut key: Vec<f32> = rng.values(DIM).iter().map(|x| 0.2 * x).collect();
        key[31] *= 10.0;
        let noise = rng.values(DIM);
        text.v.extend(noise.iter().map(|noise| slope * key[31] + 0.05 * noise));
        key.iter_mut().zip(bias).for_each(|(x, b)| *x += b);
        rotation.angles(token as i32, &mut angles);
        rotation.turn(&mut key, &angles);
        text.k.extend(key);
    }
    for (row, q) in text.q.chunks_exact(DIM).enumerate() {
        let dot = |token: usize| q.iter().zip(&text.k[token * DIM..]).map(|(a, b)| a * b).sum::<f32>() * SCALE;
        let scores: Vec<f32> = (0..=row / 2).map(dot).collect();
        let sum: f32 = scores.iter().map(|s| s.exp()).sum();
        let mut out = [0f32; DIM];
        for (score, value) in scores.iter().zip(text.v.chunks_exact(DIM)) {
            out.iter_mut().zip(value).for_each(|(o, v)| *o += score.exp() / sum * v);
        }
        text.out.extend(out);
        text.lse.push(sum.ln());
    }
    text
}

fn observe(calibration: &Calibration, text: &Text, n_tokens: usize) -> crate::error::Result<()> {
    let rows = |data, heads: usize| Rows { data, stride_token: heads * DIM, stride_head: DIM };
    let seen = Observation {
        q: rows(&text.q, 2),
        k: rows(&text.k, 1),
        v: rows(&text.v, 1),
        out: rows(&text.out, 2),
        lse: &text.lse,
        mask: Mask::None,
        mask_stride_token: 0,
        scale: SCALE,
        softcap: 0.0,
        n_tokens,
    };
    calibration.observe(&seen, 0, 1)
}

fn calibrated(seed: u64, bias: &[f32], slope: f32) -> LayerProfile {
    let calibration = Calibration::new(SHAPE, rotation()).unwrap();
    let mut rng = Rng::new(seed);
    for _ in 0..2 {
        observe(&calibration, &text(&mut rng, bias, slope), N).unwrap();
    }
    calibration.solve(1).unwrap()
}

#[test]
fn bias_and_predictor_are_those_that_the_text_was_made_with() {
    let bias: Vec<f32> = (0..DIM).map(|c| (c % 7) as f32 - 3.0).collect();
    let profile = calibrated(1, &bias, 0.7);
    let off = profile.key_bias.iter().zip(&bias).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    // Means of 2 040 keys of deviations .2 and 2.
    assert!(off < 0.2, "the bias is off by {off}");
    // What is predicted grows by .7 with that channel and not with others.
    for row in profile.predictor.chunks_exact(DIM) {
        let others = row.iter().enumerate().filter(|(c, _)| *c != 31).map(|(_, w)| w.abs()).fold(0.0, f32::max);
        assert!((row[31] - 0.7).abs() < 0.1 && others < 0.25, "{} beside {others}", row[31]);
    }
    assert!(profile.key_transform.chunks_exact(DIM).all(|row| row.iter().any(|x| *x != 0.0)));
}

#[test]
fn the_same_text_gives_the_same_bytes_and_another_does_not() {
    let bias = vec![0.5; DIM];
    let [a, b, c] = [1, 1, 2].map(|seed| calibrated(seed, &bias, 0.3));
    let bits = |profile: &LayerProfile| -> Vec<u32> {
        let arrays = [&profile.key_bias, &profile.key_transform, &profile.predictor, &profile.offset];
        arrays.into_iter().flatten().map(|x| x.to_bits()).collect()
    };
    assert_eq!(bits(&a), bits(&b));
    assert_eq!(a.hash(), b.hash());
    assert_ne!(a.hash(), c.hash());
}

/// Tokens that nobody looks at do not count: half of the keys have noise in a channel that the others lack.
#[test]
fn tokens_count_by_the_attention_they_get() {
    let mut rng = Rng::new(9);
    let mut seen = text(&mut rng, &[0.0; DIM], 0.0);
    let calibration = |seen: &Text| {
        let calibration = Calibration::new(SHAPE, Rotation::none()).unwrap();
        observe(&calibration, seen, N).unwrap();
        let samples = calibration.heads[0].lock().unwrap();
        (samples.key_weights.clone(), samples.value_weights.clone())
    };
    let (_, even) = calibration(&seen);
    assert!(even[4..N - 128].iter().all(|w| *w > 0.0) && even[N - 128..].iter().chain(&even[..4]).all(|w| *w == 0.0));
    // Denominators a hundred times as large: weights a hundredth, their squares less than a thousandth.
    seen.lse.iter_mut().for_each(|lse| *lse += 100f32.ln());
    let (_, less) = calibration(&seen);
    assert!(even.iter().zip(&less).all(|(even, less)| *less <= even * 1e-3));
}

#[test]
fn too_little_text_and_wrong_sizes_are_refused() {
    let bias = vec![0.0; DIM];
    let text = text(&mut Rng::new(3), &bias, 0.0);
    let calibration = Calibration::new(SHAPE, rotation()).unwrap();
    assert!(observe(&calibration, &text, N + 1).is_err() && observe(&calibration, &text, 0).is_err());
    observe(&calibration, &text, 255).unwrap();
    assert!(calibration.solve(1).unwrap_err().message().contains("too little text: at least 256 tokens"));
}
