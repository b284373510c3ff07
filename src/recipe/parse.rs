//! The grammar `name[:preset][:key=value,...]`, its defaults and its error messages.
#![forbid(unsafe_code)]

use std::fmt;

use super::{Recipe, SideRecipe, DEFAULT_PAGE};
use crate::codec::group::{Clip, GroupParams, GroupSize};
use crate::codec::tile::Width;
use crate::error::{Error, Result, Status};

/// The methods a specification may start with, one row each: name, what it is, default and parser of its keys.
pub const METHODS: &[Method] = &[Method {
    name: "skvq",
    about: "groups of channels per token with a residual window and sink tokens (SKVQ, arXiv 2405.06219)",
    keys: "k, v, group, window, sinks, clip, page, rotate, mean, symmetric, refit, or the word 'paper'",
    defaults: skvq_defaults,
}];

/// One row of [`METHODS`].
pub struct Method {
    /// First word of the specification.
    pub name: &'static str,
    /// One line for help texts.
    pub about: &'static str,
    keys: &'static str,
    defaults: fn() -> Recipe,
}

/// Most tokens a residual window may hold.
const MAX_WINDOW: usize = 8192;
/// Most sink tokens per sequence.
const MAX_SINKS: usize = 64;

impl Recipe {
    /// Parses and validates a specification.
    ///
    /// # Errors
    ///
    /// [`Status::Recipe`], naming the offending key and what it may be.
    pub fn parse(spec: &str) -> Result<Recipe> {
        let (name, rest) = spec.split_once(':').unwrap_or((spec, ""));
        let method = METHODS.iter().find(|m| m.name == name).ok_or_else(|| {
            let known: Vec<_> = METHODS.iter().map(|m| format!("{}, {}", m.name, m.about)).collect();
            fail(format!("unknown recipe '{name}'; known: {}", known.join("; ")))
        })?;
        let mut recipe = (method.defaults)();
        let mut seen: Vec<&str> = Vec::new();
        let mut items: Vec<&str> = rest.split([',', ':']).filter(|item| !item.is_empty()).collect();
        // `group` chooses the default of `symmetric`, whichever the user wrote first.
        items.sort_by_key(|item| if *item == "paper" { 0 } else { 2 - u8::from(item.starts_with("group=")) });
        for item in items {
            if item == "paper" {
                recipe = skvq_paper();
                continue;
            }
            let (key, value) = item
                .split_once('=')
                .ok_or_else(|| fail(format!("'{item}' is not key=value; {name} knows {}", method.keys)))?;
            if seen.contains(&key) {
                return Err(fail(format!("key '{key}' is given twice")));
            }
            seen.push(key);
            set_key(&mut recipe, key, value)?
                .then_some(())
                .ok_or_else(|| fail(format!("{name} has no key '{key}'; it knows {}", method.keys)))?;
        }
        check(&recipe)?;
        Ok(recipe)
    }
}

fn fail(text: String) -> Error {
    Error::new(Status::Recipe, text)
}

fn side_default(width: Width, mean: bool) -> SideRecipe {
    SideRecipe::Group(GroupParams {
        width,
        group: GroupSize::Head,
        symmetric: true,
        clip: Clip::Auto,
        refit: true,
        mean,
        rotate: true,
    })
}

fn skvq_defaults() -> Recipe {
    Recipe {
        method: "skvq",
        page: DEFAULT_PAGE,
        window: 128,
        sink_tokens: 4,
        seal_lag: 0,
        key: side_default(Width::Bits3, true),
        value: side_default(Width::Bits3, false),
    }
}

/// The settings of the SKVQ evaluation scripts (seeds: 2 bits, groups of 64, clip .92, window 128, 5 sink tokens, FP8
/// step and offset) with the corrections without which it is not a usable format: the clip is about the mid-range and
/// parameters are rounded before coding.
fn skvq_paper() -> Recipe {
    let side = SideRecipe::Group(GroupParams {
        width: Width::Bits2,
        group: GroupSize::Channels(64),
        symmetric: false,
        clip: Clip::Factor(0.92),
        refit: false,
        mean: false,
        rotate: false,
    });
    Recipe { sink_tokens: 5, key: side.clone(), value: side, ..skvq_defaults() }
}

