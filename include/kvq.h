/*
 * kvq: a compressed KV cache. Generated from src/capi by build.rs; do not edit.
 *
 * Conventions
 *   - Functions that can fail return a kvq_status; kvq_last_error() then has a sentence for people.
 *   - Outputs come last and are written only on success.
 *   - Pointers must not be NULL unless their comment says so; NULL is then an error or has the meaning given there.
 *   - A pointer to a const object means that the call does not change it.
 *   - Objects come from a _new or _parse function and go to their _free function, which accepts NULL.
 *   - Objects do not refer to each other once built: they may be freed in any order.
 *   - Shapes are written [rows][columns], contiguous unless strides are given; strides count elements, not bytes.
 *   - An argument that a comment calls invalid gives KVQ_STATUS_INVALID_ARGUMENT; nothing in kvq aborts the process.
 */


#ifndef KVQ_H
#define KVQ_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// Version of the library this header belongs to.
#define KVQ_VERSION "0.1.0"
#define KVQ_VERSION_MAJOR 0
#define KVQ_VERSION_MINOR 1
#define KVQ_VERSION_PATCH 0


// Rises with every change to a function or struct of this header. Compare it with kvq_abi_version() at start.
#define KVQ_ABI_VERSION 11

// Smallest supported head size.
#define KVQ_MIN_HEAD_DIM 64

// Largest supported head size.
#define KVQ_MAX_HEAD_DIM 256

// Head sizes must be a multiple of this.
#define KVQ_HEAD_DIM_STEP 32

// Largest supported number of query heads of one KV head.
#define KVQ_MAX_GQA_RATIO 128

// Of a kvq_location: no place holds the cell's row.
#define KVQ_NOWHERE 0

// Of a kvq_location: an exact slot holds the row.
#define KVQ_IN_SLOT 1

// Of a kvq_location: the cell's page holds the row. Heads whose outlier pool has the cell keep the exact row there as
// well; which ones do, the layer's memory says.
#define KVQ_IN_PAGE 2

// What kind of failure an [`Error`] is. The numbers are the C status codes: 0 is success, 1 to 99 are stable and are
// never reused.
enum kvq_status
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    // Success.
    KVQ_STATUS_OK = 0,
    // An argument is NULL, zero, out of range or inconsistent with another one.
    KVQ_STATUS_INVALID_ARGUMENT = 1,
    // A recipe specification could not be understood, or asks for something impossible.
    KVQ_STATUS_RECIPE = 2,
    // The model's shape (head sizes, head counts) is not supported.
    KVQ_STATUS_SHAPE = 3,
    // A buffer handed in is smaller than needed.
    KVQ_STATUS_BUFFER_TOO_SMALL = 4,
    // Saved state is truncated, corrupted, or belongs to another recipe, shape or format version.
    KVQ_STATUS_FORMAT = 5,
    // The cache holds no free cell for the tokens to append.
    KVQ_STATUS_FULL = 6,
    // A file could not be read or written.
    KVQ_STATUS_IO = 7,
    // The operation exists but not for this recipe, build or machine.
    KVQ_STATUS_UNSUPPORTED = 8,
    // A bug in kvq: a panic was stopped at the C boundary.
    KVQ_STATUS_INTERNAL = 9,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum kvq_status kvq_status;
#else
typedef uint32_t kvq_status;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// Compressed keys and values of all layers of a model, for programs without llama.cpp.
//
// One step of a model is kvq_cache_begin, kvq_cache_attend once for each layer in any order, kvq_cache_end. Between
// steps sequences can be removed, copied, kept and shifted, and the cache can be saved and loaded.
//
// Not thread-safe: one thread at a time. Work is spread over threads inside. It does not refer to the recipe it was
// made from.
typedef struct kvq_cache kvq_cache;

// What has been seen of one layer: as much memory as an f16 cache of all the tokens takes.
typedef struct kvq_calibration kvq_calibration;

// A GPU and the kernels for it.
//
// It never changes after kvq_device_new, so threads may share it. It outlives every call that is enqueued with it.
typedef struct kvq_device kvq_device;

// Where everything lies in the memory of one attention layer: sizes, offsets, codecs.
//
// It never changes after kvq_layout_new, so threads may share it. It does not refer to the recipe it was made from.
typedef struct kvq_layout kvq_layout;

// Decides, for all layers at once, which rows of a stream stay exact, in which slot, and when pages are sealed.
//
// Deterministic, no I/O. Not thread-safe: one thread at a time. It does not refer to the recipe it was made from.
typedef struct kvq_planner kvq_planner;

// The profile of a model, layer by layer.
//
// No two calls on the same profile may run at the same time, unless neither of them changes it.
typedef struct kvq_profile kvq_profile;

// A parsed recipe: a method and its numbers.
//
// It never changes after kvq_recipe_parse, so threads may share it.
typedef struct kvq_recipe kvq_recipe;

// How the keys of a layer turn with their positions (RoPE).
//
// It never changes after kvq_rotation_new, so threads may share it.
typedef struct kvq_rotation kvq_rotation;

// What one shift of positions does to the keys of a stream, alike for all layers.
//
// It never changes after kvq_planner_shift, so threads may share it.
typedef struct kvq_shift kvq_shift;

// Heads and head sizes of one attention layer.
//
// Query head `h` reads KV head `h / gqa_ratio` (grouped-query attention; `gqa_ratio` 1 is multi-head attention,
// `n_kv_heads` 1 is multi-query attention).
typedef struct {
    // Number of query heads; a multiple of `n_kv_heads`.
    uint32_t n_heads;
    // Number of key/value heads, at least 1.
    uint32_t n_kv_heads;
    // Values in one key (and query) head: 64 to 256 in steps of 32.
    uint32_t head_dim_k;
    // Values in one value head: 64 to 256 in steps of 32; may differ from `head_dim_k`.
    uint32_t head_dim_v;
} kvq_shape;

// One attention layer of a context, and the cache that it is in.
typedef struct {
    // Heads and head sizes.
    kvq_shape shape;
    // Its number in the model, counted from 0.
    uint32_t layer;
    // Cells of its cache, in each stream.
    uint32_t n_cells;
    // Streams of its cache.
    uint32_t n_streams;
    // Sequences of its cache.
    uint32_t n_seq_max;
} kvq_cached_layer;

