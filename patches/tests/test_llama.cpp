// Tests of the patched llama.cpp through its public API alone:
//   test_llama MODEL RECIPE [NMSE]
// Compares a kvq context with an f16 one (prefill, decode, several sequences, sequence copy, abort, K-shift), and checks that
// a sequence does not suffer from others, that nothing remains of removed ones, that saved state comes back bit-identical
// and that damaged state is refused. Exit status 2: this model refuses the recipe.
//   KVQ_TEST_NGL=N         layers on GPUs (default: 0)
//   KVQ_TEST_QUICK=1       leaves out most; =abort: but not aborted decodes
//   KVQ_TEST_ON_CPU=REGEX  tensors that stay on the CPU nevertheless

#include "llama.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

static int n_failed = 0;

static void check(bool ok, const char * what, double value = 0.0) {
    printf("  %-6s %s (%g)\n", ok ? "ok" : "FAILED", what, value);
    n_failed += !ok;
}

struct run_params {
    const char * recipe;
    bool         unified;
    int          n_seq;
    int          n_ctx; // all sequences together
};

struct run {
    llama_context * ctx;
    int             n_vocab;

    run(llama_model * model, const run_params & p) {
        setenv("LLAMA_ARG_KVQ", p.recipe, 1);

        auto cparams = llama_context_default_params();
        cparams.n_ctx           = p.n_ctx;
        cparams.n_batch         = p.n_ctx;
        cparams.n_ubatch        = 48; // not a divisor of the page
        cparams.n_seq_max       = p.n_seq;
        cparams.kv_unified      = p.unified;
        cparams.n_threads       = 2;
        cparams.n_threads_batch = 2;
        cparams.no_perf         = true;

        ctx     = llama_init_from_model(model, cparams);
        n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    }
    ~run() { llama_free(ctx); }

    run(const run &) = delete;

    llama_memory_t mem() { return llama_get_memory(ctx); }

    // tokens[i] goes to seqs[i] at pos[i]; logits of all of them
    std::vector<float> decode(const std::vector<llama_token> & tokens, const std::vector<llama_seq_id> & seqs,
            const std::vector<llama_pos> & pos) {
        llama_batch batch = llama_batch_init(tokens.size(), 0, 1);
        for (size_t i = 0; i < tokens.size(); ++i) {
            batch.token   [i]    = tokens[i];
            batch.pos     [i]    = pos[i];
            batch.n_seq_id[i]    = 1;
            batch.seq_id  [i][0] = seqs[i];
            batch.logits  [i]    = true;
        }
        batch.n_tokens = tokens.size();

        std::vector<float> res;
        if (llama_decode(ctx, batch) == 0) {
            res.assign(llama_get_logits(ctx), llama_get_logits(ctx) + tokens.size()*n_vocab);
        }
        llama_batch_free(batch);
        return res;
    }

    // n tokens of one sequence from position p0, in one batch or one by one
    std::vector<float> feed(llama_seq_id seq, llama_pos p0, int n, bool one_by_one = false) {
        std::vector<float> res;
        for (int i = 0; i < n; i += one_by_one ? 1 : n) {
            std::vector<llama_token>  tokens;
            std::vector<llama_pos>    pos;
            for (int j = i; j < (one_by_one ? i + 1 : n); ++j) {
                tokens.push_back((unsigned) (17*(p0 + j)*(p0 + j) + 131*seq + 7) % n_vocab);
                pos.push_back(p0 + j);
            }
            const auto cur = decode(tokens, std::vector<llama_seq_id>(tokens.size(), seq), pos);
            if (cur.empty()) {
                return {};
            }
            res.insert(res.end(), cur.begin(), cur.end());
        }
        return res;
    }
};

static double nmse(const std::vector<float> & a, const std::vector<float> & b) {
    if (a.empty() || a.size() != b.size()) {
        return INFINITY;
    }
    double err = 0.0;
    double sum = 0.0;
    for (size_t i = 0; i < a.size(); ++i) {
        if (std::isinf(a[i]) && a[i] == b[i]) {
            continue; // tokens that the model masks out
        }
        err += (a[i] - b[i])*(a[i] - b[i]);
        sum += a[i]*a[i];
    }
    return err/sum;
}

