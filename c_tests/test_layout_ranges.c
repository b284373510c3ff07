/* What state files copy: ranges of slots and pages, and the line that tells which layouts can exchange them. */
#include "check.h"

static kvq_layout *layout_of(const char *spec, kvq_shape shape, uint32_t n_cells, uint32_t n_slots) {
    kvq_recipe *recipe = recipe_of(spec);
    kvq_layout *layout = NULL;
    CHECK_OK(kvq_layout_new(recipe, &shape, 0, n_cells, n_slots, &layout));
    kvq_recipe_free(recipe);
    return layout;
}

static bool same_format(const char *spec, kvq_shape shape, uint32_t n_cells, uint32_t n_slots) {
    const kvq_shape base = {4, 2, 64, 128};
    kvq_layout *a = layout_of("skvq:page=64", base, 256, 160), *b = layout_of(spec, shape, n_cells, n_slots);
    char first[512], second[512];
    CHECK_OK(kvq_layout_format(a, first, sizeof first));
    CHECK_OK(kvq_layout_format(b, second, sizeof second));
    CHECK_STATUS(kvq_layout_format(a, second, strlen(first)), KVQ_STATUS_BUFFER_TOO_SMALL);
    kvq_layout_free(a);
    kvq_layout_free(b);
    return strcmp(first, second) == 0;
}

/* Slots and all pages: ascending, disjoint, inside the memory, and together nearly all of it. */
static void covers(const kvq_layout *layout, kvq_side side, size_t total, uint32_t n_pages) {
    kvq_range slots[2], pages[4];
    size_t n_slots = 0, n = 0, sum = 0;
    CHECK_OK(kvq_layout_slot_ranges(layout, side, NULL, 0, &n_slots));
    CHECK_OK(kvq_layout_page_ranges(layout, side, 0, n_pages, NULL, 0, &n));
    CHECK(n_slots == 2 && n == 4);
    CHECK_OK(kvq_layout_slot_ranges(layout, side, slots, 2, &n));
    CHECK_OK(kvq_layout_page_ranges(layout, side, 0, n_pages, pages, 4, &n));
    const kvq_range all[] = {slots[0], pages[0], pages[1], slots[1], pages[2], pages[3]};
    for (size_t i = 0; i < 6; i++) {
        CHECK(all[i].size > 0 && all[i].offset + all[i].size <= (i < 5 ? all[i + 1].offset : total));
        sum += all[i].size;
    }
    CHECK(sum <= total && sum + 6 * 64 > total);

    size_t parts = 0;
    for (uint32_t page = 0; page < n_pages; page++) {
        kvq_range one[4];
        CHECK_OK(kvq_layout_page_ranges(layout, side, page, 1, one, 4, &n));
        for (size_t i = 0; i < 4; i++) {
            CHECK(one[i].offset >= pages[i].offset && one[i].offset + one[i].size <= pages[i].offset + pages[i].size);
            parts += one[i].size;
        }
    }
    CHECK(parts == pages[0].size + pages[1].size + pages[2].size + pages[3].size);
}

int main(void) {
    const kvq_shape shape = {4, 2, 64, 128};
    kvq_layout *layout = layout_of("skvq:page=64", shape, 250, 160);
    CHECK(kvq_layout_k_bytes(layout) % 64 == 0 && kvq_layout_v_bytes(layout) % 64 == 0);
    CHECK(kvq_layout_bits_k(layout) > 2 && kvq_layout_bits_k(layout) < 5);
    CHECK(kvq_layout_bits_v(layout) > 2 && kvq_layout_bits_v(layout) < 5);
    covers(layout, KVQ_SIDE_K, kvq_layout_k_bytes(layout), 4);
    covers(layout, KVQ_SIDE_V, kvq_layout_v_bytes(layout), 4);

    kvq_range ranges[4];
    size_t n = 77;
    CHECK_STATUS(kvq_layout_slot_ranges(layout, KVQ_SIDE_K, ranges, 1, &n), KVQ_STATUS_BUFFER_TOO_SMALL);
    CHECK_STATUS(kvq_layout_page_ranges(layout, KVQ_SIDE_K, 0, 1, ranges, 3, &n), KVQ_STATUS_BUFFER_TOO_SMALL);
    CHECK_INVALID(kvq_layout_slot_ranges(layout, 2, ranges, 4, &n));
    CHECK_INVALID(kvq_layout_page_ranges(layout, KVQ_SIDE_K, 0, 0, ranges, 4, &n));
    CHECK_INVALID(kvq_layout_page_ranges(layout, KVQ_SIDE_K, 0, 5, ranges, 4, &n));
    CHECK_INVALID(kvq_layout_page_ranges(layout, KVQ_SIDE_K, UINT32_MAX, UINT32_MAX, ranges, 4, &n));
    CHECK(n == 77);
    kvq_layout_free(layout);

    const kvq_shape more_heads = {8, 2, 64, 128}, more_kv_heads = {4, 4, 64, 128}, wider = {4, 2, 128, 128};
    CHECK(same_format("skvq:page=64", shape, 512, 96));
    CHECK(same_format("skvq:page=64,window=64,sinks=0", shape, 256, 160));
    CHECK(same_format("skvq:page=64", more_heads, 256, 160));
    CHECK(!same_format("skvq:page=128", shape, 256, 160));
    CHECK(!same_format("skvq:page=64,k=2", shape, 256, 160));
    CHECK(!same_format("skvq:page=64,v=2", shape, 256, 160));
    CHECK(!same_format("skvq:page=64,rotate=0", shape, 256, 160));
    CHECK(!same_format("skvq:page=64", more_kv_heads, 256, 160));
    CHECK(!same_format("skvq:page=64", wider, 256, 160));
    return 0;
}
