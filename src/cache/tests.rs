use std::ops::Range;

use super::*;
use crate::reference;
use crate::tests::random::Rng;

mod learned;
mod sequences;
mod shifts;
mod states;
mod vectors;
mod walk;

/// Bound on the normalised mean squared error of outputs with 8-bit codes: `(1 / 32)^2 / 3`, since a row's step, of 4 mantissa
/// bits, is off by up to a 32nd.
const NMSE_8_BITS: f64 = 3.3e-4;
/// Eight bits, small pages and a small window, so that little data reaches every path.
const SPEC: &str = "skvq:k=8,v=8,page=64,window=32,sinks=2";
const SHAPE: Shape = Shape { n_heads: 4, n_kv_heads: 2, head_dim_k: 64, head_dim_v: 96 };

fn params() -> CacheParams {
    CacheParams { shape: SHAPE, n_layers: 2, n_cells: 320, n_seq_max: 4, n_threads: 1, rope: None }
}

fn cache_of(spec: &str, params: &CacheParams) -> Cache {
    Cache::new(&crate::tests::profile::parse(spec, params.shape), params).unwrap()
}

/// A token as the cache should know it, in full precision.
#[derive(Clone)]
struct Token {
    seq: u32,
    pos: i32,
    /// Per layer `[n_kv_heads][head_dim_k]`, not rotated.
    k: Vec<Vec<f32>>,
    v: Vec<Vec<f32>>,
}

/// A cache and what it should hold. A token that sequences share is listed once for each.
struct Model {
    cache: Cache,
    tokens: Vec<Token>,
    rng: Rng,
    n_swa: Vec<u32>,
    softcap: f32,
    max_bias: f32,
    sink_logits: Option<Vec<f32>>,
    /// Factor on the scores; 0: the usual one.
    scale: f32,
    bound: f64,
    /// Error of each layer of each step, unless `unchecked`.
    errors: Vec<f64>,
    unchecked: bool,
}

impl Model {
    fn new(spec: &str, params: &CacheParams) -> Self {
        let n_swa = vec![0; params.n_layers];
        let cache = cache_of(spec, params);
        let (softcap, max_bias, sink_logits, bound) = (0.0, 0.0, None, NMSE_8_BITS);
        let (tokens, rng, errors) = (Vec::new(), Rng::new(7), Vec::new());
        let (scale, unchecked) = (0.0, false);
        Self { cache, tokens, rng, n_swa, softcap, max_bias, sink_logits, scale, bound, errors, unchecked }
    }

    /// Appends `n` tokens to one sequence.
    fn append(&mut self, seq: u32, n: usize) -> f64 {
        let next = self.cache.sequence_range(seq).unwrap().map_or(0, |(_, last)| last + 1);
        self.step(&vec![seq; n], &(next..next + n as i32).collect::<Vec<_>>())
    }

    /// One step with random rows; every output row is compared with the reference. Returns the error of all layers.
    fn step(&mut self, seq_ids: &[u32], positions: &[i32]) -> f64 {
        let CacheParams { shape, n_layers, rope, .. } = self.cache.params;
        let (heads, kv_heads) = (shape.n_heads as usize, shape.n_kv_heads as usize);
        let (dim_k, dim_v) = (shape.head_dim_k as usize, shape.head_dim_v as usize);
        for (&seq, &pos) in seq_ids.iter().zip(positions) {
            let mut rows = |dim| (0..n_layers).map(|_| self.rng.values(kv_heads * dim)).collect();
            let (k, v) = (rows(dim_k), rows(dim_v));
            self.tokens.push(Token { seq, pos, k, v });
        }
        self.cache.begin(seq_ids, positions).unwrap();
        let new = self.tokens.len() - seq_ids.len()..self.tokens.len();
        let mut total = 0.0;
        for layer in 0..n_layers {
            let q = self.rng.values(seq_ids.len() * heads * dim_k);
            let k: Vec<f32> = self.tokens[new.clone()].iter().flat_map(|token| rotated(token, layer, rope)).collect();
            let v: Vec<f32> = self.tokens[new.clone()].iter().flat_map(|token| token.v[layer].clone()).collect();
            let mut out = vec![f32::NAN; seq_ids.len() * heads * dim_v];
            let options = AttendOptions {
                scale: self.scale,
                softcap: self.softcap,
                max_bias: self.max_bias,
                n_swa: self.n_swa[layer],
                sink_logits: self.sink_logits.as_deref(),
            };
            self.cache.attend(layer, &q, &k, &v, &options, &mut out).unwrap();
            if self.unchecked {
                continue;
            }
            let want = self.reference(layer, new.clone(), &q, &options);
            let error = reference::nmse(&out, &want);
            self.errors.push(error);
            assert!(error <= self.bound, "layer {layer}, {} tokens held: nmse {error:e}", self.tokens.len());
            total += error;
        }
        self.cache.end().unwrap();
        total
    }

