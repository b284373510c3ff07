// A guard against recipes that do not fit a model: how much noise packed keys add to the attention logits of each layer.

#include "kvq-glue.h"
#include "kvq-state.h"

#include "llama-impl.h"

#include <cmath>
#include <mutex>

// Deviation of that noise, root mean square over the layers, from which a recipe spoils answers: attention weights are then
// off by a factor of e. What was measured stands in README.md, Quality: 0.3 to 0.5 at 3 bits, up to 0.9 at 2, above 1 where
// the mean KLD is above 0.1.
static const float KVQ_NOISE_MAX = 1.0f;

// the means of fewer rows say little
static const float KVQ_NOISE_ROWS = 16.0f;

// the factor on the scores of the layer's queries; 0 as long as no graph attends there
float llama_kvq_cache::logit_scale(size_t i) const {
    for (const auto & node : nodes) {
        if (node.layout == layouts[i].get() && node.has_rows) {
            return node.scale;
        }
    }
    return 0.0f;
}

// of the stream that has packed most
static kvq_key_error key_error(const kvq_layout * layout, const std::vector<ggml_tensor *> & streams) {
    kvq_key_error most = {};

    for (auto * k : streams) {
        kvq_key_error cur = {};
        const kvq_host_memory mem(k, kvq_state_ranges(layout, KVQ_SIDE_K, KVQ_STATE_SLOTS, 0, 0));
        llama_kvq_must(kvq_layer_key_error(layout, mem.data, &cur), "key error");

        if (cur.rows > most.rows) {
            most = cur;
        }
    }

    return most;
}

void llama_kvq_cache::guard(size_t n_new) {
    // pages are sealed by the time the next plan is made
    const bool is_due = n_unguarded >= n_guard;

    n_unguarded = n_new + (is_due ? 0 : n_unguarded);
    if (!is_due) {
        return;
    }

    // a look at GPUs waits for them and copies their exact rows
    synchronize();
    n_guard *= all_gpus.empty() ? 1 : 2;

    noises.clear();
    for (size_t i = 0; i < layouts.size(); ++i) {
        const kvq_key_error error = key_error(layouts[i].get(), kv.layers[i].k_stream);

        if (error.rows >= KVQ_NOISE_ROWS) {
            const float scale = logit_scale(i);
            noises.push_back({ kv.layers[i].il, scale*std::sqrt(error.noise), scale*std::sqrt(error.signal) });
        }
    }

    if (noises.empty()) {
        return;
    }

    float  sum2 = 0.0f;
    size_t most = 0;
    for (size_t i = 0; i < noises.size(); ++i) {
        sum2 += noises[i].noise*noises[i].noise;
        most  = noises[i].noise > noises[most].noise ? i : most;
    }
    const float noise = std::sqrt(sum2/noises.size());

    // once for a recipe: a model with sliding windows has two caches, and contexts may run in threads of their own
    static std::mutex  mutex;
    static std::string warned;
    const std::lock_guard<std::mutex> lock(mutex);
    if (!(noise <= KVQ_NOISE_MAX) && warned != spec()) {
        warned = spec();
        LLAMA_LOG_WARN("kvq: %s does not fit this model: packed keys add noise of %.1f to attention logits (most in layer %u: %.1f), "
                "above %.1f answers get worse: use --kvq on, or --kvq 4\n",
                warned.c_str(), noise, noises[most].il, noises[most].noise, KVQ_NOISE_MAX);
    }
}

llama_kvq_cache::~llama_kvq_cache() {
    for (const auto & cur : noises) {
        LLAMA_LOG_INFO("llama_kvq_guard: layer %3u: packed keys add noise of %.3f to attention logits of deviation %.3f\n",
                cur.il, cur.noise, cur.logits);
    }
}
