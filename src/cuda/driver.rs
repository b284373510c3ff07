//! CUDA's driver, loaded when it is first asked for: the only file that names cudarc.

use std::collections::HashMap;
use std::ffi::{c_void, CStr, CString};
use std::ptr;

use cudarc::driver::sys::{self, CUcontext, CUdevice, CUdevice_attribute, CUfunction, CUmodule, CUresult};

use super::{attend, dequantize, store, unsupported, Launch, Limits, Runner};
use crate::error::{Error, Result, Status};

// MODULES: name and fat binary of each file of kernels.
include!(concat!(env!("OUT_DIR"), "/cuda_modules.rs"));

/// A device with its primary context, which it shares with the CUDA runtime, and the kernels loaded there.
#[derive(Debug)]
pub(super) struct Cuda {
    device: CUdevice,
    context: CUcontext,
    modules: Vec<CUmodule>,
    functions: HashMap<&'static str, CUfunction>,
    limits: Limits,
    /// Kernels may start before those before them have ended, which hides what a start takes.
    starts_early: bool,
}

// SAFETY: handles of the driver API may be used by any thread; nothing here changes after `open`.
unsafe impl Send for Cuda {}
// SAFETY: as above.
unsafe impl Sync for Cuda {}

fn check(result: CUresult, what: &str) -> Result<()> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut text = ptr::null();
    // SAFETY: the driver is loaded, and writes the address of a static text or NULL.
    unsafe { sys::cuGetErrorString(result, &mut text) };
    let text = if text.is_null() {
        format!("error {}", result as u32)
    } else {
        // SAFETY: a static text that ends with a zero.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    };
    Err(unsupported(format!("CUDA, {what}: {text}")))
}

impl Cuda {
    pub(super) fn open(index: u32) -> Result<Self> {
        // SAFETY: only looks for the library. Any other call panics where there is none.
        if !unsafe { sys::is_culib_present() } {
            return Err(unsupported("there is no CUDA driver on this machine: libcuda.so.1 cannot be loaded"));
        }
        let mut n_devices = 0;
        let mut device = 0;
        // SAFETY: the driver is there; both calls write one integer.
        unsafe {
            check(sys::cuInit(0), "starting the driver")?;
            check(sys::cuDeviceGetCount(&mut n_devices), "counting devices")?;
        }
        if index >= n_devices as u32 {
            return Err(Error::invalid(format!(
                "there is no cuda:{index}: the driver has {n_devices} devices, from 0"
            )));
        }
        let mut context = ptr::null_mut();
        // SAFETY: the index is one of a device; the context is released when the device is dropped.
        unsafe {
            check(sys::cuDeviceGet(&mut device, index as i32), "opening the device")?;
            check(sys::cuDevicePrimaryCtxRetain(&mut context, device), "opening the device")?;
        }
        let limits = Limits { n_multiprocessors: 0, shared_bytes: 0, capability: 0 };
        let mut cuda =
            Cuda { device, context, modules: Vec::new(), functions: HashMap::new(), limits, starts_early: false };
        cuda.limits = cuda.read_limits()?;
        if cuda.limits.capability < 75 {
            let (major, minor) = (cuda.limits.capability / 10, cuda.limits.capability % 10);
            return Err(unsupported(format!(
                "cuda:{index} has compute capability {major}.{minor}: 7.5 or later is needed"
            )));
        }
        let _current = cuda.make_current()?;
        cuda.load()?;
        Ok(cuda)
    }

