//! The self-contained cache.

use std::ffi::c_char;
use std::path::PathBuf;

use super::attention::optional;
use super::memory::advise;
use super::recipe::kvq_recipe;
use super::shift::is_interleaved;
use super::{exclusive, guard, guard_or, output, product, release, shared, slice, slice_mut};
use crate::cache::{AttendOptions, Cache, CacheParams, Rope};
use crate::error::{Error, Result, Status};
use crate::shape::Shape;

/// Compressed keys and values of all layers of a model, for programs without llama.cpp.
///
/// One step of a model is kvq_cache_begin, kvq_cache_attend once for each layer in any order, kvq_cache_end. Between
/// steps sequences can be removed, copied, kept and shifted, and the cache can be saved and loaded.
///
/// Not thread-safe: one thread at a time. Work is spread over threads inside. It does not refer to the recipe it was
/// made from.
pub struct kvq_cache {
    cache: Cache,
}

/// How stored keys were rotated (RoPE): pair i of the first n_rot values of a head was turned by the angle
/// pos * freq_scale * freq_base^(-2 i / n_rot).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kvq_rope {
    /// Values that take part: even, at most head_dim_k.
    pub n_rot: u32,
    /// Base of the frequencies, such as 10000.
    pub freq_base: f32,
    /// Factor on positions; 1 unless positions are interpolated.
    pub freq_scale: f32,
    /// 0: pairs are (i, i + n_rot / 2), as in GPT-NeoX; 1: pairs are neighbours (2i, 2i + 1).
    pub interleaved: u32,
}

/// What a cache is made for.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kvq_cache_params {
    /// Shape of every layer.
    pub shape: Shape,
    /// Layers with keys and values of their own.
    pub n_layers: u32,
    /// Tokens that fit.
    pub n_cells: u32,
    /// Sequences, numbered from 0: 1 to 64.
    pub n_seq_max: u32,
    /// Threads to use at most; 0: one per core. Results of different thread counts may differ by rounding.
    pub n_threads: u32,
    /// How keys are rotated, so that kvq_cache_seq_shift can turn them; NULL: shifts leave the keys alone. Read only by
    /// kvq_cache_new.
    pub rope: *const kvq_rope,
}

/// How one layer attends. All zeros are the defaults.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kvq_cache_attend_options {
    /// Factor on the scores. 0: 1/sqrt(head_dim_k).
    pub scale: f32,
    /// Soft cap: scores become softcap * tanh(score / softcap). 0: none.
    pub softcap: f32,
    /// ALiBi: largest slope exponent, as in ggml. 0: none.
    pub max_bias: f32,
    /// Sliding window: newest keys visible, the token's own included. 0: all.
    pub n_swa: u32,
    /// Learned sink logits, float [n_heads], or NULL.
    pub sink_logits: *const f32,
}

/// Makes an empty cache, with the recipe fitted to its size (kvq_recipe_fit). All its memory is reserved here. Free it
/// with kvq_cache_free.
#[no_mangle]
pub unsafe extern "C" fn kvq_cache_new(
    recipe: *const kvq_recipe,
    params: *const kvq_cache_params,
    out: *mut *mut kvq_cache,
) -> Status {
    guard(|| {
        // SAFETY: live objects and room for a pointer, as the header requires.
        let (recipe, params, out) =
            unsafe { (shared(recipe, "recipe")?, shared(params, "params")?, output(out, "out")?) };
        let rope = if params.rope.is_null() {
            None
        } else {
            // SAFETY: not NULL, so a rope description, as the header requires.
            Some(rope(unsafe { shared(params.rope, "rope") }?)?)
        };
        let params = CacheParams {
            shape: params.shape,
            n_layers: params.n_layers as usize,
            n_cells: params.n_cells as usize,
            n_seq_max: params.n_seq_max as usize,
            n_threads: params.n_threads as usize,
            rope,
        };
        let cache = Cache::new(&recipe.recipe, &params)?;
        cache.memories().for_each(|memory| advise(memory.as_ptr(), memory.len()));
        out.write(Box::into_raw(Box::new(kvq_cache { cache })));
        Ok(())
    })
}

