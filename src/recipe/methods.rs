//! The table of methods: names, defaults, published settings.
#![forbid(unsafe_code)]

use super::presets::PRESETS;
use super::{PoolParams, Recipe, DEFAULT_PAGE};
use crate::codec::adaptive::AdaptiveParams;
use crate::codec::aqua::AquaParams;
use crate::codec::channel::ChannelParams;
use crate::codec::group::{GroupParams, GroupSize};
use crate::codec::quantizer::Clip;
use crate::codec::tile::Width;
use crate::codec::CodecParams;

/// The methods a specification may start with, one row each.
pub const METHODS: &[Method] = &[
    Method {
        name: "skvq",
        about: "groups of channels per token with a residual window and sink tokens (SKVQ, arXiv 2405.06219)",
        defaults: skvq_defaults,
        paper: Some(skvq_paper),
    },
    Method {
        name: "kivi",
        about: "keys per channel, values per token (KIVI, arXiv 2402.02750)",
        defaults: kivi_defaults,
        paper: Some(kivi_paper),
    },
    Method {
        name: "ott",
        about: "kivi with tokens of small keys traced and kept exact (OTT, arXiv 2505.10938)",
        defaults: ott_defaults,
        paper: Some(ott_paper),
    },
    Method {
        name: "qaq",
        about: "every token with a width of its own (QAQ, arXiv 2403.04643)",
        defaults: qaq_defaults,
        paper: Some(qaq_paper),
    },
    Method {
        name: "aqua",
        about: "kivi in a calibrated frame, values predicted from keys (AQUA-KV, arXiv 2501.19392)",
        defaults: aqua_defaults,
        paper: None,
    },
];

/// One row of [`METHODS`].
pub struct Method {
    /// First word of the specification.
    pub name: &'static str,
    /// One line for help texts.
    pub about: &'static str,
    pub(super) defaults: fn() -> Recipe,
    /// The published setting, which the word `paper` chooses; `None`: it cannot run.
    pub(crate) paper: Option<fn() -> Recipe>,
}

/// The names of all presets and methods, for messages.
pub fn names() -> String {
    let names: Vec<_> = PRESETS.iter().map(|preset| preset.name).chain(METHODS.iter().map(|m| m.name)).collect();
    names.join(", ")
}

fn side_default(width: Width, smooth: bool) -> CodecParams {
    CodecParams::Group(GroupParams {
        width,
        group: GroupSize::Head,
        symmetric: true,
        clip: Clip::Auto,
        refit: true,
        mean: smooth,
        smooth,
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
        pool: None,
        attn_window: 0,
        key: side_default(Width::Bits3, true),
        value: side_default(Width::Bits3, false),
    }
}

/// The settings of the SKVQ evaluation scripts (seeds: 2 bits, groups of 64, clip .92, window 128, 5 sink tokens, FP8
/// step and offset) with the corrections without which it is not a usable format: the clip is about the mid-range and
/// parameters are rounded before coding.
fn skvq_paper() -> Recipe {
    let side = CodecParams::Group(GroupParams {
        width: Width::Bits2,
        group: GroupSize::Channels(64),
        symmetric: false,
        clip: Clip::Factor(0.92),
        refit: false,
        mean: false,
        smooth: false,
        rotate: false,
    });
    Recipe { sink_tokens: 5, key: side.clone(), value: side, ..skvq_defaults() }
}

/// Keys per channel with the measured best: every channel its own width.
fn kivi_defaults() -> Recipe {
    Recipe {
        method: "kivi",
        key: CodecParams::Channel(ChannelParams {
            bits: 2.0,
            adaptive: true,
            clip: Clip::Auto,
            refit: true,
            half: false,
        }),
        value: side_default(Width::Bits2, false),
        ..skvq_defaults()
    }
}

/// KIVI with groups of 128 tokens and channels: min/max codes of 2 bits, no sink tokens, a residual of 128. Keys have FP16
/// parameters as published, values FP8 ones.
fn kivi_paper() -> Recipe {
    let value = GroupParams {
        width: Width::Bits2,
        group: GroupSize::Head,
        symmetric: false,
        clip: Clip::Factor(1.0),
        refit: false,
        mean: false,
        smooth: false,
        rotate: false,
    };
    let key = ChannelParams { bits: 2.0, adaptive: false, clip: Clip::Factor(1.0), refit: false, half: true };
    Recipe { sink_tokens: 0, key: CodecParams::Channel(key), value: CodecParams::Group(value), ..kivi_defaults() }
}

fn ott_defaults() -> Recipe {
    Recipe { method: "ott", pool: Some(PUBLISHED_POOL), ..kivi_defaults() }
}

/// OTT's defaults: groups of 128, a residual of 32, 3 outlier tokens and room for 32 more.
fn ott_paper() -> Recipe {
    Recipe { method: "ott", pool: Some(PUBLISHED_POOL), window: 32, ..kivi_paper() }
}

const PUBLISHED_POOL: PoolParams = PoolParams { outliers: 3, extra: 32, skip_layers: 2 };

fn qaq_side(bits: f32) -> AdaptiveParams {
    AdaptiveParams {
        bits,
        adaptive: true,
        min_bits: 2,
        attention: true,
        outliers: 0,
        normal: false,
        symmetric: true,
        clip: Clip::Auto,
        refit: true,
        mean: false,
        smooth: false,
        rotate: true,
    }
}

fn qaq_defaults() -> Recipe {
    let key = CodecParams::Adaptive(AdaptiveParams { attention: false, mean: true, smooth: true, ..qaq_side(2.25) });
    let value = CodecParams::Adaptive(qaq_side(2.25));
    Recipe { method: "qaq", attn_window: 5, key, value, ..skvq_defaults() }
}

/// QAQ's experiments at 2 bits: ranges of each token, not rotated, 1 % of the values exact (at 128 channels one at either
/// end), a window of 5 queries, no sink tokens. The tokens whose attention window is not full, which the paper codes with
/// its widest codes, are exact here.
fn qaq_paper() -> Recipe {
    let value = AdaptiveParams {
        min_bits: 1,
        outliers: 2,
        symmetric: false,
        clip: Clip::Cells,
        refit: false,
        rotate: false,
        ..qaq_side(2.0)
    };
    let key = AdaptiveParams { attention: false, ..value.clone() };
    let [key, value] = [key, value].map(CodecParams::Adaptive);
    Recipe { window: 5, sink_tokens: 0, key, value, ..qaq_defaults() }
}

/// What measures best at 2.2 to 2.3 bits.
fn aqua_defaults() -> Recipe {
    let channel = ChannelParams { bits: 2.25, adaptive: true, clip: Clip::Auto, refit: true, half: false };
    let key = AquaParams { channel, bias: true, klt: true, predict: true, path: String::new(), profile: None };
    Recipe { method: "aqua", key: CodecParams::Aqua(key), ..kivi_defaults() }
}
