// Codec `aqua`: rows into the frame of a page and back, and what keys predict, bit for bit as src/codec/aqua has them. Compiled
// without fused multiply-add.
#pragma once
#include "aqua.cuh"
#include "pack.cuh"
#include "store.cuh"

namespace kvq::store {

// R rows of floats, at which a warp works together.
template <uint32_t R> struct WarpRows {
    float *row[R];

    // `n` of the rows `of(first)`, `of(first + 1)`, ...; the last one stands for those that are missing.
    template <class F> __device__ static WarpRows of(uint32_t first, uint32_t n, F of) {
        WarpRows rows;
#pragma unroll
        for (uint32_t r = 0; r < R; r++) rows.row[r] = of(first + min(r, n - 1));
        return rows;
    }
};

// Element `column` of the products of rows and a matrix [k][n]: sums in sixteen parts, as `multiply` of codec/aqua/frame.rs.
template <uint32_t R> __device__ __forceinline__ void column_of_products(const float *matrix, uint32_t k, uint32_t n, uint32_t column, const WarpRows<R> &x, float (&out)[R]) {
    float part[R][16] = {};
#pragma unroll 1
    for (uint32_t i = 0; i < k; i += 16) {
        float m[16];
#pragma unroll
        for (uint32_t l = 0; l < 16; l++) m[l] = matrix[(i + l) * n + column];
#pragma unroll
        for (uint32_t r = 0; r < R; r++)
#pragma unroll
            for (uint32_t l = 0; l < 16; l++) part[r][l] += x.row[r][i + l] * m[l];
    }
#pragma unroll
    for (uint32_t r = 0; r < R; r++) {
        float sum = 0.f;
#pragma unroll
        for (uint32_t l = 0; l < 16; l++) sum += part[r][l];
        out[r] = sum;
    }
}

// What a warp's lanes have of rows: element c is lane c % 32's.
template <uint32_t R> struct LaneRows {
    float at[MAX_DIM / 32][R];

    __device__ void multiply(const float *matrix, uint32_t k, uint32_t n, const WarpRows<R> &x, uint32_t lane) {
#pragma unroll 1
        for (uint32_t j = 0; 32 * j < n; j++) column_of_products(matrix, k, n, 32 * j + lane, x, at[j]);
    }
    // What rows of coefficients predict of values.
    __device__ void predict(const Frame &frame, const WarpRows<R> &z, uint32_t lane) {
        const uint32_t dim_k = frame.layer.k.head_dim, dim_v = frame.layer.v.head_dim;
        const float *matrix = frame.predictor(), *offset = matrix + dim_k * dim_v;
        multiply(matrix, dim_k, dim_v, z, lane);
#pragma unroll 1
        for (uint32_t j = 0; 32 * j < dim_v; j++)
#pragma unroll
            for (uint32_t r = 0; r < R; r++) at[j][r] += offset[32 * j + lane];
    }
    // Puts the first `n` elements where `to` says. Between barriers of the warp.
    __device__ void put(uint32_t n, const WarpRows<R> &to, uint32_t lane) const {
        __syncwarp();
#pragma unroll 1
        for (uint32_t c = lane; c < n; c += 32)
#pragma unroll
            for (uint32_t r = 0; r < R; r++) to.row[r][c] = at[c / 32][r];
        __syncwarp();
    }
};

// Replaces rows by their products with a square matrix. Ends with a barrier of the warp.
template <uint32_t R> __device__ __forceinline__ void multiply_rows(const float *matrix, uint32_t n, const WarpRows<R> &x, uint32_t lane) {
    LaneRows<R> products;
    products.multiply(matrix, n, n, x, lane);
    products.put(n, x, lane);
}

// Replaces coefficients by what they predict of values. Ends with a barrier of the warp.
template <uint32_t R> __device__ __forceinline__ void predict_rows(const Frame &frame, const WarpRows<R> &z, uint32_t lane) {
    LaneRows<R> predicted;
    predicted.predict(frame, z, lane);
    predicted.put(frame.layer.v.head_dim, z, lane);
}

// Takes coefficients back to the frame and adds the bias there; `token(r)` is the row of the page of row r.
template <uint32_t R, class F> __device__ __forceinline__ void leave_frame(const Frame &frame, const FramePlace &place, const WarpRows<R> &rows, uint32_t lane, F token) {
    const uint32_t dim = frame.layer.k.head_dim;
    multiply_rows(frame.directions(), dim, rows, lane);
    if (!frame.has_bias(place)) return;
#pragma unroll
    for (uint32_t r = 0; r < R; r++) {
        // The same row may stand there again.
        if (r > 0 && rows.row[r] == rows.row[r - 1]) continue;
        const float *bias = frame.bias(token(r));
        for (uint32_t c = lane; c < dim; c += 32) rows.row[r][c] += bias[c];
    }
    __syncwarp();
}

// Decodes the coefficients of a token's key, by a warp. Ends with a barrier of it.
__device__ __forceinline__ void decode_coefficients(const LayerDesc &l, const FramePlace &place, const Page &page, uint32_t token, uint32_t lane, float *out) {
    const SideDesc d = coded_side(l.k, place.segments);
    const Segments segments = Segments::of_header(page.header, d.n_segments, d.budget);
    const uint8_t *block = page.bytes + token / 32 * d.tile_words * 128;
    for (uint32_t i = lane; i < d.head_dim; i += 32) {
        const float code = float(mixed_code(segments, block, token % 32, i));
        out[page.ordered(d, i, d.head_dim)] = page.step(d, i) * (code - centre_of(segments.bits(i / 16), false)) + page.mid(d, i);
    }
    for (uint32_t c = d.head_dim + lane; c < l.k.head_dim; c += 32) out[c] = rest_mean(d, page, c);
    __syncwarp();
}

// Decodes the key of a token, by a warp. Ends with a barrier of it.
__device__ __forceinline__ void decode_framed(const LayerDesc &l, const Page &page, uint32_t token, uint32_t lane, float *out) {
    const FramePlace place = FramePlace::of(l, page.bytes);
    const Frame frame = Frame::of(l, place);
    decode_coefficients(l, place, page, token, lane, out);
    leave_frame<1>(frame, place, {{out}}, lane, [&](uint32_t) { return token; });
    const RotationDesc &rotation = frame.desc.rotation;
    for (uint32_t pair = lane; pair < min(rotation.n_pairs, l.k.head_dim / 2); pair += 32) turn_pair(rotation, out, pair, angle_of(rotation, pair, place.first));
    __syncwarp();
}

// Adds to a value what its key page predicts, if it does, by a warp; `z` has room for coefficients and values. Ends with a barrier
// of the warp.
__device__ __forceinline__ void add_predicted(const LayerDesc &l, const Page &keys, uint32_t token, uint32_t lane, float *z, float *value) {
    if (!has_gate(l, keys.bytes, token)) return;
    const FramePlace place = FramePlace::of(l, keys.bytes);
    decode_coefficients(l, place, keys, token, lane, z);
    predict_rows<1>(Frame::of(l, place), {{z}}, lane);
    for (uint32_t c = lane; c < l.v.head_dim; c += 32) value[c] += z[c];
    __syncwarp();
}

}  // namespace kvq::store
