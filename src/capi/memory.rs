//! How the operating system holds a cache's memory.

use std::ffi::c_void;

use super::{check, check_len, guard};
use crate::error::Status;

/// Asks the operating system to hold `n_bytes` of memory, such as the keys and values of all layers, in large pages: a
/// decoded token reads all of it, and with pages of 4 KiB it waits for address translations. Call it before the memory
/// is first written to: what has small pages already may keep them. Contents are kept.
///
/// A hint: KVQ_STATUS_OK also where the system does not follow it. Give one range for many small buffers, since large
/// pages (2 MiB on x86-64) must lie inside it.
#[no_mangle]
pub unsafe extern "C" fn kvq_use_large_pages(memory: *mut c_void, n_bytes: usize) -> Status {
    guard(|| {
        let memory = memory.cast::<u8>().cast_const();
        check(memory, "memory")?;
        check_len::<u8>(n_bytes, "memory")?;
        advise(memory, n_bytes);
        Ok(())
    })
}

/// Only the system looks at the memory, and at whole pages of it.
pub(super) fn advise(memory: *const u8, n_bytes: usize) {
    #[cfg(target_os = "linux")]
    {
        const PAGE: usize = 4096;
        let skipped = memory.align_offset(PAGE).min(n_bytes);
        let whole = (n_bytes - skipped) / PAGE * PAGE;
        // SAFETY: this advice changes neither contents nor access, whatever lies there.
        unsafe { libc::madvise(memory.wrapping_add(skipped).cast_mut().cast(), whole, libc::MADV_HUGEPAGE) };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (memory, n_bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_keeps_what_it_holds() {
        // More than two large pages, so that at least one lies inside.
        let mut bytes: Vec<u8> = (0..5usize << 20).map(|i| ((i * i) >> 7) as u8).collect();
        let copy = bytes.clone();
        for (start, n) in [(0, bytes.len()), (1, bytes.len() - 1), (5000, 100), (0, 0)] {
            // SAFETY: memory of this test.
            assert_eq!(unsafe { kvq_use_large_pages(bytes[start..].as_mut_ptr().cast(), n) }, Status::Ok);
            assert!(bytes == copy);
        }
    }
}
