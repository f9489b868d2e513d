/* The program for one model in all styles. */
#include "checksums.h"
#include "port.h"
#include "as_incbin.h"
#include "as_string.h"
#ifndef BIG_ENDIAN_TARGET
#include "as_words32.h"
#include "as_words64.h"
#endif
#ifdef EMBEDS
#include "as_embed.h"
#endif

int main(void)
{
    checksums(as_incbin_tensors, as_incbin_TENSOR_COUNT);
    checksums(as_string_tensors, as_string_TENSOR_COUNT);
#ifndef BIG_ENDIAN_TARGET
    checksums(as_words32_tensors, as_words32_TENSOR_COUNT);
    checksums(as_words64_tensors, as_words64_TENSOR_COUNT);
#endif
#ifdef EMBEDS
    checksums(as_embed_tensors, as_embed_TENSOR_COUNT);
#endif
    port_end(0);
    return 0;
}
