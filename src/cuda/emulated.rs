//! The kernels compiled for the CPU on top of `emulate.h`: slow, and with no more parallelism than one thread, but the same
//! source. For tests.

use std::ffi::{c_char, c_int, c_void, CString};

use super::{Launch, Limits, Runner};
use crate::error::{Error, Result, Status};

extern "C" {
    /// Runs a kernel to its end; 0 if there is none of that name, -1 if its threads waited for each other in vain.
    fn kvq_emulated_launch(
        kernel: *const c_char,
        blocks_x: u32,
        blocks_y: u32,
        threads: u32,
        shared_bytes: u32,
        params: *const c_void,
    ) -> c_int;
}

#[derive(Debug)]
pub(super) struct Emulated;

impl Runner for Emulated {
    fn limits(&self) -> Limits {
        // Few multiprocessors: work is split all the same, and no time goes into empty blocks. 64 KiB is what the smallest
        // supported device has.
        Limits { n_multiprocessors: 4, shared_bytes: 64 << 10, capability: 80 }
    }

    unsafe fn launch(&self, kernel: &str, launch: Launch, params: *mut c_void, _stream: *mut c_void) -> Result<()> {
        let name = CString::new(kernel).map_err(|_| Error::new(Status::Internal, "a kernel's name has a zero"))?;
        let Launch { blocks: [x, y], threads, shared_bytes } = launch;
        // SAFETY: the caller answers for params; the name ends with a zero.
        match unsafe { kvq_emulated_launch(name.as_ptr(), x, y, threads, shared_bytes, params) } {
            1 => Ok(()),
            0 => Err(Error::new(Status::Internal, format!("no kernel {kernel}"))),
            _ => Err(Error::new(Status::Internal, format!("{kernel}: threads wait at different barriers"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::recent::exp_of_negative;

    extern "C" {
        /// `exp_of_negative` of quantizer.cuh.
        fn kvq_emulated_exp_of_negative(x: f32) -> f32;
    }

    /// Every 257th number from -0 to minus infinity.
    #[test]
    fn exponentials_have_the_same_bits_as_in_device_code() {
        for x in (0x8000_0000u32..=0xff80_0000).step_by(257).chain([0, 0xff80_0000]).map(f32::from_bits) {
            // SAFETY: reads and writes no memory.
            let got = unsafe { kvq_emulated_exp_of_negative(x) };
            assert_eq!(got.to_bits(), exp_of_negative(x).to_bits(), "{x}");
        }
    }
}
