// The two graph nodes of a layer: attend, then store. On the CPU, with few rows, the attend node makes partial results over
// slices of the cache, which a third node combines. Nodes of a layer in GPU memory have callbacks of their own, for which the
// CUDA backend knows what to launch; for many rows there two of them decode keys and values for upstream's flash attention.

#include "kvq-glue.h"

#include "llama-graph.h"
#include "llama-impl.h"

#include <cstring>

bool operator==(const llama_kvq_node & a, const llama_kvq_node & b) {
    return a.layout == b.layout && a.progress == b.progress && a.rotation == b.rotation && a.n_positions == b.n_positions && a.il == b.il &&
           a.device == b.device && a.profile == b.profile && a.attend_space == b.attend_space && a.store_space == b.store_space &&
           a.has_rows == b.has_rows && a.has_sinks == b.has_sinks && a.has_lse == b.has_lse &&
           a.scale  == b.scale  && a.softcap  == b.softcap  && a.max_bias  == b.max_bias;
}

void * llama_kvq_cache::keep(const llama_kvq_node & node) {
    for (auto & cur : nodes) {
        if (cur == node) {
            return &cur;
        }
    }
    nodes.push_back(node);

    return &nodes.back();
}

// In all nodes: plan is [n, m, n_stream], positions at its end where layouts want them, rows and outputs of the streams follow each other. Attention's output is a
// block of rows, [head_dim_v, n_head, n_tokens*n_stream], and behind it a float for each row: the logarithm of its softmax
// denominator, which the store node reads.

// out: [n_head, n_tokens*n_stream, head_dim_v + 1]
static float * lse_of(const ggml_tensor * out) {
    return (float *) out->data + out->ne[0]*out->ne[1]*(out->ne[2] - 1);
}

// sources: q, k_mem, v_mem, mask, plan[, k_cur, v_cur][, sinks]; s: of n_stream
static kvq_attend_args attend_args(const ggml_tensor * dst, uint32_t n_splits, int64_t s, const llama_kvq_node & node) {
    const ggml_tensor * q     = dst->src[0];
    const ggml_tensor * k_mem = dst->src[1];
    const ggml_tensor * v_mem = dst->src[2];
    const ggml_tensor * mask  = dst->src[3];
    const ggml_tensor * plan  = dst->src[4];
    const ggml_tensor * k_cur = node.has_rows  ? dst->src[5] : nullptr;
    const ggml_tensor * v_cur = node.has_rows  ? dst->src[6] : nullptr;
    const ggml_tensor * sinks = node.has_sinks ? dst->src[node.has_rows ? 7 : 5] : nullptr;

    const int64_t n_stream = plan->ne[2];
    const int64_t n_tokens = q->ne[2]/n_stream;
    const int64_t n_rows   = q->ne[1]*n_tokens;
    const int64_t n_out    = n_splits == 1 ? n_rows*(dst->ne[2] - 1) : ggml_nelements(dst)/n_stream;
    const int64_t i0       = s*n_tokens;

    kvq_attend_args args;
    memset(&args, 0, sizeof(args));

    args.q              = (const float *) ((const char *) q->data + i0*q->nb[2]);
    args.q_stride_token = q->nb[2]/sizeof(float);
    args.q_stride_head  = q->nb[1]/sizeof(float);

    if (node.has_rows) {
        args.k_cur          = (const float *) ((const char *) k_cur->data + i0*k_cur->nb[2]);
        args.k_stride_token = k_cur->nb[2]/sizeof(float);
        args.k_stride_head  = k_cur->nb[1]/sizeof(float);
        args.v_cur          = (const float *) ((const char *) v_cur->data + i0*v_cur->nb[2]);
        args.v_stride_token = v_cur->nb[2]/sizeof(float);
        args.v_stride_head  = v_cur->nb[1]/sizeof(float);
    }

    args.k_mem    = (const uint8_t *) k_mem->data + s*k_mem->nb[1];
    args.v_mem    = (const uint8_t *) v_mem->data + s*v_mem->nb[1];
    args.plan     = (const int32_t *) ((const char *) plan->data + s*plan->nb[2]);
    args.plan_len = plan->ne[0]*plan->ne[1];
    args.rotation = node.rotation->get();

    args.mask              = (const char *) mask->data + s*mask->nb[3];
    args.mask_is_f16       = mask->type == GGML_TYPE_F16;
    args.mask_stride_token = mask->nb[1]/mask->nb[0];
    args.n_kv              = mask->ne[0];

    args.sink_logits = sinks ? (const float *) sinks->data : nullptr;

    args.scale    = node.scale;
    args.softcap  = node.softcap;
    args.max_bias = node.max_bias;
    args.n_tokens = n_tokens;
    args.n_splits = n_splits;
    args.out      = (float *) dst->data + s*n_out;
    args.lse      = n_splits == 1 ? lse_of(dst) + s*n_rows : nullptr;
    args.profile  = node.profile ? node.profile->data : nullptr;

    return args;
}

