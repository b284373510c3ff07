// What is measured, and what of it --check demands.
#pragma once

#include <cmath>
#include <string>
#include <vector>

constexpr int N_KV_HEADS = 8;
constexpr int UBATCH = 512;

struct Case {
    std::string recipe;
    int n_kv, n_q, head_dim, gqa, threads;

    std::string key() const {
        return recipe + "/" + std::to_string(n_kv) + "/" + std::to_string(n_q) + "/" + std::to_string(head_dim) + "/" +
               std::to_string(gqa) + "/" + std::to_string(threads);
    }
    int n_heads() const { return N_KV_HEADS * gqa; }
    float scale() const { return 1.0f / std::sqrt(float(head_dim)); }
    // Multiply-adds of a causal pass, keys and values.
    double ops() const { return double(n_q) * n_heads() * (n_kv - (n_q - 1) / 2.0) * 2.0 * head_dim; }
};

extern const std::vector<Case> QUICK, FULL;

// From RECIPE/CELLS/QUERIES/DIM/GQA/THREADS, as Case::key writes it.
Case parse_case(const std::string & text);

// What --check demands, of medians with a cold cache: column of the case `of`, divided by that of `by` if it is named.
struct Bar {
    const char * column;
    std::string of, by;
    bool at_least;
    double bound;
};

extern const std::vector<Bar> BARS;
