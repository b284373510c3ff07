//! Names people can remember, and the specification that each stands for.
#![forbid(unsafe_code)]

use std::borrow::Cow;

/// The presets, one row each. What a row stands for may change with what is measured; its name says how many bits.
pub const PRESETS: &[Preset] = &[
    Preset { name: "on", spec: "ott:k=3,v=3,window=256", about: "what to take first" },
    Preset {
        name: "2",
        spec: "ott:k=2.5,window=256,outliers=8,pool=56",
        about: "the smallest that still keeps a model's answers",
    },
    Preset { name: "3", spec: "ott:k=3,v=3", about: "small, with little loss" },
    Preset { name: "4", spec: "ott:k=4,v=4", about: "nearly no loss" },
];

/// What a user writes for a cache that is not compressed; an empty text is one that was never set.
pub const OFF: &[&str] = &["off", "none", "0", ""];

/// One row of [`PRESETS`].
pub struct Preset {
    /// First word of a specification.
    pub name: &'static str,
    /// The specification it stands for: a method and keys.
    pub spec: &'static str,
    /// One line for help texts.
    pub about: &'static str,
}

/// Whether a specification asks for no compressed cache at all.
pub fn is_off(spec: &str) -> bool {
    OFF.contains(&spec)
}

/// The specification that `spec` stands for: a preset becomes its method and keys, of which those that follow its name
/// in `spec` replace its own. Anything else stays as it is.
pub fn expand(spec: &str) -> Cow<'_, str> {
    let (name, changes) = spec.split_once(':').unwrap_or((spec, ""));
    let Some(preset) = PRESETS.iter().find(|preset| preset.name == name) else { return Cow::Borrowed(spec) };
    let (method, own) = preset.spec.split_once(':').unwrap_or((preset.spec, ""));
    let changed: Vec<&str> = items(changes).map(key).collect();
    // `bits` sets both.
    let replaced = |key| changed.contains(&key) || (["k", "v"].contains(&key) && changed.contains(&"bits"));
    let kept = items(own).filter(|item| !replaced(key(item)));
    let all: Vec<&str> = kept.chain(items(changes)).collect();
    Cow::Owned(if all.is_empty() { method.to_owned() } else { format!("{method}:{}", all.join(",")) })
}

/// What stands between the separators behind a name.
pub(super) fn items(text: &str) -> impl Iterator<Item = &str> {
    text.split([',', ':']).filter(|item| !item.is_empty())
}

fn key(item: &str) -> &str {
    item.split_once('=').map_or(item, |(key, _)| key)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::methods::METHODS;
    use crate::recipe::Recipe;

    #[test]
    fn presets_are_distinct_from_each_other_methods_and_off() {
        let methods = METHODS.iter().map(|method| method.name);
        let mut names: Vec<&str> =
            PRESETS.iter().map(|preset| preset.name).chain(methods).chain(OFF.to_vec()).collect();
        let n = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), n, "a name is taken twice: {names:?}");
        // `llama-bench -kvq a,b` and the grammar cut at these.
        assert!(names.iter().all(|name| !name.contains([':', ',', '='])));
    }

    #[test]
    fn a_preset_is_the_recipe_it_stands_for() {
        for preset in PRESETS {
            assert_eq!(expand(preset.name), preset.spec);
            assert_eq!(Recipe::parse(preset.name).unwrap(), Recipe::parse(preset.spec).unwrap(), "{}", preset.name);
        }
    }

    /// Every key of a recipe, said again behind a preset's name, replaces the preset's own and is not "given twice".
    #[test]
    fn any_key_may_follow_a_preset() {
        for preset in PRESETS {
            let recipe = Recipe::parse(preset.spec).unwrap();
            let text = recipe.spec();
            for item in items(text.split_once(':').unwrap().1) {
                let spec = format!("{}:{item}", preset.name);
                assert_eq!(Recipe::parse(&spec).unwrap(), recipe, "{spec} -> {}", expand(&spec));
            }
            let changed = Recipe::parse(&format!("{}:window=256,sinks=8,v=8", preset.name)).unwrap();
            assert_eq!((changed.window, changed.sink_tokens), (256, 8));
            assert!(changed.spec().contains(",v=8,"), "{}", changed.spec());
        }
    }

    #[test]
    fn changes_replace_what_they_name_and_keep_the_rest() {
        for (spec, want) in [
            ("3:window=256", "ott:k=3,v=3,window=256"),
            ("3:", "ott:k=3,v=3"),
            ("3:v=2,k=4", "ott:v=2,k=4"),
            ("3:k", "ott:v=3,k"),
            ("3:bits=2", "ott:bits=2"),
            ("kivi:k=3", "kivi:k=3"),
            ("5:k=3", "5:k=3"),
            ("off", "off"),
        ] {
            assert_eq!(expand(spec), want, "{spec}");
        }
    }

    #[test]
    fn off_has_four_spellings() {
        assert!(["off", "none", "0", ""].into_iter().all(is_off));
        assert!(!["on", "OFF", "off:", "00", " ", "2", "skvq"].into_iter().any(is_off));
    }

    #[test]
    fn the_docs_list_every_preset() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/recipes.md");
        let docs = std::fs::read_to_string(path).unwrap();
        for Preset { name, spec, about } in PRESETS {
            assert!(docs.contains(&format!("| `{name}` | `{spec}` | {about} |")), "{path} lacks `{name}`");
        }
    }
}