// mean Kullback-Leibler divergence of the tokens that b makes likely from those that a does, in nats
static double divergence(const std::vector<float> & a, const std::vector<float> & b, size_t n_vocab) {
    if (a.empty() || a.size() != b.size()) {
        return INFINITY;
    }
    double sum = 0.0;
    for (size_t row = 0; row < a.size(); row += n_vocab) {
        const auto log_sum = [&](const std::vector<float> & logits) {
            const double max = *std::max_element(&logits[row], &logits[row] + n_vocab);
            double total = 0.0;
            for (size_t i = row; i < row + n_vocab; ++i) {
                total += exp(logits[i] - max);
            }
            return max + log(total);
        };
        const double za = log_sum(a);
        const double zb = log_sum(b);
        for (size_t i = row; i < row + n_vocab; ++i) {
            if (!std::isinf(a[i])) {
                sum += exp(a[i] - za)*((a[i] - za) - (b[i] - zb));
            }
        }
    }
    return sum*n_vocab/a.size();
}

static bool same(const std::vector<float> & a, const std::vector<float> & b) {
    return !a.empty() && a.size() == b.size() && memcmp(a.data(), b.data(), a.size()*sizeof(float)) == 0;
}

static void test_sequences(llama_model * model, const char * recipe, bool unified, double limit) {
    printf("%s cache, 3 sequences\n", unified ? "unified" : "split");

    run exact (model, { "off",  unified, 3, 1536 });
    run packed(model, { recipe, unified, 3, 1536 });

    const auto both = [&](const char * what, auto f) {
        const auto a = f(exact);
        const auto b = f(packed);
        const double e = nmse(a, b);
        check(e <= limit, what, e);
    };

    both("prefill",             [&](run & r) { return r.feed(0, 0, 300); });
    both("second sequence",     [&](run & r) { return r.feed(1, 0, 200); });
    both("decode",              [&](run & r) { return r.feed(0, 300, 20, true); });
    both("interleaved batches", [&](run & r) {
        std::vector<float> res;
        for (int i = 0; i < 40; ++i) {
            const auto cur = r.decode({ 5 + i, 6 + i, 7 + i }, { 0, 1, 2 }, { 320 + i, 200 + i, i });
            res.insert(res.end(), cur.begin(), cur.end());
        }
        return res;
    });

    const bool can_rm = [&] { // recurrent parts cannot remove a part of a sequence
        const bool a = llama_memory_seq_rm(exact .mem(), 0, 280, -1);
        const bool b = llama_memory_seq_rm(packed.mem(), 0, 280, -1);
        return a && b;
    }();
    if (can_rm) {
        both("rewind and again", [&](run & r) { return r.feed(0, 280, 60); });
    }
    both("sequence copy", [&](run & r) {
        llama_memory_seq_rm(r.mem(), 2, -1, -1);
        llama_memory_seq_cp(r.mem(), 1, 2, -1, -1);
        return r.feed(2, 240, 30, true);
    });
    if (getenv("KVQ_TEST_QUICK")) {
        return;
    }
    both("clear", [&](run & r) {
        llama_memory_clear(r.mem(), false);
        return r.feed(1, 0, 150);
    });
}

// what neighbours in a unified cache do to a sequence: it keeps a window of its own, where a quarter of the cells has room for all
static void test_neighbours(llama_model * model, const char * recipe) {
    printf("neighbours\n");

    const auto error = [&](int n_neighbours) {
        std::vector<float> res[2];
        size_t n_vocab = 0;
        for (const bool packed : { false, true }) {
            run r(model, { packed ? recipe : "off", true, 4, 8192 });
            r.feed(0, 0, 300);
            for (int seq = 1; seq <= n_neighbours; ++seq) {
                r.feed(seq, 0, 200);
            }
            res[packed] = r.feed(0, 300, 60, true);
            n_vocab = r.n_vocab;
        }
        return divergence(res[0], res[1], n_vocab);
    };

    const double alone  = error(0);
    const double beside = error(3);
    check(std::isfinite(alone) && beside <= 1.15*alone + 1e-7, "divergence beside three other sequences, in divergences alone", beside/alone);
}

// what was asked before must not show in an answer, once it is removed
static void test_again(llama_model * model, const char * recipe) {
    printf("again\n");

    run r(model, { recipe, true, 2, 1024 });

    const auto ask = [&](llama_seq_id seq, int n) {
        auto res = r.feed(seq, 0, n);
        const auto more = r.feed(seq, n, 40, true);
        res.insert(res.end(), more.begin(), more.end());
        llama_memory_seq_rm(r.mem(), seq, -1, -1);
        return res;
    };

    const auto first = ask(0, 400);
    check(same(first, ask(0, 400)), "the same tokens give the same logits");
    ask(1, 500);
    check(same(first, ask(0, 400)), "and after other tokens");

    r.feed(0, 0, 400);
    std::vector<uint8_t> state(llama_state_seq_get_size(r.ctx, 0));
    llama_state_seq_get_data(r.ctx, state.data(), state.size(), 0);

    std::vector<float> restored[2];
    for (const bool used : { false, true }) {
        run other(model, { recipe, true, 2, 1024 });
        if (used) {
            other.feed(1, 0, 500);
            llama_memory_seq_rm(other.mem(), 1, -1, -1);
        }
        llama_state_seq_set_data(other.ctx, state.data(), state.size(), 0);
        restored[used] = other.feed(0, 400, 150, true);
    }
    check(same(restored[0], restored[1]), "a restored sequence goes on alike in a new and in a used context");
}

