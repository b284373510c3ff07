// Attention on tensor cores, for the formats that matter: pages of 128 cells, keys of codec `group` (one symmetric step a
// token; 2, 3 or 4 bits) or `channel` (FP8 steps, any widths), values of codec `group`.
//
// How a page is read. A warp owns a page and has it copied into its own part of shared memory, with the 16-byte pieces of
// each 128-byte row exchanged (piece ^ row % 8), so that the reads below do not meet in a bank. Operand A of an MMA is the
// codes as they lie: lane 4 g + t reads 16 bytes, one word of the depth (number t of four) of four lanes of the tile. Two
// bytes of the word under a mask are two FP16 numbers, subnormal ones: code * 2^place * 2^-24, exactly. So unpacking is an
// AND, and a shift for half of them. B's columns are query rows; its coefficients are divided by the place values, and by
// nothing else: 2 ^ (LIFT - 24) is put right in the sums.
//
// Tiles of both codecs are tiles of segments of widths (codec/mixed.rs): a 4-bit field is read as two 2-bit ones unless all
// are 4 bits wide, and words that lie beside words of single bits are read bit by bit.
//
// Softmax weights are relative to the page's own maximum, so that FP16 holds them, and a page's output is added to the
// warp's in float with the weight that the page has. Sums over tokens stay in each lane until the end.
//
// Exact rows are pieces of 16: scores by MMA as well, weighted sums by plain arithmetic, which fits one lane per four
// channels. At the end a block adds up its warps, and the last block of a head its blocks.
#include "attend.cuh"
#include "mma.cuh"
#include "page.cuh"

namespace kvq {

constexpr uint32_t PAGE = 128, BLOCKS = PAGE / 32, PIECE = 16;
constexpr float DEAD = -1e30f, LOG2E = 1.4426950408889634f;
// Coefficients are at most 2^LIFT.
constexpr float LIFT = 1024.f, UNLIFT = 16777216.f / LIFT;
// The reference of a warp's sums moves when a page's maximum is larger than it by this, in octaves.
constexpr float SLACK = 16.f;

// How the words of four lanes are read: bits of a field, fields.
enum Reading : uint32_t { TWO_BITS, FOUR_BITS, ONE_BIT, ONE_BIT_PAIR, ONE_BIT_SINGLE };

__device__ __forceinline__ uint32_t swizzle(uint32_t at) { return at ^ (at >> 7 & 7) << 4; }

// The words of a lane of a tile.
struct Words {
    uint32_t four, three, two, low, n;
    bool native;  // all 4 bits wide, and read so

