// What a running model gives both sides: rows with outlier channels, queries, an FP16 mask.
#pragma once

#include <cstdint>
#include <vector>

#include "cases.h"
#include "ggml.h"

// Gaussian values; some channels of each head are several times larger and off centre, as keys of real models are.
class Rows {
public:
    explicit Rows(uint64_t seed);
    void fill(float * out, int n_tokens, int n_heads, int dim, bool outliers);

private:
    float gaussian();
    uint64_t state_;
};

// Queries and mask of the tokens being decoded: the newest n_q of n_kv.
struct Inputs {
    explicit Inputs(const Case & c);
    std::vector<float> q;
    std::vector<ggml_fp16_t> mask;
};
