#include "buffer.h"

#include <cstdlib>
#include <cstring>

#include "base.h"

Buffer::Buffer(size_t n, size_t alignment)
    : size((n + alignment - 1) / alignment * alignment),
      data(static_cast<uint8_t *>(aligned_alloc(alignment, size))) {
    if (!data) {
        die("out of memory");
    }
    if (alignment == LARGE_PAGE) {
        ok(kvq_use_large_pages(data, size));
    }
    memset(data, 0, size);
}

Buffer::~Buffer() { free(data); }
