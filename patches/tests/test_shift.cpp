// Moving positions again and again must not make a cache worse, through the public API of the patched llama.cpp:
//   test_shift MODEL TEXT RECIPE...
// Two ways of moving 64 times: rolling (eight tokens behind the kept ones go, the others move up, eight come) and moving
// everything by +1 and -1. The mean KL divergence from an f16 context that did the same is compared with that of contexts
// which hold as many tokens of the same text and never moved. Fails if it is more than 1.5 times as large.

#include "llama.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

static const int    N_HELD   = 400;
static const int    N_SHIFTS = 64;
static const int    N_PROBE  = 16;
static const int    STEP     = 8;
static const double FACTOR   = 1.5;
static const double FLOOR    = 5e-4; // of f16 against itself, with other kernels

static std::vector<llama_token> text;

struct context {
    llama_context * ctx;
    int             n_vocab;

    context(llama_model * model, const char * recipe) {
        setenv("LLAMA_ARG_KVQ", recipe, 1);

        auto params = llama_context_default_params();
        params.n_ctx           = 512;
        params.n_batch         = 512;
        params.n_ubatch        = 64;
        params.n_threads       = 1;
        params.n_threads_batch = 1;
        params.no_perf         = true;
        params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;

        ctx     = llama_init_from_model(model, params);
        n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    }
    ~context() { llama_free(ctx); }

    context(const context &) = delete;

    llama_memory_t mem() { return llama_get_memory(ctx); }

    // text[first, first + n) at positions from pos on; log-probabilities after the last n_out tokens
    std::vector<std::vector<double>> feed(int pos, int first, int n, int n_out) {
        llama_batch batch = llama_batch_init(n, 0, 1);
        for (int i = 0; i < n; ++i) {
            batch.token   [i]    = text[first + i];
            batch.pos     [i]    = pos + i;
            batch.n_seq_id[i]    = 1;
            batch.seq_id  [i][0] = 0;
            batch.logits  [i]    = i >= n - n_out;
        }
        batch.n_tokens = n;
        if (llama_decode(ctx, batch) != 0) {
            fprintf(stderr, "decode failed\n");
            exit(1);
        }
        std::vector<std::vector<double>> res;
        for (int i = n - n_out; i < n; ++i) {
            const float * logits = llama_get_logits_ith(ctx, i);
            const double  max    = *std::max_element(logits, logits + n_vocab);

            double sum = 0.0;
            for (int j = 0; j < n_vocab; ++j) {
                sum += exp(logits[j] - max);
            }
            res.emplace_back();
            for (int j = 0; j < n_vocab; ++j) {
                res.back().push_back(logits[j] - max - log(sum));
            }
        }
        llama_batch_free(batch);
        return res;
    }

    // what follows, and back again
    std::vector<std::vector<double>> probe(int first) {
        auto res = feed(N_HELD, first, N_PROBE, N_PROBE);
        llama_memory_seq_rm(mem(), 0, N_HELD, -1);
        return res;
    }

    void roll(int keep, int first) {
        llama_memory_seq_rm (mem(), 0, keep, keep + STEP);
        llama_memory_seq_add(mem(), 0, keep + STEP, -1, -STEP);
        feed(N_HELD - STEP, first, STEP, 1);
    }
};

static double divergence(const std::vector<std::vector<double>> & a, const std::vector<std::vector<double>> & b) {
    double sum = 0.0;
    for (size_t i = 0; i < a.size(); ++i) {
        for (size_t j = 0; j < a[i].size(); ++j) {
            sum += exp(a[i][j])*(a[i][j] - b[i][j]);
        }
    }
    return sum/a.size();
}

static int n_failed = 0;

static void check(const char * recipe, const char * what, double moved, double unmoved) {
    const bool ok = moved <= FACTOR*unmoved + FLOOR;
    printf("  %-6s %-24s %-18s mean KLD %.5f, never moved %.5f\n", ok ? "ok" : "FAILED", recipe, what, moved, unmoved);
    fflush(stdout);
    n_failed += !ok;
}

