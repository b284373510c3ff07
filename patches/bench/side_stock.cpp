// Stock flash attention over ggml's cache, laid out as llama_kv_cache does: all heads of a cell adjacent.
#include <cstdint>

#include "base.h"
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "side.h"

namespace {

class Stock : public Side {
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

}  // namespace

std::unique_ptr<Side> make_stock(const Case & c, const Inputs & inputs, Workers & workers, ggml_type type,
                                 const char * name, double nmse_bound) {
    return std::make_unique<Stock>(c, inputs, workers, type, name, nmse_bound);
}
