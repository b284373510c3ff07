// Attention on tensor cores for every layer that attend_fast.cuh can read. Those that are known at compile time
// (attend_known.cu) are faster.
#include "attend_fast.cuh"

KVQ_FAST(kvq_attend_fast_4_64, 4, 64, 0, 0, 128)
KVQ_FAST(kvq_attend_fast_4_128, 4, 128, 0, 0, 128)
KVQ_FAST(kvq_attend_fast_8_64, 8, 64, 0, 0, 128)
KVQ_FAST(kvq_attend_fast_8_128, 8, 128, 0, 0, 128)
// Pages of small caches.
KVQ_FAST(kvq_attend_fast_4_64_small, 4, 64, 0, 0, 64)
KVQ_FAST(kvq_attend_fast_4_128_small, 4, 128, 0, 0, 64)
KVQ_FAST(kvq_attend_fast_8_64_small, 8, 64, 0, 0, 64)
KVQ_FAST(kvq_attend_fast_8_128_small, 8, 128, 0, 0, 64)
