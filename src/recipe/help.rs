//! The text that explains recipes, made from the tables that it is about.
#![forbid(unsafe_code)]

use std::fmt::Write;

use super::auto::{AUTO, LADDER};
use super::methods::METHODS;
use super::presets::{OFF, PRESETS};
use super::Recipe;
use crate::codec::page::{bits_per_value, Side};
use crate::error::Result;
use crate::simd::isa::IsaToken;

/// Head sizes whose bits per value are shown.
const HEAD_DIMS: [usize; 2] = [64, 128];

/// Presets and methods with what a key and a value cost, and a line on each; many lines, the last one ends as well.
///
/// # Errors
///
/// Where the instruction set that `KVQ_ISA` asks for is missing.
pub fn help() -> Result<String> {
    let [small, large] = HEAD_DIMS.map(|dim| format!("heads of {dim}"));
    let mut text = format!(
        "A recipe is a name from this list and, after a colon, what differs from it.\n\n\
         \x20 {:<6}{:>14}{:>16}\n  {:<6}{small:>14}{large:>16}\n",
        "", "bits of a key", "/ of a value", "name"
    );
    let presets = PRESETS.iter().map(|preset| (preset.name, preset.spec, format!("{}: {}", preset.about, preset.spec)));
    let methods = METHODS.iter().map(|method| (method.name, method.name, method.about.to_owned()));
    for (name, spec, about) in presets.chain(methods) {
        let [small, large] = bits(spec)?;
        let _ = writeln!(text, "  {name:<6}{small:>14}{large:>16}   {about}");
    }
    let off: Vec<&str> = OFF.iter().copied().filter(|name| !name.is_empty()).collect();
    let _ = writeln!(text, "  {}: not compressed", off.join(", "));
    let _ = writeln!(text, "  {AUTO}:mem=4GiB: the first of {} whose whole cache fits into 4 GiB\n", LADDER.join(", "));
    let (preset, method) = (PRESETS[0].name, METHODS[0].name);
    let _ = writeln!(text, "Such as {preset}:window=256 or {preset}:sinks=8,page=64.");
    let _ = writeln!(text, "The word 'paper' takes the published setting of a method: {method}:paper.\n");
    text.push_str("Every key, with its default:\n");
    for method in METHODS {
        let _ = writeln!(text, "  {}", Recipe::parse(method.name)?);
    }
    Ok(text)
}

/// Bits per key / per value of packed pages, metadata counted, for each of [`HEAD_DIMS`].
fn bits(spec: &str) -> Result<[String; 2]> {
    let (recipe, token) = (Recipe::parse(spec)?, IsaToken::detect()?);
    let mut cells = [String::new(), String::new()];
    for (cell, dim) in cells.iter_mut().zip(HEAD_DIMS) {
        let [k, v] = [(Side::Key, &recipe.key), (Side::Value, &recipe.value)].map(|(side, of_side)| {
            of_side
                .build(side, dim, recipe.page, token)
                .map(|codec| bits_per_value(codec.page_bytes(), recipe.page, dim))
        });
        *cell = format!("{:.2} / {:.2}", k?, v?);
    }
    Ok(cells)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::methods::names;

    #[test]
    fn help_has_a_line_for_every_name() {
        let text = help().unwrap();
        for name in names().split(", ") {
            assert_eq!(
                text.lines().filter(|line| line.starts_with(&format!("  {name} "))).count(),
                1,
                "{name}\n{text}"
            );
        }
        for preset in PRESETS {
            assert!(text.contains(&format!("{}: {}\n", preset.about, preset.spec)), "{}", preset.name);
        }
        assert!(text.contains("  off, none, 0: not compressed\n"), "{text}");
        assert!(
            text.contains("  auto:mem=4GiB: the first of 4, on, 3, 2 whose whole cache fits into 4 GiB\n"),
            "{text}"
        );
        assert!(text.lines().all(|line| line.len() <= 200), "{text}");
    }

    /// Worked out by hand: the published setting of SKVQ has 2 bits and two FP8 parameters for 64 values; values of `kivi`
    /// have 2 bits and 8 for a whole head.
    #[test]
    fn bits_are_those_of_the_layout() {
        assert_eq!(bits("skvq:paper").unwrap(), ["2.25 / 2.25", "2.25 / 2.25"]);
        let [small, large] =
            bits("kivi").unwrap().map(|cell| cell.split_once(" / ").unwrap().1.parse::<f64>().unwrap());
        assert!((small - 2.125).abs() < 0.0051 && (large - 2.0625).abs() < 0.0051, "{small} {large}");
    }
}
