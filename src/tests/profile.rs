//! Profiles of no model, for tests of recipes that need one.
#![forbid(unsafe_code)]

use super::random::Rng;
use crate::profile::{LayerProfile, Profile};
use crate::recipe::Recipe;
use crate::rotation::Rotation;
use crate::shape::Shape;

/// Layers that these profiles have.
const N_LAYERS: usize = 4;

/// Parses a recipe and, if it takes a profile, gives it one of random numbers for layers of this shape.
pub(crate) fn parse(spec: &str, shape: Shape) -> Recipe {
    let recipe = Recipe::parse(spec).unwrap();
    match recipe.profile_path() {
        Ok(None) => recipe,
        // It is the test that has the profile, there is no file.
        _ => recipe.with_profile(&profile(shape, 1)).unwrap(),
    }
}

/// Random numbers, keys that turn, and a transform with an inverse.
pub(crate) fn profile(shape: Shape, seed: u64) -> Profile {
    let mut rng = Rng::new(seed);
    let mut profile = Profile::default();
    for layer in 0..N_LAYERS {
        let frequencies: Vec<f64> = (0..16).map(|pair| 1e4f64.powf(-f64::from(pair) / 16.0)).collect();
        profile.set(layer, random(shape, Rotation::new(&frequencies, false).unwrap(), &mut rng)).unwrap();
    }
    profile
}

fn random(shape: Shape, rotation: Rotation, rng: &mut Rng) -> LayerProfile {
    let (heads, k, v) = (shape.n_kv_heads as usize, shape.head_dim_k as usize, shape.head_dim_v as usize);
    let small = 0.3 / (k as f32).sqrt();
    let mut transform = rng.values(heads * k * k);
    for (i, x) in transform.iter_mut().enumerate() {
        *x = *x * small + if i % (k * k) % (k + 1) == 0 { 1.0 } else { 0.0 };
    }
    let scaled = |mut values: Vec<f32>, factor: f32| {
        values.iter_mut().for_each(|x| *x *= factor);
        values
    };
    let arrays = [
        rng.values(heads * k),
        transform,
        scaled(rng.values(heads * k * v), small),
        scaled(rng.values(heads * v), 0.1),
    ];
    LayerProfile::new(shape, rotation, arrays).unwrap()
}

/// A profile whose numbers lose nothing in any arithmetic: coefficients are channels in another order, times powers of two.
pub(crate) fn exact(shape: Shape) -> Profile {
    let (heads, k, v) = (shape.n_kv_heads as usize, shape.head_dim_k as usize, shape.head_dim_v as usize);
    let of_64 = |n: usize| (0..n).map(|i| (i * 37 % 129) as f32 / 64.0 - 1.0).collect::<Vec<f32>>();
    let mut transform = vec![0f32; heads * k * k];
    for row in 0..heads * k {
        // 5 has no divisor in common with a head size.
        let channel = (row % k * if k % 5 == 0 { 7 } else { 5 } + 3) % k;
        transform[row * k + channel] = [0.25, 0.5, 1.0, 2.0, 4.0][row % 5];
    }
    let predictor = of_64(heads * k * v).into_iter().map(|x| x / 16.0).collect();
    let mut profile = Profile::default();
    let arrays = [of_64(heads * k), transform, predictor, of_64(heads * v)];
    profile.set(0, LayerProfile::new(shape, Rotation::none(), arrays).unwrap()).unwrap();
    profile
}
