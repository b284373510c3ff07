//! Of build.rs: compiles the kernels beside this file.
//!
//! | variable | |
//! |---|---|
//! | `NVCC`, `CUDA_PATH`, `PATH` | where nvcc is: itself, `$CUDA_PATH/bin`, a folder of `PATH` |
//! | `KVQ_CUDA_ARCHS` | compute capabilities to compile for, such as `80 90`; the newest also as PTX. Default: all |
//! | `CXX` | the host's compiler, for feature `cuda-emulation` |

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

const ARCHS: &str = "75 80 86 89 90 100 120";

fn out_dir() -> PathBuf {
    PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"))
}

fn source_dir() -> PathBuf {
    PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR")).join("src/cuda")
}

/// Renders the structs of desc.rs for device code.
pub fn render_desc() {
    let source = source_dir().join("desc.rs");
    println!("cargo:rerun-if-changed={}", source.display());
    let mut config = cbindgen::Config { language: cbindgen::Language::Cxx, ..cbindgen::Config::default() };
    config.namespace = Some("kvq".into());
    config.pragma_once = true;
    config.no_includes = true;
    config.sys_includes = vec!["stddef.h".into(), "stdint.h".into()];
    config.constant.allow_static_const = true;
    config.constant.allow_constexpr = true;
    for name in ["SideDesc", "LayerDesc", "FrameDesc", "AttendParams", "DequantizeParams", "StoreParams"] {
        config.export.include.push(name.into());
    }
    let trailer = "static_assert(sizeof(kvq::LayerDesc) == kvq::LAYER_DESC_BYTES, \"as Rust has it\");\n\
                   static_assert(sizeof(kvq::FrameDesc) == kvq::FRAME_DESC_BYTES, \"as Rust has it\");";
    let header = cbindgen::Builder::new().with_config(config).with_src(source).with_trailer(trailer).generate();
    header.expect("desc.rs is readable for cbindgen").write_to_file(out_dir().join("kvq_desc.h"));
}

/// The sources of kernels; everything else in the folder is included by them.
fn sources() -> Vec<PathBuf> {
    let files = |folder: &Path| -> Vec<PathBuf> {
        let entries = fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
        entries.map(|entry| entry.expect("a folder can be read to its end").path()).collect()
    };
    let mut all = files(&source_dir());
    all.sort();
    let is = |path: &Path, ends: &[&str]| path.extension().is_some_and(|e| ends.iter().any(|end| e == *end));
    for path in all.iter().filter(|path| is(path, &["cu", "cuh", "h", "cpp"])) {
        println!("cargo:rerun-if-changed={}", path.display());
    }
    all.retain(|path| is(path, &["cu"]));
    all
}

fn stem(source: &Path) -> String {
    source.file_stem().expect("a source has a name").to_string_lossy().into_owned()
}

fn nvcc() -> PathBuf {
    for name in ["NVCC", "CUDA_PATH", "KVQ_CUDA_ARCHS"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    if let Some(nvcc) = env::var_os("NVCC") {
        return nvcc.into();
    }
    let mut folders: Vec<PathBuf> =
        env::var_os("CUDA_PATH").map(|path| PathBuf::from(path).join("bin")).into_iter().collect();
    folders.extend(env::split_paths(&env::var_os("PATH").unwrap_or_default()));
    folders.push("/usr/local/cuda/bin".into());
    folders.into_iter().map(|folder| folder.join("nvcc")).find(|nvcc| nvcc.is_file()).unwrap_or_else(|| {
        panic!("feature cuda needs nvcc (CUDA 12.8 or later): set NVCC or CUDA_PATH, or run patches/nvcc.sh, which fetches one")
    })
}

/// Compiles every kernel for every architecture and writes `cuda_modules.rs`, which embeds them.
pub fn with_nvcc() {
    let (nvcc, out) = (nvcc(), out_dir());
    let archs = env::var("KVQ_CUDA_ARCHS").unwrap_or(ARCHS.into());
    let archs: Vec<&str> = archs.split_whitespace().collect();
    let newest = archs.last().unwrap_or_else(|| panic!("KVQ_CUDA_ARCHS is empty: name some of {ARCHS}"));
    let mut modules = String::new();
    for source in sources() {
        let image = out.join(format!("{}.fatbin", stem(&source)));
        let mut command = Command::new(&nvcc);
        command.args(["-fatbin", "-std=c++17", "-O3", "--threads", "2", "-Xptxas", "-warn-spills", "-I"]).arg(&out);
        for arch in &archs {
            command.arg(format!("-gencode=arch=compute_{arch},code=sm_{arch}"));
        }
        if ["store", "dequantize"].contains(&stem(&source).as_str()) {
            // Bytes have to be those of the CPU, which rounds a product before it adds.
            command.arg("-fmad=false");
        }
        command.arg(format!("-gencode=arch=compute_{newest},code=compute_{newest}"));
        run(command.arg(&source).arg("-o").arg(&image));
        modules += &format!("    ({:?}, include_bytes!({:?})),\n", stem(&source), image);
    }
    let text = format!("static MODULES: &[(&str, &[u8])] = &[\n{modules}];\n");
    fs::write(out.join("cuda_modules.rs"), text).expect("OUT_DIR can be written");
}

/// Compiles the kernels for the CPU on top of emulate.h.
pub fn for_emulation() {
    println!("cargo:rerun-if-env-changed=CXX");
    let cxx = env::var_os("CXX").unwrap_or("g++".into());
    let (out, mut objects, mut running) = (out_dir(), Vec::new(), Vec::new());
    for source in sources().into_iter().chain([source_dir().join("emulate.cpp")]) {
        let object = out.join(format!("{}.emulated.o", stem(&source)));
        let mut command = Command::new(&cxx);
        command.args([
            "-x",
            "c++",
            "-std=c++17",
            "-O2",
            "-fPIC",
            "-Wall",
            "-Wextra",
            "-Wno-unknown-pragmas",
            "-DKVQ_EMULATE",
        ]);
        command.args(["-ffp-contract=off", "-mf16c", "-fno-exceptions", "-I"]).arg(&out).arg("-I").arg(source_dir());
        command.arg("-c").arg(&source).arg("-o").arg(&object);
        // All at once: one of them takes as long as the others.
        let child = start(&mut command);
        running.push((command, child));
        objects.push(object);
    }
    running.into_iter().for_each(|(command, child)| finish(&command, child));
    let library = out.join("libkvq_emulated.so");
    run(Command::new(&cxx).arg("-shared").args(&objects).arg("-o").arg(&library));
}

fn run(command: &mut Command) {
    let child = start(command);
    finish(command, child);
}

fn start(command: &mut Command) -> Child {
    command.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}"))
}

fn finish(command: &Command, mut child: Child) {
    let status = child.wait().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(status.success(), "{command:?} failed: {status}");
}