    __device__ static Words of(const Segments &s, uint32_t n_segments) {
        const uint32_t one = n_segments - s.four - s.three - s.two, low = 2 * s.four + s.three + s.two;
        return {s.four, s.three, s.two, low, low + (s.three + one) / 2, s.four == n_segments};
    }
    __device__ uint32_t groups() const { return (n + 3) / 4; }
    __device__ Reading reading(uint32_t group) const {
        if (native) return FOUR_BITS;
        const uint32_t rest = n - 4 * group;
        if (rest == 1) return ONE_BIT_SINGLE;
        if (rest == 2) return ONE_BIT_PAIR;
        return 4 * group + 4 <= low ? TWO_BITS : ONE_BIT;
    }
    // What a bit of a word is shifted down by when it is read.
    __device__ float lift(uint32_t word, uint32_t bit) const {
        const Reading r = reading(word / 4);
        return power(127 + (r == ONE_BIT_SINGLE ? bit / 2 * 2 : r == ONE_BIT_PAIR ? bit / 4 * 4 : 0));
    }
    // Bytes of a row of coefficients before those of a word: 8 for each field.
    __device__ uint32_t at(uint32_t word) const {
        if (native) return 16 * word;
        const uint32_t pure = low / 4 * 4;  // words in groups without single bits; a rest of 2 words is read by bits as well
        return word < pure ? 32 * word : 32 * pure + 64 * (word - pure);
    }
};

template <int ROWS, int DIM_V> struct Fast {
    static constexpr bool TWICE = ROWS == 4;        // columns 4 to 7 repeat 0 to 3, and half of the lanes take other tokens
    static constexpr int TILES = TWICE ? 1 : 2;     // of tokens that a lane has scores of, in a block of 32 lanes
    static constexpr uint32_t STATE = 4;            // floats of a warp's state of a row: reference, sum, sum of steps, -

    const AttendParams &p;
    const LayerDesc &layer;
    const SideDesc &k, &v;
    const Tile tile;
    const uint32_t warp, lane, n_warps, g, t, quad;  // quad: the four lanes of a tile's 32 that this lane reads
    // Shared memory.
    float *query;      // [channel][ROWS]: as it came, times the scale
    uint16_t *halves;  // [ROWS][dim + 8]: the same, relative to unit[row]
    float *unit;       // [ROWS]
    float *slopes, *spoiled;
    float *states;     // [warp][ROWS][STATE]
    uint32_t *flag;
    const uint8_t *k_region, *v_region;
    uint32_t first_token, last_token;
    uint8_t *own, *k_page, *v_page, *coefficients, *weights;
    // Registers.
    float acc[DIM_V / 32][2][4] = {};
    float reference[2] = {DEAD, DEAD}, sum[2] = {}, steps[2] = {};
    float scale[2], offset[2];  // of this lane's columns: score = step * (scale * c + offset) + base
    uint32_t seen_exponents = 0;  // of the quad that this lane prepares
    bool is_prepared = false;
    float to_log2;

    __device__ uint32_t column(int c) const { return TWICE ? 2 * (t & 1) + c : 2 * t + c; }

    __device__ Fast(const AttendParams &params, uint8_t *shared)
        : p(params), layer(params.layer), k(layer.k), v(layer.v), tile(Tile::of_block(params, ROWS)), warp(threadIdx.x / 32),
          lane(threadIdx.x % 32), n_warps(params.n_warps), g(lane / 4), t(lane % 4), quad((g >> 1) | (g & 1) << 2) {
        query = reinterpret_cast<float *>(shared);
        halves = reinterpret_cast<uint16_t *>(query + max(k.head_dim, uint32_t(DIM_V)) * ROWS);
        unit = reinterpret_cast<float *>(halves + ROWS * (k.head_dim + 8));
        slopes = unit + ROWS;
        spoiled = slopes + ROWS;
        states = spoiled + ROWS;
        flag = reinterpret_cast<uint32_t *>(states + n_warps * ROWS * STATE);
        own = shared + p.shared_warps + warp * p.shared_warp;
        k_page = own;
        v_page = k_page + (k.page_bytes + 127) / 128 * 128;
        coefficients = v_page + (v.page_bytes + 127) / 128 * 128;
        weights = coefficients + ROWS * p.coefficient_bytes;
        k_region = p.k_mem + tile.head * k.head_bytes;
        v_region = p.v_mem + tile.head * v.head_bytes;
        first_token = tile.token(p, 0);
        last_token = tile.token(p, tile.n_rows - 1);
        to_log2 = p.softcap > 0.f ? 1.f : LOG2E;
    }

    // ---- the query ----

    __device__ void load_query() {
        const uint32_t dim = k.head_dim;
        for (uint32_t r = warp; r < ROWS; r += n_warps) {
            const bool is_row = r < tile.n_rows;
            const float *q = p.q;
            if (is_row) q += tile.token(p, r) * p.q_stride_token + tile.query_head(p, r) * p.q_stride_head;
            float x[8], most = 0.f;
            bool is_finite = true;
            for (uint32_t i = 0; i < 8; i++) {
                const uint32_t c = lane + 32 * i;
                x[i] = is_row && c < dim ? q[c] * p.scale : 0.f;
                is_finite &= fabsf(x[i]) <= MAX_QUERY;
            }
            is_finite = __all_sync(FULL, is_finite);
            for (uint32_t i = 0; i < 8; i++) {
                if (!is_finite) x[i] = 0.f;
                most = fmaxf(most, fabsf(x[i]));
            }
            most = fmaxf(warp_max(most), 1e-30f);
            const float inverse = LIFT / most;
            for (uint32_t i = 0; i < 8; i++) {
                const uint32_t c = lane + 32 * i;
                if (c >= dim) continue;
                query[c * ROWS + r] = x[i];
                halves[r * (dim + 8) + c] = float_to_half(x[i] * inverse);
            }
            if (lane == 0) {
                unit[r] = most / LIFT;
                spoiled[r] = is_finite ? 0.f : 1.f;
                slopes[r] = is_row ? alibi_slope(p, tile.query_head(p, r)) : 0.f;
            }
        }
    }

    __device__ void put(uint32_t row, uint32_t at, uint32_t first, uint32_t second) {
        *reinterpret_cast<uint2 *>(coefficients + row * p.coefficient_bytes + at) = make_uint2(first, second);
    }

    // Writes the coefficients of quad `q` of the depth for a row.
    __device__ void put_quad(const Words &w, uint32_t row, uint32_t q, const float (&x)[4]) {
        const uint32_t segment = q / 4;
        const auto halves_of = [&](float place, uint32_t &first, uint32_t &second) {
            first = pack_halves(x[0] * place, x[2] * place);
            second = pack_halves(x[1] * place, x[3] * place);
        };
        const auto put_field = [&](uint32_t word, uint32_t field, uint32_t first, uint32_t second) {
            const bool by_bits = word >= w.low / 4 * 4;
            const uint32_t at = w.at(word) + (by_bits ? 16 : 8) * field;
            put(row, at, first, second);
            if (by_bits) put(row, at + 8, first, second);
        };
        uint32_t first, second;
        if (w.native) {
            halves_of(q % 2 ? 1.f / 16.f : 1.f, first, second);
            put(row, 8 * q, first, second);
        } else if (segment < w.four) {
            const uint32_t field = 2 * (q % 2);
#pragma unroll
            for (uint32_t i = 0; i < 2; i++) {
                halves_of((q % 2 ? 1.f / 16.f : 1.f) * w.lift(q / 2, 2 * (field + i)), first, second);
                put_field(q / 2, field + i, first, second);
            }
        } else {
            const bool has_low = segment < w.four + w.three + w.two, has_bit = !has_low || segment < w.four + w.three;
            if (has_low) {
                halves_of(power(127 - 2 * (q % 4)) * w.lift(w.four + segment, 2 * (q % 4)), first, second);
                put_field(w.four + segment, q % 4, first, second);
            }
            if (has_bit) {
                const uint32_t odd = segment - w.four - (has_low ? 0 : w.two), bit = odd % 2 * 4 + q % 4;
                const uint32_t word = w.low + odd / 2;
                halves_of(power(127 + (has_low ? 2 : 0) - bit) * w.lift(word, bit), first, second);
                put(row, w.at(word) + 8 * bit, first, second);
            }
        }
    }

    // The fourth lane of a group of three words multiplies with nothing.
    __device__ void clear_rest(const Words &w) {
        if (w.native || w.n % 4 != 3) return;
        for (uint32_t i = lane; i < 8 * ROWS; i += 32) put(i / 8, w.at(w.n - 1) + 64 + 8 * (i % 8), 0, 0);
    }

    // Codec `group`: rotated, once for all pages with the same factors.
    __device__ void prepare_group(const Words &w) {
        const uint32_t dim = k.head_dim, n_quads = dim / 4, block = dim & (0u - dim);
        bool same = is_prepared;
        uint32_t exponents = 0;
        if (k.exponents != ABSENT && lane < n_quads) {
            exponents = *reinterpret_cast<const uint32_t *>(k_page + swizzle(k.exponents + 4 * lane));
            same &= exponents == seen_exponents;
        }
        if (__all_sync(FULL, same)) return;
        is_prepared = true;
        seen_exponents = exponents;
        float units[ROWS], totals[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float x[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                x[j] = lane < n_quads ? query[(4 * lane + j) * ROWS + r] : 0.f;
                x[j] *= smooth_factor(int8_t(exponents >> 8 * j));
            }
            if (k.rotate) {
                const float a = x[0] + x[1], b = x[0] - x[1], c = x[2] + x[3], d = x[2] - x[3];
                x[0] = a + c, x[1] = b + d, x[2] = a - c, x[3] = b - d;
                for (uint32_t half = 1; half < block / 4; half *= 2) {
                    const bool upper = lane & half;
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        const float other = __shfl_xor_sync(FULL, x[j], half);
                        x[j] = upper ? other - x[j] : x[j] + other;
                    }
                }
                const float norm = 1.f / sqrtf(float(block));
#pragma unroll
                for (int j = 0; j < 4; j++) x[j] *= norm;
            }
            float most = fmaxf(fmaxf(fabsf(x[0]), fabsf(x[1])), fmaxf(fabsf(x[2]), fabsf(x[3])));
            most = fmaxf(warp_max(most), 1e-30f);
            const float inverse = LIFT / most;
            totals[r] = lane < n_quads ? x[0] + x[1] + (x[2] + x[3]) : 0.f;
            units[r] = most * UNLIFT;
#pragma unroll
            for (int j = 0; j < 4; j++) x[j] *= inverse;
            if (lane < n_quads) put_quad(w, r, lane, x);
        }
        clear_rest(w);
        const float centre = -0.5f * float((1u << k.width) - 1);
        const float total = sum_each<ROWS>(totals);
#pragma unroll
        for (int c = 0; c < 2; c++) {
            scale[c] = units[0];
#pragma unroll
            for (int r = 1; r < ROWS; r++) scale[c] = column(c) == uint32_t(r) ? units[r] : scale[c];
            scale[c] *= to_log2;
            offset[c] = centre * to_log2 * __shfl_sync(FULL, total, owner<ROWS>(column(c)));
        }
        __syncwarp();
    }

