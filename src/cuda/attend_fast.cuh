#pragma once
// Attention on tensor cores, for the formats that matter: pages of 128 cells (64 in small caches), keys of codec `group` (one symmetric step a
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
// A member of the outlier pool is one of the exact rows, and its bit of the page counts as not set.
//
// Exact rows are pieces of 16: scores by MMA as well, weighted sums by plain arithmetic, which fits one lane per four
// channels. At the end a block adds up its warps, and the last block of a head its blocks.
#include "attend.cuh"
#include "mma.cuh"
#include "page.cuh"

namespace kvq {

constexpr uint32_t PIECE = 16;
constexpr int CHANNEL = 1;  // of KEYS
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

// ROWS query rows, values of DIM_V channels. What is known when the kernel is compiled makes it short, and short code is
// fast: it is fetched once for a page. VALUES: width of the values; KEYS: width of the keys of codec `group`, or CHANNEL, and
// keys of as many channels as values. 0: any. Pages have PAGE cells.
template <int ROWS, int DIM_V, int KEYS, int VALUES, int PAGE> struct Fast {
    static constexpr uint32_t BLOCKS = PAGE / 32;
    static constexpr bool TWICE = ROWS == 4;        // columns 4 to 7 repeat 0 to 3, and half of the lanes take other tokens
    static constexpr int TILES = TWICE ? 1 : 2;     // of tokens that a lane has scores of, in a block of 32 lanes
    static constexpr uint32_t STATE = 4;            // floats of a warp's state of a row: reference, sum, sum of steps, -

    // Where this lane's pieces of a page go: lane l takes pieces l, l + 32, ...: of rows l / 8, l / 8 + 4, ..., whose
    // exchange is one of two.
    struct Target {
        SharedAt even, odd;
    };

    const AttendParams &p;
    const LayerDesc &layer;
    const SideDesc &k, &v;
    const Tile tile;
    const uint32_t warp, lane, n_warps, g, t, quad;  // quad: the four lanes of a tile's 32 that this lane reads
    // Shared memory.
    float *query;      // as it came, times the scale; see query_at
    uint16_t *halves;  // [ROWS][dim + 8]: the same, relative to unit[row]
    float *unit;       // [ROWS]
    float *slopes, *spoiled;
    float *states;     // [warp][ROWS][STATE]
    uint32_t *flag;
    int *pooled;       // [pool_rows]: cells of the pool's members, or -1
    const uint8_t *k_region, *v_region;
    uint32_t first_token, last_token;
    bool mask_ahead;
    uint8_t *own, *k_page, *v_page, *coefficients, *weights;
    Target k_target, v_target;
    // Registers.
    float acc[DIM_V / 32][2][4] = {};
    float reference[2] = {DEAD, DEAD}, sum[2] = {}, steps[2] = {};
    float scale[2], offset[2];  // of this lane's columns: score = step * (scale * c + offset) + base
    uint32_t seen_exponents = 0;  // of the quad that this lane prepares
    bool is_prepared = false;
    float to_log2;

    // The ROWS values of a channel: [channel % 4][channel / 4][ROWS], so that lanes with a quad each do not meet in a bank.
    __device__ float *query_at(uint32_t channel) const { return query + ((channel % 4) * (k.head_dim / 4) + channel / 4) * ROWS; }
    __device__ bool is_grouped() const { return KEYS == 0 ? k.codec == CODEC_GROUP : KEYS != CHANNEL; }
    __device__ uint32_t key_segments() const { return (KEYS ? DIM_V : k.head_dim) / 16; }
    __device__ uint32_t key_width() const { return KEYS ? uint32_t(KEYS) : k.width; }
    __device__ uint32_t value_width() const { return VALUES ? uint32_t(VALUES) : v.width; }
    __device__ uint32_t column(int c) const { return TWICE ? 2 * (t & 1) + c : 2 * t + c; }

    __device__ Fast(const AttendParams &params, uint8_t *shared)
        : p(params), layer(params.layer), k(layer.k), v(layer.v), tile(Tile::of_block(params, ROWS)), warp(__shfl_sync(FULL, threadIdx.x / 32, 0)),
          lane(threadIdx.x % 32), n_warps(params.n_warps), g(lane / 4), t(lane % 4), quad((g >> 1) | (g & 1) << 2) {
        query = reinterpret_cast<float *>(shared);
        halves = reinterpret_cast<uint16_t *>(query + max(k.head_dim, uint32_t(DIM_V)) * ROWS);
        unit = reinterpret_cast<float *>(halves + ROWS * (k.head_dim + 8));
        slopes = unit + ROWS;
        spoiled = slopes + ROWS;
        states = spoiled + ROWS;
        flag = reinterpret_cast<uint32_t *>(states + n_warps * ROWS * STATE);
        pooled = reinterpret_cast<int *>(flag + 1);
        own = shared + p.shared_warps + warp * p.shared_warp;
        k_page = own;
        v_page = k_page + (k.page_bytes + 127) / 128 * 128;
        coefficients = v_page + (v.page_bytes + 127) / 128 * 128;
        weights = coefficients + ROWS * p.coefficient_bytes;
        k_target = target(k_page), v_target = target(v_page);
        k_region = p.k_mem + tile.head * k.head_bytes;
        v_region = p.v_mem + tile.head * v.head_bytes;
        first_token = tile.token(p, 0);
        last_token = tile.token(p, tile.n_rows - 1);
        mask_ahead = p.mask != nullptr && p.mask_is_f16 && reinterpret_cast<uintptr_t>(mask_at(first_token, 0)) % 8 == 0;
        to_log2 = p.softcap > 0.f ? 1.f : LOG2E;
    }

    // ---- the query ----

    __device__ void load_query() {
        const uint32_t dim = k.head_dim;
#pragma unroll 1
        for (uint32_t r = warp; r < ROWS; r += n_warps) {
            const bool is_row = r < tile.n_rows;
            const float *q = p.q;
            if (is_row) q += tile.token(p, r) * p.q_stride_token + tile.query_head(p, r) * p.q_stride_head;
            float x[4], most = 0.f;
            bool is_finite = true;
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) {
                const uint32_t c = lane + 32 * i;
                x[i] = is_row && c < dim ? q[c] * p.scale : 0.f;
                is_finite &= fabsf(x[i]) <= MAX_QUERY;
                most = fmaxf(most, fabsf(x[i]));
            }
            is_finite = __all_sync(FULL, is_finite);
            most = is_finite ? fmaxf(warp_max(most), 1e-30f) : 1.f;
            const float inverse = LIFT / most;
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) {
                const uint32_t c = lane + 32 * i;
                if (c >= dim) continue;
                if (!is_finite) x[i] = 0.f;
                query_at(c)[r] = x[i];
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

    // Where the coefficients of a quad of the depth go: fields and what they are multiplied with.
    struct Fields {
        uint32_t at[2];
        float place[2];
        bool second, twice[2];
    };
    __device__ static Fields fields_of(const Words &w, uint32_t q) {
        Fields f{};
        const uint32_t segment = q / 4;
        const auto set = [&](int i, uint32_t word, uint32_t field, float place) {
            f.twice[i] = word >= w.low / 4 * 4;  // read bit by bit
            f.at[i] = w.at(word) + (f.twice[i] ? 16 : 8) * field;
            f.place[i] = place * w.lift(word, 2 * field);
        };
        if (w.native) {
            f.at[0] = 8 * q;
            f.place[0] = q % 2 ? 1.f / 16.f : 1.f;
        } else if (segment < w.four) {
            f.second = true;
            for (int i = 0; i < 2; i++) set(i, q / 2, 2 * (q % 2) + i, q % 2 ? 1.f / 16.f : 1.f);
        } else {
            const bool has_low = segment < w.four + w.three + w.two, has_bit = !has_low || segment < w.four + w.three;
            if (has_low) set(0, w.four + segment, q % 4, power(127 - 2 * (q % 4)));
            if (has_bit) {
                const uint32_t odd = segment - w.four - (has_low ? 0 : w.two), bit = odd % 2 * 4 + q % 4, word = w.low + odd / 2;
                const int i = has_low ? 1 : 0;
                f.second = has_low;
                f.twice[i] = false;
                f.at[i] = w.at(word) + 8 * bit;
                f.place[i] = power(127 + (has_low ? 2 : 0) - bit) * w.lift(word, bit);
            }
        }
        return f;
    }
    // Writes them for a row.
    __device__ __forceinline__ void put_quad(const Fields &f, uint32_t row, const float (&x)[4]) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (i == 1 && !f.second) break;
            const uint32_t first = pack_halves(x[0] * f.place[i], x[2] * f.place[i]), second = pack_halves(x[1] * f.place[i], x[3] * f.place[i]);
            put(row, f.at[i], first, second);
            if (f.twice[i]) put(row, f.at[i] + 8, first, second);
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
        const Fields fields = fields_of(w, lane);
        const float norm = k.rotate ? 1.f / sqrtf(float(block)) : 1.f;
        float units[ROWS], totals[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float x[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                x[j] = lane < n_quads ? query_at(4 * lane + j)[r] : 0.f;
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
            if (lane < n_quads) put_quad(fields, r, x);
        }
        clear_rest(w);
        const float centre = -0.5f * float((1u << key_width()) - 1);
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
                const float *q = query_at(channel);
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
            const Fields fields = fields_of(w, lane);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
#pragma unroll
                for (int j = 0; j < 4; j++) x[r][j] *= inverse;
                put_quad(fields, r, x[r]);
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
                for (int r = 0; r < ROWS; r++) sums[r] += m[j] * query_at(4 * lane + j)[r];
        }
        const float total = sum_each<ROWS>(sums);
#pragma unroll
        for (int c = 0; c < 2; c++) base[c] = to_log2 * __shfl_sync(FULL, total, owner<ROWS>(column(c)));
    }

    // ---- a page ----

    __device__ Target target(uint8_t *to) const { return {shared_at(to + swizzle(16 * lane)), shared_at(to + swizzle(16 * lane + 512) - 512)}; }
    __device__ __forceinline__ void fetch(const Target &to, const uint8_t *region, const SideDesc &side, uint32_t page) {
        const uint8_t *from = region + side.pages + size_t(page) * side.page_bytes + 16 * lane;
        const uint32_t n = side.page_bytes;
        uint32_t at = 0;
#pragma unroll 1
        for (; at + 2048 <= n; at += 2048) {
#pragma unroll
            for (uint32_t i = 0; i < 2048; i += 1024) {
                copy_async(to.even + at + i, from + at + i);
                copy_async(to.odd + at + i + 512, from + at + i + 512);
            }
        }
        const uint32_t end = n - 16 * lane;
#pragma unroll
        for (uint32_t i = 0; i < 2048; i += 1024) {
            if (at + i < end && at + i < n) copy_async(to.even + at + i, from + at + i);
            if (at + i + 512 < end && at + i + 512 < n) copy_async(to.odd + at + i + 512, from + at + i + 512);
        }
    }

    // c[block][tile] += the products of the words of four lanes, read as FIELDS fields of BITS bits.
    template <int BITS, int FIELDS, int N>
    __device__ __forceinline__ void multiply_fields(const uint8_t *page, uint32_t word, uint32_t n_words, uint32_t shift, const uint4 *b, float (&c)[N][2][4]) {
        uint4 coefs[FIELDS / 2];
#pragma unroll
        for (int f = 0; f < FIELDS / 2; f++) coefs[f] = b[f];
        // Two blocks at a time: sums that do not wait for each other.
#pragma unroll
        for (int pair = 0; pair < N; pair += 2) {
            uint32_t x[2][4];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const uint32_t row = word + (pair + i) * n_words;
                const uint4 codes = *reinterpret_cast<const uint4 *>(page + row * 128 + ((quad ^ (row & 7)) << 4));
                x[i][0] = codes.x >> shift, x[i][1] = codes.y >> shift, x[i][2] = codes.z >> shift, x[i][3] = codes.w >> shift;
            }
#pragma unroll
            for (int f = 0; f < FIELDS; f++) {
                const uint32_t mask = ((1u << BITS) - 1) * 0x00010001u << BITS * f;
                const uint32_t b0 = f % 2 ? coefs[f / 2].z : coefs[f / 2].x, b1 = f % 2 ? coefs[f / 2].w : coefs[f / 2].y;
#pragma unroll
                for (int i = 0; i < 2; i++)
#pragma unroll
                    for (int j = 0; j < 2; j++)
                        mma(c[pair + i][j], x[i][j] & mask, x[i][j + 2] & mask, x[i][j] >> 8 & mask, x[i][j + 2] >> 8 & mask, b0, b1);
            }
        }
    }

