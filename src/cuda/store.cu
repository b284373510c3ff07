// The store step; see src/store.rs, which it follows byte for byte. A block has a KV head, with both sides where one decides
// for the other. Where pages do not depend on those before them, several blocks take them in turn; then what comes before
// and after all pages are launches of their own: who enters the outlier pool is decided before, page by page.
#include "channel.cuh"
#include "aqua_seal.cuh"
#include "few.cuh"

namespace kvq::store {

__device__ __forceinline__ Seal seal_of(int source) {
    return source & RECORD_FRESH ? Seal::FRESH : source & RECORD_RENEW ? Seal::RENEW : Seal::JOIN;
}

// Puts the rows that page `index` keeps between its records. Ends with a barrier.
__device__ __forceinline__ void add_kept(const Store &b, uint32_t first, uint32_t index) {
    Scratch &s = b.s;
    const StoreStep &p = b.p;
    const uint32_t page = p.layer.page, token = b.thread;
    const int *bits = p.plan + p.plan_at.page_bits[1] + index * (page / 32);
    if (token < page) s.record_of[token] = NONE;
    __syncthreads();
    if (token < s.n_records) s.record_of[s.at[token]] = uint16_t(token);
    __syncthreads();
    const auto is_listed = [&](uint32_t token) { return s.record_of[token] != NONE || (uint32_t(bits[token / 32]) >> token % 32 & 1); };
    if (token < page) {
        uint32_t i = 0;
        for (uint32_t before = 0; before < token; before++) i += is_listed(before) ? 1 : 0;
        if (token == page - 1) s.n_rows = i + (is_listed(token) ? 1 : 0);
        if (is_listed(token)) {
            const uint32_t record = s.record_of[token];
            s.at[i] = uint16_t(token);
            s.source[i] = record == NONE ? KEPT : p.plan[p.plan_at.records + 2 * (first + record) + 1] & ~RECORD_RENEW;
        }
    }
    __syncthreads();
}

// Reads the records of one page, the first of which is number `first`. Ends with a barrier.
__device__ __forceinline__ void read_records(const Store &b, uint32_t first, uint32_t n_records) {
    Scratch &s = b.s;
    const StoreStep &p = b.p;
    const int *records = p.plan + p.plan_at.records;
    const uint32_t page = p.layer.page, index = uint32_t(records[2 * first]) / page, i = b.thread, j = first + i;
    if (i == 0) s.n_exact = 0;
    if (i < page) s.pooled[i] = NONE, s.attention[i] = 1.f;
    if (i < page && j < n_records && uint32_t(records[2 * j]) / page == index) {
        s.at[i] = uint16_t(uint32_t(records[2 * j]) % page);
        s.source[i] = records[2 * j + 1] & ~(RECORD_FRESH | RECORD_RENEW);
        if (j + 1 == n_records || uint32_t(records[2 * j + 2]) / page != index) s.n_records = s.n_rows = i + 1;
    }
    __syncthreads();
    if (seal_of(records[2 * first + 1]) == Seal::RENEW) add_kept(b, first, index);
}

// Encodes a page, one side of it. FRAMES as of decode_row: then these are keys.
template <bool FRAMES> __device__ __forceinline__ void seal_side(const Store &b, const Side &side, uint32_t page, Seal seal, bool is_key, float *note) {
    const LayerDesc &l = b.p.layer;
    const bool fresh = seal == Seal::FRESH;
    const Target target = {side, side.header(page), side.page(page), seal != Seal::JOIN, is_key};
    gather<FRAMES>(b, target, page, seal);
    if (!FRAMES && is_key && l.attn_window > 0) find_attention(b, side);
    if (is_key && !fresh && b.p.rotation.n_pairs > 0) turn_back(b, page, side.desc.head_dim);
    if (is_key) {
        mean_of_rows(b, side.desc.head_dim);
        take_sample(b, side.desc.head_dim);
    }
    if (target.fresh) clear_page(b, target);
    if (FRAMES) {
        seal_framed(b, target, page, seal);
    } else if (is_key && side.desc.codec == CODEC_CHANNEL) {
        seal_channels(b, target);
    } else {
        seal_tokens(b, target);
    }
    if (is_key) learn_error<FRAMES>(b, target, note);
}

// Encodes a page whose keys have a frame, and may predict its values.
__device__ __forceinline__ void seal_in_frame(const Store &b, const Side &keys, const Side &values, bool has_keys, bool has_values, uint32_t page, Seal seal, float *note) {
    const bool predicts = b.p.layer.predicts != 0;
    const Store of_values = predicts ? b.beside() : b;
    const Target target = {values, values.header(page), values.page(page), seal != Seal::JOIN, false};
    if (predicts) gather_predicted(b, keys, target, page, seal);
    if (has_keys) seal_side<true>(b, keys, page, seal, true, note);
    if (!has_values) return;
    if (predicts) take_predicted(b, keys, page);
    else gather<true>(b, target, page, seal);
    if (target.fresh) clear_page(b, target);
    seal_tokens(of_values, target);
}

// Writes the ubatch's rows that stay exact to their slots, those of one turn.
__device__ __forceinline__ void write_slots(const Store &b, const Side &keys, const Side &values, bool has_keys, bool has_values, uint32_t turn, uint32_t turns) {
    constexpr uint32_t PARTS = MAX_DIM / 32;
    const uint32_t stride = STORE_WARPS * turns;
    for (uint32_t first = STORE_WARPS * turn + b.warp; first < b.p.n_tokens; first += 32 * stride) {
        const uint32_t own = first + b.lane * stride;
        const int slot_of_lane = own < b.p.n_tokens ? b.plan(b.p.plan_at.row_slots + own) : -1;
        for (uint32_t exact = __ballot_sync(FULL, slot_of_lane >= 0); exact != 0; exact &= exact - 1) {
            const uint32_t from = uint32_t(__ffs(exact)) - 1, slot = uint32_t(__shfl_sync(FULL, slot_of_lane, from));
            // Both sides' rows are on their way together.
            float x[2][PARTS];
            const auto read = [&](const Side &side, float(&x)[PARTS]) {
                const float *row = side.current + size_t(first + from * stride) * side.stride_token;
#pragma unroll
                for (uint32_t i = 0; i < PARTS; i++) x[i] = row[min(b.lane + 32 * i, side.desc.head_dim - 1)];
            };
            const auto write = [&](const Side &side, const float(&x)[PARTS]) {
                uint16_t *row = side.slot(slot);
#pragma unroll
                for (uint32_t i = 0; i < PARTS; i++)
                    if (b.lane + 32 * i < side.desc.head_dim) row[b.lane + 32 * i] = float_to_half(finite(x[i]));
            };
            if (has_keys) read(keys, x[0]);
            if (has_values) read(values, x[1]);
            if (has_keys) write(keys, x[0]);
            if (has_values) write(values, x[1]);
        }
    }
}

// What comes before any page: forgetting, queries, members of the pool that are gone. Ends with a barrier.
template <bool FRAMES> __device__ __forceinline__ void learn(const Store &b, const Side &keys, const Side &values, bool has_keys, bool has_values) {
    const StoreStep &p = b.p;
    if (b.plan(p.plan_at.starts_anew)) {
        if (has_keys) forget(b, keys);
        if (has_values) forget(b, values);
    }
    if (has_keys && p.q != nullptr && p.n_tokens > 0) {
        if (p.n_query_blocks == 0) learn_queries(b, keys);
        if (!FRAMES && p.lse != nullptr && p.layer.attn_window > 0) remember_queries(b, keys);
    }
    if (!FRAMES && p.layer.pool_rows > 0) drop_stale(b, keys, values, has_keys, has_values);
    else __syncthreads();
}

// What a head's blocks leave each other between launches, in StoreParams::notes.
struct Notes {
    float *first;  // null: one block has all pages of the head
    uint32_t n_pages;

