// Writing codes into tiles and reading single ones: the twin of src/codec/tile.rs and src/codec/mixed.rs. A thread takes a
// word, so that no two write the same one, and asks for the quads in it.
#pragma once
#include "page.cuh"

namespace kvq::store {

// Four codes of consecutive depth, one in each byte; `is_set`: 255 where there is one, 0 where the old one stays.
struct Quad { uint32_t codes, is_set; };

// Puts `bits` bits of each code, from bit `from` of the code, at bit `shift` of each byte of a word.
__device__ __forceinline__ uint32_t put_quad(uint32_t word, const Quad &quad, uint32_t from, uint32_t bits, uint32_t shift) {
    const uint32_t mask = ((1u << bits) - 1) * 0x01010101u;
    return (word & ~((quad.is_set & mask) << shift)) | (quad.codes >> from & quad.is_set & mask) << shift;
}

// Replaces digit `digit` of each byte of a word.
__device__ __forceinline__ uint32_t put_digits(uint32_t word, const Quad &quad, uint32_t power) {
    uint32_t result = 0;
    for (uint32_t j = 0; j < 32; j += 8) {
        const uint32_t byte = word >> j & 255, code = quad.codes >> j & 255;
        result |= (quad.is_set >> j & 1 ? (byte - byte / power % 3 * power + code * power) & 255 : byte) << j;
    }
    return result;
}

__device__ __forceinline__ uint32_t power_of_3(uint32_t i) { return i == 0 ? 1 : i == 1 ? 3 : i == 2 ? 9 : i == 3 ? 27 : 81; }

// Writes the codes of a tile of one width: `quad(lane, q)` gives those at depth 4q and up.
template <class F> __device__ __forceinline__ void pack_tile(const SideDesc &side, uint8_t *tile, uint32_t lanes, uint32_t depth, uint32_t thread, uint32_t threads, F quad) {
    uint32_t *words = reinterpret_cast<uint32_t *>(tile);
    const uint32_t width = side.width, quads = depth / 4, per_lane = side.tile_words;
    for (uint32_t i = thread; i < lanes * per_lane; i += threads) {
        const uint32_t lane = i / 32 / per_lane * 32 + i % 32, w = i / 32 % per_lane;
        uint32_t word = words[i];
        if (width == WIDTH_TERNARY) {
            for (uint32_t f = 0; f < 5 && 5 * w + f < quads; f++) word = put_digits(word, quad(lane, 5 * w + f), power_of_3(f));
        } else if (width == 3 && w >= quads / 4) {
            for (uint32_t f = 0; f < 8; f++) word = put_quad(word, quad(lane, 8 * (w - quads / 4) + f), 2, 1, f);
        } else {
            const uint32_t bits = width == 3 ? 2 : width;
            for (uint32_t f = 0; f < 8 / bits; f++) word = put_quad(word, quad(lane, 8 / bits * w + f), 0, bits, bits * f);
        }
        words[i] = word;
    }
    if (width != WIDTH_TERNARY || side.tile_tail_quads == 0) return;
    const uint32_t entries = side.tile_tail_quads * (lanes / 16);
    uint32_t *tail = reinterpret_cast<uint32_t *>(tile + side.tile_tail);
    for (uint32_t i = thread; i < (entries + 3) / 4 * 16; i += threads) {
        uint32_t word = tail[i];
        for (uint32_t f = 0; f < 4 && i / 16 * 4 + f < entries; f++) {
            const uint32_t entry = i / 16 * 4 + f, lane = entry % (lanes / 16) * 16 + i % 16;
            word = put_quad(word, quad(lane, per_lane * 5 + entry / (lanes / 16)), 0, 2, 2 * f);
        }
        tail[i] = word;
    }
}

// The same for blocks of 32 lanes of mixed widths, of `per_lane` words a lane.
template <class F> __device__ __forceinline__ void pack_mixed(const Segments &s, uint8_t *tile, uint32_t lanes, uint32_t per_lane, uint32_t thread, uint32_t threads, F quad) {
    uint32_t *words = reinterpret_cast<uint32_t *>(tile);
    const uint32_t low = 2 * s.four, plane = low + s.three + s.two;
    for (uint32_t i = thread; i < lanes * per_lane; i += threads) {
        const uint32_t lane = i / 32 / per_lane * 32 + i % 32, w = i / 32 % per_lane;
        uint32_t word = words[i];
        if (w < low) {
            for (uint32_t f = 0; f < 2; f++) word = put_quad(word, quad(lane, 2 * w + f), 0, 4, 4 * f);
        } else if (w < plane) {
            for (uint32_t f = 0; f < 4; f++) word = put_quad(word, quad(lane, 4 * (w - s.four) + f), 0, 2, 2 * f);
        } else {
            for (uint32_t f = 0; f < 8; f++) {
                const uint32_t odd = 2 * (w - plane) + f / 4, segment = odd < s.three ? s.four + odd : s.four + s.two + odd;
                word = put_quad(word, quad(lane, 4 * segment + f % 4), odd < s.three ? 2 : 0, 1, f);
            }
        }
        words[i] = word;
    }
}

// Four codes of a lane of a tile of one width that is not ternary, those at depth 4 (first + q) and up; `words`: the lane's first. `first` is a
// multiple of 8, so that fields are known where `q` is.
__device__ __forceinline__ uint32_t tile_quad(uint32_t width, const uint32_t *words, uint32_t depth, uint32_t first, uint32_t q) {
    const auto field = [&](uint32_t w, uint32_t shift, uint32_t mask) { return words[w * 32] >> shift & mask * 0x01010101u; };
    if (width == 3) return field(first / 4 + q / 4, 2 * (q % 4), 3) | field(depth / 16 + first / 8 + q / 8, q % 8, 1) << 2;
    const uint32_t per_word = 8 / width;
    return field(first / per_word + q / per_word, width * (q % per_word), (1u << width) - 1);
}

// The same of a tile of mixed widths: those of quad `q` of a segment.
__device__ __forceinline__ uint32_t mixed_quad(const Segments &s, const uint32_t *words, uint32_t segment, uint32_t q) {
    const uint32_t bits = s.bits(segment), plane = 2 * s.four + s.three + s.two;
    const auto field = [&](uint32_t w, uint32_t shift, uint32_t mask) { return words[w * 32] >> shift & mask * 0x01010101u; };
    const auto single = [&](uint32_t odd) { return field(plane + odd / 2, odd % 2 * 4 + q, 1); };
    if (bits == 4) return field(2 * segment + q / 2, q % 2 * 4, 15);
    if (bits == 1) return single(segment - s.four - s.two);
    const uint32_t low = field(s.four + segment, 2 * q, 3);
    return bits == 2 ? low : low | single(segment - s.four) << 2;
}

// One code of a tile of one width.
__device__ inline uint32_t tile_code(const SideDesc &side, const uint8_t *tile, uint32_t lanes, uint32_t depth, uint32_t lane, uint32_t d) {
    const uint32_t q = d / 4, per_lane = side.tile_words;
    const uint32_t *words = reinterpret_cast<const uint32_t *>(tile) + lane / 32 * per_lane * 32 + lane % 32;
    if (side.width != WIDTH_TERNARY) return tile_quad(side.width, words, depth, 0, q) >> 8 * (d % 4) & 255;
    if (q < per_lane * 5) return (words[q / 5 * 32] >> 8 * (d % 4) & 255) / power_of_3(q % 5) % 3;
    const uint32_t entry = (q - per_lane * 5) * (lanes / 16) + lane / 16;
    return tile[side.tile_tail + entry / 4 * 64 + lane % 16 * 4 + d % 4] >> 2 * (entry % 4) & 3;
}

// One code of a tile of mixed widths; `block`: the lane's block of 32.
__device__ inline uint32_t mixed_code(const Segments &s, const uint8_t *block, uint32_t lane, uint32_t d) {
    return mixed_quad(s, reinterpret_cast<const uint32_t *>(block) + lane, d / 16, d % 16 / 4) >> 8 * (d % 4) & 255;
}

}  // namespace kvq::store
