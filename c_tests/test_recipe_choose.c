/* A recipe that is chosen by memory: the best whose layouts fit, refused by name where none does. */
#include "check.h"

static const kvq_shape shape = {8, 2, 128, 64};

/* What a context takes, by the calls that a host makes its cache with. */
static size_t bytes_of(const char *spec, const kvq_cached_layer *layers, size_t n_layers) {
    size_t sum = 0;
    for (size_t i = 0; i < n_layers; i++) {
        const kvq_cached_layer *one = &layers[i];
        kvq_recipe *asked = recipe_of(spec), *fitted = NULL;
        kvq_planner *planner = NULL;
        kvq_layout *layout = NULL;
        CHECK_OK(kvq_recipe_fit(asked, one->n_cells, one->n_streams, one->n_seq_max, &fitted));
        CHECK_OK(kvq_planner_new(fitted, one->n_cells, one->n_streams, one->n_seq_max, &planner));
        CHECK_OK(kvq_layout_new(fitted, &one->shape, one->layer, one->n_cells, kvq_planner_n_slots(planner), &layout));
        sum += one->n_streams * (kvq_layout_k_bytes(layout) + kvq_layout_v_bytes(layout));
        kvq_layout_free(layout);
        kvq_planner_free(planner);
        kvq_recipe_free(fitted);
        kvq_recipe_free(asked);
    }
    return sum;
}

static void chosen(size_t bytes, const kvq_cached_layer *layers, size_t n_layers, const char *want) {
    char spec[64], text[128], note[128];
    snprintf(spec, sizeof spec, "auto:mem=%.10fKiB", bytes / 1024.0);
    CHECK_OK(kvq_recipe_choose(spec, layers, n_layers, text, sizeof text, note, sizeof note));
    if (strcmp(text, want) != 0 || note[0] == '\0') {
        fprintf(stderr, "%s gives '%s' ('%s') instead of '%s'\n", spec, text, note, want);
        exit(1);
    }
}

static void refused(const char *spec, const char *text, const kvq_cached_layer *layers, size_t n_layers) {
    char buf[128] = "untouched", note[128] = "untouched";
    CHECK_STATUS(kvq_recipe_choose(spec, layers, n_layers, buf, sizeof buf, note, sizeof note), KVQ_STATUS_RECIPE);
    if (strstr(kvq_last_error(), text) == NULL) {
        fprintf(stderr, "'%s' gives '%s', which does not name '%s'\n", spec, kvq_last_error(), text);
        exit(1);
    }
    CHECK(strcmp(buf, "untouched") == 0 && strcmp(note, "untouched") == 0);
}

int main(void) {
    /* A cache of two streams, and one of another size for a layer with a sliding window. */
    const kvq_cached_layer layers[] = {{shape, 0, 8192, 2, 2}, {shape, 1, 1024, 2, 2}, {shape, 5, 8192, 2, 2}};
    const char *ladder[] = {"4", "on", "3", "2"};
    size_t n = sizeof layers / sizeof *layers;
    for (size_t i = 0; i < 4; i++) {
        chosen(bytes_of(ladder[i], layers, n), layers, n, ladder[i]);
    }
    chosen(bytes_of("4", layers, n) - 64, layers, n, "on");
    refused("auto:mem=1KiB", "no recipe fits into 1KiB", layers, n);
    refused("auto", "auto:mem=4GiB", layers, n);
    refused("auto:mem=0", "mem=0", layers, n);
    refused("auto:mem=abc", "mem=abc", layers, n);
    refused("auto:mem=1e999GiB", "mem=1e999GiB", layers, n);
    refused("auto:mem=4GiB,colour=3", "'colour'", layers, n);

    char text[128], note[128];
    CHECK_OK(kvq_recipe_choose("auto:mem=1GiB,window=64", layers, n, text, sizeof text, note, sizeof note));
    CHECK(strcmp(text, "4:window=64") == 0 && strstr(note, "f16 would fit") != NULL);
    CHECK_OK(kvq_recipe_choose("skvq:k=2", layers, n, text, sizeof text, note, sizeof note));
    CHECK(strcmp(text, "skvq:k=2") == 0 && note[0] == '\0');
    CHECK_OK(kvq_recipe_choose("auto:mem=1KiB", NULL, 0, text, sizeof text, note, sizeof note));
    CHECK(strcmp(text, "4") == 0);

    strcpy(text, "untouched"), strcpy(note, "untouched");
    CHECK_STATUS(kvq_recipe_choose("auto:mem=1GiB", layers, n, text, 1, note, sizeof note), KVQ_STATUS_BUFFER_TOO_SMALL);
    CHECK_STATUS(kvq_recipe_choose("auto:mem=1GiB", layers, n, text, sizeof text, note, 8), KVQ_STATUS_BUFFER_TOO_SMALL);
    CHECK(strcmp(text, "untouched") == 0 && strcmp(note, "untouched") == 0);

    kvq_recipe *recipe = NULL;
    CHECK_STATUS(kvq_recipe_parse("auto:mem=1GiB", &recipe), KVQ_STATUS_RECIPE);
    CHECK(recipe == NULL && !kvq_recipe_is_off("auto:mem=1GiB"));
    return 0;
}