    fn reference(&self, layer: usize, new: Range<usize>, q: &[f32], options: &AttendOptions) -> Vec<f64> {
        let CacheParams { shape, rope, .. } = self.cache.params;
        let (heads, dim_k, dim_v) = (shape.n_heads as usize, shape.head_dim_k as usize, shape.head_dim_v as usize);
        let keys: Vec<Vec<f32>> = self.tokens.iter().map(|token| rotated(token, layer, rope)).collect();
        let mut out = Vec::new();
        for (index, own) in self.tokens[new].iter().enumerate() {
            for head in 0..heads {
                let kv_head = head / shape.gqa_ratio();
                let slope = if options.max_bias > 0.0 {
                    2f64.powf(-f64::from(options.max_bias) * (head + 1) as f64 / heads as f64)
                } else {
                    0.0
                };
                let bias = |token: &Token| {
                    let distance = own.pos - token.pos;
                    let far = options.n_swa > 0 && distance >= options.n_swa as i32;
                    if token.seq != own.seq || distance < 0 || far {
                        f64::NEG_INFINITY
                    } else {
                        -slope * f64::from(distance)
                    }
                };
                let query = reference::Query {
                    q: &q[(index * heads + head) * dim_k..][..dim_k],
                    scale: if options.scale > 0.0 { f64::from(options.scale) } else { 1.0 / (dim_k as f64).sqrt() },
                    softcap: f64::from(options.softcap),
                    bias: &self.tokens.iter().map(bias).collect::<Vec<_>>(),
                    sink_logit: options.sink_logits.map(|sinks| f64::from(sinks[head])),
                };
                let k: Vec<f32> = keys.iter().flat_map(|k| k[kv_head * dim_k..][..dim_k].to_vec()).collect();
                let v = self.tokens.iter().flat_map(|token| token.v[layer][kv_head * dim_v..][..dim_v].to_vec());
                out.extend(reference::attention(&query, &k, &v.collect::<Vec<_>>(), dim_v).0);
            }
        }
        out
    }
}

/// The keys of a token with the rotation of its position.
fn rotated(token: &Token, layer: usize, rope: Option<Rope>) -> Vec<f32> {
    let mut k = token.k[layer].clone();
    let Some(rope) = rope else { return k };
    let n_pairs = rope.n_rot / 2;
    for row in k.chunks_exact_mut(token.k[layer].len() / SHAPE.n_kv_heads as usize) {
        for pair in 0..n_pairs {
            let frequency = f64::from(rope.freq_base).powf(-2.0 * pair as f64 / rope.n_rot as f64);
            let angle = f64::from(token.pos) * f64::from(rope.freq_scale) * frequency;
            let (cos, sin) = (angle.cos() as f32, angle.sin() as f32);
            let (i, j) = if rope.interleaved { (2 * pair, 2 * pair + 1) } else { (pair, pair + n_pairs) };
            (row[i], row[j]) = (row[i] * cos - row[j] * sin, row[i] * sin + row[j] * cos);
        }
    }
    k
}

#[test]
fn appending_across_pages_matches_exact_attention() {
    let mut model = Model::new(SPEC, &params());
    for n in [1, 31, 1, 30, 1, 1, 1, 64, 65, 1, 100, 1, 23] {
        model.append(0, n);
    }
    assert_eq!(model.cache.n_tokens(), 320);
}

#[test]
fn options_reach_the_attention() {
    let mut model = Model::new(SPEC, &params());
    (model.n_swa, model.softcap) = (vec![20, 100], 4.0);
    model.sink_logits = Some(vec![0.5, -1.0, 3.0, 0.0]);
    for n in [50, 1, 90, 1] {
        model.append(0, n);
    }
    let mut model = Model::new(SPEC, &params());
    model.max_bias = 8.0;
    for n in [50, 1, 90, 1] {
        model.append(0, n);
    }
}