// afterwards llama.cpp's view of the cache ends before pages that still hold bytes
static void test_rewind(llama_model * model, const char * recipe, double limit) {
    printf("rewind\n");

    run exact (model, { "off",  true, 1, 1024 });
    run packed(model, { recipe, true, 1, 1024 });

    const auto rewind = [](run & r) {
        r.feed(0, 0, 700);
        return llama_memory_seq_rm(r.mem(), 0, 30, -1) ? r.feed(0, 30, 60) : std::vector<float>();
    };

    const auto a = rewind(exact);
    if (a.empty()) {
        printf("  (not for this model)\n");
        return;
    }
    const double e = nmse(a, rewind(packed));
    check(e <= limit, "far back", e);
}

// a decode that is aborted in the middle of its graph, over the end of a page, and again
static void test_abort(llama_model * model, const char * recipe, bool unified, double limit) {
    printf("abort, %s cache\n", unified ? "unified" : "split");

    run exact (model, { "off",  unified, 2, 2048 });
    run packed(model, { recipe, unified, 2, 2048 });

    // calls of the callback: how many in all, and at which one to stop
    struct { int n; int stop; } calls = { 0, 0 };
    llama_set_abort_callback(packed.ctx, [](void * data) {
        auto & c = *(decltype(calls) *) data;
        return ++c.n == c.stop;
    }, &calls);

    exact .feed(0, 0, 240);
    packed.feed(0, 0, 200);
    calls.n = 0;
    packed.feed(0, 200, 40);
    const int n_graph = calls.n;

    int n_aborted = 0;
    // a GPU does not ask: then there are few calls
    for (const int stop : { n_graph/4, n_graph/2, 3*n_graph/4 }) {
        calls = { 0, std::max(stop, 1) };
        n_aborted += packed.feed(0, 240, 40).empty();
    }
    calls = { 0, 0 };
    check(n_aborted == 3, "aborted", n_aborted);

    const double e0 = nmse(exact.feed(0, 240, 40), packed.feed(0, 240, 40));
    check(e0 <= limit, "the same again", e0);
    const double e1 = nmse(exact.feed(0, 280, 300), packed.feed(0, 280, 300));
    check(e1 <= limit, "when the window has left the page", e1);

    calls = { 0, std::max(n_graph/2, 1) };
    packed.feed(0, 580, 70);
    calls = { 0, 0 };
    for (run * r : { &exact, &packed }) {
        llama_memory_seq_cp(r->mem(), 0, 1, -1, -1);
    }
    const double e2 = nmse(exact.feed(1, 580, 40), packed.feed(1, 580, 40));
    check(e2 <= limit, "a sequence copy after an abort", e2);
}

static void test_training(llama_model * model, const char * recipe) {
    printf("training\n");
    setenv("LLAMA_ARG_KVQ", recipe, 1);

    auto cparams = llama_context_default_params();
    cparams.n_ctx   = 256;
    cparams.n_batch = cparams.n_ubatch = 256;
    llama_context * ctx = llama_init_from_model(model, cparams);

    std::string said;
    try {
        llama_opt_params params = {};
        params.param_filter = llama_opt_param_filter_all;
        llama_opt_init(ctx, model, params);
    } catch (const std::exception & err) {
        said = err.what();
    }
    check(said.rfind("kvq: training", 0) == 0, "refused");

    llama_free(ctx);
}

static void test_shift(llama_model * model, const char * recipe, double limit) {
    printf("K-shift\n");

    run exact (model, { "off",  true, 1, 1024 });
    run packed(model, { recipe, true, 1, 1024 });

    const auto shift = [](run & r) {
        r.feed(0, 0, 400);
        if (!llama_memory_can_shift(r.mem()) || !llama_memory_seq_rm(r.mem(), 0, 50, 150)) {
            return std::vector<float>();
        }
        llama_memory_seq_add(r.mem(), 0, 150, -1, -100);
        return r.feed(0, 300, 40, true);
    };

    const auto a = shift(exact);
    if (a.empty()) {
        printf("  (not for this model)\n");
        return;
    }
    const double e = nmse(a, shift(packed));
    check(e <= limit, "decode after the shift", e);
}

