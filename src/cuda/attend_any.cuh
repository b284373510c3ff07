// Attention for every layer: any codec, head size, page, number of query rows. Plain float arithmetic, a lane of the tile per
// thread: a token for keys, a channel for values. Where faster kernels exist, it is what they are compared with.
//
// A block has a tile of ROWS query rows of a KV head and every n_splits-th piece of work: pages, then exact rows.
// q [n_tokens][n_heads][head_dim_k] float -> out [n_tokens][n_heads][head_dim_v] float.
#pragma once
#include "attend.cuh"
#include "page.cuh"

namespace kvq {

constexpr uint32_t THREADS = 128, WARPS = THREADS / 32, MAX_POOL = 128;

// Shared memory of a block, floats; cuda/attend.rs adds up the same.
template <int ROWS> struct Shared {
    float *query;     // [ROWS][dim]: as it came, times the scale
    float *turned;    // [ROWS][dim]: turned back by the distance that rows of a page have moved
    float *prepared;  // [ROWS][dim]: what the codes of a page are multiplied with
    float *scores;    // [ROWS][columns]: scores, then softmax weights
    float *weights;   // [ROWS][columns]: what the codes of values are multiplied with; scores by place
    float *maximum, *sum, *factor, *slope, *offset, *total, *spoiled, *changed;  // [ROWS]
    float *table;     // [2][dim]: cosines and sines of a turn; factors
    float *spare;     // [256]
    int *pooled;      // [MAX_POOL]

    __device__ Shared(float *s, uint32_t dim, uint32_t columns) {
        const auto take = [&](uint32_t n) { float *p = s; s += n; return p; };
        query = take(ROWS * dim);
        turned = take(ROWS * dim);
        prepared = take(ROWS * dim);
        scores = take(ROWS * columns);
        weights = take(ROWS * columns);
        maximum = take(ROWS), sum = take(ROWS), factor = take(ROWS), slope = take(ROWS);
        offset = take(ROWS), total = take(ROWS), spoiled = take(ROWS), changed = take(ROWS);
        table = take(2 * dim);
        spare = take(256);
        pooled = reinterpret_cast<int *>(take(MAX_POOL));
    }
};

template <int ROWS> struct Attend {
    const AttendStep &p;
    const LayerDesc &layer;
    const Tile tile;
    Shared<ROWS> s;
    const uint8_t *k_region, *v_region;
    const uint32_t warp, lane, columns;
    float acc[2][ROWS] = {};
    bool is_prepared = false;
    int turned_by = 0;            // what `query` is turned back by
    const float *query;           // what pages are scored with
    Turns turns = {};     // of a page
    uint32_t chosen = 0;  // the one scored now; turns.n: rows that have not moved

    __device__ Attend(const AttendStep &params, float *shared)
        : p(params), layer(params.layer), tile(Tile::of_block(params, ROWS)),
          s(shared, max(layer.k.head_dim, layer.v.head_dim), max(layer.page, 128u)),
          k_region(p.k_mem + tile.head * layer.k.head_bytes), v_region(p.v_mem + tile.head * layer.v.head_bytes),
          warp(threadIdx.x / 32), lane(threadIdx.x % 32), columns(max(layer.page, 128u)) { query = s.query; }

    __device__ void load_query() {
        const uint32_t dim = layer.k.head_dim;
        for (uint32_t r = warp; r < ROWS; r += WARPS) {
            bool is_finite = true;
            const float *q = p.q;
            if (r < tile.n_rows) q += tile.token(p, r) * p.q_stride_token + tile.query_head(p, r) * p.q_stride_head;
            for (uint32_t c = lane; c < dim; c += 32) {
                const float x = r < tile.n_rows ? q[c] * p.scale : 0.f;
                is_finite &= fabsf(x) <= MAX_QUERY;
                s.query[r * dim + c] = x;
            }
            const bool all_finite = __all_sync(FULL, is_finite);
            if (!all_finite) {
                for (uint32_t c = lane; c < dim; c += 32) s.query[r * dim + c] = 0.f;
            }
            if (lane == 0) {
                s.spoiled[r] = all_finite ? 0.f : 1.f;
                s.slope[r] = r < tile.n_rows ? alibi_slope(p, tile.query_head(p, r)) : 0.f;
                s.maximum[r] = -infinity();
                s.sum[r] = 0.f;
            }
        }
        for (uint32_t i = threadIdx.x; i < layer.pool_rows; i += THREADS) {
            const ExactRows pool{ExactRows::POOL, 0, layer.pool_rows};
            s.pooled[i] = pool.cell(p, tile.head, i);
        }
        __syncthreads();
    }

    // Prepares for keys that have moved by a distance: see rotation.rs.
    __device__ void turn_query(int distance) {
        if (distance == turned_by) return;
        turned_by = distance;
        is_prepared = false;
        query = distance == 0 ? s.query : s.turned;
        if (distance == 0) return;
        const RotationDesc &rotation = p.rotation;
        const uint32_t n = rotation.n_pairs, dim = layer.k.head_dim;
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < n; i += THREADS) {
            const Angle angle = angle_of(rotation, i, distance);
            s.table[2 * i] = angle.cosine;
            s.table[2 * i + 1] = angle.sine;
        }
        __syncthreads();
        for (uint32_t r = warp; r < ROWS; r += WARPS) {
            const float *from = s.query + r * dim;
            float *to = s.turned + r * dim;
            for (uint32_t c = 2 * n + lane; c < dim; c += 32) to[c] = from[c];
            for (uint32_t i = lane; i < n; i += 32) {
                const uint32_t a = rotation.interleaved ? 2 * i : i, b = rotation.interleaved ? 2 * i + 1 : i + n;
                const float x = from[a], y = from[b], cosine = s.table[2 * i], sine = s.table[2 * i + 1];
                to[a] = x * cosine + y * sine;
                to[b] = y * cosine - x * sine;
            }
        }
        __syncthreads();
    }

