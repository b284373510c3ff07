// Of attend_fast.cuh: attending a page.
#pragma once

namespace kvq {

// Asks for a page that cannot be fetched yet.
KVQ_FAST_MEMBER(void)::prefetch_page(uint32_t page) {
    const auto ask = [&](const uint8_t *region, const SideDesc &side) {
        const uint8_t *from = region + side.pages + size_t(page) * side.page_bytes;
#pragma unroll 1
        for (uint32_t at = 128 * lane; at < side.page_bytes; at += 32 * 128) prefetch(from + at);
        if (lane == 0) prefetch(region + side.headers + 4 * size_t(page));
    };
    ask(k_region, k);
    ask(v_region, v);
}

KVQ_FAST_MEMBER(void)::fetch(SharedAt to, const uint8_t *region, const SideDesc &side, uint32_t page) {
    const uint8_t *from = region + side.pages + size_t(page) * side.page_bytes + 16 * lane;
    // Lane l takes pieces l, l + 32, ...: of rows l / 8, l / 8 + 4, ..., whose exchange is one of two.
    const uint32_t even = swizzle(16 * lane), odd = even ^ 64;
#pragma unroll 1
    for (uint32_t at = 16 * lane; at < side.page_bytes; at += 1024, from += 1024, to += 1024) {
        copy_async(to + even, from);
        if (at + 512 < side.page_bytes) copy_async(to + odd + 512, from + 512);
    }
}

// The next page of this block, whether it is seen or not.
KVQ_FAST_MEMBER(uint32_t)::take() {
    uint32_t n = 0;
    if (lane == 0) n = atomicAdd(ticket, 1);
    return tile.split + p.n_splits * __shfl_sync(FULL, n, 0);
}

// The first page from `page` on, of those of this block, that somebody may see; ~0 if there is none.
KVQ_FAST_MEMBER(uint32_t)::next_page(uint32_t page, uint32_t end) {
    while (page < end && !__any_sync(FULL, look_at_bits(page) != 0)) page = take();
    return page < end ? page : ~0u;
}

// Moves the reference up where a maximum needs it.
KVQ_FAST_MEMBER(void)::move_reference(const float (&most)[TILES]) {
    bool moves = false;
#pragma unroll
    for (int n = 0; n < TILES; n++) moves |= most[n] > reference[n] + SLACK;
    if (likely(!__any_sync(FULL, moves))) return;
#pragma unroll
    for (int n = 0; n < TILES; n++) {
        const float next = most[n] > reference[n] + SLACK ? most[n] : reference[n];
        const float factor = power_of_two(reference[n] - next), neighbours = of_neighbour(factor);
        reference[n] = next;
        sum[n] *= factor;
        steps[n] *= factor;
#pragma unroll
        for (int b = 0; b < DIM_V / 32; b++)
#pragma unroll
            for (int j = 0; j < 2; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) acc[n][b][j][i] *= i % 2 ? neighbours : factor;
    }
}

// The largest of each row over all lanes that have it.
KVQ_FAST_MEMBER(void)::max_of_rows(float (&most)[TILES]) {
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
        for (uint32_t o = 4; o < 32; o *= 2) most[n] = fmaxf(most[n], __shfl_xor_sync(FULL, most[n], o));
}

// Moves the second pair of blocks to the place of the first.
KVQ_FAST_MEMBER(void)::move_down(float (&score)[TILES][BLOCKS][4]) {
    if constexpr (BLOCKS > 2) {
#pragma unroll
        for (int n = 0; n < TILES; n++)
#pragma unroll
            for (uint32_t b = 0; b < 2; b++)
#pragma unroll
                for (int i = 0; i < 4; i++) score[n][b][i] = score[n][BLOCKS - 2 + b][i];
    }
}

// Scores of this lane's rows: [..][token 4 quad + i of a block].
KVQ_FAST_MEMBER(void)::score_page(const Words &words, uint32_t step_base, const float (&base)[TILES], float (&score)[TILES][BLOCKS][4]) {
    const uint8_t *coefs = coefficients + g * p.block.coefficient_bytes;
    // What steps are read short of.
    const float step_unit = is_grouped() ? power(min(127u + step_base - 112u, 254u)) : 1.f;
    float times[TILES], plus[TILES];
    for (int n = 0; n < TILES; n++) times[n] = scale[n] * step_unit, plus[n] = offset[n] * step_unit;
    const int mine = half(), others = has_high ? 1 : 256;
    // Two blocks at a time: sums that do not wait for each other, and do not take all registers. Not unrolled, see `unlikely`:
    // each pair goes to the last place.
#pragma unroll 1
    for (uint32_t pair = 0; pair < BLOCKS; pair += 2) {
        move_down(score);
        Sums<TILES, 2> sums = {};
        multiply<true, (KEYS > CHANNEL)>(words, k_page, pair, quad, coefs, 8 * p.block.coefficient_bytes, sums);
#pragma unroll
        for (uint32_t b = 0; b < 2; b++) {
            const uint32_t codes = is_grouped() ? *reinterpret_cast<const uint32_t *>(k_page + swizzle(k.steps + 32 * (pair + b) + 4 * quad)) : 0;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float step = scale_decode_near(codes, i);
#pragma unroll
                for (int n = 0; n < TILES; n++) {
                    const int(&x)[4] = sums[n][b][i % 2];
                    const float c = float(x[i / 2 * 2] * mine + __shfl_xor_sync(FULL, x[i / 2 * 2 + 1], 2) * others);
                    score[n][BLOCKS - 2 + b][i] = (is_grouped() ? step * (times[n] * c + plus[n]) : times[n] * c) + base[n];
                }
            }
        }
    }
}

