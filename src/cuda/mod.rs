//! Devices: the same attention and the same stored bytes on a GPU, in memory that the host owns there.
//!
//! A call checks its arguments here, fills in a struct of plain numbers and device pointers ([`desc`]) and launches one
//! kernel on the caller's stream. It reads nothing that a pointer names, allocates nothing and waits for nothing; grids are
//! sized by capacity and counts are read on the device, so that calls can be captured in CUDA graphs.
//!
//! Kernels are in `*.cu` beside this file. `build.rs` compiles them with nvcc (feature `cuda`), and with the host's compiler
//! on top of `emulate.h` (feature `cuda-emulation`), which is how they are tested where there is no GPU.

pub(crate) mod attend;
pub(crate) mod dequantize;
pub mod desc;
#[cfg(feature = "cuda")]
mod driver;
#[cfg(feature = "cuda-emulation")]
mod emulated;
#[cfg(test)]
pub(crate) mod lab;
pub(crate) mod store;

#[cfg(test)]
mod tests;

use std::ffi::c_void;
use std::fmt::Debug;

use desc::{LayerDesc, PlanDesc, RotationDesc};

use crate::error::{Error, Result, Status};
use crate::layout::Layout;
use crate::plan;

/// A device that kernels run on. Immutable; may be shared by threads.
#[derive(Debug)]
pub struct Device {
    runner: Box<dyn Runner>,
}

/// Threads and memory of one launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Launch {
    pub(crate) blocks: [u32; 3],
    pub(crate) threads: u32,
    pub(crate) shared_bytes: u32,
}

/// What the host has to know of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    pub(crate) n_multiprocessors: u32,
    /// Most dynamic shared memory of a block.
    pub(crate) shared_bytes: u32,
    /// Ten times the major plus the minor compute capability.
    pub(crate) capability: u32,
}

pub(crate) trait Runner: Debug + Send + Sync {
    fn limits(&self) -> Limits;

    /// Enqueues a kernel, which takes one struct, on a stream.
    ///
    /// # Safety
    /// `params` points to the struct that the kernel takes; what it names stays valid until the stream has passed the
    /// kernel, and nobody else writes what it writes meanwhile.
    unsafe fn launch(&self, kernel: &str, launch: Launch, params: *mut c_void, stream: *mut c_void) -> Result<()>;
}

impl Device {
    /// Opens a device by name: `cuda:` and the number that the driver gives it.
    ///
    /// # Errors
    ///
    /// [`Status::InvalidArgument`] for other names and numbers without a device, [`Status::Unsupported`] if the library was
    /// built without CUDA, there is no driver, or the kernels do not run on the device.
    pub fn open(name: &str) -> Result<Device> {
        #[cfg(feature = "cuda-emulation")]
        if name == "emulated:0" {
            return Ok(Device { runner: Box::new(emulated::Emulated::open()?) });
        }
        let Some(index) = name.strip_prefix("cuda:").and_then(|n| n.parse::<u32>().ok()) else {
            return Err(Error::invalid(format!("'{name}' is not a device: use cuda:0, cuda:1, ...")));
        };
        open_cuda(index)
    }

    pub(crate) fn limits(&self) -> Limits {
        self.runner.limits()
    }
}

#[cfg(feature = "cuda")]
fn open_cuda(index: u32) -> Result<Device> {
    Ok(Device { runner: Box::new(driver::Cuda::open(index)?) })
}

#[cfg(not(feature = "cuda"))]
fn open_cuda(_index: u32) -> Result<Device> {
    Err(unsupported("this library was built without CUDA: build it with --features cuda, or patches/build.sh --cuda"))
}

/// What a call names besides its layer: an `AttendCall` or a `StoreCall`, whose workspace and blocks are not filled in yet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call<T> {
    pub(crate) call: T,
    pub(crate) rotation: RotationDesc,
    pub(crate) n_streams: u32,
    /// Integers of each stream's plan.
    pub(crate) plan_len: usize,
    /// Address of [`Layout::profile`] on the device; 0 for layers without one.
    pub(crate) profile: u64,
}

impl<T> Call<T> {
    /// The layer with its profile.
    fn layer(&self, layout: &Layout) -> LayerDesc {
        LayerDesc { profile: self.profile, ..layout.describe() }
    }
}

/// Where the arrays of a plan of `n_tokens` are.
///
/// # Errors
///
/// [`Status::InvalidArgument`] if `given` integers are fewer than it has.
fn plan_of(layout: &Layout, n_tokens: u32, given: usize) -> Result<PlanDesc> {
    let shape = (n_tokens as usize, layout.n_slots(), layout.n_cells(), layout.page());
    let need = plan::plan_len(shape.0, shape.1, shape.2, shape.3);
    if given < need {
        return Err(Error::invalid(format!(
            "a plan of {n_tokens} tokens for this layout has {need} integers, plan_len is {given}"
        )));
    }
    Ok(plan::describe(shape.0, shape.1, shape.2, shape.3))
}

/// An error of a call that this build, device or recipe has no kernel for.
pub(crate) fn unsupported(message: impl Into<String>) -> Error {
    Error::new(Status::Unsupported, message)
}