    // Those of four words.
    template <int N, bool UNEVEN>
    __device__ __forceinline__ void multiply_group(const Words &w, uint32_t group, const uint8_t *page, const uint8_t *coefs, float (&c)[N][2][4]) {
        const Reading reading = w.reading(group);
        const auto at = [&](uint32_t word, uint32_t more) { return reinterpret_cast<const uint4 *>(coefs + w.at(word) + more); };
        // A fourth lane without a word reads another one, and has coefficients of zero.
        const uint32_t own_word = 4 * group + t, word = min(own_word, w.n - 1);
        if (reading == TWO_BITS) multiply_fields<2, 4, N>(page, word, w.n, 0, at(own_word, 0), c);
        else if (reading == FOUR_BITS) multiply_fields<4, 2, N>(page, word, w.n, 0, at(own_word, 0), c);
        else if (reading == ONE_BIT) multiply_fields<1, 8, N>(page, word, w.n, 0, at(own_word, 0), c);
        else if (!UNEVEN) return;  // values: four words at a time, whatever their width
        else if (reading == ONE_BIT_PAIR) multiply_fields<1, 4, N>(page, 4 * group + t / 2, w.n, 4 * (t % 2), at(4 * group + t / 2, 32 * (t % 2)), c);
        else multiply_fields<1, 2, N>(page, 4 * group, w.n, 2 * t, at(4 * group, 16 * t), c);
    }

