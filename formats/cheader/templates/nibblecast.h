/*
 * nibblecast.h - what the C arrays that nibblecast writes have in common
 *
 * One copy serves every model of a program. It needs <stdint.h> and <stddef.h> only, and is C99 and C++98 alike.
 *
 *     value = scale * (code - zero_point) + offset       (code -> codebook[code] first where there is a codebook)
 *
 * Codes of 2 and 4 bits are packed: element 0 in the lowest bits of byte 0, no padding between rows. This is how
 * TensorFlow Lite (Micro), CMSIS-NN, NMSIS-NN, muRISCV-NN and ONNX store them: their kernels take `data` as it is.
 * A model that is written in another packing says so in nibblecast_tensor.packing.
 *
 * Macros that can be defined before this file is included (-DNIBBLECAST_ALIGN=4), in every file alike:
 *
 *     NIBBLECAST_ALIGN       alignment of data in bytes, whatever models were written with
 *     NIBBLECAST_BEFORE      anything that goes before the definition of an array, such as _Pragma("location=...")
 *     NIBBLECAST_AFTER       anything that goes after the declarator: PROGMEM, or __attribute__((section(".qspi")))
 *     NIBBLECAST_FAR         the memory that arrays are in, where that is part of a pointer's type: __memx for avr-gcc.
 *                            Where it is not defined, models above 64 KiB are an #error on AVR
 *     NIBBLECAST_READ_U8(p)  how a byte of an array is read; pgm_read_byte(p) where AFTER is PROGMEM
 *     NIBBLECAST_DENSE_ONLY  makes nibblecast_code and nibblecast_value smaller, for programs without other packings
 *     NIBBLECAST_INLINE      "static inline" in this compiler's words
 *     NIBBLECAST_ALIGNED(n)  how it is told an alignment, before the definition
 *     NIBBLECAST_SECTION_BEFORE(name), NIBBLECAST_SECTION_AFTER(name)    how it is told a section
 *
 * NIBBLECAST_BEFORE and _AFTER apply to the arrays of data and parameters; names, shapes and the table of tensors stay
 * in ordinary constant memory. A model that is written with a section of its own has PREFIX_BEFORE and PREFIX_AFTER in
 * their place.
 */
#ifndef NIBBLECAST_H
#define NIBBLECAST_H

#include <stddef.h>
#include <stdint.h>

/* Counts up when generated files and this one no longer fit together. */
#define NIBBLECAST_INTERFACE 3

#ifndef NIBBLECAST_INLINE
#if defined(__cplusplus)
#define NIBBLECAST_INLINE static inline
#elif defined(__STDC_VERSION__)
#if __STDC_VERSION__ >= 199901L
#define NIBBLECAST_INLINE static inline
#endif
#endif
#endif
#ifndef NIBBLECAST_INLINE
#if defined(__GNUC__)
#define NIBBLECAST_INLINE static __inline__
#else
#define NIBBLECAST_INLINE static
#endif
#endif

#if defined(__IAR_SYSTEMS_ICC__)
#define NIBBLECAST_PRAGMA(text) _Pragma(#text)
#define NIBBLECAST_EXPANDED_PRAGMA(text) NIBBLECAST_PRAGMA(text)
#endif

#ifndef NIBBLECAST_ALIGNED
#if defined(__IAR_SYSTEMS_ICC__)
#define NIBBLECAST_ALIGNED(n) NIBBLECAST_EXPANDED_PRAGMA(data_alignment = n)
#elif defined(__GNUC__) || defined(__clang__) || defined(__CC_ARM) || defined(__TI_COMPILER_VERSION__)
#define NIBBLECAST_ALIGNED(n) __attribute__((aligned(n)))
#elif defined(_MSC_VER)
#define NIBBLECAST_ALIGNED(n) __declspec(align(n))
#elif defined(__cplusplus)
#define NIBBLECAST_ALIGNED(n) alignas(n)
#elif defined(__STDC_VERSION__)
#if __STDC_VERSION__ >= 201112L
#define NIBBLECAST_ALIGNED(n) _Alignas(n)
#endif
#endif
#endif
#ifndef NIBBLECAST_ALIGNED
#error "define NIBBLECAST_ALIGNED(n) as this compiler's word for alignment, or as nothing where that is no matter"
#endif

