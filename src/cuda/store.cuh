// What the steps of a store share: a block has a KV head, of which it seals the pages one after the other, and one or both
// of its sides. Compiled without fused multiply-add; see quantizer.cuh.
#pragma once
#include "aqua.cuh"
#include "pack.cuh"
#include "quantizer.cuh"

namespace kvq::store {

constexpr uint32_t STORE_WARPS = STORE_THREADS / 32, MAX_PAGE = 256, MAX_DIM = 256, MAX_POOL = 128, SAMPLES = 4;
constexpr uint32_t NONE = 0xffff;
// The source of a row that a page keeps when it is made anew.
constexpr int KEPT = -1;

// What a block knows of the page that it seals, in shared memory.
struct Scratch {
    float a[MAX_DIM], b[MAX_DIM], c[MAX_DIM], d[MAX_DIM];  // of one step, a number for each channel or token
    float mean[MAX_DIM];                                   // of the rows, as they came
    float attention[MAX_PAGE];                             // the largest weight of each row
    float sample[SAMPLES][MAX_DIM], decoded[SAMPLES][MAX_DIM];
    float totals[4], below[17];
    uint32_t most[2], segments[3];
    uint32_t n_records;  // of the page in the plan
    uint32_t n_rows;     // the same, and those that it keeps if it is made anew
    uint32_t n_exact, n_samples, sampled[SAMPLES];
    int source[MAX_PAGE];
    uint16_t at[MAX_PAGE];         // the row of the page of each row here
    uint16_t pooled[MAX_PAGE];     // the row of the pool that it enters or has, or NONE
    uint16_t record_of[MAX_PAGE];  // the row here of each token or place, or NONE
    uint16_t free_rows[MAX_POOL];
    uint8_t order[MAX_PAGE], place[MAX_PAGE];
    FramePlace frame;
};
static_assert(sizeof(Scratch) <= STORE_SCRATCH_BYTES, "the host asks for as much");

// A call as the blocks of a stream see it, blockIdx.z of the launch: pointers are the stream's, `rows` the block's.
struct StoreStep : StoreCall {
    const LayerDesc &layer;
    const PlanDesc &plan_at;
    const RotationDesc &rotation;

    __device__ explicit StoreStep(const StoreParams &p) : StoreCall(p.call), layer(p.layer), plan_at(p.plan_at), rotation(p.rotation) {
        const size_t stream = blockIdx.z, first = stream * n_tokens;
        k_cur += first * k_stride_token;
        v_cur += first * v_stride_token;
        if (q != nullptr) q += first * q_stride_token;
        if (lse != nullptr) lse += first * layer.n_heads;
        k_mem += stream * streams.k;
        v_mem += stream * streams.v;
        plan += stream * streams.plan;
        if (positions != nullptr) positions += stream * streams.positions;
        if (rows != nullptr) rows += ((stream * (n_key_blocks + n_value_blocks) + blockIdx.y) * gridDim.x + blockIdx.x) * (1 + layer.predicts) * layer.page * row_stride;
        if (notes != nullptr) notes += (stream * layer.n_kv_heads + blockIdx.x) * note_stride;
    }
};

// A block at its work.
struct Store {
    const StoreStep &p;
    Scratch &s;
    float *rows;  // [record][row_stride]: the rows, what of them is kept exactly, and at last their codes; and once more, for predicted values
    uint32_t head, thread, lane, warp;

    __device__ __forceinline__ float *row(uint32_t i) const { return rows + i * p.row_stride; }
    // The same with the second rows.
    __device__ __forceinline__ Store beside() const { return {p, s, rows + p.layer.page * p.row_stride, head, thread, lane, warp}; }
    __device__ __forceinline__ uint8_t *codes(uint32_t i) const { return reinterpret_cast<uint8_t *>(row(i)); }
    __device__ __forceinline__ int plan(uint32_t at) const { return p.plan[at]; }
    __device__ __forceinline__ uint8_t *keys() const { return p.k_mem + head * p.layer.k.head_bytes; }
    __device__ __forceinline__ uint8_t *values() const { return p.v_mem + head * p.layer.v.head_bytes; }
};

// One side of the head.
struct Side {
    const SideDesc &desc;
    uint8_t *region;
    const float *current;  // of the head
    size_t stride_token;