// One of KVQ_SIDE_K and KVQ_SIDE_V.
typedef uint32_t kvq_side;

// Bytes inside the key or value memory of one stream of one layer.
typedef struct {
    // First byte.
    size_t offset;
    // Number of bytes.
    size_t size;
} kvq_range;

// One token of an ubatch: the cell it is written to, its sequence and its position there.
typedef struct {
    // Cell, smaller than the planner's n_cells.
    uint32_t cell;
    // Position; small ones are the sink tokens that some recipes keep exact.
    int32_t pos;
    // Sequence, smaller than the planner's n_seq_max, whose window the token is in: the first one if several share it.
    uint32_t seq;
} kvq_row;

// Tells whether `cell` of `stream` still holds a token that some sequence can see. Asked only while kvq_planner_plan
// runs, about cells as they were before the rows of that call were placed. It must return (no longjmp, no exception).
typedef bool (*kvq_is_live_fn)(void *user, uint32_t stream, uint32_t cell);

// Where the row of a cell is. A row in both places is read from its slot, and from its page once it leaves the slot.
typedef struct {
    // KVQ_NOWHERE, KVQ_IN_SLOT, KVQ_IN_PAGE, or KVQ_IN_SLOT | KVQ_IN_PAGE.
    uint32_t places;
    // The exact slot if KVQ_IN_SLOT is set, otherwise 0.
    uint32_t slot;
    // By how many positions the row in the page has moved since it was encoded: its key is to be turned by that. Slots
    // and pools hold rows that are turned already.
    int32_t turned;
} kvq_location;

// The numbers of one layer: arrays of all KV heads, one after the other.
typedef struct {
    // Whose heads.
    kvq_shape shape;
    // Mean keys, turned back to position 0, float [n_kv_heads][head_dim_k].
    const float *key_bias;
    // From keys in the frame of a page to what is coded, float [n_kv_heads][head_dim_k][head_dim_k].
    const float *key_transform;
    // From such keys to values, float [n_kv_heads][head_dim_v][head_dim_k].
    const float *predictor;
    // What is added to these, float [n_kv_heads][head_dim_v].
    const float *offset;
} kvq_profile_layer;

// What a layer did with a text, exactly, from its first token on, whose position is 0. All strides count elements.
typedef struct {
    // Queries, float [n_tokens][n_heads][head_dim_k].
    const float *q;
    // Distance between tokens in `q`.
    size_t q_stride_token;
    // Distance between heads in `q`.
    size_t q_stride_head;
    // Keys, float [n_tokens][n_kv_heads][head_dim_k].
    const float *k;
    // Distance between tokens in `k`.
    size_t k_stride_token;
    // Distance between heads in `k`.
    size_t k_stride_head;
    // Values, float [n_tokens][n_kv_heads][head_dim_v].
    const float *v;
    // Distance between tokens in `v`.
    size_t v_stride_token;
    // Distance between heads in `v`.
    size_t v_stride_head;
    // What attention made of them, contiguous, float [n_tokens][n_heads][head_dim_v].
    const float *out;
    // Natural logarithms of its softmax denominators, float [n_tokens][n_heads].
    const float *lse;
    // As in kvq_attend_args, column = token. NULL: every earlier token is visible.
    const void *mask;
    // Distance between tokens in `mask`, at least `n_tokens`.
    size_t mask_stride_token;
    // 0: the mask is float; 1: it is IEEE half.
    uint32_t mask_is_f16;
    // Factor on the scores.
    float scale;
    // Soft cap of the scores; 0: none.
    float softcap;
    // Tokens of the text.
    uint32_t n_tokens;
} kvq_calibration_args;

// What kvq_attend reads and writes: one layer, one stream. All strides count elements.
typedef struct {
    // Queries, float [n_tokens][n_heads][head_dim_k].
    const float *q;
    // Distance between tokens in `q`.
    size_t q_stride_token;
    // Distance between heads in `q`.
    size_t q_stride_head;
    // Keys of this ubatch, float [n_tokens][n_kv_heads][head_dim_k]; NULL (with `v_cur`) if kvq_store has already run
    // for this plan, as for layers that share another layer's memory.
    const float *k_cur;
    // Distance between tokens in `k_cur`.
    size_t k_stride_token;
    // Distance between heads in `k_cur`.
    size_t k_stride_head;
    // Values of this ubatch, float [n_tokens][n_kv_heads][head_dim_v]; NULL together with `k_cur`.
    const float *v_cur;
    // Distance between tokens in `v_cur`.
    size_t v_stride_token;
    // Distance between heads in `v_cur`.
    size_t v_stride_head;
    // Key memory of this stream, kvq_layout_k_bytes, 64-byte aligned.
    const uint8_t *k_mem;
    // Value memory of this stream, kvq_layout_v_bytes, 64-byte aligned.
    const uint8_t *v_mem;
    // The plan of this ubatch and stream, from kvq_planner_plan.
    const int32_t *plan;
    // Integers in `plan`.
    size_t plan_len;
    // How the layer's keys turn with their positions; may be NULL as long as no kvq_planner_shift was carried out.
    const kvq_rotation *rotation;
    // Added to the scores: [n_tokens][n_kv], column = cell, -INFINITY hides. NULL: every held cell is visible.
    const void *mask;
    // Distance between tokens in `mask`, at least `n_kv`.
    size_t mask_stride_token;
    // 0: the mask is float; 1: it is IEEE half.
    uint32_t mask_is_f16;
    // Columns of the mask; cells from n_kv on are not read.
    uint32_t n_kv;
    // Learned sink logits, float [n_heads], or NULL.
    const float *sink_logits;
    // Factor on the scores, usually 1/sqrt(head_dim_k).
    float scale;
    // Soft cap: scores become softcap * tanh(score / softcap). 0: none.
    float softcap;
    // ALiBi: the mask is multiplied by each head's slope, as ggml computes it. 0: none.
    float max_bias;
    // Query rows; the plan's n_tokens.
    uint32_t n_tokens;
    // 1: `out` is the result. More (kvq_attend_splits): `out` holds partial results for kvq_combine.
    uint32_t n_splits;
    // Contiguous, float [n_tokens][n_heads][head_dim_v] or, if n_splits > 1,
    // float [n_splits][n_tokens][n_heads][head_dim_v + 2].
    float *out;
    // If n_splits is 1: natural logarithms of the softmax denominators, float [n_tokens][n_heads], for kvq_store. NULL:
    // not wanted.
    float *lse;
    // Read by the functions of devices alone: device memory that holds what kvq_layout_profile gives, 64-byte aligned.
    // NULL for layouts that have none.
    const void *profile;
} kvq_attend_args;