    __device__ __forceinline__ bool exist() const { return first != nullptr; }
    __device__ __forceinline__ float *error(uint32_t page) const { return exist() ? first + 1 + 3 * page : nullptr; }
    // The row of the pool that a record enters, or NONE.
    __device__ __forceinline__ uint16_t &pooled(uint32_t record) const { return reinterpret_cast<uint16_t *>(first + 1 + 3 * n_pages)[record]; }
};

// Calls `f(page, seal, number, first record)` for every page whose number is `turn` modulo `turns`, its records read; returns the number of
// pages.
template <class F> __device__ __forceinline__ uint32_t for_each_page(const Store &b, uint32_t turn, uint32_t turns, F f) {
    const StoreStep &p = b.p;
    const uint32_t n_records = uint32_t(b.plan(p.plan_at.n_records));
    uint32_t n_pages = 0;
    for (uint32_t first = 0, n_rows; first < n_records; first += n_rows, n_pages++) {
        const int *record = p.plan + p.plan_at.records + 2 * first;
        read_records(b, first, n_records);
        n_rows = b.s.n_records;
        if (n_pages % turns == turn) f(uint32_t(record[0]) / p.layer.page, seal_of(record[1]), n_pages, first);
        __syncthreads();
    }
    return n_pages;
}

// Chooses the rows of a fresh page that enter the pool and writes them. Ends with a barrier.
__device__ __forceinline__ void fill_pool(const Store &b, const Side &keys, const Side &values, uint32_t page) {
    give_back(b, keys, page);
    give_back(b, values, page);
    measure_members(b, keys);
    gather<false>(b, {keys, keys.header(page), keys.page(page), true, true}, page, Seal::FRESH);
    trace_outliers(b, keys);
    write_pooled(b, keys, page);
    write_pooled(b, values, page);
}

// The same for all pages of a head, before they are sealed by several blocks.
__device__ __forceinline__ void fill_pool_of_all(const Store &b, const Side &keys, const Side &values, const Notes &notes) {
    for_each_page(b, 0, 1, [&](uint32_t page, Seal seal, uint32_t, uint32_t first) KVQ_INLINE_LAMBDA {
        if (seal != Seal::FRESH) return;
        fill_pool(b, keys, values, page);
        if (b.thread < b.s.n_rows) notes.pooled(first + b.thread) = b.s.pooled[b.thread];
    });
}

// What fill_pool has chosen for a fresh page. Ends with a barrier.
__device__ __forceinline__ void recall_pooled(const Store &b, const Notes &notes, uint32_t first) {
    if (b.thread < b.s.n_rows) {
        b.s.pooled[b.thread] = notes.pooled(first + b.thread);
        if (b.s.pooled[b.thread] != NONE) atomicAdd(&b.s.n_exact, 1u);
    }
    __syncthreads();
}

// Seals the pages of a block.
template <bool FRAMES> __device__ __forceinline__ void seal_pages(const Store &b, const Side &keys, const Side &values, bool has_keys, bool has_values, uint32_t turn, uint32_t turns, const Notes &notes) {
    const uint32_t n_pages = for_each_page(b, turn, turns, [&](uint32_t page, Seal seal, uint32_t number, uint32_t first) KVQ_INLINE_LAMBDA {
        if (!FRAMES && b.p.layer.pool_rows > 0 && seal == Seal::FRESH) {
            if (notes.exist()) recall_pooled(b, notes, first);
            else fill_pool(b, keys, values, page);
        }
        if (FRAMES) return seal_in_frame(b, keys, values, has_keys, has_values, page, seal, notes.error(number));
        if (has_keys) seal_side<false>(b, keys, page, seal, true, notes.error(number));
        if (has_values) seal_side<false>(b, values, page, seal, false, nullptr);
    });
    if (notes.exist() && has_keys && turn == 0 && b.thread == 0) notes.first[0] = __uint_as_float(n_pages);
}

// Asks for what a head has learned, which lies in main memory, while the kernel before this one still runs.
__device__ __forceinline__ void prefetch_learned(const Store &b, const Side &side) {
    const uint64_t end = max(side.desc.learned_end, side.desc.pool_table + 4 * b.p.layer.pool_rows);
    for (uint64_t at = side.desc.pool_table + 128 * b.thread; at < end; at += 128 * STORE_THREADS) prefetch(side.region + at);
}

template <bool FRAMES> __device__ __forceinline__ void store(const StoreParams &p, uint8_t *shared) {
    const uint32_t thread = threadIdx.x;
    const StoreStep step(p);
    float *rows = step.rows == nullptr ? reinterpret_cast<float *>(shared + STORE_SCRATCH_BYTES) : step.rows;
    const Store b = {step, *reinterpret_cast<Scratch *>(shared), rows, blockIdx.x, thread, thread % 32, thread / 32};
    const Side keys = keys_of(b), values = values_of(b);
    const bool has_keys = blockIdx.y < step.n_key_blocks, has_values = !has_keys || step.n_value_blocks == 0;
    if (blockIdx.y >= step.n_key_blocks + step.n_value_blocks) {
        wait_for_stream();
        let_next_start();
        learn_many(b, keys, blockIdx.y - step.n_key_blocks - step.n_value_blocks, reinterpret_cast<float *>(shared + STORE_SCRATCH_BYTES));
        return;
    }
    const Notes notes = {step.notes, step.n_pages};
    const uint32_t turn = has_keys ? blockIdx.y : blockIdx.y - step.n_key_blocks, turns = has_keys ? step.n_key_blocks : step.n_value_blocks;
    if (step.phases & STORE_FEW) {
        const bool is_early = step.phases & STORE_EARLY;
        if (!is_early) wait_for_stream();
        FewRows rows;
        rows.read(b, keys, values, has_keys, has_values);
        __syncthreads();
        if (is_early) wait_for_stream();
        let_next_start();
        if (likely(rows.is_plain)) return rows.write(b, keys, values, has_keys, has_values);
    } else {
        if (step.phases & STORE_LEARN) {
            if (has_keys) prefetch_learned(b, keys);
            if (has_values) prefetch_learned(b, values);
        }
        wait_for_stream();
        let_next_start();
    }
    if (step.phases & STORE_LEARN) {
        learn<FRAMES>(b, keys, values, has_keys, has_values);
        if (!FRAMES && step.layer.pool_rows > 0 && notes.exist()) fill_pool_of_all(b, keys, values, notes);
    }
    if (step.phases & STORE_SEAL) seal_pages<FRAMES>(b, keys, values, has_keys, has_values, turn, turns, notes);
    if (step.phases & STORE_FINISH) {
        if (notes.exist() && has_keys && turn == 0 && thread == 0) {
            const uint32_t n_pages = __float_as_uint(notes.first[0]);
            for (uint32_t i = 0; i < n_pages; i++) {
                const float *note = notes.error(i);
                add_error(keys.learned(), keys.desc.head_dim, {note[0], note[1], note[2]});
            }
        }
        if (step.n_query_blocks > 0 && has_keys && turn == 0 && thread == 0) learn_many_end(b, keys);
        // Records read slots as they were before.
        write_slots(b, keys, values, has_keys, has_values, turn, turns);
    }
}

KVQ_KERNEL(kvq_store_any, STORE_THREADS, 1, StoreParams) {
    KVQ_SHARED(shared);
    store<false>(p, shared);
}
KVQ_KERNEL(kvq_store_aqua, STORE_THREADS, 1, StoreParams) {
    KVQ_SHARED(shared);
    store<true>(p, shared);
}

}  // namespace kvq::store

#ifdef KVQ_EMULATE
// For a test that compares it with its twin.
extern "C" float kvq_emulated_exp_of_negative(float x) { return kvq::store::exp_of_negative(x); }
#endif