#[test]
fn threads_do_not_change_what_is_computed() {
    for n_threads in [0, 2, 5] {
        let mut model = Model::new(SPEC, &CacheParams { n_threads, ..params() });
        for n in [150, 1, 120, 1, 1] {
            model.append(0, n);
        }
    }
}

#[test]
fn the_default_recipe_works_on_a_large_batch() {
    let mut model = Model::new("skvq", &CacheParams { n_cells: 1024, n_layers: 1, ..params() });
    // Three bits of rows that are noise.
    model.bound = 0.2;
    for n in [600, 1, 1, 200, 1] {
        model.append(1, n);
    }
}

#[test]
fn steps_out_of_order_are_refused() {
    let mut cache = cache_of(SPEC, &params());
    let (q, k, v) = (vec![0.0; 256], vec![0.0; 128], vec![0.0; 192]);
    let mut out = vec![0.0; 384];
    let options = AttendOptions::default();
    let text = |result: Result<()>| result.unwrap_err().message().to_owned();
    assert!(text(cache.attend(0, &q, &k, &v, &options, &mut out)).contains("no batch is open"));
    assert!(text(cache.end()).contains("no batch is open"));
    cache.begin(&[0], &[0]).unwrap();
    assert!(text(cache.begin(&[0], &[1])).contains("a batch is open"));
    assert!(text(cache.remove(None, -1, -1)).contains("a batch is open"));
    assert!(text(cache.end()).contains("layer 0 has not"));
    assert!(text(cache.attend(0, &q[1..], &k, &v, &options, &mut out)).contains("q has 255 values"));
    cache.attend(0, &q, &k, &v, &options, &mut out).unwrap();
    assert!(text(cache.attend(0, &q, &k, &v, &options, &mut out)).contains("already been attended"));
    assert!(text(cache.attend(2, &q, &k, &v, &options, &mut out)).contains("does not exist"));
    assert!(text(cache.end()).contains("layer 1 has not"));
    cache.attend(1, &q, &k, &v, &options, &mut out).unwrap();
    cache.end().unwrap();
    cache.begin(&[0], &[1]).unwrap();
    cache.clear().unwrap();
    assert_eq!(cache.n_tokens(), 0);
    cache.begin(&[0], &[0]).unwrap();
}

#[test]
fn a_batch_that_does_not_fit_changes_nothing() {
    let mut model = Model::new(SPEC, &params());
    model.append(0, 300);
    let cache = &mut model.cache;
    for (seqs, positions, status) in [
        (vec![0; 21], (300..321).collect::<Vec<_>>(), Status::Full),
        (vec![4], vec![0], Status::InvalidArgument),
        (vec![0], vec![299], Status::InvalidArgument),
        (vec![1, 1], vec![0, 0], Status::InvalidArgument),
        (vec![1], vec![-1], Status::InvalidArgument),
        (vec![1], vec![i32::MAX], Status::InvalidArgument),
        (vec![], vec![], Status::InvalidArgument),
    ] {
        assert_eq!(cache.begin(&seqs, &positions).unwrap_err().status(), status, "{seqs:?} {positions:?}");
    }
    assert_eq!(cache.n_tokens(), 300);
    model.append(0, 20);
}

#[test]
fn impossible_caches_are_refused() {
    let recipe = Recipe::parse(SPEC).unwrap();
    let rope = Rope { n_rot: 64, freq_base: 1e4, freq_scale: 1.0, interleaved: false };
    for bad in [
        CacheParams { n_layers: 0, ..params() },
        CacheParams { n_cells: 0, ..params() },
        CacheParams { n_cells: usize::MAX, ..params() },
        CacheParams { n_seq_max: 0, ..params() },
        CacheParams { n_seq_max: 65, ..params() },
        CacheParams { n_cells: 1 << 29, n_layers: 1 << 16, ..params() },
        CacheParams { shape: Shape { head_dim_k: 65, ..SHAPE }, ..params() },
        CacheParams { rope: Some(Rope { n_rot: 66, ..rope }), ..params() },
        CacheParams { rope: Some(Rope { n_rot: 3, ..rope }), ..params() },
        CacheParams { rope: Some(Rope { freq_base: f32::NAN, ..rope }), ..params() },
    ] {
        assert!(Cache::new(&recipe, &bad).is_err(), "{bad:?}");
    }
}
