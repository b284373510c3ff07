/* Wrong numbers, strides, parts and plans are errors. */
#include "layer.h"

static const kvq_shape SHAPE = {4, 2, 64, 64};

static void attend_misuse(const layer *l, const exact *e, float *out) {
    const kvq_attend_args good = layer_attend_args(l, e, out);
    kvq_attend_args bad;
    CHECK_INVALID(kvq_attend(l->layout, &good, 0, 0));
    CHECK_INVALID(kvq_attend(l->layout, &good, 2, 2));
#define WITH(field, value)                             \
    do {                                               \
        bad = good;                                    \
        bad.field = (value);                           \
        CHECK_INVALID(kvq_attend(l->layout, &bad, 0, 1)); \
    } while (0)
    WITH(n_tokens, 0);
    WITH(n_tokens, 1);
    WITH(n_splits, 0);
    WITH(mask_is_f16, 2);
    WITH(plan_len, 3);
    WITH(plan_len, good.plan_len - 1);
    WITH(q_stride_token, SIZE_MAX);
    WITH(q_stride_head, SIZE_MAX / 2);
    WITH(k_stride_token, SIZE_MAX / 4 + 1);
    WITH(v_stride_head, SIZE_MAX);
    WITH(mask_stride_token, SIZE_MAX);
    WITH(q, (const float *)((const char *)good.q + 1));
    WITH(plan, (const int32_t *)((const char *)good.plan + 2));
#undef WITH
    /* A plan whose numbers point outside. */
    const size_t step = under_valgrind() ? 67 : 1;
    for (size_t i = 0; i < l->plan_len; i += i < 16 ? 1 : step) {
        const int32_t was = l->plan[i];
        const int32_t values[] = {INT32_MAX, INT32_MIN, -3, 1 << 20};
        for (size_t j = 0; j < 4; j++) {
            l->plan[i] = values[j];
            (void)kvq_attend(l->layout, &good, 0, 1);
        }
        l->plan[i] = was;
    }
    CHECK_OK(kvq_attend(l->layout, &good, 0, 1));
}

static void store_misuse(const layer *l, const exact *e) {
    const kvq_store_args good = layer_store_args(l, e);
    kvq_store_args bad = good;
    CHECK_INVALID(kvq_store(l->layout, &good, 0, 0));
    CHECK_INVALID(kvq_store(l->layout, &good, 5, 5));
    bad.n_tokens = 1;
    CHECK_INVALID(kvq_store(l->layout, &bad, 0, 1));
    bad = good;
    bad.plan_len = good.plan_len - 1;
    CHECK_INVALID(kvq_store(l->layout, &bad, 0, 1));
    bad = good;
    bad.k_stride_token = SIZE_MAX;
    CHECK_INVALID(kvq_store(l->layout, &bad, 0, 1));
    const size_t step = under_valgrind() ? 67 : 1;
    for (size_t i = 0; i < l->plan_len; i += i < 16 ? 1 : step) {
        const int32_t was = l->plan[i];
        l->plan[i] = INT32_MAX - 5;
        (void)kvq_store(l->layout, &good, 0, 1);
        l->plan[i] = was;
    }
    CHECK_OK(kvq_store(l->layout, &good, 0, 1));
}

/* Locations that no planner gives. */
static void location_misuse(const layer *l) {
    static float rows[2 * 64];
    kvq_location *location = make(l->n_cells, sizeof *location);
    const uint32_t n_slots = kvq_planner_n_slots(l->planner);
    const kvq_location values[] = {{KVQ_IN_SLOT, n_slots, 0}, {KVQ_IN_SLOT | KVQ_IN_PAGE, UINT32_MAX, 0}, {4, 0, 0},
                                   {UINT32_MAX, 0, 0}};
    for (size_t i = 0; i < 4; i++) {
        location[7] = values[i];
        CHECK_INVALID(kvq_dequantize(l->layout, l->k_mem, NULL, location, NULL, 7, 1, rows, NULL));
    }
    free(location);
}

int main(void) {
    layer l = layer_new(SPEC_8_BITS, SHAPE, 128), other = layer_new(SPEC_8_BITS, SHAPE, 192);
    exact e = exact_new(SHAPE, 128);
    uint64_t seed = 3;
    layer_begin_ubatch(&l, &e, &seed, 100);
    float *out = make((size_t)100 * SHAPE.n_heads * SHAPE.head_dim_v, sizeof(float));
    attend_misuse(&l, &e, out);
    /* A plan for another number of cells. */
    const kvq_attend_args args = layer_attend_args(&l, &e, out);
    CHECK_INVALID(kvq_attend(other.layout, &args, 0, 1));
    store_misuse(&l, &e);
    location_misuse(&l);
    CHECK_INVALID(kvq_combine(l.layout, out, NULL, UINT32_MAX, UINT32_MAX, out, NULL, 0, 1));
    CHECK_INVALID(kvq_combine(l.layout, out, NULL, 2, 1, out, NULL, 1, 1));
    CHECK_INVALID(kvq_combine(l.layout, out, NULL, 0, 1, out, NULL, 0, 1));

    kvq_recipe *recipe = recipe_of("skvq:group=128");
    kvq_layout *layout = NULL;
    const kvq_shape shapes[] = {{4, 0, 64, 64}, {0, 1, 64, 64}, {3, 2, 64, 64}, {4, 2, 65, 64}, {4, 2, 64, 512}};
    for (size_t i = 0; i < 5; i++) {
        CHECK_STATUS(kvq_layout_new(recipe, &shapes[i], 0, 64, 16, &layout), KVQ_STATUS_SHAPE);
    }
    CHECK_STATUS(kvq_layout_new(recipe, &SHAPE, 0, 64, 16, &layout), KVQ_STATUS_RECIPE);
    kvq_recipe_free(recipe);
    recipe = recipe_of("skvq");
    CHECK_INVALID(kvq_layout_new(recipe, &SHAPE, 0, 0, 16, &layout));
    CHECK_INVALID(kvq_layout_new(recipe, &SHAPE, 0, UINT32_MAX, 16, &layout));
    CHECK_INVALID(kvq_layout_new(recipe, &SHAPE, 0, 64, UINT32_MAX, &layout));
    CHECK(layout == NULL);
    kvq_recipe_free(recipe);
    free(out);
    layer_free(&l);
    layer_free(&other);
    exact_free(&e);
    return 0;
}
