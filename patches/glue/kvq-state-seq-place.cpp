// Where a saved sequence goes.

#include "kvq-state-seq.h"

#include <algorithm>

// what a sequence may take
std::vector<kvq_cell_use> llama_kvq_cache::cell_uses(uint32_t strm, llama_seq_id seq_id) const {
    const auto & cells = kv.v_cells[strm];

    std::vector<kvq_cell_use> res(cells.size(), CELL_TAKEN);
    for (uint32_t i = 0; i < cells.size(); ++i) {
        if (cells.is_empty(i) || (cells.seq_has(i, seq_id) && cells.seq_count(i) == 1)) {
            res[i] = CELL_FREE;
        } else if (cells.seq_count(i) == 1 && llama_hparams::is_masked_swa(kv.n_swa, kv.swa_type, cells.pos_get(i),
                    cells.seq_pos_max(cells.seq_get(i)) + 1)) {
            res[i] = CELL_LEFT;
        }
    }
    return res;
}

bool kvq_state_place(const std::vector<kvq_cell_use> & use, kvq_state_seq & saved) {
    const uint32_t page = saved.page;

    std::vector<kvq_cell_use> of_page; // whole pages: a shorter last one is never a target
    for (uint32_t i = 0; i + page <= use.size(); i += page) {
        of_page.push_back(*std::max_element(use.begin() + i, use.begin() + i + page));
    }

    std::vector<uint8_t> is_target(of_page.size());
    for (const auto level : { CELL_FREE, CELL_LEFT }) {
        for (uint32_t p = 0; p < of_page.size() && saved.targets.size() < saved.n_pages; ++p) {
            if (of_page[p] == level) {
                is_target[p] = 1;
                saved.targets.push_back(p);
            }
        }
    }
    saved.targets.resize(saved.n_pages, NO_PAGE);

    std::vector<size_t>  rest; // by position, so that neighbours share a page
    std::vector<uint8_t> is_taken(use.size());
    for (size_t i = 0; i < saved.cells.size(); ++i) {
        const uint32_t target = i/page < saved.n_pages ? saved.targets[i/page] : NO_PAGE;
        if (saved.as[i] == SAVED_NOT) {
            continue;
        }
        if (target != NO_PAGE) {
            saved.cells[i].cell = target*page + i%page;
            is_taken[saved.cells[i].cell] = 1;
        } else {
            rest.push_back(i);
        }
    }

    // cells for the rest, best first
    std::vector<uint32_t> free[3];
    for (uint32_t i = 0; i < use.size(); ++i) {
        const uint32_t p = i/page;
        if (is_taken[i]) {
            continue;
        }
        if (use[i] == CELL_LEFT) {
            free[2].push_back(i);
        } else if (use[i] == CELL_FREE) {
            free[p < of_page.size() && of_page[p] == CELL_FREE && !is_target[p] ? 0 : 1].push_back(i);
        }
    }
    free[0].insert(free[0].end(), free[1].begin(), free[1].end());
    free[0].insert(free[0].end(), free[2].begin(), free[2].end());

    if (rest.size() > free[0].size()) {
        return false;
    }
    std::stable_sort(rest.begin(), rest.end(), [&](size_t a, size_t b) { return saved.cells[a].pos < saved.cells[b].pos; });
    for (size_t i = 0; i < rest.size(); ++i) {
        saved.cells[rest[i]].cell = free[0][i];
    }
    return true;
}
