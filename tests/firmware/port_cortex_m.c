/* Cortex-M: vectors, start-up and semihosting. */
#include "semihosting.h"

#include <stddef.h>

extern uint8_t data_in_flash[], data_begin[], data_end[], bss_begin[], bss_end[], stack_top[];

int main(void);
void reset(void);

static void semihosting(uintptr_t operation, const void *argument)
{
    register uintptr_t r0 __asm__("r0") = operation;
    register const void *r1 __asm__("r1") = argument;
    __asm__ volatile("bkpt 0xab" : "+r"(r0) : "r"(r1) : "memory");
}

void port_fault(void)
{
    __asm__ volatile("udf #0");
}

static void fault(void)
{
    port_end(PORT_FAULT);
}

static void __attribute__((noinline)) start(void)
{
    uint8_t *to;
    const uint8_t *from = data_in_flash;
    for (to = data_begin; to != data_end; to++) {
        *to = *from++;
    }
    for (to = bss_begin; to != bss_end; to++) {
        *to = 0u;
    }
    port_exit(main());
}

/* The FPU and MVE are off after reset; `start` is a function of its own so that nothing before here uses them. */
void reset(void)
{
#if defined(__ARM_FP) || defined(__ARM_FEATURE_MVE)
    volatile uint32_t *const coprocessor_access = (volatile uint32_t *)0xe000ed88u;
    *coprocessor_access |= 0xfu << 20;
    __asm__ volatile("dsb\n\tisb" ::: "memory");
#endif
    start();
}

typedef void (*handler)(void);

static const struct {
    uint8_t *stack;
    handler handlers[15];
} vectors __attribute__((section(".vectors"), used)) = {
    stack_top,
    {reset, fault, fault, fault, fault, fault, fault, fault, fault, fault, fault, fault, fault, fault, fault},
};