// What kvq_store reads and writes: one layer, one stream. All strides count elements.
typedef struct {
    // Keys of this ubatch, float [n_tokens][n_kv_heads][head_dim_k].
    const float *k_cur;
    // Distance between tokens in `k_cur`.
    size_t k_stride_token;
    // Distance between heads in `k_cur`.
    size_t k_stride_head;
    // Values of this ubatch, float [n_tokens][n_kv_heads][head_dim_v].
    const float *v_cur;
    // Distance between tokens in `v_cur`.
    size_t v_stride_token;
    // Distance between heads in `v_cur`.
    size_t v_stride_head;
    // Key memory of this stream, kvq_layout_k_bytes, 64-byte aligned.
    uint8_t *k_mem;
    // Value memory of this stream, kvq_layout_v_bytes, 64-byte aligned.
    uint8_t *v_mem;
    // The plan of this ubatch and stream, from kvq_planner_plan.
    const int32_t *plan;
    // Integers in `plan`.
    size_t plan_len;
    // As in kvq_attend_args.
    const kvq_rotation *rotation;
    // Queries of this ubatch, float [n_tokens][n_heads][head_dim_k], from which some recipes learn which channels of
    // the keys matter. NULL: they learn nothing from this ubatch.
    const float *q;
    // Distance between tokens in `q`.
    size_t q_stride_token;
    // Distance between heads in `q`.
    size_t q_stride_head;
    // What kvq_attend or kvq_combine wrote to `lse`, float [n_tokens][n_heads]: with `q` it tells recipes with an
    // attention window which tokens matter. NULL: the tokens that are encoded now do not follow these queries.
    const float *lse;
    // The factor on the scores that kvq_attend got; only read with `lse`.
    float scale;
    // Position of each cell's token, this ubatch's included, int32 [n_cells]; values of cells without a token do not
    // matter. Only recipes with a profile need it (kvq_layout_wants_positions), for others it may be NULL.
    const int32_t *positions;
    // As in kvq_attend_args.
    const void *profile;
    // Rows; the plan's n_tokens. Without any, `k_cur` and `v_cur` are not read.
    uint32_t n_tokens;
    // For kvq_store_enqueue. 1: kvq_attend_enqueue with the same rows, queries, plan and memory comes before on the
    // same stream and nothing between them writes any of these, so they may be read while it still runs. 0: they may
    // not. kvq_store does not look at it.
    uint32_t after_attend;
} kvq_store_args;

// How far packed keys are off, in the metric of the queries: means over a sample of the rows sealed lately. Times
// the square of the factor on the scores, `noise` is the variance of what packing adds to an attention logit,
// `signal` that of the logit itself.
typedef struct {
    // Variance that packing adds to a product of query and key: the sum over channels of the queries' mean square
    // times the key's squared error.
    float noise;
    // Variance of the product: the same of the key's distance from its page's mean.
    float signal;
    // Rows that the means stand for; 0: none was sealed yet, and the others are 0 too.
    float rows;
} kvq_key_error;

// How stored keys were rotated (RoPE): pair i of the first n_rot values of a head was turned by the angle
// pos * freq_scale * freq_base^(-2 i / n_rot).
typedef struct {
    // Values that take part: even, at most head_dim_k.
    uint32_t n_rot;
    // Base of the frequencies, such as 10000.
    float freq_base;
    // Factor on positions; 1 unless positions are interpolated.
    float freq_scale;
    // 0: pairs are (i, i + n_rot / 2), as in GPT-NeoX; 1: pairs are neighbours (2i, 2i + 1).
    uint32_t interleaved;
} kvq_rope;

// What a cache is made for.
typedef struct {
    // Shape of every layer.
    kvq_shape shape;
    // Layers with keys and values of their own.
    uint32_t n_layers;
    // Tokens that fit.
    uint32_t n_cells;
    // Sequences, numbered from 0: 1 to 64.
    uint32_t n_seq_max;
    // Threads to use at most; 0: one per core. Results of different thread counts may differ by rounding.
    uint32_t n_threads;
    // How keys are rotated, so that kvq_cache_seq_shift can turn them; NULL: shifts leave the keys alone. Read only by
    // kvq_cache_new.
    const kvq_rope *rope;
} kvq_cache_params;

// How one layer attends. All zeros are the defaults.
typedef struct {
    // Factor on the scores. 0: 1/sqrt(head_dim_k).
    float scale;
    // Soft cap: scores become softcap * tanh(score / softcap). 0: none.
    float softcap;
    // ALiBi: largest slope exponent, as in ggml. 0: none.
    float max_bias;
    // Sliding window: newest keys visible, the token's own included. 0: all.
    uint32_t n_swa;
    // Learned sink logits, float [n_heads], or NULL.
    const float *sink_logits;
} kvq_cache_attend_options;

// Streams of a layer that one call serves, all with the same number of tokens: what its arguments name is the first
// one's, and here is how far it is from one to the next. Rows, queries, outputs and softmax denominators of the
// streams follow each other, so that n_tokens more of them belong to the next stream. NULL stands for a single
// stream.
typedef struct {
    // Streams, 1 or more.
    uint32_t n_streams;
    // Bytes between their key memories, a multiple of 64, and at least what a layer takes.
    size_t k_stride;
    // Bytes between their value memories, alike.
    size_t v_stride;
    // Integers between their plans, at least plan_len.
    size_t plan_stride;
    // Elements between their masks; 0: all have the same. Not read where there is no mask.
    size_t mask_stride;
    // Integers between their positions, at least n_cells. Read by kvq_store_enqueue of layouts that want positions.
    size_t positions_stride;
} kvq_streams;

// Keys.
#define KVQ_SIDE_K 0

// Values.
#define KVQ_SIDE_V 1

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// The ABI version of the library that is loaded, to be compared with KVQ_ABI_VERSION.
uint32_t kvq_abi_version(void);

// The version of the library that is loaded, such as "0.1.0". A static text.
const char *kvq_version(void);

// The instruction set that the CPU code uses on this machine, such as "avx512" or "scalar". A static text; ""
// (and a last error) if the environment variable KVQ_ISA asks for one that is not there.
const char *kvq_isa(void);

