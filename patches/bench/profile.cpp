#include "profile.h"

#include <cmath>
#include <vector>

#include "base.h"
#include "inputs.h"

namespace {

// As those of Llama 3.
constexpr double ROPE_BASE = 500000.0;

std::vector<float> random(Rows & rows, size_t n, float scale) {
    std::vector<float> out(n);
    rows.fill(out.data(), int(n), 1, 1, false);
    for (float & x : out) {
        x *= scale;
    }
    return out;
}

// Mirrors that follow each other, and behind them coefficients that matter less and less.
void transform(Rows & rows, size_t dim, float * out) {
    for (size_t i = 0; i < dim * dim; i++) {
        out[i] = i % (dim + 1) == 0 ? 1.0f : 0.0f;
    }
    for (int mirror = 0; mirror < 8; mirror++) {
        const std::vector<float> normal = random(rows, dim, 1.0f);
        float square = 0;
        for (float x : normal) {
            square += x * x;
        }
        for (size_t column = 0; column < dim; column++) {
            float along = 0;
            for (size_t row = 0; row < dim; row++) {
                along += normal[row] * out[row * dim + column];
            }
            for (size_t row = 0; row < dim; row++) {
                out[row * dim + column] -= 2.0f * along / square * normal[row];
            }
        }
    }
    for (size_t i = 0; i < dim * dim; i++) {
        out[i] *= std::exp2(-3.0f * float(i / dim) / float(dim));
    }
}

}  // namespace

kvq_recipe * with_profile(kvq_recipe * recipe, const kvq_shape & shape, uint32_t layer) {
    char file[512];
    ok(kvq_recipe_profile(recipe, file, sizeof(file)));
    if (file[0] == '\0') {
        return recipe;
    }
    const size_t dim = shape.head_dim_k, heads = shape.n_kv_heads;
    std::vector<double> frequencies(dim / 2);
    for (size_t i = 0; i < frequencies.size(); i++) {
        frequencies[i] = std::pow(ROPE_BASE, -double(i) / frequencies.size());
    }
    Rows rows(5);
    const std::vector<float> bias = random(rows, heads * dim, 1.0f), offset = random(rows, heads * dim, 0.05f);
    // So little that it helps about every other of these values, which have nothing to do with their keys.
    const std::vector<float> predictor = random(rows, heads * dim * dim, 0.02f / std::sqrt(float(dim)));
    std::vector<float> transforms(heads * dim * dim);
    for (size_t head = 0; head < heads; head++) {
        transform(rows, dim, &transforms[head * dim * dim]);
    }
    const kvq_profile_layer numbers = { shape, bias.data(), transforms.data(), predictor.data(), offset.data() };
    kvq_rotation * rotation;
    kvq_profile * profile;
    kvq_recipe * with;
    ok(kvq_rotation_new(frequencies.data(), uint32_t(frequencies.size()), 0, &rotation));
    ok(kvq_profile_new(&profile));
    ok(kvq_profile_set_layer(profile, layer, rotation, &numbers));
    ok(kvq_recipe_with_profile(recipe, profile, &with));
    kvq_profile_free(profile);
    kvq_rotation_free(rotation);
    kvq_recipe_free(recipe);
    return with;
}
