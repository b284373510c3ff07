/* What every test program needs: checks that print their numbers, and random rows. */
#ifndef KVQ_CHECK_H
#define KVQ_CHECK_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <kvq.h>

#define CHECK(condition)                                                            \
    do {                                                                            \
        if (!(condition)) {                                                         \
            fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
            exit(1);                                                                \
        }                                                                           \
    } while (0)

#define CHECK_STATUS(call, expected) check_status((call), (expected), #call, __FILE__, __LINE__)
#define CHECK_OK(call) CHECK_STATUS(call, KVQ_STATUS_OK)
#define CHECK_INVALID(call) CHECK_STATUS(call, KVQ_STATUS_INVALID_ARGUMENT)

static inline void check_status(kvq_status got, kvq_status expected, const char *call, const char *file, int line) {
    if (got != expected) {
        fprintf(stderr, "%s:%d: status %u instead of %u (%s): %s\n", file, line, (unsigned)got, (unsigned)expected,
                kvq_last_error(), call);
        exit(1);
    }
    if (got != KVQ_STATUS_OK && kvq_last_error()[0] == '\0') {
        fprintf(stderr, "%s:%d: failed without a text: %s\n", file, line, call);
        exit(1);
    }
}

/* Normalised mean squared error sum (a - b)^2 / sum b^2, at most `bound`; written so that NaN fails. */
#define CHECK_NMSE(a, b, n, bound) check_nmse((a), (b), (n), (bound), __FILE__, __LINE__)

static inline void check_nmse(const float *a, const double *b, size_t n, double bound, const char *file, int line) {
    double error = 0, power = 0;
    for (size_t i = 0; i < n; i++) {
        error += (a[i] - b[i]) * (a[i] - b[i]);
        power += b[i] * b[i];
    }
    if (!(error <= bound * power)) {
        fprintf(stderr, "%s:%d: nmse %g of %zu values, at most %g allowed\n", file, line, error / power, n, bound);
        exit(1);
    }
}

/* Zeroed, never NULL. */
static inline void *make(size_t n, size_t size) {
    void *memory = calloc(n > 0 ? n : 1, size);
    CHECK(memory != NULL);
    return memory;
}

/* Small deterministic generator (xorshift). */
static inline uint64_t random_bits(uint64_t *state) {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

/* Roughly normal values. */
static inline void random_values(uint64_t *state, float *out, size_t n) {
    for (size_t i = 0; i < n; i++) {
        out[i] = 0;
        for (int j = 0; j < 4; j++) {
            out[i] += (float)(random_bits(state) >> 40) / (float)(1 << 23) - 1.0f;
        }
    }
}

/* Programs do less where each instruction costs fifty. */
static inline bool under_valgrind(void) {
    return getenv("KVQ_UNDER_VALGRIND") != NULL;
}

static inline kvq_recipe *recipe_of(const char *spec) {
    kvq_recipe *recipe = NULL;
    CHECK_OK(kvq_recipe_parse(spec, &recipe));
    CHECK(recipe != NULL);
    return recipe;
}

#endif
