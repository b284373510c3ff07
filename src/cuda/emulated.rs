//! The kernels compiled for the CPU on top of `emulate.h`: slow, and with no more parallelism than one thread, but the same
//! source. For tests.

use std::ffi::{c_char, c_int, c_void, CStr, CString};
use std::mem::transmute;

use super::{Launch, Limits, Runner};
use crate::error::{Error, Result, Status};

/// Runs a kernel to its end; 0 if there is none of that name, -1 if its threads waited for each other in vain.
type LaunchFn = unsafe extern "C" fn(*const c_char, u32, u32, u32, u32, u32, *const c_void) -> c_int;

#[derive(Debug)]
pub(super) struct Emulated {
    launch: LaunchFn,
}

impl Emulated {
    /// Loads the kernels, from KVQ_EMULATION if that is set: then a change to a kernel needs no new build of the crate.
    pub(super) fn open() -> Result<Self> {
        let launch = Self::symbol(c"kvq_emulated_launch")?;
        // SAFETY: emulate.cpp defines it with this type.
        Ok(Self { launch: unsafe { transmute::<*mut c_void, LaunchFn>(launch) } })
    }

    fn symbol(symbol: &CStr) -> Result<*mut c_void> {
        let path = std::env::var("KVQ_EMULATION").unwrap_or(concat!(env!("OUT_DIR"), "/libkvq_emulated.so").into());
        let failed = |what: &str| Error::new(Status::Io, format!("{what} of {path} failed"));
        let name = CString::new(path.as_str()).map_err(|_| failed("the name"))?;
        // SAFETY: texts that end with a zero; the library stays loaded.
        let found = unsafe { libc::dlsym(libc::dlopen(name.as_ptr(), libc::RTLD_NOW), symbol.as_ptr()) };
        if found.is_null() {
            return Err(failed("loading"));
        }
        Ok(found)
    }
}

impl Runner for Emulated {
    fn limits(&self) -> Limits {
        // Few multiprocessors: work is split all the same, and no time goes into empty blocks.

        Limits { n_multiprocessors: 4, shared_bytes: 160 << 10, capability: 80 }
    }

    unsafe fn launch(&self, kernel: &str, launch: Launch, params: *mut c_void, _stream: *mut c_void) -> Result<()> {
        let name = CString::new(kernel).map_err(|_| Error::new(Status::Internal, "a kernel's name has a zero"))?;
        let Launch { blocks: [x, y, z], threads, shared_bytes } = launch;
        // SAFETY: the caller answers for params; the name ends with a zero.
        match unsafe { (self.launch)(name.as_ptr(), x, y, z, threads, shared_bytes, params) } {
            1 => Ok(()),
            0 => Err(Error::new(Status::Internal, format!("no kernel {kernel}"))),
            _ => Err(Error::new(Status::Internal, format!("{kernel}: threads wait at different barriers"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recent::exp_of_negative;

    /// Every 257th number from -0 to minus infinity.
    #[test]
    fn exponentials_have_the_same_bits_as_in_device_code() {
        let symbol = Emulated::symbol(c"kvq_emulated_exp_of_negative").unwrap();
        // SAFETY: store.cu defines it with this type; it reads and writes no memory.
        let in_device_code = unsafe { transmute::<*mut c_void, extern "C" fn(f32) -> f32>(symbol) };
        for x in (0x8000_0000u32..=0xff80_0000).step_by(257).chain([0, 0xff80_0000]).map(f32::from_bits) {
            assert_eq!(in_device_code(x).to_bits(), exp_of_negative(x).to_bits(), "{x}");
        }
    }
}
