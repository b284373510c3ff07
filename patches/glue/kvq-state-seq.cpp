// Saved state of one sequence. Packed rows move with their whole page, byte for byte, to a free page of the cache, each
// to the same place in it. Exact rows are stored anew, as if they were a ubatch. Where sequences share pages there may
// be no free page left: then the packed rows are decoded and stored anew as well, which encodes them a second time.
// Payload: cells (index, position, ext, is_packed), per layer K and V pages and outlier pool, per layer K and V exact rows
// as f16.

#include "kvq-state.h"

#include "llama-impl.h"

#include <algorithm>
#include <map>

// the pages of the cells for which pred holds, ascending
template <typename F>
static std::vector<uint32_t> pages_of(const std::vector<kvq_state_cell> & cells, uint32_t page, F pred) {
    std::vector<uint32_t> res;
    for (size_t i = 0; i < cells.size(); ++i) {
        const uint32_t p = cells[i].cell/page;
        if (pred(i) && (res.empty() || res.back() != p)) {
            res.push_back(p);
        }
    }
    return res;
}

void llama_kvq_cache::state_write_seq(kvq_state_writer & out, llama_seq_id seq_id) const {
    const uint32_t strm  = kv.seq_to_stream.at(seq_id);
    const uint32_t page  = kvq_recipe_page(recipe.get());
    const auto   & src   = kv.v_cells[strm];

    std::vector<int32_t> location(src.size());
    kvq_state_call(kvq_planner_locate(planner.get(), strm, location.data()), "planner");

    std::vector<kvq_state_cell> cells;
    std::vector<uint32_t>       exact; // cells

    for (uint32_t i = 0; i < src.size(); ++i) {
        if (src.is_empty(i) || !src.seq_has(i, seq_id)) {
            continue;
        }
        if (llama_hparams::is_masked_swa(kv.n_swa, kv.swa_type, src.pos_get(i), src.seq_pos_max(seq_id))) {
            continue;
        }
        if (location[i] == -1) {
            throw std::runtime_error("kvq: a cell without its row");
        }
        if (location[i] >= 0) {
            exact.push_back(i);
        }
        cells.push_back({ i, src.pos_get(i), src.ext_get(i), {} });
    }

    out.value<uint32_t>(cells.size());
    for (const auto & cell : cells) {
        out.value<uint32_t>(cell.cell);
        out.value<llama_pos>(cell.pos);
        if (kv.has_cell_ext()) {
            out.value(cell.ext);
        }
        out.value<uint8_t>(location[cell.cell] == -2);
    }

    const auto packed_pages = pages_of(cells, page, [&](size_t i) { return location[cells[i].cell] == -2; });

    for (size_t il = 0; il < layouts.size(); ++il) {
        const auto * layout = layouts[il].get();

        for (kvq_side side : { KVQ_SIDE_K, KVQ_SIDE_V }) {
            const ggml_tensor * t = side == KVQ_SIDE_K ? kv.layers[il].k_stream[strm] : kv.layers[il].v_stream[strm];

            for (uint32_t p : packed_pages) {
                const auto ranges = kvq_state_ranges(layout, side, KVQ_STATE_PAGES, p, 1);

                std::vector<uint8_t> buf(kvq_state_size(ranges));
                kvq_state_get(t, ranges, buf.data());
                out.bytes(buf.data(), buf.size());
            }

            const auto ranges = kvq_state_ranges(layout, side, KVQ_STATE_POOL, 0, 0);

            std::vector<uint8_t> buf(kvq_state_size(ranges));
            kvq_state_get(t, ranges, buf.data());
            out.bytes(buf.data(), buf.size());
        }
    }

    for (size_t il = 0; il < layouts.size(); ++il) {
        const auto * layout = layouts[il].get();

        const uint32_t id    = kv.layers[il].il;
        const size_t   n_k   = kv.hparams.n_embd_k_gqa(id);
        const size_t   n_v   = kv.hparams.n_embd_v_gqa(id);
        const auto   * k_mem = (const uint8_t *) kv.layers[il].k_stream[strm]->data;
        const auto   * v_mem = (const uint8_t *) kv.layers[il].v_stream[strm]->data;

        std::vector<float>       row(std::max(n_k, n_v));
        std::vector<ggml_fp16_t> f16(std::max(n_k, n_v));

        for (uint32_t cell : exact) {
            kvq_state_call(kvq_dequantize(layout, k_mem, v_mem, location.data(), cell, 1, row.data(), nullptr),
                    "exact rows");
            ggml_fp32_to_fp16_row(row.data(), f16.data(), n_k);
            out.bytes(f16.data(), n_k*sizeof(ggml_fp16_t));

            kvq_state_call(kvq_dequantize(layout, k_mem, v_mem, location.data(), cell, 1, nullptr, row.data()),
                    "exact rows");
            ggml_fp32_to_fp16_row(row.data(), f16.data(), n_v);
            out.bytes(f16.data(), n_v*sizeof(ggml_fp16_t));
        }
    }
}

