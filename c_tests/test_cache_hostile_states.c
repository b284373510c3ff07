/* States that nobody saved, by someone who knows the checksum: refused, or a cache that can be used. The same for the
 * state of a planner, which has no checksum of its own. */
#include "model.h"

enum { N_CELLS = 192, FRONT = 4096 };
static const kvq_shape SHAPE = {2, 1, 64, 64};
static const char *const SPECS[] = {
    "skvq:k=3,v=2,page=64,window=16,sinks=1",
    "ott:k=2.5,page=64,window=16,sinks=1,skip-layers=0",
    "qaq:page=64,window=16,sinks=1",
};

/* Writes length and checksum for what is there. */
static void seal(uint8_t *bytes, size_t size) {
    if (size < 28) return;
    for (int i = 0; i < 8; i++) bytes[12 + i] = (uint8_t)((uint64_t)size >> 8 * i);
    uint32_t sum = 0;
    CHECK_OK(kvq_checksum_add(bytes, size - 4, &sum));
    for (int i = 0; i < 4; i++) bytes[size - 4 + (size_t)i] = (uint8_t)(sum >> 8 * i);
}

static void change(uint64_t *seed, uint8_t *bytes, size_t size) {
    static const uint32_t values[] = {0, 1, 0x7f, 0xff, 0x7fffffff, 0x80000000, 0xfffffffe, 0xffffffff};
    const size_t end = random_bits(seed) % 3 == 0 || size < FRONT ? size : FRONT;
    const size_t at = random_bits(seed) % (end - 4);
    switch (random_bits(seed) % 3) {
        case 0: bytes[at] ^= (uint8_t)(1 << random_bits(seed) % 8); break;
        case 1: bytes[at] = (uint8_t)random_bits(seed); break;
        default: memcpy(bytes + at, &values[random_bits(seed) % 8], 4); break;
    }
}

static void use(kvq_cache *cache, uint64_t *seed) {
    enum { N = 20 };
    static float q[N * 128], k[N * 64], v[N * 64], out[N * 128];
    for (uint32_t seq = 0; seq < 2; seq++) {
        int32_t first = 0, last = 0, pos[N];
        uint32_t seqs[N];
        CHECK_OK(kvq_cache_seq_range(cache, seq, &first, &last));
        for (int i = 0; i < N; i++) {
            seqs[i] = seq;
            pos[i] = last > INT32_MAX - N ? last : last + 1 + i;
        }
        if (kvq_cache_begin(cache, seqs, pos, N) != KVQ_STATUS_OK) continue; /* no room, or no position left */
        for (uint32_t layer = 0; layer < MODEL_LAYERS; layer++) {
            random_values(seed, q, N * 128);
            random_values(seed, k, N * 64);
            random_values(seed, v, N * 64);
            CHECK_OK(kvq_cache_attend(cache, layer, q, k, v, NULL, out));
        }
        CHECK_OK(kvq_cache_end(cache));
    }
    CHECK_OK(kvq_cache_seq_rm(cache, 0, 5, 50));
    size_t size = 0;
    CHECK_OK(kvq_cache_save_size(cache, &size));
}

static void caches(const char *spec, int n) {
    model m = model_new(spec, SHAPE, N_CELLS, 1, true);
    m.bound = 1; /* few bits of noise: whether they are right is tested elsewhere */
    model_append(&m, 0, 90, NULL);
    model_append(&m, 1, 60, NULL);
    size_t size = 0;
    CHECK_OK(kvq_cache_save_size(m.cache, &size));
    uint8_t *good = make(size, 1);
    CHECK_OK(kvq_cache_save_memory(m.cache, good, size, &size));
    int n_taken = 0, n_refused = 0;
    for (int i = 0; i < n; i++) {
        /* Of just this length, so that sanitizers see a read behind the end. */
        const size_t len = random_bits(&m.seed) % 8 == 0 ? 64 + random_bits(&m.seed) % (size - 64) : size;
        uint8_t *bad = make(len, 1);
        memcpy(bad, good, len);
        for (uint64_t changes = random_bits(&m.seed) % 4; changes > 0; changes--) change(&m.seed, bad, len);
        seal(bad, len);
        const kvq_status status = kvq_cache_load_memory(m.cache, bad, len);
        CHECK(status == KVQ_STATUS_OK || status == KVQ_STATUS_FORMAT);
        if (status == KVQ_STATUS_OK) {
            n_taken++;
            use(m.cache, &m.seed);
        } else {
            n_refused++;
        }
        free(bad);
    }
    CHECK(n_taken > n / 20 && n_refused > n / 20);
    CHECK_OK(kvq_cache_load_memory(m.cache, good, size));
    CHECK(kvq_cache_n_tokens(m.cache) == 150);
    free(good);
    model_free(&m);
}

static bool always(void *user, uint32_t stream, uint32_t cell) {
    (void)user, (void)stream, (void)cell;
    return true;
}

static kvq_status append(kvq_planner *planner, uint32_t first, uint32_t n) {
    kvq_row rows[N_CELLS];
    for (uint32_t i = 0; i < n; i++) rows[i] = (kvq_row){first + i, (int32_t)(first + i), 0};
    const size_t len = kvq_planner_plan_len(planner, n);
    int32_t *plan = make(len, sizeof(int32_t));
    const kvq_status status = kvq_planner_plan(planner, 0, rows, n, always, NULL, plan, len);
    free(plan);
    return status;
}

static void planners(const char *spec, int n) {
    kvq_recipe *recipe = recipe_of(spec);
    kvq_planner *planner = NULL;
    CHECK_OK(kvq_planner_new(recipe, N_CELLS, 1, 2, &planner));
    kvq_recipe_free(recipe);
    CHECK_OK(append(planner, 0, 90));
    size_t size = 0;
    CHECK_OK(kvq_planner_export_size(planner, 0, &size));
    uint8_t *good = make(size, 1), *bad = make(size, 1);
    CHECK_OK(kvq_planner_export(planner, 0, good, size));
    uint64_t seed = 5;
    int n_taken = 0;
    for (int i = 0; i < n; i++) {
        memcpy(bad, good, size);
        change(&seed, bad, size);
        const kvq_status status = kvq_planner_import(planner, 0, bad, size);
        CHECK(status == KVQ_STATUS_OK || status == KVQ_STATUS_FORMAT);
        if (status == KVQ_STATUS_OK) {
            n_taken++;
            CHECK_OK(append(planner, 90, 100));
            CHECK_OK(append(planner, 0, 70));
        }
    }
    CHECK(n_taken > 0 && n_taken < n);
    free(good);
    free(bad);
    kvq_planner_free(planner);
}

int main(void) {
    for (size_t i = 0; i < sizeof SPECS / sizeof *SPECS; i++) {
        caches(SPECS[i], under_valgrind() ? 60 : 2000);
        planners(SPECS[i], under_valgrind() ? 200 : 5000);
    }
    return 0;
}
