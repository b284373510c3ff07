/* Two caches in two threads do not disturb each other, and each thread has a last error of its own. */
#include <pthread.h>

#include "model.h"

static void *work(void *user) {
    const uint32_t id = *(const uint32_t *)user;
    const kvq_shape shape = {4, 2, 64, 64};
    model m = model_new(SPEC_8_BITS, shape, 256, id == 0 ? 1 : 2, id == 1);
    m.seed += id;
    CHECK(kvq_last_error()[0] == '\0');
    for (int i = 0; i < 6; i++) {
        const char *spec = id == 0 ? "zero" : "one";
        kvq_recipe *recipe = NULL;
        CHECK_STATUS(kvq_recipe_parse(spec, &recipe), KVQ_STATUS_RECIPE);
        model_append(&m, 0, 30, NULL);
        model_append(&m, 1, 1, NULL);
        CHECK(strstr(kvq_last_error(), spec) != NULL);
    }
    model_free(&m);
    return NULL;
}

int main(void) {
    uint32_t ids[] = {0, 1};
    pthread_t threads[2];
    for (int i = 0; i < 2; i++) {
        CHECK(pthread_create(&threads[i], NULL, work, &ids[i]) == 0);
    }
    for (int i = 0; i < 2; i++) {
        CHECK(pthread_join(threads[i], NULL) == 0);
    }
    return 0;
}
