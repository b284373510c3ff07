/* The loaded library is the one this header was made for, and says where it runs. */
#include "check.h"

int main(void) {
    char expected[32];
    snprintf(expected, sizeof expected, "%d.%d.%d", KVQ_VERSION_MAJOR, KVQ_VERSION_MINOR, KVQ_VERSION_PATCH);
    CHECK(kvq_last_error()[0] == '\0');
    CHECK(kvq_abi_version() == KVQ_ABI_VERSION);
    CHECK(strcmp(kvq_version(), KVQ_VERSION) == 0);
    CHECK(strcmp(kvq_version(), expected) == 0);
    CHECK(kvq_isa()[0] != '\0');
    CHECK(kvq_last_error()[0] == '\0');
    return 0;
}
