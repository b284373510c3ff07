// What a store keeps beside rows: how large queries are, recent queries, the outlier pool, how far packed keys are off.
// The twin of src/learned.rs, src/recent.rs and src/pool.rs.
#pragma once
#include "seal.cuh"

namespace kvq::store {

// Makes a side as new, but for how far packed keys are off. Ends with a barrier.
__device__ __forceinline__ void forget(const Store &b, const Side &side) {
    const uint64_t error = side.desc.learned + 4 * (side.desc.head_dim + 1), is_key = side.desc.learned_end > side.desc.learned;
    // learn_many does that for the moments.
    const bool keeps_moments = b.p.n_query_blocks > 0;
    uint32_t *words = reinterpret_cast<uint32_t *>(side.region + side.desc.pool_table);
    for (uint64_t i = b.thread; i < (side.desc.recent_end - side.desc.pool_table) / 4; i += STORE_THREADS) {
        const uint64_t at = side.desc.pool_table + 4 * i;
        const bool is_error = at >= error && at < error + 12, is_moment = at >= side.desc.learned && at < error;
        if (!(is_key && (is_error || (is_moment && keeps_moments)))) words[i] = 0;
    }
    __syncthreads();
}

// The mean square of a thread's channel of the queries, of how many queries, and how many there are now.
struct Moments {
    float mean, seen, n;

