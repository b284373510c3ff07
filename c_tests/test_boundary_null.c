/* NULL for every pointer of every function: an error or a harmless value, never a crash, and no output is touched. */
#include "check.h"

#define UNTOUCHED ((void *)(uintptr_t)0x5a5a)

static bool always(void *user, uint32_t stream, uint32_t cell) {
    (void)user, (void)stream, (void)cell;
    return true;
}

static void recipe_and_layout(kvq_recipe *recipe, kvq_layout *layout) {
    const kvq_shape shape = {4, 2, 64, 64};
    kvq_recipe *new_recipe = UNTOUCHED;
    kvq_layout *new_layout = UNTOUCHED;
    char text[512];
    size_t n = 77;
    kvq_range ranges[8];
    CHECK(kvq_recipe_is_off(NULL)); /* as a variable that is not set */
    memset(text, 'x', sizeof text);
    CHECK_INVALID(kvq_recipe_expand(NULL, text, sizeof text));
    CHECK_INVALID(kvq_recipe_expand("on", NULL, sizeof text));
    CHECK(text[0] == 'x' && text[sizeof text - 1] == 'x');
    const kvq_cached_layer cached = {shape, 0, 512, 1, 1};
    CHECK_INVALID(kvq_recipe_choose(NULL, &cached, 1, text, sizeof text, text, sizeof text));
    CHECK_INVALID(kvq_recipe_choose("auto:mem=1GiB", NULL, 1, text, sizeof text, text, sizeof text));
    CHECK_INVALID(kvq_recipe_choose("auto:mem=1GiB", &cached, SIZE_MAX / 2, text, sizeof text, text, sizeof text));
    CHECK_INVALID(kvq_recipe_choose("auto:mem=1GiB", &cached, 1, NULL, sizeof text, text, sizeof text));
    CHECK_INVALID(kvq_recipe_choose("auto:mem=1GiB", &cached, 1, text, sizeof text, NULL, sizeof text));
    CHECK(text[0] == 'x' && text[sizeof text - 1] == 'x');
    CHECK_INVALID(kvq_recipe_parse(NULL, &new_recipe));
    CHECK_INVALID(kvq_recipe_parse("skvq", NULL));
    CHECK_INVALID(kvq_recipe_spec(NULL, text, sizeof text));
    CHECK_INVALID(kvq_recipe_spec(recipe, NULL, sizeof text));
    CHECK(kvq_recipe_page(NULL) == 0 && kvq_recipe_window(NULL) == 0);
    CHECK_INVALID(kvq_recipe_fit(NULL, 64, 1, 1, &new_recipe));
    CHECK_INVALID(kvq_recipe_fit(recipe, 64, 1, 1, NULL));
    CHECK_INVALID(kvq_layout_new(NULL, &shape, 0, 64, 16, &new_layout));
    CHECK_INVALID(kvq_layout_new(recipe, NULL, 0, 64, 16, &new_layout));
    CHECK_INVALID(kvq_layout_new(recipe, &shape, 0, 64, 16, NULL));
    CHECK(kvq_layout_k_bytes(NULL) == 0 && kvq_layout_v_bytes(NULL) == 0);
    CHECK(kvq_layout_bits_k(NULL) == 0 && kvq_layout_bits_v(NULL) == 0);
    CHECK(kvq_layout_shape(NULL).n_heads == 0 && kvq_layout_shape(layout).n_heads == shape.n_heads);
    CHECK_INVALID(kvq_layout_format(NULL, text, sizeof text));
    CHECK_INVALID(kvq_layout_format(layout, NULL, sizeof text));
    CHECK_INVALID(kvq_layout_slot_ranges(NULL, KVQ_SIDE_K, ranges, 8, &n));
    CHECK_INVALID(kvq_layout_slot_ranges(layout, KVQ_SIDE_K, ranges, 8, NULL));
    CHECK_INVALID(kvq_layout_pool_ranges(NULL, KVQ_SIDE_K, ranges, 8, &n));
    CHECK_INVALID(kvq_layout_pool_ranges(layout, KVQ_SIDE_K, ranges, 8, NULL));
    CHECK(kvq_layout_profile_bytes(NULL) == 0 && kvq_layout_profile_bytes(layout) == 0);
    CHECK_INVALID(kvq_layout_profile(NULL, ranges, sizeof ranges));
    CHECK_INVALID(kvq_layout_profile(layout, NULL, 1));
    CHECK_INVALID(kvq_layout_page_ranges(NULL, KVQ_SIDE_K, 0, 1, ranges, 8, &n));
    CHECK_INVALID(kvq_layout_page_ranges(layout, KVQ_SIDE_K, 0, 1, ranges, 8, NULL));
    CHECK(new_recipe == UNTOUCHED && new_layout == UNTOUCHED && n == 77);
    kvq_recipe_free(NULL);
    kvq_layout_free(NULL);
}

