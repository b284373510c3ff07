// Attention for layers whose keys codec `aqua` has: that of attend_any.cuh, in the frame of each page. See src/codec/aqua/scalar.rs
// for what it computes, and curves.rs for the bias.
#include "aqua.cuh"
#include "attend_any.cuh"

namespace kvq {

template <int ROWS> struct AttendAqua : Attend<ROWS> {
    using Base = Attend<ROWS>;
    using Base::p, Base::layer, Base::tile, Base::s, Base::warp, Base::lane, Base::columns;

    // In shared memory, behind Base's; cuda/attend.rs adds up the same.
    float *framed;   // [ROWS][dim_k]: queries in the frame of a page
    float *coded;    // [ROWS][dim_k]: what meets its coefficients
    float *factors;  // [ROWS][2][n_factors]: what its curves are multiplied with
    float *sums;     // [ROWS][n_sums]: weights times coefficients of predicted values, and behind those the weights
    float *gated;    // [ROWS]: the weights of a page's predicted values
    const uint32_t dim, n_sums, n_factors;

    __device__ AttendAqua(const AttendStep &params, float *shared)
        : Base(params, shared), dim(layer.k.head_dim), n_sums(dim + 1), n_factors(dim / 2 + MAX_POWERS) {
        float *from = reinterpret_cast<float *>(s.pooled + MAX_POOL);
        const auto take = [&](uint32_t n) { float *a = from; from += n; return a; };
        framed = take(ROWS * dim), coded = take(ROWS * dim), factors = take(ROWS * 2 * n_factors), sums = take(ROWS * n_sums), gated = take(ROWS);
    }

    static constexpr uint32_t MAX_POWERS = 4;

    // Turns queries back to where the page is, and takes them to what meets its coefficients.
    __device__ void enter(const Frame &frame, const FramePlace &place) {
        const RotationDesc &rotation = frame.desc.rotation;
        const uint32_t n = min(rotation.n_pairs, dim / 2);
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < n; i += THREADS) {
            const Angle angle = angle_of(rotation, i, place.first);
            s.table[2 * i] = angle.cosine, s.table[2 * i + 1] = -angle.sine;
        }
        for (uint32_t i = threadIdx.x; i < ROWS * dim; i += THREADS) framed[i] = this->query[i];
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < ROWS * n; i += THREADS) turn_pair(rotation, framed + i / n * dim, i % n, {s.table[2 * (i % n)], s.table[2 * (i % n) + 1]});
        __syncthreads();
        const float *matrix = frame.queries();
        for (uint32_t c = threadIdx.x; c < dim; c += THREADS) {
            float sum[ROWS] = {};
#pragma unroll 4
            for (uint32_t i = 0; i < dim; i += 4) {
                float m[4];
                for (int j = 0; j < 4; j++) m[j] = matrix[(i + j) * dim + c];
                add_quad<ROWS>(m, framed + i, dim, sum);
            }
            for (int r = 0; r < ROWS; r++) coded[r * dim + c] = sum[r];
        }
        __syncthreads();
    }

    // What the curves of the page's bias are multiplied with, by a warp for each row.
    __device__ void prepare_curves(const Frame &frame) {
        const FrameDesc &d = frame.desc;
        const RotationDesc &rotation = d.rotation;
        const uint32_t n = min(rotation.n_pairs, dim / 2);
        const float *bias = frame.middle();
        const uint32_t *curve_of = reinterpret_cast<const uint32_t *>(frame.common(d.curve_of));
        for (uint32_t r = warp; r < ROWS; r += WARPS) {
            const float *q = framed + r * dim;
            float *even = factors + r * 2 * n_factors, *odd = even + n_factors;
            float powers[2][MAX_POWERS] = {};
            for (uint32_t i = lane; i < n; i += 32) {
                const uint32_t x = rotation.interleaved ? 2 * i : i, y = rotation.interleaved ? 2 * i + 1 : i + n, curve = curve_of[i];
                const float cosine = q[x] * bias[x] + q[y] * bias[y], sine = q[y] * bias[x] - q[x] * bias[y];
                if (curve != ABSENT) even[d.n_slow[0] + curve] = cosine, odd[d.n_slow[1] + curve] = sine;
#pragma unroll
                for (uint32_t k = 0; k < MAX_POWERS; k++) {
                    if (k < d.n_slow[0]) powers[0][k] += cosine * frame.common(d.slow[0])[k * d.slow_stride + i];
                    if (k < d.n_slow[1]) powers[1][k] += sine * frame.common(d.slow[1])[k * d.slow_stride + i];
                }
            }
            // The first curve is 1 everywhere.
            for (uint32_t c = 2 * n + lane; c < dim; c += 32) powers[0][0] += q[c] * bias[c];
#pragma unroll
            for (uint32_t k = 0; k < MAX_POWERS; k++) {
                const float mirrored = warp_sum(powers[0][k]), negated = warp_sum(powers[1][k]);
                if (lane == 0 && k < d.n_slow[0]) even[k] = mirrored;
                if (lane == 0 && k < d.n_slow[1]) odd[k] = negated;
            }
        }
    }

    // Adds the bias of a row of the page to the scores of all queries.
    __device__ void add_curves(const Frame &frame, uint32_t t, float (&score)[ROWS]) const {
        const FrameDesc &d = frame.desc;
        const uint32_t half = layer.page / 2, at = t < half ? half - 1 - t : t - half;
        const float sign = t < half ? -1.f : 1.f;
        const auto add = [&](uint32_t kind, float sign) {
            const float *curve = frame.common(d.curves[kind]) + at;
            for (uint32_t k = 0; k < d.n_curves[kind]; k++) {
                const float x = sign * curve[k * half];
                for (int r = 0; r < ROWS; r++) score[r] += factors[(2 * r + kind) * n_factors + k] * x;
            }
        };
        add(0, 1.f), add(1, sign);
    }

    __device__ void scores(const Page &page) {
        const FramePlace place = FramePlace::of(layer, page.bytes);
        const Frame frame = Frame::of(layer, place);
        const SideDesc k = coded_side(layer.k, place.segments);
        const Segments segments = Segments::of_header(page.header, k.n_segments, k.budget);
        const bool has_bias = frame.has_bias(place);
        enter(frame, place);
        if (has_bias) prepare_curves(frame);
        for (uint32_t r = warp; r < ROWS; r += WARPS) {
            float offset = 0.f;
            for (uint32_t d = lane; d < dim; d += 32) {
                if (d >= k.head_dim) {
                    offset += coded[r * dim + d] * rest_mean(k, page, d);
                    continue;
                }
                const float q = coded[r * dim + page.ordered(k, d, k.head_dim)], step = page.step(k, d);
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
            mixed_dot<ROWS>(segments, false, words, k.head_dim, s.prepared, dim, sum);
            if (has_bias) add_curves(frame, t, sum);
            if (!this->is_chosen(t)) continue;
            for (int r = 0; r < ROWS; r++) s.scores[r * columns + t] = sum[r];
        }
    }

    // Sums up the codes of a place over all tokens, weighted by s.weights.
    __device__ void sum_codes(const SideDesc &k, const Segments &segments, const uint8_t *bytes, uint32_t d, float (&sum)[ROWS]) const {
        const uint32_t segment = d / 16, q = d % 16 / 4, byte = 8 * (d % 4), bits = segments.bits(segment), plane = 2 * segments.four + segments.three + segments.two;
        const uint32_t odd = bits == 3 ? segment - segments.four : segment - segments.four - segments.two;
        const uint32_t plane_word = plane + odd / 2, plane_shift = byte + odd % 2 * 4 + q;
        const uint32_t word = bits == 4 ? 2 * segment + q / 2 : bits == 1 ? plane_word : segments.four + segment;
        const uint32_t shift = bits == 4 ? byte + q % 2 * 4 : bits == 1 ? plane_shift : byte + 2 * q, mask = bits == 4 ? 15 : bits == 1 ? 1 : 3;
        for (uint32_t t = 0; t < layer.page; t += 4) {
            const uint32_t *block = reinterpret_cast<const uint32_t *>(bytes) + t / 32 * k.tile_words * 32 + t % 32;
            const uint4 low = *reinterpret_cast<const uint4 *>(block + word * 32);
            uint32_t code[4] = {low.x >> shift & mask, low.y >> shift & mask, low.z >> shift & mask, low.w >> shift & mask};
            if (bits == 3) {
                const uint4 high = *reinterpret_cast<const uint4 *>(block + plane_word * 32);
                code[0] |= (high.x >> plane_shift & 1) << 2, code[1] |= (high.y >> plane_shift & 1) << 2;
                code[2] |= (high.z >> plane_shift & 1) << 2, code[3] |= (high.w >> plane_shift & 1) << 2;
            }
            const float codes[4] = {float(code[0]), float(code[1]), float(code[2]), float(code[3])};
            add_quad<ROWS>(codes, s.weights + t, columns, sum);
        }
    }

    // Adds a page's softmax weights times the coefficients of its keys, where values are predicted from these, to the sums of all
    // pages, which move to the new maximum.
    __device__ void add_keys(const Page &page) {
        const FramePlace place = FramePlace::of(layer, page.bytes);
        const SideDesc k = coded_side(layer.k, place.segments);
        const Segments segments = Segments::of_header(page.header, k.n_segments, k.budget);
        for (uint32_t r = warp; r < ROWS; r += WARPS) {
            float total = 0.f;
            for (uint32_t t = lane; t < layer.page; t += 32) {
                const float weight = has_gate(layer, page.bytes, t) ? s.scores[r * columns + t] : 0.f;
                s.weights[r * columns + t] = weight;
                total += weight;
            }
            total = warp_sum(total);
            if (lane == 0) gated[r] = total, sums[r * n_sums + dim] = sums[r * n_sums + dim] * s.factor[r] + total;
        }
        __syncthreads();
        for (uint32_t d = threadIdx.x; d < dim; d += THREADS) {
            const bool is_coded = d < k.head_dim;
            float sum[ROWS] = {};
            if (is_coded) sum_codes(k, segments, page.bytes, d, sum);
            const float step = is_coded ? page.step(k, d) : 0.f, centre = centre_of(segments.bits(d / 16), false);
            const float mid = is_coded ? page.mid(k, d) : rest_mean(k, page, d);
            const uint32_t c = is_coded ? page.ordered(k, d, k.head_dim) : d;
            for (int r = 0; r < ROWS; r++) sums[r * n_sums + c] = sums[r * n_sums + c] * s.factor[r] + (step * (sum[r] - centre * gated[r]) + mid * gated[r]);
        }
        __syncthreads();
    }

    // Adds what the keys of all pages predict to the output.
    __device__ void add_predicted() {
        if (!layer.predicts) return;
        const Frame frame = Frame::of(layer, {0, tile.head, 0, false});
        const uint32_t dim_v = layer.v.head_dim;
        for (int j = 0; j < 2; j++) {
            const uint32_t c = threadIdx.x + THREADS * j;
            if (c >= dim_v) continue;
            const float *column = frame.predictor() + c;
            for (uint32_t k = 0; k < n_sums; k++) {
                const float x = column[k * dim_v];
                for (int r = 0; r < ROWS; r++) this->acc[j][r] += sums[r * n_sums + k] * x;
            }
        }
        __syncthreads();
    }

    __device__ void attend_page(uint32_t index) {
        if (!this->is_visible(index)) return;
        const Page k = Page::of(layer.k, this->k_region, index), v = Page::of(layer.v, this->v_region, index);
        this->turns = Turns::of(p, index);
        for (this->chosen = 0; this->chosen <= this->turns.n; this->chosen++) {
            this->turn_query(this->chosen == this->turns.n ? 0 : this->turns.distance(this->chosen));
            scores(k);
            __syncthreads();
        }
        this->mask_page(index);
        if (this->softmax(layer.page)) {
            if (layer.predicts) add_keys(k);
            if (layer.v.codec == CODEC_GROUP) this->group_values(v);
            else this->adaptive_values(v);
        }
        __syncthreads();
    }

    __device__ void run() {
        for (uint32_t i = threadIdx.x; i < ROWS * n_sums; i += THREADS) sums[i] = 0.f;
        this->load_query();
        Base::run([&](uint32_t page) { attend_page(page); }, [&] { add_predicted(); });
    }
};

}  // namespace kvq

KVQ_KERNEL(kvq_attend_aqua_4, kvq::THREADS, 3, kvq::AttendParams) {
    KVQ_SHARED(shared);
    kvq::wait_for_stream();
    kvq::let_next_start();
    const kvq::AttendStep step(p);
    kvq::AttendAqua<4>(step, reinterpret_cast<float *>(shared)).run();
}
KVQ_KERNEL(kvq_attend_aqua_8, kvq::THREADS, 3, kvq::AttendParams) {
    KVQ_SHARED(shared);
    kvq::wait_for_stream();
    kvq::let_next_start();
    const kvq::AttendStep step(p);
    kvq::AttendAqua<8>(step, reinterpret_cast<float *>(shared)).run();
}