    __device__ __forceinline__ float mean_with(float sum) const { return mean + (sum - mean * n) / (seen + n); }
    __device__ __forceinline__ float seen_with() const { return fminf(seen + n, 4096.f); }
};
__device__ __forceinline__ Moments moments(const Store &b, const Side &keys) {
    const float *means = keys.learned();
    return {b.thread < keys.desc.head_dim ? means[b.thread] : 0.f, means[keys.desc.head_dim], float(b.p.n_tokens * b.p.layer.gqa_ratio)};
}

// A query row of a head.
__device__ __forceinline__ const float *query_row(const Store &b, uint32_t row) {
    const StoreStep &p = b.p;
    const uint32_t gqa = p.layer.gqa_ratio;
    return p.q + row / gqa * p.q_stride_token + (b.head * gqa + row % gqa) * p.q_stride_head;
}

// The sum of squares of a thread's channel, in the order of the rows, of which there are FEW_ROWS at most.
__device__ __forceinline__ float sum_of_few(const Store &b, const Side &keys) {
    const uint32_t dim = keys.desc.head_dim, n_rows = b.p.n_tokens * b.p.layer.gqa_ratio, c = b.thread;
    float x[FEW_ROWS], sum = 0.f;
#pragma unroll
    for (uint32_t i = 0; i < FEW_ROWS; i++) x[i] = c < dim && i < n_rows ? finite(query_row(b, i)[c]) : 0.f;
#pragma unroll
    for (uint32_t i = 0; i < FEW_ROWS; i++)
        if (i < n_rows) sum += x[i] * x[i];
    return sum;
}

// Adds the squares of the queries to the moments. No barrier at the end.
__device__ __forceinline__ void learn_queries(const Store &b, const Side &keys) {
    const uint32_t dim = keys.desc.head_dim, n_rows = b.p.n_tokens * b.p.layer.gqa_ratio, c = b.thread;
    const Moments before = moments(b, keys);
    float sum = 0.f;
    const auto row_of = [&](uint32_t row) { return RowAt{query_row(b, row), false}; };
    // In the order of the rows.
    const auto add = [&](uint32_t n_here) {
        __syncthreads();
        if (c < dim) {
#pragma unroll 8
            for (uint32_t i = 0; i < n_here; i++) sum += b.row(i)[c] * b.row(i)[c];
        }
        __syncthreads();
    };
    constexpr uint32_t N = 4, AT_ONCE = N * STORE_WARPS;
    static_assert(AT_ONCE <= 64, "there is room for the rows of a page");
    if (n_rows <= FEW_ROWS) {
        sum = sum_of_few(b, keys);
        // All have read how many were seen.
        __syncthreads();
    } else if (dim <= 128) {
        // What is read next is on its way while sums are made.
        RowsAhead<N> rows;
        rows.read(b, b.warp, n_rows, 0, dim, row_of);
#pragma unroll 1
        for (uint32_t first = 0; first < n_rows; first += AT_ONCE) {
            const uint32_t n_here = min(AT_ONCE, n_rows - first);
            rows.put<true>(b, b.warp, n_here, 0, dim);
            rows.read(b, first + AT_ONCE + b.warp, n_rows, 0, dim, row_of);
            add(n_here);
        }
    } else {
#pragma unroll 1
        for (uint32_t first = 0; first < n_rows; first += AT_ONCE) {
            const uint32_t n_here = min(AT_ONCE, n_rows - first);
            copy_rows<true>(b, n_here, dim, [&](uint32_t i) { return row_of(first + i); });
            add(n_here);
        }
    }
    if (c < dim) keys.learned()[c] = before.mean_with(sum);
    if (c == 0) keys.learned()[dim] = before.seen_with();
}

// The same for 32 channels of many queries, by a block of its own; learn_many_end says how many they were, once all blocks have read it.
// `buffer`: [QUERIES_AT_ONCE][32].
__device__ __forceinline__ void learn_many(const Store &b, const Side &keys, uint32_t slice, float *buffer) {
    constexpr uint32_t N = QUERIES_AT_ONCE / STORE_WARPS;
    const uint32_t dim = keys.desc.head_dim, n_rows = b.p.n_tokens * b.p.layer.gqa_ratio, c = 32 * slice + b.lane, channel = min(c, dim - 1);
    float x[N], sum = 0.f;
    const auto read = [&](uint32_t first) {
#pragma unroll
        for (uint32_t i = 0; i < N; i++) x[i] = query_row(b, min(first + b.warp + i * STORE_WARPS, n_rows - 1))[channel];
    };
    read(0);
#pragma unroll 1
    for (uint32_t first = 0; first < n_rows; first += QUERIES_AT_ONCE) {
#pragma unroll
        for (uint32_t i = 0; i < N; i++) buffer[32 * (b.warp + i * STORE_WARPS) + b.lane] = finite(x[i]);
        __syncthreads();
        // What is read next is on its way while sums are made, in the order of the rows.
        if (first + QUERIES_AT_ONCE < n_rows) read(first + QUERIES_AT_ONCE);
        if (b.warp == 0) {
#pragma unroll 8
            for (uint32_t i = 0; i < min(QUERIES_AT_ONCE, n_rows - first); i++) sum += buffer[32 * i + b.lane] * buffer[32 * i + b.lane];
        }
        __syncthreads();
    }
    if (b.warp != 0 || c >= dim) return;
    float *means = keys.learned();
    const bool is_new = b.plan(b.p.plan_at.starts_anew);
    const Moments before = {is_new ? 0.f : means[c], is_new ? 0.f : means[dim], float(n_rows)};
    means[c] = before.mean_with(sum);
}
__device__ __forceinline__ void learn_many_end(const Store &b, const Side &keys) {
    float &seen = keys.learned()[keys.desc.head_dim];
    const Moments before = {0.f, b.plan(b.p.plan_at.starts_anew) ? 0.f : seen, float(b.p.n_tokens * b.p.layer.gqa_ratio)};
    seen = before.seen_with();
}

// Puts the last queries into the ring. Ends with a barrier.
__device__ __forceinline__ void remember_queries(const Store &b, const Side &keys) {
    const StoreStep &p = b.p;
    const uint32_t dim = keys.desc.head_dim, gqa = p.layer.gqa_ratio, window = p.layer.attn_window;
    uint32_t *count = reinterpret_cast<uint32_t *>(keys.region + keys.desc.recent);
    const uint32_t seen = *count, n = min(p.n_tokens, window), entry_words = dim / 2 + 1;
    for (uint32_t i = b.warp; i < n * gqa; i += STORE_WARPS) {
        const uint32_t token = p.n_tokens - n + i / gqa, head = b.head * gqa + i % gqa;
        uint32_t *entry = count + 1 + ((seen + token) % window * gqa + i % gqa) * entry_words;
        const float *q = p.q + token * p.q_stride_token + head * p.q_stride_head;
        for (uint32_t c = b.lane; c < dim; c += 32) {
            reinterpret_cast<uint16_t *>(entry)[c] = float_to_half(finite(q[c]) * p.scale);
        }
        if (b.lane == 0) entry[dim / 2] = __float_as_uint(p.lse[token * p.layer.n_heads + head]);
    }
    __syncthreads();
    const uint32_t total = seen + p.n_tokens;
    if (b.thread == 0) *count = total % window + (total >= window ? window : 0);
    __syncthreads();
}

// The largest attention weight of each row under the queries of the ring; 1 without any. Ends with a barrier.
__device__ __forceinline__ void find_attention(const Store &b, const Side &keys) {
    Scratch &s = b.s;
    const uint32_t dim = keys.desc.head_dim, entry_words = dim / 2 + 1;
    const uint32_t *count = reinterpret_cast<const uint32_t *>(keys.region + keys.desc.recent);
    const uint32_t n_entries = min(*count, b.p.layer.attn_window) * b.p.layer.gqa_ratio;
    // As many threads for a row as there are enough of; they take entries in turn.
    const uint32_t share = b.thread / MAX_PAGE, row_of = b.thread % MAX_PAGE;
    float most = -infinity();
    if (row_of < s.n_rows) {
        const float *key = b.row(row_of);
        for (uint32_t i = share; i < n_entries; i += STORE_THREADS / MAX_PAGE) {
            const uint32_t *entry = count + 1 + i * entry_words;
            const float lse = __uint_as_float(entry[dim / 2]);
            if (!(fabsf(lse) < infinity())) continue;
            float partial[16] = {};
            for (uint32_t c = 0; c < dim; c += 16) {
#pragma unroll
                for (uint32_t j = 0; j < 16; j++) {
                    const uint32_t word = entry[(c + j) / 2];
                    partial[j] += half_to_float(uint16_t(word >> j % 2 * 16)) * key[c + j];
                }
            }
            float score = 0.f;
#pragma unroll
            for (uint32_t j = 0; j < 16; j++) score += partial[j];
            most = fmaxf(most, score - lse);
        }
    }
    static_assert(STORE_THREADS == 2 * MAX_PAGE, "two threads share a row");
    if (share == 1) s.a[row_of] = most;
    __syncthreads();
    if (share == 0 && row_of < s.n_rows) {
        s.attention[row_of] = n_entries == 0 ? 1.f : exp_of_negative(fminf(fmaxf(most, s.a[row_of]), 0.f));
    }
    __syncthreads();
}

// Members of the pool of both sides that a block looks at at once, keys first: so many lanes for each.
constexpr uint32_t LANES_OF_MEMBER = 4, MEMBERS_AT_ONCE = STORE_THREADS / LANES_OF_MEMBER;

// The entry of a thread's member, of those from `first` on; null: none, or not this block's.
__device__ __forceinline__ uint32_t *member_entry(const Store &b, const Side &keys, const Side &values, bool has_keys, bool has_values, uint32_t first) {
    const uint32_t n_pool = b.p.layer.pool_rows, i = first + b.thread / LANES_OF_MEMBER;
    if (i >= 2 * n_pool || !(i < n_pool ? has_keys : has_values)) return nullptr;
    return i < n_pool ? keys.pool_table() + i : values.pool_table() + (i - n_pool);
}

// Whether the member is to be removed, in the first of its lanes: its cell holds no token any more, or another one, or is named a second
// time. `new_cells`: those of the ubatch's rows.
__device__ __forceinline__ bool is_stale(const Store &b, const Side &keys, const Side &values, bool has_keys, bool has_values, const int *new_cells, uint32_t first) {
    const StoreStep &p = b.p;
    const uint32_t n_pool = p.layer.pool_rows, part = b.lane % LANES_OF_MEMBER, group = b.lane - part;
    const auto is_listed = [&](const int *cells, uint32_t n, uint32_t cell) {
        bool is = false;
#pragma unroll 4
        for (uint32_t j = part; j < n; j += LANES_OF_MEMBER) is |= uint32_t(cells[j]) == cell;
        return is;
    };
    const uint32_t i = first + b.thread / LANES_OF_MEMBER, own = i < n_pool ? i : i - n_pool;
    const uint32_t *at = member_entry(b, keys, values, has_keys, has_values, first);
    const uint32_t entry = at == nullptr ? 0 : *at, cell = entry - 1;
    bool is_gone = false, is_held = false;
    if (entry != 0 && cell < p.layer.n_cells) {
        is_gone = is_listed(new_cells, p.n_tokens, cell) || is_listed(reinterpret_cast<const int *>(at - own), own, entry);
        is_held = uint32_t(b.plan(p.plan_at.page_bits[1] + cell / 32)) >> cell % 32 & 1;
        if (!is_held) is_held = is_listed(p.plan + p.plan_at.slot_cells[1], p.layer.n_slots, cell);
    }
    const uint32_t gone = __ballot_sync(FULL, is_gone), held = __ballot_sync(FULL, is_held), of_group = ((1u << LANES_OF_MEMBER) - 1) << group;
    return part == 0 && entry != 0 && ((gone & of_group) != 0 || (held & of_group) == 0);
}

// Removes the members of both sides that are stale: of those that name a cell the first one stays, whatever other threads have removed. Ends
// with a barrier.
__device__ __forceinline__ void drop_stale(const Store &b, const Side &keys, const Side &values, bool has_keys, bool has_values) {
    // Every member asks for all of them.
    const uint32_t n_tokens = b.p.n_tokens;
    const int *new_cells = b.p.plan + b.p.plan_at.row_cells;
    if (n_tokens <= b.p.layer.page * b.p.row_stride) {
        int *const copy = reinterpret_cast<int *>(b.rows);
        for (uint32_t i = b.thread; i < n_tokens; i += STORE_THREADS) copy[i] = new_cells[i];
        new_cells = copy;
    }
    __syncthreads();
    for (uint32_t first = 0; first < 2 * b.p.layer.pool_rows; first += MEMBERS_AT_ONCE) {
        if (is_stale(b, keys, values, has_keys, has_values, new_cells, first)) *member_entry(b, keys, values, has_keys, has_values, first) = 0;
    }
    __syncthreads();
}

// Takes the cells of a page off the pool. Ends with a barrier.
__device__ __forceinline__ void give_back(const Store &b, const Side &side, uint32_t page) {
    uint32_t *table = side.pool_table();
    for (uint32_t i = b.thread; i < b.p.layer.pool_rows; i += STORE_THREADS) {
        if (table[i] != 0 && (table[i] - 1) / b.p.layer.page == page) table[i] = 0;
    }
    __syncthreads();
}

// The norms of the pool's members to s.b, infinity where it is free; its free rows to s.free_rows, their number to s.most[0].
// The block's rows are lost. Ends with a barrier.
__device__ __forceinline__ void measure_members(const Store &b, const Side &keys) {
    Scratch &s = b.s;
    const uint32_t dim = keys.desc.head_dim, n_pool = b.p.layer.pool_rows, page = b.p.layer.page;
    const uint32_t *table = keys.pool_table();
    for (uint32_t first = 0; first < n_pool; first += page) {
        const uint32_t n = min(page, n_pool - first), i = first + b.thread;
        copy_rows<false>(b, n, dim, [&](uint32_t i) { return RowAt{keys.pool_row(first + i), true}; });
        const bool is_member = b.thread < n && table[i] != 0;
        __syncthreads();
        if (b.thread < n) {
            float norm = 0.f;
#pragma unroll 8
            for (uint32_t c = 0; c < dim; c++) norm += fabsf(b.row(b.thread)[c]);
            s.b[i] = is_member ? norm : infinity();
        }
        __syncthreads();
    }
    if (b.thread < n_pool) {
        const auto is_free = [&](uint32_t i) { return s.b[i] == infinity(); };
        uint32_t before = 0;
        for (uint32_t i = 0; i < b.thread; i++) before += is_free(i) ? 1 : 0;
        if (is_free(b.thread)) s.free_rows[before] = uint16_t(b.thread);
        if (b.thread == n_pool - 1) s.most[0] = before + (is_free(b.thread) ? 1 : 0);
    }
    __syncthreads();
}

// Chooses the rows that enter the pool, whose members are measured. Ends with a barrier.
__device__ __forceinline__ void trace_outliers(const Store &b, const Side &keys) {
    Scratch &s = b.s;
    const uint32_t dim = keys.desc.head_dim, n_pool = b.p.layer.pool_rows, n_places = b.p.layer.pool_outliers;
    for (uint32_t i = b.thread; i < s.n_rows; i += STORE_THREADS) {
        float norm = 0.f;
#pragma unroll 8
        for (uint32_t c = 0; c < dim; c++) norm += fabsf(b.row(i)[c]);
        s.a[i] = norm;
    }
    __syncthreads();
    for (uint32_t i = b.thread; i < s.n_rows; i += STORE_THREADS) {
        const uint32_t taken = place_in_rising(s.a, i, s.n_rows);
        uint32_t smaller = taken;
        for (uint32_t j = 0; j < n_pool; j++) smaller += s.b[j] <= s.a[i] ? 1 : 0;
        // Both grow with the norm, so those that find a place are the smallest.
        const bool enters = smaller < n_places && taken < s.most[0];
        s.pooled[i] = enters ? s.free_rows[taken] : NONE;
        if (enters) atomicAdd(&s.n_exact, 1u);
    }
    __syncthreads();
}

// Writes the rows that enter the pool. Ends with a barrier.
__device__ __forceinline__ void write_pooled(const Store &b, const Side &side, uint32_t page) {
    const Scratch &s = b.s;
    for (uint32_t i = b.warp; i < s.n_rows; i += STORE_WARPS) {
        const uint32_t row = s.pooled[i];
        if (row == NONE) continue;
        for (uint32_t c = b.lane; c < side.desc.head_dim; c += 32) side.pool_row(row)[c] = float_to_half(finite(source_row(b, side, s.source[i])(c)));
        if (b.lane == 0) side.pool_table()[row] = page * b.p.layer.page + s.at[i] + 1;
    }
    __syncthreads();
}

// Keeps some rows as they came, to be compared with what they become. The mean is in s.mean. Ends with a barrier.
__device__ __forceinline__ void take_sample(const Store &b, uint32_t dim) {
    Scratch &s = b.s;
    if (b.thread == 0) {
        s.n_samples = 0;
        const uint32_t step = max(s.n_rows / SAMPLES, 1u);
        for (uint32_t i = 0; i < SAMPLES && i * step < s.n_rows; i++) {
            if (s.pooled[i * step] == NONE) s.sampled[s.n_samples++] = i * step;
        }
    }
    __syncthreads();
    for (uint32_t i = b.warp; i < s.n_samples; i += STORE_WARPS) {
        for (uint32_t c = b.lane; c < dim; c += 32) s.sample[i][c] = b.row(s.sampled[i])[c];
    }
    __syncthreads();
}

struct KeyError {
    float noise, signal, rows;
    __device__ __forceinline__ void add(const KeyError &other) {
        const float total = rows + other.rows;
        if (!(total > 0.f)) return;
        noise += (other.noise - noise) * (other.rows / total);
        signal += (other.signal - signal) * (other.rows / total);
        rows = total;
    }
};

// Adds the error of a page to what is known of a head's keys. By one thread.
__device__ __forceinline__ void add_error(float *learned, uint32_t dim, const KeyError &page) {
    KeyError known = {learned[dim + 1], learned[dim + 2], learned[dim + 3]};
    known.add(page);
    learned[dim + 1] = known.noise, learned[dim + 2] = known.signal, learned[dim + 3] = fminf(known.rows, 4096.f);
}

// Compares the sample with what the page says; to `note`, or to what is known. Ends with a barrier.
template <bool FRAMES> __device__ __forceinline__ void learn_error(const Store &b, const Target &target, float *note) {
    Scratch &s = b.s;
    const SideDesc &desc = target.side.desc;
    float *learned = target.side.learned();
    const uint32_t dim = desc.head_dim;
    if (b.thread < dim) s.c[b.thread] = learned[b.thread];
    if (b.warp < s.n_samples) decode_row<FRAMES>(b.p.layer, desc, {target.header, target.bytes}, s.at[s.sampled[b.warp]], true, b.lane, s.decoded[b.warp]);
    __syncthreads();
    if (b.thread < 2 * s.n_samples) {
        const uint32_t i = b.thread / 2;
        const float *of = b.thread % 2 ? s.sample[i] : s.decoded[i], *from = b.thread % 2 ? s.mean : s.sample[i];
        float sum = 0.f;
        if (has_learned(b, target.side)) {
#pragma unroll 8
            for (uint32_t c = 0; c < dim; c++) {
                const float x = of[c] - from[c];
                sum += s.c[c] * x * x;
            }
        }
        s.a[b.thread] = sum;
    }
    __syncthreads();
    if (b.thread == 0) {
        KeyError sample = {0.f, 0.f, 0.f};
        for (uint32_t i = 0; i < s.n_samples; i++) sample.add({s.a[2 * i], s.a[2 * i + 1], 1.f});
        if (note != nullptr) {
            note[0] = sample.noise, note[1] = sample.signal, note[2] = sample.rows;
        } else {
            add_error(learned, dim, sample);
        }
    }
    __syncthreads();
}

}  // namespace kvq::store
