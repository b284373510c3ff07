//! What a layer's memory says about how well its keys were packed.

use super::layout::kvq_layout;
use super::{check, guard, output, shared, slice};
use crate::codec::page::Side;
use crate::error::Status;
use crate::head::Head;
use crate::learned::KeyError;

/// Reads the error of a stream's packed keys from its key memory, kvq_layout_k_bytes. Takes some nanoseconds per head;
/// must not run beside kvq_store on the same memory.
#[no_mangle]
pub unsafe extern "C" fn kvq_layer_key_error(
    layout: *const kvq_layout,
    k_mem: *const u8,
    out: *mut KeyError,
) -> Status {
    guard(|| {
        check(k_mem, "k_mem")?;
        // SAFETY: a live layout, its memory and room for the result, as the header requires.
        let (layout, k_mem, out) = unsafe {
            let layout = &shared(layout, "layout")?.layout;
            (layout, slice(k_mem, layout.k_bytes(), "k_mem")?, output(out, "out")?)
        };
        let mut error = KeyError::default();
        for region in k_mem.chunks_exact(layout.head_bytes(Side::Key)) {
            error.add(&KeyError::read(Head::new(layout, Side::Key, region).learned()));
        }
        out.write(error);
        Ok(())
    })
}
