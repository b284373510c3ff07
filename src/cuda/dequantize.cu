// Rows of the cache as FP16, by cell: what attention of many query rows reads that knows nothing of pages. A block has 32 cells
// of a page, or a piece of exact rows, which come after all pages. Decoded as the store step does, without fused multiply-add. The
// kernel below takes every codec and rows that have moved; those at the end, of dequantize_rows.cuh, what people mostly have.
#include "dequantize_rows.cuh"

namespace kvq {

constexpr uint32_t DEQUANTIZE_WARPS = DEQUANTIZE_THREADS / 32;

// FRAMES as of decode_row.
template <bool FRAMES> struct Dequantize {
    const DequantizeParams &d;
    const AttendStep p;
    const SideDesc &side;
    uint32_t head, warp, lane;
    bool is_key;
    const uint8_t *memory;

    __device__ Dequantize(const DequantizeParams &params)
        : d(params), p(params.read), side(params.side == 0 ? p.layer.k : p.layer.v), head(blockIdx.x), warp(threadIdx.x / 32), lane(threadIdx.x % 32),
          is_key(params.side == 0), memory(is_key ? p.k_mem : p.v_mem) {}

    __device__ uint16_t *row_of(uint32_t cell) const { return d.rows + ((size_t(blockIdx.z) * p.layer.n_kv_heads + head) * p.n_kv + cell) * side.head_dim; }

    // Turns a decoded key to where its position is now. `angles`: of the warp, of the distance `turned_by`.
    __device__ void turn(float *row, int distance, int &turned_by, Angle *angles) const {
        const RotationDesc &rotation = p.rotation;
        for (uint32_t pair = lane; pair < min(rotation.n_pairs, side.head_dim / 2); pair += 32) {
            if (distance != turned_by) angles[pair] = angle_of(rotation, pair, distance);
            turn_pair(rotation, row, pair, angles[pair]);
        }
        turned_by = distance;
        __syncwarp();
    }

    // Rows that a warp has of those of a chunk.
    static constexpr uint32_t ROWS = 32 / DEQUANTIZE_WARPS;
    __device__ store::WarpRows<ROWS> rows_of_warp(float *rows, uint32_t stride) const {
        return store::WarpRows<ROWS>::of(ROWS * warp, ROWS, [&](uint32_t i) { return rows + i * stride; });
    }

    // Coefficients of codec `aqua` become keys. `angles`: of the block.
    __device__ void leave_frames(const Page &page, uint32_t in_page, float *rows, uint32_t stride, Angle *angles) const {
        const FramePlace place = FramePlace::of(p.layer, page.bytes);
        const Frame frame = Frame::of(p.layer, place);
        const RotationDesc &rotation = frame.desc.rotation;
        const uint32_t n_pairs = min(rotation.n_pairs, side.head_dim / 2);
        if (threadIdx.x < n_pairs) angles[threadIdx.x] = angle_of(rotation, threadIdx.x, place.first);
        store::leave_frame(frame, place, rows_of_warp(rows, stride), lane, [&](uint32_t r) { return 32 * in_page + ROWS * warp + r; });
        __syncthreads();
        for (uint32_t i = warp; i < 32; i += DEQUANTIZE_WARPS)
            for (uint32_t pair = lane; pair < n_pairs; pair += 32) turn_pair(rotation, rows + i * stride, pair, angles[pair]);
        __syncthreads();
    }

    // What the keys of a chunk predict of a warp's values, used or not. Ends with a barrier.
    __device__ void predict(const Page &keys, uint32_t in_page, float *rows, uint32_t stride, store::LaneRows<ROWS> &predicted) const {
        const LayerDesc &l = p.layer;
        store::decode_chunk<FRAMES>(l, l.k, keys, in_page, true, warp, DEQUANTIZE_WARPS, lane, rows, stride);
        __syncthreads();
        predicted.predict(Frame::of(l, FramePlace::of(l, keys.bytes)), rows_of_warp(rows, stride), lane);
        __syncthreads();
    }

    // The rows of 32 cells.
    __device__ void chunk(uint32_t index, uint8_t *shared) const {
        const uint32_t dim = side.head_dim, first = 32 * index, page = first / p.layer.page, in_page = first % p.layer.page / 32;
        const bool has_predicted = FRAMES && !is_key && p.layer.predicts;
        const uint32_t stride = (has_predicted ? max(dim, p.layer.k.head_dim) : dim) + 1;
        float *rows = reinterpret_cast<float *>(shared);
        Angle *of_page = reinterpret_cast<Angle *>(rows + 32 * stride), *angles = of_page + (1 + warp) * (dim / 2);
        // Not more pages than the layer has.
        const bool is_planned = page < uint32_t(p.plan[p.plan_at.n_pages[p.view]]);
        const uint32_t held = is_planned ? uint32_t(p.plan[p.plan_at.page_bits[p.view] + index]) : 0;
        const Page from = Page::of(side, memory + head * side.head_bytes, page), keys = Page::of(p.layer.k, p.k_mem + head * p.layer.k.head_bytes, page);
        const bool together = store::has_chunks(side) && held != 0;
        store::LaneRows<ROWS> predicted;
        if (has_predicted && held != 0) predict(keys, in_page, rows, stride, predicted);
        if (together) store::decode_chunk<FRAMES>(p.layer, side, from, in_page, is_key, warp, DEQUANTIZE_WARPS, lane, rows, stride);
        __syncthreads();
        if (FRAMES && together && side.codec == CODEC_AQUA) leave_frames(from, in_page, rows, stride, of_page);
        const Turns turns = is_key && held != 0 ? Turns::of(p, page) : Turns{};
        int turned_by = 0;
#pragma unroll 1
        for (uint32_t r = 0; r < ROWS; r++) {
            const uint32_t i = ROWS * warp + r;
            if (first + i >= p.n_kv) break;
            uint16_t *to = row_of(first + i);
            if (!(held >> i & 1)) {
                for (uint32_t c = lane; c < dim; c += 32) to[c] = 0;
                continue;
            }
            float *row = rows + i * stride;
            if (!together) store::decode_row<FRAMES>(p.layer, side, from, 32 * in_page + i, is_key, lane, row);
            else if (side.codec == CODEC_GROUP) store::transform_back(side, from, lane, row);
            if (has_predicted && has_gate(p.layer, keys.bytes, 32 * in_page + i)) {
                for (uint32_t c = lane; c < dim; c += 32) row[c] += predicted.at[c / 32][r];
            }
            const uint32_t turn_of = turns.of_token(32 * in_page + i);
            const int distance = turn_of == turns.n ? 0 : turns.distance(turn_of);
            if (distance != 0) turn(row, distance, turned_by, angles);
            for (uint32_t c = lane; c < dim; c += 32) to[c] = float_to_half(finite(row[c]));
            __syncwarp();
        }
    }

    __device__ store::RowAt exact_row(const ExactRows &rows, uint32_t i) const {
        if (rows.kind != ExactRows::CURRENT) return {rows.half_row(side, memory, head, i), true};
        const float *const current = is_key ? p.k_cur + head * p.k_stride_head : p.v_cur + head * p.v_stride_head;
        return {current + (rows.first + i) * (is_key ? p.k_stride_token : p.v_stride_token), false};
    }

    __device__ void exact(uint32_t piece) const {
        const Pieces pieces = Pieces::of(p);
        if (piece >= pieces.all()) return;
        const ExactRows rows = ExactRows::of(p, pieces, piece);
        // All rows of a warp are on their way together.
        constexpr uint32_t N = EXACT_ROWS / DEQUANTIZE_WARPS, PARTS = 4;
        const int own_cell = lane < rows.n ? rows.cell(p, head, lane) : -1;
#pragma unroll 1
        for (uint32_t first = 0; first < side.head_dim; first += 32 * PARTS) {
            uint32_t words[N][PARTS];
#pragma unroll
            for (uint32_t r = 0; r < N; r++) {
                const store::RowAt row = exact_row(rows, min(warp + r * DEQUANTIZE_WARPS, rows.n - 1));
#pragma unroll
                for (uint32_t k = 0; k < PARTS; k++) words[r][k] = row.word(min(first + 32 * k + lane, side.head_dim - 1));
            }
#pragma unroll
            for (uint32_t r = 0; r < N; r++) {
                const int cell = __shfl_sync(FULL, own_cell, warp + r * DEQUANTIZE_WARPS);
                if (cell < 0 || uint32_t(cell) >= p.n_kv) continue;
#pragma unroll
                for (uint32_t k = 0; k < PARTS; k++) {
                    const uint32_t c = first + 32 * k + lane;
                    if (c < side.head_dim) row_of(uint32_t(cell))[c] = float_to_half(finite(store::RowAt::value(words[r][k], c, rows.kind != ExactRows::CURRENT)));
                }
            }
        }
    }
};

template <bool FRAMES> __device__ inline void dequantize(const DequantizeParams &p, uint8_t *shared) {
    wait_for_stream();
    let_next_start();
    const Dequantize<FRAMES> block(p);
    if (p.exact) block.exact(blockIdx.y);
    else block.chunk(blockIdx.y, shared);
}

KVQ_KERNEL(kvq_dequantize_any, DEQUANTIZE_THREADS, 1, DequantizeParams) {
    KVQ_SHARED(shared);
    dequantize<false>(p, shared);
}
KVQ_KERNEL(kvq_dequantize_aqua, DEQUANTIZE_THREADS, 2, DequantizeParams) {
    KVQ_SHARED(shared);
    dequantize<true>(p, shared);
}

}  // namespace kvq

// The table in cuda/dequantize.rs has the same rows.
KVQ_DEQUANTIZE_ROWS(kvq_dequantize_64_keys, 64, KEYS)
KVQ_DEQUANTIZE_ROWS(kvq_dequantize_64_values, 64, VALUES)
KVQ_DEQUANTIZE_ROWS(kvq_dequantize_64_channels, 64, CHANNELS)
KVQ_DEQUANTIZE_ROWS(kvq_dequantize_128_keys, 128, KEYS)
KVQ_DEQUANTIZE_ROWS(kvq_dequantize_128_values, 128, VALUES)
KVQ_DEQUANTIZE_ROWS(kvq_dequantize_128_channels, 128, CHANNELS)
