// Tensor cores, asynchronous copies and the few other instructions of the fast kernels, each with its twin.
#pragma once
#include "device.cuh"

namespace kvq {

#ifdef KVQ_EMULATE
// c += a * b as below: `add(c, a, b)` adds the products of a word of each.
template <class T, class F> inline void emulate_mma(T (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, F add) {
    struct Operands { uint32_t a[4], b[2]; };
    kvq::emulation::exchange(Operands{{a0, a1, a2, a3}, {b0, b1}}, [&](auto get) {
        const uint32_t lane = kvq::emulation::lane(), g = lane / 4, t = lane % 4;
        for (uint32_t i = 0; i < 4; i++) {
            for (uint32_t k = 0; k < 4; k++) {
                const Operands x = get(4 * g + k), y = get(4 * (2 * t + i % 2) + k);
                for (uint32_t half = 0; half < 2; half++) add(c[i], x.a[i / 2 + 2 * half], y.b[half]);
            }
        }
        return 0;
    });
}
#endif

// c += a * b: a is 16 x 16 (row, depth), b 16 x 8 (depth, column), halves; c 16 x 8 floats. Of lane 4 * g + t: a[0], a[1] are
// depth 2t, 2t + 1 of rows g, g + 8; a[2], a[3] the same of depth 8 more; b0, b1 the same depths of column g; c[0], c[1] are
// columns 2t, 2t + 1 of row g, c[2], c[3] of row g + 8. Subnormal halves count for what they are.
__device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
#ifdef KVQ_EMULATE
    emulate_mma(c, a0, a1, a2, a3, b0, b1, [](float &sum, uint32_t a, uint32_t b) {
        for (uint32_t e = 0; e < 32; e += 16) sum += half_to_float(uint16_t(a >> e)) * half_to_float(uint16_t(b >> e));
    });
#elif __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b0));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a2), "r"(a3), "r"(b1));
#endif
}

// c += a * b: a is 16 x 32 (row, depth), unsigned bytes, b 32 x 8 (depth, column), signed ones. Of lane 4 * g + t: a0, a1 are
// depths 4t to 4t + 3 of rows g, g + 8; a2, a3 the same of depths 16 more; b0, b1 the same depths of column g; c as above.
__device__ __forceinline__ void mma(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
#ifdef KVQ_EMULATE
    emulate_mma(c, a0, a1, a2, a3, b0, b1, [](int &sum, uint32_t a, uint32_t b) {
        for (uint32_t e = 0; e < 32; e += 8) sum += int(a >> e & 255) * int(int8_t(b >> e));
    });
#elif __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
    const auto add = [](int &x, int &y, uint32_t a, uint32_t b) {
        asm("mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};" : "+r"(x), "+r"(y) : "r"(a), "r"(b));
    };
    add(c[0], c[1], a0, b0);
    add(c[2], c[3], a1, b0);
    add(c[0], c[1], a2, b1);
    add(c[2], c[3], a3, b1);
#endif
}

// Bytes of two words: number i of the result is the one that digit i of `which` names, those of `b` from 4 on.
__device__ __forceinline__ uint32_t pick_bytes(uint32_t a, uint32_t b, uint32_t which) {
#ifdef KVQ_EMULATE
    const uint64_t all = uint64_t(b) << 32 | a;
    uint32_t word = 0;
    for (uint32_t i = 0; i < 4; i++) word |= uint32_t(all >> 8 * (which >> 4 * i & 7) & 255) << 8 * i;
    return word;
#else
    return __byte_perm(a, b, which);
#endif
}

// A number that, added to an integer x of 15 bits and a sign, leaves x + 128 in the low 16 bits of the sum.
constexpr float AS_INTEGER = 12582912.f + 128.f;
// Four integers to which it was added, as words of signed bytes: 256 * high + low.
struct TwoBytes {
    uint32_t high, low;
    __device__ static TwoBytes of(const float (&x)[4]) {
        const uint32_t a = pick_bytes(__float_as_uint(x[0]), __float_as_uint(x[1]), 0x5140), b = pick_bytes(__float_as_uint(x[2]), __float_as_uint(x[3]), 0x5140);
        return {pick_bytes(a, b, 0x7632), pick_bytes(a, b, 0x5410) ^ 0x80808080u};
    }
};

// An address in shared memory.
#ifdef KVQ_EMULATE
typedef uint8_t *SharedAt;
__device__ inline SharedAt shared_at(uint8_t *at) { return at; }
#else
typedef uint32_t SharedAt;
__device__ __forceinline__ SharedAt shared_at(uint8_t *at) { return uint32_t(__cvta_generic_to_shared(at)); }
#endif

// Copies 16 bytes to shared memory; they are there after a copy_wait for their group.
__device__ __forceinline__ void copy_async(SharedAt to, const uint8_t *from) {
#ifdef KVQ_EMULATE
    *reinterpret_cast<uint4 *>(to) = *reinterpret_cast<const uint4 *>(from);
#elif __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
#else
    const uint4 x = __ldcg(reinterpret_cast<const uint4 *>(from));
    asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
#endif
}
// Ends a group of copies of this thread.
__device__ __forceinline__ void copy_commit() {
#if !defined(KVQ_EMULATE) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits for all but the last `Pending` groups of this thread, and for the other lanes.
template <int Pending> __device__ __forceinline__ void copy_wait() {
#if !defined(KVQ_EMULATE) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#endif
    __syncwarp();
}

// 2^x.
__device__ __forceinline__ float power_of_two(float x) {
#ifdef KVQ_EMULATE
    return exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// Rotates a row of which a lane has four channels, 4 * lane to 4 * lane + 3, in blocks of `block` channels. Not unrolled: see `unlikely`.
__device__ __forceinline__ void rotate_quads(float (&x)[4], uint32_t lane, uint32_t block) {
    const float a = x[0] + x[1], b = x[0] - x[1], c = x[2] + x[3], d = x[2] - x[3];
    x[0] = a + c, x[1] = b + d, x[2] = a - c, x[3] = b - d;
#pragma unroll 1
    for (uint32_t half = 1; half < block / 4; half *= 2) {
        const bool upper = lane & half;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float other = __shfl_xor_sync(FULL, x[j], half);
            x[j] = upper ? other - x[j] : x[j] + other;
        }
    }
    const float norm = 1.f / sqrtf(float(block));
#pragma unroll
    for (int j = 0; j < 4; j++) x[j] *= norm;
}

// Sums N values over the warp; lane l gets that of value `owned<N>(l)`.
template <int N> __device__ __forceinline__ float sum_each(const float (&in)[N]) {
    const uint32_t lane = threadIdx.x % 32;
    float x[N];
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = in[i];
#pragma unroll
    for (int n = N / 2, bit = 1; n > 0; n /= 2, bit *= 2) {
        const bool upper = lane & bit;
#pragma unroll
        for (int i = 0; i < n; i++) {
            const float keep = upper ? x[i + n] : x[i], send = upper ? x[i] : x[i + n];
            x[i] = keep + __shfl_xor_sync(FULL, send, bit);
        }
    }
#pragma unroll
    for (int bit = N; bit < 32; bit *= 2) x[0] += __shfl_xor_sync(FULL, x[0], bit);
    return x[0];
}
// The lowest lane that has value `i` of sum_each.
template <int N> __device__ __forceinline__ uint32_t owner(uint32_t i) {
    uint32_t lane = 0;
#pragma unroll
    for (int n = N / 2, bit = 1; n > 0; n /= 2, bit *= 2) lane |= i & n ? bit : 0;
    return lane;
}

}  // namespace kvq