#ifndef NIBBLECAST_SECTION_AFTER
#if defined(__IAR_SYSTEMS_ICC__)
#define NIBBLECAST_SECTION_BEFORE(name) NIBBLECAST_EXPANDED_PRAGMA(location = name)
#define NIBBLECAST_SECTION_AFTER(name)
#elif defined(_MSC_VER) && !defined(__clang__)
#define NIBBLECAST_SECTION_BEFORE(name) __pragma(section(name, read)) __declspec(allocate(name))
#define NIBBLECAST_SECTION_AFTER(name)
#elif defined(__GNUC__) || defined(__clang__) || defined(__CC_ARM) || defined(__TI_COMPILER_VERSION__)
#define NIBBLECAST_SECTION_AFTER(name) __attribute__((section(name)))
#endif
#endif
#ifndef NIBBLECAST_SECTION_BEFORE
#define NIBBLECAST_SECTION_BEFORE(name)
#endif

#ifndef NIBBLECAST_BEFORE
#define NIBBLECAST_BEFORE
#endif

#ifndef NIBBLECAST_AFTER
#define NIBBLECAST_AFTER
#endif

#ifndef NIBBLECAST_FAR
#define NIBBLECAST_FAR
#define NIBBLECAST_NEAR
#endif

#ifndef NIBBLECAST_READ_U8
#define NIBBLECAST_READ_U8(p) (*(p))
#endif

/* NaN and infinity as constant expressions: C has no literals for them. */
#if defined(__GNUC__) || defined(__clang__)
#define NIBBLECAST_NAN __builtin_nanf("")
#define NIBBLECAST_INF __builtin_inff()
#else
#include <math.h>
#define NIBBLECAST_NAN NAN
#define NIBBLECAST_INF INFINITY
#endif

#if defined(__cplusplus)
#define NIBBLECAST_CAST(type, value) static_cast<type>(value)
#else
#define NIBBLECAST_CAST(type, value) ((type)(value))
#endif

/* Integers of 64 bits from their halves: C90 has no literals for them. */
#define NIBBLECAST_UINT64(high, low) ((NIBBLECAST_CAST(uint64_t, high) << 32) | (low))
#define NIBBLECAST_INT64(high, low) NIBBLECAST_CAST(int64_t, NIBBLECAST_UINT64(high, low))

/* nibblecast_tensor.kind: what an element of `data` is. Floats that C has no type for are stored as their bits. */
#define NIBBLECAST_UNSIGNED 0        /* unsigned integer of 2, 4, 8, 16, 32 or 64 bits */
#define NIBBLECAST_SIGNED 1          /* two's complement integer of as many bits */
#define NIBBLECAST_CODEBOOK 2        /* unsigned integer of 2, 4 or 8 bits, an index into `codebook` */
#define NIBBLECAST_BOOL 3            /* 0 or 1 in a byte */
#define NIBBLECAST_FLOAT64 4         /* double */
#define NIBBLECAST_FLOAT32 5         /* float */
#define NIBBLECAST_FLOAT16 6         /* IEEE half precision in a uint16_t */
#define NIBBLECAST_BFLOAT16 7        /* the upper half of a float in a uint16_t */
#define NIBBLECAST_FLOAT8_E4M3FN 8   /* one in a byte, as the five below */
#define NIBBLECAST_FLOAT8_E4M3FNUZ 9
#define NIBBLECAST_FLOAT8_E5M2 10
#define NIBBLECAST_FLOAT8_E5M2FNUZ 11
#define NIBBLECAST_FLOAT8_E8M0FNU 12
#define NIBBLECAST_FLOAT6_E2M3FN 13
#define NIBBLECAST_FLOAT6_E3M2FN 14
#define NIBBLECAST_FLOAT4_E2M1FN 15  /* two in a byte */

/* nibblecast_tensor.granularity: which elements share one scale (and zero point, and offset). */
#define NIBBLECAST_NOT_QUANTIZED 0   /* none: there is no scale */
#define NIBBLECAST_PER_TENSOR 1      /* all */
#define NIBBLECAST_PER_AXIS 2        /* those of one position along `axis` */
#define NIBBLECAST_BLOCKWISE 3       /* those of one block of `block_shape` */
#define NIBBLECAST_GROUP_INDEX 4     /* as blockwise, but along `axis` position p belongs to group `group_index[p]` */

