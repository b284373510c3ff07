// Of attend_fast.cuh: the query, and the coefficients that codes of keys are multiplied with.
#pragma once

namespace kvq {

// Asks for what load_query needs of a row first.
KVQ_FAST_MEMBER(void)::read_query(uint32_t r, float (&x)[4]) {
    const bool is_there = r < tile.n_rows && 4 * lane < k.head_dim;
    const float *q = p.q;
    if (is_there) q += tile.token(p, r) * p.q_stride_token + tile.query_head(p, r) * p.q_stride_head + 4 * lane;
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) x[i] = is_there ? q[i] : 0.f;
}

// `x`: of row `warp`, as read_query gives it.
KVQ_FAST_MEMBER(void)::load_query(float (&x)[4]) {
    const uint32_t dim = k.head_dim, c = 4 * lane;
    const Words words = Words::of(Segments::uniform(key_width(), key_segments()), key_segments());
#pragma unroll 1
    for (uint32_t r = warp; r < ROWS; r += n_warps) {
        if (unlikely(r != warp)) read_query(r, x);
        float most = 0.f;
        bool is_finite = true;
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            x[i] *= p.scale;
            is_finite &= fabsf(x[i]) <= MAX_QUERY;
            most = fmaxf(most, fabsf(x[i]));
        }
        is_finite = __all_sync(FULL, is_finite);
        most = is_finite ? fmaxf(warp_max_positive(most), 1e-30f) : 1.f;
        const float inverse = 1.f / most;
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            x[i] = is_finite ? x[i] * inverse : 0.f;
            if (c < dim) query_at(c + i)[r] = x[i];
        }
        if (c < dim) *reinterpret_cast<uint2 *>(halves + r * (dim + 8) + c) = make_uint2(pack_halves(x[0], x[1]), pack_halves(x[2], x[3]));
        if (lane == 0) {
            unit[r] = most;
            spoiled[r] = is_finite ? 0.f : 1.f;
            slopes[r] = r < tile.n_rows ? alibi_slope(p, tile.query_head(p, r)) : 0.f;
        }
        if (is_grouped()) {
            const Sum sums = code_row(words, r, x, most, block_exponents);
            if (lane == 0) scales[r] = sums.scale, offsets[r] = sums.offset;
        }
    }
    if (is_grouped() && warp == n_warps - 1) clear_rest(words);
}

// Puts x * factor, rounded, for four channels of a query row.
KVQ_FAST_MEMBER(void)::put(const Fields::Field &field, uint32_t row, const float (&x)[4], const float (&factor)[4]) {
    float y[4];
#pragma unroll
    for (int j = 0; j < 4; j++) y[j] = x[j] * factor[j] + AS_INTEGER;
    const TwoBytes bytes = TwoBytes::of(y);
    uint8_t *tile_at = coefficients + row / 4 * 8 * p.block.coefficient_bytes + field.at;
    uint32_t *high = reinterpret_cast<uint32_t *>(tile_at + high_column(row % 4) * p.block.coefficient_bytes);
    uint32_t *low = reinterpret_cast<uint32_t *>(tile_at + low_column(row % 4) * p.block.coefficient_bytes);
    high[0] = bytes.high, low[0] = bytes.low;
    if (field.twice) high[1] = bytes.high, low[1] = bytes.low;
}

// The fourth lane of a group of three words multiplies with nothing.
KVQ_FAST_MEMBER(void)::clear_rest(const Words &w) {
    if (w.native || w.n % 4 != 3) return;
    for (uint32_t i = lane; i < 8 * COLUMNS; i += 32) *reinterpret_cast<uint32_t *>(coefficients + i / 8 * p.block.coefficient_bytes + w.at(w.n - 1) + 32 + 4 * (i % 8)) = 0;
}

// Codec `group`: puts the coefficients of a row, a quad of it and of the page's exponents in each lane, relative to `unit`. Gives
// what is made of a sum of products.
KVQ_FAST_MEMBER(Sum)::code_row(const Words &w, uint32_t r, float (&x)[4], float unit, uint32_t exponents) {
    const uint32_t n_quads = k.head_dim / 4;
    if (k.exponents != ABSENT) {
#pragma unroll
        for (int j = 0; j < 4; j++) x[j] *= smooth_factor(int8_t(exponents >> 8 * j));
    }
    if (k.rotate) rotate_quads(x, lane, k.head_dim & (0u - k.head_dim));
    float most = fmaxf(fmaxf(fabsf(x[0]), fabsf(x[1])), fmaxf(fabsf(x[2]), fabsf(x[3])));
    most = fmaxf(warp_max_positive(most), 1e-30f);
    const float total = warp_sum(lane < n_quads ? x[0] + x[1] + (x[2] + x[3]) : 0.f), times = unit * to_log2;
    if (lane < n_quads) {
#pragma unroll 1
        for (Fields f = Fields::of_quad(w, lane);; f.of[0] = f.of[1], f.second = false) {
            const float factor = f.of[0].factor * UNIT / most;
            put(f.of[0], r, x, {factor, factor, factor, factor});
            if (!f.second) break;
        }
    }
    return {most * times / (UNIT * PLACE), -0.5f * float((1u << key_width()) - 1) * times * total};
}

