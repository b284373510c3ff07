#pragma once

#include <functional>

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

// ggml's CPU threads. Both sides run on them: two sets of threads that spin after their last job would slow each other
// down, and in llama.cpp kvq runs on these as well.
class Workers {
public:
    explicit Workers(int n);
    ~Workers();
    Workers(const Workers &) = delete;
    int size() const { return n_; }
    ggml_backend_t cpu() const { return cpu_; }

    void run(ggml_cgraph * graph);
    // Calls job(part, n_parts) once on every thread.
    void run(const std::function<void(int, int)> & job);

private:
    static void work(ggml_tensor *, int part, int n_parts, void * self);

    int n_;
    ggml_backend_t cpu_;
    ggml_threadpool * threads_;
    ggml_context * ctx_;
    ggml_cgraph * graph_;
    ggml_backend_buffer_t buffer_;
    const std::function<void(int, int)> * job_ = nullptr;
};