/* nibblecast_tensor.packing: how elements of 2 and 4 bits lie in bytes; those of all others are NIBBLECAST_DENSE. */
#define NIBBLECAST_DENSE 0u                  /* the first in the lowest bits, nothing between rows */
#define NIBBLECAST_UNPACKED 1u               /* each in a byte of its own, int8_t or uint8_t */
#define NIBBLECAST_HIGH_FIRST 2u             /* the first in the highest bits */
#define NIBBLECAST_ROWS_PADDED 4u            /* each row of the last axis begins at a byte */
#define NIBBLECAST_ROWS_PADDED_HIGH_FIRST 6u /* the two above */

typedef struct nibblecast_tensor {
    const char *name;                           /* as in the model, UTF-8 */
    const NIBBLECAST_FAR void *data;            /* the elements, row-major */
    size_t count;                               /* how many elements */
    const size_t *shape;                        /* `rank` sizes; NULL where rank is 0, as the next two */
    const size_t *block_shape;                  /* `rank` block sizes; NULL without scale */
    const size_t *grid;                         /* `rank` numbers of parameters; NULL without scale */
    const NIBBLECAST_FAR float *scale;          /* one for each place of `grid`; NULL: the elements are the values */
    const NIBBLECAST_FAR int32_t *zero_point;   /* likewise; NULL: there are none */
    const NIBBLECAST_FAR float *zero_point_real; /* likewise, where they are no integers; NULL: there are none */
    const NIBBLECAST_FAR float *offset;         /* likewise; NULL: there are none */
    const NIBBLECAST_FAR float *codebook;       /* 2 to the `bits` values; NULL: there is none */
    const NIBBLECAST_FAR uint16_t *group_index; /* shape[axis] groups, each below grid[axis]; NULL: there is none */
    uint8_t kind;                               /* NIBBLECAST_UNSIGNED ... */
    uint8_t bits;                               /* of one element: 2, 4, 8, 16, 32 or 64 */
    uint8_t rank;
    uint8_t granularity;                        /* NIBBLECAST_NOT_QUANTIZED ... */
    uint8_t axis;                               /* of NIBBLECAST_PER_AXIS and NIBBLECAST_GROUP_INDEX */
    uint8_t packing;                            /* NIBBLECAST_DENSE ... */
} nibblecast_tensor;

/* Element i of dense data: 0..15, 0..3, -8..7, -2..1. */

NIBBLECAST_INLINE int nibblecast_uint4(const NIBBLECAST_FAR void *data, size_t i)
{
    const NIBBLECAST_FAR uint8_t *bytes = NIBBLECAST_CAST(const NIBBLECAST_FAR uint8_t *, data);
    const unsigned int byte = NIBBLECAST_READ_U8(bytes + i / 2u);
    return NIBBLECAST_CAST(int, (byte >> (i % 2u * 4u)) & 15u);
}

NIBBLECAST_INLINE int nibblecast_uint2(const NIBBLECAST_FAR void *data, size_t i)
{
    const NIBBLECAST_FAR uint8_t *bytes = NIBBLECAST_CAST(const NIBBLECAST_FAR uint8_t *, data);
    const unsigned int byte = NIBBLECAST_READ_U8(bytes + i / 4u);
    return NIBBLECAST_CAST(int, (byte >> (i % 4u * 2u)) & 3u);
}

NIBBLECAST_INLINE int nibblecast_int4(const NIBBLECAST_FAR void *data, size_t i)
{
    return (nibblecast_uint4(data, i) ^ 8) - 8;
}

NIBBLECAST_INLINE int nibblecast_int2(const NIBBLECAST_FAR void *data, size_t i)
{
    return (nibblecast_uint2(data, i) ^ 2) - 2;
}

/* The same of data whose first element is in the highest bits. */

NIBBLECAST_INLINE int nibblecast_uint4_high_first(const NIBBLECAST_FAR void *data, size_t i)
{
    return nibblecast_uint4(data, i ^ 1u);
}

NIBBLECAST_INLINE int nibblecast_uint2_high_first(const NIBBLECAST_FAR void *data, size_t i)
{
    return nibblecast_uint2(data, i ^ 3u);
}

NIBBLECAST_INLINE int nibblecast_int4_high_first(const NIBBLECAST_FAR void *data, size_t i)
{
    return nibblecast_int4(data, i ^ 1u);
}

