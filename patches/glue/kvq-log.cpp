// What a context got, in one line. Lines that start with "kvq: " are seen whatever the verbosity (common/log.cpp,
// llama-bench).

#include "kvq-glue.h"

#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-memory-hybrid-iswa.h"

#include <map>
#include <sstream>

static const double MIB = 1024.0*1024.0;

std::vector<kvq_named_cache> kvq_caches(const llama_memory_i * memory) {
    std::vector<kvq_named_cache> all;

    const auto add = [&](const char * name, const llama_kv_cache * kv) {
        const auto * cache = static_cast<const llama_kvq_cache *>(kv->kvq.get());
        if (cache && cache->size().bytes > 0) {
            all.push_back({ name, cache });
        }
    };
    const auto add_iswa = [&](const llama_kv_cache_iswa * kv) {
        add("full attention", kv->get_base());
        add("sliding window", kv->get_swa());
    };

    if (const auto * kv = dynamic_cast<const llama_kv_cache *>(memory)) {
        add("", kv);
    } else if (const auto * kv = dynamic_cast<const llama_kv_cache_iswa *>(memory)) {
        add_iswa(kv);
    } else if (const auto * mem = dynamic_cast<const llama_memory_hybrid *>(memory)) {
        add("", mem->get_mem_attn());
    } else if (const auto * mem = dynamic_cast<const llama_memory_hybrid_iswa *>(memory)) {
        add_iswa(mem->get_mem_attn());
    }
    return all;
}

uint32_t llama_kvq_cache::n_cells() const {
    return kv.get_size();
}

bool llama_kvq_cache::only_estimated() const {
    return kv.hparams.no_alloc;
}

llama_kvq_cache::size_info llama_kvq_cache::size() const {
    size_info sum;
    sum.bytes = kv.size_k_bytes() + kv.size_v_bytes();

    for (size_t i = 0; i < layouts.size(); ++i) {
        const uint32_t il = kv.layers[i].il;
        const size_t   k  = kv.hparams.n_embd_k_gqa(il);
        const size_t   v  = kv.hparams.n_embd_v_gqa(il);

        sum.bits_k    += kvq_layout_bits_k(layouts[i].get())*k;
        sum.bits_v    += kvq_layout_bits_v(layouts[i].get())*v;
        sum.n_embd_k  += k;
        sum.n_embd_v  += v;
        sum.bytes_f16 += sizeof(ggml_fp16_t)*kv.get_size()*kv.n_stream*(k + v);
    }
    return sum;
}

static size_t kvq_bytes(const kvq_layout * layout, kvq_status (*list)(const kvq_layout *, kvq_side, kvq_range *, size_t, size_t *)) {
    size_t bytes = 0;
    for (kvq_side side : { KVQ_SIDE_K, KVQ_SIDE_V }) {
        size_t n = 0;
        llama_kvq_must(list(layout, side, nullptr, 0, &n), "ranges");
        std::vector<kvq_range> ranges(n);
        llama_kvq_must(list(layout, side, ranges.data(), n, &n), "ranges");
        for (const auto & range : ranges) {
            bytes += range.size;
        }
    }
    return bytes;
}

void llama_kvq_cache::add_parts(std::map<std::string, device_parts> & all) const {
    for (size_t i = 0; i < layouts.size(); ++i) {
        const kvq_layout * layout = layouts[i].get();
        const char *       device = gpus[i] ? ggml_backend_buft_name(gpus[i]->buft) : "CPU";

        const size_t bytes = kvq_layout_k_bytes(layout) + kvq_layout_v_bytes(layout);
        const size_t pool  = kvq_bytes(layout, kvq_layout_pool_ranges);
        const size_t exact = kvq_bytes(layout, kvq_layout_slot_ranges);

        auto & sum = all[device];
        sum.n_layers += 1;
        sum.pages    += (bytes - exact)*kv.n_stream;
        sum.exact    += (exact - pool)*kv.n_stream;
        sum.pool     += pool*kv.n_stream;

        std::vector<char> text(512);
        llama_kvq_must(kvq_layout_format(layout, text.data(), text.size()), "format");
        LLAMA_LOG_DEBUG("%s: layer %u: attended to and stored by %s: %s\n", __func__, kv.layers[i].il,
                gpus[i] ? device : kvq_isa(), text.data());
    }
}

