/* A file of a user's program, C and C++ alike: macros in #if and in the size of an array, and the table. */
#include "weights.h"

#if weights_TENSOR_COUNT == 0
#error "a model without tensors"
#endif

float element(size_t n, size_t i);
size_t most_elements(void);

static size_t counts[weights_TENSOR_COUNT];

float element(size_t n, size_t i)
{
    return nibblecast_value(&weights_tensors[n], i);
}

size_t most_elements(void)
{
    size_t most = 0u;
    size_t n;
    for (n = 0u; n < weights_TENSOR_COUNT; n++) {
        counts[n] = weights_tensors[n].count;
        most = (counts[n] > most) ? counts[n] : most;
    }
    return most;
}
