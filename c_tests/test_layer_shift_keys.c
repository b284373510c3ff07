/* Positions move: exact rows are turned, packed ones read as if they were, and neither gets worse. */
#include "layer.h"

static const kvq_shape SHAPE = {4, 2, 64, 64};
enum { N_PAIRS = 24, N_CELLS = 320 };

static double frequency(int pair) {
    return pow(1e4, -(double)pair / N_PAIRS);
}

static kvq_rotation *rotation_of(uint32_t interleaved) {
    double frequencies[N_PAIRS];
    for (int i = 0; i < N_PAIRS; i++) frequencies[i] = frequency(i);
    kvq_rotation *rotation = NULL;
    CHECK_OK(kvq_rotation_new(frequencies, N_PAIRS, interleaved, &rotation));
    return rotation;
}

/* Attends nothing: the rows only have to get where they belong. `sinks` multiplies the keys of the first four tokens. */
static void store_ubatch(layer *l, exact *e, uint64_t *seed, uint32_t n, float sinks) {
    const size_t n_k = (size_t)SHAPE.n_kv_heads * SHAPE.head_dim_k, first = e->n;
    layer_begin_ubatch(l, e, seed, n);
    for (size_t i = 0; i < n * n_k && first + i / n_k < 4; i++) {
        l->k[i] *= sinks;
        e->k[first * n_k + i] *= sinks;
    }
    const kvq_store_args store = layer_store_args(l, e);
    CHECK_OK(kvq_store(l->layout, &store, 0, 1));
}

/* Moves cells [from, end) in the planner, in memory and in the exact copy. */
static void move(layer *l, exact *e, uint32_t interleaved, uint32_t from, int32_t distance) {
    int32_t moved[N_CELLS] = {0};
    for (uint32_t cell = from; cell < N_CELLS; cell++) moved[cell] = distance;
    kvq_shift *shift = NULL;
    CHECK_OK(kvq_planner_shift(l->planner, 0, moved, layer_is_live, l, &shift));
    for (uint32_t part = 0; part < 3; part++) {
        CHECK_OK(kvq_shift_keys(l->layout, l->rotation, shift, l->k_mem, NULL, part, 3));
    }
    kvq_shift_free(shift);
    for (size_t row = from * SHAPE.n_kv_heads; row < e->n * SHAPE.n_kv_heads; row++) {
        float *key = e->k + row * SHAPE.head_dim_k;
        for (int pair = 0; pair < N_PAIRS; pair++) {
            const double angle = distance * frequency(pair);
            float *x = key + (interleaved ? 2 * pair : pair), *y = key + (interleaved ? 2 * pair + 1 : pair + N_PAIRS);
            const double moved_x = *x * cos(angle) - *y * sin(angle), moved_y = *x * sin(angle) + *y * cos(angle);
            *x = (float)moved_x;
            *y = (float)moved_y;
        }
    }
}

/* Normalised error of the keys of the cells [first, end) as they are read back. */
static double key_error(const layer *l, const exact *e, uint32_t first, uint32_t end) {
    const size_t n_k = (size_t)SHAPE.n_kv_heads * SHAPE.head_dim_k;
    kvq_location *location = make(l->n_cells, sizeof *location);
    float *k = make((end - first) * n_k, sizeof(float));
    CHECK_OK(kvq_planner_locate(l->planner, 0, location));
    CHECK_OK(kvq_dequantize(l->layout, l->k_mem, NULL, location, l->rotation, first, end - first, k, NULL));
    double error = 0, power = 0;
    for (size_t i = 0; i < (end - first) * n_k; i++) {
        const double want = e->k[first * n_k + i];
        error += (k[i] - want) * (k[i] - want);
        power += want * want;
    }
    free(location);
    free(k);
    return error / power;
}

/* Sink tokens are pinned to their slots. Keys twenty times as large would ruin the range of the page around them. */
static void sinks_stay_out_of_their_page(const char *spec) {
    layer l = layer_new(spec, SHAPE, N_CELLS);
    exact e = exact_new(SHAPE, N_CELLS);
    uint64_t seed = 9;
    kvq_rotation *rotation = rotation_of(0);
    l.rotation = rotation;
    for (int i = 0; i < 20; i++) store_ubatch(&l, &e, &seed, 10, 20);
    const double before = key_error(&l, &e, 4, 64);
    for (int i = 0; i < 64; i++) move(&l, &e, 0, i % 2 ? 0 : 100, i % 3 ? 7 : -20);
    const double after = key_error(&l, &e, 4, 64), exact_rows = key_error(&l, &e, 0, 4);
    if (!(after <= 1.1 * before) || !(exact_rows < 1e-4)) {
        fprintf(stderr, "%s: the keys' error is %g, %g before shifts; sink tokens %g\n", spec, after, before, exact_rows);
        exit(1);
    }
    layer_free(&l);
    exact_free(&e);
    kvq_rotation_free(rotation);
}

