// K-shift: exact rows are turned where they are (of a GPU, in a copy), packed ones stay as they are and the planner notes how
// far they have moved; attention turns the query back. How a layer's keys turn is read off upstream's own RoPE.

#include "kvq-glue.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <algorithm>
#include <cmath>

struct kvq_shift_node {
    const kvq_layout   * layout;
    const kvq_rotation * rotation;
    const kvq_shift    * shift;

    uint8_t * k_mem;
    uint8_t * v_mem;
    bool      done;
};

static void kvq_node_shift(ggml_tensor * dst, int ith, int nth, void * userdata) {
    auto & node = *(kvq_shift_node *) userdata;

    llama_kvq_must(kvq_shift_keys(node.layout, node.rotation, node.shift, node.k_mem, node.v_mem, ith, nth), "K-shift");

    if (ith == 0) {
        node.done = true;
        *(float *) dst->data = 0.0f;
    }
}

// Unit vectors at position 1 come back as cosines and sines of one position's angles, whatever scaling there is. Their
// length is left out: a shift does not change how long a key is.
void llama_kvq_cache::make_rotations(const llama_cparams & cparams) {
    if (layouts.empty() || rotations[0]) {
        return;
    }

    ggml_context_ptr ctx(ggml_init({ 1024*1024 + 16*1024*layouts.size(), nullptr, false }));
    ggml_cgraph * gf = ggml_new_graph_custom(ctx.get(), 4*layouts.size() + 64, false);

    const bool interleaved = kv.hparams.rope_type == LLAMA_ROPE_TYPE_NORM;

    std::vector<ggml_tensor *> turned;
    for (const auto & layer : kv.layers) {
        const uint32_t il = layer.il;
        if (kv.hparams.rope_type == LLAMA_ROPE_TYPE_NONE || !kv.hparams.has_rope(il)) {
            turned.push_back(nullptr);
            continue;
        }

        const int64_t n_rot = kv.hparams.n_rot(il);

        ggml_tensor * unit = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, n_rot, 1, 1);
        for (int64_t i = 0; i < n_rot; ++i) {
            ((float *) unit->data)[i] = interleaved ? i%2 == 0 : i < n_rot/2;
        }
        ggml_tensor * pos = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, 1);
        *(int32_t *) pos->data = 1;

        // the model's may be in the memory of a device
        ggml_tensor * factors = nullptr;
        if (ggml_tensor * weights = kv.model.get_rope_factors(cparams, il)) {
            factors = ggml_dup_tensor(ctx.get(), weights);
            ggml_backend_tensor_get(weights, factors->data, 0, ggml_nbytes(weights));
        }

        turned.push_back(kv.build_rope_shift(cparams, ctx.get(), unit, pos, nullptr, factors,
                    kv.model.get_rope_freq_base(cparams, il), kv.model.get_rope_freq_scale(cparams, il), il));
        ggml_build_forward_expand(gf, turned.back());
    }

    ggml_backend_ptr backend(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
    if (!backend || ggml_backend_graph_compute(backend.get(), gf) != GGML_STATUS_SUCCESS) {
        throw std::runtime_error("kvq: cannot compute RoPE on the CPU");
    }

    for (size_t i = 0; i < turned.size(); ++i) {
        const int64_t n_pairs = turned[i] ? turned[i]->ne[0]/2 : 0;

        std::vector<double> frequencies(n_pairs);
        for (int64_t j = 0; j < n_pairs; ++j) {
            const float * data = (const float *) turned[i]->data;
            frequencies[j] = std::atan2(interleaved ? data[2*j + 1] : data[j + n_pairs],
                                        interleaved ? data[2*j]     : data[j]);
        }

        llama_kvq_must(kvq_rotation_new(frequencies.data(), n_pairs, interleaved, kvq::out(rotations[i])), "rotation");
    }
}

void llama_kvq_cache::check_profile() {
    // nothing is there to be checked while llama.cpp only estimates memory
    if (profiled.empty() || only_estimated()) {
        return;
    }
    make_rotations(*cparams);

    for (size_t i = 0; i < layouts.size(); ++i) {
        const auto & want = profiled.at(kv.layers[i].il).frequencies;

        size_t n = 0;
        std::vector<double> have(256);
        llama_kvq_must(kvq_rotation_frequencies(rotations[i].get(), have.data(), have.size(), &n), "rotation");

        bool is_same = n == want.size();
        for (size_t j = 0; is_same && j < n; ++j) {
            is_same = std::abs(have[j] - want[j]) <= 1e-4*std::abs(want[j]);
        }
        if (!is_same) {
            throw std::runtime_error(format("kvq: the profile was made with other RoPE settings than those of layer %u: "
                        "make it anew with them, or run with those of the model", kv.layers[i].il));
        }
    }
}