static void kvq_attend_part(ggml_tensor * dst, uint32_t n_splits, int ith, int nth, const llama_kvq_node & node) {
    for (int64_t s = 0; s < dst->src[4]->ne[2]; ++s) {
        const auto args = attend_args(dst, n_splits, s, node);
        llama_kvq_must(kvq_attend(node.layout, &args, ith, nth), "attend");
    }
}

// dst: [n_head, n_tokens*n_stream, head_dim_v + 1]
static void kvq_node_attend(ggml_tensor * dst, int ith, int nth, void * userdata) {
    kvq_attend_part(dst, 1, ith, nth, *(const llama_kvq_node *) userdata);
}

// dst: [head_dim_v + 2, n_head*n_tokens, n_splits, n_stream]
static void kvq_node_attend_split(ggml_tensor * dst, int ith, int nth, void * userdata) {
    kvq_attend_part(dst, dst->ne[2], ith, nth, *(const llama_kvq_node *) userdata);
}

// sources: the output of kvq_node_attend_split[, sinks]; dst as of kvq_node_attend
static void kvq_node_combine(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const auto & node = *(const llama_kvq_node *) userdata;

    const ggml_tensor * split = dst->src[0];
    const ggml_tensor * sinks = node.has_sinks ? dst->src[1] : nullptr;

    const int64_t n_stream = split->ne[3];
    const int64_t n_tokens = dst->ne[1]/n_stream;
    const int64_t n_rows   = dst->ne[0]*n_tokens;
    const int64_t n_split  = ggml_nelements(split)/n_stream;

    for (int64_t s = 0; s < n_stream; ++s) {
        llama_kvq_must(kvq_combine(node.layout, (const float *) split->data + s*n_split,
                    sinks ? (const float *) sinks->data : nullptr, split->ne[2], n_tokens,
                    (float *) dst->data + s*n_rows*(dst->ne[2] - 1), lse_of(dst) + s*n_rows, ith, nth), "combine");
    }
}

