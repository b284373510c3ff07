#include "report.h"

#include <cstdio>
#include <fstream>
#include <string>

#include "base.h"

void print_head() {
    printf("%-16s %7s %4s %4s %3s %3s %-5s %10s %10s %10s %10s %10s %7s %7s %8s %6s %8s %9s %8s\n", "recipe", "cells", "q",
           "dim", "gqa", "thr", "cache", "kvq us", "(min)", "f16 us", "q8_0 us", "q4_0 us", "x f16", "x q4_0", "x beside", "GB/s",
           "Gmac/s", "floor us", "store us");
}

void print_row(const Result & r) {
    printf("%-16s %7d %4d %4d %3d %3d %-5s %10.1f %10.1f %10.1f %10.1f %10.1f %7.2f %7.2f %8.3f %6.1f %8.1f %9.1f %8.2f\n",
           r.c.recipe.c_str(), r.c.n_kv, r.c.n_q, r.c.head_dim, r.c.gqa, r.c.threads, r.cold ? "cold" : "warm",
           r.of("kvq"), r.min_us.at("kvq"), r.of("f16"), r.of("q8_0"), r.of("q4_0"), r.ratio("f16"), r.ratio("q4_0"),
           r.ratio("beside"), r.gb_per_s(), r.ops_per_s() / 1e9, r.floor_us, r.store_us);
    fflush(stdout);
}

void write_csv(const char * path, const std::vector<Result> & results) {
    std::ofstream out(path);
    out << "backend,recipe,n_kv,n_q,head_dim,gqa,threads,us_kvq,us_f16,us_q8_0,us_q4_0,ratio_f16,GB/s,ops_per_s,"
           "floor_us,ratio_q4_0,cache,seal_us_per_token,us_kvq_min,us_f16_min,us_q4_0_min,nmse_kvq,us_beside,ratio_beside\n";
    for (const Result & r : results) {
        const auto min = [&](const char * name) { return r.min_us.count(name) ? r.min_us.at(name) : NEVER; };
        out << "cpu-" << kvq_isa() << ",\"" << r.c.recipe << "\"," << r.c.n_kv << ',' << r.c.n_q << ',' << r.c.head_dim
            << ',' << r.c.gqa << ',' << r.c.threads << ',' << r.of("kvq") << ',' << r.of("f16") << ',' << r.of("q8_0")
            << ',' << r.of("q4_0") << ',' << r.ratio("f16") << ',' << r.gb_per_s() << ',' << r.ops_per_s() << ','
            << r.floor_us << ',' << r.ratio("q4_0") << ',' << (r.cold ? "cold" : "warm") << ',' << r.store_us << ','
            << min("kvq") << ',' << min("f16") << ',' << min("q4_0") << ',' << r.nmse.at("kvq") << ',' << r.of("beside") << ',' << r.ratio("beside") << '\n';
    }
    if (!out.flush()) {
        die(std::string("cannot write ") + path);
    }
}

int check(const std::vector<Result> & results) {
    const auto find = [&](const std::string & key) -> const Result * {
        for (const Result & r : results) {
            if (r.cold && r.c.key() == key) {
                return &r;
            }
        }
        return nullptr;
    };
    int missed = 0;
    for (const Bar & bar : BARS) {
        const Result *of = find(bar.of), *by = bar.by.empty() ? of : find(bar.by);
        if (!of || !by) {
            continue;
        }
        const double value = of->column(bar.column) / (bar.by.empty() ? 1.0 : by->column(bar.column));
        const bool met = bar.at_least ? value >= bar.bound : value <= bar.bound;
        printf("%-6s %s of %s%s%s: %.2f, bar %s %.1f\n", met ? "met" : "MISSED", bar.column, bar.of.c_str(),
               bar.by.empty() ? "" : " / ", bar.by.c_str(), value, bar.at_least ? ">=" : "<=", bar.bound);
        missed += !met;
    }
    return missed;
}
