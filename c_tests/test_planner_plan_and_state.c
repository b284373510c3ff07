/* Planning, and taking the state of a stream from one planner to another. */
#include "check.h"

enum { N_CELLS = 256 };

static bool below_limit(void *user, uint32_t stream, uint32_t cell) {
    (void)stream;
    return cell < *(const uint32_t *)user;
}

static kvq_status plan(kvq_planner *planner, uint32_t stream, uint32_t first, uint32_t n, int32_t **out) {
    kvq_row rows[N_CELLS];
    for (uint32_t i = 0; i < n; i++) {
        rows[i] = (kvq_row){first + i, (int32_t)(first + i), i % 2};
    }
    const size_t len = kvq_planner_plan_len(planner, n);
    *out = make(len, sizeof(int32_t));
    return kvq_planner_plan(planner, stream, rows, n, below_limit, &first, *out, len);
}

static void append(kvq_planner *planner, uint32_t stream, uint32_t first, uint32_t n) {
    int32_t *ints = NULL;
    CHECK_OK(plan(planner, stream, first, n, &ints));
    free(ints);
}

static void misuse(kvq_recipe *recipe, kvq_planner *planner) {
    int32_t *ints = NULL;
    uint32_t limit = 0;
    const kvq_row twice[] = {{5, 0, 0}, {5, 1, 0}}, outside = {N_CELLS, 0, 0}, stranger = {5, 0, 2};
    CHECK_INVALID(plan(planner, 2, 0, 1, &ints));
    const size_t len = kvq_planner_plan_len(planner, 2);
    int32_t *buffer = make(len, sizeof(int32_t));
    CHECK_INVALID(kvq_planner_plan(planner, 0, twice, 2, below_limit, &limit, buffer, len));
    CHECK_INVALID(kvq_planner_plan(planner, 0, &outside, 1, below_limit, &limit, buffer, len));
    CHECK_INVALID(kvq_planner_plan(planner, 0, &stranger, 1, below_limit, &limit, buffer, len));
    CHECK_STATUS(kvq_planner_plan(planner, 0, twice, 1, below_limit, &limit, buffer, 10), KVQ_STATUS_BUFFER_TOO_SMALL);
    CHECK_INVALID(kvq_planner_plan(planner, 0, twice, SIZE_MAX / 2, below_limit, &limit, buffer, len));
    CHECK_INVALID(kvq_planner_copy_stream(planner, 0, 2));
    CHECK_INVALID(kvq_planner_copy_stream(planner, 2, 0));
    kvq_location location[N_CELLS];
    CHECK_INVALID(kvq_planner_locate(planner, 2, location));
    kvq_planner_reset(planner, 99);
    kvq_planner *other = NULL;
    CHECK_INVALID(kvq_planner_new(recipe, 0, 1, 1, &other));
    CHECK_INVALID(kvq_planner_new(recipe, 64, 0, 1, &other));
    CHECK_INVALID(kvq_planner_new(recipe, 64, 1, 0, &other));
    CHECK_INVALID(kvq_planner_new(recipe, UINT32_MAX, 1, 1, &other));
    CHECK(other == NULL);
    free(ints);
    free(buffer);
}

static void move_state(kvq_planner *from, kvq_planner *to) {
    size_t size = 0;
    CHECK_OK(kvq_planner_export_size(from, 0, &size));
    uint8_t *bytes = make(size, 1);
    CHECK_STATUS(kvq_planner_export(from, 0, bytes, size - 1), KVQ_STATUS_BUFFER_TOO_SMALL);
    CHECK_OK(kvq_planner_export(from, 0, bytes, size));
    for (size_t len = 0; len < size; len++) {
        CHECK_STATUS(kvq_planner_import(to, 1, bytes, len), KVQ_STATUS_FORMAT);
    }
    bytes[4] ^= 1;
    CHECK_STATUS(kvq_planner_import(to, 1, bytes, size), KVQ_STATUS_FORMAT);
    bytes[4] ^= 1;
    CHECK_OK(kvq_planner_import(to, 1, bytes, size));
    free(bytes);

    int32_t *first = NULL, *second = NULL;
    CHECK_OK(plan(from, 0, 150, 60, &first));
    CHECK_OK(plan(to, 1, 150, 60, &second));
    CHECK(second[1] == 1);
    second[1] = 0; /* the stream */
    CHECK(memcmp(first, second, kvq_planner_plan_len(from, 60) * sizeof(int32_t)) == 0);
    free(first);
    free(second);
}