/// Sets one key. `Ok(false)`: there is no such key.
fn set_key(recipe: &mut Recipe, key: &str, value: &str) -> Result<bool> {
    let Recipe { key: SideRecipe::Group(k), value: SideRecipe::Group(v), .. } = recipe;
    match key {
        "k" => k.width = Width::parse(value).map_err(|e| fail(format!("k={value}: {e}")))?,
        "v" => v.width = Width::parse(value).map_err(|e| fail(format!("v={value}: {e}")))?,
        "group" => {
            let group = GroupSize::parse(value)?;
            (k.group, v.group) = (group, group);
            // Groups smaller than a head are the paper's affine form unless `symmetric` says otherwise.
            let symmetric = group == GroupSize::Head;
            (k.symmetric, v.symmetric) = (symmetric, symmetric);
        }
        "clip" => {
            let clip = Clip::parse(value)?;
            (k.clip, v.clip) = (clip, clip);
        }
        "symmetric" => {
            let on = flag(key, value)?;
            (k.symmetric, v.symmetric) = (on, on);
        }
        "refit" => {
            let on = flag(key, value)?;
            (k.refit, v.refit) = (on, on);
        }
        "rotate" => {
            let on = flag(key, value)?;
            (k.rotate, v.rotate) = (on, on);
        }
        "mean" => k.mean = flag(key, value)?,
        "window" => recipe.window = number(key, value, 0..=MAX_WINDOW)?,
        "sinks" => recipe.sink_tokens = number(key, value, 0..=MAX_SINKS)?,
        "page" => {
            recipe.page = number(key, value, 64..=256)?;
            if !recipe.page.is_power_of_two() {
                return Err(fail(format!("page={value}: use 64, 128 or 256")));
            }
        }
        _ => return Ok(false),
    }
    Ok(true)
}

fn check(recipe: &Recipe) -> Result<()> {
    let Recipe { key: SideRecipe::Group(k), value: SideRecipe::Group(v), .. } = recipe;
    for side in [k, v] {
        if (side.group, side.width) == (GroupSize::Channels(32), Width::Ternary) {
            return Err(fail(
                "group=32 with width 1.6 costs 2 bits a code: use group=64, 128 or head, or width 2".into(),
            ));
        }
    }
    Ok(())
}

fn flag(key: &str, value: &str) -> Result<bool> {
    match value {
        "0" => Ok(false),
        "1" => Ok(true),
        _ => Err(fail(format!("{key}={value}: use 0 or 1"))),
    }
}

fn number(key: &str, value: &str, range: std::ops::RangeInclusive<usize>) -> Result<usize> {
    value
        .parse()
        .ok()
        .filter(|n| range.contains(n))
        .ok_or_else(|| fail(format!("{key}={value}: use a whole number from {} to {}", range.start(), range.end())))
}

/// Writes the keys that both sides share, in the order in which they can be parsed back.
pub(super) fn write_group_keys(f: &mut fmt::Formatter<'_>, k: &GroupParams, v: &GroupParams) -> fmt::Result {
    debug_assert_eq!(
        (k.group, k.symmetric, k.clip, k.refit, k.rotate),
        (v.group, v.symmetric, v.clip, v.refit, v.rotate)
    );
    let bit = u8::from;
    write!(f, ",group={},symmetric={},clip={}", k.group, bit(k.symmetric), k.clip)?;
    write!(f, ",refit={},mean={},rotate={}", bit(k.refit), bit(k.mean), bit(k.rotate))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn canonical_text_reads_back() {
        for spec in ["skvq", "skvq:paper", "skvq:k=2,v=1.6,group=128,window=0,sinks=0", "skvq:k=8,v=4,clip=0.9,page=64"]
        {
            let recipe = Recipe::parse(spec).unwrap();
            assert_eq!(Recipe::parse(&recipe.spec()).unwrap(), recipe, "{spec} -> {}", recipe.spec());
        }
    }

    #[test]
    fn errors_name_the_key_and_what_it_may_be() {
        for (spec, want) in [
            ("turbo", "unknown recipe 'turbo'; known: skvq, groups of"),
            ("skvq:k=5", "k=5: '5' is not a width: use 1.6, 2, 3, 4 or 8"),
            ("skvq:bits=2", "skvq has no key 'bits'"),
            ("skvq:window=-1", "window=-1: use a whole number from 0 to 8192"),
            ("skvq:page=100", "page=100: use 64, 128 or 256"),
            ("skvq:rotate=yes", "rotate=yes: use 0 or 1"),
            ("skvq:group=48", "group=48: use 32, 64, 128 or head"),
            ("skvq:clip=2", "clip=2: use auto or a number from 0.3 to 1"),
            ("skvq:k", "'k' is not key=value"),
            ("skvq:k=2,k=3", "key 'k' is given twice"),
            ("skvq:k=1.6,group=32", "group=32 with width 1.6"),
        ] {
            let error = Recipe::parse(spec).unwrap_err();
            assert_eq!(error.status(), Status::Recipe);
            assert!(error.message().contains(want), "{spec}: {error}");
        }
    }
}
