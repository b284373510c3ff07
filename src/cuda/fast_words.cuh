// How the fast kernels read the words of a tile (codec/tile.rs, codec/mixed.rs) as operand A of an MMA, and where the
// coefficients of a quad of the depth, four channels of a key or four tokens of a value, have to lie for that in B.
//
// A lane's word holds fields of four codes, one in each byte. A mask takes a field out where it lies, after a shift that is the
// same for half of the fields or for all of them: codes are read times 16 or 64, single bits times 64 or 128. Whatever a
// code is read times too much, its coefficient is divided by.
#pragma once
#include "mma.cuh"
#include "page.cuh"

namespace kvq {

// How the words of four lanes are read: bits of a field, fields. The last three: words that hold single bits, or lie beside
// such.
enum Reading : uint32_t { TWO_BITS, FOUR_BITS, ONE_BIT, ONE_BIT_PAIR, ONE_BIT_SINGLE };

// What a code of TWO_BITS or FOUR_BITS is read times at least.
constexpr float PLACE = 16.f;

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
    // Words that are not read bit by bit.
    __device__ uint32_t pure() const { return low / 4 * 4; }
    // Bytes of a column of B before those of a word: four for each field.
    __device__ uint32_t at(uint32_t word) const {
        if (native) return 8 * word;
        return word < pure() ? 16 * word : 16 * pure() + 32 * (word - pure());
    }
};

// Where the coefficients of a quad go, and what they are multiplied with. A 4-bit code is two fields of 2 bits unless all codes are
// 4 bits wide, a 3-bit code one of 2 bits and a single bit.
struct Fields {
    struct Field {
        uint32_t at;
        float factor;
        bool twice;  // read bit by bit: the next four bytes as well
    } of[2];
    bool second;

    __device__ static Fields of_quad(const Words &w, uint32_t quad) {
        Fields f{};
        const uint32_t segment = quad / 4;
        if (w.native) {
            f.of[0] = {4 * quad, 1.f, false};
        } else if (segment < w.four) {
            f.second = true;
            for (uint32_t i = 0; i < 2; i++) f.of[i] = two_bits(w, quad / 2, 2 * (quad % 2) + i, i == 0 ? 1.f : 4.f);
        } else {
            const bool has_low = segment < w.four + w.three + w.two, has_bit = !has_low || segment < w.four + w.three;
            if (has_low) f.of[0] = two_bits(w, w.four + segment, quad % 4, 1.f);
            if (has_bit) {
                const uint32_t odd = segment - w.four - (has_low ? 0 : w.two), bit = odd % 2 * 4 + quad % 4, word = w.low + odd / 2;
                f.of[has_low ? 1 : 0] = {w.at(word) + 4 * bit, (has_low ? 4.f : 1.f) * (bit % 2 ? PLACE / 128.f : PLACE / 64.f), false};
            }
            f.second = has_low && has_bit;
        }
        return f;
    }
    // A field of 2 bits whose codes are worth `worth`.
    __device__ static Field two_bits(const Words &w, uint32_t word, uint32_t field, float worth) {
        if (word >= w.pure()) return {w.at(word) + 8 * field, worth * (PLACE / 64.f), true};
        return {w.at(word) + 4 * field, field % 2 ? worth * (PLACE / 64.f) : worth, false};
    }
};

// Sums of products of 16-row tiles: [8 columns][block of 32 lanes][rows 4 q + j and 4 q + j + 2 of a quad q].
template <int TILES, int BLOCKS> using Sums = int[TILES][BLOCKS][2][4];

