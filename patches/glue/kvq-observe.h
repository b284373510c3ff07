#pragma once

// What llama-kvq-calibrate sees of a model: with an observer, layers attend as always and then hand what they have done to it
// instead of storing it. Exact as long as a ubatch is a whole text.

#include "kvq-profile.h"

struct llama_kvq_observer {
    virtual ~llama_kvq_observer() = default;

    // from nth threads at once, ith from 0 on
    virtual void observe(uint32_t il, const kvq_shape & shape, const kvq_rotation * rotation,
            const kvq_calibration_args & args, int ith, int nth) = 0;

    // of a layer that cannot be observed: why
    virtual void refuse(const char * why) = 0;
};

// of the whole process; null: none
LLAMA_API void llama_kvq_observe(llama_kvq_observer * observer);

// as kvq_profile_identity and kvq_profile_write, for programs
LLAMA_API kvq_profile_info llama_kvq_identity(const llama_model * model);
LLAMA_API void llama_kvq_profile_write(const std::string & path, const kvq_profile_info & info, const kvq_profile * profile,
        const std::map<uint32_t, kvq_profile_of_layer> & layers);
