/* The low-level path against exact attention: parts, splits, both mask types, the view after the store, rows read and
   replaced. */
#include "layer.h"

static const kvq_shape SHAPE = {4, 2, 64, 96};

/* float to half for 0 and -infinity, all that a causal mask holds. */
static uint16_t *half_mask(const layer *l, const exact *e) {
    uint16_t *mask = make((size_t)l->n * e->n, sizeof(uint16_t));
    for (size_t i = 0; i < (size_t)l->n * e->n; i++) {
        mask[i] = l->mask[i] == 0 ? 0 : 0xfc00;
    }
    return mask;
}

/* `lse` gets the logarithms of the softmax denominators, float [n_tokens][n_heads]. */
static void attend_in_parts(const layer *l, const exact *e, uint32_t n_parts, float *lse) {
    const size_t n_out = (size_t)l->n * SHAPE.n_heads * SHAPE.head_dim_v;
    float *out = make(n_out, sizeof(float));
    memset(out, 0xff, n_out * sizeof(float)); /* NaN: every value must be written */
    kvq_attend_args args = layer_attend_args(l, e, out);
    args.lse = lse;
    for (uint32_t part = n_parts; part-- > 0;) {
        CHECK_OK(kvq_attend(l->layout, &args, part, n_parts));
    }
    CHECK_NMSE(out, l->expected, n_out, NMSE_8_BITS);
    free(out);
}

/* `expected_lse` is what attention without splits gave. */
static void attend_in_splits(const layer *l, const exact *e, uint32_t n_splits, const float *expected_lse) {
    const size_t n_rows = (size_t)l->n * SHAPE.n_heads;
    float *partial = make(n_splits * n_rows * (SHAPE.head_dim_v + 2), sizeof(float));
    float *out = make(n_rows * SHAPE.head_dim_v, sizeof(float));
    float *lse = make(n_rows, sizeof(float));
    uint16_t *mask = half_mask(l, e);
    kvq_attend_args args = layer_attend_args(l, e, partial);
    args.n_splits = n_splits;
    args.mask = mask;
    args.mask_is_f16 = 1;
    CHECK_OK(kvq_attend(l->layout, &args, 0, 2));
    CHECK_OK(kvq_attend(l->layout, &args, 1, 2));
    for (uint32_t part = 0; part < 3; part++) {
        CHECK_OK(kvq_combine(l->layout, partial, NULL, n_splits, l->n, out, lse, part, 3));
    }
    CHECK_NMSE(out, l->expected, n_rows * SHAPE.head_dim_v, NMSE_8_BITS);
    for (size_t i = 0; i < n_rows; i++) {
        /* Only the order of a few additions differs. */
        CHECK(fabsf(lse[i] - expected_lse[i]) <= 1e-5f * (1 + fabsf(expected_lse[i])));
    }
    free(lse);
    free(partial);
    free(out);
    free(mask);
}

/* As layers do that share another layer's memory: no current rows, after the store. */
static void attend_after_store(const layer *l, const exact *e) {
    const size_t n_out = (size_t)l->n * SHAPE.n_heads * SHAPE.head_dim_v;
    float *out = make(n_out, sizeof(float));
    kvq_attend_args args = layer_attend_args(l, e, out);
    args.k_cur = args.v_cur = NULL;
    CHECK_OK(kvq_attend(l->layout, &args, 0, 1));
    CHECK_NMSE(out, l->expected, n_out, NMSE_8_BITS);
    free(out);
}

static void read_rows(const layer *l, const exact *e) {
    const size_t n_k = (size_t)SHAPE.n_kv_heads * SHAPE.head_dim_k, n_v = (size_t)SHAPE.n_kv_heads * SHAPE.head_dim_v;
    const uint32_t first = (uint32_t)e->n / 3, n = (uint32_t)e->n - first;
    kvq_location *location = make(l->n_cells, sizeof *location);
    float *k = make(n * n_k, sizeof(float)), *v = make(n * n_v, sizeof(float));
    double *exact_k = make(n * n_k, sizeof(double)), *exact_v = make(n * n_v, sizeof(double));
    for (size_t i = 0; i < n * n_k; i++) exact_k[i] = e->k[first * n_k + i];
    for (size_t i = 0; i < n * n_v; i++) exact_v[i] = e->v[first * n_v + i];
    CHECK_OK(kvq_planner_locate(l->planner, 0, location));
    for (uint32_t cell = 0; cell < l->n_cells; cell++) {
        CHECK((location[cell].places == KVQ_NOWHERE) == (cell >= e->n));
    }
    CHECK_OK(kvq_dequantize(l->layout, l->k_mem, l->v_mem, location, NULL, first, n, k, v));
    CHECK_NMSE(k, exact_k, n * n_k, NMSE_8_BITS);
    CHECK_NMSE(v, exact_v, n * n_v, NMSE_8_BITS);
    /* Cells that hold nothing give zeros; one side alone is left as asked. */
    memset(k, 0xff, n_k * sizeof(float));
    CHECK_OK(kvq_dequantize(l->layout, l->k_mem, NULL, location, NULL, (uint32_t)e->n, 1, k, NULL));
    for (size_t i = 0; i < n_k; i++) CHECK(k[i] == 0);
    CHECK_INVALID(kvq_dequantize(l->layout, l->k_mem, l->v_mem, location, NULL, 1, l->n_cells, k, v));
    CHECK_INVALID(kvq_dequantize(l->layout, l->k_mem, l->v_mem, location, NULL, UINT32_MAX, 1, k, v));
    free(location);
    free(k);
    free(v);
    free(exact_k);
    free(exact_v);
}

