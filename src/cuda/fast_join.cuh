// Of attend_fast.cuh: what warps and blocks leave of each row, put together.
#pragma once

namespace kvq {

// Leaves what the warp's pages add up to in its own memory, as a source: see SOURCE_BYTES.
KVQ_FAST_MEMBER(void)::leave() {
    float *out = reinterpret_cast<float *>(own_memory);
    const float centre = 0.5f * float((1u << value_width()) - 1);
#pragma unroll
    for (int n = 0; n < TILES; n++) {
#pragma unroll
        for (uint32_t o = 4; o < 32; o *= 2) steps[n] += __shfl_xor_sync(FULL, steps[n], o);
        const float total = centre * steps[n];
#pragma unroll
        for (int block = 0; block < DIM_V / 32; block++)
#pragma unroll
            for (int j = 0; j < 2; j++)
#pragma unroll
                for (int i = 0; i < 2; i++)
                    out[row(n) * DIM_V + 32 * block + 4 * quad + j + 2 * i] = acc[n][block][j][2 * i] + of_neighbour(acc[n][block][j][2 * i + 1]) - total;
    }
    leave_state(out);
}

// The same for a warp that had none.
KVQ_FAST_MEMBER(void)::leave_nothing() {
    float *out = reinterpret_cast<float *>(own_memory);
    if (4 * lane < uint32_t(DIM_V)) {
#pragma unroll
        for (uint32_t r = 0; r < ROWS; r++) *reinterpret_cast<float4 *>(out + r * DIM_V + 4 * lane) = make_float4(0.f, 0.f, 0.f, 0.f);
    }
    leave_state(out);
}

// References and sums of a source.
KVQ_FAST_MEMBER(void)::leave_state(float *source) {
#pragma unroll
    for (int n = 0; n < TILES; n++) {
#pragma unroll
        for (uint32_t o = 4; o < 32; o *= 2) sum[n] += __shfl_xor_sync(FULL, sum[n], o);
        if (g == 0) *reinterpret_cast<float2 *>(source + ROWS * DIM_V + 2 * row(n)) = make_float2(reference[n], sum[n]);
    }
}

// Adds row `r` of n sources, `stride` bytes apart. Every lane looks at all states: that is sooner done than shuffled.
KVQ_FAST_MEMBER(void)::add_sources(Joined &all, const uint8_t *sources, uint32_t stride, uint32_t n, uint32_t r) {
    constexpr uint32_t AT_ONCE = 4;
    const uint8_t *states = sources + 4 * (ROWS * DIM_V + 2 * r), *rows = sources + 4 * (r * DIM_V + (4 * lane < uint32_t(DIM_V) ? 4 * lane : 0));
    float most = all.reference;
#pragma unroll 1
    for (uint32_t at = 0; at < n; at += AT_ONCE)
#pragma unroll
        for (uint32_t i = 0; i < AT_ONCE; i++) most = fmaxf(most, *reinterpret_cast<const float *>(states + min(at + i, n - 1) * stride));
    const float before = power_of_two(all.reference - most);
    all.reference = most;
    all.sum *= before;
#pragma unroll
    for (int j = 0; j < 4; j++) all.x[j] *= before;
#pragma unroll 1
    for (uint32_t at = 0; at < n; at += AT_ONCE) {
#pragma unroll
        for (uint32_t i = 0; i < AT_ONCE; i++) {
            const uint32_t s = min(at + i, n - 1);
            const float2 state = *reinterpret_cast<const float2 *>(states + s * stride);
            const float4 y = *reinterpret_cast<const float4 *>(rows + s * stride);
            const float factor = at + i < n ? power_of_two(state.x - most) : 0.f;
            all.sum += factor * state.y;
            all.x[0] += factor * y.x, all.x[1] += factor * y.y, all.x[2] += factor * y.z, all.x[3] += factor * y.w;
        }
    }
}

// Writes a row of the output.
KVQ_FAST_MEMBER(void)::end_row(const Joined &all, uint32_t r) {
    // References are powers of two.
    const float maximum = all.reference <= DEAD ? -infinity() : all.reference / LOG2E;
    const uint32_t head = tile.query_head(p, r);
    const Ending end = Ending::of(p, head, maximum, all.sum);
    const size_t at = size_t(tile.token(p, r)) * layer.n_heads + head;
    if (4 * lane < uint32_t(DIM_V))
        for (uint32_t j = 0; j < 4; j++) p.out[at * DIM_V + 4 * lane + j] = all.x[j] * end.scale;
    if (lane == 0 && p.lse != nullptr) p.lse[at] = end.lse;
}

// Joins what the warps of the block have, then, in a head's last block, what its blocks have: the same code twice, which the
// second time need not be fetched. A warp has a row.
KVQ_FAST_MEMBER(void)::finish() {
    uint8_t *const buffers = own_memory - warp * p.block.shared_warp;
#pragma unroll 1
    for (bool of_blocks = false;; of_blocks = true) {
        const bool is_end = of_blocks || p.n_splits == 1;
#pragma unroll 1
        for (uint32_t r = warp; r < tile.n_rows; r += n_warps) {
            Joined all = {{}, DEAD, 0.f};
            // Pages, which may be rotated, then exact rows, which are not.
#pragma unroll 1
            for (bool exact = of_blocks;; exact = true) {
                const uint32_t n = of_blocks ? p.n_splits : exact ? p.block.exact_warps : n_warps;
                add_sources(all, exact && !of_blocks ? exact_sources : buffers, exact ? SOURCE_BYTES : p.block.shared_warp, n, r);
                if (exact) break;
                if (v.rotate) rotate_quads(all.x, lane, DIM_V & (0u - DIM_V));
            }
            if (!of_blocks && spoiled[r] != 0.f) all.reference = 0.f, all.sum = not_a_number();
            if (is_end) {
                end_row(all, r);
            } else {
                const Partial partial = Partial::of(p, tile, ROWS, tile.split, r);
                if (4 * lane < uint32_t(DIM_V)) *reinterpret_cast<float4 *>(partial.output + 4 * lane) = make_float4(all.x[0], all.x[1], all.x[2], all.x[3]);
                if (lane == 0) *reinterpret_cast<float2 *>(partial.sums) = make_float2(all.reference, all.sum);
            }
        }
        if (is_end || !is_last_block(p, flag)) return;
        const uint8_t *from = reinterpret_cast<const uint8_t *>(Partial::of(p, tile, ROWS, 0, 0).output);
#pragma unroll 1
        for (uint32_t at = 16 * threadIdx.x; at < p.n_splits * SOURCE_BYTES; at += 16 * 32 * n_warps) copy_async(shared_at(buffers) + at, from + at);
        copy_commit();
        copy_wait<0>();
        __syncthreads();
    }
}

}  // namespace kvq
