//! `auto:mem=SIZE[,key=value...]`: a recipe that is chosen by the memory that a context's cache may take.
#![forbid(unsafe_code)]

use super::presets::items;
use crate::error::{Error, Result, Status};

/// The word that a specification of this kind starts with.
pub const AUTO: &str = "auto";

/// The presets that may be chosen, best quality first.
pub const LADDER: &[&str] = &["4", "on", "3", "2"];

/// Units of a size, with the bytes of one.
const UNITS: &[(&str, u64)] = &[("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("TiB", 1 << 40)];

/// What a user asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Auto {
    /// Most bytes that the cache may take.
    pub bytes: u64,
    /// Size of the cache as the user wrote it.
    pub size: String,
    /// Keys that replace those of any preset, as they would stand behind its name.
    pub changes: String,
}

/// Whether a specification asks for a choice, well or badly spelled.
pub fn is_auto(spec: &str) -> bool {
    spec.split([':', ',']).next() == Some(AUTO)
}

impl Auto {
    /// Reads a specification that [`is_auto`].
    ///
    /// # Errors
    ///
    /// [`Status::Recipe`] if it does not name one size, that is more than nothing.
    pub fn parse(spec: &str) -> Result<Auto> {
        let mut sizes = Vec::new();
        let mut changes = Vec::new();
        for item in items(spec.strip_prefix(AUTO).unwrap_or(spec)) {
            match item.strip_prefix("mem=") {
                Some(size) => sizes.push(size),
                None => changes.push(item),
            }
        }
        match sizes[..] {
            [size] => Ok(Auto { bytes: bytes_of(size)?, size: size.to_owned(), changes: changes.join(",") }),
            [] => Err(fail(format!("{AUTO} needs the memory that the cache may take, such as {AUTO}:mem=4GiB"))),
            _ => Err(fail("key 'mem' is given twice".to_owned())),
        }
    }

    /// The specifications to choose from, best quality first.
    pub fn candidates(&self) -> impl Iterator<Item = String> + '_ {
        let colon = if self.changes.is_empty() { "" } else { ":" };
        LADDER.iter().map(move |preset| format!("{preset}{colon}{}", self.changes))
    }
}

fn bytes_of(size: &str) -> Result<u64> {
    let end = size.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(size.len());
    let (number, unit) = size.split_at(end);
    let unit = UNITS.iter().find(|(name, _)| *name == unit).map(|&(_, bytes)| bytes as f64);
    let bytes = number.parse::<f64>().ok().zip(unit).map(|(number, unit)| number * unit);
    bytes.filter(|bytes| (1.0..u64::MAX as f64).contains(bytes)).map(|bytes| bytes as u64).ok_or_else(|| {
        let units: Vec<&str> = UNITS.iter().map(|&(name, _)| name).collect();
        fail(format!("mem={size}: use a size such as 512MiB or 1.5GiB, in {}", units.join(", ")))
    })
}

fn fail(text: String) -> Error {
    Error::new(Status::Recipe, text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::page::{bits_per_value, Side};
    use crate::recipe::presets::PRESETS;
    use crate::recipe::Recipe;
    use crate::simd::isa::IsaToken;

    #[test]
    fn sizes_have_a_unit_and_may_have_a_fraction() {
        for (size, want) in [
            ("1KiB", 1 << 10),
            ("512MiB", 512 << 20),
            ("4GiB", 4 << 30),
            ("1.5GiB", 3 << 29),
            (".5TiB", 1 << 39),
            ("0.001KiB", 1),
            ("16777215TiB", 16_777_215 << 40),
        ] {
            assert_eq!(bytes_of(size).unwrap(), want, "{size}");
        }
    }

    #[test]
    fn sizes_that_are_none_are_refused_by_name() {
        for size in [
            "",
            "0",
            "0GiB",
            "0.0001KiB",
            "4",
            "abc",
            "GiB",
            "-1GiB",
            "+1GiB",
            "4 GiB",
            "4gib",
            "4GB",
            "4G",
            "1e3GiB",
            "1e999GiB",
            "infGiB",
            "nanGiB",
            "1.2.3GiB",
            ".GiB",
            "16777216TiB",
            "99999999999999999999999TiB",
            "4GiBx",
            "4GiB=",
            "４GiB",
        ] {
            let error = Auto::parse(&format!("auto:mem={size}")).unwrap_err();
            assert_eq!(error.status(), Status::Recipe);
            assert!(error.message().starts_with(&format!("mem={size}: use a size such as 512MiB")), "{size}: {error}");
        }
    }

    #[test]
    fn a_choice_names_one_size() {
        for spec in ["auto", "auto:", "auto:window=64", "auto,window=64"] {
            assert!(is_auto(spec), "{spec}");
            let error = Auto::parse(spec).unwrap_err();
            assert!(error.message().contains("such as auto:mem=4GiB"), "{spec}: {error}");
        }
        let error = Auto::parse("auto:mem=1GiB,mem=1GiB").unwrap_err();
        assert!(error.message().contains("'mem' is given twice"), "{error}");
        assert!(!["on", "off", "", "automatic", "autos:mem=1GiB", "Auto", "skvq:auto"].into_iter().any(is_auto));
    }

    #[test]
    fn changes_go_behind_every_name() {
        let plain = Auto::parse("auto:mem=4GiB").unwrap();
        assert_eq!(plain.candidates().collect::<Vec<_>>(), LADDER);
        let changed = Auto::parse("auto:window=64,mem=4GiB:sinks=8").unwrap();
        assert_eq!((changed.bytes, changed.size.as_str()), (4 << 30, "4GiB"));
        assert_eq!(changed.candidates().next().unwrap(), format!("{}:window=64,sinks=8", LADDER[0]));
        for spec in changed.candidates() {
            let recipe = Recipe::parse(&spec).unwrap();
            assert_eq!((recipe.window, recipe.sink_tokens), (64, 8), "{spec}");
        }
    }

    /// Whatever is a preset may be chosen, and a step down never costs more bits.
    #[test]
    fn the_ladder_has_every_preset_and_descends() {
        let mut names: Vec<&str> = PRESETS.iter().map(|preset| preset.name).collect();
        let mut rungs = LADDER.to_vec();
        names.sort_unstable();
        rungs.sort_unstable();
        assert_eq!(rungs, names);
        let token = IsaToken::detect().unwrap();
        let bits = |name: &&str| {
            let recipe = Recipe::parse(name).unwrap();
            let side = |side, params: &crate::codec::CodecParams| {
                bits_per_value(params.build(side, 128, recipe.page, token).unwrap().page_bytes(), recipe.page, 128)
            };
            side(Side::Key, &recipe.key) + side(Side::Value, &recipe.value)
        };
        assert!(LADDER.iter().map(bits).is_sorted_by(|better, worse| better >= worse));
    }
}
