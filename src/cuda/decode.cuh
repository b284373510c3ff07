// Single rows back from a page, exactly as the scalar code decodes them.
#pragma once
#include "aqua_rows.cuh"

namespace kvq::store {

// Where a token of codec `adaptive` lies, asked by a warp.
__device__ __forceinline__ uint32_t place_of(const SideDesc &d, const Page &page, uint32_t n, uint32_t token, bool is_key, uint32_t lane) {
    if (d.order == ABSENT || is_key) return page.ordered(d, token, n);
    uint32_t found = 0;
    for (uint32_t place = lane; place < n; place += 32) found = page.ordered(d, place, n) == token ? place + 1 : found;
    for (uint32_t o = 16; o > 0; o /= 2) found = max(found, __shfl_xor_sync(FULL, found, o));
    return found > 0 ? found - 1 : token;
}

// Keys of codec `adaptive`: where the codes of a block of 32 places lie.
__device__ __forceinline__ uint32_t key_block_offset(const SideDesc &d, const Segments &segments, uint32_t block) {
    uint32_t bits = 0;
    for (uint32_t i = 0; i < block; i++) bits += segments.bits(i);
    return bits * 4 * d.head_dim;
}

__device__ __forceinline__ void decode_tokenwise(const LayerDesc &l, const SideDesc &d, const Page &page, uint32_t token, bool is_key, uint32_t lane, float *out) {
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

// Undoes what rows went through before they were coded, by a warp. Ends with a barrier of it.
__device__ __forceinline__ void transform_back(const SideDesc &d, const Page &page, uint32_t lane, float *row) {
    if (d.rotate) rotate_row_exactly(row, d.head_dim, lane);
    for (uint32_t c = lane; c < d.head_dim; c += 32) {
        if (d.exponents != ABSENT) row[c] *= page.factor(d, c);
        row[c] += d.mean != ABSENT ? page.mean(d, c) : 0.f;
    }
    __syncwarp();
}

// Decodes the row of a token, by a warp. Ends with a barrier of the warp. FRAMES: for layers of codec `aqua`, whose code costs kernels
// that do not need it registers.
template <bool FRAMES> __device__ __noinline__ void decode_row(const LayerDesc &l, const SideDesc &d, const Page &page, uint32_t token, bool is_key, uint32_t lane, float *out) {
    if (FRAMES && d.codec == CODEC_AQUA) return decode_framed(l, page, token, lane, out);
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
    transform_back(d, page, lane, out);
}

// Whether decode_chunk can read a side: everything but ternary codes and pages whose tokens have places.
__device__ __forceinline__ bool has_chunks(const SideDesc &d) {
    return d.codec == CODEC_CHANNEL || d.codec == CODEC_AQUA || (d.codec == CODEC_GROUP && d.width != WIDTH_TERNARY);
}

// decode_chunk of codec `channel`.
__device__ __forceinline__ void decode_channels(const SideDesc &d, const Page &page, uint32_t chunk, uint32_t warp, uint32_t n_warps, uint32_t lane, float *rows, uint32_t stride) {
    const Segments segments = Segments::of_header(page.header, d.n_segments, d.budget);
    const uint32_t *words = reinterpret_cast<const uint32_t *>(page.bytes) + lane + chunk * d.tile_words * 32;
    for (uint32_t segment = warp; segment < d.n_segments; segment += n_warps) {
        const float centre = centre_of(segments.bits(segment), false);
        for (uint32_t q = 0; q < 4; q++) {
            const uint32_t codes = mixed_quad(segments, words, segment, q);
            for (uint32_t j = 0; j < 4; j++) {
                const uint32_t i = 16 * segment + 4 * q + j;
                rows[lane * stride + page.ordered(d, i, d.head_dim)] = page.step(d, i) * (float(codes >> 8 * j & 255) - centre) + page.mid(d, i);
            }
        }
    }
}

// Decodes the rows of 32 tokens, from token 32 * chunk on, by a block: `rows` is [32][stride]. A warp takes words of 32 lanes
// and 16 codes each. What transform_back does for codecs with a step per token is left to do, and for codec `aqua`, whose coefficients
// these are, what leave_frame does. No barrier.
template <bool FRAMES> __device__ __forceinline__ void decode_chunk(const LayerDesc &l, const SideDesc &d, const Page &page, uint32_t chunk, bool is_key, uint32_t warp, uint32_t n_warps, uint32_t lane, float *rows, uint32_t stride) {
    if (d.codec == CODEC_CHANNEL) return decode_channels(d, page, chunk, warp, n_warps, lane, rows, stride);
    if (FRAMES && d.codec == CODEC_AQUA) {
        const SideDesc coded = coded_side(d, FramePlace::of(l, page.bytes).segments);
        decode_channels(coded, page, chunk, warp, n_warps, lane, rows, stride);
        for (uint32_t c = coded.head_dim + warp; c < d.head_dim; c += n_warps) rows[lane * stride + c] = rest_mean(coded, page, c);
        return;
    }
    const uint32_t *words = reinterpret_cast<const uint32_t *>(page.bytes) + lane;
    const float centre = Quantizer::of_width(d).centre();
    for (uint32_t item = warp; item < d.head_dim / 16; item += n_warps) {
        // Lanes of keys are tokens, those of values channels.
        const uint32_t channel = is_key ? 16 * item : item / 2 * 32, token = 32 * chunk + (is_key ? 0 : item % 2 * 16), g = channel / d.group;
        const uint32_t block = is_key ? chunk : channel % d.group / 32, first = (is_key ? channel % d.group : token) / 4;
        const uint32_t *from = words + (g * d.tile_bytes / 4 + block * d.tile_words * 32);
        for (uint32_t q = 0; q < 4; q++) {
            const uint32_t codes = tile_quad(d.width, from, is_key ? d.group : l.page, 0, first + q);
            for (uint32_t j = 0; j < 4; j++) {
                const uint32_t at = is_key ? token + lane : token + 4 * q + j, i = g * l.page + at;
                rows[at % 32 * stride + channel + (is_key ? 4 * q + j : lane)] = page.step(d, i) * (float(codes >> 8 * j & 255) - centre) + page.mid(d, i);
            }
        }
    }
}

}  // namespace kvq::store