    // Codec `channel`: times the page's steps, in its order. Gives what centres and mid-points add to each column.
    __device__ void prepare_channel(const Words &w, const Segments &segments, const uint8_t *header, float (&base)[2]) {
        const uint32_t dim = k.head_dim, n_quads = dim / 4;
        const float step_power = power(header[0]), mid_power = power(header[1]);
        float x[ROWS][4] = {}, sums[ROWS] = {}, most = 0.f;
        if (lane < n_quads) {
            const auto four = [&](uint32_t at) { return *reinterpret_cast<const uint32_t *>(k_page + swizzle(at + 4 * lane)); };
            const uint32_t codes = four(k.steps), mids = four(k.mids), order = k.order == ABSENT ? 0 : four(k.order);
            const float centre = 0.5f * float((1u << segments.bits(lane / 4)) - 1);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const uint32_t channel = k.order == ABSENT ? 4 * lane + j : min(order >> 8 * j & 255, dim - 1);
                const float step = e4m3_decode(codes >> 8 * j & 255) * step_power;
                const float shift = e4m3_decode(mids >> 8 * j & 255) * mid_power - step * centre;
                const float *q = query + channel * ROWS;
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    x[r][j] = q[r] * step;
                    sums[r] += q[r] * shift;
                    most = fmaxf(most, fabsf(x[r][j]));
                }
            }
        }
        // One unit for all rows: they are queries of a head, of like size.
        most = fmaxf(warp_max(most), 1e-30f);
        const float inverse = LIFT / most;
        if (lane < n_quads) {
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
#pragma unroll
                for (int j = 0; j < 4; j++) x[r][j] *= inverse;
                put_quad(w, r, lane, x[r]);
            }
        }
        clear_rest(w);
        const float total = sum_each<ROWS>(sums);
