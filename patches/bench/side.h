// The two sides of a comparison: a way to attend over the rows of a case. Both see the same rows and run on the same
// threads. A side on another device keeps its rows there and gives out() and rows() from the host's memory.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "cases.h"
#include "ggml.h"
#include "inputs.h"
#include "workers.h"

struct Side {
    virtual ~Side() = default;
    // Takes the rows of n tokens, [n][head][head_dim], into cells from `cell` on; in order, the decoded ones last.
    virtual void append(int cell, int n, const float * k, const float * v, const float * q) = 0;
    // Attends once. Done when it returns.
    virtual void run() = 0;
    // Of the latest run: [n_q][n_heads][head_dim].
    virtual const float * out() const = 0;
    // The rows of one KV head as the side holds them, [n_kv][head_dim].
    virtual void rows(bool value, int kv_head, std::vector<float> & out) = 0;

    const char * name = "";
    // Bound on the normalized mean square error of the outputs.
    double nmse_bound = 0.0;
};

struct KvqSide : Side {
    // Memory that one attention has to read.
    virtual double bytes() const = 0;
    // Median time to store a token.
    virtual double store_us() const = 0;
};

// They refer to their arguments.
std::unique_ptr<KvqSide> make_kvq(const Case & c, const std::string & recipe, const char * name, const Inputs & inputs,
                                  Workers & workers);
std::unique_ptr<Side> make_stock(const Case & c, const Inputs & inputs, Workers & workers, ggml_type type,
                                 const char * name, double nmse_bound);