    // Whether a token is among the rows that are scored now.
    __device__ bool is_chosen(uint32_t t) const { return turns.of_token(t) == chosen; }

    // Whether any query row may see a cell of the page.
    __device__ bool is_visible(uint32_t page) {
        const int *bits = p.plan + p.plan_at.page_bits[p.view] + page * (layer.page / 32);
        int any = 0;
        for (uint32_t i = 0; i < layer.page / 32; i++) any |= bits[i];
        return any != 0;
    }

    // Multiplies the query with the page's factors and rotates it, unless that has been done for the same factors.
    __device__ void prepare_rotated(const Page &page) {
        const SideDesc &k = layer.k;
        const uint32_t dim = k.head_dim;
        bool changed = !is_prepared;
        if (k.exponents != ABSENT) {
            for (uint32_t c = threadIdx.x; c < dim; c += THREADS) {
                const float factor = page.factor(k, c);
                changed |= s.table[dim + c] != factor;
            }
            changed = __any_sync(FULL, changed);
            if (lane == 0) s.spare[warp] = changed ? 1.f : 0.f;
            __syncthreads();
            changed = s.spare[0] + s.spare[1] + s.spare[2] + s.spare[3] > 0.f;
        }
        if (!changed) return;
        is_prepared = true;
        for (uint32_t c = threadIdx.x; c < dim; c += THREADS) s.table[dim + c] = k.exponents != ABSENT ? page.factor(k, c) : 1.f;
        __syncthreads();
        for (uint32_t r = warp; r < ROWS; r += WARPS) {
            for (uint32_t c = lane; c < dim; c += 32) s.prepared[r * dim + c] = query[r * dim + c] * s.table[dim + c];
            __syncwarp();
            if (k.rotate) rotate_row(s.prepared + r * dim, dim, lane);
        }
        __syncthreads();
    }

    // s.offset[row]: what the page's mean adds to all scores; s.total[row]: the sum of the prepared row.
    __device__ void prepare_sums(const Page &page) {
        const SideDesc &k = layer.k;
        for (uint32_t r = warp; r < ROWS; r += WARPS) {
            float base = 0.f, total = 0.f;
            for (uint32_t c = lane; c < k.head_dim; c += 32) {
                if (k.mean != ABSENT) base += query[r * k.head_dim + c] * page.mean(k, c);
                total += s.prepared[r * k.head_dim + c];
            }
            base = warp_sum(base);
            total = warp_sum(total);
            if (lane == 0) s.offset[r] = base, s.total[r] = total;
        }
        __syncthreads();
    }