static void profile_and_calibration(kvq_recipe *recipe) {
    static float numbers[64 * 64], rows[2 * 64];
    const kvq_shape shape = {1, 1, 64, 64};
    kvq_profile *profile = UNTOUCHED;
    kvq_calibration *calibration = UNTOUCHED;
    kvq_rotation *rotation = UNTOUCHED;
    kvq_recipe *new_recipe = UNTOUCHED;
    kvq_profile_layer layer = {shape, numbers, numbers, numbers, numbers}, found;
    const double frequency = 1;
    double frequencies[1];
    char text[64];
    size_t n = 77;
    CHECK_INVALID(kvq_profile_new(NULL));
    CHECK_INVALID(kvq_calibration_new(NULL, rotation, &calibration));
    CHECK_INVALID(kvq_calibration_new(&shape, NULL, &calibration));
    CHECK(profile == UNTOUCHED && calibration == UNTOUCHED);
    CHECK_OK(kvq_profile_new(&profile));
    CHECK_OK(kvq_rotation_new(&frequency, 1, 0, &rotation));
    CHECK_INVALID(kvq_calibration_new(&shape, rotation, NULL));
    CHECK_OK(kvq_calibration_new(&shape, rotation, &calibration));

    CHECK_INVALID(kvq_rotation_frequencies(NULL, frequencies, 1, &n));
    CHECK_INVALID(kvq_rotation_frequencies(rotation, frequencies, 1, NULL));
    CHECK_STATUS(kvq_rotation_frequencies(rotation, frequencies, 0, &n), KVQ_STATUS_BUFFER_TOO_SMALL);
    CHECK(n == 77);
    CHECK_OK(kvq_rotation_frequencies(rotation, NULL, 0, &n));
    CHECK(n == 1);
    CHECK_OK(kvq_rotation_frequencies(rotation, frequencies, 1, &n));
    CHECK(fabs(frequencies[0] - 1) < 1e-12);

    CHECK_INVALID(kvq_profile_set_layer(NULL, 0, rotation, &layer));
    CHECK_INVALID(kvq_profile_set_layer(profile, 0, NULL, &layer));
    CHECK_INVALID(kvq_profile_set_layer(profile, 0, rotation, NULL));
#define WITHOUT(field)                                                 \
    do {                                                               \
        kvq_profile_layer bad = layer;                                 \
        bad.field = NULL;                                              \
        CHECK_INVALID(kvq_profile_set_layer(profile, 0, rotation, &bad)); \
    } while (0)
    WITHOUT(key_bias);
    WITHOUT(key_transform);
    WITHOUT(predictor);
    WITHOUT(offset);
#undef WITHOUT
    CHECK_STATUS(kvq_profile_get_layer(profile, 0, &shape, &found), KVQ_STATUS_FORMAT); /* not set yet */
    CHECK_OK(kvq_profile_set_layer(profile, 0, rotation, &layer));
    CHECK_INVALID(kvq_profile_set_layer(profile, 1u << 30, rotation, &layer));
    CHECK_INVALID(kvq_profile_get_layer(NULL, 0, &shape, &found));
    CHECK_INVALID(kvq_profile_get_layer(profile, 0, NULL, &found));
    CHECK_INVALID(kvq_profile_get_layer(profile, 0, &shape, NULL));
    CHECK_OK(kvq_profile_get_layer(profile, 0, &shape, &found));
    CHECK(found.key_bias != numbers && found.key_bias[63] == 0);

    CHECK_INVALID(kvq_recipe_profile(NULL, text, sizeof text));
    CHECK_INVALID(kvq_recipe_profile(recipe, NULL, sizeof text));
    CHECK_OK(kvq_recipe_profile(recipe, text, sizeof text));
    CHECK(text[0] == '\0'); /* it wants none */
    CHECK_INVALID(kvq_recipe_with_profile(NULL, profile, &new_recipe));
    CHECK_INVALID(kvq_recipe_with_profile(recipe, NULL, &new_recipe));
    CHECK_INVALID(kvq_recipe_with_profile(recipe, profile, NULL));
    CHECK_STATUS(kvq_recipe_with_profile(recipe, profile, &new_recipe), KVQ_STATUS_RECIPE);
    CHECK(new_recipe == UNTOUCHED && !kvq_layout_wants_positions(NULL));

    const kvq_calibration_args seen = {
        .q = rows, .q_stride_token = 64, .q_stride_head = 64, .k = rows, .k_stride_token = 64, .k_stride_head = 64,
        .v = rows, .v_stride_token = 64, .v_stride_head = 64, .out = rows, .lse = rows, .scale = 1, .n_tokens = 2,
    };
    CHECK_INVALID(kvq_calibration_observe(NULL, &seen, 0, 1));
    CHECK_INVALID(kvq_calibration_observe(calibration, NULL, 0, 1));
#define WITHOUT(field)                                              \
    do {                                                            \
        kvq_calibration_args bad = seen;                            \
        bad.field = NULL;                                           \
        CHECK_INVALID(kvq_calibration_observe(calibration, &bad, 0, 1)); \
    } while (0)
    WITHOUT(q);
    WITHOUT(k);
    WITHOUT(v);
    WITHOUT(out);
    WITHOUT(lse);
#undef WITHOUT
    CHECK_OK(kvq_calibration_observe(calibration, &seen, 0, 1));
    CHECK_INVALID(kvq_calibration_solve(NULL, 1, 0, profile));
    CHECK_INVALID(kvq_calibration_solve(calibration, 1, 0, NULL));
    CHECK_INVALID(kvq_calibration_solve(calibration, 1, 0, profile)); /* two tokens say nothing */
    kvq_calibration_free(calibration);
    kvq_calibration_free(NULL);
    kvq_profile_free(profile);
    kvq_profile_free(NULL);
    kvq_rotation_free(rotation);
}