/* 100 tokens with two sink tokens, a window of 40 and a page that is full: all places that a row can have. */
_Static_assert(KVQ_NOWHERE == 0 && KVQ_IN_SLOT == 1 && KVQ_IN_PAGE == 2, "values never change");
_Static_assert(sizeof(kvq_location) == 12, "as the library has it");

static void locate(const kvq_recipe *recipe) {
    kvq_planner *planner = NULL;
    CHECK_OK(kvq_planner_new(recipe, N_CELLS, 1, 1, &planner));
    kvq_row rows[100];
    for (uint32_t i = 0; i < 100; i++) {
        rows[i] = (kvq_row){i, (int32_t)i, 0};
    }
    uint32_t limit = 0;
    const size_t len = kvq_planner_plan_len(planner, 100);
    int32_t *ints = make(len, sizeof(int32_t));
    CHECK_OK(kvq_planner_plan(planner, 0, rows, 100, below_limit, &limit, ints, len));
    free(ints);
    kvq_location location[N_CELLS];
    CHECK_OK(kvq_planner_locate(planner, 0, location));
    for (uint32_t cell = 0; cell < N_CELLS; cell++) {
        const bool is_exact = cell < 2 || (cell >= 60 && cell < 100), is_packed = cell >= 2 && cell < 64;
        CHECK(location[cell].places == (KVQ_NOWHERE | (is_exact ? KVQ_IN_SLOT : 0u) | (is_packed ? KVQ_IN_PAGE : 0u)));
        CHECK(location[cell].slot < (is_exact ? kvq_planner_n_slots(planner) : 1) && location[cell].turned == 0);
    }
    kvq_planner_free(planner);
}

int main(void) {
    kvq_recipe *recipe = recipe_of("skvq:page=64,window=40,sinks=2");
    kvq_planner *a = NULL, *b = NULL;
    CHECK_OK(kvq_planner_new(recipe, N_CELLS, 2, 2, &a));
    CHECK_OK(kvq_planner_new(recipe, N_CELLS, 2, 2, &b));
    misuse(recipe, a);
    locate(recipe);
    append(a, 0, 0, 100);
    append(a, 0, 100, 1);
    append(a, 0, 101, 49);
    append(b, 1, 0, 30);
    move_state(a, b);

    kvq_location location[N_CELLS];
    CHECK_OK(kvq_planner_copy_stream(b, 1, 0));
    CHECK_OK(kvq_planner_locate(b, 0, location));
    CHECK(location[0].places == KVQ_IN_SLOT && location[10].places == KVQ_IN_PAGE);
    CHECK(location[209].places == KVQ_IN_SLOT && location[210].places == KVQ_NOWHERE);
    const uint32_t adopted[] = {200, 193}, twice[] = {1, 1}, outside = N_CELLS;
    const int32_t turned[] = {-8, 3};
    CHECK_INVALID(kvq_planner_adopt(b, 0, twice, turned, 2));
    CHECK_INVALID(kvq_planner_adopt(b, 0, &outside, turned, 1));
    CHECK_INVALID(kvq_planner_adopt(b, 2, adopted, turned, 2));
    CHECK_OK(kvq_planner_adopt(b, 0, adopted, turned, 2));
    CHECK_OK(kvq_planner_locate(b, 0, location));
    CHECK(location[200].places == KVQ_IN_PAGE && location[193].places == KVQ_IN_PAGE);
    CHECK(location[200].turned == -8 && location[193].turned == 3);
    CHECK(location[209].places == KVQ_NOWHERE && location[191].places != KVQ_NOWHERE);
    kvq_planner_reset(b, 0);
    CHECK_OK(kvq_planner_locate(b, 0, location));
    for (size_t cell = 0; cell < N_CELLS; cell++) CHECK(location[cell].places == KVQ_NOWHERE);
    kvq_planner_free(a);
    kvq_planner_free(b);
    kvq_recipe_free(recipe);
    return 0;
}