    __device__ void group_scores(const Page &page) {
        const SideDesc &k = layer.k;
        prepare_rotated(page);
        prepare_sums(page);
        const float centre = float(k.width == WIDTH_TERNARY ? 2 : (1u << k.width) - 1) * 0.5f;
        for (uint32_t t = threadIdx.x; t < layer.page; t += THREADS) {
            float score[ROWS];
            for (int r = 0; r < ROWS; r++) score[r] = s.offset[r];
            for (uint32_t g = 0; g < k.n_groups; g++) {
                const float *q = s.prepared + g * k.group;
                float sum[ROWS] = {}, total[ROWS] = {};
                tile_dot<ROWS>(k, page.bytes + g * k.tile_bytes, t, k.group, q, k.head_dim, sum);
                const float one[4] = {1.f, 1.f, 1.f, 1.f};
                if (k.n_groups > 1) {
                    for (uint32_t c = 0; c < k.group; c += 4) add_quad<ROWS>(one, q + c, k.head_dim, total);
                } else {
                    for (int r = 0; r < ROWS; r++) total[r] = s.total[r];
                }
                const float step = page.step(k, g * layer.page + t), mid = page.mid(k, g * layer.page + t);
                for (int r = 0; r < ROWS; r++) score[r] += step * (sum[r] - centre * total[r]) + mid * total[r];
            }
            if (!is_chosen(t)) continue;
            for (int r = 0; r < ROWS; r++) s.scores[r * columns + t] = score[r];
        }
    }

    __device__ void channel_scores(const Page &page) {
        const SideDesc &k = layer.k;
        const uint32_t dim = k.head_dim;
        const Segments segments = Segments::of_header(page.header, k.n_segments, k.budget);
        for (uint32_t r = warp; r < ROWS; r += WARPS) {
            float offset = 0.f;
            for (uint32_t d = lane; d < dim; d += 32) {
                const float q = query[r * dim + page.ordered(k, d, dim)], step = page.step(k, d);
                s.prepared[r * dim + d] = q * step;
                offset += q * (page.mid(k, d) - step * centre_of(segments.bits(d / 16), false));
            }
            offset = warp_sum(offset);
            if (lane == 0) s.offset[r] = offset;
        }
        __syncthreads();
        for (uint32_t t = threadIdx.x; t < layer.page; t += THREADS) {
            const uint32_t *words = reinterpret_cast<const uint32_t *>(page.bytes) + t / 32 * k.tile_words * 32 + t % 32;
            float sum[ROWS];
            for (int r = 0; r < ROWS; r++) sum[r] = s.offset[r];
            mixed_dot<ROWS>(segments, false, words, dim, s.prepared, dim, sum);
            if (!is_chosen(t)) continue;
            for (int r = 0; r < ROWS; r++) s.scores[r * columns + t] = sum[r];
        }
    }

    __device__ void adaptive_scores(const Page &page) {
        const SideDesc &k = layer.k;
        const uint32_t dim = k.head_dim, n = layer.page;
        prepare_rotated(page);
        prepare_sums(page);
        const Segments segments = Segments::of_header(page.header, k.n_segments, k.budget);
        for (uint32_t place = threadIdx.x; place < n; place += THREADS) {
            uint32_t below = 0;  // bits of the segments before
            for (uint32_t i = 0; i < place / 32; i++) below += segments.bits(i);
            const uint32_t bits = segments.bits(place / 32);
            const uint32_t *words = reinterpret_cast<const uint32_t *>(page.bytes + below * 32 * dim / 8) + place % 32;
            float sum[ROWS] = {};
            mixed_dot<ROWS>(Segments::uniform(bits, dim / 16), k.normal, words, dim, s.prepared, dim, sum);
            const float step = page.step(k, place), mid = page.mid(k, place), centre = centre_of(bits, k.normal);
            for (int r = 0; r < ROWS; r++) {
                float score = step * (sum[r] - centre * s.total[r]) + mid * s.total[r] + s.offset[r];
                for (uint32_t o = 0; o < k.n_outliers; o++) score += s.prepared[r * dim + outlier_channel(k, page, o, place)] * outlier_value(k, page, o, place);
                s.weights[r * columns + place] = score;
            }
        }
        __syncthreads();
        for (uint32_t t = threadIdx.x; t < n; t += THREADS) {
            const uint32_t place = page.ordered(k, t, n);
            if (!is_chosen(t)) continue;
            for (int r = 0; r < ROWS; r++) s.scores[r * columns + t] = s.weights[r * columns + place];
        }
    }

