// Of attend_fast.cuh: exact rows, in pieces of 16.
#pragma once

namespace kvq {

// The last warps of a block take its pieces before they take pages; half of them at most, so that pages are on their way.
KVQ_FAST_MEMBER(uint32_t)::n_exact_warps(const Pieces &pieces) const {
    const uint32_t all = pieces.all() * (EXACT_ROWS / PIECE), of_block = all > tile.split ? (all - tile.split + p.n_splits - 1) / p.n_splits : 0;
    return min(of_block, n_warps / 2);
}

// Exact rows come from main memory: asks for those of a piece.
KVQ_FAST_MEMBER(void)::prefetch_exact(uint32_t piece) {
    const uint32_t row = piece * PIECE + lane % PIECE;
    if (row >= layer.n_slots) return;
    const ExactRows slots{ExactRows::SLOTS, 0, layer.n_slots};
    const SideDesc &side = lane < PIECE ? k : v;
    const uint16_t *from = slots.half_row(side, lane < PIECE ? p.k_mem : p.v_mem, tile.head, row);
    for (uint32_t c = 0; c < side.head_dim; c += 64) prefetch(from + c);
    if (lane == 0) prefetch(p.plan + p.plan_at.slot_cells[p.view] + row);
}

// Adds n rows to `out`, [row][channel 4 * lane + i], which is relative to the warp's references.
KVQ_FAST_MEMBER(void)::attend_exact(const ExactRows &rows, uint32_t first, uint32_t n, float (&out)[ROWS][4]) {
    const uint32_t dim = k.head_dim;
    // Operand A: rows g and g + 8, 8 channels a lane. What memory has to give is asked for at once, before it is known who
    // sees it: rows that hold nothing are hidden, or not added up.
    const bool is_stored = rows.kind != ExactRows::CURRENT, has_value = 4 * lane < uint32_t(DIM_V);
    uint4 keys[4][2];
    uint2 values[PIECE];
    if (is_stored) {
#pragma unroll
        for (uint32_t i = 0; i < 4; i++)
#pragma unroll
            for (uint32_t half = 0; half < 2; half++) {
                const bool is_there = 32 * i < dim && g + 8 * half < n;
                keys[i][half] = is_there ? *reinterpret_cast<const uint4 *>(rows.half_row(k, p.k_mem, tile.head, first + g + 8 * half) + 32 * i + 8 * t) : make_uint4(0, 0, 0, 0);
            }
        if (has_value) {
#pragma unroll
            for (uint32_t i = 0; i < PIECE; i++) values[i] = *reinterpret_cast<const uint2 *>(rows.half_row(v, p.v_mem, tile.head, first + min(i, n - 1)) + 4 * lane);
        }
    }
    const auto cell_of = [&](uint32_t i) { return i < n ? rows.cell(p, tile.head, first + i) : -1; };
    const int own_cell = lane < PIECE ? cell_of(lane) : -1;
    const int cells[2] = {__shfl_sync(FULL, own_cell, g), __shfl_sync(FULL, own_cell, g + 8)};
    const uint32_t seen = __ballot_sync(FULL, own_cell >= 0);
    if (seen == 0) return;
    // Column 2 t + e of B is this lane's row of tile e; with one tile, both are.
    float c[4] = {};
    const uint16_t *q = halves + (own_of(g / 2) + (TILES == 2 ? 4 * (g % 2) : 0)) * (dim + 8) + 8 * t;
    const auto add = [&](uint32_t at, const uint4 &a, const uint4 &a8) {
        const uint4 b = *reinterpret_cast<const uint4 *>(q + at);
        mma(c, a.x, a8.x, a.y, a8.y, b.x, b.y);
        mma(c, a.z, a8.z, a.w, a8.w, b.z, b.w);
    };
    if (is_stored) {
#pragma unroll
        for (uint32_t i = 0; i < 4; i++)
            if (32 * i < dim) add(32 * i, keys[i][0], keys[i][1]);
    } else {
#pragma unroll 1
        for (uint32_t at = 0; at < dim; at += 32) {
            uint32_t a[2][4] = {};
#pragma unroll 1
            for (uint32_t half = 0; half < 2; half++) {
                if (g + 8 * half >= n) continue;
#pragma unroll
                for (uint32_t i = 0; i < 4; i++) {
                    const uint32_t row = first + g + 8 * half, channel = at + 8 * t + 2 * i;
                    const uint32_t pair = pack_halves(rows.key(p, tile.head, row, channel), rows.key(p, tile.head, row, channel + 1));
                    a[0][i] = half ? a[0][i] : pair;
                    a[1][i] = half ? pair : a[1][i];
                }
            }
            add(at, make_uint4(a[0][0], a[0][1], a[0][2], a[0][3]), make_uint4(a[1][0], a[1][1], a[1][2], a[1][3]));
        }
    }
    float score[TILES][2], most[TILES], before[TILES];
#pragma unroll
    for (int n = 0; n < TILES; n++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float x = c[2 * i + n] * unit[row(n)] * to_log2;
            if (p.softcap > 0.f) x = capped(x);
            score[n][i] = masked(x, cells[i], n);
        }
        most[n] = fmaxf(DEAD, fmaxf(score[n][0], score[n][1]));
        before[n] = reference[n];
    }
    max_of_rows(most);
    move_reference(most);
    float *table = reinterpret_cast<float *>(weights);  // [16][ROWS]
#pragma unroll
    for (int n = 0; n < TILES; n++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float weight = power_of_two(score[n][i] - reference[n]);
            sum[n] += weight;
            table[(g + 8 * i) * ROWS + row(n)] = weight;
        }
        before[n] = power_of_two(before[n] - reference[n]);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const float factor = of_row(before, r);
#pragma unroll
        for (int i = 0; i < 4; i++) out[r][i] *= factor;
    }
    __syncwarp();
    const auto add_value = [&](uint32_t i, const float (&x)[4]) {
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int j = 0; j < 4; j++) out[r][j] += table[i * ROWS + r] * x[j];
    };
    if (has_value && is_stored) {
#pragma unroll
        for (uint32_t i = 0; i < PIECE; i++) {
            const uint2 y = values[i];
            if (seen >> i & 1) add_value(i, {half_to_float(uint16_t(y.x)), half_to_float(uint16_t(y.x >> 16)), half_to_float(uint16_t(y.y)), half_to_float(uint16_t(y.y >> 16))});
        }
    } else if (has_value) {
#pragma unroll 1
        for (uint32_t i = 0; i < n; i++) {
            if (!(seen >> i & 1)) continue;
            float x[4];
#pragma unroll
            for (uint32_t j = 0; j < 4; j++) x[j] = rows.value(p, tile.head, first + i, 4 * lane + j);
            add_value(i, x);
        }
    }
    __syncwarp();
}

