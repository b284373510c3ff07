// What attention on the device costs: one layer of a Llama-3-8B shape (8 KV and 32 query heads of 128), one query token,
// everything included, after the answer has been compared with the CPU's. Beside it the time to read the same bytes, and the
// copy bandwidth of the device.
//
//   nvcc -O2 -std=c++17 -I include src/cuda/bench/bench.cu -L DIR -lkvq -lcuda -o bench && ./bench [--csv FILE] [--recipe SPEC]... [CELLS]...
//
// `cold`: 256 MB are written before each run, so that nothing is left in the L2 cache; from event to event, median.
// `graph`: per layer of a CUDA graph that goes through more layers than the cache holds; `+ store`: with the step that stores the
// token, which seals no page.
#include <cuda_runtime.h>
#include <kvq.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#define CUDA(call)                                                                               \
    do {                                                                                         \
        cudaError_t error_ = (call);                                                             \
        if (error_ != cudaSuccess) {                                                             \
            fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(error_));                      \
            exit(1);                                                                             \
        }                                                                                        \
    } while (0)
#define KVQ(call)                                                    \
    do {                                                             \
        if ((call) != KVQ_STATUS_OK) {                               \
            fprintf(stderr, "%s: %s\n", #call, kvq_last_error());    \
            exit(1);                                                 \
        }                                                            \
    } while (0)

static kvq_shape SHAPE = {32, 8, 128, 128};

template <class F> static void in_parts(F f) {
    const uint32_t n = std::max(1u, std::thread::hardware_concurrency());
    std::vector<std::thread> threads;
    for (uint32_t i = 0; i < n; i++) threads.emplace_back([=] { KVQ(f(i, n)); });
    for (auto &thread : threads) thread.join();
}

static uint64_t seed = 0x9e3779b97f4a7c15;
static float normal() {
    float sum = 0;
    for (int i = 0; i < 4; i++) {
        seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
        sum += float(seed >> 40) / (1 << 24) - 0.5f;
    }
    return sum * 1.732f;
}

static uint32_t n_live;
static bool is_live(void *, uint32_t, uint32_t cell) { return cell < n_live; }

// A layer on the host that `n` tokens have gone through, and the plan of one more.
struct Layer {
    kvq_recipe *recipe = nullptr;
    kvq_planner *planner = nullptr;
    kvq_layout *layout = nullptr;
    uint32_t n_cells, n_used, n_slots;
    std::vector<uint8_t> k, v;
    std::vector<int32_t> plan;
    std::vector<float> q, k_cur, v_cur;
    std::vector<uint16_t> mask;

    uint8_t *aligned(std::vector<uint8_t> &bytes) { return bytes.data() + (64 - reinterpret_cast<uintptr_t>(bytes.data()) % 64) % 64; }

    // The token of the plan fills no page.
    Layer(const char *spec, uint32_t cells) : n_cells(cells), n_used(cells - 40) {
        KVQ(kvq_recipe_parse(spec, &recipe));
        KVQ(kvq_planner_new(recipe, cells, 1, 1, &planner));
        n_slots = kvq_planner_n_slots(planner);
        KVQ(kvq_layout_new(recipe, &SHAPE, 3, cells, n_slots, &layout));
        k.resize(kvq_layout_k_bytes(layout) + 64);
        v.resize(kvq_layout_v_bytes(layout) + 64);
        const uint32_t per = 512, dim = SHAPE.head_dim_k, row = SHAPE.n_kv_heads * dim;
        // Rows of a few ubatches, taken in turn; some channels are large, as keys have them.
        const uint32_t period = 7 * per;
        std::vector<float> keys(size_t(period) * row), values(keys.size());
        for (size_t i = 0; i < keys.size(); i++) keys[i] = normal() * (i % dim % 37 == 5 ? 3.f : 1.f), values[i] = normal();
        q.resize(SHAPE.n_heads * dim);
        for (auto &x : q) x = normal();
        std::vector<float> queries(size_t(per) * q.size()), lse(size_t(per) * SHAPE.n_heads, 8.f);
        for (size_t i = 0; i < queries.size(); i++) queries[i] = q[i % q.size()];
        for (uint32_t at = 0; at < n_used; at += per) {
            const uint32_t n = std::min(per, n_used - at), from = at % period;
            std::vector<kvq_row> rows(n);
            for (uint32_t i = 0; i < n; i++) rows[i] = kvq_row{at + i, int32_t(at + i), 0};
            plan.resize(kvq_planner_plan_len(planner, n));
            n_live = at;
            KVQ(kvq_planner_plan(planner, 0, rows.data(), n, is_live, nullptr, plan.data(), plan.size()));
            kvq_store_args a{};
            a.k_cur = &keys[size_t(from) * row], a.k_stride_token = row, a.k_stride_head = dim;
            a.v_cur = &values[size_t(from) * row], a.v_stride_token = row, a.v_stride_head = dim;
            a.k_mem = aligned(k), a.v_mem = aligned(v), a.plan = plan.data(), a.plan_len = plan.size(), a.n_tokens = n;
            a.q = queries.data(), a.q_stride_token = q.size(), a.q_stride_head = dim, a.lse = lse.data(), a.scale = scale();
            in_parts([&](uint32_t part, uint32_t parts) { return kvq_store(layout, &a, part, parts); });
        }
        const kvq_row last = {n_used, int32_t(n_used), 0};
        plan.resize(kvq_planner_plan_len(planner, 1));
        n_live = n_used;
        KVQ(kvq_planner_plan(planner, 0, &last, 1, is_live, nullptr, plan.data(), plan.size()));
        k_cur.assign(keys.begin(), keys.begin() + row);
        v_cur.assign(values.begin(), values.begin() + row);
        mask.assign(cells, 0);
        for (uint32_t i = 0; i < 100; i++) mask[cells / 2 + i] = 0xfc00;
    }
    ~Layer() { kvq_layout_free(layout), kvq_planner_free(planner), kvq_recipe_free(recipe); }
    static float scale() { return 1.f / std::sqrt(float(SHAPE.head_dim_k)); }

    kvq_attend_args args() {
        kvq_attend_args a{};
        const uint32_t dim = SHAPE.head_dim_k;
        a.q = q.data(), a.q_stride_token = q.size(), a.q_stride_head = dim;
        a.k_cur = k_cur.data(), a.k_stride_token = k_cur.size(), a.k_stride_head = dim;
        a.v_cur = v_cur.data(), a.v_stride_token = v_cur.size(), a.v_stride_head = dim;
        a.k_mem = aligned(k), a.v_mem = aligned(v), a.plan = plan.data(), a.plan_len = plan.size();
        a.mask = mask.data(), a.mask_stride_token = n_cells, a.mask_is_f16 = 1, a.n_kv = n_cells;
        a.scale = scale(), a.n_tokens = 1, a.n_splits = 1;
        return a;
    }
    std::vector<float> on_cpu() {
        kvq_attend_args a = args();
        std::vector<float> out(q.size()), partial;
        a.n_splits = std::max(2u, kvq_attend_splits(layout, 1, std::thread::hardware_concurrency()));
        partial.resize(size_t(a.n_splits) * SHAPE.n_heads * (SHAPE.head_dim_v + 2));
        a.out = partial.data();
        in_parts([&](uint32_t part, uint32_t parts) { return kvq_attend(layout, &a, part, parts); });
        KVQ(kvq_combine(layout, partial.data(), nullptr, a.n_splits, 1, out.data(), nullptr, 0, 1));
        return out;
    }
    // What attention has to read: pages in use with their headers, exact rows, mask, plan bits.
    double bytes() {
        const double in_pages = kvq_layout_bits_k(layout) + kvq_layout_bits_v(layout);
        return in_pages / 8 * SHAPE.head_dim_k * SHAPE.n_kv_heads * n_used + 4.0 * n_slots * SHAPE.head_dim_k * SHAPE.n_kv_heads + n_cells * 2.125;
    }
};

template <class T> static T *upload(const std::vector<T> &x) {
    T *p;
    CUDA(cudaMalloc(&p, x.size() * sizeof(T)));
    CUDA(cudaMemcpy(p, x.data(), x.size() * sizeof(T), cudaMemcpyHostToDevice));
    return p;
}

__global__ void __launch_bounds__(512) read_all(const uint4 *from, size_t n, uint32_t *out) {
    size_t i = blockIdx.x * 512 + threadIdx.x;
    const size_t step = size_t(gridDim.x) * 512;
    uint32_t sum = 0;
    for (; i + 7 * step < n; i += 8 * step) {
        uint4 x[8];
#pragma unroll
        for (int j = 0; j < 8; j++) x[j] = __ldg(from + i + j * step);
#pragma unroll
        for (int j = 0; j < 8; j++) sum += x[j].x ^ x[j].y ^ x[j].z ^ x[j].w;
    }
    for (; i < n; i += step) sum += from[i].x ^ from[i].y ^ from[i].z ^ from[i].w;
    if (sum == 0x12345) *out = sum;
}
__global__ void nothing() {}

static cudaStream_t stream;
static uint8_t *flush;
static float median(std::vector<float> x) {
    std::sort(x.begin(), x.end());
    return x[x.size() / 2];
}
static float cold(const std::function<void()> &run, int n = 31) {
    cudaEvent_t a, b;
    CUDA(cudaEventCreate(&a));
    CUDA(cudaEventCreate(&b));
    std::vector<float> times;
    for (int i = 0; i < n; i++) {
        CUDA(cudaMemsetAsync(flush, i, 256 << 20, stream));
        CUDA(cudaEventRecord(a, stream));
        run();
        CUDA(cudaEventRecord(b, stream));
        CUDA(cudaStreamSynchronize(stream));
        float ms;
        CUDA(cudaEventElapsedTime(&ms, a, b));
        times.push_back(ms * 1e3f);
    }
    return median(times);
}
static float in_graph(int n_layers, const std::function<void(int)> &run) {
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < n_layers; i++) run(i);
    CUDA(cudaStreamEndCapture(stream, &graph));
    CUDA(cudaGraphInstantiate(&exec, graph, 0));
    cudaEvent_t a, b;
    CUDA(cudaEventCreate(&a));
    CUDA(cudaEventCreate(&b));
    std::vector<float> times;
    for (int i = 0; i < 25; i++) {
        CUDA(cudaEventRecord(a, stream));
        CUDA(cudaGraphLaunch(exec, stream));
        CUDA(cudaEventRecord(b, stream));
        CUDA(cudaStreamSynchronize(stream));
        float ms;
        CUDA(cudaEventElapsedTime(&ms, a, b));
        times.push_back(ms * 1e3f / n_layers);
    }
    CUDA(cudaGraphExecDestroy(exec));
    CUDA(cudaGraphDestroy(graph));
    return median(times);
}