    __device__ uint32_t outlier_channel(const SideDesc &side, const Page &page, uint32_t o, uint32_t place) {
        return min(uint32_t(page.bytes[side.outliers + o * layer.page + place]), side.head_dim - 1);
    }
    __device__ float outlier_value(const SideDesc &side, const Page &page, uint32_t o, uint32_t place) {
        const uint8_t *values = page.bytes + side.outliers + (side.n_outliers + 2 * o) * layer.page;
        return half_to_float(reinterpret_cast<const uint16_t *>(values)[place]);
    }

    // Hides what the page bits, the pool and the mask hide, and makes logits of the scores.
    __device__ void mask_page(uint32_t index) {
        for (uint32_t t = threadIdx.x; t < layer.page; t += THREADS) {
            const uint32_t cell = index * layer.page + t;
            bool is_read = is_in_page(p, cell);
            for (uint32_t i = 0; i < layer.pool_rows; i++) is_read &= s.pooled[i] != int(cell);
            for (uint32_t r = 0; r < ROWS; r++) logit(r, t, is_read ? int(cell) : -1);
        }
    }
    __device__ void logit(uint32_t r, uint32_t column, int cell) {
        float &score = s.scores[r * columns + column];
        const float mask = cell < 0 || r >= tile.n_rows ? -infinity() : mask_value(p, tile.token(p, r), uint32_t(cell));
        if (p.softcap > 0.f) score = p.softcap * tanhf(score / p.softcap);
        score = mask == -infinity() ? mask : score + s.slope[r] * mask;
    }

    // Makes weights of n logits per row, and moves the state to the new maximum. False: nobody sees any of them.
    __device__ bool softmax(uint32_t n) {
        __syncthreads();
        bool any = false;
        for (uint32_t r = warp; r < ROWS; r += WARPS) {
            float *row = s.scores + r * columns, most = s.maximum[r];
            for (uint32_t i = lane; i < n; i += 32) most = fmaxf(most, row[i]);
            most = warp_max(most);
            float sum = 0.f;
            for (uint32_t i = lane; i < n; i += 32) {
                row[i] = row[i] == -infinity() ? 0.f : expf(row[i] - most);
                sum += row[i];
            }
            sum = warp_sum(sum);
            __syncwarp();
            if (lane == 0) {
                const float factor = s.maximum[r] == -infinity() ? 0.f : expf(s.maximum[r] - most);
                s.factor[r] = factor;
                s.sum[r] = s.sum[r] * factor + sum;
                s.maximum[r] = most;
            }
            any |= sum > 0.f;
        }
        if (lane == 0) s.spare[warp] = any ? 1.f : 0.f;
        __syncthreads();
        for (int j = 0; j < 2; j++)
            for (int r = 0; r < ROWS; r++) acc[j][r] *= s.factor[r];
        return s.spare[0] + s.spare[1] + s.spare[2] + s.spare[3] > 0.f;
    }

    __device__ void group_values(const Page &page) {
        const SideDesc &v = layer.v;
        const float centre = float(v.width == WIDTH_TERNARY ? 2 : (1u << v.width) - 1) * 0.5f;
        for (uint32_t g = 0; g < v.n_groups; g++) {
            weigh([&](uint32_t t, float &step, float &offset) {
                step = page.step(v, g * layer.page + t);
                offset = page.mid(v, g * layer.page + t) - step * centre;
                return t;
            });
            for (int j = 0; j < 2; j++) {
                const uint32_t c = threadIdx.x + THREADS * j;
                if (c >= v.head_dim || c / v.group != g) continue;
                float sum[ROWS];
                for (int r = 0; r < ROWS; r++) sum[r] = s.offset[r];
                tile_dot<ROWS>(v, page.bytes + g * v.tile_bytes, c - g * v.group, layer.page, s.weights, columns, sum);
                for (int r = 0; r < ROWS; r++) acc[j][r] += sum[r];
            }
            __syncthreads();
        }
    }

    // s.weights[row][place] = weight of a token times step, s.offset[row] = sum of weight times offset; `read` gives the token
    // of a place with both.
    template <class F> __device__ void weigh(F read) {
        for (uint32_t r = warp; r < ROWS; r += WARPS) {
            float total = 0.f;
            for (uint32_t d = lane; d < layer.page; d += 32) {
                float step, offset;
                const uint32_t token = read(d, step, offset);
                const float weight = s.scores[r * columns + token];
                s.weights[r * columns + d] = weight * step;
                total += weight * offset;
            }
            total = warp_sum(total);
            if (lane == 0) s.offset[r] = total;
        }
        __syncthreads();
    }