static void planner(kvq_recipe *recipe, kvq_planner *planner) {
    kvq_planner *new_planner = UNTOUCHED;
    const kvq_row row = {0, 0, 0};
    const uint32_t cell = 0;
    const int32_t turned = 0;
    const size_t len = kvq_planner_plan_len(planner, 1);
    int32_t *plan = make(len, sizeof(int32_t));
    size_t size = 77;
    uint8_t byte = 0;
    CHECK_INVALID(kvq_planner_new(NULL, 64, 1, 1, &new_planner));
    CHECK_INVALID(kvq_planner_new(recipe, 64, 1, 1, NULL));
    CHECK(kvq_planner_n_slots(NULL) == 0 && kvq_planner_plan_len(NULL, 1) == 0);
    CHECK_INVALID(kvq_planner_plan(NULL, 0, &row, 1, always, NULL, plan, len));
    CHECK_INVALID(kvq_planner_plan(planner, 0, NULL, 1, always, NULL, plan, len));
    CHECK_INVALID(kvq_planner_plan(planner, 0, &row, 1, NULL, NULL, plan, len));
    CHECK_INVALID(kvq_planner_plan(planner, 0, &row, 1, always, NULL, NULL, len));
    kvq_planner_reset(NULL, 0);
    CHECK_INVALID(kvq_planner_copy_stream(NULL, 0, 0));
    kvq_location location[1];
    CHECK_INVALID(kvq_planner_locate(NULL, 0, location));
    CHECK_INVALID(kvq_planner_locate(planner, 0, NULL));
    CHECK_INVALID(kvq_planner_export_size(NULL, 0, &size));
    CHECK_INVALID(kvq_planner_export_size(planner, 0, NULL));
    CHECK_INVALID(kvq_planner_export(NULL, 0, &byte, 1));
    CHECK_INVALID(kvq_planner_export(planner, 0, NULL, 1));
    CHECK_INVALID(kvq_planner_import(NULL, 0, &byte, 1));
    CHECK_INVALID(kvq_planner_import(planner, 0, NULL, 1));
    CHECK_INVALID(kvq_planner_adopt(NULL, 0, &cell, &turned, 1));
    CHECK_INVALID(kvq_planner_adopt(planner, 0, NULL, &turned, 1));
    CHECK_INVALID(kvq_planner_adopt(planner, 0, &cell, NULL, 1));
    CHECK(new_planner == UNTOUCHED && size == 77);
    kvq_planner_free(NULL);
    free(plan);
}

