//! The kernels compiled for the CPU on top of `emulate.h`: slow, and with no more parallelism than one thread, but the same
//! source. For tests.

use std::ffi::{c_char, c_int, c_void, CStr, CString};
use std::mem::transmute;

use super::{Launch, Limits, Runner};
use crate::error::{Error, Result, Status};

/// Runs a kernel to its end; 0 if there is none of that name, -1 if its threads waited for each other in vain.
type LaunchFn = unsafe extern "C" fn(*const c_char, u32, u32, u32, u32, *const c_void) -> c_int;

#[derive(Debug)]
pub(super) struct Emulated {
    launch: LaunchFn,
}

impl Emulated {
    /// Loads the kernels, from KVQ_EMULATION if that is set: then a change to a kernel needs no new build of the crate.
    pub(super) fn open() -> Result<Self> {
        let path = std::env::var("KVQ_EMULATION").unwrap_or(concat!(env!("OUT_DIR"), "/libkvq_emulated.so").into());
        let failed = |what: &str| Error::new(Status::Io, format!("{what} of {path} failed"));
        let name = CString::new(path.as_str()).map_err(|_| failed("the name"))?;
        let symbol: &CStr = c"kvq_emulated_launch";
        // SAFETY: texts that end with a zero; the library stays loaded.
        let launch = unsafe { libc::dlsym(libc::dlopen(name.as_ptr(), libc::RTLD_NOW), symbol.as_ptr()) };
        if launch.is_null() {
            return Err(failed("loading"));
        }
        // SAFETY: emulate.cu defines it with this type.
        Ok(Self { launch: unsafe { transmute::<*mut c_void, LaunchFn>(launch) } })
    }
}

impl Runner for Emulated {
    fn limits(&self) -> Limits {
        // Few multiprocessors: work is split all the same, and no time goes into empty blocks.

        Limits { n_multiprocessors: 4, shared_bytes: 160 << 10, capability: 80 }
    }

    unsafe fn launch(&self, kernel: &str, launch: Launch, params: *mut c_void, _stream: *mut c_void) -> Result<()> {
        let name = CString::new(kernel).map_err(|_| Error::new(Status::Internal, "a kernel's name has a zero"))?;
        let Launch { blocks: [x, y], threads, shared_bytes } = launch;
        // SAFETY: the caller answers for params; the name ends with a zero.
        match unsafe { (self.launch)(name.as_ptr(), x, y, threads, shared_bytes, params) } {
            1 => Ok(()),
            0 => Err(Error::new(Status::Internal, format!("no kernel {kernel}"))),
            _ => Err(Error::new(Status::Internal, format!("{kernel}: threads wait at different barriers"))),
        }
    }
}
