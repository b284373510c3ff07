// The scheduler of emulate.h.
#include "emulate.h"

using namespace kvq::emulation;

asm(R"(
.text
.globl kvq_emulated_switch
.type kvq_emulated_switch, @function
kvq_emulated_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size kvq_emulated_switch, .-kvq_emulated_switch
)");

static void enter() {
    State &s = state();
    s.kernel(s.params);
    pause(DONE);
    abort();
}

// Runs the lanes of a warp until all of them wait for the block or are done. False: they wait for different things.
static bool run_warp(State &s, uint32_t first, uint32_t n) {
    for (;;) {
        uint32_t at[4] = {};
        for (uint32_t i = first; i < first + n; i++) {
            if (s.fibers[i].wait == READY) {
                s.fiber = &s.fibers[i];
                kvq_emulated_switch(&s.scheduler, s.fiber->stack_pointer);
            }
            at[s.fibers[i].wait]++;
        }
        if (at[AT_WARP] == 0) return at[AT_BLOCK] == 0 || at[DONE] == 0;
        if (at[AT_WARP] != n) return false;
        for (uint32_t i = first; i < first + n; i++) s.fibers[i].wait = READY;
    }
}

static bool run_block(State &s) {
    for (uint32_t i = 0; i < s.threads; i++) {
        void **top = reinterpret_cast<void **>(s.stacks + size_t(i + 1) * STACK) - 8;
        memset(top, 0, 8 * sizeof(void *));
        top[6] = reinterpret_cast<void *>(&enter);  // what the switch returns to, with six registers popped before
        s.fibers[i] = Fiber{top, {i, 0, 0}, READY};
    }
    for (;;) {
        uint32_t done = 0;
        for (uint32_t first = 0; first < s.threads; first += 32) {
            if (!run_warp(s, first, 32)) return false;
            done += s.fibers[first].wait == DONE ? 32 : 0;
        }
        if (done == s.threads) return true;
        if (done != 0) return false;
        for (uint32_t i = 0; i < s.threads; i++) s.fibers[i].wait = READY;
    }
}

extern "C" int kvq_emulated_launch(const char *name, uint32_t x, uint32_t y, uint32_t z, uint32_t threads, uint32_t shared_bytes, const void *params) {
    const Register *kernel = Register::first();
    while (kernel != nullptr && strcmp(kernel->name, name) != 0) kernel = kernel->next;
    if (kernel == nullptr || threads > MAX_THREADS || threads % 32 != 0) return 0;
    State &s = state();
    if (s.stacks == nullptr) s.stacks = static_cast<uint8_t *>(aligned_alloc(64, size_t(MAX_THREADS) * STACK));
    // Of the very size, so that a memory checker sees what lies beyond; not zero.
    s.shared = static_cast<uint8_t *>(aligned_alloc(128, (shared_bytes + 127) / 128 * 128 + 128));
    s.blocks = {x, y, z};
    s.threads = threads;
    s.kernel = kernel->kernel;
    s.params = params;
    bool ok = true;
    for (uint32_t i = 0; i < x * y * z && ok; i++) {
        s.block = {i % x, i / x % y, i / x / y};
        memset(s.shared, 0xff, shared_bytes);
        ok = run_block(s);
    }
    free(s.shared);
    return ok ? 1 : -1;
}