// A free page for every page of the sequence. Its own cells count as free: the restore replaces them.
// Pages without packed rows may do without one of their own; then their cells go anywhere.
static bool place_cells(const llama_kv_cells & dst, llama_seq_id seq_id, uint32_t page,
        const std::vector<uint32_t> & packed_pages, const std::vector<uint8_t> & is_packed,
        std::vector<kvq_state_cell> & cells, std::map<uint32_t, uint32_t> & page_map) {
    const auto is_free = [&](uint32_t i) {
        return dst.is_empty(i) || (dst.seq_has(i, seq_id) && dst.seq_count(i) == 1);
    };

    std::vector<uint8_t> free_page; // whole pages: a shorter last one is never a target
    for (uint32_t i = 0; i + page <= dst.size(); i += page) {
        bool ok = true;
        for (uint32_t j = 0; j < page && ok; ++j) {
            ok = is_free(i + j);
        }
        free_page.push_back(ok);
    }

    const auto take = [&](uint32_t from, uint32_t to) {
        page_map[from] = to;
        free_page[to]  = 0;
    };

    const auto all_pages = pages_of(cells, page, [](size_t) { return true; });

    for (const auto & pages : { packed_pages, all_pages }) {
        // where the sequence was, if that is free
        for (uint32_t p : pages) {
            if (!page_map.count(p) && p < free_page.size() && free_page[p]) {
                take(p, p);
            }
        }
        for (uint32_t p : pages) {
            if (!page_map.count(p)) {
                const auto it = std::find(free_page.begin(), free_page.end(), 1);
                if (it != free_page.end()) {
                    take(p, it - free_page.begin());
                }
            }
        }
    }

    std::vector<uint8_t> used(dst.size());

    for (auto & cell : cells) {
        const auto it = page_map.find(cell.cell/page);
        if (it != page_map.end()) {
            cell.cell = it->second*page + cell.cell%page;
            used[cell.cell] = 1;
        } else {
            cell.cell = UINT32_MAX;
        }
    }

    uint32_t next = 0;
    for (size_t i = 0; i < cells.size(); ++i) {
        if (cells[i].cell != UINT32_MAX) {
            continue;
        }
        if (is_packed[i]) {
            return false;
        }
        while (next < dst.size() && (used[next] || !is_free(next))) {
            ++next;
        }
        if (next == dst.size()) {
            return false;
        }
        cells[i].cell = next++;
    }

    return true;
}

