//! `include/kvq.h` is what build.rs renders from the sources.

use std::fs;
use std::mem::{offset_of, size_of};
use std::path::Path;

use crate::location::{Location, IN_PAGE, IN_SLOT, NOWHERE};

const RENDERED: &str = include_str!(concat!(env!("OUT_DIR"), "/kvq.h"));

/// With KVQ_UPDATE_HEADER=1 in the environment the committed header is rewritten instead.
#[test]
fn the_committed_header_is_the_rendered_one() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("include/kvq.h");
    if std::env::var("KVQ_UPDATE_HEADER").is_ok_and(|value| value == "1") {
        fs::write(&path, RENDERED).expect("include/kvq.h can be written");
    }
    let committed = fs::read_to_string(&path).unwrap_or_default();
    if let Some(line) = first_difference(&committed, RENDERED) {
        panic!("include/kvq.h differs from the sources in line {line}: run KVQ_UPDATE_HEADER=1 cargo test header");
    }
}

/// Line number of the first difference of two texts, byte for byte.
fn first_difference(a: &str, b: &str) -> Option<usize> {
    if a == b {
        return None;
    }
    let n_equal = a.split_inclusive('\n').zip(b.split_inclusive('\n')).take_while(|(a, b)| a == b).count();
    Some(n_equal + 1)
}

#[test]
fn a_difference_is_found_to_the_byte() {
    assert_eq!(first_difference("a\nb\n", "a\nb\n"), None);
    assert_eq!(first_difference("a\nb\n", "a\nc\n"), Some(2));
    assert_eq!(first_difference("a\nb", "a\nb\n"), Some(2));
    assert_eq!(first_difference("", "a"), Some(1));
}

/// C has these as macros and a struct of its own.
#[test]
fn places_of_rows_are_the_same_in_rust_and_c() {
    let places = [("KVQ_NOWHERE", NOWHERE, 0), ("KVQ_IN_SLOT", IN_SLOT, 1), ("KVQ_IN_PAGE", IN_PAGE, 2)];
    for (name, value, never_changes) in places {
        assert_eq!(value, never_changes, "{name}");
        assert!(RENDERED.contains(&format!("#define {name} {value}\n")), "{name}");
    }
    let structure = RENDERED.split("} kvq_location;").next().expect("text before it");
    let structure = structure.rsplit("typedef struct {").next().expect("the struct starts");
    let fields: Vec<&str> = structure.lines().map(str::trim).filter(|line| line.ends_with(';')).collect();
    assert_eq!(fields, ["uint32_t places;", "uint32_t slot;", "int32_t turned;"]);
    assert_eq!((offset_of!(Location, places), offset_of!(Location, slot), offset_of!(Location, turned)), (0, 4, 8));
    assert_eq!(size_of::<Location>(), 12);
}

#[test]
fn the_header_names_the_version_of_the_package() {
    assert!(RENDERED.contains(&format!("#define KVQ_VERSION \"{}\"\n", env!("CARGO_PKG_VERSION"))));
}

/// A comment written for rustdoc would put its links into the header as they are.
#[test]
fn functions_and_structs_are_described_for_c_readers() {
    let after_status = RENDERED.split("KVQ_STATUS_INTERNAL").nth(1).expect("the header lists the status codes");
    for line in after_status.lines().filter(|line| line.trim_start().starts_with("//")) {
        assert!(!line.contains("[`") && !line.contains("::"), "rustdoc in the header: {line}");
        assert!(line.len() <= 120, "long line in the header: {line}");
    }
}

#[test]
fn the_wrapper_frees_every_object() {
    let wrapper = include_str!("../../include/kvq.hpp");
    let objects: Vec<&str> = RENDERED
        .lines()
        .filter_map(|line| line.strip_prefix("void kvq_")?.split_once("_free(").map(|(object, _)| object))
        .collect();
    assert!(objects.contains(&"recipe") && objects.len() > 3, "{objects:?}");
    for object in objects {
        assert!(wrapper.contains(&format!("{{ kvq_{object}_free(p); }}")), "kvq.hpp does not free kvq_{object}");
        assert!(wrapper.contains(&format!("using {object} = handle<kvq_{object}>;")), "kvq.hpp has no kvq::{object}");
    }
}
