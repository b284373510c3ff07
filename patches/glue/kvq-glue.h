#pragma once

#include "kvq-gpu.h"
#include "kvq-profile.h"

#include "llama-kvq.h"
#include "llama-cparams.h"
#include "llama-kv-cache.h"

#include <kvq.hpp>

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

// how far a layer is with the latest plan; what a GPU was given to do counts as done
enum kvq_layer_plan : uint8_t {
    KVQ_LAYER_IDLE, // no graph stores into it
    KVQ_LAYER_DUE,
    KVQ_LAYER_DONE,
};

// what a custom node needs besides its sources and their shapes; constant while the cache lives
struct llama_kvq_node {
    const kvq_layout * layout;

    kvq_layer_plan * progress; // of the layer that stores

    const kvq::rotation * rotation; // made before the first graph runs

    uint32_t n_positions; // behind each stream's plan, by cell; 0 where nobody asks

    uint32_t il; // of the layer that stores

    // of a layer in GPU memory
    const kvq_device * device;
    ggml_tensor * profile; // or null
    ggml_tensor * attend_space;
    ggml_tensor * store_space;

    bool has_rows;  // k_cur and v_cur are sources
    bool has_sinks;
    bool has_lse;   // the store step gets the output of the attend node

    float scale;
    float softcap;
    float max_bias;
};

struct kvq_state_writer;
struct kvq_state_reader;
struct kvq_state_seq;
struct kvq_state_stream;
struct kvq_state_choice;
struct kvq_state_cell;
enum kvq_cell_use : uint8_t;
enum kvq_state_part : uint8_t;

bool operator==(const llama_kvq_node & a, const llama_kvq_node & b);

// whether an observer (kvq-observe.h) has seen the layer, which is not to be stored then
bool kvq_observe_store(const ggml_tensor * dst, const float * lse, const llama_kvq_node & node, int ith, int nth);

// the kvq side of one llama_kv_cache; each part of it is a file: see ../README.md
struct llama_kvq_cache : llama_kvq {
    // is_trial: its layers have no memory, and it is there to be looked at
    llama_kvq_cache(llama_kv_cache & kv, const char * spec, bool is_trial);
    ~llama_kvq_cache() override;

    ggml_tensor * new_k(ggml_context * ctx, ggml_backend_buffer_type_t buft, uint32_t il) override;
    ggml_tensor * new_v(ggml_context * ctx, uint32_t il) override;
    void allocated(ggml_backend_buffer_t buf) const override;

    ggml_tensor * build_plan(ggml_context * ctx, const llama_ubatch & ubatch) const override;
    void set_plan(ggml_tensor * dst, const llama_ubatch & ubatch,
            const std::vector<llama_seq_id> & strm, const std::vector<std::vector<uint32_t>> & idxs) override;

    ggml_tensor * build_attn(const llm_graph_context & graph,
            ggml_tensor * q, ggml_tensor * k_cur, ggml_tensor * v_cur, ggml_tensor * k_mem, ggml_tensor * v_mem,
            ggml_tensor * plan, ggml_tensor * kq_mask, ggml_tensor * kq_b, ggml_tensor * sinks,
            float kq_scale, int il) override;

    void clear() override;
    void copy_stream(uint32_t src, uint32_t dst) override;
    bool shift(llama_context * lctx) override;

    void state_write(llama_io_write_i & io, llama_seq_id seq_id) override;
    void state_read (llama_io_read_i  & io, llama_seq_id seq_id) override;

    // every key of the recipe
    std::string spec() const;

    std::string asked; // the same before the recipe was fitted to the size of this cache

    // what this cache takes; bits are sums over the layers, weighted by their channels
    struct size_info {
        size_t bytes = 0, bytes_f16 = 0; // of all streams
        double bits_k = 0.0, bits_v = 0.0;
        size_t n_embd_k = 0, n_embd_v = 0;
    };
    size_info size() const;
    uint32_t n_cells() const;
    bool only_estimated() const; // by the fitting step, whose contexts hold no memory