// Adds a page's values, weighed with the scores.
KVQ_FAST_MEMBER(void)::add_values(float (&score)[TILES][BLOCKS][4], const float (&most)[TILES], uint32_t v_base) {
    // Of 64 tokens, codes of 3 bits have two words of single bits, read as a pair.
    constexpr bool UNEVEN = PAGE / 16 % 8 != 0;
    const bool three = value_width() == 3;
    const Words words = Words::of(Segments::uniform(value_width(), PAGE / 16), PAGE / 16);
    // Where the weights of this lane's quads go: quads of the same parity, which have the same factors.
    const Fields fields = Fields::of_quad(words, quad);
    const auto codes_of = [&](uint32_t block) { return *reinterpret_cast<const uint32_t *>(v_page + swizzle(v.steps + 32 * block + 4 * quad)); };
    // Steps relative to a power of two above the largest of the page, for which each lane looks at four tokens or more.
    const uint32_t some = codes_of(t % BLOCKS), largest = max(max(some & 255, some >> 8 & 255), max(some >> 16 & 255, some >> 24));
    const uint32_t most_exponent = warp_most(largest) >> 4;
    const float relative = UNIT * power(126 + 15 - most_exponent);
    const float low_factor = relative * fields.of[0].factor, high_factor = three ? relative * fields.of[1].factor : 0.f;
    uint8_t *high_at = weights + high_column(own) * p.block.weight_bytes + 4 * quad, *low_at = weights + low_column(own) * p.block.weight_bytes + 4 * quad;
    float sums[TILES] = {};
    uint32_t step_sums[TILES] = {};
#pragma unroll 1
    for (uint32_t pair = 0; pair < BLOCKS; pair += 2, move_down(score)) {
#pragma unroll
        for (uint32_t b = 0; b < 2; b++) {
            const uint32_t codes = codes_of(pair + b);
#pragma unroll
            for (int n = 0; n < TILES; n++) {
                float x[4], y[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float weight = power_of_two(score[n][b][i] - most[n]);
                    sums[n] += weight;
                    x[i] = weight * scale_decode_near(codes, i);
                    y[i] = x[i] * low_factor + AS_INTEGER;
                    step_sums[n] += __float_as_uint(y[i]);
                }
                const auto put = [&](uint32_t at) {
                    const TwoBytes bytes = TwoBytes::of(y);
                    *reinterpret_cast<uint32_t *>(high_at + 8 * n * p.block.weight_bytes + at) = bytes.high;
                    *reinterpret_cast<uint32_t *>(low_at + 8 * n * p.block.weight_bytes + at) = bytes.low;
                };
                put(32 * (pair + b));
                if (three) {
#pragma unroll
                    for (int i = 0; i < 4; i++) y[i] = x[i] * high_factor + AS_INTEGER;
                    put(PAGE + 32 * (pair + b));
                }
            }
        }
    }
    // A step is so much larger than what it was taken for.
    const float step_unit = power(min(v_base + most_exponent + 1u, 254u)) / UNIT;
    float of_own[TILES], of_other[TILES];
#pragma unroll
    for (int n = 0; n < TILES; n++) {
        const float factor = power_of_two(most[n] - reference[n]);
        sum[n] += factor * sums[n];
        steps[n] += factor * step_unit / fields.of[0].factor * float(int(step_sums[n] - 4 * BLOCKS * __float_as_uint(AS_INTEGER)));
        of_own[n] = factor * step_unit / PLACE * float(half());
        of_other[n] = of_neighbour(factor) * step_unit / PLACE * float(half());
    }
    __syncwarp();
    const uint8_t *coefs = weights + g * p.block.weight_bytes;
#pragma unroll
    for (int pair = 0; pair < DIM_V / 32; pair += 2) {
        Sums<TILES, 2> sums_of_pair = {};
        multiply<UNEVEN, VALUES != 0>(words, v_page, pair, quad, coefs, 8 * p.block.weight_bytes, sums_of_pair);
#pragma unroll
        for (int n = 0; n < TILES; n++)
#pragma unroll
            for (int b = 0; b < 2; b++)
#pragma unroll
                for (int j = 0; j < 2; j++)
#pragma unroll
                    for (int i = 0; i < 4; i++) acc[n][pair + b][j][i] += float(sums_of_pair[n][b][j][i]) * (i % 2 ? of_other[n] : of_own[n]);
    }
}

