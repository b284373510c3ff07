//! Buffers on lines of the cache: a vector of AVX-512 that is read or written across two of them takes twice as long, and in a buffer
//! from the allocator each one is.
#![forbid(unsafe_code)]

use std::ops::{Deref, DerefMut};

/// Bytes of a line.
const LINE: usize = 64;

/// What `T` holds, from the start of a line on.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
pub(crate) struct OnLines<T>(pub(crate) T);

/// A `Vec` that starts with a line.
#[derive(Debug, Default)]
pub(crate) struct Aligned<T> {
    room: Vec<T>,
    start: usize,
    len: usize,
}

impl<T: Copy + Default> Aligned<T> {
    /// As `Vec::clear`.
    pub(crate) fn clear(&mut self) {
        self.len = 0;
    }

    /// As `Vec::resize`.
    pub(crate) fn resize(&mut self, len: usize, value: T) {
        if self.start + len > self.room.len() {
            let spare = LINE / size_of::<T>();
            let mut room = vec![T::default(); len.max(2 * self.len) + spare];
            let start = room.as_ptr().align_offset(LINE).min(spare);
            room[start..start + self.len].copy_from_slice(self);
            (self.room, self.start) = (room, start);
        }
        if len > self.len {
            self.room[self.start + self.len..self.start + len].fill(value);
        }
        self.len = len;
    }

    /// As `Vec::extend_from_slice`.
    pub(crate) fn extend_from_slice(&mut self, from: &[T]) {
        let len = self.len;
        self.resize(len + from.len(), T::default());
        self[len..].copy_from_slice(from);
    }
}

impl<T> Deref for Aligned<T> {
    type Target = [T];

    #[inline(always)]
    fn deref(&self) -> &[T] {
        &self.room[self.start..self.start + self.len]
    }
}

impl<T> DerefMut for Aligned<T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.room[self.start..self.start + self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn behaves_as_a_vec_and_starts_with_a_line() {
        let (mut got, mut want) = (Aligned::<f32>::default(), Vec::new());
        assert!(got.is_empty());
        for (i, len) in [5, 3, 70, 64, 200, 0, 16, 1000].into_iter().enumerate() {
            got.resize(len, i as f32);
            want.resize(len, i as f32);
            got.extend_from_slice(&[0.5, -0.5]);
            want.extend_from_slice(&[0.5, -0.5]);
            assert_eq!(*got, *want);
            assert!((got.as_ptr() as usize).is_multiple_of(LINE));
            if i == 5 {
                got.clear();
                want.clear();
                assert_eq!(*got, *want);
            }
        }
        assert!((std::ptr::from_ref(&OnLines([0u8; 3])) as usize).is_multiple_of(LINE));
    }
}