    void add_layers(std::vector<kvq_cached_layer> & all) const;

    // what of the cache is where, in bytes of all streams
    struct device_parts {
        size_t n_layers = 0;
        size_t pages = 0, exact = 0, pool = 0;
    };
    void add_parts(std::map<std::string, device_parts> & all) const; // and says which way each layer goes

private:

    kvq_shape layer_shape(uint32_t il) const;

    // where memory of this type is: null on the CPU; throws where kvq cannot run
    kvq_gpu * gpu_of(ggml_backend_buffer_type_t buft, uint32_t il);

    // bytes that a graph with so many rows needs there; throws if the GPU cannot run such a layer
    struct space {
        size_t attend;
        size_t store;
    };
    space needed_space(const kvq_gpu & gpu, const kvq_layout * layout, uint32_t n_tokens, uint32_t n_stream,
            uint32_t n_kv) const;

    void reserve_space(kvq_gpu & gpu, const kvq_layout * layout, uint32_t n_tokens, uint32_t n_stream, uint32_t n_kv);
    void grow_space(const kvq_gpu & gpu, ggml_tensor *& space, size_t size);
    ggml_tensor * new_space(const kvq_gpu & gpu, size_t size);
    void upload_profiles(); // unless they are there

    // waits for the GPUs: before the host looks at their memory
    void synchronize() const;

    // a pointer that graphs may hold: equal nodes share one entry
    void * keep(const llama_kvq_node & node);

    // reads the profile that the recipe names, if it does
    void read_profile(const char * spec);
    // throws if the profile is of keys that turn in another way
    void check_profile();

    // where the tokens of a stream are, by cell: [n_positions], which are none unless the layouts want to know
    size_t n_positions() const;
    void cell_positions(uint32_t strm, int32_t * to) const;

    void plan_stream(uint32_t strm, const std::vector<kvq_row> & rows, int32_t * plan, size_t len);

    // makes the memory of a stream without tokens as new: nothing that was learned from earlier ones remains
    void forget_if_empty(uint32_t strm);

    // after an aborted graph: the layers it did not reach carry out its plan, so that all layers hold the same pages;
    // false: there was nothing to do
    bool settle() const;

    // how far packed keys are off in each layer: warns once, when a recipe does not fit the model
    void guard(size_t n_new);
    float logit_scale(size_t i) const;

    void make_rotations(const llama_cparams & cparams); // unless they are there
    void shift_layers(llama_context * lctx, uint32_t strm, const kvq_shift & shift);

    // sequence copies that llama.cpp has put off to the next decode
    void copy_streams();

    void state_write_all(kvq_state_writer & out) const;
    void state_write_seq(kvq_state_writer & out, llama_seq_id seq_id) const;
    void state_read_all(kvq_state_reader & in);
    void state_read_seq(kvq_state_reader & in, llama_seq_id seq_id);

    // steps of the whole cache
    void read_header(kvq_state_reader & in, bool is_seq) const;
    void each_part(uint32_t n_pages,
            const std::function<void(size_t, kvq_side, kvq_state_part, const std::vector<kvq_range> &)> & use) const;
    kvq_state_cell read_cell(kvq_state_reader & in, uint32_t strm, int64_t last) const;
    void read_planner(kvq_state_reader & in, uint32_t strm, kvq_planner * to, const std::vector<kvq_state_cell> & cells) const;
    void check_pools(const kvq_state_stream & stream) const; // no cell twice: attention relies on it
    kvq_state_stream read_stream(kvq_state_reader & in, uint32_t strm, kvq_planner * to) const;
    void put_stream(uint32_t strm, const kvq_state_stream & stream);

