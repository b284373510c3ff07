// Of attend_fast.cuh: what the warps of a block, and the blocks of a head, have, put together.
#pragma once

namespace kvq {

// Leaves the warp's output, relative to its references, as [ROWS][DIM_V] in its own memory, and its state in `states`.
KVQ_FAST_MEMBER(void)::leave() {
    float *out = reinterpret_cast<float *>(own_memory);
    const float centre = 0.5f * float((1u << value_width()) - 1);
#pragma unroll
    for (int n = 0; n < TILES; n++) {
#pragma unroll
        for (uint32_t o = 4; o < 32; o *= 2) {
            sum[n] += __shfl_xor_sync(FULL, sum[n], o);
            steps[n] += __shfl_xor_sync(FULL, steps[n], o);
        }
        const float total = centre * steps[n];
#pragma unroll
        for (int block = 0; block < DIM_V / 32; block++)
#pragma unroll
            for (int j = 0; j < 2; j++)
#pragma unroll
                for (int i = 0; i < 2; i++)
                    out[row(n) * DIM_V + 32 * block + 4 * quad + j + 2 * i] = acc[n][block][j][2 * i] + of_neighbour(acc[n][block][j][2 * i + 1]) - total;
        if (g == 0) {
            float *state = states + (warp * ROWS + row(n)) * STATE;
            state[0] = reference[n];
            state[1] = sum[n];
        }
    }
}

KVQ_FAST_MEMBER(void)::finish() {
    constexpr uint32_t N = ROWS * DIM_V;
    const uint8_t *buffers = own_memory - warp * p.shared_warp;
    // The block's reference and sum of a row, and each warp's factor, which takes the place of its reference.
#pragma unroll 1
    for (uint32_t r = warp; r < ROWS; r += n_warps) {
        float *state = states + (lane * ROWS + r) * STATE;
        const bool is_warp = lane < n_warps;
        const float own_reference = is_warp ? state[0] : DEAD, most = warp_max(own_reference), factor = power_of_two(own_reference - most);
        const float total = warp_sum(is_warp ? factor * state[1] : 0.f);
        if (is_warp) state[2] = factor;
        if (lane == 0) {
            // The query is not needed any more.
            unit[r] = spoiled[r] != 0.f ? 0.f : most;
            slopes[r] = spoiled[r] != 0.f ? not_a_number() : total;
        }
    }
    __syncthreads();
    const auto of_block = [&](uint32_t i) {
        float out = 0.f;
#pragma unroll 2
        for (uint32_t w = 0; w < n_warps; w++) out += states[(w * ROWS + i / DIM_V) * STATE + 2] * reinterpret_cast<const float *>(buffers + w * p.shared_warp)[i];
        return out;
    };
    float *joined = query;  // [ROWS][DIM_V] where room was made for it
    if (p.n_splits == 1) {
#pragma unroll 1
        for (uint32_t i = threadIdx.x; i < N; i += 32 * n_warps) joined[i] = of_block(i);
    } else {
#pragma unroll 1
        for (uint32_t i = threadIdx.x; i < N; i += 32 * n_warps) Partial::of(p, tile, ROWS, tile.split, 0).output[i] = of_block(i);
        if (threadIdx.x < ROWS) {
            float *sums = Partial::of(p, tile, ROWS, tile.split, threadIdx.x).sums;
            sums[0] = unit[threadIdx.x];
            sums[1] = slopes[threadIdx.x];
        }
        if (!is_last_block(p, flag)) return;
        float *factors = reinterpret_cast<float *>(own_memory - warp * p.shared_warp);  // [row][split]
        for (uint32_t r = warp; r < ROWS; r += n_warps) {
            // There are 64 splits at most.
            float references[2], sums[2];
#pragma unroll
            for (uint32_t i = 0; i < 2; i++) {
                const uint32_t split = lane + 32 * i;
                const float *from = Partial::of(p, tile, ROWS, min(split, p.n_splits - 1), r).sums;
                references[i] = split < p.n_splits ? __ldcg(from) : DEAD;
                sums[i] = split < p.n_splits ? __ldcg(from + 1) : 0.f;
            }
            const float most = warp_max(fmaxf(references[0], references[1]));
            float total = 0.f;
#pragma unroll
            for (uint32_t i = 0; i < 2; i++) {
                const float factor = power_of_two(references[i] - most);
                if (lane + 32 * i < p.n_splits) factors[r * p.n_splits + lane + 32 * i] = factor;
                total += factor * sums[i];
            }
            total = warp_sum(total);
            if (lane == 0) unit[r] = most, slopes[r] = total;
        }
        __syncthreads();
        // A thread: four channels of every n_slices-th block, loads in flight together.
        constexpr uint32_t QUADS = N / 4, AT_ONCE = 16, STRIDE = ROWS * (DIM_V + 2);
        const uint32_t threads = 32 * n_warps, n_slices = max(threads / QUADS, 1u);
        float4 *slices = reinterpret_cast<float4 *>(factors + ROWS * 64);
#pragma unroll 1
        for (uint32_t at = threadIdx.x; at < n_slices * QUADS; at += threads) {
            const uint32_t slice = at / QUADS, i = at % QUADS * 4;
            const float *from = Partial::of(p, tile, ROWS, 0, 0).output + i, *factor = factors + i / DIM_V * p.n_splits;
            float4 out = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 1
            for (uint32_t first = slice; first < p.n_splits; first += AT_ONCE * n_slices) {
                float4 x[AT_ONCE];
#pragma unroll
                for (uint32_t c = 0; c < AT_ONCE; c++) x[c] = __ldcg(reinterpret_cast<const float4 *>(from + min(first + c * n_slices, p.n_splits - 1) * STRIDE));
#pragma unroll
                for (uint32_t c = 0; c < AT_ONCE; c++) {
                    const uint32_t split = first + c * n_slices;
                    const float f = split < p.n_splits ? factor[split] : 0.f;
                    out.x += f * x[c].x, out.y += f * x[c].y, out.z += f * x[c].z, out.w += f * x[c].w;
                }
            }
            slices[at] = out;
        }
        __syncthreads();
#pragma unroll 1
        for (uint32_t at = threadIdx.x; at < QUADS; at += threads) {
            float4 out = slices[at];
            for (uint32_t c = 1; c < n_slices; c++) {
                const float4 x = slices[at + c * QUADS];
                out.x += x.x, out.y += x.y, out.z += x.z, out.w += x.w;
            }
            *reinterpret_cast<float4 *>(joined + 4 * at) = out;
        }
    }
    __syncthreads();
#pragma unroll 1
    for (uint32_t r = warp; r < tile.n_rows; r += n_warps) {
        float x[4] = {};
        const bool has = 4 * lane < uint32_t(DIM_V);
        if (has) {
            const float4 y = *reinterpret_cast<const float4 *>(joined + r * DIM_V + 4 * lane);
            x[0] = y.x, x[1] = y.y, x[2] = y.z, x[3] = y.w;
        }
        if (v.rotate) rotate_quads(x, lane, DIM_V & (0u - DIM_V));
        // References are powers of two.
        const float maximum = unit[r] <= DEAD ? -infinity() : unit[r] / LOG2E;
        const Ending end = Ending::of(p, tile.query_head(p, r), maximum, slopes[r]);
        const size_t at = size_t(tile.token(p, r)) * layer.n_heads + tile.query_head(p, r);
        if (has)
            for (uint32_t j = 0; j < 4; j++) p.out[at * DIM_V + 4 * lane + j] = x[j] * end.scale;
        if (lane == 0 && p.lse != nullptr) p.lse[at] = end.lse;
    }
}

}  // namespace kvq