bool llama_kvq_cache::shift(llama_context * lctx) {
    if (kv.hparams.rope_type == LLAMA_ROPE_TYPE_NONE) {
        return false;
    }
    synchronize();
    settle();
    make_rotations(lctx->get_cparams());

    bool shifted = false;

    for (uint32_t s = 0; s < kv.n_stream; ++s) {
        const auto & cells = kv.v_cells[s];
        if (!cells.get_has_shift()) {
            continue;
        }

        std::vector<int32_t> moved(cells.size());
        for (uint32_t i = 0; i < cells.size(); ++i) {
            moved[i] = cells.is_empty(i) ? 0 : cells.get_shift(i);
        }

        if (std::all_of(moved.begin(), moved.end(), [](int32_t d) { return d == 0; })) {
            continue; // see expect_moved
        }
        has_moved = true;

        kvq::shift shift;
        llama_kvq_must(kvq_planner_shift(planner.get(), s, moved.data(), kvq_cell_is_live, &kv.v_cells,
                    kvq::out(shift)), "K-shift");

        shift_layers(lctx, s, *shift);
        shifted = true;
    }

    return shifted;
}

// after a restore: the graph that is there may be one without rotations
void llama_kvq_cache::expect_moved() {
    for (uint32_t s = 0; s < kv.n_stream && !has_moved; ++s) {
        auto & cells = kv.v_cells[s];

        std::vector<kvq_location> location(cells.size());
        llama_kvq_must(kvq_planner_locate(planner.get(), s, location.data()), "planner");

        for (uint32_t i = 0; i < cells.size() && !has_moved; ++i) {
            if (!cells.is_empty(i) && location[i].turned != 0) {
                cells.pos_add(i, 0); // llama.cpp builds a new one after a shift, though it moves nothing
                has_moved = true;
            }
        }
    }
}

void llama_kvq_cache::shift_layers(llama_context * lctx, uint32_t strm, const kvq_shift & shift) {
    auto * sched = lctx->get_sched();
    ggml_backend_sched_reset(sched);

    auto * res = lctx->get_gf_res_reserve();
    res->reset();

    auto * ctx = res->get_ctx();
    auto * gf  = res->get_gf();

    // a node has a source; the memory of the layer is none, as it must not be copied elsewhere for the node
    ggml_tensor * inp = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, 1);
    ggml_set_input(inp);

    std::deque<kvq_shift_node> nodes;

    for (size_t i = 0; i < layouts.size(); ++i) {
        if (gpus[i]) {
            continue;
        }
        nodes.push_back({ layouts[i].get(), rotations[i].get(), &shift,
                (uint8_t *) kv.layers[i].k_stream[strm]->data, (uint8_t *) kv.layers[i].v_stream[strm]->data, false });

        ggml_build_forward_expand(gf, ggml_custom_4d(ctx, GGML_TYPE_F32, 1, 1, 1, 1, &inp, 1,
                    kvq_node_shift, GGML_N_TASKS_MAX, &nodes.back()));
    }

    if (!nodes.empty() && ggml_backend_sched_alloc_graph(sched, gf)) {
        lctx->graph_compute(gf, false);

        // the nodes live on this stack
        ggml_backend_sched_synchronize(sched);
    }

    // the planner has taken the shift as done, so an aborted graph must not leave it half done
    for (auto & node : nodes) {
        if (!node.done) {
            llama_kvq_must(kvq_shift_keys(node.layout, node.rotation, node.shift, node.k_mem, node.v_mem, 0, 1), "K-shift");
        }
    }

    for (size_t i = 0; i < layouts.size(); ++i) {
        if (gpus[i]) {
            const kvq_host_memory k_mem(kv.layers[i].k_stream[strm]);
            std::unique_ptr<const kvq_host_memory> v_mem; // only layers with a profile need it
            if (profiles[i]) {
                v_mem = std::make_unique<const kvq_host_memory>(kv.layers[i].v_stream[strm]);
            }
            llama_kvq_must(kvq_shift_keys(layouts[i].get(), rotations[i].get(), &shift, k_mem.data,
                        v_mem ? v_mem->data : nullptr, 0, 1), "K-shift");
            k_mem.write_back();
            if (v_mem) {
                v_mem->write_back();
            }
        }
    }
}
