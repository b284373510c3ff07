//! Golden vectors: what every codec makes of the same rows, in `c_tests/vectors/`, a file per codec. A change of what rows
//! seal to, or of what bytes mean, cannot pass without a new `FORMAT_VERSION`.
//!
//! `KVQ_UPDATE_VECTORS=1 cargo test vectors` writes the files.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::profile;
use crate::codec::page::{PageCodec, PageRef, RowPlaces, SealRows, Side};
use crate::codec::{CodecInfo, REGISTRY};
use crate::recipe::Recipe;
use crate::shape::Shape;
use crate::simd::isa::{Isa, IsaToken};

/// One page: a recipe, a side of it, and a head size.
struct Case {
    spec: String,
    side: Side,
    dim: usize,
    /// Only so many of the rows are there at first, and the others join them: their number. 0: every eleventh row joins.
    n_first: usize,
    /// The page's bytes are in the file, not only their checksum.
    whole: bool,
}

const SIDES: [Side; 2] = [Side::Key, Side::Value];

/// Every width and form of a codec. A codec that is new to the registry needs an arm.
fn cases(codec: &str) -> Vec<Case> {
    let mut cases: Vec<Case> = Vec::new();
    let mut add = |spec: String, sides: &[Side], dim: usize| {
        let whole = cases.is_empty();
        cases.extend(sides.iter().map(|&side| Case { spec: spec.clone(), side, dim, n_first: 0, whole }));
    };
    match codec {
        "group" => {
            add("skvq:k=2,v=2,page=64".into(), &SIDES, 64);
            for width in ["1.6", "2", "3", "4", "8"] {
                for (form, dim) in
                    [("", 128), (",group=64", 128), (",symmetric=0,mean=0,rotate=0", 96), (",refit=0,smooth=0", 96)]
                {
                    add(format!("skvq:k={width},v={width}{form}"), &SIDES, dim);
                }
            }
            add("skvq:paper".into(), &SIDES, 128);
            add("skvq:k=3,v=3,page=256".into(), &SIDES, 160);
        }
        "channel" => {
            add("kivi:k=2.5,page=64".into(), &SIDES[..1], 64);
            for k in ["1", "1.5", "2", "2.25", "3", "3.5", "4"] {
                for form in ["", ",meta=fp16"] {
                    add(format!("kivi:k={k}{form}"), &SIDES[..1], 128);
                }
            }
            for k in [2, 3, 4] {
                add(format!("kivi:k={k},adaptive=0"), &SIDES[..1], 96);
            }
            add("kivi:paper".into(), &SIDES[..1], 128);
            add("kivi:k=3,page=256".into(), &SIDES[..1], 160);
        }
        "adaptive" => {
            add("qaq:bits=2.5,page=64".into(), &SIDES, 64);
            for bits in ["1", "1.5", "2.25", "3", "4"] {
                for form in ["", ",levels=normal", ",symmetric=0,mean=0,rotate=0", ",outliers=2,attn-keys=1,smooth=0"] {
                    add(format!("qaq:bits={bits},min-bits=1{form}"), &SIDES, 96);
                }
            }
            add("qaq:paper".into(), &SIDES, 128);
            add("qaq:adaptive=0,page=256".into(), &SIDES, 160);
        }
        "aqua" => {
            add("aqua:k=2.5,page=64".into(), &SIDES[..1], 64);
            for form in ["", ",klt=0", ",bias=0", ",predict=0"] {
                add(format!("aqua:k=2.25{form}"), &SIDES[..1], 128);
            }
            add("aqua:k=1.5,page=256".into(), &SIDES[..1], 160);
        }
        other => panic!("codec {other} has no golden vectors: give it an arm here"),
    }
    let of_few = cases
        .iter()
        .filter(|case| case.whole)
        .flat_map(|case| [1, 7].map(|n_first| Case { spec: case.spec.clone(), n_first, whole: false, ..*case }));
    let of_few: Vec<Case> = of_few.collect();
    cases.extend(of_few);
    cases
}

/// The rows of every case, `[page][dim]`: exact in any arithmetic. Roughly normal, some channels large and off zero as
/// those of keys are, one row of zeros, a tiny one, a small one and one of FP16's largest values.
fn golden_rows(page: usize, dim: usize) -> Vec<f32> {
    let mut state = 0x6b76_7131u64;
    let mut below_256 = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as i32
    };
    let mut rows = Vec::with_capacity(page * dim);
    for row in 0..page {
        for channel in 0..dim {
            let x = ((0..4).map(|_| below_256()).sum::<i32>() - 510) as f32 / 256.0;
            rows.push(match row {
                3 => 0.0,
                7 => x / 65536.0,
                9 => x / 16.0,
                11 if channel == 5 => 65504.0,
                _ if channel % 37 == 5 => 4.0 * x + 6.0,
                _ => x,
            });
        }
    }
    rows
}

