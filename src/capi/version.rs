//! What is built and where it runs.

use std::ffi::{c_char, CString};

use once_cell::sync::OnceCell;

use super::guard_or;
use crate::simd::isa::IsaToken;

/// Rises with every change to a function or struct of this header. Compare it with kvq_abi_version() at start.
pub const KVQ_ABI_VERSION: u32 = 11;

/// The ABI version of the library that is loaded, to be compared with KVQ_ABI_VERSION.
#[no_mangle]
pub extern "C" fn kvq_abi_version() -> u32 {
    guard_or(0, || Ok(KVQ_ABI_VERSION))
}

/// The version of the library that is loaded, such as "0.1.0". A static text.
#[no_mangle]
pub extern "C" fn kvq_version() -> *const c_char {
    const TEXT: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    guard_or(TEXT.as_ptr().cast(), || Ok(TEXT.as_ptr().cast()))
}

/// The instruction set that the CPU code uses on this machine, such as "avx512" or "scalar". A static text; ""
/// (and a last error) if the environment variable KVQ_ISA asks for one that is not there.
#[no_mangle]
pub extern "C" fn kvq_isa() -> *const c_char {
    static TEXT: OnceCell<CString> = OnceCell::new();
    guard_or(c"".as_ptr(), || {
        let name = || Ok(CString::new(IsaToken::detect()?.isa().name()).unwrap_or_default());
        Ok(TEXT.get_or_try_init(name)?.as_ptr())
    })
}