static void attention_follows(uint32_t interleaved) {
    const uint32_t ubatches[] = {40, 1, 60, 1, 90, 1, 30, 1, 40};
    const size_t n_heads_out = (size_t)SHAPE.n_heads * SHAPE.head_dim_v;
    layer l = layer_new(SPEC_8_BITS, SHAPE, N_CELLS);
    exact e = exact_new(SHAPE, N_CELLS);
    uint64_t seed = 5;
    kvq_rotation *rotation = rotation_of(interleaved);
    l.rotation = rotation;
    for (size_t i = 0; i < sizeof ubatches / sizeof *ubatches; i++) {
        layer_begin_ubatch(&l, &e, &seed, ubatches[i]);
        float *out = make(l.n * n_heads_out, sizeof(float));
        kvq_attend_args args = layer_attend_args(&l, &e, out);
        CHECK_OK(kvq_attend(l.layout, &args, 0, 1));
        CHECK_NMSE(out, l.expected, l.n * n_heads_out, NMSE_8_BITS);
        if (i == 6) {
            args.rotation = NULL;
            CHECK_INVALID(kvq_attend(l.layout, &args, 0, 1));
        }
        const kvq_store_args store = layer_store_args(&l, &e);
        CHECK_OK(kvq_store(l.layout, &store, 0, 1));
        free(out);
        move(&l, &e, interleaved, (uint32_t)(13 * i), i % 2 ? -11 : 300);
    }
    layer_free(&l);
    exact_free(&e);
    kvq_rotation_free(rotation);
}

static void misuse(void) {
    layer l = layer_new(SPEC_8_BITS, SHAPE, N_CELLS), other = layer_new(SPEC_8_BITS, SHAPE, 192);
    exact e = exact_new(SHAPE, N_CELLS);
    uint64_t seed = 2;
    const double infinite = INFINITY, frequencies[65] = {0};
    kvq_rotation *rotation = NULL, *large = NULL;
    CHECK_INVALID(kvq_rotation_new(&infinite, 1, 0, &rotation));
    CHECK_INVALID(kvq_rotation_new(frequencies, 4, 2, &rotation));
    CHECK_INVALID(kvq_rotation_new(frequencies, UINT32_MAX, 0, &rotation));
    CHECK_OK(kvq_rotation_new(NULL, 0, 0, &rotation));
    CHECK_OK(kvq_rotation_new(frequencies, 65, 0, &large));
    store_ubatch(&l, &e, &seed, 200, 1);
    int32_t moved[N_CELLS];
    for (int i = 0; i < N_CELLS; i++) moved[i] = INT32_MAX;
    kvq_shift *shift = NULL, *second = NULL;
    CHECK_INVALID(kvq_planner_shift(l.planner, 1, moved, layer_is_live, &l, &shift));
    CHECK_OK(kvq_planner_shift(l.planner, 0, moved, layer_is_live, &l, &shift));
    CHECK_INVALID(kvq_planner_shift(l.planner, 0, moved, layer_is_live, &l, &second));
    CHECK_INVALID(kvq_shift_keys(other.layout, rotation, shift, other.k_mem, NULL, 0, 1));
    CHECK_INVALID(kvq_shift_keys(l.layout, large, shift, l.k_mem, NULL, 0, 1));
    CHECK_INVALID(kvq_shift_keys(l.layout, rotation, shift, l.k_mem, NULL, 1, 1));
    /* Keys that do not depend on their positions stay what they are. */
    l.rotation = rotation;
    const double before = key_error(&l, &e, 0, 200);
    CHECK_OK(kvq_shift_keys(l.layout, rotation, shift, l.k_mem, NULL, 0, 1));
    CHECK(key_error(&l, &e, 0, 200) == before && before < NMSE_8_BITS);
    kvq_location *location = make(N_CELLS, sizeof *location);
    float rows[2 * 64];
    CHECK_OK(kvq_planner_locate(l.planner, 0, location));
    CHECK(location[70].turned == INT32_MAX);
    CHECK_INVALID(kvq_dequantize(l.layout, l.k_mem, NULL, location, NULL, 70, 1, rows, NULL));
    CHECK_INVALID(kvq_dequantize(l.layout, l.k_mem, NULL, location, large, 70, 1, rows, NULL));
    free(location);
    kvq_shift_free(shift);
    kvq_rotation_free(rotation);
    kvq_rotation_free(large);
    layer_free(&l);
    layer_free(&other);
    exact_free(&e);
}

int main(void) {
    sinks_stay_out_of_their_page("kivi:k=4,v=8,page=64,window=32,sinks=4");
    sinks_stay_out_of_their_page("skvq:k=4,v=8,page=64,window=32,sinks=4");
    sinks_stay_out_of_their_page("ott:k=4,v=8,skip-layers=0,page=64,window=32,sinks=4");
    sinks_stay_out_of_their_page("qaq:k=4,v=4,page=64,window=32,sinks=4");
    attention_follows(0);
    attention_follows(1);
    misuse();
    return 0;
}
