/* What the test programs need of a machine: to say something and to end. Each target has a port_*.c. */
#ifndef PORT_H
#define PORT_H

/* Statuses of a program that did not end by itself. */
#define PORT_FAULT 99

void port_write(const char *text);

/* Ends the program. Where the machine has no exit status, it is in the last line that port_end writes. */
void port_exit(int status);

/* What every program ends with: "END status" on a line of its own, so that a cut output is seen everywhere. */
void port_end(int status);

/* Does what the machine takes for an error: an undefined instruction. */
void port_fault(void);

#endif
