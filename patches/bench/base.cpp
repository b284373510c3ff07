#include "base.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include <time.h>

[[noreturn]] void die(const std::string & text) {
    fprintf(stderr, "bench: error: %s\n", text.c_str());
    exit(2);
}

void ok(kvq_status status) {
    if (status != KVQ_STATUS_OK) {
        die(kvq_last_error());
    }
}

static clockid_t g_clock = CLOCK_MONOTONIC;

void use_cpu_time() { g_clock = CLOCK_PROCESS_CPUTIME_ID; }

double now() {
    timespec t;
    clock_gettime(g_clock, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

double median(std::vector<double> v) {
    std::sort(v.begin(), v.end());
    return v.empty() ? NEVER : v[v.size() / 2];
}

double minimum(const std::vector<double> & v) { return v.empty() ? NEVER : *std::min_element(v.begin(), v.end()); }
