//! The grammar `name[:paper][:key=value,...]` and its error messages.
#![forbid(unsafe_code)]

use std::fmt;

use super::auto::is_auto;
use super::methods::{names, METHODS};
use super::presets::{expand, is_off, items};
use super::{Recipe, MIN_PAGE};
use crate::codec::adaptive::{AdaptiveParams, MAX_OUTLIERS};
use crate::codec::aqua::AquaParams;
use crate::codec::channel::ChannelParams;
use crate::codec::group::{GroupParams, GroupSize};
use crate::codec::page::MAX_PAGE;
use crate::codec::quantizer::Clip;
use crate::codec::tile::Width;
use crate::codec::CodecParams;
use crate::error::{Error, Result, Status};
use crate::recipe::PoolParams;

/// Most tokens a residual window may hold.
const MAX_WINDOW: usize = 8192;
/// Longest attention window: as many queries are kept in the layer's memory.
const MAX_ATTN_WINDOW: usize = 64;
/// Most sink tokens per sequence.
const MAX_SINKS: usize = 64;

impl Recipe {
    /// Parses and validates a specification.
    ///
    /// # Errors
    ///
    /// [`Status::Recipe`], naming the offending key and what it may be.
    pub fn parse(spec: &str) -> Result<Recipe> {
        if is_off(spec) {
            return Err(fail(format!("'{spec}' asks for no compressed cache: there is no recipe to read")));
        }
        if is_auto(spec) {
            return Err(fail(format!(
                "'{spec}' is a choice by memory: it needs the layers of a model (kvq_recipe_choose)"
            )));
        }
        let spec = &expand(spec);
        let (name, rest) = spec.split_once(':').unwrap_or((spec, ""));
        let method = METHODS
            .iter()
            .find(|m| m.name == name)
            .ok_or_else(|| fail(format!("unknown recipe '{name}'; known: {}", names())))?;
        let mut recipe = (method.defaults)();
        let mut seen: Vec<&str> = Vec::new();
        let mut items: Vec<&str> = items(rest).collect();
        // `group` chooses the default of `symmetric` and `bits` that of `k` and `v`, whichever the user wrote first.
        let sets_defaults = |item: &str| item.starts_with("group=") || item.starts_with("bits=");
        items.sort_by_key(|item| if *item == "paper" { 0 } else { 2 - u8::from(sets_defaults(item)) });
        for item in items {
            if item == "paper" {
                let paper =
                    method.paper.ok_or_else(|| fail(format!("{name} has no published setting that can run")))?;
                recipe = paper();
                continue;
            }
            let (key, value) = item
                .split_once('=')
                .ok_or_else(|| fail(format!("'{item}' is not key=value; {name} knows {}", known_keys(&recipe))))?;
            if seen.contains(&key) {
                return Err(fail(format!("key '{key}' is given twice")));
            }
            seen.push(key);
            set_key(&mut recipe, key, value)?
                .then_some(())
                .ok_or_else(|| fail(format!("{name} has no key '{key}'; it knows {}", known_keys(&recipe))))?;
        }
        if recipe.attn_window > 0 {
            // The later a page is sealed, the better its future is known; up to the window that costs no memory.
            recipe.seal_lag = recipe.window;
        }
        check(&recipe)?;
        Ok(recipe)
    }
}

/// The keys of a recipe, for messages.
fn known_keys(recipe: &Recipe) -> String {
    let text = recipe.to_string();
    let (_, items) = text.split_once(':').unwrap_or_default();
    let keys: Vec<&str> = items.split(',').filter_map(|item| Some(item.split_once('=')?.0)).collect();
    // Not among them as long as it is not given.
    let profile = if recipe.profile_path().is_err() { ", profile" } else { "" };
    format!("{}{profile} and the word 'paper'", keys.join(", "))
}

fn fail(text: String) -> Error {
    Error::new(Status::Recipe, text)
}

