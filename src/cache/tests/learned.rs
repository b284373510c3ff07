//! What a cache has learned from its tokens goes with the last of them, and what a sequence keeps exact is its own.

use super::*;

/// Outputs of one sequence that is fed `n` tokens in two steps and then some one by one, all derived from `seed`.
fn answer(cache: &mut Cache, seed: u64, n: usize) -> Vec<f32> {
    let CacheParams { shape, n_layers, .. } = cache.params;
    let (heads, kv_heads) = (shape.n_heads as usize, shape.n_kv_heads as usize);
    let (dim_k, dim_v) = (shape.head_dim_k as usize, shape.head_dim_v as usize);
    let mut rng = Rng::new(seed);
    // Channels and tokens of very different size, so that what was learned shows.
    let sizes: Vec<f32> = rng.values(dim_k).iter().map(|x| (2.0 * x).exp()).collect();
    let mut outputs = Vec::new();
    let mut pos = 0;
    for n in [n / 2, n - n / 2, 1, 1, 70, 1] {
        let positions: Vec<i32> = (pos..pos + n as i32).collect();
        pos += n as i32;
        cache.begin(&vec![0; n], &positions).unwrap();
        for layer in 0..n_layers {
            let mut rows = |heads: usize, dim: usize, sizes: Option<&[f32]>| -> Vec<f32> {
                let mut rows = rng.values(n * heads * dim);
                let size = |i: usize| sizes.map_or(1.0, |sizes| sizes[i % dim]);
                rows.iter_mut().enumerate().for_each(|(i, x)| *x *= size(i));
                rows
            };
            let (q, k) = (rows(heads, dim_k, Some(&sizes)), rows(kv_heads, dim_k, None));
            let v = rows(kv_heads, dim_v, None);
            let mut out = vec![f32::NAN; n * heads * dim_v];
            cache.attend(layer, &q, &k, &v, &AttendOptions::default(), &mut out).unwrap();
            outputs.extend(out);
        }
        cache.end().unwrap();
    }
    outputs
}

#[test]
fn answers_do_not_depend_on_what_was_removed() {
    for spec in ["kivi:k=2.25", "ott:skip-layers=0", "qaq:attn-keys=1", "skvq:k=2"] {
        let mut cache = cache_of(&format!("{spec},page=64,window=32"), &CacheParams { n_cells: 600, ..params() });
        let first = answer(&mut cache, 1, 300);
        for (seed, n) in [(1, 300), (2, 350), (1, 300), (3, 64)] {
            cache.remove(Some(0), 0, -1).unwrap();
            let again = answer(&mut cache, seed, n);
            assert_eq!(seed == 1, again == first, "{spec}: request {seed}");
        }
        cache.clear().unwrap();
        assert!(answer(&mut cache, 1, 300) == first, "{spec}: a cleared cache");
    }
}

#[test]
fn neighbours_do_not_take_a_sequence_its_window() {
    for spec in ["skvq:k=2,v=2", "kivi:k=2.25", "qaq"] {
        let error = |n_neighbours| {
            let mut model = Model::new(spec, &CacheParams { n_cells: 2048, n_layers: 1, ..params() });
            model.bound = f64::INFINITY;
            model.append(0, 150);
            model.append(0, 150);
            (1..=n_neighbours).for_each(|seq| {
                model.append(seq, 200);
            });
            model.rng = Rng::new(11);
            (0..40).map(|_| model.append(0, 1)).sum::<f64>()
        };
        let (alone, beside) = (error(0), error(3));
        println!("{spec}: {alone:e} alone, {beside:e} beside");
        assert!(beside <= 1.15 * alone, "{spec}: {alone:e} alone, {beside:e} beside three others");
    }
}
