/* Recipes that cannot be are refused with a text that names the key; others have a canonical spelling. */
#include "check.h"

static void refused(const char *spec, const char *text) {
    kvq_recipe *recipe = NULL;
    CHECK_STATUS(kvq_recipe_parse(spec, &recipe), KVQ_STATUS_RECIPE);
    CHECK(recipe == NULL);
    if (strstr(kvq_last_error(), text) == NULL) {
        fprintf(stderr, "'%s' gives '%s', which does not name '%s'\n", spec, kvq_last_error(), text);
        exit(1);
    }
}

int main(void) {
    refused("", "no compressed cache");
    refused("off", "no compressed cache");
    refused("turbo", "'turbo'");
    refused("skvq:bits=2", "'bits'");
    refused("skvq:k=5", "k=5");
    refused("skvq:page=100", "page=100");
    refused("skvq:window=99999999999999999999", "window");
    kvq_recipe *bad = NULL;
    CHECK_INVALID(kvq_recipe_parse("skvq:\xff", &bad));
    CHECK(bad == NULL);

    kvq_recipe *recipe = recipe_of("skvq:k=2,v=3,page=64");
    char spec[512], again[512], tiny[8];
    CHECK_OK(kvq_recipe_spec(recipe, spec, sizeof spec));
    kvq_recipe *second = recipe_of(spec);
    CHECK_OK(kvq_recipe_spec(second, again, sizeof again));
    CHECK(strcmp(spec, again) == 0);
    CHECK(kvq_recipe_page(recipe) == 64 && kvq_recipe_page(second) == 64);

    memset(tiny, 'x', sizeof tiny);
    CHECK_STATUS(kvq_recipe_spec(recipe, tiny, sizeof tiny), KVQ_STATUS_BUFFER_TOO_SMALL);
    CHECK_STATUS(kvq_recipe_spec(recipe, tiny, 0), KVQ_STATUS_BUFFER_TOO_SMALL);
    CHECK(memcmp(tiny, "xxxxxxxx", sizeof tiny) == 0);
    CHECK_STATUS(kvq_recipe_spec(recipe, again, strlen(spec)), KVQ_STATUS_BUFFER_TOO_SMALL);
    CHECK_OK(kvq_recipe_spec(recipe, again, strlen(spec) + 1));
    kvq_recipe_free(second);

    kvq_recipe *wide = recipe_of("skvq:window=8192,page=256"), *fitted = NULL;
    CHECK(kvq_recipe_window(wide) == 8192);
    CHECK_INVALID(kvq_recipe_fit(wide, 0, 1, 1, &fitted));
    CHECK_INVALID(kvq_recipe_fit(wide, 512, 0, 1, &fitted));
    CHECK_INVALID(kvq_recipe_fit(wide, 512, 1, 0, &fitted));
    CHECK(fitted == NULL);
    CHECK_OK(kvq_recipe_fit(wide, 512, 1, 1, &fitted));
    CHECK_OK(kvq_recipe_spec(fitted, spec, sizeof spec));
    CHECK(kvq_recipe_page(fitted) == 128 && kvq_recipe_window(fitted) == 128);
    CHECK(strstr(spec, "window=128") != NULL && strstr(spec, "page=128") != NULL);
    kvq_recipe_free(fitted);
    kvq_recipe_free(wide);
    kvq_recipe_free(recipe);
    return 0;
}