fn rope(rope: &kvq_rope) -> Result<Rope> {
    let interleaved = is_interleaved(rope.interleaved)?;
    let kvq_rope { n_rot, freq_base, freq_scale, .. } = *rope;
    Ok(Rope { n_rot: n_rot as usize, freq_base, freq_scale, interleaved })
}

/// Frees a cache. NULL is ignored.
#[no_mangle]
pub unsafe extern "C" fn kvq_cache_free(cache: *mut kvq_cache) {
    guard(|| {
        // SAFETY: cache is NULL or came from kvq_cache_new and is not used again.
        unsafe { release(cache) };
        Ok(())
    });
}

/// Opens a step for `n_tokens` tokens (at least 1): token i continues sequence seq_ids[i] at positions[i], which is
/// larger than every position that the sequence holds.
///
/// KVQ_STATUS_FULL if fewer cells are free. On failure nothing has changed.
#[no_mangle]
pub unsafe extern "C" fn kvq_cache_begin(
    cache: *mut kvq_cache,
    seq_ids: *const u32,
    positions: *const i32,
    n_tokens: u32,
) -> Status {
    guard(|| {
        let n = n_tokens as usize;
        // SAFETY: a live cache that no other thread uses, and n_tokens elements each, as the header requires.
        let (cache, seq_ids, positions) =
            unsafe { (exclusive(cache, "cache")?, slice(seq_ids, n, "seq_ids")?, slice(positions, n, "positions")?) };
        cache.cache.begin(seq_ids, positions)
    })
}

/// Attends one layer, then stores its rows. Each token sees the tokens of its sequence up to itself.
///
/// `q` is float [n_tokens][n_heads][head_dim_k], `k` float [n_tokens][n_kv_heads][head_dim_k], `v` float
/// [n_tokens][n_kv_heads][head_dim_v], `out` float [n_tokens][n_heads][head_dim_v]; n_tokens as given to
/// kvq_cache_begin. `out` must not overlap the others. `options` may be NULL for the defaults. Each layer is attended
/// exactly once in a step.
#[no_mangle]
pub unsafe extern "C" fn kvq_cache_attend(
    cache: *mut kvq_cache,
    layer: u32,
    q: *const f32,
    k: *const f32,
    v: *const f32,
    options: *const kvq_cache_attend_options,
    out: *mut f32,
) -> Status {
    guard(|| {
        // SAFETY: a live cache that no other thread uses, as the header requires.
        let cache = unsafe { &mut exclusive(cache, "cache")?.cache };
        let n = cache.batch_tokens()?;
        let Shape { n_heads, n_kv_heads, head_dim_k, head_dim_v } = cache.params().shape;
        let len = |heads: u32, dim: u32, name| product(&[n, heads as usize, dim as usize], name);
        // SAFETY: arrays of the shapes that the header gives; options are NULL or valid.
        let (q, k, v, out, options) = unsafe {
            (
                slice(q, len(n_heads, head_dim_k, "q")?, "q")?,
                slice(k, len(n_kv_heads, head_dim_k, "k")?, "k")?,
                slice(v, len(n_kv_heads, head_dim_v, "v")?, "v")?,
                slice_mut(out, len(n_heads, head_dim_v, "out")?, "out")?,
                attend_options(options, n_heads as usize)?,
            )
        };
        cache.attend(layer as usize, q, k, v, &options, out)
    })
}

/// # Safety
/// `options` is NULL or valid, with sink logits for `n_heads` heads or none.
unsafe fn attend_options<'a>(options: *const kvq_cache_attend_options, n_heads: usize) -> Result<AttendOptions<'a>> {
    if options.is_null() {
        return Ok(AttendOptions::default());
    }
    // SAFETY: not NULL, so valid by the caller's promise.
    unsafe {
        let kvq_cache_attend_options { scale, softcap, max_bias, n_swa, sink_logits } = *shared(options, "options")?;
        let sink_logits = optional(sink_logits, n_heads, "sink_logits")?;
        Ok(AttendOptions { scale, softcap, max_bias, n_swa, sink_logits })
    }
}

/// Closes a step. Fails, and leaves it open, if a layer has not been attended.
#[no_mangle]
pub unsafe extern "C" fn kvq_cache_end(cache: *mut kvq_cache) -> Status {
    // SAFETY: cache is NULL or a live cache that no other thread uses.
    guard(|| unsafe { exclusive(cache, "cache") }?.cache.end())
}

