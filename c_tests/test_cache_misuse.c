/* Calls out of order, impossible parameters and full caches are errors that leave the cache usable. */
#include "check.h"

static const kvq_shape SHAPE = {2, 1, 64, 64};

static void parameters(const kvq_recipe *recipe) {
    const kvq_rope good_rope = {64, 10000.0f, 1.0f, 0};
    kvq_rope rope = good_rope;
    const kvq_cache_params good = {.shape = SHAPE, .n_layers = 1, .n_cells = 64, .n_seq_max = 1, .rope = &rope};
    kvq_cache_params bad;
    kvq_cache *cache = NULL;
#define WITH(field, value, status)                               \
    do {                                                         \
        bad = good;                                              \
        bad.field = (value);                                     \
        CHECK_STATUS(kvq_cache_new(recipe, &bad, &cache), status); \
    } while (0)
    WITH(n_layers, 0, KVQ_STATUS_INVALID_ARGUMENT);
    WITH(n_cells, 0, KVQ_STATUS_INVALID_ARGUMENT);
    WITH(n_cells, UINT32_MAX, KVQ_STATUS_INVALID_ARGUMENT);
    WITH(n_seq_max, 0, KVQ_STATUS_INVALID_ARGUMENT);
    WITH(n_seq_max, 65, KVQ_STATUS_INVALID_ARGUMENT);
    WITH(n_layers, UINT32_MAX, KVQ_STATUS_INVALID_ARGUMENT);
    WITH(shape.head_dim_k, 63, KVQ_STATUS_SHAPE);
    WITH(shape.n_kv_heads, 0, KVQ_STATUS_SHAPE);
#undef WITH
    const kvq_rope ropes[] = {
        {0, 1e4f, 1, 0}, {65, 1e4f, 1, 0}, {66, 1e4f, 1, 0}, {64, 0, 1, 0}, {64, 1e4f, NAN, 0}, {64, 1e4f, 1, 2},
    };
    for (size_t i = 0; i < sizeof ropes / sizeof *ropes; i++) {
        rope = ropes[i];
        CHECK_INVALID(kvq_cache_new(recipe, &good, &cache));
    }
    CHECK(cache == NULL);
    rope = good_rope;
    CHECK_OK(kvq_cache_new(recipe, &good, &cache));
    kvq_cache_free(cache);
}

int main(void) {
    kvq_recipe *recipe = recipe_of("skvq:page=64,window=16,sinks=1");
    parameters(recipe);
    const kvq_cache_params params = {.shape = SHAPE, .n_layers = 2, .n_cells = 64, .n_seq_max = 2};
    static float q[65 * 128], k[65 * 64], v[65 * 64], out[65 * 128];
    uint32_t seqs[65] = {0};
    int32_t pos[65];
    for (int32_t i = 0; i < 65; i++) pos[i] = i;
    kvq_cache *cache = NULL;
    CHECK_OK(kvq_cache_new(recipe, &params, &cache));
    kvq_recipe_free(recipe);

    CHECK_INVALID(kvq_cache_end(cache));
    CHECK_INVALID(kvq_cache_attend(cache, 0, q, k, v, NULL, out));
    CHECK_INVALID(kvq_cache_begin(cache, seqs, pos, 0));
    CHECK_STATUS(kvq_cache_begin(cache, seqs, pos, 65), KVQ_STATUS_FULL);
    seqs[3] = 2;
    CHECK_INVALID(kvq_cache_begin(cache, seqs, pos, 5));
    seqs[3] = 0;
    pos[3] = 2;
    CHECK_INVALID(kvq_cache_begin(cache, seqs, pos, 5));
    pos[3] = 3;
    CHECK(kvq_cache_n_tokens(cache) == 0);

    CHECK_OK(kvq_cache_begin(cache, seqs, pos, 5));
    uint8_t byte = 0;
    size_t size = 0;
    CHECK_INVALID(kvq_cache_begin(cache, seqs, pos + 5, 1));
    CHECK_INVALID(kvq_cache_seq_rm(cache, 0, 0, -1));
    CHECK_INVALID(kvq_cache_seq_cp(cache, 0, 1, 0, -1));
    CHECK_INVALID(kvq_cache_seq_keep(cache, 0));
    CHECK_INVALID(kvq_cache_seq_shift(cache, 0, 0, -1, 1));
    CHECK_INVALID(kvq_cache_save_size(cache, &size));
    CHECK_INVALID(kvq_cache_save_memory(cache, &byte, 1, &size));
    CHECK_INVALID(kvq_cache_save_file(cache, "misuse.kvq"));
    CHECK_INVALID(kvq_cache_load_memory(cache, &byte, 1));
    CHECK_INVALID(kvq_cache_end(cache));
    CHECK_OK(kvq_cache_attend(cache, 1, q, k, v, NULL, out));
    CHECK_INVALID(kvq_cache_attend(cache, 1, q, k, v, NULL, out));
    CHECK_INVALID(kvq_cache_attend(cache, 2, q, k, v, NULL, out));
    CHECK_INVALID(kvq_cache_attend(cache, 0, (const float *)((const char *)q + 2), k, v, NULL, out));
    CHECK_INVALID(kvq_cache_end(cache));
    CHECK_OK(kvq_cache_attend(cache, 0, q, k, v, NULL, out));
    CHECK_OK(kvq_cache_end(cache));
    CHECK_INVALID(kvq_cache_begin(cache, seqs, pos, 5));
    CHECK_INVALID(kvq_cache_seq_rm(cache, -2, 0, -1));
    CHECK_INVALID(kvq_cache_seq_rm(cache, 2, 0, -1));
    CHECK_INVALID(kvq_cache_seq_cp(cache, 0, 2, 0, -1));
    CHECK_INVALID(kvq_cache_seq_cp(cache, 2, 0, 0, -1));
    CHECK_INVALID(kvq_cache_seq_keep(cache, 2));
    CHECK(kvq_cache_n_tokens(cache) == 5);

    /* A step that cannot go on can be dropped. */
    CHECK_OK(kvq_cache_begin(cache, seqs, pos + 5, 5));
    CHECK_OK(kvq_cache_clear(cache));
    CHECK_INVALID(kvq_cache_end(cache));
    CHECK_OK(kvq_cache_begin(cache, seqs, pos, 1));

    /* Rows that are no numbers spoil only what looks at them. */
    for (int i = 0; i < 64; i++) k[i] = v[i] = NAN;
    CHECK_OK(kvq_cache_attend(cache, 0, q, k, v, NULL, out));
    for (int i = 0; i < 128; i++) CHECK(isfinite(out[i]));
    kvq_cache_free(cache);
    return 0;
}
