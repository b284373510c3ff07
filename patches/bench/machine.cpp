#include "machine.h"

#include <algorithm>
#include <fstream>

#if defined(__AVX512VNNI__)
#include <immintrin.h>
#endif
#include <unistd.h>

#include "base.h"

std::string cpu_model() {
    std::ifstream info("/proc/cpuinfo");
    for (std::string line; std::getline(info, line);) {
        if (line.rfind("model name", 0) == 0) {
            return line.substr(line.find(':') + 2);
        }
    }
    return "unknown CPU";
}

// Sum of all words, so that the compiler must read them.
static uint64_t read_all(const uint8_t * data, size_t bytes) {
    const uint64_t * words = reinterpret_cast<const uint64_t *>(data);
    uint64_t sum = 0;
    for (size_t i = 0; i < bytes / 8; i++) {
        sum += words[i];
    }
    return sum;
}

#if defined(__AVX512VNNI__)
// Eight independent sums are more than the latency of the instruction needs. As text, because compilers keep an
// array of sums in memory, and multiply once where they can.
constexpr int MULTIPLY_ADDS = 8 * 64;
static void multiply_add(int rounds) {
    const __m512i x = _mm512_set1_epi8(3);
    __m512i a = x, b = x, c = x, d = x, e = x, f = x, g = x, h = x;
    for (int i = 0; i < rounds; i++) {
        __asm__ volatile("vpdpbusd %8, %8, %0; vpdpbusd %8, %8, %1; vpdpbusd %8, %8, %2; vpdpbusd %8, %8, %3;"
                         "vpdpbusd %8, %8, %4; vpdpbusd %8, %8, %5; vpdpbusd %8, %8, %6; vpdpbusd %8, %8, %7"
                         : "+v"(a), "+v"(b), "+v"(c), "+v"(d), "+v"(e), "+v"(f), "+v"(g), "+v"(h)
                         : "v"(x));
    }
}
#else
constexpr int MULTIPLY_ADDS = 0;
static void multiply_add(int) {}
#endif

Machine::Machine() : flush_(std::max<size_t>(64 << 20, 2 * std::max(0L, sysconf(_SC_LEVEL3_CACHE_SIZE)))) {}

Workers & Machine::workers(int threads) {
    auto & w = workers_[threads];
    if (!w) {
        w = std::make_unique<Workers>(threads);
    }
    return *w;
}

void Machine::flush(int threads) {
    workers(threads).run([&](int part, int n) {
        const size_t bytes = flush_.size / n / 64 * 64;
        sink_ += read_all(flush_.data + part * bytes, bytes);
    });
}

double Machine::bandwidth(int threads) {
    return best(bandwidth_[threads], [&] { flush(threads); }, double(flush_.size));
}

double Machine::int8_peak(int threads) {
    constexpr int ROUNDS = 1 << 18;
    return best(peak_[threads], [&] {
        workers(threads).run([](int, int) { multiply_add(ROUNDS); });
    }, double(threads) * ROUNDS * MULTIPLY_ADDS);
}

double Machine::best(double & known, const std::function<void()> & work, double amount) {
    for (int i = 0; i < 8 && (known == 0 || i > 0); i++) {
        const double start = now();
        work();
        known = std::max(known, amount / (now() - start));
    }
    return known;
}
