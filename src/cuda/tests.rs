//! Devices by name.
#![forbid(unsafe_code)]

use super::{attend, dequantize, store, Device};
use crate::error::Status;

#[test]
fn names_of_no_device_are_refused() {
    for name in ["", "cuda", "cuda:", "cuda:-1", "cuda:x", "metal", "cpu", "CUDA:0", "cuda:0 "] {
        let error = Device::open(name).map(|_| ()).unwrap_err();
        assert_eq!(error.status(), Status::InvalidArgument, "{name}");
        assert!(error.message().contains("cuda:0, cuda:1"), "{name}: {error}");
    }
}

/// No machine has a device of this number; what is wrong depends on what is there.
#[test]
fn a_device_that_is_not_there_is_told_from_one_that_cannot_be() {
    let error = Device::open("cuda:4000000000").map(|_| ()).unwrap_err();
    let wanted = if cfg!(feature = "cuda") {
        ["no CUDA driver", "no cuda:4000000000"]
    } else {
        ["without CUDA", "--features cuda"]
    };
    assert!(wanted.iter().any(|text| error.message().contains(text)), "{error}");
}

/// A module is looked for by the name of its file.
#[test]
fn kernels_are_named_after_their_files() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cuda");
    let files = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
    let sources: Vec<(String, String)> = files
        .filter(|path| path.extension().is_some_and(|e| e == "cu"))
        .map(|path| (path.file_stem().unwrap().to_str().unwrap().into(), std::fs::read_to_string(&path).unwrap()))
        .collect();
    for kernel in attend::kernel_names().chain(dequantize::kernel_names()).chain(store::KERNELS) {
        let is_in = |(stem, text): &&(String, String)| {
            kernel.starts_with(&format!("kvq_{stem}_")) && text.contains(&format!("({kernel},"))
        };
        assert_eq!(sources.iter().filter(is_in).count(), 1, "{kernel}");
    }
}
