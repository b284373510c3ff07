/* Parts of one attend and of one store run at the same time on one output and one memory. */
#include <pthread.h>

#include "layer.h"

enum { N_THREADS = 4 };

typedef struct {
    const layer *l;
    const kvq_attend_args *attend; /* or NULL: store */
    const kvq_store_args *store;
    uint32_t part;
} job;

static void *run(void *user) {
    const job *j = user;
    if (j->attend != NULL) {
        CHECK_OK(kvq_attend(j->l->layout, j->attend, j->part, N_THREADS));
    } else {
        CHECK_OK(kvq_store(j->l->layout, j->store, j->part, N_THREADS));
    }
    return NULL;
}

static void on_all_threads(const layer *l, const kvq_attend_args *attend, const kvq_store_args *store) {
    pthread_t threads[N_THREADS];
    job jobs[N_THREADS];
    for (uint32_t part = 0; part < N_THREADS; part++) {
        jobs[part] = (job){l, attend, store, part};
        CHECK(pthread_create(&threads[part], NULL, run, &jobs[part]) == 0);
    }
    for (uint32_t part = 0; part < N_THREADS; part++) {
        CHECK(pthread_join(threads[part], NULL) == 0);
    }
}

int main(void) {
    const kvq_shape shape = {8, 4, 64, 64};
    const uint32_t ubatches[] = {70, 1, 90, 1, 1, 40}, n_cells = 256;
    layer l = layer_new(SPEC_8_BITS, shape, n_cells);
    exact e = exact_new(shape, n_cells);
    uint64_t seed = 9;
    for (size_t i = 0; i < sizeof ubatches / sizeof *ubatches; i++) {
        layer_begin_ubatch(&l, &e, &seed, ubatches[i]);
        const size_t n_out = (size_t)l.n * shape.n_heads * shape.head_dim_v;
        float *out = make(n_out, sizeof(float)), *alone = make(n_out, sizeof(float));
        const kvq_attend_args args = layer_attend_args(&l, &e, out);
        on_all_threads(&l, &args, NULL);
        CHECK_NMSE(out, l.expected, n_out, NMSE_8_BITS);
        /* Parts only divide the work: the same bits come out of one. */
        kvq_attend_args whole = args;
        whole.out = alone;
        CHECK_OK(kvq_attend(l.layout, &whole, 0, 1));
        CHECK(memcmp(out, alone, n_out * sizeof(float)) == 0);
        const kvq_store_args store = layer_store_args(&l, &e);
        on_all_threads(&l, NULL, &store);
        free(out);
        free(alone);
    }
    layer_free(&l);
    exact_free(&e);
    return 0;
}
