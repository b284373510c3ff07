// A CUDA backend that is none, to test layers in GPU memory without a GPU: put in front of a program of patched llama.cpp by
// LD_PRELOAD. Its memory is the host's, but can be touched only while it computes or copies; it computes with the CPU backend;
// what custom nodes enqueue is kept, as by CUDA graphs, and done again without asking their launchers. The library's device
// functions are replaced by ones that check where every pointer leads and do the same on the CPU.
//
//   KVQ_FAKE_GPUS=N       number of devices (default: 1)
//   KVQ_FAKE_UNPATCHED=1  without the seam for custom nodes
//   KVQ_FAKE_NAME=NAME    name of the backend (default: CUDA)
//   KVQ_FAKE_DEVICE=own   the library's own kvq_device_new
//   KVQ_FAKE_LOG=1        says at exit how many graphs were computed and how many of them again

#include "ggml-backend-impl.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml-cuda.h"
#include "ggml-impl.h"

#include <kvq.h>

#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#define MUST(x) \
    do { \
        if (!(x)) { \
            fprintf(stderr, "fake_cuda: line %d: not so: %s\n", __LINE__, #x); \
            abort(); \
        } \
    } while (0)

using work = std::function<void()>;

struct fake_stream {
    std::vector<work> enqueued;
};

struct fake_device {
    int index;
    std::string name;

    ggml_backend_device      dev;
    ggml_backend_buffer_type buft;
};

// memory

struct fake_memory {
    fake_device * device;
    char        * base;
    size_t        size;
};

static std::recursive_mutex     mutex; // of all that follows
static std::vector<fake_memory> memories;
static int                      n_open = 0;

static void protect_all(int how) {
    for (const auto & m : memories) {
        MUST(mprotect(m.base, m.size, how) == 0);
    }
}

// while one of these lives, the memory may be touched
struct access {
    access() {
        mutex.lock();
        if (n_open++ == 0) {
            protect_all(PROT_READ | PROT_WRITE);
        }
    }
    ~access() {
        if (--n_open == 0) {
            protect_all(PROT_NONE);
        }
        mutex.unlock();
    }
};

static void must_be_on(const fake_device * device, const void * pointer, size_t size) {
    for (const auto & m : memories) {
        if (m.device == device && pointer >= m.base && (const char *) pointer + size <= m.base + m.size) {
            return;
        }
    }
    fprintf(stderr, "fake_cuda: %p is not in the memory of %s\n", pointer, device->name.c_str());
    abort();
}

static void buffer_free(ggml_backend_buffer_t buffer) {
    const std::lock_guard<std::recursive_mutex> lock(mutex);
    for (size_t i = 0; i < memories.size(); ++i) {
        if (memories[i].base == buffer->context) {
            munmap(memories[i].base, memories[i].size);
            memories.erase(memories.begin() + i);
            return;
        }
    }
}
static void * buffer_base(ggml_backend_buffer_t buffer) {
    return buffer->context;
}
static void buffer_memset(ggml_backend_buffer_t, ggml_tensor * t, uint8_t value, size_t offset, size_t size) {
    access a;
    memset((char *) t->data + offset, value, size);
}
static void buffer_set(ggml_backend_buffer_t, ggml_tensor * t, const void * data, size_t offset, size_t size) {
    access a;
    memcpy((char *) t->data + offset, data, size);
}
static void buffer_get(ggml_backend_buffer_t, const ggml_tensor * t, void * data, size_t offset, size_t size) {
    access a;
    memcpy(data, (const char *) t->data + offset, size);
}
static void buffer_clear(ggml_backend_buffer_t buffer, uint8_t value) {
    access a;
    memset(buffer->context, value, buffer->size);
}

static const char * buft_name(ggml_backend_buffer_type_t buft) {
    return ((fake_device *) buft->context)->name.c_str();
}
static ggml_backend_buffer_t buft_alloc(ggml_backend_buffer_type_t buft, size_t size) {
    const size_t page    = 4096;
    const size_t n_bytes = (size + page - 1)/page*page + page;

    const std::lock_guard<std::recursive_mutex> lock(mutex);
    const int access_now = n_open ? PROT_READ | PROT_WRITE : PROT_NONE;
    char * base = (char *) mmap(nullptr, n_bytes, access_now, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    MUST(base != MAP_FAILED);
    memories.push_back({ (fake_device *) buft->context, base, n_bytes });
    {
        access a;
        memset(base, 0xa5, n_bytes); // as little zeroed as a GPU's
    }

    ggml_backend_buffer_i iface = {};
    iface.free_buffer   = buffer_free;
    iface.get_base      = buffer_base;
    iface.memset_tensor = buffer_memset;
    iface.set_tensor    = buffer_set;
    iface.get_tensor    = buffer_get;
    iface.clear         = buffer_clear;
    return ggml_backend_buffer_init(buft, iface, base, size);
}
static size_t buft_alignment(ggml_backend_buffer_type_t) {
    return 128;
}

// custom nodes: the seam, as in ggml-cuda

static std::map<ggml_custom_op_t, ggml_backend_cuda_custom_op_t> launchers;

static void register_custom_op(ggml_custom_op_t fun, ggml_backend_cuda_custom_op_t launch) {
    const std::lock_guard<std::recursive_mutex> lock(mutex);
    launchers[fun] = launch;
}

static ggml_custom_op_params params_of(const ggml_tensor * op) {
    ggml_custom_op_params params;
    memcpy(&params, op->op_params, sizeof(params));
    return params;
}

static ggml_backend_cuda_custom_op_t launcher_of(const ggml_tensor * op) {
    const std::lock_guard<std::recursive_mutex> lock(mutex);
    const auto it = launchers.find(params_of(op).fun);
    return it == launchers.end() ? nullptr : it->second;
}

// backend

struct node_props { // as in ggml-cuda
    ggml_tensor node;
    void      * data[GGML_MAX_SRC];
    int64_t     ne[GGML_MAX_SRC][GGML_MAX_DIMS];
    size_t      nb[GGML_MAX_SRC][GGML_MAX_DIMS];
};

struct fake_graph {
    std::vector<node_props>             props;
    std::map<int, std::vector<work>>    captured; // by node
    bool                                is_captured = false;
};

struct fake_backend {
    fake_device  * device;
    ggml_backend_t cpu;
    fake_stream    stream;

    std::map<const ggml_tensor *, fake_graph> graphs; // by first node
};

static int n_graphs = 0;
static int n_again  = 0;

static bool same_props(fake_graph & graph, const ggml_cgraph * cgraph) {
    std::vector<node_props> now(cgraph->n_nodes);
    for (int i = 0; i < cgraph->n_nodes; ++i) {
        memset((void *) &now[i], 0, sizeof(now[i]));
        memcpy((void *) &now[i].node, cgraph->nodes[i], sizeof(ggml_tensor));
        for (int j = 0; j < GGML_MAX_SRC; ++j) {
            if (const ggml_tensor * src = cgraph->nodes[i]->src[j]) {
                now[i].data[j] = src->data;
                memcpy(now[i].ne[j], src->ne, sizeof(src->ne));
                memcpy(now[i].nb[j], src->nb, sizeof(src->nb));
            }
        }
    }
    const bool same = now.size() == graph.props.size() &&
        memcmp((const void *) now.data(), (const void *) graph.props.data(), now.size()*sizeof(node_props)) == 0;
    graph.props = std::move(now);
    return same;
}

static void check_places(const fake_device * device, const ggml_tensor * node) {
    must_be_on(device, node->data, ggml_nbytes(node));
    for (const ggml_tensor * src : node->src) {
        if (src) {
            must_be_on(device, src->data, ggml_nbytes(src));
        }
    }
}

static ggml_status backend_compute(ggml_backend_t backend, ggml_cgraph * cgraph) {
    auto * ctx = (fake_backend *) backend->context;
    access a;

    auto & graph = ctx->graphs[cgraph->nodes[0]];
    const bool same  = same_props(graph, cgraph);
    const bool again = same && graph.is_captured;

    if (!again) {
        graph.captured.clear();
    }
    n_graphs++;
    n_again += again;

    for (int i = 0, next; i < cgraph->n_nodes; i = next) {
        ggml_tensor * node = cgraph->nodes[i];
        next = i + 1;

        if (node->op != GGML_OP_CUSTOM) {
            while (next < cgraph->n_nodes && cgraph->nodes[next]->op != GGML_OP_CUSTOM) {
                next++;
            }
            ggml_cgraph part = ggml_graph_view(cgraph, i, next);
            const auto status = ggml_backend_graph_compute(ctx->cpu, &part);
            if (status != GGML_STATUS_SUCCESS) {
                return status;
            }
            continue;
        }

        check_places(ctx->device, node);
        if (!again) {
            ctx->stream.enqueued.clear();
            launcher_of(node)(node, &ctx->stream, params_of(node).userdata);
            graph.captured[i] = ctx->stream.enqueued;
        }
        for (const auto & w : graph.captured.at(i)) {
            w();
        }
    }
    for (int i = 0; again && i < cgraph->n_nodes; ++i) {
        if (cgraph->nodes[i]->op == GGML_OP_CUSTOM) {
            launcher_of(cgraph->nodes[i])(cgraph->nodes[i], nullptr, params_of(cgraph->nodes[i]).userdata);
        }
    }
    graph.is_captured = same;
    return GGML_STATUS_SUCCESS;
}

static const char * backend_name(ggml_backend_t backend) {
    return ((fake_backend *) backend->context)->device->name.c_str();
}
static void backend_free(ggml_backend_t backend) {
    ggml_backend_free(((fake_backend *) backend->context)->cpu);
    delete (fake_backend *) backend->context;
    delete backend;
}
static void backend_synchronize(ggml_backend_t) {
}

// device

static fake_device * device_of(ggml_backend_dev_t dev) {
    return (fake_device *) dev->context;
}
static const char * dev_name(ggml_backend_dev_t dev) {
    return device_of(dev)->name.c_str();
}
static void dev_memory(ggml_backend_dev_t, size_t * free, size_t * total) {
    *free = *total = size_t(16) << 30;
}
static enum ggml_backend_dev_type dev_type(ggml_backend_dev_t) {
    return GGML_BACKEND_DEVICE_TYPE_GPU;
}
static void dev_props(ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
    memset((void *) props, 0, sizeof(*props));
    props->name        = dev_name(dev);
    props->description = dev_name(dev);
    props->type        = GGML_BACKEND_DEVICE_TYPE_GPU;
    dev_memory(dev, &props->memory_free, &props->memory_total);
}
static ggml_backend_t dev_init(ggml_backend_dev_t dev, const char *) {
    static ggml_guid guid = { 'k', 'v', 'q', ' ', 'f', 'a', 'k', 'e', ' ', 'c', 'u', 'd', 'a', 0, 0, 1 };

    ggml_backend_t cpu = ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr);
    ggml_backend_cpu_set_n_threads(cpu, 1);

    ggml_backend_i iface = {};
    iface.get_name      = backend_name;
    iface.free          = backend_free;
    iface.synchronize   = backend_synchronize;
    iface.graph_compute = backend_compute;
    return new ggml_backend { &guid, iface, dev, new fake_backend { device_of(dev), cpu, {}, {} } };
}
static ggml_backend_buffer_type_t dev_buft(ggml_backend_dev_t dev) {
    return &device_of(dev)->buft;
}
static bool dev_supports_op(ggml_backend_dev_t dev, const ggml_tensor * op) {
    for (const ggml_tensor * src : op->src) { // as in ggml-cuda
        if (src && src->buffer && src->buffer->buft->iface.get_name == buft_name && src->buffer->buft != dev_buft(dev)) {
            return false;
        }
    }
    // The plan alone does not tell the host's functions where rows are that they could decode.
    if (op->op == GGML_OP_FLASH_ATTN_EXT) {
        return false;
    }
    return op->op == GGML_OP_CUSTOM ? launcher_of(op) != nullptr
        : ggml_backend_dev_supports_op(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU), op);
}
static bool dev_supports_buft(ggml_backend_dev_t dev, ggml_backend_buffer_type_t buft) {
    return buft == dev_buft(dev);
}

