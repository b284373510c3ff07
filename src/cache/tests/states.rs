//! Saving and loading, above all of what nobody saved.

use std::fs;
use std::path::PathBuf;

use super::*;
use crate::head::HeadMut;
use crate::pool;

pub(super) fn small() -> CacheParams {
    let shape = Shape { n_heads: 2, n_kv_heads: 1, head_dim_k: 64, head_dim_v: 64 };
    let rope = Rope { n_rot: 64, freq_base: 1e4, freq_scale: 1.0, interleaved: false };
    CacheParams { shape, n_layers: 1, n_cells: 192, n_seq_max: 2, n_threads: 1, rope: Some(rope) }
}

const SMALL_SPEC: &str = "skvq:k=2,v=3,page=64,window=16,sinks=1";

/// One step with rows that depend on `seed` alone.
fn step(cache: &mut Cache, seed: u64, seq: u32, n: usize) -> Result<Vec<f32>> {
    let start = cache.sequence_range(seq)?.map_or(0, |(_, last)| last + 1);
    cache.begin(&vec![seq; n], &(start..start.saturating_add(n as i32)).collect::<Vec<_>>())?;
    let Shape { n_heads, n_kv_heads, head_dim_k, head_dim_v } = cache.params.shape;
    let mut rng = Rng::new(seed);
    let mut all = Vec::new();
    for layer in 0..cache.params.n_layers {
        let mut rows = |heads: u32, dim: u32| rng.values(n * (heads * dim) as usize);
        let (q, k, v) = (rows(n_heads, head_dim_k), rows(n_kv_heads, head_dim_k), rows(n_kv_heads, head_dim_v));
        let mut out = vec![0.0; n * (n_heads * head_dim_v) as usize];
        cache.attend(layer, &q, &k, &v, &AttendOptions::default(), &mut out)?;
        all.extend(out);
    }
    cache.end()?;
    Ok(all)
}

pub(super) fn filled(spec: &str, params: &CacheParams) -> Cache {
    let mut cache = cache_of(spec, params);
    step(&mut cache, 1, 0, 100).unwrap();
    step(&mut cache, 2, 1, 30).unwrap();
    cache.remove(Some(0), 10, 20).unwrap();
    cache.shift(0, 20, -1, -7).unwrap();
    step(&mut cache, 3, 0, 1).unwrap();
    cache
}

pub(super) fn saved(cache: &Cache) -> Vec<u8> {
    let mut bytes = vec![0; cache.state_bytes().unwrap()];
    assert_eq!(cache.save_memory(&mut bytes).unwrap(), bytes.len());
    bytes
}

/// Makes a changed state pass the checksum.
fn seal(bytes: &mut [u8]) {
    let (body, sum) = bytes.split_at_mut(bytes.len() - 4);
    sum.copy_from_slice(&crc32c::crc32c(body).to_le_bytes());
}

/// A file of this test's own.
struct TempFile(PathBuf);

