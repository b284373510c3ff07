// Saved state of one sequence. Nothing of other sequences and of removed tokens is in it:
//
//   pages  of which at least half is the sequence's own and the rest is free move byte for byte. Rows of them that are
//          exact in the cache (window, sink tokens) are wiped from the page and follow as rows.
//   rows   everything else, as f16: exact rows, and decoded rows of pages with cells that are another sequence's (or
//          that its window has left). They are stored anew, as if they were a ubatch, side by side in pages that become
//          all its own.
//   pool   members (outlier tokens) that are in those pages.
//
// Payload: number of pages and of further cells; cells of pages, each behind what the page has of it, packed ones with
// how far they have moved since they were encoded; the further cells; per layer K and V: pages and pool; per layer: rows
// of K and V, of exact cells of pages and of further cells.

#include "kvq-state.h"

#include "llama-impl.h"

#include <algorithm>
#include <cinttypes>
#include <map>

static const uint32_t NO_PAGE = UINT32_MAX;

// what a state has of a cell
enum saved_as : uint8_t {
    SAVED_NOT, // of pages: free when they were saved
    SAVED_PACKED,
    SAVED_EXACT,
};

// a saved sequence on its way into the cache
struct kvq_state_seq {
    uint32_t page;
    uint32_t n_pages;

    std::vector<kvq_state_cell> cells;  // of pages, then the others; where they go once they are placed
    std::vector<uint8_t>        as;     // as cells: saved_as
    std::vector<int32_t>        turned; // of the cells of pages

    // whether a row comes with its page
    bool with_page(size_t i) const {
        return as[i] == SAVED_PACKED && targets[i/page] != NO_PAGE;
    }

    std::vector<kvq::layout>       layouts; // of just these pages, by layer
    std::vector<kvq_state_memory>     memory;  // as layouts
    std::vector<std::vector<uint8_t>> rows;    // by layer: f16 [n_exact][K, V]

    std::vector<uint32_t> targets; // a page of the cache for each page; none: its rows are stored anew
};

