#include "workers.h"

#include "base.h"

Workers::Workers(int n) : n_(n), cpu_(ggml_backend_cpu_init()) {
    ggml_threadpool_params params = ggml_threadpool_params_default(n);
    threads_ = ggml_threadpool_new(&params);
    ggml_backend_cpu_set_n_threads(cpu_, n);
    ggml_backend_cpu_set_threadpool(cpu_, threads_);
    ctx_ = ggml_init({ ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true });
    graph_ = ggml_new_graph(ctx_);
    ggml_build_forward_expand(graph_, ggml_custom_4d(ctx_, GGML_TYPE_F32, 1, 1, 1, 1, nullptr, 0, work,
                                                     GGML_N_TASKS_MAX, this));
    buffer_ = ggml_backend_alloc_ctx_tensors(ctx_, cpu_);
}

Workers::~Workers() {
    ggml_backend_buffer_free(buffer_);
    ggml_free(ctx_);
    ggml_backend_free(cpu_);
    ggml_threadpool_free(threads_);
}

void Workers::run(ggml_cgraph * graph) {
    if (ggml_backend_graph_compute(cpu_, graph) != GGML_STATUS_SUCCESS) {
        die("ggml could not compute the graph");
    }
}

void Workers::run(const std::function<void(int, int)> & job) {
    job_ = &job;
    run(graph_);
}

void Workers::work(ggml_tensor *, int part, int n_parts, void * self) {
    (*static_cast<Workers *>(self)->job_)(part, n_parts);
}
