#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

// order-dependent sum against accidents, 8 bytes a step however the bytes come
struct kvq_checksum {
    void add(const void * data, size_t size) {
        const char * p = (const char *) data;
        while (size > 0) {
            const size_t n = std::min(size, sizeof(word) - n_word);
            memcpy((char *) &word + n_word, p, n);
            p      += n;
            size   -= n;
            n_word += n;
            if (n_word == sizeof(word)) {
                step();
            }
        }
    }

    uint64_t finish() {
        step();
        return value;
    }

private:
    void step() {
        value  = (value ^ word)*0x100000001b3ull;
        value ^= value >> 29;
        word   = 0;
        n_word = 0;
    }

    uint64_t value  = 0xcbf29ce484222325ull;
    uint64_t word   = 0;
    size_t   n_word = 0;
};
