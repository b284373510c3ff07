//! The choice that `auto:mem=SIZE` asks for: the best recipe whose whole cache fits.
#![forbid(unsafe_code)]

use std::fmt;

use crate::error::{Error, Result, Status};
use crate::layout::Layout;
use crate::planner::n_slots;
use crate::recipe::auto::{is_auto, Auto, LADDER};
use crate::recipe::Recipe;
use crate::shape::Shape;

/// One attention layer of a context, and the cache that it is in.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct CachedLayer {
    /// Heads and head sizes.
    pub shape: Shape,
    /// Its number in the model, counted from 0.
    pub layer: u32,
    /// Cells of its cache, in each stream.
    pub n_cells: u32,
    /// Streams of its cache.
    pub n_streams: u32,
    /// Sequences of its cache.
    pub n_seq_max: u32,
}

/// What was chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The specification: a preset and, after a colon, what differs from it.
    pub spec: String,
    /// For people: what more memory would have given; empty if nobody asked for a choice.
    pub note: String,
}

/// The specification that `spec` comes to in a context of these layers: the best that fits if it [`is_auto`], and itself
/// otherwise.
///
/// # Errors
///
/// [`Status::Recipe`] if no recipe fits, or if `spec` asks for a choice and cannot be understood; what
/// [`Recipe::parse`] and [`Layout::new`] say of the best candidate if it is impossible.
pub fn choose(spec: &str, layers: &[CachedLayer]) -> Result<Choice> {
    if !is_auto(spec) {
        return Ok(Choice { spec: spec.to_owned(), note: String::new() });
    }
    let auto = Auto::parse(spec)?;
    let (mut better, mut smallest) = (None, (u64::MAX, ""));
    for (name, candidate) in LADDER.iter().zip(auto.candidates()) {
        let bytes = cache_bytes(&Recipe::parse(&candidate)?, layers)?;
        if bytes <= auto.bytes {
            return Ok(Choice { spec: candidate, note: note(better, layers, auto.bytes) });
        }
        better = Some((bytes, *name));
        smallest = smallest.min((bytes, name));
    }
    let (bytes, name) = smallest;
    let text = format!(
        "no recipe fits into {}: the smallest for this context, {name}, takes {}; use mem={}MiB, a smaller context (-c), fewer \
         sequences (-np) or a smaller window (window=32)",
        auto.size,
        Mib(bytes),
        bytes.div_ceil(1 << 20)
    );
    Err(Error::new(Status::Recipe, text))
}

/// Bytes of the memory of all layers, in all streams.
fn cache_bytes(recipe: &Recipe, layers: &[CachedLayer]) -> Result<u64> {
    layers.iter().try_fold(0u64, |sum, layer| {
        let [n_cells, n_streams, n_seq_max] =
            [layer.n_cells, layer.n_streams, layer.n_seq_max].map(|number| number as usize);
        if n_cells == 0 || n_streams == 0 || n_seq_max == 0 {
            return Err(Error::invalid("a cache has at least one cell, one stream and one sequence"));
        }
        let recipe = recipe.fit(n_cells, n_streams, n_seq_max);
        let n_slots = n_slots(&recipe.planner_config(n_cells, n_streams, n_seq_max));
        let layout = Layout::new(&recipe, layer.shape, layer.layer as usize, n_cells, n_slots)?;
        let bytes = (layout.k_bytes() as u64 + layout.v_bytes() as u64).saturating_mul(n_streams as u64);
        Ok(sum.saturating_add(bytes))
    })
}

/// What the next better candidate would take, or FP16 if that fits as well.
fn note(better: Option<(u64, &str)>, layers: &[CachedLayer], room: u64) -> String {
    if let Some((bytes, name)) = better {
        return format!("{name} would take {}", Mib(bytes));
    }
    let f16 = layers.iter().map(f16_bytes).fold(0u64, u64::saturating_add);
    if f16 > room {
        return format!("f16 would take {}", Mib(f16));
    }
    format!("f16 would fit as well, with {}", Mib(f16))
}

fn f16_bytes(layer: &CachedLayer) -> u64 {
    let Shape { n_kv_heads, head_dim_k, head_dim_v, .. } = layer.shape;
    let row = 2 * u64::from(n_kv_heads) * (u64::from(head_dim_k) + u64::from(head_dim_v));
    row.saturating_mul(u64::from(layer.n_cells)).saturating_mul(u64::from(layer.n_streams))
}

/// Bytes for people.
struct Mib(u64);

