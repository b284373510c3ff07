/* What a saved state may not bring: an outlier pool that names a cell twice. */
#include "check.h"

#include <stdlib.h>

/* The last rows of a head's pool, which are the end of its range: cell + 1, little endian. */
static void name_cell(uint8_t *mem, kvq_range pool, int row_from_end, uint8_t cell) {
    mem[pool.offset + pool.size - 4 * (size_t)row_from_end] = cell + 1;
}

int main(void) {
    const kvq_shape shape = {4, 2, 64, 128};
    kvq_recipe *recipe = recipe_of("ott:page=64");
    kvq_layout *layout = NULL;
    CHECK_OK(kvq_layout_new(recipe, &shape, 2, 256, 160, &layout));
    kvq_recipe_free(recipe);

    const kvq_side sides[] = {KVQ_SIDE_K, KVQ_SIDE_V};
    for (int i = 0; i < 2; i++) {
        uint8_t *k_mem = aligned_alloc(64, kvq_layout_k_bytes(layout)), *v_mem = aligned_alloc(64, kvq_layout_v_bytes(layout));
        memset(k_mem, 0, kvq_layout_k_bytes(layout));
        memset(v_mem, 0, kvq_layout_v_bytes(layout));
        uint8_t *mem = sides[i] == KVQ_SIDE_K ? k_mem : v_mem;
        kvq_range pools[2];
        size_t n = 0;
        CHECK_OK(kvq_layout_pool_ranges(layout, sides[i], pools, 2, &n));
        CHECK(n == 2);
        CHECK_OK(kvq_pool_check(layout, k_mem, v_mem));
        /* Heads are apart, and two cells are not one. */
        name_cell(mem, pools[0], 1, 7);
        name_cell(mem, pools[1], 1, 7);
        name_cell(mem, pools[1], 2, 8);
        CHECK_OK(kvq_pool_check(layout, k_mem, v_mem));
        name_cell(mem, pools[1], 3, 7);
        CHECK_STATUS(kvq_pool_check(layout, k_mem, v_mem), KVQ_STATUS_FORMAT);
        CHECK(strstr(kvq_last_error(), "cell 7 twice"));
        free(k_mem);
        free(v_mem);
    }
    kvq_layout_free(layout);
    return 0;
}