// registry

static std::vector<fake_device *> devices;

static const char * reg_name(ggml_backend_reg_t) {
    return getenv("KVQ_FAKE_NAME") ? getenv("KVQ_FAKE_NAME") : "CUDA";
}
static size_t reg_count(ggml_backend_reg_t) {
    return devices.size();
}
static ggml_backend_dev_t reg_device(ggml_backend_reg_t, size_t i) {
    return &devices[i]->dev;
}
static ggml_backend_buffer_type_t split_buft(int device, const float *) {
    return &devices[device]->buft; // splits nothing
}
static void * reg_proc(ggml_backend_reg_t, const char * name) {
    if (strcmp(name, "ggml_backend_split_buffer_type") == 0) {
        return (void *) split_buft;
    }
    const bool is_seam = strcmp(name, "ggml_backend_cuda_register_custom_op") == 0;
    return is_seam && !getenv("KVQ_FAKE_UNPATCHED") ? (void *) register_custom_op : nullptr;
}

static struct fake {
    ggml_backend_reg reg = { GGML_BACKEND_API_VERSION, { reg_name, reg_count, reg_device, reg_proc }, nullptr };

    fake() {
        ggml_backend_device_i dev = {};
        dev.get_name        = dev_name;
        dev.get_description = dev_name;
        dev.get_memory      = dev_memory;
        dev.get_type        = dev_type;
        dev.get_props       = dev_props;
        dev.init_backend    = dev_init;
        dev.get_buffer_type = dev_buft;
        dev.supports_op     = dev_supports_op;
        dev.supports_buft   = dev_supports_buft;

        ggml_backend_buffer_type_i buft = {};
        buft.get_name      = buft_name;
        buft.alloc_buffer  = buft_alloc;
        buft.get_alignment = buft_alignment;

        const int n = getenv("KVQ_FAKE_GPUS") ? atoi(getenv("KVQ_FAKE_GPUS")) : 1;
        for (int i = 0; i < n; ++i) {
            auto * device = new fake_device { i, reg_name(nullptr) + std::to_string(i), {}, {} };
            device->dev  = { dev, &reg, device };
            device->buft = { buft, &device->dev, device };
            devices.push_back(device);
        }
        ggml_backend_register(&reg);
    }
    ~fake() {
        if (getenv("KVQ_FAKE_LOG")) {
            fprintf(stderr, "fake_cuda: %d graphs, %d of them again\n", n_graphs, n_again);
        }
    }
} fake;