#pragma unroll
        for (int c = 0; c < 2; c++) {
            scale[c] = most * UNLIFT * to_log2;
            base[c] = to_log2 * __shfl_sync(FULL, total, owner<ROWS>(column(c)));
        }
        __syncwarp();
    }

    // What the page's mean adds to each column.
    __device__ void mean_base(float (&base)[2]) {
        base[0] = base[1] = 0.f;
        if (k.mean == ABSENT) return;
        float sums[ROWS] = {};
        if (lane < k.head_dim / 4) {
            const uint2 mean = *reinterpret_cast<const uint2 *>(k_page + swizzle(k.mean + 8 * lane));
            const float m[4] = {half_to_float(uint16_t(mean.x)), half_to_float(uint16_t(mean.x >> 16)), half_to_float(uint16_t(mean.y)),
                                half_to_float(uint16_t(mean.y >> 16))};
#pragma unroll
            for (int j = 0; j < 4; j++)
#pragma unroll
                for (int r = 0; r < ROWS; r++) sums[r] += m[j] * query[(4 * lane + j) * ROWS + r];
        }
        const float total = sum_each<ROWS>(sums);
#pragma unroll
        for (int c = 0; c < 2; c++) base[c] = to_log2 * __shfl_sync(FULL, total, owner<ROWS>(column(c)));
    }

    // ---- a page ----

    __device__ void fetch(uint8_t *to, const uint8_t *region, const SideDesc &side, uint32_t page) {
        const uint8_t *from = region + side.pages + size_t(page) * side.page_bytes;
        const uint32_t n = side.page_bytes;
#pragma unroll 4
        for (uint32_t at = 16 * lane; at < n; at += 512) copy_async(to + swizzle(at), from + at);
    }

    // c[block][tile] += the products of the words of four lanes, read as FIELDS fields of BITS bits.
    template <int BITS, int FIELDS, int N>
    __device__ __forceinline__ void multiply_fields(const uint8_t *page, uint32_t word, uint32_t n_words, uint32_t shift, const uint4 *b, float (&c)[N][2][4]) {
        uint4 coefs[FIELDS / 2];
#pragma unroll
        for (int f = 0; f < FIELDS / 2; f++) coefs[f] = b[f];
#pragma unroll
        for (int i = 0; i < N; i++) {
            const uint32_t row = word + i * n_words;
            const uint4 codes = *reinterpret_cast<const uint4 *>(page + row * 128 + ((quad ^ (row & 7)) << 4));
            const uint32_t x[4] = {codes.x >> shift, codes.y >> shift, codes.z >> shift, codes.w >> shift};
            const uint32_t y[4] = {x[0] >> 8, x[1] >> 8, x[2] >> 8, x[3] >> 8};
#pragma unroll
            for (int f = 0; f < FIELDS; f++) {
                const uint32_t mask = ((1u << BITS) - 1) * 0x00010001u << BITS * f;
                const uint32_t b0 = f % 2 ? coefs[f / 2].z : coefs[f / 2].x, b1 = f % 2 ? coefs[f / 2].w : coefs[f / 2].y;
#pragma unroll
                for (int j = 0; j < 2; j++) mma(c[i][j], x[j] & mask, x[j + 2] & mask, y[j] & mask, y[j + 2] & mask, b0, b1);
            }
        }
    }

    // The same for all words of N blocks of 32 lanes of a tile; `coefs`: this lane's column of B.
    template <int N> __device__ void multiply(const Words &w, const uint8_t *page, const uint8_t *coefs, float (&c)[N][2][4]) {
#pragma unroll 1
        for (uint32_t group = 0; group < w.groups(); group++) {
            const Reading reading = w.reading(group);
            const auto at = [&](uint32_t word, uint32_t more) { return reinterpret_cast<const uint4 *>(coefs + w.at(word) + more); };
            // A fourth lane without a word reads another one, and has coefficients of zero.
            const uint32_t own_word = 4 * group + t, word = min(own_word, w.n - 1);
            if (reading == TWO_BITS) multiply_fields<2, 4, N>(page, word, w.n, 0, at(own_word, 0), c);
            else if (reading == FOUR_BITS) multiply_fields<4, 2, N>(page, word, w.n, 0, at(own_word, 0), c);
            else if (reading == ONE_BIT) multiply_fields<1, 8, N>(page, word, w.n, 0, at(own_word, 0), c);
            else if (reading == ONE_BIT_PAIR) multiply_fields<1, 4, N>(page, 4 * group + t / 2, w.n, 4 * (t % 2), at(4 * group + t / 2, 32 * (t % 2)), c);
            else multiply_fields<1, 2, N>(page, 4 * group, w.n, 2 * t, at(4 * group, 16 * t), c);
        }
    }

    // The token of this lane's score `i` of tile `j` in a block of 32.
    __device__ uint32_t token_of(int j, int i) const { return 4 * quad + (TWICE ? t / 2 : j) + 2 * i; }

    // Eight bytes, of which all may be aligned to two only.
    __device__ static bool is_zero(const uint8_t *at) {
        if (reinterpret_cast<uintptr_t>(at) % 8 == 0) {
            const uint2 x = *reinterpret_cast<const uint2 *>(at);
            return (x.x | x.y) == 0;
        }
        const uint16_t *x = reinterpret_cast<const uint16_t *>(at);
        return (x[0] | x[1] | x[2] | x[3]) == 0;
    }

    // What is read of a page besides the page, long before it is looked at. `bits`: of lane % 4's 32 cells.
    struct Look {
        uint32_t bits, k_header, v_header;
        uint2 mask;  // FP16, of the first token and four cells
    };
    __device__ uint32_t look_at_bits(uint32_t page) { return uint32_t(p.plan[p.plan_at.page_bits[p.view] + page * BLOCKS + lane % BLOCKS]); }
    __device__ const uint8_t *mask_at(uint32_t token, uint32_t page) {
        return p.mask + (token * p.mask_stride_token + page * PAGE + 4 * lane) * (p.mask_is_f16 ? 2 : 4);
    }
    __device__ bool has_mask_ahead(uint32_t page) {
        return p.mask != nullptr && p.mask_is_f16 && page * PAGE + PAGE <= p.n_kv && reinterpret_cast<uintptr_t>(mask_at(first_token, page)) % 8 == 0;
    }
    __device__ void look(uint32_t page, Look &ahead) {
        ahead.bits = look_at_bits(page);
        ahead.k_header = *reinterpret_cast<const uint32_t *>(k_region + k.headers + 4 * size_t(page));
        ahead.v_header = *reinterpret_cast<const uint32_t *>(v_region + v.headers + 4 * size_t(page));
        if (has_mask_ahead(page)) ahead.mask = *reinterpret_cast<const uint2 *>(mask_at(first_token, page));
    }

    // Whether all cells of the page are to be read and the mask adds nothing to any.
    __device__ bool is_plain(uint32_t page, const Look &look) {
        bool plain = look.bits == ~0u && p.softcap <= 0.f && page * PAGE + PAGE <= p.n_kv;
        if (plain && p.mask != nullptr) {
            const bool ahead = has_mask_ahead(page);
            if (ahead) plain = (look.mask.x | look.mask.y) == 0;
            for (uint32_t token = first_token + (ahead ? 1 : 0); token <= last_token; token++) {
                const uint8_t *at = mask_at(token, page);
                plain &= p.mask_is_f16 ? is_zero(at) : is_zero(at) && is_zero(at + 8);
            }
        }
        return __all_sync(FULL, plain);
    }

    // Soft cap, mask and slope; `cell` < 0: hidden.
    __device__ float logit(float score, int cell, uint32_t row) {
        const float mask = cell < 0 || row >= tile.n_rows ? -infinity() : mask_value(p, tile.token(p, row), uint32_t(cell));
        if (p.softcap > 0.f) score = p.softcap * tanhf(score / p.softcap) * LOG2E;
        return mask == -infinity() ? mask : score + slopes[row] * mask * LOG2E;
    }

    // Moves the reference up where a maximum needs it.
    __device__ void move_reference(const float (&most)[2]) {
        if (!__any_sync(FULL, most[0] > reference[0] + SLACK || most[1] > reference[1] + SLACK)) return;
        float factor[2];
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const float next = most[c] > reference[c] + SLACK ? most[c] : reference[c];
            factor[c] = power_of_two(reference[c] - next);
            reference[c] = next;
            sum[c] *= factor[c];
            steps[c] *= factor[c];
        }