    __device__ void adaptive_values(const Page &page) {
        const SideDesc &v = layer.v;
        const uint32_t n = layer.page;
        const Segments segments = Segments::of_header(page.header, v.n_segments, v.budget);
        weigh([&](uint32_t d, float &step, float &offset) {
            step = page.step(v, d);
            offset = page.mid(v, d) - step * centre_of(segments.bits(d / 16), v.normal);
            return page.ordered(v, d, n);
        });
        for (int j = 0; j < 2; j++) {
            const uint32_t c = threadIdx.x + THREADS * j;
            if (c >= v.head_dim) continue;
            const uint32_t *words = reinterpret_cast<const uint32_t *>(page.bytes) + c / 32 * v.tile_words * 32 + c % 32;
            float sum[ROWS];
            for (int r = 0; r < ROWS; r++) sum[r] = s.offset[r];
            mixed_dot<ROWS>(segments, v.normal, words, n, s.weights, columns, sum);
            for (uint32_t o = 0; o < v.n_outliers; o++) {
                for (uint32_t d = 0; d < n; d++) {
                    if (outlier_channel(v, page, o, d) != c) continue;
                    const float x = outlier_value(v, page, o, d);
                    const uint32_t token = page.ordered(v, d, n);
                    for (int r = 0; r < ROWS; r++) sum[r] += s.scores[r * columns + token] * x;
                }
            }
            for (int r = 0; r < ROWS; r++) acc[j][r] += sum[r];
        }
    }

    __device__ void attend_page(uint32_t index) {
        if (!is_visible(index)) return;
        const Page k = Page::of(layer.k, k_region, index), v = Page::of(layer.v, v_region, index);
        turns = Turns::of(p, index);
        for (chosen = 0; chosen <= turns.n; chosen++) {
            turn_query(chosen == turns.n ? 0 : turns.distance(chosen));
            if (layer.k.codec == CODEC_GROUP) group_scores(k);
            else if (layer.k.codec == CODEC_CHANNEL) channel_scores(k);
            else adaptive_scores(k);
            __syncthreads();
        }
        mask_page(index);
        if (softmax(layer.page)) {
            if (layer.v.codec == CODEC_GROUP) group_values(v);
            else adaptive_values(v);
        }
        __syncthreads();
    }

    // Turns what pages have added up to back into channels.
    __device__ void unrotate() {
        const uint32_t dim = layer.v.head_dim;
        if (!layer.v.rotate) return;
        float *rows = s.prepared;
        is_prepared = false;
        __syncthreads();
        for (int j = 0; j < 2; j++) {
            const uint32_t c = threadIdx.x + THREADS * j;
            for (int r = 0; r < ROWS; r++)
                if (c < dim) rows[r * dim + c] = acc[j][r];
        }
        __syncthreads();
        for (uint32_t r = warp; r < ROWS; r += WARPS) rotate_row(rows + r * dim, dim, lane);
        __syncthreads();
        for (int j = 0; j < 2; j++) {
            const uint32_t c = threadIdx.x + THREADS * j;
            for (int r = 0; r < ROWS; r++)
                if (c < dim) acc[j][r] = rows[r * dim + c];
        }
        __syncthreads();
    }

    __device__ void attend_exact(const ExactRows &rows) {
        const uint32_t dim = layer.k.head_dim;
        for (uint32_t i = warp; i < rows.n; i += WARPS) {
            const int cell = rows.cell(p, tile.head, i);
            float sum[ROWS] = {};
            if (cell >= 0) {
                for (uint32_t c = lane; c < dim; c += 32) {
                    const float key = rows.key(p, tile.head, i, c);
                    for (int r = 0; r < ROWS; r++) sum[r] += s.query[r * dim + c] * key;
                }
            }
            for (int r = 0; r < ROWS; r++) {
                const float score = warp_sum(sum[r]);
                if (lane == 0) {
                    s.scores[r * columns + i] = score;
                    logit(r, i, cell);
                }
            }
        }
        if (softmax(rows.n)) {
            for (uint32_t i = 0; i < rows.n; i++) {
                bool is_seen = false;
                for (int r = 0; r < ROWS; r++) is_seen |= s.scores[r * columns + i] != 0.f;
                if (!is_seen) continue;
                for (int j = 0; j < 2; j++) {
                    const uint32_t c = threadIdx.x + THREADS * j;
                    if (c >= layer.v.head_dim) continue;
                    const float value = rows.value(p, tile.head, i, c);
                    for (int r = 0; r < ROWS; r++) acc[j][r] += s.scores[r * columns + i] * value;
                }
            }
        }
        __syncthreads();
    }

