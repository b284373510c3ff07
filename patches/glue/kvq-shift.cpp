// K-shift: the K rows of cells whose position moved are decoded, rotated by RoPE as upstream does it, and encoded
// again. One graph per chunk of cells, for all layers, so that scratch memory and graph size stay bounded.

#include "kvq-glue.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>

struct kvq_shift_node {
    const kvq_layout * layout;
    const int32_t    * location; // all cells of the stream
    const uint8_t    * changed;  // cells of the chunk

    uint8_t * k_mem;
    uint32_t  cell0;
};

// dst: [head_dim_k, n_head_kv, n_cells]
static void kvq_node_dequantize(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const auto & node = *(const kvq_shift_node *) userdata;

    const int64_t i0 = dst->ne[2]*(ith + 0)/nth;
    const int64_t i1 = dst->ne[2]*(ith + 1)/nth;

    if (i0 < i1) {
        llama_kvq_must(kvq_dequantize(node.layout, node.k_mem, nullptr, node.location, node.cell0 + i0, i1 - i0,
                    (float *) dst->data + i0*dst->ne[0]*dst->ne[1], nullptr), "K-shift: dequantize");
    }
}

// sources: the rows, the rotated view of them (only to come after it)
static void kvq_node_requantize(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const auto & node = *(const kvq_shift_node *) userdata;

    GGML_UNUSED(nth);

    // every thread comes here, whatever n_tasks says; pages of one call may share headers, so one of them does it all
    if (ith != 0) {
        return;
    }

    llama_kvq_must(kvq_requantize_k(node.layout, node.k_mem, node.location, node.cell0, dst->src[0]->ne[2],
                (const float *) dst->src[0]->data, node.changed), "K-shift: requantize");

    *(float *) dst->data = 0.0f;
}

bool llama_kvq_cache::shift(llama_context * lctx) {
    if (kv.hparams.rope_type == LLAMA_ROPE_TYPE_NONE) {
        return false;
    }
    settle();

    int64_t row_size = 1;
    for (const auto & layer : kv.layers) {
        row_size = std::max<int64_t>(row_size, sizeof(float)*kv.hparams.n_embd_k_gqa(layer.il));
    }
    const uint32_t n_chunk = std::max<int64_t>(128, GGML_PAD(16*1024*1024/row_size, 128));

    for (uint32_t s = 0; s < kv.n_stream; ++s) {
        const auto & cells = kv.v_cells[s];
        if (!cells.get_has_shift()) {
            continue;
        }

        std::vector<int32_t> location(cells.size());
        llama_kvq_must(kvq_planner_locate(planner.get(), s, location.data()), "K-shift: locate");

        for (uint32_t i = 0; i < cells.size(); i += n_chunk) {
            if (!shift_cells(lctx, s, i, std::min(n_chunk, cells.size() - i), location)) {
                LLAMA_LOG_ERROR("%s: failed to compute K-shift\n", __func__);
                return false;
            }
        }
    }

    return true;
}

bool llama_kvq_cache::shift_cells(llama_context * lctx, uint32_t strm, uint32_t cell0, uint32_t n,
        const std::vector<int32_t> & location) {
    std::vector<int32_t> shifts (n);
    std::vector<uint8_t> changed(n);

    for (uint32_t i = 0; i < n; ++i) {
        const bool is_empty = kv.v_cells[strm].is_empty(cell0 + i);

        shifts [i] = is_empty ? 0 : kv.v_cells[strm].get_shift(cell0 + i);
        changed[i] = shifts[i] != 0;
    }
    if (std::none_of(changed.begin(), changed.end(), [](uint8_t c) { return c != 0; })) {
        return true;
    }

    auto * sched = lctx->get_sched();
    ggml_backend_sched_reset(sched);

    auto * res = lctx->get_gf_res_reserve();
    res->reset();

    auto * ctx = res->get_ctx();
    auto * gf  = res->get_gf();

    const auto & cparams = lctx->get_cparams();

    ggml_tensor * inp = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n);
    ggml_set_input(inp);

    std::deque<kvq_shift_node> shift_nodes;

    for (size_t ikv = 0; ikv < kv.layers.size(); ++ikv) {
        const uint32_t il = kv.layers[ikv].il;
        if (!kv.hparams.has_rope(il)) {
            continue;
        }

        shift_nodes.push_back({ layouts[ikv].get(), location.data(), changed.data(),
                (uint8_t *) kv.layers[ikv].k_stream[strm]->data, cell0 });

        // not sources: the nodes write this memory, and it must not be copied elsewhere for them
        ggml_tensor * rows = ggml_custom_4d(ctx, GGML_TYPE_F32,
                kv.hparams.n_embd_head_k(il), kv.hparams.n_head_kv(il), n, 1,
                &inp, 1, kvq_node_dequantize, GGML_N_TASKS_MAX, &shift_nodes.back());

        ggml_tensor * rope = ggml_view_3d(ctx, rows, kv.hparams.n_rot(il), rows->ne[1], n, rows->nb[1], rows->nb[2], 0);

        rope = kv.build_rope_shift(cparams, ctx, rope, inp, nullptr, kv.model.get_rope_factors(cparams, il),
                kv.model.get_rope_freq_base(cparams, il), kv.model.get_rope_freq_scale(cparams, il), il);

        ggml_tensor * src[2] = { rows, rope };

        ggml_build_forward_expand(gf, ggml_custom_4d(ctx, GGML_TYPE_F32, 1, 1, 1, 1, src, 2,
                    kvq_node_requantize, 1, &shift_nodes.back()));
    }

    if (ggml_graph_n_nodes(gf) == 0) {
        return true;
    }
    if (!ggml_backend_sched_alloc_graph(sched, gf)) {
        return false;
    }

    ggml_backend_tensor_set(inp, shifts.data(), 0, n*sizeof(int32_t));

    const bool ok = lctx->graph_compute(gf, false) == GGML_STATUS_SUCCESS;

    // the nodes live on this stack
    ggml_backend_sched_synchronize(sched);

    return ok;
}
