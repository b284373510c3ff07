/* Devices are opened by name, or refused with a text that says why; a library without CUDA says so. */
#include "check.h"

static void refused(const char *name, kvq_status status, const char *text) {
    kvq_device *device = (kvq_device *)(uintptr_t)0x5a5a;
    CHECK_STATUS(kvq_device_new(name, &device), status);
    CHECK(device == (kvq_device *)(uintptr_t)0x5a5a);
    if (strstr(kvq_last_error(), text) == NULL) {
        fprintf(stderr, "'%s': '%s' does not say '%s'\n", name, kvq_last_error(), text);
        exit(1);
    }
}

static void null_is_refused(void) {
    kvq_recipe *recipe = NULL;
    kvq_layout *layout = NULL;
    kvq_device *device = NULL;
    const kvq_shape shape = {4, 2, 64, 64};
    const kvq_attend_args attend = {.n_tokens = 1, .n_kv = 64, .n_splits = 1};
    const kvq_store_args store = {.n_tokens = 1};
    size_t bytes = 77;
    uint8_t *workspace = make(1, 512);
    CHECK_OK(kvq_recipe_parse("skvq", &recipe));
    CHECK_OK(kvq_layout_new(recipe, &shape, 0, 64, 16, &layout));
    CHECK_INVALID(kvq_device_new(NULL, &device));
    CHECK_INVALID(kvq_device_new("cuda:0", NULL));
    CHECK_INVALID(kvq_attend_workspace(NULL, NULL, 1, 1, 64, &bytes));
    CHECK_INVALID(kvq_attend_workspace(layout, NULL, 1, 1, 64, &bytes));
    CHECK_INVALID(kvq_store_workspace(layout, NULL, 1, 1, &bytes));
    CHECK_INVALID(kvq_attend_enqueue(NULL, layout, &attend, NULL, workspace, 512, NULL));
    CHECK_INVALID(kvq_store_enqueue(NULL, layout, &store, NULL, workspace, 512, NULL));
    CHECK_INVALID(kvq_dequantize_enqueue(NULL, layout, &attend, NULL, workspace, NULL, NULL));
    CHECK(device == NULL && bytes == 77);
    if (kvq_device_new("cuda:0", &device) == KVQ_STATUS_OK) {
        CHECK_INVALID(kvq_attend_workspace(NULL, device, 1, 1, 64, &bytes));
        CHECK_INVALID(kvq_attend_workspace(layout, device, 1, 1, 64, NULL));
        CHECK_INVALID(kvq_attend_workspace(layout, device, 0, 1, 64, &bytes));
        CHECK_INVALID(kvq_attend_workspace(layout, device, 1, 0, 64, &bytes));
        CHECK_INVALID(kvq_store_workspace(layout, device, 1, 0, &bytes));
        CHECK(bytes == 77);
        CHECK_INVALID(kvq_attend_enqueue(device, NULL, &attend, NULL, workspace, 512, NULL));
        CHECK_INVALID(kvq_attend_enqueue(device, layout, NULL, NULL, workspace, 512, NULL));
        CHECK_INVALID(kvq_attend_enqueue(device, layout, &attend, NULL, NULL, 512, NULL));
        CHECK_INVALID(kvq_attend_enqueue(device, layout, &attend, NULL, workspace, 512, NULL));
        CHECK_INVALID(kvq_dequantize_enqueue(device, layout, NULL, NULL, workspace, NULL, NULL));
        CHECK_INVALID(kvq_dequantize_enqueue(device, layout, &attend, NULL, workspace, NULL, NULL));
    } else {
        printf("skipped with a device: %s\n", kvq_last_error());
    }
    kvq_device_free(device);
    kvq_layout_free(layout);
    kvq_recipe_free(recipe);
    free(workspace);
}

int main(void) {
    kvq_device *device = NULL;
    refused("metal", KVQ_STATUS_INVALID_ARGUMENT, "cuda:0, cuda:1");
    refused("", KVQ_STATUS_INVALID_ARGUMENT, "cuda:0, cuda:1");
    refused("cuda:x", KVQ_STATUS_INVALID_ARGUMENT, "cuda:0, cuda:1");
    const kvq_status status = kvq_device_new("cuda:0", &device);
    if (status == KVQ_STATUS_OK) {
        refused("cuda:4000", KVQ_STATUS_INVALID_ARGUMENT, "no cuda:4000");
    } else {
        CHECK(status == KVQ_STATUS_UNSUPPORTED);
        CHECK(strstr(kvq_last_error(), "without CUDA") != NULL || strstr(kvq_last_error(), "CUDA") != NULL);
        CHECK(device == NULL);
    }
    kvq_device_free(device);
    kvq_device_free(NULL);
    null_is_refused();
    return 0;
}
