"""The machines that generated C is compiled for and run on, and how: one row of a table each."""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.tools import need, unavailable

HERE = Path(__file__).parent
FAULT = 99
_SECONDS = 60

#: For what is written by hand here, and for what is generated.
WARNINGS = tuple(
    "-Wall -Wextra -Wconversion -Wsign-conversion -Wshadow -Wundef -Wcast-qual -Wcast-align -Wstrict-prototypes "
    "-Wmissing-prototypes -Werror".split()
)
_BARE = "-ffreestanding -ffunction-sections -fdata-sections -DPORT_WITHOUT_LIBC"
_ARM_LINK = f"-nostdlib -nostartfiles -Wl,--gc-sections,-z,noexecstack -T {HERE}/cortex_m.ld"
_MPS = "-Wl,--defsym=flash_size=512K -Wl,--defsym=ram_size=512K"
_MICROBIT = "-Wl,--defsym=flash_size=256K -Wl,--defsym=ram_size=16K"
_QEMU = "-display none -monitor none -serial none -chardev stdio,id=out"
_SEMIHOSTING = f"{_QEMU} -semihosting-config enable=on,target=native,chardev=out"
_RISCV_LINK = f"-nostdlib -nostartfiles -Wl,--gc-sections -T {HERE}/riscv.ld"
_SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g"
_PROGMEM = "-include avr/pgmspace.h -DNIBBLECAST_AFTER=PROGMEM -DNIBBLECAST_READ_U8(p)=pgm_read_byte(p)"


@dataclass(frozen=True, slots=True)
class Target:
    """A machine, or a way to compile for it. Commands are split at spaces and run where the program is made.

    `compile` makes object files of C sources, `link` `program` of these and `libraries`, `convert` what `run` runs.
    `port` is the part of these tests that knows the machine. `status_printed`: the exit status of `run` says nothing,
    the last line of the output does, and that goes to stderr. `fault` is the status of a program that does what it must
    not. `avr`: pointers, sizes and `int` have 16 bits, `double` 32, and what is not in PROGMEM is in a RAM of some KiB.
    `section` is where arrays go that the assembler reads from a file, where it must be told. `big_endian` and `embeds`
    (#embed) are what they say. `machines`: it is there on these only.
    """

    name: str
    packages: str
    compile: str
    link: str
    run: str
    port: str = "port_host.c"
    libraries: str = ""
    convert: str = ""
    status_printed: bool = False
    fault: int = FAULT
    avr: bool = False
    section: str = ""
    big_endian: bool = False
    embeds: bool = False
    machines: tuple[str, ...] = ()

    @property
    def tools(self) -> tuple[str, ...]:
        """The commands that must be there."""
        commands = dict.fromkeys(command.split()[0] for command in self._commands if command)
        return tuple(command for command in commands if not command.startswith("./"))

    @property
    def _commands(self) -> tuple[str, ...]:
        return self.compile, self.link, self.convert, self.run


def _cortex_m(name: str, core: str, machine: str, memory: str = _MPS) -> Target:
    command = f"arm-none-eabi-gcc -mthumb {core}"
    return Target(
        name,
        packages="gcc-arm-none-eabi qemu-system-arm",
        compile=f"{command} -std=gnu11 -Os {_BARE}",
        link=f"{command} {_ARM_LINK} {memory}",
        libraries="-lgcc",
        run=f"qemu-system-arm -M {machine} {_SEMIHOSTING} -kernel program",
        port="port_cortex_m.c",
    )


def _m55() -> Target:
    """Compiled by clang: Debian 12's arm-none-eabi-gcc 12.2 miscompiles MVE. Linked by gcc, which knows its libgcc."""
    core = "-mcpu=cortex-m55 -mthumb -mfloat-abi=hard"
    return Target(
        "cortex-m55-mve",
        packages="clang-19 gcc-arm-none-eabi qemu-system-arm",
        compile=f"clang-19 --target=thumbv8.1m.main-none-eabi {core} -std=gnu11 -O3 {_BARE}",
        link=f"arm-none-eabi-gcc {core} {_ARM_LINK} {_MPS}",
        libraries="-lgcc",
        run=f"qemu-system-arm -M mps3-an547 {_SEMIHOSTING} -kernel program",
        port="port_cortex_m.c",
        embeds=True,
    )


def _riscv(name: str, bits: int, core: str, abi: str) -> Target:
    """The start-up code needs zicsr; gcc 12 finds its libgcc only without that word."""
    return Target(
        name,
        packages="gcc-riscv64-unknown-elf qemu-system-misc",
        compile=f"riscv64-unknown-elf-gcc -march={core}_zicsr {abi} -std=gnu11 -Os {_BARE}",
        link=f"riscv64-unknown-elf-gcc -march={core} {abi} {_RISCV_LINK}",
        libraries="-lgcc",
        run=f"qemu-system-riscv{bits} -M virt -bios none {_SEMIHOSTING} -kernel program",
        port="port_riscv.c",
    )


def _avr(name: str, device: str, arrays: str, link: str = "", section: str = ".progmem.data") -> Target:
    """Converted, since of an ELF file simavr loads .text and .data only."""
    return Target(
        name,
        packages="gcc-avr avr-libc simavr",
        compile=f"avr-gcc -mmcu={device} -std=gnu11 -Os -ffunction-sections -fdata-sections {arrays}",
        link=f"avr-gcc -mmcu={device} -Wl,--gc-sections {link}",
        libraries="-lm",
        convert="avr-objcopy -O ihex --gap-fill 0xff -R .eeprom program program.hex",
        run=f"simavr -m {device} -f 16000000 program.hex",
        port="port_avr.c",
        status_printed=True,
        avr=True,
        section=section,
    )