// the library's functions

struct kvq_device {
    fake_device * device;
};

static const size_t SPACE = 1024; // for a row

static void check_space(const fake_device * device, const void * space, size_t size, size_t n_rows) {
    MUST(size >= SPACE*n_rows && (uintptr_t) space % 256 == 0);
    must_be_on(device, space, size);
    for (size_t i = 0; i < size; ++i) {
        MUST(((const char *) space)[i] == 0); // zeroed, and nobody else's
    }
}

extern "C" kvq_status kvq_device_new(const char * name, kvq_device ** out) {
    if (getenv("KVQ_FAKE_DEVICE")) {
        return ((decltype(kvq_device_new) *) dlsym(RTLD_NEXT, "kvq_device_new"))(name, out);
    }
    for (auto * device : devices) {
        if ("cuda:" + std::to_string(device->index) == name) {
            *out = new kvq_device { device };
            return KVQ_STATUS_OK;
        }
    }
    return KVQ_STATUS_INVALID_ARGUMENT;
}

extern "C" void kvq_device_free(kvq_device * device) {
    delete device;
}

extern "C" kvq_status kvq_attend_workspace(const kvq_layout *, const kvq_device *, uint32_t n_tokens, uint32_t n_streams,
        uint32_t, size_t * bytes) {
    *bytes = SPACE*n_tokens*n_streams;
    return KVQ_STATUS_OK;
}

