/* RISC-V, QEMU's `virt`: start-up and semihosting. */
#include "semihosting.h"

int main(void);
void start(void);

extern uint8_t bss_begin[], bss_end[];

/* The three instructions are the mark of a call: uncompressed, and not across the end of a page, hence .balign, which
   comes first since it fills with compressed instructions. */
static void semihosting(uintptr_t operation, const void *argument)
{
    register uintptr_t a0 __asm__("a0") = operation;
    register const void *a1 __asm__("a1") = argument;
    __asm__ volatile(
        ".balign 16\n\t"
        ".option push\n\t"
        ".option norvc\n\t"
        "slli zero, zero, 0x1f\n\t"
        "ebreak\n\t"
        "srai zero, zero, 7\n\t"
        ".option pop"
        : "+r"(a0)
        : "r"(a1)
        : "memory");
}

void port_fault(void)
{
    __asm__ volatile("unimp");
}

static void __attribute__((aligned(4))) fault(void)
{
    port_end(PORT_FAULT);
}

static void __attribute__((used)) begin(void)
{
    uint8_t *to;
    for (to = bss_begin; to != bss_end; to++) {
        *to = 0u;
    }
    __asm__ volatile("csrw mtvec, %0" ::"r"(fault));
    port_exit(main());
}

void __attribute__((naked, section(".start"))) start(void)
{
    __asm__ volatile(
        ".option push\n\t"
        ".option norelax\n\t"
        "la gp, __global_pointer$\n\t"
        ".option pop\n\t"
#ifdef __riscv_flen
        "li t0, 0x2000\n\t" /* mstatus.FS: the floating-point registers may be used */
        "csrs mstatus, t0\n\t"
#endif
        "la sp, stack_top\n\t"
        "j begin");
}
