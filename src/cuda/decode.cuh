// Single rows back from a page, exactly as the scalar code decodes them.
#pragma once
#include "store.cuh"

namespace kvq::store {

// Where a token of codec `adaptive` lies, asked by a warp.
__device__ inline uint32_t place_of(const SideDesc &d, const Page &page, uint32_t n, uint32_t token, bool is_key, uint32_t lane) {
    if (d.order == ABSENT || is_key) return page.ordered(d, token, n);
    uint32_t found = 0;
    for (uint32_t place = lane; place < n; place += 32) found = page.ordered(d, place, n) == token ? place + 1 : found;
    for (uint32_t o = 16; o > 0; o /= 2) found = max(found, __shfl_xor_sync(FULL, found, o));
    return found > 0 ? found - 1 : token;
}

// Keys of codec `adaptive`: where the codes of a block of 32 places lie.
__device__ inline uint32_t key_block_offset(const SideDesc &d, const Segments &segments, uint32_t block) {
    uint32_t bits = 0;
    for (uint32_t i = 0; i < block; i++) bits += segments.bits(i);
    return bits * 4 * d.head_dim;
}

__device__ inline void decode_tokenwise(const LayerDesc &l, const SideDesc &d, const Page &page, uint32_t token, bool is_key, uint32_t lane, float *out) {
    if (d.codec == CODEC_GROUP) {
        const Quantizer quantizer = Quantizer::of_width(d);
        for (uint32_t c = lane; c < d.head_dim; c += 32) {
            const uint32_t g = c / d.group, i = g * l.page + token;
            const uint8_t *tile = page.bytes + g * d.tile_bytes;
            const uint32_t code = is_key ? tile_code(d, tile, l.page, d.group, token, c % d.group) : tile_code(d, tile, d.group, l.page, c % d.group, token);
            out[c] = page.step(d, i) * (float(code) - quantizer.centre()) + page.mid(d, i);
        }
        return;
    }
    const Segments segments = Segments::of_header(page.header, d.n_segments, d.budget);
    const uint32_t place = place_of(d, page, l.page, token, is_key, lane), bits = segments.bits(place / d.segment);
    const Quantizer quantizer = Quantizer::of_bits(d, bits);
    const uint8_t *block = page.bytes + key_block_offset(d, segments, place / 32);
    for (uint32_t c = lane; c < d.head_dim; c += 32) {
        const uint32_t code = is_key ? mixed_code(Segments::uniform(bits, d.head_dim / 16), block, place % 32, c)
                                     : mixed_code(segments, page.bytes + c / 32 * d.tile_words * 128, c % 32, place);
        out[c] = page.step(d, place) * quantizer.value(code) + page.mid(d, place);
    }
    __syncwarp();
    for (uint32_t i = 0; i < d.n_outliers && lane == 0; i++) {
        const uint8_t *summands = page.bytes + d.outliers + (d.n_outliers + 2 * i) * l.page;
        const uint32_t channel = min(uint32_t(page.bytes[d.outliers + i * l.page + place]), d.head_dim - 1);
        out[channel] += half_to_float(reinterpret_cast<const uint16_t *>(summands)[place]);
    }
}

// Decodes the row of a token, by a warp. Ends with a barrier of the warp.
__device__ inline void decode_row(const LayerDesc &l, const SideDesc &d, const Page &page, uint32_t token, bool is_key, uint32_t lane, float *out) {
    if (d.codec == CODEC_CHANNEL) {
        const Segments segments = Segments::of_header(page.header, d.n_segments, d.budget);
        const uint8_t *block = page.bytes + token / 32 * d.tile_words * 128;
        for (uint32_t i = lane; i < d.head_dim; i += 32) {
            const float code = float(mixed_code(segments, block, token % 32, i));
            out[page.ordered(d, i, d.head_dim)] = page.step(d, i) * (code - centre_of(segments.bits(i / 16), false)) + page.mid(d, i);
        }
        __syncwarp();
        return;
    }
    decode_tokenwise(l, d, page, token, is_key, lane, out);
    __syncwarp();
    if (d.rotate) rotate_row_exactly(out, d.head_dim, lane);
    for (uint32_t c = lane; c < d.head_dim; c += 32) {
        if (d.exponents != ABSENT) out[c] *= page.factor(d, c);
        out[c] += d.mean != ABSENT ? page.mean(d, c) : 0.f;
    }
    __syncwarp();
}

}  // namespace kvq::store