    __device__ void run() {
        load_query();
        run([&](uint32_t page) { attend_page(page); }, [] {});
    }
    // `attend(page)` for every page of the block, then `complete()`, then the exact rows.
    template <class F, class G> __device__ void run(F attend, G complete) {
        const Pieces pieces = Pieces::of(p);
        const uint32_t n_pages = pages_of(p, planned_pages(p));
        uint32_t i = tile.split;
        for (; i < n_pages; i += p.n_splits) attend(i);
        unrotate();
        complete();
        for (; i < n_pages + pieces.all(); i += p.n_splits) attend_exact(ExactRows::of(p, pieces, i - n_pages));
        for (uint32_t r = threadIdx.x; r < ROWS; r += THREADS)
            if (s.spoiled[r] != 0.f) s.maximum[r] = 0.f, s.sum[r] = not_a_number();
        __syncthreads();
        finish();
    }

    // `output(c)` gives what channel c has summed up to.
    template <class F> __device__ void write_row(uint32_t r, F output) {
        const uint32_t dim = layer.v.head_dim, query_head = tile.query_head(p, r);
        const Ending end = Ending::of(p, query_head, s.maximum[r], s.sum[r]);
        const size_t at = size_t(tile.token(p, r)) * layer.n_heads + query_head;
        for (uint32_t c = threadIdx.x; c < dim; c += THREADS) p.out[at * dim + c] = output(c) * end.scale;
        if (threadIdx.x == 0 && p.lse != nullptr) p.lse[at] = end.lse;
    }

    __device__ void finish() {
        const uint32_t dim = layer.v.head_dim;
        if (p.n_splits == 1) {
            for (uint32_t r = 0; r < tile.n_rows; r++)
                write_row(r, [&](uint32_t c) { return c < THREADS ? acc[0][r] : acc[1][r]; });
            return;
        }
        for (int r = 0; r < ROWS; r++) {
            const Partial partial = Partial::of(p, tile, ROWS, tile.split, r);
            for (int j = 0; j < 2; j++) {
                const uint32_t c = threadIdx.x + THREADS * j;
                if (c < dim) partial.output[c] = acc[j][r];
            }
            if (threadIdx.x == 0) partial.sums[0] = s.maximum[r], partial.sums[1] = s.sum[r];
        }
        if (!is_last_block(p, reinterpret_cast<uint32_t *>(s.spare))) return;
        // s.scores[row][split]: how much each block's state weighs.
        for (uint32_t r = warp; r < tile.n_rows; r += WARPS) {
            float most = -infinity(), sum = 0.f;
            for (uint32_t i = lane; i < p.n_splits; i += 32) most = fmaxf(most, __ldcg(Partial::of(p, tile, ROWS, i, r).sums));
            most = warp_max(most);
            for (uint32_t i = lane; i < p.n_splits; i += 32) {
                const float *sums = Partial::of(p, tile, ROWS, i, r).sums;
                // A block that saw nothing weighs nothing, also if all are such.
                const float maximum = __ldcg(sums), weight = maximum == -infinity() ? 0.f : expf(maximum - most);
                s.scores[r * columns + i] = weight;
                sum += weight * __ldcg(sums + 1);
            }
            sum = warp_sum(sum);
            if (lane == 0) s.maximum[r] = most, s.sum[r] = sum;
        }
        __syncthreads();
        for (uint32_t r = 0; r < tile.n_rows; r++) {
            write_row(r, [&](uint32_t c) {
                float out = 0.f;
                for (uint32_t i = 0; i < p.n_splits; i++) out += s.scores[r * columns + i] * __ldcg(Partial::of(p, tile, ROWS, i, r).output + c);
                return out;
            });
        }
    }
};

}  // namespace kvq
