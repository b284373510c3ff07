// llama-kvq-calibrate: reads a text with a model and writes what recipes with a profile want to know of its keys and values.
//
// The model reads pieces of the text, each in one ubatch, so that nothing is packed yet and everything is exact. Statistics are
// kept per layer and KV head (memory: an f16 cache of all the tokens, and a matrix each); the profile is worked out at the end.

#include "kvq-observe.h"

#include "llama.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <thread>

static const char * USAGE =
    "usage: llama-kvq-calibrate -m MODEL.gguf -f TEXT -o MODEL.kvq.gguf [-c 2048] [--chunks 5] [-t THREADS]\n"
    "\n"
    "Reads up to `chunks` pieces of `c` tokens of a text with the model and writes a profile of its keys and values, for\n"
    "--kvq aqua:profile=MODEL.kvq.gguf. Any text will do that is like what the model is to read; 8 000 tokens are enough.\n"
    "The same text gives the same file. Runs on the CPU.\n";

struct options {
    std::string model, text, out;
    uint32_t n_ctx     = 2048;
    uint32_t n_chunks  = 5;
    uint32_t n_threads = std::max(1u, std::thread::hardware_concurrency());
};

static uint32_t number(const std::string & key, const char * value) {
    char * end = nullptr;
    const unsigned long n = strtoul(value, &end, 10);
    if (!*value || *end || n == 0 || n > 1u << 20) {
        throw std::runtime_error(key + " " + value + ": use a number from 1 on");
    }
    return n;
}

static options parse(int argc, char ** argv) {
    options res;
    for (int i = 1; i < argc; i += 2) {
        const std::string key = argv[i];
        if (key == "-h" || key == "--help") {
            fputs(USAGE, stdout);
            exit(0);
        }
        if (i + 1 == argc) {
            throw std::runtime_error(key + " wants a value");
        }
        const char * value = argv[i + 1];
        if      (key == "-m")       { res.model     = value; }
        else if (key == "-f")       { res.text      = value; }
        else if (key == "-o")       { res.out       = value; }
        else if (key == "-c")       { res.n_ctx     = number(key, value); }
        else if (key == "--chunks") { res.n_chunks  = number(key, value); }
        else if (key == "-t")       { res.n_threads = number(key, value); }
        else {
            throw std::runtime_error(key + " is no option of this program (--help lists them)");
        }
    }
    if (res.model.empty() || res.text.empty() || res.out.empty()) {
        throw std::runtime_error("-m MODEL.gguf, -f TEXT and -o FILE are needed (--help says more)");
    }
    return res;
}

static void check(kvq_status status) {
    if (status != 0) {
        throw std::runtime_error(kvq_last_error());
    }
}

// statistics of all layers
struct observer : llama_kvq_observer {
    struct layer {
        kvq::calibration     calibration;
        kvq_profile_of_layer of;
    };

    std::mutex                mutex;
    std::map<uint32_t, layer> layers;
    std::string               error; // the first one

    layer & find(uint32_t il, const kvq_shape & shape, const kvq_rotation * rotation) {
        const std::lock_guard<std::mutex> lock(mutex);

        auto & res = layers[il];
        if (!res.calibration) {
            size_t n = 0;
            check(kvq_rotation_frequencies(rotation, nullptr, 0, &n));
            res.of = { shape, std::vector<double>(n) };
            if (n > 0) {
                check(kvq_rotation_frequencies(rotation, res.of.frequencies.data(), n, &n));
            }
            check(kvq_calibration_new(&shape, rotation, kvq::out(res.calibration)));
        }
        return res;
    }

    void observe(uint32_t il, const kvq_shape & shape, const kvq_rotation * rotation, const kvq_calibration_args & args,
            int ith, int nth) override {
        try {
            check(kvq_calibration_observe(find(il, shape, rotation).calibration.get(), &args, ith, nth));
        } catch (const std::exception & e) {
            refuse(e.what());
        }
    }

    void refuse(const char * why) override {
        const std::lock_guard<std::mutex> lock(mutex);
        error = error.empty() ? why : error;
    }
};

static std::vector<llama_token> read_tokens(const std::string & path, const llama_vocab * vocab) {
    std::ifstream file(path, std::ios::binary);
    std::stringstream text;
    if (!file || !(text << file.rdbuf())) {
        throw std::runtime_error("cannot read " + path);
    }
    const std::string all = text.str();

    std::vector<llama_token> tokens(all.size() + 16);
    const int n = llama_tokenize(vocab, all.data(), all.size(), tokens.data(), tokens.size(), true, false);
    if (n < 0) {
        throw std::runtime_error(path + " cannot be tokenized");
    }
    tokens.resize(n);
    return tokens;
}