kvq::layout llama_kvq_cache::pages_layout(size_t il, uint32_t n_pages) const {
    const uint32_t  id    = kv.layers[il].il;
    const kvq_shape shape = layer_shape(id);

    kvq::layout layout;
    kvq_state_call(kvq_layout_new(recipe.get(), &shape, id, n_pages*kvq_recipe_page(recipe.get()), 16,
                kvq::out(layout)), "saved pages");
    return layout;
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

enum kvq_cell_use : uint8_t {
    CELL_FREE,  // empty, or the sequence's own: the restore replaces it
    CELL_LEFT,  // of another sequence, whose window has left it: llama.cpp takes such cells as well
    CELL_TAKEN,
};

// Gives the pages and cells of a sequence places, whole free pages first. False where llama.cpp finds no room either.
static bool place(const std::vector<kvq_cell_use> & use, kvq_state_seq & saved) {
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
        const uint8_t as = i < of_pages ? in.value<uint8_t>() : SAVED_EXACT;
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

void llama_kvq_cache::state_read_seq(kvq_state_reader & in, llama_seq_id seq_id) {
    const uint32_t strm = kv.seq_to_stream.at(seq_id);

    kvq_state_seq saved;
    read_seq_cells(in, seq_id, saved);
    read_seq_memory(in, saved);

    in.finish();

    if (!place(cell_uses(strm, seq_id), saved)) {
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

void llama_kvq_cache::restore(uint32_t strm, const kvq_state_seq & saved) {
    auto & cells = kv.v_cells[strm];

    // as llama_kv_cache::apply_ubatch: a sequence that loses a cell loses what came before it, too
    std::map<llama_seq_id, llama_pos> lost;
    for (size_t i = 0; i < saved.cells.size(); ++i) {
        const auto & cell = saved.cells[i];
        if (saved.as[i] != SAVED_NOT && !cells.is_empty(cell.cell)) {
            auto & pos = lost.emplace(cells.seq_get(cell.cell), -1).first->second;
            pos = std::max(pos, cells.pos_get(cell.cell));
            cells.rm(cell.cell);
        }
    }
    for (const auto & [id, pos] : lost) {
        kv.seq_rm(id, -1, pos + 1);
    }

    const kvq_state_cell * last = nullptr;
    for (size_t i = 0; i < saved.cells.size(); ++i) {
        const auto & cell = saved.cells[i];
        if (saved.as[i] != SAVED_NOT) {
            kvq_state_put_cell(cells, cell);
            last = !last || cell.pos >= last->pos ? &cell : last;
        }
    }
    if (last) {
        kv.v_heads[strm] = last->cell + 1;
    }

    restore_pages(strm, saved);
    restore_rows(strm, saved);
}

void llama_kvq_cache::restore_pages(uint32_t strm, const kvq_state_seq & saved) {
    std::vector<uint32_t> from; // packed cells of pages that have a target
    std::vector<uint32_t> to;
    for (size_t i = 0; i < saved.turned.size(); ++i) {
        if (saved.with_page(i)) {
            from.push_back(i);
            to.push_back(saved.cells[i].cell);
        }
    }
    if (to.empty()) {
        return;
    }

    for (size_t il = 0; il < layouts.size(); ++il) {
        const auto * layout = layouts[il].get();
        const auto * own    = saved.layouts[il].get();

        const kvq_host_memory mem[2] = {
            kvq_host_memory(kv.layers[il].k_stream[strm]),
            kvq_host_memory(kv.layers[il].v_stream[strm]),
        };
        std::vector<uint8_t> pools[2];

        for (kvq_side side : { KVQ_SIDE_K, KVQ_SIDE_V }) {
            for (uint32_t p = 0; p < saved.n_pages; ++p) {
                if (saved.targets[p] != NO_PAGE) {
                    const auto bytes = kvq_state_get(saved.memory[il].side[side],
                            kvq_state_ranges(own, side, KVQ_STATE_PAGES, p, 1));
                    kvq_state_set(mem[side].data, kvq_state_ranges(layout, side, KVQ_STATE_PAGES, saved.targets[p], 1),
                            bytes.data());
                }
            }
            pools[side] = kvq_state_get(saved.memory[il].side[side], kvq_state_ranges(own, side, KVQ_STATE_POOL, 0, 0));
        }
        llama_kvq_must(kvq_pool_adopt(layout, mem[0].data, mem[1].data, pools[0].data(), pools[1].data(),
                    from.data(), to.data(), to.size()), "restored outlier tokens");
        for (const auto & m : mem) {
            m.write_back();
        }
    }
    adopt_pages(planner.get(), strm, saved);
}

// of one layer, rows that have not gone with their page: exact ones, and packed ones decoded
void llama_kvq_cache::saved_rows(size_t il, const kvq_state_seq & saved, const std::vector<size_t> & which,
        std::vector<float> & k, std::vector<float> & v) const {
    const size_t n_k = k.size()/which.size();
    const size_t n_v = v.size()/which.size();

    std::vector<size_t> source(saved.cells.size()); // of exact ones: which of the saved rows
    for (size_t i = 0, n = 0; i < saved.cells.size(); ++i) {
        source[i] = saved.as[i] == SAVED_EXACT ? n++ : 0;
    }
    std::vector<kvq_location> location; // in the saved pages
    for (const int32_t distance : saved.turned) {
        location.push_back({ KVQ_IN_PAGE, 0, distance });
    }

    for (size_t i = 0; i < which.size(); ++i) {
        if (saved.as[which[i]] == SAVED_EXACT) {
            const auto * row = (const ggml_fp16_t *) saved.rows[il].data() + source[which[i]]*(n_k + n_v);
            ggml_fp16_to_fp32_row(row,       k.data() + i*n_k, n_k);
            ggml_fp16_to_fp32_row(row + n_k, v.data() + i*n_v, n_v);
        } else {
            llama_kvq_must(kvq_dequantize(saved.layouts[il].get(), saved.memory[il].side[0], saved.memory[il].side[1],
                        location.data(), rotations[il].get(), which[i], 1, k.data() + i*n_k, v.data() + i*n_v),
                    "restored rows");
        }
    }
}

// everything that has not gone with its page
void llama_kvq_cache::restore_rows(uint32_t strm, const kvq_state_seq & saved) {
    std::vector<size_t> anew; // index into cells, by position
    for (size_t i = 0; i < saved.cells.size(); ++i) {
        if (saved.as[i] != SAVED_NOT && !saved.with_page(i)) {
            anew.push_back(i);
        }
    }
    if (anew.empty()) {
        return;
    }
    std::stable_sort(anew.begin(), anew.end(), [&](size_t a, size_t b) { return saved.cells[a].pos < saved.cells[b].pos; });

    std::vector<kvq_row> ubatch;
    for (size_t i : anew) {
        const auto & cell = saved.cells[i];
        ubatch.push_back({ cell.cell, cell.pos, (uint32_t) cell.seq_ids[0] });
    }
    std::vector<int32_t> plan(kvq_planner_plan_len(planner.get(), ubatch.size()));
    plan_stream(strm, ubatch, plan.data(), plan.size());

    auto at = cell_positions(strm);
    for (size_t i = 0; i < saved.cells.size() && !at.empty(); ++i) {
        if (saved.as[i] != SAVED_NOT) {
            at[saved.cells[i].cell] = saved.cells[i].pos;
        }
    }

    for (size_t il = 0; il < layouts.size(); ++il) {
        const uint32_t id  = kv.layers[il].il;
        const size_t   n_k = kv.hparams.n_embd_k_gqa(id);
        const size_t   n_v = kv.hparams.n_embd_v_gqa(id);

        std::vector<float> k(anew.size()*n_k);
        std::vector<float> v(anew.size()*n_v);
        saved_rows(il, saved, anew, k, v);

        const kvq_host_memory k_mem(kv.layers[il].k_stream[strm]);
        const kvq_host_memory v_mem(kv.layers[il].v_stream[strm]);

        kvq_store_args args;
        memset(&args, 0, sizeof(args));

        args.k_cur          = k.data();
        args.k_stride_token = n_k;
        args.k_stride_head  = kv.hparams.n_embd_head_k(id);
        args.v_cur          = v.data();
        args.v_stride_token = n_v;
        args.v_stride_head  = kv.hparams.n_embd_head_v(id);
        args.k_mem          = k_mem.data;
        args.v_mem          = v_mem.data;
        args.plan           = plan.data();
        args.plan_len       = plan.size();
        args.rotation       = rotations[il].get();
        args.positions      = at.empty() ? nullptr : at.data();
        args.n_tokens       = ubatch.size();

        llama_kvq_must(kvq_store(layouts[il].get(), &args, 0, 1), "restored rows");
        k_mem.write_back();
        v_mem.write_back();
    }
}
