//! Devices by name.
#![forbid(unsafe_code)]

use super::Device;
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