// One sentence about the last failure of a kvq function in this thread: what is wrong and what to change.
//
// Never NULL; "" if nothing failed yet. The text is UTF-8, belongs to kvq and stays as it is until the next failure
// in the same thread. Successful calls do not clear it: look at the returned status first.
const char *kvq_last_error(void);

// Whether a specification asks for no compressed cache: "off", "none", "0", "" or NULL (never set). Ask this before
// kvq_recipe_parse, to which these are errors. Any thread may call it.
bool kvq_recipe_is_off(const char *spec);

// What a user may name, for people: presets and methods with their bits per value at two head sizes and a line on
// each, keys and their defaults. A static text of several lines, each of which ends; "" (and a last error) if the
// environment variable KVQ_ISA asks for an instruction set that is not there. Any thread may call it.
const char *kvq_recipe_help(void);

// Writes what a specification stands for: a preset such as "on:window=256" becomes a method and its keys
// ("kivi:...,window=256"), any other text stays as it is. The text is not checked; kvq_recipe_parse does that, and
// gives the same recipe for both.
//
// `spec` is NUL-terminated UTF-8. The result is NUL-terminated, in `buf` of `buf_size` bytes;
// KVQ_STATUS_BUFFER_TOO_SMALL if it does not fit, 64 bytes more than `spec` has are always enough.
kvq_status kvq_recipe_expand(const char *spec, char *buf, size_t buf_size);

// Reads a recipe such as "on", "skvq" or "skvq:k=2,v=2,window=128". KVQ_STATUS_RECIPE and a text that names the key
// and its allowed values if it cannot be understood.
//
// `spec` is NUL-terminated UTF-8. Free the result with kvq_recipe_free.
kvq_status kvq_recipe_parse(const char *spec, kvq_recipe **out);

// Frees a recipe. NULL is ignored.
void kvq_recipe_free(kvq_recipe *recipe);

// Writes the canonical spelling of a recipe, with every key, NUL-terminated, into `buf` of `buf_size` bytes. Parsing
// it gives the same recipe, but for a profile that was read. KVQ_STATUS_BUFFER_TOO_SMALL if it does not fit; 512 bytes
// and the length of a profile's path are always enough.
kvq_status kvq_recipe_spec(const kvq_recipe *recipe, char *buf, size_t buf_size);

// Makes the recipe that a cache of `n_cells` cells in each of `n_streams` streams carries out; `n_seq_max` sequences
// share a single stream. In a small cache page, window, sink tokens and outlier tokens shrink by a fixed rule, so that
// it stays smaller than float16. Use the result for kvq_planner_new, kvq_layout_new and everything else;
// kvq_recipe_spec tells what changed. KVQ_STATUS_INVALID_ARGUMENT if a number is 0.
//
// Free the result with kvq_recipe_free.
kvq_status kvq_recipe_fit(const kvq_recipe *recipe,
                          uint32_t n_cells,
                          uint32_t n_streams,
                          uint32_t n_seq_max,
                          kvq_recipe **out);

// Writes the specification that `spec` comes to in a context of the `n_layers` attention layers of `layers`: if it is
// "auto:mem=4GiB" (KiB, MiB, GiB or TiB; keys may follow, ",window=512"), the best preset of which the memory of all
// layers, in all streams, takes no more, and otherwise `spec` itself. Without layers it is the best there is to choose.
// `note` gets a part of a sentence on what more memory would give, or "" where nothing was chosen.
//
// KVQ_STATUS_RECIPE if nothing fits, and a text that names the least memory that would do, or if what follows "auto"
// cannot be understood; as kvq_layout_new if a layer cannot be. `spec` is NUL-terminated UTF-8. Both results are
// NUL-terminated: `buf` of `buf_size` bytes, for which those of `spec` and 64 more are always enough, and `note` of
// `note_size` bytes, for which 128 are; KVQ_STATUS_BUFFER_TOO_SMALL if one does not fit. `layers` may be NULL if
// `n_layers` is 0.
kvq_status kvq_recipe_choose(const char *spec,
                             const kvq_cached_layer *layers,
                             size_t n_layers,
                             char *buf,
                             size_t buf_size,
                             char *note,
                             size_t note_size);

// Cells in a page of a recipe. 0 if `recipe` is NULL.
uint32_t kvq_recipe_page(const kvq_recipe *recipe);

// Newest tokens of each sequence that a recipe keeps in float16. 0 if `recipe` is NULL.
uint32_t kvq_recipe_window(const kvq_recipe *recipe);

// Makes the layout of a layer of `shape` for `n_cells` cells and `n_slots` exact rows (kvq_planner_n_slots). `layer`
// counts from 0; some recipes treat the first layers differently.
//
// KVQ_STATUS_SHAPE if the head sizes or counts are not supported, KVQ_STATUS_RECIPE if the recipe does not fit them.
// Free the result with kvq_layout_free.
kvq_status kvq_layout_new(const kvq_recipe *recipe,
                          const kvq_shape *shape,
                          uint32_t layer,
                          uint32_t n_cells,
                          uint32_t n_slots,
                          kvq_layout **out);

// Frees a layout. NULL is ignored.
void kvq_layout_free(kvq_layout *layout);

// Bytes of the key memory of one stream of one layer, a multiple of 64. The memory must be zeroed before its first
// use, and 64-byte aligned. 0 if `layout` is NULL.
size_t kvq_layout_k_bytes(const kvq_layout *layout);

// The same for the value memory.
size_t kvq_layout_v_bytes(const kvq_layout *layout);

// The shape that a layout was made for. All zeros if `layout` is NULL.
kvq_shape kvq_layout_shape(const kvq_layout *layout);

// Tokens back that the store step weighs a row's attention by, for which it reads `lse` of kvq_store_args; 0: it does
// not need it. 0 if `layout` is NULL.
uint32_t kvq_layout_attn_window(const kvq_layout *layout);

// Effective bits per key value of a page, all metadata counted; 16 for float16. 0 if `layout` is NULL.
double kvq_layout_bits_k(const kvq_layout *layout);

// The same for values.
double kvq_layout_bits_v(const kvq_layout *layout);

