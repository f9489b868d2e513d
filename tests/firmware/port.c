/* What is alike on all machines; memset and memcpy are here since compilers call them where there is no C library. */
#include "port.h"

#include <stddef.h>

void port_end(int status)
{
    char digits[4];
    digits[0] = (char)('0' + status / 100 % 10);
    digits[1] = (char)('0' + status / 10 % 10);
    digits[2] = (char)('0' + status % 10);
    digits[3] = '\0';
    port_write("END ");
    port_write(digits);
    port_write("\n");
    port_exit(status);
}

#ifdef PORT_WITHOUT_LIBC
void *memset(void *to, int value, size_t size);
void *memcpy(void *to, const void *from, size_t size);

void *memset(void *to, int value, size_t size)
{
    volatile unsigned char *target = to; /* volatile: or the loop becomes a call of memset */
    while (size > 0u) {
        *target++ = (unsigned char)value;
        size--;
    }
    return to;
}

void *memcpy(void *to, const void *from, size_t size)
{
    volatile unsigned char *target = to;
    const unsigned char *source = from;
    while (size > 0u) {
        *target++ = *source++;
        size--;
    }
    return to;
}
#endif