void llama_kvq_cache::state_read_seq(kvq_state_reader & in, llama_seq_id seq_id) {
    const uint32_t strm = kv.seq_to_stream.at(seq_id);
    const uint32_t page = kvq_recipe_page(recipe.get());

    const auto damaged = [](const char * what) {
        throw std::runtime_error(format("kvq: the saved state is damaged (%s)", what));
    };

    const auto n_cells = in.value<uint32_t>();
    if (n_cells > kv.get_size()) {
        throw std::runtime_error(format("kvq: the saved sequence has %u cells, this context has %u",
                    n_cells, kv.get_size()));
    }

    std::vector<kvq_state_cell> cells;
    std::vector<uint8_t>        is_packed;
    size_t                      n_exact = 0;

    for (uint32_t i = 0; i < n_cells; ++i) {
        kvq_state_cell cell;
        cell.cell = in.value<uint32_t>();
        cell.pos  = in.value<llama_pos>();
        if (kv.has_cell_ext()) {
            cell.ext = in.value<llama_kv_cell_ext>();
        }
        is_packed.push_back(in.value<uint8_t>());

        if (cell.cell == UINT32_MAX || (i > 0 && cell.cell <= cells.back().cell) ||
            cell.pos < 0 || is_packed.back() > 1) {
            damaged("cells");
        }
        n_exact += !is_packed.back();
        cells.push_back(cell);
    }

    const auto packed_pages = pages_of(cells, page, [&](size_t i) { return is_packed[i]; });

    std::vector<std::vector<uint8_t>> pages; // as written: layers, sides, pages
    std::vector<std::vector<uint8_t>> pools; // layers, sides
    for (const auto & layout : layouts) {
        for (kvq_side side : { KVQ_SIDE_K, KVQ_SIDE_V }) {
            const size_t size = kvq_state_size(kvq_state_ranges(layout.get(), side, KVQ_STATE_PAGES, 0, 1));
            for (size_t i = 0; i < packed_pages.size(); ++i) {
                pages.push_back(in.buffer(size));
            }
            pools.push_back(in.buffer(kvq_state_size(kvq_state_ranges(layout.get(), side, KVQ_STATE_POOL, 0, 0))));
        }
    }

    std::vector<std::vector<uint8_t>> rows; // as written: layers
    for (const auto & layer : kv.layers) {
        const size_t n_embd = kv.hparams.n_embd_k_gqa(layer.il) + kv.hparams.n_embd_v_gqa(layer.il);
        rows.push_back(in.buffer(n_exact*n_embd*sizeof(ggml_fp16_t)));
    }

    in.finish();

    std::map<uint32_t, uint32_t> page_map;
    std::vector<kvq_state_cell>  placed = cells;

    const bool whole_pages = place_cells(kv.v_cells[strm], seq_id, page, packed_pages, is_packed, placed, page_map);
    if (!whole_pages) {
        placed = cells;
        page_map.clear();
        if (!place_cells(kv.v_cells[strm], seq_id, page, {}, std::vector<uint8_t>(n_cells, 0), placed, page_map)) {
            throw std::runtime_error(format("kvq: no room for the %u cells of the saved sequence", n_cells));
        }
    }

    kv.seq_rm(seq_id, -1, -1);

    for (const auto & cell : placed) {
        kv.v_cells[strm].pos_set(cell.cell, cell.pos);
        if (kv.has_cell_ext()) {
            kv.v_cells[strm].ext_set(cell.cell, cell.ext);
        }
        kv.v_cells[strm].seq_add(cell.cell, seq_id);
    }

    std::vector<uint32_t> packed; // cells that are read from their page
    std::vector<uint32_t> from;   // what they were called when they were saved
    std::vector<size_t>   anew;   // rows to store, by position, as they arrived

    for (size_t i = 0; i < placed.size(); ++i) {
        if (is_packed[i] && whole_pages) {
            packed.push_back(placed[i].cell);
            from.push_back(cells[i].cell);
        } else {
            anew.push_back(i);
        }
    }
    std::stable_sort(anew.begin(), anew.end(), [&](size_t a, size_t b) { return placed[a].pos < placed[b].pos; });

    if (!packed.empty()) {
        auto bytes = pages.begin();
        for (size_t il = 0; il < layouts.size(); ++il) {
            for (kvq_side side : { KVQ_SIDE_K, KVQ_SIDE_V }) {
                ggml_tensor * t = side == KVQ_SIDE_K ? kv.layers[il].k_stream[strm] : kv.layers[il].v_stream[strm];

                for (uint32_t p : packed_pages) {
                    const auto ranges = kvq_state_ranges(layouts[il].get(), side, KVQ_STATE_PAGES, page_map.at(p), 1);
                    kvq_state_set(t, ranges, (bytes++)->data());
                }
            }

            llama_kvq_must(kvq_pool_adopt(layouts[il].get(), (uint8_t *) kv.layers[il].k_stream[strm]->data,
                        (uint8_t *) kv.layers[il].v_stream[strm]->data, pools[2*il].data(), pools[2*il + 1].data(),
                        from.data(), packed.data(), packed.size()), "restored outlier tokens");
        }

        llama_kvq_must(kvq_planner_adopt(planner.get(), strm, packed.data(), packed.size()), "restored pages");
    }

    if (anew.empty()) {
        return;
    }

    // where each saved row is: in exact, or (page_index*page + offset) in the pages
    std::vector<size_t> source(cells.size());
    for (size_t i = 0, n = 0; i < cells.size(); ++i) {
        if (is_packed[i]) {
            const auto it = std::lower_bound(packed_pages.begin(), packed_pages.end(), cells[i].cell/page);
            source[i] = (it - packed_pages.begin())*page + cells[i].cell%page;
        } else {
            source[i] = n++;
        }
    }

    std::vector<kvq_row> ubatch;
    for (size_t i : anew) {
        ubatch.push_back({ placed[i].cell, placed[i].pos });
    }
    std::vector<int32_t> plan(kvq_planner_plan_len(planner.get(), ubatch.size()));
    plan_stream(strm, ubatch, plan.data(), plan.size());

    for (size_t il = 0; il < layouts.size(); ++il) {
        const uint32_t id  = kv.layers[il].il;
        const size_t   n_k = kv.hparams.n_embd_k_gqa(id);
        const size_t   n_v = kv.hparams.n_embd_v_gqa(id);

        std::vector<float> k_page;
        std::vector<float> v_page;
        if (!whole_pages) {
            decode_pages(il, pages.data() + il*2*packed_pages.size(), packed_pages, pools.data() + 2*il, k_page, v_page);
        }

        std::vector<float> k_cur(ubatch.size()*n_k);
        std::vector<float> v_cur(ubatch.size()*n_v);

        for (size_t i = 0; i < anew.size(); ++i) {
            const size_t src = source[anew[i]];
            if (is_packed[anew[i]]) {
                memcpy(k_cur.data() + i*n_k, k_page.data() + src*n_k, n_k*sizeof(float));
                memcpy(v_cur.data() + i*n_v, v_page.data() + src*n_v, n_v*sizeof(float));
            } else {
                const auto * row = (const ggml_fp16_t *) rows[il].data() + src*(n_k + n_v);
                ggml_fp16_to_fp32_row(row,       k_cur.data() + i*n_k, n_k);
                ggml_fp16_to_fp32_row(row + n_k, v_cur.data() + i*n_v, n_v);
            }
        }

        kvq_store_args args;
        memset(&args, 0, sizeof(args));

        args.k_cur          = k_cur.data();
        args.k_stride_token = n_k;
        args.k_stride_head  = kv.hparams.n_embd_head_k(id);
        args.v_cur          = v_cur.data();
        args.v_stride_token = n_v;
        args.v_stride_head  = kv.hparams.n_embd_head_v(id);
        args.k_mem          = (uint8_t *) kv.layers[il].k_stream[strm]->data;
        args.v_mem          = (uint8_t *) kv.layers[il].v_stream[strm]->data;
        args.plan           = plan.data();
        args.plan_len       = plan.size();
        args.n_tokens       = ubatch.size();

        llama_kvq_must(kvq_store(layouts[il].get(), &args, 0, 1), "restored rows");
    }
}

