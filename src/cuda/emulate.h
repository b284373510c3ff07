// CUDA's threads on one thread of the CPU, so that kernels can be tested without a GPU. The threads of a block are fibers;
// the lanes of a warp run in turn until all of them wait for each other, the warps of a block until all wait at a
// __syncthreads. Blocks run one after the other. What is shared works on the caller's memory.
//
// Emulated: thread and block numbers, shared memory, barriers, votes, shuffles, atomics. Instructions that CUDA C++ has no
// word for have a twin in device.cuh. Barriers that only a part of a warp reaches are an error here, as are barriers of
// different kinds: the launch fails.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifndef __x86_64__
#error "the emulation switches fibers with a few instructions of x86-64: write them for this machine"
#endif

#define __global__
#define __device__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ inline __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__

namespace kvq::emulation {

struct Index { uint32_t x, y, z; };

enum Wait { READY, AT_WARP, AT_BLOCK, DONE };

struct Fiber {
    void *stack_pointer;
    Index thread;
    Wait wait;
};

constexpr uint32_t MAX_THREADS = 512, STACK = 64 << 10, WARP_WORDS = 16;

struct State {
    Fiber fibers[MAX_THREADS];
    uint32_t mail[MAX_THREADS][WARP_WORDS];  // what a lane shows the others of its warp
    uint8_t *stacks, *shared;
    void *scheduler;
    Fiber *fiber;
    Index block, blocks;
    uint32_t threads;
    void (*kernel)(const void *);
    const void *params;
};

inline State &state() {
    static thread_local State *s = static_cast<State *>(calloc(1, sizeof(State)));
    return *s;
}

extern "C" void kvq_emulated_switch(void **from, void *to);

__attribute__((noinline)) inline void pause(Wait wait) {
    State &s = state();
    s.fiber->wait = wait;
    kvq_emulated_switch(&s.fiber->stack_pointer, s.scheduler);
}

inline uint32_t lane() { return state().fiber->thread.x % 32; }

// Shows `words` words to the warp; `read(mail)` gets the words of all lanes.
template <class T, class F> inline auto exchange(const T &value, F read) {
    static_assert(sizeof(T) <= WARP_WORDS * 4, "too much mail");
    State &s = state();
    const uint32_t first = s.fiber->thread.x / 32 * 32;
    memcpy(s.mail[first + lane()], &value, sizeof(T));
    pause(AT_WARP);
    const auto get = [&](uint32_t from) {
        T t;
        memcpy(&t, s.mail[first + from % 32], sizeof(T));
        return t;
    };
    auto result = read(get);
    pause(AT_WARP);
    return result;
}

typedef void (*Kernel)(const void *);
struct Register {
    const char *name;
    Kernel kernel;
    Register *next;
    static Register *&first() {
        static Register *f = nullptr;
        return f;
    }
    Register(const char *n, Kernel k) : name(n), kernel(k), next(first()) { first() = this; }
};

}  // namespace kvq::emulation

#define threadIdx (kvq::emulation::state().fiber->thread)
#define blockIdx (kvq::emulation::state().block)
#define gridDim (kvq::emulation::state().blocks)

inline void __syncthreads() { kvq::emulation::pause(kvq::emulation::AT_BLOCK); }
inline void __syncwarp() { kvq::emulation::pause(kvq::emulation::AT_WARP); }
inline void __threadfence() {}
template <class T> inline T __shfl_xor_sync(uint32_t, T value, uint32_t mask) {
    const uint32_t from = kvq::emulation::lane() ^ mask;
    return kvq::emulation::exchange(value, [&](auto get) { return get(from); });
}
template <class T> inline T __shfl_sync(uint32_t, T value, uint32_t from) {
    return kvq::emulation::exchange(value, [&](auto get) { return get(from); });
}
inline uint32_t __ballot_sync(uint32_t, bool is) {
    return kvq::emulation::exchange(uint32_t(is), [&](auto get) {
        uint32_t bits = 0;
        for (uint32_t i = 0; i < 32; i++) bits |= get(i) << i;
        return bits;
    });
}
inline bool __any_sync(uint32_t mask, bool is) { return __ballot_sync(mask, is) != 0; }
inline bool __all_sync(uint32_t mask, bool is) { return __ballot_sync(mask, is) == ~0u; }
inline uint32_t atomicAdd(uint32_t *to, uint32_t n) {
    const uint32_t old = *to;
    *to += n;
    return old;
}
inline uint32_t atomicMax(uint32_t *to, uint32_t n) {
    const uint32_t old = *to;
    *to = old < n ? n : old;
    return old;
}
inline float __uint_as_float(uint32_t x) {
    float f;
    memcpy(&f, &x, 4);
    return f;
}
inline uint32_t __float_as_uint(float f) {
    uint32_t x;
    memcpy(&x, &f, 4);
    return x;
}
template <class T> inline T __ldg(const T *from) { return *from; }
template <class T> inline T __ldcg(const T *from) { return *from; }
struct uint2 { uint32_t x, y; };
struct __align__(16) uint4 { uint32_t x, y, z, w; };
struct float2 { float x, y; };
struct __align__(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
template <class T> inline T min(T a, T b) { return b < a ? b : a; }
template <class T> inline T max(T a, T b) { return a < b ? b : a; }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(uint32_t x) { return __builtin_ffs(int(x)); }