/// Sets one key. `Ok(false)`: there is no such key.
fn set_key(recipe: &mut Recipe, key: &str, value: &str) -> Result<bool> {
    match key {
        "window" => recipe.window = number(key, value, 0..=MAX_WINDOW)?,
        "sinks" => recipe.sink_tokens = number(key, value, 0..=MAX_SINKS)?,
        "page" => {
            recipe.page = number(key, value, MIN_PAGE..=MAX_PAGE)?;
            if !recipe.page.is_power_of_two() {
                return Err(fail(format!("page={value}: use 64, 128 or 256")));
            }
        }
        "outliers" | "pool" | "skip-layers" if recipe.pool.is_some() => {
            let Some(pool) = &mut recipe.pool else { return Ok(false) };
            match key {
                "outliers" => pool.outliers = number(key, value, 0..=16)?,
                "pool" => pool.extra = number(key, value, 0..=PoolParams::MAX_ROWS - 16)?,
                _ => pool.skip_layers = number(key, value, 0..=1000)?,
            }
        }
        "attn-window" if matches!(recipe.key, CodecParams::Adaptive(_)) => {
            recipe.attn_window = number(key, value, 0..=MAX_ATTN_WINDOW)?;
        }
        "target" if matches!(recipe.key, CodecParams::Adaptive(_)) => {
            let text =
                "target: all steps of a page would be multiplied by it, which leaves the widths as they are: use bits";
            return Err(fail(text.into()));
        }
        "attn-keys" => {
            let CodecParams::Adaptive(side) = &mut recipe.key else { return Ok(false) };
            side.attention = flag(key, value)?;
        }
        "bits" => {
            if !matches!(recipe.key, CodecParams::Adaptive(_)) {
                return Ok(false);
            }
            set_width(&mut recipe.key, key, value)?;
            set_width(&mut recipe.value, key, value)?;
        }
        "k" => set_width(&mut recipe.key, key, value)?,
        "v" => set_width(&mut recipe.value, key, value)?,
        // Only keys have a mean and factors taken off.
        "mean" | "smooth" => return set_side_key(&mut recipe.key, key, value),
        _ => return Ok(set_side_key(&mut recipe.key, key, value)? | set_side_key(&mut recipe.value, key, value)?),
    }
    Ok(true)
}

fn set_width(side: &mut CodecParams, key: &str, value: &str) -> Result<()> {
    match side {
        CodecParams::Group(side) => {
            side.width = Width::parse(value).map_err(|e| fail(format!("{key}={value}: {e}")))?
        }
        CodecParams::Channel(ChannelParams { bits, .. })
        | CodecParams::Adaptive(AdaptiveParams { bits, .. })
        | CodecParams::Aqua(AquaParams { channel: ChannelParams { bits, .. }, .. }) => {
            let number = value.parse::<f32>().ok().filter(|bits| (1.0..=4.0).contains(bits));
            *bits = number.ok_or_else(|| fail(format!("{key}={value}: use a number from 1 to 4")))?;
        }
    }
    Ok(())
}

fn set_side_key(side: &mut CodecParams, key: &str, value: &str) -> Result<bool> {
    match side {
        CodecParams::Group(side) => match key {
            "group" => {
                side.group = GroupSize::parse(value)?;
                // Groups smaller than a head are the paper's affine form unless `symmetric` says otherwise.
                side.symmetric = side.group == GroupSize::Head;
            }
            "clip" => side.clip = Clip::parse(value)?,
            "symmetric" => side.symmetric = flag(key, value)?,
            "refit" => side.refit = flag(key, value)?,
            "rotate" => side.rotate = flag(key, value)?,
            "mean" => side.mean = flag(key, value)?,
            "smooth" => side.smooth = flag(key, value)?,
            _ => return Ok(false),
        },
        CodecParams::Channel(side) => match key {
            "clip" => side.clip = Clip::parse(value)?,
            "refit" => side.refit = flag(key, value)?,
            "adaptive" => side.adaptive = flag(key, value)?,
            "meta" => {
                side.half = match value {
                    "fp8" => false,
                    "fp16" => true,
                    _ => return Err(fail(format!("meta={value}: use fp8 or fp16"))),
                }
            }
            _ => return Ok(false),
        },
        CodecParams::Aqua(side) => match key {
            "clip" => side.channel.clip = Clip::parse(value)?,
            "refit" => side.channel.refit = flag(key, value)?,
            "bias" => side.bias = flag(key, value)?,
            "klt" => side.klt = flag(key, value)?,
            "predict" => side.predict = flag(key, value)?,
            "profile" => side.path = value.to_owned(),
            _ => return Ok(false),
        },
        CodecParams::Adaptive(side) => match key {
            "adaptive" => side.adaptive = flag(key, value)?,
            "min-bits" => side.min_bits = number(key, value, 1..=2)?,
            "outliers" => side.outliers = number(key, value, 0..=MAX_OUTLIERS)?,
            "levels" => {
                side.normal = match value {
                    "uniform" => false,
                    "normal" => true,
                    _ => return Err(fail(format!("levels={value}: use uniform or normal"))),
                }
            }
            "clip" => side.clip = Clip::parse(value)?,
            "symmetric" => side.symmetric = flag(key, value)?,
            "refit" => side.refit = flag(key, value)?,
            "rotate" => side.rotate = flag(key, value)?,
            "mean" => side.mean = flag(key, value)?,
            "smooth" => side.smooth = flag(key, value)?,
            _ => return Ok(false),
        },
    }
    Ok(true)
}

