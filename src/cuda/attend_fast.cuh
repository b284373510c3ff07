#pragma once
// Attention on tensor cores, for the formats that matter: pages of 128 cells (64 in small caches), keys of codec `group` (one symmetric step a
// token; 2, 3 or 4 bits) or `channel` (FP8 steps, any widths), values of codec `group`.
//
// How a page is read. A warp owns a page and has it copied into its own part of shared memory, with the 16-byte pieces of
// each 128-byte row exchanged (piece ^ row % 8), so that the reads below do not meet in a bank. Operand A of an MMA is the
// codes as they lie: lane 4 g + t reads 16 bytes, one word of the depth (number t of four) of four lanes of the tile, and a mask
// makes bytes of it (fast_words.cuh).
//
// Queries and softmax weights are 15-bit numbers, 256 * high + low: operand B has a column for the high and one for the low bytes
// of each of four query rows. The columns are in such an order that a lane gets the high or the low sums of one row, its
// `own`, and the other half of those from the lane beside it; so a lane has four tokens of one row, and needs no select.
//
// Softmax weights are relative to the page's own maximum, so that 15 bits hold them, and a page's output is added to the
// warp's in float with the weight that the page has. Sums over tokens stay in each lane until the end.
//
// Exact rows are pieces of 16, which the last warps of a block take before they take pages: scores by MMA as well, of
// halves, weighted sums by plain arithmetic, which fits one lane per four channels. A member of the outlier pool is one of
// the exact rows, and its bit of the page counts as not set.
//
// Pages are taken in turn, by a counter that a block has. At the end a block adds up its warps, and the last block of a head
// its blocks.
#include "attend.cuh"
#include "fast_words.cuh"

