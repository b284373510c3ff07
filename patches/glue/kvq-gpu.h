#pragma once

// Layers whose K and V are in the memory of a GPU: attention and storing run there, everything rare on a copy in the host's
// memory. The bytes are the same on both.

#include "ggml-backend.h"
#include "ggml-cuda.h"

#include <kvq.h>

#include <cstdint>
#include <memory>
#include <vector>

// A GPU that holds layers of a cache.
struct kvq_gpu {
    // throws where kvq cannot run; il: the layer that would be there
    kvq_gpu(ggml_backend_buffer_type_t buft, uint32_t il);
    ~kvq_gpu();

    kvq_gpu(const kvq_gpu &) = delete;

    ggml_backend_buffer_type_t buft;
    kvq_device               * device = nullptr;

    // of the context, since its first graph was built
    ggml_backend_t backend = nullptr;
    void find_backend(ggml_backend_sched_t sched);

    // what kvq_attend_enqueue and kvq_store_enqueue work in
    ggml_tensor * attend_space = nullptr;
    ggml_tensor * store_space  = nullptr;
};

// Tells the CUDA backend how nodes of layers in its memory run.
typedef void (*kvq_register_t)(ggml_custom_op_t fun, ggml_backend_cuda_custom_op_t launch);
void kvq_gpu_register(kvq_register_t register_op);

// The memory of one stream of one layer where the host reaches it: itself, or a copy of a GPU's. What the GPU was given to do
// must have finished.
struct kvq_host_memory {
    explicit kvq_host_memory(ggml_tensor * t);

    // of a GPU's memory these ranges only, the other bytes are undefined
    kvq_host_memory(ggml_tensor * t, std::vector<kvq_range> ranges);

    uint8_t * data;

    // after changes: to the GPU's memory
    void write_back() const;

private:
    ggml_tensor          * tensor;
    std::vector<kvq_range> ranges; // of the copy

    std::unique_ptr<uint8_t[]> copy;
};