/// A page that is sealed with most of its rows, and a second time with the others, which join it.
struct Sealed {
    header: Vec<u8>,
    bytes: Vec<u8>,
}

fn seal(codec: &dyn PageCodec, page: usize, case: &Case) -> Sealed {
    let (dim, n_first) = (case.dim, case.n_first);
    let is_late = |row: usize| if n_first > 0 { row >= n_first } else { row % 11 == 10 };
    let rows = golden_rows(page, dim);
    let channel_weights: Vec<f32> = (0..dim).map(|channel| (1 + channel * 7 % 16) as f32 / 16.0).collect();
    let mut last_exponents = vec![0; dim];
    let mut sealed = Sealed { header: vec![0; crate::codec::page::HEADER_BYTES], bytes: vec![0; codec.page_bytes()] };
    for late in [false, true] {
        let at: Vec<u32> = (0..page as u32).filter(|row| is_late(*row as usize) == late).collect();
        let mut chosen: Vec<f32> =
            at.iter().flat_map(|&row| rows[row as usize * dim..][..dim].iter().copied()).collect();
        // An outlier token is kept elsewhere and has no part in the page's range.
        let exact: Vec<bool> = at.iter().map(|row| *row == 9).collect();
        let attention: Vec<f32> = at.iter().map(|row| (1 + row * 5 % 32) as f32 / 32.0).collect();
        // All but every fifth row where the page says.
        let positions: Vec<i32> = at.iter().map(|row| 1000 + *row as i32 + i32::from(row % 5 == 4)).collect();
        let mut rows = SealRows {
            place: codec.wants_places().then_some(RowPlaces { head: 1, positions: &positions }),
            at: &at,
            rows: &mut chosen,
            fresh: !late,
            exact: if late { &[] } else { &exact },
            channel_weights: &channel_weights,
            last_exponents: &mut last_exponents,
            attention: &attention,
        };
        codec.seal(&mut sealed.header, &mut sealed.bytes, &mut rows);
    }
    sealed
}

fn codec_of(case: &Case, token: IsaToken) -> (Arc<dyn PageCodec>, usize) {
    let dim = case.dim as u32;
    let shape = Shape { n_heads: 2, n_kv_heads: 2, head_dim_k: dim, head_dim_v: dim };
    let recipe = Recipe::parse(&case.spec).unwrap();
    let recipe = recipe.with_profile(&profile::exact(shape)).unwrap_or(recipe);
    let side = if case.side == Side::Key { &recipe.key } else { &recipe.value };
    (side.build_layer(case.side, 0, shape, recipe.page, token).unwrap(), recipe.page)
}

/// A line of a file: which page, and what became of it.
fn line(info: &CodecInfo, case: &Case) -> (String, String) {
    let scalar = IsaToken::new(Isa::Scalar).unwrap();
    let (codec, page) = codec_of(case, scalar);
    let first = if case.n_first > 0 { format!(" {} first", case.n_first) } else { String::new() };
    let name = format!("{} {:?} {}{first}", case.spec, case.side, case.dim);
    assert!(codec.format().starts_with(&format!("{}/", info.name)), "{name} has format {}", codec.format());
    let sealed = seal(&*codec, page, case);
    for token in Isa::ALL.into_iter().filter_map(IsaToken::new) {
        let other = seal(&*codec_of(case, token).0, page, case);
        let is_same = other.header == sealed.header && other.bytes == sealed.bytes;
        assert!(is_same, "{name}: {} seals to other bytes than scalar", token.isa().name());
    }
    let mut decoded = vec![0f32; page * case.dim];
    for (row, out) in decoded.chunks_exact_mut(case.dim).enumerate() {
        codec.decode(PageRef { header: &sealed.header, bytes: &sealed.bytes }, row, out);
    }
    let decoded: Vec<u8> = decoded.iter().flat_map(|x| x.to_le_bytes()).collect();
    let mut text =
        format!("header {} bytes {:016x} rows {:016x}", hex(&sealed.header), sum(&sealed.bytes), sum(&decoded));
    if case.whole {
        write!(text, " page {}", hex(&sealed.bytes)).unwrap();
    }
    (name, text)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

/// FNV-1a of 64 bits.
fn sum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

fn path(codec: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("c_tests/vectors/{codec}.txt"))
}

/// Reads the file of a codec.
fn read(codec: &str) -> Option<Stored> {
    let text = fs::read_to_string(path(codec)).ok()?;
    let mut lines = text.lines().filter(|line| !line.starts_with('#'));
    let version = lines.next()?.strip_prefix("format_version ")?.parse().ok()?;
    let lines = lines.filter_map(|line| line.split_once(": ")).map(|(name, text)| (name.into(), text.into()));
    Some((version, lines.collect()))
}

