/* One layer of one stream in memory of our own: the low-level path, step by step. */
#ifndef KVQ_LAYER_H
#define KVQ_LAYER_H

#include "exact.h"

typedef struct {
    kvq_planner *planner;
    kvq_layout *layout;
    const kvq_rotation *rotation; /* NULL unless positions move */
    uint32_t n_cells;
    uint8_t *k_mem, *v_mem;
    void *raw[2];
    bool *live; /* [n_cells] */
    int32_t *plan;
    size_t plan_len;
    uint32_t n; /* tokens of the current ubatch */
    float *q, *k, *v, *mask;
    double *expected;
} layer;

static inline uint8_t *aligned(void **raw, size_t n_bytes) {
    *raw = make(n_bytes + 64, 1);
    return (uint8_t *)(((uintptr_t)*raw + 63) / 64 * 64);
}

static inline layer layer_new(const char *spec, kvq_shape shape, uint32_t n_cells) {
    layer l = {.n_cells = n_cells};
    kvq_recipe *recipe = recipe_of(spec);
    CHECK_OK(kvq_planner_new(recipe, n_cells, 1, 1, &l.planner));
    CHECK_OK(kvq_layout_new(recipe, &shape, 0, n_cells, kvq_planner_n_slots(l.planner), &l.layout));
    kvq_recipe_free(recipe);
    l.k_mem = aligned(&l.raw[0], kvq_layout_k_bytes(l.layout));
    l.v_mem = aligned(&l.raw[1], kvq_layout_v_bytes(l.layout));
    CHECK_OK(kvq_use_large_pages(l.k_mem, kvq_layout_k_bytes(l.layout)));
    CHECK_OK(kvq_use_large_pages(l.v_mem, kvq_layout_v_bytes(l.layout)));
    l.live = make(n_cells, sizeof(bool));
    return l;
}

static inline void layer_end_ubatch(layer *l) {
    free(l->plan);
    free(l->q);
    free(l->k);
    free(l->v);
    free(l->mask);
    free(l->expected);
    l->plan = NULL;
    l->q = l->k = l->v = l->mask = NULL;
    l->expected = NULL;
}

static inline void layer_free(layer *l) {
    layer_end_ubatch(l);
    kvq_planner_free(l->planner);
    kvq_layout_free(l->layout);
    free(l->raw[0]);
    free(l->raw[1]);
    free(l->live);
}

static inline bool layer_is_live(void *user, uint32_t stream, uint32_t cell) {
    CHECK(stream == 0);
    return ((const layer *)user)->live[cell];
}

/* Plans n tokens that continue the only sequence, cell = position, with random rows; fills mask and expected. */
static inline void layer_begin_ubatch(layer *l, exact *e, uint64_t *seed, uint32_t n) {
    const kvq_shape s = e->shape;
    const uint32_t first = (uint32_t)e->n, n_kv = first + n;
    layer_end_ubatch(l);
    l->n = n;
    kvq_row *rows = make(n, sizeof *rows);
    for (uint32_t i = 0; i < n; i++) {
        rows[i] = (kvq_row){first + i, (int32_t)(first + i), 0};
    }
    l->plan_len = kvq_planner_plan_len(l->planner, n);
    l->plan = make(l->plan_len, sizeof(int32_t));
    CHECK_OK(kvq_planner_plan(l->planner, 0, rows, n, layer_is_live, l, l->plan, l->plan_len));
    free(rows);

    const size_t n_k = (size_t)s.n_kv_heads * s.head_dim_k, n_v = (size_t)s.n_kv_heads * s.head_dim_v;
    const size_t n_q = (size_t)s.n_heads * s.head_dim_k, n_out = (size_t)s.n_heads * s.head_dim_v;
    l->q = make(n * n_q, sizeof(float));
    l->k = make(n * n_k, sizeof(float));
    l->v = make(n * n_v, sizeof(float));
    l->mask = make((size_t)n * n_kv, sizeof(float));
    l->expected = make(n * n_out, sizeof(double));
    random_values(seed, l->q, n * n_q);
    random_values(seed, l->k, n * n_k);
    random_values(seed, l->v, n * n_v);
    for (uint32_t i = 0; i < n; i++) {
        exact_append(e, 0, (int32_t)(first + i), l->k + i * n_k, l->v + i * n_v);
        l->live[first + i] = true;
        for (uint32_t cell = 0; cell < n_kv; cell++) {
            l->mask[(size_t)i * n_kv + cell] = cell <= first + i ? 0 : -INFINITY;
        }
    }
    for (uint32_t i = 0; i < n; i++) {
        exact_attend(e, 0, (int32_t)(first + i), 0, l->q + i * n_q, l->expected + i * n_out);
    }
}

static inline kvq_attend_args layer_attend_args(const layer *l, const exact *e, float *out) {
    const kvq_shape s = e->shape;
    return (kvq_attend_args){
        .q = l->q, .q_stride_token = (size_t)s.n_heads * s.head_dim_k, .q_stride_head = s.head_dim_k,
        .k_cur = l->k, .k_stride_token = (size_t)s.n_kv_heads * s.head_dim_k, .k_stride_head = s.head_dim_k,
        .v_cur = l->v, .v_stride_token = (size_t)s.n_kv_heads * s.head_dim_v, .v_stride_head = s.head_dim_v,
        .k_mem = l->k_mem, .v_mem = l->v_mem, .plan = l->plan, .plan_len = l->plan_len, .rotation = l->rotation,
        .mask = l->mask, .mask_stride_token = e->n, .n_kv = (uint32_t)e->n,
        .scale = 1.0f / sqrtf((float)s.head_dim_k), .n_tokens = l->n, .n_splits = 1, .out = out,
    };
}

static inline kvq_store_args layer_store_args(const layer *l, const exact *e) {
    const kvq_shape s = e->shape;
    return (kvq_store_args){
        .k_cur = l->k, .k_stride_token = (size_t)s.n_kv_heads * s.head_dim_k, .k_stride_head = s.head_dim_k,
        .v_cur = l->v, .v_stride_token = (size_t)s.n_kv_heads * s.head_dim_v, .v_stride_head = s.head_dim_v,
        .k_mem = l->k_mem, .v_mem = l->v_mem, .plan = l->plan, .plan_len = l->plan_len, .rotation = l->rotation,
        .n_tokens = l->n,
    };
}

#endif