NIBBLECAST_INLINE int nibblecast_int2_high_first(const NIBBLECAST_FAR void *data, size_t i)
{
    return nibblecast_int2(data, i ^ 3u);
}

/* What to give to the getters of dense data for element i of 2 or 4 bits, however the tensor is packed into bytes. */
NIBBLECAST_INLINE size_t nibblecast_place(const nibblecast_tensor *t, size_t i)
{
    size_t last = 3u; /* of the elements of a byte */
    if (t->bits == 4u) {
        last = 1u;
    }
    if ((t->packing & NIBBLECAST_ROWS_PADDED) != 0u && t->rank != 0u) {
        const size_t row = t->shape[t->rank - 1u];
        const size_t padded = (row + last) & ~last;
        i = ((i / row) * padded) + (i % row);
    }
    return ((t->packing & NIBBLECAST_HIGH_FIRST) != 0u) ? i ^ last : i;
}

/* Copies `size` bytes of an array: element `i` of those that are `size` bytes long. */
NIBBLECAST_INLINE void nibblecast_read(void *to, const NIBBLECAST_FAR void *array, size_t i, size_t size)
{
    uint8_t *target = NIBBLECAST_CAST(uint8_t *, to);
    const NIBBLECAST_FAR uint8_t *source = NIBBLECAST_CAST(const NIBBLECAST_FAR uint8_t *, array) + i * size;
    size_t k;
    for (k = 0u; k < size; k++) {
        target[k] = NIBBLECAST_READ_U8(source + k);
    }
}

NIBBLECAST_INLINE float nibblecast_read_float(const NIBBLECAST_FAR float *array, size_t i)
{
    float value;
    nibblecast_read(&value, array, i, sizeof value);
    return value;
}

/* The float that these bits are. */
NIBBLECAST_INLINE float nibblecast_float_of_bits(uint32_t bits)
{
    float value;
    void *to = &value;
    const void *from = &bits;
    uint8_t *target = NIBBLECAST_CAST(uint8_t *, to);
    const uint8_t *source = NIBBLECAST_CAST(const uint8_t *, from);
    size_t k;
    for (k = 0u; k < sizeof value; k++) {
        target[k] = source[k];
    }
    return value;
}

/* `value` as a float and no more: keeps operations from being fused (FMA), or computed with more bits (x87). */
NIBBLECAST_INLINE float nibblecast_rounded(float value)
{
    volatile float rounded = value;
    return rounded;
}

/* Which bit patterns of a small float are no numbers. */
#define NIBBLECAST_ALL_FINITE 0u      /* none */
#define NIBBLECAST_IEEE 1u            /* the highest exponent: infinities and NaN */
#define NIBBLECAST_NAN_IS_ALL_ONES 2u /* all bits but the sign set: NaN */
#define NIBBLECAST_NAN_IS_MINUS_0 3u  /* the sign bit alone: NaN */

/* The value of a float of 1 + exponent_bits + mantissa_bits bits, each of which a float can hold exactly. */
NIBBLECAST_INLINE float nibblecast_small_float(
    uint32_t code, unsigned int exponent_bits, unsigned int mantissa_bits, uint32_t bias, unsigned int not_numbers)
{
    const uint32_t mantissa_end = NIBBLECAST_CAST(uint32_t, 1) << mantissa_bits;
    const uint32_t exponent_end = NIBBLECAST_CAST(uint32_t, 1) << exponent_bits;
    const uint32_t sign = ((code >> (exponent_bits + mantissa_bits)) & 1u) << 31;
    uint32_t exponent = (code >> mantissa_bits) & (exponent_end - 1u);
    uint32_t mantissa = code & (mantissa_end - 1u);
    const int all_ones = (exponent == exponent_end - 1u) && (mantissa == mantissa_end - 1u);
    const int minus_0 = (sign != 0u) && (exponent == 0u) && (mantissa == 0u);

    if (not_numbers == NIBBLECAST_IEEE && exponent == exponent_end - 1u) {
        return nibblecast_float_of_bits(sign | (mantissa == 0u ? 0x7f800000u : 0x7fc00000u));
    }
    if ((not_numbers == NIBBLECAST_NAN_IS_ALL_ONES && all_ones)
        || (not_numbers == NIBBLECAST_NAN_IS_MINUS_0 && minus_0)) {
        return nibblecast_float_of_bits(sign | 0x7fc00000u);
    }
    if (exponent == 0u) {
        if (mantissa == 0u) {
            return nibblecast_float_of_bits(sign);
        }
        exponent = 1u; /* a subnormal number; `float` reaches far below it, so that there it is a normal one */
        while ((mantissa & mantissa_end) == 0u) {
            mantissa <<= 1;
            bias++;
        }
        mantissa -= mantissa_end;
    }
    return nibblecast_float_of_bits(sign | ((exponent + 127u - bias) << 23) | (mantissa << (23u - mantissa_bits)));
}