int main(int argc, char **argv) {
    std::vector<uint32_t> sizes;
    std::vector<std::string> recipes;
    FILE *csv = nullptr;
    bool once = false;
    for (int i = 1; i < argc; i++) {
        const std::string arg = argv[i];
        if (arg == "--csv") csv = fopen(argv[++i], "w");
        else if (arg == "--recipe") recipes.push_back(argv[++i]);
        else if (arg == "--once") once = true;
        else if (arg == "--heads") SHAPE.n_heads = atoi(argv[++i]);
        else sizes.push_back(uint32_t(atoi(arg.c_str())));
    }
    if (sizes.empty()) sizes = {4096, 32768, 131072, 1048576};
    if (recipes.empty()) recipes = {"skvq:k=2,v=2", "skvq:k=3,v=3", "skvq:k=4,v=4", "kivi:k=2.25,v=2", "kivi:k=3,v=3", "qaq:bits=2.25"};
    cudaDeviceProp device;
    CUDA(cudaGetDeviceProperties(&device, 0));
    CUDA(cudaStreamCreate(&stream));
    CUDA(cudaMalloc(&flush, size_t(512) << 20));
    uint32_t *sink;
    CUDA(cudaMalloc(&sink, 256));
    kvq_device *gpu;
    KVQ(kvq_device_new("cuda:0", &gpu));
    const float copy = once ? 0 : cold([] { CUDA(cudaMemcpyAsync(flush, flush + (256 << 20), 256 << 20, cudaMemcpyDeviceToDevice, stream)); }, 15);
    const double bandwidth = once ? 0 : 512.0 * (1 << 20) / copy * 1e-6;
    printf("# %s, %d multiprocessors, L2 %d MB, copy %.2f TB/s, empty kernel %.1f us, in a graph %.1f us\n", device.name, device.multiProcessorCount, device.l2CacheSize >> 20,
           bandwidth, once ? 0 : cold([] { nothing<<<1, 32, 0, stream>>>(); }), once ? 0 : in_graph(64, [](int) { nothing<<<1, 32, 0, stream>>>(); }));
    if (csv) fprintf(csv, "# %s, copy %.2f TB/s\nrecipe,cells,query_heads,nmse,cold_us,graph_us,floor_cold_us,floor_graph_us,megabytes,share_of_copy_bandwidth,graph_with_store_us\n", device.name, bandwidth);
    printf("%-18s %8s %8s %9s %9s %9s %9s %9s %8s %6s\n", "recipe", "cells", "nmse", "cold us", "graph us", "+ store", "floor", "floor gr", "MB", "x floor");
    bool ok = true;
    for (uint32_t cells : sizes) {
        for (const auto &spec : recipes) {
            Layer layer(spec.c_str(), cells);
            const size_t k_bytes = kvq_layout_k_bytes(layer.layout), v_bytes = kvq_layout_v_bytes(layer.layout);
            const size_t stride = (k_bytes + v_bytes + 511) / 256 * 256;
            const int n_layers = once ? 1 : int(std::max<size_t>(2, std::min<size_t>(64, (size_t(400) << 20) / stride)));
            uint8_t *memory;
            CUDA(cudaMalloc(&memory, stride * n_layers));
            const size_t v_at = (k_bytes + 255) / 256 * 256;
            for (int i = 0; i < n_layers; i++) {
                CUDA(cudaMemcpy(memory + i * stride, layer.aligned(layer.k), k_bytes, cudaMemcpyHostToDevice));
                CUDA(cudaMemcpy(memory + i * stride + v_at, layer.aligned(layer.v), v_bytes, cudaMemcpyHostToDevice));
            }
            kvq_attend_args a = layer.args();
            std::vector<float> got(layer.q.size(), NAN), want = layer.on_cpu();
            float *out = upload(got), *lse = upload(std::vector<float>(SHAPE.n_heads));
            float *q = upload(layer.q), *k_cur = upload(layer.k_cur), *v_cur = upload(layer.v_cur);
            uint16_t *mask = upload(layer.mask);
            int32_t *plan = upload(layer.plan);
            a.q = q, a.k_cur = k_cur, a.v_cur = v_cur, a.mask = mask, a.plan = plan, a.out = out, a.lse = lse;
            size_t workspace_bytes;
            KVQ(kvq_attend_workspace(layer.layout, gpu, 1, 1, cells, &workspace_bytes));
            void *workspace;
            CUDA(cudaMalloc(&workspace, workspace_bytes));
            CUDA(cudaMemset(workspace, 0, workspace_bytes));
            const auto run = [&](int i) {
                a.k_mem = memory + i * stride, a.v_mem = a.k_mem + v_at;
                KVQ(kvq_attend_enqueue(gpu, layer.layout, &a, nullptr, workspace, workspace_bytes, stream));
            };
            run(0);
            CUDA(cudaStreamSynchronize(stream));
            CUDA(cudaMemcpy(got.data(), out, got.size() * 4, cudaMemcpyDeviceToHost));
            double error = 0, power = 0;
            for (size_t i = 0; i < got.size(); i++) error += std::pow(got[i] - want[i], 2), power += std::pow(want[i], 2);
            const double nmse = error / power;
            // The CPU rounds queries and weights to 8 bits: its own bound is 1e-3.
            if (!(nmse <= 2e-3)) ok = false;
            // The step of a token that seals no page: it may be done again.
            kvq_store_args s{};
            s.k_cur = k_cur, s.k_stride_token = a.k_stride_token, s.k_stride_head = a.k_stride_head;
            s.v_cur = v_cur, s.v_stride_token = a.v_stride_token, s.v_stride_head = a.v_stride_head;
            s.q = q, s.q_stride_token = a.q_stride_token, s.q_stride_head = a.q_stride_head, s.lse = a.lse, s.scale = a.scale;
            s.plan = plan, s.plan_len = a.plan_len, s.n_tokens = 1, s.after_attend = 1;
            size_t store_bytes;
            KVQ(kvq_store_workspace(layer.layout, gpu, 1, 1, &store_bytes));
            void *store_workspace;
            CUDA(cudaMalloc(&store_workspace, store_bytes));
            const auto run_both = [&](int i) {
                run(i);
                s.k_mem = memory + i * stride, s.v_mem = s.k_mem + v_at;
                KVQ(kvq_store_enqueue(gpu, layer.layout, &s, nullptr, store_workspace, store_bytes, stream));
            };
            float t_cold = 0, t_graph = 0, t_both = 0, floor_cold = 0, floor_graph = 0;
            const double bytes = layer.bytes();
            if (!once) {
                const size_t n = std::min(stride, size_t(bytes)) / 16;
                floor_cold = floor_graph = 1e9f;
                for (int blocks : {1, 2, 4}) {
                    const auto floor = [&](int i) { read_all<<<blocks * device.multiProcessorCount, 512, 0, stream>>>(reinterpret_cast<const uint4 *>(memory + i * stride), n, sink); };
                    floor_cold = std::min(floor_cold, cold([&] { floor(0); }, 15));
                    floor_graph = std::min(floor_graph, in_graph(n_layers, floor));
                }
                t_cold = cold([&] { run(0); });
                t_graph = in_graph(n_layers, run);
                t_both = in_graph(n_layers, run_both);
            }
            printf("%-18s %8u %8.1e %9.2f %9.2f %9.2f %9.2f %9.2f %8.1f %6.2f%s\n", spec.c_str(), cells, nmse, t_cold, t_graph, t_both, floor_cold, floor_graph, bytes * 1e-6, t_cold / floor_cold,
                   nmse <= 2e-3 ? "" : "  WRONG");
            fflush(stdout);
            if (csv) fprintf(csv, "\"%s\",%u,%u,%.2e,%.2f,%.2f,%.2f,%.2f,%.2f,%.3f,%.2f\n", spec.c_str(), cells, SHAPE.n_heads, nmse, t_cold, t_graph, floor_cold, floor_graph, bytes * 1e-6,
                             once ? 0 : bytes / t_cold * 1e-6 / bandwidth, t_both);
            for (void *p : {(void *)memory, (void *)out, (void *)q, (void *)k_cur, (void *)v_cur, (void *)mask, (void *)plan, (void *)lse, workspace, store_workspace}) CUDA(cudaFree(p));
        }
    }
    kvq_device_free(gpu);
    if (csv) fclose(csv);
    return ok ? 0 : 1;
}
