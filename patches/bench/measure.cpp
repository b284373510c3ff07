#include "measure.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "base.h"
#include "inputs.h"
#include "side.h"

using Sides = std::vector<Side *>;

double Result::of(const std::string & name) const {
    const auto it = median_us.find(name);
    return it == median_us.end() ? NEVER : it->second;
}

double Result::ratio(const std::string & name) const {
    const auto it = median_us.find(name);
    return it == median_us.end() ? NEVER : it->second / median_us.at("kvq");
}

double Result::column(const std::string & name) const {
    if (name == "us_kvq") { return of("kvq"); }
    if (name == "ratio_f16") { return ratio("f16"); }
    if (name == "ratio_beside") { return ratio("beside"); }
    if (name == "ratio_q4_0") { return ratio("q4_0"); }
    die("no column " + name);
}

// Fills all sides with the same rows, an ubatch at a time.
static void fill(const Case & c, const Sides & sides) {
    const size_t width = size_t(c.head_dim) * N_KV_HEADS;
    std::vector<float> k(UBATCH * width), v(UBATCH * width), q(UBATCH * width * c.gqa);
    Rows keys(1), values(2), queries(4);
    for (int cell = 0; cell < c.n_kv;) {
        const int n = cell < c.n_kv - c.n_q ? std::min(UBATCH, c.n_kv - c.n_q - cell) : c.n_q;
        keys.fill(k.data(), n, N_KV_HEADS, c.head_dim, true);
        values.fill(v.data(), n, N_KV_HEADS, c.head_dim, false);
        queries.fill(q.data(), n, c.n_heads(), c.head_dim, false);
        for (Side * side : sides) {
            side->append(cell, n, k.data(), v.data(), q.data());
        }
        cell += n;
    }
}

// Normalized mean square error of the first and last head and token against attention in double precision.
static double nmse(const Case & c, const Inputs & inputs, Side & side) {
    const size_t dim = c.head_dim;
    std::vector<float> k(c.n_kv * dim), v(c.n_kv * dim);
    double error = 0, power = 0;
    for (int kv_head : { 0, N_KV_HEADS - 1 }) {
        side.rows(false, kv_head, k);
        side.rows(true, kv_head, v);
        const int head = kv_head == 0 ? 0 : c.n_heads() - 1;
        for (int token : c.n_q == 1 ? std::vector<int>{ 0 } : std::vector<int>{ 0, c.n_q - 1 }) {
            const size_t row = (size_t(token) * c.n_heads() + head) * dim;
            const int n = c.n_kv - c.n_q + token + 1;
            std::vector<double> p(n), want(dim, 0.0);
            double max = -INFINITY, sum = 0;
            for (int i = 0; i < n; i++) {
                p[i] = 0;
                for (size_t j = 0; j < dim; j++) {
                    p[i] += double(inputs.q[row + j]) * k[i * dim + j];
                }
                p[i] *= c.scale();
                max = std::max(max, p[i]);
            }
            for (int i = 0; i < n; i++) {
                p[i] = std::exp(p[i] - max);
                sum += p[i];
                for (size_t j = 0; j < dim; j++) {
                    want[j] += p[i] * v[i * dim + j];
                }
            }
            for (size_t j = 0; j < dim; j++) {
                const double w = want[j] / sum, d = side.out()[row + j] - w;
                error += d * d;
                power += w * w;
            }
        }
    }
    return error / power;
}

// Runs that are worth the time: a whole number of `wanted` unless one run takes seconds.
static int runs_of(double seconds, int wanted) {
    return seconds < 0.005 ? 4 * wanted : seconds < 0.5 ? wanted : seconds < 2 ? 3 : 0;
}

// Seconds of a first run by name, whose answer is checked: its error goes into `result`.
static std::map<std::string, double> first_runs(const Case & c, const Inputs & inputs, const Sides & sides,
                                                Result & result) {
    std::map<std::string, double> seconds;
    for (Side * side : sides) {
        const double start = now();
        side->run();
        seconds[side->name] = now() - start;
        const double error = result.nmse[side->name] = nmse(c, inputs, *side);
        if (!(error <= side->nmse_bound)) {
            fprintf(stderr, "bench: %s: %s is wrong: NMSE %.2e, bound %.0e\n", c.key().c_str(), side->name, error,
                    side->nmse_bound);
            exit(1);
        }
    }
    return seconds;
}

static void time_sides(const Sides & sides, const std::map<std::string, double> & first, int n_runs, Machine & machine,
                       Result & result) {
    std::map<std::string, std::vector<double>> us;
    int rounds = 0;
    for (Side * side : sides) {
        rounds = std::max(rounds, runs_of(first.at(side->name), n_runs));
    }
    // Sides take turns, so that a slow minute of the machine meets all of them.
    for (int round = 0; round < rounds; round++) {
        for (Side * side : sides) {
            if (round >= runs_of(first.at(side->name), n_runs)) {
                continue;
            }
            result.cold ? machine.flush(result.c.threads) : side->run();
            const double start = now();
            side->run();
            us[side->name].push_back((now() - start) * 1e6);
        }
    }
    for (Side * side : sides) {
        // Seconds do not care for the state of the caches: the checked run is the measurement.
        if (us[side->name].empty()) {
            us[side->name].push_back(first.at(side->name) * 1e6);
        }
        result.median_us[side->name] = median(us[side->name]);
        result.min_us[side->name] = minimum(us[side->name]);
    }
}

std::vector<Result> measure(const Case & c, const std::string & beside, bool with_stock, int n_runs, Machine & machine) {
    const Inputs inputs(c);
    Workers & workers = machine.workers(c.threads);

    const std::unique_ptr<KvqSide> kvq = make_kvq(c, c.recipe, "kvq", inputs, workers);
    std::vector<std::unique_ptr<Side>> others;
    if (!beside.empty()) {
        others.push_back(make_kvq(c, beside, "beside", inputs, workers));
    }
    if (with_stock) {
        // ggml sums f16 outputs in half precision, so that the error grows with the cells; elsewhere it rounds queries.
        others.push_back(make_stock(c, inputs, workers, GGML_TYPE_F16, "f16", 5e-3));
        others.push_back(make_stock(c, inputs, workers, GGML_TYPE_Q8_0, "q8_0", 1e-3));
        others.push_back(make_stock(c, inputs, workers, GGML_TYPE_Q4_0, "q4_0", 1e-3));
    }
    Sides sides = { kvq.get() };
    for (auto & side : others) {
        sides.push_back(side.get());
    }
    fill(c, sides);

    Result base = { c, true, {}, {}, {}, kvq->bytes(), kvq->store_us(), 0 };
    // No attention is faster than reading its bytes once, nor than its multiply-adds at the rate of an int8 dot product
    // that waits for nothing.
    const double peak = machine.int8_peak(c.threads);
    base.floor_us = 1e6 * std::max(base.bytes / machine.bandwidth(c.threads), peak > 0 ? c.ops() / peak : 0.0);

    const std::map<std::string, double> first = first_runs(c, inputs, sides, base);
    std::vector<Result> results;
    for (bool cold : { true, false }) {
        Result r = base;
        r.cold = cold;
        time_sides(sides, first, n_runs, machine, r);
        results.push_back(r);
    }
    return results;
}