    // The same for all words of N blocks of 32 lanes of a tile; `coefs`: this lane's column of B.
    template <int N, bool UNEVEN, bool KNOWN> __device__ __forceinline__ void multiply(const Words &w, const uint8_t *page, const uint8_t *coefs, float (&c)[N][2][4]) {
        if (KNOWN) {
#pragma unroll
            for (uint32_t group = 0; group < 4; group++)
                if (group < w.groups()) multiply_group<N, UNEVEN>(w, group, page, coefs, c);
        } else {
#pragma unroll 1
            for (uint32_t group = 0; group < w.groups(); group++) multiply_group<N, UNEVEN>(w, group, page, coefs, c);
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
        uint32_t word;  // of lanes 0 to 3: the bits of 32 cells each; of lanes 4 and 5: the headers of keys and values
        uint2 mask;     // FP16, of the first token and four cells
        __device__ uint32_t get(uint32_t from) const { return __shfl_sync(FULL, word, from); }
    };
    __device__ uint32_t look_at_bits(uint32_t page) { return uint32_t(p.plan[p.plan_at.page_bits[p.view] + page * BLOCKS + lane % BLOCKS]); }
    __device__ const uint8_t *mask_at(uint32_t token, uint32_t page) {
        return p.mask + (token * p.mask_stride_token + page * PAGE + 4 * lane) * (p.mask_is_f16 ? 2 : 4);
    }
    __device__ bool has_mask_ahead(uint32_t page) { return mask_ahead && page * PAGE + PAGE <= p.n_kv; }
    // A word a lane: loads at an address that all lanes have in common go to uniform registers, for which the warp waits at
    // once.
    __device__ void look(uint32_t page, Look &ahead) {
        const uint8_t *at = reinterpret_cast<const uint8_t *>(p.plan + p.plan_at.page_bits[p.view] + page * BLOCKS + lane % BLOCKS);
        if (lane == 4) at = k_region + k.headers + 4 * size_t(page);
        if (lane == 5) at = v_region + v.headers + 4 * size_t(page);
        ahead.word = *reinterpret_cast<const uint32_t *>(at);
        if (has_mask_ahead(page) && 4 * lane < PAGE) ahead.mask = *reinterpret_cast<const uint2 *>(mask_at(first_token, page));
    }

    __device__ void load_pool() {
        const ExactRows pool{ExactRows::POOL, 0, layer.pool_rows};
        for (uint32_t i = threadIdx.x; i < layer.pool_rows; i += 32 * n_warps) pooled[i] = pool.cell(p, tile.head, i);
    }
    // Takes the bits of cells that the pool has.
    __device__ void hide_pooled(uint32_t page, Look &look) {
        for (uint32_t from = 0; from < layer.pool_rows; from += 32) {
            const int cell = from + lane < layer.pool_rows ? pooled[from + lane] : -1;
            for (uint32_t members = __ballot_sync(FULL, cell >= 0 && uint32_t(cell) / PAGE == page); members != 0; members &= members - 1) {
                const uint32_t at = uint32_t(__shfl_sync(FULL, cell, __ffs(members) - 1)) % PAGE;
                if (lane == at / 32) look.word &= ~(1u << at % 32);
            }
        }
    }

    // Whether all cells of the page are to be read and the mask adds nothing to any.
    __device__ bool is_plain(uint32_t page, const Look &look) {
        bool plain = (lane >= BLOCKS || look.word == ~0u) && page * PAGE + PAGE <= p.n_kv;
        if (plain && p.mask != nullptr && 4 * lane < PAGE) {
            const bool ahead = has_mask_ahead(page);
            if (ahead) plain = (look.mask.x | look.mask.y) == 0;
            for (uint32_t token = first_token + (ahead ? 1 : 0); token <= last_token; token++) {
                const uint8_t *at = mask_at(token, page);
                plain &= p.mask_is_f16 ? is_zero(at) : is_zero(at) && is_zero(at + 8);
            }
        }
        return __all_sync(FULL, plain);
    }

    // Where this lane's columns have their mask, what it is multiplied with; columns without a query row see nothing.
    size_t mask_row[2];
    float slope[2];
    __device__ void prepare_mask() {
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const bool is_row = column(c) < tile.n_rows;
            mask_row[c] = is_row ? tile.token(p, column(c)) * p.mask_stride_token : ~size_t(0);
            slope[c] = is_row ? slopes[column(c)] * LOG2E : 0.f;
        }
    }
    // Mask and slope; `cell` < 0: hidden. No branch that lanes may take apart: loads are to go out together.
    __device__ __forceinline__ float masked(float score, int cell, int c) {
        const bool is_seen = uint32_t(cell) < p.n_kv && mask_row[c] != ~size_t(0);
        const size_t at = is_seen ? mask_row[c] + uint32_t(cell) : 0;
        float m = 0.f;
        if (p.mask != nullptr)
            m = p.mask_is_f16 ? half_to_float(__ldg(reinterpret_cast<const uint16_t *>(p.mask) + at)) : __ldg(reinterpret_cast<const float *>(p.mask) + at);
        return is_seen && m != -infinity() ? score + slope[c] * m : -infinity();
    }
    // softcap * tanh(score / softcap), in octaves.
    __device__ __forceinline__ float capped(float score) {
        const float e = power_of_two(score * (2.f * LOG2E / p.softcap));
        return p.softcap * LOG2E * (1.f - 2.f / (1.f + e));
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
        const uint32_t k_bytes = at.get(4), v_base = at.get(5) & 255;
        const uint8_t header[4] = {uint8_t(k_bytes), uint8_t(k_bytes >> 8), uint8_t(k_bytes >> 16), uint8_t(k_bytes >> 24)};
        copy_wait<1>();
        Words words;
        float base[2];
        if (is_grouped()) {
            words = Words::of(Segments::uniform(key_width(), key_segments()), key_segments());
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
        multiply<BLOCKS, true, (KEYS > CHANNEL)>(words, k_page, coefs, c);
#pragma unroll
        for (uint32_t b = 0; b < BLOCKS; b++) {
            const uint32_t codes = is_grouped() ? *reinterpret_cast<const uint32_t *>(k_page + swizzle(k.steps + 32 * b + 4 * quad)) : 0;
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
                        if (is_grouped()) s = step * (s + offset[e]);
                        score[b][j][i][e] = s + base[e];
                    }
                }
        }
        __syncwarp();
        uint32_t next = candidate;
        if (!__any_sync(FULL, candidate_bits != 0)) next = next_page(candidate + stride, end, stride);
        if (next != ~0u) fetch(k_target, k_region, k, next);
        copy_commit();
        Look now = at;
        if (layer.pool_rows > 0) hide_pooled(page, now);
        if (next != ~0u) look(next, at);
        const auto each = [&](auto f) {
#pragma unroll
            for (uint32_t b = 0; b < BLOCKS; b++)
#pragma unroll
                for (int j = 0; j < TILES; j++)
#pragma unroll
                    for (int i = 0; i < 2; i++)
#pragma unroll
                        for (int e = 0; e < 2; e++) f(b, j, i, e);
        };
        if (p.softcap > 0.f) each([&](uint32_t b, int j, int i, int e) { score[b][j][i][e] = capped(score[b][j][i][e]); });
        if (!is_plain(page, now)) {
            uint32_t bits[BLOCKS];
#pragma unroll
            for (uint32_t b = 0; b < BLOCKS; b++) bits[b] = now.get(b);
            each([&](uint32_t b, int j, int i, int e) {
                const uint32_t token = token_of(j, i);
                const int cell = bits[b] >> token & 1 ? int(page * PAGE + 32 * b + token) : -1;
                score[b][j][i][e] = masked(score[b][j][i][e], cell, e);
            });
        }
        each([&](uint32_t b, int j, int i, int e) { most[e] = fmaxf(most[e], score[b][j][i][e]); });
        max_of_columns(most);
        move_reference(most);
        copy_wait<1>();
        float weight[2], sums[2] = {}, step_sums[2] = {};
        // Of 64 tokens, codes of 3 bits have two words of single bits, read as a pair.
        constexpr bool UNEVEN = PAGE / 16 % 8 != 0;
        const bool three = value_width() == 3;
        const float place = value_width() == 4 ? (quad % 2 ? 1.f / 16.f : 1.f) : power(127 - 2 * (quad % 4)), high = power(127 + 2 - quad + (UNEVEN ? quad / 4 * 4 : 0));
        uint8_t *put_at = weights + column(0) * p.weight_bytes + 8 * quad;
        // Steps relative to the page's largest possible one.
        const uint32_t step_base = 127 - 16;
        const float step_scale = LIFT * place, above = three ? high / place : 0.f;
#pragma unroll
        for (uint32_t b = 0; b < BLOCKS; b++) {
            const uint32_t codes = *reinterpret_cast<const uint32_t *>(v_page + swizzle(v.steps + 32 * b + 4 * quad));
#pragma unroll
            for (int j = 0; j < TILES; j++) {
                const int s = TWICE ? t / 2 : j;
                float step[2];
#pragma unroll
                for (int i = 0; i < 2; i++) step[i] = scale_decode(codes >> 8 * (s + 2 * i) & 255, step_base) * step_scale;
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float x[2];
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const float q = power_of_two(score[b][j][i][e] - most[e]);
                        sums[e] += q;
                        x[i] = q * step[i];
                        step_sums[e] += x[i];
                    }
                    uint8_t *at = put_at + e * p.weight_bytes + 64 * b + 4 * s;
                    *reinterpret_cast<uint32_t *>(at) = pack_halves(x[0], x[1]);
                    if (three) *reinterpret_cast<uint32_t *>(at + 2 * PAGE) = pack_halves(x[0] * above, x[1] * above);
                }
            }
        }
        // A step is 2^(base - step_base) times what it was taken for.
        const float step_unit = power(min(v_base + 16u, 254u)) / LIFT;
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const float factor = power_of_two(most[e] - reference[e]);
            sum[e] += factor * sums[e];
            steps[e] += factor * step_unit / place * step_sums[e];
            weight[e] = factor * step_unit * 16777216.f;
        }
        __syncwarp();
        const Words values = Words::of(Segments::uniform(value_width(), PAGE / 16), PAGE / 16);
        const uint8_t *b = weights + (TWICE ? g % 4 : g) * p.weight_bytes;
        float o[DIM_V / 32][2][4] = {};
        multiply<DIM_V / 32, UNEVEN, VALUES != 0>(values, v_page, b, o);
