// --kvq auto: a recipe that is chosen by the memory that a context may take. What caches a context has, of which layers and
// cells, only llama.cpp knows: so they are made once with next to no memory, looked at, and made again.

#include "kvq-glue.h"

#include "llama-impl.h"
#include "llama-memory.h"

// what the caches being made in this thread are to have; null: what the user says
static thread_local const kvq_choice * kvq_chosen;

static kvq_choice kvq_choose(const char * spec, const std::vector<kvq_cached_layer> & layers) {
    std::vector<char> text(strlen(spec) + 64);
    std::vector<char> note(128);
    if (kvq_recipe_choose(spec, layers.data(), layers.size(), text.data(), text.size(), note.data(), note.size()) != 0) {
        throw std::runtime_error(format("kvq: --kvq %s: %s", spec, kvq_last_error()));
    }
    return { text.data(), note.data() };
}

kvq_choice kvq_choice_of(const char * spec) {
    return kvq_chosen ? *kvq_chosen : kvq_choose(spec, {});
}

bool kvq_is_trial(const char * spec) {
    return !kvq_chosen && kvq_choose(spec, {}).spec != spec;
}

void llama_kvq_cache::add_layers(std::vector<kvq_cached_layer> & all) const {
    for (const auto & layer : kv.layers) {
        all.push_back({
            /*.shape     =*/ layer_shape(layer.il),
            /*.layer     =*/ layer.il,
            /*.n_cells   =*/ kv.get_size(),
            /*.n_streams =*/ kv.n_stream,
            /*.n_seq_max =*/ kv.n_seq_max,
        });
    }
}

kvq_choice kvq_make_again(std::unique_ptr<llama_memory_i> & memory, const char * spec, const std::function<llama_memory_i *()> & make) {
    std::vector<kvq_cached_layer> layers;
    for (const auto & it : kvq_caches(memory.get())) {
        it.cache->add_layers(layers);
    }
    const kvq_choice choice = kvq_choose(spec, layers);

    struct chosen_here {
        explicit chosen_here(const kvq_choice & choice) { kvq_chosen = &choice; }
        ~chosen_here() { kvq_chosen = nullptr; }
    } here(choice);

    memory.reset();
    memory.reset(make());

    return choice;
}
