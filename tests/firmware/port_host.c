/* A machine with an operating system. */
#include "port.h"

#include <stdio.h>
#include <stdlib.h>

void port_write(const char *text)
{
    fputs(text, stdout);
}

void port_exit(int status)
{
    exit(status);
}

void port_fault(void)
{
    fflush(stdout);
    abort();
}
