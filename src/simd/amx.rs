//! AMX: products of tiles of bytes, in registers of 1 KiB that the operating system lends on request.
//!
//! As text, since stable Rust has no functions for these instructions.
#![allow(unsafe_code)]

use std::arch::asm;

/// Rows of a register.
const ROWS: usize = 16;
/// Bytes of a row.
const ROW: usize = 64;
/// Rows of `a` that [`multiply`] takes at most: two registers, so that each register of `b` that is read serves both.
pub(crate) const MAX_ROWS: usize = 2 * ROWS;
/// Columns of a product: two registers of sums.
pub(crate) const COLUMNS: usize = 2 * ROWS;

/// Whether the CPU has AMX for bytes and this process may use it. Asks the kernel for the permission, which all threads get and keep.
#[cfg(target_os = "linux")]
pub(crate) fn is_permitted() -> bool {
    use once_cell::sync::OnceCell;
    use std::arch::x86_64::{__cpuid, __cpuid_count};

    const REQUEST: libc::c_long = 0x1023;
    const TILE_DATA: libc::c_long = 18;
    /// AMX-TILE and AMX-INT8 in EDX of leaf 7.
    const BITS: u32 = 1 << 24 | 1 << 25;
    static IS_PERMITTED: OnceCell<bool> = OnceCell::new();
    *IS_PERMITTED.get_or_init(|| {
        // SAFETY: every CPU of 64 bits has the instruction, and the call only asks for a permission.
        #[allow(unused_unsafe)]
        unsafe {
            __cpuid(0).eax >= 7
                && __cpuid_count(7, 0).edx & BITS == BITS
                && libc::syscall(libc::SYS_arch_prctl, REQUEST, TILE_DATA) == 0
        }
    })
}

/// No other system is known here.
#[cfg(not(target_os = "linux"))]
pub(crate) fn is_permitted() -> bool {
    false
}

/// What `ldtilecfg` reads: the shape of each register.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Registers with shapes, until dropped.
pub(crate) struct Registers {
    /// Values of `k` that a product of two registers sums up.
    step: usize,
    has_lower: bool,
}

impl Registers {
    /// For products of `rows` rows, at most [`MAX_ROWS`], of `depth` values, a multiple of 32.
    ///
    /// # Safety
    ///
    /// [`is_permitted`] said so, and this thread has no other.
    #[inline]
    pub(crate) unsafe fn new(rows: usize, depth: usize) -> Self {
        assert!((1..=MAX_ROWS).contains(&rows) && depth > 0 && depth.is_multiple_of(ROW / 2));
        // Half of a register where the depth is no multiple of a whole one.
        let step = if depth.is_multiple_of(ROW) { ROW } else { ROW / 2 };
        let (upper, lower) = (rows.min(ROWS), rows.saturating_sub(ROWS));
        let mut shapes = Shapes { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        // Sums of the upper rows, the same of the lower rows, both halves of `a`, both halves of `b`.
        let all = [upper, upper, lower, lower, upper, lower, step / 4, step / 4];
        for (i, rows) in all.into_iter().enumerate().filter(|(_, rows)| *rows > 0) {
            shapes.rows[i] = rows as u8;
            shapes.row_bytes[i] = if (4..6).contains(&i) { step } else { ROW } as u16;
        }
        // SAFETY: the CPU has the instruction; what is read is a valid description.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &shapes, options(nostack, readonly, preserves_flags)) };
        Registers { step, has_lower: lower > 0 }
    }

    /// `sums[row * to + column] = sum_k a[row * from + k] * b[k / 4][column][k % 4]` for [`COLUMNS`] columns. `b` is without a sign, and
    /// with `UNSIGNED` `a` as well.
    ///
    /// # Safety
    ///
    /// These are the registers for `rows` and `depth`.
    #[inline]
    pub(crate) unsafe fn multiply<const UNSIGNED: bool>(
        &self,
        (rows, depth): (usize, usize),
        (a, from): (&[i8], usize),
        b: &[u8],
        (sums, to): (&mut [i32], usize),
    ) {
        assert!((rows - 1) * from + depth <= a.len() && depth * COLUMNS <= b.len());
        assert!((rows - 1) * to + COLUMNS <= sums.len());
        macro_rules! product {
            ($instruction:literal, $lower:literal) => {
                // SAFETY: the assertions cover what is read and written.
                unsafe {
                    asm!(
                        "tilezero tmm0", "tilezero tmm1",
                        concat!($lower, "tilezero tmm2"), concat!($lower, "tilezero tmm3"),
                        "2:",
                        "tileloadd tmm6, [{b} + {row_of_b}*1]",
                        "tileloadd tmm4, [{a} + {from}*1]",
                        concat!($instruction, " tmm0, tmm4, tmm6"),
                        "tileloadd tmm7, [{b} + {row_of_b}*1 + 64]",
                        concat!($instruction, " tmm1, tmm4, tmm7"),
                        concat!($lower, "tileloadd tmm5, [{a_lower} + {from}*1]"),
                        concat!($lower, $instruction, " tmm2, tmm5, tmm6"),
                        concat!($lower, $instruction, " tmm3, tmm5, tmm7"),
                        "add {a}, {step}",
                        "add {a_lower}, {step}",
                        "add {b}, {step_of_b}",
                        "dec {n}",
                        "jnz 2b",
                        "tilestored [{sums} + {to}*4], tmm0",
                        "tilestored [{sums} + {to}*4 + 64], tmm1",
                        concat!($lower, "tilestored [{sums_lower} + {to}*4], tmm2"),
                        concat!($lower, "tilestored [{sums_lower} + {to}*4 + 64], tmm3"),
                        a = inout(reg) a.as_ptr() => _,
                        a_lower = inout(reg) a.as_ptr().wrapping_add(ROWS * from) => _,
                        b = inout(reg) b.as_ptr() => _,
                        sums = in(reg) sums.as_mut_ptr(),
                        sums_lower = in(reg) sums.as_mut_ptr().wrapping_add(ROWS * to),
                        from = in(reg) from,
                        to = in(reg) to,
                        row_of_b = in(reg) 4 * COLUMNS,
                        step = in(reg) self.step,
                        step_of_b = in(reg) self.step * COLUMNS,
                        n = inout(reg) depth / self.step => _,
                        out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                        out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                        options(nostack),
                    )
                }
            };
        }
        match (UNSIGNED, self.has_lower) {
            (false, false) => product!("tdpbsud", "#"),
            (false, true) => product!("tdpbsud", ""),
            (true, false) => product!("tdpbuud", "#"),
            (true, true) => product!("tdpbuud", ""),
        }
    }
}

impl Drop for Registers {
    /// Gives them back, so that switching threads does not save them.
    #[inline]
    fn drop(&mut self) {
        // SAFETY: whoever has one has AMX.
        unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) };
    }
}
