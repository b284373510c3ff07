// The file of a profile: GGUF, of a format version, with the model that it was made of, a checksum of its numbers, and five
// arrays per layer. Matrices are F16.

#include "kvq-profile.h"

#include "ggml.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "gguf.h"

#include "llama-impl.h"
#include "llama-model.h"

#include <cerrno>
#include <cstring>

static const uint32_t KVQ_PROFILE_VERSION = 1;

static const char * KEY_TYPE        = "general.type";
static const char * TYPE            = "kvq-profile";
static const char * KEY_VERSION     = "kvq.version";
static const char * KEY_ARCH        = "kvq.model.architecture";
static const char * KEY_N_LAYER     = "kvq.model.layers";
static const char * KEY_WEIGHTS     = "kvq.model.checksum";
static const char * KEY_INTERLEAVED = "kvq.model.rope_interleaved";
static const char * KEY_TEXT        = "kvq.text.checksum";
static const char * KEY_N_TOKENS    = "kvq.text.tokens";
static const char * KEY_CHECKSUM    = "kvq.checksum";

enum kvq_array { KEY_BIAS, KEY_TRANSFORM, PREDICTOR, OFFSET, FREQUENCIES, N_ARRAYS };

static std::string array_name(uint32_t il, int array) {
    static const char * names[N_ARRAYS] = { "key_bias", "key_transform", "predictor", "offset", "rope_frequencies" };
    return format("blk.%u.kvq.%s", il, names[array]);
}

// innermost first
static std::vector<int64_t> array_shape(const kvq_profile_of_layer & layer, int array) {
    const int64_t k = layer.shape.head_dim_k, v = layer.shape.head_dim_v, heads = layer.shape.n_kv_heads;
    switch (array) {
        case KEY_BIAS:      return { k, heads };
        case KEY_TRANSFORM: return { k, k, heads };
        case PREDICTOR:     return { k, v, heads };
        case OFFSET:        return { v, heads };
        default:            return { (int64_t) layer.frequencies.size() };
    }
}

static ggml_type array_type(int array) {
    return array == FREQUENCIES ? GGML_TYPE_F64 : array == KEY_TRANSFORM || array == PREDICTOR ? GGML_TYPE_F16 : GGML_TYPE_F32;
}

static void add_checksum(uint32_t & sum, const void * data, size_t size) {
    if (size > 0 && kvq_checksum_add((const uint8_t *) data, size, &sum) != 0) {
        throw std::runtime_error(format("kvq: %s", kvq_last_error()));
    }
}

kvq_profile_info kvq_profile_identity(const llama_model & model) {
    kvq_profile_info info = {};

    info.arch        = model.arch_name();
    info.n_layer     = model.hparams.n_layer();
    info.interleaved = model.hparams.rope_type == LLAMA_ROPE_TYPE_NORM;
    if (model.hparams.no_alloc) {
        return info; // there are no weights while llama.cpp only estimates memory
    }

    std::map<std::string, const ggml_tensor *> norms; // in an order of their own
    for (const auto & it : model.tensors_by_name) {
        const auto & name = it.first;
        const std::string end = "norm.weight";
        if (it.second->type == GGML_TYPE_F32 && name.size() > end.size() && name.compare(name.size() - end.size(), end.size(), end) == 0) {
            norms[name] = it.second;
        }
    }
    for (const auto & it : norms) {
        std::vector<uint8_t> data(ggml_nbytes(it.second));
        ggml_backend_tensor_get(it.second, data.data(), 0, data.size());
        add_checksum(info.weights, data.data(), data.size());
    }
    return info;
}

