/* Steps of all sizes across window and page borders match exact attention, with and without a sliding window. */
#include "model.h"

int main(void) {
    const kvq_shape shape = {4, 2, 64, 96};
    const uint32_t steps[] = {1, 30, 1, 1, 31, 1, 64, 65, 1, 1, 100, 1};
    const size_t n_steps = under_valgrind() ? 6 : sizeof steps / sizeof *steps;
    for (uint32_t n_threads = 1; n_threads <= 3; n_threads++) {
        model m = model_new(SPEC_8_BITS, shape, 320, n_threads, false);
        m.n_swa[1] = n_threads == 1 ? 0 : 50;
        uint32_t n = 0;
        for (size_t i = 0; i < n_steps; i++) {
            model_append(&m, 0, steps[i], NULL);
            n += steps[i];
            CHECK(kvq_cache_n_tokens(m.cache) == n);
        }
        CHECK(kvq_cache_bytes(m.cache) > 0);
        model_free(&m);
    }
    return 0;
}
