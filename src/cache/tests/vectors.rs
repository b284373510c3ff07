//! Saved states that lie in the repository: later versions read them as what they were, or refuse them by name.
//!
//! `KVQ_UPDATE_VECTORS=1 cargo test vectors` adds a state of this version where the last one is refused; the old ones
//! stay. A state that is read as something else means that a format version was not raised.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::states::{filled, saved, small};
use super::*;
use crate::location::Location;
use crate::store;

/// One recipe for each codec. QAQ's attention window is off: what attention gives differs between instruction sets.
const SPECS: [(&str, &str); 3] = [
    ("skvq", "skvq:k=2,v=3,page=64,window=16,sinks=1"),
    ("ott", "ott:k=2.5,v=2,page=64,window=16,sinks=1,outliers=3,pool=4,skip-layers=0"),
    ("qaq", "qaq:bits=2.5,page=64,window=16,sinks=1,attn-window=0"),
];

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("c_tests/vectors")
}

/// States of one recipe by number, oldest first: `cache-NAME-NUMBER.kvq`.
fn vectors(name: &str) -> BTreeMap<u32, PathBuf> {
    let number = |path: &Path| {
        let stem = path.file_name()?.to_str()?.strip_prefix(&format!("cache-{name}-"))?.strip_suffix(".kvq")?;
        stem.parse().ok()
    };
    let entries = fs::read_dir(folder()).map(|entries| entries.map(|entry| entry.unwrap().path()).collect());
    let paths: Vec<PathBuf> = entries.unwrap_or_default();
    paths.into_iter().filter_map(|path| Some((number(&path)?, path))).collect()
}

/// What the cache says it holds: positions, sequences, and every row that can be read.
fn contents(cache: &Cache) -> (Vec<(i32, u64)>, Vec<u32>) {
    let cells = cache.cells.pos().iter().copied().zip(cache.cells.seqs().iter().copied()).collect();
    let mut location = cache.planner.locate(STREAM).unwrap();
    (0..location.len())
        .filter(|&cell| !cache.cells.is_live(cell))
        .for_each(|cell| location[cell] = Location::default());
    let (mut rows, rotation) = (Vec::new(), cache.rotation.as_ref());
    for layer in &cache.layers {
        for (side, memory) in [(Side::Key, layer.k.bytes()), (Side::Value, layer.v.bytes())] {
            for region in memory.chunks_exact(layer.layout.head_bytes(side)) {
                let mut out = vec![0f32; location.len() * layer.layout.side(side).head_dim];
                store::dequantize_head(&layer.layout, side, region, &location, rotation, 0..location.len(), &mut out)
                    .unwrap();
                rows.extend(out.into_iter().map(f32::to_bits));
            }
        }
    }
    (cells, rows)
}

#[test]
fn committed_states_are_read_as_what_they_were_or_refused_by_name() {
    let update = std::env::var_os("KVQ_UPDATE_VECTORS").is_some();
    for (name, spec) in SPECS {
        let expected = filled(spec, &small());
        let load = |path: &PathBuf| {
            let mut cache = cache_of(spec, &small());
            cache.load_memory(&fs::read(path).unwrap()).map(|()| contents(&cache))
        };
        let mut known = vectors(name);
        if update && known.values().next_back().is_none_or(|path| load(path).is_err()) {
            let number = known.keys().next_back().map_or(1, |last| last + 1);
            let path = folder().join(format!("cache-{name}-{number}.kvq"));
            fs::create_dir_all(folder()).unwrap();
            fs::write(&path, saved(&expected)).unwrap();
            known.insert(number, path);
        }
        let last = known.values().next_back().cloned();
        assert!(
            last.as_ref().is_some_and(|path| load(path).is_ok()),
            "no state of {name} of this version is in {}: KVQ_UPDATE_VECTORS=1 cargo test vectors",
            folder().display()
        );
        let mut n_refused = 0;
        for path in known.values() {
            match load(path) {
                Ok(found) => assert!(found == contents(&expected), "{}: read as something else", path.display()),
                Err(error) => {
                    assert_eq!(error.status(), Status::Format);
                    let by_name = ["has version", "of another cache"].iter().any(|text| error.message().contains(text));
                    assert!(by_name, "{}: {error}", path.display());
                    n_refused += 1;
                }
            }
        }
        // Each was added when the one before it was refused.
        assert_eq!(n_refused, known.len() - 1, "{name}: states of older versions");
    }
}
