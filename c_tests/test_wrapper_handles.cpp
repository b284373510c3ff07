/* kvq.hpp: handles free what they hold (the sanitizers and valgrind tell), failures become exceptions. */
#include <kvq.hpp>

#include <cstring>
#include <type_traits>
#include <utility>

#include "check.h"

static_assert(sizeof(kvq::cache) == sizeof(kvq_cache *), "handles cost nothing");
static_assert(!std::is_copy_constructible<kvq::cache>::value, "a handle is the only owner");

static kvq::recipe parse(const char *text) {
    kvq::recipe recipe;
    kvq::check(kvq_recipe_parse(text, kvq::out(recipe)));
    return recipe;
}

static kvq::cache new_cache(const kvq::recipe &recipe) {
    kvq_cache_params params = {};
    params.shape = {8, 2, 128, 128};
    params.n_layers = 1;
    params.n_cells = 512;
    params.n_seq_max = 1;
    kvq::cache cache;
    kvq::check(kvq_cache_new(recipe.get(), &params, kvq::out(cache)));
    return cache;
}

static void failures_throw_status_and_text() {
    bool thrown = false;
    try {
        parse("skvq:k=5");
    } catch (const kvq::error &error) {
        thrown = true;
        CHECK(error.status() == KVQ_STATUS_RECIPE);
        CHECK(std::strcmp(error.what(), kvq_last_error()) == 0);
        CHECK(std::strlen(error.what()) > 0);
    }
    CHECK(thrown);
}

static void a_failed_call_leaves_the_handle() {
    kvq::recipe recipe = parse("on");
    const kvq_recipe *before = recipe.get();
    CHECK(kvq_recipe_parse("nothing of this name", kvq::out(recipe)) == KVQ_STATUS_RECIPE);
    CHECK(recipe.get() == before);
}

static void a_handle_frees_what_it_held() {
    kvq::recipe recipe = parse("skvq:k=2,v=2");
    kvq::check(kvq_recipe_parse("skvq:k=3,v=2", kvq::out(recipe)));
    kvq::cache cache = new_cache(recipe);
    kvq::cache moved = std::move(cache);
    CHECK(!cache && moved);
    CHECK(kvq_cache_n_tokens(moved.get()) == 0);
}

int main() {
    failures_throw_status_and_text();
    a_failed_call_leaves_the_handle();
    a_handle_frees_what_it_held();
    return 0;
}
