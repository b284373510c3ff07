// Putting a saved sequence, which has its places, into the cache.

#include "kvq-state-seq.h"

#include <algorithm>
#include <map>

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

    std::vector<int32_t> at(n_positions());
    cell_positions(strm, at.data());
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