    fn read_limits(&self) -> Result<Limits> {
        let read = |attribute| -> Result<u32> {
            let mut value = 0;
            // SAFETY: writes one integer.
            check(unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, self.device) }, "asking the device")?;
            Ok(value as u32)
        };
        use CUdevice_attribute::*;
        Ok(Limits {
            n_multiprocessors: read(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            shared_bytes: read(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
            capability: read(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? * 10
                + read(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        })
    }

    fn load(&mut self) -> Result<()> {
        // For work on kernels without building the library anew: a folder of NAME.fatbin.
        let folder = std::env::var_os("KVQ_CUDA_KERNELS").map(std::path::PathBuf::from);
        for (name, image) in MODULES {
            let mut module = ptr::null_mut();
            let read = |folder: &std::path::PathBuf| std::fs::read(folder.join(format!("{name}.fatbin")));
            let other = folder.as_ref().map(read).transpose();
            let other = other.map_err(|e| Error::new(Status::Io, format!("KVQ_CUDA_KERNELS, {name}: {e}")))?;
            let image = other.as_deref().unwrap_or(image);
            // SAFETY: the image is a whole fat binary.
            let loaded = unsafe { sys::cuModuleLoadData(&mut module, image.as_ptr().cast()) };
            check(loaded, &format!("loading {name} (were kernels for this device built? see KVQ_CUDA_ARCHS)"))?;
            self.modules.push(module);
        }
        let mut can_wait = self.limits.capability >= 90;
        for kernel in attend::kernel_names().chain(dequantize::kernel_names()).chain(store::KERNELS) {
            let function = self.find(kernel)?;
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: a function of a module that stays loaded.
            let set = unsafe { sys::cuFuncSetAttribute(function, attribute, self.limits.shared_bytes as i32) };
            check(set, kernel)?;
            // Code for older devices, compiled anew for this one, does not wait.
            let (mut version, of_code) = (0, sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_PTX_VERSION);
            // SAFETY: writes one integer.
            check(unsafe { sys::cuFuncGetAttribute(&mut version, of_code, function) }, kernel)?;
            can_wait &= version >= 90;
            self.functions.insert(kernel, function);
        }
        self.starts_early = can_wait;
        Ok(())
    }

    fn find(&self, kernel: &str) -> Result<CUfunction> {
        let name = CString::new(kernel).map_err(|_| Error::new(Status::Internal, "a kernel's name has a zero"))?;
        // A kernel has the name of its file in its own: kvq_FILE_...
        let of_file = MODULES.iter().map(|(file, _)| kernel.starts_with(&format!("kvq_{file}_")));
        for (module, _) in self.modules.iter().zip(of_file).filter(|(_, is_of_file)| *is_of_file) {
            let mut function = ptr::null_mut();
            // SAFETY: a loaded module and a text that ends with a zero.
            let found = unsafe { sys::cuModuleGetFunction(&mut function, *module, name.as_ptr()) };
            if found == CUresult::CUDA_SUCCESS {
                return Ok(function);
            }
        }
        Err(Error::new(Status::Internal, format!("kernel {kernel} is not in any module")))
    }

    fn make_current(&self) -> Result<Current> {
        // SAFETY: a context that is retained; what is pushed is popped when the guard is dropped.
        check(unsafe { sys::cuCtxPushCurrent_v2(self.context) }, "entering the context")?;
        Ok(Current)
    }
}

/// The context is current on this thread while this lives.
struct Current;

impl Drop for Current {
    fn drop(&mut self) {
        let mut context = ptr::null_mut();
        // SAFETY: pops what `make_current` pushed.
        unsafe { sys::cuCtxPopCurrent_v2(&mut context) };
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        if let Ok(_current) = self.make_current() {
            for module in self.modules.drain(..) {
                // SAFETY: loaded by `load`; the caller has let all kernels finish before it frees a device.
                unsafe { sys::cuModuleUnload(module) };
            }
        }
        // SAFETY: retained by `open`.
        unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

impl Runner for Cuda {
    fn limits(&self) -> Limits {
        self.limits
    }

    unsafe fn launch(&self, kernel: &str, launch: Launch, params: *mut c_void, stream: *mut c_void) -> Result<()> {
        let function = self.functions.get(kernel).copied();
        let function = function.ok_or_else(|| Error::new(Status::Internal, format!("no kernel {kernel}")))?;
        let _current = self.make_current()?;
        let (Launch { blocks: [x, y, z], threads, shared_bytes }, mut params) = (launch, [params]);
        let (stream, params, extra) = (stream.cast(), params.as_mut_ptr(), ptr::null_mut());
        if !self.starts_early {
            // SAFETY: the kernel takes one struct, which params points to, and the caller answers for what it names.
            let launched =
                unsafe { sys::cuLaunchKernel(function, x, y, z, threads, 1, 1, shared_bytes, stream, params, extra) };
            return check(launched, kernel);
        }
        let mut early = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared_bytes,
            hStream: stream,
            attrs: &mut early,
            numAttrs: 1,
        };
        // SAFETY: as above; the kernel waits for what is before it in the stream, see `wait_for_stream` in device.cuh.
        check(unsafe { sys::cuLaunchKernelEx(&config, function, params, extra) }, kernel)
    }
}

/// Memory of the device whose primary context was retained last, for tests.
#[cfg(test)]
pub(super) mod memory {
    use std::ffi::c_void;

    use cudarc::driver::sys;

    fn enter() {
        let (mut context, mut current) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: the driver is loaded; the context stays retained, as tests end with the process.
        unsafe {
            sys::cuCtxGetCurrent(&mut current);
            if current.is_null() {
                sys::cuDevicePrimaryCtxRetain(&mut context, 0).result().unwrap();
                sys::cuCtxSetCurrent(context).result().unwrap();
            }
        }
    }

    pub(crate) fn alloc(bytes: usize) -> *mut c_void {
        enter();
        let mut pointer = 0;
        // SAFETY: writes an address.
        unsafe { sys::cuMemAlloc_v2(&mut pointer, bytes).result().unwrap() };
        pointer as *mut c_void
    }

    /// Between host and device, either way, after everything that was enqueued.
    ///
    /// # Safety
    /// Both have as many bytes.
    pub(crate) unsafe fn copy(to: *mut c_void, from: *const c_void, bytes: usize) {
        enter();
        // SAFETY: as promised; with unified addresses the driver knows which is which.
        unsafe {
            sys::cuCtxSynchronize().result().unwrap();
            sys::cuMemcpy(to as u64, from as u64, bytes).result().unwrap();
        }
    }

    /// # Safety
    /// From `alloc`, and not used again.
    pub(crate) unsafe fn free(pointer: *mut c_void) {
        enter();
        // SAFETY: as promised.
        unsafe { sys::cuMemFree_v2(pointer as u64) };
    }
}
