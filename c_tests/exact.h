/* Exact attention in doubles over all rows ever appended: what the compressed cache is compared with. */
#ifndef KVQ_EXACT_H
#define KVQ_EXACT_H

#include "check.h"

/* 8-bit codes: bound on the normalised mean squared error of outputs. */
#define NMSE_8_BITS 2e-4
/* 8 bits, small pages and a small window, so that little data reaches every path. */
#define SPEC_8_BITS "skvq:k=8,v=8,page=64,window=32,sinks=2"

typedef struct {
    kvq_shape shape;
    size_t n, capacity;
    uint64_t *seqs; /* sets of sequences */
    int32_t *pos;
    float *k, *v; /* [n][n_kv_heads][head_dim] */
} exact;

static inline exact exact_new(kvq_shape shape, size_t capacity) {
    exact e = {shape, 0, capacity, NULL, NULL, NULL, NULL};
    e.seqs = make(capacity, sizeof(uint64_t));
    e.pos = make(capacity, sizeof(int32_t));
    e.k = make(capacity * shape.n_kv_heads * shape.head_dim_k, sizeof(float));
    e.v = make(capacity * shape.n_kv_heads * shape.head_dim_v, sizeof(float));
    return e;
}

static inline void exact_free(exact *e) {
    free(e->seqs);
    free(e->pos);
    free(e->k);
    free(e->v);
}

static inline void exact_append(exact *e, uint32_t seq, int32_t pos, const float *k, const float *v) {
    const kvq_shape s = e->shape;
    const size_t n_k = (size_t)s.n_kv_heads * s.head_dim_k, n_v = (size_t)s.n_kv_heads * s.head_dim_v;
    CHECK(e->n < e->capacity);
    e->seqs[e->n] = UINT64_C(1) << seq;
    e->pos[e->n] = pos;
    memcpy(e->k + e->n * n_k, k, n_k * sizeof(float));
    memcpy(e->v + e->n * n_v, v, n_v * sizeof(float));
    e->n++;
}

/* One token: q is [n_heads][head_dim_k], out is [n_heads][head_dim_v]. n_swa 0: no window. */
static inline void exact_attend(const exact *e, uint32_t seq, int32_t pos, uint32_t n_swa, const float *q,
                                double *out) {
    const kvq_shape s = e->shape;
    double *weight = make(e->n, sizeof(double));
    for (uint32_t head = 0; head < s.n_heads; head++) {
        const size_t kv_head = head / (s.n_heads / s.n_kv_heads);
        double max = -INFINITY, sum = 0;
        for (size_t i = 0; i < e->n; i++) {
            const int64_t distance = (int64_t)pos - e->pos[i];
            const bool hidden = !(e->seqs[i] >> seq & 1) || distance < 0 || (n_swa > 0 && distance >= n_swa);
            weight[i] = -INFINITY;
            if (!hidden) {
                const float *k = e->k + (i * s.n_kv_heads + kv_head) * s.head_dim_k;
                double dot = 0;
                for (uint32_t c = 0; c < s.head_dim_k; c++) {
                    dot += (double)q[head * s.head_dim_k + c] * k[c];
                }
                weight[i] = dot / sqrt((double)s.head_dim_k);
                max = weight[i] > max ? weight[i] : max;
            }
        }
        double *row = out + (size_t)head * s.head_dim_v;
        memset(row, 0, s.head_dim_v * sizeof(double));
        for (size_t i = 0; i < e->n && max > -INFINITY; i++) {
            const double p = exp(weight[i] - max);
            const float *v = e->v + (i * s.n_kv_heads + kv_head) * s.head_dim_v;
            sum += p;
            for (uint32_t c = 0; c < s.head_dim_v; c++) {
                row[c] += p * v[c];
            }
        }
        for (uint32_t c = 0; c < s.head_dim_v && sum > 0; c++) {
            row[c] /= sum;
        }
    }
    free(weight);
}

#endif