// Writes one line that is equal for two layouts if and only if they can exchange the bytes of pages and slots: codecs
// with their settings and format versions, page size, KV heads and head sizes; not n_cells and n_slots.
// NUL-terminated, into `buf` of `buf_size` bytes; KVQ_STATUS_BUFFER_TOO_SMALL if it does not fit, 512 bytes are always
// enough.
kvq_status kvq_layout_format(const kvq_layout *layout, char *buf, size_t buf_size);

// Lists where everything but the pages of all KV heads lies in the memory of `side`: exact rows, outlier pool and what
// was learned from queries; one range per head, ascending.
//
// Writes the number of ranges to `n_out`, and to `out` unless it is NULL, which has room for `cap`;
// KVQ_STATUS_BUFFER_TOO_SMALL if that is too few.
kvq_status kvq_layout_slot_ranges(const kvq_layout *layout, kvq_side side, kvq_range *out, size_t cap, size_t *n_out);

// Lists where the outlier pool of all KV heads lies in the memory of `side`: one range per head, ascending; none if
// the recipe or the layer has no pool. For kvq_pool_adopt.
//
// `out`, `cap` and `n_out` as in kvq_layout_slot_ranges.
kvq_status kvq_layout_pool_ranges(const kvq_layout *layout, kvq_side side, kvq_range *out, size_t cap, size_t *n_out);

// Lists where the pages [page0, page0 + n_pages) of all KV heads lie in the memory of `side`: per head a range of
// headers and a range of pages, ascending. Two layouts of the same kvq_layout_format give the same number of ranges of
// the same sizes.
//
// `out`, `cap` and `n_out` as in kvq_layout_slot_ranges.
kvq_status kvq_layout_page_ranges(const kvq_layout *layout,
                                  kvq_side side,
                                  uint32_t page0,
                                  uint32_t n_pages,
                                  kvq_range *out,
                                  size_t cap,
                                  size_t *n_out);

// Asks the operating system to hold `n_bytes` of memory, such as the keys and values of all layers, in large pages: a
// decoded token reads all of it, and with pages of 4 KiB it waits for address translations. Call it before the memory
// is first written to: what has small pages already may keep them. Contents are kept.
//
// A hint: KVQ_STATUS_OK also where the system does not follow it. Give one range for many small buffers, since large
// pages (2 MiB on x86-64) must lie inside it.
kvq_status kvq_use_large_pages(void *memory, size_t n_bytes);

// Makes a planner for `n_streams` streams of `n_cells` cells each. `n_seq_max` sequences share a single stream; of
// several streams each has one. Every sequence has a window and sink tokens of its own; the windows of a stream take
// at most a quarter of its cells, or one window if that is more, and are cut to the same length where they would take
// more. Free the result with kvq_planner_free.
kvq_status kvq_planner_new(const kvq_recipe *recipe,
                           uint32_t n_cells,
                           uint32_t n_streams,
                           uint32_t n_seq_max,
                           kvq_planner **out);

// Frees a planner. NULL is ignored.
void kvq_planner_free(kvq_planner *planner);

// Number of exact rows of a stream, to be passed to kvq_layout_new. 0 if `planner` is NULL.
uint32_t kvq_planner_n_slots(const kvq_planner *planner);

// Length (in int32) of the plan of one stream for `n_tokens` rows. 0 if `planner` is NULL or the length overflows.
size_t kvq_planner_plan_len(const kvq_planner *planner, uint32_t n_tokens);

// Places the `n_rows` rows of one ubatch into `stream` and writes the plan that kvq_attend and kvq_store execute, in
// that order, for every layer. `plan_len` is at least kvq_planner_plan_len(planner, n_rows).
//
// Cells must differ within a call. `user` is handed to `is_live`. If no cell of the stream is live, kvq_store of this
// plan also forgets what the stream has learned from its tokens. On failure the planner is as before.
kvq_status kvq_planner_plan(kvq_planner *planner,
                            uint32_t stream,
                            const kvq_row *rows,
                            size_t n_rows,
                            kvq_is_live_fn is_live,
                            void *user,
                            int32_t *plan,
                            size_t plan_len);

// Forgets every row of a stream. Nothing happens if `planner` is NULL or there is no such stream.
void kvq_planner_reset(kvq_planner *planner, uint32_t stream);

// Makes stream `dst` equal to stream `src`. The caller copies the memory of all layers likewise.
kvq_status kvq_planner_copy_stream(kvq_planner *planner, uint32_t src, uint32_t dst);

// Tells where the row of each cell of a stream is. `location` has room for n_cells.
kvq_status kvq_planner_locate(const kvq_planner *planner, uint32_t stream, kvq_location *location);

// Writes the size of what kvq_planner_export gives to `size`.
kvq_status kvq_planner_export_size(const kvq_planner *planner, uint32_t stream, size_t *size);

// Writes the whole state of a stream, opaque and portable, to `out` of `size` bytes (kvq_planner_export_size; more is
// allowed, fewer is KVQ_STATUS_BUFFER_TOO_SMALL).
kvq_status kvq_planner_export(const kvq_planner *planner, uint32_t stream, uint8_t *out, size_t size);

// Makes a stream what it was when the `size` bytes were exported, by a planner made with the same recipe and numbers
// (but for n_streams, unless that changes the number of slots). The bytes are not trusted: KVQ_STATUS_FORMAT, with
// nothing changed, if they are of another planner or describe an impossible state.
kvq_status kvq_planner_import(kvq_planner *planner, uint32_t stream, const uint8_t *bytes, size_t size);

// Tells the planner that the caller has copied whole pages into the memory of a stream: the `n_cells` cells at `cells`
// are read from their pages from now on, where the row of cells[i] has moved by turned[i] positions since it was
// encoded (kvq_location). Whatever was held for them and for the other cells of those pages is forgotten. Exact rows
// follow through kvq_planner_plan and kvq_store, like a new ubatch.
kvq_status kvq_planner_adopt(kvq_planner *planner,
                             uint32_t stream,
                             const uint32_t *cells,
                             const int32_t *turned,
                             size_t n_cells);

// Makes the rotation that turns pair i of a head by frequencies[i] radians a position: double [n_pairs]. With linear
// scaling, YaRN or frequency factors they are what those make of them; what RoPE does to a unit vector at position 1
// tells. `interleaved` 0: pairs are (i, i + n_pairs), as in GPT-NeoX; 1: pairs are neighbours (2i, 2i + 1).
//
// `n_pairs` 0, with `frequencies` NULL or not: keys do not depend on their positions. Free the result with
// kvq_rotation_free.
kvq_status kvq_rotation_new(const double *frequencies, uint32_t n_pairs, uint32_t interleaved, kvq_rotation **out);

