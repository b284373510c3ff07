//! Recipes: how a user names a way to compress.

use std::ffi::{c_char, CStr, CString};

use once_cell::sync::OnceCell;

use super::{check, guard, guard_or, output, release, shared, slice, slice_mut};
use crate::choose::{choose, CachedLayer};
use crate::error::{Error, Result, Status};
use crate::recipe::{help, presets, Recipe};

/// A parsed recipe: a method and its numbers.
///
/// It never changes after kvq_recipe_parse, so threads may share it.
pub struct kvq_recipe {
    pub(super) recipe: Recipe,
}

/// Whether a specification asks for no compressed cache: "off", "none", "0", "" or NULL (never set). Ask this before
/// kvq_recipe_parse, to which these are errors. Any thread may call it.
#[no_mangle]
pub unsafe extern "C" fn kvq_recipe_is_off(spec: *const c_char) -> bool {
    guard_or(false, || {
        if spec.is_null() {
            return Ok(true);
        }
        // SAFETY: spec is a C string, as the header requires.
        Ok(presets::is_off(unsafe { text(spec, "spec") }?))
    })
}

/// What a user may name, for people: presets and methods with their bits per value at two head sizes and a line on
/// each, keys and their defaults. A static text of several lines, each of which ends; "" (and a last error) if the
/// environment variable KVQ_ISA asks for an instruction set that is not there. Any thread may call it.
#[no_mangle]
pub extern "C" fn kvq_recipe_help() -> *const c_char {
    static TEXT: OnceCell<CString> = OnceCell::new();
    guard_or(c"".as_ptr(), || {
        let text = TEXT.get_or_try_init(|| Ok(CString::new(help::help()?).unwrap_or_default()))?;
        Ok(text.as_ptr())
    })
}

/// Writes what a specification stands for: a preset such as "on:window=256" becomes a method and its keys
/// ("kivi:...,window=256"), any other text stays as it is. The text is not checked; kvq_recipe_parse does that, and
/// gives the same recipe for both.
///
/// `spec` is NUL-terminated UTF-8. The result is NUL-terminated, in `buf` of `buf_size` bytes;
/// KVQ_STATUS_BUFFER_TOO_SMALL if it does not fit, 64 bytes more than `spec` has are always enough.
#[no_mangle]
pub unsafe extern "C" fn kvq_recipe_expand(spec: *const c_char, buf: *mut c_char, buf_size: usize) -> Status {
    guard(|| {
        // SAFETY: spec is a C string and buf has buf_size bytes, as the header requires.
        let (spec, buf) = unsafe { (text(spec, "spec")?, slice_mut(buf.cast::<u8>(), buf_size, "buf")?) };
        write_text(&presets::expand(spec), buf)
    })
}

/// Reads a recipe such as "on", "skvq" or "skvq:k=2,v=2,window=128". KVQ_STATUS_RECIPE and a text that names the key
/// and its allowed values if it cannot be understood.
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
/// it gives the same recipe, but for a profile that was read. KVQ_STATUS_BUFFER_TOO_SMALL if it does not fit; 512 bytes
/// and the length of a profile's path are always enough.
#[no_mangle]
pub unsafe extern "C" fn kvq_recipe_spec(recipe: *const kvq_recipe, buf: *mut c_char, buf_size: usize) -> Status {
    guard(|| {
        // SAFETY: recipe is a live recipe and buf has buf_size bytes, as the header requires.
        let (recipe, buf) = unsafe { (shared(recipe, "recipe")?, slice_mut(buf.cast::<u8>(), buf_size, "buf")?) };
        write_text(&recipe.recipe.spec(), buf)
    })
}