    __device__ __forceinline__ uint16_t *slot(uint32_t i) const { return reinterpret_cast<uint16_t *>(region) + size_t(i) * desc.head_dim; }
    __device__ __forceinline__ uint16_t *pool_row(uint32_t i) const { return reinterpret_cast<uint16_t *>(region + desc.pool) + size_t(i) * desc.head_dim; }
    // 1 + the cell of each row, 0 if it is free.
    __device__ __forceinline__ uint32_t *pool_table() const { return reinterpret_cast<uint32_t *>(region + desc.pool_table); }
    __device__ __forceinline__ float *learned() const { return reinterpret_cast<float *>(region + desc.learned); }
    __device__ __forceinline__ uint8_t *header(uint32_t page) const { return region + desc.headers + 4 * size_t(page); }
    __device__ __forceinline__ uint8_t *page(uint32_t page) const { return region + desc.pages + size_t(page) * desc.page_bytes; }
};

__device__ __forceinline__ Side keys_of(const Store &b) {
    return {b.p.layer.k, b.keys(), b.p.k_cur + b.head * b.p.k_stride_head, size_t(b.p.k_stride_token)};
}
__device__ __forceinline__ Side values_of(const Store &b) {
    return {b.p.layer.v, b.values(), b.p.v_cur + b.head * b.p.v_stride_head, size_t(b.p.v_stride_token)};
}

// Whether any query has been learned from; see learn_many.
__device__ __forceinline__ bool has_learned(const Store &b, const Side &side) { return b.p.n_query_blocks > 0 || side.learned()[side.desc.head_dim] > 0.f; }

// What becomes of a page: Seal of src/plan.rs.
enum class Seal { FRESH, JOIN, RENEW };

// One page of one side, to be sealed with the rows of a block.
struct Target {
    const Side &side;
    uint8_t *header, *bytes;
    bool fresh;  // made anew from these rows
    bool is_key;
};

// As total_cmp orders numbers.
__device__ __forceinline__ int ordered_bits(float x) {
    const int bits = int(__float_as_uint(x));
    return bits ^ int(uint32_t(bits >> 31) >> 1);
}

// The place of number i among n numbers that fall, equal ones in their order.
__device__ __forceinline__ uint32_t place_in_falling(const float *x, uint32_t i, uint32_t n) {
    const int own = ordered_bits(x[i]);
    uint32_t place = 0;
    for (uint32_t j = 0; j < n; j++) {
        const int other = ordered_bits(x[j]);
        place += other > own || (other == own && j < i) ? 1 : 0;
    }
    return place;
}

// As place_in_falling for numbers that rise.
__device__ __forceinline__ uint32_t place_in_rising(const float *x, uint32_t i, uint32_t n) {
    const int own = ordered_bits(x[i]);
    uint32_t place = 0;
    for (uint32_t j = 0; j < n; j++) {
        const int other = ordered_bits(x[j]);
        place += other < own || (other == own && j < i) ? 1 : 0;
    }
    return place;
}

// share_out of src/codec/mixed.rs for falling weights in shared memory; to s.segments. Ends with a barrier.
__device__ __forceinline__ void share_out(const Store &b, const float *weight, uint32_t segment, uint32_t n, uint32_t budget, uint32_t floor) {
    Scratch &s = b.s;
    if (b.thread < n) {
        float sum = 0.f;
        for (uint32_t i = 0; i < segment; i++) sum += weight[b.thread * segment + i];
        s.below[b.thread + 1] = sum;
    }
    __syncthreads();
    if (b.thread == 0) {
        s.below[0] = 0.f;
        for (uint32_t i = 0; i < n; i++) s.below[i + 1] = s.below[i] + s.below[i + 1];
    }
    __syncthreads();
    if (b.warp == 0) {
        float least = infinity();
        uint32_t best = ~0u;
        for (uint32_t i = b.lane; i < (n + 1) * (n + 1); i += 32) {
            const int four = int(i / (n + 1)), three = int(i % (n + 1)), rest = int(n) - four - three;
            const int two = int(budget) - 4 * four - 3 * three - rest, one = rest - two;
            if (rest < 0 || two < 0 || one < 0) continue;
            if ((floor > 1 && one > 0) || (floor > 2 && two > 0) || (floor > 3 && three > 0)) continue;
            const float distortion[4] = {0.01154f, 0.03744f, 0.1188f, 0.3634f};
            const int counts[4] = {four, three, two, one};
            float error = 0.f;
            for (int width = 0, at = 0; width < 4; at += counts[width++]) {
                error += distortion[width] * (s.below[at + counts[width]] - s.below[at]);
            }
            if (best == ~0u || error < least) least = error, best = i;
        }
        for (uint32_t o = 16; o > 0; o /= 2) {
            const float error = __shfl_xor_sync(FULL, least, o);
            const uint32_t other = __shfl_xor_sync(FULL, best, o);
            if (error < least || (error == least && other < best)) least = error, best = other;
        }
        if (b.lane == 0) {
            const uint32_t four = best / (n + 1), three = best % (n + 1);
            s.segments[0] = four, s.segments[1] = three;
            s.segments[2] = budget - 4 * four - 3 * three - (n - four - three);
        }
    }
    __syncthreads();
}

// The larger of s.most[i] and a number that is not negative; also a zero that looks so.
__device__ __forceinline__ void raise(Scratch &s, uint32_t i, float x) {
    if (x > 0.f) atomicMax(&s.most[i], __float_as_uint(x));
}

// A row in memory: floats, or halves at an address that is a multiple of four; null: zeros.
struct RowAt {
    const void *from;
    bool is_half;