/// Removes the positions [pos_begin, pos_end) of a sequence; seq_id -1: of all sequences. A negative pos_begin means 0,
/// a negative pos_end no end.
#[no_mangle]
pub unsafe extern "C" fn kvq_cache_seq_rm(cache: *mut kvq_cache, seq_id: i32, pos_begin: i32, pos_end: i32) -> Status {
    guard(|| {
        // SAFETY: cache is NULL or a live cache that no other thread uses.
        let cache = unsafe { exclusive(cache, "cache") }?;
        let seq = match seq_id {
            -1 => None,
            seq => Some(u32::try_from(seq).map_err(|_| Error::invalid(format!("sequence {seq}: use -1 for all")))?),
        };
        cache.cache.remove(seq, pos_begin, pos_end)
    })
}

/// Makes sequence `dst` share the positions [pos_begin, pos_end) of `src`, without copying rows. What `dst` held there
/// is removed. Negative bounds as in kvq_cache_seq_rm.
#[no_mangle]
pub unsafe extern "C" fn kvq_cache_seq_cp(
    cache: *mut kvq_cache,
    src: u32,
    dst: u32,
    pos_begin: i32,
    pos_end: i32,
) -> Status {
    // SAFETY: cache is NULL or a live cache that no other thread uses.
    guard(|| unsafe { exclusive(cache, "cache") }?.cache.copy(src, dst, pos_begin, pos_end))
}

/// Removes all sequences but one.
#[no_mangle]
pub unsafe extern "C" fn kvq_cache_seq_keep(cache: *mut kvq_cache, seq_id: u32) -> Status {
    // SAFETY: cache is NULL or a live cache that no other thread uses.
    guard(|| unsafe { exclusive(cache, "cache") }?.cache.keep(seq_id))
}

/// Adds `delta` to the positions [pos_begin, pos_end) of a sequence and, if the cache was made with a kvq_rope, turns
/// their keys accordingly; packed keys are encoded again. Negative bounds as in kvq_cache_seq_rm.
///
/// Fails, with nothing changed, if a token in the range is shared with another sequence, or would get a negative
/// position or one that the sequence already holds.
#[no_mangle]
pub unsafe extern "C" fn kvq_cache_seq_shift(
    cache: *mut kvq_cache,
    seq_id: u32,
    pos_begin: i32,
    pos_end: i32,
    delta: i32,
) -> Status {
    // SAFETY: cache is NULL or a live cache that no other thread uses.
    guard(|| unsafe { exclusive(cache, "cache") }?.cache.shift(seq_id, pos_begin, pos_end, delta))
}

/// Smallest and largest position of a sequence; -1 and -1 if it is empty.
#[no_mangle]
pub unsafe extern "C" fn kvq_cache_seq_range(
    cache: *const kvq_cache,
    seq_id: u32,
    pos_min: *mut i32,
    pos_max: *mut i32,
) -> Status {
    guard(|| {
        // SAFETY: a live cache and room for an integer each, as the header requires.
        let (cache, pos_min, pos_max) =
            unsafe { (shared(cache, "cache")?, output(pos_min, "pos_min")?, output(pos_max, "pos_max")?) };
        let (min, max) = cache.cache.sequence_range(seq_id)?.unwrap_or((-1, -1));
        pos_min.write(min);
        pos_max.write(max);
        Ok(())
    })
}

/// Forgets all tokens and wipes the memory. Also closes an open step, whatever its state.
#[no_mangle]
pub unsafe extern "C" fn kvq_cache_clear(cache: *mut kvq_cache) -> Status {
    // SAFETY: cache is NULL or a live cache that no other thread uses.
    guard(|| unsafe { exclusive(cache, "cache") }?.cache.clear())
}

/// Tokens in the cache; one that sequences share counts once. 0 if `cache` is NULL.
#[no_mangle]
pub unsafe extern "C" fn kvq_cache_n_tokens(cache: *const kvq_cache) -> u32 {
    // SAFETY: cache is NULL or a live cache.
    guard_or(0, || Ok(unsafe { shared(cache, "cache") }?.cache.n_tokens() as u32))
}