/* Element i of data of 8, 16, 32 or 64 bits. */

NIBBLECAST_INLINE int64_t nibblecast_signed_element(const NIBBLECAST_FAR void *data, unsigned int bits, size_t i)
{
    int8_t narrow;
    int16_t half;
    int32_t word;
    int64_t wide;
    switch (bits) {
    case 8:
        nibblecast_read(&narrow, data, i, sizeof narrow);
        return narrow;
    case 16:
        nibblecast_read(&half, data, i, sizeof half);
        return half;
    case 32:
        nibblecast_read(&word, data, i, sizeof word);
        return word;
    default:
        nibblecast_read(&wide, data, i, sizeof wide);
        return wide;
    }
}

NIBBLECAST_INLINE uint64_t nibblecast_unsigned_element(const NIBBLECAST_FAR void *data, unsigned int bits, size_t i)
{
    uint8_t narrow;
    uint16_t half;
    uint32_t word;
    uint64_t wide;
    switch (bits) {
    case 8:
        nibblecast_read(&narrow, data, i, sizeof narrow);
        return narrow;
    case 16:
        nibblecast_read(&half, data, i, sizeof half);
        return half;
    case 32:
        nibblecast_read(&word, data, i, sizeof word);
        return word;
    default:
        nibblecast_read(&wide, data, i, sizeof wide);
        return wide;
    }
}

/* Element i as it is stored: an integer (64 unsigned bits as two's complement), or the bits of a float; not a double. */
NIBBLECAST_INLINE int64_t nibblecast_code(const nibblecast_tensor *t, size_t i)
{
    const int is_signed = (t->kind == NIBBLECAST_SIGNED);
#if defined(NIBBLECAST_DENSE_ONLY)
    const unsigned int bits = t->bits;
#else
    const unsigned int bits = (t->packing == NIBBLECAST_UNPACKED) ? 8u : t->bits;
    if (bits < 8u && t->packing != NIBBLECAST_DENSE) {
        i = nibblecast_place(t, i);
    }
#endif
    if (bits == 4u) {
        return is_signed ? nibblecast_int4(t->data, i) : nibblecast_uint4(t->data, i);
    }
    if (bits == 2u) {
        return is_signed ? nibblecast_int2(t->data, i) : nibblecast_uint2(t->data, i);
    }
    if (is_signed) {
        return nibblecast_signed_element(t->data, bits, i);
    }
    return NIBBLECAST_CAST(int64_t, nibblecast_unsigned_element(t->data, bits, i));
}

/* Which of `scale`, `zero_point` and `offset` is that of element i, which must be below `count`. */
NIBBLECAST_INLINE size_t nibblecast_block(const nibblecast_tensor *t, size_t i)
{
    size_t block = 0u;
    size_t stride = 1u;
    size_t axis = t->rank;
    while (axis > 0u) {
        size_t position;
        axis--;
        position = i % t->shape[axis];
        i /= t->shape[axis];
        if (t->group_index != NULL && axis == t->axis) {
            uint16_t group;
            nibblecast_read(&group, t->group_index, position, sizeof group);
            position = group;
        } else {
            position /= t->block_shape[axis];
        }
        block += position * stride;
        stride *= t->grid[axis];
    }
    return block;
}

