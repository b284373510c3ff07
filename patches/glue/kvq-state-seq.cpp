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

    std::vector<kvq_layout_ptr>       layouts; // of just these pages, by layer
    std::vector<kvq_state_memory>     memory;  // as layouts
    std::vector<std::vector<uint8_t>> rows;    // by layer: f16 [n_exact][K, V]

    std::vector<uint32_t> targets; // a page of the cache for each page; none: its rows are stored anew
};

kvq_layout_ptr llama_kvq_cache::pages_layout(size_t il, uint32_t n_pages) const {
    const uint32_t  id    = kv.layers[il].il;
    const kvq_shape shape = layer_shape(id);

    kvq_layout * layout = nullptr;
    kvq_state_call(kvq_layout_new(recipe.get(), &shape, id, n_pages*kvq_recipe_page(recipe.get()), 16, &layout),
            "saved pages");
    return kvq_layout_ptr(layout);
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

void llama_kvq_cache::state_write_seq(kvq_state_writer & out, llama_seq_id seq_id) const {
    const uint32_t strm = kv.seq_to_stream.at(seq_id);
    const uint32_t page = kvq_recipe_page(recipe.get());
    const auto   & src  = kv.v_cells[strm];

    std::vector<kvq_location> location(src.size());
    kvq_state_call(kvq_planner_locate(planner.get(), strm, location.data()), "planner");

    std::vector<uint8_t> is_own(src.size());
    for (uint32_t i = 0; i < src.size(); ++i) {
        is_own[i] = !src.is_empty(i) && src.seq_has(i, seq_id) &&
            !llama_hparams::is_masked_swa(kv.n_swa, kv.swa_type, src.pos_get(i), src.seq_pos_max(seq_id));
        if (is_own[i] && location[i].places == KVQ_NOWHERE) {
            throw std::runtime_error("kvq: a cell without its row");
        }
    }

    std::vector<uint32_t> pages;
    std::vector<uint32_t> others; // cells
    std::vector<uint32_t> exact;  // cells, those of pages first

    for (uint32_t i = 0; i < src.size(); i += page) {
        const uint32_t end = std::min(i + page, src.size());

        uint32_t n_own = 0, n_free = 0, n_packed = 0;
        for (uint32_t j = i; j < end; ++j) {
            n_own    += is_own[j];
            n_free   += src.is_empty(j);
            n_packed += is_own[j] && location[j].places == KVQ_IN_PAGE;
        }
        const bool as_page = n_own + n_free == page && 2*n_own >= page && n_packed > 0;
        if (as_page) {
            pages.push_back(i/page);
        }
        for (uint32_t j = i; j < end; ++j) {
            if (!is_own[j]) {
                location[j] = {}; // of what was removed, and of others
            } else if (!as_page) {
                others.push_back(j);
            } else if (location[j].places & KVQ_IN_SLOT) {
                exact.push_back(j);
            }
        }
    }
    exact.insert(exact.end(), others.begin(), others.end());

    out.value<uint32_t>(pages.size());
    out.value<uint32_t>(others.size());
    for (uint32_t p : pages) {
        for (uint32_t i = p*page; i < (p + 1)*page; ++i) {
            const auto as = !is_own[i] ? SAVED_NOT : location[i].places & KVQ_IN_SLOT ? SAVED_EXACT : SAVED_PACKED;
            out.value<uint8_t>(as);
            if (as != SAVED_NOT) {
                kvq_state_write_cell(out, src, i, kv.has_cell_ext());
            }
            if (as == SAVED_PACKED) {
                out.value<int32_t>(location[i].turned);
            }
        }
    }
    for (uint32_t i : others) {
        kvq_state_write_cell(out, src, i, kv.has_cell_ext());
    }

    for (size_t il = 0; il < layouts.size() && !pages.empty(); ++il) {
        write_pages(out, il, strm, pages, location);
    }

    for (size_t il = 0; il < layouts.size(); ++il) {
        const size_t n_k = kv.hparams.n_embd_k_gqa(kv.layers[il].il);
        const size_t n_v = kv.hparams.n_embd_v_gqa(kv.layers[il].il);

        const kvq_host_memory k_mem(kv.layers[il].k_stream[strm]);
        const kvq_host_memory v_mem(kv.layers[il].v_stream[strm]);

        std::vector<float>       row(n_k + n_v);
        std::vector<ggml_fp16_t> f16(exact.size()*(n_k + n_v));

        for (size_t i = 0; i < exact.size(); ++i) {
            kvq_state_call(kvq_dequantize(layouts[il].get(), k_mem.data, v_mem.data, location.data(), rotations[il].get(),
                        exact[i], 1, row.data(), row.data() + n_k), "rows");
            ggml_fp32_to_fp16_row(row.data(), f16.data() + i*(n_k + n_v), n_k + n_v);
        }
        out.buffer((const uint8_t *) f16.data(), f16.size()*sizeof(ggml_fp16_t));
    }
}

enum cell_use : uint8_t {
    CELL_FREE,  // empty, or the sequence's own: the restore replaces it
    CELL_LEFT,  // of another sequence, whose window has left it: llama.cpp takes such cells as well
    CELL_TAKEN,
};

// Gives the pages and cells of a sequence places, whole free pages first. False where llama.cpp finds no room either.
static bool place(const std::vector<cell_use> & use, kvq_state_seq & saved) {
    const uint32_t page = saved.page;

    std::vector<cell_use> of_page; // whole pages: a shorter last one is never a target
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

void llama_kvq_cache::state_read_seq(kvq_state_reader & in, llama_seq_id seq_id) {
    const uint32_t strm  = kv.seq_to_stream.at(seq_id);
    auto         & cells = kv.v_cells[strm];

    kvq_state_seq saved;
    read_seq_cells(in, seq_id, saved);

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

    in.finish();

    std::vector<cell_use> use(cells.size(), CELL_TAKEN);
    for (uint32_t i = 0; i < cells.size(); ++i) {
        if (cells.is_empty(i) || (cells.seq_has(i, seq_id) && cells.seq_count(i) == 1)) {
            use[i] = CELL_FREE;
        } else if (cells.seq_count(i) == 1 && llama_hparams::is_masked_swa(kv.n_swa, kv.swa_type, cells.pos_get(i),
                    cells.seq_pos_max(cells.seq_get(i)) + 1)) {
            use[i] = CELL_LEFT;
        }
    }
    if (!place(use, saved)) {
        throw std::runtime_error(format("kvq: no room for the %zu cells of the saved sequence",
                    saved.cells.size() - std::count(saved.as.begin(), saved.as.end(), SAVED_NOT)));
    }

    // a planner of its own tries out what the rows of pages say of how far they have moved
    kvq_planner * p = nullptr;
    kvq_state_call(kvq_planner_new(recipe.get(), kv.get_size(), 1, kv.n_seq_max, &p), "planner");
    adopt_pages(kvq_planner_ptr(p).get(), 0, saved);

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

// everything that has not gone with its page
void llama_kvq_cache::restore_rows(uint32_t strm, const kvq_state_seq & saved) {
    std::vector<size_t> anew;                       // index into cells, by position
    std::vector<size_t> source(saved.cells.size()); // of exact ones: which of the saved rows

    for (size_t i = 0, n = 0; i < saved.cells.size(); ++i) {
        if (saved.as[i] == SAVED_EXACT) {
            source[i] = n++;
        }
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

    std::vector<kvq_location> location; // in the saved pages
    for (const int32_t distance : saved.turned) {
        location.push_back({ KVQ_IN_PAGE, 0, distance });
    }

    for (size_t il = 0; il < layouts.size(); ++il) {
        const uint32_t id  = kv.layers[il].il;
        const size_t   n_k = kv.hparams.n_embd_k_gqa(id);
        const size_t   n_v = kv.hparams.n_embd_v_gqa(id);

        std::vector<float> k(anew.size()*n_k);
        std::vector<float> v(anew.size()*n_v);

        for (size_t i = 0; i < anew.size(); ++i) {
            if (saved.as[anew[i]] == SAVED_EXACT) {
                const auto * row = (const ggml_fp16_t *) saved.rows[il].data() + source[anew[i]]*(n_k + n_v);
                ggml_fp16_to_fp32_row(row,       k.data() + i*n_k, n_k);
                ggml_fp16_to_fp32_row(row + n_k, v.data() + i*n_v, n_v);
            } else {
                llama_kvq_must(kvq_dequantize(saved.layouts[il].get(), saved.memory[il].side[0],
                            saved.memory[il].side[1], location.data(), rotations[il].get(), anew[i], 1,
                            k.data() + i*n_k, v.data() + i*n_v), "restored rows");
            }
        }

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
        args.n_tokens       = ubatch.size();

        llama_kvq_must(kvq_store(layouts[il].get(), &args, 0, 1), "restored rows");
        k_mem.write_back();
        v_mem.write_back();
    }
}
