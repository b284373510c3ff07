// kvq's packed cache, filled and read by the calls that llama.cpp's glue makes.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>

#include "base.h"
#include "buffer.h"
#include "profile.h"
#include "side.h"

namespace {

// Any but the first and last ones, which some recipes treat apart.
constexpr uint32_t LAYER = 2;

class Kvq : public KvqSide {
public:
    Kvq(const Case & c, const std::string & text, const char * name, const Inputs & inputs, Workers & workers)
        : case_(c), inputs_(inputs), workers_(workers) {
        this->name = name;
        nmse_bound = 1e-3;
        const uint32_t dim = c.head_dim;
        const kvq_shape shape = { uint32_t(c.n_heads()), N_KV_HEADS, dim, dim };
        kvq_recipe * recipe;
        ok(kvq_recipe_parse(text.c_str(), &recipe));
        recipe = with_profile(recipe, shape, LAYER);
        ok(kvq_planner_new(recipe, c.n_kv, 1, 1, &planner_));
        ok(kvq_layout_new(recipe, &shape, LAYER, c.n_kv, kvq_planner_n_slots(planner_), &layout_));
        kvq_recipe_free(recipe);
        k_mem_ = std::make_unique<Buffer>(kvq_layout_k_bytes(layout_), LARGE_PAGE);
        v_mem_ = std::make_unique<Buffer>(kvq_layout_v_bytes(layout_), LARGE_PAGE);
        n_splits_ = kvq_attend_splits(layout_, c.n_q, workers.size());
        const size_t n_rows = size_t(c.n_q) * c.n_heads();
        out_.resize(n_rows * dim);
        lse_.resize(n_rows);
        partial_.resize(n_splits_ > 1 ? n_splits_ * n_rows * (dim + 2) : 0);
        location_.resize(c.n_kv);
        positions_.resize(c.n_kv);
        std::iota(positions_.begin(), positions_.end(), 0);
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
        args.positions = positions_.data();
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
    double bytes() const override {
        return double(kvq_layout_k_bytes(layout_)) + kvq_layout_v_bytes(layout_) + 2.0 * inputs_.mask.size() + 4.0 * inputs_.q.size() +
               4.0 * (k_cur_.size() + v_cur_.size());
    }
    double store_us() const override { return median(store_us_); }

private:
    const Case & case_;
    const Inputs & inputs_;
    Workers & workers_;
    kvq_planner * planner_;
    kvq_layout * layout_;
    std::unique_ptr<Buffer> k_mem_, v_mem_;
    uint32_t n_splits_;
    std::vector<float> out_, lse_, partial_, k_cur_, v_cur_;
    std::vector<int32_t> plan_, positions_;
    std::vector<kvq_location> location_;
    std::vector<double> store_us_;
};

}  // namespace

std::unique_ptr<KvqSide> make_kvq(const Case & c, const std::string & recipe, const char * name, const Inputs & inputs,
                                  Workers & workers) {
    return std::make_unique<Kvq>(c, recipe, name, inputs, workers);
}
