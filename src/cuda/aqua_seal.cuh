// Sealing keys of codec `aqua`, and values that they predict: the twin of `seal` of src/codec/aqua/mod.rs and of `take` of
// src/codec/aqua/predict.rs.
#pragma once
#include "channel.cuh"
#include "learn.cuh"

namespace kvq::store {

// Rows at which a warp of the store works together.
constexpr uint32_t AQUA_ROWS = 2;

// Calls `f(first, rows)` with warps for AQUA_ROWS records at a time. Ends with a barrier.
template <class F> __device__ __forceinline__ void for_each_rows(const Store &b, F f) {
    for (uint32_t i = AQUA_ROWS * b.warp; i < b.s.n_rows; i += AQUA_ROWS * STORE_WARPS)
        f(i, WarpRows<AQUA_ROWS>::of(i, b.s.n_rows - i, [&](uint32_t record) { return b.row(record); }));
    __syncthreads();
}

// The frame of a page that is made anew: the position that most of its rows agree on. Ends with a barrier.
__device__ __forceinline__ void choose_frame(const Store &b, uint32_t page, Seal seal) {
    Scratch &s = b.s;
    const LayerDesc &l = b.p.layer;
    // Where row 0 would be, as each row has it.
    int *first = reinterpret_cast<int *>(s.d);
    for (uint32_t i = b.warp; i < s.n_rows; i += STORE_WARPS) {
        const uint32_t cell = page * l.page + s.at[i];
        const int turned = seal == Seal::FRESH ? 0 : distance_of(b, page, s.at[i]);
        if (b.lane == 0) first[i] = int(uint32_t(cell < l.n_cells ? b.p.positions[cell] : 0) - uint32_t(turned) - s.at[i]);
    }
    if (b.thread < 2) s.most[b.thread] = 0;
    __syncthreads();
    uint32_t n = 0;
    for (uint32_t i = 0; b.thread < s.n_rows && i < s.n_rows; i++) n += first[i] == first[b.thread] ? 1 : 0;
    atomicMax(&s.most[0], n);
    __syncthreads();
    // Of several that as many agree on the last one: as it is ordered with its sign.
    if (n > 0 && n == s.most[0]) atomicMax(&s.most[1], uint32_t(first[b.thread]) ^ 1u << 31);
    __syncthreads();
    if (b.thread == 0) s.frame = {int(s.most[1] ^ 1u << 31), b.head, l.k.n_segments, 2 * s.most[0] >= s.n_rows};
    __syncthreads();
}

// Takes the rows to what is coded. Ends with a barrier.
__device__ __forceinline__ void enter_frame(const Store &b) {
    Scratch &s = b.s;
    const LayerDesc &l = b.p.layer;
    const Frame frame = Frame::of(l, s.frame);
    const RotationDesc &rotation = frame.desc.rotation;
    const uint32_t dim = l.k.head_dim, n_pairs = min(rotation.n_pairs, dim / 2);
    if (b.thread < n_pairs) {
        const Angle angle = angle_of(rotation, b.thread, s.frame.first);
        s.a[b.thread] = angle.cosine, s.b[b.thread] = -angle.sine;
    }
    __syncthreads();
    for (uint32_t i = b.warp; i < s.n_rows; i += STORE_WARPS) {
        float *row = b.row(i);
        for (uint32_t pair = b.lane; pair < n_pairs; pair += 32) turn_pair(rotation, row, pair, {s.a[pair], s.b[pair]});
        __syncwarp();
        const float *bias = frame.has_bias(s.frame) ? frame.bias(s.at[i]) : nullptr;
        for (uint32_t c = b.lane; bias != nullptr && c < dim; c += 32) row[c] -= bias[c];
    }
    __syncthreads();
    for_each_rows(b, [&](uint32_t, const WarpRows<AQUA_ROWS> &rows) { multiply_rows(frame.transform(), dim, rows, b.lane); });
}

// The least error that widths leave of the first `n` segments of coefficients whose squares are in s.a, with those that are not
// coded; it is thread 0's. Ends with a barrier.
__device__ __forceinline__ float error_of_segments(const Store &b, uint32_t n) {
    Scratch &s = b.s;
    const SideDesc &d = b.p.layer.k;
    const uint32_t c = b.thread, n_coded = 16 * n;
    if (c < n_coded) s.b[place_in_falling(s.a, c, n_coded)] = s.a[c];
    __syncthreads();
    share_out(b, s.b, 16, n, d.budget, 1);
    const Segments segments = {s.segments[0], s.segments[1], s.segments[2]};
    float error = 0.f, rest = 0.f;
    if (b.thread == 0) {
        const float distortion[5] = {1.f, 0.3634f, 0.1188f, 0.03744f, 0.01154f};
        for (uint32_t i = 0; i < n; i++) {
            float sum = 0.f;
            for (uint32_t j = 0; j < 16; j++) sum += s.b[16 * i + j];
            error += distortion[segments.bits(i)] * sum;
        }
        for (uint32_t i = n_coded; i < d.head_dim; i++) rest += s.a[i];
    }
    __syncthreads();
    return error + rest;
}

// How many segments of coefficients are coded with the least error: s.frame. Ends with a barrier.
__device__ __forceinline__ void choose_n_segments(const Store &b) {
    Scratch &s = b.s;
    const SideDesc &d = b.p.layer.k;
    if (d.fewest_segments == d.n_segments) return;
    const uint32_t c = b.thread;
    if (c < d.head_dim) {
        float sum = 0.f, weight = 0.f;
#pragma unroll 4
        for (uint32_t i = 0; i < s.n_rows; i++) sum += b.row(i)[c];
        const float mean = sum * (1.f / float(max(s.n_rows, 1u)));
#pragma unroll 4
        for (uint32_t i = 0; i < s.n_rows; i++) {
            const float x = b.row(i)[c] - mean;
            weight += x * x;
        }
        s.a[c] = weight;
    }
    __syncthreads();
    float least = 0.f;
    for (uint32_t n = d.fewest_segments; n <= d.n_segments; n++) {
        const float error = error_of_segments(b, n);
        if (b.thread == 0 && (n == d.fewest_segments || error < least)) least = error, s.frame.segments = n;
    }
    __syncthreads();
}

// Writes the means of coefficients that a fresh page does not code. Ends with a barrier.
__device__ __forceinline__ void write_rest(const Store &b, const Target &t, const SideDesc &coded) {
    const uint32_t c = coded.head_dim + b.thread;
    if (c < b.p.layer.k.head_dim) {
        float sum = 0.f;
#pragma unroll 4
        for (uint32_t i = 0; i < b.s.n_rows; i++) sum += b.row(i)[c];
        t.bytes[coded.order + c] = uint8_t(e4m3_encode(sum * (1.f / float(max(b.s.n_rows, 1u))) * inverse_power(t.header[1])));
    }
    __syncthreads();
}

// Writes a bit for each record: `of(record)`. Ends with a barrier.
template <class F> __device__ __forceinline__ void write_gates(const Store &b, uint8_t *page, F of) {
    const uint32_t i = b.thread;
    if (i < b.p.layer.page / 8) {
        uint8_t &byte = gates_of(b.p.layer, page)[i];
        uint32_t bits = byte;
        for (uint32_t j = 0; j < 8; j++) {
            const uint32_t record = b.s.record_of[8 * i + j];
            if (record != NONE) bits = (bits & ~(1u << j)) | (of(record) ? 1u << j : 0);
        }
        byte = uint8_t(bits);
    }
    __syncthreads();
}

// Codec `aqua`. Of a fresh page the bytes are zero.
__device__ __forceinline__ void seal_framed(const Store &b, const Target &t, uint32_t page, Seal seal) {
    Scratch &s = b.s;
    const LayerDesc &l = b.p.layer;
    if (t.fresh) {
        choose_frame(b, page, seal);
    } else {
        if (b.thread == 0) s.frame = FramePlace::of(l, t.bytes);
        __syncthreads();
    }
    enter_frame(b);
    if (t.fresh) {
        choose_n_segments(b);
        if (b.thread == 0) s.frame.write(l, t.bytes);
    }
    const SideDesc desc = coded_side(l.k, s.frame.segments);
    const Side side = {desc, t.side.region, t.side.current, t.side.stride_token};
    seal_channels(b, {side, t.header, t.bytes, t.fresh, true});
    write_gates(b, t.bytes, [](uint32_t) { return false; });
    if (t.fresh) write_rest(b, t, desc);
}

// Gathers values that keys predict, while their page is as it was, beside the rows of keys. Ends with a barrier.
__device__ __forceinline__ void gather_predicted(const Store &b, const Side &keys, const Target &values, uint32_t page, Seal seal) {
    const LayerDesc &l = b.p.layer;
    const Store beside = b.beside();
    gather<true>(beside, values, page, seal);
    for (uint32_t i = b.warp; seal == Seal::RENEW && i < b.s.n_rows; i += STORE_WARPS) {
        if (b.s.source[i] != KEPT) continue;
        float *value = beside.row(i);
        add_predicted(l, {keys.header(page), keys.page(page)}, b.s.at[i], b.lane, b.row(i), value);
        for (uint32_t c = b.lane; c < l.v.head_dim; c += 32) value[c] = finite(value[c]);
    }
    __syncthreads();
}

// Takes off gathered values what the sealed keys predict, where that leaves less, and notes it. Ends with a barrier.
__device__ __forceinline__ void take_predicted(const Store &b, const Side &keys, uint32_t page) {
    Scratch &s = b.s;
    const LayerDesc &l = b.p.layer;
    const uint32_t dim = l.v.head_dim;
    const Page from = {keys.header(page), keys.page(page)};
    const Frame frame = Frame::of(l, s.frame);
    const Store beside = b.beside();
    const Team team = Team::of_thread();
    static_assert(AQUA_ROWS == 2, "half a warp has a row");
    for_each_rows(b, [&](uint32_t first, const WarpRows<AQUA_ROWS> &rows) {
        for (uint32_t r = 0; r < AQUA_ROWS && first + r < s.n_rows; r++) decode_coefficients(l, s.frame, from, s.at[first + r], b.lane, rows.row[r]);
        predict_rows(frame, rows, b.lane);
        const uint32_t r = team.first / 16;
        const bool exists = first + r < s.n_rows;
        float *rest = rows.row[r], *value = beside.row(exists ? first + r : first);
        if (exists) {
            for (uint32_t c = team.lane; c < dim; c += 16) rest[c] = value[c] - rest[c];
        }
        const auto square = [](float x) { return x * x; };
        const float whole = team.sum(value, exists ? dim : 0, square), left = team.sum(rest, exists ? dim : 0, square);
        // Not so if anything is not finite.
        const bool gate = exists && left < whole;
        if (team.lane == 0 && exists) s.place[first + r] = gate;
        if (gate) {
            for (uint32_t c = team.lane; c < dim; c += 16) value[c] = rest[c];
        }
    });
    if (b.thread < s.n_rows) s.record_of[s.at[b.thread]] = uint16_t(b.thread);
    __syncthreads();
    write_gates(b, keys.page(page), [&](uint32_t record) { return s.place[record] != 0; });
}

}  // namespace kvq::store
