// Rows of cells as FP16 for the formats that matter, a row a thread: see dequantize.cu, which takes all others. To the bit what
// decode.cuh makes of them.
#pragma once
#include "attend.cuh"
#include "decode.cuh"

namespace kvq {

// What a kernel reads: keys or values of codec `group` with one symmetric step a token and codes of 2 to 4 bits, or keys of codec `channel`.
enum class Rows { KEYS, VALUES, CHANNELS };

// A side of a layer, heads of DIM channels. A warp has 32 cells of a page, none of which has moved.
template <int DIM, Rows KIND> struct DequantizeRows {
    static constexpr bool IS_KEY = KIND != Rows::VALUES;
    static constexpr uint32_t QUADS = DIM / 4;
    // Words of a finished row in shared memory, and floats of one on its way: odd numbers, so that lanes do not meet in a bank.
    static constexpr uint32_t ROW_WORDS = DIM / 2 + 1, ROW_FLOATS = DIM + 1;

    // What a place of codec `channel` becomes.
    struct alignas(16) Place {
        float step, mid;
        uint32_t channel, unused;
    };

    const DequantizeParams &d;
    const AttendStep p;
    const SideDesc &side;
    const uint32_t head, lane, chunk;
    uint32_t *rows;                // [32][ROW_WORDS], or floats, [32][ROW_FLOATS]
    float *factors, *means;        // [DIM]
    float *steps;                  // of values: [32]
    Place *places;                 // of codec `channel`: [DIM]

    __device__ DequantizeRows(const DequantizeParams &params, uint8_t *shared)
        : d(params), p(params.read), side(IS_KEY ? p.layer.k : p.layer.v), head(blockIdx.x), lane(threadIdx.x % 32),
          chunk(DEQUANTIZE_ROWS_WARPS * blockIdx.y + threadIdx.x / 32) {
        float *const tables = reinterpret_cast<float *>(shared + threadIdx.x / 32 * d.shared_warp);
        places = reinterpret_cast<Place *>(tables);
        factors = tables, means = tables + DIM, steps = tables + 2 * DIM;
        rows = reinterpret_cast<uint32_t *>(tables + 4 * DIM);
    }

    __device__ uint32_t *out(uint32_t cell) const {
        return reinterpret_cast<uint32_t *>(d.rows + ((size_t(blockIdx.z) * p.layer.n_kv_heads + head) * p.n_kv + cell) * DIM);
    }

    // Four codes, a byte each, less `centre`: a code is put into the low bits of a float of which it is a small part.
    __device__ static void floats_of(uint32_t codes, float centre, float (&x)[4]) {
        constexpr uint32_t MASK = 15;
        const uint32_t low = codes << 1, high = codes >> 15;
#pragma unroll
        for (uint32_t j = 0; j < 4; j++) {
            const uint32_t at = 1 + 8 * (j % 2);
            const float base = float(1u << (23 - at));
            x[j] = __uint_as_float(((j < 2 ? low : high) & MASK << at) | __float_as_uint(base)) - (base + centre);
        }
    }

    // Codes times steps of a lane's row.
    template <int WIDTH> __device__ void decode_keys(const Page &page, uint32_t first_token, float (&x)[DIM]) const {
        const uint32_t *words = reinterpret_cast<const uint32_t *>(page.bytes) + first_token * side.tile_words + lane;
        const float step = page.step(side, first_token + lane), centre = centre_of(WIDTH, false);
#pragma unroll
        for (uint32_t q = 0; q < QUADS; q++) {
            float code[4];
            floats_of(store::tile_quad(WIDTH, words, DIM, 0, q), centre, code);
#pragma unroll
            for (uint32_t j = 0; j < 4; j++) x[4 * q + j] = step * code[j] + 0.f;
        }
    }

    // The same; a lane of their tiles is a channel.
    template <int WIDTH> __device__ void decode_values(const Page &page, uint32_t first_token, float (&x)[DIM]) const {
        float *const floats = reinterpret_cast<float *>(rows);
        const float centre = centre_of(WIDTH, false);
        steps[lane] = page.step(side, first_token + lane);
        __syncwarp();
#pragma unroll 1
        for (uint32_t block = 0; block < DIM / 32; block++) {
            const uint32_t *words = reinterpret_cast<const uint32_t *>(page.bytes) + block * side.tile_words * 32 + lane;
#pragma unroll
            for (uint32_t q = 0; q < 8; q++) {
                float code[4];
                floats_of(store::tile_quad(WIDTH, words, p.layer.page, first_token / 4, q), centre, code);
                const float4 step = *reinterpret_cast<const float4 *>(steps + 4 * q);
                const float of[4] = {step.x, step.y, step.z, step.w};
#pragma unroll
                for (uint32_t j = 0; j < 4; j++) floats[(4 * q + j) * ROW_FLOATS + 32 * block + lane] = of[j] * code[j] + 0.f;
            }
        }
        __syncwarp();
#pragma unroll
        for (uint32_t c = 0; c < DIM; c++) x[c] = floats[lane * ROW_FLOATS + c];
        __syncwarp();
    }

    template <int WIDTH> __device__ void decode(const Page &page, uint32_t first_token, float (&x)[DIM]) const {
        if constexpr (IS_KEY) decode_keys<WIDTH>(page, first_token, x);
        else decode_values<WIDTH>(page, first_token, x);
    }

    // What rows went through before they were coded, see transform_back.
    __device__ void transform_back(const Page &page, float (&x)[DIM]) const {
        if (side.rotate) {
#pragma unroll
            for (uint32_t half = DIM / 2; half > 0; half /= 2)
#pragma unroll
                for (uint32_t i = 0; i < DIM / 2; i++) {
                    const uint32_t a = 2 * i - (i & (half - 1));
                    const float left = x[a], right = x[a + half];
                    x[a] = left + right;
                    x[a + half] = left - right;
                }
            const float norm = 1.f / sqrtf(float(DIM));
#pragma unroll
            for (uint32_t c = 0; c < DIM; c++) x[c] *= norm;
        }
        const bool has_factors = side.exponents != ABSENT, has_mean = side.mean != ABSENT;
        for (uint32_t c = lane; c < DIM; c += 32) {
            if (has_factors) factors[c] = page.factor(side, c);
            means[c] = has_mean ? page.mean(side, c) : 0.f;
        }
        __syncwarp();
        if (has_factors) {
#pragma unroll
            for (uint32_t c = 0; c < DIM; c++) x[c] *= factors[c];
        }
#pragma unroll
        for (uint32_t c = 0; c < DIM; c++) x[c] += means[c];
    }

    // Leaves a lane's row for write_out.
    __device__ void put_row(bool is_held, const float (&x)[DIM]) const {
#pragma unroll
        for (uint32_t i = 0; i < DIM / 2; i++) {
            const uint32_t halves = pack_halves(finite(x[2 * i]), finite(x[2 * i + 1]));
            rows[lane * ROW_WORDS + i] = is_held ? halves : 0;
        }
    }

    // Codec `channel`: the same from the codes on.
    __device__ void decode_channels(const Page &page, uint32_t first_token, bool is_held) const {
        for (uint32_t i = lane; i < DIM; i += 32) places[i] = {page.step(side, i), page.mid(side, i), page.ordered(side, i, DIM), 0};
        __syncwarp();
        const Segments segments = Segments::of_header(page.header, side.n_segments, side.budget);
        const uint32_t *words = reinterpret_cast<const uint32_t *>(page.bytes) + first_token * side.tile_words + lane;
        uint16_t *const row = reinterpret_cast<uint16_t *>(rows + lane * ROW_WORDS);
#pragma unroll 1
        for (uint32_t q = 0; q < QUADS; q++) {
            float code[4];
            floats_of(store::mixed_quad(segments, words, q / 4, q % 4), centre_of(segments.bits(q / 4), false), code);
#pragma unroll
            for (uint32_t j = 0; j < 4; j++) {
                const Place place = places[4 * q + j];
                row[place.channel] = is_held ? float_to_half(finite(place.step * code[j] + place.mid)) : 0;
            }
        }
    }

    // Rows of shared memory to those of the cells, as many as there are.
    __device__ void write_out(uint32_t first) const {
        __syncwarp();
#pragma unroll 4
        for (uint32_t i = 0; i < 32; i++) {
            if (first + i >= p.n_kv) break;
            uint32_t *const to = out(first + i);
            if (2 * lane >= DIM / 2) continue;
            const uint32_t *from = rows + i * ROW_WORDS + 2 * lane;
            *reinterpret_cast<uint2 *>(to + 2 * lane) = make_uint2(from[0], from[1]);
        }
    }

    __device__ void run() const {
        const uint32_t first = 32 * chunk, page = first / p.layer.page, first_token = first % p.layer.page;
        if (first >= p.n_kv) return;
        // Not more pages than the layer has.
        const bool is_planned = page < uint32_t(p.plan[p.plan_at.n_pages[p.view]]);
        const uint32_t held = is_planned ? uint32_t(p.plan[p.plan_at.page_bits[p.view] + chunk]) : 0;
        const bool is_held = held >> lane & 1;
        const Page from = Page::of(side, (IS_KEY ? p.k_mem : p.v_mem) + head * side.head_bytes, page);
        if (held == 0) {
            for (uint32_t i = 0; i < ROW_WORDS; i++) rows[lane * ROW_WORDS + i] = 0;
        } else if constexpr (KIND == Rows::CHANNELS) {
            decode_channels(from, first_token, is_held);
        } else {
            float x[DIM];
            if (side.width == 2) decode<2>(from, first_token, x);
            else if (side.width == 3) decode<3>(from, first_token, x);
            else decode<4>(from, first_token, x);
            transform_back(from, x);
            put_row(is_held, x);
        }
        write_out(first);
    }
};

}  // namespace kvq

#define KVQ_DEQUANTIZE_ROWS(name, dim, kind)                                            \
    KVQ_KERNEL(name, 32 * kvq::DEQUANTIZE_ROWS_WARPS, 12 / kvq::DEQUANTIZE_ROWS_WARPS, kvq::DequantizeParams) { \
        KVQ_SHARED(shared);                                                                      \
        kvq::wait_for_stream();                                                                  \
        kvq::let_next_start();                                                                   \
        kvq::DequantizeRows<dim, kvq::Rows::kind>(p, shared).run();                                \
    }
