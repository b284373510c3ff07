// Of attend_fast.cuh: which cells of a page are to be read, and what the mask says of them.
#pragma once

namespace kvq {

KVQ_FAST_MEMBER(uint32_t)::look_at_bits(uint32_t page) { return uint32_t(p.plan[p.plan_at.page_bits[p.view] + page * BLOCKS + lane % BLOCKS]); }
KVQ_FAST_MEMBER(const uint8_t *)::mask_at(uint32_t token, uint32_t page) {
    return p.mask + (token * p.mask_stride_token + page * PAGE + 4 * lane) * (p.mask_is_f16 ? 2 : 4);
}
KVQ_FAST_MEMBER(bool)::has_mask_ahead(uint32_t page) { return mask_ahead && page * PAGE + PAGE <= p.n_kv; }

// A word a lane: loads at an address that all lanes have in common go to uniform registers, for which the warp waits at
// once.
KVQ_FAST_MEMBER(void)::look(uint32_t page, Look &ahead) {
    const uint8_t *at = reinterpret_cast<const uint8_t *>(p.plan + p.plan_at.page_bits[p.view] + page * BLOCKS + lane % BLOCKS);
    if (lane == 4) at = k_region + k.headers + 4 * size_t(page);
    if (lane == 5) at = v_region + v.headers + 4 * size_t(page);
    ahead.word = *reinterpret_cast<const uint32_t *>(at);
    if (has_mask_ahead(page) && 4 * lane < PAGE) ahead.mask = *reinterpret_cast<const uint2 *>(mask_at(first_token, page));
}

KVQ_FAST_MEMBER(void)::load_pool() {
    const ExactRows pool{ExactRows::POOL, 0, layer.pool_rows};
    for (uint32_t i = threadIdx.x; i < layer.pool_rows; i += 32 * n_warps) pooled[i] = pool.cell(p, tile.head, i);
}

// Takes the bits of cells that the pool has.
KVQ_FAST_MEMBER(void)::hide_pooled(uint32_t page, Look &look) {
    for (uint32_t from = 0; from < layer.pool_rows; from += 32) {
        const int cell = from + lane < layer.pool_rows ? pooled[from + lane] : -1;
        for (uint32_t members = __ballot_sync(FULL, cell >= 0 && uint32_t(cell) / PAGE == page); members != 0; members &= members - 1) {
            const uint32_t at = uint32_t(__shfl_sync(FULL, cell, __ffs(members) - 1)) % PAGE;
            if (lane == at / 32) look.word &= ~(1u << at % 32);
        }
    }
}

// Eight bytes, of which all may be aligned to two only.
__device__ inline bool is_zero(const uint8_t *at) {
    if (reinterpret_cast<uintptr_t>(at) % 8 == 0) {
        const uint2 x = *reinterpret_cast<const uint2 *>(at);
        return (x.x | x.y) == 0;
    }
    const uint16_t *x = reinterpret_cast<const uint16_t *>(at);
    return (x[0] | x[1] | x[2] | x[3]) == 0;
}

// Whether the mask adds nothing to any cell of the page.
KVQ_FAST_MEMBER(bool)::is_unmasked(uint32_t page, const Look &look) {
    bool is = page * PAGE + PAGE <= p.n_kv;
    if (is && p.mask != nullptr && 4 * lane < PAGE) {
        const bool ahead = has_mask_ahead(page);
        if (ahead) is = (look.mask.x | look.mask.y) == 0;
        for (uint32_t token = first_token + (ahead ? 1 : 0); token <= last_token; token++) {
            const uint8_t *at = mask_at(token, page);
            is &= p.mask_is_f16 ? is_zero(at) : is_zero(at) && is_zero(at + 8);
        }
    }
    return __all_sync(FULL, is);
}

KVQ_FAST_MEMBER(void)::prepare_mask() {
#pragma unroll
    for (int n = 0; n < TILES; n++) {
        const bool is_row = row(n) < tile.n_rows;
        mask_row[n] = is_row ? tile.token(p, row(n)) * p.mask_stride_token : ~size_t(0);
        slope[n] = is_row ? slopes[row(n)] * LOG2E : 0.f;
    }
}

// Mask and slope; `cell` < 0: hidden. No branch that lanes may take apart: loads are to go out together.
KVQ_FAST_MEMBER(float)::masked(float score, int cell, int n) {
    const bool is_seen = uint32_t(cell) < p.n_kv && mask_row[n] != ~size_t(0);
    const size_t at = is_seen ? mask_row[n] + uint32_t(cell) : 0;
    float m = 0.f;
    if (p.mask != nullptr)
        m = p.mask_is_f16 ? half_to_float(__ldg(reinterpret_cast<const uint16_t *>(p.mask) + at)) : __ldg(reinterpret_cast<const float *>(p.mask) + at);
    return is_seen && m != -infinity() ? score + slope[n] * m : -infinity();
}

// softcap * tanh(score / softcap), in octaves.
KVQ_FAST_MEMBER(float)::capped(float score) {
    const float e = power_of_two(score * (2.f * LOG2E / p.softcap));
    return p.softcap * LOG2E * (1.f - 2.f / (1.f + e));
}

}  // namespace kvq
