//! Shifts lose nothing: after many of them keys are as good as after none.

use super::*;
use crate::store::dequantize_head;

/// Every method and every published setting, with pages and windows that a short test reaches the end of.
const RECIPES: [&str; 12] = [
    "skvq:k=8,v=8,page=64,window=16,sinks=2",
    "skvq:page=64,window=16",
    "skvq:k=2,v=2,page=64,window=16,sinks=0",
    "skvq:k=1.6,v=1.6,page=64,window=16",
    "skvq:paper,page=64,window=16",
    "kivi:k=2.5,page=64,window=16",
    "kivi:paper,page=64,window=16",
    "ott:k=2.5,skip-layers=0,page=64,window=16",
    "ott:paper,skip-layers=0,page=64,window=16",
    "qaq:page=64,window=16",
    "qaq:paper,page=64,window=16",
    "aqua:k=2.5,page=64,window=16",
];
const ROPE: Rope = Rope { n_rot: 64, freq_base: 1e4, freq_scale: 1.0, interleaved: false };

fn model_of(spec: &str) -> Model {
    let shape = Shape { head_dim_v: 64, ..SHAPE };
    let mut model = Model::new(spec, &CacheParams { shape, n_layers: 1, n_cells: 704, rope: Some(ROPE), ..params() });
    // Keys decide: with less weight on the scores outputs would mostly show the values' error.
    (model.scale, model.bound) = (1.0 / 3.0, f64::INFINITY);
    model
}

impl Model {
    /// Appends `n` tokens, as many at once as the last argument says, without comparing.
    fn fill(&mut self, n: usize, at_once: usize) {
        self.unchecked = true;
        (0..n / at_once).for_each(|_| {
            self.append(0, at_once);
        });
        self.unchecked = false;
    }

    /// Moves the positions from `start` on of the first sequence.
    fn shift_from(&mut self, start: i32, delta: i32) {
        self.cache.shift(0, start, -1, delta).unwrap();
        let moved = self.tokens.iter_mut().filter(|token| token.seq == 0 && token.pos >= start);
        moved.for_each(|token| token.pos += delta);
    }

    /// Drops the eight tokens behind the first four, moves the others up and appends as many.
    fn roll(&mut self) {
        self.cache.remove(Some(0), 4, 12).unwrap();
        self.tokens.retain(|token| !(4..12).contains(&token.pos));
        self.shift_from(12, -8);
        self.fill(8, 8);
    }

    /// Normalised error of the keys that are read from pages, and of the outputs of some further steps.
    fn key_and_output_error(&mut self) -> [f64; 2] {
        self.errors.clear();
        (0..6).for_each(|_| {
            self.append(0, 4);
        });
        let output = self.errors.iter().sum::<f64>() / self.errors.len() as f64;
        let location = self.cache.planner.locate(STREAM).unwrap();
        let (layer, rotation) = (&self.cache.layers[0], self.cache.rotation.as_ref());
        let (layout, dim) = (&layer.layout, SHAPE.head_dim_k as usize);
        let (mut error, mut power) = (0.0, 0.0);
        for (head, region) in layer.k.bytes().chunks_exact(layout.head_bytes(Side::Key)).enumerate() {
            for (cell, &pos) in
                self.cache.cells.pos().iter().enumerate().filter(|(cell, _)| self.cache.cells.is_live(*cell))
            {
                if location[cell].slot().is_some() {
                    continue;
                }
                let mut key = vec![0.0; dim];
                dequantize_head(layout, Side::Key, region, &location, rotation, cell..cell + 1, &mut key).unwrap();
                let token = self.tokens.iter().find(|token| token.pos == pos).unwrap();
                let want = &rotated(token, 0, Some(ROPE))[head * dim..][..dim];
                error += key.iter().zip(want).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
                power += want.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
            }
        }
        [error / power, output]
    }
}

/// Fails if either error is more than `factor` times the other's.
fn compare(spec: &str, what: &str, after: [f64; 2], before: [f64; 2], factor: f64) {
    for (name, after, before) in [("keys", after[0], before[0]), ("outputs", after[1], before[1])] {
        assert!(
            after <= factor * before,
            "{spec}, {what}: the {name}' error is {after:.3e}, without shifts {before:.3e}"
        );
    }
}

#[test]
fn sixty_four_shifts_lose_nothing() {
    for spec in RECIPES {
        let mut unmoved = model_of(spec);
        unmoved.fill(640, 8);
        let without = unmoved.key_and_output_error();
        let mut rolled = model_of(spec);
        rolled.fill(640, 8);
        (0..64).for_each(|_| rolled.roll());
        compare(spec, "rolling by 8", rolled.key_and_output_error(), without, 1.5);
        let mut moved = model_of(spec);
        moved.fill(640, 8);
        for i in 0..64 {
            moved.shift_from(0, if i % 2 == 0 { 1 } else { -1 });
        }
        compare(spec, "all by +1 and -1", moved.key_and_output_error(), without, 1.5);
    }
}

/// More distances than a plan can say: then a page is encoded again, but its keys grow no longer.
#[test]
fn pages_split_many_times_are_encoded_again_without_growing() {
    for spec in RECIPES {
        let mut unmoved = model_of(spec);
        unmoved.fill(400, 8);
        let without = unmoved.key_and_output_error();
        let mut split = model_of(spec);
        split.fill(400, 8);
        for start in (70..310).step_by(5) {
            split.shift_from(start + (start - 70) / 5 * 3, 3);
        }
        let turned = split.cache.planner.locate(STREAM).unwrap();
        assert!(turned.iter().any(|location| location.turned != 0));
        // Each page is encoded up to three times.
        compare(spec, "split", split.key_and_output_error(), without, 5.0);
    }
}

#[test]
fn sequences_in_the_same_pages_move_on_their_own() {
    let mut model = Model::new(SPEC, &CacheParams { rope: Some(ROPE), ..params() });
    let mut next = [0; 3];
    for _ in 0..40 {
        let positions = [next[0], next[1], next[2], next[2] + 1];
        model.step(&[0, 1, 2, 2], &positions);
        next = [next[0] + 1, next[1] + 1, next[2] + 2];
    }
    for (seq, start, delta) in [(0, 0, 5), (2, 10, 100), (1, 0, 3), (2, 30, 7), (0, 20, 1), (1, 10, 40), (2, 0, 60)] {
        model.cache.shift(seq, start, -1, delta).unwrap();
        let moved = model.tokens.iter_mut().filter(|token| token.seq == seq && token.pos >= start);
        moved.for_each(|token| token.pos += delta);
        (0..3).for_each(|seq| {
            model.append(seq, 2);
        });
    }
}
