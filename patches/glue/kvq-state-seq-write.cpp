// Saving one sequence: which of its cells go with pages and which as rows, and the bytes.

#include "kvq-state-seq.h"

#include <algorithm>

// which cells of a stream are saved for a sequence, and how
struct kvq_state_choice {
    std::vector<uint8_t>      is_own;
    std::vector<kvq_location> location; // of own cells; of others: nowhere

    std::vector<uint32_t> pages;
    std::vector<uint32_t> others; // cells
    std::vector<uint32_t> exact;  // cells whose rows follow as f16: those of pages, then the others
};

static void choose_page(const llama_kv_cells & cells, uint32_t begin, uint32_t end, uint32_t page, kvq_state_choice & res) {
    uint32_t n_own = 0, n_free = 0, n_packed = 0;
    for (uint32_t j = begin; j < end; ++j) {
        n_own    += res.is_own[j];
        n_free   += cells.is_empty(j);
        n_packed += res.is_own[j] && res.location[j].places == KVQ_IN_PAGE;
    }
    const bool as_page = n_own + n_free == page && 2*n_own >= page && n_packed > 0;
    if (as_page) {
        res.pages.push_back(begin/page);
    }
    for (uint32_t j = begin; j < end; ++j) {
        if (!res.is_own[j]) {
            res.location[j] = {}; // of what was removed, and of others
        } else if (!as_page) {
            res.others.push_back(j);
        } else if (res.location[j].places & KVQ_IN_SLOT) {
            res.exact.push_back(j);
        }
    }
}

kvq_state_choice llama_kvq_cache::choose_cells(uint32_t strm, llama_seq_id seq_id) const {
    const uint32_t page  = kvq_recipe_page(recipe.get());
    const auto   & cells = kv.v_cells[strm];

    kvq_state_choice res;

    res.location.resize(cells.size());
    kvq_state_call(kvq_planner_locate(planner.get(), strm, res.location.data()), "planner");

    for (uint32_t i = 0; i < cells.size(); ++i) {
        res.is_own.push_back(!cells.is_empty(i) && cells.seq_has(i, seq_id) &&
            !llama_hparams::is_masked_swa(kv.n_swa, kv.swa_type, cells.pos_get(i), cells.seq_pos_max(seq_id)));
        if (res.is_own[i] && res.location[i].places == KVQ_NOWHERE) {
            throw std::runtime_error("kvq: a cell without its row");
        }
    }
    for (uint32_t i = 0; i < cells.size(); i += page) {
        choose_page(cells, i, std::min(i + page, cells.size()), page, res);
    }
    res.exact.insert(res.exact.end(), res.others.begin(), res.others.end());
    return res;
}

void llama_kvq_cache::write_seq_cells(kvq_state_writer & out, uint32_t strm, const kvq_state_choice & choice) const {
    const uint32_t page  = kvq_recipe_page(recipe.get());
    const auto   & cells = kv.v_cells[strm];

    out.value<uint32_t>(choice.pages.size());
    out.value<uint32_t>(choice.others.size());
    for (uint32_t p : choice.pages) {
        for (uint32_t i = p*page; i < (p + 1)*page; ++i) {
            const auto & at = choice.location[i];
            const auto   as = !choice.is_own[i] ? SAVED_NOT : at.places & KVQ_IN_SLOT ? SAVED_EXACT : SAVED_PACKED;
            out.value<uint8_t>(as);
            if (as != SAVED_NOT) {
                kvq_state_write_cell(out, cells, i, kv.has_cell_ext());
            }
            if (as == SAVED_PACKED) {
                out.value<int32_t>(at.turned);
            }
        }
    }
    for (uint32_t i : choice.others) {
        kvq_state_write_cell(out, cells, i, kv.has_cell_ext());
    }
}