// Frees a rotation. NULL is ignored.
void kvq_rotation_free(kvq_rotation *rotation);

// Takes note that the positions of a stream's tokens move, that of cell i by moved[i], int32 [n_cells]; values of cells
// without a live token do not matter. Then kvq_shift_keys has to be called for every layer before the next kvq_attend,
// and these get the layer's kvq_rotation from then on. `is_live` and `user` as for kvq_planner_plan, asked about cells
// as they are now.
//
// On failure the planner is as before. Free the result with kvq_shift_free.
kvq_status kvq_planner_shift(kvq_planner *planner,
                             uint32_t stream,
                             const int32_t *moved,
                             kvq_is_live_fn is_live,
                             void *user,
                             kvq_shift **out);

// Frees a shift. NULL is ignored.
void kvq_shift_free(kvq_shift *shift);

// Carries out part `part` of `n_parts` of a shift in the key memory of one layer: exact rows are turned, packed ones
// stay as they are as long as the plan can say how far they have moved, which loses nothing. `v_mem` is the layer's
// value memory; it may be NULL for recipes that do not predict values from keys.
//
// Parts touch disjoint memory and may run concurrently. Each shift is carried out exactly once per layer, and not while
// that layer attends or stores.
kvq_status kvq_shift_keys(const kvq_layout *layout,
                          const kvq_rotation *rotation,
                          const kvq_shift *shift,
                          uint8_t *k_mem,
                          uint8_t *v_mem,
                          uint32_t part,
                          uint32_t n_parts);

// Makes a profile without layers. Free it with kvq_profile_free.
kvq_status kvq_profile_new(kvq_profile **out);

// Frees a profile. NULL is ignored.
void kvq_profile_free(kvq_profile *profile);

// Sets layer `layer`, counted as for kvq_layout_new, whose keys turn as `rotation` says. KVQ_STATUS_FORMAT if a number
// is not finite.
kvq_status kvq_profile_set_layer(kvq_profile *profile,
                                 uint32_t layer,
                                 const kvq_rotation *rotation,
                                 const kvq_profile_layer *numbers);

// Gives the numbers of a layer. The arrays are the profile's: they are there until the layer is set again or the
// profile freed. KVQ_STATUS_FORMAT if the profile has no such layer or it is of other KV heads than those of `shape`.
kvq_status kvq_profile_get_layer(const kvq_profile *profile,
                                 uint32_t layer,
                                 const kvq_shape *shape,
                                 kvq_profile_layer *out);

// Writes the radians by which each pair of a rotation turns per position, between -pi and pi, double [n_out]: their
// number to `n_out`, and to `out` unless it is NULL, which has room for `cap`; KVQ_STATUS_BUFFER_TOO_SMALL if that is
// too few.
kvq_status kvq_rotation_frequencies(const kvq_rotation *rotation, double *out, size_t cap, size_t *n_out);

// Writes the file of the profile that a recipe wants, as its key `profile` names it, NUL-terminated, into `buf` of
// `buf_size` bytes; an empty text if it wants none. KVQ_STATUS_RECIPE if it needs one and names none.
kvq_status kvq_recipe_profile(const kvq_recipe *recipe, char *buf, size_t buf_size);

// Makes the recipe with the profile that it wants, for kvq_layout_new. KVQ_STATUS_RECIPE if it wants none.
//
// Free the result with kvq_recipe_free; the profile may be freed before it.
kvq_status kvq_recipe_with_profile(const kvq_recipe *recipe, const kvq_profile *profile, kvq_recipe **out);

// Whether kvq_store needs `positions` in its arguments for this layout. False if `layout` is NULL.
bool kvq_layout_wants_positions(const kvq_layout *layout);

// Makes a calibration of a layer of `shape`, whose keys turn as `rotation` says. Free it with kvq_calibration_free.
kvq_status kvq_calibration_new(const kvq_shape *shape, const kvq_rotation *rotation, kvq_calibration **out);

// Frees a calibration. NULL is ignored.
void kvq_calibration_free(kvq_calibration *calibration);

// Takes in part `part` of `n_parts` of what the layer did with a text. Parts may run concurrently; texts follow each
// other.
kvq_status kvq_calibration_observe(const kvq_calibration *calibration,
                                   const kvq_calibration_args *args,
                                   uint32_t part,
                                   uint32_t n_parts);

// Works out the layer's profile on at most `n_threads` threads and sets it as layer `layer` of `profile`. The same
// observations give the same numbers. KVQ_STATUS_INVALID_ARGUMENT if too little has been seen.
kvq_status kvq_calibration_solve(const kvq_calibration *calibration,
                                 uint32_t n_threads,
                                 uint32_t layer,
                                 kvq_profile *profile);

// Computes part `part` of `n_parts` of the attention of one layer over the cells that the mask shows: sealed pages,
// exact rows and the rows of this ubatch. It changes neither memory, and must run before kvq_store of the same plan
// unless `k_cur` is NULL.
//
// Parts write disjoint ranges of `out` and may run concurrently, on any threads; all of them together write all of it.
// On failure the content of `out` is unspecified.
kvq_status kvq_attend(const kvq_layout *layout, const kvq_attend_args *args, uint32_t part, uint32_t n_parts);

// Into how many splits kvq_attend should cut the cells to keep `n_threads` threads busy with `n_tokens` query rows; 1
// when heads and tokens are enough. 0 if `layout` is NULL.
uint32_t kvq_attend_splits(const kvq_layout *layout, uint32_t n_tokens, uint32_t n_threads);

// Merges the partial results of kvq_attend with n_splits > 1 into `out`, float [n_tokens][n_heads][head_dim_v]; part
// `part` of `n_parts`. All parts of kvq_attend must have finished. `n_splits` is what they were given, never 0.
// `sink_logits` and `lse` as in kvq_attend_args, or NULL.
//
// Parts write disjoint ranges of `out` and may run concurrently.
kvq_status kvq_combine(const kvq_layout *layout,
                       const float *partial,
                       const float *sink_logits,
                       uint32_t n_splits,
                       uint32_t n_tokens,
                       float *out,
                       float *lse,
                       uint32_t part,
                       uint32_t n_parts);

