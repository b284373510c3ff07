// What the attention kernels share: which rows a block has, where rows of the cache are and who sees them, and how the
// blocks of a tile of rows join their results.
#pragma once
#include "device.cuh"

namespace kvq {

// A call as the blocks of a stream see it, blockIdx.z of the launch: pointers are the stream's.
struct AttendStep : AttendCall {
    const LayerDesc &layer;
    const PlanDesc &plan_at;
    const RotationDesc &rotation;

    __device__ explicit AttendStep(const AttendParams &p) : AttendCall(p.call), layer(p.layer), plan_at(p.plan_at), rotation(p.rotation) {
        const size_t stream = blockIdx.z, first = stream * n_tokens;
        q += first * q_stride_token;
        if (k_cur != nullptr) k_cur += first * k_stride_token, v_cur += first * v_stride_token;
        k_mem += stream * streams.k;
        v_mem += stream * streams.v;
        plan += stream * streams.plan;
        if (mask != nullptr) mask += stream * streams.mask * (mask_is_f16 ? 2 : 4);
        out += first * layer.n_heads * layer.v.head_dim;
        if (lse != nullptr) lse += first * layer.n_heads;
        tickets += stream * gridDim.x;
        partial += stream * streams.partial;
    }
};

// A block's tile of query rows: row r is query head gqa * head + r % gqa of token r / gqa.
struct Tile {
    uint32_t head, index, split, first, n_rows;

    __device__ static Tile of_block(const AttendStep &p, uint32_t rows) {
        Tile t;
        // Most calls have one tile a head, and are to be spared divisions.
        t.index = blockIdx.x < p.layer.n_kv_heads ? 0 : blockIdx.x / p.layer.n_kv_heads;
        t.head = blockIdx.x - t.index * p.layer.n_kv_heads;
        t.split = blockIdx.y;
        t.first = t.index * rows;
        t.n_rows = min(rows, p.n_tokens * p.layer.gqa_ratio - t.first);
        return t;
    }
    __device__ uint32_t token(const AttendStep &p, uint32_t row) const { return first + row < p.layer.gqa_ratio ? 0 : (first + row) / p.layer.gqa_ratio; }
    __device__ uint32_t query_head(const AttendStep &p, uint32_t row) const {
        return head * p.layer.gqa_ratio + first + row - token(p, row) * p.layer.gqa_ratio;
    }
};

// The slope that ALiBi multiplies the mask with, as ggml computes it; 1 without ALiBi.
__device__ inline float alibi_slope(const AttendStep &p, uint32_t query_head) {
    if (likely(p.max_bias <= 0.f)) return 1.f;
    uint32_t n = 1;
    while (2 * n <= p.layer.n_heads) n *= 2;
    const float power = query_head < n ? -p.max_bias / float(n) * float(query_head + 1)
                                       : -p.max_bias / 2.f / float(n) * float(2 * (query_head - n) + 1);
    return exp2f(power);
}

// What the mask adds to a cell's score, before the slope: minus infinity for cells that the query does not see.
__device__ __forceinline__ float mask_value(const AttendStep &p, uint32_t token, uint32_t cell) {
    if (cell >= p.n_kv) return -infinity();
    if (p.mask == nullptr) return 0.f;
    const size_t i = token * p.mask_stride_token + cell;
    return p.mask_is_f16 ? half_to_float(reinterpret_cast<const uint16_t *>(p.mask)[i]) : reinterpret_cast<const float *>(p.mask)[i];
}

__device__ __forceinline__ bool is_in_page(const AttendStep &p, uint32_t cell) {
    return cell < p.layer.n_cells && uint32_t(p.plan[p.plan_at.page_bits[p.view] + cell / 32]) >> cell % 32 & 1;
}

// The turns of a page: which of its cells have moved how far since they were encoded.
struct Turns {
    const int *first;
    uint32_t n, ints;

    // All turns are sorted by page.
    __device__ static Turns of(const AttendStep &p, uint32_t page) {
        const int *turns = p.plan + p.plan_at.turns;
        const uint32_t ints = p.plan_at.turn_ints, all = p.rotation.n_pairs > 0 ? uint32_t(p.plan[p.plan_at.n_turns]) : 0;
        uint32_t first = 0, end = all, n = 0;
        while (first < end) {
            const uint32_t middle = (first + end) / 2;
            if (uint32_t(turns[middle * ints]) < page) first = middle + 1;
            else end = middle;
        }
        while (first + n < all && uint32_t(turns[(first + n) * ints]) == page) n++;
        return {turns + first * ints, n, ints};
    }
    __device__ int distance(uint32_t i) const { return first[i * ints + 1]; }
    __device__ bool has(uint32_t i, uint32_t token) const { return uint32_t(first[i * ints + 2 + token / 32]) >> token % 32 & 1; }
    // The turn that a token is in, n for those that have not moved.
    __device__ uint32_t of_token(uint32_t token) const {
        uint32_t i = 0;
        while (i < n && !has(i, token)) i++;
        return i;
    }
};

// Exact rows that are one piece of work.
constexpr uint32_t EXACT_ROWS = 32;

// The pages that a tile of rows may have to read, `planned` being planned_pages.
__device__ __forceinline__ uint32_t planned_pages(const AttendStep &p) { return uint32_t(p.plan[p.plan_at.n_pages[p.view]]); }
__device__ __forceinline__ uint32_t pages_of(const AttendStep &p, uint32_t planned) {
    return min(planned, (min(p.n_kv, p.layer.n_cells) + p.layer.page - 1) / p.layer.page);
}

// The pieces of exact rows of a tile of rows, in their order.
struct Pieces {
    uint32_t slots, pool, current;

