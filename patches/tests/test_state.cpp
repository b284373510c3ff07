// What is in saved states, and what a reader does with states that nobody saved, through llama.h alone:
//   test_state MODEL [N_MUTATIONS]
// A sequence's state holds nothing of other sequences and of removed tokens; damaged and hostile states, checksums
// right or wrong, cut or not, are refused or harmless, and take no more memory than this context has.

#include "kvq.h"
#include "llama.h"

#include <sys/resource.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <unordered_set>
#include <vector>

using bytes = std::vector<uint8_t>;

static int n_failed = 0;

static void check(bool ok, const char * what, double value = 0.0) {
    printf("  %-6s %s (%g)\n", ok ? "ok" : "FAILED", what, value);
    n_failed += !ok;
}

struct context {
    llama_context * ctx;
    int             n_vocab;

    context(llama_model * model, const char * recipe, bool unified, int n_seq, int n_ctx) {
        setenv("LLAMA_ARG_KVQ", recipe, 1);

        auto cparams = llama_context_default_params();
        cparams.n_ctx      = n_ctx;
        cparams.n_batch    = n_ctx;
        cparams.n_ubatch   = 64;
        cparams.n_seq_max  = n_seq;
        cparams.kv_unified = unified;
        cparams.n_threads  = cparams.n_threads_batch = 2;

        ctx     = llama_init_from_model(model, cparams);
        n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
        if (!ctx) {
            fprintf(stderr, "no context with %s\n", recipe);
            exit(1);
        }
    }
    ~context() { llama_free(ctx); }

    context(const context &) = delete;

    llama_memory_t mem() { return llama_get_memory(ctx); }

    // n tokens, in turn of each of seqs, from position p0; other texts for other values of text
    std::vector<float> feed(const std::vector<llama_seq_id> & seqs, llama_pos p0, int n, const std::vector<int> & text) {
        llama_batch batch = llama_batch_init(n*seqs.size(), 0, 1);
        for (int i = 0; i < n; ++i) {
            for (size_t s = 0; s < seqs.size(); ++s) {
                const int j = batch.n_tokens++;
                batch.token   [j]    = (unsigned) (17*(p0 + i)*(p0 + i) + 131*text[s] + 7*(p0 + i)*text[s]) % n_vocab;
                batch.pos     [j]    = p0 + i;
                batch.n_seq_id[j]    = 1;
                batch.seq_id  [j][0] = seqs[s];
                batch.logits  [j]    = i == n - 1;
            }
        }
        std::vector<float> res;
        if (llama_decode(ctx, batch) == 0) {
            const float * logits = llama_get_logits_ith(ctx, -1);
            res.assign(logits, logits + n_vocab);
        }
        llama_batch_free(batch);
        return res;
    }

    bytes save(llama_seq_id seq) {
        bytes res(llama_state_seq_get_size(ctx, seq));
        res.resize(llama_state_seq_get_data(ctx, res.data(), res.size(), seq));
        return res;
    }
    bytes save() {
        bytes res(llama_state_get_size(ctx));
        res.resize(llama_state_get_data(ctx, res.data(), res.size()));
        return res;
    }
    bool load(const bytes & b, llama_seq_id seq) { return llama_state_seq_set_data(ctx, b.data(), b.size(), seq) != 0; }
    bool load(const bytes & b)                   { return llama_state_set_data(ctx, b.data(), b.size()) != 0; }
};

// Sequence 0 beside others whose texts and removed tokens differ. Without mean and factors, a row of a page is decoded alone (but
// for the page's power of two), so that not even pages that all share may differ.
static bytes beside(llama_model * model, int other) {
    context c(model, "skvq:k=8,v=8,mean=0,smooth=0", true, 3, 2048);

    c.feed({ 1 }, 0, 256, { other });
    c.feed({ 0 }, 0, 300, { 0 });
    c.feed({ 0, 2 }, 300, 200, { 0, other }); // shares every page of them
    c.feed({ 0 }, 500, 60, { other });
    llama_memory_seq_rm(c.mem(), 0, 500, -1);
    llama_memory_seq_rm(c.mem(), 1, -1, -1);
    c.feed({ 0 }, 500, 40, { 0 });
    return c.save(0);
}

static void test_others(llama_model * model) {
    printf("a sequence's state does not depend on others\n");
    const bytes a = beside(model, 1);
    const bytes b = beside(model, 2);
    check(!a.empty() && a.size() == b.size(), "saved", a.size());
    size_t n = 0;
    for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
        n += a[i] != b[i];
    }
    check(n == 0, "bytes that differ", n);
}

// four f16 values each
struct canaries {
    std::unordered_set<uint64_t> rows;

    static uint64_t at(const bytes & b, size_t i) {
        uint64_t res;
        memcpy(&res, b.data() + i, sizeof(res));
        return res;
    }