impl fmt::Display for Mib {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.2} MiB", self.0 as f64 / f64::from(1 << 20))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: Shape = Shape { n_heads: 8, n_kv_heads: 2, head_dim_k: 128, head_dim_v: 64 };

    /// Every other layer has a sliding window.
    fn layers(n_cells: u32, n_streams: u32, n_seq_max: u32) -> Vec<CachedLayer> {
        let one = |layer| CachedLayer {
            shape: SHAPE,
            layer,
            n_cells: if layer % 2 == 0 { n_cells } else { n_cells.min(1024) },
            n_streams,
            n_seq_max,
        };
        (0..6).map(one).collect()
    }

    fn sizes(layers: &[CachedLayer]) -> Vec<u64> {
        LADDER.iter().map(|name| cache_bytes(&Recipe::parse(name).unwrap(), layers).unwrap()).collect()
    }

    /// A size that a user can write: parts of a KiB do not matter, as layouts are multiples of 64 bytes.
    fn spec(bytes: u64) -> String {
        format!("auto:mem={}KiB", bytes as f64 / 1024.0)
    }

    #[test]
    fn the_best_that_fits_is_chosen_to_the_byte() {
        for (n_cells, n_streams, n_seq_max) in [(32768, 1, 1), (8192, 3, 3), (16384, 1, 4)] {
            let layers = layers(n_cells, n_streams, n_seq_max);
            let sizes = sizes(&layers);
            for (rung, &size) in sizes.iter().enumerate() {
                assert_eq!(choose(&spec(size), &layers).unwrap().spec, LADDER[rung]);
                let below = choose(&spec(size - 64), &layers).map(|choice| choice.spec);
                match sizes[rung + 1..].iter().position(|&other| other < size) {
                    Some(next) => assert_eq!(below.unwrap(), LADDER[rung + 1 + next]),
                    None => assert!(below.is_err()),
                }
            }
        }
    }

    #[test]
    fn bytes_count_streams_and_every_layer() {
        let recipe = Recipe::parse("on").unwrap();
        let one = cache_bytes(&recipe, &layers(4096, 1, 1)).unwrap();
        assert_eq!(cache_bytes(&recipe, &layers(4096, 3, 3)).unwrap(), 3 * one);
        let twice: Vec<CachedLayer> = [layers(4096, 1, 1), layers(4096, 1, 1)].concat();
        assert_eq!(cache_bytes(&recipe, &twice).unwrap(), 2 * one);
        // Sequences that share a stream have windows of their own.
        assert!(cache_bytes(&recipe, &layers(4096, 1, 4)).unwrap() > one);
    }

    #[test]
    fn what_more_memory_would_give_is_told() {
        let layers = layers(32768, 1, 1);
        let sizes = sizes(&layers);
        let said = |bytes| choose(&spec(bytes), &layers).unwrap().note;
        let f16 = layers.iter().map(f16_bytes).sum::<u64>();
        assert_eq!(f16, 6 * 2 * 192 * 2 * (32768 + 1024) / 2);
        assert_eq!(said(f16), format!("f16 would fit as well, with {}", Mib(f16)));
        assert_eq!(said(f16 - 64), format!("f16 would take {}", Mib(f16)));
        assert_eq!(said(sizes[1]), format!("4 would take {}", Mib(sizes[0])));
    }

    #[test]
    fn where_none_fits_the_smallest_is_named_and_its_size_is_enough() {
        // The exact rows of `2` outweigh what its pages save in a small cache.
        for n_cells in [1024, 32768] {
            let layers = layers(n_cells, 1, 1);
            let least = *sizes(&layers).iter().min().unwrap();
            let error = choose("auto:mem=1KiB", &layers).unwrap_err();
            assert_eq!(error.status(), Status::Recipe);
            let text = error.message();
            assert!(text.contains("no recipe fits into 1KiB"), "{text}");
            assert!(text.contains(&format!("takes {}; use mem=", Mib(least))), "{text}");
            assert!(text.contains("(-c)") && text.contains("(window=32)"), "{text}");
            let size = text.split("use mem=").nth(1).unwrap().split(',').next().unwrap();
            choose(&format!("auto:mem={size}"), &layers).unwrap();
        }
    }

    #[test]
    fn a_smaller_window_makes_room() {
        let layers = layers(2048, 1, 4);
        let least = *sizes(&layers).iter().min().unwrap();
        assert!(choose(&spec(least - 64), &layers).is_err());
        let choice = choose(&format!("{},window=32", spec(least - 64)), &layers).unwrap();
        assert!(choice.spec.ends_with(":window=32"), "{choice:?}");
    }

    #[test]
    fn what_asks_for_no_choice_stays_as_it_is() {
        for spec in ["on", "2:window=64", "skvq:k=2", "off", "", "nosuch"] {
            assert_eq!(
                choose(spec, &layers(512, 1, 1)).unwrap(),
                Choice { spec: spec.to_owned(), note: String::new() }
            );
        }
        // Before a host knows its layers it may ask what the best would be.
        assert_eq!(choose("auto:mem=1KiB", &[]).unwrap().spec, LADDER[0]);
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        for (spec, want) in [
            ("auto", "such as auto:mem=4GiB"),
            ("auto:mem=0GiB", "mem=0GiB: use a size"),
            ("auto:mem=4GiB,colour=3", "no key 'colour'"),
            ("auto:mem=4GiB,window=99999", "window=99999"),
            ("auto:mem=4GiB,profile=x", "no key 'profile'"),
        ] {
            let error = choose(spec, &layers(512, 1, 1)).unwrap_err();
            assert!(error.message().contains(want), "{spec}: {error}");
        }
        let odd = CachedLayer { shape: Shape { head_dim_k: 40, ..SHAPE }, ..layers(512, 1, 1)[0] };
        assert_eq!(choose("auto:mem=4GiB", &[odd]).unwrap_err().status(), Status::Shape);
        let none = CachedLayer { n_streams: 0, ..layers(512, 1, 1)[0] };
        assert_eq!(choose("auto:mem=4GiB", &[none]).unwrap_err().status(), Status::InvalidArgument);
    }

    #[test]
    fn absurd_caches_do_not_wrap() {
        let huge =
            CachedLayer { n_cells: i32::MAX as u32, n_streams: u32::MAX, n_seq_max: u32::MAX, ..layers(1, 1, 1)[0] };
        let error = choose("auto:mem=1TiB", &[huge; 64]).unwrap_err();
        assert_eq!(error.status(), Status::Recipe, "{error}");
    }
}