// the same probes for contexts that roll and for such as are filled at once
static void test_roll(llama_model * model, const char * recipe, int keep) {
    context exact (model, "off");
    context packed(model, recipe);
    context exact_new (model, "off");
    context packed_new(model, recipe);

    exact .feed(0, 0, N_HELD, 1);
    packed.feed(0, 0, N_HELD, 1);

    double moved   = 0.0;
    double unmoved = 0.0;
    int    n       = 0;

    for (int k = 1; k <= N_SHIFTS; ++k) {
        const int first = N_HELD + (k - 1)*STEP;

        exact .roll(keep, first);
        packed.roll(keep, first);

        if (k > N_SHIFTS/2 && k%4 == 0) {
            moved += divergence(exact.probe(first + STEP), packed.probe(first + STEP));

            for (context * c : { &exact_new, &packed_new }) {
                llama_memory_clear(c->mem(), true);
                c->feed(0, first + STEP - N_HELD, N_HELD, 1);
            }
            unmoved += divergence(exact_new.probe(first + STEP), packed_new.probe(first + STEP));
            n++;
        }
    }

    const std::string what = "rolled, " + std::to_string(keep) + " kept";
    check(recipe, what.c_str(), moved/n, unmoved/n);
}

static void test_there_and_back(llama_model * model, const char * recipe) {
    context exact (model, "off");
    context packed(model, recipe);

    double moved   = 0.0;
    double unmoved = 0.0;

    for (int i = 0; i < 4; ++i) {
        const int first = i*300;

        for (context * c : { &exact, &packed }) {
            llama_memory_clear(c->mem(), true);
            c->feed(0, first, N_HELD, 1);
        }
        unmoved += divergence(exact.probe(first + N_HELD), packed.probe(first + N_HELD));

        for (int k = 0; k < N_SHIFTS; ++k) {
            const int delta = k%2 == 0 ? 1 : -1;
            for (context * c : { &exact, &packed }) {
                llama_memory_seq_add(c->mem(), 0, 0, -1, delta);
                // shifts are carried out by the next decode
                const llama_pos last = llama_memory_seq_pos_max(c->mem(), 0);
                c->feed(last + 1, first, 1, 1);
                llama_memory_seq_rm(c->mem(), 0, last + 1, -1);
            }
        }
        moved += divergence(exact.probe(first + N_HELD), packed.probe(first + N_HELD));
    }

    check(recipe, "all by +1 and -1", moved/4, unmoved/4);
}

int main(int argc, char ** argv) {
    if (argc < 4) {
        fprintf(stderr, "usage: %s MODEL TEXT RECIPE...\n", argv[0]);
        return 1;
    }

    llama_log_set([](ggml_log_level level, const char * message, void *) {
        if (level == GGML_LOG_LEVEL_ERROR) {
            fputs(message, stderr);
        }
    }, nullptr);
    llama_backend_init();

    auto params = llama_model_default_params();
    params.n_gpu_layers = getenv("KVQ_TEST_NGL") ? atoi(getenv("KVQ_TEST_NGL")) : 0;
    llama_model * model = llama_model_load_from_file(argv[1], params);

    std::string bytes(40000, 0);
    if (FILE * file = fopen(argv[2], "rb")) {
        bytes.resize(fread(&bytes[0], 1, bytes.size(), file));
        fclose(file);
    } else {
        bytes.clear();
    }
    if (!model || bytes.empty()) {
        fprintf(stderr, "cannot read %s\n", model ? argv[2] : argv[1]);
        return 1;
    }
    text.resize(bytes.size());
    text.resize(std::max(0, llama_tokenize(llama_model_get_vocab(model), bytes.data(), bytes.size(),
                    text.data(), text.size(), true, false)));
    if ((int) text.size() < 4*N_HELD) {
        fprintf(stderr, "%s has only %zu tokens\n", argv[2], text.size());
        return 1;
    }

    for (int i = 3; i < argc; ++i) {
        test_roll(model, argv[i], 4);
        test_roll(model, argv[i], 40); // more than a recipe keeps exact: one page has kept and moved rows
        test_there_and_back(model, argv[i]);
    }

    llama_model_free(model);
    printf(n_failed ? "%d failed\n" : "all passed\n", n_failed);

    return n_failed != 0;
}