    int found(const bytes & b) const {
        std::unordered_set<uint64_t> res;
        for (size_t i = 0; i + sizeof(uint64_t) <= b.size(); ++i) {
            if (rows.count(at(b, i))) {
                res.insert(at(b, i));
            }
        }
        return res.size();
    }

    void none_in(const bytes & b, const char * what) const {
        const int n = found(b);
        check(!b.empty() && n == 0, what, n);
    }
    void some_in(const bytes & b, const char * what) const {
        const int n = found(b);
        check(n > 0, what, n);
    }
};

// exact rows of another sequence, in slots and in the outlier pool, and of removed tokens
static void test_canary(llama_model * model, const char * recipe) {
    printf("%s: rows that must not leave\n", recipe);
    context c(model, recipe, true, 3, 2048);

    // all rows are exact: they stand in the state as f16, from its end on
    canaries foreign;
    c.feed({ 1 }, 0, 60, { 1 });
    const bytes exact = c.save(1);
    for (size_t i = exact.size() - 8 - 8; i > exact.size()/2; i -= 64) {
        foreign.rows.insert(canaries::at(exact, i));
    }
    foreign.rows.erase(0);

    c.feed({ 1 }, 60, 350, { 1 });
    c.feed({ 0 }, 0, 350, { 0 });
    foreign.some_in(c.save(),  "the whole context holds some of them");
    foreign.some_in(c.save(1), "and their own sequence's state");
    foreign.none_in(c.save(0), "another sequence's state does not");

    llama_memory_seq_rm(c.mem(), 1, -1, -1);
    foreign.none_in(c.save(0), "nor when they are removed");
    foreign.none_in(c.save(),  "nor does the whole context's then");
}

// saved before a shift is applied or a sequence copied, which llama.cpp puts off until it decodes
static void test_pending(llama_model * model) {
    printf("what llama.cpp has put off\n");
    const char * recipe = "skvq:k=8,v=8";
    {
        context c(model, recipe, true, 1, 1024);
        context d(model, recipe, true, 1, 1024);
        c.feed({ 0 }, 0, 400, { 0 });
        llama_memory_seq_rm (c.mem(), 0, 50, 150);
        llama_memory_seq_add(c.mem(), 0, 150, -1, -100);
        const bytes one = c.save(0);
        const bytes all = c.save();
        const auto expected = c.feed({ 0 }, 300, 1, { 0 });
        check(d.load(all) && d.feed({ 0 }, 300, 1, { 0 }) == expected, "a shift, whole context: the same logits");
        check(d.load(one, 0) && d.feed({ 0 }, 300, 1, { 0 }).size() == expected.size(), "a shift, one sequence");
    }
    {
        context c(model, recipe, false, 2, 1024);
        context d(model, recipe, false, 2, 1024);
        c.feed({ 0 }, 0, 300, { 0 });
        llama_memory_seq_cp(c.mem(), 0, 1, -1, -1);
        const bytes one = c.save(1);
        const auto expected = c.feed({ 1 }, 300, 1, { 0 });
        check(d.load(one, 0) && d.feed({ 0 }, 300, 1, { 0 }) == expected, "a copy: the same logits");
    }
}

static const size_t CHECKSUM = 4;

// makes what begins at front pass as undamaged
static void seal(bytes & b, size_t front) {
    if (b.size() >= front + CHECKSUM) {
        uint32_t value = 0;
        kvq_checksum_add(b.data() + front, b.size() - front - CHECKSUM, &value);
        memcpy(b.data() + b.size() - CHECKSUM, &value, CHECKSUM);
    }
}

// changes one thing, mostly near the front
static void mutate(std::mt19937 & rng, bytes & b, size_t front) {
    static const uint32_t values[] = { 0, 1, 2, 0x7f, 0xff, 0x7fff, 0xffff, 0x7fffffff, 0x80000000, 0xfffffffe, 0xffffffff };

    const size_t end = rng()%4 == 0 ? b.size() : std::min<size_t>(b.size(), front + 1600);
    if (end < front + 16) {
        return;
    }
    const size_t at = front + rng()%(end - front - 8);
    switch (rng()%6) {
        case 0: b[at] ^= 1 << rng()%8; break;
        case 1: b[at] = rng(); break;
        case 2: case 3: memcpy(&b[at], &values[rng()%11], 4); break;
        case 4: b.erase(b.begin() + at, b.begin() + std::min(at + rng()%64, b.size())); break;
        default: b.insert(b.begin() + at, rng()%64, 0); break;
    }
}

static size_t peak_kib() {
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return usage.ru_maxrss;
}

// a slot file of llama.cpp: magic, version, number of tokens; then the state as in memory without its first 8 bytes
static bool load_file(context & c, const bytes & state, const char * path) {
    FILE * f = fopen(path, "wb");
    const uint32_t head[3] = { LLAMA_STATE_SEQ_MAGIC, LLAMA_STATE_SEQ_VERSION, 0 };
    fwrite(head, 1, sizeof(head), f);
    fwrite(state.data() + 8, 1, state.size() - 8, f);
    fclose(f);
    llama_token token;
    size_t n = 0;
    const bool ok = llama_state_seq_load_file(c.ctx, path, 0, &token, 1, &n) != 0;
    remove(path);
    return ok;
}

