/* Ends as a program does that found something wrong. */
#include "port.h"

int main(void)
{
    port_end(7);
    return 0;
}
