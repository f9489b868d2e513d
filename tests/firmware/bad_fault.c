/* Does not end by itself. */
#include "port.h"

int main(void)
{
    port_fault();
    port_end(0);
    return 0;
}