fn check(recipe: &Recipe) -> Result<()> {
    for side in [&recipe.key, &recipe.value] {
        match side {
            CodecParams::Group(side) if (side.group, side.width) == (GroupSize::Channels(32), Width::Ternary) => {
                return Err(fail(
                    "group=32 with width 1.6 costs 2 bits a code: use group=64, 128 or head, or width 2".into(),
                ));
            }
            CodecParams::Channel(side) if !side.adaptive && side.bits.fract() != 0.0 => {
                return Err(fail(format!("k={} needs adaptive=1; without it use 2, 3 or 4", side.bits)));
            }
            CodecParams::Adaptive(side) if side.normal && !side.symmetric => {
                return Err(fail("levels=normal lie about zero: they need symmetric=1".into()));
            }
            CodecParams::Adaptive(side) if side.mean && !side.symmetric => {
                return Err(fail("symmetric=0 needs mean=0: mid-points replace the mean".into()));
            }
            CodecParams::Adaptive(_) if recipe.attn_window > recipe.window => {
                let (queries, window) = (recipe.attn_window, recipe.window);
                return Err(fail(format!("attn-window={queries} is more than window={window}: use window={queries}")));
            }
            _ => {}
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

/// Writes every key, in an order in which they can be parsed back. Keys that both sides have are equal.
pub(super) fn write_keys(f: &mut fmt::Formatter<'_>, recipe: &Recipe) -> fmt::Result {
    for (name, side) in [("k", &recipe.key), (",v", &recipe.value)] {
        match side {
            CodecParams::Group(side) => write!(f, "{name}={}", side.width)?,
            CodecParams::Channel(ChannelParams { bits, .. })
            | CodecParams::Adaptive(AdaptiveParams { bits, .. })
            | CodecParams::Aqua(AquaParams { channel: ChannelParams { bits, .. }, .. }) => {
                write!(f, "{name}={bits}")?;
            }
        }
    }
    write_side(f, recipe, &recipe.key)?;
    if let (CodecParams::Channel(_) | CodecParams::Aqua(_), CodecParams::Group(_)) = (&recipe.key, &recipe.value) {
        write_side(f, recipe, &recipe.value)?;
    }
    write!(f, ",window={},sinks={},page={}", recipe.window, recipe.sink_tokens, recipe.page)?;
    if let Some(PoolParams { outliers, extra, skip_layers }) = recipe.pool {
        write!(f, ",outliers={outliers},pool={extra},skip-layers={skip_layers}")?;
    }
    Ok(())
}

/// The keys of one side but for its width.
fn write_side(f: &mut fmt::Formatter<'_>, recipe: &Recipe, side: &CodecParams) -> fmt::Result {
    let bit = u8::from;
    match side {
        CodecParams::Group(side) => {
            let GroupParams { group, clip, .. } = side;
            write!(f, ",group={group},symmetric={},clip={clip},refit={}", bit(side.symmetric), bit(side.refit))?;
            if matches!(recipe.key, CodecParams::Group(_)) {
                write!(f, ",mean={},smooth={}", bit(side.mean), bit(side.smooth))?;
            }
            write!(f, ",rotate={}", bit(side.rotate))
        }
        CodecParams::Channel(side) => {
            write!(f, ",adaptive={},meta={}", bit(side.adaptive), if side.half { "fp16" } else { "fp8" })
        }
        CodecParams::Aqua(side) => {
            if !side.path.is_empty() {
                write!(f, ",profile={}", side.path)?;
            }
            write!(f, ",bias={},klt={},predict={}", bit(side.bias), bit(side.klt), bit(side.predict))
        }
        CodecParams::Adaptive(side) => {
            let AdaptiveParams { min_bits, outliers, clip, .. } = side;
            write!(f, ",adaptive={},min-bits={min_bits},outliers={outliers}", bit(side.adaptive))?;
            write!(f, ",attn-window={},attn-keys={}", recipe.attn_window, bit(side.attention))?;
            write!(f, ",levels={}", if side.normal { "normal" } else { "uniform" })?;
            write!(f, ",symmetric={},clip={clip},refit={}", bit(side.symmetric), bit(side.refit))?;
            write!(f, ",mean={},smooth={},rotate={}", bit(side.mean), bit(side.smooth), bit(side.rotate))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn canonical_text_reads_back() {
        for spec in [
            "skvq",
            "skvq:paper",
            "skvq:k=2,v=1.6,group=128,window=0,sinks=0",
            "skvq:k=8,v=4,clip=0.9,page=64",
            "kivi",
            "kivi:paper",
            "kivi:k=2.5,v=3,meta=fp16,group=64",
            "ott:paper",
            "ott:outliers=1,pool=0,skip-layers=0",
            "qaq",
            "qaq:paper",
            "qaq:bits=2.5,v=2,attn-window=64,attn-keys=1,outliers=1,min-bits=1,mean=0,symmetric=0,window=64",
            "qaq:bits=3,levels=normal",
            "aqua",
            "aqua:k=1.5,v=1.6,profile=some/model.kvq.gguf,bias=0,klt=0,predict=0",
        ] {
            let recipe = Recipe::parse(spec).unwrap();
            assert_eq!(Recipe::parse(&recipe.spec()).unwrap(), recipe, "{spec} -> {}", recipe.spec());
        }
    }

    #[test]
    fn errors_name_the_key_and_what_it_may_be() {
        for (spec, want) in [
            ("turbo", "unknown recipe 'turbo'; known: on, 2, 3, 4, skvq, kivi, ott, qaq, aqua"),
            ("", "'' asks for no compressed cache"),
            ("none", "'none' asks for no compressed cache"),
            ("auto:mem=4GiB", "'auto:mem=4GiB' is a choice by memory"),
            ("off:window=64", "unknown recipe 'off'"),
            ("on:colour=3", "ott has no key 'colour'"),
            ("2:window=1,window=2", "key 'window' is given twice"),
            ("skvq:k=5", "k=5: '5' is not a width: use 1.6, 2, 3, 4 or 8"),
            ("skvq:bits=2", "skvq has no key 'bits'"),
            ("skvq:window=-1", "window=-1: use a whole number from 0 to 8192"),
            ("skvq:page=100", "page=100: use 64, 128 or 256"),
            ("skvq:rotate=yes", "rotate=yes: use 0 or 1"),
            ("skvq:group=48", "group=48: use 32, 64, 128 or head"),
            ("skvq:clip=2", "clip=2: use auto, cells or a number from 0.3 to 1"),
            ("skvq:k", "'k' is not key=value"),
            ("skvq:k=2,k=3", "key 'k' is given twice"),
            ("skvq:k=1.6,group=32", "group=32 with width 1.6"),
            ("skvq:outliers=3", "skvq has no key 'outliers'; it knows k, v, group"),
            ("kivi:outliers=3", "kivi has no key 'outliers'; it knows k, v, adaptive, meta"),
            ("kivi:k=5", "k=5: use a number from 1 to 4"),
            ("kivi:k=2.5,adaptive=0", "k=2.5 needs adaptive=1; without it use 2, 3 or 4"),
            ("kivi:meta=fp32", "meta=fp32: use fp8 or fp16"),
            ("qaq:group=64", "qaq has no key 'group'; it knows k, v, adaptive, min-bits"),
            ("qaq:symmetric=0", "symmetric=0 needs mean=0"),
            ("qaq:window=4", "attn-window=5 is more than window=4: use window=5"),
            ("qaq:levels=lloyd", "levels=lloyd: use uniform or normal"),
            ("qaq:levels=normal,symmetric=0,mean=0", "levels=normal lie about zero"),
            ("qaq:target=0.01", "target: all steps of a page would be multiplied by it"),
            ("qaq:outliers=3", "outliers=3: use a whole number from 0 to 2"),
            ("aqua:paper", "aqua has no published setting that can run"),
            ("aqua:adaptive=0", "aqua has no key 'adaptive'; it knows k, v, bias, klt, predict"),
            ("kivi:profile=x", "kivi has no key 'profile'"),
            ("ott:outliers=17", "outliers=17: use a whole number from 0 to 16"),
            ("ott:pool=113", "pool=113: use a whole number from 0 to 112"),
        ] {
            let error = Recipe::parse(spec).unwrap_err();
            assert_eq!(error.status(), Status::Recipe);
            assert!(error.message().contains(want), "{spec}: {error}");
        }
    }
}
