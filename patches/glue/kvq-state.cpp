// Saved state: header, checks and the whole cache.

#include "kvq-state.h"

#include "llama-impl.h"

#include <algorithm>

static const uint32_t KVQ_STATE_MAGIC   = 0x5351564b; // "KVQS"
static const uint32_t KVQ_STATE_VERSION = 4;

static std::string layout_format(const kvq_layout * layout) {
    std::vector<char> buf(4096);
    kvq_state_call(kvq_layout_format(layout, buf.data(), buf.size()), "layout format");
    return buf.data();
}

void llama_kvq_cache::copy_streams() {
    for (size_t i = 0; i < kv.sc_info.ssrc.size(); ++i) {
        for (const auto & layer : kv.layers) {
            ggml_backend_tensor_copy(layer.k_stream[kv.sc_info.ssrc[i]], layer.k_stream[kv.sc_info.sdst[i]]);
            ggml_backend_tensor_copy(layer.v_stream[kv.sc_info.ssrc[i]], layer.v_stream[kv.sc_info.sdst[i]]);
        }
        copy_stream(kv.sc_info.ssrc[i], kv.sc_info.sdst[i]);
    }
    kv.sc_info = {};
}

// Where a profile lies does not matter: what is in it does, and is part of the layouts' formats.
static std::string without_path(std::string spec) {
    const size_t begin = spec.find(",profile=");
    if (begin != std::string::npos) {
        spec.erase(begin, spec.find(',', begin + 1) - begin);
    }
    return spec;
}

void llama_kvq_cache::state_write(llama_io_write_i & io, llama_seq_id seq_id) {
    synchronize();
    settle();
    copy_streams();

    kvq_state_writer out { io };

    out.value<uint32_t>(KVQ_STATE_MAGIC);
    out.value<uint32_t>(KVQ_STATE_VERSION);
    out.value<uint32_t>(seq_id != -1);
    out.value<uint32_t>(kv.n_stream);
    out.value<uint32_t>(kv.get_size());
    out.value<uint32_t>(kvq_planner_n_slots(planner.get()));
    out.value<uint32_t>(kvq_recipe_page(recipe.get()));
    out.value<uint32_t>(kv.has_cell_ext());
    out.string(without_path(spec()));
    out.value<uint32_t>(layouts.size());
    for (const auto & layout : layouts) {
        out.string(layout_format(layout.get()));
    }

    if (seq_id == -1) {
        state_write_all(out);
    } else {
        state_write_seq(out, seq_id);
    }

    out.finish();
}

static void read_kind(kvq_state_reader & in, bool is_seq) {
    if (in.value<uint32_t>() != KVQ_STATE_MAGIC) {
        throw std::runtime_error("kvq: this state was not saved with kvq: restore it with --kvq off");
    }
    const auto version = in.value<uint32_t>();
    if (version != KVQ_STATE_VERSION) {
        throw std::runtime_error(format("kvq: the saved state has version %u, this program reads %u",
                    version, KVQ_STATE_VERSION));
    }
    if (in.value<uint32_t>() != is_seq) {
        throw std::runtime_error(is_seq
                ? "kvq: this is the state of a whole context, not of a sequence"
                : "kvq: this is the state of a sequence, not of a whole context");
    }
}

// refuses what does not fit this context
void llama_kvq_cache::read_header(kvq_state_reader & in, bool is_seq) const {
    const auto n_stream = in.value<uint32_t>();
    const auto n_cells  = in.value<uint32_t>();
    const auto n_slots  = in.value<uint32_t>();
    const auto page     = in.value<uint32_t>();
    const auto has_ext  = in.value<uint32_t>();
    const auto recipe_0 = in.string();

    if (recipe_0 != without_path(spec())) {
        throw std::runtime_error(format("kvq: the state was saved with --kvq %s, this context has %s",
                    recipe_0.c_str(), without_path(spec()).c_str()));
    }
    // a sequence goes into any free cells, a whole context only into its like
    const bool same_size =
        n_stream == kv.n_stream && n_cells == kv.get_size() && n_slots == kvq_planner_n_slots(planner.get());

    if (!is_seq && !same_size) {
        throw std::runtime_error(format("kvq: the state was saved with %u streams of %u cells and %u exact rows, "
                    "this context has %u, %u and %u",
                    n_stream, n_cells, n_slots, kv.n_stream, kv.get_size(), kvq_planner_n_slots(planner.get())));
    }
    if (page != kvq_recipe_page(recipe.get()) || has_ext != (uint32_t) kv.has_cell_ext()) {
        throw std::runtime_error("kvq: the state was saved by another kind of cache");
    }
    if (in.value<uint32_t>() != layouts.size()) {
        throw std::runtime_error("kvq: the state was saved with another number of layers");
    }
    for (size_t i = 0; i < layouts.size(); ++i) {
        const auto fmt = in.string();
        const auto fmt_cur = layout_format(layouts[i].get());
        if (fmt != fmt_cur) {
            throw std::runtime_error(format("kvq: layer %u was saved as %s, this context has %s",
                        kv.layers[i].il, fmt.c_str(), fmt_cur.c_str()));
        }
    }
}

