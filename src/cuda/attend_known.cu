// Attention on tensor cores for heads of 128 and the formats that people take: see attend_fast.cuh. The table in
// cuda/attend.rs has the same rows.
#include "attend_fast.cuh"

KVQ_FAST(kvq_attend_known_4_22, 4, 128, 2, 2, 128)
KVQ_FAST(kvq_attend_known_4_33, 4, 128, 3, 3, 128)
KVQ_FAST(kvq_attend_known_4_44, 4, 128, 4, 4, 128)
KVQ_FAST(kvq_attend_known_4_c2, 4, 128, kvq::CHANNEL, 2, 128)
KVQ_FAST(kvq_attend_known_4_c3, 4, 128, kvq::CHANNEL, 3, 128)
KVQ_FAST(kvq_attend_known_4_c4, 4, 128, kvq::CHANNEL, 4, 128)
KVQ_FAST(kvq_attend_known_8_22, 8, 128, 2, 2, 128)
KVQ_FAST(kvq_attend_known_8_33, 8, 128, 3, 3, 128)
KVQ_FAST(kvq_attend_known_8_44, 8, 128, 4, 4, 128)
KVQ_FAST(kvq_attend_known_8_c2, 8, 128, kvq::CHANNEL, 2, 128)
KVQ_FAST(kvq_attend_known_8_c3, 8, 128, kvq::CHANNEL, 3, 128)
KVQ_FAST(kvq_attend_known_8_c4, 8, 128, kvq::CHANNEL, 4, 128)
