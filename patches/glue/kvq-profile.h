#pragma once

// Profiles: what llama-kvq-calibrate has found of a model, in a GGUF file beside it.

#include "llama.h"

#include <kvq.hpp>

#include <map>
#include <string>
#include <vector>

// what is in a file but for the numbers of its layers
struct kvq_profile_info {
    std::string arch;
    uint32_t n_layer;
    uint32_t weights; // checksum of the model's norms, which are the same however its matrices are quantized; 0: not known
    uint32_t text;    // checksum of the tokens
    uint32_t n_tokens;
    bool     interleaved; // how RoPE pairs values
};

struct kvq_profile_of_layer {
    kvq_shape           shape;
    std::vector<double> frequencies; // radians a position, by pair
};

// what a profile has to say of this model to be its own
kvq_profile_info kvq_profile_identity(const llama_model & model);

// both throw one line for people
void kvq_profile_write(const std::string & path, const kvq_profile_info & info, const kvq_profile * profile,
        const std::map<uint32_t, kvq_profile_of_layer> & layers);

// of these layers, whose frequencies it fills in; fails if the file is not of such a model
kvq::profile kvq_profile_read(const std::string & path, const kvq_profile_info & model,
        std::map<uint32_t, kvq_profile_of_layer> & layers);