void llama_kvq_cache::state_read(llama_io_read_i & io, llama_seq_id seq_id) {
    synchronize();
    settle();
    make_rotations(*cparams);
    copy_streams();

    kvq_state_reader in { io };

    const bool is_seq = seq_id != -1;
    read_kind(in, is_seq);
    read_header(in, is_seq);

    if (is_seq) {
        state_read_seq(in, seq_id);
    } else {
        state_read_all(in);
    }
    if (!all_gpus.empty()) {
        expect_moved();
    }
}

void llama_kvq_cache::state_write_all(kvq_state_writer & out) const {
    for (uint32_t s = 0; s < kv.n_stream; ++s) {
        const auto & cells = kv.v_cells[s];

        out.value<uint32_t>(cells.get_used());
        out.value<uint32_t>(kv.v_heads[s]);

        std::vector<kvq_location> location(cells.size());
        kvq_state_call(kvq_planner_locate(planner.get(), s, location.data()), "planner");

        for (uint32_t i = 0; i < cells.size(); ++i) {
            if (cells.is_empty(i)) {
                location[i] = {};
                continue;
            }
            out.value<uint32_t>(i);
            kvq_state_write_cell(out, cells, i, kv.has_cell_ext());
            out.value<uint32_t>(cells.seq_count(i));
            for (llama_seq_id id = 0; id < (llama_seq_id) LLAMA_MAX_SEQ; ++id) {
                if (cells.seq_has(i, id)) {
                    out.value<llama_seq_id>(id);
                }
            }
        }

        size_t size = 0;
        kvq_state_call(kvq_planner_export_size(planner.get(), s, &size), "planner state");
        std::vector<uint8_t> buf(size);
        kvq_state_call(kvq_planner_export(planner.get(), s, buf.data(), size), "planner state");
        out.buffer(buf.data(), size);

        const uint32_t page    = kvq_recipe_page(recipe.get());
        const uint32_t n_pages = (cells.used_max_p1() + page - 1)/page;

        for (size_t i = 0; i < layouts.size(); ++i) {
            const auto * layout = layouts[i].get();

            kvq_state_memory live(layout);
            ggml_backend_tensor_get(kv.layers[i].k_stream[s], live.side[KVQ_SIDE_K], 0, kvq_layout_k_bytes(layout));
            ggml_backend_tensor_get(kv.layers[i].v_stream[s], live.side[KVQ_SIDE_V], 0, kvq_layout_v_bytes(layout));
            kvq_state_call(kvq_erase(layout, live.side[0], live.side[1], location.data()), "removed tokens");

            for (kvq_side side : { KVQ_SIDE_K, KVQ_SIDE_V }) {
                for (auto part : { KVQ_STATE_SLOTS, KVQ_STATE_PAGES }) {
                    buf = kvq_state_get(live.side[side], kvq_state_ranges(layout, side, part, 0, n_pages));
                    out.buffer(buf.data(), buf.size());
                }
            }
        }
    }
}

// everything of a stream that is saved, in its order
void llama_kvq_cache::each_part(uint32_t n_pages,
        const std::function<void(size_t, kvq_side, kvq_state_part, const std::vector<kvq_range> &)> & use) const {
    for (size_t i = 0; i < layouts.size(); ++i) {
        for (kvq_side side : { KVQ_SIDE_K, KVQ_SIDE_V }) {
            for (auto part : { KVQ_STATE_SLOTS, KVQ_STATE_PAGES }) {
                use(i, side, part, kvq_state_ranges(layouts[i].get(), side, part, 0, n_pages));
            }
        }
    }
}

[[noreturn]] static void damaged(const char * what) {
    throw std::runtime_error(format("kvq: the saved state is damaged (%s)", what));
}

