/* What all models have in common; with a single header that is in the header. */
#ifndef CHECKSUMS_H
#define CHECKSUMS_H

#ifdef SINGLE_HEADER
#include "weights.h"
#else
#include "nibblecast.h"
#endif

void checksums(const nibblecast_tensor *tensors, size_t count);

#endif
