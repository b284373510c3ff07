/* Memory of random bytes, as a damaged state may bring: nothing is read or written beyond it. Behind each side's memory lies
   a page of the system that cannot be touched, since no sanitizer looks into the library. */
#define _DEFAULT_SOURCE
#include <sys/mman.h>
#include <unistd.h>

#include "layer.h"

/* n_bytes, a multiple of 64, that end where the forbidden page begins. */
static uint8_t *guarded(void **raw, size_t *raw_bytes, size_t n_bytes) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), front = (n_bytes + page - 1) / page * page;
    *raw_bytes = front + 2 * page;
    *raw = mmap(NULL, *raw_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(*raw != MAP_FAILED);
    uint8_t *first = *raw;
    /* One in front as well. */
    CHECK(mprotect(first, page, PROT_NONE) == 0 && mprotect(first + page + front, page, PROT_NONE) == 0);
    return first + page + front - n_bytes;
}

static void fill(uint64_t *seed, uint8_t *bytes, size_t n) {
    for (size_t i = 0; i < n; i++) {
        const uint64_t x = random_bits(seed);
        bytes[i] = (x & 3) == 0 ? 255 : (uint8_t)(x >> 20);
    }
}

static void use(const char *spec, kvq_shape shape, uint64_t seed) {
    const uint32_t n_cells = 500;
    layer l = layer_new(spec, shape, n_cells);
    const size_t k_bytes = kvq_layout_k_bytes(l.layout), v_bytes = kvq_layout_v_bytes(l.layout);
    void *raw[2];
    size_t raw_bytes[2];
    l.k_mem = guarded(&raw[0], &raw_bytes[0], k_bytes);
    l.v_mem = guarded(&raw[1], &raw_bytes[1], v_bytes);
    fill(&seed, l.k_mem, k_bytes);
    fill(&seed, l.v_mem, v_bytes);
    const double frequencies[] = {1.0, 0.5, 0.1};
    kvq_rotation *rotation = NULL;
    CHECK_OK(kvq_rotation_new(frequencies, 3, 0, &rotation));
    l.rotation = rotation;
    exact e = exact_new(shape, n_cells);
    const uint32_t counts[] = {200, 100, 1, 40, 1};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        const uint32_t n = counts[i];
        layer_begin_ubatch(&l, &e, &seed, n);
        /* The first plans are not carried out, so that pages keep their random bytes. */
        if (i < 2) {
            continue;
        }
        float *out = make((size_t)n * shape.n_heads * shape.head_dim_v, sizeof(float));
        const kvq_attend_args attend = layer_attend_args(&l, &e, out);
        CHECK_OK(kvq_attend(l.layout, &attend, 0, 1));
        const kvq_store_args store = layer_store_args(&l, &e);
        CHECK_OK(kvq_store(l.layout, &store, 0, 1));
        free(out);

        kvq_location *location = make(n_cells, sizeof *location);
        CHECK_OK(kvq_planner_locate(l.planner, 0, location));
        float *k = make((size_t)n_cells * shape.n_kv_heads * shape.head_dim_k, sizeof(float));
        float *v = make((size_t)n_cells * shape.n_kv_heads * shape.head_dim_v, sizeof(float));
        CHECK_OK(kvq_dequantize(l.layout, l.k_mem, l.v_mem, location, l.rotation, 0, n_cells, k, v));
        int32_t *moved = make(n_cells, sizeof(int32_t));
        for (uint32_t cell = 0; cell < n_cells; cell++) {
            moved[cell] = (int32_t)(cell / 100);
        }
        kvq_shift *shift = NULL;
        CHECK_OK(kvq_planner_shift(l.planner, 0, moved, layer_is_live, &l, &shift));
        CHECK_OK(kvq_shift_keys(l.layout, l.rotation, shift, l.k_mem, l.v_mem, 0, 1));
        kvq_shift_free(shift);
        free(moved);
        free(location);
        free(k);
        free(v);
    }
    CHECK(munmap(raw[0], raw_bytes[0]) == 0 && munmap(raw[1], raw_bytes[1]) == 0);
    kvq_rotation_free(rotation);
    layer_free(&l);
    exact_free(&e);
}

int main(void) {
    const kvq_shape shapes[] = {{4, 2, 128, 128}, {3, 1, 96, 64}, {2, 1, 256, 160}};
    const char *specs[] = {
        "skvq", "skvq:k=1.6,v=1.6", "skvq:k=8,v=8", "skvq:k=4,v=4,symmetric=0,mean=0", "kivi:k=2.25", "kivi:meta=fp16,k=3,v=2",
        "ott:skip-layers=0,page=64,window=9", "qaq", "qaq:bits=2,min-bits=1,page=256", "qaq:levels=normal,page=64",
        "qaq:attn-window=64,outliers=2",
    };
    const size_t n_shapes = under_valgrind() ? 1 : 3;
    for (size_t i = 0; i < sizeof specs / sizeof *specs; i++) {
        for (size_t shape = 0; shape < n_shapes; shape++) {
            use(specs[i], shapes[shape], 11 + i);
        }
    }
    return 0;
}
