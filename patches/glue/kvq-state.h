#pragma once

// Saved state of one cache, little endian as llama.cpp's own:
//
//   header   magic, version, is_sequence, n_stream, n_cells, n_slots, page, has_ext, recipe, layout formats
//   payload  whole cache: per stream cells, planner snapshot, bytes of slots and pages   (kvq-state.cpp)
//            one sequence: its cells, pages without others' rows, its further rows        (kvq-state-seq.h)
//   checksum of all of the above: kvq_checksum_add
//
// Rows of removed tokens, and in a sequence's state those of other sequences, are wiped from what is written.
// A reader checks every number against this context before it takes memory for what follows, takes everything into
// memory and checks it; only then the cache changes.

#include "kvq-glue.h"

#include "llama-io.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

// long parts are cut into blocks of this size, each behind its own: a file that ends early is noticed at the next block
constexpr size_t KVQ_STATE_BLOCK = 1024*1024;

// throws when a library call failed
void kvq_state_call(kvq_status status, const char * what);

struct kvq_state_writer {
    llama_io_write_i & io;
    uint32_t checksum = 0;

    void bytes(const void * data, size_t size) {
        kvq_state_call(kvq_checksum_add((const uint8_t *) data, size, &checksum), "checksum");
        io.write(data, size);
    }

    template <typename T> void value(T v) {
        bytes(&v, sizeof(v));
    }

    void buffer(const uint8_t * data, size_t size) {
        for (size_t i = 0; i < size; i += KVQ_STATE_BLOCK) {
            const size_t n = std::min(KVQ_STATE_BLOCK, size - i);
            value<uint32_t>(n);
            bytes(data + i, n);
        }
    }

    void string(const std::string & s) {
        value<uint32_t>(s.size());
        buffer((const uint8_t *) s.data(), s.size());
    }

    void finish() {
        io.write(&checksum, sizeof(checksum));
    }
};

struct kvq_state_reader {
    llama_io_read_i & io;
    uint32_t checksum = 0;

    void bytes(void * data, size_t size) {
        io.read(data, size);
        kvq_state_call(kvq_checksum_add((const uint8_t *) data, size, &checksum), "checksum");
    }

    // the caller knows that so much is possible here
    std::vector<uint8_t> buffer(size_t size) {
        std::vector<uint8_t> res;
        while (size > res.size()) {
            const size_t n = std::min(KVQ_STATE_BLOCK, size - res.size());
            if (value<uint32_t>() != n) {
                throw std::runtime_error("kvq: the saved state is damaged (cut short)");
            }
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
        uint32_t expected = 0;
        io.read(&expected, sizeof(expected));
        if (expected != checksum) {
            throw std::runtime_error("kvq: the saved state is damaged (checksum)");
        }
    }
};

// one saved cell
struct kvq_state_cell {
    uint32_t          cell; // whole cache only: a sequence takes the cells that it finds
    llama_pos         pos;
    llama_pos         shift; // part of pos that its key still has to be rotated by
    llama_kv_cell_ext ext;

    std::vector<llama_seq_id> seq_ids; // whole cache only
};

// a stream of a whole cache
struct kvq_state_stream {
    uint32_t head;
    uint32_t n_pages;

    std::vector<kvq_state_cell>       cells;
    std::vector<std::vector<uint8_t>> bytes; // as written: layers, sides, parts
};

// everything but the cell's index and sequences
void kvq_state_write_cell(kvq_state_writer & out, const llama_kv_cells & cells, uint32_t i, bool has_ext);
void kvq_state_read_cell (kvq_state_reader & in,  kvq_state_cell & cell, bool has_ext, bool can_shift);
void kvq_state_put_cell  (llama_kv_cells & cells, const kvq_state_cell & cell); // without sequences its cell is not used yet

enum kvq_state_part : uint8_t {
    KVQ_STATE_SLOTS,
    KVQ_STATE_PAGES,
    KVQ_STATE_POOL, // part of the slots
};

// the ranges of a layer's bytes that hold all slots, the outlier pool, or pages [page0, page0 + n_pages)
std::vector<kvq_range> kvq_state_ranges(const kvq_layout * layout, kvq_side side, kvq_state_part part,
        uint32_t page0, uint32_t n_pages);

size_t kvq_state_size(const std::vector<kvq_range> & ranges);

std::vector<uint8_t> kvq_state_get(const uint8_t * mem, const std::vector<kvq_range> & ranges);
void                 kvq_state_set(uint8_t * mem, const std::vector<kvq_range> & ranges, const uint8_t * src);
void                 kvq_state_set(ggml_tensor * mem, const std::vector<kvq_range> & ranges, const uint8_t * src);

// zeroed memory of one stream of one layer, apart from the cache's
struct kvq_state_memory {
    explicit kvq_state_memory(const kvq_layout * layout);

    kvq_state_memory(kvq_state_memory &&) = default;
    kvq_state_memory(const kvq_state_memory &) = delete;

    uint8_t * side[2]; // by kvq_side

private:
    std::vector<uint8_t> buf[2];
};
