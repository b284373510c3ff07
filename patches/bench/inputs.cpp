#include "inputs.h"

#include <cmath>

Rows::Rows(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}

void Rows::fill(float * out, int n_tokens, int n_heads, int dim, bool outliers) {
    for (int i = 0; i < n_tokens * n_heads; i++) {
        const int head = i % n_heads;
        for (int c = 0; c < dim; c++) {
            const bool wide = outliers && (c * 7 + head * 13) % 32 == 0;
            out[size_t(i) * dim + c] = gaussian() * (wide ? 4.0f : 1.0f) + (wide ? 3.0f : 0.0f);
        }
    }
}

// Sum of four uniforms: near enough to a Gaussian, one draw a value.
float Rows::gaussian() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    const uint64_t x = state_;
    const int sum = int(x & 0xffff) + int(x >> 16 & 0xffff) + int(x >> 32 & 0xffff) + int(x >> 48);
    return (sum - 2 * 65535) * (1.7320508f / 65536.0f);
}

Inputs::Inputs(const Case & c)
    : q(size_t(c.n_q) * c.n_heads() * c.head_dim), mask(size_t(c.n_q) * c.n_kv) {
    Rows(3).fill(q.data(), c.n_q, c.n_heads(), c.head_dim, false);
    for (int t = 0; t < c.n_q; t++) {
        for (int cell = 0; cell < c.n_kv; cell++) {
            mask[size_t(t) * c.n_kv + cell] = ggml_fp32_to_fp16(cell <= c.n_kv - c.n_q + t ? 0.0f : -INFINITY);
        }
    }
}
