/* A kvq_cache of two layers beside exact rows: every step is compared. */
#ifndef KVQ_MODEL_H
#define KVQ_MODEL_H

#include "exact.h"

enum { MODEL_LAYERS = 2 };

typedef struct {
    kvq_cache *cache;
    exact rows[MODEL_LAYERS];
    uint32_t n_swa[MODEL_LAYERS];
    uint64_t seed;
    double bound;
    bool rope; /* pairs (i, i + head_dim_k / 2), base 10000 */
} model;

static inline void model_rotate(const model *m, float *k, int32_t by) {
    const kvq_shape s = m->rows[0].shape;
    const uint32_t half = s.head_dim_k / 2;
    for (uint32_t head = 0; m->rope && head < s.n_kv_heads; head++) {
        for (uint32_t i = 0; i < half; i++) {
            float *x = k + (size_t)head * s.head_dim_k + i, *y = x + half;
            const double angle = by * pow(10000.0, -2.0 * i / s.head_dim_k);
            const double a = *x * cos(angle) - *y * sin(angle), b = *x * sin(angle) + *y * cos(angle);
            *x = (float)a;
            *y = (float)b;
        }
    }
}

static inline model model_new(const char *spec, kvq_shape shape, uint32_t n_cells, uint32_t n_threads, bool rope) {
    model m = {.seed = 1, .bound = NMSE_8_BITS, .rope = rope};
    const kvq_rope description = {shape.head_dim_k, 10000.0f, 1.0f, 0};
    const kvq_cache_params params = {
        .shape = shape, .n_layers = MODEL_LAYERS, .n_cells = n_cells, .n_seq_max = 4, .n_threads = n_threads,
        .rope = rope ? &description : NULL,
    };
    kvq_recipe *recipe = recipe_of(spec);
    CHECK_OK(kvq_cache_new(recipe, &params, &m.cache));
    kvq_recipe_free(recipe);
    for (int layer = 0; layer < MODEL_LAYERS; layer++) {
        m.rows[layer] = exact_new(shape, 4 * n_cells);
    }
    return m;
}

static inline void model_free(model *m) {
    kvq_cache_free(m->cache);
    for (int layer = 0; layer < MODEL_LAYERS; layer++) {
        exact_free(&m->rows[layer]);
    }
}

/* Appends n tokens to one sequence; outputs of all layers are compared and, if `keep` is given, copied there. */
static inline void model_append(model *m, uint32_t seq, uint32_t n, float *keep) {
    const kvq_shape s = m->rows[0].shape;
    const size_t n_q = (size_t)s.n_heads * s.head_dim_k, n_out = (size_t)s.n_heads * s.head_dim_v;
    const size_t n_k = (size_t)s.n_kv_heads * s.head_dim_k, n_v = (size_t)s.n_kv_heads * s.head_dim_v;
    int32_t first = 0, last = 0;
    CHECK_OK(kvq_cache_seq_range(m->cache, seq, &first, &last));
    uint32_t *seqs = make(n, sizeof *seqs);
    int32_t *pos = make(n, sizeof *pos);
    float *q = make(n * n_q, sizeof(float)), *k = make(n * n_k, sizeof(float)), *v = make(n * n_v, sizeof(float));
    float *out = make(n * n_out, sizeof(float));
    double *expected = make(n * n_out, sizeof(double));
    for (uint32_t i = 0; i < n; i++) {
        seqs[i] = seq;
        pos[i] = last + 1 + (int32_t)i;
    }
    CHECK_OK(kvq_cache_begin(m->cache, seqs, pos, n));
    for (uint32_t layer = 0; layer < MODEL_LAYERS; layer++) {
        exact *rows = &m->rows[layer];
        random_values(&m->seed, q, n * n_q);
        random_values(&m->seed, k, n * n_k);
        random_values(&m->seed, v, n * n_v);
        for (uint32_t i = 0; i < n; i++) {
            model_rotate(m, k + i * n_k, pos[i]);
            exact_append(rows, seq, pos[i], k + i * n_k, v + i * n_v);
        }
        for (uint32_t i = 0; i < n; i++) {
            exact_attend(rows, seq, pos[i], m->n_swa[layer], q + i * n_q, expected + i * n_out);
        }
        memset(out, 0xff, n * n_out * sizeof(float)); /* NaN: every value must be written */
        const kvq_cache_attend_options options = {.n_swa = m->n_swa[layer]};
        CHECK_OK(kvq_cache_attend(m->cache, layer, q, k, v, m->n_swa[layer] > 0 ? &options : NULL, out));
        CHECK_NMSE(out, expected, n * n_out, m->bound);
        if (keep != NULL) {
            memcpy(keep + layer * n * n_out, out, n * n_out * sizeof(float));
        }
    }
    CHECK_OK(kvq_cache_end(m->cache));
    free(seqs);
    free(pos);
    free(q);
    free(k);
    free(v);
    free(out);
    free(expected);
}

#endif