// Executes part `part` of `n_parts` of a plan for one layer: seals pages, then writes the rows of this ubatch into
// their slots. All parts of kvq_attend of the same plan must have finished.
//
// Parts touch disjoint memory and may run concurrently. Each plan is stored exactly once per layer.
kvq_status kvq_store(const kvq_layout *layout, const kvq_store_args *args, uint32_t part, uint32_t n_parts);

// Reads rows of the cells [cell0, cell0 + n) as float [n][n_kv_heads][head_dim]. `location` comes from
// kvq_planner_locate; cells that are nowhere give zeros. `rotation` as in kvq_attend_args. `k_out` (with `k_mem`) or
// `v_out` (with `v_mem`) may be NULL, then that side is left out. Recipes that predict values need `k_mem` for these
// too.
kvq_status kvq_dequantize(const kvq_layout *layout,
                          const uint8_t *k_mem,
                          const uint8_t *v_mem,
                          const kvq_location *location,
                          const kvq_rotation *rotation,
                          uint32_t cell0,
                          uint32_t n,
                          float *k_out,
                          float *v_out);

// Takes over saved members of the outlier pool: those of the cells `from[i]` become members for the cells `to[i]`,
// whose pages the caller has put into the memory. `saved_k` and `saved_v` hold the bytes of kvq_layout_pool_ranges, one
// range after the other, of a layout with the same kvq_layout_format. What the pool held for the cells `to` is
// forgotten. A member that finds no room is read from its page from then on.
kvq_status kvq_pool_adopt(const kvq_layout *layout,
                          uint8_t *k_mem,
                          uint8_t *v_mem,
                          const uint8_t *saved_k,
                          const uint8_t *saved_v,
                          const uint32_t *from,
                          const uint32_t *to,
                          uint32_t n);

// Refuses memory whose outlier pools name a cell twice, as only a crafted state brings it: kvq_attend would count that
// token twice. For bytes of kvq_layout_slot_ranges that come from outside the process, before they are attended to;
// kvq_pool_adopt takes such a member once. KVQ_STATUS_FORMAT if so.
kvq_status kvq_pool_check(const kvq_layout *layout, const uint8_t *k_mem, const uint8_t *v_mem);

// Wipes what the memory of one stream still holds of rows that `location` does not name, so that a copy of it can be
// given away: slots, the outlier pool and the rows of pages. `location` is as kvq_planner_locate gives it; write
// KVQ_NOWHERE for cells that are not to be read.
//
// The other rows decode to the same values as before. What a page holds for all its rows together (its mean, ranges and
// order of tokens) stays. `k_mem` or `v_mem` may be NULL, then that side is left out.
kvq_status kvq_erase(const kvq_layout *layout, uint8_t *k_mem, uint8_t *v_mem, const kvq_location *location);

// Reads the error of a stream's packed keys from its key memory, kvq_layout_k_bytes. Takes some nanoseconds per head;
// must not run beside kvq_store on the same memory.
kvq_status kvq_layer_key_error(const kvq_layout *layout, const uint8_t *k_mem, kvq_key_error *out);

// Makes an empty cache, with the recipe fitted to its size (kvq_recipe_fit). All its memory is reserved here. Free it
// with kvq_cache_free.
kvq_status kvq_cache_new(const kvq_recipe *recipe, const kvq_cache_params *params, kvq_cache **out);

// Frees a cache. NULL is ignored.
void kvq_cache_free(kvq_cache *cache);

// Opens a step for `n_tokens` tokens (at least 1): token i continues sequence seq_ids[i] at positions[i], which is
// larger than every position that the sequence holds.
//
// KVQ_STATUS_FULL if fewer cells are free. On failure nothing has changed.
kvq_status kvq_cache_begin(kvq_cache *cache, const uint32_t *seq_ids, const int32_t *positions, uint32_t n_tokens);

// Attends one layer, then stores its rows. Each token sees the tokens of its sequence up to itself.
//
// `q` is float [n_tokens][n_heads][head_dim_k], `k` float [n_tokens][n_kv_heads][head_dim_k], `v` float
// [n_tokens][n_kv_heads][head_dim_v], `out` float [n_tokens][n_heads][head_dim_v]; n_tokens as given to
// kvq_cache_begin. `out` must not overlap the others. `options` may be NULL for the defaults. Each layer is attended
// exactly once in a step.
kvq_status kvq_cache_attend(kvq_cache *cache,
                            uint32_t layer,
                            const float *q,
                            const float *k,
                            const float *v,
                            const kvq_cache_attend_options *options,
                            float *out);

// Closes a step. Fails, and leaves it open, if a layer has not been attended.
kvq_status kvq_cache_end(kvq_cache *cache);

// Removes the positions [pos_begin, pos_end) of a sequence; seq_id -1: of all sequences. A negative pos_begin means 0,
// a negative pos_end no end.
kvq_status kvq_cache_seq_rm(kvq_cache *cache, int32_t seq_id, int32_t pos_begin, int32_t pos_end);

// Makes sequence `dst` share the positions [pos_begin, pos_end) of `src`, without copying rows. What `dst` held there
// is removed. Negative bounds as in kvq_cache_seq_rm.
kvq_status kvq_cache_seq_cp(kvq_cache *cache, uint32_t src, uint32_t dst, int32_t pos_begin, int32_t pos_end);

// Removes all sequences but one.
kvq_status kvq_cache_seq_keep(kvq_cache *cache, uint32_t seq_id);

// Adds `delta` to the positions [pos_begin, pos_end) of a sequence and, if the cache was made with a kvq_rope, turns
// their keys accordingly; packed keys are encoded again. Negative bounds as in kvq_cache_seq_rm.
//
// Fails, with nothing changed, if a token in the range is shared with another sequence, or would get a negative
// position or one that the sequence already holds.
kvq_status kvq_cache_seq_shift(kvq_cache *cache, uint32_t seq_id, int32_t pos_begin, int32_t pos_end, int32_t delta);

// Smallest and largest position of a sequence; -1 and -1 if it is empty.
kvq_status kvq_cache_seq_range(const kvq_cache *cache, uint32_t seq_id, int32_t *pos_min, int32_t *pos_max);

// Forgets all tokens and wipes the memory. Also closes an open step, whatever its state.
kvq_status kvq_cache_clear(kvq_cache *cache);