// Pages of a sequence that hold no other's rows come back byte for byte, moved or not, full or with holes, wherever a whole
// page is free for each. Of a page with rows of two sequences nothing but the own rows may be saved, not even the ranges
// that all share: these are decoded and encoded again, which cannot give the same bits.
static void test_sequence_state(llama_model * model, const char * recipe) {
    printf("state of a sequence\n");

    struct { const char * what; llama_pos from, to, first_moved, delta; bool shared; } ways[] = {
        { "never moved",                  -1, -1,  -1,   0, false },
        { "moved as a whole",             -1, -1,   0,   7, false },
        { "without some of it",           60, 70,  -1,   0, false },
        { "moved over what was removed",  60, 70,  70, -10, false },
        { "moved by the half of a page", 100, 164, 164, -64, false },
        { "moved, with another's token where some was removed: NMSE", 60, 70, 70, -10, true },
    };
    for (const auto & way : ways) {
        run r(model, { recipe, true, 2, 1024 });
        r.feed(0, 0, 333);
        r.feed(1, 0, 100);
        r.feed(0, 333, 30, true);

        if ((way.to >= 0 && !llama_memory_seq_rm(r.mem(), 0, way.from, way.to)) ||
                (way.delta != 0 && !llama_memory_can_shift(r.mem()))) {
            printf("  (not for this model: %s)\n", way.what);
            continue;
        }
        if (way.delta != 0) {
            llama_memory_seq_add(r.mem(), 0, way.first_moved, -1, way.delta);
        }
        // carries out the shift, with a token in the first cell that was freed
        r.feed(way.shared, way.shared ? 100 : 363 + way.delta, 1);
        const llama_pos next = 363 + way.delta + !way.shared;

        std::vector<uint8_t> seq(llama_state_seq_get_size(r.ctx, 0));
        llama_state_seq_get_data(r.ctx, seq.data(), seq.size(), 0);
        const auto expected = r.feed(0, next, 1);

        run other(model, { recipe, false, 2, 2048 });
        other.feed(1, 0, 70);
        if (llama_state_seq_set_data(other.ctx, seq.data(), seq.size(), 0) == 0) {
            check(false, way.what);
        } else if (const auto first = other.feed(0, next, 1); way.shared) {
            const double e = nmse(expected, first);
            check(e < 0.01, way.what, e);
        } else {
            check(same(expected, first), way.what, seq.size());
        }
    }
}