// bytes: the saved pages of K, then of V; pools: their outlier pools; k and v: rows of all their cells
void llama_kvq_cache::decode_pages(size_t il, const std::vector<uint8_t> * bytes, const std::vector<uint32_t> & pages,
        const std::vector<uint8_t> * pools, std::vector<float> & k, std::vector<float> & v) const {
    const uint32_t  page    = kvq_recipe_page(recipe.get());
    const size_t    n_pages = pages.size();
    const kvq_shape shape = layer_shape(kv.layers[il].il);

    // a cache of just these pages
    kvq_layout * layout = nullptr;
    llama_kvq_must(kvq_layout_new(recipe.get(), &shape, kv.layers[il].il, n_pages*page, kvq_planner_n_slots(planner.get()), &layout),
            "saved pages");
    kvq_layout_ptr owner(layout);

    const std::vector<int32_t> location(n_pages*page, -2);

    std::vector<uint8_t> buf[2] = {
        std::vector<uint8_t>(64 + kvq_layout_k_bytes(layout)),
        std::vector<uint8_t>(64 + kvq_layout_v_bytes(layout)),
    };
    uint8_t * mem[2];

    for (kvq_side side : { KVQ_SIDE_K, KVQ_SIDE_V }) {
        mem[side] = buf[side].data() + 64 - (uintptr_t) buf[side].data()%64;

        for (size_t p = 0; p < n_pages; ++p, ++bytes) {
            const uint8_t * src = bytes->data();
            for (const auto & r : kvq_state_ranges(layout, side, KVQ_STATE_PAGES, p, 1)) {
                memcpy(mem[side] + r.offset, src, r.size);
                src += r.size;
            }
        }
    }

    std::vector<uint32_t> from(n_pages*page);
    std::vector<uint32_t> to  (n_pages*page);
    for (size_t i = 0; i < from.size(); ++i) {
        from[i] = pages[i/page]*page + i%page;
        to  [i] = i;
    }
    llama_kvq_must(kvq_pool_adopt(layout, mem[0], mem[1], pools[0].data(), pools[1].data(), from.data(), to.data(),
                to.size()), "saved outlier tokens");

    k.resize(n_pages*page*shape.n_kv_heads*shape.head_dim_k);
    v.resize(n_pages*page*shape.n_kv_heads*shape.head_dim_v);
    llama_kvq_must(kvq_dequantize(layout, mem[0], mem[1], location.data(), 0, n_pages*page, k.data(), v.data()),
            "saved pages");
}