// Attends a page that is on its way, and gives the next one, which then is.
KVQ_FAST_MEMBER(uint32_t)::attend_page(uint32_t page, Look &at, uint32_t end) {
    const uint32_t candidate = take(), candidate_bits = candidate < end ? look_at_bits(candidate) : 0;
    const uint32_t k_bytes = at.get(4), v_base = at.get(5) & 255;
    copy_wait<1>();
    Words words;
    float base[TILES];
    if (is_grouped()) {
        words = Words::of(Segments::uniform(key_width(), key_segments()), key_segments());
        prepare_group(words);
        mean_base(base);
    } else {
        const uint8_t header[4] = {uint8_t(k_bytes), uint8_t(k_bytes >> 8), uint8_t(k_bytes >> 16), uint8_t(k_bytes >> 24)};
        const Segments segments = Segments::of_header(header, k.n_segments, k.budget);
        words = Words::of(segments, k.n_segments);
        prepare_channel(words, segments, header, base);
    }
    float score[TILES][BLOCKS][4];
    score_page(words, k_bytes & 255, base, score);
    __syncwarp();
    uint32_t next = candidate < end ? candidate : ~0u;
    if (unlikely(next != ~0u && !__any_sync(FULL, candidate_bits != 0))) next = next_page(take(), end);
    if (next != ~0u) fetch(shared_at(k_page), k_region, k, next);
    copy_commit();
    Look now = at;
    if (layer.pool_rows > 0) hide_pooled(page, now);
    if (next != ~0u) look(next, at);
    const auto each = [&](auto f) {
#pragma unroll
        for (int n = 0; n < TILES; n++)
#pragma unroll
            for (uint32_t b = 0; b < BLOCKS; b++)
#pragma unroll
                for (uint32_t i = 0; i < 4; i++) f(n, b, i, score[n][b][i]);
    };
    if (unlikely(p.softcap > 0.f)) each([&](int, uint32_t, uint32_t, float &s) { s = capped(s); });
    const bool all_in_page = __all_sync(FULL, lane >= BLOCKS || now.word == ~0u), is_masked = !is_unmasked(page, now);
    if (unlikely(is_masked || !all_in_page)) {
        uint32_t bits[BLOCKS];
#pragma unroll
        for (uint32_t b = 0; b < BLOCKS; b++) bits[b] = now.get(b);
        if (is_masked) {
            each([&](int n, uint32_t b, uint32_t i, float &s) {
                const uint32_t token = 4 * quad + i;
                s = masked(s, bits[b] >> token & 1 ? int(page * PAGE + 32 * b + token) : -1, n);
            });
        } else {
            each([&](int, uint32_t b, uint32_t i, float &s) { s = bits[b] >> (4 * quad + i) & 1 ? s : -infinity(); });
        }
    }
    float most[TILES];
    for (int n = 0; n < TILES; n++) most[n] = DEAD;
    each([&](int n, uint32_t, uint32_t, float &s) { most[n] = fmaxf(most[n], s); });
    max_of_rows(most);
    move_reference(most);
    copy_wait<1>();
    add_values(score, most, v_base);
    __syncwarp();
    if (next != ~0u) fetch(shared_at(v_page), v_region, v, next);
    copy_commit();
    return next;
}

}  // namespace kvq