#pragma unroll
        for (int b = 0; b < DIM_V / 32; b++)
#pragma unroll
            for (int j = 0; j < 2; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) acc[b][j][i] *= factor[i % 2];
    }

    // The largest of each column over all lanes that have it.
    __device__ void max_of_columns(float (&most)[2]) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
#pragma unroll
            for (uint32_t o = TWICE ? 2 : 4; o < 32; o *= 2) most[c] = fmaxf(most[c], __shfl_xor_sync(FULL, most[c], o));
        }
    }

    // Attends a page that is on its way, and gives the next one, which then is.
    __device__ uint32_t attend_page(uint32_t page, Look &at, uint32_t end, uint32_t stride) {
        const uint32_t candidate = page + stride, candidate_bits = candidate < end ? look_at_bits(candidate) : 0;
        const uint32_t k_bytes = at.k_header, v_base = at.v_header & 255;
        const uint8_t header[4] = {uint8_t(k_bytes), uint8_t(k_bytes >> 8), uint8_t(k_bytes >> 16), uint8_t(k_bytes >> 24)};
        copy_wait<1>();
        Words words;
        float base[2];
        if (k.codec == CODEC_GROUP) {
            words = Words::of(Segments::uniform(k.width, k.head_dim / 16), k.head_dim / 16);
            prepare_group(words);
            mean_base(base);
        } else {
            const Segments segments = Segments::of_header(header, k.n_segments, k.budget);
            words = Words::of(segments, k.n_segments);
            prepare_channel(words, segments, header, base);
        }
        const uint8_t *coefs = coefficients + (TWICE ? g % 4 : g) * p.coefficient_bytes;
        float score[BLOCKS][TILES][2][2], most[2] = {DEAD, DEAD};  // [block][tile][token][column]
        float c[BLOCKS][2][4] = {};
        multiply<BLOCKS>(words, k_page, coefs, c);
#pragma unroll
        for (uint32_t b = 0; b < BLOCKS; b++) {
            const uint32_t codes = k.codec == CODEC_GROUP ? *reinterpret_cast<const uint32_t *>(k_page + swizzle(k.steps + 32 * b + 4 * quad)) : 0;
#pragma unroll
            for (int j = 0; j < TILES; j++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const uint32_t code = codes >> 8 * ((TWICE ? t / 2 : j) + 2 * i) & 255;
                    const float step = scale_decode(code, header[0]);
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const float x = TWICE ? (t / 2 ? c[b][1][2 * i + e] : c[b][0][2 * i + e]) : c[b][j][2 * i + e];
                        float s = scale[e] * x;
                        if (k.codec == CODEC_GROUP) s = step * (s + offset[e]);
                        score[b][j][i][e] = s + base[e];
                    }
                }
        }
        __syncwarp();
        uint32_t next = candidate;
        if (!__any_sync(FULL, candidate_bits != 0)) next = next_page(candidate + stride, end, stride);
        if (next != ~0u) fetch(k_page, k_region, k, next);
        copy_commit();
        const Look now = at;
        if (next != ~0u) look(next, at);
        if (!is_plain(page, now)) {
#pragma unroll
            for (uint32_t b = 0; b < BLOCKS; b++) {
                const uint32_t in_block = __shfl_sync(FULL, now.bits, b);
#pragma unroll
                for (int j = 0; j < TILES; j++)
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const uint32_t token = token_of(j, i);
                        const int cell = in_block >> token & 1 ? int(page * PAGE + 32 * b + token) : -1;
#pragma unroll
                        for (int e = 0; e < 2; e++) score[b][j][i][e] = logit(score[b][j][i][e], cell, column(e));
                    }
            }
        }
#pragma unroll
        for (uint32_t b = 0; b < BLOCKS; b++)
#pragma unroll
            for (int j = 0; j < TILES; j++)
#pragma unroll
                for (int i = 0; i < 2; i++)