void kvq_profile_write(const std::string & path, const kvq_profile_info & info, const kvq_profile * profile,
        const std::map<uint32_t, kvq_profile_of_layer> & layers) {
    size_t size = 0;
    for (const auto & it : layers) {
        for (int a = 0; a < N_ARRAYS; ++a) {
            int64_t n = 1;
            for (int64_t ne : array_shape(it.second, a)) {
                n *= ne;
            }
            size += n*ggml_type_size(array_type(a)) + ggml_tensor_overhead() + 64;
        }
    }

    ggml_context_ptr ctx(ggml_init({ size, nullptr, false }));
    gguf_context_ptr gguf(gguf_init_empty());

    uint32_t checksum = 0;
    for (const auto & it : layers) {
        kvq_profile_layer numbers;
        if (kvq_profile_get_layer(profile, it.first, &it.second.shape, &numbers) != 0) {
            throw std::runtime_error(format("kvq: %s", kvq_last_error()));
        }
        const void * data[N_ARRAYS] = { numbers.key_bias, numbers.key_transform, numbers.predictor, numbers.offset,
            it.second.frequencies.data() };

        for (int a = 0; a < N_ARRAYS; ++a) {
            const auto shape = array_shape(it.second, a);
            if (shape[0] == 0) {
                continue; // keys that do not turn
            }
            ggml_tensor * t = ggml_new_tensor(ctx.get(), array_type(a), shape.size(), shape.data());
            if (t->type == GGML_TYPE_F16) {
                ggml_fp32_to_fp16_row((const float *) data[a], (ggml_fp16_t *) t->data, ggml_nelements(t));
            } else {
                memcpy(t->data, data[a], ggml_nbytes(t));
            }
            ggml_set_name(t, array_name(it.first, a).c_str());
            gguf_add_tensor(gguf.get(), t);
            add_checksum(checksum, t->data, ggml_nbytes(t));
        }
    }

    gguf_set_val_str (gguf.get(), KEY_TYPE,        TYPE);
    gguf_set_val_u32 (gguf.get(), KEY_VERSION,     KVQ_PROFILE_VERSION);
    gguf_set_val_str (gguf.get(), KEY_ARCH,        info.arch.c_str());
    gguf_set_val_u32 (gguf.get(), KEY_N_LAYER,     info.n_layer);
    gguf_set_val_u32 (gguf.get(), KEY_WEIGHTS,     info.weights);
    gguf_set_val_bool(gguf.get(), KEY_INTERLEAVED, info.interleaved);
    gguf_set_val_u32 (gguf.get(), KEY_TEXT,        info.text);
    gguf_set_val_u32 (gguf.get(), KEY_N_TOKENS,    info.n_tokens);
    gguf_set_val_u32 (gguf.get(), KEY_CHECKSUM,    checksum);

    if (!gguf_write_to_file(gguf.get(), path.c_str(), false)) {
        throw std::runtime_error(format("kvq: cannot write %s", path.c_str()));
    }
}

// a file that is being read
struct kvq_profile_file {
    std::string      path;
    gguf_context_ptr gguf;
    ggml_context_ptr ctx;

    std::runtime_error refuse(const std::string & why) const {
        return std::runtime_error(format("kvq: profile %s: %s", path.c_str(), why.c_str()));
    }

    int64_t find(const char * key, gguf_type type) const {
        const int64_t id = gguf_find_key(gguf.get(), key);
        if (id < 0 || gguf_get_kv_type(gguf.get(), id) != type) {
            throw refuse(format("it lacks %s: make it anew with llama-kvq-calibrate", key));
        }
        return id;
    }
    uint32_t    u32 (const char * key) const { return gguf_get_val_u32 (gguf.get(), find(key, GGUF_TYPE_UINT32)); }
    std::string text(const char * key) const { return gguf_get_val_str (gguf.get(), find(key, GGUF_TYPE_STRING)); }
    bool        flag(const char * key) const { return gguf_get_val_bool(gguf.get(), find(key, GGUF_TYPE_BOOL)); }

    // all numbers of an array as floats, or doubles
    template <typename T> std::vector<T> numbers(uint32_t il, int array, const kvq_profile_of_layer & layer) const {
        const auto name = array_name(il, array);
        const ggml_tensor * t = ggml_get_tensor(ctx.get(), name.c_str());
        if (!t) {
            return {};
        }
        const auto shape = array_shape(layer, array);
        bool fits = t->type == array_type(array);
        for (size_t i = 0; i < GGML_MAX_DIMS && array != FREQUENCIES; ++i) {
            fits = fits && t->ne[i] == (i < shape.size() ? shape[i] : 1);
        }
        if (!fits) {
            throw refuse(format("%s does not have the shape of this model's heads", name.c_str()));
        }
        std::vector<T> res(ggml_nelements(t));
        if (t->type == GGML_TYPE_F16) {
            ggml_fp16_to_fp32_row((const ggml_fp16_t *) t->data, (float *) res.data(), res.size());
        } else {
            memcpy(res.data(), t->data, ggml_nbytes(t));
        }
        return res;
    }
};

