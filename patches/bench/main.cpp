// Times the attention of one layer over its KV cache: kvq beside stock ggml flash attention (f16, q8_0, q4_0), in one
// process, on the same rows, the same shapes and the same number of threads.
//
// Both sides see what a running model gives them: keys and values with outlier channels, an FP16 mask, the newest n_q
// tokens being decoded, ggml's cache laid out as llama_kv_cache does (all heads of a cell adjacent). Timed is the
// attention alone; what it costs to store a token is a column of its own. Before a side is timed its answer is
// compared with double precision on its own rows.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include <unistd.h>

#include "base.h"
#include "cases.h"
#include "ggml.h"
#include "machine.h"
#include "measure.h"
#include "report.h"

#ifndef KVQ_COMMIT
#define KVQ_COMMIT "unknown"
#endif

struct Options {
    bool quick = false, check = false, stock = true, cpu_time = false;
    int runs = 9;
    std::string beside;
    const char * csv = nullptr;
    std::vector<Case> cases;
};

static const char USAGE[] =
    "usage: bench [--quick] [--check] [--no-stock] [--cpu-time] [--runs N] [--csv FILE] [--beside RECIPE] [--case CASE]...\n"
    "  --quick     decode at 4096, 16384 and 32768 cells only\n"
    "  --check     fail if a bar is missed\n"
    "  --no-stock  kvq alone\n"
    "  --cpu-time  one thread, and its CPU time instead of elapsed time: steadier on a busy machine\n"
    "  --runs      timed runs of anything that takes less than half a second (default 9; 4 times that below 5 ms)\n"
    "  --beside    times this recipe as well, on the same rows and in turns, e.g. kivi:k=2.25\n"
    "  --case      this instead of the table: RECIPE/CELLS/QUERIES/DIM/GQA/THREADS,\n"
    "              e.g. skvq:k=2,v=2/32768/1/128/4/2; a recipe's profile\n"
    "              is made up, whatever its name: aqua:profile=any/32768/1/128/4/2\n";

static Options parse(int argc, char ** argv) {
    Options o;
    for (int i = 1; i < argc; i++) {
        const std::string arg = argv[i];
        const auto value = [&] {
            if (i + 1 == argc) {
                die(arg + " needs a value");
            }
            return argv[++i];
        };
        if (arg == "--quick") { o.quick = true; }
        else if (arg == "--check") { o.check = true; }
        else if (arg == "--no-stock") { o.stock = false; }
        else if (arg == "--cpu-time") { o.cpu_time = true; }
        else if (arg == "--runs") { o.runs = std::max(1, atoi(value())); }
        else if (arg == "--beside") { o.beside = value(); }
        else if (arg == "--csv") { o.csv = value(); }
        else if (arg == "--case") { o.cases.push_back(parse_case(value())); }
        else {
            fputs(USAGE, stderr);
            exit(2);
        }
    }
    if (o.cases.empty()) {
        o.cases = o.quick ? QUICK : FULL;
    }
    if (o.cpu_time) {
        use_cpu_time();
        for (Case & c : o.cases) {
            c.threads = 1;
        }
    }
    return o;
}

int main(int argc, char ** argv) {
    const Options options = parse(argc, argv);
    Machine machine;
    double load = 0;
    if (getloadavg(&load, 1) != 1) {
        load = -1;
    }
    printf("%s, %ld cores, load %.1f; kvq %s (%s, %s), ggml %s (%s)\n", cpu_model().c_str(),
           sysconf(_SC_NPROCESSORS_ONLN), load, kvq_version(), KVQ_COMMIT, kvq_isa(), ggml_version(), ggml_commit());
    for (int threads = 1; threads <= (options.cpu_time ? 1 : 2); threads++) {
        printf("%d thread%s: reads %.1f GB/s, int8 %.0f G multiply-adds/s\n", threads, threads == 1 ? "" : "s",
               machine.bandwidth(threads) / 1e9, machine.int8_peak(threads) / 1e9);
    }
    print_head();
    std::vector<Result> results;
    for (const Case & c : options.cases) {
        for (const Result & r : measure(c, options.beside, options.stock, options.runs, machine)) {
            print_row(r);
            results.push_back(r);
        }
    }
    if (options.csv) {
        write_csv(options.csv, results);
    }
    return options.check && check(results) > 0 ? 1 : 0;
}