    __device__ static Pieces of(const AttendStep &p) {
        const LayerDesc &l = p.layer;
        return {(l.n_slots + EXACT_ROWS - 1) / EXACT_ROWS, (l.pool_rows + EXACT_ROWS - 1) / EXACT_ROWS,
                p.k_cur == nullptr ? 0 : (p.n_tokens + EXACT_ROWS - 1) / EXACT_ROWS};
    }
    __device__ uint32_t all() const { return slots + pool + current; }
};

// A piece of exact rows.
struct ExactRows {
    enum Kind { SLOTS, POOL, CURRENT } kind;
    uint32_t first, n;

    __device__ static ExactRows of(const AttendStep &p, const Pieces &pieces, uint32_t i) {
        ExactRows rows;
        uint32_t n = p.layer.n_slots;
        rows.kind = SLOTS;
        if (i >= pieces.slots) {
            i -= pieces.slots;
            rows.kind = POOL;
            n = p.layer.pool_rows;
            if (i >= pieces.pool) {
                i -= pieces.pool;
                rows.kind = CURRENT;
                n = p.n_tokens;
            }
        }
        rows.first = i * EXACT_ROWS;
        rows.n = min(EXACT_ROWS, n - rows.first);
        return rows;
    }
    // The cell of a row, or -1 if nobody is to read the row.
    __device__ int cell(const AttendStep &p, uint32_t head, uint32_t i) const {
        i += first;
        if (kind == SLOTS) return p.plan[p.plan_at.slot_cells[p.view] + i];
        if (kind == CURRENT) return p.plan[p.plan_at.row_cells + i];
        const SideDesc &k = p.layer.k;
        const int cell = reinterpret_cast<const int *>(p.k_mem + head * k.head_bytes + k.pool_table)[i] - 1;
        // A member whose cell is not read from its page is stale, or has another exact row.
        return cell >= 0 && is_in_page(p, uint32_t(cell)) ? cell : -1;
    }
    __device__ float key(const AttendStep &p, uint32_t head, uint32_t i, uint32_t c) const {
        if (kind == CURRENT) return finite(p.k_cur[(first + i) * p.k_stride_token + head * p.k_stride_head + c]);
        return stored(p.layer.k, p.k_mem, head, i, c);
    }
    __device__ float value(const AttendStep &p, uint32_t head, uint32_t i, uint32_t c) const {
        if (kind == CURRENT) return finite(p.v_cur[(first + i) * p.v_stride_token + head * p.v_stride_head + c]);
        return stored(p.layer.v, p.v_mem, head, i, c);
    }
    __device__ float stored(const SideDesc &side, const uint8_t *mem, uint32_t head, uint32_t i, uint32_t c) const {
        return finite(half_to_float(half_row(side, mem, head, i)[c]));
    }
    // A row of a slot or of the pool, FP16.
    __device__ const uint16_t *half_row(const SideDesc &side, const uint8_t *mem, uint32_t head, uint32_t i) const {
        const uint8_t *rows = mem + head * side.head_bytes + (kind == POOL ? side.pool : 0);
        return reinterpret_cast<const uint16_t *>(rows) + size_t(first + i) * side.head_dim;
    }
};

// A query row that is not finite, or so large that a score may overflow, goes through the kernels as zeros; its output is NaN.
constexpr float MAX_QUERY = 1e20f;

// How a row's output ends, sum and maximum being those of all its cells: what it is multiplied with, and the logarithm of
// the denominator.
struct Ending {
    float scale, lse;

    __device__ static Ending of(const AttendStep &p, uint32_t query_head, float maximum, float sum) {
        float factor = 1.f, top = maximum;
        if (unlikely(p.sink_logits != nullptr)) {
            const float sink = p.sink_logits[query_head];
            top = fmaxf(maximum, sink);
            factor = maximum == top ? 1.f : expf(maximum - top);
            sum = sum * factor + expf(sink - top);
        }
        // The sum of a row whose query is not finite is NaN; it must not look valid.
        return {sum > 0.f ? factor / sum : sum != sum ? sum : 0.f, top + logf(sum)};
    }
};

// Whether this block is the last of its tile of rows to get here: then it sees what the others have written to p.partial.
// `flag` is a word of shared memory.
__device__ inline bool is_last_block(const AttendStep &p, uint32_t *flag) {
    __syncthreads();
    if (threadIdx.x == 0) {
        // What the other threads have written before the barrier is covered by this one's fence.
        __threadfence();
        uint32_t *ticket = p.tickets + blockIdx.x;
        *flag = atomicAdd(ticket, 1) + 1 == p.n_splits;
        if (*flag) *ticket = 0;
        __threadfence();
    }
    __syncthreads();
    return *flag != 0;
}

// What a block leaves of a row in p.partial: head_dim_v outputs, 16-byte aligned where rows are a multiple of four, and
// maximum and sum.
struct Partial {
    float *output, *sums;
    __device__ static Partial of(const AttendStep &p, const Tile &tile, uint32_t rows, uint32_t split, uint32_t row) {
        const uint32_t dim = p.layer.v.head_dim;
        float *block = p.partial + ((size_t(tile.index) * p.layer.n_kv_heads + tile.head) * p.n_splits + split) * (rows * (dim + 2));
        return {block + row * dim, block + rows * dim + 2 * row};
    }
};

}  // namespace kvq