extern "C" kvq_status kvq_store_workspace(const kvq_layout *, const kvq_device *, uint32_t n_tokens, uint32_t n_streams,
        size_t * bytes) {
    *bytes = SPACE*n_tokens*n_streams;
    return KVQ_STATUS_OK;
}

// what the library gives lies there, or nothing where it gives nothing
static void check_profile(const fake_device * device, const kvq_layout * layout, const void * profile) {
    std::vector<char> bytes(kvq_layout_profile_bytes(layout));
    MUST(bytes.empty() == !profile);
    if (profile) {
        must_be_on(device, profile, bytes.size());
        MUST((uintptr_t) profile % 64 == 0);
        MUST(kvq_layout_profile(layout, bytes.data(), bytes.size()) == KVQ_STATUS_OK);
        MUST(memcmp(profile, bytes.data(), bytes.size()) == 0);
    }
}

extern "C" kvq_status kvq_attend_enqueue(const kvq_device * device, const kvq_layout * layout, const kvq_attend_args * given,
        const kvq_streams * streams, void * space, size_t size, void * stream) {
    ((fake_stream *) stream)->enqueued.push_back([=, first = *given, of = *streams, on = device->device] {
        auto args = first; // graphs run it again
        MUST(args.n_splits == 1);
        check_profile(on, layout, args.profile);
        check_space(on, space, size, of.n_streams*args.n_tokens);
        for (uint32_t i = 0; i < of.n_streams; ++i) {
            must_be_on(on, args.q,     sizeof(float));
            must_be_on(on, args.k_mem, kvq_layout_k_bytes(layout));
            must_be_on(on, args.v_mem, kvq_layout_v_bytes(layout));
            must_be_on(on, args.plan,  args.plan_len*sizeof(int32_t));
            must_be_on(on, args.mask,  args.n_kv*(args.mask_is_f16 ? 2 : 4));
            must_be_on(on, args.out,   sizeof(float));
            must_be_on(on, args.lse,   sizeof(float));
            MUST(kvq_attend(layout, &args, 0, 1) == KVQ_STATUS_OK);

            const kvq_shape shape = kvq_layout_shape(layout);
            args.q += args.n_tokens*args.q_stride_token;
            if (args.k_cur) {
                args.k_cur += args.n_tokens*args.k_stride_token;
                args.v_cur += args.n_tokens*args.v_stride_token;
            }
            args.k_mem += of.k_stride;
            args.v_mem += of.v_stride;
            args.plan  += of.plan_stride;
            args.mask   = (const char *) args.mask + of.mask_stride*(args.mask_is_f16 ? 2 : 4);
            args.out   += args.n_tokens*shape.n_heads*shape.head_dim_v;
            args.lse   += args.n_tokens*shape.n_heads;
        }
    });
    return KVQ_STATUS_OK;
}

