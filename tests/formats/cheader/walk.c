/* Prints every value of every tensor, as the bits of a float: a line for each tensor, its name first. */
#include <stdio.h>
#include <string.h>

#include WEIGHTS

int main(void)
{
    size_t n;
    for (n = 0; n != TENSOR_COUNT; n++) {
        const nibblecast_tensor *t = &TENSORS[n];
        size_t i;
        for (i = 0; t->name[i] != '\0'; i++) {
            printf("%02x", NIBBLECAST_CAST(unsigned int, t->name[i]) & 255u);
        }
        for (i = 0; i < t->count; i++) {
            const float value = nibblecast_value(t, i);
            uint32_t bits;
            memcpy(&bits, &value, sizeof bits);
            printf(" %08lx", NIBBLECAST_CAST(unsigned long, bits));
        }
        printf("\n");
    }
    return 0;
}