namespace kvq {

constexpr uint32_t PIECE = 16;
constexpr int CHANNEL = 1;  // of KEYS
constexpr float DEAD = -1e30f, LOG2E = 1.4426950408889634f;
// What the largest coefficient is: 15 bits, so that rounding keeps it in two bytes.
constexpr float UNIT = 32500.f;
// The reference of a warp's sums moves when a page's maximum is larger than it by this, in octaves.
constexpr float SLACK = 16.f;

__device__ __forceinline__ uint32_t swizzle(uint32_t at) { return at ^ (at >> 7 & 7) << 4; }

// What is read of a page besides the page, long before it is looked at.
struct Look {
    uint32_t word;  // of lanes 0 to 3: the bits of 32 cells each; of lanes 4 and 5: the headers of keys and values
    uint2 mask;     // FP16, of the first token and four cells
    __device__ uint32_t get(uint32_t from) const { return __shfl_sync(FULL, word, from); }
};

// A query row's cells, put together: four channels a lane, relative to `reference`, in octaves.
struct Joined {
    float x[4], reference, sum;
};

// score = step * (scale * c + offset) + base
struct Sum {
    float scale, offset;
};

// ROWS query rows, values of DIM_V channels. What is known when the kernel is compiled makes it short, and short code is
// fast: it is fetched once for a page. VALUES: width of the values; KEYS: width of the keys of codec `group`, or CHANNEL, and
// keys of as many channels as values. 0: any. Pages have PAGE cells.
template <int ROWS, int DIM_V, int KEYS, int VALUES, int PAGE> struct Fast {
    static constexpr uint32_t BLOCKS = PAGE / 32;
    static constexpr int TILES = ROWS / 4;       // of columns of B
    static constexpr uint32_t COLUMNS = 2 * ROWS;
    // A source is what somebody leaves of all rows: outputs [ROWS][DIM_V], then reference and sum [ROWS][2], as Partial has them.
    static constexpr uint32_t SOURCE_BYTES = 4 * ROWS * (DIM_V + 2);

    const AttendStep &p;
    const LayerDesc &layer;
    const SideDesc &k, &v;
    const Tile tile;
    const uint32_t warp, lane, n_warps, g, t;
    const uint32_t quad;  // the four lanes of a tile's 32 that this lane reads
    const uint32_t own;   // this lane's query row of each tile of columns, counted from the tile's first
    const bool has_high;  // whether its sums are those of the high bytes
    // Shared memory.
    float *query;      // as it came, relative to unit[row]; see query_at
    uint16_t *halves;  // [ROWS][dim + 8]: the same
    float *unit;       // [ROWS]: the largest of a query, times the scale
    float *slopes, *spoiled, *scales, *offsets;
    uint32_t *flag, *ticket;
    int *pooled;       // [pool_rows]: cells of the pool's members, or -1
    uint8_t *exact_sources;  // of warps that take exact rows, [exact_warps]
    const uint8_t *k_region, *v_region;
    uint32_t first_token, last_token;
    bool mask_ahead;
    uint8_t *own_memory, *k_page, *v_page, *weights;
    // B of keys: the block's, the warp's own where pages need that, and which of them is read.
    uint8_t *block_coefficients, *own_coefficients, *coefficients;
    // Registers, of this lane's rows: own + 4 n.
    float acc[TILES][DIM_V / 32][2][4] = {};  // [..][rows of A 4 q + j, 4 q + j + 2 of a quad][own, neighbour's]
    float reference[TILES], sum[TILES] = {}, steps[TILES] = {};
    float scale[TILES], offset[TILES];  // see Sum
    uint32_t block_exponents, seen_exponents = 0;  // of this lane's quad: those of the block's coefficients, and of the warp's own
    bool is_prepared = false;                      // the latter
    float to_log2;
    // Where this lane's rows have their mask, what it is multiplied with; rows that are none see nothing.
    size_t mask_row[TILES];
    float slope[TILES];

    // The ROWS values of a channel: [channel % 4][channel / 4][ROWS], so that lanes with a quad each do not meet in a bank.
    __device__ float *query_at(uint32_t channel) const { return query + ((channel % 4) * (k.head_dim / 4) + channel / 4) * ROWS; }
    __device__ bool is_grouped() const { return KEYS == 0 ? k.codec == CODEC_GROUP : KEYS != CHANNEL; }
    __device__ uint32_t key_segments() const { return (KEYS ? DIM_V : k.head_dim) / 16; }
    __device__ uint32_t key_width() const { return KEYS ? uint32_t(KEYS) : k.width; }
    __device__ uint32_t value_width() const { return VALUES ? uint32_t(VALUES) : v.width; }
    // Bytes from row to row of a piece in shared memory, so that rows do not meet in a bank.
    __device__ uint32_t key_stride() const { return 2 * k.head_dim + 16; }
    static constexpr uint32_t VALUE_STRIDE = 2 * DIM_V + 16;
    __device__ uint32_t row(int n) const { return own + 4 * n; }
    // The row of four whose sums lane t of four gets; also the lane that has row t.
    __device__ static uint32_t own_of(uint32_t t) { return t % 2 * 2 + t / 2; }
    // The columns of B with the high and the low bytes of row `r` of a tile.
    __device__ static uint32_t high_column(uint32_t r) { return r; }
    __device__ static uint32_t low_column(uint32_t r) { return 4 + (r ^ 1); }
    // What sums of this lane's half count.
    __device__ int half() const { return has_high ? 256 : 1; }
    // What lane `own_of(r % 4)` has of row r, in every lane.
    __device__ float of_row(const float (&x)[TILES], int r) const { return __shfl_sync(FULL, x[r / 4], own_of(r % 4)); }
    // The same number of the row whose other half this lane's sums are.
    __device__ float of_neighbour(float x) const { return __shfl_xor_sync(FULL, x, 2); }

    __device__ Fast(const AttendStep &step, uint8_t *shared)
        : p(step), layer(step.layer), k(layer.k), v(layer.v), tile(Tile::of_block(step, ROWS)), warp(__shfl_sync(FULL, threadIdx.x / 32, 0)),
          lane(threadIdx.x % 32), n_warps(step.block.n_warps), g(lane / 4), t(lane % 4), quad((g >> 1) | (g & 1) << 2), own(own_of(t)), has_high(t < 2) {
        query = reinterpret_cast<float *>(shared);
        halves = reinterpret_cast<uint16_t *>(query + max(k.head_dim, uint32_t(DIM_V)) * ROWS);
        unit = reinterpret_cast<float *>(halves + ROWS * (k.head_dim + 8));
        slopes = unit + ROWS;
        spoiled = slopes + ROWS;
        scales = spoiled + ROWS;
        offsets = scales + ROWS;
        flag = reinterpret_cast<uint32_t *>(offsets + ROWS);
        ticket = flag + 1;
        pooled = reinterpret_cast<int *>(flag + 2);
        exact_sources = shared + p.block.shared_exact;
        own_memory = shared + p.block.shared_warps + warp * p.block.shared_warp;
        k_page = own_memory;
        v_page = k_page + (k.page_bytes + 127) / 128 * 128;
        // Behind a page or a piece of exact rows.
        const uint32_t pages = uint32_t(v_page - k_page) + (v.page_bytes + 127) / 128 * 128, piece = PIECE * (key_stride() + VALUE_STRIDE);
        uint8_t *const scratch = own_memory + max(pages, (piece + 127) / 128 * 128);
        // Those of the block lie before the first warp's memory, where it has any.
        block_coefficients = shared + p.block.shared_warps - COLUMNS * p.block.coefficient_bytes;
        own_coefficients = scratch;
        coefficients = is_grouped() ? block_coefficients : own_coefficients;
        weights = is_grouped() && k.exponents == ABSENT ? scratch : scratch + COLUMNS * p.block.coefficient_bytes;
        k_region = p.k_mem + tile.head * k.head_bytes;
        v_region = p.v_mem + tile.head * v.head_bytes;
        first_token = tile.token(p, 0);
        last_token = tile.token(p, tile.n_rows - 1);
        mask_ahead = p.mask != nullptr && p.mask_is_f16 && reinterpret_cast<uintptr_t>(mask_at(first_token, 0)) % 8 == 0;
        to_log2 = p.softcap > 0.f ? 1.f : LOG2E;
        for (int n = 0; n < TILES; n++) reference[n] = DEAD;
    }

    // fast_query.cuh: the query, and B for keys.
    __device__ void read_query(uint32_t r, float (&x)[4]);
    __device__ void load_query(float (&x)[4]);
    __device__ void put(const Fields::Field &field, uint32_t row, const float (&x)[4], const float (&factor)[4]);
    __device__ void clear_rest(const Words &w);
    __device__ Sum code_row(const Words &w, uint32_t row, float (&x)[4], float unit, uint32_t exponents);
    __device__ uint32_t exponents_of_block();
    __device__ void prepare_group(const Words &w);
    __device__ void prepare_channel(const Words &w, const Segments &segments, const uint8_t *header, float (&base)[TILES]);
    __device__ void mean_base(float (&base)[TILES]);

    // fast_look.cuh: which cells of a page are seen, and by whom.
    __device__ uint32_t look_at_bits(uint32_t page);
    __device__ const uint8_t *mask_at(uint32_t token, uint32_t page);
    __device__ bool has_mask_ahead(uint32_t page);
    __device__ void look(uint32_t page, Look &ahead);
    __device__ void load_pool();
    __device__ void hide_pooled(uint32_t page, Look &look);
    __device__ bool is_unmasked(uint32_t page, const Look &look);
    __device__ void prepare_mask();
    __device__ float masked(float score, int cell, int n);
    __device__ float capped(float score);

    // fast_page.cuh: pages.
    __device__ void prefetch_page(uint32_t page);
    __device__ void fetch(SharedAt to, const uint8_t *region, const SideDesc &side, uint32_t page);
    __device__ uint32_t take();
    __device__ uint32_t next_page(uint32_t page, uint32_t end);
    __device__ void move_reference(const float (&most)[TILES]);
    __device__ void max_of_rows(float (&most)[TILES]);
    __device__ static void move_down(float (&score)[TILES][BLOCKS][4]);
    __device__ void score_page(const Words &words, uint32_t header, const float (&base)[TILES], float (&score)[TILES][BLOCKS][4]);
    __device__ void add_values(float (&score)[TILES][BLOCKS][4], const float (&most)[TILES], uint32_t v_base);
    __device__ uint32_t attend_page(uint32_t page, Look &at, uint32_t end);

    // fast_exact.cuh: exact rows.
    __device__ void prefetch_exact(uint32_t piece);
    __device__ void stage(const ExactRows &rows, uint32_t first, uint32_t n);
    __device__ void attend_exact(const ExactRows &rows, uint32_t first, uint32_t n, float (&out)[ROWS][4]);
    __device__ void attend_all_exact(uint32_t exact_warp, uint32_t first, uint32_t stride);

    // fast_join.cuh: what warps and blocks have, put together.
    __device__ void leave();
    __device__ void leave_nothing();
    __device__ void leave_state(float *source);
    __device__ void add_sources(Joined &all, const uint8_t *sources, uint32_t stride, uint32_t n, uint32_t r);
    __device__ void end_row(const Joined &all, uint32_t r);
    __device__ void finish();

    __device__ void run() {
        const uint32_t exact_warps = p.block.exact_warps, page_warps = n_warps - exact_warps, first = tile.split + p.n_splits * warp;
        // The first page is fetched before it is known that anybody sees it.
        const bool is_exact = warp >= page_warps, has_first = !is_exact && first < layer.n_pages && first * PAGE < p.n_kv;
        const uint32_t exact_warp = n_warps - 1 - warp, first_piece = tile.split + p.n_splits * exact_warp;
        if (is_exact) prefetch_exact(first_piece);
        if (has_first) prefetch_page(first);
        prefetch(p.plan + p.plan_at.n_pages[p.view]);
        if (32 * threadIdx.x < layer.pool_rows) prefetch(k_region + k.pool_table + 128 * threadIdx.x);
        wait_for_stream();
        let_next_start();
        // What is waited for first is asked for first.
        float x[4];
        read_query(warp, x);
        block_exponents = exponents_of_block();
        Look at{};
        if (has_first) look(first, at);
        const uint32_t planned = planned_pages(p);
        if (has_first) fetch(shared_at(k_page), k_region, k, first);
        copy_commit();
        if (has_first) fetch(shared_at(v_page), v_region, v, first);
        copy_commit();
        if (threadIdx.x == 0) *ticket = page_warps;
        load_query(x);
        load_pool();
        __syncthreads();
        prepare_mask();
        if (is_exact) attend_all_exact(exact_warp, first_piece, p.n_splits * exact_warps);
        const uint32_t end = pages_of(p, planned);
        uint32_t page = first;
        if (unlikely(is_exact || !(first < end && __any_sync(FULL, lane < BLOCKS && at.word != 0)))) {
            page = next_page(take(), end);
            if (page != ~0u) {
                look(page, at);
                copy_wait<0>();
                fetch(shared_at(k_page), k_region, k, page);
                copy_commit();
                fetch(shared_at(v_page), v_region, v, page);
                copy_commit();
            }
        }
        const bool has_page = page != ~0u;
        while (page != ~0u) page = __shfl_sync(FULL, attend_page(page, at, end), 0);
        copy_wait<0>();
        if (has_page) leave();
        else leave_nothing();
        __syncthreads();
        finish();
    }
};

}  // namespace kvq

// A member that stands in one of the files below.
#define KVQ_FAST_MEMBER(type) \
    template <int ROWS, int DIM_V, int KEYS, int VALUES, int PAGE> __device__ __forceinline__ type Fast<ROWS, DIM_V, KEYS, VALUES, PAGE>

#include "fast_query.cuh"
#include "fast_look.cuh"
#include "fast_page.cuh"
#include "fast_exact.cuh"
#include "fast_join.cuh"

// The kernels are in attend_fast.cu, which reads any of these formats, and attend_known.cu. Eight rows take the registers of
// twelve warps for eight.
#define KVQ_FAST(name, rows, dim, keys, values, page)                  \
    KVQ_KERNEL(name, (rows == 4 ? 384 : 256), 1, kvq::AttendParams) {  \
        KVQ_SHARED(shared);                                            \
        const kvq::AttendStep step(p);                                 \
        kvq::Fast<rows, dim, keys, values, page>(step, shared).run();  \
    }
