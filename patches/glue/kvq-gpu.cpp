// GPUs: opening one, what is refused, the memory that its kernels work in, copies for the host.

#include "kvq-glue.h"

#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>

static const char * KVQ_ELSEWHERE = "use --no-kv-offload or -ngl 0";

kvq_gpu::kvq_gpu(ggml_backend_buffer_type_t buft, uint32_t il) : buft(buft) {
    const auto where = format("kvq: the KV cache of layer %u would be in %s memory", il, ggml_backend_buft_name(buft));

    ggml_backend_dev_t dev = ggml_backend_buft_get_device(buft);
    ggml_backend_reg_t reg = dev ? ggml_backend_dev_backend_reg(dev) : nullptr;

    if (!reg || strcmp(ggml_backend_reg_name(reg), "CUDA") != 0 || buft != ggml_backend_dev_buffer_type(dev)) {
        throw std::runtime_error(format("%s, where kvq cannot attend: %s", where.c_str(), KVQ_ELSEWHERE));
    }

    auto * register_op = (kvq_register_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_cuda_register_custom_op");
    if (!register_op) {
        throw std::runtime_error(format("%s, whose backend was built without kvq's patches: rebuild it, or %s",
                    where.c_str(), KVQ_ELSEWHERE));
    }

    // CUDA1 is cuda:1, the runtime and the driver count alike
    const auto name = std::string("cuda:") + (ggml_backend_dev_name(dev) + strlen("CUDA"));
    if (kvq_device_new(name.c_str(), &device) != 0) {
        throw std::runtime_error(format("%s: %s; or %s", where.c_str(), kvq_last_error(), KVQ_ELSEWHERE));
    }

    kvq_gpu_register(register_op);
}

kvq_gpu::~kvq_gpu() {
    // the context has waited for everything and freed its backends
    kvq_device_free(device);
}

void kvq_gpu::find_backend(ggml_backend_sched_t sched) {
    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched); ++i) {
        ggml_backend_t cur = ggml_backend_sched_get_backend(sched, i);
        if (ggml_backend_get_device(cur) == ggml_backend_buft_get_device(buft)) {
            backend = cur;
            return;
        }
    }
    GGML_ABORT("kvq: this context has no backend for %s", ggml_backend_buft_name(buft));
}

kvq_gpu * llama_kvq_cache::gpu_of(ggml_backend_buffer_type_t buft, uint32_t il) {
    if (ggml_backend_buft_is_host(buft)) {
        return nullptr;
    }
    if (kv.model.split_mode() == LLAMA_SPLIT_MODE_ROW || kv.model.split_mode() == LLAMA_SPLIT_MODE_TENSOR) {
        throw std::runtime_error("kvq: layers cannot be split over GPUs (-sm row, -sm tensor): use -sm layer");
    }
    for (auto & cur : all_gpus) {
        if (cur->buft == buft) {
            return cur.get();
        }
    }
    all_gpus.push_back(std::make_unique<kvq_gpu>(buft, il));

    return all_gpus.back().get();
}

llama_kvq_cache::space llama_kvq_cache::needed_space(const kvq_gpu & gpu, const kvq_layout * layout,
        uint32_t n_tokens, uint32_t n_stream, uint32_t n_kv) const {
    space size = {};
    if (kvq_attend_workspace(layout, gpu.device, n_tokens, n_stream, n_kv, &size.attend) != 0 ||
        kvq_store_workspace (layout, gpu.device, n_tokens, n_stream, &size.store) != 0) {
        throw std::runtime_error(format("kvq: --kvq %s: %s; or %s", spec().c_str(), kvq_last_error(), KVQ_ELSEWHERE));
    }
    return size;
}

void llama_kvq_cache::reserve_space(kvq_gpu & gpu, const kvq_layout * layout, uint32_t n_tokens, uint32_t n_stream,
        uint32_t n_kv) {
    const auto size = needed_space(gpu, layout, n_tokens, n_stream, n_kv);

    grow_space(gpu, gpu.attend_space, size.attend);
    grow_space(gpu, gpu.store_space,  size.store);
}

// A smaller one stays where it is: CUDA graphs that were captured hold its address.
void llama_kvq_cache::grow_space(const kvq_gpu & gpu, ggml_tensor *& space, size_t size) {
    if (!space || ggml_nbytes(space) < size) {
        space = new_space(gpu, std::max<size_t>(size, 256));
    }
}

// zeroed; null of size 0
ggml_tensor * llama_kvq_cache::new_space(const kvq_gpu & gpu, size_t size) {
    if (size == 0) {
        return nullptr;
    }
    ggml_context_ptr ctx(ggml_init({ ggml_tensor_overhead(), nullptr, true }));
    ggml_tensor * space = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I8, size);

    // as llama_kv_cache allocates its tensors
    ggml_backend_buffer_t buf;
    if (kv.hparams.no_alloc) {
        buf = space->buffer = ggml_backend_buft_alloc_buffer(gpu.buft, 0);
    } else {
        buf = ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), gpu.buft);
    }
    if (!buf) {
        throw std::runtime_error(format("kvq: no room for %zu bytes beside the cache in %s memory: use a smaller -c or -ub",
                    size, ggml_backend_buft_name(gpu.buft)));
    }
    ggml_backend_buffer_clear(buf, 0);
    kv.ctxs_bufs.emplace_back(std::move(ctx), buf);

    return space;
}

void llama_kvq_cache::upload_profiles() {
    for (size_t i = 0; !has_profiles && i < layouts.size(); ++i) {
        if (profiles[i]) {
            std::vector<uint8_t> bytes(ggml_nbytes(profiles[i]));
            llama_kvq_must(kvq_layout_profile(layouts[i].get(), bytes.data(), bytes.size()), "profile");
            ggml_backend_tensor_set(profiles[i], bytes.data(), 0, bytes.size());
        }
    }
    has_profiles = true;
}

void llama_kvq_cache::synchronize() const {
    for (const auto & gpu : all_gpus) {
        if (gpu->backend) {
            ggml_backend_synchronize(gpu->backend);
        }
    }
}

kvq_host_memory::kvq_host_memory(ggml_tensor * t) : kvq_host_memory(t, { { 0, ggml_nbytes(t) } }) {
}

kvq_host_memory::kvq_host_memory(ggml_tensor * t, std::vector<kvq_range> wanted) : tensor(t) {
    if (ggml_backend_buffer_is_host(t->buffer)) {
        data = (uint8_t *) t->data;
        return;
    }
    const size_t align = 64;

    ranges = std::move(wanted);
    copy.reset(new uint8_t[ggml_nbytes(t) + align]);
    data = copy.get() + align - (uintptr_t) copy.get()%align;
    for (const auto & r : ranges) {
        ggml_backend_tensor_get(t, data + r.offset, r.offset, r.size);
    }
}

void kvq_host_memory::write_back() const {
    for (const auto & r : ranges) {
        ggml_backend_tensor_set(tensor, data + r.offset, r.offset, r.size);
    }
}
