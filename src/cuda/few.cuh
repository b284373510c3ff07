// The step of few tokens that seals no page, which nearly all steps of decoding are: queries are learned, members of the pool that
// are gone leave it, rows go to their slots. Everything is read, each by other threads, before anything is written: reading
// needs not wait for the attention before it.
#pragma once
#include "learn.cuh"

namespace kvq::store {

struct FewRows {
    static constexpr uint32_t PARTS = MAX_DIM / 32;
    bool is_plain;      // the plan asks for nothing else
    float moment = 0.f; // what is new of this thread's channel
    float seen = 0.f;   // by lane 0 of warp 0: how many queries
    uint32_t stale;     // bits of this thread's members of the pool
    int slot;           // of this warp's row, a token's of one side; -1: none
    float x[PARTS];     // the row

    // A warp has a row, which are FEW_ROWS of each side at most.
    __device__ __forceinline__ static uint32_t token_of(const Store &b) { return b.warp / 2; }
    __device__ __forceinline__ static bool is_value(const Store &b) { return b.warp % 2; }
    __device__ __forceinline__ static uint32_t dim_of(const Store &b, const Side &keys, const Side &values) {
        return is_value(b) ? values.desc.head_dim : keys.desc.head_dim;
    }

    __device__ __forceinline__ void read(const Store &b, const Side &keys, const Side &values, bool has_keys, bool has_values) {
        static_assert(STORE_WARPS == 2 * FEW_ROWS, "a warp for a row of each side");
        const StoreStep &p = b.p;
        const int starts_anew = b.plan(p.plan_at.starts_anew), n_records = b.plan(p.plan_at.n_records);
        const bool has_row = token_of(b) < p.n_tokens && (is_value(b) ? has_values : has_keys);
        slot = has_row ? b.plan(p.plan_at.row_slots + token_of(b)) : -1;
        const float *row = is_value(b) ? values.current + token_of(b) * values.stride_token : keys.current + token_of(b) * keys.stride_token;
        const uint32_t dim = has_row ? dim_of(b, keys, values) : 0;
#pragma unroll
        for (uint32_t i = 0; i < PARTS; i++) x[i] = b.lane + 32 * i < dim ? row[b.lane + 32 * i] : 0.f;
        if (has_keys && p.q != nullptr) {
            const Moments of = moments(b, keys);
            moment = of.mean_with(sum_of_few(b, keys));
            seen = of.seen_with();
        }
        stale = 0;
        for (uint32_t turn = 0; turn * MEMBERS_AT_ONCE < 2 * p.layer.pool_rows; turn++)
            stale |= is_stale(b, keys, values, has_keys, has_values, p.plan + p.plan_at.row_cells, turn * MEMBERS_AT_ONCE) ? 1u << turn : 0;
        is_plain = starts_anew == 0 && n_records == 0;
    }

    __device__ __forceinline__ void write(const Store &b, const Side &keys, const Side &values, bool has_keys, bool has_values) const {
        const StoreStep &p = b.p;
        const uint32_t dim = keys.desc.head_dim;
        if (has_keys && p.q != nullptr) {
            if (b.thread < dim) keys.learned()[b.thread] = moment;
            if (b.thread == 0) keys.learned()[dim] = seen;
        }
        for (uint32_t turn = 0; turn * MEMBERS_AT_ONCE < 2 * p.layer.pool_rows; turn++)
            if (stale >> turn & 1) *member_entry(b, keys, values, has_keys, has_values, turn * MEMBERS_AT_ONCE) = 0;
        if (slot < 0) return;
        uint16_t *to = is_value(b) ? values.slot(slot) : keys.slot(slot);
#pragma unroll
        for (uint32_t i = 0; i < PARTS; i++)
            if (b.lane + 32 * i < dim_of(b, keys, values)) to[b.lane + 32 * i] = float_to_half(finite(x[i]));
    }
};

}  // namespace kvq::store