#pragma unroll
                    for (int e = 0; e < 2; e++) most[e] = fmaxf(most[e], score[b][j][i][e]);
        max_of_columns(most);
        move_reference(most);
        copy_wait<1>();
        float weight[2], sums[2] = {}, step_sums[2] = {};
        const bool three = v.width == 3;
        const float place = v.width == 4 ? (quad % 2 ? 1.f / 16.f : 1.f) : power(127 - 2 * (quad % 4)), high = power(127 + 2 - quad);
        // Steps relative to the page's largest possible one.
        const uint32_t step_base = 127 - 16;
#pragma unroll
        for (uint32_t b = 0; b < BLOCKS; b++) {
            const uint32_t codes = *reinterpret_cast<const uint32_t *>(v_page + swizzle(v.steps + 32 * b + 4 * quad));
#pragma unroll
            for (int j = 0; j < TILES; j++) {
                const int s = TWICE ? t / 2 : j;
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float x[2];
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const float q = power_of_two(score[b][j][i][e] - most[e]);
                        sums[e] += q;
                        x[i] = q * scale_decode(codes >> 8 * (s + 2 * i) & 255, step_base) * LIFT;
                        step_sums[e] += x[i];
                    }
                    uint8_t *at = weights + column(e) * p.weight_bytes + (8 * b + quad) * 8 + 4 * s;
                    *reinterpret_cast<uint32_t *>(at) = pack_halves(x[0] * place, x[1] * place);
                    if (three) *reinterpret_cast<uint32_t *>(at + 256) = pack_halves(x[0] * high, x[1] * high);
                }
            }
        }
        // A step is 2^(base - step_base) times what it was taken for.
        const float step_unit = power(min(v_base + 16u, 254u)) / LIFT;
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const float factor = power_of_two(most[e] - reference[e]);
            sum[e] += factor * sums[e];
            steps[e] += factor * step_unit * step_sums[e];
            weight[e] = factor * step_unit * 16777216.f;
        }
        __syncwarp();
        const Words values = Words::of(Segments::uniform(v.width, PAGE / 16), PAGE / 16);
        const uint8_t *b = weights + (TWICE ? g % 4 : g) * p.weight_bytes;
        float o[DIM_V / 32][2][4] = {};
        multiply<DIM_V / 32>(values, v_page, b, o);
#pragma unroll
        for (int block = 0; block < DIM_V / 32; block++) {
#pragma unroll
            for (int j = 0; j < 2; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) acc[block][j][i] += o[block][j][i] * weight[i % 2];
        }
        __syncwarp();
        if (next != ~0u) fetch(v_page, v_region, v, next);
        copy_commit();
        return next;
    }

    // ---- exact rows ----

    float exact[ROWS][4] = {};  // of channels 4 * lane to 4 * lane + 3, relative to the reference
    float exact_reference[2] = {DEAD, DEAD};
    bool has_exact = false;

    // Makes the sums of exact rows relative to the reference as it is now.
    __device__ void follow_reference() {
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            // Lane r / 2 has column r as its number r % 2.
            const float factor = __shfl_sync(FULL, power_of_two(exact_reference[r % 2] - reference[r % 2]), r / 2);
#pragma unroll
            for (int i = 0; i < 4; i++) exact[r][i] *= factor;
        }
        exact_reference[0] = reference[0], exact_reference[1] = reference[1];
    }

    __device__ void attend_exact(const ExactRows &rows, uint32_t first, uint32_t n) {
        const uint32_t dim = k.head_dim;
        has_exact = true;
        // Operand A: rows g and g + 8, 8 channels a lane.
        const auto cell_of = [&](uint32_t i) { return i < n ? rows.cell(p, tile.head, first + i) : -1; };
        const int cells[2] = {cell_of(g), cell_of(g + 8)};
        if (!__any_sync(FULL, cells[0] >= 0 || cells[1] >= 0)) return;
        float c[4] = {};
        for (uint32_t at = 0; at < dim; at += 32) {
            uint32_t a[2][4] = {};
#pragma unroll
            for (int half = 0; half < 2; half++) {
                if (cells[half] < 0) continue;
                const uint32_t row = first + g + 8 * half;
                if (rows.kind != ExactRows::CURRENT) {
                    const uint4 key = *reinterpret_cast<const uint4 *>(rows.half_row(k, p.k_mem, tile.head, row) + at + 8 * t);
                    a[half][0] = key.x, a[half][1] = key.y, a[half][2] = key.z, a[half][3] = key.w;
                    continue;
                }
#pragma unroll
                for (uint32_t i = 0; i < 4; i++) {
                    const uint32_t channel = at + 8 * t + 2 * i;
                    a[half][i] = pack_halves(rows.key(p, tile.head, row, channel), rows.key(p, tile.head, row, channel + 1));
                }
            }
            const uint16_t *q = halves + (TWICE ? g % 4 : g) * (dim + 8) + at + 8 * t;
            const uint4 b = *reinterpret_cast<const uint4 *>(q);
            mma(c, a[0][0], a[1][0], a[0][1], a[1][1], b.x, b.y);
            mma(c, a[0][2], a[1][2], a[0][3], a[1][3], b.z, b.w);
        }
        float score[2][2], most[2] = {DEAD, DEAD};
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const float x = logit(c[2 * i + e] * unit[column(e)] * to_log2, cells[i], column(e));
                score[i][e] = x;
                most[e] = fmaxf(most[e], x);
            }
        max_of_columns(most);
        move_reference(most);
        follow_reference();
        float *table = reinterpret_cast<float *>(weights);  // [16][ROWS]
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const float weight = power_of_two(score[i][e] - reference[e]);
                // Lanes that repeat others' columns repeat their tokens here as well.
                if (!TWICE || t < 2) {
                    sum[e] += weight;
                    table[(g + 8 * i) * ROWS + column(e)] = weight;
                }
            }
        __syncwarp();
        const uint32_t seen = __ballot_sync(FULL, (lane < n ? cell_of(lane) : -1) >= 0);
        if (4 * lane < uint32_t(DIM_V)) {
#pragma unroll 4
            for (uint32_t i = 0; i < PIECE; i++) {
                if (!(seen >> i & 1)) continue;
                float x[4];
                if (rows.kind != ExactRows::CURRENT) {
                    const uint2 value = *reinterpret_cast<const uint2 *>(rows.half_row(v, p.v_mem, tile.head, first + i) + 4 * lane);
                    x[0] = half_to_float(uint16_t(value.x)), x[1] = half_to_float(uint16_t(value.x >> 16));
                    x[2] = half_to_float(uint16_t(value.y)), x[3] = half_to_float(uint16_t(value.y >> 16));
                } else {
#pragma unroll
                    for (uint32_t j = 0; j < 4; j++) x[j] = rows.value(p, tile.head, first + i, 4 * lane + j);
                }
#pragma unroll
                for (int r = 0; r < ROWS; r++)
#pragma unroll
                    for (int j = 0; j < 4; j++) exact[r][j] += table[i * ROWS + r] * x[j];
            }
        }
        __syncwarp();
    }

    // ---- joining ----

    // Rotates rows of DIM_V values, four a lane.
    __device__ void rotate(float (&x)[4]) {
        constexpr uint32_t block = DIM_V & (0u - DIM_V);
        const float a = x[0] + x[1], b = x[0] - x[1], c = x[2] + x[3], d = x[2] - x[3];
        x[0] = a + c, x[1] = b + d, x[2] = a - c, x[3] = b - d;
#pragma unroll
        for (uint32_t half = 1; half < block / 4; half *= 2) {
            const bool upper = lane & half;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float other = __shfl_xor_sync(FULL, x[j], half);
                x[j] = upper ? other - x[j] : x[j] + other;
            }
        }
        const float norm = 1.f / sqrtf(float(block));
