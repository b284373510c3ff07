/* The checksum is CRC-32C, and does not depend on how bytes are cut into pieces. */
#include "check.h"

static uint32_t sum(const uint8_t *bytes, size_t n_bytes, size_t piece) {
    uint32_t checksum = 0;
    for (size_t i = 0; i < n_bytes; i += piece) {
        CHECK_OK(kvq_checksum_add(bytes + i, i + piece < n_bytes ? piece : n_bytes - i, &checksum));
    }
    return checksum;
}

int main(void) {
    /* RFC 3720, B.4: 32 zeros, 32 ones, 0 to 31; the check value of the catalogue of CRCs. */
    uint8_t bytes[32] = {0};
    CHECK(sum(bytes, 32, 32) == 0x8a9136aau);
    memset(bytes, 0xff, 32);
    CHECK(sum(bytes, 32, 32) == 0x62a8ab43u);
    for (int i = 0; i < 32; i++) bytes[i] = (uint8_t)i;
    CHECK(sum(bytes, 32, 32) == 0x46dd794eu);
    CHECK(sum((const uint8_t *)"123456789", 9, 9) == 0xe3069283u);

    uint8_t long_bytes[20000];
    uint64_t seed = 1;
    for (size_t i = 0; i < sizeof long_bytes; i++) long_bytes[i] = (uint8_t)random_bits(&seed);
    const uint32_t whole = sum(long_bytes, sizeof long_bytes, sizeof long_bytes);
    for (size_t piece = 1; piece < sizeof long_bytes; piece = 3 * piece + 1) {
        CHECK(sum(long_bytes, sizeof long_bytes, piece) == whole);
    }

    uint32_t untouched = 7;
    CHECK_OK(kvq_checksum_add(long_bytes, 0, &untouched));
    CHECK(untouched == 7);
    return 0;
}