/// Makes the recipe that a cache of `n_cells` cells in each of `n_streams` streams carries out; `n_seq_max` sequences
/// share a single stream. In a small cache page, window, sink tokens and outlier tokens shrink by a fixed rule, so that
/// it stays smaller than float16. Use the result for kvq_planner_new, kvq_layout_new and everything else;
/// kvq_recipe_spec tells what changed. KVQ_STATUS_INVALID_ARGUMENT if a number is 0.
///
/// Free the result with kvq_recipe_free.
#[no_mangle]
pub unsafe extern "C" fn kvq_recipe_fit(
    recipe: *const kvq_recipe,
    n_cells: u32,
    n_streams: u32,
    n_seq_max: u32,
    out: *mut *mut kvq_recipe,
) -> Status {
    guard(|| {
        // SAFETY: a live recipe and room for a pointer, as the header requires.
        let (recipe, out) = unsafe { (&shared(recipe, "recipe")?.recipe, output(out, "out")?) };
        if n_cells == 0 || n_streams == 0 || n_seq_max == 0 {
            return Err(Error::invalid("a cache has at least one cell, one stream and one sequence"));
        }
        let recipe = recipe.fit(n_cells as usize, n_streams as usize, n_seq_max as usize);
        out.write(Box::into_raw(Box::new(kvq_recipe { recipe })));
        Ok(())
    })
}

/// Writes the specification that `spec` comes to in a context of the `n_layers` attention layers of `layers`: if it is
/// "auto:mem=4GiB" (KiB, MiB, GiB or TiB; keys may follow, ",window=512"), the best preset of which the memory of all
/// layers, in all streams, takes no more, and otherwise `spec` itself. Without layers it is the best there is to choose.
/// `note` gets a part of a sentence on what more memory would give, or "" where nothing was chosen.
///
/// KVQ_STATUS_RECIPE if nothing fits, and a text that names the least memory that would do, or if what follows "auto"
/// cannot be understood; as kvq_layout_new if a layer cannot be. `spec` is NUL-terminated UTF-8. Both results are
/// NUL-terminated: `buf` of `buf_size` bytes, for which those of `spec` and 64 more are always enough, and `note` of
/// `note_size` bytes, for which 128 are; KVQ_STATUS_BUFFER_TOO_SMALL if one does not fit. `layers` may be NULL if
/// `n_layers` is 0.
#[no_mangle]
pub unsafe extern "C" fn kvq_recipe_choose(
    spec: *const c_char,
    layers: *const CachedLayer,
    n_layers: usize,
    buf: *mut c_char,
    buf_size: usize,
    note: *mut c_char,
    note_size: usize,
) -> Status {
    guard(|| {
        // SAFETY: spec is a C string, layers has n_layers elements, buf and note have their sizes, as the header requires.
        let (spec, layers, buf, note) = unsafe {
            (
                text(spec, "spec")?,
                if n_layers == 0 { &[] } else { slice(layers, n_layers, "layers")? },
                slice_mut(buf.cast::<u8>(), buf_size, "buf")?,
                slice_mut(note.cast::<u8>(), note_size, "note")?,
            )
        };
        let choice = choose(spec, layers)?;
        check_room(&choice.spec, buf)?;
        write_text(&choice.note, note)?;
        write_text(&choice.spec, buf)
    })
}

/// Cells in a page of a recipe. 0 if `recipe` is NULL.
#[no_mangle]
pub unsafe extern "C" fn kvq_recipe_page(recipe: *const kvq_recipe) -> u32 {
    // SAFETY: recipe is NULL or a live recipe.
    guard_or(0, || Ok(unsafe { shared(recipe, "recipe") }?.recipe.page as u32))
}

/// Newest tokens of each sequence that a recipe keeps in float16. 0 if `recipe` is NULL.
#[no_mangle]
pub unsafe extern "C" fn kvq_recipe_window(recipe: *const kvq_recipe) -> u32 {
    // SAFETY: recipe is NULL or a live recipe.
    guard_or(0, || Ok(unsafe { shared(recipe, "recipe") }?.recipe.window as u32))
}

/// Copies `text` and a NUL to `buf`.
pub(super) fn write_text(text: &str, buf: &mut [u8]) -> Result<()> {
    check_room(text, buf)?;
    buf[..text.len()].copy_from_slice(text.as_bytes());
    buf[text.len()] = 0;
    Ok(())
}

fn check_room(text: &str, buf: &[u8]) -> Result<()> {
    if buf.len() <= text.len() {
        let message = format!("the text needs {} bytes, its buffer has {}", text.len() + 1, buf.len());
        return Err(Error::new(Status::BufferTooSmall, message));
    }
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