impl TempFile {
    fn new(name: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("kvq-test-{}-{name}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        Self(folder.join("state.kvq"))
    }

    fn folder(&self) -> &std::path::Path {
        self.0.parent().unwrap()
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(self.folder());
    }
}

#[test]
fn a_loaded_cache_goes_on_bit_identically() {
    for (spec, params) in [(SPEC, params()), (SMALL_SPEC, small())] {
        let mut first = filled(spec, &params);
        let mut second = cache_of(spec, &params);
        step(&mut second, 9, 1, 50).unwrap();
        second.load_memory(&saved(&first)).unwrap();
        assert_eq!(second.n_tokens(), first.n_tokens());
        for (seed, seq, n) in [(4, 0, 1), (5, 1, 20), (6, 0, 30), (7, 1, 1)] {
            let (a, b) = (step(&mut first, seed, seq, n).unwrap(), step(&mut second, seed, seq, n).unwrap());
            assert!(a.iter().zip(&b).all(|(a, b)| a.to_bits() == b.to_bits()), "step {seed}");
            assert!(a.iter().all(|x| x.is_finite()));
        }
        assert_eq!(saved(&first), saved(&second));
    }
}

/// The memory of the cache as states have it, without what was learned, which is the stream's.
fn memory_of(cache: &Cache) -> Vec<Vec<u8>> {
    let (layout, mut memories) = (&cache.layers[0].layout, Vec::new());
    let mut keep = |memory: &[u8]| {
        memories.push(memory.to_vec());
        Ok(())
    };
    cache.for_each_live_memory(&mut keep).unwrap();
    HeadMut::new(layout, Side::Key, &mut memories[0]).learned_mut().fill(0);
    memories
}

/// Whatever tokens were, once they are removed nothing of them is in a state. (Pages that others share are left out
/// here: see [`crate::erase`].)
#[test]
fn removed_tokens_leave_no_trace() {
    for spec in [SMALL_SPEC, "qaq:page=64,window=16,sinks=1,attn-window=0"] {
        let [a, b] = [1, 2].map(|seed| {
            let mut cache = cache_of(spec, &small());
            step(&mut cache, seed, 1, 128).unwrap();
            step(&mut cache, 3, 0, 30).unwrap();
            step(&mut cache, seed, 1, 10).unwrap();
            let held = memory_of(&cache);
            cache.remove(Some(1), -1, -1).unwrap();
            (held, memory_of(&cache))
        });
        assert!(a.0 != b.0, "{spec}: they must matter while they are there");
        assert!(a.1 == b.1, "{spec}");
    }
}

#[test]
fn files_are_the_same_bytes_and_replace_the_old_one_whole() {
    let file = TempFile::new("file");
    let mut cache = filled(SMALL_SPEC, &small());
    fs::write(&file.0, b"old").unwrap();
    cache.save_file(&file.0).unwrap();
    assert_eq!(fs::read(&file.0).unwrap(), saved(&cache));
    let mut other = cache_of(SMALL_SPEC, &small());
    other.load_file(&file.0).unwrap();
    assert_eq!(saved(&other), saved(&cache));
    cache.begin(&[0], &[1000]).unwrap();
    assert_eq!(cache.save_file(&file.0).unwrap_err().status(), Status::InvalidArgument);
    assert_eq!(fs::read_dir(file.folder()).unwrap().count(), 1, "no temporary file is left");
    assert_eq!(fs::read(&file.0).unwrap(), saved(&other), "a failed save leaves the old file");
}

#[test]
fn unreadable_files_are_errors() {
    let file = TempFile::new("unreadable");
    let mut cache = filled(SMALL_SPEC, &small());
    let before = saved(&cache);
    assert_eq!(cache.load_file(&file.0).unwrap_err().status(), Status::Io);
    assert_eq!(cache.load_file(file.folder()).unwrap_err().status(), Status::Io);
    assert_eq!(cache.save_file(&file.folder().join("no/such/folder")).unwrap_err().status(), Status::Io);
    assert_eq!(cache.save_file(std::path::Path::new("/")).unwrap_err().status(), Status::Io);
    let huge = fs::File::create(&file.0).unwrap();
    huge.set_len(1 << 40).unwrap();
    assert_eq!(cache.load_file(&file.0).unwrap_err().status(), Status::Format);
    assert_eq!(saved(&cache), before);
}

#[test]
fn a_state_fits_only_a_cache_of_its_kind() {
    let bytes = saved(&filled(SMALL_SPEC, &small()));
    let rope = small().rope.unwrap();
    for (spec, params) in [
        ("skvq:k=2,v=3,page=64,window=16,sinks=2", small()),
        ("skvq:k=2,v=2,page=64,window=16,sinks=1", small()),
        (SMALL_SPEC, CacheParams { n_layers: 2, ..small() }),
        (SMALL_SPEC, CacheParams { n_cells: 256, ..small() }),
        (SMALL_SPEC, CacheParams { n_seq_max: 3, ..small() }),
        (SMALL_SPEC, CacheParams { shape: Shape { n_heads: 1, ..small().shape }, ..small() }),
        (SMALL_SPEC, CacheParams { rope: None, ..small() }),
        (SMALL_SPEC, CacheParams { rope: Some(Rope { freq_base: 5e5, ..rope }), ..small() }),
    ] {
        let mut cache = filled(spec, &params);
        let before = saved(&cache);
        let error = cache.load_memory(&bytes).unwrap_err();
        assert_eq!(error.status(), Status::Format);
        assert!(error.message().contains("another cache"), "{error}");
        assert_eq!(saved(&cache), before);
    }
    cache_of(SMALL_SPEC, &CacheParams { n_threads: 3, ..small() }).load_memory(&bytes).unwrap();
}

#[test]
fn cut_states_are_refused_at_every_length() {
    let bytes = saved(&filled(SMALL_SPEC, &small()));
    let mut cache = cache_of(SMALL_SPEC, &small());
    step(&mut cache, 8, 0, 20).unwrap();
    let before = saved(&cache);
    for len in 0..bytes.len() {
        let mut cut = bytes[..len].to_vec();
        assert_eq!(cache.load_memory(&cut).unwrap_err().status(), Status::Format, "{len} bytes");
        if len >= 28 {
            // The same, by someone who knows the format.
            cut[12..20].copy_from_slice(&(len as u64).to_le_bytes());
            seal(&mut cut);
            assert_eq!(cache.load_memory(&cut).unwrap_err().status(), Status::Format, "{len} bytes, sealed");
        }
    }
    let mut longer = bytes.clone();
    longer.push(0);
    assert_eq!(cache.load_memory(&longer).unwrap_err().status(), Status::Format);
    assert_eq!(saved(&cache), before);
}

#[test]
fn any_flipped_bit_is_noticed() {
    let bytes = saved(&filled(SMALL_SPEC, &small()));
    let mut cache = cache_of(SMALL_SPEC, &small());
    let before = saved(&cache);
    let mut rng = Rng::new(3);
    let bits = (0..8 * 600).chain((0..1500).map(|_| rng.below(8 * bytes.len())).collect::<Vec<_>>());
    let mut changed = bytes.clone();
    for bit in bits {
        changed[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(cache.load_memory(&changed).unwrap_err().status(), Status::Format, "bit {bit}");
        changed[bit / 8] ^= 1 << (bit % 8);
    }
    assert_eq!(saved(&cache), before);
    cache.load_memory(&changed).unwrap();
}

/// Mutations by someone who knows the format, checksum included: a load fails and changes nothing, or makes a cache that
/// can be used, whatever rows it gives.
#[test]
fn hostile_states_are_refused_or_harmless() {
    let bytes = saved(&filled(SMALL_SPEC, &small()));
    let header = bytes.len() - bytes.len() / 2;
    let mut cache = filled(SMALL_SPEC, &small());
    let mut rng = Rng::new(11);
    let (mut n_loaded, mut n_refused) = (0, 0);
    for case in 0..6000 {
        let mut changed = bytes.clone();
        for _ in 0..1 + rng.below(4) {
            mutate(&mut rng, &mut changed, if case % 2 == 0 { 700 } else { header });
        }
        if changed.len() >= 28 && case % 8 != 0 {
            let len = changed.len() as u64;
            changed[12..20].copy_from_slice(&len.to_le_bytes());
        }
        if changed.len() >= 8 {
            seal(&mut changed);
        }
        match cache.load_memory(&changed) {
            Err(error) => {
                n_refused += 1;
                assert_eq!(error.status(), Status::Format, "case {case}");
            }
            Ok(()) => {
                n_loaded += 1;
                use_whatever_it_holds(&mut cache, case);
                cache.load_memory(&bytes).unwrap();
            }
        }
    }
    assert_eq!(saved(&cache), bytes);
    assert!(n_loaded > 100 && n_refused > 100, "{n_loaded} loaded, {n_refused} refused");
}

/// Changes one thing; `front` is where the interesting bytes end.
fn mutate(rng: &mut Rng, bytes: &mut Vec<u8>, front: usize) {
    const VALUES: [u64; 8] = [0, 1, 0x7f, 0xff, 0x7fff_ffff, 0xffff_ffff, i64::MAX as u64, u64::MAX];
    let within = if rng.below(3) == 0 { bytes.len() } else { front.min(bytes.len()) };
    if within < 16 {
        return;
    }
    let at = rng.below(within - 8);
    match rng.below(6) {
        0 => bytes[at] ^= 1 << rng.below(8),
        1 => bytes[at] = rng.bits() as u8,
        2 => bytes[at..at + 4].copy_from_slice(&(VALUES[rng.below(8)] as u32).to_le_bytes()),
        3 => bytes[at..at + 8].copy_from_slice(&VALUES[rng.below(8)].to_le_bytes()),
        4 => {
            let n = rng.below(bytes.len() - at).min(1 + rng.below(64));
            let from = rng.below(bytes.len() - n);
            bytes.copy_within(from..from + n, at);
        }
        _ => {
            let n = rng.below(40);
            if rng.below(2) == 0 {
                bytes.drain(at..(at + n).min(bytes.len()));
            } else {
                bytes.splice(at..at, vec![0; n]);
            }
        }
    }
}

fn use_whatever_it_holds(cache: &mut Cache, case: u64) {
    for seq in 0..2 {
        match step(cache, case, seq, 1 + case as usize % 30) {
            Ok(_) => {}
            // The state may be full or a position the last possible one; anything else is a bug.
            Err(error) => assert!(matches!(error.status(), Status::Full | Status::InvalidArgument), "{case}: {error}"),
        }
    }
    if let Err(error) = cache.shift(0, 0, 50, 100_000) {
        assert_eq!(error.status(), Status::InvalidArgument, "{case}: {error}");
    }
    cache.keep(1).unwrap();
    saved(cache);
}

/// Attention relies on a pool that names each cell once.
#[test]
fn a_state_whose_pool_names_a_cell_twice_is_refused() {
    let (spec, params) =
        ("ott:page=64,window=16,sinks=1,outliers=3,pool=4", CacheParams { n_layers: 3, n_cells: 256, ..small() });
    for side in [Side::Key, Side::Value] {
        let mut cache = cache_of(spec, &params);
        step(&mut cache, 1, 0, 200).unwrap();
        let sound = saved(&cache);
        let Layer { layout, k, v } = &mut cache.layers[2];
        let memory = if side == Side::Key { k.bytes_mut() } else { v.bytes_mut() };
        let mut head = HeadMut::new(layout, side, memory);
        let members: Vec<_> = pool::cells(head.as_ref()).collect();
        let first = members.iter().flatten().next().copied();
        let free = members.iter().position(Option::is_none).expect("the pool has room");
        assert!(first.is_some());
        pool::set_cell(&mut head, free, first);
        let crafted = saved(&cache);
        assert_ne!(crafted, sound);

        let mut target = filled(spec, &params);
        let before = saved(&target);
        let error = target.load_memory(&crafted).unwrap_err();
        assert_eq!(error.status(), Status::Format);
        assert!(error.message().contains("names cell"), "{}", error.message());
        assert_eq!(saved(&target), before);
        target.load_memory(&sound).unwrap();
    }
}