#pragma unroll
        for (int block = 0; block < DIM_V / 32; block++) {
#pragma unroll
            for (int j = 0; j < 2; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) acc[block][j][i] += o[block][j][i] * weight[i % 2];
        }
        __syncwarp();
        if (next != ~0u) fetch(v_target, v_region, v, next);
        copy_commit();
        return next;
    }

    // ---- exact rows ----

    // After the pages, so that what they need is not kept through all of those.
    struct Exact {
        float of[ROWS][4] = {};  // channels 4 * lane to 4 * lane + 3, relative to `reference`
        float reference[2] = {DEAD, DEAD};
        bool any = false;
    };

    // Makes the sums of exact rows relative to the reference as it is now.
    __device__ void follow_reference(Exact &exact) {
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            // Lane r / 2 has column r as its number r % 2.
            const float factor = __shfl_sync(FULL, power_of_two(exact.reference[r % 2] - reference[r % 2]), r / 2);
#pragma unroll
            for (int i = 0; i < 4; i++) exact.of[r][i] *= factor;
        }
        exact.reference[0] = reference[0], exact.reference[1] = reference[1];
    }

    __device__ void attend_exact(const ExactRows &rows, uint32_t first, uint32_t n, Exact &exact) {
        const uint32_t dim = k.head_dim;
        exact.any = true;
        // Operand A: rows g and g + 8, 8 channels a lane. What memory has to give is asked for at once, before it is known who
        // sees it: rows that hold nothing are hidden, or not added up.
        const bool is_stored = rows.kind != ExactRows::CURRENT, has_value = 4 * lane < uint32_t(DIM_V);
        uint4 keys[4][2];
        if (is_stored) {
#pragma unroll
            for (uint32_t i = 0; i < 4; i++)
#pragma unroll
                for (uint32_t half = 0; half < 2; half++) {
                    const bool is_there = 32 * i < dim && g + 8 * half < n;
                    keys[i][half] = is_there ? *reinterpret_cast<const uint4 *>(rows.half_row(k, p.k_mem, tile.head, first + g + 8 * half) + 32 * i + 8 * t) : make_uint4(0, 0, 0, 0);
                }
        }
        const auto cell_of = [&](uint32_t i) { return i < n ? rows.cell(p, tile.head, first + i) : -1; };
        const int own_cell = lane < PIECE ? cell_of(lane) : -1;
        const int cells[2] = {__shfl_sync(FULL, own_cell, g), __shfl_sync(FULL, own_cell, g + 8)};
        const uint32_t seen = __ballot_sync(FULL, own_cell >= 0);
        if (seen == 0) return;
        float c[4] = {};
        const uint16_t *q = halves + (TWICE ? g % 4 : g) * (dim + 8) + 8 * t;
        const auto add = [&](uint32_t at, const uint4 &a, const uint4 &a8) {
            const uint4 b = *reinterpret_cast<const uint4 *>(q + at);
            mma(c, a.x, a8.x, a.y, a8.y, b.x, b.y);
            mma(c, a.z, a8.z, a.w, a8.w, b.z, b.w);
        };
        if (is_stored) {
#pragma unroll
            for (uint32_t i = 0; i < 4; i++)
                if (32 * i < dim) add(32 * i, keys[i][0], keys[i][1]);
        } else {
#pragma unroll 1
            for (uint32_t at = 0; at < dim; at += 32) {
                uint32_t a[2][4] = {};
#pragma unroll 1
                for (uint32_t half = 0; half < 2; half++) {
                    if (g + 8 * half >= n) continue;
#pragma unroll
                    for (uint32_t i = 0; i < 4; i++) {
                        const uint32_t row = first + g + 8 * half, channel = at + 8 * t + 2 * i;
                        const uint32_t pair = pack_halves(rows.key(p, tile.head, row, channel), rows.key(p, tile.head, row, channel + 1));
                        a[0][i] = half ? a[0][i] : pair;
                        a[1][i] = half ? pair : a[1][i];
                    }
                }
                add(at, make_uint4(a[0][0], a[0][1], a[0][2], a[0][3]), make_uint4(a[1][0], a[1][1], a[1][2], a[1][3]));
            }
        }
        float score[2][2], most[2] = {DEAD, DEAD};
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float x = c[2 * i + e] * unit[column(e)] * to_log2;
                if (p.softcap > 0.f) x = capped(x);
                x = masked(x, cells[i], e);
                score[i][e] = x;
                most[e] = fmaxf(most[e], x);
            }
        max_of_columns(most);
        move_reference(most);
        follow_reference(exact);
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
        const auto add_value = [&](uint32_t i, const float (&x)[4]) {
#pragma unroll
            for (int r = 0; r < ROWS; r++)
#pragma unroll
                for (int j = 0; j < 4; j++) exact.of[r][j] += table[i * ROWS + r] * x[j];
        };
        if (has_value && is_stored) {
            // Eight at a time, asked for together.
#pragma unroll 1
            for (uint32_t from = 0; from < PIECE; from += 8) {
                uint2 values[8];
#pragma unroll
                for (uint32_t i = 0; i < 8; i++)
                    values[i] = seen >> (from + i) & 1 ? *reinterpret_cast<const uint2 *>(rows.half_row(v, p.v_mem, tile.head, first + from + i) + 4 * lane) : make_uint2(0, 0);
#pragma unroll
                for (uint32_t i = 0; i < 8; i++) {
                    const uint2 y = values[i];
                    add_value(from + i, {half_to_float(uint16_t(y.x)), half_to_float(uint16_t(y.x >> 16)), half_to_float(uint16_t(y.y)), half_to_float(uint16_t(y.y >> 16))});
                }
            }
        } else if (has_value) {
#pragma unroll 1
            for (uint32_t i = 0; i < n; i++) {
                if (!(seen >> i & 1)) continue;
                float x[4];
#pragma unroll
                for (uint32_t j = 0; j < 4; j++) x[j] = rows.value(p, tile.head, first + i, 4 * lane + j);
                add_value(i, x);
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
    __device__ void leave(Exact &exact) {
        float *out = reinterpret_cast<float *>(own);
        const float centre = 0.5f * float((1u << value_width()) - 1);
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
        if (!exact.any) return;
        follow_reference(exact);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float x[4] = {exact.of[r][0], exact.of[r][1], exact.of[r][2], exact.of[r][3]};
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
        if (has_first) fetch(k_target, k_region, k, first);
        copy_commit();
        if (has_first) fetch(v_target, v_region, v, first);
        copy_commit();
        prefetch_exact();
        prefetch(p.plan + p.plan_at.n_pages[p.view]);
        load_query();
        load_pool();
        Look at{};
        if (has_first) look(first, at);
        __syncthreads();
        prepare_mask();
        const Pieces pieces = Pieces::of(p);
        uint32_t page = first;
        if (!(first < pieces.pages && __any_sync(FULL, lane < BLOCKS && at.word != 0))) {
            page = next_page(first + stride, pieces.pages, stride);
            if (page != ~0u) {
                look(page, at);
                copy_wait<0>();
                fetch(k_target, k_region, k, page);
                copy_commit();
                fetch(v_target, v_region, v, page);
                copy_commit();
            }
        }
        while (page != ~0u) page = __shfl_sync(FULL, attend_page(page, at, pieces.pages, stride), 0);
        copy_wait<0>();
        Exact exact;
        constexpr uint32_t PER = EXACT_ROWS / PIECE;
        for (uint32_t i = first_exact(); i < pieces.exact() * PER; i += stride) {
            const ExactRows rows = ExactRows::of(p, pieces, i / PER);
            const uint32_t from = i % PER * PIECE;
            if (from < rows.n) attend_exact(rows, from, min(PIECE, rows.n - from), exact);
        }
        leave(exact);
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
#pragma unroll 1
        for (uint32_t r = warp; r < ROWS; r += n_warps) {
            float *state = states + (lane * ROWS + r) * STATE;
            const bool is_warp = lane < n_warps;
            const float own_reference = is_warp ? state[0] : DEAD, most = warp_max(own_reference), factor = power_of_two(own_reference - most);
            const float total = warp_sum(is_warp ? factor * state[1] : 0.f);
            if (is_warp) state[2] = factor;
            if (lane == 0) {
                // The query is not needed any more.
                unit[r] = spoiled[r] != 0.f ? 0.f : most;
                slopes[r] = spoiled[r] != 0.f ? not_a_number() : total;
            }
        }
        __syncthreads();
        const auto of_block = [&](uint32_t i) {
            float out = 0.f;
            for (uint32_t w = 0; w < n_warps; w++) out += states[(w * ROWS + i / DIM_V) * STATE + 2] * reinterpret_cast<const float *>(buffers + w * p.shared_warp)[i];
            return out;
        };
        float *joined = query;  // [ROWS][DIM_V] where room was made for it
        if (p.n_splits == 1) {
#pragma unroll 1
            for (uint32_t i = threadIdx.x; i < N; i += 32 * n_warps) joined[i] = of_block(i);
        } else {
#pragma unroll 1
            for (uint32_t i = threadIdx.x; i < N; i += 32 * n_warps) Partial::of(p, tile, ROWS, tile.split, i / DIM_V).output[i % DIM_V] = of_block(i);
            if (threadIdx.x < ROWS) {
                float *sums = Partial::of(p, tile, ROWS, tile.split, threadIdx.x).sums;
                sums[0] = unit[threadIdx.x];
                sums[1] = slopes[threadIdx.x];
            }
            if (!is_last_block(p, tile, flag)) return;
            float *factors = reinterpret_cast<float *>(own - warp * p.shared_warp);  // [row][split]
            for (uint32_t r = warp; r < ROWS; r += n_warps) {
                float most = DEAD, total = 0.f;
                for (uint32_t i = lane; i < p.n_splits; i += 32) most = fmaxf(most, __ldcg(Partial::of(p, tile, ROWS, i, r).sums));
                most = warp_max(most);
                for (uint32_t i = lane; i < p.n_splits; i += 32) {
                    const float *sums = Partial::of(p, tile, ROWS, i, r).sums;
                    const float factor = power_of_two(__ldcg(sums) - most);
                    factors[r * p.n_splits + i] = factor;
                    total += factor * __ldcg(sums + 1);
                }
                total = warp_sum(total);
                if (lane == 0) unit[r] = most, slopes[r] = total;
            }
            __syncthreads();
            // A thread: four channels of every n_slices-th block, loads in flight together.
            constexpr uint32_t QUADS = N / 4;
            const uint32_t threads = 32 * n_warps, n_slices = max(threads / QUADS, 1u);
            float4 *slices = reinterpret_cast<float4 *>(factors + ROWS * 64);
#pragma unroll 1
            for (uint32_t at = threadIdx.x; at < n_slices * QUADS; at += threads) {
                const uint32_t slice = at / QUADS, i = at % QUADS * 4, row = i / DIM_V;
                const float *from = Partial::of(p, tile, ROWS, 0, row).output + i % DIM_V;
                float4 out = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 1
                for (uint32_t first = slice; first < p.n_splits; first += 8 * n_slices) {
                    float4 x[8];
#pragma unroll
                    for (uint32_t c = 0; c < 8; c++) {
                        const uint32_t split = min(first + c * n_slices, p.n_splits - 1);
                        x[c] = __ldcg(reinterpret_cast<const float4 *>(from + split * (ROWS * (DIM_V + 2))));
                    }
#pragma unroll
                    for (uint32_t c = 0; c < 8; c++) {
                        const uint32_t split = first + c * n_slices;
                        const float factor = split < p.n_splits ? factors[row * p.n_splits + split] : 0.f;
                        out.x += factor * x[c].x, out.y += factor * x[c].y, out.z += factor * x[c].z, out.w += factor * x[c].w;
                    }
                }
                slices[at] = out;
            }
            __syncthreads();
#pragma unroll 1
            for (uint32_t at = threadIdx.x; at < QUADS; at += threads) {
                float4 out = slices[at];
                for (uint32_t c = 1; c < n_slices; c++) {
                    const float4 x = slices[at + c * QUADS];
                    out.x += x.x, out.y += x.y, out.z += x.z, out.w += x.w;
                }
                *reinterpret_cast<float4 *>(joined + 4 * at) = out;
            }
        }
        __syncthreads();
#pragma unroll 1
        for (uint32_t r = warp; r < tile.n_rows; r += n_warps) {
            float x[4] = {};
            const bool has = 4 * lane < uint32_t(DIM_V);
            if (has) {
                const float4 y = *reinterpret_cast<const float4 *>(joined + r * DIM_V + 4 * lane);
                x[0] = y.x, x[1] = y.y, x[2] = y.z, x[3] = y.w;
            }
            if (v.rotate) rotate(x);
            // References are powers of two.
            const float maximum = unit[r] <= DEAD ? -infinity() : unit[r] / LOG2E;
            const Ending end = Ending::of(p, tile.query_head(p, r), maximum, slopes[r]);
            const size_t at = size_t(tile.token(p, r)) * layer.n_heads + tile.query_head(p, r);
            if (has)
                for (uint32_t j = 0; j < 4; j++) p.out[at * DIM_V + 4 * lane + j] = x[j] * end.scale;
            if (lane == 0 && p.lse != nullptr) p.lse[at] = end.lse;
        }
    }
};

}  // namespace kvq

// The kernels are in attend_fast.cu, which reads any of these formats, and attend_known.cu.
#define KVQ_FAST(name, rows, dim, keys, values, page)                  \
    KVQ_KERNEL(name, 384, 1, kvq::AttendParams) {                      \
        KVQ_SHARED(shared);                                            \
        kvq::Fast<rows, dim, keys, values, page>(p, shared).run();     \
    }
