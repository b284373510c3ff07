//! Recipes: how a user names a way to compress.

use std::ffi::{c_char, CStr};

use super::{check, guard, guard_or, output, release, shared, slice_mut};
use crate::error::{Error, Result, Status};
use crate::recipe::Recipe;

/// A parsed recipe: a method and its numbers.
///
/// It never changes after kvq_recipe_parse, so threads may share it.
pub struct kvq_recipe {
    pub(super) recipe: Recipe,
}

/// Reads a recipe such as "skvq" or "skvq:k=2,v=2,window=128". KVQ_STATUS_RECIPE and a text that names the key and its
/// allowed values if it cannot be understood.
///
/// `spec` is NUL-terminated UTF-8. Free the result with kvq_recipe_free.
#[no_mangle]
pub unsafe extern "C" fn kvq_recipe_parse(spec: *const c_char, out: *mut *mut kvq_recipe) -> Status {
    guard(|| {
        // SAFETY: spec is a C string and out has room for a pointer, as the header requires.
        let (spec, out) = unsafe { (text(spec, "spec")?, output(out, "out")?) };
        let recipe = Recipe::parse(spec)?;
        out.write(Box::into_raw(Box::new(kvq_recipe { recipe })));
        Ok(())
    })
}

/// Frees a recipe. NULL is ignored.
#[no_mangle]
pub unsafe extern "C" fn kvq_recipe_free(recipe: *mut kvq_recipe) {
    guard(|| {
        // SAFETY: recipe is NULL or came from kvq_recipe_parse and is not used again.
        unsafe { release(recipe) };
        Ok(())
    });
}

/// Writes the canonical spelling of a recipe, with every key, NUL-terminated, into `buf` of `buf_size` bytes. Parsing
/// it gives the same recipe. KVQ_STATUS_BUFFER_TOO_SMALL if it does not fit; 512 bytes are always enough.
#[no_mangle]
pub unsafe extern "C" fn kvq_recipe_spec(recipe: *const kvq_recipe, buf: *mut c_char, buf_size: usize) -> Status {
    guard(|| {
        // SAFETY: recipe is a live recipe and buf has buf_size bytes, as the header requires.
        let (recipe, buf) = unsafe { (shared(recipe, "recipe")?, slice_mut(buf.cast::<u8>(), buf_size, "buf")?) };
        write_text(&recipe.recipe.spec(), buf)
    })
}

/// Cells in a page of a recipe. 0 if `recipe` is NULL.
#[no_mangle]
pub unsafe extern "C" fn kvq_recipe_page(recipe: *const kvq_recipe) -> u32 {
    // SAFETY: recipe is NULL or a live recipe.
    guard_or(0, || Ok(unsafe { shared(recipe, "recipe") }?.recipe.page as u32))
}

/// Copies `text` and a NUL to `buf`.
pub(super) fn write_text(text: &str, buf: &mut [u8]) -> Result<()> {
    if buf.len() <= text.len() {
        let message = format!("the text needs {} bytes, buf has {}", text.len() + 1, buf.len());
        return Err(Error::new(Status::BufferTooSmall, message));
    }
    buf[..text.len()].copy_from_slice(text.as_bytes());
    buf[text.len()] = 0;
    Ok(())
}

/// # Safety
/// `pointer` is NULL or a NUL-terminated string that nobody changes during `'a`.
pub(super) unsafe fn text<'a>(pointer: *const c_char, name: &str) -> Result<&'a str> {
    check(pointer, name)?;
    // SAFETY: not NULL, and a C string by the caller's promise.
    let bytes = unsafe { CStr::from_ptr(pointer) };
    bytes.to_str().map_err(|_| Error::invalid(format!("{name} is not UTF-8")))
}
