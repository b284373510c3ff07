/* Removing, copying, keeping, shifting and clearing, each followed by steps that are compared with exact attention. */
#include "model.h"

static const kvq_shape SHAPE = {4, 2, 64, 64};

static void expect_range(const model *m, uint32_t seq, int32_t min, int32_t max) {
    int32_t got_min = 0, got_max = 0;
    CHECK_OK(kvq_cache_seq_range(m->cache, seq, &got_min, &got_max));
    if (got_min != min || got_max != max) {
        fprintf(stderr, "sequence %u holds %d..%d instead of %d..%d\n", seq, got_min, got_max, min, max);
        exit(1);
    }
}

/* Applies a change of sequence sets or positions to the exact rows of all layers. */
#define FOR_EACH_ROW(m, row, i) \
    for (int layer_ = 0; layer_ < MODEL_LAYERS; layer_++) \
        for (exact *row = &(m)->rows[layer_]; row != NULL; row = NULL) \
            for (size_t i = 0; i < row->n; i++)

static void remove_and_reuse(void) {
    model m = model_new(SPEC_8_BITS, SHAPE, 200, 1, false);
    model_append(&m, 0, 120, NULL);
    model_append(&m, 1, 70, NULL);
    CHECK_OK(kvq_cache_seq_rm(m.cache, 0, 30, 90));
    FOR_EACH_ROW(&m, row, i) {
        if (row->seqs[i] == 1 && row->pos[i] >= 30 && row->pos[i] < 90) row->seqs[i] = 0;
    }
    CHECK(kvq_cache_n_tokens(m.cache) == 130);
    model_append(&m, 1, 60, NULL);
    model_append(&m, 0, 1, NULL);
    model_append(&m, 0, 9, NULL);
    CHECK(kvq_cache_n_tokens(m.cache) == 200);
    CHECK_OK(kvq_cache_seq_rm(m.cache, -1, 100, -1));
    FOR_EACH_ROW(&m, row, i) {
        if (row->pos[i] >= 100) row->seqs[i] = 0;
    }
    expect_range(&m, 0, 0, 99);
    expect_range(&m, 1, 0, 99);
    model_append(&m, 0, 30, NULL);
    model_free(&m);
}

static void copy_and_keep(void) {
    model m = model_new(SPEC_8_BITS, SHAPE, 256, 1, false);
    model_append(&m, 0, 100, NULL);
    CHECK_OK(kvq_cache_seq_cp(m.cache, 0, 3, -1, 80));
    FOR_EACH_ROW(&m, row, i) {
        if (row->pos[i] < 80) row->seqs[i] |= 8;
    }
    CHECK(kvq_cache_n_tokens(m.cache) == 100);
    expect_range(&m, 3, 0, 79);
    model_append(&m, 3, 40, NULL);
    model_append(&m, 0, 40, NULL);
    CHECK_INVALID(kvq_cache_seq_shift(m.cache, 3, 0, 10, 1000));
    CHECK_OK(kvq_cache_seq_keep(m.cache, 3));
    FOR_EACH_ROW(&m, row, i) {
        row->seqs[i] &= 8;
    }
    expect_range(&m, 0, -1, -1);
    CHECK(kvq_cache_n_tokens(m.cache) == 120);
    model_append(&m, 3, 50, NULL);
    model_append(&m, 0, 50, NULL);
    model_free(&m);
}

static void shift(bool rope) {
    model m = model_new(SPEC_8_BITS, SHAPE, 256, 2, rope);
    m.bound = 3 * NMSE_8_BITS; /* packed keys are encoded a second time */
    model_append(&m, 0, 200, NULL);
    CHECK_OK(kvq_cache_seq_rm(m.cache, 0, 4, 64));
    CHECK_OK(kvq_cache_seq_shift(m.cache, 0, 64, -1, -60));
    FOR_EACH_ROW(&m, row, i) {
        if (row->pos[i] >= 4 && row->pos[i] < 64) {
            row->seqs[i] = 0;
        } else if (row->pos[i] >= 64) {
            row->pos[i] -= 60;
            model_rotate(&m, row->k + i * SHAPE.n_kv_heads * SHAPE.head_dim_k, -60);
        }
    }
    expect_range(&m, 0, 0, 139);
    model_append(&m, 0, 1, NULL);
    model_append(&m, 0, 70, NULL);
    CHECK_INVALID(kvq_cache_seq_shift(m.cache, 0, 10, 20, -5));
    CHECK_INVALID(kvq_cache_seq_shift(m.cache, 0, 0, -1, -1));
    CHECK_INVALID(kvq_cache_seq_shift(m.cache, 0, 0, -1, INT32_MAX));
    model_append(&m, 0, 1, NULL);

    CHECK_OK(kvq_cache_clear(m.cache));
    FOR_EACH_ROW(&m, row, i) {
        row->seqs[i] = 0;
    }
    CHECK(kvq_cache_n_tokens(m.cache) == 0);
    expect_range(&m, 0, -1, -1);
    model_append(&m, 0, 90, NULL);
    model_free(&m);
}

int main(void) {
    remove_and_reuse();
    copy_and_keep();
    shift(true);
    if (!under_valgrind()) {
        shift(false);
    }
    return 0;
}