#pragma unroll
        for (int j = 0; j < 4; j++) x[j] *= norm;
    }

    // Leaves the warp's output, relative to its references, as [ROWS][DIM_V] in its own memory, and its state in `states`.
    __device__ void leave() {
        copy_wait<0>();
        float *out = reinterpret_cast<float *>(own);
        const float centre = 0.5f * float((1u << v.width) - 1);
        float total[2];
#pragma unroll
        for (int e = 0; e < 2; e++) {
#pragma unroll
            for (uint32_t o = TWICE ? 2 : 4; o < 32; o *= 2) {
                sum[e] += __shfl_xor_sync(FULL, sum[e], o);
                steps[e] += __shfl_xor_sync(FULL, steps[e], o);
            }
            total[e] = centre * steps[e];
        }
        if (!TWICE || t < 2) {
#pragma unroll
            for (int block = 0; block < DIM_V / 32; block++)
#pragma unroll
                for (int j = 0; j < 2; j++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        out[column(i % 2) * DIM_V + 32 * block + 4 * quad + j + 2 * (i / 2)] = acc[block][j][i] - total[i % 2];
            if (g == 0) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float *state = states + (warp * ROWS + column(e)) * STATE;
                    state[0] = reference[e];
                    state[1] = sum[e];
                }
            }
        }
        __syncwarp();
        if (!has_exact) return;
        follow_reference();
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float x[4] = {exact[r][0], exact[r][1], exact[r][2], exact[r][3]};
            if (v.rotate) rotate(x);
            if (4 * lane < uint32_t(DIM_V))
