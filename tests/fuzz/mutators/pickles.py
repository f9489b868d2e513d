"""Changes of pickles at the granularity of opcodes, random pickle programs, and PyTorch's containers of them."""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable
from random import Random

from tests.fuzz.mutators import json_tree, zips
from tests.fuzz.mutators.havoc import havoc
from tests.fuzz.mutators.values import TEXTS, edited, integer, real, text

_STOP = b"."
_ZIP = b"PK\x03\x04"
_LONGEST_PROGRAM = 40

#: What a pickle of PyTorch names, what it must not name, and what is no name.
NAMES = tuple(
    name.replace(" ", "\n")
    for name in (
        *("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor", "torch._utils _rebuild_parameter"),
        *("torch._utils _rebuild_qtensor", "torch._tensor _rebuild_from_type_v2", "torch FloatStorage"),
        *("torch ByteStorage", "torch.storage UntypedStorage", "torch float32", "torch qint8", "torch Size"),
        *("torch.serialization _get_layout", "torch per_channel_affine", "torch device", "torch.nn Linear"),
        *("torch._utils _rebuild_wrapper_subclass", "numpy dtype", "numpy._core.multiarray _reconstruct"),
        *("numpy ndarray", "collections OrderedDict", "collections defaultdict", "builtins set", "builtins list"),
        *("__builtin__ set", "builtins slice", "builtins complex", "builtins bytearray", "builtins getattr"),
        *("_codecs encode", "copy_reg _reconstructor", "copyreg __newobj__", "argparse Namespace", "os system"),
        *("builtins eval", "builtins exec", "subprocess Popen", "torch.hub load", "__main__ Mine", "x y.z"),
    )
)


def file(data: bytes, other: bytes, random: Random) -> bytes:
    """A file of PyTorch: a ZIP archive, or pickles one after the other with what follows them."""
    if data[:4] == _ZIP:
        return zips.changed(data, other, random, _record)
    return pickles(data, other, random)


def _record(content: bytes, counterpart: bytes, random: Random) -> bytes:
    """What a record of an archive holds: JSON, a pickle, or numbers."""
    if content[:1] == b"{":
        return json_tree.document(content, counterpart, random)
    return pickles(content, counterpart, random)


def pickles(data: bytes, other: bytes, random: Random) -> bytes:
    """Pickles one after the other, and what follows them, with a few opcodes changed."""
    operations, rest = _divided(data)
    if len(operations) < 2:
        return havoc(data, other, random)
    if random.random() < 0.05:
        return program(random) + rest
    others = _divided(other)[0]
    for _ in range(random.choice((1, 1, 2, 4))):
        operations = edited(random, operations, others, lambda each: _other_operation(each, random))
        if random.random() < 0.3:
            operations.insert(random.randrange(len(operations) + 1), operation(random))
    return b"".join(operations) + rest


def program(random: Random) -> bytes:
    """A pickle of opcodes at random, most of which find something on the stack."""
    made = [operation(random, pushing=True) for _ in range(random.randrange(3, 10))]
    made += [operation(random) for _ in range(random.randrange(_LONGEST_PROGRAM))]
    return b"\x80" + bytes([random.choice((2, 4, 5))]) + b"".join(made) + _STOP


def operation(random: Random, *, pushing: bool = False) -> bytes:
    """One opcode with an argument of its kind."""
    opcode = random.choice(_PUSHING if pushing else pickletools.opcodes)
    argument = b"" if opcode.arg is None else ARGUMENTS[opcode.arg.name](random)
    return opcode.code.encode("latin-1") + argument


def _other_operation(operation_: bytes, random: Random) -> bytes:
    """The same opcode with another argument, or another opcode."""
    opcode = _BY_CODE.get(operation_[:1])
    if opcode is None or opcode.arg is None or random.random() < 0.25:
        return operation(random)
    if opcode.arg.name == "unicodestring4" and random.random() < 0.5:
        return b"X" + _counted(text(random, operation_[5:].decode("utf-8", "replace")), "<I")
    return operation_[:1] + ARGUMENTS[opcode.arg.name](random)


def _divided(data: bytes) -> tuple[list[bytes], bytes]:
    """The opcodes with their arguments, of all pickles at the beginning, and what follows the last one."""
    operations: list[bytes] = []
    position = 0
    while data[position : position + 1] == b"\x80":
        starts: list[int] = []
        try:
            starts = [position + (at or 0) for _, _, at in pickletools.genops(data[position:])]
        except Exception:  # whatever pickletools makes of a damaged one
            break
        end = starts[-1] + 1
        operations += [data[a:b] for a, b in zip(starts, [*starts[1:], end], strict=True)]
        position = end
    return operations, data[position:]


def _packed(form: str) -> Callable[[Random], bytes]:
    most = (1 << 8 * struct.calcsize(form)) - 1

    def make(random: Random) -> bytes:
        value = random.randrange(16) if random.random() < 0.6 else integer(random, 1, most)
        return value.to_bytes(struct.calcsize(form), "little")

    return make


def _long(form: str) -> Callable[[Random], bytes]:
    def make(random: Random) -> bytes:
        value = integer(random, random.randrange(100))
        content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)[:255]
        return len(content).to_bytes(struct.calcsize(form), "little") + content

    return make


def _string(form: str) -> Callable[[Random], bytes]:
    return lambda random: _counted(random.choice((text(random), "storage", "cpu", "0", "weight", "_data")), form)


def _counted(value: str, form: str) -> bytes:
    width = struct.calcsize(form)
    content = value.encode("utf-8", "surrogatepass")[: (1 << 8 * width) - 1]
    return len(content).to_bytes(width, "little") + content


def _line(random: Random) -> bytes:
    return random.choice(TEXTS).encode("utf-8", "surrogatepass").replace(b"\n", b" ") + b"\n"


def _decimal(random: Random) -> bytes:
    return str(integer(random, random.randrange(8))).encode() + b"\n"


#: An argument of each of pickletools' kinds.
ARGUMENTS: dict[str, Callable[[Random], bytes]] = {
    "uint1": _packed("<B"),
    "uint2": _packed("<H"),
    "int4": _packed("<i"),
    "uint4": _packed("<I"),
    "uint8": _packed("<Q"),
    "long1": _long("<B"),
    "long4": _long("<I"),
    "string1": _string("<B"),
    "string4": _string("<I"),
    "bytes1": _string("<B"),
    "bytes4": _string("<I"),
    "bytes8": _string("<Q"),
    "bytearray8": _string("<Q"),
    "unicodestring1": _string("<B"),
    "unicodestring4": _string("<I"),
    "unicodestring8": _string("<Q"),
    "stringnl": lambda random: repr(random.choice(TEXTS)).encode("ascii", "replace") + b"\n",
    "stringnl_noescape": _line,
    "unicodestringnl": _line,
    "stringnl_noescape_pair": lambda random: random.choice(NAMES).encode() + b"\n",
    "decimalnl_short": _decimal,
    "decimalnl_long": lambda random: _decimal(random)[:-1] + b"L\n",
    "floatnl": lambda random: repr(real(random)).encode() + b"\n",
    "float8": lambda random: struct.pack(">d", real(random)),
}
_BY_CODE = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}
_PUSHING = [opcode for opcode in pickletools.opcodes if not opcode.stack_before and opcode.stack_after]
