/* A recipe with a profile: refused without one, then stored, read back and attended; keys and values that the profile
 * knows come back nearly exact at two bits. */
#include "check.h"

enum { DIM = 64, CELLS = 512, TOKENS = 384 };

static bool is_live(void *user, uint32_t stream, uint32_t cell) {
    (void)stream;
    return cell < *(const uint32_t *)user;
}

int main(void) {
    const kvq_shape shape = {1, 1, DIM, DIM};
    kvq_recipe *bare = recipe_of("aqua:k=2,window=0,sinks=0"), *recipe = NULL;
    kvq_layout *layout = NULL;
    char text[512];
    CHECK_STATUS(kvq_layout_new(bare, &shape, 0, CELLS, 128, &layout), KVQ_STATUS_RECIPE);
    CHECK(strstr(kvq_last_error(), "llama-kvq-calibrate") != NULL);
    CHECK_STATUS(kvq_recipe_profile(bare, text, sizeof text), KVQ_STATUS_RECIPE);
    kvq_recipe *named = recipe_of("aqua:profile=some/file.gguf");
    CHECK_OK(kvq_recipe_profile(named, text, sizeof text));
    CHECK(strcmp(text, "some/file.gguf") == 0);
    CHECK_STATUS(kvq_layout_new(named, &shape, 0, CELLS, 128, &layout), KVQ_STATUS_RECIPE);
    kvq_recipe_free(named);

    /* Keys are the bias turned by their position and a little noise, values what a tenth of that noise says. */
    float *bias = make(DIM, sizeof(float)), *identity = make(DIM * DIM, sizeof(float));
    float *predictor = make(DIM * DIM, sizeof(float)), *offset = make(DIM, sizeof(float));
    for (size_t i = 0; i < DIM; i++) {
        bias[i] = (float)(i % 5) - 2;
        identity[i * DIM + i] = 1;
        predictor[i * DIM + i] = 0.1f;
        offset[i] = 1 + (float)(i % 3);
    }
    const double frequency = 0.05;
    kvq_rotation *rotation = NULL;
    kvq_profile *profile = NULL;
    CHECK_OK(kvq_rotation_new(&frequency, 1, 1, &rotation));
    CHECK_OK(kvq_profile_new(&profile));
    const kvq_profile_layer numbers = {shape, bias, identity, predictor, offset};
    CHECK_OK(kvq_profile_set_layer(profile, 0, rotation, &numbers));
    CHECK_OK(kvq_recipe_with_profile(bare, profile, &recipe));
    kvq_profile_free(profile);

    kvq_planner *planner = NULL;
    CHECK_OK(kvq_planner_new(recipe, CELLS, 1, 1, &planner));
    const uint32_t n_slots = kvq_planner_n_slots(planner);
    CHECK_STATUS(kvq_layout_new(recipe, &shape, 7, CELLS, n_slots, &layout), KVQ_STATUS_FORMAT); /* no such layer */
    CHECK_OK(kvq_layout_new(recipe, &shape, 0, CELLS, n_slots, &layout));
    CHECK(kvq_layout_wants_positions(layout));
    const size_t n_bytes = kvq_layout_profile_bytes(layout);
    uint8_t *for_device = make(n_bytes, 1);
    CHECK(n_bytes > 4 * DIM * DIM * sizeof(float));
    CHECK_STATUS(kvq_layout_profile(layout, for_device, n_bytes - 1), KVQ_STATUS_BUFFER_TOO_SMALL);
    CHECK_OK(kvq_layout_profile(layout, for_device, n_bytes));
    uint8_t *raw[2] = {make(kvq_layout_k_bytes(layout) + 64, 1), make(kvq_layout_v_bytes(layout) + 64, 1)};
    uint8_t *k_mem = raw[0] + (64 - (uintptr_t)raw[0] % 64), *v_mem = raw[1] + (64 - (uintptr_t)raw[1] % 64);

    float *k = make(TOKENS * DIM, sizeof(float)), *v = make(TOKENS * DIM, sizeof(float));
    int32_t *positions = make(CELLS, sizeof(int32_t));
    kvq_row *rows = make(TOKENS, sizeof *rows);
    uint64_t seed = 1;
    for (uint32_t t = 0; t < TOKENS; t++) {
        const int32_t pos = 1000 + (int32_t)t;
        float *key = k + t * DIM;
        rows[t] = (kvq_row){t, pos, 0};
        positions[t] = pos;
        for (size_t i = 0; i < DIM; i++) {
            key[i] = 0.1f * (float)(random_bits(&seed) % 2001) / 1000 - 0.1f;
            v[t * DIM + i] = 0.1f * key[i] + offset[i];
        }
        /* The noise is that of the page's frame: turned as its first token is. */
        const double first = frequency * (pos - (int32_t)t % 128), here = frequency * pos;
        const float x = key[0], y = key[1];
        key[0] = (float)(x * cos(first) - y * sin(first) + bias[0] * cos(here) - bias[1] * sin(here));
        key[1] = (float)(x * sin(first) + y * cos(first) + bias[0] * sin(here) + bias[1] * cos(here));
        for (size_t i = 2; i < DIM; i++) {
            key[i] += bias[i];
        }
    }

    const size_t len = kvq_planner_plan_len(planner, TOKENS);
    int32_t *plan = make(len, sizeof(int32_t));
    uint32_t n_live = 0;
    CHECK_OK(kvq_planner_plan(planner, 0, rows, TOKENS, is_live, &n_live, plan, len));
    kvq_store_args args = {
        .k_cur = k, .k_stride_token = DIM, .k_stride_head = DIM, .v_cur = v, .v_stride_token = DIM, .v_stride_head = DIM,
        .k_mem = k_mem, .v_mem = v_mem, .plan = plan, .plan_len = len, .n_tokens = TOKENS,
    };
    CHECK_INVALID(kvq_store(layout, &args, 0, 1)); /* it wants positions */
    args.positions = positions;
    CHECK_OK(kvq_store(layout, &args, 0, 1));

    kvq_location *location = make(CELLS, sizeof *location);
    float *k_out = make(TOKENS * DIM, sizeof(float)), *v_out = make(TOKENS * DIM, sizeof(float));
    double *want = make(TOKENS * DIM, sizeof(double));
    CHECK_OK(kvq_planner_locate(planner, 0, location));
    CHECK_INVALID(kvq_dequantize(layout, NULL, v_mem, location, NULL, 0, TOKENS, NULL, v_out)); /* keys predict values */
    CHECK_OK(kvq_dequantize(layout, k_mem, v_mem, location, NULL, 0, TOKENS, k_out, v_out));
    CHECK(location[0].places == KVQ_IN_PAGE);
    for (size_t i = 0; i < TOKENS * DIM; i++) {
        want[i] = k[i];
    }
    CHECK_NMSE(k_out, want, TOKENS * DIM, 1e-3);
    for (size_t i = 0; i < TOKENS * DIM; i++) {
        want[i] = v[i];
    }
    CHECK_NMSE(v_out, want, TOKENS * DIM, 1e-5);

    void *all[] = {for_device, bias, identity, predictor, offset, raw[0], raw[1], k, v, positions, rows, plan, location, k_out, v_out, want};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        free(all[i]);
    }
    kvq_layout_free(layout);
    kvq_planner_free(planner);
    kvq_rotation_free(rotation);
    kvq_recipe_free(recipe);
    kvq_recipe_free(bare);
    return 0;
}