// a cell behind `last`, with its sequences
kvq_state_cell llama_kvq_cache::read_cell(kvq_state_reader & in, uint32_t strm, int64_t last) const {
    kvq_state_cell cell;

    cell.cell = in.value<uint32_t>();
    kvq_state_read_cell(in, cell, kv.has_cell_ext(), kv.get_can_shift());
    const auto n_seq = in.value<uint32_t>();
    if (cell.cell <= last || cell.cell >= kv.get_size() || n_seq == 0 || n_seq > LLAMA_MAX_SEQ) {
        damaged("cells");
    }
    for (uint32_t j = 0; j < n_seq; ++j) {
        const auto id = in.value<llama_seq_id>();
        if (id < 0 || (uint32_t) id >= kv.n_seq_max || kv.seq_to_stream[id] != strm ||
            (j > 0 && id <= cell.seq_ids.back())) {
            damaged("sequence ids");
        }
        cell.seq_ids.push_back(id);
    }
    return cell;
}

// a stream of a planner that is not in use yet; every cell must have its row
void llama_kvq_cache::read_planner(kvq_state_reader & in, uint32_t strm, kvq_planner * to,
        const std::vector<kvq_state_cell> & cells) const {
    size_t size = 0;
    kvq_state_call(kvq_planner_export_size(to, strm, &size), "planner");
    const auto snapshot = in.buffer(size);
    kvq_state_call(kvq_planner_import(to, strm, snapshot.data(), snapshot.size()), "the saved state is damaged");

    std::vector<kvq_location> location(kv.get_size());
    kvq_state_call(kvq_planner_locate(to, strm, location.data()), "planner");
    for (const auto & cell : cells) {
        if (location[cell.cell].places == KVQ_NOWHERE) {
            damaged("a cell without its row");
        }
    }
}

void llama_kvq_cache::check_pools(const kvq_state_stream & stream) const {
    std::unique_ptr<kvq_state_memory> memory; // of one layer

    auto bytes = stream.bytes.begin();
    each_part(stream.n_pages, [&](size_t i, kvq_side side, kvq_state_part part, const std::vector<kvq_range> & ranges) {
        const auto * layout = layouts[i].get();
        const auto   src    = bytes++;
        if (part != KVQ_STATE_SLOTS || kvq_state_ranges(layout, side, KVQ_STATE_POOL, 0, 0).empty()) {
            return;
        }
        if (side == KVQ_SIDE_K) {
            memory = std::make_unique<kvq_state_memory>(layout);
        }
        kvq_state_set(memory->side[side], ranges, src->data());
        if (side == KVQ_SIDE_V) {
            kvq_state_call(kvq_pool_check(layout, memory->side[0], memory->side[1]), "the saved state is damaged");
        }
    });
}

kvq_state_stream llama_kvq_cache::read_stream(kvq_state_reader & in, uint32_t strm, kvq_planner * to) const {
    kvq_state_stream res;

    const auto n_used = in.value<uint32_t>();
    res.head          = in.value<uint32_t>();
    if (n_used > kv.get_size() || res.head > kv.get_size()) {
        damaged("cells");
    }

    int64_t last = -1;
    for (uint32_t i = 0; i < n_used; ++i) {
        res.cells.push_back(read_cell(in, strm, last));
        last = res.cells.back().cell;
    }
    read_planner(in, strm, to, res.cells);

    const uint32_t page = kvq_recipe_page(recipe.get());
    res.n_pages = (last + page)/page;

    each_part(res.n_pages, [&](size_t, kvq_side, kvq_state_part, const std::vector<kvq_range> & ranges) {
        res.bytes.push_back(in.buffer(kvq_state_size(ranges)));
    });
    check_pools(res);
    return res;
}

void llama_kvq_cache::put_stream(uint32_t strm, const kvq_state_stream & stream) {
    for (const auto & cell : stream.cells) {
        kvq_state_put_cell(kv.v_cells[strm], cell);
    }
    kv.v_heads[strm] = stream.head;

    auto bytes = stream.bytes.begin();
    each_part(stream.n_pages, [&](size_t i, kvq_side side, kvq_state_part, const std::vector<kvq_range> & ranges) {
        const auto & layer = kv.layers[i];
        ggml_tensor * t = side == KVQ_SIDE_K ? layer.k_stream[strm] : layer.v_stream[strm];
        kvq_state_set(t, ranges, (bytes++)->data());
    });
}

void llama_kvq_cache::state_read_all(kvq_state_reader & in) {
    // a planner of its own takes the snapshots, and the place of the old one when all of them fit
    kvq::planner planner_new;
    kvq_state_call(kvq_planner_new(recipe.get(), kv.get_size(), kv.n_stream, kv.n_seq_max, kvq::out(planner_new)),
            "planner");

    std::vector<kvq_state_stream> streams;
    for (uint32_t s = 0; s < kv.n_stream; ++s) {
        streams.push_back(read_stream(in, s, planner_new.get()));
    }

    in.finish();

    kv.clear(true);
    planner = std::move(planner_new);

    for (uint32_t s = 0; s < kv.n_stream; ++s) {
        put_stream(s, streams[s]);
    }
}