// Tokens in the cache; one that sequences share counts once. 0 if `cache` is NULL.
uint32_t kvq_cache_n_tokens(const kvq_cache *cache);

// Bytes of the key and value memory of all layers, everything counted, whether used or not. 0 if `cache` is NULL.
size_t kvq_cache_bytes(const kvq_cache *cache);

// Saves the cache to a file, which is replaced only when the new one is completely on disk. `path` is a C string, on
// Windows UTF-8. KVQ_STATUS_IO if that fails.
kvq_status kvq_cache_save_file(const kvq_cache *cache, const char *path);

// Loads what kvq_cache_save_file wrote, from a cache of the same recipe, shape, sizes and rope; thread counts may
// differ. The results that follow are bit-identical to those of the cache that was saved (with the same thread count).
//
// KVQ_STATUS_FORMAT for anything else, damaged or cut files included; the cache is then as it was.
kvq_status kvq_cache_load_file(kvq_cache *cache, const char *path);

// Writes the number of bytes that kvq_cache_save_memory needs now to `size`.
kvq_status kvq_cache_save_size(const kvq_cache *cache, size_t *size);

// Saves the cache to `buf` of `buf_size` bytes and writes the number of bytes used to `size`. The bytes are those of
// kvq_cache_save_file. KVQ_STATUS_BUFFER_TOO_SMALL if they do not fit.
kvq_status kvq_cache_save_memory(const kvq_cache *cache, uint8_t *buf, size_t buf_size, size_t *size);

// Loads what kvq_cache_save_memory or kvq_cache_save_file wrote from the `buf_size` bytes at `buf`. As
// kvq_cache_load_file otherwise.
kvq_status kvq_cache_load_memory(kvq_cache *cache, const uint8_t *buf, size_t buf_size);

// Takes `n_bytes` more into a checksum, which is 0 before the first: CRC-32C, as kvq_cache_save_memory uses it. However
// the bytes are cut into pieces, the checksum is the same. Any thread may call it.
kvq_status kvq_checksum_add(const uint8_t *bytes, size_t n_bytes, uint32_t *checksum);

// Opens a device: "cuda:0" is the first that the CUDA driver lists, with its primary context, which the CUDA
// runtime uses as well. The kernels are loaded into it. Without a driver, or in a library built without CUDA,
// KVQ_STATUS_UNSUPPORTED; for names of no device KVQ_STATUS_INVALID_ARGUMENT. Free the result with kvq_device_free.
kvq_status kvq_device_new(const char *name, kvq_device **out);

// Frees a device once everything enqueued with it has finished. NULL is ignored.
void kvq_device_free(kvq_device *device);

// Bytes of device memory that kvq_attend_enqueue needs as workspace for `n_streams` streams with `n_tokens` query
// rows each and `n_kv` columns of the mask. Zero it once when it is made (256-byte aligned): every call leaves it
// ready for the next one, of any layer for which it is large enough. Calls that may run at the same time need a
// workspace each.
kvq_status kvq_attend_workspace(const kvq_layout *layout,
                                const kvq_device *device,
                                uint32_t n_tokens,
                                uint32_t n_streams,
                                uint32_t n_kv,
                                size_t *bytes);

// Enqueues kvq_attend for the streams of a layer whose memory is on `device`, on a CUDA stream (a cudaStream_t or
// CUstream; NULL: the default stream). Every pointer in `args` but `rotation` is a device pointer, `plan` included,
// and `n_splits` is 1: the result is final. With a rotation the kernels that read turned pages are taken, which are
// slow: leave it NULL until positions have moved. The host reads nothing of them, allocates nothing and does not
// wait, so the call can be captured in a CUDA graph; `args` itself is read during the call only. The plan is
// trusted: it must come from kvq_planner_plan.
//
// What no kernel can do is refused with KVQ_STATUS_UNSUPPORTED before anything is enqueued.
kvq_status kvq_attend_enqueue(const kvq_device *device,
                              const kvq_layout *layout,
                              const kvq_attend_args *args,
                              const kvq_streams *streams,
                              void *workspace,
                              size_t workspace_bytes,
                              void *stream);

// Bytes of device memory that kvq_store_enqueue needs as workspace for `n_streams` streams, each with any number of
// rows up to `n_tokens`. What is in it does not matter, so it cannot be one of kvq_attend_enqueue. Calls that may
// run at the same time need a workspace each.
kvq_status kvq_store_workspace(const kvq_layout *layout,
                               const kvq_device *device,
                               uint32_t n_tokens,
                               uint32_t n_streams,
                               size_t *bytes);

// Enqueues kvq_store of all heads for a layer whose memory is on `device`; pointers, plan and stream as for
// kvq_attend_enqueue, after which it is enqueued on the same stream. The bytes are those that kvq_store makes.
kvq_status kvq_store_enqueue(const kvq_device *device,
                             const kvq_layout *layout,
                             const kvq_store_args *args,
                             const kvq_streams *streams,
                             void *workspace,
                             size_t workspace_bytes,
                             void *stream);

// Bytes of device memory, beside that of the cache, in which kernels find the profile of a layer; 0 for layouts that
// have none, and if `layout` is NULL.
size_t kvq_layout_profile_bytes(const kvq_layout *layout);

// Writes what such memory is to hold (64-byte aligned, the same for all streams) into `buf` of `buf_size` bytes on the
// host, at least kvq_layout_profile_bytes; KVQ_STATUS_BUFFER_TOO_SMALL if it does not fit.
kvq_status kvq_layout_profile(const kvq_layout *layout, void *buf, size_t buf_size);

// Enqueues the decoding of what kvq_attend_enqueue with the same `args` would read, for an attention that knows
// nothing of pages: rows of cells 0 to n_kv - 1 as FP16, `k_out` [n_streams][n_kv_heads][n_kv][head_dim_k] and
// `v_out` [n_streams][n_kv_heads][n_kv][head_dim_v] on the device, either of which may be NULL. Cells that no query
// may see get zeros or some finite row. Of `args`, queries, mask, output and what belongs to them are not looked
// at. Pays where there are many query rows.
kvq_status kvq_dequantize_enqueue(const kvq_device *device,
                                  const kvq_layout *layout,
                                  const kvq_attend_args *args,
                                  const kvq_streams *streams,
                                  void *k_out,
                                  void *v_out,
                                  void *stream);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* KVQ_H */