static void layer(kvq_layout *layout, kvq_planner *planner) {
    static float rows[4 * 64], out[4 * 66];
    const size_t len = kvq_planner_plan_len(planner, 1);
    int32_t *plan = make(len, sizeof(int32_t));
    kvq_location *location = make(64, sizeof *location);
    uint8_t *k_mem = make(kvq_layout_k_bytes(layout), 1), *v_mem = make(kvq_layout_v_bytes(layout), 1);
    const kvq_row row = {0, 0, 0};
    CHECK_OK(kvq_planner_plan(planner, 0, &row, 1, always, NULL, plan, len));
    CHECK_OK(kvq_planner_locate(planner, 0, location));

    const kvq_attend_args good = {
        .q = rows, .q_stride_token = 256, .q_stride_head = 64,
        .k_cur = rows, .k_stride_token = 128, .k_stride_head = 64,
        .v_cur = rows, .v_stride_token = 128, .v_stride_head = 64,
        .k_mem = k_mem, .v_mem = v_mem, .plan = plan, .plan_len = len,
        .n_kv = 64, .scale = 0.125f, .n_tokens = 1, .n_splits = 1, .out = out,
    };
    CHECK_INVALID(kvq_attend(NULL, &good, 0, 1));
    CHECK_INVALID(kvq_attend(layout, NULL, 0, 1));
#define WITHOUT(field)                                \
    do {                                              \
        kvq_attend_args bad = good;                   \
        bad.field = NULL;                             \
        CHECK_INVALID(kvq_attend(layout, &bad, 0, 1)); \
    } while (0)
    WITHOUT(q);
    WITHOUT(k_cur);
    WITHOUT(v_cur);
    WITHOUT(k_mem);
    WITHOUT(v_mem);
    WITHOUT(plan);
    WITHOUT(out);
#undef WITHOUT
    CHECK_OK(kvq_attend(layout, &good, 0, 1));

    CHECK(kvq_attend_splits(NULL, 1, 1) == 0);
    CHECK_INVALID(kvq_use_large_pages(NULL, 1));
    uint32_t checksum = 0;
    CHECK_INVALID(kvq_checksum_add(NULL, 1, &checksum));
    CHECK_INVALID(kvq_checksum_add((const uint8_t *)"", 1, NULL));
    CHECK_INVALID(kvq_combine(NULL, out, NULL, 1, 1, rows, NULL, 0, 1));
    CHECK_INVALID(kvq_combine(layout, NULL, NULL, 1, 1, rows, NULL, 0, 1));
    CHECK_INVALID(kvq_combine(layout, out, NULL, 1, 1, NULL, NULL, 0, 1));

    const kvq_store_args store = {
        .k_cur = rows, .k_stride_token = 128, .k_stride_head = 64,
        .v_cur = rows, .v_stride_token = 128, .v_stride_head = 64,
        .k_mem = k_mem, .v_mem = v_mem, .plan = plan, .plan_len = len, .n_tokens = 1,
    };
    CHECK_INVALID(kvq_store(NULL, &store, 0, 1));
    CHECK_INVALID(kvq_store(layout, NULL, 0, 1));
#define WITHOUT(field)                               \
    do {                                             \
        kvq_store_args bad = store;                  \
        bad.field = NULL;                            \
        CHECK_INVALID(kvq_store(layout, &bad, 0, 1)); \
    } while (0)
    WITHOUT(k_cur);
    WITHOUT(v_cur);
    WITHOUT(k_mem);
    WITHOUT(v_mem);
    WITHOUT(plan);
#undef WITHOUT
    CHECK_OK(kvq_store(layout, &store, 0, 1));

    CHECK_OK(kvq_pool_check(layout, k_mem, v_mem));
    CHECK_INVALID(kvq_pool_check(NULL, k_mem, v_mem));
    CHECK_INVALID(kvq_pool_check(layout, NULL, v_mem));
    CHECK_INVALID(kvq_pool_check(layout, k_mem, NULL));
    const uint32_t no_cell = 0;
    const uint32_t far_cell = 1u << 30;
    CHECK_INVALID(kvq_pool_adopt(layout, k_mem, v_mem, k_mem, v_mem, &no_cell, &far_cell, 1));
    CHECK_INVALID(kvq_pool_adopt(NULL, k_mem, v_mem, k_mem, v_mem, &no_cell, &no_cell, 1));
    CHECK_INVALID(kvq_pool_adopt(layout, NULL, v_mem, k_mem, v_mem, &no_cell, &no_cell, 1));
    CHECK_INVALID(kvq_pool_adopt(layout, k_mem, NULL, k_mem, v_mem, &no_cell, &no_cell, 1));
    CHECK_INVALID(kvq_pool_adopt(layout, k_mem, v_mem, NULL, v_mem, &no_cell, &no_cell, 1));
    CHECK_INVALID(kvq_pool_adopt(layout, k_mem, v_mem, k_mem, NULL, &no_cell, &no_cell, 1));
    CHECK_INVALID(kvq_pool_adopt(layout, k_mem, v_mem, k_mem, v_mem, NULL, &no_cell, 1));
    CHECK_INVALID(kvq_pool_adopt(layout, k_mem, v_mem, k_mem, v_mem, &no_cell, NULL, 1));

    kvq_key_error key_error;
    CHECK_INVALID(kvq_layer_key_error(NULL, k_mem, &key_error));
    CHECK_INVALID(kvq_layer_key_error(layout, NULL, &key_error));
    CHECK_INVALID(kvq_layer_key_error(layout, k_mem, NULL));
    CHECK_OK(kvq_layer_key_error(layout, k_mem, &key_error));

    CHECK_INVALID(kvq_dequantize(NULL, k_mem, v_mem, location, NULL, 0, 1, rows, rows));
    CHECK_INVALID(kvq_dequantize(layout, NULL, v_mem, location, NULL, 0, 1, rows, NULL));
    CHECK_INVALID(kvq_dequantize(layout, k_mem, NULL, location, NULL, 0, 1, NULL, rows));
    CHECK_INVALID(kvq_dequantize(layout, k_mem, v_mem, NULL, NULL, 0, 1, rows, rows));
    CHECK_OK(kvq_dequantize(layout, NULL, NULL, location, NULL, 0, 1, NULL, NULL));
    CHECK_INVALID(kvq_erase(NULL, k_mem, v_mem, location));
    CHECK_INVALID(kvq_erase(layout, k_mem, v_mem, NULL));
    CHECK_OK(kvq_erase(layout, NULL, NULL, location));

    kvq_rotation *rotation = UNTOUCHED;
    kvq_shift *shift = UNTOUCHED;
    const double frequency = 1;
    const int32_t moved[64] = {1};
    CHECK_INVALID(kvq_rotation_new(NULL, 1, 0, &rotation));
    CHECK_INVALID(kvq_rotation_new(&frequency, 1, 0, NULL));
    CHECK_INVALID(kvq_planner_shift(NULL, 0, moved, always, NULL, &shift));
    CHECK_INVALID(kvq_planner_shift(planner, 0, NULL, always, NULL, &shift));
    CHECK_INVALID(kvq_planner_shift(planner, 0, moved, NULL, NULL, &shift));
    CHECK_INVALID(kvq_planner_shift(planner, 0, moved, always, NULL, NULL));
    CHECK(rotation == UNTOUCHED && shift == UNTOUCHED);
    CHECK_OK(kvq_rotation_new(&frequency, 1, 0, &rotation));
    CHECK_OK(kvq_planner_shift(planner, 0, moved, always, NULL, &shift));
    CHECK_INVALID(kvq_shift_keys(NULL, rotation, shift, k_mem, v_mem, 0, 1));
    CHECK_INVALID(kvq_shift_keys(layout, NULL, shift, k_mem, v_mem, 0, 1));
    CHECK_INVALID(kvq_shift_keys(layout, rotation, NULL, k_mem, v_mem, 0, 1));
    CHECK_INVALID(kvq_shift_keys(layout, rotation, shift, NULL, v_mem, 0, 1));
    kvq_rotation_free(rotation);
    kvq_rotation_free(NULL);
    kvq_shift_free(shift);
    kvq_shift_free(NULL);
    free(plan);
    free(location);
    free(k_mem);
    free(v_mem);
}

