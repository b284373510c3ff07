// Reading pages of every codec in plain arithmetic: what src/codec/*/scalar.rs does, a lane of the tile per thread.
#pragma once
#include "device.cuh"

namespace kvq {

// How many segments have 4, 3, 2 and 1 bits; see codec/mixed.rs.
struct Segments {
    uint32_t four, three, two;

    __device__ static Segments of_header(const uint8_t *header, uint32_t n, uint32_t budget) {
        const int four = header[2], three = header[3], rest = int(n) - four - three;
        const int two = int(budget) - 4 * four - 3 * three - rest;
        // A page that was never sealed has no header; its rows are read by nobody.
        if (rest < 0 || two < 0 || rest < two) return {0, 0, 0};
        return {uint32_t(four), uint32_t(three), uint32_t(two)};
    }
    __device__ static Segments uniform(uint32_t bits, uint32_t n) {
        return {bits == 4 ? n : 0, bits == 3 ? n : 0, bits == 2 ? n : 0};
    }
    __device__ uint32_t bits(uint32_t i) const {
        return i < four ? 4 : i < four + three ? 3 : i < four + three + two ? 2 : 1;
    }
};

// Levels of the best quantizer for a Gaussian; see codec/quantizer.rs, where a test compares them.
__device__ __forceinline__ float normal_level(uint32_t bits, uint32_t code) {
    // Not an array: one whose index is not known would lie in memory.
    const uint64_t four = code >= 8 ? 0x7e6f645c554e4842ull : 0x3c363029221a0f00ull;
    const uint64_t levels = bits == 1 ? 126ull << 8 : bits == 2 ? 0x7e522c00ull : bits == 3 ? 0x7e66554638291800ull : four;
    return float(levels >> 8 * (code % 8) & 0xff);
}
// The middle of what codes of `bits` bits stand for.
__device__ __forceinline__ float centre_of(uint32_t bits, bool normal) { return normal ? 63.f : float((1u << bits) - 1) * 0.5f; }

// Adds code * coefficient for the four codes of a quad to every row's sum. coef: [row][stride], at the quad's first place.
template <int R> __device__ __forceinline__ void add_quad(const float (&code)[4], const float *coef, uint32_t stride, float (&sum)[R]) {
#pragma unroll
    for (int r = 0; r < R; r++) {
        const float4 c = *reinterpret_cast<const float4 *>(coef + r * stride);
        sum[r] += code[0] * c.x + code[1] * c.y + (code[2] * c.z + code[3] * c.w);
    }
}
__device__ __forceinline__ void field(uint32_t word, uint32_t shift, uint32_t mask, float (&code)[4]) {
#pragma unroll
    for (int j = 0; j < 4; j++) code[j] = float(word >> (shift + 8 * j) & mask);
}

// sum[row] += sum over the depth of coef[row][place] * code: a lane of a tile of one width. See codec/tile.rs.
template <int R>
__device__ void tile_dot(const SideDesc &side, const uint8_t *tile, uint32_t lane, uint32_t depth, const float *coef, uint32_t stride, float (&sum)[R]) {
    const uint32_t *words = reinterpret_cast<const uint32_t *>(tile) + lane / 32 * side.tile_words * 32 + lane % 32;
    const uint32_t width = side.width, quads = depth / 4;
    float code[4];
    if (width == WIDTH_TERNARY) {
        constexpr uint32_t POWERS[5] = {1, 3, 9, 27, 81};
        const uint32_t in_words = min(side.tile_words * 5, quads);
#pragma unroll 1
        for (uint32_t q = 0; q < quads; q++) {
            if (q < in_words) {
                const uint32_t word = words[q / 5 * 32], power = POWERS[q % 5];
                for (int j = 0; j < 4; j++) code[j] = float((word >> 8 * j & 255) / power % 3);
            } else {
                const uint32_t lanes = (side.tile_tail / 128 / side.tile_words) * 32;
                const uint32_t entry = (q - in_words) * (lanes / 16) + lane / 16;
                const uint8_t *tail = tile + side.tile_tail + entry / 4 * 64 + lane % 16 * 4;
                field(*reinterpret_cast<const uint32_t *>(tail), 2 * (entry % 4), 3, code);
            }
            add_quad<R>(code, coef + 4 * q, stride, sum);
        }
        return;
    }
    const uint32_t per_word = width == 8 ? 1 : width == 4 ? 2 : 4, bits = width == 3 ? 2 : width;
#pragma unroll 1
    for (uint32_t w = 0; w < quads / per_word; w++) {
        const uint32_t word = words[w * 32], high = width == 3 ? words[(quads / 4 + w / 2) * 32] : 0;
        for (uint32_t f = 0; f < per_word; f++) {
            field(word, bits * f, (1u << bits) - 1, code);
            if (width == 3) {
                float top[4];
                field(high, w % 2 * 4 + f, 1, top);
                for (int j = 0; j < 4; j++) code[j] += 4.f * top[j];
            }
            add_quad<R>(code, coef + 4 * (w * per_word + f), stride, sum);
        }
    }
}

// The same for a lane of a tile of mixed widths; `words`: the lane's first word. See codec/mixed.rs.
template <int R>
__device__ void mixed_dot(const Segments &s, bool normal, const uint32_t *words, uint32_t depth, const float *coef, uint32_t stride, float (&sum)[R]) {
    const uint32_t plane = 2 * s.four + s.three + s.two;
#pragma unroll 1
    for (uint32_t i = 0; i < depth / 16; i++) {
        const uint32_t bits = s.bits(i), odd = i < s.four + s.three ? i - s.four : i - s.four - s.two;
#pragma unroll 1
        for (uint32_t q = 0; q < 4; q++) {
            float code[4];
            if (bits == 4) {
                field(words[(2 * i + q / 2) * 32], q % 2 * 4, 15, code);
            } else if (bits == 1) {
                field(words[(plane + odd / 2) * 32], odd % 2 * 4 + q, 1, code);
            } else {
                field(words[(s.four + i) * 32], 2 * q, 3, code);
                if (bits == 3) {
                    float top[4];
                    field(words[(plane + odd / 2) * 32], odd % 2 * 4 + q, 1, top);
                    for (int j = 0; j < 4; j++) code[j] += 4.f * top[j];
                }
            }
            if (normal) {
                for (int j = 0; j < 4; j++) code[j] = normal_level(bits, uint32_t(code[j]));
            }
            add_quad<R>(code, coef + 16 * i + 4 * q, stride, sum);
        }
    }
}

// A page of a head region.
struct Page {
    const uint8_t *header, *bytes;
    __device__ static Page of(const SideDesc &side, const uint8_t *region, uint32_t page) {
        return {region + side.headers + 4 * size_t(page), region + side.pages + size_t(page) * side.page_bytes};
    }
    // Of a group's token, or of a place.
    __device__ float step(const SideDesc &side, uint32_t i) const {
        if (side.half) return half_to_float(reinterpret_cast<const uint16_t *>(bytes + side.steps)[i]);
        const uint32_t code = bytes[side.steps + i];
        return side.symmetric ? scale_decode(code, header[0]) : e4m3_decode(code) * power(header[0]);
    }
    __device__ float mid(const SideDesc &side, uint32_t i) const {
        if (side.mids == ABSENT) return 0.f;
        if (side.half) return half_to_float(reinterpret_cast<const uint16_t *>(bytes + side.mids)[i]);
        return e4m3_decode(bytes[side.mids + i]) * power(header[1]);
    }
    __device__ uint32_t ordered(const SideDesc &side, uint32_t i, uint32_t n) const {
        return side.order == ABSENT ? i : min(uint32_t(bytes[side.order + i]), n - 1);
    }
    __device__ float mean(const SideDesc &side, uint32_t channel) const {
        return half_to_float(reinterpret_cast<const uint16_t *>(bytes + side.mean)[channel]);
    }
    __device__ float factor(const SideDesc &side, uint32_t channel) const {
        return smooth_factor(int8_t(bytes[side.exponents + channel]));
    }
};

// Rotates a row in shared memory, by a warp; see codec/hadamard.rs.
__device__ inline void rotate_row(float *row, uint32_t dim, uint32_t lane) {
    const uint32_t block = dim & (0u - dim);
    for (uint32_t half = 1; half < block; half *= 2) {
        __syncwarp();
        for (uint32_t i = lane; i < dim / 2; i += 32) {
            const uint32_t a = i / half * 2 * half + i % half;
            const float x = row[a], y = row[a + half];
            row[a] = x + y;
            row[a + half] = x - y;
        }
    }
    __syncwarp();
    const float norm = 1.f / sqrtf(float(block));
    for (uint32_t c = lane; c < dim; c += 32) row[c] *= norm;
    __syncwarp();
}

}  // namespace kvq