// "on = kivi:k=3,v=3", or the recipe alone if it is not a name for another
static std::string kvq_says(const char * spec) {
    std::vector<char> text(strlen(spec) + 64);
    llama_kvq_must(kvq_recipe_expand(spec, text.data(), text.size()), "recipe");

    return strcmp(text.data(), spec) == 0 ? spec : format("%s = %s", spec, text.data());
}

// one line about all caches that are not smaller than f16, empty if there is none
static std::string kvq_not_smaller(const std::vector<kvq_named_cache> & caches) {
    std::string which;
    for (const auto & it : caches) {
        const auto size = it.cache->size();
        if (size.bytes >= size.bytes_f16) {
            which += format("%s%s%s%u cells take %.2f MiB, in f16 %.2f", which.empty() ? "" : ", ", it.name, *it.name ? " " : "",
                    it.cache->n_cells(), size.bytes/MIB, size.bytes_f16/MIB);
        }
    }
    return which.empty() ? which : "kvq: not smaller than f16, since exact rows outweigh packed ones: " + which +
            "; use a smaller window or page (such as window=32,page=64) or --kvq off";
}

// what a small cache has less of than was asked for, such as "window=128 instead of 256"
static std::string kvq_cut(const std::string & asked, const std::string & made) {
    std::istringstream all_asked(asked);
    std::istringstream all_made(made);
    std::string cut, a, m;
    while (std::getline(all_asked, a, ',') && std::getline(all_made, m, ',')) {
        if (a != m) {
            cut += (cut.empty() ? "" : ", ") + m + " instead of " + a.substr(a.find('=') + 1);
        }
    }
    return cut;
}

void llama_kvq_log(const llama_memory_i * memory, const char * spec, const std::string & before, const std::string & after) {
    const auto caches = kvq_caches(memory);
    if (caches.empty() || caches[0].cache->only_estimated()) {
        return;
    }

    llama_kvq_cache::size_info sum;
    std::string parts;
    for (const auto & it : caches) {
        const auto size = it.cache->size();

        sum.bytes     += size.bytes;
        sum.bytes_f16 += size.bytes_f16;
        sum.bits_k    += size.bits_k;
        sum.bits_v    += size.bits_v;
        sum.n_embd_k  += size.n_embd_k;
        sum.n_embd_v  += size.n_embd_v;

        parts += format("%s%s %.2f MiB for %u cells", parts.empty() ? "" : ", ", it.name, size.bytes/MIB, it.cache->n_cells());
    }

    const double ratio = (double) sum.bytes_f16/sum.bytes;

    LLAMA_LOG_INFO("%s: every key: %s\n", __func__, caches[0].cache->spec().c_str());
    LLAMA_LOG_INFO("kvq: %s%s: %.3f bits per value of K, %.3f of V; %.2f MiB with the exact rows%s, %.2fx %s than f16%s\n",
            before.c_str(), kvq_says(spec).c_str(), sum.bits_k/sum.n_embd_k, sum.bits_v/sum.n_embd_v, sum.bytes/MIB,
            caches.size() > 1 ? format(" (%s)", parts.c_str()).c_str() : "",
            ratio >= 1.0 ? ratio : 1.0/ratio, ratio >= 1.0 ? "smaller" : "larger", after.c_str());

    std::map<std::string, llama_kvq_cache::device_parts> devices;
    for (const auto & it : caches) {
        it.cache->add_parts(devices);
    }
    for (const auto & it : devices) {
        LLAMA_LOG_INFO("%s: %s: %zu layers, pages %.2f MiB, exact rows and what was learned %.2f MiB, outlier tokens %.2f MiB\n", __func__,
                it.first.c_str(), it.second.n_layers, it.second.pages/MIB, it.second.exact/MIB, it.second.pool/MIB);
    }

    for (const auto & it : caches) {
        const std::string cut = kvq_cut(it.cache->asked, it.cache->spec());
        if (!cut.empty()) {
            LLAMA_LOG_INFO("kvq: %s%s%u cells have room for %s\n", it.name, *it.name ? ": " : "", it.cache->n_cells(), cut.c_str());
        }
    }

    const std::string warning = kvq_not_smaller(caches);
    if (!warning.empty()) {
        LLAMA_LOG_WARN("%s\n", warning.c_str());
    }
}
