// Reading a saved sequence: everything into memory of its own, checked; then it is restored.

#include "kvq-state-seq.h"

#include "llama-impl.h"

#include <algorithm>
#include <cinttypes>

kvq::layout llama_kvq_cache::pages_layout(size_t il, uint32_t n_pages) const {
    const uint32_t  id    = kv.layers[il].il;
    const kvq_shape shape = layer_shape(id);

    kvq::layout layout;
    kvq_state_call(kvq_layout_new(recipe.get(), &shape, id, n_pages*kvq_recipe_page(recipe.get()), 16,
                kvq::out(layout)), "saved pages");
    return layout;
}

// all the cells, checked against what this context can hold before memory is taken for what follows
void llama_kvq_cache::read_seq_cells(kvq_state_reader & in, llama_seq_id seq_id, kvq_state_seq & saved) const {
    const uint64_t size = kv.get_size();

    saved.page    = kvq_recipe_page(recipe.get());
    saved.n_pages = in.value<uint32_t>();

    const uint64_t of_pages = (uint64_t) saved.n_pages*saved.page;
    const uint64_t others   = in.value<uint32_t>();

    const auto check = [&](uint64_t n) {
        if (n > size) {
            throw std::runtime_error(format("kvq: the saved sequence has at least %" PRIu64 " cells, this context has %"
                        PRIu64, n, size));
        }
    };
    check(of_pages/2 + others); // of a page at least half of the cells are saved

    uint64_t n_cells = 0;
    for (uint64_t i = 0; i < of_pages + others; ++i) {
        const uint8_t as = i < of_pages ? in.value<uint8_t>() : (uint8_t) SAVED_EXACT;
        if (as > SAVED_EXACT) {
            throw std::runtime_error("kvq: the saved state is damaged (cells)");
        }
        kvq_state_cell cell = {};
        if (as != SAVED_NOT) {
            kvq_state_read_cell(in, cell, kv.has_cell_ext(), kv.get_can_shift());
            n_cells++;
        }
        cell.seq_ids = { seq_id };
        saved.cells .push_back(cell);
        saved.as    .push_back(as);
        saved.turned.push_back(as == SAVED_PACKED ? in.value<int32_t>() : 0);
    }
    saved.turned.resize(of_pages);
    check(n_cells);
}

// pages and rows of every layer, apart from the cache's
void llama_kvq_cache::read_seq_memory(kvq_state_reader & in, kvq_state_seq & saved) const {
    const size_t n_exact = std::count(saved.as.begin(), saved.as.end(), SAVED_EXACT);

    for (size_t il = 0; il < layouts.size() && saved.n_pages > 0; ++il) {
        saved.layouts.push_back(pages_layout(il, saved.n_pages));
        saved.memory.emplace_back(saved.layouts[il].get());

        for (kvq_side side : { KVQ_SIDE_K, KVQ_SIDE_V }) {
            for (auto part : { KVQ_STATE_PAGES, KVQ_STATE_POOL }) {
                const auto ranges = kvq_state_ranges(saved.layouts[il].get(), side, part, 0, saved.n_pages);
                kvq_state_set(saved.memory[il].side[side], ranges, in.buffer(kvq_state_size(ranges)).data());
            }
        }
    }
    for (const auto & layer : kv.layers) {
        const size_t n_embd = kv.hparams.n_embd_k_gqa(layer.il) + kv.hparams.n_embd_v_gqa(layer.il);
        saved.rows.push_back(in.buffer(n_exact*n_embd*sizeof(ggml_fp16_t)));
    }
}

void llama_kvq_cache::state_read_seq(kvq_state_reader & in, llama_seq_id seq_id) {
    const uint32_t strm = kv.seq_to_stream.at(seq_id);

    kvq_state_seq saved;
    read_seq_cells(in, seq_id, saved);
    read_seq_memory(in, saved);

    in.finish();

    if (!kvq_state_place(cell_uses(strm, seq_id), saved)) {
        throw std::runtime_error(format("kvq: no room for the %zu cells of the saved sequence",
                    saved.cells.size() - std::count(saved.as.begin(), saved.as.end(), SAVED_NOT)));
    }

    // a planner of its own tries out what the rows of pages say of how far they have moved
    kvq::planner trial;
    kvq_state_call(kvq_planner_new(recipe.get(), kv.get_size(), 1, kv.n_seq_max, kvq::out(trial)), "planner");
    adopt_pages(trial.get(), 0, saved);

    kv.seq_rm(seq_id, -1, -1);
    forget_if_empty(strm);
    restore(strm, saved);
}

// lets a planner know of the packed rows of pages that have a target
void llama_kvq_cache::adopt_pages(kvq_planner * planner, uint32_t strm, const kvq_state_seq & saved) const {
    std::vector<uint32_t> cells;
    std::vector<int32_t>  turned;
    for (size_t i = 0; i < saved.turned.size(); ++i) {
        if (saved.with_page(i)) {
            cells .push_back(saved.cells[i].cell);
            turned.push_back(saved.turned[i]);
        }
    }
    if (!cells.empty()) {
        kvq_state_call(kvq_planner_adopt(planner, strm, cells.data(), turned.data(), cells.size()),
                "the saved state is damaged");
    }
}
