// The twin of src/codec/quantizer.rs and src/codec/float8.rs: the same operations in the same order, so that the bytes are
// the same. Files that include this are compiled without fused multiply-add.
#pragma once
#include "page.cuh"

namespace kvq::store {

__device__ __forceinline__ uint32_t e4m3_encode(float x) {
    if (x != x) return 0;
    const uint32_t scaled = __float_as_uint(fminf(fabsf(x), 448.f) * __uint_as_float(7u << 23));
    return (__float_as_uint(x) >> 24 & 0x80) | (scaled + 0x7ffff + (scaled >> 20 & 1)) >> 20;
}
__device__ __forceinline__ uint32_t scale_encode(float x, uint32_t base) {
    if (!(x > 0.f)) return 0;
    return uint32_t(min(max(int((__float_as_uint(x) + 0x40000) >> 19) - int(base << 4), 1), 255));
}
__device__ __forceinline__ uint32_t scale_base(float max_step) {
    return uint32_t(min(max(int(__float_as_uint(max_step) >> 23 & 0xff) + 2 - 15, 1), 239));
}
__device__ __forceinline__ uint32_t e4m3_base(float max_abs) {
    return uint32_t(min(max(int(__float_as_uint(max_abs) >> 23 & 0xff) - 5, 1), 253));
}
__device__ __forceinline__ float inverse_power(uint32_t base) { return __uint_as_float((254 - min(base, 254u)) << 23); }

// e^x for x <= 0; see exp_of_negative in src/recent.rs.
__device__ __forceinline__ float exp_of_negative(float x) {
    if (x <= -87.f) return 0.f;
    const int n = int(x * 1.44269504f - 0.5f);
    const float r = x - float(n) * (355.f / 512.f) - float(n) * -2.12194440e-4f;
    float e = 1.f / 5040.f;
    e = e * r + 1.f / 720.f;
    e = e * r + 1.f / 120.f;
    e = e * r + 1.f / 24.f;
    e = e * r + 1.f / 6.f;
    e = e * r + 0.5f;
    e = e * r + 1.f;
    e = e * r + 1.f;
    return __uint_as_float(__float_as_uint(e) + (uint32_t(n) << 23));
}

// Half a warp, which takes a row: lane i the elements i, i + 16, ... as the partial sums of quantizer.rs do.
struct Team {
    uint32_t lane, first;

    __device__ __forceinline__ static Team of_thread() { return {threadIdx.x % 16, threadIdx.x / 16 % 2 * 16}; }
    // The sum of the lanes' numbers, in their order.
    __device__ __forceinline__ float in_order(float x) const {
        float sum = 0.f;
        for (uint32_t i = 0; i < 16; i++) sum += __shfl_sync(FULL, x, first + i);
        return sum;
    }
    __device__ __forceinline__ float largest(float x) const {
        for (uint32_t o = 8; o > 0; o /= 2) x = fmaxf(x, __shfl_xor_sync(FULL, x, o));
        return x;
    }
    template <class F> __device__ __forceinline__ float sum(const float *x, uint32_t n, F of) const {
        float partial = 0.f;
        for (uint32_t i = lane; i < n; i += 16) partial += of(x[i]);
        return in_order(partial);
    }
    __device__ __forceinline__ float abs_max(const float *x, uint32_t n) const {
        float most = 0.f;
        for (uint32_t i = lane; i < n; i += 16) most = fmaxf(most, fabsf(x[i]));
        return largest(most);
    }
    __device__ __forceinline__ float2 range(const float *x, uint32_t n) const {
        float low = infinity(), high = -infinity();
        for (uint32_t i = lane; i < n; i += 16) low = fminf(low, x[i]), high = fmaxf(high, x[i]);
        // Of zeros of both signs, which one is the smallest is not certain.
        return make_float2(-largest(-low) + 0.f, largest(high) + 0.f);
    }
    __device__ __forceinline__ float root_mean_square(const float *x, uint32_t n) const {
        return sqrtf(sum(x, n, [](float x) { return x * x; }) / float(n));
    }
};

// The part of the half-range that affine codes reach; see Clip::affine.
__device__ __forceinline__ float affine_clip(uint32_t clip, float factor, uint32_t levels) {
    if (clip == CLIP_FACTOR) return factor;
    if (clip == CLIP_CELLS) return float(levels - 1) / float(levels);
    return levels == 3 ? 0.7f : levels == 4 ? 0.8f : levels == 8 ? 0.9f : 1.f;
}

struct Fit { float step, mid; };

// Codes of `levels` levels, 2^bits unless ternary.
struct Quantizer {
    const SideDesc &side;
    uint32_t levels, bits;