void llama_kvq_cache::write_pages(kvq_state_writer & out, size_t il, uint32_t strm, const std::vector<uint32_t> & pages,
        const std::vector<kvq_location> & location) const {
    const uint32_t page   = kvq_recipe_page(recipe.get());
    const auto   * layout = layouts[il].get();
    const auto     own    = pages_layout(il, pages.size());

    kvq_state_memory copy(own.get());

    std::vector<uint32_t> from; // packed cells
    std::vector<uint32_t> to;
    std::vector<kvq_location> kept(pages.size()*page);

    for (size_t i = 0; i < kept.size(); ++i) {
        const uint32_t cell = pages[i/page]*page + i%page;
        if (location[cell].places == KVQ_IN_PAGE) {
            kept[i] = location[cell];
            from.push_back(cell);
            to.push_back(i);
        }
    }

    std::vector<uint8_t> pools[2];

    for (kvq_side side : { KVQ_SIDE_K, KVQ_SIDE_V }) {
        const kvq_host_memory mem(side == KVQ_SIDE_K ? kv.layers[il].k_stream[strm] : kv.layers[il].v_stream[strm]);

        for (size_t i = 0; i < pages.size(); ++i) {
            const auto bytes = kvq_state_get(mem.data, kvq_state_ranges(layout, side, KVQ_STATE_PAGES, pages[i], 1));
            kvq_state_set(copy.side[side], kvq_state_ranges(own.get(), side, KVQ_STATE_PAGES, i, 1), bytes.data());
        }
        pools[side] = kvq_state_get(mem.data, kvq_state_ranges(layout, side, KVQ_STATE_POOL, 0, 0));
    }

    kvq_state_call(kvq_pool_adopt(own.get(), copy.side[0], copy.side[1], pools[0].data(), pools[1].data(),
                from.data(), to.data(), to.size()), "outlier tokens");
    kvq_state_call(kvq_erase(own.get(), copy.side[0], copy.side[1], kept.data()), "exact rows of pages");

    for (kvq_side side : { KVQ_SIDE_K, KVQ_SIDE_V }) {
        for (auto part : { KVQ_STATE_PAGES, KVQ_STATE_POOL }) {
            const auto bytes = kvq_state_get(copy.side[side], kvq_state_ranges(own.get(), side, part, 0, pages.size()));
            out.buffer(bytes.data(), bytes.size());
        }
    }
}

// exact rows of one layer, as f16
void llama_kvq_cache::write_rows(kvq_state_writer & out, size_t il, uint32_t strm, const kvq_state_choice & choice) const {
    const auto   & layer = kv.layers[il];
    const size_t   n_k   = kv.hparams.n_embd_k_gqa(layer.il);
    const size_t   n_v   = kv.hparams.n_embd_v_gqa(layer.il);

    const kvq_host_memory k_mem(layer.k_stream[strm]);
    const kvq_host_memory v_mem(layer.v_stream[strm]);

    std::vector<float>       row(n_k + n_v);
    std::vector<ggml_fp16_t> f16(choice.exact.size()*(n_k + n_v));

    for (size_t i = 0; i < choice.exact.size(); ++i) {
        kvq_state_call(kvq_dequantize(layouts[il].get(), k_mem.data, v_mem.data, choice.location.data(), rotations[il].get(),
                    choice.exact[i], 1, row.data(), row.data() + n_k), "rows");
        ggml_fp32_to_fp16_row(row.data(), f16.data() + i*(n_k + n_v), n_k + n_v);
    }
    out.buffer((const uint8_t *) f16.data(), f16.size()*sizeof(ggml_fp16_t));
}

void llama_kvq_cache::state_write_seq(kvq_state_writer & out, llama_seq_id seq_id) const {
    const uint32_t strm   = kv.seq_to_stream.at(seq_id);
    const auto     choice = choose_cells(strm, seq_id);

    write_seq_cells(out, strm, choice);
    for (size_t il = 0; il < layouts.size() && !choice.pages.empty(); ++il) {
        write_pages(out, il, strm, choice.pages, choice.location);
    }
    for (size_t il = 0; il < layouts.size(); ++il) {
        write_rows(out, il, strm, choice);
    }
}
