// Making a cache: the recipe, what is refused, the bytes of each layer.

#include "kvq-glue.h"

#include "llama-impl.h"
#include "llama-hparams.h"
#include "llama-kv-cache-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-memory-hybrid-iswa.h"

#include <typeinfo>

// nullptr when off
static const char * kvq_env() {
    const char * spec = getenv("LLAMA_ARG_KVQ");

    return kvq_recipe_is_off(spec) ? nullptr : spec;
}

void llama_kvq_must(kvq_status status, const char * what) {
    if (status != 0) {
        GGML_ABORT("kvq: %s: %s", what, kvq_last_error());
    }
}

std::unique_ptr<llama_kvq> llama_kvq_new(llama_kv_cache & kv, ggml_type type_k, ggml_type type_v) {
    const char * spec = kvq_env();
    if (!spec) {
        return nullptr;
    }

    if (kvq_abi_version() != KVQ_ABI_VERSION) {
        throw std::runtime_error(format("kvq: the library has ABI %u, this program was built for %u: "
                    "rebuild it with the library's kvq.h",
                    kvq_abi_version(), (uint32_t) KVQ_ABI_VERSION));
    }
    if (type_k != GGML_TYPE_F16 || type_v != GGML_TYPE_F16) {
        throw std::runtime_error(format("kvq: --kvq replaces the cache types (K %s, V %s): leave -ctk and -ctv at f16",
                    ggml_type_name(type_k), ggml_type_name(type_v)));
    }

    return std::make_unique<llama_kvq_cache>(kv, kvq_choice_of(spec).spec.c_str(), kvq_is_trial(spec));
}

void llama_kvq_check(std::unique_ptr<llama_memory_i> & memory, const std::function<llama_memory_i *()> & make) {
    const char * spec = kvq_env();
    if (!spec) {
        return;
    }
    if (!memory) {
        throw std::runtime_error("kvq: this model has no KV cache (encoder or diffusion model): run it with --kvq off");
    }

    // exact types: what derives from or wraps these reads the cache in a way of its own
    const auto & type = typeid(*memory);
    if (type != typeid(llama_kv_cache)      && type != typeid(llama_kv_cache_iswa) &&
        type != typeid(llama_memory_hybrid) && type != typeid(llama_memory_hybrid_iswa)) {
        throw std::runtime_error("kvq: this model has no plain attention KV cache (recurrent or sparse attention): "
                "run it with --kvq off");
    }
    if (kvq_is_trial(spec)) {
        const auto choice = kvq_make_again(memory, spec, make);
        llama_kvq_log(memory.get(), choice.spec.c_str(), format("%s = ", spec), "; " + choice.note);
    } else {
        llama_kvq_log(memory.get(), spec, "", "");
    }
}

const char * llama_kvq_help() {
    return kvq_recipe_help();
}

llama_kvq_cache::llama_kvq_cache(llama_kv_cache & kv, const char * spec, bool is_trial) : kv(kv), is_trial(is_trial) {
    if (kv.other) {
        throw std::runtime_error("kvq: this context shares the KV cache of another one: run it with --kvq off");
    }
    if (kv.hparams.is_mla()) {
        throw std::runtime_error("kvq: this model caches no V (MLA): run it with --kvq off");
    }

    if (kvq_recipe_parse(spec, kvq::out(recipe)) != 0) {
        throw std::runtime_error(format("kvq: --kvq %s: %s (--kvq help says more)", spec, kvq_last_error()));
    }
    asked = this->spec();
    read_profile(spec);

    if (kvq_recipe_fit(recipe.get(), kv.get_size(), kv.n_stream, kv.n_seq_max, kvq::out(recipe)) != 0) {
        throw std::runtime_error(format("kvq: --kvq %s: %s", spec, kvq_last_error()));
    }
    n_guard = kvq_recipe_page(recipe.get());

    if (kvq_planner_new(recipe.get(), kv.get_size(), kv.n_stream, kv.n_seq_max, kvq::out(planner)) != 0) {
        throw std::runtime_error(format("kvq: --kvq %s: %s", spec, kvq_last_error()));
    }
}

