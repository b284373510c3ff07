// Codec `aqua`: what a page says of its frame, and what calibration knows of that; see src/codec/aqua.
#pragma once
#include "page.cuh"

namespace kvq {

// Where a page is: Place of src/codec/aqua/frame.rs. Whatever a crafted page says, it is within bounds.
struct FramePlace {
    int first;
    uint32_t head, segments;
    bool biased;

    __device__ static FramePlace of(const LayerDesc &l, const uint8_t *page) {
        const uint32_t *tail = reinterpret_cast<const uint32_t *>(page + l.k.tail);
        const uint32_t word = tail[1];
        return {int(tail[0]), min(word & 0xffff, l.n_kv_heads - 1), min(max(word >> 24, l.k.fewest_segments), l.k.n_segments), (word >> 16 & 1) != 0};
    }
    __device__ void write(const LayerDesc &l, uint8_t *page) const {
        uint32_t *tail = reinterpret_cast<uint32_t *>(page + l.k.tail);
        tail[0] = uint32_t(first), tail[1] = head | (biased ? 1u << 16 : 0) | segments << 24;
    }
};

// A bit for each row of a page: its value is predicted.
__device__ __forceinline__ const uint8_t *gates_of(const LayerDesc &l, const uint8_t *page) { return page + l.k.tail + 8; }
__device__ __forceinline__ uint8_t *gates_of(const LayerDesc &l, uint8_t *page) { return page + l.k.tail + 8; }
__device__ __forceinline__ bool has_gate(const LayerDesc &l, const uint8_t *page, uint32_t row) { return gates_of(l, page)[row / 8] >> row % 8 & 1; }

// The coefficients that a page codes, as codec `channel` has them.
__device__ __forceinline__ SideDesc coded_side(const SideDesc &k, uint32_t segments) {
    SideDesc side = k;
    side.n_segments = segments;
    side.head_dim = side.group = 16 * segments;
    side.mids = side.steps + side.head_dim;
    side.order = side.mids + side.head_dim;
    return side;
}
// The mean of a coefficient that a page does not code. `coded`: coded_side.
__device__ __forceinline__ float rest_mean(const SideDesc &coded, const Page &page, uint32_t c) {
    return e4m3_decode(page.bytes[coded.order + c]) * power(page.header[1]);
}

// The frame of a page: the arrays of its head.
struct Frame {
    const LayerDesc &layer;
    const FrameDesc &desc;
    uint32_t head;

    __device__ static Frame of(const LayerDesc &l, const FramePlace &place) { return {l, *reinterpret_cast<const FrameDesc *>(l.profile), place.head}; }
    // An array of so many floats for each head.
    __device__ const float *array(uint32_t at, uint32_t size) const { return reinterpret_cast<const float *>(&desc) + at + size_t(head) * size; }
    __device__ const float *common(uint32_t at) const { return reinterpret_cast<const float *>(&desc) + at; }
    __device__ uint32_t square() const { return layer.k.head_dim * layer.k.head_dim; }

    __device__ bool has_bias(const FramePlace &place) const { return place.biased && desc.bias != ABSENT; }
    __device__ const float *bias(uint32_t row) const { return array(desc.bias, layer.page * layer.k.head_dim) + row * layer.k.head_dim; }
    __device__ const float *middle() const { return array(desc.middle, layer.k.head_dim); }
    __device__ const float *transform() const { return array(desc.transform, square()); }
    __device__ const float *directions() const { return array(desc.directions, square()); }
    __device__ const float *queries() const { return array(desc.queries, square()); }
    __device__ const float *predictor() const { return array(desc.predictor, (layer.k.head_dim + 1) * layer.v.head_dim); }
};

}  // namespace kvq
