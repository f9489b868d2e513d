/* AVR under simavr, which prints what goes out of UART 0 and ends at a sleep without interrupts. */
#include "port.h"

#include <avr/interrupt.h>
#include <avr/io.h>
#include <avr/sleep.h>

void port_write(const char *text)
{
    UCSR0B = (uint8_t)(1u << TXEN0);
    for (; *text != '\0'; text++) {
        while ((UCSR0A & (1u << UDRE0)) == 0u) {
        }
        UDR0 = (uint8_t)*text;
    }
}

void port_exit(int status)
{
    (void)status;
    while ((UCSR0A & (1u << UDRE0)) == 0u) {
    }
    cli();
    sleep_enable();
    sleep_cpu();
    for (;;) {
    }
}

/* There is no exception for an undefined instruction: an interrupt that nobody handles starts the program again, which
   avr-libc's __bad_interrupt does for all of them. Here it ends the program. */
ISR(BADISR_vect)
{
    port_end(PORT_FAULT);
}

void port_fault(void)
{
    sei();
    UCSR0B = (uint8_t)((1u << TXEN0) | (1u << UDRIE0)); /* the UART is ready to send: an interrupt at once */
    for (;;) {
    }
}