// sources: k_mem, which is dst as well, v_mem, plan, k_cur, v_cur, q[, the output of kvq_node_attend or kvq_node_combine]
static kvq_store_args store_args(const ggml_tensor * dst, int64_t s, const llama_kvq_node & node) {
    const ggml_tensor * k_mem = dst->src[0];
    const ggml_tensor * v_mem = dst->src[1];
    const ggml_tensor * plan  = dst->src[2];
    const ggml_tensor * k_cur = dst->src[3];
    const ggml_tensor * v_cur = dst->src[4];
    const ggml_tensor * q     = dst->src[5];

    const int64_t n_tokens = k_cur->ne[2]/plan->ne[2];
    const int64_t i0       = s*n_tokens;

    kvq_store_args args;
    memset(&args, 0, sizeof(args));

    args.k_cur          = (const float *) ((const char *) k_cur->data + i0*k_cur->nb[2]);
    args.k_stride_token = k_cur->nb[2]/sizeof(float);
    args.k_stride_head  = k_cur->nb[1]/sizeof(float);
    args.v_cur          = (const float *) ((const char *) v_cur->data + i0*v_cur->nb[2]);
    args.v_stride_token = v_cur->nb[2]/sizeof(float);
    args.v_stride_head  = v_cur->nb[1]/sizeof(float);
    args.k_mem          = (uint8_t *) k_mem->data + s*k_mem->nb[1];
    args.v_mem          = (uint8_t *) v_mem->data + s*v_mem->nb[1];
    args.plan           = (const int32_t *) ((const char *) plan->data + s*plan->nb[2]);
    args.plan_len       = plan->ne[0]*plan->ne[1];
    args.rotation       = node.rotation->get();
    args.q              = (const float *) ((const char *) q->data + i0*q->nb[2]);
    args.q_stride_token = q->nb[2]/sizeof(float);
    args.q_stride_head  = q->nb[1]/sizeof(float);
    args.lse            = node.has_lse ? lse_of(dst->src[6]) + i0*dst->src[6]->ne[0] : nullptr;
    args.scale          = node.scale;
    args.positions      = node.n_positions ? args.plan + args.plan_len - node.n_positions : nullptr;
    args.profile        = node.profile ? node.profile->data : nullptr;
    args.n_tokens       = n_tokens;

    return args;
}

static void kvq_node_store(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const auto & node = *(const llama_kvq_node *) userdata;

    const bool is_observed = node.has_lse && kvq_observe_store(dst, lse_of(dst->src[6]), node, ith, nth);

    for (int64_t s = 0; !is_observed && s < dst->src[2]->ne[2]; ++s) {
        const auto args = store_args(dst, s, node);
        llama_kvq_must(kvq_store(node.layout, &args, ith, nth), "store");
    }

    if (ith == 0) {
        *node.progress = KVQ_LAYER_DONE;
    }
}

// dst of these as on the CPU, never split
static void kvq_node_gpu_attend(ggml_tensor *, int, int, void *) {
    GGML_ABORT("kvq: the CPU was to attend in GPU memory");
}

static void kvq_node_gpu_store(ggml_tensor *, int, int, void *) {
    GGML_ABORT("kvq: the CPU was to store into GPU memory");
}

static void kvq_node_gpu_keys(ggml_tensor *, int, int, void *) {
    GGML_ABORT("kvq: the CPU was to decode keys in GPU memory");
}

static void kvq_node_gpu_values(ggml_tensor *, int, int, void *) {
    GGML_ABORT("kvq: the CPU was to decode values in GPU memory");
}

static kvq_streams streams_of(const ggml_tensor * k_mem, const ggml_tensor * v_mem, const ggml_tensor * plan,
        const ggml_tensor * mask) {
    kvq_streams streams = {};

    streams.n_streams   = plan->ne[2];
    streams.k_stride    = k_mem->nb[1];
    streams.v_stride    = v_mem->nb[1];
    streams.plan_stride = plan->nb[2]/sizeof(int32_t);
    streams.mask_stride = mask ? mask->nb[3]/mask->nb[0] : 0;

    streams.positions_stride = streams.plan_stride;

    return streams;
}

// Without a stream everything is enqueued already, as part of a CUDA graph. So the arguments must depend on nothing but the
// node and its sources, which are the same then.
static void kvq_launch_attend(ggml_tensor * dst, void * stream, void * userdata) {
    const auto & node = *(const llama_kvq_node *) userdata;

    if (stream) {
        const auto args    = attend_args(dst, 1, 0, node);
        const auto streams = streams_of(dst->src[1], dst->src[2], dst->src[4], dst->src[3]);
        llama_kvq_must(kvq_attend_enqueue(node.device, node.layout, &args, &streams, node.attend_space->data,
                    ggml_nbytes(node.attend_space), stream), "attend");
    }
}