#pragma unroll
                for (int j = 0; j < 4; j++) out[r * DIM_V + 4 * lane + j] += x[j];
        }
    }

    // The exact rows that this warp takes first, from the last warp on.
    __device__ uint32_t first_exact() const { return tile.split + (n_warps - 1 - warp) * p.n_splits; }

    // Exact rows come from main memory, and late: asks for the first ones.
    __device__ void prefetch_exact() {
        const uint32_t row = first_exact() * PIECE + lane % PIECE;
        if (row >= layer.n_slots) return;
        const ExactRows slots{ExactRows::SLOTS, 0, layer.n_slots};
        const SideDesc &side = lane < PIECE ? k : v;
        const uint16_t *from = slots.half_row(side, lane < PIECE ? p.k_mem : p.v_mem, tile.head, row);
        for (uint32_t c = 0; c < side.head_dim; c += 64) prefetch(from + c);
        if (lane == 0) prefetch(p.plan + p.plan_at.slot_cells[p.view] + row);
    }

    __device__ void run() {
        const uint32_t stride = p.n_splits * n_warps, first = tile.split * n_warps + warp;
        // The first page is fetched before it is known that anybody sees it.
        const bool has_first = first < layer.n_pages && first * PAGE < p.n_kv;
        if (has_first) fetch(k_page, k_region, k, first);
        copy_commit();
        if (has_first) fetch(v_page, v_region, v, first);
        copy_commit();
        const Pieces pieces = Pieces::of(p);
        Look at{};
        if (has_first) look(first, at);
        prefetch_exact();
        load_query();
        __syncthreads();
        uint32_t page = first;
        if (!(first < pieces.pages && __any_sync(FULL, at.bits != 0))) {
            page = next_page(first + stride, pieces.pages, stride);
            if (page != ~0u) {
                look(page, at);
                copy_wait<0>();
                fetch(k_page, k_region, k, page);
                copy_commit();
                fetch(v_page, v_region, v, page);
                copy_commit();
            }
        }
        constexpr uint32_t PER = EXACT_ROWS / PIECE;
        for (uint32_t i = first_exact(); i < pieces.exact() * PER; i += stride) {
            const ExactRows rows = ExactRows::of(p, pieces, i / PER);
            const uint32_t from = i % PER * PIECE;
            if (from < rows.n) attend_exact(rows, from, min(PIECE, rows.n - from));
        }
        while (page != ~0u) page = attend_page(page, at, pieces.pages, stride);
        leave();
        __syncthreads();
        finish();
    }

    // The first page from `page` on that somebody may see.
    __device__ uint32_t next_page(uint32_t page, uint32_t end, uint32_t stride) {
        for (; page < end; page += stride) {
            if (__any_sync(FULL, look_at_bits(page) != 0)) return page;
        }
        return ~0u;
    }

    __device__ void finish() {
        constexpr uint32_t N = ROWS * DIM_V;
        const uint8_t *buffers = own - warp * p.shared_warp;
        // The block's reference and sum of a row, and each warp's factor, which takes the place of its reference.
        if (threadIdx.x < ROWS) {
            const uint32_t r = threadIdx.x;
            float most = DEAD, total = 0.f;
            for (uint32_t i = 0; i < n_warps; i++) most = fmaxf(most, states[(i * ROWS + r) * STATE]);
            for (uint32_t i = 0; i < n_warps; i++) {
                float *state = states + (i * ROWS + r) * STATE;
                const float factor = power_of_two(state[0] - most);
                total += factor * state[1];
                state[2] = factor;
            }
            if (spoiled[r] != 0.f) total = not_a_number(), most = 0.f;
            unit[r] = most;  // the query is not needed any more
            slopes[r] = total;
        }
        __syncthreads();
        const auto of_block = [&](uint32_t i) {
            float out = 0.f;
            for (uint32_t w = 0; w < n_warps; w++) out += states[(w * ROWS + i / DIM_V) * STATE + 2] * reinterpret_cast<const float *>(buffers + w * p.shared_warp)[i];
            return out;
        };
        float *joined = query;  // [ROWS][DIM_V] where room was made for it
        if (p.n_splits == 1) {
            for (uint32_t i = threadIdx.x; i < N; i += 32 * n_warps) joined[i] = of_block(i);
        } else {
            for (uint32_t i = threadIdx.x; i < N; i += 32 * n_warps) partial_state(p, tile, ROWS, tile.split, i / DIM_V)[i % DIM_V] = of_block(i);
            if (threadIdx.x < ROWS) {
                float *state = partial_state(p, tile, ROWS, tile.split, threadIdx.x) + DIM_V;
                state[0] = unit[threadIdx.x];
                state[1] = slopes[threadIdx.x];
            }
            if (!is_last_block(p, tile, flag)) return;
            float *factors = reinterpret_cast<float *>(own - warp * p.shared_warp);  // [row][split]
            for (uint32_t r = warp; r < ROWS; r += n_warps) {
                float most = DEAD, total = 0.f;
                for (uint32_t i = lane; i < p.n_splits; i += 32) most = fmaxf(most, __ldcg(partial_state(p, tile, ROWS, i, r) + DIM_V));
                most = warp_max(most);
                for (uint32_t i = lane; i < p.n_splits; i += 32) {
                    const float *state = partial_state(p, tile, ROWS, i, r) + DIM_V;
                    const float factor = power_of_two(__ldcg(state) - most);
                    factors[r * p.n_splits + i] = factor;
                    total += factor * __ldcg(state + 1);
                }
                total = warp_sum(total);
                if (lane == 0) unit[r] = most, slopes[r] = total;
            }
            __syncthreads();
            for (uint32_t i = threadIdx.x; i < N; i += 32 * n_warps) {
                float out = 0.f;
#pragma unroll 8
                for (uint32_t s = 0; s < p.n_splits; s++)
                    out += factors[i / DIM_V * p.n_splits + s] * __ldcg(partial_state(p, tile, ROWS, s, i / DIM_V) + i % DIM_V);
                joined[i] = out;
            }
        }
        __syncthreads();
        for (uint32_t r = warp; r < tile.n_rows; r += n_warps) {
            float x[4] = {};
            if (4 * lane < uint32_t(DIM_V))
                for (int j = 0; j < 4; j++) x[j] = joined[r * DIM_V + 4 * lane + j];
            if (v.rotate) rotate(x);
            // References are powers of two.
            const float maximum = unit[r] <= DEAD ? -infinity() : unit[r] / LOG2E;
            write_row(p, tile, r, maximum, slopes[r], x);
        }
    }

    // As the common one, for four channels a lane.
    __device__ void write_row(const AttendParams &p, const Tile &tile, uint32_t r, float maximum, float total, const float (&x)[4]) {
        kvq::write_row(p, tile, r, maximum, total, 4 * lane, 128, [&](uint32_t) { return x[0]; });
        for (uint32_t j = 1; j < 4; j++) kvq::write_row(p, tile, r, maximum, total, 4 * lane + j, 128, [&](uint32_t) { return x[j]; });
    }
};

}  // namespace kvq

#define KVQ_FAST(name, rows, dim)                                 \
    KVQ_KERNEL(name, 384, 1, kvq::AttendParams) {                 \
        KVQ_SHARED(shared);                                       \
        kvq::Fast<rows, dim>(p, shared).run();                    \
    }
KVQ_FAST(kvq_attend_fast_4_64, 4, 64)
KVQ_FAST(kvq_attend_fast_4_128, 4, 128)
KVQ_FAST(kvq_attend_fast_8_64, 8, 64)
KVQ_FAST(kvq_attend_fast_8_128, 8, 128)
