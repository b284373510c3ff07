// What every kernel starts from: the structs of desc.rs, how a kernel is declared, and each instruction that CUDA C++ has no
// word for, with its twin for the emulation.
#pragma once

#ifdef KVQ_EMULATE
#include "emulate.h"
#include <immintrin.h>
#endif
#include "kvq_desc.h"

namespace kvq {

// A kernel takes one struct of desc.rs, `p`.
#ifdef KVQ_EMULATE
#define KVQ_KERNEL(name, threads, blocks, Params)                                            \
    static void name(const Params &p);                                                       \
    static void name##_of(const void *p) { name(*static_cast<const Params *>(p)); }          \
    static const kvq::emulation::Register name##_registered(#name, name##_of);               \
    static void name(const Params &p)
#define KVQ_SHARED(name) uint8_t *const name = kvq::emulation::state().shared
#else
#define KVQ_KERNEL(name, threads, blocks, Params) \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name(const __grid_constant__ Params p)
#define KVQ_SHARED(name) extern __shared__ __align__(128) uint8_t name[]
#endif

// A function that is called has what it is given in memory of its own, which is slow to get at: large lambdas are to be inlined too.
#define KVQ_INLINE_LAMBDA __attribute__((always_inline))

constexpr uint32_t FULL = ~0u;

// A kernel may start before the one enqueued before it has ended (driver.rs); it waits for that here, before it reads anything
// but its parameters.
__device__ __forceinline__ void wait_for_stream() {
#if !defined(KVQ_EMULATE) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the next kernel start, and wait, once all blocks have come here.
__device__ __forceinline__ void let_next_start() {
#if !defined(KVQ_EMULATE) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Asks for the line of an address.
__device__ __forceinline__ void prefetch(const void *from) {
#ifdef KVQ_EMULATE
    (void)from;
#else
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
#endif
}

// Conditions that decide where code is put: what is rarely run must not lie between what is, because a page's code is fetched
// anew for each of a block's warps once it is larger than the cache of instructions.
__device__ __forceinline__ bool likely(bool is) { return __builtin_expect(is, 1); }
__device__ __forceinline__ bool unlikely(bool is) { return __builtin_expect(is, 0); }

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }
__device__ __forceinline__ float not_a_number() { return __uint_as_float(0x7fc00000u); }

__device__ __forceinline__ float half_to_float(uint16_t bits) {
#ifdef KVQ_EMULATE
    return _cvtsh_ss(bits);
#else
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
    return f;
#endif
}

__device__ __forceinline__ uint16_t float_to_half(float f) {
#ifdef KVQ_EMULATE
    return _cvtss_sh(f, 0);
#else
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(f));
    return bits;
#endif
}

// Two halves of one word, `low` in the low bits.
__device__ __forceinline__ uint32_t pack_halves(float low, float high) {
#if !defined(KVQ_EMULATE) && __CUDA_ARCH__ >= 800
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
#else
    return float_to_half(low) | uint32_t(float_to_half(high)) << 16;
#endif
}

// What is not finite is taken for 0 (NaN) or FP16's largest.
__device__ __forceinline__ float finite(float x) {
    const float top = 65504.f;
    return x != x ? 0.f : fminf(fmaxf(x, -top), top);
}

// A number of a header's scale, see codec/float8.rs.
__device__ __forceinline__ float power(uint32_t base) { return __uint_as_float(base << 23); }
__device__ __forceinline__ float scale_decode(uint32_t code, uint32_t base) {
    return code ? __uint_as_float((code << 19) + (base << 23)) : 0.f;
}
// The same over 2^(base - 112), where 0 is as good as 2^-15: for sums.
__device__ __forceinline__ float scale_decode_near(uint32_t codes, uint32_t i) {
    const uint32_t bits = i < 2 ? codes << (19 - 8 * i) : i == 2 ? codes << 3 : codes >> 5;
    return __uint_as_float((bits & 0x7f80000u) | 112u << 23);
}
__device__ __forceinline__ float e4m3_decode(uint32_t code) {
    const float magnitude = __uint_as_float((code & 0x7f) << 20) * __uint_as_float(247u << 23);
    return __uint_as_float(__float_as_uint(magnitude) | (code & 0x80) << 24);
}
// 2^exponent, see codec/smooth.rs.
__device__ __forceinline__ float smooth_factor(int exponent) {
    return __uint_as_float(uint32_t(min(max(exponent, -24), 24) + 127) << 23);
}

// How far a pair of a row turns, see src/rotation.rs.
struct Angle {
    float cosine, sine;
};
// For a move by `distance` positions: one position's, to the power of the distance. The same squares and products as there.
__device__ inline Angle angle_of(const RotationDesc &rotation, uint32_t pair, int distance) {
    double cosine = 1., sine = 0., x = rotation.pairs[pair][0], y = rotation.pairs[pair][1];
    for (uint32_t m = distance < 0 ? 0u - uint32_t(distance) : uint32_t(distance); m > 0; m /= 2) {
        const double turned = cosine * x - sine * y, square = x * x - y * y;
        if (m & 1) sine = cosine * y + sine * x, cosine = turned;
        y = 2. * x * y, x = square;
    }
    return {float(cosine), float(distance < 0 ? -sine : sine)};
}
// Turns a pair of a row.
__device__ __forceinline__ void turn_pair(const RotationDesc &rotation, float *row, uint32_t pair, Angle angle) {
    float &left = row[rotation.interleaved ? 2 * pair : pair], &right = row[rotation.interleaved ? 2 * pair + 1 : rotation.n_pairs + pair];
    const float x = left, y = right;
    left = x * angle.cosine - y * angle.sine;
    right = x * angle.sine + y * angle.cosine;
}

__device__ __forceinline__ float warp_sum(float x) {
    for (uint32_t o = 16; o > 0; o /= 2) x += __shfl_xor_sync(FULL, x, o);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
    for (uint32_t o = 16; o > 0; o /= 2) x = fmaxf(x, __shfl_xor_sync(FULL, x, o));
    return x;
}
__device__ __forceinline__ uint32_t warp_most(uint32_t x) {
#if !defined(KVQ_EMULATE) && __CUDA_ARCH__ >= 800
    return __reduce_max_sync(FULL, x);
#else
    for (uint32_t o = 16; o > 0; o /= 2) x = max(x, __shfl_xor_sync(FULL, x, o));
    return x;
#endif
}
// Of numbers that are not negative.
__device__ __forceinline__ float warp_max_positive(float x) {
    return __uint_as_float(warp_most(__float_as_uint(x)));
}

}  // namespace kvq