// sources as of kvq_node_attend; dst: [head_dim, n_kv, n_head_kv, n_stream], F16
static void kvq_launch_rows(ggml_tensor * dst, void * stream, const llama_kvq_node & node, bool is_key) {
    if (stream) {
        const auto args    = attend_args(dst, 1, 0, node);
        const auto streams = streams_of(dst->src[1], dst->src[2], dst->src[4], nullptr);
        llama_kvq_must(kvq_dequantize_enqueue(node.device, node.layout, &args, &streams, is_key ? dst->data : nullptr,
                    is_key ? nullptr : dst->data, stream), "decode");
    }
}

static void kvq_launch_keys(ggml_tensor * dst, void * stream, void * userdata) {
    kvq_launch_rows(dst, stream, *(const llama_kvq_node *) userdata, true);
}

static void kvq_launch_values(ggml_tensor * dst, void * stream, void * userdata) {
    kvq_launch_rows(dst, stream, *(const llama_kvq_node *) userdata, false);
}

static void kvq_launch_store(ggml_tensor * dst, void * stream, void * userdata) {
    const auto & node = *(const llama_kvq_node *) userdata;

    if (stream) {
        auto       args    = store_args(dst, 0, node);
        const auto streams = streams_of(dst->src[0], dst->src[1], dst->src[2], nullptr);
        // what attention has read, this reads
        args.after_attend = node.has_lse;
        llama_kvq_must(kvq_store_enqueue(node.device, node.layout, &args, &streams, node.store_space->data,
                    ggml_nbytes(node.store_space), stream), "store");
    }

    *node.progress = KVQ_LAYER_DONE;
}

void kvq_gpu_register(kvq_register_t register_op) {
    register_op(kvq_node_gpu_attend, kvq_launch_attend);
    register_op(kvq_node_gpu_store,  kvq_launch_store);
    register_op(kvq_node_gpu_keys,   kvq_launch_keys);
    register_op(kvq_node_gpu_values, kvq_launch_values);
}

// f32 with contiguous channels; rows and heads may be strided
static ggml_tensor * as_rows(ggml_context * ctx, ggml_tensor * t) {
    if (t->type != GGML_TYPE_F32) {
        return ggml_cast(ctx, t, GGML_TYPE_F32);
    }
    return t->nb[0] == sizeof(float) ? t : ggml_cont(ctx, t);
}

// With more tokens than this, pages are decoded once instead of being read for every tile of query rows. Not measured finely: 32
// tokens of 4 heads each are 16 tiles or more.
static const int64_t KVQ_DECODE_TOKENS = 32;
// Decoded rows of a layer lie in the compute buffer; where they would be larger, pages are read.
static const size_t  KVQ_DECODE_BYTES  = 1024u*1024*1024;

// Upstream's flash attention over decoded rows: [head_dim_v, n_head, n_tokens, n_stream], or null where the backend lacks it.
// src: as of kvq_node_attend
static ggml_tensor * attend_decoded(ggml_context * ctx, const kvq_gpu & gpu, std::vector<ggml_tensor *> & src, void * userdata,
        const llama_kvq_node & node, int64_t n_head_kv, int64_t n_embd_v, ggml_tensor * sinks, ggml_backend_sched_t sched) {
    ggml_tensor * q    = src[0];
    ggml_tensor * mask = src[3];

    const int64_t n_kv     = mask->ne[0];
    const int64_t n_stream = mask->ne[3];
    const int64_t n_tokens = q->ne[2]/n_stream;

    if (n_head_kv*n_kv*n_stream*(q->ne[0] + n_embd_v)*sizeof(ggml_fp16_t) > KVQ_DECODE_BYTES) {
        return nullptr;
    }

    ggml_tensor * k = ggml_custom_4d(ctx, GGML_TYPE_F16, q->ne[0], n_kv, n_head_kv, n_stream, src.data(), src.size(),
            kvq_node_gpu_keys, GGML_N_TASKS_MAX, userdata);
    ggml_tensor * v = ggml_custom_4d(ctx, GGML_TYPE_F16, n_embd_v, n_kv, n_head_kv, n_stream, src.data(), src.size(),
            kvq_node_gpu_values, GGML_N_TASKS_MAX, userdata);

    q = ggml_view_4d(ctx, q, q->ne[0], q->ne[1], n_tokens, n_stream, q->nb[1], q->nb[2], q->nb[2]*n_tokens, 0);

    ggml_tensor * out = ggml_flash_attn_ext(ctx, ggml_permute(ctx, q, 0, 2, 1, 3), k, v,
            mask->type == GGML_TYPE_F16 ? mask : ggml_cast(ctx, mask, GGML_TYPE_F16), node.scale, node.max_bias, node.softcap);
    ggml_flash_attn_ext_add_sinks(out, sinks);
    ggml_flash_attn_ext_set_prec (out, GGML_PREC_F32);

    if (!ggml_backend_supports_op(gpu.backend, out)) {
        return nullptr;
    }
    for (auto * t : { k, v, out }) {
        ggml_backend_sched_set_tensor_backend(sched, t, gpu.backend);
    }
    return out;
}