// The exponents of a page whose factors load_query makes coefficients of: those of a head's pages hardly ever differ.
KVQ_FAST_MEMBER(uint32_t)::exponents_of_block() {
    if (k.exponents == ABSENT || lane >= k.head_dim / 4) return 0;
    const uint32_t page = min(tile.split, layer.n_pages - 1);
    return *reinterpret_cast<const uint32_t *>(k_region + k.pages + size_t(page) * k.page_bytes + k.exponents + 4 * lane);
}

// The coefficients of all rows, as the factors of this page want them: those of load_query, or the warp's own.
KVQ_FAST_MEMBER(void)::prepare_group(const Words &w) {
    const uint32_t n_quads = k.head_dim / 4;
    const bool has_factors = k.exponents != ABSENT && lane < n_quads;
    const uint32_t exponents = has_factors ? *reinterpret_cast<const uint32_t *>(k_page + swizzle(k.exponents + 4 * lane)) : 0;
    if (likely(__all_sync(FULL, exponents == block_exponents))) {
        coefficients = block_coefficients;
        is_prepared = false;
#pragma unroll
        for (int n = 0; n < TILES; n++) scale[n] = scales[row(n)], offset[n] = offsets[row(n)];
        return;
    }
    if (__all_sync(FULL, is_prepared && exponents == seen_exponents)) return;
    coefficients = own_coefficients;
    is_prepared = true;
    seen_exponents = exponents;
#pragma unroll 1
    for (uint32_t r = 0; r < ROWS; r++) {
        float x[4];
#pragma unroll
        for (int j = 0; j < 4; j++) x[j] = lane < n_quads ? query_at(4 * lane + j)[r] : 0.f;
        const Sum sums = code_row(w, r, x, unit[r], exponents);
#pragma unroll
        for (int n = 0; n < TILES; n++) {
            scale[n] = row(n) == r ? sums.scale : scale[n];
            offset[n] = row(n) == r ? sums.offset : offset[n];
        }
    }
    clear_rest(w);
    __syncwarp();
}

// Codec `channel`: times the page's steps, in its order. Gives what centres and mid-points add to each row.
KVQ_FAST_MEMBER(void)::prepare_channel(const Words &w, const Segments &segments, const uint8_t *header, float (&base)[TILES]) {
    const uint32_t dim = k.head_dim, n_quads = dim / 4;
    const float step_power = power(header[0]), mid_power = power(header[1]);
    const bool has_quad = lane < n_quads;
    float step[4] = {}, sums[ROWS] = {}, most = 0.f;
    const float *queries[4];
    if (has_quad) {
        const auto four = [&](uint32_t at) { return *reinterpret_cast<const uint32_t *>(k_page + swizzle(at + 4 * lane)); };
        const uint32_t codes = four(k.steps), mids = four(k.mids), order = k.order == ABSENT ? 0 : four(k.order);
        const float centre = 0.5f * float((1u << segments.bits(lane / 4)) - 1);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const uint32_t channel = k.order == ABSENT ? 4 * lane + j : min(order >> 8 * j & 255, dim - 1);
            step[j] = e4m3_decode(codes >> 8 * j & 255) * step_power;
            most = fmaxf(most, fabsf(step[j]));
            const float shift = e4m3_decode(mids >> 8 * j & 255) * mid_power - step[j] * centre;
            queries[j] = query_at(channel);
#pragma unroll
            for (int r = 0; r < ROWS; r++) sums[r] += queries[j][r] * shift;
        }
    }
    most = fmaxf(warp_max_positive(most), 1e-30f);
    if (has_quad) {
        Fields fields = Fields::of_quad(w, lane);
        // Not unrolled, see `unlikely`.
#pragma unroll 1
        for (;; fields.of[0] = fields.of[1], fields.second = false) {
            const float factor = fields.of[0].factor * UNIT / most;
            const float factors[4] = {step[0] * factor, step[1] * factor, step[2] * factor, step[3] * factor};
#pragma unroll
            for (int r = 0; r < ROWS; r++) put(fields.of[0], r, {queries[0][r], queries[1][r], queries[2][r], queries[3][r]}, factors);
            if (!fields.second) break;
        }
    }
    clear_rest(w);
    const float total = sum_each<ROWS>(sums);
#pragma unroll
    for (int n = 0; n < TILES; n++) {
        const float times = to_log2 * unit[row(n)];
        scale[n] = most * times / (UNIT * PLACE);
        base[n] = times * __shfl_sync(FULL, total, owner<ROWS>(row(n)));
    }
    __syncwarp();
}

// What the page's mean adds to each row.
KVQ_FAST_MEMBER(void)::mean_base(float (&base)[TILES]) {
    for (int n = 0; n < TILES; n++) base[n] = 0.f;
    if (k.mean == ABSENT) return;
    float sums[ROWS] = {};
    if (lane < k.head_dim / 4) {
        const uint2 mean = *reinterpret_cast<const uint2 *>(k_page + swizzle(k.mean + 8 * lane));
        const float m[4] = {half_to_float(uint16_t(mean.x)), half_to_float(uint16_t(mean.x >> 16)), half_to_float(uint16_t(mean.y)),
                            half_to_float(uint16_t(mean.y >> 16))};
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int r = 0; r < ROWS; r++) sums[r] += m[j] * query_at(4 * lane + j)[r];
    }
    const float total = sum_each<ROWS>(sums);
#pragma unroll
    for (int n = 0; n < TILES; n++) base[n] = to_log2 * unit[row(n)] * __shfl_sync(FULL, total, owner<ROWS>(row(n)));
}

}  // namespace kvq
