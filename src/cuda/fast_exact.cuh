// Of attend_fast.cuh: exact rows, in pieces of 16.
#pragma once

namespace kvq {

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

// Has a piece copied to the warp's memory as FP16: PIECE keys, PIECE values.
KVQ_FAST_MEMBER(void)::stage(const ExactRows &rows, uint32_t first, uint32_t n) {
    const auto put = [&](const SideDesc &side, uint32_t at, uint32_t stride, bool is_key) {
        if (rows.kind == ExactRows::CURRENT) {
#pragma unroll 1
            for (uint32_t i = 0; i < n; i++) {
                if (4 * lane >= side.head_dim) continue;
                float x[4];
#pragma unroll
                for (uint32_t j = 0; j < 4; j++) x[j] = is_key ? rows.key(p, tile.head, first + i, 4 * lane + j) : rows.value(p, tile.head, first + i, 4 * lane + j);
                *reinterpret_cast<uint2 *>(own_memory + at + i * stride + 8 * lane) = make_uint2(pack_halves(x[0], x[1]), pack_halves(x[2], x[3]));
            }
            return;
        }
        // Half a warp has a row.
        const uint32_t piece = lane % 16;
        const uint8_t *from = reinterpret_cast<const uint8_t *>(rows.half_row(side, is_key ? p.k_mem : p.v_mem, tile.head, first)) + 16 * piece;
        const SharedAt to = shared_at(own_memory) + at + 16 * piece;
#pragma unroll 1
        for (uint32_t i = lane / 16; i < n; i += 2)
            if (8 * piece < side.head_dim) copy_async(to + i * stride, from + 2 * i * side.head_dim);
    };
    put(k, 0, key_stride(), true);
    put(v, PIECE * key_stride(), VALUE_STRIDE, false);
    copy_commit();
}

// Adds n rows to `out`, [row][channel 4 * lane + i], which is relative to the warp's references.
KVQ_FAST_MEMBER(void)::attend_exact(const ExactRows &rows, uint32_t first, uint32_t n, float (&out)[ROWS][4]) {
    const uint32_t dim = k.head_dim;
    // What memory has to give is asked for at once, before it is known who sees it.
    stage(rows, first, n);
    const int own_cell = lane < n ? rows.cell(p, tile.head, first + lane) : -1;
    const int cells[2] = {__shfl_sync(FULL, own_cell, g), __shfl_sync(FULL, own_cell, g + 8)};
    const uint32_t seen = __ballot_sync(FULL, own_cell >= 0);
    copy_wait<0>();
    if (seen == 0) return;
    // Operand A: rows g and g + 8, 8 channels a lane. Column 2 t + e of B is this lane's row of tile e; with one tile, both are.
    // Rows that are not there hold anything, and are hidden.
    float c[4] = {};
    const uint16_t *q = halves + (own_of(g / 2) + (TILES == 2 ? 4 * (g % 2) : 0)) * (dim + 8) + 8 * t;
    const uint8_t *keys = own_memory + g * key_stride() + 16 * t;
#pragma unroll 1
    for (uint32_t at = 0; at < dim; at += 32) {
        const uint4 a = *reinterpret_cast<const uint4 *>(keys + 2 * at), a8 = *reinterpret_cast<const uint4 *>(keys + 2 * at + 8 * key_stride());
        const uint4 b = *reinterpret_cast<const uint4 *>(q + at);
        mma(c, a.x, a8.x, a.y, a8.y, b.x, b.y);
        mma(c, a.z, a8.z, a.w, a8.w, b.z, b.w);
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
#pragma unroll
    for (int n = 0; n < TILES; n++) {
        reference[n] = fmaxf(reference[n], most[n]);
        before[n] = power_of_two(before[n] - reference[n]);
        sum[n] *= before[n];
    }
    float *table = reinterpret_cast<float *>(weights);  // [16][ROWS]
#pragma unroll
    for (int n = 0; n < TILES; n++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float weight = power_of_two(score[n][i] - reference[n]);
            sum[n] += weight;
            table[(g + 8 * i) * ROWS + row(n)] = weight;
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const float factor = of_row(before, r);
#pragma unroll
        for (int i = 0; i < 4; i++) out[r][i] *= factor;
    }
    __syncwarp();
    if (4 * lane < uint32_t(DIM_V)) {
        constexpr uint32_t AT_ONCE = 4;
        const uint8_t *values = own_memory + PIECE * key_stride() + 8 * lane;
#pragma unroll 1
        for (uint32_t first = 0; first < PIECE; first += AT_ONCE) {
#pragma unroll
            for (uint32_t i = 0; i < AT_ONCE; i++) {
                const uint2 y = *reinterpret_cast<const uint2 *>(values + (first + i) * VALUE_STRIDE);
                const bool is = seen >> (first + i) & 1;
                const uint32_t low = is ? y.x : 0, high = is ? y.y : 0;
                const float x[4] = {half_to_float(uint16_t(low)), half_to_float(uint16_t(low >> 16)), half_to_float(uint16_t(high)), half_to_float(uint16_t(high >> 16))};
#pragma unroll
                for (int r = 0; r < ROWS; r++)
#pragma unroll
                    for (int j = 0; j < 4; j++) out[r][j] += table[(first + i) * ROWS + r] * x[j];
            }
        }
    }
    __syncwarp();
}

// Pieces `first`, `first` + stride, ... Leaves what they add up to as a source; the warp is as new for pages.
KVQ_FAST_MEMBER(void)::attend_all_exact(uint32_t exact_warp, uint32_t first, uint32_t stride) {
    constexpr uint32_t PER = EXACT_ROWS / PIECE;
    const Pieces pieces = Pieces::of(p);
    float out[ROWS][4] = {};
    for (uint32_t i = first; i < pieces.all() * PER; i += stride) {
        const ExactRows rows = ExactRows::of(p, pieces, i / PER);
        const uint32_t from = i % PER * PIECE;
        if (from < rows.n) attend_exact(rows, from, min(PIECE, rows.n - from), out);
    }
    float *source = reinterpret_cast<float *>(exact_sources + exact_warp * SOURCE_BYTES);
    if (4 * lane < uint32_t(DIM_V)) {
#pragma unroll
        for (int r = 0; r < ROWS; r++) *reinterpret_cast<float4 *>(source + r * DIM_V + 4 * lane) = make_float4(out[r][0], out[r][1], out[r][2], out[r][3]);
    }
    leave_state(source);
    for (int n = 0; n < TILES; n++) reference[n] = DEAD, sum[n] = 0.f;
}

}  // namespace kvq
