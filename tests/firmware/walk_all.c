/* The program for one model. */
#include "checksums.h"
#include "port.h"
#include "weights.h"

int main(void)
{
    checksums(weights_tensors, weights_TENSOR_COUNT);
    port_end(0);
    return 0;
}