/// Bytes of the key and value memory of all layers, everything counted, whether used or not. 0 if `cache` is NULL.
#[no_mangle]
pub unsafe extern "C" fn kvq_cache_bytes(cache: *const kvq_cache) -> usize {
    // SAFETY: cache is NULL or a live cache.
    guard_or(0, || Ok(unsafe { shared(cache, "cache") }?.cache.n_bytes()))
}

/// Saves the cache to a file, which is replaced only when the new one is completely on disk. `path` is a C string, on
/// Windows UTF-8. KVQ_STATUS_IO if that fails.
#[no_mangle]
pub unsafe extern "C" fn kvq_cache_save_file(cache: *const kvq_cache, path: *const c_char) -> Status {
    guard(|| {
        // SAFETY: a live cache and a C string, as the header requires.
        let (cache, path) = unsafe { (shared(cache, "cache")?, path_of(path, "path")?) };
        cache.cache.save_file(&path)
    })
}

/// Loads what kvq_cache_save_file wrote, from a cache of the same recipe, shape, sizes and rope; thread counts may
/// differ. The results that follow are bit-identical to those of the cache that was saved (with the same thread count).
///
/// KVQ_STATUS_FORMAT for anything else, damaged or cut files included; the cache is then as it was.
#[no_mangle]
pub unsafe extern "C" fn kvq_cache_load_file(cache: *mut kvq_cache, path: *const c_char) -> Status {
    guard(|| {
        // SAFETY: a live cache that no other thread uses and a C string, as the header requires.
        let (cache, path) = unsafe { (exclusive(cache, "cache")?, path_of(path, "path")?) };
        cache.cache.load_file(&path)
    })
}

/// Writes the number of bytes that kvq_cache_save_memory needs now to `size`.
#[no_mangle]
pub unsafe extern "C" fn kvq_cache_save_size(cache: *const kvq_cache, size: *mut usize) -> Status {
    guard(|| {
        // SAFETY: a live cache and room for a size, as the header requires.
        let (cache, size) = unsafe { (shared(cache, "cache")?, output(size, "size")?) };
        size.write(cache.cache.state_bytes()?);
        Ok(())
    })
}

/// Saves the cache to `buf` of `buf_size` bytes and writes the number of bytes used to `size`. The bytes are those of
/// kvq_cache_save_file. KVQ_STATUS_BUFFER_TOO_SMALL if they do not fit.
#[no_mangle]
pub unsafe extern "C" fn kvq_cache_save_memory(
    cache: *const kvq_cache,
    buf: *mut u8,
    buf_size: usize,
    size: *mut usize,
) -> Status {
    guard(|| {
        // SAFETY: a live cache, buf_size bytes that no other thread uses and room for a size, as the header requires.
        let (cache, buf, size) =
            unsafe { (shared(cache, "cache")?, slice_mut(buf, buf_size, "buf")?, output(size, "size")?) };
        size.write(cache.cache.save_memory(buf)?);
        Ok(())
    })
}

/// Loads what kvq_cache_save_memory or kvq_cache_save_file wrote from the `buf_size` bytes at `buf`. As
/// kvq_cache_load_file otherwise.
#[no_mangle]
pub unsafe extern "C" fn kvq_cache_load_memory(cache: *mut kvq_cache, buf: *const u8, buf_size: usize) -> Status {
    guard(|| {
        // SAFETY: a live cache that no other thread uses and buf_size bytes, as the header requires.
        let (cache, buf) = unsafe { (exclusive(cache, "cache")?, slice(buf, buf_size, "buf")?) };
        cache.cache.load_memory(buf)
    })
}

/// # Safety
/// `pointer` is NULL or a C string.
#[cfg(unix)]
unsafe fn path_of(pointer: *const c_char, name: &str) -> Result<PathBuf> {
    use std::os::unix::ffi::OsStrExt;
    super::check(pointer, name)?;
    // SAFETY: not NULL, and a C string by the caller's promise.
    let bytes = unsafe { std::ffi::CStr::from_ptr(pointer) }.to_bytes();
    Ok(PathBuf::from(std::ffi::OsStr::from_bytes(bytes)))
}

/// # Safety
/// `pointer` is NULL or a C string.
#[cfg(not(unix))]
unsafe fn path_of(pointer: *const c_char, name: &str) -> Result<PathBuf> {
    // SAFETY: by the caller's promise.
    unsafe { super::recipe::text(pointer, name) }.map(PathBuf::from)
}
