// What all saved states are made of: ranges of bytes, memory apart from a cache, cells.

#include "kvq-state.h"

#include "llama-impl.h"

void kvq_state_call(kvq_status status, const char * what) {
    if (status != 0) {
        throw std::runtime_error(format("kvq: %s: %s", what, kvq_last_error()));
    }
}

std::vector<kvq_range> kvq_state_ranges(const kvq_layout * layout, kvq_side side, kvq_state_part part,
        uint32_t page0, uint32_t n_pages) {
    std::vector<kvq_range> res;
    if (part == KVQ_STATE_PAGES && n_pages == 0) {
        return res;
    }

    auto get = [&](kvq_range * out, size_t cap, size_t * n) {
        switch (part) {
            case KVQ_STATE_SLOTS: return kvq_layout_slot_ranges(layout, side, out, cap, n);
            case KVQ_STATE_POOL:  return kvq_layout_pool_ranges(layout, side, out, cap, n);
            default:              return kvq_layout_page_ranges(layout, side, page0, n_pages, out, cap, n);
        }
    };

    size_t n = 0;
    kvq_state_call(get(nullptr, 0, &n), "state ranges");
    res.resize(n);
    kvq_state_call(get(res.data(), n, &n), "state ranges");

    return res;
}

size_t kvq_state_size(const std::vector<kvq_range> & ranges) {
    size_t size = 0;
    for (const auto & r : ranges) {
        size += r.size;
    }
    return size;
}

std::vector<uint8_t> kvq_state_get(const uint8_t * mem, const std::vector<kvq_range> & ranges) {
    std::vector<uint8_t> res;
    res.reserve(kvq_state_size(ranges));
    for (const auto & r : ranges) {
        res.insert(res.end(), mem + r.offset, mem + r.offset + r.size);
    }
    return res;
}

void kvq_state_set(uint8_t * mem, const std::vector<kvq_range> & ranges, const uint8_t * src) {
    for (const auto & r : ranges) {
        memcpy(mem + r.offset, src, r.size);
        src += r.size;
    }
}

void kvq_state_set(ggml_tensor * mem, const std::vector<kvq_range> & ranges, const uint8_t * src) {
    for (const auto & r : ranges) {
        ggml_backend_tensor_set(mem, src, r.offset, r.size);
        src += r.size;
    }
}

kvq_state_memory::kvq_state_memory(const kvq_layout * layout) {
    const size_t align = 64;

    for (kvq_side s : { KVQ_SIDE_K, KVQ_SIDE_V }) {
        buf[s].resize(align + (s == KVQ_SIDE_K ? kvq_layout_k_bytes(layout) : kvq_layout_v_bytes(layout)));
        side[s] = buf[s].data() + align - (uintptr_t) buf[s].data()%align;
    }
}

void kvq_state_write_cell(kvq_state_writer & out, const llama_kv_cells & cells, uint32_t i, bool has_ext) {
    const llama_pos pos   = cells.pos_get(i);
    const llama_pos shift = cells.get_shift(i);
    if (pos < shift) {
        throw std::runtime_error("kvq: a division of positions is still to be applied: decode before saving the state");
    }
    out.value(pos);
    out.value(shift);
    if (has_ext) {
        out.value(cells.ext_get(i));
    }
}

void kvq_state_read_cell(kvq_state_reader & in, kvq_state_cell & cell, bool has_ext, bool can_shift) {
    cell.pos   = in.value<llama_pos>();
    cell.shift = in.value<llama_pos>();
    if (has_ext) {
        cell.ext = in.value<llama_kv_cell_ext>();
    }

    const int64_t old = (int64_t) cell.pos - cell.shift;
    if (cell.pos < 0 || old < 0 || old > INT32_MAX) {
        throw std::runtime_error("kvq: the saved state is damaged (positions)");
    }
    if (cell.shift != 0 && !can_shift) {
        throw std::runtime_error("kvq: the state was saved before a position shift that this context cannot apply");
    }
}

void kvq_state_put_cell(llama_kv_cells & cells, const kvq_state_cell & cell) {
    cells.pos_set(cell.cell, cell.pos - cell.shift);
    cells.ext_set(cell.cell, cell.ext);
    for (const auto id : cell.seq_ids) {
        cells.seq_add(cell.cell, id);
    }
    if (cell.shift != 0) {
        cells.pos_add(cell.cell, cell.shift);
    }
}