def _host(name: str, packages: str, compiler: str, flags: str, machines: tuple[str, ...] = ()) -> Target:
    command = f"{compiler} {flags}"
    return Target(name, packages, command, command, "./program", fault=-6, machines=machines)


TARGETS = (
    _host("gcc-sanitizers", "gcc", "gcc", f"-std=c99 -O1 {_SANITIZE}"),
    _host("clang-sanitizers", "clang libclang-rt-dev", "clang", f"-std=c99 -O1 {_SANITIZE}"),
    # arithmetic with more bits than a float has: what nibblecast_rounded is for
    _host("x87", "gcc", "gcc", "-std=gnu11 -O3 -mfpmath=387", ("x86_64", "AMD64")),
    # big-endian
    Target(
        "powerpc",
        packages="gcc-powerpc-linux-gnu libc6-dev-powerpc-cross qemu-user",
        compile="powerpc-linux-gnu-gcc -std=gnu11 -O3 -ffp-contract=fast",
        link="powerpc-linux-gnu-gcc -static",
        run="qemu-ppc program",
        fault=-6,
        big_endian=True,
    ),
    _cortex_m("cortex-m0", "-mcpu=cortex-m0", "microbit", _MICROBIT),
    _cortex_m("cortex-m3", "-mcpu=cortex-m3", "mps2-an385"),
    _cortex_m("cortex-m4f", "-mcpu=cortex-m4 -mfloat-abi=hard -mfpu=fpv4-sp-d16", "mps2-an386"),
    _cortex_m("cortex-m7", "-mcpu=cortex-m7 -mfloat-abi=hard -mfpu=fpv5-d16", "mps2-an500"),
    _m55(),
    _riscv("rv32", 32, "rv32imac", "-mabi=ilp32"),
    _riscv("rv64", 64, "rv64gc", "-mabi=lp64d -mcmodel=medany"),
    _avr("atmega328p", "atmega328p", _PROGMEM),
    _avr("atmega2560", "atmega2560", _PROGMEM),
    # arrays beyond the 64 KiB that pointers reach: all of a model in one stretch of 64 KiB, read by far addresses; not
    # from its very start, where the 16 bits of an address are those of NULL
    _avr(
        "atmega2560-far",
        "atmega2560",
        "-include avr/pgmspace.h -DNIBBLECAST_AFTER=__attribute__((section(\".far\"))) "
        "-DNIBBLECAST_READ_U8(p)=pgm_read_byte_far(0x20000UL+(uint16_t)(uintptr_t)(p))",
        "-Wl,--section-start=.far=0x20010",
        section=".far",
    ),
    # the same wherever arrays lie: pointers of 24 bits, in C only
    _avr("atmega2560-memx", "atmega2560", "-DNIBBLECAST_FAR=__memx"),
)  # fmt: skip

HERE_TOO = tuple(target for target in TARGETS if not target.machines or platform.machine() in target.machines)


def need_target(target: Target, folder: Path) -> None:
    """Skips the test, or in CI fails it, unless the target's tools make a program of the least source: headers and
    libraries may be missing."""
    need(target.tools, target.packages)
    (folder / "least.c").write_text("int main(void)\n{\n    return 0;\n}\n", "ascii")
    for command in (
        [*target.compile.split(), "-c", "least.c"],
        [*target.link.split(), "least.o", "-o", "least", *target.libraries.split()],
    ):
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_SECONDS, check=False)
        if result.returncode:
            packages = f"apt-get install --no-install-recommends {target.packages}"
            unavailable(f"needs what `{' '.join(command)}` misses: {packages}\n{result.stderr[:1000]}")


def call(command: Sequence[str], folder: Path) -> None:
    """Runs a compiler or linker in `folder`; it must neither fail nor say anything."""
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_SECONDS, check=False)
    output = (result.stdout + result.stderr)[:4000]
    assert (result.returncode, output) == (0, ""), f"{' '.join(command)}\n{output}"


def compiled(target: Target, sources: Iterable[Path], folder: Path, *flags: str) -> list[Path]:
    """The object files of these sources, made in `folder` without a warning."""
    names = [str(source) for source in sources]
    call([*target.compile.split(), *WARNINGS, f"-I{HERE}", "-I.", *flags, "-c", *names], folder)
    return [folder / f"{Path(name).stem}.o" for name in names]


def refusal(target: Target, source: Path) -> str:
    """What the compiler says when it refuses a source; it must refuse it."""
    command = [*target.compile.split(), "-I.", "-c", source.name]
    result = subprocess.run(command, cwd=source.parent, capture_output=True, text=True, timeout=_SECONDS, check=False)
    assert result.returncode, result.stdout + result.stderr
    return result.stderr


def run(target: Target, objects: Iterable[Path], folder: Path) -> tuple[int, list[str]]:
    """Links these objects and runs the program: the status that it ended with, and the lines that it wrote before."""
    call([*target.link.split(), *map(str, objects), "-o", "program", *target.libraries.split()], folder)
    if target.convert:
        call(target.convert.split(), folder)
    result = subprocess.run(
        target.run.split(),
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=_SECONDS,
        text=True,
        check=False,
    )
    output = result.stderr if target.status_printed else result.stdout
    lines = [line for line in map(_plain, output.splitlines()) if line]
    ended = [index for index, line in enumerate(lines) if re.fullmatch(r"END \d{3}", line)]
    if target.status_printed:
        assert ended, f"{result.stdout}\n{result.stderr}"
        return int(lines[ended[0]].removeprefix("END ")), lines[: ended[0]]
    assert ended or result.returncode, "the output is cut"
    return result.returncode, lines[: ended[0]] if ended else lines


def _plain(line: str) -> str:
    """The line without simavr's colours, and without the dots that it prints for line ends."""
    return re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip(". \r")
