/* Decodes every element of every tensor with nibblecast_value, and prints a line for each: its name as hexadecimal
   bytes, how many elements it has, the CRC-32 of their values, each as the bits of a float from the lowest byte to the
   highest, and that of their codes as bytes, where codes have 2 or 4 bits: else of nothing. With STEP defined it is one
   in STEP values, and one in STEP blocks of codes. */
#include "checksums.h"

#include "port.h"

#ifndef STEP
#define STEP 1u
#endif

static void write_hexadecimal(uint32_t value, unsigned int digits)
{
    char text[9];
    text[digits] = '\0';
    while (digits > 0u) {
        digits--;
        text[digits] = "0123456789abcdef"[value & 15u];
        value >>= 4;
    }
    port_write(text);
}

/* As zlib's, with the complement left to the caller. */
static uint32_t crc32(uint32_t crc, uint32_t byte)
{
    unsigned int bit;
    crc ^= byte;
    for (bit = 0u; bit < 8u; bit++) {
        crc = (crc >> 1) ^ (((crc & 1u) != 0u) ? 0xedb88320u : 0u);
    }
    return crc;
}

/* The bits of a float; of one NaN for all, since which one a machine makes is its own affair. */
static uint32_t bits_of(float value)
{
    uint32_t bits;
    const uint8_t *from = (const uint8_t *)&value;
    uint8_t *to = (uint8_t *)&bits;
    size_t k;
    for (k = 0u; k < sizeof bits; k++) {
        to[k] = from[k];
    }
    return ((bits & 0x7fffffffu) > 0x7f800000u) ? 0x7fc00000u : bits;
}

static uint32_t checksum(const nibblecast_tensor *t)
{
    uint32_t crc = 0xffffffffu;
    size_t i;
    for (i = 0u; i < t->count; i += STEP) {
        const uint32_t bits = bits_of(nibblecast_value(t, i));
        unsigned int shift;
        for (shift = 0u; shift < 32u; shift += 8u) {
            crc = crc32(crc, (bits >> shift) & 255u);
        }
    }
    return crc ^ 0xffffffffu;
}

#define BLOCK 64u

/* The codes of up to BLOCK elements from `start`, by the getters that a kernel would use. */
static void unpack(const nibblecast_tensor *t, size_t start, size_t count, uint8_t *codes)
{
    const NIBBLECAST_FAR void *data = t->data;
    size_t k;
    if (t->bits == 4u && t->kind == NIBBLECAST_SIGNED) {
        for (k = 0u; k < count; k++) {
            codes[k] = (uint8_t)nibblecast_int4(data, start + k);
        }
    } else if (t->bits == 4u) {
        for (k = 0u; k < count; k++) {
            codes[k] = (uint8_t)nibblecast_uint4(data, start + k);
        }
    } else if (t->kind == NIBBLECAST_SIGNED) {
        for (k = 0u; k < count; k++) {
            codes[k] = (uint8_t)nibblecast_int2(data, start + k);
        }
    } else {
        for (k = 0u; k < count; k++) {
            codes[k] = (uint8_t)nibblecast_uint2(data, start + k);
        }
    }
}

static uint32_t checksum_of_codes(const nibblecast_tensor *t)
{
    uint32_t crc = 0xffffffffu;
    uint8_t codes[BLOCK];
    size_t start;
    if (t->bits > 4u || t->kind > NIBBLECAST_CODEBOOK) {
        return 0u;
    }
    for (start = 0u; start < t->count; start += BLOCK * STEP) {
        const size_t left = t->count - start;
        const size_t count = (left < BLOCK) ? left : BLOCK;
        size_t k;
        unpack(t, start, count, codes);
        for (k = 0u; k < count; k++) {
            crc = crc32(crc, codes[k]);
        }
    }
    return crc ^ 0xffffffffu;
}

void checksums(const nibblecast_tensor *tensors, size_t count)
{
    size_t n;
    for (n = 0u; n < count; n++) {
        const nibblecast_tensor *t = &tensors[n];
        const char *name;
        for (name = t->name; *name != '\0'; name++) {
            write_hexadecimal((uint32_t)*name & 255u, 2u);
        }
        port_write(" ");
        write_hexadecimal((uint32_t)t->count, 8u);
        port_write(" ");
        write_hexadecimal(checksum(t), 8u);
        port_write(" ");
        write_hexadecimal(checksum_of_codes(t), 8u);
        port_write("\n");
    }
}