    // steps of one sequence
    kvq_state_choice choose_cells(uint32_t strm, llama_seq_id seq_id) const;
    void write_seq_cells(kvq_state_writer & out, uint32_t strm, const kvq_state_choice & choice) const;
    void write_rows(kvq_state_writer & out, size_t il, uint32_t strm, const kvq_state_choice & choice) const;
    void read_seq_cells(kvq_state_reader & in, llama_seq_id seq_id, kvq_state_seq & saved) const;
    void read_seq_memory(kvq_state_reader & in, kvq_state_seq & saved) const;
    std::vector<kvq_cell_use> cell_uses(uint32_t strm, llama_seq_id seq_id) const;
    void saved_rows(size_t il, const kvq_state_seq & saved, const std::vector<size_t> & which,
            std::vector<float> & k, std::vector<float> & v) const;

    kvq::layout pages_layout(size_t il, uint32_t n_pages) const;
    void write_pages(kvq_state_writer & out, size_t il, uint32_t strm, const std::vector<uint32_t> & pages,
            const std::vector<kvq_location> & location) const;
    void adopt_pages(kvq_planner * planner, uint32_t strm, const kvq_state_seq & saved) const;
    void restore(uint32_t strm, const kvq_state_seq & saved);
    void restore_pages(uint32_t strm, const kvq_state_seq & saved);
    void restore_rows(uint32_t strm, const kvq_state_seq & saved);

    llama_kv_cache & kv;
    const bool is_trial;

    kvq::recipe              recipe;
    kvq::planner             planner;
    std::vector<kvq::layout> layouts; // as kv.layers

    std::vector<std::unique_ptr<kvq_gpu>> all_gpus;
    std::vector<kvq_gpu *>                gpus; // as layouts: where they are, null on the CPU

    std::vector<kvq::rotation> rotations; // as layouts: how their keys turn with positions

    std::map<uint32_t, kvq_profile_of_layer> profiled; // by layer, if the recipe has a profile

    std::vector<ggml_tensor *> profiles;             // as layouts: what kernels read of it, null where there is nothing
    bool                       has_profiles = false; // they hold it

    // Whether packed keys have moved since the cache was last empty. Until then nodes of layers in GPU memory get no rotation,
    // as kernels that heed one are slow.
    bool                   has_moved = false;
    const kvq::rotation    unmoved;
    void expect_moved();

    std::unique_ptr<llama_cparams> cparams; // of the context, since its first graph was built

    std::deque<llama_kvq_node> nodes;

    mutable std::vector<kvq_layer_plan> progress; // as layouts

    // what packed keys add to a layer's logits, and those themselves: deviations
    struct key_noise {
        uint32_t il;
        float    noise;
        float    logits;
    };

    std::vector<key_noise> noises;         // of layers that have packed some
    size_t                 n_unguarded = 0; // rows since the last look
    size_t                 n_guard     = 0; // rows between looks

    // the latest plan, until every layer has carried it out
    mutable std::vector<int32_t> last_plan; // [plan_len with positions, last_streams]
    std::vector<llama_seq_id>    last_streams;
    size_t                       last_n_tokens = 0;
};

struct kvq_named_cache {
    const char * name; // what distinguishes it from the other cache of the memory
    const llama_kvq_cache * cache;
};

// those that hold layers
std::vector<kvq_named_cache> kvq_caches(const llama_memory_i * memory);

// says what the caches of this memory take: one line for all
void llama_kvq_log(const llama_memory_i * memory, const char * spec, const std::string & before, const std::string & after);

// a recipe, and what is to be said of how it was chosen
struct kvq_choice {
    std::string spec;
    std::string note;
};

// what a cache that is made now is to have
kvq_choice kvq_choice_of(const char * spec);

// whether such a cache is there to choose by
bool kvq_is_trial(const char * spec);

// chooses, and makes the memory with it; throws if nothing fits
kvq_choice kvq_make_again(std::unique_ptr<llama_memory_i> & memory, const char * spec, const std::function<llama_memory_i *()> & make);

// whether a cell holds a token; user: the llama_kv_cells_vec of the cache
bool kvq_cell_is_live(void * user, uint32_t stream, uint32_t cell);

// a status that must not be: the arguments were checked when the graph was built
void llama_kvq_must(kvq_status status, const char * what);
