//! Instruction sets, and the kernels that do not depend on a codec.

pub(crate) mod aligned;
pub(crate) mod exact;
pub mod isa;
pub(crate) mod loops;
pub(crate) mod scalar;
pub(crate) mod vector;

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;

use exact::Kernels;
use isa::IsaToken;

/// The kernels of an instruction set.
pub(crate) fn kernels(token: IsaToken) -> &'static dyn Kernels {
    isa::kernels_of!(token => dyn Kernels)
}
