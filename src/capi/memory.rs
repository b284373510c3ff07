//! How the operating system holds a cache's memory.

use std::ffi::c_void;

use super::{guard, slice};
use crate::error::Status;

/// Asks the operating system to hold `n_bytes` of memory, such as the keys and values of all layers, in large pages: a
/// decoded token reads all of it, and with pages of 4 KiB it waits for address translations. Contents are kept; other
/// threads may use the memory meanwhile. Memory already written to is moved before this returns.
///
/// A hint: KVQ_STATUS_OK also where the system does not follow it. Give one range for many small buffers, since large
/// pages (2 MiB on x86-64) must lie inside it.
#[no_mangle]
pub unsafe extern "C" fn kvq_use_large_pages(memory: *mut c_void, n_bytes: usize) -> Status {
    guard(|| {
        // SAFETY: as many bytes as the header requires. Only their address and number are used.
        let bytes = unsafe { slice(memory.cast::<u8>().cast_const(), n_bytes, "memory") }?;
        advise(bytes, true);
        Ok(())
    })
}

/// `in_use`: the memory has been written to. Otherwise only pages to come are large, and none is made now.
pub(super) fn advise(bytes: &[u8], in_use: bool) {
    #[cfg(target_os = "linux")]
    {
        /// Linux 6.1: make pages large now.
        const MADV_COLLAPSE: libc::c_int = 25;
        const PAGE: usize = 4096;
        let start = bytes.as_ptr().align_offset(PAGE).min(bytes.len());
        let whole = &bytes[start..];
        let whole = &whole[..whole.len() / PAGE * PAGE];
        let advice = if in_use { &[libc::MADV_HUGEPAGE, MADV_COLLAPSE][..] } else { &[libc::MADV_HUGEPAGE] };
        for &advice in advice {
            // SAFETY: whole pages of memory that is there; neither advice changes what they hold.
            unsafe { libc::madvise(whole.as_ptr().cast_mut().cast(), whole.len(), advice) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (bytes, in_use);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_keeps_what_it_holds() {
        // More than two large pages, so that at least one lies inside.
        let bytes: Vec<u8> = (0..5usize << 20).map(|i| ((i * i) >> 7) as u8).collect();
        let copy = bytes.clone();
        for in_use in [false, true] {
            advise(&bytes[1..], in_use);
            advise(&bytes[..100], in_use);
            assert!(bytes == copy);
        }
    }
}
