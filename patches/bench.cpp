// Times the attention of one layer over its KV cache: kvq beside stock ggml flash attention (f16, q8_0, q4_0), in one
// process, on the same rows, the same shapes and the same number of threads.
//
// Both sides see what a running model gives them: keys and values with outlier channels, an FP16 mask, the newest n_q
// tokens being decoded, ggml's cache laid out as llama_kv_cache does (all heads of a cell adjacent). Timed is the
// attention alone; what it costs to store a token is a column of its own. Before a backend is timed its answer is
// compared with double precision on its own rows.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include <immintrin.h>
#include <time.h>
#include <unistd.h>

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"
#include "kvq.h"

#ifndef KVQ_COMMIT
#define KVQ_COMMIT "unknown"
#endif

namespace {

constexpr int N_KV_HEADS = 8;
constexpr int UBATCH = 512;
constexpr size_t LARGE_PAGE = 2 << 20;
constexpr double NEVER = 0.0;

struct Case {
    std::string recipe;
    int n_kv, n_q, head_dim, gqa, threads;

    std::string key() const {
        return recipe + "/" + std::to_string(n_kv) + "/" + std::to_string(n_q) + "/" + std::to_string(head_dim) + "/" +
               std::to_string(gqa) + "/" + std::to_string(threads);
    }
    int n_heads() const { return N_KV_HEADS * gqa; }
    float scale() const { return 1.0f / std::sqrt(float(head_dim)); }
    // Multiply-adds of a causal pass, keys and values.
    double ops() const { return double(n_q) * n_heads() * (n_kv - (n_q - 1) / 2.0) * 2.0 * head_dim; }
};

const char * const SKVQ_2 = "skvq:k=2,v=2";
const char * const SKVQ_3 = "skvq:k=3,v=3";
const char * const SKVQ_4 = "skvq:k=4,v=4";
const char * const KIVI_2 = "kivi:k=2.25";
const char * const KIVI_3 = "kivi:k=3,v=3";
const char * const KIVI_4 = "kivi:k=4,v=4";
const char * const OTT_2  = "ott:k=2.25";
const char * const OTT_3  = "ott:k=3,v=3";
const char * const OTT_4  = "ott:k=4,v=4";
const char * const QAQ    = "qaq:bits=2.25";

const std::vector<Case> QUICK = {
    { SKVQ_2,   4096, 1, 128, 4, 2 },
    { SKVQ_2,  16384, 1, 128, 4, 2 },
    { SKVQ_2,  32768, 1, 128, 4, 2 },
};

const std::vector<Case> FULL = {
    { SKVQ_2,   4096,   1, 128, 4, 2 },
    { SKVQ_2,  16384,   1, 128, 4, 2 },
    { SKVQ_2,  32768,   1, 128, 4, 2 },
    { SKVQ_2, 131072,   1, 128, 4, 2 },
    { SKVQ_3,  32768,   1, 128, 4, 2 },
    { SKVQ_4,  32768,   1, 128, 4, 2 },
    { KIVI_2,  32768,   1, 128, 4, 2 },
    { KIVI_3,  32768,   1, 128, 4, 2 },
    { KIVI_4,  32768,   1, 128, 4, 2 },
    { OTT_2,   32768,   1, 128, 4, 2 },
    { OTT_3,   32768,   1, 128, 4, 2 },
    { OTT_4,   32768,   1, 128, 4, 2 },
    { QAQ,     32768,   1, 128, 4, 2 },
    { SKVQ_2,  32768,   1, 128, 4, 1 },
    { SKVQ_2,   8192,   1,  64, 4, 2 },
    { SKVQ_2,   8192,   1,  96, 4, 2 },
    { SKVQ_2,   8192,   1, 128, 4, 2 },
    { SKVQ_2,   8192,   1, 256, 4, 2 },
    { SKVQ_2,   8192,   1, 128, 1, 2 },
    { SKVQ_2,   8192,   1, 128, 8, 2 },
    { SKVQ_2,  32768, 512, 128, 4, 2 },
};

// What --check demands, of medians with a cold cache: column of the case `of`, divided by that of `by` if it is named.
struct Bar {
    const char * column;
    std::string of, by;
    bool at_least;
    double bound;
};

const std::vector<Bar> BARS = {
    { "ratio_f16",  "skvq:k=2,v=2/16384/1/128/4/2",   "", true,  5.0 },
    { "ratio_f16",  "skvq:k=2,v=2/4096/1/128/4/2",    "", true,  8.0 },
    { "ratio_q4_0", "skvq:k=2,v=2/4096/1/128/4/2",    "", true, 30.0 },
    { "ratio_f16",  "skvq:k=2,v=2/32768/1/128/4/2",   "", true, 25.0 },
    { "ratio_q4_0", "skvq:k=2,v=2/32768/1/128/4/2",   "", true, 45.0 },
    { "ratio_f16",  "skvq:k=2,v=2/131072/1/128/4/2",  "", true, 20.0 },
    { "ratio_f16",  "skvq:k=3,v=3/32768/1/128/4/2",   "", true, 15.0 },
    { "ratio_q4_0", "skvq:k=3,v=3/32768/1/128/4/2",   "", true, 28.0 },
    { "ratio_f16",  "skvq:k=4,v=4/32768/1/128/4/2",   "", true, 15.0 },
    { "ratio_q4_0", "skvq:k=4,v=4/32768/1/128/4/2",   "", true, 28.0 },
    { "ratio_f16",  "kivi:k=2.25/32768/1/128/4/2",    "", true, 15.0 },
    { "ratio_q4_0", "kivi:k=2.25/32768/1/128/4/2",    "", true, 28.0 },
    { "ratio_f16",  "kivi:k=3,v=3/32768/1/128/4/2",   "", true, 15.0 },
    { "ratio_q4_0", "kivi:k=3,v=3/32768/1/128/4/2",   "", true, 28.0 },
    { "ratio_f16",  "kivi:k=4,v=4/32768/1/128/4/2",   "", true, 15.0 },
    { "ratio_q4_0", "kivi:k=4,v=4/32768/1/128/4/2",   "", true, 28.0 },
    { "ratio_f16",  "ott:k=2.25/32768/1/128/4/2",     "", true, 15.0 },
    { "ratio_q4_0", "ott:k=2.25/32768/1/128/4/2",     "", true, 28.0 },
    { "ratio_f16",  "ott:k=3,v=3/32768/1/128/4/2",    "", true, 15.0 },
    { "ratio_q4_0", "ott:k=3,v=3/32768/1/128/4/2",    "", true, 28.0 },
    { "ratio_f16",  "ott:k=4,v=4/32768/1/128/4/2",    "", true, 15.0 },
    { "ratio_q4_0", "ott:k=4,v=4/32768/1/128/4/2",    "", true, 28.0 },
    { "ratio_f16",  "qaq:bits=2.25/32768/1/128/4/2",  "", true,  8.0 },
    { "ratio_q4_0", "qaq:bits=2.25/32768/1/128/4/2",  "", true, 15.0 },
    { "ratio_f16",  "skvq:k=2,v=2/32768/512/128/4/2", "", true,  4.0 },
    { "ratio_q4_0", "skvq:k=2,v=2/32768/512/128/4/2", "", true, 30.0 },
    { "us_kvq", "skvq:k=2,v=2/131072/1/128/4/2", "skvq:k=2,v=2/32768/1/128/4/2", false, 4.5 },
    { "us_kvq", "skvq:k=2,v=2/32768/1/128/4/1",  "skvq:k=2,v=2/32768/1/128/4/2", true,  1.8 },
};

[[noreturn]] void die(const std::string & text) {
    fprintf(stderr, "bench: error: %s\n", text.c_str());
    exit(2);
}

void ok(kvq_status status) {
    if (status != KVQ_STATUS_OK) {
        die(kvq_last_error());
    }
}

// Elapsed time, or with --cpu-time the time that this process was on a core.
clockid_t g_clock = CLOCK_MONOTONIC;

double now() {
    timespec t;
    clock_gettime(g_clock, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

double median(std::vector<double> v) {
    std::sort(v.begin(), v.end());
    return v.empty() ? NEVER : v[v.size() / 2];
}

double minimum(const std::vector<double> & v) { return v.empty() ? NEVER : *std::min_element(v.begin(), v.end()); }

// ggml's CPU threads. Both sides run on them: two sets of threads that spin after their last job would slow each other
// down, and in llama.cpp kvq runs on these as well.
class Workers {
public:
    explicit Workers(int n) : n_(n), cpu_(ggml_backend_cpu_init()) {
        ggml_threadpool_params params = ggml_threadpool_params_default(n);
        threads_ = ggml_threadpool_new(&params);
        ggml_backend_cpu_set_n_threads(cpu_, n);
        ggml_backend_cpu_set_threadpool(cpu_, threads_);
        ctx_ = ggml_init({ ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true });
        graph_ = ggml_new_graph(ctx_);
        ggml_build_forward_expand(graph_, ggml_custom_4d(ctx_, GGML_TYPE_F32, 1, 1, 1, 1, nullptr, 0, work,
                                                         GGML_N_TASKS_MAX, this));
        buffer_ = ggml_backend_alloc_ctx_tensors(ctx_, cpu_);
    }
    ~Workers() {
        ggml_backend_buffer_free(buffer_);
        ggml_free(ctx_);
        ggml_backend_free(cpu_);
        ggml_threadpool_free(threads_);
    }
    Workers(const Workers &) = delete;
    int size() const { return n_; }
    ggml_backend_t cpu() const { return cpu_; }

    void run(ggml_cgraph * graph) {
        if (ggml_backend_graph_compute(cpu_, graph) != GGML_STATUS_SUCCESS) {
            die("ggml could not compute the graph");
        }
    }
    // Calls job(part, n_parts) once on every thread.
    void run(const std::function<void(int, int)> & job) {
        job_ = &job;
        run(graph_);
    }

private:
    static void work(ggml_tensor *, int part, int n_parts, void * self) {
        (*static_cast<Workers *>(self)->job_)(part, n_parts);
    }

    int n_;
    ggml_backend_t cpu_;
    ggml_threadpool * threads_;
    ggml_context * ctx_;
    ggml_cgraph * graph_;
    ggml_backend_buffer_t buffer_;
    const std::function<void(int, int)> * job_ = nullptr;
};

// Gaussian values; some channels of each head are several times larger and off centre, as keys of real models are.
class Rows {
public:
    explicit Rows(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}

    void fill(float * out, int n_tokens, int n_heads, int dim, bool outliers) {
        for (int i = 0; i < n_tokens * n_heads; i++) {
            const int head = i % n_heads;
            for (int c = 0; c < dim; c++) {
                const bool wide = outliers && (c * 7 + head * 13) % 32 == 0;
                out[size_t(i) * dim + c] = gaussian() * (wide ? 4.0f : 1.0f) + (wide ? 3.0f : 0.0f);
            }
        }
    }

private:
    // Sum of four uniforms: near enough to a Gaussian, one draw a value.
    float gaussian() {
        state_ ^= state_ << 13;
        state_ ^= state_ >> 7;
        state_ ^= state_ << 17;
        const uint64_t x = state_;
        const int sum = int(x & 0xffff) + int(x >> 16 & 0xffff) + int(x >> 32 & 0xffff) + int(x >> 48);
        return (sum - 2 * 65535) * (1.7320508f / 65536.0f);
    }
    uint64_t state_;
};

// Aligned memory of a multiple of that many bytes, zeroed. Large pages are asked for as the glue does it in llama.cpp, where
// the memory of all layers is one buffer.
struct Buffer {
    explicit Buffer(size_t n, size_t alignment = 64)
        : size((n + alignment - 1) / alignment * alignment),
          data(static_cast<uint8_t *>(aligned_alloc(alignment, size))) {
        if (!data) {
            die("out of memory");
        }
        if (alignment == LARGE_PAGE) {
            ok(kvq_use_large_pages(data, size));
        }
        memset(data, 0, size);
    }
    ~Buffer() { free(data); }
    Buffer(const Buffer &) = delete;
    size_t size;
    uint8_t * data;
};

// What both sides of a comparison share: queries, mask and the rows of the tokens being decoded.
struct Inputs {
    explicit Inputs(const Case & c)
        : q(size_t(c.n_q) * c.n_heads() * c.head_dim), mask(size_t(c.n_q) * c.n_kv) {
        Rows(3).fill(q.data(), c.n_q, c.n_heads(), c.head_dim, false);
        for (int t = 0; t < c.n_q; t++) {
            for (int cell = 0; cell < c.n_kv; cell++) {
                mask[size_t(t) * c.n_kv + cell] = ggml_fp32_to_fp16(cell <= c.n_kv - c.n_q + t ? 0.0f : -INFINITY);
            }
        }
    }
    std::vector<float> q;
    std::vector<ggml_fp16_t> mask;
};

// One way to attend over the rows of a case.
struct Backend {
    virtual ~Backend() = default;
    virtual void append(int cell, int n, const float * k, const float * v, const float * q) = 0;
    virtual void run() = 0;
    virtual const float * out() const = 0;
    // The rows of one KV head as the backend holds them, [n_kv][head_dim].
    virtual void rows(bool value, int kv_head, std::vector<float> & out) = 0;

    const char * name = "";
    // Bound on the normalized mean square error of the outputs.
    double nmse_bound = 0.0;
};

class Stock : public Backend {
public:
    Stock(const Case & c, const Inputs & inputs, Workers & workers, ggml_type type, const char * label, double bound)
        : case_(c), workers_(workers), type_(type) {
        name = label;
        nmse_bound = bound;
        ctx_ = ggml_init({ 64 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true });
        const int64_t width = int64_t(c.head_dim) * N_KV_HEADS;
        k_ = ggml_new_tensor_2d(ctx_, type, width, c.n_kv);
        v_ = ggml_new_tensor_2d(ctx_, type, width, c.n_kv);
        ggml_tensor * q    = ggml_new_tensor_3d(ctx_, GGML_TYPE_F32, c.head_dim, c.n_heads(), c.n_q);
        ggml_tensor * mask = ggml_new_tensor_2d(ctx_, GGML_TYPE_F16, c.n_kv, c.n_q);
        const auto rows = [&](ggml_tensor * t) {
            const size_t head = ggml_row_size(type, c.head_dim);
            t = ggml_view_3d(ctx_, t, c.head_dim, N_KV_HEADS, c.n_kv, head, head * N_KV_HEADS, 0);
            return ggml_permute(ctx_, t, 0, 2, 1, 3);
        };
        out_ = ggml_flash_attn_ext(ctx_, ggml_permute(ctx_, q, 0, 2, 1, 3), rows(k_), rows(v_), mask, c.scale(), 0, 0);
        ggml_prec_set_acc(out_, GGML_PREC_F32);
        graph_ = ggml_new_graph(ctx_);
        ggml_build_forward_expand(graph_, out_);
        buffer_ = ggml_backend_alloc_ctx_tensors(ctx_, workers.cpu());
        if (!buffer_) {
            die("out of memory");
        }
        ggml_backend_tensor_set(q, inputs.q.data(), 0, ggml_nbytes(q));
        ggml_backend_tensor_set(mask, inputs.mask.data(), 0, ggml_nbytes(mask));
    }
    ~Stock() override {
        ggml_backend_buffer_free(buffer_);
        ggml_free(ctx_);
    }
    void append(int cell, int n, const float * k, const float * v, const float *) override {
        const int64_t width = k_->ne[0];
        const size_t at = size_t(cell) * k_->nb[1];
        ggml_quantize_chunk(type_, k, static_cast<char *>(k_->data) + at, 0, n, width, nullptr);
        ggml_quantize_chunk(type_, v, static_cast<char *>(v_->data) + at, 0, n, width, nullptr);
    }
    void run() override { workers_.run(graph_); }
    const float * out() const override { return static_cast<const float *>(out_->data); }
    void rows(bool value, int kv_head, std::vector<float> & out) override {
        const ggml_tensor * t = value ? v_ : k_;
        for (int cell = 0; cell < case_.n_kv; cell++) {
            const char * row = static_cast<const char *>(t->data) + cell * t->nb[1] +
                               kv_head * ggml_row_size(type_, case_.head_dim);
            ggml_get_type_traits(type_)->to_float(row, &out[size_t(cell) * case_.head_dim], case_.head_dim);
        }
    }

private:
    const Case & case_;
    Workers & workers_;
    ggml_type type_;
    ggml_context * ctx_;
    ggml_backend_buffer_t buffer_;
    ggml_tensor *k_, *v_, *out_;
    ggml_cgraph * graph_;
};

class Kvq : public Backend {
public:
    Kvq(const Case & c, const Inputs & inputs, Workers & workers) : case_(c), inputs_(inputs), workers_(workers) {
        name = "kvq";
        nmse_bound = 1e-3;
        kvq_recipe * recipe;
        ok(kvq_recipe_parse(c.recipe.c_str(), &recipe));
        ok(kvq_planner_new(recipe, c.n_kv, 1, 1, &planner_));
        const uint32_t dim = c.head_dim;
        const kvq_shape shape = { uint32_t(c.n_heads()), N_KV_HEADS, dim, dim };
        ok(kvq_layout_new(recipe, &shape, 2, c.n_kv, kvq_planner_n_slots(planner_), &layout_));
        kvq_recipe_free(recipe);
        k_mem_ = std::make_unique<Buffer>(kvq_layout_k_bytes(layout_), LARGE_PAGE);
        v_mem_ = std::make_unique<Buffer>(kvq_layout_v_bytes(layout_), LARGE_PAGE);
        n_splits_ = kvq_attend_splits(layout_, c.n_q, workers.size());
        const size_t n_rows = size_t(c.n_q) * c.n_heads();
        out_.resize(n_rows * dim);
        lse_.resize(n_rows);
        partial_.resize(n_splits_ > 1 ? n_splits_ * n_rows * (dim + 2) : 0);
        location_.resize(c.n_kv);
    }
    ~Kvq() override {
        kvq_layout_free(layout_);
        kvq_planner_free(planner_);
    }
    // The last n_q rows are kept for run(), which attends them before they are stored.
    void append(int cell, int n, const float * k, const float * v, const float * q) override {
        const bool last = cell + n == case_.n_kv;
        if (last && n != case_.n_q) {
            die("the last rows must be the ones that are decoded");
        }
        const size_t width = size_t(case_.head_dim) * N_KV_HEADS;
        std::vector<kvq_row> rows(n);
        for (int i = 0; i < n; i++) {
            rows[i] = { uint32_t(cell + i), cell + i, 0 };
        }
        if (last) {
            ok(kvq_planner_locate(planner_, 0, location_.data()));
            k_cur_.assign(k, k + n * width);
            v_cur_.assign(v, v + n * width);
        }
        plan_.resize(kvq_planner_plan_len(planner_, n));
        const auto is_live = [](void * user, uint32_t, uint32_t c) { return c < *static_cast<uint32_t *>(user); };
        uint32_t n_live = cell;
        ok(kvq_planner_plan(planner_, 0, rows.data(), n, is_live, &n_live, plan_.data(), plan_.size()));
        if (last) {
            return;
        }
        kvq_store_args args = {};
        args.k_cur = k;
        args.v_cur = v;
        args.k_stride_token = args.v_stride_token = width;
        args.k_stride_head = args.v_stride_head = case_.head_dim;
        args.k_mem = k_mem_->data;
        args.v_mem = v_mem_->data;
        args.plan = plan_.data();
        args.plan_len = plan_.size();
        args.n_tokens = n;
        // What recipes learn from queries: which channels matter, and what attention tokens had. Denominators as those of
        // Gaussian scores whose variance is that of these rows.
        const std::vector<float> lse(size_t(n) * case_.n_heads(), std::log(cell + n) + 0.9f);
        args.q = q;
        args.q_stride_token = size_t(case_.head_dim) * case_.n_heads();
        args.q_stride_head = case_.head_dim;
        args.lse = lse.data();
        args.scale = case_.scale();
        const double start = now();
        workers_.run([&](int part, int n_parts) { ok(kvq_store(layout_, &args, part, n_parts)); });
        if (cell > 0) {
            store_us_.push_back((now() - start) * 1e6 / n);
        }
    }
    void run() override {
        const size_t width = size_t(case_.head_dim) * N_KV_HEADS;
        kvq_attend_args args = {};
        args.q = inputs_.q.data();
        args.q_stride_token = size_t(case_.head_dim) * case_.n_heads();
        args.q_stride_head = case_.head_dim;
        args.k_cur = k_cur_.data();
        args.v_cur = v_cur_.data();
        args.k_stride_token = args.v_stride_token = width;
        args.k_stride_head = args.v_stride_head = case_.head_dim;
        args.k_mem = k_mem_->data;
        args.v_mem = v_mem_->data;
        args.plan = plan_.data();
        args.plan_len = plan_.size();
        args.mask = inputs_.mask.data();
        args.mask_is_f16 = 1;
        args.mask_stride_token = case_.n_kv;
        args.n_kv = case_.n_kv;
        args.scale = case_.scale();
        args.n_tokens = case_.n_q;
        args.n_splits = n_splits_;
        args.out = n_splits_ > 1 ? partial_.data() : out_.data();
        args.lse = n_splits_ > 1 ? nullptr : lse_.data();
        workers_.run([&](int part, int n_parts) { ok(kvq_attend(layout_, &args, part, n_parts)); });
        if (n_splits_ > 1) {
            workers_.run([&](int part, int n_parts) {
                ok(kvq_combine(layout_, partial_.data(), nullptr, n_splits_, case_.n_q, out_.data(), lse_.data(), part, n_parts));
            });
        }
    }
    const float * out() const override { return out_.data(); }
    void rows(bool value, int kv_head, std::vector<float> & out) override {
        constexpr int STEP = 256;
        const size_t dim = case_.head_dim, width = dim * N_KV_HEADS;
        std::vector<float> all(STEP * width);
        for (int cell = 0; cell < case_.n_kv; cell += STEP) {
            const int n = std::min(STEP, case_.n_kv - cell);
            ok(kvq_dequantize(layout_, k_mem_->data, v_mem_->data, location_.data(), nullptr, cell, n,
                              value ? nullptr : all.data(), value ? all.data() : nullptr));
            for (int i = 0; i < n; i++) {
                std::copy_n(&all[i * width + kv_head * dim], dim, &out[(cell + i) * dim]);
            }
        }
        const std::vector<float> & current = value ? v_cur_ : k_cur_;
        for (int i = 0; i < case_.n_q; i++) {
            std::copy_n(&current[i * width + kv_head * dim], dim, &out[(case_.n_kv - case_.n_q + i) * dim]);
        }
    }
    // Memory that one attention has to read: pages, exact rows, mask, queries and the ubatch's own rows.
    double bytes() const {
        return double(kvq_layout_k_bytes(layout_)) + kvq_layout_v_bytes(layout_) + 2.0 * inputs_.mask.size() + 4.0 * inputs_.q.size() +
               4.0 * (k_cur_.size() + v_cur_.size());
    }
    double store_us() const { return median(store_us_); }

private:
    const Case & case_;
    const Inputs & inputs_;
    Workers & workers_;
    kvq_planner * planner_;
    kvq_layout * layout_;
    std::unique_ptr<Buffer> k_mem_, v_mem_;
    uint32_t n_splits_;
    std::vector<float> out_, lse_, partial_, k_cur_, v_cur_;
    std::vector<int32_t> plan_;
    std::vector<kvq_location> location_;
    std::vector<double> store_us_;
};

// Fills all backends with the same rows, an ubatch at a time.
void fill(const Case & c, const std::vector<Backend *> & backends) {
    const size_t width = size_t(c.head_dim) * N_KV_HEADS;
    std::vector<float> k(UBATCH * width), v(UBATCH * width), q(UBATCH * width * c.gqa);
    Rows keys(1), values(2), queries(4);
    for (int cell = 0; cell < c.n_kv;) {
        const int n = cell < c.n_kv - c.n_q ? std::min(UBATCH, c.n_kv - c.n_q - cell) : c.n_q;
        keys.fill(k.data(), n, N_KV_HEADS, c.head_dim, true);
        values.fill(v.data(), n, N_KV_HEADS, c.head_dim, false);
        queries.fill(q.data(), n, c.n_heads(), c.head_dim, false);
        for (Backend * b : backends) {
            b->append(cell, n, k.data(), v.data(), q.data());
        }
        cell += n;
    }
}

// Normalized mean square error of the first and last head and token against attention in double precision.
double nmse(const Case & c, const Inputs & inputs, Backend & b) {
    const size_t dim = c.head_dim;
    std::vector<float> k(c.n_kv * dim), v(c.n_kv * dim);
    double error = 0, power = 0;
    for (int kv_head : { 0, N_KV_HEADS - 1 }) {
        b.rows(false, kv_head, k);
        b.rows(true, kv_head, v);
        const int head = kv_head == 0 ? 0 : c.n_heads() - 1;
        for (int token : c.n_q == 1 ? std::vector<int>{ 0 } : std::vector<int>{ 0, c.n_q - 1 }) {
            const size_t row = (size_t(token) * c.n_heads() + head) * dim;
            const int n = c.n_kv - c.n_q + token + 1;
            std::vector<double> p(n), want(dim, 0.0);
            double max = -INFINITY, sum = 0;
            for (int i = 0; i < n; i++) {
                p[i] = 0;
                for (size_t j = 0; j < dim; j++) {
                    p[i] += double(inputs.q[row + j]) * k[i * dim + j];
                }
                p[i] *= c.scale();
                max = std::max(max, p[i]);
            }
            for (int i = 0; i < n; i++) {
                p[i] = std::exp(p[i] - max);
                sum += p[i];
                for (size_t j = 0; j < dim; j++) {
                    want[j] += p[i] * v[i * dim + j];
                }
            }
            for (size_t j = 0; j < dim; j++) {
                const double w = want[j] / sum, d = b.out()[row + j] - w;
                error += d * d;
                power += w * w;
            }
        }
    }
    return error / power;
}

// Sum of all words, so that the compiler must read them.
uint64_t read_all(const uint8_t * data, size_t bytes) {
    const uint64_t * words = reinterpret_cast<const uint64_t *>(data);
    uint64_t sum = 0;
    for (size_t i = 0; i < bytes / 8; i++) {
        sum += words[i];
    }
    return sum;
}

// What this machine can do with a number of threads: the two terms of the floor.
class Machine {
public:
    Machine() : flush_(std::max<size_t>(64 << 20, 2 * std::max(0L, sysconf(_SC_LEVEL3_CACHE_SIZE)))) {}

    Workers & workers(int threads) {
        auto & w = workers_[threads];
        if (!w) {
            w = std::make_unique<Workers>(threads);
        }
        return *w;
    }
    // Pushes everything else out of the caches of all cores in use.
    void flush(int threads) {
        workers(threads).run([&](int part, int n) {
            const size_t bytes = flush_.size / n / 64 * 64;
            sink_ += read_all(flush_.data + part * bytes, bytes);
        });
    }
    // Bytes a second that the threads together read from memory.
    double bandwidth(int threads) {
        return best(bandwidth_[threads], [&] { flush(threads); }, double(flush_.size));
    }
    // int8 multiply-adds a second of the threads together; 0 if not known for this instruction set.
    double int8_peak(int threads) {
        constexpr int ROUNDS = 1 << 18;
        return best(peak_[threads], [&] {
            workers(threads).run([](int, int) { multiply_add(ROUNDS); });
        }, double(threads) * ROUNDS * MULTIPLY_ADDS);
    }

private:
    double best(double & known, const std::function<void()> & work, double amount) {
        for (int i = 0; i < 8 && (known == 0 || i > 0); i++) {
            const double start = now();
            work();
            known = std::max(known, amount / (now() - start));
        }
        return known;
    }
#if defined(__AVX512VNNI__)
    // Eight independent sums are more than the latency of the instruction needs. As text, because compilers keep an
    // array of sums in memory, and multiply once where they can.
    static constexpr int MULTIPLY_ADDS = 8 * 64;
    static void multiply_add(int rounds) {
        const __m512i x = _mm512_set1_epi8(3);
        __m512i a = x, b = x, c = x, d = x, e = x, f = x, g = x, h = x;
        for (int i = 0; i < rounds; i++) {
            __asm__ volatile("vpdpbusd %8, %8, %0; vpdpbusd %8, %8, %1; vpdpbusd %8, %8, %2; vpdpbusd %8, %8, %3;"
                             "vpdpbusd %8, %8, %4; vpdpbusd %8, %8, %5; vpdpbusd %8, %8, %6; vpdpbusd %8, %8, %7"
                             : "+v"(a), "+v"(b), "+v"(c), "+v"(d), "+v"(e), "+v"(f), "+v"(g), "+v"(h)
                             : "v"(x));
        }
    }
#else
    static constexpr int MULTIPLY_ADDS = 0;
    static void multiply_add(int) {}
#endif

    Buffer flush_;
    std::map<int, std::unique_ptr<Workers>> workers_;
    std::map<int, double> bandwidth_, peak_;
    std::atomic<uint64_t> sink_{ 0 };
};

struct Result {
    Case c;
    bool cold;
    // By backend name: microseconds.
    std::map<std::string, double> median_us, min_us, nmse;
    double bytes, store_us, floor_us;

    double of(const std::string & name) const {
        const auto it = median_us.find(name);
        return it == median_us.end() ? NEVER : it->second;
    }
    double ratio(const std::string & name, bool min = false) const {
        const auto & us = min ? min_us : median_us;
        const auto it = us.find(name);
        return it == us.end() ? NEVER : it->second / us.at("kvq");
    }
    double column(const std::string & name) const {
        if (name == "us_kvq") { return of("kvq"); }
        if (name == "ratio_f16") { return ratio("f16"); }
        if (name == "ratio_q4_0") { return ratio("q4_0"); }
        die("no column " + name);
    }
    // Multiply-adds a second.
    double ops_per_s() const { return c.ops() / of("kvq") * 1e6; }
    double gb_per_s() const { return bytes / of("kvq") / 1e3; }
};

struct Options {
    bool quick = false, check = false, stock = true, cpu_time = false;
    int runs = 9;
    const char * csv = nullptr;
    std::vector<Case> cases;
};

// Runs that are worth the time: a whole number of `wanted` unless one run takes seconds.
int runs_of(double seconds, int wanted) {
    return seconds < 0.005 ? 4 * wanted : seconds < 0.5 ? wanted : seconds < 2 ? 3 : 0;
}

std::vector<Result> measure(const Case & c, const Options & options, Machine & machine) {
    const Inputs inputs(c);
    Workers & workers = machine.workers(c.threads);

    std::vector<std::unique_ptr<Backend>> owned;
    owned.push_back(std::make_unique<Kvq>(c, inputs, workers));
    const auto * kvq = static_cast<Kvq *>(owned[0].get());
    if (options.stock) {
        // ggml sums f16 outputs in half precision, so that the error grows with the cells; elsewhere it rounds queries.
        owned.push_back(std::make_unique<Stock>(c, inputs, workers, GGML_TYPE_F16, "f16", 5e-3));
        owned.push_back(std::make_unique<Stock>(c, inputs, workers, GGML_TYPE_Q8_0, "q8_0", 1e-3));
        owned.push_back(std::make_unique<Stock>(c, inputs, workers, GGML_TYPE_Q4_0, "q4_0", 1e-3));
    }
    std::vector<Backend *> backends;
    for (auto & b : owned) {
        backends.push_back(b.get());
    }
    fill(c, backends);

    Result base = { c, true, {}, {}, {}, kvq->bytes(), kvq->store_us(), 0 };
    // No attention is faster than reading its bytes once, nor than its multiply-adds at the rate of an int8 dot product
    // that waits for nothing.
    const double peak = machine.int8_peak(c.threads);
    base.floor_us = 1e6 * std::max(base.bytes / machine.bandwidth(c.threads), peak > 0 ? c.ops() / peak : 0.0);

    std::map<std::string, double> first;
    for (Backend * b : backends) {
        const double start = now();
        b->run();
        first[b->name] = now() - start;
        const double error = base.nmse[b->name] = nmse(c, inputs, *b);
        if (!(error <= b->nmse_bound)) {
            fprintf(stderr, "bench: %s: %s is wrong: NMSE %.2e, bound %.0e\n", c.key().c_str(), b->name, error,
                    b->nmse_bound);
            exit(1);
        }
    }
    std::vector<Result> results;
    for (bool cold : { true, false }) {
        std::map<std::string, std::vector<double>> us;
        int rounds = 0;
        for (Backend * b : backends) {
            rounds = std::max(rounds, runs_of(first[b->name], options.runs));
        }
        // Backends take turns, so that a slow minute of the machine meets all of them.
        for (int round = 0; round < rounds; round++) {
            for (Backend * b : backends) {
                if (round >= runs_of(first[b->name], options.runs)) {
                    continue;
                }
                cold ? machine.flush(c.threads) : b->run();
                const double start = now();
                b->run();
                us[b->name].push_back((now() - start) * 1e6);
            }
        }
        Result r = base;
        r.cold = cold;
        for (Backend * b : backends) {
            // Seconds do not care for the state of the caches: the checked run is the measurement.
            if (us[b->name].empty()) {
                us[b->name].push_back(first[b->name] * 1e6);
            }
            r.median_us[b->name] = median(us[b->name]);
            r.min_us[b->name] = minimum(us[b->name]);
        }
        results.push_back(r);
    }
    return results;
}

void print_head() {
    printf("%-14s %7s %4s %4s %3s %3s %-5s %10s %10s %10s %10s %10s %7s %7s %6s %8s %9s %8s\n", "recipe", "cells", "q",
           "dim", "gqa", "thr", "cache", "kvq us", "(min)", "f16 us", "q8_0 us", "q4_0 us", "x f16", "x q4_0", "GB/s",
           "Gmac/s", "floor us", "store us");
}

void print_row(const Result & r) {
    printf("%-14s %7d %4d %4d %3d %3d %-5s %10.1f %10.1f %10.1f %10.1f %10.1f %7.2f %7.2f %6.1f %8.1f %9.1f %8.2f\n",
           r.c.recipe.c_str(), r.c.n_kv, r.c.n_q, r.c.head_dim, r.c.gqa, r.c.threads, r.cold ? "cold" : "warm",
           r.of("kvq"), r.min_us.at("kvq"), r.of("f16"), r.of("q8_0"), r.of("q4_0"), r.ratio("f16"), r.ratio("q4_0"),
           r.gb_per_s(), r.ops_per_s() / 1e9, r.floor_us, r.store_us);
    fflush(stdout);
}

void write_csv(const char * path, const std::vector<Result> & results) {
    std::ofstream out(path);
    out << "backend,recipe,n_kv,n_q,head_dim,gqa,threads,us_kvq,us_f16,us_q8_0,us_q4_0,ratio_f16,GB/s,ops_per_s,"
           "floor_us,ratio_q4_0,cache,seal_us_per_token,us_kvq_min,us_f16_min,us_q4_0_min,nmse_kvq\n";
    for (const Result & r : results) {
        const auto min = [&](const char * name) { return r.min_us.count(name) ? r.min_us.at(name) : NEVER; };
        out << "cpu-" << kvq_isa() << ",\"" << r.c.recipe << "\"," << r.c.n_kv << ',' << r.c.n_q << ',' << r.c.head_dim
            << ',' << r.c.gqa << ',' << r.c.threads << ',' << r.of("kvq") << ',' << r.of("f16") << ',' << r.of("q8_0")
            << ',' << r.of("q4_0") << ',' << r.ratio("f16") << ',' << r.gb_per_s() << ',' << r.ops_per_s() << ','
            << r.floor_us << ',' << r.ratio("q4_0") << ',' << (r.cold ? "cold" : "warm") << ',' << r.store_us << ','
            << min("kvq") << ',' << min("f16") << ',' << min("q4_0") << ',' << r.nmse.at("kvq") << '\n';
    }
    if (!out.flush()) {
        die(std::string("cannot write ") + path);
    }
}

// Number of bars that are missed; bars of cases that were not measured do not count.
int check(const std::vector<Result> & results) {
    const auto find = [&](const std::string & key) -> const Result * {
        for (const Result & r : results) {
            if (r.cold && r.c.key() == key) {
                return &r;
            }
        }
        return nullptr;
    };
    int missed = 0;
    for (const Bar & bar : BARS) {
        const Result *of = find(bar.of), *by = bar.by.empty() ? of : find(bar.by);
        if (!of || !by) {
            continue;
        }
        const double value = of->column(bar.column) / (bar.by.empty() ? 1.0 : by->column(bar.column));
        const bool met = bar.at_least ? value >= bar.bound : value <= bar.bound;
        printf("%-6s %s of %s%s%s: %.2f, bar %s %.1f\n", met ? "met" : "MISSED", bar.column, bar.of.c_str(),
               bar.by.empty() ? "" : " / ", bar.by.c_str(), value, bar.at_least ? ">=" : "<=", bar.bound);
        missed += !met;
    }
    return missed;
}

std::string cpu_model() {
    std::ifstream info("/proc/cpuinfo");
    for (std::string line; std::getline(info, line);) {
        if (line.rfind("model name", 0) == 0) {
            return line.substr(line.find(':') + 2);
        }
    }
    return "unknown CPU";
}

const char USAGE[] =
    "usage: bench [--quick] [--check] [--no-stock] [--cpu-time] [--runs N] [--csv FILE] [--case CASE]...\n"
    "  --quick     decode at 4096, 16384 and 32768 cells only\n"
    "  --check     fail if a bar is missed\n"
    "  --no-stock  kvq alone\n"
    "  --cpu-time  one thread, and its CPU time instead of elapsed time: steadier on a busy machine\n"
    "  --runs      timed runs of anything that takes less than half a second (default 9; 4 times that below 5 ms)\n"
    "  --case      this instead of the table: RECIPE/CELLS/QUERIES/DIM/GQA/THREADS,\n"
    "              e.g. skvq:k=2,v=2/32768/1/128/4/2\n";

Case parse_case(const std::string & text) {
    Case c;
    char recipe[256];
    const int n_read =
        sscanf(text.c_str(), "%255[^/]/%d/%d/%d/%d/%d", recipe, &c.n_kv, &c.n_q, &c.head_dim, &c.gqa, &c.threads);
    if (n_read != 6 || c.n_q < 1 || c.n_q > UBATCH || c.n_kv <= c.n_q || c.gqa < 1 || c.threads < 1) {
        die("--case " + text + ": use RECIPE/CELLS/QUERIES/DIM/GQA/THREADS, at most 512 queries and fewer than cells");
    }
    c.recipe = recipe;
    return c;
}

Options parse(int argc, char ** argv) {
    Options o;
    for (int i = 1; i < argc; i++) {
        const std::string arg = argv[i];
        const auto value = [&] {
            if (i + 1 == argc) {
                die(arg + " needs a value");
            }
            return argv[++i];
        };
        if (arg == "--quick") { o.quick = true; }
        else if (arg == "--check") { o.check = true; }
        else if (arg == "--no-stock") { o.stock = false; }
        else if (arg == "--cpu-time") { o.cpu_time = true; }
        else if (arg == "--runs") { o.runs = std::max(1, atoi(value())); }
        else if (arg == "--csv") { o.csv = value(); }
        else if (arg == "--case") { o.cases.push_back(parse_case(value())); }
        else {
            fputs(USAGE, stderr);
            exit(2);
        }
    }
    if (o.cases.empty()) {
        o.cases = o.quick ? QUICK : FULL;
    }
    if (o.cpu_time) {
        g_clock = CLOCK_PROCESS_CPUTIME_ID;
        for (Case & c : o.cases) {
            c.threads = 1;
        }
    }
    return o;
}

}  // namespace

int main(int argc, char ** argv) {
    const Options options = parse(argc, argv);
    Machine machine;
    double load = 0;
    if (getloadavg(&load, 1) != 1) {
        load = -1;
    }
    printf("%s, %ld cores, load %.1f; kvq %s (%s, %s), ggml %s (%s)\n", cpu_model().c_str(),
           sysconf(_SC_NPROCESSORS_ONLN), load, kvq_version(), KVQ_COMMIT, kvq_isa(), ggml_version(), ggml_commit());
    for (int threads = 1; threads <= (options.cpu_time ? 1 : 2); threads++) {
        printf("%d thread%s: reads %.1f GB/s, int8 %.0f G multiply-adds/s\n", threads, threads == 1 ? "" : "s",
               machine.bandwidth(threads) / 1e9, machine.int8_peak(threads) / 1e9);
    }
    print_head();
    std::vector<Result> results;
    for (const Case & c : options.cases) {
        for (const Result & r : measure(c, options, machine)) {
            print_row(r);
            results.push_back(r);
        }
    }
    if (options.csv) {
        write_csv(options.csv, results);
    }
    return options.check && check(results) > 0 ? 1 : 0;
}