    // The word that has channel c. What it means is looked at later: a conversion would wait for the load.
    __device__ __forceinline__ uint32_t word(uint32_t c) const {
        return from == nullptr ? 0 : static_cast<const uint32_t *>(from)[is_half ? c / 2 : c];
    }
    __device__ __forceinline__ static float value(uint32_t word, uint32_t c, bool is_half) { return is_half ? half_to_float(uint16_t(word >> c % 2 * 16)) : __uint_as_float(word); }
    __device__ __forceinline__ float operator()(uint32_t c) const { return value(word(c), c, is_half); }
};

// A warp's rows of a block, every STORE_WARPS-th of `n`: N of them, 128 channels from `c` on, read together.
template <uint32_t N> struct RowsAhead {
    static constexpr uint32_t PARTS = 4;
    uint32_t words[N][PARTS];
    bool is_half[N];

    // `row_of(i)` gives row i. A load for which nobody asks is as good as one that a branch would have to wait for.
    template <class F> __device__ __forceinline__ void read(const Store &b, uint32_t first, uint32_t n, uint32_t c, uint32_t dim, F row_of) {
#pragma unroll
        for (uint32_t r = 0; r < N; r++) {
            const uint32_t i = first + r * STORE_WARPS;
            const RowAt row = row_of(min(i, n - 1));
            is_half[r] = row.is_half;
#pragma unroll
            for (uint32_t k = 0; k < PARTS; k++) {
                words[r][k] = row.word(min(c + 32 * k + b.lane, dim - 1));
            }
        }
    }
    template <bool FINITE> __device__ __forceinline__ void put(const Store &b, uint32_t first, uint32_t n, uint32_t c, uint32_t dim) const {
#pragma unroll
        for (uint32_t r = 0; r < N; r++)
#pragma unroll
            for (uint32_t k = 0; k < PARTS; k++) {
                const uint32_t i = first + r * STORE_WARPS, at = c + 32 * k + b.lane;
                const float x = RowAt::value(words[r][k], min(at, dim - 1), is_half[r]);
                if (i < n && at < dim) b.row(i)[at] = FINITE ? finite(x) : x;
            }
    }
};

// Copies `n` rows to those of a block, a warp each. No barrier.
template <bool FINITE, class F> __device__ __forceinline__ void copy_rows(const Store &b, uint32_t n, uint32_t dim, F row_of) {
    constexpr uint32_t N = 4;
    RowsAhead<N> rows;
#pragma unroll 1
    for (uint32_t i = b.warp; i < n; i += N * STORE_WARPS)
#pragma unroll 1
        for (uint32_t c = 0; c < dim; c += 32 * rows.PARTS) rows.read(b, i, n, c, dim, row_of), rows.template put<FINITE>(b, i, n, c, dim);
}

// Rotates N rows of at most 32 * PARTS channels by a warp: the stages in the order of src/codec/hadamard.rs. A lane has every 32nd channel.
template <uint32_t N, uint32_t PARTS, class F> __device__ __forceinline__ void rotate_rows(uint32_t n, uint32_t dim, uint32_t lane, F row_of) {
    const uint32_t block = dim & (0u - dim);
    float x[N][PARTS];
#pragma unroll
    for (uint32_t r = 0; r < N; r++)
#pragma unroll
        for (uint32_t k = 0; k < PARTS; k++) x[r][k] = r < n && lane + 32 * k < dim ? row_of(r)[lane + 32 * k] : 0.f;
#pragma unroll
    for (uint32_t half = 16 * PARTS; half > 0; half /= 2) {
        if (2 * half > block) continue;
#pragma unroll
        for (uint32_t r = 0; r < N; r++)
#pragma unroll
            for (uint32_t k = 0; k < PARTS; k++) {
                if (half < 32) {
                    const float other = __shfl_xor_sync(FULL, x[r][k], half);
                    x[r][k] = lane & half ? other - x[r][k] : x[r][k] + other;
                } else if ((k & half / 32) == 0) {
                    const uint32_t right = (k + half / 32) % PARTS;
                    const float sum = x[r][k] + x[r][right];
                    x[r][right] = x[r][k] - x[r][right];
                    x[r][k] = sum;
                }
            }
    }
    const float norm = 1.f / sqrtf(float(block));
#pragma unroll
    for (uint32_t r = 0; r < N; r++)
#pragma unroll
        for (uint32_t k = 0; k < PARTS; k++)
            if (r < n && lane + 32 * k < dim) row_of(r)[lane + 32 * k] = x[r][k] * norm;
}
// A row of any size. Between barriers of the warp. Called where rows are few, as the code of a store is large.
__device__ __noinline__ void rotate_row_exactly(float *row, uint32_t dim, uint32_t lane) {
    __syncwarp();
    rotate_rows<1, MAX_DIM / 32>(1, dim, lane, [&](uint32_t) { return row; });
    __syncwarp();
}
// N rows of any size.
template <uint32_t N, class F> __device__ __forceinline__ void rotate_rows_exactly(uint32_t n, uint32_t dim, uint32_t lane, F row_of) {
    __syncwarp();
    if (dim <= 128) {
        rotate_rows<N, 4>(n, dim, lane, row_of);
    } else {
#pragma unroll 1
        for (uint32_t r = 0; r < min(N, n); r++) rotate_row_exactly(row_of(r), dim, lane);
    }
    __syncwarp();
}

}  // namespace kvq::store
