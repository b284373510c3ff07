//! Renders the C header from `src/capi` into OUT_DIR and compiles the GPU's kernels, if their feature is on. It writes
//! nothing into the source tree: a test compares the header with the committed `include/kvq.h`.

#[path = "src/cuda/compile.rs"]
mod compile;

use std::env;
use std::path::PathBuf;

/// Sources of the header, in the order in which their functions appear in it.
const HEADER_SOURCES: [&str; 20] = [
    "src/capi/version.rs",
    "src/error.rs",
    "src/capi/status.rs",
    "src/capi/recipe.rs",
    "src/shape.rs",
    "src/choose.rs",
    "src/capi/layout.rs",
    "src/capi/memory.rs",
    "src/location.rs",
    "src/capi/planner.rs",
    "src/capi/shift.rs",
    "src/capi/profile.rs",
    "src/capi/calibration.rs",
    "src/capi/attention.rs",
    "src/capi/store.rs",
    "src/learned.rs",
    "src/capi/learned.rs",
    "src/capi/cache.rs",
    "src/capi/checksum.rs",
    "src/capi/device.rs",
];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=src/capi/cbindgen.toml");
    for source in HEADER_SOURCES {
        println!("cargo:rerun-if-changed={source}");
    }
    // Without a soname, programs that link by path would remember that path.
    if env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("linux") {
        println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libkvq.so");
    }
    render_header();
    println!("cargo:rerun-if-changed=src/cuda/compile.rs");
    compile::render_desc();
    if env::var_os("CARGO_FEATURE_CUDA").is_some() {
        compile::with_nvcc();
    }
    if env::var_os("CARGO_FEATURE_CUDA_EMULATION").is_some() {
        compile::for_emulation();
    }
}

fn render_header() {
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(root.join("src/capi/cbindgen.toml")).expect("cbindgen.toml is readable");
    let mut builder = cbindgen::Builder::new().with_config(config).with_after_include(version_macros());
    for source in HEADER_SOURCES {
        builder = builder.with_src(root.join(source));
    }
    let header = builder.generate().expect("src/capi is readable for cbindgen");
    header.write_to_file(PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("kvq.h"));
}

/// Cargo.toml is the only place that knows the version.
fn version_macros() -> String {
    let part = |name: &str| env::var(format!("CARGO_PKG_{name}")).expect("cargo sets the package version");
    format!(
        "\n// Version of the library this header belongs to.\n#define KVQ_VERSION \"{}\"\n\
         #define KVQ_VERSION_MAJOR {}\n#define KVQ_VERSION_MINOR {}\n#define KVQ_VERSION_PATCH {}\n",
        part("VERSION"),
        part("VERSION_MAJOR"),
        part("VERSION_MINOR"),
        part("VERSION_PATCH")
    )
}
