//! Counts the promises of the C boundary: every exported function has an unwind guard, and every pointer it takes a
//! NULL test.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// An exported function as it stands in the source.
struct Exported {
    file: String,
    name: String,
    /// (name, type) of each parameter.
    parameters: Vec<(String, String)>,
    has_comment: bool,
    body: String,
}

fn exported_functions() -> Vec<Exported> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/capi");
    let mut functions = Vec::new();
    for entry in fs::read_dir(folder).expect("src/capi is there") {
        let path = entry.expect("src/capi is readable").path();
        if path.extension().is_some_and(|extension| extension == "rs") {
            let file = path.file_name().expect("a file has a name").to_string_lossy().into_owned();
            functions.extend(parse(&file, &fs::read_to_string(&path).expect("sources are text")));
        }
    }
    functions
}

/// rustfmt fixes the form: a function starts and ends in the first column.
fn parse(file: &str, source: &str) -> Vec<Exported> {
    let mut functions = Vec::new();
    let mut rest = source;
    while let Some(at) = rest.find("#[no_mangle]\n") {
        let has_comment = rest[..at].trim_end_matches('\n').lines().last().is_some_and(|line| line.starts_with("///"));
        rest = &rest[at..];
        let end = rest.find("\n}\n").expect("a function ends in the first column");
        let (signature, body) = rest[..end].split_once(" {\n").expect("a function has a body");
        let after_name = signature.split_once("extern \"C\" fn ").expect("exported functions are extern C").1;
        let (name, parameters) = after_name.split_once('(').expect("a function has parameters");
        let parameters = parameters.rsplit_once(')').expect("a function has parameters").0;
        let parameters = parameters.split(',').filter_map(|parameter| parameter.trim().split_once(": "));
        functions.push(Exported {
            file: file.to_owned(),
            name: name.to_owned(),
            parameters: parameters.map(|(name, kind)| (name.to_owned(), kind.to_owned())).collect(),
            has_comment,
            body: body.to_owned(),
        });
        rest = &rest[end..];
    }
    functions
}

#[test]
fn every_exported_function_has_an_unwind_guard() {
    for function in exported_functions() {
        let start = function.body.trim_start();
        let guards = ["guard(", "guard_or("].iter().filter(|guard| function.body.contains(*guard)).count();
        assert_eq!(guards, 1, "{}: {} has {guards} guards; it starts {start:.40}", function.file, function.name);
    }
}

/// The helpers of `capi` test for NULL and take the parameter's name for their message, so that name in quotes stands
/// for the test. `user` is the caller's own and never looked at, `stream` the driver's, where NULL is the default one.
#[test]
fn every_pointer_has_a_null_test() {
    let mut n_pointers = 0;
    for function in exported_functions() {
        for (name, kind) in &function.parameters {
            if !(kind.starts_with('*') || kind == "kvq_is_live_fn") || name == "user" || name == "stream" {
                continue;
            }
            n_pointers += 1;
            let named = function.body.contains(&format!("\"{name}\""));
            let by_hand = function.body.contains(&format!("{name}.is_null()"));
            let released = function.body.contains(&format!("release({name})"));
            let callback = function.body.contains(&format!("Some({name}) = {name} else"));
            let helper = ["write_ranges(", "attend_options("].iter().any(|helper| function.body.contains(helper));
            assert!(
                named || by_hand || released || callback || helper,
                "{}: {} does not test {name} for NULL",
                function.file,
                function.name
            );
        }
    }
    assert!(n_pointers > 50, "only {n_pointers} pointers found");
}

#[test]
fn every_exported_function_is_described() {
    for function in exported_functions() {
        assert!(function.has_comment, "{}: {} has no comment for the header", function.file, function.name);
    }
}

/// Three lists of the same functions: the sources, the header, and the symbols that ctest compares the library with.
#[test]
fn sources_header_and_symbol_list_name_the_same_functions() {
    let sources: BTreeSet<String> = exported_functions().into_iter().map(|function| function.name).collect();
    let header = include_str!(concat!(env!("OUT_DIR"), "/kvq.h"));
    let in_header = |name: &&String| header.contains(&format!("{name}("));
    assert_eq!(sources.iter().filter(in_header).count(), sources.len());
    let symbols = Path::new(env!("CARGO_MANIFEST_DIR")).join("c_tests/symbols.txt");
    let symbols = fs::read_to_string(symbols).expect("c_tests/symbols.txt is there");
    assert_eq!(symbols.lines().map(str::to_owned).collect::<BTreeSet<_>>(), sources);
}