void llama_kvq_cache::read_profile(const char * spec) {
    std::vector<char> path(strlen(spec) + 64);
    if (kvq_recipe_profile(recipe.get(), path.data(), path.size()) != 0) {
        throw std::runtime_error(format("kvq: --kvq %s: %s", spec, kvq_last_error()));
    }
    if (!path[0]) {
        return;
    }
    for (uint32_t il = 0; il < kv.hparams.n_layer(); ++il) {
        if (kv.hparams.has_kv(il) && !kv.hparams.is_recr(il)) {
            profiled[il] = { layer_shape(il), {} };
        }
    }
    auto identity = kvq_profile_identity(kv.model);
    const auto profile = kvq_profile_read(path.data(), identity, profiled);
    if (kvq_recipe_with_profile(recipe.get(), profile.get(), kvq::out(recipe)) != 0) {
        throw std::runtime_error(format("kvq: --kvq %s: %s", spec, kvq_last_error()));
    }
}

kvq_shape llama_kvq_cache::layer_shape(uint32_t il) const {
    return {
        /*.n_heads    =*/ kv.hparams.n_head(il),
        /*.n_kv_heads =*/ kv.hparams.n_head_kv(il),
        /*.head_dim_k =*/ kv.hparams.n_embd_head_k(il),
        /*.head_dim_v =*/ kv.hparams.n_embd_head_v(il),
    };
}

ggml_tensor * llama_kvq_cache::new_k(ggml_context * ctx, ggml_backend_buffer_type_t buft, uint32_t il) {
    kvq_gpu * gpu = gpu_of(buft, il);

    const kvq_shape shape = layer_shape(il);

    kvq::layout layout;
    if (kvq_layout_new(recipe.get(), &shape, il, kv.get_size(), kvq_planner_n_slots(planner.get()),
                kvq::out(layout)) != 0) {
        throw std::runtime_error(format("kvq: layer %u (%u heads, %u KV heads, head sizes K %u, V %u): %s",
                    il, shape.n_heads, shape.n_kv_heads, shape.head_dim_k, shape.head_dim_v, kvq_last_error()));
    }
    layouts.push_back(std::move(layout));
    gpus.push_back(gpu);
    progress.push_back(KVQ_LAYER_IDLE);
    rotations.emplace_back();

    profiles.push_back(gpu ? new_space(*gpu, kvq_layout_profile_bytes(layouts.back().get())) : nullptr);

    if (gpu) {
        needed_space(*gpu, layouts.back().get(), 1, 1, kv.get_size()); // refuses what it has no kernels for
    }

    return ggml_new_tensor_3d(ctx, GGML_TYPE_I8, is_trial ? 64 : kvq_layout_k_bytes(layouts.back().get()), 1, kv.n_stream);
}

ggml_tensor * llama_kvq_cache::new_v(ggml_context * ctx, uint32_t il) {
    GGML_UNUSED(il); // new_k comes first

    return ggml_new_tensor_3d(ctx, GGML_TYPE_I8, is_trial ? 64 : kvq_layout_v_bytes(layouts.back().get()), 1, kv.n_stream);
}

std::string llama_kvq_cache::spec() const {
    std::vector<char> buf(4096);
    if (kvq_recipe_spec(recipe.get(), buf.data(), buf.size()) != 0) {
        throw std::runtime_error(format("kvq: %s", kvq_last_error()));
    }
    return buf.data();
}

void llama_kvq_cache::allocated(ggml_backend_buffer_t buf) const {
    // empty while llama.cpp only estimates memory
    if (const size_t size = ggml_backend_buffer_is_host(buf) ? ggml_backend_buffer_get_size(buf) : 0) {
        llama_kvq_must(kvq_use_large_pages(ggml_backend_buffer_get_base(buf), size), "large pages");
    }
}

void llama_kvq_cache::clear() {
    last_plan.clear();
    has_moved    = false;
    has_profiles = false; // llama.cpp may zero all memory next
    for (uint32_t s = 0; s < kv.n_stream; ++s) {
        kvq_planner_reset(planner.get(), s);
    }
}

void llama_kvq_cache::copy_stream(uint32_t src, uint32_t dst) {
    if (settle()) {
        // the bytes were copied before
        for (const auto & layer : kv.layers) {
            ggml_backend_tensor_copy(layer.k_stream[src], layer.k_stream[dst]);
            ggml_backend_tensor_copy(layer.v_stream[src], layer.v_stream[dst]);
        }
    }
    llama_kvq_must(kvq_planner_copy_stream(planner.get(), src, dst), "stream copy");
}