static void cache(kvq_recipe *recipe) {
    static float rows[4 * 64], out[4 * 64];
    const kvq_cache_params params = {.shape = {4, 2, 64, 64}, .n_layers = 1, .n_cells = 64, .n_seq_max = 2};
    kvq_cache *cache = NULL, *other = UNTOUCHED;
    const uint32_t seq = 0;
    int32_t pos = 0, last = 77;
    size_t size = 77;
    uint8_t byte = 0;
    CHECK_INVALID(kvq_cache_new(NULL, &params, &other));
    CHECK_INVALID(kvq_cache_new(recipe, NULL, &other));
    CHECK_INVALID(kvq_cache_new(recipe, &params, NULL));
    CHECK(other == UNTOUCHED);
    CHECK_OK(kvq_cache_new(recipe, &params, &cache));
    CHECK_INVALID(kvq_cache_begin(NULL, &seq, &pos, 1));
    CHECK_INVALID(kvq_cache_begin(cache, NULL, &pos, 1));
    CHECK_INVALID(kvq_cache_begin(cache, &seq, NULL, 1));
    CHECK_OK(kvq_cache_begin(cache, &seq, &pos, 1));
    CHECK_INVALID(kvq_cache_attend(NULL, 0, rows, rows, rows, NULL, out));
    CHECK_INVALID(kvq_cache_attend(cache, 0, NULL, rows, rows, NULL, out));
    CHECK_INVALID(kvq_cache_attend(cache, 0, rows, NULL, rows, NULL, out));
    CHECK_INVALID(kvq_cache_attend(cache, 0, rows, rows, NULL, NULL, out));
    CHECK_INVALID(kvq_cache_attend(cache, 0, rows, rows, rows, NULL, NULL));
    CHECK_OK(kvq_cache_attend(cache, 0, rows, rows, rows, NULL, out));
    CHECK_INVALID(kvq_cache_end(NULL));
    CHECK_OK(kvq_cache_end(cache));
    CHECK_INVALID(kvq_cache_seq_rm(NULL, 0, 0, 1));
    CHECK_INVALID(kvq_cache_seq_cp(NULL, 0, 1, 0, 1));
    CHECK_INVALID(kvq_cache_seq_keep(NULL, 0));
    CHECK_INVALID(kvq_cache_seq_shift(NULL, 0, 0, 1, 1));
    CHECK_INVALID(kvq_cache_seq_range(NULL, 0, &pos, &last));
    CHECK_INVALID(kvq_cache_seq_range(cache, 0, NULL, &last));
    CHECK_INVALID(kvq_cache_seq_range(cache, 0, &pos, NULL));
    CHECK_INVALID(kvq_cache_clear(NULL));
    CHECK(kvq_cache_n_tokens(NULL) == 0 && kvq_cache_bytes(NULL) == 0);
    CHECK_INVALID(kvq_cache_save_file(NULL, "x"));
    CHECK_INVALID(kvq_cache_save_file(cache, NULL));
    CHECK_INVALID(kvq_cache_load_file(NULL, "x"));
    CHECK_INVALID(kvq_cache_load_file(cache, NULL));
    CHECK_INVALID(kvq_cache_save_size(NULL, &size));
    CHECK_INVALID(kvq_cache_save_size(cache, NULL));
    CHECK_INVALID(kvq_cache_save_memory(NULL, &byte, 1, &size));
    CHECK_INVALID(kvq_cache_save_memory(cache, NULL, 1, &size));
    CHECK_INVALID(kvq_cache_save_memory(cache, &byte, 1, NULL));
    CHECK_INVALID(kvq_cache_load_memory(NULL, &byte, 1));
    CHECK_INVALID(kvq_cache_load_memory(cache, NULL, 1));
    CHECK(last == 77 && size == 77);
    kvq_cache_free(cache);
    kvq_cache_free(NULL);
}

int main(void) {
    kvq_recipe *recipe = recipe_of("ott:page=64,window=16,sinks=1,skip-layers=0");
    kvq_planner *a_planner = NULL;
    kvq_layout *a_layout = NULL;
    const kvq_shape shape = {4, 2, 64, 64};
    CHECK_OK(kvq_planner_new(recipe, 64, 1, 1, &a_planner));
    CHECK_OK(kvq_layout_new(recipe, &shape, 0, 64, kvq_planner_n_slots(a_planner), &a_layout));
    recipe_and_layout(recipe, a_layout);
    profile_and_calibration(recipe);
    planner(recipe, a_planner);
    layer(a_layout, a_planner);
    cache(recipe);
    kvq_recipe_free(recipe);
    kvq_planner_free(a_planner);
    kvq_layout_free(a_layout);
    return 0;
}
