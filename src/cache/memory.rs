//! Zeroed bytes on a 64-byte boundary.
#![forbid(unsafe_code)]

use crate::error::{Error, Result};

/// Pages and exact rows start on such a boundary, as the kernels expect.
const ALIGNMENT: usize = 64;

/// One side of one layer.
#[derive(Debug)]
pub(super) struct Memory {
    /// Longer than needed, so that an aligned part of the wanted length lies inside. Never grows, so it stays put.
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Memory {
    /// Zeros from the allocator, which need not touch them.
    pub(super) fn new(len: usize) -> Self {
        let bytes = vec![0u8; len + ALIGNMENT];
        let start = bytes.as_ptr().align_offset(ALIGNMENT);
        assert!(start <= ALIGNMENT, "bytes can be aligned");
        Self { bytes, start, len }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..][..self.len]
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..][..self.len]
    }
}

/// Fails if `n_bytes` cannot be had, where plain allocation would abort the process.
pub(super) fn check_available(n_bytes: usize) -> Result<()> {
    Vec::<u8>::new()
        .try_reserve_exact(n_bytes)
        .map_err(|_| Error::invalid(format!("the cache needs {n_bytes} bytes, which this machine does not give")))
}
