// Fills both sides, checks their answers, times them.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "cases.h"
#include "machine.h"

struct Result {
    Case c;
    bool cold;
    // By name of the side: microseconds.
    std::map<std::string, double> median_us, min_us, nmse;
    double bytes, store_us, floor_us;

    double of(const std::string & name) const;
    double ratio(const std::string & name) const;
    double column(const std::string & name) const;
    // Multiply-adds a second.
    double ops_per_s() const { return c.ops() / of("kvq") * 1e6; }
    double gb_per_s() const { return bytes / of("kvq") / 1e3; }
};

// One with cold caches, one with warm ones. Ends the program if an answer is wrong.
// `beside`: another recipe on the same rows, in turns with the case's own; empty: none.
std::vector<Result> measure(const Case & c, const std::string & beside, bool with_stock, int n_runs, Machine & machine);