// Pieces `first`, `first` + stride, ... Leaves what they add up to in the accumulators, where pages will add theirs.
KVQ_FAST_MEMBER(void)::attend_all_exact(const Pieces &pieces, uint32_t first, uint32_t stride) {
    constexpr uint32_t PER = EXACT_ROWS / PIECE;
    float out[ROWS][4] = {};
    for (uint32_t i = first; i < pieces.all() * PER; i += stride) {
        const ExactRows rows = ExactRows::of(p, pieces, i / PER);
        const uint32_t from = i % PER * PIECE;
        if (from < rows.n) attend_exact(rows, from, min(PIECE, rows.n - from), out);
    }
    float *all = reinterpret_cast<float *>(scratch);  // [ROWS][DIM_V], before a page needs it
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        if (v.rotate) rotate_quads(out[r], lane, DIM_V & (0u - DIM_V));
        if (4 * lane < uint32_t(DIM_V)) *reinterpret_cast<float4 *>(all + r * DIM_V + 4 * lane) = make_float4(out[r][0], out[r][1], out[r][2], out[r][3]);
    }
    __syncwarp();
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
        for (int block = 0; block < DIM_V / 32; block++)
#pragma unroll
            for (int j = 0; j < 2; j++)
#pragma unroll
                for (int i = 0; i < 2; i++) acc[n][block][j][2 * i] = all[row(n) * DIM_V + 32 * block + 4 * quad + j + 2 * i];
    __syncwarp();
}

}  // namespace kvq
