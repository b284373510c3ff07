// Sealing the rows of a block into a page: the twin of src/codec/smooth.rs and of `seal` in src/codec/*/scalar.rs.
#pragma once
#include "decode.cuh"

namespace kvq::store {

// How far a cell's row has moved since its page was sealed, asked by a warp.
__device__ __forceinline__ int distance_of(const Store &b, uint32_t page, uint32_t at) {
    const StoreStep &p = b.p;
    const uint32_t n_turns = uint32_t(b.plan(p.plan_at.n_turns)), n_ints = 2 + p.layer.page / 32;
    int distance = 0;
    for (uint32_t i = b.lane; i < n_turns; i += 32) {
        const int *turn = p.plan + p.plan_at.turns + i * n_ints;
        if (uint32_t(turn[0]) == page && (uint32_t(turn[2 + at / 32]) >> at % 32 & 1)) distance = turn[1];
    }
    // A cell is in one turn at most.
    for (uint32_t o = 16; o > 0; o /= 2) distance |= __shfl_xor_sync(FULL, distance, o);
    return distance;
}

// Turns a key by a distance, or back (`sign` -1); see src/rotation.rs. By a warp, ends with a barrier of it.
__device__ __forceinline__ void turn_row(const Store &b, float *row, int distance, float sign, uint32_t dim) {
    if (distance == 0) return;
    const RotationDesc &rotation = b.p.rotation;
    for (uint32_t pair = b.lane; pair < min(rotation.n_pairs, dim / 2); pair += 32) {
        const Angle angle = angle_of(rotation, pair, distance);
        turn_pair(rotation, row, pair, {angle.cosine, sign * angle.sine});
    }
    __syncwarp();
}

// Turns keys back to where the rows that they join were encoded. Ends with a barrier.
__device__ __forceinline__ void turn_back(const Store &b, uint32_t page, uint32_t dim) {
    for (uint32_t i = b.warp; i < b.s.n_rows; i += STORE_WARPS) {
        turn_row(b, b.row(i), distance_of(b, page, b.s.at[i]), -1.f, dim);
    }
    __syncthreads();
}

// The row of the pool that belongs to a cell, or NONE; asked by a warp.
__device__ __forceinline__ uint32_t find_member(const Store &b, const Side &side, uint32_t cell) {
    uint32_t found = NONE;
    for (uint32_t i = b.lane; i < b.p.layer.pool_rows; i += 32) {
        if (side.pool_table()[i] == cell + 1) found = min(found, i);
    }
    for (uint32_t o = 16; o > 0; o /= 2) found = min(found, __shfl_xor_sync(FULL, found, o));
    return found;
}

// Reads a row that the page keeps as it is now, from the pool's row `member` if it has one. By a warp.
template <bool FRAMES> __device__ __forceinline__ void read_from_page(const Store &b, const Target &t, uint32_t page, uint32_t i, uint32_t member) {
    const uint32_t dim = t.side.desc.head_dim;
    // Zeros stand there, other lanes' as well.
    __syncwarp();
    if (member != NONE) {
        for (uint32_t c = b.lane; c < dim; c += 32) b.row(i)[c] = half_to_float(t.side.pool_row(member)[c]);
    } else {
        decode_row<FRAMES>(b.p.layer, t.side.desc, {t.header, t.bytes}, b.s.at[i], t.is_key, b.lane, b.row(i));
        if (t.is_key && b.p.rotation.n_pairs > 0) turn_row(b, b.row(i), distance_of(b, page, b.s.at[i]), 1.f, dim);
    }
    __syncwarp();
    for (uint32_t c = b.lane; c < dim; c += 32) b.row(i)[c] = finite(b.row(i)[c]);
}

// The row that a record takes from a slot or from the ubatch; zeros for one that the page keeps.
__device__ __forceinline__ RowAt source_row(const Store &b, const Side &side, int source) {
    if (source == KEPT) return {nullptr, false};
    const uint32_t i = uint32_t(source), n_slots = b.p.layer.n_slots;
    if (i < n_slots) return {side.slot(i), true};
    return {side.current + size_t(i - n_slots) * side.stride_token, false};
}

// Copies the page's rows together; where they go is not known yet. Ends with a barrier.
template <bool FRAMES> __device__ __forceinline__ void gather(const Store &b, const Target &t, uint32_t page, Seal seal) {
    const Side &side = t.side;
    if (b.thread < b.p.layer.page) b.s.record_of[b.thread] = NONE;
    copy_rows<true>(b, b.s.n_rows, side.desc.head_dim, [&](uint32_t i) { return source_row(b, side, b.s.source[i]); });
    for (uint32_t i = b.warp; seal == Seal::RENEW && i < b.s.n_rows; i += STORE_WARPS) {
        const uint32_t member = find_member(b, side, page * b.p.layer.page + b.s.at[i]);
        if (t.is_key && member != NONE && b.lane == 0) {
            b.s.pooled[i] = uint16_t(member);
            atomicAdd(&b.s.n_exact, 1u);
        }
        if (b.s.source[i] == KEPT) read_from_page<FRAMES>(b, t, page, i, member);
    }
    __syncthreads();
}

// The mean of each channel, to s.mean. Ends with a barrier.
__device__ __forceinline__ void mean_of_rows(const Store &b, uint32_t dim) {
    if (b.thread < dim) {
        float sum = 0.f;
#pragma unroll 8
        for (uint32_t i = 0; i < b.s.n_rows; i++) sum += b.row(i)[b.thread];
        b.s.mean[b.thread] = sum * (1.f / float(max(b.s.n_rows, 1u)));
    }
    __syncthreads();
}

// A fresh page starts from zero. Ends with a barrier.
__device__ __forceinline__ void clear_page(const Store &b, const Target &t) {
    for (uint32_t i = b.thread; i < t.side.desc.page_bytes / 4; i += STORE_THREADS) reinterpret_cast<uint32_t *>(t.bytes)[i] = 0;
    if (b.thread < 4) t.header[b.thread] = 0;
    __syncthreads();
}

__device__ __forceinline__ int eighths_of_octaves(float x) {
    return int(__float_as_uint(fmaxf(x, __uint_as_float(1u << 23))) >> 20) - (127 << 3);
}

// Fewer rows have no mean and choose no exponents: MIN_ROWS of codec/smooth.rs.
constexpr uint32_t SMOOTH_MIN_ROWS = 8;

// Writes the exponents of a fresh page, given the squares of each channel in s.a. Ends with a barrier.
__device__ __forceinline__ void choose_exponents(const Store &b, const Target &t) {
    Scratch &s = b.s;
    const SideDesc &d = t.side.desc;
    const uint32_t c = b.thread, dim = d.head_dim;
    const float *learned = t.side.learned();
    uint8_t *last = t.side.region + d.learned_end - dim, *exponents = t.bytes + d.exponents;
    int own = 0;
    if (c < dim) {
        const float variance = s.a[c], weight = has_learned(b, t.side) ? learned[c] : 1.f;
        own = min(max((eighths_of_octaves(variance) - eighths_of_octaves(weight) + 16) >> 5, -24), 24);
        const float f = smooth_factor(own), g = smooth_factor(int8_t(last[c]));
        s.a[c] = weight * f * f, s.b[c] = variance / (f * f);
        s.c[c] = weight * g * g, s.d[c] = variance / (g * g);
    }
    __syncthreads();
    if (b.lane == 0 && b.warp < 4) {
        const float *terms = b.warp == 0 ? s.a : b.warp == 1 ? s.b : b.warp == 2 ? s.c : s.d;
        float sum = 0.f;
#pragma unroll 8
        for (uint32_t i = 0; i < dim; i++) sum += terms[i];
        s.totals[b.warp] = sum;
    }
    __syncthreads();
    const bool keeps = s.n_rows < SMOOTH_MIN_ROWS || s.totals[2] * s.totals[3] <= 1.1f * (s.totals[0] * s.totals[1]);
    if (c < dim) {
        exponents[c] = keeps ? last[c] : uint8_t(int8_t(own));
        if (!keeps) last[c] = exponents[c];
    }
    __syncthreads();
}

// Takes mean and factors off the rows and rotates them. Ends with a barrier.
__device__ __forceinline__ void transform_rows(const Store &b, const Target &t) {
    Scratch &s = b.s;
    const SideDesc &d = t.side.desc;
    const uint32_t c = b.thread, dim = d.head_dim;
    if ((d.mean != ABSENT || d.exponents != ABSENT) && c < dim) {
        float mean = 0.f, squares = 0.f;
        if (d.mean != ABSENT) {
            uint16_t *stored = reinterpret_cast<uint16_t *>(t.bytes + d.mean) + c;
            if (t.fresh) *stored = float_to_half(s.n_rows < SMOOTH_MIN_ROWS ? 0.f : s.mean[c]);
            mean = half_to_float(*stored);
        }
#pragma unroll 4
        for (uint32_t i = 0; i < s.n_rows; i++) {
            const float x = b.row(i)[c] - mean;
            b.row(i)[c] = x;
            squares += x * x;
        }
        s.a[c] = squares;
    }
    __syncthreads();
    if (d.exponents != ABSENT) {
        if (t.fresh) choose_exponents(b, t);
        if (c < dim) s.b[c] = smooth_factor(-int(int8_t(t.bytes[d.exponents + c])));
        __syncthreads();
    }
    constexpr uint32_t N = 2;
    for (uint32_t i = b.warp; i < s.n_rows; i += N * STORE_WARPS) {
        for (uint32_t r = 0; r < N && i + r * STORE_WARPS < s.n_rows && d.exponents != ABSENT; r++) {
            for (uint32_t k = b.lane; k < dim; k += 32) b.row(i + r * STORE_WARPS)[k] *= s.b[k];
        }
        if (d.rotate) rotate_rows_exactly<N>((s.n_rows - i + STORE_WARPS - 1) / STORE_WARPS, dim, b.lane, [&](uint32_t r) { return b.row(i + r * STORE_WARPS); });
    }
    __syncthreads();
}

// Calls `f(record, row, n)` for each record with half a warp; both halves of a warp call it, one perhaps with no elements.
template <class F> __device__ __forceinline__ void for_each_row(const Store &b, uint32_t dim, const Team &team, F f) {
    for (uint32_t i = 2 * b.warp; i < b.s.n_rows; i += 2 * STORE_WARPS) {
        const uint32_t record = i + team.first / 16;
        const bool exists = record < b.s.n_rows;
        f(exists ? record : i, b.row(exists ? record : i), exists ? dim : 0);
    }
    __syncthreads();
}

// Replaces the values that lie farthest from the row's mean by that mean and keeps them behind the row, each with its
// channel. Ends with a barrier.
__device__ __forceinline__ void take_outliers(const Store &b, const SideDesc &d) {
    const Team team = Team::of_thread();
    for_each_row(b, d.head_dim, team, [&](uint32_t, float *x, uint32_t n) {
        const float mean = team.sum(x, n, [](float x) { return x; }) / float(n);
        for (uint32_t k = 0; k < d.n_outliers; k++) {
            float most = -1.f;
            uint32_t farthest = MAX_DIM;
            for (uint32_t c = team.lane; c < n; c += 16) {
                if (fabsf(x[c] - mean) > most) most = fabsf(x[c] - mean), farthest = c;
            }
            for (uint32_t o = 8; o > 0; o /= 2) {
                const float other = __shfl_xor_sync(FULL, most, o);
                const uint32_t at = __shfl_xor_sync(FULL, farthest, o);
                if (other > most || (other == most && at < farthest)) most = other, farthest = at;
            }
            __syncwarp();
            if (team.lane == 0 && n > 0) {
                x[n + 2 * k] = x[farthest], x[n + 2 * k + 1] = float(farthest);
                x[farthest] = mean;
            }
            __syncwarp();
        }
    });
}

// The order and widths of a fresh page of codec `adaptive`: s.place, s.segments, and in the page. Ends with a barrier.
__device__ __forceinline__ void choose_places(const Store &b, const Target &t) {
    Scratch &s = b.s;
    const SideDesc &d = t.side.desc;
    const uint32_t page = b.p.layer.page, i = b.thread;
    const Team team = Team::of_thread();
    if (i < page) s.a[i] = d.order == ABSENT ? 1.f : 0.f;
    __syncthreads();
    for_each_row(b, d.head_dim, team, [&](uint32_t record, const float *x, uint32_t n) {
        float spread;
        if (d.symmetric) {
            spread = team.root_mean_square(x, n);
        } else {
            const float2 range = team.range(x, n);
            spread = range.y - range.x;
        }
        const float attention = d.attention ? s.attention[record] : 1.f;
        // 2 sqrt(3): see bounds.rs.
        const float step = t.is_key ? d.bound / attention : 3.4641016f / (sqrtf(float(page)) * attention);
        if (team.lane == 0 && n > 0 && d.order != ABSENT) s.a[s.at[record]] = (spread / step) * (spread / step);
    });
    if (i < page) {
        const uint32_t place = place_in_falling(s.a, i, page);
        s.place[i] = uint8_t(place), s.order[place] = uint8_t(i), s.b[place] = s.a[i];
    }
    __syncthreads();
    share_out(b, s.b, d.segment, d.n_segments, d.budget, d.min_bits);
    if (i < 2) t.header[2 + i] = uint8_t(s.segments[i]);
    if (i < page && d.order != ABSENT) t.bytes[d.order + i] = t.is_key ? s.place[i] : s.order[i];
    __syncthreads();
}

// The same of a page that rows join. Ends with a barrier.
__device__ __forceinline__ void read_places(const Store &b, const Target &t) {
    Scratch &s = b.s;
    const SideDesc &d = t.side.desc;
    const Page page = {t.header, t.bytes};
    const uint32_t n = b.p.layer.page, i = b.thread;
    const Segments segments = Segments::of_header(t.header, d.n_segments, d.budget);
    if (i == 0) s.segments[0] = segments.four, s.segments[1] = segments.three, s.segments[2] = segments.two;
    if (i < n) s.place[i] = uint8_t(i);
    __syncthreads();
    const uint32_t stored = i < n ? page.ordered(d, i, n) : 0;
    if (i < n && t.is_key) s.place[i] = uint8_t(stored);
    if (i < n && !t.is_key) s.place[stored] = uint8_t(i);
    __syncthreads();
}

// The quantizer and the place of each row: both codecs with a step per token.
struct Rows {
    const Store &b;
    const SideDesc &d;
    Segments segments;