static void only_errors(ggml_log_level level, const char * text, void *) {
    if (level == GGML_LOG_LEVEL_ERROR || level == GGML_LOG_LEVEL_WARN) {
        fputs(text, stderr);
    }
}

// the pieces of the text, one after the other
static void read_text(const options & opt, const llama_model * model, llama_context * ctx, observer & seen, kvq_profile_info & info) {
    const llama_vocab * vocab = llama_model_get_vocab(model);

    auto tokens = read_tokens(opt.text, vocab);

    const uint32_t n_chunks = std::min<uint32_t>(opt.n_chunks, tokens.size()/opt.n_ctx);
    if (n_chunks == 0) {
        throw std::runtime_error(opt.text + " has " + std::to_string(tokens.size()) + " tokens, fewer than a piece: use a longer text or a smaller -c");
    }
    for (uint32_t i = 0; i < n_chunks; ++i) {
        fprintf(stderr, "llama-kvq-calibrate: reading piece %u of %u (%u tokens each)\n", i + 1, n_chunks, opt.n_ctx);

        llama_token * piece = tokens.data() + (size_t) i*opt.n_ctx;
        if (llama_vocab_get_add_bos(vocab)) {
            piece[0] = llama_vocab_bos(vocab);
        }
        check(kvq_checksum_add((const uint8_t *) piece, opt.n_ctx*sizeof(llama_token), &info.text));
        info.n_tokens += opt.n_ctx;

        llama_memory_clear(llama_get_memory(ctx), true);
        if (llama_decode(ctx, llama_batch_get_one(piece, opt.n_ctx)) != 0) {
            throw std::runtime_error("the model cannot read the text");
        }
        if (!seen.error.empty()) {
            throw std::runtime_error(seen.error);
        }
    }
}

static void calibrate(const options & opt) {
    llama_log_set(only_errors, nullptr);
    llama_backend_init();

    auto mparams = llama_model_default_params();
    mparams.n_gpu_layers = 0;

    const std::unique_ptr<llama_model, void (*)(llama_model *)> model(llama_model_load_from_file(opt.model.c_str(), mparams), llama_model_free);
    if (!model) {
        throw std::runtime_error("cannot load " + opt.model);
    }

    // any recipe: nothing is stored
    setenv("LLAMA_ARG_KVQ", "skvq", 1);

    auto cparams = llama_context_default_params();
    cparams.n_ctx           = opt.n_ctx;
    cparams.n_batch         = opt.n_ctx;
    cparams.n_ubatch        = opt.n_ctx;
    cparams.n_threads       = opt.n_threads;
    cparams.n_threads_batch = opt.n_threads;

    const std::unique_ptr<llama_context, void (*)(llama_context *)> ctx(llama_init_from_model(model.get(), cparams), llama_free);
    if (!ctx) {
        throw std::runtime_error("cannot make a context of " + opt.model);
    }

    observer seen;
    llama_kvq_observe(&seen);
    auto info = llama_kvq_identity(model.get());
    read_text(opt, model.get(), ctx.get(), seen, info);
    llama_kvq_observe(nullptr);

    kvq::profile profile;
    check(kvq_profile_new(kvq::out(profile)));

    std::map<uint32_t, kvq_profile_of_layer> layers;
    for (auto & it : seen.layers) {
        fprintf(stderr, "llama-kvq-calibrate: layer %zu of %zu\n", layers.size() + 1, seen.layers.size());
        check(kvq_calibration_solve(it.second.calibration.get(), opt.n_threads, it.first, profile.get()));
        layers[it.first] = it.second.of;
        it.second.calibration.reset();
    }
    llama_kvq_profile_write(opt.out, info, profile.get(), layers);
    fprintf(stderr, "llama-kvq-calibrate: wrote %s: %zu layers, from %u tokens\n", opt.out.c_str(), layers.size(), info.n_tokens);
}

int main(int argc, char ** argv) {
    try {
        calibrate(parse(argc, argv));
        return 0;
    } catch (const std::exception & e) {
        fprintf(stderr, "llama-kvq-calibrate: %s\n", e.what());
        return 1;
    }
}
