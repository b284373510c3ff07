/* A cache of one layer: append tokens one at a time, attend, save. */
#include <kvq.h>
#include <stdio.h>

static int fail(const char *what) {
    fprintf(stderr, "%s: %s\n", what, kvq_last_error());
    return 1;
}

int main(void) {
    kvq_recipe *recipe = NULL;
    kvq_cache *cache = NULL;
    if (kvq_recipe_parse("skvq:k=3,v=2", &recipe)) return fail("recipe");

    /* 8 query heads share 2 key/value heads of 128 values; room for 4096 tokens of 1 sequence. */
    const kvq_cache_params params = {.shape = {8, 2, 128, 128}, .n_layers = 1, .n_cells = 4096, .n_seq_max = 1};
    if (kvq_cache_new(recipe, &params, &cache)) return fail("cache");
    kvq_recipe_free(recipe);

    static float q[8 * 128], k[2 * 128], v[2 * 128], out[8 * 128];
    const uint32_t sequence = 0;
    for (int32_t pos = 0; pos < 1000; pos++) {
        for (int i = 0; i < 256; i++) k[i] = v[i] = (float)((pos * 31 + i * 17) % 101) / 50.0f - 1.0f;
        for (int i = 0; i < 1024; i++) q[i] = k[i % 256];
        if (kvq_cache_begin(cache, &sequence, &pos, 1)) return fail("begin");
        if (kvq_cache_attend(cache, 0, q, k, v, NULL, out)) return fail("attend");
        if (kvq_cache_end(cache)) return fail("end");
    }
    printf("%u tokens; room for 4096 takes %zu bytes, in float16 %d\n", kvq_cache_n_tokens(cache),
           kvq_cache_bytes(cache), 4096 * 2 * (128 + 128) * 2);
    if (kvq_cache_save_file(cache, "example.kvq") || kvq_cache_load_file(cache, "example.kvq")) return fail("state");
    remove("example.kvq");
    kvq_cache_free(cache);
    return 0;
}
