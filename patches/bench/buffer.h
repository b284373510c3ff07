#pragma once

#include <cstddef>
#include <cstdint>

// Large pages are asked for as the glue does it in llama.cpp, where the memory of all layers is one buffer.
constexpr size_t LARGE_PAGE = 2 << 20;

// Aligned memory of a multiple of that many bytes, zeroed; in large pages if that is the alignment.
struct Buffer {
    explicit Buffer(size_t n, size_t alignment = 64);
    ~Buffer();
    Buffer(const Buffer &) = delete;
    size_t size;
    uint8_t * data;
};
