// One plan per ubatch and cache: it tells every layer which cells are exact, which are packed, what to seal and where
// new rows go.

#include "kvq-glue.h"

#include "llama-impl.h"

#include <algorithm>
#include <cstring>

ggml_tensor * llama_kvq_cache::build_plan(ggml_context * ctx, const llama_ubatch & ubatch) const {
    const uint32_t n_stream = kv.n_stream == 1 ? 1 : ubatch.n_seqs_unq;
    const size_t   len      = kvq_planner_plan_len(planner.get(), ubatch.n_tokens/n_stream) + n_positions();

    // upstream decides by ne[0] == n_tokens whether a graph can be reused, as for the k_idxs that this replaces
    ggml_tensor * plan = ggml_new_tensor_3d(ctx, GGML_TYPE_I32, ubatch.n_tokens,
            (len + ubatch.n_tokens - 1)/ubatch.n_tokens, n_stream);

    ggml_set_input(plan);
    ggml_set_name(plan, "attn_inp_kvq_plan");

    return plan;
}

// the ubatch is in the cells already: this is right for every cell but those of its own rows, which the planner knows
bool kvq_cell_is_live(void * user, uint32_t stream, uint32_t cell) {
    return !(*(const llama_kv_cells_vec *) user)[stream].is_empty(cell);
}

size_t llama_kvq_cache::n_positions() const {
    return layouts.empty() || !kvq_layout_wants_positions(layouts[0].get()) ? 0 : kv.get_size();
}

void llama_kvq_cache::cell_positions(uint32_t strm, int32_t * to) const {
    const auto & cells = kv.v_cells[strm];

    for (uint32_t i = 0; i < n_positions(); ++i) {
        to[i] = cells.is_empty(i) ? 0 : cells.pos_get(i);
    }
}

void llama_kvq_cache::plan_stream(uint32_t strm, const std::vector<kvq_row> & rows, int32_t * plan, size_t len) {
    llama_kvq_must(kvq_planner_plan(planner.get(), strm, rows.data(), rows.size(),
                kvq_cell_is_live, &kv.v_cells, plan, len), "plan");
}

void llama_kvq_cache::set_plan(ggml_tensor * dst, const llama_ubatch & ubatch,
        const std::vector<llama_seq_id> & strm, const std::vector<std::vector<uint32_t>> & idxs) {
    const size_t n_tokens = idxs[0].size();
    const size_t len      = dst->ne[0]*dst->ne[1];

    GGML_ASSERT(dst->ne[2] == (int64_t) strm.size());

    settle();
    guard(n_tokens*strm.size());
    make_rotations(*cparams);
    upload_profiles();

    std::vector<kvq_row> rows(n_tokens);

    for (size_t s = 0; s < strm.size(); ++s) {
        for (size_t i = 0; i < n_tokens; ++i) {
            rows[i] = { idxs[s][i], ubatch.pos[s*n_tokens + i], (uint32_t) ubatch.seq_id[s*n_tokens + i][0] };
        }

        plan_stream(strm[s], rows, (int32_t *) dst->data + s*len, len);
        cell_positions(strm[s], (int32_t *) dst->data + (s + 1)*len - n_positions());
    }

    last_plan.assign((const int32_t *) dst->data, (const int32_t *) dst->data + len*strm.size());
    last_streams  = strm;
    last_n_tokens = n_tokens;

    std::replace(progress.begin(), progress.end(), KVQ_LAYER_DONE, KVQ_LAYER_DUE);
}

void llama_kvq_cache::forget_if_empty(uint32_t strm) {
    settle();

    if (kv.v_cells[strm].get_used() > 0) {
        return;
    }

    // a plan without rows: all layers carry it out now
    const kvq_row none = {};

    last_plan.resize(kvq_planner_plan_len(planner.get(), 0) + n_positions());
    llama_kvq_must(kvq_planner_plan(planner.get(), strm, &none, 0, kvq_cell_is_live, &kv.v_cells,
                last_plan.data(), last_plan.size()), "plan");
    last_streams  = { (llama_seq_id) strm };
    last_n_tokens = 0;
    cell_positions(strm, last_plan.data() + last_plan.size() - n_positions());

    std::replace(progress.begin(), progress.end(), KVQ_LAYER_DONE, KVQ_LAYER_DUE);
    settle();
}

bool llama_kvq_cache::settle() const {
    if (last_plan.empty()) {
        return false;
    }

    bool found = false;

    const size_t len = last_plan.size()/last_streams.size();

    for (size_t i = 0; i < layouts.size(); ++i) {
        if (progress[i] != KVQ_LAYER_DUE) {
            continue;
        }
        if (!found) {
            synchronize();
            found = true;
        }

        // llama.cpp has removed the tokens of the aborted ubatch: their rows may hold anything
        const kvq_shape shape = layer_shape(kv.layers[i].il);
        const std::vector<float> k(last_n_tokens*shape.n_kv_heads*shape.head_dim_k);
        const std::vector<float> v(last_n_tokens*shape.n_kv_heads*shape.head_dim_v);

        for (size_t s = 0; s < last_streams.size(); ++s) {
            const kvq_host_memory k_mem(kv.layers[i].k_stream[last_streams[s]]);
            const kvq_host_memory v_mem(kv.layers[i].v_stream[last_streams[s]]);

            kvq_store_args args;
            memset(&args, 0, sizeof(args));

            args.k_cur          = k.data();
            args.k_stride_token = shape.n_kv_heads*shape.head_dim_k;
            args.k_stride_head  = shape.head_dim_k;
            args.v_cur          = v.data();
            args.v_stride_token = shape.n_kv_heads*shape.head_dim_v;
            args.v_stride_head  = shape.head_dim_v;
            args.k_mem          = k_mem.data;
            args.v_mem          = v_mem.data;
            args.plan           = last_plan.data() + s*len;
            args.plan_len       = len;
            args.rotation       = rotations[i].get();
            args.positions      = n_positions() ? args.plan + len - n_positions() : nullptr;
            args.n_tokens       = last_n_tokens;

            llama_kvq_must(kvq_store(layouts[i].get(), &args, 0, 1), "store after an aborted graph");
            k_mem.write_back();
            v_mem.write_back();
        }
        progress[i] = KVQ_LAYER_DONE;
    }

    last_plan.clear();

    return found;
}
