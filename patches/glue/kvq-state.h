#pragma once

// Saved state of one cache, little endian as llama.cpp's own:
//
//   header   magic, version, is_sequence, n_stream, n_cells, n_slots, page, has_ext, recipe, layout formats
//   payload  whole cache: per stream cells, planner snapshot, bytes of slots and pages   (kvq-state.cpp)
//            one sequence: cells, pages that hold packed rows of it, its exact rows       (kvq-state-seq.cpp)
//   checksum of all of the above
//
// A reader takes everything into memory and checks it; only then the cache changes.

#include "kvq-glue.h"

#include "llama-io.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

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

struct kvq_state_writer {
    llama_io_write_i & io;
    kvq_checksum sum;

    void bytes(const void * data, size_t size) {
        sum.add(data, size);
        io.write(data, size);
    }

    template <typename T> void value(T v) {
        bytes(&v, sizeof(v));
    }

    void string(const std::string & s) {
        value<uint32_t>(s.size());
        bytes(s.data(), s.size());
    }

    void finish() {
        const uint64_t value = sum.finish();
        io.write(&value, sizeof(value));
    }
};

struct kvq_state_reader {
    llama_io_read_i & io;
    kvq_checksum sum;

    void bytes(void * data, size_t size) {
        io.read(data, size);
        sum.add(data, size);
    }

    // in steps: a length from a damaged file must not become one huge allocation
    std::vector<uint8_t> buffer(uint64_t size) {
        const uint64_t step = 64*1024*1024;

        std::vector<uint8_t> res;
        while (size > res.size()) {
            const size_t n = std::min<uint64_t>(step, size - res.size());
            res.resize(res.size() + n);
            bytes(res.data() + res.size() - n, n);
        }
        return res;
    }

    template <typename T> T value() {
        T v {}; // llama_file leaves what lies behind the end of a file as it is
        bytes(&v, sizeof(v));
        return v;
    }

    std::string string() {
        const auto size = value<uint32_t>();
        if (size > 64*1024) {
            throw std::runtime_error("kvq: the saved state is damaged");
        }
        const auto data = buffer(size);
        return std::string(data.begin(), data.end());
    }

    void finish() {
        uint64_t expected = 0;
        io.read(&expected, sizeof(expected));
        if (expected != sum.finish()) {
            throw std::runtime_error("kvq: the saved state is damaged (checksum)");
        }
    }
};

// one saved cell
struct kvq_state_cell {
    uint32_t          cell;
    llama_pos         pos;
    llama_kv_cell_ext ext;

    std::vector<llama_seq_id> seq_ids; // whole cache only
};

// throws when a library call failed
void kvq_state_call(kvq_status status, const char * what);

enum kvq_state_part {
    KVQ_STATE_SLOTS,
    KVQ_STATE_PAGES,
    KVQ_STATE_POOL, // part of the slots
};

// the ranges of a layer's bytes that hold all slots, the outlier pool, or pages [page0, page0 + n_pages)
std::vector<kvq_range> kvq_state_ranges(const kvq_layout * layout, kvq_side side, kvq_state_part part,
        uint32_t page0, uint32_t n_pages);

size_t kvq_state_size(const std::vector<kvq_range> & ranges);

void kvq_state_get(const ggml_tensor * t, const std::vector<kvq_range> & ranges, uint8_t * dst);
void kvq_state_set(      ggml_tensor * t, const std::vector<kvq_range> & ranges, const uint8_t * src);