// sums += the products of the words of four lanes, read as FIELDS fields of BITS bits; `b`: the fields' coefficients in this
// lane's column of each tile.
template <int BITS, int FIELDS, int TILES, int BLOCKS>
__device__ __forceinline__ void multiply_fields(const uint8_t *page, uint32_t first, uint32_t quad, uint32_t word, uint32_t n_words, uint32_t shift, const uint8_t *b, uint32_t tile_bytes,
                                                Sums<TILES, BLOCKS> &sums) {
    uint32_t coefs[TILES][FIELDS];
#pragma unroll
    for (int n = 0; n < TILES; n++) {
        const uint8_t *from = b + n * tile_bytes;
        if (FIELDS == 2) {
            const uint2 x = *reinterpret_cast<const uint2 *>(from);
            coefs[n][0] = x.x, coefs[n][1] = x.y;
        } else {
#pragma unroll
            for (int i = 0; i < FIELDS; i += 4) {
                const uint4 x = *reinterpret_cast<const uint4 *>(from + 4 * i);
                coefs[n][i] = x.x, coefs[n][i + 1] = x.y, coefs[n][i + 2] = x.z, coefs[n][i + 3] = x.w;
            }
        }
    }
#pragma unroll
    for (int block = 0; block < BLOCKS; block++) {
        const uint32_t row = word + (first + block) * n_words;
        const uint4 codes = *reinterpret_cast<const uint4 *>(page + row * 128 + ((quad ^ (row & 7)) << 4));
        const uint32_t x[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
        for (int f = 0; f < FIELDS; f += 2) {
            // The places of the two fields after the shift, of which bits of other fields are masked away.
            constexpr uint32_t FIRST = BITS == 4 ? 0xf0f0f0f0 : BITS == 2 ? 0x30303030 : 0x40404040;
            constexpr uint32_t SECOND = BITS == 4 ? 0xf0f0f0f0 : BITS == 2 ? 0xc0c0c0c0 : 0x80808080;
            uint32_t first[4], second[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                if (BITS == 4) {
                    first[j] = x[j] << 4 & FIRST, second[j] = x[j] & SECOND;
                } else {
                    const uint32_t y = BITS == 2 ? (f == 0 ? x[j] << 4 : x[j]) : x[j] >> shift << (6 - f);
                    first[j] = y & FIRST, second[j] = y & SECOND;
                }
            }
#pragma unroll
            for (int n = 0; n < TILES; n++)
#pragma unroll
                for (int j = 0; j < 2; j++) mma(sums[n][block][j], first[j], first[j + 2], second[j], second[j + 2], coefs[n][f], coefs[n][f + 1]);
        }
    }
}

// Those of four words. UNEVEN: their number may be no multiple of four.
template <bool UNEVEN, int TILES, int BLOCKS>
__device__ __forceinline__ void multiply_group(const Words &w, uint32_t group, const uint8_t *page, uint32_t first, uint32_t quad, const uint8_t *b, uint32_t tile_bytes, Sums<TILES, BLOCKS> &sums) {
    const Reading reading = w.reading(group);
    const uint32_t t = threadIdx.x % 4, own = 4 * group + t;
    // A fourth lane without a word reads another one, and has coefficients of zero.
    const uint32_t word = min(own, w.n - 1);
    if (reading == TWO_BITS) multiply_fields<2, 4, TILES, BLOCKS>(page, first, quad, word, w.n, 0, b + w.at(own), tile_bytes, sums);
    else if (reading == FOUR_BITS) multiply_fields<4, 2, TILES, BLOCKS>(page, first, quad, word, w.n, 0, b + w.at(own), tile_bytes, sums);
    else if (reading == ONE_BIT) multiply_fields<1, 8, TILES, BLOCKS>(page, first, quad, word, w.n, 0, b + w.at(own), tile_bytes, sums);
    else if (!UNEVEN) return;
    else if (reading == ONE_BIT_PAIR) multiply_fields<1, 4, TILES, BLOCKS>(page, first, quad, 4 * group + t / 2, w.n, 4 * (t % 2), b + w.at(4 * group + t / 2) + 16 * (t % 2), tile_bytes, sums);
    else multiply_fields<1, 2, TILES, BLOCKS>(page, first, quad, 4 * group, w.n, 2 * t, b + w.at(4 * group) + 8 * t, tile_bytes, sums);
}

// The same for all words of BLOCKS blocks of 32 lanes of a tile, from block `first` on. KNOWN: how words are read is known when this is compiled.
template <bool UNEVEN, bool KNOWN, int TILES, int BLOCKS>
__device__ __forceinline__ void multiply(const Words &w, const uint8_t *page, uint32_t first, uint32_t quad, const uint8_t *b, uint32_t tile_bytes, Sums<TILES, BLOCKS> &sums) {
    if (KNOWN) {
#pragma unroll
        for (uint32_t group = 0; group < 4; group++)
            if (group < w.groups()) multiply_group<UNEVEN>(w, group, page, first, quad, b, tile_bytes, sums);
    } else {
#pragma unroll 1
        for (uint32_t group = 0; group < w.groups(); group++) multiply_group<UNEVEN>(w, group, page, first, quad, b, tile_bytes, sums);
    }
}

}  // namespace kvq