    __device__ __forceinline__ uint32_t place(uint32_t record) const {
        const uint32_t token = b.s.at[record];
        return d.codec == CODEC_GROUP ? token : b.s.place[token];
    }
    __device__ __forceinline__ Quantizer quantizer(uint32_t place) const {
        return d.codec == CODEC_GROUP ? Quantizer::of_width(d) : Quantizer::of_bits(d, segments.bits(place / d.segment));
    }
};

// Writes the powers of two that the steps and mid-points of a fresh page are relative to. Ends with a barrier.
__device__ __forceinline__ void choose_bases(const Store &b, const Target &t, const Rows &rows) {
    Scratch &s = b.s;
    const SideDesc &d = t.side.desc;
    const Team team = Team::of_thread();
    if (b.thread < 2) s.most[b.thread] = 0;
    __syncthreads();
    for_each_row(b, d.group, team, [&](uint32_t record, const float *x, uint32_t n) {
        const Quantizer quantizer = rows.quantizer(rows.place(record));
        for (uint32_t g = 0; g < d.n_groups; g++) {
            const Fit fit = quantizer.fit(team, x + g * n, n);
            if (team.lane == 0 && n > 0) raise(s, 0, fit.step), raise(s, 1, fabsf(fit.mid));
        }
    });
    const float step = __uint_as_float(s.most[0]), mid = __uint_as_float(s.most[1]);
    if (b.thread == 0) {
        t.header[0] = uint8_t(d.symmetric ? scale_base(step) : e4m3_base(step));
        if (d.codec == CODEC_GROUP || !d.symmetric) t.header[1] = uint8_t(e4m3_base(mid));
    }
    __syncthreads();
}

// What is missing of the values that take_outliers has kept. One lane for each.
__device__ __forceinline__ void write_outliers(const Target &t, uint32_t page, uint32_t place, const Quantizer &quantizer, const Quantizer::Sealed &sealed, const float *x, uint32_t lane) {
    const SideDesc &d = t.side.desc;
    if (lane >= d.n_outliers) return;
    const float value = x[d.head_dim + 2 * lane];
    const uint32_t channel = uint32_t(x[d.head_dim + 2 * lane + 1]);
    const float coded = sealed.step * quantizer.value(quantizer.code(x[channel], sealed.mid, sealed.inverse)) + sealed.mid;
    t.bytes[d.outliers + lane * page + place] = uint8_t(channel);
    const float missing = fminf(fmaxf(value - coded, -65504.f), 65504.f);
    reinterpret_cast<uint16_t *>(t.bytes + d.outliers + (d.n_outliers + 2 * lane) * page)[place] = float_to_half(missing);
}

// Codes every row, in its own place, and writes steps and mid-points. Ends with a barrier.
__device__ __forceinline__ void code_rows(const Store &b, const Target &t, const Rows &rows) {
    const SideDesc &d = t.side.desc;
    const Team team = Team::of_thread();
    const uint32_t page = b.p.layer.page;
    for_each_row(b, d.group, team, [&](uint32_t record, float *row, uint32_t n) {
        const uint32_t place = rows.place(record);
        const Quantizer quantizer = rows.quantizer(place);
        for (uint32_t g = 0; g < d.n_groups; g++) {
            const float *x = row + g * n;
            const Quantizer::Sealed sealed = quantizer.seal(team, x, n, t.header);
            if (team.lane == 0 && n > 0) {
                t.bytes[d.steps + g * page + place] = uint8_t(sealed.step_byte);
                if (!d.symmetric) t.bytes[d.mids + g * page + place] = uint8_t(sealed.mid_byte);
            }
            if (n > 0) write_outliers(t, page, place, quantizer, sealed, x, team.lane);
            __syncwarp();
            // Codes are smaller than what they are made of: none reaches a value that is still to be coded.
            for (uint32_t c = team.lane; c < d.group; c += 16) {
                const uint32_t code = n > 0 ? quantizer.code(x[c], sealed.mid, sealed.inverse) : 0;
                __syncwarp();
                if (n > 0) reinterpret_cast<uint8_t *>(row)[g * n + c] = uint8_t(code);
            }
            __syncwarp();
        }
    });
}

// Quads of records' codes, for tiles whose lanes are tokens (or their places) and for those whose depth they are.
__device__ __forceinline__ Quad quad_of_lane(const Store &b, uint32_t token, uint32_t channel) {
    const uint32_t record = b.s.record_of[token];
    if (record == NONE) return {0, 0};
    return {*reinterpret_cast<const uint32_t *>(b.codes(record) + channel), ~0u};
}
__device__ __forceinline__ Quad quad_of_depth(const Store &b, uint32_t first_token, uint32_t channel) {
    Quad quad = {0, 0};
    for (uint32_t j = 0; j < 4; j++) {
        const uint32_t record = b.s.record_of[first_token + j];
        if (record == NONE) continue;
        quad.codes |= uint32_t(b.codes(record)[channel]) << 8 * j;
        quad.is_set |= 255u << 8 * j;
    }
    return quad;
}

__device__ __forceinline__ void pack_rows(const Store &b, const Target &t, const Segments &segments) {
    const SideDesc &d = t.side.desc;
    const uint32_t page = b.p.layer.page;
    if (d.codec == CODEC_GROUP) {
        for (uint32_t g = 0; g < d.n_groups; g++) {
            uint8_t *tile = t.bytes + g * d.tile_bytes;
            const uint32_t first = g * d.group;
            if (t.is_key) {
                pack_tile(d, tile, page, d.group, b.thread, STORE_THREADS, [&](uint32_t lane, uint32_t q) { return quad_of_lane(b, lane, first + 4 * q); });
            } else {
                pack_tile(d, tile, d.group, page, b.thread, STORE_THREADS, [&](uint32_t lane, uint32_t q) { return quad_of_depth(b, 4 * q, first + lane); });
            }
        }
    } else if (d.codec == CODEC_ADAPTIVE && t.is_key) {
        for (uint32_t i = 0; i < d.n_segments; i++) {
            const uint32_t bits = segments.bits(i);
            pack_mixed(Segments::uniform(bits, d.head_dim / 16), t.bytes + key_block_offset(d, segments, i), 32, bits * d.head_dim / 32, b.thread, STORE_THREADS,
                       [&](uint32_t lane, uint32_t q) { return quad_of_lane(b, 32 * i + lane, 4 * q); });
        }
    } else if (d.codec == CODEC_ADAPTIVE) {
        pack_mixed(segments, t.bytes, d.head_dim, d.tile_words, b.thread, STORE_THREADS, [&](uint32_t lane, uint32_t q) { return quad_of_depth(b, 4 * q, lane); });
    } else {
        pack_mixed(segments, t.bytes, page, d.tile_words, b.thread, STORE_THREADS, [&](uint32_t lane, uint32_t q) { return quad_of_lane(b, lane, 4 * q); });
    }
    __syncthreads();
}

// Codecs `group` and `adaptive`.
__device__ __forceinline__ void seal_tokens(const Store &b, const Target &t) {
    Scratch &s = b.s;
    const SideDesc &d = t.side.desc;
    transform_rows(b, t);
    Rows rows = {b, d, {0, 0, 0}};
    if (d.codec == CODEC_ADAPTIVE) {
        if (d.n_outliers > 0) take_outliers(b, d);
        if (t.fresh) {
            choose_places(b, t);
        } else {
            read_places(b, t);
        }
        rows.segments = {s.segments[0], s.segments[1], s.segments[2]};
    }
    if (t.fresh) choose_bases(b, t, rows);
    if (b.thread < s.n_rows) s.record_of[rows.place(b.thread)] = uint16_t(b.thread);
    code_rows(b, t, rows);
    pack_rows(b, t, rows.segments);
}

}  // namespace kvq::store
