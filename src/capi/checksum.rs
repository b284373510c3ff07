//! The checksum of saved states, for whoever saves one of their own.

use super::{exclusive, guard, slice};
use crate::error::Status;

/// Takes `n_bytes` more into a checksum, which is 0 before the first: CRC-32C, as kvq_cache_save_memory uses it. However
/// the bytes are cut into pieces, the checksum is the same. Any thread may call it.
#[no_mangle]
pub unsafe extern "C" fn kvq_checksum_add(bytes: *const u8, n_bytes: usize, checksum: *mut u32) -> Status {
    guard(|| {
        // SAFETY: readable for n_bytes, as the header requires.
        let bytes = unsafe { slice(bytes, n_bytes, "bytes") }?;
        // SAFETY: the caller's own number, which no other thread uses meanwhile.
        let checksum = unsafe { exclusive(checksum, "checksum") }?;
        *checksum = crc32c::crc32c_append(*checksum, bytes);
        Ok(())
    })
}