/* Attends and stores 200 tokens in three steps; what the last one gives. */
static float *answer(layer *l, exact *e, uint64_t seed) {
    const uint32_t ubatches[] = {130, 62, 8};
    float *out = make((size_t)130 * SHAPE.n_heads * SHAPE.head_dim_v, sizeof(float));
    for (size_t i = 0; i < sizeof ubatches / sizeof *ubatches; i++) {
        layer_begin_ubatch(l, e, &seed, ubatches[i]);
        const kvq_attend_args attend = layer_attend_args(l, e, out);
        CHECK_OK(kvq_attend(l->layout, &attend, 0, 1));
        kvq_store_args store = layer_store_args(l, e);
        store.q = l->q;
        store.q_stride_token = (size_t)SHAPE.n_heads * SHAPE.head_dim_k;
        store.q_stride_head = SHAPE.head_dim_k;
        CHECK_OK(kvq_store(l->layout, &store, 0, 1));
    }
    return out;
}

/* When all tokens are gone, a plan without rows, or of new tokens, makes the layer forget what it has learned. */
static void forget(bool without_rows) {
    layer l = layer_new("kivi:k=2.25,page=64,window=32", SHAPE, 320);
    exact e = exact_new(SHAPE, 320);
    float *answers[3];
    for (int i = 0; i < 3; i++) {
        answers[i] = answer(&l, &e, i == 1 ? 8 : 9);
        memset(l.live, 0, l.n_cells * sizeof(bool));
        e.n = 0;
        if (without_rows) {
            const kvq_row none = {0, 0, 0};
            CHECK_OK(kvq_planner_plan(l.planner, 0, &none, 0, layer_is_live, &l, l.plan, l.plan_len));
            kvq_store_args store = {.k_mem = l.k_mem, .v_mem = l.v_mem, .plan = l.plan, .plan_len = l.plan_len};
            CHECK_OK(kvq_store(l.layout, &store, 0, 1));
        }
    }
    const size_t n_bytes = (size_t)8 * SHAPE.n_heads * SHAPE.head_dim_v * sizeof(float);
    CHECK(memcmp(answers[0], answers[1], n_bytes) != 0);
    CHECK(memcmp(answers[0], answers[2], n_bytes) == 0);
    for (int i = 0; i < 3; i++) free(answers[i]);
    layer_free(&l);
    exact_free(&e);
}

int main(void) {
    const uint32_t ubatches[] = {1, 40, 1, 22, 1, 64, 130, 1, 1, 38}, n_cells = 320;
    layer l = layer_new(SPEC_8_BITS, SHAPE, n_cells);
    exact e = exact_new(SHAPE, n_cells);
    uint64_t seed = 5;
    CHECK(kvq_attend_splits(l.layout, 1, 1) == 1 && kvq_attend_splits(l.layout, 1, 64) >= 1);
    for (size_t i = 0; i < sizeof ubatches / sizeof *ubatches; i++) {
        layer_begin_ubatch(&l, &e, &seed, ubatches[i]);
        float *lse = make((size_t)l.n * SHAPE.n_heads, sizeof(float));
        attend_in_parts(&l, &e, 1, NULL);
        attend_in_parts(&l, &e, 2, lse);
        attend_in_parts(&l, &e, 7, lse);
        attend_in_splits(&l, &e, 2, lse);
        attend_in_splits(&l, &e, 5, lse);
        kvq_store_args store = layer_store_args(&l, &e);
        store.q = l.q;
        store.q_stride_token = (size_t)SHAPE.n_heads * SHAPE.head_dim_k;
        store.q_stride_head = SHAPE.head_dim_k;
        store.lse = lse;
        store.scale = layer_attend_args(&l, &e, NULL).scale;
        for (uint32_t part = 0; part < 3; part++) {
            CHECK_OK(kvq_store(l.layout, &store, part, 3));
        }
        free(lse);
        attend_after_store(&l, &e);
        read_rows(&l, &e);
    }
    /* Pages were sealed, of 8 bits: what that adds to a logit is small beside the logit. */
    kvq_key_error error;
    CHECK_OK(kvq_layer_key_error(l.layout, l.k_mem, &error));
    CHECK(error.rows >= 4 && error.signal > 0 && error.noise > 0 && error.noise <= NMSE_8_BITS * error.signal);
    layer_free(&l);
    exact_free(&e);
    forget(false);
    forget(true);
    return 0;
}
