//! Memory of a device, for tests: the library itself works on what the host owns.

use std::ffi::c_void;
use std::mem::{size_of, size_of_val};

use super::Device;
use crate::error::Status;

/// A device, and where its memory is.
pub(crate) struct Lab {
    device: Device,
    name: &'static str,
}

/// Some of it.
pub(crate) struct Buffer {
    pointer: *mut c_void,
    bytes: usize,
    is_cuda: bool,
}

impl Lab {
    /// Every device of this build and machine; says so where a GPU is not there, and fails where one cannot be used that is.
    pub(crate) fn all() -> Vec<Lab> {
        let names = [("emulated:0", cfg!(feature = "cuda-emulation")), ("cuda:0", cfg!(feature = "cuda"))];
        let mut labs = Vec::new();
        for (name, _) in names.into_iter().filter(|(_, built)| *built) {
            match Device::open(name) {
                Ok(device) => labs.push(Lab { device, name }),
                Err(error) if error.status() == Status::Unsupported => println!("skipped on {name}: {error}"),
                Err(error) => panic!("{name}: {error}"),
            }
        }
        labs
    }

    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    fn is_cuda(&self) -> bool {
        self.name != "emulated:0"
    }

    /// A copy on the device, 256-byte aligned.
    pub(crate) fn upload<T: Copy>(&self, values: &[T]) -> Buffer {
        let (bytes, is_cuda) = (size_of_val(values), self.is_cuda());
        let pointer = memory::alloc(is_cuda, bytes.max(1));
        // SAFETY: pointer has room for as many bytes.
        unsafe { memory::write(is_cuda, pointer, values.as_ptr().cast(), bytes) };
        Buffer { pointer, bytes, is_cuda }
    }

    /// What a buffer holds, once everything enqueued has run.
    pub(crate) fn download<T: Copy + Default>(&self, buffer: &Buffer) -> Vec<T> {
        let mut values = vec![T::default(); buffer.bytes / size_of::<T>()];
        // SAFETY: the vector has room for all of it.
        unsafe { memory::read(buffer.is_cuda, values.as_mut_ptr().cast(), buffer.pointer, buffer.bytes) };
        values
    }
}

impl Buffer {
    pub(crate) fn pointer(&self) -> *mut c_void {
        self.pointer
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: from `alloc`, freed once.
        unsafe { memory::free(self.is_cuda, self.pointer, self.bytes.max(1)) };
    }
}

mod memory {
    use std::alloc::Layout;
    use std::ffi::c_void;

    #[cfg(feature = "cuda")]
    use crate::cuda::driver::memory as cuda;
    #[cfg(not(feature = "cuda"))]
    mod cuda {
        use std::ffi::c_void;
        pub(super) fn alloc(_bytes: usize) -> *mut c_void {
            unreachable!("no device of this build is a GPU")
        }
        pub(super) unsafe fn copy(_to: *mut c_void, _from: *const c_void, _bytes: usize) {}
        pub(super) unsafe fn free(_pointer: *mut c_void) {}
    }

    fn layout(bytes: usize) -> Layout {
        Layout::from_size_align(bytes, 256).expect("buffers of tests fit")
    }

    pub(super) fn alloc(is_cuda: bool, bytes: usize) -> *mut c_void {
        if is_cuda {
            return cuda::alloc(bytes);
        }
        // SAFETY: not of size 0.
        unsafe { std::alloc::alloc(layout(bytes)).cast() }
    }

    /// # Safety
    /// Both have as many bytes.
    pub(super) unsafe fn write(is_cuda: bool, to: *mut c_void, from: *const c_void, bytes: usize) {
        // SAFETY: as promised.
        unsafe {
            match is_cuda {
                true => cuda::copy(to, from, bytes),
                false => std::ptr::copy_nonoverlapping(from.cast::<u8>(), to.cast(), bytes),
            }
        }
    }

    /// # Safety
    /// As for `write`.
    pub(super) unsafe fn read(is_cuda: bool, to: *mut c_void, from: *const c_void, bytes: usize) {
        // SAFETY: as promised.
        unsafe { write(is_cuda, to, from, bytes) }
    }

    /// # Safety
    /// From `alloc` with the same size, and not used again.
    pub(super) unsafe fn free(is_cuda: bool, pointer: *mut c_void, bytes: usize) {
        // SAFETY: as promised.
        unsafe {
            match is_cuda {
                true => cuda::free(pointer),
                false => std::alloc::dealloc(pointer.cast(), layout(bytes)),
            }
        }
    }
}
