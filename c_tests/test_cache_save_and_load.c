/* A loaded cache goes on bit-identically; cut, damaged and foreign states are refused and change nothing. */
#include "model.h"

static const kvq_shape SHAPE = {2, 1, 64, 64};
static const char SPEC[] = "skvq:k=8,v=8,page=64,window=16,sinks=1";

static uint8_t *save(const kvq_cache *cache, size_t *size) {
    size_t needed = 0;
    CHECK_OK(kvq_cache_save_size(cache, &needed));
    uint8_t *bytes = make(needed, 1);
    CHECK_STATUS(kvq_cache_save_memory(cache, bytes, needed - 1, size), KVQ_STATUS_BUFFER_TOO_SMALL);
    CHECK_OK(kvq_cache_save_memory(cache, bytes, needed, size));
    CHECK(*size == needed);
    return bytes;
}

static void expect_state(const kvq_cache *cache, const uint8_t *bytes, size_t size) {
    size_t got = 0;
    uint8_t *now = save(cache, &got);
    CHECK(got == size && memcmp(now, bytes, size) == 0);
    free(now);
}

/* Copies, so that sanitizers see a read behind the end. */
static kvq_status load_copy(kvq_cache *cache, const uint8_t *bytes, size_t size) {
    uint8_t *copy = malloc(size > 0 ? size : 1);
    CHECK(copy != NULL);
    memcpy(copy, bytes, size);
    const kvq_status status = kvq_cache_load_memory(cache, copy, size);
    free(copy);
    return status;
}

static void goes_on_bit_identically(model *a, model *b) {
    const uint32_t n = 33;
    const size_t n_out = (size_t)MODEL_LAYERS * n * SHAPE.n_heads * SHAPE.head_dim_v;
    float *first = make(n_out, sizeof(float)), *second = make(n_out, sizeof(float));
    b->seed = a->seed;
    model_append(a, 0, n, first);
    b->bound = INFINITY; /* its exact rows are others */
    model_append(b, 0, n, second);
    CHECK(memcmp(first, second, n_out * sizeof(float)) == 0);
    free(first);
    free(second);
}

static void refuses_damage(kvq_cache *cache, uint8_t *bytes, size_t size) {
    size_t before_size = 0;
    uint8_t *before = save(cache, &before_size);
    const size_t slow = under_valgrind() ? 100 : 1;
    for (size_t len = 0; len < size; len += slow * (len < 6000 ? 1 : 11)) {
        CHECK_STATUS(load_copy(cache, bytes, len), KVQ_STATUS_FORMAT);
    }
    uint64_t seed = 17;
    for (int i = 0; i < (under_valgrind() ? 50 : 2000); i++) {
        const size_t bit = random_bits(&seed) % (8 * size);
        bytes[bit / 8] ^= (uint8_t)(1 << bit % 8);
        CHECK_STATUS(load_copy(cache, bytes, size), KVQ_STATUS_FORMAT);
        bytes[bit / 8] ^= (uint8_t)(1 << bit % 8);
    }
    CHECK_STATUS(load_copy(cache, (const uint8_t *)"something else entirely", 23), KVQ_STATUS_FORMAT);
    expect_state(cache, before, before_size);
    free(before);
}

static void files(kvq_cache *from, kvq_cache *to, const uint8_t *bytes, size_t size) {
    const char path[] = "test_cache_save_and_load.kvq";
    CHECK_OK(kvq_cache_save_file(from, path));
    FILE *file = fopen(path, "rb");
    CHECK(file != NULL);
    uint8_t *read = make(size + 1, 1);
    CHECK(fread(read, 1, size + 1, file) == size && memcmp(read, bytes, size) == 0);
    fclose(file);
    free(read);
    CHECK_OK(kvq_cache_load_file(to, path));
    expect_state(to, bytes, size);

    file = fopen(path, "wb");
    CHECK(file != NULL && fwrite(bytes, 1, size / 2, file) == size / 2);
    fclose(file);
    CHECK_STATUS(kvq_cache_load_file(to, path), KVQ_STATUS_FORMAT);
    CHECK(remove(path) == 0);
    CHECK_STATUS(kvq_cache_load_file(to, path), KVQ_STATUS_IO);
    CHECK_STATUS(kvq_cache_load_file(to, "."), KVQ_STATUS_IO);
    CHECK_STATUS(kvq_cache_save_file(to, "no/such/folder/state.kvq"), KVQ_STATUS_IO);
    expect_state(to, bytes, size);
}

int main(void) {
    model a = model_new(SPEC, SHAPE, 192, 1, true), b = model_new(SPEC, SHAPE, 192, 1, true);
    model other = model_new(SPEC, SHAPE, 256, 1, true);
    model_append(&a, 0, 90, NULL);
    model_append(&a, 1, 30, NULL);
    CHECK_OK(kvq_cache_seq_rm(a.cache, 0, 20, 30));
    for (int layer = 0; layer < MODEL_LAYERS; layer++) {
        for (size_t i = 20; i < 30; i++) a.rows[layer].seqs[i] = 0;
    }
    model_append(&b, 0, 10, NULL);

    size_t size = 0;
    uint8_t *bytes = save(a.cache, &size);
    refuses_damage(b.cache, bytes, size);
    CHECK_STATUS(kvq_cache_load_memory(other.cache, bytes, size), KVQ_STATUS_FORMAT);
    files(a.cache, b.cache, bytes, size);
    CHECK_OK(load_copy(b.cache, bytes, size));
    CHECK(kvq_cache_n_tokens(b.cache) == 110);
    goes_on_bit_identically(&a, &b);
    free(bytes);
    model_free(&a);
    model_free(&b);
    model_free(&other);
    return 0;
}
