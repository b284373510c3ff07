// attend_any.cuh for every codec that has no frames.
#include "attend_any.cuh"

KVQ_KERNEL(kvq_attend_any_4, kvq::THREADS, 3, kvq::AttendParams) {
    KVQ_SHARED(shared);
    kvq::wait_for_stream();
    kvq::let_next_start();
    const kvq::AttendStep step(p);
    kvq::Attend<4>(step, reinterpret_cast<float *>(shared)).run();
}
KVQ_KERNEL(kvq_attend_any_8, kvq::THREADS, 3, kvq::AttendParams) {
    KVQ_SHARED(shared);
    kvq::wait_for_stream();
    kvq::let_next_start();
    const kvq::AttendStep step(p);
    kvq::Attend<8>(step, reinterpret_cast<float *>(shared)).run();
}