static void test_hostile(llama_model * model, const char * recipe, int n_mutations) {
    printf("%s: states that nobody saved\n", recipe);
    context c(model, recipe, true, 2, 1024);

    c.feed({ 0 }, 0, 300, { 0 });
    c.feed({ 0, 1 }, 300, 60, { 0, 1 });
    const bytes one = c.save(0);
    const bytes all = c.save();
    const auto expected = c.feed({ 0 }, 360, 1, { 0 });

    // kvq's part: behind magic and sequence id, and behind the name of the architecture
    uint32_t n_name = 0;
    memcpy(&n_name, all.data(), sizeof(n_name));
    const size_t front[2] = { 8, sizeof(n_name) + n_name };

    const auto load = [&](const bytes & b, bool whole) { return whole ? c.load(b) : c.load(b, 0); };

    c.load(all);
    int n_taken = 0;
    for (bool whole : { false, true }) {
        const bytes & good = whole ? all : one;
        for (size_t len = front[whole]; len < good.size(); len += len < 1500 ? 1 : 4093) {
            for (bool sealed : { false, true }) {
                bytes cut(good.begin(), good.begin() + len);
                if (sealed) {
                    seal(cut, front[whole]);
                }
                n_taken += load(cut, whole);
                n_taken += !whole && len > 16 && len%7 == 0 && load_file(c, cut, "test_state.tmp");
            }
        }
    }
    check(n_taken == 0, "cut states are refused at every length of the front", n_taken);

    std::mt19937 rng(1);
    for (bool whole : { false, true }) {
        bytes bad = whole ? all : one;
        for (size_t i = front[whole]; i < front[whole] + 2500; ++i) {
            const uint8_t bit = 1 << rng()%8;
            bad[i] ^= bit;
            n_taken += load(bad, whole);
            bad[i] ^= bit;
        }
    }
    check(n_taken == 0, "a flipped bit in any byte of the front is noticed", n_taken);
    check(c.feed({ 0 }, 360, 1, { 0 }) == expected, "the cache is as it was");

    const size_t peak = peak_kib();
    int n_refused = 0;
    for (int i = 0; i < n_mutations; ++i) {
        const bool whole = i%2;
        bytes bad = whole ? all : one;
        for (int j = rng()%4; j >= 0; --j) {
            mutate(rng, bad, front[whole]);
        }
        seal(bad, front[whole]);
        const bool taken = !whole && i%8 == 0 ? load_file(c, bad, "test_state.tmp") : load(bad, whole);
        n_refused += !taken;
        n_taken   += taken;
        if (taken) {
            // whatever it holds can be used, saved, and replaced
            const llama_pos last = llama_memory_seq_pos_max(c.mem(), 0);
            if (last < 100000 && i%4 == 0) {
                c.feed({ 0 }, last + 1, 3, { 0 });
            }
            c.save(0);
        }
    }
    check(n_taken > n_mutations/100 && n_refused > n_mutations/10, "mutations with a right checksum: taken", n_taken);
    check(c.load(all) && c.feed({ 0 }, 360, 1, { 0 }) == expected, "the good state is taken after them");
    check(peak_kib() - peak < 64*1024, "MiB that they took", (peak_kib() - peak)/1024.0);
}

int main(int argc, char ** argv) {
    if (argc < 2) {
        fprintf(stderr, "usage: %s MODEL [N_MUTATIONS]\n", argv[0]);
        return 1;
    }
    setvbuf(stdout, nullptr, _IOLBF, 0);
    llama_log_set([](ggml_log_level level, const char * text, void *) {
        if (level == GGML_LOG_LEVEL_ERROR && getenv("KVQ_TEST_LOG")) {
            fputs(text, stderr);
        }
    }, nullptr);
    llama_backend_init();

    auto mparams = llama_model_default_params();
    mparams.n_gpu_layers = getenv("KVQ_TEST_NGL") ? atoi(getenv("KVQ_TEST_NGL")) : 0;
    llama_model * model = llama_model_load_from_file(argv[1], mparams);
    if (!model) {
        fprintf(stderr, "cannot load %s\n", argv[1]);
        return 1;
    }
    const int n_mutations = argc > 2 ? atoi(argv[2]) : 2000;

    test_others(model);
    for (const char * recipe : { "skvq", "kivi", "ott:skip-layers=0", "qaq" }) {
        test_canary(model, recipe);
    }
    test_pending(model);
    for (const char * recipe : { "skvq:k=3,v=2,window=32", "ott:window=32,skip-layers=0", "qaq:window=32" }) {
        test_hostile(model, recipe, n_mutations);
    }

    llama_model_free(model);
    printf(n_failed ? "%d failed\n" : "all passed\n", n_failed);

    return n_failed != 0;
}
