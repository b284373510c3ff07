/* Names that stand for a recipe, names that mean off, and the text that lists them all. */
#include "check.h"

static void same_recipe(const char *name, const char *other) {
    kvq_recipe *a = recipe_of(name), *b = recipe_of(other);
    char spec_a[512], spec_b[512];
    CHECK_OK(kvq_recipe_spec(a, spec_a, sizeof spec_a));
    CHECK_OK(kvq_recipe_spec(b, spec_b, sizeof spec_b));
    CHECK(strcmp(spec_a, spec_b) == 0);
    kvq_recipe_free(a);
    kvq_recipe_free(b);
}

static void off(void) {
    CHECK(kvq_recipe_is_off("off") && kvq_recipe_is_off("none") && kvq_recipe_is_off("0") && kvq_recipe_is_off(""));
    CHECK(!kvq_recipe_is_off("on") && !kvq_recipe_is_off("skvq") && !kvq_recipe_is_off("nosuch"));
    CHECK(!kvq_recipe_is_off("\xff")); /* so that kvq_recipe_parse says what is wrong */
}

static void expand(void) {
    const char *presets[] = {"on", "2", "3", "4"};
    char text[512], exact[512];
    for (size_t i = 0; i < sizeof presets / sizeof *presets; i++) {
        CHECK_OK(kvq_recipe_expand(presets[i], text, sizeof text));
        CHECK(strcmp(text, presets[i]) != 0);
        same_recipe(presets[i], text);
        CHECK(strlen(text) < strlen(presets[i]) + 64);

        /* Exactly enough is enough; one byte less is refused and nothing is written. */
        CHECK_OK(kvq_recipe_expand(presets[i], exact, strlen(text) + 1));
        CHECK(strcmp(exact, text) == 0);
        memset(exact, 'x', sizeof exact);
        CHECK_STATUS(kvq_recipe_expand(presets[i], exact, strlen(text)), KVQ_STATUS_BUFFER_TOO_SMALL);
        CHECK_STATUS(kvq_recipe_expand(presets[i], exact, 0), KVQ_STATUS_BUFFER_TOO_SMALL);
        CHECK(exact[0] == 'x');
    }
    CHECK_OK(kvq_recipe_expand("2:window=256", text, sizeof text));
    CHECK(strstr(text, "window=256") != NULL);
    same_recipe("2:window=256", text);
    CHECK_OK(kvq_recipe_expand("skvq:k=2", text, sizeof text));
    CHECK(strcmp(text, "skvq:k=2") == 0);
    CHECK_OK(kvq_recipe_expand("nosuch", text, sizeof text));
    CHECK(strcmp(text, "nosuch") == 0);
}

static void help(void) {
    const char *names[] = {"\n  on ", "\n  2 ", "\n  3 ", "\n  4 ", "\n  skvq ", "\n  kivi ", "\n  ott ", "\n  qaq ", "off, none, 0"};
    const char *text = kvq_recipe_help();
    CHECK(text != NULL && strlen(text) > 100 && text[strlen(text) - 1] == '\n');
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        CHECK(strstr(text, names[i]) != NULL);
    }
    CHECK(kvq_recipe_help() == text);
}

int main(void) {
    off();
    expand();
    help();
    return 0;
}