    __device__ __forceinline__ static Quantizer of_bits(const SideDesc &side, uint32_t bits) { return {side, 1u << bits, bits}; }
    // Of a tile of one width.
    __device__ __forceinline__ static Quantizer of_width(const SideDesc &side) {
        return {side, side.width == WIDTH_TERNARY ? 3 : 1u << side.width, side.width};
    }

    __device__ __forceinline__ float centre() const { return side.normal ? 63.f : float(levels - 1) * 0.5f; }
    __device__ __forceinline__ float value(uint32_t code) const { return (side.normal ? normal_level(bits, code) : float(code)) - centre(); }
    __device__ __forceinline__ float gaussian_step() const {
        return levels == 2 ? 1.5958f : levels == 3 ? 1.224f : levels == 4 ? 0.9957f : levels == 8 ? 0.5860f : levels == 16 ? 0.3352f : 0.0308f;
    }
    __device__ __forceinline__ float normal_top() const { return bits == 1 ? 0.7979f : bits == 2 ? 1.510f : bits == 3 ? 2.152f : 2.733f; }
    __device__ __forceinline__ float affine() const { return affine_clip(side.clip, side.clip_factor, levels); }

    __device__ __forceinline__ Fit fit(const Team &team, const float *x, uint32_t n) const {
        if (!side.symmetric) {
            const float2 range = team.range(x, n);
            const float half = (range.y - range.x) * 0.5f * affine();
            return {half / centre(), (range.x + range.y) * 0.5f};
        }
        const float widest = team.abs_max(x, n) / centre();
        if (side.clip != CLIP_AUTO) return {widest * affine(), 0.f};
        if (levels == 256) return {widest, 0.f};
        const float deviation = team.root_mean_square(x, n);
        const float best = side.normal ? deviation * normal_top() / 63.f : deviation * gaussian_step();
        return {fminf(best, widest), 0.f};
    }

    __device__ __forceinline__ uint32_t code(float x, float mid, float inverse) const {
        if (!side.normal) {
            // Adding a half and cutting rounds to nearest; the value is not negative after the clamp.
            const float scaled = (x - mid) * inverse + centre();
            return uint32_t(int(fminf(fmaxf(scaled, 0.f), float(levels - 1)) + 0.5f));
        }
        uint32_t code = 0;
        for (uint32_t i = 0; i + 1 < levels; i++) {
            const float border = (normal_level(bits, i) + normal_level(bits, i + 1)) * 0.5f - centre();
            code += x * inverse > border ? 1 : 0;
        }
        return code;
    }

    __device__ __forceinline__ static float inverse_of(float step) { return step > 0.f ? 1.f / step : 0.f; }

    // The step that makes the reconstruction unbiased, or the one that codes were made with.
    __device__ __forceinline__ float refit(const Team &team, const float *x, uint32_t n, float step, float mid) const {
        if (!side.refit) return step;
        const float inverse = inverse_of(step);
        const float energy = team.sum(x, n, [&](float x) { return (x - mid) * (x - mid); });
        const float inner = team.sum(x, n, [&](float x) { return (x - mid) * value(code(x, mid, inverse)); });
        return inner > 0.f ? energy / inner : step;
    }

    // How a row is coded, and the bytes that say so.
    struct Sealed {
        float inverse, mid, step;  // `step`: as it will be read back
        uint32_t step_byte, mid_byte;
    };

    __device__ __forceinline__ float read_step(uint32_t byte, uint32_t base) const {
        return side.symmetric ? scale_decode(byte, base) : e4m3_decode(byte) * power(base);
    }
    __device__ __forceinline__ Sealed seal(const Team &team, const float *x, uint32_t n, const uint8_t *header) const {
        const Fit wanted = fit(team, x, n);
        const uint32_t base = header[0];
        const auto encode = [&](float step) { return side.symmetric ? scale_encode(step, base) : e4m3_encode(step * inverse_power(base)); };
        const uint32_t mid_byte = side.symmetric ? 0 : e4m3_encode(wanted.mid * inverse_power(header[1]));
        const float mid = side.symmetric ? 0.f : e4m3_decode(mid_byte) * power(header[1]);
        const float step = read_step(encode(wanted.step), base);
        const uint32_t step_byte = encode(refit(team, x, n, step, mid));
        return {inverse_of(step), mid, read_step(step_byte, base), step_byte, mid_byte};
    }
};

}  // namespace kvq::store
