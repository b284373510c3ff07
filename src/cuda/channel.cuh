// Sealing keys channel by channel: the twin of src/codec/channel/scalar.rs.
#pragma once
#include "seal.cuh"

namespace kvq::store {

// A bit for each record: whether it is coded for good, the outlier pool not having it. All warps know the same.
struct Coded {
    uint32_t bits[MAX_PAGE / 32];

    __device__ __forceinline__ static Coded of(const Store &b) {
        Coded coded;
#pragma unroll
        for (uint32_t i = 0; i < MAX_PAGE / 32; i++) {
            const uint32_t record = 32 * i + b.lane;
            coded.bits[i] = __ballot_sync(FULL, record < b.s.n_rows && b.s.pooled[record] == NONE);
        }
        return coded;
    }
    // Calls `f(row, is coded)` for every record; no branch between them, so that rows are read ahead.
    template <class F> __device__ __forceinline__ void for_each(const Store &b, F f) const {
        const uint32_t n_rows = b.s.n_rows;
#pragma unroll 1
        for (uint32_t first = 0; first < n_rows; first += 32) {
            uint32_t word = bits[0];
#pragma unroll
            for (uint32_t i = 1; i < MAX_PAGE / 32; i++) word = first == 32 * i ? bits[i] : word;
#pragma unroll 4
            for (uint32_t i = 0; i < min(32u, n_rows - first); i++) f(b.row(first + i), (word >> i & 1) != 0);
        }
    }
};

// Smallest and largest value of each channel to s.a and s.b, how much its errors matter to s.c. Ends with a barrier.
__device__ __forceinline__ void measure_channels(const Store &b, const Target &t) {
    Scratch &s = b.s;
    const uint32_t c = b.thread, dim = t.side.desc.head_dim;
    const float *learned = t.side.learned();
    // Errors of coefficients in a frame matter alike.
    const bool is_weighed = t.side.desc.codec == CODEC_CHANNEL && has_learned(b, t.side);
    const Coded coded = Coded::of(b);
    if (c < dim) {
        // Where the pool has all of them, all count.
        const bool all = s.n_exact == s.n_rows;
        float low = infinity(), high = -infinity(), sum = 0.f, weight = 0.f;
        uint32_t n = 0;
        coded.for_each(b, [&](const float *row, bool is) {
            const float x = row[c], low_with = fminf(low, x), high_with = fmaxf(high, x), sum_with = sum + x;
            is |= all;
            n += is ? 1 : 0, low = is ? low_with : low, high = is ? high_with : high, sum = is ? sum_with : sum;
        });
        const float mean = sum * (1.f / float(max(n, 1u)));
        coded.for_each(b, [&](const float *row, bool is) {
            const float x = row[c] - mean, weight_with = weight + x * x;
            weight = is || all ? weight_with : weight;
        });
        // See Team::range.
        s.a[c] = low + 0.f, s.b[c] = high + 0.f, s.c[c] = is_weighed ? weight * learned[c] : weight;
    }
    __syncthreads();
}

// Which channels have how many bits, and in which order they lie: s.order, and the page. Ends with a barrier.
__device__ __forceinline__ Segments choose_channel_order(const Store &b, const Target &t) {
    Scratch &s = b.s;
    const SideDesc &d = t.side.desc;
    const uint32_t c = b.thread;
    Segments segments = Segments::uniform(d.budget / d.n_segments, d.n_segments);
    if (c < d.head_dim) {
        const uint32_t place = d.order == ABSENT ? c : place_in_falling(s.c, c, d.head_dim);
        s.order[place] = uint8_t(c), s.d[place] = s.c[c];
    }
    __syncthreads();
    if (d.order != ABSENT) {
        share_out(b, s.d, d.segment, d.n_segments, d.budget, 1);
        segments = {s.segments[0], s.segments[1], s.segments[2]};
        if (c < d.head_dim) t.bytes[d.order + c] = s.order[c];
    }
    if (c == 0) t.header[2] = uint8_t(segments.four), t.header[3] = uint8_t(segments.three);
    return segments;
}

__device__ __forceinline__ void write_number(const Target &t, uint32_t offset, uint32_t i, float x, uint32_t base) {
    if (t.side.desc.half) {
        reinterpret_cast<uint16_t *>(t.bytes + offset)[i] = float_to_half(fminf(fmaxf(x, -65504.f), 65504.f));
    } else {
        t.bytes[offset + i] = uint8_t(e4m3_encode(x * inverse_power(base)));
    }
}

// Steps and mid-points of a fresh page as the ranges in s.a and s.b want them. Ends with a barrier.
__device__ __forceinline__ void write_ranges(const Store &b, const Target &t, const Segments &segments) {
    Scratch &s = b.s;
    const SideDesc &d = t.side.desc;
    const uint32_t i = b.thread;
    if (i < 2) s.most[i] = 0;
    __syncthreads();
    float step = 0.f, mid = 0.f;
    if (i < d.head_dim) {
        const uint32_t c = s.order[i], bits = segments.bits(i / 16);
        const float half = (s.b[c] - s.a[c]) * 0.5f * affine_clip(d.clip, d.clip_factor, 1u << bits);
        step = half / centre_of(bits, false);
        mid = (s.b[c] + s.a[c]) * 0.5f;
        if (!d.half) raise(s, 0, fabsf(step)), raise(s, 1, fabsf(mid));
    }
    __syncthreads();
    const uint32_t bases[2] = {e4m3_base(__uint_as_float(s.most[0])), e4m3_base(__uint_as_float(s.most[1]))};
    if (i < 2 && !d.half) t.header[i] = uint8_t(i == 0 ? bases[0] : bases[1]);
    if (i < d.head_dim) write_number(t, d.steps, i, step, bases[0]), write_number(t, d.mids, i, mid, bases[1]);
    __syncthreads();
}

// How a value of one channel is coded.
struct ChannelCode {
    float mid, inverse, centre;
    __device__ __forceinline__ uint32_t of(float x) const { return uint32_t(int(fminf(fmaxf(x * inverse + centre, 0.f), 2.f * centre) + 0.5f)); }
};

// Replaces the steps by those that make the reconstruction unbiased; mid-points and inverse steps are in s.a and s.b.
__device__ __forceinline__ void refit_channels(const Store &b, const Target &t, const Segments &segments) {
    const Scratch &s = b.s;
    const SideDesc &d = t.side.desc;
    const uint32_t i = b.thread;
    const Coded coded = Coded::of(b);
    if (i >= d.head_dim) return;
    const uint32_t c = s.order[i];
    const ChannelCode code = {s.a[i], s.b[i], centre_of(segments.bits(i / 16), false)};
    float energy = 0.f, inner = 0.f;
    coded.for_each(b, [&](const float *row, bool is) {
        const float x = row[c] - code.mid;
        const float energy_with = energy + x * x, inner_with = inner + x * (float(code.of(x)) - code.centre);
        energy = is ? energy_with : energy, inner = is ? inner_with : inner;
    });
    if (inner > 0.f) write_number(t, d.steps, i, energy / inner, t.header[0]);
}

// Codec `channel`.
__device__ __forceinline__ void seal_channels(const Store &b, const Target &t) {
    Scratch &s = b.s;
    const SideDesc &d = t.side.desc;
    const Page page = {t.header, t.bytes};
    const uint32_t dim = d.head_dim, i = b.thread;
    Segments segments = {0, 0, 0};
    if (t.fresh) {
        measure_channels(b, t);
        segments = choose_channel_order(b, t);
        write_ranges(b, t, segments);
    } else {
        segments = Segments::of_header(t.header, d.n_segments, d.budget);
        if (i < dim) s.order[i] = uint8_t(page.ordered(d, i, dim));
    }
    if (i < dim) s.a[i] = page.mid(d, i), s.b[i] = Quantizer::inverse_of(page.step(d, i));
    if (i < s.n_rows) s.record_of[s.at[i]] = uint16_t(i);
    __syncthreads();
    if (t.fresh && d.refit) refit_channels(b, t, segments);
    __syncthreads();
    for (uint32_t record = b.warp; record < s.n_rows; record += STORE_WARPS) {
        uint32_t codes[MAX_DIM / 32];
#pragma unroll
        for (uint32_t k = 0; k < MAX_DIM / 32; k++) {
            const uint32_t at = 32 * k + b.lane;
            if (at >= dim) continue;
            const ChannelCode code = {s.a[at], s.b[at], centre_of(segments.bits(2 * k + b.lane / 16), false)};
            codes[k] = code.of(b.row(record)[s.order[at]] - code.mid);
        }
        __syncwarp();
#pragma unroll
        for (uint32_t k = 0; k < MAX_DIM / 32; k++) {
            if (32 * k + b.lane < dim) b.codes(record)[32 * k + b.lane] = uint8_t(codes[k]);
        }
    }
    __syncthreads();
    pack_rows(b, t, segments);
}

}  // namespace kvq::store