extern "C" kvq_status kvq_dequantize_enqueue(const kvq_device *, const kvq_layout *, const kvq_attend_args *,
        const kvq_streams *, void *, void *, void *) {
    MUST(!"decoded for an attention that this backend does not have");
    return KVQ_STATUS_UNSUPPORTED;
}

extern "C" kvq_status kvq_store_enqueue(const kvq_device * device, const kvq_layout * layout, const kvq_store_args * given,
        const kvq_streams * streams, void * space, size_t size, void * stream) {
    ((fake_stream *) stream)->enqueued.push_back([=, first = *given, of = *streams, on = device->device] {
        auto args = first; // graphs run it again
        check_space(on, space, size, of.n_streams*args.n_tokens);
        check_profile(on, layout, args.profile);
        for (uint32_t i = 0; i < of.n_streams; ++i) {
            must_be_on(on, args.k_cur, sizeof(float));
            must_be_on(on, args.v_cur, sizeof(float));
            must_be_on(on, args.k_mem, kvq_layout_k_bytes(layout));
            must_be_on(on, args.v_mem, kvq_layout_v_bytes(layout));
            must_be_on(on, args.plan,  args.plan_len*sizeof(int32_t));
            must_be_on(on, args.q,     sizeof(float));
            must_be_on(on, args.lse,   sizeof(float));
            if (args.positions) {
                must_be_on(on, args.positions, sizeof(int32_t));
            }
            MUST(kvq_store(layout, &args, 0, 1) == KVQ_STATUS_OK);

            args.k_cur += args.n_tokens*args.k_stride_token;
            args.v_cur += args.n_tokens*args.v_stride_token;
            args.q     += args.n_tokens*args.q_stride_token;
            args.lse   += args.n_tokens*kvq_layout_shape(layout).n_heads;
            args.k_mem += of.k_stride;
            args.v_mem += of.v_stride;
            args.plan  += of.plan_stride;
            args.positions += args.positions ? of.positions_stride : 0;
        }
    });
    return KVQ_STATUS_OK;
}