/* Element i before scale, zero point and offset. */
NIBBLECAST_INLINE float nibblecast_element(const nibblecast_tensor *t, size_t i)
{
    const int64_t code = (t->kind == NIBBLECAST_FLOAT64) ? 0 : nibblecast_code(t, i);
    const uint32_t bits = NIBBLECAST_CAST(uint32_t, code);
    double number;
    switch (t->kind) {
    case NIBBLECAST_UNSIGNED:
        return NIBBLECAST_CAST(float, NIBBLECAST_CAST(uint64_t, code));
    case NIBBLECAST_CODEBOOK:
        return nibblecast_read_float(t->codebook, NIBBLECAST_CAST(size_t, code));
    case NIBBLECAST_FLOAT64:
        nibblecast_read(&number, t->data, i, sizeof number);
        return NIBBLECAST_CAST(float, number);
    case NIBBLECAST_FLOAT32:
        return nibblecast_float_of_bits(bits);
    case NIBBLECAST_FLOAT16:
        return nibblecast_small_float(bits, 5u, 10u, 15u, NIBBLECAST_IEEE);
    case NIBBLECAST_BFLOAT16:
        return nibblecast_float_of_bits(bits << 16);
    case NIBBLECAST_FLOAT8_E4M3FN:
        return nibblecast_small_float(bits, 4u, 3u, 7u, NIBBLECAST_NAN_IS_ALL_ONES);
    case NIBBLECAST_FLOAT8_E4M3FNUZ:
        return nibblecast_small_float(bits, 4u, 3u, 8u, NIBBLECAST_NAN_IS_MINUS_0);
    case NIBBLECAST_FLOAT8_E5M2:
        return nibblecast_small_float(bits, 5u, 2u, 15u, NIBBLECAST_IEEE);
    case NIBBLECAST_FLOAT8_E5M2FNUZ:
        return nibblecast_small_float(bits, 5u, 2u, 16u, NIBBLECAST_NAN_IS_MINUS_0);
    case NIBBLECAST_FLOAT8_E8M0FNU: /* powers of two from 2^-127, which is a subnormal `float`, to 2^127, and NaN */
        return nibblecast_float_of_bits((bits == 0u) ? 0x00400000u : (bits == 255u) ? 0x7fc00000u : bits << 23);
    case NIBBLECAST_FLOAT6_E2M3FN:
        return nibblecast_small_float(bits, 2u, 3u, 1u, NIBBLECAST_ALL_FINITE);
    case NIBBLECAST_FLOAT6_E3M2FN:
        return nibblecast_small_float(bits, 3u, 2u, 3u, NIBBLECAST_ALL_FINITE);
    case NIBBLECAST_FLOAT4_E2M1FN:
        return nibblecast_small_float(bits, 2u, 1u, 1u, NIBBLECAST_ALL_FINITE);
    default: /* NIBBLECAST_SIGNED, NIBBLECAST_BOOL */
        return NIBBLECAST_CAST(float, code);
    }
}

/* code - zero_point where both are integers: a float need not hold either before the subtraction. */
NIBBLECAST_INLINE float nibblecast_difference(const nibblecast_tensor *t, size_t i, size_t block)
{
    int32_t zero_point;
    uint64_t difference;
    nibblecast_read(&zero_point, t->zero_point, block, sizeof zero_point);
    difference = NIBBLECAST_CAST(uint64_t, nibblecast_code(t, i));
    difference -= NIBBLECAST_CAST(uint64_t, NIBBLECAST_CAST(int64_t, zero_point));
    return nibblecast_rounded(NIBBLECAST_CAST(float, NIBBLECAST_CAST(int64_t, difference)));
}

/* The value of element i, which must be below `count`: each operation is rounded to float, in the formula's order. */
NIBBLECAST_INLINE float nibblecast_value(const nibblecast_tensor *t, size_t i)
{
    float value;
    size_t block;
    if (t->scale == NULL) {
        return nibblecast_rounded(nibblecast_element(t, i));
    }
    block = nibblecast_block(t, i);
    if (t->zero_point != NULL && t->kind <= NIBBLECAST_SIGNED) {
        value = nibblecast_difference(t, i, block);
    } else {
        value = nibblecast_rounded(nibblecast_element(t, i));
        if (t->zero_point != NULL) {
            int32_t zero_point;
            nibblecast_read(&zero_point, t->zero_point, block, sizeof zero_point);
            value = nibblecast_rounded(value - NIBBLECAST_CAST(float, zero_point));
        } else if (t->zero_point_real != NULL) {
            value = nibblecast_rounded(value - nibblecast_read_float(t->zero_point_real, block));
        }
    }
    value = nibblecast_rounded(value * nibblecast_read_float(t->scale, block));
    if (t->offset != NULL) {
        value = nibblecast_rounded(value + nibblecast_read_float(t->offset, block));
    }
    return value;
}

#endif /* NIBBLECAST_H */