static void no_log(ggml_log_level, const char *, void *) {
}

static kvq_profile_file open_profile(const std::string & path) {
    FILE * file = fopen(path.c_str(), "rb");
    if (!file) {
        throw std::runtime_error(format("kvq: profile %s: %s", path.c_str(), strerror(errno)));
    }
    fclose(file);

    ggml_context * ctx = nullptr;

    // what is wrong is said once, below
    ggml_log_callback log;
    void * user;
    ggml_log_get(&log, &user);
    ggml_log_set(no_log, nullptr);
    kvq_profile_file res = { path, gguf_context_ptr(gguf_init_from_file(path.c_str(), { false, &ctx })), ggml_context_ptr(ctx) };
    ggml_log_set(log, user);

    if (!res.gguf) {
        throw res.refuse("it is no GGUF file, or cut short: make it anew with llama-kvq-calibrate");
    }
    if (gguf_find_key(res.gguf.get(), KEY_TYPE) < 0 || res.text(KEY_TYPE) != TYPE) {
        throw res.refuse("it is not what llama-kvq-calibrate writes");
    }
    if (res.u32(KEY_VERSION) != KVQ_PROFILE_VERSION) {
        throw res.refuse(format("it has version %u, this program reads %u: make it anew with llama-kvq-calibrate",
                    res.u32(KEY_VERSION), KVQ_PROFILE_VERSION));
    }
    uint32_t checksum = 0;
    for (int64_t i = 0; i < gguf_get_n_tensors(res.gguf.get()); ++i) {
        const ggml_tensor * t = ggml_get_tensor(res.ctx.get(), gguf_get_tensor_name(res.gguf.get(), i));
        add_checksum(checksum, t->data, ggml_nbytes(t));
    }
    if (res.u32(KEY_CHECKSUM) != checksum) {
        throw res.refuse("it is damaged: make it anew with llama-kvq-calibrate");
    }
    return res;
}

kvq::profile kvq_profile_read(const std::string & path, const kvq_profile_info & model,
        std::map<uint32_t, kvq_profile_of_layer> & layers) {
    const auto file = open_profile(path);

    if (file.text(KEY_ARCH) != model.arch || file.u32(KEY_N_LAYER) != model.n_layer) {
        throw file.refuse(format("it is of a %s model of %u layers, this one is %s of %u: make it with llama-kvq-calibrate -m this model",
                    file.text(KEY_ARCH).c_str(), file.u32(KEY_N_LAYER), model.arch.c_str(), model.n_layer));
    }
    if ((model.weights && file.u32(KEY_WEIGHTS) != model.weights) || file.flag(KEY_INTERLEAVED) != model.interleaved) {
        throw file.refuse("it is of another model of this kind: make it with llama-kvq-calibrate -m this model");
    }

    kvq::profile profile;
    if (kvq_profile_new(kvq::out(profile)) != 0) {
        throw file.refuse(kvq_last_error());
    }
    for (auto & it : layers) {
        auto & layer = it.second;
        layer.frequencies = file.numbers<double>(it.first, FREQUENCIES, layer);

        std::vector<float> arrays[FREQUENCIES];
        for (int a = 0; a < FREQUENCIES; ++a) {
            arrays[a] = file.numbers<float>(it.first, a, layer);
            if (arrays[a].empty()) {
                throw file.refuse(format("it lacks %s", array_name(it.first, a).c_str()));
            }
        }

        kvq::rotation rotation;
        const kvq_profile_layer numbers = { layer.shape, arrays[KEY_BIAS].data(), arrays[KEY_TRANSFORM].data(),
            arrays[PREDICTOR].data(), arrays[OFFSET].data() };
        if (kvq_rotation_new(layer.frequencies.data(), layer.frequencies.size(), model.interleaved, kvq::out(rotation)) != 0) {
            throw file.refuse(kvq_last_error());
        }
        if (kvq_profile_set_layer(profile.get(), it.first, rotation.get(), &numbers) != 0) {
            throw file.refuse(kvq_last_error());
        }
    }
    return profile;
}