ggml_tensor * llama_kvq_cache::build_attn(const llm_graph_context & graph,
        ggml_tensor * q, ggml_tensor * k_cur, ggml_tensor * v_cur, ggml_tensor * k_mem, ggml_tensor * v_mem,
        ggml_tensor * plan, ggml_tensor * kq_mask, ggml_tensor * kq_b, ggml_tensor * sinks,
        float kq_scale, int il) {
    const auto & hparams = graph.hparams;
    const auto & cparams = graph.cparams;

    if (!this->cparams) {
        this->cparams = std::make_unique<llama_cparams>(cparams);
        check_profile();
    }

    if (kq_b) {
        throw std::runtime_error("kvq: this model adds a bias to KQ: run it with --kvq off");
    }
    if (cparams.training) {
        throw std::runtime_error("kvq: training needs an exact KV cache: run it with --kvq off");
    }
    if (!k_cur != !v_cur) {
        throw std::runtime_error("kvq: this model caches K and V apart: run it with --kvq off");
    }

    auto       * ctx0   = graph.ctx0;
    auto       * gpu    = gpus.at(kv.map_layer_ids.at(il));
    const auto * layout = layouts.at(kv.map_layer_ids.at(il)).get();
    const auto   owner  = kv.layers[kv.map_layer_ids.at(il)].il;

    const int64_t n_head   = q->ne[1];
    const int64_t n_embd_v = hparams.n_embd_head_v(owner);

    if (q->ne[0] != hparams.n_embd_head_k(owner) || n_head != hparams.n_head(owner)) {
        throw std::runtime_error(format("kvq: layer %d does not attend in the shape of the layer that stores its KV: "
                    "run this model with --kvq off", il));
    }

    llama_kvq_node node = {};

    node.layout    = layout;
    node.progress  = &progress.at(kv.map_layer_ids.at(il));
    node.rotation  = &rotations.at(kv.map_layer_ids.at(il));
    node.n_positions = n_positions();
    node.il        = owner;
    node.has_rows  = k_cur != nullptr;
    node.has_sinks = sinks != nullptr;
    node.has_lse   = true;
    node.scale     = kq_scale;
    node.softcap   = hparams.attn_soft_cap ? hparams.f_attn_logit_softcapping : 0.0f;
    node.max_bias  = hparams.f_max_alibi_bias;

    if (graph.arch == LLM_ARCH_GROK) {
        // as in build_attn_mha without flash attention, which is what defines this model
        node.scale   = kq_scale*hparams.f_attn_out_scale;
        node.softcap = hparams.f_attn_logit_softcapping;
    }

    const int64_t n_stream = kq_mask->ne[3];
    const int64_t n_tokens = q->ne[2]/n_stream;
    const int64_t n_splits = gpu ? 1 : kvq_attend_splits(layout, n_tokens,
            graph.n_tokens > 1 ? cparams.n_threads_batch : cparams.n_threads);

    GGML_ASSERT(kq_mask->ne[1] == n_tokens && k_mem->ne[1] == n_stream && plan->ne[2] == n_stream &&
            plan->ne[0]*plan->ne[1] >= (int64_t) (kvq_planner_plan_len(planner.get(), n_tokens) + n_positions()));

    if (gpu) {
        node.rotation = has_moved ? node.rotation : &unmoved;

        gpu->find_backend(graph.sched);
        reserve_space(*gpu, layout, n_tokens, n_stream, kq_mask->ne[0]);
        node.device       = gpu->device;
        node.profile      = profiles.at(kv.map_layer_ids.at(il));
        node.attend_space = gpu->attend_space;
        node.store_space  = gpu->store_space;
    }

    std::vector<ggml_tensor *> src = { as_rows(ctx0, q), k_mem, v_mem, kq_mask, plan };
    if (k_cur) {
        k_cur = as_rows(ctx0, k_cur);
        v_cur = as_rows(ctx0, v_cur);
        src.push_back(k_cur);
        src.push_back(v_cur);
    }
    if (sinks) {
        GGML_ASSERT(sinks->type == GGML_TYPE_F32 && ggml_nelements(sinks) == n_head);
        src.push_back(sinks);
    }

    ggml_tensor * out = nullptr;

    if (gpu && n_tokens > KVQ_DECODE_TOKENS && kvq_layout_attn_window(layout) == 0) {
        node.has_lse = false;
        out = attend_decoded(ctx0, *gpu, src, keep(node), node, hparams.n_head_kv(owner), n_embd_v, sinks, graph.sched);
        node.has_lse = !out;
    }

    void * userdata = keep(node);

    if (out) {
        // decoded
    } else if (n_splits == 1) {
        out = ggml_custom_4d(ctx0, GGML_TYPE_F32, n_head, q->ne[2], n_embd_v + 1, 1, src.data(), src.size(),
                gpu ? kvq_node_gpu_attend : kvq_node_attend, GGML_N_TASKS_MAX, userdata);
    } else {
        ggml_tensor * split = ggml_custom_4d(ctx0, GGML_TYPE_F32, n_embd_v + 2, n_head*n_tokens, n_splits, n_stream,
                src.data(), src.size(), kvq_node_attend_split, GGML_N_TASKS_MAX, userdata);
        graph.cb(split, "kvq_split", il);

        ggml_tensor * src_combine[2] = { split, sinks };

        out = ggml_custom_4d(ctx0, GGML_TYPE_F32, n_head, q->ne[2], n_embd_v + 1, 1, src_combine, sinks ? 2 : 1,
                kvq_node_combine, GGML_N_TASKS_MAX, userdata);
    }

    graph.cb(out, node.has_lse ? "kvq_attend" : "kvq_fattn", il);
    if (gpu) {
        ggml_backend_sched_set_tensor_backend(graph.sched, out, gpu->backend);
    }
    ggml_build_forward_expand(graph.gf, out);

    if (k_cur) {
        if (*node.progress == KVQ_LAYER_IDLE) {
            *node.progress = KVQ_LAYER_DONE;
        }

        // The scheduler places a node where its result is, never where a source is, of which it would make a copy elsewhere.
        ggml_tensor * src_store[6] = { v_mem, plan, k_cur, v_cur, src[0], out };

        ggml_tensor * store = ggml_custom_inplace(ctx0, k_mem, src_store, node.has_lse ? 6 : 5,
                gpu ? kvq_node_gpu_store : kvq_node_store, GGML_N_TASKS_MAX, userdata);
        graph.cb(store, "kvq_store", il);
        if (gpu) {
            ggml_backend_sched_set_tensor_backend(graph.sched, store, gpu->backend);
        }

        ggml_build_forward_expand(graph.gf, store);
    }

    if (!node.has_lse) {
        return ggml_reshape_2d(ctx0, out, n_embd_v*n_head, q->ne[2]);
    }
    return ggml_view_2d(ctx0, out, n_embd_v*n_head, q->ne[2], n_embd_v*n_head*sizeof(float), 0);
}