static void test_state(llama_model * model, const char * recipe) {
    printf("state\n");

    run r(model, { recipe, true, 2, 1024 });

    r.feed(0, 0, 333);
    r.feed(1, 0, 100);
    r.feed(0, 333, 30, true);

    llama_pos next = 363;
    if (llama_memory_can_shift(r.mem()) && llama_memory_seq_rm(r.mem(), 0, 60, 70)) {
        llama_memory_seq_add(r.mem(), 0, 70, -1, -10);
        next -= 10;
        r.feed(0, next++, 1); // a state is saved after the shift, which the next decode carries out
    }

    std::vector<uint8_t> all(llama_state_get_size(r.ctx));
    check(llama_state_get_data(r.ctx, all.data(), all.size()) == all.size(), "save all", all.size());
    std::vector<uint8_t> seq(llama_state_seq_get_size(r.ctx, 0));
    check(llama_state_seq_get_data(r.ctx, seq.data(), seq.size(), 0) == seq.size(), "save a sequence", seq.size());

    const auto expected = r.feed(0, next, 150, true);

    check(llama_state_set_data(r.ctx, all.data(), all.size()) != 0, "restore all");
    check(same(expected, r.feed(0, next, 150, true)), "logits after it are bit-identical");

    {
        run other(model, { recipe, true, 2, 1024 });
        check(llama_state_set_data(other.ctx, all.data(), all.size()) != 0, "restore all in a new context");
        check(same(expected, other.feed(0, next, 150, true)), "logits after it are bit-identical");
    }
    {
        run other(model, { recipe, false, 2, 2048 });
        check(llama_state_seq_set_data(other.ctx, seq.data(), seq.size(), 1) != 0,
                "restore the sequence as another one, in another cache");
        llama_memory_clear(other.mem(), true);
        other.feed(1, 0, 70);
        check(llama_state_seq_set_data(other.ctx, seq.data(), seq.size(), 0) != 0,
                "restore the sequence beside another one");
        const auto first = other.feed(0, next, 1);
        check(same(std::vector<float>(expected.begin(), expected.begin() + first.size()), first),
                "the first logits after it are bit-identical");
    }
    {
        // No whole page is free in between: packed rows are decoded and encoded again beside others, whose ranges they
        // share. They are off by what one more encoding costs, so the bits cannot be the same.
        run other(model, { recipe, true, 2, 1024 });
        for (int i = 0; i < 1024 - 364; i += 60) {
            other.feed(1, i, std::min(60, 1024 - 364 - i));
        }
        llama_memory_seq_rm(other.mem(), 1, 100, 200);
        if (llama_state_seq_set_data(other.ctx, seq.data(), seq.size(), 0) != 0) {
            const auto first = other.feed(0, next, 1);
            const double e = nmse(std::vector<float>(expected.begin(), expected.begin() + first.size()), first);
            check(e < 0.01, "restore between other sequences", e);
        } else {
            check(false, "restore between other sequences");
        }
    }
    {
        run other(model, { "off", true, 2, 1024 });
        check(llama_state_set_data(other.ctx, all.data(), all.size()) == 0, "an f16 cache refuses it");
    }

    // damaged state is refused and changes nothing
    llama_state_set_data(r.ctx, all.data(), all.size());
    std::mt19937 rng(1);
    int n_accepted = 0;
    for (int i = 0; i < 60; ++i) {
        auto bad = i%2 ? all : seq;
        if (i%4 < 2) {
            bad.resize(rng()%bad.size());
        } else {
            bad[64 + rng()%(bad.size() - 64)] ^= 1 << rng()%8;
        }
        const size_t n = i%2
            ? llama_state_set_data(r.ctx, bad.data(), bad.size())
            : llama_state_seq_set_data(r.ctx, bad.data(), bad.size(), 0);
        n_accepted += n != 0;
    }
    check(n_accepted <= 2, "damaged states are refused (what llama.cpp itself saves has no checksum)", n_accepted);
    if (n_accepted == 0) {
        check(same(expected, r.feed(0, next, 150, true)), "the cache is as it was");
    }
}

int main(int argc, char ** argv) {
    if (argc < 3) {
        fprintf(stderr, "usage: %s MODEL RECIPE [NMSE]\n", argv[0]);
        return 1;
    }
    const char * recipe = argv[2];
    const double limit  = argc > 3 ? atof(argv[3]) : 1e-3;

    llama_log_set([](ggml_log_level level, const char * text, void *) {
        if (level == GGML_LOG_LEVEL_ERROR && getenv("KVQ_TEST_LOG")) {
            fputs(text, stderr);
        } else if (level == GGML_LOG_LEVEL_ERROR && strstr(text, "context: kvq: ")) {
            fputs(strstr(text, "kvq: "), stdout);
        }
    }, nullptr);
    llama_backend_init();

    auto mparams = llama_model_default_params();
    mparams.n_gpu_layers = getenv("KVQ_TEST_NGL") ? atoi(getenv("KVQ_TEST_NGL")) : 0;
    llama_model_tensor_buft_override on_cpu[] = { { getenv("KVQ_TEST_ON_CPU"), ggml_backend_cpu_buffer_type() }, { nullptr, nullptr } };
    mparams.tensor_buft_overrides = on_cpu;
    llama_model * model = llama_model_load_from_file(argv[1], mparams);
    if (!model) {
        fprintf(stderr, "cannot load %s\n", argv[1]);
        return 1;
    }
    {
        run r(model, { recipe, true, 1, 512 });
        if (!r.ctx) {
            return 2;
        }
    }

    test_sequences(model, recipe, true,  limit);
    if (const char * only = getenv("KVQ_TEST_QUICK"); only && strcmp(only, "abort") == 0) {
        test_abort(model, recipe, true,  limit);
        test_abort(model, recipe, false, limit);
    } else if (!only) {
        test_sequences(model, recipe, false, limit);
        test_again(model, recipe);
        test_neighbours(model, recipe);
        test_sequence_state(model, recipe);
        test_state(model, recipe);
        test_abort(model, recipe, true,  limit);
        test_abort(model, recipe, false, limit);
        test_training(model, recipe);
    }
    test_rewind(model, recipe, limit);
    test_shift(model, recipe, limit);

    llama_model_free(model);
    printf(n_failed ? "%d failed\n" : "all passed\n", n_failed);

    return n_failed != 0;
}