/// What is stored of a codec: the version that it was written for, and lines by page.
type Stored = (u32, BTreeMap<String, String>);

/// Fails if a codec of one version makes other lines than are stored for it.
fn check_unchanged(info: &CodecInfo, lines: &[(String, String)], stored: &Stored) -> Result<(), String> {
    let (name, version) = (info.name, info.format_version);
    let changed = lines.iter().find(|(page, text)| stored.1.get(page).is_some_and(|stored| stored != text));
    match changed {
        Some((page, _)) if stored.0 == version => Err(format!(
            "codec {name} makes other bytes, or other rows of them, of {page}: raise its FORMAT_VERSION, then run \
             KVQ_UPDATE_VECTORS=1 cargo test vectors. (While nobody can have saved anything with version {version}: \
             remove c_tests/vectors/{name}.txt and run the same.)"
        )),
        _ => Ok(()),
    }
}

/// Fails unless every line of a codec is stored for its version.
fn check_complete(info: &CodecInfo, lines: &[(String, String)], stored: &Stored) -> Result<(), String> {
    let is_complete = stored.0 == info.format_version
        && stored.1.len() == lines.len()
        && lines.iter().all(|(page, _)| stored.1.contains_key(page));
    let name = info.name;
    is_complete.then_some(()).ok_or(format!(
        "golden vectors of {name} are missing or of another version: KVQ_UPDATE_VECTORS=1 cargo test vectors"
    ))
}

#[test]
fn sealed_bytes_are_those_of_the_format_version() {
    let update = std::env::var("KVQ_UPDATE_VECTORS").is_ok_and(|value| value == "1");
    for info in REGISTRY {
        let (name, version) = (info.name, info.format_version);
        let lines: Vec<(String, String)> = cases(name).iter().map(|case| line(info, case)).collect();
        let stored = read(name).unwrap_or_default();
        check_unchanged(info, &lines, &stored).unwrap();
        if update {
            let head = "# What rows seal to; written and explained by src/tests/vectors.rs.\n";
            let text = lines.iter().map(|(page, text)| format!("{page}: {text}\n")).collect::<String>();
            fs::create_dir_all(path(name).parent().unwrap()).unwrap();
            fs::write(path(name), format!("{head}format_version {version}\n{text}")).unwrap();
            continue;
        }
        check_complete(info, &lines, &stored).unwrap();
    }
}

/// A single bit of a single page, a line too few, another version.
#[test]
fn other_bytes_and_other_versions_are_found() {
    let info = &REGISTRY[0];
    let (version, stored) = read(info.name).unwrap();
    let lines: Vec<(String, String)> = stored.clone().into_iter().collect();
    let check = |lines: &[(String, String)], version: u32| {
        let stored = (version, stored.clone());
        check_unchanged(info, lines, &stored).and_then(|()| check_complete(info, lines, &stored))
    };
    assert_eq!(check(&lines, version), Ok(()));
    let mut changed = lines.clone();
    let at = changed[3].1.find("bytes ").unwrap() + 6;
    let digit = u8::from_str_radix(&changed[3].1[at..=at], 16).unwrap();
    changed[3].1.replace_range(at..=at, &format!("{:x}", digit ^ 1));
    let text = check(&changed, version).unwrap_err();
    assert!(text.contains("raise its FORMAT_VERSION") && text.contains(&lines[3].0), "{text}");
    assert!(check(&changed, version - 1).unwrap_err().contains("another version"));
    assert!(check(&lines, version + 1).unwrap_err().contains("another version"));
    assert!(check(&lines[1..], version).unwrap_err().contains("missing"));
}

/// Vectors are about all codes of a width only if the rows reach them all.
#[test]
fn golden_rows_reach_every_code_and_both_ends() {
    let rows = golden_rows(128, 64);
    let large = rows.iter().filter(|x| x.abs() > 4.0).count();
    assert!(rows.contains(&65504.0) && rows.contains(&0.0) && large > 100, "{large}");
    let case = Case { spec: "skvq:v=4".into(), side: Side::Value, dim: 64, n_first: 0, whole: false };
    let (codec, page) = codec_of(&case, IsaToken::new(Isa::Scalar).unwrap());
    let bytes = seal(&*codec, page, &case).bytes;
    let mut seen = [false; 16];
    // The codes come first, two in a byte.
    bytes[..page * 64 / 2].iter().for_each(|byte| {
        seen[usize::from(byte & 15)] = true;
        seen[usize::from(byte >> 4)] = true;
    });
    assert_eq!(seen, [true; 16]);
}
